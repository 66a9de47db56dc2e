# SPDX-License-Identifier: Apache-2.0
"""Which headers are for the next hop only: the same for requests that are forwarded and for answers to them."""

from __future__ import annotations

from twisted.web.http_headers import Headers

_HOP_BY_HOP = frozenset(
    name for name, _ in Headers({name: [] for name in (
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
        b"trailer", b"trailers", b"transfer-encoding", b"upgrade", b"content-length", b"expect",
    )}).getAllRawHeaders()
)  # fmt: skip
"""RFC 9110 §7.6.1, and what each hop frames anew: length and ``100-continue``. Written as `Headers` writes all names,
however they came."""


def connection_options(headers: Headers) -> set[bytes]:
    """The names in ``Connection``, in lower case: options, and headers that are for the next hop only."""
    values = headers.getRawHeaders(b"connection") or ()
    return {option.strip().lower() for value in values for option in value.split(b",")}


def keep_end_to_end(headers: Headers) -> None:
    """Remove all headers that are meant for the next hop only."""
    names = [name for name, _ in headers.getAllRawHeaders()]
    removed = _HOP_BY_HOP.intersection(names)
    if b"Connection" in removed:
        options = connection_options(headers)
        removed |= {name for name in names if name.lower() in options}
    for name in removed:
        headers.removeHeader(name)
