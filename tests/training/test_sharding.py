"""Weights that are split over processes learn what they learn in one; real processes, over gloo."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import Tensor, nn

from tunekit import families, optimizers
from tunekit.config import AdapterConfig, MemoryConfig, TrainConfig
from tunekit.diffusion.batch import Batch
from tunekit.errors import ConfigError, NonFiniteError
from tunekit.families import Frame
from tunekit.memory.job import GRADIENTS, STATE, TRAINED, Job
from tunekit.memory.levers import Fitted, Levers, fit
from tunekit.memory.measure import Meter
from tunekit.memory.sharding import local, part_of, rows, split, traffic
from tunekit.memory.step import adapted, trace_step
from tunekit.memory.trace import CPU
from tunekit.networks import blocks
from tunekit.tasks import Denoising, Losses
from tunekit.training.average import Average
from tunekit.training.checkpoint import Checkpoints
from tunekit.training.loop import Hooks, train
from tunekit.training.run import open_accelerator
from tunekit.training.tracking import Tracker, read_metrics

FAMILY = families.get("sd15")
OBJECTIVE = FAMILY.objective(FAMILY.tiny())
LORA = AdapterConfig(rank=4, alpha=4)
DORA = AdapterConfig(kind="dora", rank=4, alpha=4)
FULL = Levers(sharding="full", gradient_checkpointing=True)
SAMPLES = 5
"""Of a step: two processes have not as many of them, and not as many forward passes."""

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes are forked")


def together(work: Callable[[int], Any], count: int = 2) -> list[Any]:
    """What `work(rank)` gives in each of some processes that know each other, forked from this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forked = multiprocessing.get_context("fork")

    def run(rank: int, pipe: Any) -> None:
        torch.set_num_threads(1)
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        os.environ.update({name: str(value) for name, value in {**ranks, **meeting}.items()})
        try:
            told: Any = work(rank)
        except BaseException:
            told = RuntimeError(f"rank {rank}:\n{traceback.format_exc()}")
        pipe.send_bytes(pickle.dumps(told))
        os._exit(0)

    pipes, running = [], []
    for rank in range(count):
        here, there = forked.Pipe(duplex=False)
        running.append(forked.Process(target=run, args=(rank, there)))
        running[-1].start()
        pipes.append(here)
    try:
        assert all(pipe.poll(120) for pipe in pipes), "a process hangs"
        found = [pickle.loads(pipe.recv_bytes()) for pipe in pipes]
    finally:
        for process in running:
            process.kill()
            process.join()
    for one in found:
        if isinstance(one, RuntimeError):
            raise one
    return found


class Cut:
    """The same samples in each step, cut for processes and into micro-batches as `Stream` does it."""

    batch_size = SAMPLES

    def __init__(self, micro_batch: int) -> None:
        self.micro_batch = micro_batch

    def forwards(self, step: int, processes: int) -> int:
        return max(len(self.step(step, rank, processes)) for rank in range(processes))

    def step(self, step: int, rank: int, processes: int) -> list[Batch]:
        draw = torch.Generator().manual_seed(0)
        rows = {
            "latents": torch.randn(SAMPLES, 4, 8, 8, generator=draw),
            "noise": torch.randn(SAMPLES, 4, 8, 8, generator=draw),
            "timesteps": torch.tensor([10.0, 300, 600, 900, 990]),
            "weight": torch.ones(SAMPLES),
            "frame": Frame.whole(32, 32).rows(SAMPLES),
        }
        told = {"encoder_hidden_states": torch.randn(SAMPLES, 48, 32, generator=draw)}
        whole = Batch(tuple(f"{step}/{index}" for index in range(SAMPLES)), rows, told)
        start, end = SAMPLES * rank // processes, SAMPLES * (rank + 1) // processes
        cuts = range(start, end, self.micro_batch)
        return [whole.part(at, min(at + self.micro_batch, end)) for at in cuts]


@dataclass
class Averaged(Denoising):
    """The recipes' task with a running mean of what is trained; a sample of it can be poisoned."""

    mean: Average = field(init=False)
    poisoned: str = ""

    def __post_init__(self) -> None:
        self.mean = Average(self.fitted, 0.5)

    def loss(self, model: nn.Module, batch: Batch) -> Losses:
        made = super().loss(model, batch)["loss"]
        worth = torch.tensor([math.nan if name == self.poisoned else 1.0 for name in batch.ids])
        return {"loss": made * worth}

    def updated(self, step: int) -> None:
        self.mean.follow()

    def state(self) -> dict[str, Tensor]:
        return self.mean.values

    def restore(self, state: dict[str, Tensor]) -> None:
        self.mean.restore(state)


def learn(
    folder: Path,
    levers: Levers,
    adapter: AdapterConfig | None,
    *,
    steps: int = 4,
    micro_batch: int = 2,
    poisoned: str = "",
) -> dict[str, Any]:
    """Trains with checkpoints in a folder; what each step and what it left, as one process has it."""
    accelerator = open_accelerator(
        MemoryConfig(precision=levers.precision, sharding=levers.sharding, device="cpu"), SAMPLES, adapter
    )
    try:
        fitted = fit(FAMILY.denoiser(FAMILY.tiny()), adapter, FAMILY.facts, levers, device="cpu")
        config = TrainConfig(
            max_steps=steps,
            lr=1e-2 if adapter else 1e-3,
            batch_size=SAMPLES,
            max_grad_norm=0.1,
            checkpoint_every=2,
        )
        optimizer = optimizers.build("adamw", fitted.parameters.values(), lr=config.lr)
        task = Averaged(fitted, FAMILY, OBJECTIVE, poisoned=poisoned)
        kept: dict[str, Any] = {}

        def keep(name: str, step: int, figures: Mapping[str, float]) -> None:
            kept["class"] = type(fitted.module).__name__
            whole = dict(fitted.module.named_parameters())
            kept["weights"] = {key: whole[key].detach().clone() for key in fitted.parameters}

        hooks = Hooks(
            tracker=Tracker(folder / "metrics.jsonl"),
            checkpoints=Checkpoints(folder / "checkpoints", {}),
            evaluate=lambda model: {"val_loss": 0.5},
            keep=keep,
            keep_best=True,
            say=lambda line: None,
        )
        batches = Cut(micro_batch)
        try:
            train(accelerator, task, optimizer, batches, config, hooks)
        except NonFiniteError as error:
            return {"error": str(error)}
        with task.mean.used():
            averaged = answered(fitted)
        return {"answer": averaged, **kept}
    finally:
        GradientState._reset_state()
        AcceleratorState._reset_state(reset_partial_state=True)


@torch.no_grad()
def answered(fitted: Fitted) -> Tensor:
    """What the denoiser makes of the same rows each time; all processes have to ask."""
    draw = torch.Generator().manual_seed(3)
    noisy = torch.randn(2, 4, 8, 8, generator=draw)
    told = torch.randn(2, 48, 32, generator=draw)
    return FAMILY.denoise(fitted.module, noisy, torch.tensor([10, 700]), {"encoder_hidden_states": told})


def measured(folder: Path) -> list[tuple[float, float]]:
    """Loss and norm of the gradient, step by step."""
    found = read_metrics(folder / "metrics.jsonl")
    return [(row["loss"], row["grad_norm"]) for row in found if "loss" in row]


def differ(one: Path, other: Path) -> float:
    """The largest difference of a loss or a norm."""
    pairs = zip(measured(one), measured(other), strict=True)
    return max(abs(a - b) for first, second in pairs for a, b in zip(first, second, strict=True))


# What is learned


SLOW = pytest.mark.slow  # of several of a kind: processes have to be started for each


@pytest.mark.parametrize(
    "adapter", [LORA, pytest.param(DORA, marks=SLOW), None], ids=["lora", "dora", "all weights"]
)
def test_two_processes_learn_what_one_does(adapter: AdapterConfig | None, tmp_path: Path) -> None:
    """Parts, checkpointed blocks, uneven micro-batches, clipped gradients, a running mean."""
    plain = learn(tmp_path / "one", Levers(), adapter)
    here, there = together(lambda rank: learn(tmp_path / "two", FULL, adapter, micro_batch=1))
    worst = differ(tmp_path / "one", tmp_path / "two")
    print(f"losses and norms differ by {worst:.1e}")
    assert worst < 1e-5
    assert measured(tmp_path / "one")[-1][0] < measured(tmp_path / "one")[0][0]
    for made in (here, there):
        assert float((made["answer"] - plain["answer"]).abs().max()) < 1e-4
    assert here["class"] == plain["class"] and "weights" not in there
    for name, weight in plain["weights"].items():
        # Adam makes a full step out of a gradient that is zero to rounding, so single elements may differ.
        assert float((here["weights"][name] - weight).abs().mean()) < 2e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [LORA, None], ids=["lora", "all weights"])
def test_in_bf16_too(adapter: AdapterConfig | None, tmp_path: Path) -> None:
    """The base in bf16 and float32 copies of the adapter; all weights in float32 under autocast."""
    learn(tmp_path / "one", Levers("bf16"), adapter)
    together(lambda rank: learn(tmp_path / "two", replace(FULL, precision="bf16"), adapter))
    pairs = zip(measured(tmp_path / "one"), measured(tmp_path / "two"), strict=True)
    assert max(abs(one[0] / two[0] - 1) for one, two in pairs) < 2e-3


def test_it_goes_on_in_any_number_of_processes(tmp_path: Path) -> None:
    """One, three that split, one: the losses of one that never stopped."""
    learn(tmp_path / "straight", Levers(), None, steps=6)
    cut = tmp_path / "cut"
    learn(cut, Levers(), None, steps=2)
    together(lambda rank: learn(cut, replace(FULL, keep_attention=True), None, steps=4), 3)
    learn(cut, Levers(), None, steps=6)
    worst = differ(tmp_path / "straight", cut)
    print(f"losses and norms differ by {worst:.1e}")
    assert worst < 1e-5


def test_checkpoints_have_the_format_of_one_process(tmp_path: Path) -> None:
    learn(tmp_path / "one", Levers(), None, steps=2)
    together(lambda rank: learn(tmp_path / "two", FULL, None, steps=2))
    one, two = (tmp_path / name / "checkpoints" / "step-000002" for name in ("one", "two"))
    for name in ("trainable", "task"):
        assert (one / f"{name}.safetensors").stat().st_size == (two / f"{name}.safetensors").stat().st_size
        here, there = load_file(one / f"{name}.safetensors"), load_file(two / f"{name}.safetensors")
        assert list(here) == list(there)
        for key, tensor in here.items():
            assert there[key].shape == tensor.shape and there[key].dtype == tensor.dtype
            assert float((there[key] - tensor).abs().mean()) < 2e-5, key
    here, there = (torch.load(path / "optimizer.pt", weights_only=True) for path in (one, two))
    assert here["param_groups"] == there["param_groups"]
    for index, state in here["state"].items():
        assert {key: value.shape for key, value in state.items()} == {
            key: value.shape for key, value in there["state"][index].items()
        }


@pytest.mark.slow
def test_what_is_not_finite_on_one_ends_all(tmp_path: Path) -> None:
    made = together(lambda rank: learn(tmp_path, FULL, None, steps=4, poisoned="2/4"))
    assert all("step 3: the loss is nan; samples: 2/4" in one["error"] for one in made)
    assert all("step-000002 is good" in one["error"] for one in made)


@pytest.mark.slow
def test_every_family_computes_the_same_when_it_is_split() -> None:
    """And its blocks have most of its weights, so that little is gathered for long."""

    def made(rank: int) -> dict[str, float]:
        accelerator = open_accelerator(MemoryConfig(device="cpu", sharding="full"), 2, LORA)
        answers = {}
        for name in families.runnable():
            family = families.get(name)
            pipeline = family.tiny()
            told = family.encode_prompt(pipeline, ["one", "two"])
            frames = Frame.whole(*family.default_size(pipeline)).rows(2)
            noisy = torch.randn(2, *family.latent_shape(pipeline, 32, 32), generator=torch.manual_seed(0))
            levers = FULL if rank >= 0 else replace(FULL, sharding="none")
            fitted = fit(family.denoiser(pipeline), LORA, family.facts, levers, device="cpu")
            conditioning = family.conditioning(told, frames)
            times = torch.tensor([10.0, 700.0])
            output = family.denoise(fitted.module.train(), noisy, times, conditioning).float()
            accelerator.backward(output.square().mean())
            gradients = [p.grad.norm() for p in fitted.parameters.values() if p.grad is not None]
            answers[name] = float(output.detach().norm()), float(torch.stack(gradients).norm())
        return answers

    split_up, other = together(made)
    assert split_up == other
    AcceleratorState._reset_state(reset_partial_state=True)
    alone = made(-1)
    AcceleratorState._reset_state(reset_partial_state=True)
    for name, expected in alone.items():
        assert split_up[name] == pytest.approx(expected, rel=1e-4), name


# Memory


def real(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with data in place of those without."""
    return {name: torch.zeros_like(value, device="cpu") for name, value in values.items()}


def given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent is let go of by gloo's threads before it is by this one.

    The record has what this thread gives back: what another is the last to hold would stay in it for ever.
    """
    for name in ("all_gather_single", "reduce_scatter_single"):
        send = getattr(torch.distributed, name)

        def sent(*given: Any, async_op: bool = False, send: Callable[..., Any] = send, **options: Any) -> Any:
            work = send(*given, async_op=True, **options)
            work.wait()
            time.sleep(0.005)
            return work if async_op else None

        monkeypatch.setattr(torch.distributed, name, sent)


def taken(job: Job, levers: Levers, rank: int) -> int:
    """Peak bytes of two steps in this process."""
    accelerator = open_accelerator(
        MemoryConfig(precision=levers.precision, sharding=levers.sharding, device="cpu"), 4, job.adapter
    )
    task = job.task_of(adapted(job, levers, "cpu"))
    fitted, batch = task.fitted, job.batch(2)
    rows = Batch(batch.ids, real(batch.rows), real(batch.conditioning))
    batches = Cut(2)
    batches.batch_size = 4
    batches.step = lambda step, rank, processes: [rows]  # type: ignore[method-assign]
    optimizer = optimizers.build("adamw", fitted.parameters.values(), lr=1e-4)
    module = fitted.module

    def there() -> list[Tensor]:
        own = [local(t) for t in (*module.parameters(), *module.buffers())]
        return [*own, *fitted.parameters.values(), *rows.tensors()]

    meter = Meter(torch.device("cpu"), there, active=rank == 0)
    config = TrainConfig(max_steps=2, lr=1e-4, batch_size=4, max_grad_norm=1.0, log_every=1000)
    with meter.phase("step"):
        train(accelerator, task, optimizer, batches, config, Hooks(say=lambda line: None))
    return meter.measured["step"]["peak_allocated_bytes"] or 0 if rank == 0 else 0


@pytest.mark.parametrize("adapter", [LORA, None], ids=["lora", "all weights"])
@pytest.mark.parametrize("twice", [pytest.param(False, marks=SLOW), True], ids=["kept", "checkpointed"])
def test_a_step_takes_what_was_predicted(
    adapter: AdapterConfig | None, twice: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back(monkeypatch)
    job = Job(families.sizes_of("sd15", "tiny"), adapter, size=(64, 64), processes=2)
    levers = Levers(sharding="full", micro_batch=2, gradient_checkpointing=twice)
    predicted = trace_step(job, CPU, levers, rows=(2,)).trace.peak()
    real = together(lambda rank: taken(job, levers, rank))[0]
    print(f"predicted {predicted.size:,}, measured {real:,}: {predicted.size / real - 1:+.2%}")
    print(predicted.ledger)
    assert abs(predicted.size / real - 1) < 0.02


def test_what_is_split_is_split() -> None:
    """Weights, gradients and optimizer state by the number of processes; activations are not."""
    tiny = families.sizes_of("sd15", "tiny")
    ledgers = []
    for count in (1, 2, 8):
        job = Job(tiny, None, size=(64, 64), processes=count)
        levers = Levers(sharding="full", micro_batch=1)
        trace = trace_step(job, CPU, levers).trace
        ledgers.append(trace.peak("optimizer").ledger)
    for name in (TRAINED, STATE, GRADIENTS):
        whole, half, eighth = (ledger[name] for ledger in ledgers)
        assert half == pytest.approx(whole / 2, rel=0.02)
        assert eighth == pytest.approx(whole / 8, rel=0.2)  # small tensors have rows to fill


# What is refused


class Tied(nn.Module):
    """Two blocks with one weight in common."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
        self.layers[1][0].weight = self.layers[0][0].weight


class Scaled(nn.Module):
    """A number that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(()))


def test_what_cannot_be_split_is_refused() -> None:
    def said(rank: int) -> list[str]:
        open_accelerator(MemoryConfig(device="cpu"), 2, None)
        lines = []
        for module in (Tied(), Scaled()):
            with pytest.raises(ConfigError) as caught:
                split(module, torch.device("cpu"), adapter=False)
            lines.append(str(caught.value))
        return lines

    tied, scaled = together(said)[0]
    assert "the blocks layers.0 and layers.1 have a weight in common" in tied
    assert "scale is a single number that is trained" in scaled


# Its parts


def test_parts_are_those_of_fsdp2() -> None:
    """Rows are spread evenly from the first process on; the last ones may have none."""
    whole = torch.arange(5)
    assert [part_of(whole, rank, 4).tolist() for rank in range(4)] == [[0, 1], [2, 3], [4], []]
    assert rows(5, 4) == 2


def test_blocks_of_a_network_are_the_smallest_ones() -> None:
    found = blocks(FAMILY.denoiser(FAMILY.tiny()))
    assert "down_blocks.0.resnets.0" in found
    assert "down_blocks.0.attentions.0.transformer_blocks.0" in found
    assert not any(".ff" in name or ".to_out" in name for name in found)


def test_what_is_sent() -> None:
    """By rings: (n - 1) / n of the whole for a gathering, twice for a sum that all keep."""
    frozen = traffic(processes=4, split=1000, whole_learned=10, forwards=3)
    assert (frozen.all_gather, frozen.reduce_scatter, frozen.all_reduce) == (4500, 0, 15)
    learned = traffic(processes=4, split=1000, split_learned=1000)
    assert (learned.all_gather, learned.reduce_scatter, learned.all_reduce) == (1500, 750, 0)
    assert traffic(processes=1, whole_learned=10).total == 0
    assert learned.as_json()["total_bytes"] == 2250
