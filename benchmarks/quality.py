"""Closeness to the un-cached image at equal numbers of computed steps: this project, other caches, the plain sampler.

    python benchmarks/quality.py             # the demo model; about 15 minutes of one core
    python benchmarks/quality.py --guidance 5 --scheduler unipc --projects magcache
    python benchmarks/quality.py --model demo-video --guidance 5 1 --scheduler unipc --steps 30     # 25 minutes
    python benchmarks/quality.py --short     # exit status 1 if a margin is missed (CI)
    python benchmarks/quality.py --model black-forest-labs/FLUX.1-dev --prompt_file prompts.txt --steps 28

Rows, each at about 50, 40 and 25 % of the steps: the plain sampler with fewer steps, with Euler also a second-order one
(DPM-Solver++); the paper's rule here, with the settings that come nearest and have the smallest expected error; a
speed-up without a calibration; runs planned from a calibration; the released schedule for this kind of model; the hooks
MagCache, FirstBlockCache, TaylorSeer and (on Wan) SeaCache of diffusers; DBCache and its TaylorSeer variant of
cache-dit if that is installed (pip install cache-dit==1.5.3). "off" means without the corrector. The thresholds of
other projects are searched for, on two calibration prompts, so that they compute as many steps. Computed steps are
counted as executions of the last block's query projection. PSNR (mean with a 95 % interval, worst image), SSIM and
MS-SSIM are against the un-cached image of the same prompt and seed; motion is the PSNR of the differences between
neighbouring frames of a video; extra memory is what is alive between two steps beyond that of an un-cached run. For
seconds, see benchmarks/speed.py.

Measured rows are kept in a file (--rows), so that an interrupted run can be continued. Rows of this project are
measured again when `common` changes, other rows when the version of their project does; a file with rows of other
prompts, seeds or another machine is refused.

A model other than the demo is first calibrated, on the first prompts of its file, and then measured on the others.
Prints the table as Markdown; writes it and a figure into the folder --output.
"""

import argparse
import itertools
import os
import platform
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo_model import DEMO, PROMPTS, REPOSITORY, load_demo  # noqa: E402
from peers import cache_dit_rows, diffusers_rows, thresholds_text  # noqa: E402
from row_file import RowFile, digest_of_code  # noqa: E402
from subject import BATCH, SAMPLER_NAMES, Row, Subject  # noqa: E402

from common.calibration import fingerprint  # noqa: E402
from common.errors import MagCacheError, needs  # noqa: E402
from common.patch import magcache_forward  # noqa: E402
from common.plan_text import memory_text  # noqa: E402
from common.planner import Target, nearest_by_the_rule  # noqa: E402
from common.schedule import Rule, Settings, rule_of  # noqa: E402
from common.scripts.plots import save_figure  # noqa: E402
from common.scripts.quality import quality  # noqa: E402
from common.tables import load as load_table  # noqa: E402

SHARES = (0.5, 0.4, 0.25)
DEMO_VIDEO = REPOSITORY / "demo" / "video"
SCRIPTS = REPOSITORY / "common" / "scripts"  # what command lines share: draws nothing
FREE = "no calibration"
RELEASED = {"Flux": "flux-dev", "Wan": "wan2.1-t2v-1.3b"}  # of the transformer's class: the preset
RELEASED_EXPERTS = {"Wan": "wan2.2-t2v-a14b"}
# dB above another row at half the steps. Measured by --short on 2026-11-26, less 1.5: 4.0, 10.9 and 12.5.
MARGINS = {
    "paper's rule": ("fewer steps", 2.5),
    FREE: ("fewer steps", 9.4),
    "planned, linear": ("fewer steps", 11.0),
}


def own_rows(subject, table, steps, counts, recall=None, wanted=None):
    """Rows of the plain sampler and of this project."""
    source = digest_of_code(set((REPOSITORY / "common").rglob("*.py")) - set(SCRIPTS.rglob("*.py")))

    def patched(table, settings, corrector=True, rule=None):
        return lambda: magcache_forward(
            subject.models,
            subject.host,
            table,
            settings,
            subject.timesteps,
            rule or Rule(),
            announce=None,
            boundary=subject.boundary,
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
            yield Row(family, thresholds_text(settings), patched(table, settings, corrector), steps, source=source)
    presets = RELEASED if subject.boundary is None else RELEASED_EXPERTS
    released = [name for kind, name in presets.items() if kind in type(subject.pipe.transformer).__name__]
    for preset in map(load_table, released):
        for corrector in (True, False):
            family = f"released schedule, {preset.name}" + ", off" * (not corrector)
            settings = Settings(**preset.settings)
            cache = patched(preset, settings, corrector, rule_of(preset))
            yield Row(family, thresholds_text(settings), cache, steps, source=source)
    kinds = [
        (FREE, None, {}, True),
        (f"{FREE}, off", None, {}, False),
        ("planned, linear", table, {"predictor": "linear"}, True),
        ("planned, linear, off", table, {"predictor": "linear"}, False),
        ("planned, linear, residual", table, {"predictor": "linear", "payload": "residual"}, True),
    ]
    for family, its_table, options, corrector in kinds:
        for count in counts:
            cache = patched(its_table, Target(count, **options), corrector)
            yield Row(family, f"--magcache_steps {count}", cache, steps, source=source)


PROJECTS = {"magcache": own_rows, "diffusers": diffusers_rows, "cache-dit": cache_dit_rows}


def measured_row(subject, row, uncached, plain_bytes, steps):
    """Figures of a row against the images `uncached`. plain_bytes: memory of an un-cached run; None: do not measure."""
    began = time.perf_counter()
    with row.cache():
        pictures, computed = subject.drawn(row.steps, f"{row.family}, {row.setting}", row.batch)
    scores = [quality(true, picture) for true, picture in zip(uncached, pictures)]
    psnr = np.array([score["psnr"] for score in scores])
    tqdm.write(f"{row.family}, {row.setting}: {computed:.1f} of {steps} computed, {psnr.mean():.1f} dB", sys.stderr)
    moves, has_ms_ssim = len(uncached[0]) > 1, scores[0]["ms_ssim"] is not None
    return {
        "family": row.family,
        "setting": row.setting,
        "computed": computed,
        "psnr": float(psnr.mean()),
        "interval": float(1.96 * psnr.std(ddof=1) / len(psnr) ** 0.5),
        "worst": float(psnr.min()),
        "ssim": float(np.mean([score["ssim"] for score in scores])),
        "motion": float(np.mean(list(map(motion_psnr, uncached, pictures)))) if moves else None,
        "ms_ssim": float(np.mean([score["ms_ssim"] for score in scores])) if has_ms_ssim else None,
        "bytes": None if plain_bytes is None else max(0, subject.peak_bytes(row.cache, row.steps) - plain_bytes),
        "seconds": time.perf_counter() - began,
        "date": time.strftime("%Y-%m-%d"),
    }


def motion_psnr(true, drawn):
    """PSNR of the differences between neighbouring frames, of uint8 clips (frames, height, width, 3)."""
    true, drawn = (np.diff(frames.astype(float), axis=0) for frames in (true, drawn))
    return 10 * np.log10(255**2 / np.mean((true - drawn) ** 2))


def references(subject, steps):
    """The un-cached images of a subject."""
    return subject.drawn(steps, f"un-cached, {steps} steps", BATCH)[0]


def all_rows(subject, file, calibration, guidances, all_steps, projects, only):
    """{(guidance, steps): measured rows}. projects: keys of PROJECTS; only: how the names of wanted rows begin (empty:
    all)."""
    results, tables, uncached = {}, {}, {}
    stages = [PROJECTS[name] for name in PROJECTS if name in projects]

    def wanted(family):
        return not only or family.startswith(tuple(only))

    for stage, guidance, steps in itertools.product(stages, guidances, all_steps):
        case, label = (guidance, steps), f"guidance {guidance:g}, {steps} steps"
        subject.guide(guidance)
        if case not in tables:
            tables[case] = subject.calibrated(calibration, steps)

        def recall(key, measure, label=label):
            return file.recall(f"{label}, {key}", measure)

        def fresh(row, case=case, steps=steps):
            if case not in uncached:
                uncached[case] = references(subject, steps), subject.peak_bytes(nullcontext, steps)
            return measured_row(subject, row, *uncached[case], steps)

        counts = sorted({max(2, round(share * steps)) for share in SHARES}, reverse=True)
        for row in stage(subject, tables[case], steps, counts, recall, wanted):
            if not wanted(row.family):
                continue
            drawn = f"{row.steps} steps" if row.steps != steps else ""
            key = ", ".join(part for part in (row.family, row.setting, drawn, row.source) if part)
            results.setdefault(case, {})[key] = recall(key, lambda row=row: fresh(row))
    return {case: list(rows.values()) for case, rows in results.items()}


def table_text(results, steps):
    """The rows of one case as a Markdown table."""
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


def draw_quality(by_case, path):
    """Plot PSNR against computed steps. by_case: of `all_rows`; path: of the image."""
    figure = needs("matplotlib.figure", "matplotlib").Figure(
        figsize=(max(7, 6.5 * len(by_case)), 5.5), layout="constrained"
    )
    panels = np.atleast_1d(figure.subplots(1, len(by_case)))
    families = dict.fromkeys(one["family"] for results in by_case.values() for one in results)
    palette = needs("matplotlib", "matplotlib").colormaps["tab20"].colors  # one colour a family, in all panels
    colors = dict(zip(families, palette)) | {"fewer steps": "black", FREE: "crimson"}
    for axes, ((guidance, steps), results) in zip(panels, by_case.items()):
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
        axes.set_title(f"guidance {guidance:g}" if guidance != 1 else "no guidance", fontsize=10)
        axes.set_xlabel(f"computed steps of {steps}")
        axes.set_ylabel("PSNR to the un-cached picture, dB")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    save_figure(path, figure)


def machine_text(subject):
    """The machine and the versions of a measurement."""
    import diffusers

    device = (
        torch.cuda.get_device_name() if subject.pipe.device.type == "cuda" else f"{platform.machine()}, one CPU thread"
    )
    return f"{device}, diffusers {diffusers.__version__}, torch {torch.__version__}"


def row_file_of(args, subject, calibration):
    """The RowFile of a command line."""
    ramp = np.tile(np.arange(192, dtype=np.uint8)[:, None, None], (1, 1, 192, 3))
    run = {
        "model": args.model,
        "weights": fingerprint(subject.pipe.transformer),
        "prompts and seeds": subject.jobs,
        "calibration prompts": calibration,
        "sampler": subject.scheduler,
        "sizes": subject.call,
        "machine and versions": machine_text(subject),
        "measures of closeness": {name: round(value, 6) for name, value in quality(ramp, ramp // 2).items()},
    }
    return RowFile(args.rows or args.output / f"{args.name}_rows.json", run)


def short(subject, table):
    """The check of --short, with half the steps and few images: a sentence for each margin that is missed."""
    subject.jobs, steps = subject.jobs[:6], 28
    reference = references(subject, steps)
    wanted = {*MARGINS, *(other for other, _ in MARGINS.values())}
    rows = [row for row in own_rows(subject, table, steps, [steps // 2]) if row.family in wanted]
    psnr = {}
    for row in rows:
        one = measured_row(subject, row, reference, None, steps)
        print(f"{one['family']}: {one['computed']:.1f} of {steps} computed, {one['psnr']:.1f} dB")
        psnr[one["family"]] = one["psnr"]
    return [
        f"{family} is {psnr[family] - psnr[other]:.1f} dB above {other}, which should be {margin} or more."
        for family, (other, margin) in MARGINS.items()
        if psnr[family] - psnr[other] < margin
    ]


def load_demo_video(experts):
    """The pipeline of the demo video model on the CPU. experts: with the two experts fine-tuned from it."""
    from diffusers import WanPipeline

    if not experts:
        return WanPipeline.from_pretrained(DEMO_VIDEO / "model", torch_dtype=torch.float32)
    sys.path.insert(1, str(DEMO_VIDEO))
    from experts import load_experts

    return load_experts()


def load_subject(args):
    """(Subject, jobs to calibrate on) of a command line."""
    if args.model == "demo":
        pipe, _ = load_demo()
        call = {"height": 64, "width": 64, "max_sequence_length": 16}
        calibration = [
            (prompt, 0) for prompt in (DEMO / "calibration_prompts.txt").read_text(encoding="utf-8").splitlines()
        ]
        prompts = PROMPTS
    elif args.model in ("demo-video", "demo-video-experts"):
        torch.set_num_threads(1)
        pipe = load_demo_video(experts=args.model == "demo-video-experts")
        call = {"height": 64, "width": 64, "num_frames": 17, "max_sequence_length": 16}
        calibration = [
            (prompt, 100)
            for prompt in (DEMO_VIDEO / "calibration_prompts.txt").read_text(encoding="utf-8").splitlines()
        ]
        prompts = (DEMO_VIDEO / "prompts.txt").read_text(encoding="utf-8").splitlines()
    else:
        from diffusers import DiffusionPipeline

        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
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
        lines = args.prompt_file.read_text(encoding="utf-8").splitlines()
        calibration, prompts = [(prompt, 0) for prompt in lines[:4]], lines[4:]
    if args.device:
        # A convolution of TensorFloat-32 would be another model's.
        torch.backends.cudnn.allow_tf32 = False
        pipe.to(args.device)
    jobs = [(prompt, seed) for seed in range(1, args.seeds + 1) for prompt in prompts[: args.prompts]]
    if len(jobs) < 2:
        raise MagCacheError("An interval needs two images or more: add prompts or --seeds.")
    return Subject(pipe, call, jobs, args.scheduler, calibration[:2]), calibration


def page_text(args, subject, by_case):
    """The tables as Markdown, with the machine and the settings of the measurement."""
    texts = []
    for (guidance, steps), results in by_case.items():
        texts += [f"Guidance {guidance:g}:"] * (len(args.guidance) > 1) + [table_text(results, steps)]
    everything = [one for results in by_case.values() for one in results]
    days = sorted({one["date"] for one in everything})
    guidances = " and ".join(f"{guidance:g}" for guidance in args.guidance)
    texts.append(
        f"{len(subject.jobs)} {'images' if everything[0]['motion'] is None else 'clips'}, {args.seeds} of each "
        f"prompt, none calibrated on; {args.model}, {SAMPLER_NAMES[args.scheduler]}, guidance {guidances}; "
        f"{machine_text(subject)}, {' to '.join(dict.fromkeys((days[0], days[-1])))}; the rows took "
        f"{sum(one['seconds'] for one in everything) / 60:.0f} minutes."
    )
    if everything[0]["ms_ssim"] is None:
        texts[-1] += " MS-SSIM is not defined below 161 pixels a side."
    return "\n\n".join(texts) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default="demo",
        help="hub id or folder of a diffusers pipeline; default: the demo image model; demo-video: that of video; "
        "demo-video-experts: two experts made of it",
    )
    parser.add_argument("--prompt_file", type=Path, help="for another model than the demo: a prompt a line")
    parser.add_argument("--device", help="default: cpu for the demo models, a GPU if there is one for others")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0], help="classifier-free guidance; 1: none")
    parser.add_argument("--scheduler", choices=SAMPLER_NAMES, default="euler")
    parser.add_argument("--projects", choices=PROJECTS, nargs="+", default=list(PROJECTS), help="whose rows")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only rows whose names begin so")
    parser.add_argument("--prompts", type=int, default=12, help="how many of the prompts are measured")
    parser.add_argument("--seeds", type=int, default=2, help="images per prompt")
    parser.add_argument("--steps", type=int, nargs="+", default=[28, 50])
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--num_frames", type=int)
    parser.add_argument("--max_sequence_length", type=int)
    parser.add_argument("--short", action="store_true", help="few images at half the steps, with the margins of CI")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "docs", help="folder of the table and the figure")
    parser.add_argument("--name", default="quality", help="of both: NAME_table.md and NAME.png")
    parser.add_argument(
        "--rows", type=Path, help="file of what is measured so far; default: NAME_rows.json in the folder --output"
    )
    args = parser.parse_args()
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")
    try:
        subject, calibration = load_subject(args)
        if args.short:
            subject.guide(args.guidance[0])
            sys.exit("\n".join(short(subject, load_table("demo"))) or None)
        file = row_file_of(args, subject, calibration)
        projects = args.projects if subject.boundary is None else ["magcache"]  # others' rows are of one transformer
        by_case = all_rows(subject, file, calibration, args.guidance, args.steps, projects, args.only)
    except MagCacheError as error:
        sys.exit(f"quality.py: {error}")
    text = page_text(args, subject, by_case)
    print(text)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{args.name}_table.md").write_text(text, encoding="utf-8")
    draw_quality(by_case, args.output / f"{args.name}.png")


if __name__ == "__main__":
    main()
