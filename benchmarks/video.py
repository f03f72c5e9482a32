"""Closeness of cached clips to un-cached ones on the demo video model, a small Wan: every mode, sampler and guidance.

    python benchmarks/video.py            # about half an hour on one core
    python benchmarks/video.py --short    # a minute: the first part with four clips, nothing is written

Part one: UniPC, 30 steps, guidance 5 as Wan is used, 24 clips, with the caches of diffusers and of cache-dit (where it
is installed: pip install cache-dit==1.5.3) whose thresholds are searched for, on one clip, so that they compute as many
steps. Part two: other samplers, guidance 1 and 50 steps, 6 clips each. The rows:

    fewer steps           the plain sampler with as many steps
    paper's rule          at the settings released for Wan2.1 1.3B, and at those that come nearest to a number of steps
    ... corrected         the same with the corrector
    planned               --magcache_steps: spread evenly, corrected, no calibration
    planned, calibrated   --magcache_predictor linear: placed and weighted by the calibration, corrected

PSNR (mean with a 95 % interval, worst clip) and SSIM are against the un-cached clip of the same prompt and seed,
averaged over its frames; motion is the PSNR of the differences between neighbouring frames. LPIPS is left out: no
package brings the weights of its network along. Thresholds and tables come from other prompts than those measured.
Prints the tables as Markdown; writes them and a figure into the folder --output.
"""

import argparse
import os
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from quality import (
    Row,
    Subject,
    machine_text,
    other_rows,
    references,
    searched,
    thresholds_text,
)
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(REPOSITORY))

from common.calibration import fingerprint  # noqa: E402
from common.errors import needs  # noqa: E402
from common.patch import magcache_calibration, magcache_forward  # noqa: E402
from common.planner import Target, nearest_by_the_rule  # noqa: E402
from common.schedule import Rule, Settings  # noqa: E402
from common.scripts.plots import save_figure  # noqa: E402
from common.scripts.quality import quality  # noqa: E402

DEMO = REPOSITORY / "demo" / "video"
PRESET = REPOSITORY / "common" / "presets" / "demo-video.json"
RELEASED = Settings(0.12, 4, 0.2)  # of Wan2.1's 1.3B model
SHIFT = 3.0
CALL = {"height": 64, "width": 64, "num_frames": 17, "max_sequence_length": 16}
# Solver, guidance, steps, clips. The first with other caches.
PARTS = (
    ("UniPC", 5.0, 30, 24),
    ("UniPC", 1.0, 30, 6),
    ("UniPC", 5.0, 50, 6),
    ("Euler", 5.0, 30, 6),
    ("Euler", 1.0, 30, 6),
    ("DPM++", 5.0, 30, 6),
    ("DPM++", 1.0, 30, 6),
)


def prompts(first, count):
    """`count` different prompts, of every object and motion in turn; those from another `first` differ."""
    sys.path.insert(1, str(DEMO))
    import clips

    every = []
    for index in range(first, first + count):
        name = list(clips.OBJECTS)[index % len(clips.OBJECTS)]
        motion = clips.MOTIONS[(index * 3 + index // len(clips.OBJECTS)) % len(clips.MOTIONS)]
        background = list(clips.BACKGROUNDS)[(index + index // len(clips.OBJECTS)) % len(clips.BACKGROUNDS)]
        every.append(clips.caption(name, motion, background))
    assert len(set(every)) == count
    return every


MEASURED = [(prompt, seed) for seed, prompt in enumerate(prompts(0, 24), start=1)]
CALIBRATION = [(prompt, 100 + seed) for seed, prompt in enumerate(prompts(40, 8))]
assert not {prompt for prompt, _ in MEASURED} & {prompt for prompt, _ in CALIBRATION}


def scheduler_of(solver):
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": SHIFT}
    return {
        "UniPC": lambda: UniPCMultistepScheduler(**flow),
        "DPM++": lambda: DPMSolverMultistepScheduler(**flow),
        "Euler": lambda: FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    }[solver]()


def load_demo_video():
    """The WanPipeline of the demo model, on one CPU thread."""
    from diffusers import WanPipeline

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch_dtype.*")
        pipe = WanPipeline.from_pretrained(DEMO / "model", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def patched(subject, table, settings, corrector=True):
    return lambda: magcache_forward(
        subject.pipe.transformer,
        subject.host,
        table,
        settings,
        subject.timesteps,
        Rule(),
        announce=None,
        scheduler=lambda: subject.pipe.scheduler,
        corrector=corrector,
    )


def own_rows(subject, table, steps, counts):
    levels = np.asarray(table.sigmas)
    by_rule = [("released for Wan2.1 1.3B", RELEASED)]
    by_rule += [("", nearest_by_the_rule(table, levels, Rule(), count).settings) for count in counts]
    for name, settings in by_rule:
        label = f"{name} {thresholds_text(settings)}".strip()
        yield Row("paper's rule", label, patched(subject, table, settings, corrector=False), steps)
        yield Row("paper's rule, corrected", label, patched(subject, table, settings), steps)
    counts = sorted({*counts, computed_by(RELEASED, table)}, reverse=True)
    for count in counts:
        yield Row("fewer steps", "plain sampler", nullcontext, count)
    for count in counts:
        yield Row("planned", f"--magcache_steps {count}", patched(subject, None, Target(count)), steps)
    for count in counts:
        target = Target(count, predictor="linear")
        yield Row("planned, calibrated", f"--magcache_steps {count}", patched(subject, table, target), steps)


def computed_by(settings, table):
    return settings.plan(table, np.asarray(table.sigmas), rule=Rule()).computed


def seacache_rows(subject, steps, counts):
    from diffusers import SeaCacheConfig

    transformer = subject.pipe.transformer
    for order in (0, 1):

        def cached(threshold, order=order):
            @contextmanager
            def on():
                transformer.enable_cache(SeaCacheConfig(threshold, residual_order=order, max_consecutive_cached=0))
                try:
                    yield
                finally:
                    transformer.disable_cache()

            return on

        for threshold in searched(subject, steps, counts, cached):
            yield Row(f"diffusers SeaCache, order {order}", f"threshold {threshold:.3g}", cached(threshold), steps)


def measure(subject, rows, reference):
    """One dictionary a row."""
    for row in rows:
        subject.executed = 0
        result = {}
        with row.cache():
            for job in tqdm(subject.jobs, desc=f"{row.family}, {row.setting}", leave=False):
                result[job] = subject.render(job, row.steps)
        computed = subject.executed / subject.branches / len(subject.jobs)
        pairs = [(reference[job][0], result[job][0]) for job in subject.jobs]
        scores = [quality(*pair) for pair in pairs]
        psnr = np.array([score["psnr"] for score in scores])
        yield {
            "family": row.family,
            "setting": row.setting,
            "computed": computed,
            "psnr": psnr.mean(),
            "interval": 1.96 * psnr.std(ddof=1) / len(psnr) ** 0.5,
            "worst": psnr.min(),
            "ssim": np.mean([score["ssim"] for score in scores]),
            "motion": np.mean([motion_psnr(*pair) for pair in pairs]),
            "seconds": np.mean([seconds for _, seconds in result.values()]),
        }


def motion_psnr(one, other):
    """PSNR of the differences between neighbouring frames, of uint8 arrays (frames, height, width, 3)."""
    one, other = (np.diff(frames.astype(float), axis=0) for frames in (one, other))
    return 10 * np.log10(255**2 / np.mean((one - other) ** 2))


def table_text(results, steps, seconds):
    rows = [["un-cached", "", f"{steps}", "", "", "", "", f"{seconds:.2f}", "1.00x"]]
    for one in results:
        rows.append(
            [
                one["family"],
                one["setting"],
                f"{one['computed']:.1f}",
                f"{one['psnr']:.1f} ± {one['interval']:.1f}",
                f"{one['worst']:.1f}",
                f"{one['ssim']:.4f}",
                f"{one['motion']:.1f}",
                f"{one['seconds']:.2f}",
                f"{seconds / one['seconds']:.2f}x",
            ]
        )
    headers = ["", "setting", f"computed of {steps}", "PSNR dB", "worst", "SSIM", "motion dB", "seconds", "speed-up"]
    return needs("tabulate", "tabulate").tabulate(rows, tablefmt="github", disable_numparse=True, headers=headers)


def draw(results, steps, path):
    figure = needs("matplotlib.figure", "matplotlib").Figure(figsize=(11, 5.5), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("psnr", "motion"), ("clip", "motion")):
        for family in dict.fromkeys(one["family"] for one in results):
            points = sorted((one["computed"], one[key]) for one in results if one["family"] == family)
            own = family.startswith("planned") or "corrected" in family
            color = "black" if family == "fewer steps" else None
            style = {"linewidth": 2 if own else 1, "linestyle": "-" if own else "--", "color": color}
            axes.plot(*np.transpose(points), marker="o", markersize=4, label=family, **style)
        axes.set_xlabel(f"computed steps of {steps}")
        axes.set_ylabel(f"PSNR of the {label} to the un-cached one, dB")
        axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=4)
    save_figure(path, figure)


def part(solver, guidance, steps, count, peers):
    """(title, [one dictionary a row], seconds of an un-cached clip, Subject)"""
    pipe = load_demo_video()  # anew: cache-dit leaves its mark on a pipeline
    pipe.scheduler = scheduler_of(solver)
    subject = Subject(pipe, {**CALL, "guidance_scale": guidance}, MEASURED[:count])
    reference, seconds = references(subject, steps)
    table = subject.calibrated(CALIBRATION[: 8 if peers else 4], steps)
    counts = [steps // 2, steps // 3] if peers else [steps // 2]
    results = list(measure(subject, own_rows(subject, table, steps, counts), reference))
    if peers:
        results += measure(subject, seacache_rows(subject, steps, counts), reference)
        results += measure(subject, other_rows(subject, table, steps, counts), reference)
    return f"{solver}, guidance {guidance:g}, {steps} steps, {count} clips", results, seconds, subject


def calibrate(pipe):
    """Measure common/presets/demo-video.json: UniPC, 30 steps, guidance 5."""
    subject = Subject(pipe, {**CALL, "guidance_scale": 5.0}, MEASURED)
    about = {
        "models": ["demo-video"],
        "settings": {"magcache_thresh": 0.12, "magcache_K": 4, "retention_ratio": 0.2},
        "sampler": {"scheduler": type(pipe.scheduler).__name__, "steps": 30, "shift": SHIFT, "guidance_scale": 5.0},
        "provenance": {
            "fingerprint": fingerprint(pipe.transformer),
            "prompts": [prompt for prompt, _ in CALIBRATION],
            "command": "python benchmarks/video.py --calibrate",
            "date": time.strftime("%Y-%m-%d"),
        },
    }
    with magcache_calibration(pipe.transformer, subject.host, subject.timesteps, "demo-video", PRESET, about):
        for job in tqdm(CALIBRATION, desc="calibrating"):
            subject.render(job, 30)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--calibrate", action="store_true", help=f"measure {PRESET.relative_to(REPOSITORY)}, no more")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "docs", help="folder for video_table.md, video.png")
    args = parser.parse_args()
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")
    if args.calibrate:
        return calibrate(load_demo_video())
    begin, texts = time.time(), []
    for index, (solver, guidance, steps, count) in enumerate(PARTS[: 1 if args.short else None]):
        title, results, seconds, subject = part(solver, guidance, steps, 4 if args.short else count, index == 0)
        texts.append(f"### {title}\n\n{table_text(results, steps, seconds)}")
        print(texts[-1], flush=True)
        if args.short:
            continue
        args.output.mkdir(parents=True, exist_ok=True)
        minutes = round((time.time() - begin) / 60)
        note = f"`python benchmarks/video.py`, {minutes} minutes; {machine_text(subject)}."
        (args.output / "video_table.md").write_text("\n\n".join([*texts, note]) + "\n")
        if index == 0:
            draw(results, steps, args.output / "video.png")


if __name__ == "__main__":
    main()
