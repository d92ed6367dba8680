"""Whatever is done to an adapter's file, reading it ends in our error or in an update that is finite."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from torch import Tensor

from tunekit import families
from tunekit.adapters import read_adapter
from tunekit.adapters.delta import changeable
from tunekit.errors import AdapterError

State = dict[str, Tensor]

SD15 = families.get("sd15")
LAYERS = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.resnets.0.conv1",
    "mid_block.resnets.0.norm1",
)
BOUNDED = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ENDINGS = (
    *("lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha"),
    *("dora_scale", "lora_magnitude_vector", "lora_A.default.weight", "lora.up.weight", "lora_B.bias"),
    *(
        "diff",
        "diff_b",
        "w_norm",
        "b_norm",
        "weight",
        "bias",
        "hada_w1_a",
        "lokr_w1",
        "modules_to_save.weight",
    ),
)
PREFIXES = (
    "",
    "unet.",
    "lora_unet_",
    "base_model.model.",
    "diffusion_model.",
    "lycoris_",
    "text_encoder.",
    "x.",
)
TYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int8,
    torch.int64,
    torch.bool,
)
WHOLE = (torch.int8, torch.int64)
SIZES = some.lists(some.sampled_from([0, 1, 2, 3, 4, 32, 64]), max_size=4).map(tuple)
JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=8),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def base() -> Any:
    return SD15.tiny()


def good() -> State:
    """An adapter of two layers, in PEFT's layout."""
    draw = torch.Generator().manual_seed(0)
    state = {}
    for path, inside, up in ((LAYERS[0], (32,), (32, 4)), (LAYERS[1], (64, 3, 3), (64, 4, 1, 1))):
        state[f"unet.{path}.lora_A.weight"] = torch.randn(4, *inside, generator=draw)
        state[f"unet.{path}.lora_B.weight"] = torch.randn(*up, generator=draw)
    return state


def read(base: Any, file: Path) -> bool:
    """Whether a file is read; then all that it does is finite and has the layer's shape."""
    try:
        found = read_adapter(base, SD15, file)
    except AdapterError as error:
        said = str(error)
        found = {}
    if not found:
        assert str(file.parent) in said and len(said) < 2000
        return False
    for component, updates in found.items():
        layers = changeable(getattr(base, component))
        for path, delta in updates.items():
            weight: Any = layers[path].weight
            changed = delta.apply(weight.detach())
            assert changed.shape == weight.shape and changed.dtype == weight.dtype
            assert torch.isfinite(changed).all()
            assert delta.bias is None or torch.isfinite(delta.bias).all()
    return True


@some.composite
def keys(draw: Any) -> str:
    path = draw(some.sampled_from(LAYERS))
    prefix, ending = draw(some.sampled_from(PREFIXES)), draw(some.sampled_from(ENDINGS))
    spelled = path.replace(".", "_") if prefix.endswith("_") else path
    return draw(some.sampled_from([f"{prefix}{spelled}.{ending}", ending, spelled])) or "x"


@some.composite
def tensors(draw: Any) -> Tensor:
    shape, dtype = draw(SIZES), draw(some.sampled_from(TYPES))
    value = draw(some.sampled_from([0.0, 1.0, -3.0, 1e-30, 1e30, float("nan"), float("inf")]))
    filled = torch.full(shape, value)
    return filled.nan_to_num(0, 1, -1).to(dtype) if dtype in WHOLE else filled.to(dtype)


@BOUNDED
@given(
    added=some.dictionaries(keys(), tensors(), max_size=4),
    dropped=some.sets(some.integers(0, 3), max_size=2),
    cast=some.none() | some.sampled_from(TYPES),
)
def test_keys_shapes_and_types(base: Any, added: State, dropped: set[int], cast: torch.dtype | None) -> None:
    state = good()
    for index in dropped:
        del state[list(good())[index]]
    if cast is not None:
        state = {key: tensor.to(cast) for key, tensor in state.items()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "a.safetensors")
        safetensors.torch.save_file({**state, **added}, file)
        was_read = read(base, file)
    assert was_read or added or dropped or not (cast is None or cast.is_floating_point)


@BOUNDED
@given(
    said=some.dictionaries(
        some.sampled_from(
            ["lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "use_dora", "peft_type", "r"]
        ),
        JSON | some.dictionaries(some.sampled_from(["to_q", ".*", "(", "a|b", "^x"]), JSON, max_size=2),
        max_size=3,
    )
    | JSON,
    prefixed=some.booleans(),
    beside=some.booleans(),
)
def test_settings(base: Any, said: Any, prefixed: bool, beside: bool) -> None:
    if prefixed and isinstance(said, dict):
        said = {f"unet.{key}": value for key, value in said.items()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "adapter_model.safetensors")
        header = None if beside else {"lora_adapter_metadata": json.dumps(said)}
        safetensors.torch.save_file(good(), file, metadata=header)
        if beside:
            Path(folder, "adapter_config.json").write_text(json.dumps(said))
        was_read = read(base, file)
    assert was_read or said != {}


@BOUNDED
@given(
    changes=some.lists(some.tuples(some.integers(0, 1500), some.integers(0, 255)), max_size=4),
    cut=some.none() | some.integers(0, 3000),
)
def test_bytes(base: Any, changes: list[tuple[int, int]], cut: int | None) -> None:
    content = bytearray(safetensors.torch.save(good(), metadata={"lora_adapter_metadata": "{}"}))
    for place, value in changes:
        content[place] = value
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "a.safetensors")
        file.write_bytes(content[:cut])
        assert read(base, file) or changes or cut is not None
