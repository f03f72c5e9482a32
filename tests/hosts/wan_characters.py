"""For wan_cpu.py: what a GPU, the audio model and the preprocessing do for Wan2.2's S2V and Animate, and tiny models of
both. A video comes in segments: S2V makes two of 8 frames, Animate two of 9 with one frame in common."""

import sys
import types
from contextlib import nullcontext

import numpy as np
import torch
import wan_cpu

SIZES = {"dim": 48, "ffn_dim": 64, "num_heads": 2, "text_len": 16}


class Float32CpuTorch(wan_cpu.CpuTorch):
    """torch, where every device is the CPU, whose autocast does not know layer norms: all is float32."""

    bfloat16 = torch.float32

    @staticmethod
    def autocast(**options):
        return nullcontext()


class AudioEncoder:
    layers, width = 25, 32

    def __init__(self, *args, **kwargs):
        pass

    def extract_audio_feat(self, path, return_all_layers):
        return path

    def get_audio_embed_bucket_fps(self, path, fps, batch_frames, m):
        sound = torch.randn(2 * batch_frames, self.layers, self.width, generator=wan_cpu.generator_of(str(path)))
        return sound, 2


class MotionEncoder(torch.nn.Module):
    """Its place: 512x512 pixels of a face to a vector."""

    def __init__(self, size, style_dim, motion_dim):
        super().__init__()
        self.linear = torch.nn.Linear(3, style_dim)

    def get_motion(self, faces):
        return self.linear(faces.mean(dim=(2, 3)))


def resize(size):
    def shorter_side(picture):
        scale = size / min(picture.size)
        return picture.resize([max(size, round(side * scale)) for side in picture.size])

    return shorter_side


def center_crop(size):
    def crop(picture):
        left, top = (picture.width - size[1]) // 2, (picture.height - size[0]) // 2
        return picture.crop((left, top, left + size[1], top + size[0]))

    return crop


def compose_transforms(steps):
    def composed(picture):
        for step in steps:
            picture = step(picture)
        return picture

    return composed


def normalize(mean, std):
    return lambda tensor: (tensor - mean[0]) / std[0]


def transforms():
    """The few of torchvision that these pipelines make of a picture."""
    return {
        "Resize": resize,
        "CenterCrop": center_crop,
        "ToTensor": lambda: wan_cpu.picture_tensor,
        "Compose": compose_transforms,
        "Normalize": normalize,
    }


def source(self, src_pose_path, src_face_path, src_ref_path):
    """17 frames of a pose and of a face, and a picture, 64x64."""
    made = np.random.default_rng(1)
    pose, picture = made.integers(0, 256, (17, 64, 64, 3)), made.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return pose.astype(np.uint8), made.integers(0, 256, (17, 8, 8, 3), dtype=np.uint8), picture


def replace(wan):
    """Put the stand-ins in, where the package has these pipelines."""
    speech, animate = sys.modules["wan.speech2video"], sys.modules["wan.animate"]
    speech.torch = animate.torch = Float32CpuTorch("torch")
    speech.AudioEncoder = AudioEncoder
    speech.transforms = types.SimpleNamespace(**transforms())
    sys.modules["wan.modules.animate.model_animate"].Generator = MotionEncoder
    sys.modules["wan.modules.animate.face_blocks"].flash_attn_func = wan_cpu.padded_attention
    wan.WanAnimate.prepare_source = source


def tiny(kind):
    """A model with random weights, some of them zero."""
    if kind == "s2v":
        from wan.modules.s2v.model_s2v import WanModel_S2V

        return WanModel_S2V(
            **SIZES,
            num_layers=4,
            cond_dim=16,
            audio_dim=AudioEncoder.width,
            enable_adain=True,
            audio_inject_layers=[0, 2],
            zero_timestep=True,
            enable_motioner=False,
            enable_framepack=True,
            framepack_drop_mode="padd",
        )
    from wan.modules.animate import WanAnimateModel

    return WanAnimateModel(**SIZES, num_layers=5)
