"""Rules are pure functions of the curves: how far whom has come changes when they decide, never what."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tunekit.sweep.rules import Asha, Curve, Median, stopped_at


def curve(*values: float, ended: bool = True) -> Curve:
    return Curve(dict(enumerate(values, start=1)), ended, last=8)


def test_the_median_of_those_before() -> None:
    good, bad = curve(*[1.0] * 8), curve(*[2.0] * 8)
    rule = Median(grace=3, trials=2)
    assert stopped_at(rule, [bad, good, good, good]) == [None] * 4  # nothing stops the first two
    assert stopped_at(rule, [good, good, bad, good]) == [None, None, 3, None]
    late = curve(1, 1, 1, 1, 1, 2, 2, 2)
    assert stopped_at(rule, [good, good, late]) == [None, None, 6]
    at_the_end = curve(*[1.0] * 7, 9.0)  # nothing is saved by stopping there
    assert stopped_at(rule, [good, good, at_the_end]) == [None] * 3
    assert stopped_at(None, [good, bad]) == [None, None]


def test_one_of_so_many_goes_on() -> None:
    rule = Asha(grace=2, factor=2)
    curves = [curve(*[float(v)] * 8) for v in (4, 3, 5, 2, 6, 1)]
    # At each of the steps 2 and 4, the best half of those before it and itself.
    assert stopped_at(rule, curves) == [None, None, 2, None, 2, None]
    assert stopped_at(Asha(2, 3), curves) == [None, None, 2, None, 2, None]
    # Stopped at 2, the third does not count at 4.
    assert Asha(2, 2).steps(curves[0]) == [2, 4]


def test_nobody_is_judged_before_those_in_front_of_it_have_come_so_far() -> None:
    rule = Asha(grace=2, factor=2)
    behind, bad = curve(1.0, ended=False), curve(*[2.0] * 6, ended=False)
    assert stopped_at(rule, [behind, bad]) == [None, None]
    assert stopped_at(rule, [curve(1.0, 1.0, ended=False), bad]) == [None, 2]
    assert stopped_at(rule, [curve(1.0, ended=True), bad]) == [None, None]  # it failed


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([Median(2, 2), Asha(1, 2), Asha(2, 3)]))
def test_what_is_decided_stays_however_far_the_others_are(seed: int, rule: Median | Asha) -> None:
    draw = random.Random(seed)
    whole = [[draw.random() for _ in range(8)] for _ in range(6)]
    final = stopped_at(rule, [curve(*values) for values in whole])
    for _ in range(8):
        lengths = [draw.randint(0, 8) for _ in whole]
        partly = [
            curve(*values[:length], ended=length == 8) for values, length in zip(whole, lengths, strict=True)
        ]
        for early, late in zip(stopped_at(rule, partly), final, strict=True):
            assert early in (None, late)
    # Alone, one after another, each as far as it is let: the same.
    alone: list[Curve] = []
    for values, end in zip(whole, final, strict=True):
        alone.append(curve(*values[: end or 8]))
    assert stopped_at(rule, alone) == final
