"""This repository as a folder of ComfyUI's `custom_nodes`: its nodes are those of ComfyUI-MagCache."""

import importlib.util
import sys
from pathlib import Path


def nodes_package():
    """The folder ComfyUI-MagCache as a package inside this one. Its name is no identifier, so it has no import."""
    folder, name = Path(__file__).resolve().parent / "ComfyUI-MagCache", f"{__name__}.ComfyUI-MagCache"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


if "folder_paths" in sys.modules:  # ComfyUI's, and not a tool that looks into the folder
    comfy_entrypoint = nodes_package().comfy_entrypoint
    WEB_DIRECTORY = "./ComfyUI-MagCache/web"
