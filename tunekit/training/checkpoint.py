"""Resumable training state: whole or absent, and refused by a run that would learn something else.

A checkpoint is `checkpoints/step-000200/` with

    trainable.safetensors   every trained parameter by its name in the denoiser
    optimizer.pt            the optimizer's state_dict
    task.safetensors        what the task itself remembers, where it remembers something
    state.json              step, gradient scaler, figures so far, and what the run is (`identity`)

There is no random state and no data position in it beside the step: every draw is a function of (seed, step)
    or
(seed, epoch, sample id), and the learning rate is a function of the step.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunekit import optimizers, ranks
from tunekit.artifacts import RunFolder, atomic_folder, clean_leftovers, remove_folder, write_json
from tunekit.config import ObjectiveConfig, TrainingRunConfig
from tunekit.config.run import FREE
from tunekit.data.samples import Indexed, Sample
from tunekit.errors import ArtifactError, ResumeError, output_errors
from tunekit.kept import Kept
from tunekit.provenance import public
from tunekit.records import StateRecord, read

VERSION = 1
REMEDY = "remove this folder to continue from the one before it"
_NAME = re.compile(r"step-(\d{6,})")
_LOCK_SECONDS = 30.0

BASE, INITIAL, MASKS = "model (its weights)", "adapter.init (its weights)", "adapter.dropout (its masks)"
DATA, CLASS = "data (its pictures or captions)", "data.class_path (its pictures)"
LATER = (BASE, MASKS, CLASS)
"""Parts of an identity that runs of before lack, and that are not always known: compared where both are."""
STEPS = "train.max_steps"


def identity(
    config: TrainingRunConfig, samples: Iterable[Sample], known: Mapping[str, str | None] | None = None
) -> dict[str, Any]:
    """What must not change between the lives of a run: the keys that matter to learning, and the pictures.

    With a constant schedule the learning rate does not depend on `train.max_steps`; else it is kept, for it
    may grow (see `compare_identities`) and not shrink.

    Args:
        known: hashes of weights by `BASE` and `INITIAL`, of pictures by `CLASS`, as far as there are any.

    Returns:
        Dotted key -> JSON-able value.
    """
    flat = flatten(config.model_dump(mode="json"))
    free = [*FREE, STEPS] if config.train.schedule == "constant" else list(FREE)
    kept = {
        key: value
        for key, value in flat.items()
        if not any(key == name or key.startswith(name + ".") for name in free)
    }
    for key, usual in (
        ("memory.base_precision", "same"),
        ("memory.optimizer_in_backward", False),
        ("memory.encode_precision", "fp32"),
        ("model.base", None),
    ):
        kept[key] = kept.get(key) or usual
        if kept[key] == usual:
            del kept[key]  # as in runs from before there was a choice
    kept["train.optimizer"] = optimizers.find(config.train.optimizer).name
    for name, default in ObjectiveConfig().model_dump(mode="json").items():
        if kept.get(f"objective.{name}") == default:
            del kept[f"objective.{name}"]  # as in runs from before there was a choice
    kept["train.snr_gamma"] = kept.pop("objective.snr_gamma", None)  # its name in runs of before
    later = {key: value for key, value in (known or {}).items() if value is not None}
    if config.adapter is not None and config.adapter.dropout:
        later[MASKS] = "by sample"
    return {**kept, **later, DATA: pictures_hash(samples)}


def pictures_hash(samples: Iterable[Sample]) -> str:
    """Hash of pictures and captions, in their order."""
    if isinstance(samples, Indexed):
        return samples.digest
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        digest.update(json.dumps([sample.id, sample.content, sample.caption]).encode())
    return digest.hexdigest()


def weights_hash(files: Iterable[Path]) -> str | None:
    """Hash of what files hold, in their order; None without files.

    A file's hash is remembered in the user's cache folder for as long as its size and times stay.
    """
    hashes = [_file_hash(file) for file in files]
    return hashlib.blake2b("".join(hashes).encode(), digest_size=16).hexdigest() if hashes else None


def _file_hash(file: Path) -> str:
    stat, kept = file.stat(), Kept.of("files")
    seen = [str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    name = hashlib.blake2b(json.dumps(seen).encode(), digest_size=16).hexdigest()
    known = kept.read(name)
    if isinstance(known, str):
        return known
    with file.open("rb") as content:
        made = hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    kept.write(name, made)
    return made


@dataclass(frozen=True)
class Saved:
    """A checkpoint read back."""

    step: int
    trainable: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]
    """`state.json`: step, scaler, seconds, metrics ..."""
    task: dict[str, Tensor] = field(default_factory=dict)
    """What the task remembers beside the weights."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        folder: `runs/<name>/checkpoints`.
        identity: what this run learns, see `identity`.
        keep: how many of the newest stay.
        changes: what differs from the run before, in words, by key of the identity, as far as it is known.
    """

    folder: Path
    identity: Mapping[str, Any]
    keep: int = 2
    changes: Mapping[str, str] = field(default_factory=dict)

    def newest(self) -> Path | None:
        """The newest whole checkpoint."""
        found = {
            int(match[1]): path
            for path in self.folder.glob("step-*")
            if (match := _NAME.fullmatch(path.name))
        }
        whole = [step for step, path in found.items() if (path / "state.json").is_file()]
        return found[max(whole)] if whole else None

    def save(
        self,
        trainable: Mapping[str, Tensor],
        optimizer: Mapping[str, Any],
        state: Mapping[str, Any],
        *,
        task: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Write the checkpoint of `state["step"]`, then remove the oldest beyond `keep`.

        Raises:
            OutputError: it could not be written; nothing of it is left, older ones are untouched.
        """
        final = self.folder / f"step-{state['step']:06d}"
        with ranks.saving(), atomic_folder(final) as folder:
            for name, held in (("trainable", trainable), ("task", task or {})):
                tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in held.items()}
                if tensors or name == "trainable":
                    save_file(tensors, folder / f"{name}.safetensors")
            with (folder / "optimizer.pt").open("wb") as file:  # torch's own writer hides why it failed
                torch.save(dict(optimizer), file)
            write_json(folder / "state.json", {"version": VERSION, **state, "identity": dict(self.identity)})
        ranks.remember(final)
        steps = sorted(path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name))
        for old in [path for path in steps if path != final][: max(0, len(steps) - self.keep)]:
            remove_folder(old)
        return final

    def check(self) -> Mapping[str, Any] | None:
        """Return the identity in the newest checkpoint; None without one.

        Raises:
            ResumeError: it was made by a run that learns something else.
        """
        path = self.newest()
        if path is None:
            return None
        saved: Mapping[str, Any] = self._state(path)["identity"]
        return saved

    def load(self) -> Saved | None:
        """Read the newest whole checkpoint; None when there is none.

        Raises:
            ResumeError: it was made by a run that learns something else (names the keys), or it is damaged.
        """
        if not self.folder.is_dir():
            return None
        clean_leftovers(self.folder)
        path = self.newest()
        if path is None:
            return None
        state = self._state(path)
        try:
            trainable = load_file(path / "trainable.safetensors")
            optimizer = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
            own = path / "task.safetensors"
            task = load_file(own) if own.is_file() else {}
        except MemoryError:
            raise
        except Exception as error:  # what torch's reader makes of a damaged file has a dozen names
            raise _damaged(path, error) from error
        if not isinstance(optimizer, dict):
            raise _damaged(path, TypeError("optimizer.pt holds no state of an optimizer"))
        return Saved(int(state["step"]), trainable, optimizer, state, task)

    def _state(self, path: Path) -> dict[str, Any]:
        """`state.json`, once it is known to belong to this run."""
        try:
            state = read(path / "state.json", StateRecord)
        except (ArtifactError, FileNotFoundError) as error:
            raise _damaged(path, getattr(error, "message", error)) from error
        if state.version != VERSION:
            raise ResumeError(
                f"in version {state.version} of the format, this tunekit reads {VERSION}", where=str(path)
            )
        compare_identities(state.identity, self.identity, path, self.changes)
        figures = {name: value for name, value in state.metrics.items() if value is not None}
        return {**state.model_dump(), "metrics": figures}


def _damaged(path: Path, error: object) -> ResumeError:
    return ResumeError(f"the checkpoint is damaged ({error})", where=str(path), hint=REMEDY)


def compare_identities(
    saved: Mapping[str, Any], now: Mapping[str, Any], path: Path, changes: Mapping[str, str] | None = None
) -> None:
    """Refuse to continue `path`, made by a run that learned something else.

    `train.max_steps` may grow under any schedule: steps that were made keep the learning rates they had, and
    those to come follow the curve of the new length.

    Args:
        changes: what differs, in words, by key; without, both values are shown.

    Raises:
        ResumeError: naming the keys that differ.
    """
    saved, now = public(dict(saved)), public(dict(now))  # as artifact.json has them
    changed = sorted(
        key
        for key in {*saved, *now}
        if saved.get(key) != now.get(key)
        and not (key in LATER and (key not in saved or key not in now))
        and not (key == STEPS and key in saved and key in now and saved[key] < now[key])
    )
    if not changed:
        return
    known = changes or {}
    lines = "\n".join(
        f"  {key}: {known.get(key) or f'{_shown(saved, key)} then, {_shown(now, key)} now'}"
        for key in changed
    )
    raise ResumeError(
        f"cannot continue, the configuration has changed since:\n{lines}",
        where=str(path),
        hint="set it back, give the run another name (name=...), or remove its folder to start afresh",
    )


def _shown(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    hashed = key in (BASE, INITIAL, DATA, CLASS)
    return f"{str(value)[:8]}..." if hashed else json.dumps(value)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@contextmanager
def only_writer(folder: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold the run folder for this process, so that two runs of one name never write into each other.

    The lock is the kernel's: it goes when the process does, however it ends.

    Raises:
        ArtifactError: another process still holds it after half a minute (one that was told to stop may be
            saving).
    """
    try:
        import fcntl
    except ImportError:  # Windows has no flock; runs there are on their honour
        yield
        return
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = RunFolder(folder).lock.open("a")
    with file:
        until = time.monotonic() + _LOCK_SECONDS
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise ArtifactError(
                        "another process is writing to this run folder",
                        where=str(folder),
                        hint="wait for it, stop it, or give this run another name (name=...)",
                    ) from None
                if not waiting:
                    say(f"waiting for another process to leave {folder}")
                    waiting = True
                time.sleep(0.2)
        yield
