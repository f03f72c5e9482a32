"""The experiments by which the settings of a speed-up without a calibration were chosen, on other prompts and seeds
than those of benchmarks/quality.py.

    python benchmarks/experiments.py          # the demo image model, Euler; about 6 minutes of one core
    python benchmarks/experiments.py --guidance 5 --scheduler unipc --steps 28
    python benchmarks/experiments.py --model demo-video --guidance 5 --scheduler unipc --steps 30

Each row changes one thing: the measure in which computed steps are spread evenly (the share of the step index against
the noise level, and a power), how far the line through the two newest outputs is followed, or how many outputs correct
a step and how far. The last rows use a calibration on other prompts: its corrections, and the measure that
--magcache_refine chooses. PSNR in dB against the un-cached image or clip, mean (worst).
"""

import argparse
import sys
import time
from contextlib import nullcontext
from functools import partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from quality import DEMO_VIDEO, SHARES, load_subject, references  # noqa: E402
from subject import BATCH, SAMPLER_NAMES  # noqa: E402

sys.path.insert(1, str(DEMO_VIDEO))
from clips import BACKGROUNDS, MOTIONS, OBJECTS, caption  # noqa: E402

from common import corrector as corrector_module  # noqa: E402
from common import planner, spread  # noqa: E402
from common.errors import needs  # noqa: E402
from common.patch import magcache_forward  # noqa: E402
from common.planner import Target  # noqa: E402
from common.refine import best_measure, closeness_of  # noqa: E402
from common.scripts.quality import quality  # noqa: E402
from common.trajectory import Trajectory  # noqa: E402

PICTURES = zip(
    ("cat", "fox", "lion", "owl", "snail", "apple", "rocket", "star", "alien", "cactus", "house", "doughnut"),
    cycle(("yellow", "purple", "orange", "white", "black", "sky blue", "pink", "green")),
)
# What the tables report or calibrate on.
REPORTED = {
    line
    for name in ("prompts", "calibration_prompts")
    for line in (DEMO_VIDEO / f"{name}.txt").read_text(encoding="utf-8").splitlines()
}


def clip_prompts():
    """One prompt per object, with a background and motion that differ from object to object, none in REPORTED."""
    for number, name in enumerate(OBJECTS):
        background = list(BACKGROUNDS)[(number + number // 8) % len(BACKGROUNDS)]
        motions = (MOTIONS[(3 * number + more) % len(MOTIONS)] for more in range(len(MOTIONS)))
        yield next(
            prompt for prompt in (caption(name, motion, background) for motion in motions) if prompt not in REPORTED
        )


PROMPTS = {
    "demo": [f"a {name} on a {background} background" for name, background in PICTURES],
    "demo-video": list(clip_prompts()),
}


def followed(share):
    """A context in which `Trajectory.predicted` follows a fixed share of the line."""

    def predicted(self, step, held):
        line = self.line(step)
        return held if line is None else (held.float() + share * line).to(held.dtype)

    return mock.patch.object(Trajectory, "predicted", predicted)


def of_two():
    """A context in which `Trajectory.corrected` uses only the computed steps on both sides."""
    plain = Trajectory.corrected

    def corrected(self, gap, step, output):
        anchors, self.anchors = self.anchors, self.anchors[:1]
        try:
            return plain(self, gap, step, output)
        finally:
            self.anchors = anchors

    return mock.patch.object(Trajectory, "corrected", corrected)


def last_step_held():
    """A context in which the last step is skipped, and the last but one computes."""
    plain = planner.spread_steps

    def steps(levels, *args, **kwargs):
        return plain(levels[:-1], *args, **kwargs)

    return mock.patch.object(planner, "spread_steps", steps)


def last_step_computed():
    """A context in which the last step computes, however little it changes."""
    return mock.patch.object(spread, "ends_in_nothing", lambda *_: False)


def guided(yes):
    """A context in which runs count as guided (s starts at 0) or not (s starts at 1)."""
    return mock.patch.object(corrector_module, "is_guided", lambda _: yes)


def outputs_throughout():
    """A context in which the model's output is predicted and corrected even if the solver integrates x0."""
    return mock.patch.object(corrector_module, "integrates_data", lambda _: False)


def trials():
    """Yields (name, function that returns the context of the trial, whether skipped steps are corrected)."""
    yield "as implemented", nullcontext, True
    for share, power in ((0.25, 0.6), (0.5, 0.7), (0.5, 0.8), (0.75, 0.7), (0.75, 1), (1, 1)):
        name = f"spread with index share {share:g}, power {power:g}"
        yield name, lambda share=share, power=power: spread_in((share, power)), True
    yield "newest output held (s = 0)", lambda: followed(0.0), True
    yield "line followed throughout (s = 1)", lambda: followed(1.0), True
    yield "s starts at 1", lambda: guided(False), True
    yield "s starts at 0", lambda: guided(True), True
    yield "corrected through two outputs", of_two, True
    yield "each correction made in full", lambda: mock.patch.object(Trajectory, "trust", lambda *_: 1.0), True
    yield "model output instead of x0", outputs_throughout, True
    yield "last step not computed", last_step_held, True
    yield "last step always computed", last_step_computed, True
    yield "corrector off", nullcontext, False


def closeness(subject, steps, computed, reference, corrector=True, table=None):
    """PSNR of each image, in dB. table: the calibration used by the corrector; None: without."""
    with magcache_forward(
        subject.pipe.transformer,
        subject.host,
        table,
        Target(computed, predictor="line" if table is None else "linear"),
        subject.timesteps,
        announce=None,
        scheduler=lambda: subject.pipe.scheduler,
        corrector=corrector,
    ):
        return psnr_of(reference, subject.drawn(steps, "cached", BATCH)[0])


def psnr_of(reference, pictures):
    return [quality(true, picture)["psnr"] for true, picture in zip(reference, pictures)]


def text_of(psnr):
    return f"{np.mean(psnr):.1f} ({min(psnr):.1f})"


def spread_in(measure):
    return mock.patch.object(spread, "MEASURE", measure)


def refined_measures(subject, calibration, steps, counts):
    """The measure that --magcache_refine chooses, for each number of computed steps in `counts`. calibration: jobs to
    choose by."""
    jobs, subject.jobs = subject.jobs, calibration
    reference = references(subject, steps)

    def drawn_in(count, measure):
        with spread_in(measure):
            return closeness(subject, steps, count, reference)

    measures = [best_measure(closeness_of(partial(drawn_in, count))) for count in counts]
    subject.jobs = jobs
    return measures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=PROMPTS, default="demo")
    parser.add_argument("--steps", type=int, nargs="+", default=[28, 50])
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--scheduler", choices=SAMPLER_NAMES, default="euler")
    args = parser.parse_args()
    subject, calibration = load_subject(SimpleNamespace(**vars(args), prompts=2, seeds=1, device=None))
    subject.jobs = [(prompt, seed) for seed, prompt in enumerate(PROMPTS[args.model], 200)]
    subject.guide(args.guidance)
    tabulate = needs("tabulate", "tabulate").tabulate
    for steps in args.steps:
        counts = [round(share * steps) for share in SHARES]
        reference = references(subject, steps)
        rows = [
            [
                "plain sampler, same step count",
                *(text_of(psnr_of(reference, subject.drawn(count, "plain", BATCH)[0])) for count in counts),
            ]
        ]
        for name, context, corrector in tqdm(list(trials()), leave=False):
            with context():
                rows.append(
                    [name, *(text_of(closeness(subject, steps, count, reference, corrector)) for count in counts)]
                )
        table = subject.calibrated(calibration, steps)
        cells = [text_of(closeness(subject, steps, count, reference, table=table)) for count in counts]
        rows.append(["corrected by a calibration", *cells])
        cells = []
        for count, measure in zip(counts, refined_measures(subject, calibration, steps, counts)):
            with spread_in(measure):
                cells.append(text_of(closeness(subject, steps, count, reference)) + " in {:g}, {:g}".format(*measure))
        rows.append(["spread that --magcache_refine chooses", *cells])
        headers = ["no calibration", *(f"{count} of {steps}" for count in counts)]
        print(tabulate(rows, tablefmt="github", disable_numparse=True, headers=headers), "\n", flush=True)
    sampler = f"{SAMPLER_NAMES[args.scheduler]}, guidance {args.guidance:g}"
    print(f"{len(subject.jobs)} prompts, {args.model}, {sampler}, {time.strftime('%Y-%m-%d')}.")


if __name__ == "__main__":
    main()
