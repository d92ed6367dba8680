from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from tunekit import registry
from tunekit.errors import ConfigError, ModelError
from tunekit.registry import FAMILIES, PASSES, load_recipe, recipe_names, recipe_path
from tunekit.resources import ASSETS, builtin, builtin_names, resolve_path


def test_the_folder_is_the_registry():
    assert "sd15" in FAMILIES.names()
    assert {"merge", "prune", "heal", "quantize", "export_onnx"} <= set(PASSES.names())
    assert not {"base", "__init__", "family", "tiny"} & {*FAMILIES.names(), *PASSES.names()}
    assert PASSES.names() == sorted(PASSES.names())


def test_names_are_listed_without_importing():
    code = (
        "import sys; from tunekit.registry import *; FAMILIES.names(); PASSES.names(); recipe_names();"
        "assert not {'tunekit.passes.prune', 'tunekit.families.sd15', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_get_returns_what_the_file_sets():
    assert PASSES.get("merge").kind == "merge"
    assert dict(PASSES.items())["merge"] is PASSES.get("merge")


@pytest.mark.parametrize(
    ("known", "typo", "nearest"), [(PASSES, "quantise", "quantize"), (FAMILIES, "sd-15", "sd15")]
)
def test_unknown_names_give_the_nearest(known: registry.Registry, typo: str, nearest: str):
    with pytest.raises(ConfigError, match=f'there is no {known.noun} "{typo}"; did you mean "{nearest}"'):
        known.get(typo)


def test_entry_points_add_members(monkeypatch: pytest.MonkeyPatch):
    point = EntryPoint("sharpen", "collections:OrderedDict", "tunekit.passes")
    monkeypatch.setattr(registry, "_entry_points", lambda group: {"sharpen": point})
    assert "sharpen" in PASSES.names()
    assert PASSES.get("sharpen").__name__ == "OrderedDict"


def test_recipes_by_name_and_path(tmp_path):
    assert {"lora", "dreambooth", "optimize"} <= set(recipe_names())
    assert recipe_path(str(recipe_path("lora"))) == recipe_path("lora").resolve()
    with pytest.raises(ConfigError, match=r'there is no recipe "lorra"; did you mean "lora"'):
        load_recipe("lorra", where="a.yaml:1")
    with pytest.raises(ConfigError, match="does not exist"):
        load_recipe("nowhere/mine.py")


def test_a_recipe_file_of_ones_own(tmp_path, capsys):
    """It is named before it is imported, and may be what a stranger's config brings along."""
    load_recipe("lora")
    assert capsys.readouterr() == ("", "")
    file = tmp_path / "mine.py"
    file.write_text("Config = 1\n")
    with pytest.raises(ConfigError, match="is no recipe: it does not define main"):
        load_recipe(str(file))
    file.write_text("Config = 1\ndef main(config, loaded): ...\n")
    capsys.readouterr()
    assert load_recipe(str(file)) is load_recipe(str(file))
    assert capsys.readouterr() == ("", f"mine.py: the recipe {file} is code, and runs from here on\n")
    file.write_text("raise SystemExit('it ran')\n")
    with pytest.raises(SystemExit):
        load_recipe(str(file.rename(tmp_path / "other.py")), where="mine.yaml:1")
    assert capsys.readouterr().err.startswith("mine.yaml:1: the recipe ")


def test_builtin_names():
    assert builtin("elsewhere/x") is None
    assert resolve_path("some/folder").parts == ("some", "folder")
    with pytest.raises(ModelError, match=r'bundled under the name "builtin/../errors.py"'):
        builtin("builtin/../errors.py")
    with pytest.raises(ModelError, match="bundled"):
        builtin("builtin/nothing-like-it")
    for name in builtin_names():
        assert resolve_path(name) == ASSETS / name.removeprefix("builtin/")
