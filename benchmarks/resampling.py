"""How well one calibration serves other step counts and shifts: predicted ratios against measured ones.

    python benchmarks/resampling.py          # about a minute on one core

The demo model's table (28 steps, shift 3) is carried over to each run by index, as the released scripts do, and along
the noise level, as the default here; then that run is calibrated itself. Error: mean |log predicted - log measured| a
step.
"""

import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo_model import DEMO, calibrated, load_demo  # noqa: E402

from common.errors import needs  # noqa: E402

RUNS = ((8, 3.0), (14, 3.0), (20, 3.0), (50, 3.0), (14, 1.0), (28, 1.0), (50, 6.0))


def main():
    pipe, table = load_demo()
    prompts = (DEMO / "calibration_prompts.txt").read_text(encoding="utf-8").splitlines()
    rows = []
    for steps, shift in tqdm(RUNS, desc="calibrating"):
        pipe.scheduler.set_shift(shift)
        measured = calibrated(pipe, prompts, steps)
        true = np.asarray(measured.mag_ratios["cond"])
        row = [steps, f"{shift:g}", f"{true.prod():.3f}"]
        for interpolation in ("nearest", "sigma"):
            predicted = table.at(measured.sigmas, interpolation)[0]
            row += [f"{np.abs(np.log(predicted) - np.log(true))[1:].mean():.4f}", f"{predicted.prod():.3f}"]
        rows.append(row)
    print(
        needs("tabulate", "tabulate").tabulate(
            rows,
            tablefmt="github",
            disable_numparse=True,
            headers=[
                "steps",
                "shift",
                "measured product",
                "nearest index: error",
                "product",
                "along sigma: error",
                "product",
            ],
        )
    )
    print(f"\nDemo model, {time.strftime('%Y-%m-%d')}.")


if __name__ == "__main__":
    main()
