"""Steps that take what the middle of the denoiser gave in an earlier step, and run its outer blocks alone.

What the middle of a denoiser gives changes little from one sampling step to the next (DeepCache, Ma et al.
2023, arXiv:2312.00858). Every so many-th step runs the whole and keeps it; the steps between take it as it
was, or carried on in a straight line through the last two (TaylorSeer, Liu et al. 2025, arXiv:2503.06923).
The family says what the middle is (`Family.middle`). In torch, its modules are not run; a graph is taken
apart into two. One piece of code decides for all runtimes, so torch and graphs draw the same, and as it
decides by the step alone, a picture does not depend on others in its batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor, nn

from tunekit.errors import ModelError

if TYPE_CHECKING:
    from tunekit.config import CacheConfig
    from tunekit.diffusion.sampling import Denoise
    from tunekit.families.family import Conditioning, Middle
    from tunekit.runtime.graph import Graph, GraphModule

Call = Callable[[], Tensor]


class Split(Protocol):
    """A denoiser whose middle can be left out."""

    def whole(self, call: Call) -> tuple[Tensor, list[Tensor]]:
        """Run all of it; also what the middle gave, each with dim 0 of the rows."""
        ...

    def outer(self, given: Sequence[Tensor], call: Call) -> Tensor:
        """Run it without its middle, which has given this."""
        ...


class _Kept(NamedTuple):
    time: float
    given: list[Tensor]


class StepCache:
    """The denoiser of one drawing; called once for each step, as `sample` does.

    Where guidance ends, the rows without the prompt go: those come first, so the last ones are kept. Where
    it begins, they were never seen, and the step runs whole.
    """

    def __init__(self, denoise: Denoise, split: Split, config: CacheConfig) -> None:
        self.denoise, self.split, self.config = denoise, split, config
        self.kept: list[_Kept] = []
        self.calls = 0

    def __call__(self, rows: Tensor, times: Tensor, told: Conditioning) -> Tensor:
        """One step; see `Denoise`."""

        def call() -> Tensor:
            return self.denoise(rows, times, told)

        number, time = self.calls, float(times.reshape(-1)[0])
        self.calls += 1
        known = min(len(given) for given in self.kept[-1].given) if self.kept else 0
        if number % self.config.interval == 0 or known < len(rows):
            prediction, given = self.split.whole(call)
            for one in given:
                if len(one) != len(rows):  # such a thing would never be taken again
                    raise ModelError(f"the middle of this denoiser gives {len(one)} for {len(rows)} rows")
            self.kept = [*self.kept[-1:], _Kept(time, given)]
            return prediction
        return self.split.outer(self._expected(time, len(rows)), call)

    def _expected(self, time: float, rows: int) -> list[Tensor]:
        """What the middle would give at a time, for the last rows."""
        last = [given[-rows:] for given in self.kept[-1].given]
        if self.config.order == 0 or len(self.kept) < 2:
            return last
        before, latest = self.kept
        if latest.time == before.time or any(len(given) < rows for given in before.given):
            return last
        share = (time - latest.time) / (latest.time - before.time)
        return [new + share * (new - old[-rows:]) for new, old in zip(last, before.given, strict=True)]


# Torch ------------------------------------------------------------------------------------------------------


class TorchSplit:
    """A network in torch.

    Args:
        denoiser: the network.
        middle: of it.
    """

    def __init__(self, denoiser: nn.Module, middle: Middle) -> None:
        self.modules = [denoiser.get_submodule(path) for path in middle.paths]
        self.middle = middle
        self._forms: dict[nn.Module, tuple[bool, ...]] = {}

    def whole(self, call: Call) -> tuple[Tensor, list[Tensor]]:
        """See `Split`."""
        came: list[list[Tensor]] = []
        gone: list[list[Tensor]] = []

        def before(module: nn.Module, args: Any, options: Any) -> None:
            came.append(_states(module, args, options))

        def after(module: nn.Module, args: Any, options: Any, output: Any) -> None:
            if module is self.modules[-1] or self.middle.adds:
                self._forms[module] = _form(output)
                if module is self.modules[-1]:
                    gone.append([part for part in _parts(output) if part is not None])

        with ExitStack() as hooks:
            first = self.modules[0].register_forward_pre_hook(before, with_kwargs=True)
            hooks.callback(first.remove)
            for module in self.modules:
                hooks.callback(module.register_forward_hook(after, with_kwargs=True).remove)
            prediction = call()
        (start,), (end,) = came, gone
        if self.middle.adds:
            end = [new - old for new, old in zip(end, self._in_order(start), strict=True)]
        return prediction, end

    def outer(self, given: Sequence[Tensor], call: Call) -> Tensor:
        """See `Split`."""
        with ExitStack() as stack:
            for module in self.modules:
                stack.enter_context(_replaced(module, self._stand_in(module, given)))
            return call()

    def _stand_in(self, module: nn.Module, given: Sequence[Tensor]) -> Callable[..., Any]:
        last, original = module is self.modules[-1], module.forward

        def forward(*args: Any, **options: Any) -> Any:
            states = _states(module, args, options, forward=original)
            if not self.middle.adds:
                if not last:
                    return self.middle.skipped(module, states[0])
                return (
                    (given[0].to(states[0].dtype),) if self._forms[module] else given[0].to(states[0].dtype)
                )
            form, now = self._forms[module], states[::-1]
            if last:
                changes = zip(self._in_order(states), given, strict=True)
                now = [old + new.to(old.dtype) for old, new in changes]
            if not form:
                return now[-1]
            parts = zip([None, *now][-len(form) :], form, strict=True)
            return tuple(state if there else None for state, there in parts)

        return forward

    def _in_order(self, states: list[Tensor]) -> list[Tensor]:
        """Of the states that came in, those that the last module gives, a text's before a picture's."""
        return states[1::-1] if self._forms[self.modules[-1]] == (True, True) else states[:1]


TEXT = "encoder_hidden_states"
"""What diffusers calls a text's state among the inputs of a block; a picture's comes first."""


def _states(
    module: nn.Module, args: Sequence[Any], options: Mapping[str, Any], *, forward: Any = None
) -> list[Tensor]:
    """A picture's state among the inputs of a module, then a text's, where there is one."""
    given = inspect.signature(forward or module.forward).bind(*args, **options).arguments
    picture = next(iter(given.values()))
    text = given.get(TEXT)
    return [picture] if not isinstance(text, Tensor) else [picture, text]


def _parts(output: Any) -> tuple[Tensor | None, ...]:
    return output if isinstance(output, tuple) else (output,)


def _form(output: Any) -> tuple[bool, ...]:
    """What a block gives: () for a picture's state; of a tuple, which of text and picture are there.

    Raises:
        ModelError: something else.
    """
    if isinstance(output, Tensor):
        return ()
    there = tuple(isinstance(part, Tensor) for part in _parts(output))
    if there not in ((True,), (True, True), (False, True)):
        raise ModelError("the middle of this denoiser gives what cannot be kept for the next step")
    return there


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


# Graphs -----------------------------------------------------------------------------------------------------


class GraphSplit:
    """A graph, taken apart into one that also gives what the middle gives, and one that takes it.

    Args:
        module: what is called; its graph becomes the first.
        whole: also gives `names`.
        outer: also takes them.
        names: of what the middle gives.
    """

    def __init__(self, module: GraphModule, whole: Graph, outer: Graph, names: Sequence[str]) -> None:
        whole.max_rows = outer.max_rows = module.graph.max_rows
        self.module, self.outer_graph, self.names = module, outer, tuple(names)
        module.graph, module.hidden = whole, self.names

    def whole(self, call: Call) -> tuple[Tensor, list[Tensor]]:
        """See `Split`."""
        prediction = call()
        return prediction, [self.module.kept[name] for name in self.names]

    def outer(self, given: Sequence[Tensor], call: Call) -> Tensor:
        """See `Split`."""
        module, graph = self.module, self.module.graph
        adapter, known = getattr(graph, "adapter", {}), getattr(self.outer_graph, "open_inputs", ())
        if adapter or known:  # whichever is put on the whole now, as far as it reaches out here
            self.outer_graph.adapter = {name: value for name, value in adapter.items() if name in known}  # type: ignore[attr-defined]
        module.graph, module.hidden, module.added = (
            self.outer_graph,
            (),
            dict(zip(self.names, given, strict=True)),
        )
        try:
            return call()
        finally:
            module.graph, module.hidden, module.added = graph, self.names, {}


class Node(NamedTuple):
    """A node of a graph; values are known by name."""

    inputs: Sequence[str]
    outputs: Sequence[str]
    is_shape: bool = False
    """Whether it gives the shape of what it reads, which depends on no weight."""


def is_matrix(shape: Iterable[int]) -> bool:
    """Whether a weight says by its name where it belongs: vectors that are alike are one in a graph."""
    return sum(side > 1 for side in shape) > 1


def cut(nodes: Sequence[Node], constants: Collection[str], middle: Collection[str]) -> list[str]:
    """The values by which the middle of a graph speaks to what runs after it.

    A node is of the middle if it reads a weight of it, be that as it is or unpacked by nodes before.

    Args:
        nodes: in an order in which they can run.
        constants: values that nothing given has a part in: weights, numbers.
        middle: of them, the weights of the middle.

    Returns:
        Values that depend on nodes of the middle, come from one or from what one depends on, and are read by
        nodes of which neither is true.
    """
    fixed, weights = set(constants), set(middle)
    own: list[bool] = []
    for node in nodes:
        unpacks = not weights.isdisjoint(node.inputs)
        is_fixed = bool(node.inputs) and fixed.issuperset(node.inputs)
        if is_fixed:
            fixed.update(node.outputs)
            weights.update(node.outputs if unpacks else ())
        own.append(unpacks and not is_fixed)
    reached: set[str] = set()  # values that depend on the middle
    for node, is_own in zip(nodes, own, strict=True):
        if (is_own or reached.intersection(node.inputs)) and not node.is_shape:
            reached.update(node.outputs)
    before: set[str] = set()  # values that the middle depends on
    early: set[str] = set()
    late: list[Node] = []
    for node, is_own in zip(reversed(nodes), reversed(own), strict=True):
        if is_own or before.intersection(node.outputs):
            before.update(node.inputs)
            early.update(node.outputs)
        else:
            late.append(node)
    ends: dict[str, None] = {}
    for node in reversed(late):
        read = [name for name in dict.fromkeys(node.inputs) if name in early and name in reached]
        # What joins ends of the middle and nothing else, such as a product and its bias, belongs to it.
        if len(read) > 1 and fixed.union(read).issuperset(node.inputs):
            early.update(node.outputs)
        else:
            ends.update(dict.fromkeys(read))
    return list(ends)


def needed(nodes: Sequence[Node], outputs: Sequence[str], given: Sequence[str]) -> list[int]:
    """Which nodes make these outputs, where some values are given; in order."""
    wanted, taken = set(outputs) - set(given), []
    for index in range(len(nodes) - 1, -1, -1):
        if wanted.intersection(nodes[index].outputs):
            wanted.update(set(nodes[index].inputs) - set(given))
            taken.append(index)
    return taken[::-1]
