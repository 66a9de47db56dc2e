# SPDX-License-Identifier: Apache-2.0
"""JSON of any depth, parsed without recursion errors.

Every member of a room can send an event that is nested deeper than Python's parser follows, and some homeservers pass
it on. One such event must not make a whole answer unreadable.
"""

from __future__ import annotations

import json
import re
from typing import Any

DEEPEST = 100
"""Levels of an answer that are read; what is nested deeper is replaced by null. Events use about ten."""
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[{]|[\]}]', re.DOTALL)


def parse_json(text: bytes) -> Any:
    """The value of a JSON text, without what is nested deeper than `DEEPEST`.

    :raises ValueError: it is no JSON.
    """
    try:
        value = json.loads(text)
        too_deep = text.count(b"[") + text.count(b"{") > DEEPEST and _is_deeper(value)
    except RecursionError:
        too_deep = True
    return json.loads(_pruned(text)) if too_deep else value


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
