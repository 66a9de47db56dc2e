# SPDX-License-Identifier: Apache-2.0
"""JSON answers with what Python's parser refuses: deep nesting and long numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotusguard.clients.json_answers import DEEPEST, parse_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=60,
)


def nested(levels: int) -> bytes:
    return (
        b'{"a":' * (levels // 2) + b"[" * (levels - levels // 2) + b"]" * (levels - levels // 2) + b"}" * (levels // 2)
    )


def depth_of(value: Any) -> int:
    depth = 0
    while isinstance(value, dict | list) and value:
        depth, value = depth + 1, value["a"] if isinstance(value, dict) else value[0]
    return depth + isinstance(value, dict | list)


@given(VALUES)
def test_ordinary_values_are_read_as_they_are(value: Any) -> None:
    assert parse_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize("levels", [DEEPEST - 1, DEEPEST])
def test_value_of_allowed_depth_is_read_whole(levels: int) -> None:
    assert parse_json(nested(levels)) == json.loads(nested(levels))


@pytest.mark.parametrize("levels", [DEEPEST + 1, 500, 5_000, 30_000])
def test_only_what_is_nested_too_deeply_is_left_out(levels: int) -> None:
    text = b'{"first": ["\\"[[{", 1], "deep": ' + nested(levels) + b', "last": {"x": "]]\\\\"}}'
    value = parse_json(text)
    assert (value["first"], value["last"]) == (['"[[{', 1], {"x": "]]\\"})
    assert depth_of(value["deep"]) == DEEPEST - 1
    assert json.loads(json.dumps(value)) == value


@pytest.mark.parametrize("deep", [b"1", nested(5_000)])
def test_only_integers_that_are_too_long_are_left_out(deep: bytes) -> None:
    value = parse_json(b'{"long": ' + b"7" * 5_000 + b', "short": -12, "deep": ' + deep + b"}")
    assert (value["long"], value["short"]) == (None, -12)


@pytest.mark.parametrize("text", [b"", b"[", b"[" * 5_000, b"[" * 5_000 + b"]" * 4_999, b'{"a": nul}', b"]" * 300])
def test_what_is_no_json_is_an_error(text: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  (json's own)
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (rb'"bad \ud800 name"', "bad \ufffd name"),
        (rb'"\uDFFF\ud83d"', "\ufffd\ufffd"),
        (rb'"\uDE00\uD83D"', "\ufffd\ufffd"),
        (rb'"\ud83d\ud83d\ude00"', "\ufffd\U0001f600"),
        (rb'"\ud83d\ude00 \uD7FF\ue000"', "\U0001f600 \ud7ff\ue000"),
        (rb'"\\ud800 \\\ud800"', "\\ud800 \\\ufffd"),
        (b'"bad \xed\xa0\x80 name"', "bad \ufffd\ufffd\ufffd name"),
        (rb'{"\ud800": 1}', {"\ufffd": 1}),
    ],
)
def test_text_that_nobody_else_accepts_is_replaced(text: bytes, value: Any) -> None:
    assert parse_json(text) == value


@given(st.text(st.sampled_from('a\\u"\ud83d\ude00\U0001f600')), st.booleans())
def test_every_text_can_be_sent_and_stored(text: str, ascii_only: bool) -> None:
    read = parse_json(json.dumps(text, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"))
    assert not any("\ud800" <= each <= "\udfff" for each in read)
    assert [each for each in read if each in 'a\\u"'] == [each for each in text if each in 'a\\u"']
