from __future__ import annotations

from pathlib import Path

import pytest

from tunekit.config.yaml import config_names, dotted, find_config, parse, read
from tunekit.errors import ConfigError


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        ("2E+3", 2000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-3", -3),
        ("1_000", 1000),
        ("0x10", 16),
        ("010", 10.0),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("1e", "1e"),
        ("v1.5", "v1.5"),
        ("???", "???"),
        ("{path: ???, n: 1}", {"path": "???", "n": 1}),
        ("[???, a]", ["???", "a"]),
        ("'what is this: ???'", "what is this: ???"),
    ],
)
def test_values(text: str, value: object):
    tree = parse(f"key: {text}", Path("a.yaml")).tree
    assert tree["key"] == value
    assert type(tree["key"]) is type(value)


def test_places_are_lines():
    source = parse("a: 1\nb:\n  c: [x,\n    y]\n  d: {e: 2}\n", Path("a.yaml"))
    assert source.where(("a",)) == "a.yaml:1"
    assert source.where(("b", "c", 1)) == "a.yaml:4"
    assert source.where(("b", "d", "e")) == "a.yaml:5"
    assert source.where(("b", "absent")) == "a.yaml:2"
    assert source.where(("absent",)) == "a.yaml"


def test_anchors_and_aliases():
    source = parse("a: &x {n: 1}\nb: *x\n", Path("a.yaml"))
    assert source.tree == {"a": {"n": 1}, "b": {"n": 1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2\nb: 3\n", r"a\.yaml:2: not valid YAML: .*"),
        ("a: 1\n b: 2\n", r"a\.yaml:2: not valid YAML"),
        ("a: b: c\n", r"a\.yaml:1: not valid YAML"),
        ("a: @x\n", r"a\.yaml:1: not valid YAML"),
        (
            "a: 1\nb: {c: 1, c: 2}\na: 3\n",
            r"a\.yaml:2: b\.c: given twice, first at a\.yaml:2\na\.yaml:3: a: given twice, first at a",
        ),
        ("a: !!python/object:os.system {}\n", "not valid YAML"),
    ],
)
def test_bad_yaml(here: Path, text: str, message: str):
    write(here, "a.yaml", text)
    with pytest.raises(ConfigError, match=message):
        read("a.yaml")


def test_not_a_mapping(here: Path):
    write(here, "a.yaml", "- 1\n")
    with pytest.raises(ConfigError, match=r"a\.yaml:1: a config is a mapping"):
        read("a.yaml")


def test_not_utf8(here: Path):
    (here / "a.yaml").write_bytes("a: grün".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"a\.yaml: not UTF-8 text"):
        read("a.yaml")


def test_missing_file_gives_the_nearest(here: Path):
    write(here, "mine.yaml", "a: 1\n")
    with pytest.raises(ConfigError, match=r'there is no config "mime.yaml"; did you mean "mine.yaml"'):
        read("mime.yaml")


def test_ready_made_configs_have_names():
    for name in config_names():
        assert find_config(name).is_file()


def test_extends_merges_sections_and_replaces_the_rest(here: Path):
    write(here, "base/one.yaml", "a: {x: 1, y: 2}\nlist: [1, 2]\nkept: yes\nadapter: {rank: 4}\n")
    write(here, "two.yaml", "extends: base/one.yaml\na: {y: 3, z: 4}\nlist: [5]\nadapter: null\n")
    source = read("two.yaml")
    assert source.tree == {"a": {"x": 1, "y": 3, "z": 4}, "list": [5], "kept": "yes", "adapter": None}
    assert source.where(("a", "x")) == "base/one.yaml:1"
    assert source.where(("a", "y")) == "two.yaml:2"
    assert source.where(("list", 1)) == "two.yaml:3"
    assert source.where(("kept",)) == "base/one.yaml:3"
    assert source.where(("adapter", "rank")) == "two.yaml:4"


def test_extends_over_three_files(here: Path):
    write(here, "one.yaml", "a: 1\nb: 1\nc: 1\n")
    write(here, "two.yaml", "extends: one.yaml\nb: 2\nc: 2\n")
    write(here, "three.yaml", "extends: two.yaml\nc: 3\n")
    assert read("three.yaml").tree == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nextends: nowhere.yaml\n", r'a\.yaml:2: extends: there is no "nowhere\.yaml"'),
        ("extends: [a, b]\n", r"a\.yaml:1: extends: takes the path of one config file"),
        ("extends: a.yaml\n", r"leads back to this file"),
        ("extends: b.yaml\n", r'b\.yaml:1: extends: "a\.yaml" leads back'),
    ],
)
def test_bad_extends(here: Path, text: str, message: str):
    write(here, "a.yaml", text)
    write(here, "b.yaml", "extends: a.yaml\n")
    with pytest.raises(ConfigError, match=message):
        read("a.yaml")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("a.x=5", ("a", "x"), 5),
        ("a={x: 9}", ("a",), {"x": 9}),
        ("new.deep.key=1e-3", ("new", "deep", "key"), 1e-3),
        ("list.1=9", ("list", 1), 9),
        ("list=[a, b]", ("list",), ["a", "b"]),
        ("chain.0.prune.ratio=0.4", ("chain", 0, "prune", "ratio"), 0.4),
        ("nothing.key=1", ("nothing", "key"), 1),
        ("text=a=b", ("text",), "a=b"),
        ("text=", ("text",), None),
    ],
)
def test_overrides(here: Path, override: str, key: tuple[str | int, ...], value: object):
    write(
        here,
        "a.yaml",
        "a: {x: 1, y: 2}\nlist: [1, 2]\nchain: [{prune: {ratio: 0.3}}]\nnothing: null\ntext: t\n",
    )
    source = read("a.yaml", [override])
    found = source.tree
    for part in key:
        found = found[part]
    assert found == value
    assert source.where(key) == "command line"
    assert source.where(("chain",)) == "a.yaml:3"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a.x", r'command line: "a\.x" is not an override\nwrite it as key\.subkey=value'),
        ("=3", "is not an override"),
        ("a..x=3", "is not an override"),
        ("a.x.z=3", r'command line: a\.x\.z=3: "a\.x" is a value, not a section'),
        ("list.7=3", r'"list" is a list of 2, counted from 0; "7" is no position in it'),
        ("list.x=3", r'"x" is no position in it'),
        ("a.x=[1", "command line: not valid YAML"),
    ],
)
def test_bad_overrides(here: Path, override: str, message: str):
    write(here, "a.yaml", "a: {x: 1}\nlist: [1, 2]\n")
    with pytest.raises(ConfigError, match=message):
        read("a.yaml", [override])


def test_dotted():
    assert dotted(("optimize", 0, "prune", "ratio")) == "optimize[0].prune.ratio"
