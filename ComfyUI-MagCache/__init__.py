"""MagCache for ComfyUI: the nodes MagCache, MagCache Calibration, MagCache Calibration Result and Compile Model."""

import importlib.util
import sys
from pathlib import Path


def import_common():
    """Import the shared module under this package's own name, so that no other package's `common` is in the way.

    It lies in this folder (put there by `python -m common install ComfyUI-MagCache`), or beside it in a clone of the
    repository to which `custom_nodes` has a link.
    """
    here = Path(__file__).resolve().parent
    folder = next((path for path in (here / "common", here.parent / "common") if (path / "ratios.py").is_file()), None)
    if folder is None:
        raise ImportError(
            f"MagCache: {here} lacks its folder common. Install it from a clone of the repository with "
            "`python -m common install ComfyUI-MagCache /path/to/ComfyUI`, or copy common into it."
        )
    name = f"{__name__}.common"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


import_common()

from .nodes import comfy_entrypoint  # noqa: E402

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
