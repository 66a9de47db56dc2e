# SPDX-License-Identifier: Apache-2.0
"""``deploy/upgrade`` where several guards run on one host: one is restarted after the other."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.test_upgrade import Host, wheel


class Several(Host):
    """Guards 1 and 2. The port of guard N ends with N. The file ``order`` says which was restarted as what."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.base = self.port // 10 * 10
        text = (
            self.restart.read_text().replace(str(self.pidfile), f"{self.pidfile}-$PORT").replace("/log", "/log-$PORT")
        )
        self.restart.write_text(text)
        release = f'"$(basename "$(readlink "{folder}/prefix/current")")"'
        self.one = self._script(
            "restart-one",
            f'echo "$1" {release} >>"{folder}/order"\n'
            f'[ ! -f "{folder}/broken-$1-"{release} ] || exit 1\n'
            f'PORT={self.base // 10}$1 exec "{self.restart}"',
        )
        self.environment |= {
            "LOTUSGUARD_INSTANCES": "1 2",
            "LOTUSGUARD_RESTART_INSTANCE": f"{self.one} %",
            "LOTUSGUARD_INSTANCE_ADMIN_URL": f"http://127.0.0.1:{self.base // 10}%",
            "LOTUSGUARD_WATCH_SECONDS": "1",
        }

    def versions(self) -> list[str]:
        """What each guard says about itself."""
        said = []
        for number in (1, 2):
            with urlopen(f"http://127.0.0.1:{self.base + number}/healthz", timeout=5) as answer:
                said.append(str(answer.read()))
        return said

    def order(self) -> list[str]:
        return (self.folder / "order").read_text().splitlines()

    def stop(self) -> None:
        for number in (1, 2):
            self.pidfile = self.folder / f"pid-{self.base + number}"
            super().stop()


@pytest.fixture
def several(tmp_path: Path) -> Iterator[Several]:
    """Release 1.0 runs as both guards."""
    host = Several(tmp_path)
    done = host.upgrade(wheel(tmp_path, "1.0"), LOTUSGUARD_RESTART_INSTANCE="false")
    assert done.returncode == 0, done.stdout + done.stderr
    for number in "12":
        subprocess.run([str(host.one), number], env=host.environment, check=True)
    for _ in range(400):
        with contextlib.suppress(URLError):
            assert all("1.0" in said for said in host.versions())
            break
        time.sleep(0.05)
    (tmp_path / "order").unlink()
    yield host
    host.stop()


def test_guards_are_restarted_one_after_the_other(several: Several) -> None:
    done = several.upgrade(wheel(several.folder, "1.1"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert several.order() == ["1 1.1", "2 1.1"]
    assert all("1.1" in said for said in several.versions())


def test_a_guard_that_does_not_start_takes_all_back(several: Several) -> None:
    (several.folder / "broken-2-1.1").touch()
    done = several.upgrade(wheel(several.folder, "1.1"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "guard 2 does not start as 1.1" in done.stdout
    assert several.order() == ["1 1.1", "2 1.1", "1 1.0", "2 1.0"]
    assert all("1.0" in said for said in several.versions())


def test_a_first_guard_that_does_not_work_leaves_the_others_alone(several: Several) -> None:
    done = several.upgrade(wheel(several.folder, "1.1", "fails_a_join"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert several.order() == ["1 1.1", "1 1.0"]
    assert all("1.0" in said for said in several.versions())
