# SPDX-License-Identifier: Apache-2.0
"""When each SFU room of a Matrix room was listed last, and whether that listing told anything new."""

from __future__ import annotations

from collections.abc import Container, Iterable

from attrs import define, field

OVERTAKEN_BY = 2.0
"""An arrival that is told of late tells nothing if the last listing began so many seconds after it, or more: either it
showed the participant, or they have left since. Clocks may differ a little."""


@define
class Listings:
    """The last listing of each SFU room. A listing is named by the time at which it began."""

    _since: dict[str, float] = field(factory=dict, init=False)
    _settled: dict[str, int] = field(factory=dict, init=False)

    def __contains__(self, alias: str) -> bool:
        return alias in self._since

    def oldest(self, aliases: Iterable[str]) -> float | None:
        """When the oldest of the last listings of these SFU rooms began; ``None`` if one was never listed."""
        oldest: float | None = None
        for alias in aliases:
            since = self._since.get(alias)
            if since is None:
                return None
            oldest = since if oldest is None else min(oldest, since)
        return oldest

    def overtook(self, alias: str, since: float) -> bool:
        """Whether a later listing than this one was applied."""
        return since < self._since.get(alias, since)

    def overtook_arrival(self, alias: str, joined: float) -> bool:
        """Whether the last listing shows what became of somebody who joined then."""
        return self._since.get(alias, joined) >= joined + OVERTAKEN_BY

    def note(self, alias: str, since: float) -> None:
        """A listing is being applied that none overtook."""
        self._since[alias] = since

    def settle(self, alias: str, version: int) -> None:
        """The last listing told nothing new, and nothing depends on the next one.

        :param version: `RoomHolds.version`; a listing that shows the same tells nothing as long as it stays.
        """
        self._settled[alias] = version

    def unsettle(self, alias: str) -> None:
        """The next listing has to be applied, whatever it shows."""
        self._settled.pop(alias, None)

    def is_settled(self, alias: str, version: int) -> bool:
        return self._settled.get(alias) == version

    def forget_others(self, aliases: Container[str]) -> None:
        """Keep only what is known of these SFU rooms."""
        self._since = {alias: since for alias, since in self._since.items() if alias in aliases}
        self._settled = {alias: version for alias, version in self._settled.items() if alias in self._since}
