"""A sweep: its trials through the local queue, and what is kept to go on after a crash.

    sweep = Sweep.open("sweeps/rank.yaml")        # all of it checked, nothing begun
    sweep.run(Worker(sweep.queue, ["cpu"], group=sweep.name))
    sweep.best

A trial is `tunekit run` in an ordinary run folder, `runs/<sweep>-...`. All that is known of the sweep are
these folders and `runs/<sweep>/sweep.json`; which trials are to be stopped follows from their metrics.jsonl,
however often it is asked (`rules`). So the same command goes on wherever it was killed: what is finished is
not begun again, and what was begun continues from its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunekit.artifacts import RunFolder
from tunekit.config import Loaded, recipe_of
from tunekit.config.run import FREE
from tunekit.errors import ArtifactError, ConfigError, DeviceError, TunekitError
from tunekit.files import write_json
from tunekit.jobs import Job, Queue, locked
from tunekit.records import Count, Record, Seconds, read
from tunekit.registry import load_recipe
from tunekit.sweep.figures import Figure, Reading, figure_of
from tunekit.sweep.file import AshaConfig, SweepFile, read_sweep
from tunekit.sweep.rules import Asha, Median, Rule, stopped_at
from tunekit.sweep.space import Axis, axes_of, rows, run_names
from tunekit.worker import TICK, Worker, submit

if TYPE_CHECKING:
    from tunekit.sweep.proposer import Proposer

RESULT = "sweep.json"
COUNTS = (
    "data.path",
    "data.class_path",
    "data.validation",
    "adapter.init",
    "train.validate_every",
    "train.keep_best",
    "train.early_stop",
    "train.final",
)
"""Keys that a run may change between its lives, and that curves depend on."""
LOOK = 1.0
"""Seconds after which jobs are read again, whatever their folder's time says: it is none too exact."""
WORSE = "worse than others at step"
SAVE = 5.0
"""Seconds after which sweep.json is written though only figures have changed."""
AHEAD = 2
"""Trials that are proposed at a time where nobody says how many run at once."""
State = Literal["waiting", "running", "done", "stopped", "halted", "failed"]
"""`stopped` is by the rule; `halted` by hand, or because time is up."""


class TrialRecord(Record):
    """A trial, in sweep.json."""

    run: str
    values: dict[str, Any]
    state: State
    value: float | None = None
    step: Count = 0
    seconds: Seconds = 0.0
    note: str = ""
    digest: str = ""


class SweepRecord(Record):
    """sweep.json."""

    version: Count = 1
    sweep: str
    config: str
    metric: str
    goal: Literal["min", "max"]
    seconds: Seconds = 0.0
    trials: list[TrialRecord] = []
    best: str | None = None

    @classmethod
    def newest(cls) -> int:
        """See `Record.newest`."""
        return 1


@dataclass
class Trial:
    """One run of a sweep.

    Attributes:
        run: its name.
        values: what it has of its own, by dotted key.
        overrides: that `tunekit run` gets.
        loaded: its config.
        reading: what it has reported.
        state: where it is.
        stopped: the step at which the rule stops it; None for not, or not yet.
        note: why it failed or was halted.
    """

    run: str
    values: dict[str, Any]
    overrides: list[str]
    loaded: Loaded
    reading: Reading
    state: State = "waiting"
    stopped: int | None = None
    note: str = ""

    @property
    def folder(self) -> str:
        """Its run folder, absolute, as jobs name it."""
        return str(Path(self.loaded.config.run_dir).absolute())

    @property
    def digest(self) -> str:
        """Of all that its config says: finished with another, it is not finished."""
        tree = self.loaded.config.model_dump(mode="json")
        return hashlib.blake2b(json.dumps(tree).encode(), digest_size=8).hexdigest()

    @property
    def value(self) -> float | None:
        """The figure that it is compared by."""
        return self.reading.value(self.stopped)[0] if self.state != "failed" else None

    @property
    def is_over(self) -> bool:
        """Whether it is not to be worked on any more in this life of the sweep."""
        return self.state in ("done", "failed", "halted", "stopped")

    def record(self) -> TrialRecord:
        """For sweep.json."""
        value, step = self.reading.value(self.stopped)
        return TrialRecord(
            run=self.run,
            values=self.values,
            state=self.state,
            value=value if self.state != "failed" else None,
            step=step,
            seconds=self.reading.seconds,
            note=self.note,
            digest=self.digest if self.state == "done" else "",
        )


@dataclass
class Sweep:
    """A sweep file with its trials; see `open`."""

    file: SweepFile
    axes: list[Axis]
    trials: list[Trial]
    figure: Figure
    runs: Path
    rule: Rule | None = None
    proposer: Proposer | None = None
    say: Callable[[str], None] = print
    devices: frozenset[str] = frozenset()
    """What trials ask for: "auto", "cpu", "cuda:1"."""
    seconds: float = 0.0
    """Of all lives, up to the last time that it was written down."""
    _begun: float = field(default_factory=time.monotonic)
    _written: list[tuple[str, State]] = field(default_factory=list)
    _stamp: int = -1
    _looked: float = 0.0
    _saved: float = 0.0
    _jobs: dict[str, Job] = field(default_factory=dict)
    _late: bool = False

    # Opening ------------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls, path: str | Path, overrides: Sequence[str] = (), *, say: Callable[[str], None] = print
    ) -> Sweep:
        """Reads a sweep file and checks all of its trials; nothing is begun or written.

        Args:
            path: the file.
            overrides: for every trial, `a.b=c` each.
            say: takes a line about each trial that is over.

        Raises:
            ConfigError: a key that the recipe does not have, or that has no effect; one value; a metric that
                no trial reports. It names file and line.
            MissingPackageError: the proposer is not installed.
            ArtifactError: its folder is a run, or its sweep.json is damaged.
        """
        file = read_sweep(path, overrides)
        settings = file.settings
        schema = load_recipe(recipe_of(file.config, overrides)).Config
        axes = axes_of(file, schema)
        given = [] if settings.proposer == "optuna" else rows(file, axes)
        loaded = [file.load(_typed(values, axes)) for values in given or _corners(axes)]
        _differ([one for one, _ in loaded], file)
        configs = [one.config for one, _ in loaded]
        runs = Path(configs[0].runs).expanduser()
        sweep = cls(file, axes, [], figure_of(file, configs), runs, say=say)
        _matters(file, axes, sweep.figure)
        memories = [getattr(config, "memory", None) for config in configs]
        sweep.devices = frozenset(memory.device if memory else "auto" for memory in memories)
        sweep.rule = _rule(file, sweep.figure, configs)
        if (sweep.folder / "config.yaml").exists():
            raise ConfigError(
                f"the sweep cannot be called {settings.name}: {sweep.folder} is a run",
                where=file.where("name"),
                hint="give it another name: name: ...",
            )
        before = sweep._before()
        sweep.seconds = before.seconds if before else 0.0
        known = {trial.run: trial for trial in before.trials} if before else {}
        if settings.proposer == "optuna":
            from tunekit.sweep.proposer import Proposer

            sweep.proposer = Proposer(axes, settings.seed, larger=sweep.figure.larger)
            given = [trial.values for trial in known.values()]
        for values in given:
            sweep._add(values)
        for trial, name in zip(sweep.trials, run_names(settings.name, given), strict=True):
            if trial.run != name:
                sweep._rename(trial, name)
            was = known.get(trial.run)
            whole = was is not None and was.state == "done" and was.digest == trial.digest
            if whole and RunFolder(Path(trial.folder)).config.is_file():
                trial.state = "done"
                trial.reading.settle()
        sweep._judge()
        return sweep

    @property
    def name(self) -> str:
        """First part of its runs' names."""
        return self.file.settings.name

    @property
    def folder(self) -> Path:
        """Of sweep.json."""
        return self.runs / self.name

    @property
    def queue(self) -> Queue:
        """Where its trials wait."""
        return Queue.of(self.runs)

    def _before(self) -> SweepRecord | None:
        try:
            return read(self.folder / RESULT, SweepRecord, hint="remove it: what was trained stays")
        except FileNotFoundError:
            return None

    def _add(self, values: dict[str, Any]) -> Trial:
        name = run_names(self.name, [values])[0]
        values = _typed(values, self.axes)
        loaded, overrides = self.file.load(values, f"name={name}")
        reading = Reading.of(loaded.config, self.figure)
        trial = Trial(name, values, overrides, loaded, reading)
        self.trials.append(trial)
        return trial

    def _rename(self, trial: Trial, name: str) -> None:
        trial.loaded, trial.overrides = self.file.load(trial.values, f"name={name}")
        trial.run, trial.reading = name, Reading.of(trial.loaded.config, self.figure)

    # Running ------------------------------------------------------------------------------------------------

    def run(self, worker: Worker) -> None:
        """Works until every trial is over, or time is up; sweep.json is written as it goes.

        Args:
            worker: of `queue`, for the group `name`. Others may work on the queue beside it.

        Raises:
            Interrupted: it was told to end; trials that ran have a checkpoint, and the same command goes on.
            ArtifactError: another process works on this sweep.
            DeviceError: a trial asks for a device that the worker does not have.
            ConfigError: no trial has reported the metric.
            TunekitError: all trials have failed, for the reason that it says.
        """
        if lost := [name for name in self.devices if not worker.has(name)]:
            raise DeviceError(
                f"trials ask for {', '.join(sorted(lost))}, and there is {', '.join(worker.devices)}",
                where=self.file.where("config"),
                hint="give --devices, or memory.device=auto behind the file",
            )
        busy = f"another process works on the sweep {self.name}"
        with locked(self.folder / ".lock", busy=busy):
            self._begun = time.monotonic()
            for job in self._own_jobs():
                if job.state != "running":
                    self.queue.remove(job.id)
            try:
                with worker.listening():
                    while self.step(worker):
                        time.sleep(TICK)
            finally:
                for job in self._own_jobs():
                    if job.state in ("waiting", "done", "stopped"):
                        self.queue.remove(job.id)
                self._write(always=True)
        self._check_reported()

    def step(self, worker: Worker) -> bool:
        """One look at all trials; whether there is something left to do."""
        minutes = self.file.settings.minutes
        if minutes is not None and self._elapsed() > 60 * minutes and not self._late:
            self._late = True
            self.say(f"{minutes:g} minutes are over: what runs is stopped, with a checkpoint")
        worker.tick()
        stamp, now = self.queue.stamp(), time.monotonic()
        if stamp != self._stamp or now - self._looked > LOOK:
            self._stamp, self._looked = stamp, now
            self._jobs = {job.run: job for job in self._own_jobs()}
        self._judge()
        for trial in self.trials:
            self._drive(trial, self._jobs.get(trial.folder))
        self._propose(worker)
        self._write()
        return any(not trial.is_over for trial in self.trials) or any(
            job.is_open for job in self._jobs.values()
        )

    def _own_jobs(self) -> list[Job]:
        return [job for job in self.queue.jobs() if job.group == self.name]

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self._begun

    def _judge(self) -> None:
        """Reads what is new, and asks the rule."""
        for trial in self.trials:
            trial.reading.look()
        ended = ("done", "failed", "halted")
        curves = [trial.reading.curve(ended=trial.state in ended) for trial in self.trials]
        for trial, step in zip(self.trials, stopped_at(self.rule, curves), strict=True):
            trial.stopped = step

    def _drive(self, trial: Trial, job: Job | None) -> None:
        """Brings a trial and its job from where they are to where they should be."""
        if trial.state == "done" and trial.stopped is not None:
            trial.state = "stopped"  # it was faster than those that it is compared with
        if trial.state in ("failed", "halted") or (trial.state == "done" and job is None):
            return
        if job is not None and job.is_open:
            if trial.stopped is not None and not job.stopping:
                self.queue.stop(job.id, note=f"{WORSE} {trial.stopped}")
            elif self._late and not job.stopping:
                self.queue.stop(job.id, note="time is up")
            trial.state = "running" if job.state == "running" else "waiting"
            return
        if trial.stopped is not None:
            if trial.state != "stopped":
                self._over(trial, "stopped")
        elif job is not None and job.state == "done":
            if trial.state != "done":
                self._over(trial, "done")
                self._write()
            self._change(self.queue.remove, job)
        elif job is not None and job.state == "failed":
            self._over(trial, "failed", job.note)
        elif job is not None and job.note.startswith(WORSE):
            trial.state = "waiting"  # the rule says otherwise since one before it has failed
            self._change(self.queue.start, job)
        elif job is not None:
            self._over(trial, "halted", job.note)
        elif self._late:
            self._over(trial, "halted", "time is up")
        else:
            trial.state = "waiting"
            submit(self.queue, self.file.config, trial.overrides, group=self.name)
            self._stamp = -1

    def _change(self, change: Callable[[int], object], job: Job) -> None:
        """Changes a job, unless somebody has removed it just now."""
        with suppress(ArtifactError):
            change(job.id)
        self._stamp = -1

    def _over(self, trial: Trial, state: State, note: str = "") -> None:
        trial.state, trial.note = state, note
        trial.reading.settle()
        value, step = trial.reading.value(trial.stopped)
        figure = f"{self.figure.name} {value:.6g}" if value is not None else f"no {self.figure.name}"
        told = note if state == "failed" else f"{figure}, {step} steps"
        self.say(f"{trial.run}: {state}, {told}" + (f" ({note})" if note and state == "halted" else ""))

    def _propose(self, worker: Worker) -> None:
        """Asks the proposer for as many more as can run."""
        settings = self.file.settings
        if self.proposer is None or self._late or settings.trials is None:
            return
        ahead = len(worker.devices) * worker.at_once if worker.at_once else AHEAD
        while len(self.trials) < settings.trials:
            if sum(not trial.is_over for trial in self.trials) >= ahead:
                return
            results = [(trial.values, trial.value, trial.is_over) for trial in self.trials]
            values = self.proposer.ask(results)
            if values is None:
                return
            self._add(values)
            self._write()

    # What came of it ----------------------------------------------------------------------------------------

    def ranked(self) -> list[Trial]:
        """The trials, the best first; those without a figure come last."""

        def key(trial: Trial) -> tuple[bool, float]:
            value = trial.value
            return value is None, 0.0 if value is None else self.figure.loss(value)

        return sorted(self.trials, key=key)

    @property
    def best(self) -> Trial | None:
        """The one with the best figure."""
        first = next(iter(self.ranked()), None)
        return first if first is not None and first.value is not None else None

    def record(self) -> SweepRecord:
        """What sweep.json holds."""
        best = self.best
        return SweepRecord(
            sweep=self.name,
            config=str(self.file.config),
            metric=self.figure.name,
            goal="max" if self.figure.larger else "min",
            seconds=round(self._elapsed(), 1),
            trials=[trial.record() for trial in self.trials],
            best=best.run if best else None,
        )

    def _write(self, *, always: bool = False) -> None:
        states = [(trial.run, trial.state) for trial in self.trials]
        now = time.monotonic()
        if always or states != self._written or now - self._saved > SAVE:
            self._written, self._saved = states, now
            write_json(self.folder / RESULT, self.record().model_dump(mode="json"))

    def _check_reported(self) -> None:
        if any(trial.value is not None for trial in self.trials):
            return
        failed = [trial for trial in self.trials if trial.state == "failed"]
        if failed and len(failed) == len(self.trials):
            raise TunekitError(
                f"all {len(failed)} trials have failed; the first: {failed[0].note}",
                where=str(self.folder / RESULT),
                hint="tunekit queue list shows them; the same command tries them again",
            )
        if any(trial.state in ("done", "stopped") for trial in self.trials):
            raise ConfigError(
                f"metric: no trial has reported {self.figure.name}",
                where=self.file.where("metric"),
                key="metric",
            )


def _typed(values: dict[str, Any], axes: Sequence[Axis]) -> dict[str, Any]:
    whole = {axis.key for axis in axes if axis.whole}
    return {key: int(value) if key in whole else value for key, value in values.items()}


def _corners(axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """Values that will be proposed: of each key the first and the last, and of lists all."""
    ends = [axis.values or (axis.low, axis.high) for axis in axes]
    count = max(map(len, ends))
    return [
        {axis.key: values[min(index, len(values) - 1)] for axis, values in zip(axes, ends, strict=True)}
        for index in range(count)
    ]


def _differ(loaded: Sequence[Loaded], file: SweepFile) -> None:
    """Raises a ConfigError if what is varied changes nothing."""
    seen = {json.dumps(one.config.model_dump(mode="json"), sort_keys=True) for one in loaded}
    if len(seen) == 1 and len(loaded) > 1:
        raise ConfigError(
            "over: has no effect: all trials are one config", where=file.where("over"), key="over"
        )


def _matters(file: SweepFile, axes: Sequence[Axis], figure: Figure) -> None:
    """Raises a ConfigError if a key changes nothing of what is compared."""
    idle = [key for key in FREE if key not in COUNTS] if figure.curve else ["preview.every"]
    if figure.name == "clip":  # how previews are drawn is what is scored
        idle = [key for key in idle if key != "preview"]
    for given, axis in zip(file.settings.over, axes, strict=True):
        if any(axis.key == key or axis.key.startswith(f"{key}.") for key in idle):
            message = f"{given}: has no effect on {figure.name}, for it changes nothing of what is learned"
            raise ConfigError(message, where=file.where("over", given), key=given)


def _rule(file: SweepFile, figure: Figure, configs: Sequence[Any]) -> Rule | None:
    """The rule of `stop:`.

    Raises:
        ConfigError: there is nothing that it could look at before the end.
    """
    asked = file.settings.rule
    if asked is None:
        return None

    def idle(because: str, hint: str) -> ConfigError:
        message = f"stop: has no effect: {because}"
        return ConfigError(message, where=file.where("stop"), hint=hint, key="stop")

    if not figure.curve:
        raise idle(
            f"{figure.name} is known only when a run is over", "leave it out, or compare val_loss or loss"
        )
    trains = [config.train for config in configs if hasattr(config, "train")]
    steps = max((train.max_steps for train in trains), default=None)
    if steps is not None and figure.name == "val_loss":
        every = [train.validate_every for train in trains if train.validate_every]
        if not any(0 < step < steps for step in every):
            raise idle("val_loss is known only at the end", "set train.validate_every")
    if steps is not None and figure.name == "clip":
        often = [config.preview.every for config in configs if config.preview.every]
        if not any(0 < step < steps for step in often):
            raise idle("clip is known only at the end", "set preview.every")
    grace = asked.grace or max(1, (steps or 10) // 10)
    if steps is not None and grace >= steps:
        raise idle(f"grace is {grace}, and training ends at step {steps}", "give less")
    if isinstance(asked, AshaConfig):
        return Asha(grace, asked.factor)
    return Median(grace, asked.trials)
