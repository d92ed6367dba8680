"""What a sweep tries: grids and draws, and the names of the runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from tunekit.errors import ConfigError, did_you_mean
from tunekit.sweep.file import SweepFile, as_path

Kind = Literal["grid", "choice", "uniform", "loguniform"]
DRAWS = ("choice", "uniform", "loguniform")
MOST_TRIALS = 1000
DIGITS = 3
"""Significant digits of a drawn number: so a run's name says it whole."""


@dataclass(frozen=True)
class Axis:
    """One key that is varied.

    Attributes:
        key: dotted key of the config, as overrides take it.
        kind: how its values are chosen.
        values: of a grid or a choice.
        low, high: of a draw.
        whole: whether whole numbers are drawn.
    """

    key: str
    kind: Kind
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False

    def draw(self, source: random.Random) -> Any:
        """A value of a key that is not of a grid."""
        if self.kind == "choice":
            return source.choice(self.values)
        if self.kind == "loguniform":
            value = math.exp(source.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = source.uniform(self.low, self.high)
        if self.whole:
            return min(int(self.high), max(int(self.low), round(value)))
        return min(self.high, max(self.low, float(f"{value:.{DIGITS}g}")))


def axes_of(file: SweepFile, schema: type[BaseModel]) -> list[Axis]:
    """What `over:` says.

    Raises:
        ConfigError: a key with one value, or something that is neither a list nor a draw.
    """
    return [_axis(file, key, given, schema) for key, given in file.settings.over.items()]


def _axis(file: SweepFile, key: str, given: Any, schema: type[BaseModel]) -> Axis:
    def wrong(message: str, hint: str = "") -> ConfigError:
        return ConfigError(f"{key}: {message}", where=file.where("over", key), key=key, hint=hint or None)

    path = as_path(key)
    if isinstance(given, list):
        kind: Any = "grid"
        values = given
    elif isinstance(given, dict) and len(given) == 1 and next(iter(given)) in DRAWS:
        ((kind, values),) = given.items()
    elif isinstance(given, dict):
        near = did_you_mean(str(next(iter(given), "")), DRAWS)
        known = "{choice: [...]}, {uniform: [a, b]} or {loguniform: [a, b]}"
        raise wrong(f"a draw is one of {known}" + (f"; {near}" if near else ""))
    else:
        raise wrong("one value sweeps nothing", f"give a list, or set it for all trials: {key}=...")
    if kind in ("grid", "choice"):
        if not isinstance(values, list) or len(values) < 2:
            raise wrong("one value sweeps nothing", f"give two or more, or set it for all trials: {key}=...")
        texts = [json.dumps(value, sort_keys=True) for value in values]
        twice = next((text for text in texts if texts.count(text) > 1), None)
        if twice is not None:
            raise wrong(f"{twice} is there twice")
        return Axis(path, kind, tuple(values))
    ends = values if isinstance(values, list) else []
    if len(ends) != 2 or not all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends):
        raise wrong(f"{kind} takes two numbers, [least, most]")
    low, high = ends
    if not low < high:
        raise wrong(f"{kind}: the first number must be less than the second")
    if kind == "loguniform" and low <= 0:
        raise wrong("loguniform: both numbers must be greater than 0")
    fractions = _takes_fractions(schema, path)
    whole = isinstance(low, int) and isinstance(high, int) and fractions is not True
    if fractions is False and not whole:
        raise wrong("takes whole numbers: write both ends without a point")
    return Axis(path, kind, low=low, high=high, whole=whole)


def _takes_fractions(schema: type[BaseModel], path: str) -> bool | None:
    """Whether a key of a config takes numbers with a point; None where that is not known."""
    current: list[Any] = [schema]
    for part in path.split("."):
        sections = [item for item in current if isinstance(item, type) and issubclass(item, BaseModel)]
        current = [
            leaf
            for section in sections
            if part in section.model_fields
            for leaf in _leaves(section.model_fields[part].annotation)
        ]
    return True if float in current else False if int in current else None


def _leaves(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _leaves(part)
    elif get_origin(annotation) is Annotated:
        yield from _leaves(get_args(annotation)[0])
    else:
        yield annotation


def rows(file: SweepFile, axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """The values of each trial, in order; with more trials the first ones stay as they are.

    Raises:
        ConfigError: something is drawn, and nobody says how often; or too many.
    """
    settings = file.settings
    grids = [axis for axis in axes if axis.kind == "grid"]
    count = math.prod(len(axis.values) for axis in grids)
    drawn = [axis for axis in axes if axis.kind != "grid"]
    wanted = min(count, settings.trials or count) if not drawn else settings.trials or 0
    if max(wanted, count) > MOST_TRIALS:
        message = f"over: makes {max(wanted, count):,} trials, and {MOST_TRIALS:,} is the most"
        raise ConfigError(message, where=file.where("over"), key="over")
    names = [axis.key for axis in grids]
    combined = [
        dict(zip(names, values, strict=True)) for values in itertools.product(*(a.values for a in grids))
    ]
    source = _random(settings.seed, "grid")
    if not drawn:
        if settings.trials is None or settings.trials >= len(combined):
            return combined
        source.shuffle(combined)
        return combined[: settings.trials]
    if settings.trials is None:
        key = drawn[0].key
        raise ConfigError(
            f"{key} is drawn, and trials: does not say how often", where=file.where("over"), key="trials"
        )
    found: dict[str, dict[str, Any]] = {}
    for index in range(20 * settings.trials):  # a few choices are soon all drawn
        values = {**combined[index % len(combined)]}
        for axis in drawn:
            values[axis.key] = axis.draw(_random(settings.seed, axis.key, index))
        ordered = {axis.key: values[axis.key] for axis in axes}
        found.setdefault(json.dumps(ordered), ordered)
        if len(found) == settings.trials:
            break
    return list(found.values())


def _random(*about: object) -> random.Random:
    return random.Random(hashlib.blake2b(json.dumps(about).encode(), digest_size=8).digest())


# Names ------------------------------------------------------------------------------------------------------


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """What keys are called in names of runs: adapter.rank "r", train.lr "lr", train.max_steps "ms"."""

    def last(key: str) -> str:
        return next(part for part in reversed(key.split(".")) if not part.isdigit())

    def initials(key: str) -> str:
        words = [word for word in last(key).split("_") if word]
        if len(words) > 1:
            return "".join(word[0] for word in words)
        return words[0] if len(words[0]) < 4 else words[0][0]

    for shorten in (initials, last, lambda key: key.replace(".", "_")):
        short = {key: shorten(key) for key in keys}
        if len(set(short.values())) == len(keys):
            return short
    return {key: f"{index}{last(key)}" for index, key in enumerate(keys)}


def value_text(value: Any) -> str:
    """A value in a run's name: 1e-4, 16, adamw, a hash of what is no word."""
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        plain = f"{value:.6g}"
        mantissa, _, exponent = f"{value:.5e}".partition("e")
        scientific = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
        return scientific if len(scientific) < len(plain) or "e" in plain else plain
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    slug = re.sub(r"[^\w.+]+", "_", text.rstrip("/").rpartition("/")[2]).strip("_.")
    return slug if isinstance(value, str) and slug and len(slug) <= 24 else _hash(text)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=3).hexdigest()


def run_name(sweep: str, values: Mapping[str, Any], short: Mapping[str, str]) -> str:
    """`rank-r4-lr1e-4`."""
    name = "-".join([sweep, *(f"{short[key]}{value_text(value)}" for key, value in values.items())])
    if len(name.encode()) <= 120:
        return name
    return f"{name.encode()[:110].decode('utf-8', 'ignore')}-{_hash(name)}"


def run_names(sweep: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each trial; two that would be named alike are told apart."""
    short = short_keys(list(rows[0])) if rows else {}
    names = [run_name(sweep, values, short) for values in rows]
    return [
        f"{name}-{_hash(json.dumps(values, sort_keys=True))}" if names.count(name) > 1 else name
        for name, values in zip(names, rows, strict=True)
    ]
