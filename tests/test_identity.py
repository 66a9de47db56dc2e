# SPDX-License-Identifier: Apache-2.0
"""Identities and aliases: the vectors of MSC4195 and lk-jwt-service, and colons in user IDs."""

from __future__ import annotations

import base64
import hashlib

import pytest

from lotusguard.rules.identity import (
    alias_cache_info,
    base_identities,
    hashed_identities,
    is_matrix_user,
    is_short_name,
    legacy_identity,
    proxied_identities,
    room_alias,
    server_of,
    user_of,
)


@pytest.mark.parametrize(
    ("room", "slot", "alias"),
    [
        ("!room:example.org", "m.call#ROOM", "TK4o8wNCXi5t5936bOvIzE/X3XFc7cgp3jGRDqK0j5E"),
        ("!roomid:example.com", "slot1234", "O8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3qSc"),
    ],
)
def test_alias_is_the_one_upstream_gives(room: str, slot: str, alias: str) -> None:
    assert room_alias(room, slot) == alias


def test_alias_is_escaped_as_go_escapes() -> None:
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
def test_user_is_the_identity_without_the_device(identity: str, user: str) -> None:
    assert user_of(identity) == user


def test_device_that_was_asked_for_may_contain_colons() -> None:
    assert user_of("@alice:example.org:1:X", "1:X") == "@alice:example.org"
    assert user_of("@alice:example.org:", "") == "@alice:example.org"


def test_server_name_may_contain_a_port() -> None:
    assert server_of("@alice:example.org:8448") == "example.org:8448"
    assert server_of("@alice:[::1]:8448") == "[::1]:8448"
    assert server_of("alice") == ""


def test_suffixes_are_removed_one_by_one() -> None:
    assert list(base_identities("@a:b:DEV#x#y")) == ["@a:b:DEV#x#y", "@a:b:DEV#x", "@a:b:DEV"]
    assert list(base_identities("hash")) == ["hash"]


ALICE = "@alice:example.org"


def test_hashed_identities_are_those_of_the_specification() -> None:
    assert hashed_identities(ALICE, "DEVICE", "xyz") == {"YrxuWaR+gvn98aOWeDBbgKTPaUDOGxY5XI3xcFmNN/A"}
    assert proxied_identities(ALICE, "xyz") == {"cWKchGjQ+6aHLd6XrrpvvOEAigkd9+u/DaNp2oY8jNg"}


@pytest.mark.parametrize("character", "<>&\u2028\u2029")
def test_member_whose_name_go_escapes_may_have_either_identity(character: str) -> None:
    both = hashed_identities(ALICE, "DEVICE", f"x{character}")
    assert len(both) == 2
    canonical = f'["{ALICE}","DEVICE","x{character}"]'
    as_go = canonical.replace(character, f"\\u{ord(character):04x}")
    for text in (canonical, as_go):
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=") in both


def test_legacy_identity_leads_back_to_its_user() -> None:
    assert legacy_identity(ALICE, "DEVICE") == "@alice:example.org:DEVICE"
    assert user_of(legacy_identity("@alice:[::1]:8448", "A:B"), "A:B") == "@alice:[::1]:8448"


def test_names_are_measured_in_bytes() -> None:
    assert is_short_name("!" + "x" * 254)
    assert not is_short_name("!" + "x" * 255)
    assert is_short_name("ä" * 127)
    assert not is_short_name("ä" * 128)


def test_long_names_are_not_cached() -> None:
    before = alias_cache_info().currsize
    for number in range(50):
        assert room_alias(f"!{number}" + "x" * 1_000_000) != room_alias("!room:x", f"{number}" + "ä" * 128)
    assert alias_cache_info().currsize <= before + 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("@alice:example.org", True),
        ("@alice:example.org:8448", True),
        ("@alice:[2001:db8::1]:8448", True),
        ("@:example.org", True),
        (user_of("@alice:example.org:DEV:ICE"), False),
        ("TK4o8wNCXi5t5936bOvIzE", False),
        ("@alice", False),
        ("@alice:", False),
    ],
)
def test_names_that_can_be_matrix_users(name: str, expected: bool) -> None:
    assert is_matrix_user(name) is expected
