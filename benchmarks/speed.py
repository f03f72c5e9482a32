"""What a reused step costs, what the patch costs, and how much of the possible speed-up is realised.

    python benchmarks/speed.py               # on a GPU: models of real size, under ten minutes; else small ones on the
    CPU

Models have random weights, which does not change times. A sampler calls the transformer alone. This project and
diffusers' own hook skip every other step, so the speed-up is at most 2x; blocks run both uncompiled and compiled
(compile_repeated_blocks). Columns: seconds of an un-cached call; with the patch on and skipping off (the paper's rule
with magcache_K 0), in percent more; a reused call in percent of a computed one; the realised speed-up of the run, and
its share of steps over computed steps; extra memory. The fastest of several runs counts, and rows take turns, so that
other work on the machine affects all alike.

Prints the table as Markdown and writes it to --output. A model that does not fit into the memory, or into the rest of
--seconds, is named and left out.
"""

import argparse
import gc
import platform
import sys
import time
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from common.errors import needs  # noqa: E402
from common.gram import packed  # noqa: E402
from common.hosts import host_of  # noqa: E402
from common.patch import magcache_forward  # noqa: E402
from common.plan_text import memory_text  # noqa: E402
from common.planner import Target  # noqa: E402
from common.ratios import flow_sigmas  # noqa: E402
from common.schedule import Rule, Settings  # noqa: E402
from common.tables import RatioTable  # noqa: E402

# Of each method, after one to warm up; a model that takes more than a second a call: one, and none to warm up.
REPEATS = 2
RUN_SECONDS, MOST_STEPS, FEWEST_STEPS = {"cuda": 4.0, "cpu": 1.0}, 28, 4  # about how long an un-cached run takes
RUNS = 4.5  # un-cached runs that all methods take once, to decide whether there is time for them
HOOK = "diffusers MagCache"


def flux_transformer(tokens, text=(512, 4096), **config):
    """(model, shape of its latent, its timestep at noise level 1, its other arguments). text: (tokens, width)."""
    from diffusers import FluxTransformer2DModel

    side = int(tokens**0.5)
    image = torch.zeros(tokens, 3)
    image[:, 1], image[:, 2] = torch.arange(tokens) // side, torch.arange(tokens) % side
    model = FluxTransformer2DModel(guidance_embeds=True, joint_attention_dim=text[1], **config)
    return (
        model,
        (1, tokens, 64),
        1.0,
        {
            "guidance": torch.full((1,), 3.5),
            "pooled_projections": torch.randn(1, 768),
            "img_ids": image,
            "encoder_hidden_states": torch.randn(1, *text),
            "txt_ids": torch.zeros(text[0], 3),
        },
    )


def wan_transformer(latent, text=(512, 4096), **config):
    from diffusers import WanTransformer3DModel

    return (
        WanTransformer3DModel(text_dim=text[1], **config),
        (1, 16, *latent),
        1000.0,
        {"encoder_hidden_states": torch.randn(1, *text)},
    )


def hunyuan_transformer(latent, text=(256, 4096), **config):
    from diffusers import HunyuanVideoTransformer3DModel

    return (
        HunyuanVideoTransformer3DModel(text_embed_dim=text[1], **config),
        (1, 16, *latent),
        1000.0,
        {
            "encoder_hidden_states": torch.randn(1, *text),
            "encoder_attention_mask": torch.ones(1, text[0]),
            "pooled_projections": torch.randn(1, 768),
            "guidance": torch.full((1,), 6000.0),
        },
    )


WAN_1B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
LARGE = {  # latents: frames, height, width
    "FLUX.1-dev, 1024x1024": (flux_transformer, {"tokens": 4096}),
    "Wan2.1 1.3B, 480p, 81 frames": (wan_transformer, {"latent": (21, 60, 104), **WAN_1B}),
    "Wan2.1 14B, 480p, 81 frames": (wan_transformer, {"latent": (21, 60, 104)}),
    "Wan2.1 14B, 720p, 81 frames": (wan_transformer, {"latent": (21, 90, 160)}),
    "HunyuanVideo, 720p, 129 frames": (hunyuan_transformer, {"latent": (33, 90, 160)}),
}
FEW_BLOCKS = {"num_layers": 3, "num_single_layers": 6, "num_attention_heads": 2, "text": (32, 256)}
SMALL = {
    "FLUX, 3 + 6 blocks of width 256, 256 tokens": (flux_transformer, {"tokens": 256, **FEW_BLOCKS}),
    "Wan, 9 blocks of width 256, 240 tokens": (
        wan_transformer,
        {"latent": (4, 12, 20), "num_layers": 9, "num_attention_heads": 2, "ffn_dim": 1024, "text": (32, 256)},
    ),
    "HunyuanVideo, 3 + 6 blocks of width 256, 240 tokens": (hunyuan_transformer, {"latent": (4, 12, 20), **FEW_BLOCKS}),
}


class Sampler:
    """An Euler sampler of a transformer with random weights."""

    def __init__(self, structure, device, dtype):
        make, config = structure
        self.device, before = device, torch.get_default_dtype()
        # On a CPU the processor's own seconds, which other work on the machine does not lengthen.
        self.clock = time.perf_counter if device == "cuda" else time.process_time
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                torch.manual_seed(0)
                self.model, self.shape, self.scale, self.inputs = make(**config)
                self.start = torch.randn(self.shape)
        finally:
            torch.set_default_dtype(before)
        self.model.eval().requires_grad_(False)
        self.timesteps = None

    @torch.no_grad()
    def run(self, steps):
        """Run once; returns the seconds."""
        sigmas = torch.tensor([*flow_sigmas(steps, 3.0), 0.0])
        self.timesteps, latent = sigmas[:-1] * 1000, self.start
        context = self.model.cache_context("cond") if hasattr(self.model, "cache_context") else nullcontext()
        self.synchronize()
        begin = self.clock()
        with context:
            for sigma, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
                timestep = torch.full((1,), sigma * self.scale, device=self.device)
                velocity = self.model(hidden_states=latent, timestep=timestep, return_dict=False, **self.inputs)[0]
                latent = latent + (following - sigma) * velocity
        self.synchronize()
        return self.clock() - begin

    def synchronize(self):
        if self.device == "cuda":
            torch.cuda.synchronize()


def smooth_table(steps):
    """A made-up calibration with smoothly changing residuals: here only times matter, not closeness."""
    levels, step = flow_sigmas(steps, 3.0), np.arange(steps)
    gram = packed(np.exp(-(((step[:, None] - step) / steps) ** 2)))
    return RatioTable(
        "random weights",
        {"cond": [1.0] * steps},
        tuple(levels),
        "measured",
        statistics={"gram": {"cond": gram}, "gram_of_outputs": {"cond": gram}},
    )


def methods(sampler, steps):
    """{name: function that returns a context manager, which gives the handle of a patch}"""
    from diffusers import MagCacheConfig

    def patched(settings):
        return lambda: magcache_forward(
            sampler.model,
            host_of(sampler.model),
            smooth_table(steps),
            settings,
            lambda: sampler.timesteps,
            Rule(min_steps=2),
            announce=None,
        )

    @contextmanager
    def hook():
        sampler.model.enable_cache(MagCacheConfig(1e9, 1, 0.0, steps, torch.ones(steps)))
        try:
            yield None
        finally:
            sampler.model.disable_cache()

    half = -(-steps // 2)
    return {
        "un-cached": nullcontext,
        "skipping off": patched(Settings(1e9, 0, 0.0)),
        "paper's rule": patched(Settings(1e9, 1, 0.0)),
        "planned, linear": patched(Target(half, predictor="linear")),
        "planned, linear, residual": patched(Target(half, predictor="linear", payload="residual")),
        HOOK: hook,
    }


def measure_methods(sampler, steps, repeats):
    """({method: seconds of the fastest run}, {method: report of the last run}, {method: extra bytes}, why the hook
    failed)."""
    seconds, reports, extra, ways = {}, {}, {}, methods(sampler, steps)

    def take(name):
        with ways[name]() as handle:
            before = reset_peak(sampler)
            taken = sampler.run(steps)
            extra[name], reports[name] = peak(sampler) - before, handle.reports[-1] if handle else None
        return taken

    def turns(names):
        for name in names if repeats > 1 else ():
            take(name)  # warms up and compiles
        for _ in range(repeats):
            for name in names:
                seconds[name] = min(seconds.get(name, np.inf), take(name))

    turns([name for name in ways if name != HOOK])
    try:
        turns(
            [HOOK]
        )  # after all others: with compiled blocks it makes new graphs, up to the limit at which Dynamo gives up
    except Exception as error:  # another project's and torch.compile's
        return seconds, reports, extra, type(error).__name__
    return seconds, reports, extra, ""


def reset_peak(sampler):
    if sampler.device != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak(sampler):
    return torch.cuda.max_memory_allocated() if sampler.device == "cuda" else 0


def rows_of(name, sampler, steps, repeats=REPEATS):
    """Yields the rows of the table for one model."""
    seconds, reports, extra, why_failed = measure_methods(sampler, steps, repeats)
    plain, half = seconds["un-cached"], -(-steps // 2)
    yield [name, "un-cached", steps, f"{plain / steps:.4f} s", "", "", "", ""]
    yield ["", "skipping off", steps, f"{100 * (seconds['skipping off'] / plain - 1):+.1f} %", "", "", "", ""]
    for way in ("paper's rule", "planned, linear", "planned, linear, residual", HOOK):
        if way not in seconds:
            yield ["", way, "", f"fails ({why_failed})", "", "", "", ""]
            continue
        speedup, report = plain / seconds[way], reports[way]
        bytes_ = extra[way] - extra["un-cached"] if sampler.device == "cuda" else report.peak_bytes if report else None
        reused = (seconds[way] - half * plain / steps) / (steps - half)
        yield [
            "",
            way,
            report.computed if report else half,
            "",
            f"{100 * reused / (plain / steps):.1f} %",
            f"{speedup:.2f}x of {steps / half:.2f}x",
            f"{100 * speedup / (steps / half):.1f} %",
            "" if bytes_ is None else memory_text(max(0, bytes_)),
        ]


def planner_text():
    parts = []
    for steps in (28, 50, 100):
        table, begin = smooth_table(steps), time.process_time()
        Target(steps // 2, predictor="linear").plan(table, table.sigmas)
        parts.append(f"{time.process_time() - begin:.2f} s for {steps} steps")
    return f"Planning takes {', '.join(parts)}."


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the small models, also where there is a GPU")
    parser.add_argument("--only", default="", help="only models whose name has this in it")
    parser.add_argument("--seconds", type=float, default=570, help="time for everything")
    parser.add_argument("--output", type=Path, help="where the table goes, besides the console")
    args = parser.parse_args()
    begin, device = time.perf_counter(), "cuda" if torch.cuda.is_available() else "cpu"
    small = args.small or device == "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rows, left_out = [], []
    structures = [(name, structure) for name, structure in (SMALL if small else LARGE).items() if args.only in name]
    for compiled, (name, structure) in tqdm(list(product((False, True), structures)), desc="models"):
        name += ", compiled" * compiled
        try:
            sampler = Sampler(structure, device, dtype)
            if compiled:
                sampler.model.compile_repeated_blocks()
            sampler.run(1)
            call = sampler.run(2) / 2
            steps = int(min(MOST_STEPS, max(FEWEST_STEPS, RUN_SECONDS[device] / call))) // 2 * 2
            repeats = REPEATS if call < 1 else 1
            if RUNS * (repeats + (repeats > 1)) * call * steps > args.seconds - (time.perf_counter() - begin):
                left_out.append(f"{name}: no time left ({call:.1f} s a call)")
            else:
                rows += rows_of(name, sampler, steps, repeats)
        except torch.cuda.OutOfMemoryError:
            left_out.append(f"{name}: does not fit into the memory")
        sampler = None
        gc.collect()
        torch._dynamo.reset()
        if device == "cuda":
            torch.cuda.empty_cache()
    text = needs("tabulate", "tabulate").tabulate(
        rows,
        tablefmt="github",
        disable_numparse=True,
        headers=["", "", "computed", "a call", "reused / computed", "speed-up", "realised", "extra memory"],
    )
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, one CPU thread"
    text += (
        f"\n\n{planner_text()} Least of {REPEATS} runs (one where a call takes a second), {dtype}, {machine}, torch "
        f"{torch.__version__}, {time.strftime('%Y-%m-%d')}."
    )
    text += "".join(f"\nLeft out: {one}." for one in left_out)
    print(text)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
