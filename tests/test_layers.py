# SPDX-License-Identifier: Apache-2.0
"""The house's order: imports point down, rules are pure, the web frameworks stay where they belong."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lotusguard

ROOT = Path(lotusguard.__file__).parent
FLOORS = {"rules": 0, "clients": 1, "guard": 2, "web": 3}
GROUND = {"lotusguard.metrics", "lotusguard.__version__", "lotusguard"}
"""What every floor but the rules may stand on."""
MODULES = sorted(path for path in ROOT.rglob("*.py") if "sandbox" not in path.parts)


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    floor = path.relative_to(ROOT).parts[0]
    for name in imports_of(path):
        if not name.startswith("lotusguard") or floor not in FLOORS:
            continue
        target = name.split(".")[1] if "." in name else ""
        if target in FLOORS:
            assert FLOORS[target] <= FLOORS[floor], f"{path}: {name} is on a higher floor"
        else:
            assert name in GROUND, f"{path}: {name} is above this floor"


@pytest.mark.parametrize("path", sorted((ROOT / "rules").glob("*.py")), ids=lambda path: path.name)
def test_rules_are_pure(path: Path) -> None:
    impure = ("twisted", "treq", "klein", "time", "datetime", "os", "socket", "asyncio", "random", "logging")
    assert not [name for name in imports_of(path) if name.split(".")[0] in impure]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_klein_stays_in_the_doors(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] != "web":
        assert not [name for name in imports_of(path) if name.split(".")[0] in ("klein", "werkzeug")]


@pytest.mark.parametrize("path", sorted((ROOT / "sandbox").glob("*.py")), ids=lambda path: path.name)
def test_stand_ins_share_no_mistake_with_the_guard(path: Path) -> None:
    if path.name in ("sandbox.py", "play.py", "serve.py"):
        pytest.skip("puts the guard before the stand-ins")
    ours = [name for name in imports_of(path) if name.startswith("lotusguard")]
    assert not [name for name in ours if not name.startswith("lotusguard.sandbox")]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_below_the_roof_takes_the_global_reactor(path: Path) -> None:
    if path.name not in ("tap.py", "commanding.py", "synapse_module.py"):  # the last is Synapse's, which hands out no reactor
        assert "twisted.internet.reactor" not in path.read_text()
        assert "from twisted.internet import reactor" not in path.read_text()


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_is_placed_in_the_house(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(ast.parse(text))
