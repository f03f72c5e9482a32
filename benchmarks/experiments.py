"""What else was tried in the planner and the predictors, and by how much it won or lost.

    python benchmarks/experiments.py         # a few minutes on one core

On the demo model: mean PSNR in dB to the un-cached picture of prompts that were not calibrated on, with exactly so many
computed steps. The first row of each table is what `common/` does. Where a predictor is not one of the package's, its
anchors are found by moving those of the linear plan one at a time until its own expected cost falls no further.
"""

import argparse
import copy
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo_model import DEMO, FLUX, PROMPTS, load_demo, magcache_calibration, patched, render  # noqa: E402

from common import planner  # noqa: E402
from common.errors import needs  # noqa: E402
from common.planner import Forecast, Target, cheapest_path, plan_steps, scheduled, table_grams  # noqa: E402
from common.residuals import Residuals  # noqa: E402
from common.schedule import Rule  # noqa: E402
from common.scripts.quality import quality  # noqa: E402

COMPUTED, SEED = {28: (14, 11, 9, 7), 50: (25, 20, 17, 12)}, 1
JOBS = PROMPTS[::2]


def shrunken_line(anchors, products):
    """Predictor: r_j + a (r_j - r_k), the best a. One weight to fit instead of two."""
    gap = anchors[..., 0, 0] - 2 * anchors[..., 0, 1] + anchors[..., 1, 1]
    toward = (products[..., 0, :] - products[..., 1, :]) - (anchors[..., 0, 0] - anchors[..., 0, 1])[..., None]
    a = toward / gap[..., None]
    return np.stack([1 + a, -a], axis=-2)


def scaled(anchors, products):
    """Predictor: a r_j, the best a: a scale a step."""
    a = products[..., 0, :] / anchors[..., 0, 0][..., None]
    return np.stack([a, np.zeros_like(a)], axis=-2)


def straight_line(levels):
    """Predictor: the line through both anchors over the noise level (first-order Taylor), nothing fitted."""
    j, k, i = levels[:, None, None], levels[None, :, None], levels[None, None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = np.nan_to_num((i - j) / (j - k), posinf=0, neginf=0)
    return lambda anchors, products: np.stack([1 + slope, -slope], axis=-2)


class Grouped(Residuals):
    """Weights of their own for each token or channel: `fitted[step]` is a list of tensors, one an anchor."""

    def __init__(self, fitted):
        super().__init__()
        self.fitted = fitted

    def predict(self, part, schedule):
        kept = self.kept[part.key]
        return sum(weight * one.residual for weight, one in zip(self.fitted[part.call.step], kept)), ""


def residuals_of(pipe, prompts, steps):
    """(prompts, steps, tokens, width) of un-cached runs."""
    runs = []
    for prompt in prompts:
        with magcache_calibration(pipe.transformer, FLUX, lambda: pipe.scheduler.timesteps, "measured") as handle:
            handle.statistics.add = listening(handle.statistics.add, rows := [])
            render(pipe, prompt, steps, 0)
        runs.append(torch.stack(rows))
    return torch.stack(runs).double().numpy()


def listening(add, rows):
    def add_and_keep(call, residual, output):
        rows.append(residual[0].clone())
        add(call, residual, output)

    return add_and_keep


def fit(grams, step, past):
    """Weights (groups, anchors) and squared error of the best prediction in each group. grams: (groups, steps,
    steps)."""
    if len(past) == 1:
        missed = grams[:, step, step] - 2 * grams[:, step, past[0]] + grams[:, past[0], past[0]]
        return np.ones((len(grams), 1)), float(missed.sum())
    anchors, products = grams[:, past][:, :, past], grams[:, past, step]
    ridge = planner.RIDGE * np.einsum("gii->g", grams).mean() / grams.shape[1]
    weights = np.linalg.solve(anchors + ridge * np.eye(len(past)), products[..., None])[..., 0]
    missed = (
        grams[:, step, step] - 2 * (weights * products).sum(-1) + np.einsum("ga,gab,gb->g", weights, anchors, weights)
    )
    return weights, float(np.maximum(missed, 0).sum())


def grouped_plan(grams, start, depth):
    """(anchors, {step: weights (groups, anchors)}) of the least sum of costs that is reached from `start`."""
    cache, steps = {}, range(grams.shape[1])

    def fitted(step, anchors):
        past = tuple(sorted((anchor for anchor in anchors if anchor < step), reverse=True)[:depth])
        if (step, past) not in cache:
            cache[step, past] = fit(grams, step, list(past))
        return cache[step, past]

    def cost(anchors):
        return sum(planner.fourth_powers(fitted(step, anchors)[1]) for step in steps if step not in anchors)

    best = sorted(start)
    while True:
        moves = [
            sorted({*best[:index], new, *best[index + 1 :]})
            for index in range(1, len(best))
            for new in steps[1:]
            if new not in best
        ]
        better = min(moves, key=cost)
        if cost(better) >= cost(best):
            return best, {step: fitted(step, best)[0] for step in steps if step not in best}
        best = better


def gap_costs(gram, weights, change, power):
    """Cost of a gap by what it adds to the latent: |sum over its steps of (change of sigma) * (what the prediction
    misses)|."""
    steps = len(gram)
    until = np.zeros((steps + 1, steps, steps))
    for j in range(steps):
        for k in range(j + 1):
            missed, until[: j + 1, j, k] = np.zeros(steps), 0
            for m in range(j + 1, steps):
                missed[m] += change[m]
                missed[j] -= change[m] * weights[m, j, k, 0]
                missed[k] -= change[m] * weights[m, j, k, 1]
                until[m + 1, j, k] = max(0, missed @ gram @ missed) ** power
    return until


class Trial:
    """One row: the schedule for a number of computed steps, and what else the run needs."""

    def __init__(self, name, schedule, payload="residual", residuals=None):
        self.name, self.schedule, self.payload, self.residuals = name, schedule, payload, residuals


def trials(pipe, table, steps):
    """{title of a table: its trials}"""
    levels = table.levels(steps)
    grams = {payload: table_grams(table, levels, payload) for payload in planner.GRAMS}
    linear = {payload: Forecast.of_grams(grams[payload]) for payload in planner.GRAMS}
    change = np.abs(np.diff(np.append(levels, 0)))
    by_step = change[:, None, None]
    energy = np.diag(grams["residual"][0])[:, None, None] / grams["residual"][0].trace() * steps

    def cost_trial(name, cost):
        return Trial(name, lambda computed: plan_steps(linear["residual"], computed, cost=cost))

    def gap_trial(name, power, payload="residual"):
        gram = grams[payload][0] / grams[payload][0].trace() * steps
        until = gap_costs(gram, linear[payload].weights[0], change, power)
        return Trial(name, lambda computed: scheduled(cheapest_path(until, computed), linear[payload]), payload)

    yield (
        "cost",
        [
            cost_trial("sum of fourth powers", planner.fourth_powers),
            cost_trial("sum", np.sqrt),
            cost_trial("sum of squares", lambda errors: errors),
            cost_trial("sum of 10th powers", lambda errors: errors**5),
            cost_trial("largest first", lambda errors: (errors / errors.max()) ** 20),
            cost_trial("fourth powers, times the step in sigma", lambda errors: errors**2 * by_step),
            cost_trial("fourth powers of errors times the step in sigma", lambda errors: (errors * by_step**2) ** 2),
            cost_trial("squares of relative errors", lambda errors: errors / energy),
            cost_trial("fourth powers of relative errors", lambda errors: (errors / energy) ** 2),
            cost_trial(
                "fourth powers of relative errors, times the step in sigma",
                lambda errors: (errors / energy) ** 2 * by_step,
            ),
            gap_trial("squares of what a gap adds to the latent", 1),
            gap_trial("fourth powers of the same", 2),
        ],
    )

    def predictor_trial(name, weigh):
        planner.PREDICTORS[name] = weigh
        forecast = Forecast.of_grams(grams["residual"], name)
        return Trial(name, lambda computed: plan_steps(forecast, computed))

    def grouped_trial(name, by, shape, depth=2):
        """by: einsum of two (prompts, steps, tokens, width) to (groups, steps, steps); shape: of the weights of all
        groups."""
        groups = np.einsum(by, measured, measured, optimize=True).reshape(-1, steps, steps)
        groups *= steps / np.einsum("gii->", groups)

        def plan(computed):
            start = np.flatnonzero(~plan_steps(linear["residual"], computed).reuse).tolist()
            anchors, weights = grouped_plan(groups, start, depth)
            plan.fitted = {
                step: [torch.tensor(column, dtype=torch.float32).reshape(shape) for column in rows.T]
                for step, rows in weights.items()
            }
            return replace(scheduled(anchors, linear["residual"]), weights=np.zeros((1, steps, depth)))

        return Trial(name, plan, residuals=lambda: Grouped(plan.fitted))

    def reuse_trial(payload):
        forecast = Forecast.of_grams(grams[payload], "reuse")
        return Trial(f"reuse of the {payload}", lambda computed: plan_steps(forecast, computed), payload)

    rows = [
        Trial("linear, of the residual", lambda computed: plan_steps(linear["residual"], computed)),
        reuse_trial("residual"),
        predictor_trial("a scale a step", scaled),
        predictor_trial("straight line (first-order Taylor)", straight_line(levels)),
        predictor_trial("first order with shrinkage", shrunken_line),
        Trial("linear, of the output", lambda computed: plan_steps(linear["output"], computed), "output"),
        reuse_trial("output"),
        gap_trial("linear, of the output, planned by what a gap adds", 1, "output"),
    ]
    if steps == table.steps:
        measured = residuals_of(pipe, (DEMO / "calibration_prompts.txt").read_text().splitlines(), steps)
        rows += [
            grouped_trial("three anchors", "ptnc,psnc->ts", (1, 1, 1), 3),
            grouped_trial("weights for each token", "ptnc,psnc->nts", (1, -1, 1)),
            grouped_trial("weights for each channel", "ptnc,psnc->cts", (1, 1, -1)),
        ]
    yield "predictor", rows

    def target_trial(name, **options):
        return Trial(name, lambda computed: Target(computed, **options).plan(table, levels))

    yield (
        "cap",
        [
            target_trial("none"),
            *(target_trial(f"magcache_K {K}", magcache_K=K) for K in (2, 3, 4)),
            *(target_trial(f"retention_ratio {ratio:g}", retention_ratio=ratio) for ratio in (0.1, 0.2)),
        ],
    )

    def turned(turn):
        def plan(computed):
            planner.TURN, before = turn, planner.TURN
            try:
                return plan_steps(Forecast.of_ratios(table.at(levels)), computed)
            finally:
                planner.TURN = before

        return Trial(f"TURN {turn:g}", plan)

    yield (
        "reuse, planned from ratios alone",
        [turned(turn) for turn in (planner.TURN, 0.0, 0.005, 0.01, 0.05, 0.1, 1.0)],
    )


def measure(pipe, table, trial, steps, computed, reference):
    """Mean PSNR, or "" where the caps of a trial do not allow so few steps."""
    try:
        schedule = trial.schedule(computed)
    except planner.MagCacheError:
        return ""
    with patched(pipe, table, Target(computed, payload=trial.payload), Rule()) as handle:
        handle.plan = lambda levels: schedule
        if trial.residuals:
            handle.new_residuals = trial.residuals
        psnr = [
            quality(picture[None], render(pipe, prompt, steps, SEED)[0][None])["psnr"]
            for prompt, picture in reference.items()
        ]
    assert handle.reports[-1].computed == computed and not handle.reports[-1].unplanned
    return f"{np.mean(psnr):.1f}"


@contextmanager
def changed(transformer, share):
    """Every matrix of the model off by noise of this share of its size: another checkpoint than was calibrated."""
    kept, noise = copy.deepcopy(transformer.state_dict()), torch.Generator().manual_seed(0)
    for parameter in transformer.parameters():
        if parameter.ndim > 1:
            parameter.data += share * parameter.data.std() * torch.randn(parameter.shape, generator=noise)
    try:
        yield
    finally:
        transformer.load_state_dict(kept)


def guard_rows(pipe, table, steps, computed):
    """Computed steps and PSNR with and without the guard, on the calibrated model and on others."""
    for share in (0.0, 0.05, 0.1, 0.2):
        with changed(pipe.transformer, share):
            reference = {prompt: render(pipe, prompt, steps, SEED)[0] for prompt in JOBS}
            row = [f"weights off by {share:.0%}"]
            for factor in (None, 3.0, 2.0, 1.5):
                with patched(pipe, table, Target(computed, magcache_guard=factor), Rule()) as handle:
                    psnr = np.mean(
                        [
                            quality(picture[None], render(pipe, prompt, steps, SEED)[0][None])["psnr"]
                            for prompt, picture in reference.items()
                        ]
                    )
                    row.append(f"{psnr:.1f} ({np.mean([report.computed for report in handle.reports]):.1f})")
        yield row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only the tables whose title has this in it")
    parser.add_argument("--steps", type=int, choices=COMPUTED, help="only of so many steps")
    args = parser.parse_args()
    pipe, table = load_demo()
    for steps, counts in COMPUTED.items():
        if args.steps not in (None, steps):
            continue
        reference = {prompt: render(pipe, prompt, steps, SEED)[0] for prompt in JOBS}
        for title, rows in trials(pipe, table, steps):
            if args.only in title:
                printed = [
                    [trial.name, *(measure(pipe, table, trial, steps, computed, reference) for computed in counts)]
                    for trial in tqdm(rows, desc=f"{title}, {steps} steps")
                ]
                print(
                    needs("tabulate", "tabulate").tabulate(
                        printed,
                        tablefmt="github",
                        disable_numparse=True,
                        headers=[title, *(f"{computed} of {steps}" for computed in counts)],
                    ),
                    "\n",
                    flush=True,
                )
    if args.only in "guard" and args.steps in (None, 28):
        print(
            needs("tabulate", "tabulate").tabulate(
                guard_rows(pipe, table, 28, 9),
                tablefmt="github",
                headers=["guard: PSNR (computed of 28)", "none", "3", "2", "1.5"],
            ),
            "\n",
            flush=True,
        )
    print(f"{len(JOBS)} prompts not calibrated on, demo model, {time.strftime('%Y-%m-%d')}.")


if __name__ == "__main__":
    main()
