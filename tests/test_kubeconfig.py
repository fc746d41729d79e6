from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabrik_daemon import (
    ConfigError,
    Connection,
    Endpoint,
    FabrikError,
    connection_from,
    fabrik_clusters,
    parse_kubeconfig,
    parse_server,
)


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("https://k3s.example:6443", Endpoint(True, "k3s.example", 6443, "", "k3s.example:6443")),
        ("https://k3s.example", Endpoint(True, "k3s.example", 443, "", "k3s.example")),
        ("http://127.0.0.1:8001/", Endpoint(False, "127.0.0.1", 8001, "", "127.0.0.1:8001")),
        ("http://localhost", Endpoint(False, "localhost", 80, "", "localhost")),
        ("https://[fd00::1]:6443", Endpoint(True, "fd00::1", 6443, "", "[fd00::1]:6443")),
        (
            "https://rancher.example/k8s/clusters/c-1/",
            Endpoint(True, "rancher.example", 443, "/k8s/clusters/c-1", "rancher.example"),
        ),
    ],
)
def test_a_server_s_url_says_where_to_connect(url: str, endpoint: Endpoint) -> None:
    assert parse_server(url) == endpoint


@pytest.mark.parametrize(
    "url",
    ["", "k3s.example:6443", "ftp://k3s.example", "https://", "https://a:port", "https://a:70000", "https://[::1"],
)
def test_a_url_that_leads_nowhere_is_named(url: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_server(url)
    assert "server" in raised.value.message
    assert raised.value.exit_code == 2


def test_a_kubeconfig_is_read() -> None:
    assert parse_kubeconfig("contexts: []\ncurrent-context: a\n", "k") == {"contexts": [], "current-context": "a"}


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("contexts: [\n- a: b\n", "kube:2:"),
        ("a: 1\nb: : 2\n", "kube:2:"),
        ("just text", "kube:1: no contexts"),
        ("", "kube:1: no contexts"),
        ("- a\n", "kube:1: no contexts"),
        ("contexts: 5\n", "kube:1: no contexts"),
        ("kind: Config\n", "kube:1: no contexts"),
        ("a: 2026-02-30\n", "kube:1:"),
        ("a: \x00", "kube:1:"),
        ("[" * 5000, "kube:1:"),
    ],
)
def test_what_is_no_kubeconfig_is_refused_with_its_line(text: str, where: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_kubeconfig(text, "kube")
    assert raised.value.message.startswith(where)
    assert "\n" not in str(raised.value)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_a_kubeconfig_or_refused(text: str) -> None:
    try:
        document = parse_kubeconfig(text, "kube")
    except ConfigError:
        return
    assert isinstance(document["contexts"], list)


def entry(name: str, cluster: str = "c", **context: Any) -> dict[str, Any]:
    return {"name": name, "context": {"cluster": cluster, "user": "u", **context}}


def test_the_contexts_that_are_fabrik_s_are_found() -> None:
    document = {
        "contexts": [
            entry("prod-Fabrik"),
            entry("by-cluster", cluster="fabrik-k3d"),
            entry("by-namespace", namespace="fabrik-runs"),
            entry("by-extension", extensions=[{"name": "other"}, {"name": "fabrik", "extension": {}}]),
            entry("by-domain", extensions=[{"name": "fabrik.dev", "extension": {}}]),
            entry("minikube", namespace="default", extensions=[{"name": "context_info"}]),
            entry("tenant-of-fabrik", namespace="fabrik-runs-acme"),
            entry("fabrik-elsewhere", namespace="kube-system"),
        ]
    }
    found = {cluster.name: cluster for cluster in fabrik_clusters(document, "/home/me/.kube/config")}
    assert list(found) == [
        "prod-Fabrik",
        "by-cluster",
        "by-namespace",
        "by-extension",
        "by-domain",
        "tenant-of-fabrik",
        "fabrik-elsewhere",
    ]
    assert all(cluster.context == name for name, cluster in found.items())
    assert all(cluster.is_discovered for cluster in found.values())
    assert {cluster.kubeconfig for cluster in found.values()} == {"/home/me/.kube/config"}
    assert found["tenant-of-fabrik"].namespaces == ("fabrik-runs-acme",)
    assert found["fabrik-elsewhere"].namespaces == ("fabrik-runs",)


@pytest.mark.parametrize(
    "contexts", [[None], ["text"], [{}], [{"name": 5, "context": {"namespace": "fabrik-runs"}}], [{"name": "fabrik"}]]
)
def test_a_context_of_the_wrong_shape_breaks_nothing(contexts: list[Any]) -> None:
    assert len(fabrik_clusters({"contexts": contexts}, "k")) == (contexts == [{"name": "fabrik"}])


def test_a_connection_is_what_the_helper_printed() -> None:
    made = connection_from({"server": "https://a:1", "token": "t", "expires_at": 5.0, "else": "ignored"})
    assert made == Connection("https://a:1", token="t", expires_at=5.0)


def test_the_helper_s_complaint_is_told() -> None:
    with pytest.raises(FabrikError, match="the plugin hangs"):
        connection_from({"error": "the plugin hangs"})


def test_a_connection_never_shows_its_secrets() -> None:
    connection = Connection("https://a:1", key_pem="SECRET", token="SECRET")
    assert "SECRET" not in f"{connection} {connection!r} {[connection]}"


def test_two_names_of_one_server_and_ca_are_one_cluster() -> None:
    first = Connection("https://a:1/", ca_pem="CA", token="one")
    assert first.identity == Connection("https://a:1", ca_pem="CA", token="two").identity
    assert first.identity != Connection("https://a:1", ca_pem="another", token="one").identity
    assert first.identity != Connection("https://a:2", ca_pem="CA", token="one").identity
