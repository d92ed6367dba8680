"""What stands around the loop in a training recipe: the accelerator, the run folder, and the result."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tunekit import hardware, optimizers
from tunekit.adapters import save_adapter
from tunekit.artifacts import (
    Artifact,
    Metric,
    RunFolder,
    Step,
    atomic_folder,
    clean_leftovers,
    write_json,
    write_text,
)
from tunekit.config import (
    AdapterConfig,
    DataConfig,
    DreamboothData,
    MemoryConfig,
    TrainConfig,
    TrainingRunConfig,
    dump_yaml,
)
from tunekit.errors import ConfigError, DeviceError, OutOfMemory
from tunekit.families.family import Family, Pipeline
from tunekit.memory.levers import Fitted, Levers, autocast_of, fit, step_in_backward
from tunekit.memory.measure import Meter
from tunekit.memory.picture import draw
from tunekit.memory.plan import Plan
from tunekit.training.checkpoint import Checkpoints, compare_identities, only_writer
from tunekit.training.loop import Result
from tunekit.training.tracking import Tracker
from tunekit.units import format_bytes

if TYPE_CHECKING:
    from accelerate import Accelerator


def open_accelerator(
    memory: MemoryConfig, batch_size: int, adapter: AdapterConfig | None = None
) -> Accelerator:
    """Make the accelerator for `memory.device` and `memory.precision`.

    Args:
        adapter: what is trained, which decides whether autocast is needed (`levers.autocast_of`).

    Raises:
        DeviceError: the device is not there, or cannot compute in that precision.
        ConfigError: there are more processes than samples per step.
    """
    from accelerate import Accelerator

    device = hardware.probe(memory.device)
    on_gpu = device.torch_device.startswith(("cuda", "xpu"))
    if memory.precision == "fp16" and not on_gpu:
        raise DeviceError(
            f"memory.precision=fp16 needs a GPU, and this run is on {device.torch_device}",
            hint="use memory.precision=bf16, which has the range of fp32, or fp32",
        )
    if device.torch_device.startswith("cuda"):
        torch.cuda.set_device(device.index)
    mixed = autocast_of(memory.precision, adapter)
    accelerator = Accelerator(cpu=device.kind == "cpu", mixed_precision=mixed)
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
    accelerator.end_training()
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)


def fit_denoiser(
    config: TrainingRunConfig, family: Family, pipeline: Pipeline, device: torch.device
) -> Fitted:
    """Put the denoiser on the device as it is trained, with its adapter and the memory levers.

    Raises:
        ConfigError, AdapterError, MissingPackageError: see `levers.fit`.
    """
    return fit(
        family.denoiser(pipeline),
        config.adapter,
        family.lora_targets,
        Levers.of(config.memory),
        device=device,
        seed=config.seed,
    )


def build_optimizer(
    train: TrainConfig, parameters: Iterable[nn.Parameter], device: torch.device, *, in_backward: bool = False
) -> torch.optim.Optimizer:
    """Make the optimizer of a `train:` section.

    Args:
        in_backward: see `levers.step_in_backward`.
    """
    optimizer = optimizers.build(
        train.optimizer,
        parameters,
        lr=train.lr,
        betas=train.betas,
        eps=train.eps,
        weight_decay=train.weight_decay,
        device=str(device),
        per_parameter=in_backward,
    )
    if in_backward:
        step_in_backward(optimizer)
    return optimizer


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: its folder, its processes, and where its lines go."""

    folder: RunFolder
    accelerator: Accelerator
    main: bool
    """Whether this is the process that writes."""
    meter: Meter
    """Measures what was planned, phase by phase."""

    def say(self, line: str) -> None:
        """Print on the main process."""
        if self.main:
            print(line, flush=True)

    def cache(self, data: DataConfig | DreamboothData) -> Path:
        """Where encoded pictures are kept: by default beside the run folders, shared by all runs."""
        return Path(data.cache).expanduser() if data.cache is not None else self.folder.path.parent / ".cache"

    def checkpoints(self, identity: Mapping[str, Any], train: TrainConfig) -> Checkpoints:
        """The run's checkpoints."""
        return Checkpoints(self.folder.checkpoints, identity, train.keep_checkpoints)

    def tracker(self, train: TrainConfig) -> Tracker:
        """The run's metrics.jsonl and, if asked for, TensorBoard."""
        events = self.folder.path / "tensorboard" if "tensorboard" in train.trackers else None
        return Tracker(self.folder.metrics, tensorboard=events)

    def watch(
        self, pipeline: Pipeline, fitted: Fitted | None = None, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Tell the meter what is in memory from now on."""
        self.meter.there = partial(_in_memory, pipeline, fitted, optimizer)

    def begin(self, config: TrainingRunConfig, identity: Mapping[str, Any], plan: Plan | None = None) -> bool:
        """Whether there is something to train; writes config.yaml and plan.json once they fit what is there.

        Args:
            config: as it was given.
            identity: of what is learned, see `checkpoint.identity`.
            plan: None where nothing was planned.

        Raises:
            ResumeError: what is there was made by another configuration; names the keys.
        """
        trained = self.folder.trained()
        details = Artifact.load(trained).lineage[-1].details if trained else None
        if trained and details:
            compare_identities(details["identity"], identity, trained)
        self.checkpoints(identity, config.train).check()
        self.accelerator.wait_for_everyone()
        if self.main:
            write_text(self.folder.config, dump_yaml(config))
            if plan is not None:
                self._write_plan(plan)
        if details and int(details["step"]) >= config.train.max_steps:
            self.say(f"training is finished ({details['step']} steps): {trained}")
            return False
        return True

    def _write_plan(self, plan: Plan) -> None:
        self.meter.active = True
        file = self.folder.path / "plan.json"
        content = plan.as_json()
        if file.is_file():  # what went wrong in this run's earlier lives stays known
            before = json.loads(file.read_text(encoding="utf-8"))
            content |= {key: before[key] for key in ("ran_out",) if key in before}
        write_json(file, content)
        write_text(self.folder.path / "plan.svg", draw(plan))
        self.say(
            f"plan: {plan.words}; needs {format_bytes(plan.device_bytes)} of"
            f" {format_bytes(plan.budget_bytes)} (most in the phase {plan.peak_phase}),"
            f" step time x{plan.relative_step_time:.2f}"
        )
        if plan.approximates:
            self.say(f"plan: {' and '.join(plan.approximates)}: changes a little what is learned")

    def close(self) -> Artifact | None:
        """Leave accelerate; the main process gets what was trained and goes on as an ordinary single one.

        Returns:
            The trained artifact on the main process, None on the others.
        """
        close_accelerator(self.accelerator)
        trained = self.folder.trained()
        return Artifact.load(trained) if self.main and trained else None

    def save(
        self,
        config: TrainingRunConfig,
        family: Family,
        pipeline: Pipeline,
        result: Result,
        identity: Mapping[str, Any],
        parameters: int,
    ) -> None:
        """Write the trained adapter to `adapter/`, or the whole pipeline to `model/`, with its artifact.json.

        Args:
            config: of the run.
            pipeline: whose denoiser was trained; its encoders may have left memory.
            parameters: how many numbers were trained.

        Raises:
            OutputError: nothing half-written is left.
        """
        if not self.main:
            return
        final = self.folder.adapter if config.adapter else self.folder.model
        metrics: dict[str, Metric] = {
            "steps": result.step,
            "loss": result.loss,
            **result.metrics,
            "parameters": parameters,
            "samples_per_second": round(result.step * config.train.batch_size / max(result.seconds, 1e-9), 3),
        }
        step = Step(
            kind="train",
            artifact=final.name,
            settings=json.loads(config.model_dump_json(exclude={"optimize", "runs"})),
            seconds=round(result.seconds, 3),
            metrics=metrics,
            details={"identity": dict(identity), "step": result.step},
        )
        with self.meter.phase("save"), atomic_folder(final) as folder:
            denoiser = family.denoiser(pipeline)
            if config.adapter:
                save_adapter(
                    folder,
                    denoiser,
                    family,
                    config.adapter,
                    name=config.name,
                    base_source=config.model.source,
                    title=config.name,
                )
            else:
                whole = load_base(config, family)
                setattr(whole, family.facts.denoiser_name, denoiser.to("cpu", torch.float32))
                family.save(whole, folder)
            Artifact(
                path=folder,
                model_path=folder,
                format="adapter" if config.adapter else "torch",
                family=family.name,
                source=str(folder),
                lineage=(step,),
                base=config.model.source if config.adapter else None,
            ).write()
        if self.meter.active:
            self.meter.write(self.folder.path / "plan.json")
        self.say(f"saved {final}")


def _in_memory(
    pipeline: Pipeline, fitted: Fitted | None, optimizer: torch.optim.Optimizer | None
) -> Iterator[torch.Tensor]:
    host = {id(tensor) for tensor in fitted.host.tensors} if fitted and fitted.host else set()
    for module in pipeline.components.values():
        if isinstance(module, nn.Module):
            yield from (t for t in (*module.parameters(), *module.buffers()) if id(t) not in host)
    if fitted:
        yield from fitted.parameters.values()
    for state in optimizer.state.values() if optimizer else ():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def load_base(config: TrainingRunConfig, family: Family) -> Pipeline:
    """Load the base model in float32; what may be narrower is narrowed later (`fit_denoiser`)."""
    model = config.model
    return family.load(
        model.source, revision=model.revision, variant=model.variant, allow_pickle=model.allow_pickle
    )


@contextmanager
def open_run(config: TrainingRunConfig) -> Iterator[Run]:
    """Make the accelerator and hold the run folder for as long as the run lives.

    Raises:
        DeviceError, ConfigError: see `open_accelerator`.
        ArtifactError: another process is writing to this run.
        OutputError: the folder cannot be written.
    """
    accelerator = open_accelerator(config.memory, config.train.batch_size, config.adapter)
    meter = Meter(accelerator.device, active=False)
    run = Run(RunFolder(config.run_dir), accelerator, accelerator.is_main_process, meter)
    if not run.main:
        accelerator.wait_for_everyone()
        yield run
        return
    with only_writer(run.folder.path, run.say):
        clean_leftovers(run.folder.path)
        accelerator.wait_for_everyone()
        try:
            yield run
        except OutOfMemory as error:
            if error.replan:  # in this process, with another accelerator
                close_accelerator(accelerator)
            raise
