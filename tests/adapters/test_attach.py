"""An adapter on a model: put in anew, trained, loaded, copied, folded in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tunekit import layers
from tunekit.adapters import (
    adapter_state,
    add_adapter,
    load_adapter,
    load_adapter_state,
    merge_adapter,
)
from tunekit.config import AdapterConfig
from tunekit.diffusion.metrics import relative_error
from tunekit.errors import AdapterError
from tunekit.families import Family

Trained = Callable[[Family, AdapterConfig], Any]
Save = Callable[..., tuple[Path, Path]]
Predict = Callable[[Family, Any], Tensor]
Load = Callable[[Any, Path], None]

FILES = ["peft", "other"]
LORA, DORA = AdapterConfig(rank=4, alpha=10.0), AdapterConfig(kind="dora", rank=4, alpha=3.0)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_new_adapter_changes_nothing_and_trains_in_fp32(
    family: Family, kind: str, predict: Predict
) -> None:
    pipeline = family.tiny()
    before = predict(family, pipeline)
    parameters = add_adapter(
        family.denoiser(pipeline), AdapterConfig(kind=kind, rank=2), family.facts.lora_targets
    )
    assert relative_error(predict(family, pipeline), before) < 1e-6
    assert {p.dtype for _, p in parameters} == {torch.float32}
    trainable = {n for n, p in family.denoiser(pipeline).named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in parameters}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_base_keeps_an_fp32_adapter(family: Family, dtype: torch.dtype) -> None:
    pipeline = family.load("tiny", dtype)
    parameters = add_adapter(family.denoiser(pipeline), AdapterConfig(rank=2), family.facts.lora_targets)
    assert {p.dtype for _, p in parameters} == {torch.float32}
    assert next(p.dtype for p in family.denoiser(pipeline).parameters() if not p.requires_grad) == dtype


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_every_adapter_tensor_gets_a_gradient(
    family: Family, kind: str, trained: Trained, predict: Predict, unread: Callable[[Family], frozenset[str]]
) -> None:
    pipeline = trained(family, AdapterConfig(kind=kind, rank=2))
    denoiser = family.denoiser(pipeline)
    predict(family, pipeline).square().sum().backward()
    for name, parameter in denoiser.named_parameters():
        if parameter.requires_grad and name.partition(".lora_")[0] not in unread(family):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_initial_weights_depend_on_the_seed_and_the_path_alone(family: Family) -> None:
    def state(seed: int, targets: list[str] | None = None) -> dict[str, Tensor]:
        torch.rand(seed + 1)  # the global state is of no influence
        denoiser = family.denoiser(family.tiny())
        add_adapter(denoiser, AdapterConfig(rank=2, targets=targets), family.facts.lora_targets, seed=seed)
        return adapter_state(denoiser)

    before = torch.random.get_rng_state()
    first, again, other = state(0), state(0), state(1)
    torch.random.set_rng_state(before)
    fewer = state(0, [family.facts.lora_targets[0]])
    downs = [key for key in first if "lora_A" in key]
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert all(not torch.equal(first[key], other[key]) for key in downs)
    assert all(torch.equal(first[key], tensor) for key, tensor in fewer.items()) and len(fewer) < len(first)
    bound = 1 / first[downs[0]].flatten(1).shape[1] ** 0.5  # Kaiming with a = sqrt(5)
    assert 0.8 * bound < first[downs[0]].abs().max() <= bound


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("file", FILES)
def test_both_files_give_back_what_was_trained(
    family: Family, kind: str, file: str, tmp_path: Path, trained: Trained, save: Save, predict: Predict
) -> None:
    config = AdapterConfig(kind=kind, rank=4, alpha=10.0)
    pipeline = trained(family, config)
    source = dict(zip(FILES, save(tmp_path, pipeline, family, config), strict=True))[file]
    loaded, merged = family.tiny(), family.tiny()
    load_adapter(loaded, family, source)
    expected = predict(family, pipeline)
    if ".kohya." in source.name:  # says alpha itself; elsewhere it is within the weights, rounded with them
        assert torch.equal(predict(family, loaded), expected)
    assert relative_error(predict(family, loaded), expected) < 1e-6
    count = merge_adapter(merged, family, source)
    assert count == sum("lora_A" in key for key in adapter_state(family.denoiser(pipeline)))
    assert relative_error(predict(family, merged), expected) < 1e-5
    assert relative_error(predict(family, family.tiny()), expected) > 0.05


def test_state_goes_out_and_in(family: Family, trained: Trained, predict: Predict) -> None:
    pipeline = trained(family, DORA)
    state = {key: tensor.clone() for key, tensor in adapter_state(family.denoiser(pipeline)).items()}
    fresh = family.tiny()
    add_adapter(family.denoiser(fresh), DORA, family.facts.lora_targets)
    load_adapter_state(family.denoiser(fresh), state)
    assert torch.equal(predict(family, fresh), predict(family, pipeline))
    key = next(iter(state))
    with pytest.raises(AdapterError, match=r"shape \[1\]"):
        load_adapter_state(family.denoiser(fresh), {**state, key: torch.zeros(1)})
    del state[key]
    with pytest.raises(AdapterError, match=key.replace(".", r"\.")):
        load_adapter_state(family.denoiser(fresh), state)


@pytest.mark.parametrize(("scheme", "most"), [("int8", 0.02), ("fp8", 0.1)])
def test_a_quantized_base_takes_an_adapter(
    scheme: layers.Scheme,
    most: float,
    family: Family,
    tmp_path: Path,
    trained: Trained,
    save: Save,
    predict: Predict,
) -> None:
    """Merged it is rounded again, which changes about as much as packing it did."""
    save(tmp_path, trained(family, LORA), family, LORA)

    def packed() -> Any:
        pipeline = family.tiny()
        layers.quantize(family.denoiser(pipeline), scheme)
        return pipeline

    loaded, merged = packed(), packed()
    load_adapter(loaded, family, tmp_path)
    merge_adapter(merged, family, tmp_path)
    modules = dict(family.denoiser(merged).named_modules())
    target = family.facts.lora_targets[0]
    module = next(module for path, module in modules.items() if path.endswith(target))
    assert isinstance(module, layers.QuantLinear) and module.scheme == scheme
    error = relative_error(predict(family, merged), predict(family, loaded))
    print(f"{family.name}: {scheme} merged against loaded {error:.1e}")
    assert error < most
    assert relative_error(predict(family, merged), predict(family, packed())) > 0.1


def test_a_target_that_is_not_there(family: Family) -> None:
    with pytest.raises(AdapterError, match=r'target "to_qq".*\n.*to_q'):
        add_adapter(
            family.denoiser(family.tiny()), AdapterConfig(targets=["to_qq"]), family.facts.lora_targets
        )


def test_one_adapter_at_a_time(family: Family, trained: Trained) -> None:
    with pytest.raises(AdapterError, match="there is an adapter in this model already"):
        add_adapter(family.denoiser(trained(family, LORA)), LORA, family.facts.lora_targets)
