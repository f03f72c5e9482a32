"""`BlockStack` on forwards that diffusers does not have: blocks that write into their input, tokens cut off in
between."""

from dataclasses import replace

import pytest
import torch

from common.blocks import BlockStack, Host
from common.patch import magcache_forward
from common.payloads import Residual
from common.schedule import Settings
from common.tables import RatioTable

HOST = Host(blocks=("blocks",), final_layer="head", image_tokens=0, in_place=True)


class Add(torch.nn.Module):
    def forward(self, tokens):
        tokens += 1
        return tokens


class Model(torch.nn.Module):
    """Three blocks that each add 1 in place, a control net that adds 10 behind the first; two leading reference tokens
    are cut off before the head."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = torch.nn.ModuleList([Add() for _ in range(3)]), torch.nn.Identity()

    def forward(self, latent):
        tokens = torch.cat([torch.zeros(1, 2, 4), latent], dim=1)
        for index, block in enumerate(self.blocks):
            tokens = block(tokens)
            if index == 0:
                tokens += 10
        return self.head(tokens[:, 2:])


def test_residual_of_blocks_in_place_with_tokens_cut_off():
    model, latent = Model(), torch.randn(1, 5, 4)
    stack = BlockStack(model, HOST)
    stack.record()
    output = model(latent)
    residual = stack.finish()
    assert torch.equal(output, latent + 1 + 10 + 1 + 1)
    assert residual.shape == latent.shape and torch.allclose(residual, torch.full_like(residual, 13))

    stack.replace(residual)
    assert torch.allclose(model(latent), output)
    stack.restore()
    assert torch.equal(model(latent), output) and "blocks" not in model.__dict__


@pytest.mark.parametrize("in_place", [True, False])
def test_the_input_is_copied_only_where_it_must_be(in_place):
    model, latent = Model(), torch.randn(1, 5, 4)
    stack = BlockStack(model, replace(HOST, in_place=in_place))
    stack.record()
    model(latent)
    residual = stack.finish()
    assert torch.allclose(residual, torch.full_like(residual, 13.0 if in_place else 0.0))


class Pairs(torch.nn.Module):
    """Two lists of blocks that run in pairs, on a half of the tokens, as a rank of a sequence-parallel group would; the
    head gets the tokens of both halves."""

    def __init__(self):
        super().__init__()
        self.here, self.there = (torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2)) for _ in range(2))
        self.head = torch.nn.Identity()

    def forward(self, latent):
        tokens = latent.chunk(2, dim=1)[0]
        for here, there in zip(self.here, self.there):
            tokens = there(here(tokens))
        return self.head(torch.cat([tokens, tokens], dim=1))


@torch.no_grad()
def test_residual_between_first_and_last_block_of_lists_that_run_in_pairs():
    model, latent = Pairs(), torch.randn(1, 6, 4)
    output = model(latent)
    stack = BlockStack(model, Host(blocks=("here", "there"), final_layer=None, image_tokens=0))
    stack.record()
    assert torch.equal(model(latent), output)
    residual = stack.finish()
    assert torch.equal(residual, output[:, :3] - latent[:, :3])

    ran = []
    for block in (*model.here, *model.there):
        block.register_forward_pre_hook(lambda module, args: ran.append(module))
    stack.replace(residual)
    reused = model(2 * latent)
    stack.restore()
    assert not ran and torch.equal(reused[:, 3:], 2 * latent[:, :3] + residual)
    assert torch.equal(model(latent), output) and len(ran) == 4 and not {"here", "there"} & model.__dict__.keys()


class TextBeside(torch.nn.Module):
    """As AuraFlow of ComfyUI: blocks that return text and image, then blocks of both in a row, then a forward that
    changes the image tokens before its last layer."""

    def __init__(self):
        super().__init__()
        self.pairs = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(2)])
        self.single = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(2)])
        for block in self.pairs:
            block.forward = lambda text, image, plain=block.forward: (plain(text), plain(image + text.mean()))

    def forward(self, text, image):
        for block in self.pairs:
            text, image = block(text, image)
        if len(self.single):
            row = torch.cat([text, image], dim=1)
            for block in self.single:
                row = block(row)
            image = row[:, text.shape[1] :]
        return 3 * image + 1


@torch.no_grad()
def test_residual_of_blocks_that_return_text_and_image():
    model, text, image = TextBeside(), torch.randn(1, 3, 4), torch.randn(1, 5, 4)
    output = model(text, image)
    host = Host(
        blocks=("pairs", "single"),
        image_tokens=1,
        block_returns=lambda args, tokens: (args[0], tokens),
        output_tokens=lambda model, forward: forward["image"].shape[1],
    )
    stack = BlockStack(model, host)
    stack.record({"image": image})
    assert torch.equal(model(text, image), output)
    residual = stack.finish()
    assert torch.allclose(residual, (output - 1) / 3 - image, atol=1e-6)

    ran = []
    for block in (*model.pairs, *model.single):
        block.register_forward_pre_hook(lambda module, args: ran.append(module))
    stack.replace(residual)
    reused = model(text, 2 * image)
    stack.restore()
    assert not ran and torch.allclose(reused, 3 * (2 * image + residual) + 1)
    assert torch.equal(model(text, image), output) and len(ran) == 4


class ReferencesStay(Model):
    """The reference tokens go through the head, and forward leaves them out afterwards. How many there are is no
    argument of forward."""

    references, ran = 2, 0

    def forward(self, latent, timestep):
        tokens = torch.cat([torch.zeros(1, self.references, 4), latent], dim=1)
        for block in self.blocks:
            self.ran += 1
            tokens = block(tokens)
        return self.head(tokens)[:, self.references :] + self.references


@pytest.mark.robustness(
    "Which residual a call may reuse",
    "reference images come or go without an argument that says so",
    "the call computes",
)
@pytest.mark.parametrize("references", [3, 1])
def test_a_residual_is_never_fitted_to_another_number_of_tokens(references):
    """More, or fewer, in the middle of a run: the call computes, with its reason, and all that follows is as before."""
    model, levels = ReferencesStay(), torch.linspace(1000, 100, 8)
    host = Host(("blocks",), "head", 0, "latent", in_place=True, output_tokens=lambda model, forward: 5)
    settings, table = (
        Settings(5.0, 3, 0.2),
        RatioTable("toy", {"cond": [1.0] * 8}, (levels / 1000).tolist(), "measured"),
    )
    latent, outputs, blocks = torch.randn(1, 5, 4), [], []
    with magcache_forward(model, host, table, settings, lambda: levels, announce=None) as handle:
        for step, level in enumerate(levels):
            model.references, before = (2 if step < 5 else references), model.ran
            outputs.append(model(latent, level))
            blocks.append(model.ran - before)
    report, kinds = handle.reports[0], [call[2] for call in handle.reports[0].calls]
    assert report.schedule.reuse[5] and not report.schedule.reuse[4:8].all()
    assert kinds[5] == "computed" and report.unplanned == {"the number of image tokens changed": 1}
    assert blocks[5] == 3 and [count > 0 for count in blocks[1:]] == [kind == "computed" for kind in kinds[1:]]
    assert torch.equal(outputs[5], ReferencesStay.forward(model, latent, levels[5])) and not handle.reports[0].notes


class TurnsRound(torch.nn.Module):
    def forward(self, tokens):
        return -tokens


class NoRoom(torch.nn.Module):
    """One block, whose residual float16 has no room for, and a norm that makes nan of infinity."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = torch.nn.ModuleList([TurnsRound()]), torch.nn.LayerNorm(4).half()

    def forward(self, latent):
        for block in self.blocks:
            latent = block(latent)
        return self.head(latent)


def test_a_residual_that_is_not_finite_proves_nothing():
    latent = 60000 * torch.tensor([[[1.0, -1.0, 0.5, -0.2]]]).half()
    model = NoRoom().requires_grad_(False)
    payload = Residual(model, replace(HOST, in_place=False))
    payload.record({"latent": latent})
    output = model(latent)
    made = payload.finish(output)
    assert output.isfinite().all() and not made.isfinite().all()
    kept, proved, told = payload.prove(made, output, lambda: model(latent))
    assert "another output, which is not finite): its output is predicted instead" in told
    assert payload.kind == "output" and torch.equal(proved, output) and torch.equal(payload.replace(kept), output)
