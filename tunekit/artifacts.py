"""Artifacts: plain folders other tools can load, with `artifact.json` in them."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.errors import ArtifactError, did_you_mean
from tunekit.files import (
    atomic_folder,
    clean_leftovers,
    directory_size,
    remove_folder,
    write_json,
    write_text,
)
from tunekit.kept import Kept
from tunekit.provenance import at_home, made, public
from tunekit.resources import Source, builtin

if TYPE_CHECKING:
    from tunekit.config import RuntimeConfig, SamplingConfig
    from tunekit.records import ArtifactRecord

__all__ = [
    "ADAPTER_FILE",
    "CARD",
    "COMFYUI_ENDINGS",
    "PICTURES",
    "RECORD",
    "RUN_SO",
    "SAMPLED",
    "VERSION",
    "Artifact",
    "Metric",
    "RunFolder",
    "Step",
    "atomic_folder",
    "clean_leftovers",
    "directory_size",
    "open_artifact",
    "remove_folder",
    "write_json",
    "write_text",
]

VERSION = 2
"""Of artifact.json. Version 1, which says neither how the model is drawn with nor opened, is read."""
CHAIN_VERSION = 1
RECORD = "artifact.json"
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
COMFYUI_ENDINGS = (".kohya.safetensors", ".comfyui.safetensors")
"""How the adapter's second file ends, for ComfyUI and others: in kohya's names, and in names with dots."""
PICTURES = "pictures"
"""Folder inside an artifact for the pictures of its step; no part of the model, so not hashed."""

GRAPHS = {"onnx": "model.onnx", "openvino": "openvino_model.xml"}
"""Format -> the file in each component's folder by which a pipeline in that format is known."""

CARD = "README.md"
"""The model card beside a record; it says who made the model and when, and is no part of it."""

SAMPLED = "sampling"
"""Of a step's details: how the model that it made is drawn with, where the step decided that."""
RUN_SO = "runtime"
"""Of a step's details: how the model that it made is run, where the step decided that."""

Metric = float | int | bool | str | None


# Artifacts -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What one pass, or the training, did.

    Attributes:
        kind: "train", "prune", ...
        artifact: name of the folder it wrote.
        settings: the pass's fields.
        seconds: wall time.
        metrics: numbers with the unit in the name (`size_bytes`, `psnr_db`).
        parent_hash: hash of the artifact it started from.
        details: JSON-able tables for the report.
        pictures: `{"file": path relative to the folder, "label", "prompt", "seed"}` each.
    """

    kind: str
    artifact: str
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    metrics: dict[str, Metric] = field(default_factory=dict)
    parent_hash: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    pictures: list[dict[str, Any]] = field(default_factory=list)


def model_files(root: Path, *, own: bool = False) -> dict[str, Path]:
    """The model files under `root` (or the one file) by name: no record, card, picture or hidden file.

    Args:
        root: a folder with a record, or of somebody else's, whose README.md counts.
        own: a folder that gets its record only now.
    """
    if root.is_file():
        return {root.name: root}
    beside = {RECORD, CARD} if own or (root / RECORD).is_file() else {RECORD}
    found = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name = path.relative_to(root).as_posix()
        parts = name.split("/")
        if name in beside or parts[0] == PICTURES or any(part.startswith(".") for part in parts):
            continue
        found[name] = path
    return found


def _hash_content(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _joined(contents: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(len(name).to_bytes(4, "big") + os.fsencode(name) + content)
    return digest.hexdigest()


def hash_files(root: Path) -> str:
    """SHA-256 over names and contents of the model files under `root` (or of the one file)."""
    return _joined({name: _hash_content(path) for name, path in model_files(root).items()})


@dataclass(frozen=True)
class Written:
    """A file of a model as it was written.

    Attributes:
        bytes: its size.
        modified_ns: its time stamp.
        sha256: of its content.
    """

    bytes: int
    modified_ns: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Written:
        """The file as it is now."""
        found = path.stat()
        return cls(found.st_size, found.st_mtime_ns, _hash_content(path).hex())

    def problem(self, path: Path, *, thorough: bool) -> str | None:
        """What is wrong with the file that should be this one.

        Its content is read where its time stamp has changed, or if `thorough`.
        """
        try:
            found = path.stat()
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        if found.st_size != self.bytes:
            return f"has {found.st_size} bytes, and {self.bytes} were written"
        if found.st_mtime_ns == self.modified_ns and not thorough:
            return None
        key = [str(path.resolve()), found.st_size, found.st_mtime_ns, self.sha256]
        if not thorough and _is_known(key):
            return None
        try:
            if _hash_content(path).hex() != self.sha256:
                return "does not hold what was written"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        _remember(key)
        return None


def _name_of(key: object) -> str:
    return hashlib.blake2b(repr(key).encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()


def _is_known(key: object) -> bool:
    """Whether these very files were found to be right before."""
    return Kept.of("verified").read(_name_of(key)) is True


def _remember(key: object) -> None:
    Kept.of("verified").write(_name_of(key), True)


@dataclass(frozen=True)
class Artifact:
    """A model or adapter on disk (or on the hub) and how it came to be.

    Attributes:
        path: folder of `artifact.json`, or the bare folder or file; None for a hub id or "tiny".
        model_path: where the model files are; a step that changes nothing points at its subject's.
        format: one of `records.FORMATS`.
        family: family name; "" when the folder does not say (see `families.detect`).
        lineage: all steps so far, the last one made this artifact.
        base: the source an adapter belongs to.
        source: what to load from: `str(model_path)`, a hub id, or "tiny".
        opened: how `source`, or of an adapter its `base`, is opened; its `name` is not read.
        sampling: how pictures are drawn with it, where it says so: a model of few steps draws itself in few.
        runtime: how its graphs are run, on the machine that it was measured on.
    """

    path: Path | None
    model_path: Path | None
    format: str
    family: str
    source: str
    lineage: tuple[Step, ...] = ()
    base: str | None = None
    opened: Source | None = None
    sampling: SamplingConfig | None = None
    runtime: RuntimeConfig | None = None
    recorded_hash: str | None = field(default=None, repr=False, compare=False)
    files: Mapping[str, Written] | None = field(default=None, repr=False, compare=False)
    """The model files as they were written; None where the record does not say."""
    made: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """See `provenance.made`; empty in records of before."""

    @property
    def model_source(self) -> Source:
        """What a family loads: the model itself or, of an adapter, its base.

        Raises:
            ArtifactError: an adapter that does not name its base.
        """
        if self.format != "adapter":
            return self._opened(self.source)
        if self.base is None:
            raise ArtifactError(
                "the adapter does not say which base it was trained on",
                where=self.source,
                hint="give the base, and this as its adapter; or merge: {base: ...}",
            )
        return self._opened(self.base)

    def in_variant(self, variant: str | None) -> Artifact:
        """The same, whose weights are read in a variant such as "fp16", or those of its base.

        Raises:
            ArtifactError: a format that has none.
        """
        if variant is None:
            return self
        if self.format not in ("torch", "adapter"):
            raise ArtifactError(
                f'the variant "{variant}" has no effect on a model in {self.format}: its files are one set',
                where=self.source,
            )
        return dataclasses.replace(
            self, opened=dataclasses.replace(self.opened or Source(""), variant=variant)
        )

    def with_base(self, base: str | None) -> Artifact:
        """The same, whose missing components are read from `base`: a single file of a transformer alone.

        Raises:
            ArtifactError: a format that is opened otherwise.
        """
        if base is None:
            return self
        if self.format != "torch":
            raise ArtifactError(
                f'the base "{base}" has no effect on a model in {self.format}',
                where=self.source,
                hint="it says where the other components of a single file of a transformer or U-Net are",
            )
        return dataclasses.replace(self, opened=dataclasses.replace(self.opened or Source(""), base=base))

    def _opened(self, name: str) -> Source:
        return dataclasses.replace(self.opened, name=name) if self.opened else Source(name)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the model files; of the name for a hub id."""
        if self.recorded_hash:
            return self.recorded_hash
        if self.model_path is None:
            return hashlib.sha256(f"{self.family}:{self.source}".encode()).hexdigest()
        return hash_files(self.model_path)

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of the model files; 0 for a hub id."""
        if self.model_path is None:
            return 0
        if self.model_path.is_file():
            return self.model_path.stat().st_size
        found = model_files(self.model_path, own=self.model_path == self.path)
        return sum(path.stat().st_size for path in found.values())

    @property
    def step(self) -> Step | None:
        """The step that made this artifact."""
        return self.lineage[-1] if self.lineage else None

    @property
    def made_for(self) -> tuple[str, int] | None:
        """The step that decided in how many sampling steps it is drawn, and how many; None where none did."""
        for step in reversed(self.lineage):
            decided = step.details.get(SAMPLED)
            steps = decided.get("steps") if isinstance(decided, dict) else None
            if isinstance(steps, int):
                return step.kind, steps
        return None

    def write(self) -> Artifact:
        """Writes `artifact.json` into `path`, with the hash; returns the artifact as it will be loaded.

        What others may see of it: home folders are written as `~`, and folders of data by their last part.
        """
        if self.path is None:
            raise ArtifactError(f'"{self.source}" is not a folder, so nothing can be recorded beside it')
        model = (
            None if self.model_path is None else Path(os.path.relpath(self.model_path, self.path)).as_posix()
        )
        opened = dataclasses.asdict(self.opened) if self.opened and self.opened.is_special else None
        files, whole = self._written()
        record = {
            "version": VERSION,
            "format": self.format,
            "family": self.family,
            "model": model,  # relative, so that a run folder can be moved
            "source": at_home(self.source) if model is None else None,
            "base": self.base if self.base is None else at_home(self.base),
            "opened": {key: public(opened[key]) for key in OPENED} if opened else None,
            "sampling": self.sampling.model_dump(mode="json", exclude_none=True) if self.sampling else None,
            **({"runtime": self.runtime.model_dump(mode="json", exclude_none=True)} if self.runtime else {}),
            "hash": whole,
            "files": {name: dataclasses.asdict(file) for name, file in files.items()} if files else None,
            "made": made(),
            "lineage": [public(dataclasses.asdict(step)) for step in self.lineage],
        }
        write_json(self.path / RECORD, record)
        return Artifact.load(self.path, check=False)

    def _written(self) -> tuple[Mapping[str, Written] | None, str]:
        """The model files as they are recorded, and the hash of all."""
        if self.model_path is None:
            return None, self.hash
        if self.recorded_hash is None:
            found = model_files(self.model_path, own=self.model_path == self.path)
            files = {name: Written.of(path) for name, path in found.items()}
            return files, _joined({name: bytes.fromhex(file.sha256) for name, file in files.items()})
        if self.files is None and self.model_path != self.path and (self.model_path / RECORD).is_file():
            subject = Artifact.load(self.model_path, check=False)  # of a step that only looks
            return subject.files if subject.hash == self.recorded_hash else None, self.recorded_hash
        return self.files, self.recorded_hash

    def check(self, *, thorough: bool = False) -> None:
        """Compares the model files with what was written.

        Sizes and time stamps first; content where a time stamp has changed, once for each such file, for that
        is remembered in the user's cache folder. Records of before have one hash for all files: they are read
        once, too. Files that were added are let be.

        Args:
            thorough: read all content, whatever the time stamps say.

        Raises:
            ArtifactError: naming the file that is missing, cut or changed.
        """
        root = self.model_path
        if root is None or self.recorded_hash is None or self.path is None:
            return
        if self.files is None:
            self._check_whole(root, thorough=thorough)
            return
        wrong = []
        for name, file in self.files.items():
            path = root if root.is_file() else root / name
            if not path.is_file():
                wrong.append(f"{name} is missing")
            elif problem := file.problem(path, thorough=thorough):
                wrong.append(f"{name} {problem}")
        if wrong:
            raise _changed(root, wrong)

    def _check_whole(self, root: Path, *, thorough: bool) -> None:
        stats = [(str(path.resolve()), path.stat()) for path in model_files(root).values()]
        key = [self.recorded_hash, [(path, found.st_size, found.st_mtime_ns) for path, found in stats]]
        if not thorough and _is_known(key):
            return
        if hash_files(root) != self.recorded_hash:
            raise _changed(root, ["its files are others (the record does not say which)"])
        _remember(key)

    @staticmethod
    def load(path: Path | str, *, check: bool = True) -> Artifact:
        """Reads `artifact.json` of a folder.

        Args:
            path: the folder.
            check: compare the model files with the record, see `Artifact.check`.

        Raises:
            ArtifactError: missing, damaged, newer than this tunekit, or pointing at a model that is gone or
                changed.
        """
        from tunekit.records import ArtifactRecord, read

        path = Path(path)
        file = path / RECORD
        try:
            record = read(file, ArtifactRecord)
        except FileNotFoundError as error:
            raise ArtifactError("not an artifact: artifact.json is missing", where=str(path)) from error
        model_path = None if record.model is None else Path(os.path.normpath(path / record.model))
        source = record.source if model_path is None else str(model_path)
        if source is None:
            raise _damaged(file, "it names neither a model nor a source")
        if model_path is not None and not _exists(model_path):
            raise ArtifactError(f"the model it points at is gone: {model_path}", where=str(file))
        files = {name: Written(**entry.model_dump()) for name, entry in (record.files or {}).items()}
        artifact = Artifact(
            path=path,
            model_path=model_path,
            format=record.format,
            family=record.family,
            source=source,
            lineage=tuple(Step(**step.plain()) for step in record.lineage),
            base=record.base,
            opened=_opened(record),
            sampling=_sampling(record.sampling, file),
            runtime=_runtime(record.runtime, file),
            recorded_hash=record.hash,
            files=files or None,
            made=record.made,
        )
        if check:
            artifact.check()
        return artifact


FILES = (
    *(".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".gguf", ".onnx"),
    *(".json", ".yaml", ".yml", ".txt", ".md", ".png", ".jpg", ".jpeg", ".webp", ".zip", ".tar"),
)
"""How names end that are meant as files, and not as a repository of the hub."""
OPENED = ("revision", "variant", "allow_pickle", "base")


def _damaged(file: Path, why: str) -> ArtifactError:
    return ArtifactError(f"{file.name} is damaged ({why})", where=str(file))


def _changed(root: Path, wrong: Sequence[str]) -> ArtifactError:
    shown = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    return ArtifactError(
        f"not as it was written: {shown}",
        where=str(root),
        hint="remove the folder and run again to make it anew; if it was changed on purpose, "
        f"`tunekit verify-files {root} --accept` takes it as it is",
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or one that no file can have
        return False


def _opened(record: ArtifactRecord) -> Source | None:
    """How the model is opened; version 1 has it in the settings of the training, of adapters alone."""
    from tunekit.records import OpenedRecord

    opened = record.opened
    if opened is None and record.version == 1 and record.format == "adapter" and record.lineage:
        settings = record.lineage[0].settings.get("model")
        with suppress(ValueError):
            opened = OpenedRecord.model_validate(settings)
    if opened is None:
        return None
    found = Source("", **opened.model_dump())
    return found if found.is_special else None


def _sampling(settings: Mapping[str, Any] | None, file: Path) -> SamplingConfig | None:
    if settings is None:
        return None
    from pydantic import ValidationError

    from tunekit.config import SamplingConfig  # pydantic, which `tunekit ls` does without
    from tunekit.records import first_problem

    try:
        return SamplingConfig.model_validate(settings)
    except ValidationError as error:
        raise _damaged(file, f"sampling.{first_problem(error)}") from error


def _runtime(settings: Mapping[str, Any] | None, file: Path) -> RuntimeConfig | None:
    if settings is None:
        return None
    from pydantic import ValidationError

    from tunekit.config import RuntimeConfig
    from tunekit.records import first_problem

    try:
        return RuntimeConfig.model_validate(settings)
    except ValidationError as error:
        raise _damaged(file, f"runtime.{first_problem(error)}") from error


# Run folders -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunFolder:
    """The names inside `runs/<name>/`."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON line per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of `step-000200/`."""
        return self.path / "checkpoints"

    @property
    def previews(self) -> Path:
        """Folder of `step-000200/*.png`."""
        return self.path / "previews"

    @property
    def adapter(self) -> Path:
        """The trained adapter."""
        return self.path / "adapter"

    @property
    def adapters(self) -> Path:
        """Folder of the adapters that were kept: `step-000200/`, `best/`, `last/`."""
        return self.path / "adapters"

    @property
    def best(self) -> Path:
        """The best weights so far, when all weights are trained and the best is kept."""
        return self.path / "best"

    @property
    def model(self) -> Path:
        """The trained model, when all weights were trained (`adapter: null`)."""
        return self.path / "model"

    @property
    def trials(self) -> Path:
        """Folder of the models that searches tried; each is a chain like that of a run."""
        return self.path / "search"

    @property
    def chain_file(self) -> Path:
        """The pass folders of the present chain, in order."""
        return self.path / "chain.json"

    @property
    def lock(self) -> Path:
        """Held by the process that writes into this folder, for as long as it lives."""
        return self.path / ".lock"

    def is_busy(self) -> bool:
        """Whether a process writes into this folder now; never on Windows, where there is no such lock."""
        try:
            import fcntl

            with self.lock.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except (ImportError, OSError):
            return False
        return False

    def pass_folder(self, index: int, kind: str, hash8: str) -> Path:
        """The folder of one step of the chain: `02-prune-1a2b3c4d`."""
        return self.path / f"{index:02d}-{kind}-{hash8}"

    def write_chain(self, folders: list[str]) -> None:
        """Records which pass folders make up the present chain; older ones may stand beside them."""
        write_json(self.chain_file, {"version": CHAIN_VERSION, "folders": folders})

    def passes(self) -> list[Path]:
        """The finished pass folders of the present chain, in order."""
        from tunekit.records import ChainRecord, read

        try:
            names = read(self.chain_file, ChainRecord).folders
        except FileNotFoundError:
            pattern = re.compile(r"\d\d-[a-z_0-9]+-[0-9a-f]{8}")
            names = sorted(path.name for path in self.path.glob("*") if pattern.fullmatch(path.name))
        return [self.path / name for name in names if (self.path / name / RECORD).is_file()]

    def trained(self) -> Path | None:
        """What training left: the adapter or the whole model; None while there is none."""
        return next((path for path in (self.adapter, self.model) if (path / RECORD).is_file()), None)

    def begun(self) -> bool:
        """Whether something has been learned already."""
        return self.trained() is not None or any(self.checkpoints.glob("step-*"))

    def folder_of(self, artifact: Artifact) -> str | None:
        """The folder in this run that has an artifact's model; None where it lies elsewhere."""
        if artifact.model_path is None:
            return None
        parts = Path(os.path.relpath(artifact.model_path, self.path)).parts
        return parts[0] if len(parts) == 1 and parts[0] != ".." else None

    def final(self, *, check: bool = True) -> Artifact:
        """The last finished step of the chain, else what training left.

        Args:
            check: compare the model files with the record.

        Raises:
            ArtifactError: when nothing is finished yet, or what there is is damaged.
        """
        passes = self.passes()
        last = passes[-1] if passes else self.trained()
        if last is None:
            raise ArtifactError(
                "this run has produced nothing yet",
                where=str(self.path),
                hint=f"start or continue it: tunekit run {self.config}",
            )
        return Artifact.load(last, check=check)


# Opening ---------------------------------------------------------------------------------------------------


def _safetensors_keys(path: Path) -> list[str]:
    """Tensor names out of the header, without reading a tensor."""
    from tunekit.records import parse

    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(100_000_000, path.stat().st_size):
                raise ValueError
            header = parse(file.read(length))
            if not isinstance(header, dict):
                raise ValueError
    except ValueError as error:
        raise ArtifactError("not a safetensors file, or truncated", where=str(path)) from error
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror}", where=str(path)) from error
    return [key for key in header if key != "__metadata__"]


_METHODS = (
    (r"\.hada_(w|t)", "a LoHa adapter"),
    (r"\.lokr_(w|t)", "a LoKr adapter"),
    (r"ip_adapter\.|(^|\.)image_proj\.|to_[kv]_ip\.", "an IP-Adapter"),
    (r"\.(oft_|boft_)", "an OFT adapter"),
    (r"\.ia3_l|\.on_input$", "an IA3 adapter"),
    (r"\.vera_lambda", "a VeRA adapter"),
    (r"\.[ab][12]\.weight$", "a GLoRA adapter"),
    (r"lora_embedding_[AB]", "an adapter of an embedding"),
    (
        r"(^|\.)(emb_params|string_to_(param|token))(\.|$)|^bundle_emb\.|^clip_[lg]$|^<[^>]+>$",
        "a textual inversion",
    ),
    (r"lora_controlnet|^control_model\.|controlnet_(down|mid|cond)", "a ControlNet"),
    (r"motion_modules\.", "a motion module of AnimateDiff"),
    (r"^adapter\.body\.", "a T2I-Adapter"),
)
_ADAPTERS = r"\.lora_|_lora\.|\.lora\.(up|down)|\.dora_|\.diff(_b)?$|\.[wb]_norm$"


def what_it_is(keys: Iterable[str]) -> str | None:
    """What a file of weights holds that is no model and no LoRA, by its keys: "a LoHa adapter"."""
    keys = list(keys)
    for marks, kind in _METHODS:
        if any(re.search(marks, key) for key in keys):
            return kind
    return None


def _is_adapter_file(path: Path) -> bool:
    return any(re.search(_ADAPTERS, key) for key in _safetensors_keys(path))


def _refuse_other(path: Path) -> None:
    """Say what a file is that is neither a model nor a LoRA: nothing could open it."""
    if kind := what_it_is(_safetensors_keys(path)):
        raise ArtifactError(
            f"holds {kind}, which cannot be opened",
            where=str(path),
            hint="a model is opened, or a LoRA or DoRA adapter of any program",
        )


def _checkpoint(path: Path) -> ArtifactError:
    """What to say of a state to continue from: which adapters of its run can be opened."""
    run = RunFolder(path.resolve().parent.parent)
    kept = [*run.adapters.glob("*"), run.adapter, run.model]
    named = [str(folder) for folder in sorted(kept) if (folder / RECORD).is_file()]
    same = [folder for folder in named if Path(folder).name == path.name]
    hint = f"take {(same or named)[0]}" if named else "let its run go on to the end"
    if len(named) > 1 and not same:
        hint = f"take one of {', '.join(named)}"
    return ArtifactError(
        "a checkpoint is a state to continue training from, and no adapter",
        where=str(path),
        hint=f"{hint}; train.save_every keeps adapters while a run trains",
    )


def _that_ended_well(artifact: Artifact) -> Artifact:
    """The artifact, unless the step that wrote its files found them wrong: they are kept for its figures.

    A step that only looked at a model says nothing against the files of that model's own step.
    """
    step = artifact.step
    failure = step.details.get("failure") if step else None
    if step is not None and failure and artifact.model_path == artifact.path:
        raise ArtifactError(
            f"{step.kind} ended with a failure, so this is no model to use: {failure}",
            where=artifact.source,
            hint="open the step before it, or change what it says and run the chain again",
        )
    return artifact


def _missing(source: str) -> ArtifactError:
    path = Path(source)
    siblings = (
        [str(path.parent / item.name) for item in path.parent.glob("*")] if path.parent.is_dir() else []
    )
    return ArtifactError(f'there is no "{source}"', hint=did_you_mean(source, siblings) or None)


def open_artifact(source: Path | str, *, family: str | None = None) -> Artifact:
    """Finds out what `source` is.

    Args:
        source: a run folder (its final artifact), a pass or adapter folder, an adapter file, a diffusers,
            ONNX or OpenVINO pipeline folder, a single checkpoint file, "builtin/...", "tiny", or a hub id.
        family: the family, where the folder does not say itself.

    Raises:
        ArtifactError: nothing there, or nothing that can be opened.
        ModelError: an unknown "builtin/..." name.
    """
    text = str(source)
    if text == "tiny":
        return Artifact(path=None, model_path=None, format="torch", family=family or "", source=text)
    path = builtin(text) or Path(text).expanduser()
    if not _exists(path):
        hub_id = not text.endswith(FILES) and re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", text)
        if isinstance(source, Path) or not hub_id or path.parent.is_dir():
            raise _missing(text)
        return Artifact(path=None, model_path=None, format="torch", family=family or "", source=text)

    def bare(kind: str) -> Artifact:
        return Artifact(path=path, model_path=path, format=kind, family=family or "", source=str(path))

    if path.is_file():
        if path.suffix == ".safetensors":
            if _is_adapter_file(path):
                return bare("adapter")
            _refuse_other(path)
            return bare("torch")
        if path.suffix in {".ckpt", ".bin", ".pt", ".pth"}:
            return bare("torch")  # refused by the family unless pickles are allowed
        if path.suffix == ".gguf":
            return bare("torch")
        raise ArtifactError("not a model file: expected .safetensors or .gguf", where=text)
    if (path / RECORD).is_file():
        return _that_ended_well(Artifact.load(path))
    if (path / "model_index.json").is_file():
        kinds = (kind for kind, file in GRAPHS.items() if any(path.glob(f"*/{file}")))
        return bare(next(kinds, "torch"))
    if (path / ADAPTER_FILE).is_file():
        return bare("adapter")
    if (path / "trainable.safetensors").is_file() and (path / "state.json").is_file():
        raise _checkpoint(path)
    run = RunFolder(path)
    if run.config.is_file() or run.trained() or run.passes():
        return _that_ended_well(run.final())
    adapters = [file for file in sorted(path.glob("*.safetensors")) if _is_adapter_file(file)]
    if len(adapters) == 1:
        return dataclasses.replace(bare("adapter"), model_path=adapters[0], source=str(adapters[0]))
    raise ArtifactError(
        "neither a run, an artifact, an adapter nor a diffusers folder",
        where=text,
        hint=f"looked for config.yaml, {RECORD}, model_index.json and {ADAPTER_FILE}",
    )
