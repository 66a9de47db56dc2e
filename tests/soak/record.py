# SPDX-License-Identifier: Apache-2.0
"""The record of a soak: who asked, who is in which call, who may be. No sockets, no clock."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable

from attrs import Factory, define

from lotusguard.rules.policy import NO_POLICY, Policy
from tests.soak.history import Disturbances, History

STATE_AGE, SEAT_TTL, TOKEN_TTL = 2.0, 5.0, 20.0
"""The guard's settings in a soak; the first is how long it believes policies and memberships."""
RECONNECT = 20.0
"""Seconds for which the guard keeps the seat of a session whose end it was not told of."""
LATE_WEBHOOKS = ("guard", "killed", "redis", "livekit", "processors")
"""Faults in which guards may act late on a webhook that they have answered, or not at all."""
REMEMBERED = 60.0
WRITTEN = 1.5
"""Seconds after which what was learnt from a token has to survive ``kill -9``."""


@define(eq=False)
class Ask:
    """A request for a token; what is known of its answer.

    :ivar limited: a token was issued while there certainly was a limit, so that a seat is held.
    :ivar lost: there was no answer; a token may have been issued nevertheless.
    :ivar renewed: the user had an unused token already, so that it is not certain until when the seat is held.
    """

    room_id: str
    user: str
    request_id: str
    began: float
    renewed: bool = False
    ended: float | None = None
    issued: bool = False
    lost: bool = False
    limited: bool = False
    arrived: bool = False


@define(eq=False)
class Stay:
    """A session in a call; ``connected`` tells whether it is still in the SFU room.

    :ivar told: when a guard had answered the webhook that says that it ended.
    """

    ask: Ask
    began: float
    connected: Callable[[], bool]
    ended: float | None = None
    told: float | None = None


@define
class Record:
    """All requests, sessions, policies, memberships and faults."""

    policies: dict[str, History[Policy]] = Factory(lambda: defaultdict(lambda: History(NO_POLICY)))
    members: dict[tuple[str, str], History[bool]] = Factory(lambda: defaultdict(lambda: History(True)))
    disturbances: Disturbances = Factory(Disturbances)
    asks: dict[str, deque[Ask]] = Factory(lambda: defaultdict(deque))
    stays: dict[str, deque[Stay]] = Factory(lambda: defaultdict(deque))

    # -- what happens ------------------------------------------------------------------------------------

    def asked(self, room_id: str, user: str, request_id: str, now: float) -> Ask:
        renewed = any(
            other.user == user and not other.arrived and (other.ended is None or other.ended > now - SEAT_TTL - 2)
            for other in self.asks[room_id]
        )
        ask = Ask(room_id, user, request_id, now, renewed)
        self.asks[room_id].append(ask)
        return ask

    def arrived(self, ask: Ask, now: float, connected: Callable[[], bool]) -> Stay:
        stay = Stay(ask, now, connected)
        ask.arrived = True
        self.stays[ask.room_id].append(stay)
        return stay

    def told(self, stay: Stay, now: float) -> None:
        """A guard has answered the webhook that says that a session ended."""
        stay.told = now

    def prune(self, now: float) -> None:
        """Forget what no judgement needs any more."""
        old = now - REMEMBERED
        for asks in self.asks.values():
            while asks and asks[0].ended is not None and asks[0].ended < old:
                asks.popleft()
        for room_id, stays in self.stays.items():
            self.stays[room_id] = deque(stay for stay in stays if stay.ended is None or stay.ended > old)

    # -- what is known -----------------------------------------------------------------------------------

    def policies_between(self, room_id: str, began: float, now: float) -> list[Policy]:
        """All policies that the guard may have gone by."""
        return self.policies[room_id].between(self.disturbances.oldest_knowledge(began, now, STATE_AGE + 1), now)

    def memberships_between(self, room_id: str, user: str, began: float, now: float) -> list[bool]:
        """Whether the user was a member, as far as the guard may have gone by it."""
        oldest = self.disturbances.oldest_knowledge(began, now, STATE_AGE + 1)
        return self.members[room_id, user].between(oldest, now)

    def was_always_entitled(self, room_id: str, user: str, began: float, now: float) -> bool:
        """Whether the user was a member, and their level sufficed to join, whatever the guard went by."""
        return all(self.memberships_between(room_id, user, began, now)) and all(
            policy.may_join(user) for policy in self.policies_between(room_id, began, now)
        )

    def forgotten(self, ask: Ask) -> bool:
        """Whether a ``kill -9`` came before what the answer taught had to be on disk.

        Or whether each guard went on alone while a seat was held for the token: other guards do not know of it.
        """
        learnt = ask.began if ask.ended is None else ask.ended
        return self.disturbances.began_between(ask.began, learnt + WRITTEN, "killed") or self.disturbances.any_between(
            ask.began, learnt + SEAT_TTL, "redis"
        )

    def connected(self, room_id: str) -> list[Stay]:
        return [stay for stay in self.stays[room_id] if stay.ended is None and stay.connected()]

    def arrived_in_time(self, stay: Stay) -> bool:
        """Whether a seat certainly was held when a session began.

        The guard counts from when it issued the token; on a busy machine the user gets it later than that.
        """
        ask = stay.ask
        if not ask.limited or ask.ended is None:
            return False
        return stay.began < min(ask.ended - 1, ask.began) + SEAT_TTL

    def owns_seat(self, stay: Stay) -> bool:
        """Whether a session arrived while a seat was certainly held for it."""
        return self.arrived_in_time(stay) and not stay.ask.renewed

    def holders(self, room_id: str, began: float, now: float) -> set[str]:
        """Users who certainly held a seat from ``began`` to ``now``."""
        present = {s.ask.user for s in self.connected(room_id) if s.began < began - 0.5 and self.owns_seat(s)}
        return present | {ask.user for ask in self.asks[room_id] if self.has_hold(ask, began, now)}

    def has_hold(self, ask: Ask, began: float, now: float) -> bool:
        """Whether a seat was certainly held from ``began`` to ``now`` for the issued token, which was not used.

        Nothing is held for users who were in the call when they asked, or arrived with another token.
        """
        held = ask.ended is not None and ask.ended < began and min(ask.ended - 1, ask.began) + SEAT_TTL > now
        certain = held and ask.limited and not ask.renewed and not self.forgotten(ask)
        if not certain or not self.was_always_entitled(ask.room_id, ask.user, ask.began, now):
            return False
        return not any(
            stay.ask.user == ask.user and (stay.ended is None or stay.ended > ask.began - 2)
            for stay in self.stays[ask.room_id]
        )

    def _seat_is_free_from(self, stay: Stay) -> float:
        """The latest time at which the guard may still have kept the seat of a session that ended.

        LiveKit sends the webhooks of a room one after the other. Before the one about this session has come, a guard
        sees in a listing that the session is gone, and has to take it for one that was lost and may come back.
        """
        assert stay.ended is not None
        never_told = stay.ended + RECONNECT + 5
        if stay.told is None or self.disturbances.any_between(stay.ended - 1, stay.told + 10, *LATE_WEBHOOKS):
            return never_told
        return min(max(stay.ended, stay.told) + 2, never_told)

    def possible_holders(self, this: Ask, now: float) -> set[str]:
        """Users who may have held a seat at some time during this request, if only for another request."""
        present = {
            s.ask.user for s in self.stays[this.room_id] if s.ended is None or self._seat_is_free_from(s) > this.began
        }
        return present | {
            ask.user
            for ask in self.asks[this.room_id]
            if ask is not this
            and (ask.ended is None or ask.ended + (SEAT_TTL + 2) * (ask.issued or ask.lost) > this.began - 2)
        }
