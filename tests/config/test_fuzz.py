"""Whatever a config file or an override says, it is taken, or refused in a few lines that name the place.

Nothing else comes out of the reader: no other exception, no endless work, no value that no key takes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tunekit.config import DreamboothData, TrainingRunConfig, all_keys, dump_yaml, load, parse
from tunekit.config.schema import _get as get
from tunekit.config.yaml import MAX_DEPTH, MAX_VALUES
from tunekit.errors import ConfigError
from tunekit.passes.base import parse_chain
from tunekit.registry import PASSES, load_recipe, recipe_names

SETTINGS = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
BASES: dict[str, dict[str, Any]] = {
    "lora": {
        "model": {"family": "sd15", "source": "tiny"},
        "data": {"path": "photos"},
        "train": {"max_steps": 10, "lr": 1e-3},
    },
    "dreambooth": {
        "model": {"family": "sd15", "source": "tiny"},
        "data": {"path": "photos", "instance_prompt": "a"},
        "train": {"max_steps": 10, "lr": 1e-3},
    },
    "optimize": {"model": {"family": "sd15", "source": "tiny"}, "optimize": ["merge"]},
}
KEYS = [(recipe, key) for recipe in recipe_names() for key in all_keys(load_recipe(recipe).Config)]


class Dreambooth(TrainingRunConfig):
    data: DreamboothData


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused_well(error: ConfigError, places: tuple[str, ...]) -> None:
    """A few lines, each short and with its place."""
    lines = str(error).splitlines()
    assert 1 <= len(lines) <= 22
    assert lines[0].startswith(places), lines[0]
    assert max(map(len, lines)) < 2000
    assert "Traceback" not in str(error)


# YAML -------------------------------------------------------------------------------------------------------

WORDS = (
    "a b train << *x *y : - ? [ ] { } , # ' @ ` ~ null true 1 -1 1e400 0x1F .nan -.inf 1_0 ??? 日本 --- ..."
)
TAGS = (
    "!!int !!float !!bool !!str !!binary !!set !!map !!seq !!null !!python/name:os.system !x &x &y |- %YAML"
)
LETTERS = [
    "\n",
    "\n  ",
    "\n    ",
    " ",
    "\t",
    "\r\n",
    '"',
    "\\",
    "\x00",
    "\x1b",
    "\ud800",
    "\ufeff",
    "\u2028",
    "\x85",
]
LONG = ["9" * 400, "[" * 30, "{a: " * 30, '"\\0"', '"\\uD800"']
PIECES = st.sampled_from([*WORDS.split(), *(f"{tag} " for tag in TAGS.split()), ": ", "- ", *LETTERS, *LONG])


def walk(tree: Any, depth: int = 0) -> Iterator[tuple[int, Any]]:
    yield depth, tree
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from walk(value, depth + 1)


def read_or_refused(text: str, **options: Any) -> Any:
    try:
        document = parse(text, Path("a.yaml"), **options)
    except ConfigError as error:
        refused_well(error, ("a.yaml", "command line"))
        return None
    values = list(walk(document.tree))
    assert len(values) <= MAX_VALUES and max(depth for depth, _ in values) <= MAX_DEPTH + 1
    assert {type(value) for _, value in values} <= {dict, list, str, int, float, bool, type(None)}
    for place in document.places.values():
        assert place.startswith(("a.yaml:", "command line"))
    return document.tree


@SETTINGS
@given(st.lists(PIECES, max_size=40).map("".join))
@example("a: &a [" + "*a, " * 10 + "]")
@example("a: &a {<<: [*a, *a]}")
@example("a: !!int\nb: !!bool")
@example("? [a]\n: 1\n? {b: 1}\n: 2")
def test_yaml_of_pieces(text: str) -> None:
    read_or_refused(text)
    read_or_refused(text, fixed="command line")


@SETTINGS
@given(st.text(max_size=200))
def test_yaml_of_any_text(text: str) -> None:
    read_or_refused(text)


@settings(SETTINGS, max_examples=12)
@given(st.integers(1, 12), st.integers(2, 12), st.booleans())
def test_aliases_that_explode(levels: int, width: int, is_merge: bool) -> None:
    lines = ["a0: &a0 {k: v}"]
    for level in range(1, levels):
        many = ", ".join([f"*a{level - 1}"] * width)
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{many}]}}" if is_merge else f"[{many}]"))
    tree = read_or_refused("\n".join(lines))
    assert (tree is None) or is_merge or width ** (levels - 1) <= MAX_VALUES


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abcxyz_", min_size=1, max_size=5), inner, max_size=3)
    ),
    max_leaves=12,
)


@SETTINGS
@given(st.dictionaries(st.text("abcxyz_", min_size=1, max_size=5), PLAIN, max_size=4))
def test_plain_values_come_back(tree: dict[str, Any]) -> None:
    assert parse(json.dumps(tree, ensure_ascii=False), Path("a.yaml")).tree == tree


@SETTINGS
@given(st.binary(max_size=200))
def test_any_file(here: Path, content: bytes) -> None:
    (here / "any.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:  # no recipe is named by chance
        load("any.yaml")
    refused_well(caught.value, ("any.yaml",))


# Keys -------------------------------------------------------------------------------------------------------

VALUES = st.one_of(
    st.sampled_from(["", "auto", "0", "-1", "1e28", ".nan", "x" * 300, "../x", "~nobody/x", "a\0b", "[a,b]"]),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=20),
    st.lists(st.one_of(st.integers(-3, 3), st.floats(), st.text(max_size=5), st.none()), max_size=4),
    st.dictionaries(st.text(max_size=6), st.integers(-3, 3) | st.text(max_size=5), max_size=3),
    PLAIN,
)


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        tree = tree.setdefault(part, {}) if isinstance(tree.get(part, {}), dict) else {}
    tree[last] = value


@SETTINGS
@given(st.sampled_from(recipe_names()), st.data())
def test_any_value_at_any_key(here: Path, recipe: str, data: st.DataObject) -> None:
    """One to three values: each config is taken, and then is finite, and the same when it is read again."""
    keys = [key for name, key in KEYS if name == recipe and key != "recipe"]
    tree = json.loads(json.dumps({"recipe": recipe, **BASES[recipe]}))
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3)):
        put(tree, key, data.draw(VALUES, label=key))
    (here / "any.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), "utf-8", errors="replace")
    try:
        config = load("any.yaml").config
    except ConfigError as error:
        refused_well(error, ("any.yaml",))
        return
    whole = config.model_dump(mode="json")
    numbers = [value for _, value in walk(whole) if isinstance(value, int | float)]
    assert all(
        math.isfinite(number) and abs(number) < 2**64 for number in numbers if not _free(whole, number)
    )
    (here / "again.yaml").write_text(dump_yaml(config), encoding="utf-8")
    assert load("again.yaml").config == config


def _free(whole: dict[str, Any], number: float) -> bool:
    """Whether a number stands where a recipe takes anything: a sampler's own keys, and passes before they are
    read."""
    anything = [get(whole, ("preview", "scheduler"))[1], whole.get("optimize")]
    return any(value is number for part in anything for _, value in walk(part))


@SETTINGS
@given(st.sampled_from(KEYS), st.one_of(VALUES.map(str), st.lists(PIECES, max_size=8).map("".join)))
@example(("lora", "data.path"), "photos #2")
@example(("lora", "optimize"), "[merge,{prune:{ratio:0.3}}]")
@example(("lora", "train.betas"), "[0.9,0.99]")
def test_any_override(here: Path, where: tuple[str, str], text: str) -> None:
    recipe, key = where
    (here / "any.yaml").write_text(yaml.safe_dump({"recipe": recipe, **BASES[recipe]}), "utf-8")
    try:
        load("any.yaml", [f"{key}={text}"])
    except ConfigError as error:
        refused_well(error, ("any.yaml", "command line"))


@SETTINGS
@given(st.text(max_size=40))
def test_any_text_as_an_override_or_as_a_config(here: Path, text: str) -> None:
    (here / "any.yaml").write_text(yaml.safe_dump({"recipe": "lora", **BASES["lora"]}), "utf-8")
    with pytest.raises(ConfigError) as caught:
        load("any.yaml", [text])
    refused_well(caught.value, ("any.yaml", "command line"))
    with pytest.raises(ConfigError):
        load(text or "nothing")


# Passes -----------------------------------------------------------------------------------------------------

STEPS = [(kind, key) for kind, step in PASSES.items() for key in step.model_fields]


@SETTINGS
@given(st.lists(st.sampled_from(STEPS), max_size=3), st.data())
def test_any_value_of_a_pass(steps: list[tuple[str, str]], data: st.DataObject) -> None:
    chain: list[Any] = [{kind: {key: data.draw(VALUES, label=key)}} for kind, key in steps]
    chain += data.draw(st.lists(PLAIN, max_size=1))
    try:
        found = parse_chain(chain, lambda index, key: f"a.yaml:{index}")
    except ConfigError as error:
        refused_well(error, ("a.yaml:",))
        return
    for step in found:
        assert all(math.isfinite(v) for _, v in walk(step.model_dump(mode="json")) if isinstance(v, float))
