"""A callback of a real pipeline changes what the model is conditioned on in the middle of a gap: the next call
computes,
with its reason in the report, and the result follows the un-cached one."""

from __future__ import annotations

import pytest
import torch
from diffusers.models import attention_processor as processors
from diffusers.models import embeddings
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from peft import LoraConfig
from tiny_pipelines import FAMILIES, TEXT, WIDTH, embeds, run_pipeline, with_control_net

from common.pipeline import enable

STEPS = 24


pytestmark = pytest.mark.usefixtures("home")


def with_normal_weights(module):
    torch.manual_seed(3)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.eval().requires_grad_(False)


def flux_image_adapter(pipe):
    model = pipe.transformer
    model.set_attn_processor(
        {
            name: one
            if name.startswith("single")
            else with_normal_weights(FluxIPAdapterAttnProcessor(model.inner_dim, WIDTH, num_tokens=[4]))
            for name, one in model.attn_processors.items()
        }
    )
    embeddings_of_both = image_embeddings(model)
    return {**embeddings_of_both, **{f"negative_{name}": value for name, value in embeddings_of_both.items()}}


def sdxl_image_adapter(pipe):
    model = pipe.unet
    hidden = {name: model.get_submodule(name.rpartition(".")[0]).to_q.out_features for name in model.attn_processors}
    model.set_attn_processor(
        {
            name: with_normal_weights(processors.IPAdapterAttnProcessor2_0(hidden[name], WIDTH, (4,)))
            if name.endswith("attn2.processor")
            else one
            for name, one in model.attn_processors.items()
        }
    )
    model.config.encoder_hid_dim_type = "ip_image_proj"
    return image_embeddings(model, 2)


def image_embeddings(model, rows=1):
    model.encoder_hid_proj = embeddings.MultiIPAdapterImageProjection(
        [with_normal_weights(embeddings.ImageProjection(WIDTH, WIDTH, 4))]
    )
    return {"ip_adapter_image_embeds": [embeds(5, rows, 1, WIDTH)]}


def sd3_image_adapter(pipe):
    model = pipe.transformer
    width = model.inner_dim
    model.set_attn_processor(
        {
            name: with_normal_weights(processors.SD3IPAdapterJointAttnProcessor2_0(width, width, 8, 16))
            for name in model.attn_processors
        }
    )
    model.image_proj = with_normal_weights(
        embeddings.IPAdapterTimeImageProjection(
            embed_dim=WIDTH, output_dim=width, hidden_dim=16, dim_head=8, heads=2, num_queries=2, timestep_in_dim=16
        )
    )
    return {"ip_adapter_image_embeds": embeds(5, 2, 1, WIDTH)}


def no_image(pipe):
    return {}


LORA = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)


def with_lora(pipe):
    torch.manual_seed(4)
    pipe.transformer.add_adapter(LORA, "mine")
    return {}


def load_lora(pipe, tensors):
    with_lora(pipe)


def other_prompt(pipe, tensors):
    prompt = tensors["prompt_embeds"].clone()
    prompt[-1:] = (300 if hasattr(pipe, "unet") else 3) * embeds(77, 1, TEXT, WIDTH)  # a tiny U-Net hardly listens
    return {"prompt_embeds": prompt}


def stronger_guidance(pipe, tensors):
    pipe._guidance_scale = 9.0


ADAPTERS, PROMPT = "adapters", "encoder_hidden_states"
CHANGES = {  # family, what is put on before, what the callback does, the reason in the report
    "image adapter, FLUX": ("flux", flux_image_adapter, lambda pipe, _: pipe.set_ip_adapter_scale(0.0), ADAPTERS),
    "image adapter, SDXL": ("sdxl", sdxl_image_adapter, lambda pipe, _: pipe.set_ip_adapter_scale(300.0), ADAPTERS),
    "image adapter, SD3": ("sd3", sd3_image_adapter, lambda pipe, _: pipe.set_ip_adapter_scale(0.0), ADAPTERS),
    "a LoRA is loaded": ("flux", no_image, load_lora, ADAPTERS),
    "its scale": ("sd3", with_lora, lambda pipe, _: pipe.transformer.set_adapters(["mine"], [0.2]), ADAPTERS),
    "it is turned off": ("flux", with_lora, lambda pipe, _: pipe.transformer.disable_adapters(), ADAPTERS),
    "it is fused": ("sd3", with_lora, lambda pipe, _: pipe.transformer.fuse_lora(2.0), ADAPTERS),
    "it is taken away": ("flux", with_lora, lambda pipe, _: pipe.transformer.delete_adapters(["mine"]), ADAPTERS),
    "the prompt, FLUX": ("flux", no_image, other_prompt, PROMPT),
    "the prompt, SD3": ("sd3", no_image, other_prompt, PROMPT),
    "the prompt, SDXL": ("sdxl", no_image, other_prompt, PROMPT),
    "guidance": ("sd3", no_image, stronger_guidance, "the pipeline's guidance"),
}


@pytest.mark.robustness(
    "Which residual a call may reuse",
    "a callback of FLUX, SDXL or SD3 changes the prompt, the scale of an image adapter, the guidance; loads, "
    "scales, fuses, turns off or takes away a LoRA",
    "the next call computes, with the reason; the change has the effect that it has un-cached",
)
@pytest.mark.parametrize("what", CHANGES)
def test_a_callback_changes_the_conditioning(what):
    family, put_on, change, reason = CHANGES[what]

    def drawn(at=None, cached=True):
        """(latents, report, step of the change); at: None where the callback finds a gap, -1 for never."""
        pipe, arguments = FAMILIES[family]()
        call, done = {**arguments(1), **put_on(pipe)}, []

        def between(pipe, step, timestep, tensors):
            in_gap = at is None and step > 3 and handle.run.schedule.reuse[step : step + 2].all()
            if not done and (step == at or in_gap):
                done.append(step)
                return change(pipe, tensors) or {}
            return {}

        call.update(callback_on_step_end=between, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
        if not cached:
            return run_pipeline(pipe, call, STEPS), None, done
        with enable(pipe, speedup=2.5, announce=None) as cache:
            (handle,) = cache.handles
            return run_pipeline(pipe, call, STEPS), cache.reports[0], done

    latents, report, (step,) = drawn()
    kinds = ["computed" if kind == "computed" else "reused" for _, _, kind, *_ in report.calls]
    assert report.unplanned == {f"the conditioning changed ({reason})": 1} and kinds[step + 1] == "computed"
    unchanged, calm, _ = drawn(-1)
    assert not calm.unplanned and report.computed == calm.computed + 1
    exact, exact_unchanged = drawn(step, cached=False)[0], drawn(-1, cached=False)[0]
    effect, cached_effect = exact - exact_unchanged, latents - unchanged
    assert (cached_effect - effect).norm() < 0.5 * effect.norm()


@pytest.mark.robustness("Which residual a call may reuse", "a control net ends (at 0.42 of a run)")
def test_a_control_nets_time_is_over():
    """At 0.42 of the run, in the middle of a gap: on both sides of it the picture follows the un-cached one."""
    pipe, arguments = with_control_net("flux")
    call = {**arguments(1), "control_guidance_end": 0.42}
    for steps in range(12, 24):  # as many as let it end in a gap
        with enable(pipe, speedup=2.5, announce=None) as cache:
            cached_always = run_pipeline(pipe, arguments(1), steps)
        if cache.reports[0].schedule.reuse[int(0.42 * steps)]:
            break
    with enable(pipe, speedup=2.5, announce=None) as cache:
        cached = run_pipeline(pipe, call, steps)
    ((why, calls),) = cache.reports[0].unplanned.items()
    assert calls == 1 and why.startswith("the conditioning changed (controlnet_block_samples, ")
    plain, always = run_pipeline(pipe, call, steps), run_pipeline(pipe, arguments(1), steps)
    effect, cached_effect = plain - always, cached - cached_always
    assert (cached_effect - effect).norm() < 0.5 * effect.norm()
