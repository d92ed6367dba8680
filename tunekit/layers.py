"""Layers that differ from what a model's config says: pruned shapes and quantized weights.

A diffusers folder states its shapes in `config.json`. After pruning or quantizing, `tunekit_layers.json`
beside the weights states what differs, module by module, so the folder loads again exactly as it was saved.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from tunekit import hardware
from tunekit.artifacts import write_json
from tunekit.errors import ModelError, output_errors, require

FILE = "tunekit_layers.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
VERSION = 1
NF4_BLOCK = 64
FP8 = torch.float8_e4m3fn

RANK = 16
"""Of what is added to int4_svd in bf16."""
ROUNDS = 4
"""Times that int4_svd gives its two parts another chance."""
MOST_ROTATED = 256
"""Channels that are rotated together at most."""

Scheme = Literal["int8", "fp8", "int4", "nf4", "int8_dynamic", "int8_rotated", "fp8_dynamic", "int4_svd"]
BYTES = ("int8", "int8_dynamic", "int8_rotated")
"""Schemes whose weights are int8 with a scale per output channel."""
FLOATS = ("fp8", "fp8_dynamic")
"""Schemes whose weights are floats of 8 bits with a scale per output channel."""
DYNAMIC = ("int8_dynamic", "int8_rotated", "fp8_dynamic")
"""Schemes that round activations, too."""
Float = nn.Linear | nn.Conv2d
"""What can be packed."""

_SIZES: dict[type[nn.Module], tuple[str, str]] = {
    nn.Linear: ("in_features", "out_features"),
    nn.Conv2d: ("in_channels", "out_channels"),
    nn.GroupNorm: ("num_groups", "num_channels"),
}


# Quantized layers -------------------------------------------------------------------------------------------


def autocast_type(kind: str) -> torch.dtype | None:
    """What autocast lowers to on a device type; None where it is off."""
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


class _InputOnly(torch.autograd.Function):
    """A layer with a frozen packed weight: keeps nothing for backward, unpacks the weight again there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantLinear | QuantConv2d) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer._apply_weight(x, layer.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return ctx.layer._input_gradient(ctx.shape, ctx.layer.dequantize(gradient.dtype), gradient), None


class _Quantized(nn.Module):
    """What QuantLinear and QuantConv2d share: the packed weight and the way through it.

    int8: one scale per output channel. fp8: likewise, of 8-bit floats (e4m3), which are unpacked to
    be computed with: no card needs arithmetic in 8 bits. int4: symmetric, two values per byte,
    one bf16 scale per `group` inputs of a channel. nf4: bitsandbytes' 4-bit normal float in blocks of 64.

    int8_dynamic, fp8_dynamic: activations are rounded too, with a scale for each token (of a convolution: for
    each picture), where no gradient is asked for. int8_rotated: the same in int8, and weights and activations
    are turned by a regular Hadamard matrix over the input's channels, which spreads what sticks out over all
    of them and leaves the product as it is (arXiv 2512.03673). Matrix products go to the kernels that torch
    has here (`_product`); convolutions, and what has no kernel, are computed as float products of the rounded
    values: what a kernel would give, and not its speed.

    int4_svd: int4, and a product of rank `RANK` in bf16 beside it for what 4 bits cannot hold (arXiv
    2411.05007).
    """

    scheme: Scheme
    group: int
    packed: Tensor
    scale: Tensor
    up: Tensor
    down: Tensor
    bias: nn.Parameter | None

    def _take_over(self, layer: Float, scheme: Scheme, group: int) -> None:
        """Copies the float layer's settings (stride, features, ...); makes empty buffers for its weight."""
        nn.Module.__init__(self)
        own = {name: value for name, value in vars(layer).items() if name not in vars(self)}
        vars(self).update(own)
        if isinstance(layer, nn.Conv2d):
            vars(self)["_reversed_padding_repeated_twice"] = layer._reversed_padding_repeated_twice
        weight = layer.weight
        self.training = layer.training
        self.shape = tuple(weight.shape)
        self.scheme, self.group = scheme, group
        self.register_parameter("bias", layer._parameters["bias"])
        rows, columns = self.shape[0], weight.numel() // self.shape[0]
        groups, blocks = -(-columns // group), -(-weight.numel() // NF4_BLOCK)
        eight = ((rows, columns), torch.int8, (rows, 1), torch.float32)
        four = ((rows, groups * group // 2), torch.uint8, (rows, groups), torch.bfloat16)
        sizes: dict[Scheme, tuple[tuple[int, ...], torch.dtype, tuple[int, ...], torch.dtype]] = {
            **dict.fromkeys(cast(tuple[Scheme, ...], BYTES), eight),
            **dict.fromkeys(
                cast(tuple[Scheme, ...], FLOATS), ((rows, columns), FP8, (rows, 1), torch.float32)
            ),
            "int4": four,
            "int4_svd": four,
            "nf4": ((blocks * NF4_BLOCK // 2, 1), torch.uint8, (blocks,), torch.float32),
        }
        packed_shape, packed_dtype, scale_shape, scale_dtype = sizes[scheme]
        self.register_buffer("packed", torch.empty(packed_shape, dtype=packed_dtype, device=weight.device))
        self.register_buffer("scale", torch.empty(scale_shape, dtype=scale_dtype, device=weight.device))
        if scheme == "int4_svd":
            rank = _rank(rows, columns)
            for name, shape in (("up", (rows, rank)), ("down", (rank, columns))):
                self.register_buffer(name, torch.empty(shape, dtype=torch.bfloat16, device=weight.device))

    @property
    def weight(self) -> Tensor:
        """The weight as floats, made anew on each call: changing it in place changes nothing."""
        return self.dequantize(self.bias.dtype if self.bias is not None else torch.float32)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight in its own shape and `dtype`."""
        if self.scheme == "nf4":
            return _unpack_nf4(self.packed, self.scale, self.shape, dtype)
        if self.scheme in (*BYTES, *FLOATS):
            # In place: on the CPU a product of int8 and float32 would make a float32 copy of the former too.
            floats = self.packed.to(self.scale.dtype).mul_(self.scale).view(self.shape)
            return (rotated(floats, 1) if self.scheme == "int8_rotated" else floats).to(dtype)
        floats = _unpack_int4(self.packed, self.scale, self.group)[:, : _product(self.shape[1:])]
        if self.scheme == "int4_svd":
            floats = floats + self.up.to(torch.float32) @ self.down.to(torch.float32)
        return floats.to(dtype).reshape(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        lower = autocast_type(x.device.type)
        if lower is not None:
            x = x.to(lower)
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _InputOnly.apply(x, self)  # type: ignore[no-untyped-call]
        elif self.scheme in DYNAMIC:
            y = self._apply_rounded(x.to(torch.float32)).to(x.dtype)
        else:
            y = self._apply_weight(x, self.dequantize(x.dtype))
        if self.bias is None:
            return y
        bias = self.bias.to(y.dtype)
        return y + (bias.view(-1, 1, 1) if isinstance(self, nn.Conv2d) else bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # `.half()` on a pipeline must neither round the scales nor widen floats of 8 bits: they keep their
        # values, and follow only the device.
        before = {name: self.get_buffer(name) for name in packed_names(self)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            now = self.get_buffer(name)
            if now.dtype != tensor.dtype:
                setattr(self, name, tensor.to(now.device))
        return self

    def _apply_rounded(self, x: Tensor) -> Tensor:
        """The layer's product, without bias, of values in 8 bits."""
        channels = 1 if isinstance(self, nn.Conv2d) else -1
        if self.scheme == "int8_rotated":
            x = rotated(x, channels, self.shape[1])
        over = tuple(range(1, x.dim())) if isinstance(self, nn.Conv2d) else (-1,)
        largest = 127.0 if self.scheme in BYTES else torch.finfo(FP8).max
        scale = x.abs().amax(dim=over, keepdim=True).clamp(min=1e-30) / largest
        values = x / scale
        values = values.round_() if self.scheme in BYTES else values.to(FP8)
        y = _multiply(values, self.packed) if isinstance(self, nn.Linear) else None
        if y is None:
            y = self._apply_weight(values.to(torch.float32), self.packed.to(torch.float32).view(self.shape))
        return y * scale * (self.scale.view(-1, 1, 1) if channels == 1 else self.scale.view(-1))

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} is not a layer of its own")

    def _input_gradient(self, shape: torch.Size, weight: Tensor, gradient: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} is not a layer of its own")


class QuantLinear(_Quantized, nn.Linear):  # type: ignore[misc, override]  # its weight is made when asked for
    """nn.Linear with a packed weight. An nn.Linear too, so that adapters attach to it."""

    def __init__(self, layer: nn.Linear, scheme: Scheme, group: int = 32) -> None:
        self._take_over(layer, scheme, group)

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.linear(x, weight)

    def _input_gradient(self, shape: torch.Size, weight: Tensor, gradient: Tensor) -> Tensor:
        return gradient @ weight


class QuantConv2d(_Quantized, nn.Conv2d):  # type: ignore[misc, override]  # as above
    """nn.Conv2d (zero padding) with a packed weight. An nn.Conv2d too, so that adapters attach to it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A plain nn.Conv2d for the arguments of one: peft calls the class of the layer that it adapts."""
        if args and isinstance(args[0], int):
            return nn.Conv2d(*args, **kwargs)
        return super().__new__(cls)

    def __init__(self, layer: nn.Conv2d, scheme: Scheme, group: int = 32) -> None:
        self._take_over(layer, scheme, group)

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def _input_gradient(self, shape: torch.Size, weight: Tensor, gradient: Tensor) -> Tensor:
        stride, padding, dilation = self.stride, self.padding, self.dilation
        made: Tensor = conv2d_input(shape, weight, gradient, stride, padding, dilation, self.groups)  # type: ignore[no-untyped-call]
        return made


def quantize_layer(layer: Float, scheme: Scheme, group: int = 32) -> QuantLinear | QuantConv2d:
    """A quantized layer that stands for `layer`, whose weights are floats."""
    quantized = _empty_quantized(layer, scheme, group)
    if quantized.packed.is_meta:
        return quantized
    weight = layer.weight.detach().to(torch.float32).flatten(1)
    for name, tensor in _pack(quantized, weight).items():
        quantized.get_buffer(name).copy_(tensor)
    return quantized


def dequantize_layer(layer: QuantLinear | QuantConv2d) -> nn.Module:
    """The float layer that `layer` stands for."""
    weight = layer.weight
    plain = _resized(layer, None)
    plain.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    plain.register_parameter("bias", layer.bias)
    return plain


def resized(layer: Float, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
    """A layer like `layer` with the sizes of `weight` ([out, in] or [out, in / groups, k, k])."""
    if isinstance(layer, nn.Conv2d):
        sizes = {"in_channels": weight.shape[1] * layer.groups, "out_channels": weight.shape[0]}
    else:
        sizes = {"in_features": weight.shape[1], "out_features": weight.shape[0]}
    made = _resized(layer, sizes)
    made.register_parameter("weight", nn.Parameter(weight, requires_grad=layer.weight.requires_grad))
    made.register_parameter("bias", bias)
    return made.train(layer.training)


def can_quantize(layer: nn.Module) -> TypeGuard[Float]:
    """Whether `layer` is a float Linear, or a Conv2d with zero padding."""
    if isinstance(layer, _Quantized):
        return False
    if isinstance(layer, nn.Conv2d):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def quantize(
    module: nn.Module,
    scheme: Scheme,
    *,
    group: int = 32,
    keep: Iterable[str] = (),
    only: Collection[str] | None = None,
) -> list[str]:
    """Quantizes every Linear and Conv2d below `module` in place but what `keep` names; returns their names.

    Args:
        keep: dotted paths, see `under`.
        only: names of layers; None for all.

    Raises:
        MissingPackageError: nf4 without bitsandbytes.
    """
    kept = list(keep)
    layers = [
        (name, layer)
        for name, layer in module.named_modules()
        if can_quantize(layer) and not under(name, module, kept) and (only is None or name in only)
    ]
    for name, layer in layers:
        replace(module, name, quantize_layer(layer, scheme, group))
    return [name for name, _ in layers]


def block_linears(denoiser: nn.Module) -> list[str]:
    """Names of the float linear layers that stand in lists of blocks.

    Embeddings, the layers before and after the blocks, and convolutions are left out: they are few or
    sensitive.
    """
    return [
        name
        for name, layer in denoiser.named_modules()
        if isinstance(layer, nn.Linear)
        and not isinstance(layer, _Quantized)
        and ".lora_" not in name
        and any(part.isdigit() for part in name.split("."))
    ]


def under(name: str, module: nn.Module, paths: Iterable[str]) -> bool:
    """Whether layer `name` is one of `paths` or lies below one.

    `up_blocks.-1` is the last of `up_blocks`; a `*` stands for any letters.
    """
    return any(
        fnmatchcase(name, path) or fnmatchcase(name, f"{path}.*")
        for path in (_resolve(module, path) for path in paths)
    )


def _resolve(module: nn.Module, path: str) -> str:
    parts: list[str] = []
    for part in path.split("."):
        if part.startswith("-"):
            parent = module.get_submodule(".".join(parts)) if parts else module
            part = str(len(list(parent.children())) + int(part))
        parts.append(part)
    return ".".join(parts)


def _empty_quantized(layer: nn.Module, scheme: Scheme, group: int) -> QuantLinear | QuantConv2d:
    if isinstance(layer, nn.Conv2d):
        return QuantConv2d(layer, scheme, group)
    if isinstance(layer, nn.Linear):
        return QuantLinear(layer, scheme, group)
    raise ModelError(f"a {type(layer).__name__} cannot be quantized, only Linear and Conv2d")


def _pack_int8(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
    return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale


def _unpack_int4(packed: Tensor, scale: Tensor, group: int) -> Tensor:
    """[out, inputs and padding] in float32."""
    low, high = (packed & 15).to(torch.int8) - 8, (packed >> 4).to(torch.int8) - 8
    rows, groups = scale.shape
    values = torch.stack([low, high], dim=-1).view(rows, groups, group)
    return (values.to(torch.float32) * scale.to(torch.float32).unsqueeze(-1)).view(rows, -1)


def _pack_svd(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """int4, and the part of low rank that leaves the least error: each is fitted to what the other leaves."""
    rank, columns = _rank(*weight.shape), weight.shape[1]
    best, least = None, float("inf")
    left = weight
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(ROUNDS):
            u, s, v = torch.svd_lowrank(left, q=min(rank + 8, *weight.shape), niter=4)
            root = s[:rank].sqrt()
            up, down = (u[:, :rank] * root).bfloat16(), (root[:, None] * v[:, :rank].T).bfloat16()
            product = up.float() @ down.float()
            packed, scale = _pack_int4(weight - product, group)
            rounded = _unpack_int4(packed, scale, group)[:, :columns]
            left = weight - rounded
            error = float((left - product).square().sum())
            if error < least:
                best, least = (packed, scale, up, down), error
    assert best is not None
    return best


def _rank(rows: int, columns: int) -> int:
    return min(RANK, max(1, min(rows, columns) // 4))


def _pack_fp8(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / torch.finfo(FP8).max
    return (weight / scale).to(FP8), scale


def _pack_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The scale of a group is the one of a few candidates with the least squared error.

    Clipping the largest weight a little serves the others; mapping it to -8, not 7, uses the sixteenth level.
    """
    rows, columns = weight.shape
    groups = nn.functional.pad(weight, (0, -columns % group)).view(rows, -1, group)
    at = groups.abs().argmax(dim=-1, keepdim=True)
    extreme = groups.gather(-1, at)
    best = torch.full_like(extreme, float("inf"))
    scale, values = torch.zeros_like(extreme), torch.zeros_like(groups)
    for level in (-8.0, -9.0, -10.0, 7.0, 8.0, 9.0):
        candidate = (extreme / level).to(torch.bfloat16).to(torch.float32)
        safe = torch.where(candidate == 0, torch.ones_like(candidate), candidate)
        rounded = (groups / safe).round().clamp(-8, 7)
        error = (rounded * candidate - groups).square().sum(dim=-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, candidate, scale)
        values = torch.where(better, rounded, values)
    nibbles = (values + 8).to(torch.uint8).view(rows, -1)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4), scale.squeeze(-1).to(torch.bfloat16)


def _pack_nf4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    functional = require("bitsandbytes.functional", extra="quant", why="scheme nf4 needs")
    flat = weight.flatten()
    blocks = nn.functional.pad(flat, (0, -flat.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
    packed, state = functional.quantize_4bit(blocks, blocksize=NF4_BLOCK, quant_type="nf4")
    return packed, state.absmax


_PACKERS = {**dict.fromkeys(FLOATS, _pack_fp8), "int4": _pack_int4, "nf4": _pack_nf4}
NAMES = ("packed", "scale", "up", "down")
"""Buffers of a packed layer, as far as it has them."""


def packed_names(layer: nn.Module) -> list[str]:
    """Names of the tensors that stand for the weight of a packed layer."""
    return [name for name in NAMES if name in layer._buffers]


def _pack(layer: QuantLinear | QuantConv2d, weight: Tensor) -> dict[str, Tensor]:
    """The tensors of a packed layer for a weight [out, all else] in float32."""
    if layer.scheme == "int4_svd":
        return dict(zip(NAMES, _pack_svd(weight, layer.group), strict=True))
    if layer.scheme == "int8_rotated":
        weight = rotated(weight.view(layer.shape), 1).flatten(1)
    pack = _pack_int8 if layer.scheme in BYTES else _PACKERS[layer.scheme]
    return dict(zip(NAMES, pack(weight, layer.group), strict=False))


# Products in 8 bits ----------------------------------------------------------------------------------------


def _multiply(x: Tensor, weight: Tensor) -> Tensor | None:
    """`x` times `weight` transposed in float32, by a kernel for 8 bits; None where there is none for these.

    Args:
        x: [..., inputs], whole numbers up to 127, or floats of 8 bits.
        weight: [outputs, inputs] in int8, or in floats of 8 bits.
    """
    rows, of_cuda = x.reshape(-1, x.shape[-1]), x.device.type == "cuda"
    whole = weight.dtype == torch.int8
    if of_cuda and (len(rows) <= 16 or any(size % (8 if whole else 16) for size in weight.shape)):
        return None  # what these kernels do not take, and hardly gains
    if whole and _multiplies_int8(x.device.type):
        y: Tensor = torch._int_mm(rows.to(torch.int8), weight.t())
        return y.to(torch.float32).view(*x.shape[:-1], -1)
    if not whole and hardware.multiplies_fp8(x.device):
        one = torch.ones((), device=x.device)
        y = torch._scaled_mm(rows, weight.t(), one, one, out_dtype=torch.float32)
        return y.view(*x.shape[:-1], -1)
    return None


@cache
def _multiplies_int8(kind: str) -> bool:
    """Whether torch has a kernel for products in int8 on a device type that is exact, and not a plain loop.

    Processors without VNNI add up in 16 bits, which the extremes do not fit.
    """
    if kind != "cuda" and not (kind == "cpu" and "AVX" in torch.backends.cpu.get_cpu_capability()):
        return False
    x = torch.full((32, 64), -127, dtype=torch.int8, device=kind)
    try:
        return bool((torch._int_mm(x, -x.t()) == -64 * 127 * 127).all())
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


# Rotation --------------------------------------------------------------------------------------------------


def rotated(x: Tensor, dim: int, channels: int | None = None) -> Tensor:
    """`x` turned along a dimension, in groups of channels; done twice, it is `x` again.

    Args:
        channels: how many are turned alike, where `dim` has several times as many (of a convolution in
            groups); None for all.
    """
    order = rotation_order(channels or x.shape[dim])
    if order == 1:
        return x
    moved = x.movedim(dim, -1)
    turned = moved.reshape(*moved.shape[:-1], -1, order) @ _hadamard(order, x.dtype, x.device)
    return turned.reshape(moved.shape).movedim(-1, dim)


def rotation_order(channels: int) -> int:
    """The largest power of four, up to `MOST_ROTATED`, that divides `channels`."""
    order = 1
    while channels % (4 * order) == 0 and 4 * order <= MOST_ROTATED:
        order *= 4
    return order


def _hadamard(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Symmetric and orthogonal, and all rows have the same sum, so that a mean is spread evenly, too."""
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], device=device) / 2
    made = torch.ones(1, 1, device=device)
    while made.shape[0] < order:
        made = torch.kron(made, four)
    return made.to(dtype)


def _unpack_nf4(packed: Tensor, scale: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if packed.is_meta:  # so that memory can be planned without bitsandbytes
        values = torch.empty(scale.numel() * NF4_BLOCK, dtype=dtype, device="meta")
        return values[: _product(shape)].view(shape)
    functional = require("bitsandbytes.functional", extra="quant", why="a model in nf4 needs")
    # One row per block: bitsandbytes 0.50's CPU kernel is wrong for rows that are no multiple of the block.
    blocks = torch.Size((scale.numel(), NF4_BLOCK))
    code = functional.get_4bit_type("nf4", device=packed.device)
    state = functional.QuantState(
        scale, shape=blocks, code=code, blocksize=NF4_BLOCK, quant_type="nf4", dtype=dtype
    )
    values = cast(Tensor, functional.dequantize_4bit(packed, state))
    return values.view(-1)[: _product(shape)].view(shape)


def _product(sizes: Iterable[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


# What differs from the config -----------------------------------------------------------------------------


def describe(denoiser: nn.Module) -> dict[str, Any] | None:
    """What `denoiser` (a diffusers model) has other than its config says; None if nothing."""
    reference = dict(_on_meta(type(denoiser), denoiser.config).named_modules())
    shapes: dict[str, dict[str, int]] = {}
    quantized: dict[str, dict[str, Any]] = {}
    for name, module in denoiser.named_modules():
        if name in reference and (sizes := _sizes(module)) and sizes != _sizes(reference[name]):
            shapes[name] = sizes
        if isinstance(module, QuantLinear | QuantConv2d):
            quantized[name] = {"scheme": module.scheme, "group": module.group}
    if not shapes and not quantized:
        return None
    return {"version": VERSION, "shapes": shapes, "quantized": quantized}


def apply(denoiser: nn.Module, description: dict[str, Any]) -> None:
    """Gives a freshly built `denoiser` the shapes and classes of `description`; weights are loaded after it.

    Raises:
        ModelError: the description is of another model, or of a newer tunekit.
    """
    if description.get("version") != VERSION:
        raise ModelError(f"{FILE} has version {description.get('version')!r}, this tunekit reads {VERSION}")
    modules = dict(denoiser.named_modules())
    for name in (*description["shapes"], *description["quantized"]):
        if name not in modules:
            raise ModelError(f"{FILE} names {name!r}, which the model does not have")
    for name, sizes in description["shapes"].items():
        if "heads" in sizes:
            set_heads(modules[name], sizes["heads"])
        else:
            replace(denoiser, name, _resized(modules[name], sizes))
    for name, how in description["quantized"].items():
        replace(denoiser, name, _empty_quantized(denoiser.get_submodule(name), how["scheme"], how["group"]))


def set_heads(attention: nn.Module, heads: int) -> None:
    """Tells a diffusers attention how many heads its projections hold now; the size of a head stays."""
    size = attention.inner_dim // attention.heads  # type: ignore[operator]
    attention.heads = heads  # type: ignore[assignment]
    attention.sliceable_head_dim = heads  # type: ignore[assignment]
    attention.inner_dim = heads * size
    attention.inner_kv_dim = heads * size


def has_custom_layers(folder: Path) -> bool:
    """Whether the denoiser in `folder` differs from its config: see `describe_onto`."""
    return (folder / FILE).is_file()


def save_denoiser(denoiser: nn.Module, folder: Path) -> None:
    """Writes config, weights and, where layers differ from the config, `tunekit_layers.json`."""
    from safetensors.torch import save_file

    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        denoiser.save_config(folder)  # type: ignore[operator]
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in denoiser.state_dict().items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if description := describe(denoiser):
        write_json(folder / FILE, description)


def describe_onto(denoiser: nn.Module, folder: Path) -> None:
    """Gives a denoiser on the meta device the shapes and classes that `tunekit_layers.json` in `folder` says.

    Raises:
        ModelError: the description is damaged, of another model, or of a newer tunekit.
    """
    try:
        apply(denoiser, json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelError(
            f"does not describe this model ({type(error).__name__}: {error})",
            where=str(folder / FILE),
            hint="it is damaged: take it from where the model came",
        ) from error


def read_weights(network: nn.Module, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> nn.Module:
    """Fills a network on the meta device tensor by tensor, so that no more than one is there twice.

    Weights that stay as they are stored stay in their mapped file; beside packed ones, for which the file is
    closed again, they are copied.

    Args:
        network: its packed layers pack their weights while they are read.
        tensors: names, as those of the network (of a packed layer: those of its floats too), and values.
        dtype: floating weights become it; packed weights and scales stay.

    Raises:
        ModelError: a tensor that is missing, of another shape, or for no layer.
    """
    try:
        _read_weights(network, tensors, dtype)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ModelError(f"the weights do not fit the model: {error}") from error
    return network.eval().requires_grad_(False)


def _read_weights(network: nn.Module, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> None:
    modules = dict(network.named_modules(remove_duplicate=False))
    missing = set(network.state_dict())
    packed = {name for name, _ in _packed_tensors(network)}
    same = tied(network)

    def put(name: str, tensor: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = modules[path]
        own = module._parameters.get(leaf) if leaf in module._parameters else module._buffers.get(leaf)
        if own is None or own.numel() != tensor.numel():
            raise ValueError(
                f"{name} is {list(tensor.shape)}, not {list(own.shape) if own is not None else 0}"
            )
        tensor = tensor.reshape(own.shape)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
            missing.discard(name)
            return
        parameter = nn.Parameter(tensor, requires_grad=False)
        for other in same.get(name, (name,)):
            place, _, last = other.rpartition(".")
            modules[place]._parameters[last] = parameter
            missing.discard(other)

    for name, tensor in tensors:
        layer = name.removesuffix(".weight")
        if f"{layer}.packed" in packed and name not in packed:
            found: Any = modules[layer]
            for leaf, made in _pack(found, tensor.float().flatten(1)).items():
                put(f"{layer}.{leaf}", made)
        elif name in packed or not tensor.is_floating_point():
            put(name, tensor.clone() if packed else tensor)
        else:
            put(name, tensor.to(dtype, copy=bool(packed)))
    if missing:
        raise ValueError(f"missing {', '.join(sorted(missing)[:3])}")


def tied(network: nn.Module) -> dict[str, list[str]]:
    """Names of parameters that are one and the same, each with all of them."""
    groups: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: names for names in groups.values() if len(names) > 1 for name in names}


def stored_dtype(folder: Path) -> torch.dtype:
    """The floating type that most of the weights in `folder` have; float32 if there are none."""
    from safetensors import safe_open

    names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    counts = dict.fromkeys(names.values(), 0)
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                if dtype := names.get(tensors.get_slice(key).get_dtype()):
                    counts[dtype] += 1
    return max(counts, key=lambda dtype: counts[dtype])


def _packed_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, layer in module.named_modules():
        if isinstance(layer, QuantLinear | QuantConv2d):
            for leaf in packed_names(layer):
                yield f"{name}.{leaf}", layer.get_buffer(leaf)


def _on_meta(cls: type[nn.Module], config: Any) -> nn.Module:
    with torch.device("meta"):
        return cls.from_config(config)  # type: ignore[attr-defined, no-any-return]


def _sizes(module: nn.Module) -> dict[str, int] | None:
    if hasattr(module, "heads") and hasattr(module, "to_q"):
        return {"heads": module.heads}  # type: ignore[dict-item]
    for cls, names in _SIZES.items():
        if isinstance(module, cls):
            return {name: getattr(module, name) for name in names}
    return None


def _resized(module: nn.Module, sizes: dict[str, int] | None) -> nn.Module:
    """A float layer like `module`, with other sizes; its weights are not set."""
    bias = module._parameters.get("bias")
    like: Tensor = bias if bias is not None else next(iter(module.state_dict().values()))
    dtype = like.dtype if like.is_floating_point() and like.itemsize > 1 else torch.float32
    place: dict[str, Any] = {"device": like.device, "dtype": dtype}
    sizes = sizes or _sizes(module) or {}
    if isinstance(module, nn.Linear):
        return nn.Linear(**sizes, bias=module.bias is not None, **place)
    if isinstance(module, nn.Conv2d):
        return nn.Conv2d(
            **sizes,
            kernel_size=module.kernel_size,  # type: ignore[arg-type]
            stride=module.stride,  # type: ignore[arg-type]
            padding=module.padding,  # type: ignore[arg-type]
            dilation=module.dilation,  # type: ignore[arg-type]
            groups=module.groups,
            padding_mode=module.padding_mode,
            bias=module.bias is not None,
            **place,
        )
    if isinstance(module, nn.GroupNorm):
        groups, channels = sizes["num_groups"], sizes["num_channels"]
        return nn.GroupNorm(groups, channels, module.eps, module.affine, **place)
    raise ModelError(f"{FILE} gives sizes for a {type(module).__name__}, which has none")


def replace(root: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts a layer at a path below `root`."""
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, layer)
