# SPDX-License-Identifier: Apache-2.0
"""``/sfu_webhook``: what the SFU tells upstream, and us beside it. Floor: web."""

from __future__ import annotations

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from lotusguard.clients.waiting import run_in_background
from lotusguard.guard.calls.enforcement import Enforcement
from lotusguard.metrics import Metrics
from lotusguard.rules.jwt import NotOurs, SfuKey
from lotusguard.rules.webhooks import verified_webhook
from lotusguard.web.site import GuardRequest

log = Logger()


class Webhooks:
    """Reads webhooks that are handed to upstream anyhow, whatever we think of them."""

    def __init__(self, enforcement: Enforcement, key: SfuKey | None, clock: IReactorTime, metrics: Metrics) -> None:
        self._enforcement = enforcement
        self._key = key
        self._clock = clock
        self._outcomes = metrics.webhooks

    def notice(self, request: GuardRequest, body: bytes) -> None:
        """Begin to act on a webhook if the SFU truly sent it; the answer to it does not wait for that.

        :param body: the raw bytes; the signature is over them.
        """
        if self._key is None:
            self._outcomes.labels("unverifiable").inc()
            return
        given = request.requestHeaders.getRawHeaders(b"authorization") or [b""]
        try:
            event = verified_webhook(given[0].decode("latin-1"), body, self._key, self._clock.seconds())
        except NotOurs as forged:
            self._outcomes.labels("forged").inc()
            log.warn(
                "a webhook from {peer} is not acted on: {reason}",
                peer=request.getClientIP(), reason=str(forged), event_name="webhook_forged",
            )  # fmt: skip
            return
        run_in_background(
            self._enforcement.noticed(event), lambda failure: log.failure("a webhook could not be worked on", failure)
        )
