# SPDX-License-Identifier: Apache-2.0
"""A cache that forgets what was used least recently, limited in entries and in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from sys import getsizeof
from typing import Generic, TypeVar

from attrs import define, field

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

ENTRY_BYTES = 500
"""Bytes of an entry besides its texts: the place in the dictionary, the tuple, the object and its numbers."""


@define(eq=False)
class LruCache(Generic[K, V]):
    """
    :param limit: the most entries. :param byte_limit: the most bytes, as `text_bytes` and `ENTRY_BYTES` count them.
    :param texts: the texts that an entry keeps alive.
    :param evicted: called with each entry that is dropped because of a limit.
    """

    limit: int
    byte_limit: int
    _texts: Callable[[K, V], tuple[str, ...]]
    _evicted: Callable[[K, V], None] = lambda key, value: None
    _entries: OrderedDict[K, V] = field(init=False, repr=False, factory=OrderedDict)
    size: int = field(init=False, default=0)
    """Bytes that the entries take."""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[K]:
        return iter(self._entries)

    def get(self, key: K) -> V | None:
        """The value, which counts as unused: `touch` says otherwise."""
        return self._entries.get(key)

    def touch(self, key: K) -> None:
        """The entry was used just now."""
        self._entries.move_to_end(key)

    def put(self, key: K, value: V) -> None:
        """Add or replace an entry, and drop the least recently used ones beyond the limits."""
        self.discard(key)
        self._entries[key] = value
        self.size += self._cost(key, value)
        while len(self._entries) > self.limit or (self.size > self.byte_limit and len(self._entries) > 1):
            oldest, dropped = self._entries.popitem(last=False)
            self.size -= self._cost(oldest, dropped)
            self._evicted(oldest, dropped)

    def discard(self, key: K) -> None:
        """Remove an entry, if it is there."""
        if key in self._entries:
            self.size -= self._cost(key, self._entries.pop(key))

    def _cost(self, key: K, value: V) -> int:
        return ENTRY_BYTES + text_bytes(self._texts(key, value))


def text_bytes(texts: tuple[str, ...]) -> int:
    """Bytes that texts take in memory. A name of 255 bytes takes 300 bytes, or 1.1 kB if it holds an emoji."""
    return sum(map(getsizeof, texts))
