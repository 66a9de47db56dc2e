# SPDX-License-Identifier: Apache-2.0
"""Two guards over one Valkey: a guard, an answer or the data may be lost between any two steps, and the limit holds.

``CRASH_EXAMPLES=5000`` runs it for long.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from attrs import define, field
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from lotusguard.guard.seats.book import Issued
from lotusguard.rules.refusals import Refusal
from lotusguard.rules.seats import Arrival

from .direct import Crash, DirectGuard, Server
from .model import RoomModel

TTL, ALIAS = 30.0, "alias"
PENDING_ENDS = 5.0
"""Seconds after the death of a guard in which its requests in flight end."""
RECENT = TTL + 25.0
"""Seconds for which somebody who did anything may be known to hold a seat."""
FOREVER = 10**9


def outcome_of(work: Any) -> tuple[bool, Any]:
    """Run a coroutine as far as it gets. :return: whether it ended, and its result."""
    ended: list[Any] = []
    Deferred.fromCoroutine(work).addBoth(ended.append)
    if ended and isinstance(ended[0], Failure):
        ended[0].raiseException()
    return bool(ended), ended[0] if ended else None


@define(eq=False)
class Asked:
    """A token request in flight. :ivar hold_id: once it has a seat."""

    guard: DirectGuard
    user: str
    hold_id: str = ""
    seated: bool = field(default=False)


@define(eq=False)
class Token:
    """A token that a client has. :ivar guard: who issued it. :ivar seated: with a seat that all guards know."""

    guard: DirectGuard
    user: str
    expires: float
    seated: bool


class Guards(RuleBasedStateMachine):
    """The world's own books say who has a token, and who is in the call."""

    USERS = st.sampled_from("abcd")
    NUMBERS = st.integers(0, 1)

    @initialize(limit=st.integers(1, 2))
    def opened(self, limit: int) -> None:
        self.limit, self.server, self.room = limit, Server(), f"!room{next(_rooms)}"
        self.server.replace({})
        self.model = RoomModel(self.room, self.server, TTL)
        self.server.spy = self.model.replay
        self.guards = [DirectGuard(self.server, TTL), DirectGuard(self.server, TTL)]
        self.asked: list[Asked] = []
        self.tokens: list[Token] = []
        self.inside: dict[str, tuple[str, bool]] = {}
        self.joined: dict[str, float] = {}
        self.active: dict[str, float] = {}
        self.died: dict[str, float] = {}
        self.sids = 0
        self.failures: list[Failure] = []
        self.shown: dict[str, frozenset[str]] = {}
        self.saved: dict[bytes, bytes] = {}
        self.lost_at = -100.0
        self._pass(6.0)

    # -- time and faults ---------------------------------------------------------------------------------

    def _pass(self, seconds: float) -> None:
        while seconds > 0:
            step = min(seconds, 0.5)
            self.server.now += step
            seconds -= step
            for guard in self.guards:
                if not guard.dead:
                    guard.clock.advance(step)
                    outcome_of(guard.upkeep())
            self._note_deaths()

    @rule(seconds=st.sampled_from([0.2, 1.0, 4.0, 19.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self._pass(seconds)

    @rule(number=NUMBERS, crash=st.sampled_from(Crash), after=st.integers(0, 4))
    def next_commands_fail(self, number: int, crash: Crash, after: int) -> None:
        client = self.guards[number].client
        client.crash, client.crash_after = crash, after

    @rule(number=NUMBERS)
    def guard_is_killed(self, number: int) -> None:
        self.guards[number].client.dead = True
        self._note_deaths()

    def _note_deaths(self) -> None:
        """A guard that died is started again, with another name and without memory."""
        for number, guard in enumerate(self.guards):
            if guard.dead:
                for asked in self.asked:
                    if asked.guard is guard and asked.hold_id:
                        self.died[asked.hold_id] = self.server.now
                self.asked = [asked for asked in self.asked if asked.guard is not guard]
                self.guards[number] = DirectGuard(self.server, TTL)

    @rule()
    def server_saves(self) -> None:
        self.saved = self.server.snapshot()
        self.model.save()

    @rule()
    def server_stops(self) -> None:
        self.server.up = False
        for guard in self.guards:
            guard.client.connected = False

    @precondition(lambda self: not self.server.up)
    @rule(older=st.booleans())
    def server_returns(self, older: bool) -> None:
        """Restarted empty, or with the data that were saved last; a failover to a late replica looks the same."""
        self._replace(older, same_server=False)
        self.server.up = True
        for guard in self.guards:
            guard.client.connected = False

    @precondition(lambda self: self.server.up)
    @rule()
    def everything_is_deleted(self) -> None:
        self._replace(older=False, same_server=True)

    @rule(number=NUMBERS)
    def first_replica_comes(self, number: int) -> None:
        """The replication ID of the server changes. Connected guards are not told; one connects again."""
        self.server.epoch = f"epoch{next(self.server.names)}"
        self.guards[number].client.connected = False

    def _replace(self, older: bool, *, same_server: bool) -> None:
        self.server.replace(self.saved if older else {}, same_server=same_server)
        self.model.restore(older=older)
        self.lost_at = self.server.now
        alive = set(map(id, self.guards))
        for token in self.tokens:
            if id(token.guard) not in alive:
                token.seated = False  # the guard that could give it back is dead, and so is the server that knew
        self.inside = {user: (sid, False) for user, (sid, _) in self.inside.items()}  # until a listing shows them

    # -- joins -------------------------------------------------------------------------------------------

    @rule(number=NUMBERS, user=USERS)
    def asks(self, number: int, user: str) -> None:
        guard = self.guards[number]
        self.active[user] = self.server.now
        listed = outcome_of(self._list(guard))[0]
        if not listed or guard.dead:
            self._note_deaths()
            return
        taken = self._take(guard, user)
        if taken is Refusal.FULL and not guard.dead:
            outcome_of(self._list(guard))
            taken = self._take(guard, user)
            if taken is Refusal.FULL and not guard.book.unshared:
                assert not self._owns(user), "a holder was refused"
                assert self._may_be_taken() >= self.limit, "refused beside a free seat"
        self._note_deaths()

    def _take(self, guard: DirectGuard, user: str) -> Any:
        asked = Asked(guard, user)
        taking = Deferred.fromCoroutine(guard.book.take(self.room, user, self.limit, ALIAS))
        found: list[Any] = []

        def taken(hold: Any) -> Any:
            found.append(hold)
            if isinstance(hold, str) and not guard.dead:
                asked.hold_id = hold
                asked.seated = not guard.book.unshared
                self.asked.append(asked)
                if asked.seated:
                    self._check_rebuilt(guard)

        taking.addCallback(taken).addErrback(self.failures.append)
        return found[0] if found else None

    def _check_rebuilt(self, guard: DirectGuard) -> None:
        """Nobody is seated in a data set to which living guards have not given back their holds."""
        for other in self.guards:
            known = other is guard or self.server.now - self.lost_at < PENDING_ENDS
            if known and not other.dead and other.client.connected and other.book.unshared is False:
                held = {own.user for _, own in other.own.unexpired() if own.seated and own.room_id == self.room}
                held &= {token.user for token in self.tokens}  # others have hung up since
                assert held <= self.model.owners(), "somebody was seated before a hold was given back"

    async def _list(self, guard: DirectGuard) -> None:
        ago = guard.clock.seconds() - self.server.now
        present = [Arrival(sid, user, user, self.joined[sid] + ago) for user, (sid, _) in self.inside.items()]
        shared = not guard.book.unshared
        since, shown = guard.clock.seconds(), frozenset(self.inside)
        is_same = self.shown.pop(guard.name, None) == shown
        apply = partial(guard.book.apply_listing, self.room, ALIAS, present, self.limit, since)
        if not is_same or not await guard.book.listed_again(self.room, ALIAS, self.limit, since, apply):
            await apply()
        self.shown[guard.name] = shown
        await guard.book.is_started(self.room)
        if shared and not guard.book.unshared:
            owners = self.model.owners()
            self.inside = {user: (sid, user in owners) for user, (sid, _) in self.inside.items()}

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def token_is_issued(self, data: st.DataObject) -> None:
        asked = data.draw(st.sampled_from(self.asked))
        self.asked.remove(asked)
        guard, user = asked.guard, asked.user
        ended, _ = outcome_of(guard.book.issue(self.room, asked.hold_id, Issued(ALIAS, user), durable=True))
        if ended and not guard.dead:
            own = dict(guard.own.unexpired()).get(asked.hold_id)
            seated = own is not None and own.seated and not guard.book.unshared
            expires = self.server.now + (own.expires - guard.clock.seconds() if own is not None else 0.0)
            self.tokens.append(Token(guard, user, expires, seated))
            self.active[user] = self.server.now
        self._note_deaths()

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def request_fails(self, data: st.DataObject) -> None:
        asked = data.draw(st.sampled_from(self.asked))
        self.asked.remove(asked)
        outcome_of(asked.guard.book.release(self.room, asked.hold_id))
        self.active[asked.user] = self.server.now
        self._note_deaths()

    # -- the call ----------------------------------------------------------------------------------------

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), number=NUMBERS, told=st.booleans())
    def enters(self, data: st.DataObject, number: int, told: bool) -> None:
        token = data.draw(st.sampled_from(self.tokens))
        if token.user in self.inside or token.expires <= self.server.now:
            return
        self.sids += 1
        self.inside[token.user] = (f"PA_{self.sids}", token.seated)
        self.joined[f"PA_{self.sids}"] = self.server.now
        self.active[token.user] = self.server.now
        self.tokens = [other for other in self.tokens if other.user != token.user]
        if told:
            guard = self.guards[number]
            who = Arrival(f"PA_{self.sids}", token.user, token.user, guard.clock.seconds())
            outcome_of(guard.book.arrive(self.room, ALIAS, who, self.limit))
            self._note_deaths()

    @precondition(lambda self: self.inside)
    @rule(data=st.data(), number=NUMBERS)
    def leaves(self, data: st.DataObject, number: int) -> None:
        user = data.draw(st.sampled_from(sorted(self.inside)))
        sid, _ = self.inside.pop(user)
        self.tokens = [token for token in self.tokens if token.user != user]  # hanging up ends them too
        self.active[user] = self.server.now
        guard = self.guards[number]
        outcome_of(
            guard.book.leave(self.room, ALIAS, sid, user, guard.clock.seconds(), by_choice=True)
        )  # fmt: skip
        self._note_deaths()

    # -- what must hold ----------------------------------------------------------------------------------

    def _owns(self, user: str) -> bool:
        held = any(token.user == user and token.seated and token.expires > self.server.now for token in self.tokens)
        return held or self.inside.get(user, ("", False))[1]

    def _may_be_taken(self) -> int:
        recent = {user for user, at in self.active.items() if self.server.now - at <= RECENT}
        return len(recent | set(self.inside) | {asked.user for asked in self.asked})

    @invariant()
    def never_more_seats_are_promised_than_there_are(self) -> None:
        if hasattr(self, "guards"):
            promised = {user for user in "abcd" if self._owns(user)}
            assert len(promised) <= self.limit, promised

    @invariant()
    def no_join_fails(self) -> None:
        for failure in getattr(self, "failures", ()):
            failure.raiseException()

    @invariant()
    def no_issued_hold_is_lost(self) -> None:
        if not hasattr(self, "guards") or not self.server.up:
            return
        for guard in self.guards:
            if guard.rebuilding.complete and guard.client.available and not guard.book.unshared:
                owners = self.model.owners()
                for user in "abcd":
                    if self._owns(user) and self.server.now - self.lost_at > PENDING_ENDS + 1:
                        assert user in owners, f"the seat of {user} is lost"

    @invariant()
    def requests_of_dead_guards_end(self) -> None:
        if not hasattr(self, "guards"):
            return
        for hold_id, at in self.died.items():
            if self.server.now - at > PENDING_ENDS:
                assert hold_id not in self.model.pending_at(self.server.now), "a request of a dead guard holds a seat"

    def teardown(self) -> None:
        if hasattr(self, "guards"):
            for guard in self.guards:
                guard.client.dead = True
            self.server.replace({}, same_server=True)


_rooms = iter(range(FOREVER))
EXAMPLES = int(os.environ.get("CRASH_EXAMPLES", "0"))
Guards.TestCase.settings = settings(
    max_examples=EXAMPLES or 60, stateful_step_count=40 if EXAMPLES else 25, deadline=None, derandomize=not EXAMPLES,
    suppress_health_check=list(HealthCheck), print_blob=True,
)  # fmt: skip
TestGuards = Guards.TestCase
