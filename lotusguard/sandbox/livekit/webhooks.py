# SPDX-License-Identifier: Apache-2.0
"""LiveKit's webhook sender: one queue per room and address, in order, signed, retried for a while. Sandbox.

Read from livekit/protocol's ``webhook/resource_url_notifier.go`` and hashicorp's retryablehttp, which it uses.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from google.protobuf import json_format
from livekit.protocol.webhook import WebhookEvent
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.web.client import Agent, FileBodyProducer, HTTPConnectionPool
from twisted.web.http_headers import Headers

from lotusguard.sandbox.livekit.tokens import mint
from lotusguard.sandbox.wire import answer_of

log = Logger()

RETRY_AFTER = (1, 2, 4, 8)
MAX_AGE = 30
"""Seconds in the queue after which an event is dropped; checked once, before the first attempt."""
MAX_DEPTH = 200
"""Events that wait in one queue; further ones are dropped."""
TOKEN_VALID_FOR = 300


@dataclass(frozen=True)
class Sent:
    """One attempt. ``status`` is 0 if there was no answer; ``seconds`` is how long it took."""

    url: str
    event: WebhookEvent
    status: int
    seconds: float


@dataclass(frozen=True)
class _Waiting:
    event: WebhookEvent
    since: float


class WebhookSender:
    """Sends events to every address.

    :param now: seconds since the epoch, for tokens.
    :ivar urls: the addresses to send to; may be changed at any time.
    :ivar attempts: every attempt, in order.
    :ivar on_attempt: called with each attempt when it has ended.
    :ivar dropped: events that were not delivered.
    :ivar secret: signs the webhooks; may be changed at any time.
    """

    def __init__(
        self,
        reactor: Any,
        clock: Any,
        pool: HTTPConnectionPool,
        *,
        key: str,
        secret: str,
        urls: Iterable[str] = (),
        now: Callable[[], float] = time.time,
    ) -> None:
        self.urls = list(urls)
        self.attempts: deque[Sent] = deque(maxlen=10_000)
        self.on_attempt: list[Callable[[Sent], None]] = []
        self.dropped: deque[WebhookEvent] = deque(maxlen=10_000)
        self._clock = clock
        self.secret = secret
        self._key, self._now = key, now
        self._agent = Agent(reactor, connectTimeout=10, pool=pool)
        self._queues: dict[tuple[str, str], deque[_Waiting]] = {}
        self._workers: dict[tuple[str, str], Deferred[None]] = {}
        self._draining: list[Deferred[None]] = []

    def send(self, event: WebhookEvent) -> None:
        """Append an event to its room's queue, for every address."""
        for url in self.urls:
            key = (url, event.room.name)
            queue = self._queues.setdefault(key, deque())
            if len(queue) >= MAX_DEPTH:
                self.dropped.append(event)
                continue
            copy = WebhookEvent()
            copy.CopyFrom(event)
            queue.append(_Waiting(copy, self._clock.seconds()))
            if key not in self._workers:
                self._workers[key] = worker = Deferred.fromCoroutine(self._work(key))
                worker.addErrback(self._failed).addBoth(self._done, key)

    def drained(self) -> Deferred[None]:
        """Fires when every queue is empty and nothing is being sent."""
        done: Deferred[None] = Deferred()
        self._draining.append(done)
        self._tell_drained()
        return done

    def stop(self) -> None:
        """Drop everything that is queued or being sent."""
        self._queues.clear()
        for worker in list(self._workers.values()):
            worker.cancel()

    def authorization(self, body: bytes) -> str:
        """The ``Authorization`` header for a body: a token with its hash, without ``Bearer``."""
        digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
        return mint(self._key, self.secret, {"sha256": digest}, now=self._now(), valid_for=TOKEN_VALID_FOR)

    async def _work(self, key: tuple[str, str]) -> None:
        # Whoever emits an event finishes their work before the event is sent.
        await deferLater(self._clock, 0)
        queue = self._queues[key]
        while queue:
            waiting = queue.popleft()
            too_old = self._clock.seconds() - waiting.since > MAX_AGE
            if too_old or not await self._deliver(key[0], waiting.event):
                self.dropped.append(waiting.event)

    async def _deliver(self, url: str, event: WebhookEvent) -> bool:
        body = body_of(event)
        headers = Headers(
            {
                "Authorization": [self.authorization(body)],
                "Content-Type": ["application/webhook+json"],
                "User-Agent": ["LiveKit"],
            }
        )
        for wait in (*RETRY_AFTER, None):
            began = self._clock.seconds()
            status = await self._post(url, headers, body)
            sent = Sent(url, event, status, self._clock.seconds() - began)
            self.attempts.append(sent)
            for told in self.on_attempt:
                told(sent)
            if status and status != 429 and (status < 500 or status == 501):
                return True
            if wait is not None:
                await deferLater(self._clock, wait)
        return False

    async def _post(self, url: str, headers: Headers, body: bytes) -> int:
        try:
            response = await self._agent.request(b"POST", url.encode(), headers, FileBodyProducer(BytesIO(body)))
            await answer_of(response)
        except CancelledError:
            raise
        except Exception as error:
            log.debug("webhook to {url} failed: {error}", url=url, error=error)
            return 0
        return int(response.code)

    def _failed(self, failure: Any) -> None:
        if not failure.check(CancelledError):
            log.failure("webhook queue failed", failure)

    def _done(self, _: None, key: tuple[str, str]) -> None:
        del self._workers[key]
        self._queues.pop(key, None)
        self._tell_drained()

    def _tell_drained(self) -> None:
        if not self._workers:
            draining, self._draining = self._draining, []
            for done in draining:
                done.callback(None)


def body_of(event: WebhookEvent) -> bytes:
    """The body that is sent and signed: camelCase, without zero values, int64 as strings."""
    return json_format.MessageToJson(event, indent=None).encode()
