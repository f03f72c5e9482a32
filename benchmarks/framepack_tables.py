"""How well one FramePack table serves other step counts and sizes: predicted ratios against measured ones.

    python benchmarks/framepack_tables.py

tests/unit/framepack_studio_ratios.json holds calibrations of the original FramePack, by FramePack-Studio, at two sizes
and three step counts. Each table is converted to the other step counts by index, as the released scripts do, and by
noise level, the default here. Error: mean |log predicted - log measured| per step; computed: number of steps that
0.10 / 3 / 0.2 computes.
"""

import json
import sys
from itertools import permutations
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from common.errors import needs  # noqa: E402
from common.ratios import flow_sigmas  # noqa: E402
from common.schedule import Settings, magcache_schedule, rule_of  # noqa: E402
from common.tables import RatioTable, load  # noqa: E402

SHIFT = 7  # of FramePack's sampler at every size of its page
PUBLISHED = load("framepack")


def studio_table(size, ratios):
    return RatioTable(
        name=size,
        mag_ratios={"cond": ratios},
        sigmas=tuple(flow_sigmas(len(ratios), SHIFT)),
        origin="published",
        sampler={"shift": SHIFT},
    )


def computed_steps(ratios):
    return magcache_schedule(ratios, Settings(**PUBLISHED.settings), rule_of(PUBLISHED)).computed


def error_and_computed(prediction, measured):
    """(error, number of computed steps) of predicted ratios (steps,)."""
    return f"{np.abs(np.log(prediction[1:] / measured[1:])).mean():.4f}", computed_steps(prediction)


def main():
    tabulate = needs("tabulate", "tabulate").tabulate
    studio = json.loads((REPOSITORY / "tests" / "unit" / "framepack_studio_ratios.json").read_text(encoding="utf-8"))[
        "mag_ratios"
    ]
    tables = {
        (size, steps): studio_table(size, ratios)
        for size, by_steps in studio.items()
        for steps, ratios in by_steps.items()
    }
    ratios = {key: table.at(table.sigmas)[0] for key, table in tables.items()}

    rows = []
    for (size, steps), (other_size, other_steps) in permutations(tables, 2):
        if size == other_size:
            measured = ratios[size, other_steps]
            levels = tables[size, other_steps].sigmas
            by_index, along_sigma = (
                error_and_computed(tables[size, steps].at(levels, way)[0], measured) for way in ("nearest", "sigma")
            )
            rows.append([size, steps, other_steps, computed_steps(measured), *by_index, *along_sigma])
    print(
        tabulate(
            rows,
            tablefmt="github",
            disable_numparse=True,
            headers=[
                "px",
                "from steps",
                "to steps",
                "computed, measured",
                "by index: error",
                "computed",
                "along sigma: error",
                "computed",
            ],
        )
    )

    small, large = studio
    rows = [
        [
            f"{small} px, {steps} steps",
            f"{large} px",
            computed_steps(ratios[large, steps]),
            *error_and_computed(ratios[small, steps], ratios[large, steps]),
        ]
        for steps in studio[small]
    ]
    published = PUBLISHED.at(PUBLISHED.sigmas)[0]
    rows += [
        [
            "published, 25 steps",
            f"{size} px",
            computed_steps(ratios[size, "25"]),
            *error_and_computed(published, ratios[size, "25"]),
        ]
        for size in studio
    ]
    print(
        "\n"
        + tabulate(
            rows,
            tablefmt="github",
            disable_numparse=True,
            headers=["table", "used at", "computed, measured", "error", "computed"],
        )
    )


if __name__ == "__main__":
    main()
