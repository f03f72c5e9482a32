"""Stands in for the generate.py of a Wan2.2 checkout, which the package wan22 does not have: the flags that the drop-in
reads and the package's pipelines need, one pipeline a task, and its own writer of videos."""

import argparse
import os

import torch
import torch.distributed as dist
import wan
from PIL import Image
from wan.configs import MAX_AREA_CONFIGS, SIZE_CONFIGS, WAN_CONFIGS
from wan.utils.utils import save_video, str2bool

PIPELINES = {
    "t2v-A14B": "WanT2V",
    "i2v-A14B": "WanI2V",
    "ti2v-5B": "WanTI2V",
    "s2v-14B": "WanS2V",
    "animate-14B": "WanAnimate",
}


def _parse_args():
    parser = argparse.ArgumentParser(description="Generate a video by Wan2.2.")
    parser.add_argument("--task", choices=list(PIPELINES), default="t2v-A14B")
    parser.add_argument("--size", choices=list(SIZE_CONFIGS), default="1280*720")
    for name in ("--prompt", "--ckpt_dir", "--image", "--save_file", "--audio", "--src_root_path"):
        parser.add_argument(name)
    for name in ("--frame_num", "--sample_steps", "--infer_frames"):
        parser.add_argument(name, type=int)
    for name in ("--sample_shift", "--sample_guide_scale"):
        parser.add_argument(name, type=float)
    parser.add_argument("--base_seed", type=int, default=0)
    parser.add_argument("--sample_solver", choices=["unipc", "dpm++"], default="unipc")
    parser.add_argument("--offload_model", type=str2bool, default=True)
    parser.add_argument("--ulysses_size", type=int, default=1)
    for name in ("--t5_fsdp", "--t5_cpu", "--dit_fsdp", "--convert_model_dtype"):
        parser.add_argument(name, action="store_true")
    args = parser.parse_args()
    for name in ("frame_num", "sample_steps", "sample_shift", "sample_guide_scale"):
        if getattr(args, name) is None:
            setattr(args, name, WAN_CONFIGS[args.task][name])
    return args


def inputs(args):
    if args.task == "animate-14B":
        return {"src_root_path": args.src_root_path, "clip_len": args.frame_num, "refert_num": 1}
    area = {"max_area": MAX_AREA_CONFIGS[args.size]} if args.task != "t2v-A14B" else {}
    if args.task == "s2v-14B":
        sound = dict.fromkeys(("tts_prompt_audio", "tts_prompt_text", "tts_text")) | {"audio_path": args.audio}
        picture = {"ref_image_path": args.image, "infer_frames": args.infer_frames, "num_repeat": 2}
        return {"input_prompt": args.prompt, "enable_tts": False, **sound, **picture, **area}
    size = {"size": SIZE_CONFIGS[args.size]} if args.task != "i2v-A14B" else {}
    picture = {"img": args.image and Image.open(args.image).convert("RGB")} if area else {}
    return {"input_prompt": args.prompt, "frame_num": args.frame_num, **size, **picture, **area}


def generate(args):
    rank = int(os.environ.get("RANK", 0))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group(backend="nccl", init_method="env://")
    # The two experts' classes in the package leave out guidance unless told otherwise.
    guided = {"lightning": False} if "A14B" in args.task else {}
    pipe = getattr(wan, PIPELINES[args.task])(
        config=WAN_CONFIGS[args.task],
        checkpoint_dir=args.ckpt_dir,
        device_id=0,
        rank=rank,
        t5_fsdp=args.t5_fsdp,
        dit_fsdp=args.dit_fsdp,
        use_sp=args.ulysses_size > 1,
        t5_cpu=args.t5_cpu,
        convert_model_dtype=args.convert_model_dtype,
        **guided,
    )
    with torch.no_grad():
        video = pipe.generate(
            **inputs(args),
            shift=args.sample_shift,
            sample_solver=args.sample_solver,
            sampling_steps=args.sample_steps,
            guide_scale=args.sample_guide_scale,
            seed=args.base_seed,
            offload_model=args.offload_model,
        )
    if rank == 0:
        args.save_file = args.save_file or f"{args.task}_{args.base_seed}.mp4"
        save_video(
            tensor=video[None],
            save_file=args.save_file,
            fps=WAN_CONFIGS[args.task].sample_fps,
            nrow=1,
            normalize=True,
            value_range=(-1, 1),
        )


if __name__ == "__main__":
    generate(_parse_args())
