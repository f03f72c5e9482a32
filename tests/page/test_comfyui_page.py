"""ComfyUI's own page in a browser, on its real server: the node when a workflow runs, the examples, the released
workflows, and every template of ComfyUI that loads a model from a file.

    MAGCACHE_COMFYUI_NODES=/path/to/ComfyUI-MagCache python -m pytest tests/page/test_comfyui_page.py

$MAGCACHE_COMFYUI_NODES: a checkout of the released nodes, for their workflows. Needs playwright and Chromium
($MAGCACHE_CHROMIUM, else the one on the PATH). $MAGCACHE_SCREENSHOTS: folder that the README's pictures go to.
$MAGCACHE_ALL_TEMPLATES: open all templates, which takes a minute, and not every fourth.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from comfyui_served import REPOSITORY, packages, served

RELEASED = os.environ.get("MAGCACHE_COMFYUI_NODES")
EXAMPLES = sorted((REPOSITORY / "ComfyUI-MagCache" / "examples").glob("*.json"))
INPUTS = [
    "model_type",
    "magcache_thresh",
    "retention_ratio",
    "magcache_K",
    "start_step",
    "end_step",
    "speedup",
    "cache_device",
    "mag_ratios",
    "corrector",
    "cache_limit",
    "measure_first_run",
]


@pytest.fixture(scope="module")
def comfyui_address(tmp_path_factory):
    """The served page's."""
    base, more = tmp_path_factory.mktemp("comfyui"), packages("requirements-comfyui-page.txt")
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    off = ("Comfy.Minimap.Visible", "Comfy.Graph.CanvasInfo", "Comfy.Graph.CanvasMenu")
    settings.write_text(json.dumps({"Comfy.TutorialCompleted": True, **dict.fromkeys(off, False)}))
    with served("0.30.0", base, more / "comfyui_frontend_package" / "static", [more]) as (port, _, _):
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = os.environ.get("MAGCACHE_CHROMIUM") or shutil.which("chromium")
    if not chromium:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as run:
        launched = run.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def page(comfyui_address, browser):
    opened = browser.new_page(viewport={"width": 1400, "height": 640})
    opened.mistakes = []
    opened.on("pageerror", lambda error: opened.mistakes.append(str(error)))
    opened.goto(comfyui_address)
    ready(opened)
    return opened


def ready(page):
    page.wait_for_function("window.app?.graph && window.app.extensionManager?.workflow?.activeWorkflow", timeout=60_000)


def load_workflow(page, workflow):
    """Open a workflow in the place of the one that is open."""
    page.evaluate(
        "workflow => app.loadGraphData(workflow, true, true, app.extensionManager.workflow.activeWorkflow)", workflow
    )


EMPTY = {"version": 0.4, "last_node_id": 0, "last_link_id": 0, "nodes": [], "links": [], "groups": []}
# nodes: [[id, type, position, {widget: value}]], links: [[from, slot, to, input]]
BUILD = """([nodes, links]) => {
  const made = {};
  for (const [id, type, position, values, size] of nodes) {
    const node = (made[id] = LiteGraph.createNode(type));
    node.pos = position;
    app.graph.add(node);
    for (const [name, value] of Object.entries(values))
      node.widgets.find((widget) => widget.name === name).value = value;
    if (size) node.setSize(size);
  }
  for (const [from, slot, to, input] of links) made[from].connect(slot, made[to], input);
}"""


def build_workflow(page, between, seed, family="flux"):
    """A text-to-image workflow of the tests' own nodes. between: [type, position, values], the node on the model's
    way."""
    load_workflow(page, EMPTY)
    name, position, values = between
    nodes = [
        ["model", "TinyModel", [20, 60], {"family": family}, [240, 60]],
        ["positive", "TinyPrompt", [20, 180], {"seed": 0, "control_after_generate": "fixed"}, [240, 60]],
        ["negative", "TinyPrompt", [20, 300], {"seed": 1, "control_after_generate": "fixed"}, [240, 60]],
        ["size", "EmptySD3LatentImage", [20, 420], {"width": 64, "height": 64}, [240, 100]],
        [name, name, position, values],
        ["sampler", "KSampler", [690, 60], {"steps": 12, "cfg": 3, "seed": seed, "control_after_generate": "fixed"}],
        ["picture", "TinyDecode", [990, 60], {}, [180, 50]],
        ["preview", "PreviewImage", [990, 170], {}, [180, 260]],
    ]
    links = [
        ["model", 0, name, "model"],
        [name, 0, "sampler", "model"],
        ["positive", 0, "sampler", "positive"],
        ["negative", 0, "sampler", "negative"],
        ["size", 0, "sampler", "latent_image"],
        ["sampler", 0, "picture", "samples"],
        ["picture", 0, "preview", "images"],
    ]
    page.evaluate(BUILD, [nodes, links])


def press_run(page, text, index=0):
    """Press Run; wait until a node of MagCache shows a text."""
    page.get_by_role("button", name="Run", exact=True).first.click()
    page.wait_for_function(
        "([text, index]) => document.querySelectorAll('.magcache-said')[index]?.textContent.includes(text)",
        arg=[text, index],
        timeout=60_000,
    )


# Of what a node shows: its text, its boxes, and how much of it is to be seen.
SHOWN = """() => {
  const element = document.querySelector(".magcache-said"), box = element.getBoundingClientRect();
  const text = element.querySelector("pre").getBoundingClientRect();
  const node = app.graph.nodes.find((node) => node.widgets?.some((widget) => widget.element === element));
  const [bottom] = [app.canvas.ds.convertOffsetToCanvas([0, node.pos[1] + node.size[1]])[1]];
  return {
    text: element.querySelector("pre").textContent,
    boxes: element.querySelectorAll("svg rect").length,
    open: element.querySelectorAll('svg rect[fill="none"]').length,
    cut: Math.max(0, text.bottom - box.bottom, text.right - box.right),
    beyond: box.bottom - app.canvas.canvas.getBoundingClientRect().y - bottom,
    widgets: Object.fromEntries(node.widgets.map((widget) => [widget.name, [widget.type, widget.value]])),
    saved: node.serialize().widgets_values.length,
  };
}"""


def screenshot(page, name):
    """Of the workflow, into the folder for pictures if one is given."""
    folder = os.environ.get("MAGCACHE_SCREENSHOTS")
    if folder:
        page.evaluate("""() => {
          const text = document.querySelector(".magcache-said pre");
          text.textContent = text.textContent.replace(/[/]\\S*[/]home[/]/, "~/.magcache/");
          for (const message of document.querySelectorAll(".p-toast")) message.style.display = "none";
          app.canvas.ds.scale = 0.9;
          app.canvas.ds.offset = [63, 137];
          app.canvas.setDirty(true, true);
        }""")
        page.wait_for_timeout(1000)
        page.screenshot(path=Path(folder) / name, clip={"x": 65, "y": 140, "width": 1200, "height": 490})


@pytest.mark.parametrize("nodes", ["classic", "2.0"])
def test_a_run_shows_its_plan_and_what_it_saved(page, nodes):
    page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", nodes == "2.0")
    page.reload()
    ready(page)
    build_workflow(page, ["MagCache", [310, 60], {"speedup": 2}], seed=1 + 100 * (nodes == "2.0"))
    press_run(page, "s saved (")
    page.wait_for_function("!document.querySelector('.magcache-said').textContent.includes('NaN')")
    page.wait_for_timeout(500)  # laid out
    shown = page.evaluate(SHOWN)
    assert re.search(r"6 of 12 model calls computed, 6 reused; transformer .* s saved \(.*x\)", shown["text"]), shown
    assert (shown["boxes"], shown["open"]) == (12, 6), shown
    assert shown["cut"] < 2 and shown["beyond"] < 2, shown
    assert shown["widgets"]["speedup"] == ["slider", 2] and shown["saved"] == len(INPUTS), shown
    # A second run tells of itself alone. What is shown stays where it was.
    page.evaluate("""() => {
      const of = (type) => app.graph.nodes.find((node) => node.type === type);
      of("KSampler").widgets.find((widget) => widget.name === "seed").value += 1;
      of("MagCache").widgets.find((widget) => widget.name === "speedup").value = 3;
    }""")
    press_run(page, "4 of 12 model calls computed")
    page.wait_for_timeout(500)
    again = page.evaluate(SHOWN)
    assert again["text"].count("MagCache plan") == again["text"].count("s saved") == 1, again
    assert (again["boxes"], again["open"]) == (12, 8) and again["cut"] < 2, again
    if nodes == "2.0":
        assert page.get_by_text("Show advanced inputs").count() == 1  # the page's own button, and not ours beside it
        assert page.get_by_text("magcache_thresh").count() == 0  # folded away
        screenshot(page, "node.png")
    assert not page.mistakes


def test_a_first_run_is_measured_and_the_next_is_faster(page):
    """The node says so while it happens, and after it; the second queue takes what was measured."""
    build_workflow(page, ["MagCache", [310, 60], {"magcache_thresh": 1}], seed=5, family="zimage")
    press_run(page, "calls: measuring; next queue is faster.")
    shown = page.evaluate(SHOWN)
    assert shown["text"].startswith("MagCache: measuring; next queue is faster."), shown
    assert (shown["boxes"], shown["open"]) == (12, 0) and "written; this node takes it" in shown["text"], shown
    page.evaluate("""() => app.graph.nodes.find((node) => node.type === "KSampler").widgets
      .find((widget) => widget.name === "seed").value += 1""")
    press_run(page, " reused; transformer")
    again = page.evaluate(SHOWN)
    assert "(measured), magcache_thresh 1" in again["text"] and "measuring" not in again["text"], again
    assert again["open"] > 0
    assert not page.mistakes


def test_the_slider_is_drawn_with_the_mouse(page):
    """On the classic page, where the node is drawn on a canvas."""
    page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", False)
    page.reload()
    ready(page)
    build_workflow(page, ["MagCache", [310, 60], {}], seed=1)
    page.wait_for_timeout(500)
    start, end, y = page.evaluate("""() => {
      const node = app.graph.nodes.find((node) => node.type === "MagCache");
      const slider = node.widgets.find((widget) => widget.name === "speedup");
      const at = (x) => app.canvas.ds.convertOffsetToCanvas([node.pos[0] + x, node.pos[1] + slider.y + 10]);
      const box = app.canvas.canvas.getBoundingClientRect();
      const [left, right] = [at(15), at(node.size[0] - 15)];
      return [left[0] + box.x, right[0] + box.x, left[1] + box.y];
    }""")
    page.mouse.move(start + 2, y)
    page.mouse.down()
    page.mouse.move(start + 0.3 * (end - start), y)
    page.mouse.move(start + 0.6 * (end - start), y)
    page.mouse.up()
    value = page.evaluate("""() => app.graph.nodes.find((node) => node.type === "MagCache").widgets
      .find((widget) => widget.name === "speedup").value""")
    assert 2.5 < value < 3.5 and abs(10 * value - round(10 * value)) < 1e-6, value


# Which widgets of a MagCache node are drawn, and where the middle of its button is in the page.
DRAWN = """() => {
  const node = app.graph.nodes.find((node) => node.type === "MagCache");
  const button = node.widgets.find((widget) => widget.type === "button");
  const middle = [node.pos[0] + node.size[0] / 2, node.pos[1] + button.y + 10];
  const [x, y] = app.canvas.ds.convertOffsetToCanvas(middle);
  const box = app.canvas.canvas.getBoundingClientRect();
  return {
    names: node.widgets.filter((widget) => node.isWidgetVisible(widget)).map((widget) => widget.name),
    label: button.label,
    height: node.size[1],
    button: [x + box.x, y + box.y],
    values: node.serialize().widgets_values,
  };
}"""


def press_button(page):
    page.wait_for_timeout(300)  # drawn
    page.mouse.click(*page.evaluate(DRAWN)["button"])
    page.wait_for_timeout(300)
    return page.evaluate(DRAWN)


def test_advanced_inputs_fold_on_the_classic_page(page):
    """A new node shows its slider and a button. The button brings the other inputs and takes them away again; hidden
    or not, a workflow and what is queued have all values."""
    page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", False)
    page.reload()
    ready(page)
    build_workflow(page, ["MagCache", [310, 60], {}], seed=9)
    page.wait_for_timeout(300)
    folded = page.evaluate(DRAWN)
    assert folded["names"] == ["speedup", "advanced inputs"] and folded["label"] == "Show advanced inputs", folded
    unfolded = press_button(page)
    assert unfolded["names"] == [*INPUTS, "advanced inputs"] and unfolded["label"] == "Hide advanced inputs", unfolded
    assert unfolded["height"] > folded["height"] and unfolded["values"] == folded["values"], (folded, unfolded)
    page.evaluate("""() => app.graph.nodes.find((node) => node.type === "MagCache").widgets
      .find((widget) => widget.name === "magcache_K").value = 3""")
    again = press_button(page)
    assert again["names"] == folded["names"] and again["height"] == folded["height"], (folded, again)
    expected = ["auto", -1, -1, 3, 0, -1, 0, "gpu", "", True, 4, "auto"]
    assert again["values"] == expected
    queued = page.evaluate("async () => (await app.graphToPrompt()).output")
    (inputs,) = [node["inputs"] for node in queued.values() if node["class_type"] == "MagCache"]
    assert [inputs.pop(name) for name in INPUTS] == expected and list(inputs) == ["model"], inputs
    # Saved folded, it opens folded; a workflow that never was folded opens with what it has set.
    workflow = page.evaluate("() => app.graph.serialize()")
    load_workflow(page, workflow)
    opened = page.evaluate(DRAWN)
    assert opened["names"] == folded["names"] and opened["values"] == expected, opened
    for node in workflow["nodes"]:
        node.pop("showAdvanced", None)
    load_workflow(page, workflow)
    opened = page.evaluate(DRAWN)
    assert opened["names"] == unfolded["names"] and opened["height"] >= unfolded["height"], opened
    assert opened["values"] == expected
    # So it does with Nodes 2.0, which fold them themselves.
    page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", True)
    page.reload()
    ready(page)
    load_workflow(page, workflow)
    page.get_by_text("Hide advanced inputs").wait_for()
    assert page.get_by_text("Hide advanced inputs").count() == page.get_by_text("magcache_K").count() == 1
    assert page.evaluate(DRAWN)["values"] == expected and not page.mistakes


def test_a_node_in_a_subgraph_shows_its_plan(page):
    build_workflow(page, ["MagCache", [310, 60], {"speedup": 2}], seed=7)
    page.evaluate("""() => {
      const node = app.graph.nodes.find((node) => node.type === "MagCache");
      app.graph.convertToSubgraph(new Set([node]));
    }""")
    page.get_by_role("button", name="Run", exact=True).first.click()
    page.wait_for_function(
        """() => app.graph.nodes.find((node) => node.subgraph)?.subgraph.nodes[0].widgets
          .find((widget) => widget.name === "magcache_said")?.element.textContent.includes("s saved (")""",
        timeout=60_000,
    )


def test_a_calibration_shows_its_ratios_and_its_plot(page):
    page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", True)
    page.reload()
    ready(page)
    build_workflow(page, ["MagCacheCalibration", [310, 60], {}], seed=3)
    page.evaluate(
        BUILD,
        [[["result", "MagCacheCalibrationResult", [990, 170], {}, [330, 330]]], []],
    )
    page.evaluate("""() => {
      const of = (type) => app.graph.nodes.find((node) => node.type === type);
      app.graph.remove(of("PreviewImage"));
      of("MagCacheCalibration").connect(1, of("MagCacheCalibrationResult"), "calibration");
      of("KSampler").connect(0, of("MagCacheCalibrationResult"), "latent");
    }""")
    press_run(page, "written; MagCache nodes take it")
    page.wait_for_timeout(1000)
    shown = page.evaluate(SHOWN)
    assert re.search(r"cond: 1\.0+, [\d., ]+\nuncond: 1\.0+, ", shown["text"]) and shown["cut"] < 2, shown
    screenshot(page, "calibration.png")


# {nodes: types of all nodes, unknown: those among them that the page does not know, MagCache: values by name}
OPENED = """() => {
  const graphs = [app.rootGraph ?? app.graph], types = [], unknown = [], values = [];
  for (const graph of graphs)
    for (const node of graph.nodes) {
      if (node.subgraph) graphs.includes(node.subgraph) || graphs.push(node.subgraph);
      else {
        types.push(node.type);
        if (!LiteGraph.registered_node_types[node.type]) unknown.push(node.type);
        if (node.type === "MagCache")
          values.push(Object.fromEntries(node.widgets.map((widget) => [widget.name, widget.value])));
      }
    }
  return { types, unknown, values };
}"""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_opens(page, path):
    workflow = json.loads(path.read_text())
    load_workflow(page, workflow)
    opened = page.evaluate(OPENED)
    ours = [node["widgets_values"] for node in workflow["nodes"] if node["type"] == "MagCache"]
    assert not opened["unknown"] and len(opened["types"]) == len(workflow["nodes"])
    assert [[values[name] for name in INPUTS] for values in opened["values"]] == ours


@pytest.mark.skipif(not RELEASED, reason="MAGCACHE_COMFYUI_NODES names no checkout of the released nodes")
def test_released_workflows_open(page):
    """With the values that they were saved with; what the released node did not have is as new nodes have it."""
    paths = sorted(Path(RELEASED, "examples").glob("*.json"))
    assert len(paths) >= 10
    for path in paths:
        workflow = json.loads(path.read_text())
        parts = [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]
        saved = [node for part in parts for node in part["nodes"] if node["type"] == "MagCache"]
        load_workflow(page, workflow)
        opened = page.evaluate(OPENED)
        assert not [name for name in opened["unknown"] if name.startswith(("MagCache", "Compile"))], (path, opened)
        assert len(opened["values"]) == len(saved)
        for values, node in zip(opened["values"], saved):
            defaults = [values["model_type"], -1, -1, -1, 0, -1, 0, "gpu", "", True, 4, "auto"]
            expected = [*node["widgets_values"], *defaults[len(node["widgets_values"]) :]]
            assert [values[name] for name in INPUTS] == pytest.approx(expected), path


MODELS = {"UNETLoader", "CheckpointLoaderSimple", "ImageOnlyCheckpointLoader"}
# Of other packages, in templates that do not say so.
FOREIGN = {"AILab_QwenVL", "ImageRemoveAlpha+", "GetImageSizeAndCount", "ReplaceVideoLatentFrames"}
# Put a MagCache node on each link that comes from a loader of a model or of a LoRA.
CONNECT = """() => {
  const graphs = [app.rootGraph ?? app.graph], connected = [];
  for (const graph of graphs) {
    for (const { subgraph } of graph.nodes) subgraph && !graphs.includes(subgraph) && graphs.push(subgraph);
    for (const link of [...graph.links.values()]) {
      const from = graph.getNodeById(link.origin_id), to = graph.getNodeById(link.target_id);
      if (from?.outputs?.[link.origin_slot]?.type !== "MODEL" || !/Loader/.test(from.type) || !to) continue;
      const node = LiteGraph.createNode("MagCache");
      graph.add(node);
      from.connect(link.origin_slot, node, 0);
      node.connect(0, to, link.target_slot);
      connected.push(node.getInputNode(0) === from && to.getInputNode(link.target_slot) === node);
    }
  }
  return connected;
}"""


def templates():
    """{name: workflow} of the templates that load a model from a file and need core's nodes alone."""
    found = {}
    for path in sorted(
        (packages("requirements-comfyui-page.txt") / "comfyui_workflow_templates_json" / "templates").glob("*.json")
    ):
        workflow = json.loads(path.read_text())
        if not isinstance(workflow, dict) or "nodes" not in workflow:  # lists of templates
            continue
        parts = [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]
        nodes = [node for part in parts for node in part["nodes"]]
        packs = {node.get("properties", {}).get("cnr_id", "comfy-core") for node in nodes}
        types = {node["type"] for node in nodes}
        if MODELS & types and packs == {"comfy-core"} and not FOREIGN & types:
            found[path.stem] = workflow
    return found


def test_templates_open_and_take_the_node(page):
    page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", False)
    page.reload()
    ready(page)
    page.set_viewport_size({"width": 600, "height": 400})  # less to draw
    found = templates()
    assert len(found) == 212
    every = 1 if os.environ.get("MAGCACHE_ALL_TEMPLATES") else 4
    for name, workflow in list(found.items())[::every]:
        load_workflow(page, workflow)
        opened, connected = page.evaluate(OPENED), page.evaluate(CONNECT)
        unknown = set(opened["unknown"]) - {"Reroute", "Note", "MarkdownNote", "PrimitiveNode"}
        assert not unknown and connected and all(connected), (name, unknown, connected)
    assert not page.mistakes
