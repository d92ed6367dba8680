"""Pictures in shards, parquet files and streams: what is found and refused, what an index does for it."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tunekit.config import DataConfig, DreamboothData
from tunekit.data import index
from tunekit.data.decoding import PictureError, decode, size_of
from tunekit.data.images import Scan, scan_data
from tunekit.data.samples import Indexed
from tunekit.data.shards import expanded
from tunekit.errors import DataError, OutputError

MakePictures = Callable[..., Path]


def scan(path: Path | str, **options: Any) -> Scan:
    return scan_data(DataConfig(path=str(path), resolution=64, **options))


def said(found: Scan) -> str:
    with pytest.raises(DataError) as error:
        found.check()
    return str(error.value)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of our own, which knows nothing."""
    import datasets

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home" / "datasets")
    return tmp_path / "home"


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often somebody looked at a picture."""
    made: list[int] = []

    def counted(data: bytes) -> tuple[int, int]:
        made.append(len(data))
        return size_of(data)

    monkeypatch.setattr(index, "size_of", counted)
    return made


Member = tuple[str, bytes]


def members(folder: Path) -> list[Member]:
    """All files of a folder, as a tar sorted by name has them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(file.relative_to(folder).as_posix(), file.read_bytes()) for file in files]


def write_tar(file: Path, content: Iterable[Member]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, data in content:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file


def write_parquet(file: Path, folder: Path, *, named: bool = True, **options: Any) -> Path:
    import pyarrow
    import pyarrow.parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    pictures = sorted(folder.rglob("*.png"))
    cells = [
        {"bytes": path.read_bytes(), "path": path.relative_to(folder).as_posix() if named else None}
        for path in pictures
    ]
    texts = [path.with_suffix(".txt").read_text() for path in pictures]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "text": texts}), file, **options)
    return file


@pytest.fixture
def folder(tmp_path: Path, make_pictures: MakePictures) -> Path:
    """Six pictures of two sizes, in two folders."""
    make_pictures(tmp_path / "photos" / "a", 3)
    make_pictures(tmp_path / "photos" / "b", 3, (96, 64), seed=7)
    return tmp_path / "photos"


@pytest.fixture
def shards(tmp_path: Path, folder: Path) -> Path:
    """The same in two shards."""
    content = members(folder)
    write_tar(tmp_path / "shards" / "000.tar", content[:6])
    write_tar(tmp_path / "shards" / "001.tar", content[6:])
    return tmp_path / "shards"


# What is found


@pytest.mark.parametrize("source", ["shards", "range", "parquet", "stream", "streamed shards"])
def test_every_source_has_the_samples_of_the_folder(
    tmp_path: Path, folder: Path, shards: Path, source: str
) -> None:
    path: Path | str = shards
    if source == "range":
        path = f"{shards}/{{000..001}}.tar"
    elif source in ("parquet", "stream"):
        path = write_parquet(tmp_path / "rows" / "train-0.parquet", folder, row_group_size=2).parent
    elif source == "streamed shards":
        path = shards / "000.tar"
    found, plain = scan(path, streaming="stream" in source), scan(folder)
    found.check()
    expected = plain.samples[: len(found.samples)]
    assert len(found.samples) == (3 if source == "streamed shards" else 6)
    assert isinstance(found.samples, Indexed)
    for _ in range(2):  # in order and by number, forwards and back
        for mine, theirs in zip(found.samples, expected, strict=True):
            assert (mine.id, mine.caption, mine.width, mine.height) == (
                (theirs.id, theirs.caption, theirs.width, theirs.height)
            )
    for at in (2, 0, 1, -1):
        assert found.samples[at].open().tobytes() == expected[at].open().tobytes()
    assert found.samples.sizes.tolist() == [[one.width, one.height] for one in expected]


def test_the_same_pictures_are_held_out(tmp_path: Path, folder: Path, shards: Path) -> None:
    parquet = write_parquet(tmp_path / "all.parquet", folder)
    expected = scan(folder, validation=0.4)
    for path in (shards, parquet):
        found = scan(path, validation=0.4)
        for mine, theirs in ((found.samples, expected.samples), (found.held_out, expected.held_out)):
            assert [sample.id for sample in mine] == [sample.id for sample in theirs]


def test_ids_do_not_depend_on_files_or_places(tmp_path: Path, folder: Path) -> None:
    content = members(folder)
    write_tar(tmp_path / "one" / "all.tar", content)
    for number in range(6):
        write_tar(tmp_path / "many" / f"{5 - number}.tar", content[2 * number : 2 * number + 2])
    one, many = scan(tmp_path / "one").samples, scan(tmp_path / "many").samples
    assert isinstance(one, Indexed) and isinstance(many, Indexed)
    assert sorted((s.id, s.content) for s in one) == sorted((s.id, s.content) for s in many)
    assert one.digest == many.take(np.arange(6)[::-1]).digest != many.digest


def test_rows_without_names_are_known_by_their_content(tmp_path: Path, folder: Path) -> None:
    found = scan(write_parquet(tmp_path / "all.parquet", folder, named=False))
    found.check()
    assert all(sample.id == sample.content for sample in found.samples)


def test_rows_that_share_a_name_are_told_apart(tmp_path: Path, folder: Path) -> None:
    for part in ("a", "b"):  # as a folder of folders is pushed to the hub: 00.png twice
        write_parquet(tmp_path / "rows" / f"{part}.parquet", folder / part)
    found = scan(tmp_path / "rows", validation=0.5)
    found.check()
    ids = [sample.id for sample in (*found.samples, *found.held_out)]
    assert len(set(ids)) == 6
    assert all(name.partition("@")[0] in {"00.png", "01.png", "02.png"} and "@" in name for name in ids)


def test_captions_of_shards(tmp_path: Path, folder: Path) -> None:
    pictures = [data for name, data in members(folder) if name.endswith(".png")]
    content = [
        ("./00.png", pictures[0]),
        ("./00.txt", "  größer \n".encode()),
        ("01.PNG", pictures[1]),
        ("01.json", json.dumps({"caption": "from json", "other": "asked for", "n": 3}).encode()),
        ("02.png", pictures[2]),
        ("02.cls", b"7"),
    ]
    file = write_tar(tmp_path / "all.tar", content)
    found = scan(file, caption_prefix="sks")
    found.check()
    assert [(s.id, s.caption) for s in found.samples] == [
        ("00.png", "sks größer"),
        ("01.PNG", "sks from json"),
        ("02.png", "sks 7"),
    ]
    asked = scan(file, caption_column="other")
    assert [sample.caption for sample in asked.samples] == ["asked for"]
    assert [problem.where for problem in asked.problems] == [f"{file}:00.png", f"{file}:02.png"]
    assert "the caption in column 'n' is of type int" in said(scan(file, caption_column="n"))
    data = DreamboothData(path=str(file), instance_prompt="a sks disc", resolution=64)
    assert {sample.caption for sample in scan_data(data).samples} == {"a sks disc"}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_of_every_form(tmp_path: Path, folder: Path, form: int) -> None:
    """Long names, folders and links stand in headers of their own, which the quick look leaves to tarfile."""
    deep = f"{'a' * 60}/{'b' * 60}/größe"
    names = [deep] if form == tarfile.USTAR_FORMAT else [deep, "c" * 150]
    pictures = [data for name, data in members(folder) if name.endswith(".png")]
    with tarfile.open(tmp_path / "all.tar", "w", format=form) as tar:
        tar.add(folder / "a", "a", recursive=False)
        for name, data in zip(names, pictures, strict=False):
            for suffix, content in (("png", data), ("txt", b"text")):
                member = tarfile.TarInfo(f"./{name}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("d.png")
        link.type, link.linkname = tarfile.SYMTYPE, "c.png"
        tar.addfile(link)
    found = scan(tmp_path / "all.tar")
    found.check()
    assert [sample.id for sample in found.samples] == [f"{name}.png" for name in names]
    assert [sample.read() for sample in found.samples] == pictures[: len(names)]


def test_splits_of_shards(tmp_path: Path, folder: Path) -> None:
    content = members(folder)
    write_tar(tmp_path / "train-0.tar", content[:6])
    write_tar(tmp_path / "test-0.tar", content[6:])
    assert len(scan(tmp_path / "train-0.tar").samples) == 3
    shutil.rmtree(folder)
    assert [s.id[0] for s in scan(tmp_path, split="test").samples] == ["b"] * 3
    assert "shards of another split" in "\n".join(scan(tmp_path).notes)


def test_batches_are_those_of_the_folder_to_the_last_bit(tmp_path: Path, folder: Path, shards: Path) -> None:
    import torch
    from accelerate import Accelerator

    from tunekit import families
    from tunekit.data.cache import Draws, Encoder, Stream

    family = families.get("sd15")
    pipeline = family.tiny()
    encoder = Encoder(
        family, pipeline, cache=tmp_path / "cache", accelerator=Accelerator(cpu=True), say=lambda line: None
    )
    made = []
    for path in (folder, shards, write_parquet(tmp_path / "all.parquet", folder)):
        data = DataConfig(path=str(path), resolution=32, crop="random", flip=True)
        dataset = encoder.dataset(scan_data(data).samples, data, seed=3)
        stream = Stream(dataset, family.objective(pipeline), Draws(batch_size=4, caption_dropout=0.3), seed=3)
        made.append([batch for step in range(4) for batch in stream.step(step, 0, 1)])
    for others in made[1:]:
        for mine, theirs in zip(others, made[0], strict=True):
            assert mine.ids == theirs.ids
            for name, value in theirs.rows.items():
                assert torch.equal(mine.rows[name], value), name


# What an index does


def test_a_second_opening_looks_at_nothing_and_a_changed_shard_alone_again(
    tmp_path: Path, shards: Path, looks: list[int], folder: Path
) -> None:
    first = scan(shards)
    assert len(looks) == 6
    assert scan(shards).samples == first.samples
    assert len(looks) == 6
    write_tar(shards / "001.tar", members(folder)[6:10])
    assert [sample.id for sample in scan(shards).samples] == [s.id for s in first.samples][:5]
    assert len(looks) == 8
    with pytest.raises(OSError, match="has changed since it was looked at"):
        first.samples[5].read()
    assert first.samples[0].open().size == (64, 64)


def test_a_stream_never_gives_another_picture(tmp_path: Path, folder: Path) -> None:
    file = write_parquet(tmp_path / "rows" / "train-0.parquet", folder / "a")
    found = scan(file.parent, streaming=True)
    read = found.samples[0].read
    assert read() == (folder / "a" / "00.png").read_bytes()
    write_parquet(file, folder / "b")
    for sample in pickle.loads(pickle.dumps(found.samples)):
        with pytest.raises(OSError, match="another picture than when it was looked at"):
            sample.read()
    assert [s.content for s in scan(file.parent, streaming=True).samples] != [
        s.content for s in found.samples
    ]


def test_what_was_killed_goes_on_where_it_was(
    shards: Path, looks: list[int], monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    made = index._make

    def killed(source: Any, part: Any, *more: Any) -> int:
        if part.number == 1:
            raise KeyboardInterrupt
        return made(source, part, *more)

    with monkeypatch.context() as patch:
        patch.setattr(index, "_make", killed)
        with pytest.raises(KeyboardInterrupt):
            scan(shards)
    assert len(looks) == 3
    scan(shards).check()
    assert len(looks) == 6
    (damaged, _) = (home / "tunekit" / "index").glob("*.sqlite")
    damaged.write_bytes(b"not a database")
    scan(shards).check()
    assert len(looks) == 9


def test_another_process_and_threads_read_the_same(shards: Path) -> None:
    found = scan(shards)
    again = pickle.loads(pickle.dumps(found.samples))
    assert again == found.samples
    with ThreadPoolExecutor(4) as pool:
        pictures = list(pool.map(lambda at: again[at % 6].open().tobytes(), range(48)))
    assert pictures == [found.samples[at % 6].open().tobytes() for at in range(48)]
    if (child := os.fork()) == 0:
        os._exit(0 if len({sample.read() for sample in found.samples}) == 6 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_many_are_not_all_in_memory(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_BLOCK", 16)  # several rows of hashes in one file
    monkeypatch.setattr(index, "_AHEAD", 32)
    monkeypatch.setattr(index, "_OPEN", 2)
    whole = [data for name, data in members(folder) if name.endswith(".png")]
    for number in range(4):
        content: list[Member] = []
        for at in range(50):
            name = f"{number}-{at:02d}"
            # A text chunk of its own behind the signature and the header makes each picture another file.
            chunk = b"skIp" + name.encode()
            chunk = len(name).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
            content += [(f"{name}.png", whole[at % 6][:33] + chunk + whole[at % 6][33:])]
            content += [(f"{name}.txt", name.encode())]
        write_tar(tmp_path / "many" / f"{number}.tar", content)
    found = scan(tmp_path / "many", validation=0.1)
    found.check()
    assert (len(found.samples), len(found.held_out)) == (180, 20)
    assert isinstance(found.samples, Indexed)
    everything = list(found.samples)
    assert [sample.id for sample in everything] == sorted(sample.id for sample in everything)
    for at in (0, 100, 3, 179, -1):
        assert found.samples[at] == everything[at]
    assert list(found.samples[10:170:7]) == everything[10:170:7]
    picked = np.array([170, 5, 6, 7, 90, 5])
    assert list(found.samples.take(picked)) == [everything[at] for at in picked]
    hashed = found.samples.take(picked).contents()
    assert [int(key) for key in hashed[:, 0]] == [int(everything[at].content[:16], 16) for at in picked]


def test_a_cache_that_cannot_be_written_is_said(shards: Path, home: Path, looks: list[int]) -> None:
    home.mkdir()
    (home / "tunekit").write_text("in the way")
    found = scan(shards)
    found.check()
    assert len(found.samples) == 6
    (note,) = found.notes
    assert note.startswith("the index of the pictures is not kept for the next time (")
    assert note.endswith("): set XDG_CACHE_HOME")


def test_a_full_disk_is_said(shards: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setattr(index, "_TABLES", index._TABLES + "PRAGMA max_page_count = 1;")
    write_tar(shards / "000.tar", [members(folder)[0], ("a/00.txt", b"long " * 100_000)])
    with pytest.raises(OutputError, match="no space left on the disk"):
        scan(shards)
    assert not list((home / "tunekit" / "index").glob("*.sqlite"))


# What is refused


def broken(name: str, shards: Path, content: list[Member]) -> Path | str:
    """A source with something wrong in it."""
    file = shards / "001.tar"
    picture, text = content[6], content[7]
    match name:
        case "cut":
            file.write_bytes(file.read_bytes()[: content[6][1].__len__() + 1024])
        case "cut in a header":
            file.write_bytes(file.read_bytes()[:700])
        case "without an end":
            write_tar(file, content[6:8])
            size = 1024 + sum(-(-len(data) // 512) * 512 for _, data in content[6:8])
            file.write_bytes(file.read_bytes()[:size])
        case "no tar":
            file.write_bytes(b"<html>404</html>" * 100)
        case "empty":
            file.write_bytes(b"")
        case "gz":
            (shards / "001.tar.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
        case "gz by content":
            file.write_bytes(gzip.compress(file.read_bytes()))
        case "two pictures":
            write_tar(file, [picture, (picture[0].replace(".png", ".jpg"), content[8][1]), text])
        case "no caption":
            write_tar(file, [picture, *content[8:]])
        case "another key":
            write_tar(file, [content[0], content[2]])
        case "empty caption":
            write_tar(file, [picture, (text[0], b" \n")])
        case "not utf-8":
            write_tar(file, [picture, (text[0], b"caf\xe9")])
        case "no json":
            write_tar(file, [picture, (text[0].replace(".txt", ".json"), b"{")])
        case "same key":
            write_tar(file, [(content[0][0], picture[1]), (content[1][0], b"another")])
        case "same picture":
            write_tar(file, [("b/00.png", content[0][1]), ("b/00.txt", b"again")])
        case "no picture":
            write_tar(file, [("b/00.png", b"%!PS-Adobe-3.0"), ("b/00.txt", b"a page")])
        case "half a picture":
            write_tar(file, [("b/00.png", picture[1][:-40]), ("b/00.txt", b"half")])
        case "tiny":
            buffer = io.BytesIO()
            Image.new("RGB", (16, 64)).save(buffer, "PNG")
            write_tar(file, [("b/00.png", buffer.getvalue()), ("b/00.txt", b"tiny")])
        case "missing":
            file.unlink()
            return f"{shards}/{{000..002}}.tar"
        case "no range":
            return f"{shards}/{{000-001}}.tar"
    return shards


@pytest.mark.parametrize(
    ("name", "where", "what"),
    [
        ("cut", "001.tar", "is cut off or damaged (after byte"),
        ("cut in a header", "001.tar", "is cut off or damaged (after byte"),
        ("without an end", "001.tar", "is cut off or damaged (after byte"),
        ("no tar", "001.tar", "no tar file"),
        ("empty", "001.tar", "is empty; fetch it again, or remove it"),
        ("gz", "001.tar.gz", "is compressed (gzip): a picture in it cannot be read without all that stands"),
        ("gz by content", "001.tar", "is compressed (gzip)"),
        (
            "two pictures",
            "001.tar:b/00",
            "two pictures under one key (00.png, 00.jpg); keep one of them, or set",
        ),
        ("no caption", "001.tar:b/00.png", "no caption: no .txt, .json, .cls beside it (there is nothing)"),
        ("another key", "001.tar:a/00.png", "no caption"),
        ("empty caption", "001.tar:b/00.png", "no caption in column '.txt'"),
        ("not utf-8", "001.tar:b/00.txt", "not UTF-8 (byte 3)"),
        ("no json", "001.tar:b/00.json", "no JSON ("),
        ("same key", "001.tar:a/00.png", "its key is that of {}/000.tar:a/00.png; give each picture a key"),
        ("same picture", "001.tar:b/00.png", "same picture as {}/000.tar:a/00.png"),
        ("no picture", "001.tar:b/00.png", "cannot be read as a picture (cannot identify"),
        ("half a picture", "001.tar:b/00.png", "cannot be read as a picture (image file is truncated"),
        ("tiny", "001.tar:b/00.png", "16x64 pixels is tiny for data.resolution 64"),
        ("missing", "{000..002}.tar", "2 of its 3 files are not there: {}/001.tar, {}/002.tar"),
        ("no range", "{000-001}.tar", "{000-001} is no range; write {first..last}, as {000..099}"),
    ],
)
def test_a_broken_shard_is_named(shards: Path, folder: Path, name: str, where: str, what: str) -> None:
    path = broken(name, shards, members(folder))
    lines = said(scan(path)).splitlines()
    expected = f"  {shards}/{where}: {what.replace('{}', str(shards))}"
    assert [line for line in lines if line.startswith(expected)], (expected, lines)


def test_a_picture_with_two_files_is_chosen_by_its_suffix(shards: Path, folder: Path) -> None:
    content = members(folder)
    mask = content[8][1]
    write_tar(
        shards / "001.tar", [content[6], (content[6][0].replace(".png", ".mask.png"), mask), content[7]]
    )
    (shards / "000.tar").unlink()
    assert "two pictures under one key" in said(scan(shards))
    for suffix in ("png", ".PNG"):
        found = scan(shards, image_column=suffix)
        found.check()
        assert [sample.id for sample in found.samples] == ["b/00.png"]


def test_bad_pictures_are_tolerated_up_to_a_share(shards: Path, folder: Path) -> None:
    broken("no picture", shards, members(folder))
    assert "cannot be read as a picture" in said(scan(shards, tolerate=0.2))
    found = scan(shards, tolerate=0.25)
    found.check()
    assert len(found.samples) == 3
    (note,) = found.notes
    assert note.startswith(f"data.tolerate: 1 of 4 pictures left out: {shards}/001.tar:b/00.png (cannot be")
    plain = scan(folder, tolerate=0.2)
    (folder / "a" / "00.txt").unlink()
    assert len(scan(folder, tolerate=0.2).samples) == len(plain.samples) - 1


def test_of_many_bad_rows_twenty_are_named(tmp_path: Path, folder: Path) -> None:
    content = [(f"{at:03d}.png", f"no picture {at}".encode()) for at in range(70)]
    content = [item for at, one in enumerate(content) for item in (one, (f"{at:03d}.txt", b"text"))]
    write_tar(tmp_path / "bad" / "0.tar", content)
    write_tar(tmp_path / "bad" / "1.tar", members(folder / "a"))
    found = scan(tmp_path / "bad")
    lines = said(found).splitlines()
    assert lines[0] == "70 problems in the pictures:"
    assert len(lines) == 22
    assert lines[-1] == "  and 50 more: cannot be read as a picture; replace it, shrink it or remove it"
    assert len(found.problems) == 21


@pytest.mark.parametrize("streaming", [False, True])
def test_a_source_that_cannot_be_listed(streaming: bool) -> None:
    text = said(scan("someone/not-here", streaming=streaming))
    assert (
        "someone/not-here: neither a folder here nor a data set that could be loaded from the hub (" in text
    )


def test_a_stream_of_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK")
    assert "is a file that cannot be streamed; give a folder" in said(
        scan(tmp_path / "a.zip", streaming=True)
    )


def test_pictures_of_a_validation_source_must_be_others(tmp_path: Path, folder: Path, shards: Path) -> None:
    for training, validation in (
        (shards, folder / "a"),
        (folder, shards / "000.tar"),
        (shards, shards / "001.tar"),
    ):
        text = said(scan(training, validation=str(validation)))
        assert text.startswith("3 problems in the pictures:"), text
        assert "same picture as a training picture (" in text


def test_what_lies_beside_shards_is_said(shards: Path, folder: Path) -> None:
    write_tar(shards / "002.tar", [("readme.md", b"x"), ("only.txt", b"a text")])
    shutil.copy(folder / "a" / "00.txt", shards / "notes.txt")
    text = "\n".join(scan(shards).notes)
    assert "keys without a picture (2): " in text
    assert "texts without a picture of their name (1)" in text


# Names and sizes


def test_ranges_are_as_in_a_shell() -> None:
    assert expanded("{train,val}-{08..10}.tar")[1:4] == ["train-09.tar", "train-10.tar", "val-08.tar"]
    assert expanded("{8..11}") == ["8", "9", "10", "11"]
    for wrong in ("{2..1}", "{0..9999999}", "{a}", "{0..999}{0..9999}"):
        with pytest.raises(DataError):
            expanded(wrong)


def picture(form: str, size: tuple[int, int] = (40, 24), **options: Any) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("turn", [1, 6])
def test_the_size_in_a_header_is_that_of_the_decoded_picture(form: str, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    data = picture(form, **({"exif": exif} if form in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
    assert size_of(data) == decode(data).size


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_picture_that_was_cut_off_is_found_without_decoding_it(form: str) -> None:
    data = picture(form)
    for size in (len(data) // 2, len(data) * 9 // 10, 20):
        with pytest.raises(PictureError):
            size_of(data[:size])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_header_that_promises_too_much_is_refused() -> None:
    buffer = io.BytesIO()
    Image.new("1", (12000, 12000)).save(buffer, "PNG")
    with pytest.raises(PictureError, match="decompression bomb"):
        size_of(buffer.getvalue())
