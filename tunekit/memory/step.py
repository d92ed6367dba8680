"""The memory of two optimizer steps: the run's own code, on tensors without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from tunekit import optimizers
from tunekit.memory.job import (
    ADAPTER,
    BUCKETS,
    GATHERED,
    GRADIENTS,
    KEPT,
    MASTERS,
    STATE,
    TEACHER,
    TRAINED,
    VAE,
    VISITORS,
    WEIGHTS,
    Job,
    bytes_of,
)
from tunekit.memory.levers import Fitted, Levers, OnUnit, arranged, fit, step_in_backward, with_adapter
from tunekit.memory.trace import Mark, Target, Trace, Tracer
from tunekit.networks import twin
from tunekit.tasks import Task

PAGED = 100_000
"""Elements from which a paged optimizer keeps state in host memory (bitsandbytes/optim/optimizer.py)."""


@dataclass(frozen=True)
class StepTrace:
    """Two optimizer steps.

    Attributes:
        trace: phases "first forward", "first backward", "first optimizer", then the same without "first".
        units: module paths of the checkpointing units, in the order in which they run.
        weights: unit -> bytes of its frozen weights.
        saving: bytes that writing the result takes in the host's memory for a while.
        paged: bytes of optimizer state that are in the host's memory.
    """

    trace: Trace
    units: tuple[str, ...]
    weights: Mapping[str, int] = field(default_factory=dict)
    saving: int = 0
    paged: int = 0


def adapted(job: Job, levers: Levers, device: str = "meta", on_unit: OnUnit | None = None) -> Fitted:
    """The denoiser as it is trained: adapter and levers on it; with random weights on a real device."""
    facts = job.sizes.family.facts
    if device == "meta":
        made = _with_adapter(job, levers)
        fitted = arranged(made, job.adapter, facts, levers, on_unit=on_unit, processes=job.processes)
    else:
        built = job.sizes.denoiser.build("cpu")
        fitted = fit(built, job.adapter, facts, levers, device=device, on_unit=on_unit)
    fitted.module.train()
    return fitted


def _with_adapter(job: Job, levers: Levers) -> nn.Module:
    """A denoiser without data and with its adapter, as it is before the other levers are put on it."""
    row, adapter, facts = job.sizes.denoiser, job.adapter, job.sizes.family.facts
    targets = (facts.lora_targets, facts.presets)
    held = (levers.precision, levers.base_precision, bool(levers.offload))
    key = repr((row.classes, sorted(row.config.items(), key=str), adapter, targets, held))
    if key not in _ADAPTED:
        while len(_ADAPTED) >= REMEMBERED:
            del _ADAPTED[next(iter(_ADAPTED))]
        made = row.build()
        with_adapter(made, adapter, facts, levers)
        _ADAPTED[key] = made
    return twin(_ADAPTED[key])


_ADAPTED: dict[str, nn.Module] = {}
"""What a plan traces again and again: putting an adapter into a network takes as long as a step of it."""
REMEMBERED = 3


def splits(batch_size: int, micro_batch: int, *, mixed: bool = False) -> list[tuple[int, ...]]:
    """Rows of the forwards of a step, as far as they need memory of their own; one of them needs most.

    What a third forward needs, the second did: its own, beside the gradients of the first. Samples of several
    shapes go forward apart. Then a micro-batch may come second though it is the only whole one, and a step of
    one micro-batch becomes two forwards: worst is one sample, then all others in the largest shape.

    Args:
        mixed: whether samples may be of several shapes.
    """
    rest = batch_size - micro_batch
    if rest > 0:
        return [(micro_batch, micro_batch if mixed else min(micro_batch, rest))]
    return [(batch_size,), (1, batch_size - 1)] if mixed and batch_size > 1 else [(batch_size,)]


def trace_step(
    job: Job, target: Target, levers: Levers | None = None, *, rows: Sequence[int] = ()
) -> StepTrace:
    """Follows two optimizer steps.

    Args:
        target: whose allocations are predicted.
        levers: default none, at the job's precision.
        rows: of each forward of a step; default one forward of the levers' micro-batch, or of one sample.
    """
    levers = levers or Levers(job.precision)
    tracer = Tracer(target, autocast=job.autocast, casts_each_time=levers.sharding == "full")
    units, on_unit = _unit_watcher(tracer)
    fitted = adapted(job, levers, on_unit=on_unit)
    task = job.task_of(fitted)
    parameters = list(fitted.parameters.values())
    _watch(tracer, fitted)
    update = _updater(job, target, fitted, tracer)
    counts = tuple(rows) or (levers.micro_batch or 1,)
    batches = {count: job.batch(count) for count in counts}
    with tracer:
        _label(tracer, job, task)
        tracer.label([item for batch in batches.values() for item in batch.tensors()], "inputs")
        sent = []
        if job.processes > 1 and not fitted.stands_alone and job.adapter is None:
            with _disable_current_modes():
                sent.append(torch.empty(bytes_of(*parameters), dtype=torch.uint8, device="meta"))
            tracer.label(sent, BUCKETS)
        if job.preview is not None and target.name == "cpu":  # between previews it waits there
            vae = job.sizes.pipeline().vae
            tracer.label((*vae.parameters(), *vae.buffers()), VAE)
        second = None
        for number, first in enumerate(("first ", ""), start=1):
            start = tracer.mark()
            if second is not None:
                second()
            for index, count in enumerate(counts if second is None else (), start=1):
                tracer.place = 0
                fitted.summing = index < len(counts)
                with tracer.phase(f"{first}forward"):
                    fitted.masks.draw(0, 0, batches[count].ids, "meta")
                    loss = task.loss(fitted.module, batches[count])["loss"].float().sum()
                with tracer.phase(f"{first}backward"):
                    loss.backward()  # type: ignore[no-untyped-call]
                del loss
                tracer.label([p.grad for p in parameters if p.grad is not None], GRADIENTS)
            tracer.place = 0
            known = _gradients(tracer, parameters)
            end = tracer.mark()
            with tracer.phase(f"{first}optimizer"):
                if job.max_grad_norm:
                    torch.nn.utils.clip_grad_norm_(parameters, job.max_grad_norm)
                update()
                task.updated(number)
            if _repeats(job, fitted) and not tracer.alive(start, end):
                second = partial(_repeat, tracer, start, end, known)
    weights = {name: _frozen_bytes(fitted.module, name) for name in units}
    saving = _saving(job, target, fitted)
    return StepTrace(tracer.trace(), tuple(units), weights, saving, tracer.on_host)


def _repeats(job: Job, fitted: Fitted) -> bool:
    """Whether a second step goes forward and backward as the first did, if nothing of that is left.

    Weights on the host are fetched ahead from the second time on; state that is made in the backward pass is
    there then; and another task may do whatever it likes.
    """
    return fitted.host is None and not fitted.optimizer_in_backward and job.make_task is None


_Gradients = dict[nn.Parameter, tuple[Tensor, int]]
"""Parameter -> a tensor like its gradient, and the storage that this was."""


def _gradients(tracer: Tracer, parameters: Sequence[nn.Parameter]) -> _Gradients:
    """What a backward pass has left."""
    with _disable_current_modes():
        return {
            p: (torch.empty_like(p.grad), tracer.number(p.grad)) for p in parameters if p.grad is not None
        }


def _repeat(tracer: Tracer, start: Mark, end: Mark, gradients: _Gradients) -> None:
    """A second forward and backward pass like the first, for half the time."""
    names = {f"first {name}": name for name in ("forward", "backward")}
    tracer.again(start, end, names, dict(gradients.values()))
    for parameter, (gradient, _) in gradients.items():
        parameter.grad = gradient
    gradients.clear()  # they die when the parameters let go of them


def _watch(tracer: Tracer, fitted: Fitted) -> None:
    """Lets the tracer see what comes and goes beside operators: copies of weights, gradients."""
    tracer.casting(fitted.module)
    if fitted.host:
        fitted.host.watch = lambda copies: tracer.label(copies, VISITORS)
    if fitted.shards:
        fitted.shards.watch = lambda tensors: tracer.label(tensors, GATHERED)
    fitted.watch = lambda gradient: tracer.label([gradient], GRADIENTS)
    if fitted.optimizer_in_backward:
        for parameter in fitted.parameters.values():  # before the hook that frees it
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda p: tracer.label([p.grad], GRADIENTS)
            )


def _label(tracer: Tracer, job: Job, task: Task) -> None:
    """Says what is there before the first step."""
    fitted = task.fitted
    denoiser, parameters = fitted.module, list(fitted.parameters.values())
    host = {id(tensor) for tensor in fitted.host.tensors} if fitted.host else set()
    frozen = [p for p in (*denoiser.parameters(), *denoiser.buffers()) if not p.requires_grad]
    learned = [p for p in denoiser.parameters() if p.requires_grad]
    if fitted.shards:
        frozen = parted(fitted, tracer, frozen)
        learned = parameters if fitted.learns_parts else learned
    tracer.label([tensor for tensor in frozen if id(tensor) not in host], WEIGHTS)
    tracer.label(learned, ADAPTER if job.adapter else TRAINED)
    if fitted.has_masters:
        tracer.label(parameters, MASTERS)
    for module in vars(task).values():
        if isinstance(module, nn.Module) and module is not denoiser:
            tracer.label((*module.parameters(), *module.buffers()), TEACHER)
    tracer.label(task.state().values(), KEPT)


def parted(fitted: Fitted, tracer: Tracer, frozen: Sequence[Tensor]) -> list[Tensor]:
    """Of frozen tensors, what is with one process, where a denoiser without data is split."""
    assert fitted.shards is not None
    learned = () if fitted.learns_parts else (p for p in fitted.module.parameters() if p.requires_grad)
    whole = {id(p) for p in learned}
    split = [p for p in fitted.module.parameters() if p.dim() and id(p) not in whole]
    tracer.elsewhere(split)
    known = {id(p) for p in split}
    return [*fitted.shards.there, *(tensor for tensor in frozen if id(tensor) not in known)]


def _updater(job: Job, target: Target, fitted: Fitted, tracer: Tracer) -> Callable[[], None]:
    """What makes an update once the gradients are there, as far as it was not made in the backward pass."""
    facts = optimizers.find(job.optimizer)
    optimizer = optimizers.build(
        "adamw8bit" if facts.paged else job.optimizer,  # paged state cannot be made without its device
        fitted.parameters.values(),
        lr=1e-4,
        device="meta",
        per_parameter=fitted.optimizer_in_backward,
    )
    fused = target.name in facts.fused_on

    def step(optimizer: torch.optim.Optimizer) -> None:
        _update(optimizer, fused=fused)
        state = list(_state(optimizer))
        hosted = [t for t in state if facts.paged and target.name != "cpu" and t.numel() >= PAGED]
        tracer.host(hosted)
        large = {id(tensor) for tensor in hosted}
        tracer.label([tensor for tensor in state if id(tensor) not in large], STATE)

    if fitted.optimizer_in_backward:
        step_in_backward(optimizer, fitted, step)

    def update() -> None:
        if not fitted.optimizer_in_backward:
            step(optimizer)
            fitted.write_back()
        optimizer.zero_grad(set_to_none=True)

    return update


def _learned_bytes(fitted: Fitted) -> int:
    """Of all that is trained, wherever it is."""
    if fitted.shards and fitted.learns_parts:
        return 4 * sum(shape.numel() for shape in fitted.shards.shapes.values())
    return bytes_of(*fitted.parameters.values())


def _saving(job: Job, target: Target, fitted: Fitted) -> int:
    """Both adapter files are read again, or the rest of the pipeline, beside copies of what was learned."""
    learned = _learned_bytes(fitted)
    copied = learned if target.name != "cpu" or fitted.learns_parts else 0
    if job.adapter:
        return copied + 2 * learned
    return copied + sum(bytes_of(*part.build().parameters()) for part in job.sizes.networks)


def _frozen_bytes(denoiser: nn.Module, unit: str) -> int:
    module = denoiser.get_submodule(unit)
    return bytes_of(*(t for t in (*module.parameters(), *module.buffers()) if not t.requires_grad))


def _unit_watcher(tracer: Tracer) -> tuple[list[str], OnUnit]:
    """What tells the tracer which unit's forward or backward pass runs, and the units as they come up."""
    units: list[str] = []

    def on_unit(name: str, run: Callable[[], Any]) -> Any:
        if name not in units:
            units.append(name)
        number = units.index(name)
        tracer.place = 2 * number + 1
        made = run()
        tracer.place = 2 * number + 2
        for tensor in made if isinstance(made, tuple) else (made,):
            if tensor is not None and tensor.requires_grad:
                # Its gradient is there, so the unit's backward pass begins.
                tensor.register_hook(lambda _: setattr(tracer, "place", 2 * number + 1))
        return made

    return units, on_unit


def _update(optimizer: torch.optim.Optimizer, *, fused: bool) -> None:
    """One optimizer step on meta tensors, which some classes do not take."""
    if isinstance(optimizer, torch.optim.Adafactor):
        _update_adafactor(optimizer)
    elif fused:
        _update_fused(optimizer)
    else:
        optimizer.step()


@torch.no_grad()
def _update_fused(optimizer: torch.optim.Optimizer) -> None:
    """AdamW's fused kernel."""
    for group in optimizer.param_groups:
        learned = [p for p in group["params"] if p.grad is not None]
        for parameter in learned:
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device="meta")
                state["exp_avg"], state["exp_avg_sq"] = (
                    torch.zeros_like(parameter),
                    torch.zeros_like(parameter),
                )
        beta1, beta2 = group["betas"]
        means, squares, steps = (
            [optimizer.state[p][name] for p in learned] for name in ("exp_avg", "exp_avg_sq", "step")
        )
        torch._fused_adamw_(
            learned,
            [p.grad for p in learned],
            means,
            squares,
            [],
            steps,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


@torch.no_grad()
def _update_adafactor(optimizer: torch.optim.Optimizer) -> None:
    """Adafactor, tensor by tensor, without the scalars that it reads back (torch/optim/_adafactor.py)."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            state = optimizer.state[parameter]
            if gradient.dim() > 1:
                if not state:
                    rows, columns = [*gradient.shape[:-1], 1], [*gradient.shape[:-2], 1, gradient.shape[-1]]
                    state["row_var"] = gradient.new_zeros(rows)
                    state["col_var"] = gradient.new_zeros(columns)
                state["row_var"].lerp_(gradient.norm(dim=-1, keepdim=True).square_(), 0.5)
                state["col_var"].lerp_(gradient.norm(dim=-2, keepdim=True).square_(), 0.5)
                update = state["row_var"] @ state["col_var"]
                update.div_(state["row_var"].mean(dim=-2, keepdim=True))
            else:
                if not state:
                    state["variance"] = torch.zeros_like(gradient)
                state["variance"].lerp_(gradient.square(), 0.5)
                update = state["variance"].clone()
            update.clamp_(min=1e-30).rsqrt_().mul_(gradient)
            parameter.add_(update)


def _state(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor) and value.device.type == "meta":
                yield value
