# SPDX-License-Identifier: Apache-2.0
"""What Redis was asked about lately, so that it is not asked again, and what it is being asked now."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime

from lotusguard.clients.waiting import fire_all
from lotusguard.guard.lru import LruCache

ASKED_AGAIN = 10.0
"""Seconds after which Redis is asked again about what it did not know, or about a room's SFU rooms. Guards tell each
other about identities at once, and the SFU rooms in which somebody holds a seat are in the seat book."""
KEPT, KEPT_BYTES = 50_000, 16 << 20


@define(eq=False)
class Questions:
    """Questions by the Redis key they are about."""

    _clock: IReactorTime
    _asked: LruCache[str, float] = field(init=False)
    _running: dict[str, list[Deferred[None]]] = field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        self._asked = LruCache(KEPT, KEPT_BYTES, lambda key, _: (key,))

    def asked_at(self, key: str) -> float | None:
        """When Redis was asked last; ``None`` if that was long ago, or does not count."""
        return self._asked.get(key)

    def note(self, key: str) -> None:
        """Redis is going to be asked."""
        self._asked.put(key, self._clock.seconds())

    def may_ask(self, key: str) -> bool:
        """Whether Redis has not been asked lately. It is going to be."""
        asked = self._asked.get(key)
        if asked is not None and self._clock.seconds() - asked < ASKED_AGAIN:
            return False
        self.note(key)
        return True

    def forget(self, key: str) -> None:
        """The next question is allowed at once."""
        self._asked.discard(key)

    @contextmanager
    def asking(self, keys: Collection[str]) -> Iterator[None]:
        """Redis is being asked. If this is cancelled, it counts as not asked."""
        waiters: list[Deferred[None]] = []
        self._running.update(dict.fromkeys(keys, waiters))
        try:
            yield
        except BaseException:
            for key in keys:
                self.forget(key)
            raise
        finally:
            for key in keys:
                if self._running.get(key) is waiters:
                    del self._running[key]
            fire_all(waiters, None)

    async def wait(self, key: str) -> bool:
        """Wait for the answer to a question that somebody else is asking: an identity must not count as unknown only
        because somebody else was the first to ask. :return: whether there was one."""
        waiters = self._running.get(key)
        if waiters is None:
            return False
        waiter: Deferred[None] = Deferred()  # of its own: cancelling it does not concern the others
        waiters.append(waiter)
        await waiter
        return True
