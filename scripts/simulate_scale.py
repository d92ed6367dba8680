#!/usr/bin/env python3
"""How a training grows with cards: time, pictures per second, cost, where it stops. Nothing is trained.

    scripts/simulate_scale.py predict --run runs/mine     # of what a run of yours took on one card
    scripts/simulate_scale.py predict --run runs/mine --cards 1,2,4,8 price_per_card_hour=2.5 between=25gbe
    scripts/simulate_scale.py predict --published sdxl-h100 --batch-size 64 --json a.json --svg a.svg
    scripts/simulate_scale.py assumptions                 # every one, with where it comes from
    scripts/simulate_scale.py validate WORK               # predicts two processes here, and runs them
    scripts/simulate_scale.py table                       # benchmarks/scale.md of benchmarks/scale.json

What a run measured: seconds of a step (metrics.jsonl, without pauses), how they vary, what checkpoints and
previews took beside them, and what is trained (plan.json). Two runs that differ in train.batch_size tell what
of a step does not shrink with its pictures; of one, all of it is taken to. All else is assumed, can be set
(`key=value`, or --assume FILE.yaml), and is listed with its source below the table.

The same batch over more cards is the same training (train.batch_size is that of all processes): that is what
is predicted. --weak lets the batch grow with the cards, which makes it another training. --shard counts
weights that are spread over the cards (memory.sharding=full: FSDP2) and gathered for each pass.

A step of a card that has k pictures: a + b k. All cards wait for the slowest: times are normal around that,
with the share `straggler_cv`, and the largest of N draws is what is expected. Gradients are summed over a
ring inside each node, and over one between nodes: 2 (n - 1) / n of the bytes over the link, 2 (n - 1) times
its latency. What the first process does alone (checkpoints, previews) does not shrink. Nodes fail after
`mtbf_hours` each: a failure costs `restart_seconds` and half of the time between two checkpoints.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tunekit.artifacts import RECORD
from tunekit.errors import ConfigError, TunekitError, did_you_mean
from tunekit.report.curve import Line, chart
from tunekit.units import format_bytes

ROOT = Path(__file__).resolve().parent.parent
FILE, TABLE = ROOT / "benchmarks" / "scale.json", ROOT / "benchmarks" / "scale.md"
CARDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
FIRST = 5
"""Steps of a run that do not count."""
LEAST = 0.5
"""Efficiency below which it is said to have stopped."""


# What is assumed --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """How bytes come from one card to the next.

    Attributes:
        bytes_s: nominal, in one direction.
        latency_s: of one hop of a ring.
        source: where both are from.
    """

    bytes_s: float
    latency_s: float
    source: str


NCCL = "https://github.com/NVIDIA/nccl/blob/master/src/graph/tuning.cc"
H100 = "https://www.nvidia.com/en-us/data-center/h100/"
A100 = "https://www.nvidia.com/en-us/data-center/a100/"
CONNECTX = "https://docs.nvidia.com/networking/display/ConnectX7VPI/Introduction"
# Makers count both directions of NVLink and PCI Express; a ring sends in one. Latencies are those that NCCL's
# own model has for a hop of its ring (protocol Simple): NVLink 3.4, PCI 5.7, network 9.6 microseconds.
LINKS = {
    "nvlink4": Link(450e9, 3.4e-6, H100),
    "nvlink3": Link(300e9, 3.4e-6, A100),
    "pcie5": Link(64e9, 5.7e-6, H100),
    "pcie4": Link(32e9, 5.7e-6, A100),
    **{f"{speed}gbe": Link(speed / 8 * 1e9, 9.6e-6, CONNECTX) for speed in (25, 50, 100, 200, 400)},
}


@dataclass(frozen=True)
class Assumption:
    """One figure that was not measured: its value, and who says so."""

    value: Any
    unit: str
    source: str


OURS, YOURS = "assumed", "for you to say"
DEFAULTS: dict[str, Assumption] = {
    "cards_per_node": Assumption(8, "", "the usual server with NVLink"),
    "inside": Assumption("nvlink4", "link", f"{H100}, latency {NCCL}"),
    "between": Assumption("400gbe", "link of a node", f"{CONNECTX}, latency {NCCL}"),
    "link_share": Assumption(0.78, "of its nominal speed", f"235 of NVLink 3's 300 GB/s in {NCCL}"),
    "call_seconds": Assumption(8.4e-6, "s per collective", NCCL),
    "overlap": Assumption(0.0, "of all-reduce hidden behind backward", f"{OURS}: none, which is the worst"),
    "straggler_cv": Assumption(0.02, "of a step, normal", OURS),
    "gradient_bytes": Assumption(4, "bytes per trained weight", "gradients of what is trained are float32"),
    "weight_bytes": Assumption(2, "bytes per gathered weight", "bf16, with --shard"),
    "price_per_card_hour": Assumption(None, "", YOURS),
    "mtbf_hours": Assumption(None, "h per node", f"{YOURS}; null: nothing fails"),
    "restart_seconds": Assumption(120.0, "s per failure", OURS),
    "checkpoint_every": Assumption(
        200, "steps, of what has not been run", "train.checkpoint_every's default"
    ),
    "disk_gb_s": Assumption(None, "GB/s of the shared disk", f"{YOURS}; null: it is never waited for"),
    "picture_bytes": Assumption(None, "bytes read per picture and step", f"{YOURS}, with disk_gb_s"),
    "encode_seconds": Assumption(None, "s per picture, once", f"{YOURS}; null: encoded already"),
    "pictures": Assumption(None, "pictures to encode", f"{YOURS}, with encode_seconds"),
}


@dataclass(frozen=True)
class Assumptions:
    """All of them; what was set stands under `given`."""

    values: Mapping[str, Any]
    given: frozenset[str] = frozenset()

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Assumptions:
        """The defaults, with what is given over them.

        Raises:
            ConfigError: an unknown key, or a value that cannot be.
        """
        for key, value in given.items():
            if key not in DEFAULTS:
                hint = did_you_mean(key, DEFAULTS) or f"known: {', '.join(DEFAULTS)}"
                raise ConfigError(f"{key}: no such assumption", hint=hint, key=key)
            _check(key, value)
        values = {key: given.get(key, known.value) for key, known in DEFAULTS.items()}
        for key, with_ in (("picture_bytes", "disk_gb_s"), ("pictures", "encode_seconds")):
            if (values[key] is None) != (values[with_] is None):
                lacking, other = (key, with_) if values[key] is None else (with_, key)
                raise ConfigError(f"{other} has no effect without {lacking}", key=other)
        return cls(values, frozenset(given))

    def link(self, name: str) -> Link:
        """`inside` or `between`, as fast as it is in practice."""
        found = _link(self.values[name])
        return replace(found, bytes_s=found.bytes_s * float(self.link_share))

    def listed(self) -> list[dict[str, Any]]:
        """For the JSON and the lines below a table."""
        return [
            {
                "key": key,
                "value": self.values[key],
                "unit": known.unit,
                "source": "given" if key in self.given else known.source,
            }
            for key, known in DEFAULTS.items()
        ]


SHARES = ("link_share", "overlap")


def _check(key: str, value: Any) -> None:
    def wrong(message: str, hint: str | None = None) -> ConfigError:
        return ConfigError(f"{key}: {message}", key=key, hint=hint)

    if key in ("inside", "between"):
        _link(value)
        return
    if value is None and DEFAULTS[key].value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise wrong(f"must be a number, not {value!r}")
    if key in SHARES and not 0 <= value <= 1:
        raise wrong("is a share, from 0 to 1")
    least = 0 if key in ("straggler_cv", "call_seconds", "restart_seconds", *SHARES) else 1e-12
    if value < least or (key == "link_share" and value == 0):
        raise wrong(f"must be more than 0, not {value:g}" if least else f"must not be less than 0: {value:g}")
    if key == "cards_per_node" and value != int(value):
        raise wrong("is a whole number")


def _link(value: Any) -> Link:
    if isinstance(value, str) and value in LINKS:
        return LINKS[value]
    if (
        isinstance(value, dict)
        and set(value) == {"gb_s", "latency_us"}
        and all(isinstance(one, int | float) and one > 0 for one in value.values())
    ):
        return Link(1e9 * value["gb_s"], 1e-6 * value["latency_us"], "given")
    near = did_you_mean(str(value), LINKS)
    raise ConfigError(
        f"no such link: {value}", hint=near or f"known: {', '.join(LINKS)}; or {{gb_s: 25, latency_us: 5}}"
    )


# What is measured -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pause:
    """Something beside the steps.

    Attributes:
        what: "checkpoint".
        seconds: of one.
        every: steps between two.
        shared: whether processes share the work; else the first does it, and the others wait.
    """

    what: str
    seconds: float
    every: float
    shared: bool = False


@dataclass(frozen=True)
class Costs:
    """What one card takes.

    Attributes:
        what: in words.
        kind: "measured" here, or "published" by somebody else.
        source: the run folders, or a page.
        batch_size: of all cards.
        fixed: seconds of a step that do not depend on its pictures.
        each: seconds per picture and step.
        trained: weights that are learned.
        weights: of the denoiser, for --shard.
        adapter: whether what is learned is an adapter, which every card has whole, beside a frozen base.
        micro_batch: pictures of one forward at most; None is all of a card's.
        pauses: beside the steps.
        cv: how much the times of steps vary, as a share; None where nobody has measured it.
        notes: what its figures rest on.
    """

    what: str
    kind: str
    source: str
    batch_size: int
    fixed: float
    each: float
    trained: int
    weights: int = 0
    adapter: bool = True
    micro_batch: int | None = None
    pauses: tuple[Pause, ...] = ()
    cv: float | None = None
    notes: tuple[str, ...] = ()

    def step(self, pictures: float) -> float:
        """Seconds of a card's step of so many pictures."""
        return self.fixed + self.each * pictures


def line_through(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(a, b) of seconds = a + b pictures, by least squares, neither below 0; through 0 for one point."""
    counts = {count for count, _ in points}
    if len(counts) == 1:
        (count,) = counts
        return 0.0, statistics.mean(seconds for _, seconds in points) / count
    fitted = statistics.linear_regression(*zip(*points, strict=True))
    if fitted.intercept >= 0 and fitted.slope > 0:
        return fitted.intercept, fitted.slope
    if fitted.slope <= 0:  # nothing is left that shrinks
        return statistics.mean(seconds for _, seconds in points), 0.0
    return 0.0, sum(n * t for n, t in points) / sum(n * n for n, _ in points)


def of_runs(folders: Sequence[Path]) -> Costs:
    """What runs on one process have measured; all of one config, apart from train.batch_size.

    Raises:
        ConfigError: one is no run that has trained, or has too few steps.
    """
    found = [_read_run(folder) for folder in folders]
    points = [(float(run.batch), statistics.median(run.seconds)) for run in found]
    fixed, each = line_through(points)
    largest = max(found, key=lambda run: run.batch)
    config, plan = largest.config, largest.plan
    learned = "all weights" if config.get("adapter") is None else config["adapter"]["kind"]
    device = plan["device"] if plan else config["memory"]["device"]
    notes: tuple[str, ...] = ()
    if len({count for count, _ in points}) == 1:
        notes = ("one batch size was measured: a step is taken to shrink with its pictures to nothing",)
    return Costs(
        what=f"{config['model']['source']}, {learned}, batch {largest.batch}, on {device}",
        kind="measured",
        source=", ".join(str(folder) for folder in folders),
        batch_size=largest.batch,
        fixed=fixed,
        each=each,
        trained=largest.trained,
        weights=_held(plan, "base weights", "weights") // _width(plan) if plan else 0,
        adapter=config.get("adapter") is not None,
        micro_batch=(plan or config)["memory"]["micro_batch"],
        pauses=tuple(pauses_of(config, largest.rows, largest.batch)),
        cv=variation(largest.seconds),
        notes=notes,
    )


@dataclass(frozen=True)
class _Read:
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    plan: dict[str, Any] | None
    batch: int
    seconds: list[float]
    trained: int


def _read_run(folder: Path) -> _Read:
    import yaml

    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        planned = folder / "plan.json"
        plan = json.loads(planned.read_text(encoding="utf-8")) if planned.is_file() else None
        batch = int(config["train"]["batch_size"])
        made = next(
            (path for name in ("adapter", "model") if (path := folder / name / RECORD).is_file()), None
        )
        if made is not None:
            lineage = json.loads(made.read_text(encoding="utf-8"))["lineage"]
            trained = next(int(step["metrics"]["parameters"]) for step in lineage if step["kind"] == "train")
        else:  # it has not ended
            trained = _held(plan, "gradients") // 4 if plan else 0
    except FileNotFoundError as error:
        raise ConfigError(
            f"{folder} is no run that has trained: it has no {Path(error.filename).name}"
        ) from error
    except (ValueError, KeyError, TypeError, StopIteration, yaml.YAMLError) as error:
        raise ConfigError(f"{folder} cannot be read as a run: {error!r}") from error
    seconds = step_seconds(rows, batch)
    if len(seconds) < 4:
        raise ConfigError(f"{folder} has {len(seconds)} steps: too few to measure by", hint="run it longer")
    return _Read(config, rows, plan, batch, seconds, trained)


def step_seconds(rows: Iterable[Mapping[str, Any]], batch: int) -> list[float]:
    """Seconds of each step, without what was done between steps.

    The first are left out: they warm up, and on a CPU their memory is measured, which takes time.
    """
    rates = [float(row["samples_per_second"]) for row in rows if row.get("samples_per_second")]
    return [batch / rate for rate in rates][min(FIRST, len(rates) // 2) :]


def variation(seconds: Sequence[float]) -> float:
    """Standard deviation over median, by quartiles, so that a pause here and there counts for nothing."""
    first, middle, third = statistics.quantiles(seconds, n=4)
    return (third - first) / 1.349 / middle


def pauses_of(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], batch: int) -> list[Pause]:
    """What was done between steps, by what was due: a row's time less that of the one before and its step.

    What comes after a step stands in the time of the next one. Where several things were due at once, what is
    known of one alone is taken off first.
    """
    train, preview = config["train"], config.get("preview") or {}
    every = {
        "checkpoint": train.get("checkpoint_every"),
        "validation": train.get("validate_every"),
        "preview": preview.get("every") if preview.get("prompts") else None,
        "kept adapter": train.get("save_every"),  # with its previews
    }
    steps = [row for row in rows if row.get("samples_per_second")]
    known: dict[str, Pause] = {}
    seen: dict[tuple[str, ...], list[float]] = {}
    for before, after in itertools.pairwise(steps):
        due = tuple(what for what, n in every.items() if n and before["step"] % n == 0)
        if due:
            spent = after["seconds"] - before["seconds"] - batch / after["samples_per_second"]
            seen.setdefault(due, []).append(max(0.0, spent))
    for due in sorted(seen, key=len):
        taken = {id(pause): pause for what in due if (pause := known.get(what))}
        if new := [what for what in due if what not in known]:
            spent = statistics.median(seen[due]) - sum(pause.seconds for pause in taken.values())
            # Of what is always due together nobody can tell which took how long.
            made = Pause(
                " + ".join(new), max(0.0, spent), max(every[what] for what in new), new == ["validation"]
            )
            known |= dict.fromkeys(new, made)
    return list({id(pause): pause for pause in known.values()}.values())


def _held(plan: Mapping[str, Any], *names: str) -> int:
    ledgers = [phase["ledger"] for phase in plan["phases"].values()]
    return max((int(ledger[name]) for ledger in ledgers for name in names if name in ledger), default=0)


def _width(plan: Mapping[str, Any]) -> int:
    return 4 if plan["memory"]["precision"] == "fp32" else 2


@dataclass(frozen=True)
class Published:
    """Seconds of a step that somebody else has measured on one card."""

    what: str
    family: str
    seconds: float
    pictures: int
    source: str
    rank: int | None = 16
    notes: tuple[str, ...] = ()


SWEEP = (
    "https://github.com/bghira/SimpleTuner/blob/main/documentation/experimental/SEGMENTED_CHECKPOINTING.md"
)
THIRD = "all weights: 3 parts of arithmetic (forward, backward for inputs and for weights) to a LoRA's 2"
PUBLISHED = {
    "sd15-h100": Published("SD 1.5, LoRA r16, 512 px, H100", "sd15", 0.181, 1, SWEEP),
    "sdxl-h100": Published(
        "SDXL, LoRA r16, 1024 px, H100", "sdxl", 0.606, 1, SWEEP, notes=("theirs is a LoKr of factor 12",)
    ),
    "sdxl-l40s": Published(
        "SDXL, LoRA r16, 1024 px, L40S", "sdxl", 0.585, 1, SWEEP, notes=("theirs is a LoKr of factor 12",)
    ),
    "zimage-h100": Published("Z-Image Turbo, LoRA r16, 1024 px, H100", "zimage", 0.243, 1, SWEEP),
    "sdxl-all-h100": Published(
        "SDXL, all weights, 1024 px, H100",
        "sdxl",
        0.606 * 1.5,
        1,
        SWEEP,
        None,
        (THIRD, "step time is theirs x 1.5"),
    ),
}
ALONE = (
    "their step of one picture is taken for what each of a batch takes; an L40S is as fast there, so that it"
    " may wait for kernels to be launched, and more pictures at once may be faster than that"
)


def of_published(name: str, batch_size: int | None) -> Costs:
    """Seconds by somebody else, weights by the family's facts."""
    one = PUBLISHED[name]
    weights, layers = _weights(one.family)
    trained = weights if one.rank is None else one.rank * layers
    return Costs(
        what=one.what,
        kind="published",
        source=one.source,
        batch_size=batch_size or one.pictures,
        fixed=0.0,
        each=one.seconds / one.pictures,
        trained=trained,
        weights=weights,
        adapter=one.rank is not None,
        micro_batch=one.pictures,
        notes=(ALONE, *one.notes),
    )


def _weights(name: str) -> tuple[int, int]:
    """Weights of a family's denoiser, and inputs + outputs of the layers that its usual LoRA adapts."""
    from torch import nn

    from tunekit import families

    facts = families.planned(name).facts
    part = next(part for part in facts.components if part.name == facts.denoiser_name)
    denoiser = part.build()
    sides = [
        sum(layer.weight.shape[:2])
        for path, layer in denoiser.named_modules()
        if isinstance(layer, nn.Linear) and any(path.endswith(f".{target}") for target in facts.lora_targets)
    ]
    return sum(weight.numel() for weight in denoiser.parameters()), sum(sides)


# The model --------------------------------------------------------------------------------------------------


def slowest(count: int) -> float:
    """Expected largest of `count` draws from a standard normal: 0, 0.564, 0.846, ...; by integration."""
    if count < 2:
        return 0.0
    low, high, parts = -9.0, 9.0, 3600
    width = (high - low) / parts

    def below(z: float) -> float:
        return float((0.5 * math.erfc(-z / math.sqrt(2))) ** count)

    # E = integral of (1 - F) above 0, less that of F below 0.
    total = 0.0
    for index in range(parts):
        z = low + (index + 0.5) * width
        total += (1 - below(z) if z > 0 else -below(z)) * width
    return total


def ring(members: int, size: float, link: Link, passes: int = 2) -> float:
    """Seconds in which `members` of a ring sum `size` bytes (2 passes), or gather or scatter them (1)."""
    if members < 2:
        return 0.0
    return passes * ((members - 1) / members * size / link.bytes_s + (members - 1) * link.latency_s)


def reduce_seconds(cards: int, size: float, told: Assumptions, passes: int = 2) -> float:
    """Seconds in which all cards have the sum of `size` bytes: a ring inside nodes, and one between them.

    Each card has a part of the sum of its node, and the rings of all parts share the node's link.
    """
    if cards < 2 or not size:
        return 0.0
    inside, between = told.link("inside"), told.link("between")
    nodes = math.ceil(cards / told.cards_per_node)
    together = ring(math.ceil(cards / nodes), size, inside, passes)
    return float(told.call_seconds) + together + ring(nodes, size, between, passes)


@dataclass(frozen=True)
class Row:
    """So many cards.

    Attributes:
        cards, nodes: how many.
        batch: pictures of a step, over all cards.
        pictures: of a step, on the card that has most; less than 1 where some have none.
        seconds: of a step, everything counted.
        rate: pictures per second.
        efficiency: of the cards' time, beside one card's.
        parts: seconds of a step by what they go to.
        cost: of 1000 pictures; None without a price.
        encode_hours: of encoding them once; None where that is not asked.
    """

    cards: int
    nodes: int
    batch: int
    pictures: float
    seconds: float
    rate: float
    efficiency: float
    parts: dict[str, float]
    cost: float | None = None
    encode_hours: float | None = None

    @property
    def lost(self) -> tuple[str, float]:
        """What most is lost to, and the share of a step."""
        parts = {name: value for name, value in self.parts.items() if name != "pictures"}
        worst = max(parts, key=lambda name: parts[name])
        return worst, parts[worst] / self.seconds


def predict(
    costs: Costs, told: Assumptions, cards: Sequence[int] = CARDS, *, weak: bool = False, shard: bool = False
) -> list[Row]:
    """A row for each number of cards, which go up; of those with less than a picture for each, the first."""
    alone = _row(costs, told, 1, weak=weak, shard=shard)
    idle = sum(count > costs.batch_size for count in cards) if not weak else 0
    asked = cards[: len(cards) - max(0, idle - 1)]  # the first that has no work for all says it
    return [_against(_row(costs, told, count, weak=weak, shard=shard), alone) for count in asked]


def _against(row: Row, alone: Row) -> Row:
    return replace(row, efficiency=row.rate / (row.cards * alone.rate))


def _row(costs: Costs, told: Assumptions, cards: int, *, weak: bool, shard: bool) -> Row:
    nodes = math.ceil(cards / told.cards_per_node)
    batch = costs.batch_size * (cards if weak else 1)
    most = math.ceil(batch / cards)
    parts = {"pictures": costs.each * most, "what does not shrink": costs.fixed}
    steps = costs.step(most)
    cv = told.straggler_cv if costs.cv is None or "straggler_cv" in told.given else costs.cv
    parts["waiting for the slowest"] = steps * cv * slowest(cards)
    gradients = costs.trained * told.gradient_bytes
    if shard:  # as tunekit.memory.sharding.traffic counts it
        forwards = math.ceil(most / (costs.micro_batch or most))
        size = costs.weights * told.weight_bytes
        parts["gathering weights"] = forwards * 2 * reduce_seconds(cards, size, told, passes=1)
    if shard and not costs.adapter:
        summed = forwards * reduce_seconds(cards, gradients, told, passes=1)
    else:
        summed = reduce_seconds(cards, gradients, told)
    parts["all-reduce"] = summed * (1 - told.overlap)
    if told.disk_gb_s is not None:
        reading = batch * told.picture_bytes / (1e9 * told.disk_gb_s)
        parts["the shared disk"] = max(0.0, reading - sum(parts.values()))  # read beside the steps
    for pause in costs.pauses:
        parts[pause.what] = pause.seconds / pause.every / (cards if pause.shared else 1)
    working = sum(parts.values())
    parts["failures"] = 0.0
    if told.mtbf_hours is not None:
        known = [pause.every for pause in costs.pauses if "checkpoint" in pause.what]
        saving = known[0] if known else told.checkpoint_every
        each = told.restart_seconds + working * saving / 2
        parts["failures"] = working * nodes * each / (3600 * told.mtbf_hours)
    seconds = sum(parts.values())
    rate = batch / seconds
    return Row(
        cards,
        nodes,
        batch,
        batch / cards if batch < cards else float(most),
        seconds,
        rate,
        1.0,
        parts,
        None
        if told.price_per_card_hour is None
        else 1000 / rate * cards * told.price_per_card_hour / 3600
        if rate
        else math.inf,
        None if told.encode_seconds is None else told.pictures * told.encode_seconds / cards / 3600,
    )


@dataclass(frozen=True)
class Stop:
    """Where it stops.

    Attributes:
        cards: the most that are worth it, of those that were looked at.
        sentence: that says so.
    """

    cards: int
    sentence: str


def counted(cards: int) -> str:
    """So many cards, in words."""
    return f"{cards} card{'s' if cards > 1 else ''}"


def stops(rows: Sequence[Row]) -> Stop:
    """The most cards with which half of their time is used and each has a picture."""
    last = rows[0].cards
    for row in rows:
        if row.pictures < 1:
            return Stop(
                last,
                f"It stops at {counted(last)}: with {row.cards} there is less than a picture for each in a"
                f" batch of {row.batch}.",
            )
        if row.efficiency < LEAST:
            what, share = row.lost
            return Stop(
                last,
                f"It stops at {counted(last)}: with {row.cards} the efficiency is {row.efficiency:.1%}, and"
                f" {share:.0%} of a step go to {what}.",
            )
        last = row.cards
    end = rows[-1]
    return Stop(
        last,
        f"It has not stopped at {counted(last)}, the most that were asked for: efficiency"
        f" {end.efficiency:.0%}.",
    )


# Showing ----------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three digits: "0.0123", "1.23", "12,300"."""
    if not math.isfinite(value):
        return "never"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of at most 80 letters."""
    priced, encoding = rows[0].cost is not None, rows[0].encode_hours is not None
    head = ["cards", "batch", "each", "s/step", "pictures/s", "effic."]
    head += ["cost/1000"] if priced else []
    head += ["encode h"] if encoding else []
    lines = []
    for row in rows:
        if row.pictures < 1:
            cells = [f"{row.cards}", f"{row.batch}", *["-"] * (len(head) - 2)]
            lines.append((cells, "refused"))
            continue
        what, share = row.lost
        cells = [f"{row.cards}", f"{row.batch}", number(row.pictures), number(row.seconds), number(row.rate)]
        cells += [f"{row.efficiency:.0%}"]
        cells += [number(row.cost)] if row.cost is not None else []
        cells += [number(row.encode_hours)] if row.encode_hours is not None else []
        lines.append((cells, f"{what} {share:.0%}" if share >= 0.005 else ""))
    widths = [max(len(line[0][i]) for line in [(head, ""), *lines]) for i in range(len(head))]

    def shown(cells: Sequence[str], end: str) -> str:
        told = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return f"{told}  {end}".rstrip()[:80]

    return [shown(head, "most lost to"), *(shown(cells, end) for cells, end in lines)]


def lines_about(costs: Costs, told: Assumptions, *, weak: bool, shard: bool) -> list[str]:
    """What is measured, and what is assumed."""
    step = f"{number(costs.fixed)} s + {number(costs.each)} s a picture"
    varies = "not known" if costs.cv is None else f"{costs.cv:.1%}"
    lines = [
        f"{costs.what}",
        f"{costs.kind}: {costs.source}",
        f"  a step: {step}, varies by {varies}; trained {costs.trained:,} weights"
        f" ({format_bytes(costs.trained * told.gradient_bytes)} of gradients)",
    ]
    lines += [
        f"  {pause.what}: {number(pause.seconds)} s every {pause.every:g} steps" for pause in costs.pauses
    ]
    lines += [f"  {note}" for note in costs.notes]
    lines.append(
        "batch grows with the cards: another training for each"
        if weak
        else "one batch, shared out: the same training for each"
    )
    if shard:
        size = format_bytes(costs.weights * told.weight_bytes)
        lines.append(f"weights are spread: {size} gathered twice for each forward and backward pass")
    return lines


def assumed(told: Assumptions, costs: Costs | None = None) -> list[str]:
    """The assumptions, one a line."""
    lines = ["assumed:"]
    for one in told.listed():
        measured = costs is not None and costs.cv is not None and one["key"] == "straggler_cv"
        if measured and one["source"] != "given":
            continue
        unit = f" {one['unit']}" if one["unit"] else ""
        lines.append(f"  {one['key']} = {json.dumps(one['value'])}{unit} ({one['source']})")
    return lines


def svg(series: Sequence[tuple[str, Sequence[Row]]]) -> str:
    """Pictures per second over cards, beside what they would be if nothing was lost; as the report draws."""
    colours = ("#2f6fde", "#d9730d", "#2f9e8f", "#8e6bbf")
    lines = []
    for colour, (label, rows) in zip(colours, series, strict=False):
        points = [(float(row.cards), row.rate) for row in rows if row.pictures >= 1]
        ideal = [(count, rows[0].rate / rows[0].cards * count / rows[0].efficiency) for count, _ in points]
        lines.append(Line(label, colour, points, points[-1], number(points[-1][1])))
        lines.append(Line(f"{label}, nothing lost", colour, ideal, dashes="4 5"))
    drawn = chart(lines, "pictures per second over cards")
    return drawn.replace(
        "<svg ", '<svg xmlns="http://www.w3.org/2000/svg" font-size="13" font-family="sans-serif" ', 1
    )


def report(
    costs: Costs, told: Assumptions, rows: Sequence[Row], *, weak: bool, shard: bool
) -> dict[str, Any]:
    """All of it as JSON."""
    stop = stops(rows)
    shown = [asdict(row) for row in rows]
    for row in shown:
        row["parts"] = {name: round(value, 6) for name, value in row["parts"].items()}
        row |= {key: round(row[key], 6) for key in ("seconds", "rate", "efficiency")}
    return {
        "version": 1,
        "what": costs.what,
        "weak": weak,
        "shard": shard,
        "costs": asdict(costs),
        "assumptions": told.listed(),
        "rows": shown,
        "stops": {"cards": stop.cards, "sentence": stop.sentence},
    }


# Beside what is measured ------------------------------------------------------------------------------------

REDUCE = """
import sys, time
import torch, torch.distributed as dist
rank, port, sizes = int(sys.argv[1]), sys.argv[2], [int(one) for one in sys.argv[3].split(",")]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
for size in sizes:
    tensor = torch.ones(size // 4)
    times = []
    for _ in range(30):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        times.append(time.perf_counter() - began)
    if rank == 0:
        print(size, sorted(times)[len(times) // 2], flush=True)
dist.destroy_process_group()
"""
VALIDATED = (
    *("model.family=sd15", "model.source=builtin/emoji-64"),
    *("data.path=builtin/pictures/style", "data.resolution=64", "data.validation=null"),
    *("train.lr=1e-5", "train.checkpoint_every=100000", "train.validate_every=null"),
    *("memory.device=cpu", "memory.budget=null", "memory.precision=fp32"),
    *("optimize=[]", "preview={}"),
)


def validate(work: Path, steps: int, adapter: str) -> dict[str, Any]:
    """Measures one process at two batch sizes and gloo between two, predicts two, and runs them.

    One process is measured with another like it beside it, which it knows nothing of: processors of one
    machine share caches, memory and whoever else works there, and cards of several machines do not.
    """
    from measuring import processor

    work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    def train(name: str, batch: int, processes: int) -> subprocess.Popen[bytes]:
        settings = [*VALIDATED, f"name={name}", f"runs={work}", f"train.batch_size={batch}"]
        settings += [f"train.max_steps={steps}", f"memory.micro_batch={batch // processes}", adapter]
        command = [sys.executable, "-m", "tunekit", "run", "tiny/lora", *settings]
        command += ["--processes", str(processes)] if processes > 1 else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    def ended(*running: subprocess.Popen[bytes]) -> None:
        codes = [process.wait() for process in running]  # of all, before one is told of
        if any(codes):
            raise TunekitError("a run failed; what it said stands above", where=str(work))

    batch = 8
    for size in (batch, 2):
        ended(*(train(f"one-{size}{which}", size, 1) for which in "ab"))
    costs = of_runs([work / f"one-{size}{which}" for size in (batch, 2) for which in "ab"])
    size = costs.trained * 4
    latency, bandwidth = gloo(size)
    told = Assumptions.of(
        {
            "cards_per_node": 2,
            "inside": {"gb_s": bandwidth / 1e9, "latency_us": 1e6 * latency},
            "link_share": 1,
            "call_seconds": 0,
        }
    )
    predicted = predict(replace(costs, pauses=()), told, (1, 2))[1]
    ended(train("two", batch, 2))
    rows = [json.loads(line) for line in (work / "two" / "metrics.jsonl").read_text("utf-8").splitlines()]
    measured = statistics.median(step_seconds(rows, batch))
    return {
        "what": costs.what,
        "device": processor(),
        "processors": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "date": time.strftime("%Y-%m-%d"),
        "steps": steps,
        "seconds_taken": round(time.monotonic() - began),
        "one": {"fixed": costs.fixed, "each": costs.each, "cv": costs.cv},
        "gradient_bytes": size,
        "gloo": {"latency_s": latency, "bytes_s": bandwidth},
        "parts": predicted.parts,
        "predicted_s": predicted.seconds,
        "measured_s": measured,
        "error": predicted.seconds / measured - 1,
    }


def gloo(size: int) -> tuple[float, float]:
    """Latency of a hop in seconds and bytes per second of all-reduce between two processes here."""
    port = str(29600 + os.getpid() % 300)
    arguments = [port, f"1024,{max(size, 2**20)}"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", REDUCE, str(rank), *arguments], stdout=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=240)[0] for process in processes]
    (_, small), (large, long) = (
        (float(a), float(b)) for a, b in (line.split() for line in said[0].splitlines())
    )
    latency = small / 2
    return latency, large / max(1e-9, long - small)


def validation_lines(found: Mapping[str, Any]) -> list[str]:
    """What it came to, for people."""
    parts = ", ".join(f"{name} {number(value)} s" for name, value in found["parts"].items() if value)
    one = found["one"]
    return [
        f"{found['what']}",
        f"{found['device']}, {found['processors']} processors, load {found['load']}, {found['date']}",
        f"one process, beside another: {number(one['fixed'])} s + {number(one['each'])} s a picture,"
        f" varies by {one['cv']:.1%}",
        f"gloo: {1e6 * found['gloo']['latency_s']:.0f} us a hop, {found['gloo']['bytes_s'] / 1e9:.2f} GB/s;"
        f" {format_bytes(found['gradient_bytes'])} of gradients",
        f"two processes: predicted {number(found['predicted_s'])} s ({parts})",
        f"               measured  {number(found['measured_s'])} s, error {found['error']:+.1%}",
    ]


# benchmarks/scale ------------------------------------------------------------------------------------------

PCIE: dict[str, Any] = {"cards_per_node": 4, "inside": "pcie4", "between": "25gbe"}
CPUS: dict[str, Any] = {"cards_per_node": 1, "between": "25gbe"}
FAILING: dict[str, Any] = {"mtbf_hours": 720.0, "restart_seconds": 300.0}
CASES: tuple[tuple[str, int, str, dict[str, Any], bool, bool], ...] = (
    ("sdxl-h100", 64, "nodes of 8 with NVLink, 400 GbE between", {}, False, False),
    ("sdxl-h100", 8, "the same, 8 pictures on each", {}, True, False),
    ("sdxl-l40s", 64, "nodes of 4 with PCI Express, 25 GbE", PCIE, False, False),
    ("sdxl-all-h100", 512, "nodes of 8, 400 GbE", {}, False, False),
    ("sdxl-all-h100", 512, "the same over 25 GbE", {"between": "25gbe"}, False, False),
    ("sdxl-all-h100", 512, "sharded weights, 400 GbE", {}, False, True),
    ("sdxl-all-h100", 512, "400 GbE, a node fails every 30 days", FAILING, False, False),
    ("zimage-h100", 64, "nodes of 8, 400 GbE", {}, False, False),
)
"""Published costs, batch size, in words, assumptions, weak, shard."""


def cases(validation: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All cases of benchmarks/scale.json: of what was measured here, and of what others have."""
    made = []
    words = "machines of one processor, 25 GbE"
    own = [(of_validation(found, 64), words, CPUS, False, False) for found in validation]
    others = [(of_published(name, batch), *rest) for name, batch, *rest in CASES]
    for costs, words, given, weak, shard in [*own, *others]:
        told = Assumptions.of(given)
        found = report(costs, told, predict(costs, told, weak=weak, shard=shard), weak=weak, shard=shard)
        made.append({"case": f"{costs.what}: {words}", "given": given, **found})
    return made


def of_validation(found: Mapping[str, Any], batch_size: int) -> Costs:
    """What `validate` has measured of one process."""
    one = found["one"]
    return Costs(
        what=found["what"].partition(", batch")[0] + f", batch {batch_size}, {found['device']}",
        kind="measured",
        source="scripts/simulate_scale.py validate",
        batch_size=batch_size,
        fixed=one["fixed"],
        each=one["each"],
        trained=found["gradient_bytes"] // 4,
        cv=one["cv"],
        notes=(f"measured at batches of 2 and 8 on one thread, load {found['load']}",),
    )


def document(content: Mapping[str, Any]) -> str:
    """benchmarks/scale.md."""
    lines = [
        "# Where more cards stop helping",
        "",
        "By `scripts/simulate_scale.py`, whose head says how it counts. **Nothing here was measured on"
        " several cards:** steps were measured on one, here or by others as each case says, all else is"
        " assumed as listed below. Of your own run:",
        "",
        "    python scripts/simulate_scale.py predict --run runs/mine price_per_card_hour=2.5",
        "",
        "## What the model was held against",
        "",
        "Two processes on one machine (gloo over the loopback), predicted from runs of one process and from"
        " what an all-reduce takes there:",
        "",
    ]
    for found in content["validation"]:
        lines += ["```text", *validation_lines(found), "```", ""]
    lines += ["## Predicted", ""]
    for case in content["cases"]:
        rows = [Row(**row) for row in case["rows"]]
        kind = "the batch grows with the cards" if case["weak"] else "one batch, shared out"
        lines += [f"### {case['case']}", "", f"{kind}. {case['stops']['sentence']}", "", "```text"]
        lines += [*table(rows), "```", ""]
        told = "; ".join(case["costs"]["notes"])
        costs = case["costs"]
        source = f"[published]({costs['source']})" if costs["kind"] == "published" else f"`{costs['source']}`"
        fixed = f"{number(costs['fixed'])} s + " if costs["fixed"] else ""
        lines += [f"A step: {fixed}{number(costs['each'])} s a picture ({source}; {told}).", ""]
    told = Assumptions.of({})
    lines += ["## Assumed", "", "| key | value | by |", "|---|---|---|"]
    for one in told.listed():
        lines.append(f"| `{one['key']}` | {json.dumps(one['value'])} {one['unit']} | {one['source']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("predict", help="from one card to many")
    one.add_argument("given", nargs="*", metavar="KEY=VALUE", help="assumptions")
    one.add_argument(
        "--run", type=Path, action="append", default=[], help="folder of a run on one process; repeatable"
    )
    one.add_argument("--published", choices=sorted(PUBLISHED), help="costs that others have published")
    one.add_argument("--batch-size", type=int, help="pictures of a step over all cards; that of the run")
    one.add_argument("--cards", default=",".join(map(str, CARDS)), help="1,2,4,...")
    one.add_argument("--weak", action="store_true", help="the batch grows with the cards")
    one.add_argument("--shard", action="store_true", help="weights are spread over the cards")
    one.add_argument("--assume", type=Path, help="YAML or JSON with assumptions")
    one.add_argument("--json", type=Path)
    one.add_argument("--svg", type=Path)
    commands.add_parser("assumptions", help="what is assumed, and why")
    check = commands.add_parser("validate", help="two processes here, predicted and measured")
    check.add_argument("work", type=Path, metavar="WORK", help="folder for its runs")
    check.add_argument("--steps", type=int, default=24)
    commands.add_parser("table", help="writes benchmarks/scale.md; cases are counted anew")
    options = parser.parse_args()
    try:
        {"predict": _predict, "assumptions": _assumptions, "validate": _validate, "table": _table}[
            options.command
        ](options)
    except TunekitError as error:
        sys.exit(f"error: {error}")


def given_of(texts: Sequence[str], file: Path | None) -> dict[str, Any]:
    """Assumptions of a file, and of `key=value` over them.

    Raises:
        ConfigError: one is not that.
    """
    import yaml

    found: dict[str, Any] = {}
    if file is not None:
        try:
            found = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot be read: {error}", where=str(file)) from error
        if not isinstance(found, dict):
            raise ConfigError("is no list of key: value", where=str(file))
    for text in texts:
        key, mark, value = text.partition("=")
        if not mark:
            raise ConfigError(f"{text}: say key=value", where="command line")
        found[key] = yaml.safe_load(value)
    return found


def _predict(options: argparse.Namespace) -> None:
    if bool(options.run) == bool(options.published):
        raise ConfigError("say --run FOLDER, or --published NAME", where="command line")
    told = Assumptions.of(given_of(options.given, options.assume))
    if options.run:
        costs = of_runs(options.run)
        costs = replace(costs, batch_size=options.batch_size or costs.batch_size)
    else:
        costs = of_published(options.published, options.batch_size)
    try:
        cards = sorted({int(one) for one in options.cards.split(",")})
    except ValueError:
        raise ConfigError(f"--cards: {options.cards} is no list of numbers", where="command line") from None
    if cards[0] < 1 or costs.batch_size < 1:
        raise ConfigError("--cards and --batch-size begin at 1", where="command line")
    if options.shard and not costs.weights:
        raise ConfigError("--shard: how many weights there are stands in plan.json, which the run has not")
    how = {"weak": options.weak, "shard": options.shard}
    rows = predict(costs, told, cards, **how)
    told_lines = lines_about(costs, told, **how)
    print("\n".join([*told_lines, "", *table(rows), "", *assumed(told, costs), "", stops(rows).sentence]))
    if options.json:
        options.json.write_text(
            json.dumps(report(costs, told, rows, **how), indent=1) + "\n", encoding="utf-8"
        )
    if options.svg:
        options.svg.write_text(svg([(costs.what, rows)]), encoding="utf-8")


def _assumptions(options: argparse.Namespace) -> None:
    print("\n".join(assumed(Assumptions.of({}))[1:]))
    for name, link in LINKS.items():
        print(f"  {name}: {link.bytes_s / 1e9:g} GB/s, {1e6 * link.latency_s:g} us a hop ({link.source})")


def _validate(options: argparse.Namespace) -> None:
    known = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"version": 1}
    found = []
    for name, adapter in (("all", "adapter=null"), ("lora", "adapter.rank=16")):
        found.append(validate(options.work / name, options.steps, adapter))
        print("\n".join(validation_lines(found[-1])), flush=True)
    FILE.write_text(json.dumps({**known, "validation": found}, indent=1) + "\n", encoding="utf-8")


def _table(options: argparse.Namespace) -> None:
    known = json.loads(FILE.read_text(encoding="utf-8"))
    known["cases"] = cases(known["validation"])
    FILE.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    TABLE.write_text(document(known), encoding="utf-8")


if __name__ == "__main__":
    main()
