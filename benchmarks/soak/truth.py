# SPDX-License-Identifier: Apache-2.0
"""What really happened in a soak, and what the guard may be blamed for. No sockets, no clock. Benchmarks.

The soak plays all clients, so it knows who is in which room. Each judgement leaves out what news still under way, a
dependency that is ill, or a policy just changed could explain; what is left over is a fault of the guard.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

from attrs import Factory, define, frozen

from lotusguard.rules.policy import NO_POLICY, Policy
from lotusguard.rules.sources import Source
from lotusguard.rules.tokens import granted_sources

POLICY_TTL, SEAT_TTL, TOKEN_TTL = 2.0, 5.0, 20.0
"""The guard's settings in a soak."""
RECOVERY = 8.0
"""Seconds after a fault in which its consequences are excused: a probe, a round of reconciling, a time-out."""
HEALED = 4.0
"""Seconds after a fault from which forbidden tracks are timed: by then a probe went through and a round began."""
REMEMBERED = 60.0
WRITTEN = 1.5
"""Seconds after which what was learnt from a token has to survive ``kill -9``."""


@define(eq=False)
class Disturbance:
    """Something that was done to the guard or a dependency (synapse, livekit, upstream, guard, killed)."""

    who: str
    began: float
    ended: float | None = None


@define(eq=False)
class Ask:
    """A request for a token; what is known of its answer."""

    room_id: str
    user: str
    request_id: str
    began: float
    ended: float | None = None
    issued: bool = False
    capped: bool = False
    """let in while there was a cap for sure, so that a seat is kept"""
    arrived: bool = False


@define(eq=False)
class Stay:
    """A session in a call; ``connected`` tells whether the SFU has it still."""

    ask: Ask
    began: float
    connected: Callable[[], bool]
    ended: float | None = None


@frozen
class Suspicion:
    """What looks like a fault, unless the guard said that it could not enforce just this request."""

    what: str
    request_id: str
    detail: str


@define
class Truth:
    """The book of a soak."""

    policies: dict[str, list[tuple[float, Policy]]] = Factory(dict)
    disturbances: deque[Disturbance] = Factory(deque)
    asks: dict[str, deque[Ask]] = Factory(lambda: defaultdict(deque))
    stays: dict[str, deque[Stay]] = Factory(lambda: defaultdict(deque))
    suspicions: list[Suspicion] = Factory(list)
    counts: Counter[str] = Factory(Counter)
    longest: dict[str, float] = Factory(lambda: defaultdict(float))

    # -- what happens ------------------------------------------------------------------------------------

    def policy_is(self, room_id: str, policy: Policy, now: float) -> None:
        self.policies.setdefault(room_id, []).append((now, policy))

    def asked(self, room_id: str, user: str, request_id: str, now: float) -> Ask:
        ask = Ask(room_id, user, request_id, now)
        self.asks[room_id].append(ask)
        return ask

    def came(self, ask: Ask, now: float, connected: Callable[[], bool]) -> Stay:
        stay = Stay(ask, now, connected)
        ask.arrived = True
        self.stays[ask.room_id].append(stay)
        return stay

    def prune(self, now: float) -> None:
        """Forget what no judgement will look at any more."""
        old = now - REMEMBERED
        for asks in self.asks.values():
            while asks and asks[0].ended is not None and asks[0].ended < old:
                asks.popleft()
        for room_id, stays in self.stays.items():
            self.stays[room_id] = deque(stay for stay in stays if stay.ended is None or stay.ended > old)

    # -- what is known -----------------------------------------------------------------------------------

    def disturbed(self, since: float, until: float, *who: str) -> bool:
        """Whether anything was wrong (with one of these) in that time, or shortly before."""
        return any(
            d.began <= until and (d.ended is None or d.ended >= since - RECOVERY)
            for d in self.disturbances
            if not who or d.who in who
        )

    def quiet_since(self, now: float) -> float:
        """Since when nothing is wrong; ``now`` when something is."""
        return max((now if d.ended is None else d.ended for d in self.disturbances), default=0.0)

    def policies_between(self, room_id: str, began: float, now: float) -> list[Policy]:
        """All policies that the guard may have gone by."""
        start = began - POLICY_TTL - 1
        for d in reversed(self.disturbances):  # what was last known serves meanwhile
            if d.who == "synapse" and d.began <= now and (d.ended is None or d.ended >= start - RECOVERY):
                start = min(start, d.began - POLICY_TTL - 1)
        changes = self.policies[room_id]
        before = [policy for at, policy in changes if at <= start]
        return [*(before[-1:] or [NO_POLICY]), *(policy for at, policy in changes if start < at <= now)]

    def forgotten(self, ask: Ask) -> bool:
        """Whether a ``kill -9`` came before what the answer taught had to be on disk."""
        learnt = ask.began if ask.ended is None else ask.ended
        return any(d.who == "killed" and ask.began <= d.began <= learnt + WRITTEN for d in self.disturbances)

    def _there(self, room_id: str) -> list[Stay]:
        return [stay for stay in self.stays[room_id] if stay.ended is None and stay.connected()]

    def _holders(self, room_id: str, began: float, now: float) -> set[str]:
        """Users who certainly held a seat from ``began`` to ``now``."""
        present = {s.ask.user for s in self._there(room_id) if s.began < began - 0.5 and self.entitled(s)}
        return present | {ask.user for ask in self.asks[room_id] if self._awaited(ask, began, now)}

    def _awaited(self, ask: Ask, began: float, now: float) -> bool:
        """Whether a seat was certainly kept from ``began`` to ``now`` for who was given this token and did not come.

        Who was in the call when they asked, or came in by another token, has nothing left to arrive for.
        """
        kept = ask.ended is not None and ask.ended < began and ask.ended + SEAT_TTL > now + 1
        return kept and ask.capped and not self.forgotten(ask) and not any(
            stay.ask.user == ask.user and (stay.ended is None or stay.ended > ask.began - 2)
            for stay in self.stays[ask.room_id]
        )  # fmt: skip

    def _perhaps_holders(self, this: Ask, now: float) -> set[str]:
        """Users who may have held a seat at some time while this was asked, if only for another request."""
        present = {s.ask.user for s in self.stays[this.room_id] if s.ended is None or s.ended > this.began - 2}
        return present | {
            ask.user
            for ask in self.asks[this.room_id]
            if ask is not this and (ask.ended is None or ask.ended + (SEAT_TTL + 2) * ask.issued > this.began - 2)
        }

    # -- judgements --------------------------------------------------------------------------------------

    def let_in(self, ask: Ask, claims: Mapping[str, Any], alias: str, now: float) -> None:
        """A token was issued."""
        ask.ended, ask.issued = now, True
        policies = self.policies_between(ask.room_id, ask.began, now)
        caps = [policy.max_users for policy in policies]
        sure = [cap for cap in caps if cap is not None]
        ask.capped = len(sure) == len(caps)
        video = claims.get("video", {})
        if video.get("room") != alias:
            self._suspect("a token for another room", ask, f"{video.get('room')} instead of {alias}")
        if ask.capped:
            holders = self._holders(ask.room_id, ask.began, now) - {ask.user}
            if len(holders) >= max(sure) and ask.user not in self._perhaps_holders(ask, now):
                self._suspect("let in past the cap", ask, f"cap {max(sure)}, certainly held by {sorted(holders)}")
        forbidden = frozenset.intersection(*(policy.forbidden for policy in policies))
        if forbidden.intersection(granted_sources(video)):
            self._suspect("a token with a forbidden source", ask, str(video))
        if all(policies) and claims.get("exp", 0) > now + TOKEN_TTL + 2:
            self._suspect("a token that lives too long", ask, f"{claims.get('exp', 0) - now:.0f} s")

    def refused(self, ask: Ask, now: float) -> None:
        """The room was said to be full."""
        ask.ended = now
        policies = self.policies_between(ask.room_id, ask.began, now)
        caps = [policy.max_users for policy in policies if policy.max_users is not None]
        if not caps:
            self._suspect("refused without a cap", ask, "")
            return
        entitled = any(
            stay.ask.user == ask.user and stay.began < ask.began - 1
            and self.entitled(stay) and not self.forgotten(stay.ask)
            for stay in self._there(ask.room_id)
        )  # fmt: skip
        promised = any(
            other.user == ask.user and self._awaited(other, ask.began, now) for other in self.asks[ask.room_id]
        )
        if entitled or promised:
            self._suspect("a seat's holder refused", ask, "in the call" if entitled else "promised")
        possible = self._perhaps_holders(ask, now) - {ask.user}
        lost = any(self.forgotten(stay.ask) for stay in self._there(ask.room_id))
        if len(possible) < min(caps) and not lost:
            self._suspect("refused beside a free seat", ask, f"cap {min(caps)}, at most {sorted(possible)}")

    def entitled(self, stay: Stay) -> bool:
        """Whether a session came while its seat was kept for certain."""
        issued = stay.ask.ended
        return stay.ask.capped and issued is not None and stay.began < issued + SEAT_TTL - 1

    def put_out(self, stay: Stay) -> None:
        """The guard had somebody removed."""
        self.counts["put out"] += 1
        if self.entitled(stay) and not self.forgotten(stay.ask):
            self._suspect("put out of their own seat", stay.ask, "")

    def past_the_cap(self, room_id: str, now: float) -> None:
        """Time how long those stay who came when all seats were held, with a token for which none was kept."""
        there = self._there(room_id)
        for stay in there:
            others = {s.ask.user for s in there if s.began < stay.began and self.entitled(s)}
            caps = [policy.max_users for policy in self.policies_between(room_id, stay.began, now)]
            full = all(cap is not None and len(others) >= cap for cap in caps)
            if full and stay.ask.user not in others and not self.entitled(stay):
                age = now - max(stay.began, self.quiet_since(now) + HEALED)
                self.longest["past the cap"] = max(self.longest["past the cap"], age)

    def forbidden_track(self, room_id: str, source: Source, published: float, now: float, what: str) -> None:
        """A track is there that the policy forbids, and has been since ``published``."""
        began = now
        for at, policy in reversed(self.policies[room_id]):
            if source not in policy.forbidden:
                break
            began = at
        age = now - max(published, began, self.quiet_since(now) + HEALED)
        self.longest[what] = max(self.longest[what], age)

    def _suspect(self, what: str, ask: Ask, detail: str) -> None:
        self.suspicions.append(Suspicion(what, ask.request_id, f"{ask.user} in {ask.room_id}: {detail}"))
