"""Run a Gradio page of a Wan2.1 or HunyuanVideo checkout on a CPU with tiny random weights, pictures an eighth of the
size and few frames: the page, its functions, the pipeline and the transformer are real; for the rest see wan_cpu.py and
hunyuan_cpu.py.

    cd /the/checkout && python tests/hosts/page_cpu.py magcache_gradio.py gradio/t2v_14B_singleGPU.py --ckpt_dir ...
    ... page_cpu.py --jobs jobs.json ...    # runs jobs of the page without a browser, see `run_jobs`

PAGE_PORT: the port to serve the page at.
"""

import functools
import gc
import hashlib
import json
import os
import runpy
import sys
import types
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(1, os.getcwd())
decoded = []  # the latents of each video of this process
fail_at = [None]  # the call of the model that ends a job, as running out of memory would


def tensor_digest(tensor):
    return hashlib.sha256(tensor.float().contiguous().cpu().numpy().tobytes()).hexdigest()[:12]


def failing(forward):
    """A forward that breaks off at the call `fail_at`."""

    @functools.wraps(forward)
    def counted(*args, **kwargs):
        if fail_at[0] is not None:
            fail_at[0] -= 1
            if fail_at[0] < 0:
                raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    return counted


def wan_pages():
    import wan_cpu

    wan = wan_cpu.import_wan()
    wan.configs.SIZE_CONFIGS |= {"720*1280": (80, 48), "1280*720": (48, 80)}
    wan.configs.MAX_AREA_CONFIGS |= {"720*1280": 80 * 48, "480*832": 96 * 64}
    for model in (wan.modules.model.WanModel, sys.modules["wan.modules.vace_model"].VaceWanModel):
        model.forward = failing(model.forward)

    class Expander:
        """What asks a service on the network, or loads a language model."""

        def __init__(self, **kwargs):
            pass

        def __call__(self, prompt, **kwargs):
            return types.SimpleNamespace(status=True, prompt=f"{prompt}, in the evening sun")

    from wan.utils import prompt_extend

    prompt_extend.DashScopePromptExpander = prompt_extend.QwenPromptExpander = Expander
    for name in ("WanT2V", "WanI2V", "WanFLF2V", "WanVace"):
        setattr(wan, name, small_pipeline(getattr(wan, name)))
    wan_cpu.WanPoolVAE.decode = noted(wan_cpu.WanPoolVAE.decode)


def small_pipeline(pipeline_class):
    class Small(pipeline_class):
        def generate(self, *args, size=None, frame_num=81, **kwargs):
            if size:
                kwargs["size"] = tuple(side // 8 // 16 * 16 for side in size)
            # Wan2.1's FLF2V renders 81 frames and no others.
            frames = frame_num if "FLF" in pipeline_class.__name__ else min(frame_num, 5)
            return super().generate(*args, frame_num=frames, **kwargs)

    Small.__module__ = pipeline_class.__module__  # where its schedulers are
    return Small


def noted(decode):
    def decode_and_note(self, latents, *args, **kwargs):
        decoded.append(tensor_digest(latents[0]))
        return decode(self, latents, *args, **kwargs)

    return decode_and_note


def hunyuan_page():
    import hunyuan_cpu

    hunyuan_cpu.import_hyvideo()
    from hyvideo.inference import HunyuanVideoSampler
    from hyvideo.modules.models import HYVideoDiffusionTransformer

    HYVideoDiffusionTransformer.forward = failing(HYVideoDiffusionTransformer.forward)
    hunyuan_cpu.HunyuanVae.decode = noted(hunyuan_cpu.HunyuanVae.decode)
    predict = HunyuanVideoSampler.predict
    HunyuanVideoSampler.predict = lambda self, video_length, **kwargs: predict(self, video_length=9, **kwargs)


def run_jobs(block, jobs):
    """Run jobs as the page's buttons would; prints one JSON line: what came of each.

    jobs: [{"inputs": {label of a component: value}, "ours": values of MagCache's controls, "fail_at": call of the model
    that raises, "press": label of a component whose event runs instead of the one that takes the steps; "plan": that
    which shows the plan}]. The output of each is {latents: digests of what was decoded, outputs: of the event, error,
    models: transformers in memory}.
    """
    results = []
    for job in jobs:
        decoded.clear()
        fail_at[0] = job.get("fail_at")
        event = event_of(block, job.get("press", "steps"))
        given = job.get("inputs", {})
        inputs = [component_value(component, given) for component in event.inputs]
        if "ours" in job:
            inputs[-6:] = job["ours"]
        try:
            outputs, error = event.fn(*inputs), ""
        except Exception as failure:
            outputs, error = None, f"{type(failure).__name__}: {failure}"
        gc.collect()
        models = sum(type(one).__name__ in ("WanModel", "VaceWanModel") for one in gc.get_objects())
        outputs = [str(one) for one in (outputs if isinstance(outputs, (tuple, list)) else [outputs])]
        results.append({"latents": list(decoded), "outputs": outputs, "error": error, "models": models})
    print("JOBS " + json.dumps(results))


def component_value(component, given):
    value = given.get(str(getattr(component, "label", None)), getattr(component, "value", None))
    if value and component.get_block_name() == "image" and component.type == "pil":
        return Image.open(value)
    return value


def event_of(block, label):
    def found(event):
        labels = [str(getattr(component, "label", "")).lower().replace("_", " ") for component in event.inputs]
        plans = [component.get_block_name() for component in event.outputs] == ["accordion", "html"]
        return plans if label == "plan" else not plans and any(one.endswith(label.lower()) for one in labels)

    # The events that change the plan take the steps, too; that of the button takes everything.
    return max(
        (event for event in block.fns.values() if event.fn and found(event)), key=lambda event: order(event, label)
    )


def order(event, label):
    return len(event.inputs) if label == "steps" else -event._id


if __name__ == "__main__":
    arguments = sys.argv[1:]
    jobs = json.loads(Path(arguments[1]).read_text()) if arguments[0] == "--jobs" else None
    arguments = arguments[2:] if jobs is not None else arguments
    torch.set_num_threads(1)
    if not Path("toy_host.py").is_file():
        hunyuan_page() if Path("hyvideo").is_dir() else wan_pages()
    import gradio

    launch = gradio.Blocks.launch

    def launched(self, *args, **options):
        if jobs is not None:
            return run_jobs(self, jobs)
        return launch(self, **{**options, "server_name": "127.0.0.1", "server_port": int(os.environ["PAGE_PORT"])})

    gradio.Blocks.launch = launched
    sys.argv = arguments
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    runpy.run_path(arguments[0], run_name="__main__")
