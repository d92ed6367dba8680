"""What stands around the loop in a training recipe: the accelerator, the run folder, and the result."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tunekit import hardware, optimizers
from tunekit.adapters import save_adapter
from tunekit.artifacts import Artifact, Metric, RunFolder, Step, atomic_folder, clean_leftovers, write_text
from tunekit.config import DataConfig, DreamboothData, MemoryConfig, TrainConfig, TrainingRunConfig, dump_yaml
from tunekit.errors import ConfigError, DeviceError
from tunekit.families.family import Family, Pipeline
from tunekit.memory.levers import apply_levers
from tunekit.training.checkpoint import Checkpoints, compare_identities, only_writer
from tunekit.training.loop import Result
from tunekit.training.tracking import Tracker

if TYPE_CHECKING:
    from accelerate import Accelerator


def open_accelerator(memory: MemoryConfig, batch_size: int) -> Accelerator:
    """Make the accelerator for `memory.device` and `memory.precision`.

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
    mixed = "no" if memory.precision == "fp32" else memory.precision
    accelerator = Accelerator(cpu=device.kind == "cpu", mixed_precision=mixed)
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


def prepare_denoiser(
    denoiser: nn.Module, memory: MemoryConfig, *, frozen: bool, device: torch.device
) -> nn.Module:
    """Put the denoiser on the device with the memory levers applied.

    Args:
        frozen: it will carry an adapter, so its own weights may be kept in `memory.precision`; weights that
            are trained stay float32.
    """
    apply_levers(denoiser, memory.precision, memory.gradient_checkpointing, frozen=frozen)
    return denoiser.to(device)


def build_optimizer(
    train: TrainConfig, parameters: Sequence[nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """Make the optimizer of a `train:` section."""
    return optimizers.build(
        train.optimizer,
        parameters,
        lr=train.lr,
        betas=train.betas,
        eps=train.eps,
        weight_decay=train.weight_decay,
        device=str(device),
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: its folder, its processes, and where its lines go."""

    folder: RunFolder
    accelerator: Accelerator
    main: bool
    """Whether this is the process that writes."""

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

    def begin(self, config: TrainingRunConfig, identity: Mapping[str, Any]) -> bool:
        """Whether there is something to train; writes config.yaml once it is known to fit what is there.

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
        if details and int(details["step"]) >= config.train.max_steps:
            self.say(f"training is finished ({details['step']} steps): {trained}")
            return False
        return True

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
        with atomic_folder(final) as folder:
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
        self.say(f"saved {final}")


def load_base(config: TrainingRunConfig, family: Family) -> Pipeline:
    """Load the base model in float32; what may be narrower is narrowed later (`prepare_denoiser`)."""
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
    accelerator = open_accelerator(config.memory, config.train.batch_size)
    run = Run(RunFolder(config.run_dir), accelerator, accelerator.is_main_process)
    if not run.main:
        accelerator.wait_for_everyone()
        yield run
        return
    with only_writer(run.folder.path, run.say):
        clean_leftovers(run.folder.path)
        accelerator.wait_for_everyone()
        yield run
