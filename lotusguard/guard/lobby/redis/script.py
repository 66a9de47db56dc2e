# SPDX-License-Identifier: Apache-2.0
"""The Lua script of the shared lobby. Its table comes from `lotusguard.rules.lobby`, the one source of the rules."""

from __future__ import annotations

from importlib.resources import files
from types import MappingProxyType

from lotusguard.clients.redis.client import Script
from lotusguard.guard.seats.redis.scripts import PREFIX
from lotusguard.rules import lobby_book
from lotusguard.rules.lobby import BEGINS, DROPPED_FIRST, HELD_LEASE, TABLE, LobbyState, StateRules

BASE = PREFIX + "{lobby}"
"""Begins the names of all keys of the lobby. They have one hash tag: people who wait are counted over all rooms."""
CHANNEL = PREFIX + "lobby"
"""Changes of lobby entries: JSON [guard, version, changes]."""
KEPT = 86_400
"""Seconds after which Redis deletes a room's entries to which nothing happened. By the rules they end long before."""
ROOMS_AT_ONCE = 100
"""Rooms whose entries are read with one script."""


def lobby_script() -> Script:
    """See ``lobby.lua``."""
    constants = MappingProxyType(
        {
            "WAITING_PER_ROOM": lobby_book.WAITING_PER_ROOM,
            "WAITING_PER_USER": lobby_book.WAITING_PER_USER,
            "WAITING_IN_ALL": lobby_book.WAITING_IN_ALL,
            "WAITING_FOR_OTHER_SERVERS": lobby_book.WAITING_FOR_OTHER_SERVERS,
            "ENTRIES_KEPT": lobby_book.ENTRIES_KEPT,
            "DROPPED_AT_ONCE": lobby_book.DROPPED_AT_ONCE,
            "HELD_LEASE": HELD_LEASE,
            "KEPT": KEPT,
            "ROOMS_AT_ONCE": ROOMS_AT_ONCE,
            "CHANNEL": CHANNEL,
        }
    )
    lines = [
        f"local {name} = {value if not isinstance(value, str) else repr(value)}" for name, value in constants.items()
    ]
    begins = ", ".join(f"{event.value} = {state.value!r}" for event, state in BEGINS.items())
    rows = "\n".join(f"  {state.value} = {_row(state, rules)}," for state, rules in TABLE.items())
    lines += [f"local BEGINS = {{{begins}}}", f"local TABLE = {{\n{rows}\n}}"]
    text = files(__package__).joinpath("lobby.lua").read_text(encoding="utf-8")
    return Script("\n".join(lines) + "\n" + text)


def _row(state: LobbyState, rules: StateRules) -> str:
    moves = ", ".join(
        f"{event.value} = {'false' if after is None else repr(after.value)}" for event, after in rules.moves.items()
    )
    rank = DROPPED_FIRST.index(state) if state in DROPPED_FIRST else len(DROPPED_FIRST)
    return f"{{lifetime = {rules.lifetime}, rank = {rank}, moves = {{{moves}}}}}"
