"""Further places that a run is logged to: TensorBoard, Weights & Biases, trackio, MLflow, through accelerate.

Nothing depends on them: what fails once a run trains is said, and the run goes on without. What they are told
of the config is what artifact.json is told: no home folders, and no folders of data.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tunekit.config import TRACKERS
from tunekit.errors import ArtifactError, ConfigError, require
from tunekit.files import write_json
from tunekit.provenance import public
from tunekit.records import read_mapping

PROJECT = "tunekit"
"""That runs are under, unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME says another."""
RECORD = "trackers.json"
"""In the run folder: by name, what a run is known as, so that one that is continued stays one there."""


@dataclass(frozen=True)
class Told:
    """What a run is, beside its figures.

    Attributes:
        name: of the run.
        folder: of the run.
        config: its sections.
        plan: of its memory, as plan.json has it; None without one.
        words: the plan in a line.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    plan: Mapping[str, Any] | None = None
    words: str = ""

    def settings(self) -> dict[str, Any]:
        """The config by dotted keys, and of the plan what a table can hold."""
        flat = _flat(public(dict(self.config)))
        if self.plan is not None:
            flat |= {
                f"plan.{key}": value
                for key, value in self.plan.items()
                if isinstance(value, str | int | float) and not isinstance(value, bool)
            }
            flat["plan.words"] = self.words
        return flat

    def text(self) -> str:
        """The plan and the config as markdown."""
        plan = f"{self.words}\n\n" if self.words else ""
        return f"{plan}```json\n{json.dumps(public(dict(self.config)), indent=2, default=str)}\n```"


class Board(Protocol):
    """One place."""

    def begin(self, step: int) -> None:
        """Open it, for a run that has made so many steps."""

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Take the figures of a step."""

    def pictures(self, found: Mapping[str, Path], step: int) -> None:
        """Take the pictures of a step, by what was asked for."""

    def end(self) -> None:
        """Close it."""


class Boards:
    """All places that a run is logged to; one that fails is left out from then on.

    Args:
        names: of `config.TRACKERS`.
        told: what the run is.
        say: takes a line about one that failed.

    Raises:
        MissingPackageError: a package is not installed.
    """

    def __init__(self, names: Sequence[str], told: Told, say: Callable[[str], None]) -> None:
        for name in names:
            require(name, extra=TRACKERS[name], why=f"train.trackers: [{name}] needs")
        self._say = say
        self._boards: dict[str, Board] = {name: KINDS[name](told) for name in names}

    def begin(self, step: int) -> None:
        """Open all.

        Raises:
            ConfigError: one cannot be opened: nobody is logged in, or a server does not answer.
        """
        for name, board in self._boards.items():
            try:
                board.begin(step)
            except Exception as error:  # a client may raise anything
                raise ConfigError(
                    f"{name} cannot be opened: {_reason(error)}",
                    hint=HINTS.get(name, "leave it out of train.trackers"),
                    key="train.trackers",
                ) from error

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of metrics.jsonl."""
        for row in rows:
            figures = {name: value for name, value in row.items() if name != "step"}
            self._each(lambda board, row=row, figures=figures: board.log(figures, int(row["step"])))  # type: ignore[misc]

    def pictures(self, found: Mapping[str, Path], step: int) -> None:
        """Previews by what was asked for."""
        self._each(lambda board: board.pictures(found, step))

    def end(self) -> None:
        """Close all."""
        self._each(lambda board: board.end())

    def _each(self, do: Callable[[Board], None]) -> None:
        for name, board in list(self._boards.items()):
            try:
                do(board)
            except Exception as error:  # a client may raise anything
                del self._boards[name]
                self._say(f"{name}: {_reason(error)}; the run goes on without it")


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


HINTS = {
    "wandb": "log in (wandb login), or set WANDB_MODE=offline and send it later with wandb sync",
    "mlflow": "MLFLOW_TRACKING_URI says where it is: a server, or sqlite:///mlflow.db",
}


# The places -------------------------------------------------------------------------------------------------


@dataclass
class _Accelerated:
    """What all that accelerate knows have in common."""

    told: Told
    tracker: Any = field(default=None, init=False)

    def log(self, row: Mapping[str, float], step: int) -> None:
        self.tracker.log(dict(row), step=step)

    def end(self) -> None:
        self.tracker.finish()


class _Tensorboard(_Accelerated):
    def begin(self, step: int) -> None:
        from accelerate.tracking import TensorBoardTracker

        # What a killed life wrote after its last checkpoint is shown no more.
        purged = {"purge_step": step + 1} if step else {}
        self.tracker = TensorBoardTracker("tensorboard", self.told.folder, **purged)
        self.tracker.start()
        if not step:
            self.tracker.log({"run": self.told.text()}, step=0)

    def pictures(self, found: Mapping[str, Path], step: int) -> None:
        import numpy as np
        from PIL import Image

        for prompt, path in found.items():
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))[None]
            self.tracker.log_images({f"preview/{prompt}": pixels}, step=step, dataformats="NHWC")


class _Wandb(_Accelerated):
    def begin(self, step: int) -> None:
        import wandb
        from accelerate.tracking import WandBTracker

        self.tracker = WandBTracker(
            os.environ.get("WANDB_PROJECT", PROJECT),
            name=self.told.name,
            id=_known_as(self.told.folder, "wandb", uuid.uuid4().hex[:12]),
            resume="allow",
            dir=str(self.told.folder),
            config=self.told.settings(),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.tracker.start()
        plan = self.told.folder / "plan.svg"
        if not step and plan.is_file():
            self.tracker.log({"plan": wandb.Html(plan.read_text(encoding="utf-8"), inject=False)}, step=0)

    def pictures(self, found: Mapping[str, Path], step: int) -> None:
        import wandb

        shown = [wandb.Image(str(path), caption=prompt) for prompt, path in found.items()]
        self.tracker.log({"previews": shown}, step=step)


class _Trackio(_Accelerated):
    def begin(self, step: int) -> None:
        from accelerate.tracking import TrackioTracker

        self.tracker = TrackioTracker(
            PROJECT, name=self.told.name, resume="allow", config=self.told.settings(), embed=False
        )
        self.tracker.start()

    def pictures(self, found: Mapping[str, Path], step: int) -> None:
        import trackio

        self.tracker.log(
            {f"preview/{prompt}": trackio.Image(str(path), caption=prompt) for prompt, path in found.items()},
            step=step,
        )


class _Mlflow(_Accelerated):
    def begin(self, step: int) -> None:
        from accelerate.tracking import MLflowTracker

        known = _known_as(self.told.folder, "mlflow")
        self.tracker = MLflowTracker(PROJECT, run_id=known or None, run_name=self.told.name)
        self.tracker.start()
        _known_as(self.told.folder, "mlflow", self.tracker.tracker.info.run_id)
        if not known:
            self.tracker.store_init_configuration(self.told.settings())
        for name in ("config.yaml", "plan.json", "plan.svg"):
            if (self.told.folder / name).is_file():
                self.tracker.log_artifact(str(self.told.folder / name))

    def pictures(self, found: Mapping[str, Path], step: int) -> None:
        for path in found.values():
            self.tracker.log_artifact(str(path), artifact_path=f"previews/step-{step:06d}")


KINDS: dict[str, Callable[[Told], Board]] = {
    "tensorboard": _Tensorboard,
    "wandb": _Wandb,
    "trackio": _Trackio,
    "mlflow": _Mlflow,
}


def _known_as(folder: Path, name: str, new: str = "") -> str:
    """What a run is known as in a place; `new`, and from now on, where it is not known there yet."""
    found: dict[str, Any] = {}
    with suppress(FileNotFoundError, ArtifactError):
        found = read_mapping(folder / RECORD)
    if isinstance(found.get(name), str):
        return str(found[name])
    if new:
        write_json(folder / RECORD, {**found, name: new})
    return new


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            plain = value is None or isinstance(value, str | int | float)
            flat[f"{prefix}{key}"] = value if plain else json.dumps(value, default=str)
    return flat
