# SPDX-License-Identifier: Apache-2.0
"""JSON that only one reading is possible of; made to be forwarded to Go's lax ``encoding/json``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from attrs import frozen


class Unreadable(Exception):
    """A body that cannot be read in exactly one way. The text says why, without quoting the body."""


def folded(key: str) -> str:
    """A key as Go's ``encoding/json`` compares it: without case, with ``ſ`` as s and the Kelvin sign as k."""
    return key.replace("\u017f", "s").replace("\u212a", "k").lower()


@frozen
class KnownKeys:
    """The keys of an object that upstream reads. Another spelling of one is refused, an unknown key is not."""

    names: frozenset[str]
    folded: frozenset[str]

    @classmethod
    def of(cls, names: Iterable[str]) -> KnownKeys:
        """Known keys by their names."""
        names = frozenset(names)
        return cls(names, frozenset(map(folded, names)))


def strict_object(body: bytes, keys: Mapping[str, KnownKeys]) -> dict[str, Any]:
    """The JSON object that a body is.

    :param keys: the keys that upstream knows, by the place of their object: ``""`` is the outermost.
    :raises Unreadable: it is not one, or another parser could read it differently.
    """
    try:
        content = _decoder.decode(body.decode("utf-8"))
    except UnicodeDecodeError:
        raise Unreadable("it is not UTF-8") from None
    except RecursionError:
        raise Unreadable("it is nested too deeply") from None
    except ValueError:
        raise Unreadable("it is not one JSON value") from None
    if not isinstance(content, dict):
        raise Unreadable("it is not a JSON object")
    for place, known in keys.items():
        part = content.get(place) if place else content
        if isinstance(part, dict):
            for key in part:
                if key not in known.names and folded(key) in known.folded:
                    raise Unreadable("a key differs from a known one only by case")
        elif part is not None:
            raise Unreadable("something else is where an object is expected")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise Unreadable("a key is there twice")
    return content


def _constant(name: str) -> NoReturn:
    raise Unreadable("NaN and Infinity are not JSON")


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant)
_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def serialised(content: dict[str, Any]) -> bytes:
    """Our own writing of what was read. :raises Unreadable: JSON in UTF-8 cannot express it."""
    try:
        return _encoder.encode(content).encode()
    except UnicodeEncodeError:
        raise Unreadable("it holds a lone surrogate") from None
    except (ValueError, RecursionError):
        raise Unreadable("it holds what JSON cannot express") from None
