# SPDX-License-Identifier: Apache-2.0
"""JSON as Go reads it: the table was checked against the running lk-jwt-service."""

from __future__ import annotations

from typing import Any

import pytest

from lotusguard.sandbox.go.lax_json import MapOf, NotDecodable, Pointer, decode

SCHEMA = {"room": str, "openid_token": {"access_token": str, "matrix_server_name": str, "expires_in": int}}


@pytest.mark.parametrize(
    ("body", "room"),
    [
        (b'{"room":"!a"}', "!a"),
        (b' \r\n\t{"room":"!a"}', "!a"),
        (b'{"room":"!open","ROOM":"!full"}', "!full"),
        (b'{"ROOM":"!full","room":"!open"}', "!open"),
        (b'{"room":"!a","room":"!b"}', "!b"),
        (b'{"r\\u006fom":"!a"}', "!a"),
        (b'{"room":"!a"} and so on', "!a"),
        (b'{"room":"!a"}{"room":"!b"}', "!a"),
        (b'{"room":"!a","room":null}', "!a"),
        (b'{"room":"\\ud800"}', "\ufffd"),
        (b'{"room":"\\udc00\\ud800x"}', "\ufffd\ufffdx"),
        (b'{"room":"\\ud83d\\ude00"}', "\U0001f600"),
        (b'{"room":"\xff\xe2\x82"}', "\ufffd\ufffd\ufffd"),
        (b"null", ""),
        (b"nullnull", ""),
        (b"{}", ""),
    ],
)
def test_lax_bodies_name_the_room_that_go_reads(body: bytes, room: str) -> None:
    assert decode(body, SCHEMA)["room"] == room


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'"x"',
        b"7",
        b'{"room":7}',
        b'{"room":true}',
        b'{"room":[]}',
        b'{"room":1,"room":"!a"}',
        b'{"room":NaN}',
        b'{"room":-Infinity}',
        b'{"room":"a\nb"}',
        b'{"room":"a",}',
        b"{'room':'a'}",
        b'{"room":"\\x"}',
        b'\xef\xbb\xbf{"room":"a"}',
        b'{"nope":1}',
        b'{"nope":null}',
        b'{"openid_token":"x"}',
        b'{"openid_token":{"nope":1}}',
        b'{"openid_token":{"expires_in":1.0}}',
        b'{"openid_token":{"expires_in":1e2}}',
        b'{"openid_token":{"expires_in":"3"}}',
        b'{"openid_token":{"expires_in":9223372036854775808}}',
        b'{"room":' + b"[" * 20_000,
        b'{"room":"a"',
    ],
)
def test_bodies_that_go_refuses(body: bytes) -> None:
    with pytest.raises(NotDecodable):
        decode(body, SCHEMA)


def test_duplicate_nested_objects_merge_also_across_case_variants() -> None:
    body = '{"openid_token":{"access_token":"x"},"OPENID_TO\u212aEN":{"matrix_\u017ferver_name":"y"}}'
    token = decode(body.encode(), SCHEMA)["openid_token"]
    assert token == {"access_token": "x", "matrix_server_name": "y", "expires_in": 0}


@pytest.mark.parametrize(("literal", "value"), [(b"-0", 0), (b"9223372036854775807", 2**63 - 1), (b"-5", -5)])
def test_integers(literal: bytes, value: int) -> None:
    body = b'{"openid_token":{"expires_in":%s}}' % literal
    assert decode(body, SCHEMA)["openid_token"]["expires_in"] == value


@pytest.mark.parametrize(
    ("body", "field", "value"),
    [
        (b'{"v":{"ok":true},"V":{}}', "v", {"ok": True}),
        (b'{"v":{"ok":true},"v":null}', "v", None),
        (b'{"v":{"ok":null}}', "v", {"ok": None}),
        (b'{"l":["a"],"L":["b","c"]}', "l", ["b", "c"]),
        (b'{"l":["a"],"l":null}', "l", []),
        (b'{"m":{"K":"1"},"m":{"k":"2"}}', "m", {"K": "1", "k": "2"}),
        (b'{"exp":"12"}', "exp", 12.0),
        (b'{"exp":1.5e1,"what":[{}]}', "exp", 15.0),
    ],
)
def test_pointers_lists_maps_and_dates(body: bytes, field: str, value: Any) -> None:
    schema = {"v": Pointer({"ok": Pointer(bool)}), "l": [str], "m": MapOf(str), "exp": Pointer(float)}
    assert decode(body, schema, known_only=False)[field] == value


def test_unmarshal_refuses_trailing_data() -> None:
    assert decode(b'{"room":"a"} \n', SCHEMA, whole=True)["room"] == "a"
    with pytest.raises(NotDecodable):
        decode(b'{"room":"a"}x', SCHEMA, whole=True)
