# SPDX-License-Identifier: Apache-2.0
"""The console's pages, as twisted.web.template tags: all text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twisted.web.template import Tag, tags

from lotusguard.guard.joins.decisions import Decision, Verdict
from lotusguard.guard.joins.history import Minute
from lotusguard.guard.seats.book import Presence
from lotusguard.web.console.layout import (
    Row,
    action,
    at,
    chart,
    document,
    dot,
    page_links,
    room_label,
    room_link,
    seats,
    table,
)
from lotusguard.web.console.view import Overview, Page, RoomRow

SHOWN_NAMES = 3
"""Users of a call that the front page names."""
_GOOD = (Verdict.ALLOWED, Verdict.WAITING)


def sign_in(fault: str = "") -> Tag:
    """The sign-in form. :param fault: why the last try failed."""
    form = tags.form(
        tags.label("Operators' token (GUARD_ADMIN_TOKEN)", for_="token"),
        tags.input(type="password", name="token", id="token", autocomplete="current-password", required="required"),
        tags.button("Sign in", type="submit"),
        method="post",
        action="/console/sign-in",
    )
    said = tags.p(fault, class_="fault", role="alert") if fault else ""
    return document("Sign in", tags.section(tags.h2("Sign in"), said, form), signed_in=False)


def message(title: str, text: str) -> Tag:
    """A page that says one thing."""
    return document(title, tags.section(tags.h2(title), tags.p(text)), signed_in=True)


def confirm(question: str, button: str, csrf: str, fields: dict[str, str], name: str) -> Tag:
    """Asks before something is done. :param name: the room's."""
    hidden = [tags.input(type="hidden", name=key, value=value) for key, value in {**fields, "csrf": csrf}.items()]
    return document(
        "Confirm",
        tags.section(
            tags.h2(question),
            tags.p("Room: ", *room_label(fields["room_id"], name)),
            tags.form(
                *hidden,
                tags.button(button, type="submit"),
                tags.a("Cancel", href="/", class_="action"),
                method="post",
                action="/console/act",
            ),
        ),
        signed_in=True,
    )


def overview(shown: Overview) -> Tag:
    """The front page."""
    return document("Overview", *live_part(shown), signed_in=True, live=True)


def live_part(shown: Overview) -> list[Any]:
    """What the script replaces when something changes: first what needs somebody to act."""
    return [
        _health(shown.report),
        _lobby(shown),
        _rooms(shown.rooms, shown.calls, _link_to_all(shown)),
        _charts(shown.minutes),
        _decisions(shown),
    ]


def all_rooms(page: Page[RoomRow]) -> Tag:
    """All live calls, a page at a time."""
    links = page_links("/console/rooms", page.number, page.pages)
    return document("Live calls", _rooms(page.items, page.total, links), signed_in=True)


def room(row: RoomRow, shown: Page[Presence], rights: dict[str, list[str]]) -> Tag:
    """One call. :param shown: the participants on this page. :param rights: what each of their users may publish."""
    rows = [
        Row(
            one.user,
            (
                "has a seat" if one.state == "present" else "no seat",
                ", ".join(rights.get(one.user, [])) or "nothing",
                [action(row.room_id, one.user, "mute", "Mute"), " ", action(row.room_id, one.user, "remove", "Remove")],
            ),
        )
        for one in shown.items
    ]
    return document(
        "Call",
        tags.section(
            tags.h2(row.name or "Call"),
            tags.p(tags.code(row.room_id)),
            tags.p("Seats: ", *seats(row.seats_taken, row.limit)),
            tags.p(f"Have a token and have not arrived: {', '.join(row.awaited)}") if row.awaited else "",
            tags.p(action(row.room_id, "", "refresh", "Read policy and members again")),
        ),
        tags.section(
            tags.h2("In the call"),
            table("In the call", ("User", "Seat", "May publish", "Actions"), rows, "Nobody is in this call."),
            page_links("/console/room", shown.number, shown.pages, id=row.room_id),
        ),
        signed_in=True,
    )


def _health(report: dict[str, Any]) -> Tag:
    enforcing: dict[str, bool] = report.get("enforcing", {})
    off = [rule.replace("_", " ") for rule, on in enforcing.items() if not on]
    summary = f"Not enforced: {', '.join(off)}." if off else "Everything is enforced."
    reasons = [tags.li(reason) for reason in report.get("reasons", [])]
    services = [
        tags.li(tags.strong(name), " ", known["error"] or "answers", class_="bad" if known["error"] else "good")
        for name, known in report.get("dependencies", {}).items()
    ]
    return tags.section(
        tags.h2("Status", class_="unseen"),
        tags.p(summary, class_="summary", role="status"),
        tags.ul(*reasons) if reasons else "",
        tags.ul(*services, class_="services", **{"aria-label": "Services"}) if services else "",
        class_="status off" if off else "status on",
    )


def _lobby(shown: Overview) -> Tag | str:
    if not shown.waiting:
        return ""
    rows = [
        Row(
            [dot(one.color), " ", one.user],
            (
                room_label(one.room_id, shown.names.get(one.room_id, "")),
                at(one.since),
                [action(one.room_id, one.user, "admit", "Admit"), " ", action(one.room_id, one.user, "deny", "Deny")],
            ),
        )
        for one in shown.waiting
    ]
    return tags.section(
        tags.h2(f"Waiting in the lobby ({shown.waiting_in_all})"),
        table("People who wait", ("User", "Room", "Since (UTC)", "Actions"), rows, ""),
        class_="waiting",
    )


def _rooms(rooms: Sequence[RoomRow], calls: int, links: Tag | str) -> Tag:
    """:param calls: how many there are, these included. :param links: to the others."""
    rows = []
    for row in rooms:
        users = sorted({one.user for one in row.present})
        more = f" and {len(users) - SHOWN_NAMES} more" if len(users) > SHOWN_NAMES else ""
        people = (", ".join(users[:SHOWN_NAMES]) + more) or "nobody yet"
        rows.append(Row(room_link(row.room_id, row.name), (seats(row.seats_taken, row.limit), people)))
    return tags.section(
        tags.h2(f"Live calls ({calls})"),
        table("Live calls", ("Room", "Seats", "In the call"), rows, "There are no calls."),
        links,
    )


def _link_to_all(shown: Overview) -> Tag | str:
    if shown.calls <= len(shown.rooms):
        return ""
    return tags.p(tags.a(f"Show all {shown.calls} calls", href="/console/rooms"))


def _charts(minutes: Sequence[Minute]) -> Tag:
    joins = [(minute.admitted, minute.refused) for minute in minutes]
    slowest = [(minute.slowest * 1000, 0.0) for minute in minutes]
    most, longest = max(a + r for a, r in joins), max(ms for ms, _ in slowest)
    refused = tags.span("refused", class_="refused")
    return tags.section(
        tags.h2("Last hour"),
        tags.div(
            chart(f"Joins per minute, at most {most}", joins, "; the upper part was ", refused),
            chart(f"Slowest join per minute, at most {longest:.0f} ms", slowest),
            class_="charts",
        ),
    )


def _decisions(shown: Overview) -> Tag:
    headings = ("When (UTC)", "Verdict", "User", "Room", "Reason")
    rows = [_decision(shown, decision) for decision in shown.decisions]
    return tags.section(tags.h2("Latest decisions"), table("Latest decisions", headings, rows, "No joins yet."))


def _decision(shown: Overview, decision: Decision) -> Row:
    verdict = tags.span(decision.verdict.replace("_", " "), class_="good" if decision.verdict in _GOOD else "bad")
    room_id = decision.room_id or ""
    return Row(
        at(shown.began(decision.began)),
        (
            verdict,
            decision.user or "not verified",
            room_label(room_id, shown.names.get(room_id, "")) if room_id else "unknown",
            decision.reason.replace("_", " "),
        ),
    )
