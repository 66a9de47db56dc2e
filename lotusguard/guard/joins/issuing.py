# SPDX-License-Identifier: Apache-2.0
"""What becomes of upstream's answer: the token is recorded, rebuilt for its user, and signed anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum
from typing import Any

from attrs import define, frozen
from twisted.internet.defer import CancelledError

from lotusguard.clients.http import Answer
from lotusguard.guard.joins.checks import EntryChecks
from lotusguard.guard.joins.decisions import Stage, Verdict
from lotusguard.guard.joins.join import Join
from lotusguard.guard.seats.book import Issued, SeatBook
from lotusguard.guard.seats.registry import Slot, TokenRegistry
from lotusguard.metrics import Metrics
from lotusguard.rules.identity import user_of
from lotusguard.rules.jwt import NotOurs, SfuKey, compact, read_unverified
from lotusguard.rules.sources import EVERY_SOURCE, NO_SOURCE, Source
from lotusguard.rules.tokens import ceiling_of, issued_to, rebuilt


class Signer(Enum):
    """Who signed a token."""

    US = "us"
    OTHER_SFU = "other_sfu"
    """The request chose another SFU, whose secret is not ours."""
    MISMATCH = "mismatch"
    """Upstream, with another secret than ours: a wrong configuration."""
    NO_KEY = "no_livekit_key"
    """We have no secret to tell."""


@frozen
class Token:
    """A token in upstream's answer.

    :ivar content: the answer's JSON object. :ivar claims: the token's claims; empty if it cannot be read.
    :ivar alias: the SFU room and :ivar identity: the participant's identity; both "" if the token does not say.
    """

    content: dict[str, Any]
    claims: dict[str, Any]
    signer: Signer
    alias: str
    identity: str
    fault: str = ""


@define(eq=False)
class TokenIssuer:
    """Records and rebuilds tokens.

    :param token_ttl: longest life of a token, in seconds.
    :param all_tokens: rebuild every token, not only those of rooms with a policy (``GUARD_TOKENS``).
    :param wall: seconds since the epoch.
    """

    _seats: SeatBook
    _registry: TokenRegistry
    _checks: EntryChecks
    key: SfuKey | None
    _metrics: Metrics
    token_ttl: float
    all_tokens: bool
    _wall: Callable[[], float]

    def read(self, join: Join, answer: Answer) -> Token | None:
        """The token in an answer; ``None`` if there is none."""
        try:
            content = json.loads(answer.body)
        except (ValueError, RecursionError):
            if answer.code == 200:
                join.unenforced("token", "undecodable_answer")
            return None
        if not isinstance(content, dict) or not isinstance(content.get("jwt"), str):
            return None
        claims, signer, fault = self._claims(join, content["jwt"])
        issued = issued_to(claims) if claims else None
        alias, identity = (issued.alias, issued.identity) if issued is not None else ("", "")
        return Token(content, claims, signer, alias, identity, fault)

    def _claims(self, join: Join, token: str) -> tuple[dict[str, Any], Signer, str]:
        if self.key is None:
            return read_unverified(token) or {}, Signer.NO_KEY, ""
        try:
            return self.key.read(token), Signer.US, ""
        except NotOurs as other:
            chosen = join.request.server_name is not None or join.request.url is not None
            return read_unverified(token) or {}, Signer.OTHER_SFU if chosen else Signer.MISMATCH, str(other)

    def named_user(self, join: Join, token: Token) -> str:
        """Who upstream has verified the caller to be."""
        return join.request.user or user_of(token.identity, join.request.device_id)

    async def issue(self, join: Join, answer: Answer, hold_id: str | None) -> Answer:
        """Record the token and rebuild it; without one the answer goes back as it came.

        :param hold_id: the seat that is held for it.
        """
        token = self.read(join, answer)
        if token is None:
            no_token(join, answer)
            return answer
        if not join.user:
            join.user = join.decision.user = self.named_user(join, token)
        if token.signer is Signer.OTHER_SFU:
            self._metrics.foreign_tokens.inc()
            join.decision.reason = "other_sfu"
            return answer
        granted, withheld = self._rebuild(join, answer, token)
        try:
            with join.log.stage(join.decision, Stage.RECORD):
                await self._record(join, token, hold_id, granted, withheld)
        except CancelledError:
            raise
        except Exception:
            join.log.failure(join.decision, "record")
        return answer

    def rebuild(self, join: Join, answer: Answer) -> Answer:
        """Rebuild a token that belongs to no room that we know. Nothing is recorded."""
        token = self.read(join, answer)
        if token is None or token.signer is Signer.OTHER_SFU:
            return answer
        join.unenforced("policy", "no_room")
        self._rebuild(join, answer, token)
        return answer

    async def _record(
        self,
        join: Join,
        token: Token,
        hold_id: str | None,
        granted: frozenset[Source] | None,
        withheld: frozenset[Source],
    ) -> None:
        """The hold is written before the token is sent."""
        device = join.request.device_id or ""
        issued = Issued(token.alias, token.identity, device)
        policy = join.policy
        if token.alias:
            slot = Slot(join.room_id, join.request.slot_id)
            await self._registry.learn(token.alias, slot, token.identity, join.user, device, granted, withheld)
        if self._checks.may_start(policy, join.user):
            await self._seats.start(join.room_id)
        if hold_id is not None:
            durable = policy.max_users is not None or self._checks.restricts_start(policy)
            await self._seats.issue(join.room_id, hold_id, issued, durable=durable)
        else:
            await self._seats.issue_without_seat(join.room_id, join.user, issued)

    def _rebuild(self, join: Join, answer: Answer, token: Token) -> tuple[frozenset[Source] | None, frozenset[Source]]:
        """Put the new token into the answer.

        :return: the token's ceiling (``None`` if unknown), and what was withheld.
        """
        policy = join.policy
        if not policy and not self.all_tokens:
            return _ceiling(token), NO_SOURCE
        if token.signer is Signer.MISMATCH:
            join.log.secret_mismatch(join.decision, token.fault)
            return None, NO_SOURCE
        if self.key is None or not token.alias:
            if policy:
                join.unenforced("token", "unreadable" if self.key is not None else token.signer.value)
            return None, NO_SOURCE
        try:
            allowed = policy.allowed_sources(join.user) if policy else EVERY_SOURCE
            new = rebuilt(token.claims, allowed, self.token_ttl, self._wall())
            if join.dry_run:
                self._metrics.dry_run_skipped.labels("narrow").inc()
                return new.granted, NO_SOURCE
            answer.body = compact({**token.content, "jwt": self.key.sign(new.claims)}).encode() + b"\n"
        except Exception:
            join.log.failure(join.decision, "token")
            return None, NO_SOURCE
        self._metrics.tokens_rebuilt.inc()
        return new.granted, new.withheld


def _ceiling(token: Token) -> frozenset[Source] | None:
    """What upstream granted with a token that is passed on as it came; ``None`` if that cannot be verified."""
    return ceiling_of(token.claims) if token.signer is Signer.US else None


def no_token(join: Join, answer: Answer) -> None:
    """Upstream issued no token: say so in the decision."""
    join.decision.reason = f"upstream_status_{answer.code}"
    if join.decision.verdict is Verdict.ALLOWED:
        join.decision.verdict = Verdict.FAILED
