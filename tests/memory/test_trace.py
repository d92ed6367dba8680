"""What is predicted on tensors without data is what a real run takes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tunekit import families
from tunekit.config import AdapterConfig
from tunekit.errors import ConfigError
from tunekit.families import Sizes
from tunekit.memory.job import ENCODERS, VISITORS, Job
from tunekit.memory.levers import Levers, checkpoint_units, fit
from tunekit.memory.phases import DEVICE, HOST, LAYERS, trace_encode, trace_preview
from tunekit.memory.step import trace_step
from tunekit.memory.trace import CPU, CUDA, Trace, Tracer
from tunekit.networks import repeated

ADAPTER = AdapterConfig(rank=4, alpha=4)
SIZE = (64, 64)


@pytest.fixture(scope="module")
def measure(script: Any) -> Callable[..., int]:
    """`measure(job, micro_batch, accumulation, checkpointed)`: bytes of a run of the tiny model itself."""

    def run(job: Job, micro_batch: int, accumulation: int, checkpointed: Any) -> int:
        family = families.get(job.sizes.family.name)
        levers = Levers(job.precision, gradient_checkpointing=checkpointed)
        fitted = fit(family.denoiser(family.tiny()), job.adapter, family.facts, levers, device="cpu")
        batch = script.real_batch(job, micro_batch, "cpu")
        batches = script.Same(micro_batch * accumulation, [batch] * accumulation)
        found, _ = script.measured(job, job.task_of(fitted), batches, "cpu")
        return int(found["peak_allocated_bytes"])

    return run


PAIRS = [
    pytest.param(adapter, checkpointed, *batch, id=f"{weights}-{state}-{batch[0]}x{batch[1]}")
    for index, (batch, (checkpointed, state)) in enumerate(
        itertools.product([(1, 1), (2, 2), (8, 1)], [(False, "kept"), (True, "checkpointed")])
    )
    for adapter, weights in [(None, "all weights") if index in (0, 3, 4) else (ADAPTER, "adapter")]
]
"""Any two of the three settings meet in one of them: a family takes half as long as in all twelve."""


@pytest.mark.parametrize("name", families.runnable())
@pytest.mark.parametrize(("adapter", "checkpointed", "micro_batch", "accumulation"), PAIRS)
def test_prediction_equals_a_real_run_on_the_cpu(
    measure: Callable[..., int],
    name: str,
    adapter: AdapterConfig | None,
    checkpointed: bool,
    micro_batch: int,
    accumulation: int,
) -> None:
    """Every family that runs, in the recipes' own task."""
    job = Job(families.sizes_of(name, "tiny"), adapter, size=SIZE)
    levers = Levers(micro_batch=micro_batch, gradient_checkpointing=checkpointed)
    traced = trace_step(job, CPU, levers, rows=(micro_batch,) * accumulation)
    predicted = traced.trace.peak().size
    real = measure(job, micro_batch, accumulation, checkpointed)
    print(f"predicted {predicted:,}, measured {real:,} bytes: {predicted / real - 1:+.2%}")
    assert abs(predicted / real - 1) < 0.01


def test_a_part_of_the_units(tiny: Sizes, measure: Callable[..., int]) -> None:
    job = Job(tiny, ADAPTER, size=SIZE)
    units = trace_step(job, CPU).units
    chosen = units[:3] + units[-2:]
    predicted = trace_step(job, CPU, Levers(micro_batch=4, gradient_checkpointing=chosen)).trace.peak().size
    real = measure(job, 4, 1, chosen)
    print(f"{len(chosen)} of {len(units)} units: {predicted / real - 1:+.2%}")
    assert abs(predicted / real - 1) < 0.01


def test_checkpointed_units_change_no_gradient(tiny: Sizes) -> None:
    family = families.get("sd15")
    denoiser = family.denoiser(family.tiny()).train()
    other = copy.deepcopy(denoiser)
    units = trace_step(Job(tiny, None, size=SIZE), CPU).units
    checkpoint_units(other, units[::2])
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([10, 900]), torch.randn(2, 48, 32)
    for module in (denoiser, other):
        module(*inputs, return_dict=False)[0].square().mean().backward()
    for (name, one), two in zip(denoiser.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad), name


def test_an_unknown_unit_is_refused() -> None:
    family = families.get("sd15")
    levers = Levers(gradient_checkpointing=["mid_block.resnets.7"])
    with pytest.raises(ConfigError, match=r'no block "mid_block.resnets.7"\n?') as error:
        fit(family.denoiser(family.tiny()), ADAPTER, family.facts, levers, device="cpu")
    assert 'did you mean "mid_block.resnets' in str(error.value)
    assert error.value.where == "memory.gradient_checkpointing"


@pytest.mark.parametrize("key", ["gradient_checkpointing", "keep_attention"])
def test_a_part_that_is_no_unit_is_refused_after_the_first_forward(key: str) -> None:
    """Only a forward pass tells which modules are units."""
    family = families.get("sd15")
    levers = Levers(**{"gradient_checkpointing": True, key: ["conv_in"]})
    fitted = fit(family.denoiser(family.tiny()), ADAPTER, family.facts, levers, device="cpu")
    inputs = torch.ones(1, 4, 16, 16), torch.tensor([500]), torch.ones(1, 48, 32)
    with pytest.raises(
        ConfigError, match=r'"conv_in" is a part of the denoiser that cannot be checkpointed by itself'
    ) as error:
        fitted.module.train()(*inputs, return_dict=False)
    assert error.value.where == f"memory.{key}"
    with pytest.raises(ConfigError, match="cannot be checkpointed by itself"):
        trace_step(Job(families.sizes_of("sd15", "tiny"), ADAPTER, size=SIZE), CPU, levers)


def test_random_units_draw_the_same_twice() -> None:
    family = families.get("sd15")
    dropping = AdapterConfig(rank=4, alpha=4, dropout=0.5)
    gradients = []
    for checkpointed in (False, True):
        levers = Levers(gradient_checkpointing=checkpointed)
        fitted = fit(family.denoiser(family.tiny()), dropping, family.facts, levers, device="cpu")
        fitted.module.train()
        fitted.masks.draw(0, 1, ["a"], "cpu")
        inputs = torch.ones(1, 4, 16, 16), torch.tensor([500]), torch.ones(1, 48, 32)
        fitted.module(*inputs, return_dict=False)[0].square().mean().backward()
        gradients.append([parameter.grad for parameter in fitted.parameters.values()])
    assert gradients[0]
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_bytes_are_affine_in_the_micro_batch(tiny: Sizes) -> None:
    job = Job(tiny, ADAPTER, size=SIZE)
    one, two, four = (trace_step(job, CUDA, Levers(micro_batch=b)).trace.peak().size for b in (1, 2, 4))
    assert four == pytest.approx(one + 3 * (two - one), rel=1e-3)


def test_the_ledger_adds_up_and_names_what_is_there(tiny: Sizes) -> None:
    trace = trace_step(
        Job(tiny, ADAPTER, precision="bf16", size=SIZE), CUDA, Levers("bf16", micro_batch=2)
    ).trace
    peak = trace.peak()
    assert sum(peak.ledger.values()) == peak.size
    assert {"base weights", "adapter", "optimizer state", "activations"} <= set(peak.ledger)
    second = (
        trace_step(Job(tiny, ADAPTER, size=SIZE), CPU, Levers(micro_batch=2)).trace.peak("optimizer").ledger
    )
    assert second["gradients"] == pytest.approx(second["adapter"], rel=0.01)
    assert second["optimizer state"] == pytest.approx(2 * second["adapter"], rel=0.05)
    assert trace.phases()[0] == "start"


def test_attention_keeps_no_score_matrix_unless_the_card_has_no_kernel(tiny: Sizes) -> None:
    job = Job(tiny, ADAPTER, precision="bf16", size=(128, 128))
    flash, efficient, mathematical = (
        trace_step(job, replace(CUDA, attention=kind)).trace.peak().size
        for kind in ("flash", "efficient", "math")
    )
    assert flash == pytest.approx(efficient, rel=0.02)
    assert mathematical > 1.5 * flash


@pytest.mark.parametrize(
    ("adapter", "precision"),
    [(ADAPTER, "bf16"), (ADAPTER, "fp16"), (None, "bf16")],
    ids=["float32 masters", "autocast", "autocast of all weights"],
)
def test_sixteen_bits_keep_less_than_float32(
    tiny: Sizes, adapter: AdapterConfig | None, precision: str
) -> None:
    full, half = (
        trace_step(
            Job(tiny, adapter, precision=name, size=SIZE), CUDA, Levers(name, micro_batch=4)
        ).trace.peak()
        for name in ("fp32", precision)
    )
    print(f"activations x {half.ledger['activations'] / full.ledger['activations']:.2f}")
    assert half.ledger["activations"] < 0.8 * full.ledger["activations"]
    assert half.size < 0.85 * full.size


def test_previews_and_encoding(tiny: Sizes) -> None:
    job = Job(tiny, ADAPTER, size=SIZE, preview=SIZE)
    preview = trace_preview(job, CUDA, held=1_000_000)
    assert preview.phases() == ["start", "preview forward", "preview decode"]
    assert preview.peak("preview decode").ledger["VAE"] > 0
    assert preview.peak().ledger["optimizer state"] >= 1_000_000
    at_once = trace_encode(job, CPU).peak("encode").ledger
    assert {"base weights", "VAE", "text encoders"} <= set(at_once)
    one_by_one = trace_encode(job, CUDA)
    assert "base weights" not in one_by_one.categories.values()
    assert {"VAE", "text encoders"} <= set(one_by_one.categories.values())
    assert not {"VAE", "text encoders"} <= set(one_by_one.peak("encode").ledger)
    assert "text encoders" not in trace_encode(job, CUDA, captions=HOST).categories.values()


def test_text_encoders_are_there_layer_by_layer(tiny: Sizes) -> None:
    whole, parts = (
        trace_encode(Job(tiny, ADAPTER, size=SIZE), CUDA, captions=place) for place in (DEVICE, LAYERS)
    )
    layers = repeated(tiny.encoders[0].build())
    sizes = [sum(-(-4 * p.numel() // 512) * 512 for p in layer.parameters()) for layer in layers]

    def moved(trace: Trace, category: str) -> list[int]:
        return [event.size for event in trace.events if trace.categories.get(event.storage) == category]

    visits = moved(parts, VISITORS)
    assert sum(size for size in visits if size > 0) == sum(sizes)
    assert max(itertools.accumulate(visits)) == max(sizes)
    born = [sum(size for size in moved(trace, ENCODERS) if size > 0) for trace in (whole, parts)]
    assert born[0] - born[1] == sum(sizes)
    assert parts.peak("encode").ledger.get("activations", 0) <= whole.peak("encode").ledger["activations"]


def test_pictures_are_encoded_in_half_the_memory_in_sixteen_bits(tiny: Sizes) -> None:
    job = Job(tiny, ADAPTER, size=(256, 256))
    half = Levers(encode_precision="bf16")
    full, lowered = (trace_encode(job, CUDA, levers, captions=HOST).peak("encode") for levers in (None, half))
    print(lowered.ledger, full.ledger)
    assert lowered.ledger["activations"] < 0.7 * full.ledger["activations"]
    assert lowered.ledger["VAE"] < 0.6 * full.ledger["VAE"]
    # On the CPU the VAE that decodes previews stays beside its copy.
    whole, beside = (trace_encode(job, CPU, levers).peak("encode").ledger["VAE"] for levers in (None, half))
    assert beside == pytest.approx(1.5 * whole, rel=0.05)


def test_the_measuring_script(script: Any, tiny: Sizes) -> None:
    """The same on other rows: what scripts/measure_memory.py writes into benchmarks/."""
    row = script.compare(
        Job(tiny, ADAPTER, size=SIZE),
        Levers(micro_batch=3, gradient_checkpointing=True),
        "cpu",
        rows=(3, 3),
    )
    assert abs(row["error_allocated"]) < 0.01
    assert row["measured_allocated_bytes"] > 0


@pytest.mark.parametrize("phase", ["encode", "preview"])
@pytest.mark.parametrize("name", families.runnable())
def test_other_phases_take_what_was_predicted(script: Any, name: str, phase: str) -> None:
    job = Job(families.sizes_of(name, "tiny"), ADAPTER, size=SIZE, preview=SIZE)
    row = script.compare_phase(job, phase, "cpu")
    assert abs(row["error_allocated"]) < 0.01


def test_a_storage_is_born_once_and_dies_once() -> None:
    with Tracer(CPU) as tracer:
        made = torch.empty(1000)
        view = made[10:]
        del made
        view.mul_(2)
        del view
    sizes = [event.size for event in tracer.events if abs(event.size) == 4000]
    assert sizes == [4000, -4000]
