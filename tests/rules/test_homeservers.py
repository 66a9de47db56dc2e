# SPDX-License-Identifier: Apache-2.0
"""Lists of homeservers: names, globs, ports and IPv6 literals."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotusguard.rules.homeservers import ALL_HOMESERVERS, HomeserverList


@pytest.mark.parametrize(
    ("listed", "allowed", "refused"),
    [
        ("example.org", ["example.org", "EXAMPLE.org"], ["example.com", "a.example.org", "example.org.evil", ""]),
        ("example.org", [], ["exampleXorg"]),
        ("Example.ORG", ["example.org"], ["example.net"]),
        ("*.example.org", ["a.example.org", "a.b.EXAMPLE.org"], ["example.org", "aexample.org", "a.example.org.evil"]),
        ("example.org, *.net ,, x.y", ["example.org", "a.net", "x.y"], ["net", "a.org", "x.z"]),
        ("chat?.org", ["chat1.org", "chatx.org"], ["chat.org", "chat12.org"]),
        ("example.org", ["example.org"], ["example.org:8448"]),
        ("example.org:8448", ["example.org:8448"], ["example.org", "example.org:8449"]),
        ("example.org:*", ["example.org:8448", "example.org:1"], ["example.org"]),
        ("[2001:db8::1]", ["[2001:db8::1]", "[2001:DB8::1]"], ["[2001:db8::2]", "2", "[2001:db8::1]:8448"]),
        ("[2001:db8::1]:8448", ["[2001:db8::1]:8448"], ["[2001:db8::1]"]),
        ("[2001:db8::*]", ["[2001:db8::1]", "[2001:db8::beef]"], ["[2001:db9::1]"]),
        ("192.0.2.1", ["192.0.2.1"], ["192.0.2.10", "19200201"]),
        ("**", ["anything", "a:1", "[::1]", ""], []),
        ("example.org", [], ["example.org\n", "\nexample.org", "eхample.org"]),
    ],
)  # fmt: skip
def test_server_names_are_compared_whole_and_without_case(listed: str, allowed: list[str], refused: list[str]) -> None:
    homeservers = HomeserverList.parse(listed)
    assert [name for name in allowed if not homeservers.allows(name)] == []
    assert [name for name in refused if homeservers.allows(name)] == []


def test_users_belong_to_the_server_after_the_first_colon() -> None:
    homeservers = HomeserverList.parse("example.org:8448,[::1]:8448")
    assert homeservers.allows_user("@alice:example.org:8448")
    assert homeservers.allows_user("@alice:[::1]:8448")
    assert not homeservers.allows_user("@alice:example.org")
    assert not homeservers.allows_user("example.org:8448")
    assert not homeservers.allows_user("@eve:evil.net:example.org:8448")


def test_star_allows_all() -> None:
    assert ALL_HOMESERVERS.allows_all
    assert ALL_HOMESERVERS.allows_user("@alice:anywhere")
    assert HomeserverList.parse("example.org,*").allows_all
    assert not HomeserverList.parse("*.org").allows_all
    assert HomeserverList.parse("*") == ALL_HOMESERVERS


@pytest.mark.parametrize(
    "text", ["", " ", ",", "https://example.org", "@alice:example.org", "a b", "exämple.org", "[::1", "a/b", "x" * 256]
)
def test_text_that_is_not_a_list_of_server_names_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"homeserver|server name"):
        HomeserverList.parse(text)


def test_many_stars_do_not_slow_the_comparison() -> None:
    homeservers = HomeserverList.parse("*a" * 40 + "*b")
    assert not homeservers.allows("a" * 255)
    assert homeservers.allows("a" * 254 + "b")


NAMES = st.text(alphabet="ab.:", max_size=8)


@given(st.text(alphabet="ab.*?", min_size=1, max_size=8), NAMES)
def test_globs_match_as_shells_match_them(pattern: str, name: str) -> None:
    assert HomeserverList.parse(pattern).allows(name) == fnmatchcase(name, pattern)
