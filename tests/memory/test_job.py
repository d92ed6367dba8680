"""What is traced is what is run: the task, the family's own calls, and the type of each network."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunekit import families, layers
from tunekit.config import (
    AdapterConfig,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    ObjectiveConfig,
    TrainConfig,
    TrainingRunConfig,
)
from tunekit.data.shapes import buckets
from tunekit.errors import ConfigError
from tunekit.families import Frame, Sizes, sizes
from tunekit.memory import step
from tunekit.memory.costs import costs
from tunekit.memory.job import KEPT, TEACHER, Job, job_of
from tunekit.memory.levers import Fitted, Levers, fit, quantize_base
from tunekit.memory.phases import trace_class_pictures, trace_encode
from tunekit.memory.planner import Planner, Way
from tunekit.memory.step import adapted, splits, trace_step
from tunekit.memory.trace import CPU, CUDA, Tracer
from tunekit.tasks import Denoising
from tunekit.training.distill import Distillation

ADAPTER = AdapterConfig(rank=4, alpha=4)
SIZE = (64, 64)


def usual(name: str) -> Sizes:
    """The sizes of a family's usual base."""
    return families.sizes_of(name, families.planned(name).facts.default_source)


# The task


def distilling(tiny: Sizes, *, precision: str = "fp32") -> Job:
    """A student of all weights and its frozen teacher, on the student's device."""

    def make(fitted: Fitted) -> Distillation:
        device = next(fitted.module.parameters()).device
        return Distillation(fitted, tiny.family, tiny.denoiser.build(str(device)), job.learned(), 1.0)

    job = Job(tiny, None, precision=precision, size=SIZE, make_task=make, task="distillation")
    return job


@pytest.mark.parametrize(("micro_batch", "accumulation"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_another_task_is_traced_with_its_teacher(
    script: Any, name: str, micro_batch: int, accumulation: int
) -> None:
    """What heal trains, against the record of the CPU's allocator."""
    job = distilling(families.sizes_of(name, "tiny"))
    row = script.compare(job, Levers(micro_batch=micro_batch), "cpu", rows=(micro_batch,) * accumulation)
    assert row["task"] == "distillation"
    assert abs(row["error_allocated"]) < 0.01
    ledger = trace_step(job, CPU).trace.peak("optimizer").ledger
    assert ledger[TEACHER] == pytest.approx(ledger["weights"], rel=0.01)


@pytest.mark.parametrize("levers", [Levers(), Levers(gradient_checkpointing=True)], ids=["kept", "twice"])
@pytest.mark.parametrize("in_backward", [False, True], ids=["after", "in backward"])
def test_a_batch_of_two_buckets_takes_what_was_planned(
    script: Any, tiny: Sizes, levers: Levers, in_backward: bool
) -> None:
    """Its gradients stay from the first forward to the second; one forward of all would take less."""
    job = Job(tiny, None, size=SIZE, mixed=True, max_grad_norm=None)
    levers = replace(levers, micro_batch=4, optimizer_in_backward=in_backward)
    whole, apart = splits(4, 4, mixed=True)
    assert (whole, apart) == ((4,), (1, 3))
    row = script.compare(job, levers, "cpu", rows=apart)
    assert abs(row["error_allocated"]) < 0.01
    planner = Planner(job, batch_size=4, memory=MemoryConfig(budget="auto", approximate="never"))
    way = Way(0, "same", "adamw", in_backward)
    planned = planner._costs(CPU, way, levers).phases["step"]["peak_allocated_bytes"]
    alone = trace_step(job, CPU, levers, rows=whole).trace.peak("backward").size
    print(f"{row['measured_allocated_bytes']:,} measured, {planned:,} planned, {alone:,} of one forward")
    assert planned >= row["measured_allocated_bytes"] * 0.99
    assert planned >= alone
    # Whatever the shapes are, no step needs more.
    small = replace(job, size=(32, 64))
    for ones in (1, 3):
        batches = [script.real_batch(small, ones, "cpu"), script.real_batch(job, 4 - ones, "cpu")]
        task = job.task_of(adapted(job, levers, "cpu"))
        found, _ = script.measured(job, task, script.Same(4, batches), "cpu")
        assert found["peak_allocated_bytes"] <= planned * 1.01


def test_the_forwards_of_a_step() -> None:
    assert splits(4, 4) == [(4,)]
    assert splits(4, 9, mixed=True) == [(4,), (1, 3)]
    assert splits(1, 1, mixed=True) == [(1,)]
    assert splits(61, 31) == [(31, 30)]
    assert splits(61, 60) == [(60, 1)]
    assert splits(61, 60, mixed=True) == [(60, 60)]
    assert splits(8, 2) == [(2, 2)]


@pytest.mark.parametrize("rows", [(1, 1), (4, 4), (4, 1)])
def test_what_a_unit_keeps_is_counted_once(tiny: Sizes, rows: tuple[int, ...]) -> None:
    """From its forward to its backward pass, of the last forward of a step."""
    job = Job(tiny, ADAPTER, size=SIZE)
    levers = Levers(micro_batch=rows[0])
    once = costs(trace_step(job, CUDA, levers, rows=rows[-1:]), CUDA)
    several = costs(trace_step(job, CUDA, levers, rows=rows), CUDA, len(rows))
    assert several.kept == once.kept


def test_a_teacher_does_not_run_under_the_students_autocast(tiny: Sizes) -> None:
    """accelerate wraps the network that is trained, and nothing else."""
    student, teacher = nn.Linear(8, 8, device="meta"), nn.Linear(8, 8, device="meta")
    with Tracer(CUDA, autocast=torch.bfloat16) as tracer:
        tracer.casting(student)
        rows = torch.empty(2, 8, device="meta")
        assert (student(rows).dtype, teacher(rows).dtype) == (torch.bfloat16, torch.float32)
    full, half = (
        trace_step(distilling(tiny, precision=name), CUDA, Levers(name, micro_batch=2)).trace.peak().ledger
        for name in ("fp32", "bf16")
    )
    assert half[TEACHER] == full[TEACHER]
    assert half["activations"] < full["activations"]


@dataclass
class Averaged(Denoising):
    """A task that remembers the running mean of what is trained."""

    def __post_init__(self) -> None:
        self.mean = {name: p.detach().clone() for name, p in self.fitted.parameters.items()}

    def updated(self, step: int) -> None:
        for name, mean in self.mean.items():
            mean.lerp_(self.fitted.parameters[name].detach(), 0.01)

    def state(self) -> dict[str, Tensor]:
        return self.mean


def test_what_a_task_remembers_is_seen(tiny: Sizes) -> None:
    def make(fitted: Fitted) -> Averaged:
        return Averaged(fitted, tiny.family, job.learned())

    job = Job(tiny, ADAPTER, size=SIZE, make_task=make, task="averaged")
    ledger = trace_step(job, CPU).trace.peak("optimizer").ledger
    assert ledger[KEPT] == ledger["adapter"]


def test_tasks_and_objectives_are_told_apart(tiny: Sizes) -> None:
    """Traces are kept under what a job says of itself."""
    plain = Job(tiny, ADAPTER, size=SIZE)
    others = [
        replace(plain, objective=ObjectiveConfig(snr_gamma=5.0)),
        replace(plain, objective=ObjectiveConfig(loss="huber")),
        replace(distilling(tiny), adapter=ADAPTER),
    ]
    told = [json.dumps(job.described()) for job in (plain, *others)]
    assert len(set(told)) == len(told)
    assert told[0] == json.dumps(Job(families.sizes_of("sd15", "tiny"), ADAPTER, size=SIZE).described())
    with pytest.raises(ValueError, match="needs a name"):
        replace(plain, make_task=lambda fitted: Denoising(fitted, tiny.family, plain.learned()))


def test_an_objective_that_the_base_does_not_have_is_refused(tiny: Sizes) -> None:
    job = Job(tiny, ADAPTER, size=SIZE, objective=ObjectiveConfig(shift=3.0))
    with pytest.raises(ConfigError, match=r"objective\.shift has no effect"):
        trace_step(job, CPU)


@pytest.mark.parametrize("name", families.runnable())
def test_the_tiny_model_of_every_family_can_be_planned(name: str) -> None:
    config = TrainingRunConfig(
        recipe="lora",
        model=ModelConfig(family=name, source="tiny"),
        train=TrainConfig(max_steps=2, lr=1e-2),
    )
    job = job_of(config, DataConfig(path="(pictures)", resolution=64), "fp32")
    assert trace_step(job, CUDA).units
    assert trace_encode(job, CUDA).peak("encode").size > 0


def test_a_picture_is_as_large_as_its_bucket() -> None:
    """A resolution that the base cannot have is cut to the next one below, as pictures are."""
    config = TrainingRunConfig(
        recipe="lora",
        model=ModelConfig(family="sd15", source="runwayml/stable-diffusion-v1-5"),
        train=TrainConfig(max_steps=2, lr=1e-2),
    )
    job = job_of(config, DataConfig(path="(pictures)", resolution=520), "bf16")
    assert job.size == (512, 512)
    assert job.sizes.assumed


@pytest.mark.parametrize("name", families.FAMILIES.names())
def test_no_bucket_is_larger_than_the_square_that_is_planned(name: str) -> None:
    """And the longest prompt is: as many tokens as the encoders read."""
    base = usual(name)
    multiple = base.family.resolution_multiple(base.configs)
    for resolution in (512, 768, 1024):
        square = base.latents(1, resolution, resolution)[0, 0].numel()
        for width, height in buckets(resolution, multiple):
            assert base.latents(1, height, width)[0, 0].numel() <= square, (width, height)
    read = [tokens.shape[1] for tokens in base.tokens(1).values()]
    assert read == [part.tokens for part in base.encoders]
    lengths = {value.shape[1] for value in base.encoded(1).values() if value.ndim > 1}
    assert max(lengths) >= max(read)


# The types


def looking(module: nn.Module) -> list[Tensor]:
    """What a module takes from now on."""
    seen: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, args: seen.extend(args))
    return seen


@pytest.mark.parametrize("named", [True, False], ids=["by name", "by position"])
def test_sizes_and_times_keep_their_digits_in_sixteen_bits(named: bool) -> None:
    """bfloat16 has 8 bits of mantissa: 3000 px would become 3008, and step 999 become 1000."""
    family = families.get("sdxl")
    denoiser = family.denoiser(family.tiny())
    fitted = fit(denoiser, ADAPTER, family.facts, Levers("bf16"), device="cpu")
    sizes_seen, times_seen = looking(denoiser.add_time_proj), looking(denoiser.time_proj)
    latents_seen, pooled_seen = looking(denoiser.conv_in), looking(denoiser.add_embedding.linear_1)
    noisy, times = torch.zeros(1, 4, 8, 8), torch.tensor([999.0])
    frame = Frame((3000, 2001), (5, 7), (64, 64)).rows(1)
    encoded = {"encoder_hidden_states": torch.zeros(1, 40, 80), "text_embeds": torch.zeros(1, 24)}
    if named:
        family.denoise(fitted.module, noisy, times, family.conditioning(encoded, frame))
    else:
        added = {"text_embeds": encoded["text_embeds"], "time_ids": frame}
        fitted.module(noisy, times, encoded["encoder_hidden_states"], added_cond_kwargs=added)
    assert sizes_seen[0].tolist() == [3000, 2001, 5, 7, 64, 64]
    assert times_seen[0].tolist() == [999]
    assert {seen[0].dtype for seen in (sizes_seen, times_seen)} == {torch.float32}
    assert {seen[0].dtype for seen in (latents_seen, pooled_seen)} == {torch.bfloat16}


@pytest.mark.parametrize("scheme", ["int8", "fp8", "nf4"])
def test_a_base_that_was_packed_while_it_was_read_is_not_packed_again(tmp_path: Any, scheme: str) -> None:
    """Packed a second time, from 16 bits or from its own packed weights, it would be another base."""
    if scheme == "nf4":
        pytest.importorskip("bitsandbytes")
    family = families.get("sd15")
    family.save(family.tiny(), tmp_path)
    whole = family.load(str(tmp_path))
    read = family.load(str(tmp_path), family.facts.dtypes(torch.bfloat16), pack=scheme)
    assert quantize_base(family.denoiser(read), scheme) == []
    modules = []
    for pipeline in (whole, read):
        fitted = fit(family.denoiser(pipeline), ADAPTER, family.facts, Levers("bf16", scheme), device="cpu")
        modules.append(dict(fitted.module.named_modules()))
    packed = [name for name, layer in modules[0].items() if isinstance(layer, layers.QuantLinear)]
    assert packed
    for name in packed:
        one, two = (found[name] for found in modules)
        assert torch.equal(one.packed, two.packed), name
        assert torch.equal(one.scale, two.scale), name


def small_flux() -> Sizes:
    """FLUX.1 with a few blocks, and text encoders of its own kinds and few layers."""
    whole = usual("flux")
    less = {
        "transformer": {"num_layers": 1, "num_single_layers": 1},
        "text_encoder": {"num_hidden_layers": 1},
        "text_encoder_2": {"num_layers": 1},
    }
    parts = [replace(part, config={**part.config, **less.get(part.name, {})}) for part in whole.components]
    return replace(whole, components=tuple(parts))


def test_text_encoders_are_in_their_own_type_everywhere() -> None:
    """T5 in bfloat16 on the CPU as on a GPU, CLIP in float32."""
    small = small_flux()
    job = Job(small, ADAPTER, precision="bf16", size=(256, 256))
    clip, t5 = (sum(p.numel() for p in part.build().parameters()) for part in small.encoders)
    ledgers = [trace_encode(job, target).peak("encode").ledger for target in (CPU, CUDA)]
    for ledger in ledgers:
        assert ledger["text encoders"] == pytest.approx(4 * clip + 2 * t5, rel=0.01)
    denoiser = sum(p.numel() for p in small.denoiser.build().parameters())
    assert ledgers[0]["base weights"] == pytest.approx(2 * denoiser, rel=0.01)


def test_the_sizes_of_t5_need_no_longest_prompt() -> None:
    """Its config.json does not say one: positions are relative."""
    row = usual("flux").component("text_encoder_2")
    config = row.type.config_class(**{**row.config, "num_layers": 1}).to_dict()
    assert "max_position_embeddings" not in config
    found = sizes.with_config(row, config)
    assert found.tokens == row.tokens == 512
    assert found.build().config.num_layers == 1


def test_class_pictures_are_drawn_with_the_base_as_it_was_opened() -> None:
    """The denoiser in the run's precision; autoencoder and text encoders in the types they encode in."""
    tiny = families.sizes_of("sdxl", "tiny")
    job = Job(tiny, ADAPTER, size=SIZE, class_pictures=SIZE)
    full, half = (
        trace_class_pictures(replace(job, precision=name), CUDA, 1).peak().ledger for name in ("fp32", "bf16")
    )
    assert half["base weights"] == pytest.approx(full["base weights"] / 2, rel=0.15)  # multiples of 512 bytes
    assert half["VAE"] == full["VAE"]
    assert "text encoders" not in half  # they visit alone, before the denoiser comes


def test_a_packed_base_is_packed_while_pictures_are_encoded_on_the_cpu(tiny: Sizes) -> None:
    job = Job(tiny, ADAPTER, size=SIZE)
    plain, packed = (
        trace_encode(job, CPU, Levers(base_precision=base)).peak("encode").ledger["base weights"]
        for base in ("same", "int8")
    )
    stepping = trace_step(job, CPU, Levers(base_precision="int8")).trace.peak().ledger["base weights"]
    assert packed == stepping < plain


MASTERS = (ADAPTER, Levers("bf16", gradient_checkpointing=True, keep_attention=True), (1,))


@pytest.mark.parametrize(
    ("name", "adapter", "levers", "rows"),
    [
        *((name, *MASTERS) for name in families.runnable()),
        ("sd15", ADAPTER, Levers("fp16", "int8"), (1, 1)),
        ("sd15", None, Levers("bf16"), (2, 1)),
    ],
)
def test_a_second_step_is_recorded_as_it_would_be_traced(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    adapter: AdapterConfig | None,
    levers: Levers,
    rows: tuple[int, ...],
) -> None:
    job = Job(families.sizes_of(name, "tiny"), adapter, precision=levers.precision, size=SIZE)
    short = trace_step(job, CUDA, levers, rows=rows)
    monkeypatch.setattr(step, "_repeats", lambda job, fitted: False)
    whole = trace_step(job, CUDA, levers, rows=rows)
    assert short.trace.events == whole.trace.events
    assert short.trace.categories == whole.trace.categories
    assert short.trace.work == whole.trace.work
    assert short == whole


def test_a_network_that_is_built_meanwhile_is_counted_once(
    monkeypatch: pytest.MonkeyPatch, tiny: Sizes
) -> None:
    """What is remembered of it, so that it need not be built again, is no part of the step."""
    job = Job(tiny, ADAPTER, size=SIZE, preview=SIZE)
    monkeypatch.setattr(families.family, "_BUILT", {})
    first, second = (trace_step(job, CPU).trace.peak() for _ in range(2))
    assert first.ledger["VAE"] > 0
    assert first == second


def test_what_a_step_leaves_behind_lets_the_second_be_traced(
    monkeypatch: pytest.MonkeyPatch, tiny: Sizes
) -> None:
    """A cache that a module fills when it first runs is not filled a second time."""
    kind = tiny.denoiser.type
    forward = kind.forward

    def filling(self: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "filled"):
            self.filled = sample.new_zeros(2**20)
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", filling)
    events = trace_step(Job(tiny, ADAPTER, size=SIZE), CUDA).trace.events
    assert [event.phase for event in events if event.size == 2**22] == ["first forward"]
