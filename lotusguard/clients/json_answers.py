# SPDX-License-Identifier: Apache-2.0
"""JSON answers, parsed whatever events are in them.

Every member of a room can send an event that is nested deeper, or has a longer number, than Python's parser accepts,
and some homeservers pass it on. One such event must not make a whole answer unreadable. The same holds for text that
Python accepts and nothing else: half of a surrogate pair can be neither sent, nor stored, nor shown.
"""

from __future__ import annotations

import json
import re
from typing import Any

DEEPEST = 100
"""Levels of an answer that are read; what is nested deeper is replaced by null. Events use about ten."""
LONGEST_INTEGER = 400
_HEX = "[0-9a-fA-F]{2}"
_ESCAPE = re.compile(rf"\\(?:u[dD][89abAB]{_HEX}\\u[dD][c-fC-F]{_HEX}|(u[dD][89a-fA-F]{_HEX})|.)", re.DOTALL)
"""A backslash and what it escapes, as far as that matters: a surrogate pair, half of one, or any character."""
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[{]|[\]}]', re.DOTALL)


def parse_json(text: bytes) -> Any:
    """The value of a JSON text. What is nested deeper than `DEEPEST` is null, and so is an integer of more than
    `LONGEST_INTEGER` digits if Python refuses one. Half of a surrogate pair becomes U+FFFD.

    :raises ValueError: it is not JSON.
    """
    try:
        value = _parse(text)
        too_deep = text.count(b"[") + text.count(b"{") > DEEPEST and _is_deeper(value)
    except RecursionError:
        too_deep = True
    return _parse(_pruned(text)) if too_deep else value


def _parse(encoded: bytes) -> Any:
    text = encoded.decode("utf-8-sig", "replace")
    if "\\ud" in text or "\\uD" in text:
        text = _ESCAPE.sub(_whole, text)
    try:
        return json.loads(text)
    except ValueError:
        return json.loads(text, parse_int=_integer)


def _whole(escape: re.Match[str]) -> str:
    return escape[0] if escape[1] is None else "\N{REPLACEMENT CHARACTER}"


def _integer(digits: str) -> int | None:
    return int(digits) if len(digits) <= LONGEST_INTEGER else None


def _is_deeper(value: Any) -> bool:
    """Whether a parsed value has more than `DEEPEST` levels."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def _pruned(text: bytes) -> bytes:
    """The text with null in place of every object and array below `DEEPEST` levels."""
    kept: list[bytes] = []
    depth, copied = 0, 0
    for token in _TOKEN.finditer(text):
        match token[0]:
            case b"[" | b"{":
                depth += 1
                if depth == DEEPEST + 1:
                    kept += (text[copied : token.start()], b"null")
            case b"]" | b"}":
                if depth == DEEPEST + 1:
                    copied = token.end()
                depth -= 1
    return b"".join(kept) + text[copied:] if depth <= DEEPEST else b""
