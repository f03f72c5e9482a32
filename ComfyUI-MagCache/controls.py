"""Run control nets only where a step computes: on a reused step nothing uses what they make."""

from __future__ import annotations


class Deferred:
    """Stands in for a control net while a run is cached: it returns `Hints`, which run it only when they are read."""

    def __init__(self, control):
        self.control = control

    def get_control(self, *args):
        return Hints(self.control, args)

    def __getattr__(self, name):
        return getattr(self.control, name)


class Hints(dict):
    """What a control net and those before it make for one call, {"input": [...], ...}; made when it is first read."""

    def __init__(self, control, args):
        super().__init__()
        self.control, self.args, self.present = control, args, None

    def make(self):
        """The dictionary itself; None where no control net is in its range."""
        if self.present is None:
            made, self.args = self.control.get_control(*self.args), None
            self.present = made is not None
            self.update(made or {})
        return self if self.present else None

    def __getitem__(self, key):
        self.make()
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.make()
        return super().get(key, default)

    def __contains__(self, key):
        self.make()
        return super().__contains__(key)

    def __iter__(self):
        self.make()
        return super().__iter__()

    def __len__(self):
        self.make()
        return super().__len__()

    def keys(self):
        self.make()
        return super().keys()

    def items(self):
        self.make()
        return super().items()


def control_state(control, sigma: float) -> tuple:
    """Which of a control net and those before it act at this noise level, and how strongly. Residuals made in different
    states are not interchangeable."""
    acting = []
    while control is not None:
        first, last = control.timestep_range or (float("inf"), 0.0)
        if last <= sigma <= first:
            acting.append((id(control), control.strength))
        control = control.previous_controlnet
    return tuple(acting)


def deferred(conds: list, controls: dict) -> list:
    """The conditionings of each branch with their control nets deferred. controls: {id: Deferred} of this run; the same
    control net keeps the same stand-in, because ComfyUI batches conditionings that share one."""
    return [branch and [with_deferred(cond, controls) for cond in branch] for branch in conds]


def with_deferred(cond, controls):
    control = cond.get("control")
    if control is None or isinstance(control, Deferred):
        return cond
    return {**cond, "control": controls.setdefault(id(control), Deferred(control))}
