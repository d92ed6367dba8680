"""Follows every byte of a training step from birth to death, on tensors that have no data.

A `Tracer` is a dispatch mode: each operator's results are looked at, a storage not seen before is born, and
a weak reference tells when it dies. On the meta device that needs neither a GPU nor weights, and takes a
second or two for a real U-Net; on CPU tensors the same tracer follows a real step.

What a plain run on meta tensors would get wrong is put right by `target`:

- attention on meta tensors takes the mathematical path, which keeps the score matrix; the fused kernels of
  the target keep the log-sum-exp only;
- autocast does nothing to meta tensors (`_Autocast`);
- some CUDA kernels need room that no tensor shows (`workspace_bytes`);
- the CUDA allocator hands out multiples of 512 bytes.

Each operator's arithmetic and traffic are counted along, for a roofline estimate of its time.

    with Tracer(CUDA) as tracer:
        tracer.label(denoiser.parameters(), "base weights")
        with tracer.phase("forward"):
            ...
    trace = tracer.trace()
    peak = trace.peak()          # bytes, phase and the ledger at that moment
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from tunekit import layers

aten = torch.ops.aten
Attention = Callable[..., Tensor]

ACTIVATIONS, WORKSPACE = "activations", "workspace"
HOST, ELSEWHERE = "host memory", "other processes"
"""Categories of what does not count."""
ROOM = -1
"""Number of the storage in events of room that an operator takes and gives back."""


@dataclass(frozen=True)
class Target:
    """The device that a trace is for.

    Attributes:
        name: "cuda" or "cpu".
        alignment: the allocator hands out multiples of this many bytes.
        attention: what `scaled_dot_product_attention` does there: "flash", "efficient", "cpu" or "math".
        convolution_room: room of a convolution over a window, as a multiple of input + output + weight bytes;
            cuDNN changes the layout of all three for the kernels that it likes best.
        threads: of a CPU; each has buffers of its own.
    """

    name: str
    alignment: int
    attention: str
    convolution_room: float
    threads: int = 1


CUDA = Target("cuda", alignment=512, attention="flash", convolution_room=1.0)
CPU = Target("cpu", alignment=1, attention="cpu", convolution_room=0.0, threads=torch.get_num_threads())


class Event(NamedTuple):
    """A storage is born (`size` > 0) or dies (< 0)."""

    storage: int
    size: int
    phase: str
    place: int
    """2 i + 1 while the i-th checkpointing unit runs, forward or backward; 2 i before it, going forward."""


class Work(NamedTuple):
    """What one operator does."""

    phase: str
    place: int
    flops: int
    """Multiplications and additions of matrix products and convolutions; 0 for others."""
    traffic: int
    """Bytes read and written."""
    half: bool
    """Whether it computes in 16 bits."""


class Mark(NamedTuple):
    """A moment of a trace that is being made."""

    events: int
    work: int
    storages: int


@dataclass(frozen=True)
class Peak:
    """The moment of most bytes.

    Attributes:
        size: bytes that live tensors hold then.
        phase: where it is.
        ledger: category -> bytes; they add up to `size`.
    """

    size: int
    phase: str
    ledger: dict[str, int]


@dataclass(frozen=True)
class Trace:
    """What happened, in order.

    Attributes:
        events: births and deaths.
        categories: storage number -> what it turned out to be.
        work: of each operator.
    """

    events: Sequence[Event]
    categories: dict[int, str]
    work: Sequence[Work] = ()

    def peak(self, phase: str | None = None) -> Peak:
        """The peak of the whole trace, or of one phase.

        Raises:
            KeyError: nothing was traced in that phase.
        """
        live = best = 0
        at = -1
        for index, event in enumerate(self.events):
            live += event.size
            if (phase is None or event.phase == phase) and (live > best or at < 0):
                best, at = live, index
        if at < 0:
            raise KeyError(phase)
        ledger: dict[str, int] = {}
        for event in self.events[: at + 1]:
            name = WORKSPACE if event.storage == ROOM else self.categories[event.storage]
            ledger[name] = ledger.get(name, 0) + event.size
        return Peak(best, self.events[at].phase, {name: size for name, size in ledger.items() if size})

    def phases(self) -> list[str]:
        """Names in order of appearance."""
        return list(dict.fromkeys(event.phase for event in self.events))


@dataclass
class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records births and deaths of storages while it is entered. Not reentrant.

    Attributes:
        target: whose behaviour is recorded; tensors on the meta device and on the CPU are followed alike.
        autocast: what `torch.autocast` lowers to there, within the modules of `casting`; None leaves types
            alone.
        casts_each_time: whether autocast keeps no weights that it has lowered.
        place: for `Event.place`; set by whoever knows where the step is.
    """

    target: Target
    autocast: torch.dtype | None = None
    casts_each_time: bool = False
    events: list[Event] = field(default_factory=list)
    categories: dict[int, str] = field(default_factory=dict)
    work: list[Work] = field(default_factory=list)
    place: int = 0
    _live: dict[int, tuple[int, weakref.ref[Any]]] = field(default_factory=dict)
    _sizes: dict[int, int] = field(default_factory=dict)
    _phase: str = "start"
    _sum: tuple[int, int] | None = None
    """The last event, if it is the birth of a sum of two gradients, and the first one's storage."""
    _stack: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._casts = _Autocast(self.autocast) if self.autocast else None
        self._known = _KNOWN.setdefault(self.target, {})

    __hash__ = object.__hash__

    def __enter__(self) -> Tracer:
        # What is collected within would die at a moment that differs from run to run.
        if gc.isenabled():
            gc.disable()
            self._stack.callback(gc.enable)
        self._stack.enter_context(attention_of(self.target))
        if self._casts:
            self._stack.enter_context(self._casts.on())
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._stack.close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Names what happens in the block."""
        before, self._phase = self._phase, name
        if self._casts:
            self._casts.keeps = name.endswith("forward") and not self.casts_each_time
            self._casts.active = name.endswith("backward")  # what is computed again there is cast again
        try:
            yield
        finally:
            self._phase = before
            if self._casts:
                self._casts.keeps = self._casts.active = False
                self._casts.forget()

    def casting(self, module: nn.Module) -> None:
        """Says that a module's forward pass runs under autocast: accelerate wraps that and nothing else."""
        casts = self._casts
        if casts is None:
            return
        module.register_forward_pre_hook(lambda *_: setattr(casts, "active", True))
        module.register_forward_hook(lambda *_: setattr(casts, "active", False), always_call=True)

    def label(self, tensors: Iterable[Tensor], category: str) -> None:
        """Says what tensors are; those not seen before are born now (weights, inputs)."""
        for tensor in tensors:
            self._see(tensor)
            number, _ = self._live[tensor.untyped_storage()._cdata]
            self.categories[number] = category

    def host(self, tensors: Iterable[Tensor]) -> None:
        """Says that tensors are not on the device: their births and deaths are left out."""
        self.label(tensors, HOST)

    def elsewhere(self, tensors: Iterable[Tensor]) -> None:
        """Says that tensors stand for what is split over processes: they are left out, too."""
        self.label(tensors, ELSEWHERE)

    @property
    def on_host(self) -> int:
        """Bytes of tensors that are not on the device."""
        return sum(self._sizes[number] for number, name in self.categories.items() if name == HOST)

    def trace(self) -> Trace:
        """What was recorded so far."""
        events = self.events
        away = (HOST, ELSEWHERE)
        if any(name in away for name in self.categories.values()):
            events = [e for e in events if e.storage == ROOM or self.categories[e.storage] not in away]
        return Trace(tuple(events), dict(self.categories), tuple(self.work))

    def mark(self) -> Mark:
        """This moment."""
        return Mark(len(self.events), len(self.work), len(self._sizes))

    def alive(self, start: Mark, end: Mark) -> set[int]:
        """Storages that were born from one moment to another and live still."""
        return {
            number
            for number, storage in self._live.values()
            if start.storages <= number < end.storages and storage() is not None
        }

    def again(self, start: Mark, end: Mark, phases: Mapping[str, str], left: Mapping[Tensor, int]) -> None:
        """Records what happened from one moment to another once more, without its happening.

        Args:
            phases: name then -> name now; others stay.
            left: tensors that are there behind it, as they would have been made -> the storages that they
                were then; from here on they are followed.
        """
        now: dict[int, int] = {}
        for storage, size, phase, place in self.events[start.events : end.events]:
            if storage >= start.storages and storage not in now:
                number = now[storage] = len(self._sizes)
                self._sizes[number], self.categories[number] = size, self.categories[storage]
            number = now.get(storage, storage)
            self.events.append(Event(number, size, phases.get(phase, phase), place))
        self.work += [
            work._replace(phase=phases.get(work.phase, work.phase))
            for work in self.work[start.work : end.work]
        ]
        for tensor, storage in left.items():
            self._follow(tensor.untyped_storage(), now[storage])

    def number(self, tensor: Tensor) -> int:
        """Of a tensor's storage, which was seen before."""
        return self._live[tensor.untyped_storage()._cdata][0]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operator, then looks at what it made."""
        kwargs = kwargs or {}
        key = _key(func, args, kwargs)
        known = self._known.get(key) if key is not None else None
        result = known.made() if known is not None else func(*args, **kwargs)
        first = self._live.get(args[0].untyped_storage()._cdata) if _adds(func, args) else None
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor):
                self._see(item)
        if known is None:
            shapes = None if key is None else _shapes(args, kwargs, result)
            known = _Known(*self._work(func, args, kwargs, result), shapes)
            if shapes is not None:
                self._known[key] = known
        if first is not None and self._phase.endswith("backward"):
            self._sum = len(self.events) - 1, first[0]
        if known.traffic:
            self.work.append(Work(self._phase, self.place, known.flops, known.traffic, known.half))
        if known.room:
            self.events += [
                Event(ROOM, known.room, self._phase, self.place),
                Event(ROOM, -known.room, self._phase, self.place),
            ]
        return result

    def _work(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any
    ) -> tuple[int, int, bool, int]:
        """An operator's flops, traffic, whether it computes in 16 bits, and hidden room; views do none."""
        room = self._rounded(workspace_bytes(func, args, result, self.target))
        if func.is_view or not isinstance(result, Tensor | tuple | list):
            return 0, 0, False, room
        tensors = [t for t in tree_iter((args, result)) if isinstance(t, Tensor)]
        count = flop_registry.get(func.overloadpacket)
        flops = count(*args, **kwargs, out_val=result) if count else 0
        half = any(t.dtype in HALF for t in tensors)
        return int(flops), sum(map(_bytes, tensors)), half, room

    def _rounded(self, size: int) -> int:
        return -(-size // self.target.alignment) * self.target.alignment

    def _see(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._live.get(key)
        if known is not None and known[1]() is not None:
            return
        number = len(self._sizes)
        size = self._sizes[number] = self._rounded(storage.nbytes())
        self.categories[number] = ACTIVATIONS
        self._follow(storage, number)
        self.events.append(Event(number, size, self._phase, self.place))

    def _follow(self, storage: Any, number: int) -> None:
        """Waits for a storage's death."""
        key, size = storage._cdata, self._sizes[number]

        def dies(_: object) -> None:
            # A gradient that nobody else holds is added to in its place, unless somebody watches: see `_sum`.
            place = len(self.events)
            if self._sum is not None and self._sum == (place - 1, number):
                place -= 1
            self.events.insert(place, Event(number, -size, self._phase, self.place))
            self._sum = None
            if self._live.get(key, (None,))[0] == number:
                del self._live[key]

        self._live[key] = (number, weakref.ref(storage, dies))


def _adds(func: Any, args: Sequence[Any]) -> bool:
    """Whether an operator is what the engine of gradients adds two of the same tensor with."""
    return (
        func is torch.ops.aten.add.Tensor
        and all(isinstance(arg, Tensor) for arg in args)
        and args[0].shape == args[1].shape
        and args[0].dtype == args[1].dtype
    )


# Operators seen before --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Known:
    """What an operator did: on tensors of the same shapes it does it again."""

    flops: int
    traffic: int
    half: bool
    room: int
    shapes: tuple[Any, ...] | None
    """(shape, strides, type) of each fresh result, or another value as it is; None: not fresh."""

    def made(self) -> Any:
        """The results again. torch's own kernels for meta tensors are written in Python and slower by far."""
        assert self.shapes is not None
        made = [
            torch.empty_strided(one[0], one[1], dtype=one[2], device="meta")
            if isinstance(one, tuple)
            else one
            for one in self.shapes
        ]
        return made[0] if len(made) == 1 else tuple(made)


_KNOWN: dict[Target, dict[Any, _Known]] = {}
"""Of this process: the next trace of the same job asks almost nothing anew."""


@cache
def _is_fresh(func: Any) -> bool:
    """Whether an operator neither changes its arguments nor returns parts of them, by its schema."""
    schema = func._schema
    return not func.is_view and all(item.alias_info is None for item in (*schema.arguments, *schema.returns))


def _key(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What shapes of results depend on: the operator, and shapes or values of its arguments. None: ask it."""
    if not _is_fresh(func):
        return None
    parts: list[Any] = [func]
    for item in (*args, *kwargs.items()):
        if not _describe(item, parts):
            return None
    return tuple(parts)


def _describe(item: Any, parts: list[Any]) -> bool:
    if isinstance(item, Tensor):
        if item.device.type != "meta":
            return False
        parts += (item.shape, item.stride(), item.dtype)
    elif isinstance(item, list | tuple):
        parts.append(len(item))
        return all(_describe(one, parts) for one in item)
    elif item is None or isinstance(
        item, int | float | str | torch.dtype | torch.device | torch.memory_format
    ):
        parts.append((type(item), item))
    else:
        return False
    return True


def _shapes(args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> tuple[Any, ...] | None:
    given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
    found: list[Any] = []
    for item in result if isinstance(result, tuple) else (result,):
        if isinstance(item, Tensor):
            if item.device.type != "meta" or item.untyped_storage()._cdata in given:
                return None
            found.append((item.shape, item.stride(), item.dtype))
        elif item is None or isinstance(item, int | float):
            found.append(item)
        else:
            return None
    return tuple(found)


# What the target does otherwise -----------------------------------------------------------------------------


@contextmanager
def attention_of(target: Target) -> Iterator[None]:
    """Lets `scaled_dot_product_attention` on meta tensors take the target's kernel; others are left alone.

    It is put in place of the function, not a function mode: those are off during the backward pass, where
    checkpointed blocks are computed again and must take the same path.
    """
    own: Attention = torch.nn.functional.scaled_dot_product_attention

    def chosen(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        kind = attention_kind(target, query, attn_mask)
        if query.device.type != "meta" or kind == "math":
            return own(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        made: Tensor
        if kind == "cpu":
            made, *_ = aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )
        elif kind == "flash":
            made, *_ = aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, scale=scale
            )
        else:
            needs_gradient = any(item.requires_grad for item in (query, key, value))
            made, *_ = aten._scaled_dot_product_efficient_attention(
                query, key, value, attn_mask, needs_gradient, dropout_p, is_causal, scale=scale
            )
        return made

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", chosen):
        yield


class _Autocast:
    """Does to meta tensors what `torch.autocast("cuda", low)` does to CUDA tensors.

    Matrix products, convolutions and attention compute in `low`, norms and losses in float32
    (aten/src/ATen/autocast_mode.h). A trained float32 weight is cast once per forward pass; a checkpointed
    block that is computed again during the backward pass casts anew.
    """

    LOW = ("linear", "conv2d", "scaled_dot_product_attention")
    FLOAT32 = ("group_norm", "layer_norm", "rms_norm", "mse_loss", "softmax")

    def __init__(self, low: torch.dtype) -> None:
        self.low = low
        self.active = self.keeps = False
        self._kept: dict[int, Tensor] = {}

    def forget(self) -> None:
        self._kept.clear()

    def type_of(self, kind: str) -> torch.dtype | None:
        return self.low if self.active else None

    def lowered(self, value: Any) -> Any:
        if not self.active or not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not (self.keeps and value.is_leaf and value.requires_grad):
            return value.to(self.low)
        if id(value) not in self._kept:
            self._kept[id(value)] = value.to(self.low)
        return self._kept[id(value)]

    def raised(self, value: Any) -> Any:
        raises = self.active and isinstance(value, Tensor) and value.dtype == self.low
        return value.float() if raises else value

    @contextmanager
    def on(self) -> Iterator[None]:
        """Puts the casting functions in place of torch's."""
        functional = torch.nn.functional
        with ExitStack() as stack:
            for cast, names in ((self.lowered, self.LOW), (self.raised, self.FLOAT32)):
                for name in names:
                    made = _casting(getattr(functional, name), cast)
                    stack.enter_context(mock.patch.object(functional, name, made))
            stack.enter_context(mock.patch.object(layers, "autocast_type", self.type_of))
            yield
            self.forget()


def _casting(function: Callable[..., Any], cast: Callable[[Any], Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*map(cast, args), **{key: cast(value) for key, value in kwargs.items()})

    return call


def attention_kind(target: Target, query: Tensor, mask: Tensor | None) -> str:
    """Which attention kernel the target takes: flash has neither masks nor float32 nor heads above 256."""
    if target.attention == "flash" and (
        mask is not None or query.dtype == torch.float32 or query.shape[-1] > 256
    ):
        return "efficient"
    return target.attention


HALF = (torch.bfloat16, torch.float16)
SMALL_CONVOLUTION = 20480
"""Elements up to which torch leaves one picture's convolution to itself (ConvParams::use_mkldnn)."""
CHANNEL_BLOCK = 16
"""Channels that oneDNN lays side by side: a register of AVX-512 in float32 (its layout nChw16c)."""
EIGHT_BIT = "bitsandbytes.optimizer_update_8bit_blockwise"


def workspace_bytes(func: Any, args: Sequence[Any], result: Any, target: Target) -> int:
    """Room that an operator's kernel takes beside its inputs and outputs, in bytes.

    On the CPU, 8-bit optimizers compute in float32: both moments, the gradient, and the denominator twice
    (bitsandbytes/backends/cpu/ops.py); oneDNN copies what convolutions take and give into a layout of its
    own, and in 16 bits the weights of matrix products. On CUDA:

    - Convolutions over a window: cuDNN's copies in the layout of its fastest kernels.
    - Backward of flash attention: dQ is summed in float32, [B, S rounded up to 128, H, D rounded up to 32]
      (flash_bwd_launch_template.h of https://github.com/Dao-AILab/flash-attention).
    """
    packet = func.overloadpacket if hasattr(func, "overloadpacket") else func
    if target.name == "cpu":
        return _cpu_workspace_bytes(packet, args, result, target.threads)
    if packet is aten.convolution:
        taken, weight = args[0], args[1]
        if weight[0, 0].numel() > 1:
            return int(target.convolution_room * (_bytes(taken) + _bytes(weight) + _bytes(result)))
    elif packet is aten.convolution_backward:
        gradient, taken, weight = args[0], args[1], args[2]
        if weight[0, 0].numel() > 1:
            return int(target.convolution_room * (_bytes(gradient) + _bytes(taken) + _bytes(weight)))
    elif packet is aten._scaled_dot_product_flash_attention_backward:
        batch, heads, length, width = args[1].shape
        return int(batch * (-(-length // 128) * 128) * heads * (-(-width // 32) * 32) * 4)
    return 0


def _cpu_workspace_bytes(packet: Any, args: Sequence[Any], result: Any, threads: int) -> int:
    """Of oneDNN's kernels on x86 with several threads, as measured; bitsandbytes' by its source."""
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        query, key, value = args[:3]
        return _cpu_attention_room(query, key, value, threads)
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        query, key, value = args[1:4]
        return _cpu_attention_room(query, key, value, threads, backward=True)
    if str(packet) == EIGHT_BIT:
        return 5 * 4 * int(args[2].numel())
    if packet is aten.convolution:
        taken, weight = args[0], args[1]
        if _left_alone(taken):
            window = int(weight[0, 0].numel())  # each place of the result has its own: im2col, vol2col
            columns = taken.shape[1] * result[0, 0].numel() * taken.element_size()
            return window * int(columns) if window > 1 else 0
        return _cpu_convolution_room(taken, weight, result)
    if packet is aten.convolution_backward:
        gradient, taken, weight = args[:3]
        if _left_alone(taken):
            return 0
        return max(_bytes(gradient) + _bytes(weight), _bytes(taken))
    if packet in (aten.mm, aten.addmm) and args[-1].dtype in HALF:
        return _bytes(args[-1])
    return 0


def _cpu_convolution_room(taken: Tensor, weight: Tensor, result: Tensor) -> int:
    """Copies that oneDNN makes of what a convolution takes and gives, their channels in whole blocks.

    Three are there at once while it computes, before the result that torch sees is made; then that of the
    result alone. A window over fewer channels than a block reads them as they lie.
    """
    window, channels = int(weight[0, 0].numel()), int(weight.shape[1])
    given = _bytes(result) * _blocked(result.shape[1]) // int(result.shape[1])
    read = _bytes(taken) * _blocked(taken.shape[1]) // int(taken.shape[1])
    if channels < CHANNEL_BLOCK and window > 1:
        read = 0
    weights = _blocked(weight.shape[0]) * _blocked(channels) * window * weight.element_size()
    return max(read + weights + given - _bytes(result), given)


def _blocked(channels: int) -> int:
    return -(-int(channels) // CHANNEL_BLOCK) * CHANNEL_BLOCK


def _left_alone(taken: Tensor) -> bool:
    """Whether torch convolves a picture itself; of a film it does not count the places of a row."""
    counted = taken.shape[:4].numel()
    return taken.shape[0] == 1 and counted <= SMALL_CONVOLUTION and taken.dtype not in HALF


def _cpu_attention_room(
    query: Tensor, key: Tensor, value: Tensor, threads: int, *, backward: bool = False
) -> int:
    """Scores of a block of queries and keys per thread (native/cpu/FlashAttentionKernel.cpp of aten)."""
    length, half = query.shape[2], query.dtype in HALF
    rows = 256 if length >= 768 else 64 if length >= 192 else 32
    columns = min(512, key.shape[2])
    if backward:
        return threads * rows * columns * 2 * (6 if half else 4) + _bytes(query)
    room = threads * 4 * rows * (columns + 2 + query.shape[3])
    return room + (threads * 2 * rows * columns + _bytes(key) + _bytes(value) if half else 0)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
