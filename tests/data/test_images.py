"""Reading pictures: every way they come, every way they are broken."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tunekit.config import DataConfig, DreamboothData
from tunekit.data.decoding import decode
from tunekit.data.images import Scan, scan_data
from tunekit.data.shapes import Transform, bucket_for, buckets
from tunekit.errors import DataError

MakePictures = Callable[..., Path]


def scan(path: Path | str, **options: object) -> Scan:
    return scan_data(DataConfig(path=str(path), resolution=64, **options))  # type: ignore[arg-type]


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


# Decoding


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side; upright means a quarter turn clockwise
    upright = decode(encoded(image, exif=exif))
    assert upright.size == (2, 4)
    assert upright.getpixel((1, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    data = encoded(image.quantize() if mode == "P" else image.convert(mode))
    assert [decode(data).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 0)]


def test_grey_and_cmyk_become_rgb() -> None:
    assert decode(encoded(Image.new("L", (2, 2), 100))).getpixel((0, 0)) == (100, 100, 100)
    red = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF")).getpixel((3, 3))
    assert red == (255, 0, 0)


def test_sixteen_bit_grey_keeps_its_shades() -> None:
    ramp = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert [decode(encoded(ramp)).getpixel((x, 0))[0] for x in range(3)] == [0, 100, 255]  # type: ignore[index]


# Folders


def test_folder_is_read_recursively_with_captions(tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path / "a" / "b", 2)
    make_pictures(tmp_path / "c", 1, seed=5)
    make_pictures(tmp_path / ".hidden", 1, seed=6)
    (tmp_path / "c" / "00.png").rename(tmp_path / "c" / "00.PNG")
    (tmp_path / "c" / "00.txt").write_bytes("\ufeff  ein Kreis,\n größer ".encode())
    (tmp_path / "LICENSE.txt").write_text("not a caption")
    found = scan(tmp_path, caption_prefix="emoji of ")
    found.check()
    captions = {sample.id: sample.caption for sample in found.samples}
    assert captions == {
        "a/b/00.png": "emoji of a disc number 0",
        "a/b/01.png": "emoji of a disc number 1",
        "c/00.PNG": "emoji of ein Kreis, größer",
    }
    sample = found.samples[0]
    assert (sample.width, sample.height) == (64, 64)
    assert sample.open().size == (64, 64)


def test_all_problems_are_listed_at_once(tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path, 8)
    whole = (tmp_path / "00.png").read_bytes()
    (tmp_path / "00.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "01.txt").unlink()
    Image.new("1", (12000, 12000)).save(tmp_path / "02.png")
    (tmp_path / "03.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "05.png").write_bytes((tmp_path / "04.png").read_bytes())
    Image.new("RGB", (64, 20)).save(tmp_path / "06.png")
    (tmp_path / "07.txt").write_text("  \n")
    (tmp_path / "08.jpg").write_text("<html>404</html>")
    (tmp_path / "08.txt").write_text("a page")
    found = scan(tmp_path)
    expected = {
        "00.png": "cannot be read",
        "01.png": "no caption",
        "02.png": "decompression bomb",
        "03.txt": "not UTF-8 (byte 3)",
        "05.png": "same picture as",
        "06.png": "64x20 pixels is tiny",
        "07.txt": "caption is empty",
        "08.jpg": "cannot be read",
    }
    assert {Path(problem.where).name for problem in found.problems} == set(expected)
    assert [sample.id for sample in found.samples] == ["04.png"]
    with pytest.raises(DataError) as error:
        found.check()
    text = str(error.value)
    assert text.startswith("8 problems in the pictures:")
    for name, what in expected.items():
        line = next(line for line in text.splitlines() if f"/{name}:" in line)
        assert what in line
        assert ";" in line  # and what to do about it
    assert "BytesIO" not in text


def test_a_same_picture_in_another_format_is_a_duplicate(tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path, 1)
    Image.open(tmp_path / "00.png").save(tmp_path / "copy.bmp")
    (tmp_path / "copy.txt").write_text("another caption")
    assert [problem.what for problem in scan(tmp_path).problems] == [f"same picture as {tmp_path / '00.png'}"]


def test_missing_folder_names_the_nearest(tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path / "photos", 1)
    with pytest.raises(DataError, match=r'no such folder; did you mean "photos"\?'):
        scan(tmp_path / "photo").check()


def test_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(DataError, match="no pictures found"):
        scan(tmp_path).check()


def test_a_file_is_no_folder(tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path, 1)
    with pytest.raises(DataError, match="is a file"):
        scan(tmp_path / "00.png").check()


# Validation


def test_fraction_is_held_out_whatever_the_order(tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path, 10)
    found = scan(tmp_path, validation=0.2)
    assert (len(found.samples), len(found.held_out)) == (8, 2)
    assert not {s.id for s in found.samples} & {s.id for s in found.held_out}
    assert scan(tmp_path, validation=0.2).held_out == found.held_out


def test_fraction_that_leaves_nothing(tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path, 1)
    with pytest.raises(DataError, match="leaves one side empty"):
        scan(tmp_path, validation=0.5).check()


def test_validation_folder_must_not_repeat_training_pictures(
    tmp_path: Path, make_pictures: MakePictures
) -> None:
    make_pictures(tmp_path / "train", 3)
    make_pictures(tmp_path / "held", 2)  # the first two of the same
    make_pictures(tmp_path / "fresh", 2, seed=9)
    assert len(scan(tmp_path / "train", validation=str(tmp_path / "fresh")).held_out) == 2
    problems = scan(tmp_path / "train", validation=str(tmp_path / "held")).problems
    assert len(problems) == 2
    assert "same picture as a training picture" in problems[0].what


# Through datasets


def write_metadata(folder: Path, form: str, captions: dict[str, str | None]) -> None:
    rows = [{"file_name": name, "text": caption} for name, caption in captions.items()]
    if form == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with (folder / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_imagefolder_with_metadata(tmp_path: Path, make_pictures: MakePictures, form: str) -> None:
    make_pictures(tmp_path, 3, captions=False)
    write_metadata(tmp_path, form, {"00.png": "zero", "01.png": "one", "02.png": "two"})
    found = scan(tmp_path)
    found.check()
    assert {sample.id: sample.caption for sample in found.samples} == {
        "00.png": "zero",
        "01.png": "one",
        "02.png": "two",
    }
    assert found.samples[1].open().tobytes() == Image.open(tmp_path / "01.png").tobytes()


def test_imagefolder_problems_name_the_file(tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path, 3, captions=False)
    (tmp_path / "01.png").write_bytes((tmp_path / "01.png").read_bytes()[:60])
    write_metadata(tmp_path, "jsonl", {"00.png": "zero", "01.png": "one", "02.png": None})
    problems = {Path(problem.where).name: problem.what for problem in scan(tmp_path).problems}
    assert set(problems) == {"01.png", "02.png"}
    assert "cannot be read" in problems["01.png"]
    assert "no caption" in problems["02.png"]


def write_parquet(path: Path, pictures: Path, columns: tuple[str, str] = ("image", "text")) -> None:
    import datasets

    files = sorted(pictures.glob("*.png"))
    rows = {columns[0]: [str(file) for file in files], columns[1]: [f"row {i}" for i in range(len(files))]}
    features = datasets.Features({columns[0]: datasets.Image(), columns[1]: datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


@pytest.mark.parametrize("whole_folder", [False, True])
def test_parquet(tmp_path: Path, make_pictures: MakePictures, whole_folder: bool) -> None:
    pictures = make_pictures(tmp_path / "pictures", 3, captions=False)
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "train-00000.parquet", pictures)
    found = scan(tmp_path / "data" if whole_folder else tmp_path / "data" / "train-00000.parquet")
    found.check()
    assert [(sample.id, sample.caption) for sample in found.samples] == [
        ("00.png", "row 0"),
        ("01.png", "row 1"),
        ("02.png", "row 2"),
    ]
    assert found.samples[2].open().tobytes() == Image.open(pictures / "02.png").tobytes()


def test_columns_are_found_or_asked_for(tmp_path: Path, make_pictures: MakePictures) -> None:
    pictures = make_pictures(tmp_path / "pictures", 2, captions=False)
    file = tmp_path / "odd.parquet"
    write_parquet(file, pictures, ("photo", "what"))
    assert scan(file).samples[1].caption == "row 1"  # the only picture column and the only text column
    assert scan(file, image_column="photo", caption_column="what").samples[1].caption == "row 1"
    with pytest.raises(DataError, match=r"data.caption_column: no column 'wat'; did you mean \"what\""):
        scan(file, caption_column="wat").check()


def test_hub_id_that_cannot_be_loaded() -> None:
    with pytest.raises(DataError, match="someone/not-here: neither a folder here nor a data set"):
        scan("someone/not-here").check()


# DreamBooth


def test_dreambooth_needs_no_captions(tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path / "cat", 3, captions=False)
    make_pictures(tmp_path / "cats", 4, captions=False, seed=3)
    data = DreamboothData(
        path=str(tmp_path / "cat"),
        instance_prompt="a sks cat",
        class_prompt="a cat",
        class_path=str(tmp_path / "cats"),
        resolution=64,
    )
    found = scan_data(data)
    found.check()
    assert {sample.caption for sample in found.samples} == {"a sks cat"}
    assert {sample.caption for sample in found.prior} == {"a cat"}
    assert len(found.prior) == 4


# Shapes


def test_buckets_keep_the_area() -> None:
    for resolution, multiple in [(512, 8), (64, 8), (64, 16), (1024, 16)]:
        sizes = buckets(resolution, multiple)
        assert (resolution, resolution) in sizes
        assert all(width % multiple == 0 and height % multiple == 0 for width, height in sizes)
        assert all((height, width) in sizes for width, height in sizes)
        assert max(width * height for width, height in sizes) <= resolution**2


def test_nearest_bucket() -> None:
    assert bucket_for(1000, 1000, 512, 8, many=True) == (512, 512)
    wide = bucket_for(1920, 1080, 512, 8, many=True)
    assert wide == (640, 384)
    assert bucket_for(1080, 1920, 512, 8, many=True) == wide[::-1]
    assert bucket_for(1920, 1080, 512, 8, many=False) == (512, 512)


def test_transform_scales_covers_crops_and_mirrors() -> None:
    image = Image.fromarray(np.tile(np.arange(128, dtype=np.uint8)[None, :, None], (64, 1, 3)))
    full = Transform((64, 64)).apply(image)
    assert full.shape == (3, 64, 64)
    assert full.dtype == torch.float32
    columns = ((full[0, 0] + 1) * 127.5).round().tolist()
    assert columns == list(range(32, 96))
    left = Transform((64, 64), left=0.0).apply(image)
    assert ((left[0, 0] + 1) * 127.5).round().tolist() == list(range(64))
    assert torch.equal(Transform((64, 64), flip=True).apply(image), full.flip(-1))
    assert Transform((32, 16)).apply(image).shape == (3, 16, 32)
    black_and_white = Transform((2, 1)).apply(
        Image.fromarray(np.array([[[0] * 3, [255] * 3]], dtype=np.uint8))
    )
    assert black_and_white[0].tolist() == [[-1.0, 1.0]]


# Many pictures


def test_of_many_problems_of_a_kind_twenty_are_shown(tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path, 30, captions=False)
    for index in range(3):
        (tmp_path / f"0{index}.png").write_bytes(b"no picture")
    with pytest.raises(DataError) as error:
        scan(tmp_path).check()
    lines = str(error.value).splitlines()
    assert lines[0] == "33 problems in the pictures:"
    assert sum("cannot be read as a picture" in line for line in lines) == 3
    assert sum("no caption: " in line for line in lines) == 20
    assert lines[-1].startswith("  and 10 more: no caption; write what each picture shows into a .txt file")
    assert len(scan(tmp_path).problems) == 33


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """How often a picture was decoded; a cache of our own, in which everything is worth remembering."""
    from tunekit.data import images, remembered

    made: list[int] = []

    def counted(data: bytes) -> Image.Image:
        made.append(len(data))
        return decode(data)

    monkeypatch.setattr(images, "decode", counted)
    monkeypatch.setattr(remembered, "_SETTLED_NS", -(10**12))
    monkeypatch.setattr(remembered, "_WORTH_SECONDS", -1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return made


def test_a_picture_is_decoded_once_until_its_file_changes(
    tmp_path: Path, make_pictures: MakePictures, looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_pictures(tmp_path / "photos", 4)
    first = scan(folder)
    assert len(looks) == 4
    assert scan(folder).samples == first.samples
    monkeypatch.chdir(tmp_path)
    assert [sample.content for sample in scan("photos").samples] == [s.content for s in first.samples]
    assert len(looks) == 4
    # Another picture of the same size in bytes, with the same time: only the time of that change tells.
    file, other = folder / "01.png", folder / "02.png"
    swapped, then = other.read_bytes(), file.stat()
    file.write_bytes(swapped + bytes(max(0, then.st_size - len(swapped))))
    os.utime(file, ns=(then.st_atime_ns, then.st_mtime_ns))
    (problem,) = scan(folder).problems
    assert "same picture as" in problem.what
    assert len(looks) == 5


@pytest.mark.parametrize("way", ["damaged", "unwritable"])
def test_what_is_remembered_may_be_lost(
    tmp_path: Path, make_pictures: MakePictures, looks: list[int], way: str
) -> None:
    folder = make_pictures(tmp_path / "photos", 2)
    if way == "unwritable":
        (tmp_path / "cache").write_text("in the way")
    first = scan(folder)
    for file in (tmp_path / "cache").rglob("*.json"):
        file.write_text('{"sha256": "", "value": {"00.png": [1]}}')
    assert scan(folder).samples == first.samples
    assert len(looks) == 4


def test_progress_is_shown(pictures: Path) -> None:
    from tunekit.progress import Phase, Progress

    began: list[Phase] = []

    class Seen(Progress):
        def _begin(self, phase: Phase) -> Phase:
            began.append(phase)
            return phase

    scan_data(DataConfig(path=str(pictures), resolution=64), progress=Seen(quiet=True))
    assert [(phase.title.split()[0], phase.done, phase.total) for phase in began] == [
        ("looking", 0, None),
        ("looking", 4, 4),
    ]


# Crops


def test_pictures_that_lose_most_of_themselves_are_named(tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path, 2, (96, 64))
    Image.new("RGB", (1200, 100)).save(tmp_path / "pano.png")
    (tmp_path / "pano.txt").write_text("a long wall")
    (note,) = scan(tmp_path).notes
    assert note.startswith("1 picture loses more than half to the crop")
    assert "pano.png (1200x100: 20% is kept, as 96x40)" in note
    data = DreamboothData(path=str(tmp_path), instance_prompt="sks", resolution=64)
    assert "8% is kept, as 64x64" in scan_data(data).notes[-1]


# Captions


@pytest.mark.parametrize(
    ("prefix", "caption"),
    [("sks style", "sks style a disc number 0"), ("sks, ", "sks, a disc number 0"), ("", "a disc number 0")],
)
def test_a_prefix_stands_apart_from_the_caption(
    tmp_path: Path, make_pictures: MakePictures, prefix: str, caption: str
) -> None:
    make_pictures(tmp_path, 1)
    assert scan(tmp_path, caption_prefix=prefix).samples[0].caption == caption
