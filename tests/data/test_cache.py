"""Encoding once, and handing out batches that do not depend on how they are split."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator

from tunekit import families, kept
from tunekit.config import DataConfig, ObjectiveConfig
from tunekit.data import cache
from tunekit.data.cache import CachedDataset, Captions, Draws, Encoder, Stream
from tunekit.data.images import Sample, scan_data
from tunekit.data.shapes import CROPS, Transform
from tunekit.diffusion.batch import Batch
from tunekit.diffusion.noise import sample_generator, stable_seed
from tunekit.errors import DataError, NonFiniteError, OutputError
from tunekit.families.loading import source_files
from tunekit.resources import Source

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
        height, width = dataset.shapes[index]
        pixels = Transform((width, height)).apply(sample.open())
        mean, std = dataset.moments(index)
        assert torch.equal(torch.cat([mean, std]), FAMILY.encode_image(pipeline, pixels[None])[0])
        known = dataset.conditioning(sample.caption)
        for name, value in FAMILY.encode_prompt(pipeline, [sample.caption]).items():
            assert torch.equal(known[name], value[0])
    assert Counter(dataset.shapes) == {(32, 32): 4, (24, 40): 2, (40, 24): 1}  # (height, width)


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


@pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "longer", "folder"])
@pytest.mark.parametrize("kind", ["latents", "conditioning"])
def test_a_damaged_file_is_encoded_again(
    pipeline: Any, pictures: Path, tmp_path: Path, kind: str, damage: str
) -> None:
    data = DataConfig(path=str(pictures), resolution=32)
    encoder(pipeline, tmp_path).dataset(samples(pictures), data, seed=0)
    file = sorted((tmp_path / kind).glob("*.safetensors"))[0]
    whole = file.read_bytes()
    assert cache.is_whole(file)
    if damage == "folder":
        file.unlink()
        file.symlink_to(tmp_path / "nowhere")
    else:
        damages = {"empty": b"", "cut": whole[:-1], "garbage": b"{" * len(whole), "longer": whole + b"x"}
        file.write_bytes(damages[damage])
    assert not cache.is_whole(file)
    said: list[str] = []
    encoder(pipeline, tmp_path, said).dataset(samples(pictures), data, seed=0)
    assert said == [f"encoding 1 {'picture' if kind == 'latents' else 'caption'}"]
    assert file.read_bytes() == whole


def test_captions_that_are_cut_are_said_once(pipeline: Any, pictures: Path, tmp_path: Path) -> None:
    first, *others = samples(pictures)
    said: list[str] = []
    made = encoder(pipeline, tmp_path, said)
    data = DataConfig(path=str(pictures), resolution=32)
    made.dataset([replace(first, caption="a long way " * 9), *others], data, seed=0)
    lines = [line for line in said if not line.startswith("encoding")]
    assert "longer than the 48 tokens" in lines[0]
    assert lines[1].startswith(f"  {first.where}: ")
    said.clear()
    made.prompts(["a long way " * 9, "a preview " * 9])
    assert "1 of 1 prompts" in said[0]


def test_pictures_encoded_in_bf16_are_nearly_the_same_and_kept_apart(
    pipeline: Any, pictures: Path, tmp_path: Path
) -> None:
    """What decodes previews stays in float32, to the bit."""
    data = DataConfig(path=str(pictures), resolution=32)
    found, before = samples(pictures)[:2], {k: v.clone() for k, v in pipeline.vae.state_dict().items()}
    whole = encoder(pipeline, tmp_path).dataset(found, data, seed=0)
    half = Encoder(
        FAMILY, pipeline, cache=tmp_path, accelerator=Accelerator(cpu=True), precision="bf16", say=print
    ).dataset(found, data, seed=0)
    for index in range(2):
        one, other = whole.moments(index)[0], half.moments(index)[0]
        assert other.dtype == torch.float32
        assert not torch.equal(one, other)
        assert (one - other).norm() < 0.1 * one.norm()
    assert len(list((tmp_path / "latents").glob("*"))) == 4
    assert all(torch.equal(before[name], value) for name, value in pipeline.vae.state_dict().items())


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


# As files have been named since version 1; caches of Stable Diffusion 1.x that were filled then are used.


def digest(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def hash_of(module: Any) -> str:
    made = hashlib.blake2b(digest_size=16)
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    passing = ("transformers_version", "dtype", "torch_dtype", "architectures")
    known = {key: value for key, value in config.items() if key[0] != "_" and key not in passing}
    made.update(json.dumps(known, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        made.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return made.hexdigest()


def vocabulary_of(tokenizer: Any) -> str:
    return digest(sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length)


def names_of_version_1(pipeline: Any, samples: list[Sample], keys: list[str]) -> set[str]:
    """Files of the cache for samples whose crops have these keys, for their captions and the empty one."""
    vae, text = (
        hash_of(pipeline.vae),
        digest(hash_of(pipeline.text_encoder), vocabulary_of(pipeline.tokenizer)),
    )
    latents = {
        f"latents/{digest(1, 'sd15', vae, sample.id, sample.content, key, 32)}.safetensors"
        for sample, key in zip(samples, keys, strict=True)
    }
    prompts = ["", *(sample.caption for sample in samples)]
    return latents | {f"conditioning/{digest(1, 'sd15', text, p)}.safetensors" for p in prompts}


@pytest.mark.parametrize(
    ("source", "sizes"),
    [
        ("tiny", {"square": "32x32", "wide": "40x24", "tall": "24x40"}),
        ("builtin/emoji-64", dict.fromkeys(("square", "wide", "tall"), "32x32")),
    ],
)
def test_a_cache_of_version_1_is_used(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, sizes: dict[str, str]
) -> None:
    """Files under the names that they had then are read, and nothing is encoded again."""
    found, data = samples(pictures), DataConfig(path=str(pictures), resolution=32)
    keys = [f"{sizes[sample.id.split('/')[0]]} 0.500000 0.500000 0" for sample in found]
    pipeline = FAMILY.load(source)
    names = names_of_version_1(pipeline, found, keys)
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        kind = {"moments": torch.zeros(8, 4, 4)} if name.startswith("latents") else {"states": torch.zeros(3)}
        safetensors.torch.save_file(kind, tmp_path / name)
    for method in ("encode_image", "encode_prompt"):
        monkeypatch.setattr(type(FAMILY), method, lambda *_: pytest.fail("encoded again"))
    said: list[str] = []
    made = encoder(pipeline, tmp_path, said).dataset(found, data, seed=0)
    assert said == []
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.safetensors")} == names
    assert not made.moments(0)[0].any() and set(made.conditioning(found[0].caption)) == {"states"}
    assert set(made.beside(0)) == {"frame"}  # known without the file


RECORDED = {
    "": "57eb9f29def05fcb5508c9f03c394126",
    "a red cat": "50aaec8119cff1d1b20e85b79134c4ac",
    "größer 🐈": "bf36618e088681351518136288043981",
}


def test_names_of_files_are_recorded_values(pipeline: Any, tmp_path: Path) -> None:
    """Taken from the code of version 1, with hashes of the weights that are fixed."""
    made = encoder(pipeline, tmp_path)
    made._vae, made._text = "vae", "text"
    one = Sample("größe/fox.png", "a fox", 40, 40, "content", "where", bytes)
    name = made._latent_key(40, one, Transform((32, 48), 0.25, 0.125, True))
    assert name == "64e8316f24822e58975fbdf98bfd9b61"
    assert made._latents.path(name) == tmp_path / "latents" / f"{name}.safetensors"
    expected = {
        prompt: tmp_path / "conditioning" / f"{name}.safetensors" for prompt, name in RECORDED.items()
    }
    for path in expected.values():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    assert made.prompts(RECORDED) == expected


def test_names_follow_what_the_pipeline_makes_of_the_empty_prompt(tmp_path: Path) -> None:
    """SDXL's is zeros or encoded, as its model_index.json says."""
    family = families.get("sdxl")
    files = []
    for zeros in (True, False):
        pipeline = family.tiny()
        pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
        made = Encoder(
            family, pipeline, cache=tmp_path, accelerator=Accelerator(cpu=True), say=lambda line: None
        )
        known = made.conditioning(["", "a"])
        assert bool(known[""]["encoder_hidden_states"].any()) == (not zeros)
        files.append(made.prompts(["", "a"]))
    assert not set(files[0].values()) & set(files[1].values())


# Shards


def test_many_are_encoded_into_shards_and_drawn_the_same(
    pipeline: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(path="x", resolution=32, crop="random", flip=True)
    found, said = samples(pictures), []
    alone = encoder(pipeline, tmp_path / "alone").dataset(found, data, seed=3)
    assert not list(tmp_path.rglob("*.shard"))
    encoder(pipeline, tmp_path / "many").dataset(found[:1], data, seed=3)  # some are there already
    files = set((tmp_path / "many" / "latents").glob("*.safetensors"))
    monkeypatch.setattr(cache, "TOGETHER", 3)
    made = encoder(pipeline, tmp_path / "many", said)
    many = made.dataset(found, data, seed=3)
    missing = sum(alone.variants(index) for index in range(1, 7))
    assert said[0] == f"encoding {missing} pictures"
    assert set((tmp_path / "many" / "latents").glob("*.safetensors")) == files
    assert said[1] == "encoding 3 captions"  # so few go into files
    assert not list((tmp_path / "many" / "conditioning").glob("*.shard"))
    assert len(list((tmp_path / "many" / "latents").glob("*.shard"))) == 1
    for step in range(6):
        one, other = (stream(made, pipeline).step(step, 0, 1) for made in (alone, many))
        assert rows(one) == rows(other)
    again = encoder(pipeline, tmp_path / "many", said)
    said.clear()
    assert rows(stream(again.dataset(found, data, seed=3), pipeline).step(0, 0, 1)) == rows(
        stream(alone, pipeline).step(0, 0, 1)
    )
    assert said == []


def order_by_lists(dataset: CachedDataset, seed: int, purpose: str, epoch: int, size: int) -> list[int]:
    """The permutation of an epoch, sample by sample."""
    generator = torch.Generator().manual_seed(stable_seed(seed, epoch, purpose))
    groups: dict[tuple[int, int], list[int]] = {}
    for index in torch.randperm(len(dataset), generator=generator).tolist():
        groups.setdefault(dataset.shapes[index], []).append(index)
    whole: list[list[int]] = []
    rest: list[int] = []
    for group in groups.values():
        cut = len(group) // size * size
        whole += [group[at : at + size] for at in range(0, cut, size)]
        rest += group[cut:]
    chunks = [whole[at] for at in torch.randperm(len(whole), generator=generator).tolist()]
    lead = -epoch * len(dataset) % size
    return [*rest[:lead], *(index for chunk in chunks for index in chunk), *rest[lead:]]


@pytest.mark.parametrize("size", [1, 3, 8, 50])
def test_the_order_of_an_epoch_is_as_it_was(pipeline: Any, size: int) -> None:
    draw = torch.Generator().manual_seed(size)
    kinds = [(32, 32), (24, 40), (40, 24)]
    for count in (1, 7, 40):
        shapes = [kinds[at] for at in torch.randint(3, (count,), generator=draw).tolist()]
        one = Sample("a", "", 1, 1, "", "", bytes)
        made = CachedDataset([one] * count, [], [], {}, shapes=shapes)
        order = Stream(made, FAMILY.objective(pipeline), Draws(size), seed=5)._draw_order
        for epoch in range(3):
            assert list(order(made, "order", epoch)) == order_by_lists(made, 5, "order", epoch, size)


def test_captions_are_each_there_once_in_their_order() -> None:
    words = ["b", "a", "", "b", "c", "a", "prompt"]
    found = [Sample(str(n), word, 1, 1, "", f"place {n}", bytes) for n, word in enumerate(words)]
    made = Captions(["prompt", "c"], found, digest)
    assert list(made) == ["prompt", "c", "b", "a", ""]
    assert [made[unit] for unit in range(5)] == list(made)
    assert [made.key(unit) for unit in range(5)] == [digest(word) for word in made]
    assert made.places({"b", "c"}) == {"b": "place 3", "c": "place 4"}
    assert list(Captions([], [], digest)) == []


# Hashes of weights


@pytest.fixture
def hashing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The classes of the modules that were hashed; notes are kept in a folder of the test's own."""
    monkeypatch.setattr(kept, "cache_dir", lambda: tmp_path / "notes")
    seen: list[str] = []
    hashed = cache._hash_module

    def note(module: Any) -> str:
        seen.append(type(module).__name__)
        return hashed(module)

    monkeypatch.setattr(cache, "_hash_module", note)
    return seen


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> Encoder:
    source = Source(str(folder))
    return Encoder(
        FAMILY,
        FAMILY.load(source, dtype),
        cache=folder / "cache",
        accelerator=Accelerator(cpu=True),
        files=source_files(source, FAMILY.facts),
    )


def test_weights_are_hashed_once_as_long_as_their_files_stay(
    tiny_source: Path, tmp_path: Path, hashing: list[str]
) -> None:
    folder = shutil.copytree(tiny_source, tmp_path / "model")
    first = opened(folder)
    assert sorted(hashing) == ["AutoencoderKL", "CLIPTextModel"]
    hashing.clear()
    again = opened(folder)
    assert hashing == []
    assert (again._vae, again._text) == (first._vae, first._text)
    assert first._vae == hash_of(first.pipeline.vae)  # and is no other hash than that of the weights
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["quant_conv.bias"] += 1
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    changed = opened(folder)
    assert hashing == ["AutoencoderKL"]
    assert changed._vae == hash_of(changed.pipeline.vae) != first._vae and changed._text == first._text
    hashing.clear()
    assert opened(folder)._vae == changed._vae and hashing == []


def test_another_configuration_or_another_folder_is_hashed_anew(
    tiny_source: Path, tmp_path: Path, hashing: list[str]
) -> None:
    folder = shutil.copytree(tiny_source, tmp_path / "model")
    first = opened(folder)
    config = folder / "vae" / "config.json"
    config.write_text(config.read_text().replace('"scaling_factor": 0.5', '"scaling_factor": 0.25'))
    hashing.clear()
    assert opened(folder)._vae != first._vae
    assert hashing == ["AutoencoderKL"]
    hashing.clear()
    moved = opened(shutil.copytree(tiny_source, tmp_path / "copy"))
    assert sorted(hashing) == ["AutoencoderKL", "CLIPTextModel"]
    assert (moved._vae, moved._text) == (first._vae, first._text)


@pytest.mark.parametrize("damage", ["", "zz", "cut"])
def test_a_damaged_note_is_written_again(
    tiny_source: Path, tmp_path: Path, hashing: list[str], damage: str
) -> None:
    first = opened(tiny_source)
    for note in (tmp_path / "notes" / "hashes").iterdir():
        note.write_text(note.read_text()[:7] if damage == "cut" else damage)
    assert opened(tiny_source)._vae == first._vae
    assert len(hashing) == 4


def test_where_nothing_can_be_noted_weights_are_hashed_each_time(
    tiny_source: Path, tmp_path: Path, hashing: list[str]
) -> None:
    (tmp_path / "notes").write_text("a file where the folder should be")
    assert opened(tiny_source)._vae == opened(tiny_source)._vae
    assert len(hashing) == 4


def test_weights_that_come_from_no_file_are_hashed_each_time(
    pipeline: Any, tmp_path: Path, hashing: list[str]
) -> None:
    for _ in range(2):
        encoder(pipeline, tmp_path)
    assert len(hashing) == 4 and not (tmp_path / "notes").exists()


# What stays in memory


def test_what_was_used_last_stays_in_memory_up_to_some_bytes(tmp_path: Path) -> None:
    files = [tmp_path / f"{index}.safetensors" for index in range(6)]
    for index, file in enumerate(files):
        safetensors.torch.save_file({"a": torch.full((25,), float(index)), "b": torch.zeros(75)}, file)
    recent = cache._Recent(1000)  # two of 400 bytes
    first = recent(files[0])
    assert float(first["a"][0]) == 0 and recent.held == 400
    assert recent(files[0]) is first
    for file in files[1:4]:
        recent(file)
        assert recent.held <= 1000
    assert recent.held == 800
    files[0].unlink()
    with pytest.raises(DataError, match=r"0\.safetensors"):
        recent(files[0])
    kept = recent(files[2])
    recent(files[4])  # the third goes, as it was not used since
    for file in files[2:5]:
        file.unlink()
    assert recent(files[2]) is kept and float(recent(files[4])["a"][0]) == 4
    with pytest.raises(DataError, match=r"3\.safetensors"):
        recent(files[3])
    assert recent.held == 800


def test_a_file_larger_than_the_limit_is_the_only_one_that_stays(tmp_path: Path) -> None:
    for name, size in (("small", 10), ("large", 1000)):
        safetensors.torch.save_file({"a": torch.zeros(size)}, tmp_path / name)
    recent = cache._Recent(1000)
    recent(tmp_path / "small")
    large = recent(tmp_path / "large")
    assert recent.held == 4000 and recent(tmp_path / "large") is large
    recent(tmp_path / "small")
    assert recent.held == 40


def test_a_data_set_holds_no_more_than_it_may(
    pipeline: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its limit is in bytes: a thousand captions of SDXL would be more than half a gigabyte."""
    monkeypatch.setattr(cache, "RECENT_BYTES", 20_000)
    data = DataConfig(path=str(pictures), resolution=32)
    made = encoder(pipeline, tmp_path).dataset(samples(pictures), data, seed=0)
    steps = stream(made, pipeline)
    for step in range(8):
        steps.step(step, 0, 1)
        assert 0 < made._load.held <= 20_000
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) > 40_000


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
    stream = Stream(made, objective, Draws(batch_size=2), seed=0)
    latents = [row for step in range(40) for batch in stream.step(step, 0, 1) for row in batch.latents]
    known = [made.moments(index, variant)[0] for index in range(2) for variant in range(CROPS * 2)]
    nearest = [min(range(16), key=lambda i: float((row - known[i]).abs().mean())) for row in latents]
    assert set(nearest) == set(range(16))


# Streaming


def stream(
    dataset: CachedDataset,
    pipeline: Any,
    *,
    seed: int = 0,
    prior: CachedDataset | None = None,
    objective: ObjectiveConfig | None = None,
    **draws: Any,
) -> Stream:
    return Stream(
        dataset,
        FAMILY.objective(pipeline, objective),
        Draws(**{"batch_size": 4, **draws}),
        seed=seed,
        prior=prior,
    )


def rows(batches: list[Batch]) -> list[tuple[Any, ...]]:
    """Each row of some batches; a step that two epochs share may hold a sample twice."""
    return sorted(
        (
            name,
            float(batch.weight[i]),
            float(batch.timesteps[i]),
            sorted((key, value[i].tolist()) for key, value in batch.rows.items()),
            sorted((key, value[i].tolist()) for key, value in batch.conditioning.items()),
        )
        for batch in batches
        for i, name in enumerate(batch.ids)
    )


@pytest.mark.parametrize("offset", [0.0, 0.25])
def test_rows_do_not_depend_on_processes_or_micro_batches(
    dataset: CachedDataset, pipeline: Any, offset: float
) -> None:
    options: dict[str, Any] = {"caption_dropout": 0.5, "objective": ObjectiveConfig(noise_offset=offset)}
    whole = stream(dataset, pipeline, **options)
    split = stream(dataset, pipeline, micro_batch=1, **options)
    for step in range(6):
        expected = rows(whole.step(step, 0, 1))
        assert len(expected) == 4
        parts = [rows(split.step(step, rank, 3)) for rank in range(3)]
        assert all(parts)
        assert sorted(parts[0] + parts[1] + parts[2]) == expected
        assert [row[0] for row in expected] == sorted(whole.ids(step))


def test_noise_offset_belongs_to_the_sample(dataset: CachedDataset, pipeline: Any) -> None:
    """A constant per channel on top of the very noise that there is without it."""
    plain, moved = (
        stream(dataset, pipeline, micro_batch=1, objective=ObjectiveConfig(noise_offset=offset))
        for offset in (0.0, 0.25)
    )
    seen: dict[str, Any] = {}
    for step in range(2):
        for one, other in zip(plain.step(step, 0, 1), moved.step(step, 0, 1), strict=True):
            difference = other.noise - one.noise
            constant = difference.mean((2, 3), keepdim=True)
            torch.testing.assert_close(difference, constant.expand_as(difference), atol=1e-5, rtol=0)
            assert constant.abs().max() > 0.01
            seen[one.ids[0]] = constant.flatten().tolist()
            assert torch.equal(one.latents, other.latents) and torch.equal(one.timesteps, other.timesteps)
    assert len({tuple(value) for value in seen.values()}) == len(seen)


def test_micro_batches_have_one_shape_and_a_limit(dataset: CachedDataset, pipeline: Any) -> None:
    for step in range(8):
        for batch in stream(dataset, pipeline, micro_batch=3).step(step, 0, 1):
            assert len(batch.ids) == len(batch.latents) == len(batch.timesteps) <= 3
            assert {value.dtype for value in batch.tensors()} == {torch.float32}
            assert all(len(value) == len(batch) for value in batch.tensors())
            assert set(batch.rows) == {"latents", "noise", "timesteps", "weight", "frame"}


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
        return dataset.batch(2, seed=seed, epoch=epoch, objective=objective, draws=Draws())

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
