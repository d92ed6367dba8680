"""Models that a search tries: how each is judged, what it costs, and the book of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunekit.artifacts import RECORD, RunFolder, model_files, write_json
from tunekit.config import SamplingConfig
from tunekit.diffusion.judges import Judges
from tunekit.errors import ChainError, ModelError, NonFiniteError
from tunekit.files import link_file
from tunekit.passes.base import Context
from tunekit.passes.providers import Provider
from tunekit.passes.tradeoff import Found
from tunekit.passes.verify import PROMPTS
from tunekit.records import Record, read

if TYPE_CHECKING:
    from torch import Tensor

    from tunekit.artifacts import Artifact

TRIALS = "trials.json"
VERSION = 1
ROUNDS = 3
"""Pictures per measurement of speed."""
ASIDE = 1_000_003
"""Between the seeds of the pictures that trials are judged by and those that nobody saw."""
Minimized = Literal["latency", "size", "memory"]
COSTS: Mapping[Minimized, str] = {
    "latency": "picture_ms_p50",
    "size": "size_bytes",
    "memory": "peak_memory_bytes",
}
NAMES = {"ssim": "SSIM", "lpips": "LPIPS", "clip": "CLIP score less"}


@dataclass
class Trial:
    """One model that was tried; what could not be made has a failure, and nothing was found."""

    chain: list[Any]
    folder: str | None
    """Of the artifact, in `search/`; None where the trial is the model that came in."""
    found: Found | None
    values: dict[str, float]
    """Measure -> what was measured, as people know it."""
    figures: dict[str, Any]
    seconds: float
    failure: str | None = None
    order: int = 0

    def artifact(self, judge: Judge) -> Artifact:
        """Opens what was made."""
        from tunekit.artifacts import Artifact

        if self.folder is None:
            return judge.parent
        return Artifact.load(judge.aside.run_dir / self.folder)


@dataclass(frozen=True)
class Asked:
    """What a search is to find out of each trial.

    Attributes:
        target: what models are made for.
        provider: what runs them there, of ONNX models.
        minimize: what they are to cost least of.
        pictures: that are drawn.
        judges: networks that look at them.
    """

    target: str
    provider: Provider | None
    minimize: Minimized
    pictures: int
    judges: Judges


class Judge:
    """Draws, compares, measures."""

    def __init__(self, asked: Asked, parent: Artifact, context: Context) -> None:
        self.parent, self.context, self.asked = parent, context, asked
        self.provider = asked.provider
        prompts = context.prompts or PROMPTS
        # With one prompt alone, what nobody saw are other seeds of it.
        self.prompts = {False: list(prompts[::2]), True: list(prompts[1::2] or prompts)}
        aside = context.aside(RunFolder(context.run_dir).trials.name)
        self.aside = dataclasses.replace(aside, prompts=tuple(self.prompts[False]))
        self.judges = asked.judges
        self._wanted: dict[bool, Tensor] = {}
        self._scored: dict[bool, float] = {}

    def drawn(self, *, unseen: bool) -> tuple[list[str], list[int]]:
        """Prompts and seeds of the pictures."""
        count, first = self.asked.pictures, self.context.seed + (2 * ASIDE if unseen else ASIDE)
        return list(islice(cycle(self.prompts[unseen]), count)), [first + index for index in range(count)]

    def fidelity(self, model: Artifact, *, unseen: bool) -> dict[str, float]:
        """Measure -> mean over the pictures, against those of the model that came in."""
        from tunekit.diffusion.metrics import psnr_db, ssim

        if unseen not in self._wanted:
            self._wanted[unseen] = self._pixels(self.parent, None, unseen=unseen)
        wanted = self._wanted[unseen]
        if not bool(wanted.isfinite().all()):
            raise NonFiniteError(
                "the model that came in draws values that are not finite", where=self.parent.source
            )
        got = self._pixels(model, self.provider if model.format == "onnx" else None, unseen=unseen)
        if not bool(got.isfinite().all()):
            raise ModelError("draws values that are not finite", where=model.source)
        pairs = [(got[i : i + 1], wanted[i : i + 1]) for i in range(len(wanted))]
        measures = {"psnr": psnr_db, "ssim": ssim}
        found = {
            name: sum(measure(*pair) for pair in pairs) / len(pairs) for name, measure in measures.items()
        }
        if self.judges.lpips:
            found["lpips"] = sum(self.judges.distances(got, wanted)) / len(pairs)
        if self.judges.clip:
            prompts, _ = self.drawn(unseen=unseen)
            if unseen not in self._scored:
                self._scored[unseen] = sum(self.judges.scores(wanted, prompts)) / len(pairs)
            found["clip"] = self._scored[unseen] - sum(self.judges.scores(got, prompts)) / len(pairs)
        return found

    def _pixels(self, model: Artifact, provider: Provider | None, *, unseen: bool) -> Tensor:
        from tunekit.runtime.draw import generate_pixels

        prompts, seeds = self.drawn(unseen=unseen)
        own = self.context.sampling_of(self.parent)
        size = SamplingConfig(height=own.height, width=own.width)
        context = self.context if model is self.parent else self.aside
        with context.running(model, provider=provider) as runtime:
            sampling = size.over(context.sampling_of(model)).over(runtime.sampling)
            return generate_pixels(runtime, prompts, sampling, seeds=seeds)

    def cost(self, model: Artifact, origin: Artifact | None) -> dict[str, Any]:
        """What is minimized, `cost`, and its ratio to that of the origin, measured in turns with it."""
        if self.asked.minimize == "size":
            figures = {"size_bytes": model.size_bytes, "cost": float(model.size_bytes)}
            return {**figures, "ratio": model.size_bytes / origin.size_bytes if origin else 1.0}
        sides = [side for side in (origin, model) if side is not None]
        rows = self._compared(sides, memory=self.asked.minimize == "memory")
        name, own, first = COSTS[self.asked.minimize], rows[-1], rows[0]
        if own[name] is None:
            raise ChainError(f"its {name} cannot be measured on this device")
        ratio = 1.0 if origin is None else own[name] / first[name]
        if origin is not None and self.asked.minimize == "latency":
            ratio = 1 / own["speedup"]
        kept = ("picture_ms_p50", "size_bytes", "peak_memory_bytes", "steps")
        return {**{key: own[key] for key in kept}, "cost": float(own[name]), "ratio": ratio}

    def speed(self, model: Artifact) -> float:
        """How many times faster a picture is than with the model that came in; in turns."""
        return float(self._compared([self.parent, model], memory=False)[-1]["speedup"])

    def _compared(self, models: Sequence[Artifact], *, memory: bool) -> list[dict[str, Any]]:
        from tunekit.passes.benchmark import Settings, compare

        settings = Settings(
            prompts=tuple(self.prompts[False]),
            repeats=ROUNDS,
            device=self.context.device,
            provider=self.provider,
            memory=memory,
            seed=self.context.seed,
        )
        # The same files may be two models, drawn otherwise.
        drawn = [dataclasses.replace(model, sampling=self.context.sampling_of(model)) for model in models]
        sides = [side for index, side in enumerate(drawn) if side not in drawn[:index]]
        rows: list[dict[str, Any]] = compare(sides, settings, running=self.aside.running)["artifacts"]
        return rows if len(rows) == len(models) else [rows[0], {**rows[0], "speedup": 1.0}]


class _Line(Record):
    """One trial, as it is kept."""

    key: str
    chain: list[Any]
    folder: str | None = None
    errors: dict[str, float] | None = None
    cost: float | None = None
    values: dict[str, float] = {}
    figures: dict[str, Any] = {}
    seconds: float
    failure: str | None = None


class Trials(Record):
    """`search/trials.json`: what was tried, so that a search that was killed goes on."""

    version: int
    trials: list[_Line]


class Book:
    """What was tried in this run folder, by all searches."""

    def __init__(self, path: Path, judge: Judge) -> None:
        self.path, said = path, judge.asked
        asked = [said.target, said.minimize, said.pictures, judge.context.seed, judge.prompts[False]]
        sampling = judge.context.sampling_of(judge.parent).model_dump(mode="json")
        self.asked = [judge.parent.hash, sampling, *asked]
        if judge.judges.lpips or judge.judges.clip:
            self.asked.append(dataclasses.asdict(judge.judges))
        self.count = 0
        try:
            self.lines = {line.key: line for line in read(path, Trials).trials}
        except FileNotFoundError:
            self.lines = {}

    def key(self, chain: Sequence[Any]) -> str:
        """Of all that a trial's figures depend on."""
        return json.dumps([self.asked, chain], sort_keys=True)

    def find(self, chain: Sequence[Any]) -> Trial | None:
        """A trial that was made; None where its artifact is gone."""
        line = self.lines.get(self.key(chain))
        if line is None or (line.folder and not (self.path.parent / line.folder / RECORD).is_file()):
            return None
        found = None if line.errors is None or line.cost is None else Found(line.errors, line.cost)
        self.count += 1
        return Trial(
            list(line.chain),
            line.folder,
            found,
            line.values,
            line.figures,
            line.seconds,
            line.failure,
            self.count,
        )

    def add(self, trial: Trial) -> Trial:
        """Keeps one."""
        self.count += 1
        trial.order = self.count
        line = _Line(
            key=self.key(trial.chain),
            chain=trial.chain,
            folder=trial.folder,
            errors=dict(trial.found.errors) if trial.found else None,
            cost=trial.found.cost if trial.found else None,
            values=trial.values,
            figures=trial.figures,
            seconds=round(trial.seconds, 3),
            failure=trial.failure,
        )
        self.lines[line.key] = line
        self.path.parent.mkdir(parents=True, exist_ok=True)
        told = [line.model_dump(mode="json") for line in self.lines.values()]
        write_json(self.path, {"version": VERSION, "trials": told})
        return trial


def as_error(name: str, value: float) -> float:
    """As an error that adds up: of PSNR the mean squared error, of SSIM what is missing."""
    if name == "psnr":
        return float(10 ** (-value / 10))
    return float(1 - value if name == "ssim" else value)


def in_words(name: str, value: float) -> str:
    """A measure in words."""
    if name == "psnr":
        return f"PSNR {value:.1f} dB"
    return f"{NAMES[name]} {value:.4f}"


def quality(values: Mapping[str, float]) -> str:
    """All measures in words."""
    return ", ".join(in_words(name, value) for name, value in values.items())


def copy_model(model: Artifact, folder: Path) -> None:
    """The files of an artifact, without its record; as links where the disk has them: they never change."""
    if model.model_path is None:
        raise ChainError(
            "search: nothing is cheaper than the model that came in, which is on a hub and not copied",
            hint="leave the search out",
        )
    for name, path in model_files(model.model_path).items():
        link_file(path, folder / name)
