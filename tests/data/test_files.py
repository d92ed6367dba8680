"""Folders as people have them: whatever is not used is said, whatever cannot be read is named."""

from __future__ import annotations

import os
import socket
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tunekit.config import DataConfig, DreamboothData
from tunekit.data import decoding
from tunekit.data.files import CAPTION_BYTES, read_file, walk
from tunekit.data.images import Scan, scan_data
from tunekit.errors import DataError

MakePictures = Callable[..., Path]


def scan(path: Path | str, **options: object) -> Scan:
    return scan_data(DataConfig(path=str(path), resolution=64, **options))  # type: ignore[arg-type]


def dreambooth(path: Path | str, **options: object) -> Scan:
    data = DreamboothData(path=str(path), instance_prompt="sks", resolution=64, **options)  # type: ignore[arg-type]
    return scan_data(data)


def ids(found: Scan) -> list[str]:
    found.check()
    return [sample.id for sample in found.samples]


def said(found: Scan) -> str:
    return "\n".join(found.notes)


def test_nothing_is_said_where_all_is_used(pictures: Path) -> None:
    assert scan(pictures).notes == ()


# Kinds of files


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "JPG", "tga", "jp2", "bmp", "ppm", "HEIC", "jxl"])
def test_what_pillow_reads_is_used_whatever_it_is_called(
    tmp_path: Path, make_pictures: MakePictures, suffix: str
) -> None:
    make_pictures(tmp_path, 1)
    form = {"tga": "TGA", "jp2": "JPEG2000", "bmp": "BMP", "ppm": "PPM"}.get(suffix, "JPEG")
    Image.open(tmp_path / "00.png").rotate(90).resize((70, 64)).save(tmp_path / f"x.{suffix}", form)
    (tmp_path / "x.txt").write_text("another")
    assert ids(scan(tmp_path)) == ["00.png", f"x.{suffix}"]


def test_pictures_of_unknown_kinds_are_named_with_the_remedy(
    tmp_path: Path, make_pictures: MakePictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "known_formats", lambda: frozenset({"PNG"}))  # whatever is installed here
    make_pictures(tmp_path, 1)
    for name in ("a.HEIC", "b.heic", "c.jxl", "d.cr2"):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
    found = scan(tmp_path)
    assert ids(found) == ["00.png"]
    lines = said(found).splitlines()
    assert lines[0] == f"{tmp_path}: 1 used, 4 ignored:"
    assert ".heic files, which are not read (2): " in lines[1]
    assert "a.HEIC" in lines[1]
    assert "pip install pillow-heif" in lines[1]
    assert "c.jxl" in lines[2]
    assert "d.cr2" in lines[3]


def test_heic_is_read_where_its_package_is_installed(tmp_path: Path, make_pictures: MakePictures) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    make_pictures(tmp_path, 1)
    Image.open(tmp_path / "00.png").save(tmp_path / "photo.heic", quality=95)
    (tmp_path / "00.png").unlink()
    (tmp_path / "00.txt").rename(tmp_path / "photo.txt")
    assert ids(scan(tmp_path)) == ["photo.heic"]
    (tmp_path / "photo.heic").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"photo\.heic: cannot be read as a picture"):
        scan(tmp_path).check()


def test_where_nothing_is_used_the_error_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.cr2").write_bytes(b"ftypcrx " * 9)
    (tmp_path / "clip.mp4").write_bytes(b"ftypmp42" * 9)
    with pytest.raises(DataError, match=r"no pictures found(.|\n)*\.cr2(.|\n)*develop them"):
        scan(tmp_path).check()


def test_other_files_and_captions_without_a_picture_are_named(
    tmp_path: Path, make_pictures: MakePictures
) -> None:
    make_pictures(tmp_path, 1)
    (tmp_path / "lost.txt").write_text("a picture that was deleted")
    (tmp_path / "notes.json").write_text("{}")
    text = said(scan(tmp_path))
    assert "1 used, 2 ignored" in text
    assert f"texts without a picture of their name (1): {tmp_path / 'lost.txt'}" in text
    assert f"files of other kinds (1): {tmp_path / 'notes.json'}" in text


def test_hidden_pictures_are_named_and_other_hidden_files_are_not(
    tmp_path: Path, make_pictures: MakePictures
) -> None:
    make_pictures(tmp_path, 1)
    make_pictures(tmp_path / ".ipynb_checkpoints", 2, seed=4)
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "._00.png").write_bytes(b"x")
    (tmp_path / ".git").mkdir()
    found = scan(tmp_path)
    assert ids(found) == ["00.png"]
    assert said(found).splitlines()[1:] == [f"  hidden pictures (2): {tmp_path / '.ipynb_checkpoints'}"]


# Links, pipes, permissions


def test_links_are_followed_once_and_circles_end(tmp_path: Path, make_pictures: MakePictures) -> None:
    place = make_pictures(tmp_path / "photos", 1)
    make_pictures(tmp_path / "elsewhere", 2, seed=5)
    (place / "more").symlink_to(tmp_path / "elsewhere")
    (place / "again").symlink_to(tmp_path / "elsewhere")
    (place / "loop").symlink_to(place)
    (place / "self").symlink_to(place / "self")
    found = scan(place)
    assert ids(found) == ["00.png", "again/00.png", "again/01.png"]
    text = said(found)
    assert "links to folders that are read anyway (2)" in text
    assert str(place / "more") in text
    assert "links to nothing (1)" in text


def test_a_path_without_links_is_the_one_that_counts(tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path / "z", 1)
    (tmp_path / "a").symlink_to(tmp_path / "z")
    assert ids(scan(tmp_path)) == ["z/00.png"]


@pytest.mark.parametrize("captioned", [True, False])
def test_what_is_called_a_picture_and_is_none_is_named(
    tmp_path: Path, make_pictures: MakePictures, captioned: bool
) -> None:
    place = make_pictures(tmp_path / "photos", 1)
    os.mkfifo(place / "pipe.png")
    (place / "gone.png").symlink_to("/nowhere.png")
    (place / "device.png").symlink_to("/dev/zero")
    (place / "folder.png").mkdir()
    if captioned:
        for name in ("pipe", "gone", "device"):
            (place / f"{name}.txt").write_text(name)
    found = {
        Path(problem.where).name: problem.what
        for problem in (scan if captioned else dreambooth)(place).problems
    }
    assert found == {
        "pipe.png": "cannot be read (it is a pipe, not a file)",
        "gone.png": "cannot be read (it is a link to /nowhere.png, where nothing is)",
        "device.png": "cannot be read (it is a device, not a file)",
    }


def test_captions_are_files_of_a_bounded_size(tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path, 4)
    (tmp_path / "00.txt").unlink()
    os.mkfifo(tmp_path / "00.txt")
    with (tmp_path / "01.txt").open("wb") as file:
        file.truncate(300_000_000)
    (tmp_path / "02.txt").unlink()
    (tmp_path / "02.txt").symlink_to("/dev/zero")
    found = {Path(problem.where).name: problem.what for problem in scan(tmp_path).problems}
    assert found["00.txt"] == "cannot be read (it is a pipe, not a file)"
    assert "300,000,000 bytes" in found["01.txt"]
    assert found["02.txt"] == "cannot be read (it is a device, not a file)"
    assert len(found) == 3


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_file(tmp_path / "a", 5) == b"12345"
    with pytest.raises(OSError, match="5 bytes, and 4 are the most"):
        read_file(tmp_path / "a", 4)
    with pytest.raises(OSError, match="a folder, not a file"):
        read_file(tmp_path, CAPTION_BYTES)
    os.chdir(tmp_path)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s")
        with pytest.raises(OSError, match="a socket, not a file"):
            read_file(Path("s"), 5)


def test_a_folder_that_cannot_be_read_is_a_problem(
    tmp_path: Path, make_pictures: MakePictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pictures(tmp_path, 1)
    locked = make_pictures(tmp_path / "locked", 2, seed=3)
    real = os.scandir

    def scandir(path: Path) -> object:  # root may read everything
        if Path(path) == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"locked: cannot be read \(Permission denied\); make it readable"):
        scan(tmp_path).check()


# Names


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_are_the_same_however_their_accents_are_stored(
    tmp_path: Path, make_pictures: MakePictures, forms: tuple[str, str]
) -> None:
    make_pictures(tmp_path, 1)
    (tmp_path / "00.png").rename(tmp_path / unicodedata.normalize(forms[0], "café.png"))  # type: ignore[arg-type]
    (tmp_path / "00.txt").rename(tmp_path / unicodedata.normalize(forms[1], "café.txt"))  # type: ignore[arg-type]
    found = scan(tmp_path)
    found.check()
    assert (found.samples[0].caption, found.notes) == ("a disc number 0", ())


def test_a_name_that_is_not_utf8(tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path, 4)
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    try:
        (tmp_path / "03.png").rename(odd.with_name(odd.name + ".png"))
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    (problem,) = scan(tmp_path, validation=0.4).problems
    assert problem.where.encode().endswith(b"/caf\\xe9.png")
    (tmp_path / "03.txt").rename(odd.with_name(odd.name + ".txt"))
    found = scan(tmp_path, validation=0.4)
    found.check()
    assert len(found.held_out) == 2
    assert all(sample.where.encode() for sample in (*found.samples, *found.held_out))


@pytest.mark.parametrize("name", ["00.caption", "00.png.txt"])
def test_a_caption_of_another_name_is_suggested(
    tmp_path: Path, make_pictures: MakePictures, name: str
) -> None:
    make_pictures(tmp_path, 1)
    (tmp_path / "00.txt").rename(tmp_path / name)
    (problem,) = scan(tmp_path).problems
    assert problem.fix == f"rename {name} to 00.txt"


# What tunekit wrote itself


def test_a_run_below_the_pictures_is_no_data(tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path, 2)
    run = tmp_path / "runs" / "mine"
    make_pictures(run / "previews" / "step-000010", 2, seed=7)
    make_pictures(run / "class-1a2b3c4d", 2, seed=8)
    (run / "config.yaml").write_text("recipe: lora\n")
    found = scan(tmp_path)
    assert ids(found) == ["00.png", "01.png"]
    assert f"folders of runs, whose pictures tunekit has drawn (1): {run}" in said(found)
    assert len(ids(scan(run / "class-1a2b3c4d"))) == 2


def test_a_config_beside_pictures_makes_no_run(tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path / "cats", 2)
    (tmp_path / "cats" / "config.yaml").write_text("recipe: lora\n")
    assert len(ids(scan(tmp_path))) == 2


# DreamBooth


def test_captions_that_dreambooth_does_not_read_are_said(tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path, 2)
    found = dreambooth(tmp_path)
    assert [sample.caption for sample in found.samples] == ["sks", "sks"]
    assert "captions, as data.instance_prompt is that of all pictures (2)" in said(found)
    assert "recipe: lora" in said(found)


# Splits


def test_subfolders_that_are_splits_are_told_apart(tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path / "train", 2)
    make_pictures(tmp_path / "test", 3, seed=5)
    found = scan(tmp_path)
    assert ids(found) == ["train/00.png", "train/01.png"]
    assert f"pictures of another split (3): {tmp_path / 'test'}; data.split=test reads it" in said(found)
    assert len(ids(scan(tmp_path, split="test"))) == 3
    with pytest.raises(DataError, match=r"data\.split is 'val', and there are test, train"):
        scan(tmp_path, split="val").check()


@pytest.mark.parametrize(
    "folders", [("train", "cars"), ("trains", "test tubes"), ("test",), ("train", "test", ".")]
)
def test_other_subfolders_are_read_whatever_they_are_called(
    tmp_path: Path, make_pictures: MakePictures, folders: tuple[str, ...]
) -> None:
    for seed, name in enumerate(folders):
        make_pictures(tmp_path / name, 1, seed=seed)
    assert len(ids(scan(tmp_path))) == len(folders)


def test_a_split_without_effect_is_said(pictures: Path) -> None:
    assert "data.split=test has no effect" in said(scan(pictures, split="test"))


@pytest.mark.parametrize("key", ["image_column", "caption_column"])
def test_a_column_without_effect_is_said(pictures: Path, key: str) -> None:
    assert f"data.{key}=what has no effect" in said(scan(pictures, **{key: "what"}))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40) | st.text(max_size=20).map(str.encode))
def test_any_caption_is_a_text_or_a_problem(
    tmp_path: Path, make_pictures: MakePictures, content: bytes
) -> None:
    if not (tmp_path / "00.png").exists():
        make_pictures(tmp_path, 1)
    (tmp_path / "00.txt").write_bytes(content)
    found = scan(tmp_path)
    if found.samples:
        assert found.problems == ()
        assert found.samples[0].caption == " ".join(content.decode("utf-8-sig").split()) != ""
    else:
        (problem,) = found.problems
        assert "not UTF-8" in problem.what or problem.what == "the caption is empty"


def test_walking_leaves_no_file_out(tmp_path: Path) -> None:
    names = ["a.png", "b/c.jpg", "b/c.txt", "metadata.jsonl", "b/metadata.csv", "rows.parquet", "x.bin", "y"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    tree = walk(tmp_path)
    texts = [file for beside in tree.texts.values() for file in {*beside.values()}]
    found = [*tree.pictures, *texts, *tree.metadata, *tree.parquet, *tree.others]
    assert sorted(tree.id_of(file) for file in found) == sorted(names)
