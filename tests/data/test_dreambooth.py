"""Class pictures: drawn by the base where they are missing, the same however often it was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from PIL import Image

from tunekit import families
from tunekit.config import DreamboothData, ModelConfig
from tunekit.data.dreambooth import Draw, class_folder, class_pictures, class_sampling
from tunekit.data.images import Sample
from tunekit.errors import DataError, OutputError
from tunekit.runtime import generate, torch_runtime

MakePictures = Callable[..., Path]


def data(**options: object) -> DreamboothData:
    return DreamboothData(
        path="x",
        instance_prompt="a sks disc",
        class_prompt="a disc",
        resolution=32,
        class_steps=2,
        **{"class_pictures": 6, **options},  # type: ignore[arg-type]
    )


class Base:
    """Draws with the tiny model, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.runtime = torch_runtime(families.get("sd15"), families.get("sd15").tiny())
        self.seeds: list[int] = []
        self.stop_after = 99

    def drawing(self) -> Draw:
        def draw(*, seeds: Sequence[int]) -> list[Image.Image]:
            if len(self.seeds) >= self.stop_after:
                raise KeyboardInterrupt
            self.seeds += seeds
            return generate(self.runtime, ["a disc"], class_sampling(data()), seeds=seeds)

        return draw


def pictures(folder: Path, base: Base, config: DreamboothData) -> list[Sample]:
    return class_pictures(
        config, folder, base.drawing, seed=0, accelerator=Accelerator(cpu=True), say=lambda line: None
    )


def test_missing_pictures_are_drawn_and_found_again(tmp_path: Path) -> None:
    base = Base()
    first = pictures(tmp_path / "class", base, data())
    assert [sample.id for sample in first] == [f"drawn-{i:04d}.png" for i in range(6)]
    assert {sample.caption for sample in first} == {"a disc"}
    assert len(set(base.seeds)) == 6
    assert pictures(tmp_path / "class", base, data()) == first
    assert len(base.seeds) == 6
    more = pictures(tmp_path / "class", base, data(class_pictures=7))
    assert more[:6] == first


def test_an_interrupted_drawing_continues_with_the_same_pictures(tmp_path: Path) -> None:
    whole = pictures(tmp_path / "whole", Base(), data())
    base = Base()
    base.stop_after = 4
    with pytest.raises(KeyboardInterrupt):
        pictures(tmp_path / "cut", base, data())
    assert len(list((tmp_path / "cut").iterdir())) == 4
    (tmp_path / "cut" / "drawn-0002.png").unlink()
    continued = pictures(tmp_path / "cut", Base(), data())
    assert [sample.content for sample in continued] == [sample.content for sample in whole]


def test_own_class_pictures_are_used_first(tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path, 4, (32, 32), captions=False)
    config = data(class_path=str(tmp_path))
    base = Base()
    found = pictures(
        class_folder(config, tmp_path, model=ModelConfig(family="sd15", source="tiny"), seed=0), base, config
    )
    assert len(base.seeds) == 2
    assert {sample.id for sample in found} == {
        *(f"{i:02d}.png" for i in range(4)),
        "drawn-0000.png",
        "drawn-0001.png",
    }
    assert len(pictures(tmp_path, base, data(class_path=str(tmp_path), class_pictures=3))) == 3


def test_broken_class_picture_is_named(tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path, 6, (32, 32), captions=False)
    (tmp_path / "03.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"03\.png: cannot be read"):
        pictures(tmp_path, Base(), data())


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "class").write_text("in the way")
    with pytest.raises(OutputError):
        pictures(tmp_path / "class", Base(), data())


def test_folder_is_named_after_what_the_pictures_depend_on(tmp_path: Path) -> None:
    tiny = ModelConfig(family="sd15", source="tiny")

    def folder(config: DreamboothData, model: ModelConfig = tiny, seed: int = 0) -> Path:
        return class_folder(config, tmp_path, model=model, seed=seed)

    usual = folder(data())
    assert usual == folder(data(class_pictures=9, prior_weight=0.5))
    others = [
        folder(data(class_guidance=2.0)),
        folder(data(), ModelConfig(family="sd15", source="a/b")),
        folder(data(), seed=1),
    ]
    assert len({usual, *others}) == 4


class Rank:
    """One of two processes, each on a machine of its own."""

    num_processes = 2
    is_local_main_process = True

    def __init__(self, number: int) -> None:
        self.process_index = number
        self.is_main_process = number == 0

    def wait_for_everyone(self) -> None:
        """The other one is on another disk, and nothing of it is to be seen here."""


def test_two_machines_each_have_all_pictures(tmp_path: Path) -> None:
    """Each process draws its share; what the other drew is on the other's disk, and was not found."""
    whole = pictures(tmp_path / "whole", Base(), data())
    for number in range(2):
        accelerator: Any = Rank(number)
        found = class_pictures(
            data(),
            tmp_path / str(number),
            Base().drawing,
            seed=0,
            accelerator=accelerator,
            say=lambda line: None,
        )
        assert [sample.content for sample in found] == [sample.content for sample in whole]
