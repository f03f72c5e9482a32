"""Run a Wan checkout's scripts on a CPU, with tiny random weights: everything of theirs is real but the text encoder,
the VAE, CLIP, the attention kernel and the packages that they import and a test does not need.

    cd /folder/with/wan && python tests/hosts/wan_cpu.py magcache_generate.py --task t2v-1.3B ...   # runs a script
    cd /folder/with/wan && python tests/hosts/wan_cpu.py --serve            # runs many (`serve`)

Under WORLD_SIZE > 1 the process group is gloo's.
"""

import functools
import hashlib
import json
import math
import os
import runpy
import sys
import traceback
import types
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from stand_ins import StandIn, StandIns

warnings.filterwarnings("ignore")
torch.set_num_threads(1)

ABSENT = (
    "cv2",
    "dashscope",
    "decord",
    "ftfy",
    "librosa",
    "onnxruntime",
    "pose2d_utils",
    "sam2",
    "xfuser",
    "peft",
    "flash_attn",
    "regex",
    "moviepy",
    "loguru",
    "matplotlib",
)


WIDTHS = {"dim": 48, "ffn_dim": 64, "num_heads": 2}


class EasyDict(dict):
    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__

    def __deepcopy__(self, memo):
        return EasyDict(self)


def grid(tensor, nrow=8, normalize=False, value_range=None):
    """torchvision.utils.make_grid of one picture."""
    low, high = value_range
    return (tensor[0].clamp(low, high) - low) / (high - low)


def write_picture(tensor, path, **kwargs):
    from PIL import Image

    Image.fromarray((grid(tensor, **kwargs) * 255).byte().permute(1, 2, 0).cpu().numpy()).save(path)


def picture_tensor(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def torchvision():
    """The few functions of torchvision that Wan calls."""

    def normalize(tensor, mean, std):
        return (tensor - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)

    package, functional = StandIn("torchvision"), StandIn("torchvision.transforms.functional")
    package.utils, package.transforms, package.io = (
        StandIn("utils"),
        StandIn("torchvision.transforms"),
        StandIn("io"),
    )
    package.utils.make_grid, package.utils.save_image = grid, write_picture
    functional.to_tensor = picture_tensor
    functional.normalize = normalize
    package.transforms.functional = functional
    return {
        "torchvision": package,
        "torchvision.transforms": package.transforms,
        "torchvision.utils": package.utils,
        "torchvision.transforms.functional": functional,
        "torchvision.io": package.io,
    }


def padded_attention(q, k, v, *args, k_lens=None, **kwargs):
    """The flash attention kernel's place: [batch, tokens, heads, width], without the padding keys."""
    kept = slice(None) if k_lens is None else slice(int(k_lens[0]))
    q, k, v = (part.transpose(1, 2).float() for part in (q, k[:, kept], v[:, kept]))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


def generator_of(text):
    return torch.Generator().manual_seed(int(hashlib.sha256(text.encode()).hexdigest()[:8], 16))


class WanTextEncoder:
    def __init__(self, *args, **kwargs):
        self.model = torch.nn.Module()

    def __call__(self, texts, device):
        return [torch.randn(12, 4096, generator=generator_of(text)) for text in texts]


decoded = []  # the latents of every video of this process


class WanPoolVAE:
    """Frames are pooled to latents and back; 4 frames a latent, `stride` pixels."""

    channels, stride = 16, 8
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, *args, **kwargs):
        self.model = types.SimpleNamespace(z_dim=self.channels)

    def encode(self, videos):
        latents = []
        for video in videos:
            shape = (video.shape[1] - 1) // 4 + 1, *(size // self.stride for size in video.shape[2:])
            small = torch.nn.functional.adaptive_avg_pool3d(video[None], shape)
            latents.append(small[0].repeat(math.ceil(self.channels / 3), 1, 1, 1)[: self.channels])
        return latents

    def decode(self, latents):
        decoded.extend(latent.clone() for latent in latents)
        return [
            torch.nn.functional.interpolate(
                latent[None, :3].tanh(),
                size=(4 * latent.shape[1] - 3, *(size * self.stride for size in latent.shape[2:])),
            )[0]
            for latent in latents
        ]


class LargeVAE(WanPoolVAE):
    channels, stride = 48, 16


class Clip:
    def __init__(self, *args, **kwargs):
        self.model = torch.nn.Module()

    def visual(self, pictures):
        return torch.randn(len(pictures), 257, 1280, generator=torch.Generator().manual_seed(3))


class CpuTorch(types.ModuleType):
    """torch, where every device is the CPU."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def device(*args, **kwargs):
        return torch.device("cpu")


def small_source(self, src_video, src_mask, src_ref_images, num_frames, image_size, device):
    """An empty video to be filled and the reference pictures; the original insists on full size."""
    width, height = image_size
    references = src_ref_images[0] and [
        torch.randn(3, 1, height, width, generator=generator_of(path)) for path in src_ref_images[0]
    ]
    return [torch.zeros(3, num_frames, height, width)], [torch.ones(3, num_frames, height, width)], [references]


def sequence_parallelism():
    """What Wan2.1 takes of xfuser, on the default process group."""

    def all_gather(tensor, dim):
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts, dim=dim)

    class LongContextAttention:
        def __call__(self, _, query, key, value, window_size):
            return padded_attention(query, all_gather(key, 1), all_gather(value, 1))

    group, distributed = types.SimpleNamespace(all_gather=all_gather), StandIn("xfuser.core.distributed")
    distributed.get_sequence_parallel_world_size, distributed.get_sequence_parallel_rank = (
        dist.get_world_size,
        dist.get_rank,
    )
    distributed.get_sp_group = lambda: group
    distributed.init_distributed_environment = distributed.initialize_model_parallel = lambda *args, **kwargs: None
    long_context = StandIn("xfuser.core.long_ctx_attention")
    long_context.xFuserLongContextAttention = LongContextAttention
    return {"xfuser.core.distributed": distributed, "xfuser.core.long_ctx_attention": long_context}


def import_wan():
    """Import the `wan` of sys.path with everything that a GPU would do replaced."""
    # Before the stand-ins: these look around which packages there are.
    import diffusers.models  # noqa: F401
    import torchmetrics.functional.image  # noqa: F401
    import transformers.modeling_utils  # noqa: F401

    sys.meta_path.append(StandIns(ABSENT))
    easydict = types.ModuleType("easydict")
    easydict.EasyDict = EasyDict
    sys.modules.update(torchvision(), easydict=easydict, **sequence_parallelism())
    for name in ("synchronize", "empty_cache", "set_device"):
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    torch.cuda.current_device = lambda: 0
    init_process_group = dist.init_process_group
    dist.init_process_group = lambda *args, **kwargs: init_process_group(**{**kwargs, "backend": "gloo"})
    import wan
    import wan.modules.attention
    from wan.modules.model import WanModel

    pipelines = [
        module for name, module in sys.modules.items() if name.startswith("wan.") and hasattr(module, "T5EncoderModel")
    ]
    for name, module in list(sys.modules.items()):
        if name.startswith("wan.") and hasattr(module, "flash_attention"):
            module.flash_attention = padded_attention
    replaced = {
        "T5EncoderModel": WanTextEncoder,
        "WanVAE": WanPoolVAE,
        "Wan2_1_VAE": WanPoolVAE,
        "Wan2_2_VAE": LargeVAE,
        "CLIPModel": Clip,
    }
    for module in [*pipelines, sys.modules.get("wan.vace")]:
        if module is None:
            continue
        module.torch = CpuTorch("torch")
        for name in replaced.keys() & vars(module).keys():
            setattr(module, name, replaced[name])
        if hasattr(module, "shard_model"):
            plain = module.shard_model
            module.shard_model = lambda model, plain=plain, **kwargs: plain(
                model, device_id=torch.device("cpu"), param_dtype=torch.float32, sync_module_states=False
            )
    from wan.configs import MAX_AREA_CONFIGS, SIZE_CONFIGS, WAN_CONFIGS

    for size in {"832*480", "1280*720", "1280*704", "1024*704"} & SIZE_CONFIGS.keys():
        SIZE_CONFIGS[size], MAX_AREA_CONFIGS[size] = (96, 64), 96 * 64
    SIZE_CONFIGS["480*832"] = (48, 80)  # 15 tokens a latent frame: two processes have to fill up
    for config in WAN_CONFIGS.values():  # of --convert_model_dtype
        config.param_dtype = torch.float32
    for model in {WanModel, getattr(sys.modules.get("wan.modules.vace_model"), "VaceWanModel", WanModel)}:
        model.__init__ = tiny_for_published(model.__init__)
    if hasattr(wan, "WanVace"):
        wan.WanVace.prepare_source = small_source
    if hasattr(wan, "WanS2V"):
        import wan_characters

        wan_characters.replace(wan)
    return wan


def tiny_for_published(init):
    """A transformer's __init__ that makes a tiny one of the config.json of a published checkpoint."""

    @functools.wraps(init)
    def tiny_init(self, *args, **config):
        init(self, *args, **{**config, **(WIDTHS if config.get("dim", 0) > 1000 else {})})

    return tiny_init


def tiny_wan(kind, seed=0):
    """A WanModel (or VaceWanModel) with random weights, none of them zero. Few text tokens where the class does not
    insist."""
    import wan

    torch.manual_seed(seed)
    text_len = 512 if kind in ("i2v", "flf2v") and not hasattr(wan, "WanTI2V") else 16
    sizes = {**WIDTHS, "num_layers": 4, "text_len": text_len}
    if kind == "vace":
        from wan.modules.vace_model import VaceWanModel

        model = VaceWanModel(**sizes, vace_layers=[0, 2], vace_in_dim=96)
    elif kind in ("s2v", "animate"):
        import wan_characters

        model = wan_characters.tiny(kind)
    else:
        from wan.modules.model import WanModel

        in_dim, out_dim = {"t2v": (16, 16), "i2v": (36, 16), "flf2v": (36, 16), "ti2v": (48, 48)}[kind]
        model = WanModel(model_type=kind, in_dim=in_dim, out_dim=out_dim, **sizes)
    for name, parameter in model.named_parameters():
        if not parameter.any() or name.endswith("head.weight"):
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval().requires_grad_(False)


def write_wan(kind, folder):
    """A checkpoint that from_pretrained loads; "t2v-experts" and "i2v-experts" have two, "demo-video" is trained."""
    folder = Path(folder)
    if kind == "demo-video":
        import wan_demo

        return wan_demo.write_wan_demo(Path(__file__).resolve().parents[2] / "demo" / "video" / "model", folder)
    if kind.endswith("-experts"):
        for seed, name in enumerate(("low_noise_model", "high_noise_model")):
            tiny_wan(kind.removesuffix("-experts"), seed).save_pretrained(folder / name)
        return
    model = tiny_wan(kind)
    model.save_pretrained(folder)
    if kind == "vace":  # save_pretrained mixes up this class's config
        (folder / "config.json").write_text(
            json.dumps(
                {
                    "_class_name": "VaceWanModel",
                    "model_type": "vace",
                    "dim": 48,
                    "ffn_dim": 64,
                    "num_heads": 2,
                    "num_layers": 4,
                    "vace_layers": [0, 2],
                    "vace_in_dim": 96,
                    "in_dim": 16,
                    "out_dim": 16,
                    "text_len": 16,
                    "freq_dim": 256,
                }
            )
        )


def run_script(path, *arguments):
    """Run a script as python does, in this process."""
    sys.argv = [path, *arguments]
    sys.path[0] = str(Path(path).resolve().parent)
    runpy.run_path(path, run_name="__main__")


def serve():
    """Import once, run many: each line of stdin is a list of processes {argv, cwd, env, log}, which are forked and run
    at the same time; the answer is a line with the list of their exit codes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        children = [forked(**process) for process in json.loads(line)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), file=answers, flush=True)


def forked(argv, cwd, env, log):
    """The id of a new process that runs a script, or writes a checkpoint, and ends. Beside its log it leaves, as log +
    ".pt", {latents: of each video, in turn; entered: how often a module of each class was called}."""
    child = os.fork()
    if child:
        return child
    code, entered = 1, Counter()
    torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: entered.update([type(module).__name__])
    )
    try:
        for stream, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
            os.dup2(os.open(log if stream else os.devnull, flags | os.O_CREAT | os.O_APPEND), stream)
        os.chdir(cwd)
        os.environ.update(env)
        if "DEMO_VIDEO" in env:
            import wan_demo

            wan_demo.use(env["DEMO_VIDEO"], decoded)
        if argv[0] == "--checkpoint":
            write_wan(*argv[1:])
        else:
            run_script(*argv)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        torch.save({"latents": decoded, "entered": dict(entered)}, f"{log}.pt")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.path.insert(1, os.getcwd())
    import_wan()
    del sys.path[1]
    if sys.argv[1] == "--serve":
        serve()
    else:
        run_script(*sys.argv[1:])
