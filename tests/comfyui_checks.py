"""What must hold of the ComfyUI nodes, run by comfyui_worker.py against real ComfyUI code and tiny random models."""
import sys
from pathlib import Path

import comfy.model_management
import comfy.samplers
import folder_paths
import nodes
import numpy as np
import torch
from comfy.patcher_extension import WrappersMP
from comfyui_models import build, latent, prompt

PACKAGE = next(name for name in sys.modules if name.endswith("ComfyUI-MagCache"))
wrappers, models, package_nodes = (sys.modules[f"{PACKAGE}.{name}"] for name in ("wrappers", "models", "nodes"))
ratios, schedules, blocks = (sys.modules[f"{PACKAGE}.common.{name}"] for name in ("ratios", "schedule", "blocks"))
WORK = Path(folder_paths.get_output_directory())
# Reuses ##..#..#..#. of twelve steps, with both branches a little different.
SETTINGS = {"magcache_thresh": 1.0, "magcache_K": 2, "retention_ratio": 0.2}
STEPS = 12


def table(steps=28, name="tiny", **more):
    made = ratios.MagRatios(name=name, origin="measured", sigmas=tuple(ratios.flow_sigmas(steps, 3.0)),
                            mag_ratios={"cond": [1.0] + [0.98] * (steps - 1), "uncond": [1.0] + [0.97] * (steps - 1)}, **more)
    path = WORK / f"{name}.json"
    ratios.write(path, made)
    return str(path)


class Said(list):
    def __call__(self, text):
        self.append(text)


def cached(patcher, **options):
    """(patched model, what it says, the runs that it makes)."""
    said = Said()
    magcache = wrappers.MagCache(said, **{"thresholds": SETTINGS, "mag_ratios": table(), **options})
    return magcache.on(patcher), said


def sample(patcher, family="flux", steps=STEPS, cfg=3.0, sampler="euler", scheduler="simple", seed=0, denoise=1.0, batch=1,
           positive=None, negative=None, samples=None):
    made = nodes.KSampler().sample(patcher, seed, steps, cfg, sampler, scheduler, positive or prompt(0), negative or prompt(1),
                                   {"samples": latent(family, batch) if samples is None else samples}, denoise)
    return made[0]["samples"]


def transformer(patcher):
    return patcher.model.diffusion_model


class Watched:
    """Hooks on an unpatched transformer: what enters its first block and its final layer, and which calls ran blocks."""

    def __init__(self, patcher):
        model = transformer(patcher)
        self.host = models.host_of(model)
        first = next(blocks for blocks in (getattr(model, name) for name in self.host.blocks) if len(blocks))[0]
        self.before, self.ran, self.sigmas, self.uuids = None, [], [], None
        self.hooks = [first.register_forward_pre_hook(self.enter, with_kwargs=True),
                      getattr(model, self.host.final_layer).register_forward_pre_hook(self.leave)]
        self.patcher = patcher.clone()
        self.patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "watch", self.call)

    def call(self, executor, *args, **kwargs):
        options = args[5]
        self.sigma, self.uuids = float(options["sigmas"][0]), options["uuids"]
        self.sigmas.append(self.sigma)
        self.ran.append(False)
        return executor(*args, **kwargs)

    def enter(self, module, args, kwargs):
        key = self.host.image_tokens
        self.ran[-1] = True
        self.before = (args[key] if isinstance(key, int) else kwargs[key]).clone()

    def leave(self, module, args):
        return None

    @property
    def strip(self):
        return "".join(".#"[ran] for ran in self.ran)

    def remove(self):
        for hook in self.hooks:
            hook.remove()


class Oracle(Watched):
    """What caching must give, made the expensive way: all blocks run at every step, and where `reuse` says so the final layer
    gets the tokens that entered the first block plus the residual of each conditioning's last computed call."""

    def __init__(self, patcher, reuse, levels):
        super().__init__(patcher)
        self.reuse, self.levels, self.residuals = reuse, np.asarray(levels), {}

    def leave(self, module, args):
        after, *rest = args
        before = self.before[:, -after.shape[1]:]
        rows = after.shape[0] // len(self.uuids)
        step = max(0, int((self.levels >= self.sigma * 0.9999).sum()) - 1)
        if self.reuse[step]:
            return before + torch.cat([self.residuals[uuid] for uuid in self.uuids]), *rest
        for index, uuid in enumerate(self.uuids):
            self.residuals[uuid] = (after - before)[index * rows:(index + 1) * rows]


def levels_of(patcher, steps=STEPS, scheduler="simple", denoise=1.0):
    total = int(steps / denoise)
    return comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), scheduler, total)[-steps - 1:-1].tolist()


def plan(levels, settings=SETTINGS):
    return schedules.magcache_schedule(ratios.load(table()).at(levels), schedules.Settings(**settings))


def untouched(model, state):
    """Nothing of ours is left on a transformer."""
    assert type(model).__mro__ == state[0] and set(model.__dict__) == state[1]


def state_of(model):
    return type(model).__mro__, set(model.__dict__)


# Every family


def nothing_skipped_is_plain(family, cfg):
    patcher = build(family)
    plain = sample(patcher, family, cfg=cfg, steps=5)
    before = state_of(transformer(patcher))
    for off in ({"magcache_thresh": 0.0}, {"magcache_K": 0}, {"retention_ratio": 1.0}):
        patched, said = cached(patcher, thresholds={**SETTINGS, **off})
        assert torch.equal(sample(patched, family, cfg=cfg, steps=5), plain), off
        assert "nothing will be reused" in said[0], said
        untouched(transformer(patcher), before)


def reuse_is_what_it_should_be(family, cfg):
    """Bit for bit the oracle's latent; exactly the planned steps run their blocks; twice the same; nothing is left behind."""
    patcher = build(family)
    levels = levels_of(patcher)
    schedule = plan(levels)
    assert schedule.strip == "##..#..#..#.", schedule.strip
    plain = sample(patcher, family, cfg=cfg)
    oracle = Oracle(patcher, schedule.reuse, levels)
    expected = sample(oracle.patcher, family, cfg=cfg)
    oracle.remove()
    assert not torch.allclose(expected, plain)

    before = state_of(transformer(patcher))
    patched, said = cached(patcher)
    watched = Watched(patched)
    for _ in range(2):
        watched.ran.clear()
        result = sample(watched.patcher, family, cfg=cfg)
        assert torch.equal(result, expected)
        per_step = len(watched.ran) // STEPS
        assert watched.strip[::per_step] == schedule.strip and per_step * STEPS == len(watched.ran)
    watched.remove()
    untouched(transformer(patcher), before)
    assert "MagCache plan: 12 steps" in said[0] and "7 reused" in said[1] and "s saved" in said[1], said
