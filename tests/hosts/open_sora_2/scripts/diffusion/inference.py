import argparse
import ast
import copy
import os
import random
import runpy

import torch
from opensora.registry import Config
from opensora.utils.inference import process_and_save
from opensora.utils.sampling import SamplingOption, prepare_api, prepare_models, sanitize_sampling_option


def parse_configs():
    """Pairs of name and value; an unknown name goes into the configuration without a word, as in the original."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    args, pairs = parser.parse_known_args()
    cfg = Config({key: value for key, value in runpy.run_path(args.config).items() if not key.startswith("_")})
    for key, value in zip(pairs[::2], pairs[1::2]):
        assert key.startswith("--"), f"Invalid argument: {key}"
        try:
            cfg[key[2:]] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            cfg[key[2:]] = value
    return cfg


def parse_alias(cfg):
    for name in ("num_steps", "num_frames"):
        if cfg.get(name):
            cfg.sampling_option[name] = cfg[name]
    return cfg


@torch.inference_mode()
def main():
    cfg = parse_alias(parse_configs())
    random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    option = sanitize_sampling_option(SamplingOption(**cfg.sampling_option))
    os.makedirs(os.path.join(cfg.save_dir, "video"), exist_ok=True)
    model, model_ae, t5, clip, optional = prepare_models(cfg, "cpu", torch.float32)
    api_fn = prepare_api(model, model_ae, t5, clip, optional)
    if cfg.get("use_t2i2v"):
        api_fn_img = prepare_api(optional["img_flux"], optional["img_flux_ae"], t5, clip, optional)
    cond_type = cfg.get("cond_type", "t2v")
    for index, prompt in enumerate(str(cfg.prompt).split("|")):
        batch = {"text": [prompt], "index": [index]}
        if cfg.get("ref"):
            batch["ref"] = [cfg.ref]
        if cfg.get("use_t2i2v"):
            still = copy.copy(option)
            still.num_frames = 1
            picture = api_fn_img(still, "t2v", **batch)
            batch["ref"] = process_and_save(picture, batch, cfg, "video", still, 0, 0)
            batch["name"], cond_type = [f"{batch['ref'][0]}_video"], "i2v_head"
        x = api_fn(option, cond_type, seed=None, channel=8, **batch)
        process_and_save(x, batch, cfg, "video", option, 0, 0)


if __name__ == "__main__":
    main()
