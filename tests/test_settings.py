from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabrik_daemon import (
    ALERT_WAYS,
    ClusterSpec,
    ConfigError,
    Flags,
    Laos,
    LaosService,
    Settings,
    Timing,
    expand_home,
    format_clusters,
    parse_clusters,
    parse_config,
    parse_namespaces,
    settings_from,
)

ROOT = Path(__file__).parent.parent
HOME = {"HOME": "/home/me"}
ONE = "clusters:\n- name: dev\n  kubeconfig: ~/.kube/dev\n"


def made_of(flags: Flags = Flags(), files: dict[str, str] | None = None, **environment: str) -> Settings:  # noqa: B008 - immutable
    return settings_from(flags, {**HOME, **environment}, (files or {}).get)


def refusal(text: str, parse: str = "clusters") -> str:
    with pytest.raises(ConfigError) as raised:
        _ = parse_clusters(text, "c.yaml", HOME) if parse == "clusters" else parse_config(text, "c.yaml")
    assert raised.value.exit_code == 2
    return str(raised.value)


def test_the_defaults_are_the_decided_places() -> None:
    made = made_of()
    assert made.config == "/home/me/.config/fabrik/daemon/config.yaml"
    assert made.clusters_file == "/home/me/.config/fabrik/daemon/clusters.yaml"
    assert made.cache == "/home/me/.cache/fabrik/daemon/cache.db"
    assert (made.log_level, made.timing) == ("info", Timing())


def test_xdg_folders_lead_over_home() -> None:
    made = made_of(XDG_CONFIG_HOME="/xc", XDG_CACHE_HOME="/xd")
    assert made.config == "/xc/fabrik/daemon/config.yaml"
    assert made.clusters_file == "/xc/fabrik/daemon/clusters.yaml"
    assert made.cache == "/xd/fabrik/daemon/cache.db"


def test_flags_lead_over_the_environment_and_that_over_the_file() -> None:
    files = {"/f/config.yaml": "cache: ~/file.db\nsocket: /file.sock\n", "/e/config.yaml": ""}
    by_file = made_of(files=files, FABRIK_CONFIG="/f/config.yaml")
    assert (by_file.cache, by_file.socket) == ("/home/me/file.db", "/file.sock")
    assert by_file.clusters_file == "/f/clusters.yaml"
    by_environment = made_of(
        files=files, FABRIK_CONFIG="/f/config.yaml", FABRIK_CACHE="/env.db", FABRIK_SOCKET="~/env.sock"
    )
    assert (by_environment.cache, by_environment.socket) == ("/env.db", "/home/me/env.sock")
    flags = Flags("/e/config.yaml", "/flag.db", "/flag.sock")
    by_flag = made_of(flags, files, FABRIK_CONFIG="/f/config.yaml", FABRIK_CACHE="/env.db", FABRIK_SOCKET="/env.sock")
    assert (by_flag.config, by_flag.cache, by_flag.socket) == flags


def test_a_config_file_that_was_named_must_exist() -> None:
    with pytest.raises(ConfigError, match=r"/nowhere\.yaml: no such file"):
        made_of(Flags(config="/nowhere.yaml"))


def test_a_config_beside_nothing_has_its_clusters_beside_it() -> None:
    assert made_of(Flags(config="c.yaml"), {"c.yaml": ""}).clusters_file == "clusters.yaml"


def test_a_config_file_sets_every_timing_by_its_name() -> None:
    text = "logLevel: debug\ntiming:\n  backoffMin: 1s\n  watchTimeout: 10m\n  idle: 90\n"
    assert parse_config(text, "c") == {
        "logLevel": "debug",
        "timing": Timing(backoff_min=1.0, watch_timeout=600.0, idle=90.0),
    }
    every = "".join(
        f"  {name.split('_')[0]}{''.join(part.title() for part in name.split('_')[1:])}: 7s\n"
        for name in Timing._fields
    )
    assert parse_config("timing:\n" + every, "c")["timing"] == Timing(*[7.0] * len(Timing._fields))


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "null\n", "timing:\n"])
def test_an_empty_config_file_sets_nothing(text: str) -> None:
    assert parse_config(text, "c") in ({}, {"timing": Timing()})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cach: /x\n", "c.yaml:1: unknown key 'cach': did you mean 'cache'?"),
        ("\n\ntiming:\n  backofMin: 1s\n", "c.yaml:4: unknown key 'backofMin': did you mean 'backoffMin'?"),
        ("timing:\n  idle: soon\n", "c.yaml:2: idle: 'soon' is no duration"),
        ("timing:\n  idle: -1\n", "c.yaml:2: idle: '-1' is no duration"),
        ("timing: 5\n", "c.yaml:1: expected 'key: value' lines"),
        ("logLevel: loud\n", "c.yaml:1: 'loud' is not possible here"),
        ("logLevel: inof\n", "did you mean 'info'?"),
        ("cache: /a\nsocket: /b\ncache: /c\n", "c.yaml:3: cache stands here again: first at c.yaml:1"),
        ("cache: [a]\n", "c.yaml:1: cache needs a value"),
        ("cache:\n", "c.yaml:1: cache needs a value"),
        ("- a\n", "c.yaml:1: expected 'key: value' lines"),
        ("cache: /a\n  socket: /b\n", "c.yaml:2:"),
        ("cache: \x07\n", "c.yaml:1:"),
        ("[" * 5000, "c.yaml:1"),
    ],
)
def test_a_mistake_in_config_yaml_is_told_with_its_line(text: str, said: str) -> None:
    assert said in refusal(text, "config")


def test_the_spec_s_clusters_are_read() -> None:
    text = """
clusters:
  - name: dev-k3s
    kubeconfig: ~/.kube/dev
    defaultNamespace: fabrik-runs
    priority: 1  # for ordering in UI
  - name: local
    kubeconfig: /etc/rancher/k3s/k3s.yaml
    context: k3d
    namespaces: [fabrik-runs, fabrik-runs-acme, fabrik-runs]
    labelSelector: team=a
    priority: 0
    enabled: false
"""
    assert parse_clusters(text, "c.yaml", HOME) == [
        ClusterSpec("dev-k3s", "/home/me/.kube/dev", None, ("fabrik-runs",), None, 1),
        ClusterSpec(
            "local",
            "/etc/rancher/k3s/k3s.yaml",
            "k3d",
            ("fabrik-runs", "fabrik-runs-acme"),
            "team=a",
            0,
            enabled=False,
        ),
    ]


@pytest.mark.parametrize("text", ["", "clusters:\n", "clusters: []\n", "{}\n"])
def test_no_clusters_are_none(text: str) -> None:
    assert parse_clusters(text, "c.yaml", HOME) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cluster:\n", "c.yaml:1: unknown key 'cluster': did you mean 'clusters'?"),
        ("clusters: dev\n", "c.yaml:1: clusters must be a list"),
        ("clusters:\n- dev\n", "c.yaml:2: expected 'key: value' lines"),
        ("clusters:\n- name: dev\n", "c.yaml:2: a cluster without kubeconfig"),
        ("clusters:\n- kubeconfig: k\n", "c.yaml:2: a cluster without name"),
        (ONE + "  kubeconfg: x\n", "c.yaml:4: unknown key 'kubeconfg': did you mean 'kubeconfig'?"),
        (ONE + ONE[10:], "c.yaml:4: a second cluster named 'dev'"),
        (ONE + "  priority: high\n", "c.yaml:4: priority must be a whole number"),
        (ONE + "  priority: 1.5\n", "c.yaml:4: priority must be a whole number"),
        (ONE + "  priority: true\n", "c.yaml:4: priority must be a whole number"),
        (ONE + "  enabled: 1\n", "c.yaml:4: enabled must be true or false"),
        (ONE + "  namespaces: a\n", "c.yaml:4: namespaces must be a list"),
        (ONE + "  namespaces: []\n", "c.yaml:4: namespaces must be a list"),
        (ONE + "  namespaces: [Upper]\n", "'Upper' is no namespace"),
        (ONE + "  defaultNamespace: a/b\n", "'a/b' is no namespace"),
        (ONE.replace("dev\n  k", "a b\n  k"), "c.yaml:2: 'a b' is no cluster name"),
        (ONE.replace("dev\n  k", "'a/b'\n  k"), "c.yaml:2: 'a/b' is no cluster name"),
        (ONE.replace("dev\n  k", "-x\n  k"), "c.yaml:2: '-x' is no cluster name"),
    ],
)
def test_a_mistake_in_clusters_yaml_is_told_with_its_line(text: str, said: str) -> None:
    assert said in refusal(text)


@pytest.mark.parametrize("line", ['priority: "[1"', "enabled: 2026-02-30", 'priority: "a: b: c"'])
def test_a_scalar_that_looks_like_yaml_is_told_with_its_line(line: str) -> None:
    assert refusal(ONE + f"  {line}\n").startswith("c.yaml:4: ")


def test_a_star_means_all_namespaces_and_stands_alone() -> None:
    assert parse_namespaces(["*"], "c") == ("",)
    assert parse_namespaces(["a", "*", "b"], "c") == ("",)
    assert parse_namespaces(["b", "a", "b"], "c") == ("b", "a")


def test_home_is_where_the_environment_says() -> None:
    assert expand_home("~", HOME) == "/home/me"
    assert expand_home("~/x", HOME) == "/home/me/x"
    assert expand_home("~other/x", HOME) == "~other/x"
    assert expand_home("/a/~/b", HOME) == "/a/~/b"


NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
TEXTS = st.text(st.characters(max_codepoint=0xFFFD, exclude_categories=["C", "Zl", "Zp"]), min_size=1).filter(
    lambda text: not text.startswith("~")
)
SERVICES = st.builds(
    LaosService,
    url=NAMES.map("http://{}:3100".format),
    tenant=st.none() | NAMES,
    username=st.none(),
    password_file=st.none(),
    bearer_token_file=st.none() | TEXTS.map("/{}".format),
    ca_file=st.none() | TEXTS.map("/{}".format),
)
LAOS_SAID = st.builds(
    Laos,
    loki=st.none() | SERVICES,
    alertmanager=st.none() | SERVICES,
    prometheus=st.none(),
    pushgateway=st.none(),
    discover=st.none() | st.booleans(),
    alerts=st.none() | st.sampled_from(ALERT_WAYS),
)
CLUSTERS = st.builds(
    ClusterSpec,
    name=NAMES,
    kubeconfig=TEXTS.map("/{}".format),
    context=st.none() | TEXTS,
    namespaces=st.just(("",)) | st.lists(NAMES, min_size=1, max_size=3, unique=True).map(tuple),
    label_selector=st.none() | TEXTS,
    priority=st.integers(-1000, 1000),
    enabled=st.booleans(),
    is_discovered=st.just(False),
    laos=LAOS_SAID,
)


@settings(deadline=None)
@given(st.lists(CLUSTERS, max_size=3, unique_by=lambda cluster: cluster.name))
def test_clusters_that_are_written_are_read_back_the_same(clusters: list[ClusterSpec]) -> None:
    assert parse_clusters(format_clusters(clusters), "c.yaml", HOME) == clusters


@settings(deadline=None)
@given(st.text(st.sampled_from("ab:-[]{}&*!|>'\"%@,# \n\t0"), max_size=30))
def test_any_text_makes_settings_or_a_refusal_of_one_line(text: str) -> None:
    for parse in ("clusters", "config"):
        try:
            _ = parse_clusters(text, "c.yaml", HOME) if parse == "clusters" else parse_config(text, "c.yaml")
            said = "c.yaml:"
        except ConfigError as error:
            said = str(error)
        assert said.startswith("c.yaml:")
        assert "\n" not in said


LAOS = """laos:
  discover: true
  alerts: direct
  loki: {url: "http://loki:3100/prefix", tenant: fabrik, username: me, passwordFile: ~/.loki, caFile: ca.pem}
  alertmanager: {url: "https://am.example", bearerTokenFile: /run/token}
metrics: {listen: "127.0.0.1:9464"}
"""


def test_laos_overall_and_a_clusters_own() -> None:
    made = made_of(Flags("/f/config.yaml"), {"/f/config.yaml": LAOS})
    loki = LaosService("http://loki:3100/prefix", "fabrik", "me", "/home/me/.loki", None, "/f/ca.pem")
    assert made.laos.loki == loki
    assert made.laos.alertmanager == LaosService("https://am.example", bearer_token_file="/run/token")
    assert (made.laos.prometheus, made.laos.discover, made.laos.alerts) == (None, True, "direct")
    assert made.metrics_listen == ("127.0.0.1", 9464)
    own = "  laos: {alerts: off, discover: false, loki: {url: 'http://own:3100'}}\n"
    cluster = parse_clusters(ONE + own, "/f/clusters.yaml", HOME)[0]
    both = cluster.laos.over(made.laos)
    assert both.loki == LaosService("http://own:3100")
    assert (both.alertmanager, both.discover, both.alerts) == (made.laos.alertmanager, False, "off")
    assert parse_clusters(format_clusters([cluster]), "/f/clusters.yaml", HOME) == [cluster]


def test_nothing_of_laos_is_on_by_itself() -> None:
    assert (made_of().laos, made_of().metrics_listen) == (Laos(), None)
    assert parse_config("metrics: {listen: '[::1]:0'}", "c")["metrics"] == ("::1", 0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("laos: {lokki: {url: http://a}}", "did you mean 'loki'?"),
        ("laos:\n  loki: {tenant: a}", "c.yaml:2: its url is no http(s) URL"),
        ("laos: {loki: {url: 'ftp://a'}}", "no http(s) URL"),
        ("laos: {loki: {url: 'http://a:b'}}", "no http(s) URL"),
        ("laos: {loki: {url: 'http://me:secret@a'}}", "use username and passwordFile"),
        ("laos: {loki: {url: 'http://a?x=1'}}", "more than host, port and path"),
        ("laos: {loki: {url: 'http://a', username: me}}", "go together"),
        ("laos: {loki: {url: 'http://a', username: me, passwordFile: /p, bearerTokenFile: /t}}", "keep one"),
        ('laos: {loki: {url: "http://a", tenant: "a\\nb"}}', "no header can hold"),
        ("laos: {alerts: maybe}", "choose from direct, off, rules"),
        ("laos: {discover: perhaps}", "discover must be true or false"),
        ("metrics: {listen: 9464}", "write host:port"),
        ("metrics: {listen: 'a:70000'}", "write host:port"),
    ],
)
def test_what_laos_cannot_be(text: str, told: str) -> None:
    line = refusal(text, "config")
    assert line.startswith("c.yaml:")
    assert told in line
    assert "secret" not in line


def test_what_readme_shows_of_laos_is_understood() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    shown = parse_config(next(block for block in blocks if "laos:" in block), "README.md", HOME)
    assert shown["metrics"] == ("127.0.0.1", 9464)
    assert all(getattr(shown["laos"], name) is not None for name in Laos._fields)
