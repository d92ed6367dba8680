"""Run a chain of passes on any model: a run, an artifact, an adapter, a diffusers folder or a hub id.

accelerate launch recipes/optimize.py --config configs/sd15/optimize.yaml model.source=runs/lora
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from tunekit.config import (
    DataConfig,
    Loaded,
    MemoryConfig,
    ModelConfig,
    PreviewConfig,
    RunConfig,
    changed,
    dump_yaml,
    wrong,
)
from tunekit.launch import run_recipe

if TYPE_CHECKING:
    from tunekit.artifacts import Artifact


class Config(RunConfig):
    """A model and what is to be done with it."""

    model: ModelConfig
    """The model; its source may also be a run, an adapter or an artifact of a chain."""
    optimize: list[dict[str, Any] | str] = Field(min_length=1)
    """Passes to run, in order."""
    preview: PreviewConfig = PreviewConfig()
    """Pictures of verify and benchmark; prompts also calibrate quantize, and feed heal if data is null."""
    data: DataConfig | None = None
    """Pictures that prune and heal learn from; null lets the model draw some."""
    memory: MemoryConfig = MemoryConfig()
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
    from tunekit.passes.base import check_chain, parse_chain, run_chain
    from tunekit.report import write as write_report
    from tunekit.training.checkpoint import only_writer

    chain = parse_chain(config.optimize, loaded.chain_where)
    artifact = find_model(config, loaded)
    check_chain(chain, artifact.format, loaded.chain_where)
    run = RunFolder(config.run_dir)
    with only_writer(run.path):
        write_text(run.config, dump_yaml(config))
        run_chain(
            chain,
            fetched(config, artifact),
            run_dir=run.path,
            device=config.memory.device,
            seed=config.seed,
            prompts=config.preview.prompts,
            negative_prompt=config.preview.negative_prompt,
            data=config.data,
            steps=config.preview.steps,
            guidance=config.preview.guidance,
            height=config.preview.height,
            width=config.preview.width,
            say=lambda line: print(line, flush=True),
            after_step=lambda _: write_report(run.path),
        )
    print(f"report: {run.path / 'report.html'}", flush=True)


def find_model(config: Config, loaded: Loaded) -> Artifact:
    """Open `model.source`, whatever it is.

    Raises:
        ConfigError: it is of another family than the config says.
    """
    from dataclasses import replace

    from tunekit.artifacts import open_artifact
    from tunekit.errors import ConfigError

    artifact = open_artifact(config.model.source, family=config.model.family)
    if artifact.family and artifact.family != config.model.family:
        raise ConfigError(
            f"model.family is {config.model.family}, but the source is of family {artifact.family}",
            where=loaded.where("model.family"),
        )
    return replace(artifact, family=config.model.family)


def fetched(config: Config, artifact: Artifact) -> Artifact:
    """The artifact as files: what is on the hub or opened in a special way goes to `model/` once."""
    from tunekit import families
    from tunekit.artifacts import Artifact, RunFolder, Step, atomic_folder

    how = config.model.model_dump(mode="json")
    special = config.model.revision or config.model.variant or config.model.allow_pickle
    if artifact.model_path is not None and not special:
        return artifact
    final = RunFolder(config.run_dir).model
    if (final / "artifact.json").is_file() and (there := Artifact.load(final)).lineage[0].settings == how:
        return there
    family = families.get(config.model.family)
    options = {key: how[key] for key in ("revision", "variant", "allow_pickle")}
    with atomic_folder(final) as folder:
        family.save(family.load(config.model.source, **options), folder)
        step = Step(kind="fetch", artifact=final.name, settings=how)
        Artifact(
            path=folder,
            model_path=folder,
            format="torch",
            family=family.name,
            source=str(folder),
            lineage=(step,),
        ).write()
    return Artifact.load(final)


if __name__ == "__main__":
    run_recipe(main, Config)
