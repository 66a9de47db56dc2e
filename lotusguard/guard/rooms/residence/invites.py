# SPDX-License-Identifier: Apache-2.0
"""Invitations of the guard's account: accepted or declined one after another, so that a flood of them costs little."""

from __future__ import annotations

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
"""Invitations that may wait. More are dropped until the next full sync, or until somebody invites again."""
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

    def _accepts(self, room_id: str, inviter: str) -> bool:
        invites = self._account.invites
        local = bool(inviter) and server_of(inviter) == self._account.server_name
        welcome = invites is Invites.ANY or (invites is Invites.LOCAL and local)
        return welcome and is_room_id(room_id) and len(self._residence) < ROOMS_KEPT

    async def _settle(self, room_id: str) -> None:
        inviter = self._residence.invites.get(room_id)
        if inviter is None or self._residence.is_resident(room_id):
            return
        accepts = self._accepts(room_id, inviter)
        outcome = "accepted" if accepts else "declined"
        for attempt in range(ATTEMPTS):
            if attempt:
                await deferLater(self._clock, PAUSE)
            try:
                await (self._client.join(room_id) if accepts else self._decline(room_id))
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
                "invited to {room_id} by {inviter}: {outcome}",
                room_id=room_id, inviter=inviter, outcome=outcome, event_name="invite",
            )  # fmt: skip
        self._residence.settle_invite(room_id)

    async def _decline(self, room_id: str) -> None:
        await self._client.leave(room_id)
        await self._client.forget(room_id)


def _failed(room_id: str, failure: Failure) -> None:
    log.failure("an invitation to {room_id} failed", failure, room_id=room_id)
