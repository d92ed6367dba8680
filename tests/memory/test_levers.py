"""Levers save what they claim, a real step takes what was predicted, and what is learned stays the same."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tunekit import families, layers, optimizers
from tunekit.config import AdapterConfig, TrainConfig
from tunekit.diffusion.batch import Batch
from tunekit.diffusion.metrics import relative_error
from tunekit.errors import ConfigError, MissingPackageError
from tunekit.families import Frame, Sizes
from tunekit.memory import job as jobs
from tunekit.memory.job import Job
from tunekit.memory.levers import (
    ATTENTION,
    TILE,
    Fitted,
    Levers,
    autocast_of,
    fit,
    quantize_base,
    step_in_backward,
    tile_vae,
)
from tunekit.memory.measure import Meter
from tunekit.memory.phases import trace_preview
from tunekit.memory.step import PAGED, StepTrace, trace_step
from tunekit.memory.trace import CPU, CUDA, Trace
from tunekit.tasks import Denoising, Losses
from tunekit.training.checkpoint import Checkpoints
from tunekit.training.loop import Hooks, train
from tunekit.training.tracking import Tracker, read_metrics

FAMILY = families.get("sd15")
OBJECTIVE = FAMILY.objective(FAMILY.tiny())
ADAPTER = AdapterConfig(rank=4, alpha=4)
DORA = AdapterConfig(kind="dora", rank=4, alpha=4)
SIZE = (64, 64)
PACKED = ("int8", "fp8", "nf4")

# bitsandbytes says that it does not page on the CPU.
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


@pytest.fixture(scope="module", autouse=True)
def frozen_libraries() -> Iterator[None]:
    """Each trace and each training collects garbage; what libraries hold need not be walked every time."""
    FAMILY.tiny()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def units(tiny: Sizes) -> tuple[str, ...]:
    return trace_step(Job(tiny, ADAPTER, size=SIZE), CPU).units


@pytest.fixture(scope="module")
def traced(tiny: Sizes) -> Callable[..., StepTrace]:
    """`traced(levers, ...)`: two steps of two samples on the CPU; the rest are fields of `Job`."""

    @cache
    def run(levers: Levers = Levers(), **options: Any) -> StepTrace:  # noqa: B008
        job = Job(tiny, **{"adapter": ADAPTER, "size": SIZE, "precision": levers.precision, **options})
        return trace_step(job, CPU, replace(levers, micro_batch=levers.micro_batch or 2))

    return run


def most(trace: Trace, category: str) -> int:
    """The most bytes that a category has at any moment."""
    live = best = 0
    for event in trace.events:
        if trace.categories.get(event.storage) == category:
            live += event.size
            best = max(best, live)
    return best


def ready(levers: Levers, adapter: AdapterConfig | None = ADAPTER) -> Fitted:
    """The tiny denoiser with its levers."""
    denoiser = FAMILY.denoiser(FAMILY.tiny())
    return fit(denoiser, adapter, FAMILY.facts, levers, device="cpu")


def made(module: nn.Module) -> Tensor:
    """What the denoiser makes of the same rows each time."""
    draw = torch.Generator().manual_seed(3)
    noisy = torch.randn(2, 4, 8, 8, generator=draw)
    told = torch.randn(2, 48, 32, generator=draw)
    return FAMILY.denoise(module, noisy, torch.tensor([10, 700]), {"encoder_hidden_states": told})


# Memory: what is claimed, in bytes


def test_checkpointed_blocks_keep_their_inputs_only(
    traced: Callable[..., StepTrace], units: tuple[str, ...]
) -> None:
    """The more blocks, the less is kept; all of them keep less than half."""
    found = [
        traced(Levers(gradient_checkpointing=chosen)).trace.peak().ledger["activations"]
        for chosen in (False, units[:3], units[:8], True)
    ]
    print("activations: " + ", ".join(f"{size / found[0]:.2f}" for size in found))
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == len(found)
    assert found[-1] < 0.45 * found[0]


def test_kept_attention_takes_the_bytes_of_its_outputs_and_saves_their_work(
    traced: Callable[..., StepTrace],
) -> None:
    again, kept = (
        traced(Levers(gradient_checkpointing=True, keep_attention=keep)).trace for keep in (False, True)
    )
    rows, heads = 2, 4
    # (pixels, channels) of the transformer blocks, but for the last: its backward pass is the peak, where its
    # attentions are there anyway. Each has two, of which the outputs and a float per head and pixel are kept.
    blocks = ((256, 32), (64, 64), (256, 32))
    outputs = sum(2 * 4 * rows * pixels * (channels + heads) for pixels, channels in blocks)
    assert kept.peak().ledger["activations"] - again.peak().ledger["activations"] == outputs
    traffic = [sum(item.traffic for item in trace.work) for trace in (again, kept)]
    print(f"bytes read and written x {traffic[1] / traffic[0]:.3f}")
    assert traffic[1] < traffic[0]


@pytest.mark.parametrize("scheme", PACKED)
def test_a_packed_base_takes_what_its_bits_and_scales_take(
    tiny: Sizes, traced: Callable[..., StepTrace], scheme: str
) -> None:
    """int8, fp8: a byte per weight and a float per row, about a quarter of fp32; nf4: 4.5 bits per weight."""
    denoiser = tiny.denoiser.build()
    weights = {name: item.weight for name, item in denoiser.named_modules() if isinstance(item, nn.Linear)}
    packed = [weights[name] for name in quantize_base(denoiser, scheme)]
    full = sum(4 * weight.numel() for weight in packed)
    bytewise = sum(weight.numel() + 4 * len(weight) for weight in packed)
    small = sum(weight.numel() * 4.5 / 8 for weight in packed) if scheme == "nf4" else bytewise
    print(f"{scheme}: {32 * small / full:.2f} bits per weight")
    before, after = (
        traced(Levers(base_precision=base, gradient_checkpointing=True)).trace.peak()
        for base in ("same", scheme)
    )
    assert before.ledger["base weights"] - after.ledger["base weights"] == full - small
    assert before.size - after.size == full - small
    share = 4.5 / 32 if scheme == "nf4" else 0.25
    assert small / full == pytest.approx(share, rel=0.1)


def test_offloaded_weights_leave_and_visit_a_few_at_a_time(
    traced: Callable[..., StepTrace], units: tuple[str, ...]
) -> None:
    there, away = (traced(Levers(gradient_checkpointing=True, offload=names)) for names in (False, units))
    before, after = there.trace.peak(), away.trace.peak()
    assert set(there.weights) == set(units)
    assert before.ledger["base weights"] - after.ledger["base weights"] == sum(there.weights.values())
    visitors = most(away.trace, jobs.VISITORS)
    print(f"at most {visitors:,} of {sum(there.weights.values()):,} bytes visit")
    assert 0 < visitors <= 2 * max(there.weights.values())
    assert after.size < before.size - sum(there.weights.values()) + visitors


def test_a_part_of_the_weights_can_be_offloaded(
    traced: Callable[..., StepTrace], units: tuple[str, ...]
) -> None:
    there, away = (
        traced(Levers(gradient_checkpointing=True, offload=names)) for names in (False, units[2:5])
    )
    saved = sum(there.weights[name] for name in units[2:5])
    ledgers = [item.trace.peak().ledger["base weights"] for item in (there, away)]
    assert ledgers[0] - ledgers[1] == saved


def test_an_optimizer_in_backward_never_holds_all_gradients(traced: Callable[..., StepTrace]) -> None:
    after, inside = (
        traced(
            Levers(gradient_checkpointing=True, optimizer_in_backward=early), adapter=None, max_grad_norm=None
        )
        for early in (False, True)
    )
    weights = after.trace.peak().ledger["weights"]
    held = [most(item.trace, "gradients") for item in (after, inside)]
    print(f"gradients at most {held[0] / weights:.2f} and {held[1] / weights:.2f} of the weights")
    assert held[0] == pytest.approx(weights, rel=0.01)
    assert held[1] < 0.15 * weights


def test_where_gradients_are_the_peak_an_optimizer_in_backward_lowers_it(
    traced: Callable[..., StepTrace],
) -> None:
    early, late = (
        traced(
            Levers(micro_batch=1, gradient_checkpointing=True, optimizer_in_backward=inside),
            adapter=None,
            max_grad_norm=None,
        ).trace.peak()
        for inside in (True, False)
    )
    assert late.ledger["gradients"] > 10 * early.ledger.get("gradients", 0)
    assert early.size < late.size


def test_masters_halve_weights_and_activations_and_add_the_adapter_in_float32(
    traced: Callable[..., StepTrace],
) -> None:
    full, half = (traced(Levers(precision)).trace.peak().ledger for precision in ("fp32", "bf16"))
    print(f"activations x {half['activations'] / full['activations']:.3f}")
    assert half["base weights"] == full["base weights"] / 2
    assert half["adapter"] == full["adapter"] / 2
    assert half[jobs.MASTERS] == full["adapter"]
    assert half["optimizer state"] == full["optimizer state"]
    assert half["activations"] == pytest.approx(full["activations"] / 2, rel=0.02)
    # Latents and noise, the caption, timestep, weight and frame of two samples, float32 as they are cached.
    assert full["inputs"] == half["inputs"] == 2 * 4 * (2 * 4 * 16 * 16 + 48 * 32 + 1 + 1 + 6)


def state_of(name: str, weight: Tensor) -> int:
    """Bytes of an optimizer's state for one weight, by the optimizer's paper or documentation."""
    count = weight.numel()
    if name == "adamw" or ("8bit" in name and count < 4096):
        return 8 * count
    if name == "adafactor":
        rows, columns = count // weight.shape[-1], count // weight.shape[-2] if weight.dim() > 1 else 0
        return 4 * (rows + columns if weight.dim() > 1 else count)
    return 2 * count + 2 * 4 * math.ceil(count / 256)


@pytest.mark.parametrize("name", optimizers.TABLE)
def test_an_optimizer_has_the_state_that_it_claims(
    tiny: Sizes, traced: Callable[..., StepTrace], name: str
) -> None:
    if optimizers.TABLE[name].extra:
        pytest.importorskip("bitsandbytes")
    ledger = (
        traced(Levers(gradient_checkpointing=True), optimizer=name, adapter=None)
        .trace.peak("optimizer")
        .ledger
    )
    claimed = sum(state_of(name, weight) for weight in tiny.denoiser.build().parameters())
    print(f"{name}: {ledger['optimizer state'] / ledger['weights']:.2f} times the weights")
    assert ledger["optimizer state"] == pytest.approx(claimed, rel=0.01)
    assert name == "adamw" or ledger["optimizer state"] < 0.4 * 2 * ledger["weights"]


def test_paged_state_of_large_weights_is_not_on_a_gpu(tiny: Sizes) -> None:
    pytest.importorskip("bitsandbytes")
    wide = replace(tiny.denoiser, config={**tiny.denoiser.config, "block_out_channels": (64, 128)})
    parts = tuple(wide if part.role == "denoiser" else part for part in tiny.components)
    job = Job(replace(tiny, components=parts), None, size=SIZE)
    sizes = [weight.numel() for weight in wide.build().parameters()]
    paged = sum(2 * size for size in sizes if size >= PAGED)
    assert paged
    for target, saved in ((CUDA, paged), (CPU, 0)):
        there, away = (
            trace_step(replace(job, optimizer=name), target, Levers(gradient_checkpointing=True))
            for name in ("adamw8bit", "paged_adamw8bit")
        )
        ledgers = [item.trace.peak("optimizer").ledger["optimizer state"] for item in (there, away)]
        assert ledgers[0] - ledgers[1] == pytest.approx(saved, rel=0.01)


WHOLE = {"adapter": None, "max_grad_norm": None}
EVERY = Levers(micro_batch=2, gradient_checkpointing=True)
MEASURED: dict[str, tuple[Levers, dict[str, Any]]] = {
    "all checkpointed": (EVERY, {}),
    "a part checkpointed": (replace(EVERY, gradient_checkpointing="some"), {}),
    "attention kept": (replace(EVERY, keep_attention=True), {}),
    "int8": (replace(EVERY, base_precision="int8"), {}),
    "fp8": (replace(EVERY, base_precision="fp8"), {}),
    "nf4": (replace(EVERY, base_precision="nf4"), {}),
    "offloaded": (replace(EVERY, offload="all"), {}),
    "in backward": (replace(EVERY, optimizer_in_backward=True), WHOLE),
    "masters": (Levers("bf16", micro_batch=2), {}),
    "masters of dora": (replace(EVERY, precision="bf16"), {"adapter": DORA}),
    "adamw8bit": (replace(EVERY, micro_batch=1), {**WHOLE, "optimizer": "adamw8bit"}),
    "paged_adamw8bit in backward": (
        replace(EVERY, micro_batch=1, optimizer_in_backward=True),
        {**WHOLE, "optimizer": "paged_adamw8bit"},
    ),
    "adafactor": (EVERY, {**WHOLE, "optimizer": "adafactor"}),
    "everything": (Levers("bf16", "nf4", 2, True, "some", "all"), {"optimizer": "adamw8bit"}),
}


@pytest.mark.parametrize("name", MEASURED)
def test_a_real_step_takes_what_was_predicted(
    script: Any, tiny: Sizes, units: tuple[str, ...], name: str
) -> None:
    levers, options = MEASURED[name]
    if levers.base_precision == "nf4" or "8bit" in options.get("optimizer", ""):
        pytest.importorskip("bitsandbytes")
    chosen = {"some": units[::2], "all": units}
    fields = ("gradient_checkpointing", "keep_attention", "offload")
    levers = replace(
        levers, **{key: chosen.get(value, value) for key in fields if (value := getattr(levers, key))}
    )
    job = Job(tiny, **{"adapter": ADAPTER, "size": SIZE, "precision": levers.precision, **options})
    one = levers.micro_batch or 1
    row = script.compare(job, levers, "cpu", rows=(one, one) if levers.precision == "bf16" else (one,))
    assert abs(row["error_allocated"]) < 0.01


@pytest.mark.each_family
@pytest.mark.parametrize("scheme", PACKED)
@pytest.mark.parametrize("name", families.runnable())
def test_every_family_steps_on_a_packed_base(script: Any, name: str, scheme: layers.Scheme) -> None:
    """A real step takes what was predicted, and learns what it would of floats with the packed values."""
    if scheme == "nf4":
        pytest.importorskip("bitsandbytes")
    family = families.get(name)
    job = Job(families.sizes_of(name, "tiny"), ADAPTER, size=SIZE)
    row = script.compare(job, Levers(base_precision=scheme, gradient_checkpointing=True), "cpu")
    assert abs(row["error_allocated"]) < 0.01

    pipeline = family.tiny()
    size = family.default_size(pipeline)
    noisy = torch.randn(2, *family.latent_shape(pipeline, *size), generator=torch.Generator().manual_seed(3))
    encoded = family.encode_prompt(pipeline, ["a disc", "the moon"])
    told = family.conditioning(encoded, Frame.whole(*size).rows(2))
    plain, packed = (family.denoiser(family.tiny()) for _ in range(2))
    for path in layers.block_linears(plain):
        layer: Any = plain.get_submodule(path)
        layer.weight.data = layers.quantize_layer(layer, scheme).dequantize(torch.float32)
    outputs, gradients = [], []
    for denoiser, base in ((plain, "same"), (packed, scheme)):
        fitted = fit(denoiser, ADAPTER, family.facts, Levers(base_precision=base), device="cpu")
        outputs.append(family.denoise(fitted.module, noisy, torch.tensor([20.0, 700.0]), told))
        outputs[-1].square().mean().backward()
        gradients.append({key: p.grad for key, p in fitted.parameters.items() if p.grad is not None})
    found = [layer for layer in packed.modules() if isinstance(layer, layers.QuantLinear)]
    assert found and {layer.scheme for layer in found} == {scheme}
    assert relative_error(outputs[1], outputs[0]) < 1e-5
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-5, msg=key)


def test_tiles_bound_the_memory_of_a_preview(tiny: Sizes) -> None:
    """Predicted and measured; pictures that fit one tile are drawn as before."""
    whole, tiled = FAMILY.tiny(), FAMILY.tiny()
    factor = 2 ** (len(whole.vae.config.block_out_channels) - 1)
    tile_vae(tiled.vae, factor=factor)
    predicted, found = [], []
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, *(2 * TILE // factor,) * 2, generator=draw)
    pictures = []
    for pipeline, tiles in ((whole, False), (tiled, True)):
        job = Job(tiny, ADAPTER, size=SIZE, preview=(2 * TILE, 2 * TILE))
        predicted.append(trace_preview(job, CPU, tiled=tiles).peak("preview decode"))
        meter = Meter(torch.device("cpu"), lambda vae=pipeline.vae: [*vae.parameters(), latents])
        with meter.phase("decode"):
            pictures.append(FAMILY.decode(pipeline, latents))
        found.append(meter.measured["decode"]["peak_allocated_bytes"])
    for prediction, real in zip(predicted, found, strict=True):
        size = sum(prediction.ledger.get(name, 0) for name in ("VAE", "inputs", "activations", "workspace"))
        print(f"predicted {size:,}, measured {real:,} bytes: {size / real - 1:+.2%}")
        assert abs(size / real - 1) < 0.01
    assert found[1] < 0.5 * found[0]
    assert pictures[0].shape == pictures[1].shape
    small = latents[:, :, : TILE // factor, : TILE // factor]
    assert torch.equal(FAMILY.decode(whole, small), FAMILY.decode(tiled, small))


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_unpacking_eight_bits_takes_no_more_than_the_weight_in_float32(scheme: layers.Scheme) -> None:
    """As the trace has it: on the CPU no copy of the packed weight is made on the way."""
    packed = layers.quantize_layer(nn.Linear(256, 512, bias=False), scheme)
    meter = Meter(torch.device("cpu"))
    for dtype in (torch.float32, torch.bfloat16):
        with meter.phase(str(dtype)):
            packed.dequantize(dtype)
        size = 256 * 512 * (4 if dtype == torch.float32 else 4 + 2)
        assert meter.measured[str(dtype)]["peak_allocated_bytes"] == size


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("scheme", PACKED)
def test_a_packed_base_keeps_nothing_for_the_backward_pass(scheme: str, precision: str) -> None:
    """Neither inputs nor unpacked weights: not a byte more than plain frozen layers keep."""
    if scheme == "nf4":
        pytest.importorskip("bitsandbytes")
    kept = []
    for base in ("same", scheme):
        fitted = ready(Levers(precision, base))
        own = {
            t.untyped_storage().data_ptr() for t in (*fitted.module.parameters(), *fitted.module.buffers())
        }
        saved: dict[int, int] = {}

        def keep(tensor: Tensor, own: set[int] = own, saved: dict[int, int] = saved) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = made(fitted.module.train())
        kept.append(sum(saved.values()))
        output.square().mean().backward()
    print(f"{scheme} keeps {kept[1]:,} bytes, plain layers {kept[0]:,}")
    assert kept[1] <= kept[0]


# What is learned


class Same:
    """The same four samples in each step, cut as `cuts` says."""

    batch_size = 4

    def __init__(self, cuts: tuple[int, ...]) -> None:
        self.cuts = list(cuts)

    def step(self, step: int, rank: int, processes: int) -> list[Batch]:
        draw = torch.Generator().manual_seed(0)
        rows = {
            "latents": torch.randn(4, 4, 8, 8, generator=draw),
            "noise": torch.randn(4, 4, 8, 8, generator=draw),
            "timesteps": torch.tensor([10.0, 300, 600, 990]),
            "weight": torch.ones(4),
            "frame": Frame.whole(32, 32).rows(4),
        }
        told = {"encoder_hidden_states": torch.randn(4, 48, 32, generator=draw)}
        whole = Batch((str(step),) * 4, rows, told)
        ends = [sum(self.cuts[:index]) for index in range(len(self.cuts) + 1)]
        return [whole.part(*ends[at : at + 2]) for at in range(len(self.cuts))]


class Killed(Exception):
    """Stands for SIGKILL."""


@dataclass
class Mortal(Denoising):
    """The recipes' task, which dies at a step."""

    dies_at: int | None = None

    def loss(self, model: nn.Module, batch: Batch) -> Losses:
        if batch.ids[0] == str(self.dies_at):
            raise Killed
        return super().loss(model, batch)


@dataclass
class Learned:
    """Losses of the steps, and what learned."""

    losses: list[float]
    fitted: Fitted

    def differs(self, other: Learned) -> float:
        """The largest relative difference of a loss."""
        return max(abs(one / two - 1) for one, two in zip(self.losses, other.losses, strict=True))


Learn = Callable[..., Learned]


@pytest.fixture(scope="module")
def learn(tmp_path_factory: pytest.TempPathFactory) -> Learn:
    """`learn(levers, adapter, ...)` takes five steps through the real loop; once, if it is asked again.

    With `folder` checkpoints are kept there, and it goes on from them.
    """

    @cache
    def run(
        levers: Levers = Levers(),  # noqa: B008
        adapter: AdapterConfig | None = ADAPTER,
        *,
        cuts: tuple[int, ...] = (4,),
        folder: Path | None = None,
        dies_at: int | None = None,
        preview: Callable[[nn.Module, int], None] | None = None,
        **options: Any,
    ) -> Learned:
        fitted = ready(levers, adapter)
        given = {"max_steps": 5, "lr": 1e-2 if adapter else 1e-3, "batch_size": 4, **options}
        config = TrainConfig(**{"max_grad_norm": 1.0 if adapter else None, "checkpoint_every": 2, **given})
        inside = levers.optimizer_in_backward
        optimizer = optimizers.build(
            config.optimizer, fitted.parameters.values(), lr=config.lr, per_parameter=inside
        )
        if inside:
            step_in_backward(optimizer, fitted)

        path = folder or tmp_path_factory.mktemp("run")
        accelerator = Accelerator(cpu=True, mixed_precision=autocast_of(levers.precision, adapter))
        try:
            hooks = Hooks(
                tracker=Tracker(path / "metrics.jsonl"),
                checkpoints=Checkpoints(path / "checkpoints", {}) if folder else None,
                preview=preview,
                say=lambda line: None,
            )
            task = Mortal(fitted, FAMILY, OBJECTIVE, dies_at)
            train(accelerator, task, optimizer, Same(cuts), config, hooks)
        finally:
            GradientState._reset_state()
            AcceleratorState._reset_state(reset_partial_state=True)
        return Learned([row["loss"] for row in read_metrics(path / "metrics.jsonl")], fitted)

    def again(levers: Levers = Levers(), adapter: AdapterConfig | None = ADAPTER, **options: Any) -> Learned:  # noqa: B008
        same = options.get("folder") is None and "preview" not in options
        return (run if same else run.__wrapped__)(levers, adapter, **options)

    return again


def moved(learned: Learned, adapter: AdapterConfig | None, levers: Levers) -> list[str]:
    """Names of the parameters that are not what they were."""
    before = ready(levers, adapter).parameters
    after = learned.fitted.parameters
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


def test_exact_levers_learn_exactly_the_same(learn: Learn, units: tuple[str, ...]) -> None:
    plain = learn()
    assert plain.losses[-1] < 0.8 * plain.losses[0]
    for levers in (
        Levers(gradient_checkpointing=True),
        Levers(gradient_checkpointing=units[::2]),
        Levers(gradient_checkpointing=True, keep_attention=True),
        Levers(gradient_checkpointing=units[2:], keep_attention=units[3:7]),
        Levers(gradient_checkpointing=True, offload=units),
        Levers(gradient_checkpointing=units[1:], keep_attention=True, offload=units[4:9]),
    ):
        with_levers = learn(levers)
        assert with_levers.losses == pytest.approx(plain.losses, abs=1e-5), levers
        for name, parameter in plain.fitted.parameters.items():
            torch.testing.assert_close(with_levers.fitted.parameters[name], parameter)


@pytest.mark.parametrize("cuts", [(1, 1, 1, 1), (2, 2), (3, 1)])
def test_micro_batches_learn_the_same(learn: Learn, cuts: tuple[int, ...]) -> None:
    assert learn(cuts=cuts).losses == pytest.approx(learn().losses, abs=1e-5)


@pytest.mark.parametrize("optimizer", optimizers.TABLE)
def test_an_optimizer_in_backward_learns_the_same(learn: Learn, optimizer: str) -> None:
    if optimizers.TABLE[optimizer].extra:
        pytest.importorskip("bitsandbytes")
    options = {"optimizer": optimizer, "schedule": "cosine", "warmup_steps": 2}
    after = learn(Levers(), None, **options)
    inside = learn(Levers(gradient_checkpointing=True, optimizer_in_backward=True), None, **options)
    assert inside.losses == pytest.approx(after.losses, abs=1e-5)
    assert all(parameter.grad is None for parameter in inside.fitted.parameters.values())
    # Pictures of two shapes are two backward passes, and one update.
    apart = learn(
        Levers(gradient_checkpointing=True, optimizer_in_backward=True), None, cuts=(1, 3), **options
    )
    assert apart.losses == pytest.approx(after.losses, abs=1e-5)
    assert all(parameter.grad is None for parameter in apart.fitted.parameters.values())


BOUNDS = {
    "int8": (Levers(base_precision="int8"), 1e-3),
    "fp8": (Levers(base_precision="fp8"), 3e-3),
    "nf4": (Levers(base_precision="nf4"), 1e-2),
    "masters": (Levers("bf16"), 2e-3),
    "masters on nf4": (Levers("bf16", "nf4"), 1e-2),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_rounding_levers_learn_nearly_the_same(learn: Learn, name: str) -> None:
    levers, bound = BOUNDS[name]
    if levers.base_precision == "nf4":
        pytest.importorskip("bitsandbytes")
    plain, rounded = learn(), learn(levers)
    first = abs(rounded.losses[0] / plain.losses[0] - 1)
    print(f"{name}: loss differs by {first:.1e} in the first step, {rounded.differs(plain):.1e} at most")
    assert 0 < first < bound
    assert rounded.differs(plain) < 2 * bound
    assert rounded.losses == sorted(rounded.losses, reverse=True)
    assert rounded.losses[-1] < 0.8 * rounded.losses[0]


@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged_adamw8bit"])
def test_eight_bit_state_learns_nearly_the_same(learn: Learn, optimizer: str) -> None:
    pytest.importorskip("bitsandbytes")
    plain, rounded = learn(adapter=None), learn(adapter=None, optimizer=optimizer)
    print(f"{optimizer}: loss differs by {rounded.differs(plain):.1e} at most")
    assert rounded.losses[0] == plain.losses[0]  # the state is read from the second step on
    assert 0 < rounded.differs(plain) < 1e-3
    assert rounded.losses[-1] < 0.5 * rounded.losses[0]


def test_adafactor_learns(learn: Learn) -> None:
    losses = learn(adapter=None, optimizer="adafactor").losses
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("base", PACKED)
@pytest.mark.parametrize("adapter", [ADAPTER, DORA], ids=lambda adapter: adapter.kind)
def test_every_adapter_tensor_moves_on_a_packed_base(
    learn: Learn, adapter: AdapterConfig, base: str, precision: str
) -> None:
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    levers = Levers(precision, base, gradient_checkpointing=True)
    learned = learn(levers, adapter, max_steps=3)
    packed = [m for m in learned.fitted.module.modules() if isinstance(m, layers.QuantLinear)]
    assert packed
    assert {layer.scheme for layer in packed} == {base}
    assert moved(learned, adapter, levers) == list(learned.fitted.parameters)
    assert learned.losses[-1] < learned.losses[0]


@pytest.mark.parametrize("base", ["same", *PACKED])
def test_dora_begins_as_its_base(base: str) -> None:
    """Its magnitudes are the norms of the weights as they are packed."""
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    plain = FAMILY.denoiser(FAMILY.tiny()).requires_grad_(False)
    if base != "same":
        quantize_base(plain, base)
    with torch.no_grad():
        torch.testing.assert_close(made(ready(Levers(base_precision=base), DORA).module), made(plain))


class Attentions(TorchDispatchMode):
    """Counts calls of the fused attention kernels."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func in ATTENTION
        return func(*args, **(kwargs or {}))


def test_kept_attention_changes_no_bit_of_a_gradient_and_is_not_computed_again() -> None:
    gradients, calls = [], []
    for levers in (
        Levers(),
        Levers(gradient_checkpointing=True),
        Levers(gradient_checkpointing=True, keep_attention=True),
    ):
        fitted = ready(levers, None)
        with Attentions() as counter:
            made(fitted.module.train()).square().mean().backward()
        calls.append(counter.calls)
        gradients.append({name: parameter.grad for name, parameter in fitted.parameters.items()})
    assert calls[0] > 0
    assert calls == [calls[0], 2 * calls[0], calls[0]]
    for name, gradient in gradients[0].items():
        assert all(torch.equal(gradient, other[name]) for other in gradients[1:]), name


# Weights on the host


@pytest.mark.parametrize("base", ["same", "int8", "fp8"])
def test_offloaded_weights_draw_the_same_previews(units: tuple[str, ...], base: str) -> None:
    there, away = (
        ready(Levers(base_precision=base, gradient_checkpointing=True, offload=names))
        for names in (False, units)
    )
    assert away.host is not None
    assert away.stands_alone
    for training in (False, True):
        with torch.no_grad():
            outputs = [made(fitted.module.train(training)) for fitted in (there, away, away)]
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])


def test_previews_between_steps_do_not_disturb_offloaded_weights(
    learn: Learn, units: tuple[str, ...]
) -> None:
    drawn: dict[str, list[Tensor]] = {"there": [], "away": []}

    def drawing(where: str) -> Callable[[nn.Module, int], None]:
        def preview(module: nn.Module, step: int) -> None:
            with torch.no_grad():
                drawn[where].append(made(module))

        return preview

    there = learn(Levers(gradient_checkpointing=True), preview=drawing("there"))
    away = learn(Levers(gradient_checkpointing=True, offload=units), preview=drawing("away"))
    assert away.losses == there.losses
    assert len(drawn["there"]) == len(drawn["away"]) == 2
    assert all(torch.equal(*both) for both in zip(drawn["there"], drawn["away"], strict=True))
    assert not torch.equal(drawn["away"][0], drawn["away"][1])


# Masters


def test_after_training_the_module_holds_the_masters(learn: Learn) -> None:
    learned = learn(Levers("bf16", gradient_checkpointing=True))
    fitted = learned.fitted
    own = dict(fitted.module.named_parameters())
    assert fitted.has_masters
    for name, parameter in own.items():
        if name in fitted.parameters:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, fitted.parameters[name]), name
        else:
            assert parameter.dtype == torch.bfloat16
    rounded = [p for p in fitted.parameters.values() if torch.equal(p, p.bfloat16().float())]
    assert not rounded, "what is saved is not what bf16 can hold"


class Rows(nn.Module, PeftAdapterMixin):
    """Takes and gives a list with a tensor for each row, as some networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1 = nn.ModuleDict({"to_q": nn.Linear(4, 4)})

    def forward(self, rows: list[Tensor], t: Tensor) -> tuple[list[Tensor]]:
        self.seen = {item.dtype for item in rows}, t.dtype
        return ([self.attn1["to_q"](row) for row in rows],)


def test_rows_in_a_list_are_lowered_and_come_back_in_float32() -> None:
    facts = replace(FAMILY.facts, components=(replace(FAMILY.facts.denoiser, keeps=("t",)),))
    fitted = fit(Rows(), AdapterConfig(targets=["to_q"]), facts, Levers("bf16"), device="cpu")
    made = fitted.module(rows=[torch.ones(2, 4), torch.ones(3, 4)], t=torch.ones(2))
    assert fitted.module.seen == ({torch.bfloat16}, torch.float32)
    assert [row.dtype for row in made[0]] == [torch.float32] * 2


def test_masters_keep_updates_that_bf16_would_round_away(learn: Learn) -> None:
    levers = Levers("bf16")
    learned = learn(levers, lr=1e-6, max_steps=2, weight_decay=0.0)
    before = ready(levers).parameters
    lost = 0
    for name, parameter in learned.fitted.parameters.items():
        if "lora_A" in name:
            assert not torch.equal(parameter, before[name])
            lost += int(torch.equal(parameter.bfloat16(), before[name].bfloat16()))
    assert lost > 0


@pytest.mark.parametrize(
    ("levers", "adapter"),
    [
        (Levers("bf16", gradient_checkpointing=True), ADAPTER),
        (Levers("bf16", "int8"), DORA),
        (Levers("bf16", "fp8"), ADAPTER),
        (Levers(optimizer_in_backward=True), None),
    ],
    ids=["masters", "masters of dora on int8", "masters on fp8", "in backward"],
)
def test_a_run_that_was_cut_off_goes_on_exactly(
    learn: Learn, tmp_path: Path, levers: Levers, adapter: AdapterConfig | None
) -> None:
    options = {"schedule": "cosine", "warmup_steps": 1}
    whole = learn(levers, adapter, **options)
    with pytest.raises(Killed):
        learn(levers, adapter, folder=tmp_path, dies_at=4, **options)
    resumed = learn(levers, adapter, folder=tmp_path, **options)
    assert len(resumed.losses) == 5
    assert resumed.losses == whole.losses
    for name, parameter in whole.fitted.parameters.items():
        assert torch.equal(resumed.fitted.parameters[name], parameter), name


# What is refused


@pytest.mark.parametrize(
    ("levers", "where", "expected"),
    [
        (
            Levers(gradient_checkpointing=["mid_block.resnets.1"], offload=["up_blocks.0.resnets.0"]),
            "memory.offload",
            'the block "up_blocks.0.resnets.0" is not checkpointed.*\n.*memory.gradient_checkpointing too',
        ),
        (
            Levers(gradient_checkpointing=True, offload=["mid_block.resnets.9"]),
            "memory.offload",
            'no block "mid_block.resnets.9"\ndid you mean "mid_block.resnets',
        ),
        (
            Levers(gradient_checkpointing=True, offload=True),
            "memory.offload",
            "there is none\nset memory.budget",
        ),
        (
            Levers(gradient_checkpointing=True, keep_attention=["down_block.0"]),
            "memory.keep_attention",
            'no block "down_block.0"\ndid you mean "down_blocks.0"',
        ),
        (Levers(gradient_checkpointing=["nothing"]), "memory.gradient_checkpointing", 'no block "nothing"'),
    ],
)
def test_levers_that_name_no_block_are_refused(levers: Levers, where: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        ready(levers)
    assert caught.value.where == where


@pytest.mark.parametrize(
    ("levers", "key"),
    [
        (Levers(base_precision="int8"), "base_precision"),
        (Levers(base_precision="fp8"), "base_precision"),
        (Levers(base_precision="nf4"), "base_precision"),
        (Levers(gradient_checkpointing=True, offload=["mid_block.resnets.1"]), "offload"),
    ],
)
def test_what_needs_a_frozen_base_is_refused_where_all_weights_are_trained(levers: Levers, key: str) -> None:
    with pytest.raises(ConfigError, match=r"needs a frozen base.*\ntrain an adapter") as caught:
        ready(levers, None)
    assert caught.value.where == f"memory.{key}"


def test_nf4_without_bitsandbytes_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingPackageError, match=r'install .*\[quant\]"'):
        ready(Levers(base_precision="nf4"))
