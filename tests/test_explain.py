from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from tunekit.config import config_names
from tunekit.config.yaml import read
from tunekit.errors import ConfigError
from tunekit.explain import SCHEMAS, explain, schema
from tunekit.registry import PASSES, load_recipe, recipe_names

LORA: dict[str, Any] = {
    "recipe": "lora",
    "model": {"family": "sd15", "source": "tiny"},
    "data": {"path": "photos"},
    "train": {"max_steps": 10, "lr": 1e-4},
}


# Schemas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", recipe_names())
def test_committed_schemas_are_current(recipe: str):
    """Else: .venv/bin/python scripts/update_docs --schemas"""
    committed = json.loads((SCHEMAS / f"{recipe}.json").read_text(encoding="utf-8"))
    assert committed == schema(recipe)
    jsonschema.Draft202012Validator.check_schema(committed)


@pytest.mark.parametrize("name", config_names())
def test_ready_made_configs_are_valid_by_their_schema(name: str):
    tree = read(name).tree
    jsonschema.validate(tree, schema(tree["recipe"]))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"optimize": ["merge", {"prune": {"ratio": 0.3}}, {"export_onnx": None}, {"quantize": {}}]},
        {"adapter": None},
        {"extends": "sd15/lora", "model": {}, "train": {"lr": 1}},
    ],
)
def test_what_is_right_is_valid(change: dict[str, Any]):
    jsonschema.validate({**LORA, **change}, schema("lora"))


@pytest.mark.parametrize(
    "change",
    [
        {"colour": "red"},
        {"train": {"max_steps": 10}},
        {"train": {"max_steps": "10", "lr": 1}},
        {"train": {"max_steps": 10**28, "lr": 1}},
        {"model": {"family": "sd15", "source": "tiny", "colour": 1}},
        {"optimize": ["prnue"]},
        {"optimize": [{"prune": {"ratoi": 1}}]},
        {"optimize": [{"prune": {"ratio": 2}}]},
        {"optimize": [{"merge": {}, "prune": {}}]},
        {"optimize": ["build_tensorrt"]},
        {"extends": "sd15/lora", "train": {"lr": -1}},
    ],
)
def test_what_is_wrong_is_not(change: dict[str, Any]):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**LORA, **change}, schema("lora"))


def test_every_key_of_a_recipe_and_a_pass_is_explained():
    for recipe in recipe_names():
        for key in load_recipe(recipe).Config.model_fields:
            assert explain(key), key
    for kind, step in PASSES.items():
        (found,) = (item for item in explain(kind) if item.kind == "pass")
        keys = [key for key, *_ in found.keys]  # those of a section, such as `adapter.rank`, stand behind it
        assert [key for key in keys if "." not in key] == list(step.model_fields)
        assert all(about for *_, about in found.keys)


# Words ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found", "takes"),
    [
        ("train.lr", ["train.lr"], "a number above 0 to 100"),
        ("learning_rate", ["train.lr"], "a number above 0 to 100"),
        ("lr", ["train.lr", "heal.lr"], "a number above 0 to 100"),
        ("network_dim", ["adapter.rank"], "a whole number from 1 to 4,096"),
        ("prune.ratio", ["prune.ratio"], "a number from 0 below 1 or a section or null"),
        ("train.betas", ["train.betas"], "a list of 2, each a number from 0 below 1"),
        ("train.schedule", ["train.schedule"], "constant or linear or cosine"),
        (
            "adapter.targets",
            ["adapter.targets"],
            "a list of text or attention or attention_feed_forward or all_linear or null",
        ),
    ],
)
def test_keys(name: str, found: list[str], takes: str):
    items = explain(name)
    assert set(found) <= {item.name for item in items}
    assert items[0].facts["takes"] == takes
    assert items[0].about


def test_sections_passes_and_optimizers():
    (train,) = explain("train")
    assert train.kind == "section" and ("lr", "a number above 0 to 100") in {row[:2] for row in train.keys}
    (prune,) = explain("prune")
    assert prune.kind == "pass" and prune.about.startswith("Removes whole")
    (optimizer,) = explain("adamw8bit")
    assert optimizer.kind == "optimizer" and optimizer.facts["of the extra"] == "quant"
    assert explain("data.class_prompt")[0].facts["of the recipes"] == "dreambooth"


def test_what_is_nothing():
    with pytest.raises(ConfigError, match=r'nothing is called "prnue"\ndid you mean "prune"\?'):
        explain("prnue")
    with pytest.raises(ConfigError, match=r"give train\.max_steps: epochs x pictures"):
        explain("num_train_epochs")
