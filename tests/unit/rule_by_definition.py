"""The paper's rule, written down from its definition, and the plan of a preset."""

import math

import numpy as np

from common.schedule import Settings, magcache_schedule, rule_of
from common.tables import load


def by_definition(ratios, settings, rule, retained):
    """(reused steps, error of each step) from the definition of the error: a sum over the steps since the last
    restart."""
    reused, errors, since = [], np.zeros(len(retained)), []
    never = {
        step
        for step in range(len(retained))
        for kept, of_steps in rule.never_reuse
        if round(step * (of_steps - 1) / (len(retained) - 1)) == kept
    }
    for step in range(len(retained)):
        if retained[step]:
            since = [] if rule.retained_resets else since
            continue
        since.append(step)
        errors[step] = max(
            sum(abs(1 - math.prod(row[since[:count]])) for count in range(1, len(since) + 1)) for row in ratios
        )
        within = errors[step] < settings.magcache_thresh if rule.strict else errors[step] <= settings.magcache_thresh
        steady = rule.max_deviation is None or all(abs(1 - row[step]) <= rule.max_deviation for row in ratios)
        if within and steady and len(since) <= settings.magcache_K and step not in never:
            reused.append(step)
        else:
            since = []
    return reused, errors


def plan_by_definition(name, steps=None, switch_step=None, **settings):
    preset = load(name)
    ratios = preset.at(preset.levels(steps or preset.steps), "nearest")
    return magcache_schedule(ratios, Settings(**{**preset.settings, **settings}), rule_of(preset), switch_step)
