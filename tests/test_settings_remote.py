"""Remote mode as flags, environment and files set it, on both sides; what would not be safe is refused."""

from __future__ import annotations

import hashlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fabrik_daemon import (
    ConfigError,
    Exposure,
    ExposureFlags,
    RemoteDaemon,
    UsageError,
    exposure_from,
    format_manifest,
    is_loopback,
    mounted_clusters,
    parse_remote,
    parse_tokens,
    remote_from,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

TOKEN: Final = "correct-horse-battery-staple"
HOME: Final = {"HOME": "/home/me"}
TLS: Final = {"FABRIK_TLS_CERT": "/c.pem", "FABRIK_TLS_KEY": "/k.pem"}


def exposed(
    environment: Mapping[str, str] = MappingProxyType({}),
    *,
    token_file: str | None = None,
    flags: ExposureFlags | None = None,
) -> Exposure:
    """Return how a daemon in remote mode is reached."""
    said = {**HOME, "MODE": "remote", "FABRIK_TOKEN": TOKEN, **environment}
    found = exposure_from(flags or ExposureFlags(), token_file, {name: value for name, value in said.items() if value})
    assert found is not None
    return found


def refused(environment: Mapping[str, str], flags: ExposureFlags | None = None) -> str:
    with pytest.raises(UsageError) as raised:
        exposed(environment, flags=flags)
    assert raised.value.exit_code == 2
    assert TOKEN not in str(raised.value)
    return str(raised.value)


# The daemon's side ---------------------------------------------------------------------------------------------------


def test_host_mode_is_the_default_and_reaches_nobody() -> None:
    assert exposure_from(ExposureFlags(), None, HOME) is None
    assert exposure_from(ExposureFlags(), None, {**HOME, "MODE": "host", "WEBSOCKET_PORT": "8080"}) is None
    assert exposure_from(ExposureFlags(mode="host"), "/token", {**HOME, "MODE": "remote"}) is None


def test_the_defaults_of_remote_mode_are_safe() -> None:
    assert exposed() == Exposure("127.0.0.1", 8080, token=TOKEN)
    assert exposed(TLS) == Exposure("", 8080, "/c.pem", "/k.pem", token=TOKEN)
    assert exposed({"FABRIK_BEHIND_PROXY": "true"}).host == ""
    assert exposed().kubeconfig == "/etc/fabrik/kubeconfig"


def test_everything_can_be_said_in_the_environment() -> None:
    environment = {
        "WEBSOCKET_PORT": "9443",
        "FABRIK_LISTEN": "10.0.0.1",
        "FABRIK_TLS_CERT": "~/c.pem",
        "FABRIK_TLS_KEY": "~/k.pem",
        "FABRIK_TOKEN_FILE": "/run/token",
        "FABRIK_BEHIND_PROXY": "yes",
        "FABRIK_ALLOWED_HOSTS": "Fabrik.example.com, fabrik.svc",
        "FABRIK_ALLOWED_ORIGINS": "https://dash.example.com http://localhost:3000",
        "FABRIK_KUBECONFIG": "/mnt/kube",
    }
    made = exposed(environment)
    assert made._replace(token=None) == Exposure(
        "10.0.0.1",
        9443,
        "/home/me/c.pem",
        "/home/me/k.pem",
        "/run/token",
        None,
        True,
        frozenset(["fabrik.example.com", "fabrik.svc"]),
        frozenset(["https://dash.example.com", "http://localhost:3000"]),
        "/mnt/kube",
    )


def test_flags_lead_over_the_environment() -> None:
    flags = ExposureFlags("remote", "::1", "1", "/c", "/k", True, ("a.example",), ("https://b.example",))
    by_environment = {
        "MODE": "host",
        "WEBSOCKET_PORT": "2",
        "FABRIK_LISTEN": "10.0.0.1",
        "FABRIK_ALLOWED_HOSTS": "c.example",
        "FABRIK_ALLOWED_ORIGINS": "https://d.example",
    }
    made = exposed({**TLS, **by_environment}, token_file="~/token", flags=flags)
    assert made._replace(token=None) == Exposure(
        "::1",
        1,
        "/c",
        "/k",
        "/home/me/token",
        None,
        True,
        frozenset(["a.example"]),
        frozenset(["https://b.example"]),
    )


def test_the_words_of_an_exposure_say_the_same_to_another_process() -> None:
    made = exposed(
        {**TLS, "FABRIK_LISTEN": "*", "FABRIK_BEHIND_PROXY": "1", "FABRIK_ALLOWED_HOSTS": "a b"}, token_file="/t"
    )
    words = made.words
    assert TOKEN not in " ".join(words)
    said = dict(zip(words, [*words[1:], ""]))
    assert (said["--mode"], said["--listen"], said["--port"], said["--token-file"]) == ("remote", "*", "8080", "/t")
    assert "--behind-proxy" in words
    assert [word for flag, word in zip(words, words[1:]) if flag == "--allow-host"] == ["a", "b"]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"MODE": "remot"}, "MODE is 'remot': did you mean 'remote'?"),
        ({"FABRIK_TOKEN": ""}, "needs a token"),
        ({"FABRIK_LISTEN": "*"}, "plain text to every address"),
        ({"FABRIK_LISTEN": "192.0.2.1"}, "plain text to 192.0.2.1"),
        ({"FABRIK_LISTEN": "fabrik.example.com"}, "plain text to fabrik.example.com"),
        ({"FABRIK_TLS_CERT": "/c"}, "go together"),
        ({"FABRIK_TLS_KEY": "/k"}, "go together"),
        ({"WEBSOCKET_PORT": "http"}, "'http' is no port"),
        ({"WEBSOCKET_PORT": "65536"}, "is no port"),
        ({"WEBSOCKET_PORT": "-1"}, "is no port"),
        ({"WEBSOCKET_PORT": "tcp://10.0.0.1:80"}, "is no port"),
        ({"FABRIK_BEHIND_PROXY": "maybe"}, "FABRIK_BEHIND_PROXY is 'maybe'"),
        ({"FABRIK_ALLOWED_HOSTS": "https://a.example"}, "no host's name"),
        ({"FABRIK_ALLOWED_HOSTS": "a.example:80"}, "no host's name"),
        ({"FABRIK_ALLOWED_ORIGINS": "a.example"}, "no origin"),
        ({"FABRIK_ALLOWED_ORIGINS": "https://a.example/"}, "no origin"),
        ({"FABRIK_ALLOWED_ORIGINS": "*"}, "no origin"),
    ],
)
def test_what_is_wrong_or_not_safe_is_refused(environment: dict[str, str], said: str) -> None:
    assert said in refused(environment)


@pytest.mark.parametrize("listen", ["127.0.0.1", "127.0.0.9", "localhost", "::1"])
def test_plain_http_is_for_loopback(listen: str) -> None:
    assert exposed({"FABRIK_LISTEN": listen}).host == listen


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (ExposureFlags(listen="127.0.0.1"), "--listen is for remote mode: add --mode remote"),
        (ExposureFlags(tls_cert="/c"), "--tls-cert is for remote mode"),
        (ExposureFlags(behind_proxy=True), "--behind-proxy is for remote mode"),
        (ExposureFlags(allow_host=["a"]), "--allow-host is for remote mode"),
    ],
)
def test_flags_of_remote_mode_mean_nothing_in_host_mode(flags: ExposureFlags, said: str) -> None:
    assert said in refused({"MODE": "host"}, flags)


def test_nothing_that_holds_a_token_shows_it() -> None:
    assert TOKEN not in repr(exposed())
    assert TOKEN not in repr(RemoteDaemon("wss://a", TOKEN))


@pytest.mark.parametrize(
    ("host", "is_it"),
    [
        *[(host, True) for host in ("localhost", "LOCALHOST", "127.8.9.1", "::1")],
        *[(host, False) for host in ("", "::", "10.0.0.1", "localhost.example.com", "2130706433")],
    ],
)
def test_what_counts_as_loopback(host: str, is_it: bool) -> None:
    assert is_loopback(host) is is_it


def test_the_deployment_says_all_that_a_daemon_in_a_cluster_needs() -> None:
    documents = list(yaml.safe_load_all(format_manifest("deployment", {"host": "fabrik.test"})))
    (deployment,) = (document for document in documents if document["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    made = exposure_from(ExposureFlags(), None, {entry["name"]: entry["value"] for entry in container["env"]})
    assert made is not None
    assert (made.host, made.port, made.behind_proxy, made.token) == ("", 8080, True, None)
    assert "fabrik.test" in made.hosts
    assert "fabrik-daemon-remote.fabrik-system.svc" in made.hosts
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert made.kubeconfig in mounts
    assert made.token_file == "/etc/fabrik/token/token"
    assert "/etc/fabrik/token" in mounts


# Tokens --------------------------------------------------------------------------------------------------------------


def test_tokens_stand_one_a_line_and_only_their_hash_is_kept() -> None:
    made = parse_tokens(f"\n {TOKEN} \r\n\nanother-one-that-is-long\n", "t")
    assert made == tuple(hashlib.sha256(token).digest() for token in (TOKEN.encode(), b"another-one-that-is-long"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "t: no token in it"),
        (" \n\n", "t: no token in it"),
        ("fifteen-chars-x", "can be guessed"),
        (f"{TOKEN}\nshort\n", "can be guessed"),
        ("with a space in the middle", "no header can hold"),
        ("umlauts-are-not-\xfcsed-here", "no header can hold"),
        ("control-\x00-characters", "no header can hold"),
    ],
)
def test_tokens_of_no_use_are_refused_without_being_told(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_tokens(text, "t")
    assert said in str(raised.value)
    for token in text.split():
        assert len(token) < 6 or token not in str(raised.value)


# The client's side ---------------------------------------------------------------------------------------------------


def remote(
    url: str, token_file: str | None = None, files: dict[str, str] | None = None, **environment: str
) -> RemoteDaemon:
    return remote_from(url, token_file, None, {**HOME, **environment}, (files or {}).get)


@pytest.mark.parametrize(
    ("url", "made"),
    [
        ("wss://fabrik.example.com/daemon", "wss://fabrik.example.com/daemon"),
        ("https://fabrik.example.com/daemon/", "wss://fabrik.example.com/daemon"),
        ("ws://localhost:8080", "ws://localhost:8080"),
        ("http://[::1]:8080/", "ws://[::1]:8080"),
        ("WSS://Fabrik.Example.com", "wss://fabrik.example.com"),
    ],
)
def test_urls_of_a_daemon(url: str, made: str) -> None:
    assert parse_remote(url) == made


@pytest.mark.parametrize(
    "url",
    [
        *(
            "fabrik.example.com",
            "ftp://a",
            "wss://",
            "wss:///daemon",
            "wss://a:port",
            "wss://[::1",
            "",
            "wss://a:99999",
        ),
        *(f"wss://{secret}" for secret in (f"me:{TOKEN}@a", f"{TOKEN}@a", f"a/daemon?token={TOKEN}", f"a/#{TOKEN}")),
    ],
)
def test_what_is_no_url_or_holds_a_secret_is_refused_without_being_told(url: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_remote(url)
    assert raised.value.exit_code == 2
    assert TOKEN not in str(raised.value)


@given(st.text(max_size=80))
def test_any_text_is_a_url_or_refused(text: str) -> None:
    try:
        made = parse_remote(text)
    except ConfigError:
        return
    assert made.startswith(("ws://", "wss://"))
    assert not made.endswith("/")


def test_where_the_token_comes_from() -> None:
    files = {"/flag": "by-flag\n", "/home/me/env": "by-env-file"}
    url = "wss://a"
    assert remote(url).token is None
    assert remote(url, FABRIK_TOKEN="by-env").token == "by-env"
    assert remote(url, files=files, FABRIK_TOKEN_FILE="~/env").token == "by-env-file"
    assert remote(url, files=files, FABRIK_TOKEN_FILE="~/env", FABRIK_TOKEN="by-env").token == "by-env"
    assert remote(url, "/flag", files, FABRIK_TOKEN="by-env").token == "by-flag"
    assert remote(url, FABRIK_CA_FILE="~/ca.pem").ca_file == "/home/me/ca.pem"


@pytest.mark.parametrize(
    ("token_file", "files", "said"),
    [
        ("/none", {}, "/none: no such file"),
        ("/empty", {"/empty": " \n"}, "/empty: no token in it"),
        ("/bad", {"/bad": "a\x01b"}, "/bad: a token has characters"),
    ],
)
def test_a_token_file_of_no_use(token_file: str, files: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        remote("wss://a", token_file, files)
    assert said in str(raised.value)


def test_a_token_is_not_sent_in_plain_text_to_another_host() -> None:
    with pytest.raises(ConfigError, match=r"plain text to fabrik\.example\.com: write wss://"):
        remote("ws://fabrik.example.com/daemon", FABRIK_TOKEN=TOKEN)
    assert remote("ws://localhost:8080", FABRIK_TOKEN=TOKEN).token == TOKEN
    assert remote("ws://fabrik.example.com").token is None


# Kubeconfigs that were put there for the daemon ----------------------------------------------------------------------


def kubeconfig(*contexts: str, current: str | None = None) -> dict[str, object]:
    entries = [{"name": name, "context": {"cluster": "c", "user": "u"}} for name in contexts]
    return {"contexts": entries, **({"current-context": current} if current else {})}


def found(documents: dict[str, dict[str, object]]) -> list[tuple[str, str, str | None]]:
    return [(spec.name, spec.kubeconfig, spec.context) for spec in mounted_clusters(documents)]


def test_a_single_kubeconfig_gives_its_fabrik_contexts_else_its_current_one() -> None:
    assert found({"/m/config": kubeconfig("work", "fabrik-dev", "fabrik-prod", current="work")}) == [
        ("fabrik-dev", "/m/config", "fabrik-dev"),
        ("fabrik-prod", "/m/config", "fabrik-prod"),
    ]
    assert found({"/m/config": kubeconfig("work", "default", current="default")}) == [
        ("default", "/m/config", "default")
    ]
    assert found({"/m/config": kubeconfig("work")}) == []


def test_kubeconfigs_of_a_folder_are_told_apart_by_their_files() -> None:
    documents = {
        "/m/dev.yaml": kubeconfig("default", current="default"),
        "/m/prod": kubeconfig("default", current="default"),
        "/m/one": kubeconfig("fabrik-a"),
        "/m/two": kubeconfig("fabrik-a"),
    }
    assert found(documents) == [
        ("dev", "/m/dev.yaml", "default"),
        ("prod", "/m/prod", "default"),
        ("fabrik-a", "/m/one", "fabrik-a"),
        ("two", "/m/two", "fabrik-a"),
    ]
