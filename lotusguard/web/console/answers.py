# SPDX-License-Identifier: Apache-2.0
"""The console's answers: pages and files with strict headers, redirections, and the session's cookie."""

from __future__ import annotations

from importlib.resources import files

from twisted.web.template import Tag, flattenString

from lotusguard.web.site import GuardRequest

COOKIE = b"lotusguard_session"
_HEADERS = {
    b"Cache-Control": b"no-store",
    b"Content-Security-Policy": b"default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    b"form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    b"Referrer-Policy": b"no-referrer",
    b"X-Content-Type-Options": b"nosniff",
    b"X-Frame-Options": b"DENY",
}
_STATIC = {"style.css": b"text/css; charset=utf-8", "console.js": b"text/javascript; charset=utf-8"}


def set_headers(request: GuardRequest, content_type: bytes) -> None:
    """The headers of everything that the console sends."""
    for name, value in _HEADERS.items():
        request.setHeader(name, value)
    request.setHeader(b"Content-Type", content_type)


async def send(request: GuardRequest, code: int, page: Tag) -> None:
    """Answer with a page."""
    body = b"<!DOCTYPE html>\n" + await flattenString(None, page)
    request.setResponseCode(code)
    set_headers(request, b"text/html; charset=utf-8")
    request.setHeader(b"Content-Length", b"%d" % len(body))
    request.write(body)
    request.finish()


def static(request: GuardRequest, name: str) -> bytes:
    """A file of the package."""
    set_headers(request, _STATIC[name])
    return files("lotusguard.web.console").joinpath("static", name).read_bytes()


def redirect(request: GuardRequest) -> None:
    """To the front page."""
    request.setResponseCode(303)
    request.setHeader(b"Location", b"/")
    request.setHeader(b"Cache-Control", b"no-store")
    request.finish()


def set_cookie(request: GuardRequest, value: str, max_age: int | None) -> None:
    """:param max_age: seconds; ``None`` keeps the cookie until the browser is closed."""
    scheme = (request.requestHeaders.getRawHeaders(b"x-forwarded-proto") or [b""])[0].partition(b",")[0].strip()
    request.addCookie(
        COOKIE, value.encode("ascii"), path=b"/", max_age=None if max_age is None else b"%d" % max_age,
        secure=scheme.lower() == b"https", httpOnly=True, sameSite=b"strict",
    )  # fmt: skip
