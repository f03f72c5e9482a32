"""Run a FramePack checkout's demo on a CPU with tiny random weights: its page, its worker, its sampler and its
transformer's code are real; what it loads is small, and packages that it imports and a test does not need are
stand-ins.

    cd /folder/of/FramePack && python /here/tests/framepack_cpu.py magcache_demo_gradio.py --server 127.0.0.1 --port
    7870 ... framepack_cpu.py --jobs jobs.json demo_gradio.py        # runs jobs without a browser, see `run_demo_jobs`

FREE_GB in the environment: free GPU memory that the demo is told of (above 60: all models stay on the GPU).
"""

import hashlib
import importlib
import importlib.machinery
import json
import math
import os
import runpy
import sys
import time
import types
import warnings
from pathlib import Path

import numpy as np
import torch
from stand_ins import stand_in

warnings.filterwarnings("ignore")
torch.set_num_threads(1)

TEXT_WIDTH, IMAGE_WIDTH = 32, 24


def write_video(path, frames, fps, video_codec, options):
    import imageio.v2 as imageio

    imageio.mimsave(
        path,
        frames.numpy(),
        fps=fps,
        codec=video_codec,
        macro_block_size=1,
        output_params=["-crf", options["crf"], "-threads", "1"],
    )


def absent_packages():
    """cv2 and torchvision, of which FramePack calls one function. After what looks around which packages there are."""
    import diffusers.models  # noqa: F401
    import transformers.modeling_utils  # noqa: F401

    stand_in("cv2")
    torchvision_stand_in()


def torchvision_stand_in():
    stand_in("torchvision", io=types.SimpleNamespace(write_video=write_video), __version__="stand-in")


def on_the_cpu():
    """Devices and free memory as FramePack's memory.py tells them; float16 as float32, which a CPU computes as well."""
    torch.cuda.current_device = lambda: 0
    memory = importlib.import_module("diffusers_helper.memory")
    memory.gpu, memory.get_cuda_free_memory_gb = (
        torch.device("cpu"),
        lambda device=None: float(os.environ.get("FREE_GB", 80)),
    )
    plain = torch.nn.Module.to

    def to(self, *args, **kwargs):
        wide = [torch.float32 if value is torch.float16 else value for value in args]
        return plain(
            self, *wide, **{**kwargs, **({"dtype": torch.float32} if kwargs.get("dtype") is torch.float16 else {})}
        )

    torch.nn.Module.to = to
    importlib.import_module("diffusers_helper.bucket_tools").find_nearest_bucket = lambda height, width, resolution: (
        64,
        64,
    )
    # The noise levels of the host's own sizes, where this is at its bound.
    sampler = importlib.import_module("diffusers_helper.pipelines.k_diffusion_hunyuan")
    sampler.calculate_flux_mu = lambda context_length, exp_max: math.log(exp_max)


class Tokenizer:
    """Word counts become ids: as many of them as the template's prefix and a few more."""

    def __call__(self, texts, max_length, **kwargs):
        length = max_length - 256 + 8 if max_length > 256 else 77  # Llama's template, CLIP's fixed length
        digest = hashlib.sha256(texts[0].encode()).digest()
        ids = torch.tensor([[digest[index % 32] for index in range(length)]])
        return types.SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))


def tiny_transformer(model_class, seed=0, **options):
    """A HunyuanVideoTransformer3DModelPacked with random weights, none of them zero."""
    torch.manual_seed(seed)
    model = model_class(
        **{
            **dict(
                num_attention_heads=2,
                attention_head_dim=16,
                num_layers=2,
                num_single_layers=3,
                num_refiner_layers=1,
                text_embed_dim=TEXT_WIDTH,
                pooled_projection_dim=TEXT_WIDTH,
                rope_axes_dim=(4, 6, 6),
                has_image_proj=True,
                image_proj_dim=IMAGE_WIDTH,
                has_clean_x_embedder=True,
            ),
            **options,
        }
    )
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval().requires_grad_(False)


def tiny_parts():
    """What every from_pretrained returns, by the name of its class."""
    import transformers
    from diffusers import AutoencoderKLHunyuanVideo
    from diffusers_helper.models.hunyuan_video_packed import HunyuanVideoTransformer3DModelPacked

    sizes = dict(hidden_size=TEXT_WIDTH, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    vision = transformers.SiglipVisionConfig(**{**sizes, "hidden_size": IMAGE_WIDTH}, image_size=32, patch_size=16)
    makers = {
        "LlamaModel": lambda cls, name: cls(transformers.LlamaConfig(**sizes, vocab_size=256)),
        "CLIPTextModel": lambda cls, name: cls(transformers.CLIPTextConfig(**sizes, vocab_size=256, eos_token_id=2)),
        "LlamaTokenizerFast": lambda cls, name: Tokenizer(),
        "CLIPTokenizer": lambda cls, name: Tokenizer(),
        "SiglipImageProcessor": lambda cls, name: cls(size={"height": 32, "width": 32}),
        "SiglipVisionModel": lambda cls, name: cls(vision),
    }
    for name, maker in makers.items():
        getattr(transformers, name).from_pretrained = classmethod(from_seed(maker))
    AutoencoderKLHunyuanVideo.from_pretrained = classmethod(
        from_seed(lambda cls, name: cls(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4))
    )

    def transformer(cls, name):
        model = tiny_transformer(cls)
        model.register_to_config(_name_or_path=name)
        return model

    HunyuanVideoTransformer3DModelPacked.from_pretrained = classmethod(from_seed(transformer))
    # The demo's own draws from the latent's distribution are not seeded.
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    DiagonalGaussianDistribution.sample = lambda self, generator=None: self.mode()


def from_seed(maker):
    def from_pretrained(cls, name, **kwargs):
        torch.manual_seed(0)
        return maker(cls, name)

    return from_pretrained


def run_demo_jobs(script, jobs):
    """Run jobs in the demo's own `process`, without a browser; print one JSON line: what came of each.

    jobs: [{"steps": .., "seconds": .., "seed": .., "cfg": .., "teacache": .., "ours": values of MagCache's controls, or
    null, "end_at": [section, step] at which End Generation is pressed, "seconds_to_end": .. that its worker takes after
    that}].
    """
    import gradio

    gradio.Blocks.launch, sys.argv = lambda *args, **kwargs: None, [script]
    name = script.removesuffix(".py")
    if name.startswith("magcache_"):
        runpy.run_path(script, run_name="__main__")
        name = name.removeprefix("magcache_")
    demo = importlib.import_module(name)
    click = next(event for event in demo.block.fns.values() if [*map(id, event.inputs)][:3] == [*map(id, demo.ips)][:3])
    results, sampled, plain, end_at = [], [], demo.sample_hunyuan, []

    def sample_hunyuan(*args, callback, **kwargs):
        section = len(sampled)

        def watching(state):
            if end_at == [section, state["i"]]:
                demo.end_process()
            return callback(state)

        latents = plain(*args, callback=watching, **kwargs)
        sampled.append(hashlib.sha256(latents.contiguous().numpy().tobytes()).hexdigest()[:12])
        return latents

    demo.sample_hunyuan = sample_hunyuan
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for job in jobs:
        sampled.clear()
        end_at[:] = job.get("end_at", [])
        demo.traceback = types.SimpleNamespace(print_exc=lambda job=job: time.sleep(job.get("seconds_to_end", 0)))
        values = {
            **{
                name: next(component.value for component in demo.ips if component is getattr(demo, name))
                for name in ("n_prompt", "latent_window_size", "gs", "rs", "gpu_memory_preservation", "mp4_crf")
                if hasattr(demo, name)  # the Windows version has no mp4_crf
            },
            "input_image": picture,
            "prompt": "a cat",
            "seed": job.get("seed", 0),
            "total_second_length": job["seconds"],
            "steps": job["steps"],
            "cfg": job.get("cfg", 1.0),
            "use_teacache": job.get("teacache", False),
        }
        inputs = [
            next(value for name, value in values.items() if getattr(demo, name) is component) for component in demo.ips
        ]
        *_, last = click.fn(*inputs, *(job.get("ours") or []))
        results.append(
            {
                "sections": list(sampled),
                "video": last[0] if isinstance(last[0], str) else None,
                "outputs": len(last),
                "text": last[6] if len(last) > 6 else "",
            }
        )
    print("JOBS " + json.dumps(results))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    jobs = json.loads(Path(arguments[1]).read_text()) if arguments[0] == "--jobs" else None
    arguments = arguments[2:] if jobs is not None else arguments
    sys.path[0] = os.getcwd()
    absent_packages()
    on_the_cpu()
    tiny_parts()
    if jobs is not None:
        run_demo_jobs(arguments[0], jobs)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
