"""How a model's graphs are run fastest on this machine, without another picture.

Threads, one call or two for a guidance pair, how far the graph is rewritten, how memory is kept: which is
fastest depends on the graph and on the processor, so it is measured. Choices are made one after the other;
those of one kind are called in turns with the best so far, round after round, so that a busy moment counts on
all sides. A choice is taken if the median of its rounds beats the best so far by `margin` and it wins three
rounds of four; else the runtime's own stays. One that computes something else is not taken, however fast.

In the end whole pictures are drawn both ways, in turns too: they must agree, and be no slower.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunekit import hardware
from tunekit.config import RuntimeConfig
from tunekit.passes.base import SAMPLING, Context, Distinct, Ladder, Outcome, Pass
from tunekit.passes.metrics import PSNR, Metric, Value
from tunekit.passes.providers import Provider, cannot_run

if TYPE_CHECKING:
    from torch import Tensor

    from tunekit.artifacts import Artifact
    from tunekit.config import SamplingConfig
    from tunekit.diffusion.sampling import Guided
    from tunekit.families.family import Conditioning
    from tunekit.runtime import Runtime

MOST_ERROR = 1e-3
"""Relative error of one call, up to which two ways compute the same: other orders of adding up."""
WINS = 0.75
"""Share of the rounds that a choice has to be faster in."""


class TuneRuntime(Pass):
    """Measures how graphs run fastest on this machine, pictures staying the same, and keeps that."""

    kind: ClassVar[str] = "tune_runtime"
    accepts: ClassVar[frozenset[str]] = frozenset({"onnx", "openvino"})
    redraws: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("runtime_speedup", "speed-up by settings", "x", lower_is_better=False, rank=43),
        PSNR,
    )

    provider: Provider | None = None
    """What runs an ONNX model; null: what `tunekit generate` takes here."""
    threads: Distinct[int] | None = Field(None, min_length=1)
    """To try, beside the runtime's own choice; null: 1, 2, 4 and on, up to all processors."""
    margin: float = Field(0.03, gt=0, lt=1)
    """By how much a choice has to be faster: 0.03 is 3 %."""
    rounds: int = Field(12, ge=4, le=1000)
    """In each, every choice of a kind runs one guidance pair."""
    pictures: int = Field(2, ge=1, le=64)
    """Drawn both ways in the end."""
    min_psnr_db: float = Field(50, gt=0, le=200)
    """Lowest PSNR of those pictures against the runtime's own way, in dB: where it is missed, that stays."""
    minutes: float = Field(10, gt=0, le=1440)
    """After which nothing more is tried."""

    @classmethod
    def options(cls, target: str, minutes: float) -> Sequence[Ladder]:
        """Whatever is fastest, where graphs are run."""
        provider = {"cpu": {"provider": "cpu"}, "cuda": {"provider": "cuda"}, "openvino": {}}.get(target)
        return () if provider is None else [[[{cls.kind: provider}]]]

    def problem(self, format: str, earlier: Sequence[Pass]) -> str | None:
        """Refuses a runtime that is not here, and more threads than processors."""
        if self.provider and format != "onnx":
            return f"sets provider, which has no effect on a model in {format}: it runs ONNX files"
        here = hardware.processors()
        for count in self.threads or ():
            if not 1 <= count <= here:
                return f"has threads {count} to try, and this machine has 1 to {here}"
        if format == "openvino":
            return cannot_run(["openvino"])
        return cannot_run([self.provider] if self.provider else ())

    def reads(self, context: Context) -> frozenset[str]:
        """What is drawn."""
        return frozenset({"seed", "prompts", *SAMPLING})

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        """Measures, checks on pictures, and writes what was chosen into the step."""
        from tunekit.passes.benchmark import busy
        from tunekit.passes.verify import PROMPTS

        if crowd := busy():
            context.say(crowd)
        plain = dataclasses.replace(artifact, runtime=None)
        prompts = list(islice(cycle(context.prompts or PROMPTS), self.pictures))
        with context.running(plain, provider=self.provider) as runtime:
            sampling = context.sampling_of(artifact).over(runtime.sampling)
            own = RuntimeConfig(runtime=runtime.title, machine=hardware.machine())
            race = _Race(_Pair(runtime, sampling, prompts[0], context.seed), own, self, context.say)
            context.say(f"{runtime.title} on {own.machine}")
            for kind in self._kinds(runtime, race.pair.rows):
                race.run(kind)
            chosen, seeds = race.best, [context.seed + index for index in range(self.pictures)]
        note = f"{own.runtime} on {own.machine}: {chosen.words}"
        if not chosen.choices:
            note = f"{own.runtime} on {own.machine}: nothing beats its own settings by {self.margin:.0%}"
            context.say(note)
            return Outcome({"runtime_speedup": 1.0}, {"note": note, "tried": race.table()}, runtime=own)
        found = self._whole(plain, chosen, prompts, seeds, sampling, context)
        faster = f"a picture {found.speedup:.2f}x as fast"
        if found.psnr_db < self.min_psnr_db:
            missed = f"pictures differ ({found.psnr_db:.1f} dB, min_psnr_db {self.min_psnr_db:g})"
        else:
            missed = "" if found.speedup >= 1 else "whole pictures are no faster"
        if missed:
            note += f"; {faster}, but {missed}: its own settings stay"
            chosen = own
        else:
            note += f"; {faster}, {found.psnr_db:.1f} dB"
        context.say(note)
        speedup = found.speedup if chosen.choices else 1.0
        figures: dict[str, Value] = {"runtime_speedup": speedup, "psnr_db": found.psnr_db}
        return Outcome(figures, {"note": note, "tried": race.table()}, runtime=chosen)

    def _kinds(self, runtime: Runtime, pair: int) -> Iterator[Callable[[RuntimeConfig], list[RuntimeConfig]]]:
        """Of each kind of setting, what may stand in for the best so far."""
        counts = list(self.threads or _counts(hardware.processors()))
        rows = [None, 1] if pair > 1 else [None]

        def varied(**values: Any) -> Callable[[RuntimeConfig], list[RuntimeConfig]]:
            return lambda best: [
                best.model_copy(update={name: value}) for name, values_ in values.items() for value in values_
            ]

        on_cpu = "CPU" in runtime.title
        if on_cpu:
            yield lambda best: [
                best.model_copy(update={"threads": count, "rows": row})
                for count in [None, *counts]
                for row in rows
                if count or row
            ]
        elif pair > 1:
            yield varied(rows=[1])
        if runtime.title.startswith("openvino"):
            if on_cpu:
                yield varied(pinning=[True, False])
            return
        yield varied(optimization=["extended", "basic"])
        if on_cpu:
            yield varied(spinning=[False], arena=[False], memory_pattern=[False])

    def _whole(
        self,
        plain: Artifact,
        chosen: RuntimeConfig,
        prompts: list[str],
        seeds: list[int],
        sampling: SamplingConfig,
        context: Context,
    ) -> _Whole:
        """Pictures both ways, in turns; each way warms up on the first."""
        import torch

        from tunekit.diffusion.metrics import psnr_db
        from tunekit.runtime import generate_pixels

        tuned = dataclasses.replace(plain, runtime=chosen)
        ratios, pixels = [], []
        with (
            context.running(plain, provider=self.provider) as before,
            context.running(tuned, provider=self.provider) as after,
        ):
            few = sampling.model_copy(update={"steps": min(2, sampling.steps or 2)})
            for runtime in (before, after):
                generate_pixels(runtime, prompts[:1], few, seeds=seeds[:1])
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
                seconds: dict[int, float] = {}
                drawn: dict[int, Tensor] = {}
                for side in ((0, 1), (1, 0))[index % 2]:
                    started = time.perf_counter()
                    drawn[side] = generate_pixels((before, after)[side], [prompt], sampling, seeds=[seed])
                    seconds[side] = time.perf_counter() - started
                ratios.append(seconds[0] / seconds[1])
                pixels.append((drawn[0], drawn[1]))
        finite = all(bool(torch.isfinite(picture).all()) for pair in pixels for picture in pair)
        return _Whole(_median(ratios), min(psnr_db(a, b) for b, a in pixels) if finite else -math.inf)


@dataclass(frozen=True)
class _Whole:
    """What whole pictures say."""

    speedup: float
    psnr_db: float
    """Of the worst."""


class _Pair:
    """One call of the denoiser, as guidance makes it: two rows, or one where there is none."""

    def __init__(self, runtime: Runtime, sampling: SamplingConfig, prompt: str, seed: int) -> None:
        import torch

        from tunekit.diffusion.sampling import initial_latents

        self.runtime = runtime
        told = runtime.conditioning([prompt], sampling)
        guided: Guided | None = runtime.guided(1, sampling)
        if guided is not None:
            told = {key: torch.cat([guided.negative[key], value]) for key, value in told.items()}
        self.told: Conditioning = told
        self.rows = 1 if guided is None else 2
        shape = runtime.latent_shape(*runtime.size(sampling))
        self.latents = initial_latents([seed], shape).repeat(self.rows, 1, 1, 1)
        self.time = torch.tensor(int(runtime.scheduler.config.num_train_timesteps) // 2)

    def call(self, runtime: Runtime) -> tuple[float, Tensor]:
        """Milliseconds, and what came out."""
        started = time.perf_counter()
        made = runtime.denoise(self.latents, self.time, self.told)
        return (time.perf_counter() - started) * 1e3, made


@dataclass
class _Race:
    """Settings against the best so far.

    Attributes:
        pair: what is called.
        best: settings.
        step: the pass.
    """

    pair: _Pair
    best: RuntimeConfig
    step: TuneRuntime
    say: Callable[[str], None]
    rows: list[dict[str, Any]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        _, self.wanted = self.pair.call(self.pair.runtime)

    def run(self, kind: Callable[[RuntimeConfig], list[RuntimeConfig]]) -> None:
        """One kind of setting."""
        from tunekit.diffusion.metrics import relative_error

        if time.monotonic() - self.began > 60 * self.step.minutes:
            self.say("the time is over, and not all was tried")
            return
        settings = [self.best, *kind(self.best)]
        sides = list(self._opened(settings))
        errors = [relative_error(self.pair.call(side)[1], self.wanted) for side in sides]
        times = self._in_turns(sides)
        winner, fastest = 0, 1.0 - self.step.margin
        for index in range(1, len(sides)):
            ratios = [own / other for own, other in zip(times[index], times[0], strict=True)]
            median, wins = _median(ratios), sum(ratio < 1 for ratio in ratios) / len(ratios)
            same = errors[index] <= MOST_ERROR
            if same and median < fastest and wins >= WINS:
                winner, fastest = index, median
            words = settings[index].words
            self.rows.append(self._row(settings[index], times[index], 1 / median, errors[index]))
            other = "" if same else f", but it computes something else (relative error {errors[index]:.1g})"
            self.say(f"{words}: {_median(times[index]):.1f} ms a call, {1 / median:.2f}x{other}")
        if not any(row["_settings"] == settings[0] for row in self.rows):
            self.rows.insert(0, self._row(settings[0], times[0], 1.0, errors[0]))
        self.best = settings[winner]

    def _opened(self, settings: Sequence[RuntimeConfig]) -> Iterator[Runtime]:
        """The denoiser with each of the settings; those that differ in rows alone share what was opened."""
        opened: dict[RuntimeConfig, Runtime] = {}
        for one in settings:
            whole = one.model_copy(update={"rows": None})
            if whole not in opened:
                opened[whole] = self.pair.runtime.with_settings(whole)
            yield opened[whole].in_rows(one.rows)

    def table(self) -> list[dict[str, Any]]:
        """What was tried, for the report."""
        return [
            {
                **{name: value for name, value in row.items() if name != "_settings"},
                "taken": "yes" if row["_settings"] == self.best else "",
            }
            for row in self.rows
        ]

    def _row(
        self, settings: RuntimeConfig, times: Sequence[float], faster: float, error: float
    ) -> dict[str, Any]:
        return {
            "_settings": settings,
            "settings": settings.words,
            "call_ms": _median(times),
            "against the best before": f"{faster:.2f}x",
            "relative_error": error,
        }

    def _in_turns(self, sides: Sequence[Runtime]) -> list[list[float]]:
        """Milliseconds of each side in each round; nobody is always first."""
        times: list[list[float]] = [[] for _ in sides]
        for number in range(self.step.rounds):
            for offset in range(len(sides)):
                index = (number + offset) % len(sides)
                times[index].append(self.pair.call(sides[index])[0])
        return times


def _counts(processors: int) -> list[int]:
    """1, 2, 4 and on, and all."""
    powers = [2**power for power in range(processors.bit_length())]
    return sorted({*(count for count in powers if count <= processors), processors})


def _median(values: Sequence[float]) -> float:
    from tunekit.passes.benchmark import percentile

    return percentile(values, 50)


PASS = TuneRuntime
