"""The package as ComfyUI loads it, and its examples. Run by comfyui_worker.py."""

import json
import sys
from pathlib import Path

import folder_paths
import nodes
from comfyui_helpers import PACKAGE, WORK, models, ratios


def as_prompt(workflow):
    """A workflow as the page saves it, in the format of the API: values of widgets in the order of the inputs, links by
    name."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        types = nodes.NODE_CLASS_MAPPINGS[node["type"]].INPUT_TYPES()
        values, inputs = list(node["widgets_values"]), {}
        for name, (kind, *options) in {**types.get("required", {}), **types.get("optional", {})}.items():
            if not (isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")):
                continue
            inputs[name] = values.pop(0)
            about = options[0] if options else {}
            if about.get("control_after_generate"):
                assert values.pop(0) == "fixed"
            if about.get("image_upload"):
                assert values.pop(0) == "image"
        assert not values, (node["type"], values)
        for slot in node["inputs"]:
            if slot["link"] is not None:
                inputs[slot["name"]] = links[slot["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def example_is_valid(name):
    """The host's own validation takes the workflow, with every file that it names in its place, and MagCache stands in
    it with the recommended settings of its model type."""
    import asyncio

    import execution

    if "SaveWEBM" not in nodes.NODE_CLASS_MAPPINGS:
        asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    workflow = json.loads((Path(PACKAGE.replace("_x_", ".")) / "examples" / name).read_text())
    (note,) = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    for line in note.splitlines():
        if line.startswith("* `"):
            path = WORK / "models" / line[3:-1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            folder_paths.add_model_folder_path(path.parent.name, str(path.parent))
    folder_paths.filename_list_cache.clear()
    prompt = as_prompt(workflow)
    valid, error, outputs, errors = asyncio.run(execution.validate_prompt("examples", prompt, None))
    assert valid and not errors and outputs, (error, errors)
    ours = [node for node in prompt.values() if node["class_type"].startswith("MagCache")]
    if "calibration" in name:
        assert [node["class_type"] for node in ours] == ["MagCacheCalibration", "MagCacheCalibrationResult"]
        return
    samplers = [node["inputs"] for node in prompt.values() if "steps" in node["inputs"]]
    for inputs in (node["inputs"] for node in ours):
        if not inputs["speedup"]:
            recommended = models.published_table(inputs["model_type"], samplers[0]["steps"]).settings
            assert {name: inputs[name] for name in recommended} == recommended


def the_released_package_is_not_replaced():
    """Whichever of the two loads first, the console says so; nodes of the released package that are there stay."""
    import asyncio
    import logging

    ours = dict(nodes.NODE_CLASS_MAPPINGS)
    folder = WORK.parent / "custom_nodes"
    theirs = folder / "comfyui-magcache"
    theirs.mkdir()
    (theirs / "pyproject.toml").write_text('[project]\nname = "magcache"\n\n[tool.comfy]\nPublisherId = "theirs"\n')
    (theirs / "__init__.py").write_text(
        "class Theirs:\n    @classmethod\n    def INPUT_TYPES(cls):\n        return {}\n\n\n"
        "NODE_CLASS_MAPPINGS = {'MagCache': Theirs}\n"
    )
    heard = []
    listener = logging.Handler()
    listener.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger().addHandler(listener)
    folder_paths.add_model_folder_path("custom_nodes", str(folder))
    try:
        asyncio.run(nodes.load_custom_node(PACKAGE.replace("_x_", ".")))
        assert any("comfyui-magcache is a MagCache package with nodes of the same names" in line for line in heard), (
            heard
        )
        heard.clear()
        asyncio.run(nodes.load_custom_node(str(theirs)))
        asyncio.run(nodes.load_custom_node(PACKAGE.replace("_x_", ".")))
        assert nodes.NODE_CLASS_MAPPINGS["MagCache"].__name__ == "Theirs"
        assert nodes.NODE_CLASS_MAPPINGS["CompileModel"].__name__ == "CompileModelNode"
        assert any("custom_nodes.comfyui-magcache already provides the nodes MagCache" in line for line in heard), heard
    finally:
        logging.getLogger().removeHandler(listener)
        nodes.NODE_CLASS_MAPPINGS.clear()
        nodes.NODE_CLASS_MAPPINGS.update(ours)


def without_common_it_says_what_to_do():
    """A copy of the folder alone; and one with another package's module `common` around."""
    import asyncio
    import logging
    import shutil

    copied = WORK.parent / "copied" / "ComfyUI-MagCache"
    shutil.copytree(PACKAGE.replace("_x_", "."), copied, ignore=shutil.ignore_patterns("common", "__pycache__"))
    heard = []
    listener = logging.Handler()
    listener.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger().addHandler(listener)
    ours = dict(nodes.NODE_CLASS_MAPPINGS)
    try:
        assert not asyncio.run(nodes.load_custom_node(str(copied)))
        assert any("lacks its folder common" in line and "python -m common install" in line for line in heard), heard
        shutil.copytree(Path(sys.modules[f"{PACKAGE}.common"].__path__[0]), copied / "common")
        sys.modules["common"] = other = object()
        assert asyncio.run(nodes.load_custom_node(str(copied)))
        assert sys.modules.pop("common") is other
        loaded = sys.modules[f"{copied}.common".replace(".common", "").replace(".", "_x_") + ".common.ratios"]
        assert Path(loaded.__file__).parent == copied / "common" and loaded is not ratios
    finally:
        logging.getLogger().removeHandler(listener)
        nodes.NODE_CLASS_MAPPINGS.clear()
        nodes.NODE_CLASS_MAPPINGS.update(ours)


def a_whole_clone_loads():
    """This repository as a folder of custom_nodes: its nodes, its script for the page, and no word of two packages."""
    import asyncio
    import logging

    clone = WORK.parent / "cloned" / "MagCache"
    clone.parent.mkdir()
    clone.symlink_to(Path(PACKAGE.replace("_x_", ".")).resolve().parent)
    ours, heard = dict(nodes.NODE_CLASS_MAPPINGS), []
    listener = logging.Handler()
    listener.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger().addHandler(listener)
    folder_paths.add_model_folder_path("custom_nodes", str(clone.parent))
    for name in [name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith(("MagCache", "CompileModel"))]:
        del nodes.NODE_CLASS_MAPPINGS[name]
    try:
        assert asyncio.run(nodes.load_custom_node(str(clone)))
        assert nodes.NODE_CLASS_MAPPINGS["MagCache"].__module__.endswith("MagCache.ComfyUI-MagCache.nodes")
        (script,) = [path for name, path in nodes.EXTENSION_WEB_DIRS.items() if path.startswith(str(clone))]
        assert (Path(script) / "magcache.js").is_file()
        mistaken = f"MagCache: {clone} is a MagCache package"  # for the released one
        assert not any(mistaken in line or "Cannot import" in line for line in heard), heard
    finally:
        logging.getLogger().removeHandler(listener)
        nodes.NODE_CLASS_MAPPINGS.clear()
        nodes.NODE_CLASS_MAPPINGS.update(ours)
