"""What saves memory: how each lever is put on a denoiser, the same way while planning and while training.

`fit` does it all: quantized base, checkpointing per unit, weights that stay on the host, the adapter, and
float32 master copies. What it returns is what the loop trains. A trace runs the same function on tensors
without data, so nothing can be planned that is not applied.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tunekit import layers
from tunekit.adapters import add_adapter
from tunekit.config import AdapterConfig
from tunekit.diffusion.dropout import Masks, with_masks
from tunekit.errors import ConfigError, did_you_mean
from tunekit.families.family import DTYPES, FamilyFacts
from tunekit.memory import sharding
from tunekit.memory.decided import Levers, Units
from tunekit.memory.sharding import Shards

__all__ = [
    "ATTENTION",
    "TILE",
    "Fitted",
    "HostWeights",
    "Levers",
    "as_held",
    "autocast_of",
    "checkpoint_units",
    "fit",
    "has_masters",
    "held_in",
    "lowered",
    "quantize_base",
    "step_in_backward",
    "tile_vae",
]

OnUnit = Callable[[str, Callable[[], Any]], Any]
"""Called for each unit with its module path and what runs it."""

aten = torch.ops.aten
ATTENTION = [
    getattr(aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    if hasattr(aten, name)
]
"""The fused kernels that `scaled_dot_product_attention` chooses from."""


def has_masters(precision: str, adapter: AdapterConfig | None) -> bool:
    """Whether what is trained computes in 16 bits, and the optimizer works on float32 copies of it.

    bf16 adapters do: autocast instead would keep activations of norms and products in float32 as well. fp16
    needs autocast and a gradient scaler, and all weights would need a second copy of themselves.
    """
    return precision == "bf16" and adapter is not None


def autocast_of(precision: str, adapter: AdapterConfig | None) -> str:
    """Accelerate's `mixed_precision`: "no", "bf16" or "fp16"."""
    return "no" if precision == "fp32" or has_masters(precision, adapter) else precision


@dataclass
class Fitted:
    """A denoiser that is ready to be trained.

    Attributes:
        module: the denoiser.
        parameters: name -> what the optimizer updates, float32: the module's own parameters, or copies.
        masks: of its dropout; told of each batch before it goes through the module.
        shards: what of it is split over the processes; then `parameters` are this one's parts of what is
            split and trained.
        summing: whether gradients of the step are still to come after this backward pass.
    """

    module: nn.Module
    parameters: dict[str, nn.Parameter]
    host: HostWeights | None = None
    optimizer_in_backward: bool = False
    masks: Masks = field(default_factory=Masks)
    shards: Shards | None = None
    summing: bool = False
    watch: Callable[[Tensor], None] = lambda gradient: None
    """Told of each gradient that is summed on a master, for observers."""
    _working: dict[str, nn.Parameter] = field(default_factory=dict)

    @classmethod
    def plain(cls, module: nn.Module) -> Fitted:
        """A module as it is, without levers: all that requires a gradient is trained."""
        learned = {name: p for name, p in module.named_parameters() if p.requires_grad}
        return cls(module, learned, masks=with_masks(module))

    def hold_masters(self, dtype: torch.dtype) -> None:
        """Lets the module compute with `dtype` copies; gradients are summed in float32 on the originals."""
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            master = nn.Parameter(parameter.detach().clone())
            parameter.data = parameter.data.to(dtype)
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                partial(self._sum_on, master)
            )
            self.parameters[name], self._working[name] = master, parameter

    def hold_parts(self, shards: Shards) -> None:
        """Lets the optimizer work on this process's parts of what is split; they share their memory."""
        for name, parameter in self.module.named_parameters():
            if name not in shards.shapes:
                continue
            part = nn.Parameter(sharding.local(parameter))
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                partial(self._sum_on, part)
            )
            self.parameters[name] = part

    def _sum_on(self, master: nn.Parameter, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        gradient = sharding.local(gradient)
        self.watch(gradient)
        if master.grad is None:
            master.grad = gradient.to(master.dtype)
        else:
            master.grad += gradient

    def write_back(self) -> None:
        """After an update: the module's copies follow the masters."""
        if self._working:
            with torch.no_grad():
                masters: list[Tensor] = [self.parameters[name] for name in self._working]
                working: list[Tensor] = [*self._working.values()]
                torch._foreach_copy_(working, masters)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, the module holds the float32 masters, to be saved as it is.

        Of a module that is split, that is so on the first process; all have to enter.
        """
        working = {name: parameter.data for name, parameter in self._working.items()}
        self.finish()
        try:
            with self.shards.saved(self.parameters) if self.shards else nullcontext():
                yield
        finally:
            for name, data in working.items():
                self._working[name].data = data

    def finish(self) -> None:
        """After training: the module holds the float32 masters themselves."""
        for name, parameter in self._working.items():
            parameter.data = self.parameters[name].data

    @property
    def stands_alone(self) -> bool:
        """Whether DDP cannot take the module: its gradients or weights are somewhere else."""
        return self.has_masters or self.host is not None or self.shards is not None

    @property
    def learns_parts(self) -> bool:
        """Whether each process trains its part of the weights, so that gradients are summed already."""
        return self.shards is not None and self.shards.learns

    @property
    def has_masters(self) -> bool:
        """Whether `parameters` are copies."""
        return bool(self._working)


def fit(
    denoiser: nn.Module,
    adapter: AdapterConfig | None,
    facts: FamilyFacts,
    levers: Levers,
    *,
    device: torch.device | str = "meta",
    seed: int = 0,
    initial: Callable[[nn.Module], None] | None = None,
    on_unit: OnUnit | None = None,
) -> Fitted:
    """Makes a denoiser what is trained, on the device.

    It may be float32 still, or as `held_in` and the levers have its weights already: layers that were packed
    while they were read are not packed again.

    Args:
        adapter: None trains all weights; they stay float32.
        facts: of the family: where adapters go, and which inputs keep their type.
        device: where it is trained.
        seed: of the adapter's initial weights.
        initial: gives the new adapter other values to start from (`adapters.start_from`).
        on_unit: runs each checkpointing unit, for observers.

    Raises:
        ConfigError: a lever that names no unit, or that needs a frozen base.
        AdapterError: see `adapters.add_adapter`.
        MissingPackageError: nf4 without bitsandbytes.
    """
    with_adapter(denoiser, adapter, facts, levers, seed=seed)
    if adapter is not None and initial is not None:
        initial(denoiser)
    return arranged(denoiser, adapter, facts, levers, device=device, on_unit=on_unit)


def with_adapter(
    denoiser: nn.Module, adapter: AdapterConfig | None, facts: FamilyFacts, levers: Levers, *, seed: int = 0
) -> None:
    """The first half of `fit`: the base as it is held, and a new adapter on it."""
    denoiser.requires_grad_(adapter is None)
    if adapter is None and (levers.base_precision != "same" or levers.offload):
        key = "base_precision" if levers.base_precision != "same" else "offload"
        raise ConfigError(
            "needs a frozen base: it cannot be used where all weights are trained",
            where=f"memory.{key}",
            hint="train an adapter, or leave it out",
        )
    as_held(denoiser, adapter, levers)
    if adapter is not None:
        add_adapter(denoiser, adapter, facts.lora_targets, presets=facts.presets, seed=seed)


def arranged(
    denoiser: nn.Module,
    adapter: AdapterConfig | None,
    facts: FamilyFacts,
    levers: Levers,
    *,
    device: torch.device | str = "meta",
    on_unit: OnUnit | None = None,
    processes: int = 1,
) -> Fitted:
    """The second half of `fit`: what of it stays where, and what is computed twice.

    Args:
        processes: that share it, where it has no data; else those of torch.distributed.
    """
    masks = with_masks(denoiser)
    host = _host_weights(denoiser, levers, torch.device(device))
    checkpoint_units(
        denoiser, levers.gradient_checkpointing, keep_attention=levers.keep_attention, on_unit=on_unit
    )
    shards: Shards | None = None
    parts: dict[str, nn.Parameter] = {}
    is_meta, frozen = torch.device(device).type == "meta", adapter is not None
    if levers.sharding == "full" and not is_meta:
        shards = sharding.split(denoiser, torch.device(device), adapter=frozen)
    elif levers.sharding == "full" and processes > 1:

        def summed(gradient: Tensor) -> None:
            fitted.watch(gradient)

        shards, parts = sharding.stand_in(denoiser, processes, adapter=frozen, summed=summed)
    _place(denoiser, device, host, shards)
    learned = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    fitted = Fitted(denoiser, learned, host, levers.optimizer_in_backward, masks, shards)
    if shards is not None and not is_meta:
        fitted.hold_parts(shards)
    fitted.parameters |= parts
    if has_masters(levers.precision, adapter):
        dtype = DTYPES[levers.precision]
        fitted.hold_masters(dtype)
        keeps = facts.denoiser.keeps
        denoiser.register_forward_pre_hook(partial(_lower_inputs, dtype, keeps), with_kwargs=True)
        denoiser.register_forward_hook(_raised)
    return fitted


def held_in(adapter: AdapterConfig | None, precision: str) -> torch.dtype:
    """The type of a base's weights while it is trained: float32 where they are trained themselves."""
    return torch.float32 if adapter is None else DTYPES[precision]


def as_held(denoiser: nn.Module, adapter: AdapterConfig | None, levers: Levers) -> None:
    """Gives a float32 base the weights that it is trained with: packed, and in the type of the arithmetic."""
    if levers.base_precision != "same":
        quantize_base(denoiser, levers.base_precision)
    held = held_in(adapter, levers.precision)
    if held != torch.float32:
        denoiser.to(held)


def lowered(values: Mapping[str, Any], dtype: torch.dtype, keeps: Collection[str]) -> dict[str, Any]:
    """Named inputs in a type of 16 bits, but for those that have to keep theirs: sizes, positions, times.

    bfloat16 has 8 bits of mantissa: a picture of 3000 px would be one of 3008.
    """

    def lower(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return lowered(value, dtype, keeps)
        if isinstance(value, list | tuple):
            return type(value)(lower(name, item) for item in value)
        lowers = name not in keeps and isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if lowers else value

    return {name: lower(name, value) for name, value in values.items()}


def _lower_inputs(
    dtype: torch.dtype, keeps: Collection[str], module: nn.Module, args: Any, kwargs: Any
) -> tuple[Any, Any]:
    """`lowered` before a forward pass; inputs without a name have that of the parameter that they fill."""
    names = zip_longest(_names(type(module).forward)[: len(args)], args, fillvalue="")
    return tuple(lowered({name: arg}, dtype, keeps)[name] for name, arg in names), lowered(
        kwargs, dtype, keeps
    )


@cache
def _names(method: Callable[..., Any]) -> tuple[str, ...]:
    """What a method calls its parameters, but for `self`."""
    return tuple(inspect.signature(method).parameters)[1:]


def _raised(module: nn.Module, args: Any, made: Any) -> Any:
    return _floats(made) if isinstance(made, tuple) else made


def _floats(made: Any) -> Any:
    if isinstance(made, list | tuple):  # some networks take and give a list with an item for each row
        return type(made)(map(_floats, made))
    return made.float()


# The base ---------------------------------------------------------------------------------------------------


def quantize_base(denoiser: nn.Module, scheme: str) -> list[str]:
    """Packs the weights of the `layers.block_linears` that are not packed yet; returns their names.

    A packed layer keeps nothing for the backward pass; its weight is unpacked there again.

    Raises:
        MissingPackageError: nf4 without bitsandbytes.
    """
    return layers.quantize(denoiser, scheme, only=layers.block_linears(denoiser))  # type: ignore[arg-type]


# Checkpointing ----------------------------------------------------------------------------------------------


def checkpoint_units(
    denoiser: nn.Module,
    chosen: Units,
    *,
    keep_attention: Units = False,
    on_unit: OnUnit | None = None,
) -> None:
    """Lets the chosen units keep their input only and compute the rest again in the backward pass.

    Units are what diffusers checkpoints: residual blocks and transformer blocks, 37 in Stable Diffusion 1.5.
    The non-reentrant kind is used: the reentrant one gives no gradients behind frozen inputs.

    Args:
        denoiser: a diffusers model.
        chosen: True for all, False for none, or the module paths of units.
        keep_attention: of those, units that keep what their fused attention kernels returned.
        on_unit: runs each unit, for observers.

    Raises:
        ConfigError: a path that is no unit of the denoiser.
    """
    if not chosen and on_unit is None:
        return
    names = {module: name for name, module in denoiser.named_modules()}
    named = {"gradient_checkpointing": chosen, "keep_attention": keep_attention}

    def check(known: Collection[str], wrong: str) -> None:
        for key, wanted in named.items():
            if not isinstance(wanted, bool) and (unknown := sorted(set(wanted) - set(known))):
                raise ConfigError(
                    wrong.format(unknown[0]),
                    where=f"memory.{key}",
                    hint=did_you_mean(unknown[0], known)
                    or "tunekit plan --json names blocks: checkpointed_blocks",
                )

    check(names.values(), 'the denoiser has no block "{}"')
    if not isinstance(keep_attention, bool):
        for name in sorted(keep_attention):
            if not _has(chosen, name):
                raise ConfigError(
                    f'the block "{name}" is not checkpointed, so it keeps its attention anyway',
                    where="memory.keep_attention",
                    hint="name it under memory.gradient_checkpointing too",
                )
    run_so_far: list[str] = []

    def check_units(*_: Any) -> None:
        """After the first forward pass for a gradient, when all units have run."""
        if not torch.is_grad_enabled():
            return
        first.remove()
        check(run_so_far, '"{}" is a part of the denoiser that cannot be checkpointed by itself')

    first = denoiser.register_forward_hook(check_units)

    @cache  # asked at the first step, when the adapter is there
    def draws() -> bool:
        """Whether the random state must be the same the second time; reading it costs."""
        return any(isinstance(module, _DropoutNd) and module.p > 0 for module in denoiser.modules())

    def run(module: nn.Module, *args: Any) -> Any:
        name = names[module]
        if first.id in denoiser._forward_hooks:
            run_so_far.append(name)

        def once() -> Any:
            if not _has(chosen, name):
                return module(*args)
            more: dict[str, Any] = {}
            if _has(keep_attention, name):
                more["context_fn"] = partial(create_selective_checkpoint_contexts, ATTENTION)
            return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=draws(), **more)

        return on_unit(name, once) if on_unit else once()

    denoiser.enable_gradient_checkpointing(run)  # type: ignore[operator]


def _has(chosen: Units, name: str) -> bool:
    return chosen if isinstance(chosen, bool) else name in chosen


# Weights on the host ----------------------------------------------------------------------------------------


def _host_weights(denoiser: nn.Module, levers: Levers, device: torch.device) -> HostWeights | None:
    if not levers.offload:
        return None
    if levers.offload is True:
        raise ConfigError(
            "true lets the planner choose the blocks, and there is none",
            where="memory.offload",
            hint="set memory.budget, or name the blocks",
        )
    if more := [name for name in levers.offload if not _has(levers.gradient_checkpointing, name)]:
        raise ConfigError(
            f'the block "{more[0]}" is not checkpointed, so its weights would have to stay on the device',
            where="memory.offload",
            hint="name it under memory.gradient_checkpointing too",
        )
    known = dict(denoiser.named_modules())
    if unknown := [name for name in levers.offload if name not in known]:
        raise ConfigError(
            f'the denoiser has no block "{unknown[0]}"',
            where="memory.offload",
            hint=did_you_mean(unknown[0], known),
        )
    return HostWeights({name: known[name] for name in levers.offload}, device)


class HostWeights:
    """Frozen weights of checkpointed units that stay in host memory and visit the device.

    A unit's weights are copied when it runs, forward and when it is computed again in the backward pass; the
    next unit's copies are begun meanwhile, on a stream of their own, from page-locked memory.

    Attributes:
        watch: told of every set of copies that is made, for observers.
    """

    def __init__(self, units: Mapping[str, nn.Module], device: torch.device) -> None:
        self.device = device
        self.watch: Callable[[Iterable[Tensor]], None] = lambda tensors: None
        self._order: list[str] = []
        self._coming: dict[str, tuple[dict[str, Tensor], Any]] = {}
        self._inside: set[str] = set()
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._host: dict[str, dict[str, Tensor]] = {}
        for name, unit in units.items():
            frozen = {key: p for key, p in unit.named_parameters() if not p.requires_grad}
            self._host[name] = {**frozen, **dict(unit.named_buffers())}
            unit.forward = partial(self._run, name, unit, unit.forward)
        if self._stream is not None:
            for tensor in self.tensors:
                tensor.data = tensor.data.pin_memory()

    @property
    def tensors(self) -> Iterator[Tensor]:
        """All that stays on the host."""
        for held in self._host.values():
            yield from held.values()

    def _run(self, name: str, unit: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a unit with copies of its weights; they live as long as autograd needs them."""
        if name in self._inside:
            return forward(*args, **kwargs)
        # Unseen by whoever watches operators: one who keeps attentions wants the same ones the second time.
        with _disable_current_modes():
            weights = self._fetch(name)
            if name not in self._order:
                self._order.append(name)
            backward = torch._C._current_graph_task_id() != -1
            at = self._order.index(name) + (-1 if backward else 1)
            if 0 <= at < len(self._order):
                self._coming[self._order[at]] = self._copy(self._order[at])
        self._inside.add(name)
        try:
            return functional_call(unit, weights, args, kwargs)
        finally:
            self._inside.remove(name)

    def _fetch(self, name: str) -> dict[str, Tensor]:
        there = self._coming.pop(name) if name in self._coming else None
        weights, ready = there or self._copy(name)
        self._coming.clear()  # where the direction changes, one was fetched in vain
        if ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(ready)
            for tensor in weights.values():
                tensor.record_stream(current)
        return weights

    def _copy(self, name: str) -> tuple[dict[str, Tensor], Any]:
        with torch.no_grad(), torch.cuda.stream(self._stream):
            copies = {
                key: torch.empty_like(tensor, device=self.device, requires_grad=False).copy_(
                    tensor, non_blocking=True
                )
                for key, tensor in self._host[name].items()
            }
        self.watch(copies.values())
        return copies, self._stream.record_event() if self._stream is not None else None


def _place(
    denoiser: nn.Module, device: torch.device | str, host: HostWeights | None, shards: Shards | None
) -> None:
    """Moves the denoiser to the device, but for what stays on the host; what is split is there."""
    if host is None and shards is None:
        denoiser.to(device)
        return
    stays = {id(tensor) for tensor in host.tensors} if host else set()
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        if id(tensor) not in stays and sharding.local(tensor) is tensor:
            tensor.data = tensor.data.to(device)


# The optimizer ----------------------------------------------------------------------------------------------


def step_in_backward(
    optimizer: torch.optim.Optimizer,
    fitted: Fitted,
    step: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> None:
    """Updates each parameter when its gradient is complete, and frees the gradient.

    The gradients are never there all at once, so that their global norm cannot be clipped. In a step of
    several backward passes they are, until the last one (`Fitted.summing`).

    Args:
        optimizer: with one group per parameter (`optimizers.build(per_parameter=True)`).
        step: makes the update; default `optimizer.step()`.
    """

    def update(index: int, parameter: Tensor) -> None:
        if fitted.summing:
            return
        groups = optimizer.param_groups  # not those of today: whoever loads a state makes new ones
        optimizer.param_groups = [groups[index]]
        try:
            step(optimizer) if step else optimizer.step()
        finally:
            optimizer.param_groups = groups
        parameter.grad = None

    for index, group in enumerate(optimizer.param_groups):
        (parameter,) = group["params"]
        parameter.register_post_accumulate_grad_hook(partial(update, index))


# Previews ---------------------------------------------------------------------------------------------------

TILE = 256
"""Side of a tile in pixels."""


def tile_vae(vae: Any, *, factor: int) -> None:
    """Lets an AutoencoderKL decode in overlapping tiles of `TILE` pixels.

    Args:
        factor: pixels per latent.
    """
    vae.enable_tiling()
    # By default a tile is as large as the pictures that the VAE was trained on: the whole.
    vae.tile_sample_min_size = TILE
    vae.tile_latent_min_size = TILE // factor
