"""The trained demo video model in a Wan checkout: its weights under Wan's own names, its text encoder and VAE."""

import functools
import json
import sys
from pathlib import Path

import torch

# Wan's own names of what diffusers calls otherwise. Wan's third norm precedes the attention to the text.
NAMES = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    ".attn1.": ".self_attn.",
    ".attn2.": ".cross_attn.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".o.",
    ".norm2.": ".norm3.",
    ".ffn.net.0.proj.": ".ffn.0.",
    ".ffn.net.2.": ".ffn.2.",
    ".scale_shift_table": ".modulation",
}


def wans_name(name):
    if name == "scale_shift_table":
        return "head.modulation"
    for theirs, wans in NAMES.items():
        name = name.replace(theirs, wans)
    return name


def write_wan_demo(demo, folder):
    """A checkpoint for WanModel.from_pretrained, of the diffusers folder `demo`."""
    from diffusers import WanTransformer3DModel
    from wan.modules.model import WanModel

    trained = WanTransformer3DModel.from_pretrained(Path(demo) / "transformer", torch_dtype=torch.float32)
    config = trained.config
    with_sizes(WanModel, config)
    model = WanModel(
        in_dim=config.in_channels,
        out_dim=config.out_channels,
        dim=config.num_attention_heads * config.attention_head_dim,
        num_heads=config.num_attention_heads,
        **{name: config[name] for name in ("ffn_dim", "freq_dim", "num_layers", "eps")},
    )
    model.load_state_dict({wans_name(name): value for name, value in trained.state_dict().items()})
    model.save_pretrained(folder)


def with_sizes(wan_model, config):
    """Let the class make models of these sizes, which Wan neither saves to a checkpoint nor reads from one."""
    plain = wan_model.__init__
    sizes = {name: config[name] for name in ("text_dim", "cross_attn_norm")}

    @functools.wraps(plain)
    def init(self, *args, **kwargs):
        plain(self, *args, **{**kwargs, **sizes, "patch_size": tuple(config["patch_size"])})

    wan_model.__init__ = init


def use(demo, decoded):
    """Let the pipelines of the imported `wan` take the text encoder, the VAE and the sizes of the demo model. `decoded`
    gets the latents of its clips."""
    from diffusers import AutoencoderKLWan
    from transformers import T5TokenizerFast, UMT5EncoderModel
    from wan.configs import SIZE_CONFIGS, WAN_CONFIGS
    from wan.modules.model import WanModel

    demo = Path(demo)
    with_sizes(WanModel, json.loads((demo / "transformer" / "config.json").read_text()))

    class TextEncoder:
        def __init__(self, *args, **kwargs):
            self.tokenizer = T5TokenizerFast.from_pretrained(demo / "tokenizer")
            self.model = UMT5EncoderModel.from_pretrained(demo / "text_encoder")

        def __call__(self, texts, device):
            tokens = [self.tokenizer(text, return_tensors="pt") for text in texts]
            return [self.model(one.input_ids, one.attention_mask).last_hidden_state[0] for one in tokens]

    class VAE:
        def __init__(self, *args, **kwargs):
            self.vae = AutoencoderKLWan.from_pretrained(demo / "vae", torch_dtype=torch.float32)
            self.model = type("Sizes", (torch.nn.Module,), {"z_dim": self.vae.config.z_dim})()

        def decode(self, latents):
            decoded.extend(latent.clone() for latent in latents)
            return [self.vae.decode(latent[None]).sample[0] for latent in latents]

    for name, module in list(sys.modules.items()):
        if name.startswith("wan.") and hasattr(module, "T5EncoderModel"):
            for theirs in vars(module).keys() & {"WanVAE", "Wan2_1_VAE", "Wan2_2_VAE"}:
                setattr(module, theirs, VAE)
            module.T5EncoderModel = TextEncoder
    for task in ("t2v-1.3B", "t2v-A14B", "ti2v-5B"):
        if task in WAN_CONFIGS:
            WAN_CONFIGS[task].update(vae_stride=(4, 16, 16), patch_size=(1, 1, 1), sample_neg_prompt="")
    SIZE_CONFIGS["832*480"] = SIZE_CONFIGS["1280*704"] = (64, 64)
