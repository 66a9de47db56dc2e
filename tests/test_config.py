# SPDX-License-Identifier: Apache-2.0
"""Settings: every wrong value is one line that names the variable, the fault and what is expected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lotusguard.config import ConfigurationError, Settings, read_settings, suspicions
from lotusguard.config.settings import FROM_FILE

WRONG = [
    ("GUARD_BIND_PORT", "http", "port number"),
    ("GUARD_BIND_PORT", "70000", "port number"),
    ("GUARD_BIND_PORT", "", "port number"),
    ("GUARD_BIND_HOST", " ", "an address"),
    ("GUARD_BIND_HOST", "not a host", "one such as 0.0.0.0"),
    ("GUARD_APPSERVICE_HOST", "http://127.0.0.1", "one such as 0.0.0.0"),
    ("GUARD_ADMIN_HOST", "a,b", "one such as 0.0.0.0"),
    ("GUARD_ADMIN_HOST", "", "an address"),
    ("GUARD_ADMIN_HOST", "127.0.0.1:8072", "an address"),
    ("GUARD_SERVER_NAME", "https://example.org", "a name such as example.org"),
    ("GUARD_SERVER_NAME", "exa mple.org", "a name such as example.org"),
    ("GUARD_SERVER_NAME", "example.org:port", "a name such as example.org"),
    ("GUARD_SERVER_NAME", "a" * 256, "a name such as example.org"),
    ("GUARD_ADMIN_PORT", "-1", "port number"),
    ("GUARD_UPSTREAM", "127.0.0.1:8071", "URL"),
    ("GUARD_UPSTREAM", "ftp://127.0.0.1", "URL"),
    ("GUARD_UPSTREAM", "http://user:pass@127.0.0.1", "URL"),
    ("GUARD_UPSTREAM", "http://127.0.0.1:port", "URL"),
    ("LIVEKIT_API", "ws://127.0.0.1:7880", "URL"),
    ("SYNAPSE_API", "", "URL"),
    ("GUARD_POLICY_TTL", "ten", "seconds"),
    ("GUARD_POLICY_TTL", "0", "seconds"),
    ("GUARD_SEAT_TTL", "inf", "seconds"),
    ("GUARD_UPSTREAM_GRACE", "-1", "0 or more"),
    ("GUARD_RECONCILE_INTERVAL", "nan", "seconds"),
    ("GUARD_OVERFLOW", "kick", "eject or allow"),
    ("GUARD_RESTORE", "perhaps", "on or off"),
    ("GUARD_DRY_RUN", "2", "on or off"),
    ("GUARD_MAX_BODY", "1k", "bytes"),
    ("GUARD_MEMBERS_ONLY", "maybe", "on or log or off"),
    ("GUARD_HOMESERVERS", "example.org,bad name", "names or globs"),
    ("GUARD_HOMESERVERS", " , ", "names or globs"),
    ("GUARD_START_HOMESERVERS", "https://example.org", "names or globs"),
    ("GUARD_DEFAULT_MAX_USERS", "-1", "0 or more"),
    ("GUARD_DEFAULT_MAX_USERS", "many", "0 or more"),
    ("GUARD_TOKENS", "none", "all or policy"),
    ("GUARD_MEMBERSHIP_INTERVAL", "0", "seconds"),
    ("GUARD_INVITES", "everybody", "local, any or off"),
    ("GUARD_LOBBY_WAIT", "-3", "seconds"),
    ("GUARD_REDIS_URL", "http://127.0.0.1", "redis://"),
    ("GUARD_REDIS_URL", "redis://", "names no host"),
    ("GUARD_REDIS_URL", "redis://valkey:0", "names port 0"),
    ("GUARD_REDIS_URL", "redis://valkey:many", "cannot be read"),
    ("GUARD_REDIS_URL", "redis://valkey/first", "names a database that is not a number"),
    ("GUARD_REDIS_URL", "redis://valkey?timeout=3", "has an unknown parameter"),
    ("GUARD_REDIS_URL", "redis+sentinel://a,b", "names no service"),
    ("GUARD_REDIS_URL", "unix://", "names no socket"),
    ("GUARD_REDIS_URL_FROM_FILE", "/does/not/exist", "a file we may read"),
    ("GUARD_APPSERVICE_HOST", "", "an address"),
    ("GUARD_APPSERVICE_PORT", "x", "port number"),
    ("GUARD_APPSERVICE_TOKEN_FROM_FILE", "/does/not/exist", "a file we may read"),
    ("GUARD_LOG_LEVEL", "loud", "debug or info"),
    ("GUARD_LOG_FORMAT", "xml", "text or json"),
    ("LIVEKIT_KEY_FROM_FILE", "/does/not/exist", "a file we may read"),
    ("LIVEKIT_KEY_FILE", "/does/not/exist", "a file we may read"),
    ("MATRIX_TOKEN_FROM_FILE", "/does/not/exist", "a file we may read"),
    ("GUARD_ADMIN_TOKEN_FROM_FILE", "/does/not/exist", "a file we may read"),
    ("GUARD_CONFIG", "/does/not/exist", "YAML"),
]


@pytest.mark.parametrize(("name", "value", "expected"), WRONG)
def test_wrong_value_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as error:
        read_settings()
    line = str(error.value)
    assert line.startswith(f"{name}: ")
    assert expected in line
    assert "\n" not in line


def test_defaults_suit_one_machine() -> None:
    settings = read_settings()
    assert settings.guard_bind_host == "0.0.0.0"
    assert (settings.guard_bind_port, settings.guard_admin_port) == (8070, 8072)
    assert settings.guard_upstream == "http://127.0.0.1:8071"
    assert settings.sfu_key is None
    assert settings.state_dir is None
    assert settings.guard_overflow == "eject"


def test_defaults_enforce_membership_and_leave_optional_listeners_off() -> None:
    settings = read_settings()
    assert (settings.guard_members_only, settings.guard_tokens, settings.guard_restore) == ("on", "all", True)
    assert settings.guard_homeservers == settings.guard_start_homeservers == ("*",)
    assert (settings.guard_default_max_users, settings.guard_invites, settings.guard_appservice_port) == (None,) * 3
    assert settings.guard_redis_url.get_secret_value() == ""
    assert (settings.guard_membership_interval, settings.guard_lobby_wait, settings.guard_max_body) == (30, 600, 65536)


def test_homeservers_setting_accepts_names_and_globs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARD_HOMESERVERS", " Example.org, *.example.org:8448,[2001:db8::1]:8448,")
    assert read_settings().guard_homeservers == ("example.org", "*.example.org:8448", "[2001:db8::1]:8448")


@pytest.mark.parametrize("value", ["off", "false"])
def test_yaml_booleans_are_accepted_where_a_word_is_expected(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str
) -> None:
    (tmp_path / "guard.yaml").write_text(
        f"guard_members_only: {value}\nguard_invites: {value}\nguard_homeservers: [a.org, b.org]\n"
    )
    monkeypatch.setenv("GUARD_CONFIG", str(tmp_path / "guard.yaml"))
    settings = read_settings()
    assert (settings.guard_members_only, settings.guard_invites) == ("off", "off")
    assert settings.guard_homeservers == ("a.org", "b.org")


@pytest.mark.parametrize(("value", "expected"), [("", None), ("0", 0), ("25", 25)])
def test_default_limit_may_be_empty(monkeypatch: pytest.MonkeyPatch, value: str, expected: int | None) -> None:
    monkeypatch.setenv("GUARD_DEFAULT_MAX_USERS", value)
    assert read_settings().guard_default_max_users == expected


@pytest.mark.parametrize(
    "url",
    ["redis://:pw@127.0.0.1:6379/0", "rediss://cache.example.org", "unix:///run/valkey.sock",
     "redis+sentinel://a:26379,b:26379/name"],
)  # fmt: skip
def test_redis_urls_are_accepted_and_kept_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str) -> None:
    (tmp_path / "url").write_text(url + "\n")
    monkeypatch.setenv("GUARD_REDIS_URL_FROM_FILE", str(tmp_path / "url"))
    settings = read_settings()
    assert settings.guard_redis_url.get_secret_value() == url
    assert url not in repr(settings)


def test_environment_of_voice_limit_guard_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "GUARD_BIND_HOST": "127.0.0.1", "GUARD_BIND_PORT": "9070", "GUARD_UPSTREAM": "http://10.0.0.2:8071/",
        "LIVEKIT_API": "http://10.0.0.3:7880", "LIVEKIT_KEY": "key", "LIVEKIT_SECRET": "secret",
        "SYNAPSE_API": "http://10.0.0.4:8008", "MATRIX_TOKEN": "syt_x",
    }  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings = read_settings()
    assert settings.guard_upstream == "http://10.0.0.2:8071"
    assert settings.sfu_key is not None
    assert (settings.sfu_key.key, settings.sfu_key.secret) == ("key", "secret")
    assert settings.matrix_token.get_secret_value() == "syt_x"


def test_secrets_come_from_files_as_lk_jwt_service_reads_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(" from-file \r\n")
    (tmp_path / "secret").write_text("hush\n")
    (tmp_path / "both").write_text("both-key: both-secret\n")
    monkeypatch.setenv("LIVEKIT_KEY", "plain")
    monkeypatch.setenv("LIVEKIT_KEY_FROM_FILE", str(tmp_path / "key"))
    monkeypatch.setenv("LIVEKIT_SECRET_FROM_FILE", str(tmp_path / "secret"))
    key = read_settings().sfu_key
    assert key is not None
    assert (key.key, key.secret) == ("from-file", "hush")
    monkeypatch.setenv("LIVEKIT_KEY_FILE", str(tmp_path / "both"))
    key = read_settings().sfu_key
    assert key is not None
    assert (key.key, key.secret) == ("both-key", "both-secret")


@pytest.mark.parametrize("name", FROM_FILE)
@pytest.mark.parametrize("text", ["", " \r\n"])
def test_an_empty_file_is_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "empty").write_text(text)
    monkeypatch.setenv(f"{name}_from_file".upper(), str(tmp_path / "empty"))
    with pytest.raises(ConfigurationError) as error:
        read_settings()
    assert str(error.value) == (
        f"{name.upper()}_FROM_FILE: '{tmp_path}/empty' is empty; expected a file with {name.upper()}"
    )


@pytest.mark.parametrize("text", ["only-a-key", "a: b: c", "", "key: ", ": secret"])
def test_key_file_without_a_pair_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    (tmp_path / "both").write_text(text)
    monkeypatch.setenv("LIVEKIT_KEY_FILE", str(tmp_path / "both"))
    with pytest.raises(ConfigurationError, match=r"LIVEKIT_KEY_FILE: .*`key: secret`"):
        read_settings()


def test_environment_overrides_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "guard.yaml").write_text("guard_bind_port: 1000\nguard_dry_run: true\nguard_admin_port:\n")
    monkeypatch.setenv("GUARD_CONFIG", str(tmp_path / "guard.yaml"))
    monkeypatch.setenv("GUARD_BIND_PORT", "2000")
    settings = read_settings()
    assert (settings.guard_bind_port, settings.guard_dry_run, settings.guard_admin_port) == (2000, True, None)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("guard_bind_prot: 1", "guard_bind_prot: no setting has this name; did you mean guard_bind_port?"),
        ("guard_bind_port: x", "GUARD_BIND_PORT: 'x' is not valid"),
        ("a: [", "GUARD_CONFIG: "),
        ("- 1", "GUARD_CONFIG: "),
        ("", "GUARD_CONFIG: "),
        (" \n", "GUARD_CONFIG: "),
        ("# guard_dry_run: true\n", "GUARD_CONFIG: "),
        ("guard_dry_run", "GUARD_CONFIG: "),
    ],
)
def test_wrong_file_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, line: str
) -> None:
    (tmp_path / "guard.yaml").write_text(text)
    monkeypatch.setenv("GUARD_CONFIG", str(tmp_path / "guard.yaml"))
    with pytest.raises(ConfigurationError) as error:
        read_settings()
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_file_that_says_that_it_holds_no_setting_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "guard.yaml").write_text("{}  # nothing yet\n")
    monkeypatch.setenv("GUARD_CONFIG", str(tmp_path / "guard.yaml"))
    assert read_settings() == Settings()


def test_empty_admin_port_disables_the_operators_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARD_ADMIN_PORT", "")
    assert read_settings().guard_admin_port is None


@pytest.mark.parametrize(("value", "level"), [("WARNING", "warn"), ("Debug", "debug"), ("fatal", "critical")])
def test_usual_names_of_log_levels_are_accepted(monkeypatch: pytest.MonkeyPatch, value: str, level: str) -> None:
    monkeypatch.setenv("GUARD_LOG_LEVEL", value)
    assert read_settings().guard_log_level == level


def test_state_directory_defaults_to_systemds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/lotusguard:/var/lib/other")
    assert read_settings().state_dir == Path("/var/lib/lotusguard")
    monkeypatch.setenv("GUARD_STATE_DIR", "/srv/guard")
    assert read_settings().state_dir == Path("/srv/guard")


def test_errors_contain_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret: Any = ["MATRIX-SECRET"]
    with pytest.raises(ConfigurationError) as error:
        read_settings(matrix_token=secret)
    assert "MATRIX-SECRET" not in str(error.value)
    with pytest.raises(ConfigurationError) as error:
        read_settings(guard_upstream="http://user:URL-SECRET@127.0.0.1")
    assert "URL-SECRET" not in str(error.value)
    with pytest.raises(ConfigurationError) as error:
        read_settings(guard_redis_url="redis//:URL-SECRET@127.0.0.1")
    assert "SECRET" not in str(error.value)
    settings = read_settings(livekit_key="k", livekit_secret="LK-SECRET", matrix_token="MX-SECRET")
    assert "SECRET" not in repr(settings)
    assert "SECRET" not in repr(settings.sfu_key)


def test_suspicious_settings_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("x")
    path.chmod(0o644)
    monkeypatch.setenv("GUARD_SEATS_TTL", "5")
    monkeypatch.setenv("MATRIX_TOKEN_FROM_FILE", str(path))
    said = "\n".join(suspicions(read_settings()))
    assert "GUARD_SEATS_TTL is not a setting; did you mean GUARD_SEAT_TTL?" in said
    assert "MATRIX_TOKEN_FROM_FILE" in said
    path.chmod(0o600)
    monkeypatch.delenv("GUARD_SEATS_TTL")
    assert suspicions(read_settings()) == []


def test_settings_are_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read_settings().guard_bind_port = 1


@pytest.mark.parametrize(
    "name", ["", "example.org", "Example.org", "example.org:8448", "[2001:db8::1]:8448", "10.0.0.1"]
)
def test_names_of_homeservers_are_taken(name: str) -> None:
    assert read_settings(guard_server_name=f" {name} ").guard_server_name == name


def test_spaces_around_an_address_are_ignored() -> None:
    assert read_settings(guard_admin_host=" 127.0.0.1 ").guard_admin_host == "127.0.0.1"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::1]", "::1", "fe80::1%eth0", "localhost", "lotusguard"])
def test_names_and_addresses_of_hosts_are_taken(host: str) -> None:
    assert read_settings(guard_bind_host=host).guard_bind_host == host


@pytest.mark.parametrize(
    ("host", "token", "warned"),
    [
        ("127.0.0.1", "", False),
        ("[::1]", "", False),
        ("0.0.0.0", "", True),
        ("lotusguard", "", True),
        ("::", "x", False),
    ],
)
def test_an_app_service_listener_that_believes_anybody_is_suspicious(host: str, token: str, warned: bool) -> None:
    settings = read_settings(guard_appservice_port=8073, guard_appservice_host=host, guard_appservice_token=token)
    assert any("GUARD_APPSERVICE_TOKEN is not set" in found for found in suspicions(settings)) is warned
    assert not suspicions(read_settings(guard_appservice_host=host))
