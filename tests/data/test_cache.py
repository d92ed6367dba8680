"""Encoding once, and handing out batches that do not depend on how they are split."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tunekit import families
from tunekit.config import DataConfig
from tunekit.data.cache import Batch, CachedDataset, Encoder, Stream
from tunekit.data.images import CROPS, Sample, Transform, scan_data
from tunekit.diffusion.noise import sample_generator
from tunekit.errors import DataError, NonFiniteError, OutputError

MakePictures = Callable[..., Path]
FAMILY = families.get("sd15")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return FAMILY.tiny()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, make_pictures: MakePictures) -> Path:
    """Seven pictures of three shapes."""
    folder = tmp_path_factory.mktemp("mixed")
    make_pictures(folder / "square", 4, (40, 40))
    make_pictures(folder / "wide", 2, (64, 36), seed=1)
    make_pictures(folder / "tall", 1, (36, 64), seed=2)
    return folder


def encoder(pipeline: Any, cache: Path, said: list[str] | None = None) -> Encoder:
    say = (lambda line: None) if said is None else said.append
    return Encoder(FAMILY, pipeline, cache=cache, accelerator=Accelerator(cpu=True), say=say)


def samples(pictures: Path) -> list[Sample]:
    return list(scan_data(DataConfig(path=str(pictures), resolution=32)).samples)


@pytest.fixture(scope="module")
def dataset(pipeline: Any, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> CachedDataset:
    data = DataConfig(path=str(pictures), resolution=32)
    return encoder(pipeline, tmp_path_factory.mktemp("cache")).dataset(samples(pictures), data, seed=0)


# Encoding


def test_latents_and_conditioning_are_the_familys(pipeline: Any, dataset: CachedDataset) -> None:
    for index, sample in enumerate(dataset.samples):
        pixels = Transform(dataset.shapes[index]).apply(sample.open())
        mean, std = dataset.moments(index)
        assert torch.equal(torch.cat([mean, std]), FAMILY.encode_image(pipeline, pixels[None])[0])
        known = dataset.conditioning(sample.caption)
        for name, value in FAMILY.encode_prompt(pipeline, [sample.caption]).items():
            assert torch.equal(known[name], value[0])
    assert Counter(dataset.shapes) == {(32, 32): 4, (40, 24): 2, (24, 40): 1}


def test_what_is_cached_is_not_encoded_again(pipeline: Any, pictures: Path, tmp_path: Path) -> None:
    data = DataConfig(path=str(pictures), resolution=32)
    said: list[str] = []
    encoder(pipeline, tmp_path, said).dataset(samples(pictures), data, seed=0)
    assert said == ["encoding 7 pictures", "encoding 5 captions"]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(times) == 12
    assert not list(tmp_path.rglob(".*"))  # no temporary file
    said.clear()
    encoder(pipeline, tmp_path, said).dataset(samples(pictures)[::-1], data, seed=1)
    assert said == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == times


def test_keys_follow_everything_a_latent_depends_on(pictures: Path, tmp_path: Path) -> None:
    """Id, pixels, size and the weights of the VAE each give a file of their own; a caption does not."""
    one = samples(pictures)[0]
    other_picture = replace(samples(pictures)[1], id=one.id)
    data = DataConfig(path=str(pictures), resolution=32)
    pipeline = FAMILY.tiny()

    def files() -> int:
        return len(list((tmp_path / "latents").glob("*")))

    encoder(pipeline, tmp_path).dataset([one], data, seed=0)
    assert files() == 1
    encoder(pipeline, tmp_path).dataset([replace(one, caption="new words")], data, seed=0)
    assert files() == 1
    encoder(pipeline, tmp_path).dataset([replace(one, id="renamed.png")], data, seed=0)
    assert files() == 2
    encoder(pipeline, tmp_path).dataset([other_picture], data, seed=0)
    assert files() == 3
    encoder(pipeline, tmp_path).dataset([one], data.model_copy(update={"resolution": 40}), seed=0)
    assert files() == 4
    captions = len(list((tmp_path / "conditioning").glob("*")))
    with torch.no_grad():
        next(pipeline.vae.encoder.parameters()).mul_(1.01)
    encoder(pipeline, tmp_path).dataset([one], data, seed=0)
    assert files() == 5
    assert len(list((tmp_path / "conditioning").glob("*"))) == captions
    with torch.no_grad():
        next(pipeline.text_encoder.parameters()).mul_(1.01)
    encoder(pipeline, tmp_path).dataset([one], data, seed=0)
    assert len(list((tmp_path / "conditioning").glob("*"))) == captions + 2


def test_nan_latents_name_the_file(pictures: Path, tmp_path: Path) -> None:
    pipeline = FAMILY.tiny()
    with torch.no_grad():
        pipeline.vae.quant_conv.bias[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"square/00\.png: the VAE turns this picture into NaN"):
        encoder(pipeline, tmp_path).dataset(samples(pictures), DataConfig(path="x", resolution=32), seed=0)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_picture_that_went_away_is_named(
    pipeline: Any, tmp_path: Path, make_pictures: MakePictures
) -> None:
    data = DataConfig(path=str(make_pictures(tmp_path / "p", 1)), resolution=32)
    found = scan_data(data).samples
    (tmp_path / "p" / "00.png").unlink()
    with pytest.raises(DataError, match=r"00\.png: cannot be read any more"):
        encoder(pipeline, tmp_path / "cache").dataset(list(found), data, seed=0)


def test_unwritable_cache(pipeline: Any, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(OutputError, match="could not write"):
        encoder(pipeline, tmp_path / "cache").dataset(
            samples(pictures), DataConfig(path="x", resolution=32), seed=0
        )


def test_damaged_cache_file_is_named(pipeline: Any, pictures: Path, tmp_path: Path) -> None:
    data = DataConfig(path="x", resolution=32)
    made = encoder(pipeline, tmp_path).dataset(samples(pictures)[:1], data, seed=0)
    (file,) = (tmp_path / "latents").glob("*")
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(DataError, match=f"{file.name}.*cannot be read"):
        made.moments(0)


def test_encoders_leave_memory(tmp_path: Path) -> None:
    pipeline = FAMILY.tiny()
    watched = [weakref.ref(pipeline.text_encoder), weakref.ref(pipeline.vae)]
    made = encoder(pipeline, tmp_path)
    made.release()
    gc.collect()
    assert [ref() for ref in watched] == [None, None]
    pipeline = FAMILY.tiny()
    encoder(pipeline, tmp_path).release(keep_vae=True)
    assert pipeline.vae is not None
    assert pipeline.text_encoder is None


def test_random_crops_and_flips_are_cached_variants(pipeline: Any, pictures: Path, tmp_path: Path) -> None:
    data = DataConfig(path="x", resolution=32, buckets=False, crop="random", flip=True)
    wide = [sample for sample in samples(pictures) if sample.id.startswith("wide")]
    made = encoder(pipeline, tmp_path).dataset(wide, data, seed=3)
    assert made.variants(0) == CROPS * 2
    draws = [torch.rand(2, generator=sample_generator(3, cut, wide[0].id, "crop")) for cut in range(CROPS)]
    for cut, (left, top) in enumerate(draws):
        for flip in (False, True):
            pixels = Transform((32, 32), float(left), float(top), flip).apply(wide[0].open())
            moments = torch.cat(made.moments(0, 2 * cut + flip))
            assert torch.equal(moments, FAMILY.encode_image(pipeline, pixels[None])[0])
    square = [sample for sample in samples(pictures) if sample.id.startswith("square")]
    assert encoder(pipeline, tmp_path).dataset(square, data, seed=3).variants(0) == 2  # nothing to cut
    assert encoder(pipeline, tmp_path).dataset(wide, data, seed=3, fixed=True).variants(0) == 1
    # Over the epochs each variant is seen.
    objective = FAMILY.objective(pipeline)
    stream = Stream(made, objective, batch_size=2, seed=0)
    latents = [row for step in range(40) for batch in stream.step(step, 0, 1) for row in batch.latents]
    known = [made.moments(index, variant)[0] for index in range(2) for variant in range(CROPS * 2)]
    nearest = [min(range(16), key=lambda i: float((row - known[i]).abs().mean())) for row in latents]
    assert set(nearest) == set(range(16))


# Streaming


def stream(dataset: CachedDataset, pipeline: Any, **options: Any) -> Stream:
    return Stream(dataset, FAMILY.objective(pipeline), **{"batch_size": 4, "seed": 0, **options})


def rows(batches: list[Batch]) -> list[tuple[Any, ...]]:
    """Each row of some batches; a step that two epochs share may hold a sample twice."""
    return sorted(
        (
            name,
            float(batch.weights[i]),
            int(batch.timesteps[i]),
            batch.latents[i].tolist(),
            batch.noise[i].tolist(),
            sorted((key, value[i].tolist()) for key, value in batch.conditioning.items()),
        )
        for batch in batches
        for i, name in enumerate(batch.ids)
    )


def test_rows_do_not_depend_on_processes_or_micro_batches(dataset: CachedDataset, pipeline: Any) -> None:
    whole = stream(dataset, pipeline, caption_dropout=0.5)
    split = stream(dataset, pipeline, caption_dropout=0.5, micro_batch=1)
    for step in range(6):
        expected = rows(whole.step(step, 0, 1))
        assert len(expected) == 4
        parts = [rows(split.step(step, rank, 3)) for rank in range(3)]
        assert all(parts)
        assert sorted(parts[0] + parts[1] + parts[2]) == expected
        assert [row[0] for row in expected] == sorted(whole.ids(step))


def test_micro_batches_have_one_shape_and_a_limit(dataset: CachedDataset, pipeline: Any) -> None:
    for step in range(8):
        for batch in stream(dataset, pipeline, micro_batch=3).step(step, 0, 1):
            assert len(batch.ids) == len(batch.latents) == len(batch.timesteps) <= 3
            assert batch.latents.dtype == torch.float32


def test_an_epoch_holds_every_sample_once(dataset: CachedDataset, pipeline: Any) -> None:
    made = stream(dataset, pipeline)
    in_order = [name for step in range(14) for name in made.ids(step)]  # 56 = 8 epochs of 7
    epochs = [in_order[at : at + 7] for at in range(0, 56, 7)]
    assert all(len(set(epoch)) == 7 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 4
    assert made.ids(0) != stream(dataset, pipeline, seed=1).ids(0) or made.ids(1) != stream(
        dataset, pipeline, seed=1
    ).ids(1)


def test_draws_change_with_the_epoch_and_the_seed(dataset: CachedDataset, pipeline: Any) -> None:
    objective = FAMILY.objective(pipeline)

    def draw(seed: int, epoch: int) -> Batch:
        options = {"objective": objective, "dropout": 0.0, "weight": 1.0, "tag": ""}
        return dataset.batch(2, seed=seed, epoch=epoch, **options)  # type: ignore[arg-type]

    first = draw(0, 0)
    for other in (draw(0, 1), draw(1, 0)):
        assert not torch.equal(first.noise, other.noise)
        assert not torch.equal(first.latents, other.latents)
    assert torch.equal(first.noise, draw(0, 0).noise)
    assert not torch.equal(first.noise, first.latents)


def test_steps_prefer_one_shape(pipeline: Any, tmp_path: Path, make_pictures: MakePictures) -> None:
    make_pictures(tmp_path / "p" / "square", 8, (32, 32))
    make_pictures(tmp_path / "p" / "wide", 8, (40, 24), seed=1)
    data = DataConfig(path=str(tmp_path / "p"), resolution=32)
    made = encoder(pipeline, tmp_path / "cache").dataset(list(scan_data(data).samples), data, seed=0)
    steps = [stream(made, pipeline).step(step, 0, 1) for step in range(12)]
    assert all(len(batches) == 1 for batches in steps)
    assert {batches[0].latents.shape[-2:] for batches in steps} == {(8, 8), (6, 10)}


def test_caption_dropout_takes_the_empty_caption(dataset: CachedDataset, pipeline: Any) -> None:
    empty = dataset.conditioning("")["encoder_hidden_states"]
    made = stream(dataset, pipeline, caption_dropout=0.25)
    hits = [
        torch.equal(value, empty)
        for step in range(100)
        for batch in made.step(step, 0, 1)
        for value in batch.conditioning["encoder_hidden_states"]
    ]
    assert len(hits) == 400
    assert 0.17 < sum(hits) / 400 < 0.33
    never = stream(dataset, pipeline)
    assert not any(
        torch.equal(value, empty)
        for step in range(20)
        for batch in never.step(step, 0, 1)
        for value in batch.conditioning["encoder_hidden_states"]
    )


def test_prior_pictures_come_along_with_their_weight(dataset: CachedDataset, pipeline: Any) -> None:
    made = stream(dataset, pipeline, batch_size=2, prior=dataset, prior_weight=0.5)
    for step in range(8):
        found = rows(made.step(step, 0, 1))
        weights = Counter((name.startswith("class/"), weight) for name, weight, *_ in found)
        assert weights == {(False, 1.0): 2, (True, 0.5): 2}
    both = [name for step in range(7) for batch in made.step(step, 0, 1) for name in batch.ids]
    assert Counter(both) == {sample: 2 for s in dataset.samples for sample in (s.id, f"class/{s.id}")}


def test_validation_is_always_the_same(dataset: CachedDataset, pipeline: Any) -> None:
    objective = FAMILY.objective(pipeline)
    first = list(dataset.validation(objective, timesteps=4, micro_batch=3))
    again = list(dataset.validation(objective, timesteps=4, micro_batch=28))
    assert sum(len(batch.ids) for batch in first) == 28
    assert {int(t) for batch in first for t in batch.timesteps} == {125, 375, 625, 875}
    assert torch.cat([batch.noise.flatten() for batch in first]).equal(
        torch.cat([batch.noise.flatten() for batch in again])
    )
    assert torch.equal(first[0].latents[0], dataset.moments(0)[0])
