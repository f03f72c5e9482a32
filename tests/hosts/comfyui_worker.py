"""Runs the checks of comfyui_*_checks.py in a process that has a ComfyUI tree on its path: one name a line on standard
input, one JSON line with the outcome on standard output.

    python comfyui_worker.py COMFYUI_ROOT CUSTOM_NODES_FOLDER
"""

import asyncio
import json
import os
import sys
import traceback
from pathlib import Path


def start(root, custom_nodes):
    sys.path.insert(0, str(root))
    from comfy.cli_args import args

    args.cpu = True  # before anything asks for the device
    args.use_pytorch_cross_attention = (
        True  # as on a GPU; what a CPU takes looks at the free memory and compiles each time anew
    )
    import torch

    torch.set_num_threads(1)
    import folder_paths

    folder_paths.set_output_directory(str(Path(custom_nodes).parent / "output"))
    folder_paths.set_temp_directory(str(Path(custom_nodes).parent / "temp"))
    import nodes

    folder = str(Path(custom_nodes) / "ComfyUI-MagCache")
    loaded = asyncio.run(nodes.load_custom_node(folder))
    assert loaded, f"ComfyUI did not load {folder}"


def main():
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what ComfyUI prints goes to standard error
    start(Path(sys.argv[1]), sys.argv[2])
    sys.path.insert(0, str(Path(__file__).parent))
    import comfyui_change_checks
    import comfyui_fault_checks
    import comfyui_first_run_checks
    import comfyui_measure_checks
    import comfyui_model_checks
    import comfyui_package_checks
    import comfyui_plan_checks
    import comfyui_run_checks

    modules = (
        comfyui_change_checks,
        comfyui_fault_checks,
        comfyui_first_run_checks,
        comfyui_measure_checks,
        comfyui_model_checks,
        comfyui_package_checks,
        comfyui_plan_checks,
        comfyui_run_checks,
    )
    checks = {name: check for module in modules for name, check in vars(module).items()}
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            checks[name](*arguments)
            answer = {"failure": None}
        except BaseException:  # also what ComfyUI raises to interrupt
            answer = {"failure": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
