# SPDX-License-Identifier: Apache-2.0
"""The console's pages, as twisted.web.template tags: all text is escaped, and nothing is styled inline."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

from twisted.web.template import Tag, tags

from lotusguard.guard.joins.history import Minute
from lotusguard.web.console.view import Overview, RoomRow

SHOWN_NAMES = 3
"""Users of a call that the front page names."""
_CALL_HEADINGS = ("User", "Seat", "May publish", "Actions")
CHART_WIDTH, CHART_HEIGHT = 600, 80


def document(title: str, *content: Any, signed_in: bool, live: bool = False) -> Tag:
    """A whole page. :param live: whether its script keeps it up to date."""
    head: list[Any] = [
        tags.meta(charset="utf-8"),
        tags.meta(name="viewport", content="width=device-width, initial-scale=1"),
        tags.title(f"{title} · lotusguard"),
        tags.link(rel="stylesheet", href="/console/style.css"),
    ]
    if live:
        head.append(tags.script(src="/console/console.js", defer="defer"))
    navigation = (
        tags.nav(tags.a("Overview", href="/"), tags.a("Sign out", href="/console/sign-out")) if signed_in else ""
    )
    return tags.html(
        tags.head(*head),
        tags.body(tags.header(tags.h1("lotusguard"), navigation), Tag("main")(*content, id="content")),
        lang="en",
    )


def sign_in(fault: str = "") -> Tag:
    """The sign-in form. :param fault: why the last try failed."""
    return document(
        "Sign in",
        tags.h2("Sign in"),
        tags.p(fault, class_="fault", role="alert") if fault else "",
        tags.form(
            tags.label("Operators' token (GUARD_ADMIN_TOKEN)", for_="token"),
            tags.input(type="password", name="token", id="token", autocomplete="current-password", required="required"),
            tags.button("Sign in", type="submit"),
            method="post",
            action="/console/sign-in",
        ),
        signed_in=False,
    )


def message(title: str, text: str) -> Tag:
    """A page that says one thing."""
    return document(title, tags.h2(title), tags.p(text), signed_in=True)


def confirm(question: str, button: str, csrf: str, fields: dict[str, str]) -> Tag:
    """Asks before something is done."""
    hidden = [tags.input(type="hidden", name=name, value=value) for name, value in {**fields, "csrf": csrf}.items()]
    return document(
        "Confirm",
        tags.h2(question),
        tags.form(*hidden, tags.button(button, type="submit"), method="post", action="/console/act"),
        tags.p(tags.a("Back", href="/")),
        signed_in=True,
    )


def overview(shown: Overview) -> Tag:
    """The front page."""
    return document("Overview", *live_part(shown), signed_in=True, live=True)


def live_part(shown: Overview) -> list[Any]:
    """What the script replaces when something changes."""
    return [
        _health(shown.report),
        _lobby(shown),
        _rooms(shown.rooms),
        _charts(shown.minutes),
        _decisions(shown),
    ]


def room(row: RoomRow, rights: dict[str, list[str]]) -> Tag:
    """One call, with everybody in it. :param rights: what each user may publish."""
    rows = [
        tags.tr(
            tags.th(one.user, scope="row"),
            tags.td("has a seat" if one.state == "present" else "no seat"),
            tags.td(", ".join(rights.get(one.user, [])) or "nothing"),
            tags.td(
                _action(row.room_id, one.user, "mute", "Mute"), " ", _action(row.room_id, one.user, "remove", "Remove")
            ),
        )
        for one in row.present
    ]
    return document(
        "Call",
        tags.h2("Call of ", tags.code(row.room_id)),
        tags.p(_seats(row), " ", _action(row.room_id, "", "refresh", "Read policy and members again")),
        _table(
            "In the call", ("User", "Seat", "May publish", "Actions"), rows, "Nobody is in this call.", visible=True
        ),
        tags.p(f"Issued a token and not arrived: {', '.join(row.awaited)}") if row.awaited else "",
        signed_in=True,
    )


def _health(report: dict[str, Any]) -> Tag:
    enforcing: dict[str, bool] = report.get("enforcing", {})
    off = [rule for rule, on in enforcing.items() if not on]
    summary = (
        "Everything is enforced." if not off else f"Not enforced: {', '.join(rule.replace('_', ' ') for rule in off)}."
    )
    reasons = [tags.li(reason) for reason in report.get("reasons", [])]
    dependencies = [
        tags.tr(
            tags.th(name, scope="row"),
            tags.td(known["error"] or "answers", class_="bad" if known["error"] else "good"),
        )
        for name, known in report.get("dependencies", {}).items()
    ]
    return tags.section(
        tags.h2("Status"),
        tags.p(summary, class_="bad" if off else "good", role="status"),
        tags.ul(*reasons) if reasons else "",
        _table("Dependencies", ("Service", "State"), dependencies, "", visible=True),
    )


def _lobby(shown: Overview) -> Tag | str:
    if not shown.waiting:
        return ""
    rows = [
        tags.tr(
            tags.th(one.user, scope="row"),
            tags.td(tags.code(one.room_id)),
            tags.td(_time(one.since)),
            tags.td(
                _action(one.room_id, one.user, "admit", "Admit"), " ", _action(one.room_id, one.user, "deny", "Deny")
            ),
        )
        for one in shown.waiting
    ]
    return tags.section(
        tags.h2("Waiting in the lobby"), _table("People who wait", ("User", "Room", "Since (UTC)", "Actions"), rows, "")
    )


def _rooms(rooms: Sequence[RoomRow]) -> Tag:
    rows = []
    for row in rooms:
        users = sorted({one.user for one in row.present})
        more = f" and {len(users) - SHOWN_NAMES} more" if len(users) > SHOWN_NAMES else ""
        link = tags.a(row.room_id, href=f"/console/room?{urlencode({'id': row.room_id})}")
        rows.append(
            tags.tr(tags.th(link, scope="row"), tags.td(_seats(row)), tags.td(", ".join(users[:SHOWN_NAMES]) + more))
        )
    return tags.section(
        tags.h2(f"Live calls ({len(rooms)})"),
        _table("Live calls", ("Room", "Seats", "In the call"), rows, "There are no calls."),
    )


def _seats(row: RoomRow) -> str:
    return f"{row.seats_taken} of {row.limit}" if row.limit is not None else f"{row.seats_taken}, no limit"


def _charts(minutes: Sequence[Minute]) -> Tag:
    joins = [(minute.admitted, minute.refused) for minute in minutes]
    slowest = [(minute.slowest * 1000, 0.0) for minute in minutes]
    most, longest = max(a + r for a, r in joins), max(ms for ms, _ in slowest)
    return tags.section(
        tags.h2("Last hour"),
        _chart(f"Joins per minute, at most {most}; refused ones in the second colour", joins),
        _chart(f"Slowest join per minute, at most {longest:.0f} ms", slowest),
    )


def _chart(caption: str, bars: Sequence[tuple[float, float]]) -> Tag:
    """Stacked bars, one per minute."""
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
    svg = Tag("svg")(*drawn, viewBox=f"0 0 {CHART_WIDTH} {CHART_HEIGHT}", role="img", **{"aria-label": caption})
    return tags.figure(svg, tags.figcaption(caption))


def _decisions(shown: Overview) -> Tag:
    rows = [
        tags.tr(
            tags.td(_time(shown.began(decision.began))),
            tags.td(
                decision.verdict.value.replace("_", " "), class_="bad" if decision.verdict.value != "allowed" else ""
            ),
            tags.td(decision.user or "not verified"),
            tags.td(tags.code(decision.room_id or "")),
            tags.td(decision.reason.replace("_", " ")),
        )
        for decision in shown.decisions
    ]
    headings = ("When (UTC)", "Verdict", "User", "Room", "Reason")
    return tags.section(tags.h2("Latest decisions"), _table("Latest decisions", headings, rows, "No joins yet."))


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%H:%M:%S")


def _table(
    caption: str, headings: Sequence[str], rows: Sequence[Tag], empty: str, *, visible: bool = False
) -> Tag | str:
    """:param visible: whether the caption is shown, where no heading says the same."""
    if not rows:
        return tags.p(empty) if empty else ""
    width = "wide" if len(headings) > 2 else ""
    head = tags.thead(tags.tr(*(tags.th(heading, scope="col") for heading in headings)))
    table = tags.table(
        tags.caption(caption, class_="" if visible else "unseen"),
        head,
        tags.tbody(*rows),
        class_=width,
    )
    return tags.div(table, class_="scroll", tabindex="0", role="region", **{"aria-label": caption})


def _action(room_id: str, user: str, action: str, label: str) -> Tag:
    query = urlencode({"room_id": room_id, "user": user, "action": action})
    described = f"{label} {user}" if user else label
    return tags.a(label, href=f"/console/confirm?{query}", class_="action", **{"aria-label": described})
