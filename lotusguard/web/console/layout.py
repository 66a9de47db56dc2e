# SPDX-License-Identifier: Apache-2.0
"""Parts that the console's pages are made of: the document, tables, charts, actions. Nothing is styled inline."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

from attrs import frozen
from twisted.web.template import Tag, tags

CHART_WIDTH, CHART_HEIGHT = 600, 80


def document(title: str, *content: Any, signed_in: bool, live: bool = False) -> Tag:
    """A whole page. :param live: whether its script keeps it up to date."""
    head: list[Any] = [
        tags.meta(charset="utf-8"),
        tags.meta(name="viewport", content="width=device-width, initial-scale=1"),
        tags.title(f"{title} · lotusguard"),
        tags.link(rel="stylesheet", href="/console/style.css"),
    ]
    stale: Tag | str = ""
    if live:
        head.append(tags.script(src="/console/console.js", defer="defer"))
        text = "The guard does not answer. What is shown below may be out of date."
        stale = tags.p(text, id="stale", class_="stale", role="status", hidden="hidden")
    navigation = (
        tags.nav(tags.a("Overview", href="/"), tags.a("Sign out", href="/console/sign-out")) if signed_in else ""
    )
    return tags.html(
        tags.head(*head),
        tags.body(tags.header(tags.h1("lotusguard"), navigation), stale, Tag("main")(*content, id="content")),
        lang="en",
    )


@frozen
class Row:
    """One row of a table. :ivar key: what it is about; it is the row's heading."""

    key: Any
    cells: Sequence[Any]


def table(caption: str, headings: Sequence[str], rows: Sequence[Row], empty: str) -> Tag:
    """A table; on narrow screens its rows become blocks, in which each cell says what it is.

    :param empty: what is said where there are no rows.
    """
    if not rows:
        return tags.p(empty, class_="empty")
    head = tags.thead(tags.tr(*(tags.th(heading, scope="col") for heading in headings)))
    body = [
        tags.tr(
            tags.th(row.key, scope="row"),
            *(tags.td(cell, **{"data-label": heading}) for heading, cell in zip(headings[1:], row.cells, strict=True)),
        )
        for row in rows
    ]
    return tags.table(tags.caption(caption, class_="unseen"), head, tags.tbody(*body))


def action(room_id: str, user: str, name: str, label: str) -> Tag:
    """A link to the page that asks before it is done."""
    query = urlencode({"room_id": room_id, "user": user, "action": name})
    described = f"{label} {user}" if user else label
    return tags.a(label, href=f"/console/confirm?{query}", class_="action", **{"aria-label": described})


def page_links(path: str, page: int, pages: int, **fields: str) -> Tag | str:
    """Links to the pages before and after this one. Nothing if there is only one."""
    if pages <= 1:
        return ""
    links = [
        tags.a(label, href=f"{path}?{urlencode({**fields, 'page': number})}", class_="action")
        for label, number in (("Previous", page - 1), ("Next", page + 1))
        if 1 <= number <= pages
    ]
    return tags.nav(f"Page {page} of {pages} ", *links)


def room_label(room_id: str, name: str) -> list[Any]:
    """A room's name, if it has one, and its ID."""
    return [name, " ", tags.code(room_id)] if name else [tags.code(room_id)]


def room_link(room_id: str, name: str) -> list[Any]:
    """The same, as a link to the room's call."""
    link = tags.a(name or room_id, href=f"/console/room?{urlencode({'id': room_id})}")
    return [link, " ", tags.code(room_id)] if name else [link]


def seats(taken: int, limit: int | None) -> list[Any]:
    """How many seats are taken, in words and as a bar."""
    if limit is None:
        return [f"{taken}, no limit"]
    share = min(1.0, taken / limit)
    bar = Tag("svg")(
        Tag("rect")(width="100", height="10", class_="all"),
        Tag("rect")(width=f"{share * 100:.0f}", height="10", class_="full" if share == 1 else "taken"),
        viewBox="0 0 100 10", preserveAspectRatio="none", class_="seats", **{"aria-hidden": "true"},
    )  # fmt: skip
    return [f"{taken} of {limit} ", bar]


def dot(colour: str) -> Tag:
    """A user's colour."""
    return Tag("svg")(
        Tag("circle")(cx="5", cy="5", r="5", fill=colour), viewBox="0 0 10 10", class_="dot", **{"aria-hidden": "true"}
    )


def chart(caption: str, bars: Sequence[tuple[float, float]], *more: Any) -> Tag:
    """Stacked bars, one per minute. :param more: of the caption."""
    scale = CHART_HEIGHT / max((low + high for low, high in bars), default=0) if any(map(any, bars)) else 0
    width = CHART_WIDTH / len(bars)
    drawn = []
    for index, (low, high) in enumerate(bars):
        for value, base, class_ in ((low, 0.0, "first"), (high, low, "second")):
            if value:
                drawn.append(
                    Tag("rect")(
                        x=f"{index * width:.1f}", width=f"{width - 1:.1f}", height=f"{value * scale:.1f}",
                        y=f"{CHART_HEIGHT - (base + value) * scale:.1f}", class_=class_,
                    )
                )  # fmt: skip
    svg = Tag("svg")(
        *drawn, viewBox=f"0 0 {CHART_WIDTH} {CHART_HEIGHT}", preserveAspectRatio="none", class_="chart", role="img",
        **{"aria-label": caption},
    )  # fmt: skip
    axis = tags.p(tags.span("an hour ago"), tags.span("now"), class_="axis")
    return tags.figure(tags.figcaption(caption, *more), svg, axis)


def at(seconds: float) -> Tag:
    """A time of day. :param seconds: since the epoch."""
    moment = datetime.fromtimestamp(seconds, UTC)
    return tags.time(moment.strftime("%H:%M:%S"), datetime=moment.strftime("%Y-%m-%dT%H:%M:%SZ"))
