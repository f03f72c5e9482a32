"""What the checks of the ComfyUI nodes share: the node with settings, a sampler, and what caching has to give, made the
expensive way."""

import sys
from pathlib import Path

import comfy.model_management
import comfy.samplers
import folder_paths
import nodes
import numpy as np
import torch
from comfy.patcher_extension import WrappersMP
from comfyui_models import latent, prompt

PACKAGE = next(name for name in sys.modules if name.endswith("ComfyUI-MagCache"))
caching, fingerprints, measuring, models, passes, package_nodes = (
    sys.modules[f"{PACKAGE}.{name}"] for name in ("caching", "fingerprints", "measuring", "models", "passes", "nodes")
)
ratios, tables, schedules, blocks, hosts, errors = (
    sys.modules[f"{PACKAGE}.common.{name}"] for name in ("ratios", "tables", "schedule", "blocks", "hosts", "errors")
)
WORK = Path(folder_paths.get_output_directory())
# Reuses ##..#..#..#. of twelve steps, with both branches a little different.
SETTINGS = {"magcache_thresh": 1.0, "magcache_K": 2, "retention_ratio": 0.2}
STEPS = 12


def tiny_table(steps=28, name="tiny", **more):
    made = tables.RatioTable(
        name=name,
        origin="measured",
        sigmas=tuple(ratios.flow_sigmas(steps, 3.0)),
        mag_ratios={"cond": [1.0] + [0.98] * (steps - 1), "uncond": [1.0] + [0.97] * (steps - 1)},
        **more,
    )
    path = WORK / f"{name}.json"
    tables.write(path, made)
    return str(path)


class Said(list):
    def __call__(self, text, picture="", begin=False):
        self.append(text)


def cached_patcher(patcher, **options):
    """(patched model, what it says, the runs that it makes)."""
    said = Said()
    magcache = caching.NodeCache(
        said, **{"thresholds": SETTINGS, "mag_ratios": tiny_table(), "corrector": False, **options}
    )
    return magcache.on(patcher), said


def sample(
    patcher,
    family="flux",
    steps=STEPS,
    cfg=3.0,
    sampler="euler",
    scheduler="simple",
    seed=0,
    denoise=1.0,
    batch=1,
    positive=None,
    negative=None,
    samples=None,
):
    made = nodes.KSampler().sample(
        patcher,
        seed,
        steps,
        cfg,
        sampler,
        scheduler,
        positive or prompt(0, family),
        negative or prompt(1, family),
        {"samples": latent(family, batch) if samples is None else samples},
        denoise,
    )
    return made[0]["samples"]


def transformer_of(patcher):
    return patcher.model.diffusion_model


class Watched:
    """Hooks on an unpatched transformer: what enters its first block and its final layer, and which calls ran
    blocks."""

    def __init__(self, patcher):
        model = transformer_of(patcher)
        self.host = hosts.host_of(model)
        lists = [blocks for blocks in (getattr(model, name) for name in self.host.blocks) if len(blocks)]
        first, last = lists[0][0], lists[-1][-1]
        self.before, self.asked, self.ran, self.sigmas, self.branches = None, None, [], [], []
        self.hooks = [
            first.register_forward_pre_hook(self.enter, with_kwargs=True),
            getattr(model, self.host.final_layer).register_forward_pre_hook(self.leave)
            if self.host.final_layer
            else last.register_forward_hook(lambda module, args, output: self.leave(module, (output,))),
        ]
        self.patcher = patcher.clone()
        self.patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "watch", self.call)

    def call(self, executor, *args, **kwargs):
        options = args[5]
        window = options.get("context_window")
        replaced = sorted(map(str, options.get("patches_replace", {}).get("dit", {})))
        circumstances = window and tuple(window.index_list), str(replaced)
        uuids = options["uuids"]
        self.sigma = float(options["sigmas"][0])
        self.keys = [(uuid, uuids[:index].count(uuid), *circumstances) for index, uuid in enumerate(uuids)]
        self.branches.append(list(options["cond_or_uncond"]))
        self.sigmas.append(self.sigma)
        self.ran.append(False)
        asked, self.asked = self.asked, (args[0].data_ptr(), self.sigma, self.keys)
        made = executor(*args, **kwargs)
        if not self.ran[-1] and self.ran[-2:-1] == [True] and self.asked == asked:
            # The proof of the class's facts makes a computed call again, without its blocks.
            del self.ran[-1], self.sigmas[-1], self.branches[-1]
        return made

    def enter(self, module, args, kwargs):
        key = self.host.image_tokens
        self.ran[-1] = True
        self.before = (args[key] if isinstance(key, int) else kwargs[key]).clone()

    def leave(self, module, args):
        self.after = args[0]

    @property
    def strip(self):
        return "".join(".#"[ran] for ran in self.ran)

    def remove(self):
        for hook in self.hooks:
            hook.remove()


class ComfyOracle(Watched):
    """What caching must give, made the expensive way: all blocks run at every step, and where `reuse` says so the final
    layer gets the tokens that entered the first block plus the residual of the last computed call with the same
    conditioning, window and replaced blocks. A call for which there is none computes."""

    def __init__(self, patcher, reuse, levels):
        super().__init__(patcher)
        self.reuse, self.levels, self.residuals = reuse, np.asarray(levels), {}

    def leave(self, module, args):
        after, *rest = args
        count = after.shape[1]
        before = self.before[:, :count] if self.host.tokens_lead else self.before[:, -count:]
        rows = after.shape[0] // len(self.keys)
        step = max(0, int((self.levels >= self.sigma * 0.9999).sum()) - 1)
        if self.reuse[step] and all(key in self.residuals for key in self.keys):
            return before + torch.cat([self.residuals[key] for key in self.keys]), *rest
        for index, key in enumerate(self.keys):
            self.residuals[key] = (after - before)[index * rows : (index + 1) * rows]


def sampler_levels(patcher, steps=STEPS, scheduler="simple", denoise=1.0):
    total = int(steps / denoise)
    return comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), scheduler, total)[
        -steps - 1 : -1
    ].tolist()


def expected_of(patcher, family="flux", begins=None, **options):
    """The oracle's latent at the levels of a run, and the schedule. begins: noise level at which a conditioning begins,
    so that the step there computes."""
    run = {key: value for key, value in options.items() if key in ("steps", "scheduler", "denoise")}
    levels = sampler_levels(patcher, **run)
    schedule = plan_of_levels(levels)
    reuse = schedule.reuse.copy()
    if begins is not None:
        reuse[next(step for step, level in enumerate(levels) if level <= 1.0001 * begins)] = False
    oracle = ComfyOracle(patcher, reuse, levels)
    made = sample(oracle.patcher, family, **options)
    oracle.remove()
    return made, schedule


def plan_of_levels(levels, settings=SETTINGS):
    return schedules.magcache_schedule(tables.load(tiny_table()).at(levels), schedules.Settings(**settings))


def untouched(model, state):
    """Nothing of ours is left on a transformer."""
    assert type(model).__mro__ == state[0] and set(model.__dict__) == state[1]


def model_state(model):
    return type(model).__mro__, set(model.__dict__)


def lora_of(patcher):
    """A random LoRA for one weight of a tiny FLUX, as a file holds it."""
    made, name = torch.Generator().manual_seed(1), "double_blocks.0.img_mlp.0"
    height, width = transformer_of(patcher).double_blocks[0].img_mlp[0].weight.shape
    return {
        f"diffusion_model.{name}.lora_up.weight": torch.randn(height, 2, generator=made),
        f"diffusion_model.{name}.lora_down.weight": torch.randn(2, width, generator=made),
    }


def nodes_of(module):
    import importlib

    return importlib.import_module(f"comfy_extras.{module}")


def calibrated_patcher(patcher, family="flux", **options):
    said = Said()
    calibration = measuring.NodeCalibration(said)
    return calibration, sample(calibration.on(patcher), family, **options), said
