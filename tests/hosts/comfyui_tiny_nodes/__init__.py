"""Custom nodes for the tests: a tiny random model, a prompt and a decoder, in the place of loaders that need files."""

import comfyui_families
import comfyui_models


class TinyModel:
    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "make", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"family": (list(comfyui_families.FAMILIES),)}}

    def make(self, family):
        return (comfyui_models.build(family, seed=21),)


class TinyPrompt:
    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "make", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0})}}

    def make(self, seed):
        return (comfyui_models.prompt(seed),)


class TinyDecode:
    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "make", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",)}}

    def make(self, samples):
        picture = samples["samples"][:, :3].movedim(1, -1)
        return ((picture / 20 + 0.5).clamp(0, 1).reshape(len(picture), picture.shape[-3], -1, 3),)


NODE_CLASS_MAPPINGS = {"TinyModel": TinyModel, "TinyPrompt": TinyPrompt, "TinyDecode": TinyDecode}
