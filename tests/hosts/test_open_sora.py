"""Open-Sora: models shaped like MMDiTModel (2.0) and STDiT3 (1.2, 1.3), compared bit for bit with runs that no patch
touched. The drop-in is in test_open_sora_script.py."""

from pathlib import Path

import pytest
import torch
from open_sora_toys import WIDTH, MMDiT, Ran, Reused, STDiT3
from ranks import two_ranks

from common.hosts.checkouts import STDIT3, mmdit
from common.patch import magcache_calibration, magcache_forward
from common.ratios import flow_sigmas
from common.schedule import Settings
from common.tables import RatioTable, read

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 12
RATIOS = RatioTable(
    name="toy",
    origin="measured",
    sigmas=tuple(flow_sigmas(STEPS, 3.0)),
    mag_ratios={"cond": [1.0] + [0.98] * 11},
    sampler={"shift": 3.0},
)
REUSING = Settings(0.5, 3, 0.2)


class BatchSampler:
    """Euler steps with the branches of guidance in one batch, as the hosts' samplers drive their model. bare: arguments
    by position; held: the first frames are given (1.2), so that x_mask changes on the way."""

    def __init__(self, model):
        self.model, self.timesteps = model, None

    @torch.no_grad()
    def run(self, seed=0, steps=STEPS, dtype=torch.float32, bare=False, held=False, shift=3.0):
        made = torch.Generator().manual_seed(seed)
        sigmas = [*flow_sigmas(steps, shift), 0.0]
        self.timesteps = [1000 * sigma for sigma in sigmas[:-1]]
        texts = torch.randn(3, 6, WIDTH, generator=made).to(dtype)
        if isinstance(self.model, STDiT3):
            z = torch.randn(1, 4, 5, 2, 4, generator=made).to(dtype)
            for sigma, following in zip(sigmas, sigmas[1:]):
                given = {"x_mask": torch.tensor([[sigma < 0.5] * 2 + [True] * 3]).repeat(2, 1)} if held else {}
                output = self.model(torch.cat([z, z]), torch.tensor([1000 * sigma] * 2), texts[:2], **given)
                cond, uncond = output.chunk(2, dim=1)[0].chunk(2)
                z = z + (sigma - following) * (uncond + 4 * (cond - uncond))  # float32 from the first step on
            return z
        img = torch.randn(1, 40, 8, generator=made).to(dtype)
        for sigma, following in zip(sigmas, sigmas[1:]):
            level, cond = torch.full((3,), sigma, dtype=dtype), torch.zeros(3, 40, 12, dtype=dtype)
            values = {
                "img": img.repeat(3, 1, 1),
                "img_ids": None,
                "txt": texts,
                "txt_ids": None,
                "timesteps": level,
                "y_vec": texts.mean(1),
                "cond": cond,
                "guidance": level,
            }
            given, without, neither = (self.model(*values.values()) if bare else self.model(**values)).chunk(3)
            img = img + (following - sigma) * (neither + 2 * (without - neither) + 3 * (given - without))
        return img


KINDS = {"mmdit": (MMDiT, mmdit(1)), "stdit3": (STDiT3, STDIT3)}


@pytest.fixture(params=KINDS)
def kind(request):
    """(how a sampler with a new model is made, the host's facts)"""
    made, host = KINDS[request.param]
    return lambda dtype=torch.float32, **options: BatchSampler(made(**options).to(dtype)), host


def cached_sampler(sampler, host, settings=REUSING, **options):
    return magcache_forward(sampler.model, host, RATIOS, settings, lambda: sampler.timesteps, announce=None, **options)


# The two models


@pytest.mark.parametrize("settings", [Settings(0.0, 3, 0.2), Settings(0.5, 0, 0.2)], ids=["thresh", "K"])
def test_un_cached_is_bit_equal(kind, settings):
    sampler, host = kind[0](), kind[1]
    with cached_sampler(sampler, host, settings):
        result = sampler.run()
    assert torch.equal(result, kind[0]().run())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reused_steps_equal_a_full_computation(kind, dtype):
    sampler, reference, host = kind[0](dtype), kind[0](dtype), kind[1]
    ran = Ran(sampler.model)
    with cached_sampler(sampler, host) as handle:
        result = sampler.run(dtype=dtype)
    strip = handle.reports[0].schedule.strip
    assert strip.count(".") >= 6 and ran.strip == strip and handle.reports[0].unplanned == {}
    Reused(reference.model, strip)
    assert torch.equal(result, reference.run(dtype=dtype))
    assert not torch.equal(result, kind[0](dtype).run(dtype=dtype))


def test_steps_whose_timesteps_bfloat16_cannot_tell_apart(kind):
    """Open-Sora 2.0 at 768px: fifty steps, the first of them 0.002 apart and all rounded to 1."""
    sampler, host = kind[0](torch.bfloat16), kind[1]
    ran = Ran(sampler.model)
    with cached_sampler(sampler, host) as handle:
        sampler.run(dtype=torch.bfloat16, steps=50, shift=11.9)
    (report,) = handle.reports
    assert report.complete and report.unplanned == {} and ran.strip == report.schedule.strip and report.reused >= 20


def test_frames_that_are_held_on_the_way():
    sampler, reference = BatchSampler(STDiT3()), BatchSampler(STDiT3())
    with cached_sampler(sampler, STDIT3) as handle:
        result = sampler.run(held=True)
    Reused(reference.model, handle.reports[0].schedule.strip)
    assert torch.equal(result, reference.run(held=True)) and not torch.equal(result, sampler.run(held=True))


def test_a_forward_on_the_instance_by_position():
    """No class has it, so that the names of its arguments are the instance's."""
    sampler = BatchSampler(MMDiT())
    with cached_sampler(sampler, mmdit(1)):
        by_name = sampler.run()
    with cached_sampler(sampler, mmdit(1)) as handle:
        by_position = sampler.run(bare=True)
    assert torch.equal(by_name, by_position) and handle.reports[0].reused > 0
    assert "forward" in vars(sampler.model)
    assert torch.equal(sampler.run(), BatchSampler(MMDiT()).run())


def test_clips_one_after_another(kind):
    sampler, host = kind[0](), kind[1]
    with cached_sampler(sampler, host) as handle:
        clips = [sampler.run(seed=seed) for seed in (0, 1)]
    with cached_sampler(sampler, host):
        alone = sampler.run(seed=1)
    assert torch.equal(clips[1], alone) and [report.complete for report in handle.reports] == [True, True]


def test_announced_memory_is_what_is_kept(kind):
    said, sampler = [], kind[0](torch.bfloat16)
    with magcache_forward(
        sampler.model, kind[1], RATIOS, REUSING, lambda: sampler.timesteps, announce=said.append
    ) as handle:
        sampler.run(dtype=torch.bfloat16)
    assert f"{handle.reports[0].peak_bytes / 1024:.1f} KiB per branch" in said[0]


def test_calibration_changes_nothing_and_measures(kind, tmp_path):
    sampler, reference, host = kind[0](), kind[0](), kind[1]
    with magcache_calibration(sampler.model, host, lambda: sampler.timesteps, "toy", tmp_path / "toy.json"):
        result = sampler.run()
    assert torch.equal(result, reference.run())
    rows, model = [], reference.model
    pairs = isinstance(model, STDiT3)
    first = (model.spatial_blocks if pairs else model.double_blocks)[0]
    first.register_forward_pre_hook(lambda block, args: rows.append(-args[0]))
    model.final_layer.register_forward_pre_hook(lambda layer, args: rows.append(rows.pop() + args[0]))
    reference.run()
    expected = [1.0] + [(new.norm(dim=-1) / old.norm(dim=-1)).mean().item() for old, new in zip(rows, rows[1:])]
    assert read(tmp_path / "toy.json").mag_ratios["cond"] == pytest.approx(expected, abs=2e-6)


# Two processes that share the tokens


def rank_of_two(rank, folder):
    results = {}
    for name, made, host in (
        ("mmdit", lambda: MMDiT().share(), mmdit(2)),
        ("stdit3", lambda: STDiT3(parallel=True), STDIT3),
    ):
        sampler = BatchSampler(made())
        with magcache_calibration(
            sampler.model, host, lambda sampler=sampler: sampler.timesteps, name, folder / f"{name}.json"
        ) as handle:
            plain = sampler.run()
        with cached_sampler(sampler, host) as cache:
            reused = sampler.run()
        reference = BatchSampler(made())
        Reused(reference.model, cache.reports[0].schedule.strip)
        results[name] = {
            "plain": plain,
            "reused": reused,
            "expected": reference.run(),
            "ratios": handle.table.mag_ratios,
            "peak": cache.reports[0].peak_bytes,
        }
    torch.save(results, folder / f"{rank}.pt")


def test_two_processes_with_unequal_shares_hold_one_table(tmp_path):
    two_ranks(rank_of_two, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, (made, host) in KINDS.items():
        assert first[name]["ratios"] == second[name]["ratios"]
        whole = BatchSampler(made())
        with magcache_calibration(whole.model, host, lambda whole=whole: whole.timesteps, name) as handle:
            plain = whole.run()
        assert torch.allclose(first[name]["plain"], plain, atol=1e-4)
        assert first[name]["ratios"]["cond"] == pytest.approx(handle.table.mag_ratios["cond"], abs=1e-4)
        for one in (first[name], second[name]):
            assert torch.equal(one["reused"], one["expected"]) and not torch.equal(one["reused"], one["plain"])
    # 46 tokens, 6 of them text: 17 of the image on one rank, 23 on the other.
    assert [one["mmdit"]["peak"] for one in (first, second)] == [3 * 17 * WIDTH * 4, 3 * 23 * WIDTH * 4]
