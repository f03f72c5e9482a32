"""diffusers' schedulers of flow models, over a run of which some steps are skipped."""

import pytest

diffusers = pytest.importorskip("diffusers")
STEPS = 14
COMPUTED = (0, 1, 4, 8, 9, 13)
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS = {
    "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(solver_order=2, **FLOW),
    "unipc, third order": lambda: diffusers.UniPCMultistepScheduler(solver_order=3, **FLOW),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(solver_order=2, **FLOW),
}


def scheduler_of(name):
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(STEPS)
    return scheduler
