# SPDX-License-Identifier: Apache-2.0
"""Invitations of the guard's account: accepted or declined one after another, so that a flood of them costs little."""

from __future__ import annotations

from collections.abc import Collection

from attrs import define, field
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from lotusguard.clients.dependency import DependencyFailed, DependencyRefused
from lotusguard.clients.keyed_worker import KeyedWorker
from lotusguard.clients.synapse import MatrixClient
from lotusguard.guard.rooms.residence.account import GuardAccount, Invites
from lotusguard.guard.rooms.residence.residence import ROOMS_KEPT, Residence
from lotusguard.metrics import Metrics
from lotusguard.rules.identity import is_room_id, server_of

log = Logger()

AT_ONCE = 2
WAITING = 200
"""Invitations that may wait to be settled, or for the account to be heard in the room. More are dropped until the next
full sync, or until somebody invites again."""
ROOMS_PER_INVITER = 400
"""Rooms to which one user may have invited the account: nobody may take all places alone."""
ATTEMPTS = 3
PAUSE = 5.0
"""Seconds between two attempts."""


@define(eq=False)
class InviteHandler:
    """Settles invitations. The guard joins a room only because it was invited."""

    _client: MatrixClient
    _account: GuardAccount
    _residence: Residence
    _clock: IReactorTime
    _metrics: Metrics
    _worker: KeyedWorker[str] = field(init=False)
    _accepted: set[str] = field(factory=set, init=False)
    """Rooms that the account has joined, or is joining, and has not been heard to be in yet."""

    def __attrs_post_init__(self) -> None:
        self._worker = KeyedWorker(self._settle, AT_ONCE, _failed)

    def invited(self, room_id: str, inviter: str) -> None:
        """Somebody invited the account, just now or before a restart."""
        full = len(self._residence.invites) >= WAITING and room_id not in self._residence.invites
        if full or not is_room_id(room_id):
            self._metrics.invites.labels("dropped").inc()
            return
        self._residence.add_invite(room_id, inviter)
        self._worker.run(room_id, urgent=False)

    def resume(self) -> None:
        """Settle what an earlier run left."""
        for room_id in list(self._residence.invites):
            self._worker.run(room_id, urgent=False)

    def stop(self) -> None:
        self._worker.stop()

    def heard_all(self, rooms: Collection[str]) -> None:
        """The account is in these rooms and no others: it has left those that it had joined and that are not here."""
        for room_id in self._still_accepted().difference(rooms):
            self._residence.settle_invite(room_id)

    def _still_accepted(self) -> set[str]:
        self._accepted.intersection_update(self._residence.invites)
        return self._accepted

    def _objection(self, inviter: str) -> str:
        """Why an invitation is declined, in one word; "" if it is accepted."""
        invites = self._account.invites
        local = bool(inviter) and server_of(inviter) == self._account.server_name
        if invites is Invites.OFF or (invites is Invites.LOCAL and not local):
            return "inviter_not_accepted"
        accepted = self._still_accepted()
        if len(self._residence) + len(accepted) >= ROOMS_KEPT:
            return "too_many_rooms"
        joining = sum(self._residence.invites[room_id] == inviter for room_id in accepted)
        return "too_many_rooms_of_inviter" if self._residence.invited_by(inviter) + joining >= ROOMS_PER_INVITER else ""

    async def _settle(self, room_id: str) -> None:
        inviter = self._residence.invites.get(room_id)
        if inviter is None or self._residence.is_resident(room_id):
            return
        self._accepted.discard(room_id)
        objection = reason = self._objection(inviter)
        outcome = "declined" if objection else "accepted"
        if not objection:
            self._accepted.add(room_id)
        for attempt in range(ATTEMPTS):
            if attempt:
                await deferLater(self._clock, PAUSE)
            try:
                await (self._decline(room_id) if objection else self._client.join(room_id))
                break
            except DependencyFailed as failed:
                reason = failed.reason
                if isinstance(failed, DependencyRefused):
                    outcome = "failed"
                    break
        else:
            outcome = "failed"
        self._metrics.invites.labels(outcome).inc()
        if outcome == "failed":
            log.warn(
                "an invitation to {room_id} by {inviter} could not be settled: {reason}",
                room_id=room_id, inviter=inviter, reason=reason, event_name="invite_failed",
            )  # fmt: skip
        else:
            log.info(
                "invited to {room_id} by {inviter}: {outcome}" + (" ({reason})" if objection else ""),
                room_id=room_id, inviter=inviter, outcome=outcome, reason=objection, event_name="invite",
            )  # fmt: skip
        if outcome != "accepted":  # else it is kept until the account is heard to be in the room
            self._residence.settle_invite(room_id)

    async def _decline(self, room_id: str) -> None:
        await self._client.leave(room_id)
        await self._client.forget(room_id)


def _failed(room_id: str, failure: Failure) -> None:
    log.failure("an invitation to {room_id} failed", failure, room_id=room_id)
