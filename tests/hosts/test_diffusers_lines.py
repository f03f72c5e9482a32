"""The lines of the READMEs that need no checkout, word for word, on tiny random pipelines of the same classes; only
pictures smaller and, for the GPU to offload to, the CPU. FLUX Fill and Control are in test_flux_tools.py, the demo
models with --compare in .ci/run, --lora and --context_parallel in test_magcache_pipeline.py."""

import runpy
from pathlib import Path

import diffusers
import pytest
import torch
from flux_scripts import DEMO
from hunyuan_helpers import Diffusers
from PIL import Image
from readme_commands import REPOSITORY, of_script, readme
from tiny_pipelines import TEXT, WIDTH, embeds, flow, qwen_image, random_model, wan, wan22

SCRIPT = "MagCache4Diffusers/magcache_pipeline.py"
FOLDERS = ("MagCache4Diffusers", "MagCache4HunyuanVideo", "MagCache4Wan2.1", "MagCache4Wan2.2")


def hunyuanvideo():
    vae = random_model(
        "AutoencoderKLHunyuanVideo", latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
        norm_num_groups=4,
    )  # fmt: skip
    pipe = diffusers.HunyuanVideoPipeline(None, None, Diffusers().model, vae, flow(shift=7.0), None, None)
    return pipe, lambda seed: {}


# model: (a tiny pipeline, what its prompts come to)
MODELS = {
    "Qwen/Qwen-Image": (qwen_image, lambda: (embeds(1, 1, TEXT, WIDTH), torch.ones(1, TEXT, dtype=torch.long))),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (wan, lambda: (embeds(1, 1, TEXT, WIDTH), embeds(9, 1, TEXT, WIDTH))),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": (wan22, lambda: (embeds(1, 1, TEXT, WIDTH), embeds(9, 1, TEXT, WIDTH))),
    "hunyuanvideo-community/HunyuanVideo": (
        hunyuanvideo,
        lambda: (embeds(1, 1, 6, 8), embeds(1, 1, 8), torch.ones(1, 6)),
    ),
}
LINES = [argv for folder in FOLDERS for torchrun, argv in of_script(readme(folder), SCRIPT) if argv[1] in MODELS]


@pytest.mark.parametrize("argv", LINES, ids=lambda argv: " ".join(argv[1::2])[:50])
def test_a_line_of_a_readme_renders(argv, tmp_path, monkeypatch, capsys):
    main = runpy.run_path(str(REPOSITORY / SCRIPT))["main"]
    tiny, prompts = MODELS[argv[1]]
    pipe, _ = tiny()
    pipe.encode_prompt = lambda *args, **kwargs: prompts()
    monkeypatch.setitem(main.__wrapped__.__globals__, "load_model", lambda args: pipe)
    monkeypatch.setitem(main.__wrapped__.__globals__, "accelerator", lambda: "cpu:0" if "--offload" in argv else "cpu")
    monkeypatch.setenv("MAGCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [SCRIPT, *argv, "--height", "32", "--width", "32"])
    main()
    said = capsys.readouterr().out
    assert "of 50" in said
    (report,) = Path().glob("*.magcache.json")
    (video,) = [path for path in Path().iterdir() if path.suffix in (".mp4", ".png")]
    assert report.name.split(".magcache")[0] == video.name.rsplit(".", 1)[0] and " reused" in said


SHARED = [
    argv for torchrun, argv in of_script(readme("MagCache4Diffusers"), SCRIPT) if torchrun and "--prompt_file" in argv
]


def test_four_processes_share_a_file_of_prompts(tmp_path, monkeypatch):
    """MODEL is the demo's folder here."""
    (argv,) = SHARED
    monkeypatch.chdir(tmp_path)
    Path("MODEL").symlink_to(DEMO)
    Path("prompts.txt").write_text("\n".join(f"a red balloon {number}" for number in range(5)))
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr("sys.argv", [SCRIPT, *argv, "--height", "32", "--width", "32"])
        runpy.run_path(str(REPOSITORY / SCRIPT))["main"]()
    assert {path.name for path in Path().glob("*.png")} == {f"magcache_MODEL_{number}.png" for number in range(1, 6)}


FLUX_LINES = [
    (folder, script, argv)
    for folder, script in (("MagCache4FLUX", "magcache_flux.py"), ("MagCache4FLUX_schnell", "magcache_flux_schnell.py"))
    for _, argv in of_script(readme(folder), f"{folder}/{script}")
    if "demo" not in argv
]


@pytest.mark.parametrize(
    "folder, script, argv", FLUX_LINES, ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else value
)
def test_a_line_of_flux_renders(folder, script, argv, dev_like, tmp_path, monkeypatch, capsys):
    """The default model is a narrow one with FLUX.1-dev's number of blocks, and so is my/finetune."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAGCACHE_HOME", str(tmp_path / "home"))
    Path("prompts.txt").write_text("a cat\na dog")
    Image.new("RGB", (64, 64), "red").save("cat.png")
    Path("my").mkdir()
    Path("my/finetune").symlink_to(dev_like)
    more = ["--height", "32", "--width", "32"]
    if "black-forest-labs/FLUX.1-Kontext-dev" in argv:
        parts = diffusers.FluxPipeline.from_pretrained(dev_like).components
        unused = ("image_encoder", "feature_extractor")
        pipe = diffusers.FluxKontextPipeline(**{name: parts[name] for name in parts if name not in unused})
        Path("black-forest-labs").mkdir()
        pipe.save_pretrained("black-forest-labs/FLUX.1-Kontext-dev")
        module = runpy.sys.modules[diffusers.FluxKontextPipeline.__module__]
        monkeypatch.setattr(module, "PREFERRED_KONTEXT_RESOLUTIONS", [(64, 64)])
        more = []
    if "--model" not in argv:
        more += ["--model", str(dev_like)]
    if "--magcache_speedup" not in argv and "--model" not in argv:  # by which the default model is known
        more += ["--mag_ratios", "flux-schnell" if "schnell" in folder else "flux-dev"]
    monkeypatch.setattr("sys.argv", [script, *argv, *more])
    runpy.run_path(str(REPOSITORY / folder / script), run_name="__main__")
    said = capsys.readouterr().out
    assert ("Measured" in said or "saved as" in said) if "--magcache_calibration" in argv else " reused" in said
    assert len(list(Path().glob("magcache_*.png"))) >= (2 if "--prompt_file" in argv else 1)
