# SPDX-License-Identifier: Apache-2.0
"""Makes the parts of the guard itself from its state and its clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from attrs import frozen

from lotusguard.config import Settings, exposed_appservice
from lotusguard.guard.calls.changes import CallChanges
from lotusguard.guard.calls.commands import Commands
from lotusguard.guard.calls.discovery import Discovery
from lotusguard.guard.calls.ending import CallEnder
from lotusguard.guard.calls.enforcement import Enforcement
from lotusguard.guard.calls.entitlement import Entitlement
from lotusguard.guard.calls.failing import FailingCalls
from lotusguard.guard.calls.lost_rooms import LostRooms
from lotusguard.guard.calls.memberships import CallMemberships
from lotusguard.guard.calls.moderation import Moderation
from lotusguard.guard.calls.moderator import Moderator
from lotusguard.guard.calls.over_limit import LimitEnforcer
from lotusguard.guard.calls.participants import ParticipantEnforcer
from lotusguard.guard.calls.removal import Remover
from lotusguard.guard.calls.status import CallStatus
from lotusguard.guard.health import Health
from lotusguard.guard.joins.admission import Admission
from lotusguard.guard.joins.callers import Callers
from lotusguard.guard.joins.checks import EntryChecks
from lotusguard.guard.joins.decisions import DecisionLog
from lotusguard.guard.joins.issuing import TokenIssuer
from lotusguard.guard.joins.lookups import Lookups
from lotusguard.guard.joins.seating import Seating
from lotusguard.guard.lobby import Lobby
from lotusguard.guard.lobby.notices import LobbyNotices
from lotusguard.guard.lobby.switching import LobbySwitch
from lotusguard.guard.rooms.members import Members
from lotusguard.guard.rooms.policies import Policies
from lotusguard.guard.rooms.remembered import RememberedPolicies
from lotusguard.guard.rooms.residence.account import GuardAccount, Invites
from lotusguard.guard.rooms.residence.events import RoomEvents
from lotusguard.guard.rooms.residence.invites import InviteHandler
from lotusguard.guard.rooms.residence.residence import Residence
from lotusguard.guard.rooms.residence.sync import SyncService
from lotusguard.guard.rooms.residence.voice import ResidentVoice
from lotusguard.guard.rooms.sources import RoomSources
from lotusguard.guard.seats.roster import Roster
from lotusguard.metrics import Metrics
from lotusguard.rules.homeservers import HomeserverList
from lotusguard.rules.members_only import MembersOnly
from lotusguard.wiring.clients import Clients
from lotusguard.wiring.state import State


@frozen
class Rooms:
    """Policies, memberships and the roster of each call.

    :ivar account: the guard's own. :ivar residence: what it hears in rooms. :ivar voice: how it speaks there.
    """

    account: GuardAccount
    residence: Residence
    voice: ResidentVoice
    sources: RoomSources
    policies: Policies
    members: Members
    roster: Roster


@frozen
class Waiting:
    """The lobby, and what serves it."""

    lobby: Lobby
    switch: LobbySwitch
    notices: LobbyNotices


@frozen
class Joins:
    admission: Admission
    issuer: TokenIssuer
    decision_log: DecisionLog


@frozen
class Calls:
    entitlement: Entitlement
    participants: ParticipantEnforcer
    limits: LimitEnforcer
    enforcement: Enforcement
    changes: CallChanges
    moderator: Moderator
    ender: CallEnder


def rooms(
    settings: Settings, reactor: Any, metrics: Metrics, wall: Callable[[], float], clients: Clients, state: State
) -> Rooms:
    invites = Invites(settings.guard_invites) if settings.guard_invites is not None else None
    account = GuardAccount(clients.homeserver, clients.matrix, invites)
    residence = Residence(state.store if state.sharing is None else state.sharing.turns, reactor, wall, metrics)
    sources = RoomSources(clients.homeserver, clients.matrix, residence, account)
    policies = Policies(
        sources, RememberedPolicies(metrics, settings.guard_default_max_users), reactor, metrics,
        ttl=settings.guard_policy_ttl, stale=settings.guard_policy_stale, pushed=sources,
    )  # fmt: skip
    members = Members(sources, reactor, metrics, settings.guard_policy_ttl, sources)
    voice = ResidentVoice(clients.matrix, residence, reactor, metrics)
    roster = Roster(
        clients.livekit,
        state.seats,
        state.registry,
        policies,
        reactor,
        metrics,
        settings.guard_lookup_timeout,
        state.guarding_since,
    )
    return Rooms(account, residence, voice, sources, policies, members, roster)


def syncing(
    reactor: Any, metrics: Metrics, clients: Clients, state: State, given: Rooms, kept: Calls, health: Health,
    moderation: Moderation | None = None, waiting: Callable[[str], Sequence[str]] = lambda room_id: (),
) -> tuple[SyncService, Commands]:  # fmt: skip
    """What listens in the rooms that the guard's account was invited to, and answers commands there.

    :param waiting: the users who wait in a room's lobby.
    """
    events = RoomEvents(clients.matrix, given.account, given.residence, given.voice, kept.changes, reactor)
    invites = InviteHandler(clients.matrix, given.account, given.residence, reactor, metrics)
    status = CallStatus(given.policies, state.seats, waiting, health.not_enforced, reactor)
    commands = Commands(
        given.voice, clients.matrix, given.account, given.residence, status, kept.ender, moderation, waiting, reactor,
        metrics,
    )  # fmt: skip
    events.commands = commands
    in_turns = state.sharing is not None
    service = SyncService(clients.matrix, given.account, given.residence, events, invites, reactor, in_turns=in_turns)
    if state.sharing is not None:
        state.sharing.turns.listener, state.sharing.turns.idle = service, commands.worker.idle
    return service, commands


def waiting(
    settings: Settings, reactor: Any, metrics: Metrics, wall: Callable[[], float], clients: Clients, state: State,
    given: Rooms, *, operators: bool,
) -> Waiting:  # fmt: skip
    """:param operators: whether there is an operators' listener."""
    operators_can_decide = operators and bool(settings.guard_admin_token.get_secret_value())
    lobby = Lobby(state.lobby, reactor, wall, metrics, settings.guard_lobby_wait)
    switch = LobbySwitch(
        lobby, given.policies, state.seats, given.roster, state.registry, clients.livekit, reactor,
        lambda room_id: operators_can_decide or given.voice.is_heard_from(room_id), settings.guard_lookup_timeout,
    )  # fmt: skip
    notices = LobbyNotices(
        lobby, given.policies, given.voice, reactor, settings.guard_lookup_timeout, operators_can_decide
    )
    notices.start()
    return Waiting(lobby, switch, notices)


def joins(
    settings: Settings, reactor: Any, metrics: Metrics, wall: Callable[[], float], clients: Clients, state: State,
    given: Rooms, waiting: Waiting,
) -> Joins:  # fmt: skip
    decision_log = DecisionLog(reactor, metrics, wall, state.history)
    checks = EntryChecks(
        given.policies, given.members, state.seats, given.roster,
        homeservers=homeserver_list(settings.guard_homeservers),
        start_homeservers=homeserver_list(settings.guard_start_homeservers),
        members_only=MembersOnly(settings.guard_members_only), server_name=lambda: clients.homeserver.server_name,
        lobby=waiting.lobby, switch=waiting.switch,
    )  # fmt: skip
    seating = Seating(state.seats, given.roster, checks, reactor, metrics)
    issuer = TokenIssuer(
        state.seats, state.registry, checks, settings.sfu_key, metrics, settings.guard_token_ttl,
        all_tokens=settings.guard_tokens == "all", wall=wall,
    )  # fmt: skip
    lookups = Lookups(Callers(clients.openid, reactor), given.policies, given.members, checks.asks_membership)
    admission = Admission(
        lookups, given.policies, checks, seating, issuer, decision_log, reactor,
        settings.guard_lookup_timeout, settings.guard_upstream_timeout, settings.guard_dry_run,
        waiting.lobby, settings.guard_lobby_wait,
    )  # fmt: skip
    return Joins(admission, issuer, decision_log)


def calls(
    settings: Settings, reactor: Any, metrics: Metrics, clients: Clients, state: State, given: Rooms, waiting: Waiting,
    decision_log: DecisionLog,
) -> Calls:  # fmt: skip
    lease = state.lease
    memberships = CallMemberships(
        given.members, MembersOnly(settings.guard_members_only), lambda: clients.homeserver.server_name, reactor,
        metrics, settings.guard_lookup_timeout, settings.guard_membership_interval, settings.guard_policy_ttl,
    )  # fmt: skip
    entitlement = Entitlement(
        memberships, state.registry, waiting.lobby, waiting.switch, homeserver_list(settings.guard_homeservers),
        reactor, metrics,
    )  # fmt: skip
    participants = ParticipantEnforcer(
        clients.livekit, state.registry, reactor, metrics,
        FailingCalls(reactor, remembered=3 * settings.guard_reconcile_interval + 60.0),
        restore=settings.guard_restore, dry_run=settings.guard_dry_run,
        may_act=lambda: lease is None or lease.held, removed=decision_log.removed,
    )  # fmt: skip
    leases = None if state.sharing is None else state.sharing.leases
    remover = Remover(participants, given.roster, leases)
    limits = LimitEnforcer(
        given.roster, state.seats, participants, remover, reactor, settings.guard_lookup_timeout,
        eject=settings.guard_overflow == "eject",
    )  # fmt: skip
    enforcement = Enforcement(
        given.policies, given.roster, state.registry, entitlement, participants, remover, limits, reactor, metrics,
        settings.guard_lookup_timeout, leases,
    )  # fmt: skip
    changes = CallChanges(
        clients.livekit, given.roster, state.seats, state.registry, given.policies, given.members,
        Discovery(clients.discovery, state.registry, reactor, metrics), entitlement, enforcement,
        LostRooms(clients.livekit, state.seats, enforcement.reconciles, reactor, lambda: participants.acts),
        reactor, metrics,
        tell_others=None if leases is None else leases.tell_changed,
    )  # fmt: skip
    moderator = Moderator(
        waiting.lobby, clients.livekit, given.roster, state.seats, state.registry, participants, remover, enforcement,
        reactor, settings.guard_lookup_timeout,
    )  # fmt: skip
    ender = CallEnder(given.roster, state.registry, remover, reactor, settings.guard_lookup_timeout)
    return Calls(entitlement, participants, limits, enforcement, changes, moderator, ender)


def health(
    settings: Settings, reactor: Any, metrics: Metrics, clients: Clients, state: State, given: Rooms, decided: Joins,
    kept: Calls, waiting: Waiting,
) -> Health:  # fmt: skip
    return Health(
        clients.livekit, clients.homeserver, clients.openid, given.sources, clients.upstream,
        decided.decision_log, kept.changes, given.roster, state.store, state.lease, state.error, waiting.switch,
        kept.participants.failing, reactor, metrics, settings.guard_dry_run,
        enforces_membership=kept.entitlement.memberships.removes_non_members,
        reconcile_interval=settings.guard_reconcile_interval,
        redis_fault=None if state.sharing is None else state.sharing.fault, exposed=exposed_appservice(settings),
    )  # fmt: skip


def homeserver_list(names: tuple[str, ...]) -> HomeserverList:
    return HomeserverList.parse(",".join(names))
