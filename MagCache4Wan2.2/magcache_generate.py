"""Wan2.2's generate.py with MagCache: the same flags, the same files, sooner.

    python magcache_generate.py --task t2v-A14B --size 1280*720 --ckpt_dir ./Wan2.2-T2V-A14B --offload_model True \\
        --convert_model_dtype --prompt "..." --use_magcache

Belongs beside generate.py in a Wan2.2 checkout, with `common/`.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE if (HERE / "common").is_dir() else HERE.parent))  # in a clone `common` is one folder up
if find_spec("common") is None:
    sys.exit(f"{Path(__file__).name} needs the folder common of its repository beside it: copy that as well.")

from common.scripts.wan import main  # noqa: E402

# Settings of each task; the flags --magcache_thresh, --magcache_K and --retention_ratio win over these lines.
# task: (bound on the accumulated error, most reuses in a row, share of each expert's steps that always computes)
SETTINGS = {
    "t2v-A14B": (0.06, 2, 0.4),
    "i2v-A14B": (0.06, 2, 0.1),
    "ti2v-5B": (0.06, 2, 0.2),
    # For these two nothing was published or measured: TI2V-5B's settings, by which they run after a calibration.
    "s2v-14B": (0.06, 2, 0.2),
    "animate-14B": (0.06, 2, 0.2),
}

# Ratio tables (common/presets) by what a checkpoint's config.json says: model_type and dim; TI2V serves two tasks.
TABLES = {
    "t2v 5120": "wan2.2-t2v-a14b",
    "i2v 5120": "wan2.2-i2v-a14b",
    "ti2v 3072 ti2v-5B-t2v": "wan2.2-ti2v-5b-t2v",
    "ti2v 3072 ti2v-5B-i2v": "wan2.2-ti2v-5b-i2v",
}

PIPELINES = ("WanT2V", "WanI2V", "WanTI2V", "WanS2V", "WanAnimate")

if __name__ == "__main__":
    main(settings=SETTINGS, tables=TABLES, pipelines=PIPELINES, upstream="Wan2.2", folder="MagCache4Wan2.2")
