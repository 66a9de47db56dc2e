# SPDX-License-Identifier: Apache-2.0
"""What ``!call`` answers: the limit, who is in the call, what is forbidden, and what is not enforced now."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence

from attrs import frozen
from twisted.internet.interfaces import IReactorTime

from lotusguard.clients.waiting import Deadline
from lotusguard.guard.rooms.policies import Policies
from lotusguard.guard.seats.book import SeatBook
from lotusguard.rules.permissions import Action
from lotusguard.rules.policy import Policy

LOOKUP_TIMEOUT = 15.0
"""Seconds that a policy may take that has to be looked up."""
USERS_NAMED = 20
"""Users that one notice names."""


@frozen
class CallStatus:
    """Describes a room's call in plain text.

    :param waiting: the users who wait in a room's lobby. :param reasons: what is not enforced now, and why.
    """

    _policies: Policies
    _seats: SeatBook
    _waiting: Callable[[str], Sequence[str]]
    _reasons: Callable[[], Awaitable[Sequence[str]]]
    _clock: IReactorTime

    async def describe(self, room_id: str) -> str:
        known = await self._policies.get(room_id, Deadline.after(self._clock, LOOKUP_TIMEOUT))
        lines = [
            *await self._people(room_id, known.policy.max_users),
            *_rights(known.policy),
            *(f"Not enforced now: {reason}." for reason in await self._reasons()),
        ]
        return "\n".join(lines)

    async def _people(self, room_id: str, limit: int | None) -> list[str]:
        snapshot = await self._seats.snapshot(room_id)
        users = sorted({presence.user for presence in snapshot.present}) if snapshot is not None else []
        awaited = sorted({*snapshot.awaited} - {*users}) if snapshot is not None else []
        taken = snapshot.seats_taken if snapshot is not None else 0
        waiting = self._waiting(room_id)
        return [
            f"Limit: {limit} ({taken} taken)." if limit is not None else "No limit.",
            f"In the call: {names(users)}.",
            *([f"About to join: {names(awaited)}."] if awaited else []),
            *([f"Waiting: {names(waiting)}."] if waiting else []),
        ]


def _rights(policy: Policy) -> Iterator[str]:
    if policy.forbidden:
        yield f"Forbidden: {', '.join(sorted(source.claim for source in policy.forbidden))}."
    if policy.permissions is not None and policy.permissions.needed:
        levels = sorted((action.value, level) for action, level in policy.permissions.needed.items())
        yield "Power levels: " + ", ".join(f"{action} {level}" for action, level in levels) + "."
    if policy.permissions is not None and policy.permissions.users:
        yield (
            "Exceptions: "
            + names(
                [
                    f"{user} ({', '.join(map(_exception, sorted(found.items(), key=str)))})"
                    for user, found in policy.permissions.users.items()
                ]
            )
            + "."
        )
    if policy.lobby is not None:
        yield "Lobby: on."


def names(users: Sequence[str]) -> str:
    """The first `USERS_NAMED` users, and how many more there are."""
    more = len(users) - USERS_NAMED
    named = ", ".join(map(one_line, users[:USERS_NAMED]))
    return (named + (f" and {more} more" if more > 0 else "")) or "nobody"


def one_line(user: str) -> str:
    """A user ID on one line: those of other homeservers may hold any characters."""
    return " ".join(user.split())


def _exception(exception: tuple[Action, bool]) -> str:
    action, allowed = exception
    return action.value if allowed else f"no {action.value}"
