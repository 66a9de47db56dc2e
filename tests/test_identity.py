# SPDX-License-Identifier: Apache-2.0
"""Identities and aliases: the vectors of MSC4195 and lk-jwt-service, and the traps in user IDs."""

from __future__ import annotations

import pytest

from lotusguard.rules.identity import base_identities, room_alias, server_of, user_of


@pytest.mark.parametrize(
    ("room", "slot", "alias"),
    [
        ("!room:example.org", "m.call#ROOM", "TK4o8wNCXi5t5936bOvIzE/X3XFc7cgp3jGRDqK0j5E"),
        ("!roomid:example.com", "slot1234", "O8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3qSc"),
    ],
)
def test_aliases_are_upstreams(room: str, slot: str, alias: str) -> None:
    assert room_alias(room, slot) == alias


def test_aliases_are_escaped_as_go_escapes() -> None:
    from lotusguard.sandbox.lk_jwt_service.requests import room_alias as upstreams

    for slot in ("a<b>&c", "\u2028\u2029", "ä€😀", '"\\\x01\n'):
        assert room_alias("!r:x", slot) == upstreams("!r:x", slot, "0.4.3")


@pytest.mark.parametrize(
    ("identity", "user"),
    [
        ("@alice:example.org:DEVICE", "@alice:example.org"),
        ("@alice:example.org:8448:DEVICE", "@alice:example.org:8448"),
        ("@alice:example.org:", "@alice:example.org"),
        ("@alice:[2001:db8::1]:8448:DEVICE", "@alice:[2001:db8::1]:8448"),
        ("@alice:[2001:db8::1]:DEVICE", "@alice:[2001:db8::1]"),
        ("@alice:[2001:db8::1]", "@alice:[2001:db8::1]"),
        ("@alice:example.org", "@alice:example.org"),
        ("@alice", "@alice"),
        ("YrxuWaR+gvn98aOWeDBbgKTPaUDOGxY5XI3xcFmNN/A", "YrxuWaR+gvn98aOWeDBbgKTPaUDOGxY5XI3xcFmNN/A"),
        ("somebody:else:entirely", "somebody:else:entirely"),
    ],
)
def test_matrix_user_is_what_stands_before_the_device(identity: str, user: str) -> None:
    assert user_of(identity) == user


def test_the_device_that_was_asked_for_may_hold_colons() -> None:
    assert user_of("@alice:example.org:1:X", "1:X") == "@alice:example.org"
    assert user_of("@alice:example.org:", "") == "@alice:example.org"


def test_a_server_name_may_carry_a_port() -> None:
    assert server_of("@alice:example.org:8448") == "example.org:8448"
    assert server_of("@alice:[::1]:8448") == "[::1]:8448"
    assert server_of("alice") == ""


def test_suffixes_are_taken_off_one_by_one() -> None:
    assert list(base_identities("@a:b:DEV#x#y")) == ["@a:b:DEV#x#y", "@a:b:DEV#x", "@a:b:DEV"]
    assert list(base_identities("hash")) == ["hash"]
