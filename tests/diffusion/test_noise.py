"""Draws belong to (seed, epoch, sample, purpose) and to nothing else."""

from __future__ import annotations

import itertools

import torch

from tunekit.diffusion.noise import sample_generator, stable_seed


def test_the_same_sample_gets_the_same_draw() -> None:
    first = torch.randn(8, generator=sample_generator(1, 2, "cat.png", "noise"))
    torch.randn(100)  # the global state is of no influence
    second = torch.randn(8, generator=sample_generator(1, 2, "cat.png", "noise"))
    assert torch.equal(first, second)


def test_each_part_of_the_key_changes_the_draw() -> None:
    keys = [*itertools.product((0, 1), (0, 1), ("a", "b"), ("noise", "timestep"))]
    draws = {tuple(torch.randn(4, generator=sample_generator(*key)).tolist()) for key in keys}
    assert len(draws) == len(keys)


def test_seeds_are_recorded_values() -> None:
    # A change of these would change every cached latent, resumed run and recorded loss.
    assert stable_seed(0) == 6197007067532723406
    assert stable_seed(7, 3, "größe.png", "crop") == 464744782663252388


def test_parts_cannot_run_into_each_other() -> None:
    assert len({stable_seed("a", "b"), stable_seed("ab"), stable_seed("a,b"), stable_seed('a","b')}) == 4
    assert stable_seed(1, "2") != stable_seed("1", 2)


def test_seeds_fit_every_generator() -> None:
    seeds = [stable_seed(i) for i in range(200)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len(set(seeds)) == len(seeds)
