"""The table of docs/pipelines.md: every pipeline of the installed diffusers, and what MagCache can do for it.

    git clone --depth 1 https://github.com/huggingface/diffusers
    python benchmarks/pipelines_table.py --diffusers diffusers

Facts are proved on the tiny models of diffusers' own tests, without weights: the residual of a call, put back on the
same inputs, has to make the same output.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(REPOSITORY))

import torch  # noqa: E402
from outcomes import Outcomes  # noqa: E402

from common.blocks import Host  # noqa: E402
from common.denoisers import DENOISERS  # noqa: E402
from common.discover import discover, why_wrong  # noqa: E402
from common.errors import MagCacheError  # noqa: E402
from common.hosts import HOSTS, class_name, output_host  # noqa: E402
from common.tables import PRESETS  # noqa: E402

OUTPUT = REPOSITORY / "docs" / "pipelines.md"
PUBLISHED = {  # how the names of a class's tables begin
    "ChromaTransformer2DModel": ("chroma",),
    "FluxTransformer2DModel": ("flux-",),
    "HunyuanVideo15Transformer3DModel": ("hunyuanvideo-1.5",),
    "HunyuanVideoFramepackTransformer3DModel": ("framepack",),
    "HunyuanVideoTransformer3DModel": ("hunyuanvideo-t2v",),
    "QwenImageTransformer2DModel": ("qwen-image",),
    "WanTransformer3DModel": ("wan2.1-t2v", "wan2.1-i2v", "wan2.2"),
    "WanVACETransformer3DModel": ("wan2.1-vace",),
}
HEAD = """# Pipelines

What `magcache.enable(pipe, ...)` can do for every pipeline of diffusers {version} that calls a transformer or U-Net
step by step. `python benchmarks/pipelines_table.py --diffusers CHECKOUT` writes this page with the tiny models of
diffusers' own tests and the test suite.

* **A speed-up** (`speedup=`, `steps=`) works for every row that does not say `none`. It predicts the model's output, so
  it needs no calibration and no knowledge of the model. A pipeline whose loop does not follow `pipe.scheduler` computes
  everything.
* **Paper's rule** (`thresh=`, `K=`, `retention_ratio=`) reuses the residual of the blocks, so MagCache must know where
  the blocks begin and end. `proved`: adding a residual back to its own inputs gave the same output, up to rounding.
  `found`: the same, after MagCache found the blocks. `described`: the blocks are described, but no tiny model proves it
  here. `output`: only the model's output can be reused. At the first computed call MagCache repeats the proof on your
  model; if it fails, it predicts the output instead and says so.
* **Ratios** are needed by the paper's rule only: the published tables that come with MagCache for this class, or
  `first run`, in which MagCache measures them.

{families}
## Every pipeline

| pipeline | model | paper's rule | ratios |
|---|---|---|---|
"""
FAMILIES_HEAD = """## Whole pipelines, tested by family

Real pipelines of diffusers with small random weights, on a CPU, by `tests/hosts/test_pipelines.py`,
`tests/hosts/test_pipeline_families.py` and `tests/hosts/test_first_run.py`. ✓: tested, and passes. Empty: diffusers has
no such pipeline (image to image, control nets), cannot split the class on a CPU (context parallel), or the class has no
single stack of blocks to measure.

"""
TRIED = {  # tests: a column of that table
    "test_a_plain_speedup": "speed-up",
    "test_all_steps_computed_is_bit_equal": "all steps computed is bit-equal",
    "test_calibrated_and_by_the_papers_rule": "calibrated, paper's rule",
    "test_the_first_run_is_measured_and_the_next_is_cached": "measured in its first run",
    "test_another_run_in_between_changes_nothing": "run A leaves nothing for B",
    "test_stopped_at_each_step": "stopped at each step",
    "test_image_to_image": "image to image",
    "test_a_control_net": "control net",
    "test_a_lora_put_on_and_taken_off_while_enabled": "LoRA",
    "test_two_pipelines_and_two_threads": "shared, two threads",
    "test_offload_before_or_after": "offload",
    "test_layerwise_casting": "float8 storage",
    "test_compiled_blocks": "compiled blocks",
    "test_saved_while_enabled": "saved, loaded",
    "test_context_parallel_over_two_ranks": "context parallel, two ranks",
    "test_fsdp_over_two_ranks": "FSDP, two ranks",
}


def tiny_models(checkout: Path) -> Iterator[tuple[torch.nn.Module, dict]]:
    """(model with random weights, inputs of one call) of each transformer that diffusers tests."""
    sys.path.insert(0, str(checkout))
    for path in sorted((checkout / "tests" / "models" / "transformers").glob("test_models*.py")):
        try:
            module = importlib.import_module(f"tests.models.transformers.{path.stem}")
        except ImportError as error:
            print(f"{path.name} is left out: {error}")
            continue
        for name, config in vars(module).items():
            if not name.endswith("TesterConfig") or config.__module__ != module.__name__:
                continue
            try:
                torch.manual_seed(0)
                model = config().model_class(**config().get_init_dict()).eval().requires_grad_(False)
                for parameter in model.parameters():  # final layers often begin with zeros
                    parameter.copy_(0.1 * torch.randn(parameter.shape))
                inputs = config().get_dummy_inputs()
                with torch.no_grad():
                    model.forward(**inputs)
            except Exception as error:  # test code of others, for other packages and devices
                print(f"{path.stem}.{name} is left out: {type(error).__name__}: {error}")
                continue
            yield model, inputs


def proof(model: torch.nn.Module, inputs: dict, host: Host) -> str:
    """Why the facts are wrong for a model; "" if they are proved."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return why_wrong(model, host, inputs, lambda: model.forward(**inputs))


def denoiser_of(pipeline_class) -> str | None:
    """The class of a pipeline's denoiser, from the annotation of its parameter."""
    parameters = inspect.signature(pipeline_class.__init__).parameters
    for name in DENOISERS:
        if name in parameters:
            words = str(parameters[name].annotation).replace("'", " ").replace("|", " ").replace(">", " ").split()
            named = [
                word.rpartition(".")[2] for word in words if "Model" in word or "Transformer" in word or "UNet" in word
            ]
            return named[0] if named else None
    return None


def pipelines() -> Iterator[tuple[str, str]]:
    """Yields (pipeline, class of its denoiser) for the installed diffusers."""
    import diffusers

    for name in sorted(dir(diffusers)):
        value = getattr(diffusers, name, None) if name.endswith("Pipeline") else None
        if inspect.isclass(value) and issubclass(value, diffusers.DiffusionPipeline):
            denoiser = denoiser_of(value)
            if denoiser:
                yield name, denoiser


def tables_of(model_name: str) -> str:
    """The presets for a class, or that the first run measures."""
    names = [path.stem for path in sorted(PRESETS.glob("*.json")) if not path.stem.endswith("comfyui")]
    found = [name for name in names if name.startswith(PUBLISHED.get(model_name, ()))]
    return "published: " + ", ".join(found) if found else "first run"


def state_of(model_name: str, proofs: dict[str, str]) -> str:
    """Whether the paper's rule works for a class, as far as it was tested here."""
    import diffusers

    host = HOSTS.get(f"diffusers.{model_name}")
    if model_name in proofs:
        return proofs[model_name]
    if host is not None:
        return "described" if host.blocks else f"output, because {host.why_output}"
    forward = inspect.signature(getattr(diffusers, model_name).forward).parameters
    try:
        output_host(model_name, list(forward)[1:])
    except MagCacheError:
        return "none: the model gets no timestep"
    return "looked for at the first call, else output"


def proved(checkout: Path) -> dict[str, str]:
    """{class: result of the proof on its tiny models}."""
    proofs: dict[str, str] = {}
    for model, inputs in tiny_models(checkout):
        host, name = HOSTS.get(class_name(model)), type(model).__name__
        if host is None:
            with torch.no_grad():
                found = discover(model, (), inputs)
            proofs[name] = (
                f"found: {', '.join(found.host.blocks)}" if found.host.blocks else f"output, because {found.why}"
            )
        elif host.blocks and not proofs.get(name, "").startswith("output"):
            why = proof(model, inputs, host)
            proofs[name] = f"output, because {why}" if why else "proved"
            print(f"{name}: {proofs[name]}")
    return proofs


def passed_by_family(outcomes: Outcomes, families) -> dict[tuple[str, str], bool]:
    """{(function, family): whether the test passed each time}."""
    passed: dict[tuple[str, str], bool] = {}
    for test, outcome in outcomes.tests.items():
        function, _, parameters = test.rpartition("::")[2].partition("[")
        named = [family for family in families if family in parameters.rstrip("]").split("-")]
        key = function, named[0] if named else "flux"
        passed[key] = passed.get(key, True) and outcome == "passed"
    return passed


def families_table() -> str:
    """The table of tests on whole pipelines, one row per family."""
    import pytest
    from tabulate import tabulate

    sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "hosts")]
    from tiny_pipelines import FAMILIES

    outcomes = Outcomes()
    names = ("test_pipelines.py", "test_pipeline_families.py", "test_first_run.py")
    files = (REPOSITORY / "tests" / "hosts" / name for name in names)
    pytest.main(["-n", "0", *map(str, files)], plugins=[outcomes])
    passed, marks = passed_by_family(outcomes, FAMILIES), {True: "✓", False: "fails", None: ""}
    rows = [[family, *(marks[passed.get((test, family))] for test in TRIED)] for family in FAMILIES]
    return FAMILIES_HEAD + tabulate(rows, ["", *TRIED.values()], tablefmt="pipe") + "\n"


def main() -> None:
    import diffusers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", type=Path, required=True, help="a checkout, for the tiny models of its tests")
    args = parser.parse_args()
    families, proofs = families_table(), proved(args.diffusers)
    rows = [
        f"| {pipeline} | {model_name} | {state_of(model_name, proofs)} | "
        f"{tables_of(model_name) if state_of(model_name, proofs) in ('proved', 'described') else '-'} |"
        for pipeline, model_name in pipelines()
    ]
    OUTPUT.write_text(
        HEAD.format(version=diffusers.__version__, families=families) + "\n".join(rows) + "\n", encoding="utf-8"
    )
    print(f"{OUTPUT}: {len(rows)} pipelines, {len(proofs)} classes tried")


if __name__ == "__main__":
    main()
