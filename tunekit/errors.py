"""Errors that name what was wrong, where, and what to change."""

from __future__ import annotations

import difflib
import errno
import importlib.util
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from tunekit import install


class TunekitError(Exception):
    """Something the user can act on; the command prints it without a traceback.

    Args:
        message: what was wrong, in one sentence.
        where: `file:line`, a path, or "command line".
        hint: what to change, as a line of its own.
        key: dotted key of the config that it is about.
        parts: what `message` lists, where that are several things.
    """

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        key: str = "",
        parts: Sequence[TunekitError] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint
        self.key = key
        self.parts = tuple(parts)

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\n{self.hint}" if self.hint else text


class ConfigError(TunekitError):
    """A key, value or override of the configuration."""


class ChainError(ConfigError):
    """An `optimize:` list that cannot run in this order."""


class DataError(TunekitError):
    """Pictures or captions."""


class ModelError(TunekitError):
    """A base model that is missing, broken or refused."""


class AdapterError(TunekitError):
    """An adapter that does not fit its base."""


class ArtifactError(TunekitError):
    """A run, artifact or folder that is missing or not what it should be."""


class ResumeError(TunekitError):
    """A checkpoint that does not belong to this configuration."""


class DeviceError(TunekitError):
    """A device or provider that does not answer."""


class DoesNotFit(DeviceError):
    """A job needs more memory than the device has, however it is arranged."""


class OutOfMemory(TunekitError):
    """Memory ran out while training."""

    exit_code = 1
    replan = False
    """Whether the run can be started again, with a plan for less memory."""


class MissingPackageError(TunekitError):
    """An optional package that is not installed."""


class VerificationFailed(TunekitError):
    """An artifact is further from its reference than its thresholds allow."""

    exit_code = 1


class NonFiniteError(TunekitError):
    """A loss, gradient or latent became NaN or infinite."""

    exit_code = 1


class OutputError(TunekitError):
    """The output could not be written: disk full, quota, read-only or no permission."""

    exit_code = 1


class Interrupted(TunekitError):
    """Stopped by SIGTERM or Ctrl-C, after a checkpoint."""

    exit_code = 130


def nearest(name: str, choices: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The choice nearest to `name`; None if none is near: from 0, any, to 1, the same but for the case."""
    by_lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(name[:100].lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[found[0]] if found else None


_OUT_OF_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "could not create a primitive",
    "could not create a memory object",
    "bad_alloc",
    "out of memory",
)
"""What allocators in native code (torch, oneDNN, CUDA) say."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Returns `did you mean "x"?` for the choice nearest to `name`, or an empty string."""
    found = nearest(name, choices)
    return f'did you mean "{found}"?' if found else ""


def missing(module: str, *, extra: str, why: str) -> MissingPackageError | None:
    """The error of `require` for a module that is not installed, found without importing it; else None."""
    package = module.partition(".")[0]
    return None if importlib.util.find_spec(package) else _missing(package, extra, why)


def _missing(package: str, extra: str, why: str) -> MissingPackageError:
    return MissingPackageError(f'{why} the package "{package}": {install.with_extra(extra)}')


def require(module: str, *, extra: str, why: str) -> ModuleType:
    """Imports an optional module.

    Args:
        module: dotted module name.
        extra: the extra of tunekit that installs it.
        why: what needs it, as the beginning of a sentence ("TensorRT engines need").

    Raises:
        MissingPackageError: when it is not installed, with the line that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A package that is there but lacks one of its own parts must not be reported as absent.
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise
        raise _missing(module.partition(".")[0], extra, why) from error


FULL = ("no space left on the disk", "the disk quota is used up")
"""What is said of a disk with no room."""
_OUTPUT_ERRNOS = {
    errno.ENOSPC: FULL[0],
    errno.EDQUOT: FULL[1],
    errno.EFBIG: "the file would be larger than allowed here",
    errno.EACCES: "no permission to write there",
    errno.EPERM: "no permission to write there",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the disk reported an input/output error",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a file of that name is in the way",
}
# Writers in native code (safetensors, torch, protobuf) keep the errno only in their message.
_OUTPUT_TEXTS = {
    "no space left on device": errno.ENOSPC,
    "disk quota exceeded": errno.EDQUOT,
    "file too large": errno.EFBIG,
    "permission denied": errno.EACCES,
    "read-only file system": errno.EROFS,
    "input/output error": errno.EIO,
    "file write failed": errno.EIO,
    "iostream error": errno.EIO,  # of OpenVINO, which does not say why
    "unexpected pos": errno.ENOSPC,
}


def _output_errno(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno in _OUTPUT_ERRNOS:
        return error.errno
    text = str(error).lower()
    return next((number for words, number in _OUTPUT_TEXTS.items() if words in text), None)


@contextmanager
def output_errors(path: Path | str) -> Iterator[None]:
    """Turns errors of the system while `path` is written, from Python or native writers, into an OutputError.

    Raises:
        OutOfMemory: there was no memory to write it with.
    """
    try:
        yield
    except TunekitError:
        raise
    except Exception as error:
        if is_out_of_memory(error) and not isinstance(error, RuntimeError):
            raise OutOfMemory("memory ran out while it was written", where=str(path)) from error
        number = _output_errno(error)
        if number is None and not (isinstance(error, OSError) and _concerns(error, Path(path))):
            raise
        raise OutputError(
            f"could not write: {_why(error)}",
            where=str(path),
            hint="nothing half-written was left; free some space or choose another folder, then run again",
        ) from error


def _why(error: BaseException) -> str:
    number = _output_errno(error)
    if number is not None:
        return _OUTPUT_ERRNOS[number]
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().partition("\n")[0]


def _concerns(error: OSError, path: Path) -> bool:
    """Whether an error is about something beside or below `path`, and not what was read meanwhile."""
    name = error.filename
    return isinstance(name, str) and Path(name).absolute().is_relative_to(path.absolute().parent)


_TEMPORARY = re.compile(r"\.(.+)\.(?:tmp|old)(?:-\d+)?")


def from_outside(error: BaseException) -> TunekitError | None:
    """What an error of the system, or of an allocator, says to who runs a command; None for any other.

    Paths are those that a file has once it is whole.
    """
    if is_out_of_memory(error):
        said = _why(error)
        return OutOfMemory(
            f"memory ran out ({said})" if said != "MemoryError" else "memory ran out",
            hint="close other programs, or use less: memory.budget=auto plans a training that fits",
        )
    if not isinstance(error, OSError) and _output_errno(error) is None:
        return None
    if isinstance(error, BrokenPipeError):
        return OutputError("whoever read the output has gone", hint="send it to a file instead: ... > log")
    name = error.filename if isinstance(error, OSError) else None
    where = None
    if isinstance(name, str):
        where = str(Path(*(match[1] if (match := _TEMPORARY.fullmatch(p)) else p for p in Path(name).parts)))
    return OutputError(
        f"could not be read or written: {_why(error)}" if where else f"the system says: {_why(error)}",
        where=where,
        hint="what is finished stays; set TUNEKIT_DEBUG=1 to see where in the program it happened",
    )
