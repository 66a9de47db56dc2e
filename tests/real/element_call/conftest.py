# SPDX-License-Identifier: Apache-2.0
"""The real Element Call in a headless Chromium, with the real services; skipped where one of them is missing.

``ELEMENT_CALL_DIST`` names the built bundle, ``CHROMIUM`` the browser, and ``ELEMENT_CALL_PICTURES`` a folder where the
screenshots are kept (by default a temporary one).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.real.element_call.site import Site
from tests.real.stack import Stack, executable

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext

    from tests.real.element_call.person import Person

FLAGS = [
    "--no-sandbox",
    "--use-fake-device-for-media-stream=fps=5",
    "--use-fake-ui-for-media-stream",
    "--allow-loopback-in-peer-connection",
    "--disable-features=WebRtcHideLocalIpsWithMdns",
    "--autoplay-policy=no-user-gesture-required",
    "--mute-audio",
]
SIZE = (800, 640)
"""Of a page, in pixels: small pictures, and little work for a machine without a graphics card."""
OpenPage = Callable[..., "Person"]


@pytest.fixture(scope="session")
def bundle() -> Path:
    """The built bundle of Element Call."""
    given = os.environ.get("ELEMENT_CALL_DIST", "")
    if not given or not (Path(given) / "index.html").is_file():
        pytest.skip("ELEMENT_CALL_DIST names no built bundle of Element Call")
    return Path(given)


@pytest.fixture(scope="session")
def browser(bundle: Path) -> Iterator[Browser]:
    chromium = executable("CHROMIUM", "chromium")
    if chromium is None:
        pytest.skip("CHROMIUM names no executable, and none is on PATH")
    playwright = pytest.importorskip("playwright.sync_api").sync_playwright().start()
    try:
        opened = playwright.chromium.launch(executable_path=chromium, args=FLAGS, chromium_sandbox=False)
        yield opened
        opened.close()
    finally:
        playwright.stop()


@pytest.fixture(scope="session")
def services(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Synapse, lk-jwt-service and livekit-server as Element Call needs them."""
    found = {
        variable: executable(variable, name)
        for variable, name in (("LIVEKIT_SERVER", "livekit-server"), ("LK_JWT_SERVICE", "lk-jwt-service"))
    }
    for variable, path in found.items():
        if path is None:
            pytest.skip(f"{variable} names no executable, and none is on PATH")
    for module in ("synapse", "cryptography"):
        pytest.importorskip(module)
    place = tmp_path_factory.mktemp("element-call")
    stack = Stack(place, str(found["LIVEKIT_SERVER"]), str(found["LK_JWT_SERVICE"]))
    support_calls(place / "homeserver.yaml", stack)
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()


def support_calls(path: Path, stack: Stack) -> None:
    """Add to Synapse's configuration what MatrixRTC needs."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    transport = {"type": "livekit", "livekit_service_url": stack.guard_url}
    plenty = {"per_second": 10_000, "burst_count": 10_000}
    config["public_baseurl"] = stack.homeserver_url
    config["extra_well_known_client_content"] = {"org.matrix.msc4143.rtc_foci": [transport]}
    config["matrix_rtc"] = {"transports": [transport]}
    config["rc_delayed_event_mgmt"] = plenty
    config["experimental_features"] |= {
        "msc3266_enabled": True,
        "msc4143_enabled": True,
        "msc4222_enabled": True,
        "msc4354_enabled": True,
    }
    path.write_text(yaml.safe_dump(config), encoding="utf-8")


@pytest.fixture(scope="session")
def guard_account(services: Stack) -> str:
    """A user without admin rights, whose token the guard uses where it is to be in rooms itself."""
    return services.users("guard")[0]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for screenshots."""
    given = os.environ.get("ELEMENT_CALL_PICTURES", "")
    return Path(given) if given else tmp_path_factory.mktemp("pictures")


@pytest.fixture
def sites(bundle: Path, services: Stack) -> Iterator[Callable[[str], Site]]:
    """Gives Element Call in one of its modes."""
    running: dict[str, Site] = {}

    def site(mode: str) -> Site:
        if mode not in running:
            running[mode] = Site(
                bundle,
                mode,
                homeserver_url=services.homeserver_url,
                server_name=services.server_name,
                guard_url=services.guard_url,
            )
        return running[mode]

    yield site
    for one in running.values():
        one.close()


@pytest.fixture
def open_page(browser: Browser, services: Stack, pictures: Path, request: pytest.FixtureRequest) -> Iterator[OpenPage]:
    """Opens an empty page for a user who is signed in. All are closed when the test ends.

    With ``through`` the page reaches the guard at that URL.
    What each saw last, and its console, stay in the folder of the services' logs.
    """
    from tests.real.element_call.person import Person

    contexts: list[BrowserContext] = []
    people: list[Person] = []

    def page(user: str, *, through: str = "") -> Person:
        device = services.matrix("GET", "/_matrix/client/v3/account/whoami", user=user)["device_id"]
        session = {
            "user_id": user,
            "device_id": device,
            "access_token": services.tokens[user],
            "passwordlessUser": False,
        }
        context = browser.new_context(
            viewport={"width": SIZE[0], "height": SIZE[1]}, reduced_motion="reduce", ignore_https_errors=True
        )
        contexts.append(context)
        if through:
            transport = {"type": "livekit", "livekit_service_url": through}
            context.route("**/rtc/transports", lambda route: route.fulfill(json={"rtc_transports": [transport]}))
        stored = json.dumps(json.dumps(session))
        context.add_init_script(f"localStorage.setItem('matrix-auth-store', {stored})")
        people.append(Person(user, context, context.new_page(), through or services.guard_url, pictures))
        return people[-1]

    yield page
    for number, person in enumerate(people):
        person.keep_traces(services.place / f"{request.node.name}-{number}")
    for context in contexts:
        context.close()
