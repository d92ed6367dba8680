"""scripts/update_docs: what it writes is there, and its tables are of what there is."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest

from tunekit import families, hardware
from tunekit.config import config_names

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GOLDEN = json.loads((ROOT / "tests" / "golden" / "plans.json").read_text())


@pytest.fixture(scope="module")
def docs() -> Any:
    path = ROOT / "scripts" / "update_docs"
    loader = SourceFileLoader("update_docs", str(path))
    spec = importlib.util.spec_from_loader("update_docs", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    loader.exec_module(module)
    return module


def between(marks: tuple[str, str]) -> str:
    """What stands between two marks of README."""
    start, end = (f"<!-- {mark} -->" for mark in marks)
    assert README.count(start) == README.count(end) == 1
    return README.partition(start)[2].partition(end)[0].strip()


def test_the_table_of_families_is_what_they_say(docs: Any) -> None:
    """Else: .venv/bin/python scripts/update_docs --schemas"""
    table = docs.family_table()
    assert between(docs.FAMILIES) == table
    assert len(table.splitlines()) == 2 + len(families.FAMILIES.names())


def test_every_family_says_what_its_licence_is(docs: Any) -> None:
    for name in families.FAMILIES.names():
        row = docs.family_row(name, families.planned(name))
        print(row)
        assert all(row)


def test_the_table_of_plans_is_of_what_is_planned(docs: Any) -> None:
    """Its columns are configs as they are now, its rows the cards whose plans are remembered."""
    assert list(GOLDEN) == [name for name in docs.JOBS if name in GOLDEN]
    assert set(GOLDEN) <= set(config_names())
    head, _, *rows = between(docs.PLANS).splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")[1:]] == [docs.title(name) for name in GOLDEN]
    assert [row.strip("|").split("|")[0].strip() for row in rows] == [
        *(hardware.TABLE[card].title for card in docs.CARDS),
        docs.RAM,
    ]
    for found in GOLDEN.values():
        assert list(found) == list(docs.CARDS)
