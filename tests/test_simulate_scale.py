"""scripts/simulate_scale.py: closed forms, what grows with what, and a run of this machine."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tunekit.errors import ConfigError
from tunekit.memory import sharding

ROOT = Path(__file__).resolve().parents[1]
EXACT = {
    "cards_per_node": 8,
    "inside": {"gb_s": 10, "latency_us": 1},
    "between": {"gb_s": 1, "latency_us": 10},
}
EXACT |= {"link_share": 1, "call_seconds": 0, "straggler_cv": 0}


@pytest.fixture(scope="module")
def scale() -> Any:
    spec = importlib.util.spec_from_file_location("simulate_scale", ROOT / "scripts" / "simulate_scale.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def costs(scale: Any) -> Any:
    """A step of 0.1 s + 0.5 s a picture, with a gigabyte of gradients."""
    return scale.Costs("a model", "measured", "here", 64, 0.1, 0.5, trained=250_000_000, weights=500_000_000)


def test_a_ring_moves_what_the_formula_says(scale: Any, costs: Any) -> None:
    told = scale.Assumptions.of(EXACT)
    inside = 2 * (7 / 8 * 1e9 / 10e9 + 7e-6)
    assert scale.reduce_seconds(8, 1e9, told) == pytest.approx(inside)
    assert scale.reduce_seconds(32, 1e9, told) == pytest.approx(inside + 2 * (3 / 4 * 1e9 / 1e9 + 3e-5))
    assert scale.reduce_seconds(1, 1e9, told) == 0 == scale.reduce_seconds(8, 0, told)
    (row,) = scale.predict(costs, told, [8])
    assert row.parts["all-reduce"] == pytest.approx(inside)
    assert row.seconds == pytest.approx(0.1 + 8 * 0.5 + inside)
    assert row.rate == pytest.approx(64 / row.seconds)
    assert row.efficiency == pytest.approx(row.rate / (8 * 64 / (0.1 + 64 * 0.5)))


def test_sharded_weights_are_gathered_twice_and_gradients_scattered_once(scale: Any, costs: Any) -> None:
    told = scale.Assumptions.of(EXACT)
    every = replace(costs, micro_batch=4, adapter=False)
    (row,) = scale.predict(every, told, [8], shard=True)
    once = 7 / 8 * 1e9 / 10e9 + 7e-6  # 500 million weights in bf16, and 250 million gradients in float32
    assert row.parts["gathering weights"] == pytest.approx(2 * 2 * once)  # 8 pictures in two forwards
    assert row.parts["all-reduce"] == pytest.approx(2 * once)
    (row,) = scale.predict(replace(every, adapter=True), told, [8], shard=True)
    assert row.parts["all-reduce"] == pytest.approx(2 * once)  # once a step, and all have all of it


def test_what_is_sent_is_what_sharding_says(scale: Any, costs: Any) -> None:
    told, every = scale.Assumptions.of(EXACT), replace(costs, micro_batch=4)
    whole = {"processes": 8, "split": 10**9, "forwards": 2}
    for adapter, sent in ((False, {"split_learned": 10**9}), (True, {"whole_learned": 10**9})):
        (row,) = scale.predict(replace(every, adapter=adapter), told, [8], shard=True)
        found = (row.parts["gathering weights"] + row.parts["all-reduce"]) * 10e9
        assert found == pytest.approx(sharding.traffic(**whole, **sent).total, rel=1e-3)


def test_the_slowest_of_normal_draws(scale: Any) -> None:
    """Known: 1 / sqrt(pi) of two, 3 / (2 sqrt(pi)) of three; tables have 1.4236 of 8 and 2.5076 of 100."""
    found = [scale.slowest(count) for count in (1, 2, 3, 8, 100)]
    wanted = [0, 1 / math.sqrt(math.pi), 1.5 / math.sqrt(math.pi), 1.4236, 2.5076]
    assert found == pytest.approx(wanted, abs=1e-4)


def test_without_losses_twice_the_cards_are_twice_as_fast(scale: Any, costs: Any) -> None:
    ideal = replace(costs, fixed=0.0, trained=0)
    rows = scale.predict(ideal, scale.Assumptions.of(EXACT), weak=True)
    assert [row.efficiency for row in rows] == pytest.approx([1.0] * len(rows))
    assert "not stopped at 512 cards" in scale.stops(rows).sentence


@pytest.mark.parametrize("weak", [False, True])
@pytest.mark.parametrize("shard", [False, True])
def test_what_grows_with_what(scale: Any, costs: Any, weak: bool, shard: bool) -> None:
    given = {"mtbf_hours": 100.0, "price_per_card_hour": 2.0}
    costs = replace(costs, pauses=(scale.Pause("checkpoint", 5.0, 100.0),))

    def rows(**more: Any) -> list[Any]:
        return scale.predict(costs, scale.Assumptions.of({**given, **more}), weak=weak, shard=shard)

    plain = rows()
    assert plain[0].efficiency == 1
    for one, other in pairwise(plain):
        assert other.efficiency <= one.efficiency + 1e-12 and other.cards > one.cards
        if other.pictures >= 1:
            assert other.cost >= one.cost - 1e-12
    for better, worse in (
        ("400gbe", "25gbe"),
        ("nvlink4", "pcie4"),
    ):
        key = "between" if better.endswith("gbe") else "inside"
        pairs = zip(rows(**{key: better}), rows(**{key: worse}), strict=True)
        assert all(a.seconds <= b.seconds for a, b in pairs)
    for change in ({"straggler_cv": 0.5}, {"mtbf_hours": 10.0}, {"restart_seconds": 9999.0}):
        assert all(a.seconds <= b.seconds for a, b in zip(plain, rows(**change), strict=True))
    slow_disk = rows(disk_gb_s=0.001, picture_bytes=1e6)
    assert slow_disk[-1].parts["the shared disk"] > 0
    assert all(a.seconds <= b.seconds for a, b in zip(plain, slow_disk, strict=True))


def test_it_says_where_it_stops(scale: Any, costs: Any) -> None:
    told = scale.Assumptions.of(EXACT)
    few = scale.predict(replace(costs, batch_size=6, trained=0), told)
    assert [row.cards for row in few] == [1, 2, 4, 8]  # of those without work the first alone
    assert scale.stops(few).sentence == (
        "It stops at 4 cards: with 8 there is less than a picture for each in a batch of 6."
    )
    assert few[2].pictures == 2  # six on four cards: two have two
    slow = scale.predict(costs, scale.Assumptions.of({**EXACT, "inside": {"gb_s": 0.1, "latency_us": 1}}))
    stop = scale.stops(slow)
    assert stop.cards == 2 and re.search(
        r"with 4 the efficiency is \d+\.\d%, and \d+% of a step go to all-reduce", stop.sentence
    )


def test_the_table_fits_a_terminal(scale: Any, costs: Any) -> None:
    told = scale.Assumptions.of(
        {"price_per_card_hour": 2.5, "encode_seconds": 0.1, "pictures": 10**6, "mtbf_hours": 1.0}
    )
    lines = scale.table(scale.predict(replace(costs, batch_size=100_000), told, weak=True))
    assert len(lines) == 11 and max(map(len, lines)) <= 80
    lines = scale.table(scale.predict(costs, told))
    assert lines[-1].split()[::7] == ["128", "-"] and lines[-1].endswith("refused")
    picture = scale.svg([("one", scale.predict(costs, told))])
    assert picture.startswith("<svg xmlns=") and picture.count("<polyline") == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"betwen": "25gbe"}, 'betwen: no such assumption\ndid you mean "between"?'),
        ({"between": "25gb"}, 'no such link: 25gb\ndid you mean "25gbe"?'),
        ({"inside": {"gb_s": -1, "latency_us": 1}}, "no such link"),
        ({"mtbf_hours": 0}, "mtbf_hours: must be more than 0"),
        ({"mtbf_hours": "often"}, "mtbf_hours: must be a number, not 'often'"),
        ({"overlap": 2}, "overlap: is a share, from 0 to 1"),
        ({"cards_per_node": 2.5}, "cards_per_node: is a whole number"),
        ({"restart_seconds": None}, "restart_seconds: must be a number"),
        ({"disk_gb_s": 1}, "disk_gb_s has no effect without picture_bytes"),
    ],
)
def test_what_cannot_be_assumed(scale: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        scale.Assumptions.of(given)
    assert said in str(error.value)


def test_every_assumption_says_where_it_is_from(scale: Any) -> None:
    for name, one in scale.DEFAULTS.items():
        assert one.source.startswith("http") or "http" in one.source or len(one.source) > 5, name
    assert scale.DEFAULTS["price_per_card_hour"].value is None and scale.DEFAULTS["mtbf_hours"].value is None
    assert all(link.source.startswith("https://") for link in scale.LINKS.values())
    listed = scale.Assumptions.of({"overlap": 0.5}).listed()
    assert {one["key"]: one["source"] for one in listed}["overlap"] == "given"


def write_run(folder: Path, batch: int, seconds: float) -> Path:
    folder.mkdir()
    config = {
        "model": {"source": "base", "family": "sd15"},
        "adapter": None,
        "memory": {"device": "cpu", "micro_batch": None},
    }
    config |= {
        "train": {"batch_size": batch, "checkpoint_every": 10, "validate_every": 5, "save_every": None}
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    rows, now = [{"step": 0, "val_loss": 1.0}], 0.0
    for step in range(1, 41):
        now += seconds
        rows.append({"step": step, "samples_per_second": batch / seconds, "seconds": now})
        now += 3.0 * (step % 5 == 0) + 2.0 * (step % 10 == 0)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "model").mkdir()
    step = {"kind": "train", "metrics": {"parameters": 1000}}
    (folder / "model" / "artifact.json").write_text(json.dumps({"lineage": [step]}))
    return folder


def test_what_runs_have_measured(scale: Any, tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "a", 8, 0.9), write_run(tmp_path / "b", 2, 0.3)
    found = scale.of_runs([one, two])
    assert (found.fixed, found.each) == pytest.approx((0.1, 0.1))
    assert (found.batch_size, found.trained, found.kind) == (8, 1000, "measured")
    assert found.cv == pytest.approx(0, abs=1e-9) and not found.notes
    pauses = {pause.what: (pause.seconds, pause.every, pause.shared) for pause in found.pauses}
    assert pauses == {
        "validation": (pytest.approx(3), 5, True),
        "checkpoint": (pytest.approx(2), 10, False),
    }
    alone = scale.of_runs([one])
    assert (alone.fixed, alone.each) == pytest.approx((0, 0.9 / 8)) and "one batch size" in alone.notes[0]


def test_folders_that_are_no_runs(scale: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no run that has trained: it has no config\.yaml"):
        scale.of_runs([tmp_path])
    run = write_run(tmp_path / "a", 8, 0.9)
    rows = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(rows[:3]))
    with pytest.raises(ConfigError, match="too few to measure by"):
        scale.of_runs([run])
    (run / "metrics.jsonl").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as a run"):
        scale.of_runs([run])


def test_the_page_is_of_what_was_counted(scale: Any) -> None:
    """Else: .venv/bin/python scripts/simulate_scale.py table"""
    known = json.loads((ROOT / "benchmarks" / "scale.json").read_text(encoding="utf-8"))
    assert (ROOT / "benchmarks" / "scale.md").read_text(encoding="utf-8") == scale.document(known)
    for case in known["cases"]:  # counted again from what stands there
        costs = dict(case["costs"])
        pauses = tuple(scale.Pause(**pause) for pause in costs.pop("pauses"))
        costs = scale.Costs(**{**costs, "notes": tuple(costs["notes"]), "pauses": pauses})
        rows = scale.predict(
            costs, scale.Assumptions.of(case["given"]), weak=case["weak"], shard=case["shard"]
        )
        assert [row.efficiency for row in rows] == pytest.approx(
            [row["efficiency"] for row in case["rows"]], abs=1e-6
        )
        assert scale.stops(rows).sentence == case["stops"]["sentence"]


@pytest.mark.slow
def test_two_processes_take_about_what_was_predicted(scale: Any, tmp_path: Path) -> None:
    """On a busy machine about is not near."""
    sys.path.insert(0, str(ROOT / "scripts"))
    found = scale.validate(tmp_path, 12, "adapter=null")
    assert found["gradient_bytes"] > 2**20 and found["gloo"]["bytes_s"] > 1e7
    assert 0.3 < found["predicted_s"] / found["measured_s"] < 3
