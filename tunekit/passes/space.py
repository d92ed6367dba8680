"""What a search may combine: passes with their choices, as chains that can be run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tunekit.errors import ChainError
from tunekit.passes.base import Pass, Start, check_chain, parse_chain
from tunekit.passes.providers import Provider
from tunekit.passes.tradeoff import Point, Rungs

TargetName = Literal["cpu", "openvino", "cuda", "torch"]


@dataclass(frozen=True)
class Target:
    """What a model is made for.

    Attributes:
        export: the pass that makes its format, as in YAML; None: it stays in torch.
        provider: what runs it there, of an ONNX model.
        format: of the result.
    """

    export: Any
    provider: Provider | None = None
    format: str = "onnx"


TARGETS: Mapping[TargetName, Target] = {
    "cpu": Target("export_onnx", "cpu"),
    "openvino": Target({"export_openvino": {"precision": "bf16"}}, format="openvino"),
    "cuda": Target({"export_onnx": {"dtype": "fp16"}}, "cuda"),
    "torch": Target(None, format="torch"),
}


@dataclass(frozen=True)
class Space:
    """Passes, each with its choices.

    Attributes:
        names: of the passes.
        choices: of each pass chains as in YAML; the first is empty.
        rungs: on which ladders they stand.
        target: what all are made for.
        absent: choices that passes offer and this model cannot have, in words.
    """

    names: Sequence[str]
    choices: Sequence[Sequence[list[Any]]]
    rungs: Sequence[Rungs]
    target: Target
    absent: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        passes: Sequence[str | dict[str, list[dict[str, Any]]]],
        target: TargetName,
        minutes: float,
        start: Start | None = None,
    ) -> Space:
        """Reads what a search was told.

        Args:
            passes: names of passes, whose own choices are taken; or a pass and its settings, mildest first.
            minutes: that the search has.
            start: the model; what a pass offers and this one cannot have is left out.

        Raises:
            ChainError: settings that the pass does not take, or of those given, that the model cannot have.
        """
        from tunekit.registry import PASSES

        names: list[str] = []
        choices: list[list[list[Any]]] = []
        rungs: list[Rungs] = []
        absent: list[str] = []
        made = TARGETS[target]
        whole = dataclasses.replace(start, format="torch") if start is not None else None
        for item in passes:
            if isinstance(item, str):
                name, own = item, True
                ladders = PASSES.get(item).options(target, minutes)
            else:
                ((name, settings),) = item.items()
                own, ladders = False, [[[{name: dict(one)}] for one in settings]]
            kept: list[list[Any]] = [[]]
            refused: list[str] = []
            for ladder in ladders:
                numbers = []
                for chain in map(list, ladder):
                    steps = parse_chain(chain, lambda index, key, name=name: f"passes.{name}")  # type: ignore[misc]
                    try:
                        if whole is not None:
                            check_chain(parse_chain(placed(chain, made)), whole)
                    except ChainError as error:
                        if not own:
                            raise ChainError(f"cannot try {describe(chain)}: {error.message}") from error
                        refused.append(f"{describe(chain)}: {error.message}")
                        continue
                    numbers.append(len(kept))
                    kept.append(chain)
                if numbers:
                    rungs.append(Rungs(len(names), numbers, _effort(steps)))
            if len(kept) > 1:
                names.append(name)
                choices.append(kept)
                absent += refused
            elif refused:
                raise ChainError(f"cannot try {refused[0]}")
        return cls(names, choices, rungs, made, absent)

    @property
    def sizes(self) -> list[int]:
        """How many choices each pass has, none at all among them."""
        return [len(chains) for chains in self.choices]

    @property
    def origin(self) -> Point:
        """Nothing but the export."""
        return (0,) * len(self.names)

    def chain(self, point: Point) -> list[Any]:
        """A combination as in YAML, the export among its passes: behind all that need torch."""
        items = [item for of, choice in zip(self.choices, point, strict=True) for item in of[choice]]
        return placed(items, self.target)


def placed(items: Sequence[Any], target: Target) -> list[Any]:
    """Passes with the export among them: behind all that need torch."""
    if target.export is None:
        return list(items)
    steps = parse_chain(items)
    early = [item for item, step in zip(items, steps, strict=True) if target.format not in step.accepts]
    late = [item for item, step in zip(items, steps, strict=True) if target.format in step.accepts]
    return [*early, target.export, *late]


def _effort(steps: Sequence[Pass]) -> int:
    """0: no file changes; 1: another model is made; 2: one is trained."""
    if any(step.learns for step in steps):
        return 2
    return 0 if all(step.redraws for step in steps) else 1


def describe(chain: Sequence[Any]) -> str:
    """A chain in a few words: "prune ratio 0.3, heal, export_onnx, quantize mode static"."""
    words = []
    for item in chain:
        ((kind, settings),) = item.items() if isinstance(item, Mapping) else ((item, None),)
        words.append(" ".join([str(kind), *_told(settings or {})]))
    return ", ".join(words) or "nothing"


def _told(settings: Mapping[str, Any]) -> list[str]:
    """Settings in words; of lists, nothing."""
    return [
        " ".join([key, *_told(value)]) if isinstance(value, Mapping) else f"{key} {value}"
        for key, value in settings.items()
        if not isinstance(value, list)
    ]
