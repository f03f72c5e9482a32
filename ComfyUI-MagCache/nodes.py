"""The nodes. They keep the ids and inputs of the released ComfyUI-MagCache, so that its workflows open; new inputs come
last."""

from __future__ import annotations

import inspect
import logging
import tempfile
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import torch
from comfy_api.latest import ComfyExtension, io, ui
from comfy_api.torch_helpers import set_torch_compile_wrapper
from PIL import Image

from .caching import LIMIT, NodeCache
from .common.scripts.plots import plot_schedule
from .measuring import NodeCalibration, ratios_text, schedule_of
from .models import MODEL_TYPES
from .page import Speaker

CATEGORY = "MagCache"
PACKAGE = Path(__file__).resolve().parent
OURS = {f"custom_nodes.{name}" for name in (PACKAGE.name, PACKAGE.parent.name)}  # this folder, or the clone with it
CALIBRATED = io.Custom("MAGCACHE_CALIBRATION")
RELEASED_CALIBRATIONS = (
    "chroma_calibration",
    "flux_calibration",
    "flux_kontext_calibration",
    "hunyuanvideo1.5",
    "qwen_image",
)
RECOMMENDED = -1  # of a threshold: as recommended for the model type
ADVANCED = {"advanced": True}  # folded, on pages that can fold inputs


class MagCacheNode(io.ComfyNode):
    """Skips steps of a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MagCache",
            display_name="MagCache",
            category=CATEGORY,
            description=(
                "Renders up to 2-3x faster: the model runs at some of the steps, and its output at the others is "
                "predicted. Works with nearly every model; set speedup to how many times faster."
            ),
            inputs=[
                io.Model.Input("model", tooltip="From Load Diffusion Model or Load LoRA, in any order."),
                io.Combo.Input(
                    "model_type",
                    options=["auto", *MODEL_TYPES],
                    default="auto",
                    tooltip=(
                        "Which published magnitude ratios and settings to use; auto recognises the model. Your own "
                        "calibration of the model takes precedence. If the node cannot tell Wan2.1 from Wan2.2, "
                        "choose here."
                    ),
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "magcache_thresh",
                    default=RECOMMENDED,
                    min=RECOMMENDED,
                    max=10.0,
                    step=0.01,
                    tooltip=(
                        "Only while speedup is 0 (the paper's rule): bound on the accumulated error. Higher is faster "
                        "and less exact; 0 turns MagCache off; -1 is the recommended value: FLUX and Wan 14B 0.24 (at "
                        "most 3x), Wan 1.3B 0.12 (at most 2.4x), Chroma 0.1."
                    ),
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "retention_ratio",
                    default=RECOMMENDED,
                    min=RECOMMENDED,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Share of the steps, from the first, that always compute: they fix the composition. -1: "
                        "recommended. 0.2 allows at most 5x."
                    ),
                    extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "magcache_K",
                    default=RECOMMENDED,
                    min=RECOMMENDED,
                    max=100,
                    tooltip=(
                        "Most skipped steps in a row; 0 turns MagCache off; -1: recommended. K allows at most "
                        "(K + 1)x: 2 for 3x."
                    ),
                    extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "start_step",
                    default=0,
                    min=-1000,
                    max=1000,
                    optional=True,
                    tooltip="First step that may be skipped; negative counts from the end.",
                    extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "end_step",
                    default=-1,
                    min=-1000,
                    max=1000,
                    optional=True,
                    tooltip="Last step that may be skipped; negative counts from the end: -1 is the last step.",
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "speedup",
                    default=0.0,
                    min=0.0,
                    max=5.0,
                    step=0.1,
                    optional=True,
                    display_mode=io.NumberDisplay.slider,
                    tooltip=(
                        "How many times faster; costs quality. 1.5 is close to the plain image, 2 to 2.5 is usual. 0: "
                        "recommended (the published settings of the model; 2 where there are none)."
                    ),
                ),
                io.Combo.Input(
                    "cache_device",
                    options=["gpu", "cpu"],
                    default="gpu",
                    optional=True,
                    tooltip=(
                        "Where residuals are kept between steps. cpu saves GPU memory (Wan 14B at 720p: about 0.8 GB "
                        "per branch) but costs time for the transfer. With speedup there is little to keep."
                    ),
                    extra_dict=ADVANCED,
                ),
                io.String.Input(
                    "mag_ratios",
                    default="",
                    optional=True,
                    tooltip="Preset name or calibration file to use instead of what model_type finds.",
                    extra_dict=ADVANCED,
                ),
                io.Boolean.Input(
                    "corrector",
                    default=True,
                    optional=True,
                    tooltip=(
                        "With the samplers euler and ddim: correct skipped steps when the next one is computed. Costs "
                        "no model call."
                    ),
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "cache_limit",
                    default=LIMIT,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    optional=True,
                    tooltip=(
                        "GiB that a run may keep between steps. What does not fit is computed, and the node says so. "
                        "Context windows that move keep the most."
                    ),
                    extra_dict=ADVANCED,
                ),
                io.Combo.Input(
                    "measure_first_run",
                    options=["auto", "on", "off"],
                    default="auto",
                    optional=True,
                    tooltip=(
                        "For a model without ratios while speedup is 0: compute every step of the first run and "
                        "measure it, so that the paper's rule can skip from the next queue on. auto: if "
                        "magcache_thresh, retention_ratio, magcache_K or a window of steps is set, which need ratios. "
                        "on: always. off: never; a speed-up of 2 is used."
                    ),
                    extra_dict=ADVANCED,
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        model_type: str,
        magcache_thresh: float,
        retention_ratio: float,
        magcache_K: int,
        start_step: int = 0,
        end_step: int = -1,
        speedup: float = 0.0,
        cache_device: str = "gpu",
        mag_ratios: str = "",
        corrector: bool = True,
        cache_limit: float = LIMIT,
        measure_first_run: str = "auto",
    ) -> io.NodeOutput:
        """The model with MagCache. Inputs: as in the schema."""
        given = {"magcache_thresh": magcache_thresh, "retention_ratio": retention_ratio, "magcache_K": magcache_K}
        thresholds = {name: value for name, value in given.items() if value >= 0}
        magcache = NodeCache(
            Speaker(cls.hidden),
            model_type,
            thresholds,
            start_step,
            end_step,
            speedup,
            torch.device("cpu") if cache_device == "cpu" else None,
            mag_ratios.strip(),
            corrector,
            cache_limit,
            measure_first_run,
        )
        return io.NodeOutput(magcache.on(model))


class MagCacheCalibrationNode(io.ComfyNode):
    """Measures the magnitude ratios of a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MagCacheCalibration",
            display_name="MagCache Calibration",
            category=CATEGORY,
            description=(
                "Measures the magnitude ratios of a model in one plain run, which computes every step. From then on "
                "MagCache nodes find the file automatically."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model with the LoRAs you render with, without a MagCache node."),
                io.Combo.Input(
                    "model_type",
                    options=["auto", *RELEASED_CALIBRATIONS],
                    default="auto",
                    optional=True,
                    tooltip=("Has no effect: the model is recognised. Kept for workflows of the released node."),
                ),
            ],
            outputs=[io.Model.Output(), CALIBRATED.Output(display_name="calibration")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, model_type: str = "auto") -> io.NodeOutput:
        """The model, to be measured, and its calibration."""
        calibration = NodeCalibration(Speaker(cls.hidden))
        return io.NodeOutput(calibration.on(model), calibration)


class MagCacheCalibrationResultNode(io.ComfyNode):
    """Shows what a calibration measured."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MagCacheCalibrationResult",
            display_name="MagCache Calibration Result",
            category=CATEGORY,
            description="The ratios that a calibration measured, as text and as a plot, once the sampler has finished.",
            inputs=[
                CALIBRATED.Input("calibration", tooltip="From MagCache Calibration."),
                io.Latent.Input(
                    "latent", tooltip="From the sampler of the calibrated model, so that this node waits for it."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="plot"),
                io.String.Output(display_name="mag_ratios"),
                io.String.Output(display_name="file"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, calibration: NodeCalibration, latent: Any) -> io.NodeOutput:
        """(plot as image (1, height, width, 3) in 0..1, ratios as text, name of the file). Raises RuntimeError if the
        calibration failed."""
        if calibration.failure:
            raise RuntimeError(f"MagCache Calibration has nothing to show: {calibration.failure}.")
        table, text = calibration.table, ratios_text(calibration.table)
        with tempfile.TemporaryDirectory() as folder:
            picture = Path(folder) / "ratios.png"
            plot_schedule(picture, schedule_of(table), np.asarray(table.sigmas), table.name)
            with Image.open(picture) as opened:
                plot = torch.from_numpy(np.asarray(opened.convert("RGB"), dtype=np.float32) / 255)[None]
        shown = {**ui.PreviewImage(plot, cls=cls).as_dict(), "text": (text,)}
        return io.NodeOutput(plot, text, str(calibration.path), ui=shown)


class CompileModelNode(io.ComfyNode):
    """Compiles a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CompileModel",
            display_name="Compile Model",
            category=CATEGORY,
            description=(
                "torch.compile of the diffusion model, before or after MagCache: the same steps are skipped. The first "
                "run takes longer."
            ),
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input(
                    "mode",
                    options=["default", "max-autotune", "max-autotune-no-cudagraphs", "reduce-overhead"],
                    default="default",
                    tooltip="How long the inductor backend searches for faster kernels.",
                ),
                io.Combo.Input("backend", options=["inductor", "cudagraphs", "eager", "aot_eager"], default="inductor"),
                io.Boolean.Input(
                    "fullgraph", default=False, tooltip="Fail if the model does not compile in one piece."
                ),
                io.Boolean.Input("dynamic", default=False, tooltip="One graph for all image sizes; a little slower."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, mode: str, backend: str, fullgraph: bool, dynamic: bool) -> io.NodeOutput:
        """The model, which compiles in its first run."""
        # Compiled weights must not move; older versions of ComfyUI have no models that move them.
        fixed = {"disable_dynamic": True} if "disable_dynamic" in inspect.signature(model.clone).parameters else {}
        patched = model.clone(**fixed)
        # Transformer options change at each step, but no graph depends on them.
        options = {"guard_filter_fn": ignore_transformer_options}
        if backend == "inductor" and mode != "default":
            options |= torch._inductor.list_mode_options(mode)
        set_torch_compile_wrapper(patched, backend=backend, options=options, fullgraph=fullgraph, dynamic=dynamic)
        return io.NodeOutput(patched)


def ignore_transformer_options(guards: list[Any]) -> list[bool]:
    """A guard filter of torch.compile: which guards to keep."""
    return ["transformer_options" not in guard.name for guard in guards]


NODES = [MagCacheNode, MagCacheCalibrationNode, MagCacheCalibrationResultNode, CompileModelNode]


class MagCacheExtension(ComfyExtension):
    """The package, as ComfyUI loads it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The nodes, except those of which another package has the ids; that is logged."""
        from nodes import NODE_CLASS_MAPPINGS

        taken = {}
        for node in NODES:
            other = NODE_CLASS_MAPPINGS.get(node.GET_SCHEMA().node_id)
            module = getattr(other, "RELATIVE_PYTHON_MODULE", None) or getattr(other, "__module__", None)
            if other is not None and module not in OURS:
                taken[node] = module
        if taken:
            logging.warning(
                f"MagCache: {', '.join(sorted(set(taken.values())))} already provides the nodes "
                f"{', '.join(node.GET_SCHEMA().node_id for node in taken)}, so those of {PACKAGE} are not loaded: "
                "keep one of the two packages."
            )
        else:
            for other in released_packages():
                logging.warning(
                    f"MagCache: {other} is a MagCache package with nodes of the same names as those of {PACKAGE}; if "
                    "it loads, the later of the two takes them: keep one."
                )
        return [node for node in NODES if node not in taken]


def released_packages() -> list[Path]:
    """Folders of custom nodes that hold the released ComfyUI-MagCache, not this repository."""
    found = []
    for root in folder_paths.get_folder_paths("custom_nodes"):
        for path in Path(root).glob("*/pyproject.toml"):
            text, folder = path.read_text(encoding="utf-8", errors="replace"), path.parent
            ours = PACKAGE.is_relative_to(folder.resolve()) or folder.suffix == ".disabled"
            if not ours and 'name = "magcache"' in text and "[tool.comfy]" in text:
                found.append(folder)
    return found


async def comfy_entrypoint() -> MagCacheExtension:
    """Called by ComfyUI."""
    return MagCacheExtension()
