# SPDX-License-Identifier: Apache-2.0
"""Layers: every module has a rank, and imports only from lower ranks or from its own package. Rules are pure."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lotusguard

ROOT = Path(lotusguard.__file__).parent
LAYERS: tuple[tuple[str, ...], ...] = (
    # these import nothing of ours but the version
    ("lotusguard", "synapse_module", "terminal", "log_limit", "process", "environment", "times"),
    ("rules", "logs"),
    ("metrics", "config"),
    ("clients", "supervision"),
    ("guard", "guard.lru", "guard.periodic", "guard.rooms"),
    ("guard.seats",),
    ("guard.lobby",),
    ("guard.joins", "guard.calls"),  # a reader who follows a join opens no file about running calls, and vice versa
    ("guard.health",),
    ("web",),
    ("wiring", "commanding"),
    ("reload", "upkeep"),
    ("service",),
    ("tap",),
    ("check", "sandbox"),
    ("history",),
    ("cli",),
)
"""Packages and root modules, lowest first. Those in one row do not import each other."""
RANKS = {part: rank for rank, row in enumerate(LAYERS) for part in row}
GLOBAL_REACTOR = {"tap.py", "commanding.py", "synapse_module.py"}
"""Entry points. The last one runs inside Synapse, which passes it no reactor."""

MODULES = sorted(ROOT.rglob("*.py"))
SERVICE = [path for path in MODULES if "sandbox" not in path.parts]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def part_of(module: str) -> str:
    """The part of ``LAYERS`` that a module belongs to: ``guard.joins`` for ``lotusguard.guard.joins.checks``."""
    names = module.split(".")[1:]
    if not names or names == ["__version__"]:
        return "lotusguard"
    return ".".join(names[:2]) if names[0] == "guard" else names[0]


def module_of(path: Path) -> str:
    names = list(path.relative_to(ROOT.parent).with_suffix("").parts)
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            if node.module == "lotusguard":
                yield from (f"lotusguard.{alias.name}" for alias in node.names)
            else:
                yield node.module


def roots_of(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(path)}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_to_lower_layers(path: Path) -> None:
    own = part_of(module_of(path))
    assert own in RANKS, f"{own} has no rank in LAYERS"
    for name in imports_of(path):
        if name.split(".")[0] == "lotusguard" and part_of(name) != own:
            assert RANKS[part_of(name)] < RANKS[own], f"{own} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "rules").rglob("*.py")), ids=name_of)
def test_rules_are_pure(path: Path) -> None:
    impure = {"twisted", "treq", "klein", "time", "datetime", "os", "socket", "asyncio", "random", "secrets", "logging"}
    assert not roots_of(path) & impure


@pytest.mark.parametrize("path", SERVICE, ids=name_of)
def test_only_the_web_layer_uses_klein(path: Path) -> None:
    if part_of(module_of(path)) != "web":
        assert not roots_of(path) & {"klein", "werkzeug"}


@pytest.mark.parametrize("path", SERVICE, ids=name_of)
def test_only_entry_points_use_the_global_reactor(path: Path) -> None:
    if path.name not in GLOBAL_REACTOR:
        text = path.read_text()
        assert "twisted.internet.reactor" not in text
        assert "from twisted.internet import reactor" not in text


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_names_its_licence_and_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(ast.parse(text))
