"""Real pipelines of diffusers, eleven families, with tiny random weights and prompts given as embeddings: nothing is
downloaded, and a run of eight steps takes a second or two."""

from __future__ import annotations

import inspect
from operator import attrgetter

import diffusers
import diffusers.pipelines.ltx2.connectors
import diffusers.pipelines.ltx2.vocoder
import torch

TEXT, WIDTH = 6, 16  # tokens of a prompt, and their width


def random_model(name, seed=0, **config):
    torch.manual_seed(seed)
    return with_random_weights(attrgetter(name)(diffusers)(**config), seed)


def with_random_weights(made, seed=0):
    torch.manual_seed(seed)
    for parameter in made.eval().requires_grad_(False).parameters():  # a fresh final layer is often zero
        parameter.copy_(
            torch.randn(parameter.shape) * (0.5 / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.2)
        )
    return made


def embeds(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flow(**config):
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def small_vae(channels):
    return random_model(
        "AutoencoderKL", block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=channels, norm_num_groups=1,
        shift_factor=0.06, scaling_factor=1.5,
    )  # fmt: skip


def no_text(*numbers):
    return {f"{kind}{number}": None for kind in ("text_encoder", "tokenizer") for number in numbers}


FLUX = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH, "axes_dims_rope": (4, 6, 6), "guidance_embeds": True,
}  # fmt: skip


def flux():
    transformer = random_model("FluxTransformer2DModel", **FLUX)
    pipe = diffusers.FluxPipeline(flow(shift=3.0), small_vae(4), transformer=transformer, **no_text("", "_2"))
    return pipe, lambda seed: {
        "prompt_embeds": embeds(seed, 1, TEXT, WIDTH), "pooled_prompt_embeds": embeds(seed, 1, WIDTH),
        "height": 16, "width": 16,
    }  # fmt: skip


def tiny_wan_transformer(seed=0):
    return random_model(
        "WanTransformer3DModel", seed, num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


def wan_vae():
    return random_model(
        "AutoencoderKLWan", base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4,
        temperal_downsample=[False, True, True], latents_std=[1.0] * 4,
    )  # fmt: skip


def wan(two=False):
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = diffusers.WanPipeline(
        None, None, wan_vae(), scheduler,
        tiny_wan_transformer(), tiny_wan_transformer(1) if two else None, boundary_ratio=0.7 if two else None,
    )  # fmt: skip
    return pipe, lambda seed: {
        "prompt_embeds": embeds(seed, 1, TEXT, WIDTH), "negative_prompt_embeds": embeds(99, 1, TEXT, WIDTH),
        "height": 32, "width": 32, "num_frames": 5, "guidance_scale": 3.0,
    }  # fmt: skip


def wan22():
    return wan(two=True)


def qwen_image():
    transformer = random_model(
        "QwenImageTransformer2DModel", in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = random_model(
        "AutoencoderKLQwenImage", base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02)
    pipe = diffusers.QwenImagePipeline(scheduler, vae, None, None, transformer)
    mask = torch.ones(1, TEXT, dtype=torch.long)
    return pipe, lambda seed: {
        "prompt_embeds": embeds(seed, 1, TEXT, WIDTH), "prompt_embeds_mask": mask,
        "negative_prompt_embeds": embeds(99, 1, TEXT, WIDTH), "negative_prompt_embeds_mask": mask,
        "true_cfg_scale": 3.0, "height": 64, "width": 64,
    }  # fmt: skip


SD3 = {
    "sample_size": 32, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 4, "caption_projection_dim": 32, "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH, "out_channels": 4,
}  # fmt: skip


def sd3():
    pipe = diffusers.StableDiffusion3Pipeline(
        random_model("SD3Transformer2DModel", **SD3), flow(shift=3.0), small_vae(4), **no_text("", "_2", "_3")
    )  # fmt: skip
    return pipe, lambda seed: {
        "prompt_embeds": embeds(seed, 1, TEXT, WIDTH), "pooled_prompt_embeds": embeds(seed, 1, WIDTH),
        "negative_prompt_embeds": embeds(99, 1, TEXT, WIDTH), "negative_pooled_prompt_embeds": embeds(99, 1, WIDTH),
        "height": 32, "width": 32, "guidance_scale": 4.0,
    }  # fmt: skip


def ltx():
    transformer = random_model(
        "LTXVideoTransformer3DModel", in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=2, caption_channels=WIDTH,
    )  # fmt: skip
    vae = random_model(
        "AutoencoderKLLTXVideo", latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, timestep_conditioning=False, patch_size=1,
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
    )  # fmt: skip
    pipe = diffusers.LTXPipeline(flow(), vae, None, None, transformer)
    mask = torch.ones(1, TEXT)
    return pipe, lambda seed: {
        "prompt_embeds": embeds(seed, 1, TEXT, WIDTH), "prompt_attention_mask": mask,
        "negative_prompt_embeds": embeds(99, 1, TEXT, WIDTH), "negative_prompt_attention_mask": mask,
        "height": 32, "width": 32, "num_frames": 9, "guidance_scale": 3.0,
    }  # fmt: skip


def ltx2():
    """Video and sound, four calls a step by its own defaults of guidance."""
    transformer = random_model(
        "LTX2VideoTransformer3DModel", in_channels=4, out_channels=4, patch_size=1, patch_size_t=1,
        num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4,
        audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=2,
        qk_norm="rms_norm_across_heads", caption_channels=WIDTH, rope_double_precision=False, rope_type="split",
    )  # fmt: skip
    of_each = {"num_attention_heads": 4, "attention_head_dim": 4, "num_layers": 1, "num_learnable_registers": None}
    kinds = {f"{kind}_connector_{name}": value for kind in ("video", "audio") for name, value in of_each.items()}
    connectors = random_model(
        "pipelines.ltx2.connectors.LTX2TextConnectors", caption_channels=WIDTH, text_proj_in_factor=1, **kinds,
        connector_rope_base_seq_len=32, rope_double_precision=False, causal_temporal_positioning=False,
        rope_type="split",
    )  # fmt: skip
    vae = random_model(
        "AutoencoderKLLTX2Video", latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,),
        layers_per_block=(1,), decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False), downsample_type=("spatial",),
        upsample_residual=(False,), upsample_factor=(1,), timestep_conditioning=False, patch_size=1, patch_size_t=1,
        encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    audio_vae = random_model(
        "AutoencoderKLLTX2Audio", base_channels=4, output_channels=2, ch_mult=(1,), num_res_blocks=1,
        attn_resolutions=None, in_channels=2, resolution=32, latent_channels=2, norm_type="pixel",
        causality_axis="height", mid_block_add_attention=False, sample_rate=16000, mel_hop_length=160, is_causal=True,
        mel_bins=8,
    )  # fmt: skip
    vocoder = random_model(
        "pipelines.ltx2.vocoder.LTX2Vocoder", in_channels=16, hidden_channels=32, out_channels=2,
        upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2], resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]], leaky_relu_negative_slope=0.1, output_sampling_rate=16000,
    )  # fmt: skip
    pipe = diffusers.LTX2Pipeline(flow(), vae, audio_vae, None, None, connectors, transformer, vocoder)
    mask = torch.ones(1, TEXT)
    return pipe, lambda seed: {
        "prompt_embeds": embeds(seed, 1, TEXT, WIDTH), "prompt_attention_mask": mask,
        "negative_prompt_embeds": embeds(99, 1, TEXT, WIDTH), "negative_prompt_attention_mask": mask,
        "height": 32, "width": 32, "num_frames": 5, "guidance_scale": 2.0, "spatio_temporal_guidance_blocks": [1],
    }  # fmt: skip


def z_image():
    transformer = random_model(
        "ZImageTransformer2DModel", in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=WIDTH, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    pipe = diffusers.ZImagePipeline(flow(shift=3.0), small_vae(4), None, None, transformer)
    return pipe, lambda seed: {
        "prompt_embeds": [embeds(seed, TEXT, WIDTH)], "negative_prompt_embeds": [embeds(99, TEXT, WIDTH)],
        "height": 32, "width": 32, "guidance_scale": 3.0,
    }  # fmt: skip


def cogvideox():
    transformer = random_model(
        "CogVideoXTransformer3DModel", num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=WIDTH, num_layers=2, sample_width=2, sample_height=2, sample_frames=9,
        max_text_seq_length=TEXT,
    )  # fmt: skip
    vae = random_model(
        "AutoencoderKLCogVideoX", block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4, norm_num_groups=2,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    pipe = diffusers.CogVideoXPipeline(None, None, vae, transformer, scheduler)
    return pipe, lambda seed: {
        "prompt_embeds": embeds(seed, 1, TEXT, WIDTH), "negative_prompt_embeds": embeds(99, 1, TEXT, WIDTH),
        "height": 16, "width": 16, "num_frames": 9, "guidance_scale": 3.0, "max_sequence_length": TEXT,
    }  # fmt: skip


def lumina2():
    transformer = random_model(
        "Lumina2Transformer2DModel", sample_size=4, in_channels=4, hidden_size=16, num_layers=2, num_attention_heads=2,
        num_kv_heads=1, multiple_of=16, axes_dim_rope=[4, 2, 2], axes_lens=[64, 64, 64], cap_feat_dim=WIDTH,
    )  # fmt: skip
    pipe = diffusers.Lumina2Pipeline(transformer, flow(shift=6.0), small_vae(4), None, None)
    mask = torch.ones(1, TEXT, dtype=torch.bool)
    return pipe, lambda seed: {
        "prompt_embeds": embeds(seed, 1, TEXT, WIDTH), "prompt_attention_mask": mask,
        "negative_prompt_embeds": embeds(99, 1, TEXT, WIDTH), "negative_prompt_attention_mask": mask,
        "height": 32, "width": 32, "guidance_scale": 3.0,
    }  # fmt: skip


def hunyuanvideo15():
    transformer = random_model(
        "HunyuanVideo15Transformer3DModel", in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16,
        num_layers=2, num_refiner_layers=1, mlp_ratio=2.0, patch_size=1, text_embed_dim=WIDTH, text_embed_2_dim=WIDTH,
        image_embed_dim=12, rope_axes_dim=(4, 6, 6), target_size=16, task_type="t2v",
    )  # fmt: skip
    vae = random_model(
        "AutoencoderKLHunyuanVideo15", latent_channels=4, block_out_channels=(16, 16), layers_per_block=1,
        spatial_compression_ratio=4, temporal_compression_ratio=2, downsample_match_channel=False,
        upsample_match_channel=False,
    )  # fmt: skip
    pipe = diffusers.HunyuanVideo15Pipeline(
        text_encoder=None, tokenizer=None, transformer=transformer, vae=vae, scheduler=flow(shift=7.0),
        text_encoder_2=None, tokenizer_2=None, guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    )  # fmt: skip
    mask = torch.ones(1, TEXT)
    text = {
        "prompt_embeds": lambda seed: embeds(seed, 1, TEXT, WIDTH), "prompt_embeds_mask": lambda seed: mask,
        "prompt_embeds_2": lambda seed: embeds(seed, 1, TEXT, WIDTH), "prompt_embeds_mask_2": lambda seed: mask,
    }  # fmt: skip
    return pipe, lambda seed: {
        **{name: make(seed) for name, make in text.items()},
        **{f"negative_{name}": make(99) for name, make in text.items()},
        "height": 16, "width": 16, "num_frames": 5,
    }  # fmt: skip


def sdxl():
    unet = random_model(
        "UNet2DConditionModel", block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 1), cross_attention_dim=WIDTH,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionXLPipeline(
        small_vae(4), unet=unet, scheduler=diffusers.EulerDiscreteScheduler(), **no_text("", "_2")
    )
    return pipe, lambda seed: {
        "prompt_embeds": embeds(seed, 1, TEXT, WIDTH), "pooled_prompt_embeds": embeds(seed, 1, WIDTH),
        "negative_prompt_embeds": embeds(99, 1, TEXT, WIDTH), "negative_pooled_prompt_embeds": embeds(99, 1, WIDTH),
        "height": 16, "width": 16, "guidance_scale": 4.0,
    }  # fmt: skip


FAMILIES = {
    make.__name__: make
    for make in (flux, wan, wan22, qwen_image, sd3, ltx, ltx2, z_image, cogvideox, lumina2, hunyuanvideo15, sdxl)
}


def flux_control_net(pipe):
    return random_model("FluxControlNetModel", 1, **FLUX)


def sd3_control_net(pipe):
    return random_model("SD3ControlNetModel", 1, **{**SD3, "num_layers": 1})


def qwen_image_control_net(pipe):
    config = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    return with_random_weights(
        diffusers.QwenImageControlNetModel.from_transformer(
            pipe.transformer, load_weights_from_transformer=False, **config
        ),
        1,
    )


def z_image_control_net(pipe):
    """It has the transformer's own embedders."""
    return random_model(
        "ZImageControlNetModel", 1, control_layers_places=[0], control_refiner_layers_places=[0], control_in_dim=4,
        add_control_noise_refiner="control_noise_refiner", dim=32, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
    )  # fmt: skip


def sdxl_control_net(pipe):
    net = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 4))
    return with_random_weights(net, 1)


CONTROL_NETS = {  # by family: the pipeline, its control net, the keyword of the picture
    "flux": ("FluxControlNetPipeline", flux_control_net, "control_image"),
    "sd3": ("StableDiffusion3ControlNetPipeline", sd3_control_net, "control_image"),
    "qwen_image": ("QwenImageControlNetPipeline", qwen_image_control_net, "control_image"),
    "z_image": ("ZImageControlNetPipeline", z_image_control_net, "control_image"),
    "sdxl": ("StableDiffusionXLControlNetPipeline", sdxl_control_net, "image"),
}


def with_control_net(family):
    pipe, arguments = FAMILIES[family]()
    name, control_net, keyword = CONTROL_NETS[family]
    pipe = of_the_parts_of(pipe, name, controlnet=control_net(pipe))
    return pipe, lambda seed: {**arguments(seed), keyword: picture_for(arguments(seed))}


def of_the_parts_of(pipe, name, **more):
    """A pipeline of another class."""
    kind = getattr(diffusers, name)
    known = inspect.signature(kind.__init__).parameters
    return kind(**{name: part for name, part in pipe.components.items() if name in known}, **more)


def picture_for(call):
    return embeds(3, 1, 3, call["height"], call["width"]).clamp(0, 1)


def run_pipeline(pipe, arguments, steps=8, seed=0, **more):
    """The latents of one run."""
    torch.manual_seed(seed)  # SD3's control net draws from the global generator
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    arguments = {"num_inference_steps": steps, "output_type": "latent", "generator": generator, **arguments, **more}
    return pipe(**arguments)[0]


def denoiser(pipe):
    return getattr(pipe, "transformer", None) or pipe.unet


class Stopped(Exception):
    """A user's callback that ends a run."""


def fully_sharded(model):
    """Weights in two halves, as FSDP keeps them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for blocks in model.children():
        for block in blocks if isinstance(blocks, torch.nn.ModuleList) else ():
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def context_parallel(model):
    """Tokens in two halves. diffusers asks for the number of GPUs, and there is none."""
    torch.accelerator.device_count = lambda: 1
    model.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=2))
