"""Run a chain of passes on any model: a run, an artifact, an adapter, a diffusers folder or a hub id.

accelerate launch recipes/optimize.py --config configs/sd15/optimize.yaml model.source=runs/lora
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from tunekit import config as sections
from tunekit.config import Loaded, changed, wrong
from tunekit.launch import run_recipe

if TYPE_CHECKING:
    from tunekit.artifacts import Artifact


class Config(sections.RunConfig):
    """A model and what is to be done with it."""

    model: sections.ModelConfig
    """The model; its source may also be a run, an adapter or an artifact of a chain."""
    optimize: list[dict[str, Any] | str] = Field(min_length=1)
    """Passes to run, in order."""
    preview: sections.PreviewConfig = sections.PreviewConfig()
    """Pictures of verify and benchmark; prompts also calibrate quantize, and feed heal if data is null."""
    data: sections.DataConfig | None = None
    """Pictures that prune and heal learn from; null lets the model draw some."""
    memory: sections.MemoryConfig = sections.MemoryConfig()
    """The device."""

    @model_validator(mode="after")
    def _effects(self) -> Config:
        if changed(self.preview, "every"):
            wrong("preview.every", "has no effect: there is no long training to look into")
        for key in ("precision", "micro_batch", "gradient_checkpointing", "budget"):
            if changed(self.memory, key):
                wrong(f"memory.{key}", "has no effect: each pass has its own, as heal: {precision: ...}")
        return self


def main(config: Config, loaded: Loaded) -> None:
    """From a model to its optimized versions and a report."""
    if int(os.environ.get("RANK", "0")) > 0:
        return  # passes are not spread over processes

    from tunekit.artifacts import RunFolder, write_text
    from tunekit.passes.base import Context, check_chain, parse_chain, run_chain
    from tunekit.report import write as write_report
    from tunekit.training.checkpoint import only_writer

    chain = parse_chain(config.optimize, loaded.chain_where)
    artifact = find_model(config, loaded)
    check_chain(chain, artifact.format, loaded.chain_where)
    run = RunFolder(config.run_dir)
    context = Context(
        run_dir=run.path,
        device=config.memory.device,
        seed=config.seed,
        prompts=tuple(config.preview.prompts),
        sampling=config.preview.sampling,
        data=config.data,
        say=lambda line: print(line, flush=True),
    )
    with only_writer(run.path):
        write_text(run.config, sections.dump_yaml(config))
        run_chain(chain, fetched(config, artifact), context, lambda _: write_report(run.path))
    print(f"report: {run.path / 'report.html'}", flush=True)


def find_model(config: Config, loaded: Loaded) -> Artifact:
    """Open `model.source`, whatever it is, as the other keys of `model` say.

    Raises:
        ConfigError: it is of another family than the config says.
    """
    from dataclasses import replace

    from tunekit.artifacts import open_artifact
    from tunekit.errors import ConfigError

    model = config.model
    artifact = open_artifact(model.source, family=model.family)
    if artifact.family and artifact.family != model.family:
        raise ConfigError(
            f"model.family is {model.family}, but the source is of family {artifact.family}",
            where=loaded.where("model.family"),
        )
    opened = model.opened if model.opened.is_special else artifact.opened
    return replace(artifact, family=model.family, opened=opened)


def fetched(config: Config, artifact: Artifact) -> Artifact:
    """The artifact as plain files: what is on the hub or opened in a special way goes to `model/` once."""
    from dataclasses import replace

    from tunekit import families
    from tunekit.artifacts import Artifact, RunFolder, Step, atomic_folder

    plain = artifact.model_path is not None and artifact.opened is None
    if plain or artifact.format != "torch":  # `opened` is of the base, where it is an adapter
        return artifact
    final = RunFolder(config.run_dir).model
    step = Step(kind="fetch", artifact=final.name, settings=config.model.model_dump(mode="json"))
    if (final / "artifact.json").is_file() and (there := Artifact.load(final)).lineage[
        0
    ].settings == step.settings:
        return there
    family = families.get(artifact.family)
    with atomic_folder(final) as folder:
        family.save(family.load(artifact.model_source), folder)
        made = Artifact(folder, folder, "torch", family.name, str(folder), lineage=(step,))
        replace(made, sampling=artifact.sampling).write()
    return Artifact.load(final)


if __name__ == "__main__":
    run_recipe(main, Config)
