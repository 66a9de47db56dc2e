# SPDX-License-Identifier: Apache-2.0
"""Lists of homeservers: names and globs that an operator configures."""

from __future__ import annotations

import re
from typing import Self

from attrs import field, frozen

from lotusguard.rules.identity import server_of

_PATTERN = re.compile(r"[A-Za-z0-9.\-_:*?]+|\[[0-9A-Fa-f.:*?]+\](:[0-9*?]+)?")
LONGEST_PATTERN = 255


def _as_regex(patterns: frozenset[str]) -> re.Pattern[str]:
    alternatives = "|".join(_glob(pattern) for pattern in sorted(patterns))
    return re.compile(alternatives, re.IGNORECASE | re.ASCII | re.DOTALL)


def _glob(pattern: str) -> str:
    """A glob as a regular expression. The part between two stars is matched as early as it occurs, atomically, so
    that many stars do not lead to much backtracking."""
    head, *others = (re.escape(part).replace(r"\?", ".") for part in re.split(r"\*+", pattern))
    if not others:
        return head
    *middle, tail = others
    return head + "".join(f"(?>.*?{part})" for part in middle) + ".*" + tail


@frozen
class HomeserverList:
    """Homeservers whose users may do something.

    A pattern is compared with the whole server name, without case: ``*`` stands for any characters, ``?`` for one.
    The port belongs to the name. ``example.org`` is not ``example.org:8448``: that is another homeserver, perhaps of
    somebody else. ``example.org*`` is both, but also ``example.org.evil.net``; ``example.org:*`` is every port.

    :ivar patterns: names and globs, in lower case.
    """

    patterns: frozenset[str]
    _regex: re.Pattern[str] = field(init=False, repr=False, eq=False)

    @_regex.default
    def _compile(self) -> re.Pattern[str]:
        return _as_regex(self.patterns)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a comma-separated list.

        :raises ValueError: it is empty, or an entry cannot be part of a server name. The text says which and why.
        """
        entries = [entry.strip() for entry in text.split(",")]
        patterns = [entry for entry in entries if entry]
        if not patterns:
            raise ValueError('no homeserver is named; "*" allows all')
        for pattern in patterns:
            if len(pattern) > LONGEST_PATTERN or not _PATTERN.fullmatch(pattern):
                raise ValueError(f"{pattern[:60]!r} is not a server name or glob, such as example.org or *.example.org")
        return cls(frozenset(pattern.lower() for pattern in patterns))

    @property
    def allows_all(self) -> bool:
        """Whether every homeserver is allowed, so that nothing needs to be checked."""
        return any(pattern.strip("*") == "" for pattern in self.patterns)

    def allows(self, server_name: str) -> bool:
        """Whether a homeserver is on the list."""
        return self._regex.fullmatch(server_name) is not None

    def allows_user(self, user: str) -> bool:
        """Whether a Matrix user's homeserver is on the list."""
        return self.allows(server_of(user))


ALL_HOMESERVERS = HomeserverList(frozenset({"*"}))
