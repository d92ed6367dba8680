"""Plans: exact where they claim to be, and never slower for more memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tunekit import families, hardware
from tunekit.config import AdapterConfig, MemoryConfig
from tunekit.families import Sizes
from tunekit.kept import Kept
from tunekit.memory.advice import advice
from tunekit.memory.job import Job
from tunekit.memory.levers import Levers
from tunekit.memory.phases import DEVICE, LAYERS
from tunekit.memory.plan import Plan, refuse
from tunekit.memory.planner import Planner, counts, cuts, divisors
from tunekit.memory.room import Room, Speed, room_of
from tunekit.memory.step import trace_step
from tunekit.memory.trace import CPU, CUDA

PLANNED = MemoryConfig(budget="auto")
ADAPTER = AdapterConfig(rank=4, alpha=4)
TINY_FLUX = {"num_layers": 1, "num_single_layers": 2}
SPEED = Speed(25e12, 12e12, 360e9)


def usual(name: str) -> Sizes:
    """The sizes of a family's usual base."""
    return families.sizes_of(name, families.planned(name).facts.default_source)


@pytest.fixture(scope="module")
def job() -> Job:
    sizes = families.sizes_of("sd15", "tiny")
    return Job(sizes, AdapterConfig(rank=4, alpha=4), size=(128, 128), preview=(64, 64))


@pytest.fixture(scope="module")
def planner(job: Job, traces: Kept) -> Planner:
    return Planner(job, batch_size=4, cache=traces)


def room(total: int, context: int = 0) -> Room:
    return Room("a card", total, context, CPU, SPEED)


def card(total: int) -> Room:
    """With a memory of its own, so that what is encoded does not stay beside what is trained."""
    return Room("a card", total, 2**20, CUDA, SPEED)


@pytest.fixture(scope="module")
def real(traces: Kept) -> Planner:
    """Stable Diffusion 1.5 at its real size, at 256 px: weights and activations both matter."""
    adapter = AdapterConfig(rank=4, alpha=4, targets=["to_q", "to_v"])
    job = Job(usual("sd15"), adapter, precision="bf16", size=(256, 256))
    memory = PLANNED.model_copy(update={"micro_batch": 2})
    return Planner(job, batch_size=2, memory=memory, cache=traces)


def shares(planner: Planner, *percents: int) -> list[Plan]:
    """Plans for so much of what the job takes when it has all it wants."""
    most = planner.plan("large", card(10**12)).device_bytes
    plans = [planner.plan("card", card(most * percent // 100)) for percent in percents]
    for percent, plan in zip(percents, plans, strict=True):
        print(f"{percent} %: {plan.fits}, {plan.words}, x{plan.relative_step_time:.2f}")
    return plans


def test_everything_is_kept_where_there_is_room(planner: Planner) -> None:
    plan = planner.plan("large", room(10**12))
    assert (plan.fits, plan.levers.micro_batch, plan.accumulation) == (True, 4, 1)
    assert plan.levers.gradient_checkpointing == ()
    assert plan.relative_step_time == 1
    assert plan.measures == []


def test_less_memory_is_never_faster_and_every_plan_fits(planner: Planner) -> None:
    most = planner.plan("large", room(10**12)).device_bytes
    times = []
    for share in (1.0, 0.85, 0.7, 0.6, 0.5):
        budget = int(most * share)
        plan = planner.plan("card", room(budget))
        assert plan.device_bytes <= budget or not plan.fits
        if plan.fits:
            times.append(plan.relative_step_time)
            assert plan.levers.micro_batch * plan.accumulation == 4
    print("relative step times:", [round(time, 3) for time in times])
    assert len(times) >= 3
    assert times == sorted(times)
    assert times[-1] > 1


def test_a_plan_is_what_its_own_trace_says(job: Job, planner: Planner) -> None:
    most = planner.plan("large", room(10**12)).device_bytes
    plan = planner.plan("card", room(int(most * 0.75)))
    again = trace_step(job, CPU, plan.levers, rows=(plan.levers.micro_batch,) * plan.accumulation).trace
    assert again.peak().size == max(
        plan.phases[name]["peak_allocated_bytes"] for name in ("step", "first_step")
    )


def test_plans_are_the_same_each_time_and_traces_are_made_once(job: Job, planner: Planner) -> None:
    plan, said = planner.plan("large", room(10**12)), list[str]()
    again = Planner(job, batch_size=4, cache=planner.cache, say=said.append)
    assert again.plan("large", room(10**12)) == plan
    assert said == []


def test_a_smaller_micro_batch_costs_launches_only(job: Job, planner: Planner) -> None:
    """Without launch costs, four forwards of one sample take as long as one of four."""
    times = []
    for size in (4, 1):
        one = replace(planner, memory=PLANNED.model_copy(update={"micro_batch": size}))
        way = one._ways(room(10**12))[0][0]
        costs = one._costs(CPU, way, Levers(micro_batch=size))
        rows = [row for row in costs.work if row[0] != "optimizer"]
        flops = sum(row[2] * row[5] for row in rows) / costs.passes
        times.append(flops * (4 // size))
    assert times[0] == pytest.approx(times[1], rel=0.01)


def test_pins_are_kept(job: Job, traces: Kept) -> None:
    memory = MemoryConfig(budget="auto", micro_batch=2, gradient_checkpointing=True, keep_attention=False)
    plan = Planner(job, batch_size=4, memory=memory, cache=traces).plan("large", room(10**12))
    assert (plan.levers.micro_batch, plan.accumulation) == (2, 2)
    assert len(plan.levers.gradient_checkpointing) == plan.blocks
    assert plan.levers.keep_attention == ()


def test_what_is_pinned_is_not_chosen(job: Job, planner: Planner) -> None:
    most = planner.plan("large", room(10**12)).device_bytes
    small = room(int(most * 0.6))
    for key, value in (("gradient_checkpointing", False), ("micro_batch", 4)):
        memory = PLANNED.model_copy(update={key: value, "approximate": "never"})
        plan = replace(planner, memory=memory).plan("card", small)
        assert plan.levers.micro_batch == 4 or key != "micro_batch"
        assert plan.levers.gradient_checkpointing == () or key != "gradient_checkpointing"
    nf4 = replace(planner, memory=PLANNED.model_copy(update={"base_precision": "nf4"}))
    assert nf4.plan("large", room(10**12)).levers.base_precision == "nf4"
    tiled = replace(planner, memory=PLANNED.model_copy(update={"vae_tiling": True}))
    assert tiled.plan("large", room(10**12)).measures == ["previews decoded in tiles"]


def test_exact_plans_come_first(real: Planner) -> None:
    """Checkpoints, then weights in host memory; a packed base only where that is too slow or too little."""
    kept, some, away, packed = shares(real, 100, 93, 72, 44)
    assert all(plan.fits for plan in (kept, some, away, packed))
    assert kept.measures == []
    assert 0 < len(some.levers.gradient_checkpointing) < some.blocks
    assert some.approximates == away.approximates == []
    assert set(away.levers.offload) <= set(away.levers.gradient_checkpointing)
    assert away.host_bytes > 0
    assert away.phases["step"]["ledger"]["visiting weights"] > 0
    assert packed.approximates in (["int8 base"], ["nf4 base"])
    assert [plan.relative_step_time for plan in (kept, some, away)] == sorted(
        plan.relative_step_time for plan in (kept, some, away)
    )


def test_approximations_can_be_forbidden_or_preferred(real: Planner) -> None:
    never = replace(real, memory=real.memory.model_copy(update={"approximate": "never"}))
    (plan,) = shares(never, 44)
    assert plan.fits
    assert plan.approximates == []
    without = real.memory.model_copy(update={"approximate": "never", "offload": False})
    assert not shares(replace(real, memory=without), 44)[0].fits
    first = replace(real, memory=real.memory.model_copy(update={"approximate": "if_faster"}))
    for share in (72, 44):
        (fast,), (exact,) = shares(first, share), shares(never, share)
        assert fast.relative_step_time <= exact.relative_step_time
    assert fast.approximates
    assert fast.relative_step_time < exact.relative_step_time


def test_weights_are_split_where_no_exact_plan_fits_otherwise(tiny: Sizes, traces: Kept) -> None:
    """All weights on two devices, of which each has the room for little more than half."""
    job = Job(tiny, None, size=(32, 32), max_grad_norm=1.0)
    alone = Planner(job, batch_size=2, memory=PLANNED, cache=traces)
    both = Planner(job, batch_size=1, memory=PLANNED, cache=traces, processes=2)
    most = both.plan("large", room(10**12))
    assert most.levers.sharding == "none" and "gradients to be sent" in most.phases["step"]["ledger"]
    assert most.traffic["all_reduce_bytes"] == most.phases["step"]["ledger"]["weights"]
    least = both.least("card", room(10**9))
    assert least.levers.sharding == "full"
    assert least.phases["save"]["ledger"]["weights"] < 0.6 * most.phases["save"]["ledger"]["weights"]
    budget = max(int(least.phases["step"]["least_bytes"]), int(least.device_bytes))
    tight = both.plan("card", room(budget))
    assert tight.fits and tight.levers.sharding == "full", tight.words
    assert tight.traffic["all_gather_bytes"] == 2 * tight.traffic["reduce_scatter_bytes"] > 0
    assert not alone.plan("card", room(budget)).fits or budget > alone.least("card", room(1)).device_bytes
    assert Plan.load(json.loads(json.dumps(tight.dump()))) == tight


def test_host_memory_is_only_used_where_there_is_some(real: Planner) -> None:
    (plan,) = shares(real, 72)
    place = card(plan.budget_bytes)
    assert not real.plan("card", replace(place, has_host=False)).levers.offload
    little = real.plan("card", replace(place, host_bytes=plan.host_bytes - 1))
    assert not (little.fits and little.host_bytes >= plan.host_bytes)


def test_all_weights_get_8_bit_state_and_an_optimizer_in_backward(real: Planner) -> None:
    whole = replace(real.job, adapter=None, max_grad_norm=None)
    free = replace(real, job=whole, may_change_optimizer=True, _known={})
    kept, late, small, both = shares(free, 100, 93, 72, 58)
    assert (kept.optimizer, kept.levers.optimizer_in_backward) == ("adamw", False)
    assert (late.optimizer, late.levers.optimizer_in_backward, late.approximates) == ("adamw", True, [])
    assert (small.optimizer, small.approximates) == ("adamw8bit", ["8-bit optimizer state"])
    assert (both.optimizer, both.levers.optimizer_in_backward) == ("adamw8bit", True)
    clipped = replace(free, job=replace(whole, max_grad_norm=1.0))
    assert not any(way.optimizer_in_backward for ways in clipped._ways(card(1)) for way in ways)
    lacking = replace(card(10**12), lacks=("bitsandbytes",))
    assert {way.optimizer for ways in free._ways(lacking) for way in ways} == {"adamw"}
    assert {way.base_precision for ways in real._ways(lacking) for way in ways} == {"same", "int8"}


def test_class_pictures_are_drawn_fewer_at_once_where_there_is_little_room(job: Job, traces: Kept) -> None:
    drawing = Planner(replace(job, class_pictures=(128, 128)), batch_size=1, cache=traces)
    large = drawing.plan("large", card(10**12))
    assert large.levers.class_batch == 4
    ledger = large.phases["class_pictures"]["ledger"]
    assert ledger["base weights"] > 0
    assert "text encoders" not in ledger  # they have left before the denoiser comes
    least = large.phases["class_pictures"]["least_bytes"]
    assert drawing.plan("card", card(least - 1)).levers.class_batch in (1, 2)


def test_captions_are_encoded_layer_by_layer_where_the_encoders_do_not_fit(traces: Kept) -> None:
    """T5-XXL has 9.1 GiB in bf16, and 0.4 GiB in each of its 24 layers."""
    flux = usual("flux")
    denoiser = replace(flux.denoiser, config={**flux.denoiser.config, **TINY_FLUX})
    parts = tuple(denoiser if part.role == "denoiser" else part for part in flux.components)
    small = replace(flux, components=parts)
    planner = Planner(Job(small, ADAPTER, precision="bf16", size=(256, 256)), batch_size=1, cache=traces)
    large = planner.plan("card", room_of(hardware.find("rtx-3090")))
    assert not large.levers.encode_by_layer and not large.levers.encode_on_host
    room = room_of(hardware.find("rtx-3090"), budget=8 * 2**30)
    plan = planner.plan("card", room)
    print(plan.words, plan.phases["encode"])
    assert plan.fits and plan.approximates == []
    assert plan.levers.encode_by_layer and not plan.levers.encode_on_host
    encode = plan.phases["encode"]
    assert encode["least_bytes"] < 3 * 2**30
    assert encode["host_bytes"] > 9 * 2**30  # they wait there meanwhile
    for key in ("step", "save"):
        assert plan.phases[key]["host_bytes"] < 2**30  # and are gone afterwards
    asked = replace(planner, memory=PLANNED.model_copy(update={"encode_by_layer": False}))
    on_host = asked.plan("card", room)
    assert on_host.levers.encode_on_host and not on_host.levers.encode_by_layer
    assert "text encoders" not in on_host.phases["encode"]["ledger"]


@pytest.mark.parametrize("name", families.FAMILIES.names())
def test_captions_of_every_base_are_encoded_on_a_card_of_8_gb(name: str, traces: Kept) -> None:
    """Whole where the encoders fit, else layer by layer; of T5-XXL and Qwen3 one layer has 0.2 to 0.4 GiB."""
    base = usual(name)
    planner = Planner(Job(base, ADAPTER, precision="bf16"), batch_size=1, cache=traces)
    room = room_of(hardware.find("rtx-4060"))
    captions, precision, phase = planner._encode(room, Levers("bf16"))
    dtypes = base.family.facts.dtypes(torch.bfloat16)
    whole = sum(
        parameter.numel() * dtypes[part.name].itemsize
        for part in base.encoders
        for parameter in part.build().parameters()
    )
    print(f"{whole / 2**30:.1f} GiB of text encoders, {phase['least_bytes'] / 2**30:.1f} GiB with {captions}")
    assert room.needed(phase["least_bytes"]) <= room.total
    assert captions == (LAYERS if whole > room.budget else DEVICE)
    assert precision == "fp32"


@pytest.mark.parametrize(("pinned", "micro_batch", "accumulation"), [(3, 3, 2), (9, 4, 1)])
def test_pins_that_do_not_divide_the_batch(
    job: Job, traces: Kept, pinned: int, micro_batch: int, accumulation: int
) -> None:
    memory = PLANNED.model_copy(update={"micro_batch": pinned})
    plan = Planner(job, batch_size=4, memory=memory, cache=traces).plan("large", card(10**12))
    assert (plan.levers.micro_batch, plan.accumulation) == (micro_batch, accumulation)
    assert plan.phases["step"]["peak_allocated_bytes"] > 0


def test_nothing_fits(planner: Planner) -> None:
    plan = planner.plan("small", room(1_000_000))
    assert not plan.fits
    text = refuse(plan, advice(planner, plan, room(1_000_000), [hardware.find("rtx-3060")]))
    assert "are missing" in str(text)
    assert "base weights" in str(text)


def test_what_fits_to_the_byte_has_a_time_too(planner: Planner) -> None:
    """Estimates may be too high for all that is searched, where the least that is needed does fit."""
    way = planner._ways(room(10**12))[-1][-1]
    every = planner._costs(CPU, way, planner._levers(way, 1, gradient_checkpointing=True))
    least = planner.least("card", room(10**12))
    searched: list[Plan | None] = []
    plan_of = replace(planner)
    plan_of._best = lambda search, tiers: searched.append(None)  # type: ignore[method-assign, assignment]
    plan = plan_of.plan("card", room(least.device_bytes))
    assert searched and plan.fits and plan.device_bytes == least.device_bytes
    assert plan.levers == least.levers and len(every.units) == len(plan.levers.gradient_checkpointing)
    assert plan.relative_step_time > 1
    assert least.relative_step_time == 0


def test_the_json_is_what_is_promised(planner: Planner) -> None:
    content = planner.plan("large", room(10**12)).as_json()
    assert content["version"] == 1
    assert set(content["phases"]) == {"load", "encode", "first_step", "step", "preview", "save"}
    for phase in content["phases"].values():
        assert sum(phase["ledger"].values()) == phase["peak_allocated_bytes"] <= phase["peak_reserved_bytes"]
    reserved = max(phase["peak_reserved_bytes"] for phase in content["phases"].values())
    assert content["device_bytes"] == reserved + content["context_bytes"] + content["headroom_bytes"]
    assert {"device", "budget_bytes", "fits", "peak_phase", "device_bytes", "levers", "rejected"} <= set(
        content
    )


def test_a_plan_comes_back_from_json(planner: Planner) -> None:
    most = planner.plan("large", room(10**12)).device_bytes
    plan = planner.plan("card", room(int(most * 0.7)))
    again = Plan.load(json.loads(json.dumps(plan.dump())))
    assert again == plan
    assert again.as_json() == plan.as_json()
    with pytest.raises((KeyError, TypeError)):
        Plan.load({"device": "of another version"})


def test_context_and_headroom_count(planner: Planner) -> None:
    bare, real = planner.plan("a", room(10**12)), planner.plan("b", room(10**12, context=2**29))
    assert real.device_bytes > bare.device_bytes + 2**29


def test_pictures_are_encoded_in_bf16_where_the_whole_does_not_fit(traces: Kept, tiny: Sizes) -> None:
    """The denoiser's step is small here, and the VAE's first layers are what a picture takes."""
    job = Job(tiny, ADAPTER, precision="bf16", size=(512, 512))
    planner = Planner(job, batch_size=1, cache=traces)
    large = planner.plan("large", card(10**12))
    assert (large.levers.encode_precision, large.approximates) == ("fp32", [])
    narrow = card(round(large.phases["encode"]["least_bytes"] * 0.9))
    captions, precision, phase = planner._encode(narrow, large.levers)
    assert (captions, precision) == (DEVICE, "bf16")
    assert phase["least_bytes"] < 0.7 * large.phases["encode"]["least_bytes"]
    exact = replace(planner, memory=PLANNED.model_copy(update={"approximate": "never"}))
    assert exact._encode(narrow, large.levers)[1] == "fp32"
    old = replace(narrow, lacks=("bf16",))
    assert planner._encode(old, large.levers)[1] == "fp32"


def test_any_number_of_units_may_wait_on_the_host() -> None:
    assert counts(57, 32) == list(range(1, 58, 2))
    assert counts(5, 32) == [1, 2, 3, 4, 5]
    assert counts(86, 32)[-1] == 86
    assert len(counts(86, 32)) <= 32


def test_a_batch_is_cut_into_parts_that_need_not_be_equal() -> None:
    assert cuts(61) == [61, 31, 21, 16, 11, 8, 6, 4, 3, 2, 1]
    assert cuts(4) == [4, 2, 1]
    assert cuts(1) == [1]
    assert all(cuts(number)[-1] == 1 for number in range(1, 70))


def test_divisors() -> None:
    assert divisors(12) == [12, 6, 4, 3, 2, 1]


@pytest.mark.parametrize(
    ("name", "units", "gib"), [("sd15", 37, 2.40), ("sdxl", 86, 10.28), ("sd3", 24, None), ("flux", 57, None)]
)
def test_real_sizes(name: str, units: int, gib: float | None, tmp_path: Path) -> None:
    """Checkpointing units as diffusers counts them, and peaks that another implementation found too."""
    side = 1024 if name == "sdxl" else 512
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    job = Job(
        usual(name), AdapterConfig(rank=16, alpha=16, targets=targets), precision="bf16", size=(side, side)
    )
    traced = trace_step(job, replace(CUDA, convolution_room=0.0))
    peak = traced.trace.peak()
    print(f"{name} at {side} px: {peak.size / 2**30:.2f} GiB, {len(traced.units)} units")
    assert len(traced.units) == units
    if gib is not None:
        assert peak.size / 2**30 == pytest.approx(gib, rel=0.01)
