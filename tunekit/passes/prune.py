"""Removes whole blocks, channels, attention heads and groups from the denoiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator

from tunekit.config import Count, Names, refuse
from tunekit.errors import ChainError, NonFiniteError
from tunekit.passes.base import (
    DISTINCT,
    NO_EXAMPLES,
    Context,
    Distinct,
    Ladder,
    Outcome,
    Pass,
    Start,
    learned_from,
)
from tunekit.passes.learning import part_of
from tunekit.passes.metrics import PARAMETERS, RELATIVE_ERROR, SIZE, Metric
from tunekit.passes.models import around
from tunekit.passes.paths import unmatched

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tunekit.artifacts import Artifact
    from tunekit.data.calibration import CalibrationSet
    from tunekit.families.family import Family, Pipeline
    from tunekit.passes.pace import Pace
    from tunekit.passes.prunable import Structures
    from tunekit.training.distill import HeldOut

Target = Literal["feed_forward", "heads", "resnet"]
Share = Annotated[float, Field(ge=0, lt=1)]
Part = Annotated[float, Field(gt=0, lt=1)]
Layout = Literal["base", "small", "tiny"]

USUAL = 0.25
"""Share that leaves where nothing is said."""

DRAWN = 32
"""Pictures that are drawn at most where the run has none; more examples differ in noise and timestep."""


class Prune(Pass):
    """Removes whole blocks, feed-forward channels, attention heads and residual-block groups; shapes shrink.

    Structures are ranked by how far the output moves when one is silenced, to first order (`taylor`, see
    `tunekit.passes.prunable.Sensitivity` for the measure and its sources), per cost that leaves with it. What
    is left computes exactly what the same model with those structures silenced computes. Blocks are left out
    one by one, and the output is compared; the configuration describes what is left of them, so that any
    program opens it.
    """

    kind: ClassVar[str] = "prune"
    accepts: ClassVar[frozenset[str]] = frozenset({"torch"})
    refuses: ClassVar[Mapping[str, str]] = {
        "packed": "comes after {giver}, and channels cannot leave packed weights; put it before"
    }
    metrics: ClassVar[tuple[Metric, ...]] = (
        PARAMETERS,
        SIZE,
        RELATIVE_ERROR,
        Metric("macs", "multiply-adds", "count", lower_is_better=True),
        Metric("blocks", "blocks that left", "count"),
        Metric("latency_ratio", "time of a call", "x", lower_is_better=True),
    )

    ratio: Share | dict[Target, Share] | None = None
    """Share of the targets' cost that leaves; or one share for each target. Null is 0.25; it is nothing of
    them with blocks or sparsity, and what latency asks for."""
    blocks: Layout | Literal["fewest"] | Annotated[int, Field(ge=1, le=1000)] | Part | None = None
    """Whole blocks that leave: a number of them, those that move the output least; a share of the cost of all
    that may leave; BK-SDM's layouts of U-Nets, base (a pair less per level), small (without the middle, too)
    or tiny (without the lowest level, too); fewest: as few as latency takes."""
    latency: Part | None = None
    """Share of the time of a call that is to stay; the smallest ratio, or the fewest blocks, that reach it
    are found by measuring here, in turns with the whole model."""
    sparsity: Literal["2:4"] | None = None
    """2:4 sets of every four weights along a layer's inputs the two smaller ones to zero, in what is left.
    Nothing becomes smaller by it, nor faster on processors; `build_tensorrt` lets cards skip the zeros."""
    cost: Literal["parameters", "macs"] = "parameters"
    """What `ratio` is a share of, and what importance is weighed against: parameters make the model small,
    macs (multiply-adds) make it fast."""
    targets: Distinct[Target] = Field(["feed_forward", "heads", "resnet"], min_length=1)
    """What may leave: feed-forward channels, attention heads, groups of residual blocks' inner channels.
    Where it is not given, those that the network has."""
    importance: Literal["taylor", "gradient", "activation", "magnitude"] = "taylor"
    """taylor: how far the output moves without a structure; gradient: how far it moves with what a structure
    says; activation: how much a structure adds to what reads it. They measure on examples; magnitude looks at
    the weights only."""
    spread: Literal["global", "uniform"] = "global"
    """global takes the least important structures anywhere; uniform takes the same share of each block."""
    floor: Share = 0.25
    """Least share of a block's structures that stays, so that no block becomes a bottleneck."""
    multiple: int = Field(16, ge=1, le=4096)
    """Channel counts stay multiples of this, because kernels compute in blocks of 8 or 16."""
    keep: Annotated[Names, DISTINCT] = []
    """Paths of blocks that stay whole, such as `mid_block` or `up_blocks.-1` (the last one)."""
    samples: Count = 64
    """Examples that importance is measured on."""

    @field_validator("ratio")
    @classmethod
    def _some(cls, value: float | dict[str, float] | None) -> float | dict[str, float] | None:
        if value is not None and not any(value.values() if isinstance(value, dict) else [value]):
            refuse("must be greater than 0: nothing would leave; leave the pass out instead")
        return value

    @classmethod
    def options(cls, target: str, minutes: float) -> Sequence[Ladder]:
        """The block that is missed least; more of them, layouts, and shares of what is computed: healed."""
        heal = {"heal": {"minutes": part_of(minutes)}}

        def healed(choices: Sequence[dict[str, Any]]) -> Ladder:
            return [[{cls.kind: choice}, heal] for choice in choices]

        return [
            [[{cls.kind: {"blocks": 1}}]],
            healed([{"blocks": blocks} for blocks in (2, 0.5)]),
            healed([{"blocks": layout} for layout in get_args(Layout)]),
            healed([{"ratio": ratio, "cost": "macs"} for ratio in (0.1, 0.2, 0.3, 0.45)]),
        ]

    def problem(self, format: str, earlier: Sequence[Pass]) -> str | None:
        """Finds settings that contradict each other."""
        if isinstance(self.ratio, dict) and set(self.ratio) != set(self.targets):
            return f"gives ratios for {', '.join(self.ratio)} but its targets are {', '.join(self.targets)}"
        if self.latency is not None and self.ratio is not None:
            return "gives ratio and latency: one of them says how much leaves"
        if self.blocks == "fewest" and self.latency is None:
            return "takes the fewest blocks of what: give latency, or a number of blocks"
        return None

    @property
    def _narrows(self) -> bool:
        """Whether structures within blocks leave."""
        if self.latency is not None:
            return self.blocks != "fewest"
        return self.ratio is not None or (self.blocks is None and self.sparsity is None)

    def gives(self) -> frozenset[str]:
        """That it is another model; and zeros that are to stay."""
        return frozenset({"changed", "sparse"} if self.sparsity else {"changed"})

    def reads(self, context: Context) -> frozenset[str]:
        """What structures are judged on."""
        return learned_from(context)

    def objection(self, start: Start, earlier: Sequence[Pass]) -> str | None:
        """Finds a chain that has nothing to judge by, and paths of no block."""
        if not start.examples:
            return NO_EXAMPLES
        wrong = unmatched(self.keep, start.modules) if start.modules else None
        if wrong:
            return f"has a wrong keep: {wrong}"
        named = self.blocks in get_args(Layout)
        if named and start.layouts is not None and self.blocks not in start.layouts:
            known = ", ".join(sorted(start.layouts)) or "none was published"
            return (
                f"has blocks: {self.blocks}, a layout that this model cannot have ({known}); give a number of"
                " blocks, as `blocks: 2`: those that move the output least"
            )
        return None

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        """Judges, removes, measures the damage, saves.

        Raises:
            ConfigError: there is nothing to judge by: neither pictures nor prompts are known.
            ChainError: nothing leaves, `keep` names what is not there, or the model has no such layout.
            NonFiniteError: the output's gradients are not finite.
        """
        import copy

        from tunekit import families
        from tunekit.families.depth import renumbered
        from tunekit.passes import prunable, sparse
        from tunekit.passes.pace import Pace
        from tunekit.training.distill import HeldOut

        family = families.get(context.family)
        whole = context.open(artifact)
        parent = family.denoiser(whole)
        if wrong := unmatched(self.keep, [name for name, _ in parent.named_modules() if name]):
            raise ChainError(f"prune has a wrong keep: {wrong}", where=artifact.source)
        before, macs_before = prunable.parameters(parent), prunable.macs(family, whole)
        self._check_targets(family, parent, artifact)
        details: dict[str, Any] = {}
        gone: tuple[str, ...] = ()
        with context.examples(artifact, count=min(self.samples, DRAWN)) as (examples, accelerator):
            parent.to(accelerator.device)
            held, pace = HeldOut(family, parent, examples), Pace(family, whole)
            if self.blocks is not None:
                gone, details["whole"] = self._leaving(family, whole, held, pace, artifact, context)
                details["gone"] = list(gone)
            denoiser = copy.deepcopy(family.without(parent, gone) if gone else parent)
            # `keep` has the names of before.
            names = renumbered([name for name, _ in parent.named_modules()], gone)
            formerly = {now: name for name, now in names.items()}

            def stays(name: str) -> bool:
                return self._kept(formerly[name], parent)

            pipeline = around(whole, {family.facts.denoiser_name: denoiser})
            if self._narrows:
                details["blocks"] = self._narrowed(family, pipeline, examples, pace, stays, artifact)
            if self.sparsity:
                zeroed = sparse.halve(family, denoiser, stays)
                if not zeroed:
                    raise ChainError(
                        f"prune finds no layers in blocks to make {self.sparsity}",
                        where=artifact.source,
                        hint="keep less, or leave sparsity out",
                    )
                details["sparse"] = zeroed
            error = held.error(denoiser)
            timed = {"latency_ratio": pace.share(denoiser)} if self.latency is not None else {}
        context.save(pipeline, artifact)
        note = f"judged on {examples.origin}"
        if self.sparsity:
            note += (
                f"; {len(details['sparse'])} layers are {self.sparsity}: as large as before, and as slow but"
                " for cards that skip zeros"
            )
        if timed:
            note += (
                f"; a call takes {timed['latency_ratio']:.2f} of the time, measured here in turns"
                f" ({self.latency:g} was asked for)"
            )
        return Outcome(
            metrics={
                "parameters": prunable.parameters(denoiser),
                "parameters_before": before,
                "macs": prunable.macs(family, pipeline),
                "macs_before": macs_before,
                "relative_error": error,
                **({"blocks": sum(row["left"] for row in details["whole"])} if gone else {}),
                **timed,
            },
            details={**details, "note": note},
        )

    # Whole blocks -------------------------------------------------------------------------------------------

    def _leaving(
        self,
        family: Family,
        whole: Pipeline,
        held: HeldOut,
        pace: Pace,
        artifact: Artifact,
        context: Context,
    ) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
        """Paths of the modules that leave, and a row for each block that might have."""
        from dataclasses import replace

        from tunekit.passes import whole as blocks

        parent = family.denoiser(whole)

        def kept(name: str) -> bool:
            return self._kept(name, parent)

        def without(count: int) -> nn.Module:
            return family.without(parent, blocks.paths_of(ever_more[count]))

        found = blocks.find(family, parent, kept)
        total = blocks.size(family, whole, (), self.cost)
        costs = {item.name: total - blocks.size(family, whole, item.paths, self.cost) for item in found}
        if isinstance(self.blocks, str) and self.blocks != "fewest":
            gone = self._layout(family, parent, kept, artifact)
            return gone, blocks.rows(found, gone, costs, self.cost)
        if not found:
            raise ChainError(
                f"prune finds no whole blocks that may leave the {family.facts.denoiser_name}",
                where=artifact.source,
                hint="keep less, or leave blocks out and give ratio" if self.keep else "give ratio instead",
            )
        context.say(f"leaving out each of {len(found)} blocks")
        found = [replace(item, error=held.error(family.without(parent, item.paths))) for item in found]
        share = isinstance(self.blocks, float)
        ever_more = blocks.steps(blocks.ranked(found, costs, per_cost=share))
        most = len(ever_more) - 1
        if share:
            assert isinstance(self.blocks, float)
            every = total - blocks.size(family, whole, blocks.paths_of(ever_more[-1]), self.cost)
            wanted = total - self.blocks * every
            count = next(
                number
                for number in range(1, most + 1)
                if number == most
                or blocks.size(family, whole, blocks.paths_of(ever_more[number]), self.cost) <= wanted
            )
        elif self.blocks == "fewest":
            assert self.latency is not None
            enough = pace.fewest(without, most, self.latency)
            if enough is None:
                raise self._too_slow(pace, artifact)
            count = enough
        else:
            assert isinstance(self.blocks, int)
            count = self.blocks
        if count > most:
            raise ChainError(
                f"prune is to take {count} whole blocks, and {most} may leave the"
                f" {family.facts.denoiser_name}: {', '.join(item.name for item in found)}",
                where=artifact.source,
                hint="take fewer" + (", or keep less" if self.keep else ""),
            )
        gone = blocks.paths_of(ever_more[count])
        return gone, blocks.rows(found, gone, costs, self.cost)

    def _layout(
        self, family: Family, parent: nn.Module, kept: Callable[[str], bool], artifact: Artifact
    ) -> tuple[str, ...]:
        """What a published layout is without."""
        from tunekit.passes.whole import touched

        layouts = family.layouts(parent)
        gone = layouts.get(str(self.blocks))
        if gone is None:
            known = f"there are {', '.join(layouts)}" if layouts else "no layout of it was published"
            raise ChainError(
                f"prune has blocks: {self.blocks}, which the {family.facts.denoiser_name} of this model"
                f" cannot become: {known}",
                where=artifact.source,
                hint="give a number of blocks, as `blocks: 2`: those that move the output least",
            )
        if stays := touched(parent, gone, kept):
            raise ChainError(
                f"prune has blocks: {self.blocks}, which is without {stays}, and keep names that",
                where=artifact.source,
                hint="keep less, or give a number of blocks",
            )
        return gone

    def _too_slow(self, pace: Pace, artifact: Artifact) -> ChainError:
        nearest = min((share for _, share in pace.seen), default=1.0)
        return ChainError(
            f"prune cannot reach latency {self.latency:g} here: the nearest was {nearest:.2f} of the time",
            where=artifact.source,
            hint="raise latency, lower floor or multiple, or keep less",
        )

    # Within blocks ------------------------------------------------------------------------------------------

    def _check_targets(self, family: Family, parent: nn.Module, artifact: Artifact) -> None:
        from tunekit.passes import prunable

        if not self._narrows:
            return
        structures = prunable.find(parent, self.targets)
        absent = set(self.targets) - {item.target for item in structures}
        # Not every network has all of them, and the usual targets are for all networks.
        if absent and (not structures or "targets" in self.model_fields_set):
            raise ChainError(
                f"prune finds no {' and no '.join(sorted(absent))} to remove in the"
                f" {family.facts.denoiser_name}",
                where=artifact.source,
                hint="leave that out of targets",
            )

    def _narrowed(
        self,
        family: Family,
        pipeline: Pipeline,
        examples: CalibrationSet,
        pace: Pace,
        stays: Callable[[str], bool],
        artifact: Artifact,
    ) -> list[dict[str, Any]]:
        """Removes the least important structures of the denoiser; a row for each block."""
        import copy

        from tunekit.passes import prunable

        denoiser = family.denoiser(pipeline)

        def found_in(module: nn.Module) -> list[Structures]:
            every = prunable.find(module, self.targets)
            return [item for item in every if not stays(item.name)]

        found = found_in(denoiser)
        if self.importance == "magnitude":
            scores = prunable.magnitudes(found)
        else:
            scores = self._importance(found, family, denoiser, examples)
        costs = (
            prunable.macs_each(found, family, pipeline)
            if self.cost == "macs"
            else [item.parameters for item in found]
        )
        if not all(bool(score.isfinite().all()) for score in scores):
            raise NonFiniteError("the gradients of the model's output are not finite", where=artifact.source)
        ratio: float | dict[Target, float] = USUAL if self.ratio is None else self.ratio

        def narrower(share: float) -> nn.Module:
            made = copy.deepcopy(denoiser)
            self._remove(found_in(made), scores, costs, share)
            return made

        if self.latency is not None:
            ratio = 0.0
            if pace.share(denoiser) > self.latency:  # what whole blocks took may do
                enough = pace.least(narrower, self.latency)
                if enough is None:
                    raise self._too_slow(pace, artifact)
                ratio = enough
        before = prunable.parameters(denoiser)
        table = self._remove(found, scores, costs, ratio)
        if ratio and prunable.parameters(denoiser) == before:
            raise ChainError(
                f"prune would remove nothing of {len(found)} blocks: ratio {ratio}, floor"
                f" {self.floor} and multiple {self.multiple} leave nothing to take",
                where=artifact.source,
                hint="raise ratio, lower floor or multiple, or keep less",
            )
        return table

    def _kept(self, name: str, denoiser: nn.Module) -> bool:
        from tunekit.layers import under

        return under(name, denoiser, self.keep)

    def _importance(
        self, found: Sequence[Structures], family: Family, denoiser: nn.Module, examples: CalibrationSet
    ) -> list[torch.Tensor]:
        import torch

        from tunekit.passes.prunable import Activation, Sensitivity

        generator = torch.Generator().manual_seed(examples.seed)
        device = next(denoiser.parameters()).device
        slopes = self.importance != "activation"
        by: Literal["taylor", "gradient"] = "gradient" if self.importance == "gradient" else "taylor"
        judge = Sensitivity(found, by=by) if slopes else Activation(found)
        with judge, torch.set_grad_enabled(slopes):
            for batch in examples.batches(self.samples, 4, purpose="importance"):
                moved = batch.to(device)
                noised = examples.objective.sample(moved.latents, moved.noise, moved.timesteps)
                told = family.conditioning(moved.conditioning, moved.frame)
                # The weights are frozen, so it is the input that gradients have to begin at.
                output = family.denoise(denoiser, noised.noisy.requires_grad_(), noised.timesteps, told)
                if isinstance(judge, Sensitivity):
                    judge.add(output, generator)
        return judge.scores

    def _remove(
        self,
        found: Sequence[Structures],
        scores: Sequence[torch.Tensor],
        costs: Sequence[int],
        ratio: float | Mapping[Target, float],
    ) -> list[dict[str, Any]]:
        """Removes the least important structures; returns a row per block for the report."""
        groups: list[tuple[list[int], float]] = (
            [
                ([i for i, item in enumerate(found) if item.target == target], share)
                for target, share in ratio.items()
            ]
            if isinstance(ratio, Mapping)
            else [(list(range(len(found))), ratio)]
        )
        if self.spread == "uniform":
            groups = [([index], share) for indices, share in groups for index in indices]
        stay = [item.count for item in found]
        for indices, share in groups:
            kept = choose(
                [found[i] for i in indices],
                [scores[i] for i in indices],
                [costs[i] for i in indices],
                share,
                self.floor,
                self.multiple,
            )
            for index, count in zip(indices, kept, strict=True):
                stay[index] = count
        rows = []
        for item, score, count in zip(found, scores, stay, strict=True):
            if count < item.count:
                best = score.topk(count).indices.sort().values.tolist()
                item.keep(best)
            rows.append({"block": item.name, "what": item.target, "before": item.count, "after": count})
        return rows


def choose(
    found: Sequence[Structures],
    scores: Sequence[torch.Tensor],
    costs: Sequence[int],
    share: float,
    floor: float,
    multiple: int,
) -> list[int]:
    """How many structures of each block stay, so that about `share` of the cost of all leaves.

    Args:
        found: the blocks.
        scores: importance of each structure of each block; compared per cost.
        costs: of one structure of each block.
        share: of the cost.
        floor: least share of a block that stays.
        multiple: channels that stay in a block are a multiple of it (heads are not rounded).
    """
    import math

    import torch

    if not found:
        return []
    total = sum(item.count * cost for item, cost in zip(found, costs, strict=True))
    worth = torch.cat([score / cost for score, cost in zip(scores, costs, strict=True)])
    owner = torch.cat([torch.full((item.count,), index) for index, item in enumerate(found)])
    order = owner[worth.argsort(stable=True)]

    def kept(removed: int) -> list[int]:
        gone = torch.bincount(order[:removed], minlength=len(found)).tolist()
        result = []
        for item, count in zip(found, gone, strict=True):
            block = 1 if item.target == "heads" else multiple // math.gcd(multiple, item.width)
            least = max(1, math.ceil(item.count * floor))
            rounded = math.ceil(max(item.count - count, least) / block) * block
            result.append(min(rounded, item.count))
        return result

    def leaving(removed: int) -> int:
        left = zip(found, costs, kept(removed), strict=True)
        return sum((item.count - stays) * cost for item, cost, stays in left)

    low, high = 0, len(order)
    while low < high:  # the fewest that free enough: rounding up keeps some that rank low
        middle = (low + high) // 2
        low, high = (low, middle) if leaving(middle) >= share * total else (middle + 1, high)
    return kept(low)


PASS = Prune
