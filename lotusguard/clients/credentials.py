# SPDX-License-Identifier: Apache-2.0
"""Whether a dependency accepts our credentials: a revoked token is reported with the first call that shows it."""

from __future__ import annotations

from attrs import define
from prometheus_client import Gauge
from twisted.logger import Logger
from twisted.web.http_headers import Headers

log = Logger()

UNAUTHORIZED, FORBIDDEN = 401, 403


@define
class Credentials:
    """Remembers the last refusal of our credentials until a call with them succeeds.

    401 says that they are wrong: any success clears it. 403 says that they do not suffice for one API, such as
    ``/_synapse``: only a success of that API clears it.

    :ivar refused: ``status_401`` or ``status_403``; None while they are accepted, as far as we know.
    """

    _dependency: str
    _gauge: Gauge
    refused: str | None = None
    _api: bytes = b""

    def refuse(self, code: int, path: bytes) -> None:
        """The dependency refused our credentials with this status."""
        reason = f"status_{code}"
        if self.refused != reason:
            log.error(
                "{dependency} refuses our credentials: {reason}",
                dependency=self._dependency,
                reason=reason,
                event_name="credentials_refused",
            )
        self.refused = reason
        self._gauge.set(1)
        self._api = _api_of(path) if code == FORBIDDEN else b""

    def accept(self, path: bytes, headers: Headers) -> None:
        """A call succeeded; with which credentials, the headers of the request tell."""
        if self.refused is None or not headers.hasHeader(b"authorization") or not _api_of(path).startswith(self._api):
            return
        self.refused = None
        self._gauge.set(0)
        log.info(
            "{dependency} accepts our credentials again",
            dependency=self._dependency,
            event_name="credentials_accepted",
        )


def _api_of(path: bytes) -> bytes:
    """The first segment of a path, slashes included."""
    return b"/" + path.lstrip(b"/").partition(b"/")[0] + b"/"
