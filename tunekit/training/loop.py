"""The only training loop. It takes a task; everything else about learning exists here once.

Recipes and the passes that train (heal) call `train`. Per optimizer step ``k`` (counted from 0) it asks
``batches.step(k, rank, processes)`` for this process's micro-batches, adds up ``task.loss(model, batch)``
over all of them and all processes, divides by ``batches.batch_size`` (so the mean is over the true number of
samples, however they were split), clips, steps and records. Because step ``k`` always takes the same samples
with the same draws, the step counter is the whole data position and the whole random state.

    result = train(accelerator, task, optimizer, batches, config.train, Hooks(seed=config.seed))

A task is what `tunekit.tasks.Task` says; `Denoising` is one. Batches are anything that answers `Batches`:
``tunekit.data.cache.Stream``, or a class of your own whose micro-batches have ``ids`` and ``to(device)``.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, cast

import torch
from torch import Tensor, nn

from tunekit.config import CHOSEN_BY, TrainConfig
from tunekit.diffusion.noise import stable_seed
from tunekit.errors import (
    Interrupted,
    NonFiniteError,
    OutOfMemory,
    ResumeError,
    TunekitError,
    from_outside,
    is_out_of_memory,
)
from tunekit.memory.levers import Fitted
from tunekit.memory.measure import Meter
from tunekit.progress import Progress, console, left, pace
from tunekit.tasks import Task
from tunekit.training.checkpoint import Checkpoints, Saved
from tunekit.training.run import load_everywhere
from tunekit.training.schedule import learning_rate
from tunekit.training.signals import Signals
from tunekit.training.tracking import Tracker

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


MEASURED = 5
"""Steps whose memory is measured on the CPU, where that takes time: not all have pictures of one size."""


class Counted(Batches, Protocol):
    """Batches for weights that are split: each forward pass is a meeting of all processes."""

    def forwards(self, step: int, processes: int) -> int:
        """Most micro-batches that a process has of a step."""
        ...


@dataclass(frozen=True)
class Hooks:
    """What happens beside the steps; nothing of it changes what is learned but `seed`.

    Attributes:
        seed: of dropout's masks, by sample; and of torch's global generator before each forward.
        meter: measures the phases "first_step" and "step".
        tracker: writes metrics.jsonl (and TensorBoard); None keeps nothing on disk.
        checkpoints: where resumable state goes; None neither saves nor resumes, and leaves signals alone.
        evaluate: called with the bare module before the first step, every `validate_every` and after the
            last.
        preview: called on the main process with the bare module and the step, before the first step, every
            `preview_every`, wherever something is kept by step, and after the last; figures that it gives
            stand in the row of the step.
        keep: called on the main process to keep what is learned as it is: with a name ("step-000050" every
            `save_every`, "best"), the step, and the figures so far.
        keep_best: keep the "best" by `val_loss`, of the steps at which it is evaluated.
        patience: end by itself behind so many evaluations, one each `validate_every`, without a better one.
        say: where lines go; None is the console.
        title: first word of each console line.
    """

    seed: int = 0
    meter: Meter | None = None
    tracker: Tracker | None = None
    checkpoints: Checkpoints | None = None
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None
    preview: Callable[[nn.Module, int], Mapping[str, float] | None] | None = None
    preview_every: int | None = None
    keep: Callable[[str, int, Mapping[str, float]], None] | None = None
    keep_best: bool = False
    patience: int | None = None
    say: Callable[[str], None] | None = None
    title: str = "training"


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
    """Last figures of `evaluate`, and the first ones as `<name>_first`; of the best `best_step` and
    `best_val_loss`, where it is kept or waited for."""


def train(
    accelerator: Accelerator,
    task: Task,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    settings: TrainConfig,
    hooks: Hooks | None = None,
) -> Result:
    """Train `task.fitted.module` in place for `settings.max_steps` optimizer steps.

    Args:
        accelerator: its device, processes and mixed precision are used; accumulation is the loop's own, so
            leave `gradient_accumulation_steps` at 1.
        task: what is trained, already on the accelerator's device, and its loss. The module is wrapped here
            (DDP, autocast); the loss receives the wrapped one, the module itself is trained.
        optimizer: built over `task.fitted.parameters` (`optimizers.build`), which are float32. Its learning
            rate is set every step from `settings` (a pure function of the step), so pass no scheduler.
        batches: see `Batches`.
        settings: reads max_steps, lr, schedule, warmup_steps, max_grad_norm, checkpoint_every,
            validate_every, save_every and log_every. A pass builds its own: `TrainConfig(max_steps=200,
            lr=1e-4, batch_size=4)`.
        hooks: what happens beside the steps.

    Raises:
        NonFiniteError: a loss or gradient is not finite; names the step and the samples. The last checkpoint
            stays.
        ResumeError: the checkpoint found was made by another config.
        OutputError: a checkpoint could not be written; nothing half-written is left looking whole.
        OutOfMemory: with `checkpoints`, one of the last whole step was written first where that was possible,
            as before any other error that does not come from what is learned.
        Interrupted: SIGINT or SIGTERM came (only with `checkpoints`); a checkpoint was written first.
    """
    return _Training(accelerator, task, optimizer, batches, settings, hooks or Hooks()).run()


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
    """[3 + parts]: mean loss, gradient norm before clipping, processes told to stop, means of the parts."""
    parts: tuple[str, ...] = ()
    """What the metrics call the parts of the loss."""


@dataclass
class _Training:
    """The state of one call of `train`; the first fields are its arguments."""

    accelerator: Accelerator
    task: Task
    optimizer: torch.optim.Optimizer
    batches: Batches
    settings: TrainConfig
    hooks: Hooks

    start: int = 0
    """Steps done by earlier lives."""
    seconds_before: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=50))
    pending: list[_Pending] = field(default_factory=list)
    whole: int | None = 0
    """Steps done; None while parameters are being updated."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of the look that is going on: not yet looked at, and perhaps not yet written."""
    told: int = 0
    """Step of the last line."""
    working: float = 0.0
    """Seconds this life has spent on steps alone, up to the last judgement."""

    def run(self) -> Result:
        """Resume, train, finish."""
        hooks = self.hooks
        self.fitted, self.module = self.task.fitted, self.task.fitted.module
        self.parameters = self.fitted.parameters
        self.in_backward = self.fitted.optimizer_in_backward
        self.meter = hooks.meter or Meter(self.accelerator.device, active=False)
        self.tracker = hooks.tracker if self.accelerator.is_main_process else None
        self.checkpoints = hooks.checkpoints
        wrong = [name for name, item in self.parameters.items() if item.dtype != torch.float32]
        if wrong or not self.parameters:
            raise TypeError(f"not float32: {wrong[:3]}" if wrong else "nothing to train")
        # Sums are made here; accelerate would divide by what a variable of the environment says.
        self.accelerator.gradient_accumulation_steps = 1
        self.shards = self.fitted.shards
        self.names = _in_order(self.optimizer, self.parameters) if self.shards else ()
        self.at_once = _judged_at_once(self.accelerator.device)
        self._resume()
        # The small gradients of an adapter are summed over processes here: DDP would look for those of the
        # module, not of float32 copies, and would move weights that stay on the host.
        self.reduces = self.fitted.stands_alone
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
        self.progress = console() if self.accelerator.is_main_process else Progress(quiet=True)
        with (
            Signals(active=self.checkpoints is not None) as self.signals,
            self.progress.phase(hooks.title, total, start=self.start) as self.phase,
        ):
            try:
                self.module.train()
                if self.start:
                    self._say(f"continues after step {self.start} of {total}")
                    if self.rows:  # what failed then is made up for
                        self._look(self.start, self.rows)
                else:
                    self._look(0, [])
                last = self.start
                while last < total and not self._enough(last):
                    last += 1
                    self._step(last)
                if last < total:
                    best = int(self.figures.get("best_step", 0))
                    self._say(f"ends by itself after step {last} of {total}: {no_better(best)}")
            except (Interrupted, NonFiniteError):
                raise
            except Exception as error:
                if is_out_of_memory(error):
                    self._ran_out(error)
                told = self._failed(error)
                if told is error:
                    raise
                raise told from error
            finally:
                self.fitted.finish()
                if self.tracker:
                    self.tracker.close()
                self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
                self.accelerator.free_memory()
        self.module.eval()
        return Result(step=last, loss=self._mean(), seconds=self._seconds(), metrics=self.figures)

    def _resume(self) -> None:
        """Go back to the newest checkpoint, if there is one."""
        saved = load_everywhere(self.checkpoints, self.accelerator) if self.checkpoints else None
        if saved is not None:
            _check(saved, self.fitted, self.settings.max_steps)
            _restore(saved, self.fitted, self.optimizer, self.accelerator, self.names)
            self.fitted.write_back()
            self.task.restore(self.shards.cut(saved.task) if self.shards else saved.task)
            self.start = saved.step
            self.seconds_before = float(saved.state["seconds"])
            self.figures.update(saved.state["metrics"])
            self.recent.extend(saved.state["recent"])
            self.rows = list(saved.state.get("waiting", []))
        self.whole = self.told = self.start
        if self.tracker:
            self.tracker.rewind(int(self.rows[0]["step"]) - 1 if self.rows else self.start)
        self.accelerator.wait_for_everyone()  # all have read the checkpoint before one may prune it

    def _step(self, step: int) -> None:
        """One optimizer step, and whatever is due after it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, step - 1) * group.get("scale", 1.0)
        first, early = step == self.start + 1, step <= self.start + MEASURED
        with self.meter.phase("first_step" if first else "step", again=early):
            rows, stop = self._update(step)
        end = step == self.settings.max_steps
        saving = self.checkpoints is not None and (end or _due(step, self.settings.checkpoint_every))
        looking = end or any(
            _due(step, every)
            for every in (self.settings.validate_every, self.settings.save_every, self.hooks.preview_every)
        )
        if not self.at_once and (
            saving
            or looking
            or _due(step, self.settings.log_every)
            or (self.accelerator.num_processes == 1 and self.signals.told is not None)
        ):
            rows, stop = self._judge()
        self.phase.update(step)
        if rows:
            self._look(step, rows)
            self._tell(step)
        if self.checkpoints and (saving or stop or self._enough(step)):
            self._save(step)
            if stop:
                raise self.signals.interrupted(step, self.settings.max_steps)

    def _tell(self, step: int) -> None:
        """Show the loss, how fast it goes and how long it will take."""
        seconds = self.working / (step - self.start)
        total, every = self.settings.max_steps, self.settings.log_every
        rest = left(seconds * (total - step))
        note = f"loss {self._mean():.4f}  {pace(seconds, self.batches.batch_size)}  {rest}".rstrip()
        self.phase.update(step, note)
        crossed = step // every > self.told // every
        if step == total or (crossed and not self.progress.moves):
            self._say(f"step {step}/{total}  {note}")
            self.told = step

    def _say(self, line: str) -> None:
        """Show a line of its own."""
        if self.accelerator.is_main_process:
            (self.hooks.say or self.progress.say)(f"{self.hooks.title}: {line}")

    def _update(self, step: int) -> tuple[list[dict[str, Any]], bool]:
        """Gradients and the update; what was judged before it, if it was."""
        if self.in_backward:
            self.whole = None
        self.pending.append(self._gradients(step))
        judged = self._judge() if self.at_once else ([], False)
        self.whole = None
        self.optimizer.step()
        self.fitted.write_back()
        self.optimizer.zero_grad(set_to_none=True)
        self.task.updated(step)
        self.whole = step
        return judged

    def _gradients(self, step: int) -> _Pending:
        """Add up the gradients of this step over micro-batches and processes, clipped."""
        accelerator = self.accelerator
        rank, processes = accelerator.process_index, accelerator.num_processes
        micro_batches = self.batches.step(step - 1, rank, processes)
        forwards = len(micro_batches)
        if self.shards:
            forwards = cast(Counted, self.batches).forwards(step - 1, processes)
        idle = [micro_batches[-1]] * (forwards - len(micro_batches))  # to come to all meetings
        total = torch.zeros((), device=accelerator.device)
        parts: dict[str, Tensor] = {}
        values = []
        for index, batch in enumerate([*micro_batches, *idle]):
            self.fitted.masks.draw(self.hooks.seed, step, batch.ids, accelerator.device)
            torch.manual_seed(stable_seed(self.hooks.seed, step, rank, index, "loss"))
            last = index == forwards - 1
            self.fitted.summing = not last
            with nullcontext() if last or self.shards else accelerator.no_sync(self.model):
                losses = self.task.loss(self.model, batch.to(accelerator.device))
                rows = losses["loss"].float()
                share = rows.sum() / self.batches.batch_size
                if index >= len(micro_batches):
                    accelerator.backward(share * 0)
                    continue
                # DDP averages over the processes, but the mean is over samples.
                accelerator.backward(share * processes)
            total += share.detach()
            values.append(rows.detach())
            for name, part in losses.items():
                if name != "loss":
                    known = parts.get(name, torch.zeros((), device=accelerator.device))
                    parts[name] = known + part.detach().float().sum() / self.batches.batch_size
        if self.reduces and processes > 1 and not self.fitted.learns_parts:
            _average([p.grad for p in self.parameters.values() if p.grad is not None], accelerator)
        most = self.settings.max_grad_norm or math.inf
        if self.shards and self.shards.learns:
            norm = self.shards.clip(self.parameters.values(), most)
        else:
            norm = accelerator.clip_grad_norm_(self.parameters.values(), most)
        told = torch.full_like(total, float(self.signals.told is not None))
        shared = torch.stack([total, told, *parts.values()])
        if processes > 1:
            shared = accelerator.reduce(shared, "sum")
        figures = torch.stack([shared[0], norm.detach().to(shared), *shared[1:]])
        ids = [name for batch in micro_batches for name in batch.ids]
        lr = learning_rate(self.settings, step - 1)
        return _Pending(step, lr, ids, values, figures, tuple(f"loss_{name}" for name in parts))

    def _judge(self) -> tuple[list[dict[str, Any]], bool]:
        """Bring the waiting losses to the host: rows of metrics, and whether a process was told to stop."""
        scaler = self.accelerator.scaler
        read = torch.stack([item.figures for item in self.pending]).tolist()
        elapsed = time.perf_counter() - self.window
        rate = round(len(read) * self.batches.batch_size / max(elapsed, 1e-9), 3)
        rows: list[dict[str, Any]] = []
        for item, (mean, norm, _, *parts) in zip(self.pending, read, strict=True):
            # fp16: a gradient that overflows is skipped by the scaler, which then scales less.
            if not math.isfinite(mean) or not (math.isfinite(norm) or scaler):
                self._refuse(item, mean, norm)
            self.recent.append(mean)
            row = {
                "step": item.step,
                "loss": mean,
                **dict(zip(item.parts, parts, strict=True)),
                "lr": item.lr,
            }
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
        return rows, any(figures[2] > 0 for figures in read)

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

    def _rescue(self) -> str:
        """Writes a checkpoint of the last whole step, if it can be; says what there is to go on from."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.checkpoints is None:
            return ""
        newest = self.checkpoints.newest()
        known = newest is not None and self.whole is not None and newest.name == f"step-{self.whole:06d}"
        if (
            self.accelerator.is_main_process
            and not self.fitted.learns_parts  # the others have parts of it, and may be gone
            and self.whole is not None
            and self.whole > self.start
            and not known
        ):
            rows = self._judge()[0] if self.pending else []
            self.bare.train()
            with suppress(TunekitError, OSError, RuntimeError):  # what failed may be the disk
                if self.tracker:
                    self.tracker.write(rows)
            with suppress(TunekitError, OSError, RuntimeError):
                self._save(self.whole, alone=True)
            newest = self.checkpoints.newest()
        return f"goes on from {newest.name} when started again" if newest else "there was no checkpoint yet"

    def _failed(self, error: Exception) -> Exception:
        """Something beside the steps failed, a cached file or a preview: no step is lost by it.

        Returns:
            What to raise.
        """
        kept = self._rescue()
        told = error if isinstance(error, TunekitError) else from_outside(error)
        if told is None:
            return error
        if kept and not isinstance(told, ResumeError):
            told.hint = f"{told.hint}\n{kept}" if told.hint else kept
        return told

    def _ran_out(self, error: Exception) -> NoReturn:
        """Saves what is whole, if it can be, and says so."""
        kept = self._rescue() or "there was no checkpoint yet"
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
        """Validate, preview and keep where that is due, and write the rows down."""
        always = step in (0, self.settings.max_steps)
        self.rows = rows
        evaluate, preview, keep = self.hooks.evaluate, self.hooks.preview, self.hooks.keep
        keeping = [f"step-{step:06d}"] if keep and step and _due(step, self.settings.save_every) else []
        by_step = bool(keeping)
        evaluating = evaluate and (always or _due(step, self.settings.validate_every))
        previewing = preview and (always or by_step or _due(step, self.hooks.preview_every))
        began = time.perf_counter()
        if evaluating or previewing:
            self.module.eval()
        if evaluate and evaluating:
            values = {name: float(value) for name, value in evaluate(self.bare).items()}
            if step == 0:
                self.figures.update({f"{name}_first": value for name, value in values.items()})
            self.figures.update(values)
            rows = rows or [{"step": step}]
            rows[-1].update(values)
            shown = "  ".join(f"{name} {value:.5f}" for name, value in values.items())
            chooses = self.hooks.keep_best or self.hooks.patience
            if step and chooses and self._is_best(step, values):
                self.figures.update(best_step=step, best_val_loss=values[CHOSEN_BY])
                keeping += ["best"] if self.hooks.keep_best else []
                shown += "  (the best so far)"
            self._say(f"step {step}  {shown}")
        drawing = preview and (previewing or self._enough(step))
        if self.tracker:
            self.tracker.write(rows[:-1] if drawing else rows)
        if preview and drawing:
            try:
                if self.accelerator.is_main_process or self.shards:
                    rows = self._seen(step, rows, preview(self.bare, step) or {})
                self.accelerator.wait_for_everyone()
            finally:
                if self.tracker:
                    self.tracker.write(rows[-1:])
        if keep and keeping and (self.accelerator.is_main_process or self.shards):
            with self.fitted.whole():
                for name in keeping if self.accelerator.is_main_process else ():
                    keep(name, step, self.figures)
        self.rows = []
        self.module.train()
        self.window += time.perf_counter() - began  # not the steps' time

    def _seen(
        self, step: int, rows: list[dict[str, Any]], figures: Mapping[str, float]
    ) -> list[dict[str, Any]]:
        """The rows with what previews came to in the last one."""
        if not figures:
            return rows
        self.figures.update(figures)
        rows = rows or [{"step": step}]
        rows[-1].update(figures)
        self._say(f"step {step}  " + "  ".join(f"{name} {value:.4f}" for name, value in figures.items()))
        return rows

    def _enough(self, step: int) -> bool:
        """Whether too many evaluations in a row were no better; of a resumed run as if it had gone on."""
        return ends_early(
            step,
            self.figures.get("best_step", 0),
            patience=self.hooks.patience if self.hooks.evaluate else None,
            every=self.settings.validate_every,
        )

    def _is_best(self, step: int, values: Mapping[str, float]) -> bool:
        """Whether no step before was judged better; the untrained model does not count."""
        if self.figures.get("best_step") == step:  # looked at again, since something failed
            return True
        return values.get(CHOSEN_BY, math.nan) < self.figures.get("best_val_loss", math.inf)

    def _save(self, step: int, *, alone: bool = False) -> None:
        """Write a checkpoint on the main process, while the others wait, unless it is left `alone`."""
        began = time.perf_counter()
        main = self.accelerator.is_main_process
        kept = self._kept() if self.checkpoints and (main or self.shards) else None
        if self.checkpoints and kept and main:
            if self.tracker:
                self.tracker.sync()
            scaler = self.accelerator.scaler
            state = {
                "step": step,
                "seconds": self._seconds(),
                "metrics": self.figures,
                "recent": list(self.recent),
                "scaler": scaler.state_dict() if scaler else None,
                **({"waiting": self.rows} if self.rows else {}),
            }
            with self.progress.phase("saving a checkpoint"):
                trainable, optimizer, task = kept
                self.checkpoints.save(trainable, optimizer, state, task=task)
        if not alone:
            self.accelerator.wait_for_everyone()
        self.window += time.perf_counter() - began

    def _kept(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any], Mapping[str, Tensor]]:
        """What is trained, the optimizer's state and the task's; of parts, the whole on the main process."""
        trainable: Mapping[str, Tensor] = self.parameters
        optimizer, task = self.optimizer.state_dict(), self.task.state()
        if self.shards and self.shards.learns:
            trainable = self.shards.gathered(trainable)
            optimizer = self.shards.gathered_state(optimizer, self.names)
            task = self.shards.gathered(task)
        return trainable, optimizer, task

    def _mean(self) -> float:
        return sum(self.recent) / len(self.recent)

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.begun


def ends_early(step: int, best_step: float, *, patience: int | None, every: int | None) -> bool:
    """Whether a training ends at a step since none of the last `patience` evaluations was the best.

    A function of what a checkpoint holds, so that a run which was interrupted ends where it would have.

    Args:
        step: that was made.
        best_step: of the lowest value so far; 0 where there is none.
        patience: evaluations; None never ends.
        every: steps from one evaluation to the next; None where there are none.
    """
    if not patience or not every or step % every:
        return False
    return step - best_step >= patience * every


def no_better(best_step: int) -> str:
    """Why it ended."""
    return f"no lower {CHOSEN_BY} since step {best_step}" if best_step else f"no {CHOSEN_BY} is a number"


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


def _in_order(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> tuple[str, ...]:
    """Names of what an optimizer updates, as its state numbers them."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return tuple(names[id(p)] for group in optimizer.param_groups for p in group["params"])


def _check(saved: Saved, fitted: Fitted, max_steps: int) -> None:
    """Refuse a checkpoint that is not of this training."""
    parameters = fitted.parameters
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
    shapes = fitted.shards.shapes if fitted.shards else {}
    for name, parameter in parameters.items():
        shape = shapes.get(name, parameter.shape)
        if saved.trainable[name].shape != shape:
            was, now = (" x ".join(map(str, sizes)) for sizes in (saved.trainable[name].shape, shape))
            raise ResumeError(
                f"the checkpoint has {was} values of {name}, and this run {now}",
                hint="give the run another name (name=...)",
            )


def _restore(
    saved: Saved,
    fitted: Fitted,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    names: Sequence[str],
) -> None:
    """Put a checkpoint back; of what is split, this process's part."""
    shards = fitted.shards
    try:
        optimizer.load_state_dict(shards.cut_state(saved.optimizer, names) if shards else saved.optimizer)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ResumeError(
            f"the optimizer's state in the checkpoint is damaged, or another optimizer's ({error})",
            hint="remove the checkpoint to continue from the one before it",
        ) from error
    with torch.no_grad():
        trainable = shards.cut(saved.trainable) if shards else saved.trainable
        for name, parameter in fitted.parameters.items():
            parameter.copy_(trainable[name])
    if accelerator.scaler and saved.state["scaler"]:
        accelerator.scaler.load_state_dict(saved.state["scaler"])
