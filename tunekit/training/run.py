"""What a training is made on: the processes, the accelerator, and the optimizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from tunekit import families, hardware, optimizers, ranks
from tunekit.artifacts import open_artifact
from tunekit.config import AdapterConfig, MemoryConfig, SamplingConfig, TrainConfig, TrainingRunConfig
from tunekit.diffusion.objectives import scheduler_changes
from tunekit.errors import ConfigError, ResumeError, TunekitError
from tunekit.memory.levers import Fitted, autocast_of, step_in_backward
from tunekit.training.checkpoint import Checkpoints, Saved

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of a run, before there is an accelerator; they may be on several machines.

    Attributes:
        rank: of this one.
        count: of all.
        local: on this machine.
    """

    rank: int = 0
    count: int = 1
    local: int = 1

    @classmethod
    def of(cls, device: str) -> Processes:
        """Those that the launcher has started; they know each other from here on.

        Args:
            device: that was asked for, which decides how they talk.

        Raises:
            DeviceError: it is not there.
        """
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        from accelerate import PartialState

        place = hardware.probe(device)
        if place.torch_device.startswith("cuda"):
            torch.cuda.set_device(place.index)
        state = PartialState(cpu=place.kind == "cpu")
        return cls(state.process_index, count, int(os.environ.get("LOCAL_WORLD_SIZE", count)))

    def gather(self, value: T) -> list[T]:
        """The value of every process, in the order of their ranks, on all of them."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return list(gather_object([value]))

    def decide(self, make: Callable[[], T]) -> T:
        """What `make` gives on the first process, on all of them; an error of ours is raised on all.

        What it gives must be picklable.
        """
        if self.count == 1:
            return make()
        from accelerate.utils import broadcast_object_list

        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = make()
            except TunekitError as error:
                outcome[1] = error
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        made: T = outcome[0]
        return made


def on_main(accelerator: Accelerator, make: Callable[[], T]) -> T:
    """What `make` gives on the main process, on all of them; an error of ours is raised on all."""
    return Processes(accelerator.process_index, accelerator.num_processes).decide(make)


def load_everywhere(checkpoints: Checkpoints, accelerator: Accelerator) -> Saved | None:
    """The newest checkpoint, which the first process finds, on all of them; None if there is none.

    Those that see its folder read it there; where one does not, the first sends it to all.

    Raises:
        ResumeError: see `Checkpoints.load`; on all.
    """
    if accelerator.num_processes == 1:
        return checkpoints.load()

    def look() -> tuple[str, str] | None:
        checkpoints.check()
        path = checkpoints.newest()
        if path is not None:
            ranks.remember(path)
        return (path.name, (path / "state.json").read_text(encoding="utf-8")) if path else None

    found = on_main(accelerator, look)
    if found is None:
        return None
    name, state = found
    try:
        sees = (checkpoints.folder / name / "state.json").read_text(encoding="utf-8") == state
    except (OSError, UnicodeDecodeError):
        sees = False
    group = Processes(accelerator.process_index, accelerator.num_processes)
    from accelerate.utils import broadcast

    if all(group.gather(sees)):
        return checkpoints.load()
    tensors: list[Tensor] = []

    def outline() -> Saved:
        saved = checkpoints.load()
        if saved is None:
            raise ResumeError("the checkpoint has gone while it was read", where=str(checkpoints.folder))
        return _mapped(saved, lambda tensor: _outlined(tensor, tensors))

    outlined = on_main(accelerator, outline)
    own = iter(tensors)

    def sent(sketch: _Outline) -> Tensor:
        """One after another, so that the device holds one of them at a time."""
        value = next(own, None)
        if value is None:
            value = torch.empty(sketch.shape, dtype=sketch.dtype)
        on_device = value.to(accelerator.device)
        broadcast(on_device)
        return on_device.cpu()

    return _mapped(outlined, sent)


@dataclass(frozen=True)
class _Outline:
    """Stands for a tensor that is sent on its own."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _outlined(tensor: Tensor, tensors: list[Tensor]) -> _Outline:
    tensors.append(tensor)
    return _Outline(tuple(tensor.shape), tensor.dtype)


def _mapped(saved: Saved, change: Callable[[Any], Any]) -> Saved:
    """A checkpoint with each tensor, or what stands for it, changed; always in one order."""

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor | _Outline):
            return change(value)
        if isinstance(value, Mapping):
            return {key: walk(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(walk(item) for item in value)
        return value

    return replace(
        saved,
        trainable=walk(saved.trainable),
        optimizer=walk(saved.optimizer),
        task=walk(saved.task),
    )


def open_accelerator(
    memory: MemoryConfig, batch_size: int, adapter: AdapterConfig | None = None
) -> Accelerator:
    """Make the accelerator for `memory.device` and `memory.precision`.

    Args:
        adapter: what is trained, which decides whether autocast is needed (`levers.autocast_of`).

    Raises:
        DeviceError: the device is not there, or has not that precision, or not that of the base.
        ConfigError: there are more processes than samples per step.
    """
    from accelerate import Accelerator
    from accelerate.utils import AutocastKwargs

    device = hardware.probe(memory.device)
    for wrong in (
        hardware.without_precision(device, memory.precision),
        hardware.without_packing(device, memory.base_precision),
    ):
        if wrong is not None:
            raise wrong
    if device.torch_device.startswith("cuda"):
        torch.cuda.set_device(device.index)
    mixed = autocast_of(memory.precision, adapter)
    # Of weights that are gathered block by block, lowered copies shall not stay until the forward pass ends.
    handlers = [AutocastKwargs(cache_enabled=False)] if memory.sharding == "full" else []
    accelerator = Accelerator(cpu=device.kind == "cpu", mixed_precision=mixed, kwargs_handlers=handlers)
    if accelerator.num_processes > 1 and memory.optimizer_in_backward:
        raise ConfigError(
            f"memory.optimizer_in_backward works in one process, and there are {accelerator.num_processes}",
            hint="gradients of all processes are summed before an update; leave it out",
        )
    if accelerator.num_processes > batch_size:
        raise ConfigError(
            f"train.batch_size={batch_size} is too little for {accelerator.num_processes} processes",
            hint=f"set train.batch_size to {accelerator.num_processes} or more, or start fewer processes",
        )
    return accelerator


def close_accelerator(accelerator: Accelerator) -> None:
    """Leave accelerate, so that what runs after training is an ordinary single process."""
    from accelerate.state import AcceleratorState, GradientState

    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        ranks.part()
    accelerator.end_training()
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)


def sampling_of(config: TrainingRunConfig) -> SamplingConfig:
    """How a run's pictures are drawn: as it says, else as its base says, else as the family does."""
    data: Any = config.data  # type: ignore[attr-defined]  # each training recipe declares its own
    asked = config.preview.sampling.over(SamplingConfig(height=data.resolution, width=data.resolution))
    own = open_artifact(config.model.source, family=config.model.family).sampling
    usual = families.get(config.model.family).facts.sampling.over(SamplingConfig(negative_prompt=""))
    whole = asked.over(own).over(usual)
    scheduler = {**scheduler_changes(config.objective), **(whole.scheduler or {})}
    return whole.model_copy(update={"scheduler": scheduler or None})


def build_optimizer(
    train: TrainConfig, fitted: Fitted, device: torch.device, scales: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """Make the optimizer of a `train:` section, for what `fitted` trains.

    Args:
        scales: name of a parameter -> share of the learning rate for it; None is all of it for all.
    """
    in_backward = fitted.optimizer_in_backward
    optimizer = optimizers.build(
        train.optimizer,
        _grouped(fitted.parameters, scales) if scales else fitted.parameters.values(),
        lr=train.lr,
        betas=train.betas,
        eps=train.eps,
        weight_decay=train.weight_decay,
        device=str(device),
        per_parameter=in_backward,
    )
    if in_backward:
        step_in_backward(optimizer, fitted)
    return optimizer


def _grouped(parameters: Mapping[str, nn.Parameter], scales: Mapping[str, float]) -> list[dict[str, Any]]:
    """Groups of parameters for an optimizer, one for each rate."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(scales[name], []).append(parameter)
    return [{"params": found, "scale": scale} for scale, found in groups.items()]
