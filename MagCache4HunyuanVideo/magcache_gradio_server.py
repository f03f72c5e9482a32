"""HunyuanVideo's own Gradio page with MagCache in it: the same flags, the same files, two to three times faster.

    python3 magcache_gradio_server.py --flow-reverse

Belongs beside gradio_server.py in a HunyuanVideo checkout, with magcache_sample_video.py and `common/`.
"""

from __future__ import annotations

import sys
from typing import Any

from magcache_sample_video import HERE, MAGCACHE_K, MAGCACHE_THRESH, RETENTION_RATIO, nearest_published

from common.calibration import fingerprint
from common.errors import MagCacheError
from common.hosts.checkouts import HUNYUANVIDEO_CHECKOUT
from common.ratios import flow_sigmas
from common.scripts.checkout import one_sentence
from common.scripts.page import Jobs, PageSession, flags_of_page, run_page, when_imported

SETTINGS = {"magcache_thresh": MAGCACHE_THRESH, "magcache_K": MAGCACHE_K, "retention_ratio": RETENTION_RATIO}


@one_sentence
def main() -> None:
    """Run the checkout's page with MagCache."""
    page = HERE / "gradio_server.py"
    if not page.is_file():
        raise MagCacheError(
            "There is no gradio_server.py of HunyuanVideo beside this script: python -m common install "
            "MagCache4HunyuanVideo /path/to/HunyuanVideo puts it there."
        )
    args, argv = flags_of_page(sys.argv[1:], "hunyuanvideo-t2v")
    sys.argv, jobs = [str(page), *argv], Jobs(args)

    def replace_sampler(inference: Any) -> None:
        inference.HunyuanVideoSampler = on_page(inference.HunyuanVideoSampler, jobs)

    with when_imported("hyvideo.inference", replace_sampler):
        run_page(page, jobs, lambda: tuple(SETTINGS.values()))


def on_page(sampler_class: Any, jobs: Jobs) -> type:
    """A subclass of the checkout's sampler that renders as the page's job asks."""

    class OnPage(sampler_class):
        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            if not kwargs["args"].flow_reverse:
                raise MagCacheError(
                    "Without --flow-reverse the sampler goes from noise level 0 to 1, where no ratios hold: add it, as "
                    "HunyuanVideo's own command does, or run gradio_server.py itself."
                )
            return super().from_pretrained(*args, **kwargs)

        def load_diffusion_pipeline(self, *args, **kwargs):
            pipe = super().load_diffusion_pipeline(*args, **kwargs)
            self.checkpoint = fingerprint(pipe.transformer)
            return pipe

        def predict(self, *args, infer_steps, **kwargs):
            def draw(steps):
                return sampler_class.predict(self, *args, infer_steps=steps, **kwargs)

            session = session_of_job(jobs, self, infer_steps, **kwargs)
            if session is None:
                return draw(infer_steps)
            scheduler = lambda: self.pipeline.scheduler  # noqa: E731  a new one in each rendering
            session.patch(
                self.pipeline.transformer,
                HUNYUANVIDEO_CHECKOUT,
                lambda: scheduler().timesteps,
                self.checkpoint,
                scheduler=scheduler,
            )
            try:
                return session.render(draw, infer_steps)
            finally:
                session.unpatch()

    return OnPage


def session_of_job(
    jobs: Jobs,
    sampler: Any,
    steps: int,
    *,
    prompt: str,
    width: int,
    height: int,
    video_length: int,
    flow_shift: float,
    **kwargs: Any,
) -> PageSession | None:
    """`Jobs.session` for a call of the sampler's `predict`. width, height: in pixels; video_length: in frames."""
    about = {
        "prompt": prompt,
        "flow_shift": flow_shift,
        "use_fp8": sampler.args.use_fp8,
        **{name: kwargs[name] for name in ("seed", "guidance_scale", "embedded_guidance_scale")},
    }

    def make(**options):
        return PageSession(
            script_settings=SETTINGS,
            task="hunyuanvideo-t2v",
            size=f"{width}x{height}",
            frames=video_length,
            steps=steps,
            preset=nearest_published(sampler.args.model, width * height),
            about=about,
            family="hunyuanvideo-t2v",
            **options,
        )

    return jobs.session(make, sampler.checkpoint, lambda: flow_sigmas(steps, flow_shift))


if __name__ == "__main__":
    main()
