"""What the families' graphs have in common: examples of inputs, axes, configurations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tunekit.families.family import Component, ExportComponent, Pipeline

PICTURE_AXES = {0: "batch", 2: "height", 3: "width"}


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
        dynamic={name: {0: "batch", 1: "sequence"} for name in inputs},
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
