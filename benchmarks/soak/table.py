# SPDX-License-Identifier: Apache-2.0
"""The table at the end of a soak: what must hold whatever happened, and whether it did. Benchmarks."""

from __future__ import annotations

from typing import TypeAlias

from benchmarks.soak.guard import GuardLog
from benchmarks.soak.truth import Truth
from lotusguard.clients.http import IDLE_CONNECTIONS

Row: TypeAlias = tuple[str, object, object, bool]
"""What, how much was found, how much is allowed, and whether that held."""
GONE_WITHIN = 5.0
"""Seconds within which what is forbidden has to be gone while all are well: policy's age, a round, and some."""
SOME = 8
"""Descriptors that may be open when nobody asks anything: the guard asks its dependencies all the time."""
JUDGED = (
    "let in past the cap", "a seat's holder refused", "refused beside a free seat", "refused without a cap",
    "put out of their own seat", "a token for another room", "a token with a forbidden source",
    "a token that lives too long",
)  # fmt: skip
COUNTED = ("requests that hung", "failures without a fault", "wrong exits on SIGTERM")


def table(
    truth: Truth, said: GuardLog, growth: tuple[float, int, int, int], users: int, idle: int, left: int
) -> list[Row]:
    """The rows; what broke them is printed.

    :param growth: see `GuardUnderSoak.growth`. :param idle: descriptors at the start. :param left: and in the end.
    """
    blamed = [s for s in truth.suspicions if not said.unenforced.get(s.request_id)]
    unexplained = [f for f in said.fail_open if not truth.disturbed(f[0], f[0])]
    for suspicion in blamed:
        _print(f"{suspicion.what}: {suspicion.detail} [{suspicion.request_id}]")
    for at, check, reason in unexplained[:5]:
        _print(f"{at:.1f} {check} not enforced without a fault: {reason}")
    for traceback in said.tracebacks[:3]:
        _print(traceback)
    lost = sum(n for what, n in truth.counts.items() if what.startswith("connections lost without"))
    none = [(what, sum(s.what == what for s in blamed)) for what in JUDGED]
    none += [(what, truth.counts[what]) for what in COUNTED]
    none += [("connections lost without a fault", lost), ("unenforced without a fault", len(unexplained))]
    none += [("tracebacks logged", len(said.tracebacks))]
    rows: list[Row] = [(what, found, 0, found == 0) for what, found in none]
    for what in ("forbidden tracks", "disguised tracks", "past the cap"):
        seconds = truth.longest[what]
        rows.append((f"{what}: longest life, s", f"{seconds:.1f}", GONE_WITHIN, seconds <= GONE_WITHIN))
    measured, most, warm, end = growth
    allowed = users * 2 + 3 * IDLE_CONNECTIONS + 40
    rows.append(("descriptors at most", most, allowed, most <= allowed))
    rows.append(("descriptors left when idle", left, f"{idle} + {SOME}", left <= idle + SOME))
    bound = int(warm * 1.15) + 4096
    rows.append((f"memory after {measured:.0f} s, kB (warm {warm})", end, bound, end <= bound))
    _print()
    for name, count in sorted(truth.counts.items()):
        _print(f"{name:44} {count}")
    _print(f"{'passed unenforced, all during faults':44} {len(said.fail_open) - len(unexplained)}")
    return rows


def show(rows: list[Row]) -> None:
    """Print the table."""
    _print(f"\n  {'what must hold':44} {'found':>10} {'allowed':>10}")
    for what, found, allowed, held in rows:
        _print(f"{what:44} {found!s:>10} {allowed!s:>10}  {'ok' if held else 'BROKEN'}")


def _print(line: str = "") -> None:
    print(f"  {line}" if line else "")  # noqa: T201
