"""One update per module, as it is in the model. All that one kind of adapter needs is one class here."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Generator, Tensor, nn

NAME = "default"  # of the adapter inside the model
SHOWN = 3  # keys named in a message

_IN_DOTTED = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}

State = dict[str, Tensor]


@dataclass(frozen=True)
class Delta(ABC):
    """The update of one layer: what can be read, and folded into the weights.

    Attributes:
        bias: [out], what is added to the layer's bias.
        by_row: fields with an entry for each row of the layer's weight.
    """

    by_row: ClassVar[tuple[str, ...]] = ("bias",)
    bias: Tensor | None = field(default=None, kw_only=True)

    @abstractmethod
    def apply(self, weight: Tensor) -> Tensor:
        """Return `weight` with the update folded in, computed in float32, in the dtype of `weight`."""

    @abstractmethod
    def shapes(self, layer: Any) -> dict[str, tuple[int, ...]]:
        """What its fields have to be, to fit a layer."""

    @property
    def bound(self) -> float:
        """No entry of what is added, before any scaling to a length, is larger than this."""
        return 0.0

    def rows(self, index: Tensor) -> Self:
        """Return the update of these rows of the layer's weight, [n] int64, in that order."""
        fields = {name: getattr(self, name) for name in self.by_row}
        return dataclasses.replace(
            self, **{name: None if tensor is None else tensor[index] for name, tensor in fields.items()}
        )

    def split(self, sizes: Sequence[int]) -> list[Self]:
        """Return the updates of the layers that this one's rows stack, `sizes` rows each."""
        return [self.rows(index) for index in torch.split(torch.arange(sum(sizes)), list(sizes))]


@dataclass(frozen=True)
class Full(Delta):
    """What is added to a weight as it stands: of a convolution or a matrix, or of a norm.

    Attributes:
        weight: in the layer's own shape; None where it is its bias alone that changes.
    """

    by_row: ClassVar[tuple[str, ...]] = ("bias", "weight")
    weight: Tensor | None

    def apply(self, weight: Tensor) -> Tensor:
        if self.weight is None:
            return weight
        return (weight.float() + self.weight.float().to(weight.device)).to(weight.dtype)

    def shapes(self, layer: Any) -> dict[str, tuple[int, ...]]:
        return {} if self.weight is None else {"weight": weight_shape(layer)}


@dataclass(frozen=True)
class Kind(Delta):
    """The update of one Linear or Conv2d by an adapter that can be trained: what every kind of it answers.

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
    def with_alpha(self, alpha: float) -> Self:
        """Return the same update, said with another alpha."""

    def peft(self) -> State:
        """Its tensors as PEFT lays them out, by ending; they share memory with the update."""
        return {ending: getattr(self, field) for field, ending in self.peft_names.items()}

    def kohya(self) -> State:
        """Its tensors as kohya's tools lay them out, by ending, without alpha."""
        return {ending: getattr(self, field) for field, ending in self.kohya_names.items()}

    def dotted(self) -> State:
        """Its tensors where names have dots and others than peft read them, by ending, without alpha."""
        return {_IN_DOTTED.get(ending, ending): tensor for ending, tensor in self.kohya().items()}

    @classmethod
    @abstractmethod
    def stack(cls, parts: Sequence[Self | None], layers: Sequence[Any]) -> Self:
        """Return the update of one layer that has the rows of `layers`; None changes nothing in its rows."""

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
class Lora(Kind):
    """weight + alpha / rank * up @ down (Hu et al. 2021, arXiv:2106.09685).

    Attributes:
        down: [r, in] or [r, in, k, k].
        up: [out, r] or [out, r, 1, 1].
    """

    kind: ClassVar[str] = "lora"
    config: ClassVar[type] = LoraConfig
    by_row: ClassVar[tuple[str, ...]] = ("bias", "up")
    peft_names: ClassVar[Mapping[str, str]] = {"down": "lora_A.weight", "up": "lora_B.weight"}
    kohya_names: ClassVar[Mapping[str, str]] = {"down": "lora_down.weight", "up": "lora_up.weight"}
    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return self.down.shape[0]

    @property
    def bound(self) -> float:
        largest = [float(t.abs().max().double()) if t.numel() else 0.0 for t in (self.down, self.up)]
        return abs(self.alpha) * largest[0] * largest[1]  # rank products of the two, over the rank

    def with_alpha(self, alpha: float) -> Self:
        if alpha == self.alpha:
            return self
        return dataclasses.replace(self, up=self.up.float() * (self.alpha / alpha), alpha=alpha)

    def updated(self, weight: Tensor) -> Tensor:
        """Return `weight` with the update, in float32."""
        update = (self.up.float().flatten(1) @ self.down.float().flatten(1)).view(weight.shape)
        return weight.float() + self.alpha / self.rank * update.to(weight.device)

    def apply(self, weight: Tensor) -> Tensor:
        return self.updated(weight).to(weight.dtype)

    def split(self, sizes: Sequence[int]) -> list[Self]:
        """As for any; each keeps the ranks that are its own, so that what was stacked comes back as it was.

        A layer that nothing was stacked for has rank 0.
        """
        found = []
        parts = super().split(sizes)
        for part, ranks in zip(parts, _own_ranks([part.up for part in parts]), strict=True):
            scale = part.alpha / part.rank
            down, up = part.down[ranks], part.up[:, ranks]
            found.append(dataclasses.replace(part, down=down, up=up, alpha=scale * len(down)))
        return found

    @classmethod
    def stack(cls, parts: Sequence[Self | None], layers: Sequence[Any]) -> Self:
        return cls(**cls._stacked(parts, layers))

    @classmethod
    def _stacked(cls, parts: Sequence[Self | None], layers: Sequence[Any]) -> dict[str, Any]:
        """The downs one above the other, the ups in blocks along the diagonal, and alpha.

        The ups stay as they are where all have one scale, and have theirs folded in where not.
        """
        there = [part for part in parts if part is not None]
        scales = [part.alpha / part.rank for part in there]
        one = all(math.isclose(scale, scales[0], rel_tol=1e-12) for scale in scales)
        rows = [weight_shape(layer)[0] for layer in layers]
        rank = sum(part.rank for part in there)
        up = there[0].up.new_zeros(sum(rows), rank, *there[0].up.shape[2:])
        row, column = 0, 0
        for part, count in zip(parts, rows, strict=True):
            if part is not None:
                own = part.up if one else part.up * (part.alpha / part.rank)
                up[row : row + count, column : column + part.rank] = own
                column += part.rank
            row += count
        scale = scales[0] if one else 1.0
        return {"down": torch.cat([part.down for part in there]), "up": up, "alpha": scale * rank}

    def shapes(self, layer: Any) -> dict[str, tuple[int, ...]]:
        out, *inside = weight_shape(layer)
        return {"down": (self.rank, *inside), "up": (out, self.rank, *[1] * (len(inside) - 1))}

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
    by_row: ClassVar[tuple[str, ...]] = (*Lora.by_row, "magnitude")
    axis: ClassVar[int] = 0
    magnitude: Tensor

    def apply(self, weight: Tensor) -> Tensor:
        updated = self.updated(weight)
        factor = self.magnitude.float().to(weight.device) / _lengths(updated, self.axis)
        return (updated * _along(factor, self.axis, weight.ndim)).to(weight.dtype)

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
    def read(cls, tensors: State, alpha: float | None) -> Self:
        return super().read({**tensors, "magnitude": tensors["magnitude"].flatten()}, alpha)

    @classmethod
    def stack(cls, parts: Sequence[Self | None], layers: Sequence[Any]) -> Self:
        known = next(part for part in parts if part is not None).magnitude
        lengths = [
            lengths_of(layer).to(known) if part is None else part.magnitude
            for part, layer in zip(parts, layers, strict=True)
        ]
        return cls(**cls._stacked(parts, layers), magnitude=torch.cat(lengths))

    @classmethod
    def of_lora(cls, lora: Lora, weight: Tensor) -> Dora:
        """Say a LoRA as a DoRA: its lengths are those that `weight` has with the update."""
        lengths = _lengths(lora.updated(weight), 0)
        return Dora(alpha=lora.alpha, down=lora.down, up=lora.up, magnitude=lengths, bias=lora.bias)

    @classmethod
    def settings(cls, rank: int, alpha: float, targets: Sequence[str], dropout: float) -> dict[str, Any]:
        return {**super().settings(rank, alpha, targets, dropout), "use_dora": True}

    @classmethod
    def on(cls, layer: nn.Module) -> bool:
        return super().on(layer) and NAME in layer.lora_magnitude_vector  # type: ignore[operator]

    @classmethod
    def tensors_of(cls, layer: Any) -> State:
        return {**super().tensors_of(layer), "magnitude": layer.lora_magnitude_vector[NAME].weight.detach()}


@dataclass(frozen=True)
class ColumnDora(Dora):
    """DoRA along the input axis, as LyCORIS trained it at first. It is read, and neither trained nor written.

    Attributes:
        magnitude: [in], the norms of the weight's columns.
    """

    by_row: ClassVar[tuple[str, ...]] = Lora.by_row
    axis: ClassVar[int] = 1

    def shapes(self, layer: Any) -> dict[str, tuple[int, ...]]:
        needed = super().shapes(layer)
        return {**needed, "magnitude": needed["down"][1:2]}


def lengths_of(layer: Any) -> Tensor:
    """The norms of the rows of a layer's weight, [out], which DoRA keeps where it changes nothing."""
    return _lengths(layer.weight.detach().float(), 0)


def _own_ranks(ups: Sequence[Tensor]) -> list[Tensor]:
    """Of updates that share their `down`: which ranks each has to itself, [r] bool.

    A rank that is zero in all of them may be anyone's: ranks are in equal parts where that can be, and else
    it goes with the one before it.
    """
    used = torch.stack([up.flatten(1).ne(0).any(dim=0) for up in ups]).cpu()
    parts, ranks = used.shape
    if ranks % parts == 0:
        equal = torch.eye(parts, dtype=torch.bool).repeat_interleave(ranks // parts, dim=1)
        if not (used & ~equal).any():
            return list(equal)
    if not used.any():
        return list(torch.ones_like(used))
    if int(used.sum(dim=0).max()) > 1:  # trained as one layer
        return list(used)
    owner, known = used.int().argmax(dim=0), used.any(dim=0)
    owner[: int(known.int().argmax())] = owner[known][0]
    for rank in range(1, ranks):
        owner[rank] = owner[rank] if known[rank] else owner[rank - 1]
    return [owner == part for part in range(parts)]


def _lengths(weight: Tensor, axis: int) -> Tensor:
    """The norms of a weight's parts along an axis, [size of the axis]; of nothing but zeros, a tiny one."""
    norms: Tensor = weight.transpose(0, axis).flatten(1).norm(dim=1)
    return norms.clamp_min(1e-30)


def _along(factor: Tensor, axis: int, ndim: int) -> Tensor:
    return factor.view(*(-1 if i == axis else 1 for i in range(ndim)))


KINDS: dict[str, type[Lora]] = {kind.kind: kind for kind in (Lora, Dora)}
"""By `adapter.kind`; a kind that is more than another stands after it."""

Deltas = dict[str, dict[str, Delta]]
"""Component ("unet", "text_encoder") -> module path -> update."""


def adapted(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers that carry the adapter, under their paths."""
    for path, layer in module.named_modules():
        if any(kind.on(layer) for kind in KINDS.values()):
            yield path, layer


def deltas_of(module: nn.Module) -> dict[str, Lora]:
    """Return the updates of a module's layers by path; the tensors are the layers' own."""
    kinds = list(reversed(KINDS.values()))
    return {path: next(kind for kind in kinds if kind.on(layer)).of(layer) for path, layer in adapted(module)}


def parameters_of(layer: Any) -> Iterator[nn.Parameter]:
    """Yield what one layer's adapter is made of."""
    for part in layer.adapter_layer_names:
        yield from getattr(layer, part).parameters()


def modules_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that can carry an adapter, under their paths without the adapter's own wrapping."""
    return dict(_layers(module, "", (nn.Linear, nn.Conv2d)))


def changeable(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that a file can change: those of `modules_of`, embeddings, and norms with weights."""
    types = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding)
    return {
        path: layer
        for path, layer in _layers(module, "", types)
        if not isinstance(layer, nn.GroupNorm | nn.LayerNorm) or layer.weight is not None
    }


def weight_shape(layer: Any) -> tuple[int, ...]:
    """Return the shape of a layer's weight, of a packed one too."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size
    return tuple(layer.weight.shape)


def _layers(module: nn.Module, prefix: str, types: tuple[type, ...]) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, BaseTunerLayer):
            yield prefix + name, child.get_base_layer()
        elif isinstance(child, types):
            yield prefix + name, child
        else:
            yield from _layers(child, f"{prefix}{name}.", types)


def peft_state(deltas: Mapping[str, Kind]) -> State:
    """Lay the updates of one component out as PEFT does, without a prefix."""
    return {
        f"{path}.{ending}": tensor
        for path, delta in deltas.items()
        for ending, tensor in delta.peft().items()
    }


def some(keys: Sequence[str]) -> str:
    """Name the first few keys in a message."""
    return ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")
