"""The fewest calls of the denoiser that still draw the pictures which a model's own settings draw.

No weight changes. Samplers that suit the model are tried from the same noise, each in ever fewer steps, and
their pictures compared with those of the model's own settings. For each sampler the fewest steps are found by
halving, as fidelity grows with steps, near enough; a sampler that cannot do better than the best so far costs
one try. Then ever fewer calls are shared out otherwise: more steps, and guidance in the first or the last of
them alone. In few steps that can be nearer than guidance everywhere, whose last steps overshoot.

A call is one row through the denoiser: a step with guidance has two, one with and one without the prompt.
What was found is drawn once more, with prompts and seeds that the search has not seen, and its figures are of
those pictures. If it is worse there than asked for, a step is added, a few times at most.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from tunekit.config import SamplingConfig, SamplingSteps, Section, Text
from tunekit.errors import ChainError
from tunekit.passes.base import DISTINCT, SAMPLING, Context, Distinct, Ladder, Outcome, Pass, Start
from tunekit.passes.metrics import PSNR, Metric
from tunekit.passes.samplers import OWN, Candidate, Sampler, Spacing, calls, candidates, unsuited

if TYPE_CHECKING:
    from torch import Tensor

    from tunekit.artifacts import Artifact
    from tunekit.diffusion.sampling import Guided
    from tunekit.families.family import Conditioning
    from tunekit.passes.models import Models
    from tunekit.runtime import Runtime

AT_ONCE = 4
APART = 1000
"""Between the seeds of the pictures that are searched on, verified with, and compared for a floor."""
MORE = 3
"""Steps, or calls, that are added at most where unseen pictures are worse than those searched on."""
SPLITS = 5
"""Ways to share calls out between steps and guidance that are tried at most for a number of calls."""

FAR_DB = 3.0
"""A way whose first pictures are so far below what has to be kept is not looked at longer."""


class Keep(Section):
    """How near pictures stay to those of the model's own settings."""

    psnr: float = Field(30, gt=0, le=100)
    """Mean PSNR of the pictures, in dB."""


class TuneSampler(Pass):
    """Finds the sampler, steps and guidance that keep the pictures in the fewest calls of the denoiser."""

    kind: ClassVar[str] = "tune_sampler"
    accepts: ClassVar[frozenset[str]] = frozenset({"torch", "onnx", "openvino"})
    redraws: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("calls", "denoiser calls", "count", lower_is_better=True, rank=19),
        PSNR,
    )

    keep: Keep = Keep()
    """What the pictures must keep; the fewest calls that do are taken."""
    steps: SamplingSteps | None = None
    """Exactly so many steps: the sampler that draws them best is taken, whatever it keeps."""
    calls: Annotated[int, Field(ge=1, le=2000)] | None = None
    """At most so many calls of the denoiser for a picture: what draws best in them is taken, whatever it
    keeps. A step with guidance has two."""
    samplers: Distinct[Sampler] | None = Field(None, min_length=1)
    """Which may be taken, beside the model's own; null: all that suit the model."""
    spacings: Distinct[Spacing] | None = Field(None, min_length=1)
    """How timesteps may be spread, where a sampler has a choice; null: trailing and leading."""
    interval: bool = True
    """Guidance may be left out of the first or the last steps, which then take one call each."""
    prompts: Annotated[list[Text], DISTINCT, Field(min_length=1, max_length=1000)] | None = None
    """What is drawn: every other prompt is searched with, the rest verified with. null: the run's."""
    pictures: int = Field(8, ge=1, le=64)
    """Pictures that are searched on, and as many again that the search does not see."""
    minutes: float = Field(10, gt=0, le=1440)
    """After which no more is tried, and the best so far is taken."""

    @classmethod
    def options(cls, target: str, minutes: float) -> Sequence[Ladder]:
        """Ever fewer calls, in the samplers that need fewest."""
        shared = {"samplers": ["lcm", "ddim", "unipc", "dpm++2m"], "pictures": 4}
        counts = (32, 24, 16, 12, 10, 8, 7, 6, 5, 4, 3, 2)
        return [[[{cls.kind: {"calls": calls, **shared}}] for calls in counts]]

    def problem(self, format: str, earlier: Sequence[Pass]) -> str | None:
        """Refuses two goals at once."""
        fixed = [name for name in ("steps", "calls") if getattr(self, name) is not None]
        if len(fixed) > 1:
            return "sets steps and calls: one of them says how much is drawn; leave the other out"
        if fixed and "keep" in self.model_fields_set:
            return (
                f"sets {fixed[0]} and keep: with a fixed number of {fixed[0]} nothing is kept; leave one of"
                " them out"
            )
        return None

    @property
    def _fixed(self) -> bool:
        """Whether it is said how much is drawn, and not what is kept."""
        return self.steps is not None or self.calls is not None

    def objection(self, start: Start, earlier: Sequence[Pass]) -> str | None:
        """Finds samplers that no model of the family is drawn with."""
        if not start.family or not self.samplers:
            return None
        from tunekit import families

        return unsuited(self.samplers, families.planned(start.family).facts)

    def reads(self, context: Context) -> frozenset[str]:
        """What is drawn, and how it is drawn now."""
        return frozenset({"seed", *SAMPLING} | (set() if self.prompts else {"prompts"}))

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        """Draws, searches, verifies what was found on other pictures, and writes both into the step.

        Raises:
            ChainError: the model's own pictures are not finite.
        """
        from tunekit.passes.verify import PROMPTS, save_pictures

        prompts = list(self.prompts or context.prompts or PROMPTS)
        seen, unseen = prompts[::2], prompts[1::2] or prompts
        with context.running(artifact) as runtime:
            own = context.sampling_of(artifact).over(runtime.sampling)
            search = _Search(
                Pictures(runtime, own, seen, context.seed, self.pictures, context.models),
                self.keep.psnr,
                time.monotonic() + 60 * self.minutes,
                context.say,
            )
            found, troubles = candidates(runtime, own, self.samplers, self.spacings)
            for trouble in troubles:
                context.say(trouble)
            if self.steps is not None:
                best: _Try | None = search.at(found, self.steps)
            elif self.calls is not None:
                best = search.within(found, self.calls, guidance=self.interval)
            else:
                best = search.fewest(found, guidance=self.interval)
            others = Pictures(runtime, own, unseen, context.seed + APART, self.pictures, context.models)
            taken, final, note = self._verified(search, best, others)
            floor = None if self._fixed else search.pictures.floor  # nothing is said to be near enough
        shown = others.prompts, others.seeds
        pictures = [
            *save_pictures(others.wanted, "before", f"as before, {own.steps} steps", *shown, context),
            *save_pictures(others.latest, "after", f"tuned: {taken.words}", *shown, context),
        ]
        if floor is not None:
            note += f"; pictures of another seed are {floor:.1f} dB apart"
        context.say(note)
        changes = {
            name: value
            for name in ("steps", "guidance", "guidance_interval", "scheduler")
            if (value := getattr(taken.sampling, name)) is not None
        }
        return Outcome(
            metrics={
                "calls": taken.calls,
                "calls_before": search.pictures.calls,
                "psnr_db": final.mean,
                "psnr_db_worst": final.worst,
                **({} if floor is None else {"psnr_db_floor": floor}),
            },
            details={"note": note, "tried": search.table(taken)},
            pictures=pictures,
            sampling=SamplingConfig(**changes),
        )

    def _verified(self, search: _Search, best: _Try | None, others: Pictures) -> tuple[_Try, Compared, str]:
        """What is taken, on pictures that the search has not seen, and a line about it."""
        own = search.own
        before = f"instead of {own.calls} ({own.sampling.steps} steps)"
        trial = best
        while trial is not None:
            found = others.compare(trial.sampling)
            kept = f"{found.mean:.1f} dB (worst {found.worst:.1f}) on {len(others.seeds)} unseen pictures"
            if self._fixed or found.mean >= self.keep.psnr:
                return trial, found, f"{trial.words}: {trial.calls} calls {before}, {kept}"
            search.say(f"{trial.words}: {kept}")
            trial = search.after(trial, best)
        nearest = search.nearest
        if nearest is None:
            why = "nothing draws in fewer calls"
        else:
            why = f"nearest: {nearest.words}, {nearest.calls} calls, {nearest.found.mean:.1f} dB"
            if best is not None:
                why = f"on pictures that the search had not seen; {why} on those it had"
        missed = f"psnr {self.keep.psnr:g} is not kept in fewer calls than {own.calls}"
        return own, others.compare(own.sampling), f"{missed}; {why}; its settings stay"


# Pictures ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """Pictures beside those of the model's own settings, in dB."""

    mean: float
    worst: float
    count: int
    """Pictures that were drawn."""


class Pictures:
    """Prompts and seeds, and what the model's own settings draw of them."""

    def __init__(
        self,
        runtime: Runtime,
        own: SamplingConfig,
        prompts: Sequence[str],
        seed: int,
        count: int,
        models: Models | None = None,
    ) -> None:
        """Draws with the model's own settings, for all chains that share `models` once."""
        import torch

        self.runtime, self.own = runtime, own
        self.prompts = list(islice(cycle(prompts), count))
        self.seeds = [seed + index for index in range(count)]
        self._told: dict[Any, tuple[Conditioning, Guided | None]] = {}

        def drawn() -> Tensor:
            return torch.cat(list(self._draw(own, self.seeds)))

        if models is None or runtime.artifact is None:
            self.wanted = drawn()
        else:
            said = [runtime.artifact.hash, runtime.title, own.model_dump_json(), self.prompts, self.seeds]
            self.wanted = models.once(f"pictures {said}", drawn)
        self.latest = self.wanted  # what was drawn last
        self.calls = calls(runtime, own)
        if not bool(self.wanted.isfinite().all()):
            raise ChainError(
                "tune_sampler has nothing to compare with: the model draws values that are not finite",
                where=runtime.artifact.source if runtime.artifact else None,
            )

    @property
    def floor(self) -> float:
        """What two seeds of one prompt have in common, in dB: less says nothing."""
        import torch

        seeds = [seed + 2 * APART for seed in self.seeds]
        return self._compared(torch.cat(list(self._draw(self.own, seeds)))).mean

    def compare(self, sampling: SamplingConfig, bar: float | None = None) -> Compared:
        """Draws the same another way.

        Args:
            bar: what has to be reached, in dB; where the first few are far below, no more are drawn.
        """
        import torch

        if sampling == self.own:
            self.latest = self.wanted
            return self._compared(self.wanted)
        parts: list[Tensor] = []
        for part in self._draw(sampling, self.seeds):
            parts.append(part)
            self.latest = torch.cat(parts)
            found = self._compared(self.latest)
            if bar is not None and found.mean < bar - FAR_DB:
                break
        return found

    def _compared(self, pixels: Tensor) -> Compared:
        from tunekit.diffusion.metrics import psnr_db

        wanted = self.wanted[: len(pixels)]
        each = [psnr_db(a, b) for a, b in zip(pixels, wanted, strict=True)]
        if not all(map(math.isfinite, each)):
            return Compared(-math.inf, -math.inf, len(each))
        return Compared(sum(each) / len(each), min(each), len(each))

    def _draw(self, sampling: SamplingConfig, seeds: Sequence[int]) -> Iterator[Tensor]:
        from tunekit.runtime import sample_pixels

        runtime = self.runtime
        for start in range(0, len(seeds), AT_ONCE):
            prompts = self.prompts[start : start + AT_ONCE]
            key = (start, sampling.guidance)  # some denoisers are told the guidance
            if key not in self._told:
                told, guided = runtime.conditioning(prompts, sampling), runtime.guided(len(prompts), sampling)
                self._told[key] = told, guided
            told, guided = self._told[key]
            if guided is not None:
                guided = guided._replace(interval=sampling.guidance_interval)
            yield sample_pixels(runtime, told, guided, sampling, seeds=seeds[start : start + AT_ONCE])


# The search -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Try:
    """One way that was drawn."""

    name: str
    sampling: SamplingConfig
    calls: int
    found: Compared
    candidate: Candidate

    @property
    def words(self) -> str:
        guided = self.sampling.guidance_interval
        part = "" if guided is None else f", guidance in {guided[0]:.0%} to {guided[1]:.0%} of them"
        return f"{self.name}, {self.sampling.steps} steps{part}"


@dataclass
class _Search:
    """Tries ways to draw, and keeps the best.

    Attributes:
        pictures: what all are compared on.
        keep: mean PSNR that has to be kept, in dB.
        until: moment after which nothing more is tried.
        say: shows a line.
    """

    pictures: Pictures
    keep: float
    until: float
    say: Callable[[str], None]
    tried: list[_Try] = field(default_factory=list)
    stopped: bool = False
    _guided: _Try | None = None
    """The fewest calls with guidance in every step."""

    @property
    def own(self) -> _Try:
        """The model's settings as they are."""
        pictures = self.pictures
        same = pictures.compare(pictures.own)
        return _Try(OWN, pictures.own, pictures.calls, same, Candidate(OWN, pictures.own))

    @property
    def nearest(self) -> _Try | None:
        """The best pictures in fewer calls than the model's own."""
        fewer = [one for one in self.tried if one.calls < self.pictures.calls]
        return max(fewer, key=lambda one: one.found.mean, default=None)

    def at(self, found: Sequence[Candidate], steps: int) -> _Try:
        """The sampler that draws best in so many steps.

        Raises:
            ChainError: none takes so many.
        """
        tries = [made for candidate in found if (made := self._try(candidate, candidate.at(steps)))]
        if not tries:
            raise ChainError(f"tune_sampler: no sampler of this model takes {steps} steps")
        return max(tries, key=lambda one: one.found.mean)

    def within(self, found: Sequence[Candidate], count: int, *, guidance: bool) -> _Try:
        """What draws best in so many calls of the denoiser, or one less where each step has two.

        Each sampler is tried with guidance everywhere, and in the first part of more steps; the best of them
        in every other way to share the calls out.

        Raises:
            ChainError: none can.
        """
        best: _Try | None = None
        for candidate in found:
            ways = self._ways(candidate, count, guidance=guidance)
            best = _nearer([best, *(self._try(candidate, way) for way in (*ways[:1], *ways[2:3]))])
        if best is None:
            raise ChainError(
                f"tune_sampler: no sampler of this model draws in {count} calls; with guidance a step has two"
            )
        ways = self._ways(best.candidate, count, guidance=guidance)
        return _nearer([best, *(self._try(best.candidate, way) for way in ways)]) or best

    def _ways(self, candidate: Candidate, count: int, *, guidance: bool) -> list[SamplingConfig]:
        """How a sampler can spend so many calls: guided in all steps, then in the first of ever more."""
        runtime, most = self.pictures.runtime, self.pictures.own.steps or 1
        fitting = (s for s in range(min(count, most), 0, -1) if _count(runtime, candidate.at(s)) <= count)
        whole = next(fitting, 0)
        ways = [candidate.at(whole)] if whole else []
        if not guidance or candidate.sampling.guidance_interval is not None or whole >= count:
            return ways
        splits = range(whole + 1, min(count, most + 1))
        every = max(1, -(-len(splits) // SPLITS))
        for steps in splits[::every]:
            ways.append(candidate.at(steps, (0.0, _before(count - steps, steps))))
        if splits:  # rarely better, and one try
            steps = splits[0]
            ways.append(candidate.at(steps, (_before(steps - (count - steps), steps), 1.0)))
        return [way for way in ways if _count(runtime, way) <= count]

    def fewest(self, found: Sequence[Candidate], *, guidance: bool) -> _Try | None:
        """The fewest calls that keep what has to be kept, the best of several; None where none does."""
        self.say("mean / worst of the pictures; the sampler, and where guidance is on, if not everywhere")
        best: _Try | None = None
        for candidate in [*found[1:], *found[:1]]:  # the model's own rarely wins, and is one try then
            best = self._fewest(candidate, best)
        self._guided = best
        if best is not None and guidance:
            best = self._less_guidance(best)
            for other in found:  # who overshoots with guidance everywhere may be the best without
                ways = self._ways(other, best.calls - 1, guidance=True)[2:3]
                if other is not best.candidate and ways and (made := self._kept(other, ways[0])):
                    best = self._less_guidance(made)
        if self.stopped:
            self.say("the time is over, and not all was tried")
        return best

    def after(self, last: _Try, best: _Try | None) -> _Try | None:
        """Where unseen pictures were worse: the same with one call more or a few; None after some."""
        assert best is not None
        assert last.sampling.steps is not None
        if last.sampling.guidance_interval != last.candidate.sampling.guidance_interval:
            guided = self._guided
            for count in range(last.calls + 1, best.calls + MORE + 1):
                if guided is not None and count >= guided.calls:
                    break
                made = self._kept_within(last.candidate, count)
                if made is not None and made.calls > last.calls:
                    return made
            return guided
        first = self._guided or best
        steps = last.sampling.steps + 1
        if steps > (first.sampling.steps or 1) + MORE:
            return None
        more = self._try(last.candidate, last.candidate.at(steps))
        return more if more is not None and more.calls < self.pictures.calls else None

    def table(self, taken: _Try) -> list[dict[str, Any]]:
        """A row for each way that was tried, for the report."""
        rows = sorted(self.tried, key=lambda one: (one.calls, -one.found.mean))
        return [
            {
                "sampler": one.name,
                "steps": one.sampling.steps,
                "guided": " to ".join(f"{share:.0%}" for share in one.sampling.guidance_interval or ())
                or "all",
                "calls": one.calls,
                "psnr_db": one.found.mean,
                "psnr_db_worst": one.found.worst,
                "pictures": one.found.count,
                "taken": "yes" if one.sampling == taken.sampling else "",
            }
            for one in rows
        ]

    def _try(self, candidate: Candidate, sampling: SamplingConfig, bar: float | None = None) -> _Try | None:
        """Draws so; None if the sampler cannot, or the time is over."""
        known = next((one for one in self.tried if one.sampling == sampling), None)
        if known is not None:
            return known
        if self.tried and time.monotonic() > self.until:
            self.stopped = True
            return None
        try:
            count = calls(self.pictures.runtime, sampling)
            found = self.pictures.compare(sampling, bar)
        except (ValueError, IndexError) as error:  # of diffusers' samplers, which have limits of their own
            self.say(f"{candidate.name} does not take {sampling.steps} steps: {error}")
            return None
        made = _Try(candidate.name, sampling, count, found, candidate)
        self.tried.append(made)
        interval = sampling.guidance_interval
        part = "" if interval is None else f" {100 * interval[0]:.0f}-{interval[1]:.0%}"
        decibels = f"{found.mean:5.1f} / {found.worst:.1f} dB"
        self.say(f"{count:4d} calls {sampling.steps:3d} steps {decibels}  {made.name}{part}")
        return made

    def _fewest(self, candidate: Candidate, best: _Try | None) -> _Try | None:
        """The better of `best` and what a candidate can do; its steps are found by halving."""
        runtime, pictures = self.pictures.runtime, self.pictures
        limit = best.calls if best is not None else pictures.calls - 1
        high, low = pictures.own.steps or 0, 1
        while high and _count(runtime, candidate.at(high)) > limit:
            high -= 1
        found = None
        # Of the first one, the most steps would be as good as the model's own, and take as long.
        if best is not None and high:
            found = self._kept(candidate, candidate.at(high))
            if found is None:
                return best
        while low < high:
            middle = (low + high) // 2
            if made := self._kept(candidate, candidate.at(middle)):
                found, high = made, middle
            else:
                low = middle + 1
        if found is None and high:
            found = self._kept(candidate, candidate.at(high))
        return _better(found, best)

    def _less_guidance(self, best: _Try) -> _Try:
        """Ever fewer calls, found by halving, with guidance in a part of the steps."""
        candidate = best.candidate
        if candidate.sampling.guidance_interval is not None or best.calls == best.sampling.steps:
            return best  # it is decided already, or there is none
        low, high = 2, best.calls
        while low < high:
            middle = (low + high) // 2
            if made := self._kept_within(candidate, middle):
                best, high = made, middle
            else:
                low = middle + 1
        return best

    def _kept_within(self, candidate: Candidate, count: int) -> _Try | None:
        """A way to share so many calls out that keeps what has to be kept."""
        ways = self._ways(candidate, count, guidance=True)
        return next((made for way in ways[1:] if (made := self._kept(candidate, way))), None)

    def _kept(self, candidate: Candidate, sampling: SamplingConfig) -> _Try | None:
        """A way, drawn, if it keeps what has to be kept."""
        made = self._try(candidate, sampling, bar=self.keep)
        return made if made is not None and made.found.mean >= self.keep else None


def _better(one: _Try | None, other: _Try | None) -> _Try | None:
    known = [made for made in (one, other) if made is not None]
    return min(known, key=lambda made: (made.calls, -made.found.mean), default=None)


def _nearer(tries: Sequence[_Try | None]) -> _Try | None:
    """The best pictures; of equal ones, those of fewer calls."""
    known = [made for made in tries if made is not None]
    return max(known, key=lambda made: (made.found.mean, -made.calls), default=None)


def _count(runtime: Runtime, sampling: SamplingConfig) -> float:
    """Calls of the denoiser; endless where the sampler does not take so many steps."""
    try:
        return calls(runtime, sampling)
    except ValueError:
        return math.inf


def _before(step: int, total: int) -> float:
    """A share of the steps that lies between a step and the one before it."""
    return round((step - 0.5) / total, 3)


PASS = TuneSampler
