from __future__ import annotations

import errno
import pickle

import pytest

from tunekit import errors, install
from tunekit.errors import (
    ConfigError,
    Interrupted,
    MissingPackageError,
    NonFiniteError,
    OutOfMemory,
    OutputError,
    TunekitError,
    VerificationFailed,
    did_you_mean,
    from_outside,
    missing,
    output_errors,
    require,
)


def test_message_names_place_and_change():
    error = ConfigError("unknown key", where="a.yaml:3", hint="remove it")
    assert str(error) == "a.yaml:3: unknown key\nremove it"
    assert str(ConfigError("unknown key")) == "unknown key"


def test_exit_codes():
    assert (ConfigError("").exit_code, Interrupted("").exit_code) == (2, 130)
    assert {kind("").exit_code for kind in (VerificationFailed, NonFiniteError, OutputError)} == {1}
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TunekitError)
    ]
    assert all(kind.__doc__ for kind in kinds)


def test_survives_pickling_between_processes():
    error = pickle.loads(pickle.dumps(ConfigError("what", where="here", hint="change")))
    assert str(error) == "here: what\nchange"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("rnk", 'did you mean "rank"?'), ("RANK", 'did you mean "rank"?'), ("zzz", "")],
)
def test_did_you_mean(name: str, expected: str):
    assert did_you_mean(name, ["rank", "alpha"]) == expected


def test_require_gives_the_line_that_installs():
    assert require("json", extra="onnx", why="x needs").__name__ == "json"
    with pytest.raises(MissingPackageError, match=r'Engines need the package "nopackage": .*\[tensorrt\]"'):
        require("nopackage.inner", extra="tensorrt", why="Engines need")
    assert missing("json", extra="onnx", why="x needs") is None
    said = missing("nopackage.inner", extra="tensorrt", why="Engines need")
    assert str(said) == f'Engines need the package "nopackage": {install.with_extra("tensorrt")}'


def test_require_does_not_call_a_broken_package_absent(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import a_part_it_lacks")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_part_it_lacks"):
        require("broken_package", extra="onnx", why="x needs")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.EROFS, "Read-only file system"),
        RuntimeError("safetensors: Io(Os { code: 28, message: No space left on device })"),
        OSError(errno.ESTALE, "Stale file handle", "runs/.x.tmp-1/a"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "runs/.x.tmp-1"),
    ],
)
def test_output_errors_name_the_path(error: Exception):
    with pytest.raises(OutputError, match=r"runs/x: could not write") as caught, output_errors("runs/x"):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("something else"),
        FileNotFoundError(errno.ENOENT, "No such file"),
        FileNotFoundError(errno.ENOENT, "No such file", "photos/a.png"),
        RuntimeError("CUDA out of memory."),
    ],
)
def test_output_errors_leave_others_alone(error: Exception):
    with pytest.raises(type(error)) as caught, output_errors("runs/x"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_memory_that_runs_out_while_writing_names_the_path(error: Exception):
    with pytest.raises(OutOfMemory, match="runs/x: memory ran out while"), output_errors("runs/x"):
        raise error


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (MemoryError(), OutOfMemory, "memory ran out"),
        (RuntimeError("could not create a primitive"), OutOfMemory, "could not create a primitive"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8"),
            OutOfMemory,
            "allocate",
        ),
        (
            OSError(errno.EIO, "Input/output error", "a/.b.tmp-7/c"),
            OutputError,
            "a/b/c: could not be read or",
        ),
        (
            OSError(errno.EMFILE, "Too many open files", "a/.b.c.old-7"),
            OutputError,
            "a/b.c: could not be read",
        ),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), OutputError, "reset by peer"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), OutputError, "whoever read the output has gone"),
        (RuntimeError("PytorchStreamWriter failed: file write failed"), OutputError, "input/output error"),
    ],
)
def test_errors_of_the_system_become_messages(error: Exception, kind: type, text: str):
    told = from_outside(error)
    assert type(told) is kind and text in str(told) and told.exit_code == 1


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), RuntimeError("mat1 and mat2"), KeyError("x")])
def test_bugs_stay_bugs(error: Exception):
    assert from_outside(error) is None
