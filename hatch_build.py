"""What goes into the wheel beside `common`: the drop-in folders and the demo, for `magcache install`."""

from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Bundled(BuildHookInterface):
    def initialize(self, version, build_data):
        for folder in Path(self.root).iterdir():
            if folder.name.startswith("MagCache4") or folder.name in ("ComfyUI-MagCache", "demo"):
                build_data["force_include"][str(folder)] = f"magcache/bundled/{folder.name}"
