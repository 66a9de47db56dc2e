# SPDX-License-Identifier: Apache-2.0
"""Keeps open consoles up to date, with server-sent events."""

from __future__ import annotations

import json
from collections.abc import Callable

from attrs import define, field
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IPushProducer, IReactorTime
from twisted.internet.task import deferLater
from twisted.web.template import flattenString
from zope.interface import implementer

from lotusguard.web.console import pages
from lotusguard.web.console.answers import set_headers
from lotusguard.web.console.view import ConsoleView, Overview
from lotusguard.web.site import GuardRequest

UPDATE_EVERY = 2.0
"""Seconds between two looks at whether the overview has changed."""
SHARE = 0.02
"""Part of its time that a console may take up the guard: with many calls it is updated less often."""
KEEP_ALIVE = 20.0
"""Seconds after which an unchanged stream is sent a comment, so that proxies keep it open."""
STREAMS = 8
"""Consoles that may be kept up to date at the same time."""
STALLED = 60.0
"""Seconds for which a browser may read nothing, because its tab is suspended. Then its stream is closed; the browser
opens another one when it goes on."""


@implementer(IPushProducer)
@define(eq=False)
class _Reader:
    """The browser, as far as it reads what it is sent."""

    _clock: IReactorTime
    _stopped_at: float | None = field(default=None, init=False)

    @property
    def reads(self) -> bool:
        return self._stopped_at is None

    @property
    def stalled(self) -> bool:
        return self._stopped_at is not None and self._clock.seconds() - self._stopped_at >= STALLED

    def pauseProducing(self) -> None:
        """The browser does not read: what was sent last waits in memory."""
        if self._stopped_at is None:
            self._stopped_at = self._clock.seconds()

    def resumeProducing(self) -> None:
        """It has been read."""
        self._stopped_at = None

    def stopProducing(self) -> None:
        """The browser is gone; `Updates` is told by the request."""


@define(eq=False)
class Updates:
    """The overview's content, sent each time that it changes."""

    _view: ConsoleView
    _clock: IReactorTime
    _open: int = field(default=0, init=False)

    async def stream(self, request: GuardRequest, wanted: Callable[[], bool]) -> None:
        """:param wanted: whether the request's session still lasts."""
        if self._open >= STREAMS:
            request.setResponseCode(204)  # tells the browser not to ask again
            request.finish()
            return
        set_headers(request, b"text/event-stream")
        request.setHeader(b"X-Accel-Buffering", b"no")
        reader = _Reader(self._clock)
        request.site.in_flight.discard(request)  # an open console does not delay a stop
        self._open += 1
        try:
            request.registerProducer(reader, True)
            await self._send_changes(request, reader, wanted)
        except CancelledError:
            pass
        finally:
            self._open -= 1
            if request.channel is not None:
                request.unregisterProducer()

    async def _send_changes(self, request: GuardRequest, reader: _Reader, wanted: Callable[[], bool]) -> None:
        """While the browser does not read, nothing is sent; then the newest overview is."""
        gone: Deferred[None] = request.notifyFinish()
        gone.addErrback(lambda _: None)
        shown: Overview | None = None
        sent_at = self._clock.seconds()
        while not gone.called and wanted():
            if reader.stalled:
                request.channel.forceAbortClient()
                return
            if not reader.reads:
                await deferLater(self._clock, UPDATE_EVERY)
                continue
            began = self._clock.seconds()
            overview = await self._view.overview()
            if overview != shown:
                html = b"".join([await flattenString(None, part) for part in pages.live_part(overview)])
                if not gone.called:
                    request.write(b"data: " + json.dumps({"html": html.decode()}).encode() + b"\n\n")
                shown, sent_at = overview, began
            elif began - sent_at >= KEEP_ALIVE:
                request.write(b": nothing new\n\n")
                sent_at = began
            await deferLater(self._clock, pause_after(self._clock.seconds() - began))


def pause_after(took: float) -> float:
    """Seconds until the overview is made again. :param took: seconds that it took, which may have been waiting only."""
    return min(max(UPDATE_EVERY, took / SHARE), KEEP_ALIVE)
