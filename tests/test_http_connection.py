# SPDX-License-Identifier: Apache-2.0
"""What a `Connection` makes of the bytes that a dependency sends, however they are cut. It reads no answer that nobody
asked for, is not used again where it cannot be, and keeps no more of an answer than it has to."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import Factory, define, field
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.web.client import ResponseFailed, ResponseNeverReceived
from twisted.web.http import PotentialDataLoss

from lotusguard.clients.http import Answer, BodyTooLarge, whole
from lotusguard.clients.http.connection import Connection, StaleConnection
from lotusguard.clients.http.pool import IDLE_TIMEOUT, ConnectionPool
from lotusguard.clients.http.reader import LARGEST_FRAME

OK = b"HTTP/1.1 200 OK\r\n"
HELLO = OK + b"Content-Length: 5\r\n\r\nhello"
ADDRESS = (b"http", b"dependency", 80)


@define(eq=False)
class Setting:
    """A connection to a dependency that the test plays."""

    kept: list[Connection] = Factory(list)
    lost: list[Connection] = Factory(list)
    transport: StringTransport = Factory(StringTransport)
    connection: Connection = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.connection = Connection(self.kept.append, self.lost.append)
        self.connection.makeConnection(self.transport)

    def ask(self, *, has_body: bool = True, limit: int = 1000) -> Deferred[Answer]:
        return self.connection.ask(b"GET / HTTP/1.1\r\n\r\n", has_body=has_body).addCallback(whole, limit)

    def send(self, *parts: bytes) -> None:
        for part in parts:
            self.connection.dataReceived(part)

    def hang_up(self) -> None:
        self.connection.connectionLost(Failure(ConnectionDone()))

    @property
    def dropped(self) -> bool:
        return self.transport.disconnecting or self.transport.disconnected


@pytest.fixture
def setting() -> Setting:
    return Setting()


def result(asked: Deferred[Answer]) -> Answer:
    results: list[Answer] = []
    asked.addCallback(results.append)
    assert results, "no answer yet"
    return results[0]


def error(asked: Deferred[Answer]) -> Any:
    errors: list[Failure] = []
    asked.addErrback(errors.append)
    assert errors, "no error yet"
    return errors[0].value


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_an_answer_is_the_same_however_it_is_cut(setting: Setting, size: int) -> None:
    sent = OK + b"Date: now\r\nX-Empty:\r\nX-Two: a\r\nX-Two: b  \r\nContent-Length: 5\r\n\r\nhello"
    asked = setting.ask()
    setting.send(*(sent[start : start + size] for start in range(0, len(sent), size)))
    answer = result(asked)
    assert (answer.code, answer.phrase, answer.body) == (200, b"OK", b"hello")
    assert answer.header(b"date") == b"now"
    assert sorted(answer.headers.getAllRawHeaders()) == [
        (b"Date", [b"now"]),
        (b"X-Empty", [b""]),
        (b"X-Two", [b"a", b"b"]),
    ]
    assert setting.kept == [setting.connection]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_chunks_are_joined_and_trailers_are_no_headers(setting: Setting, size: int) -> None:
    sent = OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\nX-Late: yes\r\n\r\n"
    asked = setting.ask()
    setting.send(*(sent[start : start + size] for start in range(0, len(sent), size)))
    answer = result(asked)
    assert answer.body == b"hello"
    assert not list(answer.headers.getAllRawHeaders())
    assert setting.kept


def test_a_connection_takes_the_next_request_after_an_answer(setting: Setting) -> None:
    for number in range(3):
        asked = setting.ask()
        setting.send(OK + b"Content-Length: 1\r\n\r\n%d" % number)
        assert result(asked).body == b"%d" % number
    assert len(setting.kept) == 3


def test_the_next_request_may_be_sent_while_the_answer_is_handled(setting: Setting) -> None:
    both: list[Deferred[Answer]] = []
    setting.ask().addCallback(lambda _: both.append(setting.ask()))
    setting.send(HELLO)
    setting.send(OK + b"Content-Length: 2\r\n\r\nhi")
    assert result(both[0]).body == b"hi"


def test_interim_answers_are_passed_over(setting: Setting) -> None:
    asked = setting.ask()
    setting.send(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + HELLO)
    answer = result(asked)
    assert (answer.code, answer.phrase, answer.body) == (200, b"OK", b"hello")
    assert not list(answer.headers.getAllRawHeaders())


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        HELLO + b"HTTP/1.1 200 OK\r\n",
        HELLO + HELLO,
        HELLO + b"surplus",
    ],
    ids=["closing", "HTTP/1.0", "begin of another answer", "another answer", "surplus bytes"],
)
def test_a_connection_is_used_no_more(setting: Setting, sent: bytes) -> None:
    asked = setting.ask()
    setting.send(sent)
    assert result(asked).body == b"hello"
    assert setting.dropped
    assert not setting.kept


@pytest.mark.parametrize("framed", [b"Content-Length: 5", b"Transfer-Encoding: chunked"])
def test_what_follows_an_answer_without_a_body_is_not_the_next_answer(setting: Setting, framed: bytes) -> None:
    asked = setting.ask()
    setting.send(b"HTTP/1.1 204 No Content\r\n" + framed + b"\r\n\r\n")
    assert result(asked).body == b""
    assert setting.dropped
    assert not setting.kept


def test_a_connection_takes_one_request_at_a_time(setting: Setting) -> None:
    setting.ask()
    with pytest.raises(RuntimeError, match="waiting"):
        setting.ask()
    setting.hang_up()
    with pytest.raises(RuntimeError, match="closed"):
        setting.ask()


def test_headers_that_the_dependency_meant_for_us_only_are_left_out(setting: Setting) -> None:
    asked = setting.ask()
    setting.send(OK + b"Connection: X-Internal , keep-alive\r\nConnection: X-Also\r\nX-Internal: 1\r\nX-Also: 1\r\n")
    setting.send(b"X-A: 2\r\nContent-Length: 0\r\n\r\n")
    assert list(result(asked).headers.getAllRawHeaders()) == [(b"X-A", [b"2"])]


def test_what_arrives_unasked_closes_the_connection_at_once(setting: Setting) -> None:
    setting.ask()
    setting.send(HELLO)
    setting.send(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
    assert setting.lost == [setting.connection]
    assert setting.dropped


def test_the_answer_to_head_has_no_body_whatever_its_length(setting: Setting) -> None:
    asked = setting.ask(has_body=False)
    setting.send(OK + b"Content-Length: 5\r\n\r\n")
    assert result(asked).body == b""
    assert setting.dropped, "what a server sends all the same would be read as the next answer"


@pytest.mark.parametrize(
    "sent",
    [
        b"SSH-2.0-OpenSSH\r\n",
        OK + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        OK + b"Content-Length: -1\r\n\r\n",
        OK + b"X: a\0b\r\nContent-Length: 0\r\n\r\n",
        OK + b"X : a\r\nContent-Length: 0\r\n\r\n",
        OK + b"X: a\r\n b\r\nContent-Length: 0\r\n\r\n",
        OK + b"Transfer-Encoding: gzip\r\n\r\n",
        OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        OK + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        OK + b"X: " + b"a" * 2 * LARGEST_FRAME,
    ],
    ids=["no HTTP", "length and coding", "two lengths", "negative", "NUL", "space before colon", "folded", "gzip",
         "gzip, chunked", "two codings", "HTTP/2", "another protocol", "long head"],
)  # fmt: skip
def test_what_cannot_be_read_for_certain_is_no_answer(setting: Setting, sent: bytes) -> None:
    asked = setting.ask()
    setting.send(*(sent[start : start + 1000] for start in range(0, len(sent), 1000)))
    failed = error(asked)
    assert isinstance(failed, ResponseFailed)
    assert not isinstance(failed, ResponseNeverReceived)
    assert setting.dropped
    assert not setting.kept


def test_a_broken_chunk_ends_an_answer_that_has_begun(setting: Setting) -> None:
    asked = setting.ask()
    setting.send(OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n", b"not a length\r\n")
    failed = error(asked)
    assert isinstance(failed, ResponseFailed)
    assert failed.response is not None
    assert setting.dropped


def test_endless_trailers_end_the_answer(setting: Setting) -> None:
    asked = setting.ask()
    setting.send(OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n0\r\nX-Late: ")
    setting.send(*(b"a" * 1000 for _ in range(2 * LARGEST_FRAME // 1000)))
    assert isinstance(error(asked), ResponseFailed)
    assert setting.dropped


def test_a_long_body_in_short_chunks_is_read(setting: Setting) -> None:
    asked = setting.ask(limit=1_000_000)
    setting.send(OK + b"Transfer-Encoding: chunked\r\n\r\n", *(b"1\r\na\r\n" * 1000 for _ in range(100)), b"0\r\n\r\n")
    assert result(asked).body == b"a" * 100_000


def test_endless_interim_answers_are_no_answer(setting: Setting) -> None:
    asked = setting.ask()
    for _ in range(LARGEST_FRAME // 1000):
        setting.send(b"HTTP/1.1 102 Processing\r\n\r\n" * 50)
    assert isinstance(error(asked), ResponseFailed)


def test_a_connection_that_is_closed_before_an_answer(setting: Setting) -> None:
    asked = setting.ask()
    setting.hang_up()
    failed = error(asked)
    assert isinstance(failed, ResponseNeverReceived)
    assert not isinstance(failed, StaleConnection), "this request was the first: the dependency has seen it"


def test_a_connection_that_is_closed_after_an_earlier_answer_is_stale(setting: Setting) -> None:
    setting.ask()
    setting.send(HELLO)
    asked = setting.ask()
    setting.hang_up()
    assert isinstance(error(asked), StaleConnection)


def test_a_connection_that_is_closed_within_the_head(setting: Setting) -> None:
    asked = setting.ask()
    setting.send(b"HTTP/1.1 200 O")
    setting.hang_up()
    assert not isinstance(error(asked), ResponseNeverReceived)


@pytest.mark.parametrize("head", [b"Content-Length: 5\r\n\r\nhell", b"Transfer-Encoding: chunked\r\n\r\n4\r\nhell\r\n"])
def test_a_body_that_ends_too_early_is_truncated(setting: Setting, head: bytes) -> None:
    asked = setting.ask()
    setting.send(OK + head)
    setting.hang_up()
    failed = error(asked)
    assert isinstance(failed, ResponseFailed)
    assert failed.response is not None


def test_a_body_without_a_length_ends_with_the_connection(setting: Setting) -> None:
    asked = setting.ask()
    setting.send(OK + b"\r\nhel", b"lo")
    setting.hang_up()
    assert result(asked).body == b"hello"


def test_a_cancelled_request_closes_the_connection(setting: Setting) -> None:
    asked = setting.ask()
    asked.cancel()
    assert isinstance(error(asked), CancelledError)
    assert setting.dropped
    setting.send(HELLO)
    setting.hang_up()
    assert not setting.kept


def test_a_request_that_is_cancelled_within_the_body_closes_the_connection(setting: Setting) -> None:
    asked = setting.ask()
    setting.send(OK + b"Content-Length: 5\r\n\r\nhel")
    asked.cancel()
    assert isinstance(error(asked), CancelledError)
    assert setting.dropped
    setting.send(b"lo")
    assert not setting.kept


@pytest.mark.parametrize("parts", [(b"hello",), (b"", b"he", b"llo")], ids=["at once", "in parts"])
def test_a_body_that_is_longer_than_its_limit(setting: Setting, parts: tuple[bytes, ...]) -> None:
    asked = setting.ask(limit=4)
    setting.send(OK + b"Content-Length: 5\r\n\r\n" + parts[0], *parts[1:])
    assert isinstance(error(asked), BodyTooLarge)


class Receiver(Protocol):
    """Takes a body as it arrives."""

    def __init__(self) -> None:
        self.received = b""
        self.ended: list[Failure] = []

    def dataReceived(self, data: bytes) -> None:
        self.received += data

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.ended.append(reason)


def head(setting: Setting) -> Answer:
    """The head of an answer whose body nobody reads yet."""
    asked = setting.connection.ask(b"", has_body=True)
    setting.send(OK + b"Content-Length: 5\r\n\r\nhe")
    return result(asked)


def test_no_more_of_a_body_is_read_than_somebody_takes(setting: Setting) -> None:
    answer, receiver = head(setting), Receiver()
    assert setting.transport.producerState == "paused"
    answer.deliverBody(receiver)
    assert receiver.received == b"he"
    assert setting.transport.producerState == "producing"
    answer.pauseProducing()
    assert setting.transport.producerState == "paused"


def test_who_has_read_an_answer_cannot_stop_the_next_one(setting: Setting) -> None:
    answer, receiver = head(setting), Receiver()
    answer.deliverBody(receiver)
    answer.pauseProducing()
    setting.send(b"llo")
    assert setting.transport.producerState == "producing", "the connection is kept, and must be read from"
    asked = setting.ask()
    answer.pauseProducing()
    answer.loseConnection()
    assert setting.transport.producerState == "producing"
    assert not setting.dropped
    setting.send(HELLO)
    assert result(asked).body == b"hello"


def test_a_connection_that_was_given_up_is_not_kept_though_the_body_is_complete(setting: Setting) -> None:
    answer = head(setting)

    class Impatient(Receiver):
        def dataReceived(self, data: bytes) -> None:
            super().dataReceived(data)
            if self.received == b"hello":
                answer.loseConnection()

    answer.deliverBody(Impatient())
    setting.send(b"llo")
    assert setting.dropped
    assert not setting.kept


def test_the_receiver_is_told_that_the_length_was_unknown(setting: Setting) -> None:
    asked = setting.connection.ask(b"", has_body=True)
    setting.send(OK + b"\r\nhel")
    receiver = Receiver()
    result(asked).deliverBody(receiver)
    setting.hang_up()
    assert receiver.ended[0].check(PotentialDataLoss)


# -- the pool ------------------------------------------------------------------------------------------------


def pooled(pool: ConnectionPool) -> tuple[Connection, StringTransport]:
    connection, transport = Connection(lambda _: None, lambda it: pool.forget(ADDRESS, it)), StringTransport()
    connection.makeConnection(transport)
    pool.keep(ADDRESS, connection)
    return connection, transport


def test_the_connection_that_was_used_last_is_used_first() -> None:
    pool = ConnectionPool(Clock())
    first, second = pooled(pool)[0], pooled(pool)[0]
    assert pool.take(ADDRESS) is second
    assert pool.take(ADDRESS) is first
    assert pool.take(ADDRESS) is None
    assert pool.take((b"https", b"dependency", 443)) is None


def test_a_connection_that_was_closed_is_not_used() -> None:
    pool = ConnectionPool(Clock())
    connection, _ = pooled(pool)
    connection.connectionLost(connectionDone)
    assert pool.take(ADDRESS) is None


def test_no_more_connections_are_kept_than_allowed() -> None:
    pool = ConnectionPool(Clock(), at_most=1)
    _, first = pooled(pool)
    _, second = pooled(pool)
    assert (first.disconnecting, second.disconnecting) == (False, True)


def test_nothing_is_kept_any_more_once_the_pool_is_closed() -> None:
    clock = Clock()
    pool = ConnectionPool(clock)
    Deferred.fromCoroutine(pool.close())
    _, transport = pooled(pool)
    assert transport.disconnecting
    assert not clock.getDelayedCalls()


def test_unused_connections_are_closed_in_time() -> None:
    clock = Clock()
    pool = ConnectionPool(clock)
    _, first = pooled(pool)
    clock.advance(IDLE_TIMEOUT / 2)
    _, second = pooled(pool)
    clock.advance(IDLE_TIMEOUT / 2)
    assert (first.disconnecting, second.disconnecting) == (True, False)
    clock.advance(IDLE_TIMEOUT / 2)
    assert second.disconnecting
    assert not clock.getDelayedCalls()


def test_closing_waits_until_all_are_closed() -> None:
    clock = Clock()
    pool = ConnectionPool(clock)
    connection, transport = pooled(pool)
    closing = Deferred.fromCoroutine(pool.close())
    assert transport.disconnecting
    assert not closing.called
    connection.connectionLost(connectionDone)
    assert closing.called
    assert not clock.getDelayedCalls()
