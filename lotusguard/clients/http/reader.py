# SPDX-License-Identifier: Apache-2.0
"""Reads answers from the bytes of a connection.

httptools (llhttp, the parser of Node.js) does it. Twisted's own client takes almost three times as many instructions
for a call. llhttp is also stricter: it rejects answers that have two lengths, a length and a transfer coding, or a NUL
in a header.
"""

from __future__ import annotations

from attrs import Factory, define, field
from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

LARGEST_FRAME = 64 * 1024
"""Bytes that an answer may have besides its body: its head, interim (1xx) answers before it, and trailers."""
EACH_CHUNK = 16
"""Bytes that each part of a body may have besides, for the length of a chunk."""
_WITHOUT_BODY = (204, 304)


class Malformed(Exception):
    """What arrived cannot be read as an answer."""


@define(eq=False)
class Reader:
    """Reads one answer after the other. What httptools calls begins with ``on_``.

    :ivar headers: those of the head, as they are written.
    :ivar parts: of the body, until somebody takes them.
    :ivar length: bytes of the body, if the head says so.
    :ivar coding: the transfer coding, if there is one.
    :ivar has_head: whether the head is complete.
    :ivar complete: whether the answer is.
    :ivar keeps_open: whether the connection stays open after it.
    :ivar surplus: whether something followed the answer, for which nobody asked.
    """

    code: int = 0
    phrase: bytes = b""
    headers: list[tuple[bytes, bytes]] = Factory(list)
    parts: list[bytes] = Factory(list)
    length: int | None = None
    coding: bytes = b""
    has_head: bool = False
    complete: bool = False
    keeps_open: bool = False
    surplus: bool = False
    _version: str = ""
    _frame_size: int = 0
    _parser: HttpResponseParser = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._parser = HttpResponseParser(self)

    @property
    def has_begun(self) -> bool:
        """Whether anything of the answer is here, while its head is not complete."""
        return self._frame_size > 0

    def feed(self, data: bytes) -> None:
        """:raises Malformed:"""
        if self._frame_size >= LARGEST_FRAME:
            raise Malformed("the head is too long, or the trailers are")
        self._frame_size += len(data)
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            if not self.complete:
                raise Malformed(str(error)) from None
            self.surplus = True
        if self.coding not in (b"", b"chunked"):
            raise Malformed(f"unknown transfer coding {self.coding!r}")
        if self.has_head and self._version not in ("1.0", "1.1"):
            raise Malformed(f"unknown version {self._version}")

    def next(self) -> None:
        """Make ready for the next answer."""
        self.phrase, self.headers, self.parts, self.length, self.coding = b"", [], [], None, b""
        self.has_head, self.complete, self._frame_size = False, False, 0

    def close(self) -> None:
        """The reader and its parser refer to each other, and only the garbage collector would free them."""
        del self._parser

    def on_message_begin(self) -> None:
        self.surplus = self.complete

    def on_status(self, phrase: bytes) -> None:
        if not self.has_head:
            self.phrase += phrase

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.has_head:
            return  # a trailer
        value = value.rstrip(b" \t")
        self.headers.append((name, value))
        lowered = name.lower()
        if lowered == b"content-length":
            self.length = int(value)
        elif lowered == b"transfer-encoding":
            self.coding += value.lower()  # two of them are none that we know

    def on_headers_complete(self) -> None:
        if not self.has_head:
            self.code, self._version = self._parser.get_status_code(), self._parser.get_http_version()
            self.has_head = self.code >= 200

    def on_body(self, part: bytes) -> None:
        self._frame_size -= len(part) + EACH_CHUNK
        if not self.complete:
            self.parts.append(part)

    def on_message_complete(self) -> None:
        if self.complete:
            return
        if self.has_head:
            self.complete = True
            # a body that such an answer has all the same would be read as the next answer
            has_none = self.code not in _WITHOUT_BODY or not (self.length or self.coding)
            self.keeps_open = has_none and self._parser.should_keep_alive()
        else:  # an interim answer
            self.phrase, self.headers, self.length, self.coding = b"", [], None, b""
