# SPDX-License-Identifier: Apache-2.0
"""What the console's requests carry: the fields of a form or a query, and who sent it."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import parse_qs

from lotusguard.web.answers import Rejected, Reply
from lotusguard.web.site import GuardRequest

MOST_FIELDS = 20
BAD_FORM = Reply(400, "M_INVALID_PARAM", "The form has too many fields.")


def query(request: GuardRequest) -> Mapping[str, str]:
    """The fields of the query. :raises Rejected: there are too many."""
    return _last(request.uri.partition(b"?")[2])


def form(request: GuardRequest) -> Mapping[str, str]:
    """The fields of the body. :raises Rejected: there are too many."""
    return _last(request.body())


def _last(encoded: bytes) -> Mapping[str, str]:
    try:
        parsed = parse_qs(encoded.decode("utf-8", "replace"), max_num_fields=MOST_FIELDS)
    except ValueError:
        raise Rejected(BAD_FORM) from None
    return {name: values[-1] for name, values in parsed.items()}


def operator(request: GuardRequest) -> str:
    """Who acts, as an authenticating proxy says; else "operator"."""
    named = request.requestHeaders.getRawHeaders(b"x-forwarded-user") or [b"operator"]
    return named[0].decode("utf-8", "replace")[:255]
