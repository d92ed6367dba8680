"""What a training leaves: adapters on the way, what was learned in the end, and which of them is taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tunekit.adapters import save_adapter
from tunekit.artifacts import RECORD, Artifact, Metric, RunFolder, Step, atomic_folder
from tunekit.card import write as write_card
from tunekit.config import SamplingConfig, TrainingRunConfig
from tunekit.families.family import Family, Pipeline
from tunekit.training.facts import kohya_facts
from tunekit.training.loop import Result

WEIGHTS = "weights.safetensors"
"""In the folder of the best weights: every parameter of the denoiser, and the step in its header."""
GONE = "no validation loss was a number, or it was removed"


@dataclass(frozen=True)
class Results:
    """Writes what was learned into a run's folder; asked of the main process alone.

    Attributes:
        config: the run's.
        folder: the run's.
        family: the base's.
        identity: what is learned, see `checkpoint.identity`.
        sampling: how pictures are drawn with it.
        data: the section `data:`.
        pictures: how many it learned from.
        say: shows a line.
    """

    config: TrainingRunConfig
    folder: RunFolder
    family: Family
    identity: dict[str, Any]
    sampling: SamplingConfig
    data: Any
    pictures: int
    say: Callable[[str], None]

    def keep(self, pipeline: Pipeline, name: str, step: int, figures: Mapping[str, float]) -> None:
        """Write the adapter as it is after `step` to `adapters/<name>`; of all weights the best, to `best/`.

        Raises:
            OutputError: nothing half-written is left.
        """
        if self.config.adapter is None:
            denoiser = self.family.denoiser(pipeline)
            tensors = {key: value.detach().cpu().contiguous() for key, value in denoiser.named_parameters()}
            with atomic_folder(self.folder.best) as made:
                save_file(tensors, made / WEIGHTS, metadata={"step": str(step)})
            return
        value = figures.get("best_val_loss") if name == "best" else None
        metrics: dict[str, Metric] = {"steps": step} if value is None else {"steps": step, "val_loss": value}
        final = self.folder.adapters / name
        self._write(pipeline, final, self._step(final, step, metrics))

    def save(self, pipeline: Pipeline, result: Result, *, parameters: int) -> Step:
        """Write what was trained in the end: `adapter/`, or with all weights `model/`.

        Where the best adapter is kept, it goes to `adapters/last`, and `choose` decides. All weights are
        there once: `train.final` is asked here.

        Args:
            parameters: how many were trained.

        Raises:
            OutputError: nothing half-written is left.
        """
        config = self.config
        final = self.folder.adapter if config.adapter else self.folder.model
        metrics: dict[str, Metric] = {
            "steps": result.step,
            "loss": result.loss,
            **result.metrics,
            "parameters": parameters,
            "samples_per_second": round(result.step * config.train.batch_size / max(result.seconds, 1e-9), 3),
        }
        step = self._step(final, result.step, metrics, result.seconds)
        if config.keeps_best and config.adapter is None:
            step = self._take_best(pipeline, step)
            self._write(pipeline, final, step)
            taken = step.details
            self.say(f"saved {final}: the {taken['final']}, of step {taken['taken']} (train.final)")
        elif config.keeps_best:
            last = self.folder.adapters / "last"
            self._write(pipeline, last, replace(step, artifact=last.name))
        else:
            self._write(pipeline, final, step)
            self.say(f"saved {final}")
        return step

    def _take_best(self, pipeline: Pipeline, step: Step) -> Step:
        """Put the best weights back, if they are to be the result; the training with what was taken."""
        file, which = self.folder.best / WEIGHTS, self.config.final
        if which == "best" and not file.is_file():
            self.say(f"{file} is not there ({GONE}): taking the last")
            which = "last"
        metrics = dict(step.metrics)
        details = {**step.details, "final": which, "taken": step.details["step"]}
        if which == "best":
            own = dict(self.family.denoiser(pipeline).named_parameters())
            with safe_open(file, framework="pt") as kept, torch.no_grad():
                for name, parameter in own.items():
                    parameter.copy_(kept.get_tensor(name))
                details["taken"] = int(kept.metadata()["step"])
            metrics |= {"last_val_loss": metrics["val_loss"], "val_loss": metrics["best_val_loss"]}
        return replace(step, metrics=metrics, details=details)

    def choose(self, step: Step) -> None:
        """Make `adapter/` of the best or the last one, as `train.final` says.

        Args:
            step: the training; its figures become those of the adapter that is taken.
        """
        folder, which = self.folder, self.config.final
        best, last = folder.adapters / "best", folder.adapters / "last"
        if which == "best" and not (best / RECORD).is_file():
            self.say(f"{best} is not there ({GONE}): taking the last")
            which = "last"
        taken = Artifact.load(folder.adapters / which).lineage[-1]
        lasting = dict(Artifact.load(last).lineage[-1].metrics)
        metrics = dict(lasting)
        if which == "best":  # the figures are those of what is there
            metrics |= {"last_val_loss": lasting["val_loss"], "val_loss": taken.metrics["val_loss"]}
        details = {**step.details, "final": which, "taken": taken.details["step"]}
        with atomic_folder(folder.adapter) as made:
            for file in sorted((folder.adapters / which).iterdir()):
                if file.name != RECORD:
                    shutil.copyfile(file, made / file.name)
            self._record(made, replace(step, artifact=folder.adapter.name, metrics=metrics, details=details))
        if "best_step" in lasting:
            first = lasting.get("val_loss_first")
            self.say(
                f"best: step {lasting['best_step']:.0f}, val_loss {lasting['best_val_loss']:.5f} ({best});"
                f" last: step {step.details['step']}, val_loss {lasting['val_loss']:.5f} ({last})"
            )
            if isinstance(first, float) and first <= float(lasting["best_val_loss"] or 0):
                self.say(f"the untrained model has {first:.5f}: by this measure nothing was gained")
        self.say(f"saved {folder.adapter}: the {which}, of step {details['taken']} (train.final)")

    def _step(self, final: Path, step: int, metrics: dict[str, Metric], seconds: float = 0.0) -> Step:
        return Step(
            kind="train",
            artifact=final.name,
            settings=json.loads(self.config.model_dump_json(exclude={"optimize", "runs"})),
            seconds=round(seconds, 3),
            metrics=metrics,
            details={"identity": self.identity, "step": step},
        )

    def _write(self, pipeline: Pipeline, final: Path, step: Step) -> None:
        """Write the adapter, or the whole pipeline, with its artifact.json."""
        config, family = self.config, self.family
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
                    facts=self._facts(int(step.details["step"]), config.adapter.dropout),
                )
            else:
                whole = family.load(config.model.opened)
                setattr(whole, family.facts.denoiser_name, denoiser.to("cpu", torch.float32))
                whole.scheduler = pipeline.scheduler
                family.save(whole, folder)
            self._record(folder, step)

    def _facts(self, step: int, dropout: float) -> dict[str, str]:
        """What the adapter's file says of its training."""
        config = self.config
        return kohya_facts(
            config.train,
            config.objective,
            self.data,
            pictures=self.pictures,
            seed=config.seed,
            step=step,
            dropout=dropout,
            precision=config.memory.precision,
        )

    def _record(self, folder: Path, step: Step) -> None:
        config = self.config
        made = Artifact(
            path=folder,
            model_path=folder,
            format="adapter" if config.adapter else "torch",
            family=self.family.name,
            source=str(folder),
            lineage=(step,),
            base=config.model.source if config.adapter else None,
            opened=config.model.opened if config.adapter else None,
            sampling=self.sampling,
        ).write()
        write_card(made, self.family.facts)
