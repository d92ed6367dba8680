"""What the command, a notebook or a page asks of tunekit. It answers with data and prints nothing."""

from __future__ import annotations

import os
import re
import shlex
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from tunekit.artifacts import RECORD, Artifact, RunFolder, open_artifact, write_text
from tunekit.config import config_names, find_config
from tunekit.errors import (
    ArtifactError,
    ConfigError,
    Interrupted,
    OutputError,
    TunekitError,
    did_you_mean,
)
from tunekit.files import atomic_file, clean_leftovers, directory_size, remove_folder
from tunekit.provenance import shown
from tunekit.registry import FAMILIES, PASSES, Registry, recipe_names, recipe_path
from tunekit.resources import PACKAGE, builtin_names, configs_dir, expand, sweep_names, sweeps_dir

# What takes longer to import (pydantic, torch) is imported where it is used, so that `tunekit ls` answers at
# once.
if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from tunekit.config import CacheConfig, Loaded, SamplingConfig
    from tunekit.launch import Place
    from tunekit.memory.plan import Plan
    from tunekit.progress import Progress

RUNS = Path("runs")
BATCH = 4
"""Pictures drawn at once."""


# What there is ----------------------------------------------------------------------------------------------


def inventory() -> dict[str, dict[str, str]]:
    """The configs, sweeps, recipes, families, passes and bundled things, each name with a line about it."""

    def members(registry: Registry[Any]) -> dict[str, str]:
        files = {name: PACKAGE / registry.package.split(".")[1] / f"{name}.py" for name in registry.names()}
        return {name: _first_line(file) if file.is_file() else "plug-in" for name, file in files.items()}

    return {
        "configs": {name: _first_line(find_config(name)) for name in config_names()},
        "sweeps": {name: _first_line(sweeps_dir() / f"{name}.yaml") for name in sweep_names()},
        "recipes": {name: _first_line(recipe_path(name)) for name in recipe_names()},
        "families": members(FAMILIES),
        "passes": members(PASSES),
        "builtin": dict.fromkeys(builtin_names(), ""),
    }


def _first_line(path: Path) -> str:
    """First line of a module's docstring, or of a YAML file's comment, without importing anything."""
    with path.open(encoding="utf-8") as file:
        head = file.read(400)
    match = re.match(r'\s*(?:"""|#\s*)(.+?)(?:"""|\n|$)', head)
    return match[1].strip() if match else ""


@dataclass(frozen=True)
class RunState:
    """How far a run has come.

    Attributes:
        run: its folder.
        state: "trained", "at step-000200", "2 passes done", "begun"; "damaged" where that cannot be told.
        final: the folder in it that has the model which is the result so far.
        problem: why it is damaged; "" if it is not.
    """

    run: str
    state: str
    final: str | None
    problem: str = ""


def runs(folder: Path | str = RUNS) -> list[RunState]:
    """The runs in a folder of runs; one that is damaged is named, and hides no other."""
    found = []
    for path in sorted(expand(folder).glob("*")):
        try:
            state = _run_state(path)
        except TunekitError as error:
            state = RunState(str(path), "damaged", None, str(error))
        except OSError as error:
            state = RunState(str(path), "damaged", None, f"{path}: cannot be read: {error.strerror}")
        if state:
            found.append(state)
    return found


def _run_state(path: Path) -> RunState | None:
    run = RunFolder(path)
    if not run.config.is_file():
        return None
    trained, passes = run.trained(), run.passes()
    checkpoints = sorted(run.checkpoints.glob("step-*"))
    last = passes[-1] if passes else trained
    final = run.folder_of(Artifact.load(last, check=False)) if last else None
    state = "trained" if trained else f"at {checkpoints[-1].name}" if checkpoints else "begun"
    if passes:
        state = f"{len(passes)} {'pass' if len(passes) == 1 else 'passes'} done"
    return RunState(str(path), state, final)


@dataclass(frozen=True)
class Verified:
    """A record, and whether it and what it is about are as they were written.

    Attributes:
        place: its file, or the folder of an artifact.
        what: "adapter", "torch", "onnx", "openvino", "tensorrt" of artifacts, else "record".
        problem: what is wrong; "" if nothing is.
    """

    place: str
    what: str
    problem: str = ""


def verify_files(folder: Path | str, *, accept: bool = False) -> list[Verified]:
    """Reads every record in a folder and below it, and all content of the models, whatever their time stamps.

    Args:
        folder: of a run, of an artifact, or of many of them.
        accept: where only a model is another, take it from now on as it is.

    Raises:
        ArtifactError: there is no such folder.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ArtifactError(f'there is no folder "{root}"', hint="give a run, an artifact, or many of them")
    found, artifacts = [], []
    for place, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(place)
        if RECORD in names:
            artifacts.append(here)
        found += [row for name in sorted(names) if (row := _verify_record(here / name))]
    made = [_verify_artifact(path, accept=accept) for path in artifacts]
    return sorted([*found, *made], key=lambda row: row.place)


def _verify_artifact(path: Path, *, accept: bool) -> Verified:
    what = "record"
    try:
        artifact = Artifact.load(path, check=False)
        what = artifact.format
        try:
            artifact.check(thorough=True)
        except ArtifactError:
            if not accept:
                raise
            own = artifact.model_path == artifact.path or artifact.model_path is None
            subject = None if own else Artifact.load(artifact.model_path or path, check=False).hash
            replace(artifact, recorded_hash=subject, files=None).write()
    except TunekitError as error:
        return Verified(str(path), what, error.message)
    return Verified(str(path), what)


def _verify_record(path: Path) -> Verified | None:
    """A file beside the models; None if it is none of ours."""
    from tunekit import records

    kinds: dict[str, type[records.Record]] = {
        "chain.json": records.ChainRecord,
        "plan.json": records.PlanRecord,
        "state.json": records.StateRecord,
    }
    try:
        if path.name == "metrics.jsonl":
            unread = records.metrics_of(path).unread
            count = f"{len(unread)} lines" if len(unread) > 1 else "a line"
            return Verified(str(path), "record", f"{count} cannot be read" if unread else "")
        if path.name not in kinds:
            return None
        records.read(path, kinds[path.name])
    except (TunekitError, FileNotFoundError) as error:
        return Verified(str(path), "record", getattr(error, "message", str(error)))
    return Verified(str(path), "record")


def find_run(name: str) -> Path:
    """A run by its folder, or by its name under `runs`.

    Raises:
        ArtifactError: there is none.
    """
    path = expand(name)
    if path.is_dir():
        return path
    if (RUNS / name).is_dir():
        return RUNS / name
    near = [str(folder) for parent in (path.parent, RUNS) for folder in parent.glob("*")]
    raise ArtifactError(
        f'there is no run "{name}"', hint=did_you_mean(name, near) or "tunekit ls shows the runs"
    )


def find_model(name: str) -> str:
    """A model as `open_artifact` takes it; a run under `runs` also by its name alone."""
    here = expand(name).exists() or name == "tiny"
    return str(RUNS / name) if not here and (RUNS / name).is_dir() else name


def copy(name: str, dest: Path | str, *, force: bool = False) -> Path:
    """Copies a ready-made config, recipe or sweep, to make it one's own.

    A config gets a head of its own, with its new path, and the name of its file; what it extends is found
    from its new place too, and its first line tells editors which keys there are.

    Args:
        name: as `inventory` has it.
        dest: file or folder.
        force: overwrite.

    Returns:
        The file that was written.

    Raises:
        ConfigError: nothing of that name.
        OutputError: the file is there already, or cannot be written.
    """
    dest = expand(dest)
    key = name.removesuffix(".yaml").removesuffix(".py")
    is_recipe = key in recipe_names() and (key not in config_names() or dest.suffix == ".py")
    is_sweep = key in sweep_names() and not is_recipe and key not in config_names()
    if not is_recipe and not is_sweep and key not in config_names():
        known = [*config_names(), *recipe_names(), *sweep_names()]
        hint = did_you_mean(name, known) or "tunekit ls shows what there is"
        raise ConfigError(f'there is no config, recipe or sweep "{name}"', hint=hint)
    if is_sweep:
        source = sweeps_dir() / f"{key}.yaml"
    else:
        source = recipe_path(key) if is_recipe else find_config(configs_dir() / f"{key}.yaml")
    target = dest / source.name if dest.is_dir() else dest
    if target.exists() and not force:
        raise OutputError(
            "is there already", where=str(target), hint="choose another name, or --force to overwrite"
        )
    text = source.read_text(encoding="utf-8")
    if is_sweep:
        text = text.replace(f"sweeps/{key}.yaml", target.as_posix())
    elif not is_recipe:
        text = _own(text, key, source, target)
    return write_text(target, text)


def _own(text: str, key: str, source: Path, target: Path) -> str:
    """The text of a ready-made config as that of a copy: with its path, its name, its schema."""
    from tunekit.explain import SCHEMAS

    def by_name(match: re.Match[str]) -> str:  # what it extends it must find from its new place
        base = (source.parent / match[2]).resolve()
        return match[1] + base.relative_to(configs_dir().resolve()).as_posix()

    text = re.sub(r"(?m)^(extends:\s*)([^\s#]+)", by_name, text)
    named = re.search(r"(?m)^name:\s*(\S+).*\n", text)
    if named:
        text = text.replace(named[0], "")  # the name is the file's again
    text = re.sub(rf"\bconfigs/{re.escape(key)}\.yaml(?!\w)", lambda _: shlex.quote(target.as_posix()), text)
    former = named[1] if named else source.stem
    text = re.sub(rf"\bruns/{re.escape(former)}(?![\w-])", lambda _: f"runs/{target.stem}", text)
    recipe = re.search(r"(?m)^recipe:\s*(\w+)", text)
    schema = SCHEMAS / f"{recipe[1] if recipe else ''}.json"
    known = f"# yaml-language-server: $schema={schema.as_posix()}\n" if schema.is_file() else ""
    return known + text


# Checking ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a config, or with what it names.

    Attributes:
        place: "file:line", "command line", or the path of a picture.
        key: dotted key of the config that it is about, "" if it is about none.
        message: what is wrong.
        hint: what to change; "" where the message says it.
    """

    place: str
    key: str
    message: str
    hint: str = ""


@dataclass(frozen=True)
class Examination:
    """What was found out about a config.

    Attributes:
        path: the config's file.
        facts: what there is, by name: "recipe", "writes to", "model", "passes", "pictures", ...
        errors: what is wrong, as it is told to people.
        problems: the same, one row for each.
        warnings: options of the file that overrides have left without effect.
        notes: what is not wrong, and may not be as one thinks, as pictures that are not used.
    """

    path: str
    facts: dict[str, str | int]
    errors: tuple[TunekitError, ...] = ()
    problems: tuple[Problem, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """What `tunekit check --json` prints."""
        return {
            "version": 1,
            "config": self.path,
            "facts": {name.replace(" ", "_"): fact for name, fact in self.facts.items()},
            "problems": [asdict(problem) for problem in self.problems],
            **({"warnings": list(self.warnings)} if self.warnings else {}),
            **({"notes": list(self.notes)} if self.notes else {}),
        }


def check(config: str | Path, overrides: Sequence[str] = ()) -> Examination:
    """Loads a config and examines it; what keeps it from loading is a problem like others."""
    from tunekit.config import load

    try:
        loaded = load(config, overrides)
    except TunekitError as error:
        try:
            path = find_config(config)
        except ConfigError:
            path = Path(config)
        return Examination(str(path), {}, (error,), tuple(_rows(error)))
    return examine(loaded)


def examine(loaded: Loaded, progress: Progress | None = None) -> Examination:
    """Asks all of `preconditions` of a config: its model, its passes, the machine, every picture.

    Args:
        progress: shows how far the look at the pictures is.
    """
    from tunekit import preconditions

    found = preconditions.look(loaded, progress=progress)
    facts = {"recipe": loaded.config.recipe, "writes to": str(loaded.config.run_dir), **found.facts}
    rows = tuple(row for error in found.errors for row in _rows(error))
    notes = (*found.notes, *preconditions.cut_prompts(found))
    return Examination(str(loaded.path), facts, tuple(found.errors), rows, loaded.warnings, notes)


def _rows(error: TunekitError) -> list[Problem]:
    return [
        Problem(part.where or "", part.key, part.message, part.hint or "") for part in error.parts or [error]
    ]


def ready(loaded: Loaded, *, processes: int = 1, place: Place | None = None) -> None:
    """The checks before a run is launched, without a look at every picture, which the run takes itself.

    Args:
        processes: on this machine.
        place: of these, where others on other machines belong to the same run.

    Raises:
        TunekitError: something is wrong.
    """
    from tunekit import preconditions

    world, first = (place.world, place.first == 0) if place else (processes, True)
    preconditions.look(loaded, processes=world, local=processes, first=first, pictures=False).check()


# Running ----------------------------------------------------------------------------------------------------


def run(config: str | Path, *overrides: str, processes: int = 1) -> Artifact:
    """Runs a recipe, through accelerate; called again, it continues where it stopped.

    Call it from the main thread: until the recipe ends, it passes Ctrl-C and SIGTERM on to it.

    Args:
        config: a path, or the name of a ready-made config.
        overrides: `a.b=c` each.
        processes: one per GPU, or several on the CPU.

    Returns:
        What the run ends with: the last artifact of its chain, or what was trained.

    Raises:
        TunekitError: it did not start, for the reason that it says; or it failed, and has said why on stderr.
            `exit_code` is the recipe's own. Interrupted: it was stopped, after a checkpoint.
    """
    loaded, code = launch(config, overrides, processes=processes)
    folder = RunFolder(loaded.config.run_dir)
    if code:
        kind = Interrupted if code > 128 else TunekitError
        error = kind(
            "the run was stopped" if code > 128 else f"the run failed with exit code {code}",
            where=str(folder.path),
            hint="its own message is on stderr; the same call continues it",
        )
        error.exit_code = code
        raise error
    return folder.final()


def launch(config: str | Path, overrides: Sequence[str] = (), *, processes: int = 1) -> tuple[Loaded, int]:
    """Checks a config and runs its recipe, which prints. Returns the config and the recipe's exit code.

    Raises:
        TunekitError: something is wrong, and nothing was launched.
    """
    from tunekit import launch as launcher
    from tunekit.config import load

    loaded = load(config, overrides)
    place = launcher.Place.given()
    ready(loaded, processes=processes, place=place)
    memory = getattr(loaded.config, "memory", None)
    device = memory.device if memory else getattr(loaded.config, "device", "auto")
    if processes > 1 or place:
        from tunekit import hardware

        device = hardware.probe(device).torch_device.partition(":")[0]
    recipe = recipe_path(loaded.config.recipe)
    code = launcher.launch(
        recipe, loaded.path, overrides, processes=processes, cpu=device == "cpu", place=place
    )
    return loaded, code


@dataclass(frozen=True)
class UnusedFolder:
    """A step's folder that the present chain of its run does not name.

    Attributes:
        path: the folder.
        size_bytes: of its files.
        user: a record elsewhere that points at its model, so that it stays; "" if there is none.
    """

    path: Path
    size_bytes: int
    user: str = ""


def prune_folders(run: str, *, dry: bool = False) -> list[UnusedFolder]:
    """Removes the folders of passes that the present chain of a run does not name any more, and all trials.

    What an artifact of this or of a neighbouring run points at stays.

    Args:
        run: a folder, or a name under `runs`.
        dry: only says what there is.

    Raises:
        ArtifactError: no such run; its chain.json is damaged; another process is writing to it.
    """
    from tunekit.training.checkpoint import only_writer

    folder = RunFolder(find_run(run))
    if not folder.chain_file.is_file():
        raise ArtifactError(
            "has no chain.json, so which folders are in use is not known", where=str(folder.path)
        )
    with only_writer(folder.path):
        used = {path.name for path in folder.passes()}
        unused = [
            path
            for path in sorted(folder.path.iterdir())
            if PASS_FOLDER.fullmatch(path.name) and path.name not in used and path.is_dir()
        ]
        unused += [folder.trials] if folder.trials.is_dir() else []  # what a search found is a copy
        users = _users(folder, unused)
        found = [UnusedFolder(path, directory_size(path), users.get(path.resolve(), "")) for path in unused]
        if not dry:
            clean_leftovers(folder.path)
            for item in found:
                if not item.user:
                    remove_folder(item.path)
    return found


PASS_FOLDER = re.compile(r"\d+-[a-z_0-9]+-[0-9a-f]{8}")


def _users(run: RunFolder, unused: Sequence[Path]) -> dict[Path, str]:
    """Of some folders, those that a record elsewhere points at, and that record."""
    doomed = {path.resolve() for path in unused}
    found: dict[Path, str] = {}
    for record in sorted(run.path.parent.glob(f"*/*/{RECORD}")):
        if record.parent.resolve() in doomed:
            continue
        try:
            artifact = Artifact.load(record.parent, check=False)
        except TunekitError:
            continue
        places = [artifact.model_path, Path(artifact.base) if artifact.base else None]
        for place in places:
            if place is not None and place.resolve() in doomed:
                found[place.resolve()] = str(record)
    for config in sorted(run.path.parent.glob("*/config.yaml")):
        text = config.read_text(encoding="utf-8", errors="replace")
        for path in unused:
            if path.name in text:
                found.setdefault(path.resolve(), str(config))
    return found


class Comparing(TypedDict, total=False):
    """What is drawn in a comparison; see `comparison.Wanted`."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    strengths: Sequence[float]
    checkpoints: bool
    final: bool
    base: str | None
    sampling: SamplingConfig
    device: str
    dtype: str | None
    draws: bool


def compare(
    runs: Sequence[str],
    *,
    out: Path | str = "compare",
    say: Callable[[str], object] = lambda line: None,
    on_step: Callable[[str, int, int], object] | None = None,
    **wanted: Unpack[Comparing],
) -> dict[str, Any]:
    """Compares runs: what differs in them, how they learned, and the same prompts drawn by each.

    Args:
        runs: folders of runs or their names under `runs`, adapter files, models.
        out: folder of compare.html, compare.json, sheets and pictures.
        say: takes lines about what is left out.
        on_step: called with (what draws, pictures done, all of them).
        wanted: see `comparison.Wanted`.

    Returns:
        The content of compare.json.

    Raises:
        TunekitError: a run is not there, cannot be opened, or an option has no effect on any of them.
    """
    from tunekit import comparison

    named = [find_model(name) for name in runs]
    base = wanted.get("base")
    if base is not None:
        wanted["base"] = find_model(base)
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in wanted.items()
    }
    return comparison.compare(named, comparison.Wanted(**options), expand(out), say=say, on_step=on_step)


# Planning ---------------------------------------------------------------------------------------------------


def plan(
    config: str | Path | Loaded,
    *overrides: str,
    device: str | None = None,
    budget: str | None = None,
    display: bool = False,
    devices: int = 1,
    strict: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> list[Plan]:
    """Predicts a training's memory and finds the fastest way that fits; no GPU or weights are needed.

    Args:
        config: a path, the name of a ready-made config, or what `load` returned.
        overrides: `a.b=c` each; not for what is loaded already.
        device: a card such as "rtx-3060", "all", or what answers here: "auto", "cuda:1". If neither this nor
            `budget` is given, all cards.
        budget: memory that may be used, "8 GiB".
        display: whether a display is on the card, which takes some of it.
        devices: how many such train together; the plans are of one of them.
        strict: whether a plan for one card that does not fit is an error.
        say: takes lines of progress.

    Returns:
        One plan per card; of "all" some may not fit.

    Raises:
        ConfigError: in the config, or it trains nothing.
        DeviceError: no such card, or it lacks what the config asks for.
        DoesNotFit: the one card that was asked for does not do; says what would help.
    """
    from tunekit import planning
    from tunekit.config import Loaded, load

    if not isinstance(config, Loaded):
        config = load(config, overrides, stand_in="(not needed)")
        for text in config.warnings:
            say(f"warning: {text}")
    elif overrides:
        raise ConfigError("overrides have no effect on a config that is loaded", hint="give them to load()")
    chosen = device or ("all" if budget is None else None)
    return planning.plan_config(
        config, device=chosen, budget=budget, display=display, devices=devices, strict=strict, say=say
    )


def picture_plans(plans: Sequence[Plan], file: Path) -> Path:
    """Draws the memory of a step into an .svg (of one plan) or .html file.

    Raises:
        ConfigError: several plans, and an .svg.
    """
    from tunekit.memory import picture

    if file.suffix == ".svg" and len(plans) > 1:
        raise ConfigError(
            f"{len(plans)} plans do not go into one .svg", where="--picture", hint="give an .html file"
        )
    return write_text(expand(file), "\n".join(picture.draw(plan) for plan in plans))


# Drawing ----------------------------------------------------------------------------------------------------


class Opening(TypedDict, total=False):
    """How a model is opened; see `runtime.open_runtime`."""

    family: str | None
    device: str
    provider: str | None
    dtype: str | None
    adapter: str | Path | None


class Drawing(Opening, total=False):
    """How pictures are drawn into files; see `draw`.

    Attributes:
        scales: strengths of the adapter, each of which draws every picture; none is 1.
        grid: put them side by side into one more file: a row for each picture, a column for each strength.
        tiled: decode pictures that are larger than the model's own in tiles, which takes less memory.
        base: folder or hub id with what a single file of a transformer or U-Net alone lacks.
        say: takes lines about what is not read, or has no effect.
    """

    scales: Sequence[float]
    grid: bool
    tiled: bool
    base: str | None
    say: Callable[[str], object]


class Options(Opening, total=False):
    """How a model is opened, how a picture is drawn (`SamplingConfig`), and how many at once."""

    steps: int
    guidance: float
    guidance_interval: tuple[float, float]
    negative_prompt: str
    height: int
    width: int
    scheduler: dict[str, Any]
    cache: dict[str, Any] | CacheConfig
    variant: str | None
    base: str | None
    batch: int
    tiled: bool
    on_step: Callable[[int, int, Tensor], None]


def generate(
    source: Artifact | str | Path,
    prompts: str | Sequence[str],
    *,
    seeds: int | Sequence[int] = 0,
    **options: Unpack[Options],
) -> list[Image.Image]:
    """Opens a model, draws pictures with it and closes it; `open_runtime` keeps one open for more.

    Args:
        source: run folder, adapter, any artifact, diffusers folder, hub id, "builtin/..." or "tiny".
        prompts: one per seed, or a single one for all.
        seeds: one per prompt, or a single one for all.
        options: family (its name, where the source does not say it); device ("auto", "cpu", "cuda",
            "cuda:1", "xpu", "mps"); provider (of ONNX models: "cpu", "cuda", "tensorrt", "openvino"); dtype
            ("fp32", "bf16", "fp16", of torch and OpenVINO); adapter (to put on the source); variant (of its
            weight files, such as "fp16"); base (folder or hub id with what a single file of a transformer
            alone lacks). steps, guidance, guidance_interval, negative_prompt, height, width, scheduler,
            cache: the model's own where they are not given. batch (pictures at once), tiled (decode large
            ones in tiles), on_step.

    What of a prompt is not read, and a negative prompt without effect, are warnings.

    Raises:
        TunekitError: the source cannot be opened, or an option has no effect.
    """
    known = {**Options.__annotations__, **Opening.__annotations__}
    if unknown := sorted(set(options) - set(known)):  # said before minutes of loading
        raise TypeError(f"generate() takes no {', '.join(unknown)}")

    from tunekit import runtime
    from tunekit.config import SamplingConfig, validate

    given: dict[str, Any] = dict(options)
    opening = {name: given.pop(name) for name in Opening.__annotations__ if name in given}
    drawing = {name: given.pop(name) for name in ("batch", "on_step") if name in given}
    variant, base = given.pop("variant", None), given.pop("base", None)
    if variant or base:
        found = (
            source if isinstance(source, Artifact) else open_artifact(source, family=options.get("family"))
        )
        source = found.in_variant(variant).with_base(base)
    tiled = given.pop("tiled", False)
    sampling = validate(SamplingConfig, given, lambda key: "generate()")
    drawer = runtime.open_runtime(source, **opening)
    drawer.tiled = tiled
    texts = [prompts] if isinstance(prompts, str) else prompts
    try:
        for remark in runtime.remarks(drawer, texts, sampling):
            warnings.warn(remark, stacklevel=2)
        return runtime.generate(
            drawer,
            texts,
            sampling,
            seeds=[seeds] if isinstance(seeds, int) else seeds,
            **drawing,
        )
    finally:
        drawer.close()


def draw(
    source: str,
    prompts: Sequence[str],
    sampling: SamplingConfig | None = None,
    *,
    out: Path | str = "generated",
    seed: int = 0,
    count: int = 1,
    variant: str | None = None,
    on_step: Callable[[str, int, int], object] | None = None,
    **options: Unpack[Drawing],
) -> Iterator[Path]:
    """Draws pictures into files that say how they were made, and yields the paths.

    Nothing happens before the first is asked for.

    Args:
        source: run folder, adapter, any artifact, diffusers folder, hub id, "builtin/..." or "tiny".
        prompts: each is drawn `count` times.
        sampling: how; what it leaves open is the model's own.
        out: a folder, or a .png file for one picture, or for the grid.
        seed: of the first picture of each prompt; the next ones count up.
        count: pictures of each prompt.
        variant: of the weight files of the source or its base, such as "fp16".
        on_step: called with (what draws, sampling steps done, all of them).
        options: see `Drawing`, and `runtime.open_runtime`.

    Raises:
        ConfigError: several pictures, and one file; strengths, and no adapter.
        NonFiniteError: the model draws values that are no numbers.
        TunekitError: the source cannot be opened, or a picture cannot be written.
    """
    opening: dict[str, Any] = dict(options)
    scales: Sequence[float] = opening.pop("scales", ())
    grid: bool = opening.pop("grid", False)
    tiled: bool = opening.pop("tiled", False)
    say: Callable[[str], object] = opening.pop("say", lambda line: None)
    out = expand(out)
    wanted = [(text, seed + index) for text in prompts for index in range(count)]
    one_file = out.suffix.lower() == ".png"
    if one_file and not grid and len(wanted) * max(1, len(scales)) > 1:
        raise ConfigError(
            f"{len(wanted) * max(1, len(scales))} pictures do not go into one file",
            where="--out",
            hint="give a folder, or --grid",
        )
    opened = open_artifact(find_model(source), family=opening.get("family"))
    opened = opened.in_variant(variant).with_base(opening.pop("base", None))
    if scales and opened.format != "adapter" and not opening.get("adapter"):
        raise ConfigError(
            f"a scale has no effect on {source}, which has no adapter that could be scaled",
            where="--scale",
            hint="give the adapter's own folder, or put one on with --adapter; a merged one is fixed",
        )

    from tunekit import runtime
    from tunekit.config import SamplingConfig
    from tunekit.runtime.swap import at_strength

    drawer = runtime.open_runtime(opened, **opening)
    drawer.tiled = tiled
    whole = (sampling or SamplingConfig()).over(drawer.sampling)
    facts = {
        "negative_prompt": (whole.negative_prompt or "") if drawer.cfg_scale(whole) is not None else "",
        "steps": str(whole.steps),
        "guidance": f"{whole.guidance:g}",
        "source": shown(source),
        "runtime": drawer.title,
    }
    strengths = list(scales) or [1.0]
    total = (whole.steps or 1) * -(-len(wanted) // BATCH) * len(strengths)
    done = 0
    rows: list[list[Image.Image]] = [[] for _ in wanted]

    def step(*_: object) -> None:
        nonlocal done
        done += 1
        if on_step:
            on_step(drawer.title, done, total)

    try:
        for remark in runtime.remarks(drawer, [text for text, _ in wanted], whole):
            say(remark)
        for strength in strengths:
            own = {"scale": f"{strength:g}"} if scales else {}
            for start in range(0, len(wanted), BATCH):
                group = wanted[start : start + BATCH]
                with at_strength(drawer, strength):
                    pictures = runtime.generate(
                        drawer,
                        [text for text, _ in group],
                        whole,
                        seeds=[number for _, number in group],
                        on_step=step,
                    )
                for index, (text, number) in enumerate(group):
                    rows[start + index].append(pictures[index])
                    if one_file and grid:
                        continue
                    path = _picture_path(out, text, f"{number}-x{strength:g}" if scales else str(number))
                    known = {"prompt": text, "seed": str(number), **own, **facts}
                    _save_png(path, pictures[index], known)
                    yield path
    finally:
        drawer.close()
    if grid:
        heads = [f"{strength:g}" for strength in scales]
        if not scales:  # a row for each prompt then
            rows = [[row[0] for row in rows[start : start + count]] for start in range(0, len(rows), count)]
            heads = [str(seed + index) for index in range(count)]
        path = out if one_file else _picture_path(out, "grid", str(seed))
        texts = "\n".join(dict.fromkeys(text for text, _ in wanted))
        columns = {"columns": f"{'scale' if scales else 'seed'}: {', '.join(heads)}"}
        _save_png(path, _grid(rows, heads), {"prompt": texts, "seed": str(seed), **columns, **facts})
        yield path


def _grid(rows: Sequence[Sequence[Image.Image]], heads: Sequence[str]) -> Image.Image:
    """Pictures side by side, a head over each column."""
    from PIL import Image, ImageDraw

    width, height = rows[0][0].size
    strip, gap = 16, 4
    whole = Image.new(
        "RGB", ((width + gap) * len(heads) - gap, strip + (height + gap) * len(rows) - gap), "white"
    )
    pen = ImageDraw.Draw(whole)
    for column, head in enumerate(heads):
        pen.text(((width + gap) * column + 2, 2), head, fill="black")
        for index, row in enumerate(rows):
            whole.paste(row[column], ((width + gap) * column, strip + (height + gap) * index))
    return whole


def _picture_path(out: Path, prompt: str, seed: str | int) -> Path:
    if out.suffix.lower() == ".png":
        return out
    slug = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60] or "picture"
    path, again = out / f"{slug}-{seed}.png", 1
    while path.exists():  # nothing that was drawn before is lost
        again += 1
        path = out / f"{slug}-{seed}-{again}.png"
    return path


def _save_png(path: Path, picture: Image.Image, facts: dict[str, str]) -> None:
    """Writes a picture that says how it was made."""
    from PIL.PngImagePlugin import PngInfo

    import tunekit

    info = PngInfo()
    for name, text in {**facts, "software": f"tunekit {tunekit.__version__}"}.items():
        info.add_text(name, text)
    with atomic_file(path) as aside:  # a full disk leaves no empty file
        picture.save(aside, "png", pnginfo=info)
