"""Whole blocks: what each is worth, what leaves with it, and which of them leave."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tunekit.families.depth import lies_in
from tunekit.families.family import Family, Pipeline
from tunekit.passes.models import around
from tunekit.passes.prunable import macs, parameters


@dataclass(frozen=True)
class Block:
    """What may leave a denoiser whole.

    Attributes:
        name: as the family calls it.
        paths: of the modules that leave together.
        error: of the output without it, over the output's size; None where it was not measured.
    """

    name: str
    paths: tuple[str, ...]
    error: float | None = None


def find(family: Family, denoiser: nn.Module, kept: Callable[[str], bool]) -> list[Block]:
    """What may leave, but for what `kept` says stays, by the path of a module."""
    return [
        Block(name, paths)
        for name, paths in family.removable(denoiser).items()
        if not touched(denoiser, paths, kept)
    ]


def touched(denoiser: nn.Module, paths: Collection[str], kept: Callable[[str], bool]) -> str | None:
    """The first module that leaves with `paths` and is to stay."""
    return next((name for name, _ in denoiser.named_modules() if lies_in(name, paths) and kept(name)), None)


def size(
    family: Family, pipeline: Pipeline, gone: Collection[str], cost: str, denoiser: nn.Module | None = None
) -> int:
    """Parameters or multiply-adds ("macs") of a pipeline's denoiser without some modules."""
    whole = denoiser or family.denoiser(pipeline)
    left = family.without(whole, gone) if gone else whole
    if cost == "parameters":
        return parameters(left)
    return macs(family, around(pipeline, {family.facts.denoiser_name: left}))


def ranked(blocks: Sequence[Block], costs: Mapping[str, int], *, per_cost: bool) -> list[Block]:
    """The least important first: by the error alone, or by the error for each cost that leaves."""

    def worth(block: Block) -> float:
        error = block.error or 0.0
        return error / max(costs[block.name], 1) if per_cost else error

    return sorted(blocks, key=worth)


def steps(order: Sequence[Block]) -> list[tuple[Block, ...]]:
    """Ever more blocks, in order; one that has left with others already is no step of its own."""
    made: list[tuple[Block, ...]] = [()]
    gone: set[str] = set()
    for block in order:
        if not all(lies_in(path, gone) for path in block.paths):
            made.append((*made[-1], block))
            gone |= set(block.paths)
    return made


def paths_of(blocks: Collection[Block]) -> tuple[str, ...]:
    """All modules that leave with some blocks, without those that lie in others."""
    every = dict.fromkeys(path for block in blocks for path in block.paths)
    return tuple(path for path in every if not lies_in(path, every.keys() - {path}))


def rows(
    blocks: Sequence[Block], gone: Collection[str], costs: Mapping[str, int], cost: str
) -> list[dict[str, Any]]:
    """A line for each block, for the report; the least important first. `cost` is what `costs` are."""
    return [
        {
            "block": block.name,
            "left": all(lies_in(path, gone) for path in block.paths),
            cost: costs[block.name],
            **({} if block.error is None else {"relative_error": block.error}),
        }
        for block in sorted(blocks, key=lambda block: block.error or 0.0)
    ]
