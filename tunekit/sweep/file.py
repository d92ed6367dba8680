"""The sweep file: its keys, checked against the recipe of the config that it names."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tunekit.config import (
    COMMAND_LINE,
    Count,
    Document,
    Key,
    Loaded,
    PathText,
    Section,
    Seed,
    Steps,
    find_config,
    idle,
    load,
    read,
    refuse,
    validate,
)
from tunekit.errors import ConfigError, did_you_mean
from tunekit.resources import expand, sweep_names, sweeps_dir

NAME = re.compile(r"\w[\w.+=-]*")
OWN = ("name", "runs", "recipe", "extends")
"""Keys of a run that a sweep sets itself, or that make it another recipe's."""


class MetricConfig(Section):
    """What is compared."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    """val_loss or loss of metrics.jsonl, or a pass's figure, such as psnr_db or speedup."""
    goal: Literal["min", "max"] | None = None
    """Which is better; null where it is known."""


class RuleConfig(Section):
    """When a trial is stopped early."""

    grace: Steps | None = None
    """Steps that every trial is given; null is a tenth of train.max_steps."""


class MedianConfig(RuleConfig):
    """Stops what is worse than the median of the trials before it, at the same step."""

    trials: Annotated[int, Field(ge=1, le=1000)] = 3
    """Trials before it that have come to that step, at least."""


class AshaConfig(RuleConfig):
    """Stops at steps grace, grace x factor, ... what is not among the best of the trials before it."""

    factor: Annotated[int, Field(ge=2, le=100)] = 3
    """One of so many goes on."""


class StopConfig(Section):
    """One of the rules."""

    median: MedianConfig | None = None
    """Against the median."""
    asha: AshaConfig | None = None
    """Successive halving."""

    @model_validator(mode="after")
    def _one(self) -> StopConfig:
        if (self.median is None) == (self.asha is None):
            refuse("must be one of median, asha")
        return self


class SweepConfig(Section):
    """A sweep file."""

    config: PathText
    """The config that is varied: a path, from this file or from here, or the name of a ready-made one."""
    name: Annotated[str, Field(max_length=60)] = "sweep"
    """First part of the names of the runs; the default is the file's name."""
    over: Annotated[dict[str, Any], Field(min_length=1, max_length=20)]
    """By dotted key of the config: a list to try all of, or one of {choice: [...]}, {uniform: [a, b]},
    {loguniform: [a, b]} to draw from."""
    metric: str | MetricConfig = "val_loss"
    """What is compared: a name, or {name: ..., goal: min or max}."""
    stop: Literal["median", "asha"] | StopConfig | None = None
    """When a trial is stopped early; null lets all end."""
    trials: Count | None = None
    """Trials at most; required where something is drawn."""
    minutes: Annotated[float, Field(gt=0, le=10_000_000)] | None = None
    """Minutes at most, over all lives of the sweep."""
    seed: Seed = 0
    """All draws follow from it."""
    proposer: Literal["random", "optuna"] = "random"
    """Who chooses what is tried: optuna learns from the trials before. Needs the extra sweep."""

    @field_validator("name")
    @classmethod
    def _a_name(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            refuse("must begin with a letter or a digit, and go on with these or . + = - _")
        return value

    @model_validator(mode="after")
    def _effects(self) -> SweepConfig:
        if self.proposer == "optuna" and self.trials is None:
            idle("proposer", "it needs to know how many trials there may be (trials)")
        return self

    @property
    def asked(self) -> MetricConfig:
        """The metric, as a section."""
        return MetricConfig(name=self.metric) if isinstance(self.metric, str) else self.metric

    @property
    def rule(self) -> MedianConfig | AshaConfig | None:
        """How trials are stopped."""
        if self.stop is None or isinstance(self.stop, str):
            return MedianConfig() if self.stop == "median" else AshaConfig() if self.stop else None
        return self.stop.median or self.stop.asha


@dataclass(frozen=True)
class SweepFile:
    """A sweep file that was read.

    Attributes:
        settings: what it says.
        document: its values and their places.
        config: the file of the config that is varied.
        overrides: for every trial, from the command line.
    """

    settings: SweepConfig
    document: Document
    config: Path
    overrides: tuple[str, ...] = ()

    def where(self, *key: str) -> str:
        """The place of a key."""
        return self.document.where(key)

    def load(self, values: dict[str, Any], *named: str) -> tuple[Loaded, list[str]]:
        """The config of a trial, and its overrides.

        Raises:
            ConfigError: what is wrong stands at the key in the sweep file that it comes from.
        """
        own = [f"{as_path(key)}={as_text(value)}" for key, value in values.items()]
        overrides = [*self.overrides, *own, *named]
        try:
            return load(self.config, overrides), overrides
        except ConfigError as error:
            raise self._placed(error, values) from None

    def _placed(self, error: ConfigError, values: dict[str, Any]) -> ConfigError:
        """An error of a config, with the places of the keys that the sweep sets."""
        lines, parts = [], []
        for part in error.parts or (error,):
            key = next((key for key in values if _covers(key, part.key)), None)
            if part.where == COMMAND_LINE and (key or len(values) == 1):
                key = key or next(iter(values))
                place = self.where("over", key)
                made = ConfigError(part.message, where=place, key=part.key or key, hint=part.hint)
                shown = f"{place}: {key}: {part.message.removeprefix(f'{key}: ')}"
                lines.append(f"{shown}; it was {as_text(values[key])}" if "unknown" not in shown else shown)
            else:
                made = ConfigError(part.message, where=part.where, key=part.key, hint=part.hint)
                lines.append(f"{part.where}: {part.key}: {part.message}" if part.key else str(part))
            parts.append(made)
        return ConfigError("\n".join(dict.fromkeys(lines)), parts=parts)


def _covers(key: str, other: str) -> bool:
    one, two = as_path(key), as_path(other)
    return bool(two) and (one == two or two.startswith(f"{one}.") or one.startswith(f"{two}."))


def as_path(key: str) -> str:
    """A dotted key as overrides take it: `optimize[0].prune.ratio` is `optimize.0.prune.ratio`."""
    return re.sub(r"\[(\d+)\]", r".\1", key)


def as_text(value: Any) -> str:
    """A value as overrides take it."""
    return json.dumps(value, ensure_ascii=False)


def read_sweep(path: str | Path, overrides: Sequence[str] = ()) -> SweepFile:
    """Reads a sweep file, or a ready-made one by its name; its config is found, and not yet loaded.

    Raises:
        ConfigError: one that lists everything that is wrong, each with file and line.
    """
    own = sweeps_dir()
    file = next((file for file in (expand(path), own / f"{path}.yaml", own / path) if file.is_file()), None)
    if file is None:
        others = [str(other) for other in expand(path).parent.glob("*.yaml")]
        near = did_you_mean(str(path), [*others, *sweep_names()])
        hint = near or "give the path of a YAML file, or a name that `tunekit ls` shows"
        raise ConfigError(f'there is no sweep file "{path}"', hint=hint)
    document = read(file)
    if "over" not in document.tree and ("recipe" in document.tree or "train" in document.tree):
        raise ConfigError(
            "is the config of a run, not of a sweep", where=str(path), hint="a sweep has config: and over:"
        )
    document.tree.setdefault("name", file.stem)
    settings = validate(SweepConfig, document.tree, document.where)
    for key in settings.over:
        if as_path(key).split(".")[0] in OWN:
            raise ConfigError(
                f"{key}: is not for a sweep to vary: it names the runs itself, all of one recipe",
                where=document.where(("over", key)),
                key=key,
            )
    swept = {as_path(key) for key in settings.over}
    for text in overrides:
        given = as_path(text.partition("=")[0])
        if given in swept or given in OWN[:1]:
            why = "the sweep varies it" if given in swept else "a sweep names its runs itself"
            raise ConfigError(f"{given}: {why}", where=COMMAND_LINE, key=given, hint="leave it out")
    beside = file.parent / expand(settings.config)
    try:
        config = beside if beside.is_file() else find_config(settings.config)
    except ConfigError as error:
        place: Key = ("config",)
        raise ConfigError(
            f"config: {error.message}", where=document.where(place), hint=error.hint, key="config"
        ) from None
    return SweepFile(settings, document, config, tuple(overrides))
