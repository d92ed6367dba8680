"""A small decoder in the place of an autoencoder's own, learned from it.

Where a picture takes few steps, decoding it is a large part of the time. A decoder of TAESD's kind learns
what the own decoder makes of the run's pictures, or of pictures that the model draws. It stands in
vae_decoder/, takes and gives what the own one does, and whoever opens the folder draws with it. Pictures are
drawn with both, from seeds that nothing was learned from: where they differ by more than is kept, the own one
stays.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tunekit.config import BatchSize, Count, PathText, Steps, no_effect
from tunekit.passes.base import (
    NO_EXAMPLES,
    SAMPLING,
    Context,
    Ladder,
    Outcome,
    Pass,
    Start,
    distinct_models,
    formats,
    learned_from,
    untrainable,
)
from tunekit.passes.metrics import PSNR, SIZE, Metric
from tunekit.passes.providers import lacks
from tunekit.passes.tune_sampler import APART, Keep

if TYPE_CHECKING:
    from torch import Tensor

    from tunekit.artifacts import Artifact
    from tunekit.families import ExportComponent
    from tunekit.training.decoding import SmallDecoder

DECODER = "vae_decoder"
TRAINING = (
    *("width", "blocks", "max_steps", "lr", "batch_size", "micro_batch"),
    *("optimizer", "precision", "pictures", "checkpoint_every"),
)
ROUNDS = 5
"""In which both decoders are timed."""


class TinyDecoder(Pass):
    """Trains a small decoder to give what the autoencoder's own gives, and puts it in its place."""

    kind: ClassVar[str] = "tiny_decoder"
    accepts: ClassVar[frozenset[str]] = frozenset({"onnx"})
    learns: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (
        SIZE,
        PSNR,
        Metric("decoder_speedup", "decoder, faster by", "x", lower_is_better=False, rank=45),
    )

    source: PathText | None = None
    """Folder of an AutoencoderTiny of diffusers, such as TAESD, made for these latents: its decoder is taken
    as it is, and nothing is trained."""
    keep: Keep = Keep()
    """What pictures must keep against those of the own decoder; where they do not, that one stays."""
    width: int = Field(32, ge=4, le=512)
    """Channels within; TAESD has 64."""
    blocks: int = Field(3, ge=1, le=16)
    """Residual blocks on each size."""
    max_steps: Steps = 1000
    """Optimizer steps."""
    lr: float = Field(1e-3, gt=0, le=100)
    """Highest learning rate; it warms up over a twentieth of the steps and falls to zero as a cosine."""
    batch_size: BatchSize = 8
    """Samples per optimizer step."""
    micro_batch: BatchSize | None = None
    """Samples per forward; null means the whole batch at once."""
    optimizer: str = "adamw"
    """Row of tunekit/optimizers.py."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic; the trained weights are fp32."""
    pictures: Count = 64
    """Pictures the model draws to learn from, where the run has none of its own."""
    compared: int = Field(4, ge=1, le=64)
    """Pictures that are drawn with both decoders in the end."""
    checkpoint_every: Steps = 100
    """Optimizer steps between checkpoints."""

    @model_validator(mode="after")
    def _effects(self) -> TinyDecoder:
        if self.source is not None:
            no_effect(self, TRAINING, "the decoder of source is taken as it is")
        return self

    @classmethod
    def options(cls, target: str, minutes: float) -> Sequence[Ladder]:
        """A wider one, then a narrower."""
        if target not in ("cpu", "cuda"):
            return ()
        return [[[{cls.kind: {"width": width}}] for width in (32, 16)]]

    def problem(self, format: str, earlier: Sequence[Pass]) -> str | None:
        """Finds settings that contradict each other, and what is missing."""
        if self.source is not None and not (Path(self.source) / "config.json").is_file():
            return f"has a source that is no folder of a model: {self.source}"
        return untrainable(self.optimizer, self.batch_size, self.micro_batch) or lacks(
            "onnx", "onnxscript", "onnxruntime", extra="onnx"
        )

    def objection(self, start: Start, earlier: Sequence[Pass]) -> str | None:
        """Finds a chain without the model in torch, or with nothing to learn from."""
        if "torch" not in formats(start.format, earlier):
            return "learns from the model in torch, which this chain has not; start it before the export"
        return None if start.examples or self.source is not None else NO_EXAMPLES

    def gives(self) -> frozenset[str]:
        """Nothing that heal could mend."""
        return frozenset()

    def reads(self, context: Context) -> frozenset[str]:
        """The model in torch, what is learned from, and what is drawn."""
        learned = learned_from(context) if self.source is None else frozenset({"seed"})
        return frozenset({"models", "prompts"}) | SAMPLING | learned

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        """Trains, exports, draws with both, and keeps the small one where pictures keep what they must.

        Raises:
            ModelError: an autoencoder of films, or one that does not double its sides; a source that is no
                small autoencoder, or one for other latents.
        """
        from tunekit import families
        from tunekit.artifacts import write_json
        from tunekit.passes.export_onnx import GRAPH, export_component, graph_config
        from tunekit.passes.export_openvino import copy_rest
        from tunekit.runtime.onnx_files import external_files

        source = artifact.model_path
        assert source is not None  # graphs are a folder
        student, origin, loss = self._learned(context) if self.source is None else self._taken(context)
        family = families.get(context.family)
        whole = next(part for part in family.export_components(context.open(origin)) if part.name == DECODER)
        component: ExportComponent = dataclasses.replace(whole, module=student)
        own = {source / DECODER / GRAPH}
        own |= {source / DECODER / name for name in external_files(source / DECODER / GRAPH)}
        copy_rest(source, context.folder, without=own)
        export_component(component, context.folder / DECODER)
        write_json(context.folder / DECODER / "config.json", graph_config(component))
        made = dataclasses.replace(
            artifact, path=None, model_path=context.folder, source=str(context.folder), recorded_hash=None
        )
        each, faster, pictures = self._compared(artifact, made, context)
        mean, worst = sum(each) / len(each), min(each)
        note = (
            f"{self._words}, {faster:.2f}x as fast as the own one, {mean:.1f} dB"
            f" (worst {worst:.1f}) on {self.compared} unseen pictures"
        )
        stays = ""
        if mean < self.keep.psnr:
            stays = f"psnr {self.keep.psnr:g} is not kept: train longer, or a wider one"
        elif faster <= 1:
            stays = "it is no faster here"
        if stays:
            note += f"; {stays}; the own decoder stays"
            for file in (context.folder / DECODER).iterdir():
                file.unlink()
            copy_rest(source / DECODER, context.folder / DECODER, without=set())
        context.say(note)
        return Outcome(
            metrics={
                "psnr_db": mean,
                "psnr_db_worst": worst,
                "decoder_speedup": 1.0 if stays else faster,
                **({} if loss is None else {"loss": loss}),
            },
            details={"note": note},
            pictures=pictures,
        )

    @property
    def _words(self) -> str:
        return f"a decoder of width {self.width}" if self.source is None else f"the decoder of {self.source}"

    def _taken(self, context: Context) -> tuple[SmallDecoder, Artifact, None]:
        """The decoder of `source`, which takes latents as the denoiser gives them; the model in torch."""
        import torch

        from tunekit import families
        from tunekit.training.decoding import Teacher, taken

        family = families.get(context.family)
        origin = [model for model in distinct_models(context.history) if model.format == "torch"][-1]
        pipeline = context.open(origin)
        side = family.resolution_multiple(pipeline)
        with torch.no_grad():
            given, pixels = Teacher(family, pipeline)(
                torch.zeros(1, *family.latent_shape(pipeline, side, side))
            )
        student = taken(str(self.source), pipeline.vae, given.shape[1], pixels.shape[-1] // given.shape[-1])
        return student, origin, None

    def _learned(self, context: Context) -> tuple[SmallDecoder, Artifact, float]:
        """The small decoder, on the CPU; the model in torch; the last loss."""
        import torch

        from tunekit import families
        from tunekit.config import TrainConfig
        from tunekit.data.cache import Draws, Stream
        from tunekit.errors import ModelError
        from tunekit.memory.levers import Fitted
        from tunekit.training.checkpoint import Checkpoints
        from tunekit.training.decoding import Decoding, SmallDecoder, Teacher, spread
        from tunekit.training.loop import Hooks, train
        from tunekit.training.run import build_optimizer

        family = families.get(context.family)
        origin = [model for model in distinct_models(context.history) if model.format == "torch"][-1]
        pipeline = context.open(origin)
        settings = TrainConfig(
            max_steps=self.max_steps,
            lr=self.lr,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            schedule="cosine",
            warmup_steps=self.max_steps // 20,
            weight_decay=0.0,
            log_every=max(1, self.max_steps // 10),
            checkpoint_every=self.checkpoint_every,
        )
        drawn = context.examples(origin, count=self.pictures, precision=self.precision)
        with drawn as (examples, accelerator):
            pipeline.vae.to(accelerator.device)
            teacher = Teacher(family, pipeline)
            seen = [
                teacher(batch.to(accelerator.device).latents)
                for batch in examples.batches(16, 4, purpose="spread")
            ]
            given, pixels = seen[0]
            factor = pixels.shape[-1] // given.shape[-1]
            if factor & (factor - 1):
                raise ModelError(f"its autoencoder has {factor} pixels per latent, and no power of two")
            mean, std = spread([one for one, _ in seen])
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(context.seed)
                student = SmallDecoder(given.shape[1], factor, self.width, self.blocks, mean, std)
            student.to(accelerator.device)
            context.say(f"learning from {examples.origin}")
            fitted = Fitted.plain(student.train().requires_grad_(True))
            result = train(
                accelerator,
                Decoding(fitted, teacher),
                build_optimizer(settings, fitted, accelerator.device),
                Stream(
                    examples.dataset,
                    examples.objective,
                    Draws(self.batch_size, self.micro_batch),
                    seed=context.seed,
                ),
                settings,
                Hooks(
                    seed=context.seed,
                    checkpoints=Checkpoints(context.state / "checkpoints", {"pass": context.state.name}),
                    say=context.say,
                    title="tiny_decoder",
                ),
            )
            pipeline.vae.to("cpu")
        return student.eval().requires_grad_(False).to("cpu"), origin, result.loss

    def _compared(
        self, artifact: Artifact, made: Artifact, context: Context
    ) -> tuple[list[float], float, list[dict[str, Any]]]:
        """PSNR of each picture, in dB; how many times as fast the small decoder is; the pictures."""
        import torch

        from tunekit.diffusion.metrics import psnr_db
        from tunekit.passes.benchmark import percentile
        from tunekit.passes.verify import PROMPTS, save_pictures
        from tunekit.runtime import generate_pixels

        prompts = list(islice(cycle(context.prompts or PROMPTS), self.compared))
        seeds = [context.seed + APART + index for index in range(self.compared)]
        finals: list[Tensor] = []
        with context.running(artifact) as before, context.running(made) as after:
            sampling = context.sampling_of(artifact).over(before.sampling)

            def last(done: int, total: int, latents: Tensor) -> None:
                if done == total:
                    finals.append(latents)

            wanted = generate_pixels(before, prompts, sampling, seeds=seeds, batch=1, on_step=last)
            pictures = save_pictures(wanted, "before", "own decoder", prompts, seeds, context)
            got = torch.cat([after.decode(latents) for latents in finals])
            pictures += save_pictures(got, "after", "small decoder", prompts, seeds, context)
            ratios = []
            for number in range(ROUNDS):
                seconds = [0.0, 0.0]
                for side in ((0, 1), (1, 0))[number % 2]:
                    started = time.perf_counter()
                    (before, after)[side].decode(finals[0])
                    seconds[side] = time.perf_counter() - started
                ratios.append(seconds[0] / seconds[1])
        each = [psnr_db(a, b) for a, b in zip(got, wanted, strict=True)]
        return each, percentile(ratios, 50), pictures


PASS = TinyDecoder
