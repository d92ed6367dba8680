"""Layers that other programs know under other names, or as rows of one: what is written is what is meant.

Proven by diffusers' converters of whole networks, which take published weights apart, and by its loaders of
adapters. Sizes are those of the usual base, since some of these have them written in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor, nn

from tunekit import families
from tunekit.adapters import Dora, Lora, to_kohya, to_peft
from tunekit.adapters.delta import changeable, modules_of
from tunekit.adapters.layouts import parse
from tunekit.adapters.names import written_layers
from tunekit.diffusion.metrics import relative_error
from tunekit.errors import AdapterError
from tunekit.families import Component, Family
from tunekit.families.family import Published, published

State = dict[str, Tensor]
Updates = dict[str, Tensor]
"""Module path -> what its update does to a vector, [out, PROBES]."""

TOLERANCE = 1e-5
PROBES = 2
NAMED = [name for name, family in families.FAMILIES.items() if hasattr(family, "adapter_names")]


def short(part: Component) -> Component:
    """A denoiser with two blocks of each kind, of full width."""
    counts = {key for key in part.config if key.startswith(("num_", "n_")) and key.endswith("layers")}
    return replace(part, config={**part.config, **dict.fromkeys(counts, 2)})


@pytest.fixture(scope="module", params=NAMED)
def family(request: pytest.FixtureRequest) -> Family:
    return families.FAMILIES.get(request.param)


@pytest.fixture(scope="module")
def network(family: Family) -> nn.Module:
    built: nn.Module = short(family.facts.denoiser).build()
    return built


@pytest.fixture(scope="module")
def deltas(network: nn.Module) -> dict[str, Lora]:
    """An update of every layer; ranks and strengths differ, as those of a file may."""
    draw = torch.Generator().manual_seed(0)
    made = {}
    for number, (path, layer) in enumerate(modules_of(network).items()):
        rank = 2 + number % 3
        out, *inside = layer.weight.shape
        down = torch.randn(rank, *inside, generator=draw)
        up = torch.randn(out, rank, *[1] * (len(inside) - 1), generator=draw)
        made[path] = Lora(down=down, up=up, alpha=1.5 + number % 4)
    return made


def done(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """What an update does to vectors that depend on nothing but their length."""
    inside = down[0].numel()
    draw = torch.Generator().manual_seed(inside)
    probe = torch.randn(inside, PROBES, generator=draw, dtype=torch.float64)
    return scale * (up.double().flatten(1) @ (down.double().flatten(1) @ probe))


def wanted(deltas: dict[str, Lora]) -> Updates:
    return {path: done(delta.down, delta.up, delta.alpha / delta.rank) for path, delta in deltas.items()}


def largest_difference(found: Updates, expected: Updates) -> float:
    assert found.keys() == expected.keys()
    return max(relative_error(found[path], expected[path]) for path in expected)


def by_layer(state: State) -> Updates:
    """What each layer of a file does, by the name that it has there."""
    state = dict(state)
    found = {}
    for name in {key.rpartition(".lora_")[0] for key in state if ".lora_" in key}:
        down = next(
            state.pop(f"{name}.{end}.weight")
            for end in ("lora_down", "lora_A")
            if f"{name}.{end}.weight" in state
        )
        up = next(
            state.pop(f"{name}.{end}.weight")
            for end in ("lora_up", "lora_B")
            if f"{name}.{end}.weight" in state
        )
        alpha = state.pop(f"{name}.alpha", torch.tensor(float(len(down))))
        found[name] = done(down, up, float(alpha) / len(down))
    assert not state, "keys of no layer"
    return found


class Rest(dict[str, Tensor]):
    """Weights of a network of which only the matrices are of interest."""

    def pop(self, key: str, *default: Any) -> Tensor:
        return super().pop(key, torch.zeros(6))


def test_the_published_network_has_these_updates(
    family: Family, network: nn.Module, deltas: dict[str, Lora]
) -> None:
    part = family.facts.denoiser
    loadable = SINGLE_FILE_LOADABLE_CLASSES.get(type(network).__name__)
    layers = written_layers(part.name, {part.name: modules_of(network)}, family)
    if all(layer.parts == (layer.name,) for layer in layers):
        pytest.skip("its layers have the names of diffusers")
    if part.name == "unet" or loadable is None:
        pytest.skip("diffusers converts this network by other means")
    found = by_layer(to_kohya({part.name: deltas}, {part.name: modules_of(network)}, family))
    weights = Rest()
    for layer in layers:
        name = (
            f"{part.dotted}.{layer.name}"
            if part.dotted
            else f"{part.kohya[0]}_{layer.name}".replace(".", "_")
        )
        weights[f"{layer.name}.weight"] = found.pop(name)
        weights[f"{layer.name}.bias"] = torch.zeros(len(weights[f"{layer.name}.weight"]))
    assert not found
    converted = loadable["checkpoint_mapping_fn"](checkpoint=weights, config=network.config)
    expected = wanted(deltas)
    difference = largest_difference({path: converted[f"{path}.weight"] for path in expected}, expected)
    print(f"{len(layers)} layers of {len(expected)} modules, largest difference {difference:.1e}")
    assert difference <= TOLERANCE


@pytest.mark.parametrize("write", [to_peft, to_kohya], ids=["peft", "others"])
def test_diffusers_loads_these_updates(
    family: Family, network: nn.Module, deltas: dict[str, Lora], write: Callable[..., State], tmp_path: Path
) -> None:
    name = family.facts.denoiser_name
    given = () if write is to_peft else ({name: modules_of(network)}, family)
    if write is to_kohya:
        # Outside the blocks diffusers leaves out alpha here, the order of halves there, or refuses a layer.
        blocks = tuple(f"{path}." for path, _ in family.blocks(network))
        deltas = {path: delta for path, delta in deltas.items() if path.startswith(blocks)}
    state = write({name: deltas}, *given)
    file = tmp_path / "a.safetensors"
    safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in state.items()}, file)
    loader = getattr(diffusers, family.facts.pipeline_class)
    options = {"unet_config": network.config} if name == "unet" else {}
    read = loader.lora_state_dict(str(file), **options)
    read, alphas = read if isinstance(read, tuple) else (read, {})
    if write is to_kohya and read.keys() == state.keys():
        pytest.skip("diffusers has no reader for this layout")
    if alphas:
        pytest.skip("diffusers applies alpha later: see test_layouts.py")
    found = {path.removeprefix(f"{name}."): update for path, update in by_layer(read).items()}
    expected = wanted(deltas)
    difference = largest_difference(found, expected)
    print(f"{len(expected)} modules, largest difference {difference:.1e}")
    assert difference <= TOLERANCE


def read_back(family: Family, network: nn.Module, state: State) -> dict[str, Any]:
    name = family.facts.denoiser_name
    return parse(state, {}, {name: changeable(network)}, family, "file").get(name, {})


@pytest.mark.parametrize("write", [to_peft, to_kohya], ids=["peft", "others"])
def test_what_is_written_is_read(
    family: Family, network: nn.Module, deltas: dict[str, Lora], write: Callable[..., State]
) -> None:
    name = family.facts.denoiser_name
    given = () if write is to_peft else ({name: modules_of(network)}, family)
    read = read_back(family, network, write({name: deltas}, *given))
    assert {path: delta.rank for path, delta in read.items()} == {p: d.rank for p, d in deltas.items()}
    assert largest_difference(wanted(read), wanted(deltas)) <= TOLERANCE / 10


def test_every_module_of_a_full_network_has_one_name(family: Family) -> None:
    for component in family.facts.kohya_prefixes:
        network = family.facts.component(component).build()
        modules = {component: modules_of(network)}
        layers = written_layers(component, modules, family)
        assert sorted(path for layer in layers for path in layer.parts) == sorted(modules[component])
        names = [layer.name.replace(".", "_") for layer in layers]
        assert len(set(names)) == len(names)


# Rows of one layer ------------------------------------------------------------------------------------------


class Made:
    """Answers for two layers that were published as one, and for one whose halves are swapped there."""

    facts = families.FAMILIES.get("flux").facts

    def adapter_names(self, component: str, paths: Any) -> list[Published]:
        return published({"in": ("a", "b"), "out": "c"}, paths, swapped=["out"])


MADE: Any = Made()
INSIDE, ROWS = 6, {"a": 4, "b": 5, "c": 8}


@pytest.fixture
def small() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.ModuleDict({name: nn.Linear(INSIDE, rows) for name, rows in ROWS.items()})


def made(kind: type[Lora], layer: nn.Module, rank: int, alpha: float) -> Lora:
    out = len(layer.weight)
    tensors = {"down": drawn(rank, INSIDE), "up": drawn(out, rank)}
    if kind is Dora:
        tensors["magnitude"] = drawn(out).abs() + 1
    return kind.read(tensors, alpha)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def round_trip(network: nn.Module, deltas: dict[str, Lora]) -> tuple[State, dict[str, Any]]:
    modules = {"transformer": changeable(network)}
    state = to_kohya({"transformer": deltas}, modules, MADE)
    return state, parse(state, {}, modules, MADE, "file")["transformer"]


@pytest.mark.parametrize("kind", [Lora, Dora])
@pytest.mark.parametrize("trained", ["abc", "ab", "a", "b", "c"])
def test_what_is_not_trained_of_a_layer_stays_as_it_is(
    small: nn.Module, kind: type[Lora], trained: str
) -> None:
    """Whole weights, as another program computes them from the file alone."""
    deltas = {name: made(kind, small[name], 2 + i, 1.5 + i) for i, name in enumerate(trained)}
    state, read = round_trip(small, deltas)
    assert read.keys() == deltas.keys()
    assert [read[name].rank for name in trained] == [deltas[name].rank for name in trained]
    both = torch.cat([small["a"].weight, small["b"].weight]).detach()
    theirs = {"in": both, "out": small["c"].weight.detach().roll(ROWS["c"] // 2, 0)}
    for name, weight in theirs.items():
        key = f"lora_unet_{name}"
        if f"{key}.alpha" in state:
            down, up = state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"]
            weight += state[f"{key}.alpha"] / len(down) * up @ down
            if kind is Dora:
                weight *= state[f"{key}.dora_scale"] / weight.norm(dim=1, keepdim=True)
    after = {"a": theirs["in"][: ROWS["a"]], "b": theirs["in"][ROWS["a"] :], "c": theirs["out"].roll(4, 0)}
    for name, weight in after.items():
        before = small[name].weight.detach()
        expected = deltas[name].apply(before) if name in deltas else before
        torch.testing.assert_close(weight, expected)
        if name in deltas:
            torch.testing.assert_close(read[name].apply(before), expected)


def test_ranks_that_have_learned_nothing(small: nn.Module) -> None:
    """An adapter as it is put in: its ups are zero."""
    deltas = {
        name: replace(made(Lora, small[name], 2, 3.0), up=torch.zeros(rows, 2)) for name, rows in ROWS.items()
    }
    _, read = round_trip(small, deltas)
    assert {name: delta.rank for name, delta in read.items()} == dict.fromkeys(ROWS, 2)
    assert all(not delta.up.any() for delta in read.values())
    deltas["b"].up[0, 1] = 1
    _, read = round_trip(small, deltas)
    assert {name: delta.rank for name, delta in read.items()} == dict.fromkeys(ROWS, 2)
    assert read.keys() >= {"b"} and torch.equal(
        read["b"].apply(torch.zeros(5, 6)), deltas["b"].apply(torch.zeros(5, 6))
    )


def test_layers_that_others_trained_as_one(small: nn.Module) -> None:
    """They share their ranks; whole differences and biases are rows too."""
    name, rows = "diffusion_model.in", ROWS["a"] + ROWS["b"]
    down, up = drawn(3, INSIDE), drawn(rows, 3)
    modules = {"transformer": changeable(small)}

    def read(state: State) -> dict[str, Any]:
        return parse(state, {}, modules, MADE, "file")["transformer"]

    pair = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.alpha": torch.tensor(6.0)}
    found = read({**pair, f"{name}.diff_b": drawn(rows)})
    for part, own, bias in zip("ab", up.split([4, 5]), drawn(rows).split([4, 5]), strict=True):
        torch.testing.assert_close(found[part].apply(torch.zeros(len(own), INSIDE)), 2 * own @ down)
        assert torch.equal(found[part].bias, bias)
    whole = read({f"{name}.diff": drawn(rows, INSIDE), "lora_unet_out.diff": drawn(8, INSIDE)})
    assert torch.equal(torch.cat([whole["a"].weight, whole["b"].weight]), drawn(rows, INSIDE))
    assert torch.equal(whole["c"].weight, drawn(8, INSIDE).roll(4, 0))
    for state, words in (
        (
            {**pair, "transformer.b.lora_A.weight": drawn(1, 6), "transformer.b.lora_B.weight": drawn(5, 1)},
            "of its own",
        ),
        ({**pair, f"{name}.dora_scale": drawn(1, INSIDE)}, "lengths of columns"),
        (
            {**pair, f"{name}.lora_B.weight": drawn(rows + 1, 3)},
            rf"\[{rows + 1}, 3\], this model needs \[{rows}, 3\]",
        ),
    ):
        with pytest.raises(AdapterError, match=words):
            read(state)


def test_a_layer_is_not_part_lora_and_part_dora(small: nn.Module) -> None:
    deltas = {"a": made(Lora, small["a"], 2, 1.0), "b": made(Dora, small["b"], 2, 1.0)}
    with pytest.raises(AdapterError, match="in cannot be part LoRA and part DoRA"):
        to_kohya({"transformer": deltas}, {"transformer": changeable(small)}, MADE)


SIZES = some.lists(some.sampled_from([0, 1, 2, 4, 5, INSIDE, 8, 9]), max_size=3).map(tuple)
ENDINGS = [
    "lora_A.weight",
    "lora_B.weight",
    "lora_mid.weight",
    "alpha",
    "dora_scale",
    "diff",
    "diff_b",
    "lora_B.bias",
]


@given(
    changes=some.dictionaries(
        some.tuples(some.sampled_from(["in", "out", "a"]), some.sampled_from(ENDINGS)),
        some.tuples(SIZES, some.sampled_from([0.0, 1.0, -3.0, 1e30, float("nan")])),
        max_size=5,
    ),
    dropped=some.sets(some.integers(0, 3), max_size=2),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_whatever_a_file_has_of_a_stack_is_read_or_refused(
    changes: dict[tuple[str, str], tuple[tuple[int, ...], float]], dropped: set[int]
) -> None:
    network = nn.ModuleDict({name: nn.Linear(INSIDE, rows) for name, rows in ROWS.items()})
    state = {}
    for name, rows in (("in", 9), ("out", 8)):
        state |= {
            f"{name}.lora_A.weight": torch.ones(2, INSIDE),
            f"{name}.lora_B.weight": torch.ones(rows, 2),
        }
    state = {key: tensor for i, (key, tensor) in enumerate(state.items()) if i not in dropped}
    state |= {f"{name}.{end}": torch.full(shape, value) for (name, end), (shape, value) in changes.items()}
    try:
        found = parse(state, {}, {"transformer": changeable(network)}, MADE, "file")["transformer"]
    except AdapterError:
        assert changes or dropped
        return
    for name, delta in found.items():
        changed = delta.apply(network[name].weight.detach())
        assert changed.shape == network[name].weight.shape and torch.isfinite(changed).all()
