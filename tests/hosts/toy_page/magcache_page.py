"""The drop-in of that page."""

import sys
from pathlib import Path

import conftest

from common.calibration import fingerprint
from common.ratios import flow_sigmas
from common.scripts.checkout import one_sentence
from common.scripts.page import Jobs, PageSession, flags_of_page, run_page, when_imported

SETTINGS = {"magcache_thresh": 1.0, "magcache_K": 2, "retention_ratio": 0.2}


@one_sentence
def main():
    args, argv = flags_of_page(sys.argv[1:], "flux")
    jobs = Jobs(args)

    def put_on(host):
        class OnPage(host.Pipeline):
            def generate(self, prompt, steps, shift):
                sampler, draw = self.sampler, super().generate
                checkpoint = fingerprint(sampler.model)

                def make(**options):
                    named = {"task": "toy", "size": "8x8", "frames": 1, "preset": None, "about": {"prompt": prompt}}
                    return PageSession(script_settings=SETTINGS, steps=steps, family="flux", **named, **options)

                session = jobs.session(make, checkpoint, lambda: flow_sigmas(steps, shift))
                if session is None:
                    return draw(prompt, steps, shift)
                session.patch(sampler.model, conftest.FLUX, lambda: sampler.timesteps, checkpoint)
                try:
                    return session.render(lambda steps: draw(prompt, steps, shift), steps)
                finally:
                    session.unpatch()

        host.Pipeline = OnPage

    with when_imported("toy_host", put_on):
        run_page(Path(argv[0]).resolve(), jobs, lambda: tuple(SETTINGS.values()))


if __name__ == "__main__":
    main()
