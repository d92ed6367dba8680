"""One update per module, as it is in the model: which layers carry one, and which can."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tunekit.errors import AdapterError

NAME = "default"  # of the adapter inside the model
SHOWN = 3  # keys named in a message

State = dict[str, Tensor]


@dataclass(frozen=True)
class Delta:
    """The update of one Linear or Conv2d: weight + alpha / rank * up @ down.

    Attributes:
        down: [r, in] or [r, in, k, k].
        up: [out, r] or [out, r, 1, 1].
        alpha: the strength.
        magnitude: [out], the norms of DoRA's weight rows; None for LoRA.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return self.down.shape[0]

    def apply(self, weight: Tensor) -> Tensor:
        """Return `weight` with the update folded in, computed in float32, in the dtype of `weight`."""
        update = (self.up.float().flatten(1) @ self.down.float().flatten(1)).view(weight.shape)
        merged = weight.float() + self.alpha / self.rank * update.to(weight.device)
        if self.magnitude is not None:  # DoRA, arXiv:2402.09353, equation 5
            norm = merged.flatten(1).norm(dim=1)
            factor = self.magnitude.float().to(weight.device) / norm
            merged = merged * factor.view(-1, *[1] * (weight.ndim - 1))
        return merged.to(weight.dtype)


Deltas = dict[str, dict[str, Delta]]
"""Component ("unet", "text_encoder") -> module path -> update."""


def delta_of(layer: Any) -> Delta:
    """Return what the adapter of one layer is now; the tensors are the layer's own."""
    magnitude = (
        layer.lora_magnitude_vector[NAME].weight.detach() if NAME in layer.lora_magnitude_vector else None
    )
    return Delta(
        down=layer.lora_A[NAME].weight.detach(),
        up=layer.lora_B[NAME].weight.detach(),
        alpha=float(layer.lora_alpha[NAME]),
        magnitude=None if magnitude is None else magnitude.view(-1),
    )


def adapted(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers that carry the adapter, under their paths."""
    for path, layer in module.named_modules():
        if isinstance(layer, LoraLayer) and NAME in layer.lora_A:
            yield path, layer


def targetable(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that can carry an adapter, under their paths without the adapter's own wrapping."""
    for path, child in module.named_modules():
        if isinstance(child, LoraLayer):
            yield path, child.get_base_layer()
        elif isinstance(child, nn.Linear | nn.Conv2d) and not _inside_adapter(path):
            yield path, child


def _inside_adapter(path: str) -> bool:
    return ".base_layer" in path or ".lora_" in path


def modules_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that can carry an adapter by path, and by the paths that files name them with."""
    found = dict(targetable(module))
    # transformers 5 dropped the level "text_model", which files keep naming.
    if any(path.startswith("encoder.layers.") for path in found):
        found |= {f"text_model.{path}": layer for path, layer in found.items()}
    return found


def peft_state(deltas: Mapping[str, Delta], modules: Mapping[str, nn.Module]) -> State:
    """Lay the updates of one component out as PEFT does, without a prefix."""
    state: State = {}
    for path, delta in deltas.items():
        state[f"{path}.lora_A.weight"] = delta.down
        state[f"{path}.lora_B.weight"] = delta.up
        if delta.magnitude is not None:
            convolution = isinstance(modules[path], nn.Conv2d)
            state[f"{path}.lora_magnitude_vector"] = delta.magnitude.view(
                (1, -1, 1, 1) if convolution else (-1,)
            )
    return state


def check_shape(name: str, delta: Delta, module: nn.Module) -> None:
    """Raise unless an update fits the module it is for."""
    layer: Any = module
    if isinstance(module, nn.Linear):
        down: tuple[int, ...] = (delta.rank, layer.in_features)
        up: tuple[int, ...] = (layer.out_features, delta.rank)
    else:
        down = (delta.rank, layer.in_channels // layer.groups, *layer.kernel_size)
        up = (layer.out_channels, delta.rank, 1, 1)
    rows = None if delta.magnitude is None else delta.magnitude.shape
    if delta.down.shape != down or delta.up.shape != up or rows not in (None, (up[0],)):
        raise AdapterError(
            f"{name}: its tensors are {list(delta.down.shape)} and {list(delta.up.shape)}, "
            f"this model needs {list(down)} and {list(up)}",
            hint="the adapter was made for another base (another version, or before pruning)",
        )


def some(keys: Sequence[str]) -> str:
    """Name the first few keys in a message."""
    return ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")
