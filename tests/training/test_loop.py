"""The loop against plain torch, and everything that can go wrong in it."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from tunekit import optimizers
from tunekit.config import TrainConfig
from tunekit.errors import Interrupted, NonFiniteError, OutOfMemory, OutputError, ResumeError
from tunekit.memory.levers import Fitted, step_in_backward
from tunekit.training import loop
from tunekit.training.checkpoint import Checkpoints
from tunekit.training.loop import Hooks, Result, train
from tunekit.training.schedule import learning_rate
from tunekit.training.tracking import Tracker, read_metrics


@dataclass
class Rows:
    """A micro-batch."""

    ids: tuple[str, ...]
    x: Tensor
    y: Tensor

    def to(self, device: torch.device) -> Rows:
        return Rows(self.ids, self.x.to(device), self.y.to(device))


class Line:
    """Batches of y = sum(x) + noise; step k takes rows k*B to (k+1)*B - 1, cut as `cuts` says."""

    def __init__(self, batch_size: int = 6, cuts: tuple[int, ...] = ()) -> None:
        self.batch_size = batch_size
        self.cuts = cuts or (batch_size,)
        assert sum(self.cuts) == batch_size

    def step(self, step: int, rank: int, processes: int) -> list[Rows]:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(self.batch_size, 3, generator=generator)
        y = x.sum(1) + 0.1 * torch.randn(self.batch_size, generator=generator)
        ids = [f"s{step}-{i}" for i in range(self.batch_size)]
        return [
            Rows(tuple(names), a, b)
            for names, a, b in zip(
                [ids[sum(self.cuts[:i]) : sum(self.cuts[: i + 1])] for i in range(len(self.cuts))],
                x.split(list(self.cuts)),
                y.split(list(self.cuts)),
                strict=True,
            )
        ]


def squared(model: nn.Module, batch: Rows) -> Tensor:
    """Squared error per row."""
    return (model(batch.x)[:, 0] - batch.y) ** 2


def linear() -> nn.Module:
    """A model that is the same each time."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return model


def settings(**options: Any) -> TrainConfig:
    return TrainConfig(**{"max_steps": 12, "lr": 0.05, "batch_size": 6, "checkpoint_every": 5, **options})


Loss = Callable[..., Tensor]
"""(model, batch) -> values per row."""


@dataclass
class Fitting:
    """The task of these tests: a loss, and a count of updates that it remembers between lives."""

    fitted: Fitted
    rows: Loss
    parts: dict[str, Loss] = field(default_factory=dict)
    told: list[int] = field(default_factory=list)
    count: int = 0

    def loss(self, model: nn.Module, batch: Rows) -> dict[str, Tensor]:
        return {"loss": self.rows(model, batch), **{k: part(model, batch) for k, part in self.parts.items()}}

    def updated(self, step: int) -> None:
        self.told.append(step)
        self.count += step

    def state(self) -> dict[str, Tensor]:
        return {"count": torch.tensor(self.count)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.count = int(state["count"])


def fit(
    accelerator: Accelerator,
    config: TrainConfig,
    *,
    batches: Line | None = None,
    loss: Loss = squared,
    model: nn.Module | None = None,
    task: Fitting | None = None,
    folder: Path | None = None,
    **hooks: Any,
) -> tuple[nn.Module, Result]:
    """Train a model, or what a task has fitted; with `folder`, metrics and checkpoints are kept there."""
    task = task or Fitting(Fitted.plain(model or linear()), loss)
    optimizer = optimizers.build(
        config.optimizer,
        list(task.fitted.parameters.values()),
        lr=config.lr,
        weight_decay=config.weight_decay,
        device="cpu",
    )
    if folder is not None:
        hooks["tracker"] = Tracker(folder / "metrics.jsonl")
        hooks["checkpoints"] = Checkpoints(folder / "checkpoints", {}, config.keep_checkpoints)
    hooks.setdefault("say", lambda line: None)
    result = train(accelerator, task, optimizer, batches or Line(), config, Hooks(**hooks))
    return task.fitted.module, result


def weights(model: nn.Module) -> list[Any]:
    return [parameter.tolist() for parameter in model.parameters()]


def poisoned_at(step: int, value: float = math.nan) -> Loss:
    """A loss that is bad for the second sample of one step."""

    def loss(model: nn.Module, batch: Rows) -> Tensor:
        bad = torch.tensor([name == f"s{step - 1}-1" for name in batch.ids])
        return torch.where(bad, torch.tensor(value), squared(model, batch))

    return loss


# What is learned


def test_equals_plain_torch(accelerator: Accelerator) -> None:
    """Whole batches, AdamW, clipping, and a schedule by hand: the loop adds nothing of its own."""
    config = settings(schedule="cosine", warmup_steps=3, max_grad_norm=0.5)
    model, result = fit(accelerator, config, batches=Line(cuts=(4, 2)))

    plain = linear()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.01, fused=True)
    losses = []
    for step in range(12):
        (rows,) = Line().step(step, 0, 1)
        mean = squared(plain, rows).mean()
        optimizer.zero_grad()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        rate = (step + 1) / 4 if step < 3 else 0.5 * (1 + math.cos(math.pi * (step - 3) / 9))
        optimizer.param_groups[0]["lr"] = 0.05 * rate
        optimizer.step()
        losses.append(mean.item())
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert result.loss == pytest.approx(sum(losses) / 12)
    assert result.step == 12


@pytest.mark.parametrize("cuts", [(6,), (1, 1, 1, 1, 1, 1), (4, 1, 1), (2, 4)])
def test_micro_batches_change_nothing(
    accelerator: Accelerator, tmp_path: Path, cuts: tuple[int, ...]
) -> None:
    """The mean is over the samples: a short micro-batch counts less than a long one."""
    whole, _ = fit(accelerator, settings(), folder=tmp_path / "whole")
    split, _ = fit(accelerator, settings(), batches=Line(cuts=cuts), folder=tmp_path / "split")
    for one, other in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for one, other in zip(
        read_metrics(tmp_path / "whole" / "metrics.jsonl"),
        read_metrics(tmp_path / "split" / "metrics.jsonl"),
        strict=True,
    ):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_only_trainable_parameters_move(accelerator: Accelerator) -> None:
    model = linear()
    model[0].requires_grad_(False)
    before = weights(model)
    fit(accelerator, settings(), model=model)
    after = weights(model)
    assert before[:2] == after[:2]
    assert before[2] != after[2]
    assert before[3] != after[3]


def test_half_precision_parameters_are_refused(accelerator: Accelerator) -> None:
    with pytest.raises(TypeError, match="not float32"):
        fit(accelerator, settings(), model=linear().half())


def test_bf16_autocast_is_taken_off_afterwards(tmp_path: Path) -> None:
    mixed = Accelerator(cpu=True, mixed_precision="bf16")
    seen = []

    def loss(model: nn.Module, batch: Rows) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        hidden = model(batch.x)
        assert hidden.dtype == torch.float32
        return (hidden[:, 0] - batch.y) ** 2

    model, _ = fit(mixed, settings(), loss=loss)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    plain = linear()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x), plain(x))
    rounded, _ = fit(mixed, settings(max_steps=1))
    exact = linear()
    assert not torch.equal(rounded[0].weight, exact[0].weight)  # type: ignore[index]
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def test_schedules() -> None:
    def rates(schedule: str, warmup: int = 0) -> list[float]:
        config = settings(max_steps=5, lr=1.0, schedule=schedule, warmup_steps=warmup)
        return [round(learning_rate(config, step), 4) for step in range(5)]

    assert rates("constant") == [1, 1, 1, 1, 1]
    assert rates("constant", 3) == [0.25, 0.5, 0.75, 1, 1]
    assert rates("linear") == [1, 0.8, 0.6, 0.4, 0.2]
    assert rates("linear", 1) == [0.5, 1, 0.75, 0.5, 0.25]
    assert rates("cosine") == [1, 0.9045, 0.6545, 0.3455, 0.0955]


# Tasks


def test_a_task_is_told_of_each_update(accelerator: Accelerator) -> None:
    task = Fitting(Fitted.plain(linear()), squared)
    fit(accelerator, settings(), task=task)
    assert task.told == list(range(1, 13))


def test_what_a_task_remembers_is_kept_with_the_weights(accelerator: Accelerator, tmp_path: Path) -> None:
    """An average of the weights, say: it goes on where it was, and not from the start."""
    for death, done in ((8, 5), (12, 10)):
        task = Fitting(Fitted.plain(linear()), dying_at(death))
        with pytest.raises(Killed):
            fit(accelerator, settings(), task=task, folder=tmp_path)
        assert (tmp_path / "checkpoints" / f"step-{done:06d}" / "task.safetensors").is_file()
    task = Fitting(Fitted.plain(linear()), squared)
    fit(accelerator, settings(), task=task, folder=tmp_path)
    assert task.told == [11, 12]
    assert task.count == sum(range(1, 13))


def test_parts_of_a_loss_are_written_down(accelerator: Accelerator, tmp_path: Path) -> None:
    """Each as a mean over the samples, however they were split; only `loss` is minimized."""

    def half(model: nn.Module, batch: Rows) -> Tensor:
        return 0.5 * squared(model, batch)

    def constant(model: nn.Module, batch: Rows) -> Tensor:
        return torch.full((len(batch.ids),), 3.0)

    plain, _ = fit(accelerator, settings(), folder=tmp_path / "plain")
    parts = {"half": half, "constant": constant}
    task = Fitting(Fitted.plain(linear()), squared, parts)
    model, _ = fit(
        accelerator, settings(), task=task, batches=Line(cuts=(4, 1, 1)), folder=tmp_path / "parts"
    )
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    rows = read_metrics(tmp_path / "parts" / "metrics.jsonl")
    assert set(rows[0]) == {
        "step",
        "loss",
        "loss_half",
        "loss_constant",
        "lr",
        "grad_norm",
        "samples_per_second",
        "seconds",
    }
    for row in rows:
        assert row["loss_half"] == pytest.approx(row["loss"] / 2)
        assert row["loss_constant"] == pytest.approx(3.0)


# What is written down


def test_metrics_have_one_line_per_step(accelerator: Accelerator, tmp_path: Path) -> None:
    fit(accelerator, settings(max_grad_norm=1e-3, log_every=5), folder=tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert set(rows[0]) == {"step", "loss", "lr", "grad_norm", "samples_per_second", "seconds"}
    assert rows[0]["grad_norm"] > 1e-3  # before clipping
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


def test_losses_may_wait_on_the_device(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged every `log_every` steps, as on a GPU: the same weights and lines, and nothing bad is saved."""
    at_once, _ = fit(accelerator, settings(), folder=tmp_path / "a")
    monkeypatch.setattr(loop, "_judged_at_once", lambda device: False)
    later, _ = fit(accelerator, settings(log_every=4), folder=tmp_path / "b")
    assert weights(at_once) == weights(later)
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in "ab"]
    timing = ("samples_per_second", "seconds")
    a, b = ([{k: v for k, v in row.items() if k not in timing} for row in part] for part in rows)
    assert a == b
    with pytest.raises(
        NonFiniteError, match=r"step 9: the loss is nan; samples: s8-1\n.*step-000005 is good"
    ):
        fit(accelerator, settings(log_every=4), loss=poisoned_at(9), folder=tmp_path / "c")
    assert [path.name for path in (tmp_path / "c" / "checkpoints").iterdir()] == ["step-000005"]
    assert [row["step"] for row in read_metrics(tmp_path / "c" / "metrics.jsonl")] == list(range(1, 9))


def test_validation_and_previews_come_when_due(accelerator: Accelerator, tmp_path: Path) -> None:
    drawn: list[int] = []
    modes: list[bool] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        modes.append(model.training)
        return {"val_loss": float(next(model.parameters()).detach().sum())}

    model, result = fit(
        accelerator,
        settings(validate_every=5),
        folder=tmp_path,
        evaluate=evaluate,
        preview=lambda model, step: drawn.append(step),
        preview_every=4,
    )
    rows = {row["step"]: row for row in read_metrics(tmp_path / "metrics.jsonl")}
    assert [step for step, row in rows.items() if "val_loss" in row] == [0, 5, 10, 12]
    assert set(rows[0]) == {"step", "val_loss"}
    assert drawn == [0, 4, 8, 12]
    assert not any(modes)
    assert result.metrics == {"val_loss_first": rows[0]["val_loss"], "val_loss": rows[12]["val_loss"]}
    assert rows[0]["val_loss"] == float(next(linear().parameters()).detach().sum())
    assert rows[12]["val_loss"] == pytest.approx(float(next(model.parameters()).detach().sum()))


def test_what_previews_come_to_stands_in_the_row_of_their_step(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    lines: list[str] = []
    _, result = fit(
        accelerator,
        settings(),
        folder=tmp_path,
        preview=lambda model, step: {"clip": step / 100},
        preview_every=8,
        say=lines.append,
    )
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["clip"]) for row in rows if "clip" in row] == [(0, 0), (8, 0.08), (12, 0.12)]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))  # nothing is lost by it
    assert result.metrics["clip"] == 0.12 and any(line.endswith("step 8  clip 0.0800") for line in lines)


def test_console_lines_tell_step_loss_speed_and_time_left(accelerator: Accelerator) -> None:
    lines: list[str] = []
    fit(accelerator, settings(log_every=4), say=lines.append, title="heal")
    assert [line.split("  ")[0] for line in lines] == [
        "heal: step 4/12",
        "heal: step 8/12",
        "heal: step 12/12",
    ]
    assert all("loss" in line and "samples/s" in line for line in lines)
    assert [line.endswith(" left") for line in lines] == [True, True, False]


# Resuming


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the loop's own clean-up may be needed."""


def dying_at(step: int) -> Loss:
    def loss(model: nn.Module, batch: Rows) -> Tensor:
        if batch.ids[0].startswith(f"s{step - 1}-"):
            raise Killed
        return squared(model, batch)

    return loss


def dropping_out(inner: Loss) -> Loss:
    """A loss with dropout in it, to see that random numbers resume too."""

    def loss(model: nn.Module, batch: Rows) -> Tensor:
        values = inner(model, batch)
        return torch.nn.functional.dropout(values, 0.3)

    return loss


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("deaths", [(7,), (7, 11), (3, 8, 9)])
def test_resumed_is_bit_equal(
    accelerator: Accelerator, tmp_path: Path, optimizer: str, deaths: tuple[int, ...]
) -> None:
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    config = settings(optimizer=optimizer, schedule="cosine", warmup_steps=2)
    model, result = fit(accelerator, config, loss=dropping_out(squared), folder=tmp_path / "whole")
    for death in deaths:
        with pytest.raises(Killed):
            fit(accelerator, config, loss=dropping_out(dying_at(death)), folder=tmp_path / "cut")
    said: list[str] = []
    again, resumed = fit(
        accelerator, config, loss=dropping_out(squared), folder=tmp_path / "cut", say=said.append
    )
    assert weights(again) == weights(model)
    assert said[0] == f"training: continues after step {10 if 11 in deaths else 5} of 12"
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut")]
    kept = [[(row["step"], row["loss"], row["grad_norm"]) for row in part] for part in rows]
    assert kept[0] == kept[1]
    assert resumed.loss == result.loss
    assert resumed.metrics == result.metrics


def test_a_finished_training_resumes_to_its_end(accelerator: Accelerator, tmp_path: Path) -> None:
    model, result = fit(accelerator, settings(), folder=tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    again, resumed = fit(accelerator, settings(), folder=tmp_path, loss=dying_at(1))
    assert weights(again) == weights(model)
    assert resumed.loss == result.loss
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_constant_schedule_may_be_prolonged(accelerator: Accelerator, tmp_path: Path) -> None:
    straight, _ = fit(accelerator, settings(max_steps=20), folder=tmp_path / "a")
    fit(accelerator, settings(max_steps=9), folder=tmp_path / "b")
    model, _ = fit(accelerator, settings(max_steps=20), folder=tmp_path / "b")
    assert weights(model) == weights(straight)
    with pytest.raises(ResumeError, match=r"already at step 20, beyond train\.max_steps=12"):
        fit(accelerator, settings(), folder=tmp_path / "b")


def test_other_parameters_are_refused(accelerator: Accelerator, tmp_path: Path) -> None:
    fit(accelerator, settings(), folder=tmp_path)
    model = linear()
    model[0].requires_grad_(False)
    with pytest.raises(ResumeError, match="trains other parameters than this run"):
        fit(accelerator, settings(), model=model, folder=tmp_path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_leave(
    accelerator: Accelerator, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    def loss(model: nn.Module, batch: Rows) -> Tensor:
        if batch.ids[0].startswith("s6-"):
            os.kill(os.getpid(), number)
        return squared(model, batch)

    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Interrupted) as error:
        fit(accelerator, settings(), loss=loss, folder=tmp_path / "cut")
    assert error.value.exit_code == code
    assert f"stopped by {number.name} after step 7 of 12" in str(error.value)
    assert "same command again" in str(error.value)
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert (tmp_path / "cut" / "checkpoints" / "step-000007" / "state.json").is_file()
    whole, _ = fit(accelerator, settings(), folder=tmp_path / "whole")
    model, _ = fit(accelerator, settings(), folder=tmp_path / "cut")
    assert weights(model) == weights(whole)


def test_without_checkpoints_signals_are_left_alone(accelerator: Accelerator) -> None:
    def loss(model: nn.Module, batch: Rows) -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        return squared(model, batch)

    # A shell that starts jobs in the background lets them ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(accelerator, settings(), loss=loss)
    finally:
        signal.signal(signal.SIGINT, before)


# What can go wrong


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_loss_stops_before_the_update(
    accelerator: Accelerator, tmp_path: Path, value: float
) -> None:
    model = linear()
    with pytest.raises(NonFiniteError) as error:
        fit(accelerator, settings(), model=model, loss=poisoned_at(8, value), folder=tmp_path)
    assert f"step 8: the loss is {value}; samples: s7-1" in str(error.value)
    assert "step-000005 is good" in str(error.value)
    assert error.value.exit_code == 1
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 8))
    whole, _ = fit(accelerator, settings(), folder=tmp_path / "whole")
    healed, _ = fit(accelerator, settings(), folder=tmp_path)
    assert weights(healed) == weights(whole)


def test_non_finite_gradient_stops_too(accelerator: Accelerator) -> None:
    def loss(model: nn.Module, batch: Rows) -> Tensor:
        return (squared(model, batch) * 0).sqrt()  # 0, with a gradient of 0 * infinity

    model = linear()
    with pytest.raises(NonFiniteError, match=r"the loss is 0 but its gradient is nan; samples: s0-0, s0-1"):
        fit(accelerator, settings(), model=model, loss=loss)
    assert weights(model) == weights(linear())


def test_full_disk_leaves_nothing_that_looks_whole(accelerator: Accelerator, tmp_path: Path) -> None:
    """A real limit of the kernel on file sizes: writing the second checkpoint fails half-way."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def loss(model: nn.Module, batch: Rows) -> Tensor:
        if batch.ids[0].startswith("s9-"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limit[1]))
        return squared(model, batch)

    try:
        with pytest.raises(OutputError, match=r"step-000010: could not write") as error:
            fit(accelerator, settings(log_every=100), loss=loss, folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "free some space" in str(error.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]
    whole, _ = fit(accelerator, settings(), folder=tmp_path / "whole")
    model, _ = fit(accelerator, settings(), folder=tmp_path)
    assert weights(model) == weights(whole)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 12


# Memory running out


def starving_at(step: int, message: str = "CUDA out of memory. Tried to allocate 2 GiB.") -> Loss:
    """A loss for which there is no memory at one step."""

    def loss(model: nn.Module, batch: Rows) -> Tensor:
        values = squared(model, batch)
        if batch.ids[-1].startswith(f"s{step - 1}-"):
            raise torch.OutOfMemoryError(f"{message}\nGPU 0 has a total capacity of ...")
        return values

    return loss


def steps_saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*"))


@pytest.mark.parametrize("cuts", [(6,), (4, 2)])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_out_of_memory_saves_the_last_whole_step(
    accelerator: Accelerator, tmp_path: Path, optimizer: str, cuts: tuple[int, ...]
) -> None:
    config = settings(optimizer=optimizer, schedule="cosine")
    options: dict[str, Any] = {"batches": Line(cuts=cuts)}
    whole, result = fit(accelerator, config, folder=tmp_path / "whole", **options)
    with pytest.raises(OutOfMemory) as error:
        fit(accelerator, config, loss=starving_at(3), folder=tmp_path / "cut", **options)
    said = str(error.value)
    assert said.startswith(
        "memory ran out after step 2 of 12 (CUDA out of memory. Tried to allocate 2 GiB.);"
    )
    assert "goes on from step-000002 when started again" in said
    assert "memory.on_oom=replan" in said
    assert "total capacity" not in said
    assert error.value.exit_code == 1
    assert steps_saved(tmp_path / "cut") == ["step-000002"]
    resumed, again = fit(accelerator, config, folder=tmp_path / "cut", **options)
    assert weights(resumed) == weights(whole)
    assert again.loss == result.loss
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut")]
    kept = [[(row["step"], row["loss"], row["grad_norm"]) for row in part] for part in rows]
    assert kept[0] == kept[1]


def test_out_of_memory_with_losses_on_the_device_loses_no_line(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the steps since the last look are judged before they are saved."""
    monkeypatch.setattr(loop, "_judged_at_once", lambda device: False)
    whole, _ = fit(accelerator, settings(log_every=4), folder=tmp_path / "whole")
    for death in (4, 5, 8, 12):  # before a look, right after one, and after a checkpoint
        with pytest.raises(OutOfMemory, match=f"after step {death - 1} of 12"):
            fit(accelerator, settings(log_every=4), loss=starving_at(death), folder=tmp_path / "cut")
        assert steps_saved(tmp_path / "cut")[-1] == f"step-{death - 1:06d}"
    resumed, _ = fit(accelerator, settings(log_every=4), folder=tmp_path / "cut")
    assert weights(resumed) == weights(whole)
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut")]
    kept = [[(row["step"], row["loss"], row["grad_norm"]) for row in part] for part in rows]
    assert kept[0] == kept[1]


def test_out_of_memory_in_a_preview_keeps_the_step_before_it(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    def preview(model: nn.Module, step: int) -> None:
        if step == 4:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"
            )

    options: dict[str, Any] = {"preview": preview, "preview_every": 2}
    with pytest.raises(OutOfMemory, match=r"after step 4 of 12 .*goes on from step-000004"):
        fit(accelerator, settings(), folder=tmp_path / "cut", **options)
    whole, _ = fit(accelerator, settings(), folder=tmp_path / "whole")
    resumed, _ = fit(accelerator, settings(), folder=tmp_path / "cut")
    assert weights(resumed) == weights(whole)


def test_out_of_memory_in_the_first_step_has_nothing_to_save(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    with pytest.raises(OutOfMemory, match=r"after step 0 of 12 .*there was no checkpoint yet"):
        fit(accelerator, settings(), loss=starving_at(1), folder=tmp_path)
    assert steps_saved(tmp_path) == []
    with pytest.raises(OutOfMemory, match="there was no checkpoint yet"):
        fit(accelerator, settings(), loss=starving_at(3))


def test_out_of_memory_right_after_a_resume_keeps_the_checkpoint(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    for _ in range(2):
        with pytest.raises(OutOfMemory, match=r"after step 6 of 12 .*goes on from step-000006"):
            fit(accelerator, settings(), loss=starving_at(7), folder=tmp_path)
        assert steps_saved(tmp_path) == ["step-000005", "step-000006"]


def test_out_of_memory_in_an_update_saves_nothing(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some parameters may have been updated already, and others not."""
    steps: list[int] = []
    update = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, closure: Any = None) -> Any:
        steps.append(1)
        if len(steps) == 7:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return update(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(OutOfMemory, match=r"in the middle of an update .*goes on from step-000005"):
        fit(accelerator, settings(), folder=tmp_path)
    assert steps_saved(tmp_path) == ["step-000005"]


def test_out_of_memory_with_the_optimizer_in_backward_saves_nothing(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    """In a step that did not end some parameters are new already; the loop cannot tell which."""

    def train_in_backward(loss: Loss, folder: Path) -> nn.Module:
        model = linear()
        parameters = dict(model.named_parameters())
        optimizer = optimizers.build("adamw", parameters.values(), lr=0.05, per_parameter=True)
        fitted = Fitted(model, parameters, optimizer_in_backward=True)
        step_in_backward(optimizer, fitted)
        train(
            accelerator,
            Fitting(fitted, loss),
            optimizer,
            Line(),
            settings(max_grad_norm=None, schedule="cosine"),
            Hooks(checkpoints=Checkpoints(folder / "checkpoints", {}), say=lambda line: None),
        )
        return model

    with pytest.raises(OutOfMemory, match=r"in the middle of an update .*there was no checkpoint yet"):
        train_in_backward(starving_at(3), tmp_path / "cut")
    assert steps_saved(tmp_path / "cut") == []
    with pytest.raises(OutOfMemory, match=r"in the middle of an update .*goes on from step-000005"):
        train_in_backward(starving_at(8), tmp_path / "cut")
    assert steps_saved(tmp_path / "cut") == ["step-000005"]
    resumed = train_in_backward(squared, tmp_path / "cut")
    assert weights(resumed) == weights(train_in_backward(squared, tmp_path / "whole"))


def test_other_errors_are_not_taken_for_memory(accelerator: Accelerator, tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Rows) -> Tensor:
        if batch.ids[0].startswith("s2-"):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        return squared(model, batch)

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        fit(accelerator, settings(), loss=loss, folder=tmp_path)
    assert steps_saved(tmp_path) == ["step-000002"]  # of the last whole step


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("could not create a primitive"),
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_whatever_an_allocator_says_is_memory(
    accelerator: Accelerator, tmp_path: Path, error: Exception
) -> None:
    def loss(model: nn.Module, batch: Rows) -> Tensor:
        if batch.ids[0].startswith("s2-"):
            raise error
        return squared(model, batch)

    with pytest.raises(OutOfMemory, match=r"after step 2 of 12 .*goes on from step-000002"):
        fit(accelerator, settings(), loss=loss, folder=tmp_path)


# What fails beside the steps


class Failing:
    """Fails once, at one step, in one of the places beside the steps."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.left = 1

    def at(self, place: str, step: int) -> None:
        if self.left and (place, step) == (self.place, 8):
            self.left = 0
            raise OSError(5, "Input/output error")

    def evaluate(self, step: Callable[[], int]) -> Callable[[nn.Module], dict[str, float]]:
        def value(model: nn.Module) -> dict[str, float]:
            self.at("evaluate", step())
            return {"val_loss": abs(step() - 8.5) + 1}

        return value


@pytest.mark.parametrize("later", [False, True], ids=["cpu", "as on a gpu"])
@pytest.mark.parametrize("place", ["batches", "evaluate", "preview", "keep", "tracker", "console"])
def test_no_step_is_lost_when_something_beside_the_steps_fails(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, later: bool
) -> None:
    if later:
        monkeypatch.setattr(loop, "_judged_at_once", lambda device: False)

    def run(folder: Path, failing: Failing) -> tuple[nn.Module, list[Any]]:
        made: list[Any] = []
        task = Fitting(Fitted.plain(linear()), squared)
        batches, written = Line(), Tracker.write

        class Reading(Line):
            def step(self, step: int, rank: int, processes: int) -> list[Rows]:
                failing.at("batches", step + 1)
                return batches.step(step, rank, processes)

        def say(line: str) -> None:
            failing.at("console", task.told[-1] if task.told else 0)

        def write(self: Tracker, rows: Any) -> None:
            failing.at("tracker", task.told[-1] if task.told else 0)
            written(self, rows)

        def look(what: str, name: Any, step: int) -> None:
            failing.at(what, step)
            made.append((what, name, step))

        monkeypatch.setattr(Tracker, "write", write)
        done = int(json.loads((folder / "told").read_text())) if (folder / "told").exists() else 0
        try:
            model, _ = fit(
                accelerator,
                settings(validate_every=4, save_every=4, log_every=2, checkpoint_every=5),
                batches=Reading(),
                task=task,
                folder=folder,
                say=say,
                evaluate=failing.evaluate(lambda: task.told[-1] if task.told else done),
                preview=lambda model, step: look("preview", "", step),
                keep=lambda name, step, figures: look("keep", name, step),
                keep_best=True,
            )
        finally:
            folder.mkdir(exist_ok=True)
            (folder / "told").write_text(str(task.told[-1]))
            monkeypatch.setattr(Tracker, "write", written)
        return model, made

    whole, made = run(tmp_path / "whole", Failing(""))
    failing = Failing(place)
    with pytest.raises(OutputError, match=r"input/output error\n(.*\n)*goes on from step-00000[78]"):
        run(tmp_path / "cut", failing)
    assert failing.left == 0
    assert steps_saved(tmp_path / "cut")[-1] == ("step-000007" if place == "batches" else "step-000008")
    again, rest = run(tmp_path / "cut", failing)
    assert weights(again) == weights(whole)
    rows = [
        [
            {key: value for key, value in row.items() if key not in ("seconds", "samples_per_second")}
            for row in part
        ]
        for part in (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut"))
    ]
    assert rows[0] == rows[1]
    assert [item for item in made if item[2] > 7] == [item for item in rest if item[2] > 7]


def test_the_environment_does_not_divide_gradients(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = fit(accelerator, settings())
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    other, _ = fit(Accelerator(cpu=True), settings())
    assert weights(other) == weights(whole)


def test_adapters_are_kept_when_due_and_the_best_one_by_validation(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    kept: list[tuple[str, int]] = []
    drawn: list[int] = []
    values = iter([0.1, 0.5, 0.4, 0.45, 0.3])  # the untrained model does not count

    _, result = fit(
        accelerator,
        settings(validate_every=3, save_every=5),
        folder=tmp_path,
        evaluate=lambda model: {"val_loss": next(values)},
        preview=lambda model, step: drawn.append(step),
        keep=lambda name, step, figures: kept.append((name, step)),
        keep_best=True,
    )
    assert kept == [("best", 3), ("step-000005", 5), ("best", 6), ("step-000010", 10), ("best", 12)]
    assert drawn == [0, 5, 10, 12]
    assert (result.metrics["best_step"], result.metrics["best_val_loss"]) == (12, 0.3)


def test_a_loss_that_is_no_number_is_never_the_best(accelerator: Accelerator) -> None:
    kept: list[str] = []
    fit(
        accelerator,
        settings(validate_every=6),
        evaluate=lambda model: {"val_loss": math.nan},
        keep=lambda name, step, figures: kept.append(name),
        keep_best=True,
    )
    assert kept == []


@pytest.mark.parametrize("cut", [5, 8])
def test_it_ends_where_nothing_got_better_and_as_if_it_had_never_been_cut(
    accelerator: Accelerator, tmp_path: Path, cut: int
) -> None:
    """Lowest at step 3; with a patience of 2 the end is step 9, with one of 3 it is step 12 of 30."""
    judged = {0: 0.9, 3: 0.2, 6: 0.3, 9: 0.2, 12: 0.4, 15: 0.1, 18: 0.5}
    made: list[tuple[str, int]] = []
    said: list[str] = []

    class Killed(Line):
        def step(self, step: int, rank: int, processes: int) -> list[Rows]:
            if step == cut:
                raise KeyboardInterrupt
            return super().step(step, rank, processes)

    def life(patience: int, batches: Line | None = None) -> tuple[nn.Module, Result]:
        task = Fitting(Fitted.plain(linear()), squared)

        def evaluate(model: nn.Module) -> dict[str, float]:
            return {"val_loss": judged[task.told[-1] if task.told else 0]}

        return fit(
            accelerator,
            settings(max_steps=30, validate_every=3, checkpoint_every=2),
            batches=batches,
            task=task,
            folder=tmp_path,
            evaluate=evaluate,
            preview=lambda model, step: made.append(("preview", step)),
            keep=lambda name, step, figures: made.append((name, step)),
            keep_best=True,
            patience=patience,
            say=said.append,
        )

    with pytest.raises(KeyboardInterrupt):
        life(2, Killed())
    model, result = life(2)
    assert (result.step, result.metrics["best_step"]) == (9, 3)
    assert made[-1] == ("preview", 9) and ("best", 6) not in made
    assert steps_saved(tmp_path)[-1] == "step-000009"
    assert said[-1].endswith("ends by itself after step 9 of 30: no lower val_loss since step 3")
    straight, _ = fit(accelerator, settings(max_steps=9))
    assert weights(model) == weights(straight)
    before = len(made)
    assert life(2)[1].step == 9 and len(made) == before  # again: there is nothing left to do
    more, result = life(3)
    assert result.step == 12
    assert weights(more) == weights(fit(accelerator, settings(max_steps=12))[0])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_more_steps_follow_the_longer_curve(accelerator: Accelerator, tmp_path: Path, schedule: str) -> None:
    fit(accelerator, settings(schedule=schedule), folder=tmp_path)
    fit(accelerator, settings(schedule=schedule, max_steps=20), folder=tmp_path)
    short, long = settings(schedule=schedule), settings(schedule=schedule, max_steps=20)
    rates = [row["lr"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert rates == [learning_rate(short if step < 12 else long, step) for step in range(20)]
