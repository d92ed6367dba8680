"""How many steps can take the middle of the denoiser from an earlier step, pictures staying what they are.

No weight changes. Pictures are drawn as the model is drawn now, then with the whole denoiser in every second
step alone, every third and on, each both ways: the middle as it was, and carried on in a straight line. The
largest interval that keeps what has to be kept is taken, verified on prompts and seeds that were not searched
on, and timed against the model before; where that is not faster here, the model's settings stay.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from tunekit.config import CacheConfig, SamplingConfig, Text
from tunekit.errors import ChainError
from tunekit.passes.base import DISTINCT, SAMPLING, Context, Distinct, Ladder, Outcome, Pass
from tunekit.passes.metrics import PSNR, Metric, Value
from tunekit.passes.tune_sampler import APART, Compared, Keep, Pictures

if TYPE_CHECKING:
    from tunekit.artifacts import Artifact
    from tunekit.runtime import Runtime

ROUNDS = 3
"""Pictures that are timed, each way."""


class Cache(Pass):
    """Finds how many steps can reuse what the middle of the denoiser gave, at the quality that is kept."""

    kind: ClassVar[str] = "cache"
    accepts: ClassVar[frozenset[str]] = frozenset({"torch", "onnx", "openvino"})
    redraws: ClassVar[bool] = True
    refuses: ClassVar[Mapping[str, str]] = {
        "cached": "comes after {giver}, and steps are cached already; leave one of them out"
    }
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("cache_interval", "whole step every", "count", rank=18),
        Metric("cache_speedup", "speed-up by cache", "x", lower_is_better=False, rank=44),
        PSNR,
    )

    keep: Keep = Keep()
    """What the pictures must keep; the largest interval that does is taken."""
    interval: int | None = Field(None, ge=2, le=100)
    """Exactly every so many-th step whole, whatever that keeps; null: the largest that keeps enough."""
    intervals: Distinct[Annotated[int, Field(ge=2, le=100)]] = Field([2, 3, 4, 5, 6, 8, 10], min_length=1)
    """To try."""
    prompts: Annotated[list[Text], DISTINCT, Field(min_length=1, max_length=1000)] | None = None
    """What is drawn: every other prompt is searched with, the rest verified with. null: the run's."""
    pictures: int = Field(8, ge=1, le=64)
    """Pictures that are searched on, and as many again that the search does not see."""

    @classmethod
    def options(cls, target: str, minutes: float) -> Sequence[Ladder]:
        """Ever larger intervals."""
        if target not in ("cpu", "cuda", "openvino", "torch"):
            return ()
        return [[[{cls.kind: {"interval": interval, "pictures": 4}}] for interval in (2, 3, 5, 8)]]

    def gives(self) -> frozenset[str]:
        """That steps are cached, which engines of one graph cannot do."""
        return frozenset({"cached"})

    def problem(self, format: str, earlier: Sequence[Pass]) -> str | None:
        """Refuses two goals at once."""
        given = self.model_fields_set
        if self.interval is not None and (both := " and ".join(sorted({"keep", "intervals"} & given))):
            return f"sets interval and {both}: with one interval nothing is searched; leave one of them out"
        return None

    def reads(self, context: Context) -> frozenset[str]:
        """What is drawn, and how it is drawn now."""
        return frozenset({"seed", *SAMPLING} | (set() if self.prompts else {"prompts"}))

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        """Draws, searches, verifies on other pictures, times, and writes what was found into the step.

        Raises:
            ChainError: the model's own pictures are not finite, or a family without a middle.
        """
        from tunekit.passes.verify import PROMPTS, save_pictures

        prompts = list(self.prompts or context.prompts or PROMPTS)
        seen, unseen = prompts[::2], prompts[1::2] or prompts
        with context.running(artifact) as runtime:
            if runtime.family.middle(runtime.family.denoiser(runtime.pipeline)) is None:
                raise ChainError(
                    f"cache: {runtime.family.facts.title} in {artifact.format} has no part that steps could"
                    " take from another",
                    where=artifact.source,
                    hint="a transformer is cached in torch alone; leave the step out",
                )
            sampling = context.sampling_of(artifact).over(runtime.sampling)
            own = sampling.model_copy(update={"cache": None})
            drawn = Pictures(runtime, own, seen, context.seed, self.pictures, context.models)
            search = _Search(drawn, own, context)
            others = Pictures(runtime, own, unseen, context.seed + APART, self.pictures, context.models)
            bar = None if self.interval is not None else self.keep.psnr
            taken, found = self._verified(search, others, bar)
            steps = own.steps or 1
            shown = others.prompts, others.seeds
            pictures = save_pictures(
                others.wanted, "before", f"every step whole, {steps} steps", *shown, context
            )
            if taken is None:
                near = search.nearest
                note = (
                    f"psnr {self.keep.psnr:g} is not kept by any interval; nearest: {near.words},"
                    f" {near.found.mean:.1f} dB; every step stays whole"
                )
                faster = 1.0
            else:
                pictures += save_pictures(others.latest, "after", taken.words, *shown, context)
                faster = _speedup(runtime, own, taken.sampling, others.prompts, context.seed)
                whole = -(-steps // taken.interval)
                note = (
                    f"{taken.words}: {whole} of {steps} steps whole, {found.mean:.1f} dB"
                    f" (worst {found.worst:.1f}) on {len(others.seeds)} unseen pictures,"
                    f" a picture {faster:.2f}x as fast"
                )
                if faster <= 1 and self.interval is None:
                    taken, note = None, f"{note}: no faster here, and every step stays whole"
        context.say(note)
        metrics: dict[str, Value] = {
            "cache_interval": taken.interval if taken else 1,
            "cache_speedup": faster if taken else 1.0,
            "psnr_db": found.mean if taken else others.compare(own).mean,
        }
        if taken:
            metrics["psnr_db_worst"] = found.worst
        return Outcome(
            metrics=metrics,
            details={"note": note, "tried": search.table(taken)},
            pictures=pictures,
            sampling=SamplingConfig(cache=taken.sampling.cache) if taken else None,
        )

    def _verified(self, search: _Search, others: Pictures, bar: float | None) -> tuple[_Try | None, Compared]:
        """The largest interval that keeps the bar, on pictures that were not searched on too."""
        intervals = sorted([self.interval] if self.interval is not None else self.intervals)
        kept: list[_Try] = []
        for interval in intervals:
            best = search.best(interval)
            if bar is not None and best.found.mean < bar:
                break
            kept.append(best)
        found = others.compare(others.own)
        for trial in reversed(kept):
            found = others.compare(trial.sampling)
            if bar is None or found.mean >= bar:
                return trial, found
            search.context.say(f"{trial.words}: {found.mean:.1f} dB on unseen pictures")
        return None, found


@dataclass(frozen=True)
class _Try:
    """One way that was drawn."""

    sampling: SamplingConfig
    found: Compared

    @property
    def cache(self) -> CacheConfig:
        """How steps are cached."""
        assert self.sampling.cache is not None
        return self.sampling.cache

    @property
    def interval(self) -> int:
        """Of whole steps."""
        return self.cache.interval

    @property
    def words(self) -> str:
        """For people."""
        return f"every {self.interval} steps whole, order {self.cache.order}"


class _Search:
    """Draws with cached steps, and remembers what came out."""

    def __init__(self, pictures: Pictures, own: SamplingConfig, context: Context) -> None:
        self.pictures, self.own, self.context = pictures, own, context
        self.tried: list[_Try] = []

    def best(self, interval: int) -> _Try:
        """The better of the two orders."""
        tries = []
        for order in (0, 1):
            cache = CacheConfig(interval=interval, order=order)
            sampling = self.own.model_copy(update={"cache": cache})
            made = _Try(sampling, self.pictures.compare(sampling))
            self.context.say(f"{made.words}: {made.found.mean:.1f} / {made.found.worst:.1f} dB")
            tries.append(made)
        self.tried += tries
        return max(tries, key=lambda one: one.found.mean)

    @property
    def nearest(self) -> _Try:
        """The best pictures of all that was tried."""
        return max(self.tried, key=lambda one: one.found.mean)

    def table(self, taken: _Try | None) -> list[dict[str, Any]]:
        """A row for each way that was tried, for the report."""
        return [
            {
                "whole every": one.interval,
                "order": one.cache.order,
                "psnr_db": one.found.mean,
                "psnr_db_worst": one.found.worst,
                "taken": "yes" if one is taken else "",
            }
            for one in self.tried
        ]


def _speedup(
    runtime: Runtime, own: SamplingConfig, cached: SamplingConfig, prompts: Sequence[str], seed: int
) -> float:
    """How many times as fast a picture is; the two ways are timed in turns."""
    from tunekit.passes.benchmark import percentile
    from tunekit.runtime import generate_pixels

    ratios = []
    for index in range(ROUNDS):
        prompt, seconds = prompts[index % len(prompts)], [0.0, 0.0]
        for side in ((0, 1), (1, 0))[index % 2]:
            started = time.perf_counter()
            generate_pixels(runtime, [prompt], (own, cached)[side], seeds=[seed + index])
            seconds[side] = time.perf_counter() - started
        ratios.append(seconds[0] / seconds[1])
    return percentile(ratios, 50)


PASS = Cache
