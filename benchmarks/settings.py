"""The paper's rule on the demo model at several settings, against the plain sampler with as many steps.

    python benchmarks/settings.py            # 24 prompts, two seeds, 28 steps; about two minutes on one core

PSNR and SSIM are against the un-cached picture of the same prompt and seed; speed-up is un-cached seconds over seconds.
"""
import platform
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo_model import PROMPTS, load_demo, patched, render  # noqa: E402

from common.quality import quality  # noqa: E402
from common.report import needs  # noqa: E402
from common.schedule import Rule, Settings  # noqa: E402

STEPS, SEEDS = 28, (1, 2)
SETTINGS = [Settings(*values) for values in ((0.06, 1, 0.2), (0.06, 2, 0.2), (0.10, 3, 0.2), (0.12, 4, 0.2), (0.24, 5, 0.1))]


def main():
    pipe, table = load_demo()
    jobs = [(prompt, seed) for seed in SEEDS for prompt in PROMPTS]
    reference = {job: render(pipe, job[0], STEPS, job[1]) for job in tqdm(jobs, desc="un-cached")}
    rows, controls = [], {}
    for settings in SETTINGS:
        with patched(pipe, table, settings, Rule()) as handle:
            cached = {job: render(pipe, job[0], STEPS, job[1]) for job in tqdm(jobs, desc=str(settings))}
        computed = handle.reports[-1].schedule.computed
        if computed not in controls:
            controls[computed] = {job: render(pipe, job[0], computed, job[1]) for job in tqdm(jobs, desc=f"{computed} steps")}
        name = f"{settings.magcache_thresh:g} / {settings.magcache_K} / {settings.retention_ratio:g}"
        rows.append([name, f"{computed} of {STEPS}", f"{STEPS / computed:.2f}x", *figures(reference, cached),
                     *figures(reference, controls[computed])])
    print(needs("tabulate", "tabulate").tabulate(rows, tablefmt="github", disable_numparse=True, headers=[
        "thresh / K / retention", "computed", "bound", "MagCache PSNR dB", "SSIM", "speed-up", "fewer steps: PSNR dB", "SSIM",
        "speed-up"]))
    print(f"\n{len(PROMPTS)} prompts, {len(SEEDS)} seeds, {STEPS} steps; {platform.machine()}, one CPU thread, "
          f"{time.strftime('%Y-%m-%d')}. PSNR: mean, and the worst picture in brackets.")


def figures(reference, result):
    scores = [quality(reference[job][0][None], result[job][0][None]) for job in reference]
    psnr = [score["psnr"] for score in scores]
    speedup = sum(seconds for _, seconds in reference.values()) / sum(seconds for _, seconds in result.values())
    return f"{np.mean(psnr):.1f} ({min(psnr):.1f})", f"{np.mean([score['ssim'] for score in scores]):.3f}", f"{speedup:.2f}x"


if __name__ == "__main__":
    main()
