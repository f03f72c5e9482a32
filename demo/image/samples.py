"""Draw demo/image/samples.png: what the demo model makes of 24 prompts.

python demo/image/samples.py
"""

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[1:1] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import numpy as np  # noqa: E402
from demo_model import PROMPTS, load_demo, render  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

COLUMNS = 8

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    pipe, _ = load_demo()
    pictures = [render(pipe, prompt, 28, seed=3)[0] for prompt in tqdm(PROMPTS)]
    rows = [np.concatenate(pictures[start : start + COLUMNS], axis=1) for start in range(0, len(pictures), COLUMNS)]
    sheet = Image.fromarray(np.concatenate(rows, axis=0))
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.LANCZOS).save(Path(__file__).with_name("samples.png"))
