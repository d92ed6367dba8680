"""The user says what must be kept; this finds the cheapest model that keeps it.

Every trial is a chain of other passes, run in `search/` of the run folder, where trials share the steps that
they have in common and a killed search finds what it made. In which order trials come: `passes.tradeoff`.

A trial is judged by pictures, of its own way of drawing, against those of the model that came in, of that
model's own way, on the same prompts and seeds. The winner is judged once more on prompts and seeds that no
trial saw: where it fails there, the next best takes its place.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from tunekit.artifacts import RECORD, RunFolder, model_files, write_json
from tunekit.config import PathText, SamplingConfig, Section, no_effect, refuse, wrong
from tunekit.errors import (
    ArtifactError,
    ChainError,
    ModelError,
    NonFiniteError,
    VerificationFailed,
    did_you_mean,
)
from tunekit.files import link_file
from tunekit.passes.base import (
    EVERYTHING,
    Context,
    Outcome,
    Pass,
    Start,
    check_chain,
    parse_chain,
    run_chain,
)
from tunekit.passes.likeness import Judges
from tunekit.passes.metrics import CLIP_DROP, LPIPS, PSNR, SSIM, Metric, Value
from tunekit.passes.providers import Provider, cannot_run
from tunekit.passes.tradeoff import Found, Point, Tradeoff
from tunekit.passes.verify import PROMPTS
from tunekit.records import Record, read
from tunekit.units import format_bytes, format_seconds

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
_COSTS: Mapping[Minimized, str] = {
    "latency": "picture_ms_p50",
    "size": "size_bytes",
    "memory": "peak_memory_bytes",
}


@dataclass(frozen=True)
class Target:
    """What a model is made for.

    Attributes:
        export: the pass that makes its format, as in YAML; None: it stays in torch.
        provider: what runs it there, of an ONNX model.
        format: of the result.
    """

    export: Any
    provider: Provider | None = None
    format: str = "onnx"


TARGETS: Mapping[str, Target] = {
    "cpu": Target("export_onnx", "cpu"),
    "openvino": Target({"export_openvino": {"precision": "bf16"}}, format="openvino"),
    "cuda": Target({"export_onnx": {"dtype": "fp16"}}, "cuda"),
    "torch": Target(None, format="torch"),
}


class Keep(Section):
    """What must be kept, as means over the pictures; at least one."""

    psnr: float | None = Field(None, gt=0, le=150)
    """Lowest PSNR against the model as it came, in dB."""
    ssim: float | None = Field(None, gt=0, le=1)
    """Lowest SSIM."""
    lpips: float | None = Field(None, gt=0, le=10)
    """Largest LPIPS (AlexNet): 0 is equal, and from about 0.1 on people see it."""
    clip: float | None = Field(None, gt=0, le=2)
    """Largest drop of the CLIP score, the cosine between picture and prompt; usual scores are near 0.3."""
    lpips_weights: PathText | None = None
    """File of torchvision's AlexNet; null: torch's hub folder. Nothing is downloaded."""
    clip_model: PathText | None = None
    """Folder of the CLIP that gives the score, as transformers saves it."""

    @model_validator(mode="after")
    def _some(self) -> Keep:
        if not self.given:
            wrong("psnr", "says nothing to keep; give psnr (dB), ssim, lpips or clip, or some of them")
        if self.lpips is None:
            no_effect(self, ("lpips_weights",), "lpips is not set")
        if self.clip is None:
            no_effect(self, ("clip_model",), "clip is not set")
        elif self.clip_model is None:
            wrong("clip", "needs a CLIP: give its folder as clip_model")
        return self

    @property
    def given(self) -> dict[str, float]:
        """Measure -> what was stated."""
        all_of_them = {"psnr": self.psnr, "ssim": self.ssim, "lpips": self.lpips, "clip": self.clip}
        return {name: value for name, value in all_of_them.items() if value is not None}

    @property
    def limits(self) -> dict[str, float]:
        """Measure -> largest error, as errors add up."""
        return {name: _as_error(name, value) for name, value in self.given.items()}

    @property
    def judges(self) -> Judges:
        """The networks that are asked."""
        return Judges(self.lpips is not None, self.clip is not None, self.lpips_weights, self.clip_model)


class Search(Pass):
    """Finds the cheapest model that keeps a stated quality, by trying other passes and their settings."""

    kind: ClassVar[str] = "search"
    accepts: ClassVar[frozenset[str]] = frozenset({"torch"})
    refuses: ClassVar[Mapping[str, str]] = {
        "packed": "comes after {giver}, and would have to undo it; start it from the model before"
    }
    metrics: ClassVar[tuple[Metric, ...]] = (
        PSNR,
        SSIM,
        LPIPS,
        CLIP_DROP,
        Metric("trials", "trials", "count"),
        Metric(
            "kept_speedup", "speed-up found", "x", lower_is_better=False, rank=43, column="speed-up found"
        ),
    )

    keep: Keep = Keep(psnr=28)
    """The quality that the result keeps against the model that comes in: same prompts, same seeds."""
    minimize: Minimized = "latency"
    """latency: of a whole picture, measured here; size: of the files; memory: of a process that draws."""
    target: Literal["cpu", "openvino", "cuda", "torch"] = "cpu"
    """What the result runs on: ONNX Runtime on the processor, OpenVINO, ONNX Runtime on NVIDIA, torch."""
    passes: Annotated[list[str | dict[str, list[dict[str, Any]]]], Field(min_length=1)] = [
        "prune",
        "quantize",
        "quantize_openvino",
        "tune_sampler",
    ]
    """What may be done: passes, with choices of their own; or a pass and the settings to try, the mildest
    first: `{prune: [{ratio: 0.2}, {ratio: 0.4}]}`."""
    minutes: float = Field(60, gt=0, le=100_000)
    """No trial begins after this; a search that goes on counts the time it had before."""
    pictures: int = Field(8, ge=2, le=256)
    """That each trial is judged by; and as many that only the winner is."""

    @field_validator("passes")
    @classmethod
    def _searchable(cls, value: list[Any]) -> list[Any]:
        from tunekit.registry import PASSES

        names = [item if isinstance(item, str) else next(iter(item), "") for item in value]
        for name, item in zip(names, value, strict=True):
            if isinstance(item, dict) and (len(item) != 1 or not item[name]):
                refuse(
                    f"expects a pass and its settings to try, as in {{prune: [{{ratio: 0.2}}]}}, got {item}"
                )
            known = [known for known in PASSES.names() if known != "search"]
            if name not in known:
                refuse(f"names no pass {name!r}; {did_you_mean(str(name), known)}")
            if names.count(name) > 1:
                refuse(f"names {name} twice")
            if isinstance(item, str) and not any(PASSES.get(name).options(target) for target in TARGETS):
                refuse(
                    f"names {name}, which has nothing to choose; give the settings to try: {{{name}: [...]}}"
                )
        return value

    def result(self, format: str) -> str:
        """That of the target."""
        return TARGETS[self.target].format

    def reads(self, context: Context) -> frozenset[str]:
        """All that its trials read."""
        return EVERYTHING - {"models"}

    def problem(self, format: str, earlier: Sequence[Pass]) -> str | None:
        """Refuses what does not answer here, a target or a network that judges: every trial asks it."""
        if absent := self.keep.judges.lack():
            return absent
        provider = TARGETS[self.target].provider
        return cannot_run([provider]) if provider else None

    def objection(self, start: Start, earlier: Sequence[Pass]) -> str | None:
        """Finds settings to try that no trial could have."""
        try:
            axes = self._axes()
        except ChainError as error:
            return f"has passes that cannot be tried: {error.message}"
        whole = dataclasses.replace(start, format="torch")
        origin = self._chain(axes, (0,) * len(axes))
        for axis in axes:
            for items in axis.choices[1:]:
                try:
                    check_chain(self._placed([*origin, *items]), whole)
                except ChainError as error:
                    return f"cannot try {describe(items)}: {error.message}"
        return None

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        """Tries, judges, takes the best, verifies it, and puts it into `context.folder`.

        Raises:
            ChainError: nothing keeps what must be kept; says what came nearest.
        """
        axes = self._axes()
        judge = _Judge(self, artifact, context)
        tradeoff = Tradeoff([len(axis.choices) for axis in axes], self.keep.limits)
        book = _Book(RunFolder(context.run_dir).trials / TRIALS, self, judge)
        made: dict[Point, _Trial] = {}
        failed: list[str] = []
        began, before, is_over = time.monotonic(), 0.0, False
        while True:
            point = None if is_over else tradeoff.next()
            if point is not None:
                chain = self._chain(axes, point)
                spent = before + time.monotonic() - began
                known = book.find(chain)
                if known is None and made and spent > 60 * self.minutes:
                    context.say(f"{format_seconds(spent)} are over: {len(made)} trials were made")
                    is_over = True
                    continue
                trial = known or self._try(chain, judge, book, context, origin=made.get(_zero(point)))
                before += known.seconds if known else 0.0
                made[point] = trial
                tradeoff.known[point] = trial.found
                told = self._told(trial, made[_zero(point)])
                context.say(f"trial {len(made)}: {describe(chain)}: {told}")
                continue
            best = tradeoff.best()
            if not best:
                raise self._nothing(made, failed)
            winner = made[best[0]]
            unseen = judge.fidelity(winner.artifact(judge), unseen=True)
            line = f"{describe(winner.chain)} on pictures that no trial saw: {_quality(unseen)}"
            context.say(line)
            errors = {name: _as_error(name, value) for name, value in unseen.items()}
            if Found(errors, 0.0).keeps(self.keep.limits):
                break
            failed.append(line)
            tradeoff.reject(best[0], errors)
        return self._end(tradeoff, made, winner, unseen, judge, context, failed=failed, is_over=is_over)

    # Trials -------------------------------------------------------------------------------------------------

    def _axes(self) -> list[_Axis]:
        from tunekit.registry import PASSES

        axes = []
        for item in self.passes:
            if isinstance(item, str):
                choices = [list(chain) for chain in PASSES.get(item).options(self.target)]
                name = item
            else:
                ((name, settings),) = item.items()
                choices = [[{name: dict(one)}] for one in settings]
            for choice in choices:
                parse_chain(choice, lambda index, key, name=name: f"passes.{name}")  # type: ignore[misc]
            if choices:
                axes.append(_Axis(name, ([], *choices)))
        return axes

    def _chain(self, axes: Sequence[_Axis], point: Point) -> list[Any]:
        """The passes of a combination as in YAML, the export among them: behind all that need torch."""
        chosen = [item for axis, choice in zip(axes, point, strict=True) for item in axis.choices[choice]]
        export = TARGETS[self.target].export
        if export is None:
            return chosen
        steps, format = parse_chain(chosen), TARGETS[self.target].format
        early = [item for item, step in zip(chosen, steps, strict=True) if format not in step.accepts]
        late = [item for item, step in zip(chosen, steps, strict=True) if format in step.accepts]
        return [*early, export, *late]

    def _placed(self, items: Sequence[Any]) -> list[Pass]:
        """Items in the order of `_chain`, parsed."""
        export = TARGETS[self.target].export
        plain = [item for item in items if item != export]
        return parse_chain(self._chain([_Axis("", ([], plain))], (1,)))

    def _try(
        self, chain: list[Any], judge: _Judge, book: _Book, context: Context, origin: _Trial | None
    ) -> _Trial:
        """Makes one model and judges it; what cannot be made is a trial that failed."""
        started = time.monotonic()
        aside = dataclasses.replace(judge.aside, say=lambda line: None)
        context.say(f"trying {describe(chain)}")
        try:
            made = run_chain(parse_chain(chain), judge.parent, aside)
            values = judge.fidelity(made, unseen=False)
            figures = judge.cost(made, origin.artifact(judge) if origin and origin.found else None)
        except (ArtifactError, ChainError, ModelError, NonFiniteError, VerificationFailed) as error:
            return book.add(
                _Trial(chain, None, None, {}, {}, time.monotonic() - started, str(error).splitlines()[0])
            )
        errors = {name: _as_error(name, value) for name, value in values.items()}
        # What stands beside it was measured at the same moment: of time only the ratio is worth anything.
        cost = figures["cost"] if origin is None or not origin.found else figures["ratio"] * origin.found.cost
        folder = made.path.name if made.path and made.path.parent == aside.run_dir else None
        seconds = time.monotonic() - started
        return book.add(_Trial(chain, folder, Found(errors, cost), values, figures, seconds))

    def _told(self, trial: _Trial, origin: _Trial) -> str:
        if trial.found is None:
            return f"cannot be made: {trial.failure}"
        kept = "" if trial.found.keeps(self.keep.limits) else ", which is not kept"
        return f"{_quality(trial.values)}{kept}; {self._cost(trial, origin)}"

    def _cost(self, trial: _Trial, origin: _Trial) -> str:
        assert trial.found is not None
        assert origin.found is not None
        if self.minimize == "latency":
            return f"{origin.found.cost / trial.found.cost:.2f}x as fast"
        return format_bytes(trial.found.cost)

    # The end ------------------------------------------------------------------------------------------------

    def _nothing(self, made: Mapping[Point, _Trial], failed: Sequence[str]) -> ChainError:
        """What to say where there is no winner."""
        origin = made[_zero(next(iter(made)))]
        if origin.found is None:
            return ChainError(f"search: the model cannot even be exported: {origin.failure}")
        if failed:
            return ChainError(
                f"search: {len(failed)} trials keep {_wanted(self.keep)} on the pictures they were judged by,"
                f" and none on others; {failed[-1]}",
                hint="judge by more pictures (`pictures`), or lower what must be kept",
            )
        return ChainError(
            f"search: none of {len(made)} trials keeps {_wanted(self.keep)}; {self._nearest(made)}",
            hint="lower what must be kept, or give the search milder settings to try",
        )

    def _end(
        self,
        tradeoff: Tradeoff,
        made: Mapping[Point, _Trial],
        winner: _Trial,
        unseen: Mapping[str, float],
        judge: _Judge,
        context: Context,
        *,
        failed: Sequence[str],
        is_over: bool,
    ) -> Outcome:
        origin = made[_zero(next(iter(made)))]
        assert origin.found is not None
        final = winner.artifact(judge)
        _copy(final, context.folder)
        speed = judge.speed(final)
        front = set(tradeoff.front(next(iter(self.keep.limits))))
        useless = {(axis, choice) for axis, choice in tradeoff.useless()}
        rows = [
            {
                "passes": describe(trial.chain),
                **{_COLUMNS[name]: value for name, value in trial.values.items()},
                "speedup": origin.found.cost / trial.found.cost if self.minimize == "latency" else None,
                "size_bytes": trial.figures.get("size_bytes"),
                "peak_memory_bytes": trial.figures.get("peak_memory_bytes"),
                "kept": "winner"
                if trial is winner
                else "yes"
                if trial.found.keeps(self.keep.limits)
                else "no",
                "front": "*" if point in front else "",
            }
            for point, trial in sorted(made.items(), key=lambda item: item[1].order)
            if trial.found
        ]
        dropped = [
            describe(trial.chain)
            for point, trial in made.items()
            if any(point == _single(len(point), *choice) for choice in useless)
        ]
        note = (
            f"{describe(winner.chain)}: {_quality(unseen)} on {self.pictures} pictures that no trial saw"
            f" ({_quality(winner.values)} on those that it was judged by), {speed:.2f}x as fast as the model"
            f" that came in; {len(made)} trials"
        )
        if failed:
            note += f"; {len(failed)} that looked better failed on pictures that no trial saw"
        if dropped:
            note += f"; no {_CHEAPER[self.minimize]} and left out: {', '.join(dropped)}"
        if is_over:
            note += f"; ended by minutes: {self.minutes:g}"
        failures = [
            {"passes": describe(trial.chain), "why": trial.failure}
            for trial in made.values()
            if trial.failure
        ]
        metrics: dict[str, Value] = {_COLUMNS[name]: value for name, value in unseen.items()}
        metrics |= {"trials": len(made), "kept_speedup": speed}
        return Outcome(
            metrics=metrics,
            details={
                "note": note,
                "chain": winner.chain,
                "trials": rows,
                "could_not_be_made": failures,
                "scatter": {
                    "table": "trials",
                    "across": "speedup" if self.minimize == "latency" else _COSTS[self.minimize],
                    "up": _COLUMNS[next(iter(self.keep.limits))],
                },
            },
            format=final.format,
            sampling=final.sampling,
            runtime=final.runtime,
        )

    def _nearest(self, made: Mapping[Point, _Trial]) -> str:
        """Of each measure that was missed, who came nearest."""
        said = []
        for name, limit in self.keep.limits.items():
            found = [trial for trial in made.values() if trial.found]
            best = min(found, key=lambda trial: trial.found.errors[name])  # type: ignore[union-attr]
            assert best.found is not None
            if best.found.errors[name] > limit:
                said.append(f"nearest came {describe(best.chain)} with {_format(name, best.values[name])}")
        return "; ".join(said) or "each alone is kept by some, and all by none"


_COLUMNS = {"psnr": "psnr_db", "ssim": "ssim", "lpips": "lpips", "clip": "clip_drop"}
_CHEAPER = {"latency": "faster", "size": "smaller", "memory": "smaller in memory"}


@dataclass(frozen=True)
class _Axis:
    name: str
    choices: Sequence[list[Any]]
    """Chains as in YAML; the first is empty."""


@dataclass
class _Trial:
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

    def artifact(self, judge: _Judge) -> Artifact:
        """Opens what was made."""
        from tunekit.artifacts import Artifact

        if self.folder is None:
            return judge.parent
        return Artifact.load(judge.aside.run_dir / self.folder)


class _Judge:
    """Draws, compares, measures."""

    def __init__(self, search: Search, parent: Artifact, context: Context) -> None:
        self.parent, self.context, self.search = parent, context, search
        self.provider = TARGETS[search.target].provider
        prompts = context.prompts or PROMPTS
        # With one prompt alone, what nobody saw are other seeds of it.
        self.prompts = {False: list(prompts[::2]), True: list(prompts[1::2] or prompts)}
        aside = context.aside(RunFolder(context.run_dir).trials.name)
        self.aside = dataclasses.replace(aside, prompts=tuple(self.prompts[False]))
        self.judges = search.keep.judges
        self._wanted: dict[bool, Tensor] = {}
        self._scored: dict[bool, float] = {}

    def drawn(self, *, unseen: bool) -> tuple[list[str], list[int]]:
        """Prompts and seeds of the pictures."""
        count, first = self.search.pictures, self.context.seed + (2 * ASIDE if unseen else ASIDE)
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
        if self.search.minimize == "size":
            figures = {"size_bytes": model.size_bytes, "cost": float(model.size_bytes)}
            return {**figures, "ratio": model.size_bytes / origin.size_bytes if origin else 1.0}
        sides = [side for side in (origin, model) if side is not None]
        rows = self._compared(sides, memory=self.search.minimize == "memory")
        name, own, first = _COSTS[self.search.minimize], rows[-1], rows[0]
        if own[name] is None:
            raise ChainError(f"its {name} cannot be measured on this device")
        ratio = 1.0 if origin is None else own[name] / first[name]
        if origin is not None and self.search.minimize == "latency":
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


class _Book:
    """What was tried in this run folder, by all searches."""

    def __init__(self, path: Path, search: Search, judge: _Judge) -> None:
        self.path = path
        asked = [search.target, search.minimize, search.pictures, judge.context.seed, judge.prompts[False]]
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

    def find(self, chain: Sequence[Any]) -> _Trial | None:
        """A trial that was made; None where its artifact is gone."""
        line = self.lines.get(self.key(chain))
        if line is None or (line.folder and not (self.path.parent / line.folder / RECORD).is_file()):
            return None
        found = None if line.errors is None or line.cost is None else Found(line.errors, line.cost)
        self.count += 1
        return _Trial(
            list(line.chain),
            line.folder,
            found,
            line.values,
            line.figures,
            line.seconds,
            line.failure,
            self.count,
        )

    def add(self, trial: _Trial) -> _Trial:
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


def describe(chain: Sequence[Any]) -> str:
    """A chain in a few words: "prune ratio 0.3, heal, export_onnx, quantize mode static"."""
    words = []
    for item in chain:
        ((kind, settings),) = item.items() if isinstance(item, Mapping) else ((item, None),)
        words.append(" ".join([str(kind), *_told(settings or {})]))
    return ", ".join(words) or "nothing"


def _told(settings: Mapping[str, Any]) -> list[str]:
    """Settings in words; of lists, nothing."""
    return [
        " ".join([key, *_told(value)]) if isinstance(value, Mapping) else f"{key} {value}"
        for key, value in settings.items()
        if not isinstance(value, list)
    ]


def _as_error(name: str, value: float) -> float:
    """As an error that adds up: of PSNR the mean squared error, of SSIM what is missing."""
    if name == "psnr":
        return float(10 ** (-value / 10))
    return float(1 - value if name == "ssim" else value)


def _format(name: str, value: float) -> str:
    if name == "psnr":
        return f"PSNR {value:.1f} dB"
    return f"{_NAMES[name]} {value:.4f}"


_NAMES = {"ssim": "SSIM", "lpips": "LPIPS", "clip": "CLIP score less"}


def _quality(values: Mapping[str, float]) -> str:
    return ", ".join(_format(name, value) for name, value in values.items())


def _wanted(keep: Keep) -> str:
    return " and ".join(_format(name, value) for name, value in keep.given.items())


def _copy(model: Artifact, folder: Path) -> None:
    """The files of an artifact, without its record; as links where the disk has them: they never change."""
    if model.model_path is None:
        raise ChainError(
            "search: nothing is cheaper than the model that came in, which is on a hub and not copied",
            hint="leave the search out",
        )
    for name, path in model_files(model.model_path).items():
        link_file(path, folder / name)


def _zero(point: Point) -> Point:
    return (0,) * len(point)


def _single(axes: int, axis: int, choice: int) -> Point:
    return tuple(choice if index == axis else 0 for index in range(axes))


PASS = Search
