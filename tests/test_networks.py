"""tunekit/networks.py: networks without data, and those that visit a device layer by layer."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

from tunekit import families
from tunekit.networks import by_layer, repeated, twin


def test_a_twin_is_the_same_model_over_tensors_of_its_own() -> None:
    class Table:
        """What some transformers keep their positions in: no module, filled when they first run."""

        rows: Tensor | None = None

    inner = nn.Linear(4, 4, device="meta")
    model = nn.Sequential(inner, nn.LayerNorm(4, device="meta"), inner)
    model[1].weight.requires_grad_(False)
    model.tied = inner.weight
    model.table, model.others = Table(), [inner]
    model.register_buffer("steps", torch.zeros(3, device="meta"), persistent=False)
    model.eval()
    one, two = twin(model), twin(model)
    for made in (one, two):
        assert not made.training and not isinstance(made[0], nn.Sequential)
        assert made[0] is made[2] is made.others[0] and made.tied is made[0].weight
        known, own = dict(model.named_parameters()), dict(made.named_parameters())
        assert known.keys() == own.keys()
        assert all(own[name].requires_grad == known[name].requires_grad for name in known)
        assert all(own[name].shape == known[name].shape for name in known)
        assert model.state_dict().keys() == made.state_dict().keys()
        assert made(torch.empty(2, 4, device="meta")).shape == (2, 4)
    one.table.rows = one.steps
    assert two.table.rows is model.table.rows is None
    storages = {
        tensor.untyped_storage()._cdata
        for made in (model, one, two)
        for tensor in (*made.parameters(), *made.buffers())
    }
    assert len(storages) == 3 * 5


def test_a_network_without_data_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    part = families.sizes_of("sd15", "tiny").denoiser
    first = part.build()
    monkeypatch.setattr(type(part), "_made", lambda *args: pytest.fail("built again"))
    second = part.build()
    assert second is not first and second.config == first.config
    assert [p.shape for p in second.parameters()] == [p.shape for p in first.parameters()]


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))
        self.odd = nn.ModuleList([nn.Linear(8, 8), nn.LayerNorm(8)])

    def forward(self, tokens: Tensor) -> list[Tensor]:
        states = [self.words(tokens)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states


def test_layers_come_one_by_one_and_leave_again() -> None:
    model = Toy().requires_grad_(False)
    assert repeated(model) == list(model.layers)
    tokens = torch.arange(10)[None]
    expected = model(tokens)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    came: list[int] = []

    def watch(tensors: object) -> None:
        here = [p.data_ptr() != before[name] for name, p in model.named_parameters()]
        came.append(sum(here))

    with by_layer(model, "cpu", watch):
        assert all(map(torch.equal, model(tokens), expected))
        assert all(map(torch.equal, model(tokens), expected))
    assert came == [2] * 6  # a weight and a bias; those of the layer before have left
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.layers)


def test_layers_leave_when_one_of_them_fails() -> None:
    model = Toy().requires_grad_(False)
    before = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="shapes"), by_layer(model, "cpu"):
        model.layers[1](torch.zeros(1, 3))
    assert [p.data_ptr() for p in model.parameters()] == before


@pytest.mark.parametrize("name", families.runnable())
@torch.no_grad()
def test_prompts_are_encoded_layer_by_layer_to_the_same_bits(name: str) -> None:
    """Of every family, whatever its encoders are made of and whichever of their states it reads."""
    family = families.get(name)
    pipeline = family.tiny()
    prompts = ["a red cat on a bench", "the moon"]
    whole = family.encode_prompt(pipeline, prompts)
    seen: list[int] = []
    with ExitStack() as stack:
        for part in family.facts.encoders:
            encoder = getattr(pipeline, part.name)
            assert repeated(encoder), f"the {part.name} has no layers that could come one by one"
            stack.enter_context(by_layer(encoder, "cpu", lambda tensors: seen.append(1)))
        parts = family.encode_prompt(pipeline, prompts)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    layers = sum(len(repeated(getattr(pipeline, part.name))) for part in family.facts.encoders)
    assert 0 < len(seen) <= 2 * layers
