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
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, field_validator, model_validator

from tunekit.artifacts import RunFolder
from tunekit.config import refuse, wrong
from tunekit.errors import (
    ArtifactError,
    ChainError,
    ConfigError,
    ModelError,
    NonFiniteError,
    VerificationFailed,
    did_you_mean,
)
from tunekit.passes.base import EVERYTHING, Context, Outcome, Pass, Start, parse_chain, run_chain
from tunekit.passes.likeness import Judged
from tunekit.passes.metrics import CLIP_DROP, LPIPS, PSNR, SSIM, Metric, Value
from tunekit.passes.providers import cannot_run
from tunekit.passes.space import TARGETS, Space, TargetName, describe
from tunekit.passes.tradeoff import Found, Point, Tradeoff
from tunekit.passes.trials import (
    COSTS,
    TRIALS,
    Asked,
    Book,
    Judge,
    Minimized,
    Trial,
    as_error,
    copy_model,
    in_words,
    quality,
)
from tunekit.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from tunekit.artifacts import Artifact

FAILURES = (ArtifactError, ChainError, ConfigError, ModelError, NonFiniteError, VerificationFailed)
"""Of a trial: that model cannot be made, and the search goes on."""


class Keep(Judged):
    """What must be kept, as means over the pictures; at least one."""

    psnr: float | None = Field(None, gt=0, le=150)
    """Lowest PSNR against the model as it came, in dB."""
    ssim: float | None = Field(None, gt=0, le=1)
    """Lowest SSIM."""
    lpips: float | None = Field(None, gt=0, le=10)
    """Largest LPIPS (AlexNet): 0 is equal, and from about 0.1 on people see it."""
    clip: float | None = Field(None, gt=0, le=2)
    """Largest drop of the CLIP score, the cosine between picture and prompt; usual scores are near 0.3."""

    @model_validator(mode="after")
    def _some(self) -> Keep:
        if not self.given:
            wrong("psnr", "says nothing to keep; give psnr (dB), ssim, lpips or clip, or some of them")
        return self

    @property
    def given(self) -> dict[str, float]:
        """Measure -> what was stated."""
        all_of_them = {"psnr": self.psnr, "ssim": self.ssim, "lpips": self.lpips, "clip": self.clip}
        return {name: value for name, value in all_of_them.items() if value is not None}

    @property
    def limits(self) -> dict[str, float]:
        """Measure -> largest error, as errors add up."""
        return {name: as_error(name, value) for name, value in self.given.items()}


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
    target: TargetName = "cpu"
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
            if isinstance(item, str) and not any(PASSES.get(name).options(target, 60) for target in TARGETS):
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
            self._space(start)
        except ChainError as error:
            if error.message.startswith("cannot try"):
                return error.message
            return f"has passes that cannot be tried: {error.message}"
        return None

    def _space(self, start: Start) -> Space:
        return Space.of(self.passes, self.target, self.minutes, start)

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        """Tries, judges, takes the best, verifies it, and puts it into `context.folder`.

        Raises:
            ChainError: nothing keeps what must be kept; says what came nearest.
        """
        space = self._space(Start.of(artifact, examples=bool(context.data or context.prompts)))
        judge = Judge(
            Asked(self.target, TARGETS[self.target].provider, self.minimize, self.pictures, self.keep.judges),
            artifact,
            context,
        )
        tradeoff = Tradeoff(space.sizes, self.keep.limits, space.rungs)
        book = Book(RunFolder(context.run_dir).trials / TRIALS, judge)
        made: dict[Point, Trial] = {}
        failed: list[str] = []
        left: list[str] = []
        began, before, is_over = time.monotonic(), 0.0, False
        for one in space.absent:
            context.say(f"not for this model: {one}")
        while True:
            point = None if is_over else tradeoff.next()
            if point is not None:
                chain = space.chain(point)
                spent = before + time.monotonic() - began
                known = book.find(chain)
                if known is None and made and spent > 60 * self.minutes:
                    context.say(f"{format_seconds(spent)} are over: {len(made)} trials were made")
                    is_over = True
                    continue
                if known is None and spent + _training(chain, made.values()) > 60 * self.minutes:
                    left.append(describe(chain))
                    tradeoff.known[point] = None
                    continue
                trial = known or self._try(chain, judge, book, context, origin=made.get(space.origin))
                before += known.seconds if known else 0.0
                made[point] = trial
                tradeoff.known[point] = trial.found
                context.say(f"trial {len(made)}: {describe(chain)}: {self._told(trial, made[space.origin])}")
                continue
            best = tradeoff.best()
            if not best:
                raise self._nothing(made, made[space.origin], failed)
            winner = made[best[0]]
            unseen = judge.fidelity(winner.artifact(judge), unseen=True)
            line = f"{describe(winner.chain)} on pictures that no trial saw: {quality(unseen)}"
            context.say(line)
            errors = {name: as_error(name, value) for name, value in unseen.items()}
            if Found(errors, 0.0).keeps(self.keep.limits):
                break
            failed.append(line)
            tradeoff.reject(best[0], errors)
        notes = []
        if failed:
            notes.append(f"{len(failed)} that looked better failed on pictures that no trial saw")
        if useless := [made[_single(space, *choice)] for choice in tradeoff.useless()]:
            words = ", ".join(describe(trial.chain) for trial in useless)
            notes.append(f"no {_CHEAPER[self.minimize]} and left out: {words}")
        if left:
            notes.append(f"no time to train: {', '.join(left)}")
        if is_over:
            notes.append(f"ended by minutes: {self.minutes:g}")
        front = set(tradeoff.front(next(iter(self.keep.limits))))
        return self._end(made, made[space.origin], winner, unseen, judge, context, front=front, notes=notes)

    # Trials -------------------------------------------------------------------------------------------------

    def _try(
        self, chain: list[Any], judge: Judge, book: Book, context: Context, origin: Trial | None
    ) -> Trial:
        """Makes one model and judges it; what cannot be made is a trial that failed."""
        started = time.monotonic()
        aside = dataclasses.replace(judge.aside, say=lambda line: None)
        context.say(f"trying {describe(chain)}")
        try:
            made = run_chain(parse_chain(chain), judge.parent, aside)
            values = judge.fidelity(made, unseen=False)
            figures = judge.cost(made, origin.artifact(judge) if origin and origin.found else None)
        except FAILURES as error:
            return book.add(
                Trial(chain, None, None, {}, {}, time.monotonic() - started, str(error).splitlines()[0])
            )
        errors = {name: as_error(name, value) for name, value in values.items()}
        # What stands beside it was measured at the same moment: of time only the ratio is worth anything.
        cost = figures["cost"] if origin is None or not origin.found else figures["ratio"] * origin.found.cost
        folder = made.path.name if made.path and made.path.parent == aside.run_dir else None
        seconds = time.monotonic() - started
        return book.add(Trial(chain, folder, Found(errors, cost), values, figures, seconds))

    def _told(self, trial: Trial, origin: Trial) -> str:
        if trial.found is None:
            return f"cannot be made: {trial.failure}"
        kept = "" if trial.found.keeps(self.keep.limits) else ", which is not kept"
        return f"{quality(trial.values)}{kept}; {self._cost(trial, origin)}"

    def _cost(self, trial: Trial, origin: Trial) -> str:
        assert trial.found is not None
        assert origin.found is not None
        if self.minimize == "latency":
            return f"{origin.found.cost / trial.found.cost:.2f}x as fast"
        return format_bytes(trial.found.cost)

    # The end ------------------------------------------------------------------------------------------------

    def _nothing(self, made: Mapping[Point, Trial], origin: Trial, failed: Sequence[str]) -> ChainError:
        """What to say where there is no winner."""
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
        made: Mapping[Point, Trial],
        origin: Trial,
        winner: Trial,
        unseen: Mapping[str, float],
        judge: Judge,
        context: Context,
        *,
        front: set[Point],
        notes: Sequence[str],
    ) -> Outcome:
        assert origin.found is not None
        final = winner.artifact(judge)
        copy_model(final, context.folder)
        speed = judge.speed(final)
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
        note = (
            f"{describe(winner.chain)}: {quality(unseen)} on {self.pictures} pictures that no trial saw"
            f" ({quality(winner.values)} on those that it was judged by), {speed:.2f}x as fast as the model"
            f" that came in; {len(made)} trials"
        )
        note = "; ".join([note, *notes])
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
                    "across": "speedup" if self.minimize == "latency" else COSTS[self.minimize],
                    "up": _COLUMNS[next(iter(self.keep.limits))],
                },
            },
            format=final.format,
            sampling=final.sampling,
            runtime=final.runtime,
        )

    def _nearest(self, made: Mapping[Point, Trial]) -> str:
        """Of each measure that was missed, who came nearest."""
        said = []
        for name, limit in self.keep.limits.items():
            found = [trial for trial in made.values() if trial.found]
            best = min(found, key=lambda trial: trial.found.errors[name])  # type: ignore[union-attr]
            assert best.found is not None
            if best.found.errors[name] > limit:
                said.append(f"nearest came {describe(best.chain)} with {in_words(name, best.values[name])}")
        return "; ".join(said) or "each alone is kept by some, and all by none"


_COLUMNS = {"psnr": "psnr_db", "ssim": "ssim", "lpips": "lpips", "clip": "clip_drop"}
_CHEAPER = {"latency": "faster", "size": "smaller", "memory": "smaller in memory"}


def _wanted(keep: Keep) -> str:
    return " and ".join(in_words(name, value) for name, value in keep.given.items())


def _single(space: Space, axis: int, choice: int) -> Point:
    return tuple(choice if index == axis else 0 for index in range(len(space.names)))


def _training(chain: Sequence[Any], made: Iterable[Trial]) -> float:
    """Seconds that what is trained for a chain may take, but for what other trials have trained."""
    there = {json.dumps(item) for trial in made for item in trial.chain}
    steps = parse_chain([item for item in chain if json.dumps(item) not in there])
    return 60.0 * sum(getattr(step, "minutes", None) or 0.0 for step in steps if step.learns)


PASS = Search
