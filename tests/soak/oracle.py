# SPDX-License-Identifier: Apache-2.0
"""What the guard got wrong in a soak.

The soak plays all clients and all moderators, so it knows who is in which call, and who may be. A judgement leaves
out everything that a message under way, a dependency with a fault or a change of a moment ago could explain. What
remains is a fault of the guard.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Mapping
from typing import Any

from attrs import Factory, define, frozen

from lotusguard.rules.sources import CAMERA, MICROPHONE, SCREEN_SHARE, Source
from lotusguard.rules.tokens import granted_sources
from tests.soak.record import TOKEN_TTL, Ask, Record, Stay

SETTLING = 4.0
"""Seconds after a fault from which violations are timed: by then a probe went through and a round began."""
GONE_WITHIN = 5.0
"""Seconds within which a violation has to end while nothing is wrong: age of what is known, a round, and some."""

TOLD_AFTER = "a guard was told of a departure after"

FULL = "This voice channel is full."
NOT_A_MEMBER = "You are not a member of this room."
JOIN_LEVEL = "You may not join calls in this room."


@frozen
class Suspicion:
    """Something that looks like a fault, unless the guard said that it could not enforce what it rests on.

    :ivar request_id: of the request that it is about.
    :ivar rests_on: other requests, one of which must have been enforced for the suspicion to be justified.
    """

    what: str
    request_id: str
    detail: str
    rests_on: frozenset[str] = frozenset()

    def is_explained(self, unenforced: Container[str]) -> bool:
        """:param unenforced: the requests of which the guard said that it could not enforce something."""
        if self.request_id in unenforced:
            return True
        return bool(self.rests_on) and all(request_id in unenforced for request_id in self.rests_on)


@define
class Oracle(Record):
    """Judges answers when they come, and running calls from time to time."""

    suspicions: list[Suspicion] = Factory(list)
    counts: Counter[str] = Factory(Counter)
    longest: dict[str, float] = Factory(lambda: defaultdict(float))
    too_long: dict[str, set[str]] = Factory(lambda: defaultdict(set))

    # -- judgements of answers ---------------------------------------------------------------------------

    def issued(self, ask: Ask, claims: Mapping[str, Any], alias: str, now: float) -> None:
        """A token was issued."""
        ask.ended, ask.issued = now, True
        policies = self.policies_between(ask.room_id, ask.began, now)
        limits = [policy.max_users for policy in policies]
        certain = [limit for limit in limits if limit is not None]
        ask.limited = len(certain) == len(limits)
        video = claims.get("video", {})
        if video.get("room") != alias:
            self._suspect("a token for another room", ask, f"{video.get('room')} instead of {alias}")
        if ask.limited:
            holders = self.holders(ask.room_id, ask.began, now) - {ask.user}
            if len(holders) >= max(certain) and ask.user not in self.possible_holders(ask, now):
                self._suspect(
                    "a token past the limit",
                    ask,
                    f"limit {max(certain)}, held by {sorted(holders)}; {self._latest(ask)}",
                )
        allowed = frozenset[Source]().union(*(policy.allowed_sources(ask.user) for policy in policies))
        if not allowed.issuperset(granted_sources(video)):
            self._suspect("a token with a source that is not allowed", ask, str(video))
        if claims.get("exp", 0) > now + TOKEN_TTL + 2:
            self._suspect("a token that lives too long", ask, f"{claims.get('exp', 0) - now:.0f} s")
        if not any(self.memberships_between(ask.room_id, ask.user, ask.began, now)):
            self._suspect("a token for a non-member", ask, "")
        if not any(policy.may_join(ask.user) for policy in policies):
            self._suspect("a token below the join level", ask, "")

    def refused(self, ask: Ask, text: str, now: float) -> None:
        """The guard refused a token."""
        ask.ended = now
        if text == FULL:
            self._refused_as_full(ask, now)
        elif text == NOT_A_MEMBER:
            # Such a refusal rests only on lookups that began after the request arrived.
            if all(self.members[ask.room_id, ask.user].between(ask.began, now)):
                self._suspect("a member refused", ask, text)
        elif text == JOIN_LEVEL:
            if all(policy.may_join(ask.user) for policy in self.policies_between(ask.room_id, ask.began, now)):
                self._suspect("refused although the level suffices", ask, text)
        else:
            self._suspect("refused for no reason of the room's", ask, text)

    def _refused_as_full(self, ask: Ask, now: float) -> None:
        policies = self.policies_between(ask.room_id, ask.began, now)
        limits = [policy.max_users for policy in policies if policy.max_users is not None]
        if not limits:
            self._suspect("refused without a limit", ask, "")
            return
        in_call = [
            stay.ask for stay in self.connected(ask.room_id)
            if stay.ask.user == ask.user and stay.began < ask.began - 1
            and self.owns_seat(stay) and not self.forgotten(stay.ask)
        ]  # fmt: skip
        holds = [
            other for other in self.asks[ask.room_id] if other.user == ask.user and self.has_hold(other, ask.began, now)
        ]
        if in_call or holds:
            detail = "in the call" if in_call else "holds a seat"
            self._suspect("the owner of a seat refused", ask, detail, *in_call, *holds)
        possible = self.possible_holders(ask, now) - {ask.user}
        lost = any(self.forgotten(stay.ask) for stay in self.connected(ask.room_id))
        if len(possible) < min(limits) and not lost:
            self._suspect("refused beside a free seat", ask, f"limit {min(limits)}, at most {sorted(possible)}")

    def told(self, stay: Stay, now: float) -> None:
        super().told(stay, now)
        late = 0.0 if stay.ended is None else now - stay.ended
        self.counts["departures of which a guard was told after more than 2 s"] += late > 2
        self.longest[TOLD_AFTER] = max(self.longest[TOLD_AFTER], late)

    # -- judgements of running calls ---------------------------------------------------------------------

    def removed(self, stay: Stay, now: float) -> None:
        """The guard removed a session."""
        self.counts["removed"] += 1
        ask = stay.ask
        if not self.was_always_entitled(ask.room_id, ask.user, now, now):
            return
        if self.owns_seat(stay) and not self.forgotten(ask):
            self._suspect("removed from their own seat", ask, "")
        if all(policy.max_users is None for policy in self.policies_between(ask.room_id, now, now)):
            self._suspect("a member removed", ask, "there is no limit")

    def check_stays(self, room_id: str, now: float) -> None:
        """Time how long sessions last that should have been removed."""
        stays = self.connected(room_id)
        for stay in stays:
            user, key = stay.ask.user, stay.ask.request_id
            not_member = self.members[room_id, user].true_since(lambda member: not member, never=now)
            self._time("a non-member in the call", key, now, stay.began, not_member)
            below = self.policies[room_id].true_since(lambda policy, user=user: not policy.may_join(user), never=now)  # type: ignore[misc]
            self._time("below the join level in the call", key, now, stay.began, below)
            others = {s.ask.user for s in stays if s.began < stay.began and self.owns_seat(s)}
            limits = [policy.max_users for policy in self.policies_between(room_id, stay.began, now)]
            full = all(limit is not None and len(others) >= limit for limit in limits)
            if full and user not in others and not self.arrived_in_time(stay):
                self._time("past the limit in the call", key, now, stay.began)

    def check_track(self, stay: Stay, sid: str, source: Source, is_video: bool, published: float, now: float) -> None:
        """Time how long a track lasts that its owner may not publish."""
        history, user = self.policies[stay.ask.room_id], stay.ask.user
        if source not in history.current.allowed_sources(user):
            since = history.true_since(lambda policy: source not in policy.allowed_sources(user), never=now)
            forbidden = source in history.current.forbidden
            what = "a forbidden source published" if forbidden else "published above their rights"
            self._time(what, sid, now, published, since)
        elif source is MICROPHONE and is_video:
            video = {CAMERA, SCREEN_SHARE}
            since = history.true_since(lambda policy: not video <= policy.allowed_sources(user), never=now)
            self._time("video labelled as microphone", sid, now, published, since)

    def _time(self, what: str, key: str, now: float, *since: float) -> None:
        age = now - max(*since, self.disturbances.quiet_since(now) + SETTLING)
        self.longest[what] = max(self.longest[what], age)
        if age > GONE_WITHIN:
            self.too_long[what].add(key)

    def _latest(self, ask: Ask) -> str:
        """What the user did before in this room, in seconds before the request."""
        stays = [stay for stay in self.stays[ask.room_id] if stay.ask.user == ask.user]
        left = [
            f"{ask.began - stay.ended:.1f} (told {'never' if stay.told is None else f'{ask.began - stay.told:.1f}'})"
            for stay in stays if stay.ended is not None
        ]  # fmt: skip
        asked = [f"{ask.began - a.began:.1f}" for a in self.asks[ask.room_id] if a.user == ask.user and a is not ask]
        return f"left {left[-3:]} s and asked {asked[-3:]} s before"

    def _suspect(self, what: str, ask: Ask, detail: str, *rests_on: Ask) -> None:
        requests = frozenset(other.request_id for other in rests_on)
        self.suspicions.append(Suspicion(what, ask.request_id, f"{ask.user} in {ask.room_id}: {detail}", requests))
