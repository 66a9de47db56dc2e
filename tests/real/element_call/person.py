# SPDX-License-Identifier: Apache-2.0
"""A user of Element Call: one page in a browser profile of its own. Tests."""

from __future__ import annotations

import json
import time
from base64 import b64decode
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from attrs import define, field

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Error, Page, expect
else:
    _playwright = pytest.importorskip("playwright.sync_api")
    Error, expect = _playwright.Error, _playwright.expect

PATIENCE = 60_000.0
"""Milliseconds; a busy machine needs long to start a page and its media."""
PLAYING = """count => {
  const times = [...document.querySelectorAll("video")].filter(one => one.videoWidth).map(one => one.currentTime);
  const before = window.timesBefore ?? [];
  window.timesBefore = times;
  return times.length === count && before.length === count && times.every((time, n) => time > before[n]);
}"""


@define
class GuardRequest:
    """One request from the page to the guard.

    :ivar status: of the answer, or None as long as there is none; 0 where there was none at all.
    """

    at: float
    method: str
    path: str
    delayed: bool
    status: int | None = None

    def __str__(self) -> str:
        with_delay = " with delay" if self.delayed else ""
        return f"{self.method} {self.path}{with_delay} {self.status}"


@define(slots=False)  # Playwright adds attributes to the objects whose methods it calls
class Person:
    """:ivar requests: what the page sent to the guard so far, in order, preflights included."""

    user: str
    context: BrowserContext
    page: Page
    guard_url: str
    pictures: Path
    requests: list[GuardRequest] = field(factory=list)
    console: list[str] = field(factory=list)
    _by_id: dict[str, GuardRequest] = field(factory=dict)
    _cdp: Any = None

    def __attrs_post_init__(self) -> None:
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda error: self.console.append(f"uncaught: {error}"))
        self._cdp = self.context.new_cdp_session(self.page)
        self._cdp.send("Network.enable")
        self._cdp.on("Network.requestWillBeSent", self._sent)
        self._cdp.on("Network.responseReceived", self._answered)
        self._cdp.on("Network.loadingFailed", self._failed)

    def _sent(self, event: dict[str, Any]) -> None:
        request = event["request"]
        if not request["url"].startswith(self.guard_url):
            return
        body = request.get("postData") or "{}"
        self._by_id[event["requestId"]] = sent = GuardRequest(
            time.time(),
            request["method"],
            request["url"].removeprefix(self.guard_url),
            "delay_id" in json.loads(body),
        )
        self.requests.append(sent)

    def _answered(self, event: dict[str, Any]) -> None:
        if sent := self._by_id.get(event["requestId"]):
            sent.status = int(event["response"]["status"])

    def _failed(self, event: dict[str, Any]) -> None:
        if (sent := self._by_id.get(event["requestId"])) and sent.status is None:
            sent.status = 0

    def asked(self) -> list[str]:
        """The requests that got an answer, without preflights, in order."""
        return [str(request) for request in self.requests if request.method != "OPTIONS" and request.status is not None]

    # -- what the person does ----------------------------------------------------------------------------

    def open(self, url: str) -> None:
        """Open the page of a call and wait for its preview."""
        self.page.goto(url)
        expect(self.page.get_by_test_id("lobby_joinCall")).to_be_visible(timeout=PATIENCE)

    def press_join(self) -> None:
        self.page.get_by_test_id("lobby_joinCall").click(timeout=PATIENCE)

    def press(self, control: str) -> None:
        """Press a button of the call: ``mute``, ``videomute``, ``screenshare`` or ``leave``."""
        self.page.get_by_test_id(f"incall_{control}").first.click(timeout=PATIENCE)

    def hold_sync(self) -> None:
        """From now on the page learns nothing new from the homeserver: its next ``/sync`` gets no answer."""
        self.page.route("**/_matrix/client/*/sync*", lambda route: None)

    def suspend(self) -> None:
        """Stop all scripts of the page, so that it does nothing by itself; its connections stay open."""
        self._cdp.send("Debugger.enable")
        self._cdp.send("Debugger.pause")

    def resume(self) -> None:
        self._cdp.send("Debugger.resume")

    # -- what the person sees ----------------------------------------------------------------------------

    def is_in_the_call(self) -> None:
        """Wait until the page shows the controls of a call."""
        expect(self.page.get_by_test_id("incall_leave").first).to_be_visible(timeout=PATIENCE)

    def sees_tiles(self, count: int) -> None:
        """Wait until the page shows that many participants and screens."""
        expect(self.page.get_by_test_id("videoTile")).to_have_count(count, timeout=PATIENCE)

    def sees_moving_pictures(self, count: int) -> None:
        """Wait until that many videos play, and go on playing."""
        self.page.wait_for_function(PLAYING, arg=count, timeout=PATIENCE, polling=500)

    def is_refused(self, text: str) -> None:
        """Wait for the page that says so, and open its details, where the guard's text is."""
        details = self.page.get_by_text("Technical details")
        expect(details).to_be_visible(timeout=PATIENCE)
        details.click(timeout=PATIENCE)
        self.sees(text)

    def sees(self, text: str) -> None:
        expect(self.page.get_by_text(text).first).to_be_visible(timeout=PATIENCE)

    def until(self, condition: Callable[[], Any], what: str, seconds: float = PATIENCE / 1000) -> Any:
        """Wait for something outside the page, while events of the page are received. :return: its value."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
            self.page.wait_for_timeout(100)
        return value

    def picture(self, name: str) -> None:
        """Keep a screenshot of the page, also if the page is suspended."""
        shot = self._cdp.send("Page.captureScreenshot", {"format": "png"})
        (self.pictures / f"{name}.png").write_bytes(b64decode(shot["data"]))

    def keep_traces(self, path: Path) -> None:
        """Write down how the page looks, what it asked the guard for and its console, to explain a failed test."""
        told = [f"{one.at - self.requests[0].at:7.2f} {one}" for one in self.requests]
        told += ["", *self.console]
        path.with_suffix(".txt").write_text("\n".join(told), encoding="utf-8")
        with suppress(Error):
            self.page.screenshot(path=path.with_suffix(".png"), timeout=5000)
