# SPDX-License-Identifier: Apache-2.0
"""When facts that this guard knows are to be read from Redis again, or written to it again."""

from __future__ import annotations

from attrs import define, field
from twisted.internet.interfaces import IReactorTime

from lotusguard.guard.lru import LruCache
from lotusguard.guard.seats.redis.questions import KEPT, KEPT_BYTES, Questions
from lotusguard.guard.seats.registry import REFRESHED


@define(eq=False)
class Freshness:
    """Facts by their Redis keys.

    :param questions: when Redis was asked about them.
    """

    _clock: IReactorTime
    _questions: Questions
    _written: LruCache[str, float] = field(init=False)
    _messages_since: float | None = field(init=False, default=None)
    """When messages of other guards began to arrive; ``None`` if they never did."""
    _data_since: float | None = field(init=False, default=None)
    """When this guard met the data set; ``None`` if it has always been the same."""

    def __attrs_post_init__(self) -> None:
        self._written = LruCache(KEPT, KEPT_BYTES, lambda key, _: (key,))

    def data_set_changed(self) -> None:
        """Redis may have lost what it was given. Facts that are used are written again if they are not there."""
        self._data_since = self._messages_since = self._clock.seconds()

    def messages_began(self) -> None:
        """Messages of other guards arrive from now on. Earlier ones may be lost."""
        self._messages_since = self._clock.seconds()

    def note_written(self, key: str) -> None:
        self._written.put(key, self._clock.seconds())

    def is_to_be_read(self, key: str) -> bool:
        """Whether a message about a known fact may have been lost. If so, Redis is going to be asked."""
        known = max(self._questions.asked_at(key) or 0.0, self._written.get(key) or 0.0)
        if self._messages_since is None or known >= self._messages_since:
            return False
        self._questions.note(key)
        return True

    def is_to_be_written(self, key: str) -> bool:
        """Whether a known fact is to be written again: Redis would delete it as unused, or may have lost it."""
        written, since = self._written.get(key), self._data_since
        if written is None:
            return since is not None
        return self._clock.seconds() - written > REFRESHED or (since is not None and written <= since)
