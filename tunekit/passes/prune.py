"""Removes whole channels, attention heads and groups from the denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from tunekit.config import Count, Names, refuse
from tunekit.errors import ChainError, NonFiniteError
from tunekit.passes.base import DISTINCT, NO_EXAMPLES, Context, Distinct, Outcome, Pass, Start, learned_from
from tunekit.passes.metrics import PARAMETERS, RELATIVE_ERROR, SIZE, Metric
from tunekit.passes.models import around
from tunekit.passes.paths import unmatched

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tunekit.artifacts import Artifact
    from tunekit.data.calibration import CalibrationSet
    from tunekit.families.family import Family
    from tunekit.passes.prunable import Structures

Target = Literal["feed_forward", "heads", "resnet"]
Share = Annotated[float, Field(ge=0, lt=1)]

DRAWN = 32
"""Pictures that are drawn at most where the run has none; more examples differ in noise and timestep."""


class Prune(Pass):
    """Removes whole feed-forward channels, attention heads and residual-block groups; shapes shrink.

    Structures are ranked by how far the output moves when one is silenced, to first order (`taylor`, see
    `tunekit.passes.prunable.Sensitivity` for the measure and its sources), per cost that leaves with it. What
    is left computes exactly what the same model with those structures silenced computes.
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
    )

    ratio: Share | dict[Target, Share] = 0.25
    """Share of the targets' cost that leaves; or one share for each target."""
    cost: Literal["parameters", "macs"] = "parameters"
    """What `ratio` is a share of, and what importance is weighed against: parameters make the model small,
    macs (multiply-adds) make it fast."""
    targets: Distinct[Target] = Field(["feed_forward", "heads", "resnet"], min_length=1)
    """What may leave: feed-forward channels, attention heads, groups of residual blocks' inner channels.
    Where it is not given, those that the network has."""
    importance: Literal["taylor", "magnitude"] = "taylor"
    """taylor measures on examples; magnitude looks at the weights only."""
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
    def _some(cls, value: float | dict[str, float]) -> float | dict[str, float]:
        if not any(value.values() if isinstance(value, dict) else [value]):
            refuse("must be greater than 0: nothing would leave; leave the pass out instead")
        return value

    @classmethod
    def options(cls, target: str) -> Sequence[Sequence[Any]]:
        """Rising shares of what is computed, each healed."""
        return [[{cls.kind: {"ratio": ratio, "cost": "macs"}}, "heal"] for ratio in (0.1, 0.2, 0.3, 0.45)]

    def problem(self, format: str, earlier: Sequence[Pass]) -> str | None:
        """Finds settings that contradict each other."""
        if isinstance(self.ratio, dict) and set(self.ratio) != set(self.targets):
            return f"gives ratios for {', '.join(self.ratio)} but its targets are {', '.join(self.targets)}"
        return None

    def reads(self, context: Context) -> frozenset[str]:
        """What structures are judged on."""
        return learned_from(context)

    def objection(self, start: Start, earlier: Sequence[Pass]) -> str | None:
        """Finds a chain that has nothing to judge by, and paths of no block."""
        if not start.examples:
            return NO_EXAMPLES
        wrong = unmatched(self.keep, start.modules) if start.modules else None
        return f"has a wrong keep: {wrong}" if wrong else None

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        """Judges, removes, measures the damage, saves.

        Raises:
            ConfigError: there is nothing to judge by: neither pictures nor prompts are known.
            ChainError: nothing leaves, or `keep` names what is not there.
            NonFiniteError: the output's gradients are not finite.
        """
        import copy

        from tunekit import families
        from tunekit.passes import prunable
        from tunekit.training.distill import output_error

        family = families.get(context.family)
        whole = context.open(artifact)
        parent = family.denoiser(whole)
        denoiser = copy.deepcopy(parent)
        pipeline = around(whole, {family.facts.denoiser_name: denoiser})
        if wrong := unmatched(self.keep, [name for name, _ in denoiser.named_modules() if name]):
            raise ChainError(f"prune has a wrong keep: {wrong}", where=artifact.source)
        before, macs_before = prunable.parameters(parent), prunable.macs(family, whole)
        structures = prunable.find(denoiser, self.targets)
        absent = set(self.targets) - {item.target for item in structures}
        # Not every network has all of them, and the usual targets are for all networks.
        if absent and (not structures or "targets" in self.model_fields_set):
            raise ChainError(
                f"prune finds no {' and no '.join(sorted(absent))} to remove in the"
                f" {family.facts.denoiser_name}",
                where=artifact.source,
                hint="leave that out of targets",
            )
        found = [item for item in structures if not self._kept(item.name, denoiser)]
        with context.examples(artifact, count=min(self.samples, DRAWN)) as (examples, accelerator):
            denoiser.to(accelerator.device)
            if self.importance == "magnitude":
                scores = prunable.magnitudes(found)
            else:
                scores = self._sensitivity(found, family, denoiser, examples)
            costs = (
                prunable.macs_each(found, family, pipeline)
                if self.cost == "macs"
                else [item.parameters for item in found]
            )
            if not all(bool(score.isfinite().all()) for score in scores):
                raise NonFiniteError(
                    "the gradients of the model's output are not finite", where=artifact.source
                )
            table = self._remove(found, scores, costs)
            if prunable.parameters(denoiser) == before:
                raise ChainError(
                    f"prune would remove nothing of {len(found)} blocks: ratio {self.ratio}, floor"
                    f" {self.floor} and multiple {self.multiple} leave nothing to take",
                    where=artifact.source,
                    hint="raise ratio, lower floor or multiple, or keep less",
                )
            error = output_error(family, denoiser, parent.to(accelerator.device), examples)
        context.save(pipeline, artifact)
        return Outcome(
            metrics={
                "parameters": prunable.parameters(denoiser),
                "parameters_before": before,
                "macs": prunable.macs(family, pipeline),
                "macs_before": macs_before,
                "relative_error": error,
            },
            details={"blocks": table, "note": f"judged on {examples.origin}"},
        )

    def _kept(self, name: str, denoiser: nn.Module) -> bool:
        from tunekit.layers import under

        return under(name, denoiser, self.keep)

    def _sensitivity(
        self, found: Sequence[Structures], family: Family, denoiser: nn.Module, examples: CalibrationSet
    ) -> list[torch.Tensor]:
        import torch

        from tunekit.passes.prunable import Sensitivity

        generator = torch.Generator().manual_seed(examples.seed)
        device = next(denoiser.parameters()).device
        with Sensitivity(found) as sensitivity:
            for batch in examples.batches(self.samples, 4, purpose="importance"):
                moved = batch.to(device)
                noised = examples.objective.sample(moved.latents, moved.noise, moved.timesteps)
                told = family.conditioning(moved.conditioning, moved.frame)
                # The weights are frozen, so it is the input that gradients have to begin at.
                output = family.denoise(denoiser, noised.noisy.requires_grad_(), noised.timesteps, told)
                sensitivity.add(output, generator)
        return sensitivity.scores

    def _remove(
        self, found: Sequence[Structures], scores: Sequence[torch.Tensor], costs: Sequence[int]
    ) -> list[dict[str, Any]]:
        """Removes the least important structures; returns a row per block for the report."""
        groups: list[tuple[list[int], float]] = (
            [
                ([i for i, item in enumerate(found) if item.target == target], share)
                for target, share in self.ratio.items()
            ]
            if isinstance(self.ratio, dict)
            else [(list(range(len(found))), self.ratio)]
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
