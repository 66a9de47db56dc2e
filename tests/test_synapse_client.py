# SPDX-License-Identifier: Apache-2.0
"""`SynapseClient` against answers as Synapse, its older releases and Tuwunel give them, and against a real Synapse."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import unquote

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock

from lotusguard.clients.circuit_breaker import FAILURES_TO_OPEN
from lotusguard.clients.dependency import Dependency, DependencyFailed
from lotusguard.clients.http import Answer, ConnectionPool, FixedAgent
from lotusguard.clients.synapse import ROOMS_A_PAGE, AccessToken, OpenIDClient, SynapseClient
from lotusguard.clients.synapse.client import MISSING_FOR
from lotusguard.metrics import Metrics
from lotusguard.rules.membership import Membership
from lotusguard.rules.requests import OpenID
from lotusguard.rules.state import StateEvent
from tests.calls import crashes, logged, named
from tests.synapse import Synapse

ROOM, ALICE = "!room:example.org", "@alice:example.org"
MEMBER_EVENTS = f"/rooms/{ROOM}/state?type=m.room.member"
"""Where the room's state tells of its users."""
LIMIT, QUALITY, CREATE = "io.lotus.voice_limit", "io.lotus.room_quality", "m.room.create"
NOT_FOUND = (404, {"errcode": "M_NOT_FOUND"})
UNRECOGNIZED = (404, {"errcode": "M_UNRECOGNIZED", "error": "Unrecognized request"})
BROKEN = (500, {"errcode": "M_UNKNOWN"})


class Homeserver:
    """Answers each path with a status and JSON; 404 M_UNRECOGNIZED where the test set nothing.

    :ivar answers: by the path without ``/_synapse/admin/v1``, decoded.
    """

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, Any]] = {}
        self.asked: list[str] = []

    def request(self, method: bytes, target: bytes, headers: Any = None, body: Any = None) -> Any:
        path = unquote(target.decode()).removeprefix("/_synapse/admin/v1")
        self.asked.append(path)
        code, content = self.answers.get(path, UNRECOGNIZED)
        return succeed(Answer(code, body=json.dumps(content).encode()))

    def state(self, *events: Mapping[str, Any], ignores_type: bool = False) -> None:
        for kind in (LIMIT, QUALITY, CREATE):
            found = [event for event in events if ignores_type or event["type"] == kind]
            self.answers[f"/rooms/{ROOM}/state?type={kind}"] = (200, {"state": found})

    def user(self, joined: list[str], memberships: dict[str, str] | None) -> None:
        self.answers[f"/users/{ALICE}/joined_rooms"] = (200, {"joined_rooms": joined, "total": len(joined)})
        if memberships is not None:
            self.answers[f"/users/{ALICE}/memberships"] = (200, {"memberships": memberships})


def event(kind: str, content: Any, state_key: str = "", sender: str = ALICE) -> dict[str, Any]:
    return {"type": kind, "state_key": state_key, "content": content, "sender": sender}


@pytest.fixture
def homeserver() -> Homeserver:
    return Homeserver()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def dependency(homeserver: Homeserver, clock: Clock) -> Dependency:
    agent: Any = homeserver
    return Dependency("synapse", agent, clock, Metrics(), timeout=1.5)


@pytest.fixture
def client(dependency: Dependency) -> SynapseClient:
    return SynapseClient(dependency, AccessToken("secret"), "example.org")


@pytest.fixture
def verifier(homeserver: Homeserver, clock: Clock, client: SynapseClient) -> OpenIDClient:
    agent: Any = homeserver
    return OpenIDClient(Dependency("synapse_openid", agent, clock, Metrics(), timeout=1.5), client)


def result(call: Any) -> Any:
    """The result of a coroutine that ends at once, or its exception."""
    ended = Deferred.fromCoroutine(call)
    ended.addErrback(lambda failure: failure.value)
    assert ended.called
    return ended.result


# -- state --


def test_state_is_asked_for_by_type(client: SynapseClient, homeserver: Homeserver) -> None:
    homeserver.state(event(LIMIT, {"max_users": 2}), event(LIMIT, {"max_users": 9}, "other"), event(CREATE, {}))
    assert result(client.room_state(ROOM, (LIMIT, QUALITY))) == {LIMIT: StateEvent(LIMIT, {"max_users": 2}, ALICE)}
    assert homeserver.asked == [f"/rooms/{ROOM}/state?type={kind}" for kind in (LIMIT, QUALITY)]


def test_an_older_release_that_answers_the_whole_state_is_asked_once(
    client: SynapseClient, homeserver: Homeserver
) -> None:
    homeserver.state(event(LIMIT, {"max_users": 2}), event(CREATE, {}), event(QUALITY, {}), ignores_type=True)
    for _ in range(2):
        assert set(result(client.room_state(ROOM, (LIMIT, CREATE)))) == {LIMIT, CREATE}
    assert len(homeserver.asked) == 3


def test_a_homeserver_that_was_upgraded_is_asked_for_every_type_again(
    client: SynapseClient, homeserver: Homeserver
) -> None:
    events = (event(LIMIT, {"max_users": 2}), event(CREATE, {}))
    homeserver.state(*events, ignores_type=True)
    result(client.room_state(ROOM, (LIMIT, CREATE)))
    homeserver.state(*events)
    assert set(result(client.room_state(ROOM, (LIMIT, CREATE)))) == {LIMIT, CREATE}


def test_a_room_that_the_homeserver_does_not_know_has_no_state_at_all(
    client: SynapseClient, homeserver: Homeserver
) -> None:
    homeserver.answers[f"/rooms/{ROOM}/state?type={LIMIT}"] = NOT_FOUND
    assert result(client.room_state(ROOM, (LIMIT,))) is None


def test_tuwunels_500_for_an_unknown_room_is_confirmed_by_its_member_list(
    client: SynapseClient, homeserver: Homeserver
) -> None:
    homeserver.answers[f"/rooms/{ROOM}/state?type={LIMIT}"] = BROKEN
    homeserver.answers[f"/rooms/{ROOM}/members"] = NOT_FOUND
    assert result(client.room_state(ROOM, (LIMIT,))) is None


def test_a_500_for_a_room_that_exists_is_a_failure(client: SynapseClient, homeserver: Homeserver) -> None:
    homeserver.answers[f"/rooms/{ROOM}/state?type={LIMIT}"] = BROKEN
    homeserver.answers[f"/rooms/{ROOM}/members"] = (200, {"members": [ALICE], "total": 1})
    assert result(client.room_state(ROOM, (LIMIT,))).reason == "status_500"


def test_a_homeserver_that_answers_500_to_everything_opens_its_circuit(
    client: SynapseClient, homeserver: Homeserver
) -> None:
    homeserver.answers[f"/rooms/{ROOM}/state?type={LIMIT}"] = BROKEN
    homeserver.answers[f"/rooms/{ROOM}/members"] = BROKEN
    for _ in range(FAILURES_TO_OPEN):
        assert isinstance(result(client.room_state(ROOM, (LIMIT,))), DependencyFailed)
    assert not client.available


def test_a_404_of_a_proxy_is_a_failure_and_not_an_unknown_room(client: SynapseClient, homeserver: Homeserver) -> None:
    for answer in ((404, "<html>"), UNRECOGNIZED):
        homeserver.answers[f"/rooms/{ROOM}/state?type={LIMIT}"] = answer
        homeserver.answers[f"/rooms/{ROOM}/members"] = answer
        assert isinstance(result(client.room_state(ROOM, (LIMIT,))), DependencyFailed)
        assert isinstance(result(client.members(ROOM)), DependencyFailed)


@pytest.mark.parametrize("state", [{}, "x", [1], [{"type": LIMIT, "state_key": ""}]])
def test_state_of_an_unexpected_shape_is_a_failure(client: SynapseClient, homeserver: Homeserver, state: Any) -> None:
    homeserver.answers[f"/rooms/{ROOM}/state?type={LIMIT}"] = (200, {"state": state})
    assert result(client.room_state(ROOM, (LIMIT,))).reason == "invalid_response"


# -- membership --


def test_a_joined_user_costs_one_request(client: SynapseClient, homeserver: Homeserver) -> None:
    homeserver.user([ROOM], {ROOM: "join"})
    assert result(client.membership(ALICE, ROOM)) is Membership.JOIN
    assert homeserver.asked == [f"/users/{ALICE}/joined_rooms"]


@pytest.mark.parametrize("membership", [one for one in Membership if one is not Membership.ABSENT])
def test_the_membership_of_anybody_else_is_looked_up(
    client: SynapseClient, homeserver: Homeserver, membership: Membership
) -> None:
    homeserver.user([], {ROOM: membership.value, "!other:example.org": "join"})
    assert result(client.membership(ALICE, ROOM)) is membership


def test_a_user_without_an_entry_is_absent(client: SynapseClient, homeserver: Homeserver) -> None:
    homeserver.user(["!other:example.org"], {"!other:example.org": "join"})
    assert result(client.membership(ALICE, ROOM)) is Membership.ABSENT


@pytest.mark.parametrize("membership", ["unheard-of", 7, None, ["join"], {}])
def test_a_membership_that_is_none_is_no_usable_answer(
    client: SynapseClient, homeserver: Homeserver, membership: Any
) -> None:
    homeserver.user([], {ROOM: membership})
    assert result(client.membership(ALICE, ROOM)).reason == "invalid_response"


# -- the list of rooms --


def pages(homeserver: Homeserver, *pages: Any) -> None:
    """Pages of a list of rooms, each of them one room long."""
    for number, page in enumerate(pages):
        homeserver.answers[f"/rooms?from={number}&limit={ROOMS_A_PAGE}"] = (200, page)


async def room_ids(client: SynapseClient) -> list[str]:
    return [room_id async for room_id in client.room_ids(1000)]


def test_entries_of_the_list_that_name_no_room_are_ignored_and_reported_once(
    client: SynapseClient, homeserver: Homeserver
) -> None:
    malformed: list[Any] = [None, 7, [], {}, {"room_id": None}, {"room_id": 7}, {"room_id": "!" + "a" * 300}, "!room"]
    pages(
        homeserver,
        {"rooms": [*malformed, {"room_id": "!a:x"}], "next_batch": 1},
        {"rooms": [{"room_id": "!b:x"}, *malformed], "next_batch": True},
    )
    with logged() as events:
        assert result(room_ids(client)) == ["!a:x", "!b:x"]
        assert result(room_ids(client)) == ["!a:x", "!b:x"]
    assert len(named(events, "room_list_malformed")) == 1
    assert crashes(events) == []


@pytest.mark.parametrize("page", [{}, {"rooms": None}, {"rooms": {}}, {"rooms": "!a:x"}, [], None])
def test_a_page_that_is_no_list_of_rooms_is_no_usable_answer(
    client: SynapseClient, homeserver: Homeserver, page: Any
) -> None:
    pages(homeserver, page)
    assert result(room_ids(client)).reason == "invalid_response"


def test_an_older_release_without_memberships_is_not_asked_for_them_again_for_a_while(
    client: SynapseClient, homeserver: Homeserver, clock: Clock
) -> None:
    homeserver.user([], None)
    homeserver.answers[MEMBER_EVENTS] = (200, {"state": []})
    for _ in range(3):
        assert result(client.membership(ALICE, ROOM)) is Membership.ABSENT
    assert homeserver.asked.count(f"/users/{ALICE}/memberships") == 1
    homeserver.user([], {ROOM: "ban"})
    assert MISSING_FOR <= 60
    clock.advance(MISSING_FOR)
    assert result(client.membership(ALICE, ROOM)) is Membership.BAN


def test_member_list_is_used_if_the_endpoint_for_users_is_missing(
    client: SynapseClient, homeserver: Homeserver
) -> None:
    homeserver.answers[f"/rooms/{ROOM}/members"] = (200, {"members": [ALICE], "total": 1})
    assert result(client.membership(ALICE, ROOM)) is Membership.JOIN
    homeserver.answers[MEMBER_EVENTS] = (200, {"state": []})
    assert result(client.membership("@bob:example.org", ROOM)) is Membership.ABSENT
    assert [path for path in homeserver.asked if "/users/" in path] == [f"/users/{ALICE}/joined_rooms"]


@pytest.mark.parametrize("endpoint", ["joined_rooms", "memberships"])
@pytest.mark.parametrize("said", [Membership.LEAVE, Membership.BAN])
def test_without_an_endpoint_the_rooms_state_tells_who_left_or_was_banned(
    client: SynapseClient, homeserver: Homeserver, endpoint: str, said: Membership
) -> None:
    if endpoint == "memberships":
        homeserver.user([], None)
    homeserver.answers[f"/rooms/{ROOM}/members"] = (200, {"members": [], "total": 0})
    event = {"type": "m.room.member", "sender": "@mod:example.org", "content": {"membership": said.value}}
    others = [{**event, "state_key": "@bob:example.org", "content": {"membership": "join"}}]
    homeserver.answers[MEMBER_EVENTS] = (200, {"state": [*others, {**event, "state_key": ALICE}]})
    assert result(client.membership(ALICE, ROOM)) is said


def test_an_error_that_no_homeserver_sends_does_not_mean_that_the_endpoint_is_missing(
    client: SynapseClient, homeserver: Homeserver
) -> None:
    homeserver.answers[f"/users/{ALICE}/joined_rooms"] = (404, {"errcode": "M_UNRECOGNIZED"})
    assert isinstance(result(client.membership(ALICE, ROOM)), DependencyFailed)
    homeserver.user([ROOM], {ROOM: "join"})
    assert result(client.membership(ALICE, ROOM)) is Membership.JOIN


@pytest.mark.parametrize("answer", [(403, {"errcode": "M_FORBIDDEN"}), (404, "<html>"), BROKEN, (200, {})])
def test_membership_is_unknown_if_the_homeserver_gives_no_answer(
    client: SynapseClient, homeserver: Homeserver, answer: tuple[int, Any]
) -> None:
    homeserver.answers[f"/users/{ALICE}/joined_rooms"] = answer
    assert isinstance(result(client.membership(ALICE, ROOM)), DependencyFailed)


# -- OpenID tokens --


def userinfo(token: str) -> str:
    return f"/_matrix/federation/v1/openid/userinfo?access_token={token}"


def openid(token: str = "abc", server: str = "example.org") -> OpenID:
    return OpenID(access_token=token, server_name=server)


def test_a_valid_openid_token_proves_its_user(verifier: OpenIDClient, homeserver: Homeserver) -> None:
    homeserver.answers[userinfo("abc")] = (200, {"sub": ALICE})
    assert result(verifier.local_user(openid())) == ALICE


def test_a_bad_openid_token_proves_nobody_and_says_nothing_about_our_own(
    verifier: OpenIDClient, homeserver: Homeserver
) -> None:
    homeserver.answers[userinfo("abc")] = (401, {"errcode": "M_UNKNOWN_TOKEN"})
    assert result(verifier.local_user(openid())) is None
    assert verifier.refused is None


@pytest.mark.parametrize(("answer", "reason"), [((401, {"errcode": "M_UNKNOWN_TOKEN"}), None), (BROKEN, "status_500")])
def test_the_probe_asks_about_a_token_that_does_not_exist(
    verifier: OpenIDClient, homeserver: Homeserver, answer: tuple[int, Any], reason: str | None
) -> None:
    homeserver.answers[userinfo("lotusguard-probe")] = answer
    found = result(verifier.probe())
    assert getattr(found, "reason", None) == reason
    assert len(homeserver.asked) == 1


@pytest.mark.parametrize("answer", [UNRECOGNIZED, (429, {"errcode": "M_LIMIT_EXCEEDED"}), BROKEN])
def test_a_homeserver_that_cannot_tell_does_not_call_a_token_bad(
    verifier: OpenIDClient, homeserver: Homeserver, answer: tuple[int, Any]
) -> None:
    homeserver.answers[userinfo("abc")] = answer
    assert isinstance(result(verifier.local_user(openid())), DependencyFailed)


def test_a_token_may_not_prove_a_user_of_another_server(verifier: OpenIDClient, homeserver: Homeserver) -> None:
    homeserver.answers[userinfo("abc")] = (200, {"sub": "@alice:elsewhere.org"})
    assert result(verifier.local_user(openid())) is None


def test_tokens_of_other_servers_and_impossible_tokens_are_not_looked_up(
    verifier: OpenIDClient, homeserver: Homeserver
) -> None:
    for one in (openid(server="elsewhere.org"), openid("a\nb"), openid("a" * 5000), openid("é")):
        assert result(verifier.local_user(one)) is None
    assert homeserver.asked == []


def test_the_server_name_is_asked_for_once(dependency: Dependency, homeserver: Homeserver) -> None:
    client = OpenIDClient(dependency, SynapseClient(dependency, AccessToken("secret")))
    assert not client.is_local(openid())
    homeserver.answers["/_matrix/client/v3/account/whoami"] = (200, {"user_id": "@guard:example.org"})
    for _ in range(2):
        assert result(client.know_server_name()) == "example.org"
    assert client.is_local(openid())
    assert not client.is_local(openid(server="elsewhere.org"))
    assert len(homeserver.asked) == 1


# -- probing --


@pytest.mark.parametrize("state", [NOT_FOUND, BROKEN])
def test_the_probe_accepts_what_synapse_and_tuwunel_answer_for_an_unknown_room(
    client: SynapseClient, homeserver: Homeserver, state: tuple[int, Any]
) -> None:
    homeserver.answers[f"/rooms/!lotusguard:probe/state?type={LIMIT}"] = state
    homeserver.answers["/rooms/!lotusguard:probe/members"] = NOT_FOUND
    assert result(client.probe()) is None


@pytest.mark.parametrize("answer", [UNRECOGNIZED, BROKEN, (403, {"errcode": "M_FORBIDDEN"})])
def test_the_probe_fails_where_the_admin_api_does_not_serve_us(
    client: SynapseClient, homeserver: Homeserver, answer: tuple[int, Any]
) -> None:
    homeserver.answers[f"/rooms/!lotusguard:probe/state?type={LIMIT}"] = answer
    homeserver.answers["/rooms/!lotusguard:probe/members"] = answer
    assert isinstance(result(client.probe()), DependencyFailed)


# -- the real Synapse --


@pytest_twisted.async_yield_fixture
async def real(synapse: Synapse) -> AsyncIterator[SynapseClient]:
    """A client for the real homeserver, with an admin's token."""
    admin = await synapse.user("admin", admin=True)
    pool = ConnectionPool(reactor)
    dependency = Dependency("synapse", FixedAgent(reactor, synapse.url, pool), reactor, Metrics(), timeout=30)
    yield SynapseClient(dependency, AccessToken(admin.token))
    await pool.close()


@pytest_twisted.ensureDeferred
async def test_the_real_synapse_tells_every_membership(real: SynapseClient, synapse: Synapse) -> None:
    alice, bob = await synapse.user("alice"), await synapse.user("bob")
    room_id = await synapse.create_room(
        alice, room_version="10", initial_state=[{"type": "m.room.join_rules", "content": {"join_rule": "knock"}}]
    )
    for action, by, membership in (
        (None, alice, Membership.ABSENT),
        ("knock", bob, Membership.KNOCK),
        ("invite", alice, Membership.INVITE),
        ("join", bob, Membership.JOIN),
        ("kick", alice, Membership.LEAVE),
        ("ban", alice, Membership.BAN),
        ("unban", alice, Membership.LEAVE),
    ):
        if action is not None:
            await synapse.change_membership(by, room_id, action, bob if by is alice else None)
        assert await real.membership(bob.user_id, room_id) is membership
    assert await real.membership(alice.user_id, room_id) is Membership.JOIN
    assert await real.membership("@nobody:elsewhere.test", room_id) is Membership.ABSENT
    assert await real.members(room_id) == frozenset({alice.user_id})


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("room_version", ["10", "12"])
async def test_the_real_synapse_tells_state_by_type(real: SynapseClient, synapse: Synapse, room_version: str) -> None:
    alice = await synapse.user("alice")
    room_id = await synapse.create_room(alice, room_version=room_version)
    await synapse.set_state(alice, room_id, LIMIT, {"max_users": 2})
    state = await real.room_state(room_id, (LIMIT, QUALITY, CREATE, "m.room.power_levels"))
    assert state is not None
    assert set(state) == {LIMIT, CREATE, "m.room.power_levels"}
    assert state[LIMIT] == StateEvent(LIMIT, {"max_users": 2}, alice.user_id)
    assert state[CREATE].sender == alice.user_id
    assert state[CREATE].mapping["room_version"] == room_version


@pytest_twisted.ensureDeferred
async def test_the_real_synapse_says_which_rooms_it_does_not_know(real: SynapseClient) -> None:
    assert await real.room_state("!nowhere:real.test", (LIMIT,)) is None
    assert await real.members("!nowhere:real.test") is None
    await real.probe()


@pytest_twisted.ensureDeferred
async def test_the_real_synapse_verifies_openid_tokens(real: SynapseClient, synapse: Synapse) -> None:
    alice = await synapse.user("alice")
    given = await synapse.openid_token(alice)
    token = OpenID(access_token=given["access_token"], server_name=given["matrix_server_name"])
    pool = ConnectionPool(reactor)
    agent = FixedAgent(reactor, synapse.url, pool)
    verifier = OpenIDClient(Dependency("synapse_openid", agent, reactor, Metrics(), timeout=30), real)
    assert await verifier.local_user(token) == alice.user_id
    assert verifier.is_local(token)
    assert await verifier.local_user(OpenID(access_token="nobodys", server_name=synapse.server_name)) is None
    assert verifier.refused is None
    await verifier.probe()
    await pool.close()
