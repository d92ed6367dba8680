"""What a model sees: examples to learn from or to be judged on, and the calls of its denoiser while it draws.

Examples are the run's own pictures or, where there are none, pictures that the model draws itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from tunekit.config import DataConfig, DreamboothData, SamplingConfig
from tunekit.data.cache import CachedDataset, Draws, Encoder, is_whole, save_tensors, together
from tunekit.data.images import Sample, scan_data
from tunekit.diffusion.batch import Batch
from tunekit.diffusion.noise import stable_seed
from tunekit.diffusion.objectives import Objective
from tunekit.diffusion.sampling import Guided, initial_latents, sample
from tunekit.errors import ConfigError
from tunekit.families.family import Conditioning, Family, Frame, Pipeline

if TYPE_CHECKING:
    from accelerate import Accelerator

UNCONDITIONAL = 0.2
"""Share of examples with the empty caption: with guidance, half of all calls of a denoiser have none."""
DRAWING_STEPS = 20
DRAWN_TOGETHER = 4
VERSION = 1
"""Of files of calls; to be raised when what is in them changes its meaning."""

Call = tuple[Tensor, Tensor, Conditioning]
"""What a denoiser is given: latents [B, C, h, w], timesteps [B] and conditioning."""


@dataclass(frozen=True)
class CalibrationSet:
    """Latents with captions, and how noise is added to them."""

    dataset: CachedDataset
    objective: Objective
    origin: str
    """For people: "24 pictures of photos/", "16 pictures drawn by the model"."""
    seed: int

    def batches(self, count: int, size: int, *, purpose: str) -> Iterator[Batch]:
        """`count` examples, `size` at a time, their timesteps spread evenly over the whole range.

        Args:
            purpose: examples of different purposes differ in noise, so what one has seen tests another.
        """
        seed = stable_seed(self.seed, purpose)
        draws = Draws(caption_dropout=UNCONDITIONAL)
        for start in range(0, count, size):
            rows = []
            for index in range(start, min(start + size, count)):
                row = self.dataset.batch(
                    index % len(self.dataset),
                    seed=seed,
                    epoch=index // len(self.dataset),
                    objective=self.objective,
                    draws=draws,
                )
                # Evenly, yet scattered: 0.618... visits the range without any order that pictures could
                # share.
                level = self.objective.level((index + 0.5) * 0.6180339887 % 1)
                rows.append(row.with_rows(timesteps=torch.tensor([level])))
            yield from together(rows, size)


@dataclass(frozen=True)
class Material:
    """What a calibration set, or the calls of a denoiser, may be made of.

    Attributes:
        data: pictures; None lets the model draw `count` of them from `prompts`.
        prompts: what to draw.
        count: how many pictures to draw, or calls to record.
        sampling: how they are drawn; nothing of it is None but the scheduler. Pictures are drawn in
            `DRAWING_STEPS`.
        cache: folder for what is encoded or drawn; it is shared, as the names say what went in.
        model_hash: hash of the model's files, part of the names of drawn pictures.
        seed: of noise, crops and drawn pictures.
        others: of calls: those of other prompts, as far as there are more, and of other noise than those that
            the same without it gives.
    """

    data: DataConfig | DreamboothData | None
    prompts: tuple[str, ...]
    count: int
    sampling: SamplingConfig
    cache: Path
    model_hash: str
    seed: int
    others: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of pictures, in pixels."""
        height, width = self.sampling.height, self.sampling.width
        if height is None or width is None:
            raise TypeError("the height and the width of pictures must be known")
        return height, width


def gather(
    family: Family,
    pipeline: Pipeline,
    accelerator: Accelerator,
    material: Material,
    say: Callable[[str], None],
) -> CalibrationSet:
    """Collect examples for the model in `pipeline`.

    Args:
        accelerator: the pipeline's parts are moved to its device.

    Raises:
        ConfigError: neither pictures nor prompts are known.
        DataError: see `scan_data`.
    """
    objective = family.objective(pipeline)
    encoder = Encoder(family, pipeline, cache=material.cache, accelerator=accelerator, say=say)
    data, prompts = material.data, material.prompts
    if data is not None:
        scan = scan_data(data)
        scan.check()
        dataset = encoder.dataset(scan.samples, data, seed=material.seed)
        return CalibrationSet(dataset, objective, f"{len(dataset)} pictures of {data.path}", material.seed)
    if not prompts:
        raise ConfigError(
            "this pass learns from pictures, and knows neither pictures nor prompts to draw some",
            hint="give the run `data: {path: ...}`, or `preview: {prompts: [...]}`",
        )
    captions = encoder.prompts(["", *prompts])
    encoded = encoder.conditioning(["", *prompts])
    samples, files, frame = _drawn(family, pipeline, encoded, material, accelerator.device, say)
    frames = [[frame]] * len(samples)
    dataset = CachedDataset(samples, frames, files, captions, load=encoder.stores.load)
    return CalibrationSet(dataset, objective, f"{material.count} pictures drawn by the model", material.seed)


class Drawer(Protocol):
    """What draws, whatever runs it; `tunekit.runtime.Runtime` is one."""

    family: Family

    @property
    def scheduler(self) -> Any:
        """The sampler that the model is configured with."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """[C, h, w] of one picture."""
        ...

    def conditioning(self, prompts: list[str], sampling: SamplingConfig) -> Conditioning:
        """What the denoiser is told for these prompts."""
        ...

    def guided(self, prompts: int, sampling: SamplingConfig) -> Guided | None:
        """Classifier-free guidance for as many prompts."""
        ...

    def denoise(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the denoiser."""
        ...


def calls(model: Drawer, material: Material) -> list[Call]:
    """What the denoiser is called with while the model draws the run's prompts and captions.

    Pictures are drawn, `DRAWN_TOGETHER` at a time, until there are `material.count` calls; of all that were
    made so many are taken evenly, so that every timestep occurs, and with guidance both halves do. They are
    kept in the cache, named after the model's hash and all else that they depend on.
    """
    sampling, seed, texts = material.sampling, material.seed, _texts(material)
    way = sampling.model_dump(mode="json", exclude={"cache"})  # every call here runs the whole
    if material.others:  # the last prompts first, which are drawn last or not at all
        texts, seed = texts[::-1], stable_seed(seed, "others") % 2**31
    described = [VERSION, material.model_hash, material.count, seed, texts, way]
    name = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]
    file = material.cache / "calls" / f"{name}.safetensors"
    if is_whole(file):
        return _read_calls(file, material.count)
    shape = model.latent_shape(*material.size)
    recorded: list[Call] = []

    def denoise(rows: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        recorded.append((rows, times, conditioning))
        return model.denoise(rows, times, conditioning)

    drawn = 0
    while len(recorded) < material.count:
        prompts = [texts[(drawn + index) % len(texts)] for index in range(DRAWN_TOGETHER)]
        seeds = [seed + drawn + index for index in range(DRAWN_TOGETHER)]
        sample(
            denoise,
            model.scheduler,
            initial_latents(seeds, shape),
            model.conditioning(prompts, sampling),
            model.guided(DRAWN_TOGETHER, sampling),
            sampling,
            begin=model.family.begin,
            seeds=seeds,
        )
        drawn += DRAWN_TOGETHER
    taken = [recorded[index * len(recorded) // material.count] for index in range(material.count)]
    tensors: dict[str, Tensor] = {}
    for number, (latents, times, conditioning) in enumerate(taken):
        tensors |= {f"{number}.latents": latents, f"{number}.times": times}
        tensors |= {f"{number}.told.{key}": value for key, value in conditioning.items()}
    save_tensors(file, {key: value.clone() for key, value in tensors.items()})  # rows may share their memory
    return taken


def _read_calls(file: Path, count: int) -> list[Call]:
    tensors = load_file(file)
    told: list[Conditioning] = [{} for _ in range(count)]
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        if name.startswith("told."):
            told[int(number)][name.removeprefix("told.")] = value
    return [
        (tensors[f"{number}.latents"], tensors[f"{number}.times"], told[number]) for number in range(count)
    ]


_CAPTIONS = 100_000
"""Of more pictures than that the first captions will do."""


def _texts(material: Material) -> list[str]:
    """What the model is used for: the run's prompts, then the captions it was trained on."""
    texts = list(material.prompts)
    if material.data is not None:
        texts += [sample.caption for sample in scan_data(material.data).samples[:_CAPTIONS]]
    return list(dict.fromkeys(texts)) or [""]


def _drawn(
    family: Family,
    pipeline: Pipeline,
    encoded: dict[str, Conditioning],
    material: Material,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[list[Sample], list[list[Path]], Frame]:
    """Sample latents with the pipeline's denoiser; those already in the cache are not drawn again."""
    height, width = material.size
    count, seed = material.count, material.seed
    prompts = [material.prompts[index % len(material.prompts)] for index in range(count)]
    shape, frame = family.latent_shape(pipeline, height, width), Frame.whole(height, width)
    guidance = material.sampling.guidance
    assert guidance is not None
    settings = f"{material.model_hash} {shape} {guidance} {DRAWING_STEPS}"
    if material.sampling.scheduler:
        settings += f" {json.dumps(material.sampling.scheduler, sort_keys=True)}"
    interval = material.sampling.guidance_interval
    if interval:
        settings += f" {interval}"
    files = [
        material.cache
        / "drawn"
        / f"{hashlib.sha256(f'{settings} {seed + i} {prompt}'.encode()).hexdigest()[:32]}.safetensors"
        for i, prompt in enumerate(prompts)
    ]
    missing = [index for index, path in enumerate(files) if not is_whole(path)]
    denoiser = family.denoiser(pipeline).to(device)
    if missing:
        say(f"drawing {len(missing)} pictures to learn from")

    def conditioning(names: list[str]) -> Conditioning:
        rows = [encoded[name] for name in names]
        joined = {key: torch.stack([row[key] for row in rows]).to(device) for key in rows[0]}
        return family.conditioning(joined, frame.rows(len(names)).to(device), guidance)

    scale = family.cfg_scale(pipeline, guidance)
    for start in range(0, len(missing), DRAWN_TOGETHER):
        part = missing[start : start + DRAWN_TOGETHER]
        latents = sample(
            lambda rows, times, known: family.denoise(denoiser, rows, times, known),
            pipeline.scheduler,
            initial_latents([seed + index for index in part], shape).to(device),
            conditioning([prompts[index] for index in part]),
            None if scale is None else Guided(conditioning([""] * len(part)), scale, interval),
            material.sampling.model_copy(update={"steps": DRAWING_STEPS}),
            begin=family.begin,
            seeds=[seed + index for index in part],
        )
        for index, row in zip(part, latents.float().cpu(), strict=True):
            save_tensors(files[index], {"moments": torch.cat([row, torch.zeros_like(row)])})
    samples = [
        Sample(f"drawn/{index}", prompt, width, height, files[index].stem, str(files[index]), bytes)
        for index, prompt in enumerate(prompts)
    ]
    return samples, [[path] for path in files], frame
