# SPDX-License-Identifier: Apache-2.0
"""The table at the end of a soak: what must hold whatever happened, and whether it did."""

from __future__ import annotations

from attrs import frozen

from lotusguard.clients.http import IDLE_CONNECTIONS
from tests.soak.guard_process import GuardLog
from tests.soak.oracle import GONE_WITHIN, TOLD_AFTER, Oracle

SPARE_DESCRIPTORS = 8
"""Descriptors that may be open without requests: the guard asks its dependencies all the time."""
NEVER = (
    "a token past the limit", "a token for a non-member", "a token below the join level", "a token for another room",
    "a token with a source that is not allowed", "a token that lives too long",
    "the owner of a seat refused", "refused beside a free seat", "refused without a limit",
    "a member refused", "refused although the level suffices", "refused for no reason of the room's",
    "removed from their own seat", "a member removed",
)  # fmt: skip
NOT_FOR_LONG = (
    "a non-member in the call", "below the join level in the call", "past the limit in the call",
    "published above their rights", "a forbidden source published", "video labelled as microphone",
)  # fmt: skip
COUNTED = (
    "requests that hung", "failures without a fault", "webhooks answered late without a fault",
    "wrong exits on SIGTERM",
)  # fmt: skip


@frozen
class Row:
    """One thing that must hold: how much was found, how much is allowed, whether it held."""

    what: str
    found: object
    allowed: object
    held: bool


def table(
    oracle: Oracle, log: GuardLog, growth: tuple[float, int, int, int], users: int, idle: int, left: int
) -> list[Row]:
    """The rows; the details of every violation are printed.

    :param growth: see `GuardUnderSoak.growth`. :param idle: descriptors at the start. :param left: at the end.
    """
    blamed = [s for s in oracle.suspicions if not s.is_explained(log.unenforced)]
    unexplained = [f for f in log.fail_open if not oracle.disturbances.any_between(f[0], f[0])]
    for suspicion in blamed:
        _print(f"{suspicion.what}: {suspicion.detail} [{suspicion.request_id}]")
    for at, check, reason in unexplained[:5]:
        _print(f"{at:.1f} {check} not enforced without a fault: {reason}")
    for traceback in log.tracebacks[:3]:
        _print(traceback)
    lost = sum(n for what, n in oracle.counts.items() if what.startswith("connections lost without"))
    none = [(what, sum(s.what == what for s in blamed)) for what in NEVER]
    none += [(f"{what} for longer than {GONE_WITHIN:g} s", len(oracle.too_long[what])) for what in NOT_FOR_LONG]
    none += [(what, oracle.counts[what]) for what in COUNTED]
    none += [("connections lost without a fault", lost), ("unenforced without a fault", len(unexplained))]
    none += [("tracebacks logged", len(log.tracebacks))]
    rows = [Row(what, found, 0, found == 0) for what, found in none]
    measured, most, warm, end = growth
    allowed = users * 2 + 3 * IDLE_CONNECTIONS + 40
    rows.append(Row("descriptors at most", most, allowed, most <= allowed))
    rows.append(Row("descriptors left when idle", left, f"{idle} + {SPARE_DESCRIPTORS}",
                    left <= idle + SPARE_DESCRIPTORS))  # fmt: skip
    bound = int(warm * 1.15) + 4096
    rows.append(Row(f"memory after {measured:.0f} s, kB (warm {warm})", end, bound, end <= bound))
    _print()
    for name, count in sorted(oracle.counts.items()):
        _print(f"{name:56} {count}")
    for what in (*NOT_FOR_LONG, TOLD_AFTER):
        _print(f"{f'{what}: at most, s':56} {max(0.0, oracle.longest[what]):.1f}")
    _print(f"{'not enforced, all during faults':56} {len(log.fail_open) - len(unexplained)}")
    return rows


def show(rows: list[Row]) -> None:
    """Print the table."""
    _print(f"\n  {'what must hold':56} {'found':>10} {'allowed':>10}")
    for row in rows:
        _print(f"{row.what:56} {row.found!s:>10} {row.allowed!s:>10}  {'ok' if row.held else 'BROKEN'}")


def _print(line: str = "") -> None:
    print(f"  {line}" if line else "")  # noqa: T201
