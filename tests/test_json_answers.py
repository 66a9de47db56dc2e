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
