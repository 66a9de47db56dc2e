# SPDX-License-Identifier: Apache-2.0
"""What lies in ``deploy/`` is held against the service: settings, endpoints and metrics by their real names."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from lotusguard.config import Settings, read_settings
from lotusguard.tap import BACKLOG, Options

DEPLOY = Path(__file__).parent.parent / "deploy"
UNITS = DEPLOY / "systemd"


class _Unit(RawConfigParser):
    """A unit file: the last value of each key."""

    def __init__(self, path: Path) -> None:
        super().__init__(strict=False, interpolation=None, comment_prefixes=("#",), delimiters=("=",))
        self.read(path, encoding="utf-8")

    def optionxform(self, optionstr: str) -> str:
        return optionstr


def service() -> _Unit:
    return _Unit(UNITS / "lotusguard.service")


def variables(path: Path) -> dict[str, str]:
    """The variables of an environment file, those included that are commented out."""
    return dict(re.findall(r"^#?([A-Z][A-Z_]*)=(.*)$", path.read_text(encoding="utf-8"), re.M))


def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text(encoding="utf-8"))
    return content


def default(name: str) -> float:
    return float(Settings.model_fields[name].default)


# -- systemd ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_the_unit_is_in_the_green() -> None:
    unit = UNITS / "lotusguard.service"
    told = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    exposure = re.search(r"Overall exposure level for lotusguard.service: ([0-9.]+)", told.stdout)
    assert exposure is not None, told.stdout
    assert float(exposure[1]) <= 3.0


def test_the_unit_for_several_guards_is_the_same_but_for_ports_and_state() -> None:
    one, several = dict(service()["Service"]), dict(_Unit(UNITS / "lotusguard@.service")["Service"])
    assert "1807%i" in several["ExecStart"]
    assert f"backlog={BACKLOG}" in several["ExecStart"]
    assert several["StateDirectory"] == "lotusguard-%i"
    for differs in ("ExecStart", "StateDirectory"):
        del one[differs], several[differs]
    assert several == one


def test_two_guards_in_containers_share_valkey_and_no_state() -> None:
    text = (DEPLOY / "docker" / "compose.several.yaml").read_text(encoding="utf-8")
    services = yaml.safe_load(text)["services"]
    guards = [services[name] for name in ("lotusguard", "lotusguard-2")]
    assert {guard["environment"]["GUARD_REDIS_URL"] for guard in guards} == {"redis://valkey:6379"}
    assert services["lotusguard-2"]["volumes"] != compose()["services"]["lotusguard"]["volumes"]
    caddy = (DEPLOY / "docker" / "Caddyfile.several").read_text(encoding="utf-8")
    assert "lotusguard:8070 lotusguard-2:8070" in caddy


@pytest.mark.parametrize(
    "unit",
    [UNITS / "lotusguard.service", UNITS / "lotusguard@.service", UNITS / "lotusguard.service.d" / "socket.conf"],
)
def test_units_start_what_twistd_understands(unit: Path) -> None:
    words = shlex.split(_Unit(unit)["Service"]["ExecStart"])
    assert words[0] == "/opt/lotusguard/current/bin/twistd", "deploy/upgrade puts it there"
    assert words[1:4] == ["-n", "--pidfile=", "lotusguard"]
    Options().parseOptions(words[4:])


def test_the_unit_waits_longer_than_a_join_may_take() -> None:
    longest = default("guard_upstream_timeout") + default("guard_upstream_grace")
    assert float(service()["Service"]["TimeoutStopSec"]) > longest
    assert float(compose()["services"]["lotusguard"]["stop_grace_period"].removesuffix("s")) > longest


def test_the_unit_supervises_what_the_service_tells_it() -> None:
    section = service()["Service"]
    assert (section["Type"], section["NotifyAccess"]) == ("notify", "main")
    assert float(section["WatchdogSec"]) > 0
    assert (section["DynamicUser"], section["StateDirectory"]) == ("yes", "lotusguard")
    assert section["EnvironmentFile"] == "/etc/lotusguard/lotusguard.env"


def test_lk_jwt_service_is_moved_to_where_the_guard_looks_for_it() -> None:
    moved = _Unit(UNITS / "lk-jwt-service.service.d" / "lotusguard.conf")["Service"]["Environment"]
    assert Settings.model_fields["guard_upstream"].default == "http://" + moved.removeprefix("LIVEKIT_JWT_BIND=")
    example = variables(DEPLOY / "dependencies" / "lk-jwt-service.env.example")
    assert moved == "LIVEKIT_JWT_BIND=" + example["LIVEKIT_JWT_BIND"]


def test_the_socket_is_the_port_that_the_service_has_without_it() -> None:
    section = _Unit(UNITS / "lotusguard.socket")["Socket"]
    fields = Settings.model_fields
    assert int(section["Backlog"]) == BACKLOG
    assert section["ListenStream"] == f"{fields['guard_bind_host'].default}:{fields['guard_bind_port'].default}"


def test_the_example_environment_is_one_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    given = variables(UNITS / "lotusguard.env.example")
    assert {"LIVEKIT_KEY", "LIVEKIT_SECRET", "MATRIX_TOKEN"} <= given.keys()
    for name, value in given.items():
        assert name.lower() in Settings.model_fields
        monkeypatch.setenv(name, value)
    assert read_settings().guard_bind_port == 8070


# -- containers ------------------------------------------------------------------------------------------


def test_containers_are_configured_with_real_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    services = compose()["services"]
    for name, value in services["lotusguard"]["environment"].items():
        assert name.lower() in Settings.model_fields
        if value.startswith("/run/secrets/"):
            assert Path(value).name in services["lotusguard"]["secrets"]
            (tmp_path / Path(value).name).write_text("lotus: secret" if name == "LIVEKIT_KEY_FILE" else "secret")
            value = str(tmp_path / Path(value).name)
        monkeypatch.setenv(name, value)
    settings = read_settings()
    assert settings.sfu_key is not None
    for url in (settings.guard_upstream, settings.livekit_api, settings.synapse_api):
        assert url.split("/")[2].split(":")[0] in services


def test_nobody_gets_past_the_guard_in_the_compose_stack() -> None:
    services = compose()["services"]
    assert "ports" not in services["lk-jwt-service"]
    assert "ports" not in services["lotusguard"], "its operators' port would be published, too"
    livekit = yaml.safe_load((DEPLOY / "docker" / "livekit.yaml").read_text())
    assert livekit["webhook"]["urls"] == [
        f"http://lotusguard:{Settings.model_fields['guard_bind_port'].default}/sfu_webhook"
    ]
    proxied = (DEPLOY / "docker" / "Caddyfile").read_text()
    assert set(re.findall(r"reverse_proxy (\S+)", proxied)) == {"synapse:8008", "lotusguard:8070", "livekit:7880"}


def test_images_are_pinned() -> None:
    images = [service["image"] for service in compose()["services"].values()]
    images += [words[0] for name, words in instructions() if name == "FROM"]
    for image in images:
        assert re.search(r":v?\d+\.\d+\.\d+", image), f"{image} names no exact version"


def instructions() -> list[tuple[str, list[str]]]:
    """The instructions of the Dockerfile with their words."""
    text = (DEPLOY / "docker" / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.M).replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line.strip()]
    return [(words[0], words[1:]) for words in lines]


def test_the_dockerfile_copies_what_there_is_and_runs_as_nobody_in_particular() -> None:
    given = instructions()
    known = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "VOLUME", "USER", "EXPOSE", "HEALTHCHECK", "CMD"}
    assert {name for name, _ in given} <= known
    ignored = (DEPLOY / "docker" / "Dockerfile.dockerignore").read_text().split()
    for name, words in given:
        if name == "COPY" and not words[0].startswith("--from="):
            for source in words[:-1]:
                assert (DEPLOY.parent / source).exists()
                assert f"!{source}" in ignored
    stages = [index for index, (name, _) in enumerate(given) if name == "FROM"]
    last = given[stages[-1] :]
    assert len(stages) == 2
    assert [words for name, words in last if name == "USER"] == [["10001"]]
    for name, words in last:
        if name == "ENV":
            guarding = [pair.split("=")[0] for pair in words if pair.startswith("GUARD_")]
            assert all(variable.lower() in Settings.model_fields for variable in guarding)
            assert guarding
    ports = {str(Settings.model_fields[name].default) for name in ("guard_bind_port", "guard_admin_port")}
    assert [set(words) for name, words in last if name == "EXPOSE"] == [ports]
    command = json.loads(" ".join(words_of(last, "CMD")))
    assert command == ["twistd", "-n", "--pidfile=", "lotusguard"]


def words_of(given: list[tuple[str, list[str]]], name: str) -> list[str]:
    return next(words for found, words in given if found == name)


# -- dependencies ------------------------------------------------------------------------------------------


def test_livekits_snippet_leads_its_webhooks_to_the_guard() -> None:
    snippet = yaml.safe_load((DEPLOY / "dependencies" / "livekit.yaml").read_text())
    assert snippet["webhook"]["urls"] == ["http://127.0.0.1:8070/sfu_webhook"]
    assert (
        snippet["webhook"]["api_key"]
        == variables(DEPLOY / "dependencies" / "lk-jwt-service.env.example")["LIVEKIT_KEY"]
    )


def test_synapses_snippet_is_one_that_the_module_takes(tmp_path: Path) -> None:
    module = pytest.importorskip("lotusguard.synapse_module")
    (snippet,) = yaml.safe_load((DEPLOY / "dependencies" / "homeserver.yaml").read_text())["modules"]
    assert snippet["module"] == f"lotusguard.synapse_module.{module.PolicyPush.__name__}"
    token = tmp_path / "token"
    token.write_text("operators\n")
    config = module.PolicyPush.parse_config({**snippet["config"], "token_path": str(token)})
    assert config.url == f"http://127.0.0.1:{Settings.model_fields['guard_admin_port'].default}"
