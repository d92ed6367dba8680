"""What is kept between calls is never needed, and never believed where it is not what was written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunekit import kept, resources
from tunekit.kept import Kept

VALUE = {"a": [1, 2.5, None], "b": {"c": "d"}}
QUIET = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def forgets() -> None:
    kept._complain.cache_clear()
    kept._tidy.cache_clear()


def test_a_value_comes_back(tmp_path: Path) -> None:
    there = Kept(tmp_path / "plans")
    assert there.read("x") is None
    there.write("x", VALUE)
    assert there.read("x") == VALUE


@QUIET
@given(st.binary(max_size=80), st.integers(0, 200), st.booleans())
def test_bytes_that_were_changed_are_not_believed(tmp_path: Path, junk: bytes, at: int, cut: bool) -> None:
    there, file = Kept(tmp_path), tmp_path / "x.json"
    there.write("x", VALUE)
    whole = file.read_bytes()
    changed = whole[:at] + junk + (b"" if cut else whole[at + len(junk) :])
    file.write_bytes(changed)
    assert there.read("x") in (None, VALUE)
    if json.dumps(VALUE) not in changed.decode("utf-8", "replace") and changed != whole:
        found = there.read("x")
        assert found is None or json.loads(changed)["value"] == VALUE


@QUIET
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=8))
def test_json_of_another_shape_is_nothing(tmp_path: Path, value: object) -> None:
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert Kept(tmp_path).read("x") is None
    (tmp_path / "x.json").write_text(json.dumps({"value": value, "sha256": value}))
    assert Kept(tmp_path).read("x") is None


def test_what_a_kill_left_goes_at_the_next_use(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, own = tmp_path / f".x.json.tmp-{dead.pid}", tmp_path / f".y.json.tmp-{os.getpid()}"
    left.write_text("half")
    own.write_text("being written")
    assert Kept(tmp_path).read("x") is None
    assert not left.exists()
    assert own.exists()


@pytest.mark.parametrize("place", ["a file in the way", "no home"])
def test_where_nothing_can_be_kept_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    (tmp_path / "file").touch()
    home = tmp_path / "file" / "cache" if place == "a file in the way" else None
    monkeypatch.setattr(kept, "cache_dir", lambda: home)
    for name in ("x", "y"):
        for kind in ("plans", "traces"):
            there = Kept.of(kind)
            there.write(name, VALUE)
            assert there.read(name) is None
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "not kept for the next time" in said[0]


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without HOME and an account
    assert resources.cache_dir() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert resources.cache_dir() == Path("/somewhere/tunekit")
