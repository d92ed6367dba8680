"""What is compared: runs with what they kept on the way, files of adapters, models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.artifacts import RECORD, Artifact, RunFolder, open_artifact
from tunekit.errors import ArtifactError, ConfigError, TunekitError
from tunekit.records import PlanRecord, finite, read
from tunekit.report.material import Material
from tunekit.report.material import gather as read_run
from tunekit.resources import Source, expand

if TYPE_CHECKING:
    from tunekit.comparison.grid import Wanted

Say = Callable[[str], object]


@dataclass(frozen=True)
class Entry:
    """One model or adapter that is drawn.

    Attributes:
        run: name of the contestant that it is of.
        step: of the training that it is of; None where nobody knows.
        label: what it is called beside its pictures: "step 100", "the result, step 75", "file".
        artifact: it; an adapter knows its base.
    """

    run: str
    step: int | None
    label: str
    artifact: Artifact

    @property
    def is_adapter(self) -> bool:
        """Whether it has a strength."""
        return self.artifact.format == "adapter"


@dataclass
class Contestant:
    """A run, a file or a model.

    Attributes:
        name: unlike those of all others.
        place: where it lies, as it was given.
        material: of a run, what is written in its folder; None for files and models.
        entries: what is drawn of it.
    """

    name: str
    place: str
    material: Material | None = None
    entries: list[Entry] = field(default_factory=list)

    @property
    def held_out(self) -> list[tuple[int, float]]:
        """(step, validation loss) as far as they were measured."""
        return finite(self.material.rows, "val_loss") if self.material else []

    def facts(self) -> dict[str, Any]:
        """What is known of it, for compare.json; a figure that nobody measured is None."""
        found: dict[str, Any] = {"name": self.name, "place": self.place, "family": None, "base": None}
        if self.entries:
            artifact = self.entries[-1].artifact
            found |= {"family": artifact.family or None, "base": artifact.base}
            found["size_bytes"] = artifact.size_bytes
        training = self.material.training() if self.material else None
        if training is None:
            return found
        metrics, steps = training["metrics"], training["steps"]
        found |= {key: training[key] for key in ("family", "finished", "steps", "seconds", "taken")}
        found["base"] = training["source"]
        found["seconds_per_step"] = training["seconds"] / steps if steps else None
        names = ("loss", "val_loss_first", "val_loss", "best_val_loss", "best_step", "last_val_loss")
        found |= {name: metrics.get(name) for name in (*names, "samples_per_second", "parameters")}
        return {**found, **self._memory(), "figures": self._figures()}

    def _memory(self) -> dict[str, int | None]:
        """The most that the device held, as planned and as measured; None where nobody planned or looked."""
        assert self.material is not None
        try:
            plan = read(self.material.run.path / "plan.json", PlanRecord)
        except (FileNotFoundError, ArtifactError):
            return {"planned_bytes": None, "peak_bytes": None}
        peaks = [
            phase.measured.peak_reserved_bytes or phase.measured.peak_allocated_bytes
            for phase in plan.phases.values()
        ]
        return {
            "planned_bytes": plan.device_bytes,
            "peak_bytes": max((peak for peak in peaks if peak), default=None),
        }

    def _figures(self) -> dict[str, Any]:
        """What the passes found out about the last model of the chain; a later figure wins."""
        assert self.material is not None
        merged: dict[str, Any] = {}
        for step in self.material.chain:
            merged |= {name: value for name, value in step.metrics.items() if value is not None}
        return merged


def gather(sources: Sequence[str], wanted: Wanted, say: Say) -> list[Contestant]:
    """Find what is named, and of runs what they kept.

    Args:
        sources: folders of runs, files and folders of adapters, models.
        wanted: reads checkpoints, final and base.
        say: takes lines about what cannot be drawn.

    Raises:
        ArtifactError: nothing there, or it cannot be opened.
        ConfigError: an adapter's base is not known; checkpoints are asked for, and none were kept.
    """
    found = [_contestant(source, wanted, say) for source in dict.fromkeys(sources)]
    _name(found)
    base = _base(wanted.base) if wanted.base else None
    for one in found:
        one.entries = [_on_base(entry, one, base, found) for entry in one.entries]
    if wanted.checkpoints and not any(len(one.entries) > 1 for one in found):
        raise ConfigError(
            "there are no adapters of several steps in what is compared",
            where="--checkpoints",
            hint="train.save_every keeps them while a run trains; states to continue from do not draw",
        )
    return found


def _contestant(source: str, wanted: Wanted, say: Say) -> Contestant:
    run = RunFolder(expand(source))
    if not (run.path.is_dir() and (run.config.is_file() or run.trained())):
        artifact = open_artifact(source)
        name = Path(source).name.removesuffix(".safetensors") or source
        return Contestant(name, source, None, [Entry(name, None, "", artifact)])
    one = Contestant(run.path.resolve().name, source, read_run(run))
    try:
        one.entries = _of_run(one, run, wanted)
    except TunekitError as error:
        say(f"{source}: no pictures of it: {error.message}")
    return one


def _of_run(one: Contestant, run: RunFolder, wanted: Wanted) -> list[Entry]:
    """What is drawn of a run: its result, and with `checkpoints` all adapters that it kept, by step."""
    if wanted.final:
        artifact = run.final()
        return [Entry(one.name, None, f"{artifact.step.kind if artifact.step else 'model'}", artifact)]
    trained = run.trained()
    kept = {_step_of(artifact): artifact for artifact in _kept(run)}
    taken = None
    if trained is not None:
        result = Artifact.load(trained)
        taken = _step_of(result)
        kept[taken] = result
    if not kept:
        return [Entry(one.name, None, "", run.final())]
    if not wanted.checkpoints:
        chosen = taken if trained is not None else max(kept, key=lambda step: step or 0)
        kept = {chosen: kept[chosen]}
    entries = []
    for step in sorted(kept, key=lambda step: step or 0):
        label = f"step {step}" if step is not None else ""
        if step == taken and trained is not None and len(kept) > 1:
            label += ", the result"
        elif trained is None:
            label += ", still training"
        entries.append(Entry(one.name, step, label.strip(", "), kept[step]))
    return entries


def _kept(run: RunFolder) -> list[Artifact]:
    folders = [path for path in sorted(run.adapters.glob("*")) if (path / RECORD).is_file()]
    return [Artifact.load(path) for path in folders]


def _step_of(artifact: Artifact) -> int | None:
    """After which step of its training a model or adapter is as it is."""
    step = next((step for step in artifact.lineage if step.kind == "train"), None)
    found = step.details.get("taken", step.details.get("step")) if step else None
    return int(found) if isinstance(found, int) else None


def _name(found: Sequence[Contestant]) -> None:
    """Gives each a name of its own: that of its folder, with as many above it as tell two apart."""
    alike = [one for one in found if sum(other.name == one.name for other in found) > 1]
    for depth in range(2, 6):
        counts = Counter(one.name for one in found)
        for one in alike:
            parts = expand(one.place).absolute().parts
            if counts[one.name] > 1:
                one.name = "/".join(parts[-depth:])
    seen: Counter[str] = Counter()
    for one in found:
        seen[one.name] += 1
        if seen[one.name] > 1:
            one.name = f"{one.name} ({seen[one.name]})"
        one.entries = [replace(entry, run=one.name) for entry in one.entries]


# Bases ------------------------------------------------------------------------------------------------------


def _base(name: str) -> Artifact:
    """What `--base` names, as an artifact whose model is the base: of a run, that which it started from."""
    run = RunFolder(expand(name))
    if run.config.is_file():
        return _base_of_run(Contestant(name, name, read_run(run)))
    return open_artifact(name)


def _base_of_run(one: Contestant) -> Artifact:
    """The base that a run started from, drawn with as the run draws.

    Raises:
        ConfigError: its config does not say.
    """
    trained = one.material.trained if one.material else None
    if trained is not None and trained.format == "adapter" and trained.base is not None:
        source = trained.model_source
        artifact = open_artifact(source.name, family=trained.family)
        return replace(
            artifact, family=trained.family, opened=source, sampling=trained.sampling or artifact.sampling
        )
    model = one.material.setting("model") if one.material else None
    if not isinstance(model, dict) or not isinstance(model.get("source"), str):
        raise ConfigError(f"which base {one.name} started from is not written in its folder", where=one.place)
    options = {name: model.get(name) for name in ("revision", "variant", "base")}
    source = Source(model["source"], allow_pickle=bool(model.get("allow_pickle")), **options)
    artifact = open_artifact(source.name, family=model.get("family"))
    return replace(artifact, opened=source)


def _on_base(entry: Entry, one: Contestant, base: Artifact | None, found: Sequence[Contestant]) -> Entry:
    """An adapter of another program, with the base that it is put on; all others as they are.

    Raises:
        ConfigError: there are several bases that it may belong to, or none.
    """
    artifact = entry.artifact
    if artifact.format != "adapter" or artifact.base is not None:
        return entry
    if base is None:
        known = {
            (made.source, made.family): made
            for other in found
            if other.material is not None and other.material.setting("model") is not None
            for made in [_base_of_run(other)]
        }
        if len(known) != 1:
            what = "none of the others is a run" if not known else "the runs have several bases"
            raise ConfigError(
                f"the adapter does not say which base it was trained on, and {what}",
                where=one.place,
                hint="name the base with --base: a model, or a run that has it",
            )
        (base,) = known.values()
    opened = replace(base.model_source, name="") if base.format == "torch" else base.opened
    return replace(
        entry,
        artifact=replace(
            artifact,
            base=base.base if base.format == "adapter" else base.source,
            opened=opened,
            family=artifact.family or base.family,
            sampling=artifact.sampling or base.sampling,
        ),
    )
