"""Files and folders are whole or absent, and the umask decides who may read them."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tunekit import files
from tunekit.errors import OutputError
from tunekit.files import (
    atomic_file,
    atomic_folder,
    clean_leftovers,
    directory_size,
    json_text,
    remove_folder,
    write_json,
    write_text,
)

Fill = Callable[..., Path]


def test_atomic_folder_appears_when_whole(fill: Fill, tmp_path: Path):
    final = tmp_path / "deep" / "x"
    with atomic_folder(final) as folder:
        fill(folder, a="1", sub__b="2")
        assert not final.exists()
    assert (final / "sub" / "b").read_text() == "2"
    assert os.listdir(final.parent) == ["x"]


def test_atomic_folder_leaves_nothing_when_the_block_fails(fill: Fill, tmp_path: Path):
    with pytest.raises(ValueError, match="boom"), atomic_folder(tmp_path / "x") as folder:
        fill(folder, a="1")
        raise ValueError("boom")
    assert os.listdir(tmp_path) == []


def test_atomic_folder_replaces_only_with_something_whole(fill: Fill, tmp_path: Path):
    final = fill(tmp_path / "x", old="1")
    with pytest.raises(KeyboardInterrupt), atomic_folder(final) as folder:
        fill(folder, new="2")
        raise KeyboardInterrupt
    assert os.listdir(final) == ["old"]
    with atomic_folder(final) as folder:
        fill(folder, new="2")
    assert os.listdir(final) == ["new"]
    assert os.listdir(tmp_path) == ["x"]


def test_killed_in_the_middle_leaves_nothing_that_looks_whole(tmp_path: Path):
    code = (
        "import sys, time; from pathlib import Path; from tunekit.artifacts import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1]) / 'x') as folder:\n"
        "    (folder / 'a').write_text('1'); print('in', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    assert clean_leftovers(tmp_path) == []  # its maker is alive
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "x").exists()
    assert [path.name for path in clean_leftovers(tmp_path)] == [f".x.tmp-{process.pid}"]
    assert os.listdir(tmp_path) == []


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_bring_back_what_was_being_replaced(fill: Fill, tmp_path: Path):
    pid = dead_pid()
    fill(tmp_path / f".x.old-{pid}", a="1")
    fill(tmp_path / f".y.old-{pid}", a="old")
    fill(tmp_path / "y", a="new")
    fill(tmp_path / ".hidden", a="mine")
    (tmp_path / f".z.json.tmp-{pid}").write_text("{")
    clean_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "x", "y"]
    assert (tmp_path / "y" / "a").read_text() == "new"


LIMITED = """\
import resource, signal, sys
from pathlib import Path
from tunekit.artifacts import atomic_folder, write_json
from tunekit.errors import OutputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)   # then writing fails as on a full disk
root = Path(sys.argv[1])
write_json(root / "kept.json", {"old": True})
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
def folder():
    with atomic_folder(root / "x") as temporary:
        (temporary / "small").write_bytes(b"1")
        (temporary / "large").write_bytes(b"1" * 100_000)
def tensors():
    import numpy
    from safetensors.numpy import save_file
    with atomic_folder(root / "x") as temporary:
        save_file({"a": numpy.zeros(100_000)}, temporary / "a.safetensors")
def record():
    write_json(root / "kept.json", list(range(100_000)))
for write in (folder, tensors, record):
    try:
        write()
    except OutputError as error:
        print(error.exit_code, str(error).splitlines()[0])
"""


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path):
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    lines = run.stdout.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"1 {tmp_path}/x: could not write: ")
    assert lines[2].startswith(f"1 {tmp_path}/kept.json: could not write: ")
    assert os.listdir(tmp_path) == ["kept.json"]
    assert json.loads((tmp_path / "kept.json").read_text()) == {"old": True}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_no_space_left_while_syncing(fill: Fill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        with open("/dev/full", "wb", buffering=0) as device:
            device.write(b"1")  # the kernel's own ENOSPC

    monkeypatch.setattr(files.os, "fsync", full)
    with (
        pytest.raises(OutputError, match="no space left on the disk"),
        atomic_folder(tmp_path / "x") as folder,
    ):
        fill(folder, a="1")
    with pytest.raises(OutputError, match="no space left on the disk"):
        write_text(tmp_path / "a.txt", "1")
    assert os.listdir(tmp_path) == []


def test_an_unwritable_place(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"file/x: could not write"), atomic_folder(tmp_path / "file" / "x"):
        pass
    with pytest.raises(OutputError, match="could not write"):
        write_json(tmp_path / "file" / "x.json", {})
    with pytest.raises(OutputError, match="could not write"):
        write_json(Path("/sys/kernel/x.json"), {})  # refuses even root


def test_errors_of_the_block_other_than_output_pass_through(tmp_path: Path):
    with pytest.raises(OSError) as caught, atomic_folder(tmp_path / "x"):
        raise OSError(errno.ECONNRESET, "Connection reset")
    assert not isinstance(caught.value, OutputError)


def test_remove_folder(fill: Fill, tmp_path: Path):
    fill(tmp_path / "x", a="1")
    remove_folder(tmp_path / "x")
    remove_folder(tmp_path / "x")
    assert os.listdir(tmp_path) == []


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """A umask, which is set."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_the_umask_decides_who_may_read(tmp_path: Path, umask: int) -> None:
    """Whoever writes: safetensors makes files for their owner alone."""
    tensors = {"a": torch.zeros(3)}
    with atomic_folder(tmp_path / "x") as folder:
        save_file(tensors, folder / "a.safetensors")
        (folder / "sub").mkdir()
        save_file(tensors, folder / "sub" / "b.safetensors")
        (folder / "c").write_text("c")
    with atomic_file(tmp_path / "d.safetensors") as file:
        save_file(tensors, file)
    write_json(tmp_path / "e.json", {})
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == dict.fromkeys(
        ["a.safetensors", "b.safetensors", "c", "d.safetensors", "e.json"], 0o666 & ~umask
    )


def test_a_link_out_of_a_folder_keeps_what_it_points_at(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "mine").chmod(0o600)
    with atomic_folder(tmp_path / "x") as folder:
        (folder / "link").symlink_to(tmp_path / "mine")
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o600


def test_leftovers_below_a_cache(fill: Fill, tmp_path: Path) -> None:
    """Ours by their process; those of safetensors, whose process nobody knows, by their age."""
    pid = dead_pid()
    fill(
        tmp_path / "latents",
        **{f".a.safetensors.tmp-{pid}": "x", ".tmpAbC123": "x", ".tmpNew456": "x", "a": "whole"},
    )
    fill(tmp_path / "latents" / f".b.tmp-{os.getpid()}", a="at work")
    old = time.time() - 7200
    os.utime(tmp_path / "latents" / ".tmpAbC123", (old, old))
    assert clean_leftovers(tmp_path) == []
    assert len(clean_leftovers(tmp_path, deep=True)) == 2
    assert sorted(os.listdir(tmp_path / "latents")) == [f".b.tmp-{os.getpid()}", ".tmpNew456", "a"]
    assert clean_leftovers(tmp_path / "nowhere", deep=True) == []


def test_json_is_what_every_reader_takes() -> None:
    value = {"a": [math.nan, -math.inf, 1.5, {"b": (math.inf, 2)}], "é": "\ud800"}
    text = json_text(value)
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [None, None, 1.5, {"b": [None, 2]}],
        "é": "\ud800",
    }
    assert "é" in json_text({"é": 1})
    text.encode()


def test_text_of_odd_file_names_can_be_written(tmp_path: Path) -> None:
    assert write_text(tmp_path / "a", "caf\udce9").read_text() == "caf\\udce9"


def test_directory_size(fill: Fill, tmp_path: Path):
    assert directory_size(fill(tmp_path / "x", a="123", sub__b="45")) == 5
