#!/usr/bin/env python3
"""Which card trains which family at which size: writes benchmarks/plans.json and plans.md, without a GPU.

    .venv/bin/python scripts/plan_grid.py                   # all families: an hour or two on two cores
    .venv/bin/python scripts/plan_grid.py sd15 flux         # these, and leaves the other rows as they are
    .venv/bin/python scripts/plan_grid.py --table           # the table alone, of what plans.json has

Each row is `configs/<family>/lora.yaml` with one sample per step; for all weights, with adapter=null. Rows
are written one by one, and one that was made with the code as it is now is not made again: stop it, and go on
later. With --missing, none that is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

from tunekit import families, hardware
from tunekit.config import Loaded, config_names, load
from tunekit.memory.plan import Plan, code, versions
from tunekit.planning import plan_config
from tunekit.quiet import quiet_libraries
from tunekit.registry import FAMILIES
from tunekit.units import format_bytes

ROOT = Path(__file__).resolve().parent.parent
FILE, TABLE = ROOT / "benchmarks" / "plans.json", ROOT / "benchmarks" / "plans.md"
CARDS = (
    *("rtx-4060", "rtx-3080", "rtx-3060", "rtx-4060-ti-16gb", "rtx-4090"),
    *("rtx-5090", "a100-40gb", "rtx-a6000", "h100", "h200"),
)
"""One of each size that computes in bf16, in order of their memory."""
SIDES = (1024, 512, 768)
"""Pictures' sides in pixels, in the order in which they are planned."""
KINDS = {"LoRA": ("adapter.rank=16",), "all weights": ("adapter=null",)}
"""What is trained -> what it takes over the config of the family's LoRA."""
WHOLE = 1.005
"""Step time, to the same job with all the memory it wants, up to which nothing was slowed down."""

Row = dict[str, Any]


def config(family: str, kind: str, side: int) -> Loaded:
    """What a row plans; of a family that has no configs, what another's says of its base."""
    name, overrides = f"{family}/lora", []
    if name not in config_names():
        name = "flux2/lora"
        overrides = [
            f"model.family={family}",
            f"model.source={families.planned(family).facts.default_source}",
        ]
    overrides += [f"data.resolution={side}", "train.batch_size=1", "optimize=[]", *KINDS[kind]]
    return load(name, overrides, stand_in="pictures")


def planned(loaded: Loaded, card: str) -> Plan:
    """On one card, whether it fits or not."""
    (made,) = plan_config(loaded, device="all", cards=[card])
    return made


def short(card: str, made: Plan) -> dict[str, Any]:
    """What the table says of a plan."""
    return {
        "card": card,
        "device_bytes": made.device_bytes,
        "ram_bytes": made.ram_bytes,
        "peak_phase": made.peak_phase,
        "ram_phase": made.ram_phase,
        "relative_step_time": round(made.relative_step_time, 3),
        "plan": made.words,
        "approximates": made.approximates,
    }


def row(family: str, kind: str, side: int) -> Row:
    """The smallest card that does, and the smallest that does without being slowed down or rounding."""
    loaded = config(family, kind, side)
    facts = families.planned(family).facts
    made: Row = {"family": family, "base": facts.base_title or facts.title, "trained": kind, "side": side}
    roomy = planned(loaded, CARDS[-1])
    if not roomy.fits:
        return {**made, "needs": short(CARDS[-1], roomy)}
    sizes = {card: hardware.TABLE[card].memory_bytes or 0 for card in CARDS}
    for card in CARDS:
        if sizes[card] * hardware.SHOWN >= roomy.device_bytes:
            whole = planned(loaded, card)
            if whole.relative_step_time <= WHOLE and not whole.approximates:
                made["whole"] = short(card, whole)
                break
    for card in CARDS:
        found = planned(loaded, card)
        if found.fits:
            return {**made, "least": short(card, found)}
    raise AssertionError("what fits the largest card fits one of them")


def title(card: str) -> str:
    """A card and its memory."""
    facts = hardware.TABLE[card]
    size = f"{(facts.memory_bytes or 0) >> 30} GB"
    return facts.title if size in facts.title else f"{facts.title}, {size}"


def cells(found: Row) -> list[str]:
    """A row of the table."""
    head = [found["base"], found["trained"], f"{found['side']} px"]
    if "needs" in found:
        needs = found["needs"]
        sizes = [format_bytes(needs[key]) for key in ("device_bytes", "ram_bytes")]
        return [*head, "none of these", *sizes, "-", needs["plan"], "-"]
    least, whole = found["least"], found.get("whole")
    sizes = [format_bytes(least[key]) for key in ("device_bytes", "ram_bytes")]
    slower = f"x{least['relative_step_time']:.2f}"
    other = "none of these"
    if whole is not None:
        needed = " + ".join(format_bytes(whole[key]) for key in ("device_bytes", "ram_bytes"))
        other = "the same" if whole["card"] == least["card"] else f"{title(whole['card'])}: {needed}"
    return [*head, title(least["card"]), *sizes, slower, least["plan"], other]


COLUMNS = ("base", "trained", "size", "smallest card", "needs", "RAM", "step time", "how", "not slowed down")
HEAD = """# Which card trains what

Made by `scripts/plan_grid.py`, without a GPU: `configs/<family>/lora.yaml` with one sample per step, the
longest prompts and the largest bucket of each size; LoRAs of rank 16 on the family's usual layers, or all
weights. Cards:
{cards}.

The smallest card that does is planned as a run on it would be; step times are to the same job with all the
memory it wants. RAM is the host's, at most, in any phase. The last column is the smallest card on which
nothing is slowed down or rounded: what is needed of its memory + of the host's. Where nothing fits, the least
that is needed stands there. For a card of your own: `tunekit plan <config> --device all`.
"""


def ordered(rows: list[Row]) -> list[Row]:
    """By family, what is trained, and size."""
    kinds = list(KINDS)
    return sorted(rows, key=lambda found: (found["family"], kinds.index(found["trained"]), found["side"]))


def table(rows: list[Row]) -> str:
    """The table of rows, with what it says of itself."""
    lines = [HEAD.format(cards=", ".join(title(card) for card in CARDS))]
    lines += [f"| {' | '.join(line)} |" for line in (COLUMNS, ["---"] * len(COLUMNS), *map(cells, rows))]
    there = {key(found) for found in rows}
    absent: dict[str, list[str]] = {}
    for name, kind, side in itertools.product(FAMILIES.names(), KINDS, sorted(SIDES)):
        if (name, kind, side) not in there:
            absent.setdefault(name, []).append(f"{kind} {side}")
    if absent:
        said = "; ".join(f"{name}: {', '.join(which)}" for name, which in absent.items())
        lines += ["", f"Not planned yet (`scripts/plan_grid.py --missing`): {said}."]
    return "\n".join(lines) + "\n"


def write(rows: list[Row]) -> None:
    """Both files."""
    known = ordered(rows)
    FILE.write_text(json.dumps({"versions": versions(), "rows": known}, indent=1) + "\n", encoding="utf-8")
    TABLE.write_text(table(known), encoding="utf-8")


def key(found: Row) -> tuple[str, str, int]:
    """What a row is about."""
    return found["family"], found["trained"], found["side"]


def main() -> None:
    """Makes what is asked for and not there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="all, if none is named")
    parser.add_argument("--missing", action="store_true", help="leave rows that older code made as they are")
    parser.add_argument(
        "--table", action="store_true", help="write the table of what is there, and plan nothing"
    )
    options = parser.parse_args()
    quiet_libraries()
    names = sorted(FAMILIES.names())
    rows: dict[tuple[str, str, int], Row] = {}
    if FILE.exists():
        rows = {key(found): found for found in json.loads(FILE.read_text(encoding="utf-8"))["rows"]}
    rows = {about: found for about, found in rows.items() if about[0] in names}
    asked = [] if options.table else options.families or names
    for side, family, kind in itertools.product(SIDES, asked, KINDS):
        known = rows.get((family, kind, side))
        if known is not None and (options.missing or known["code"] == code()):
            continue
        start = time.monotonic()
        made = {**row(family, kind, side), "code": code()}
        rows[family, kind, side] = made
        write(list(rows.values()))
        print(" | ".join(cells(made)), f"({time.monotonic() - start:.0f} s)", flush=True)
    write(list(rows.values()))


if __name__ == "__main__":
    main()
