# SPDX-License-Identifier: Apache-2.0
"""The Lua scripts. Their table of states comes from `lotusguard.rules.seats`: there is one source of the rules."""

from __future__ import annotations

from importlib.resources import files
from types import MappingProxyType

from attrs import fields

from lotusguard.clients.redis.client import Script
from lotusguard.rules.ended_sessions import ENDED_SESSIONS_KEPT
from lotusguard.rules.listings import OVERTAKEN_BY
from lotusguard.rules.room_holds import RECONNECT_WINDOW, RESERVED_PER_USER
from lotusguard.rules.room_seats import CALL_ENDED_AFTER, UNCONFIRMED_KEPT
from lotusguard.rules.seats import TABLE, StateRules

PREFIX = "lotusguard:"
"""Begins the name of every key and channel."""
WAKE_CHANNEL = PREFIX + "wake"
"""Names of rooms in which a request in flight has ended while somebody waited for it."""
IDLE_ROOM, OCCUPIED_ROOM = 600, 86400
"""Seconds after the last change until Redis deletes a room: in which nobody is, and any other."""
WAIT_LONGEST = 30.0
"""Seconds for which somebody may wait for a request in flight."""
LISTING_KEPT = 60.0
"""Seconds for which the time of the last listing of an SFU room is kept although nobody is in it."""
CLOCK_STEP = 0.5
"""Seconds by which the server's clock may be behind the last step; it was set back if it is more."""
NEWS_KEPT = 256
"""Changes of who is an occupant that a room keeps. A guard that knows an older state is told of all occupants."""
ROOM = PREFIX + "seats2"
"""Begins the names of the keys of rooms. The number is that of the format: another one needs another name."""
_ORDERS = ("due", "unconfirmed", "seatless", "ended")
"""The sorted sets of a room; see ``store.lua``."""
_RULES = ("store", "counts", "holds", "rules", "listings", "shared", "questions")
"""The files that a script on a room begins with. Each uses those before it."""

_CONSTANTS = MappingProxyType(
    {
        "RECONNECT_WINDOW": RECONNECT_WINDOW,
        "RESERVED_PER_USER": RESERVED_PER_USER,
        "ENDED_SESSIONS_KEPT": ENDED_SESSIONS_KEPT,
        "OVERTAKEN_BY": OVERTAKEN_BY,
        "UNCONFIRMED_KEPT": UNCONFIRMED_KEPT,
        "CALL_ENDED_AFTER": CALL_ENDED_AFTER,
        "IDLE_ROOM": IDLE_ROOM,
        "OCCUPIED_ROOM": OCCUPIED_ROOM,
        "WAIT_LONGEST": WAIT_LONGEST,
        "LISTING_KEPT": LISTING_KEPT,
        "CLOCK_STEP": CLOCK_STEP,
        "NEWS_KEPT": NEWS_KEPT,
        "WAKE_CHANNEL": WAKE_CHANNEL,
    }
)


def room_key(room_id: str) -> str:
    """The key that a room has for as long as anything is known of it. What is between the braces decides which server
    of a cluster has it.
    """
    return f"{ROOM}:{{{room_id}}}"


def room_keys(room_id: str) -> tuple[str, ...]:
    """All keys of a room, as scripts expect them."""
    return (room_key(room_id), *(f"{ROOM}.{order}:{{{room_id}}}" for order in _ORDERS))


def lua_table() -> str:
    """`TABLE` as Lua: the columns of each state, and its moves; ``false`` ends the hold."""
    rows = (f"  {state.value} = {_row(rules)}," for state, rules in TABLE.items())
    return "local TABLE = {\n" + "\n".join(rows) + "\n}\n"


def _row(rules: StateRules) -> str:
    columns = [
        f"{column.name} = {str(getattr(rules, column.name)).lower()}"
        for column in fields(StateRules)
        if column.name != "moves"
    ]
    moves = ", ".join(
        f"{event.value} = {'false' if after is None else repr(after.value)}" for event, after in rules.moves.items()
    )
    return f"{{{', '.join(columns)}, moves = {{{moves}}}}}"


def with_rules(entry: str) -> Script:
    """A script that begins with the table and the rules. :param entry: Lua that uses ``Seats`` and ``Store``."""
    constants = "".join(
        f"local {name} = {value if not isinstance(value, str) else repr(value)}\n" for name, value in _CONSTANTS.items()
    )
    return Script(constants + lua_table() + "".join(map(lua, _RULES)) + entry)


def lua(name: str) -> str:
    """One of the files beside this one."""
    return files(__package__).joinpath(f"{name}.lua").read_text(encoding="utf-8")


STEP = with_rules(lua("step"))
"""One step on one room; see ``step.lua``."""
