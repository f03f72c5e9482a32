"""The two FLUX scripts, the demo model that they bundle, and a prompt for it."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DEV = REPOSITORY / "MagCache4FLUX/magcache_flux.py"
SCHNELL = REPOSITORY / "MagCache4FLUX_schnell/magcache_flux_schnell.py"
DEMO = REPOSITORY / "demo/image/model"
PROMPT = "a fox on a sky blue background"
