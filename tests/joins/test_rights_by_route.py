# SPDX-License-Identifier: Apache-2.0
"""Every power level, source and route over the wire: the token of each route grants what the level allows."""

from __future__ import annotations

import json

import pytest
import pytest_twisted

from lotusguard.clients.http import Answer
from lotusguard.sandbox.demo.sandbox import Sandbox
from tests.calls import ALICE, BOB, room_of
from tests.conftest import StartSandbox
from tests.joins.helpers import claims_of

SOURCES = ("microphone", "camera", "screen_share", "screen_share_audio")
NEEDED = {"microphone": 1, "camera": 50, "screen_share": 100}
LEVELS = {
    # level: what it may publish
    -1: (),
    0: (),
    1: ("microphone",),
    49: ("microphone",),
    50: ("microphone", "camera"),
    99: ("microphone", "camera"),
    100: SOURCES,
}
PREFIX = "/_matrix/{}/unstable/io.element.msc4195/rtc/livekit/get_token"
ROUTES = ("/sfu/get", "/get_token", PREFIX.format("client"), PREFIX.format("federation"))


async def token_at(sandbox: Sandbox, route: str, room_id: str) -> Answer:
    """Bob's token request on a route."""
    if not route.startswith("/_matrix"):
        return await sandbox.ask_token(BOB, room_id, new=route == "/get_token")
    body = {"room_id": room_id, "slot_id": "m.call#ROOM", "member_id": "m", "url": "wss://x"}
    headers = {"Authorization": "Bearer hs", "X-Matrix-User-Identifier": BOB}
    if "federation" in route:
        body["user_id"] = BOB
        headers["X-Matrix-Origin"] = "sandbox.local"
    return await sandbox.request("POST", sandbox.appservice_url + route, json.dumps(body).encode(), headers)


@pytest.mark.parametrize("route", ROUTES, ids=["sfu_get", "get_token", "client", "federation"])
@pytest_twisted.ensureDeferred
async def test_the_token_grants_what_the_level_allows(start_sandbox: StartSandbox, route: str) -> None:
    sandbox = await start_sandbox(
        guard_reconcile_interval=3600, guard_appservice_port=0, guard_appservice_token="hs",
        upstream_options={"hs_token": "hs"},
    )  # fmt: skip
    granted = {}
    for level in LEVELS:
        room_id = room_of(sandbox)
        sandbox.homeserver.set_state(room_id, "io.lotus.call_permissions", NEEDED)
        sandbox.homeserver.set_state(room_id, "m.room.power_levels", {"users": {ALICE: 100, BOB: level}})
        answer = await token_at(sandbox, route, room_id)
        assert answer.code == 200
        video = claims_of(answer)["video"]
        participant = sandbox.livekit.connect(json.loads(answer.body)["jwt"])
        published = tuple(source for source in SOURCES if participant.publish(source.upper()))
        granted[level] = published
        assert video["canPublish"] is bool(LEVELS[level])
        assert video.get("canPublishSources", list(SOURCES if video["canPublish"] else ())) == list(LEVELS[level])
        assert video.get("canPublishData", video["canPublish"]) is True
    assert granted == LEVELS
