"""What the families' graphs have in common: examples of inputs, axes, configurations."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

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
