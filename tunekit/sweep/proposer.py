"""Optuna, which proposes trials by what came of those before."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tunekit.errors import require
from tunekit.sweep.space import Axis

TRIES = 20
"""Proposals that were there already, until there is nothing new."""


class Proposer:
    """Asks optuna's TPE sampler; its memory is the list of trials, so there is nothing to keep of it.

    Args:
        axes: what is varied.
        seed: of its draws.
        larger: whether more is better.

    Raises:
        MissingPackageError: optuna is not installed.
    """

    def __init__(self, axes: Sequence[Axis], seed: int, *, larger: bool) -> None:
        self._optuna: Any = require("optuna", extra="sweep", why="proposer: optuna needs")
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        self._axes, self._seed, self._larger = axes, seed, larger
        self._space = {axis.key: self._distribution(axis) for axis in axes}

    def _distribution(self, axis: Axis) -> Any:
        kinds = self._optuna.distributions
        if axis.values:
            return kinds.CategoricalDistribution([json.dumps(value) for value in axis.values])
        log = axis.kind == "loguniform"
        if axis.whole:
            return kinds.IntDistribution(int(axis.low), int(axis.high), log=log)
        return kinds.FloatDistribution(axis.low, axis.high, log=log)

    def ask(self, known: Sequence[tuple[dict[str, Any], float | None, bool]]) -> dict[str, Any] | None:
        """The values of one more trial, or None if there is nothing new to try.

        Args:
            known: of each trial before: its values, its figure, and whether that is its last.
        """
        seen = {json.dumps(values) for values, _, _ in known}
        for attempt in range(TRIES):
            values = self._ask(known, attempt)
            if json.dumps(values) not in seen:
                return values
        return None

    def _ask(
        self, known: Sequence[tuple[dict[str, Any], float | None, bool]], attempt: int
    ) -> dict[str, Any]:
        sampler = self._optuna.samplers.TPESampler(seed=(self._seed + 1000 * len(known) + attempt) % 2**32)
        direction = "maximize" if self._larger else "minimize"
        study = self._optuna.create_study(sampler=sampler, direction=direction)
        state = self._optuna.trial.TrialState
        for values, figure, over in known:
            whole = over and figure is not None
            params = {
                axis.key: json.dumps(values[axis.key]) if axis.values else values[axis.key]
                for axis in self._axes
            }
            study.add_trial(
                self._optuna.trial.create_trial(
                    params=params,
                    distributions=self._space,
                    value=figure if whole else None,
                    state=state.COMPLETE if whole else state.FAIL if over else state.RUNNING,
                )
            )
        asked = study.ask(self._space).params
        return {axis.key: self._value(axis, asked[axis.key]) for axis in self._axes}

    def _value(self, axis: Axis, value: Any) -> Any:
        if axis.values:
            return json.loads(value)
        if axis.whole:
            return int(value)
        return min(axis.high, max(axis.low, float(f"{value:.3g}")))
