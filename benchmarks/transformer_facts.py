"""Facts of diffusers' transformers, so that the benchmarks run on any of them (docs/design.md says what each fact
is)."""

from common.blocks import Host
from common.errors import MagCacheError
from common.scripts.flux import FLUX

HOSTS = {
    "FluxTransformer2DModel": FLUX,
    "ChromaTransformer2DModel": Host(
        blocks=("transformer_blocks", "single_transformer_blocks"), final_layer="norm_out", timestep_scale=1.0
    ),
    "HunyuanVideoTransformer3DModel": Host(
        blocks=("transformer_blocks", "single_transformer_blocks"), final_layer="norm_out"
    ),
    "QwenImageTransformer2DModel": Host(blocks=("transformer_blocks",), final_layer="norm_out", timestep_scale=1.0),
    "WanTransformer3DModel": Host(blocks=("blocks",), final_layer="norm_out"),
}


def host_of(transformer):
    """Raises MagCacheError for a class whose facts are not here."""
    name = type(transformer).__name__
    if name not in HOSTS:
        raise MagCacheError(
            f"The benchmarks know {', '.join(sorted(HOSTS))}, not {name}: add its facts to "
            "benchmarks/transformer_facts.py."
        )
    return HOSTS[name]
