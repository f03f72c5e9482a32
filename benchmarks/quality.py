"""Closeness to the un-cached picture at equal numbers of computed steps: this project, other caches, the plain sampler.

    python benchmarks/quality.py             # the demo model; about 10 minutes of one core
    python benchmarks/quality.py --guidance 5 --scheduler unipc --own_rows
    python benchmarks/quality.py --short     # exit status 1 if a margin is missed (CI)
    python benchmarks/quality.py --model black-forest-labs/FLUX.1-dev --prompt_file prompts.txt --steps 28

Rows, each at about 50, 40 and 25 % of the steps: the plain sampler with fewer steps, with Euler also a second-order one
(DPM-Solver++); the paper's rule here, at the settings that come nearest and are expected to err least; a speed-up
without a calibration; runs planned from a calibration; the released schedule of the model's kind; the hooks MagCache,
FirstBlockCache, TaylorSeer and (on Wan) SeaCache of diffusers; DBCache and its TaylorSeer variant of cache-dit where
that is installed (pip install cache-dit==1.5.3). "off" is without the corrector. Thresholds of the others are searched
for, on one picture, so that they compute as many steps. Computed steps are counted as executions of the last block's
query projection. PSNR (mean with a 95 % interval, worst picture), SSIM and MS-SSIM are against the un-cached picture
of the same prompt and seed; motion is the PSNR of the differences between neighbouring frames of a video; extra
memory is what is alive between two steps beyond that of an un-cached run. Seconds are in benchmarks/speed.py.

Another model than the demo is calibrated first, on the first prompts of its file, and measured on the others. Prints
the table as Markdown; writes it and a figure into the folder --output.
"""

import argparse
import gc
import math
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

from common.errors import MagCacheError, needs  # noqa: E402
from common.hosts import host_of  # noqa: E402
from common.patch import magcache_calibration, magcache_forward  # noqa: E402
from common.planner import Target, nearest_by_the_rule  # noqa: E402
from common.report import memory_text  # noqa: E402
from common.schedule import Rule, Settings, rule_of  # noqa: E402
from common.scripts.plots import save_figure  # noqa: E402
from common.scripts.quality import quality  # noqa: E402
from common.tables import load as load_table  # noqa: E402

SHARES = (0.5, 0.4, 0.25)
DEMO_VIDEO = REPOSITORY / "demo" / "video"
FREE = "no calibration"
RELEASED = {"Flux": "flux-dev", "Wan": "wan2.1-t2v-1.3b"}  # of the transformer's class: the preset
# dB above another row at half the steps. Measured by --short on 2026-11-25, less 1.5: 4.0, 14.0 and 14.5.
MARGINS = {
    "paper's rule": ("fewer steps", 2.5),
    FREE: ("fewer steps", 12.5),
    "planned, linear": ("fewer steps", 13.0),
}
SAMPLER_NAMES = {"euler": "Euler", "unipc": "UniPC of second order", "dpm": "DPM-Solver++ of second order"}
BATCH = 12  # pictures drawn at once
# cache: makes the context manager that puts the cache on. batch: pictures at once, since others decide for a whole one.
Row = namedtuple("Row", "family setting cache steps batch", defaults=[BATCH])


class Subject:
    """A pipeline, what every call of it gets, and the (prompt, seed) of every picture."""

    def __init__(self, pipe, call, jobs, scheduler="euler"):
        self.pipe, self.call, self.jobs, self.host = pipe, call, jobs, host_of(pipe.transformer)
        pipe.set_progress_bar_config(disable=True)
        self.scheduler = scheduler
        self.shift = pipe.scheduler.config.get("shift") or pipe.scheduler.config.get("flow_shift")
        pipe.scheduler = self.new_scheduler(scheduler)
        self.executed = 0
        blocks = list(getattr(pipe.transformer, self.host.blocks[-1]))
        query = [module for name, module in blocks[-1].named_modules() if name.endswith("to_q")][0]
        query.register_forward_hook(self.count)

    def new_scheduler(self, name):
        """One of SAMPLER_NAMES, with the noise levels of the model's own."""
        from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

        if name == "euler":
            return FlowMatchEulerDiscreteScheduler(shift=self.shift)
        flux = "Flux" in type(self.pipe).__name__  # which tells the scheduler its shift, as a logarithm
        options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "use_dynamic_shifting": flux}
        kind = {"unipc": UniPCMultistepScheduler, "dpm": DPMSolverMultistepScheduler}[name]
        scheduler = kind(flow_shift=self.shift, solver_order=2, **options)
        scheduler.register_to_config(base_shift=math.log(self.shift), max_shift=math.log(self.shift))
        return scheduler

    @contextmanager
    def sampled_by(self, name):
        own, self.pipe.scheduler = self.pipe.scheduler, self.new_scheduler(name)
        try:
            yield
        finally:
            self.pipe.scheduler = own

    def count(self, *_):
        self.executed += 1

    def render(self, jobs, steps, **more):
        """uint8 frames (jobs, frames, height, width, 3) of these (prompt, seed), drawn as one batch."""
        output = self.pipe(
            [prompt for prompt, _ in jobs],
            num_inference_steps=steps,
            output_type="np",
            generator=[torch.Generator().manual_seed(seed) for _, seed in jobs],
            **self.call,
            **more,
        )
        frames = output.images[:, None] if hasattr(output, "images") else output.frames
        return (np.asarray(frames) * 255).round().astype(np.uint8)

    def computed(self, cache, jobs, steps):
        self.executed = 0
        with cache():
            self.render(jobs, steps)
        return self.executed

    def peak_bytes(self, cache, steps):
        """Bytes of tensors that are alive between two steps of a run, looked at three times."""
        seen = []

        def look(pipe, step, timestep, tensors):
            if step in (steps // 4, steps // 2, 3 * steps // 4):
                seen.append(live_bytes())
            return tensors

        with cache():
            self.render(self.jobs[:1], steps, callback_on_step_end=look)
        return max(seen)

    def calibrated(self, jobs, steps):
        with magcache_calibration(self.pipe.transformer, self.host, self.timesteps, "measured") as handle:
            for job in tqdm(jobs, desc=f"calibrating, {steps} steps"):
                self.render([job], steps)
        return handle.table

    def timesteps(self):
        return self.pipe.scheduler.timesteps


def live_bytes():
    gc.collect()
    storages = {}
    for one in gc.get_objects():
        # isinstance would wake lazy objects; other types (torch.compile's stand-ins) hold no memory.
        if type(one) in (torch.Tensor, torch.nn.Parameter):
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(storages.values())


def own_rows(subject, table, steps, counts):
    """Rows of this project."""

    def patched(table, settings, corrector=True, rule=None):
        return lambda: magcache_forward(
            subject.pipe.transformer,
            subject.host,
            table,
            settings,
            subject.timesteps,
            rule or Rule(),
            announce=None,
            scheduler=lambda: subject.pipe.scheduler,
            corrector=corrector,
        )

    def second_order():
        return subject.sampled_by("dpm")

    levels = np.asarray(table.sigmas)
    for count in counts:
        yield Row("fewer steps", "plain sampler", nullcontext, count)
    if subject.scheduler == "euler":
        for count in counts:
            yield Row("fewer steps, second order", "DPM-Solver++", second_order, count)
    for count in counts:
        settings = nearest_by_the_rule(table, levels, Rule(), count).settings
        for corrector in (True, False):
            family = "paper's rule" + ", off" * (not corrector)
            yield Row(family, thresholds_text(settings), patched(table, settings, corrector), steps)
    released = [name for kind, name in RELEASED.items() if kind in type(subject.pipe.transformer).__name__]
    for preset in map(load_table, released):
        for corrector in (True, False):
            family = f"released schedule, {preset.name}" + ", off" * (not corrector)
            settings = Settings(**preset.settings)
            yield Row(family, thresholds_text(settings), patched(preset, settings, corrector, rule_of(preset)), steps)
    kinds = [
        (FREE, None, {}, True),
        (f"{FREE}, off", None, {}, False),
        ("planned, linear", table, {"predictor": "linear"}, True),
        ("planned, linear, off", table, {"predictor": "linear"}, False),
        ("planned, linear, output", table, {"predictor": "linear", "payload": "output"}, True),
    ]
    for family, its_table, options, corrector in kinds:
        for count in counts:
            cache = patched(its_table, Target(count, **options), corrector)
            yield Row(family, f"--magcache_steps {count}", cache, steps)


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
        yield Row("diffusers MagCache", thresholds_text(settings), hooks(config), steps, 1)
    for threshold in searched(subject, steps, counts, lambda threshold: hooks(FirstBlockCacheConfig(threshold))):
        yield Row(
            "diffusers FirstBlockCache", f"threshold {threshold:.3g}", hooks(FirstBlockCacheConfig(threshold)), steps, 1
        )
    if "Wan" in type(transformer).__name__:
        from diffusers import SeaCacheConfig

        for order in (0, 1):

            def sea(threshold, order=order):
                return hooks(SeaCacheConfig(threshold=threshold, residual_order=order))

            for threshold in searched(subject, steps, counts, sea):
                family = "diffusers SeaCache" + ", first order" * order
                yield Row(family, f"threshold {threshold:.3g}", sea(threshold), steps, 1)
    for interval in (2, 3, 4):
        config = TaylorSeerCacheConfig(cache_interval=interval, disable_cache_before_step=3, max_order=1)
        yield Row("diffusers TaylorSeer", f"interval {interval}", hooks(config), steps, 1)
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
            yield Row(family, f"threshold {threshold:.3g}", cached(threshold), steps, 1)


def searched(subject, steps, counts, cached):
    """Thresholds, each by bisection on one picture, with which about as many steps are computed as `counts` says."""
    known = {}

    def computed(threshold):
        if threshold not in known:
            known[threshold] = subject.computed(cached(threshold), subject.jobs[:1], steps) / subject.branches
        return known[threshold]

    for count in counts:
        low, high = 0.0, 1.0
        for _ in range(7):
            middle = (low + high) / 2
            low, high = (middle, high) if computed(middle) > count else (low, middle)
    return sorted({min(known, key=lambda threshold: abs(known[threshold] - count)) for count in counts})


def measure(subject, rows, reference, plain_bytes, steps):
    """One dictionary a row. reference: `drawn` un-cached."""
    for row in rows:
        with row.cache():
            pictures, computed = drawn(subject, row.steps, f"{row.family}, {row.setting}", row.batch)
        scores = [quality(true, picture) for true, picture in zip(reference, pictures)]
        psnr = np.array([score["psnr"] for score in scores])
        tqdm.write(f"{row.family}, {row.setting}: {computed:.1f} of {steps} computed, {psnr.mean():.1f} dB", sys.stderr)
        yield {
            "family": row.family,
            "setting": row.setting,
            "computed": computed,
            "psnr": psnr.mean(),
            "interval": 1.96 * psnr.std(ddof=1) / len(psnr) ** 0.5,
            "worst": psnr.min(),
            "ssim": np.mean([score["ssim"] for score in scores]),
            "motion": None if len(reference[0]) == 1 else np.mean(list(map(motion_psnr, reference, pictures))),
            "ms_ssim": None if scores[0]["ms_ssim"] is None else np.mean([score["ms_ssim"] for score in scores]),
            "bytes": None if plain_bytes is None else max(0, subject.peak_bytes(row.cache, row.steps) - plain_bytes),
        }


def motion_psnr(true, drawn):
    """PSNR of the differences between neighbouring frames, of uint8 clips (frames, height, width, 3)."""
    true, drawn = (np.diff(frames.astype(float), axis=0) for frames in (true, drawn))
    return 10 * np.log10(255**2 / np.mean((true - drawn) ** 2))


def drawn(subject, steps, title, batch):
    """(every picture of the subject, computed steps a picture)"""
    subject.executed, pictures, batches = 0, [], range(0, len(subject.jobs), batch)
    for first in tqdm(batches, desc=title, leave=False):
        pictures.extend(subject.render(subject.jobs[first : first + batch], steps))
    return pictures, subject.executed / subject.branches / len(batches)


def references(subject, steps):
    """Un-cached pictures."""
    subject.branches = 1
    pictures, calls = drawn(subject, steps, f"un-cached, {steps} steps", BATCH)
    subject.branches = round(calls / steps)
    return pictures


def table_text(results, steps):
    has_ms_ssim, moves = results[0]["ms_ssim"] is not None, results[0]["motion"] is not None
    rows = []
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
                *[f"{one['motion'] or 0:.1f}"] * moves,
                "" if one["bytes"] is None else memory_text(one["bytes"]),
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
            *["motion dB"] * moves,
            "extra memory",
        ],
    )


def draw(by_steps, path):
    figure = needs("matplotlib.figure", "matplotlib").Figure(
        figsize=(max(7, 6.5 * len(by_steps)), 5.5), layout="constrained"
    )
    panels = np.atleast_1d(figure.subplots(1, len(by_steps)))
    families = dict.fromkeys(one["family"] for results in by_steps.values() for one in results)
    palette = needs("matplotlib", "matplotlib").colormaps["tab20"].colors  # one colour a family, in all panels
    colors = dict(zip(families, palette)) | {"fewer steps": "black"}
    for axes, (steps, results) in zip(panels, by_steps.items()):
        for family in dict.fromkeys(one["family"] for one in results):
            points = sorted(
                (one["computed"], one["psnr"], one["interval"]) for one in results if one["family"] == family
            )
            own = family == FREE
            axes.errorbar(
                *np.transpose(points)[:2],
                yerr=np.transpose(points)[2],
                marker="o",
                markersize=4,
                label=family,
                linewidth=2 if own else 1,
                linestyle="-" if own else "--",
                capsize=2,
                color=colors[family],
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
    reference = references(subject, steps)
    wanted = {*MARGINS, *(other for other, _ in MARGINS.values())}
    rows = [row for row in own_rows(subject, table, steps, [steps // 2]) if row.family in wanted]
    psnr = {}
    for one in measure(subject, rows, reference, None, steps):
        print(f"{one['family']}: {one['computed']:.1f} of {steps} computed, {one['psnr']:.1f} dB")
        psnr[one["family"]] = one["psnr"]
    return [
        f"{family} is {psnr[family] - psnr[other]:.1f} dB above {other}, which should be {margin} or more."
        for family, (other, margin) in MARGINS.items()
        if psnr[family] - psnr[other] < margin
    ]


def load(args):
    """(Subject, jobs to calibrate on)"""
    if args.model == "demo":
        pipe, _ = load_demo()
        call = {"height": 64, "width": 64, "max_sequence_length": 16}
        calibration = [(prompt, 0) for prompt in (DEMO / "calibration_prompts.txt").read_text().splitlines()]
        prompts = PROMPTS
    elif args.model == "demo-video":
        from diffusers import WanPipeline

        torch.set_num_threads(1)
        pipe = WanPipeline.from_pretrained(DEMO_VIDEO / "model", torch_dtype=torch.float32)
        call = {"height": 64, "width": 64, "num_frames": 17, "max_sequence_length": 16}
        calibration = [(prompt, 100) for prompt in (DEMO_VIDEO / "calibration_prompts.txt").read_text().splitlines()]
        prompts = (DEMO_VIDEO / "prompts.txt").read_text().splitlines()
    else:
        from diffusers import DiffusionPipeline

        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=dtype).to(device)
        call = {
            name: getattr(args, name)
            for name in ("height", "width", "num_frames", "max_sequence_length")
            if getattr(args, name)
        }
        if not args.prompt_file:
            raise MagCacheError(
                "--model needs a --prompt_file: four prompts to calibrate on, then those to measure on."
            )
        lines = args.prompt_file.read_text().splitlines()
        calibration, prompts = [(prompt, 0) for prompt in lines[:4]], lines[4:]
    if "Flux" in type(pipe).__name__:  # whose guidance_scale is a number that the model is told
        call |= {"negative_prompt": "", "true_cfg_scale": args.guidance} if args.guidance != 1 else {}
    else:
        call["guidance_scale"] = args.guidance
    jobs = [(prompt, seed) for seed in range(1, args.seeds + 1) for prompt in prompts[: args.prompts]]
    if len(jobs) < 2:
        raise MagCacheError("An interval needs two pictures or more: add prompts or --seeds.")
    return Subject(pipe, call, jobs, args.scheduler), calibration


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default="demo",
        help="hub id or folder of a diffusers pipeline; default: the demo image model; demo-video: that of video",
    )
    parser.add_argument("--prompt_file", type=Path, help="for another model than the demo: a prompt a line")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance; 1: none")
    parser.add_argument("--scheduler", choices=SAMPLER_NAMES, default="euler")
    parser.add_argument("--own_rows", action="store_true", help="without other projects")
    parser.add_argument("--prompts", type=int, default=12, help="how many of the prompts are measured")
    parser.add_argument("--seeds", type=int, default=2, help="pictures a prompt")
    parser.add_argument("--steps", type=int, nargs="+", default=[28, 50])
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--num_frames", type=int)
    parser.add_argument("--max_sequence_length", type=int)
    parser.add_argument("--short", action="store_true", help="few pictures at half the steps, with the margins of CI")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "docs", help="folder of the table and the figure")
    parser.add_argument("--name", default="quality", help="of both: NAME_table.md and NAME.png")
    args = parser.parse_args()
    try:
        subject, calibration = load(args)
    except MagCacheError as error:
        sys.exit(f"quality.py: {error}")
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")
    if args.short:
        sys.exit("\n".join(short(subject, load_table("demo"))) or None)
    tables = {steps: subject.calibrated(calibration, steps) for steps in args.steps}
    by_steps, texts = {}, []
    # cache-dit leaves its mark on a pipeline, so all other rows are measured before it.
    plain = {steps: references(subject, steps) for steps in args.steps}
    plain_bytes = {steps: subject.peak_bytes(nullcontext, steps) for steps in args.steps}
    for rows_of in (own_rows,) if args.own_rows else (own_rows, other_rows):
        for steps, table in tables.items():
            counts = sorted({max(2, round(share * steps)) for share in SHARES}, reverse=True)
            rows = rows_of(subject, table, steps, counts)
            by_steps.setdefault(steps, []).extend(measure(subject, rows, plain[steps], plain_bytes[steps], steps))
    for steps, results in by_steps.items():
        texts.append(table_text(results, steps))
    texts.append(
        f"{len(subject.jobs)} pictures, {args.seeds} of each prompt, none calibrated on; {args.model}, "
        f"{SAMPLER_NAMES[args.scheduler]}, guidance {args.guidance:g}; {machine_text(subject)}."
    )
    if by_steps[args.steps[0]][0]["ms_ssim"] is None:
        texts[-1] += " MS-SSIM is not defined below 161 pixels a side."
    text = "\n\n".join(texts) + "\n"
    print(text)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{args.name}_table.md").write_text(text)
    draw(by_steps, args.output / f"{args.name}.png")


if __name__ == "__main__":
    main()
