# SPDX-License-Identifier: Apache-2.0
"""The archives: their contents, reproducible builds, and an installed wheel that provides the service."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import pytest_twisted
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from twisted.internet.threads import deferToThread

from lotusguard import __version__
from lotusguard.sandbox.demo.sandbox import ADMIN_TOKEN, KEY, SECRET, Sandbox
from tests.guardprocess import free_port
from tests.test_upgrade import Host

ROOT = Path(__file__).parent.parent
SITE = sysconfig.get_paths()["purelib"]
IN_THE_ARCHIVE = ("lotusguard", "twisted", "tests", "deploy", "docs", "benchmarks")
FILES = (
    "constraints.txt",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "SECURITY.md",
    "Makefile",
    ".gitignore",
)


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def build(sources: Path, folder: Path, version: str = __version__) -> Path:
    """Archives of a copy of the sources, built as ``make dist`` does but without the network."""
    copy = folder / "sources"
    shutil.copytree(sources, copy, copy_function=shutil.copy)  # the copies have other times
    about = copy / "lotusguard" / "__init__.py"
    about.write_text(about.read_text(encoding="utf-8").replace(__version__, version), encoding="utf-8")
    done = run(
        sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", copy,
        cwd=folder, SOURCE_DATE_EPOCH="1700000000",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of the archives, without other files of the checkout."""
    folder = tmp_path_factory.mktemp("sources")
    for name in IN_THE_ARCHIVE:
        if (ROOT / name).exists():
            ignored = shutil.ignore_patterns("__pycache__", "dropin.cache", "results")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in FILES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def dist(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel."""
    return build(sources, tmp_path_factory.mktemp("first"))


def the_wheel(dist: Path) -> Path:
    (wheel,) = dist.glob("*.whl")
    return wheel


def test_builds_are_reproducible_byte_for_byte(sources: Path, dist: Path, tmp_path: Path) -> None:
    again = build(sources, tmp_path)
    names = sorted(path.name for path in dist.iterdir())
    assert names == [f"lotusguard-{__version__}-py3-none-any.whl", f"lotusguard-{__version__}.tar.gz"]
    for name in names:
        assert (dist / name).read_bytes() == (again / name).read_bytes()


def test_archives_pass_the_checks_of_the_package_index(dist: Path) -> None:
    done = run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *dist.iterdir(), cwd=dist)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == 2


def test_wheel_holds_every_module_and_the_twisted_plugin(sources: Path, dist: Path) -> None:
    with zipfile.ZipFile(the_wheel(dist)) as archive:
        names = set(archive.namelist())
    assert {name for name in names if name.startswith("twisted/")} == {"twisted/plugins/lotusguard_plugin.py"}
    assert "lotusguard/py.typed" in names
    modules = {str(path.relative_to(sources)) for path in (sources / "lotusguard").rglob("*.py")}
    assert modules <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith("tests") for name in names)


def test_source_archive_contains_what_operators_need(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "Makefile", "docs/install.md", "tests/test_packaging.py"):
        assert name in members
    assert members["deploy/upgrade"].mode & 0o111
    assert not any("__pycache__" in name or "dropin.cache" in name for name in members)


def test_constraints_pin_every_dependency_to_an_allowed_version() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    assert all(pinned.values())
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement.name
    assert "lotusguard" not in pinned


# -- installed -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A venv with the installed wheel. The dependencies come from the tests' own environment."""
    venv = tmp_path_factory.mktemp("installed") / "venv"
    folder = venv.parent
    assert run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=folder).returncode == 0
    done = run(
        venv / "bin" / "python", "-m", "pip", "install", "--no-index", "--no-deps", "--quiet", the_wheel(dist),
        cwd=folder, PYTHONPATH=SITE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return venv


def twistd(venv: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from twisted.scripts.twistd import run; run()"
    return run(venv / "bin" / "python", "-c", code, *arguments, cwd=venv, PYTHONPATH=SITE, **environment)


def test_installed_wheel_provides_the_service_to_twistd_and_twist(installed: Path) -> None:
    assert "lotusguard" in twistd(installed, "--help").stdout
    told = twistd(installed, "lotusguard", "--help")
    assert "--admin-listen" in told.stdout
    twist = (
        "from importlib.metadata import entry_points as find; "
        "(script,) = find(group='console_scripts', name='twist'); script.load()()"
    )
    listed = run(installed / "bin" / "python", "-c", twist, "--help", cwd=installed, PYTHONPATH=SITE)
    assert "lotusguard" in listed.stdout
    where = "import lotusguard; print(lotusguard.__file__)"
    found = run(installed / "bin" / "python", "-c", where, cwd=installed, PYTHONPATH=SITE)
    assert found.stdout.startswith(str(installed)), "the checkout was tested instead of the wheel"


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("GUARD_BIND_PORT", "eighty", "'eighty' is not valid"),
        ("GUARD_BIND_PORT", "70000", "'70000' is not valid"),
        ("GUARD_UPSTREAM", "127.0.0.1:8071", "is not an http(s) URL of a service"),
        ("GUARD_SEAT_TTL", "0", "'0' is not valid"),
    ],
)
def test_wrong_setting_stops_the_start_with_one_line_that_names_it(
    installed: Path, name: str, value: str, fault: str
) -> None:
    done = twistd(installed, "-n", "--pidfile=", "lotusguard", **{name: value})
    assert done.returncode != 0
    (line,) = (done.stdout + done.stderr).splitlines()
    assert line.startswith(f"lotusguard: {name}: ")
    assert fault in line
    assert "expected" in line


@pytest.mark.parametrize("state", [False, True], ids=["in memory", "with a state directory"])
@pytest.mark.parametrize("taken", ["GUARD_BIND_PORT", "GUARD_ADMIN_PORT"])
def test_port_in_use_ends_the_process_with_a_line_that_names_the_setting(
    installed: Path, tmp_path: Path, taken: str, state: bool
) -> None:
    """With a state directory there are threads by then, which must not keep the process alive."""
    settings = {"GUARD_BIND_HOST": "127.0.0.1", "GUARD_BIND_PORT": "0", "GUARD_ADMIN_PORT": ""}
    if state:
        settings["GUARD_STATE_DIR"] = str(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as other:
        settings[taken] = str(other.getsockname()[1])
        done = twistd(installed, "-n", "--pidfile=", "lotusguard", **settings)
    assert done.returncode != 0
    assert f"lotusguard: {taken}: cannot listen on" in done.stdout.splitlines()[-1]
    assert done.stdout.count("MATRIX_TOKEN is not set") == 1
    assert not done.stderr, "the log has it already"


def test_installed_wheel_runs_the_demo(installed: Path) -> None:
    done = run(installed / "bin" / "lotusguard", "sandbox", "--demo", cwd=installed, PYTHONPATH=SITE)
    assert done.returncode == 0, done.stdout + done.stderr


# -- upgraded --------------------------------------------------------------------------------------------

TWISTD = """#!{venv}/bin/python
from twisted.scripts.twistd import run
run()
"""


class RealHost(Host):
    """A host with real releases. The dependencies come from the tests' own environment, ``twistd`` included."""

    def __init__(self, folder: Path, sandbox: Sandbox) -> None:
        super().__init__(folder)
        settings = {
            "GUARD_BIND_HOST": "127.0.0.1",
            "GUARD_BIND_PORT": free_port(),
            "GUARD_ADMIN_PORT": self.port,
            "GUARD_ADMIN_TOKEN": ADMIN_TOKEN,
            "GUARD_STATE_DIR": folder / "state",
            "GUARD_UPSTREAM": sandbox.upstream.url,
            "LIVEKIT_API": sandbox.livekit.url,
            "LIVEKIT_KEY": KEY,
            "LIVEKIT_SECRET": SECRET,
            "SYNAPSE_API": sandbox.homeserver.url,
            "MATRIX_TOKEN": sandbox.admin_token,
        }
        lines = [f"{name}={value}\n" for name, value in settings.items()]
        (folder / "env").write_text("".join(lines), encoding="utf-8")
        sandbox.livekit.webhooks.urls[:] = [f"http://127.0.0.1:{settings['GUARD_BIND_PORT']}/sfu_webhook"]
        python = folder / "python"
        script = TWISTD.format(venv="$3")
        python.write_text(
            f'#!/bin/sh\nset -e\n"{sys.executable}" "$@" --without-pip\n'
            f'cat >"$3/bin/twistd" <<END\n{script}END\nchmod +x "$3/bin/twistd"\n',
            encoding="utf-8",
        )


@pytest_twisted.ensureDeferred
async def test_real_release_is_checked_tried_and_switched_to(
    sources: Path, dist: Path, sandbox: Sandbox, tmp_path: Path
) -> None:
    host = RealHost(tmp_path, sandbox)
    newer = build(sources, tmp_path / "newer", "0.1.99")
    try:
        first = await deferToThread(host.upgrade, the_wheel(dist))
        assert first.returncode == 0, first.stdout + first.stderr
        await deferToThread(subprocess.run, [str(host.restart)], env=host.environment, check=True)
        done = await deferToThread(host.upgrade, the_wheel(newer), LOTUSGUARD_START_SECONDS="30")
        assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log").read_text()
        assert "0.1.99" in await deferToThread(host.running)
        assert host.current() == "0.1.99"
    finally:
        await deferToThread(host.stop)
