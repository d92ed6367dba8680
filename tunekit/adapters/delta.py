"""One update per module, as it is in the model. All that one kind of adapter needs is one class here."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Generator, Tensor, nn

from tunekit.errors import AdapterError

NAME = "default"  # of the adapter inside the model
SHOWN = 3  # keys named in a message

State = dict[str, Tensor]


@dataclass(frozen=True)
class Delta(ABC):
    """The update of one Linear or Conv2d: what every kind of adapter answers.

    Attributes:
        kind: of `adapter.kind`.
        config: PEFT's class for its settings.
        peft_names: what its tensors are called in PEFT's files, after the module: field -> ending.
        kohya_names: likewise in kohya's.
        alpha: the strength.
    """

    kind: ClassVar[str]
    config: ClassVar[type]
    peft_names: ClassVar[Mapping[str, str]]
    kohya_names: ClassVar[Mapping[str, str]]
    alpha: float

    @property
    @abstractmethod
    def rank(self) -> int:
        """Of the update."""

    @abstractmethod
    def apply(self, weight: Tensor) -> Tensor:
        """Return `weight` with the update folded in, computed in float32, in the dtype of `weight`."""

    def peft(self) -> State:
        """Its tensors as PEFT lays them out, by ending; they share memory with the update."""
        return {ending: getattr(self, field) for field, ending in self.peft_names.items()}

    def kohya(self) -> State:
        """Its tensors as kohya's tools lay them out, by ending, without alpha."""
        return {ending: getattr(self, field) for field, ending in self.kohya_names.items()}

    @classmethod
    def from_peft(cls, tensors: State, alpha: float | None) -> Self:
        """Make one of what `peft` gives."""
        return cls.read({field: tensors[ending] for field, ending in cls.peft_names.items()}, alpha)

    @classmethod
    def from_kohya(cls, tensors: State, alpha: float | None) -> Self:
        """Make one of what `kohya` gives.

        Raises:
            AdapterError: a variant that cannot be read.
        """
        return cls.read({field: tensors[ending] for field, ending in cls.kohya_names.items()}, alpha)

    @abstractmethod
    def shapes(self, layer: Any) -> dict[str, tuple[int, ...]]:
        """What its fields have to be, to fit a Linear or Conv2d."""

    @classmethod
    @abstractmethod
    def read(cls, tensors: State, alpha: float | None) -> Self:
        """Make one of its tensors, by field; without alpha the strength is the rank (scale 1)."""

    @classmethod
    @abstractmethod
    def settings(cls, rank: int, alpha: float, targets: Sequence[str], dropout: float) -> dict[str, Any]:
        """What `config` is given, and the header of PEFT's files says: only keys that every peft knows."""

    @classmethod
    @abstractmethod
    def on(cls, layer: nn.Module) -> bool:
        """Whether a layer carries one of this kind, or of a kind that is more than this one."""

    @classmethod
    @abstractmethod
    def of(cls, layer: Any) -> Self:
        """What the adapter of one layer is now; the tensors are the layer's own."""

    @classmethod
    @abstractmethod
    def draw(cls, layer: Any, generator: Generator) -> None:
        """Draw the initial weights of one layer's adapter."""


@dataclass(frozen=True)
class Lora(Delta):
    """weight + alpha / rank * up @ down (Hu et al. 2021, arXiv:2106.09685).

    Attributes:
        down: [r, in] or [r, in, k, k].
        up: [out, r] or [out, r, 1, 1].
    """

    kind: ClassVar[str] = "lora"
    config: ClassVar[type] = LoraConfig
    peft_names: ClassVar[Mapping[str, str]] = {"down": "lora_A.weight", "up": "lora_B.weight"}
    kohya_names: ClassVar[Mapping[str, str]] = {"down": "lora_down.weight", "up": "lora_up.weight"}
    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return self.down.shape[0]

    def updated(self, weight: Tensor) -> Tensor:
        """Return `weight` with the update, in float32."""
        update = (self.up.float().flatten(1) @ self.down.float().flatten(1)).view(weight.shape)
        return weight.float() + self.alpha / self.rank * update.to(weight.device)

    def apply(self, weight: Tensor) -> Tensor:
        return self.updated(weight).to(weight.dtype)

    def shapes(self, layer: Any) -> dict[str, tuple[int, ...]]:
        if isinstance(layer, nn.Linear):
            return {"down": (self.rank, layer.in_features), "up": (layer.out_features, self.rank)}
        return {
            "down": (self.rank, layer.in_channels // layer.groups, *layer.kernel_size),
            "up": (layer.out_channels, self.rank, 1, 1),
        }

    @classmethod
    def read(cls, tensors: State, alpha: float | None) -> Self:
        return cls(**tensors, alpha=float(len(tensors["down"])) if alpha is None else alpha)

    @classmethod
    def settings(cls, rank: int, alpha: float, targets: Sequence[str], dropout: float) -> dict[str, Any]:
        return {
            "r": rank,
            "lora_alpha": alpha,  # annotated int; any float works
            "lora_dropout": dropout,
            "target_modules": list(targets),
            "use_dora": False,
            "rank_pattern": {},  # asked for by diffusers before 0.40
            "alpha_pattern": {},
        }

    @classmethod
    def on(cls, layer: nn.Module) -> bool:
        return isinstance(layer, LoraLayer) and NAME in layer.lora_A

    @classmethod
    def of(cls, layer: Any) -> Self:
        return cls.read(cls.tensors_of(layer), float(layer.lora_alpha[NAME]))

    @classmethod
    def tensors_of(cls, layer: Any) -> State:
        """The tensors of one layer's adapter, by field."""
        return {"down": layer.lora_A[NAME].weight.detach(), "up": layer.lora_B[NAME].weight.detach()}

    @classmethod
    def draw(cls, layer: Any, generator: Generator) -> None:
        weight = layer.lora_A[NAME].weight
        drawn = torch.empty(weight.shape)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        weight.data.copy_(drawn)


@dataclass(frozen=True)
class Dora(Lora):
    """LoRA that also learns the norms of the weight's rows (Liu et al. 2024, arXiv:2402.09353, equation 5).

    Attributes:
        magnitude: [out], the norms.
    """

    kind: ClassVar[str] = "dora"
    peft_names: ClassVar[Mapping[str, str]] = {**Lora.peft_names, "magnitude": "lora_magnitude_vector"}
    kohya_names: ClassVar[Mapping[str, str]] = {**Lora.kohya_names, "magnitude": "dora_scale"}
    magnitude: Tensor

    def apply(self, weight: Tensor) -> Tensor:
        updated = self.updated(weight)
        norm: Tensor = updated.flatten(1).norm(dim=1)
        factor = self.magnitude.float().to(weight.device) / norm
        return (updated * factor.view(-1, *[1] * (weight.ndim - 1))).to(weight.dtype)

    def peft(self) -> State:
        shape = (-1,) if self.down.ndim == 2 else (1, -1, 1, 1)
        return {**super().peft(), "lora_magnitude_vector": self.magnitude.view(shape)}

    def kohya(self) -> State:
        # One column, so that it scales rows: ComfyUI tells the axis from the shape.
        return {**super().kohya(), "dora_scale": self.magnitude.view(-1, *[1] * (self.down.ndim - 1))}

    def shapes(self, layer: Any) -> dict[str, tuple[int, ...]]:
        needed = super().shapes(layer)
        return {**needed, "magnitude": needed["up"][:1]}

    @classmethod
    def from_kohya(cls, tensors: State, alpha: float | None) -> Self:
        scale = tensors["dora_scale"]
        if scale.ndim > 1 and len(scale) == 1 and scale.numel() > 1:
            raise AdapterError(
                f"its dora_scale of shape {list(scale.shape)} scales the weight's columns, not its rows",
                hint="it was made by a method other than PEFT's DoRA, such as LyCORIS without wd_on_output",
            )
        return super().from_kohya(tensors, alpha)

    @classmethod
    def read(cls, tensors: State, alpha: float | None) -> Self:
        return super().read({**tensors, "magnitude": tensors["magnitude"].reshape(-1)}, alpha)

    @classmethod
    def settings(cls, rank: int, alpha: float, targets: Sequence[str], dropout: float) -> dict[str, Any]:
        return {**super().settings(rank, alpha, targets, dropout), "use_dora": True}

    @classmethod
    def on(cls, layer: nn.Module) -> bool:
        return super().on(layer) and NAME in layer.lora_magnitude_vector  # type: ignore[operator]

    @classmethod
    def tensors_of(cls, layer: Any) -> State:
        return {**super().tensors_of(layer), "magnitude": layer.lora_magnitude_vector[NAME].weight.detach()}


KINDS: dict[str, type[Delta]] = {kind.kind: kind for kind in (Lora, Dora)}
"""By `adapter.kind`; a kind that is more than another stands after it."""

Deltas = dict[str, dict[str, Delta]]
"""Component ("unet", "text_encoder") -> module path -> update."""


def adapted(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers that carry the adapter, under their paths."""
    for path, layer in module.named_modules():
        if any(kind.on(layer) for kind in KINDS.values()):
            yield path, layer


def deltas_of(module: nn.Module) -> dict[str, Delta]:
    """Return the updates of a module's layers by path; the tensors are the layers' own."""
    kinds = list(reversed(KINDS.values()))
    return {path: next(kind for kind in kinds if kind.on(layer)).of(layer) for path, layer in adapted(module)}


def parameters_of(layer: Any) -> Iterator[nn.Parameter]:
    """Yield what one layer's adapter is made of."""
    for part in layer.adapter_layer_names:
        yield from getattr(layer, part).parameters()


def modules_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that can carry an adapter, under their paths without the adapter's own wrapping."""
    return dict(_targetable(module, ""))


def _targetable(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, BaseTunerLayer):
            yield prefix + name, child.get_base_layer()
        elif isinstance(child, nn.Linear | nn.Conv2d):
            yield prefix + name, child
        else:
            yield from _targetable(child, f"{prefix}{name}.")


def peft_state(deltas: Mapping[str, Delta]) -> State:
    """Lay the updates of one component out as PEFT does, without a prefix."""
    return {
        f"{path}.{ending}": tensor
        for path, delta in deltas.items()
        for ending, tensor in delta.peft().items()
    }


def check_shape(name: str, delta: Delta, module: nn.Module) -> None:
    """Raise unless an update fits the module it is for."""
    for field, shape in delta.shapes(module).items():
        found = list(getattr(delta, field).shape)
        if found != list(shape):
            raise AdapterError(
                f"{name}: its {delta.peft_names[field]} is {found}, this model needs {list(shape)}",
                hint="the adapter was made for another base (another version, or before pruning)",
            )


def some(keys: Sequence[str]) -> str:
    """Name the first few keys in a message."""
    return ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")
