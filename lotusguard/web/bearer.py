# SPDX-License-Identifier: Apache-2.0
"""Bearer tokens on the listeners that want one."""

from __future__ import annotations

import hmac

from twisted.web.http import Request


def has_bearer(request: Request, token: str) -> bool:
    """Whether a request carries this token, compared in constant time. ``""`` is nobody's token."""
    given = request.requestHeaders.getRawHeaders(b"authorization") or []
    wanted = b"Bearer " + token.encode("utf-8")
    return bool(token) and len(given) == 1 and hmac.compare_digest(given[0], wanted)
