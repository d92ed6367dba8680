from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from tunekit.data.examples import Examples, gather

from tunekit import families
from tunekit.training.distill import Distillation, output_error

FAMILY = families.get("sd15")


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    return gather(
        FAMILY,
        FAMILY.tiny(),
        Accelerator(cpu=True),
        data=None,
        prompts=["a cat"],
        count=2,
        size=(64, 64),
        guidance=3.0,
        cache=tmp_path_factory.mktemp("cache"),
        model_hash="tiny",
        seed=0,
        say=lambda line: None,
    )


def damaged() -> torch.nn.Module:
    student = FAMILY.denoiser(FAMILY.tiny())
    with torch.no_grad():
        student.mid_block.resnets[0].conv2.weight.mul_(0.5)
    return student


def test_a_copy_has_no_loss(examples: Examples):
    teacher = FAMILY.denoiser(FAMILY.tiny())
    student = copy.deepcopy(teacher)
    loss = Distillation(FAMILY, student, teacher, examples, 1.0)
    (batch,) = examples.batches(4, 4, purpose="test")
    assert loss(student, batch).shape == (4,)
    assert loss(student, batch).abs().max() < 1e-8
    assert output_error(FAMILY, student, teacher, examples) < 1e-6


def test_the_loss_is_relative_error_of_output_and_blocks(examples: Examples):
    student, teacher = damaged(), FAMILY.denoiser(FAMILY.tiny())
    (batch,) = examples.batches(4, 4, purpose="test")
    noisy, _, _ = examples.objective.sample(batch.latents, batch.noise, batch.timesteps)
    with torch.no_grad():
        made, wanted = (
            FAMILY.denoise(model, noisy, batch.timesteps, batch.conditioning) for model in (student, teacher)
        )
        output = Distillation(FAMILY, student, teacher, examples, 0.0)(student, batch)
        both = Distillation(FAMILY, student, teacher, examples, 2.0)(student, batch)
    error = (made - wanted).square().mean((1, 2, 3)) / wanted.square().mean((1, 2, 3))
    assert torch.allclose(output, error, rtol=1e-4)
    assert (both > output).all()  # the block that was damaged shows


def test_only_the_student_learns(examples: Examples):
    student, teacher = damaged(), FAMILY.denoiser(FAMILY.tiny())
    loss = Distillation(FAMILY, student, teacher, examples, 1.0)
    (batch,) = examples.batches(2, 2, purpose="test")
    loss(student, batch).sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module._forward_hooks for module in [*student.modules(), *teacher.modules()])


def test_the_error_is_that_of_all_held_out_examples(examples: Examples):
    student, teacher = damaged(), FAMILY.denoiser(FAMILY.tiny())
    error = output_error(FAMILY, student, teacher, examples)
    assert 0.001 < error < 1
    assert output_error(FAMILY, student, teacher, examples) == error
    assert output_error(FAMILY, teacher, student, examples) == pytest.approx(error, rel=0.5)
