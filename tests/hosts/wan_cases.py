"""What test_wan21.py and test_wan22.py run inside `wan_cpu.py --serve`, each case in a process of its own,
on models with random weights:

    wan_cases.py CASE CHECKPOINTS ARGUMENT ...     # leaves what the case returns in result.json
"""

import copy
import inspect
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import wan
from PIL import Image
from wan.configs import WAN_CONFIGS

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import tables  # noqa: E402
from common.patch import magcache_forward  # noqa: E402
from common.ratios import flow_sigmas  # noqa: E402
from common.schedule import Settings  # noqa: E402
from common.scripts.checkout import timesteps_noted  # noqa: E402
from common.scripts.flags import add_opt_in_flags, flags_and_rest  # noqa: E402
from common.scripts.session import Session  # noqa: E402
from common.scripts.wan import experts_of, schedulers_of, wan_host, wan_with_session  # noqa: E402
from common.tables import RatioTable, load  # noqa: E402

# kind: (class, task of its config, checkpoint)
KINDS = {
    "t2v": ("WanT2V", "t2v-A14B", "t2v-experts"),
    "i2v": ("WanI2V", "i2v-A14B", "i2v-experts"),
    "ti2v-t2v": ("WanTI2V", "ti2v-5B", "ti2v"),
    "ti2v-i2v": ("WanTI2V", "ti2v-5B", "ti2v"),
    "s2v": ("WanS2V", "s2v-14B", "s2v"),
    "animate": ("WanAnimate", "animate-14B", "animate"),
    "2.1 t2v": ("WanT2V", "t2v-1.3B", "t2v"),
    "2.1 i2v": ("WanI2V", "i2v-14B", "i2v"),
    "2.1 flf2v": ("WanFLF2V", "flf2v-14B", "flf2v"),
    "2.1 vace": ("WanVace", "vace-1.3B", "vace"),
}
RATIOS = RatioTable(
    name="flat",
    origin="measured",
    sigmas=tuple(flow_sigmas(12, 5.0)),
    sampler={"shift": 5.0},
    mag_ratios={"cond": [1.0] + [0.98] * 11, "uncond": [1.0] + [0.97] * 11},
)
REUSES_MUCH, OFF = Settings(1.0, 2, 0.2), Settings(0.0, 2, 0.2)


def pipeline(kind, session=None):
    name, task, checkpoint = KINDS[kind]
    plain = getattr(wan, name)
    # The package's two experts leave out guidance unless told otherwise; those of the checkout do not.
    guided = {"lightning": False} if "lightning" in inspect.signature(plain.__init__).parameters else {}
    return (wan_with_session(plain, lambda *args, **kwargs: session) if session else plain)(
        config=WAN_CONFIGS[task], checkpoint_dir=str(CHECKPOINTS / checkpoint), device_id=0, rank=0, **guided
    )


def draw_video(pipe, kind, steps=9, shift=5.0, solver="unipc", seed=1, prompt="a cat"):
    """A video of 5 frames (FLF2V: its 81) of 96x64 pixels; of S2V and Animate one of two segments."""
    picture = Image.radial_gradient("L").convert("RGB").resize((96, 64))
    sampling = {"shift": shift, "sample_solver": solver, "sampling_steps": steps, "seed": seed}
    if kind == "s2v":
        picture.save("cat.png")
        tts = dict.fromkeys(("tts_prompt_audio", "tts_prompt_text", "tts_text"))
        sound = {"ref_image_path": "cat.png", "audio_path": "talk.wav", "enable_tts": False, "num_repeat": 2, **tts}
        return pipe.generate(prompt, **sound, **sampling, infer_frames=8, max_area=96 * 64, guide_scale=4.0)
    if kind == "animate":
        return pipe.generate(src_root_path=".", clip_len=9, refert_num=1, input_prompt=prompt, **sampling)
    if kind == "2.1 vace":
        frames, masks, references = pipe.prepare_source([None], [None], [["cat.png"]], 5, (96, 64), 0)
        source = {"input_frames": frames, "input_masks": masks, "input_ref_images": references, "size": (96, 64)}
    place = {
        "t2v": {"size": (96, 64)},
        "i2v": {"img": picture, "max_area": 96 * 64},
        "flf2v": {"first_frame": picture, "last_frame": picture, "max_area": 96 * 64},
        "vace": source if kind == "2.1 vace" else {},
        "ti2v-t2v": {"size": (96, 64), "max_area": 96 * 64},
        "ti2v-i2v": {"img": picture, "size": (96, 64), "max_area": 96 * 64},
    }[kind.removeprefix("2.1 ")]
    with torch.no_grad():
        return pipe.generate(
            prompt,
            **place,
            frame_num=81 if kind == "2.1 flf2v" else 5,
            shift=shift,
            sample_solver=solver,
            sampling_steps=steps,
            guide_scale=4.0,
            seed=seed,
        )


@contextmanager
def patched_wan(pipe, mag_ratios=RATIOS, settings=REUSES_MUCH):
    models = experts_of(pipe)
    with (
        timesteps_noted(schedulers_of(type(pipe))) as timesteps,
        magcache_forward(
            models,
            wan_host(pipe, models[0]),
            mag_ratios,
            settings,
            timesteps,
            announce=None,
            boundary=pipe.boundary if len(models) == 2 else None,
        ) as handle,
    ):
        yield handle


def session_of_task(*flags, task="t2v-A14B"):
    args, _ = flags_and_rest(add_opt_in_flags, flags)
    script_settings = {"magcache_thresh": 1.0, "magcache_K": 2, "retention_ratio": 0.2}
    return Session(args, script_settings, task, "96x64", 5, 9, None, {})


class Repetition:
    """Does every call of a pipeline's models again, by copies that no patch has seen and that run all their blocks: a
    computed call as it is; a reused one with its head given the tokens that entered the first block plus the residual
    of the last computed call of that expert and branch. All outputs must be the same to the last bits. Make it before
    the models are patched; `handle` is the patch."""

    def __init__(self, pipe):
        self.handle, self.residuals, self.calls = None, {}, []
        for number, model in enumerate(experts_of(pipe)):
            model.register_forward_hook(self.repeat(number, copy.deepcopy(model)), with_kwargs=True)

    def repeat(self, number, fresh):
        def hook(model, args, kwargs, output):
            step, branch, kind, *_ = self.handle.reports[-1].calls[-1]
            self.calls.append((step, branch, kind, number))
            before = []

            def at_head(module, inputs):
                entered = before[0][:, : inputs[0].shape[1]]  # S2V cuts off the tokens that follow
                if kind == "reused":
                    return entered + self.residuals[number, branch], *inputs[1:]
                self.residuals[number, branch] = inputs[0] - entered

            hooks = [
                fresh.blocks[0].register_forward_pre_hook(lambda module, inputs: before.append(inputs[0])),
                fresh.head.register_forward_pre_hook(at_head),
            ]
            expected = fresh(*args, **kwargs)
            for one in hooks:
                one.remove()
            # The copy may differ in the last bits, since its memory lies elsewhere.
            assert len(output) == len(expected) == 1 and torch.allclose(output[0], expected[0], rtol=0, atol=1e-6), (
                step,
                branch,
                kind,
                number,
                float((output[0] - expected[0]).abs().max()),
            )

        return hook

    def __call__(self, handle, *args, **options):
        self.handle, self.residuals, self.calls = handle, {}, []
        return draw_video(*args, **options)


def strip(calls, branch=0):
    """One letter a step, as in a plan, of what really happened."""
    return "".join("#" if kind == "computed" else "." for _, this, kind, *_ in calls if this == branch)


def uncached_is_the_same_to_the_bit(kind):
    pipe = pipeline(kind)
    plain, before = draw_video(pipe, kind), [set(vars(model)) for model in experts_of(pipe)]
    with patched_wan(pipe, settings=OFF) as handle:
        off = draw_video(pipe, kind)
    with patched_wan(pipe):
        cached_video = draw_video(pipe, kind)
    assert [set(vars(model)) for model in experts_of(pipe)] == before, "the patch left something behind"
    return {
        "equal": torch.equal(plain, off),
        "equal_after": torch.equal(plain, draw_video(pipe, kind)),
        "cached_differs": not torch.equal(plain, cached_video),
        "reused": handle.reports[-1].reused,
    }


def reused_calls_are_the_hosts_forward_with_the_residual(kind, solver):
    pipe = pipeline(kind)
    repetition, results = Repetition(pipe), []
    for steps, shift in ((10, 5.0), (8, 8.0)):
        with patched_wan(pipe) as handle:
            repetition(handle, pipe, kind, steps=steps, shift=shift, solver=solver)
        report = handle.reports[-1]
        results.append(
            {
                "planned": "".join(run.schedule.strip for run in handle.reports),
                "cond": strip(repetition.calls),
                "uncond": strip(repetition.calls, 1),
                "unplanned": report.unplanned,
                "runs": len(handle.reports),
                "complete": report.complete,
            }
        )
    return results


def published_schedule(preset, solver):
    """What ran of each branch, # computed and . reused, at the noise levels of the real sampler and the published
    settings."""
    table = load(preset)
    kind = {"wan2.2-t2v-a14b": "t2v", "wan2.2-i2v-a14b": "i2v"}.get(preset, "ti2v-t2v")
    pipe = pipeline(kind)
    with patched_wan(pipe, table, Settings(**table.settings)) as handle:
        draw_video(pipe, kind, steps=table.steps, shift=table.sampler["shift"], solver=solver)
    (report,) = handle.reports
    by_branch = [
        "".join(".#"[what != "reused"] for _, this, what, *_ in report.calls if this == branch) for branch in (0, 1)
    ]
    return {"cond": by_branch[0], "uncond": by_branch[1], "calls": len(report.calls), "fits": table.fits(report.levels)}


def any_boundary(kind):
    """The switch at no step, exactly on noise levels, and at the end; nothing passes from one expert to the other."""
    pipe = pipeline(kind)
    with timesteps_noted(schedulers_of(type(pipe))) as timesteps:
        draw_video(pipe, kind, steps=8)
        levels = [level / 1000 for level in timesteps().tolist()]
    repetition, results = Repetition(pipe), []
    for boundary in (0.0, levels[0], levels[1], levels[4], levels[7], 1.1):
        pipe.boundary = boundary
        with patched_wan(pipe) as handle:
            repetition(handle, pipe, kind, steps=8)
        first = [number for _, branch, _, number in repetition.calls if branch == 0]
        results.append(
            {
                "boundary": boundary,
                "high_noise_steps": sum(level >= boundary for level in levels),
                "experts": first,
                "strip": strip(repetition.calls),
                "planned": handle.reports[-1].schedule.strip,
                "unplanned": handle.reports[-1].unplanned,
            }
        )
    return results


def runs_after_another(kind):
    """Through a Session: a second generation, other steps and shift, a run that was broken off; each as in a fresh
    process."""
    tables.write("flat.json", RATIOS)
    flags = ("--mag_ratios", "flat.json")
    others = {
        "again": {},
        "other steps and shift": {"steps": 7, "shift": 8.0},
        "other solver, prompt": {"solver": "dpm++", "prompt": "a dog"},
    }
    alone = {
        name: draw_video(pipeline(kind, session_of_task(*flags)), kind, **options) for name, options in others.items()
    }
    one = session_of_task(*flags)
    pipe = pipeline(kind, one)
    draw_video(pipe, kind)
    results = {name: torch.equal(draw_video(pipe, kind, **options), alone[name]) for name, options in others.items()}
    results["reused"] = one.report.reused

    def stop(module, args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    for model in experts_of(pipe):
        calls, hook = [], model.head.register_forward_pre_hook(stop)
        try:
            draw_video(pipe, kind)
            results["broken off"] = False
        except KeyboardInterrupt:
            results["broken off"] = "forward" not in vars(model) and "blocks" not in vars(model)
        hook.remove()
        results["after a break"] = results.get("after a break", True) and torch.equal(
            draw_video(pipe, kind), alone["again"]
        )
    return results


def without_guidance():
    """The package's own fast mode calls the model once a step."""
    pipe = pipeline("t2v")
    pipe.lightning = True
    repetition = Repetition(pipe)
    with patched_wan(pipe) as handle:
        repetition(handle, pipe, "t2v")
    (report,) = handle.reports
    return {
        "branches": sorted({branch for _, branch, *_ in report.calls}),
        "calls": len(report.calls),
        "strip": strip(report.calls),
        "planned": report.schedule.strip,
        "complete": report.complete,
    }


def calibration_serves_a_planned_run(kind):
    """Calibrates, then asks for a speed-up: the table is found by the checkpoint's fingerprint."""
    plain = draw_video(pipeline(kind), kind, steps=16)
    measuring = session_of_task("--magcache_calibration")
    same = torch.equal(draw_video(pipeline(kind, measuring), kind, steps=16), plain)
    (path,) = Path(os.environ["MAGCACHE_HOME"]).glob("*.json")
    table = load(str(path))
    planned = session_of_task("--magcache_steps", "8", "--magcache_predictor", "linear")
    pipe = pipeline(kind, planned)
    video, used = draw_video(pipe, kind, steps=16), planned.table
    boundary = table.sampler.get("boundary")
    switch = sum(sigma >= boundary for sigma in table.sigmas) if boundary else 0
    ratios = [row[switch] for row in table.mag_ratios.values()]
    other = session_of_task("--magcache_steps", "5", "--magcache_predictor", "linear")
    draw_video(pipeline(kind, other), kind, steps=10, shift=3.0)
    return {
        "uncached": same,
        "found": used.name == table.name,
        "boundary": boundary,
        "switch": switch,
        "ratios_there": ratios,
        "anywhere_else_1": sum(value == 1 for row in table.mag_ratios.values() for value in row)
        - 2 * (1 + bool(switch)),
        "strip": planned.report.schedule.strip,
        "computed": planned.report.computed,
        "calls": len(planned.report.calls),
        "unplanned": planned.report.unplanned,
        "differs": not torch.equal(video, plain),
        "other_strip": other.report.schedule.strip,
        "other_unplanned": other.report.unplanned,
    }


if __name__ == "__main__":
    CHECKPOINTS = Path(sys.argv[2])
    result = globals()[sys.argv[1]](*sys.argv[3:])
    Path("result.json").write_text(json.dumps(result))
