"""The only training loop. It takes a loss function; everything else about learning exists here once.

Recipes and the passes that train (heal) call `train`. Per optimizer step ``k`` (counted from 0) it asks
``batches.step(k, rank, processes)`` for this process's micro-batches, adds up ``loss(model, batch).sum()``
over all of them and all processes, divides by ``batches.batch_size`` (so the mean is over the true number of
samples, however they were split), clips, steps and records. Because step ``k`` always takes the same samples
with the same draws, the step counter is the whole data position and the whole random state.

    result = train(accelerator, denoiser, optimizer, batches, loss, config.train)

A loss is a plain function::

    def loss(model: nn.Module, batch: Batch) -> Tensor:        # [rows], one value per row, float32
        noisy, target, weight = objective.sample(batch.latents, batch.noise, batch.timesteps)
        prediction = family.denoise(model, noisy, batch.timesteps, batch.conditioning)
        return weighted_mse(prediction, target, weight)

Batches are anything that answers `Batches`: ``tunekit.data.cache.Stream``, or a class of your own whose
micro-batches have ``ids`` and ``to(device)``.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from tunekit.config import TrainConfig
from tunekit.diffusion.noise import stable_seed
from tunekit.errors import Interrupted, NonFiniteError, OutOfMemory, ResumeError
from tunekit.memory.levers import Fitted
from tunekit.memory.measure import Meter
from tunekit.training.checkpoint import Checkpoints, Saved
from tunekit.training.tracking import Progress, Tracker

if TYPE_CHECKING:
    from accelerate import Accelerator


class MicroBatch(Protocol):
    """What one forward pass takes. The loop reads nothing else of it; the loss knows the rest."""

    @property
    def ids(self) -> Sequence[str]:
        """Of the samples, for messages."""
        ...

    def to(self, device: torch.device) -> Any:
        """The same rows on another device."""
        ...


class Batches(Protocol):
    """Where samples come from: a pure function of the step."""

    batch_size: int
    """Samples per optimizer step over all processes; the loss sum is divided by it."""

    def step(self, step: int, rank: int, processes: int) -> Sequence[MicroBatch]:
        """This process's micro-batches (at least one) of optimizer step `step`, counted from 0."""
        ...


Loss = Callable[[nn.Module, Any], Tensor]
MEASURED = 5
"""Steps whose memory is measured on the CPU, where that takes time: not all have pictures of one size."""


@dataclass(frozen=True)
class Result:
    """What `train` returns; `metrics` goes into the artifact's lineage."""

    step: int
    """Optimizer steps done in all, those before a resume included."""
    loss: float
    """Mean loss of the last (up to 50) steps of this process's life."""
    seconds: float
    """Time inside `train`, all lives of the run together."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Last figures of `evaluate`, and the first ones as `<name>_first`."""


def train(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    loss: Loss,
    settings: TrainConfig,
    *,
    fitted: Fitted | None = None,
    meter: Meter | None = None,
    seed: int = 0,
    tracker: Tracker | None = None,
    checkpoints: Checkpoints | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    preview: Callable[[nn.Module, int], None] | None = None,
    preview_every: int | None = None,
    say: Callable[[str], None] | None = None,
    title: str = "training",
) -> Result:
    """Train `module` in place for `settings.max_steps` optimizer steps.

    Args:
        accelerator: its device, processes and mixed precision are used; accumulation is the loop's own, so
            leave `gradient_accumulation_steps` at 1.
        module: the denoiser, already on the accelerator's device; parameters with `requires_grad` are trained
            and must be float32, unless `fitted` has copies that are. It is wrapped here (DDP, autocast); the
            loss receives the wrapped one, `module` itself is trained.
        optimizer: built over the trainable parameters of `module`, or those of `fitted` (`optimizers.build`).
            Its learning rate is set every step from `settings` (a pure function of the step), so pass no
            scheduler.
        batches: see `Batches`.
        loss: `(model, batch) -> [rows]`. Rows are summed, so a row's weight belongs inside the loss.
        settings: reads max_steps, lr, schedule, warmup_steps, max_grad_norm, checkpoint_every,
            keep_checkpoints, validate_every and log_every. A pass builds its own: `TrainConfig(max_steps=200,
            lr=1e-4, batch_size=4)`.
        fitted: what `memory.levers.fit` made of `module`; None for a module without levers.
        meter: measures the phases "first_step" and "step".
        seed: seeds torch's global generator before each forward (dropout).
        tracker: writes metrics.jsonl (and TensorBoard); None keeps nothing on disk.
        checkpoints: where resumable state goes; None neither saves nor resumes, and leaves signals alone.
        evaluate: called with the bare module before the first step, every `validate_every` and after the
            last.
        preview: called on the main process with the bare module and the step, before the first step, every
            `preview_every` and after the last.
        say: where console lines go; None is rich's progress on a terminal and plain lines elsewhere.
        title: first word of each console line.

    Raises:
        NonFiniteError: a loss or gradient is not finite; names the step and the samples. The last checkpoint
            stays.
        ResumeError: the checkpoint found was made by another config.
        OutputError: a checkpoint could not be written; nothing half-written is left looking whole.
        OutOfMemory: with `checkpoints`, one of the last whole step was written first where that was possible.
        Interrupted: SIGINT or SIGTERM came (only with `checkpoints`); a checkpoint was written first.
    """
    return _Training(
        accelerator=accelerator,
        module=module,
        optimizer=optimizer,
        batches=batches,
        loss=loss,
        settings=settings,
        fitted=fitted,
        meter=meter or Meter(accelerator.device, active=False),
        seed=seed,
        tracker=tracker if accelerator.is_main_process else None,
        checkpoints=checkpoints,
        evaluate=evaluate,
        preview=preview,
        preview_every=preview_every,
        say=say,
        title=title,
    ).run()


@dataclass
class _Pending:
    """A step whose loss was not judged yet."""

    step: int
    lr: float
    ids: list[str]
    """Sample id per row of this process."""
    values: list[Tensor]
    """Losses of the rows, per micro-batch."""
    figures: Tensor
    """[3]: mean loss, gradient norm before clipping, processes told to stop."""


@dataclass
class _Training:
    """The state of one call of `train`; the first fields are its arguments."""

    accelerator: Accelerator
    module: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Batches
    loss: Loss
    settings: TrainConfig
    fitted: Fitted | None
    meter: Meter
    seed: int
    tracker: Tracker | None
    checkpoints: Checkpoints | None
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None
    preview: Callable[[nn.Module, int], None] | None
    preview_every: int | None
    say: Callable[[str], None] | None
    title: str

    start: int = 0
    """Steps done by earlier lives."""
    seconds_before: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=50))
    pending: list[_Pending] = field(default_factory=list)
    whole: int | None = 0
    """Steps done; None while parameters are being updated."""
    working: float = 0.0
    """Seconds this life has spent on steps alone, up to the last judgement."""

    def run(self) -> Result:
        """Resume, train, finish."""
        own = {name: item for name, item in self.module.named_parameters() if item.requires_grad}
        self.parameters = self.fitted.parameters if self.fitted else own
        self.in_backward = self.fitted is not None and self.fitted.optimizer_in_backward
        wrong = [name for name, item in self.parameters.items() if item.dtype != torch.float32]
        if wrong or not self.parameters:
            raise TypeError(f"not float32: {wrong[:3]}" if wrong else "nothing to train")
        self.at_once = _judged_at_once(self.accelerator.device)
        self._resume()
        # The small gradients of an adapter are summed over processes here: DDP would look for those of the
        # module, not of float32 copies, and would move weights that stay on the host.
        self.reduces = self.fitted is not None and self.fitted.stands_alone
        if self.reduces:
            self.model = self.accelerator.prepare_model(
                self.module, device_placement=False, evaluation_mode=True
            )
            self.optimizer = self.accelerator.prepare(self.optimizer)
        else:
            self.model, self.optimizer = self.accelerator.prepare(self.module, self.optimizer)
        self.bare = self.accelerator.unwrap_model(self.model)  # under autocast still, but not DDP
        self.begun = self.window = time.perf_counter()
        total = self.settings.max_steps
        quiet = not self.accelerator.is_main_process
        with (
            _Signals(active=self.checkpoints is not None) as self.signals,
            Progress(
                self.title,
                total,
                start=self.start,
                log_every=self.settings.log_every,
                say=self.say,
                quiet=quiet,
            ) as self.progress,
        ):
            try:
                self.module.train()
                if self.start:
                    self.progress.say(f"{self.title}: continues after step {self.start} of {total}")
                else:
                    self._look(0, [])
                for step in range(self.start + 1, total + 1):
                    self._step(step)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._ran_out(error)
            finally:
                if self.fitted:
                    self.fitted.finish()
                if self.tracker:
                    self.tracker.close()
                self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
                self.accelerator.free_memory()
        self.module.eval()
        return Result(step=total, loss=self._mean(), seconds=self._seconds(), metrics=self.figures)

    def _resume(self) -> None:
        """Go back to the newest checkpoint, if there is one."""
        saved = self.checkpoints.load() if self.checkpoints else None
        if saved is not None:
            _restore(saved, self.parameters, self.optimizer, self.accelerator, self.settings.max_steps)
            if self.fitted:
                self.fitted.write_back()
            self.start = saved.step
            self.seconds_before = float(saved.state["seconds"])
            self.figures.update(saved.state["metrics"])
            self.recent.extend(saved.state["recent"])
        self.whole = self.start
        if self.tracker:
            self.tracker.rewind(self.start)
        self.accelerator.wait_for_everyone()  # all have read the checkpoint before one may prune it

    def _step(self, step: int) -> None:
        """One optimizer step, and whatever is due after it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, step - 1)
        first, early = step == self.start + 1, step <= self.start + MEASURED
        with self.meter.phase("first_step" if first else "step", again=early):
            rows, stop = self._update(step)
        end = step == self.settings.max_steps
        saving = self.checkpoints is not None and (end or _due(step, self.settings.checkpoint_every))
        looking = end or _due(step, self.settings.validate_every) or _due(step, self.preview_every)
        if not self.at_once and (
            saving
            or looking
            or _due(step, self.settings.log_every)
            or (self.accelerator.num_processes == 1 and self.signals.told is not None)
        ):
            rows, stop = self._judge()
        if rows:
            self._look(step, rows)
            done = (step - self.start) * self.batches.batch_size
            left = (self.settings.max_steps - step) * self.working / (step - self.start)
            self.progress.update(
                step, loss=self._mean(), samples_per_second=done / self.working, seconds_left=left
            )
        if self.checkpoints and (saving or stop):
            self._save(step)
            if stop:
                raise self.signals.interrupted(step, self.settings.max_steps)

    def _update(self, step: int) -> tuple[list[dict[str, Any]], bool]:
        """Gradients and the update; what was judged before it, if it was."""
        if self.in_backward:
            self.whole = None
        self.pending.append(self._gradients(step))
        judged = self._judge() if self.at_once else ([], False)
        self.whole = None
        self.optimizer.step()
        if self.fitted:
            self.fitted.write_back()
        self.optimizer.zero_grad(set_to_none=True)
        self.whole = step
        return judged

    def _gradients(self, step: int) -> _Pending:
        """Add up the gradients of this step over micro-batches and processes, clipped."""
        accelerator = self.accelerator
        rank, processes = accelerator.process_index, accelerator.num_processes
        micro_batches = self.batches.step(step - 1, rank, processes)
        total = torch.zeros((), device=accelerator.device)
        values = []
        for index, batch in enumerate(micro_batches):
            torch.manual_seed(stable_seed(self.seed, step, rank, index, "dropout"))
            last = index == len(micro_batches) - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                rows = self.loss(self.model, batch.to(accelerator.device)).float()
                share = rows.sum() / self.batches.batch_size
                # DDP averages over the processes, but the mean is over samples.
                accelerator.backward(share * processes)
            total += share.detach()
            values.append(rows.detach())
        if self.reduces and processes > 1:
            _average([p.grad for p in self.parameters.values() if p.grad is not None], accelerator)
        norm = accelerator.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm or math.inf)
        told = torch.full_like(total, float(self.signals.told is not None))
        shared = torch.stack([total, told])
        if processes > 1:
            shared = accelerator.reduce(shared, "sum")
        figures = torch.stack([shared[0], norm.detach().to(shared), shared[1]])
        ids = [name for batch in micro_batches for name in batch.ids]
        return _Pending(step, learning_rate(self.settings, step - 1), ids, values, figures)

    def _judge(self) -> tuple[list[dict[str, Any]], bool]:
        """Bring the waiting losses to the host: rows of metrics, and whether a process was told to stop."""
        scaler = self.accelerator.scaler
        read = torch.stack([item.figures for item in self.pending]).tolist()
        elapsed = time.perf_counter() - self.window
        rate = round(len(read) * self.batches.batch_size / max(elapsed, 1e-9), 3)
        rows: list[dict[str, Any]] = []
        for item, (mean, norm, _) in zip(self.pending, read, strict=True):
            # fp16: a gradient that overflows is skipped by the scaler, which then scales less.
            if not math.isfinite(mean) or not (math.isfinite(norm) or scaler):
                self._refuse(item, mean, norm)
            self.recent.append(mean)
            row = {"step": item.step, "loss": mean, "lr": item.lr}
            if math.isfinite(norm) and not self.in_backward:  # JSON has no infinity
                row["grad_norm"] = norm
            rows.append({**row, "samples_per_second": rate, "seconds": round(self._seconds(), 3)})
        if scaler and scaler.get_scale() < 1:
            raise NonFiniteError(
                f"step {self.pending[-1].step}: gradients overflow fp16 at every scale",
                hint="train in bf16 or fp32: memory.precision=bf16",
            )
        self.pending.clear()
        self.working += elapsed
        self.window = time.perf_counter()
        return rows, any(told > 0 for _, _, told in read)

    def _refuse(self, item: _Pending, mean: float, norm: float) -> NoReturn:
        """Stop at a step that is not finite; name the samples whose own loss is bad, or all of the step."""
        from accelerate.utils import gather_object

        fine = torch.cat(item.values).isfinite().tolist()
        everyone: list[tuple[str, bool]] = gather_object(list(zip(item.ids, fine, strict=True)))
        samples = sorted({name for name, fine in everyone if not fine} or {name for name, _ in everyone})
        shown = ", ".join(samples[:8]) + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")
        what = f"the loss is {mean:.4g}" + (f" but its gradient is {norm}" if math.isfinite(mean) else "")
        newest = self.checkpoints.newest() if self.checkpoints else None
        kept = f"the checkpoint {newest} is good" if newest else "there was no checkpoint yet"
        raise NonFiniteError(
            f"step {item.step}: {what}; samples: {shown}",
            hint=f"{kept}; look at these pictures, lower train.lr, or use memory.precision=fp32",
        )

    def _ran_out(self, error: RuntimeError) -> NoReturn:
        """Saves what is whole, if it can be, and says so."""
        self.optimizer.zero_grad(set_to_none=True)
        kept = "there was no checkpoint yet"
        if self.checkpoints:
            alone = self.accelerator.num_processes == 1  # the others may wait for this process for ever
            if alone and self.whole is not None and self.whole > self.start:
                rows = self._judge()[0] if self.pending else []
                if self.tracker:
                    self.tracker.write(rows)
                self._save(self.whole)
            newest = self.checkpoints.newest()
            kept = f"goes on from {newest.name} when started again" if newest else kept
        text = str(error).strip().partition("\n")[0]
        when = f"after step {self.whole} of {self.settings.max_steps}"
        if self.whole is None:
            when = "in the middle of an update"
        raise OutOfMemory(
            f"memory ran out {when} ({text}); {kept}",
            hint="memory.budget=auto plans a run that fits, and memory.on_oom=replan goes on by itself;"
            " or lower memory.micro_batch, or set memory.gradient_checkpointing=true",
        ) from error

    def _look(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Validate and preview where they are due, and write the rows down."""
        always = step in (0, self.settings.max_steps)
        evaluating = self.evaluate and (always or _due(step, self.settings.validate_every))
        previewing = self.preview and (always or _due(step, self.preview_every))
        began = time.perf_counter()
        if evaluating or previewing:
            self.module.eval()
        if self.evaluate and evaluating:
            values = {name: float(value) for name, value in self.evaluate(self.bare).items()}
            if step == 0:
                self.figures.update({f"{name}_first": value for name, value in values.items()})
            self.figures.update(values)
            rows = rows or [{"step": step}]
            rows[-1].update(values)
            shown = "  ".join(f"{name} {value:.5f}" for name, value in values.items())
            self.progress.say(f"{self.title}: step {step}  {shown}")
        if self.tracker:
            self.tracker.write(rows)
        if self.preview and previewing:
            if self.accelerator.is_main_process:
                self.preview(self.bare, step)
            self.accelerator.wait_for_everyone()
        self.module.train()
        self.window += time.perf_counter() - began  # not the steps' time

    def _save(self, step: int) -> None:
        """Write a checkpoint on the main process, while the others wait."""
        began = time.perf_counter()
        if self.checkpoints and self.accelerator.is_main_process:
            if self.tracker:
                self.tracker.sync()
            scaler = self.accelerator.scaler
            state = {
                "step": step,
                "seconds": self._seconds(),
                "metrics": self.figures,
                "recent": list(self.recent),
                "scaler": scaler.state_dict() if scaler else None,
            }
            self.checkpoints.save(self.parameters, self.optimizer.state_dict(), state)
        self.accelerator.wait_for_everyone()
        self.window += time.perf_counter() - began

    def _mean(self) -> float:
        return sum(self.recent) / len(self.recent)

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.begun


def weighted_mse(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean squared error of each row times its weight: [B, ...], [B, ...], [B] -> [B], in float32."""
    return weight * (prediction.float() - target.float()).square().flatten(1).mean(1)


def learning_rate(settings: TrainConfig, step: int) -> float:
    """Learning rate of an optimizer step, counted from 0: a pure function, so there is nothing to restore.

    The warm-up ends at the full rate; linear and cosine then fall to zero at `max_steps`.
    """
    warmup, total = settings.warmup_steps, settings.max_steps
    if step < warmup:
        return settings.lr * (step + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return settings.lr
    done = (step - warmup) / (total - warmup)
    share = 1 - done if settings.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return settings.lr * share


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the allocator of CPU tensors, had nothing left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _average(gradients: Sequence[Tensor], accelerator: Accelerator) -> None:
    """Replaces gradients by their mean over the processes."""
    flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


def _judged_at_once(device: torch.device) -> bool:
    """Whether each step's loss is looked at before its update.

    To be judged a loss has to reach the host. On the CPU that is free. Elsewhere it would stall the launch
    queue once per step, so losses wait on the device and are judged together, every `log_every` steps and
    always before anything is validated, previewed or saved: a bad update then only ever reaches memory that
    the error throws away.
    """
    return device.type == "cpu"


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _restore(
    saved: Saved,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    max_steps: int,
) -> None:
    """Put a checkpoint back."""
    if saved.step > max_steps:
        raise ResumeError(
            f"the run is already at step {saved.step}, beyond train.max_steps={max_steps}",
            hint=f"set train.max_steps to {saved.step} or more, or give the run another name (name=...)",
        )
    if saved.trainable.keys() != parameters.keys():
        odd = sorted(saved.trainable.keys() ^ parameters.keys())
        raise ResumeError(
            f"the checkpoint trains other parameters than this run ({len(odd)} differ: {odd[0]} ...)",
            hint="give the run another name (name=...)",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved.trainable[name])
    optimizer.load_state_dict(saved.optimizer)
    if accelerator.scaler and saved.state["scaler"]:
        accelerator.scaler.load_state_dict(saved.state["scaler"])


class _Signals:
    """Turns SIGINT and SIGTERM into a note that the loop reads between steps, while it runs.

    A launcher often passes on the signal that the terminal has sent already; so a second one counts as a wish
    to leave at once only when it comes a second later.
    """

    def __init__(self, *, active: bool) -> None:
        self.active = active and threading.current_thread() is threading.main_thread()
        self.told: int | None = None
        self._when = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if self.active:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.told is not None and time.monotonic() - self._when > 1:
            raise KeyboardInterrupt
        if self.told is None:
            self.told, self._when = number, time.monotonic()

    def interrupted(self, step: int, total: int) -> Interrupted:
        """The error to raise after the checkpoint."""
        number = self.told or signal.SIGTERM
        error = Interrupted(
            f"stopped by {signal.Signals(number).name} after step {step} of {total}; a checkpoint was saved",
            hint="give the same command again to continue",
        )
        error.exit_code = 128 + number
        return error
