"""What trials are compared by: a curve of metrics.jsonl, or a pass's figure of artifact.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tunekit.artifacts import RunFolder
from tunekit.config import TrainingRunConfig
from tunekit.diffusion.judges import Judges
from tunekit.errors import ConfigError, TunekitError, did_you_mean
from tunekit.passes.base import parse_chain
from tunekit.passes.metrics import Metric, declared, find_metric
from tunekit.records import finite, metrics_of
from tunekit.sweep.file import SweepFile
from tunekit.sweep.rules import Curve

CURVES = {"val_loss": False, "loss": False, "clip": True}
"""Figures of metrics.jsonl that every training may have, and whether more is better."""
RECENT = 50
"""Steps that the training loss is averaged over."""
Mode = Literal["last", "best", "mean"]


@dataclass(frozen=True)
class Figure:
    """What is compared.

    Attributes:
        name: of the figure.
        larger: whether more is better.
        curve: whether it is one of metrics.jsonl, known at many steps; else it is one of a pass.
    """

    name: str
    larger: bool
    curve: bool

    def loss(self, value: float) -> float:
        """The figure so that the smaller is the better."""
        return -value if self.larger else value


def figure_of(file: SweepFile, configs: Sequence[Any]) -> Figure:
    """What `metric:` names, once it is known that a trial can report it.

    Raises:
        ConfigError: nobody reports it, or nobody knows which is better.
    """
    asked = file.settings.asked
    name, where = asked.name, file.where("metric")

    def wrong(message: str, hint: str = "") -> ConfigError:
        return ConfigError(f"metric: {message}", where=where, hint=hint or None, key="metric")

    ours = all(isinstance(config, TrainingRunConfig) for config in configs)
    known = find_metric(name) if any(metric.covers(name) for metric in declared()) else None
    if known is None:
        if name not in CURVES and not name.startswith("loss_") and (ours or asked.goal is None):
            names = [*CURVES, *(metric.name for metric in declared())]
            near = did_you_mean(name.replace(" ", "_"), names)
            raise wrong(
                f'no trial reports "{name}"' + (f"; {near}" if near else ""),
                f"known: {', '.join(sorted(names))}; of your own recipe say which is better:"
                f" metric: {{name: {name}, goal: min}}",
            )
        if name == "val_loss" and ours:
            _validated(configs, wrong)
        if name == "clip" and ours:
            _scored(configs, wrong)
        larger = asked.goal == "max" if asked.goal else CURVES.get(name, False)
        return Figure(name, larger, curve=True)
    measured = [metric for config in configs for metric in _measured(config)]
    if not any(metric.covers(name) for metric in measured):
        passes = sorted(_passes_of(known))
        raise wrong(
            f"no trial reports {name}: no pass of optimize: measures it",
            f"passes that do: {', '.join(passes)}",
        )
    if asked.goal is None and known.lower_is_better is None:
        raise wrong(f"whether more or less of {name} is better is not known", f"{{name: {name}, goal: max}}")
    larger = asked.goal == "max" if asked.goal else known.lower_is_better is False
    return Figure(name, larger, curve=False)


def _validated(configs: Sequence[Any], wrong: Any) -> None:
    if all(config.data.validation is None for config in configs):  # each recipe declares its own data
        raise wrong("no trial reports val_loss: there are no held-out pictures", "set data.validation")


def _scored(configs: Sequence[Any], wrong: Any) -> None:
    for config in configs:
        named = config.preview.clip_model
        if not config.preview.prompts:
            raise wrong("no trial reports clip: there are no previews", "set preview.prompts")
        if named is None:
            raise wrong(
                "no trial reports clip: no CLIP scores the previews",
                "set preview.clip_model to the folder of one, as transformers saves it",
            )
        if lacking := Judges.of_previews(named).lack():
            raise wrong(f"clip {lacking}")


def _measured(config: Any) -> Iterable[Metric]:
    return [metric for step in parse_chain(getattr(config, "optimize", [])) for metric in step.metrics]


def _passes_of(metric: Metric) -> Iterable[str]:
    from tunekit.registry import PASSES

    return (kind for kind, cls in PASSES.items() if any(other.name == metric.name for other in cls.metrics))


# Reading ----------------------------------------------------------------------------------------------------


@dataclass
class Reading:
    """What a run has reported so far; files are read again only when they have changed.

    Attributes:
        folder: of the run.
        figure: what is compared.
        mode: how a curve is read: its last figure, its best so far, or the mean of the last steps.
        last: the step that it would end at.
    """

    folder: Path
    figure: Figure
    mode: Mode = "last"
    last: int | None = None
    points: dict[int, float] = field(default_factory=dict)
    """By step, as reported, or as the mode has it."""
    seconds: float = 0.0
    step: int = 0
    measured: float | None = None
    """A pass's figure, once the run is over."""
    _stamp: tuple[int, int] = (-1, -1)

    @classmethod
    def of(cls, config: Any, figure: Figure) -> Reading:
        """Of a trial's config."""
        train = getattr(config, "train", None)
        last = getattr(train, "max_steps", None)
        if figure.name == "loss":
            mode: Mode = "mean"
        else:
            best = getattr(config, "final", "last") == "best" and figure.name != "clip"  # chosen by another
            mode = "best" if best else "last"
        return cls(config.run_dir, figure, mode, last)

    def look(self) -> None:
        """Reads metrics.jsonl, if it is another."""
        path = RunFolder(self.folder).metrics
        try:
            found = path.stat()
        except OSError:
            self.points, self.step, self._stamp = {}, 0, (-1, -1)
            return
        stamp = (found.st_mtime_ns, found.st_size)
        if stamp == self._stamp:
            return
        try:
            rows = metrics_of(path).rows
        except TunekitError:  # it may be whole again at the next look
            return
        self._stamp = stamp
        self.step = int(rows[-1]["step"]) if rows else 0
        self.seconds = max((value for _, value in finite(rows, "seconds")), default=0.0)
        reported = [(step, value) for step, value in finite(rows, self.figure.name) if step]
        self.points = self._as_compared(reported) if self.figure.curve else {}

    def _as_compared(self, reported: list[tuple[int, float]]) -> dict[int, float]:
        points: dict[int, float] = {}
        choose = max if self.figure.larger else min
        so_far: list[float] = []
        for step, value in reported:
            so_far.append(value)
            if self.mode == "best":
                so_far = [choose(so_far)]
            so_far = so_far[-RECENT:]
            points[step] = sum(so_far) / len(so_far) if self.mode == "mean" else so_far[-1]
        return points

    def curve(self, *, ended: bool) -> Curve:
        """For the rules."""
        return Curve({step: self.figure.loss(value) for step, value in self.points.items()}, ended, self.last)

    def value(self, until: int | None = None) -> tuple[float | None, int]:
        """The trial's figure, and the step that it is of; None while it has none.

        Args:
            until: the step at which it was stopped.
        """
        if not self.figure.curve:
            return self.measured, self.step
        steps = [step for step in self.points if until is None or step <= until]
        return (self.points[max(steps)], max(steps)) if steps else (None, self.step)

    def settle(self) -> None:
        """Reads what there is of a run that is over: the last pass that has measured the figure counts."""
        self.look()
        if self.figure.curve:
            return
        self.measured = None
        with suppress(TunekitError, OSError):  # that it has none is told
            for step in RunFolder(self.folder).final(check=False).lineage:
                value = step.metrics.get(self.figure.name)
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self.measured = float(value)
