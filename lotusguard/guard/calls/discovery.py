# SPDX-License-Identifier: Apache-2.0
"""Finds the Matrix room of an SFU room that we issued no token for, by hashing the IDs of the homeserver's rooms."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from attrs import define, field
from twisted.internet.defer import CancelledError, Deferred
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
"""Rooms of the homeserver that one search looks at."""
NOT_AGAIN = 3600.0
"""Seconds for which an alias that was not found is not searched for again."""
ALIASES_KEPT = 5_000
"""Aliases that may wait for a search, and that are remembered as not found."""
LONGEST_ALIAS = 255
"""Bytes; longer names are not ours."""
REST = 20.0
"""After a search, the next one waits this many times as long as the search took."""
FIRST_BACKOFF, LONGEST_BACKOFF = 10.0, 600.0
"""Seconds until the next search after a failed one; doubled with each failure in a row."""
Found = Callable[[str], None]


@define(eq=False)
class Discovery:
    """Searches in the background, for slots with a well-known name.

    Only one search runs at a time; what is wanted in the meantime waits for the next one.

    :param homeserver: a client with a `Dependency` of its own: listing rooms may be slow, and must not open the circuit
        that joins rely on.
    """

    _homeserver: SynapseClient | None
    _registry: TokenRegistry
    _clock: IReactorTime
    _metrics: Metrics
    _wanted: dict[str, Found] = field(init=False, factory=dict)
    _sought: dict[str, Found] = field(init=False, factory=dict)
    _not_found: OrderedDict[str, float] = field(init=False, factory=OrderedDict)
    _search: Deferred[object] | None = field(init=False, default=None)
    _failures: int = field(init=False, default=0)
    _not_before: float = field(init=False, default=0.0)

    def __attrs_post_init__(self) -> None:
        self._metrics.cache_limit.labels("unknown_aliases").set(ALIASES_KEPT)
        self._metrics.cache_entries.labels("unknown_aliases").set_function(lambda: len(self._not_found))

    def want(self, alias: str, found: Found) -> None:
        """Search for this alias, unless a recent search did not find it. Returns at once.

        :param found: called with the alias once the registry knows it.
        """
        homeserver, now = self._homeserver, self._clock.seconds()
        if homeserver is None or not homeserver.available or now < self._not_before:
            return
        if len(alias.encode("utf-8", "replace")) > LONGEST_ALIAS:
            return
        not_found_at = self._not_found.get(alias)
        if not_found_at is not None and now - not_found_at < NOT_AGAIN:
            return
        if alias not in self._sought and len(self._wanted) < ALIASES_KEPT:
            self._wanted[alias] = found
        if self._search is None:
            self._search = run_in_background(
                self._search_while_wanted(homeserver),
                lambda failure: log.failure("searching for SFU rooms failed", failure),
            )

    async def _search_while_wanted(self, homeserver: SynapseClient) -> None:
        try:
            await deferLater(self._clock, 0)  # a reconciling round wants several aliases: one search for all of them
            while self._wanted:
                began = self._clock.seconds()
                await self._search_once(homeserver)
                self._failures = 0
                rest = REST * (self._clock.seconds() - began)
                if rest > 0:
                    await deferLater(self._clock, rest)
        except CancelledError:
            raise
        except DependencyFailed as failed:
            self._back_off(failed.reason)
        except Exception:
            self._back_off("internal_error")
            raise
        finally:
            self._sought = {}
            self._search = None

    def _back_off(self, reason: str) -> None:
        backoff = min(FIRST_BACKOFF * 2**self._failures, LONGEST_BACKOFF)
        self._failures += 1
        self._not_before = self._clock.seconds() + backoff
        log.warn(
            "searching for SFU rooms failed ({reason}); next search in {backoff} s at the earliest",
            reason=reason, backoff=round(backoff), event_name="discovery_failed",
        )  # fmt: skip

    async def _search_once(self, homeserver: SynapseClient) -> None:
        """Look at all rooms for what is wanted now."""
        sought, self._wanted = self._wanted, {}
        self._sought = sought
        async for room_id in homeserver.room_ids(MOST_ROOMS):
            for alias in (room_alias(room_id, ROOM_SLOT), room_id):  # old releases use the room ID as the name
                if alias in sought:
                    found = sought.pop(alias)
                    await self._registry.learn_alias(alias, Slot(room_id, ROOM_SLOT))
                    log.info("SFU room {alias} is {room_id}", alias=alias, room_id=room_id, event_name="discovered")
                    found(alias)
            if not sought:
                break
        self._sought = {}
        for alias in sought:
            self._not_found[alias] = self._clock.seconds()
            self._not_found.move_to_end(alias)
        while len(self._not_found) > ALIASES_KEPT:
            self._not_found.popitem(last=False)

    def stop(self) -> None:
        """Stop searching."""
        if self._search is not None:
            self._search.cancel()
