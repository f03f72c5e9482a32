"""ComfyUI's real server with the installed node package in `custom_nodes`, used over HTTP and its socket as by its
page."""

import base64
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from comfyui_served import HERE, TREES, served
from PIL import Image


@pytest.fixture(scope="module", params=TREES)
def server(request, tmp_path_factory):
    """(function that runs workflows, the server's log, its calibrations)."""
    base = tmp_path_factory.mktemp("server")
    with served(request.param, base) as (port, log, paths):

        def run(*prompts):
            done = subprocess.run(
                [sys.executable, HERE / "comfyui_client.py", str(port)],
                input=json.dumps(prompts),
                text=True,
                env=paths,
                capture_output=True,
            )
            assert done.returncode == 0, done.stderr + log.read_text()[-3000:]
            return json.loads(done.stdout)

        yield run, log, base / "home"


def workflow(*between, seed=0, family="flux", steps=12):
    """A text-to-image workflow in the format of the API. between: (class, its inputs) of the nodes on the model's
    way."""
    prompt = {
        "model": {"class_type": "TinyModel", "inputs": {"family": family}},
        "positive": {"class_type": "TinyPrompt", "inputs": {"seed": 0}},
        "negative": {"class_type": "TinyPrompt", "inputs": {"seed": 1}},
        "size": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "picture": {"class_type": "TinyDecode", "inputs": {"samples": ["sampler", 0]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["picture", 0], "filename_prefix": "tiny"}},
    }
    last = "model"
    for name, inputs in between:
        prompt[name] = {"class_type": name, "inputs": {"model": [last, 0], **inputs}}
        last = name
    prompt["sampler"] = {
        "class_type": "KSampler",
        "inputs": {
            "model": [last, 0],
            "positive": ["positive", 0],
            "negative": ["negative", 0],
            "latent_image": ["size", 0],
            "seed": seed,
            "steps": steps,
            "cfg": 3.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "denoise": 1.0,
        },
    }
    return prompt


def released_inputs(thresh=0.24):
    """The inputs that a workflow of the released node has."""
    return "MagCache", {"model_type": "flux", "magcache_thresh": thresh, "retention_ratio": 0.1, "magcache_K": 5}


def answered_picture(answer, node="save"):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["pictures"][node]))))


def shown(answer):
    """{node: what stands on it at the end}"""
    return {node: text for node, text, _ in answer["texts"]}


def test_workflow_over_http(server):
    run, log, _ = server
    recommended = {"model_type": "auto", "magcache_thresh": -1, "retention_ratio": -1, "magcache_K": -1}
    answer = run(
        workflow(),
        workflow(released_inputs()),
        workflow(released_inputs(), seed=1),
        workflow(released_inputs(0.0)),
        workflow(("MagCache", {**recommended, "mag_ratios": "no-such"})),
    )
    assert set(answer["nodes"]) == {"MagCache", "MagCacheCalibration", "MagCacheCalibrationResult", "CompileModel"}
    plain, cached, queued_again, off, mistaken = answer["answers"]
    assert all(one["error"] is None for one in (plain, cached, queued_again, off)), answer
    assert (answered_picture(off) == answered_picture(plain)).all() and (
        answered_picture(cached) != answered_picture(plain)
    ).any()
    assert answer["scripts"] == ["/extensions/ComfyUI-MagCache/magcache.js"]
    texts = shown(cached), shown(queued_again)
    # The node itself is not run again when only the seed changes; it caches and reports all the same.
    for text in (text["MagCache"] for text in texts):
        assert re.fullmatch(
            r"MagCache: 4 of 12 model calls computed, 8 reused; transformer \d.*x\); extra memory .*",
            text.splitlines()[-1],
        ), text
    boxes = cached["texts"][-1][2]
    assert boxes.startswith("<svg") and boxes.count("<rect") == 12 and boxes.count('fill="none"') == 8
    assert "MagCache plan: 12 steps, ratios of flux-dev (published)" in cached["texts"][0][1]
    assert "nothing will be reused: magcache_thresh is 0" in off["texts"][0][1]
    assert "There is no preset 'no-such'" in mistaken["error"]
    console = log.read_text()
    assert console.count("8 reused; transformer") == 2 and not re.search(r"IMPORT FAILED\).*MagCache", console)


def test_calibration_over_http(server):
    run, log, home = server
    calibration = workflow(("MagCacheCalibration", {"model_type": "auto"}))
    calibration["result"] = {
        "class_type": "MagCacheCalibrationResult",
        "inputs": {"calibration": ["MagCacheCalibration", 1], "latent": ["sampler", 0]},
    }
    plain, measured, cached = run(
        workflow(),
        calibration,
        workflow(("MagCache", {"model_type": "auto", "magcache_thresh": 1.0, "retention_ratio": 0.2, "magcache_K": 2})),
    )["answers"]
    assert measured["error"] is None and (answered_picture(measured) == answered_picture(plain)).all()
    (file,) = home.glob("*.json")
    assert "written; MagCache nodes take it" in shown(measured)["MagCacheCalibration"]
    (text,) = measured["outputs"]["result"]["text"]
    assert re.fullmatch(r"cond: 1\.0+, .*\nuncond: 1\.0+, .*", text)
    plot = answered_picture(measured, "result")
    assert plot.shape[0] > 300 and len(np.unique(plot.reshape(-1, 3), axis=0)) > 50
    assert (
        f"ratios of {file.stem} (measured)" in cached["texts"][0][1] and "reused; transformer" in cached["texts"][-1][1]
    )


def test_first_run_over_http(server):
    """A workflow of the released node, saved before there was such an input, with thresholds for a model without
    ratios: measured in the first queue, faster in the second. The new input turns it off."""
    run, _, home = server
    _, inputs = released_inputs()
    thresholds = {**inputs, "model_type": "auto", "magcache_thresh": 1.0}
    before = set(home.glob("*.json"))
    plain, first, second, off = run(
        workflow(family="chroma"),
        workflow(("MagCache", thresholds), family="chroma"),
        workflow(("MagCache", thresholds), family="chroma", seed=1),
        workflow(("MagCache", {**thresholds, "measure_first_run": "off", "speedup": 0.0}), family="chroma", seed=1),
    )["answers"]
    assert [one["error"] for one in (plain, first, second, off)] == [None] * 4
    assert (answered_picture(first) == answered_picture(plain)).all()
    (file,) = set(home.glob("*.json")) - before
    told = shown(first)["MagCache"].splitlines()
    assert told[0] == "MagCache: measuring; next queue is faster." and f"MagCache: {file} written" in told[3], told
    boxes = first["texts"][0][2]
    assert boxes.count("<rect") == 12 and 'fill="none"' not in boxes
    for answer in (second, off):  # with the switch off what was measured is used all the same
        assert f"ratios of {file.stem} (measured)" in answer["texts"][0][1], answer["texts"]
        assert re.search(r"computed, \d+ reused; transformer", shown(answer)["MagCache"]), shown(answer)
    file.unlink()


def test_compiled_over_http(server):
    compile_node = "CompileModel", {"mode": "default", "backend": "eager", "fullgraph": False, "dynamic": False}
    answers = server[0](
        *[
            workflow(*order, family="wan", steps=12)
            | {
                "size": {
                    "class_type": "EmptyHunyuanLatentVideo",
                    "inputs": {"width": 64, "height": 64, "length": 5, "batch_size": 1},
                }
            }
            for order in ((wan_workflow(),), (wan_workflow(), compile_node), (compile_node, wan_workflow()))
        ]
    )["answers"]
    assert [one["error"] for one in answers] == [None] * 3
    alone, *compiled = [answered_picture(one).astype(int) for one in answers]
    counts = [re.search(r"(\d+) of 12 model calls computed", one["texts"][-1][1])[1] for one in answers]
    assert len(set(counts)) == 1 and int(counts[0]) < 12
    assert all(abs(one - alone).max() <= 2 for one in compiled)


def wan_workflow():
    return "MagCache", {
        "model_type": "wan2.1_t2v_14B",
        "magcache_thresh": 0.24,
        "retention_ratio": 0.2,
        "magcache_K": 6,
    }
