"""Runs of the sampler of tiny_flux.py, what they give alone, and what they must give, made the expensive way."""

import copy

import numpy as np
import torch

BASE = {"steps": 12, "size": 64, "batch": 1, "cfg": False, "shift": 3.0, "seed": 0, "prompt": 0}


OTHERS = {"size": 48, "steps": 7, "prompt": 1, "cfg": True, "batch": 2, "shift": 1.0}


RUNS = {"base": BASE, **{key: {**BASE, key: value} for key, value in OTHERS.items()}, "all": {**BASE, **OTHERS}}


SHORT = {**BASE, "steps": 8}  # #..#..#. for what is tried at every step


def alone(model, euler, cached, **run):
    sampler = euler(copy.deepcopy(model))
    with cached(sampler) as handle:
        latents = sampler.run(**run)
    assert handle.reports[-1].reused > 0
    return latents


def control(step, branch):
    """ControlNet samples as large as the tokens themselves, so that a missing or a second addition is seen at once."""
    made = torch.Generator().manual_seed(step)
    return {
        "controlnet_block_samples": [torch.randn(1, 64, 32, generator=made) for _ in range(2)],
        "controlnet_single_block_samples": [torch.randn(1, 64, 32, generator=made) for _ in range(3)],
    }


class Tokens:
    """Hooks on an unpatched model: the image tokens that enter the first block and those that enter norm_out."""

    def __init__(self, model):
        self.before = self.after = None
        model.transformer_blocks[0].register_forward_pre_hook(self.enter, with_kwargs=True)
        model.norm_out.register_forward_pre_hook(self.leave)

    def enter(self, module, args, kwargs):
        self.before = kwargs["hidden_states"]

    def leave(self, module, args):
        self.after = args[0]
        return self.changed(args)

    def changed(self, args):
        return args


class Oracle(Tokens):
    """What caching must give, made the expensive way: every block runs at every step, and where `reuse` says so
    norm_out gets the tokens that entered the first block plus this branch's residual, unless it is older than the plan
    has it."""

    def __init__(self, sampler, reuse):
        super().__init__(sampler.model)
        self.sampler, self.reuse, self.residuals = sampler, reuse, {}

    def changed(self, args):
        step, branch = self.sampler.step, self.sampler.branch
        made, residual = self.residuals.get(branch, (-1, None))
        if self.reuse[step] and made >= np.flatnonzero(~self.reuse[: step + 1])[-1]:
            return self.before + residual, *args[1:]
        self.residuals[branch] = step, self.after - self.before
        return args


class Broken(Exception):
    pass


def class_forward(model):
    return model.forward.__func__ is type(model).forward and "forward" not in model.__dict__


def is_one_sentence(caught):
    text = str(caught.value)
    return text.endswith(".") and "\n" not in text and text.count(". ") == 0
