# SPDX-License-Identifier: Apache-2.0
"""The console's stream to a browser that does not read, such as one whose tab is suspended. In memory, with a clock."""

from __future__ import annotations

from typing import Any

from attrs import define, evolve
from klein import Klein
from twisted.internet.error import ConnectionAborted
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from lotusguard.guard.joins.history import JoinHistory
from lotusguard.web.console.updates import KEEP_ALIVE, STALLED, STREAMS, UPDATE_EVERY, Updates
from lotusguard.web.console.view import Overview
from lotusguard.web.site import GuardRequest, GuardSite


@define(eq=False)
class View:
    """Shows something else each time that it is asked."""

    shown: Overview
    made: int = 0

    async def overview(self) -> Overview:
        self.made += 1
        return evolve(self.shown, report={"reasons": [f"This is overview {self.made}."]})


class Browser:
    """A connection to the stream. It reads unless it is told to stop."""

    def __init__(self, site: GuardSite) -> None:
        self.transport = StringTransport()
        self.channel = site.buildProtocol(None)
        self.channel.makeConnection(self.transport)
        self.channel.dataReceived(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")

    @property
    def open(self) -> bool:
        return not self.transport.disconnecting

    def sent(self) -> bytes:
        """What it was sent since this was asked last."""
        sent: bytes = self.transport.value()
        self.transport.clear()
        return sent

    def stop_reading(self) -> None:
        """The guard's buffer for it has been filled."""
        self.channel.pauseProducing()

    def read(self) -> None:
        """The buffer has been emptied."""
        self.channel.resumeProducing()

    def close(self) -> None:
        self.channel.connectionLost(Failure(ConnectionAborted()))


class Consoles:
    """The stream, on a clock."""

    def __init__(self) -> None:
        self.clock = Clock()
        minutes = JoinHistory(self.clock).last_hour()
        self.view = View(Overview({}, 0, (), (), 0, (), minutes, lambda at: at, {}))
        view: Any = self.view
        updates = Updates(view, self.clock)
        app = Klein()

        @app.route("/events")
        async def events(request: GuardRequest) -> None:
            await updates.stream(request, lambda: True)

        self.site = GuardSite(app, self.clock, max_body=4096)

    def wait(self, seconds: float) -> None:
        for _ in range(round(seconds / UPDATE_EVERY)):
            self.clock.advance(UPDATE_EVERY)


def test_a_browser_that_does_not_read_is_sent_nothing_and_then_the_newest_overview() -> None:
    consoles = Consoles()
    browser = Browser(consoles.site)
    assert b"This is overview 1." in browser.sent()
    consoles.wait(UPDATE_EVERY)
    assert b"This is overview 2." in browser.sent()
    browser.stop_reading()
    consoles.wait(KEEP_ALIVE + UPDATE_EVERY)
    assert browser.sent() == b""
    browser.read()
    consoles.wait(UPDATE_EVERY)
    assert browser.sent().count(f"This is overview {consoles.view.made}.".encode()) == 1
    assert browser.open


def test_a_stream_that_is_not_read_for_long_is_closed_and_gives_its_place_back() -> None:
    consoles = Consoles()
    browsers = [Browser(consoles.site) for _ in range(STREAMS)]
    assert b"204" in Browser(consoles.site).sent()
    browsers[0].stop_reading()
    consoles.wait(STALLED - UPDATE_EVERY)
    browsers[0].stop_reading()  # it is still so
    assert browsers[0].open
    consoles.wait(2 * UPDATE_EVERY)
    assert [browser.open for browser in browsers] == [False] + [True] * (STREAMS - 1)
    browsers[0].close()
    assert b"This is overview" in Browser(consoles.site).sent()


def test_a_browser_that_leaves_gives_its_place_back() -> None:
    consoles = Consoles()
    for _ in range(2 * STREAMS):
        browser = Browser(consoles.site)
        assert b"This is overview" in browser.sent()
        browser.close()
        consoles.wait(KEEP_ALIVE)
