"""Consistency: targets by the formulas of LCM, the way of a sampler, and who is asked how."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, LCMScheduler
from torch import Tensor, nn

from tunekit import families
from tunekit.adapters import add_adapter, fold_adapter, without_adapter
from tunekit.config import AdapterConfig, SamplingConfig, TrainConfig
from tunekit.diffusion.batch import Batch
from tunekit.diffusion.sampling import sampler
from tunekit.families import Frame
from tunekit.memory.levers import Fitted
from tunekit.training.checkpoint import Checkpoints
from tunekit.training.consistency import (
    Consistency,
    Guidance,
    Teacher,
    Way,
    boundary,
    student_scheduler,
    unguided,
)
from tunekit.training.loop import Hooks, train
from tunekit.training.run import build_optimizer

FAMILY = families.get("sd15")
ADAPTER = AdapterConfig(rank=4, alpha=4)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return FAMILY.tiny()


def rows(pipeline: Any, numbers: list[int]) -> Batch:
    draw = torch.Generator().manual_seed(0)
    shape = (len(numbers), *FAMILY.latent_shape(pipeline, 64, 64))
    tensors = {
        "latents": torch.randn(shape, generator=draw),
        "noise": torch.randn(shape, generator=draw),
        "timesteps": torch.tensor(numbers).float(),
        "weight": torch.ones(len(numbers)),
        "frame": Frame.whole(64, 64).rows(len(numbers)),
    }
    told = FAMILY.encode_prompt(pipeline, ["a fox"] * len(numbers))
    return Batch(tuple(map(str, numbers)), tensors, told)


def way_of(pipeline: Any, method: str, steps: int, points: int) -> tuple[Way, Any]:
    learned = SamplingConfig(steps=steps, scheduler=student_scheduler(pipeline.scheduler, method, points))
    scheduler = sampler(pipeline.scheduler, learned)
    latents = torch.zeros(1, *FAMILY.latent_shape(pipeline, 64, 64))
    way = Way.of_sampler(
        scheduler,
        FAMILY.begin,
        learned,
        latents,
        FAMILY.objective(pipeline),
        points=points,
        phased=method != "lcm",
    )
    return way, scheduler


def task_of(pipeline: Any, way: Way, decay: float = 0.95) -> Consistency:
    """An adapter that does nothing yet, on the network that is its teacher without it."""
    student = copy.deepcopy(FAMILY.denoiser(pipeline))
    add_adapter(student, ADAPTER, FAMILY.facts.lora_targets)

    asked = Guidance.of(FAMILY, pipeline, 4.0, FAMILY.encode_prompt(pipeline, [""]))
    objective = FAMILY.objective(pipeline)
    told = Guidance(1.0, None)
    return Consistency(Fitted.plain(student), FAMILY, Teacher(asked), told, objective, way, decay=decay)


def test_the_way_of_lcm_is_that_of_its_sampler(pipeline: Any):
    way, scheduler = way_of(pipeline, "lcm", 4, 50)
    assert way.points.tolist() == [999.0 - 20 * index for index in range(50)]
    assert way.following.tolist() == [*way.points.tolist()[1:], -1.0]
    assert set(way.edges.tolist()) == {-1.0}
    assert set(map(float, scheduler.timesteps)) <= set(way.points.tolist())
    assert way.scaling == 10
    assert [way.points[number] for number in way.called] == scheduler.timesteps.tolist()
    draw, chance = torch.Generator().manual_seed(0), way.chance(FAMILY.objective(pipeline))
    drawn = torch.stack([chance.draw(draw, (4, 8, 8)) for _ in range(400)])
    assert set(drawn.tolist()) <= set(map(float, range(50)))
    assert len(set(drawn.tolist())) > 40
    asked = sum(float((drawn == number).float().mean()) for number in way.called)
    assert asked == pytest.approx(0.5 + 0.5 * 4 / 50, abs=0.08)


def test_phases_end_where_the_sampler_goes(pipeline: Any):
    way, scheduler = way_of(pipeline, "pcm", 4, 10)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert len(way) == 12  # three for each phase: at least as many as were asked for
    assert way.edges.tolist() == [749.0] * 3 + [499.0] * 3 + [249.0] * 3 + [-1.0] * 3
    assert way.points.tolist()[:4] == [999.0, 916.0, 832.0, 749.0]
    assert way.called == (0, 3, 6, 9)


def test_more_points_than_timesteps_are_all_of_them(pipeline: Any):
    way, _ = way_of(pipeline, "pcm", 8, 1000)
    assert way.points.tolist() == [999.0 - index for index in range(1000)]


def test_the_target_is_lcms(pipeline: Any):
    """By hand: what the student answers after one guided step of diffusers' DDIM, boundary included."""
    way, _ = way_of(pipeline, "lcm", 4, 50)
    task, batch = task_of(pipeline, way), rows(pipeline, [10, 30, 49])
    with torch.no_grad():
        found = task.loss(task.fitted.module, batch)["loss"]
        unet, alphas = pipeline.unet, pipeline.scheduler.alphas_cumprod
        words, empty = batch.conditioning["encoder_hidden_states"], task.teacher.asked.negative
        stepper = DDIMScheduler.from_config(
            pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=True
        )
        stepper.set_timesteps(50)

        def answer(noisy: Tensor, time: int) -> Tensor:
            said = unet(noisy, time, words[:1]).sample
            clean = (noisy - (1 - alphas[time]).sqrt() * said) / alphas[time].sqrt()
            scaled = (time * 10) ** 2
            return 0.25 / (scaled + 0.25) * noisy + (scaled / (scaled + 0.25)) ** 0.5 * clean

        for row, number in enumerate((10, 30, 49)):
            now, then = 999 - 20 * number, 999 - 20 * (number + 1)
            latents, noise = batch.latents[row : row + 1], batch.noise[row : row + 1]
            noisy = alphas[now].sqrt() * latents + (1 - alphas[now]).sqrt() * noise
            without = unet(noisy, now, empty["encoder_hidden_states"]).sample
            said = without + 4 * (unet(noisy, now, words[:1]).sample - without)
            nearer = stepper.step(said, now, noisy).prev_sample
            error = answer(noisy, now) - (answer(nearer, then) if then >= 0 else nearer)
            expected = ((error.square() + 1e-6).sqrt() - 1e-3).mean()
            torch.testing.assert_close(found[row], expected, rtol=1e-3, atol=1e-4)


def test_the_boundary_is_that_of_the_sampler(pipeline: Any):
    scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    for time in (0, 1, 19, 999):
        expected = scheduler.get_scalings_for_boundary_condition_discrete(time)
        torch.testing.assert_close(
            boundary(torch.tensor([float(time)]), 10.0),
            tuple(torch.tensor([value], dtype=torch.float32) for value in expected),
        )


def test_the_first_point_is_noise_alone_and_edges_are_learned_as_they_are(pipeline: Any):
    way, _ = way_of(pipeline, "pcm", 2, 2)  # every point follows on an edge: the teacher's step itself
    task, batch = task_of(pipeline, way, decay=0.0), rows(pipeline, [0, 1])
    other = batch.with_rows(latents=batch.latents.flip(0))
    with torch.no_grad():
        first, second = (task.loss(task.fitted.module, given)["loss"] for given in (batch, other))
    assert first[0] == second[0]
    assert first[1] != second[1]
    unguided_teacher = replace(task.teacher, asked=Guidance(1.0, None))
    task.teacher = unguided_teacher
    with torch.no_grad():
        assert float(task.loss(task.fitted.module, batch)["loss"].max()) < 1e-6


def test_a_network_without_its_adapter_is_its_base_and_goes_on_to_be_trained(pipeline: Any):
    way, _ = way_of(pipeline, "pcm", 2, 4)
    task = task_of(pipeline, way)
    student, batch = task.fitted.module, rows(pipeline, [1])
    for parameter in task.fitted.parameters.values():
        parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))

    def output(network: nn.Module) -> Tensor:
        with torch.no_grad():
            return FAMILY.denoise(network, batch.noise, torch.tensor([500.0]), batch.conditioning)

    base, adapted = output(FAMILY.denoiser(pipeline)), output(student)
    assert not torch.allclose(base, adapted)
    with without_adapter(student):
        assert torch.equal(output(student), base)
    assert torch.equal(output(student), adapted)
    assert all(parameter.requires_grad for parameter in task.fitted.parameters.values())
    folded = copy.deepcopy(FAMILY.denoiser(pipeline))
    assert fold_adapter(folded, student) > 0
    torch.testing.assert_close(output(folded), adapted, rtol=1e-4, atol=1e-5)


def test_the_mean_is_followed_used_and_kept(pipeline: Any):
    way, _ = way_of(pipeline, "pcm", 2, 4)
    task = task_of(pipeline, way, decay=0.75)
    name, parameter = next(iter(task.fitted.parameters.items()))
    before = parameter.detach().clone()
    parameter.data += 1
    task.updated(1)
    torch.testing.assert_close(task.state()[name], before + 0.25)
    with task.average.used():
        torch.testing.assert_close(parameter.data, before + 0.25)
    torch.testing.assert_close(parameter.data, before + 1)
    task.average.settle()
    torch.testing.assert_close(parameter.data, before + 0.25)


class Fixed:
    """The same batch at each step."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.batch_size = len(batch)

    def step(self, step: int, rank: int, processes: int) -> list[Batch]:
        return [self.batch.part(row, row + 1) for row in range(rank, self.batch_size, processes)]


def test_it_falls_and_goes_on_bit_for_bit(pipeline: Any, tmp_path: Path):
    way, _ = way_of(pipeline, "pcm", 2, 4)
    batch, states = rows(pipeline, [0, 1, 2, 3]), []
    for pieces in ((8,), (5, 8)):
        for last in pieces:
            task = task_of(pipeline, way)
            settings = TrainConfig(max_steps=last, lr=2e-3, batch_size=4, checkpoint_every=5)
            kept = Checkpoints(tmp_path / str(len(pieces)), {"run": "this"})
            hooks = Hooks(checkpoints=kept, say=lambda line: None)
            optimizer = build_optimizer(settings, task.fitted, torch.device("cpu"))
            with torch.no_grad():
                first = task.loss(task.fitted.module, batch)["loss"].mean()
            train(Accelerator(cpu=True), task, optimizer, Fixed(batch), settings, hooks)
            with torch.no_grad():
                assert task.loss(task.fitted.module, batch)["loss"].mean() < first
        states.append((task.fitted.parameters, task.state()))
    for one, other in zip(*states, strict=True):
        assert one.keys() == other.keys() and one
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", families.runnable())
def test_a_student_is_drawn_without_a_second_call(name: str):
    family = families.get(name)
    tiny = family.tiny()
    for guidance in (1.0, 4.5):
        told = unguided(family, tiny, guidance)
        assert family.cfg_scale(tiny, told) is None
        assert told == guidance or family.cfg_scale(tiny, guidance) is not None


def test_a_teacher_may_have_a_network_of_its_own(pipeline: Any):
    with Teacher(Guidance(1.0, None), pipeline.unet).network(nn.Identity()) as network:
        assert network is pipeline.unet
