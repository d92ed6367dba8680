"""Tensors by key, in files and in shards: what is there after kills, torn ends and full disks."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tunekit.data import store as stores
from tunekit.data.store import Shards, Store, Writer, as_bytes, is_whole
from tunekit.errors import DataError, OutputError

pytest.importorskip("fcntl")


def key(number: int) -> str:
    return hashlib.blake2b(str(number).encode(), digest_size=16).hexdigest()


def tensors(number: int) -> dict[str, Tensor]:
    return {"moments": torch.full((2, 3), float(number)), "ids": torch.arange(number % 5)}


def filled(folder: Path, numbers: range, **options: Any) -> Shards:
    shards = Shards(folder, **options)
    for number in numbers:
        shards.put(key(number), as_bytes(tensors(number)))
    shards.close()
    return shards


def entries(folder: Path) -> list[tuple[int, ...]]:
    """The keys of all entries of all shards, the same one as often as it was put."""
    found = []
    for path in sorted(folder.glob("*.shard")):
        with path.open("rb") as file:
            rows = stores._index(file.fileno(), path.stat().st_size)
        assert rows is not None, path
        found += [tuple(row) for row in rows[:, :2].tolist()]
    return found


def test_files_and_shards_hold_the_same_bytes(tmp_path: Path) -> None:
    alone, both = Store(tmp_path / "alone"), Store(tmp_path / "both")
    for number in range(20):
        size = alone.put(key(number), tensors(number))
        assert size == both.put(key(number), tensors(number), together=number % 2 == 0)
    both.close()
    (shard,) = (tmp_path / "both").glob("*.shard")
    assert len(list((tmp_path / "both").glob("*.safetensors"))) == 10
    assert not list((tmp_path / "both").glob("*.part"))
    assert shard.stat().st_mode & 0o777 == alone.path(key(0)).stat().st_mode & 0o777
    shards = Shards(tmp_path / "both")
    shards.refresh()
    for number in range(0, 20, 2):
        assert shards.read(key(number)) == alone.path(key(number)).read_bytes()
    for store in (both, Store(tmp_path / "both")):
        assert store.absent([key(number) for number in range(25)]) == [False] * 20 + [True] * 5
        for number in range(20):
            found = store.get(key(number))
            assert all(torch.equal(found[name], value) for name, value in tensors(number).items())
        with pytest.raises(DataError, match="cannot be read"):
            store.get(key(20))


def test_what_another_process_puts_is_found(tmp_path: Path) -> None:
    reader, writer = Store(tmp_path), Store(tmp_path)
    assert not reader.has(key(0))
    writer.put(key(0), tensors(0), together=True)
    assert float(reader.get(key(0))["moments"][0, 0]) == 0  # the shard has not been ended
    writer.put(key(1), tensors(1), together=True)
    writer.close()
    assert torch.equal(reader.get(key(1))["moments"], tensors(1)["moments"])
    assert reader.has(key(0)) and reader.has(key(1))
    assert torch.equal(reader.get(key(0))["moments"], tensors(0)["moments"])


def test_a_full_shard_is_ended(tmp_path: Path) -> None:
    filled(tmp_path, range(50), limit=1000)
    assert len(list(tmp_path.glob("*.shard"))) > 5
    assert sorted(entries(tmp_path)) == sorted(stores._numbers(key(number)) for number in range(50))


@pytest.mark.parametrize("damage", ["no index", "torn index", "other index"])
def test_an_index_follows_from_the_entries(tmp_path: Path, damage: str) -> None:
    filled(tmp_path, range(9))
    (path,) = tmp_path.glob("*.shard")
    content = path.read_bytes()
    end, _ = stores._TAIL.unpack(content[-stores._TAIL.size :])
    if damage == "other index":
        changed = bytearray(content)
        changed[end + 40] ^= 1
        path.write_bytes(changed)
    else:
        path.write_bytes(content[: end if damage == "no index" else -20])
    lines: list[str] = []
    store = Store(tmp_path, say=lines.append)
    assert store.absent([key(number) for number in range(10)]) == [False] * 9 + [True]
    assert [line.partition(".shard: ")[2] for line in lines] == [
        "damaged behind its first 9 entries; what else it held is encoded again"
    ] * (damage != "no index")


def test_a_torn_shard_keeps_its_whole_entries(tmp_path: Path) -> None:
    """Cut at any byte."""
    writer = Writer(tmp_path / "made")
    ends = []
    for number in range(3):
        writer.put(bytes.fromhex(key(number)), as_bytes(tensors(number)))
        ends.append(os.fstat(writer._file).st_size)
    (part,) = (tmp_path / "made").glob("*.part")
    content, name = part.read_bytes(), part.name
    near = {end + step for end in ends for step in (-1, 0, 1, 40)}
    for cut in sorted((near | set(range(0, len(content), 37))) & set(range(len(content) + 1))):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / name).write_bytes(content[:cut])
        whole = sum(end <= cut for end in ends)
        store = Store(folder)
        assert store.absent([key(number) for number in range(3)]) == [n >= whole for n in range(3)]
        lines: list[str] = []
        Store(folder, say=lines.append).tidy()
        assert [path.suffix for path in folder.iterdir()] == [".shard"] * bool(whole)
        assert bool(lines) == bool(whole)
        if lines and cut > ends[whole - 1]:
            assert f"dropped {cut - ends[whole - 1]} bytes" in lines[0]
        assert len(entries(folder)) == whole
        again = Store(folder)
        for number in range(whole, 3):
            again.put(key(number), tensors(number), together=True)
        again.close()
        assert not any(Store(folder).absent([key(number) for number in range(3)]))


def test_zeros_within_are_no_entries(tmp_path: Path) -> None:
    """As a disk leaves them whose power went."""
    writer = Writer(tmp_path)
    for number in range(3):
        writer.put(bytes.fromhex(key(number)), as_bytes(tensors(number)))
    (part,) = tmp_path.glob("*.part")
    content = bytearray(part.read_bytes())
    content[len(content) // 2 : len(content) * 2 // 3] = bytes(len(content) * 2 // 3 - len(content) // 2)
    part.write_bytes(content)
    assert Store(tmp_path).absent([key(number) for number in range(3)]) == [False, True, True]


def test_a_writer_that_is_killed_in_the_middle_of_an_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, contents = os.write, [as_bytes(tensors(number)) for number in range(1000)]

    def half(file: int, content: Any) -> int:
        if os.fstat(file).st_size > 2000:
            write(file, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(file, content)

    child = os.fork()
    if not child:
        try:
            monkeypatch.setattr(os, "write", half)
            shards = Shards(tmp_path)
            for number, content in enumerate(contents):
                shards.put(key(number), content)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    lines: list[str] = []
    store = Store(tmp_path, say=lines.append)
    store.tidy()
    there = [not absent for absent in store.absent([key(number) for number in range(1000)])]
    count = sum(there)
    assert count > 5 and there == [True] * count + [False] * (1000 - count)
    assert f"kept {count} entries of a process that is gone, and dropped" in lines[0]
    assert len(entries(tmp_path)) == count


def test_a_shard_is_ended_for_nobody_who_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(tmp_path)
    writer.put(bytes.fromhex(key(0)), as_bytes(tensors(0)))
    Store(tmp_path).tidy()
    (part,) = tmp_path.glob("*.part")
    assert Store(tmp_path).has(key(0))
    # Locks of another machine may not be seen here: what rests is ended, what grows is not.
    os.close(writer._file)
    far = part.rename(part.with_name(f"far-1-{'0' * 16}.part"))
    Store(tmp_path).tidy()
    assert far.exists()
    old = time.time() - stores.RESTED - 1
    os.utime(far, (old, old))
    Store(tmp_path).tidy()
    assert [path.name for path in tmp_path.iterdir()] == [f"far-1-{'0' * 16}.shard"]
    # Where there are no locks at all, a process that lives keeps its own.
    monkeypatch.setattr(stores, "_lock", lambda file: None)
    other = Writer(tmp_path)
    other.put(bytes.fromhex(key(1)), as_bytes(tensors(1)))
    Store(tmp_path).tidy()
    assert list(tmp_path.glob("*.part"))
    other.close()
    assert not Store(tmp_path).absent([key(0), key(1)])[1]


def test_a_writer_that_went_on_behind_an_index_loses_nothing(tmp_path: Path) -> None:
    """A machine that sees no locks has ended its shard."""
    writer = Writer(tmp_path)
    writer.put(bytes.fromhex(key(0)), as_bytes(tensors(0)))
    (part,) = tmp_path.glob("*.part")
    rows, _ = stores._scan(writer._file, 0, part.stat().st_size)
    with part.open("r+b") as file:
        stores._end(file.fileno(), rows, part)
    writer.put(bytes.fromhex(key(1)), as_bytes(tensors(1)))
    assert not any(Store(tmp_path).absent([key(0), key(1)]))
    writer.close()
    store = Store(tmp_path)
    for number in range(2):
        assert torch.equal(store.get(key(number))["moments"], tensors(number)["moments"])


@pytest.mark.parametrize("at", ["entry", "index"])
def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    store, write = Store(tmp_path), os.write
    for number in range(4):
        store.put(key(number), tensors(number), together=True)

    def full(file: int, content: Any) -> int:
        if len(content) < 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, content[: len(content) - 39])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OutputError, match="no space left on the disk"):
        if at == "entry":
            store.put(key(4), tensors(4), together=True)
        else:
            store.close()
    monkeypatch.setattr(os, "write", write)
    assert Store(tmp_path).absent([key(number) for number in range(5)]) == [False] * 4 + [True]
    store.put(key(4), tensors(4), together=True)
    store.close()
    store.tidy()
    assert not any(Store(tmp_path).absent([key(number) for number in range(5)]))
    assert len(entries(tmp_path)) == 5


def test_a_damaged_entry_is_named(tmp_path: Path) -> None:
    filled(tmp_path, range(3))
    (path,) = tmp_path.glob("*.shard")
    content = bytearray(path.read_bytes())
    content[len(as_bytes(tensors(0))) + 90] ^= 1
    path.write_bytes(content)
    store = Store(tmp_path)
    assert torch.equal(store.get(key(0))["moments"], tensors(0)["moments"])
    with pytest.raises(DataError, match=rf"{path.name}: the shard is damaged.*\nremove it and run again"):
        store.get(key(1))


def test_what_two_have_put_is_there_once(tmp_path: Path) -> None:
    one, other = Writer(tmp_path), Writer(tmp_path)
    for writer in (one, other):
        for number in range(3):
            writer.put(bytes.fromhex(key(number)), as_bytes(tensors(number)))
    one.close()
    other.close()
    shards = Shards(tmp_path)
    shards.refresh()
    assert len(shards) == 3 and len(entries(tmp_path)) == 6


def test_keys_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    same = "0123456789abcdef"
    keys = [same + f"{number:016x}" for number in (5, 1, 2**63)]
    shards = Shards(tmp_path)
    for number, name in enumerate(keys):
        shards.put(name, as_bytes(tensors(number)))
    shards.close()
    store = Store(tmp_path)
    assert store.absent([*keys, same + "f" * 16, same + "0" * 16]) == [False] * 3 + [True] * 2
    assert [float(store.get(name)["moments"][0, 0]) for name in keys] == [0, 1, 2]


def test_what_else_lies_there_is_left_alone(tmp_path: Path) -> None:
    for name in ("movie.part", "a.shard", f"{key(1)}.safetensors"):
        (tmp_path / name).write_bytes(b"mine")
    store = Store(tmp_path)
    store.tidy()
    assert store.absent([key(1)]) == [True] and not is_whole(store.path(key(1)))
    assert len(list(tmp_path.iterdir())) == 3


def test_no_more_files_are_open_than_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_OPEN", 3)
    filled(tmp_path, range(40), limit=300)
    shards = Shards(tmp_path)
    shards.refresh()
    order = np.random.default_rng(0).integers(0, 40, 200)
    assert all(shards.read(key(int(number))) == as_bytes(tensors(int(number))) for number in order)
    assert len(shards._open) == 3


def test_a_shard_that_is_gone_is_named(tmp_path: Path) -> None:
    filled(tmp_path, range(3))
    store = Store(tmp_path)
    assert store.has(key(0))
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(DataError, match="the shard is gone"):
        store.get(key(0))
