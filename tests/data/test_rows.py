"""Metadata files and parquet files, as people and programs write them."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tunekit.config import DataConfig, DreamboothData
from tunekit.data.images import Scan, scan_data
from tunekit.errors import DataError

MakePictures = Callable[..., Path]


def scan(path: Path | str, **options: object) -> Scan:
    return scan_data(DataConfig(path=str(path), resolution=64, **options))  # type: ignore[arg-type]


def captions(found: Scan) -> dict[str, str]:
    found.check()
    return {sample.id: sample.caption for sample in found.samples}


def write_rows(folder: Path, rows: list[dict[str, Any]], form: str = "jsonl") -> Path:
    file = folder / f"metadata.{form}"
    if form == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif form == "csv":
        with file.open("w", newline="", encoding="utf-8") as opened:
            writer = csv.DictWriter(opened, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


def write_parquet(file: Path, pictures: list[Path], texts: list[Any], **options: Any) -> Path:
    import pyarrow
    import pyarrow.parquet

    cells = [{"bytes": path.read_bytes(), "path": path.name} for path in pictures]
    file.parent.mkdir(exist_ok=True, parents=True)
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "text": texts}), file, **options)
    return file


# Metadata files


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_names_of_files_never_decide_a_split(tmp_path: Path, make_pictures: MakePictures, form: str) -> None:
    make_pictures(tmp_path, 4, captions=False)
    names = ["photo of a cat", "photo of a train", "test tubes", "eval [2024]"]
    for index, name in enumerate(names):
        (tmp_path / f"0{index}.png").rename(tmp_path / f"{name}.png")
    write_rows(tmp_path, [{"file_name": f"{name}.png", "text": name} for name in names], form)
    assert captions(scan(tmp_path)) == {f"{name}.png": name for name in names}
    data = DreamboothData(path=str(tmp_path), instance_prompt="sks", resolution=64)
    assert captions(scan_data(data)) == {f"{name}.png": "sks" for name in names}
    assert any("data.instance_prompt is that of all" in line for line in scan_data(data).notes)


def test_a_metadata_file_counts_from_its_own_folder(tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path / "train" / "deep", 2, captions=False)
    rows = [{"file_name": f"deep/0{index}.png", "text": f"row {index}"} for index in (1, 0)]
    write_rows(tmp_path / "train", rows)
    expected = {"train/deep/01.png": "row 1", "train/deep/00.png": "row 0"}
    assert list(captions(scan(tmp_path)).items()) == list(expected.items())


def test_splits_with_metadata_of_their_own(tmp_path: Path, make_pictures: MakePictures) -> None:
    for seed, split in enumerate(("train", "test")):
        make_pictures(tmp_path / split, 1, captions=False, seed=seed)
        write_rows(tmp_path / split, [{"file_name": "00.png", "text": split}])
    assert captions(scan(tmp_path)) == {"train/00.png": "train"}
    assert captions(scan(tmp_path, split="test")) == {"test/00.png": "test"}


def test_relative_and_absolute_paths_are_one_data_set(
    tmp_path: Path, make_pictures: MakePictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pictures(tmp_path / "photos", 3, captions=False)
    write_rows(tmp_path / "photos", [{"file_name": f"0{i}.png", "text": f"row {i}"} for i in range(3)])
    monkeypatch.chdir(tmp_path)
    ways = ["photos", "./photos", "photos/", "../" + tmp_path.name + "/photos", str(tmp_path / "photos")]
    assert [captions(scan(way)) for way in ways] == [{f"0{i}.png": f"row {i}" for i in range(3)}] * len(ways)


def test_metadata_that_was_edited_within_one_tick_is_read_again(
    tmp_path: Path, make_pictures: MakePictures
) -> None:
    make_pictures(tmp_path, 1, captions=False)
    for text in ("before", "after!"):
        os.utime(
            write_rows(tmp_path, [{"file_name": "00.png", "text": text}]), (1_700_000_000, 1_700_000_000)
        )
        assert captions(scan(tmp_path)) == {"00.png": text}


def test_pictures_that_no_row_names_are_said(tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path, 3)
    write_rows(tmp_path, [{"file_name": "01.png", "text": "one"}])
    found = scan(tmp_path)
    assert captions(found) == {"01.png": "one"}
    text = "\n".join(found.notes)
    assert (
        f"pictures that no row of metadata.jsonl names (2): {tmp_path / '00.png'}, {tmp_path / '02.png'}"
        in text
    )
    assert "captions beside pictures that a metadata file decides about" in text


def test_folders_beside_a_metadata_file_have_captions_of_their_own(
    tmp_path: Path, make_pictures: MakePictures
) -> None:
    make_pictures(tmp_path / "a", 1, captions=False)
    make_pictures(tmp_path / "b", 1, seed=3)
    write_rows(tmp_path / "a", [{"file_name": "00.png", "text": "row"}])
    assert captions(scan(tmp_path)) == {"a/00.png": "row", "b/00.png": "a disc number 0"}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("sub\\00.png", "sub/00.png"),
        ("./sub/../sub/00.png", "sub/00.png"),
        ("{folder}/sub/00.png", "sub/00.png"),
        ("sub/01.png", "names 'sub/01.png', which is not there"),
        ("../outside.png", "which is outside the folder"),
        ("/etc/hostname", "which is outside the folder"),
        ("", "no file name in file_name"),
        ("a\0b", "no file name in file_name"),
        (5, "no file name in file_name"),
        (None, "no file name in file_name"),
    ],
)
def test_file_names(tmp_path: Path, make_pictures: MakePictures, name: Any, found: str) -> None:
    folder = tmp_path / "photos"
    make_pictures(folder / "sub", 1, captions=False)
    make_pictures(tmp_path, 1)
    (tmp_path / "00.png").rename(tmp_path / "outside.png")
    name = name.replace("{folder}", str(folder)) if isinstance(name, str) else name
    write_rows(folder, [{"file_name": name, "text": "row"}])
    made = scan(folder)
    if found.endswith(".png"):
        assert captions(made) == {found: "row"}
    else:
        (problem,) = made.problems
        assert problem.where == f"{folder / 'metadata.jsonl'}:1"
        assert found in problem.what


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (["a cat", "one cat"], "is a list of 2, not a text"),
        (["a cat"], "is a list of 1, not a text"),
        (5, "is of type int, not a text"),
        ({"en": "cat"}, "is of type dict, not a text"),
        (True, "is of type bool, not a text"),
        ("x" * 2_000_000, "has 2,000,000 characters"),
        ("\ud800", "what is no text"),
    ],
)
def test_a_caption_that_is_no_text_is_a_problem_of_its_line(
    tmp_path: Path, make_pictures: MakePictures, value: Any, what: str
) -> None:
    make_pictures(tmp_path, 2, captions=False)
    write_rows(
        tmp_path, [{"file_name": "00.png", "caption": "good"}, {"file_name": "01.png", "caption": value}]
    )
    for options in ({}, {"caption_column": "caption"}):
        (problem,) = scan(tmp_path, **options).problems
        assert problem.where == f"{tmp_path / 'metadata.jsonl'}:2"
        assert what in problem.what


@pytest.mark.parametrize("value", ["", None, "  \n"])
def test_a_missing_caption_is_a_problem_of_its_picture(
    tmp_path: Path, make_pictures: MakePictures, value: Any
) -> None:
    make_pictures(tmp_path, 2, captions=False)
    write_rows(tmp_path, [{"file_name": "00.png", "text": "good"}, {"file_name": "01.png", "text": value}])
    (problem,) = scan(tmp_path).problems
    assert (problem.where, problem.what) == (str(tmp_path / "01.png"), "no caption in column 'text'")


def test_a_picture_that_two_rows_name(tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path, 1, captions=False)
    write_rows(tmp_path, [{"file_name": "00.png", "text": "a"}, {"file_name": "./00.png", "text": "b"}])
    assert [str(problem) for problem in scan(tmp_path).problems] == [
        f"{tmp_path / 'metadata.jsonl'}:2: names 00.png once more; remove one of the rows"
    ]


@pytest.mark.parametrize(
    ("form", "content", "what"),
    [
        ("jsonl", b'{"file_name": "00.png", "text": "a"}\n{"file_name"', "jsonl:2: no JSON"),
        ("jsonl", b"[" * 100_000, "jsonl:1: no JSON"),
        ("jsonl", b'["00.png", "a"]', "jsonl:1: no JSON object"),
        ("jsonl", b'{"file_name": "00.png", "text": "caf\xe9"}', "jsonl:1: not UTF-8"),
        ("jsonl", b"", "has no rows"),
        ("csv", b"file_name,text\n00.png,a,b\n", "csv:2: more fields"),
        ("csv", b'file_name,text\n00.png,"a', "no CSV"),
        ("csv", b"file_name,text\n00.png,caf\xe9\n", "not UTF-8"),
        ("csv", b"file_name;text\n00.png;a\n", "has no column file_name (columns: file_name;text)"),
        ("parquet", b"PAR1 and no more", "cannot be read"),
    ],
)
def test_a_damaged_metadata_file_is_named_with_its_line(
    tmp_path: Path, make_pictures: MakePictures, form: str, content: bytes, what: str
) -> None:
    make_pictures(tmp_path, 1, captions=False)
    (tmp_path / f"metadata.{form}").write_bytes(content)
    with pytest.raises(DataError) as error:
        scan(tmp_path).check()
    assert what in str(error.value)


def test_a_metadata_file_that_is_none(tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path, 1, captions=False)
    os.mkfifo(tmp_path / "metadata.jsonl")
    with pytest.raises(DataError, match=r"metadata\.jsonl: cannot be read \(it is a pipe, not a file\)"):
        scan(tmp_path).check()


def test_columns_of_other_names(tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path, 1, captions=False)
    write_rows(tmp_path, [{"photo_file_name": "00.png", "what": "a disc", "number": 3}])
    assert captions(scan(tmp_path)) == {"00.png": "a disc"}
    assert captions(scan(tmp_path, image_column="photo", caption_column="what")) == {"00.png": "a disc"}
    with pytest.raises(DataError, match=r"data\.caption_column: no column 'wat'; did you mean .what."):
        scan(tmp_path, caption_column="wat").check()
    with pytest.raises(
        DataError, match=r"data\.image_column: no column 'img'; columns: photo_file_name, what"
    ):
        scan(tmp_path, image_column="img").check()


def test_utf8_marks_quotes_and_line_ends(tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path, 2, captions=False)
    text = 'file_name,text\r\n00.png,"größer, ""x""\nand more"\r\n01.png,NA\r\n'
    (tmp_path / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert captions(scan(tmp_path)) == {"00.png": 'größer, "x" and more', "01.png": "NA"}


NAMES = st.sampled_from(
    ["00.png", "01.png", "no.png", "../00.png", "/etc/passwd", "", "a\0", "\udce9", "é.png"]
)
VALUES = st.one_of(
    NAMES, st.text(max_size=8), st.none(), st.integers(), st.floats(), st.lists(st.text(max_size=3))
)
ROWS = st.lists(
    st.dictionaries(st.sampled_from(["file_name", "text", "caption", "x_file_name", "\ud800"]), VALUES),
    max_size=4,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, junk=st.binary(max_size=12), at=st.integers(0, 200), form=st.sampled_from(["jsonl", "csv"]))
def test_any_metadata_gives_samples_or_problems(
    tmp_path: Path, make_pictures: MakePictures, rows: list[dict[str, Any]], junk: bytes, at: int, form: str
) -> None:
    if not (tmp_path / "00.png").exists():
        make_pictures(tmp_path, 2, captions=False)
    for file in tmp_path.glob("metadata.*"):
        file.unlink()
    lines = [json.dumps(row) if form == "jsonl" else ",".join(map(str, row.values())) for row in rows]
    data = "\n".join(["file_name,text"] * (form == "csv") + lines).encode("utf-8", "surrogatepass")
    (tmp_path / f"metadata.{form}").write_bytes(data[:at] + junk + data[at:])
    found = scan(tmp_path)
    assert found.samples or found.problems
    for sample in found.samples:
        assert sample.id in {"00.png", "01.png"}
        assert sample.caption.encode()
    assert all(str(problem).encode() for problem in found.problems)


# Parquet files


def test_splits_of_parquet_files(tmp_path: Path, make_pictures: MakePictures) -> None:
    pictures = sorted(make_pictures(tmp_path / "p", 3, captions=False).glob("*.png"))
    for index, split in enumerate(("train", "test", "validation")):
        write_parquet(tmp_path / "d" / "data" / f"{split}-00000-of-00001.parquet", [pictures[index]], [split])
    for split in ("train", "test", "validation"):
        assert list(captions(scan(tmp_path / "d", split=split)).values()) == [split]
    assert "data.split=test reads them" in "\n".join(scan(tmp_path / "d").notes)
    with pytest.raises(DataError, match=r"data\.split is 'val', and there are test, train, validation"):
        scan(tmp_path / "d", split="val").check()
    alone = tmp_path / "d" / "data" / "test-00000-of-00001.parquet"
    assert captions(scan(alone)) == {"01.png": "test"}
    assert "data.split=test has no effect" in "\n".join(scan(alone, split="test").notes)


@pytest.mark.parametrize(
    "name", ["photos.parquet", "trains and tests.parquet", "0000.parquet", "latest.parquet"]
)
def test_other_names_of_parquet_files_say_no_split(
    tmp_path: Path, make_pictures: MakePictures, name: str
) -> None:
    pictures = sorted(make_pictures(tmp_path / "p", 2, captions=False).glob("*.png"))
    write_parquet(tmp_path / "d" / name, pictures, ["a", "b"])
    assert captions(scan(tmp_path / "d")) == {"00.png": "a", "01.png": "b"}


def test_rows_are_found_in_any_row_group(tmp_path: Path, make_pictures: MakePictures) -> None:
    pictures = sorted(make_pictures(tmp_path / "p", 5, captions=False).glob("*.png"))
    file = write_parquet(tmp_path / "a.parquet", pictures, list("abcde"), row_group_size=2)
    found = scan(file)
    assert list(captions(found).values()) == list("abcde")
    for index in (4, 0, 3, 1, 2):
        assert found.samples[index].open().tobytes() == Image.open(pictures[index]).tobytes()


def test_damaged_rows_and_files_of_parquet(tmp_path: Path, make_pictures: MakePictures) -> None:
    import pyarrow
    import pyarrow.parquet

    (picture,) = make_pictures(tmp_path / "p", 1, captions=False).glob("*.png")
    os.mkfifo(tmp_path / "pipe.png")
    cells = [
        {"bytes": picture.read_bytes(), "path": None},
        {"bytes": None, "path": str(tmp_path / "pipe.png")},
        {"bytes": None, "path": "/dev/zero"},
        {"bytes": b"", "path": None},
        {"bytes": b"%!PS-Adobe-3.0", "path": "a.png"},
        None,
    ]
    table = pyarrow.table({"image": cells, "text": ["a", "b", "c", "d", "e", "x" * 2_000_000]})
    file = tmp_path / "d" / "rows.parquet"
    file.parent.mkdir()
    pyarrow.parquet.write_table(table, file)
    (tmp_path / "d" / "cut.parquet").write_bytes(file.read_bytes()[:-9])
    os.mkfifo(tmp_path / "d" / "pipe.parquet")
    found = scan(tmp_path / "d")
    assert len(found.samples) == 1
    problems = [str(problem).replace(str(tmp_path / "d"), "") for problem in found.problems]
    for start in (
        "/cut.parquet: no parquet",
        "/pipe.parquet: cannot be read (it is a pipe",
        "/rows.parquet[1]: cannot be read (it is a pipe",
        "/rows.parquet[2]: cannot be read (it is a device",
        "/rows.parquet[3]: cannot be read (the row has no picture",
        "/rows.parquet[4]: cannot be read as a picture",
        "/rows.parquet[5]: the caption has 2,000,000 characters",
    ):
        assert [line for line in problems if line.startswith(start)], (start, problems)
