"""Wan2.1's own Gradio pages with MagCache in them: the same flags, the same files, two to three times faster.

    python magcache_gradio.py gradio/t2v_14B_singleGPU.py --ckpt_dir ./Wan2.1-T2V-14B

Belongs beside generate.py in a Wan2.1 checkout, with magcache_generate.py and `common/`. The pages are in its folder
`gradio`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from magcache_generate import HERE, PIPELINES, SETTINGS, TABLES

from common.errors import MagCacheError
from common.scripts.checkout import one_sentence
from common.scripts.flags import named_settings
from common.scripts.page import Jobs, PageSession, flags_of_page, run_page, when_imported
from common.scripts.wan import published_for_task, wan_with_session

# Pages that load their model only when a size is chosen; the task of the others is known once they load it.
LATER = {"i2v_14B_singleGPU": "i2v-14B", "fl2v_14B_singleGPU": "flf2v-14B"}


@one_sentence
def main() -> None:
    """Run the page that the first argument names, with MagCache."""
    args, argv = flags_of_page(sys.argv[1:], "wan")
    page, sys.argv = page_named(argv), argv
    jobs, tasks = Jobs(args), [LATER.get(page.stem)]
    with when_imported("wan", lambda wan: put_on(wan, jobs, tasks)):
        run_page(page, jobs, lambda: SETTINGS[tasks[-1]])


def page_named(argv: list[str]) -> Path:
    """The script of the page that the first argument names, also by its name in the folder `gradio`. Raises
    MagCacheError if there is none."""
    name = Path(argv[0] if argv else "")
    for path in (name, HERE / "gradio" / name.name):
        if path.suffix == ".py" and path.is_file():
            return path.resolve()
    pages = ", ".join(sorted(path.name for path in (HERE / "gradio").glob("*.py")))
    raise MagCacheError(
        "Name one of the pages first, as in python magcache_gradio.py gradio/t2v_14B_singleGPU.py --ckpt_dir "
        f"./Wan2.1-T2V-14B; those of this checkout are {pages or 'not here: there is no folder gradio'}."
    )


def put_on(wan: Any, jobs: Jobs, tasks: list[str | None]) -> None:
    """Replace the pipelines of the package `wan` by subclasses that render as the page's job asks. tasks: gets the task
    of each pipeline that is loaded."""

    def on_pages(pipeline_class):
        def its_session(*args, **kwargs):
            return session_of_rendering(jobs, wan, *args, **kwargs)

        class OnPage(wan_with_session(pipeline_class, its_session)):
            def __init__(self, config, *args, **kwargs):
                self.task = task_of(wan, config, pipeline_class)
                tasks.append(self.task)
                super().__init__(config, *args, **kwargs)

            if hasattr(pipeline_class, "prepare_source"):

                def prepare_source(self, *args, num_frames, image_size, **kwargs):
                    if not jobs.planning:
                        return super().prepare_source(*args, num_frames=num_frames, image_size=image_size, **kwargs)
                    width, height = image_size
                    return [torch.empty(3, num_frames, height, width, device="meta")], None, None

        return OnPage

    import torch

    for name in PIPELINES:
        setattr(wan, name, on_pages(getattr(wan, name)))
    wan.WanVaceMP = refuse_processes


def refuse_processes(*args: Any, **kwargs: Any) -> None:
    """In place of the pipeline of --mp. Raises MagCacheError."""
    raise MagCacheError(
        "MagCache does not reach the processes that --mp starts: leave it out, or render on several GPUs with torchrun "
        "and magcache_generate.py."
    )


def task_of(wan: Any, config: Any, pipeline_class: type) -> str:
    """The task of a pipeline: the checkout's name of its configuration, which VACE shares with text-to-video."""
    vace = hasattr(pipeline_class, "prepare_source")
    known = wan.configs.WAN_CONFIGS.items()
    return next(task for task, one in known if one is config and task.startswith("vace") is vace)


def session_of_rendering(
    jobs: Jobs,
    wan: Any,
    pipe: Any,
    prompt: str,
    source: Any = None,
    *args: Any,
    sampling_steps: int,
    shift: float,
    seed: int,
    guide_scale: float,
    size: tuple[int, int] | None = None,
    **kwargs: Any,
) -> PageSession | None:
    """`Jobs.session` for a call of the pipeline's `generate`. source: an image, or a list of videos (channels, frames,
    height, width); size: (width, height) in pixels."""
    width, height = size or size_of(wan, kwargs["max_area"])
    frames = source[0].shape[1] if isinstance(source, list) else kwargs.get("frame_num", 81)

    def make(**options):
        task = argparse.Namespace(ckpt_dir=pipe.checkpoint_dir, size=f"{width}*{height}", frame_num=frames)
        return PageSession(
            script_settings=named_settings(SETTINGS[pipe.task]),
            task=pipe.task,
            size=f"{width}x{height}",
            frames=frames,
            steps=sampling_steps,
            preset=published_for_task(task, TABLES, pipe.task),
            about={"prompt": prompt, "seed": seed, "solver": "unipc", "shift": shift, "guide_scale": guide_scale},
            family="wan",
            weights=pipe.checkpoint_dir,
            **options,
        )

    def levels():
        from wan.utils.fm_solvers_unipc import FlowUniPCMultistepScheduler

        scheduler = FlowUniPCMultistepScheduler(
            num_train_timesteps=pipe.num_train_timesteps, shift=1, use_dynamic_shifting=False
        )
        scheduler.set_timesteps(sampling_steps, device="cpu", shift=shift)
        return (scheduler.timesteps.double() / pipe.num_train_timesteps).numpy()

    return jobs.session(make, pipe.checkpoint, levels)


def size_of(wan: Any, area: int) -> tuple[int, int]:
    """The checkout's (width, height) for a number of pixels; of two, the wider."""
    return max(size for size in wan.configs.SIZE_CONFIGS.values() if size[0] * size[1] == area)


if __name__ == "__main__":
    main()
