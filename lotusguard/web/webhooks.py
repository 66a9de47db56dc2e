# SPDX-License-Identifier: Apache-2.0
"""``/sfu_webhook``: LiveKit's webhooks are applied here and passed to upstream."""

from __future__ import annotations

from collections.abc import Callable

from attrs import define
from twisted.logger import Logger

from lotusguard.clients.waiting import run_in_background
from lotusguard.guard.calls.changes import CallChanges
from lotusguard.metrics import Metrics
from lotusguard.rules.jwt import NotOurs, SfuKey
from lotusguard.rules.webhooks import read_webhook
from lotusguard.web.site import GuardRequest

log = Logger()


@define
class Webhooks:
    """Acts on webhooks. They are relayed to upstream in any case.

    :param now: seconds since the epoch by LiveKit's clock.
    :param key: the key that LiveKit signs them with; without it none can be verified.
    """

    _changes: CallChanges
    key: SfuKey | None
    _now: Callable[[], float]
    _metrics: Metrics

    def handle(self, request: GuardRequest, body: bytes) -> None:
        """Begin to act on a webhook if LiveKit signed it; the answer to it does not wait for that.

        :param body: the raw bytes, which the signature covers.
        """
        if self.key is None:
            self._metrics.webhooks.labels("unverifiable").inc()
            return
        given = request.requestHeaders.getRawHeaders(b"authorization") or [b""]
        try:
            event = read_webhook(given[0].decode("latin-1"), body, self.key, self._now())
        except NotOurs as forged:
            self._metrics.webhooks.labels("forged").inc()
            log.warn(
                "ignored a webhook from {peer}: {reason}",
                peer=request.getClientIP(), reason=str(forged), event_name="webhook_forged",
            )  # fmt: skip
            return
        run_in_background(
            self._changes.handle_webhook(event), lambda failure: log.failure("could not act on a webhook", failure)
        )
