# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks``: measures everything; writes ``benchmarks/results.json`` and the chart."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import large, scenarios, several_guards
from benchmarks.bench import Bench
from benchmarks.chart import growth_chart, joins_chart
from benchmarks.figures import Figure, markdown
from benchmarks.joins import joins
from benchmarks.processes import Callers, Dependencies, cores, raise_file_limit

HERE = Path(__file__).parent
BEGIN, END = "<!-- table -->", "<!-- /table -->"
LIBRARIES = ("twisted", "klein", "treq", "pyjwt", "protobuf", "livekit-protocol", "prometheus-client")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and callers; nothing is written")
    parser.add_argument("--rounds", type=int, default=0)
    options = parser.parse_args()
    raise_file_limit()
    if cores()[0] == cores()[1]:
        say("there is only one core: the load takes processor time from what is measured")
    figures: list[Figure] = []
    with Dependencies() as dependencies, Callers() as callers:
        quick = options.quick
        rounds = options.rounds or (2 if quick else 5)
        bench = Bench(
            dependencies, callers, rounds, 600 if quick else 2000,
            500 if quick else 4000, say, figures,
        )  # fmt: skip
        joins(bench)
        scenarios.crowd(bench)
        scenarios.hung(bench)
        scenarios.big_room(bench)
        scenarios.reconciling(bench, 5.0 if quick else 12.0)
        scenarios.policy_change(bench)
        large.room_size(bench)
        large.room_count(bench)
        large.many_rooms(bench)
        large.quiet_call(bench, 6.0 if quick else 15.0)
        large.big_event(bench, 12.0 if quick else 30.0)
        scenarios.start_up(bench)
        shared = several_guards.measure(dependencies, rounds, 600 if quick else 2400, say)
    wheel = wheel_size()
    if wheel is not None:
        figures.append(Figure("wheel", "kB", [wheel / 1000], digits=0))
    found: dict[str, Any] = {
        "machine": machine(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "quick": quick,
        "figures": [figure.as_json() for figure in figures],
    }
    sys.stdout.write("\n" + markdown(figures))
    if not quick:
        several_guards.write(shared)
        (HERE / "results.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        docs = HERE.parent / "docs"
        (docs / "benchmarks.svg").write_text(joins_chart(found["figures"]))
        (docs / "benchmarks-growth.svg").write_text(growth_chart(found["figures"]))
        page = docs / "benchmarks.md"
        page.write_text(with_table(page.read_text(), introduced(found, rounds) + markdown(figures)))


def introduced(found: dict[str, Any], rounds: int) -> str:
    """The machine and the versions, in one line."""
    on, library = found["machine"], found["libraries"]
    loads = "/".join(str(load) for load in on["load_average_at_the_end"])
    return (
        f"{on['processor']}, {on['cores']} cores, {on['system']}, Python {on['python']}, Twisted {library['twisted']}, "
        f"{rounds} rounds; load average at the end {loads}.\n\n"
    )


def with_table(page: str, table: str) -> str:
    """The page with another table between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise ValueError("the page has no place for the table")
    return f"{before}{BEGIN}\n{table}{END}{after}"


def say(text: str) -> None:
    sys.stderr.write(text + "\n")


def machine() -> dict[str, Any]:
    """The machine, and how busy it was."""
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    return {
        "processor": processor, "cores": len(os.sched_getaffinity(0)), "system": f"Linux {platform.release()}",
        "python": platform.python_version(), "load_average_at_the_end": [round(load, 1) for load in os.getloadavg()],
    }  # fmt: skip


def wheel_size() -> int | None:
    """Bytes of the wheel; ``None`` where it cannot be built without a network."""
    with TemporaryDirectory(prefix="bench") as directory:
        tree = Path(directory) / "tree"
        tree.mkdir()
        for name in ("lotusguard", "twisted"):
            shutil.copytree(HERE.parent / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            if (HERE.parent / name).exists():
                shutil.copy(HERE.parent / name, tree)
        command = [sys.executable, "-m", "build", "--wheel", "--outdir", directory, str(tree)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return None
        return next(Path(directory).glob("*.whl")).stat().st_size


if __name__ == "__main__":
    main()
