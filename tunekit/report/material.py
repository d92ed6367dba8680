"""What a report is made of, read from a run folder once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunekit.artifacts import CARD, SAMPLED, Artifact, RunFolder, Step
from tunekit.errors import ArtifactError, ConfigError
from tunekit.provenance import public, shown
from tunekit.records import finite, metrics_of, read_bytes
from tunekit.report.curve import lowest

MEAN_OF = 50
"""Steps whose mean loss is the loss of a run."""


@dataclass
class Material:
    """A run, read.

    Attributes:
        run: its folder.
        trained: what training left.
        chain: the steps that followed.
        final: the folder in the run that has the resulting model.
        rows: of metrics.jsonl.
        config_text: config.yaml as it stands there.
        config: the same as plain values; empty where it is none.
        trouble: what could not be read, and is not needed.
    """

    run: RunFolder
    trained: Artifact | None = None
    chain: list[Step] = field(default_factory=list)
    final: str | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    trouble: list[str] = field(default_factory=list)

    @property
    def train(self) -> Step | None:
        """The training, once it is finished."""
        steps = self.trained.lineage if self.trained else ()
        return next((step for step in steps if step.kind == "train"), None)

    def setting(self, *keys: str) -> Any:
        """A value of the config; None where there is none."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def text(self, *keys: str) -> str | None:
        """The same, if it is text."""
        value = self.setting(*keys)
        return shown(value) if isinstance(value, str) else None

    @property
    def prompts(self) -> list[str]:
        """Of the previews."""
        value = self.setting("preview", "prompts")
        return [str(prompt) for prompt in value] if isinstance(value, list) else []

    @property
    def licence(self) -> str | None:
        """Of the base, as the model card of what was trained says."""
        if self.trained is None or self.trained.path is None:
            return None
        try:
            head = read_bytes(self.trained.path / CARD)[:4000].decode("utf-8", "replace")
        except (FileNotFoundError, ArtifactError):
            return None
        lines = head.partition("\n---")[0].splitlines()
        return next((line[8:].strip().strip('"') for line in lines if line.startswith("license:")), None)

    def training(self) -> dict[str, Any] | None:
        """The training's part of report.json; None for a run that only optimizes."""
        step, rows = self.train, self.rows
        if step is None and not rows:
            return None
        metrics: dict[str, Any] = dict(step.metrics) if step else {}
        losses = [loss for _, loss in finite(rows, "loss")][-MEAN_OF:]
        if losses:
            metrics.setdefault("loss", sum(losses) / len(losses))
        held_out = finite(rows, "val_loss")
        if len(held_out) > 1:
            (_, first), (last_step, last) = held_out[0], held_out[-1]
            best_step, best = lowest(held_out)
            metrics.setdefault("val_loss_first", first)
            metrics.setdefault("val_loss", last)
            metrics |= {"best_val_loss": best, "best_step": best_step}
            metrics |= {"last_val_loss": last, "last_step": last_step}
            taken = metrics["val_loss"]
            metrics["val_loss_change"] = taken / first - 1 if first and _is_number(taken) else None
        seed = step.settings.get("seed") if step else self.setting("seed")
        return {
            "recipe": self.text("recipe"),
            "family": self.text("model", "family"),
            "source": self.text("model", "source"),
            "finished": step is not None,
            "steps": max((row["step"] for row in rows), default=0),
            "seconds": step.seconds if step else max((s for _, s in finite(rows, "seconds")), default=0.0),
            "seed": seed if isinstance(seed, int) else None,
            "taken": step.details.get("taken", step.details.get("step")) if step else None,
            "settings": public(step.settings) if step else {},
            "metrics": metrics,
            "made": dict(self.trained.made) if self.trained else {},
        }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def gather(run: RunFolder) -> Material:
    """Reads a run folder. Files beside what was made are not needed: what is wrong with them is noted.

    Raises:
        ArtifactError: the record of the chain, or of what was made, is damaged.
    """
    found = Material(run)
    passes, trained = run.passes(), run.trained()
    if trained:
        found.trained = Artifact.load(trained, check=False)
    last = Artifact.load(passes[-1], check=False) if passes else found.trained
    if passes and last:
        own = {path.name: path for path in passes}
        found.chain = [_latest(step, own, found) for step in last.lineage if step.artifact in own]
    found.final = _final(run, last, found.chain) if last else None
    try:
        metrics = metrics_of(run.metrics)
        found.rows = metrics.rows
        if metrics.unread:
            count = f"{len(metrics.unread)} lines" if len(metrics.unread) > 1 else "a line"
            found.trouble.append(f"metrics.jsonl: {count} cannot be read")
    except ArtifactError as error:
        found.trouble.append(f"metrics.jsonl {error.message}")
    _read_config(run, found)
    return found


def _latest(step: Step, own: Mapping[str, Path], found: Material) -> Step:
    """As the step's folder says: it may have been made again since a later one noted it."""
    try:
        lineage = Artifact.load(own[step.artifact], check=False).lineage
    except ArtifactError as error:
        found.trouble.append(f"{step.artifact}: {error.message}")
        return step
    return lineage[-1] if lineage and lineage[-1].artifact == step.artifact else step


def _final(run: RunFolder, last: Artifact, chain: list[Step]) -> str | None:
    """The folder to open: that of the model, or of a later step that decided how it is drawn with."""
    folder = run.folder_of(last)
    names = [step.artifact for step in chain]
    later = chain[names.index(folder) + 1 :] if folder in names else chain
    return next((step.artifact for step in reversed(later) if SAMPLED in step.details), folder)


def _read_config(run: RunFolder, found: Material) -> None:
    from tunekit.config import parse

    try:
        found.config_text = read_bytes(run.config).decode("utf-8")
        tree = parse(found.config_text, run.config).tree
    except FileNotFoundError:
        return
    except (ArtifactError, ConfigError, UnicodeDecodeError) as error:
        found.trouble.append(f"config.yaml: {getattr(error, 'message', error)}")
        return
    if isinstance(tree, dict):
        found.config = tree
    elif tree is not None:
        found.trouble.append("config.yaml: is no mapping of keys to values")


def plain_number(value: Any) -> bool:
    """Whether a figure of a record is a number that can be compared and drawn."""
    return _is_number(value)


def tables(details: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The parts of a step's details that are lists of flat mappings, by name."""
    return [
        (name, value)
        for name, value in details.items()
        if isinstance(value, list) and value and all(isinstance(line, dict) for line in value)
    ]
