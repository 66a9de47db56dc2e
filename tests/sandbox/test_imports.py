# SPDX-License-Identifier: Apache-2.0
"""The imports of the stand-ins: no circles, nothing of the guard, and nothing of theirs in the service."""

from __future__ import annotations

import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lotusguard
from tests.test_layers import imports_of

ROOT = Path(lotusguard.__file__).parent
MODULES = sorted((ROOT / "sandbox").rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(("lotusguard", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def test_no_module_imports_itself_through_others() -> None:
    """Imports for type checking count too."""
    names = {name_of(path) for path in MODULES}
    graph = {name_of(path): {name for name in imports_of(path) if name in names} for path in MODULES}
    assert len(graph) > 20
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if path.parent.name != "demo"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_stand_ins_import_nothing_of_the_guard(path: Path) -> None:
    """A mistake in code that both shared would not be noticed."""
    ours = [name for name in imports_of(path) if name.startswith("lotusguard")]
    assert all(name.startswith("lotusguard.sandbox") and ".demo" not in name for name in ours)


def test_the_service_imports_no_stand_in() -> None:
    """The stand-ins can make tokens of any kind."""
    script = "import sys, lotusguard.tap; print([name for name in sys.modules if 'lotusguard.sandbox' in name])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
