"""Distribution matching: whose turn it is, what moves, and where to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from tunekit import families
from tunekit.adapters import CRITIC, add_adapter, add_critic, using_adapter, without_adapter
from tunekit.config import AdapterConfig, SamplingConfig, TrainConfig
from tunekit.diffusion.batch import Batch
from tunekit.diffusion.sampling import sampler
from tunekit.families import Frame
from tunekit.memory.levers import Fitted
from tunekit.training.checkpoint import Checkpoints
from tunekit.training.consistency import Guidance, Teacher, Way, student_scheduler
from tunekit.training.loop import Hooks, train
from tunekit.training.matching import Matching
from tunekit.training.run import build_optimizer

FAMILY = families.get("sd15")


@pytest.fixture(scope="module")
def batch() -> Batch:
    tiny, draw = FAMILY.tiny(), torch.Generator().manual_seed(0)
    shape = (3, *FAMILY.latent_shape(tiny, 64, 64))
    rows = {
        "latents": torch.randn(shape, generator=draw),
        "noise": torch.randn(shape, generator=draw),
        "timesteps": torch.tensor([0.0, 1.0, 1.0]),
        "weight": torch.ones(3),
        "frame": Frame.whole(64, 64).rows(3),
    }
    return Batch(("a", "b", "c"), rows, FAMILY.encode_prompt(tiny, ["a fox"] * 3))


def made(**options: Any) -> Matching:
    tiny = FAMILY.tiny()
    network = FAMILY.denoiser(tiny)
    add_adapter(network, AdapterConfig(rank=4, alpha=4), FAMILY.facts.lora_targets)
    add_critic(network)
    learned = SamplingConfig(steps=2, scheduler=student_scheduler(tiny.scheduler, "dmd", 2))
    objective, latents = FAMILY.objective(tiny), torch.zeros(1, *FAMILY.latent_shape(tiny, 64, 64))
    scheduler = sampler(tiny.scheduler, learned)
    way = Way.of_sampler(scheduler, FAMILY.begin, learned, latents, objective, points=2, phased=True)
    teacher = Teacher(Guidance.of(FAMILY, tiny, 4.0, FAMILY.encode_prompt(tiny, [""])))
    return Matching(
        Fitted.plain(network), FAMILY, teacher, Guidance(1.0, None), objective, way, critic_steps=2, **options
    )


def test_student_critic_and_teacher_are_one_network(batch: Batch):
    task = made()
    network = task.fitted.module

    def output() -> Tensor:
        with torch.no_grad():
            return FAMILY.denoise(network, batch.noise, torch.tensor([500.0]), batch.conditioning)

    plain = output()
    for name, parameter in task.fitted.parameters.items():
        if f".{CRITIC}." in name:
            parameter.data += 0.1
    assert torch.equal(output(), plain)  # the student is used, and does nothing yet
    with using_adapter(network, CRITIC):
        assert not torch.allclose(output(), plain)
        with without_adapter(network):
            assert torch.equal(output(), plain)
        assert not torch.allclose(output(), plain)
    assert torch.equal(output(), plain)
    assert all(parameter.requires_grad for parameter in task.fitted.parameters.values())


def test_each_learns_in_its_turn(batch: Batch):
    task = made(decay=0.0)
    for step, turn in enumerate(("critic", "critic", "student", "critic"), start=1):
        losses = task.loss(task.fitted.module, batch)
        assert set(losses) == {"loss", turn}
        losses["loss"].sum().backward()
        for name, parameter in task.fitted.parameters.items():
            assert (parameter.grad is not None) == ((turn == "critic") == (f".{CRITIC}." in name)), name
            parameter.grad = None
        task.updated(step)


def test_a_row_learns_the_same_beside_others(batch: Batch):
    task = made()
    task.count += 2
    whole = task.loss(task.fitted.module, batch)["loss"]
    alone = torch.cat([task.loss(task.fitted.module, batch.part(row, row + 1))["loss"] for row in range(3)])
    torch.testing.assert_close(whole, alone, rtol=1e-3, atol=1e-5)


def test_a_critic_that_agrees_with_the_teacher_moves_nothing(batch: Batch):
    task = made()
    task.count += 2
    task.teacher = Teacher(Guidance(1.0, None))
    assert float(task.loss(task.fitted.module, batch)["loss"].max().detach()) < 1e-9


class Fixed:
    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.batch_size = len(batch)

    def step(self, step: int, rank: int, processes: int) -> list[Batch]:
        return [self.batch]


def test_it_goes_on_bit_for_bit(batch: Batch, tmp_path: Path):
    states = []
    for pieces in ((6,), (4, 6)):
        for last in pieces:
            task = made()
            settings = TrainConfig(max_steps=last, lr=1e-3, batch_size=3, checkpoint_every=2)
            hooks = Hooks(
                checkpoints=Checkpoints(tmp_path / str(len(pieces)), {"run": "this"}), say=lambda line: None
            )
            optimizer = build_optimizer(settings, task.fitted, torch.device("cpu"))
            train(Accelerator(cpu=True), task, optimizer, Fixed(batch), settings, hooks)
        states.append({**task.fitted.parameters, **{f"mean {k}": v for k, v in task.state().items()}})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
