"""One spelling per lever: in the config, in what is decided, in plan.json and in the documents."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from tunekit.config import MemoryConfig
from tunekit.config.memory import Mark, Scale, free_on_resume, levers, marks, open_levers
from tunekit.memory.decided import Levers
from tunekit.memory.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
UNITS = ("down", "middle", "up")
DECIDED = Levers(
    precision="bf16",
    base_precision="nf4",
    micro_batch=2,
    gradient_checkpointing=UNITS,
    keep_attention=("up",),
    offload=("down", "middle"),
    optimizer_in_backward=True,
    encode_on_host=True,
    encode_by_layer=True,
    encode_precision="bf16",
    vae_tiling=True,
    class_batch=1,
)
"""Every lever at work."""


def plan(levers: Levers, accumulation: int = 2, optimizer: str = "adamw") -> Plan:
    phase = {"peak_allocated_bytes": 1, "least_bytes": 1, "host_bytes": 0, "ledger": {"weights": 1}}
    return Plan("a card", 10, True, levers, accumulation, optimizer, 86, {"step": phase}, 1, 0, 0, 0, 1.0)


def documented() -> dict[str, str]:
    """Key -> whether it changes what is learned, of the table in docs/memory.md."""
    rows = re.findall(
        r"^\| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", (ROOT / "docs" / "memory.md").read_text(), re.M
    )
    return {key: changes for _, keys, changes in rows for key in re.findall(r"`([a-z_]+)`", keys)}


def test_every_lever_is_spelled_the_same_everywhere() -> None:
    """A new one is a field, how it is applied, and where the planner tries it; this names what is missing."""
    places = {
        "MemoryConfig": [name for name, mark in marks().items() if mark in levers().values()],
        "Levers": [item.name for item in fields(Levers)],
        'plan.json["memory"]': list(plan(DECIDED).as_json()["memory"]),
    }
    known = documented()
    for name in dict.fromkeys(name for names in places.values() for name in names):
        print(f"{name}: {', '.join(place for place, names in places.items() if name in names)}", end="")
        print(", docs/memory.md" if name in known else "")
    for place, names in places.items():
        assert names == list(levers()), place
    assert set(levers()) <= set(known), "docs/memory.md"


def test_the_documents_say_what_changes_what_is_learned() -> None:
    known = documented()
    said = {name: known[name].startswith("no") for name in levers()}
    assert said == {name: lever.exact for name, lever in levers().items()}


def test_every_key_is_marked() -> None:
    assert list(marks()) == list(MemoryConfig.model_fields)
    assert all(isinstance(mark, Mark) for mark in marks().values())
    assert "precision" not in open_levers()
    assert {*open_levers(), "precision"} == set(levers())


def test_what_changes_what_is_learned_stays_when_a_run_goes_on() -> None:
    kept = {f"memory.{name}" for name in MemoryConfig.model_fields} - set(free_on_resume())
    assert kept == {
        "memory.precision",
        "memory.base_precision",
        "memory.optimizer_in_backward",
        "memory.encode_precision",
    }
    assert all(f"memory.{name}" in kept for name, lever in levers().items() if not lever.exact)


def test_what_was_decided_goes_into_a_config_and_comes_back() -> None:
    made = plan(DECIDED)
    section = json.loads(json.dumps(made.as_json()))["memory"]
    assert Levers.of(section) == DECIDED
    one = replace(DECIDED, encode_on_host=False)  # the two exclude each other
    assert Levers.of(MemoryConfig(**plan(one).as_json()["memory"])) == one
    assert Levers.of(MemoryConfig(**Levers().among(UNITS).section())) == Levers()
    assert Plan.load(json.loads(json.dumps(made.dump()))) == made


def test_units_are_named_in_their_order() -> None:
    every = Levers(gradient_checkpointing=True, keep_attention=True, offload=["up", "down"]).among(UNITS)
    assert (every.gradient_checkpointing, every.keep_attention) == (UNITS, UNITS)
    assert every.offload == ("down", "up")
    some = Levers(gradient_checkpointing=["up"], keep_attention=True).among(UNITS)
    assert (some.gradient_checkpointing, some.keep_attention, some.offload) == (("up",), ("up",), ())


def test_the_words_of_a_plan() -> None:
    assert plan(DECIDED, optimizer="adamw8bit").measures == [
        "nf4 base",
        "micro-batch 2 x 2",
        "3 of 86 blocks checkpointed (1 keep their attention)",
        "weights of 2 blocks in host memory",
        "optimizer in backward",
        "text encoders on the CPU",
        "text encoders on the device layer by layer",
        "pictures encoded in bf16",
        "previews decoded in tiles",
        "class pictures drawn 1 at once",
        "adamw8bit",
    ]
    assert plan(DECIDED, optimizer="adamw8bit").approximates == [
        "nf4 base",
        "pictures encoded in bf16",
        "8-bit optimizer state",
    ]
    bare = plan(Levers("bf16", micro_batch=4, class_batch=4).among(UNITS), accumulation=1)
    assert (bare.measures, bare.approximates) == ([], [])
    assert bare.words == "bf16, micro-batch 4, nothing checkpointed"
    assert Levers().words(Scale(86, 1)) == []


@pytest.mark.parametrize("packed", ["same", "int8"])
def test_the_first_spelling_of_plan_json_stays(packed: str) -> None:
    """docs/interfaces.md, version 1."""
    content = plan(Levers("bf16", packed, 2, UNITS, ("up",), ("down",)).among(UNITS)).as_json()
    assert content["version"] == 1
    assert content["base_precision"] == ("bf16" if packed == "same" else "int8")
    assert content["checkpointed_blocks"] == list(UNITS)
    assert (content["attention_kept_blocks"], content["offloaded_blocks"]) == (["up"], ["down"])
    promised = (
        "device budget_bytes fits phases peak_phase device_bytes context_bytes headroom_bytes host_bytes"
        " micro_batch accumulation precision base_precision optimizer optimizer_in_backward"
        " checkpointed_blocks attention_kept_blocks offloaded_blocks encode_on_host vae_tiling class_batch"
        " blocks levers approximates relative_step_time notes rejected"
    )
    assert set(promised.split()) <= set(content)
