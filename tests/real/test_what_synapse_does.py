# SPDX-License-Identifier: Apache-2.0
"""Facts about Synapse that the guard relies on."""

from __future__ import annotations

from urllib.parse import quote

from tests.real.processes import http
from tests.real.stack import Stack


def ask(stack: Stack, path: str, user: str = "") -> tuple[int, object]:
    answer = http("GET", stack.homeserver_url + path, bearer=stack.tokens.get(user, ""))
    return answer.status, answer.content


def test_an_admin_reads_state_of_one_type_in_a_room_that_they_have_not_joined(stack: Stack) -> None:
    room_id = stack.room(7, allow_camera=False)
    path = f"/_synapse/admin/v1/rooms/{quote(room_id, safe='')}/state?type=io.lotus.voice_limit"
    status, content = ask(stack, path, stack.server_admin)
    assert status == 200
    assert isinstance(content, dict)
    (event,) = content["state"]
    assert (event["type"], event["state_key"], event["content"]) == ("io.lotus.voice_limit", "", {"max_users": 7})
    assert ask(stack, path, stack.moderator)[0] == 403
    assert ask(stack, path)[0] == 401


def test_an_unknown_room_is_404(stack: Stack) -> None:
    assert ask(stack, "/_synapse/admin/v1/rooms/!nowhere:there/state?type=x", stack.server_admin)[0] == 404


def test_whoami_tells_the_server_name_with_its_port(stack: Stack) -> None:
    status, content = ask(stack, "/_matrix/client/v3/account/whoami", stack.server_admin)
    assert status == 200
    assert isinstance(content, dict)
    assert content["user_id"] == f"@server_admin:{stack.server_name}"


def test_an_openid_token_names_its_user_and_may_be_used_again(stack: Stack) -> None:
    (alice,) = stack.users("alice")
    token = stack.openid_token(alice)
    assert (token["expires_in"], token["matrix_server_name"]) == (3600, stack.server_name)
    path = "/_matrix/federation/v1/openid/userinfo?access_token="
    for _ in range(2):
        assert ask(stack, path + token["access_token"]) == (200, {"sub": alice})
    assert ask(stack, path + "nobodys")[0] == 401


def test_rooms_are_listed_page_by_page(stack: Stack) -> None:
    mine = {stack.room() for _ in range(3)}
    seen: set[str] = set()
    start: object = 0
    while start is not None:
        status, content = ask(stack, f"/_synapse/admin/v1/rooms?from={start}&limit=2", stack.server_admin)
        assert status == 200
        assert isinstance(content, dict)
        assert len(content["rooms"]) <= 2
        seen |= {room["room_id"] for room in content["rooms"]}
        start = content.get("next_batch")
    assert mine <= seen
