"""FLUX.1-dev (and FLUX.1-Kontext, or any FluxPipeline) with MagCache.

python magcache_flux.py --prompt "A photo of a black bicycle."
python magcache_flux.py --compare                      # un-cached, cached and fewer steps side by side
python magcache_flux.py --model black-forest-labs/FLUX.1-Kontext-dev --image cat.png --prompt "Add a hat."
python magcache_flux.py --model my-finetune --magcache_calibration
"""

import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE if (HERE / "common").is_dir() else HERE.parent))  # in a clone `common` is one folder up
if find_spec("common") is None:
    sys.exit(f"{Path(__file__).name} needs the folder common of its repository beside it: copy that as well.")

from common.scripts.flux import main  # noqa: E402

MODEL = "black-forest-labs/FLUX.1-dev"  # hub id or folder; 'demo' is the small model in this repository
PROMPT = "A photo of a black bicycle."
STEPS = 28
SEED = 42
HEIGHT = 1024
WIDTH = 1024
GUIDANCE_SCALE = 3.5
OUTPUT = "magcache_flux.png"

MAGCACHE_THRESH = 0.24  # bound on the accumulated error; lower is closer to the un-cached picture, 0 is off
MAGCACHE_K = 5  # most reuses in a row
RETENTION_RATIO = 0.1  # the first tenth of the steps always computes
MIN_STEPS = 5  # shorter runs have nothing to gain and compute every step

if __name__ == "__main__":
    main(
        description=__doc__,
        model=MODEL,
        prompt=PROMPT,
        steps=STEPS,
        seed=SEED,
        height=HEIGHT,
        width=WIDTH,
        guidance_scale=GUIDANCE_SCALE,
        output=OUTPUT,
        magcache_thresh=MAGCACHE_THRESH,
        magcache_K=MAGCACHE_K,
        retention_ratio=RETENTION_RATIO,
        min_steps=MIN_STEPS,
    )
