"""Draw docs/beyond-the-paper.png: what a calibration expects of the paper's rule and of planned runs of as many steps.

python benchmarks/plan_figure.py                          # the demo model
python benchmarks/plan_figure.py ~/.magcache/FILE.json 12 my.png       # yours, at 12 computed steps
"""

import sys
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(REPOSITORY))

from common.errors import needs  # noqa: E402
from common.planner import Target, nearest_by_the_rule  # noqa: E402
from common.schedule import rule_of  # noqa: E402
from common.scripts.plots import save_figure  # noqa: E402
from common.tables import load  # noqa: E402


def main(table="demo", computed=11, path=REPOSITORY / "docs" / "beyond-the-paper.png"):
    table, computed = load(table), int(computed)
    levels = np.asarray(table.sigmas)
    rows = {
        "the paper's rule, reuse": nearest_by_the_rule(table, levels, rule_of(table), computed),
        "planned, reuse": Target(computed, predictor="reuse").plan(table, levels),
        "planned, linear": Target(computed, predictor="linear").plan(table, levels),
    }
    figure = needs("matplotlib.figure", "matplotlib").Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(len(rows), 1, sharex=True, sharey=True)
    for axes, (name, schedule) in zip(panels, rows.items()):
        steps = np.arange(schedule.steps)
        axes.bar(steps, np.where(schedule.reuse, schedule.expected_error, 0), color="tab:orange")
        axes.plot(steps[~schedule.reuse], np.zeros(schedule.computed), "s", color="tab:blue", clip_on=False)
        error = schedule.expected_error[schedule.reuse]
        axes.set_title(
            f"{name}: {schedule.computed} of {schedule.steps} computed, expected relative error {error.mean():.3f} in "
            f"the mean, {error.max():.3f} at most",
            loc="left",
            fontsize=10,
        )
        axes.grid(alpha=0.3, axis="y")
    panels[1].set_ylabel("expected relative error of a skipped step")
    panels[-1].set_xlabel("step (squares compute)")
    save_figure(path, figure)


if __name__ == "__main__":
    main(*sys.argv[1:])
