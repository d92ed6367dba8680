"""Artifacts: plain folders other tools can load, with `artifact.json` in them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit import install
from tunekit.errors import ArtifactError, did_you_mean
from tunekit.files import (
    atomic_folder,
    clean_leftovers,
    directory_size,
    remove_folder,
    write_json,
    write_text,
)
from tunekit.resources import Source, builtin

if TYPE_CHECKING:
    from tunekit.config import SamplingConfig

__all__ = [
    "ADAPTER_FILE",
    "FORMATS",
    "PICTURES",
    "RECORD",
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
FORMATS = ("adapter", "torch", "onnx", "tensorrt")
RECORD = "artifact.json"
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
PICTURES = "pictures"
"""Folder inside an artifact for the pictures of its step; no part of the model, so not hashed."""

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


def hash_files(root: Path) -> str:
    """SHA-256 over names and contents of the model files under `root` (or of the one file)."""
    digest = hashlib.sha256()
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    for path in files:
        name = path.name if path == root else path.relative_to(root).as_posix()
        parts = name.split("/")
        if name == RECORD or parts[0] == PICTURES or any(part.startswith(".") for part in parts):
            continue
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
        digest.update(len(name).to_bytes(4, "big") + name.encode() + content)
    return digest.hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A model or adapter on disk (or on the hub) and how it came to be.

    Attributes:
        path: folder of `artifact.json`, or the bare folder or file; None for a hub id or "tiny".
        model_path: where the model files are; a step that changes nothing points at its subject's.
        format: one of `FORMATS`.
        family: family name; "" when the folder does not say (see `families.detect`).
        lineage: all steps so far, the last one made this artifact.
        base: the source an adapter belongs to.
        source: what to load from: `str(model_path)`, a hub id, or "tiny".
        opened: how `source`, or of an adapter its `base`, is opened; its `name` is not read.
        sampling: how pictures are drawn with it, where it says so: a model of few steps draws itself in few.
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
    recorded_hash: str | None = field(default=None, repr=False, compare=False)

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
        size = directory_size(self.model_path)
        for extra in (self.model_path / RECORD, self.model_path / PICTURES):
            if extra.is_file():
                size -= extra.stat().st_size
            elif extra.is_dir():
                size -= directory_size(extra)
        return size

    @property
    def step(self) -> Step | None:
        """The step that made this artifact."""
        return self.lineage[-1] if self.lineage else None

    def write(self) -> Artifact:
        """Writes `artifact.json` into `path`, with the hash; returns the artifact as it will be loaded."""
        if self.path is None:
            raise ArtifactError(f'"{self.source}" is not a folder, so nothing can be recorded beside it')
        model = (
            None if self.model_path is None else Path(os.path.relpath(self.model_path, self.path)).as_posix()
        )
        opened = dataclasses.asdict(self.opened) if self.opened and self.opened.is_special else None
        record = {
            "version": VERSION,
            "format": self.format,
            "family": self.family,
            "model": model,  # relative, so that a run folder can be moved
            "source": self.source if model is None else None,
            "base": self.base,
            "opened": {key: opened[key] for key in OPENED} if opened else None,
            "sampling": self.sampling.model_dump(mode="json", exclude_none=True) if self.sampling else None,
            "hash": self.hash,
            "lineage": [dataclasses.asdict(step) for step in self.lineage],
        }
        write_json(self.path / RECORD, record)
        return Artifact.load(self.path)

    @staticmethod
    def load(path: Path | str) -> Artifact:
        """Reads `artifact.json` of a folder.

        Raises:
            ArtifactError: missing, damaged, newer than this tunekit, or pointing at a model that is gone.
        """
        path = Path(path)
        file = path / RECORD
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            version = int(record["version"])
            if version > VERSION:
                raise ArtifactError(
                    f"written by a newer tunekit (version {version}, this one knows {VERSION})",
                    where=str(file),
                    hint=install.newer(),
                )
            if record["format"] not in FORMATS:
                raise ValueError(f'unknown format "{record["format"]}"')
            model_path = None if record["model"] is None else Path(os.path.normpath(path / record["model"]))
            artifact = Artifact(
                path=path,
                model_path=model_path,
                format=record["format"],
                family=record["family"],
                source=record["source"] if model_path is None else str(model_path),
                lineage=tuple(Step(**step) for step in record["lineage"]),
                base=record["base"],
                opened=_opened(record),
                sampling=_sampling(record.get("sampling")),
                recorded_hash=record["hash"],
            )
        except FileNotFoundError as error:
            raise ArtifactError("not an artifact: artifact.json is missing", where=str(path)) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"artifact.json is damaged ({error})", where=str(file)) from error
        if model_path is not None and not model_path.exists():
            raise ArtifactError(f"the model it points at is gone: {model_path}", where=str(file))
        return artifact


OPENED = ("revision", "variant", "allow_pickle")


def _opened(record: dict[str, Any]) -> Source | None:
    """How the model is opened; version 1 has it in the settings of the training, of adapters alone."""
    opened = record.get("opened")
    if opened is None and int(record["version"]) == 1 and record["format"] == "adapter" and record["lineage"]:
        opened = record["lineage"][0]["settings"].get("model")
    if not opened:
        return None
    found = Source("", **{key: opened[key] for key in OPENED if key in opened})
    return found if found.is_special else None


def _sampling(record: Any) -> SamplingConfig | None:
    if record is None:
        return None
    from tunekit.config import SamplingConfig  # pydantic, which `tunekit ls` does without

    return SamplingConfig.model_validate(record)


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
    def model(self) -> Path:
        """The trained model, when all weights were trained (`adapter: null`)."""
        return self.path / "model"

    @property
    def chain_file(self) -> Path:
        """The pass folders of the present chain, in order."""
        return self.path / "chain.json"

    def pass_folder(self, index: int, kind: str, hash8: str) -> Path:
        """The folder of one step of the chain: `02-prune-1a2b3c4d`."""
        return self.path / f"{index:02d}-{kind}-{hash8}"

    def write_chain(self, folders: list[str]) -> None:
        """Records which pass folders make up the present chain; older ones may stand beside them."""
        write_json(self.chain_file, {"version": CHAIN_VERSION, "folders": folders})

    def passes(self) -> list[Path]:
        """The finished pass folders of the present chain, in order."""
        try:
            names = json.loads(self.chain_file.read_text(encoding="utf-8"))["folders"]
        except FileNotFoundError:
            pattern = re.compile(r"\d\d-[a-z_0-9]+-[0-9a-f]{8}")
            names = sorted(path.name for path in self.path.glob("*") if pattern.fullmatch(path.name))
        except (ValueError, KeyError) as error:
            raise ArtifactError(f"chain.json is damaged ({error})", where=str(self.chain_file)) from error
        return [self.path / name for name in names if (self.path / name / RECORD).is_file()]

    def trained(self) -> Path | None:
        """What training left: the adapter or the whole model; None while there is none."""
        return next((path for path in (self.adapter, self.model) if (path / RECORD).is_file()), None)

    def final(self) -> Artifact:
        """The last finished step of the chain, else what training left.

        Raises:
            ArtifactError: when nothing is finished yet.
        """
        passes = self.passes()
        last = passes[-1] if passes else self.trained()
        if last is None:
            raise ArtifactError(
                "this run has produced nothing yet",
                where=str(self.path),
                hint=f"start or continue it: tunekit run {self.config}",
            )
        return Artifact.load(last)


# Opening ---------------------------------------------------------------------------------------------------


def _safetensors_keys(path: Path) -> list[str]:
    """Tensor names out of the header, without reading a tensor."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(100_000_000, path.stat().st_size):
            raise ArtifactError("not a safetensors file, or truncated", where=str(path))
        try:
            return [key for key in json.loads(file.read(length)) if key != "__metadata__"]
        except ValueError as error:
            raise ArtifactError("not a safetensors file, or truncated", where=str(path)) from error


def _is_adapter_file(path: Path) -> bool:
    return any(".lora_" in key or ".dora_" in key for key in _safetensors_keys(path))


def _missing(source: str) -> ArtifactError:
    path = Path(source)
    siblings = (
        [str(path.parent / item.name) for item in path.parent.glob("*")] if path.parent.is_dir() else []
    )
    return ArtifactError(f'there is no "{source}"', hint=did_you_mean(source, siblings) or None)


def open_artifact(source: Path | str, *, family: str | None = None) -> Artifact:
    """Finds out what `source` is.

    Args:
        source: a run folder (its final artifact), a pass or adapter folder, an adapter file, a diffusers or
            ONNX pipeline folder, a single checkpoint file, "builtin/...", "tiny", or a hub id.
        family: the family, where the folder does not say itself.

    Raises:
        ArtifactError: nothing there, or nothing that can be opened.
        ModelError: an unknown "builtin/..." name.
    """
    text = str(source)
    if text == "tiny":
        return Artifact(path=None, model_path=None, format="torch", family=family or "", source=text)
    path = builtin(text) or Path(text).expanduser()
    if not path.exists():
        hub_id = re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", text)
        if isinstance(source, Path) or not hub_id or path.parent.is_dir():
            raise _missing(text)
        return Artifact(path=None, model_path=None, format="torch", family=family or "", source=text)

    def bare(kind: str) -> Artifact:
        return Artifact(path=path, model_path=path, format=kind, family=family or "", source=str(path))

    if path.is_file():
        if path.suffix == ".safetensors":
            return bare("adapter" if _is_adapter_file(path) else "torch")
        if path.suffix in {".ckpt", ".bin", ".pt", ".pth"}:
            return bare("torch")  # refused by the family unless pickles are allowed
        raise ArtifactError("not a model file: expected .safetensors", where=text)
    if (path / RECORD).is_file():
        return Artifact.load(path)
    if (path / "model_index.json").is_file():
        return bare("onnx" if any(path.glob("*/model.onnx")) else "torch")
    if (path / ADAPTER_FILE).is_file():
        return bare("adapter")
    run = RunFolder(path)
    if run.config.is_file() or run.trained() or run.passes():
        return run.final()
    adapters = [file for file in sorted(path.glob("*.safetensors")) if _is_adapter_file(file)]
    if len(adapters) == 1:
        return dataclasses.replace(bare("adapter"), model_path=adapters[0], source=str(adapters[0]))
    raise ArtifactError(
        "neither a run, an artifact, an adapter nor a diffusers folder",
        where=text,
        hint=f"looked for config.yaml, {RECORD}, model_index.json and {ADAPTER_FILE}",
    )
