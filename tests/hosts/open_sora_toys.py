"""Models shaped like Open-Sora's, small enough for every test: what their forwards do with their tokens is theirs, what
a block computes is not. Tokens see each other through a mean, so that a rank of a sequence-parallel group needs the
others."""

import types

import torch
import torch.distributed as dist
from torch import nn

WIDTH = 16
decoded = []  # what the decoders of the toy checkouts were given, in turn


class Mix(nn.Module):
    def __init__(self, scale=0.4):
        super().__init__()
        self.scale, self.own, self.shared = scale, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens, mean, vec):
        return tokens + self.scale * torch.tanh(self.own(tokens) + self.shared(mean) + vec[:, None])


def pixels_of(tokens):
    """A video [batch, 3, frames, height, width] large enough for SSIM."""
    return tokens.tanh().repeat_interleave(8, dim=-1).repeat_interleave(8, dim=-2)


def joint_mean(tokens, parallel):
    """Mean over the tokens of all ranks."""
    total, count = tokens.sum(1, keepdim=True), torch.tensor(float(tokens.shape[1]))
    if parallel:
        dist.all_reduce(total)
        dist.all_reduce(count)
    return total / count


class DoubleBlock(nn.Module):
    parallel = False

    def __init__(self):
        super().__init__()
        self.img, self.txt = Mix(), Mix()

    def forward(self, img, txt, vec, pe):
        mean = joint_mean(torch.cat([txt, img], 1) + pe, self.parallel)
        return self.img(img, mean, vec), self.txt(txt, mean, vec)


class SingleBlock(nn.Module):
    parallel = False

    def __init__(self):
        super().__init__()
        self.mix = Mix()

    def forward(self, tokens, vec, pe):
        return self.mix(tokens, joint_mean(tokens + pe, self.parallel), vec)


class LastLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, width)

    def forward(self, tokens, vec, *others):
        return self.linear(self.norm(tokens) + vec[:, None])


class MMDiT(nn.Module):
    """Open-Sora 2.0's: no forward in the class; double blocks, then single blocks on text and image, text first."""

    def __init__(self, seed=0, channels=8, depth=2, depth_single=3):
        super().__init__()
        torch.manual_seed(seed)
        self.hidden_size = WIDTH
        self.img_in, self.txt_in, self.cond_in = (nn.Linear(width, WIDTH) for width in (channels, WIDTH, channels + 4))
        self.double_blocks = nn.ModuleList(DoubleBlock() for _ in range(depth))
        self.single_blocks = nn.ModuleList(SingleBlock() for _ in range(depth_single))
        self.final_layer = LastLayer(channels)
        self.forward = self.forward_whole
        self.requires_grad_(False)

    def inputs(self, img, txt, timesteps, y_vec, cond):
        img = self.img_in(img) + (0 if cond is None else self.cond_in(cond))
        txt = self.txt_in(txt)
        vec = y_vec * torch.cos(3 * timesteps[:, None])
        pe = torch.linspace(-1, 1, txt.shape[1] + img.shape[1], dtype=img.dtype)[None, :, None]
        return img, txt, vec, pe

    def forward_whole(self, img, img_ids, txt, txt_ids, timesteps, y_vec, cond=None, guidance=None, **kwargs):
        img, txt, vec, pe = self.inputs(img, txt, timesteps, y_vec, cond)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, pe)
        img = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            img = block(img, vec, pe)
        return self.final_layer(img[:, txt.shape[1] :, ...], vec)

    def share(self):
        """Put sequence parallelism on the instance, as ColossalAI does: ranks share text and image as one sequence, so
        that the first holds the text and fewer image tokens."""
        for block in (*self.double_blocks, *self.single_blocks):
            block.parallel = True

        def forward_shared(self, img, img_ids, txt, txt_ids, timesteps, y_vec, cond=None, guidance=None, **kwargs):
            img, txt, vec, pe = self.inputs(img, txt, timesteps, y_vec, cond)
            is_image = (torch.arange(pe.shape[1]) >= txt.shape[1]).chunk(dist.get_world_size())
            rank, lengths = dist.get_rank(), [int(part.sum()) for part in is_image]
            before = sum(lengths[:rank])
            text_before = sum(len(part) for part in is_image[:rank]) - before
            img = img[:, before : before + lengths[rank]].clone()
            txt = txt[:, text_before : text_before + int((~is_image[rank]).sum())].clone()
            pe = pe.chunk(dist.get_world_size(), dim=1)[rank].clone()
            for block in self.double_blocks[0 : len(self.double_blocks)]:
                img, txt = block(img, txt, vec, pe)
            img = torch.cat((txt, img), 1)
            for block in self.single_blocks[0 : len(self.single_blocks)]:
                img = block(img, vec, pe)
            mine = self.final_layer(img[:, is_image[rank]], vec)
            parts = [torch.zeros(mine.shape[0], length, mine.shape[2]) for length in lengths]
            for index, part in enumerate(parts):
                part.copy_(mine) if index == rank else None
                dist.broadcast(part, index)
            return torch.cat(parts, 1)

        self.forward = types.MethodType(forward_shared, self)
        return self


class PairBlock(nn.Module):
    parallel = False

    def __init__(self):
        super().__init__()
        self.mix = Mix()

    def forward(self, x, y, t_mlp, y_lens, x_mask=None, t0_mlp=None, T=None, S=None):
        out = self.mix(x, joint_mean(x, self.parallel) + y.mean(1, keepdim=True), t_mlp)
        if x_mask is None:
            return out
        held = self.mix(x, joint_mean(x, self.parallel) + y.mean(1, keepdim=True), t0_mlp)
        return torch.where(x_mask.repeat_interleave(S, dim=1)[:, :, None], out, held)


class Embedder(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv3d(4, WIDTH, 1)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class STDiT3(nn.Module):
    """Open-Sora 1.2's: spatial and temporal blocks in pairs; with sequence parallelism the final layer sees all
    tokens."""

    def __init__(self, seed=0, depth=3, parallel=False):
        super().__init__()
        torch.manual_seed(seed)
        self.hidden_size, self.enable_sequence_parallelism = WIDTH, parallel
        self.x_embedder = Embedder()
        self.spatial_blocks, self.temporal_blocks = (nn.ModuleList(PairBlock() for _ in range(depth)) for _ in range(2))
        self.final_layer = LastLayer(8)
        for block in (*self.spatial_blocks, *self.temporal_blocks):
            block.parallel = parallel
        self.requires_grad_(False)

    def get_dynamic_size(self, x):
        return x.shape[2:]

    def forward(self, x, timestep, y, mask=None, x_mask=None, fps=None, height=None, width=None, **kwargs):
        dtype = self.x_embedder.proj.weight.dtype
        x, y = x.to(dtype), y.to(dtype)
        frames, rows, columns = self.get_dynamic_size(x)
        area = rows * columns
        t, t0 = (
            torch.cos(level.to(dtype)[:, None] / 300 * torch.arange(WIDTH, dtype=dtype))
            for level in (timestep, torch.zeros_like(timestep))
        )
        x = self.x_embedder(x)
        if self.enable_sequence_parallelism:
            ranks = dist.get_world_size()
            x = x.unflatten(1, (frames, area)).chunk(ranks, dim=2)[dist.get_rank()].flatten(1, 2)
            area //= ranks
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks):
            x = spatial(x, y, t, None, x_mask, t0, frames, area)
            x = temporal(x, y, t, None, x_mask, t0, frames, area)
        if self.enable_sequence_parallelism:
            parts = [torch.empty_like(x) for _ in range(ranks)]
            dist.all_gather(parts, x.contiguous())
            x = torch.cat([part.unflatten(1, (frames, area)) for part in parts], dim=2).flatten(1, 2)
        x = self.final_layer(x, t)
        return x.transpose(1, 2).unflatten(2, (frames, rows, columns)).float()


class Reused:
    """An independent computation: every block runs, and at the steps of `strip` with a dot their residual is that of
    the last #. By torch's own hooks, on a model that no patch touches."""

    def __init__(self, model, strip):
        self.strip, self.step = strip, -1
        pairs = hasattr(model, "spatial_blocks")
        (model.spatial_blocks if pairs else model.double_blocks)[0].register_forward_pre_hook(self.before)
        if pairs:
            model.temporal_blocks[-1].register_forward_hook(lambda block, args, output: self.after(output))
        else:
            model.final_layer.register_forward_pre_hook(lambda layer, args: (self.after(args[0]), *args[1:]))

    def before(self, block, args):
        self.step, self.tokens = (self.step + 1) % len(self.strip), args[0]

    def after(self, tokens):
        if self.strip[self.step] == "#":
            self.residual = tokens - self.tokens
            return tokens
        return self.tokens + self.residual


class Ran:
    """One letter a call of the model: # where every block ran once, . where none did."""

    def __init__(self, model):
        self.calls, lists = [], [value for value in model.children() if isinstance(value, nn.ModuleList)]
        model.register_forward_pre_hook(lambda module, args: self.calls.append(0))
        for block in (block for blocks in lists for block in blocks):
            block.register_forward_pre_hook(lambda module, args: self.count())
        self.every = sum(map(len, lists))

    def count(self):
        self.calls[-1] += 1

    @property
    def strip(self):
        assert set(self.calls) <= {0, self.every}
        return "".join("#" if calls else "." for calls in self.calls)
