"""Weights that are split over the processes (`memory.sharding=full`), and what that takes and moves.

`Shards` puts FSDP2 (torch.distributed.fsdp.fully_shard, https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html)
on a denoiser: each of its blocks is a group whose weights lie split along their first dimension, a part with
each process, and are gathered while the block runs, forward and backward; what is in no block is one more
group. Two cases:

- A frozen base with an adapter: the base is split, the adapter is whole on each process, and its gradients
  are summed as always. Nothing of the optimizer, the checkpoints or the files is another than in one process.
- All weights are trained: weights, gradients (reduced and split when a block's backward pass is over) and
  optimizer state are split. What the optimizer updates are plain tensors: this process's parts. Checkpoints
  are gathered tensor by tensor on the first process, in the format of one process, and cut again by however
  many read them.

Every forward pass is a meeting of all processes, so each must make as many.

On tensors without data `Gathering` stands in for it: the same tensors are born and die at the same moments,
so that a trace sees what each process has. `traffic` says what is sent.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd import Variable
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map

from tunekit.errors import ConfigError
from tunekit.networks import blocks

WHERE = "memory.sharding"


# What is sent -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Bytes that each process sends in an optimizer step, and receives too, by rings.

    Attributes:
        all_gather: weights, before they compute.
        reduce_scatter: gradients, of which each process keeps its part.
        all_reduce: gradients that every process has whole.
        forwards: forward and backward passes of a step; the gathering is in each, behind or beside what
            computes.
    """

    all_gather: int = 0
    reduce_scatter: int = 0
    all_reduce: int = 0
    forwards: int = 1

    @property
    def total(self) -> int:
        """Of a step."""
        return self.all_gather + self.reduce_scatter + self.all_reduce

    def as_json(self) -> dict[str, int]:
        """The fields, with "_bytes" where they are bytes, and their sum."""
        sent = {f"{name}_bytes": value for name, value in asdict(self).items() if name != "forwards"}
        return {**sent, "total_bytes": self.total, "forwards": self.forwards}


def traffic(
    *, processes: int, split: int = 0, split_learned: int = 0, whole_learned: int = 0, forwards: int = 1
) -> Traffic:
    """What a step sends.

    A ring moves (n - 1) / n of the whole once for a gathering or for a reduction of which each keeps a part,
    and twice for a reduction that all keep.

    Args:
        processes: n.
        split: bytes of all weights that are split, frozen or not; gathered in each forward pass, and again in
            each backward pass.
        split_learned: bytes of the gradients of those that are trained; reduced in each backward pass.
        whole_learned: bytes of the gradients of what each process has whole; reduced once per step.
        forwards: per step.
    """
    ring = (processes - 1) / processes
    return Traffic(
        round(2 * forwards * split * ring),
        round(forwards * split_learned * ring),
        round(2 * whole_learned * ring),
        forwards,
    )


# Parts of tensors -------------------------------------------------------------------------------------------


def rows(size: int, processes: int) -> int:
    """Rows of the largest part of a tensor of `size` rows."""
    return -(-size // processes)


def part_of(whole: Tensor, rank: int, processes: int) -> Tensor:
    """What of a tensor is with a process; at the end of the ranks there may be nothing left."""
    each = rows(len(whole), processes)
    return whole[min(rank * each, len(whole)) : min((rank + 1) * each, len(whole))]


@dataclass
class Shards:
    """What is split of a denoiser, here with one of the processes.

    Attributes:
        module: the denoiser.
        processes: that share it.
        rank: of this one.
        shapes: name -> shape of the whole, of what is split and trained.
        there: what of frozen weights is with this process.
        watch: told of what is gathered for a while, where that is seen; for observers.
    """

    module: nn.Module
    processes: int
    rank: int
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    there: list[Tensor] = field(default_factory=list)
    watch: Callable[[Iterable[Tensor]], None] = lambda tensors: None

    @property
    def learns(self) -> bool:
        """Whether what is split is trained."""
        return bool(self.shapes)

    def whole(self, name: str, part: Tensor) -> Tensor:
        """All of a tensor of which each process has a part, of the size of a trained one; on all of them."""
        shape = self.shapes[name]
        each = rows(shape[0], self.processes)
        padded = part.new_zeros(each, *shape[1:])
        padded[: len(part)] = part
        made = part.new_empty(each * self.processes, *shape[1:])
        dist.all_gather_into_tensor(made, padded)
        return made[: shape[0]]

    def gathered(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On the first process, in host memory, the whole of each tensor that is split; others as they are.

        All processes have to ask for it.
        """
        made = {}
        for name, part in parts.items():
            if name not in self.shapes:
                made[name] = part
                continue
            whole = self.whole(name, part.detach())
            if self.rank == 0:
                made[name] = whole.cpu()
        return made

    def cut(self, wholes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's parts of whole tensors; of others, all."""
        return {
            name: part_of(whole, self.rank, self.processes).clone() if name in self.shapes else whole
            for name, whole in wholes.items()
        }

    def gathered_state(self, state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """An optimizer's `state_dict`, like `gathered`.

        Args:
            names: of its parameters, in their order.
        """
        return self._state(state, names, lambda name, values: self.gathered({name: values}).get(name))

    def cut_state(self, state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """This process's part of an optimizer's whole `state_dict`."""
        return self._state(state, names, lambda name, values: self.cut({name: values})[name])

    def _state(
        self, state: Mapping[str, Any], names: Sequence[str], made: Callable[[str, Tensor], Tensor | None]
    ) -> dict[str, Any]:
        values: dict[int, dict[str, Any]] = {}
        for index, known in state["state"].items():
            name = names[index]
            values[index] = {
                key: made(name, value) if isinstance(value, Tensor) and value.dim() else value
                for key, value in known.items()
            }
        return {**state, "state": values}

    def clip(self, parameters: Iterable[nn.Parameter], most: float) -> Tensor:
        """Limits the norm of all gradients over all processes, as `clip_grad_norm_` does; the norm before."""
        learned = list(parameters)
        own = get_total_norm([p.grad for p in learned if p.grad is not None])
        squared = own.square()
        dist.all_reduce(squared)
        norm = squared.sqrt()
        clip_grads_with_norm_(learned, most, norm)
        return norm

    @contextmanager
    def saved(self, parts: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the denoiser of the first process is what it would be in one process, to be saved.

        All processes have to enter. Nothing may be computed inside.

        Args:
            parts: of what is trained.
        """
        wholes = self.gathered(parts) if self.learns else {}
        if self.rank:
            yield
            return
        before: list[tuple[nn.Module, str, Any]] = []
        for path, whole in wholes.items():
            owner, _, name = path.rpartition(".")
            module = self.module.get_submodule(owner)
            before.append((module, name, module._parameters[name]))
            module._parameters[name] = nn.Parameter(whole)
        try:
            yield
        finally:
            for module, name, parameter in before:
                module._parameters[name] = parameter


# With data --------------------------------------------------------------------------------------------------


def split(denoiser: nn.Module, device: torch.device, *, adapter: bool) -> Shards | None:
    """Splits the weights of a denoiser over the processes of torch.distributed; None if there is one.

    What is split is moved to the device, block by block, so that it need not have the room for all at once;
    an adapter and what has no dimensions stays where it is.

    Args:
        device: of this process.
        adapter: whether an adapter is trained and the base is frozen; else all weights are trained.

    Raises:
        ConfigError: weights that two blocks share, or that cannot be split.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    stays = _stays(denoiser, adapter=adapter)
    shapes = {
        name: parameter.shape
        for name, parameter in denoiser.named_parameters()
        if parameter.requires_grad and parameter not in stays
    }
    shared = _shared(denoiser)
    if shared:
        raise ConfigError(
            f"the blocks {shared[0]} and {shared[1]} have a weight in common, which cannot be split",
            where=WHERE,
            hint="set memory.sharding to none",
        )
    # Of views torch fears that they are changed in place, and is right to; the results are compared for every
    # family.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    kinds = {module: type(module) for module in denoiser.modules()}
    for block in [*blocks(denoiser).values(), denoiser]:
        # Resharded at the end too: what was gathered for a validation is not there in the next step.
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=stays)
    for module, kind in kinds.items():
        module.__class__ = kind  # families and files know the classes by their names; hooks do the work
    made = Shards(denoiser, mesh.size(), mesh.get_local_rank(), shapes)
    if not shapes:
        made.there = [local(p) for p in denoiser.parameters() if p not in stays]
    return made


def _stays(denoiser: nn.Module, *, adapter: bool) -> set[nn.Parameter]:
    """What every process has whole."""
    stays = {p for p in denoiser.parameters() if p.dim() == 0 or (adapter and p.requires_grad)}
    single = [name for name, p in denoiser.named_parameters() if p in stays and not adapter]
    if single:
        raise ConfigError(
            f"{single[0]} is a single number that is trained, which cannot be split",
            where=WHERE,
            hint="set memory.sharding to none, or train an adapter",
        )
    return stays


def _shared(denoiser: nn.Module) -> list[str]:
    """Two places that have a weight in common and are not in one block."""
    owners: dict[nn.Parameter, str] = {}
    paths = sorted(blocks(denoiser), key=len, reverse=True)
    for name, parameter in denoiser.named_parameters(remove_duplicate=False):
        block = next((path for path in paths if name.startswith(f"{path}.")), "outside of all blocks")
        if owners.setdefault(parameter, block) != block:
            return [owners[parameter], block]
    return []


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is with this process."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


# Without data -----------------------------------------------------------------------------------------------


class _Group:
    """Weights that are gathered together."""

    def __init__(self, parameters: Sequence[nn.Parameter], processes: int) -> None:
        self.parameters = parameters
        self.shapes = [torch.Size((rows(len(p), processes), *p.shape[1:])) for p in parameters]
        self.processes = processes
        self.flat: Tensor | None = None
        """What has been sent, one tensor of all weights."""
        self.whole: list[Tensor] = []
        """What computes."""
        self.behind = False
        """In the backward pass."""
        self.at: list[int] = []
        """Its places in the order of the forward pass."""

    def size(self, *, learned: bool = False) -> int:
        """Bytes of the weights, or of the gradients of those that are trained, with their padding."""
        return sum(
            shape.numel() * p.element_size() * self.processes
            for p, shape in zip(self.parameters, self.shapes, strict=True)
            if p.requires_grad or not learned
        )


class Gathering:
    """Does to a denoiser without data what FSDP2 does to memory.

    After torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py: weights arrive in one tensor and are
    copied out of it into their own; going forward it waits for the next group's, going backward that is asked
    for ahead. Gradients are copied into one tensor, which is kept until the next group's comes.

    Args:
        stays: weights that every process has whole.
        learned: parameter -> what the optimizer updates in its place.
        shards: its `watch` is told of what is gathered or on its way.
        summed: told of gradients that are there.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        processes: int,
        stays: Collection[nn.Parameter],
        learned: Mapping[nn.Parameter, nn.Parameter],
        shards: Shards,
        summed: Callable[[Tensor], None],
    ) -> None:
        self.learned, self.shards, self.summed = learned, shards, summed
        self.order: list[_Group] = []
        self.groups: list[_Group] = []
        self.sent: Tensor | None = None
        self.reduced: Tensor | None = None
        self.queued = False
        seen = set(stays)
        for module in [*blocks(denoiser).values(), denoiser]:
            own = [p for p in module.parameters() if p not in seen]
            seen.update(own)
            if not own:
                continue
            group = _Group(own, processes)
            self.groups.append(group)
            root = module is denoiser
            module.register_forward_pre_hook(partial(self._before, group), prepend=True, with_kwargs=True)
            module.register_forward_hook(partial(self._after, group, root))

    def _take(self, shape: Sequence[int], dtype: torch.dtype = torch.uint8) -> Tensor:
        with _disable_current_modes():
            made = torch.empty(shape, dtype=dtype, device="meta")
        self.shards.watch([made])
        return made

    def _gather(self, group: _Group) -> None:
        if group.flat is None and not group.whole:
            group.flat = self._take([group.size()])

    def _copy_out(self, group: _Group) -> None:
        group.whole = [
            self._take([shape[0] * group.processes, *shape[1:]], p.dtype)
            for p, shape in zip(group.parameters, group.shapes, strict=True)
        ]

    def _before(self, group: _Group, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if group.behind:  # computed again: it is there
            return args, kwargs
        self._gather(group)
        self.sent = None
        if group.flat is not None:
            self._copy_out(group)
            self.sent, group.flat = group.flat, None
        if not torch.is_grad_enabled():
            return args, kwargs
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        if not tensors:
            return args, kwargs
        passed = _Behind.apply(partial(self._ends, group), *tensors)  # type: ignore[no-untyped-call]
        others = dict(zip(map(id, tensors), passed, strict=True))
        return cast(tuple[Any, Any], tree_map(lambda value: others.get(id(value), value), (args, kwargs)))

    def _after(self, group: _Group, root: bool, module: nn.Module, args: Any, made: Any) -> None:
        if group.behind:
            return
        group.whole = []
        if root:
            self.sent = None
        if not torch.is_grad_enabled():
            return
        group.at.append(len(self.order))
        self.order.append(group)
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(self._begins, group))  # type: ignore[no-untyped-call]

    def _begins(self, group: _Group, gradient: Tensor) -> None:
        """The backward pass of a group."""
        if group.behind:
            return
        group.behind = True
        if not self.queued:
            self.queued = True
            Variable._execution_engine.queue_callback(self._end)
        self._gather(group)
        if group.flat is not None:
            self._copy_out(group)
            group.flat = None
        at = group.at.pop() if group.at else 0
        if at > 0:
            self._gather(self.order[at - 1])

    def _ends(self, group: _Group) -> None:
        group.whole = []
        gradients = [p for p in group.parameters if p.grad is not None]
        self.reduced = None
        if gradients:
            self.reduced = self._take([group.size(learned=True)])
            for p in gradients:
                p.grad = None
            shapes = dict(zip(group.parameters, group.shapes, strict=True))
            for p in gradients:
                gradient = self._take(shapes[p], p.dtype)
                part = self.learned[p]
                if part.grad is None:
                    part.grad = gradient
                    self.summed(gradient)
                del gradient
        group.behind = False

    def _end(self) -> None:
        """Of the backward pass; groups whose inputs have no gradient come last."""
        for group in self.groups:
            if group.behind:
                self._ends(group)
            group.flat, group.at = None, []
        self.order.clear()
        self.reduced, self.queued = None, False


class _Behind(torch.autograd.Function):
    """Tells when the backward pass of a module is over."""

    @staticmethod
    def forward(ctx: Any, told: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.told = told
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.told()
        return (None, *gradients)


def stand_in(
    denoiser: nn.Module, processes: int, *, adapter: bool, summed: Callable[[Tensor], None]
) -> tuple[Shards, dict[str, nn.Parameter]]:
    """`split` for a denoiser without data, as the first of the processes has it.

    Returns:
        What is split, and by name what the optimizer updates of it.
    """
    stays = _stays(denoiser, adapter=adapter)
    shards = Shards(denoiser, processes, 0)
    parts: dict[str, nn.Parameter] = {}
    learned: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in denoiser.named_parameters():
        if parameter in stays:
            continue
        shape = (rows(len(parameter), processes), *parameter.shape[1:])
        part = torch.empty(shape, dtype=parameter.dtype, device="meta")
        if parameter.requires_grad:
            shards.shapes[name] = parameter.shape
            parts[name] = learned[parameter] = nn.Parameter(part)
        else:
            shards.there.append(part)
    Gathering(denoiser, processes, stays, learned, shards, summed)
    return shards, parts
