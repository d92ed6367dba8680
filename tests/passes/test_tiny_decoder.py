"""A small decoder stands in the own one's place where pictures stay what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import SamplingConfig
from tunekit.errors import ChainError, ModelError
from tunekit.passes import tiny_decoder
from tunekit.passes.base import Context, check_chain, parse_chain, run_chain
from tunekit.runtime import generate_pixels, open_runtime
from tunekit.training.decoding import SmallDecoder

TWO = SamplingConfig(steps=2, guidance=3)
SMALL = {"width": 8, "blocks": 1, "max_steps": 2, "batch_size": 2, "pictures": 2, "compared": 1}


def run(settings: dict[str, Any], start: Artifact, folder: Path) -> tuple[list[Artifact], list[str]]:
    said: list[str] = []
    made: list[Artifact] = []
    context = Context(run_dir=folder, device="cpu", prompts=("a cat",), sampling=TWO, say=said.append)
    chain = parse_chain(["export_onnx", {"tiny_decoder": {**SMALL, **settings}}])
    run_chain(chain, start, context, after_step=made.append)
    return made, said


def test_it_takes_the_place_where_enough_is_kept(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tiny_decoder.TinyDecoder._compared

    def faster(*args: Any) -> Any:
        each, _, pictures = real(*args)
        return each, 3.0, pictures

    monkeypatch.setattr(tiny_decoder.TinyDecoder, "_compared", faster)
    learn, learned = tiny_decoder.TinyDecoder._learned, []

    def once(*args: Any) -> Any:  # training once is enough
        learned.extend([] if learned else [learn(*args)])
        return learned[0]

    monkeypatch.setattr(tiny_decoder.TinyDecoder, "_learned", once)
    start = open_artifact(tiny_source, family="sd15")
    (exported, made), said = run({"keep": {"psnr": 1}}, start, tmp_path)
    assert any("a decoder of width 8, 3.00x as fast as the own one" in line for line in said)
    assert made.lineage[-1].metrics["decoder_speedup"] == 3 and made.format == "onnx"
    assert (Path(made.source) / "vae_decoder" / "model.onnx").stat().st_size < (
        Path(exported.source) / "vae_decoder" / "model.onnx"
    ).stat().st_size
    old, new = (open_runtime(artifact, device="cpu") for artifact in (exported, made))
    pixels = [generate_pixels(runtime, ["a cat"], TWO, seeds=[3]) for runtime in (old, new)]
    assert pixels[0].shape == pixels[1].shape and not torch.allclose(*pixels, atol=0.01)
    latents = torch.randn(1, *new.latent_shape(32, 48))
    assert new.decode(latents).shape == (1, 3, 32, 48)

    (_, kept), said = run({"keep": {"psnr": 99}}, start, tmp_path)
    assert any("psnr 99 is not kept" in line and "the own decoder stays" in line for line in said)
    assert kept.hash == exported.hash


def test_a_small_decoder_takes_what_the_own_one_takes() -> None:
    decoder = SmallDecoder(4, 8, 8, 1, torch.zeros(4), torch.ones(4))
    assert decoder(torch.randn(2, 4, 3, 5)).shape == (2, 3, 24, 40)
    shifted = SmallDecoder(4, 8, 8, 1, torch.full((4,), 2.0), torch.full((4,), 3.0))
    shifted.decoder.load_state_dict(decoder.decoder.state_dict())
    latents = torch.randn(1, 4, 2, 2)
    assert torch.allclose(shifted(latents * 3 + 2), decoder(latents), atol=1e-5)


def test_the_decoder_of_a_small_autoencoder_is_taken_as_it_is(tiny_source: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    def made(channels: int) -> str:
        widths, counts = (8, 8, 8), (1, 1, 1)
        small = AutoencoderTiny(
            latent_channels=channels,
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            num_encoder_blocks=counts,
            num_decoder_blocks=counts,
        )
        small.save_pretrained(tmp_path / f"taesd-{channels}")
        return str(tmp_path / f"taesd-{channels}")

    start = open_artifact(tiny_source, family="sd15")
    right = {"source": made(4), "keep": {"psnr": 1}, "compared": 1}
    said: list[str] = []
    context = Context(run_dir=tmp_path, device="cpu", prompts=("a cat",), sampling=TWO, say=said.append)
    with pytest.MonkeyPatch.context() as patch:
        real = tiny_decoder.TinyDecoder._compared
        patch.setattr(tiny_decoder.TinyDecoder, "_compared", lambda *given: (real(*given)[0], 3.0, []))
        last = run_chain(parse_chain(["export_onnx", {"tiny_decoder": right}]), start, context)
    assert any("the decoder of " in line and "3.00x" in line for line in said)
    assert "loss" not in last.lineage[-1].metrics
    runtime = open_runtime(last, device="cpu")
    latents = torch.randn(1, *runtime.latent_shape(32, 48))
    with torch.no_grad():
        theirs = AutoencoderTiny.from_pretrained(str(right["source"])).decode(latents).sample
    assert torch.allclose(runtime.decode(latents), (theirs / 2 + 0.5).clamp(0, 1), atol=1e-4)

    wrong = parse_chain(["export_onnx", {"tiny_decoder": {**right, "source": made(16)}}])
    with pytest.raises(
        ModelError, match="16 channels to 4 pixels per latent and 3 colours; this model has 4"
    ):
        run_chain(wrong, start, context)
    other = parse_chain(["export_onnx", {"tiny_decoder": {**right, "source": str(tiny_source / "vae")}}])
    with pytest.raises(
        ModelError, match="is AutoencoderKL, and a small decoder is that of an AutoencoderTiny"
    ):
        run_chain(other, start, context)


def test_bad_input() -> None:
    with pytest.raises(ChainError, match="learns from the model in torch, which this chain has not"):
        check_chain(parse_chain(["tiny_decoder"]), "onnx")
    with pytest.raises(ChainError, match="micro_batch larger than its batch_size"):
        check_chain(parse_chain(["export_onnx", {"tiny_decoder": {"micro_batch": 99}}]), "torch")
    with pytest.raises(ChainError, match="has a source that is no folder of a model: taesd"):
        check_chain(parse_chain(["export_onnx", {"tiny_decoder": {"source": "taesd"}}]), "torch")
    with pytest.raises(ChainError, match="has no effect: the decoder of source is taken as it is"):
        parse_chain([{"tiny_decoder": {"source": "taesd", "width": 16}}])
