"""Plans: exact where they claim to be, and never slower for more memory."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest

from tunekit import families, hardware
from tunekit.config import AdapterConfig
from tunekit.memory import planner as planning
from tunekit.memory.job import Job, trace_step
from tunekit.memory.planner import Costs, Planner, Room, Speed, choose_units, divisors, room_of
from tunekit.memory.trace import CPU, CUDA

SPEED = Speed(25e12, 12e12, 360e9)


@pytest.fixture(scope="module")
def job() -> Job:
    blueprint = families.blueprint_of("sd15", "tiny")
    return Job(blueprint, AdapterConfig(rank=4, alpha=4), size=(128, 128), preview=(64, 64))


@pytest.fixture(scope="module")
def planner(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Planner:
    return Planner(job, batch_size=4, cache=tmp_path_factory.mktemp("traces"))


def room(total: int, context: int = 0) -> Room:
    return Room("a card", total, context, CPU, SPEED)


def brute_force(keeping: Costs, checkpointing: Costs, seconds: list[float], budget: int) -> float | None:
    best = None
    for chosen in itertools.product([False, True], repeat=len(seconds)):
        held, fits = 0, True
        for unit, twice in enumerate(chosen):
            costs = checkpointing if twice else keeping
            fits &= held + costs.need[unit] <= budget
            held += costs.kept[unit]
        fits &= held + keeping.need[-1] <= budget
        cost = sum(itertools.compress(seconds, chosen))
        if fits and (best is None or cost < best):
            best = cost
    return best


@pytest.mark.parametrize("seed", range(20))
def test_the_cheapest_units_are_chosen(seed: int) -> None:
    draw = random.Random(seed)
    count = 9
    kept = [draw.randrange(50, 400) for _ in range(count)]  # in all below 4096: nothing is rounded
    small = [size // draw.randrange(3, 20) for size in kept]
    keeping = Costs([""] * count, kept, [k + draw.randrange(150) for k in [*kept, 50]], [], 1, {})
    twice = Costs([""] * count, small, [k + 50 for k in keeping.need[:-1]] + keeping.need[-1:], [], 1, {})
    seconds = [draw.uniform(1, 10) for _ in range(count)]
    for budget in (sum(kept) // 4, sum(kept) // 2, int(sum(kept) * 0.8), sum(kept) * 2):
        found = choose_units(keeping, twice, seconds, budget)
        best = brute_force(keeping, twice, seconds, budget)
        assert (found is None) == (best is None)
        if found is not None and best is not None:
            assert found[1] == pytest.approx(sum(seconds[unit] for unit in found[0]))
            assert found[1] == pytest.approx(best, rel=1e-9)


def test_everything_is_kept_where_there_is_room(planner: Planner) -> None:
    plan = planner.plan("large", room(10**12))
    assert (plan.fits, plan.micro_batch, plan.accumulation) == (True, 4, 1)
    assert plan.checkpointed_blocks == ()
    assert plan.relative_step_time == 1
    assert plan.levers == []


def test_less_memory_is_never_faster_and_every_plan_fits(planner: Planner) -> None:
    most = planner.plan("large", room(10**12)).device_bytes
    times = []
    for share in (1.0, 0.85, 0.7, 0.6, 0.5):
        budget = int(most * share)
        plan = planner.plan("card", room(budget))
        assert plan.device_bytes <= budget or not plan.fits
        if plan.fits:
            times.append(plan.relative_step_time)
            assert plan.micro_batch * plan.accumulation == 4
    print("relative step times:", [round(time, 3) for time in times])
    assert len(times) >= 3
    assert times == sorted(times)
    assert times[-1] > 1


def test_a_plan_is_what_its_own_trace_says(job: Job, planner: Planner) -> None:
    most = planner.plan("large", room(10**12)).device_bytes
    plan = planner.plan("card", room(int(most * 0.75)))
    again = trace_step(
        job,
        CPU,
        micro_batch=plan.micro_batch,
        accumulation=plan.accumulation,
        checkpointed=plan.checkpointed_blocks,
    ).trace
    assert again.peak().size == max(
        plan.phases[name]["peak_allocated_bytes"] for name in ("step", "first_step")
    )


def test_plans_are_the_same_each_time_and_traces_are_made_once(job: Job, planner: Planner) -> None:
    said: list[str] = []
    again = Planner(job, batch_size=4, cache=planner.cache, say=said.append)
    assert again.plan("large", room(10**12)) == planner.plan("large", room(10**12))
    assert said == []


def test_a_smaller_micro_batch_costs_launches_only(job: Job, planner: Planner) -> None:
    """Without launch costs, four forwards of one sample take as long as one of four."""
    times = []
    for size in (4, 1):
        one = replace(planner, micro_batch=size)
        costs = one._costs(CPU, size, False)
        rows = [row for row in costs.work if row[0] != "optimizer"]
        flops = sum(row[2] * row[5] for row in rows) / costs.passes
        times.append(flops * (4 // size))
    assert times[0] == pytest.approx(times[1], rel=0.01)


def test_pins_are_kept(job: Job) -> None:
    plan = Planner(job, batch_size=4, micro_batch=2, checkpointing=True).plan("large", room(10**12))
    assert (plan.micro_batch, plan.accumulation) == (2, 2)
    assert len(plan.checkpointed_blocks) == plan.blocks


@pytest.mark.parametrize(("pinned", "micro_batch", "accumulation"), [(3, 3, 2), (9, 4, 1)])
def test_pins_that_do_not_divide_the_batch(
    job: Job, pinned: int, micro_batch: int, accumulation: int
) -> None:
    plan = Planner(job, batch_size=4, micro_batch=pinned).plan("large", room(10**12))
    assert (plan.micro_batch, plan.accumulation) == (micro_batch, accumulation)
    assert plan.phases["step"]["peak_allocated_bytes"] > 0


def test_nothing_fits(planner: Planner) -> None:
    plan = planner.plan("small", room(1_000_000))
    assert not plan.fits
    text = planning.refuse(plan, planning.advice(planner, plan, room(1_000_000), [hardware.find("rtx-3060")]))
    assert "are missing" in str(text)
    assert "base weights" in str(text)


def test_the_json_is_what_is_promised(planner: Planner) -> None:
    content = planner.plan("large", room(10**12)).as_json()
    assert content["version"] == 1
    assert set(content["phases"]) == {"encode", "first_step", "step", "preview", "save"}
    for phase in content["phases"].values():
        assert sum(phase["ledger"].values()) == phase["peak_allocated_bytes"] <= phase["peak_reserved_bytes"]
    assert {"device", "budget_bytes", "fits", "peak_phase", "device_bytes", "levers", "rejected"} <= set(
        content
    )


def test_a_card_offers_less_than_its_nominal_memory() -> None:
    card = room_of(hardware.find("rtx-3060"))
    assert 11.5 * 2**30 < card.total < 12 * 2**30
    assert card.target == CUDA
    assert card.needed(10 * 2**30) > 10.9 * 2**30
    assert room_of(hardware.find("t4")).target.attention == "efficient"
    assert room_of(hardware.find("radeon-pro-w6800")).target.attention == "math"
    assert room_of(hardware.find("rtx-4090"), budget=8 * 2**30).total == 8 * 2**30


def test_context_and_headroom_count(planner: Planner) -> None:
    bare, real = planner.plan("a", room(10**12)), planner.plan("b", room(10**12, context=2**29))
    assert real.device_bytes > bare.device_bytes + 2**29


def test_every_card_has_what_planning_reads() -> None:
    for facts in hardware.TABLE.values():
        assert facts.half_flops >= facts.float32_flops > 0, facts.name
        assert facts.source.startswith("https://")
        assert facts.supports_bf16 or facts.lacks


def test_divisors() -> None:
    assert divisors(12) == [12, 6, 4, 3, 2, 1]


@pytest.mark.parametrize(
    ("name", "units", "gib"), [("sd15", 37, 2.73), ("sdxl", 86, 12.32), ("sd3", 24, None), ("flux", 57, None)]
)
def test_real_sizes(name: str, units: int, gib: float | None, tmp_path: Path) -> None:
    """Checkpointing units as diffusers counts them, and peaks that another implementation found too."""
    blueprint = families.BLUEPRINTS.get(name)
    side = 1024 if name == "sdxl" else 512
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    job = Job(
        blueprint, AdapterConfig(rank=16, alpha=16, targets=targets), precision="bf16", size=(side, side)
    )
    traced = trace_step(job, replace(CUDA, convolution_room=0.0), micro_batch=1)
    peak = traced.trace.peak()
    print(f"{name} at {side} px: {peak.size / 2**30:.2f} GiB, {len(traced.units)} units")
    assert len(traced.units) == units
    if gib is not None:
        assert peak.size / 2**30 == pytest.approx(gib, rel=0.01)
