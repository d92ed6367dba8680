"""What is trained, apart from how it is made to fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from tunekit import optimizers
from tunekit.config import (
    AdapterConfig,
    DataConfig,
    DreamboothData,
    ObjectiveConfig,
    SamplingConfig,
    TrainingRunConfig,
)
from tunekit.diffusion.batch import Batch
from tunekit.diffusion.judges import Judges
from tunekit.diffusion.objectives import Objective, configured
from tunekit.families import sizes_of
from tunekit.families.family import DTYPES, Conditioning
from tunekit.families.sizes import Sizes
from tunekit.memory.levers import Fitted, autocast_of, held_in
from tunekit.memory.stored import Stored, stored
from tunekit.tasks import Denoising, Task

WEIGHTS, ADAPTER, GRADIENTS, STATE = "base weights", "adapter", "gradients", "optimizer state"
MASTERS = "adapter in float32"
"""What the optimizer updates, where the adapter itself is in 16 bits."""
VAE, ENCODERS = "VAE", "text encoders"
TRAINED = "weights"
"""All weights, where they are trained themselves."""
VISITORS = "visiting weights"
"""Copies of weights that stay in host memory."""
GATHERED = "gathered weights"
"""Weights of a block that is split, while it runs, and gradients on their way to the processes."""
BUCKETS = "gradients to be sent"
"""DDP's second copy of the gradients of all that is trained."""
TEACHER, KEPT = "teacher", "kept by the task"
"""Networks that a task has beside the one that is trained, and the tensors that it remembers."""
STAYS = (WEIGHTS, ADAPTER, MASTERS, TRAINED, STATE, VAE, TEACHER, KEPT, BUCKETS)
"""What is there between two steps."""

MakeTask = Callable[[Fitted], Task]


@dataclass(frozen=True)
class Job:
    """What is trained, apart from how it is made to fit.

    Attributes:
        sizes: of the base.
        adapter: None trains all weights.
        optimizer: a row of `optimizers`.
        precision: "fp32", "bf16" or "fp16" arithmetic.
        size: (height, width) of the largest bucket in pixels.
        max_grad_norm: whether gradients are clipped.
        mixed: whether the samples of a step may be of several shapes.
        objective: what is learned.
        preview: (height, width) of previews in pixels; None without.
        guided: whether previews use guidance, which doubles their rows.
        class_pictures: (height, width) of pictures that the base draws before training; None without.
        make_task: another task than `Denoising`, made of the denoiser as it is trained. What it has beside
            that is seen by the trace: modules among its attributes, and the tensors of its `state()`.
        task: name of that task, which tells it from others where traces are kept.
        stored: network -> how it lies on disk; those that are not in it are made, in float32.
        judge_bytes: of the network on the host that scores previews, for as long as it does.
        processes: that train together, and share what is split (`Levers.sharding`).
    """

    sizes: Sizes
    adapter: AdapterConfig | None
    optimizer: str = "adamw"
    precision: str = "fp32"
    size: tuple[int, int] = (512, 512)
    max_grad_norm: float | None = 1.0
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    preview: tuple[int, int] | None = None
    guided: bool = True
    class_pictures: tuple[int, int] | None = None
    mixed: bool = False
    make_task: MakeTask | None = field(default=None, compare=False)
    task: str = "denoising"
    stored: Mapping[str, Stored] = field(default_factory=dict)
    judge_bytes: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        if (self.make_task is None) != (self.task == "denoising"):
            raise ValueError("a task of another kind needs a name of its own")

    @property
    def autocast(self) -> torch.dtype | None:
        """What the denoiser's arithmetic is lowered to, operator by operator."""
        name = autocast_of(self.precision, self.adapter)
        return None if name == "no" else DTYPES[name]

    @property
    def held(self) -> torch.dtype:
        """Of the denoiser's frozen weights."""
        return held_in(self.adapter, self.precision)

    @property
    def packs(self) -> bool:
        """Whether a packed base is packed while it is read; else it is when it is fitted."""
        known = self.stored.get(self.sizes.denoiser.name)
        return known is not None and known.packs

    def learned(self) -> Objective:
        """The objective, as the base's scheduler and the `objective:` section have it.

        Raises:
            ConfigError, ModelError: see `Family.objective`.
        """
        pipeline = self.sizes.pipeline()
        pipeline.scheduler = configured(pipeline.scheduler, self.objective)
        return self.sizes.family.objective(pipeline, self.objective)

    def task_of(self, fitted: Fitted) -> Task:
        """What a step computes."""
        if self.make_task is not None:
            return self.make_task(fitted)
        return Denoising(fitted, self.sizes.family, self.learned())

    def batch(self, count: int) -> Batch:
        """A micro-batch of as many of the largest samples, without data."""
        latents = self.sizes.latents(count, *self.size)
        rows = {
            "latents": latents,
            "noise": torch.empty_like(latents),
            "timesteps": latents.new_empty(count),
            "weight": latents.new_empty(count),
            "frame": latents.new_empty(count, 6),
        }
        return Batch(tuple(str(index) for index in range(count)), rows, self.sizes.encoded(count))

    def told(self, rows: int) -> Conditioning:
        """What the denoiser is told while pictures are drawn, without data."""
        frame = torch.empty(rows, 6, device="meta")
        guidance = 7.5 if self.guided else 1.0
        return self.sizes.family.conditioning(self.sizes.encoded(rows), frame, guidance)

    def described(self) -> list[Any]:
        """Everything that can change a trace, JSON-able."""
        parts = [[part.classes, dict(part.config), part.dtype, part.tokens] for part in self.sizes.components]
        own = [self.optimizer, self.precision, self.size, self.max_grad_norm]
        own += [self.preview, self.guided, self.class_pictures, self.task]
        own += [self.processes] if self.processes > 1 else []
        return [
            self.sizes.family.name,
            parts,
            list(self.sizes.family.facts.lora_targets),
            {name: list(paths) for name, paths in self.sizes.family.facts.presets.items()},
            self.adapter.model_dump(mode="json") if self.adapter else None,
            self.objective.model_dump(mode="json"),
            {name: asdict(known) for name, known in self.stored.items()},
            own,
        ]


def job_of(config: TrainingRunConfig, data: DataConfig | DreamboothData, precision: str) -> Job:
    """The job of a training config.

    Args:
        data: the recipe's own section.
        precision: of its arithmetic, where the config leaves that to the device.

    Raises:
        ConfigError, ModelError: see `families.sizes_of`.
    """
    sizes = sizes_of(config.model.family, config.model.opened)
    multiple = sizes.family.resolution_multiple(sizes.configs)
    side = data.resolution // multiple * multiple or multiple  # as `bucket_for` has it
    usual = SamplingConfig(height=data.resolution, width=data.resolution)
    sampling = config.preview.sampling.over(usual).over(sizes.family.facts.sampling)
    assert sampling.height is not None
    assert sampling.width is not None
    drawn = (data.resolution, data.resolution)
    return Job(
        sizes,
        config.adapter,
        optimizers.find(config.train.optimizer).name,
        precision,
        (side, side),
        config.train.max_grad_norm,
        config.objective,
        (sampling.height, sampling.width) if config.preview.prompts else None,
        sizes.family.cfg_scale(sizes.configs, sampling.guidance or 0.0) is not None,
        drawn if getattr(data, "class_prompt", None) else None,
        mixed=getattr(data, "buckets", False),
        stored=stored(sizes, config.model.opened),
        judge_bytes=Judges.of_previews(config.preview.clip_model).clip_bytes,
    )


def bytes_of(*tensors: Tensor) -> int:
    """What their elements take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
