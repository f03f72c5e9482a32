"""On what the settings of a speed-up without a calibration were chosen: other prompts and seeds than
benchmarks/quality.py reports.

    python benchmarks/experiments.py          # the demo image model, Euler; about 4 minutes of one core
    python benchmarks/experiments.py --guidance 5 --scheduler unipc --steps 28
    python benchmarks/experiments.py --model demo-video --guidance 5 --scheduler unipc --steps 30

Each row changes one thing: in what measure computed steps are spread evenly (the share of the step's index, the rest
being the noise level, to a power), how far the line through the two newest outputs is followed, how many outputs
correct and how far. PSNR in dB to the un-cached picture or clip, mean (worst).
"""

import argparse
import sys
import time
from contextlib import nullcontext
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from quality import SHARES, load_subject, references  # noqa: E402
from subject import SAMPLER_NAMES  # noqa: E402

from common import spread  # noqa: E402
from common.errors import needs  # noqa: E402
from common.patch import magcache_forward  # noqa: E402
from common.planner import Target  # noqa: E402
from common.scripts.quality import quality  # noqa: E402
from common.trajectory import Trajectory  # noqa: E402

PICTURES = zip(
    ("cat", "fox", "lion", "owl", "snail", "apple", "rocket", "star", "alien", "cactus", "house", "doughnut"),
    cycle(("yellow", "purple", "orange", "white", "black", "sky blue", "pink", "green")),
)
CLIPS = zip(
    (
        "soccer ball",
        "rocket",
        "yellow fish",
        "frog",
        "panda",
        "star",
        "heart",
        "pumpkin",
        "red balloon",
        "fox",
        "red car",
        "turtle",
    ),
    cycle(
        (
            "falls",
            "grows",
            "swings",
            "moves to the right",
            "shrinks",
            "rises",
            "moves to the left",
            "bounces",
        )
    ),
    cycle(("white", "dark blue", "sky blue", "green")),
)
PROMPTS = {
    "demo": [f"a {name} on a {background} background" for name, background in PICTURES],
    "demo-video": [f"a {name} {motion} on a {background} background" for name, motion, background in CLIPS],
}


def followed(share):
    """`Trajectory.predicted` with a fixed share of the line."""

    def predicted(self, step, held):
        line = self.line(step)
        return held if line is None else (held.float() + share * line).to(held.dtype)

    return mock.patch.object(Trajectory, "predicted", predicted)


def of_two():
    """`Trajectory.corrected` from the computed steps on both sides alone."""
    plain = Trajectory.corrected

    def corrected(self, gap, step, output):
        anchors, self.anchors = self.anchors, self.anchors[:1]
        try:
            return plain(self, gap, step, output)
        finally:
            self.anchors = anchors

    return mock.patch.object(Trajectory, "corrected", corrected)


def trials():
    """(name, makes the context in which it runs, whether it is corrected)"""
    yield "as it is", nullcontext, True
    for share, power in ((0.75, 1), (0.5, 0.8), (0.5, 0.7), (0.75, 0.7), (1, 1)):
        name = f"spread in {share:g} of the index, power {power:g}"
        yield name, lambda share=share, power=power: mock.patch.object(spread, "MEASURE", (share, power)), True
    yield "newest output held", lambda: followed(0.0), True
    yield "line followed to its end", lambda: followed(1.0), True
    yield "corrected through two outputs", of_two, True
    yield "each correction made in full", lambda: mock.patch.object(Trajectory, "trust", lambda *_: 1.0), True
    yield "corrector off", nullcontext, False


def measure_closeness(subject, steps, computed, reference, corrector=True):
    with magcache_forward(
        subject.pipe.transformer,
        subject.host,
        None,
        Target(computed),
        subject.timesteps,
        announce=None,
        scheduler=lambda: subject.pipe.scheduler,
        corrector=corrector,
    ):
        return text_of(reference, subject.render(subject.jobs, steps))


def text_of(reference, pictures):
    psnr = [quality(true, picture)["psnr"] for true, picture in zip(reference, pictures)]
    return f"{np.mean(psnr):.1f} ({min(psnr):.1f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=PROMPTS, default="demo")
    parser.add_argument("--steps", type=int, nargs="+", default=[28, 50])
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--scheduler", choices=SAMPLER_NAMES, default="euler")
    args = parser.parse_args()
    subject, _ = load_subject(SimpleNamespace(**vars(args), prompts=2, seeds=1, device=None))
    subject.jobs = [(prompt, seed) for seed, prompt in enumerate(PROMPTS[args.model], 200)]
    subject.guide(args.guidance)
    tabulate = needs("tabulate", "tabulate").tabulate
    for steps in args.steps:
        counts = [round(share * steps) for share in SHARES]
        reference = references(subject, steps)
        rows = [
            [
                "plain sampler, as many steps",
                *(text_of(reference, subject.render(subject.jobs, count)) for count in counts),
            ]
        ]
        for name, context, corrector in tqdm(list(trials()), leave=False):
            with context():
                rows.append(
                    [name, *(measure_closeness(subject, steps, count, reference, corrector) for count in counts)]
                )
        headers = ["no calibration", *(f"{count} of {steps}" for count in counts)]
        print(tabulate(rows, tablefmt="github", disable_numparse=True, headers=headers), "\n", flush=True)
    sampler = f"{SAMPLER_NAMES[args.scheduler]}, guidance {args.guidance:g}"
    print(f"{len(subject.jobs)} prompts, {args.model}, {sampler}, {time.strftime('%Y-%m-%d')}.")


if __name__ == "__main__":
    main()
