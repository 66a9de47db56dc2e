# SPDX-License-Identifier: Apache-2.0
"""The files in ``deploy/`` match the service: settings, endpoints and metrics exist under these names."""

from __future__ import annotations

import json
import os
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
from lotusguard.tap import WRONG_SETTING, Options
from lotusguard.wiring.listeners import BACKLOG

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
    """The variables of an environment file, including those that are commented out."""
    return dict(re.findall(r"^#?([A-Z][A-Z_]*)=(.*)$", path.read_text(encoding="utf-8"), re.M))


def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text(encoding="utf-8"))
    return content


def default(name: str) -> float:
    return float(Settings.model_fields[name].default)


# -- systemd ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_unit_confines_the_service() -> None:
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
    command = services["valkey"]["command"]
    assert command[command.index("--protected-mode") + 1] == "no", "it would refuse the guards, if the image has it on"


def test_guards_in_containers_have_names_of_their_own() -> None:
    text = (DEPLOY / "docker" / "compose.several.yaml").read_text(encoding="utf-8")
    assert compose()["services"]["lotusguard"]["hostname"] == "lotusguard"
    assert yaml.safe_load(text)["services"]["lotusguard-2"]["hostname"] == "lotusguard-2"


@pytest.mark.parametrize("name", ["Caddyfile", "Caddyfile.several"])
def test_caddy_waits_for_a_guard_that_restarts_and_never_buffers_requests(name: str) -> None:
    """With buffers, Caddy before 2.11 sends the body of another request after a failed connection."""
    (version,) = re.findall(r"^caddy:(\d+)\.(\d+)\.(\d+)-", compose()["services"]["caddy"]["image"])
    assert tuple(map(int, version)) >= (2, 11, 2), "older ones lose the body of a request that they could not send"
    settings = re.sub(r"#.*", "", (DEPLOY / "docker" / name).read_text(encoding="utf-8"))
    assert "lb_try_duration" in settings
    assert "request_buffers" not in settings


@pytest.mark.parametrize("name", ["Caddyfile", "Caddyfile.several"])
def test_caddy_answers_404_to_paths_that_it_does_not_pass_on(name: str) -> None:
    text = (DEPLOY / "docker" / name).read_text(encoding="utf-8")
    sites = re.findall(r"^\S.* \{\n(?:\t.*\n|\n)*\}$", text, re.M)
    assert len(sites) == 3
    assert all(site.endswith("\n\trespond 404\n}") for site in sites)


@pytest.mark.parametrize(
    "unit",
    [UNITS / "lotusguard.service", UNITS / "lotusguard@.service", UNITS / "lotusguard.service.d" / "socket.conf"],
)
def test_units_use_options_that_twistd_accepts(unit: Path) -> None:
    words = shlex.split(_Unit(unit)["Service"]["ExecStart"])
    assert words[0] == "/opt/lotusguard/current/bin/twistd", "deploy/upgrade puts it there"
    assert words[1:4] == ["-n", "--pidfile=", "lotusguard"]
    Options().parseOptions(words[4:])


def test_the_unit_waits_longer_than_a_join_may_take() -> None:
    longest = default("guard_upstream_timeout") + default("guard_upstream_grace")
    assert float(service()["Service"]["TimeoutStopSec"]) > longest
    assert float(compose()["services"]["lotusguard"]["stop_grace_period"].removesuffix("s")) > longest


def test_systemd_supervises_and_reloads_the_service() -> None:
    section = service()["Service"]
    assert (section["Type"], section["NotifyAccess"]) == ("notify", "main")
    assert float(section["WatchdogSec"]) > 0
    assert (section["DynamicUser"], section["StateDirectory"]) == ("yes", "lotusguard")
    assert section["EnvironmentFile"] == "/etc/lotusguard/lotusguard.env"
    assert section["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert section["SyslogIdentifier"] == "lotusguard"


def test_wrong_setting_does_not_cause_restarts() -> None:
    assert service()["Service"]["RestartPreventExitStatus"] == str(WRONG_SETTING)
    assert service()["Service"]["Restart"] == "always"


def test_wrong_setting_closes_the_socket_which_would_start_the_service_again() -> None:
    (after,) = re.findall(
        r"^ExecStopPost=(.*)$", (UNITS / "lotusguard.service.d" / "socket.conf").read_text(encoding="utf-8"), re.M
    )
    assert f'"$EXIT_STATUS" != {WRONG_SETTING}' in after
    assert after.startswith("+"), "the service's own user may not stop units"
    assert "systemctl --no-block stop lotusguard.socket" in after


def test_lk_jwt_service_listens_where_the_guard_expects_it() -> None:
    drop_in = _Unit(UNITS / "lk-jwt-service.service.d" / "lotusguard.conf")["Service"]
    file = Path(drop_in["EnvironmentFile"])
    assert "Environment" not in drop_in, "an environment file of lk-jwt-service's would win over it"
    moved = variables(UNITS / file.name)["LIVEKIT_JWT_BIND"]
    assert Settings.model_fields["guard_upstream"].default == f"http://{moved}"
    assert moved == variables(DEPLOY / "dependencies" / "lk-jwt-service.env.example")["LIVEKIT_JWT_BIND"]
    assert f"{file.parent}" in (DEPLOY.parent / "docs" / "install.md").read_text(encoding="utf-8")


def test_the_socket_is_the_services_port_on_loopback_for_both_families() -> None:
    text = (UNITS / "lotusguard.socket").read_text(encoding="utf-8")
    port = Settings.model_fields["guard_bind_port"].default
    assert re.findall(r"^ListenStream=(.*)$", text, re.M) == [f"127.0.0.1:{port}", f"[::1]:{port}"]
    assert int(_Unit(UNITS / "lotusguard.socket")["Socket"]["Backlog"]) == BACKLOG


def test_the_drop_in_listens_on_every_socket_that_systemd_holds() -> None:
    words = shlex.split(_Unit(UNITS / "lotusguard.service.d" / "socket.conf")["Service"]["ExecStart"])
    options = Options()
    options.parseOptions(words[4:])
    assert options["listen"] == ["systemd:domain=INET:index=0", "systemd:domain=INET6:index=1"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    for name in ("lotusguard.service", "lotusguard.socket"):
        text = (UNITS / name).read_text(encoding="utf-8").replace("/opt/lotusguard/current/bin/twistd", "/bin/true")
        (tmp_path / name).write_text(text, encoding="utf-8")
    units = [str(tmp_path / name) for name in ("lotusguard.service", "lotusguard.socket")]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not [line for line in done.stderr.splitlines() if str(tmp_path) in line], done.stderr


def test_the_example_environment_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    given = variables(UNITS / "lotusguard.env.example")
    assert {"LIVEKIT_KEY", "LIVEKIT_SECRET", "MATRIX_TOKEN"} <= given.keys()
    for name, value in given.items():
        assert name.lower() in Settings.model_fields
        monkeypatch.setenv(name, value)
    assert read_settings().guard_bind_port == 8070


# -- containers ------------------------------------------------------------------------------------------


SEVERAL = yaml.safe_load((DEPLOY / "docker" / "compose.several.yaml").read_text(encoding="utf-8"))["services"]


@pytest.mark.parametrize(
    "added", [{}, *(SEVERAL[name]["environment"] for name in ("lotusguard", "lotusguard-2"))],
    ids=["one guard", "first of two", "second of two"],
)  # fmt: skip
def test_containers_are_configured_with_real_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, added: dict[str, str]
) -> None:
    services = compose()["services"]
    for name, value in (services["lotusguard"]["environment"] | added).items():
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
    shared = settings.guard_redis_url.get_secret_value()
    assert shared == ("redis://valkey:6379" if added else "")


DOCKER_COMPOSE = os.environ.get("DOCKER_COMPOSE", "")


@pytest.mark.skipif(not DOCKER_COMPOSE, reason="DOCKER_COMPOSE does not name a Docker Compose 2")
def test_docker_compose_accepts_the_files_and_gives_each_guard_a_state_of_its_own() -> None:
    files = [str(DEPLOY / "docker" / name) for name in ("compose.yaml", "compose.several.yaml")]
    done = subprocess.run(
        [DOCKER_COMPOSE, "-f", files[0], "-f", files[1], "config"],
        capture_output=True, text=True, check=False, timeout=60, env={"DOMAIN": "example.org", "HOME": "/nonexistent"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    services = yaml.safe_load(done.stdout)["services"]
    first, second = services["lotusguard"], services["lotusguard-2"]
    assert first["environment"] == second["environment"]
    assert "GUARD_REDIS_URL" in first["environment"]
    assert [volume["source"] for one in (first, second) for volume in one["volumes"]] == [
        "guard-state",
        "guard-state-2",
    ]
    own = {"volumes", "hostname"}
    assert {key: first[key] for key in first if key not in own} == {
        key: second[key] for key in second if key not in own
    }


def test_only_the_guard_reaches_lk_jwt_service_in_the_compose_stack() -> None:
    services = compose()["services"]
    assert "ports" not in services["lk-jwt-service"]
    assert "ports" not in services["lotusguard"], "its operators' listener would be published, too"
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


def test_the_dockerfile_copies_existing_files_and_runs_without_root() -> None:
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


def test_the_image_has_bytecode_of_all_that_the_service_imports() -> None:
    """The service may not write it, and the base image has none of the standard library."""
    names = [(name, " ".join(words)) for name, words in instructions()]
    last = names[max(index for index, (name, _) in enumerate(names) if name == "FROM") :]
    importing = next(i for i, (name, words) in enumerate(last) if name == "RUN" and "twistd lotusguard --help" in words)
    forbidding = next(i for i, (name, words) in enumerate(last) if name == "ENV" and "DONTWRITEBYTECODE" in words)
    assert importing < forbidding


def words_of(given: list[tuple[str, list[str]]], name: str) -> list[str]:
    return next(words for found, words in given if found == name)


# -- Kubernetes -------------------------------------------------------------------------------------------


def manifests() -> dict[str, Any]:
    """The objects of the example by kind."""
    text = (DEPLOY / "kubernetes" / "lotusguard.yaml").read_text(encoding="utf-8")
    return {found["kind"]: found for found in yaml.safe_load_all(text)}


def container() -> dict[str, Any]:
    (found,) = manifests()["Deployment"]["spec"]["template"]["spec"]["containers"]
    return dict(found)


def test_kubernetes_gives_the_guard_real_settings_and_secrets_as_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mounts = {mount["mountPath"] for mount in container()["volumeMounts"]}
    for variable in container()["env"]:
        name, value = variable["name"], variable["value"]
        assert name.lower() in Settings.model_fields
        if name.endswith("_FROM_FILE"):
            assert str(Path(value).parent) in mounts
            (tmp_path / Path(value).name).write_text("secret")
            value = str(tmp_path / Path(value).name)
        monkeypatch.setenv(name, value)
    assert read_settings().sfu_key is not None


def test_kubernetes_probes_the_operators_listener_and_runs_without_root() -> None:
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    fields = Settings.model_fields
    assert ports == {"public": fields["guard_bind_port"].default, "operators": fields["guard_admin_port"].default}
    for probe in ("readinessProbe", "livenessProbe"):
        assert container()[probe]["httpGet"] == {"path": "/healthz", "port": "operators"}
    pod = manifests()["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["terminationGracePeriodSeconds"] > default("guard_upstream_timeout") + default("guard_upstream_grace")
    assert container()["securityContext"]["readOnlyRootFilesystem"] is True


def test_kubernetes_scrapes_the_job_that_the_alerts_expect() -> None:
    monitor, labels = manifests()["ServiceMonitor"]["spec"], manifests()["Service"]["metadata"]["labels"]
    assert monitor["endpoints"][0]["port"] in {port["name"] for port in manifests()["Service"]["spec"]["ports"]}
    job = labels[monitor["jobLabel"]]
    assert f'up{{job="{job}"}}' in (DEPLOY / "monitoring" / "alerts.yaml").read_text(encoding="utf-8")


def test_kubernetes_schemas_accept_the_example() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for kind, manifest in manifests().items():
        if kind != "ServiceMonitor":  # a custom resource
            validate.validate(manifest, validate.latest_version(), strict=True)


CUSTOM_RESOURCES = os.environ.get("PROMETHEUS_OPERATOR_CRDS", "")


@pytest.mark.skipif(
    not CUSTOM_RESOURCES, reason="PROMETHEUS_OPERATOR_CRDS does not name example/prometheus-operator-crd"
)
def test_the_prometheus_operators_schema_accepts_the_example() -> None:
    path = Path(CUSTOM_RESOURCES) / "monitoring.coreos.com_servicemonitors.yaml"
    (version,) = yaml.safe_load(path.read_text(encoding="utf-8"))["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]
    forbid_unknown_fields(schema["properties"]["spec"])
    pytest.importorskip("jsonschema").Draft7Validator(schema).validate(manifests()["ServiceMonitor"])


def forbid_unknown_fields(schema: Any) -> None:
    """Kubernetes drops fields that a schema does not know."""
    if isinstance(schema, dict):
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
        for value in list(schema.values()):
            forbid_unknown_fields(value)


def test_traefik_sends_clients_to_the_guard_and_nobody_to_its_webhook_route() -> None:
    labels = yaml.safe_load((DEPLOY / "proxy" / "traefik.yaml").read_text())["services"]["lotusguard"]["labels"]
    port = labels["traefik.http.services.lotusguard.loadbalancer.server.port"]
    assert port == str(Settings.model_fields["guard_bind_port"].default)
    (pattern,) = re.findall(r"!PathRegexp\(`(?:\(\?i\))?([^`]*)`\)", labels["traefik.http.routers.lotusguard.rule"])
    for path in ("/livekit/jwt/sfu_webhook", "/livekit/jwt//sfu_webhook", "/livekit/jwt/SFU%5Fwebhook"):
        assert re.match(pattern, path, re.IGNORECASE)
    assert not re.match(pattern, "/livekit/jwt/sfu/get")


def test_the_app_service_snippet_leads_to_a_listener_that_the_example_environment_names() -> None:
    snippet = yaml.safe_load((DEPLOY / "dependencies" / "appservice.yaml").read_text())
    example = variables(UNITS / "lotusguard.env.example")
    assert snippet["url"] == f"http://127.0.0.1:{example['GUARD_APPSERVICE_PORT']}"


# -- dependencies ------------------------------------------------------------------------------------------


def test_livekits_snippet_sends_its_webhooks_to_the_guard() -> None:
    snippet = yaml.safe_load((DEPLOY / "dependencies" / "livekit.yaml").read_text())
    assert snippet["webhook"]["urls"] == ["http://127.0.0.1:8070/sfu_webhook"]
    assert (
        snippet["webhook"]["api_key"]
        == variables(DEPLOY / "dependencies" / "lk-jwt-service.env.example")["LIVEKIT_KEY"]
    )


def test_the_module_accepts_synapses_snippet(tmp_path: Path) -> None:
    module = pytest.importorskip("lotusguard.synapse_module")
    (snippet,) = yaml.safe_load((DEPLOY / "dependencies" / "homeserver.yaml").read_text())["modules"]
    assert snippet["module"] == f"lotusguard.synapse_module.{module.PolicyPush.__name__}"
    token = tmp_path / "token"
    token.write_text("operators\n")
    config = module.PolicyPush.parse_config({**snippet["config"], "token_path": str(token)})
    assert config.url == f"http://127.0.0.1:{Settings.model_fields['guard_admin_port'].default}"


# -- NixOS -------------------------------------------------------------------------------------------------

NIXPKGS_LIB = os.environ.get("NIXPKGS_LIB", "")
EVALUATED = """
let
  lib = import {lib};
  anything = lib.mkOption {{ type = lib.types.attrsOf lib.types.anything; default = {{ }}; }};
in (lib.evalModules {{
  modules = [
    {module}
    {{ options.systemd = {{ services = anything; sockets = anything; }}; }}
    {{ services.lotusguard = {{
         enable = true;
         package = {{ type = "derivation"; name = "lotusguard"; outPath = "/nix/store/lotusguard"; }};
         environmentFile = "/run/secrets/lotusguard.env";
       }}; }}
  ];
}}).config.systemd
"""


@pytest.mark.skipif(
    not (NIXPKGS_LIB and shutil.which("nix-instantiate")), reason="NIXPKGS_LIB and nix-instantiate are needed"
)
def test_the_nixos_module_confines_the_service_as_the_unit_does() -> None:
    expression = EVALUATED.format(lib=NIXPKGS_LIB, module=DEPLOY / "nixos" / "module.nix")
    done = subprocess.run(
        ["nix-instantiate", "--eval", "--strict", "--json", "-E", expression],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    systemd = json.loads(done.stdout)
    assert systemd["sockets"]["lotusguard"]["listenStreams"] == ["127.0.0.1:8070", "[::1]:8070"]
    made = systemd["services"]["lotusguard"]["serviceConfig"]
    ours = service()["Service"]
    differ = {"ExecStart", "ExecReload", "EnvironmentFile", "SystemCallFilter"}
    assert {name: made.get(name) for name in ours if name not in differ} == {
        name: value for name, value in ours.items() if name not in differ
    }
    assert made["ExecStart"].startswith("/nix/store/lotusguard/bin/twistd -n --pidfile= lotusguard --listen systemd:")
    assert '[ "$EXIT_STATUS" != 78 ]' in made["ExecStopPost"]
