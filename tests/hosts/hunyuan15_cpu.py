"""Run a HunyuanVideo-1.5 checkout's scripts on a CPU, with tiny random weights and pictures of a quarter of the size:
everything of theirs is real but the text, glyph and picture encoders, the VAE, the super-resolution and the attention
kernel.

    cd /folder/with/hyvideo && torchrun tests/hosts/hunyuan15_cpu.py magcache_generate.py --prompt ...
    cd /folder/with/hyvideo && python tests/hosts/hunyuan15_cpu.py --serve      # runs many (`wan_cpu.serve`)

The process group is gloo's.
"""

import logging
import os
import sys
import types
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import wan_cpu
from hunyuan_cpu import HostTorch
from torch.nn.functional import interpolate, scaled_dot_product_attention
from wan_cpu import generator_of

warnings.filterwarnings("ignore")
torch.set_num_threads(1)

TINY = {
    "patch_size": [1, 1, 1],
    "in_channels": 8,
    "hidden_size": 64,
    "heads_num": 2,
    "mlp_width_ratio": 2.0,
    "mm_double_blocks_depth": 3,
    "mm_single_blocks_depth": 0,
    "rope_dim_list": [8, 12, 12],
    "text_states_dim": 48,
    "attn_mode": "flash",
    "glyph_byT5_v2": True,
    "vision_projection": "linear",
    "vision_states_dim": 1152,
    "use_cond_type_embedding": True,
}


class Float32Torch(HostTorch):
    """torch, where every device is the CPU, which knows no autocast of layer norms: all is float32 (run with --dtype
    fp32)."""

    bfloat16 = torch.float32

    @staticmethod
    def autocast(**options):
        return nullcontext()


class LoguruLogger(logging.Logger):
    def log(self, level, message, *args, **kwargs):
        super().log(logging.getLevelName(level) if isinstance(level, str) else level, message, *args, **kwargs)


class Hunyuan15Vae(torch.nn.Module):
    """Latents of 4 frames and 64x64 pixels each; decoded to a quarter of that width."""

    config = types.SimpleNamespace(
        block_out_channels=(1, 2, 3, 4), scaling_factor=1.0, shift_factor=None, ffactor_spatial=64, ffactor_temporal=4
    )

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return cls()

    def set_tile_sample_min_size(self, *args):
        pass

    enable_tile_parallelism = set_tile_sample_min_size

    def memory_efficient_context(self):
        return torch.no_grad()

    def encode(self, pictures):
        height, width = (size // 64 for size in pictures.shape[3:])
        small = torch.nn.functional.adaptive_avg_pool3d(pictures, (1, height, width))
        return types.SimpleNamespace(
            latent_dist=types.SimpleNamespace(mode=lambda: small.repeat(1, 3, 1, 1, 1)[:, : TINY["in_channels"]])
        )

    def decode(self, latents, **kwargs):
        wan_cpu.decoded.extend(latents.clone())
        frames, height, width = latents.shape[2:]
        return [interpolate(latents[:, :3].float().tanh(), size=(4 * frames - 3, 16 * height, 16 * width))]


class Hunyuan15TextEncoder(torch.nn.Module):
    max_length, dtype = 24, torch.float32

    def text2tokens(self, texts, **kwargs):
        return [texts] if isinstance(texts, str) else texts

    def encode(self, texts, **kwargs):
        states = torch.stack([torch.randn(24, TINY["text_states_dim"], generator=generator_of(text)) for text in texts])
        mask = torch.tensor([[index < 8 + len(text) % 16 for index in range(24)] for text in texts]).long()
        return types.SimpleNamespace(hidden_state=states, attention_mask=mask)


class VisionEncoder(torch.nn.Module):
    def encode_images(self, picture):
        states = torch.randn(1, 729, 1152, generator=generator_of(str(picture.sum())))
        return types.SimpleNamespace(last_hidden_state=states)


class SuperResolution:
    """Twice the frames' height and width, and a record of what it was asked for."""

    def __init__(self, pipe):
        self.pipe, self.transformer, self.enable_offloading = pipe, torch.nn.Identity(), False

    def apply_infer_optimization(self, **kwargs):
        pass

    def __call__(self, lq_latents, **kwargs):
        frames = self.pipe.vae.decode(lq_latents)[0] / 2 + 0.5
        return types.SimpleNamespace(videos=frames.repeat_interleave(2, 3).repeat_interleave(2, 4))


def flash_attn_no_pad(qkv, key_padding_mask, **kwargs):
    """Attention of [batch, tokens, 3, heads, width] among the tokens that are no padding; the others come out as 0."""
    output = torch.zeros_like(qkv[:, :, 0])
    for index, kept in enumerate(key_padding_mask.bool()):
        q, k, v = (qkv[index, kept, part].transpose(0, 1)[None] for part in range(3))
        output[index, kept] = scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)
    return output


def torchvision_transforms():
    """The few transforms that the pipeline makes of a picture."""
    import numpy as np

    transforms = types.ModuleType("torchvision.transforms")

    class Compose:
        def __init__(self, steps):
            self.steps = steps

        def __call__(self, picture):
            for step in self.steps:
                picture = step(picture)
            return picture

    def crop(size):
        def center_crop(picture):
            left, top = (picture.width - size[1]) // 2, (picture.height - size[0]) // 2
            return picture.crop((left, top, left + size[1], top + size[0]))

        return center_crop

    transforms.Compose = Compose
    transforms.InterpolationMode = types.SimpleNamespace(LANCZOS=1)
    transforms.Resize = lambda size, interpolation: lambda picture: picture.resize((size[1], size[0]), interpolation)
    transforms.CenterCrop = crop
    transforms.ToTensor = lambda: lambda picture: torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    transforms.Normalize = lambda mean, std: lambda tensor: (tensor - mean[0]) / std[0]
    return transforms


def stand_in_packages15():
    loguru, torchvision = types.ModuleType("loguru"), types.ModuleType("torchvision")
    loguru.logger = LoguruLogger("hyvideo")
    torchvision.transforms = torchvision_transforms()
    return {"loguru": loguru, "torchvision": torchvision, "torchvision.transforms": torchvision.transforms}


def import_hyvideo15():
    """Import the `hyvideo` of sys.path with everything that a GPU would do replaced."""
    # Before the stand-ins: these look around which packages there are.
    import diffusers.models  # noqa: F401
    import torchmetrics.functional.image  # noqa: F401
    import transformers.modeling_utils  # noqa: F401

    sys.modules.update(stand_in_packages15())
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    plain_to, cpu = torch.nn.Module.to, torch.device("cpu")
    torch.nn.Module.to = lambda self, *args, **kwargs: plain_to(  # generate.py asks for "cuda"
        self, *(cpu if isinstance(value, torch.device) else value for value in args), **kwargs
    )
    from torch.distributed import device_mesh

    plain_mesh = device_mesh.init_device_mesh
    device_mesh.init_device_mesh = lambda device, *args, **kwargs: plain_mesh("cpu", *args, **kwargs)

    import hyvideo.commons as commons
    from hyvideo.models.transformers import hunyuanvideo_1_5_transformer as model
    from hyvideo.models.transformers.modules import attention
    from hyvideo.pipelines import hunyuan_video_pipeline as pipeline

    commons.is_flash2_available = lambda: True
    attention.flash_attn_no_pad = flash_attn_no_pad
    large_mapper = model.ByT5Mapper
    model.ByT5Mapper = lambda in_dim, out_dim, hidden_dim, out_dim1, use_residual: large_mapper(
        in_dim, 32, 32, out_dim1, use_residual
    )
    pipeline.torch = Float32Torch("torch")
    pipeline.get_gpu_memory = lambda: 80 << 30
    pipeline.hunyuanvideo_15_vae = types.SimpleNamespace(AutoencoderKLConv3D=Hunyuan15Vae)
    pipe = pipeline.HunyuanVideo_1_5_Pipeline
    glyphs = {"byt5_model": torch.nn.Identity(), "byt5_tokenizer": None, "byt5_max_length": 16}
    pipe._load_byt5 = classmethod(lambda cls, *args, **kwargs: (glyphs, None))
    pipe._load_text_encoders = classmethod(lambda cls, *args, **kwargs: (Hunyuan15TextEncoder(), None))
    pipe._load_vision_encoder = classmethod(lambda cls, *args, **kwargs: VisionEncoder())
    pipe.create_sr_pipeline = lambda self, *args, **kwargs: SuperResolution(self)


def tiny_hunyuan15(version="480p_t2v", seed=0):
    """HunyuanVideo_1_5_DiffusionTransformer with random weights, none of them zero."""
    from hyvideo.models.transformers.hunyuanvideo_1_5_transformer import HunyuanVideo_1_5_DiffusionTransformer

    torch.manual_seed(seed)
    resolution, task = version.split("_")[:2]
    meanflow = "step_distilled" in version
    model = HunyuanVideo_1_5_DiffusionTransformer(
        **TINY, ideal_resolution=resolution, ideal_task=task, use_meanflow=meanflow
    )
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval().requires_grad_(False)


def write_hunyuan15(folder, *versions):
    """A folder for --model_path, each version with weights of its own."""
    from hyvideo.schedulers.scheduling_flow_match_discrete import FlowMatchDiscreteScheduler

    FlowMatchDiscreteScheduler(shift=7.0).save_pretrained(Path(folder) / "scheduler")
    for seed, version in enumerate(versions):
        tiny_hunyuan15(version, seed).save_pretrained(Path(folder) / "transformer" / version)


if __name__ == "__main__":
    sys.path.insert(1, os.getcwd())
    import_hyvideo15()
    wan_cpu.write_wan = write_hunyuan15
    init_process_group = dist.init_process_group
    dist.init_process_group = lambda *args, **kwargs: init_process_group("gloo")
    if sys.argv[1] == "--serve":
        wan_cpu.serve()
    else:
        wan_cpu.run_script(*sys.argv[1:])
