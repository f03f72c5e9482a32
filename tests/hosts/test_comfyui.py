"""The ComfyUI nodes in real ComfyUI trees, an old and a new one, in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui_served import HERE, REPOSITORY, TREES, comfyui, environment


class Worker:
    """A process with a ComfyUI tree in it that runs checks by name."""

    def __init__(self, version, folder):
        self.log = (folder / "log.txt").open("w")
        (folder / "output").mkdir()
        (folder / "custom_nodes").mkdir()
        (folder / "custom_nodes" / "ComfyUI-MagCache").symlink_to(REPOSITORY / "ComfyUI-MagCache")
        self.process = subprocess.Popen(
            [sys.executable, HERE / "comfyui_worker.py", comfyui(version), folder / "custom_nodes"],
            text=True,
            bufsize=1,
            env=environment(folder / "home"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            cwd=folder,
        )

    def run(self, check, *arguments):
        if self.process.poll() is None:
            print(json.dumps([check, *arguments]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        log = "\n".join(Path(self.log.name).read_text().splitlines()[-15:])
        assert answer, f"the process with ComfyUI is gone:\n{log}"
        failure = json.loads(answer)["failure"]
        assert failure is None, f"{failure}\nconsole:\n{log}"

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


@pytest.fixture(scope="module", params=TREES)
def worker(request, tmp_path_factory):
    worker = Worker(request.param, tmp_path_factory.mktemp("comfyui"))
    yield worker
    worker.close()


CHANGES = (
    "a control net begins, ends or changes its strength; a scheduled LoRA (hook), the prompt or the guidance changes"
)
ROWS = {  # of docs/robustness.md: what was tried, what happens
    "control_nets_rest_on_reused_steps": (CHANGES, "the next call computes, with the reason"),
    "regions_and_schedules": (
        "prompts in ranges of the run, areas, regional prompts",
        "each conditioning has its own residual",
    ),
    "context_windows": (
        "context windows, fixed or moving",
        "each window has its own residual; what no later step uses is dropped",
    ),
    "moving_windows_hoard_nothing": ("context windows, fixed or moving",),
    "what_exceeds_the_limit_computes": ("more than `cache_limit` would be kept", "what does not fit computes"),
    "fewer_tokens_compute": ("tokens of reference images disappear after the first step", "that step computes"),
    "replaced_first_block": (
        "another patch changes what enters the first block, or skips it",
        "the check at the first computed call notices; the output is predicted",
    ),
    "facts_that_are_wrong_are_noticed": (
        "wrong facts about a model class",
        "the check at the first computed call notices; the output is predicted, and a calibration writes nothing",
    ),
    "a_partial_run_replaces_no_calibration": (
        "a calibration over part of the steps",
        "it does not replace one that covers more, and no error is predicted beyond it",
    ),
    "rising_noise_computes": ("unsampling (FlipSigmas), runs of four steps", "compute, and the node says why"),
    "short_runs_compute": ("unsampling (FlipSigmas), runs of four steps",),
    "a_run_knows_nothing_of_the_one_before": (
        "a run is interrupted at any of its calls",
        "nothing stays on the model; the next run equals the run alone",
    ),
}


def checks(*entries):
    """Parameters of a test, each the name of a check and its arguments, with the mark of those that have a row."""
    return [
        pytest.param(
            check,
            marks=[pytest.mark.robustness("In ComfyUI", *ROWS[check[0]], name=check[0])] if check[0] in ROWS else [],
            id="-".join(map(str, check)),
        )
        for check in entries
    ]


FAMILIES = ("flux", "flux2", "chroma", "wan", "wan_i2v", "vace", "hunyuan", "hunyuan1.5", "qwen")


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("check", ["nothing_skipped_is_plain", "reuse_is_what_it_should_be"])
def test_family(worker, check, family, cfg):
    worker.run(check, family, cfg)


COMMON_SAMPLERS = ("euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_sde", "uni_pc", "res_multistep")
SAMPLERS = (
    "euler_cfg_pp",
    "heunpp2",
    "dpm_2",
    "dpm_2_ancestral",
    "lms",
    "dpm_fast",
    "dpm_adaptive",
    "dpmpp_2s_ancestral",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "ddpm",
    "lcm",
    "ipndm",
    "deis",
    "gradient_estimation",
    "er_sde",
    "seeds_2",
    "seeds_3",
    "sa_solver",
    "ddim",
)


@pytest.mark.parametrize("sampler", COMMON_SAMPLERS)
def test_sampler(worker, sampler):
    worker.run("sampler_skips_the_planned_steps", sampler)


@pytest.mark.parametrize("worker", ["0.30.0"], indirect=True)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_other_sampler(worker, sampler):
    worker.run("sampler_skips_the_planned_steps", sampler)


@pytest.mark.parametrize(
    "check",
    checks(
        ("batched_is_split", "flux"),
        ("batched_is_split", "wan"),
        ("batched_is_split", "chroma"),
        ("image_to_image", 0.5),
        ("image_to_image", 0.3),
        ("two_stages",),
        ("a_run_knows_nothing_of_the_one_before",),
        ("nothing_is_kept_after_a_run",),
        ("regions_and_schedules", "flux"),
        ("regions_and_schedules", "wan"),
        ("context_windows",),
        ("skip_layer_guidance",),
        ("reference_pictures",),
        ("controls_count_once", "flux"),
        ("controls_count_once", "qwen"),
        ("replaced_first_block",),
        ("beside_other_wrappers",),
        ("the_last_magcache_node_holds",),
        ("window_of_steps",),
        ("cache_on_the_cpu",),
        ("what_cannot_be_cached_renders_plain",),
        ("a_model_without_ratios_is_planned",),
        ("mistakes_are_refused_by_the_node",),
        ("recommended_settings",),
        ("wan22_in_two_samplers",),
    ),
)
def test_run(worker, check):
    worker.run(*check)


@pytest.mark.parametrize(
    "check",
    checks(
        *(
            ("calibration_measures", family, cfg, free)
            for family, cfg, free in (
                ("flux", 1.0, 2**40),
                ("flux", 3.0, 2**40),
                ("flux", 3.0, 0),
                ("wan", 3.0, 2**40),
                ("chroma", 3.0, 0),
                ("qwen", 1.0, 0),
                ("hunyuan", 1.0, 0),
                ("vace", 3.0, 2**40),
            )
        ),
        *(
            ("calibration_with_a_sampler", sampler)
            for sampler in ("heun", "dpmpp_2m", "dpmpp_2s_ancestral", "res_multistep")
        ),
        ("interrupted_calibration_writes_nothing",),
        ("planned_speedup",),
        ("loras_have_calibrations_of_their_own",),
        ("packed_weights_are_not_unpacked",),
    ),
)
def test_calibration(worker, check):
    worker.run(*check)


@pytest.mark.parametrize(
    "check",
    checks(
        ("first_run_is_measured", "flux", 3.0),
        ("first_run_is_measured", "zimage", 1.0),
        ("first_run_is_measured", "wan", 3.0),
        ("the_switch_holds",),
        ("a_model_with_published_ratios_is_not_measured",),
        ("interrupted_first_run_writes_nothing",),
        ("a_partial_first_run_stands_for_no_fuller_one",),
        ("first_runs_of_loras_are_their_own",),
        ("both_of_two_samplers_are_measured",),
        ("what_cannot_be_measured_is_cached_all_the_same",),
    ),
)
def test_first_run(worker, check):
    worker.run(*check)


@pytest.mark.parametrize(
    "check",
    checks(
        ("wan22_is_told_from_wan21",),
        ("a_part_of_the_steps_is_noticed",),
        ("no_table_is_borrowed",),
        ("a_partial_run_replaces_no_calibration",),
        ("moving_windows_hoard_nothing",),
        ("what_exceeds_the_limit_computes",),
        ("fewer_tokens_compute",),
        ("control_nets_rest_on_reused_steps", 0.0, 1.0),
        ("control_nets_rest_on_reused_steps", 0.2, 0.6),
        ("rising_noise_computes",),
        ("short_runs_compute",),
        ("runs_without_a_step_pass",),
        ("bypass_loras_have_calibrations_of_their_own",),
        ("a_name_with_dashes_is_shown",),
        ("a_calibration_that_is_not_used_is_named",),
    ),
)
def test_fault(worker, check):
    worker.run(*check)


@pytest.mark.robustness("In ComfyUI", CHANGES)
@pytest.mark.parametrize(
    "change",
    ["strength_of_a_control_net", "scheduled_lora", "changed_prompt", "changed_guidance", "prompt_in_ranges"],
)
def test_change(worker, change):
    worker.run("a_change_in_mid_run_computes", change)


@pytest.mark.robustness("In ComfyUI", CHANGES)
@pytest.mark.parametrize("before, after", [(1.0, 5.0), (5.0, 1.0), (2.0, 8.0), (8.0, 2.0)])
def test_guidance_that_changes(worker, before, after):
    worker.run("guidance_that_changes", before, after)


@pytest.mark.robustness(
    "In ComfyUI",
    "a guidance that calls the model again at another latent",
    "the other calls are as without it, bit for bit",
)
def test_third_call(worker):
    worker.run("a_third_call_of_a_guidance_has_residuals_of_its_own")


@pytest.mark.parametrize("family, order, fullgraph", [("flux", "compile first", True), ("wan", "cache first", True)])
def test_compiled(worker, family, order, fullgraph):
    worker.run("compiled", family, order, fullgraph)


@pytest.mark.parametrize("worker", ["0.30.0"], indirect=True)
def test_compiled_in_several_graphs(worker):
    worker.run("compiled", "flux", "cache first", False)


@pytest.mark.parametrize("node", ["CompileModel", "TorchCompileModel"])
def test_compiled_runs_report_no_loss(worker, node):
    worker.run("compiled_runs_report_no_loss", node)


@pytest.mark.parametrize("mode", ["default", "max-autotune", "max-autotune-no-cudagraphs", "reduce-overhead"])
def test_compile_modes(worker, mode):
    worker.run("compile_options", mode)


@pytest.mark.parametrize(
    "name", sorted(path.name for path in (REPOSITORY / "ComfyUI-MagCache" / "examples").glob("*.json"))
)
def test_example(worker, name):
    worker.run("example_is_valid", name)


@pytest.mark.parametrize(
    "check", ["the_released_package_is_not_replaced", "without_common_it_says_what_to_do", "a_whole_clone_loads"]
)
def test_package(worker, check):
    worker.run(check)


@pytest.mark.parametrize(
    "family",
    ["sd15", "sd3", "zimage", "ltxv", "ltxav", "cosmos2", "auraflow", "hidream", "omnigen2"]
    + ["ernie", "krea2", "camera", "humo", "kandinsky5", "cogvideox", "wan", "qwen"],
)
def test_output(worker, family):
    worker.run("output_is_predicted", family)


@pytest.mark.parametrize("worker", ["0.30.0"], indirect=True)
@pytest.mark.parametrize(
    "family",
    ["sd3", "zimage", "ltxv", "cosmos2", "anima", "hidream", "omnigen2", "boogu", "ernie", "krea2", "lens", "mageflow"]
    + [
        "auraflow",
        "mochi",
        "hunyuandit",
        "acestep",
        "ideogram4",
        "pixart",
        "joyimage",
        "kandinsky5",
        "cogvideox",
        "hunyuan3d",
        "camera",
        "humo",
        "s2v",
        "animate",
        "scail",
        "scail2",
        "wandancer",
    ],
)
def test_residual(worker, family):
    worker.run("residual_is_put_back", family)


@pytest.mark.parametrize("worker", ["0.30.0"], indirect=True)
@pytest.mark.parametrize(
    "sampler",
    ["euler", "ddim", "euler_ancestral", "heun", "dpm_2", "dpmpp_2m", "dpmpp_sde", "dpmpp_2m_sde", "uni_pc", "lcm"]
    + ["res_multistep", "euler_cfg_pp", "er_sde", "ipndm"],
)
def test_output_with_a_sampler(worker, sampler):
    worker.run("output_with_a_sampler", sampler)


def test_models(worker):
    worker.run("models_are_as_the_table_says")


@pytest.mark.parametrize("worker", ["0.30.0"], indirect=True)
@pytest.mark.parametrize("check", ["settings_are_as_the_readme_says", "every_described_class_is_tried"])
def test_settings(worker, check):
    worker.run(check)


@pytest.mark.parametrize(
    "check", checks(("facts_that_are_wrong_are_noticed",), ("thresholds_without_blocks_or_ratios_are_answered",))
)
def test_facts(worker, check):
    worker.run(*check)


def test_recognition(worker):
    worker.run("classes_are_recognised")
