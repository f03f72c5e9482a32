"""Wan2.1's generate.py with MagCache: the same flags, the same files, two to three times faster.

    python magcache_generate.py --task t2v-1.3B --size 832*480 --ckpt_dir ./Wan2.1-T2V-1.3B --sample_shift 8 \\
        --sample_guide_scale 6 --prompt "..." --use_magcache

Belongs beside generate.py in a Wan2.1 checkout, with `common/`.
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
# task: (bound on the accumulated error, most reuses in a row, share of the steps that always computes)
SETTINGS = {
    "t2v-1.3B": (0.12, 4, 0.2),
    "t2v-14B": (0.24, 6, 0.2),
    "i2v-14B": (0.24, 6, 0.2),
    "vace-1.3B": (0.02, 3, 0.2),
    # No ratios were published for these; after --magcache_calibration they run by these lines.
    "vace-14B": (0.02, 3, 0.2),
    "flf2v-14B": (0.12, 2, 0.2),
    "t2i-14B": (0.12, 2, 0.2),
}

# Ratio tables (common/presets) by what a checkpoint's config.json says: model_type and dim. The two I2V checkpoints say
# the same.
TABLES = {
    "t2v 1536": "wan2.1-t2v-1.3b",
    "t2v 5120": "wan2.1-t2v-14b",
    "i2v 5120 480p": "wan2.1-i2v-14b-480p",
    "i2v 5120 720p": "wan2.1-i2v-14b-720p",
    "vace 1536": "wan2.1-vace-1.3b",
}

PIPELINES = ("WanT2V", "WanI2V", "WanFLF2V", "WanVace")

if __name__ == "__main__":
    main(settings=SETTINGS, tables=TABLES, pipelines=PIPELINES, upstream="Wan2.1", folder="MagCache4Wan2.1")
