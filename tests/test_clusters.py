"""Which clusters are followed and how they are reached, on the built executable: discovery, merged kubeconfigs, twins,
files that change, proxies, credentials that are refused, and secrets that stay secret."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import time
from typing import TYPE_CHECKING, Any, Final

import pytest
from cryptography.hazmat.primitives import serialization
from fabrik_objects import job, run_id
from fakes import Authority, ModelServer
from fakes_http import Access
from harness import Cluster, wait_until
from links import PATIENCE_S, ConnectProxy, LooseDaemon, write_clusters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from fakes import KubernetesApi

    Serve = Callable[[KubernetesApi], None]
    Make = Callable[..., LooseDaemon]

QUICK: Final = {"backoffMin": "100ms", "backoffMax": "1s", "filesCheck": "200ms", "connect": "5s"}
SECRET: Final = "sesame-0815"
OTHER_UID: Final = "0f0c6f0e-0000-4c6e-9a53-0d5f7d7f8a12"
K3S: Final = "/etc/rancher/k3s/k3s.yaml"


@pytest.fixture
def make(executable: Path, unpacked: Path, tmp_path: Path) -> Iterator[Make]:
    """Make daemons, not started yet; at the end none is left."""
    daemons: list[LooseDaemon] = []

    def make_one(
        *clusters: Cluster,
        config: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
        **timing: object,
    ) -> LooseDaemon:
        place = (executable, unpacked, tmp_path / f"daemon{len(daemons)}")
        daemon = LooseDaemon(
            place, clusters, timing={**QUICK, **timing}, config=config or {"logLevel": "debug"}, environment=environment
        )
        daemons.append(daemon)
        return daemon

    yield make_one
    for daemon in daemons:
        daemon.kill()


def model(authority: Authority | None, serve: Serve, *runs: int, token: str = "", uid: str = "") -> ModelServer:
    """Return a server that runs and holds some runs."""
    server = ModelServer(authority, token=token)
    server.uid = uid or f"uid-{len(runs)}-{id(server)}"
    serve(server)
    for number in runs:
        server.put("jobs", job(number))
    return server


def context(name: str, cluster: str = "there", **also: object) -> dict[str, Any]:
    """Return one entry of `contexts`."""
    return {"name": name, "context": {"cluster": cluster, "user": "me", **also}}


def write_kubeconfig(
    path: Path,
    contexts: Sequence[Mapping[str, object]] = (),
    clusters: Mapping[str, Mapping[str, object]] | None = None,
    users: Mapping[str, Mapping[str, object]] | None = None,
) -> Path:
    """Write a kubeconfig of these parts, whole at once."""
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "contexts": list(contexts),
        "clusters": [{"name": name, "cluster": cluster} for name, cluster in (clusters or {}).items()],
        "users": [{"name": name, "user": user} for name, user in ({"me": {}} if users is None else users).items()],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(document, indent=1))
    new.replace(path)
    return path


def entry_of(server: ModelServer, /, **also: object) -> dict[str, object]:
    """Return a `cluster` of a kubeconfig."""
    ca = {"certificate-authority-data": base64.b64encode(server.authority.pem).decode()} if server.authority else {}
    return {"server": server.url, **ca, **also}


def discovered(daemon: LooseDaemon) -> list[dict[str, Any]]:
    """Return what `clusters discover` prints."""
    rows: list[dict[str, Any]] = daemon.json("clusters", "discover")
    return rows


# Discovery ------------------------------------------------------------------------------------------------------------

SIGNS: Final = {
    "extension-fabrik.dev": context("a", extensions=[{"name": "fabrik.dev", "extension": {}}]),
    "extension-fabrik": context("a", extensions=[{"name": "other"}, {"name": "fabrik", "extension": {"x": 1}}]),
    "namespace": context("a", namespace="fabrik-runs"),
    "name": context("my-Fabrik-dev"),
    "name-of-its-cluster": context("a", cluster="prod-fabrik"),
    "k3d": context("k3d-local"),
}
NO_SIGNS: Final = {
    "nothing": context("a"),
    "another-namespace": context("a", namespace="default"),
    "another-extension": context("a", extensions=[{"name": "minikube.sigs.k8s.io"}]),
    "hostile": {"name": ["fabrik"], "context": "fabrik"},
}


@pytest.mark.parametrize("sign", SIGNS)
def test_a_sign_that_a_context_is_fabriks(sign: str, make: Make, tmp_path: Path) -> None:
    path = write_kubeconfig(tmp_path / "config", [SIGNS[sign], context("stranger")])
    (row,) = discovered(make(environment={"KUBECONFIG": str(path)}))
    assert (row["context"], row["kubeconfig"]) == (SIGNS[sign]["name"], str(path))


@pytest.mark.parametrize("sign", NO_SIGNS)
def test_no_sign_that_a_context_is_fabriks(sign: str, make: Make, tmp_path: Path) -> None:
    path = write_kubeconfig(tmp_path / "config", [NO_SIGNS[sign]])
    assert discovered(make(environment={"KUBECONFIG": str(path)})) == []


def test_discovery_prints_a_table_and_notes_what_it_cannot_read(make: Make, tmp_path: Path) -> None:
    good = write_kubeconfig(tmp_path / "good", [context("fabrik-a"), context("fabrik-b")])
    broken = tmp_path / "broken"
    broken.write_text("contexts: [\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    missing = tmp_path / "missing"
    paths = os.pathsep.join(map(str, (good, broken, folder, missing)))
    daemon = make(environment={"KUBECONFIG": paths})
    done = daemon.cli("clusters", "discover")
    assert done.returncode == 0
    assert done.stdout.splitlines()[0].split() == ["NAME", "CONTEXT", "KUBECONFIG", "STATUS"]
    assert [line.split()[0] for line in done.stdout.splitlines()[1:3]] == ["fabrik-a", "fabrik-b"]
    assert f"{broken}:" in done.stderr
    assert str(folder) in done.stderr
    assert str(missing) not in done.stderr, "kubectl skips files that are not there, too"
    assert "Traceback" not in done.stderr


def test_the_kubeconfig_at_home_is_read_where_none_is_named(make: Make) -> None:
    daemon = make()
    path = write_kubeconfig(daemon.home / ".kube" / "config", [context("fabrik-home")])
    (row,) = discovered(daemon)
    assert (row["name"], row["kubeconfig"]) == ("fabrik-home", str(path))


@pytest.mark.parametrize("mode", ["644", "000"])
def test_k3s_own_file_is_found_and_told_of_where_only_root_may_read_it(
    mode: str, executable: Path, make: Make, tmp_path: Path
) -> None:
    """k3s' file has one fixed place: in a mount namespace of its own, where root may make one."""
    daemon = make()
    path = write_kubeconfig(tmp_path / "k3s", [context("default")])
    words = "mount -t tmpfs none /etc && mkdir -p /etc/rancher/k3s && cp $1 $2 && chmod $3 $2 && shift 3 && exec $@"
    unable = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]  # root that cannot read everything
    command = [*unable, daemon.python, str(executable), "clusters", "discover", "-o", "json"]
    try:
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", words, "sh", str(path), K3S, mode, *command],
            env={**daemon._environment, "KUBECONFIG": str(tmp_path / "none")},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("no unshare or setpriv here")
    if "Operation not permitted" in done.stderr or "must be superuser" in done.stderr:
        pytest.skip("only root may make a mount namespace")
    rows = json.loads(done.stdout)
    if mode == "000":
        assert rows == []
        assert f"{K3S}: Permission denied" in done.stderr
        assert "only root may read it" in done.stderr
    else:
        assert [(row["name"], row["context"]) for row in rows] == [("k3s", "default")]


# Kubeconfigs ----------------------------------------------------------------------------------------------------------


def test_several_kubeconfigs_are_merged_and_each_finds_its_own_files(
    authority: Authority, serve: Serve, make: Make, tmp_path: Path
) -> None:
    """Context, cluster and user may stand in three files; a relative path starts at the file that has it."""
    server = model(authority, serve, 1, token=SECRET)
    first = write_kubeconfig(tmp_path / "one" / "config", [context("fabrik-merged")], users={})
    there = {"server": server.url, "certificate-authority": "ca.pem"}
    second = write_kubeconfig(tmp_path / "two" / "config", clusters={"there": there}, users={})
    third = write_kubeconfig(tmp_path / "three" / "config", users={"me": {"tokenFile": "token"}})
    (tmp_path / "two" / "ca.pem").write_bytes(authority.pem)
    (tmp_path / "three" / "token").write_text(SECRET)
    paths = os.pathsep.join(map(str, (first, tmp_path / "missing", second, third)))
    daemon = make(environment={"KUBECONFIG": paths})
    daemon.launch()
    daemon.wait_connected("fabrik-merged")
    assert set(daemon.run_rows("fabrik-merged")) == {run_id(1)}
    server.token = "rotated"
    (tmp_path / "three" / "token").write_text("rotated")
    server.end_watches()
    server.put("jobs", job(2))
    wait_until(lambda: run_id(2) in daemon.run_rows("fabrik-merged"), PATIENCE_S, "the rotated token file is read")


def test_the_first_of_two_contexts_of_one_name_counts(
    authority: Authority, serve: Serve, make: Make, tmp_path: Path
) -> None:
    servers = [model(authority, serve, number) for number in (1, 2)]
    paths = [
        write_kubeconfig(
            tmp_path / f"config{number}", [context("fabrik-a", f"there{number}")], {f"there{number}": entry_of(server)}
        )
        for number, server in enumerate(servers)
    ]
    daemon = make(environment={"KUBECONFIG": os.pathsep.join(map(str, paths))})
    daemon.launch()
    daemon.wait_connected("fabrik-a")
    assert set(daemon.run_rows("fabrik-a")) == {run_id(1)}
    assert [row["name"] for row in discovered(daemon)] == ["fabrik-a"]


class K3dAuthority(Authority):
    """Issues the server a certificate as k3d does."""

    def __init__(self) -> None:
        super().__init__()
        self._server = self._ca.issue_cert("0.0.0.0", "127.0.0.1", "localhost")  # noqa: S104 - a name in a certificate


def test_a_k3d_context_works_as_it_comes(serve: Serve, make: Make, tmp_path: Path) -> None:
    server = model(K3dAuthority(), serve, 1)
    url = f"https://0.0.0.0:{server.port}"
    path = write_kubeconfig(
        tmp_path / "config",
        [context("k3d-local", "k3d-local")],
        {"k3d-local": entry_of(server, server=url)},
        {"me": {"token": SECRET}},
    )
    daemon = make(environment={"KUBECONFIG": str(path)})
    daemon.launch()
    daemon.wait_connected("k3d-local")
    assert set(daemon.run_rows("k3d-local")) == {run_id(1)}


# Twins ----------------------------------------------------------------------------------------------------------------


def test_two_names_for_one_cluster_are_one_and_that_of_clusters_yaml_wins(
    authority: Authority, serve: Serve, make: Make, tmp_path: Path
) -> None:
    server = model(authority, serve, 1)
    url = f"https://localhost:{server.port}"
    path = write_kubeconfig(tmp_path / "config", [context("fabrik-a")], {"there": entry_of(server, server=url)})
    daemon = make(Cluster(server, "zz-mine"), environment={"KUBECONFIG": str(path)})
    daemon.launch()
    daemon.wait_connected("zz-mine")
    said = daemon.wait_words("same cluster as zz-mine", "fabrik-a")
    assert "remove one of the two" in said + daemon.log
    wait_until(lambda: len(server.watches) == 5, PATIENCE_S, "followed once")
    assert daemon.cluster("zz-mine")["connected"]
    assert set(daemon.run_rows("zz-mine")) == {run_id(1)}
    wait_until(lambda: daemon.run_rows("fabrik-a") == {}, PATIENCE_S, "what the other name told before it was known")
    write_clusters(daemon.folder / "clusters.yaml", [])
    daemon.wait_connected("fabrik-a")


# Files that change ----------------------------------------------------------------------------------------------------


def test_a_rotated_token_file_is_read_again(authority: Authority, serve: Serve, make: Make) -> None:
    server = model(authority, serve, 1, token=f"{SECRET}-1")
    daemon = make(Cluster(server, access=Access(auth="token-file")))
    daemon.launch()
    daemon.wait_connected()
    (daemon.root / "test.token").write_text(f"{SECRET}-2")
    server.token = f"{SECRET}-2"
    server.end_watches()
    server.put("jobs", job(2))
    wait_until(lambda: run_id(2) in daemon.run_rows(), PATIENCE_S, "followed with the new token")
    daemon.wait_connected()
    assert SECRET.encode() not in daemon.everything_said()


def test_a_token_file_that_is_rotated_in_time_is_never_refused(authority: Authority, serve: Serve, make: Make) -> None:
    """Both tokens count for a while; from then on every request carries the new one."""
    server = model(authority, serve, 1)
    server.token = ""
    daemon = make(Cluster(server, access=Access(auth="token-file")))
    token = daemon.root / "test.token"
    token.write_text("old")
    daemon.launch()
    daemon.wait_connected()
    token.write_text("new")
    began_at = time.monotonic()
    wait_until(lambda: time.monotonic() - began_at > 3, PATIENCE_S, "files are looked at, and credentials resolved")
    ended_at = time.monotonic()
    server.end_watches()
    wait_until(lambda: len(server.asked(lambda request: request.at > ended_at)) >= 5, PATIENCE_S, "five go on")
    later = server.asked(lambda request: request.at > ended_at)
    assert {request.headers["authorization"] for request in later} == {"Bearer new"}


def test_a_token_file_may_end_with_a_newline(authority: Authority, serve: Serve, make: Make) -> None:
    """Editors and `echo` put one there, and client-go trims it."""
    server = model(authority, serve, 1, token=SECRET)
    daemon = make(Cluster(server, access=Access(auth="token-file")))
    (daemon.root / "test.token").write_text(f"{SECRET}\n")
    daemon.launch()
    daemon.wait_connected(timeout_s=PATIENCE_S / 2)


@pytest.mark.parametrize("uid", ["same", OTHER_UID], ids=["moved", "another"])
def test_a_kubeconfig_that_points_elsewhere_is_read_again(
    uid: str, authority: Authority, serve: Serve, make: Make
) -> None:
    """What moved goes on; what is another cluster now is listed anew and takes no event for the old one's."""
    first = model(authority, serve, 1, 2, uid="same")
    second = model(authority, serve, *((1, 2) if uid == "same" else (5,)), uid=uid)
    daemon = make(Cluster(first))
    daemon.launch()
    daemon.wait_connected()
    subscriber = daemon.subscribe()
    second.kubeconfig(daemon.root / "test.kubeconfig")
    second.put("jobs", job(3))
    wait_until(lambda: run_id(3) in daemon.run_rows(), PATIENCE_S, "the other server's run")
    daemon.wait_connected()
    wait_until(lambda: not first.watches, PATIENCE_S, "nothing goes to the first server any more")
    assert daemon.cluster()["server"] == second.url
    assert daemon.cluster()["uid"] == uid
    if uid == "same":
        assert {daemon.run_rows()[run_id(number)]["status"] for number in (1, 2, 3)} == {"pending"}
    else:
        wait_until(lambda: run_id(5) in daemon.run_rows(), PATIENCE_S, "listed anew")
        wait_until(
            lambda: daemon.run_rows()[run_id(1)]["status"] is None, PATIENCE_S, "the old one's run: nobody knows"
        )
    assert not [event for event in subscriber.of("run:updated") if event["status"] == "cancelled"]


def test_a_clusters_yaml_edited_by_hand_is_read_again(authority: Authority, serve: Serve, make: Make) -> None:
    first, second = model(authority, serve, 1), model(authority, serve, 2)
    daemon = make(Cluster(first, "first"))
    daemon.launch()
    daemon.wait_connected("first")
    path = daemon.folder / "clusters.yaml"
    entries = json.loads(path.read_text())["clusters"]
    kubeconfig = second.kubeconfig(daemon.root / "second.kubeconfig")
    entries.append({"name": "second", "kubeconfig": str(kubeconfig), "priority": 5})
    write_clusters(path, entries)
    daemon.wait_connected("second")
    assert daemon.cluster("first")["connected"]
    path.write_text("clusters:\n- name: broken\n  kubeconfg: x\n")
    wait_until(lambda: "kubeconfg" in daemon.log, PATIENCE_S, "the mistake is told")
    assert f"{path}:3" in daemon.log
    assert daemon.cluster("second")["connected"], "what was right goes on"
    write_clusters(path, entries[1:])
    wait_until(lambda: not first.watches, PATIENCE_S, "no longer followed")
    assert daemon.cluster("second")["connected"]
    second.put("jobs", job(3))
    wait_until(lambda: run_id(3) in daemon.run_rows("second"), PATIENCE_S, "followed all the while")
    assert set(daemon.run_rows("first")) == {run_id(1)}, "rows stay until their retention ends"


def test_a_kubeconfig_that_is_missing_at_first_is_found_when_it_comes(
    authority: Authority, serve: Serve, make: Make
) -> None:
    server, other = model(authority, serve, 1), model(authority, serve, 2)
    daemon = make(Cluster(server, "late"), Cluster(other, "other"), backoffMax="60s")
    path = daemon.root / "late.kubeconfig"
    text = path.read_text()
    path.unlink()
    daemon.launch()
    daemon.wait_connected("other")
    daemon.wait_words("no such kubeconfig", "late")
    path.write_text(text)
    daemon.wait_connected("late")


# Proxies --------------------------------------------------------------------------------------------------------------


def behind_proxy(server: ModelServer, tmp_path: Path, url: str) -> Cluster:
    """Return a cluster that is reached through a proxy."""
    path = write_kubeconfig(
        tmp_path / "proxied", [context("c")], {"there": entry_of(server, **{"proxy-url": url})}, {"me": {"token": "t"}}
    )
    return Cluster(server, extra={"kubeconfig": str(path), "context": "c"})


@pytest.mark.parametrize("user", ["", f"me:{SECRET}@x"], ids=["open", "basic"])
def test_a_proxy_makes_the_tunnel(user: str, authority: Authority, serve: Serve, make: Make, tmp_path: Path) -> None:
    server = model(authority, serve, 1)
    with ConnectProxy(user) as proxy:
        shown = f"{user.replace('@', '%40')}@" if user else ""
        daemon = make(behind_proxy(server, tmp_path, f"http://{shown}127.0.0.1:{proxy.port}"))
        daemon.launch()
        daemon.wait_connected()
        assert set(daemon.run_rows()) == {run_id(1)}
        assert set(proxy.asked) == {f"CONNECT 127.0.0.1:{server.port} HTTP/1.1"}
        assert proxy.accepted >= 5
        said = daemon.everything_said()
    assert SECRET.encode() not in said
    assert base64.b64encode(user.encode()) not in said or not user


def test_a_proxy_that_refuses_is_told_of(authority: Authority, serve: Serve, make: Make, tmp_path: Path) -> None:
    server = model(authority, serve)
    answer = b"HTTP/1.1 403 Forbidden\x1b[31m by policy\r\nContent-Length: 0\r\n\r\n"
    with ConnectProxy(refusal=answer) as proxy:
        daemon = make(behind_proxy(server, tmp_path, f"http://me:{SECRET}@127.0.0.1:{proxy.port}"))
        daemon.launch()
        said = daemon.wait_words("the proxy refused: HTTP/1.1 403 Forbidden")
        assert not daemon.cluster()["connected"]
        assert daemon.watch("jobs")["state"] in {"backing off", "connecting", "listing"}
        assert SECRET not in said
        assert b"\x1b" not in daemon.log.encode()
        assert SECRET.encode() not in daemon.everything_said()
    assert server.requests == []


def test_a_proxy_that_wants_another_password_is_told_of(
    authority: Authority, serve: Serve, make: Make, tmp_path: Path
) -> None:
    server = model(authority, serve)
    with ConnectProxy("me:another") as proxy:
        daemon = make(behind_proxy(server, tmp_path, f"http://me:{SECRET}@127.0.0.1:{proxy.port}"))
        daemon.launch()
        daemon.wait_words("407")
        assert SECRET.encode() not in daemon.everything_said()


@pytest.mark.parametrize("scheme", ["socks5", "https"])
def test_another_kind_of_proxy_is_refused_clearly(
    scheme: str, authority: Authority, serve: Serve, make: Make, tmp_path: Path
) -> None:
    server, other = model(authority, serve), model(authority, serve)
    daemon = make(behind_proxy(server, tmp_path, f"{scheme}://me:{SECRET}@127.0.0.1:9"), Cluster(other, "other"))
    daemon.launch()
    daemon.wait_connected("other")
    said = daemon.wait_words(f"proxy-url has scheme '{scheme}'")
    assert "only http:// proxies are supported" in said + daemon.log
    assert SECRET.encode() not in daemon.everything_said()


# Credentials ----------------------------------------------------------------------------------------------------------


def with_user(server: ModelServer, tmp_path: Path, name: str, user: Mapping[str, object]) -> Cluster:
    """Return a cluster that is entered as this user."""
    path = write_kubeconfig(tmp_path / f"{name}.yaml", [context("c")], {"there": entry_of(server)}, {"me": user})
    return Cluster(server, name, extra={"kubeconfig": str(path), "context": "c"})


def encrypted(key_pem: bytes) -> bytes:
    """Return a private key that needs a password."""
    key = serialization.load_pem_private_key(key_pem, None)
    form = serialization.PrivateFormat.TraditionalOpenSSL
    how = serialization.BestAvailableEncryption(SECRET.encode())
    return key.private_bytes(serialization.Encoding.PEM, form, how)


def test_users_that_cannot_be_are_refused_with_a_reason_and_hurt_no_other(
    authority: Authority, serve: Serve, make: Make, tmp_path: Path
) -> None:
    server, good = model(authority, serve, 1), model(authority, serve, 2)
    certificate, key = authority.client_pem("me")
    data = {
        "client-certificate-data": base64.b64encode(certificate).decode(),
        "client-key-data": base64.b64encode(encrypted(key)).decode(),
    }
    daemon = make(
        with_user(server, tmp_path, "basic", {"username": "me", "password": SECRET}),
        with_user(server, tmp_path, "encrypted", data),
        with_user(server, tmp_path, "no-key", {"client-certificate-data": data["client-certificate-data"]}),
        with_user(server, tmp_path, "not-pem", {**data, "client-key-data": base64.b64encode(SECRET.encode()).decode()}),
        with_user(server, tmp_path, "no-file", {"tokenFile": str(tmp_path / "nowhere")}),
        Cluster(good, "good"),
    )
    daemon.launch()
    daemon.wait_connected("good")
    assert "basic authentication left Kubernetes" in daemon.wait_words("basic authentication", "basic")
    said = daemon.wait_words("the client key is encrypted", "encrypted")
    assert "without a password" in said, "what to do, rather than a library's word"
    daemon.wait_words("certificates do not load", "not-pem")
    daemon.wait_words("nowhere", "no-file")
    wait_until(lambda: daemon.cluster("no-key")["error"], PATIENCE_S, "a certificate without its key is no login")
    assert SECRET.encode() not in daemon.everything_said()
    daemon.stop()


def test_no_secret_is_ever_told(authority: Authority, serve: Serve, make: Make, tmp_path: Path) -> None:
    """Token, key, password in a URL, plugin's environment and arguments: in no log, status, error or cache file."""
    server = model(authority, serve, 1, token="right")
    certificate, key = authority.client_pem("me")
    plugin = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": "sh",
        "args": ["-c", f": {SECRET}-argument; echo $PASSWORD >&2; exit 1"],
        "env": [{"name": "PASSWORD", "value": f"{SECRET}-env"}],
        "interactiveMode": "Never",
    }
    data = {
        "client-certificate-data": base64.b64encode(certificate).decode(),
        "client-key-data": base64.b64encode(key).decode(),
    }
    path = write_kubeconfig(
        tmp_path / "url",
        [context("c")],
        {"there": entry_of(server, server=f"https://me:{SECRET}-url@127.0.0.1:{server.port}")},
        {"me": {"token": f"{SECRET}-token"}},
    )
    daemon = make(
        with_user(server, tmp_path, "token", {"token": f"{SECRET}-token"}),
        with_user(server, tmp_path, "hostile-token", {"token": f"{SECRET}-\n-token"}),
        with_user(server, tmp_path, "key", data),
        with_user(server, tmp_path, "plugin", {"exec": plugin}),
        Cluster(server, "url", extra={"kubeconfig": str(path), "context": "c"}),
    )
    daemon.launch()
    for name in ("token", "hostile-token", "key", "plugin", "url"):
        wait_until(lambda name=name: daemon.cluster(name)["error"], PATIENCE_S, f"{name} is refused")  # type: ignore[misc]
    said = daemon.everything_said() + daemon.cli("clusters", "test").stdout.encode()
    assert SECRET.encode() not in said
    body = "".join(key.decode().splitlines()[1:-1])
    assert body[:40].encode() not in said.replace(b"\n", b"")
    assert data["client-key-data"][:40].encode() not in said
    for file in (daemon.root / "home").rglob("*"):
        assert SECRET not in file.read_text(errors="replace") if file.is_file() else True


# clusters test --------------------------------------------------------------------------------------------------------


def test_clusters_test_says_ok_or_what_is_missing(authority: Authority, serve: Serve, make: Make) -> None:
    good, poor, dead = model(authority, serve, 1), model(authority, serve), model(authority, serve)
    poor.refuse("pods")
    daemon = make(Cluster(good, "good"), Cluster(poor, "poor"), Cluster(dead, "dead"), connect="2s", sync="10s")
    dead.stop()
    done = daemon.cli("clusters", "test", "good")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in good.collections)
    assert "ok" in done.stdout
    assert not daemon.cache.exists(), "nothing is kept"
    done = daemon.cli("clusters", "test")
    assert done.returncode == 5
    text = done.stdout + done.stderr
    assert re.search(r'no right to (list|watch) pods in fabrik-runs: .*cannot (list|watch) resource "pods"', text)
    assert any(words in text for words in ("Connection refused", "did not answer"))
    done = daemon.cli("clusters", "test", "goo")
    assert done.returncode == 3
    assert "good" in done.stderr
    rows = json.loads(daemon.cli("clusters", "test", "good", "-o", "json").stdout)
    assert rows
