"""FramePack-F1's own Gradio demo with MagCache in its page: the same flags, the same files, about two times faster.

    python magcache_demo_gradio_f1.py --server 127.0.0.1 --port 7860

Belongs beside demo_gradio_f1.py in a FramePack checkout, with `common/`.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE if (HERE / "common").is_dir() else HERE.parent))  # in a clone `common` is one folder up
if find_spec("common") is None:
    sys.exit(f"{Path(__file__).name} needs the folder common of its repository beside it: copy that as well.")

from magcache_framepack_page import main  # noqa: E402

# Where the sliders start: bound on the accumulated error, most reuses in a row, share of the steps that always compute.
SETTINGS = (0.10, 3, 0.2)
PUBLISHED = "framepack-f1"  # ratio table (common/presets) of lllyasviel/FramePack_F1_I2V_HY_20250503

if __name__ == "__main__":
    main(page="demo_gradio_f1", settings=SETTINGS, published=PUBLISHED, folder=HERE)
