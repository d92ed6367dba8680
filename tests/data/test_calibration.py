from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tunekit import families
from tunekit.config import DataConfig, SamplingConfig
from tunekit.data.calibration import UNCONDITIONAL, CalibrationSet, Material, gather
from tunekit.errors import ConfigError
from tunekit.families import Family

FAMILY = families.get("sd15")


def collect(folder: Path, family: Family = FAMILY, **options: Any) -> tuple[CalibrationSet, list[str]]:
    said: list[str] = []
    drawing = SamplingConfig(height=64, width=64, guidance=3.0)
    known: dict[str, Any] = {"data": None, "prompts": ("a cat", "a dog"), "count": 3, "seed": 0}
    sampling = drawing.model_copy(update=options.pop("sampling", {}))
    material = Material(sampling=sampling, cache=folder / "cache", model_hash="tiny", **{**known, **options})
    return gather(family, family.tiny(), Accelerator(cpu=True), material, said.append), said


def test_the_runs_pictures_come_first(pictures: Path, tmp_path: Path):
    data = DataConfig(path=str(pictures), resolution=64)
    examples, _ = collect(tmp_path, data=data)
    assert examples.origin == f"4 pictures of {pictures}"
    assert examples.dataset.samples[0].caption.startswith("a disc")


def test_without_pictures_the_model_draws_some(tmp_path: Path):
    examples, said = collect(tmp_path)
    assert examples.origin == "3 pictures drawn by the model"
    assert [sample.caption for sample in examples.dataset.samples] == ["a cat", "a dog", "a cat"]
    mean, std = examples.dataset.moments(0)
    assert mean.shape == (4, 16, 16) and mean.isfinite().all() and not std.any()
    assert not torch.equal(mean, examples.dataset.moments(2)[0])  # the same prompt, another seed
    assert "drawing 3 pictures to learn from" in said
    again, said = collect(tmp_path)
    assert said == [] and torch.equal(again.dataset.moments(0)[0], mean)  # out of the cache
    other, said = collect(tmp_path, seed=1)
    assert said and not torch.equal(other.dataset.moments(0)[0], mean)


def test_nothing_to_learn_from_is_said(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"neither pictures nor prompts.*\n.*prompts"):
        collect(tmp_path, prompts=())


def test_examples_cover_all_timesteps_and_purposes_differ(tmp_path: Path):
    examples, _ = collect(tmp_path)
    batches = list(examples.batches(40, 4, purpose="one"))
    assert [len(batch.ids) for batch in batches] == [4] * 10
    times = torch.cat([batch.timesteps for batch in batches]).sort().values
    assert times[0] < 50 and times[-1] >= 950 and times.diff().max() < 60
    empty = examples.dataset.conditioning("")["encoder_hidden_states"]
    states = torch.cat([batch.conditioning["encoder_hidden_states"] for batch in batches])
    share = sum(torch.equal(row, empty) for row in states) / 40
    assert 0 < share < 2.5 * UNCONDITIONAL
    again = list(examples.batches(40, 4, purpose="one"))
    assert all(torch.equal(a.noise, b.noise) for a, b in zip(again, batches, strict=True))
    other = list(examples.batches(40, 4, purpose="two"))
    assert not any(torch.equal(a.noise, b.noise) for a, b in zip(other, batches, strict=True))
    assert all(torch.equal(a.timesteps, b.timesteps) for a, b in zip(other, batches, strict=True))


@pytest.mark.parametrize("name", families.runnable())
def test_every_family_can_be_drawn_from(name: str, tmp_path: Path):
    """SDXL is told the size of a drawn picture, when it is drawn and when it is learned from."""
    family = families.get(name)
    examples, _ = collect(tmp_path, family, count=2, sampling={"height": 32, "width": 48})
    (batch,) = examples.batches(2, 2, purpose="one")
    assert batch.frame.tolist() == [[32, 48, 0, 0, 32, 48]] * 2
    pipeline = family.tiny()
    assert batch.latents.shape[1:] == family.latent_shape(pipeline, 32, 48)
    told = family.conditioning(batch.conditioning, batch.frame)
    with torch.no_grad():
        made = family.denoise(family.denoiser(pipeline), batch.latents, batch.timesteps, told)
    assert made.shape == batch.latents.shape and made.isfinite().all()


def test_another_sampler_draws_other_pictures(tmp_path: Path):
    """Its configuration is a part of the names, and where none is asked for they are those of before."""
    first, _ = collect(tmp_path)
    names = {path.name for path in (tmp_path / "cache" / "drawn").iterdir()}
    settings = f"tiny {(4, 16, 16)} 3.0 20"
    assert names == {
        f"{hashlib.sha256(f'{settings} {i} {prompt}'.encode()).hexdigest()[:32]}.safetensors"
        for i, prompt in enumerate(("a cat", "a dog", "a cat"))
    }
    other, said = collect(tmp_path, sampling={"scheduler": {"timestep_spacing": "trailing"}})
    assert "drawing 3 pictures to learn from" in said
    assert not torch.equal(first.dataset.moments(0)[0], other.dataset.moments(0)[0])
    assert collect(tmp_path, sampling={"scheduler": {"timestep_spacing": "trailing"}})[1] == []
