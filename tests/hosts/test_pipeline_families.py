"""What a user may do with an enabled pipeline, on eleven families: the table of docs/pipelines.md is made of this file
and test_pipelines.py."""

from __future__ import annotations

import copy
import inspect
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import accelerate
import diffusers
import peft
import pytest
import torch
from ranks import two_ranks
from tiny_pipelines import (
    CONTROL_NETS,
    FAMILIES,
    Stopped,
    context_parallel,
    denoiser,
    fully_sharded,
    of_the_parts_of,
    picture_for,
    run_pipeline,
    with_control_net,
)

from common.errors import MagCacheError
from common.hosts import HOSTS, class_name
from common.pipeline import disable, enable

STEPS, CPU = 6, torch.device("cpu")
ALL = pytest.mark.parametrize("family", FAMILIES)


pytestmark = pytest.mark.usefixtures("home")


def weights_are_close(one, other):
    """Weights that went to another type, device or file and back."""
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def doubled(value):
    if torch.is_tensor(value):
        return torch.cat([value, value])
    return value * 2 if isinstance(value, list) else value


def other_runs(pipe, arguments):
    """Runs that differ from `arguments(1)` in one thing each: {name: (arguments, what is done to the pipeline)}."""
    known, call = inspect.signature(type(pipe).__call__).parameters, arguments(1)
    runs = {
        "prompt": arguments(2),
        "steps": {**call, "num_inference_steps": STEPS + 3},
        "batch": {name: doubled(value) for name, value in call.items()},
        "size": {**call, "height": 2 * call["height"]},
    }
    strength = next((name for name in ("true_cfg_scale", "guidance_scale") if name in call), None)
    if strength:
        runs["no guidance"], runs["more guidance"] = ({**call, strength: value} for value in (1.0, 6.0))
    elif "guidance_scale" in known:
        runs["more guidance"] = {**call, "guidance_scale": 6.0}
    return runs


@ALL
def test_another_run_in_between_changes_nothing(family):
    """Run A then B is B alone, and A again is A, over prompt, steps, batch, size, guidance and scheduler."""
    pipe, arguments = FAMILIES[family]()
    others, alone = other_runs(pipe, arguments), {}
    for name, call in others.items():
        with enable(pipe, speedup=2, announce=None):
            alone[name] = run_pipeline(pipe, {"num_inference_steps": STEPS, **call})
    with enable(pipe, speedup=2, announce=None) as cache:
        first = run_pipeline(pipe, arguments(1), STEPS)
        for name, call in others.items():
            assert torch.equal(run_pipeline(pipe, {"num_inference_steps": STEPS, **call}), alone[name]), name
            assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), first), name
        own = pipe.scheduler
        pipe.scheduler = type(own).from_config(own.config)  # another object, in the middle of the user's session
        assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), first)
    assert all(report.complete and report.reused and not report.unplanned for report in cache.reports)


class CallingBar:
    """A progress bar that calls a function after each step: for a pipeline without callbacks."""

    def __init__(self):
        self.update = None

    def __call__(self, **options):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@ALL
def test_stopped_at_each_step(family):
    """By an exception and by `pipe._interrupt`: nothing is kept, and the next run is as it would have been."""
    pipe, arguments = FAMILIES[family]()
    has_callback = "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters
    pipe.progress_bar = bar = CallingBar()
    now = {"way": None, "at": None, "step": 0}

    def stop(*_):
        now["step"] += 1
        if now["step"] == now["at"] and now["way"] == "exception":
            raise Stopped
        if now["step"] == now["at"]:
            pipe._interrupt = True
        return {}

    bar.update = (lambda: None) if has_callback else stop
    more = {"callback_on_step_end": stop} if has_callback else {}
    with enable(pipe, speedup=2, announce=None) as cache:
        alone = run_pipeline(pipe, arguments(1), STEPS)
        for way in ("exception", "interrupt")[: 1 + hasattr(pipe, "interrupt")]:
            for at in range(1, STEPS + 1):
                now.update(way=way, at=at, step=0)
                try:
                    run_pipeline(pipe, arguments(2), STEPS, **more)
                    assert way == "interrupt"
                except Stopped:
                    assert way == "exception"
                assert cache.reports[-1].complete == (at == STEPS), (way, at)
                assert all(handle.run is None for handle in cache.handles), (way, at)
            now.update(at=None)
            assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), alone)


def model_offload(pipe):
    pipe.enable_model_cpu_offload(device=CPU)


def sequential_offload(pipe):
    """What `enable_sequential_cpu_offload` does, but for buffers, with which accelerate fails on a CPU."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            accelerate.cpu_offload(part, CPU, offload_buffers=False)


@ALL
@pytest.mark.parametrize("offload", [model_offload, sequential_offload], ids=["model", "sequential"])
def test_offload_before_or_after(family, offload):
    pipe, arguments = FAMILIES[family]()
    with enable(pipe, speedup=2, announce=None):
        expected = run_pipeline(pipe, arguments(1), STEPS)
    cache = enable(pipe, speedup=2, announce=None)
    offload(pipe)
    after = [run_pipeline(pipe, arguments(1), STEPS) for _ in range(2)]
    cache.disable()
    with enable(pipe, speedup=2, announce=None) as second:
        before = [run_pipeline(pipe, arguments(1), STEPS) for _ in range(2)]
    assert all(torch.equal(one, expected) for one in (*after, *before))
    assert [bool(report.reused) for report in (*cache.reports, *second.reports)] == [True] * 4


@ALL
def test_a_lora_put_on_and_taken_off_while_enabled(family):
    pipe, arguments = FAMILIES[family]()
    with enable(pipe, speedup=2, announce=None):
        before, model = run_pipeline(pipe, arguments(1), STEPS), denoiser(pipe)
        torch.manual_seed(0)
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False), "mine")
        lora = run_pipeline(pipe, arguments(1), STEPS)
        model.disable_adapters()
        without = run_pipeline(pipe, arguments(1), STEPS)
        model.enable_adapters()
        model.set_adapters(["mine"], [0.5])
        half = run_pipeline(pipe, arguments(1), STEPS)
        assert torch.equal(before, without) and not torch.equal(before, lora) and not torch.equal(lora, half)
    with enable(pipe, speedup=2, announce=None):
        assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), half)


@ALL
def test_saved_while_enabled(family, tmp_path):
    """The saved weights are the model's, and those loaded draw the same."""
    pipe, arguments = FAMILIES[family]()
    name = "transformer" if getattr(pipe, "transformer", None) else "unet"
    model = getattr(pipe, name)
    with enable(pipe, speedup=2, announce=None):
        cached = run_pipeline(pipe, arguments(1), STEPS)
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    setattr(pipe, name, loaded.eval())
    with enable(pipe, speedup=2, announce=None):
        assert weights_are_close(run_pipeline(pipe, arguments(1), STEPS), cached)


@ALL
def test_layerwise_casting(family):
    pipe, arguments = FAMILIES[family]()
    denoiser(pipe).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    plain = run_pipeline(pipe, arguments(1), STEPS)
    with enable(pipe, speedup=2, announce=None) as cache:
        cached = run_pipeline(pipe, arguments(1), STEPS)
    assert cache.reports[0].reused and 0 < (cached - plain).norm() / plain.norm() < 0.15
    assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), plain)


@pytest.mark.robustness(
    "Threads, copies and shared models",
    "two pipelines with one transformer, in two threads, one of them enabled or both",
    "each renders what it would alone; one that is not enabled runs un-cached",
)
@ALL
def test_two_pipelines_and_two_threads(family):
    """Two pipelines share a denoiser: one after the other and at once each draws what it would alone, whether one of
    them is enabled or both, and however they are turned off."""
    pipe, arguments = FAMILIES[family]()
    other = copy.copy(pipe)
    other.scheduler = copy.deepcopy(pipe.scheduler)
    plain, others_plain = run_pipeline(pipe, arguments(1), STEPS), run_pipeline(other, arguments(2), STEPS)
    keys, attributes = set(denoiser(pipe).__dict__), set(vars(pipe))
    with enable(other, steps=4, announce=None):
        others_alone = run_pipeline(other, arguments(2), STEPS)

    def at_once():
        with ThreadPoolExecutor(2) as pool:
            return [
                future.result()
                for future in (
                    pool.submit(run_pipeline, pipe, arguments(1), STEPS),
                    pool.submit(run_pipeline, other, arguments(2), STEPS),
                )
            ]

    first = enable(pipe, speedup=2, announce=None)
    alone = run_pipeline(pipe, arguments(1), STEPS)
    assert torch.equal(run_pipeline(other, arguments(2), STEPS), others_plain)
    drawn = at_once()
    assert torch.equal(drawn[0], alone) and torch.equal(drawn[1], others_plain)
    second = enable(other, steps=4, announce=None)
    for _ in range(2):
        drawn = at_once()
        assert torch.equal(drawn[0], alone) and torch.equal(drawn[1], others_alone)
        assert torch.equal(run_pipeline(other, arguments(2), STEPS), others_alone)
        assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), alone)
    assert len(first.reports) == 6 and len(second.reports) == 4
    assert all(report.complete and not report.unplanned for report in (*first.reports, *second.reports))
    first.disable()  # which lies beneath the second
    assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), plain)
    assert torch.equal(run_pipeline(other, arguments(2), STEPS), others_alone)
    second.disable()
    assert torch.equal(run_pipeline(other, arguments(2), STEPS), others_plain)
    assert set(denoiser(pipe).__dict__) == keys and set(vars(pipe)) == attributes == set(vars(other))


IMAGE_TO_IMAGE = {
    "flux": "FluxImg2ImgPipeline",
    "sdxl": "StableDiffusionXLImg2ImgPipeline",
    "sd3": "StableDiffusion3Img2ImgPipeline",
    "qwen_image": "QwenImageImg2ImgPipeline",
    "z_image": "ZImageImg2ImgPipeline",
    "wan": "WanVideoToVideoPipeline",
    "cogvideox": "CogVideoXVideoToVideoPipeline",
}


@pytest.mark.robustness(
    "When nothing would be cached",
    "a run that starts inside its schedule (image to image, video to video)",
    "planned for the steps it has",
)
@pytest.mark.parametrize("family", IMAGE_TO_IMAGE)
@pytest.mark.parametrize("strength", [0.5, 0.8, 1.0])
def test_image_to_image(family, strength):
    """A run begins in the middle, where its strength says, and is planned for the steps it has."""
    pipe, arguments = FAMILIES[family]()
    pipe, picture = of_the_parts_of(pipe, IMAGE_TO_IMAGE[family]), picture_for(arguments(1))
    frames = [picture[0].permute(1, 2, 0).numpy()] * arguments(1).get("num_frames", 0)
    call = {**arguments(1), "strength": strength, **({"video": frames} if frames else {"image": picture})}
    known = inspect.signature(type(pipe).__call__).parameters
    call = {name: value for name, value in call.items() if name in known}
    plain = run_pipeline(pipe, call, 10)
    with enable(pipe, speedup=2, announce=None) as cache:
        cached = run_pipeline(pipe, call, 10)
        assert torch.equal(run_pipeline(pipe, call, 10), cached)
    report = cache.reports[0]
    assert len(report.levels) in (round(10 * strength), round(10 * strength) + 1) and not report.unplanned
    assert report.complete and report.reused and 0 < (cached - plain).norm() / plain.norm() < 0.1


@pytest.mark.robustness(
    "When nothing would be cached",
    "a run that ends early and leaves the rest to a refiner (SDXL's `denoising_end`)",
    "planned for the steps it has",
)
@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DDIMScheduler"])
def test_a_run_that_leaves_the_rest_to_a_refiner(scheduler):
    """Its last step is the last that it makes, so it computes, and all before it are corrected."""
    pipe, arguments = FAMILIES["sdxl"]()
    pipe.scheduler = getattr(diffusers, scheduler)()
    refiner = of_the_parts_of(pipe, IMAGE_TO_IMAGE["sdxl"])
    call, rest = {**arguments(1), "denoising_end": 0.7}, {**arguments(1), "denoising_start": 0.7}
    rest = {name: value for name, value in rest.items() if name not in ("height", "width")}
    plain, whole = run_pipeline(pipe, call, 10), run_pipeline(pipe, arguments(1), 10)
    with enable(pipe, speedup=2, announce=None) as cache:
        cached = run_pipeline(pipe, call, 10)
        run_pipeline(pipe, arguments(1), 10)
    first, second = cache.reports
    assert len(first.levels) == 7 and len(second.levels) == 10
    assert not first.schedule.reuse[-1] and all(report.complete and not report.unplanned for report in cache.reports)
    assert 0 < (cached - plain).norm() < 0.5 * (plain - whole).norm()
    with enable(refiner, speedup=2, announce=None) as cache:
        run_pipeline(refiner, {**rest, "image": cached}, 10)
    assert len(cache.reports[0].levels) == 3 and cache.reports[0].complete


@pytest.mark.robustness(
    "Which residual a call may reuse",
    "guidance that calls the model with two rows, then with one (LTX-2, SD3's skip-layer guidance)",
)
def test_guidance_with_a_third_call():
    """SD3's skip-layer guidance, for a part of the run: two rows in one call, then one row in another."""
    pipe, arguments = FAMILIES["sd3"]()
    call = {**arguments(1), "skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.7}
    plain, without = run_pipeline(pipe, call, 12), run_pipeline(pipe, arguments(1), 12)
    with enable(pipe, speedup=2, announce=None) as cache:
        cached = run_pipeline(pipe, call, 12)
        assert torch.equal(run_pipeline(pipe, call, 12), cached)
        assert run_pipeline(pipe, arguments(1), 12).shape == without.shape
    assert all(report.complete and report.reused for report in cache.reports)
    assert (cached - plain).norm() < 0.5 * (plain - without).norm()


@pytest.mark.parametrize("family", CONTROL_NETS)
def test_a_control_net(family):
    """With predicted outputs, and by the paper's rule from the second run on."""
    pipe, arguments = with_control_net(family)
    plain = run_pipeline(pipe, arguments(1), STEPS)
    assert not torch.equal(plain, run_pipeline(pipe, {**arguments(1), "controlnet_conditioning_scale": 0.0}, STEPS))
    with enable(pipe, speedup=2, announce=None) as cache:
        cached = run_pipeline(pipe, arguments(1), STEPS)
        assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), cached)
    assert not cache.reports[0].unplanned and 0 < (cached - plain).norm() / plain.norm() < 0.1
    assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), plain)
    if HOSTS[class_name(denoiser(pipe))].blocks:
        with enable(pipe, **RULE, announce=None) as cache:
            assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), plain)
            cached = run_pipeline(pipe, arguments(1), STEPS)
        report = cache.reports[1]
        assert report.reused and report.verified and not report.unplanned and not report.notes
        assert 0 < (cached - plain).norm() / plain.norm() < 0.1


RULE = {"thresh": 5.0, "K": 1, "retention_ratio": 0.2}


def shared_by_ranks(rank, families, share, folder):
    """Each with predicted outputs and by the paper's rule, before and after. families: {name: whether under the rule,
    too, the output is predicted}."""
    for family, by_output in families.items():
        pipe, arguments = FAMILIES[family]()
        name, model = class_name(denoiser(pipe)), denoiser(pipe)
        known, wishes = HOSTS[name], [{"speedup": 2}]
        if known.blocks:
            wishes.append(RULE)
            with enable(pipe, calibrate=True, announce=None):
                run_pipeline(pipe, arguments(1), STEPS)
            torch.distributed.barrier()  # rank 0 has written its file

        def drawn(pipe=pipe, arguments=arguments, wishes=wishes):
            for wish in wishes:
                with enable(pipe, **wish, announce=None) as cache:
                    yield run_pipeline(pipe, arguments(1), STEPS), cache.reports[0].reused, cache.reports[0].notes

        if by_output:
            HOSTS[name] = replace(known, blocks=(), final_layer=None)
        alone, HOSTS[name] = [*drawn()], known
        for one in [model] if family != "wan22" else [model, pipe.transformer_2]:
            share(one)
        torch.save((alone, [*drawn()]), folder / f"{family}-{rank}.pt")


def shared_runs(families, share, tmp_path_factory):
    """A folder of what both ranks drew, in two processes for all families."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAGCACHE_HOME", str(folder / "home"))
        two_ranks(shared_by_ranks, families, share, folder)
    return folder


def two_ranks_draw_what_one_does(family, by_output, folder):
    (alone, first), (_, second) = (torch.load(folder / f"{family}-{rank}.pt") for rank in range(2))
    for (expected, count, _), (one, counted, _), (other, *_) in zip(alone, first, second):
        assert torch.equal(one, other) and weights_are_close(one, expected) and count == counted > 0
    assert [bool(notes) for _, _, notes in first] == [False, by_output][: len(first)]


@pytest.fixture(scope="module")
def fsdp_runs(tmp_path_factory):
    return shared_runs(dict.fromkeys(FAMILIES, False), fully_sharded, tmp_path_factory)


@ALL
def test_fsdp_over_two_ranks(family, fsdp_runs):
    two_ranks_draw_what_one_does(family, False, fsdp_runs)


# Of the classes whose tokens diffusers can divide (LTX's on a GPU only: un-cached its attention fails here). It divides
# those of Wan and Qwen-Image in a hook of their first block, which a reused step does not run: the proof finds that,
# and the output is predicted.
DIVIDED = {"flux": False, "wan": True, "wan22": True, "qwen_image": True}


@pytest.fixture(scope="module")
def divided_runs(tmp_path_factory):
    return shared_runs(DIVIDED, context_parallel, tmp_path_factory)


@pytest.mark.parametrize("family", DIVIDED)
def test_context_parallel_over_two_ranks(family, divided_runs):
    two_ranks_draw_what_one_does(family, DIVIDED[family], divided_runs)


@pytest.mark.robustness(
    "Threads, copies and shared models",
    "text to image and image to image with one transformer and one scheduler (`from_pipe`), each with its own settings",
    "each renders what it would alone, and is disabled separately",
)
def test_image_to_image_after_text_to_image_with_one_transformer():
    """As a user has it from `from_pipe`: one scheduler for both. Each has its own wish, and is turned off alone."""
    pipe, arguments = FAMILIES["flux"]()
    edit = diffusers.FluxImg2ImgPipeline.from_pipe(pipe)
    assert edit.transformer is pipe.transformer and edit.scheduler is pipe.scheduler
    call = {**arguments(1), "image": picture_for(arguments(1)), "strength": 0.6}
    plain, edited_plain = run_pipeline(pipe, arguments(1), STEPS), run_pipeline(edit, call, 10)
    with enable(pipe, speedup=2, announce=None):
        alone = run_pipeline(pipe, arguments(1), STEPS)
    with enable(edit, steps=4, announce=None):
        edited_alone = run_pipeline(edit, call, 10)
    with enable(pipe, speedup=2, announce=None) as drawing, enable(edit, steps=4, announce=None) as editing:
        with pytest.raises(MagCacheError, match="patched already"):
            enable(pipe, speedup=3)
        for _ in range(2):
            assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), alone)
            assert torch.equal(run_pipeline(edit, call, 10), edited_alone)
        disable(pipe)
        assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), plain)
        with pytest.raises(MagCacheError, match="not enabled on this FluxPipeline"):
            disable(pipe)
        with enable(pipe, speedup=2, announce=None):  # above the other now
            assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), alone)
        assert torch.equal(run_pipeline(edit, call, 10), edited_alone)
    assert torch.equal(run_pipeline(edit, call, 10), edited_plain) and "forward" not in pipe.transformer.__dict__
    assert (len(drawing.reports), len(editing.reports)) == (2, 3)


@pytest.mark.robustness(
    "Threads, copies and shared models",
    "your own loop calls a transformer with two enabled pipelines",
    "it runs un-cached, because the call belongs to neither",
)
def test_a_loop_of_ones_own_beside_two_pipelines_is_neithers():
    """With one pipeline enabled a call of no pipeline is its; with two nobody could say whose."""
    pipe, arguments = FAMILIES["flux"]()
    edit = diffusers.FluxImg2ImgPipeline.from_pipe(pipe)
    caught, model = [], pipe.transformer
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: caught.append(kwargs), with_kwargs=True)
    run_pipeline(pipe, arguments(1), STEPS)
    hook.remove()
    with torch.no_grad():
        plain = [model(**kwargs)[0] for kwargs in caught]
        with enable(pipe, speedup=2, announce=None) as first, enable(edit, speedup=2, announce=None) as second:
            assert all(torch.equal(model(**kwargs)[0], made) for kwargs, made in zip(caught, plain))
            run_pipeline(pipe, arguments(1), STEPS)
            run_pipeline(edit, {**arguments(1), "image": picture_for(arguments(1)), "strength": 0.9}, STEPS)
    assert len(first.reports) == 1 == len(second.reports)


@pytest.mark.parametrize("offload", [model_offload, sequential_offload], ids=["model", "sequential"])
def test_two_pipelines_with_one_offloaded_model(offload):
    pipe, arguments = FAMILIES["flux"]()
    edit = diffusers.FluxImg2ImgPipeline.from_pipe(pipe)
    call = {**arguments(1), "image": picture_for(arguments(1)), "strength": 0.6}
    with enable(pipe, speedup=2, announce=None):
        alone = run_pipeline(pipe, arguments(1), STEPS)
    with enable(edit, steps=4, announce=None):
        edited_alone = run_pipeline(edit, call, 10)
    first = enable(pipe, speedup=2, announce=None)
    offload(pipe)
    second = enable(edit, steps=4, announce=None)
    for _ in range(2):
        assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), alone)
        assert torch.equal(run_pipeline(edit, call, 10), edited_alone)
    first.disable()
    assert torch.equal(run_pipeline(edit, call, 10), edited_alone)
    second.disable()
    with enable(pipe, speedup=2, announce=None):
        assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), alone)


def test_a_class_nobody_described_is_for_one_pipeline(monkeypatch):
    """Until its first run has shown its facts."""
    pipe, arguments = FAMILIES["flux"]()
    edit = diffusers.FluxImg2ImgPipeline.from_pipe(pipe)
    monkeypatch.delitem(HOSTS, class_name(pipe.transformer))
    with enable(pipe, **RULE, announce=None):
        with pytest.raises(MagCacheError, match="patched already"):
            enable(edit, speedup=2)
        run_pipeline(pipe, arguments(1), STEPS)
        with enable(edit, speedup=2, announce=None):
            run_pipeline(pipe, arguments(1), STEPS)
    with enable(edit, speedup=2, announce=None):
        with pytest.raises(MagCacheError, match="patched already"):
            enable(pipe, **RULE)
        run_pipeline(edit, {**arguments(1), "image": picture_for(arguments(1)), "strength": 0.9}, STEPS)
