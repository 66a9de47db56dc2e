# SPDX-License-Identifier: Apache-2.0
"""Bearer tokens on the listeners that want one."""

from __future__ import annotations

import hmac

from twisted.web.http import Request


def has_bearer(request: Request, token: str) -> bool:
    """Whether a request carries this token, compared in constant time. ``""`` is nobody's token."""
    given = request.requestHeaders.getRawHeaders(b"authorization") or []
    scheme, _, credentials = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    is_bearer = scheme.lower() == b"bearer"  # RFC 9110 §11.1
    return bool(token) and is_bearer and hmac.compare_digest(credentials.lstrip(b" "), token.encode("utf-8"))
