"""What must hold: during the faults that nothing stale is unmarked, after them that all is as the servers say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import fabrik_daemon
from simulation.lives import EventTruth, JobTruth, PodTruth, Said, report
from simulation.world import Violation

if TYPE_CHECKING:
    from collections.abc import Iterable

    from simulation.apiserver import ApiServer, Lineage, Version
    from simulation.wiring import Simulated

JsonObject = dict[str, Any]
Place = tuple[str, str, str]  # cluster, namespace, label id

STALE_AFTER_S: Final = 78.0  # 70 s of silence, and some for the network
STALE_WITHOUT_BOOKMARKS_S: Final = 690.0  # a watch's longest time, and silence
SYNC_LAG_S: Final = 30.0  # a server's memory may be 15 s old
TERMINAL: Final = ("finished", "failed", "cancelled")
ALIVE: Final = ("pending", "running", "blocked")


class Expected(NamedTuple):
    """What a run's row may say."""

    statuses: tuple[str | None, ...]
    reasons: tuple[str | None, ...] | None = None  # None: not judged
    columns: JsonObject = {}  # noqa: RUF012 - never changed


class Oracle:
    """Compares what the daemon says with what the servers know."""

    def __init__(self, simulated: Simulated, servers: Iterable[ApiServer]) -> None:
        self._simulated = simulated
        self._world = simulated.world
        self._servers = {server.name: server for server in servers}
        self._seen: dict[tuple[str, tuple[str, str, str]], tuple[object, int]] = {}
        self._committed: set[str] = set()  # keys of runs
        self.checks = 0

    # While the faults last

    def check_marks(self) -> None:
        """Whoever is called connected, or synced at a time, must show what the server had within the bound."""
        daemon = self._simulated.daemon
        if daemon is None or self._simulated.reactor.is_asleep:
            return
        for name, cluster in daemon._follower.clusters.items():
            server = self._servers[name]
            bound = STALE_AFTER_S if server.traits.bookmarks else STALE_WITHOUT_BOOKMARKS_S
            since = self._simulated.connected_since.get(name)
            if cluster.is_connected != (since is not None):
                raise Violation(f"{name}: is_connected changed to {cluster.is_connected} and nobody was told")
            for watcher in cluster.watchers:
                oldest = -1.0
                if watcher.scope[1:] in server.overtaken:
                    continue
                if since is not None and self._world.now - since > bound and watcher.told.state != "forbidden":
                    oldest = self._world.now - bound
                synced_at = fabrik_daemon.epoch_of(watcher.synced_at)
                settled = watcher.told.state == "watching" and watcher._machine._request.began_at < self._world.now - 5
                if synced_at is not None and settled:  # the first of many events is not the last word
                    oldest = max(oldest, synced_at - self._world.wall() + self._world.now - SYNC_LAG_S)
                if oldest > 0:
                    self._compare(server, watcher, oldest)

    def _compare(self, server: ApiServer, watcher: fabrik_daemon.Watcher, oldest: float) -> None:
        """Check that every object of a scope is shown in a state that was true at `oldest` or later."""
        self.checks += 1
        scope = watcher.scope
        shown = self._simulated.daemon.store._objects.get((scope.cluster, scope.resource), {})
        for key, states in server.timeline.items():
            if key[0] != scope.resource or scope.namespace not in ("", key[1]):
                continue
            facts = shown.get(key[1:])
            if facts is not None and facts.gone:
                facts = None
            if self._seen.get((scope.cluster, key), (self, 0)) == (facts, len(states)):
                continue
            number = len(states) - 1
            if _facts(states[number][1]) == facts:
                self._seen[scope.cluster, key] = (facts, len(states))
                continue
            while number >= 0 and states[number][0] > oldest and _facts(states[number][1]) != facts:
                number -= 1
            if _facts(states[number][1] if number >= 0 else None) != facts:
                raise Violation(
                    f"{scope.cluster}: {'/'.join(key)} is shown as it was before {oldest - 1000:.1f}"
                    f" (state {watcher.told.state}, synced at {watcher.synced_at}): {facts}"
                    f"; it is {_facts(states[-1][1])} since {states[-1][0] - 1000:.1f}"
                )

    # The database, whenever a daemon has ended

    def check_database(self) -> None:
        """What the database holds of a scope must be what the server had at the version it is said to be at."""
        execute = self._simulated.connection.cursor().execute  # which no planned crash strikes
        for *where, version in execute(
            "SELECT cluster, resource, namespace, resource_version FROM watches WHERE resource_version IS NOT NULL"
        ).fetchall():
            scope = fabrik_daemon.Scope(*where)
            kept = {
                (namespace, name): fabrik_daemon.facts_from_json(scope.resource, text)
                for namespace, name, text in execute(
                    "SELECT namespace, name, facts FROM objects WHERE cluster = ? AND resource = ?", scope[:2]
                )
                if scope.namespace in ("", namespace)
            }
            kept = {name: facts for name, facts in kept.items() if not facts.gone}
            found = [_state(one, int(version), scope) for one in self._servers[scope.cluster].lineages]
            if kept not in found:
                raise Violation(f"the cache is not at its own version {version} of {scope}: {_apart(kept, found[-1])}")
        keys = {key for (key,) in execute("SELECT run_id FROM runs WHERE job_uid IS NOT NULL")}
        if not keys >= self._committed:
            raise Violation(f"runs that were in the cache are gone: {sorted(self._committed - keys)}")
        self._committed = keys

    def check_same(self, store: fabrik_daemon.Store) -> None:
        """The database must hold what the store holds."""
        connection = self._simulated.connection
        for table, kind in fabrik_daemon.TABLES.items():
            columns = ", ".join(kind._fields)
            written = {tuple(row) for row in connection.execute(f"SELECT {columns} FROM {table}")}  # noqa: S608 - names of ours
            known = {tuple(row) for row in store.tables.rows(kind)}
            if written != known:
                raise Violation(f"{table}: only written {written - known}, only known {known - written}")
        objects = {
            (cluster, resource, namespace, name): fabrik_daemon.facts_from_json(resource, text)
            for cluster, resource, namespace, name, text in connection.execute(
                "SELECT cluster, resource, namespace, name, facts FROM objects"
            )
        }
        known_objects = {(*pair, *name): facts for pair, some in store._objects.items() for name, facts in some.items()}
        if objects != known_objects:
            raise Violation(f"objects: {_apart(objects, known_objects)}")

    # The end

    def check_all(self) -> None:
        """When all has calmed down, everything must be as the servers say."""
        daemon = self._simulated.daemon
        for name, cluster in sorted(daemon._follower.clusters.items()):
            self._check_cluster(self._servers[name], cluster)
        rows: dict[type[fabrik_daemon.TableRow], list[Any]] = {
            kind: daemon.store.tables.rows(kind) for kind in fabrik_daemon.TABLES.values()
        }
        runs = {(row.cluster, row.namespace, row.id): row for row in rows[fabrik_daemon.Run]}
        if len(runs) != len(rows[fabrik_daemon.Run]):
            raise Violation("two rows for one run")
        for server in self._servers.values():
            Judge(server, runs).check(rows)
        for row in runs.values():
            if row.run_id not in (row.id, f"{row.id}@{row.cluster}/{row.namespace}"):
                raise Violation(f"a key in the wrong form: {row}")
        self._check_readers(daemon)

    def _check_cluster(self, server: ApiServer, cluster: fabrik_daemon.Cluster) -> None:
        if not cluster.is_connected or cluster.trouble or cluster.uid != server.uid:
            states = [(watcher.scope.resource, *watcher.told[:2]) for watcher in cluster.watchers]
            raise Violation(
                f"{server.name}: connected {cluster.is_connected}, {cluster.trouble}, uid {cluster.uid}"
                f" where the server is {server.uid}: {states}"
            )
        found = self._simulated.connection.execute(
            "SELECT uid, connected, error FROM clusters WHERE name = ?", (server.name,)
        ).fetchone()
        if found != (server.uid, 1, None):
            raise Violation(f"{server.name}: its row says {found}")
        for watcher in cluster.watchers:
            self._compare(server, watcher, self._world.now - 5)
            self._check_watch(server, watcher)

    def _check_watch(self, server: ApiServer, watcher: fabrik_daemon.Watcher) -> None:
        version, synced_at, state, error = self._simulated.connection.execute(
            "SELECT resource_version, synced_at, state, error FROM watches"
            " WHERE cluster = ? AND resource = ? AND namespace = ?",
            watcher.scope,
        ).fetchone()
        if state not in ("watching", "listing", "connecting") or error:  # it may just be listed anew, as it is at times
            raise Violation(f"{watcher.scope}: its row says {state}, {error}")
        if server.traits.bookmarks:
            due = server.lineage.revision_at(self._world.now - STALE_AFTER_S)
            age = self._world.wall() - (fabrik_daemon.epoch_of(synced_at) or 0)
            behind = int(version) < due if version else state == "watching"  # while all is listed anew there is none
            if behind or age > STALE_AFTER_S:
                raise Violation(f"{watcher.scope}: is at {version}, {age:.0f} s old, and the server was at {due}")

    def _check_readers(self, daemon: fabrik_daemon.Daemon) -> None:
        connected = {name for name, cluster in daemon._follower.clusters.items() if cluster.is_connected}
        for reader in self._simulated.readers:
            reader.read_all()
            known: dict[tuple[object, ...], JsonObject] = {}
            for kind in fabrik_daemon.TABLES.values():
                for row in daemon.store.tables.rows(kind) if reader.wanted.asks_for(kind) else ():
                    if reader.wanted.matches(row) and not (isinstance(row, fabrik_daemon.Volume) and row.deleted_at):
                        known[reader.key(row)] = row._asdict()
            if reader.rows != known:
                raise Violation(f"a subscriber knows other rows: {_apart(reader.rows, known)}")
            if reader.wanted == fabrik_daemon.Filter() and reader.connected != connected:
                raise Violation(f"a subscriber takes {reader.connected} for connected, not {connected}")


class Judge:
    """Says of one server's objects which rows there must be, and what each may say."""

    def __init__(self, server: ApiServer, runs: dict[Place, fabrik_daemon.Run]) -> None:
        self._server = server
        self._runs = {place: row for place, row in runs.items() if place[0] == server.name}
        self._jobs: dict[Place, list[list[Version]]] = {}
        self._pods: dict[str, list[list[Version]]] = {}  # by their Job's uid
        self._endings: dict[str, set[str]] = {}
        self._others: dict[str, dict[tuple[str, str], list[Version]]] = {}
        for states in server.uids.values():
            key, truth = states[-1].key, states[-1].truth
            if isinstance(truth, JobTruth) and truth.is_fabrik:
                self._jobs.setdefault((server.name, key[1], truth.id), []).append(states)
            elif isinstance(truth, PodTruth):
                self._pods.setdefault(truth.job_uid, []).append(states)
            elif not isinstance(truth, JobTruth):
                self._others.setdefault(key[0], {}).setdefault(key[1:], []).extend(states)
            if isinstance(truth, EventTruth) and truth.kind == "Job":
                ending = {"Completed": "finished", "BackoffLimitExceeded": "failed"}.get(truth.reason)
                self._endings.setdefault(truth.about_uid, set()).update([ending] if ending else [])

    def check(self, rows: dict[type[fabrik_daemon.TableRow], list[Any]]) -> None:
        for place in sorted({*self._jobs, *self._runs}):
            self._check_run(place)
        own = {kind: [row for row in some if row.cluster == self._server.name] for kind, some in rows.items()}
        self._check_volumes({row[1:3]: row for row in own[fabrik_daemon.Volume]})
        self._check_schedules({row[1:3]: row for row in own[fabrik_daemon.Schedule]})
        self._check_warnings({row[1:3]: row for row in own[fabrik_daemon.ClusterEvent]})

    # Runs

    def _check_run(self, place: Place) -> None:
        """The newest Job is the run; one that may have lived and died unseen gives way to the one before it."""
        row = self._runs.get(place)
        problems = []
        for states in sorted(self._jobs.get(place, ()), key=lambda one: _age(one[-1]), reverse=True):
            problem = self._problem(states, row)
            if problem is None:
                return
            problems.append(problem)
            if self._is_live(states[-1]) or not self._is_disturbed(states):
                break
        else:
            if row is None:
                return
        told = "\n  ".join(str(version.truth) for states in self._jobs.get(place, ()) for version in states)
        raise Violation(f"{'/'.join(place)}: {'; '.join(problems) or 'nothing such ever was'}\n {row}\n  {told}")

    def _problem(self, states: list[Version], row: fabrik_daemon.Run | None) -> str | None:
        live = self._is_live(states[-1])
        job: JobTruth = self._server.objects[states[-1].key].truth if live else states[-1].truth
        if row is None:
            return f"no row for {job.name}"
        expected = self._expect_live(states) if live else self._expect_gone(states)
        if row.status not in expected.statuses:
            return f"status {row.status}, not {expected.statuses} by {job.name}"
        if expected.reasons is not None and row.reason not in expected.reasons:
            return f"reason {row.reason}, not {expected.reasons}"
        columns = {
            **{"job_uid": job.uid, "job_name": job.name, "created_at": job.created_at, "schedule_id": job.schedule_id},
            **{"spec_id": "feature-x", "project": "myapp", "template": None, **expected.columns},
        }
        unlike = {name: (getattr(row, name), value) for name, value in columns.items() if getattr(row, name) != value}
        if bool(row.deleted_at) == live:
            unlike["deleted_at"] = (row.deleted_at, "set, where it is gone")
        if job.cronjob and row.run_id == row.id:
            unlike["run_id"] = (row.run_id, "never plain for a scheduled Job")
        return f"column: (shown, true) {unlike}" if unlike else None

    def _expect_live(self, states: list[Version]) -> Expected:
        there = self._server.objects
        job: JobTruth = there[states[-1].key].truth
        pods = [there[some[-1].key].truth for some in self._pods.get(job.uid, ()) if self._is_live(some[-1])]
        pod: PodTruth | None = max(pods, key=lambda one: (not one.deleting, one.created_at, one.uid), default=None)
        if job.outcome:  # the newest tells how it ended; one that is gone may have gone unseen
            newest = max(self._pods.get(job.uid, ()), key=lambda some: _age(some[-1]), default=None)
            pod = there[newest[-1].key].truth if newest is not None and self._is_live(newest[-1]) else None
        was_lost = any(version.truth.phase == "Unknown" for some in self._pods.get(job.uid, ()) for version in some)
        expected = self._expect_job(job, pod, was_lost=was_lost)
        if self._server.epochs:  # a restored Job may have ended in a future that never came
            ended = tuple(version.truth.outcome or "cancelled" for version in states if _is_terminal(version.truth))
            if ended:
                return Expected((*expected.statuses, *ended))
        columns: JsonObject = {"started_at": job.started_at} if job.started_at else {}
        if job.outcome:
            columns["finished_at"] = job.ended_at
        if pod is not None:
            said = report(pod.said, pod.dialect)[2] if pod.said.phase else Said()
            columns.update(said._asdict(), pod_name=pod.name)
        return Expected(expected.statuses, expected.reasons, columns)

    @staticmethod
    def _expect_job(job: JobTruth, pod: PodTruth | None, *, was_lost: bool) -> Expected:
        """Follow the status table; without a Pod, the last one's node may have been lost while it ran."""
        trouble = pod.waiting or (pod.reason if pod.reason != "Completed" else None) if pod else None
        expected = Expected(("pending",), (trouble,))
        if job.outcome == "finished":
            expected = Expected(("finished",), (None,))
        elif job.outcome == "failed":
            why = job.conditions[-1][1]
            reasons = (why,) if why == "DeadlineExceeded" else (trouble or why,) if pod else None
            expected = Expected(("failed",), reasons)
        elif job.deleting or job.cancelled:
            expected = Expected(("cancelled",))
        elif job.suspended:
            expected = Expected(("pending",), ("JobSuspended",))
        elif pod is None:
            expected = Expected(ALIVE if was_lost else ("pending",))
        elif pod.said.phase == "human-gate":
            expected = Expected(("blocked",), (trouble,))
        elif pod.phase == "Running":
            expected = Expected(("running",), (trouble,))
        elif pod.phase == "Unknown":
            expected = Expected(ALIVE, ("NodeLost",))
        return expected

    def _expect_gone(self, states: list[Version]) -> Expected:
        job: JobTruth = states[-1].truth
        told = job.outcome or "cancelled"
        if self._server.epochs:
            return Expected((*TERMINAL, None))
        if not self._is_disturbed(states):
            return Expected((told,))
        phases = {version.truth.phase for some in self._pods.get(job.uid, ()) for version in some}
        allowed: list[str | None] = [told, None, *sorted(self._endings.get(job.uid, ()))]
        allowed += [status for phase, status in (("Succeeded", "finished"), ("Failed", "failed")) if phase in phases]
        allowed += (
            ["cancelled"] if any(version.truth.deleting and not version.truth.outcome for version in states) else []
        )
        return Expected(tuple(allowed))

    # The rest

    def _check_volumes(self, rows: dict[tuple[str, str], fabrik_daemon.Volume]) -> None:
        ever = self._others.get("persistentvolumeclaims", {})
        for name in sorted({*rows, *ever}):
            row, states = rows.get(name), ever.get(name, [])
            live = self._live("persistentvolumeclaims", name)
            if live is None:
                if row is not None and (not row.deleted_at or not states):
                    raise Violation(f"a volume that is not there: {row}")
                if row is None and not self._is_disturbed(states):
                    raise Violation(f"a volume that went is forgotten: {name}")
                continue
            truth = live.truth
            columns = {
                field: getattr(truth, field) for field in ("phase", "capacity_bytes", "storage_class", "created_at")
            }
            self._check_columns(row, {**columns, "deleted_at": None}, self._keys_of(name[0], truth.id))

    def _check_schedules(self, rows: dict[tuple[str, str], fabrik_daemon.Schedule]) -> None:
        live = {key[1:]: version for key, version in self._server.objects.items() if key[0] == "cronjobs"}
        if rows.keys() != live.keys():
            raise Violation(f"{self._server.name}: schedules {sorted(rows)}, not {sorted(live)}")
        for name, version in live.items():
            columns = {field: value for field, value in version.truth._asdict().items() if field != "uid"}
            self._check_columns(rows[name], columns)

    def _check_warnings(self, rows: dict[tuple[str, str], fabrik_daemon.ClusterEvent]) -> None:
        ever = self._others.get("events", {})
        for name in sorted(ever):
            live = self._live("events", name)
            if live is not None and live.truth.warning:
                truth = live.truth
                columns = {"reason": truth.reason, "count": truth.repeats, "uid": truth.uid, "last_at": truth.last_at}
                self._check_columns(rows.get(name), columns, self._keys_of(name[0], truth.id))
        made_up = {name for name in rows if not any(version.truth.warning for version in ever.get(name, ()))}
        if made_up:
            raise Violation(f"{self._server.name}: warnings that never were: {sorted(made_up)}")

    def _check_columns(self, row: Any, columns: JsonObject, keys: tuple[str, ...] = ()) -> None:
        unlike = row is None or any(getattr(row, name) != value for name, value in columns.items())
        if unlike or (keys and row.run_id not in keys):
            raise Violation(f"{self._server.name}: {row} should have {columns}, run_id {keys}")

    def _keys_of(self, namespace: str, label_id: str) -> tuple[str, ...]:
        """Return the key of the run at a place; without a run, it is one of those which it would get."""
        row = self._runs.get((self._server.name, namespace, label_id))
        if row is not None:
            return (row.run_id,)
        own = f"{label_id}@{self._server.name}/{namespace}"
        return (own,) if label_id.startswith("fabrik-") else (label_id, own)

    def _live(self, resource: str, name: tuple[str, str]) -> Version | None:
        return self._server.objects.get((resource, *name))

    def _is_live(self, version: Version) -> bool:
        there = self._server.objects.get(version.key)
        return there is not None and there.uid == version.uid

    def _is_disturbed(self, states: list[Version]) -> bool:
        """Say whether something may have gone unseen while an object lived."""
        if self._server.epochs or not self._server.traits.bookmarks:  # it takes some silences to learn of the latter
            return True
        times = {version: when for when, version in self._server.timeline[states[0].key] if version is not None}
        began = min(times[version] for version in states)
        ended = max(self._server.deleted_at.get(version.uid, self._server.world.now) for version in states)
        return any(start <= ended and began <= end for start, end in self._server.disturbed)


def _is_terminal(job: JobTruth) -> bool:
    return bool(job.outcome or job.deleting or job.cancelled)


def _age(version: Version) -> tuple[str, str]:
    return version.truth.created_at, version.uid


def _facts(version: Version | None) -> fabrik_daemon.Facts | None:
    return version.facts if version is not None else None


def _state(lineage: Lineage, revision: int, scope: fabrik_daemon.Scope) -> dict[tuple[str, str], fabrik_daemon.Facts]:
    found = {}
    for version in lineage.at(revision, scope.resource, scope.namespace):
        facts = version.facts
        if facts is not None:
            found[version.key[1:]] = facts
    return found


def _apart(these: Any, those: Any) -> str:
    keys = [key for key in {**these, **those} if these.get(key) != those.get(key)]
    return "; ".join(f"{key}: {these.get(key)} against {those.get(key)}" for key in keys[:3])
