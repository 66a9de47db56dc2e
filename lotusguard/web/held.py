# SPDX-License-Identifier: Apache-2.0
"""Requests that are held while somebody waits in a lobby: silent at first, then an early head and white space.

A quick refusal is a real 403 that way, and no proxy gives up the request later. JSON may begin with white space.
"""

from __future__ import annotations

from attrs import define, field
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from lotusguard.web.answers import CORS
from lotusguard.web.site import GuardRequest

PUBLIC_SILENCE = 45.0
"""Seconds without a byte on the public listener: nginx gives up after 60."""
PROXIED_SILENCE = 20.0
"""The same where a homeserver proxies: Synapse waits 30 seconds for the head."""
SPACE_EVERY = 10.0
"""Seconds between two pieces of white space."""


@define(eq=False)
class HeldRequest:
    """One request that may have to wait. It implements `lotusguard.guard.joins.patience.Patience`.

    :param silence: seconds since its arrival after which the early head is sent.
    """

    _request: GuardRequest
    _clock: IReactorTime
    _silence: float
    _arrived: float = field(init=False)
    _next: IDelayedCall | None = field(init=False, default=None)

    def __attrs_post_init__(self) -> None:
        self._arrived = self._clock.seconds()

    @property
    def polls(self) -> bool:
        """Whether the client asks again by itself: ``Prefer: respond-async``, or ``?lobby=poll`` for browsers, whose
        preflight does not allow ``Prefer``."""
        preferences = b",".join(self._request.requestHeaders.getRawHeaders(b"prefer") or ())
        if b"respond-async" in {one.partition(b";")[0].strip().lower() for one in preferences.split(b",")}:
            return True
        return b"lobby=poll" in self._request.uri.partition(b"?")[2].split(b"&")

    def begin(self) -> None:
        """The request is held from now on."""
        if self._next is None:
            left = self._arrived + self._silence - self._clock.seconds()
            self._next = self._clock.callLater(max(0.0, left), self._send)

    def is_silent(self) -> bool:
        return not self._request.early_head

    def end(self) -> None:
        """The request is about to be answered, or its caller has disconnected."""
        if self._next is not None and self._next.active():
            self._next.cancel()

    def _send(self) -> None:
        request = self._request
        if request.channel is None:
            return
        if not request.early_head:
            request.early_head = True
            request.setResponseCode(200)
            request.setHeader(b"Content-Type", b"application/json")
            request.setHeader(b"X-Accel-Buffering", b"no")  # nginx passes each byte on at once
            route = request.token_route
            for name, value in CORS.items() if route is not None and route.cors else ():
                request.setHeader(name, value)
        request.write(b" ")
        self._next = self._clock.callLater(SPACE_EVERY, self._send)
