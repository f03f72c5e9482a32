"""Run a HunyuanVideo checkout's scripts on a CPU, with tiny random weights and pictures of an eighth of the size:
everything of theirs is real but the text encoders, the VAE, the attention kernel, xfuser's collectives and packages
that a test does not need.

    cd /folder/with/hyvideo && python tests/hosts/hunyuan_cpu.py magcache_sample_video.py --video-size 544 960 ...
    cd /folder/with/hyvideo && python tests/hosts/hunyuan_cpu.py --checkpoint     # writes ckpts/

Under WORLD_SIZE > 1 the process group is gloo's. HUNYUAN_LATE=1 puts the patch on after parallelize_transformer.
"""

import logging
import os
import runpy
import sys
import types
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import wan_characters
from torch.nn.functional import interpolate, scaled_dot_product_attention
from wan_cpu import CpuTorch, generator_of

warnings.filterwarnings("ignore")
torch.set_num_threads(1)

WEIGHTS = Path("ckpts/hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt")
FP8_WEIGHTS = WEIGHTS.with_name("mp_rank_00_model_states_fp8.pt")
TINY = {
    "mm_double_blocks_depth": 2,
    "mm_single_blocks_depth": 3,
    "rope_dim_list": [8, 12, 12],
    "hidden_size": 64,
    "heads_num": 2,
    "mlp_width_ratio": 2,
    "guidance_embed": True,
}


class HostTorch(CpuTorch):
    """torch, where every device is the CPU and so is autocast's."""

    @staticmethod
    def autocast(device_type, **options):
        return torch.autocast("cpu", **options)


class HunyuanVae(torch.nn.Module):
    """Latents of 4 frames and 8x8 pixels each, blown up."""

    config = types.SimpleNamespace(block_out_channels=(1, 2, 3, 4), scaling_factor=1.0, shift_factor=None)
    dtype, device = torch.float32, torch.device("cpu")

    def enable_tiling(self):
        pass

    def encode(self, pictures):
        small = torch.nn.functional.adaptive_avg_pool3d(pictures, (1, *(size // 8 for size in pictures.shape[3:])))
        latents = small.repeat(1, 6, 1, 1, 1)[:, :16].float()
        return types.SimpleNamespace(latent_dist=types.SimpleNamespace(mode=lambda: latents))

    def decode(self, latents, **kwargs):
        frames, height, width = latents.shape[2:]
        return [interpolate(latents[:, :3].float().tanh(), size=(4 * frames - 3, 8 * height, 8 * width))]


class HunyuanTextEncoder(torch.nn.Module):
    device = torch.device("cpu")

    def __init__(self, text_encoder_type, text_encoder_precision, **kwargs):
        from hyvideo.constants import PRECISION_TO_TYPE

        super().__init__()
        self.kind, self.dtype = text_encoder_type, PRECISION_TO_TYPE[text_encoder_precision]

    def text2tokens(self, texts, **kwargs):
        return texts

    def encode(self, texts, **kwargs):
        if self.kind == "clipL":
            states = torch.stack([torch.randn(768, generator=generator_of(text)) for text in texts])
            return types.SimpleNamespace(hidden_state=states, attention_mask=None)
        states = torch.stack([torch.randn(24, 4096, generator=generator_of(text)) for text in texts])
        mask = torch.tensor([[index < 8 + len(text) % 16 for index in range(24)] for text in texts]).long()
        return types.SimpleNamespace(hidden_state=states, attention_mask=mask)


def attend(q, k, v):
    """Attention of [batch, tokens, heads, width]."""
    return scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, *args):
    """Within each segment of [tokens, heads, width]: a video with its text, then the padding."""
    ends = cu_seqlens_q.tolist()
    return torch.cat([attend(*(part[None, begin:end] for part in (q, k, v)))[0] for begin, end in zip(ends, ends[1:])])


def get_cu_seqlens(text_mask, img_len):
    length = text_mask.shape[1] + img_len
    ends = [
        [index * length + int(text) + img_len, (index + 1) * length] for index, text in enumerate(text_mask.sum(dim=1))
    ]
    return torch.tensor([0, *sum(ends, [])], dtype=torch.int32)


def gather_sequence(tensor, dim):
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim=dim)


class LongContextAttention:
    def __call__(self, _, query, key, value, joint_tensor_query, joint_tensor_key, joint_tensor_value, **kwargs):
        return attend(
            torch.cat([query, joint_tensor_query], 1),
            torch.cat([gather_sequence(key, 1), joint_tensor_key], 1),
            torch.cat([gather_sequence(value, 1), joint_tensor_value], 1),
        )


def hunyuan_sequence_parallelism():
    """What HunyuanVideo takes of xfuser, on the default process group."""
    distributed = types.ModuleType("xfuser.core.distributed")
    distributed.get_sequence_parallel_world_size, distributed.get_sequence_parallel_rank = (
        dist.get_world_size,
        dist.get_rank,
    )
    distributed.get_sp_group = lambda: types.SimpleNamespace(all_gather=gather_sequence)
    distributed.init_distributed_environment = distributed.initialize_model_parallel = lambda *args, **kwargs: None
    attention = types.ModuleType("xfuser.core.long_ctx_attention")
    attention.xFuserLongContextAttention = LongContextAttention
    return {
        "xfuser": types.ModuleType("xfuser"),
        "xfuser.core": types.ModuleType("xfuser.core"),
        "xfuser.core.distributed": distributed,
        "xfuser.core.long_ctx_attention": attention,
    }


def stand_in_packages():
    loguru, torchvision = types.ModuleType("loguru"), types.ModuleType("torchvision")
    loguru.logger = logging.getLogger("hyvideo")
    torchvision.utils = types.SimpleNamespace(make_grid=lambda pictures, nrow: pictures[0])
    torchvision.transforms = types.ModuleType("torchvision.transforms")
    vars(torchvision.transforms).update(wan_characters.transforms())
    tensorboard = types.ModuleType("torch.utils.tensorboard")
    tensorboard.SummaryWriter = object
    return {
        "deepspeed": types.ModuleType("deepspeed"),
        "torch.utils.tensorboard": tensorboard,
        "loguru": loguru,
        "torchvision": torchvision,
        "torchvision.transforms": torchvision.transforms,
    }


def import_hyvideo():
    """Import the `hyvideo` of sys.path with everything that a GPU would do replaced."""
    # Before the stand-ins: these look around which packages there are.
    import diffusers  # noqa: F401
    import torchmetrics.functional.image  # noqa: F401
    import transformers.modeling_utils  # noqa: F401

    sys.modules.update(stand_in_packages())
    if "WORLD_SIZE" in os.environ:
        sys.modules.update(hunyuan_sequence_parallelism())
        init_process_group = dist.init_process_group
        dist.init_process_group = lambda backend: init_process_group("gloo")
        torch.cuda.set_device = lambda device: None
    plain_sum = torch.Tensor.sum
    torch.Tensor.sum = lambda self, *args, **kwargs: plain_sum(
        self.float() if self.dtype == torch.float8_e4m3fn else self, *args, **kwargs
    )

    import hyvideo.inference as inference
    from hyvideo.diffusion.pipelines import pipeline_hunyuan_video as pipeline
    from hyvideo.modules import attenion, models

    inference.torch = pipeline.torch = HostTorch("torch")
    attenion.get_cu_seqlens = models.get_cu_seqlens = get_cu_seqlens
    attenion.flash_attn_varlen_func = flash_attn_varlen_func
    attenion.flash_attn = types.SimpleNamespace(__version__="2.7.0")
    attenion._flash_attn_forward = lambda q, k, v, **kwargs: (attend(q, k, v),)
    models.HUNYUAN_VIDEO_CONFIG["HYVideo-T/2-cfgdistill"] = TINY
    models.HUNYUAN_VIDEO_CONFIG["HYVideo-T/2"] = {name: TINY[name] for name in TINY if name != "guidance_embed"}
    if hasattr(inference, "generate_crop_size_list"):  # image-to-video
        sizes = inference.generate_crop_size_list
        inference.generate_crop_size_list = lambda side, multiple: [
            (height // 8 // 16 * 16, width // 8 // 16 * 16) for height, width in sizes(side, 4 * multiple)
        ]
    inference.load_vae = lambda *args, **kwargs: (HunyuanVae(), None, 8, 4)
    inference.TextEncoder = HunyuanTextEncoder
    inference.align_to = lambda size, multiple: -(-size // (8 * multiple)) * multiple
    offload = pipeline.HunyuanVideoPipeline.enable_sequential_cpu_offload
    pipeline.HunyuanVideoPipeline.enable_sequential_cpu_offload = lambda self: offload(self, device="cpu")
    if os.environ.get("HUNYUAN_LATE"):
        parallelize_early(inference)


def parallelize_early(inference):
    """Take hold of the forward before anything can be put beneath."""
    load, parallelize = inference.HunyuanVideoSampler.load_diffusion_pipeline, inference.parallelize_transformer

    def load_and_parallelize(self, *args, **kwargs):
        pipe = load(self, *args, **kwargs)
        parallelize(pipe)
        return pipe

    inference.HunyuanVideoSampler.load_diffusion_pipeline = load_and_parallelize
    inference.parallelize_transformer = lambda pipe: None


def tiny_hunyuan(condition=None):
    """HYVideoDiffusionTransformer with random weights, none of them zero. condition: of HunyuanVideo-I2V."""
    from hyvideo.modules.models import HYVideoDiffusionTransformer

    torch.manual_seed(0)
    widths = types.SimpleNamespace(text_states_dim=4096, text_states_dim_2=768)
    vars(widths).update(i2v_condition_type=condition, gradient_checkpoint=False, gradient_checkpoint_layers=-1)
    channels = {"in_channels": 33, "out_channels": 16} if condition == "latent_concat" else {"in_channels": 16}
    model = HYVideoDiffusionTransformer(widths, **channels, **TINY)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval().requires_grad_(False)


def write_checkpoints():
    """The weights where sample_video.py looks for them, and those of the double and single blocks in FP8 with their
    scales."""
    WEIGHTS.parent.mkdir(parents=True)
    model = tiny_hunyuan("token_replace")
    torch.save({"module": model.state_dict()}, WEIGHTS)
    of_pictures = Path(str(WEIGHTS).replace("t2v", "i2v"))
    of_pictures.parent.mkdir(parents=True)
    torch.save({"module": model.state_dict()}, of_pictures)
    weights, scales = model.state_dict(), {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and ("double_blocks" in name or "single_blocks" in name):
            scales[name] = layer.weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
            weights[f"{name}.weight"] = (layer.weight / scales[name]).to(torch.float8_e4m3fn)
    torch.save({"module": weights}, FP8_WEIGHTS)
    torch.save(scales, FP8_WEIGHTS.with_name(FP8_WEIGHTS.name.replace(".pt", "_map.pt")))


if __name__ == "__main__":
    sys.path.insert(1, os.getcwd())
    import_hyvideo()
    if sys.argv[1] == "--checkpoint":
        write_checkpoints()
    else:
        sys.argv = sys.argv[1:]
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
