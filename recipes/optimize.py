"""Run a chain of passes on any model: a run, an artifact, an adapter, a diffusers folder or a hub id.

accelerate launch recipes/optimize.py --config configs/sd15/optimize.yaml model.source=runs/lora
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from tunekit import config as sections
from tunekit.config import Loaded, changed, idle
from tunekit.launch import run_recipe

if TYPE_CHECKING:
    from pathlib import Path

    from tunekit.artifacts import Artifact


class Config(sections.RunConfig):
    """A model and what is to be done with it."""

    model: sections.ModelConfig
    """The model; its source may also be a run, an adapter or an artifact of a chain."""
    optimize: list[dict[str, Any] | str] = Field(min_length=1, max_length=100)
    """Passes to run, in order."""
    preview: sections.PreviewConfig = sections.PreviewConfig()
    """Pictures of verify and benchmark; prompts also calibrate quantize; without data, heal and distill
    learn from them."""
    data: sections.DataConfig | None = None
    """Pictures that prune, heal and distill learn from; null lets the model draw some."""
    memory: sections.MemoryConfig = sections.MemoryConfig()
    """The device."""

    @model_validator(mode="after")
    def _effects(self) -> Config:
        if changed(self.preview, "every"):
            idle("preview.every", "there is no long training to look into")
        if changed(self.preview, "clip_model"):
            idle("preview.clip_model", "no previews are drawn; verify has one of its own")
        for key in ("precision", "micro_batch", "gradient_checkpointing", "budget"):
            if changed(self.memory, key):
                idle(f"memory.{key}", "each pass has its own, as heal: {precision: ...}")
        return self


def main(config: Config, loaded: Loaded) -> None:
    """From a model to its optimized versions and a report."""
    if int(os.environ.get("RANK", "0")) > 0:
        return  # passes are not spread over processes

    from tunekit import preconditions
    from tunekit.artifacts import RunFolder, write_text
    from tunekit.passes.base import Context, run_chain
    from tunekit.report import settle as settle_report
    from tunekit.report import write as write_report
    from tunekit.training.checkpoint import only_writer

    run, model, preview = RunFolder(config.run_dir), config.model, config.preview
    found = preconditions.look(loaded)
    found.check()
    assert found.model is not None
    context = Context(
        run.path,
        config.memory.device,
        config.seed,
        prompts=tuple(preview.prompts),
        sampling=preview.sampling,
        data=config.data,
        say=lambda line: print(line, flush=True),
    )
    try:
        with only_writer(run.path):
            write_text(run.config, sections.dump_yaml(config))
            start = plain(found.model, model, run.model)
            run_chain(found.chain, start, context, lambda _: write_report(run.path))
    finally:
        settle_report(run.path)
    context.say(f"report: {run.path / 'report.html'}")


def plain(artifact: Artifact, model: sections.ModelConfig, final: Path) -> Artifact:
    """The artifact as files of this machine: what has to be fetched or unpickled is saved here, once."""
    from dataclasses import replace

    from tunekit import families
    from tunekit.artifacts import Artifact, Step, atomic_folder
    from tunekit.provenance import public

    opened = model.opened if model.opened.is_special else artifact.opened
    artifact = replace(artifact, family=model.family, opened=opened)
    if artifact.format != "torch" or (artifact.model_path and not opened):
        return artifact  # of an adapter, `opened` is the base's
    step = Step(kind="fetch", artifact=final.name, settings=model.model_dump(mode="json"))
    there = Artifact.load(final) if (final / "artifact.json").is_file() else None
    if there and there.lineage[0].settings == public(step.settings):
        return there
    family = families.get(model.family)
    with atomic_folder(final) as folder:
        family.save(family.load(artifact.model_source), folder)
        made = Artifact(folder, folder, "torch", family.name, str(folder), lineage=(step,))
        replace(made, sampling=artifact.sampling).write()
    return Artifact.load(final)


if __name__ == "__main__":
    run_recipe(main, Config)
