"""What has to be true before a run starts: one list, shown whole by `tunekit check` and asked by every run.

Nothing here loads weights or writes. A check is a function in `CHECKS`, which collects what is wrong
(`Found.about`) and notes what others may want to know. So whatever can be known before pictures are encoded
is said before, all of it at once, and `check` does not accept what a run refuses.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.artifacts import Artifact, RunFolder, open_artifact
from tunekit.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    OutputError,
    TunekitError,
)

# What imports torch is imported where it is used: the command asks for this before it launches something.
if TYPE_CHECKING:
    from tunekit.config import Loaded, RunConfig
    from tunekit.data.images import Scan
    from tunekit.passes.base import Pass
    from tunekit.progress import Progress


Check = Callable[["Found"], None]


@dataclass
class Found:
    """What was found out about a config, before anything is loaded.

    Attributes:
        loaded: the config.
        processes: that shall run it.
        local: those of them on this machine.
        first: whether the run's folder belongs to this machine: to that of the first process.
        errors: what is wrong, in the order of the list.
        facts: what there is, by name, for people: "model", "passes", "pictures", ...
        model: what `model.source` is; None where it could not be found, or the recipe has none.
        chain: the passes of `optimize:`, in order.
        scan: the pictures; None where the recipe has none, or they were not looked at.
        notes: what is not wrong, and may not be as one thinks.
        progress: shows how far the look at the pictures is.
    """

    loaded: Loaded
    processes: int = 1
    local: int = 1
    first: bool = True
    errors: list[TunekitError] = field(default_factory=list)
    facts: dict[str, str | int] = field(default_factory=dict)
    model: Artifact | None = None
    chain: list[Pass] = field(default_factory=list)
    scan: Scan | None = None
    notes: list[str] = field(default_factory=list)
    progress: Progress | None = None

    @property
    def config(self) -> RunConfig:
        """The config itself."""
        config: RunConfig = self.loaded.config
        return config

    def section(self, name: str) -> Any:
        """A section that not every recipe has; None then."""
        return getattr(self.config, name, None)

    @property
    def is_trained(self) -> bool:
        """Whether the recipe trains something."""
        return self.section("train") is not None

    @contextmanager
    def about(self, key: str) -> Iterator[None]:
        """Collects what is raised within; it is about that key of the config, where it names none itself."""
        try:
            yield
        except TunekitError as error:
            if not error.key and not error.parts:
                error.key = key
                error.where = self.loaded.where(key)
            self.errors.append(error)

    def check(self) -> None:
        """Raise what is wrong: the one error, or the first kind of error with all of them in its text."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            parts = [part for error in self.errors for part in error.parts or [error]]
            raise type(self.errors[0])("\n".join(map(str, self.errors)), parts=parts)


def look(
    loaded: Loaded,
    *,
    processes: int = 1,
    local: int | None = None,
    first: bool = True,
    pictures: bool = True,
    progress: Progress | None = None,
    checks: Sequence[Check] | None = None,
) -> Found:
    """Ask all of the list.

    Args:
        loaded: the config.
        processes: that shall run it.
        local: those of them on this machine; None is all.
        first: whether the run's folder belongs to this machine; where it does not, it is not looked at.
        pictures: whether to look at the base and at every picture too, which take longer than all the rest.
        progress: shows how far that is.
        checks: another list.
    """
    found = Found(loaded, processes, processes if local is None else local, first, progress=progress)
    for check in CHECKS if checks is None else checks:
        if pictures or check not in SLOW:
            check(found)
    return found


def reads(loaded: Loaded, folder: Path | None = None) -> dict[str, Path]:
    """The files and folders of this machine that a run reads, absolute, by the key that names them.

    What stands on the hub, comes with tunekit or is made by the run is none of them.

    Args:
        folder: that the run is started in; None for this process's.
    """
    from tunekit.config import paths_in
    from tunekit.passes.base import parse_chain
    from tunekit.registry import recipe_names
    from tunekit.resources import expand

    named = paths_in(loaded.config)
    for number, step in enumerate(parse_chain(getattr(loaded.config, "optimize", []))):
        named |= paths_in(step, above=f"optimize.{number}.{step.kind}.")
    if named.get("recipe") in recipe_names():
        del named["recipe"]
    here = folder or Path.cwd()
    found = {"config": loaded.path}
    for key, text in named.items():
        if key not in MADE and not text.startswith("builtin/") and text != "tiny":
            found[key] = here / expand(text)
    return {key: path.absolute() for key, path in found.items() if path.exists()}


MADE = ("runs", "data.cache")
"""Keys of folders that a run makes."""


def _model(found: Found) -> None:
    """The source is there, is of the family that is named, and of an adapter the base is known."""
    from tunekit import families

    model = found.section("model")
    if model is None:
        return
    with found.about("model.family"):
        families.get(model.family)
    with found.about("model.source"):
        found.model = open_artifact(model.source, family=model.family)
    opened = found.model
    if opened is None:
        return
    found.notes += [f"model.{line}" for line in model.opened.idle]
    on_hub = opened.path is None and opened.source != "tiny"
    found.facts["model"] = f"{model.source} ({'on the hub: not looked at' if on_hub else opened.format})"
    with found.about("model.source"):
        if found.is_trained and opened.format not in {"torch", "adapter"}:
            raise ArtifactError(
                f"{model.source} has the format {opened.format}, which cannot be trained",
                hint="name a whole torch model: what this was exported from",
            )
    with found.about("model.family"):
        if opened.family and opened.family != model.family:
            message = f"model.family is {model.family}, but the source is of family {opened.family}"
            raise ConfigError(message)


def _base(found: Found) -> None:
    """The model can be loaded, as far as its configuration files and the headers of its weights tell."""
    from tunekit import families
    from tunekit.families.loading import left_out, refuse, variant_taken

    opened = found.model
    if opened is None or (not found.is_trained and opened.format not in {"torch", "adapter"}):
        return
    family, source = families.get(found.section("model").family), found.section("model").opened
    if not found.is_trained:  # a chain takes whatever can be opened
        if opened.format == "adapter" and opened.base is None:
            return
        own = opened.model_source
        source = own if opened.opened else replace(source, name=own.name)
    with found.about("model.source"):
        problems = family.look(source)
        for problem in problems:
            problem.key = problem.key or "model.source"  # and its place stays the file
        refuse(problems)
        found.notes += [f"model.source: {line}" for line in left_out(source, family.facts)]
        if variant := variant_taken(source, family.facts):
            found.facts["model"] = f"{found.facts['model']}, read as {variant}: there is no other"


def _chain(found: Found) -> None:
    """The passes are known, their settings right, and each can take what the one before it gives."""
    from tunekit.passes.base import Start, check_chain, parse_chain

    found.facts["passes"] = "none"
    where = found.loaded.chain_where
    with found.about("optimize"):
        found.chain = parse_chain(found.section("optimize") or [], where)
    if not found.chain:
        return
    opened, model = found.model, found.section("model")
    with found.about("optimize"):
        if found.is_trained:
            kind = "adapter" if found.section("adapter") else "torch"
            start = Start.trained(kind, model.family, model.opened)
        else:
            known = bool(found.section("preview").prompts or found.section("data"))
            start = Start.of(opened, family=model.family, examples=known) if opened else Start("torch")
        end = check_chain(found.chain, start, where)
        found.facts["passes"] = " > ".join(step.kind for step in found.chain) + f" ({end})"


def _machine(found: Found) -> None:
    """The device, its arithmetic and the packages asked for are there, and there is work for each process."""
    from tunekit import planning

    found.errors += planning.unmet(found.loaded, processes=found.processes, local=found.local)


def _judged(found: Found) -> None:
    """The CLIP that scores previews is there."""
    from tunekit.diffusion.judges import Judges

    named = getattr(found.section("preview"), "clip_model", None)
    with found.about("preview.clip_model"):
        if lacking := Judges.of_previews(named).lack():
            raise ConfigError(f"preview.clip_model {lacking}")


def _targets(found: Found) -> None:
    """Each target of the adapter names a layer of the denoiser."""
    adapter, opened = found.section("adapter"), found.model
    if not adapter or not adapter.targets or opened is None:
        return
    from tunekit import families
    from tunekit.adapters.attach import check_targets, targets_of

    with found.about("adapter.targets"):
        sizes = families.sizes_of(found.section("model").family, found.section("model").opened)
        denoiser, facts = sizes.denoiser.build(), sizes.family.facts
        check_targets(denoiser, targets_of(denoiser, adapter, facts.lora_targets, facts.presets))


def _distilled(found: Found) -> None:
    """Notes of a base that was distilled to few steps what training makes of it."""
    if not found.is_trained or found.model is None:
        return
    from tunekit import families

    model = found.section("model")
    with found.about("model.source"):
        sizes = families.sizes_of(model.family, model.opened)
        if said := families.distilled(sizes, model.source):
            found.notes.append(f"{found.model.source}: {said}")


LONGEST = len(".tmp-4194304") + len(".comfyui.safetensors")
"""What is put around the name of a run in names of files."""


def _folders(found: Found) -> None:
    """What the run writes can be written, under names that the file system takes."""
    data = found.section("data")
    own_cache = data is not None and getattr(data, "cache", None) is not None
    with found.about("name"):
        room = _longest_name(Path(found.config.runs).expanduser()) - LONGEST
        if len(os.fsencode(found.config.name)) > room:
            raise OutputError(
                f"is too long for a file's name: {room} bytes at most, with what is added to it"
            )
    with found.about("runs"):
        if found.first or not own_cache:  # the usual cache is beside the run
            _writable(RunFolder(found.config.run_dir).path)
    if data is not None and own_cache:
        with found.about("data.cache"):
            _writable(Path(data.cache).expanduser())


def _there(folder: Path) -> Path:
    """The folder, or the nearest one above it that there is."""
    folder = folder.absolute()
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def _longest_name(folder: Path) -> int:
    try:
        return os.pathconf(_there(folder), "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # Windows has no such question
        return 255


def _writable(folder: Path) -> None:
    """Raises an OutputError if a folder cannot be made, or not be written to."""
    there, longest = _there(folder), _longest_name(folder)
    for part in folder.parts:
        if len(os.fsencode(part)) > longest:
            raise OutputError(f"{folder} cannot be made: a name in it is too long, {longest} bytes at most")
    if not there.is_dir():
        raise OutputError(
            f"{folder} cannot be made: {there} is not a folder",
            hint="choose another place, or remove the file",
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(
            f"{folder} cannot be written: no permission to write to {there}", hint="choose another place"
        )


def _multiple(found: Found) -> int:
    """What the sizes of pictures have to be divisible by; 8 where nothing is trained, or nobody knows."""
    model = found.section("model")
    if not found.is_trained or found.model is None:
        return 8
    from tunekit import families

    try:
        return families.multiple_of(model.family, model.opened)
    except TunekitError:  # what is wrong with a base is said where it is looked at
        return 8


def _resolution(found: Found) -> None:
    """The resolution is one that the model can take; runs that were begun with another keep it."""
    data = found.section("data")
    if data is None or not found.first or RunFolder(found.config.run_dir).begun():
        return
    from tunekit.data.shapes import check_resolution

    with found.about("data.resolution"):
        check_resolution(data.resolution, _multiple(found), found.section("model").source)


_CAPTIONS = 100_000
"""Of more pictures than that the captions are looked at when they are encoded."""


def cut_prompts(found: Found) -> list[str]:
    """Lines about captions and prompts of which the text encoder, where it is here, does not read all."""
    model, preview = found.section("model"), found.section("preview")
    if found.model is None or found.scan is None:
        return []
    from tunekit import families
    from tunekit.families.prompts import cuts, tokenizers_of, told

    scan = found.scan
    groups = (scan.samples, scan.held_out, scan.prior)
    places = {item.caption: item.where for group in groups for item in group[:_CAPTIONS]}
    prompts = {*places, *preview.prompts, preview.sampling.negative_prompt or ""}
    lost = cuts(tokenizers_of(families.get(model.family), model.opened), sorted(prompts))
    return told(lost, len(prompts - {""}), places)


def _pictures(found: Found) -> None:
    """Every picture and every caption."""
    data = found.section("data")
    if data is None:
        return
    from tunekit.data.images import scan_data

    def key_of(names: str) -> str:
        """The key whose value is that source; "" if none is."""
        return next((f"data.{key}" for key in SOURCES if getattr(data, key, None) == names), "")

    with found.about("data"):
        try:
            scan = found.scan = scan_data(data, multiple=_multiple(found), progress=found.progress)
        except TunekitError as error:  # a name that is not bundled
            quoted = error.message.split('"')[1:2]
            error.key = key_of(quoted[0]) if quoted else ""
            error.where = found.loaded.where(error.key) if error.key else error.where
            raise
        found.notes += scan.notes
        found.facts["pictures"] = len(scan.samples)
        if scan.held_out:
            found.facts["held out"] = len(scan.held_out)
        if scan.prior:
            found.facts["class pictures"] = len(scan.prior)
        try:
            scan.check()
        except DataError as error:
            error.parts = tuple(
                DataError(problem.what, where=problem.where, hint=problem.fix, key=key_of(problem.where))
                for problem in scan.problems
            )
            raise


SOURCES = ("path", "validation", "class_path")
"""Keys of `data:` that name pictures."""

CHECKS: tuple[Check, ...] = (
    _model,
    _base,
    _chain,
    _machine,
    _judged,
    _targets,
    _distilled,
    _folders,
    _resolution,
    _pictures,
)
"""The list, in the order in which it is asked; a later check may use what an earlier one found."""
ENCODING = (_model, _base, _folders, _resolution, _pictures)
"""What encoding pictures and captions needs of it; whether the training does is not asked."""
SLOW = (_base, _distilled, _resolution, _pictures)
"""Those that the recipe's own process asks, and not the command that launches it."""
