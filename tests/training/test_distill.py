"""Distillation: relative errors of the output and of what each large block gives on of the picture."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tunekit import families
from tunekit.config import SamplingConfig
from tunekit.data.calibration import CalibrationSet, Material, gather
from tunekit.diffusion.batch import Batch
from tunekit.families import Sizes
from tunekit.families.sizes import with_config
from tunekit.memory.levers import Fitted
from tunekit.training.distill import Distillation, output_error

FAMILY = families.get("sd15")


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> CalibrationSet:
    material = Material(
        data=None,
        prompts=("a cat",),
        count=2,
        sampling=SamplingConfig(height=64, width=64, guidance=3.0),
        cache=tmp_path_factory.mktemp("cache"),
        model_hash="tiny",
        seed=0,
    )
    return gather(FAMILY, FAMILY.tiny(), Accelerator(cpu=True), material, lambda line: None)


def damaged() -> nn.Module:
    student = FAMILY.denoiser(FAMILY.tiny())
    with torch.no_grad():
        student.mid_block.resnets[0].conv2.weight.mul_(0.5)
    return student


def distillation(
    student: nn.Module, teacher: nn.Module, examples: CalibrationSet, weight: float
) -> Distillation:
    return Distillation(Fitted.plain(student), FAMILY, teacher, examples.objective, weight)


def test_a_copy_has_no_loss(examples: CalibrationSet):
    teacher = FAMILY.denoiser(FAMILY.tiny())
    student = copy.deepcopy(teacher)
    task = distillation(student, teacher, examples, 1.0)
    (batch,) = examples.batches(4, 4, purpose="test")
    losses = task.loss(student, batch)
    assert set(losses) == {"loss", "output", "features"}
    for rows in losses.values():
        assert rows.shape == (4,)
        assert rows.abs().max() < 1e-8
    assert output_error(FAMILY, student, teacher, examples) < 1e-6


def test_the_loss_is_relative_error_of_output_and_blocks(examples: CalibrationSet):
    student, teacher = damaged(), FAMILY.denoiser(FAMILY.tiny())
    (batch,) = examples.batches(4, 4, purpose="test")
    noisy, times, _, _ = examples.objective.sample(batch.latents, batch.noise, batch.timesteps)
    with torch.no_grad():
        made, wanted = (
            FAMILY.denoise(model, noisy, times, batch.conditioning) for model in (student, teacher)
        )
        output = distillation(student, teacher, examples, 0.0).loss(student, batch)
        both = distillation(student, teacher, examples, 2.0).loss(student, batch)
    error = (made - wanted).square().mean((1, 2, 3)) / wanted.square().mean((1, 2, 3))
    assert set(output) == {"loss"}
    assert torch.allclose(output["loss"], error, rtol=1e-4)
    assert (both["loss"] > output["loss"]).all()  # the block that was damaged shows
    assert torch.allclose(both["output"], error, rtol=1e-4)
    assert torch.equal(both["loss"], both["output"] + 2.0 * both["features"])


def test_only_the_student_learns(examples: CalibrationSet):
    student, teacher = damaged(), FAMILY.denoiser(FAMILY.tiny())
    task = distillation(student, teacher, examples, 1.0)
    (batch,) = examples.batches(2, 2, purpose="test")
    task.loss(student, batch)["loss"].sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module._forward_hooks for module in [*student.modules(), *teacher.modules()])
    assert task.state() == {}


def test_the_error_is_that_of_all_held_out_examples(examples: CalibrationSet):
    student, teacher = damaged(), FAMILY.denoiser(FAMILY.tiny())
    error = output_error(FAMILY, student, teacher, examples)
    assert 0.001 < error < 1
    assert output_error(FAMILY, student, teacher, examples) == error
    assert output_error(FAMILY, teacher, student, examples) == pytest.approx(error, rel=0.5)


# The picture's state, whatever else a block gives


VAE = {"block_out_channels": (8, 8, 16), "latent_channels": 4}
CLIP = {"hidden_size": 16, "projection_dim": 16}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "sd3": {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 24,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
    "flux": {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    },
}
TEXT, PICTURE = 7, 24  # tokens


@pytest.fixture(scope="module", params=sorted(TRANSFORMERS))
def planned(request: pytest.FixtureRequest) -> tuple[Any, nn.Module, Batch]:
    """A family of transformers, a small one of it on the CPU, and rows for it."""
    family = families.planned(request.param)
    configs = {"transformer": TRANSFORMERS[family.name], "vae": VAE}
    parts = tuple(
        with_config(part, configs[part.name]) if part.name in configs else part
        for part in family.facts.components
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: nn.Module = Sizes(family, parts).pipeline(device="cpu").transformer
        for parameter in network.parameters():
            if not parameter.any():  # modulations begin at zero, and blocks would idle
                nn.init.normal_(parameter, std=0.2)
    draw = torch.Generator().manual_seed(1)
    rows = {
        "latents": torch.randn(2, 4, 12, 8, generator=draw),
        "noise": torch.randn(2, 4, 12, 8, generator=draw),
        "timesteps": torch.tensor([300.0, 800.0]),
        "weight": torch.ones(2),
        "frame": families.Frame.whole(48, 32).rows(2),
    }
    conditioning = {
        "encoder_hidden_states": torch.randn(2, TEXT, 24, generator=draw),
        "pooled_projections": torch.randn(2, 20, generator=draw),
    }
    return family, network, Batch(("a", "b"), rows, conditioning)


def outputs_of(family: Any, network: nn.Module, batch: Batch, objective: Any) -> list[tuple[Any, Tensor]]:
    """(text, picture) of each block, by hooks of the test's own."""
    seen: list[tuple[Any, Tensor]] = []
    handles = [
        block.register_forward_hook(lambda module, args, output: seen.append(output))
        for _, block in family.blocks(network)
    ]
    noised = objective.sample(batch.latents, batch.noise, batch.timesteps)
    told = family.conditioning(batch.conditioning, batch.frame)
    with torch.no_grad():
        family.denoise(network, noised.noisy, noised.timesteps, told)
    for handle in handles:
        handle.remove()
    return seen


def test_transformers_are_compared_by_the_pictures_state(planned: tuple[Any, nn.Module, Batch]):
    """Of blocks that give (text, picture): the text has no part in the loss, and may be None."""
    family, teacher, batch = planned
    objective = family.objective(Sizes(family, family.facts.components).pipeline())
    student = copy.deepcopy(teacher).requires_grad_(True)
    with torch.no_grad():
        for parameter in family.blocks(student)[1][1].parameters():
            parameter.mul_(0.9)
    task = Distillation(Fitted.plain(student), family, teacher, objective, 2.0)
    losses = task.loss(student, batch)
    made, wanted = (outputs_of(family, net, batch, objective) for net in (student, teacher))
    assert len(made) == len(family.blocks(student)) > 2
    assert all(picture.shape[:2] == (2, PICTURE) for _, picture in wanted)
    assert all(text is None or text.shape[:2] == (2, TEXT) for text, _ in wanted)
    expected = torch.stack(
        [
            (one - other).square().flatten(1).mean(1) / other.square().flatten(1).mean(1)
            for (_, one), (_, other) in zip(made, wanted, strict=True)
        ]
    ).mean(0)
    assert (losses["features"] > 1e-4).all()
    torch.testing.assert_close(losses["features"], expected)
    torch.testing.assert_close(losses["loss"], losses["output"] + 2.0 * expected)
    losses["loss"].sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())


def test_a_transformer_that_is_its_teacher_has_no_loss(planned: tuple[Any, nn.Module, Batch]):
    family, teacher, batch = planned
    objective = family.objective(Sizes(family, family.facts.components).pipeline())
    student = copy.deepcopy(teacher).requires_grad_(True)
    losses = Distillation(Fitted.plain(student), family, teacher, objective, 1.0).loss(student, batch)
    assert set(losses) == {"loss", "output", "features"}
    assert losses["loss"].abs().max() < 1e-8
