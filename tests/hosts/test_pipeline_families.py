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
from tiny_pipelines import FAMILIES, Stopped, denoiser, embeds, flux_controlnet, run_pipeline

from common.hosts import HOSTS, class_name
from common.pipeline import enable

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


@ALL
def test_two_pipelines_and_two_threads(family):
    """Two pipelines share a denoiser, and one is enabled: one after the other and at once, each draws what it would
    alone."""
    pipe, arguments = FAMILIES[family]()
    other = copy.copy(pipe)
    other.scheduler = copy.deepcopy(pipe.scheduler)
    plain = run_pipeline(other, arguments(2), STEPS)
    with enable(pipe, speedup=2, announce=None) as cache:
        alone = run_pipeline(pipe, arguments(1), STEPS)
        assert torch.equal(run_pipeline(other, arguments(2), STEPS), plain)
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(run_pipeline, pipe, arguments(1), STEPS)
            second = pool.submit(run_pipeline, other, arguments(2), STEPS)
        assert torch.equal(first.result(), alone) and torch.equal(second.result(), plain)
    assert len(cache.reports) == 2 and cache.reports[-1].complete


IMAGE_TO_IMAGE = {
    "flux": diffusers.FluxImg2ImgPipeline,
    "sdxl": diffusers.StableDiffusionXLImg2ImgPipeline,
    "sd3": diffusers.StableDiffusion3Img2ImgPipeline,
    "qwen_image": diffusers.QwenImageImg2ImgPipeline,
    "z_image": diffusers.ZImageImg2ImgPipeline,
    "wan": diffusers.WanVideoToVideoPipeline,
}


@pytest.mark.parametrize("family", IMAGE_TO_IMAGE)
@pytest.mark.parametrize("strength", [0.5, 0.8, 1.0])
def test_image_to_image(family, strength):
    """A run begins in the middle, where its strength says, and is planned for the steps that it has."""
    pipe, arguments = FAMILIES[family]()
    kind = IMAGE_TO_IMAGE[family]
    names = inspect.signature(kind.__init__).parameters
    pipe = kind(**{name: part for name, part in pipe.components.items() if name in names})
    picture = embeds(3, 1, 3, arguments(1)["height"], arguments(1)["width"]).clamp(0, 1)
    call = {**arguments(1), "strength": strength}
    call |= {"video": [picture[0].permute(1, 2, 0).numpy()] * 5} if family == "wan" else {"image": picture}
    known = inspect.signature(kind.__call__).parameters
    call = {name: value for name, value in call.items() if name in known}
    plain = run_pipeline(pipe, call, 10)
    with enable(pipe, speedup=2, announce=None) as cache:
        cached = run_pipeline(pipe, call, 10)
        assert torch.equal(run_pipeline(pipe, call, 10), cached)
    report = cache.reports[0]
    assert len(report.levels) in (round(10 * strength), round(10 * strength) + 1) and not report.unplanned
    assert report.complete and report.reused and 0 < (cached - plain).norm() / plain.norm() < 0.1


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


def test_a_control_net():
    pipe, arguments = flux_controlnet()
    plain = run_pipeline(pipe, arguments(1), STEPS)
    with enable(pipe, speedup=2, announce=None) as cache:
        cached = run_pipeline(pipe, arguments(1), STEPS)
        assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), cached)
    assert not cache.reports[0].unplanned and 0 < (cached - plain).norm() / plain.norm() < 0.1
    assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), plain)


RULE = {"thresh": 5.0, "K": 1, "retention_ratio": 0.2}


def fully_sharded(model):
    """Weights in two halves, as FSDP keeps them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for name, module in model.named_modules():
        if name.rpartition(".")[0].endswith("blocks") and any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def context_parallel(model):
    """Tokens in two halves. diffusers asks for the number of GPUs, and there is none."""
    torch.accelerator.device_count = lambda: 1
    model.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=2))


def shared_by_ranks(rank, family, share, by_output, folder):
    """With predicted outputs and by the paper's rule, before and after. by_output: the rule, before, too."""

    def drawn():
        for wish in ({"speedup": 2}, RULE):
            with enable(pipe, **wish, announce=None) as cache:
                yield run_pipeline(pipe, arguments(1), STEPS), cache.reports[0].reused, cache.reports[0].notes

    pipe, arguments = FAMILIES[family]()
    with enable(pipe, calibrate=True, announce=None):
        run_pipeline(pipe, arguments(1), STEPS)
    torch.distributed.barrier()  # rank 0 has written its file
    name, model = class_name(denoiser(pipe)), denoiser(pipe)
    known = HOSTS[name]
    if by_output:
        HOSTS[name] = replace(known, blocks=(), final_layer=None)
    alone, HOSTS[name] = [*drawn()], known
    share(model)
    torch.save((alone, [*drawn()]), folder / f"{rank}.pt")


def two_ranks_draw_what_one_does(family, share, by_output, folder):
    two_ranks(shared_by_ranks, family, share, by_output, folder)
    (alone, first), (_, second) = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    for (expected, count, _), (one, counted, _), (other, *_) in zip(alone, first, second):
        assert torch.equal(one, other) and weights_are_close(one, expected) and count == counted > 0
    assert [bool(notes) for _, _, notes in first] == [False, by_output]


@pytest.mark.parametrize("family", ["flux", "wan", "sd3"])
def test_fsdp_over_two_ranks(family, tmp_path):
    two_ranks_draw_what_one_does(family, fully_sharded, False, tmp_path)


@pytest.mark.parametrize("family, by_output", [("flux", False), ("wan", True), ("qwen_image", True)])
def test_context_parallel_over_two_ranks(family, by_output, tmp_path):
    """diffusers divides the tokens of Wan and Qwen-Image in a hook of their first block, which a reused step does not
    run: the proof finds that, and the output is predicted."""
    two_ranks_draw_what_one_does(family, context_parallel, by_output, tmp_path)
