# SPDX-License-Identifier: Apache-2.0
"""The access token of the guard's account."""

from __future__ import annotations

from attrs import define, field
from twisted.web.http_headers import Headers


@define(eq=False)
class AccessToken:
    """All clients of the homeserver share one, so that a new token counts for all of them at once.

    :ivar value: the token. :ivar headers: for a request without a body. :ivar json_headers: for one with a JSON body.
    """

    value: str = field(repr=False)
    headers: Headers = field(init=False, repr=False)
    json_headers: Headers = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.use(self.value)

    def use(self, token: str) -> None:
        """Use another token from now on."""
        bearer = [b"Bearer " + token.encode("utf-8")]
        self.value = token
        self.headers = Headers({b"Authorization": bearer})
        self.json_headers = Headers({b"Authorization": bearer, b"Content-Type": [b"application/json"]})
