# SPDX-License-Identifier: Apache-2.0
"""One run of the benchmarks: what scenarios measure with, and where they record it."""

from __future__ import annotations

from collections.abc import Callable

from attrs import define

from benchmarks.figures import Figure
from benchmarks.load import Load, Outcome
from benchmarks.processes import Callers, Dependencies, Subject

MS = 1000.0
Say = Callable[[str], None]


@define
class Bench:
    """
    :param rounds: how often each scenario is repeated.
    :param joins: of one load. :param crowd: callers at once.
    :ivar figures: those so far.
    """

    dependencies: Dependencies
    callers: Callers
    rounds: int
    joins: int
    crowd: int
    say: Say
    figures: list[Figure]

    @property
    def long_rounds(self) -> int:
        """How often a scenario is repeated of which one round takes long."""
        return max(1, self.rounds // 2)

    def figure(self, name: str, unit: str, aim: float | None = None, digits: int = 2) -> Figure:
        figure = Figure(name, unit, aim=aim, digits=digits)
        self.figures.append(figure)
        return figure

    def load(self, subject: Subject, callers: int, requests: int, **how: object) -> Outcome:
        """Make a load. :raises RuntimeError: not every caller got a token."""
        outcome = self.callers.make(Load(subject.port, callers, requests, **how))  # type: ignore[arg-type]
        if outcome.statuses != {"200": requests}:
            raise RuntimeError(f"{subject.name}: {outcome.statuses}")
        return outcome
