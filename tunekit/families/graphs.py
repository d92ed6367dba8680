"""What the families' graphs have in common: examples of inputs, axes, configurations."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tunekit.families.family import Component, ExportComponent, Pipeline

ROW_AXES = {0: "batch"}
PICTURE_AXES = {0: "batch", 2: "height", 3: "width"}
TEXT_AXES = {0: "batch", 1: "sequence"}
TOKEN_AXES = {0: "batch", 1: "tokens"}
"""Tokens of a picture."""


def model_config(model: Any) -> dict[str, Any]:
    """The content of the model's config.json, without the path it was loaded from."""
    text = model.to_json_string() if hasattr(model, "to_json_string") else model.config.to_json_string()
    return {key: value for key, value in json.loads(text).items() if key != "_name_or_path"}


def example(*shape: int, like: nn.Module) -> Tensor:
    """An input, in the floating type of a module."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return values.to(next(p.dtype for p in like.parameters() if p.is_floating_point()))


def token_ids(length: int) -> Tensor:
    """An input of text encoders; int32 is what Optimum and diffusers' ONNX pipeline feed without a cast."""
    return torch.arange(2 * length, dtype=torch.int32).reshape(2, length) % 100


def denoiser(
    name: str,
    network: Any,
    inputs: Mapping[str, Tensor],
    dynamic: Mapping[str, Mapping[int, str]],
    *,
    module: nn.Module | None = None,
    flags: Collection[str] = (),
    multiples: Mapping[str, int] | None = None,
) -> ExportComponent:
    """The graph of a transformer.

    Args:
        name: of its row in the family's table.
        inputs: see `ExportComponent`, as `dynamic` and `multiples`.
        module: what is exported in place of the network; None is the network, given its inputs by name.
        flags: see `Called`.
    """
    return ExportComponent(
        name=name,
        component=name,
        module=Called(name, network, inputs, flags=flags) if module is None else module,
        inputs=dict(inputs),
        dynamic={key: dict(axes) for key, axes in dynamic.items()},
        outputs=["out_hidden_states"],
        config=model_config(network),
        multiples=dict(multiples or {}),
    )


class Called(nn.Module):
    """A network that is given its inputs one after the other, as exporters do; gives its first output.

    Args:
        name: what the network is called within, and its weights in the graph.
        inputs: keywords, in order.
        flags: of them, those that are booleans to the network and whole numbers in a graph.
    """

    def __init__(
        self, name: str, network: nn.Module, inputs: Collection[str], *, flags: Collection[str] = ()
    ) -> None:
        super().__init__()
        self.name, self.inputs, self.flags = name, tuple(inputs), frozenset(flags)
        self.add_module(name, network)

    def forward(self, *values: Tensor) -> Tensor:
        given = dict(zip(self.inputs, values, strict=True))
        for flag in self.flags:
            given[flag] = given[flag].bool()
        made: Tensor = self.get_submodule(self.name)(**given, return_dict=False)[0]
        return made


def encoder(
    pipeline: Pipeline,
    row: Component,
    outputs: Sequence[str],
    *,
    states: bool = False,
    masked: bool = False,
) -> ExportComponent:
    """The graph of a text encoder.

    Args:
        row: of the family's table.
        outputs: names, as transformers gives them.
        states: give all hidden states too, as "hidden_states.0" and on.
        masked: take an attention mask beside the ids.
    """
    network = getattr(pipeline, row.name)
    count = network.config.num_hidden_layers + 1 if states else 0
    inputs = {"input_ids": token_ids(getattr(pipeline, row.tokenizer).model_max_length)}
    if masked:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"], dtype=torch.int64)
    return ExportComponent(
        name=row.name,
        component=row.name,
        module=_Encoder(network, outputs, count),
        inputs=inputs,
        dynamic=dict.fromkeys(inputs, TEXT_AXES),
        outputs=[*outputs, *(f"hidden_states.{index}" for index in range(count))],
        config=model_config(network),
    )


class _Encoder(nn.Module):
    def __init__(self, network: nn.Module, outputs: Sequence[str], states: int) -> None:
        super().__init__()
        self.network, self.outputs, self.states = network, tuple(outputs), states

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        output = self.network(input_ids, **mask, output_hidden_states=bool(self.states))
        own = [getattr(output, name) for name in self.outputs]
        return (*own, *output.hidden_states) if self.states else tuple(own)
