"""Is it still the same model? Components first, then the way from noise to latents, then the pictures.

Everything is compared with a reference, on the same inputs and seeds:

- each component, over several batch sizes, resolutions and timesteps: ||a - b|| / ||b||;
- the latents after every step of the sampler, each side going its own way, so that small errors may add up;
- the final pictures, before they are rounded to 8 bits: PSNR and SSIM.

Each side draws as it says itself (`Artifact.sampling`). A model of four steps and its parent of thirty have
no steps in common, so of them only the pictures are compared, each in all the steps that it takes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tunekit.artifacts import PICTURES
from tunekit.config import SamplingConfig, SamplingSteps
from tunekit.errors import ChainError, output_errors
from tunekit.passes.base import SAMPLING, Context, Distinct, Outcome, Pass, Start, formats
from tunekit.passes.likeness import Judged
from tunekit.passes.metrics import CLIP_DROP, LPIPS, PSNR, RELATIVE_ERROR, SSIM, Metric
from tunekit.passes.providers import Provider, cannot_run, everywhere, gpu_answers

if TYPE_CHECKING:
    from torch import Tensor

    from tunekit.artifacts import Artifact
    from tunekit.runtime import Runtime

PROMPTS = ("a red apple", "a smiling face", "a house", "a blue car")
"""Drawn where the run states none."""
STEPS = 20
"""Sampling steps at most where both sides take the same and none are asked for: more show nothing new."""
AT_ONCE = 4


class Verify(Judged, Pass):
    """Compares the model with its reference: components, trajectory and pictures."""

    kind: ClassVar[str] = "verify"
    lpips_key: ClassVar[str] = "max_lpips"
    clip_key: ClassVar[str] = "max_clip_drop"
    accepts: ClassVar[frozenset[str]] = frozenset({"torch", "onnx", "openvino", "tensorrt"})
    looks: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (RELATIVE_ERROR, PSNR, SSIM, LPIPS, CLIP_DROP)

    against: Literal["parent", "first"] = "parent"
    """parent: the model before the last step that changed it; first: the whole fine-tuned model, in torch."""
    providers: Distinct[Provider] | None = Field(None, min_length=1)
    """Runtimes an ONNX model is meant for; each is checked. null: the one `tunekit generate` takes here, and
    OpenVINO where it is installed: one file can have another quality on each."""
    pictures: int = Field(4, ge=1, le=64)
    """How many pictures are drawn; the run's prompts are taken in turn."""
    steps: SamplingSteps | None = None
    """Sampling steps of a picture, for both sides; null: each model's own, at most 20 if they are equal."""
    tiled: bool = False
    """Decode pictures in tiles, which takes less memory where they are larger than the model's own."""
    max_relative_error: float | None = Field(None, gt=0, le=1e6)
    """Largest relative error that a component may have; None: it is only reported."""
    min_psnr_db: float | None = Field(None, ge=0, le=200)
    """Lowest PSNR that a picture may have, in dB; None: it is only reported."""
    min_ssim: float | None = Field(None, ge=-1, le=1)
    """Lowest SSIM that a picture may have; None: it is only reported."""
    max_lpips: float | None = Field(None, gt=0, le=10)
    """Largest LPIPS (AlexNet) that a picture may have; None: it is not measured."""
    max_clip_drop: float | None = Field(None, gt=0, le=2)
    """Largest drop of the mean CLIP score, the cosine of picture and prompt; None: it is not measured."""

    def problem(self, format: str, earlier: Sequence[Pass]) -> str | None:
        """Refuses what could only fail after the passes before it have run."""
        if all(step.looks for step in earlier):
            return "has nothing to compare with; put it behind a pass that changes the model"
        if absent := self.judges.lack():
            return absent
        if self.providers and format != "onnx":
            return f"sets providers, which have no effect on a model in {format}: they run ONNX files"
        if format == "tensorrt" and not gpu_answers():
            return (
                "would have to run TensorRT engines, but no NVIDIA GPU answers here; verify the ONNX model"
                " instead (put it before build_tensorrt), or run the chain where the card is"
            )
        return cannot_run(("openvino",) if format == "openvino" else self.providers or ())

    def reads(self, context: Context) -> frozenset[str]:
        """What it compares with, and what it draws."""
        return frozenset({"seed", "prompts", *SAMPLING, self.against})

    def formerly(self, format: str) -> dict[str, Any] | None:
        """One runtime alone was looked at where none was named."""
        settings = super().formerly(format)
        if self.tiled or settings is None or (format == "onnx" and self.providers is None):
            return None
        if self.judges.lpips or self.judges.clip:
            return None
        for name in ("tiled", "max_lpips", "max_clip_drop", "lpips_weights", "clip_model"):
            del settings[name]
        return settings

    def objection(self, start: Start, earlier: Sequence[Pass]) -> str | None:
        """Finds that there will be no reference."""
        whole = [format for format in formats(start.format, earlier) if format != "adapter"]
        if self.against == "first" and "torch" not in whole[:-1]:
            return (
                "has no first model to compare with: no step before the last that changed it is a whole model"
                " in torch; leave against out, or put it behind a pass that changes one"
            )
        if len(whole) < 2:
            return (
                "has no parent to compare with: there is only one whole model so far; put it behind a pass"
                " that changes a whole model, such as quantize or export_onnx"
            )
        return None

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        """Measures, writes the pictures of both sides, and fails where a threshold is missed.

        Raises:
            ChainError: there is no reference in this chain.
        """
        from tunekit.runtime import other_steps, remarks

        reference = context.reference(self.against)
        if reference is None:
            raise ChainError(
                f"verify has no {self.against} model to compare with: there is only one whole model so far",
                hint="put it behind a pass that changes a whole model, such as quantize or export_onnx",
            )
        prompts = list(islice(cycle(context.prompts or PROMPTS), self.pictures))
        seeds = [context.seed + i for i in range(self.pictures)]

        alike = _way(context.sampling_of(reference)) == _way(context.sampling_of(artifact))

        def draw(model: Artifact, runtime: Runtime, size: SamplingConfig) -> _Drawn:
            sampling = size.over(context.sampling_of(model)).over(runtime.sampling)
            steps = self.steps or (min(sampling.steps or STEPS, STEPS) if alike else sampling.steps)
            return _draw(runtime, prompts, seeds, sampling.model_copy(update={"steps": steps}))

        # Pictures can be compared at one size alone: that of the model that is looked at.
        own = context.sampling_of(artifact)
        with context.running(reference, tiled=self.tiled) as runtime:
            name = describe(reference, runtime)
            context.say(f"reference: {name}")
            for remark in remarks(runtime, prompts, context.sampling_of(reference)):
                context.say(remark)
            wanted = draw(reference, runtime, SamplingConfig(height=own.height, width=own.width))
            tried = trials(runtime, prompts, context.seed, wanted.sampling)
            expected = [trial.run(runtime) for trial in tried]
        size = SamplingConfig(height=wanted.sampling.height, width=wanted.sampling.width)
        saved = save_pictures(wanted.pixels, "reference", name, prompts, seeds, context)

        judges, sides = self.judges, []
        before = judges.scores(wanted.pixels, prompts) if judges.clip else []
        here = everywhere() if artifact.format == "onnx" else (None,)
        providers: Sequence[Provider | None] = self.providers or here
        for provider in providers:
            with context.running(artifact, provider=provider, tiled=self.tiled) as runtime:
                title = describe(artifact, runtime)
                context.say(title)
                found = draw(artifact, runtime, size)
                got = [trial.run(runtime) for trial in tried]
                side = _compare(runtime.title, got, expected, found, wanted)
                if judges.lpips:
                    side.lpips += judges.distances(found.pixels.nan_to_num(0), wanted.pixels.nan_to_num(0))
                if judges.clip:
                    after = judges.scores(found.pixels, prompts)
                    side.clip_drop = (sum(before) - sum(after)) / len(after)
                sides.append(side)
                context.say(f"{runtime.title}: PSNR {sides[-1].psnr_db:.1f} dB, SSIM {sides[-1].ssim:.4f}")
            saved += save_pictures(found.pixels, provider or "candidate", title, prompts, seeds, context)
            if self.steps and (other := other_steps(runtime, self.steps)):
                context.say(other)
        note = f"reference: {name}; {self.pictures} pictures of {found.sampling.steps} steps"
        if self.steps and other:
            note += f"; {other}"
        if sides[-1].trajectory is None:
            note += (
                f", of the reference {wanted.sampling.steps}; its way to them is another, and not compared"
            )
        finite = wanted.finite and all(bool(value.isfinite().all()) for value in expected)
        return self._outcome(note, tried, sides, saved, finite)

    def _outcome(
        self,
        note: str,
        trials: list[Trial],
        sides: list[_Side],
        pictures: list[dict[str, Any]],
        finite: bool,
    ) -> Outcome:
        components = list(dict.fromkeys(trial.component for trial in trials))
        names = ["relative error" if len(sides) == 1 else f"relative error, {side.title}" for side in sides]

        def columns(values: Iterable[float]) -> dict[str, float]:
            return dict(zip(names, values, strict=True))

        ways = [side.trajectory for side in sides if side.trajectory is not None]
        metrics: dict[str, Any] = {
            # Of several runtimes the worst counts: the file is meant for all of them.
            "relative_error": _worst(error for side in sides for error in side.errors),
            **{
                f"relative_error_{component}": _worst(
                    error
                    for side in sides
                    for error, trial in zip(side.errors, trials, strict=True)
                    if trial.component == component
                )
                for component in components
            },
            "relative_error_trajectory": _worst(way[-1] for way in ways) if ways else None,
            "psnr_db": _lowest(side.psnr_db for side in sides),
            "psnr_db_worst": _lowest(psnr for side in sides for psnr in side.psnrs),
            "ssim": _lowest(side.ssim for side in sides),
            "ssim_worst": _lowest(ssim for side in sides for ssim in side.ssims),
        }
        if self.max_lpips is not None:
            metrics["lpips"] = _worst(sum(side.lpips) / len(side.lpips) for side in sides)
            metrics["lpips_worst"] = _worst(value for side in sides for value in side.lpips)
        if self.max_clip_drop is not None:
            metrics["clip_drop"] = _worst(side.clip_drop for side in sides)
        return Outcome(
            metrics=metrics,
            details={
                "note": note,
                "components": [
                    {**trial.row, **columns(side.errors[i] for side in sides)}
                    for i, trial in enumerate(trials)
                ],
                "trajectory": [
                    {"step": i + 1, **columns(errors)} for i, errors in enumerate(zip(*ways, strict=True))
                ],
                "runtimes": [
                    {"runtime": side.title, "psnr_db": side.psnr_db, "ssim": side.ssim} for side in sides
                ],
            },
            pictures=pictures,
            failure=self._failure(sides, finite),
        )

    def _failure(self, sides: list[_Side], finite: bool) -> str | None:
        """Every threshold that was missed, and by which runtime. A value that is not finite misses always.

        Args:
            finite: whether all that the reference gave is.
        """
        if not finite:
            return "the reference gives values that are not finite, so there is nothing to compare with"
        missed = []
        for side in sides:
            error, psnr, ssim = _worst(side.errors), _lowest(side.psnrs), _lowest(side.ssims)
            if not (side.finite and all(map(math.isfinite, (error, psnr, ssim)))):
                missed.append(f"{side.title} gives values that are not finite")
                continue
            if self.max_relative_error is not None and error > self.max_relative_error:
                limit = self.max_relative_error
                missed.append(f"{side.title}: relative error {error:.3g}, max_relative_error {limit:g}")
            if self.min_psnr_db is not None and psnr < self.min_psnr_db:
                missed.append(f"{side.title}: PSNR {psnr:.2f} dB, min_psnr_db {self.min_psnr_db:g}")
            if self.min_ssim is not None and ssim < self.min_ssim:
                missed.append(f"{side.title}: SSIM {ssim:.4f}, min_ssim {self.min_ssim:g}")
            if self.max_lpips is not None and not _worst(side.lpips) <= self.max_lpips:
                missed.append(f"{side.title}: LPIPS {_worst(side.lpips):.4f}, max_lpips {self.max_lpips:g}")
            drop, most = side.clip_drop, self.max_clip_drop
            if most is not None and drop is not None and not drop <= most:
                missed.append(f"{side.title}: the CLIP score drops by {drop:.4f}, max_clip_drop {most:g}")
        return "; ".join(missed) or None


def describe(artifact: Artifact, runtime: Runtime) -> str:
    """A model in a few words: the step that made it, or its folder or hub id; and what runs it."""
    from tunekit.registry import PASSES

    looking = {kind for kind, cls in PASSES.items() if cls.looks}
    name = artifact.model_path.name if artifact.model_path else artifact.source
    made_by = next((step.kind for step in reversed(artifact.lineage) if step.kind not in looking), name)
    return f"{made_by} ({runtime.title})"


def _way(sampling: SamplingConfig) -> SamplingConfig:
    """From noise to a picture, whatever its size and its prompts are."""
    return sampling.model_copy(update={"height": None, "width": None, "negative_prompt": None})


# Components ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One component on one input, to be run by both sides."""

    component: str
    batch: int
    size: tuple[int, int] | None
    """Height and width in pixels; None for text."""
    timestep: int | None
    run: Callable[[Runtime], Tensor]

    @property
    def row(self) -> dict[str, Any]:
        """It, as a table of the report has it."""
        size = f"{self.size[0]} x {self.size[1]}" if self.size else ""
        return {"component": self.component, "batch": self.batch, "pixels": size, "timestep": self.timestep}


def trials(reference: Runtime, prompts: list[str], seed: int, sampling: SamplingConfig) -> list[Trial]:
    """Three batch sizes, each with a resolution of its own and with an early, a middle and a late timestep.

    Conditioning and pictures are those of the reference, so that a component is judged alone.

    Args:
        sampling: height and width of the largest pictures, and the guidance that denoisers may be told.
    """
    import torch

    from tunekit.diffusion.sampling import initial_latents

    height, width = reference.size(sampling)
    multiple = reference.family.resolution_multiple(reference.pipeline)
    half_height, half_width = (max(multiple, side // 2 // multiple * multiple) for side in (height, width))
    last = int(reference.scheduler.config.num_train_timesteps) - 1
    trials = []
    sizes = ((height, width), (half_height, width), (half_height, half_width + multiple))
    for batch, size in enumerate(sizes, start=1):
        texts = [prompts[i % len(prompts)] for i in range(batch)]
        for encoder in reference.family.facts.encoders_of(reference.pipeline):
            run = partial(_encode, encoder=encoder.name, prompts=texts)
            trials.append(Trial(encoder.name, batch, None, None, run))
        told = reference.conditioning(
            texts, sampling.model_copy(update={"height": size[0], "width": size[1]})
        )
        latents = initial_latents(range(seed, seed + batch), reference.latent_shape(*size))
        for timestep in (last, last // 2, last // 50):
            given = (latents, torch.tensor(timestep), told)
            trials.append(Trial("denoiser", batch, size, timestep, partial(_denoise, given=given)))
        pixels = reference.decode(latents) * 2 - 1
        trials.append(Trial("vae_decoder", batch, size, None, partial(_decode, latents=latents)))
        trials.append(Trial("vae_encoder", batch, size, None, partial(_encode_image, pixels=pixels)))
    return sorted(trials, key=lambda trial: trial.component)


def _encode(side: Runtime, encoder: str, prompts: list[str]) -> Tensor:
    """All that the family reads of what one text encoder says."""
    import torch

    read: list[Tensor] = []
    with torch.no_grad():
        tokens = side.family.tokenize(side.pipeline, prompts)
        side.family.encode_tokens(_Listening(side.pipeline, encoder, read), tokens)
    return torch.cat([value.float().cpu().flatten() for value in read])


class _Listening:
    """A pipeline that notes every tensor which is read of what one of its text encoders says."""

    def __init__(self, pipeline: Any, encoder: str, read: list[Tensor]) -> None:
        self._pipeline, self._encoder, self._read = pipeline, encoder, read

    def __getattr__(self, name: str) -> Any:
        part = getattr(self._pipeline, name)
        return _Speaker(part, self._read) if name == self._encoder else part


class _Speaker:
    """The text encoder."""

    def __init__(self, encoder: Any, read: list[Tensor]) -> None:
        self._encoder, self._read = encoder, read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return _Said(self._encoder(*args, **options), self._read)


class _Said:
    """What it says: fields, some of which are several tensors by number."""

    def __init__(self, value: Any, read: list[Tensor]) -> None:
        self._value, self._read = value, read

    def __getattr__(self, name: str) -> Any:
        return self._noted(getattr(self._value, name))

    def __getitem__(self, index: Any) -> Any:
        return self._noted(self._value[index])

    def _noted(self, value: Any) -> Any:
        if isinstance(value, tuple | dict):
            return _Said(value, self._read)
        self._read.append(value)
        return value


def _denoise(side: Runtime, given: tuple[Tensor, Tensor, dict[str, Tensor]]) -> Tensor:
    return side.denoise(*given)


def _decode(side: Runtime, latents: Tensor) -> Tensor:
    return side.decode(latents)


def _encode_image(side: Runtime, pixels: Tensor) -> Tensor:
    return side.encode_image(pixels)


# Trajectory and pictures -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Drawn:
    trajectory: list[Tensor]
    """Latents [N, C, h, w] after each step."""
    pixels: Tensor
    """[N, 3, H, W] in [0, 1]."""
    sampling: SamplingConfig
    sampler: str
    """Class and settings of the sampler; the same text and as many steps are the same way."""

    @property
    def finite(self) -> bool:
        """Whether pictures and latents are numbers."""
        return all(bool(value.isfinite().all()) for value in (self.pixels, *self.trajectory))


def _draw(runtime: Runtime, prompts: list[str], seeds: list[int], sampling: SamplingConfig) -> _Drawn:
    import torch

    from tunekit.diffusion.sampling import sampler
    from tunekit.runtime import generate_pixels

    way = sampler(runtime.scheduler, sampling)
    settings = {key: value for key, value in way.config.items() if not key.startswith("_")}

    parts: list[list[Tensor]] = []
    pixels = []
    for start in range(0, len(prompts), AT_ONCE):
        latents: list[Tensor] = []
        drawn = generate_pixels(
            runtime,
            prompts[start : start + AT_ONCE],
            sampling,
            seeds=seeds[start : start + AT_ONCE],
            on_step=lambda done, of, now, latents=latents: latents.append(now.clone()),  # type: ignore[misc]
        )
        parts.append(latents)
        pixels.append(drawn)
    return _Drawn(
        [torch.cat(step) for step in zip(*parts, strict=True)],
        torch.cat(pixels),
        sampling,
        f"{type(way).__name__} {json.dumps(settings, sort_keys=True, default=str)}",
    )


@dataclass
class _Side:
    """What one runtime's answers came to."""

    title: str
    errors: list[float]
    """Relative error per trial."""
    trajectory: list[float] | None
    """Relative error of the latents per step; None where the two sides take other steps."""
    finite: bool
    """Whether its pictures and latents are numbers."""
    psnr_db: float
    """Of all pictures as one."""
    psnrs: list[float]
    """Per picture."""
    ssim: float
    ssims: list[float]
    lpips: list[float] = field(default_factory=list)
    """Per picture; empty where it is not measured."""
    clip_drop: float | None = None


def _compare(title: str, got: list[Tensor], expected: list[Tensor], found: _Drawn, wanted: _Drawn) -> _Side:
    from tunekit.diffusion.metrics import psnr_db, relative_error, ssim

    pairs = list(zip(found.pixels[:, None], wanted.pixels[:, None], strict=True))
    ssims = [ssim(a, b) for a, b in pairs]
    same_way = (found.sampling.steps, found.sampler) == (wanted.sampling.steps, wanted.sampler)
    return _Side(
        title=title,
        errors=[relative_error(a, b) for a, b in zip(got, expected, strict=True)],
        trajectory=[relative_error(a, b) for a, b in zip(found.trajectory, wanted.trajectory, strict=True)]
        if same_way
        else None,
        finite=found.finite,
        psnr_db=psnr_db(found.pixels, wanted.pixels),
        psnrs=[psnr_db(a, b) for a, b in pairs],
        ssim=sum(ssims) / len(ssims),
        ssims=ssims,
    )


def save_pictures(
    pixels: Tensor, name: str, label: str, prompts: list[str], seeds: list[int], context: Context
) -> list[dict[str, Any]]:
    """Writes pictures [N, 3, H, W] into the step's folder; returns them as `Outcome.pictures` lists them."""
    from tunekit.runtime import to_images

    folder = context.folder / PICTURES
    listed = []
    with output_errors(folder):
        folder.mkdir(exist_ok=True)
        for index, image in enumerate(to_images(pixels.nan_to_num(0))):
            file = folder / f"{name}-{index:02d}.png"
            image.save(file)
            entry = {
                "file": f"{PICTURES}/{file.name}",
                "label": label,
                "prompt": prompts[index],
                "seed": seeds[index],
            }
            listed.append(entry)
    return listed


def _worst(errors: Any) -> float:
    """The largest; NaN counts as larger than anything."""
    return max((float(error) for error in errors), key=lambda error: math.inf if math.isnan(error) else error)


def _lowest(figures: Any) -> float:
    """The smallest; NaN counts as smaller than anything."""
    return min((float(figure) for figure in figures), key=lambda one: -math.inf if math.isnan(one) else one)


PASS = Verify
