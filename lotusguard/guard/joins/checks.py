# SPDX-License-Identifier: Apache-2.0
"""Who may join a call: one rule for each check, one line for each in `EntryChecks.may_join`.

A refusal never rests on a lookup that began before the request arrived, and what is unknown refuses nobody.
"""

from __future__ import annotations

from collections.abc import Callable

from attrs import define, field
from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.logger import Logger

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.waiting import FairSemaphore, gather
from lotusguard.guard.joins.decisions import Stage, Verdict
from lotusguard.guard.joins.join import Join
from lotusguard.guard.lobby import Lobby
from lotusguard.guard.lobby.switching import LobbySwitch
from lotusguard.guard.rooms.members import Members
from lotusguard.guard.rooms.policies import Freshness, Policies
from lotusguard.guard.seats.book import SeatBook
from lotusguard.guard.seats.roster import Roster
from lotusguard.rules.homeservers import HomeserverList
from lotusguard.rules.identity import is_matrix_user, server_of
from lotusguard.rules.lobby import LobbyEntry, LobbyState
from lotusguard.rules.members_only import MembersOnly
from lotusguard.rules.membership import Membership
from lotusguard.rules.permissions import Action
from lotusguard.rules.policy import Policy
from lotusguard.rules.refusals import JoinRefused, Refusal

log = Logger()


class MustWait(Exception):
    """The user has to wait in the lobby. :ivar entry: the user's entry."""

    def __init__(self, entry: LobbyEntry) -> None:
        super().__init__(entry.user)
        self.entry = entry


@define(eq=False)
class EntryChecks:
    """Decides whether a user whose identity is proven may join.

    :param homeservers: whose users may join. :param start_homeservers: whose users may start a call.
    :param server_name: gives our homeserver's name, "" while unknown.
    """

    _policies: Policies
    _members: Members
    _seats: SeatBook
    _roster: Roster
    _homeservers: HomeserverList
    _start_homeservers: HomeserverList
    _members_only: MembersOnly
    _server_name: Callable[[], str]
    _lobby: Lobby
    _switch: LobbySwitch
    _starting: dict[str, FairSemaphore] = field(factory=dict, init=False)

    @property
    def asks_membership(self) -> bool:
        return self._members_only is not MembersOnly.OFF

    async def may_join(self, join: Join) -> None:
        """:raises JoinRefused: the user may not join. :raises MustWait: a moderator has to admit the user first."""
        for name, check in (
            ("homeserver", self._homeserver),
            ("membership", self._member),
            ("join_level", self._join_level),
            ("start", self._start),
            ("removed", self._removed),
            ("lobby", self._wait_in_lobby),
        ):
            try:
                if self._seats.is_remote:
                    await join.deadline.wait(Deferred.fromCoroutine(check(join)))
                else:
                    await check(join)
            except (JoinRefused, MustWait, CancelledError):
                raise
            except TimeoutError:  # what cannot be checked refuses nobody
                join.unenforced(name, "timeout")
            except DependencyFailed as failed:
                join.unenforced(name, failed.reason)
            except Exception:
                join.log.failure(join.decision, name)

    def homeserver_may_join(self, join: Join, server_name: str) -> None:
        """:raises JoinRefused: no user of this homeserver may join calls here."""
        if not self._homeservers.allows(server_name):
            join.refuse(Refusal.HOMESERVER_NOT_ALLOWED)

    def server_may_vouch(self, join: Join) -> None:
        """:raises JoinRefused: the homeserver whose OpenID token was verified is not the user's."""
        openid = join.request.openid
        if openid is not None and is_matrix_user(join.user) and server_of(join.user) != openid.server_name:
            log.warn(
                "{server} vouched for {user}, who is not its own user; the token is withheld",
                server=openid.server_name, user=join.user, event_name="vouched_for_another_server",
            )  # fmt: skip
            join.refuse(Refusal.OTHER_SERVER)

    def may_refuse(self, policy: Policy) -> bool:
        """Whether anything here, or a full room, could refuse somebody in a room with this policy."""
        return (
            self._members_only is MembersOnly.ON
            or bool(policy)
            or not self._homeservers.allows_all
            or not self._start_homeservers.allows_all
        )

    def may_start(self, policy: Policy, user: str) -> bool:
        """Whether this user may join while nobody is in the call."""
        return policy.may_start(user) and self._start_homeservers.allows(server_of(user))

    async def _homeserver(self, join: Join) -> None:
        self.homeserver_may_join(join, server_of(join.user))

    async def _member(self, join: Join) -> None:
        if self._members_only is MembersOnly.OFF or join.membership is None:
            return
        known = join.membership
        if known.membership is not None and known.membership is not Membership.JOIN:
            with join.log.stage(join.decision, Stage.CHECK):
                local = server_of(join.user) == self._server_name()
                known = await self._members.confirm(join.room_id, join.user, join.lookups, join.arrived, local=local)
        if known.membership is None:
            join.unenforced("membership", known.reason)
        elif known.membership is not Membership.JOIN:
            if self._members_only is MembersOnly.LOG:
                join.unenforced("membership", f"{known.membership.value}_logged_only")
            else:
                await self._lobby.left_room(join.room_id, join.user)
                join.refuse(Refusal.NOT_A_MEMBER)

    async def _join_level(self, join: Join) -> None:
        if not join.policy.may_join(join.user):
            await self.read_policy_again(join)
            if not join.policy.may_join(join.user):
                join.refuse(Refusal.JOIN_LEVEL)

    async def _start(self, join: Join) -> None:
        if self.may_start(join.policy, join.user) or await self._seats.owns_seat(join.room_id, join.user):
            return
        turns = self._starting.setdefault(join.room_id, FairSemaphore(1))
        acquiring = turns.acquire()
        if not acquiring.called:
            with join.waiting(), join.log.stage(join.decision, Stage.CHECK):
                await join.deadline.wait(acquiring)
        try:
            await gather((
                self.read_policy_again(join), self._roster.refresh(join.room_id, join.arrived, join.lookups)
            ))  # fmt: skip
            if not await self._is_started(join):
                join.refuse(Refusal.NOT_STARTED)
        finally:
            turns.release()
            if turns.idle and self._starting.get(join.room_id) is turns:
                del self._starting[join.room_id]

    async def _is_started(self, join: Join) -> bool:
        """Whether somebody who may start the call is in it or has a seat, or did so and it has not ended since."""
        occupants = await self._seats.occupants(join.room_id)
        if join.user in occupants or self.may_start(join.policy, join.user):
            return True
        if any(self.may_start(join.policy, user) for user in occupants):
            await self._seats.start(join.room_id)
            return True
        return await self._seats.is_started(join.room_id)

    async def _removed(self, join: Join) -> None:
        if self._lobby.state_of(join.room_id, join.user) is not LobbyState.REMOVED:
            return
        if await self._lobby.read(join.room_id, join.user) is LobbyState.REMOVED:  # nobody has admitted them since
            join.refuse(Refusal.REMOVED)

    async def _wait_in_lobby(self, join: Join) -> None:
        if not await self._switch.is_on(join.room_id, join.known):
            return
        state = self._lobby.state_of(join.room_id, join.user)
        if state not in (LobbyState.ACCEPTED, LobbyState.WAITING) and not join.policy.bypasses_lobby(join.user):
            await self.read_policy_again(join)
            if not await self._switch.is_on(join.room_id, join.known):
                return
        if state is LobbyState.ACCEPTED or join.policy.bypasses_lobby(join.user) or await self._was_in(join, state):
            if not await self._lobby.let_in(join.room_id, join.user):
                join.refuse(Refusal.REMOVED)
            return
        if join.dry_run:
            join.decision.verdict, join.decision.reason = Verdict.WOULD_REFUSE, "lobby"
            return
        server = server_of(join.user)
        local = bool(server) and server == self._server_name()
        entry = await self._lobby.ask(join.room_id, join.user, local=local)
        if entry.rules.refusal is not None:
            join.refuse(entry.rules.refusal)
        raise MustWait(entry)

    async def _was_in(self, join: Join, state: LobbyState | None) -> bool:
        """Whether the user has been in the call since before this guard ran."""
        if state is not None:
            return False
        deadline = join.deadline.sooner(join.lookups.left())
        slot = join.request.slot_id
        return await self._switch.was_in_before_us(join.room_id, join.user, join.arrived, deadline, slot)

    async def read_policy_again(self, join: Join) -> None:
        """Read the policy as it is now, before a refusal rests on it."""
        with join.log.stage(join.decision, Stage.CHECK):
            join.known = await self._policies.get(join.room_id, join.lookups, join.arrived)

    async def see_policy_after_wait(self, join: Join) -> None:
        """Go on with the policy as it is known now: it may have changed while the join waited for somebody else.

        :raises JoinRefused: by that policy the user may not join.
        :raises MustWait: by that policy a moderator has to admit the user first.
        """
        known = await self._policies.get(join.room_id, join.lookups)
        if known.freshness is Freshness.UNKNOWN:
            return
        before, join.known = join.policy, known
        if known.policy != before:
            await self.may_join(join)

    def restricts_start(self, policy: Policy) -> bool:
        """Whether not everybody may start a call in a room with this policy."""
        permissions = policy.permissions
        return (permissions is not None and permissions.names(Action.START)) or not self._start_homeservers.allows_all
