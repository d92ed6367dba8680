from __future__ import annotations

import os
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
        ("a: !!python/object:os.system {}\n", "unknown tag"),
    ],
)
def test_bad_yaml(here: Path, text: str, message: str):
    write(here, "a.yaml", text)
    with pytest.raises(ConfigError, match=message):
        read("a.yaml")


NEST = "nested more than 20 deep"
MANY = "more than 10000 keys and values"
LAUGHS = "a0: &a0 [x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGED_LAUGHS = "a0: &a0 {k: v}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x: 1\na: " + "[" * 500 + "]" * 500, f"a.yaml:2: {NEST}"),
        ("a: " + "[" * 100_000, f"a.yaml:1: {NEST}"),
        ("a: " + "{a: " * 3000, f"a.yaml:1: {NEST}"),
        ("".join(" " * depth + f"k{depth}:\n" for depth in range(2000)), f"a.yaml:21: {NEST}"),
        ("a: [" + "x," * 20_000 + "]", f"a.yaml:1: {MANY}"),
        (LAUGHS, f"its aliases (*) make {MANY} of it"),
        (MERGED_LAUGHS, f"its aliases (*) make {MANY} of it"),
        ("x: 1\na: &a [*a]", "a.yaml:2: an alias (*) here leads back to what it is in"),
        ("a: &a {b: [*a]}", "a.yaml:1: an alias (*) here leads back to what it is in"),
        ("a: &a {<<: *a}", "a.yaml:1: an alias (*) here leads back to what it is in"),
        ("a: *b", "a.yaml:1: not valid YAML"),
        ("a:\n  <<: 5", "a.yaml:2: <<: takes a section, or a list of sections"),
        ("a: " + "9" * 5000, "a.yaml:1: a number of more than 100 digits"),
        ("a: 0." + "9" * 5000, "a.yaml:1: a number of more than 100 digits"),
        ("a: !!int abc", 'a.yaml:1: "abc" is not a whole number'),
        ("a: !!int ''", 'a.yaml:1: "" is not a whole number'),
        ("a: !!int 1.5", 'a.yaml:1: "1.5" is not a whole number'),
        ("a: !!float abc", 'a.yaml:1: "abc" is not a number'),
        ("a: !!bool maybe", 'a.yaml:1: "maybe" is not true or false'),
        ("a: !!null x", 'a.yaml:1: "x" is not null'),
        ("a: !!binary '@@@'", "a.yaml:1: unknown tag !!binary"),
        ("a: !!timestamp nope", "a.yaml:1: unknown tag !!timestamp"),
        ("a: !!set {a}", "a.yaml:1: unknown tag !!set"),
        ("a: !!map a", "a.yaml:1: unknown tag !!map"),
        ("a: !mine:map {}", "a.yaml:1: unknown tag !mine:map"),
        ("a: !!python/name:os.system", "a.yaml:1: unknown tag !!python/name:os.system"),
        ("? [a, b]\n: 1", "a.yaml:1: a key is text, not a list or a section"),
        ('a: "x\\0y"', "a.yaml:1: text with the control character U+0000"),
        ('a: "\\e[31m"', "a.yaml:1: text with the control character U+001B"),
        ('"k\\0": 1', "a.yaml:1: text with the control character U+0000"),
        ("a: \ud800", "a.yaml:1: not UTF-8 text"),
        ("a:\n\tb: 1", "a.yaml:2: the line is indented with a tab; YAML takes spaces alone"),
        ("a:\n  b: 1\n\tc: 1", "a.yaml:3: the line is indented with a tab"),
        ("a: 1\n---\nb: 2", "a.yaml:2: not valid YAML"),
    ],
)
def test_what_no_config_holds_is_one_message_with_its_line(text: str, message: str):
    with pytest.raises(ConfigError) as caught:
        parse(text, Path("a.yaml"))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


def test_tags_may_say_what_a_value_is_anyway():
    tree = parse("a: !!str 5\nb: !!int 5\nc: !!float 5\nd: !!bool true\ne: !!seq [1]", Path("a.yaml")).tree
    assert tree == {"a": "5", "b": 5, "c": 5.0, "d": True, "e": [1]}
    assert type(tree["c"]) is float


def test_merge_keys():
    """What a section merges is below what it says, and the first of several is above the next."""
    source = parse(
        "base: &base {lr: 1, n: 1}\nother: &other {lr: 2, m: 2}\n"
        "train:\n  <<: [*base, *other]\n  n: 3\none: {<<: {x: 1}}\n",
        Path("a.yaml"),
    )
    assert source.tree["train"] == {"lr": 1, "n": 3, "m": 2}
    assert source.tree["one"] == {"x": 1}
    assert source.where(("train", "lr")) == "a.yaml:1"
    assert source.where(("train", "m")) == "a.yaml:2"
    assert source.where(("train", "n")) == "a.yaml:5"


def test_only_a_regular_file_of_some_size_is_read(here: Path):
    (here / "large.yaml").write_text("# " + "x" * 1_000_000)
    with pytest.raises(ConfigError, match=r"large\.yaml: larger than 1000000 bytes, which no config is"):
        read("large.yaml")
    os.mkfifo(here / "pipe.yaml")
    (here / "folder.yaml").mkdir()
    (here / "loop.yaml").symlink_to(here / "loop.yaml")
    for name in ("pipe.yaml", "folder.yaml", "/dev/zero", "/dev/null"):
        with pytest.raises(ConfigError, match=f"{name}: is a folder or a device, not a config file"):
            read(name)
    for name in ("x" * 5000, "a\0b", "", "~nobody-of-this-name/x", "loop.yaml"):
        with pytest.raises(ConfigError, match=r"there is no config|is a folder or a device"):
            read(name)


def test_a_byte_order_mark_is_no_mistake(here: Path):
    (here / "a.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert read("a.yaml").tree == {"a": 1, "b": 2}


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
        ("text=photos #2", ("text",), "photos #2"),
        ("text=#2", ("text",), "#2"),
        ("text='a # b'", ("text",), "a # b"),
        ("text=a#b", ("text",), "a#b"),
        ("list=[a,b]", ("list",), ["a", "b"]),
        ("list=[0.9,0.99]", ("list",), [0.9, 0.99]),
        ("list=[a,b:c]", ("list",), ["a", "b:c"]),
        ("list=[merge,{prune:{ratio:0.3,keep:[a]}}]", ("list", 1, "prune"), {"ratio": 0.3, "keep": ["a"]}),
        ("a={x:'1:2',y:C:/z}", ("a",), {"x": "1:2", "y": "C:/z"}),
        ("chain[0].prune.ratio=0.4", ("chain", 0, "prune", "ratio"), 0.4),
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
        ("list=[1] # two", "command line: what stands behind # is not read: # two"),
        ("a.x=" + "[" * 3000, "command line: nested more than 20 deep"),
        ("a.x=&a [*a]", "command line: an alias"),
        ("a.x=\udce9", r"command line: a\.x=\\udce9: not UTF-8 text"),
        (".".join("a" * 30) + "=1", "is not an override"),
        ("b]", r'command line: "b\]" is not an override\n.* one with blanks in it as a whole in quotes'),
    ],
)
def test_bad_overrides(here: Path, override: str, message: str):
    write(here, "a.yaml", "a: {x: 1}\nlist: [1, 2]\n")
    with pytest.raises(ConfigError, match=message):
        read("a.yaml", [override])


def test_dotted():
    assert dotted(("optimize", 0, "prune", "ratio")) == "optimize[0].prune.ratio"
