import os

import imageio
import numpy as np


def save_sample(x, save_path=None, fps=8, force_video=False, verbose=True):
    if not force_video and x.shape[1] == 1:
        save_path += ".png"
        imageio.imwrite(save_path, ((x[:, 0].permute(1, 2, 0) + 1) * 127).numpy().astype(np.uint8))
    else:
        save_path += ".mp4"
        frames = ((x.permute(1, 2, 3, 0) + 1) * 127).numpy().astype(np.uint8)
        imageio.mimwrite(save_path, frames, fps=fps, macro_block_size=None)
    if verbose:
        print(f"Saved to {save_path}")
    return save_path


def process_and_save(x, batch, cfg, sub_dir, option, epoch, start_index, saving=True):
    names = batch.get("name") or [f"{cfg.get('prefix', 'prompt')}_{index:04d}" for index in batch["index"]]
    for video, name in zip(x, names):
        if saving:
            save_sample(video, save_path=os.path.join(cfg.save_dir, sub_dir, name), fps=cfg.get("fps_save", 16))
    return names
