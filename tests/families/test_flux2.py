"""What is FLUX.2 klein's alone: latents of patches, positions, its shift, which parts belong together."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tunekit import families
from tunekit.diffusion.objectives import FlowMatching
from tunekit.families import flux2
from tunekit.runtime import torch_runtime

FAMILY = flux2.FAMILY
klein = pytest.importorskip("diffusers.pipelines.flux2.pipeline_flux2_klein")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return FAMILY.tiny()


@pytest.mark.parametrize("steps", [1, 4, 10, 50, 200])
@pytest.mark.parametrize("tokens", [16, 1024, 4096, 4300, 4301, 9000])
def test_the_shift_is_that_of_diffusers(tokens: int, steps: int) -> None:
    assert flux2.usual_mu(tokens, steps) == pytest.approx(klein.compute_empirical_mu(tokens, steps))


@pytest.mark.parametrize("side", [16, 32, 48, 64])
def test_it_is_trained_for_the_shift_that_it_is_drawn_with(pipeline: Any, side: int) -> None:
    """Of pictures up to 1024 px; larger ones are drawn with less, which says 1.18 just above, after 2.04."""
    objective = FAMILY.objective(pipeline)
    assert isinstance(objective, FlowMatching) and objective.shift is None and objective.by_tokens
    assert objective.by_tokens.mu((12, side, side)) == pytest.approx(flux2.usual_mu(side**2, flux2.STEPS))


def test_latents_and_positions_are_those_of_diffusers(pipeline: Any) -> None:
    raw = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(flux2.patched(raw), pipeline._patchify_latents(raw))
    assert torch.equal(flux2.unpatched(flux2.patched(raw)), raw)
    latents = flux2.patched(raw)
    assert torch.equal(flux2.positions(2, 3, raw.device), pipeline._prepare_latent_ids(latents)[0])
    assert torch.equal(flux2.ordinals(7, raw.device), pipeline._prepare_text_ids(torch.zeros(1, 7, 2))[0])


@torch.no_grad()
def test_a_picture_is_encoded_as_the_pipeline_encodes_its_own(pipeline: Any) -> None:
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = FAMILY.encode_image(pipeline, pixels).chunk(2, dim=1)
    torch.testing.assert_close(mean, pipeline._encode_vae_image(pixels, None))
    # What is drawn of the scaled posterior is what would be drawn of the encoder's own, and scaled then.
    raw = pipeline.vae.encode(pixels).latent_dist
    noise = torch.randn(raw.mean.shape, generator=torch.Generator().manual_seed(1))
    shift, scale = flux2.statistics(pipeline.vae)
    drawn = (flux2.patched(raw.mean + raw.std * noise) - shift) / scale
    torch.testing.assert_close(mean + std * flux2.patched(noise), drawn, atol=1e-5, rtol=1e-5)


def test_the_text_is_read_at_the_layers_of_the_published_model() -> None:
    assert flux2.text_layers(SimpleNamespace(num_hidden_layers=36)) == (9, 18, 27)


def parts(pipeline: Any, **changes: dict[str, Any]) -> dict[str, Any]:
    """The components, with some keys of their configurations changed."""
    made = {name: getattr(pipeline, name) for name in ("transformer", "vae", "text_encoder", "scheduler")}
    for name, keys in changes.items():
        config = dict(made[name].config) if name != "text_encoder" else made[name].config.to_dict()
        made[name] = SimpleNamespace(config=SimpleNamespace(**{**config, **keys}))
    return made


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"transformer": {"joint_attention_dim": 96}}, "reads text of width 96, and three layers .* give 72"),
        ({"transformer": {"guidance_embeds": True}}, "it is FLUX.2 dev"),
        ({"transformer": {"in_channels": 16}}, "takes 16 channels, and its VAE gives 12"),
        ({"vae": {"patch_size": (1, 1)}}, "patch_size"),
    ],
)
def test_parts_that_do_not_belong_together_are_named(
    pipeline: Any, changes: dict[str, dict[str, Any]], said: str | None
) -> None:
    found = flux2.FAMILY.misfits(parts(pipeline, **changes), {})
    if said is None:
        assert found == []
    else:
        assert len(found) == 1 and re.search(said, found[0])


def test_a_distilled_base_says_so_and_is_drawn_in_few_steps(tmp_path: Path) -> None:
    made = FAMILY.tiny()
    assert torch_runtime(FAMILY, made).sampling.steps == 50 and FAMILY.cfg_scale(made, 4.0) == 4.0
    made.register_to_config(is_distilled=True)
    runtime = torch_runtime(FAMILY, made)
    assert (runtime.sampling.steps, runtime.sampling.guidance) == (4, 1.0)
    assert FAMILY.cfg_scale(made, 4.0) is None
    FAMILY.save(made, tmp_path / "mine")
    sizes = families.sizes_of("flux2", str(tmp_path / "mine"))
    assert "made from, such as black-forest-labs/FLUX.2-klein-base-4B, and draw" in families.distilled(
        sizes, str(tmp_path / "mine")
    )


@pytest.mark.parametrize(
    ("source", "base"),
    [
        ("black-forest-labs/FLUX.2-klein-9B", "black-forest-labs/FLUX.2-klein-base-9B"),
        ("black-forest-labs/FLUX.2-klein-4b", "black-forest-labs/FLUX.2-klein-base-4b"),
        ("black-forest-labs/FLUX.2-klein-base-9B", ""),
    ],
)
def test_the_base_to_train_is_of_the_same_size(source: str, base: str) -> None:
    said = families.distilled(families.sizes_of("flux2", source), source)
    assert bool(said) == bool(base) and (not base or f"train {base} and draw" in said)


@pytest.mark.parametrize(("size", "billions", "text"), [("4B", 3.876, 4.022), ("9B", 9.079, 8.191)])
def test_both_published_sizes_are_planned_before_they_are_here(
    size: str, billions: float, text: float
) -> None:
    found = families.sizes_of("flux2", f"black-forest-labs/FLUX.2-klein-base-{size}")
    assert not found.assumed
    for part, wanted in ((found.denoiser, billions), (found.encoders[0], text)):
        assert round(sum(p.numel() for p in part.build().parameters()) / 1e9, 3) == wanted
    assert (
        flux2.FAMILY.misfits(
            {part.name: getattr(found.pipeline(), part.name) for part in found.components}, {}
        )
        == []
    )
