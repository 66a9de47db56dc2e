# SPDX-License-Identifier: Apache-2.0
"""Calls in which nothing was left to do. As long as nothing changes there, the next passes need not look at anybody."""

from __future__ import annotations

from attrs import define, field, frozen

from lotusguard.rules.policy import Policy


@frozen
class Basis:
    """What a pass is based on.

    :ivar news: the number of its listing; see `Roster.last_news`.
    :ivar departures: see `Members.departures`.
    """

    policy: Policy
    news: int | None
    departures: int


@frozen
class _Settled:
    """:ivar until: when time alone may lead to something that has to be done."""

    basis: Basis
    until: float


@define(eq=False)
class SettledCalls:
    """Remembers the last pass over each SFU room, if it was complete and found nothing to do."""

    _settled: dict[str, _Settled] = field(factory=dict, init=False)
    _running: set[str] = field(factory=set, init=False)

    def holds(self, alias: str, basis: Basis, now: float) -> bool:
        """Whether another pass would find nothing to do either. If not, the last one is forgotten."""
        known = self._settled.get(alias)
        if known is not None and known.basis == basis and now < known.until:
            return True
        self._settled.pop(alias, None)
        return False

    def begin(self, alias: str) -> None:
        """A pass begins."""
        self._running.add(alias)

    def settle(self, alias: str, basis: Basis, until: float) -> None:
        """The pass found nothing to do. Ignored if the SFU room was forgotten since the pass began."""
        if alias in self._running and basis.news is not None:
            self._settled[alias] = _Settled(basis, until)

    def end(self, alias: str) -> None:
        """The pass is over, whatever became of it."""
        self._running.discard(alias)

    def forget(self, alias: str) -> None:
        """Something has changed, or nobody is there any more: what is remembered, and a pass that is running, do not
        count."""
        self._settled.pop(alias, None)
        self._running.discard(alias)

    def forget_all(self) -> None:
        """The same, for all SFU rooms."""
        self._settled.clear()
        self._running.clear()
