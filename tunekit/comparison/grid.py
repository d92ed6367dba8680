"""The same prompts and seeds, drawn by each of several adapters and models, at several strengths."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.artifacts import Artifact, model_files, open_artifact
from tunekit.comparison.contestants import Contestant, Entry
from tunekit.config import SamplingConfig
from tunekit.errors import AdapterError, ConfigError, NonFiniteError
from tunekit.files import atomic_file
from tunekit.provenance import shown

if TYPE_CHECKING:
    from PIL import Image

    from tunekit.runtime import Runtime

PICTURES = "pictures"
"""Folder of what is drawn; a file's name is a hash of all that it depends on."""
BATCH = 4
"""Pictures drawn at once."""
COLUMNS = 6
"""Prompts of a table whose rows are models."""


@dataclass(frozen=True)
class Wanted:
    """What is to be drawn.

    Attributes:
        prompts: drawn with every seed; none takes those of the runs' previews.
        seeds: none takes the seed of the previews.
        strengths: of adapters.
        checkpoints: all adapters that runs have kept, and not only their results.
        final: of runs the last model of the chain, and not what was trained.
        base: what adapters are put on that do not name their base: a model, or a run that has it.
        sampling: how; what it leaves open is each model's own.
        device: "auto", "cpu", "cuda:1".
        dtype: "fp32", "bf16", "fp16"; None is what suits the device.
        draws: whether there are pictures at all.
    """

    prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    strengths: tuple[float, ...] = (1.0,)
    checkpoints: bool = False
    final: bool = False
    base: str | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    device: str = "auto"
    dtype: str | None = None
    draws: bool = True

    def settled(self, contestants: Sequence[Contestant]) -> Wanted:
        """The same, with nothing about what is drawn left open.

        Raises:
            ConfigError: strengths, and there is no adapter.
        """
        entries = [entry for one in contestants for entry in one.entries]
        if self.strengths != (1.0,) and entries and not any(entry.is_adapter for entry in entries):
            raise ConfigError(
                "has no effect: none of what is compared is an adapter, which alone has a strength",
                where="--strengths",
                hint="of a run with adapters, leave --final out: a merged model has one strength",
            )
        runs = [one.material for one in contestants if one.material]
        prompts = self.prompts or next((tuple(run.prompts) for run in runs if run.prompts), ())
        seeds = self.seeds
        if not seeds:
            known = (run.setting("preview", "seed") for run in runs if run.prompts)
            seeds = (next((seed for seed in known if isinstance(seed, int)), 0),)
        return dataclasses.replace(
            self, prompts=prompts, seeds=seeds, draws=self.draws and bool(prompts) and bool(entries)
        )

    @property
    def shots(self) -> list[tuple[str, int]]:
        """Each prompt with each seed."""
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]


@dataclass(frozen=True)
class Cell:
    """One picture, or why there is none.

    Attributes:
        entry: what drew it.
        strength: of the adapter; None of a model.
        prompt: what was asked for.
        seed: of its noise.
        file: where it lies, relative to the comparison's folder.
        sampling: how it was drawn.
        problem: why it was not; "" if it was.
    """

    entry: Entry
    strength: float | None
    prompt: str
    seed: int
    file: str | None
    sampling: SamplingConfig
    problem: str = ""

    def as_json(self) -> dict[str, Any]:
        """What compare.json says of it."""
        return {
            "run": self.entry.run,
            "step": self.entry.step,
            "strength": self.strength,
            "prompt": self.prompt,
            "seed": self.seed,
            "file": self.file,
            "sampling": self.sampling.model_dump(mode="json", exclude_none=True),
            **({"problem": self.problem} if self.problem else {}),
        }


@dataclass(frozen=True)
class Table:
    """Pictures in rows and columns, for the page and a sheet.

    Attributes:
        title: what all of them have in common: a prompt and a seed, or nothing.
        heads: of the columns.
        rows: (name, note) of a row, with a cell for each column, or None.
    """

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[Cell | None, ...]], ...]

    @property
    def cells(self) -> list[Cell]:
        """All that there are."""
        return [cell for *_, cells in self.rows for cell in cells if cell]


def tables(contestants: Sequence[Contestant], wanted: Wanted, cells: Sequence[Cell]) -> list[Table]:
    """Put pictures in order: what is drawn are the rows.

    With several strengths there is a table for each prompt and seed, whose columns are the strengths; else
    the prompts are the columns, `COLUMNS` of them in a table.
    """
    if not cells:
        return []
    entries = [entry for one in contestants for entry in one.entries]
    found = {(id(cell.entry), cell.strength, cell.prompt, cell.seed): cell for cell in cells}

    def of(entry: Entry, strength: float, shot: tuple[str, int]) -> Cell | None:
        if entry.is_adapter:
            return found.get((id(entry), strength, *shot))
        return found.get((id(entry), None, *shot)) if strength == _nearest(wanted.strengths) else None

    def told(entry: Entry) -> tuple[str, str]:
        own = entry.label if entry.is_adapter or len(wanted.strengths) == 1 else f"{entry.label} no strength"
        return entry.run, own.strip() if own != entry.run else ""

    if len(wanted.strengths) > 1:
        heads = tuple(f"strength {strength:g}" for strength in wanted.strengths)
        return [
            Table(
                _named(shot, wanted.seeds),
                heads,
                tuple((*told(e), tuple(of(e, s, shot) for s in wanted.strengths)) for e in entries),
            )
            for shot in wanted.shots
        ]
    made = []
    for start in range(0, len(wanted.shots), COLUMNS):
        part = wanted.shots[start : start + COLUMNS]
        rows = tuple((*told(e), tuple(of(e, wanted.strengths[0], shot) for shot in part)) for e in entries)
        made.append(Table("", tuple(_named(shot, wanted.seeds) for shot in part), rows))
    return made


def _nearest(strengths: Sequence[float]) -> float:
    """The column that a model without a strength stands in."""
    return min(strengths, key=lambda strength: abs(strength - 1))


def _named(shot: tuple[str, int], seeds: Sequence[int]) -> str:
    prompt, seed = shot
    return f"{shown(prompt)} (seed {seed})" if len(seeds) > 1 else shown(prompt)


# Drawing ----------------------------------------------------------------------------------------------------


def draw(
    contestants: Sequence[Contestant],
    wanted: Wanted,
    out: Path,
    *,
    say: Callable[[str], object] = lambda line: None,
    on_step: Callable[[str, int, int], object] | None = None,
) -> list[Cell]:
    """Draw what is not there yet. A base is opened once, and adapters are put on it in turn.

    Returns:
        A cell for each entry, strength, prompt and seed, in this order.

    Raises:
        TunekitError: a model cannot be opened, or a picture not be written.
    """
    entries = [entry for one in contestants for entry in one.entries]
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(_group(entry), []).append(entry)
    work = _Work(wanted, out, say, on_step)
    work.total = sum(len(wanted.shots) * len(_strengths(entry, wanted)) for entry in entries)
    for group in groups.values():
        work.draw(group)
    return [cell for entry in entries for cell in work.cells[id(entry)]]


def _strengths(entry: Entry, wanted: Wanted) -> Sequence[float | None]:
    return wanted.strengths if entry.is_adapter else (None,)


def _group(entry: Entry) -> str:
    """What can share one open base: adapters of the same one; a model has none to share."""
    artifact = entry.artifact
    if artifact.format != "adapter":
        return f"model {id(entry)}"
    return f"{artifact.family} {artifact.model_source}"


@dataclass
class _Work:
    """A comparison that is being drawn."""

    wanted: Wanted
    out: Path
    say: Callable[[str], object]
    on_step: Callable[[str, int, int], object] | None
    total: int = 0
    done: int = 0
    cells: dict[int, list[Cell]] = field(default_factory=dict)

    def draw(self, group: Sequence[Entry]) -> None:
        """All pictures of entries with one base, which is opened only if one of them is missing."""
        base: Runtime | None = None
        try:
            for entry in group:
                base = self._entry(entry, base, last=entry is group[-1])
        finally:
            if base is not None:
                base.close()

    def _entry(self, entry: Entry, base: Runtime | None, *, last: bool) -> Runtime | None:
        """One entry. Returns the base, as it was before; None where it is not open or no more what it was."""
        from tunekit import families, runtime

        wanted, artifact = self.wanted, entry.artifact
        cells = self.cells.setdefault(id(entry), [])
        family = families.get(artifact.family or families.detect(artifact.model_source))
        asked = wanted.sampling.over(artifact.sampling)
        plan: list[tuple[float | None, list[tuple[str, int]]]] = []
        names: dict[tuple[float | None, str, int], str] = {}
        known = _Known.of(entry, asked, wanted)
        for strength in _strengths(entry, wanted):
            for shot in wanted.shots:
                names[strength, *shot] = known.name(strength, shot)
            missing = [shot for shot in wanted.shots if not _is_there(self.out / names[strength, *shot])]
            plan.append((strength, missing))
        problems: dict[float | None, str] = {}
        if any(missing for _, missing in plan):
            with_adapter = artifact.format == "adapter"
            if base is None:
                subject: Any = artifact.model_source if with_adapter else artifact
                base = runtime.open_runtime(
                    subject, family=family.name, device=wanted.device, dtype=wanted.dtype
                )
            drawer = dataclasses.replace(base, artifact=artifact)
            if with_adapter:
                _put_on(base, artifact)
            for remark in runtime.remarks(drawer, wanted.prompts, asked):
                self.say(f"{entry.run}: {remark}")
            for strength, missing in plan:
                try:
                    self._shots(drawer, entry, strength, missing, asked, names)
                except (AdapterError, NonFiniteError) as error:
                    problems[strength] = error.message
                    self.say(f"{entry.run} {entry.label}: {error.message}")
            if with_adapter and not last and not _take_off(base):
                base.close()
                base = None
        for strength in _strengths(entry, wanted):
            for prompt, seed in wanted.shots:
                name = names[strength, prompt, seed]
                problem = "" if (self.out / name).is_file() else problems.get(strength, "it was not drawn")
                file = None if problem else name
                cells.append(Cell(entry, strength, prompt, seed, file, asked, problem))
        self.done += sum(len(wanted.shots) - len(missing) for _, missing in plan)
        self._tell(entry)
        return base

    def _shots(
        self,
        drawer: Runtime,
        entry: Entry,
        strength: float | None,
        missing: Sequence[tuple[str, int]],
        asked: SamplingConfig,
        names: Mapping[tuple[float | None, str, int], str],
    ) -> None:
        from tunekit import runtime
        from tunekit.runtime.swap import at_strength

        for start in range(0, len(missing), BATCH):
            part = missing[start : start + BATCH]
            part = [shot for shot in part if not _is_there(self.out / names[strength, *shot])]
            if part:
                prompts, seeds = [prompt for prompt, _ in part], [seed for _, seed in part]
                with at_strength(drawer, 1.0 if strength is None else strength):
                    pictures = runtime.generate(drawer, prompts, asked, seeds=seeds)
                for (prompt, seed), picture in zip(part, pictures, strict=True):
                    self._save(self.out / names[strength, prompt, seed], picture)
            self.done += len(missing[start : start + BATCH])
            self._tell(entry)

    def _save(self, path: Path, picture: Image.Image) -> None:
        with atomic_file(path) as aside:
            picture.save(aside, "png")

    def _tell(self, entry: Entry) -> None:
        if self.on_step:
            self.on_step(f"{entry.run} {entry.label}".strip(), self.done, self.total)


def _put_on(base: Runtime, artifact: Artifact) -> None:
    """Put an adapter on a base that may be on a device, where its files are not read to."""
    from tunekit.adapters import load_adapter

    away = base.device.type != "cpu"
    if away:
        base.pipeline.to("cpu")
    load_adapter(base.pipeline, base.family, artifact.source, allow_pickle=artifact.model_source.allow_pickle)
    if away:
        base.pipeline.to(base.device)


def _take_off(base: Runtime) -> bool:
    from tunekit.adapters import remove_adapter

    return remove_adapter(base.pipeline, base.family)


def _is_there(path: Path) -> bool:
    """Whether a picture was drawn before; one that is damaged is drawn again."""
    from PIL import Image

    if not path.is_file():
        return False
    with suppress(Exception):  # of a damaged picture a decoder may raise anything
        with Image.open(path, formats=("PNG",)) as picture:
            picture.verify()
        return True
    return False


@dataclass(frozen=True)
class _Known:
    """What the pictures of an entry depend on, beside strength, prompt and seed."""

    shared: Mapping[str, Any]
    own: Mapping[str, Any]

    @classmethod
    def of(cls, entry: Entry, sampling: SamplingConfig, wanted: Wanted) -> _Known:
        artifact = entry.artifact
        shared = {
            "family": artifact.family,
            "sampling": sampling.model_dump(mode="json", exclude_none=True),
            "device": [wanted.device.partition(":")[0], wanted.dtype],
        }
        if artifact.format != "adapter":
            return cls(shared, {"model": _known_by(artifact)})
        source = artifact.model_source
        base = _known_by(open_artifact(source.name, family=artifact.family))
        return cls({**shared, "base": base, "opened": source}, {"adapter": artifact.hash})

    def name(self, strength: float | None, shot: tuple[str, int]) -> str:
        """The file of a picture: a hash of what it depends on. At strength 0 an adapter is its base."""
        own = {} if strength == 0 else {**self.own, "strength": strength}
        key = json.dumps({**self.shared, **own, "shot": shot}, default=str, sort_keys=True)
        return f"{PICTURES}/{hashlib.blake2b(key.encode(), digest_size=10).hexdigest()}.png"


def _known_by(artifact: Artifact) -> Any:
    """What tells a model from others without reading it all: its record, or sizes and times of its files."""
    if artifact.recorded_hash or artifact.model_path is None:
        return artifact.hash
    files = model_files(artifact.model_path)
    return [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in files.items()]
