# SPDX-License-Identifier: Apache-2.0
"""SFU rooms we never issued a token for: looked for among the homeserver's rooms by hashing IDs. Floor: guard."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.synapse import SynapseClient
from lotusguard.clients.waiting import run_in_background
from lotusguard.guard.seats.registry import Slot, TokenRegistry
from lotusguard.metrics import Metrics
from lotusguard.rules.identity import ROOM_SLOT, room_alias

log = Logger()

MOST_ROOMS = 200_000
NOT_AGAIN = 3600.0
"""Seconds for which an alias that was not found is not looked for again."""
WANTED_KEPT = 5_000
Found = Callable[[str], None]


class Discovery:
    """Finds the Matrix room behind an alias, in the background, for those slots whose name is known."""

    def __init__(
        self, homeserver: SynapseClient | None, registry: TokenRegistry, clock: IReactorTime, metrics: Metrics
    ) -> None:
        self._homeserver = homeserver
        self._registry = registry
        self._clock = clock
        self._wanted: dict[str, Found] = {}
        self._sought: dict[str, Found] = {}
        self._not_found: OrderedDict[str, float] = OrderedDict()
        self._search: Deferred[object] | None = None
        metrics.cache_limit.labels("unknown_aliases").set(WANTED_KEPT)
        metrics.cache_entries.labels("unknown_aliases").set_function(lambda: len(self._not_found))

    def want(self, alias: str, found: Found) -> None:
        """Look for this alias if it was not looked for lately. Returns at once.

        :param found: called with the alias when the registry knows it.
        """
        if self._homeserver is None or not self._homeserver.well:
            return
        if self._clock.seconds() - self._not_found.get(alias, float("-inf")) < NOT_AGAIN:
            return
        if alias not in self._sought and len(self._wanted) < WANTED_KEPT:
            self._wanted[alias] = found
        if self._search is None:
            self._search = run_in_background(
                self._searched(self._homeserver), lambda failure: log.failure("looking for SFU rooms failed", failure)
            )

    async def _searched(self, homeserver: SynapseClient) -> None:
        try:
            await deferLater(self._clock, 0)  # a round asks for several: one search for all of them
            # What is wanted while this runs may have been passed by already: it waits for the next search.
            while self._wanted:
                wanted, self._wanted = self._wanted, {}
                self._sought = wanted
                async for room_id in homeserver.room_ids(MOST_ROOMS):
                    for alias in (room_alias(room_id, ROOM_SLOT), room_id):  # old releases named the room itself
                        if alias in wanted:
                            found = wanted.pop(alias)
                            await self._registry.learn_alias(alias, Slot(room_id, ROOM_SLOT))
                            log.info(
                                "SFU room {alias} is {room_id}", alias=alias, room_id=room_id, event_name="discovered"
                            )
                            found(alias)
                    if not wanted:
                        break
                for alias in wanted:
                    self._not_found[alias] = self._clock.seconds()
                    self._not_found.move_to_end(alias)
                while len(self._not_found) > WANTED_KEPT:
                    self._not_found.popitem(last=False)
        except DependencyFailed as failed:
            log.warn("looking for SFU rooms stopped: {reason}", reason=failed.reason, event_name="discovery_failed")
        finally:
            self._sought = {}
            self._search = None

    def stop(self) -> None:
        """Look no further."""
        if self._search is not None:
            self._search.cancel()
