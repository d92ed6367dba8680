"""What part of which picture a sample is: found with the picture, kept with its latent, told to SDXL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image, ImageOps
from torch import Tensor

from tunekit import families
from tunekit.config import DataConfig, SamplingConfig
from tunekit.data.cache import CachedDataset, Draws, Encoder, Stream, frame_of
from tunekit.data.images import Sample, scan_data
from tunekit.data.shapes import CROPS, Transform
from tunekit.diffusion.noise import sample_generator
from tunekit.families import Frame
from tunekit.runtime import torch_runtime

MakePictures = Callable[..., Path]
FAMILY = families.get("sdxl")
SIDEWAYS = 6  # EXIF: to be turned clockwise by a quarter


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return FAMILY.tiny()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures whose red says the column and whose green says the row: wide, tall, turned by EXIF, exact."""
    folder = tmp_path_factory.mktemp("frames")
    for name, (width, height) in {
        "wide": (100, 60),
        "tall": (48, 112),
        "turned": (100, 60),
        "exact": (32, 32),
    }.items():
        y, x = np.mgrid[0:height, 0:width]
        values = np.stack([255 * x / width, 255 * y / height, np.zeros_like(x)], axis=-1)
        image = Image.fromarray(values.astype(np.uint8))
        exif = Image.Exif()
        if name == "turned":
            exif[0x0112] = SIDEWAYS
        image.save(folder / f"{name}.png", exif=exif)
        (folder / f"{name}.txt").write_text(name)
    return folder


def found(pictures: Path) -> dict[str, Sample]:
    scan = scan_data(DataConfig(path=str(pictures), resolution=32))
    scan.check()
    return {sample.id.removesuffix(".png"): sample for sample in scan.samples}


def encoder(pipeline: Any, cache: Path) -> Encoder:
    return Encoder(FAMILY, pipeline, cache=cache, accelerator=Accelerator(cpu=True), say=lambda line: None)


def cut_again(image: Image.Image, frame: Frame, *, flip: bool) -> Tensor:
    """The pixels that a frame speaks of, found from the picture and the frame alone."""
    (height, width), (top, left) = frame.size, frame.crop
    image = ImageOps.mirror(image) if flip else image
    scale = max(height / image.height, width / image.width)
    scaled = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize(scaled, Image.Resampling.LANCZOS).crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


# Frames of pictures


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        # 100 x 60 becomes 53 x 32, of which 10 columns are left out on the left (a half of 21, rounded).
        ("wide", (32, 32), Frame((60, 100), (0, 10), (32, 32))),
        ("wide", (40, 24), Frame((60, 100), (0, 0), (24, 40))),
        # Stored lying on its side: upright it is 60 wide and 100 high.
        ("turned", (32, 32), Frame((100, 60), (10, 0), (32, 32))),
        ("tall", (24, 40), Frame((112, 48), (8, 0), (40, 24))),
        ("exact", (32, 32), Frame((32, 32), (0, 0), (32, 32))),
    ],
)
def test_a_frame_by_hand(pictures: Path, name: str, size: tuple[int, int], expected: Frame) -> None:
    sample = found(pictures)[name]
    assert frame_of(sample, Transform(size)) == expected
    height, width = expected.size
    assert Transform(size).apply(sample.open()).shape == (3, height, width)


def test_a_row_is_original_crop_and_size() -> None:
    frame = Frame((100, 60), (10, 3), (32, 24))
    assert frame.row.tolist() == [100, 60, 10, 3, 32, 24]
    assert frame.row.dtype == torch.float32
    assert frame.rows(3).tolist() == [frame.row.tolist()] * 3
    assert Frame.whole(64, 48).row.tolist() == [64, 48, 0, 0, 64, 48]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("left", "top"), [(0.5, 0.5), (0.0, 0.0), (1.0, 1.0), (0.27, 0.81)])
@pytest.mark.parametrize("name", ["wide", "tall", "turned", "exact"])
def test_a_frame_finds_the_same_pixels(
    pictures: Path, name: str, left: float, top: float, flip: bool
) -> None:
    """Of a mirrored picture as if it had been mirrored first, as the scripts of diffusers do."""
    sample = found(pictures)[name]
    for size in ((32, 32), (40, 24), (24, 40)):
        transform = Transform(size, left, top, flip)
        again = cut_again(sample.open(), frame_of(sample, transform), flip=flip)
        assert (transform.apply(sample.open()) - again).abs().max() <= 2 / 127.5


# Kept with the latent


@pytest.mark.parametrize("buckets", [False, True])
def test_frames_come_with_the_latents(pipeline: Any, pictures: Path, tmp_path: Path, buckets: bool) -> None:
    data = DataConfig(path=str(pictures), resolution=32, buckets=buckets)
    made = encoder(pipeline, tmp_path).dataset(list(found(pictures).values()), data, seed=0)
    for index, sample in enumerate(made.samples):
        frame = made.beside(index)["frame"]
        height, width = made.shapes[index]
        assert frame.tolist()[:2] == [sample.height, sample.width]
        assert frame.tolist()[4:] == [height, width]
        assert made.moments(index)[0].shape == FAMILY.latent_shape(pipeline, height, width)
    assert {made.shapes[i] for i in range(4)} == ({(24, 40), (40, 24), (32, 32)} if buckets else {(32, 32)})


def test_variants_have_frames_of_their_own(pipeline: Any, pictures: Path, tmp_path: Path) -> None:
    """Of a random crop and a flip; the same from a cache that is there already."""
    data = DataConfig(path=str(pictures), resolution=32, buckets=False, crop="random", flip=True)
    sample = found(pictures)["wide"]
    for _ in range(2):
        made = encoder(pipeline, tmp_path).dataset([sample], data, seed=3)
        assert made.variants(0) == CROPS * 2
        rows = [made.beside(0, variant)["frame"] for variant in range(CROPS * 2)]
        for cut in range(CROPS):
            place = float(torch.rand(2, generator=sample_generator(3, cut, sample.id, "crop"))[0])
            left = round(place * (53 - 32))
            assert rows[2 * cut].tolist() == [60, 100, 0, left, 32, 32]
            assert rows[2 * cut + 1].tolist() == [60, 100, 0, 53 - 32 - left, 32, 32]
    assert len({tuple(row.tolist()) for row in rows}) > CROPS


def test_what_is_drawn_of_a_sample_belongs_together(pipeline: Any, pictures: Path, tmp_path: Path) -> None:
    """The frame of a row is that of the very variant whose latents it has."""
    data = DataConfig(path=str(pictures), resolution=32, crop="random", flip=True)
    made = encoder(pipeline, tmp_path).dataset(list(found(pictures).values()), data, seed=3)
    objective = FAMILY.objective(pipeline)
    seen = set()
    for index, sample in enumerate(made.samples):
        for epoch in range(8):
            batch = made.batch(index, seed=0, epoch=epoch, objective=objective, draws=Draws())
            drawn = torch.randn(
                batch.latents.shape[1:], generator=sample_generator(0, epoch, sample.id, "latent")
            )
            fitting = [
                variant
                for variant in range(made.variants(index))
                for mean, std in (made.moments(index, variant),)
                if torch.equal(batch.latents[0], mean + std * drawn)
            ]
            assert fitting
            assert any(torch.equal(batch.frame[0], made.beside(index, v)["frame"]) for v in fitting)
            seen |= {(index, variant) for variant in fitting}
    assert len(seen) > 10


def test_held_out_pictures_have_frames_too(pipeline: Any, pictures: Path, tmp_path: Path) -> None:
    data = DataConfig(path=str(pictures), resolution=32, crop="random", flip=True)
    made = encoder(pipeline, tmp_path).dataset(list(found(pictures).values()), data, seed=0, fixed=True)
    for batch in made.validation(FAMILY.objective(pipeline), timesteps=2, micro_batch=3):
        for name, frame in zip(batch.ids, batch.frame, strict=True):
            index = next(i for i, sample in enumerate(made.samples) if sample.id == name)
            assert torch.equal(frame, made.beside(index)["frame"])


# Told to SDXL


def time_ids(pipeline: Any, original: Any, crop: Any, size: Any) -> Tensor:
    """As diffusers' pipeline and its training scripts compute them."""
    dim = pipeline.text_encoder_2.config.projection_dim
    return pipeline._get_add_time_ids(original, crop, size, torch.float32, text_encoder_projection_dim=dim)


def told(dataset: CachedDataset, index: int, variant: int) -> Tensor:
    row = dataset.beside(index, variant)["frame"]
    encoded = {
        key: value[None] for key, value in dataset.conditioning(dataset.samples[index].caption).items()
    }
    return FAMILY.conditioning(encoded, row[None])["time_ids"]


@pytest.mark.parametrize("buckets", [False, True])
def test_time_ids_are_those_of_diffusers(
    pipeline: Any, pictures: Path, tmp_path: Path, buckets: bool
) -> None:
    """Of turned, cut, mirrored and bucketed pictures; (height, width) and (top, left), as they have it."""
    data = DataConfig(path=str(pictures), resolution=32, buckets=buckets, crop="random", flip=True)
    made = encoder(pipeline, tmp_path).dataset(list(found(pictures).values()), data, seed=0)
    cut = 0
    for index, sample in enumerate(made.samples):
        upright = sample.open()
        for variant in range(made.variants(index)):
            frame = made.beside(index, variant)["frame"].tolist()
            top, left = int(frame[2]), int(frame[3])
            expected = time_ids(pipeline, (upright.height, upright.width), (top, left), made.shapes[index])
            assert torch.equal(told(made, index, variant), expected)
            cut += top + left > 0
    assert cut >= 8


@torch.no_grad()
def test_the_denoiser_is_told_them(pipeline: Any, pictures: Path, tmp_path: Path) -> None:
    """Through the task's own way: frames of rows become time_ids, and change what is predicted."""
    data = DataConfig(path=str(pictures), resolution=32, buckets=False)
    made = encoder(pipeline, tmp_path).dataset(list(found(pictures).values()), data, seed=0)
    (batch,) = Stream(made, FAMILY.objective(pipeline), Draws(batch_size=4)).step(0, 0, 1)
    conditioning = FAMILY.conditioning(batch.conditioning, batch.frame)
    assert torch.equal(conditioning["time_ids"], batch.frame)
    network = pipeline.unet
    mine = FAMILY.denoise(network, batch.latents, batch.timesteps, conditioning)
    whole = FAMILY.conditioning(batch.conditioning, Frame.whole(32, 32).rows(4))
    other = FAMILY.denoise(network, batch.latents, batch.timesteps, whole)
    changed = (mine - other).abs().amax((1, 2, 3)) > 1e-4
    assert [name for name, differs in zip(batch.ids, changed, strict=True) if not differs] == ["exact.png"]


def test_pictures_are_drawn_whole(pipeline: Any) -> None:
    runtime = torch_runtime(FAMILY, pipeline)
    known = runtime.conditioning(["a", "b"], SamplingConfig(height=32, width=48, guidance=5.0))
    expected = time_ids(pipeline, (32, 48), (0, 0), (32, 48)).expand(2, -1)
    assert torch.equal(known["time_ids"], expected)
