"""What can leave a network whole, and the surgery that removes it.

Three kinds of structure are found in any denoiser made of diffusers' blocks: hidden channels of a
feed-forward network, attention heads, and normalisation groups of a residual block's inner channels. Each
ends in one layer, the *consumer*, whose input channels are the structures' outputs; so a structure can be
judged, and silenced, there.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from tunekit import layers
from tunekit.families.family import Family, Frame, Pipeline

Target = Literal["feed_forward", "heads", "resnet"]


@dataclass(frozen=True)
class Structures:
    """All structures of one kind in one block.

    Attributes:
        name: module path of the block.
        target: what they are.
        count: how many there are now.
        width: input channels of `consumer` that belong to one.
        parameters: weights that leave with one.
        everywhere: share of `parameters` that is used at every place of a picture, not once (time embedding).
        consumer: layer that reads them; channel i belongs to structure i // width.
        keep: removes all structures but those given, in order.
    """

    name: str
    target: Target
    count: int
    width: int
    parameters: int
    consumer: nn.Linear | nn.Conv2d
    keep: Callable[[Sequence[int]], None]
    everywhere: float = 1.0


def find(denoiser: nn.Module, targets: Sequence[Target]) -> list[Structures]:
    """Every prunable block of `denoiser`, in the order of its modules. Quantized blocks are left out."""
    makers: dict[Target, Callable[[str, Any], Structures | None]] = {
        "feed_forward": _feed_forward,
        "heads": _heads,
        "resnet": _resnet,
    }
    found = [makers[target](name, module) for name, module in denoiser.named_modules() for target in targets]
    return [structures for structures in found if structures is not None]


_FEED_FORWARDS = (
    (("net.0.proj",), "net.2"),
    (("linear_in",), "linear_out"),
    (("w1", "w3"), "w2"),
    (("gate", "up"), "down"),
)
"""Paths in a feed-forward network: the layers before its activation, and the one that reads its channels."""


def _feed_forward(name: str, block: Any) -> Structures | None:
    if not type(block).__name__.endswith(("FeedForward", "SwiGLU")):
        return None
    inside = dict(block.named_modules())
    kinds = [(first, last) for first, last in _FEED_FORWARDS if {*first, last} <= inside.keys()]
    if not kinds:
        return None
    first, last = kinds[0]
    out: Any = inside[last]
    entries: dict[str, Any] = {path: inside[path] for path in first}
    if not _plain(*entries.values(), out):
        return None
    count = out.in_features
    if any(entry.out_features % count for entry in entries.values()):
        return None

    def keep(kept: Sequence[int]) -> None:
        for path, entry in entries.items():
            # Where value and gate are computed in one layer, they stand one after the other: both leave.
            halves = entry.out_features // count
            rows = [half * count + index for half in range(halves) for index in kept]
            layers.replace(block, path, _take(entry, rows=rows))
        layers.replace(block, last, _take(out, columns=kept))

    rows = sum(entry.out_features // count * _row_size(entry) for entry in entries.values())
    return Structures(name, "feed_forward", count, 1, rows + out.out_features, out, keep)


def _heads(name: str, block: Any) -> Structures | None:
    projections: list[Any] = [getattr(block, key, None) for key in ("to_q", "to_k", "to_v")]
    to_out = getattr(block, "to_out", None)
    if not isinstance(to_out, nn.ModuleList) or not _plain(*projections, to_out[0]):
        return None
    if any(getattr(block, key, None) is not None for key in ("add_q_proj", "add_k_proj", "norm_q", "norm_k")):
        return None  # joint attention, or norms over all heads: more than the head hangs together
    width = projections[0].out_features // block.heads
    if any(layer.out_features != width * block.heads for layer in projections):
        return None  # grouped queries

    def keep(kept: Sequence[int]) -> None:
        channels = [head * width + index for head in kept for index in range(width)]
        for key, layer in zip(("to_q", "to_k", "to_v"), projections, strict=True):
            setattr(block, key, _take(layer, rows=channels))
        out: Any = to_out[0]
        to_out[0] = _take(out, columns=channels)
        layers.set_heads(block, len(kept))

    consumer: Any = to_out[0]
    parameters = width * (sum(map(_row_size, projections)) + consumer.out_features)
    return Structures(name, "heads", block.heads, width, parameters, consumer, keep)


def _resnet(name: str, block: Any) -> Structures | None:
    names = ("conv1", "norm2", "conv2", "time_emb_proj")
    conv1: Any
    conv2: Any
    time: Any
    conv1, norm, conv2, time = (getattr(block, key, None) for key in names)
    if not _plain(conv1, conv2, *([time] if time is not None else [])) or not isinstance(norm, nn.GroupNorm):
        return None
    if norm.num_channels != conv1.out_channels or conv2.in_channels != conv1.out_channels:
        return None
    if conv1.groups != 1 or conv2.groups != 1:
        return None
    # A whole normalisation group: its mean and variance are its own, so the other groups do not notice.
    count, width = norm.num_groups, norm.num_channels // norm.num_groups
    parts = time.out_features // norm.num_channels if time is not None else 0  # 2: shift and scale

    def keep(kept: Sequence[int]) -> None:
        channels = [group * width + index for group in kept for index in range(width)]
        block.conv1 = _take(conv1, rows=channels)
        block.norm2 = _take_norm(norm, channels, len(kept))
        block.conv2 = _take(conv2, columns=channels)
        if time is not None:
            rows = [part * norm.num_channels + index for part in range(parts) for index in channels]
            block.time_emb_proj = _take(time, rows=rows)

    outgoing = conv2.weight[:, 0].numel()
    once = parts * _row_size(time) if time is not None else 0
    channel = _row_size(conv1) + 2 + once + outgoing
    return Structures(name, "resnet", count, width, width * channel, conv2, keep, 1 - once / channel)


def _plain(*found: Any) -> bool:
    return all(layers.can_quantize(layer) for layer in found)


def _row_size(layer: Any) -> int:
    """Weights of one output channel, bias included."""
    return int(layer.weight[0].numel()) + (layer.bias is not None)


def _take(
    layer: nn.Linear | nn.Conv2d, *, rows: Sequence[int] | None = None, columns: Sequence[int] | None = None
) -> nn.Module:
    """A layer with some output channels (rows) or input channels (columns) of `layer`."""
    weight = layer.weight.detach()
    bias: nn.Parameter | None = layer.bias  # type: ignore[assignment]
    if rows is not None:
        weight = weight[list(rows)]
        bias = None if bias is None else nn.Parameter(bias.detach()[list(rows)].clone())
    if columns is not None:
        weight = weight[:, list(columns)]
    return layers.resized(layer, weight.contiguous(), bias)


def _take_norm(norm: nn.GroupNorm, channels: Sequence[int], groups: int) -> nn.GroupNorm:
    smaller = nn.GroupNorm(groups, len(channels), norm.eps, norm.affine)
    if norm.affine:
        smaller.weight = nn.Parameter(norm.weight.detach()[list(channels)].clone())
        smaller.bias = nn.Parameter(norm.bias.detach()[list(channels)].clone())
    return smaller.train(norm.training)


# Importance ------------------------------------------------------------------------------------------------


class _Watching:
    """Sees what goes into the consumer of each structure, as a context manager."""

    def __init__(self, found: Sequence[Structures]) -> None:
        self.found = list(found)
        self._sums = [torch.zeros(item.count, dtype=torch.float64) for item in self.found]
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for index, item in enumerate(self.found):
            self._hooks.append(item.consumer.register_forward_pre_hook(self._watch(index, item)))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @abstractmethod
    def _watch(self, index: int, item: Structures) -> Callable[..., None]:
        """The hook that notes what goes in."""


class Sensitivity(_Watching):
    """Measures how far the output moves when a structure is silenced, to first order.

    Multiply a structure's output by a gate m = 1. For a random direction v of the output, (d (v . output) / d
    m)^2 is an unbiased estimate of the squared length of d output / d m; its mean over examples is the score.
    That is the first-order Taylor criterion on gates (Molchanov et al. 2019, arXiv:1906.10771, there on the
    loss), taken of the output instead: at the end of training the loss has no gradient left, but the output
    still depends on everything. It equals the Fisher information of a gate (Theis et al. 2018,
    arXiv:1801.05787) under squared error.

    "gradient" leaves the structure's own output out: the squared derivative by it alone, which is how far the
    output would move with it, whatever it says now.

    Use as a context manager around `add`; then read `scores`.
    """

    def __init__(self, found: Sequence[Structures], *, by: Literal["taylor", "gradient"] = "taylor") -> None:
        super().__init__(found)
        self.by = by
        self.examples = 0

    def add(self, output: Tensor, generator: torch.Generator) -> None:
        """Takes the denoiser's output [B, ...], made with gradients, of B more examples."""
        direction = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
        (output * direction).sum().backward()  # type: ignore[no-untyped-call]
        self.examples += len(output)

    @property
    def scores(self) -> list[Tensor]:
        """For each of `found`, [count] float64 on the CPU."""
        return [total / max(1, self.examples) for total in self._sums]

    def _watch(self, index: int, item: Structures) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if not x.requires_grad:
                return

            def gradient(g: Tensor) -> None:
                if self.by == "gradient":
                    moved = _by_structure(g.detach().double().square(), module, item)
                else:
                    moved = _by_structure((g.detach() * x.detach()).double(), module, item).square()
                self._sums[index] += moved.sum(0).cpu()

            x.register_hook(gradient)  # type: ignore[no-untyped-call]

        return hook


def _by_structure(values: Tensor, module: nn.Module, item: Structures) -> Tensor:
    """Sums over the channels and places of each structure in a consumer's input [B, ...]: [B, count]."""
    channel = 1 if isinstance(module, nn.Conv2d) else values.ndim - 1
    values = values.movedim(channel, 1).flatten(2).sum(2) if values.ndim > 2 else values
    return values.view(len(values), item.count, item.width).sum(2)


class Activation(_Watching):
    """Measures what each structure adds to its consumer: the mean square of its output, by its weights' norm.

    As Wanda has it for single weights (Sun et al. 2023, arXiv:2306.11695), over the block's mean. No gradient
    is needed. Use as `Sensitivity`.
    """

    @property
    def scores(self) -> list[Tensor]:
        """For each of `found`, [count] float64 on the CPU."""
        return [total / total.mean().clamp(min=1e-30) for total in self._sums]

    def _watch(self, index: int, item: Structures) -> Callable[..., None]:
        weight = item.consumer.weight.detach().double()
        norms = weight.transpose(0, 1).flatten(1).square().sum(1)

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            values = args[0].detach().double().square()
            shape = [1] * values.ndim
            shape[1 if isinstance(module, nn.Conv2d) else -1] = -1
            self._sums[index] += _by_structure(values * norms.view(shape), module, item).sum(0).cpu()

        return hook


def magnitudes(found: Sequence[Structures]) -> list[Tensor]:
    """Scores without examples: the norm of a structure's weights in its consumer, over its block's mean."""
    scores = []
    for item in found:
        weight = item.consumer.weight.detach().double().cpu()
        norms = weight.transpose(0, 1).flatten(1).square().sum(1).view(item.count, item.width).sum(1)
        scores.append(norms / norms.mean().clamp(min=1e-30))
    return scores


# Size ------------------------------------------------------------------------------------------------------


def parameters(denoiser: nn.Module) -> int:
    """Number of weights."""
    return sum(parameter.numel() for parameter in denoiser.parameters())


def macs(family: Family, pipeline: Pipeline) -> int:
    """Multiply-adds of the denoiser's linear and convolution layers for one picture and step."""
    total = 0

    def count(module: Any, args: Any, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * module.weight[0].numel()

    counted = [m for m in family.denoiser(pipeline).modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    _one_step(family, pipeline, dict.fromkeys(counted, count))
    return total


def macs_each(found: Sequence[Structures], family: Family, pipeline: Pipeline) -> list[int]:
    """Multiply-adds that leave with one structure of each of `found`, for one picture and step.

    Every weight of a block is taken to be used as often as those of its consumer; what attends to text is
    used less.
    """
    places: dict[nn.Module, int] = {}

    def note(module: Any, args: Any, output: Tensor) -> None:
        places[module] = output.numel() // module.weight.shape[0]

    _one_step(family, pipeline, dict.fromkeys((item.consumer for item in found), note))
    return [round(item.parameters * item.everywhere * places[item.consumer]) for item in found]


def _one_step(family: Family, pipeline: Pipeline, hooks: Mapping[nn.Module, Callable[..., None]]) -> None:
    """Runs the denoiser once, with a forward hook on some modules."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        call_on(family, pipeline)(family.denoiser(pipeline))
    finally:
        for handle in handles:
            handle.remove()


def call_on(family: Family, pipeline: Pipeline, rows: int = 1) -> Callable[[nn.Module], Tensor]:
    """One call as sampling makes them, of rows without a prompt, for a pipeline's denoiser or one like it."""
    place = next(family.denoiser(pipeline).parameters())
    size = family.default_size(pipeline)
    told = family.conditioning(family.encode_prompt(pipeline, [""] * rows), Frame.whole(*size).rows(rows))
    known = {k: v.to(place if v.is_floating_point() else place.device) for k, v in told.items()}
    latents = torch.zeros(rows, *family.latent_shape(pipeline, *size)).to(place)
    times = torch.zeros(rows, device=place.device)

    def call(denoiser: nn.Module) -> Tensor:
        with torch.no_grad():
            return family.denoise(denoiser, latents, times, known)

    return call
