"""Closeness to the un-cached picture at equal numbers of computed steps: this project, diffusers' own caches, fewer steps.

    python benchmarks/quality.py             # 24 prompts, two seeds, 28 steps; about ten minutes on one core
    python benchmarks/quality.py --prompts 4

Rows: the plain sampler with fewer steps; the paper's rule here; planned runs here; and the hooks MagCache, FirstBlockCache and
TaylorSeer of diffusers. Computed steps are counted as executions of the last block's query projection a picture. PSNR
(mean, and the worst picture) and SSIM are against the un-cached picture of the same prompt and seed; speed-up is un-cached
seconds over seconds of the whole pipeline. Writes the table as Markdown and a figure, docs/quality.png.
"""
import argparse
import platform
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo_model import PROMPTS, REPOSITORY, load_demo, patched, render  # noqa: E402

from common.planner import Target  # noqa: E402
from common.quality import quality  # noqa: E402
from common.report import needs, save_figure  # noqa: E402
from common.schedule import Rule, Settings  # noqa: E402

STEPS, SEEDS = 28, (1, 2)
THRESHOLDS = ((0.06, 1, 0.2), (0.06, 2, 0.2), (0.10, 3, 0.2), (0.12, 4, 0.2), (0.24, 5, 0.1))
COMPUTED = (18, 16, 14, 11, 9, 7)


def methods(pipe, table):
    """(family, setting, context manager that puts the cache on, sampler steps) of every row."""
    from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

    @contextmanager
    def hooks(config):
        pipe.transformer.enable_cache(config)
        try:
            yield
        finally:
            pipe.transformer.disable_cache()

    @contextmanager
    def nothing():
        yield

    for computed in COMPUTED:
        yield "fewer steps", f"{computed} steps", nothing, computed
    for values in THRESHOLDS:
        yield "paper's rule", "{:g} / {} / {:g}".format(*values), partial(patched, pipe, table, Settings(*values), Rule()), STEPS
    for predictor, family in (("reuse", "planned, reuse"), ("linear", "planned, linear")):
        for computed in COMPUTED:
            target = Target(computed, predictor=predictor)
            yield family, f"--magcache_steps {computed}", partial(patched, pipe, table, target, Rule()), STEPS
    ratios = torch.tensor(table.mag_ratios["cond"])
    for thresh, K, retention in THRESHOLDS:
        config = MagCacheConfig(thresh, K, retention, STEPS, ratios)
        yield "diffusers MagCache", f"{thresh:g} / {K} / {retention:g}", partial(hooks, config), STEPS
    for threshold in (0.05, 0.08, 0.12, 0.2):
        yield "diffusers FirstBlockCache", f"threshold {threshold:g}", partial(hooks, FirstBlockCacheConfig(threshold)), STEPS
    for interval in (2, 3, 4, 5):
        config = TaylorSeerCacheConfig(cache_interval=interval, disable_cache_before_step=3, max_order=1)
        yield "diffusers TaylorSeer", f"interval {interval}", partial(hooks, config), STEPS


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many of the prompts")
    args = parser.parse_args()
    pipe, table = load_demo()
    jobs = [(prompt, seed) for seed in SEEDS for prompt in PROMPTS[:args.prompts]]
    executions = []
    pipe.transformer.single_transformer_blocks[-1].attn.to_q.register_forward_hook(lambda *_: executions.append(None))
    reference = {job: render(pipe, job[0], STEPS, job[1]) for job in tqdm(jobs, desc="un-cached")}
    rows, points = [], {}
    for family, setting, cache, steps in methods(pipe, table):
        executions.clear()
        with cache():
            result = {job: render(pipe, job[0], steps, job[1]) for job in tqdm(jobs, desc=f"{family}, {setting}")}
        computed = len(executions) / len(jobs)
        psnr, ssim = np.transpose([[(score := quality(reference[job][0][None], result[job][0][None]))["psnr"], score["ssim"]]
                                   for job in jobs])
        speedup = sum(seconds for _, seconds in reference.values()) / sum(seconds for _, seconds in result.values())
        rows.append([family, setting, f"{computed:.1f}", f"{psnr.mean():.1f}", f"{psnr.min():.1f}", f"{ssim.mean():.4f}",
                     f"{speedup:.2f}x"])
        points.setdefault(family, []).append((computed, psnr.mean()))
    print(needs("tabulate", "tabulate").tabulate(rows, tablefmt="github", disable_numparse=True, headers=[
        "", "setting", f"computed of {STEPS}", "PSNR dB", "worst", "SSIM", "speed-up"]))
    import diffusers
    print(f"\n{args.prompts} prompts not calibrated on, {len(SEEDS)} seeds, demo model, {platform.machine()}, one CPU thread, "
          f"diffusers {diffusers.__version__}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}.")
    draw(points, REPOSITORY / "docs" / "quality.png")


def draw(points, path):
    figure = needs("matplotlib.figure", "matplotlib").Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for family, values in points.items():
        axes.plot(*zip(*sorted(values)), marker="o", label=family, linestyle="--" if family == "fewer steps" else "-")
    axes.set_xlabel(f"computed steps of {STEPS}")
    axes.set_ylabel("PSNR to the un-cached picture, dB")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, ncols=2, fontsize=9)
    save_figure(path, figure)


if __name__ == "__main__":
    main()
