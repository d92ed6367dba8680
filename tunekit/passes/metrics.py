"""What passes measure: each figure is declared once, with its unit and where it is shown.

A pass lists its own in `Pass.metrics`; lines (`describe_metrics`), tables and the report read them there. A
figure's name carries its unit. `<name>_<what>` is the same figure of a part, or of another moment:
`relative_error_unet`, `parameters_before`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from tunekit.units import format_bytes, format_count

Value = float | int | bool | str | None


@dataclass(frozen=True)
class Tile:
    """A place among the report's first figures, for the last model of a chain.

    Attributes:
        title: of two figures with the same title, the first that is there takes the place.
        note: what stands below; a part that names a figure, as in "SSIM {ssim}", is left out without it.
        compared: shows the share of the first model's figure, and both below.
    """

    title: str
    note: tuple[str, ...] = ()
    compared: bool = False


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        name: in artifact.json.
        title: for people.
        unit: of the number.
        lower_is_better: None where neither is.
        form: how a number without a unit is written.
        rank: order in lines and tables; figures of equal rank follow as they come.
        column: head of its column in the report's table; empty for none.
        under: the figure in whose cell of that table it stands, in small; of a flag, its title, where it is
            true.
        small: how it is written there.
        tile: its place among the first figures.
        bars: in tables of details it is drawn as well, beside the largest of its column.
    """

    name: str
    title: str
    unit: Literal["", "bytes", "count", "ms", "dB", "x"] = ""
    lower_is_better: bool | None = None
    form: str = ".3g"
    rank: int = 100
    column: str = ""
    under: str = ""
    small: str = "{}"
    tile: Tile | None = None
    bars: bool = False

    def format(self, value: Value) -> str:
        """A value of it, with its unit."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return str(value)
        if self.unit == "bytes":
            return format_bytes(value)
        if self.unit == "count":
            return format_count(value)
        if self.unit in ("ms", "dB"):
            return f"{value:.1f} {self.unit}"
        if self.unit == "x":
            return f"{value:.2f}x"
        return str(value) if isinstance(value, int) else f"{value:{self.form}}"

    def covers(self, name: str) -> bool:
        """Whether `name` is this figure, or the same of a part or of another moment."""
        return name == self.name or name.startswith(f"{self.name}_")


SIZE = Metric(
    "size_bytes",
    "size",
    "bytes",
    lower_is_better=True,
    rank=10,
    column="size on disk",
    tile=Tile("size of the last model", compared=True),
)
PARAMETERS = Metric(
    "parameters",
    "parameters",
    "count",
    lower_is_better=True,
    rank=11,
    under="size_bytes",
    small="{} parameters",
)
RELATIVE_ERROR = Metric(
    "relative_error", "relative error", lower_is_better=True, rank=60, column="rel. error"
)
PSNR = Metric(
    "psnr_db",
    "PSNR",
    "dB",
    lower_is_better=False,
    rank=70,
    column="PSNR",
    tile=Tile("fidelity of the last model", ("SSIM {ssim}",)),
)
SSIM = Metric("ssim", "SSIM", lower_is_better=False, form=".4f", rank=71, column="SSIM")
LPIPS = Metric("lpips", "LPIPS", lower_is_better=True, form=".4f", rank=72)
CLIP_DROP = Metric("clip_drop", "drop of the CLIP score", lower_is_better=True, form=".4f", rank=73)


@cache
def declared() -> tuple[Metric, ...]:
    """All figures of all passes, in the order they are shown."""
    from tunekit.registry import PASSES

    found: dict[str, Metric] = {metric.name: metric for _, cls in PASSES.items() for metric in cls.metrics}
    return tuple(sorted(found.values(), key=lambda metric: metric.rank))


def find_metric(name: str) -> Metric:
    """The declaration of a figure; of one that nobody declared, its name says what there is to say."""
    found = max(
        (metric for metric in declared() if metric.covers(name)),
        key=lambda metric: len(metric.name),
        default=None,
    )
    return found or Metric(name, name.replace("_", " "))


def format_metric(name: str, value: Value) -> str:
    """A figure with its unit."""
    return find_metric(name).format(value)


def describe_metrics(metrics: Mapping[str, Value]) -> str:
    """Figures in one line, first those that a person looks at first: "size 21.3 MiB, PSNR 43.1 dB".

    Of a flag, its title is enough where it is true.
    """
    known = [metric.name for metric in declared() if metric.name in metrics]
    return ", ".join(
        _title(name) if value is True else f"{_title(name)} {format_metric(name, value)}"
        for name in dict.fromkeys([*known, *metrics])
        if (value := metrics[name]) is not None and value is not False
    )


def _title(name: str) -> str:
    metric = find_metric(name)
    return metric.title + name.removeprefix(metric.name).replace("_", " ")
