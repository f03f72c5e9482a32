"""Run an Open-Sora checkout's scripts on a CPU, with tiny random weights: everything of theirs is real, their main()
and models and the configurations too, but the text encoders, the VAEs, the attention kernels, ColossalAI and the
packages that they import and a test does not need.

    cd /checkout && python tests/hosts/opensora_cpu.py magcache_inference.py configs/diffusion/inference/256px.py ...
    ... cd /checkout && python tests/hosts/opensora_cpu.py --serve            # runs many (`wan_cpu.serve`)

REUSE=##..#. in the environment: the transformer runs all its blocks, and where there is a dot their effect is replaced
by that of the last #. This is the independent computation with which a cached run is compared. Under WORLD_SIZE > 1 the
process group is gloo's.
"""

import hashlib
import importlib
import importlib.machinery
import os
import random
import sys
import types
import warnings

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import wan_cpu  # noqa: E402
from stand_ins import StandIn, StandIns  # noqa: E402
from torch import nn  # noqa: E402

warnings.filterwarnings("ignore")
torch.set_num_threads(1)

ABSENT = (
    "colossalai",
    "tensornvme",
    "pandarallel",
    "dill",
    "omegaconf",
    "openai",
    "torchvision",
    "liger_kernel",
    "flash_attn",
    "xformers",
    "timm",
    "cv2",
    "ftfy",
    "bs4",
    "apex",
    "rich",
    "matplotlib",
    "tensorboard",
    "galore_torch",
)


def seeded(text):
    return torch.Generator().manual_seed(int(hashlib.sha256(text.encode()).hexdigest()[:8], 16))


def randomized(model):
    """With small weights in the places where initialisation leaves zeros."""
    for name, parameter in model.named_parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.2, generator=seeded(name))
    return model.requires_grad_(False)


# What ColossalAI, flash-attention, liger, xformers and timm do, in a few lines.


def launch_from_torch(*args, **kwargs):
    if not dist.is_initialized():
        dist.init_process_group("gloo")


def set_seed(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class DistCoordinator:
    world_size = property(lambda self: dist.get_world_size())
    rank = property(lambda self: dist.get_rank())

    def block_all(self):
        dist.barrier()


class Policy:
    @staticmethod
    def append_or_create_method_replacement(description, policy, target_key):
        policy[target_key] = types.SimpleNamespace(
            attribute_replacement={}, sub_module_replacement=[], method_replacement=description
        )


class SequenceParallel:
    """The part of ColossalAI's booster that puts the host's own policy on its model."""

    def boost(self, model):
        from opensora.models.mmdit.distributed import MMDiTPolicy

        policy = MMDiTPolicy()
        policy.model, policy.shard_config = (
            model,
            types.SimpleNamespace(
                pipeline_stage_manager=None,
                enable_sequence_parallelism=True,
                enable_tensor_parallelism=False,
                sequence_parallel_size=dist.get_world_size(),
                sequence_parallelism_mode="ring_attn",
                sequence_parallel_process_group=dist.group.WORLD,
            ),
        )
        for target, description in policy.module_policy().items():
            for module in model.modules():
                if isinstance(module, target):
                    for name, value in description.attribute_replacement.items():
                        setattr(module, name, value)
                    for name, value in getattr(description, "method_replacement", {}).items():
                        setattr(module, name, types.MethodType(value, module))
        return types.SimpleNamespace(unwrap=lambda: model), None, None, None, None


def all_gather(tensor, dim, group=None):
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def all_gather_of_unequal(parts, tensor, group=None):
    """As nccl's all_gather, and not gloo's, for parts of unequal length along dimension 1."""
    longest = max(part.shape[1] for part in parts)
    padded = nn.functional.pad(tensor, (0, 0, 0, longest - tensor.shape[1]))
    for part, gathered in zip(parts, all_gather(padded[None], 0, group)):
        part.copy_(gathered[:, : part.shape[1]])


def attention(q, k, v, *args, **kwargs):
    """[batch, tokens, heads, width]"""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


def ring_attention(q, k, v, sp_group, *args, **kwargs):
    return attention(q, all_gather(k, 1, sp_group), all_gather(v, 1, sp_group))


def attention_by_segments(q, k, v, p=0.0, attn_bias=None):
    """xformers' attention under a BlockDiagonalMask, given as (lengths of queries, lengths of keys)."""
    if attn_bias is None:
        return attention(q, k, v)
    queries, keys = attn_bias
    return torch.cat(
        [attention(*parts) for parts in zip(q.split(queries, 1), k.split(keys, 1), v.split(keys, 1))], dim=1
    )


class Rope:
    @staticmethod
    def apply(q, k, cos, sin):
        def rotated(x):
            left, right = x.chunk(2, dim=-1)
            return (x * cos[:, None] + torch.cat([-right, left], dim=-1) * sin[:, None]).to(x.dtype)

        return rotated(q), rotated(k)


class RMSNorm:
    @staticmethod
    def apply(x, scale, eps, *args):
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        return normed.to(x.dtype) * scale


class Mlp(nn.Module):
    def __init__(self, in_features, hidden_features, out_features=None, act_layer=nn.GELU, drop=0):
        super().__init__()
        self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def write_frames(path, frames, fps, **options):
    import imageio

    imageio.mimwrite(path, frames.numpy(), fps=fps, macro_block_size=None)


class VideoWriter:
    """cv2's."""

    def __init__(self, path, code, fps, size):
        import imageio

        self.writer = imageio.get_writer(path, fps=fps, macro_block_size=None)

    def write(self, frame):
        self.writer.append_data(frame[..., ::-1])

    def release(self):
        self.writer.close()


def save_image(pictures, path, normalize, value_range):
    from PIL import Image

    low, high = value_range
    picture = (pictures[0].float().clamp(low, high) - low) / (high - low)
    Image.fromarray((picture * 255).byte().permute(1, 2, 0).cpu().numpy()).save(path)


def read_from_path(path, image_size, **options):
    """A picture as video of one frame, [3, 1, height, width] in -1..1; for a .mp4 forty frames of noise."""
    from PIL import Image

    height, width = image_size
    if path.endswith(".mp4"):
        return torch.rand(3, 40, height, width, generator=seeded(path)) * 2 - 1
    picture = np.array(Image.open(path).convert("RGB").resize((width, height)))
    return torch.from_numpy(picture).permute(2, 0, 1)[:, None].float() / 127.5 - 1


def stand_ins():
    """Modules of the packages that are replaced by a few lines."""
    contents = {
        "colossalai": {"launch_from_torch": launch_from_torch},
        "colossalai.utils": {"set_seed": set_seed, "get_current_device": lambda: torch.device("cpu")},
        "colossalai.cluster": {"DistCoordinator": DistCoordinator},
        "colossalai.cluster.dist_coordinator": {"DistCoordinator": DistCoordinator},
        "colossalai.shardformer.policies.base_policy": {
            "Policy": Policy,
            "ModulePolicyDescription": types.SimpleNamespace,
            "SubModuleReplacementDescription": types.SimpleNamespace,
        },
        "colossalai.shardformer.layer.utils": {"is_share_sp_tp": lambda mode: False},
        "flash_attn": {"flash_attn_func": attention},
        "liger_kernel.ops.rope": {"LigerRopeFunction": Rope},
        "liger_kernel.ops.rms_norm": {"LigerRMSNormFunction": RMSNorm},
        "xformers.ops": {
            "memory_efficient_attention": attention_by_segments,
            "fmha": types.SimpleNamespace(
                BlockDiagonalMask=types.SimpleNamespace(from_seqlens=lambda queries, keys: (queries, list(keys)))
            ),
        },
        "timm.models.vision_transformer": {"Mlp": Mlp},
        "timm.models.layers": {"DropPath": lambda rate: nn.Identity()},
        "torchvision.io": {"write_video": write_frames},
        "torchvision.utils": {"save_image": save_image},
        "torchvision.datasets.folder": {"IMG_EXTENSIONS": (".png", ".jpg"), "pil_loader": None},
        "cv2": {
            "setNumThreads": lambda count: None,
            "VideoWriter": VideoWriter,
            "COLOR_RGB2BGR": None,
            "VideoWriter_fourcc": lambda *letters: None,
            "cvtColor": lambda frame, code: frame[..., ::-1],
        },
    }
    for name, values in contents.items():
        vars(importlib.import_module(name)).update(values)


class PoolingVAE(nn.Module):
    """Videos are pooled to latents and back."""

    compression, micro_frame_size = (4, 8, 8), None
    device = property(lambda self: self.weight.device)
    dtype = property(lambda self: self.weight.dtype)

    def __init__(self, channels, stride=8):
        super().__init__()
        self.out_channels, self.stride = channels, stride
        self.weight = nn.Parameter(torch.ones(1))

    def get_latent_size(self, size):
        frames, height, width = size
        return [frames // 17 * 5 + -(-(frames % 17) // 4), height // self.stride, width // self.stride]

    def latent_frames(self, frames):
        return self.get_latent_size((frames, 1, 1))[0]

    def encode(self, video):
        shape = (self.latent_frames(video.shape[2]), *(size // self.stride for size in video.shape[3:]))
        small = nn.functional.adaptive_avg_pool3d(video.float(), shape).to(self.dtype)
        return small.repeat(1, -(-self.out_channels // 3), 1, 1, 1)[:, : self.out_channels]

    def decode(self, latents, num_frames=None):
        wan_cpu.decoded.append(latents.float().clone())
        latents = latents[None] if latents.ndim == 4 else latents
        size = (num_frames or 4 * latents.shape[2] - 3, *(self.stride * side for side in latents.shape[3:]))
        return nn.functional.interpolate(latents[:, :3].float().tanh(), size=size).to(self.dtype)


class CausalVAE(PoolingVAE):
    def latent_frames(self, frames):
        return (frames - 1) // 4 + 1


class PairedVAE(PoolingVAE):
    """Of the high-compression configuration: no frame of its own for the first."""

    def latent_frames(self, frames):
        return -(-frames // 4)

    def decode(self, latents, num_frames=None):
        return super().decode(latents, num_frames or 4 * latents.shape[2])


def versions_2(models):
    from opensora.models.mmdit.model import Flux

    def flux(from_pretrained=None, **config):
        torch.manual_seed(int(config["guidance_embed"]))
        tiny = {"hidden_size": 64, "num_heads": 4, "axes_dim": [4, 6, 6], "depth": 2, "depth_single_blocks": 3}
        return randomized(Flux(**{**config, **tiny}))

    class Text(nn.Module):
        def __init__(self, from_pretrained, max_length, **kwargs):
            super().__init__()
            self.clip = "openai" in from_pretrained

        def forward(self, texts, **kwargs):
            shape = (768,) if self.clip else (12, 4096)
            return torch.stack([torch.randn(shape, generator=seeded(text)) for text in texts])

    def builder(cls, *arguments):
        return lambda device_map=None, torch_dtype=None, **config: cls(*arguments).to(torch_dtype)

    models.register_module("flux", force=True, module=flux)
    models.register_module("text_embedder", force=True, module=Text)
    models.register_module("hunyuan_vae", force=True, module=builder(CausalVAE, 16))
    models.register_module("autoencoder_2d", force=True, module=builder(CausalVAE, 16))
    models.register_module("dc_ae", force=True, module=builder(PairedVAE, 128, 32))

    import opensora.models.mmdit.distributed
    import opensora.utils.cai
    import opensora.utils.inference

    opensora.models.mmdit.distributed.RingAttention.attention = staticmethod(ring_attention)
    opensora.models.mmdit.distributed.dist = types.SimpleNamespace(
        **{**vars(dist), "all_gather": all_gather_of_unequal}
    )
    opensora.utils.inference.read_from_path = read_from_path

    def get_booster(cfg, ae=False):
        if ae or cfg.get("plugin") != "hybrid":
            return None
        from opensora.acceleration.parallel_states import set_data_parallel_group

        cfg.plugin_config["sp_size"] = dist.get_world_size()
        for rank in range(dist.get_world_size()):
            group = dist.new_group([rank])
            if rank == dist.get_rank():
                set_data_parallel_group(group)
        return SequenceParallel()

    opensora.utils.cai.get_booster = get_booster


def versions_1(models):
    import opensora.acceleration.communications as communications
    import opensora.utils.inference_utils
    from opensora.models.stdit.stdit3 import STDiT3, STDiT3Config

    def stdit3(
        from_pretrained=None, enable_flash_attn=None, enable_layernorm_kernel=None, force_huggingface=None, **config
    ):
        torch.manual_seed(0)
        return randomized(STDiT3(STDiT3Config(depth=3, hidden_size=48, num_heads=4, **config)))

    class Text:
        output_dim, model_max_length, y_embedder = 32, 12, None

        def __init__(self, **config):
            self.tokenize_fn = lambda texts: {"texts": texts}

        def encode(self, texts):
            y = torch.stack([torch.randn(1, 12, 32, generator=seeded(text)) for text in texts])
            return {"y": y, "mask": torch.ones(len(texts), 12, dtype=torch.long)}

        def null(self, count):
            return self.y_embedder.y_embedding[None].repeat(count, 1, 1)[:, None]

    def all_to_all(tensor, world_size, group, scatter_dim, gather_dim):
        parts = all_gather(tensor[None], 0, group)
        return torch.cat(
            [part.tensor_split(world_size, scatter_dim)[dist.get_rank(group)] for part in parts], dim=gather_dim
        )

    communications._all_to_all = all_to_all
    communications._gather = lambda tensor, group, dim=-1: all_gather(tensor, dim, group)
    opensora.utils.inference_utils.read_from_path = read_from_path
    models.register_module("STDiT3-XL/2", force=True, module=stdit3)
    models.register_module("t5", force=True, module=Text)
    models.register_module("OpenSoraVAE_V1_2", force=True, module=lambda **config: PoolingVAE(4))
    models.register_module("OpenSoraVAE_V1_3", force=True, module=lambda **config: PoolingVAE(16))
    import opensora.models.text_encoder.t5 as t5

    t5.text_preprocessing = str.lower


class Reuse:
    """Where REUSE has a dot, the residual of the last computed step behind the blocks, by torch's own hooks. All blocks
    run."""

    def __init__(self, model, strip):
        self.strip, self.step = strip, -1
        pairs = hasattr(model, "spatial_blocks")
        first, *_ = model.spatial_blocks if pairs else model.double_blocks
        first.register_forward_pre_hook(self.before)
        if pairs:
            model.temporal_blocks[-1].register_forward_hook(lambda block, arguments, output: self.after(output))
        else:
            model.final_layer.register_forward_pre_hook(
                lambda layer, arguments: (self.after(arguments[0]), *arguments[1:])
            )

    def before(self, block, arguments):
        self.step, self.tokens = (self.step + 1) % len(self.strip), arguments[0]

    def after(self, tokens):
        if self.strip[self.step] == "#":
            self.residual = tokens - self.tokens
            return tokens
        return self.tokens + self.residual


def import_opensora():
    """Import the `opensora` of sys.path with everything that a GPU would do replaced."""
    # Before the stand-ins: these look around which packages there are.
    import diffusers.models.autoencoders  # noqa: F401
    import peft  # noqa: F401
    import torchmetrics.functional.image  # noqa: F401
    import transformers.modeling_utils  # noqa: F401

    sys.meta_path.insert(0, StandIns(ABSENT))
    stand_ins()
    sys.modules.setdefault("torch.utils.tensorboard", StandIn("torch.utils.tensorboard"))
    torch.cuda.synchronize = lambda *args: None
    import opensora.models
    from opensora.registry import MODELS

    (versions_2 if hasattr(opensora.models, "Flux") else versions_1)(MODELS)
    name = "flux" if hasattr(opensora.models, "Flux") else "STDiT3-XL/2"
    build = MODELS.module_dict[name]

    def built(**config):
        model = build(**config)
        if "REUSE" in os.environ and not config.get("guidance_embed"):  # that is the picture model
            Reuse(model, os.environ["REUSE"])
        return model

    MODELS.register_module(name, force=True, module=built)


if __name__ == "__main__":
    sys.path[0] = os.getcwd()
    import_opensora()
    if sys.argv[1] == "--serve":
        wan_cpu.serve()
    else:
        wan_cpu.run_script(*sys.argv[1:])
