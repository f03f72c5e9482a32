"""Two processes of one group, as torchrun starts them, on gloo."""

import multiprocessing
import tempfile

import torch
import torch.distributed as dist

SECONDS = 120


def two_ranks(work, *arguments):
    """Run work(rank, *arguments) in each of two processes, and wait for both; fails where one of them does. What they
    find out they leave in files. Forked: spawned processes would import torch and diffusers once more each."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as meeting:
        processes = [context.Process(target=member, args=(rank, meeting, work, arguments)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(SECONDS)
            process.kill()  # one that waits for the other, which failed
        assert [process.exitcode for process in processes] == [0, 0]


def member(rank, meeting, work, arguments):
    torch.set_num_threads(1)  # threads of before the fork are not here, and a product of matrices would wait for them
    dist.init_process_group("gloo", init_method=f"file://{meeting}/group", rank=rank, world_size=2)
    work(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()
