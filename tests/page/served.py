"""Pages of checkouts run by hosts/page_cpu.py: jobs without a browser, or served for Chromium."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

HARNESS = Path(__file__).resolve().parents[1] / "hosts" / "page_cpu.py"


@dataclass
class Served:
    """A copy of a checkout with a drop-in. scratch: takes logs and calibrations; packages: the folder with gradio;
    more: further ones to import from."""

    checkout: Path
    scratch: Path
    packages: Path
    more: tuple = ()

    def environment(self, **changes):
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (self.packages, *self.more))),
            "MAGCACHE_HOME": str(self.scratch / "home"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "GRADIO_ANALYTICS_ENABLED": "False",
            **changes,
        }

    def run(self, *arguments):
        """(exit code, what was said) of a script."""
        done = subprocess.run(
            [sys.executable, HARNESS, *arguments],
            cwd=self.checkout,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=600,
        )
        return done.returncode, done.stdout + done.stderr

    def jobs(self, jobs, *arguments):
        """What came of each job in one process of the page (`page_cpu.run_jobs`)."""
        (self.scratch / "jobs.json").write_text(json.dumps(jobs))
        code, said = self.run("--jobs", str(self.scratch / "jobs.json"), *arguments)
        assert code == 0, said[-4000:]
        return json.loads(next(line for line in said.splitlines() if line.startswith("JOBS "))[5:])

    @contextmanager
    def address(self, *arguments):
        """The served page's."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = self.scratch / "log"
        with log.open("w") as stream:
            server = subprocess.Popen(
                [sys.executable, HARNESS, *arguments],
                cwd=self.checkout,
                env=self.environment(PAGE_PORT=str(port)),
                stdout=stream,
                stderr=stream,
            )
        try:
            for _ in range(400):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5)
                    break
                except OSError:
                    assert server.poll() is None, log.read_text()[-3000:]
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.terminate()
            server.wait(20)


def in_chromium(clicks, address, scratch):
    """Run `clicks(page, expect)` in a page that has been opened; a picture of its end lies in the folder `scratch`."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = os.environ.get("MAGCACHE_CHROMIUM") or shutil.which("chromium")
    if not chromium:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 1000})
        try:
            page.goto(address)
            clicks(page, playwright.expect)
        finally:
            page.screenshot(path=scratch / "last.png", full_page=True)
            browser.close()
