# SPDX-License-Identifier: Apache-2.0
"""The documentation is true: settings, events and links are compared with the code, and commands are run.

bash runs all code blocks of a page that begin with ```` ```sh run ````, as one script, with a sandbox behind it. The
environment has the variables that readers of the page are told to set.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from pydantic import SecretStr
from twisted.internet.threads import deferToThread

from lotusguard.cli import command_line
from lotusguard.config import Settings
from lotusguard.rules.refusals import Refusal
from lotusguard.sandbox.demo.sandbox import ADMIN_TOKEN, KEY, SECRET, Sandbox
from lotusguard.tap import Options
from lotusguard.web.answers import REFUSALS
from tests.calls import ALICE, room_of

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
CONFIGURATION = ROOT / "docs" / "configuration.md"
EVENTS_PAGE = ROOT / "docs" / "metrics-and-logs.md"


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def commands_of(page: Path) -> str:
    """The commands of a page that are run, in order."""
    return "\n".join(re.findall(r"^ *```sh run\n(.*?)^ *```", text_of(page), re.M | re.S))


def names(page: Path) -> str:
    return str(page.relative_to(ROOT))


# -- settings --------------------------------------------------------------------------------------------


def written_default(name: str) -> str:
    """A setting's default as the documentation writes it."""
    value: Any = Settings.model_fields[name].default
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return ",".join(value)
    return "–" if value in (None, "") else str(value)


def test_the_table_has_every_setting_with_its_default() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| `?([^|`]*)`? \| \S", text_of(CONFIGURATION), re.M)
    wanted = {name.upper(): written_default(name) for name in Settings.model_fields} | {"GUARD_CONFIG": "–"}
    assert dict(rows) == wanted
    assert len(rows) == len(wanted)


def test_pages_name_only_settings_that_exist() -> None:
    known = {name.upper() for name in Settings.model_fields} | {"GUARD_CONFIG"}
    for page in PAGES:
        for name in re.findall(r"\b(?:GUARD|SYNAPSE_API|MATRIX_TOKEN)(?:_[A-Z]+)*\b", text_of(page)):
            assert name in known or name == "GUARD", f"{names(page)}: {name}"


# -- log events ------------------------------------------------------------------------------------------


def logged_events() -> dict[str, set[str]]:
    """The names of all log events in the code, with their levels."""
    found: dict[str, set[str]] = {}
    for module in (ROOT / "lotusguard").rglob("*.py"):
        for call in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call):
                for name in [word.value for word in call.keywords if word.arg == "event_name"]:
                    assert isinstance(name, ast.Constant), f"{module}: an event has one name"
                    levels = {node.attr for node in ast.walk(call.func) if isinstance(node, ast.Attribute)}
                    found.setdefault(str(name.value), set()).update(levels)
    return found


def test_the_documentation_lists_every_event_with_its_levels() -> None:
    section = text_of(EVENTS_PAGE).partition("## Logs")[2]
    listed = {
        name: set(levels.split(", ")) for name, levels in re.findall(r"^\| `(\w+)` \| ([\w, ]+) \|", section, re.M)
    }
    assert listed.pop("log") == {"any"}
    assert listed == logged_events()


# -- the report of /readyz --------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_the_documentation_lists_every_key_of_the_readiness_report(sandbox: Sandbox) -> None:
    report = json.loads((await sandbox.operator("GET", "/readyz")).body)
    section = text_of(EVENTS_PAGE).partition("## What is enforced right now")[2].partition("## Logs")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.M)) == set(report)
    for key in ("enforcing", "dependencies", "credentials", "webhooks", "state"):
        (row,) = re.findall(rf"^\| `{key}` \| (.*) \|$", section, re.M)
        values = report[key].values()
        inner = {name for value in values if isinstance(value, dict) for name in value}
        assert set(report[key]) | inner <= set(re.findall(r"`(\w+)`", row))


# -- links -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_linked_files_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text_of(page)):
        path = (page.parent / target).resolve()
        assert path.exists(), target
    for target in re.findall(r"`(deploy/[\w./-]+)`", text_of(page)):
        assert (ROOT / target).exists(), target


# -- tests that are named, and answers ----------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_named_tests_and_make_targets_exist(page: Path) -> None:
    for path in re.findall(r"\btests/[\w/.]*\w", text_of(page)):
        assert (ROOT / path).exists(), path
    targets = set(re.findall(r"^([a-z]+):", text_of(ROOT / "Makefile"), re.M))
    for command in re.findall(r"`make ([a-z ]+)`", text_of(page)):
        assert set(command.split()) <= targets, command


def test_every_threat_names_a_test() -> None:
    section = text_of(ROOT / "SECURITY.md").partition("## Threats and tests")[2].partition("###")[0]
    rows = re.findall(r"^\| (.*) \|$", section, re.M)[1:]
    assert len(rows) > 20
    for row in rows:
        assert re.search(r"`tests/[\w/]+\.py`", row.split(" | ")[-1]), row


def test_the_clients_page_explains_every_refusal() -> None:
    listed = set(re.findall(r"^\| (.*?) \| ", text_of(ROOT / "docs" / "clients.md"), re.M))
    wanted = {reply.error for refusal, reply in REFUSALS.items() if refusal is not Refusal.SEAT_PENDING}
    assert wanted <= listed


# -- commands --------------------------------------------------------------------------------------------


def run(script: str, environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=names)
@pytest_twisted.ensureDeferred
async def test_the_commands_of_a_page_work(sandbox: Sandbox, tmp_path: Path, page: Path) -> None:
    room_id = room_of(sandbox, 2)
    await sandbox.enter(ALICE, room_id)
    alice = next(token for token, user in sandbox.homeserver.logins.items() if user.user_id == ALICE)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "lotusguard").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lotusguard.cli "$@"\n')
    (tools / "lotusguard").chmod(0o755)
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "GUARD": sandbox.url,
        "OPERATORS": sandbox.admin_url,
        "SYNAPSE": sandbox.homeserver.url,
        "LIVEKIT": sandbox.livekit.url,
        "AUTHORIZER": sandbox.upstream.url,
        "ROOM": room_id,
        "TOKEN": alice,
        "GUARD_ADMIN_TOKEN": ADMIN_TOKEN,
        "GUARD_UPSTREAM": sandbox.upstream.url,
        "LIVEKIT_API": sandbox.livekit.url,
        "LIVEKIT_KEY": KEY,
        "LIVEKIT_SECRET": SECRET,
        "SYNAPSE_API": sandbox.homeserver.url,
        "MATRIX_TOKEN": sandbox.admin_token,
    }
    done = await deferToThread(run, commands_of(page), environment, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest_twisted.ensureDeferred
async def test_the_state_events_page_writes_a_policy_that_is_enforced(sandbox: Sandbox, tmp_path: Path) -> None:
    room_id = room_of(sandbox)
    alice = next(token for token, user in sandbox.homeserver.logins.items() if user.user_id == ALICE)
    environment = {"PATH": os.environ["PATH"], "SYNAPSE": sandbox.homeserver.url, "ROOM": room_id, "TOKEN": alice}
    script = commands_of(ROOT / "docs" / "state-events.md")
    first = script.index("io.lotus.room_quality")
    done = await deferToThread(run, script[: script.rindex("curl", 0, first)], environment, tmp_path)
    assert done.returncode == 0, done.stderr
    assert sandbox.homeserver.rooms[room_id].state["io.lotus.voice_limit", ""]["content"] == {"max_users": 10}
    done = await deferToThread(run, script, environment, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"allow_screenshare": False, "allow_camera": True}


# -- commands ------------------------------------------------------------------------------------------------


def shell_lines(page: Path) -> list[str]:
    """The lines of all shell code blocks of a page, and its inline code."""
    text = text_of(page)
    blocks = re.findall(r"^ *```sh[^\n]*\n(.*?)^ *```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S))


COMMANDS = {"check", "trial", "why", "ejected", "sandbox"}


def commands_in(page: Path) -> list[list[str]]:
    """The words after each call of the command `lotusguard` in a page."""
    found = []
    for line in shell_lines(page):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue  # the middle of a longer command
        for index, word in enumerate(words[:-1]):
            called = word == "lotusguard" or word.endswith("/lotusguard")
            if called and words[index + 1] in COMMANDS | {"--unit", "--env-file", "--version"}:
                found.append(words[index + 1 :])
                break
    return found


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_commands_and_their_options_exist(page: Path) -> None:
    for words in commands_in(page):
        command_line().parse_args(words)


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_options_of_the_service_exist(page: Path) -> None:
    for line in shell_lines(page):
        if re.search(r"\btwistd\b.*\blotusguard\b", line):
            words = shlex.split(line, comments=True)
            Options().parseOptions(words[words.index("lotusguard") + 1 :])


def test_the_pages_name_commands_of_every_kind() -> None:
    found = {word for page in PAGES for words in commands_in(page) for word in words}
    assert {*COMMANDS, "--unit", "--at", "--today", "--journal"} <= found


def test_nothing_is_installed_from_an_index_that_does_not_have_it() -> None:
    for page in PAGES:
        assert "pip install lotusguard" not in text_of(page), names(page)
