"""Open-Sora's inference script with MagCache: the same configurations, flags and files, two to three times faster.

    torchrun --nproc_per_node 1 --standalone magcache_inference.py configs/diffusion/inference/256px.py \\
        --prompt "..." --use_magcache

Belongs in the root of an Open-Sora checkout, 2.0, 1.3 or 1.2, with `common/`.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE if (HERE / "common").is_dir() else HERE.parent))  # in a clone `common` is one folder up
if find_spec("common") is None:
    sys.exit(f"{Path(__file__).name} needs the folder common of its repository beside it: copy that as well.")

from magcache_opensora import main  # noqa: E402

# Settings of each version; the flags --magcache_thresh, --magcache_K and --retention_ratio win over these lines.
# version: (bound on the accumulated error, most reuses in a row, share of the steps that always computes)
SETTINGS = {
    "2.0": (0.12, 3, 0.2),
    "1.3": (0.12, 3, 0.2),
    "1.2": (0.12, 3, 0.2),  # faster, also of the release: 0.24, 5, 0.2
}

# Published ratio tables (common/presets) by version and type of the model; others are measured in the first video.
TABLES = {"1.2 STDiT3-XL/2": "open-sora-1.2"}

# A 1.3 checkout also runs 1.2; the VAE in the configuration says which it is.
VERSIONS = {"OpenSoraVAE_V1_2": "1.2", "OpenSoraVAE_V1_3": "1.3"}

if __name__ == "__main__":
    main(settings=SETTINGS, tables=TABLES, versions=VERSIONS)
