"""Closeness to the un-cached picture at equal numbers of computed steps: this project, other caches, the plain sampler.

    python benchmarks/quality.py             # the demo model; about 25 minutes on one core
    python benchmarks/quality.py --short     # half a minute; exit status 1 if a planned run is not above the others
    (CI) python benchmarks/quality.py --model black-forest-labs/FLUX.1-dev --prompt_file prompts.txt --steps 28

Rows, each at about 60, 50, 40, 33 and 25 % of the steps: the plain sampler with fewer steps; the paper's rule here, at
the settings that come nearest and are expected to err least; planned runs here; the hooks MagCache, FirstBlockCache and
TaylorSeer of diffusers; DBCache and its TaylorSeer variant of cache-dit where that is installed (pip install
cache-dit==1.5.3). Thresholds of the others are searched for, on one picture, so that they compute as many steps.
Computed steps are counted as executions of the last block's query projection. PSNR (mean with a 95 % interval, worst
picture), SSIM and MS-SSIM are against the un-cached picture of the same prompt and seed; seconds are of the whole
pipeline (on a CPU the processor's); extra memory is what is alive between two steps beyond that of an un-cached run.

Another model than the demo is calibrated first, on the first prompts of its file, and measured on the others. Prints
the table as Markdown; writes it and a figure into the folder --output.
"""

import argparse
import gc
import os
import platform
import sys
import time
from collections import namedtuple
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo_model import DEMO, PROMPTS, REPOSITORY, load_demo  # noqa: E402

from common.errors import (
    MagCacheError,  # noqa: E402
    needs,  # noqa: E402
)
from common.hosts import host_of  # noqa: E402
from common.patch import magcache_calibration, magcache_forward  # noqa: E402
from common.planner import Target, nearest_by_the_rule  # noqa: E402
from common.report import memory_text  # noqa: E402
from common.schedule import Rule  # noqa: E402
from common.scripts.plots import save_figure  # noqa: E402
from common.scripts.quality import quality  # noqa: E402

SHARES = (0.6, 0.5, 0.4, 1 / 3, 0.25)
# dB above, at half the steps. Measured by --short on 2026-11-21: 12.1 and 10.1 (residual), 12.0 and 10.0 (output).
MARGINS = {"paper's rule": 10.5, "fewer steps": 8.5}
Row = namedtuple("Row", "family setting cache steps")  # cache: makes the context manager that puts the cache on


class Subject:
    """A pipeline, what every call of it gets, and the (prompt, seed) of every picture."""

    def __init__(self, pipe, call, jobs):
        self.pipe, self.call, self.jobs, self.host = pipe, call, jobs, host_of(pipe.transformer)
        pipe.set_progress_bar_config(disable=True)
        # On a CPU the processor's own seconds, which other work on the machine does not lengthen.
        self.clock = time.perf_counter if pipe.device.type == "cuda" else time.process_time
        self.executed = 0
        blocks = list(getattr(pipe.transformer, self.host.blocks[-1]))
        query = [module for name, module in blocks[-1].named_modules() if name.endswith("to_q")][0]
        query.register_forward_hook(self.count)

    def count(self, *_):
        self.executed += 1

    def render(self, job, steps, **more):
        """(uint8 frames (frames, height, width, 3), seconds)"""
        prompt, seed = job
        begin = self.clock()
        output = self.pipe(
            prompt,
            num_inference_steps=steps,
            output_type="np",
            generator=torch.Generator().manual_seed(seed),
            **self.call,
            **more,
        )
        frames = output.images if hasattr(output, "images") else output.frames[0]
        return (np.asarray(frames) * 255).round().astype(np.uint8), self.clock() - begin

    def computed(self, cache, job, steps):
        self.executed = 0
        with cache():
            self.render(job, steps)
        return self.executed

    def peak_bytes(self, cache, steps):
        """Bytes of tensors that are alive between two steps of a run, looked at three times."""
        seen = []

        def look(pipe, step, timestep, tensors):
            if step in (steps // 4, steps // 2, 3 * steps // 4):
                seen.append(live_bytes())
            return tensors

        with cache():
            self.render(self.jobs[0], steps, callback_on_step_end=look)
        return max(seen)

    def calibrated(self, jobs, steps):
        with magcache_calibration(self.pipe.transformer, self.host, self.timesteps, "measured") as handle:
            for job in tqdm(jobs, desc=f"calibrating, {steps} steps"):
                self.render(job, steps)
        return handle.table

    def timesteps(self):
        return self.pipe.scheduler.timesteps


def live_bytes():
    gc.collect()
    storages = {}
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor):  # isinstance would wake lazy objects
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(storages.values())


def own_rows(subject, table, steps, counts, carried=None):
    """Rows of this project. carried: a table of other steps, carried over to these."""

    def patched(table, settings):
        return lambda: magcache_forward(
            subject.pipe.transformer, subject.host, table, settings, subject.timesteps, Rule(), announce=None
        )

    ratios_only = type(table)(**{**vars(table), "statistics": {}, "settings": {}})
    levels = np.asarray(table.sigmas)
    for count in counts:
        yield Row("fewer steps", "plain sampler", nullcontext, count)
    for count in counts:
        settings = nearest_by_the_rule(table, levels, Rule(), count).settings
        yield Row("paper's rule", thresholds_text(settings), patched(table, settings), steps)
    kinds = [
        ("planned from ratios, reuse", ratios_only, {}),
        ("planned, reuse", table, {"predictor": "reuse"}),
        ("planned, linear", table, {}),
        ("planned, linear, output", table, {"payload": "output"}),
    ]
    if carried is not None:
        kinds.append((f"planned, linear, calibrated at {carried.steps} steps", carried, {}))
    for family, its_table, options in kinds:
        for count in counts:
            yield Row(family, f"--magcache_steps {count}", patched(its_table, Target(count, **options)), steps)


def thresholds_text(settings):
    return f"{settings.magcache_thresh:g} / {settings.magcache_K} / {settings.retention_ratio:g}"


def other_rows(subject, table, steps, counts):
    """Rows of diffusers' own hooks and of cache-dit, which changes the pipeline for good and so comes last."""
    from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

    transformer = subject.pipe.transformer

    def hooks(config):
        @contextmanager
        def on():
            transformer.enable_cache(config)
            try:
                yield
            finally:
                transformer.disable_cache()

        return on

    ratios = torch.tensor(table.mag_ratios["cond"])
    for count in counts:
        # The hook computes one step more than the rule at the same settings.
        settings = nearest_by_the_rule(table, np.asarray(table.sigmas), Rule(), count - 1).settings
        config = MagCacheConfig(settings.magcache_thresh, settings.magcache_K, settings.retention_ratio, steps, ratios)
        yield Row("diffusers MagCache", thresholds_text(settings), hooks(config), steps)
    for threshold in searched(subject, steps, counts, lambda threshold: hooks(FirstBlockCacheConfig(threshold))):
        yield Row(
            "diffusers FirstBlockCache", f"threshold {threshold:.3g}", hooks(FirstBlockCacheConfig(threshold)), steps
        )
    for interval in (2, 3, 4, 5):
        config = TaylorSeerCacheConfig(cache_interval=interval, disable_cache_before_step=3, max_order=1)
        yield Row("diffusers TaylorSeer", f"interval {interval}", hooks(config), steps)
    try:
        import cache_dit
    except ImportError:
        print("cache-dit is not installed (pip install cache-dit==1.5.3): its rows are left out.", file=sys.stderr)
        return
    taylor = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)
    for family, options in (
        ("cache-dit DBCache", {}),
        ("cache-dit DBCache, TaylorSeer", {"calibrator_config": taylor}),
    ):

        def cached(threshold, options=options):
            @contextmanager
            def on():
                cache_dit.enable_cache(
                    subject.pipe,
                    cache_config=cache_dit.DBCacheConfig(
                        Fn_compute_blocks=1,
                        Bn_compute_blocks=0,
                        max_warmup_steps=max(1, steps // 10),
                        residual_diff_threshold=threshold,
                        num_inference_steps=steps,
                    ),
                    **options,
                )
                try:
                    yield
                finally:
                    cache_dit.disable_cache(subject.pipe)

            return on

        for threshold in searched(subject, steps, counts, cached):
            yield Row(family, f"threshold {threshold:.3g}", cached(threshold), steps)


def searched(subject, steps, counts, cached):
    """Thresholds, each by bisection on one picture, with which about as many steps are computed as `counts` says."""
    known = {}

    def computed(threshold):
        if threshold not in known:
            known[threshold] = subject.computed(cached(threshold), subject.jobs[0], steps) / subject.branches
        return known[threshold]

    for count in counts:
        low, high = 0.0, 1.0
        for _ in range(7):
            middle = (low + high) / 2
            low, high = (middle, high) if computed(middle) > count else (low, middle)
    return sorted({min(known, key=lambda threshold: abs(known[threshold] - count)) for count in counts})


def measure(subject, rows, reference, plain_bytes, steps):
    """One dictionary a row."""
    for row in rows:
        subject.executed = 0
        result = {}
        with row.cache():
            for job in tqdm(subject.jobs, desc=f"{row.family}, {row.setting}", leave=False):
                result[job] = subject.render(job, row.steps)
        computed = subject.executed / subject.branches / len(subject.jobs)
        scores = [quality(reference[job][0], result[job][0]) for job in subject.jobs]
        psnr = np.array([score["psnr"] for score in scores])
        yield {
            "family": row.family,
            "setting": row.setting,
            "computed": computed,
            "psnr": psnr.mean(),
            "interval": 1.96 * psnr.std(ddof=1) / len(psnr) ** 0.5,
            "worst": psnr.min(),
            "ssim": np.mean([score["ssim"] for score in scores]),
            "ms_ssim": None if scores[0]["ms_ssim"] is None else np.mean([score["ms_ssim"] for score in scores]),
            "seconds": np.mean([seconds for _, seconds in result.values()]),
            "bytes": None if plain_bytes is None else max(0, subject.peak_bytes(row.cache, row.steps) - plain_bytes),
        }


def references(subject, steps):
    """({job: (frames, seconds)}, mean seconds) of un-cached runs."""
    subject.executed = 0
    reference = {
        job: subject.render(job, steps) for job in tqdm(subject.jobs, desc=f"un-cached, {steps} steps", leave=False)
    }
    subject.branches = subject.executed / steps / len(subject.jobs)
    return reference, np.mean([seconds for _, seconds in reference.values()])


def table_text(results, steps, seconds):
    has_ms_ssim = results[0]["ms_ssim"] is not None
    rows = [["un-cached", "", f"{steps}", "", "", "", *[""] * has_ms_ssim, f"{seconds:.2f}", "1.00x", ""]]
    for one in results:
        rows.append(
            [
                one["family"],
                one["setting"],
                f"{one['computed']:.1f}",
                f"{one['psnr']:.1f} ± {one['interval']:.1f}",
                f"{one['worst']:.1f}",
                f"{one['ssim']:.4f}",
                *[f"{one['ms_ssim'] or 0:.4f}"] * has_ms_ssim,
                f"{one['seconds']:.2f}",
                f"{seconds / one['seconds']:.2f}x",
                memory_text(one["bytes"]),
            ]
        )
    return needs("tabulate", "tabulate").tabulate(
        rows,
        tablefmt="github",
        disable_numparse=True,
        headers=[
            "",
            "setting",
            f"computed of {steps}",
            "PSNR dB",
            "worst",
            "SSIM",
            *["MS-SSIM"] * has_ms_ssim,
            "seconds",
            "speed-up",
            "extra memory",
        ],
    )


def draw(by_steps, path):
    figure = needs("matplotlib.figure", "matplotlib").Figure(
        figsize=(max(7, 6.5 * len(by_steps)), 5.5), layout="constrained"
    )
    panels = np.atleast_1d(figure.subplots(1, len(by_steps)))
    for axes, (steps, results) in zip(panels, by_steps.items()):
        for family in dict.fromkeys(one["family"] for one in results):
            points = sorted(
                (one["computed"], one["psnr"], one["interval"]) for one in results if one["family"] == family
            )
            own = family.startswith("planned")
            axes.errorbar(
                *np.transpose(points)[:2],
                yerr=np.transpose(points)[2],
                marker="o",
                markersize=4,
                label=family,
                linewidth=2 if own else 1,
                linestyle="-" if own else "--",
                capsize=2,
                color="black" if family == "fewer steps" else None,
            )
        axes.set_xlabel(f"computed steps of {steps}")
        axes.set_ylabel("PSNR to the un-cached picture, dB")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    save_figure(path, figure)


def machine_text(subject):
    import diffusers

    device = (
        torch.cuda.get_device_name() if subject.pipe.device.type == "cuda" else f"{platform.machine()}, one CPU thread"
    )
    return f"{device}, diffusers {diffusers.__version__}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def short(subject, table):
    """Half the steps, few pictures. Returns a sentence for each margin that is missed."""
    subject.jobs, steps = subject.jobs[:6], 28
    reference, _ = references(subject, steps)
    wanted = ("fewer steps", "paper's rule", "planned, linear", "planned, linear, output")
    rows = [row for row in own_rows(subject, table, steps, [steps // 2]) if row.family in wanted]
    psnr = {}
    for one in measure(subject, rows, reference, None, steps):
        print(f"{one['family']}: {one['computed']:.1f} of {steps} computed, {one['psnr']:.1f} dB")
        psnr[one["family"]] = one["psnr"]
    return [
        f"{family} is {psnr[family] - psnr[other]:.1f} dB above {other}, which should be {margin} or more."
        for family in wanted[2:]
        for other, margin in MARGINS.items()
        if psnr[family] - psnr[other] < margin
    ]


def load(args):
    """(Subject, jobs to calibrate on)"""
    if args.model == "demo":
        pipe, _ = load_demo()
        call = {"height": 64, "width": 64, "max_sequence_length": 16}
        calibration = [(prompt, 0) for prompt in (DEMO / "calibration_prompts.txt").read_text().splitlines()]
        prompts = PROMPTS
    else:
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16)
        pipe.to("cuda" if torch.cuda.is_available() else "cpu")
        call = {name: getattr(args, name) for name in ("height", "width", "num_frames") if getattr(args, name)}
        if not args.prompt_file:
            raise MagCacheError(
                "--model needs a --prompt_file: four prompts to calibrate on, then those to measure on."
            )
        lines = args.prompt_file.read_text().splitlines()
        calibration, prompts = [(prompt, 0) for prompt in lines[:4]], lines[4:]
    jobs = [(prompt, seed) for seed in range(1, args.seeds + 1) for prompt in prompts[: args.prompts]]
    if len(jobs) < 2:
        raise MagCacheError("An interval needs two pictures or more: add prompts or --seeds.")
    return Subject(pipe, call, jobs), calibration


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="demo", help="hub id or folder of a diffusers pipeline; default: the demo model"
    )
    parser.add_argument("--prompt_file", type=Path, help="for another model than the demo: a prompt a line")
    parser.add_argument("--prompts", type=int, default=6, help="how many of the prompts are measured")
    parser.add_argument("--seeds", type=int, default=2, help="pictures a prompt")
    parser.add_argument("--steps", type=int, nargs="+", default=[28, 50])
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--num_frames", type=int)
    parser.add_argument("--short", action="store_true", help="few pictures at half the steps, with the margins of CI")
    parser.add_argument(
        "--output", type=Path, default=REPOSITORY / "docs", help="folder for quality_table.md and quality.png"
    )
    args = parser.parse_args()
    try:
        subject, calibration = load(args)
    except MagCacheError as error:
        sys.exit(f"quality.py: {error}")
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")
    if args.short:
        from common.tables import load as load_table

        sys.exit("\n".join(short(subject, load_table("demo"))) or None)
    tables = {steps: subject.calibrated(calibration, steps) for steps in args.steps}
    by_steps, texts = {}, []
    # cache-dit leaves its mark on a pipeline, so all other rows are measured before it.
    plain = {steps: references(subject, steps) for steps in args.steps}
    plain_bytes = {steps: subject.peak_bytes(nullcontext, steps) for steps in args.steps}
    for rows_of in (own_rows, other_rows):
        for steps, table in tables.items():
            counts = sorted({max(2, round(share * steps)) for share in SHARES}, reverse=True)
            carried = {"carried": tables[args.steps[0]]} if rows_of is own_rows and steps != args.steps[0] else {}
            rows = rows_of(subject, table, steps, counts, **carried)
            by_steps.setdefault(steps, []).extend(measure(subject, rows, plain[steps][0], plain_bytes[steps], steps))
    for steps, results in by_steps.items():
        texts.append(table_text(results, steps, plain[steps][1]))
    texts.append(
        f"{len(subject.jobs)} pictures, {args.seeds} of each prompt, none calibrated on; {args.model}, "
        f"{machine_text(subject)}."
    )
    if by_steps[args.steps[0]][0]["ms_ssim"] is None:
        texts[-1] += " MS-SSIM is not defined below 161 pixels a side."
    text = "\n\n".join(texts) + "\n"
    print(text)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "quality_table.md").write_text(text)
    draw(by_steps, args.output / "quality.png")


if __name__ == "__main__":
    main()
