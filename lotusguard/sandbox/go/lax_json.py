# SPDX-License-Identifier: Apache-2.0
"""JSON decoding as lax as Go's ``encoding/json`` into a struct. Sandbox.

From the package's own documentation and source: keys match without case under Unicode's simple folding
(so ``ſ`` is an s and the Kelvin sign a k), of duplicates the last wins and nested structs merge, only the
first value of a stream is read, bad UTF-8 and lone surrogates become U+FFFD, ``null`` leaves a plain field
alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Schema: TypeAlias = Any
"""``str``, ``int``, ``float``, ``bool`` or ``object`` (anything), ``[element]``, ``MapOf(element)``,
``{key: Schema}`` for a struct, or ``Pointer(Schema)``."""

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_FOLDED = {ord("ſ"): "s", ord("\u212a"): "k"} | {c: chr(c + 32) for c in range(ord("A"), ord("Z") + 1)}
_INT64 = range(-(2**63), 2**63)


class NotDecodable(Exception):
    """Go's decoder would have returned an error."""


@dataclass(frozen=True)
class Pointer:
    """A field that is ``None`` if it is absent or ``null``."""

    to: Schema


@dataclass(frozen=True)
class MapOf:
    """A Go map: keys are kept as they are, and all values have one type."""

    of: Schema


class _Number(str):
    """The literal of a number, before it is given a type."""


class _Pairs(list[tuple[str, Any]]):
    """An object, with duplicate keys in order."""


def decode(
    body: bytes, schema: Mapping[str, Schema], *, known_only: bool = True, whole: bool = False
) -> dict[str, Any]:
    """Read the first JSON value of ``body`` into the struct that ``schema`` describes.

    :param known_only: Go's ``DisallowUnknownFields``.
    :param whole: whether nothing may follow, as with ``Unmarshal``; a ``Decoder`` does not look further.
    :return: every field of the schema, with its zero value when absent.
    :raises NotDecodable: where Go would give an error.
    """
    decoded: dict[str, Any] = _zero(schema)
    _fill(decoded, first_value(body, whole=whole), schema, known_only)
    return decoded


def first_value(body: bytes, *, whole: bool = False) -> Any:
    """The first value in ``body``, with objects as lists of pairs and numbers as their literals."""
    # Each byte that is not UTF-8 becomes a surrogate here, and a U+FFFD in the end, as in Go.
    text = body.decode("utf-8", "surrogateescape").lstrip(" \t\r\n")
    try:
        value, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError) as error:
        raise NotDecodable(str(error)) from None
    if whole and text[end:].strip(" \t\r\n"):
        raise NotDecodable("something after the top-level value")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"invalid literal {name}")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_Pairs, parse_int=_Number, parse_float=_Number, parse_constant=_no_constant
)


def _fold(key: str) -> str:
    return key.translate(_FOLDED)


def _text(value: str) -> str:
    return _LONE_SURROGATE.sub("\ufffd", value)


def _zero(schema: Schema) -> Any:
    if isinstance(schema, dict):
        return {key: _zero(inner) for key, inner in schema.items()}
    if isinstance(schema, list):
        return []
    if isinstance(schema, MapOf):
        return {}
    if isinstance(schema, Pointer) or schema is object:
        return None
    return schema()


def _fill(into: dict[str, Any], value: Any, schema: Mapping[str, Schema], known_only: bool) -> None:
    if value is None:
        return
    if not isinstance(value, _Pairs):
        raise NotDecodable("not an object")
    by_fold = {_fold(key): key for key in schema}
    for raw_key, inner in value:
        key = by_fold.get(_fold(_text(raw_key)))
        if key is None:
            if known_only:
                raise NotDecodable(f"unknown field {raw_key!a}")
            continue
        into[key] = _read(into[key], inner, schema[key], known_only)


def _read(before: Any, value: Any, schema: Schema, known_only: bool) -> Any:
    """The value of a field after ``value`` was decoded into it."""
    if isinstance(schema, Pointer):
        if value is None:
            return None
        return _read(_zero(schema.to) if before is None else before, value, schema.to, known_only)
    if isinstance(schema, dict):
        _fill(before, value, schema, known_only)
        return before
    if isinstance(schema, list):
        if value is None:
            return []
        if not isinstance(value, list) or isinstance(value, _Pairs):
            raise NotDecodable("not an array")
        return [_read(_zero(schema[0]), element, schema[0], known_only) for element in value]
    if isinstance(schema, MapOf):
        if value is None:
            return {}
        if not isinstance(value, _Pairs):
            raise NotDecodable("not an object")
        return before | {_text(key): _read(_zero(schema.of), inner, schema.of, known_only) for key, inner in value}
    return before if value is None else _scalar(value, schema)


def _scalar(value: Any, schema: Schema) -> Any:
    if schema is object:
        return value
    if schema is str and isinstance(value, str) and not isinstance(value, _Number):
        return _text(value)
    if schema is bool and isinstance(value, bool):
        return value
    if schema is int and isinstance(value, _Number):
        # strconv.ParseInt on the literal: neither 1.0 nor 1e3 is an integer.
        digits = value.removeprefix("-")
        if digits.isdigit() and len(digits) < 20 and int(value) in _INT64:
            return int(value)
    # The JWT library reads dates as json.Number, which accepts a quoted number too.
    if schema is float and isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    raise NotDecodable(f"wrong type for {schema.__name__}")
