# SPDX-License-Identifier: Apache-2.0
"""Where a join's CPU time goes: the guard under load with ``cProfile``, as a table by own time.

``python -m benchmarks.profile`` writes ``benchmarks/profile.txt``. The profiler exaggerates the cost of many small
calls: take the order from here, and the milliseconds from ``python -m benchmarks``.
"""

from __future__ import annotations

import argparse
import pstats
import re
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.load import Load
from benchmarks.processes import Callers, Dependencies, GuardProcess, raise_file_limit

PROFILE = Path(__file__).with_name("profile.txt")
_STDLIB = sysconfig.get_path("stdlib")


def library_of(file: str, function: str) -> str:
    """The library (or part of ours) that a profiled function belongs to."""
    if file in ("~", ""):
        return "built in" if "poll" not in function else "waiting"
    package = re.search(r"site-packages/([^/]+)(?:/([^/]+))?", file)
    if package:
        within = (package[2] or "").removesuffix(".py")
        return f"{package[1]}.{within}" if package[1] == "twisted" else package[1]
    ours = re.search(r"(lotusguard)/(\w+)", file)
    if ours:
        return f"{ours[1]}.{ours[2]}"
    return "standard library" if file.startswith(_STDLIB) else "other"


def table(stats: dict[Any, Any], joins: int, most: int) -> str:
    """Own time by library, then by function; microseconds a join."""
    libraries: Counter[str] = Counter()
    rows = []
    for (file, line, function), (_, calls, own, whole, _callers) in stats.items():
        library = library_of(file, function)
        if library == "waiting":
            continue
        libraries[library] += own
        place = f"{library} {Path(file).name}:{line} {function}" if file != "~" else function
        rows.append((own, whole, calls, place))
    total = sum(libraries.values())
    out = [
        f"{joins} joins under cProfile, {total / joins * 1e6:.0f} us each (without waiting for events)\n",
        "share   us/join  library",
    ]
    out += [f"{own / total:5.1%} {own / joins * 1e6:9.1f}  {name}" for name, own in libraries.most_common()]
    out += ["", "own us/join  with callees  calls/join  function"]
    out += [
        f"{own / joins * 1e6:11.1f} {whole / joins * 1e6:13.1f} {calls / joins:11.2f}  {place}"
        for own, whole, calls, place in sorted(rows, reverse=True)[:most]
    ]
    return "\n".join(out) + "\n"


def profiled(joins: int, callers: int, most: int) -> str:
    """Run the guard under load with a profiler, and read the profile."""
    raise_file_limit()
    with TemporaryDirectory(prefix="bench") as directory:
        saved = Path(directory) / "stats"
        options = f"--profile={saved} --profiler=cprofile --savestats"
        with Dependencies() as dependencies, Callers() as load, GuardProcess(dependencies, twistd=options) as guard:
            load.make(Load(guard.port, callers, joins))
        return table(pstats.Stats(str(saved)).stats, joins, most)  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("--joins", type=int, default=5000)
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--lines", type=int, default=80, help="how many functions")
    options = parser.parse_args()
    text = profiled(options.joins, options.callers, options.lines)
    PROFILE.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
