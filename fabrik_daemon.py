"""fabrik-daemon: the local control plane beside the user of fabrik's Kubernetes clusters.

It watches Jobs, CronJobs, Pods, PersistentVolumeClaims and Events on every configured cluster, derives the state of
every run, mirrors it into a SQLite cache that also answers offline, and serves it to commands and subscribers. It only
ever reads the clusters.

Data flows one way, and nothing calls back to the left:

    API server -> Stream -> HTTP codec -> Watch decoding -> Watch machine -> Projection -> Store -> Bus   -> Server
                                                                                                 -> Cache -> cache.db

The sections, top to bottom. Each uses its own names and those above it. The core takes bytes and time as arguments and
returns values; the shell owns the sockets, the clocks, the files and the threads.

Core:
    Limits                sizes, timeouts, intervals, each with its unit and its reason
    Errors                one hierarchy, each with its exit code and HTTP status
    Vocabulary            the few types that several sections share
    Text and time         RFC 3339, durations, quantities, ULIDs, safe access to JSON
    Settings: remote      how a daemon is reached over TCP, and how another host's is
    Settings              flags, environment and files -> frozen settings
    Settings: example     what a config.yaml may say, and what is said
    Kubeconfig            which contexts are fabrik clusters, and what a connection needs
    Projection: reports   what Smithers says of its run, in every dialect
    Projection: objects   Kubernetes objects -> facts
    Projection: rows      facts -> rows: the status table, schedules, volumes, warnings
    Filters               what a list or a subscriber asks for
    Filters: lists        order, time and limit of a list
    Store: rows           the rows known now; differences -> numbered changes
    Store: runs           which objects make up which run
    Store                 what was seen -> what it changes
    Bus                   subscriptions, their queues, lag and snapshots
    History               a run's timeline, the runs of a moment, statistics
    Schema: views         views for user SQL, and what tables and columns mean
    Schema: facts         facts <-> JSON
    Schema                DDL, migrations, statements, row <-> values, the SQL authorizer
    Schema: large commits   what whole lists write, in parts
    Schema: lists         what reads a list, or the runs that a word may mean
    Metrics               every metric, declared once, through prometheus-client
    HTTP                  client and server sides over h11: bytes in, messages out
    Watch decoding        byte lines -> events, list pages, Status objects
    Watch machine         list, watch, bookmark, expire, back off -> actions
    Watch machine: log lines   a log's bytes -> lines; which are new; how a Pod's containers are
    Watch machine: pod logs   a run's log over lost connections, restarts and new Pods -> lines, once each
    WebSocket             frames over wsproto: bytes in, texts out
    Requests              the daemon's API: request -> answer, the same for every framing
    Requests: routes      JSON and URLs -> requests
    Requests: framings    JSON lines, HTTP and WebSocket: bytes -> requests, answers -> bytes
    Requests: access      whom a remote daemon lets in, and what it lets them ask
    Shipping              what to send to a service of LAOS now, when again after a failure; the Pushgateway
    Shipping: discovery   Services of a cluster -> the services of LAOS among them
    Shipping: logs        the daemon's log for Loki: batches, a bounded spool
    Shipping: alerts      rows -> alerts for Alertmanager: what fires, when to tell it again
    Views: text           where hostile text is made safe, measured in cells and cut
    Views: tables         rows -> aligned columns that fit the terminal
    Views: formats        rows -> json, jsonl, yaml, csv, tsv, names
    Views: lists          the columns of each list, and how fresh an answer is
    Views: a run          one run whole, and its changes
    Views: the daemon     its status, its log, what was found of clusters
    Demo script           the scripted clusters of `demo`: what happens, and when
Shell:
    Reactor               selectors loop, timers, wake-up, a small pool for what blocks
    Streams               non-blocking TCP, TLS and Unix sockets
    Cache: reading        what the daemon and commands read of it
    Cache                 the one thread that writes SQLite, and its readers
    Cache: queries        user SQL within limits of time, memory and rows
    Credentials           the helper process around kubernetes.config
    Watcher               drives one Watch machine over one Stream
    Watcher: clusters     who a cluster is, how it is reached, and its watches together
    Watcher: calls        one request, its credentials, its response as it comes
    Server: listeners     the Unix socket: where it may be, and who is let in
    Server: remote        the TCP listener of remote mode: TLS, limits, token and certificate files
    Server                connections: what clients say -> requests, answers -> what they read
    Pusher                carries what Shipping has to send to the services of LAOS
    Pusher: discovery     looks for the services of LAOS in a cluster
    Daemon: log           the daemon's log, in memory; its last words
    Daemon: following     what watches tell -> store, cache, bus
    Daemon: kept logs     the last lines of runs that fail
    Daemon: sidecars      what the sidecars of Pods report
    Daemon: service manager  systemd's: readiness, reload, stop, watchdog, a socket that it opened; signals
    Daemon: metrics       reads their values
    Daemon: telemetry     what LAOS hears: metrics, the log, alerts
    Daemon                composition root: settings -> parts; orderly stop
    Client: remote        a connection to another host's daemon, which outlasts breaks
    Client                a connection to the daemon, for commands
    Direct                what asks an API server at once, in a loop of its own
    Direct: storage       how full volumes are, from Prometheus
    Direct: logs          the logs of runs: from their Pods, from Loki, from what was kept
    Direct: reports       what a run's sidecar and workspace say
    Direct: fresh         what API servers say at this moment, for `--fresh`
    Diagnosis             clusters test
    Diagnosis: this host  doctor: folders, cache, daemon, service
    Diagnosis: clusters and LAOS   doctor: credentials, reach, clocks, rights; services of LAOS
    Dashboard: palettes   roles of texts -> colours, for every kind of terminal
    Dashboard: columns    what the columns of its lists show, and how they sort
    Dashboard: model      the rows known, filtered, sorted and counted
    Dashboard: pages      lists and texts -> the lines that are seen
    Dashboard: texts      a run, a row or a log as lines
    Dashboard: desk       what is shown and how it stands: messages in, effects out
    Dashboard: keys       what each key does
    Dashboard: bars       title, counts, clusters, hints; commands
    Dashboard: feed       tells what there is, from the daemon or the cache
    Dashboard: screens    the Textual app
    Services              service-templates/ -> units and manifests
    Services: installing  the host's service managers: files and commands
    Services: unpacked copies  of the executable: which are in use, which are old
    Services: demo server   an API server on loopback that plays a script
    Services: demo        scripted clusters, a daemon that follows them, and what is shown of it
    Commands: reading     one function per command
    Commands: reading lists
    Commands: reading runs
    Commands: reading runs over time
    Commands: reading SQL
    Commands: reading settings
    Commands: reading logs
    Commands: daemon and clusters
    Commands: daemon and clusters: doctor
    Commands: installing
    Command line: reading    the commands that read: their arguments, examples and functions
    Command line: commands   every command, its arguments, examples and function
    Command line: parser     words -> a command and its arguments; help, and suggestions for mistyped words
    Command line: completion   what may stand next, for shells
    Command line          main
"""

from __future__ import annotations

import codecs
import functools
import gc
import io
import math
import os
import sys
import time
import types
from collections import deque, namedtuple
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence, Set
from datetime import datetime, timedelta, timezone
from functools import partial
from operator import itemgetter

TYPE_CHECKING = False  # as type checkers know it: typing itself costs 3 ms at every start
if TYPE_CHECKING:
    import argparse
    import asyncio
    import base64
    import bisect
    import concurrent.futures
    import contextlib
    import difflib
    import email.utils
    import errno
    import faulthandler
    import fcntl
    import grp
    import gzip
    import hashlib
    import heapq
    import hmac
    import http.server
    import ipaddress
    import itertools
    import json
    import logging
    import logging.handlers
    import plistlib
    import pwd
    import queue
    import random
    import re
    import resource
    import select
    import selectors
    import shlex
    import shutil
    import signal
    import socket
    import socketserver
    import sqlite3
    import ssl
    import stat
    import string
    import struct
    import subprocess
    import tempfile
    import termios
    import threading
    import traceback
    import unicodedata
    import urllib.parse
    import urllib.request
    import uuid
    import zipfile
    import zlib
    import zoneinfo
    from typing import Any, Callable, Final, NamedTuple, NoReturn, Protocol, TextIO, TypeVar, Union

    import cronsim
    import h11
    import kubernetes
    import prometheus_client
    import rich.cells
    import rich.segment
    import rich.style
    import textual.app
    import textual.events
    import textual.geometry
    import textual.scroll_view
    import textual.strip
    import textual.suggester
    import textual.theme
    import textual.widget
    import textual.widgets
    import websocket
    import wsproto
    import yaml

    _Made = TypeVar("_Made")

    def late(make: Callable[[], _Made]) -> _Made:
        """Return what `make` makes, which it does when an attribute of it is first asked for."""
else:

    class _ForCheckers:
        """What stands in annotations and type aliases alone, which nothing evaluates at run time."""

        def __init__(self, *_arguments):
            pass

        def __class_getitem__(cls, _parameters):
            return cls

    Any = Callable = TypeVar = Union = _ForCheckers
    Protocol = object

    class _Fields(type):
        """Makes what typing.NamedTuple makes, but a class gets its methods when its first instance is made.

        The sixty classes here cost 1 ms at every start instead of 10: a command uses a few of them.
        """

        def __new__(cls, name, bases, namespace):
            if not bases:
                return super().__new__(cls, name, bases, namespace)
            fields = tuple(namespace.get("__annotations__", ()))
            defaults = {field: namespace.pop(field) for field in fields if field in namespace}
            made = {"__slots__": (), "_fields": fields, "_field_defaults": defaults, "__new__": cls.first_instance}
            return type(name, (tuple,), {**namespace, **made})

        @staticmethod
        def first_instance(kind, *values, **named):
            whole = namedtuple(kind.__name__, kind._fields, defaults=kind._field_defaults.values())
            for name in ("__repr__", "__getnewargs__", "_make", "_replace", "_asdict", *kind._fields):
                if name not in kind.__dict__:
                    setattr(kind, name, whole.__dict__[name])
            kind.__new__ = whole.__new__
            return kind(*values, **named)

    NamedTuple = _Fields("NamedTuple", (), {})

    class _Lazy:
        """A module that is imported when it is first used: a command pays for what it needs and for nothing else."""

        def __init__(self, name):
            self._name = name

        def __getattr__(self, attribute):
            __import__(self._name)
            top = self._name.partition(".")[0]
            globals()[top] = sys.modules[top]
            return getattr(sys.modules[top], attribute)

    class late:  # noqa: N801 - checkers see a function
        """An object that is made when it is first used, as a regular expression: nine of them cost 4 ms with `re`."""

        def __init__(self, make):
            self._make = make

        def __getattr__(self, attribute):
            value = self.__dict__[attribute] = getattr(self._make(), attribute)
            return value

    argparse = _Lazy("argparse")
    asyncio = _Lazy("asyncio")  # what the dashboard's library stands on
    base64 = _Lazy("base64")
    bisect = _Lazy("bisect")
    concurrent = _Lazy("concurrent.futures")
    contextlib = _Lazy("contextlib")
    cronsim = _Lazy("cronsim")  # the next run of a schedule, in its time zone
    difflib = _Lazy("difflib")
    email = _Lazy("email.utils")
    errno = _Lazy("errno")
    faulthandler = _Lazy("faulthandler")
    fcntl = _Lazy("fcntl")
    grp = _Lazy("grp")
    gzip = _Lazy("gzip")
    h11 = _Lazy("h11")  # HTTP/1.1
    hashlib = _Lazy("hashlib")
    heapq = _Lazy("heapq")
    hmac = _Lazy("hmac")
    http = _Lazy("http.server")
    ipaddress = _Lazy("ipaddress")
    itertools = _Lazy("itertools")
    json = _Lazy("json")
    kubernetes = _Lazy("kubernetes")  # kubeconfigs: contexts, certificates, tokens, exec and OIDC plugins
    logging = _Lazy("logging.handlers")
    prometheus_client = _Lazy("prometheus_client")
    plistlib = _Lazy("plistlib")
    pwd = _Lazy("pwd")
    queue = _Lazy("queue")
    random = _Lazy("random")
    re = _Lazy("re")
    resource = _Lazy("resource")
    rich = _Lazy("rich.segment")  # the dashboard alone: cells, styles
    select = _Lazy("select")
    selectors = _Lazy("selectors")
    shlex = _Lazy("shlex")
    shutil = _Lazy("shutil")
    signal = _Lazy("signal")
    socket = _Lazy("socket")
    socketserver = _Lazy("socketserver")
    sqlite3 = _Lazy("sqlite3")
    ssl = _Lazy("ssl")
    stat = _Lazy("stat")
    string = _Lazy("string")
    struct = _Lazy("struct")
    subprocess = _Lazy("subprocess")
    tempfile = _Lazy("tempfile")
    termios = _Lazy("termios")
    textual = _Lazy("textual.app")  # the dashboard alone
    threading = _Lazy("threading")
    traceback = _Lazy("traceback")
    unicodedata = _Lazy("unicodedata")
    urllib = _Lazy("urllib.request")
    uuid = _Lazy("uuid")
    websocket = _Lazy("websocket")  # commands that ask a remote daemon
    wsproto = _Lazy("wsproto")
    yaml = _Lazy("yaml")  # config.yaml, clusters.yaml, kubeconfigs
    zipfile = _Lazy("zipfile")
    zlib = _Lazy("zlib")
    zoneinfo = _Lazy("zoneinfo")

# ======================================================================================================================
# Core: values in, values out
# ======================================================================================================================

# ----------------------------------------------------------------------------------------------------------------------
# Limits
# ----------------------------------------------------------------------------------------------------------------------

__version__ = "0.1.0"

TEXT_MAX_BYTES: Final = 4096  # one reported value; an annotation may hold 256 KiB of anything
INT_MAX: Final = 2**63 - 1  # SQLite's integers end here, and a larger one fails the whole batch
JSON_MAX_CHARS: Final = 65536  # a report is some hundred bytes; what is larger is not one
DURATION_MAX_S: Final = 100 * 365 * 86400.0  # beyond that dates overflow
LIST_PAGE_ITEMS: Final = 500  # client-go's page size: about 2.5 MB of Pods
ITEM_MAX_BYTES: Final = 16 * 2**20  # etcd refuses objects above 1.5 MB; beyond this a stream is garbage
HEADERS_MAX_BYTES: Final = 64 * 1024
REFUSAL_MAX_BYTES: Final = 64 * 1024  # a Status object has some hundred bytes
READ_BYTES: Final = 256 * 1024  # what one callback takes from one socket before others get their turn
BACKLOG_S: Final = 5.0  # a watch that is so old has told what happened before it began
GC_OBJECTS: Final = 10_000  # new ones between looks for cycles, which hardly come up: by 700, a tenth of all time
EVENTS_AT_ONCE: Final = 16  # told together, about 1 ms of work: more makes an event hardly cheaper
PODS_REMEMBERED: Final = 10_000  # by a watch, of what their last lines said: some 500 bytes each
CALLBACK_S: Final = 0.001  # how long decoding may hold the loop at a time: what a flood costs every other cluster
EMPTY_WATCH_S: Final = 1.0  # a watch that ends sooner and told nothing counts as a failure
BATCH_OPERATIONS: Final = 5_000  # of one batch: about 50 ms of writing
COMMIT_CHANGES: Final = 500  # of a list, written at once: a page of it
PINNED_OPERATIONS: Final = 200_000  # what is merged into one batch while a reader pins the log
WAL_MAX_BYTES: Final = 64 * 2**20
CACHE_BUSY_MS: Final = 10_000  # others write only when a cluster is synced without the daemon
SEQ_BLOCK: Final = 10_000  # sequence numbers reserved at once, so that a crash never reissues one
QUERY_ROWS: Final = 10_000
QUERY_MEMORY_BYTES: Final = 512 * 2**20
QUERY_ANSWER_BYTES: Final = 16 * 2**20  # of the daemon's `query`; 10,000 whole runs are 7 MB
QUERY_NICE: Final = 10  # added to the process's own: whoever shares the processors goes first, the daemon above all
RUN_EVENTS_SHOWN: Final = 1000
COMPLETED_WORDS: Final = 500  # that a shell is told of
WATCH_ALIGNED_ROWS: Final = 200  # of a list, that a row which changes is aligned with
KEPT_LINES_SHOWN: Final = 10  # of those kept, in `runs show`
MISSED_MAX: Final = 100  # a schedule that missed more than this is simply off
POOL_THREADS: Final = 16  # of each pool; name look-ups and helper processes take seconds where they hang
LOG_RING_LINES: Final = 2000
SKEW_MIN_S: Final = 2.0  # an HTTP Date has whole seconds: less than this is no skew
BILL_OF_MATERIALS: Final = "fabrik-daemon.cdx.json"  # beside the module in the executable; build.sh makes it
K3S_KUBECONFIG: Final = "/etc/rancher/k3s/k3s.yaml"
STATUS_FILE: Final = "/workspace/.smithers/status.json"
IN_CLUSTER: Final = "in-cluster"  # in place of a kubeconfig's path: the Pod's service account
PROTOCOL: Final = 1  # of requests and events; a change that old clients would misread raises it
SYSTEM_SOCKET: Final = "/run/fabrik/daemon.sock"  # of the system service; root decides whose /run/fabrik is
DEFAULT_SOCKET: Final = "/tmp/fabrik-daemon.sock"  # noqa: S108 - the spec's place, made safe by how it is bound
SOCKET_PATH_BYTES: Final = 103  # sun_path holds 104 bytes on macOS, 108 on Linux, its end included
CONNECTIONS_MAX: Final = 2000
SUBSCRIPTIONS_MAX: Final = 32  # of one connection
DESCRIPTORS: Final = 4096  # a thousand clients, five watches a namespace, and room
LISTEN_BACKLOG: Final = 1024
SO_PEERGROUPS: Final = 59  # Linux's; Python does not name it
PEER_GROUPS_MAX: Final = 256
FIRST_GIVEN_FD: Final = 3  # SD_LISTEN_FDS_START: behind stdin, stdout, stderr
REMOTE_PORT: Final = 8080
REMOTE_KUBECONFIG: Final = "/etc/fabrik/kubeconfig"  # a file, or a folder of them
REMOTE_CONNECTIONS: Final = 500  # of remote clients together; those on the Unix socket have their own
REMOTE_CONNECTIONS_EACH: Final = 50  # of one peer; a proxy is many
REMOTE_HEADERS_BYTES: Final = 16 * 1024  # a browser's have some 2 KB
REMOTE_BODY_BYTES: Final = 64 * 1024  # of a request: no SQL comes from there
REMOTE_REQUESTS_PER_S: Final = 50.0  # of one peer, in the long run
REMOTE_REQUESTS_BURST: Final = 200.0  # of one peer, at once
REMOTE_WRONG_TOKEN_COST: Final = 20.0  # requests that a wrong token counts for: 10 at once, then 2.5 a second
REMOTE_PEERS: Final = 10_000  # whose rate is known; the one not seen for longest is forgotten
TOKEN_MIN_CHARS: Final = 16  # fewer can be guessed
ACCEPT_PAUSE_S: Final = 0.5  # when no descriptor is left
ACCEPTS_PER_TURN: Final = 64  # before others get their turn
WEBSOCKET_KEY_CHARS: Final = 24  # 16 bytes in base64
REQUEST_MAX_BYTES: Final = 2**20  # SQL may be long; nothing else is
SEND_BYTES: Final = 64 * 1024  # what is handed to a connection at a time
OUTPUT_HIGH_BYTES: Final = 64 * 1024  # what waits for each client beside the kernel's buffer; a thousand may be deaf
LOST_GAPS: Final = 100  # in the numbers of a stream, one a start; of the older ones nothing between is believed
REPLAYED_AT_ONCE: Final = 200  # changes read out of the cache for one who comes back, some 5 ms
HISTORY_LOADED: Final = 1000  # of them, taken over from the cache at start
HISTORY_EVENTS: Final = 10_000  # what includeHistory reaches back to
HISTORY_BYTES: Final = 10 * 2**20  # of rows as JSON: one has some 0.9 KB, and with the longest texts 30
UNREAD_POLL_S: Final = 0.001  # nothing tells when a peer has read; doubles while it has not
UNREAD_POLL_MAX_S: Final = 0.1
ANSWERS_WAITING: Final = 4  # of one client, before its next request is looked at
SUBSCRIBER_QUEUE_LINES: Final = 10_000
SUBSCRIBER_QUEUE_BYTES: Final = 8 * 2**20  # of one that does not read; then it has lagged
SNAPSHOT_ROWS: Final = 100  # rows serialised at a time, about 1 ms
CLIENT_TIMEOUT_S: Final = 10.0  # of a command, for the daemon's answer
READY_AT_LATEST_S: Final = 3.0  # what a start waits for the first credentials, to tell at once where none resolve
LOCK_TRIES: Final = 5
LOCK_POLL_S: Final = 0.02  # where only asking again tells
HELPERS_END_S: Final = 0.5  # for helper processes that were killed to be gone
HELP_COLUMNS: Final = 100
LOKI_BATCH_BYTES: Final = 256 * 1024  # some milliseconds of JSON and gzip; Loki takes 4 MB
LOKI_SPOOL_BYTES: Final = 4 * 2**20  # about 10,000 lines
LOKI_OLDEST_S: Final = 6 * 86400  # Loki refuses what is a week old
ALERTS_AT_ONCE: Final = 64  # as Prometheus sends them
ALERT_CHECK_S: Final = 1.0  # what begins by the clock is seen to have begun so much later at most
LAOS_LIST_MAX_BYTES: Final = 4 * 2**20  # of Services in one namespace; each has some 2 KB
LAOS_LAST_S: Final = 0.3  # for Loki to take the last lines, of the 2 s of an orderly stop
LAOS_TRY_S: Final = 3.0  # for a connection to a service that was found
METRIC_RUNS: Final = 1000  # runs with series of their own: Prometheus keeps every one that there ever was
LAST_WORDS_CHARS: Final = 20_000
CERTIFICATE_WARN_S: Final = 7 * 86400.0  # before it ends; k3s renews its own at a restart 90 days before
CLOCK_SKEW_S: Final = 30.0  # what doctor complains of: a stale heartbeat is one of 60 s
DISK_FREE_BYTES: Final = 100 * 2**20
FIRST_ROWS: Final = 300  # what the dashboard shows before it knows the rest: more than the tallest terminal
LOG_TAIL_LINES: Final = 1000  # of a log that is opened in the dashboard
LOG_LINES_SHOWN: Final = 5000  # in the dashboard; `runs logs` shows all
NOTICE_S: Final = 4.0  # for a person to read a line
COMPLETIONS_SHOWN: Final = 12
FEED_END_S: Final = 1.0  # for the threads of the dashboard to end
RECONNECT_S: Final = 0.5  # between two looks for a daemon, and at the cache meanwhile
CLUSTERS_EVERY_TICKS: Final = 5  # seconds: how far behind each cluster is
REMOTE_CLUSTERS_EVERY_TICKS: Final = 30  # each question there is a handshake, and those are limited
DRAW_EVERY_S: Final = 0.03
BAR_CELLS: Final = 18  # a progress bar with its figures, where there is room for both
LOG_LINE_MAX_BYTES: Final = 256 * 1024  # a container may print without ever ending a line
LOG_LINES_KNOWN: Final = 1000  # of those read last, to know them again
LOG_TRIES: Final = 3  # to reach a log at all
KEPT_LINES: Final = 50  # of a failed run's container
KEPT_READ_BYTES: Final = 2**20  # of its log at most
SIDECARS_AT_ONCE: Final = 8  # of all clusters together
KEPT_AT_ONCE: Final = 4  # fetches of all clusters together
LOGS_AT_ONCE: Final = 200  # a connection each
LOKI_PAGE_LINES: Final = 1000
LOKI_RANGE_S: Final = 30 * 86400.0  # of a run that does not say when it began
LOG_POLL_DOUBLINGS: Final = 3  # of the back-off while there is nothing to read

# ----------------------------------------------------------------------------------------------------------------------
# Errors
# ----------------------------------------------------------------------------------------------------------------------


class FabrikError(Exception):
    """What a person can be told in one line; `hint` says what to do about it."""

    exit_code = 1
    http_status = 500
    code = "failed"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}: {self.hint}" if self.hint else self.message


class UsageError(FabrikError):
    """A command or request that cannot be meant."""

    exit_code, http_status, code = 2, 400, "bad_request"


class ConfigError(UsageError):
    """A file of settings that cannot be used; the message begins with file and line."""


class NotFoundError(FabrikError):
    """No such run or cluster."""

    exit_code, http_status, code = 3, 404, "not_found"


class UnreachableError(FabrikError):
    """A cluster that was asked did not answer."""

    exit_code, http_status, code = 5, 504, "unreachable"


class CacheError(FabrikError):
    """The cache cannot be read or written."""

    exit_code, http_status, code = 1, 503, "cache"


class NotSyncedError(FabrikError):
    """What was asked for is not known yet."""

    exit_code, http_status, code = 1, 503, "not_synced"


class StaleError(FabrikError):
    """What is known is older than was asked for."""

    exit_code, http_status, code = 6, 503, "stale"


class TimedOutError(FabrikError):
    """What was waited for did not happen in time."""

    exit_code, http_status, code = 7, 504, "timed_out"


class NotRunningError(FabrikError):
    """There is no daemon, or it ended meanwhile."""

    exit_code, http_status, code = 4, 503, "not_running"


class ServiceError(FabrikError):
    """The host's service manager could not be given the daemon."""


class StartError(FabrikError):
    """The daemon died while it started."""


class SocketError(FabrikError):
    """The socket cannot be where it should."""

    exit_code, http_status, code = 2, 500, "socket"


class CredentialsError(FabrikError):
    """A plugin that should give credentials fails at present; it may do better later."""

    exit_code, http_status, code = 5, 502, "credentials"


class TwinError(ConfigError):
    """A cluster is followed under another name already."""


class OtherCacheError(FabrikError):
    """The daemon keeps another cache than the one that was asked about."""

    exit_code, http_status, code = 1, 409, "other_cache"


class SlowError(UsageError):
    """A request that does not come to its end."""

    http_status = 408


class MethodError(UsageError):
    """An HTTP method that a route does not have."""

    http_status = 405


class UpgradeError(UsageError):
    """A WebSocket version that is not spoken here."""

    http_status = 426


class AlreadyRunningError(FabrikError):
    """Another process holds this cache's lock."""

    exit_code, http_status, code = 1, 409, "already_running"


class ProtocolError(FabrikError):
    """A peer sent what its protocol does not allow; the connection is of no use any more."""

    exit_code, http_status, code = 5, 502, "protocol"


class RefusedError(FabrikError):
    """What this peer may not ask, or not so."""

    exit_code, http_status, code = 9, 403, "refused"


class TokenError(RefusedError):
    """A remote client that shows no token, or a wrong one."""

    http_status, code = 401, "unauthorized"


class RateError(RefusedError):
    """A remote client that asks too much; `retry_after_s` says when it may again."""

    http_status, code = 429, "too_many_requests"

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("too many requests", f"ask again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class RemoteError(FabrikError):
    """What another process answered instead of what was asked for."""

    def __init__(self, reply: Mapping[str, Any]) -> None:
        super().__init__(str(reply.get("message", "refused")), str(reply.get("hint") or ""))
        self.code = str(reply.get("code"))
        self.exit_code = int(reply.get("exit_code") or FabrikError.exit_code)
        self.http_status = int(reply.get("http_status") or FabrikError.http_status)


# ----------------------------------------------------------------------------------------------------------------------
# Vocabulary
# ----------------------------------------------------------------------------------------------------------------------

JsonObject = dict[str, Any]
Values = tuple[Any, ...]

PENDING: Final = "pending"
RUNNING: Final = "running"
BLOCKED: Final = "blocked"
FINISHED: Final = "finished"
FAILED: Final = "failed"
CANCELLED: Final = "cancelled"
STATUSES: Final = (PENDING, RUNNING, BLOCKED, FINISHED, FAILED, CANCELLED)
TERMINAL: Final = frozenset((FINISHED, FAILED, CANCELLED))
UNKNOWN: Final = "unknown"  # how a NULL status is shown


class Resource(NamedTuple):
    """One watched resource: its plural name and the root of its API group."""

    name: str
    root: str

    def path(self, namespace: str) -> str:
        """Return the collection's path; an empty namespace means all of them."""
        return f"{self.root}/namespaces/{namespace}/{self.name}" if namespace else f"{self.root}/{self.name}"


JOBS: Final = Resource("jobs", "/apis/batch/v1")
CRONJOBS: Final = Resource("cronjobs", "/apis/batch/v1")
PODS: Final = Resource("pods", "/api/v1")
VOLUMES: Final = Resource("persistentvolumeclaims", "/api/v1")
EVENTS: Final = Resource("events", "/api/v1")
RESOURCES: Final = (JOBS, CRONJOBS, PODS, VOLUMES, EVENTS)


class Run(NamedTuple):
    """A row of `runs`: the spec's columns, then ours. Times are RFC 3339 in UTC."""

    run_id: str
    cluster: str
    namespace: str
    status: str | None = None
    current_task: str | None = None
    task_status: str | None = None
    progress_finished: int | None = None
    progress_total: int | None = None
    spec_id: str | None = None
    template: str | None = None
    created_at: str | None = None
    updated_at: str | None = None  # when the cluster last had something new to say of it
    last_sync_at: str | None = None  # when the row was written
    id: str | None = None
    project: str | None = None
    phase: str | None = None
    task_attempt: int | None = None
    iteration: int | None = None
    heartbeat_at: str | None = None
    reason: str | None = None
    job_name: str | None = None
    job_uid: str | None = None
    pod_name: str | None = None
    schedule_id: str | None = None
    started_at: str | None = None
    finished_at: str | None = None
    deleted_at: str | None = None


SCHEDULE_STATES: Final = ("waiting", "active", "suspended")


class Schedule(NamedTuple):
    """A row of `schedules`: one CronJob."""

    cluster: str
    namespace: str
    name: str
    schedule_id: str | None = None
    schedule: str | None = None
    time_zone: str | None = None
    suspended: int = 0
    active: int = 0
    created_at: str | None = None
    last_run_at: str | None = None
    last_success_at: str | None = None
    next_run_at: str | None = None
    missed: int = 0

    @property
    def state(self) -> str:
        """What becomes of it now: one of SCHEDULE_STATES."""
        return "suspended" if self.suspended else "active" if self.active else "waiting"


class Volume(NamedTuple):
    """A row of `volumes`: one PersistentVolumeClaim."""

    cluster: str
    namespace: str
    name: str
    run_id: str | None = None
    phase: str | None = None
    capacity_bytes: int | None = None
    storage_class: str | None = None
    created_at: str | None = None
    deleted_at: str | None = None


class ClusterEvent(NamedTuple):
    """A row of `cluster_events`: one Warning Event, counted."""

    cluster: str
    namespace: str
    name: str
    uid: str | None = None
    run_id: str | None = None
    object_kind: str | None = None
    object_name: str | None = None
    reason: str | None = None
    message: str | None = None
    count: int = 1  # type: ignore[assignment]  # hides tuple.count, which nobody wants
    first_at: str | None = None
    last_at: str | None = None


DISABLED: Final = "disabled"  # by clusters.yaml
CLUSTER_STATUSES: Final = ("connected", "disconnected", DISABLED)


class ClusterRow(NamedTuple):
    """A row of `clusters`."""

    name: str
    server: str | None = None
    uid: str | None = None
    priority: int = 100
    connected: int = 0
    last_event_at: str | None = None
    error: str | None = None

    @property
    def cluster(self) -> str:
        """The cluster's name, as other rows have it."""
        return self.name

    @property
    def status(self) -> str:
        """Whether it is followed, as people read it: one of CLUSTER_STATUSES."""
        return DISABLED if self.error == DISABLED else "connected" if self.connected else "disconnected"


TableRow = Union[Run, Schedule, Volume, ClusterEvent]
Row = Union[TableRow, ClusterRow]


TABLES: Final[dict[str, type[TableRow]]] = {
    "runs": Run,
    "schedules": Schedule,
    "volumes": Volume,
    "cluster_events": ClusterEvent,
}


class Scope(NamedTuple):
    """What one watch covers: a resource of a cluster, in one namespace or (empty) in all."""

    cluster: str
    resource: str
    namespace: str


class Freshness(NamedTuple):
    """How old a cluster's part of an answer is."""

    cluster: str
    connected: bool
    synced_at: str | None  # None: not yet synced
    error: str | None = None
    skew_s: float = 0.0  # the server's clock less ours


def freshness_from(said: JsonObject) -> Freshness:
    """Return what a daemon said of a cluster's part; what only another version knows is left out."""
    return Freshness(**{name: value for name, value in said.items() if name in Freshness._fields})


class Change(NamedTuple):
    """One difference between what was known and what is known; `row` is the new row, or the last one of a removal."""

    seq: int
    type: str  # run:added, schedule:updated, volume:removed, warning, ...
    row: Row
    previous: Row | None
    at: str
    row_json: str = ""  # the row as JSON, serialised once for the cache and for every subscriber; empty: not yet


# ----------------------------------------------------------------------------------------------------------------------
# Text and time
# ----------------------------------------------------------------------------------------------------------------------

_TIME = late(
    lambda: re.compile(  # RFC 3339, section 5.6
        r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.(\d+))?([Zz]|[+-]\d\d:?\d\d)", re.ASCII
    )
)
_DURATION = late(lambda: re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|w)", re.ASCII))
_DURATION_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_QUANTITY = late(lambda: re.compile(r"(\d+(?:\.\d*)?|\.\d+)(?:[eE]([+-]?\d{1,2})|([KMGTPE]i|[numkMGTPE]))?", re.ASCII))
_QUANTITY_UNITS: Final = {
    **{unit: 1000.0**power for power, unit in ((-3, "n"), (-2, "u"), (-1, "m"), *enumerate("kMGTPE", 1))},
    **{unit + "i": 1024**power for power, unit in enumerate("KMGTPE", 1)},
}
_ULID = r"[0-7][0-9a-hjkmnp-tv-z]{25}"
_ULID_NAMES = late(lambda: re.compile(rf"(?:data-)?fabrik-({_ULID})(?:-.+)?|run-({_ULID})-workspace", re.ASCII))


def epoch_of(text: object) -> float | None:
    """Return the seconds since 1970 of an RFC 3339 time, None where it is none."""
    if not isinstance(text, str) or not 20 <= len(text) < 64:
        return None
    whole, part = text[:19], text[19:-1]
    is_usual = whole[4::3] == "--T::" and whole[11:] < "24" and text[-1] == "Z"
    if is_usual and (not part or (part[0] == "." and part[1:].isdecimal() and part.isascii())):
        try:  # as Kubernetes writes them and rows hold them: a quarter of what the pattern takes
            return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0{part}")
        except ValueError:
            return None
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    zone = match[8]
    offset = 0 if zone in "Zz" else int(zone[0] + "1") * (int(zone[1:3]) * 60 + int(zone[-2:]))
    try:
        year, month, day, hour, minute, second = (int(part) for part in match.groups()[:6])
        moment = datetime(year, month, day, hour, minute, second, tzinfo=timezone.utc)
        return (moment - timedelta(minutes=offset)).timestamp() + float(f"0.{match[7] or 0}")
    except (ValueError, OverflowError):
        return None


def format_time(epoch: float, *, milliseconds: bool = False) -> str:
    """Return an RFC 3339 time in UTC; whole seconds as Kubernetes writes them, or milliseconds."""
    second, part = divmod(epoch, 1)
    if not milliseconds:
        return f"{_second_text(second)}Z"
    thousandths = min(999, int(part * 1000 + 0.0005))  # a double of this century is 0.0003 off at most
    return f"{_second_text(second)}.{thousandths:03d}Z"


@functools.lru_cache(maxsize=16)  # the present second is asked for several times a change
def _second_text(second: float) -> str:
    return datetime.fromtimestamp(second, tz=timezone.utc).isoformat()[:19]


def time_text(value: object) -> str | None:
    """Return a cluster's time in the one form that rows hold and that sorts as text; None where it is no time."""
    return _normal_time(value) if isinstance(value, str) else None


@functools.lru_cache(maxsize=4096)  # an object says most of its times again with every change: 9 us each
def _normal_time(text: str) -> str | None:
    epoch = epoch_of(text)
    if epoch is None or text[4::3] == "--T::Z":  # in that form already, as Kubernetes writes it
        return text if epoch is not None else None
    try:
        return format_time(epoch // 1)
    except (ValueError, OverflowError):  # the last second of the year 9999, rounded up
        return None


def parse_duration(text: str) -> float:
    """Return the seconds of `90`, `1.5s`, `10m` or `1h30m`. Raises ValueError."""
    parts = _DURATION.findall(text)
    if re.fullmatch(r"\d+(\.\d+)?", text, re.ASCII):
        seconds = float(text)
    elif parts and "".join(number + unit for number, unit in parts) == text:
        seconds = sum(float(number) * _DURATION_UNITS[unit] for number, unit in parts)
    else:
        seconds = math.inf
    if seconds > DURATION_MAX_S:
        raise ValueError(f"{text[:40]!r} is no duration; write 30s, 10m, 24h or 7d")
    return seconds


def format_duration(seconds: float) -> str:
    """Return a duration as parse_duration reads it, with one unit: the largest that leaves no fraction."""
    if seconds != int(seconds):
        return f"{seconds * 1000:.3f}".rstrip("0").rstrip(".") + "ms"
    for unit in ("d", "h", "m"):
        if seconds and seconds % _DURATION_UNITS[unit] == 0:
            return f"{seconds / _DURATION_UNITS[unit]:g}{unit}"
    return f"{seconds:g}s"


def parse_moment(text: str, now: float) -> float:
    """Return the seconds since 1970 of a time or of how long ago it was: `2h`, `2026-02-16T20:00Z`, `2026-02-16`.

    A time without a zone is in UTC. Raises ValueError.
    """
    day, _, rest = text.strip().replace(" ", "T").partition("T")
    clock = re.fullmatch(r"(\d\d:\d\d)(:\d\d(?:\.\d+)?)?([Zz]|[+-]\d\d:?\d\d)?", rest or "00:00", re.ASCII)
    moment = epoch_of(f"{day}T{clock[1]}{clock[2] or ':00'}{clock[3] or 'Z'}") if clock else None
    if moment is not None:
        return moment
    try:
        return now - parse_duration(text)
    except ValueError:
        raise ValueError(f"{text[:40]!r} is no time; write 2h, 7d, 2026-02-16 or 2026-02-16T20:00Z") from None


def format_age(seconds: float) -> str:
    """Return an age as kubectl writes it (k8s.io/apimachinery/pkg/util/duration, HumanDuration)."""
    if seconds < 0:
        return "0s"
    total = int(seconds)
    minutes, hours, days = total // 60, total // 3600, total // 86400
    for below, whole, unit, rest, rest_unit in (
        (120, total, "s", 0, ""),
        (600, minutes, "m", total % 60, "s"),
        (3 * 3600, minutes, "m", 0, ""),
        (8 * 3600, hours, "h", minutes % 60, "m"),
        (48 * 3600, hours, "h", 0, ""),
        (8 * 86400, days, "d", hours % 24, "h"),
        (2 * 365 * 86400, days, "d", 0, ""),
        (8 * 365 * 86400, days // 365, "y", days % 365, "d"),
    ):
        if total < below:
            return f"{whole}{unit}" + (f"{rest}{rest_unit}" if rest else "")
    return f"{days // 365}y"


def parse_quantity(value: object) -> int | None:
    """Return the bytes of a Kubernetes quantity (`10Gi`, `1.5G`, `1e9`), rounded up; None where it is none."""
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) and len(value) < 64 else None
    if match is None:
        return None
    number, exponent, unit = match.groups()
    factor = 10.0 ** int(exponent) if exponent else _QUANTITY_UNITS[unit] if unit else 1
    amount = int(number) * factor if number.isdigit() else float(number) * factor
    return min(-int(-amount // 1), INT_MAX)


def format_bytes(value: int | None) -> str:
    """Return a size with a binary unit, as PersistentVolumeClaims are written (`10Gi`)."""
    if value is None:
        return ""
    amount, units = float(value), iter(("", "Ki", "Mi", "Gi", "Ti", "Pi"))
    unit = next(units)
    while amount >= 1024 and unit != "Pi":
        amount, unit = amount / 1024, next(units)
    return f"{amount:.4g}{unit}"


def ulid_in(name: str) -> str | None:
    """Return the run's ULID in the name of a fabrik Job, Pod or PersistentVolumeClaim."""
    match = _ULID_NAMES.fullmatch(name)
    return (match[1] or match[2]) if match else None


def clip(value: object) -> str | None:
    """Return a text that every part of the program can hold: at most 4 KiB, no lone surrogates, or None."""
    if not isinstance(value, str) or not value:
        return None
    if len(value) <= TEXT_MAX_BYTES and value.isascii():
        return value
    return value[:TEXT_MAX_BYTES].encode("utf-8", "replace")[:TEXT_MAX_BYTES].decode("utf-8", "ignore")


def parse_int(value: object) -> int | None:
    """Return a count from an integer or its decimal text, within 0 and 63 bits; anything else is None."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= INT_MAX:
        return value
    return None


def parse_json(text: str) -> JsonObject | None:
    """Return the object that a text of our own processes holds, or None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def parse_json_object(text: object) -> JsonObject | None:
    """Return the object that a hostile text holds, or None.

    5,000 nested brackets raise RecursionError in Python's parser, an integer of 5,000 digits ValueError.
    """
    if not isinstance(text, str) or len(text) > JSON_MAX_CHARS:
        return None
    return parse_json(text)


def object_at(value: JsonObject, *path: str) -> JsonObject:
    """Return the object at a path of keys, an empty one where there is none."""
    here: object = value
    for key in path:
        here = here.get(key) if isinstance(here, dict) else None
    return here if isinstance(here, dict) else {}


def list_at(value: JsonObject, *path: str) -> list[JsonObject]:
    """Return the objects in the list at a path of keys, none where there is no list."""
    found = object_at(value, *path[:-1]).get(path[-1])
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def text_at(value: JsonObject, *path: str) -> str | None:
    """Return the text at a path of keys, clipped, None where there is none."""
    return clip(object_at(value, *path[:-1]).get(path[-1]))


_JSON_TEXT = late(lambda: json.JSONEncoder(ensure_ascii=False, separators=(",", ":")))  # making one costs 3 us
_RECORD_TEXTS: Final[dict[type, str]] = {}  # of each kind: its JSON with a %s for each value


def format_json_text(value: object) -> str:
    """Return a value as JSON without spaces, everything but control characters as it is."""
    return _JSON_TEXT.encode(value)


def format_record(record: Any) -> str:
    """Return a NamedTuple as a JSON object, as format_json_text would its _asdict: half of that time.

    Its values are text, int, bool, None, such records (`{}` where they say nothing), or what format_json_text takes.
    """
    kind, escape = record.__class__, json.encoder.encode_basestring
    text = _RECORD_TEXTS.get(kind)
    if text is None:
        text = _RECORD_TEXTS[kind] = "{" + ",".join(f'"{name}":%s' for name in record._fields) + "}"
    return text % tuple(
        [
            escape(value)
            if value.__class__ is str
            else "null"
            if value is None
            else value
            if value.__class__ is int
            else _format_other(value)
            for value in record
        ]
    )


def _format_other(value: Any) -> str:
    if value.__class__ is bool:
        return "true" if value else "false"
    if hasattr(value, "_fields"):
        return format_record(value) if any(part is not None and part != () for part in value) else "{}"
    return format_json_text(value) if value != () else "[]"


def latest(*times: str | None) -> str | None:
    """Return the last of some times, leaving out the unknown ones."""
    return max((moment for moment in times if moment), default=None)


def parse_http_date(text: str) -> float | None:
    """Return the seconds since 1970 of an HTTP Date (RFC 9110, section 5.6.7), None where it is none."""
    try:
        return email.utils.parsedate_to_datetime(text).timestamp() if text else None
    except (ValueError, TypeError, IndexError):
        return None


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for a mistyped word, or what there is to choose from."""
    choices = sorted(known)
    close = difflib.get_close_matches(word, choices, 1, 0.6)
    return f"did you mean {close[0]!r}?" if close else f"choose from {some_of(choices)}"


def some_of(words: Iterable[str]) -> str:
    """Return words with commas between, and how many more there are where they would not make one clear line."""
    shown = list(words)
    most = 20
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def expand_home(path: str, environment: Mapping[str, str]) -> str:
    """Return a path whose leading `~` is the user's home."""
    if path == "~" or path.startswith("~/"):
        return environment.get("HOME", "/") + path[1:]
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Settings: remote
# ----------------------------------------------------------------------------------------------------------------------


class Exposure(NamedTuple):
    """How a daemon is reached over TCP, in remote mode. It may hold a secret: never log one."""

    host: str  # the address it listens at; empty: all of them
    port: int
    tls_cert: str | None = None  # PEM files
    tls_key: str | None = None
    token_file: str | None = None  # one token a line
    token: str | None = None  # of the environment, where there is no file
    behind_proxy: bool = False  # a proxy in front does TLS, and says for whom it asks
    hosts: frozenset[str] = frozenset()  # names it goes by, beside localhost and addresses
    origins: frozenset[str] = frozenset()  # of web pages that may ask, beside its own
    kubeconfig: str = REMOTE_KUBECONFIG

    def __repr__(self) -> str:
        return f"Exposure({self.host}:{self.port})"

    @property
    def files(self) -> tuple[str, ...]:
        """The files that are read again when they change."""
        return tuple(path for path in (self.tls_cert, self.tls_key, self.token_file) if path)

    @property
    def words(self) -> list[str]:
        """The words of a command line that say the same, but for a token that stands in the environment."""
        words = ["--mode", "remote", "--listen", self.host or "*", "--port", str(self.port)]
        for flag, path in zip(
            ("--tls-cert", "--tls-key", "--token-file"), (self.tls_cert, self.tls_key, self.token_file)
        ):
            words += [flag, path] if path else []
        words += ["--behind-proxy"] if self.behind_proxy else []
        words += [word for host in sorted(self.hosts) for word in ("--allow-host", host)]
        return words + [word for origin in sorted(self.origins) for word in ("--allow-origin", origin)]


class ExposureFlags(NamedTuple):
    """What the command line says of remote mode, by the flags' names; None or empty where it says nothing."""

    mode: str | None = None
    listen: str | None = None
    port: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    behind_proxy: bool = False
    allow_host: Sequence[str] = ()
    allow_origin: Sequence[str] = ()


MODES: Final = ("host", "remote")


def exposure_from(flags: ExposureFlags, token_file: str | None, environment: Mapping[str, str]) -> Exposure | None:
    """Return how the daemon is to be reached over TCP, None in host mode. Raises ConfigError for what is not safe."""
    mode = flags.mode or environment.get("MODE") or "host"
    if mode not in MODES:
        raise ConfigError(f"MODE is {mode[:80]!r}", nearest(mode, MODES))
    if mode == "host":
        for name, value in flags._replace(mode=None)._asdict().items():
            if value:
                raise UsageError(f"--{name.replace('_', '-')} is for remote mode", "add --mode remote")
        return None

    def path_of(flag: str | None, variable: str) -> str | None:
        path = flag or environment.get(variable)
        return expand_home(path, environment) if path else None

    behind_proxy = flags.behind_proxy or _is_on(environment, "FABRIK_BEHIND_PROXY")
    cert, key = path_of(flags.tls_cert, "FABRIK_TLS_CERT"), path_of(flags.tls_key, "FABRIK_TLS_KEY")
    host = flags.listen or environment.get("FABRIK_LISTEN") or ("*" if cert or behind_proxy else "127.0.0.1")
    exposure = Exposure(
        host="" if host == "*" else host,
        port=_parse_port(flags.port or environment.get("WEBSOCKET_PORT") or str(REMOTE_PORT)),
        tls_cert=cert,
        tls_key=key,
        token_file=path_of(token_file, "FABRIK_TOKEN_FILE"),
        token=environment.get("FABRIK_TOKEN"),
        behind_proxy=behind_proxy,
        hosts=frozenset(map(_parse_host, flags.allow_host or _words_of(environment, "FABRIK_ALLOWED_HOSTS"))),
        origins=frozenset(map(_parse_origin, flags.allow_origin or _words_of(environment, "FABRIK_ALLOWED_ORIGINS"))),
        kubeconfig=environment.get("FABRIK_KUBECONFIG") or REMOTE_KUBECONFIG,
    )
    _check_exposure(exposure)
    return exposure


def _check_exposure(exposure: Exposure) -> None:
    if bool(exposure.tls_cert) != bool(exposure.tls_key):
        raise ConfigError("a TLS certificate and its key go together", "give both --tls-cert and --tls-key")
    if not exposure.tls_cert and not exposure.behind_proxy and not is_loopback(exposure.host):
        told = f"without TLS, tokens would cross the network in plain text to {exposure.host or 'every address'}"
        raise ConfigError(told, "give --tls-cert and --tls-key, or --behind-proxy where a proxy in front does TLS")
    if not exposure.token_file and not exposure.token:
        raise ConfigError("remote mode needs a token", "give --token-file, or set FABRIK_TOKEN")


def parse_tokens(text: str, where: str) -> tuple[bytes, ...]:
    """Return the SHA-256 of each token, one a line: all that is kept of them. Raises ConfigError."""
    tokens = [line.strip() for line in text.splitlines() if line.strip()]
    if not tokens:
        raise ConfigError(f"{where}: no token in it", "write one to it: 'openssl rand -hex 32'")
    for token in tokens:
        check_token(token, where)
    if min(map(len, tokens)) < TOKEN_MIN_CHARS:
        hint = f"take {TOKEN_MIN_CHARS} characters or more: 'openssl rand -hex 32'"
        raise ConfigError(f"{where}: a token that can be guessed", hint)
    return tuple(map(token_digest, tokens))


def check_token(token: str, where: str) -> None:
    """Raise ConfigError for a token that no header can hold."""
    if not re.fullmatch(r"[!-~]+", token):
        raise ConfigError(f"{where}: a token has characters that no header can hold", "take letters and digits")


def token_digest(token: str) -> bytes:
    """Return what tokens are compared by."""
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


def is_loopback(host: str) -> bool:
    """Say whether a host is this one by name or address, whatever a resolver says."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _parse_port(text: str) -> int:
    port = parse_int(text)
    if port is None or port > 65535:
        raise ConfigError(f"{text[:80]!r} is no port", "--port and WEBSOCKET_PORT take 0 to 65535; 0 is any free one")
    return port


def _parse_host(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252})", text, re.ASCII):
        raise ConfigError(f"{text[:80]!r} is no host's name", "write it as in a URL, without scheme and port")
    return text.lower().rstrip(".")


def _parse_origin(text: str) -> str:
    if not re.fullmatch(r"https?://[A-Za-z0-9.\[\]:_-]+", text, re.ASCII):
        raise ConfigError(f"{text[:80]!r} is no origin", "write scheme and host: https://dashboard.example.com")
    return text.lower()


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    value = environment.get(name, "").lower()
    if value not in ("", "0", "1", "false", "true", "no", "yes", "off", "on"):
        raise ConfigError(f"{name} is {value[:80]!r}", "set it to true or false")
    return value in ("1", "true", "yes", "on")


def _words_of(environment: Mapping[str, str], name: str) -> tuple[str, ...]:
    return tuple(environment.get(name, "").replace(",", " ").split())


class RemoteDaemon(NamedTuple):
    """A daemon on another host, as `--remote` names it. It may hold a secret: never log one."""

    url: str  # ws:// or wss://, without a slash at its end
    token: str | None = None
    ca_file: str | None = None  # None: the authorities that this host trusts

    def __repr__(self) -> str:
        return f"RemoteDaemon({self.url})"


def remote_from(
    url: str,
    token_file: str | None,
    ca_file: str | None,
    environment: Mapping[str, str],
    read: Callable[[str], str | None],
) -> RemoteDaemon:
    """Return the remote daemon at a URL, with the token of a file, else of the environment. Raises ConfigError.

    `read` returns a file's text, None where there is no such file.
    """
    url, token = parse_remote(url), environment.get("FABRIK_TOKEN")
    token_file = token_file or (None if token else environment.get("FABRIK_TOKEN_FILE"))
    ca_file = ca_file or environment.get("FABRIK_CA_FILE")
    if token_file:
        token = _read_token(expand_home(token_file, environment), read)
    if token:
        check_token(token, token_file or "FABRIK_TOKEN")
        host = urllib.parse.urlsplit(url).hostname or ""
        if url.startswith("ws:") and not is_loopback(host):
            raise ConfigError(f"without TLS, the token would cross the network in plain text to {host}", "write wss://")
    return RemoteDaemon(url, token or None, expand_home(ca_file, environment) if ca_file else None)


def parse_remote(url: str) -> str:
    """Return the URL of a remote daemon as that of a WebSocket; http(s):// means the same. Raises ConfigError."""
    hint = "write wss://host/daemon"
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:
        raise ConfigError("--remote: this is no URL", hint) from None
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError(
            "--remote: a secret has no place in a URL", "give the token with --token-file or FABRIK_TOKEN"
        )
    scheme = {"wss": "wss", "https": "wss", "ws": "ws", "http": "ws"}.get(parts.scheme)
    if scheme is None or not parts.hostname:
        raise ConfigError(f"--remote: {clip(url[:80])!r} is no URL of a daemon", hint)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{scheme}://{host}{f':{port}' if port else ''}{parts.path.rstrip('/')}"


def _read_token(path: str, read: Callable[[str], str | None]) -> str:
    text = read(path)
    if text is None:
        raise ConfigError(f"{path}: no such file", "name the file that holds the token with --token-file")
    tokens = text.split()
    if not tokens:
        raise ConfigError(f"{path}: no token in it", "write the daemon's token to it")
    return tokens[0]


# ----------------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------------


class Timing(NamedTuple):
    """Every interval and deadline, in seconds; `timing:` in config.yaml sets each by its name (`backoffMin: 1s`)."""

    resolve: float = 10.0  # a name look-up
    connect: float = 10.0  # TCP and TLS, until a request can be sent
    answer: float = 75.0  # until a response begins, and between its parts: a server whose store is down takes 60 s
    idle: float = 70.0  # bookmarks come every 60 s: silence beyond this is a dead connection
    watch_timeout: float = 300.0  # a watch lasts this long at least and up to twice as long, as client-go's do
    backoff_min: float = 0.8  # client-go's reflector
    backoff_max: float = 30.0
    backoff_reset: float = 120.0  # health that ends the back-off
    initial_list: float = 30.0  # until a streamed list must have ended; older k3s never ends one
    relist: float = 1800.0  # a consistent list catches what no event told
    sleep: float = 30.0  # clocks that part by more, or a loop that is later, mean that the host slept
    sidecar: float = 30.0  # between two looks at a Pod's sidecar; Smithers reports as often
    files_check: float = 5.0  # whether kubeconfigs, certificates, tokens or clusters.yaml have changed
    forbidden_retry: float = 300.0  # a role may be granted meanwhile
    credentials: float = 30.0  # an exec plugin that takes longer hangs
    identity: float = 5.0  # for a server to say who it is, before the watches begin without that
    renew_before: float = 60.0  # before a credential expires
    batch: float = 0.1  # what is written waits for more of the same row; the spec allows a second
    pinned_batch: float = 5.0  # the same while a reader keeps the write-ahead log from being emptied
    cache_retry: float = 1.0  # after a failed commit: the disk may be full
    housekeeping: float = 60.0  # next runs of schedules; retention
    retention: float = 30 * 86400.0  # after a run's end
    query: float = 5.0  # user SQL
    sync: float = 60.0  # one full list of every cluster
    fresh: float = 10.0  # the same for `--fresh`, where somebody waits
    idle_seq: float = 30.0  # subscribers who hear nothing are told how far the stream is
    request: float = 30.0  # from a request's first byte to its last
    ping: float = 30.0  # a WebSocket client that says nothing is asked whether it is there, and twice that is enough
    socket_check: float = 5.0  # whether the socket's file is still there
    remote_backoff_min: float = 0.5  # of a command that was cut off from a remote daemon
    remote_backoff_max: float = 30.0
    stop: float = 1.5  # what the cache gets to write its last, of the 2 s of an orderly stop
    laos_answer: float = 10.0  # until a service of LAOS has answered
    laos_retry_max: float = 30.0  # between two attempts at one that is away; the first come sooner
    laos_discovery: float = 300.0  # between two looks for services of LAOS in a cluster
    log_batch: float = 1.0  # the longest that a log line waits for others before they go to Loki
    push: float = 30.0  # between two pushes of the metrics to a Pushgateway
    alert_batch: float = 0.1  # what an alert waits for others of the same moment
    alert_resend: float = 60.0  # an alert that fires is sent again; unless it is, it ends after four of these
    alert_resolved: float = 900.0  # for so long it is told that an alert is over
    alert_failed: float = 3600.0  # for so long a failed run is worth an alert
    alert_pending: float = 600.0  # a run that is pending for longer is worth one
    alert_heartbeat: float = 60.0  # a run that is running and silent for longer is worth one
    usage: float = 2.0  # until Prometheus has said how full volumes are


class LaosService(NamedTuple):
    """How one service of LAOS is reached; secrets stand in files, which are read when they are needed."""

    url: str
    tenant: str | None = None  # X-Scope-OrgID, of Loki
    username: str | None = None
    password_file: str | None = None
    bearer_token_file: str | None = None
    ca_file: str | None = None  # None: the host's own authorities


class Laos(NamedTuple):
    """The services of LAOS, overall or one cluster's; None where nothing is said."""

    loki: LaosService | None = None
    alertmanager: LaosService | None = None
    prometheus: LaosService | None = None
    pushgateway: LaosService | None = None
    discover: bool | None = None  # look for them in the clusters
    alerts: str | None = None  # one of ALERT_WAYS

    def over(self, other: Laos) -> Laos:
        """Return this with what it does not say taken from another."""
        said = {name: value for name, value in self._asdict().items() if value is not None}
        return other._replace(**said)


class ClusterSpec(NamedTuple):
    """One cluster as configured or discovered."""

    name: str
    kubeconfig: str  # path; several, joined by the path separator, are merged as kubectl does
    context: str | None = None  # None: the file's current context
    namespaces: tuple[str, ...] = ("fabrik-runs",)  # ("",) means all
    label_selector: str | None = None
    priority: int = 100
    enabled: bool = True
    is_discovered: bool = False  # in a kubeconfig, rather than named in clusters.yaml
    laos: Laos = Laos()  # over the overall one

    @property
    def rank(self) -> tuple[bool, int, str]:
        """Which of two names for one cluster it goes by, the lower."""
        return self.is_discovered, self.priority, self.name


STATUS_SOURCES: Final = ("annotation", "sidecar", "exec")


class Settings(NamedTuple):
    """Where everything is and how long everything may take."""

    config: str
    clusters_file: str
    cache: str
    socket: str | None  # None: the default, which depends on who holds it
    log_level: str = "info"
    timing: Timing = Timing()
    keep_logs: bool = True  # the last lines of failed runs
    status_sources: tuple[str, ...] = STATUS_SOURCES[:1]
    laos: Laos = Laos()
    metrics_listen: tuple[str, int] | None = None  # host and port; None: on the Unix socket alone
    remote: RemoteDaemon | None = None  # who is asked in place of this host's daemon
    exposure: Exposure | None = None  # how the daemon is reached over TCP; None: not at all

    @property
    def cluster_files(self) -> tuple[str, ...]:
        """What says which clusters to follow, and is read again when it changes."""
        return (self.clusters_file, *([self.exposure.kubeconfig] if self.exposure is not None else ()))

    socket_group: str | None = None  # whose members may ask, besides the daemon's own user and root
    is_cache_named: bool = False  # else the host's system service may answer as well
    autostart: bool = True  # the dashboard and what watches start a daemon where none runs


class Flags(NamedTuple):
    """What the command line says of places; None where it says nothing."""

    config: str | None = None
    cache: str | None = None
    socket: str | None = None


LOG_LEVELS: Final = ("debug", "info", "warning", "error")
LAOS_SERVICES: Final = ("loki", "alertmanager", "prometheus", "pushgateway")
ALERT_WAYS: Final = ("off", "direct", "rules")  # direct: the daemon sends them; rules: Prometheus makes them
_CONFIG_KEYS: Final = (
    *("cache", "socket", "socketGroup", "logLevel", "keepLogs", "statusSources", "autostart"),
    *("timing", "laos", "metrics"),
)
_CLUSTER_KEYS: Final = (
    "name",
    "kubeconfig",
    "context",
    "defaultNamespace",
    "namespaces",
    "labelSelector",
    "priority",
    "enabled",
    "laos",
)
_SERVICE_KEYS: Final = {
    "url": "url",
    "tenant": "tenant",
    "username": "username",
    "passwordFile": "password_file",
    "bearerTokenFile": "bearer_token_file",
    "caFile": "ca_file",
}
TIMING_KEYS: Final = {name[0] + name.title().replace("_", "")[1:]: name for name in Timing._fields}  # as backoffMin


def settings_from(flags: Flags, environment: Mapping[str, str], read: Callable[[str], str | None]) -> Settings:
    """Return the settings that flags, environment and config.yaml make, in this order of precedence.

    `read` returns a file's text, None where there is no such file. Raises ConfigError.
    """
    config_home = environment.get("XDG_CONFIG_HOME") or expand_home("~/.config", environment)
    cache_home = environment.get("XDG_CACHE_HOME") or expand_home("~/.cache", environment)
    config = flags.config or environment.get("FABRIK_CONFIG") or f"{config_home}/fabrik/daemon/config.yaml"
    config = expand_home(config, environment)
    text = read(config)
    if text is None and flags.config:
        raise ConfigError(f"{config}: no such file", "name the config.yaml to use with --config")
    values = parse_config(text or "", config, environment)
    cache = flags.cache or environment.get("FABRIK_CACHE") or values.get("cache")
    socket_path = flags.socket or environment.get("FABRIK_SOCKET") or values.get("socket")
    return Settings(
        config=config,
        clusters_file=config.rpartition("/")[0] + "/clusters.yaml" if "/" in config else "clusters.yaml",
        cache=expand_home(cache or f"{cache_home}/fabrik/daemon/cache.db", environment),
        socket=expand_home(socket_path, environment) if socket_path else None,
        log_level=values.get("logLevel", "info"),
        timing=values.get("timing", Timing()),
        keep_logs=values.get("keepLogs", True),
        autostart=values.get("autostart", True),
        status_sources=values.get("statusSources", STATUS_SOURCES[:1]),
        laos=values.get("laos", Laos()),
        metrics_listen=values.get("metrics"),
        socket_group=environment.get("FABRIK_SOCKET_GROUP") or values.get("socketGroup"),
        is_cache_named=cache is not None,
    )


def parse_config(text: str, where: str, environment: Mapping[str, str] | None = None) -> JsonObject:
    """Return the keys that a config.yaml sets, checked. Raises ConfigError with file and line."""
    values: JsonObject = {}
    for key, node, at in _yaml_items(_yaml_root(text, where), where, _CONFIG_KEYS):
        if key == "timing":
            values[key] = Timing(**dict(_timing_items(node, where)))
        elif key == "laos":
            values[key] = _laos_from(node, where, environment or {})
        elif key == "metrics":
            for _, listen, listen_at in _yaml_items(node, where, ("listen",)):
                values[key] = parse_listen(_yaml_text(listen, listen_at, "listen"), listen_at)
        elif key == "logLevel":
            values[key] = _one_of(_yaml_text(node, at, key), LOG_LEVELS, at)
        elif key in ("keepLogs", "autostart"):
            values[key] = _yaml_scalar(node, at, key, bool)
        elif key == "statusSources":
            values[key] = tuple(_one_of(source, STATUS_SOURCES, at) for source in _yaml_list(node, at, key))
        else:
            values[key] = _yaml_text(node, at, key)
    return values


def parse_clusters(text: str, where: str, environment: Mapping[str, str]) -> list[ClusterSpec]:
    """Return the clusters of a clusters.yaml, in its order. Raises ConfigError with file and line."""
    clusters: list[ClusterSpec] = []
    for key, node, at in _yaml_items(_yaml_root(text, where), where, ("clusters",)):
        if _yaml_is_null(node):
            continue
        if not isinstance(node, yaml.SequenceNode):
            raise ConfigError(f"{at}: {key} must be a list", "begin each cluster with '- name: ...'")
        for item in node.value:
            cluster = _cluster_from(item, where, environment)
            if any(cluster.name == other.name for other in clusters):
                raise ConfigError(f"{_yaml_at(item, where)}: a second cluster named {cluster.name!r}", "rename one")
            clusters.append(cluster)
    return clusters


def format_clusters(clusters: Iterable[ClusterSpec]) -> str:
    """Return the text of a clusters.yaml that parse_clusters reads back."""
    items: list[JsonObject] = []
    for cluster in clusters:
        item: JsonObject = {"name": cluster.name, "kubeconfig": cluster.kubeconfig}
        if cluster.context is not None:
            item["context"] = cluster.context
        namespaces = [name or "*" for name in cluster.namespaces]
        if len(namespaces) == 1:
            item["defaultNamespace"] = namespaces[0]
        else:
            item["namespaces"] = namespaces
        if cluster.label_selector:
            item["labelSelector"] = cluster.label_selector
        item["priority"] = cluster.priority
        if not cluster.enabled:
            item["enabled"] = False
        if cluster.laos != Laos():
            item["laos"] = _laos_json(cluster.laos)
        items.append(item)
    return str(yaml.safe_dump({"clusters": items}, sort_keys=False, allow_unicode=True))


def _laos_json(laos: Laos) -> JsonObject:
    names = {name: key for key, name in _SERVICE_KEYS.items()}
    return {
        name: {names[field]: text for field, text in value._asdict().items() if text is not None}
        if isinstance(value, LaosService)
        else value
        for name, value in laos._asdict().items()
        if value is not None
    }


def _cluster_from(item: yaml.Node, where: str, environment: Mapping[str, str]) -> ClusterSpec:
    here = _yaml_at(item, where)
    values: JsonObject = {}
    for key, node, at in _yaml_items(item, where, _CLUSTER_KEYS):
        if key == "namespaces":
            values[key] = tuple(_yaml_list(node, at, key))
        elif key == "laos":
            values[key] = _laos_from(node, where, environment)
        elif key in ("priority", "enabled"):
            values[key] = _yaml_scalar(node, at, key, int if key == "priority" else bool)
        else:
            values[key] = _yaml_text(node, at, key)
    for key in ("name", "kubeconfig"):
        if key not in values:
            raise ConfigError(f"{here}: a cluster without {key}", f"add '{key}: ...'")
    check_cluster_name(values["name"], here)
    namespaces = values.get("namespaces") or (values.get("defaultNamespace", "fabrik-runs"),)
    kubeconfig = expand_home(values["kubeconfig"], environment)
    if not kubeconfig.startswith("/") and kubeconfig != IN_CLUSTER:
        kubeconfig = f"{where.rpartition('/')[0] or '.'}/{kubeconfig}"  # beside clusters.yaml, wherever that is read
    return ClusterSpec(
        name=values["name"],
        kubeconfig=kubeconfig,
        context=values.get("context"),
        namespaces=parse_namespaces(namespaces, here),
        label_selector=values.get("labelSelector"),
        priority=values.get("priority", 100),
        enabled=values.get("enabled", True),
        laos=values.get("laos", Laos()),
    )


def _laos_from(node: yaml.Node, where: str, environment: Mapping[str, str]) -> Laos:
    values: JsonObject = {}
    for key, value, at in _yaml_items(node, where, (*LAOS_SERVICES, "discover", "alerts")):
        if key == "discover":
            values[key] = _yaml_scalar(value, at, key, bool)
        elif key == "alerts":
            values[key] = _one_of(_yaml_text(value, at, key), ALERT_WAYS, at)
        else:
            values[key] = _service_from(value, at, where, environment)
    return Laos(**values)


def _service_from(node: yaml.Node, at: str, where: str, environment: Mapping[str, str]) -> LaosService:
    said: dict[str, str] = {}
    for key, value, here in _yaml_items(node, where, _SERVICE_KEYS):
        text = _yaml_text(value, here, key)
        if key.endswith("File"):
            text = expand_home(text, environment)
            text = text if text.startswith("/") else f"{where.rpartition('/')[0] or '.'}/{text}"
        elif not all(" " <= char < "\x7f" for char in text):
            raise ConfigError(f"{here}: {key} has characters that no header can hold")
        said[_SERVICE_KEYS[key]] = text
    service = LaosService(**{"url": "", **said})
    _check_service(service, at)
    return service


def _check_service(service: LaosService, at: str) -> None:
    """Raise ConfigError for a service of LAOS that could not be reached so."""
    try:
        parts = urllib.parse.urlsplit(service.url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(f"{at}: its url is no http(s) URL", "write 'url: http://host:port'")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(f"{at}: its url has more than host, port and path", "use username and passwordFile")
    if bool(service.username) != bool(service.password_file):
        raise ConfigError(f"{at}: username and passwordFile go together", "add the other")
    if service.username and service.bearer_token_file:
        raise ConfigError(f"{at}: both a password and a token", "keep one")


def parse_listen(text: str, at: str) -> tuple[str, int]:
    """Return host and port of `127.0.0.1:9464` or `[::1]:9464`. Raises ConfigError."""
    host, _, port = text.rpartition(":")
    number = parse_int(port)
    if not host or number is None or number > 65535:
        raise ConfigError(f"{at}: {text[:80]!r} is no address to listen on", "write host:port, as 127.0.0.1:9464")
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host, number


def check_cluster_name(name: str, where: str) -> None:
    """Raise ConfigError for a name that could not stand in `<id>@<cluster>/<namespace>` or on a command line."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,252}", name, re.ASCII):
        raise ConfigError(f"{where}: {name!r} is no cluster name", "use letters, digits, '.', '_', ':', '@' and '-'")


def parse_namespaces(names: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the namespaces to watch, each once; `*` becomes the empty name and stands alone. Raises ConfigError."""
    for name in names:
        if name != "*" and not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name, re.ASCII):
            raise ConfigError(f"{where}: {name!r} is no namespace", "use lower-case letters, digits and '-', or '*'")
    return ("",) if "*" in names else tuple(dict.fromkeys(names))


def _timing_items(node: yaml.Node, where: str) -> Iterator[tuple[str, float]]:
    for key, value, at in _yaml_items(node, where, TIMING_KEYS):
        try:
            yield TIMING_KEYS[key], parse_duration(_yaml_text(value, at, key))
        except ValueError as error:
            raise ConfigError(f"{at}: {key}: {error}") from None


def _yaml_root(text: str, where: str) -> yaml.Node | None:
    if not text.strip():
        return None  # without importing yaml: most users have no config.yaml
    try:
        root: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{where}:{line}: {error.problem or error.context}", "correct the YAML") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{where}:1: {' '.join(str(error).split())}", "correct the YAML") from None
    return root


def _yaml_at(node: yaml.Node, where: str) -> str:
    return f"{where}:{node.start_mark.line + 1}"


def _yaml_is_null(node: yaml.Node | None) -> bool:
    return node is None or node.tag == "tag:yaml.org,2002:null"


def _yaml_items(node: yaml.Node | None, where: str, known: Iterable[str]) -> Iterator[tuple[str, yaml.Node, str]]:
    """Yield key, value and place of a mapping; an empty file is an empty mapping. Raises ConfigError."""
    if node is None or _yaml_is_null(node):
        return
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{_yaml_at(node, where)}: expected 'key: value' lines", f"keys: {some_of(known)}")
    seen: dict[str, str] = {}
    for key_node, value in node.value:
        at, key = _yaml_at(key_node, where), str(key_node.value)
        if key not in known:
            raise ConfigError(f"{at}: unknown key {key!r}", nearest(key, known))
        if key in seen:
            raise ConfigError(f"{at}: {key} stands here again", f"first at {seen[key]}; keep one")
        seen[key] = at
        yield key, value, at


def _yaml_text(node: yaml.Node, at: str, key: str) -> str:
    if not isinstance(node, yaml.ScalarNode) or not node.value or _yaml_is_null(node):
        raise ConfigError(f"{at}: {key} needs a value")
    return str(node.value)


def _yaml_list(node: yaml.Node, at: str, key: str) -> list[str]:
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        raise ConfigError(f"{at}: {key} must be a list", f"write '{key}: [a, b]'")
    return [_yaml_text(item, at, key) for item in node.value]


_Scalar = TypeVar("_Scalar", int, bool)


def _yaml_scalar(node: yaml.Node, at: str, key: str, kind: type[_Scalar]) -> _Scalar:
    text = node.value.lower() if isinstance(node, yaml.ScalarNode) else ""
    if kind is int and node.tag == "tag:yaml.org,2002:int" and re.fullmatch(r"[+-]?\d{1,18}", text, re.ASCII):
        return kind(int(text))
    if kind is bool and node.tag == "tag:yaml.org,2002:bool":
        return kind(text in ("true", "yes", "on"))
    raise ConfigError(f"{at}: {key} must be {'a whole number' if kind is int else 'true or false'}")


def _one_of(value: str, choices: Iterable[str], at: str) -> str:
    if value not in choices:
        raise ConfigError(f"{at}: {value!r} is not possible here", nearest(value, choices))
    return value


# ----------------------------------------------------------------------------------------------------------------------
# Settings: example
# ----------------------------------------------------------------------------------------------------------------------

_EXAMPLE: Final = """\
# config.yaml of fabrik-daemon. Each line is a default: take the '# ' away to change it.

# cache: ~/.cache/fabrik/daemon/cache.db   # the database; its folder is for you alone
# socket: /tmp/fabrik-daemon.sock          # where the daemon listens
# socketGroup: fabrik                      # members of this group may ask as well (default: nobody)
# logLevel: info                           # debug, info, warning or error
# autostart: true                          # 'dashboard', 'runs watch' and lists with -w start a daemon
# keepLogs: true                           # keep the last 50 log lines of a failed run
# statusSources: [annotation]              # also: sidecar, exec
# laos:                                    # the services that hear of runs; the same in a cluster of clusters.yaml
#   loki: {url: "http://loki.monitoring:3100"}
# metrics:
#   listen: 127.0.0.1:9464                 # Prometheus' metrics over TCP too (default: on the socket alone)

# timing:                                  # every interval and deadline
"""


def config_example() -> str:
    """Return a config.yaml that says nothing yet, with every key in a comment."""
    names = {name: key for key, name in TIMING_KEYS.items()}
    defaults = Timing()._asdict().items()
    return _EXAMPLE + "".join(f"#   {names[name]}: {format_duration(value)}\n" for name, value in defaults)


def settings_rows(settings: Settings, flags: Flags, environment: Mapping[str, str], text: str) -> list[JsonObject]:
    """Return what is set, a row a key, and by what; `text` is config.yaml's. Raises ConfigError."""
    values = parse_config(text, settings.config, environment)
    places = []
    for key, flag, variable in (
        ("config", flags.config, "FABRIK_CONFIG"),
        ("cache", flags.cache, "FABRIK_CACHE"),
        ("socket", flags.socket, "FABRIK_SOCKET"),
    ):
        by_file = "config.yaml" if key in values else "default"
        source = f"--{key}" if flag else variable if environment.get(variable) else by_file
        places.append({"key": key, "value": getattr(settings, key), "set_by": source})
    rest = {
        "socketGroup": settings.socket_group,
        "logLevel": settings.log_level,
        "autostart": settings.autostart,
        "keepLogs": settings.keep_logs,
        "statusSources": ", ".join(settings.status_sources),
        "metrics": ":".join(map(str, settings.metrics_listen)) if settings.metrics_listen else None,
        "laos": ", ".join(name for name, value in settings.laos._asdict().items() if value is not None) or None,
    }
    rows = [{"key": k, "value": v, "set_by": "config.yaml" if k in values else "default"} for k, v in rest.items()]
    names = {name: key for key, name in TIMING_KEYS.items()}
    for name, value in settings.timing._asdict().items():
        source = "default" if value == Timing._field_defaults[name] else "config.yaml"
        rows.append({"key": f"timing.{names[name]}", "value": format_duration(value), "set_by": source})
    return [*places, *rows]


# ----------------------------------------------------------------------------------------------------------------------
# Kubeconfig
# ----------------------------------------------------------------------------------------------------------------------


class Connection(NamedTuple):
    """All that a connection to an API server needs, resolved. Secrets inside: never log one."""

    server: str
    ca_pem: str | None = None
    insecure: bool = False
    tls_server_name: str | None = None
    cert_pem: str | None = None
    key_pem: str | None = None
    token: str | None = None
    expires_at: float | None = None  # seconds since 1970
    proxy_url: str | None = None
    files: tuple[tuple[str, float], ...] = ()  # what all this was read from, and when that was last changed

    def __repr__(self) -> str:
        return f"Connection({self.server})"

    @property
    def identity(self) -> tuple[str, ...]:
        """What tells one cluster from another where nothing better is known: the server and its CA."""
        return self.server.rstrip("/"), self.ca_pem or ""

    def renew_in(self, now: float, timing: Timing) -> float | None:
        """Return the seconds until the credentials should be resolved anew, None where they do not expire."""
        if self.expires_at is None:
            return None
        left_s = self.expires_at - now
        return max(1.0, left_s - min(timing.renew_before, left_s / 2))


class Proxy(NamedTuple):
    """An HTTP proxy that makes tunnels."""

    host: str
    port: int
    authorization: str | None

    def connect_request(self, endpoint: Endpoint) -> bytes:
        """Return the request for a tunnel (RFC 9110, section 9.3.6)."""
        shown = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        lines = [f"CONNECT {shown}:{endpoint.port} HTTP/1.1", f"Host: {shown}:{endpoint.port}"]
        if self.authorization:
            lines.append(f"Proxy-Authorization: Basic {self.authorization}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")


def parse_proxy(url: str) -> Proxy:
    """Return the proxy of a `proxy-url`. Raises ConfigError for other kinds than http://."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or 80
    except ValueError:
        raise ConfigError("proxy-url is no URL", "write http://host:port") from None
    if parts.scheme != "http" or not parts.hostname:
        raise ConfigError(f"proxy-url has scheme {parts.scheme!r}", "only http:// proxies are supported")
    user = urllib.parse.unquote(parts.netloc.rpartition("@")[0])
    return Proxy(parts.hostname, port, base64.b64encode(user.encode()).decode() if user else None)


class Endpoint(NamedTuple):
    """Where a server URL points to."""

    tls: bool
    host: str
    port: int
    base: str  # a path in front of every request's, as with Rancher's clusters
    authority: str


def parse_server(url: str) -> Endpoint:
    """Return the parts of an API server's URL. Raises ConfigError."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"server {url.rpartition('@')[2][:80]!r}: {error}", "correct the kubeconfig") from None
    if parts.username or parts.password:
        raise ConfigError("the server's URL holds a password", "use a token or a certificate")
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise ConfigError(f"server {url!r} is no http(s) URL", "correct the kubeconfig")
    tls = parts.scheme == "https"
    host = parts.hostname
    shown = f"[{host}]" if ":" in host else host
    authority = f"{shown}:{port}" if port else shown
    return Endpoint(tls, host, port or (443 if tls else 80), parts.path.rstrip("/"), authority)


def parse_kubeconfig(text: str, where: str) -> JsonObject:
    """Return a kubeconfig's document. Raises ConfigError with file and line."""
    try:
        document = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{where}:{line}: {error.problem}", "this is no kubeconfig") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}:1: {' '.join(str(error).split())}", "this is no kubeconfig") from None
    if not isinstance(document, dict) or not isinstance(document.get("contexts"), list):
        raise ConfigError(f"{where}:1: no contexts in it", "this is no kubeconfig")
    return document


def fabrik_clusters(document: JsonObject, path: str) -> list[ClusterSpec]:
    """Return the contexts that are fabrik's: by extension, namespace or name; k3d's and k3s's own count as such."""
    found: list[ClusterSpec] = []
    for entry in list_at(document, "contexts"):
        context, name = object_at(entry, "context"), text_at(entry, "name")
        extensions = {text_at(item, "name") for item in list_at(context, "extensions")}
        named = "fabrik" in (name or "").lower() or "fabrik" in (text_at(context, "cluster") or "").lower()
        named = named or path == K3S_KUBECONFIG or (name or "").startswith("k3d-")
        namespace = text_at(context, "namespace") or ""
        if (
            name
            and name not in {spec.context for spec in found}
            and (named or namespace == "fabrik-runs" or extensions & {"fabrik", "fabrik.dev"})
        ):
            namespaces = (namespace,) if namespace.startswith("fabrik-runs") else ("fabrik-runs",)
            shown = "k3s" if path == K3S_KUBECONFIG and name == "default" else name
            found.append(ClusterSpec(shown, path, context=name, namespaces=namespaces, is_discovered=True))
    return found


def mounted_clusters(documents: Mapping[str, JsonObject]) -> list[ClusterSpec]:
    """Return the clusters of kubeconfigs (path -> document) that were put there for the daemon.

    They are a file's fabrik contexts, else its current one. Between several files one named `default`, as k3s has
    them, or like one before it goes by its file's name.
    """
    found: dict[str, ClusterSpec] = {}
    for path, document in documents.items():
        current = text_at(document, "current-context")
        specs = fabrik_clusters(document, path)
        if not specs and current is not None:
            specs = [ClusterSpec(current, path, context=current, is_discovered=True)]
        for spec in specs:
            file = path.rpartition("/")[2].partition(".")[0] or spec.name
            is_vague = spec.name in found or (spec.name == "default" and len(documents) > 1)
            name = file if is_vague else spec.name
            found.setdefault(name, spec._replace(name=name))
    return list(found.values())


def certificate_expiry(pem: str) -> float | None:
    """Return when the first certificate of a PEM text ends, None where there is none (RFC 5280, section 4.1)."""
    found = re.search(r"-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", pem, re.DOTALL)
    try:
        der = base64.b64decode("".join(found[1].split()) if found else "")
        at = _der_value(der, _der_value(der, 0)[1])[1]  # into the certificate, into what is signed
        for _ in range(4 if der[at] == 0xA0 else 3):  # version, where it stands; serial number, algorithm, issuer
            at = _der_value(der, at)[2]
        at = _der_value(der, _der_value(der, at)[1])[2]  # into its validity, past its beginning
        tag, start, end = _der_value(der, at)
        text = der[start:end].decode("ascii")
    except (IndexError, ValueError):
        return None
    if tag == 0x17:  # UTCTime
        text = ("19" if text[:2] >= "50" else "20") + text
    return epoch_of(f"{text[:4]}-{text[4:6]}-{text[6:8]}T{text[8:10]}:{text[10:12]}:{text[12:14]}Z")


def _der_value(der: bytes, at: int) -> tuple[int, int, int]:
    """Return tag, begin and end of the contents of the value at a place (X.690)."""
    length, start = der[at + 1], at + 2
    if length & 0x80:
        start += length & 0x7F
        length = int.from_bytes(der[at + 2 : start], "big")
    return der[at], start, start + length


def token_expiry(token: str) -> float | None:
    """Return when a token ends that is a JWT and says so (RFC 7519, section 4.1.4), else None."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        claims = parse_json_object(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)).decode("utf-8"))
    except ValueError:
        return None
    until = parse_int((claims or {}).get("exp"))
    return None if until is None else float(until)


def connection_from(resolved: JsonObject) -> Connection:
    """Return the connection that the credentials helper printed. Raises what it complains of."""
    if "error" in resolved:
        kind = ConfigError if resolved.get("is_configuration") else CredentialsError
        raise kind(str(resolved["error"]), str(resolved.get("hint") or ""))
    known = {name: resolved[name] for name in Connection._fields if name in resolved and name != "files"}
    if not all(" " < char < "\x7f" for char in known.get("token") or "x"):
        raise ConfigError("the token has characters that no header can hold", "write it anew, without line breaks")
    if bool(known.get("cert_pem")) != bool(known.get("key_pem")):
        raise ConfigError("a client certificate and its key go together", "add what is missing to the kubeconfig")
    return Connection(**known)


# ----------------------------------------------------------------------------------------------------------------------
# Projection: reports
# ----------------------------------------------------------------------------------------------------------------------


class Report(NamedTuple):
    """What Smithers says of its run; None where it says nothing."""

    phase: str | None = None
    task: str | None = None
    status: str | None = None
    attempt: int | None = None
    iteration: int | None = None
    finished: int | None = None
    total: int | None = None
    heartbeat_at: str | None = None
    reason: str | None = None
    malformed: tuple[str, ...] = ()  # keys whose values did not parse


NO_REPORT: Final = Report()
_PHASE_WORDS: Final = {"interview": "discover", "gate": "human-gate"}  # older words
GATE: Final = "human-gate"
FABRIK_PREFIX: Final = "fabrik.dev/"


def report_from(metadata: JsonObject) -> Report:
    """Return what an object's annotations and labels report: the JSON annotation, single annotations, labels."""
    return report_over(object_at(metadata, "annotations"), label_report(metadata))


def label_report(metadata: JsonObject) -> Report:
    """Return what an object's labels report."""
    return _report_of(object_at(metadata, "labels"), _LABELS)


def report_over(annotations: JsonObject, labels: Report) -> Report:
    """Return what annotations report, and where they say nothing, labels."""
    report = _report_of(annotations, _ANNOTATIONS)
    if _JSON_ANNOTATION in annotations:
        said = parse_json_object(annotations[_JSON_ANNOTATION])
        whole = _report_of(said, _JSON) if said is not None else Report(malformed=("status",))
        return merge_reports((whole, report, labels))
    return merge_reports((report, labels))


def merge_reports(reports: Sequence[Report]) -> Report:
    """Return the first value known of each field; finished and total stay together, malformed keys add up."""
    merged = reports[0]
    for other in reports[1:]:
        if other == NO_REPORT:
            continue
        counted = merged if merged.finished is not None else other
        merged = Report(
            merged.phase or other.phase,
            merged.task or other.task,
            merged.status or other.status,
            other.attempt if merged.attempt is None else merged.attempt,
            other.iteration if merged.iteration is None else merged.iteration,
            counted.finished,
            counted.total,
            merged.heartbeat_at or other.heartbeat_at,
            merged.reason or other.reason,
            tuple(dict.fromkeys(merged.malformed + other.malformed)) if other.malformed else merged.malformed,
        )
    return merged


def report_from_status(said: JsonObject, now: float) -> Report:
    """Return what a sidecar's /status or Smithers' status.json reports; it cannot end a run.

    The keys are those of the spec's SmithersPodStatus, or of the JSON annotation.
    """
    names = {"current_task": "currentTask", "attempt": "taskAttempt", "updated": "heartbeatAt"}
    known = {**said, **{name: said[other] for name, other in names.items() if other in said}}
    if "progressTotal" in said:
        known["progress"] = {"finished": said.get("progressFinished"), "total": said["progressTotal"]}
    age = said.get("heartbeatAge")
    if isinstance(age, (int, float)) and 0 <= age < now:
        known["updated"] = format_time(now - age)
    report = _report_of(known, _JSON)
    return report._replace(status=report.status if report.status == BLOCKED else None)


def is_gated(report: Report) -> bool:
    """Say whether a run waits for a person."""
    return report.phase == GATE or report.status == BLOCKED


def _report_of(said: JsonObject, dialect: Mapping[str, _Field]) -> Report:
    """Return what one dialect says; a value that does not parse is noted and says nothing."""
    fields: dict[str, Any] = {}
    malformed: list[str] = []
    for key, (name, parse) in dialect.items():
        if key not in said:
            continue
        known = parse(said[key])
        if known is None:
            malformed.append(key[len(FABRIK_PREFIX) :] if dialect is not _JSON else key)
        elif name == "progress":
            fields["finished"], fields["total"] = known
        else:
            fields[name] = known
    if malformed:
        fields["malformed"] = tuple(malformed)
    return Report(**fields) if fields else NO_REPORT


def _phase_word(value: object) -> str | None:
    word = clip(value)
    return _PHASE_WORDS.get(word, word) if word else None


def _task_label(value: object) -> str | None:
    """Return the task that a label names, which cannot hold the colon."""
    task = clip(value)
    number, dash, rest = (task or "").partition("-")
    return f"{number}:{rest}" if dash and number.isascii() and number.isdigit() else task


def _progress(said: object) -> tuple[int, int] | None:
    """Return finished and total: JSON integers, finished within total; anything else says nothing."""
    finished, total = (said.get("finished"), said.get("total")) if isinstance(said, dict) else (None, None)
    if isinstance(finished, int) and isinstance(total, int):
        finished, total = parse_int(finished), parse_int(total)
        if finished is not None and total is not None and finished <= total:
            return finished, total
    return None


_Field = tuple[str, Callable[[object], Any]]  # of Report, and what reads its value; `progress` makes two
_COMMON: Final[dict[str, _Field]] = {
    "phase": ("phase", _phase_word),
    "attempt": ("attempt", parse_int),
    "iteration": ("iteration", parse_int),
    "updated": ("heartbeat_at", time_text),
    "reason": ("reason", clip),
}
_JSON: Final[dict[str, _Field]] = {
    **_COMMON,
    "current_task": ("task", clip),
    "status": ("status", clip),
    "progress": ("progress", _progress),
}
_JSON_ANNOTATION: Final = FABRIK_PREFIX + "status"
_ANNOTATIONS: Final[dict[str, _Field]] = {
    **{FABRIK_PREFIX + key: field for key, field in _COMMON.items()},
    FABRIK_PREFIX + "task": ("task", clip),
    FABRIK_PREFIX + "progress": ("progress", lambda text: _progress(parse_json_object(text))),
}
_LABELS: Final[dict[str, _Field]] = {
    **_ANNOTATIONS,
    FABRIK_PREFIX + "task": ("task", _task_label),
    FABRIK_PREFIX + "status": ("status", clip),
}


# ----------------------------------------------------------------------------------------------------------------------
# Projection: objects
# ----------------------------------------------------------------------------------------------------------------------

DELETED: Final = "deleted"  # its DELETED event was seen
VANISHED: Final = "vanished"  # a relist lacks it: nobody saw its end


class JobFacts(NamedTuple):
    """What the daemon keeps of a run's Job."""

    namespace: str
    name: str
    uid: str
    id: str  # the label id
    scheduled: bool  # made by a CronJob and without a run id
    report: Report
    created_at: str | None = None
    schedule_id: str | None = None
    spec_id: str | None = None
    template: str | None = None
    project: str | None = None
    suspended: bool = False
    outcome: str | None = None  # finished or failed, from its conditions
    reason: str | None = None
    started_at: str | None = None
    ended_at: str | None = None
    deleting: bool = False
    gone: str | None = None  # DELETED or VANISHED
    gone_at: str | None = None


class PodFacts(NamedTuple):
    """What the daemon keeps of a run's Pod."""

    namespace: str
    name: str
    uid: str
    id: str
    report: Report
    job_uid: str | None = None
    created_at: str | None = None
    spec_id: str | None = None
    template: str | None = None
    project: str | None = None
    phase: str | None = None  # Kubernetes' Pod phase
    reason: str | None = None
    started_at: str | None = None
    ended_at: str | None = None
    deleting: bool = False
    gone: str | None = None
    gone_at: str | None = None
    scheduled: bool = False  # its Job is, and nothing carries a run id
    sidecar_port: int | None = None  # of the container that answers /status, where there is one
    sidecar: Report = NO_REPORT  # what that answered last

    @property
    def told(self) -> Report:
        """What its annotations and labels report, and where they say nothing its sidecar."""
        return self.report if self.sidecar == NO_REPORT else merge_reports([self.report, self.sidecar])


class CronJobFacts(NamedTuple):
    """What the daemon keeps of a fabrik CronJob."""

    namespace: str
    name: str
    uid: str
    id: str  # the schedule's
    schedule: str | None = None
    time_zone: str | None = None
    suspended: bool = False
    active: int = 0
    created_at: str | None = None
    last_run_at: str | None = None
    last_success_at: str | None = None
    gone: str | None = None
    gone_at: str | None = None


class VolumeFacts(NamedTuple):
    """What the daemon keeps of a run's PersistentVolumeClaim."""

    namespace: str
    name: str
    uid: str
    id: str
    phase: str | None = None
    capacity_bytes: int | None = None
    storage_class: str | None = None
    created_at: str | None = None
    gone: str | None = None
    gone_at: str | None = None


class EventFacts(NamedTuple):
    """What the daemon keeps of a Warning, or of an Event that tells how a Job ended."""

    namespace: str
    name: str
    uid: str
    id: str  # of the run it concerns; empty where it concerns none
    warning: bool
    object_kind: str | None = None
    object_name: str | None = None
    object_uid: str | None = None
    reason: str | None = None
    message: str | None = None
    count: int = 1  # type: ignore[assignment]  # hides tuple.count, which nobody wants
    first_at: str | None = None
    last_at: str | None = None
    gone: str | None = None
    gone_at: str | None = None


Facts = Union[JobFacts, PodFacts, CronJobFacts, VolumeFacts, EventFacts]
FACTS: Final[dict[str, type[Facts]]] = {
    JOBS.name: JobFacts,
    CRONJOBS.name: CronJobFacts,
    PODS.name: PodFacts,
    VOLUMES.name: VolumeFacts,
    EVENTS.name: EventFacts,
}

SIDECAR: Final = "smithers-sidecar"  # the container that answers /status
_SCHEDULE_NAME: Final = "fabrik-schedule-"
_ENDINGS: Final = {"Completed": FINISHED, "BackoffLimitExceeded": FAILED}  # the Job controller's Events
_CONDITIONS: Final = {
    "Complete": FINISHED,
    "SuccessCriteriaMet": FINISHED,  # comes seconds before Complete
    "Failed": FAILED,
    "FailureTarget": FAILED,  # comes before Failed, while its Pods are ended
}
_ROUTINE: Final = frozenset(("ContainerCreating", "PodInitializing", "Completed"))  # reasons that tell of no trouble


def facts_from(resource_name: str, item: JsonObject) -> Facts | None:
    """Return what is kept of an object of a watched resource, None for one that is not fabrik's."""
    metadata = object_at(item, "metadata")
    name, namespace = text_at(metadata, "name"), text_at(metadata, "namespace") or ""
    return _PROJECTIONS[resource_name](item, metadata, namespace, name) if name else None


def shared(facts: Facts) -> Facts:
    """Return the same facts, made of texts and reports that others have too, where those are frequent.

    What is parsed is new each time; of ten thousand runs, 8 MB say the same words. It takes 2 us.
    """
    return type(facts)(*map(_frequent, facts))


@functools.lru_cache(maxsize=1024)  # what is seldom passes through, what is frequent stays
def _frequent(value: Any) -> Any:
    return value


def ending_of(event: EventFacts) -> str | None:
    """Return the status that a Job controller's Event tells of its Job."""
    return _ENDINGS.get(event.reason or "") if event.object_kind == "Job" else None


def _job_facts(item: JsonObject, metadata: JsonObject, namespace: str, name: str) -> JobFacts | None:
    labels = object_at(metadata, "labels")
    cronjob = _owner(metadata, "CronJob")[0]
    label_id = clip(labels.get(FABRIK_PREFIX + "run-id")) or (ulid_in(name) if name.startswith("fabrik-") else None)
    schedule_id = clip(labels.get(FABRIK_PREFIX + "schedule-id")) or (_schedule_id(cronjob) if cronjob else None)
    scheduled = label_id is None and cronjob is not None and (_is_managed(labels) or schedule_id != cronjob)
    if label_id is None and not scheduled:
        return None
    outcome, reason, ended_at = _outcome(item)
    return JobFacts(
        namespace,
        name,
        uid=text_at(metadata, "uid") or "",
        id=label_id or name,
        scheduled=scheduled,
        report=report_from(metadata),
        created_at=time_text(metadata.get("creationTimestamp")),
        schedule_id=schedule_id,
        **_descriptions(labels),
        suspended=object_at(item, "spec").get("suspend") is True,
        outcome=outcome,
        reason=reason,
        started_at=time_text(object_at(item, "status").get("startTime"))
        or time_text(object_at(metadata, "annotations").get(FABRIK_PREFIX + "started")),
        ended_at=ended_at,
        deleting="deletionTimestamp" in metadata,
    )


def _outcome(item: JsonObject) -> tuple[str | None, str | None, str | None]:
    """Return outcome, reason and time of a Job's end, from the conditions that are True; unknown ones say nothing."""
    told = {
        condition.get("type"): condition
        for condition in list_at(item, "status", "conditions")
        if condition.get("status") == "True"
    }
    for kind, outcome in _CONDITIONS.items():
        if kind in told:
            ended_at = time_text(object_at(item, "status").get("completionTime"))
            return outcome, text_at(told[kind], "reason"), ended_at or time_text(told[kind].get("lastTransitionTime"))
    return None, None, None


def _pod_facts(item: JsonObject, metadata: JsonObject, namespace: str, name: str) -> PodFacts | None:
    labels = object_at(metadata, "labels")
    job_name, job_uid = _owner(metadata, "Job")
    job_name = job_name or clip(labels.get("batch.kubernetes.io/job-name")) or clip(labels.get("job-name"))
    label_id = clip(labels.get(FABRIK_PREFIX + "run-id")) or (ulid_in(job_name or name))
    scheduled = job_name is not None and (_is_managed(labels) or job_name.startswith(_SCHEDULE_NAME))
    if label_id is None and not scheduled:
        return None
    status = object_at(item, "status")
    return PodFacts(
        namespace,
        name,
        uid=text_at(metadata, "uid") or "",
        id=label_id or job_name or "",
        report=report_from(metadata),
        job_uid=job_uid,
        created_at=time_text(metadata.get("creationTimestamp")),
        **_descriptions(labels),
        phase=text_at(status, "phase"),
        reason=_pod_reason(status),
        started_at=time_text(status.get("startTime")),
        ended_at=latest(*(time_text(state.get("finishedAt")) for state in _states(status, "terminated"))),
        deleting="deletionTimestamp" in metadata,
        scheduled=label_id is None,
        sidecar_port=_sidecar_port(object_at(item, "spec")),
        sidecar=NO_REPORT,
    )


def _sidecar_port(spec: JsonObject) -> int | None:
    for container in list_at(spec, "containers") + list_at(spec, "initContainers"):
        if container.get("name") == SIDECAR:
            return next((parse_int(port.get("containerPort")) for port in list_at(container, "ports")), None)
    return None


def _pod_reason(status: JsonObject) -> str | None:
    """Return why a Pod is where it is: its own reason, a container's trouble, or why it has no node."""
    own = text_at(status, "reason")
    if own:
        return own  # Evicted, NodeLost, Shutdown
    for state in _states(status, "terminated"):
        if state.get("exitCode") != 0:
            return text_at(state, "reason") or "Error"
    for state in _states(status, "waiting"):
        reason = text_at(state, "reason")
        if reason and reason not in _ROUTINE:
            return reason
    for condition in list_at(status, "conditions"):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return text_at(condition, "reason")
    return None


def _states(status: JsonObject, kind: str) -> list[JsonObject]:
    """Return the containers' current states of one kind, the main containers' first."""
    containers = list_at(status, "containerStatuses") + list_at(status, "initContainerStatuses")
    return [object_at(container, "state", kind) for container in containers if object_at(container, "state", kind)]


def _cronjob_facts(item: JsonObject, metadata: JsonObject, namespace: str, name: str) -> CronJobFacts | None:
    labels, spec, status = object_at(metadata, "labels"), object_at(item, "spec"), object_at(item, "status")
    schedule_id = clip(labels.get(FABRIK_PREFIX + "schedule-id")) or _schedule_id(name)
    if schedule_id == name and not _is_managed(labels):
        return None
    return CronJobFacts(
        namespace,
        name,
        uid=text_at(metadata, "uid") or "",
        id=schedule_id,
        schedule=text_at(spec, "schedule"),
        time_zone=text_at(spec, "timeZone"),
        suspended=spec.get("suspend") is True,
        active=len(list_at(status, "active")),
        created_at=time_text(metadata.get("creationTimestamp")),
        last_run_at=time_text(status.get("lastScheduleTime")),
        last_success_at=time_text(status.get("lastSuccessfulTime")),
    )


def _volume_facts(item: JsonObject, metadata: JsonObject, namespace: str, name: str) -> VolumeFacts | None:
    labels = object_at(metadata, "labels")
    label_id = clip(labels.get(FABRIK_PREFIX + "run-id")) or ulid_in(name)
    if label_id is None and not _is_managed(labels):
        return None
    status = object_at(item, "status")
    return VolumeFacts(
        namespace,
        name,
        uid=text_at(metadata, "uid") or "",
        id=label_id or "",
        phase=text_at(status, "phase"),
        capacity_bytes=parse_quantity(object_at(status, "capacity").get("storage")),
        storage_class=text_at(item, "spec", "storageClassName"),
        created_at=time_text(metadata.get("creationTimestamp")),
    )


def _event_facts(item: JsonObject, metadata: JsonObject, namespace: str, name: str) -> EventFacts | None:
    about, series = object_at(item, "involvedObject"), object_at(item, "series")
    kind, reason = text_at(about, "kind"), text_at(item, "reason")
    warning = item.get("type") == "Warning"
    if not warning and not (kind == "Job" and reason in _ENDINGS):
        return None
    first_at = time_text(item.get("firstTimestamp")) or time_text(item.get("eventTime"))
    first_at = first_at or time_text(metadata.get("creationTimestamp"))
    object_name = text_at(about, "name") or ""
    return EventFacts(
        namespace,
        name,
        uid=text_at(metadata, "uid") or "",
        id=ulid_in(object_name) or _scheduled_job(kind, object_name),
        warning=warning,
        object_kind=kind,
        object_name=object_name,
        object_uid=text_at(about, "uid"),
        reason=reason,
        message=text_at(item, "message"),
        count=parse_int(series.get("count")) or parse_int(item.get("count")) or 1,
        first_at=first_at,
        last_at=time_text(series.get("lastObservedTime")) or time_text(item.get("lastTimestamp")) or first_at,
    )


_PROJECTIONS: Final[dict[str, Callable[[JsonObject, JsonObject, str, str], Facts | None]]] = {
    JOBS.name: _job_facts,
    CRONJOBS.name: _cronjob_facts,
    PODS.name: _pod_facts,
    VOLUMES.name: _volume_facts,
    EVENTS.name: _event_facts,
}


def _owner(metadata: JsonObject, kind: str) -> tuple[str | None, str | None]:
    for owner in list_at(metadata, "ownerReferences"):
        if owner.get("kind") == kind:
            return text_at(owner, "name"), text_at(owner, "uid")
    return None, None


def _is_managed(labels: JsonObject) -> bool:
    return "fabrik" in (labels.get("app.kubernetes.io/managed-by"), labels.get(FABRIK_PREFIX + "managed-by"))


def _schedule_id(cronjob: str) -> str:
    return cronjob[len(_SCHEDULE_NAME) :] if cronjob.startswith(_SCHEDULE_NAME) else cronjob


def _scheduled_job(kind: str | None, name: str) -> str:
    """Return the Job's name from an Event about a schedule's Job or, its name plus a suffix, its Pod."""
    if not name.startswith(_SCHEDULE_NAME):
        return ""
    return name.rpartition("-")[0] if kind == "Pod" else name if kind == "Job" else ""


def _descriptions(labels: JsonObject) -> dict[str, str | None]:
    spec_id = clip(labels.get(FABRIK_PREFIX + "spec-id")) or clip(labels.get(FABRIK_PREFIX + "spec"))
    template, project = clip(labels.get(FABRIK_PREFIX + "template")), clip(labels.get(FABRIK_PREFIX + "project"))
    return {"spec_id": spec_id, "template": template, "project": project}


# ----------------------------------------------------------------------------------------------------------------------
# Projection: rows
# ----------------------------------------------------------------------------------------------------------------------

Zone = Callable[[str], Any]  # IANA name -> tzinfo; raises for one that is not known here


class Place(NamedTuple):
    """Where a run is: its label id in one namespace of one cluster."""

    cluster: str
    namespace: str
    id: str


def current_job(jobs: Sequence[JobFacts]) -> JobFacts | None:
    """Return the run's Job: the newest of those with its id."""
    if len(jobs) == 1:
        return jobs[0]
    return max(jobs, key=lambda job: (job.created_at or "", job.gone is None, job.uid), default=None)


def current_pod(pods: Iterable[PodFacts], job: JobFacts | None) -> PodFacts | None:
    """Return the run's current Pod: the newest of its Job's that is not being deleted, else the newest.

    Once the Job has ended the newest tells how, whichever is cleaned up first.
    """
    own = [pod for pod in pods if job is None or pod.job_uid in (None, job.uid)]
    if len(own) == 1:
        return own[0]
    if job is not None and job.outcome:
        return max(own, key=lambda pod: (pod.created_at or "", pod.uid), default=None)
    return max(own, key=lambda pod: (pod.gone is None, not pod.deleting, pod.created_at or "", pod.uid), default=None)


def status_of(  # noqa: PLR0911 - one return a row
    job: JobFacts | None, pod: PodFacts | None, ending: str | None, was: str | None
) -> tuple[str | None, str | None]:
    """Return the run's status and its reason, by the first row of decisions.md's table that matches.

    `ending` is what a Job controller's Event told of a Job that vanished, `was` the status before.
    """
    said = pod.told if pod else NO_REPORT
    why = said.reason or (job.report.reason if job else None)  # in Smithers' words
    trouble = pod.reason if pod else None
    ended = _job_status(job, pod, ending)
    if ended is not None:
        status, reason = ended
        return status, reason if status is None or status == FAILED else (why if status == CANCELLED else None)
    if job is None and pod is not None and pod.phase in _POD_ENDINGS:  # 5
        return _POD_ENDINGS[pod.phase], trouble if pod.phase == "Failed" else None
    if job is not None and job.suspended:  # 6
        return PENDING, "JobSuspended"
    if pod is None:
        return PENDING, None
    if is_gated(said) and not pod.gone:  # 7
        return BLOCKED, why or trouble
    if pod.phase == "Running" and not pod.gone:  # 8
        return RUNNING, trouble or why
    if pod.phase == "Unknown":  # 9
        return (was if was not in TERMINAL else None) or PENDING, "NodeLost"
    return PENDING, trouble  # 10


_POD_ENDINGS: Final = {"Succeeded": FINISHED, "Failed": FAILED}


def _job_status(  # noqa: PLR0911 - one return a row
    job: JobFacts | None, pod: PodFacts | None, ending: str | None
) -> tuple[str | None, str | None] | None:
    """Return status and reason by rows 1 to 4, None where none of them matches."""
    said = pod.report.status if pod else None
    if job is None:
        return (CANCELLED, None) if said == CANCELLED else None
    if job.outcome == FINISHED:  # 1
        return FINISHED, None
    if job.outcome == FAILED:  # 2
        first = job.reason if job.reason == "DeadlineExceeded" else None
        why = (pod.reason or pod.told.reason) if pod else None
        return FAILED, first or why or job.report.reason or job.reason
    if job.gone == DELETED or job.deleting or CANCELLED in (said, job.report.status):  # 3
        return CANCELLED, None
    if job.gone == VANISHED:  # 4
        decided = _POD_ENDINGS.get((pod.phase if pod else None) or "") or ending
        if decided == FAILED:
            return FAILED, (pod.reason if pod else None) or "BackoffLimitExceeded"
        return decided, None if decided else "VanishedUnseen"
    return None


class Verdict(NamedTuple):
    """Where a run stands, why, and since when it is over: what needs more than its objects (status_of)."""

    status: str | None
    reason: str | None
    ended_at: str | None


def run_row(place: Place, run_id: str, job: JobFacts | None, pod: PodFacts | None, verdict: Verdict, at: str) -> Run:
    """Return a run's row, as it is known at a time."""
    one: JobFacts | PodFacts = job or pod or _NOBODY
    two = pod or one
    said = merge_reports((pod.told, job.report)) if pod and job else (pod.told if pod else one.report)
    started_at, created_at, deleted_at = one.started_at or two.started_at, one.created_at or two.created_at, one.gone_at
    finished_at = (verdict.ended_at or deleted_at) if verdict.status in TERMINAL else None
    return Run(
        run_id,
        place.cluster,
        place.namespace,
        verdict.status,
        current_task=said.task,
        task_status=_TASK_STATUSES.get(verdict.status or "") if said.task else None,
        progress_finished=said.finished,
        progress_total=said.total,
        spec_id=one.spec_id or two.spec_id,
        template=one.template or two.template,
        created_at=created_at,
        updated_at=latest(created_at, started_at, said.heartbeat_at, finished_at, deleted_at),
        last_sync_at=at,
        id=place.id,
        project=one.project or two.project,
        phase=said.phase,
        task_attempt=said.attempt,
        iteration=said.iteration,
        heartbeat_at=said.heartbeat_at,
        reason=verdict.reason,
        job_name=job.name if job else None,
        job_uid=job.uid if job else None,
        pod_name=pod.name if pod else None,
        schedule_id=job.schedule_id if job else None,
        started_at=started_at,
        finished_at=finished_at,
        deleted_at=deleted_at,
    )


_TASK_STATUSES: Final = {RUNNING: "in-progress", BLOCKED: "in-progress", FINISHED: FINISHED, FAILED: FAILED}


def schedule_row(cluster: str, facts: CronJobFacts, now: float, zone: Zone) -> Schedule:
    """Return a CronJob's row: its next run after `now`, and how many it missed."""
    next_run_at, missed = None, 0
    if facts.schedule and not facts.suspended and not facts.gone:
        next_run_at, missed = _cron_times(facts, now, zone)
    return Schedule(
        cluster,
        facts.namespace,
        facts.name,
        schedule_id=facts.id,
        schedule=facts.schedule,
        time_zone=facts.time_zone,
        suspended=int(facts.suspended),
        active=facts.active,
        created_at=facts.created_at,
        last_run_at=facts.last_run_at,
        last_success_at=facts.last_success_at,
        next_run_at=next_run_at,
        missed=missed,
    )


def volume_row(cluster: str, facts: VolumeFacts, run_id: str | None) -> Volume:
    """Return a PersistentVolumeClaim's row."""
    return Volume(
        cluster,
        facts.namespace,
        facts.name,
        run_id=run_id,
        phase=facts.phase,
        capacity_bytes=facts.capacity_bytes,
        storage_class=facts.storage_class,
        created_at=facts.created_at,
        deleted_at=facts.gone_at,
    )


def warning_row(cluster: str, facts: EventFacts, run_id: str | None) -> ClusterEvent:
    """Return a Warning Event's row."""
    return ClusterEvent(
        cluster,
        facts.namespace,
        facts.name,
        uid=facts.uid,
        run_id=run_id,
        object_kind=facts.object_kind,
        object_name=facts.object_name,
        reason=facts.reason,
        message=facts.message,
        count=facts.count,
        first_at=facts.first_at,
        last_at=facts.last_at,
    )


_NOBODY: Final = PodFacts("", "", "", "", NO_REPORT)
_CRON_MACROS: Final = {  # kubernetes.io, CronJob, "Schedule syntax"
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_MISSED_GRACE_S: Final = 60.0  # the CronJob controller looks every 10 s; a watch may lag


def _cron_times(facts: CronJobFacts, now: float, zone: Zone) -> tuple[str | None, int]:
    """Return the next run after `now` and how many are overdue; nothing for a schedule that cannot be read here."""
    expression = _CRON_MACROS.get(facts.schedule or "", facts.schedule or "")
    try:
        tz = zone(facts.time_zone or "UTC")  # the controller manager's own zone, nearly always UTC
        following = next(cronsim.CronSim(expression, datetime.fromtimestamp(now, tz)))
        since = epoch_of(facts.last_run_at) or epoch_of(facts.created_at) or now
        due = cronsim.CronSim(expression, datetime.fromtimestamp(since, tz))
        missed = 0
        while missed < MISSED_MAX and next(due).timestamp() <= now - _MISSED_GRACE_S:
            missed += 1
    except (cronsim.CronSimError, LookupError, ValueError, StopIteration, OSError):
        return None, 0
    return format_time(following.timestamp()), missed


# ----------------------------------------------------------------------------------------------------------------------
# Filters
# ----------------------------------------------------------------------------------------------------------------------

EVENT_TYPES: Final[dict[type[Row], tuple[str, ...]]] = {
    Run: ("run:added", "run:updated", "run:removed"),
    Schedule: ("schedule:added", "schedule:updated", "schedule:removed"),
    Volume: ("volume:added", "volume:updated", "volume:removed"),
    ClusterEvent: ("warning",),
    ClusterRow: ("cluster:connected", "cluster:disconnected", "cluster:synced", "cluster:stale"),
}
_RUN_COLUMNS: Final = ("status", "phase", "spec_id", "project", "template", "run_id", "namespace")
LIST_FILTERS: Final[dict[type[Row], tuple[str, ...]]] = {
    Run: (*_RUN_COLUMNS, "schedule_id", "reason"),
    Schedule: ("namespace", "name", "schedule_id", "state"),
    Volume: ("namespace", "name", "run_id", "phase", "storage_class"),
    ClusterEvent: ("namespace", "run_id", "reason", "object_kind", "object_name"),
}
STREAM_FILTERS: Final = (*_RUN_COLUMNS, "type")


class Filter(NamedTuple):
    """What a list or a subscriber asks for; what is empty asks for everything."""

    clusters: frozenset[str] = frozenset()
    columns: tuple[tuple[str, frozenset[str]], ...] = ()  # each must have one of these values
    types: frozenset[str] = frozenset()  # of events

    def matches(self, row: Row | None) -> bool:
        """Say whether a row is asked for; one that lacks a column which must have a value is not.

        `unknown` stands for a run's status that nobody knows; a run answers to its label id too.
        """
        if row is None or (self.clusters and row.cluster not in self.clusters):
            return False
        for column, values in self.columns:
            value = getattr(row, column, None)
            if value is None and column == "status" and isinstance(row, Run):
                value = UNKNOWN
            if value not in values and not (column == "run_id" and getattr(row, "id", None) in values):
                return False
        return True

    def select(self, rows: Iterable[TableRow], kind: type[TableRow]) -> list[TableRow]:
        """Return those rows of one table that match; of ten thousand in a millisecond."""
        kept = list(rows)
        for column, values in (("cluster", self.clusters), *self.columns):
            if not values and column == "cluster":
                continue
            if kind is Schedule and column == "state":
                kept = list(filter(self.matches, kept))
                continue
            if column not in kind._fields:
                return []
            at, known = (
                kind._fields.index(column),
                {*values, None} if UNKNOWN in values and column == "status" else values,
            )
            label = Run._fields.index("id")
            if kind is Run and column == "run_id":
                kept = [row for row in kept if row[at] in known or row[label] in known]
            else:
                kept = [row for row in kept if row[at] in known]
        return kept

    def asks_for(self, kind: type[Row]) -> bool:
        """Say whether events of a kind of row are asked for."""
        return not self.types or not self.types.isdisjoint(EVENT_TYPES[kind])


def parse_filter(request: JsonObject, keys: Sequence[str]) -> Filter:
    """Return the filter of a request: `clusters` (`*` means all) and `filter: {"status": [...]}`. Raises UsageError."""
    clusters = _words(request.get("clusters"), "clusters")
    wanted = request.get("filter")
    if wanted is not None and not isinstance(wanted, dict):
        raise UsageError("filter must be an object", 'write "filter": {"status": ["running"]}')
    columns: dict[str, frozenset[str]] = {}
    for key, value in (wanted or {}).items():
        if key not in keys:
            raise UsageError(f"no filter {clip(key)!r} here", nearest(key[:64], keys))
        columns[key] = frozenset(_words(value, f"filter.{key}"))
    _check_words("status", columns.get("status", ()), (*STATUSES, UNKNOWN))
    _check_words("state", columns.get("state", ()), SCHEDULE_STATES)
    types = _event_types(columns.pop("type", frozenset()))
    asked = tuple((column, values) for column, values in sorted(columns.items()) if values)
    return Filter(frozenset() if "*" in clusters else frozenset(clusters), asked, types)


def _event_types(words: frozenset[str]) -> frozenset[str]:
    """Return the types that words mean: `run:*` is all of a kind, `*` is all."""
    known = [name for names in EVENT_TYPES.values() for name in names]
    kinds = sorted({f"{name.partition(':')[0]}:*" for name in known if ":" in name})
    _check_words("event type", words, ("*", *kinds, *known))
    return frozenset(name for name in known for word in words if word in ("*", name, f"{name.partition(':')[0]}:*"))


def _check_words(what: str, words: Iterable[str], known: Sequence[str]) -> None:
    for word in words:
        if word not in known:
            raise UsageError(f"no {what} {clip(word)!r}", nearest(word[:64], known))


def _words(value: object, where: str) -> list[str]:
    words = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UsageError(f"{where} must be a list of words", f'write "{where.rpartition(".")[2]}": ["..."]')
    return words


# ----------------------------------------------------------------------------------------------------------------------
# Filters: lists
# ----------------------------------------------------------------------------------------------------------------------


class Selection(NamedTuple):
    """Which of the rows that a filter lets through a list shows, and in which order."""

    sort_by: str = ""  # a column, rising; empty: the list's own order
    reverse: bool = False
    limit: int = 0  # 0: all of them
    since: str = ""  # RFC 3339 as rows hold it: the list's own time is not before it


class ListOrder(NamedTuple):
    """A list's own time, and its own order."""

    time: str
    sort_by: str
    falling: bool


LIST_ORDERS: Final[dict[type[Row], ListOrder]] = {
    Run: ListOrder("created_at", "created_at", falling=True),
    Schedule: ListOrder("last_run_at", "cluster", falling=False),
    Volume: ListOrder("created_at", "cluster", falling=False),
    ClusterEvent: ListOrder("last_at", "last_at", falling=True),
    ClusterRow: ListOrder("last_event_at", "priority", falling=False),
}


def parse_selection(request: JsonObject, kind: type[Row]) -> Selection:
    """Return what a request for a list says with `limit`, `since`, `sortBy` and `reverse`. Raises UsageError."""
    limit, since, sort_by = request.get("limit", 0), request.get("since", ""), request.get("sortBy", "")
    if parse_int(limit) is None or isinstance(limit, str):
        raise UsageError("limit must be a whole number, 0 or more")
    if since and time_text(since) is None:
        raise UsageError("since must be a time", 'write "since": "2026-02-16T20:00:00Z"')
    if sort_by and sort_by not in kind._fields:
        raise UsageError(f"no column {clip(sort_by)!r}", nearest(str(sort_by)[:64], kind._fields))
    return Selection(sort_by, request.get("reverse") is True, limit, time_text(since) or "")


def key_columns(kind: type[Row]) -> tuple[str, ...]:
    """Return the columns that name a row; they stand first in it."""
    return kind._fields[: 1 if kind in (Run, ClusterRow) else 3]


def select_rows(rows: Iterable[Any], kind: type[Row], selection: Selection) -> list[Any]:
    """Return the rows of a list; those without a value in the column that it is sorted by come last."""
    order = LIST_ORDERS[kind]
    at = kind._fields.index(order.time)
    kept = [row for row in rows if str(row[at] or "") >= selection.since] if selection.since else list(rows)
    column = kind._fields.index(selection.sort_by or order.sort_by)
    falling = (order.falling and not selection.sort_by) != selection.reverse
    key = itemgetter(column, *range(len(key_columns(kind))))  # in C: ten thousand rows take some milliseconds
    valued = [row for row in kept if row[column] is not None]
    rest = [row for row in kept if row[column] is None] if len(valued) < len(kept) else []
    if 0 < selection.limit < len(valued):  # leave out at once what cannot be among the first: values compare quickly
        last = sorted(map(itemgetter(column), valued), reverse=falling)[selection.limit - 1]
        valued = [row for row in valued if (row[column] >= last if falling else row[column] <= last)]
    first = sorted(valued, key=key, reverse=falling)
    first += sorted(rest, key=itemgetter(*range(len(key_columns(kind)))), reverse=falling)
    return first[: selection.limit] if selection.limit else first


# ----------------------------------------------------------------------------------------------------------------------
# Store: rows
# ----------------------------------------------------------------------------------------------------------------------


class ObjectKey(NamedTuple):
    """What names one object of one cluster."""

    cluster: str
    resource: str
    namespace: str
    name: str


class Progress(NamedTuple):
    """How far a scope has been followed: up to a resource version, and when it was known whole."""

    scope: Scope
    resource_version: str
    synced_at: str | None


class Seen(NamedTuple):
    """What a watch told of an object, by namespace and name; `facts` is None where it is not fabrik's, or no more."""

    name: tuple[str, str]
    facts: Facts | None
    deleted: bool = False  # the facts are the last there were


class Commit(NamedTuple):
    """What one observation changed; the cache writes all of it in one transaction."""

    changes: tuple[Change, ...] = ()
    objects: tuple[tuple[ObjectKey, Facts | None], ...] = ()  # None: forget it
    progress: Progress | None = None
    reserved_seq: int | None = None  # sequence numbers up to this one may be in use
    expired: tuple[TableRow, ...] = ()  # whose retention is over; nobody is told
    malformed: tuple[tuple[str, tuple[str, ...]], ...] = ()  # run_id and the keys that did not parse, once per run
    kept: KeptLines | None = None


class RunEvent(NamedTuple):
    """A row of `run_events`, but for its time of arrival."""

    id: int
    run_id: str
    event_type: str
    payload: JsonObject
    cluster_timestamp: str | None


class KeptLines(NamedTuple):
    """The last lines of a run that failed, as events; they take the place of those kept before."""

    run_id: str
    events: tuple[RunEvent, ...]
    at: str


RowKey = tuple[str, ...]


def row_key(row: TableRow) -> RowKey:
    """Return what names a row within its table."""
    return (row.run_id,) if isinstance(row, Run) else row[:3]


def run_events_of(change: Change) -> list[RunEvent]:
    """Return what a change tells of its run's history; the first carries the change's own number."""
    row, before = change.row, change.previous
    if not isinstance(row, Run) or change.type == "run:removed":
        return []
    if isinstance(before, Run) and (row.status, row.current_task) == (before.status, before.current_task):
        return []
    told: list[tuple[str, JsonObject]] = []
    was = before.status if isinstance(before, Run) else None
    if row.status != was or before is None:
        told.append(("status_changed", {"from": was, "to": row.status, "reason": row.reason}))
        if row.status == BLOCKED:
            told.append(("blocked", {"phase": row.phase, "task": row.current_task, "reason": row.reason}))
    task = before.current_task if isinstance(before, Run) and before.job_uid == row.job_uid else None
    if task and was not in TERMINAL and (task != row.current_task or row.status == FINISHED):
        told.append(("task_completed", {"task": task, "finished": row.progress_finished, "total": row.progress_total}))
    return [
        RunEvent(change.seq + offset, row.run_id, kind, payload, row.updated_at)
        for offset, (kind, payload) in enumerate(told)
    ]


class Draft:
    """A Commit in the making."""

    def __init__(self, now: float) -> None:
        self.now = now
        self.at = format_time(now, milliseconds=True)
        self.changes: list[Change] = []
        self.objects: dict[ObjectKey, Facts | None] = {}
        self.places: dict[Place, None] = {}  # whose rows to derive again, in order
        self.expired: list[TableRow] = []
        self.malformed: list[tuple[str, tuple[str, ...]]] = []


_SYNCED: Final = Run._fields.index("last_sync_at")


def _says(run: TableRow) -> tuple[Any, ...]:
    return run[:_SYNCED] + run[_SYNCED + 1 :]  # all but when it was looked at


class Tables:
    """The rows known now. Setting one that says something new makes a numbered change."""

    _KINDS: Final = {Run: "run", Schedule: "schedule", Volume: "volume", ClusterEvent: "warning"}

    def __init__(self) -> None:
        self._rows: dict[type[TableRow], dict[RowKey, TableRow]] = {kind: {} for kind in self._KINDS}
        self.seq = 0  # the last number given to a change
        self.editions: dict[type[Row], int] = dict.fromkeys(self._KINDS, 0)  # raised whenever a row of a kind changes
        self._reserved = 0

    def load(self, rows: Iterable[TableRow], reserved_seq: int) -> None:
        """Take over what the cache holds; nothing of it is a change."""
        self.seq, self._reserved = reserved_seq, reserved_seq + SEQ_BLOCK
        for row in rows:
            self._rows[type(row)][row_key(row)] = row

    def rows(self, kind: type[TableRow]) -> list[TableRow]:
        """Return the rows of one table, as they are now."""
        return list(self._rows[kind].values())

    def run(self, run_id: str) -> Run | None:
        """Return a run's row."""
        row = self._rows[Run].get((run_id,))
        return row if isinstance(row, Run) else None

    def set(self, draft: Draft, row: TableRow) -> TableRow:
        """Keep a row and return it as kept; where it says something new, that is a change."""
        table, key = self._rows[type(row)], row_key(row)
        before = table.get(key)
        if row == before or (before and isinstance(row, Run) and _says(row) == _says(before)):
            return before
        table[key] = row
        gone = isinstance(row, Volume) and row.deleted_at
        self._tell(draft, self._type(row, "removed" if gone else "updated" if before else "added"), row, before)
        return row

    def drop(self, draft: Draft, kind: type[TableRow], key: RowKey) -> None:
        """Forget a row, which is a change where there was one."""
        row = self._rows[kind].pop(key, None)
        if row is not None:
            self._tell(draft, self._type(row, "removed"), row, row)

    def expire(self, draft: Draft, kind: type[TableRow], key: RowKey) -> None:
        """Forget a row that was told to be gone already, or never can be."""
        row = self._rows[kind].pop(key, None)
        if row is not None:
            self.editions[kind] += 1
            draft.expired.append(row)

    def announce(self, draft: Draft, change_type: str, row: ClusterRow) -> None:
        """Make a change of what stands in no table here."""
        self._tell(draft, change_type, row, None)

    def take_numbers(self, count: int) -> int:
        """Give out some numbers for what is no change, and return the first."""
        self.seq += count
        return self.seq - count + 1

    def reserve(self) -> int:
        """Reserve a new block of numbers and return its end."""
        self._reserved = self.seq + SEQ_BLOCK
        return self._reserved

    def reservation(self) -> int | None:
        """Return a new end of the reserved numbers, well before the present block is used up; None while it is not."""
        if self.seq <= self._reserved - SEQ_BLOCK // 2:
            return None
        return self.reserve()

    def _type(self, row: TableRow, verb: str) -> str:
        kind = self._KINDS[type(row)]
        return kind if kind == "warning" else f"{kind}:{verb}"

    def _tell(self, draft: Draft, change_type: str, row: Row, before: Row | None) -> None:
        change = Change(self.seq + 1, change_type, row, before, draft.at, format_record(row))
        if type(row) in self.editions:
            self.editions[type(row)] += 1
        self.seq += max(1, len(run_events_of(change)))
        draft.changes.append(change)


# ----------------------------------------------------------------------------------------------------------------------
# Store: runs
# ----------------------------------------------------------------------------------------------------------------------


class _Entry:
    """One run's objects, and the key it got. Nearly every run has one of each: two dicts would take 5 MB of 10,000."""

    __slots__ = ("jobs", "malformed_told", "place", "pods", "run_id")

    def __init__(self, place: Place) -> None:
        self.place = place
        self.jobs: tuple[JobFacts, ...] = ()
        self.pods: tuple[PodFacts, ...] = ()
        self.run_id: str | None = None
        self.malformed_told = False


class RunBook:
    """Which objects make up which run; derives a run's row from them."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._entries: dict[Place, _Entry] = {}
        self._owners: dict[str, Place] = {}  # run_id -> who holds it
        self._endings: dict[tuple[str, str], str] = {}  # cluster and Job uid -> what an Event told
        self._places: dict[str, dict[str, Place]] = {}  # cluster -> uid of a Job or Pod -> its run
        self._listed: dict[Scope, bool] = {}  # Jobs: listed, or forbidden (False)
        self._unsettled: set[str] | None = set()  # keys given before every cluster was listed; None once all were
        self.priorities: Mapping[str, int] = {}  # of clusters

    def load(self, synced: Iterable[Scope]) -> None:
        """Take over the keys of the rows that the tables hold, and whose Jobs have been listed."""
        self._listed.update((scope, True) for scope in synced if scope.resource == JOBS.name)
        for row in self._tables.rows(Run):
            if isinstance(row, Run):
                place = Place(row.cluster, row.namespace, row.id or row.run_id)
                self._owners[row.run_id] = place
                self._entry(place).run_id = row.run_id

    def attach(self, cluster: str, facts: Facts) -> None:
        """Take in what an object tells of its run."""
        if isinstance(facts, (JobFacts, PodFacts)):
            entry = self._entry(Place(cluster, facts.namespace, facts.id))
            if isinstance(facts, JobFacts):
                entry.jobs = (*(job for job in entry.jobs if job.name != facts.name), facts)
            else:
                entry.pods = (*(pod for pod in entry.pods if pod.name != facts.name), facts)
            self._places.setdefault(cluster, {})[facts.uid] = entry.place
        elif isinstance(facts, EventFacts) and facts.object_uid:
            ending = ending_of(facts)
            if ending:
                self._endings[cluster, facts.object_uid] = ending

    def detach(self, cluster: str, facts: Facts) -> None:
        """Forget what an object told of its run."""
        entry = self._entries.get(Place(cluster, facts.namespace, facts.id))
        self._places.get(cluster, {}).pop(facts.uid, None)
        if entry is not None and isinstance(facts, JobFacts):
            entry.jobs = tuple(job for job in entry.jobs if job.name != facts.name)
        elif entry is not None and isinstance(facts, PodFacts):
            entry.pods = tuple(pod for pod in entry.pods if pod.name != facts.name)

    def run_id_for(self, cluster: str, facts: VolumeFacts | EventFacts) -> str | None:
        """Return the key of the run that a volume or warning belongs to, also before the run itself is known."""
        place = self.place_of(cluster, facts)
        if place is None:
            return None
        entry = self._entries.get(place)
        if entry and entry.run_id:
            return entry.run_id
        scheduled = isinstance(facts, EventFacts) and not ulid_in(facts.object_name or "")
        return self._key_for(place, scheduled)

    def place_of(self, cluster: str, facts: Facts) -> Place | None:
        """Return the run that an object tells of; an Event by the uid of what it is about, where that is known."""
        about = (facts.object_uid or "") if isinstance(facts, EventFacts) else ""
        known = self._places.get(cluster, {}).get(about) if about else None
        return known or (Place(cluster, facts.namespace, facts.id) if facts.id else None)

    def set_listed(self, scope: Scope, listed: bool) -> list[Place]:
        """Note that a scope's Jobs were listed, or may not be; return whose rows that makes derivable."""
        known = self._listed.get(scope)
        if scope.resource != JOBS.name or known or known == listed:
            return []  # a right that was lost later does not unmake what is known
        self._listed[scope] = listed
        return [
            place
            for place in sorted(self._entries)
            if place.cluster == scope.cluster and scope.namespace in ("", place.namespace)
        ]

    def derive(self, draft: Draft, place: Place) -> list[PodFacts]:
        """Derive a run's row again from its objects; return the Pods that it needs no more."""
        entry = self._entries.get(place)
        listed = self._is_listed(place)
        if entry is None or listed is None:  # None: Jobs are still to come, and Pods alone would tell half the truth
            return []
        job = current_job(entry.jobs)
        if job is None and (listed or not entry.pods):
            if entry.run_id:
                self._tables.drop(draft, Run, (entry.run_id,))
                del self._owners[entry.run_id]
                entry.run_id = None
            return []
        is_new, took_over = entry.run_id is None, False
        if entry.run_id is None:
            took_over = self._give_way(draft, place)
            entry.run_id = self._key_for(place, any(facts.scheduled for facts in (job, *entry.pods) if facts))
            self._owners[entry.run_id] = place
            if self._unsettled is not None:
                self._unsettled.add(entry.run_id)
        pod = current_pod(entry.pods, job)
        verdict = self._verdict(place, self._tables.run(entry.run_id), job, pod, draft.now)
        self._tables.set(draft, run_row(place, entry.run_id, job, pod, verdict, draft.at))
        if is_new and (took_over or entry.run_id != place.id):
            self._rename_followers(draft, place, entry.run_id)
        self._tell_malformed(draft, entry, pod, job)
        return [other for other in entry.pods if other.gone and other is not pod]

    def expired(self, before: str) -> list[tuple[str, list[Facts]]]:
        """Return the keys and objects of runs that ended before a time and whose Job is gone."""
        found: list[tuple[str, list[Facts]]] = []
        for run_id, place in self._owners.items():
            row, entry = self._tables.run(run_id), self._entries[place]
            ended_at = (row.finished_at or row.deleted_at) if row else None
            if ended_at and ended_at < before and all(job.gone for job in entry.jobs):
                found.append((run_id, [*entry.jobs, *entry.pods]))
        return found

    def forget(self, draft: Draft, run_id: str) -> None:
        """Drop a run whole."""
        place = self._owners.pop(run_id)
        entry = self._entries.pop(place)
        for uid in [*(job.uid for job in entry.jobs), *(pod.uid for pod in entry.pods)]:
            self._endings.pop((place.cluster, uid), None)
            self._places.get(place.cluster, {}).pop(uid, None)
        self._tables.drop(draft, Run, (run_id,))

    def settle(self) -> None:
        """Keep keys where they are from now on: every cluster was listed, or cannot be at present."""
        self._unsettled = None

    def _give_way(self, draft: Draft, place: Place) -> bool:
        """Take the plain id from a place that had it only because its list came first; say whether that was so."""
        holder = self._owners.get(place.id)
        if holder is None or self._unsettled is None or place.id not in self._unsettled:
            return False
        gives_way = self._rank(place) < self._rank(holder)
        if gives_way:
            entry = self._entries[holder]
            self._tables.drop(draft, Run, (place.id,))
            entry.run_id = f"{holder.id}@{holder.cluster}/{holder.namespace}"
            self._owners[entry.run_id] = holder
            self._rename_followers(draft, holder, entry.run_id)
            del self._owners[place.id]
            draft.places[holder] = None
        return gives_way

    def _entry(self, place: Place) -> _Entry:
        known = self._entries.get(place)
        if known is None:
            known = self._entries[place] = _Entry(place)
        return known

    def _rank(self, place: Place) -> tuple[int, str, str]:
        return self.priorities.get(place.cluster, 0), place.cluster, place.namespace

    def _is_listed(self, place: Place) -> bool | None:
        own = self._listed.get(Scope(place.cluster, JOBS.name, place.namespace))
        return self._listed.get(Scope(place.cluster, JOBS.name, "")) if own is None else own

    def _key_for(self, place: Place, scheduled: bool) -> str:
        taken = self._owners.get(place.id, place) != place
        return f"{place.id}@{place.cluster}/{place.namespace}" if scheduled or taken else place.id

    def _verdict(
        self, place: Place, before: Run | None, job: JobFacts | None, pod: PodFacts | None, now: float
    ) -> Verdict:
        ending = self._endings.get((place.cluster, job.uid)) if job else None
        status, reason = status_of(job, pod, ending, before.status if before else None)
        ended_at = job.ended_at if job else None
        if status in TERMINAL and ended_at is None:
            by_pod = pod.ended_at if pod and status != CANCELLED else None
            known = before.finished_at if before and before.job_uid == (job.uid if job else None) else None
            ended_at = by_pod or known or format_time(now)
        if before and before.status in TERMINAL and status not in TERMINAL and self._holds(before, job):
            return Verdict(before.status, before.reason, before.finished_at)
        return Verdict(status, reason, ended_at)

    @staticmethod
    def _holds(before: Run, job: JobFacts | None) -> bool:
        """Say whether a terminal row stays: not for a new Job, nor for one seen again that was taken for deleted."""
        if job is None or before.job_uid != job.uid or job.gone == VANISHED:
            return False  # what a vanished Job's Pods and Events tell is weighed anew each time
        return not (before.deleted_at and job.gone is None)

    def _rename_followers(self, draft: Draft, place: Place, run_id: str) -> None:
        """Give volumes and warnings that came before their run the key it got."""
        keys = place.id, f"{place.id}@{place.cluster}/{place.namespace}"  # by what was known then
        for row in [*self._tables.rows(Volume), *self._tables.rows(ClusterEvent)]:
            if isinstance(row, (Volume, ClusterEvent)) and row[:2] == place[:2] and row.run_id in keys:
                self._tables.set(draft, row._replace(run_id=run_id))

    @staticmethod
    def _tell_malformed(draft: Draft, entry: _Entry, pod: PodFacts | None, job: JobFacts | None) -> None:
        malformed = (pod.report.malformed if pod else ()) + (job.report.malformed if job else ())
        if malformed and not entry.malformed_told:
            draft.malformed.append((entry.run_id or "", malformed))
            entry.malformed_told = True


# ----------------------------------------------------------------------------------------------------------------------
# Store
# ----------------------------------------------------------------------------------------------------------------------


class Snapshot(NamedTuple):
    """What the cache holds at start."""

    objects: Sequence[tuple[ObjectKey, Facts]] = ()
    rows: Sequence[TableRow] = ()
    synced: Sequence[Scope] = ()  # scopes that were listed whole at least once
    reserved_seq: int = 0  # the cache has reserved the block of numbers after this one


class Store:
    """What is known now. Every method takes what was seen and the time, and returns what that changed."""

    def __init__(self, zone: Zone) -> None:
        self._zone = zone
        self._objects: dict[tuple[str, str], dict[tuple[str, str], Facts]] = {}  # by cluster and resource
        self.tables = Tables()
        self._runs = RunBook(self.tables)

    def load(self, snapshot: Snapshot) -> None:
        """Take over what the cache holds; nothing of it is a change."""
        self.tables.load(snapshot.rows, snapshot.reserved_seq)
        self._runs.load(snapshot.synced)
        for key, facts in snapshot.objects:
            self._objects.setdefault((key.cluster, key.resource), {})[key.namespace, key.name] = facts
            self._runs.attach(key.cluster, facts)

    def observe(self, progress: Progress, seen: Iterable[Seen], now: float) -> Commit:
        """Take in what a watch told, in order; each state that a row was in is a change, however short it lasted."""
        draft = Draft(now)
        for name, facts, deleted in seen:
            key = self._key(progress.scope, name)
            known = self._of(key).get(name)
            if deleted:
                last = facts or known
                if last is not None and (known is None or known.uid == last.uid):
                    self._bury(draft, key, last, DELETED)
            elif facts is not None:
                self._put(draft, key, facts)
            elif known is not None:
                self._forget(draft, key, known)
            self._derive(draft)
        return self._commit(draft, progress)

    def set_priorities(self, priorities: Mapping[str, int]) -> None:
        """Take in which cluster has the plain run_id of an id that stands in several: the lower."""
        self._runs.priorities = priorities

    def settle(self) -> None:
        """Take in that every cluster was listed, or cannot be at present: run_ids stay where they are."""
        self._runs.settle()

    def advance(self, progress: Progress, now: float) -> Commit:
        """Take in a bookmark."""
        return self._commit(Draft(now), progress)

    def replace(self, progress: Progress, items: Iterable[Facts], now: float) -> Commit:
        """Swap in a whole list: what it lacks vanished while nobody looked."""
        draft, scope = Draft(now), progress.scope
        missing = {
            name: facts
            for name, facts in self._objects.get((scope.cluster, scope.resource), {}).items()
            if scope.namespace in ("", facts.namespace) and not facts.gone
        }
        for facts in sorted(items, key=lambda item: (item.namespace, item.name)):
            name = facts.namespace, facts.name
            missing.pop(name, None)
            self._put(draft, self._key(scope, name), facts)
        for name, facts in missing.items():
            self._bury(draft, self._key(scope, name), facts, VANISHED)
        draft.places.update(dict.fromkeys(self._runs.set_listed(scope, True)))
        return self._commit(draft, progress)

    def forbid(self, scope: Scope, now: float) -> Commit:
        """Take in that a scope may not be read: without Jobs, Pods tell of runs provisionally."""
        draft = Draft(now)
        draft.places.update(dict.fromkeys(self._runs.set_listed(scope, False)))
        return self._commit(draft, None)

    def rows(self, wanted: Filter) -> list[TableRow]:
        """Return the rows of all tables that are asked for."""
        return [row for kind in TABLES.values() for row in self.tables.rows(kind) if wanted.matches(row)]

    def announce(self, change_type: str, row: ClusterRow, now: float) -> Commit:
        """Take in what happened to a cluster's connection."""
        draft = Draft(now)
        self.tables.announce(draft, change_type, row)
        return self._commit(draft, None)

    def keep_lines(self, run_id: str, lines: Sequence[tuple[JsonObject, str | None]], now: float) -> Commit:
        """Keep a failed run's last lines: what is said of each, and its time."""
        draft = Draft(now)
        first = self.tables.take_numbers(len(lines))
        events = [RunEvent(first + i, run_id, "log_line", said, at) for i, (said, at) in enumerate(lines)]
        return self._commit(draft, None)._replace(kept=KeptLines(run_id, tuple(events), draft.at))

    def take_sidecar(self, cluster: str, pod: PodFacts, report: Report, now: float) -> Commit:
        """Take in what a Pod's sidecar answered."""
        draft, key = Draft(now), ObjectKey(cluster, PODS.name, pod.namespace, pod.name)
        known = self.known(key)
        if isinstance(known, PodFacts) and known.uid == pod.uid and not known.gone:
            self._put(draft, key, known._replace(sidecar=report))
        return self._commit(draft, None)

    def known(self, key: ObjectKey) -> Facts | None:
        """Return what is kept of an object."""
        return self._of(key).get((key.namespace, key.name))

    def objects(self) -> Iterator[tuple[ObjectKey, Facts]]:
        """Yield all object facts."""
        for (cluster, resource_name), objects in self._objects.items():
            for name, facts in objects.items():
                yield ObjectKey(cluster, resource_name, *name), facts

    def tick(self, now: float, retention: float) -> Commit:
        """Let time pass: schedules have a next run again; what ended longer than `retention` seconds ago leaves."""
        draft = Draft(now)
        for (cluster, _), objects in self._objects.items():
            for facts in objects.values():
                if isinstance(facts, CronJobFacts):
                    self.tables.set(draft, schedule_row(cluster, facts, now, self._zone))
        before = format_time(now - retention)
        for run_id, objects_of_run in self._runs.expired(before):
            cluster = (self.tables.run(run_id) or Run("", "", "")).cluster
            for facts in objects_of_run:
                resource_name = JOBS.name if isinstance(facts, JobFacts) else PODS.name
                self._erase(draft, ObjectKey(cluster, resource_name, facts.namespace, facts.name))
            self._runs.forget(draft, run_id)
        for row in [*self.tables.rows(Volume), *self.tables.rows(ClusterEvent)]:
            ended_at = row.deleted_at if isinstance(row, Volume) else getattr(row, "last_at", None)
            if ended_at and ended_at < before:
                self.tables.expire(draft, type(row), row_key(row))
        return self._commit(draft, None)

    @staticmethod
    def _key(scope: Scope, name: tuple[str, str]) -> ObjectKey:
        return ObjectKey(scope.cluster, scope.resource, *name)

    def _of(self, key: ObjectKey) -> dict[tuple[str, str], Facts]:
        return self._objects.setdefault((key.cluster, key.resource), {})

    def _put(self, draft: Draft, key: ObjectKey, facts: Facts) -> None:
        known = self._of(key).get((key.namespace, key.name))
        if isinstance(known, PodFacts) and isinstance(facts, PodFacts) and known.uid == facts.uid:
            facts = facts._replace(sidecar=known.sidecar) if facts.sidecar == NO_REPORT != known.sidecar else facts
        if known == facts:
            return
        if known is not None and known.id != facts.id:
            self._runs.detach(key.cluster, known)
            self._touch(draft, key, known)
        self._of(key)[key.namespace, key.name] = facts
        draft.objects[key] = facts
        self._runs.attach(key.cluster, facts)
        self._touch(draft, key, facts)
        self._set_row(draft, key, facts)

    def _bury(self, draft: Draft, key: ObjectKey, facts: Facts, how: str) -> None:
        """Keep what an object that is gone still tells of its run; forget one that tells nothing."""
        buried = facts._replace(gone=how, gone_at=format_time(draft.now))
        if isinstance(buried, (JobFacts, PodFacts)):
            self._put(draft, key, buried)
            return
        if isinstance(buried, CronJobFacts):
            self.tables.drop(draft, Schedule, (key.cluster, key.namespace, key.name))
        elif isinstance(buried, VolumeFacts):
            self._set_row(draft, key, buried)
        self._erase(draft, key)  # a Warning's row outlives its Event

    def _forget(self, draft: Draft, key: ObjectKey, facts: Facts) -> None:
        self._erase(draft, key)
        self._runs.detach(key.cluster, facts)
        self._touch(draft, key, facts)
        kind = {CronJobFacts: Schedule, VolumeFacts: Volume}.get(type(facts))
        if kind is not None:
            self.tables.drop(draft, kind, (key.cluster, key.namespace, key.name))

    def _erase(self, draft: Draft, key: ObjectKey) -> None:
        self._of(key).pop((key.namespace, key.name), None)
        draft.objects[key] = None

    def _touch(self, draft: Draft, key: ObjectKey, facts: Facts) -> None:
        concerns_run = isinstance(facts, (JobFacts, PodFacts)) or (isinstance(facts, EventFacts) and ending_of(facts))
        place = self._runs.place_of(key.cluster, facts) if concerns_run else None
        if place is not None:
            draft.places[place] = None

    def _set_row(self, draft: Draft, key: ObjectKey, facts: Facts) -> None:
        if isinstance(facts, CronJobFacts):
            self.tables.set(draft, schedule_row(key.cluster, facts, draft.now, self._zone))
        elif isinstance(facts, VolumeFacts):
            self.tables.set(draft, volume_row(key.cluster, facts, self._runs.run_id_for(key.cluster, facts)))
        elif isinstance(facts, EventFacts) and facts.warning:
            self.tables.set(draft, warning_row(key.cluster, facts, self._runs.run_id_for(key.cluster, facts)))

    def _derive(self, draft: Draft) -> None:
        """Derive the rows of all places that were touched again."""
        done: set[Place] = set()
        while len(done) < len(draft.places):  # it grows where a run gives way to another
            for place in [place for place in draft.places if place not in done]:
                done.add(place)
                for pod in self._runs.derive(draft, place):
                    self._runs.detach(place.cluster, pod)
                    self._erase(draft, ObjectKey(place.cluster, PODS.name, pod.namespace, pod.name))
        draft.places.clear()

    def _commit(self, draft: Draft, progress: Progress | None) -> Commit:
        self._derive(draft)
        reserved, objects = self.tables.reservation(), tuple(draft.objects.items())
        expired, malformed = tuple(draft.expired), tuple(draft.malformed)
        return Commit(tuple(draft.changes), objects, progress, reserved, expired, malformed)


# ----------------------------------------------------------------------------------------------------------------------
# Bus
# ----------------------------------------------------------------------------------------------------------------------

SnapshotRows = Callable[[Filter], Sequence[Row]]


def format_line(message: JsonObject) -> bytes:
    """Return a message as one line of JSON."""
    return format_json_text(message).encode("utf-8", "replace") + b"\n"


def event_of(change: Change) -> JsonObject:
    """Return what subscribers are told of a change, but for the row itself: decisions.md, "Streams"."""
    row, before = change.row, change.previous
    event: JsonObject = {"type": change.type, "seq": change.seq, "cluster": row.cluster}
    if isinstance(row, Run):
        finished, total = row.progress_finished, row.progress_total
        event |= {
            "runId": row.run_id,
            "namespace": row.namespace,
            "status": row.status,
            "previousStatus": before.status if isinstance(before, Run) else None,
            "phase": row.phase,
            "currentTask": row.current_task,
            "progress": None if finished is None else {"finished": finished, "total": total},
            "clusterTimestamp": row.updated_at,
        }
    elif isinstance(row, ClusterRow):
        event |= {"error": row.error}
    else:
        event |= {"namespace": row.namespace, "name": row.name}
    event["localTimestamp"] = change.at
    return event


def event_line(change: Change) -> bytes:
    """Return what subscribers are told of a change as one line of JSON, the whole row last."""
    row_json = change.row_json or format_record(change.row)
    text = f'{format_json_text(event_of(change))[:-1]},"row":{row_json}}}\n'
    return text.encode("utf-8", "replace")


class Cursor(NamedTuple):
    """How far a subscriber was told: up to a number of a stream."""

    stream: str
    seq: int


class Wish(NamedTuple):
    """What a subscriber asks for, and with what to begin: `since` wins over the others."""

    wanted: Filter = Filter()
    history: int = 0
    since: Cursor | None = None
    snapshot: bool = False


class Held(NamedTuple):
    """Changes that the cache holds after some number, the oldest first; `is_whole` where it lacks none before them."""

    changes: Sequence[Change]
    is_whole: bool


class Past(NamedTuple):
    """What a start finds of the stream: where it goes on, and the last changes, all that came after a number."""

    cursor: Cursor
    changes: Sequence[Change] = ()
    after: int = 0
    lost: Sequence[range] = ()  # numbers of what daemons that crashed may have told, and took along


class Lack(NamedTuple):
    """What a subscription must be given before it can go on: read it where that may block, then hand it over."""

    read: Callable[[], Held]
    take: Callable[[Held], None]


def _marked(line: bytes, mark: bytes) -> bytes:
    return line[:-2] + b"," + mark + b"}\n"


def identity_mark(envelope: JsonObject) -> bytes:
    """Return what every line of a subscription that has an id carries, as JSON members."""
    return format_line(envelope)[1:-2]


class Subscription:
    """What one subscriber is still to be told. It is read with `take`; one that does not read loses, the others not."""

    def __init__(self, wanted: Filter, mark: bytes, stream: str, snapshot: Callable[[], Iterator[bytes]]) -> None:
        self.wanted = wanted
        self.mark = mark
        self.stream = stream
        self.lack: Lack | None = None
        self.is_over = False
        self._told: Iterator[bytes] = iter(())  # before the queue
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._snapshot = snapshot
        self._lagged = False
        self._dropped: int | None = 0  # None: nobody knows

    def say(self, lines: Iterable[bytes]) -> None:
        """Tell lines before what is queued; they are made when they are taken."""
        self._told = itertools.chain(self._told, lines)

    def put(self, line: bytes) -> int:
        """Queue a line, and return how many are lost now; past the bound, what waits gives way to one `lagged`."""
        if self._lagged:
            self._dropped = None if self._dropped is None else self._dropped + 1
            return 1
        self._queue.append(line)
        self._queued_bytes += len(line)
        if len(self._queue) <= SUBSCRIBER_QUEUE_LINES and self._queued_bytes <= SUBSCRIBER_QUEUE_BYTES:
            return 0
        lost = len(self._queue)
        self.lag(lost)
        return lost

    def lag(self, dropped: int | None) -> None:
        """Let what waits give way to `lagged` and a snapshot; `dropped` lines are lost, None where nobody knows."""
        self._lagged, self._dropped = True, dropped
        self._queue.clear()
        self._queued_bytes = 0

    def take(self) -> bytes | None:
        """Return the next line, None where there is nothing to tell at present."""
        line = next(self._told, None)
        if line is None and self._lagged:
            self._lagged = False
            self._told = self._snapshot()
            line = format_line({"type": "lagged", "dropped": self._dropped})
        elif line is None and self._queue:
            line = self._queue.popleft()
            self._queued_bytes -= len(line)
        return _marked(line, self.mark) if self.mark and line is not None else line

    @property
    def waiting(self) -> int:
        """How many lines wait."""
        return len(self._queue)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits for the subscriber."""
        return not self._queue and not self._lagged


class Bus:
    """Tells every subscriber what it asked for, in order, without gap or repeat."""

    def __init__(self, past: Past, rows: SnapshotRows, held: Callable[[int], Held]) -> None:
        """Go on from the past. `held` reads the changes after a number out of the cache, and may block."""
        self.stream, self.seq = past.cursor  # the last number published
        self.begun_at = self.seq  # a number that no other start has
        self.published = 0
        self.dropped = 0  # lines that subscribers were not told since they did not read
        self._rows = rows
        self._held = held
        self._history: deque[Change] = deque()  # without lines: those of 10,000 changes are 11 MB, and few come back
        self._history_bytes = 0
        self._history_after = past.after  # history holds all that came after this number
        self._lost = past.lost
        self._groups: dict[Filter, dict[Subscription, None]] = {}  # who asks for the same is told the same
        for change in past.changes:
            self._remember(change._replace(row_json=format_record(change.row)))

    def publish(self, changes: Iterable[Change]) -> list[Subscription]:
        """Queue changes with those who asked for them; return who has something to read now."""
        woken: dict[Subscription, None] = {}
        for change in changes:
            self._remember(change)
            self.seq = change.seq
            self.published += 1
            line = event_line(change) if self._groups else b""
            for wanted, group in self._groups.items():
                mark = _mark_for(wanted, change)
                if mark is not None:
                    told = _marked(line, mark) if mark else line
                    self.dropped += sum(subscription.put(told) for subscription in group)
                    woken.update(group)
        return list(woken)

    def subscribe(self, wish: Wish, envelope: JsonObject) -> Subscription:
        """Return a new subscription: `subscribed`, then what it begins with, then what follows."""
        wanted, since = wish.wanted, wish.since
        subscription = Subscription(wanted, identity_mark(envelope), self.stream, lambda: self._snapshot(wanted))
        subscription.say([format_line({"type": "subscribed", "stream": self.stream, "seq": self.seq})])
        if since is None:
            subscription.say(self._last(wanted, wish.history))
            subscription.say(self._snapshot(wanted) if wish.snapshot else ())
        elif since.stream != self.stream or since.seq > self.seq or any(since.seq in gap for gap in self._lost):
            subscription.lag(None)
        elif since.seq < self._history_after:
            self._await(subscription, since.seq)
            return subscription
        else:
            subscription.say(self._after(wanted, since.seq))
        self._join(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Tell a subscriber no more."""
        subscription.is_over = True
        group = self._groups.get(subscription.wanted, {})
        group.pop(subscription, None)
        if not group:
            self._groups.pop(subscription.wanted, None)

    @property
    def waiting(self) -> int:
        """How many lines wait for subscribers."""
        return sum(subscription.waiting for group in self._groups.values() for subscription in group)

    def idle(self) -> list[Subscription]:
        """Tell those who have nothing to read how far the stream is; return them."""
        quiet = [subscription for group in self._groups.values() for subscription in group if subscription.is_idle]
        line = format_line({"type": "seq", "seq": self.seq})
        for subscription in quiet:
            subscription.put(line)
        return quiet

    def __len__(self) -> int:
        """Return the number of subscribers."""
        return sum(map(len, self._groups.values()))

    def _join(self, subscription: Subscription) -> None:
        self._groups.setdefault(subscription.wanted, {})[subscription] = None

    def _await(self, subscription: Subscription, seq: int) -> None:
        """Let a subscription that was told up to a number wait for what only the cache still holds."""
        subscription.lack = Lack(lambda: self._held(seq), lambda held: self._go_on(subscription, seq, held))

    def _go_on(self, subscription: Subscription, seq: int, held: Held) -> None:
        if subscription.is_over:
            return
        if held.is_whole and held.changes:
            subscription.say(_history_lines(subscription.wanted, held.changes))
            seq = held.changes[-1].seq
            if seq < self._history_after:
                self._await(subscription, seq)
                return
            subscription.say(self._after(subscription.wanted, seq))
        else:  # it was let go, or is not written yet
            subscription.lag(None)
        self._join(subscription)

    def _remember(self, change: Change) -> None:
        self._history.append(change)
        self._history_bytes += len(change.row_json)
        while len(self._history) > HISTORY_EVENTS or self._history_bytes > HISTORY_BYTES:
            gone = self._history.popleft()
            self._history_bytes -= len(gone.row_json)
            self._history_after = gone.seq

    def _last(self, wanted: Filter, count: int) -> Iterator[bytes]:
        """Return the last so many lines that were asked for."""
        found: deque[Change] = deque()
        for change in reversed(self._history):
            if len(found) >= count:
                break
            if _mark_for(wanted, change) is not None:
                found.appendleft(change)
        return _history_lines(wanted, found)

    def _after(self, wanted: Filter, seq: int) -> Iterator[bytes]:
        """Return the lines after a number that were asked for."""
        later: deque[Change] = deque()
        for change in reversed(self._history):
            if change.seq <= seq:
                break
            later.appendleft(change)
        return _history_lines(wanted, later)

    def _snapshot(self, wanted: Filter) -> Iterator[bytes]:
        """Return the rows of this moment, in pieces that are serialised when they are asked for."""
        rows, seq = [row for row in self._rows(wanted) if wanted.asks_for(type(row))], self.seq

        def pieces() -> Iterator[bytes]:
            for start in range(0, max(1, len(rows)), SNAPSHOT_ROWS):
                part = rows[start : start + SNAPSHOT_ROWS]
                tables = {
                    table: [row._asdict() for row in part if type(row) is kind] for table, kind in _SNAPSHOT.items()
                }
                last = start + SNAPSHOT_ROWS >= len(rows)
                yield format_line({"type": "snapshot", "seq": seq, **tables, "last": last})

        return pieces()


_SNAPSHOT: Final[dict[str, type[Row]]] = {**TABLES, "clusters": ClusterRow}


def _mark_for(wanted: Filter, change: Change) -> bytes | None:
    """Return what marks a change for one who asked for rows, None where neither its row before nor after is theirs."""
    if wanted.types and change.type not in wanted.types:
        return None
    removed = change.type.endswith(":removed")
    if not removed and wanted.matches(change.row):
        return b""
    before = change.previous if change.previous is not None else change.row if removed else None
    return b'"left":true' if wanted.matches(before) else None


def _history_lines(wanted: Filter, changes: Iterable[Change]) -> Iterator[bytes]:
    for change in changes:
        mark = _mark_for(wanted, change)
        if mark is not None:
            yield _marked(event_line(change), mark + b',"history":true' if mark else b'"history":true')


# ----------------------------------------------------------------------------------------------------------------------
# History
# ----------------------------------------------------------------------------------------------------------------------


class StatusEvent(NamedTuple):
    """A `status_changed` of run_events."""

    run_id: str
    before: str | None
    status: str | None
    reason: str | None
    at: str  # when it arrived here


class StoredChange(NamedTuple):
    """A run's change as the cache holds it."""

    run_id: str
    type: str
    at: str
    row: str  # JSON
    before: str | None  # what of it was other before, as JSON; None where there was no row, or nobody noted it


def timeline_of(run: JsonObject, events: Iterable[JsonObject], now: float) -> list[JsonObject]:
    """Return a run's life, a step a line: `at`, `what`, `seconds` it took or has taken, `status` where it changed.

    `events` are rows of run_events with their payloads parsed, the oldest first.
    """
    steps: list[JsonObject] = []
    status_step: JsonObject | None = None
    task_from: str | None = run.get("started_at") or run.get("created_at")
    for event in events:
        said, at = event.get("payload") or {}, event.get("cluster_timestamp") or event.get("local_timestamp")
        if event.get("event_type") == "status_changed":
            if status_step is not None:
                status_step["seconds"] = seconds_between(status_step["at"], at)
            reason = f" ({said['reason']})" if said.get("reason") else ""
            status = said.get("to") or UNKNOWN
            status_step = {"at": at, "what": f"{status}{reason}", "seconds": None, "status": status}
            steps.append(status_step)
            task_from = at if status == RUNNING else task_from
        elif event.get("event_type") == "task_completed":
            what = f"task {said.get('task')} done{_progress_of(said.get('finished'), said.get('total'))}"
            steps.append({"at": at, "what": what, "seconds": seconds_between(task_from, at), "status": None})
            task_from = at
    if status_step is not None and run.get("status") not in TERMINAL and not run.get("deleted_at"):
        status_step["seconds"] = seconds_between(status_step["at"], now)
        if run.get("current_task"):
            progress = _progress_of(run.get("progress_finished"), run.get("progress_total"))
            what, seconds = f"task {run['current_task']}{progress}", seconds_between(task_from, now)
            steps.append({"at": task_from, "what": what, "seconds": seconds, "status": None})
    return steps


def seconds_between(first: str | None, then: str | float | None) -> float | None:
    """Return the seconds between two times, the second an RFC 3339 text or since 1970; None where one is unknown."""
    start, end = epoch_of(first), then if isinstance(then, float) else epoch_of(then)
    return None if start is None or end is None else round(max(0.0, end - start), 3)


def blocked_seconds(events: Iterable[StatusEvent], now: float) -> dict[str, float]:
    """Return how long each run was blocked, up to now where it still is; events come in their order."""
    since: dict[str, str] = {}
    total: dict[str, float] = {}
    for event in events:
        began = since.pop(event.run_id, None)
        if began is not None:
            total[event.run_id] = total.get(event.run_id, 0.0) + (seconds_between(began, event.at) or 0.0)
        if event.status == BLOCKED:
            since[event.run_id] = event.at
    for run_id, began in since.items():
        total[run_id] = total.get(run_id, 0.0) + (seconds_between(began, now) or 0.0)
    return total


def run_statistics(runs: Iterable[Run], blocked: Mapping[str, float], column: str) -> list[JsonObject]:
    """Return a row for each value of a column of runs: counts, success rate, durations and time blocked."""
    groups: dict[str | None, list[Run]] = {}
    for run in runs:
        groups.setdefault(getattr(run, column), []).append(run)
    return [
        {column: value, **_statistics_of(groups[value], blocked)}
        for value in sorted(groups, key=lambda value: (value is None, value or ""))
    ]


def _statistics_of(runs: Sequence[Run], blocked: Mapping[str, float]) -> JsonObject:
    counts = {status: sum(run.status == status for run in runs) for status in STATUSES}
    ended = counts[FINISHED] + counts[FAILED]
    took = sorted(
        seconds
        for run in runs
        if run.status in (FINISHED, FAILED)
        for seconds in [seconds_between(run.started_at or run.created_at, run.finished_at)]
        if seconds is not None
    )
    return {
        "runs": len(runs),
        "active": sum(counts[status] for status in (PENDING, RUNNING, BLOCKED)),
        **{status: counts[status] for status in (FINISHED, FAILED, CANCELLED)},
        "success_rate": round(counts[FINISHED] / ended, 4) if ended else None,
        "median_seconds": percentile(took, 0.5),
        "p95_seconds": percentile(took, 0.95),
        "blocked_seconds": round(sum(blocked.get(run.run_id, 0.0) for run in runs), 3),
    }


def percentile(values: Sequence[float], part: float) -> float | None:
    """Return a percentile of sorted values by the nearest rank, None where there are none."""
    return values[max(0, math.ceil(part * len(values)) - 1)] if values else None


CHANGES: Final = "changes"  # where a row of the past comes from: whole
RUN_EVENTS: Final = "run_events"  # the same: status and reason alone
_LASTING: Final = (
    "run_id",
    "cluster",
    "namespace",
    "id",
    "spec_id",
    "template",
    "project",
    "created_at",
    "schedule_id",
)


def runs_at(
    at: str, runs: Iterable[Run], changes: Iterable[StoredChange], events: Iterable[StatusEvent], reach: str | None
) -> list[tuple[Run, str]]:
    """Return the runs as they were known at a time, each with where that comes from: CHANGES or RUN_EVENTS.

    `changes` and `events` are all that the cache holds, in their order; `reach` is since when it holds every change.
    """
    last: dict[str, StoredChange] = {}
    following: dict[str, StoredChange] = {}
    for change in changes:
        if change.at <= at:
            last[change.run_id] = change
        else:
            following.setdefault(change.run_id, change)
    is_reached = reach is not None and reach <= at
    past = [(run_from_json(change.row), CHANGES) for change in last.values() if change.type != "run:removed"]
    rest = []
    known = {run_id: run_from_json(change.row) for run_id, change in following.items()}
    for run_id, row in {**known, **{run.run_id: run for run in runs}}.items():
        change_after = following.get(run_id)
        if run_id in last or (change_after and change_after.type == "run:added" and is_reached):
            continue
        if is_reached and change_after is None:
            past.append((row, CHANGES))
        elif is_reached and change_after and change_after.before is not None:
            past.append((run_from_json(change_after.row, change_after.before), CHANGES))
        elif (row.created_at or "") <= at:
            rest.append(row)
    return past + [(run, RUN_EVENTS) for run in _statuses_at(at, rest, events)]


def run_from_json(*texts: str) -> Run:
    """Return the run of a row of `changes`, of whatever version of this program; later texts lead."""
    said = {key: value for text in texts for key, value in (parse_json(text) or {}).items()}
    run: Run = row_from_object(Run, said)
    return run


def row_from_object(kind: type[Row], said: JsonObject) -> Any:
    """Return the row, one of `kind`, that another process told; columns that are not known here are left out."""
    known = {name: said[name] for name in kind._fields if name in said}
    return kind(**{**dict.fromkeys(kind._fields[:3], ""), **known})


def _statuses_at(at: str, runs: Iterable[Run], events: Iterable[StatusEvent]) -> Iterator[Run]:
    """Yield runs with what can be told of an earlier time: what never changes, status and reason."""
    last: dict[str, StatusEvent] = {}
    following: dict[str, StatusEvent] = {}
    for event in events:
        if event.at <= at:
            last[event.run_id] = event
        else:
            following.setdefault(event.run_id, event)
    for run in runs:
        row = Run(**{name: getattr(run, name) for name in _LASTING})
        row = row._replace(started_at=run.started_at if (run.started_at or "~") <= at else None)
        if run.run_id in last:
            row = row._replace(status=last[run.run_id].status, reason=last[run.run_id].reason)
        elif (run.finished_at or "~") <= at:
            row = row._replace(status=run.status, reason=run.reason)
        elif run.run_id in following:
            row = row._replace(status=following[run.run_id].before)
        is_over = (run.finished_at or "~") <= at
        yield row._replace(finished_at=run.finished_at if is_over else None)


def _progress_of(finished: object, total: object) -> str:
    return "" if finished is None or total is None else f" ({finished}/{total})"


# ----------------------------------------------------------------------------------------------------------------------
# Schema: views
# ----------------------------------------------------------------------------------------------------------------------

SQL_VIEWS: Final = """
CREATE VIEW v_active AS
SELECT run_id, cluster, namespace, status, phase, current_task, progress_finished, progress_total,
  round(100.0 * progress_finished / progress_total, 1) AS percent,
  CAST(round((julianday('now') - julianday(created_at)) * 86400) AS INTEGER) AS age_seconds,
  CAST(round((julianday('now') - julianday(heartbeat_at)) * 86400) AS INTEGER) AS heartbeat_seconds,
  reason, spec_id, project
FROM runs WHERE status IN ('pending', 'running', 'blocked') ORDER BY created_at DESC;
CREATE VIEW v_blocked AS
SELECT run_id, cluster, namespace, reason, phase, current_task, since,
  CAST(round((julianday('now') - julianday(since)) * 86400) AS INTEGER) AS blocked_seconds, spec_id, project
FROM (
  SELECT runs.*, (
    SELECT max(local_timestamp) FROM run_events WHERE run_events.run_id = runs.run_id AND event_type = 'blocked'
  ) AS since FROM runs WHERE status = 'blocked'
) ORDER BY since;
CREATE VIEW v_failures AS
SELECT run_id, cluster, namespace, reason, phase, current_task, task_attempt, spec_id, template, project, finished_at,
  CAST(round((julianday(finished_at) - julianday(coalesce(started_at, created_at))) * 86400) AS INTEGER) AS seconds, (
    SELECT json_extract(payload, '$.line') FROM run_events
    WHERE run_events.run_id = runs.run_id AND event_type = 'log_line' ORDER BY id DESC LIMIT 1
  ) AS last_line
FROM runs WHERE status = 'failed' ORDER BY finished_at DESC;
CREATE VIEW v_stale AS
SELECT run_id, runs.cluster, namespace, phase, current_task, heartbeat_at,
  CAST(round((julianday('now') - julianday(heartbeat_at)) * 86400) AS INTEGER) AS heartbeat_seconds, clusters.connected
FROM runs LEFT JOIN clusters ON clusters.name = runs.cluster
WHERE status = 'running' AND (julianday('now') - julianday(coalesce(heartbeat_at, started_at, created_at))) * 86400 > 60
ORDER BY heartbeat_at;
CREATE VIEW v_storage AS
SELECT volumes.cluster, volumes.namespace, volumes.name, volumes.run_id, runs.status AS run_status, volumes.phase,
  capacity_bytes, storage_class, volumes.created_at
FROM volumes LEFT JOIN runs ON runs.run_id = volumes.run_id
WHERE volumes.deleted_at IS NULL ORDER BY capacity_bytes DESC;
CREATE VIEW v_durations AS
SELECT runs.run_id, cluster, namespace, spec_id, template, project, status, finished_at,
  CAST(round((julianday(started_at) - julianday(created_at)) * 86400) AS INTEGER) AS waited_seconds,
  CAST(round((julianday(finished_at) - julianday(coalesce(started_at, created_at))) * 86400) AS INTEGER) AS seconds,
  coalesce(blocked_seconds, 0) AS blocked_seconds
FROM runs LEFT JOIN (
  SELECT run_id, CAST(round(sum((julianday(until) - julianday(at)) * 86400)) AS INTEGER) AS blocked_seconds
  FROM (
    SELECT run_id, json_extract(payload, '$.to') AS status, local_timestamp AS at,
      lead(local_timestamp) OVER (PARTITION BY run_id ORDER BY id) AS until
    FROM run_events WHERE event_type = 'status_changed'
  ) WHERE status = 'blocked' GROUP BY run_id
) AS blocked ON blocked.run_id = runs.run_id
WHERE status IN ('finished', 'failed', 'cancelled') ORDER BY finished_at DESC;
"""

# What each table and column means, for `query --schema`: a line each, columns indented under their table.
MEANINGS: Final = """
runs: one run a row, as it is known now
  run_id: its key, the label id unless another run has that, then id@cluster/namespace
  cluster: the cluster's name
  namespace: its namespace
  status: pending, running, blocked, finished, failed or cancelled; NULL where nobody knows
  current_task: what it works on, as 16:impl
  task_status: in-progress, finished or failed
  progress_finished: tasks done
  progress_total: tasks in all
  spec_id: the spec it works on
  template: the template it was made from
  created_at: when it was made
  updated_at: when the cluster last had news of it
  last_sync_at: when this row was written
  id: the id on its label
  project: its project
  phase: discover, implement, validate, review, human-gate or done
  task_attempt: how often the task was begun
  iteration: which round it is in
  heartbeat_at: when it last reported
  reason: why it is blocked, pending or failed
  job_name: its Job
  job_uid: the Job's uid
  pod_name: its current Pod
  schedule_id: the schedule that made it
  started_at: when its Pod began
  finished_at: when it ended
  deleted_at: when its Job was gone
run_events: what happened to runs, the oldest first
  id: the number of the change that it tells
  run_id: whose it is
  event_type: status_changed, task_completed, blocked or log_line
  payload: details, as JSON
  cluster_timestamp: when it happened, by the cluster
  local_timestamp: when it arrived here
schedules: one CronJob a row
  cluster: the cluster's name
  namespace: its namespace
  name: the CronJob's name
  schedule_id: the id on its label
  schedule: when it runs, as cron writes it
  time_zone: where that holds
  suspended: 1 where it pauses
  active: Jobs that run
  created_at: when it was made
  last_run_at: its last run
  last_success_at: its last run that finished
  next_run_at: its next run
  missed: runs that are overdue
volumes: one PersistentVolumeClaim a row
  cluster: the cluster's name
  namespace: its namespace
  name: the claim's name
  run_id: whose workspace it is
  phase: Pending, Bound or Lost
  capacity_bytes: its size
  storage_class: its storage class
  created_at: when it was made
  deleted_at: when it was gone
cluster_events: one Warning of Kubernetes a row
  cluster: the cluster's name
  namespace: its namespace
  name: the Event's name
  uid: the Event's uid
  run_id: the run it concerns
  object_kind: what it is about: Pod, Job, ...
  object_name: the name of that
  reason: why, in one word
  message: the same in a sentence
  count: how often
  first_at: when first
  last_at: when last
clusters: one cluster a row
  name: its name
  server: its API server
  uid: the uid of its kube-system
  priority: its place in lists, lower first
  connected: 1 while the daemon follows it
  last_event_at: when it last told anything
  error: what is wrong with it
watches: one resource of a namespace of a cluster a row
  cluster: the cluster's name
  resource: jobs, cronjobs, pods, persistentvolumeclaims or events
  namespace: the namespace, empty for all
  resource_version: how far it was followed
  synced_at: when that was
  state: listing, watching, forbidden, ...
  error: what is wrong with it
changes: every change told to subscribers, the last 100,000
  seq: its number
  type: run:added, schedule:updated, warning, cluster:connected, ...
  cluster: the cluster's name
  at: when it arrived here
  row: the row then, as JSON
  before: the columns that were other before, as JSON
objects: what is known of single objects, for the daemon itself
  cluster: the cluster's name
  resource: its kind
  namespace: its namespace
  name: its name
  uid: its uid
  run: the run it belongs to
  facts: what matters of it, as JSON
alerts: alerts that were raised
  fingerprint: what names the alert
  alertname: its name
  cluster: the cluster's name
  run_id: the run it concerns
  starts_at: since when
  ends_at: until when
meta: what the daemon notes for itself
  key: a name
  value: its value
v_active: runs that wait, run or are blocked
  percent: how far it is
  age_seconds: since it was made
  heartbeat_seconds: since it last reported
v_blocked: runs at a gate, the longest waiting first
  since: since when
  blocked_seconds: for how long
v_failures: failed runs, the last first
  seconds: how long it ran
  last_line: the last line of its log that was kept
v_stale: running runs without a heartbeat for over 60 s
  heartbeat_seconds: since it last reported
  connected: 1 while the daemon follows its cluster, else that may be why
v_storage: volumes that are there, the largest first
  run_status: the status of the run it belongs to
v_durations: runs that ended, the last first
  waited_seconds: from made to started
  seconds: from started to ended
  blocked_seconds: of that at gates
"""


def meanings() -> dict[tuple[str, str], str]:
    """Return what each table (its column is empty) and each column means."""
    found: dict[tuple[str, str], str] = {}
    table = ""
    for line in MEANINGS.strip().splitlines():
        name, _, meaning = line.strip().partition(": ")
        table = table if line.startswith(" ") else name
        found[table, name if line.startswith(" ") else ""] = meaning
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Schema: facts
# ----------------------------------------------------------------------------------------------------------------------

_REPORTS: Final = ("report", "sidecar")  # fields of facts that are reports


def facts_from_json(resource_name: str, text: str) -> Facts:
    """Return the facts that `objects.facts` holds, whatever version of this program wrote it. Raises ValueError."""
    kind, said = FACTS[resource_name], json.loads(text)
    if not isinstance(said, dict):
        raise ValueError("no facts")  # noqa: TRY004 - of the text, as the docstring has it
    for field in (field for field in _REPORTS if field in kind._fields):
        report = said.get(field, {})
        if not isinstance(report, dict):
            raise ValueError("no report")  # noqa: TRY004
        known = {name: value for name, value in report.items() if name in Report._fields}
        said[field] = Report(**{**known, "malformed": tuple(known.get("malformed", ()))})
    try:
        return kind(**{name: value for name, value in said.items() if name in kind._fields})
    except TypeError as error:
        raise ValueError(str(error)) from None


# ----------------------------------------------------------------------------------------------------------------------
# Schema
# ----------------------------------------------------------------------------------------------------------------------

Statement = tuple[str, Values]

_VERSION_1: Final = """
CREATE TABLE runs (
  run_id TEXT PRIMARY KEY,
  cluster TEXT NOT NULL,
  namespace TEXT NOT NULL DEFAULT 'fabrik-runs',
  status TEXT CHECK(status IN ('pending', 'running', 'blocked', 'finished', 'failed', 'cancelled')),
  current_task TEXT,
  task_status TEXT,
  progress_finished INTEGER,
  progress_total INTEGER,
  spec_id TEXT,
  template TEXT,
  created_at TEXT,
  updated_at TEXT,
  last_sync_at TEXT,
  id TEXT,
  project TEXT,
  phase TEXT,
  task_attempt INTEGER,
  iteration INTEGER,
  heartbeat_at TEXT,
  reason TEXT,
  job_name TEXT,
  job_uid TEXT,
  pod_name TEXT,
  schedule_id TEXT,
  started_at TEXT,
  finished_at TEXT,
  deleted_at TEXT
);
CREATE TABLE run_events (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  run_id TEXT REFERENCES runs(run_id),
  event_type TEXT CHECK(event_type IN ('status_changed', 'task_completed', 'blocked', 'log_line')),
  payload TEXT,
  cluster_timestamp TEXT,
  local_timestamp TEXT
);
CREATE INDEX idx_runs_status ON runs(status);
CREATE INDEX idx_runs_cluster ON runs(cluster);
CREATE INDEX idx_events_run_id ON run_events(run_id, cluster_timestamp);
CREATE INDEX idx_runs_created_at ON runs(created_at);
CREATE INDEX idx_runs_id ON runs(id);
CREATE TABLE objects (
  cluster TEXT NOT NULL,
  resource TEXT NOT NULL,
  namespace TEXT NOT NULL,
  name TEXT NOT NULL,
  uid TEXT,
  run TEXT,
  facts TEXT NOT NULL,
  PRIMARY KEY (cluster, resource, namespace, name)
) WITHOUT ROWID;
CREATE TABLE changes (seq INTEGER PRIMARY KEY, type TEXT NOT NULL, cluster TEXT, at TEXT NOT NULL, row TEXT NOT NULL);
CREATE TABLE schedules (
  cluster TEXT NOT NULL,
  namespace TEXT NOT NULL,
  name TEXT NOT NULL,
  schedule_id TEXT,
  schedule TEXT,
  time_zone TEXT,
  suspended INTEGER NOT NULL,
  active INTEGER NOT NULL,
  created_at TEXT,
  last_run_at TEXT,
  last_success_at TEXT,
  next_run_at TEXT,
  missed INTEGER NOT NULL,
  PRIMARY KEY (cluster, namespace, name)
);
CREATE TABLE volumes (
  cluster TEXT NOT NULL,
  namespace TEXT NOT NULL,
  name TEXT NOT NULL,
  run_id TEXT,
  phase TEXT,
  capacity_bytes INTEGER,
  storage_class TEXT,
  created_at TEXT,
  deleted_at TEXT,
  PRIMARY KEY (cluster, namespace, name)
);
CREATE INDEX idx_volumes_run_id ON volumes(run_id);
CREATE TABLE cluster_events (
  cluster TEXT NOT NULL,
  namespace TEXT NOT NULL,
  name TEXT NOT NULL,
  uid TEXT,
  run_id TEXT,
  object_kind TEXT,
  object_name TEXT,
  reason TEXT,
  message TEXT,
  count INTEGER NOT NULL,
  first_at TEXT,
  last_at TEXT,
  PRIMARY KEY (cluster, namespace, name)
);
CREATE INDEX idx_cluster_events_run_id ON cluster_events(run_id);
CREATE TABLE alerts (
  fingerprint TEXT PRIMARY KEY,
  alertname TEXT NOT NULL,
  cluster TEXT,
  run_id TEXT,
  starts_at TEXT NOT NULL,
  ends_at TEXT
);
CREATE TABLE clusters (
  name TEXT PRIMARY KEY,
  server TEXT,
  uid TEXT,
  priority INTEGER NOT NULL,
  connected INTEGER NOT NULL,
  last_event_at TEXT,
  error TEXT
);
CREATE TABLE watches (
  cluster TEXT NOT NULL,
  resource TEXT NOT NULL,
  namespace TEXT NOT NULL,
  resource_version TEXT,
  synced_at TEXT,
  state TEXT,
  error TEXT,
  PRIMARY KEY (cluster, resource, namespace)
);
"""

_VERSION_2: Final = """
ALTER TABLE changes ADD COLUMN before TEXT;
INSERT OR REPLACE INTO meta (key, value) SELECT 'changes_after', CAST(coalesce(max(seq), 0) AS TEXT) FROM changes;
"""
MIGRATIONS: Final = (_VERSION_1, _VERSION_2, SQL_VIEWS)  # the n-th brings a cache from schema version n to n + 1
META: Final = "CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT)"
_TABLE_OF: Final[dict[type[TableRow], str]] = {kind: table for table, kind in TABLES.items()}
_KEY_COLUMNS: Final = {"runs": ("run_id",)}
KEPT_META: Final = "kept:"  # and a run_id: the uid of the Job whose last lines were fetched
_CHANGES_KEPT: Final = 100_000  # about a day of a busy cluster, some 80 MB

# What user SQL may do; the codes are SQLite's (sqlite3.h), written out since the core does not import sqlite3.
SQLITE_OK: Final = 0
SQLITE_DENY: Final = 1
SQLITE_SELECT: Final = 21
SQLITE_READ: Final = 20
SQLITE_FUNCTION: Final = 31
SQLITE_RECURSIVE: Final = 33
_FUNCTIONS: Final = frozenset(
    [
        "abs",
        "avg",
        "char",
        "coalesce",
        "count",
        "date",
        "datetime",
        "format",
        "glob",
        "group_concat",
        "hex",
        "ifnull",
        "iif",
        "instr",
        "json",
        "json_array",
        "json_array_length",
        "json_extract",
        "json_group_array",
        "json_group_object",
        "json_object",
        "json_quote",
        "json_type",
        "json_valid",
        "julianday",
        "length",
        "like",
        "likely",
        "lower",
        "ltrim",
        "max",
        "min",
        "nullif",
        "printf",
        "quote",
        "random",
        "replace",
        "round",
        "rtrim",
        "sign",
        "strftime",
        "substr",
        "substring",
        "sum",
        "time",
        "total",
        "trim",
        "typeof",
        "unicode",
        "unixepoch",
        "unlikely",
        "upper",
        "row_number",
        "rank",
        "dense_rank",
        "percent_rank",
        "cume_dist",
        "ntile",
        "lag",
        "lead",
        "first_value",
        "last_value",
        "nth_value",
    ]
)


def upsert(row: TableRow) -> Statement:
    """Return the statement that writes a row. An upsert, since REPLACE would delete the row and fire its references."""
    table = _TABLE_OF[type(row)]
    return _upsert_sql(table, row._fields, _KEY_COLUMNS.get(table, ("cluster", "namespace", "name"))), tuple(row)


def commit_statements(commit: Commit) -> list[Statement]:
    """Return all that a commit writes, rows before the resource version they bring the cache up to."""
    statements: list[Statement] = []
    for change in commit.changes:
        statements += _change_statements(change)
    for key, facts in commit.objects:
        statements.append(_object_statement(key, facts))
    statements += (_delete_statement(row) for row in commit.expired)
    if commit.kept is not None:
        statements += _kept_statements(commit.kept)
    if commit.progress is not None:
        statements.append(_progress_statement(commit.progress))
    if commit.reserved_seq is not None:
        statements.append(set_meta("reserved_seq", str(commit.reserved_seq)))
    return statements


def merge_statements(statements: Sequence[Statement]) -> list[Statement]:
    """Leave out what a later statement of the same kind writes over; the order of the others stays."""
    last: dict[tuple[str, Values], int] = {}
    for index, (text, values) in enumerate(statements):
        keys = _KEY_COUNTS.get(text)
        last[text, values[:keys] if keys else (index,)] = index
    return [statements[index] for index in sorted(last.values())]


def dump_statements(rows: Iterable[TableRow], objects: Iterable[tuple[ObjectKey, Facts]]) -> list[Statement]:
    """Return what writes all that is known into an empty cache."""
    return [*(upsert(row) for row in rows), *(_object_statement(key, facts) for key, facts in objects)]


def alert_statement(row: Values) -> Statement:
    """Return the statement that writes a row of `alerts`."""
    columns = ("fingerprint", "alertname", "cluster", "run_id", "starts_at", "ends_at")
    return _upsert_sql("alerts", columns, ("fingerprint",)), tuple(row)


def forget_alert_statement(fingerprint: str) -> Statement:
    """Return the statement that deletes a row of `alerts`."""
    return "DELETE FROM alerts WHERE fingerprint = ?", (fingerprint,)


def set_meta(key: str, value: str) -> Statement:
    """Return the statement that writes a value of `meta`."""
    return "INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", (
        key,
        value,
    )


def cluster_statement(name: str, columns: JsonObject) -> Statement:
    """Return the statement that writes some columns of a row of `clusters`."""
    values = {"name": name, "priority": 100, "connected": 0, **columns}
    return _upsert_sql("clusters", tuple(values), ("name",), tuple(columns)), tuple(values.values())


def last_event_statement(name: str, at: str) -> Statement:
    """Return the statement that notes when a cluster told something."""
    return "UPDATE clusters SET last_event_at = ?2 WHERE name = ?1", (name, at)


def watch_statement(scope: Scope, columns: JsonObject) -> Statement:
    """Return the statement that writes some columns of a row of `watches`."""
    values = {"cluster": scope.cluster, "resource": scope.resource, "namespace": scope.namespace, **columns}
    return _upsert_sql("watches", tuple(values), scope._fields, tuple(columns)), tuple(values.values())


def retention_statements(seq: int, before: str) -> list[Statement]:
    """Return the statements that let old history go."""
    return [
        ("DELETE FROM changes WHERE seq < ?", (seq - _CHANGES_KEPT,)),
        changes_held_after(seq - _CHANGES_KEPT - 1),
        ("DELETE FROM run_events WHERE local_timestamp < ? AND run_id NOT IN (SELECT run_id FROM runs)", (before,)),
        (
            "DELETE FROM meta WHERE key GLOB ? AND substr(key, ?) NOT IN (SELECT run_id FROM runs)",
            (KEPT_META + "*", len(KEPT_META) + 1),
        ),
    ]


def changes_held_after(seq: int) -> Statement:
    """Return what notes that no change up to a number need be there any more."""
    return (
        "INSERT INTO meta (key, value) VALUES ('changes_after', CAST(max(0, ?) AS TEXT)) ON CONFLICT (key) DO UPDATE"
        " SET value = CAST(max(CAST(value AS INTEGER), CAST(excluded.value AS INTEGER)) AS TEXT)"
    ), (seq,)


def stream_statements(cursor: Cursor, reserved: int) -> list[Statement]:
    """Return what lets a stream go on in an empty cache."""
    metas = {"stream": cursor.stream, "begun_at": str(cursor.seq), "reserved_seq": str(reserved)}
    return [*(set_meta(key, value) for key, value in metas.items()), changes_held_after(cursor.seq)]


def authorize(action: int, first: str | None, second: str | None) -> int:
    """Return SQLite's answer to what a statement wants: reading is allowed, and functions that are harmless."""
    if action in (SQLITE_SELECT, SQLITE_READ, SQLITE_RECURSIVE):
        return SQLITE_OK
    if action == SQLITE_FUNCTION and (second or first or "").lower() in _FUNCTIONS:
        return SQLITE_OK
    return SQLITE_DENY


_KEY_COUNTS: Final[dict[str, int]] = {  # of an upsert's text: its values begin with so many that name the row
    last_event_statement("", "")[0]: 1
}
_SQL_TEXTS: Final[dict[tuple[str, tuple[str, ...], tuple[str, ...]], str]] = {}


def _upsert_sql(
    table: str, columns: tuple[str, ...], keys: tuple[str, ...], updated: tuple[str, ...] | None = None
) -> str:
    cache_key = table, columns, updated or ()
    text = _SQL_TEXTS.get(cache_key)
    if text is None:
        marks = ", ".join("?" * len(columns))
        set_ = ", ".join(f"{name} = excluded.{name}" for name in updated or columns if name not in keys)
        text = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks}) ON CONFLICT ({', '.join(keys)}) "  # noqa: S608
        text += f"DO UPDATE SET {set_}" if set_ else "DO NOTHING"
        _SQL_TEXTS[cache_key] = text
        _KEY_COUNTS[text] = len(keys)
    return text


def _change_statements(change: Change) -> list[Statement]:
    row = change.row
    statements = [] if isinstance(row, ClusterRow) else _row_statements(change.type, row)
    text = change.row_json or format_record(row)
    values = change.seq, change.type, row.cluster, change.at, text, _before_text(change)
    statements.append(("INSERT INTO changes (seq, type, cluster, at, row, before) VALUES (?, ?, ?, ?, ?, ?)", values))
    return [*statements, *(_event_statement(event, change.at) for event in run_events_of(change))]


def _event_statement(event: RunEvent, at: str) -> Statement:
    payload = format_json_text(event.payload)
    return (
        "INSERT INTO run_events (id, run_id, event_type, payload, cluster_timestamp, local_timestamp)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (event.id, event.run_id, event.event_type, payload, event.cluster_timestamp, at),
    )


def _kept_statements(kept: KeptLines) -> list[Statement]:
    before = "DELETE FROM run_events WHERE run_id = ? AND event_type = 'log_line'", (kept.run_id,)
    return [before, *(_event_statement(event, kept.at) for event in kept.events)]


def _before_text(change: Change) -> str | None:
    """Return the columns that were other before, as JSON; None where there was no row."""
    if change.previous is None:
        return None
    named = zip(change.row._fields, change.row, change.previous)
    return format_json_text({name: was for name, value, was in named if value != was})


def change_from(seq: int, change_type: str, at: str, row_text: str, before_text: str | None) -> Change:
    """Return a change as `changes` holds it."""
    kind = _KIND_OF_CHANGE.get(change_type.partition(":")[0], ClusterRow)
    said = {name: value for name, value in (parse_json_object(row_text) or {}).items() if name in kind._fields}
    before = None if before_text is None else parse_json_object(before_text)
    was = None if before is None else {**said, **{name: before[name] for name in before if name in kind._fields}}
    return Change(seq, change_type, kind(**said), None if was is None else kind(**was), at)


_KIND_OF_CHANGE: Final[dict[str, type[Row]]] = {
    "run": Run,
    "schedule": Schedule,
    "volume": Volume,
    "warning": ClusterEvent,
}


def _row_statements(change_type: str, row: TableRow) -> list[Statement]:
    if change_type == "run:removed":
        return [("DELETE FROM run_events WHERE run_id = ?", row_key(row)), _delete_statement(row)]
    if change_type.endswith(":removed") and not getattr(row, "deleted_at", None):
        return [_delete_statement(row)]
    return [upsert(row)]


def _delete_statement(row: TableRow) -> Statement:
    table = _TABLE_OF[type(row)]
    keys = _KEY_COLUMNS.get(table, ("cluster", "namespace", "name"))
    return f"DELETE FROM {table} WHERE {' AND '.join(f'{name} = ?' for name in keys)}", row_key(row)  # noqa: S608


_PROGRESS_COLUMNS: Final = (*Scope._fields, "resource_version", "synced_at")
_OBJECT_COLUMNS: Final = (*ObjectKey._fields, "uid", "run", "facts")


def _object_statement(key: ObjectKey, facts: Facts | None) -> Statement:
    if facts is None:
        return "DELETE FROM objects WHERE cluster = ? AND resource = ? AND namespace = ? AND name = ?", tuple(key)
    text = _upsert_sql("objects", _OBJECT_COLUMNS, ObjectKey._fields)
    return text, (*key, facts.uid, facts.id, format_record(facts))


def _progress_statement(progress: Progress) -> Statement:
    text = _upsert_sql("watches", _PROGRESS_COLUMNS, Scope._fields, _PROGRESS_COLUMNS[3:])
    return text, (*progress.scope, progress.resource_version, progress.synced_at)


# ----------------------------------------------------------------------------------------------------------------------
# Schema: large commits
# ----------------------------------------------------------------------------------------------------------------------


class LateStatements:
    """What a commit writes, made when it is written: statements of ten thousand objects would wait with 15 MB."""

    def __init__(self, commit: Commit) -> None:
        self._commit = commit

    def __len__(self) -> int:
        """Return about how many there are."""
        return 3 * len(self._commit.changes) + len(self._commit.objects) + 2

    def __iter__(self) -> Iterator[Statement]:
        return iter(commit_statements(self._commit))


WriteUnit = Union[list[Statement], LateStatements]  # what is written together


def commit_parts(commit: Commit) -> Iterator[Commit]:
    """Yield a large commit in parts to be written one after the other; only the last brings the cache up to a version.

    Where a crash lets the others stand alone, the scope has no version, is listed anew and made whole.
    """
    size = max(len(commit.changes), len(commit.objects))
    reserved = commit.reserved_seq  # before the first number is used
    last = max(0, size - 1) // COMMIT_CHANGES * COMMIT_CHANGES
    for start in range(0, last, COMMIT_CHANGES):
        end = start + COMMIT_CHANGES
        yield Commit(commit.changes[start:end], commit.objects[start:end], reserved_seq=reserved)
        reserved = None
    yield commit._replace(changes=commit.changes[last:], objects=commit.objects[last:], reserved_seq=reserved)


# ----------------------------------------------------------------------------------------------------------------------
# Schema: lists
# ----------------------------------------------------------------------------------------------------------------------


def candidates_statement(wanted: str) -> Statement:
    """Return the statement that reads the runs among which pick_run picks."""
    columns = ", ".join(Run._fields)
    if not wanted.startswith("@"):
        text = f"SELECT {columns} FROM runs WHERE run_id = ? OR id = ? OR (run_id >= ? AND run_id < ?)"  # noqa: S608
        wanted = clip(wanted) or ""
        return text, (wanted, wanted, wanted, wanted + "\U0010ffff")
    where = {"@latest": "1", f"@{UNKNOWN}": "status IS NULL"}.get(wanted, "status = ?")
    values = (clip(wanted[1:]),) if "?" in where else ()
    return f"SELECT {columns} FROM runs WHERE {where} ORDER BY created_at DESC, run_id DESC LIMIT 1", values  # noqa: S608


_STATE_SQL: Final = "CASE WHEN suspended THEN 'suspended' WHEN active THEN 'active' ELSE 'waiting' END"


def list_statement(kind: type[TableRow], wanted: Filter, selection: Selection) -> Statement:
    """Return the statement that reads a list, in the order that select_rows gives."""
    order, values, conditions = LIST_ORDERS[kind], list[Any](), list[str]()
    table = next(name for name, each in TABLES.items() if each is kind)
    for column, words in (("cluster", wanted.clusters), *wanted.columns):
        if words:
            marks = f"IN ({', '.join('?' * len(words))})"
            or_unknown = " OR status IS NULL" if column == "status" and UNKNOWN in words else ""
            or_label = f" OR id {marks}" if column == "run_id" and kind is Run else ""
            value = _STATE_SQL if column == "state" else column
            conditions.append(f"({value} {marks}{or_unknown}{or_label})")
            values += sorted(words) * (2 if or_label else 1)
    if selection.since:
        conditions.append(f"{order.time} >= ?")
        values.append(selection.since)
    falling = (order.falling and not selection.sort_by) != selection.reverse
    direction = "DESC" if falling else "ASC"
    sorting = [f"{selection.sort_by or order.sort_by} {direction} NULLS LAST"]
    sorting += [f"{key} {direction}" for key in key_columns(kind)]
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    limit = f" LIMIT {selection.limit}" if selection.limit else ""
    columns = ", ".join(kind._fields)
    return f"SELECT {columns} FROM {table}{where} ORDER BY {', '.join(sorting)}{limit}", tuple(values)  # noqa: S608


# ----------------------------------------------------------------------------------------------------------------------
# Metrics
# ----------------------------------------------------------------------------------------------------------------------

_RUN_LABELS: Final = ("cluster", "namespace", "run_id", "spec_id")
METRICS: Final[dict[str, tuple[str, str, tuple[str, ...]]]] = {  # name -> kind, help, labels
    "fabrik_daemon_build_info": ("gauge", "Always 1; what runs here.", ("version", "python", "protocol")),
    "fabrik_daemon_cluster_connected": ("gauge", "1 while every watch of it misses nothing.", ("cluster",)),
    "fabrik_daemon_sync_lag_seconds": (
        "gauge",
        "Since the last event, list or bookmark was processed, by the watch furthest behind.",
        ("cluster", "resource"),
    ),
    "fabrik_daemon_clock_skew_seconds": ("gauge", "The API server's clock less this one.", ("cluster",)),
    "fabrik_daemon_credentials_expiry_timestamp_seconds": (
        "gauge",
        "When the present credentials expire, where that is known.",
        ("cluster",),
    ),
    "fabrik_daemon_list_total": ("counter", "Lists taken in, or failed.", ("cluster", "resource", "result")),
    "fabrik_daemon_watch_total": ("counter", "Watches opened, or failed.", ("cluster", "resource", "result")),
    "fabrik_daemon_reconnects_total": ("counter", "Watches that went on after trouble.", ("cluster", "resource")),
    "fabrik_daemon_events_total": ("counter", "Events of objects that were processed.", ("cluster", "resource")),
    "fabrik_daemon_events_dropped_total": ("counter", "Events that subscribers lost by not reading.", ()),
    "fabrik_daemon_events_dropped": ("untyped", "The same as fabrik_daemon_events_dropped_total.", ()),
    "fabrik_daemon_event_to_subscriber_seconds": (
        "histogram",
        "From taking in an event to its line on the way to the subscribers.",
        (),
    ),
    "fabrik_daemon_event_to_cache_seconds": ("histogram", "From a change to its commit in cache.db.", ()),
    "fabrik_daemon_cache_size": ("gauge", "Runs in the cache.", ("cluster",)),
    "fabrik_daemon_cache_requests_total": (
        "counter",
        "Reading requests; a hit is one that was answered from what is known.",
        ("result",),
    ),
    "fabrik_daemon_cache_hit_ratio": ("gauge", "Hits among the reading requests; NaN before the first.", ()),
    "fabrik_daemon_cache_queue_length": ("gauge", "Writes that wait for cache.db.", ()),
    "fabrik_daemon_subscribers": ("gauge", "Subscribers to changes.", ()),
    "fabrik_daemon_subscriber_queue_length": ("gauge", "Lines that wait for subscribers, all together.", ()),
    "fabrik_daemon_log_queue_length": ("gauge", "Log lines that wait for Loki.", ("target",)),
    "fabrik_daemon_log_lines_total": ("counter", "Log lines for Loki, sent or dropped.", ("target", "result")),
    "fabrik_daemon_alerts_firing": ("gauge", "Alerts that the daemon sends now.", ("cluster", "alertname")),
    "fabrik_daemon_alerts_direct": (
        "gauge",
        "1 where the daemon sends a cluster's alerts itself: the rules keep silent there.",
        ("cluster",),
    ),
    "fabrik_daemon_deliveries_total": (
        "counter",
        "Requests to services of LAOS: taken, refused for good, or failed for the moment.",
        ("target", "result"),
    ),
    "fabrik_daemon_delivery_timestamp_seconds": ("gauge", "When a service of LAOS last took a request.", ("target",)),
    "fabrik_daemon_metrics_timestamp_seconds": ("gauge", "When these values were read.", ()),
    "fabrik_runs": ("gauge", "Runs that are known.", ("cluster", "status")),
    "fabrik_runs_omitted": ("gauge", "Runs that would have series of their own, but are too many.", ()),
    "fabrik_run_pending_since_timestamp_seconds": ("gauge", "Since when a run is pending.", _RUN_LABELS),
    "fabrik_run_blocked_since_timestamp_seconds": (
        "gauge",
        "Since when a run waits, at its human gate or for what the reason says.",
        (*_RUN_LABELS, "phase", "reason"),
    ),
    "fabrik_run_heartbeat_timestamp_seconds": (
        "gauge",
        "When a run that is running last reported, by its cluster's clock.",
        _RUN_LABELS,
    ),
    "fabrik_run_failed_timestamp_seconds": (
        "gauge",
        "When a run failed, for an hour from then.",
        (*_RUN_LABELS, "reason"),
    ),
    "fabrik_schedule_missed": ("gauge", "Runs that a schedule has missed.", ("cluster", "namespace", "schedule")),
}
METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_FAILED_S: Final = 3600.0  # how long a failed run keeps its series


class Sample(NamedTuple):
    """One value of a metric, its labels in the order of the declaration."""

    name: str
    labels: tuple[str, ...]
    value: float


class Histogram:
    """How often something took how long; one thread observes, any may read."""

    def __init__(self) -> None:
        self.counts = [0] * (len(_BOUNDS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float, count: int = 1) -> None:
        """Count a duration, of one or of several."""
        self.counts[bisect.bisect_left(_BOUNDS, seconds)] += count
        self.sum += seconds * count

    def copy(self) -> Histogram:
        """Return it as it is now."""
        copied = Histogram()
        copied.counts, copied.sum = list(self.counts), self.sum
        return copied

    def buckets(self) -> list[tuple[str, float]]:
        """Return the upper bounds, and how many durations were not above each."""
        return list(zip((*map(str, _BOUNDS), "+Inf"), itertools.accumulate(self.counts)))


class Meter:
    """Counts what happens in the loop; the cache's thread has its histogram for itself."""

    def __init__(self) -> None:
        self.histograms = {name: Histogram() for name, (kind, _, _) in METRICS.items() if kind == "histogram"}
        self._counts: dict[tuple[str, tuple[str, ...]], float] = {}

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        """Add to a counter."""
        self._counts[name, labels] = self._counts.get((name, labels), 0) + by

    def value(self, name: str, *labels: str) -> float:
        """Return a counter."""
        return self._counts.get((name, labels), 0)

    def samples(self) -> list[Sample]:
        """Return the counters as they are."""
        return [Sample(name, labels, value) for (name, labels), value in self._counts.items()]


class StatusTimes:
    """Since when each run that is pending, running or blocked is so, by its cluster's clock where that told."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def load(self, times: Iterable[tuple[str, str | None]]) -> None:
        """Take over what the cache knows."""
        self._since.update((run_id, epoch) for run_id, at in times if (epoch := epoch_of(at)) is not None)

    def take(self, change: Change) -> None:
        """Take in a change."""
        row, before = change.row, change.previous
        if not isinstance(row, Run):
            return
        if change.type == "run:removed" or row.status in TERMINAL or row.status is None:
            self._since.pop(row.run_id, None)
        elif not isinstance(before, Run) or before.status != row.status or row.run_id not in self._since:
            seen = epoch_of(change.at) or 0.0
            told = epoch_of(row.created_at if row.status == PENDING else row.updated_at) or seen
            self._since[row.run_id] = min(told, seen)

    def of(self, run_id: str) -> float | None:
        """Return since when a run has its status, where it is an active one."""
        return self._since.get(run_id)


def run_samples(runs: Sequence[Run], times: StatusTimes, clusters: Iterable[str], now: float) -> Iterator[Sample]:
    """Yield what there is to say of runs: how many there are, and of those that need somebody, each."""
    counts = {(cluster, status): 0 for cluster in clusters for status in STATUSES}
    wanted: list[tuple[bool, str, Run]] = []
    for run in runs:
        key = run.cluster, run.status or UNKNOWN
        counts[key] = counts.get(key, 0) + 1
        if run.status not in TERMINAL or (run.status == FAILED and _failed_at(run, now)):
            wanted.append((run.status == BLOCKED, run.created_at or "", run))
    for labels, count in counts.items():
        yield Sample("fabrik_runs", labels, count)
    for cluster in sorted({cluster for cluster, _ in counts}):
        size = sum(count for (of, _), count in counts.items() if of == cluster)
        yield Sample("fabrik_daemon_cache_size", (cluster,), size)
    wanted.sort(key=lambda each: each[:2], reverse=True)
    yield Sample("fabrik_runs_omitted", (), max(0, len(wanted) - METRIC_RUNS))
    for _, _, run in wanted[:METRIC_RUNS]:
        yield from _samples_of(run, times, now)


def _failed_at(run: Run, now: float) -> float | None:
    """Return when a run failed, None where that is over, or not known."""
    failed_at = epoch_of(run.finished_at or run.updated_at)
    return failed_at if failed_at is not None and now - failed_at < _FAILED_S else None


def _samples_of(run: Run, times: StatusTimes, now: float) -> Iterator[Sample]:
    labels = run.cluster, run.namespace, run.run_id, run.spec_id or ""
    since, heartbeat = times.of(run.run_id), epoch_of(run.heartbeat_at)
    if run.status == PENDING and since is not None:
        yield Sample("fabrik_run_pending_since_timestamp_seconds", labels, since)
    elif run.status == BLOCKED and since is not None:
        more = run.phase or "", run.reason or ""
        yield Sample("fabrik_run_blocked_since_timestamp_seconds", labels + more, since)
    elif run.status == RUNNING and heartbeat is not None:
        yield Sample("fabrik_run_heartbeat_timestamp_seconds", labels, heartbeat)
    elif run.status == FAILED:
        failed_at = _failed_at(run, now) or now
        yield Sample("fabrik_run_failed_timestamp_seconds", (*labels, run.reason or ""), failed_at)


class _Collected:
    """What prometheus-client asks for the metrics of one moment: its protocol for custom collectors."""

    def __init__(self, samples: Iterable[Sample], histograms: Mapping[str, Histogram]) -> None:
        self._samples: dict[str, list[Sample]] = {}
        self._histograms = histograms
        for sample in samples:
            self._samples.setdefault(sample.name, []).append(sample)

    def collect(self) -> Iterator[prometheus_client.Metric]:
        """Yield a family for each metric that has a value."""
        families = prometheus_client.metrics_core
        for name, (kind, help_text, labels) in METRICS.items():
            if kind == "histogram" and name in self._histograms:
                known = self._histograms[name]
                yield families.HistogramMetricFamily(name, help_text, buckets=known.buckets(), sum_value=known.sum)
            elif name in self._samples:
                made = {
                    "gauge": families.GaugeMetricFamily,
                    "counter": families.CounterMetricFamily,
                    "untyped": families.UntypedMetricFamily,
                }[kind](name, help_text, labels=labels)
                for sample in self._samples[name]:
                    made.add_metric(sample.labels, sample.value)
                yield made


def format_metrics(samples: Iterable[Sample], histograms: Mapping[str, Histogram], *others: Any) -> bytes:
    """Return metrics in Prometheus' text format, those of other collectors after them."""
    registry = prometheus_client.CollectorRegistry(auto_describe=False)
    for collector in (_Collected(samples, histograms), *others):
        registry.register(collector)
    return bytes(prometheus_client.generate_latest(registry))


def samples_of_cluster(samples: Iterable[Sample], cluster: str) -> list[Sample]:
    """Return the samples that tell of one cluster, or of none in particular."""
    found = []
    for sample in samples:
        labels = METRICS[sample.name][2]
        if "cluster" not in labels or sample.labels[labels.index("cluster")] == cluster:
            found.append(sample)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# HTTP
# ----------------------------------------------------------------------------------------------------------------------


class ResponseHead(NamedTuple):
    """Status and headers of a response; header names in lower case."""

    status: int
    headers: dict[str, str]


class ResponseEnd(NamedTuple):
    """The response is whole; `reusable` says whether the connection can take another request."""

    reusable: bool


ResponsePart = Union[ResponseHead, bytes, ResponseEnd]


class ChunkedBody:
    """Takes a chunked body apart (RFC 9112, section 7.1), a read at a time.

    h11 does too, but makes three events of each chunk, and of a watch each line is one: 17 us a line against 2.
    """

    _LINE_BYTES = 4096  # of a chunk's size with its extensions, or of a trailer

    def __init__(self) -> None:
        self._size = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")
        self._rest = b""  # of a line that is not whole yet
        self._left = 0  # bytes of the present chunk
        self._expected: bytes | None = None  # what must come next, after a chunk; None: a chunk's size
        self._in_trailers = False
        self.is_ended = False

    def receive(self, data: bytes) -> bytes:
        """Return the body's bytes in what was received. Raises ProtocolError for what is no chunk."""
        data, at, parts = self._rest + data, 0, []
        self._rest = b""
        while at < len(data) and not self.is_ended:
            if self._left:
                parts.append(data[at : at + self._left])
                at += len(parts[-1])
                self._left -= len(parts[-1])
                continue
            after = self._after_line(data, at)
            if after == at:
                self._rest = data[at:]
                break
            at = after
        return b"".join(parts)

    def _after_line(self, data: bytes, at: int) -> int:
        """Return where the line that begins at a place ends, the same place where it is not whole yet."""
        if self._expected is not None:
            if not self._expected.startswith(data[at : at + 2]):
                raise ProtocolError("a chunk that does not end where it should")
            if len(data) - at < 2:
                return at
            self._expected = None
            return at + 2
        if self._in_trailers:
            end = data.find(b"\r\n", at, at + self._LINE_BYTES)
            self.is_ended = end == at
        else:
            size = self._size.match(data, at)
            end = size.end() - 2 if size else -1
            if size:
                self._left = int(size[1], 16)
                self._expected, self._in_trailers = (b"\r\n", False) if self._left else (None, True)
        if end < 0 and (len(data) - at >= self._LINE_BYTES or (not self._in_trailers and b"\n" in data[at:])):
            raise ProtocolError("a chunk without a size")
        return end + 2 if end >= 0 else at


class HttpClientCodec:
    """The client side of HTTP/1.1 (RFC 9112): one request after the other on one connection."""

    def __init__(self, authority: str) -> None:
        self._authority = authority
        self._connection = self._begin()
        self._inflate: Any | None = None
        self._chunks: ChunkedBody | None = None
        self._is_reusable = True

    @staticmethod
    def _begin() -> h11.Connection:
        return h11.Connection(h11.CLIENT, max_incomplete_event_size=HEADERS_MAX_BYTES)

    def send_get(self, target: str, headers: Mapping[str, str], *, compressed: bool) -> bytes:
        """Return the bytes of a request. Raises ProtocolError where the last response is not through."""
        encoding = [("Accept-Encoding", "gzip")] if compressed else []
        return self.send("GET", target, [*headers.items(), *encoding])

    def send_post(self, target: str, headers: Mapping[str, str], body: bytes) -> bytes:
        """Return the bytes of a request with a JSON body. Raises as `send_get` does."""
        return self.send("POST", target, [*headers.items(), ("Content-Type", "application/json")], body)

    def send(self, method: str, target: str, headers: Iterable[tuple[str, str]], body: bytes = b"") -> bytes:
        """Return the bytes of any request. Raises as `send_get` does."""
        length = [("Content-Length", str(len(body)))] if body else []
        try:
            if self._connection.our_state is not h11.IDLE:
                self._connection.start_next_cycle()
            request = h11.Request(method=method, target=target, headers=[("Host", self._authority), *headers, *length])
            events = [request, *([h11.Data(data=body)] if body else []), h11.EndOfMessage()]
            return b"".join(bytes(self._connection.send(event) or b"") for event in events)
        except h11.LocalProtocolError:  # whose words may hold the token
            raise ProtocolError("this request cannot be sent") from None

    def receive(self, data: bytes) -> Iterator[ResponsePart]:
        """Yield the parts of responses in what was received; b"" is the connection's end.

        Raises ProtocolError for bytes that are no response, and for an end inside of one: a chunked body that lacks
        its last chunk was cut off, however tidy its last line looks.
        """
        try:
            if self._chunks is None:
                yield from self._on_events(data)
            elif data:
                yield from self._on_chunks(self._chunks, data)
            else:
                raise ProtocolError("the connection broke off inside a response")
        except h11.RemoteProtocolError as error:
            raise ProtocolError(str(error) if data else "the connection broke off inside a response") from None
        except zlib.error as error:
            raise ProtocolError(f"compressed data is damaged: {error}") from None

    def _on_events(self, data: bytes) -> Iterator[ResponsePart]:
        self._connection.receive_data(data)
        while True:
            event = self._connection.next_event()
            if isinstance(event, h11.Response):
                yield self._on_head(event)
                if self._chunks is not None:
                    yield from self._on_chunks(self._chunks, self._connection.trailing_data[0])
                    return
            elif isinstance(event, h11.Data):
                yield from self._inflated(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                yield ResponseEnd(self._connection.their_state is h11.DONE)
            elif event is h11.NEED_DATA or event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                return

    def _on_head(self, response: h11.Response) -> ResponseHead:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in response.headers}
        encoding = headers.get("content-encoding", "identity")
        if encoding not in ("identity", "gzip"):
            raise ProtocolError(f"the server sent content encoding {encoding!r} without being asked")
        self._inflate = zlib.decompressobj(31) if encoding == "gzip" else None
        if "transfer-encoding" in headers and response.status_code not in (204, 304):  # h11 takes `chunked` alone
            self._chunks = ChunkedBody()
            self._is_reusable = "close" not in headers.get("connection", "").lower()
        return ResponseHead(int(response.status_code), headers)

    def _inflated(self, data: bytes) -> Iterator[bytes]:
        """Yield what a part of a body says, not all at once: a list may be thirty times as long as its bytes."""
        if self._inflate is None:
            yield data
            return
        is_whole = False
        while not is_whole:
            piece = self._inflate.decompress(data, READ_BYTES)
            data = self._inflate.unconsumed_tail
            is_whole = len(piece) < READ_BYTES and not data
            if piece:
                yield piece

    def _on_chunks(self, chunks: ChunkedBody, data: bytes) -> Iterator[ResponsePart]:
        body = chunks.receive(data)
        if body:
            yield from self._inflated(body)
        if chunks.is_ended:
            self._chunks, self._connection = None, self._begin()
            yield ResponseEnd(self._is_reusable)


class HttpRequest(NamedTuple):
    """A whole request; `query` holds each parameter's values, `headers` have names in lower case."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes


class HttpServerCodec:
    """The server side of HTTP/1.1 (RFC 9112): requests in, responses out, one after the other."""

    def __init__(self, headers_bytes: int = HEADERS_MAX_BYTES, body_bytes: int = REQUEST_MAX_BYTES) -> None:
        self._connection = h11.Connection(h11.SERVER, max_incomplete_event_size=headers_bytes)
        self._headers_bytes, self._body_bytes = headers_bytes, body_bytes
        self._request: h11.Request | None = None
        self._body = b""

    def receive(self, data: bytes) -> Iterator[HttpRequest]:
        """Yield the requests that are whole; the next comes when the response is through. Raises ProtocolError."""
        try:
            if data or self._connection.their_state is not h11.CLOSED:
                self._connection.receive_data(data)
            yield from self._requests()
        except h11.RemoteProtocolError as error:
            raise ProtocolError(str(error)) from None

    def next_requests(self) -> Iterator[HttpRequest]:
        """Yield what came meanwhile, once a response is through. Raises ProtocolError."""
        try:
            if self._connection.our_state is h11.DONE and self._connection.their_state is h11.DONE:
                self._connection.start_next_cycle()
                yield from self._requests()
        except h11.RemoteProtocolError as error:
            raise ProtocolError(str(error)) from None

    @property
    def is_open(self) -> bool:
        """Whether the connection can take another request after this response."""
        return self._connection.our_state in (h11.IDLE, h11.DONE, h11.SEND_RESPONSE, h11.SEND_BODY)

    @property
    def is_partial(self) -> bool:
        """Whether a request has begun and not ended."""
        return self._connection.their_state is h11.SEND_BODY or bool(self._connection.trailing_data[0])

    def head(self, status: int, headers: Iterable[tuple[str, str]]) -> bytes:
        """Return the head of a response whose body comes in chunks."""
        return self._send(h11.Response(status_code=status, headers=[*headers, ("X-Content-Type-Options", "nosniff")]))

    def switch(self, headers: Iterable[tuple[str, str]]) -> tuple[bytes, bytes]:
        """Return the response that leaves HTTP (101), and what the client has sent in the new protocol already."""
        sent = self._send(h11.InformationalResponse(status_code=101, headers=list(headers)))
        return sent, bytes(self._connection.trailing_data[0])

    def chunk(self, data: bytes) -> bytes:
        """Return a part of a response's body."""
        wanted = self._request is not None and self._request.method != b"HEAD"
        return self._send(h11.Data(data=data)) if data and wanted else b""

    def end(self) -> bytes:
        """Return the end of a response."""
        return self._send(h11.EndOfMessage())

    def _send(self, event: h11.Event) -> bytes:
        return bytes(self._connection.send(event) or b"")

    def _requests(self) -> Iterator[HttpRequest]:
        while True:
            event = self._connection.next_event()
            if isinstance(event, h11.Request):
                self._request, self._body = event, b""
                if sum(len(name) + len(value) for name, value in event.headers) > self._headers_bytes:
                    raise ProtocolError(f"headers of over {self._headers_bytes} bytes")
            elif isinstance(event, h11.Data):
                self._body += event.data
                if len(self._body) > self._body_bytes:
                    raise ProtocolError(f"a request of over {self._body_bytes} bytes")
            elif isinstance(event, h11.EndOfMessage) and self._request is not None:
                yield self._whole(self._request)
            else:
                return
            if self._connection.our_state is h11.SEND_RESPONSE and self._connection.client_is_waiting_for_100_continue:
                raise ProtocolError("Expect: 100-continue is not supported")

    def _whole(self, request: h11.Request) -> HttpRequest:
        path, _, query = request.target.decode("latin-1").partition("?")
        parameters = urllib.parse.parse_qs(query, keep_blank_values=True)
        headers: dict[str, str] = {}
        for name, value in request.headers:
            key, text = name.decode("latin-1"), value.decode("latin-1")
            headers[key] = f"{headers[key]}, {text}" if key in headers else text
        if "transfer-encoding" in headers and "content-length" in headers:
            raise ProtocolError("a request with two lengths")  # RFC 9112, 6.1: how requests are smuggled past proxies
        return HttpRequest(
            request.method.decode("latin-1"), urllib.parse.unquote(path), parameters, headers, self._body
        )


# ----------------------------------------------------------------------------------------------------------------------
# Watch decoding
# ----------------------------------------------------------------------------------------------------------------------


class WatchEvent(NamedTuple):
    """One line of a watch: its type and object (kubernetes.io, API concepts, "Efficient detection of changes")."""

    type: str
    object: JsonObject
    facts: Facts | None = None  # of the object, where the decoder knows them; it then holds little but their names

    def project(self, resource_name: str) -> Facts | None:
        """Return what is kept of the object, as `facts_from` does, of shared texts."""
        facts = self.facts or facts_from(resource_name, self.object)
        return shared(facts) if facts and facts is not self.facts else facts

    @property
    def name(self) -> tuple[str, str]:
        """Namespace and name of the object."""
        metadata = object_at(self.object, "metadata")
        return text_at(metadata, "namespace") or "", text_at(metadata, "name") or ""

    @property
    def resource_version(self) -> str:
        """The opaque version that this event brings its watch up to; empty where it carries none."""
        value = object_at(self.object, "metadata").get("resourceVersion")
        return value if isinstance(value, str) else ""

    @property
    def ends_initial_list(self) -> bool:
        """Whether this bookmark says that a streamed list is whole."""
        annotations = object_at(self.object, "metadata", "annotations")
        marked = annotations.get("k8s.io/initial-events-end") == "true"
        return self.type == "BOOKMARK" and marked and bool(self.resource_version)


def slim_line(line: bytes, *, keeps_spec: bool) -> bytes | None:
    """Return a watch's line without `metadata.managedFields` and, unless it is kept, `spec`; None for another shape.

    That is half of a Pod's bytes, and parsing is a third of what an event costs. Inside a JSON string every quote is
    escaped, so what is looked for cannot stand in one. API servers write managedFields last in metadata: the first
    bracket that closes must be the list's own, just before `},"spec":{`. A spec ends where the status begins that is
    as deep in the object; of another one the brackets do not match, and the line does not parse.
    """
    start = line.find(b',"managedFields":[')
    end = line.find(b"]", start)
    if start < 0 or not line.startswith(b'},"spec":{', end + 1):
        return None
    if keeps_spec:
        return line[:start] + line[end + 1 :]
    status = line.find(b',"status":{', end)
    return line[:start] + b"}" + line[status:] if status >= 0 else None


class LineDecoder:
    """Takes the body of a watch apart: one JSON object a line, whatever the chunks.

    Events come without managedFields, where those were easily left out; those of Pods without `spec`, too, unless it
    may tell of a sidecar.
    """

    def __init__(self, resource_name: str) -> None:
        self._keeps_spec = resource_name != PODS.name
        self._pieces: list[bytes] = []  # of the unfinished line; joining them at each chunk would be quadratic
        self._pieces_bytes = 0

    def receive(self, data: bytes) -> Iterator[WatchEvent]:
        """Yield the events of all lines that are complete. Raises ProtocolError."""
        *lines, rest = data.split(b"\n")
        if lines:
            lines[0] = b"".join((*self._pieces, lines[0]))
            self._pieces, self._pieces_bytes = [], 0
        self._pieces.append(rest)
        self._pieces_bytes += len(rest)
        if self._pieces_bytes > ITEM_MAX_BYTES:
            raise ProtocolError(f"a line of over {ITEM_MAX_BYTES} bytes")
        for line in lines:
            if line.strip():
                yield self._event(line)

    def _event(self, line: bytes) -> WatchEvent:
        try:
            slim = slim_line(line, keeps_spec=self._keeps_spec or SIDECAR.encode() in line)
            value = parse_json(slim.decode("utf-8", "replace")) if slim else None
            value = value or json.loads(line.decode("utf-8", "replace"))
            kind, item = value["type"], value["object"]
        except (ValueError, RecursionError, KeyError, TypeError):
            raise ProtocolError("a line that is no watch event") from None
        if not isinstance(kind, str) or not isinstance(item, dict):
            raise ProtocolError("a line that is no watch event")
        return WatchEvent(kind, item)


class ReportCut(NamedTuple):
    """A Pod's line, cut around what every report changes. `head` names the event's type and the Pod."""

    head: bytes
    version: str
    annotations: bytes
    rest: bytes  # labels, owners, spec, status: all else but managedFields


def cut_report(line: bytes) -> ReportCut | None:
    """Return the parts of a Pod's line as API servers write it, None for another shape.

    As with slim_line none of what is looked for can stand in a string. That the parts are the metadata's own is for
    the caller to see, once for each head and rest: what JSON means does not depend on what a value is.
    """
    version = line.find(b',"resourceVersion":"')
    version_end = line.find(b'"', version + 20)
    start = line.find(b',"annotations":{', version_end)
    managed = line.find(b',"managedFields":[', start)
    managed_end = line.find(b"]", managed)
    if (
        min(version, start, managed) < 0
        or not line[version + 20 : version_end].isalnum()
        or not line.startswith(b'},"spec":{', managed_end + 1)
    ):
        return None
    end = line.find(b',"ownerReferences":[', start, managed)
    end = end if end >= 0 else line.find(b',"finalizers":[', start, managed)
    end = end if end >= 0 else managed
    rest = b"".join((line[version_end:start], line[end:managed], line[managed_end:]))
    return ReportCut(line[:version], line[version + 20 : version_end].decode(), line[start + 15 : end], rest)


class _KnownPod(NamedTuple):
    """What a Pod's last line said besides its report."""

    type: str
    rest: int  # its hash
    facts: PodFacts
    labels: Report  # what they report


class PodLineDecoder(LineDecoder):
    """A LineDecoder for Pods, which parses and projects only the annotations of a line where nothing else is new.

    Those are most of what a run has to tell, and that is a tenth of the work. What else a line says is compared with
    the line before by a hash of 64 bits (PEP 456): two states in a row of one Pod agree in it once in 2**64 times.
    """

    def __init__(self) -> None:
        super().__init__(PODS.name)
        self._known: dict[bytes, _KnownPod] = {}

    def _event(self, line: bytes) -> WatchEvent:
        cut = cut_report(line)
        known = self._known.get(cut.head) if cut else None
        if cut and known and known.rest == hash(cut.rest):
            annotations = parse_json(cut.annotations.decode("utf-8", "replace"))
            if annotations is not None:
                facts = known.facts._replace(report=report_over(annotations, known.labels))
                names = {"namespace": facts.namespace, "name": facts.name}
                return WatchEvent(
                    known.type,
                    {"metadata": {**names, "resourceVersion": cut.version}},
                    facts,
                )
        event = super()._event(line)
        return self._remember(cut, event) if cut else event

    def _remember(self, cut: ReportCut, event: WatchEvent) -> WatchEvent:
        metadata, facts = object_at(event.object, "metadata"), event.project(PODS.name)
        annotations = parse_json(cut.annotations.decode("utf-8", "replace"))
        is_own = metadata.get("resourceVersion") == cut.version
        if isinstance(facts, PodFacts) and is_own and metadata.get("annotations") == annotations:
            if len(self._known) >= PODS_REMEMBERED:
                self._known.clear()
            self._known[cut.head] = _KnownPod(event.type, hash(cut.rest), facts, label_report(metadata))
        return event._replace(facts=facts)


class ListDecoder:
    """Takes a list response apart item by item while it arrives: `{"metadata": {...}, "items": [{...}, ...]}`."""

    _SPACE = late(lambda: re.compile(r"[\s,]*"))
    _FIRST_RETRY_CHARS = 64 * 1024

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._scan = json.JSONDecoder().raw_decode
        self._text = ""
        self._at = 0
        self._retry_chars = 0  # an unfinished value is tried again when as much text has come as it had
        self._inside: str | None = None  # None: before the object; "object", "items", "end"
        self._head: JsonObject = {}

    def receive(self, data: bytes, *, last: bool = False) -> Iterator[JsonObject]:
        """Yield the items that are complete, as they are asked for. Raises ProtocolError, at `last` for what lacks."""
        self._text = self._text[self._at :] + self._utf8.decode(data, last)
        self._at = 0
        if len(self._text) > ITEM_MAX_BYTES and self._retry_chars > ITEM_MAX_BYTES:
            raise ProtocolError(f"an item of over {ITEM_MAX_BYTES} bytes")
        if last or len(self._text) >= self._retry_chars:
            yield from self._values(last)
        if last and self._inside != "end":
            raise ProtocolError("a list that is cut off or no JSON")
        if last and "items" not in self._head:
            raise ProtocolError("an answer that is no list")  # taken for an empty one, it would end every run

    @property
    def resource_version(self) -> str:
        """The version of the whole list; empty where it carries none."""
        value = object_at(self._head, "metadata").get("resourceVersion")
        return value if isinstance(value, str) else ""

    @property
    def continue_token(self) -> str:
        """What asks for the next page; empty on the last."""
        value = object_at(self._head, "metadata").get("continue")
        return value if isinstance(value, str) else ""

    def _values(self, last: bool) -> Iterator[JsonObject]:
        while self._inside != "end":
            start = self._SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            here = self._text[start : start + 1]
            if not here:
                return
            if self._inside == "items" and here != "]":
                item = self._value(start, last)
                if item is None:
                    return
                if not isinstance(item[0], dict):
                    raise ProtocolError("a list whose items are no objects")
                yield item[0]
            elif not self._member(start, here, last):
                return

    def _member(self, start: int, here: str, last: bool) -> bool:
        """Take in one step of the outer object; False where more text is needed."""
        if (self._inside is None and here == "{") or self._inside == "items":
            self._inside, self._at = "object", start + 1
        elif self._inside == "object" and here == "}":
            self._inside, self._at = "end", start + 1
        elif self._inside == "object":
            return self._key_and_value(start, last)
        else:
            raise ProtocolError("a list that is no JSON object")
        return True

    def _key_and_value(self, start: int, last: bool) -> bool:
        before = self._at
        key = self._value(start, last)
        colon = self._SPACE.match(self._text, self._at).end() if key else 0  # type: ignore[union-attr]
        value_at = self._SPACE.match(self._text, colon + 1).end() if key else 0  # type: ignore[union-attr]
        if key is None or value_at >= len(self._text):
            self._at = before
            return False
        if not isinstance(key[0], str) or self._text[colon] != ":":
            raise ProtocolError("a list that is no JSON object")
        if key[0] == "items" and self._text[value_at] == "[":
            self._inside, self._at = "items", value_at + 1
            self._head["items"] = None
            return True
        value = self._value(value_at, last)
        if value is None:
            self._at = before
            return False
        self._head[key[0]] = value[0]
        return True

    def _value(self, start: int, last: bool) -> tuple[Any] | None:
        """Return the value at a place and go past it, None where it is not whole yet."""
        try:
            value, end = self._scan(self._text, start)
        except (ValueError, RecursionError):
            value, end = None, len(self._text)
        if end >= len(self._text):  # nothing follows it: a number might go on
            if last:
                raise ProtocolError("a list that is cut off or no JSON")
            rest = len(self._text) - self._at
            self._retry_chars = 2 * rest if rest > self._FIRST_RETRY_CHARS else 0
            return None
        self._at, self._retry_chars = end, 0
        return (value,)


class Refusal(NamedTuple):
    """What a response that is no 200, or an ERROR event, says."""

    code: int
    message: str  # for people
    retry_after_s: float | None = None

    @property
    def is_expired(self) -> bool:
        """Whether a resource version or continue token is too old."""
        return self.code == 410


def refusal_from_status(code: int, status: JsonObject) -> Refusal:
    """Return what a Status object says (kubernetes.io, API reference, Status)."""
    said = parse_int(status.get("code")) or code
    message = text_at(status, "message") or text_at(status, "reason") or f"HTTP {said}"
    return Refusal(said, message, _seconds(object_at(status, "details").get("retryAfterSeconds")))


def refusal_from_response(head: ResponseHead, body: bytes) -> Refusal:
    """Return what a refusing response says: a Status, plain text (429), or nothing but its code."""
    text = body.decode("utf-8", "replace")
    status = parse_json_object(text)
    if status is not None and ("status" in status or "message" in status):  # a 504's Status lacks kind
        refusal = refusal_from_status(head.status, status)._replace(code=head.status)
    else:
        refusal = Refusal(head.status, clip(" ".join(text.split())[:200]) or f"HTTP {head.status}")
    retry_after_s = _seconds(head.headers.get("retry-after"))
    return refusal._replace(retry_after_s=retry_after_s) if retry_after_s is not None else refusal


def _seconds(value: object) -> float | None:
    seconds = parse_int(value)
    return None if seconds is None else float(min(seconds, 3600))


# ----------------------------------------------------------------------------------------------------------------------
# Watch machine
# ----------------------------------------------------------------------------------------------------------------------

CONNECTING: Final = "connecting"
LISTING: Final = "listing"
WATCHING: Final = "watching"
BACKING_OFF: Final = "backing off"
FORBIDDEN: Final = "forbidden"
UNAUTHORISED: Final = "unauthorised"
STALE: Final = "stale"  # the server fell silent: nobody knows what happened since
_WAITING: Final = frozenset((BACKING_OFF, FORBIDDEN, UNAUTHORISED, STALE))
_NO_STREAMING: Final = frozenset((400, 405, 422, 501))  # how servers refuse sendInitialEvents


class Get(NamedTuple):
    """Send a GET; what came of an earlier list that was not swapped in is void, but for a list's further pages."""

    target: str
    watch: bool
    first_page: bool


class HangUp(NamedTuple):
    """Close the connection, if there is one."""


class Keep(NamedTuple):
    """Keep an event of an initial list until it is swapped in."""

    event: WatchEvent


class Apply(NamedTuple):
    """Take in an event of an object."""

    event: WatchEvent


class Advance(NamedTuple):
    """Everything up to this resource version is known."""

    resource_version: str


class Swap(NamedTuple):
    """The list is whole: let it take the place of what was known."""

    resource_version: str


class Renew(NamedTuple):
    """The credentials were refused: resolve them anew."""


class Told(NamedTuple):
    """The watch is in another state; `error` says why, to a person."""

    state: str
    error: str
    retry_at: float | None  # monotonic; None where it goes on by itself

    def after(self, error: str) -> Told:
        """Return it with what went wrong before, which holds until the watch is open again."""
        return self._replace(error=self.error or error) if self.state in (CONNECTING, LISTING) else self


Action = Union[Get, HangUp, Keep, Apply, Advance, Swap, Renew, Told]


class ServerTraits:
    """What was learnt of one cluster's API server, by whichever of its watches."""

    def __init__(self) -> None:
        self.streams_lists = True  # WatchList; until it refuses, or never ends an initial list
        self.sends_bookmarks = True  # until it is silent where they were due, twice in a row, and never sent one
        self._has_sent_one = False

    def patience(self, timing: Timing) -> float:
        """Return how long a watch may be silent, in seconds, before it counts as dead."""
        return timing.idle if self.sends_bookmarks else timing.watch_timeout * 2 + timing.idle

    def on_bookmark(self) -> None:
        """Take in a bookmark: silence is never this server's way."""
        self.sends_bookmarks = self._has_sent_one = True

    def on_silence(self, *, again: bool) -> None:
        """Take in that a watch told nothing where a bookmark was due; once may be its connection's fault."""
        self.sends_bookmarks = self._has_sent_one or not again


class WatchTarget(NamedTuple):
    """What a machine follows."""

    path: str
    what: str  # for people: "pods in fabrik-runs"
    label_selector: str | None = None


Jitter = Callable[[], float]  # a number from [0, 1), each as likely


class Backoff:
    """How long to wait after a failure: exponentially longer with full jitter, or as long as the server asks."""

    def __init__(self, timing: Timing, jitter: Jitter) -> None:
        self._timing = timing
        self._jitter = jitter
        self.failures = 0

    def recover(self, healthy_s: float) -> None:
        """Begin anew after some health."""
        if healthy_s >= self._timing.backoff_reset:
            self.failures = 0

    def delay(self, retry_after_s: float | None) -> float:
        """Count a failure and return the seconds to wait."""
        ceiling = min(self._timing.backoff_max, self._timing.backoff_min * 2.0 ** min(self.failures, 30))
        self.failures += 1
        return ceiling * self._jitter() if retry_after_s is None else retry_after_s + self._jitter()


class _Position:
    """How far a collection is known, and the queries that go on from there."""

    def __init__(self, selector: str | None, version: str | None) -> None:
        self._selector = {"labelSelector": selector} if selector else {}
        self.version = version  # where the watch goes on; None: list first
        self.seen = version  # the last version told, kept when the watch cannot go on from it
        self.is_consistent = False  # the next list must be the store's own word, not the server's memory
        self.token = ""  # asks for a list's next page
        self.is_paged = True

    def advance(self, version: str) -> None:
        """Take note that everything up to a version is known."""
        self.version = self.seen = version

    def swap(self, version: str) -> None:
        """Take note that a list is whole."""
        self.advance(version)
        self.token, self.is_paged, self.is_consistent = "", True, False

    def lose(self, *, is_paged: bool = True) -> None:
        """Take note that the version is of no use: list anew, from the store."""
        self.version, self.token, self.is_paged, self.is_consistent = None, "", is_paged, True

    def goes_back(self, version: str) -> bool:
        """Say whether a version is plainly lower than the one before."""
        seen = self.seen or ""
        return version.isdigit() and seen.isdigit() and int(version) < int(seen)

    def list_query(self) -> dict[str, str]:
        """List from the server's memory the first time, then no older than what was seen, else from the store."""
        paging = {"limit": str(LIST_PAGE_ITEMS)} if self.is_paged else {}
        if self.token:
            return {**self._selector, **paging, "continue": self.token}
        if self.is_consistent:
            return {**self._selector, **paging}
        if self.seen:
            return {**self._selector, "resourceVersion": self.seen, "resourceVersionMatch": "NotOlderThan"}
        return {**self._selector, **paging, "resourceVersion": "0"}  # the server ignores the limit then

    def watch_query(self, seconds: float, *, streams_list: bool) -> dict[str, str]:
        """Watch, or have the server send what there is as events first (API concepts, "Streaming lists")."""
        query = {**self._selector, "watch": "true", "allowWatchBookmarks": "true"}
        query["timeoutSeconds"] = str(max(1, int(seconds)))
        if streams_list:
            return {**query, "sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
        return {**query, "resourceVersion": self.version or ""}


class _Request:
    """The present request, and what came of it."""

    def __init__(self, began_at: float, *, initial: bool) -> None:
        self.began_at = began_at
        self.initial = initial  # a watch that begins with an initial list, which has not ended
        self.is_open = False  # its response has begun
        self.heard = False  # any event at all, bookmarks included
        self.events = 0  # of objects


class WatchMachine:
    """Follows one collection as client-go's reflector does: list, watch, go on; expire, back off, begin again.

    It does no I/O. Each method takes the monotonic time and returns what to do; `deadline` is when `due` wants to be
    called. Resource versions are opaque and only sent back; but where one is plainly lower than the one before, the
    server has an older state than it had, and everything is listed anew.
    """

    def __init__(
        self,
        target: WatchTarget,
        traits: ServerTraits,
        timing: Timing,
        jitter: Jitter,
        resource_version: str | None = None,
    ) -> None:
        self._target = target
        self._traits = traits
        self._timing = timing
        self._jitter = jitter
        self._backoff = Backoff(timing, jitter)
        self._position = _Position(target.label_selector, resource_version)
        self._request = _Request(0.0, initial=False)
        self._renewed = self._was_silent = False
        self._due_at = self._healthy_since = 0.0
        self._relist_at = math.inf
        self.state = CONNECTING

    @property
    def deadline(self) -> float:
        """When `due` is to be called; it may move on meanwhile."""
        following = self.state == WATCHING and self._request.is_open
        return min(self._due_at, self._relist_at) if following else self._due_at

    def start(self, now: float) -> list[Action]:
        """Begin, or begin again at once."""
        if self._position.version is not None:
            return self._watch(now)
        return self._watch(now, initial=True) if self._traits.streams_lists else self._list(now)

    def relist(self, reason: str, now: float) -> list[Action]:
        """List everything anew from the store; what there is to know meanwhile is not known."""
        self.forget()
        return [HangUp(), *self._enter(LISTING, reason, now), *self.start(now)]

    def forget(self) -> None:
        """Have the next start list everything anew."""
        self._position.lose()

    def recycle(self, reason: str, now: float) -> list[Action]:
        """Give up a connection that cannot be trusted any more, and go on from the last event a moment later."""
        return [HangUp(), *self._enter(STALE, reason, now + self._timing.backoff_min * self._jitter())]

    def heard(self, now: float) -> None:
        """Take note of bytes: the connection lives."""
        if not self._request.initial:
            self._due_at = now + self._patience()

    def on_page(self, resource_version: str, continue_token: str, now: float) -> list[Action]:
        """Take in the end of a list response, all items of which the caller has kept."""
        if continue_token:
            self._position.token = continue_token
            return self._list(now)
        if self._position.goes_back(resource_version) and not self._position.is_consistent:
            return self.relist("resource versions went back", now)
        return [*self._swap(resource_version, now), *self._watch(now)]

    def on_watch_open(self, now: float) -> list[Action]:
        """Take in the head of a watch's response."""
        self._renewed, self._request.is_open = False, True
        listed_by = now + self._timing.initial_list
        return self._enter(LISTING, "", listed_by) if self._request.initial else self._follow(now)

    def on_event(self, event: WatchEvent, now: float) -> list[Action]:  # noqa: PLR0911 - one return a kind
        """Take in one event of a watch."""
        self._request.heard, self._was_silent = True, False
        if event.type == "ERROR":
            return self.on_refusal(refusal_from_status(500, event.object), now)
        version = event.resource_version
        if self._request.initial and not event.ends_initial_list:
            return [Keep(event)] if event.type != "BOOKMARK" else []  # without order, and advancing nothing
        if self._request.initial:
            self._request.initial = False
            return [*self._swap(version, now), *self._follow(now)]
        if version and self._position.goes_back(version):
            return self.relist("resource versions went back", now)
        if event.type == "BOOKMARK" and version:
            self._traits.on_bookmark()
            self._position.advance(version)
            return [Advance(version)]
        if event.type not in ("ADDED", "MODIFIED", "DELETED") or not version:
            return self.on_failure(f"an event of type {event.type[:20]!r}, or without a version", now)
        self._request.events += 1
        self._position.advance(version)
        return [Apply(event)]

    def on_watch_end(self, now: float) -> list[Action]:
        """Take in a watch's clean end: its time is over, go on from the last version."""
        if self._request.initial:
            return self._without_streaming(now)
        if not self._request.events and now - self._request.began_at < EMPTY_WATCH_S:
            return self.on_failure("the server ends watches at once", now)
        was_blind = not self._request.heard and now - self._request.began_at > self._timing.idle
        return self.relist("", now) if was_blind else self._watch(now)  # the server may never have had this version

    def on_refusal(self, refusal: Refusal, now: float) -> list[Action]:
        """Take in a response other than 200, or an ERROR event."""
        if self._request.initial and refusal.code in _NO_STREAMING:
            return self._without_streaming(now)
        if refusal.is_expired:
            return self._expired(now)
        if refusal.code == 401:
            return self._unauthorised(refusal, now)
        if refusal.code == 403:
            error = f"no right to {'list' if self.state == LISTING else 'watch'} {self._target.what}: {refusal.message}"
            return [HangUp(), *self._enter(FORBIDDEN, error, now + self._timing.forbidden_retry)]
        if refusal.code in (400, 422) or "resourceversion" in refusal.message.lower().replace(" ", ""):
            self._position.lose()  # too large, or not one of this server's
        return self.on_failure(refusal.message, now, refusal.retry_after_s)

    def on_failure(
        self, error: str, now: float, retry_after_s: float | None = None, *, state: str = BACKING_OFF
    ) -> list[Action]:
        """Take in that there was no connection, or no more: go on from the last whole event after a while."""
        self._backoff.recover(now - self._healthy_since if self.state == WATCHING else 0.0)
        self._renewed, self._position.token = self._renewed and state != UNAUTHORISED, ""
        return [HangUp(), *self._enter(state, error, now + self._backoff.delay(retry_after_s))]

    def due(self, now: float) -> list[Action]:
        """Take in that the deadline has come."""
        if self.state in _WAITING:
            return self.start(now)
        if now < self._due_at:  # a consistent list catches what no event told
            return self.relist("", now)
        if not self._request.is_open:
            return self.on_failure(f"no answer for {self._timing.answer:g} s", now)
        if self._request.initial:
            return self._without_streaming(now)
        error = f"silent for {now - self._due_at + self._patience():.0f} s"
        if self.state == WATCHING and not self._request.heard:  # a server without bookmarks, or not its version
            self._traits.on_silence(again=self._was_silent)
            self._was_silent = True
            self._position.lose()
        return self.on_failure(error, now, state=STALE)

    def _list(self, now: float) -> list[Action]:
        return self._get(self._position.list_query(), LISTING, now, initial=False)

    def _watch(self, now: float, *, initial: bool = False) -> list[Action]:
        seconds = self._timing.watch_timeout * (1 + self._jitter())
        query = self._position.watch_query(seconds, streams_list=initial)
        state = LISTING if initial else WATCHING if self.state == WATCHING else CONNECTING
        return self._get(query, state, now, initial=initial)

    def _get(self, query: Mapping[str, str], state: str, now: float, *, initial: bool) -> list[Action]:
        self._request = _Request(now, initial=initial)
        target = f"{self._target.path}?{urllib.parse.urlencode(query)}"
        return [
            *self._enter(state, "", now + self._timing.answer),
            Get(target, "watch" in query, "continue" not in query),
        ]

    def _swap(self, version: str, now: float) -> list[Action]:
        self._position.swap(version)
        self._relist_at = now + self._timing.relist * (0.9 + 0.2 * self._jitter())
        return [Swap(version)]

    def _without_streaming(self, now: float) -> list[Action]:
        self._traits.streams_lists = False
        return [HangUp(), *self._list(now)]

    def _follow(self, now: float) -> list[Action]:
        self._healthy_since, self.state = self._healthy_since if self.state == WATCHING else now, WATCHING
        return self._enter(WATCHING, "", now + self._patience())

    def _patience(self) -> float:
        following = self.state == WATCHING and self._request.is_open
        return self._traits.patience(self._timing) if following else self._timing.answer

    def _expired(self, now: float) -> list[Action]:
        """List anew: at once the first time, then paced; an expired continue token asks for one list without pages."""
        self._position.lose(is_paged=not self._position.token)
        self._backoff.recover(now - self._healthy_since if self.state == WATCHING else 0.0)
        if self._backoff.failures:
            return self.on_failure("the resource version expired", now)
        self._backoff.failures = 1
        again = self.start if self._position.is_paged else self._list
        return [HangUp(), *self._enter(LISTING, "the resource version expired", now), *again(now)]

    def _unauthorised(self, refusal: Refusal, now: float) -> list[Action]:
        error = f"the credentials were refused: {refusal.message}"
        if self._renewed:
            return self.on_failure(error, now, state=UNAUTHORISED)
        self._renewed = True
        self._enter(UNAUTHORISED, error, now + self._timing.credentials + self._timing.backoff_max)
        return [HangUp(), Told(UNAUTHORISED, error, None), Renew()]

    def _enter(self, state: str, error: str, due_at: float) -> list[Action]:
        self.state, self._due_at = state, due_at
        return [Told(state, error, due_at if state in _WAITING else None)]


# ----------------------------------------------------------------------------------------------------------------------
# Watch machine: log lines
# ----------------------------------------------------------------------------------------------------------------------


class LogLine(NamedTuple):
    """One line of a container; `time` is RFC 3339 to the nanosecond, empty where the kubelet itself speaks."""

    time: str
    text: str


_LOG_LINE = late(
    lambda: re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d)) ?(.*)", re.ASCII | re.DOTALL)
)


class LogDecoder:
    """Takes the body of a Pod's log apart that was asked for with `timestamps=true`, whatever the chunks."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def receive(self, data: bytes) -> Iterator[LogLine]:
        """Yield the lines that are complete; what a line has beyond 256 KiB is left out."""
        *lines, rest = data.split(b"\n")
        for line in lines:
            self._add(line)
            yield self._line()
        self._add(rest)

    def end(self) -> Iterator[LogLine]:
        """Yield the last line, where it lacks its newline; only a body that came whole has one."""
        if self._rest:
            yield self._line()

    def _add(self, piece: bytes) -> None:
        self._rest += piece[: LOG_LINE_MAX_BYTES - len(self._rest)]

    def _line(self) -> LogLine:
        text = self._rest.decode("utf-8", "replace").rstrip("\r")
        self._rest.clear()
        match = _LOG_LINE.fullmatch(text)
        return LogLine(match[1], match[2]) if match else LogLine("", text)


class LogCursor:
    """How far the log of a Pod's container was read, over its restarts.

    `sinceTime` has whole seconds on the kubelet's side, so what is asked for again begins before the last line. A log
    is read in the order it was written: what comes up to that line was there before, what follows is new.
    """

    def __init__(self) -> None:
        self._last: LogLine | None = None
        self._equal = 0  # how many lines like the last one stood at its time
        self._recent: deque[LogLine] = deque(maxlen=LOG_LINES_KNOWN)
        self._to_find = 0  # so many lines like the last one are still to come before anything is new
        self._may_differ = False

    @property
    def since(self) -> str | None:
        """What to ask from; None: from the start."""
        epoch = epoch_of(self._last.time) if self._last is not None else None
        return None if epoch is None else format_time(epoch // 1 - 1)  # times may jump back by a little between streams

    def resume(self, *, may_differ: bool) -> None:
        """Expect what is there from `since` on: the log that was read before, or where it may differ a later one."""
        self._to_find, self._may_differ = self._equal, may_differ

    def take(self, line: LogLine) -> bool | None:
        """Say whether a line is new; None where this cannot be the log that it should be."""
        if self._to_find and line == self._last:
            self._to_find -= 1
            return False
        if self._to_find and (line in self._recent or not self._is_later(line)):
            return False
        if self._to_find and not self._may_differ:
            return None
        self._to_find = 0
        self._keep(line)
        return True

    @property
    def is_behind(self) -> bool:
        """Whether the line to go on from has not come."""
        return self._to_find > 0

    def _is_later(self, line: LogLine) -> bool:
        epochs = epoch_of(line.time), epoch_of(self._last.time if self._last is not None else "")
        return epochs[0] is not None and epochs[1] is not None and epochs[0] > epochs[1]

    def _keep(self, line: LogLine) -> None:
        if not line.time:
            return  # the kubelet's own words do not come again
        self._equal = self._equal + 1 if line == self._last else 1
        self._last = line
        self._recent.append(line)


class ContainerView(NamedTuple):
    """How a container of a Pod is, as far as its log goes; `number` counts its restarts."""

    name: str
    number: int
    state: str  # waiting: nothing to read; running; terminated
    reason: str
    failed: bool = False  # it ended with another code than 0


class PodView(NamedTuple):
    """A Pod of a run, as far as its logs go."""

    name: str
    uid: str
    created_at: str
    phase: str
    deleting: bool
    chosen: str  # the container that is meant where none is named
    containers: tuple[ContainerView, ...]

    @property
    def is_over(self) -> bool:
        """Whether none of its containers will run again."""
        return self.phase in ("Succeeded", "Failed")

    @property
    def culprit(self) -> str:
        """The container that failed, the main one where none did."""
        return next((container.name for container in self.containers if container.failed), self.chosen)

    def container(self, name: str | None) -> ContainerView | None:
        """Return a container, the main one for None; None where there is no such."""
        wanted = name or self.chosen
        return next((container for container in self.containers if container.name == wanted), None)


def pod_view(item: JsonObject) -> PodView:
    """Return what following its logs needs of a Pod."""
    metadata, spec, status = object_at(item, "metadata"), object_at(item, "spec"), object_at(item, "status")
    told = list_at(status, "containerStatuses") + list_at(status, "initContainerStatuses")
    states = {text_at(entry, "name"): _container_view(entry) for entry in told}
    main = [text_at(entry, "name") or "" for entry in list_at(spec, "containers")]
    names = main + [text_at(entry, "name") or "" for entry in list_at(spec, "initContainers")]
    annotated = object_at(metadata, "annotations").get("kubectl.kubernetes.io/default-container")
    return PodView(
        name=text_at(metadata, "name") or "",
        uid=text_at(metadata, "uid") or "",
        created_at=text_at(metadata, "creationTimestamp") or "",
        phase=text_at(status, "phase") or "",
        deleting="deletionTimestamp" in metadata,
        chosen=annotated if isinstance(annotated, str) and annotated in names else next(iter(main), ""),
        containers=tuple(states.get(name) or ContainerView(name, 0, "waiting", "") for name in names),
    )


def _container_view(entry: JsonObject) -> ContainerView:
    """Return a container's state; one that waits to start again can be read as it ended (kubelet, log endpoint)."""
    waiting = object_at(entry, "state", "waiting")
    if object_at(entry, "state", "running"):
        state = "running"
    elif object_at(entry, "state", "terminated") or object_at(entry, "lastState", "terminated"):
        state = "terminated"
    else:
        state = "waiting"
    number = parse_int(entry.get("restartCount")) or 0
    failed = object_at(entry, "state", "terminated").get("exitCode", 0) != 0
    return ContainerView(text_at(entry, "name") or "", number, state, text_at(waiting, "reason") or "", failed)


# ----------------------------------------------------------------------------------------------------------------------
# Watch machine: pod logs
# ----------------------------------------------------------------------------------------------------------------------


class LogWish(NamedTuple):
    """What of a run's log is wanted."""

    follow: bool = False
    previous: bool = False  # the container before the present one
    container: str | None = None
    since_s: float | None = None
    tail: int | None = None


class FindPods(NamedTuple):
    """List the run's Pods, and look whether its Job is over."""


class OpenLog(NamedTuple):
    """Read a log, from a time or a number of lines before its end, or whole."""

    pod: str
    container: str
    previous: bool
    follow: bool
    since: str | None = None
    since_s: float | None = None
    tail: int | None = None

    @property
    def query(self) -> str:
        """The request's parameters (PodLogOptions)."""
        known = {
            "container": self.container,
            "timestamps": "true",
            "previous": "true" if self.previous else None,
            "follow": "true" if self.follow else None,
            "sinceTime": self.since,
            "sinceSeconds": None if self.since_s is None else max(1, math.ceil(self.since_s)),
            "tailLines": self.tail,
        }
        return urllib.parse.urlencode({name: value for name, value in known.items() if value is not None})


class CloseLog(NamedTuple):
    """Read no more of the present log."""


class Pause(NamedTuple):
    """Call `due` after some seconds."""

    seconds: float


class ShowLine(NamedTuple):
    """Show a line."""

    pod: str
    container: str
    line: LogLine


class Say(NamedTuple):
    """Tell the user something beside the log."""

    text: str


class LogOver(NamedTuple):
    """There is no more; `error` says what is wrong with that, `is_gone` that there is no Pod to read from."""

    error: str = ""
    is_gone: bool = False
    is_unreachable: bool = False


LogAction = Union[FindPods, OpenLog, CloseLog, Pause, ShowLine, Say, LogOver]


class _Pauses:
    """How long to wait before the next try: doubling, with jitter, as far as back-off goes."""

    def __init__(self, timing: Timing, jitter: Callable[[], float]) -> None:
        self._timing = timing
        self._jitter = jitter
        self.failures = 0  # since a line came

    def next(self, doublings: int = 16) -> Pause:
        self.failures += 1
        longest_s = self._timing.backoff_min * 2.0 ** min(self.failures - 1, doublings)
        return Pause(min(self._timing.backoff_max, longest_s) * (1 + self._jitter()) / 2)


class LogMachine:
    """Reads one run's log over connections that break, containers that restart and Pods that are replaced.

    The kubelet knows of a restart before the API server does, so what the API server says of it is only a hint: where
    another log comes than was read before, or a restart is told of, the log of the container before the present one is
    read from the last line on, then the present one's.
    """

    def __init__(self, wish: LogWish, timing: Timing, jitter: Callable[[], float]) -> None:
        self._wish = wish
        self._pauses = _Pauses(timing, jitter)
        self._cursor = LogCursor()
        self._pod: PodView | None = None  # as it was last seen
        self._number = 0  # the restarts of its container that the API server told of
        self._earlier = False  # the container before the present one is to be read first
        self._may_differ = False  # the present one may be another than that of the last line
        self._whole = False  # the present one was read to its end
        self._reading: OpenLog | None = None
        self._has_news = False  # that has brought a new line
        self._passed: set[str] = set()  # uids of Pods that need no reading any more
        self._said = ""

    def due(self) -> list[LogAction]:
        """Begin, go on after a pause, or look around after a long silence."""
        return [FindPods()]

    def on_line(self, line: LogLine) -> list[LogAction]:
        """Take in a line of the log that is read."""
        reading = self._reading
        if reading is None:
            return []
        is_new = self._cursor.take(line)
        if is_new is None:
            self._reading = None
            self._turn()
            return [CloseLog(), FindPods()]
        if not reading.previous and not self._cursor.is_behind:
            self._may_differ = False
        if is_new:
            self._pauses.failures, self._said, self._has_news = 0, "", True
            return [ShowLine(reading.pod, reading.container, line)]
        return []

    def on_log_end(self, status: int, error: str) -> list[LogAction]:
        """Take in that the log has ended: `status` is HTTP's, 0 for a lost connection; no `error`: it came whole."""
        reading, self._reading = self._reading, None
        if reading is None:
            return []
        if self._earlier and (not error or status == 400):  # 400: there is none before
            self._earlier = self._has_news  # the container may have been restarted again meanwhile
            return [FindPods()]
        if error:
            self._earlier = self._may_differ  # nobody knows which log this was
            return self._on_failure(status, error)
        if self._cursor.is_behind and not self._may_differ:
            self._turn()
            return [self._pauses.next(LOG_POLL_DOUBLINGS)]
        self._whole = not reading.follow
        if not self._wish.follow:
            return [LogOver()]
        # It may have ended with its container, of which the API server has yet to learn.
        return [FindPods()] if self._whole else [self._pauses.next(LOG_POLL_DOUBLINGS)]

    def on_pods(self, pods: Sequence[PodView], *, over: bool | None) -> list[LogAction]:
        """Take in the run's Pods, and whether its Job is over; None: unknown."""
        pods = sorted(pods, key=lambda pod: (pod.created_at, pod.name))
        if self._reading is None:
            return self._next(pods, over)
        if not self._reading.follow:
            return []
        container = self._present(pods)
        if container is not None and container.number == self._number and container.state == "running":
            return []
        self._reading = None
        return [CloseLog(), *self._next(pods, over)]

    def on_trouble(self, status: int, error: str) -> list[LogAction]:
        """Take in that the Pods cannot be listed."""
        return [] if self._reading is not None else self._on_failure(status, error)

    def _next(self, pods: Sequence[PodView], over: bool | None) -> list[LogAction]:
        """Read on where there is something to read."""
        actions = self._rest_of_present(pods) if self._pod is not None else []
        if actions:
            return actions
        others = [pod for pod in pods if pod.uid not in self._passed and (not self._pod or pod.uid != self._pod.uid)]
        if others:
            return self._begin(others, pods)
        if over or (over is None and all(pod.is_over for pod in pods)):
            return [LogOver(is_gone=self._pod is None)]
        if not self._wish.follow:
            return [LogOver("it has no Pod yet")]
        return self._look_again("it waits for its Pod" if self._pod is None else "")

    def _rest_of_present(self, pods: Sequence[PodView]) -> list[LogAction]:
        """Read on in the present Pod; nothing where that was read whole."""
        container, pod = self._present(pods), self._pod
        if pod is None:
            return []
        if container is None:
            self._passed.add(pod.uid)
            was_whole, self._whole = self._whole, True
            return [] if was_whole else [Say(f"Pod {pod.name} is gone, maybe with its last lines"), FindPods()]
        told = self._on_number(container)
        if self._whole:
            self._passed.update({pod.uid} if pod.is_over else ())
            return []
        return [*told, self._open(container)]

    def _on_number(self, container: ContainerView) -> list[LogAction]:
        missing = container.number - self._number
        if missing <= 0:
            return []
        self._number = container.number
        self._turn()
        is_lost = missing > 1 and self._wish.follow
        lost = f" {missing} times: what it printed in between may be missing" if is_lost else ""
        return [Say(f"container {container.name} was restarted{lost}")]

    def _present(self, pods: Sequence[PodView]) -> ContainerView | None:
        """Return the container that is read as it is now."""
        for pod in pods:
            if self._pod is not None and pod.uid == self._pod.uid:
                self._pod = pod
                return pod.container(self._wish.container)
        return None

    def _begin(self, others: Sequence[PodView], pods: Sequence[PodView]) -> list[LogAction]:
        """Begin to read a Pod: at first the newest, then each that comes."""
        pod = others[0]
        if self._pod is None:
            pod = next((other for other in reversed(others) if not other.deleting), others[-1])
            self._passed.update(other.uid for other in others[: others.index(pod)])
        container = pod.container(self._wish.container)
        if container is None:
            hint = nearest(str(self._wish.container), [container.name for container in pod.containers])
            return [LogOver(f"Pod {pod.name} has no container {self._wish.container!r}: {hint}")]
        if self._wish.previous:
            return self._begin_previous(pod, container, [other for other in pods if other.created_at < pod.created_at])
        if container.state == "waiting":
            return self._on_waiting(pod, container)
        told: list[LogAction] = []
        if self._pod is not None:
            told, self._cursor = [Say(f"Pod {self._pod.name} was followed by {pod.name}")], LogCursor()
            self._turn()
        self._pod, self._number = pod, container.number
        return [*told, self._open(container)]

    def _begin_previous(self, pod: PodView, container: ContainerView, earlier: Sequence[PodView]) -> list[LogAction]:
        if container.number:
            self._pod, self._number = pod, container.number
            return [self._open(container)]
        before = earlier[-1].container(self._wish.container) if earlier else None
        if before is None or before.state == "waiting":
            return [LogOver("it has no container before the present one")]
        self._wish = self._wish._replace(previous=False)
        self._pod, self._number = earlier[-1], before.number
        return [self._open(before)]

    def _on_waiting(self, pod: PodView, container: ContainerView) -> list[LogAction]:
        told = f"Pod {pod.name} waits" + (f": {container.reason}" if container.reason else "")
        if not self._wish.follow:
            return [LogOver(told)]
        if pod.is_over:  # evicted before it began
            self._passed.add(pod.uid)
            return [*self._tell(f"Pod {pod.name} never began"), FindPods()]
        return self._look_again(told)

    def _turn(self) -> None:
        """Read the container before the present one from the last line on, then the present one."""
        if self._wish.follow:
            self._earlier = self._may_differ = True
        self._whole = False
        self._wish = self._wish._replace(since_s=None, tail=None)

    def _open(self, container: ContainerView) -> OpenLog:
        since, wish = self._cursor.since, self._wish
        previous = self._earlier or wish.previous
        follow = wish.follow and not previous and container.state == "running"
        self._cursor.resume(may_differ=self._earlier or self._may_differ or not wish.follow)
        limits = (None, None) if since else (wish.since_s, wish.tail)
        name, self._has_news = self._pod.name if self._pod is not None else "", False
        self._reading = OpenLog(name, container.name, previous, follow, since, *limits)
        return self._reading

    def _on_failure(self, status: int, error: str) -> list[LogAction]:
        given_up = self._pauses.failures + 1 >= LOG_TRIES and (not self._wish.follow or self._pod is None)
        if status == 403 or given_up:
            return [LogOver(error, is_unreachable=not status)]
        return [*self._tell(f"{error}; trying again"), self._pauses.next()]

    def _look_again(self, told: str) -> list[LogAction]:
        return [*self._tell(told), self._pauses.next(LOG_POLL_DOUBLINGS)]

    def _tell(self, text: str) -> list[LogAction]:
        """Say something once."""
        is_new, self._said = text != self._said, text
        return [Say(text)] if text and is_new else []


# ----------------------------------------------------------------------------------------------------------------------
# WebSocket
# ----------------------------------------------------------------------------------------------------------------------

SUBPROTOCOL: Final = "fabrik.v1"
WS_NORMAL: Final = 1000  # close codes: RFC 6455, section 7.4.1
WS_GOING_AWAY: Final = 1001
WS_PROTOCOL_ERROR: Final = 1002
WS_UNSUPPORTED: Final = 1003
WS_TOO_BIG: Final = 1009


def wants_websocket(http: HttpRequest) -> bool:
    """Say whether an HTTP request asks to go on as WebSocket."""
    return "websocket" in _tokens(http.headers.get("upgrade", "").lower())


def accept_websocket(http: HttpRequest) -> list[tuple[str, str]]:
    """Return the headers that accept a WebSocket (RFC 6455, section 4.2). Raises UsageError.

    Extensions are never taken up: with deflate, 64 KiB inflate to 67 MB. Of the subprotocols only our own is.
    """
    headers = http.headers
    key = headers.get("sec-websocket-key", "")
    if headers.get("sec-websocket-version", "").strip() != "13":
        raise UpgradeError("this WebSocket version is not spoken here", "send Sec-WebSocket-Version: 13")
    if http.method != "GET" or "upgrade" not in _tokens(headers.get("connection", "").lower()):
        raise UsageError("this is no WebSocket handshake", "send GET with Connection: Upgrade")
    if len(key) != WEBSOCKET_KEY_CHARS or not key.endswith("=="):
        raise UsageError("Sec-WebSocket-Key is not 16 bytes in base64")
    token = wsproto.utilities.generate_accept_token(key.encode("latin-1")).decode("ascii")
    chosen = SUBPROTOCOL in _tokens(headers.get("sec-websocket-protocol", ""))
    upgrade = [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", token)]
    return [*upgrade, ("Sec-WebSocket-Protocol", SUBPROTOCOL)] if chosen else upgrade


class WebSocketCodec:
    """The server side of WebSocket (RFC 6455) after its handshake: frames in, texts out."""

    def __init__(self) -> None:
        self._connection = wsproto.connection.Connection(wsproto.connection.ConnectionType.SERVER)
        self._parts: list[str] = []  # of a message that is not whole
        self._size = 0

    @property
    def is_open(self) -> bool:
        """Whether messages can still be sent and come."""
        return self._connection.state is wsproto.connection.ConnectionState.OPEN

    @property
    def is_partial(self) -> bool:
        """Whether a message has begun and not ended."""
        return bool(self._parts)

    def receive(self, data: bytes) -> Iterator[str | bytes]:
        """Yield each whole text message, and as bytes what must be sent back: pongs, and the close that ends it all."""
        if not self.is_open:
            return
        self._connection.receive_data(data)
        for event in self._connection.events():
            if isinstance(event, wsproto.events.TextMessage):
                yield from self._on_text(event)
            elif isinstance(event, wsproto.events.Ping):
                yield self._connection.send(event.response())
            elif isinstance(event, wsproto.events.CloseConnection):
                yield self._on_close(event)
            elif isinstance(event, wsproto.events.BytesMessage):
                yield self.close(WS_UNSUPPORTED, "requests are text")
            if not self.is_open:
                return

    def text(self, data: bytes, *, last: bool) -> bytes:
        """Return a text message, or a part of one, of UTF-8."""
        return self._connection.send(wsproto.events.TextMessage(data.decode("utf-8"), message_finished=last))

    def ping(self) -> bytes:
        """Return a ping, which every client must answer."""
        return self._connection.send(wsproto.events.Ping())

    def close(self, code: int, reason: str = "") -> bytes:
        """Return the close that says why nothing more is sent."""
        return self._connection.send(wsproto.events.CloseConnection(code, reason))

    def _on_text(self, event: wsproto.events.TextMessage) -> Iterator[str | bytes]:
        self._size += len(event.data)
        if self._size > REQUEST_MAX_BYTES:
            self._parts.clear()
            yield self.close(WS_TOO_BIG, f"a request of over {REQUEST_MAX_BYTES} bytes")
            return
        self._parts.append(event.data)
        if event.message_finished:
            text, self._parts, self._size = "".join(self._parts), [], 0
            yield text

    def _on_close(self, event: wsproto.events.CloseConnection) -> bytes:
        """Answer a close; what does not parse was turned into one, with the code that says why."""
        return self._connection.send(event.response())


def _tokens(header: str) -> list[str]:
    return [token.strip() for token in header.split(",")]


# ----------------------------------------------------------------------------------------------------------------------
# Requests
# ----------------------------------------------------------------------------------------------------------------------


class Reply(NamedTuple):
    """An answer: an object, one list of which may be long and is written in pieces."""

    body: JsonObject
    name: str = ""  # of the list, empty where there is none
    rows: Sequence[JsonObject | Row] = ()
    etag: str = ""  # the same for the same answer
    media_type: str = ""  # over HTTP, the body's `text` goes alone, as this
    members: bytes = b""  # more of it, which another process has written: a JSON object in ASCII on one line


class Later(NamedTuple):
    """An answer that takes disk or a process, to be made off the loop."""

    work: Callable[[], Reply]


class Subscribed(NamedTuple):
    """An answer that goes on: who is told what."""

    subscription: Subscription


class Unsubscribed(NamedTuple):
    """An answer that ends what a connection's subscriptions are told: one's by its mark, or (None) all of them."""

    reply: Reply
    mark: bytes | None


Answer = Union[Reply, Later, Subscribed, Unsubscribed]


class Knowledge(Protocol):
    """What requests may ask of the daemon."""

    def status(self) -> JsonObject:
        """Return what `status` answers."""

    def cache_path(self) -> str:
        """Return which cache the daemon keeps."""

    def rows(self, kind: type[TableRow], wanted: Filter) -> list[TableRow]:
        """Return the rows of a table that are asked for."""

    def freshness(self) -> list[Freshness]:
        """Return how fresh each cluster's part of an answer is."""

    def run_details(self, run: Run) -> JsonObject:
        """Return a run's events, volumes and warnings; takes disk. Raises CacheError."""

    def query(self, sql: str) -> bytes:
        """Return `columns`, `rows` and `is_cut` of user SQL as a JSON text; takes a process. Raises FabrikError."""

    def logs(self, lines: int, level: str) -> list[JsonObject]:
        """Return the last log lines of at least a level."""

    def edition(self, kind: type[TableRow]) -> str:
        """Return what is another whenever a row of a table is."""

    def subscribe(self, wish: Wish, envelope: JsonObject) -> Subscription:
        """Return a new subscription to changes."""

    def follow_logs(self, lines: int, level: str, envelope: JsonObject) -> Subscription:
        """Return a new subscription to log lines."""

    def reload(self) -> JsonObject:
        """Read the settings of clusters again; return what that changed. Raises ConfigError."""

    def shutdown(self) -> None:
        """End the daemon in order, once this has been answered."""

    def metrics(self) -> Callable[[], bytes]:
        """Read the metrics of this moment; return what makes their text, which takes a while."""


class Requests:
    """The daemon's API: a request and what it may ask of the daemon -> an answer; the same for every framing."""

    def __init__(self, knowledge: Knowledge) -> None:
        self._knowledge = knowledge
        self.hits = self.misses = 0  # of reading requests
        self._actions: dict[str, Callable[[JsonObject], Answer]] = {
            "status": lambda _: Reply(knowledge.status()),
            "healthz": lambda _: Reply({}),
            "readyz": self._readyz,
            "metrics": self._metrics,
            "ping": lambda _: Reply({}),
            "runs": lambda request: self._list(Run, request),
            "run": self._run,
            "schedules": lambda request: self._list(Schedule, request),
            "volumes": lambda request: self._list(Volume, request),
            "warnings": lambda request: self._list(ClusterEvent, request),
            "clusters": self._clusters,
            "query": self._query,
            "logs": self._logs,
            "subscribe": self._subscribe,
            "unsubscribe": self._unsubscribe,
            "reload": lambda _: Reply(knowledge.reload()),
            "shutdown": self._shutdown,
        }

    def answer(self, request: JsonObject) -> Answer:
        """Return the answer to a request. Raises FabrikError."""
        action = request.get("action")
        if not isinstance(action, str):
            raise UsageError("a request needs an action", 'write {"action": "status"}')
        if request.get("cache") not in (None, self._knowledge.cache_path()):
            raise OtherCacheError("this daemon keeps another cache", self._knowledge.cache_path())
        handle = self._actions.get(action)
        if handle is None:
            raise UsageError(f"no action {clip(action)!r}", nearest(action[:64], self._actions))
        reads = action in _READING
        try:
            answer = handle(request)
        except (NotSyncedError, NotFoundError):
            self.misses += reads
            raise
        self.hits += reads
        return answer

    def _readyz(self, _request: JsonObject) -> Reply:
        parts = self._synced(())
        return Reply({"clusters": [part._asdict() for part in parts]})

    def _list(self, kind: type[TableRow], request: JsonObject) -> Reply:
        wanted = parse_filter(request, LIST_FILTERS[kind])
        body = {"clusters": [part._asdict() for part in self._synced(wanted.clusters)]}
        rows = select_rows(self._knowledge.rows(kind, wanted), kind, parse_selection(request, kind))
        etag = etag_of(self._knowledge.edition(kind), body, request)
        return Reply(body, _LIST_NAMES[kind], rows, etag)

    def _run(self, request: JsonObject) -> Later:
        wanted = request.get("runId")
        if not isinstance(wanted, str):
            raise UsageError("run needs a run", 'write {"action": "run", "runId": "..."}')
        self._synced(())
        runs = [row for row in self._knowledge.rows(Run, Filter()) if isinstance(row, Run)]
        run = pick_run(runs, wanted)
        parts = [part._asdict() for part in self._synced({run.cluster})]

        def work() -> Reply:
            details = self._knowledge.run_details(run)
            if request.get("keptLogs") is False:
                details["events"] = [event for event in details["events"] if event["event_type"] != "log_line"]
            return Reply({"run": {**run._asdict(), **details}, "clusters": parts})

        return Later(work)

    def _clusters(self, request: JsonObject) -> Reply:
        status = self._knowledge.status()
        names = ("name", "server", "priority", "connected", "error", "last_event_at")
        body = {"clusters": [{name: row.get(name) for name in names} for row in status["clusters"]]}
        return Reply(body, etag=etag_of(body, request))

    def _query(self, request: JsonObject) -> Later:
        sql = request.get("sql")
        if not isinstance(sql, str):
            raise UsageError("query needs sql", 'write {"action": "query", "sql": "SELECT ..."}')
        parts = [part._asdict() for part in self._synced(())]
        return Later(lambda: Reply({"clusters": parts}, members=self._knowledge.query(sql)))

    def _logs(self, request: JsonObject) -> Answer:
        lines, level = _number(request, "lines", 100), request.get("level") or "debug"
        if level not in LOG_LEVELS:
            raise UsageError(f"no log level {level!r}", nearest(str(level), LOG_LEVELS))
        if request.get("follow") is True:
            return Subscribed(self._knowledge.follow_logs(lines, level, envelope(request)))
        return Reply({}, "lines", self._knowledge.logs(lines, level))

    def _subscribe(self, request: JsonObject) -> Subscribed:
        wanted = parse_filter(request, STREAM_FILTERS)
        history = min(_number(request, "includeHistory", 0), HISTORY_EVENTS)
        snapshot = request.get("snapshot", False)
        if not isinstance(snapshot, bool):
            raise UsageError("snapshot must be true or false")
        wish = Wish(wanted, history, parse_cursor(request.get("since")), snapshot)
        return Subscribed(self._knowledge.subscribe(wish, envelope(request)))

    def _unsubscribe(self, request: JsonObject) -> Unsubscribed:
        body = {"type": "unsubscribed"}
        if "subscription" not in request:
            return Unsubscribed(Reply(body), None)
        named = request["subscription"]
        return Unsubscribed(Reply({**body, "subscription": named}), identity_mark({"id": named}))

    def _metrics(self, _request: JsonObject) -> Later:
        text = self._knowledge.metrics()
        return Later(lambda: Reply({"text": text().decode()}, media_type=METRICS_TYPE))

    def _shutdown(self, _request: JsonObject) -> Reply:
        self._knowledge.shutdown()
        return Reply({})

    def _synced(self, clusters: Iterable[str]) -> list[Freshness]:
        """Return how fresh the clusters asked for are. Raises where none of them was ever synced, or one is unknown."""
        return check_synced(self._knowledge.freshness(), clusters)


TEXT_PIECE_BYTES: Final = 64 * 1024
_READING: Final = frozenset(("runs", "run", "schedules", "volumes", "warnings", "clusters", "query"))
_LIST_NAMES: Final[dict[type[TableRow], str]] = {
    Run: "runs",
    Schedule: "schedules",
    Volume: "volumes",
    ClusterEvent: "warnings",
}


def etag_of(*parts: Any) -> str:
    """Return an entity tag (RFC 9110, section 8.8.3): weak, since what goes over the wire may be compressed."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return f'W/"{hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:32]}"'


def parse_cursor(said: object) -> Cursor | None:
    """Return the cursor of a request: `{"stream": "...", "seq": 1}`, or `STREAM:SEQ`. Raises UsageError."""
    if said is None:
        return None
    if isinstance(said, str):
        stream, _, number = said.rpartition(":")
        said = {"stream": stream, "seq": parse_int(number)}
    if isinstance(said, dict) and isinstance(said.get("stream"), str) and said["stream"]:
        seq = said.get("seq")
        if isinstance(seq, int) and not isinstance(seq, bool) and 0 <= seq <= INT_MAX:
            return Cursor(said["stream"], seq)
    raise UsageError("since must be a cursor", 'write "since": {"stream": "...", "seq": 1}, as they were last told')


def check_synced(parts: Sequence[Freshness], clusters: Iterable[str]) -> list[Freshness]:
    """Return the parts of the clusters asked for (none: all). Raises where none was ever synced, or one is unknown."""
    known = [part.cluster for part in parts]
    for name in clusters:
        if name not in known:
            raise NotFoundError(f"no cluster {name!r} is known", nearest(name, known) if known else "none is")
    asked = [part for part in parts if part.cluster in clusters] if clusters else list(parts)
    if not any(part.synced_at for part in asked):
        told = "; ".join(part.error for part in asked if part.error)
        names = ", ".join(part.cluster for part in asked) or "no cluster"
        raise NotSyncedError(f"not yet synced: {names}", told or "wait a moment, or see 'fabrik-daemon clusters list'")
    return asked


def pick_run(runs: Sequence[Run], wanted: str) -> Run:
    """Return the run that a word means. Raises UsageError where it means several, NotFoundError where none.

    It is a key, a label id that is no other's, the beginning of one key alone, `@latest`, or `@blocked`, the newest of
    that status.
    """
    if wanted.startswith("@"):
        return _pick_newest(runs, wanted[1:])
    found = [run for run in runs if run.run_id == wanted] or [run for run in runs if run.id == wanted]
    if not found and wanted:
        found = [run for run in runs if run.run_id.startswith(wanted)]
    if len(found) > 1:
        keys = sorted((run.run_id for run in found), reverse=True)
        more = f" or {len(keys) - _SHOWN_AMBIGUOUS} others" if len(keys) > _SHOWN_AMBIGUOUS else ""
        raise UsageError(f"{wanted[:80]} is ambiguous", "say " + " or ".join(keys[:_SHOWN_AMBIGUOUS]) + more)
    if not found:
        raise NotFoundError(f"no run {wanted[:80]!r} is known", "see 'fabrik-daemon runs list'")
    return found[0]


_SHOWN_AMBIGUOUS: Final = 4


def _pick_newest(runs: Sequence[Run], word: str) -> Run:
    if word not in ("latest", *STATUSES, UNKNOWN):
        raise UsageError(f"nothing is called '@{word[:40]}'", nearest(word[:40], ("latest", *STATUSES, UNKNOWN)))
    found = [run for run in runs if word in ("latest", run.status or UNKNOWN)]
    if not found:
        raise NotFoundError(
            "no run is known" if word == "latest" else f"no run is {word}", "see 'fabrik-daemon runs list'"
        )
    return max(found, key=lambda run: (run.created_at or "", run.run_id))


def envelope(request: JsonObject) -> JsonObject:
    """Return what every message that answers a request carries: its id, where it has one.

    Who says with `speaks` which version and protocol it has is told ours.
    """
    told = {"speaks": [__version__, PROTOCOL]} if "speaks" in request else {}
    return {"id": request["id"], **told} if "id" in request else told


def error_message(error: FabrikError, request: JsonObject) -> JsonObject:
    """Return what answers a request that cannot be met."""
    told = {"code": error.code, "message": error.message, "hint": error.hint}
    codes = {"exit_code": error.exit_code, "http_status": error.http_status}
    return {"type": "error", **envelope(request), **told, **codes}


def reply_pieces(reply: Reply, request: JsonObject) -> Iterator[bytes]:
    """Yield a reply as one line of JSON; what is long comes in pieces, since one large dump would hold the loop."""
    head = {"type": request.get("action"), **envelope(request), **reply.body}
    if reply.members:
        yield format_line(head)[:-2] + b","
        for start in range(1, len(reply.members), TEXT_PIECE_BYTES):
            yield reply.members[start : start + TEXT_PIECE_BYTES]
        yield b"\n"
        return
    if not reply.name:
        yield format_line(head)
        return
    yield format_line(head)[:-2] + b"," + json.dumps(reply.name).encode() + b":["
    for start in range(0, len(reply.rows), SNAPSHOT_ROWS):
        rows = reply.rows[start : start + SNAPSHOT_ROWS]
        part = b",".join(format_line(row if isinstance(row, dict) else row._asdict())[:-1] for row in rows)
        yield (b"," if start else b"") + part
    yield b"]}\n"


def _number(request: JsonObject, name: str, default: int) -> int:
    value = request.get(name, default)
    number = parse_int(value) if isinstance(value, int) else None
    if number is None:
        raise UsageError(f"{name} must be a whole number, 0 or more")
    return number


# ----------------------------------------------------------------------------------------------------------------------
# Requests: routes
# ----------------------------------------------------------------------------------------------------------------------


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _no_constant(text: str) -> float:
    raise ValueError(text)


# Python's own would take NaN and 1e999, which no other reader of JSON does when an id comes back.
_REQUEST_JSON: Final = late(lambda: json.JSONDecoder(parse_float=_finite, parse_constant=_no_constant))


class RequestDecoder:
    """Takes requests out of what a client sends: each ends at a newline, or where the text is a whole JSON object."""

    def __init__(self) -> None:
        self._text = ""
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._scan = _REQUEST_JSON.raw_decode
        self.is_unfinished = False  # the last request ended without a newline

    def receive(self, data: bytes) -> Iterator[JsonObject | UsageError]:
        """Yield requests, and an error for each line that is none. Raises ProtocolError for one that is too long."""
        self._text += self._utf8.decode(data, not data)
        tail = data.rstrip()[-1:]
        if b"\n" not in data and data and tail != b"}":
            self._check_length()
            return  # nothing can have ended
        while self._text.strip():
            taken = self._take(last=not data)
            if taken is None:
                break
            yield taken
        self._check_length()

    @property
    def is_partial(self) -> bool:
        """Whether a request has begun and not ended."""
        return bool(self._text) and not self._text.isspace()

    def _check_length(self) -> None:
        if len(self._text) > REQUEST_MAX_BYTES:
            self._text = ""
            raise ProtocolError(f"a request of over {REQUEST_MAX_BYTES} bytes")

    def _take(self, *, last: bool) -> JsonObject | UsageError | None:
        text = self._text.lstrip()
        try:
            value, end = self._scan(text)
        except (ValueError, RecursionError):
            line, newline, rest = text.partition("\n")
            if not newline and not last:
                self._text = text
                return None
            self._text = rest
            return UsageError(f"this is no JSON: {clip(line[:60])!r}", 'send one object a line: {"action": "status"}')
        self._text = text[end:]
        self.is_unfinished = not self._text
        if not isinstance(value, dict):
            return UsageError("a request is a JSON object", 'write {"action": "status"}')
        return value


def request_from_text(text: str) -> JsonObject | UsageError:
    """Return the request that a text is, or the error that says why it is none."""
    try:
        said = _REQUEST_JSON.decode(text)
    except (ValueError, RecursionError):
        return UsageError(f"this is no JSON: {clip(text[:60])!r}", 'send one object: {"action": "status"}')
    return said if isinstance(said, dict) else UsageError("a request is a JSON object", 'write {"action": "status"}')


def bare_path(path: str) -> str:
    """Return a path without the /daemon that every route stands under too, and without a slash at its end."""
    return (path[len("/daemon") :] if path.startswith("/daemon/") else path).rstrip("/") or "/"


def request_from_http(http: HttpRequest) -> JsonObject:
    """Return the request that an HTTP request means. Raises NotFoundError, UsageError or MethodError."""
    path = bare_path(http.path)
    action = _ROUTES.get(path)
    request: JsonObject = {"action": action}
    if action is None and path.startswith("/v1/runs/"):
        action, request = "run", {"action": "run", "runId": path[len("/v1/runs/") :]}
    if action is None:
        raise NotFoundError(f"no route {clip(http.path)!r}", f"there are {', '.join(sorted(_ROUTES))}")
    allowed = ("POST",) if action in ("reload", "shutdown") else ("GET", "HEAD", "POST")
    if http.method not in allowed:
        raise MethodError(f"{clip(http.method)} is not possible here", f"use {allowed[0]}")
    if http.body:
        said = request_from_text(http.body.decode("utf-8", "replace"))
        if isinstance(said, UsageError):
            raise said
        request = {**said, **request}
    request = {**_query_parameters(http.query), **request}
    if action == "subscribe" and "last-event-id" in http.headers:  # an EventSource that comes back
        request["since"] = http.headers["last-event-id"]
    return request


_ROUTES: Final = {
    "/status": "status",
    "/metrics": "metrics",
    "/healthz": "healthz",
    "/readyz": "readyz",
    **{
        f"/v1/{action}": action
        for action in ("status", "runs", "schedules", "volumes", "warnings", "clusters", "query", "logs", "ping")
    },
    "/v1/stream": "subscribe",
    "/v1/reload": "reload",
    "/v1/shutdown": "shutdown",
}
_FLAGS: Final = ("follow", "snapshot")
_PARAMETERS: Final = ("id", "cache", "limit", "lines", "level", "sql", "includeHistory", "since")


def _query_parameters(query: Mapping[str, list[str]]) -> JsonObject:
    """Return a query string's parameters as a request has them: ?cluster=a&cluster=b&status=running&limit=5.

    Raises UsageError for one that no request has: what was meant to ask for less must not ask for everything.
    """
    said: JsonObject = {}
    wanted: JsonObject = {}
    for name, values in query.items():
        if name == "cluster":
            said["clusters"] = values
        elif name in _FILTER_PARAMETERS:
            wanted[name] = values
        elif name in _FLAGS:
            said[name] = values[-1] in ("", "1", "true")
        elif name in _PARAMETERS:
            number = parse_int(values[-1])
            said[name] = values[-1] if number is None else number
        else:
            known = ["cluster", *_FILTER_PARAMETERS, *_FLAGS, *_PARAMETERS]
            raise UsageError(f"no parameter {clip(name)!r}", nearest(name[:64], known))
    return {**said, "filter": wanted} if wanted else said


_FILTER_PARAMETERS: Final = sorted({*STREAM_FILTERS, *(name for names in LIST_FILTERS.values() for name in names)})


def takes_gzip(http: HttpRequest) -> bool:
    """Say whether a client asks for compressed answers (RFC 9110, section 12.5.3)."""
    for token in http.headers.get("accept-encoding", "").lower().split(","):
        coding, *parameters = (part.strip() for part in token.split(";"))
        if coding in ("gzip", "x-gzip"):
            return not any(re.fullmatch(r"q=0(\.0*)?", parameter) for parameter in parameters)
    return False


def format_server_sent(line: bytes, stream: str) -> bytes:
    """Return a subscriber's line as a Server-Sent Event (WHATWG HTML, 9.2), with an id to go on from."""
    seq = _SEQ_AT_FIRST.match(line)
    cursor = b"id: %s:%s\n" % (stream.encode(), seq[1]) if seq else b""
    return cursor + b"data: " + line + b"\n"


_SEQ_AT_FIRST: Final = late(lambda: re.compile(rb'\{"type":"(?:[a-z]+:[a-z]+|warning|seq)","seq":(\d+)'))


# ----------------------------------------------------------------------------------------------------------------------
# Requests: framings
# ----------------------------------------------------------------------------------------------------------------------


class Access(Protocol):
    """What the clients of one listener may do."""

    is_local: bool  # on the Unix socket, where one may speak JSON lines too, ask at length and be silent for long

    def check_http(self, http: HttpRequest) -> None:
        """Let an HTTP request or a WebSocket handshake pass. Raises FabrikError."""

    def check(self, request: JsonObject) -> None:
        """Let a request pass, whichever framing it came in. Raises FabrikError."""


class FullAccess:
    """Everything: for those whom the listener has known before it let them in."""

    is_local = True

    def check_http(self, http: HttpRequest) -> None:
        """Let every HTTP request pass."""

    def check(self, request: JsonObject) -> None:
        """Let every request pass."""


class Switch(NamedTuple):
    """The client goes on in another framing: what to answer it, and what it has sent in that framing already."""

    framing: Framing
    reply: bytes
    rest: bytes
    requests: Sequence[JsonObject]  # that came with the switch


Said = Union[JsonObject, FabrikError, bytes, Switch]  # a request, why it is none, or what must be sent back at once


class Framing(Protocol):
    """How the requests of one client come, and how its answers go."""

    @property
    def singly(self) -> bool:
        """Whether the client must have read one message before it is sent the next."""

    @property
    def is_open(self) -> bool:
        """Whether the client can send more requests."""

    @property
    def is_busy(self) -> bool:
        """Whether the answer to one request must end before the next is looked at."""

    @property
    def is_partial(self) -> bool:
        """Whether a request has begun and not ended."""

    def receive(self, data: bytes) -> Iterator[Said]:
        """Yield what the client said; empty data: it says no more. Raises ProtocolError."""

    def following(self) -> Iterator[Said]:
        """Yield what came meanwhile, once an answer is through. Raises ProtocolError."""

    def answer(self, answer: Reply | Subscribed | FabrikError, request: JsonObject) -> Iterator[bytes]:
        """Yield what answers a request; of a subscription, what comes before its lines."""

    def line(self, line: bytes) -> bytes:
        """Return what tells a subscriber one line."""

    def ping(self) -> bytes:
        """Return what makes a client that is there say so, where the framing has such a thing."""

    def refuse(self, error: FabrikError) -> bytes:
        """Return what tells a client that it does not keep to the protocol; nothing follows."""

    def end(self, code: int) -> bytes:
        """Return what ends the connection in order."""


def framing_for(data: bytes, access: Access) -> Framing:
    """Return the framing of a client that begins with these bytes."""
    return HttpFraming(access) if data[:1].isalpha() or not access.is_local else LinesFraming()


class LinesFraming:
    """JSON lines: a request is one JSON object, an answer is one line."""

    is_open = True
    is_busy = False

    def __init__(self) -> None:
        self._decoder = RequestDecoder()

    @property
    def singly(self) -> bool:
        """The spec's own client, known by its missing newline, takes each piece that it reads for one message."""
        return self._decoder.is_unfinished

    @property
    def is_partial(self) -> bool:
        """Whether a request has begun and not ended."""
        return self._decoder.is_partial

    def receive(self, data: bytes) -> Iterator[Said]:
        """Yield requests, and an error for each line that is none. Raises ProtocolError."""
        return self._decoder.receive(data)

    def following(self) -> Iterator[Said]:
        """Return nothing: requests need not wait for each other here."""
        return iter(())

    def answer(self, answer: Reply | Subscribed | FabrikError, request: JsonObject) -> Iterator[bytes]:
        """Yield a reply or an error."""
        return _answer_pieces(answer, request)

    def line(self, line: bytes) -> bytes:
        """Return a subscriber's line as it is."""
        return line

    def ping(self) -> bytes:
        """Return nothing: the connection's end is all that tells."""
        return b""

    def refuse(self, error: FabrikError) -> bytes:
        """Return the error."""
        return format_line(error_message(error, {}))

    def end(self, _code: int) -> bytes:
        """Return nothing: the connection just ends."""
        return b""


class HttpFraming:
    """HTTP/1.1: one request after the other; a subscription's answer goes on until the client hangs up."""

    singly = False

    def __init__(self, access: Access) -> None:
        self._access = access
        sizes = () if access.is_local else (REMOTE_HEADERS_BYTES, REMOTE_BODY_BYTES)
        self._codec = HttpServerCodec(*sizes)
        self._http: HttpRequest | None = None  # which is being answered
        self._stream: str | None = None  # which Server-Sent Events are of

    @property
    def is_open(self) -> bool:
        """Whether the connection can take another request."""
        return self._codec.is_open

    @property
    def is_busy(self) -> bool:
        """Whether a response has not ended."""
        return self._http is not None

    @property
    def is_partial(self) -> bool:
        """Whether a request has begun and not ended."""
        return self._http is None and self._codec.is_partial

    def receive(self, data: bytes) -> Iterator[Said]:
        """Yield the request that is whole, or why it cannot be met. Raises ProtocolError."""
        return map(self._said, self._codec.receive(data))

    def following(self) -> Iterator[Said]:
        """Yield the request that came meanwhile. Raises ProtocolError."""
        return map(self._said, self._codec.next_requests())

    def answer(self, answer: Reply | Subscribed | FabrikError, request: JsonObject) -> Iterator[bytes]:
        """Yield a response; of a subscription, its head."""
        if isinstance(answer, Subscribed):
            yield self._stream_head(answer.subscription)
            return
        text = answer.body["text"] if isinstance(answer, Reply) and answer.media_type else None
        media_type = answer.media_type if isinstance(answer, Reply) and answer.media_type else "application/json"
        pieces = iter([text.encode()]) if text is not None else _answer_pieces(answer, request)
        headers = [("Content-Type", media_type), ("Vary", "Accept-Encoding")]
        etag = answer.etag if isinstance(answer, Reply) else ""
        headers += [("ETag", etag), ("Cache-Control", "no-cache")] if etag else [("Cache-Control", "no-store")]
        if isinstance(answer, FabrikError):
            yield self._codec.head(answer.http_status, [*headers, *_error_headers(answer, request)])
            yield from map(self._codec.chunk, _answer_pieces(answer, request))
        elif etag and self._is_known(etag):
            yield self._codec.head(304, headers)
        elif self._http is not None and takes_gzip(self._http) and text is None:  # which would hold the loop
            yield self._codec.head(200, [*headers, ("Content-Encoding", "gzip")])
            yield from map(self._codec.chunk, _compressed(pieces))
        else:
            yield self._codec.head(200, headers)
            yield from map(self._codec.chunk, pieces)
        yield self._codec.end()
        self._http = None

    def _stream_head(self, subscription: Subscription) -> bytes:
        accepted = self._http.headers.get("accept", "") if self._http is not None else ""
        self._stream = subscription.stream if "text/event-stream" in accepted else None
        kind = "application/x-ndjson" if self._stream is None else "text/event-stream"
        return self._codec.head(200, [("Content-Type", kind), ("Cache-Control", "no-store")])

    def _is_known(self, etag: str) -> bool:
        """Say whether the client holds this answer already."""
        if self._http is None or self._http.method not in ("GET", "HEAD"):
            return False
        held = [tag.strip() for tag in self._http.headers.get("if-none-match", "").split(",")]
        return "*" in held or etag[2:] in (tag[2:] if tag.startswith("W/") else tag for tag in held)

    def line(self, line: bytes) -> bytes:
        """Return a chunk."""
        return self._codec.chunk(line if self._stream is None else format_server_sent(line, self._stream))

    def ping(self) -> bytes:
        """Return nothing: HTTP has no such thing."""
        return b""

    def refuse(self, error: FabrikError) -> bytes:
        """Return an error response, where none is on its way."""
        if self._http is not None:
            return b""
        told = format_line(error_message(error, {}))
        reason = {408: "Request Timeout"}.get(error.http_status, "Bad Request")
        head = f"HTTP/1.1 {error.http_status} {reason}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        return f"{head}Content-Length: {len(told)}\r\n\r\n".encode() + told

    def end(self, _code: int) -> bytes:
        """Return nothing: a response that lacks its last chunk is known to be cut off."""
        return b""

    def _said(self, http: HttpRequest) -> Said:
        self._http = http
        try:
            self._access.check_http(http)
            request = request_from_http(http)
            if not wants_websocket(http):
                return request
            if request["action"] != "subscribe":
                raise UsageError("there is no WebSocket here", "use /v1/stream")
            reply, rest = self._codec.switch(accept_websocket(http))
        except FabrikError as error:
            return error
        return Switch(WebSocketFraming(), reply, rest, [request] if http.query else [])


class WebSocketFraming:
    """WebSocket: a request is a text message, and so is every answer and every line of a subscription."""

    singly = False
    is_busy = False

    def __init__(self) -> None:
        self._codec = WebSocketCodec()
        self._ended = False

    @property
    def is_open(self) -> bool:
        """Whether neither end has closed."""
        return self._codec.is_open and not self._ended

    @property
    def is_partial(self) -> bool:
        """Whether a request has begun and not ended."""
        return self._codec.is_partial

    def receive(self, data: bytes) -> Iterator[Said]:
        """Yield requests, what is none, and what must be sent back."""
        self._ended = not data
        for said in self._codec.receive(data):
            yield said if isinstance(said, bytes) else request_from_text(said)

    def following(self) -> Iterator[Said]:
        """Return nothing: requests need not wait for each other here."""
        return iter(())

    def answer(self, answer: Reply | Subscribed | FabrikError, request: JsonObject) -> Iterator[bytes]:
        """Yield a reply or an error as one message, in fragments where it is long."""
        return map(self.line, _answer_pieces(answer, request))

    def line(self, line: bytes) -> bytes:
        """Return a message; a line without its end is a part of one."""
        last = line.endswith(b"\n")
        return self._codec.text(line[:-1] if last else line, last=last)

    def ping(self) -> bytes:
        """Return a ping."""
        return self._codec.ping()

    def refuse(self, error: FabrikError) -> bytes:
        """Return the close that tells the error."""
        return self._codec.close(WS_PROTOCOL_ERROR, error.message)

    def end(self, code: int) -> bytes:
        """Return the close that ends the connection in order."""
        return self._codec.close(code) if self.is_open else b""


def _error_headers(error: FabrikError, request: JsonObject) -> list[tuple[str, str]]:
    """Return what HTTP says of an error beside its status; the length lets simple clients read its words."""
    headers = [("Content-Length", str(len(format_line(error_message(error, request)))))]
    if error.http_status == TokenError.http_status:
        headers.append(("WWW-Authenticate", 'Bearer realm="fabrik"'))
    if isinstance(error, RateError):
        headers.append(("Retry-After", str(error.retry_after_s)))
    return headers


def _compressed(pieces: Iterable[bytes]) -> Iterator[bytes]:
    gzip_format = zlib.compressobj(6, zlib.DEFLATED, 31)
    yield from map(gzip_format.compress, pieces)
    yield gzip_format.flush()


def _answer_pieces(answer: Reply | Subscribed | FabrikError, request: JsonObject) -> Iterator[bytes]:
    if isinstance(answer, FabrikError):
        return iter([format_line(error_message(answer, request))])
    return reply_pieces(answer, request) if isinstance(answer, Reply) else iter(())


# ----------------------------------------------------------------------------------------------------------------------
# Requests: access
# ----------------------------------------------------------------------------------------------------------------------

# What takes nothing but reading, and tells no more than the clusters do. An action that is not here stays at home.
REMOTE_ACTIONS: Final = frozenset(
    ("ping", "status", "runs", "run", "schedules", "volumes", "warnings", "clusters", "subscribe", "unsubscribe")
)
HEALTH_ROUTES: Final = frozenset(("/healthz", "/readyz"))
OPEN_ROUTES: Final = HEALTH_ROUTES | {"/metrics"}  # without a token: the kubelet and Prometheus have none
OPEN_ACTIONS: Final = frozenset(route[1:] for route in OPEN_ROUTES)
TOKEN_PROTOCOL: Final = "fabrik.bearer."  # noqa: S105 - in Sec-WebSocket-Protocol: browsers set no other header


class RateLimiter:
    """How much each peer has asked for lately: a bucket that leaks, so that bursts pass and floods do not."""

    def __init__(self, per_second: float, burst: float, peers: int) -> None:
        self._per_second = per_second
        self._burst = burst
        self._peers = peers
        self._levels: dict[str, tuple[float, float]] = {}  # what is in the bucket, and as of when; the latest last

    def take(self, peer: str, now: float) -> float:
        """Count a request; return 0, or the seconds until it may be asked again, and then it does not count."""
        level = self._level(peer, now)
        if level + 1 > self._burst:
            return (level + 1 - self._burst) / self._per_second
        self._set(peer, level + 1, now)
        return 0.0

    def charge(self, peer: str, now: float, cost: float) -> None:
        """Count what cost more than a request."""
        self._set(peer, min(self._burst, self._level(peer, now) + cost), now)

    def _level(self, peer: str, now: float) -> float:
        level, at = self._levels.get(peer, (0.0, now))
        return max(0.0, level - (now - at) * self._per_second)

    def _set(self, peer: str, level: float, now: float) -> None:
        self._levels.pop(peer, None)
        self._levels[peer] = level, now
        if len(self._levels) > self._peers:
            del self._levels[next(iter(self._levels))]


class Gate:
    """Whom a remote daemon lets in: by host, origin, token and rate. What it says never holds a token."""

    def __init__(self, exposure: Exposure, digests: Sequence[bytes], now: Callable[[], float]) -> None:
        self.digests = digests  # of the tokens that are good now
        self.refused = 0  # requests
        self._exposure = exposure
        self._now = now
        self._rates = RateLimiter(REMOTE_REQUESTS_PER_S, REMOTE_REQUESTS_BURST, REMOTE_PEERS)

    def may_connect(self, address: str) -> bool:
        """Count a connection, whose handshake costs more than a request, and say whether it may be made."""
        return self._exposure.behind_proxy or not self._rates.take(address, self._now())

    def count(self, peer: str) -> None:
        """Count a request of a peer. Raises RateError."""
        wait_s = self._rates.take(peer, self._now())
        if wait_s:
            raise self.refusal(RateError(math.ceil(wait_s)))

    def refusal(self, error: RefusedError) -> RefusedError:
        """Return the error with which a request is refused, which is counted."""
        self.refused += 1
        return error

    def peer_of(self, http: HttpRequest, address: str) -> str:
        """Return who asks, as one name for all that one client may be: its address, its network with IPv6.

        Of X-Forwarded-For only the last entry is the proxy's own; those before it are the client's to invent.
        """
        last = http.headers.get("x-forwarded-for", "").rpartition(",")[2].strip()
        return peer_name(last) or address if self._exposure.behind_proxy else address

    def check(self, http: HttpRequest, peer: str) -> bytes | None:
        """Let a request pass; return the digest of its token, None where it needs none. Raises RefusedError."""
        self.count(peer)
        route = bare_path(http.path)
        if route in HEALTH_ROUTES:
            return None
        self._check_host(http)
        self._check_origin(http)
        if route in OPEN_ROUTES:
            return None
        token = _shown_token(http)
        if token is None:
            raise self.refusal(TokenError("this daemon wants a token", "send it as 'Authorization: Bearer ...'"))
        digest = token_digest(token)
        if not sum([hmac.compare_digest(digest, good) for good in self.digests]):  # all of them, in constant time
            self._rates.charge(peer, self._now(), REMOTE_WRONG_TOKEN_COST)
            raise self.refusal(
                TokenError("this token is not the daemon's", "ask whoever runs the daemon for its token")
            )
        return digest

    def _check_host(self, http: HttpRequest) -> None:
        """Refuse names that are not ours: behind such a one a web page reaches us as if we were its own host.

        Only names can be pointed elsewhere ("DNS rebinding"), so addresses pass.
        """
        host = host_of(http.headers.get("host", ""))
        if host != "localhost" and host not in self._exposure.hosts and not _is_address(host):
            told = f"this daemon does not go by the name {clip(host[:80])!r}"
            raise self.refusal(RefusedError(told, "start it with --allow-host and that name, if it is right"))

    def _check_origin(self, http: HttpRequest) -> None:
        """Refuse web pages of other hosts; who sends no Origin is no web page that could be told from others."""
        origin = http.headers.get("origin", "").lower()
        own = origin.partition("://")[2] == http.headers.get("host", "").lower()
        if origin and not own and origin not in self._exposure.origins:
            told = f"pages of {clip(origin[:80])!r} may not ask"
            raise self.refusal(
                RefusedError(told, "start the daemon with --allow-origin and that origin, if it is right")
            )


class RemoteAccess:
    """What the client of one TCP connection may do: read, as long as its token is good."""

    is_local = False

    def __init__(self, gate: Gate, address: str) -> None:
        self._gate = gate
        self.address = self._peer = address
        self._digest: bytes | None = None
        self._is_counted = False  # the request that came by HTTP; over WebSocket each message counts

    def check_http(self, http: HttpRequest) -> None:
        """Let an HTTP request or a WebSocket handshake pass. Raises RefusedError."""
        self._digest = None  # a token holds for the request that it came with
        self._peer = self._gate.peer_of(http, self.address)
        self._digest = self._gate.check(http, self._peer)
        self._is_counted = not wants_websocket(http)

    def check(self, request: JsonObject) -> None:
        """Let a request pass, less what is never served to remote clients. Raises RefusedError."""
        if not self._is_counted:
            self._gate.count(self._peer)
        self._is_counted = False
        action = request.get("action")
        if action in OPEN_ACTIONS:
            return
        if not self.is_good or self._digest is None:
            raise self._gate.refusal(TokenError("this token is not the daemon's any more", "connect with the new one"))
        if isinstance(action, str) and action not in REMOTE_ACTIONS:
            told = f"{clip(action[:80])!r} is not served to remote clients"
            raise self._gate.refusal(RefusedError(told, f"choose from {', '.join(sorted(REMOTE_ACTIONS))}"))
        request["keptLogs"] = False

    @property
    def is_good(self) -> bool:
        """Whether the token that was shown is still the daemon's; true where none was needed."""
        return self._digest is None or self._digest in self._gate.digests


def peer_name(address: str) -> str:
    """Return one name for all addresses that one client may have: a /64 of IPv6; empty for what is no address."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    return str(ip.ipv4_mapped or ipaddress.ip_network((int(ip), 64), strict=False))


def host_of(authority: str) -> str:
    """Return the host of a Host header, in lower case, without its port; empty for what is none."""
    match = re.fullmatch(r"(?:\[([^\[\]]*)\]|([^:\[\]]*))(?::\d*)?", authority)
    return (match[1] or match[2] or "").lower().rstrip(".") if match else ""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _shown_token(http: HttpRequest) -> str | None:
    scheme, _, token = http.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    for entry in http.headers.get("sec-websocket-protocol", "").split(","):
        if entry.strip().startswith(TOKEN_PROTOCOL):
            encoded = entry.strip()[len(TOKEN_PROTOCOL) :].rstrip("=")
            with contextlib.suppress(ValueError):
                return base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).decode("utf-8")
            return ""
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Shipping
# ----------------------------------------------------------------------------------------------------------------------


class Shipment(NamedTuple):
    """One request to a service of LAOS; the body is made off the loop."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Callable[[], bytes]


TAKEN: Final = "taken"
REFUSED: Final = "refused"  # for good: the same again would meet the same
FAILED_FOR_NOW: Final = "failed"
_PERHAPS_LATER: Final = frozenset((401, 403, 404, 408, 425, 429))  # rights, a service and its load may change


def verdict_of(status: int) -> str:
    """Return what an HTTP status means for what was sent; 0 stands for no answer at all."""
    if 200 <= status < 300:
        return TAKEN
    return REFUSED if 400 <= status < 500 and status not in _PERHAPS_LATER else FAILED_FOR_NOW


class Shipper:
    """When to send what to one service, one request at a time; times are monotonic."""

    def __init__(self, timing: Timing, jitter: Jitter) -> None:
        self.timing = timing
        self._backoff = Backoff(timing._replace(backoff_max=timing.laos_retry_max), jitter)
        self._not_before = 0.0

    @property
    def deadline(self) -> float:
        """When `due` is to be called; infinity where nothing waits."""
        return max(self.next_at(), self._not_before)

    def next_at(self) -> float:
        """Return when there is something to send, were it not for the back-off."""
        raise NotImplementedError

    def due(self, now: float) -> Shipment | None:
        """Return what to send now, None where that is nothing."""
        return self.load(now) if now >= self.deadline else None

    def load(self, now: float) -> Shipment | None:
        """Return what to send."""
        raise NotImplementedError

    def on_answer(self, status: int, said: str, retry_after_s: float | None, now: float) -> str:
        """Take in what became of the request; return its verdict."""
        verdict = verdict_of(status)
        if verdict == FAILED_FOR_NOW:
            self._not_before = now + min(self._backoff.delay(retry_after_s), 10 * self.timing.laos_retry_max)
        else:
            self._backoff.failures = 0
        self.unload(verdict, said, now)
        return verdict

    def unload(self, verdict: str, said: str, now: float) -> None:
        """Take in what became of what `load` returned last."""
        raise NotImplementedError


class Target(NamedTuple):
    """One service to send to, and what of: these clusters, and where it is the overall one, what tells of none."""

    kind: str
    service: LaosService
    clusters: frozenset[str]
    is_overall: bool

    @property
    def key(self) -> tuple[str, LaosService]:
        """What stays while clusters come and go."""
        return self.kind, self.service


def laos_targets(overall: Laos, clusters: Mapping[str, Laos]) -> list[Target]:
    """Return where logs, alerts and metrics go; `clusters` have the overall settings in theirs, the first ones lead."""
    found: list[Target] = []
    for kind in ("loki", "alertmanager", "pushgateway"):
        services: dict[LaosService, set[str]] = {}
        first = getattr(overall, kind)
        if first is not None and kind != "alertmanager":
            services[first] = set()
        for name, laos in clusters.items():
            service = getattr(laos, kind)
            if service is not None and (kind != "alertmanager" or laos.alerts == "direct"):
                services.setdefault(service, set()).add(name)
        leading = next(iter(services), None)
        found += [Target(kind, service, frozenset(names), service == leading) for service, names in services.items()]
    return found


class MetricsPush(Shipper):
    """Pushes the metrics to a Pushgateway again and again, each time in place of those before."""

    def __init__(self, timing: Timing, jitter: Jitter, host: str, read: Callable[[], Callable[[], bytes]]) -> None:
        super().__init__(timing, jitter)
        self._path = f"/metrics/job/fabrik-daemon/instance/{urllib.parse.quote(host, safe='')}"
        self._read = read  # in the loop; what it returns makes the text, off the loop
        self._next_at = 0.0

    def next_at(self) -> float:
        """Return when the next push is due."""
        return self._next_at

    def load(self, now: float) -> Shipment:
        """Return a push of what is known at this moment."""
        self._next_at = now + self.timing.push
        return Shipment("PUT", self._path, {"Content-Type": METRICS_TYPE}, self._read())

    def unload(self, verdict: str, said: str, now: float) -> None:
        """Push sooner where this one failed."""
        if verdict == FAILED_FOR_NOW:
            self._next_at = now


# ----------------------------------------------------------------------------------------------------------------------
# Shipping: discovery
# ----------------------------------------------------------------------------------------------------------------------

LAOS_NAMESPACES: Final = ("monitoring", "fabrik-monitoring")
_LAOS_PORTS: Final = {"loki": 3100, "alertmanager": 9093, "prometheus": 9090, "pushgateway": 9091}


class LaosFinding(NamedTuple):
    """A service of LAOS in a cluster, and where it is reached from here; None: nowhere."""

    kind: str
    name: str  # namespace/name
    url: str | None
    how: str  # the type of its address, for people

    @property
    def rank(self) -> tuple[bool, str]:
        """Which of two is taken, the lower."""
        return self.url is None, self.name


def services_from(document: JsonObject, host: str, *, in_cluster: bool) -> list[LaosFinding]:
    """Return the services of LAOS in a ServiceList: known by a port of theirs, and its kind in their name.

    `host` is that of the API server; a node port is open on every node, which with k3s it is one of.
    """
    found: list[LaosFinding] = []
    for item in list_at(document, "items"):
        name, namespace = text_at(item, "metadata", "name") or "", text_at(item, "metadata", "namespace") or ""
        for kind, number in _LAOS_PORTS.items():
            port = next((port for port in list_at(item, "spec", "ports") if port.get("port") == number), None)
            if port is not None and kind in name:
                url, how = _address_of(item, port, host, in_cluster=in_cluster)
                found.append(LaosFinding(kind, f"{namespace}/{name}", url, how))
    return found


def _address_of(item: JsonObject, port: JsonObject, host: str, *, in_cluster: bool) -> tuple[str | None, str]:
    name, namespace = text_at(item, "metadata", "name") or "", text_at(item, "metadata", "namespace") or ""
    spec, number = object_at(item, "spec"), parse_int(port.get("port"))
    if in_cluster:
        return f"http://{name}.{namespace}.svc:{number}", "in the cluster"
    for entry in list_at(item, "status", "loadBalancer", "ingress"):
        outer = text_at(entry, "ip") or text_at(entry, "hostname")
        if outer:
            return f"http://{_in_url(outer)}:{number}", "LoadBalancer"
    outers = spec.get("externalIPs")
    if isinstance(outers, list) and outers and isinstance(outers[0], str):
        return f"http://{_in_url(outers[0])}:{number}", "external IP"
    node_port = parse_int(port.get("nodePort"))
    if node_port:
        return f"http://{_in_url(host)}:{node_port}", "NodePort"
    return None, text_at(spec, "type") or "ClusterIP"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def laos_of(found: Iterable[LaosFinding]) -> Laos:
    """Return the first service of each kind that can be reached."""
    urls: dict[str, str] = {}
    for finding in sorted(found, key=lambda finding: finding.rank):
        if finding.url is not None:
            urls.setdefault(finding.kind, finding.url)
    return laos_from_urls(urls)


def format_finding(finding: LaosFinding) -> str:
    """Return what was found, in words that a person can act on."""
    if finding.url is not None:
        return f"{finding.kind} found at {finding.url} ({finding.name}, {finding.how})"
    hint = f"make it a NodePort or LoadBalancer, or set laos.{finding.kind}.url to where you forward it"
    return f"{finding.kind} found ({finding.name}, {finding.how}), but not reachable from here: {hint}"


LAOS_META: Final = "laos:"  # and the cluster's name: what was discovered, in `meta`


def laos_from_urls(urls: Mapping[str, str]) -> Laos:
    """Return services that need nothing but a URL."""
    loki, alertmanager, prometheus, pushgateway = (
        LaosService(urls[kind]) if kind in urls else None for kind in LAOS_SERVICES
    )
    return Laos(loki, alertmanager, prometheus, pushgateway)


# ----------------------------------------------------------------------------------------------------------------------
# Shipping: logs
# ----------------------------------------------------------------------------------------------------------------------


class SpoolLine(NamedTuple):
    """A line on its way to Loki."""

    stream: tuple[tuple[str, str], ...]  # labels: few, since each set of values is a stream that Loki keeps apart
    time_ns: int
    text: str
    metadata: tuple[tuple[str, str], ...]

    @property
    def size(self) -> int:
        """About what it takes, here and in a request."""
        return len(self.text) + 256


def format_push(lines: Sequence[SpoolLine], *, metadata: bool) -> bytes:
    """Return the body of a push to Loki (grafana.com/docs/loki, "Ingest logs"), gzipped."""
    streams: dict[tuple[tuple[str, str], ...], list[list[Any]]] = {}
    for line in lines:
        value: list[Any] = [str(line.time_ns), line.text]
        streams.setdefault(line.stream, []).append([*value, dict(line.metadata)] if metadata else value)
    told = {"streams": [{"stream": dict(labels), "values": values} for labels, values in streams.items()]}
    return gzip.compress(format_line(told), 5, mtime=0)


class LogSpool(Shipper):
    """The daemon's log on its way to Loki, in memory; past its bound, the oldest lines give way and are counted."""

    def __init__(self, timing: Timing, jitter: Jitter, labels: Mapping[str, str], metadata: Mapping[str, str]) -> None:
        super().__init__(timing, jitter)
        self._labels = dict(labels)
        self._metadata = dict(metadata)
        self._lines: deque[SpoolLine] = deque()
        self._batch: list[SpoolLine] = []  # on its way
        self._bytes = 0  # of both
        self._since = math.inf  # when the first of the lines came
        self._last_ns = 0
        self._takes_metadata = True  # until Loki says that it does not: before 3.0 it had to be switched on
        self.is_hurried = False  # the daemon ends: what waits goes at once
        self.sent = 0
        self.dropped = 0

    def __len__(self) -> int:
        """Return the number of lines that wait."""
        return len(self._lines) + len(self._batch)

    def put(self, line: JsonObject, now: float) -> None:
        """Queue a line of the log: `time`, `level`, `message`, and what else it says."""
        told_ns = int((epoch_of(line["time"]) or 0.0) * 1000 + 0.5) * 1_000_000
        self._last_ns = max(told_ns, self._last_ns + 1)  # of two alike at one time, Loki would keep one
        of_stream = {**self._labels, "cluster": str(line.get("cluster") or ""), "level": str(line["level"])}
        stream = tuple((name, value) for name, value in of_stream.items() if value)
        text = json.dumps({**line, "message": clip(line["message"]) or ""}, ensure_ascii=False)
        more = {name: str(value) for name, value in line.items() if name not in ("time", "level", "message", "cluster")}
        entry = SpoolLine(stream, self._last_ns, text, tuple({**self._metadata, **more}.items()))
        if not self._lines:
            self._since = now
        self._lines.append(entry)
        self._bytes += entry.size
        self._keep_bound()

    def next_at(self) -> float:
        """Return when the lines that wait are to go: soon, at once where they fill a batch."""
        if self._batch or not self._lines:
            return math.inf
        return 0.0 if self.is_hurried or self._bytes >= LOKI_BATCH_BYTES else self._since + self.timing.log_batch

    def load(self, now: float) -> Shipment | None:
        """Return a push of the oldest lines; what Loki would refuse for its age stays here."""
        size, oldest_ns = 0, self._last_ns - LOKI_OLDEST_S * 1_000_000_000
        while self._lines and size < LOKI_BATCH_BYTES:
            line = self._lines.popleft()
            if line.time_ns < oldest_ns:
                self._drop([line])
            else:
                self._batch.append(line)
                size += line.size
        self._since = now
        if not self._batch:
            return None
        lines, metadata = tuple(self._batch), self._takes_metadata
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        return Shipment("POST", "/loki/api/v1/push", headers, lambda: format_push(lines, metadata=metadata))

    def unload(self, verdict: str, said: str, now: float) -> None:
        """Let the lines go, or put them back to be sent again."""
        batch, self._batch = self._batch, []
        if verdict == TAKEN:
            self.sent += len(batch)
            self._bytes -= sum(line.size for line in batch)
        elif verdict == REFUSED and not (self._takes_metadata and "structured metadata" in said.lower()):
            self._drop(batch)
        else:
            self._takes_metadata = self._takes_metadata and verdict != REFUSED
            self._lines.extendleft(reversed(batch))
            self._since = min(self._since, now)
            self._keep_bound()

    def _keep_bound(self) -> None:
        while self._lines and self._bytes > LOKI_SPOOL_BYTES:
            self._drop([self._lines.popleft()])

    def _drop(self, lines: Sequence[SpoolLine]) -> None:
        self.dropped += len(lines)
        self._bytes -= sum(line.size for line in lines)


# ----------------------------------------------------------------------------------------------------------------------
# Shipping: alerts
# ----------------------------------------------------------------------------------------------------------------------

Labels = tuple[tuple[str, str], ...]

GATE_ALERT: Final = "FabrikHumanGateBlocked"
FAILED_ALERT: Final = "FabrikRunFailed"
CREDENTIALS_ALERT: Final = "FabrikCredentialsExhausted"
PENDING_ALERT: Final = "FabrikRunPending"
HEARTBEAT_ALERT: Final = "FabrikHeartbeatStale"
SCHEDULE_ALERT: Final = "FabrikScheduleMissed"
SEVERITIES: Final = {
    GATE_ALERT: "P1",
    FAILED_ALERT: "P1",
    CREDENTIALS_ALERT: "P1",
    PENDING_ALERT: "P2",
    HEARTBEAT_ALERT: "P2",
    SCHEDULE_ALERT: "P2",
}
_EXHAUSTED: Final = "rate_limit_exhausted"
_BY_TIME: Final = frozenset((PENDING_ALERT, HEARTBEAT_ALERT, SCHEDULE_ALERT))  # silence may also be our own


class Cause(NamedTuple):
    """Why a row is worth an alert, and when: from one epoch up to another."""

    alertname: str
    row: Run | Schedule
    begins_at: float
    ends_at: float = math.inf

    @property
    def labels(self) -> Labels:
        """What tells this alert from every other; Alertmanager's rule is that no value is empty."""
        row = self.row
        named: dict[str, str | None] = {"alertname": self.alertname, "severity": SEVERITIES[self.alertname]}
        named |= {"cluster": row.cluster, "namespace": row.namespace}
        if isinstance(row, Schedule):
            named["schedule"] = row.name
        else:
            named |= {"run_id": row.run_id, "spec_id": row.spec_id}
        return tuple((name, value) for name, value in named.items() if value)


def causes_of(row: Run | Schedule, since: float | None, timing: Timing, skew_s: float) -> list[Cause]:
    """Return what a row is worth an alert for: conventions.md, "What is worth an alert"."""
    if isinstance(row, Schedule):
        return [Cause(SCHEDULE_ALERT, row, 0.0)] if row.missed else []
    if row.status == BLOCKED:
        exhausted = row.reason == _EXHAUSTED
        names = [CREDENTIALS_ALERT] if exhausted else []
        names += [GATE_ALERT] if row.phase == GATE or not exhausted else []
        return [Cause(name, row, since or 0.0) for name in names]
    if row.status == PENDING and since is not None:
        return [Cause(PENDING_ALERT, row, since + timing.alert_pending)]
    if row.status == RUNNING and row.heartbeat_at:
        return [Cause(HEARTBEAT_ALERT, row, (epoch_of(row.heartbeat_at) or 0.0) - skew_s + timing.alert_heartbeat)]
    failed_at = epoch_of(row.finished_at or row.updated_at) if row.status == FAILED else None
    return [] if failed_at is None else [Cause(FAILED_ALERT, row, failed_at, failed_at + timing.alert_failed)]


def annotations_of(cause: Cause) -> dict[str, str]:
    """Return what a person is told: what is the matter, and what to do next, with the exact command."""
    row = cause.row
    if isinstance(row, Schedule):
        where = f"in {row.namespace} on {row.cluster}"
        return {
            "summary": f"Schedule {row.name} missed {row.missed} runs",
            "description": f"CronJob {row.name} ({row.schedule}) {where} last ran {row.last_run_at or 'never'}."
            f" See why: kubectl describe cronjob -n {_word(row.namespace)} {_word(row.name)}",
        }
    spec = f" of {row.spec_id}" if row.spec_id else ""
    who, show = f"Run {row.run_id}{spec} on {row.cluster}", f"fabrik-daemon runs show --id {_word(row.run_id)}"
    task = f" at task {row.current_task}" if row.current_task else ""
    pod = f"-n {_word(row.namespace)} {_word(row.pod_name or '')}".rstrip()
    summary, description = {
        GATE_ALERT: (
            f"Run {row.run_id} waits at its human gate",
            f"{who} waits for a person{task}, without a deadline. Read what it asks, then approve or answer: {show}",
        ),
        CREDENTIALS_ALERT: (
            f"Run {row.run_id} has no credentials left",
            f"{who} is blocked{task}: {_EXHAUSTED}. Add credentials, or wait for the limit to reset, and see: {show}",
        ),
        FAILED_ALERT: (
            f"Run {row.run_id} failed: {row.reason or 'no reason given'}",
            f"{who} failed{task} after its retries. Read why: {show}",
        ),
        PENDING_ALERT: (
            f"Run {row.run_id} does not start",
            f"{who} is pending: {row.reason or 'no reason given'}. See its warnings: {show}",
        ),
        HEARTBEAT_ALERT: (
            f"Run {row.run_id} is silent",
            f"{who} runs{task}, and last reported at {row.heartbeat_at}. Read its log: kubectl logs --tail=100 {pod}",
        ),
    }[cause.alertname]
    return {"summary": summary, "description": description}


def _word(text: str) -> str:
    """Return a name as a word of a command line, quoted where a cluster put more into it than names have."""
    return text if re.fullmatch(r"[\w.@/:-]*", text, re.ASCII) else "'" + text.replace("'", "'\\''") + "'"


class AlertRow(NamedTuple):
    """A row of `alerts`; the fingerprint is the labels as JSON, since they are all that tells alerts apart."""

    fingerprint: str
    alertname: str
    cluster: str | None
    run_id: str | None
    starts_at: str
    ends_at: str | None = None  # None: it fires


class _Alert:
    """An alert that fires, or did not long ago."""

    def __init__(self, labels: Labels, starts_at: str) -> None:
        self.labels = labels
        self.starts_at = starts_at
        self.ends_at: float | None = None
        self.annotations: dict[str, str] = {}
        self.send_at = 0.0  # monotonic
        self.alone = False  # one that it was sent with was refused

    def row(self) -> AlertRow:
        known = dict(self.labels)
        ends_at = None if self.ends_at is None else format_time(self.ends_at, milliseconds=True)
        fingerprint = json.dumps(known, ensure_ascii=False)
        return AlertRow(
            fingerprint, known["alertname"], known.get("cluster"), known.get("run_id"), self.starts_at, ends_at
        )


class AlertBook(Shipper):
    """The alerts of some clusters for one Alertmanager: what fires, and when each is to be told again."""

    def __init__(self, timing: Timing, jitter: Jitter, epoch: float) -> None:
        super().__init__(timing, jitter)
        self.clusters: frozenset[str] = frozenset()
        self._causes: dict[Labels, Cause] = {}
        self._labels: dict[tuple[str, ...], list[Labels]] = {}  # of each row
        self._alerts: dict[Labels, _Alert] = {}
        self._batch: list[_Alert] = []  # on its way
        self._epoch = epoch  # at the monotonic clock's beginning, as of late

    def load_rows(self, rows: Iterable[AlertRow]) -> None:
        """Take over what the cache holds of its clusters: an alert that goes on keeps its beginning."""
        for row in rows:
            said = parse_json(row.fingerprint) or {}
            if said.get("cluster") in self.clusters and row.alertname in SEVERITIES:
                labels = tuple((str(name), str(value)) for name, value in said.items())
                alert = self._alerts[labels] = _Alert(labels, row.starts_at)
                alert.ends_at = epoch_of(row.ends_at)
                alert.annotations = {"summary": f"{row.alertname} is over"}  # unless its row says more

    def observe(self, row: Run | Schedule, causes: Iterable[Cause]) -> None:
        """Take in what a row is worth an alert for now, nothing where it is gone."""
        key = (type(row).__name__, *row_key(row))
        for labels in self._labels.pop(key, ()):
            self._causes.pop(labels, None)
        found = {cause.labels: cause for cause in causes}
        self._causes.update(found)
        if found:
            self._labels[key] = list(found)

    def check(self, at: float, now: float, *, known: Set[str], live: Set[str]) -> list[AlertRow]:
        """Let begin and end what is due at an epoch; return the rows that this changes.

        `known` clusters were listed since the start, `live` ones miss nothing now: a daemon that hears nothing must
        take that neither for a run's silence nor for its end.
        """
        changed: list[AlertRow] = []
        self._epoch = at - now
        for labels, cause in self._causes.items():
            alert, live_enough = self._alerts.get(labels), live if cause.alertname in _BY_TIME else known
            fires = alert is not None and alert.ends_at is None
            if not fires and cause.begins_at <= at < cause.ends_at and cause.row.cluster in live_enough:
                began_at = min(max(cause.begins_at, alert.ends_at or 0.0 if alert else 0.0) or at, at)
                alert = self._alerts[labels] = _Alert(labels, format_time(began_at, milliseconds=True))
                alert.send_at = now + self.timing.alert_batch
                changed.append(alert.row())
        for labels, alert in self._alerts.items():
            cause_now = self._causes.get(labels)
            over = cause_now is None or not cause_now.begins_at <= at < cause_now.ends_at
            if alert.ends_at is None and over and dict(labels)["cluster"] in known:
                alert.ends_at, alert.send_at, alert.alone = at, now + self.timing.alert_batch, False
                changed.append(alert.row())
        return changed

    def forget(self, at: float) -> list[AlertRow]:
        """Forget, and return, what has been over for long enough."""
        limit = at - self.timing.alert_resolved
        done = [alert for alert in self._alerts.values() if alert.ends_at is not None and alert.ends_at < limit]
        for alert in done:
            del self._alerts[alert.labels]
        return [alert.row() for alert in done]

    def firing(self) -> dict[tuple[str, str], int]:
        """Return how many alerts fire, of each cluster and name."""
        counts: dict[tuple[str, str], int] = {}
        for alert in self._alerts.values():
            known = dict(alert.labels)
            key = known.get("cluster", ""), known["alertname"]
            counts[key] = counts.get(key, 0) + (alert.ends_at is None)
        return counts

    def next_at(self) -> float:
        """Return when the next alert is to be told, or told again."""
        return math.inf if self._batch else min((alert.send_at for alert in self._alerts.values()), default=math.inf)

    def load(self, now: float) -> Shipment | None:
        """Return the alerts that are due; one whose company was refused goes alone, so that it bars no other."""
        due = [alert for alert in self._alerts.values() if alert.send_at <= now]
        for alert in due:
            if alert.ends_at is None and alert.labels not in self._causes:  # of before: its cluster is still to tell
                alert.send_at = now + self.timing.alert_resend
        due = [alert for alert in due if alert.send_at <= now]
        alone = [alert for alert in due if alert.alone]
        self._batch = alone[:1] or due[:ALERTS_AT_ONCE]
        told = [self._told(alert, now) for alert in self._batch]
        if not told:
            return None
        return Shipment("POST", "/api/v2/alerts", {"Content-Type": "application/json"}, lambda: _format_list(told))

    def unload(self, verdict: str, said: str, now: float) -> None:
        """Tell alerts that were taken again in a while; find out which of a refused company was meant."""
        batch, self._batch = self._batch, []
        for alert in batch:
            if verdict == TAKEN:
                alert.send_at, alert.alone = now + self.timing.alert_resend, False
            elif verdict == REFUSED:
                alert.send_at = math.inf if alert.alone else now
                alert.alone = True

    def _told(self, alert: _Alert, now: float) -> JsonObject:
        cause = self._causes.get(alert.labels)
        alert.annotations = annotations_of(cause) if cause is not None else alert.annotations
        ends_at = alert.ends_at or self._epoch + now + 4 * self.timing.alert_resend
        return {
            "labels": dict(alert.labels),
            "annotations": alert.annotations,
            "startsAt": alert.starts_at,
            "endsAt": format_time(ends_at, milliseconds=True),
        }


def _format_list(values: Sequence[JsonObject]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode("utf-8", "replace")


# ----------------------------------------------------------------------------------------------------------------------
# Views: text
# ----------------------------------------------------------------------------------------------------------------------

# Control characters (C0, C1), line and paragraph separators, and what reverses or hides text (UAX 9).
_HARMFUL = late(
    lambda: re.compile(
        "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
    )
)


def safe_text(value: object, keep: str = "") -> str:
    """Return a text that is harmless on a terminal: what would steer it stands there escaped, but for `keep`."""
    text = "" if value is None else str(value)
    if text.isascii() and text.isprintable():
        return text
    return _HARMFUL.sub(lambda match: match[0] if match[0] in keep else repr(match[0])[1:-1], text)


def safe_lines(text: str) -> str:
    """Return several lines that are harmless on a terminal."""
    return "".join(f"  {safe_text(line)}\n" for line in text.splitlines())


def safe_json(text: str) -> str:
    """Return JSON, or YAML that quotes texts as JSON does, with what would steer a terminal escaped."""
    return _HARMFUL.sub(lambda match: match[0] if match[0] == "\n" else f"\\u{ord(match[0]):04x}", text)


def cells_of(text: str) -> int:
    """Return how many cells of a terminal a text takes (UAX 11); combining marks take none."""
    return len(text) if text.isascii() else sum(map(_cells_of_char, text))


def _cells_of_char(char: str) -> int:
    if char.isascii():
        return 1
    if unicodedata.category(char) in ("Mn", "Me", "Cf") or "\u1160" <= char <= "\u11ff":  # the latter: parts of Hangul
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def cut_text(text: str, width: int | None) -> str:
    """Return a text of at most `width` cells; `~` marks one that was longer. None means any width."""
    if width is None or cells_of(text) <= width:
        return text
    kept, cells = [], 1  # one cell for the mark
    for char in text:
        cells += _cells_of_char(char)
        if cells > width:
            break
        kept.append(char)
    return "".join(kept) + "~" if width > 0 else ""


def age_of(moment: object, now: float) -> str:
    """Return how long ago a row's time was, empty where it has none."""
    epoch = epoch_of(moment)
    return "" if epoch is None else format_age(now - epoch)


# ----------------------------------------------------------------------------------------------------------------------
# Views: tables
# ----------------------------------------------------------------------------------------------------------------------


class Style(NamedTuple):
    """How tables are drawn."""

    colour: bool = False
    titles: bool = True
    wide: bool = False  # all columns


PLAIN: Final = Style()
_GAP: Final = 3  # cells between two columns


class Column(NamedTuple):
    """A column of a table: its title, the text of a row's cell given the time, and how it gives way on a terminal."""

    title: str
    cell: Callable[[JsonObject, float], str]
    right: bool = False
    least: int = 0  # cells that it may shrink to; 0: it never shrinks
    rank: int = 0  # the highest leaves first where there is no room; 0: it never leaves
    wide: bool = False  # only `-o wide` shows it
    paint: Callable[[JsonObject], str] | None = None  # a row's colour, for `painted`


def format_table(
    columns: Sequence[Column], rows: Sequence[JsonObject], now: float, width: int | None, style: Style = PLAIN
) -> str:
    """Return rows under titles, aligned, no line over `width` cells of the terminal; None means any width.

    Where there is no room long texts shrink first, then columns leave by their rank; a line is cut as the last resort.
    """
    columns = [column for column in columns if style.wide or not column.wide]
    lines = [[safe_text(column.title) for column in columns]]
    lines += [[safe_text(column.cell(row, now)) for column in columns] for row in rows]
    natural = [max(cells_of(line[index]) for line in lines) for index in range(len(columns))]
    sizes = _sizes(columns, natural, width)
    text = [_format_row(lines[0], columns, sizes, width, None)] if style.titles else []
    for line, row in zip(lines[1:], rows):
        text.append(_format_row(line, columns, sizes, width, row if style.colour else None))
    return "".join(text)


def painted(text: str, colour: str) -> str:
    """Return a text in a colour, which is the parameters of SGR (ECMA-48); as it is where that is empty."""
    return f"\x1b[{colour}m{text}\x1b[0m" if colour and text else text


def _sizes(columns: Sequence[Column], natural: Sequence[int], width: int | None) -> dict[int, int]:
    """Return how many cells each of the columns that are shown gets, by its index."""
    sizes = dict(enumerate(natural))
    if width is None:
        return sizes
    least = [
        min(size, max(column.least, cells_of(column.title))) if column.least else size
        for size, column in zip(natural, columns)
    ]
    for leaving in sorted((index for index in sizes if columns[index].rank), key=lambda index: -columns[index].rank):
        if sum(least[index] + _GAP for index in sizes) - _GAP <= width:
            break
        del sizes[leaving]
    over = sum(size + _GAP for size in sizes.values()) - _GAP - width
    while over > 0:
        longest = max(sizes, key=lambda index: sizes[index] - least[index])
        if sizes[longest] == least[longest]:
            break
        sizes[longest] -= 1
        over -= 1
    return sizes


def _format_row(
    cells: Sequence[str],
    columns: Sequence[Column],
    sizes: Mapping[int, int],
    width: int | None,
    row: JsonObject | None,
) -> str:
    """Return one line; `row` is whose colours it gets, None for none."""
    text, used = "", 0
    for index, size in sizes.items():
        room = size if width is None else min(size, width - used)
        if room <= 0:
            break
        column, cell = columns[index], cut_text(cells[index], room)
        padding = " " * (room - cells_of(cell))
        cell = painted(cell, column.paint(row) if column.paint and row is not None else "")
        text += padding + cell if column.right else cell + padding
        text += " " * _GAP
        used += room + _GAP
    return text.rstrip() + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# Views: formats
# ----------------------------------------------------------------------------------------------------------------------

FORMATS: Final = ("table", "wide", "json", "jsonl", "yaml", "csv", "tsv", "name")


def format_answer(answer: object, output: str, *, titles: bool = True, names: Sequence[str] = ()) -> str:
    """Return an answer, one object or a list of them, in one of the FORMATS for programs.

    `names` are the columns of a list that may be empty; else they are the keys of the first row.
    """
    if output == "json":
        return format_json(answer)
    if output == "yaml":
        return format_yaml(answer)
    rows: list[Any] = answer if isinstance(answer, list) else [answer]
    if output == "jsonl":
        return "".join(map(format_json_line, rows))
    if output == "name":
        return "".join(f"{safe_text(name_of(row))}\n" for row in rows)
    names = names or (list(rows[0]) if rows else [])
    line_of = format_csv_line if output == "csv" else format_tsv_line
    head = [line_of(names)] if titles and names else []
    return "".join([*head, *(line_of([row.get(name) for name in names]) for row in rows)])


def name_of(row: JsonObject) -> object:
    """Return what names a row for other commands: its run_id, its name, or both with cluster and namespace."""
    if "name" not in row:
        return row.get("run_id", next(iter(row.values()), None))
    return f"{row['cluster']}/{row['namespace']}/{row['name']}" if "namespace" in row else row["name"]


def format_json(value: object) -> str:
    """Return indented JSON with a newline at its end; text from a cluster stands escaped where it could do harm."""
    return safe_json(json.dumps(value, ensure_ascii=False, indent=2)) + "\n"


_SGR = late(lambda: re.compile(r"\x1b\[[0-9;:]*m"))  # colours, which programs print into their logs


def format_printed(line: str, prefix: str = "", colour: str = "") -> str:
    """Return a line that a container printed, harmless on a terminal: its own colours are left out, tabs stay."""
    text = "\t".join(safe_text(part) for part in _SGR.sub("", line).split("\t"))
    shown = f"{safe_text(prefix)} | " if prefix else ""
    return painted(shown, colour) + text + "\n"


def format_json_line(value: object) -> str:
    """Return JSON on one line, harmless on a terminal."""
    return safe_json(json.dumps(value, ensure_ascii=False)) + "\n"


def format_yaml(value: object) -> str:
    """Return YAML, harmless on a terminal; texts that are no plain words are quoted as in JSON."""
    return safe_json("\n".join(_yaml_block(value))) + "\n"


def format_csv_line(values: Iterable[object]) -> str:
    """Return a line of CSV (RFC 4180, but for its line end): newlines and tabs stand as they are, within quotes."""
    cells = []
    for value in values:
        text = safe_text(_cell_text(value), keep="\n\t")
        cells.append('"' + text.replace('"', '""') + '"' if any(char in text for char in '",\n\t') else text)
    return (",".join(cells) if cells != [""] else '""') + "\n"  # an empty line would be no row


def format_tsv_line(values: Iterable[object]) -> str:
    """Return a line of tab-separated values: a tab or newline within one stands escaped."""
    return "\t".join(safe_text(_cell_text(value)) for value in values) + "\n"


def _cell_text(value: object) -> str:
    """Return a cell's text; one that a spreadsheet would take for a formula gets an apostrophe before it (OWASP)."""
    if value is None:
        return ""
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    is_formula = value.lstrip()[:1] in _FORMULA_SIGNS and value.lstrip() and parse_number(value) is None
    return f"'{value}" if is_formula or value[:1] in ("\t", "\r") else value


_FORMULA_SIGNS: Final = "=+-@\uff1d\uff0b\uff0d\uff20"
_YAML_WORDS: Final = frozenset(("y", "n", "yes", "no", "true", "false", "on", "off", "null"))


def parse_number(text: str) -> float | None:
    """Return the value of a plain decimal number (`-1.5`), None where the text is none."""
    unsigned = text[1:] if text[:1] in ("+", "-") else text
    whole, _, fraction = unsigned.partition(".")
    return float(text) if unsigned.isascii() and whole.isdigit() and (fraction or "0").isdigit() else None


def _yaml_block(value: object) -> list[str]:
    lines: list[str] = []
    if isinstance(value, dict) and value:
        for key, item in value.items():
            first, *rest = _yaml_block(item)
            is_nested = isinstance(item, (dict, list)) and len(item) > 0
            lines += [f"{_plain_or_quoted(key)}:", f"  {first}"] if is_nested else [f"{_plain_or_quoted(key)}: {first}"]
            lines += [f"  {line}" for line in rest]
    elif isinstance(value, list) and value:
        for item in value:
            first, *rest = _yaml_block(item)
            lines += [f"- {first}", *(f"  {line}" for line in rest)]
    else:
        lines.append(_plain_or_quoted(value) if isinstance(value, str) else _yaml_number(json.dumps(value)))
    return lines


def _yaml_number(text: str) -> str:
    return text.replace("e", ".0e") if text[-1:].isdigit() and "e" in text and "." not in text else text


def _plain_or_quoted(text: str) -> str:
    is_plain = text.isascii() and text.replace("-", "a").replace("/", "a").isidentifier() and text[0].isalpha()
    return text if is_plain and text.lower() not in _YAML_WORDS else json.dumps(text, ensure_ascii=False)


# ----------------------------------------------------------------------------------------------------------------------
# Views: lists
# ----------------------------------------------------------------------------------------------------------------------

STATUS_COLOURS: Final = {BLOCKED: "1;33", FAILED: "31", RUNNING: "36", FINISHED: "32", CANCELLED: "2", UNKNOWN: "35"}
_AWAY_COLOUR: Final = "33"


def field(name: str) -> Callable[[JsonObject, float], str]:
    """Return the cell that shows a row's value as it is."""
    return lambda row, now: "" if row.get(name) is None else _shown(row[name])


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def age_field(name: str) -> Callable[[JsonObject, float], str]:
    """Return the cell that shows how long ago a row's time was."""
    return lambda row, now: age_of(row.get(name), now)


def columns_for(names: Sequence[str]) -> list[Column]:
    """Return columns that show fields of any names as they are."""
    return [Column(name, field(name), least=8) for name in names]


def progress_text(row: JsonObject, now: float) -> str:
    """Return a run's progress, empty where it reports none."""
    del now
    finished, total = row.get("progress_finished"), row.get("progress_total")
    return "" if finished is None or total is None else f"{finished}/{total}"


def status_text(row: JsonObject, now: float) -> str:
    """Return a run's status, as people read it."""
    del now
    return row.get("status") or UNKNOWN


def status_colour(row: JsonObject) -> str:
    """Return the colour of a run's status."""
    return STATUS_COLOURS.get(row.get("status") or UNKNOWN, "")


def _heartbeat(row: JsonObject, now: float) -> str:
    return "" if row.get("finished_at") else age_of(row.get("heartbeat_at"), now + row.get("skew_s", 0.0))


def _next_run(row: JsonObject, now: float) -> str:
    epoch = epoch_of(row.get("next_run_at"))
    return "" if epoch is None else f"in {format_age(epoch - now)}" if epoch >= now else "due"


def _schedule_state(row: JsonObject, _now: float) -> str:
    return "suspended" if row.get("suspended") else f"{row['active']} active" if row.get("active") else "waiting"


RUN_COLUMNS: Final = (
    Column("RUN", field("run_id")),
    Column("CLUSTER", field("cluster"), rank=2),
    Column("NAMESPACE", field("namespace"), wide=True),
    Column("STATUS", status_text, paint=status_colour),
    Column("PHASE", field("phase"), rank=3),
    Column("TASK", field("current_task"), least=8, rank=4),
    Column("PROGRESS", progress_text, right=True, rank=5),
    Column("HEARTBEAT", _heartbeat, rank=6),
    Column("AGE", age_field("created_at"), rank=1),
    Column("REASON", field("reason"), least=10, rank=7),
    Column("SPEC", field("spec_id"), wide=True),
    Column("TEMPLATE", field("template"), wide=True),
    Column("PROJECT", field("project"), wide=True),
    Column("ATTEMPT", field("task_attempt"), right=True, wide=True),
    Column("POD", field("pod_name"), wide=True),
)
SCHEDULE_COLUMNS: Final = (
    Column("SCHEDULE", field("name")),
    Column("CLUSTER", field("cluster"), rank=2),
    Column("NAMESPACE", field("namespace"), wide=True),
    Column("CRON", field("schedule")),
    Column("ZONE", field("time_zone"), wide=True),
    Column("STATE", _schedule_state, paint=lambda row: "2" if row.get("suspended") else ""),
    Column("LAST RUN", age_field("last_run_at"), rank=3),
    Column("LAST SUCCESS", age_field("last_success_at"), rank=4),
    Column("NEXT RUN", _next_run, rank=1),
    Column("MISSED", field("missed"), right=True, rank=5, paint=lambda row: "31" if row.get("missed") else ""),
    Column("AGE", age_field("created_at"), wide=True),
)
VOLUME_LIST_COLUMNS: Final = (
    Column("VOLUME", field("name")),
    Column("CLUSTER", field("cluster"), rank=2),
    Column("NAMESPACE", field("namespace"), wide=True),
    Column("RUN", field("run_id"), least=10, rank=3),
    Column("PHASE", lambda row, now: "deleted" if row.get("deleted_at") else str(row.get("phase") or "")),
    Column("CAPACITY", lambda row, now: format_bytes(row.get("capacity_bytes")), right=True, rank=1),
    Column("CLASS", field("storage_class"), rank=5),
    Column("AGE", age_field("created_at"), rank=4),
)
VOLUME_COLUMNS: Final = (
    Column("VOLUME", field("name")),
    Column("PHASE", field("phase")),
    Column("CAPACITY", lambda row, now: format_bytes(row.get("capacity_bytes")), right=True),
    Column("CLASS", field("storage_class")),
)


def columns_with_usage(columns: Sequence[Column], rows: Sequence[JsonObject]) -> Sequence[Column]:
    """Return a list's columns of volumes, with what is used behind the capacity where a row tells."""
    if not any("used_bytes" in row for row in rows):
        return columns
    at = next(index for index, column in enumerate(columns) if column.title == "CAPACITY") + 1
    used = Column("USED", lambda row, now: format_bytes(row.get("used_bytes")), right=True)
    return (*columns[:at], used, *columns[at:])


WARNING_COLUMNS: Final = (
    Column("LAST", age_field("last_at")),
    Column("COUNT", field("count"), right=True, rank=2),
    Column("REASON", field("reason"), paint=lambda row: "33"),
    Column(
        "OBJECT", lambda row, now: f"{row.get('object_kind') or ''}/{row.get('object_name') or ''}", least=20, rank=1
    ),
    Column("MESSAGE", field("message"), least=20),
)
WARNING_LIST_COLUMNS: Final = (
    WARNING_COLUMNS[0],
    Column("CLUSTER", field("cluster"), rank=3),
    Column("NAMESPACE", field("namespace"), wide=True),
    *WARNING_COLUMNS[1:4],
    Column("RUN", field("run_id"), wide=True),
    WARNING_COLUMNS[4],
)
_CLUSTER_COLOURS: Final = {"connected": "32", "disconnected": "31", DISABLED: "2"}
CLUSTER_COLUMNS: Final = (
    Column("NAME", field("name")),
    Column("SERVER", field("server"), least=12, rank=2),
    Column("PRIORITY", field("priority"), right=True, rank=3),
    Column("STATUS", field("status"), paint=lambda row: _CLUSTER_COLOURS.get(row["status"], "")),
    Column("LAST EVENT", age_field("last_event_at"), rank=1),
    Column("ERROR", field("error"), least=20),
)
DISCOVERY_COLUMNS: Final = (
    Column("NAME", field("name")),
    Column("CONTEXT", field("context")),
    Column("KUBECONFIG", field("kubeconfig"), least=20),
    Column("STATUS", field("status")),
)
LICENCE_COLUMNS: Final = (
    Column("LIBRARY", field("name")),
    Column("VERSION", field("version")),
    Column("LICENCE", field("licence")),
)
_AS_OF: Final = Column("AS OF", age_field("as_of"), paint=lambda row: _AWAY_COLOUR)


def columns_with_age(
    columns: Sequence[Column], rows: Sequence[JsonObject], parts: Sequence[Freshness]
) -> tuple[Sequence[Column], list[JsonObject]]:
    """Return columns and rows that say as of when rows of a cluster that is away are; heartbeats go by its clock."""
    by_name = {part.cluster: part for part in parts}
    shown = []
    for row in rows:
        part = by_name.get(row["cluster"], Freshness(row["cluster"], connected=False, synced_at=None))
        skew_s = part.skew_s if abs(part.skew_s) > SKEW_MIN_S else 0.0
        shown.append({**row, "skew_s": skew_s, "as_of": None if part.connected else part.synced_at})
    if not any(row["as_of"] for row in shown):
        return columns, shown
    place = 1 + next((index for index, column in enumerate(columns) if column.title == "STATUS"), 1)
    return (*columns[:place], _AS_OF, *columns[place:]), shown


def check_age(parts: Iterable[Freshness], max_age_s: float | None, now: float) -> None:
    """Raise StaleError where a part that is not live is older than allowed."""
    if max_age_s is None:
        return
    for part in parts:
        synced = epoch_of(part.synced_at)
        if not part.connected and (synced is None or now - synced > max_age_s):
            age = "not yet synced" if synced is None else f"as of {age_of(part.synced_at, now)} ago"
            raise StaleError(f"{part.cluster}: {age}", "run 'fabrik-daemon start' or 'fabrik-daemon sync'")


def format_freshness(source: str, parts: Sequence[Freshness], now: float) -> str:
    """Return where an answer comes from and how old each cluster's part of it is, in one line."""
    told = []
    for part in parts:
        if part.synced_at is None:
            state = "not yet synced"
        elif part.connected:
            state = "live"
        else:
            state = f"as of {age_of(part.synced_at, now)} ago, not connected"
        told.append(f"{part.cluster} {state}" + (f" ({part.error})" if part.error else ""))
    return f"from {source}: {'; '.join(told)}"


def statistics_columns(column: str) -> tuple[Column, ...]:
    """Return the columns of `runs stats`, by what the runs are counted."""
    return (
        Column(column.replace("_id", "").upper(), lambda row, now: row[column] or "-", least=10),
        *(Column(name.upper(), field(name), right=True) for name in ("runs", "active", FINISHED, FAILED, CANCELLED)),
        Column("SUCCESS", _success, right=True),
        Column("MEDIAN", _took("median_seconds"), right=True),
        Column("P95", _took("p95_seconds"), right=True),
        Column("BLOCKED", _took("blocked_seconds"), right=True),
    )


def _success(row: JsonObject, _now: float) -> str:
    return "" if row["success_rate"] is None else f"{100 * row['success_rate']:.0f} %"


def _took(name: str) -> Callable[[JsonObject, float], str]:
    return lambda row, now: "" if row[name] is None else format_age(row[name])


# ----------------------------------------------------------------------------------------------------------------------
# Views: a run
# ----------------------------------------------------------------------------------------------------------------------

_TIMELINE_COLUMNS: Final = (
    Column("AT", lambda row, now: (row.get("at") or "")[:19].replace("T", " ")),
    Column("TOOK", lambda row, now: "" if row.get("seconds") is None else format_age(row["seconds"]), right=True),
    Column("WHAT", field("what"), least=20, paint=status_colour),
)
EVENT_COLUMNS: Final = (
    Column("AGE", age_field("local_timestamp")),
    Column("EVENT", field("event_type")),
    Column("DETAIL", lambda row, now: event_detail(row), least=20),
)


def event_detail(event: JsonObject) -> str:
    """Return what a run's event says, in one line."""
    said = event.get("payload")
    said = said if isinstance(said, dict) else {}
    if event.get("event_type") == "status_changed":
        reason = f" ({said['reason']})" if said.get("reason") else ""
        before = f"{said['from']} -> " if said.get("from") else ""
        return f"{before}{said.get('to') or UNKNOWN}{reason}"
    return ", ".join(f"{key} {value}" for key, value in said.items() if value is not None)


def format_run(row: JsonObject, now: float, width: int | None, style: Style = PLAIN) -> str:
    """Return a run for a person: what is known of it, then its timeline, volumes, warnings and last log lines."""
    finished, total = row.get("progress_finished"), row.get("progress_total")
    percent = f" ({100 * finished // total} %)" if finished is not None and total else ""
    status = status_text(row, now) + (f" ({row['reason']})" if row.get("reason") else "")
    shown = {
        "run": row["run_id"],
        "cluster": f"{row['cluster']}, namespace {row['namespace']}",
        "status": status,
        "phase": row.get("phase"),
        "task": row.get("current_task"),
        "progress": progress_text(row, now) + percent,
        "attempt": row.get("task_attempt"),
        "iteration": row.get("iteration"),
        "heartbeat": f"{age_of(row.get('heartbeat_at'), now)} ago" if row.get("heartbeat_at") else None,
        "spec": row.get("spec_id"),
        "template": row.get("template"),
        "project": row.get("project"),
        "schedule": row.get("schedule_id"),
        "job": row.get("job_name"),
        "pod": row.get("pod_name"),
        **{name[:-3]: row.get(name) for name in ("created_at", "started_at", "finished_at", "deleted_at")},
    }
    text = ""
    for key, value in shown.items():
        if value not in (None, ""):
            colour = status_colour(row) if style.colour and key == "status" else ""
            words = cut_text(safe_text(value), None if width is None else max(1, width - 12))
            text += cut_text(f"{key + ':':<12}", width) + painted(words, colour) + "\n"
    return text + "".join(_parts_of_run(row, now, width, style))


def _parts_of_run(row: JsonObject, now: float, width: int | None, style: Style) -> Iterator[str]:
    for title, columns in (
        ("timeline", _TIMELINE_COLUMNS),
        ("volumes", columns_with_usage(VOLUME_COLUMNS, row.get("volumes") or ())),
        ("warnings", WARNING_COLUMNS),
        ("events", EVENT_COLUMNS),
    ):
        if row.get(title):
            yield f"\n{title}\n" + format_table(columns, row[title], now, width, style)
    if row.get("log"):
        lines = (str((said or {}).get("line", "")) for said in row["log"])
        yield "\nlast log lines\n" + "".join(cut_text(safe_text(line), width) + "\n" for line in lines)


def format_run_event(event: JsonObject, width: int | None, style: Style = PLAIN) -> str:
    """Return a change of a run as one line."""
    row = event["row"]
    before = f"{event['previousStatus']} -> " if event.get("previousStatus") not in (None, event["status"]) else ""
    left = " (no longer matches)" if event.get("left") else ""
    detail = " ".join(
        text for text in (row["phase"], row["current_task"], progress_text(row, 0), row["reason"]) if text
    )
    cells = [
        (str(event["localTimestamp"])[11:19], ""),
        (f"{event['type'][4:]:<8}{row['run_id']}", ""),
        (str(event["cluster"]), ""),
        (f"{before}{event['status'] or UNKNOWN}{left}", status_colour(row) if style.colour else ""),
        (detail, ""),
    ]
    line = "  ".join(safe_text(cell) for cell, _ in cells).rstrip()
    if width is not None and cells_of(line) > width:
        return cut_text(line, width) + "\n"
    return "  ".join(painted(safe_text(cell), colour) for cell, colour in cells).rstrip() + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# Views: the daemon
# ----------------------------------------------------------------------------------------------------------------------


def format_status(status: JsonObject, now: float, width: int | None) -> str:
    """Return how the daemon is, for a person."""
    counts = ", ".join(f"{count} {name}" for name, count in status["runs_by_status"].items())
    lines = [
        f"{'version:':<12}{status['version']}, pid {status['pid']}, up {format_age(status['uptime_seconds'])}",
        f"{'socket:':<12}{status['socket']}, {status['subscribers']} subscribers",
        f"{'cache:':<12}{status['cache']}"
        + (f" CANNOT BE WRITTEN: {status['cache_error']}" if status["cache_error"] else ""),
        f"{'runs:':<12}{status['runs']}" + (f" ({counts})" if counts else ""),
        *_remote_lines(status.get("remote")),
        "",
    ]
    text = "".join(cut_text(safe_text(line), width) + "\n" for line in lines)
    text += format_table(STATUS_COLUMNS, status["clusters"], now, width)
    for cluster in status["clusters"]:
        for watch in cluster["watches"]:
            if watch["error"]:
                where = f"{watch['resource']} in {watch['namespace'] or 'all namespaces'}"
                line = f"{cluster['name']}: {where}: {watch['state']}: {watch['error']}"
                text += safe_text(line) + "\n"  # whole: it is what to act on
    return text


def _remote_lines(remote: JsonObject | None) -> list[str]:
    if remote is None:
        return []
    how = "TLS" if remote["tls"] else "behind a proxy" if remote["behind_proxy"] else "plain HTTP"
    counts = f"{remote['connections']} connections, {remote['refused']} requests refused"
    return [f"{'remote:':<12}{remote['listen']}, {how}, {counts}"]


def _state(cluster: JsonObject, _now: float) -> str:
    synced = "" if cluster["synced"] else ", not yet synced"
    away = "NOT CONNECTED" if cluster["error"] else "connecting"
    return ("connected" if cluster["connected"] else away) + synced


STATUS_COLUMNS: Final = (
    Column("CLUSTER", field("name")),
    Column("SERVER", field("server")),
    Column("STATE", _state),
    Column("LAST EVENT", age_field("last_event_at")),
    Column("ERROR", field("error")),
)


def format_log_line(line: JsonObject) -> str:
    """Return a line of the daemon's log."""
    return f"{line['time']} {str(line['level']).upper():<7} {safe_text(line['message'])}\n"


def format_findings(findings: Sequence[JsonObject], style: Style) -> str:
    """Return what doctor found, for a person: the problems last, each with what ends it."""
    text = ""
    for level, colour in (("ok", "32"), ("note", ""), ("problem", "31")):
        for finding in findings:
            if finding["level"] == level:
                head = painted(f"{level:<8}", colour if style.colour else "")
                text += f"{head} {safe_text(finding['check'])}: {safe_text(finding['subject'])}\n"
                text += f"{'':<9}{safe_text(finding['message'])}\n"
                text += f"{'':<9}-> {safe_text(finding['fix'])}\n" if finding["fix"] else ""
    count = sum(finding["level"] == "problem" for finding in findings)
    return text + f"{count or 'no'} problem{'s' if count != 1 else ''} found\n"


def format_examination(clusters: Sequence[JsonObject], width: int | None) -> str:
    """Return what `clusters test` found, for a person."""
    text = ""
    for cluster in clusters:
        told = "ok" if cluster["ok"] else cluster["error"] or "not everything can be read"
        text += cut_text(safe_text(f"{cluster['name']} ({cluster['server'] or 'no server'}): {told}"), None) + "\n"
        for watch in cluster["watches"]:
            where = f"{watch['resource']} in {watch['namespace'] or 'all namespaces'}"
            text += cut_text(safe_text(f"  {where:<44} {watch['error'] or 'ok'}"), width) + "\n"
    return text


# ----------------------------------------------------------------------------------------------------------------------
# Demo script
# ----------------------------------------------------------------------------------------------------------------------

DEMO_CLUSTERS: Final = ("dev", "prod")
DEMO_NAMESPACE: Final = "fabrik-runs"
DEMO_S: Final = 60.0  # how long the script lasts
_REPORT_S: Final = 3.0  # Smithers reports every 30 s; a demo of a minute cannot wait for that
_TASKS: Final = 48  # of every run
_MANAGED: Final = {"app.kubernetes.io/managed-by": "fabrik", FABRIK_PREFIX + "managed-by": "fabrik"}
_IMAGE: Final = "ghcr.io/acme/fabrik-smithers:1.8.2"
_CROCKFORD: Final = "0123456789abcdefghjkmnpqrstvwxyz"
_TASK_WORDS: Final = {"discover": "scan", "implement": "impl", "validate": "test", "human-gate": "gate"}
_OLDER_WORDS: Final = {"discover": "interview", "human-gate": "gate"}
_API_KINDS: Final = {
    JOBS.name: "Job",
    CRONJOBS.name: "CronJob",
    PODS.name: "Pod",
    VOLUMES.name: "PersistentVolumeClaim",
    EVENTS.name: "Event",
}


class DemoStep(NamedTuple):
    """What happens to one object of a scripted cluster, and when; before 0 s: it was so when the demo began."""

    at_s: float
    cluster: str
    resource: str
    type: str  # ADDED, MODIFIED, DELETED
    object: JsonObject


def demo_steps(started_at: float) -> list[DemoStep]:
    """Return the script in the order of its times: the same for the same start."""
    steps: list[DemoStep] = []
    for cluster, spec, life in _CAST:
        actor = _Actor(cluster, spec, started_at)
        life(actor)
        steps += actor.steps
    return sorted([*steps, *_schedule_steps(started_at)], key=lambda step: step.at_s)


def api_kind(resource_name: str) -> str:
    """Return the kind of a watched resource's objects."""
    return _API_KINDS[resource_name]


class _Actor:
    """One run of the script: each method lets something happen to its objects, and `steps` keeps it."""

    def __init__(self, cluster: str, spec: str, started_at: float) -> None:
        self.steps: list[DemoStep] = []
        self._cluster = cluster
        self._spec = spec
        self._started_at = started_at
        self._is_older = cluster == "prod"  # so that both dialects and both sets of words are used
        self._known: set[tuple[str, str]] = set()  # resource and name
        self._job: JsonObject = {}
        self._owner: JsonObject = {}
        self._pods = 0  # so far; the last one counts
        self._pod: JsonObject = {}
        self._volume: JsonObject = {}
        self._warned: dict[str, list[float]] = {}  # an Event's name -> when
        self._finished = 0

    def submit(self, at_s: float) -> None:
        """Make the run's Job, its workspace and, a moment later, its Pod."""
        run_id = _ulid(self._started_at + at_s, self._spec)
        spec_key = "spec" if self._is_older else "spec-id"
        labels = {"run-id": run_id, spec_key: self._spec, "template": "coding", "project": "shop"}
        self.submit_as(at_s, f"fabrik-{run_id}", labels)
        volume = self._object(at_s, VOLUMES, f"data-fabrik-{run_id}", {"run-id": run_id})
        requests = {"requests": {"storage": "10Gi"}}
        volume["spec"] = {"accessModes": ["ReadWriteOnce"], "resources": requests, "storageClassName": "local-path"}
        self._volume = self._tell(at_s, VOLUMES, {**volume, "status": {"phase": "Pending"}})
        self.add_pod(at_s + 0.3)
        bound = {"phase": "Bound", "capacity": {"storage": "10Gi"}}
        self._volume = self._tell(at_s + 0.9, VOLUMES, {**self._volume, "status": bound})

    def submit_as(self, at_s: float, name: str, labels: JsonObject, owner: JsonObject | None = None) -> None:
        """Make the run's Job by this name."""
        job = self._object(at_s, JOBS, name, labels)
        job["metadata"]["ownerReferences"] = [owner] if owner else []
        template = {"spec": {"containers": [{"name": "smithers", "image": _IMAGE}], "restartPolicy": "Never"}}
        job["spec"] = {"backoffLimit": 0, "suspend": False, "template": template}
        self._job = self._tell(at_s, JOBS, {**job, "status": {"startTime": self._time(at_s), "active": 1}})
        self._owner = _owner_reference(self._job, JOBS)

    def add_pod(self, at_s: float) -> None:
        """Make the Job's next Pod, which waits for a node."""
        self._pods += 1
        job = object_at(self._job, "metadata")
        labels = {key[len(FABRIK_PREFIX) :]: job["labels"][key] for key in job["labels"] if key not in _MANAGED}
        name = f"{job['name']}-{_digits(job['uid'] + str(self._pods), 5)}"
        pod = self._object(at_s, PODS, name, labels)
        pod["metadata"]["ownerReferences"] = [self._owner]
        pod["metadata"]["labels"]["batch.kubernetes.io/job-name"] = job["name"]
        pod["metadata"]["annotations"] = {}
        pod["spec"] = {"containers": [{"name": "smithers", "image": _IMAGE}], "restartPolicy": "Never"}
        self._pod = self._tell(at_s, PODS, {**pod, "status": {"phase": "Pending"}})

    def fail_to_schedule(self, at_s: float) -> None:
        """Find no node for the Pod, once more."""
        message = "0/3 nodes are available: 3 Insufficient memory."
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        self._set_pod(at_s, {"phase": "Pending", "conditions": [condition]})
        self._warn(at_s, PODS, "FailedScheduling", message)

    def fail_to_pull(self, at_s: float) -> None:
        """Find no image for the Pod, once more."""
        self._set_pod(at_s, _pod_status("Pending", {"waiting": {"reason": "ImagePullBackOff"}}))
        self._warn(at_s, PODS, "BackOff", f'Back-off pulling image "{_IMAGE}"')

    def begin(self, at_s: float) -> None:
        """Let the Pod's init container run, then its main one."""
        initial = {"name": "checkout", "image": _IMAGE, "state": {"running": {"startedAt": self._time(at_s)}}}
        status = _pod_status("Pending", {"waiting": {"reason": "PodInitializing"}}, self._time(at_s))
        self._set_pod(at_s, {**status, "initContainerStatuses": [initial]})
        running = {"running": {"startedAt": self._time(at_s + 1.5)}}
        self._set_pod(at_s + 1.5, _pod_status("Running", running, self._time(at_s)))

    def work(self, phase: str, from_s: float, to_s: float, finished: int) -> None:
        """Report every few seconds from a phase, until so many tasks are finished."""
        reports = max(1, int((to_s - from_s) / _REPORT_S))
        before = self._finished
        for number in range(reports + 1):
            done = before + (finished - before) * number // reports
            self._report(from_s + (to_s - from_s) * number / reports, phase, done)

    def wait_for_person(self, from_s: float, to_s: float) -> None:
        """Stand at the human gate; the heartbeat goes on."""
        self.work("human-gate", from_s, to_s, self._finished)

    def finish(self, at_s: float) -> None:
        """Report the end, and let Pod and Job complete."""
        self._report(at_s, "done", _TASKS)
        self._end_pod(at_s + 0.5, "Succeeded", {"exitCode": 0, "reason": "Completed"})
        self._end_job(at_s + 0.8, "SuccessCriteriaMet", "CompletionsReached")
        self._end_job(at_s + 1.2, "Complete", "CompletionsReached")

    def run_out_of_memory(self, at_s: float) -> None:
        """Let the kernel kill the container, and the Job fail with it."""
        self._end_pod(at_s, "Failed", {"exitCode": 137, "reason": "OOMKilled"})
        self._end_job(at_s + 0.4, "FailureTarget", "BackoffLimitExceeded")
        self._end_job(at_s + 0.8, "Failed", "BackoffLimitExceeded")
        self._warn(at_s + 0.8, JOBS, "BackoffLimitExceeded", "Job has reached the specified backoff limit")

    def exceed_deadline(self, at_s: float) -> None:
        """Let the Job run out of time; its Pod is ended."""
        self._end_job(at_s, "FailureTarget", "DeadlineExceeded")
        self._warn(at_s, JOBS, "DeadlineExceeded", "Job was active longer than specified deadline")
        self._delete_pod(at_s + 0.2)
        self._end_job(at_s + 1.4, "Failed", "DeadlineExceeded")

    def evict(self, at_s: float) -> None:
        """Let the node throw the Pod out; the Job makes another one."""
        message = "The node was low on resource: memory."
        self._set_pod(at_s, {"phase": "Failed", "reason": "Evicted", "message": message})
        self._warn(at_s, PODS, "Evicted", message)
        self.add_pod(at_s + 2)

    def cancel(self, at_s: float) -> None:
        """Let a user cancel the run: all its objects go."""
        self._job["metadata"]["labels"][FABRIK_PREFIX + "status"] = CANCELLED
        self._tell(at_s, JOBS, self._job)
        self._delete(at_s + 0.6, JOBS, self._job)
        self._delete_pod(at_s + 0.8)
        self._delete(at_s + 2.2, VOLUMES, self._volume)

    def suspend(self, at_s: float) -> None:
        """Let a user suspend the Job; its Pod is ended."""
        condition = {"type": "Suspended", "status": "True", "reason": "JobSuspended"}
        self._job["spec"]["suspend"] = True
        self._job = self._tell(at_s, JOBS, {**self._job, "status": {"conditions": [condition]}})
        self._delete_pod(at_s + 0.2)

    def resume(self, at_s: float) -> None:
        """Let a user resume the Job, which makes another Pod."""
        self._job["spec"]["suspend"] = False
        status = {"startTime": self._time(at_s), "active": 1}
        self._job = self._tell(at_s, JOBS, {**self._job, "status": status})
        self.add_pod(at_s + 0.3)

    def _report(self, at_s: float, phase: str, finished: int) -> None:
        self._finished = finished
        dialect = _older_report if self._is_older else _newer_report
        told, labels = dialect(phase, f"{min(finished + 1, _TASKS)}:{_TASK_WORDS.get(phase, phase)}", finished)
        told.update(updated=self._time(at_s))
        metadata = self._pod["metadata"]
        metadata["annotations"] = {FABRIK_PREFIX + key: value for key, value in told.items()}
        metadata["labels"].update((FABRIK_PREFIX + key, value) for key, value in labels.items())
        self._set_pod(at_s, self._pod["status"])

    def _set_pod(self, at_s: float, status: JsonObject) -> None:
        self._pod = self._tell(at_s, PODS, {**self._pod, "status": status})

    def _end_pod(self, at_s: float, phase: str, terminated: JsonObject) -> None:
        ended = {"terminated": {**terminated, "finishedAt": self._time(at_s)}}
        self._set_pod(at_s, _pod_status(phase, ended, self._pod["status"].get("startTime")))

    def _end_job(self, at_s: float, kind: str, reason: str) -> None:
        status = {**self._job["status"], "active": 0}
        condition = {"type": kind, "status": "True", "reason": reason, "lastTransitionTime": self._time(at_s)}
        status["conditions"] = [*status.get("conditions", ()), condition]
        if kind == "Complete":
            status.update(succeeded=1, completionTime=self._time(at_s))
        self._job = self._tell(at_s, JOBS, {**self._job, "status": status})

    def _delete_pod(self, at_s: float) -> None:
        self._pod["metadata"]["deletionTimestamp"] = self._time(at_s)
        self._tell(at_s, PODS, self._pod)
        self._delete(at_s + 1, PODS, self._pod)

    def _warn(self, at_s: float, kind: Resource, reason: str, message: str) -> None:
        """Tell a Warning Event about the Job or the Pod; the same one again has only a higher count."""
        target = (self._job if kind is JOBS else self._pod)["metadata"]
        name = f"{target['name']}.{_digits(target['uid'] + reason, 16)}"
        told = self._warned.setdefault(name, [])
        told.append(at_s)
        event = self._object(told[0], EVENTS, name, {})
        about = {key: target[key] for key in ("namespace", "name", "uid")}
        event["involvedObject"] = {"kind": _API_KINDS[kind.name], **about}
        event.update(type="Warning", reason=reason, message=message, count=len(told))
        event.update(firstTimestamp=self._time(told[0]), lastTimestamp=self._time(at_s))
        self._tell(at_s, EVENTS, event)

    def _object(self, at_s: float, kind: Resource, name: str, labels: JsonObject) -> JsonObject:
        return _bare_object(self._cluster, kind, name, self._time(at_s), labels)

    def _tell(self, at_s: float, kind: Resource, item: JsonObject) -> JsonObject:
        """Note that an object is like this now, and return it; what is changed later does not reach the note."""
        key = kind.name, item["metadata"]["name"]
        verb = "MODIFIED" if key in self._known else "ADDED"
        self._known.add(key)
        self.steps.append(DemoStep(at_s, self._cluster, kind.name, verb, _copy_of(item)))
        return item

    def _delete(self, at_s: float, kind: Resource, item: JsonObject) -> None:
        self._known.discard((kind.name, item["metadata"]["name"]))
        self.steps.append(DemoStep(at_s, self._cluster, kind.name, "DELETED", _copy_of(item)))

    def _time(self, at_s: float) -> str:
        return format_time(self._started_at + at_s)


def _newer_report(phase: str, task: str, finished: int) -> tuple[dict[str, str], dict[str, str]]:
    """Return single annotations, and labels."""
    progress = json.dumps({"finished": finished, "total": _TASKS})
    status = BLOCKED if phase == "human-gate" else FINISHED if phase == "done" else RUNNING
    labels = {"phase": phase, "status": status, "task": task.replace(":", "-")}
    return {"task": task, "progress": progress, "attempt": "1", "iteration": "0"}, labels


def _older_report(phase: str, task: str, finished: int) -> tuple[dict[str, str], dict[str, str]]:
    """Return one annotation that holds it all, with the older words for phases, and no labels."""
    progress = {"finished": finished, "total": _TASKS}
    said = {"phase": _OLDER_WORDS.get(phase, phase), "current_task": task, "attempt": 1, "progress": progress}
    return {"status": json.dumps(said)}, {}


def _finished_before(run: _Actor) -> None:
    run.submit(-5400)
    run.begin(-5398)
    run.finish(-1800)


def _runs_from_before(run: _Actor) -> None:
    run.submit(-600)
    run.begin(-598)
    run.work("implement", -6, 12, 34)
    run.work("validate", 13, 22, 44)
    run.work("review", 23, 32, 47)
    run.finish(34)


def _whole_life(run: _Actor) -> None:
    run.submit(2)
    run.begin(4)
    run.work("discover", 7, 13, 6)
    run.work("implement", 14, 29, 32)
    run.work("validate", 30, 39, 42)
    run.work("review", 40, 49, 47)
    run.finish(51)


def _pulls_late(run: _Actor) -> None:
    run.submit(4)
    for at_s in (6, 9, 13, 18, 24):
        run.fail_to_pull(at_s)
    run.begin(28)
    run.work("discover", 31, 37, 7)
    run.work("implement", 38, DEMO_S, 25)


def _out_of_memory(run: _Actor) -> None:
    run.submit(6)
    run.begin(7)
    run.work("discover", 9, 12, 4)
    run.work("implement", 13, 22, 19)
    run.run_out_of_memory(24)


def _cancelled(run: _Actor) -> None:
    run.submit(10)
    run.begin(11)
    run.work("discover", 13, 19, 5)
    run.work("implement", 20, 29, 14)
    run.cancel(31)


def _suspended(run: _Actor) -> None:
    run.submit(-240)
    run.begin(-238)
    run.work("implement", -3, 14, 22)
    run.suspend(16)
    run.resume(30)
    run.begin(32)
    run.work("implement", 34, 43, 38)
    run.work("validate", 44, 53, 47)
    run.finish(55)


def _approved(run: _Actor) -> None:
    run.submit(3)
    run.begin(5)
    run.work("discover", 7, 13, 9)
    run.work("implement", 14, 23, 45)
    run.wait_for_person(24, 42)
    run.work("validate", 43, 49, 47)
    run.finish(50)


def _waits_for_approval(run: _Actor) -> None:
    run.submit(-900)
    run.begin(-898)
    run.work("review", -9, 27, 46)
    run.wait_for_person(28, DEMO_S)


def _too_slow(run: _Actor) -> None:
    run.submit(-30)
    run.begin(-28)
    run.work("implement", -6, 36, 17)
    run.exceed_deadline(37)


def _evicted(run: _Actor) -> None:
    run.submit(8)
    run.begin(9)
    run.work("discover", 11, 14, 5)
    run.work("implement", 15, 21, 16)
    run.evict(23)
    run.begin(27)
    run.work("implement", 29, 38, 39)
    run.work("validate", 39, 45, 44)
    run.work("review", 46, 52, 47)
    run.finish(53)


def _never_fits(run: _Actor) -> None:
    run.submit(12)
    for at_s in (13, 19, 28, 40, 54):
        run.fail_to_schedule(at_s)


_CAST: Final[tuple[tuple[str, str, Callable[[_Actor], None]], ...]] = (
    ("dev", "search-index", _finished_before),
    ("prod", "checkout-taxes", _waits_for_approval),
    ("dev", "cart-totals", _runs_from_before),
    ("dev", "stock-sync", _suspended),
    ("prod", "price-import", _too_slow),
    ("dev", "login-form", _whole_life),
    ("dev", "refund-flow", _approved),
    ("dev", "image-resize", _pulls_late),
    ("dev", "report-export", _out_of_memory),
    ("prod", "mail-queue", _evicted),
    ("dev", "audit-trail", _cancelled),
    ("prod", "train-ranking", _never_fits),
)


def _schedule_steps(started_at: float) -> list[DemoStep]:
    """Return the life of a schedule that makes two runs."""
    minute = int(started_at // 60)
    born_at = format_time(started_at - 86400)
    name = "fabrik-schedule-nightly"
    cronjob = _bare_object("prod", CRONJOBS, name, born_at, {"schedule-id": "nightly"})
    cronjob["spec"] = {"schedule": "* * * * *", "timeZone": "Etc/UTC", "concurrencyPolicy": "Forbid", "suspend": False}
    owner = _owner_reference(cronjob, CRONJOBS)
    last: JsonObject = {"lastScheduleTime": format_time(60.0 * (minute - 1))}
    steps = [DemoStep(-1, "prod", CRONJOBS.name, "ADDED", {**cronjob, "status": last})]
    for number, at_s in enumerate((5.0, 38.0)):
        run = _Actor("prod", "nightly", started_at)
        run.submit_as(at_s, f"{name}-{minute + number}", {"schedule-id": "nightly"}, owner)
        run.add_pod(at_s + 0.3)
        run.begin(at_s + 1)
        run.work("validate", at_s + 3, at_s + 15, 44)
        run.finish(at_s + 17)
        active = [{"kind": "Job", "name": f"{name}-{minute + number}"}]
        last = {**last, "lastScheduleTime": format_time(60.0 * (minute + number))}
        ended = {**last, "lastSuccessfulTime": format_time(started_at + at_s + 18)}
        states = ((at_s + 0.1, {**last, "active": active}), (at_s + 18.5, ended))
        steps += [DemoStep(at, "prod", CRONJOBS.name, "MODIFIED", {**cronjob, "status": was}) for at, was in states]
        steps += run.steps
        last = ended
    return steps


def _pod_status(phase: str, state: JsonObject, started_at: str | None = None) -> JsonObject:
    container = {"name": "smithers", "image": _IMAGE, "ready": phase == "Running", "restartCount": 0, "state": state}
    return {"phase": phase, "startTime": started_at, "containerStatuses": [container]}


def _bare_object(cluster: str, kind: Resource, name: str, created_at: str, labels: JsonObject) -> JsonObject:
    metadata: JsonObject = {
        "name": name,
        "namespace": DEMO_NAMESPACE,
        "uid": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{cluster}/{kind.name}/{name}")),
        "creationTimestamp": created_at,
    }
    if kind is not EVENTS:
        metadata["labels"] = {**_MANAGED, **{FABRIK_PREFIX + key: value for key, value in labels.items()}}
    return {"metadata": metadata}


def _owner_reference(item: JsonObject, kind: Resource) -> JsonObject:
    named = {key: item["metadata"][key] for key in ("name", "uid")}
    return {"apiVersion": "batch/v1", "kind": _API_KINDS[kind.name], **named, "controller": True}


def _copy_of(item: JsonObject) -> JsonObject:
    copied: JsonObject = json.loads(json.dumps(item))
    return copied


def _ulid(created_at: float, seed: str) -> str:
    """Return a lower-case ULID of this time (github.com/ulid/spec), its chance taken from the seed."""
    value = int(created_at * 1000) << 80 | uuid.uuid5(uuid.NAMESPACE_URL, seed).int >> 48
    return "".join(_CROCKFORD[value >> 5 * place & 31] for place in reversed(range(26)))


def _digits(seed: str, length: int) -> str:
    return uuid.uuid5(uuid.NAMESPACE_URL, seed).hex[:length]


# ======================================================================================================================
# Shell: sockets, clocks, files and threads
# ======================================================================================================================

# ----------------------------------------------------------------------------------------------------------------------
# Reactor
# ----------------------------------------------------------------------------------------------------------------------


class Timer:
    """A call that is to come; `cancel` takes it back."""

    def __init__(self, at: float, callback: Callable[[], None]) -> None:
        self.at = at
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Take the call back."""
        self.callback = None


class Reactor:
    """One thread's loop over sockets and timers; everything in the daemon but SQLite happens in its callbacks."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._soon: deque[Callable[[], None]] = deque()
        self._running = False
        self._thread = 0  # the one that turns the loop: all others have to wake it
        self._sleep_s = math.inf
        self._on_sleep: Callable[[], None] = lambda: None
        self._pools: dict[str, concurrent.futures.ThreadPoolExecutor] = {}
        self._wake_in, self._wake_out = socket.socketpair()
        for end in (self._wake_in, self._wake_out):
            end.setblocking(False)
        self.register(self._wake_in, selectors.EVENT_READ, self._on_wake)

    @staticmethod
    def now() -> float:
        """Return the monotonic time that timers go by."""
        return time.monotonic()

    def call_at(self, at: float, callback: Callable[[], None]) -> Timer:
        """Call back at a monotonic time."""
        timer = Timer(at, callback)
        heapq.heappush(self._timers, (at, next(self._order), timer))
        return timer

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Call back after some seconds."""
        return self.call_at(self.now() + delay, callback)

    def call_every(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call back again and again."""

        def turn() -> None:
            self.call_later(seconds, turn)
            callback()

        self.call_later(seconds, turn)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call back in the loop's next turn; the one method that other threads may call."""
        self._soon.append(callback)
        if threading.get_ident() != self._thread:
            self.wake()

    def wake(self) -> None:
        """Let the loop take a turn now."""
        try:
            self._wake_out.send(b"\0")
        except (BlockingIOError, OSError):
            return  # a full pipe wakes as well; a closed one needs no waking

    @property
    def wake_fd(self) -> int:
        """What signal.set_wakeup_fd writes to."""
        return self._wake_out.fileno()

    def register(self, sock: socket.socket, events: int, callback: Callable[[int], None]) -> None:
        """Call back with the ready events of a socket; again for other events."""
        try:
            self._selector.modify(sock, events, callback)
        except KeyError:
            self._selector.register(sock, events, callback)

    def unregister(self, sock: socket.socket) -> None:
        """Call no more for a socket."""
        try:
            self._selector.unregister(sock)
        except (KeyError, ValueError):
            return  # never registered, or closed meanwhile

    def run_blocking(
        self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None], pool: str = "work"
    ) -> None:
        """Do blocking work in one of the pools; `done` gets its result or exception in the loop.

        Each kind of work has a pool of its own: plugins that hang must not keep names from being looked up.
        """

        def finish(future: concurrent.futures.Future[Any]) -> None:
            if not future.cancelled():
                error = future.exception()
                self.call_soon(lambda: done(None if error else future.result(), error))

        if pool not in self._pools:
            self._pools[pool] = concurrent.futures.ThreadPoolExecutor(POOL_THREADS, pool)
        self._pools[pool].submit(work).add_done_callback(finish)

    def watch_sleep(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call back when the host, or this process, must have slept longer than that; before anything else then."""
        self._sleep_s, self._on_sleep = seconds, callback

    def run(self) -> None:
        """Turn until `stop`."""
        self._running, self._thread = True, threading.get_ident()
        turned_at, offset_before = self.now(), time.time() - self.now()
        while self._running:
            timeout = self._timeout()
            ready = self._selector.select(timeout)
            now, offset = self.now(), time.time() - self.now()
            late_s = now - turned_at - timeout if timeout is not None else 0.0
            turned_at, offset_before, jumped_s = now, offset, offset - offset_before
            if max(late_s, jumped_s) > self._sleep_s:
                self._call(self._on_sleep)
            for key, events in ready:
                if self._selector.get_map().get(key.fd) is key:  # else a callback before it closed or changed it
                    self._call(lambda key=key, events=events: key.data(events))  # type: ignore[misc]
            for _ in range(len(self._soon)):
                self._call(self._soon.popleft())
            now = self.now()
            while self._timers and self._timers[0][0] <= now:
                callback = heapq.heappop(self._timers)[2].callback
                if callback is not None:
                    self._call(callback)

    def stop(self) -> None:
        """End `run` after the present callback."""
        self._running = False

    def close(self) -> None:
        """Give everything back."""
        for pool in self._pools.values():
            pool.shutdown(wait=False)  # a name look-up may take its time; the process ends without it
        self.unregister(self._wake_in)
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()

    def _timeout(self) -> float | None:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        if self._soon:
            return 0
        return max(0.0, self._timers[0][0] - self.now()) if self._timers else None

    def _on_wake(self, _events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_in.recv(4096)

    def _call(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception:  # noqa: BLE001 - one connection's trouble must not end the others
            self._log.exception("a callback failed; this is a defect")


class Alarm:
    """Calls `due` with the time once a deadline has come, wherever it has moved meanwhile."""

    def __init__(self, reactor: Reactor, deadline: Callable[[], float], due: Callable[[float], None]) -> None:
        self._reactor = reactor
        self._deadline = deadline
        self._due = due
        self._timer: Timer | None = None

    def set(self) -> None:
        """Take in that the deadline may have moved; one that moved on is found when the timer fires."""
        deadline = self._deadline()
        if self._timer is None or self._timer.at > deadline:
            self.cancel()
            self._timer = self._reactor.call_at(deadline, self._on_timer)

    def cancel(self) -> None:
        """Call no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timer(self) -> None:
        self._timer, now = None, self._reactor.now()
        if now >= self._deadline():
            self._due(now)
        else:
            self.set()


# ----------------------------------------------------------------------------------------------------------------------
# Streams
# ----------------------------------------------------------------------------------------------------------------------


class StreamHandler(Protocol):
    """What a stream tells its owner."""

    def on_open(self) -> None:
        """Take in that the connection stands, TLS included."""

    def on_data(self, data: bytes) -> None:
        """Take in bytes; empty: the peer ended its side."""

    def on_drained(self) -> None:
        """Take in that all that was sent is on its way."""

    def on_error(self, error: str) -> None:
        """Take in that the connection is lost, or never came to be; the stream is closed."""


def tls_context(connection: Connection) -> ssl.SSLContext:
    """Return the TLS settings of a cluster. Raises ConfigError for certificates that do not load.

    VERIFY_X509_STRICT, which Python 3.13 switches on, rejects certificates without an authority key identifier;
    clusters have such.
    """
    try:
        context = ssl.create_default_context(cadata=connection.ca_pem)
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        context.set_alpn_protocols(["http/1.1"])
        if connection.insecure:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if connection.cert_pem and connection.key_pem:
            _load_client_certificate(context, connection.cert_pem, connection.key_pem)
    except (ssl.SSLError, ValueError, OSError) as error:
        if "encrypted" in str(error):
            raise ConfigError("the client key is encrypted", "write it to the kubeconfig without a password") from None
        reason = getattr(error, "reason", None) or "not PEM"
        raise ConfigError(f"the kubeconfig's certificates do not load ({reason})", "renew them") from None
    return context


def _load_client_certificate(context: ssl.SSLContext, cert_pem: str, key_pem: str) -> None:
    """Load a key that OpenSSL only takes from a file, without leaving one: in memory, else unlinked at once."""

    def password() -> str:
        raise ValueError("encrypted keys are not supported")  # without it OpenSSL asks on the terminal

    data = f"{cert_pem}\n{key_pem}\n".encode()
    if hasattr(os, "memfd_create"):
        with open(os.memfd_create("client-key"), "wb") as file:
            file.write(data)
            file.flush()
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}", password=password)
        return
    with tempfile.TemporaryDirectory(prefix="fabrik-") as folder:  # 0700
        path = f"{folder}/key.pem"
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
        context.load_cert_chain(path, password=password)


class Route(NamedTuple):
    """How a server is reached."""

    endpoint: Endpoint
    context: ssl.SSLContext | None  # None: plain HTTP
    server_name: str | None  # where it is not the endpoint's host
    proxy: Proxy | None
    pool: str = "names"  # where its name is looked up


class Dialer:
    """Makes one connection: name look-up in the pool, TCP to the first address that answers, a proxy's tunnel, TLS."""

    def __init__(
        self, reactor: Reactor, route: Route, timing: Timing, done: Callable[[socket.socket | None, str], None]
    ) -> None:
        self._reactor = reactor
        self._route = route
        self._timing = timing
        self._done = done  # gets the connection, or why there is none
        self._socket: socket.socket | None = None
        self._addresses: list[tuple[int, Any]] = []
        self._answer = b""  # of the proxy
        self._timer: Timer | None = None
        self._finished = False

    def start(self) -> None:
        """Begin."""
        first = self._route.proxy or self._route.endpoint

        def look_up() -> list[tuple[int, Any]]:
            found = socket.getaddrinfo(first.host, first.port, type=socket.SOCK_STREAM)
            return [(family, address) for family, _, _, _, address in found]

        def done(addresses: Any, error: BaseException | None) -> None:
            if error is not None:
                self._finish(None, f"{first.host} cannot be resolved: {getattr(error, 'strerror', None) or error}")
            elif not self._finished:
                self._addresses = addresses
                self._try_next("no address")

        patience = self._timing.resolve + self._timing.connect
        self._timer = self._reactor.call_later(
            patience, lambda: self._finish(None, f"{first.host}:{first.port} did not answer within {patience:g} s")
        )
        self._reactor.run_blocking(look_up, done, self._route.pool)

    def cancel(self) -> None:
        """Give up; nothing is told any more."""
        self._finished = True
        if self._timer is not None:
            self._timer.cancel()
        if self._socket is not None:
            self._reactor.unregister(self._socket)
            self._socket.close()

    def _finish(self, sock: socket.socket | None, error: str) -> None:
        if self._finished:
            return
        if sock is not None:
            self._reactor.unregister(sock)
            self._socket = None
        self.cancel()
        self._done(sock, error)

    def _try_next(self, error: str) -> None:
        if self._socket is not None:
            self._reactor.unregister(self._socket)
            self._socket.close()
            self._socket = None
        if not self._addresses:
            self._finish(None, error)
            return
        family, address = self._addresses.pop(0)
        try:
            sock = self._socket = socket.socket(family, socket.SOCK_STREAM)
            sock.setblocking(False)
            tune(sock)
            sock.connect(address)
        except BlockingIOError:
            pass
        except OSError as problem:
            self._try_next(f"{address[0]}:{address[1]}: {problem.strerror or problem}")
            return
        self._reactor.register(sock, selectors.EVENT_WRITE, lambda _: self._on_connected(sock, address))

    def _on_connected(self, sock: socket.socket, address: Any) -> None:
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._try_next(f"{address[0]}:{address[1]}: {os.strerror(code)}")
        elif self._route.proxy is None:
            self._secure(sock)
        else:
            sock.send(self._route.proxy.connect_request(self._route.endpoint))  # some hundred bytes: they fit
            self._reactor.register(sock, selectors.EVENT_READ, lambda _: self._on_proxy(sock))

    def _on_proxy(self, sock: socket.socket) -> None:
        """Take in what a proxy answers to CONNECT (RFC 9110, section 9.3.6); TLS servers do not speak first."""
        data, end, error = receive_from(sock)
        self._answer += data
        if b"\r\n\r\n" in self._answer:
            first_line = self._answer.partition(b"\r\n")[0].decode("latin-1")
            if re.match(r"HTTP/1\.[01] 2\d\d\b", first_line):
                self._secure(sock)
            else:
                self._finish(None, f"the proxy refused: {clip(first_line)}")
        elif end or error or len(self._answer) > HEADERS_MAX_BYTES:
            self._finish(None, f"the proxy gave no answer: {error or 'the connection ended'}")

    def _secure(self, sock: socket.socket) -> None:
        if self._route.context is None:
            self._finish(sock, "")
            return
        self._reactor.unregister(sock)
        self._socket = secured = self._route.context.wrap_socket(
            sock,
            server_hostname=self._route.server_name or self._route.endpoint.host,
            do_handshake_on_connect=False,
            suppress_ragged_eofs=False,  # an end without close_notify is an error here, not an end
        )
        shake_hands(self._reactor, secured, lambda error: self._on_secured(secured, error))

    def _on_secured(self, sock: ssl.SSLSocket, error: OSError | None) -> None:
        if error is None:
            self._finish(sock, "")
        elif isinstance(error, ssl.SSLCertVerificationError):
            self._finish(None, f"the server's certificate is not accepted: {error.verify_message}")
        else:
            why = getattr(error, "reason", None) or error.strerror or error
            self._finish(None, f"no TLS with the server: {why}")


def shake_hands(reactor: Reactor, sock: ssl.SSLSocket, done: Callable[[OSError | None], None]) -> None:
    """Go through a TLS handshake, from either side; `done` gets what went wrong. The socket stays registered."""
    try:
        sock.do_handshake()
    except ssl.SSLWantReadError:
        reactor.register(sock, selectors.EVENT_READ, lambda _: shake_hands(reactor, sock, done))
    except ssl.SSLWantWriteError:
        reactor.register(sock, selectors.EVENT_WRITE, lambda _: shake_hands(reactor, sock, done))
    except OSError as error:  # ssl.SSLError is one
        done(error)
    else:
        done(None)


class Stream:
    """A connection that never blocks: TCP, with TLS or without, or a client's on the Unix socket."""

    def __init__(self, reactor: Reactor, handler: StreamHandler) -> None:
        self._reactor = reactor
        self._handler = handler
        self._dialer: Dialer | None = None
        self._socket: socket.socket | None = None
        self._output = bytearray()
        self._closed = False
        self._paused = False
        self._events = 0  # that the reactor calls back for

    def connect(self, route: Route, timing: Timing) -> None:
        """Connect; what is sent meanwhile waits."""

        def done(sock: socket.socket | None, error: str) -> None:
            if sock is None:
                self._fail(error)
            else:
                self.adopt(sock)
                self._handler.on_open()
                self.send(b"")

        self._dialer = Dialer(self._reactor, route, timing, done)
        self._dialer.start()

    def adopt(self, sock: socket.socket) -> None:
        """Take over a connection that stands."""
        self._socket = sock
        self._watch()

    @property
    def pending_bytes(self) -> int:
        """How much the connection has not taken yet."""
        return len(self._output)

    @property
    def is_unread(self) -> bool:
        """Whether the peer has not read all that was sent; only a Unix socket can tell."""
        if self._socket is None or self._output:
            return True
        if sys.platform == "darwin":
            return bool(self._socket.getsockopt(socket.SOL_SOCKET, 0x1024))  # SO_NWRITE
        return any(fcntl.ioctl(self._socket, termios.TIOCOUTQ, b"\0" * 4))

    @property
    def is_closed(self) -> bool:
        """Whether the connection is over."""
        return self._closed

    def send(self, data: bytes) -> None:
        """Send bytes, now or when the connection takes them."""
        self._output += data
        if self._socket is not None and not self._closed:
            self._flush(self._socket)

    def pause(self) -> None:
        """Take in no more until `resume`."""
        self._paused = True
        self._watch()

    def resume(self) -> None:
        """Take in again, also what TLS has decrypted already."""
        if self._paused:
            self._paused = False
            self._watch()
            self._reactor.call_soon(lambda: self._on_ready(0))

    def close(self) -> None:
        """Close at once; nothing is told any more."""
        if self._closed:
            return
        self._closed = True
        if self._dialer is not None:
            self._dialer.cancel()
        if self._socket is not None:
            self._reactor.unregister(self._socket)
            self._socket.close()

    def _watch(self) -> None:
        if self._socket is None or self._closed:
            return
        events = (0 if self._paused else selectors.EVENT_READ) | (selectors.EVENT_WRITE if self._output else 0)
        if events and events != self._events:
            self._reactor.register(self._socket, events, self._on_ready)
        elif events != self._events:
            self._reactor.unregister(self._socket)
        self._events = events

    def _on_ready(self, _events: int) -> None:
        sock = self._socket
        if sock is not None and self._output and not self._closed:
            self._flush(sock)
            if not self._output and not self._closed:
                self._handler.on_drained()
        if sock is not None and not self._paused and not self._closed:
            self._read(sock)

    def _read(self, sock: socket.socket) -> None:
        """Take in one share of what is there, then let others have their turn."""
        data, end, error = receive_from(sock)
        if data:
            self._handler.on_data(data)
        if self._closed or self._paused:  # the end comes again when the handler has taken in what came before it
            return
        if error:
            self._fail(error)
        elif end:
            self._paused = True
            self._watch()
            self._handler.on_data(b"")
            if not self._closed and has_hung_up(sock):
                self._fail("the peer hung up")
        elif len(data) >= READ_BYTES and isinstance(sock, ssl.SSLSocket) and sock.pending():
            self._reactor.call_soon(lambda: self._on_ready(0))  # select does not see what TLS has decrypted

    def _flush(self, sock: socket.socket) -> None:
        try:
            while self._output:
                del self._output[: sock.send(self._output)]
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except OSError as problem:
            self._fail(f"the connection broke: {problem.strerror or problem}")
            return
        self._watch()

    def _fail(self, error: str) -> None:
        if not self._closed:
            self.close()
            self._handler.on_error(error)


def has_hung_up(sock: socket.socket) -> bool:
    """Say whether a peer that sends no more reads no more either."""
    poll = select.poll()
    poll.register(sock, 0)
    return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))


def receive_from(sock: socket.socket) -> tuple[bytes, bool, str]:
    """Return what there is to read, up to a share; whether the peer has ended; why the connection broke."""
    data = bytearray()
    try:
        while len(data) < READ_BYTES:
            piece = sock.recv(READ_BYTES - len(data))
            if not piece:
                return bytes(data), True, ""
            data += piece
    except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        pass
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        return bytes(data), True, ""  # whether it was a whole response is for HTTP to tell
    except OSError as problem:
        return bytes(data), False, f"the connection broke: {problem.strerror or problem}"
    return bytes(data), False, ""


def tune(sock: socket.socket) -> None:
    """Let the system find dead connections too, where it can."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 60_000)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


# ----------------------------------------------------------------------------------------------------------------------
# Cache: reading
# ----------------------------------------------------------------------------------------------------------------------


def size_of(path: str) -> int:
    """Return a file's size, 0 where there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def lock_path(cache: str) -> str:
    """Return where a cache's lock is."""
    return os.path.join(os.path.dirname(os.path.abspath(cache)), "daemon.lock")


def is_kept_up(cache: str) -> bool:
    """Say whether a daemon keeps this cache up to date at this moment."""
    try:
        file = os.open(lock_path(cache), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(file)


def held_after(connection: sqlite3.Connection) -> int:
    """Return after which number `changes` holds every change."""
    return int(meta_of(connection, "changes_after") or 0)


CHANGES_SQL: Final = "SELECT seq, type, at, row, before FROM changes"


def meta_of(connection: sqlite3.Connection, key: str) -> str:
    """Return a value of `meta`, empty where there is none."""
    found = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return str(found[0]) if found else ""


def _connect_readonly(path: str) -> sqlite3.Connection:
    folder = os.path.dirname(os.path.abspath(path))
    fixed = not os.access(folder, os.W_OK) and not size_of(path + "-wal")  # SQLite could not make its index there
    uri = "file:" + os.path.abspath(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    flags = "mode=ro&immutable=1" if fixed else "mode=ro"
    try:
        return sqlite3.connect(f"{uri}?{flags}", uri=True, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise CacheError(f"{path}: {error}", "name another place with --cache") from None


class CacheReader:
    """Reads the cache, with or without a daemon, also where nothing may be written."""

    def __init__(self, path: str) -> None:
        """Open the cache. Raises CacheError."""
        if not os.path.exists(path):
            raise CacheError(
                f"nothing is known yet: no cache at {path}", "run 'fabrik-daemon start' or 'fabrik-daemon sync'"
            )
        self.connection = _connect_readonly(path)
        try:
            self._check_version(path)
        except CacheError:
            self.connection.close()
            raise
        self._kept_up = is_kept_up(path)

    def _check_version(self, path: str) -> None:
        try:
            found = self.connection.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone()
        except sqlite3.Error as error:
            raise CacheError(f"{path}: {error}", "start the daemon, which sets a damaged cache aside") from None
        version = int(found[0]) if found else 0
        if version != len(MIGRATIONS):
            told = f"{path} has schema {version}, this fabrik-daemon reads {len(MIGRATIONS)}"
            raise CacheError(told, "use the same version for both")

    def close(self) -> None:
        """Close the cache."""
        self.connection.close()

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[JsonObject]:
        """Return the rows of a query of ours, as objects. Raises CacheError."""
        try:
            cursor = self.connection.execute(sql, values)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row)) for row in cursor]
        except sqlite3.Error as error:
            raise CacheError(f"the cache cannot be read: {error}") from None

    def freshness(self) -> list[Freshness]:
        """Return how old each cluster's part is: by the watch that is behind the others, forbidden ones left out."""
        found = self.rows(
            "SELECT c.name, c.connected, c.error, coalesce(min(CASE WHEN w.state = 'forbidden' THEN NULL"
            " ELSE coalesce(w.synced_at, '') END), min(w.synced_at)) AS synced_at FROM clusters c"
            " LEFT JOIN watches w ON w.cluster = c.name GROUP BY c.name ORDER BY c.priority, c.name"
        )
        return [
            Freshness(row["name"], bool(row["connected"]) and self._kept_up, row["synced_at"] or None, row["error"])
            for row in found
        ]

    def held(self, seq: int) -> Held:
        """Return some of the changes after a number. Raises CacheError."""
        try:
            rows = self.connection.execute(f"{CHANGES_SQL} WHERE seq > ? ORDER BY seq LIMIT ?", (seq, REPLAYED_AT_ONCE))
            return Held([change_from(*row) for row in rows], held_after(self.connection) <= seq)
        except sqlite3.Error as error:
            raise CacheError(f"the cache cannot be read: {error}") from None

    def runs(self) -> Iterator[Run]:
        """Yield every run."""
        return (Run(**row) for row in self.rows(f"SELECT {', '.join(Run._fields)} FROM runs"))  # noqa: S608 - ours

    def status_events(self) -> Iterator[StatusEvent]:
        """Yield every change of a status, in their order."""
        for row in self.rows(
            "SELECT run_id, payload, local_timestamp FROM run_events WHERE event_type = 'status_changed' ORDER BY id"
        ):
            said = parse_json(row["payload"]) or {}
            before, status, reason = said.get("from"), said.get("to"), said.get("reason")
            yield StatusEvent(row["run_id"], before, status, reason, row["local_timestamp"])

    def run_changes(self) -> Iterator[StoredChange]:
        """Yield every change of a run that is held, in their order."""
        found = self.rows(
            "SELECT json_extract(row, '$.run_id') AS run_id, type, at, row, before FROM changes"
            " WHERE type LIKE 'run:%' ORDER BY seq"
        )
        return (StoredChange(**row) for row in found)

    def changes_reach(self) -> str | None:
        """Return since when every change is held, None where none is."""
        return str(found) if (found := self.rows("SELECT min(at) AS at FROM changes")[0]["at"]) else None

    def run_details(self, run_id: str) -> JsonObject:
        """Return a run's events, volumes and warnings."""
        events = self.rows(
            "SELECT * FROM (SELECT * FROM run_events WHERE run_id = ? ORDER BY id DESC LIMIT ?) ORDER BY id",
            (run_id, RUN_EVENTS_SHOWN),
        )
        for event in events:
            event["payload"] = parse_json_object(event["payload"])
        volumes = self.rows("SELECT * FROM volumes WHERE run_id = ? ORDER BY namespace, name", (run_id,))
        warnings = self.rows("SELECT * FROM cluster_events WHERE run_id = ? ORDER BY last_at", (run_id,))
        return {"events": events, "volumes": volumes, "warnings": warnings}


# ----------------------------------------------------------------------------------------------------------------------
# Cache
# ----------------------------------------------------------------------------------------------------------------------


class CacheThread:
    """The one thread that writes cache.db: units of statements in, batches out, each in one transaction."""

    def __init__(self, path: str, connection: sqlite3.Connection, timing: Timing, log: logging.Logger) -> None:
        self._path = path
        self._connection = connection
        self._timing = timing
        self._log = log
        self._units: deque[WriteUnit] = deque()
        self._operations = 0  # in all of them
        self._lock = threading.Lock()
        self._some, self._enough = threading.Event(), threading.Event()
        self._queued_at: deque[float] = deque()  # of what waits, in the same order
        self._thread = threading.Thread(target=self._run, name="cache", daemon=True)
        self._stopping = False
        self._pinned = False  # a reader keeps the write-ahead log from being emptied
        self.error: str | None = None  # why writing is impossible or slowed at present
        self.on_written: Callable[[float], None] = lambda seconds: None  # what a change took to its commit
        self.on_rebuilt: Callable[[], None] = lambda: None  # a damaged cache was set aside: write everything again

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def put(self, unit: WriteUnit) -> None:
        """Have some statements written together; returns at once."""
        if not unit:
            return
        with self._lock:
            self._units.append(unit)
            self._queued_at.append(time.monotonic())
            self._operations += len(unit)
        if not self._some.is_set():  # one wake-up a batch: each costs the loop a fight for the interpreter
            self._some.set()
        if self._operations >= self._limit:
            self._enough.set()

    @property
    def waiting(self) -> int:
        """How many units wait to be written, or are being."""
        return len(self._queued_at)

    def held(self, seq: int) -> Held:
        """Return some of the changes after a number, read beside the writer; takes disk. Raises CacheError."""
        with contextlib.closing(CacheReader(self._path)) as reader:
            return reader.held(seq)

    def close(self, timeout: float) -> bool:
        """Write what waits, then close; False where that took longer than the timeout."""
        self._stopping = True
        self._some.set()
        self._enough.set()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def _limit(self) -> int:
        return PINNED_OPERATIONS if self._pinned else BATCH_OPERATIONS

    def _run(self) -> None:
        more = True
        while more:
            units, more = self._batch()
            if units:
                self._write(units)
                now = time.monotonic()
                for _ in units:
                    self.on_written(now - self._queued_at.popleft())
                self._look_at_log()
        self._connection.close()

    def _batch(self) -> tuple[list[WriteUnit], bool]:
        """Return the next units, and whether there may be more after them; the first is waited for."""
        self._some.wait()
        self._enough.wait(self._timing.pinned_batch if self._pinned else self._timing.batch)
        units: list[WriteUnit] = []
        operations = 0
        with self._lock:
            while self._units and operations < self._limit:
                units.append(self._units.popleft())
                operations += len(units[-1])
            self._operations -= operations
            if self._operations < self._limit and not self._stopping:
                self._enough.clear()
            if not self._units and not self._stopping:
                self._some.clear()
            return units, bool(self._units) or not self._stopping

    def _write(self, units: list[WriteUnit], *, leniently: bool = False) -> None:
        statements = [statement for unit in units for statement in unit]
        while True:
            try:
                self._transact(merge_statements(statements), leniently=leniently)
            except sqlite3.OperationalError as error:  # the disk is full, or the file is locked: wait
                if self.error is None:
                    self._log.error("the cache cannot be written, trying again: %s", error)
                self.error = str(error)
                if self._stopping:
                    self._log.error("gave up writing %d units to the cache: %s", len(units), error)
                    return
                time.sleep(self._timing.cache_retry)
            except (sqlite3.Error, OverflowError, ValueError) as error:
                self._write_apart(units, error)
                return
            else:
                if self.error is not None and not self._pinned:
                    self._log.info("the cache can be written again")
                    self.error = None
                return

    def _write_apart(self, units: list[WriteUnit], error: Exception) -> None:
        """Write each unit for itself where one of them is bad, and of a bad one what goes."""
        if type(error) is sqlite3.DatabaseError:  # not one of its kinds: the file itself is damaged
            self._rebuild(error)
        elif len(units) > 1:
            for unit in units:
                self._write([unit])
        else:
            self._log.error("a row cannot be written to the cache and is left out: %s", error)
            self._write(units, leniently=True)

    def _rebuild(self, error: Exception) -> None:
        """Set a cache aside that turns out to be damaged, and have everything written anew."""
        set_aside(self._path, error, self._log)  # before it is closed, which would delete its write-ahead log
        self._connection.close()
        self._connection = open_cache(self._path, self._log)
        self.on_rebuilt()

    def _transact(self, statements: Iterable[Statement], *, leniently: bool) -> None:
        bad_row = (sqlite3.IntegrityError, sqlite3.InterfaceError, sqlite3.ProgrammingError, OverflowError, ValueError)
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            for statement, values in statements:
                with contextlib.suppress(*(bad_row if leniently else ())):
                    self._connection.execute(statement, values)

    def _look_at_log(self) -> None:
        """Slow down while a reader pins the write-ahead log, which would grow without end."""
        if size_of(self._path + "-wal") > WAL_MAX_BYTES:
            with contextlib.suppress(sqlite3.OperationalError):
                self._connection.execute("PRAGMA busy_timeout = 0")
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self._connection.execute(f"PRAGMA busy_timeout = {CACHE_BUSY_MS}")
        pinned = size_of(self._path + "-wal") > WAL_MAX_BYTES
        if pinned and not self._pinned:
            self.error = f"a reader pins the WAL of cache.db: written every {self._timing.pinned_batch:g} s only"
            self._log.warning("%s", self.error)
        elif self._pinned and not pinned:
            self.error = None
            self._log.info("the cache's write-ahead log is small again")
        self._pinned = pinned


def set_aside(path: str, error: Exception, log: logging.Logger) -> None:
    """Move a damaged cache out of the way, its log and index with it: without them it would lose what they hold."""
    aside = f"{path}.damaged-{int(time.time())}"
    _move_cache(path, aside)
    log.warning("the cache is damaged (%s): set aside as %s, made anew from the clusters", error, aside)


def _move_cache(path: str, to: str) -> None:
    for suffix in ("", "-wal", "-shm"):
        if os.path.exists(path + suffix):
            os.rename(path + suffix, to + suffix)


def replace_cache(path: str) -> str | None:
    """Move a cache that no daemon has out of the way, whole; return where it is now, None where there is none.

    Raises AlreadyRunningError where a daemon has it, CacheError where it cannot be moved.
    """
    prepare_cache_folder(path)
    lock, aside = SingleInstance(path), f"{path}.replaced-{int(time.time())}"
    lock.acquire()
    try:
        _move_cache(path, aside)
    except OSError as error:
        raise CacheError(f"{path}: {error.strerror}", "name another place with --cache") from None
    finally:
        lock.release()
    return aside if os.path.exists(aside) else None


class SingleInstance:
    """Holds `daemon.lock` beside the cache; the system gives it back however the process ends."""

    def __init__(self, cache: str) -> None:
        self._path = lock_path(cache)
        self._file = -1

    def acquire(self) -> None:
        """Take the lock. Raises AlreadyRunningError where another process has it."""
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise CacheError(f"{self._path}: {error.strerror}", "name another place with --cache") from None
        for _ in range(LOCK_TRIES):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(LOCK_POLL_S)  # it may be a command that looks whether a daemon runs: is_kept_up
        else:
            pid = os.pread(self._file, 32, 0).decode("ascii", "replace").strip()
            os.close(self._file)
            raise AlreadyRunningError(f"a daemon with this cache runs already (pid {pid or 'unknown'})")
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Give the lock back."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def prepare_cache_folder(cache: str) -> None:
    """Make the cache's folder, for us alone. Raises CacheError."""
    folder = os.path.dirname(os.path.abspath(cache))
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError as error:
        raise CacheError(f"{folder}: {error.strerror}", "name another place with --cache") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CacheError(f"{folder}: not writable", "name another place with --cache")


def open_cache(path: str, log: logging.Logger) -> sqlite3.Connection:
    """Open the cache for writing, made or migrated where needed; a damaged one is set aside. Raises CacheError."""
    connection = _connect(path)
    try:
        _prepare(connection, path)
    except sqlite3.OperationalError as error:
        connection.close()
        raise CacheError(f"{path}: {error}", "name another place with --cache") from None
    except sqlite3.DatabaseError as error:
        set_aside(path, error, log)  # before it is closed, which would delete its write-ahead log
        connection.close()
        connection = _connect(path)
        _prepare(connection, path)
    except FabrikError:
        connection.close()
        raise
    return connection


def _connect(path: str) -> sqlite3.Connection:
    before = os.umask(0o077)
    try:
        return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=CACHE_BUSY_MS / 1000)
    except sqlite3.Error as error:
        raise CacheError(f"{path}: {error}", "name another place with --cache") from None
    finally:
        os.umask(before)


def _prepare(connection: sqlite3.Connection, path: str) -> None:
    before = os.umask(0o077)
    try:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables and "meta" not in tables:
            raise CacheError(f"{path} is another program's database", "name another place with --cache")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if problem != "ok":
            raise sqlite3.DatabaseError(" ".join(problem.split())[:200])
        _migrate(connection, path)
    finally:
        os.umask(before)


def _migrate(connection: sqlite3.Connection, path: str) -> None:
    """Bring the schema up to this version, one step a transaction. Raises CacheError for a newer one."""
    connection.execute(META)
    found = connection.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone()
    version = int(found[0]) if found else 0
    if version > len(MIGRATIONS):
        raise CacheError(
            f"{path} was made by a newer fabrik-daemon (schema {version}, this one knows {len(MIGRATIONS)})",
            "use that one, or fill a new cache: 'fabrik-daemon start --rebuild-cache'",
        )
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            for statement in script.split(";\n"):
                if statement.strip():
                    connection.execute(statement)
            connection.execute(*set_meta("schema_version", str(number)))


class Resumption(NamedTuple):
    """What a start takes over from the cache."""

    snapshot: Snapshot
    versions: dict[Scope, tuple[str, str]]  # where each watch goes on, and when that was the last word
    uids: dict[str, str]  # cluster -> kube-system's uid
    followed: dict[str, str]  # cluster -> what stood behind its name when it was last followed
    past: Past
    kept: dict[str, str]  # run_id -> the uid of the Job whose last lines were fetched
    alerts: list[AlertRow]
    since: list[tuple[str, str | None]]  # run_id and since when it has the status it has, of active runs

    def take_versions(self, name: str, followed: str) -> dict[Scope, tuple[str, str]]:
        """Return, once, where a cluster's watches go on; nowhere where something else stands behind its name now."""
        taken = {scope: self.versions.pop(scope) for scope in list(self.versions) if scope.cluster == name}
        before, self.followed[name] = self.followed.get(name) or followed, followed
        return taken if before == followed else {}


def resume_from(path: str, connection: sqlite3.Connection, log: logging.Logger) -> Resumption:
    """Read what the cache holds, and reserve sequence numbers before the first is given out. Raises CacheError."""
    try:
        return _resume(connection, log)
    except sqlite3.Error as error:
        raise CacheError(f"{path}: {error}", "name another place with --cache") from None


def _resume(connection: sqlite3.Connection, log: logging.Logger) -> Resumption:
    reserved = int(meta_of(connection, "reserved_seq") or 0)
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT OR IGNORE INTO meta (key, value) VALUES ('stream', ?)", (str(uuid.uuid4()),))
        past = _past(connection, reserved)
        connection.execute(*set_meta("reserved_seq", str(reserved + SEQ_BLOCK)))
        connection.execute(*set_meta("begun_at", str(reserved)))
        connection.execute(*set_meta("lost", json.dumps([[gap.start, gap.stop] for gap in past.lost])))
    rows: list[TableRow] = []
    for table, kind in TABLES.items():
        rows += (kind(*values) for values in connection.execute(f"SELECT {', '.join(kind._fields)} FROM {table}"))  # noqa: S608
    objects = []
    for *key, text in connection.execute("SELECT cluster, resource, namespace, name, facts FROM objects"):
        try:
            objects.append((ObjectKey(*key), facts_from_json(key[1], text)))
        except (ValueError, KeyError) as error:
            log.warning("the cache holds facts that cannot be read, of %s: %s", "/".join(key), error)
    versions = {
        Scope(*scope): (version, synced_at)
        for *scope, version, synced_at in connection.execute(
            "SELECT cluster, resource, namespace, resource_version, synced_at FROM watches"
            " WHERE resource_version IS NOT NULL"
        )
    }
    followed = {
        name: meta_of(connection, f"followed:{name}") for (name,) in connection.execute("SELECT name FROM clusters")
    }
    uids = dict(connection.execute("SELECT name, uid FROM clusters WHERE uid IS NOT NULL"))
    snapshot = Snapshot(objects, rows, tuple(versions), reserved)
    sql = "SELECT substr(key, ?), value FROM meta WHERE key GLOB ?"
    kept = dict(connection.execute(sql, (len(KEPT_META) + 1, KEPT_META + "*")))
    columns = ", ".join(AlertRow._fields)
    alerts = [AlertRow(*values) for values in connection.execute(f"SELECT {columns} FROM alerts")]  # noqa: S608
    since = connection.execute(_SINCE).fetchall()
    return Resumption(snapshot, versions, uids, followed, past, kept, alerts, since)


_SINCE: Final = (
    "SELECT run_id, coalesce(cluster_timestamp, local_timestamp) FROM run_events WHERE id IN (SELECT max(e.id)"
    " FROM run_events e JOIN runs r ON r.run_id = e.run_id WHERE e.event_type = 'status_changed'"
    " AND r.status IN ('pending', 'running', 'blocked') GROUP BY e.run_id)"
)


def _past(connection: sqlite3.Connection, seq: int) -> Past:
    after, limit = held_after(connection), HISTORY_LOADED
    rows = connection.execute(f"{CHANGES_SQL} WHERE seq > ? ORDER BY seq DESC LIMIT ?", (after, limit))
    changes = [change_from(*row) for row in rows][::-1]
    known = max(int(meta_of(connection, "begun_at") or 0), changes[-1].seq if changes else 0)
    gaps = [range(*gap) for gap in json.loads(meta_of(connection, "lost") or "[]")]
    lost = [gap for gap in (*gaps, range(known + 1, seq)) if gap.stop > after]
    merged = [range(lost[0].start, lost[-LOST_GAPS].stop), *lost[1 - LOST_GAPS :]] if len(lost) > LOST_GAPS else lost
    after = changes[0].seq - 1 if len(changes) == limit else after
    return Past(Cursor(meta_of(connection, "stream"), seq), changes, after, merged)


# ----------------------------------------------------------------------------------------------------------------------
# Cache: queries
# ----------------------------------------------------------------------------------------------------------------------


TOO_MUCH_MEMORY: Final = "the query needs too much memory", "make it smaller, or ask for less of it"


class QueryTimeoutError(FabrikError):
    """User SQL took too long; its thread still runs, so the process must end at once."""

    http_status = 504


class QueryResult(NamedTuple):
    """What user SQL answered."""

    columns: list[str]
    rows: list[Values]
    is_cut: bool  # there were more rows than are ever shown


def run_query(reader: CacheReader, sql: str, seconds: float, values: Mapping[str, Any] | None = None) -> QueryResult:
    """Run user SQL within limits of time, memory and rows; `values` are its `:name`s. Raises FabrikError.

    It runs in a thread that nothing but the process's end can stop: a slow LIKE heeds neither interrupt nor progress
    handler. So this may only be called in a process that ends afterwards.
    """
    connection = reader.connection
    connection.execute("SELECT * FROM json_each('[]')").fetchall()  # fails under the authorizer unless touched before
    connection.execute("PRAGMA query_only = 1")
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    connection.set_authorizer(lambda action, first, second, *_: authorize(action, first, second))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (QUERY_MEMORY_BYTES, QUERY_MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 2, int(seconds) + 2))
        os.nice(QUERY_NICE)
    result: list[QueryResult | Exception] = []

    def work() -> None:
        try:
            cursor = connection.execute(sql, values or {})
            rows = cursor.fetchmany(QUERY_ROWS + 1)
            names = [column[0] for column in cursor.description or ()]
            result.append(QueryResult(names, rows[:QUERY_ROWS], len(rows) > QUERY_ROWS))
        except (sqlite3.Error, sqlite3.Warning, MemoryError, ValueError) as error:
            result.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not result:
        raise QueryTimeoutError(f"the query was ended after {seconds:g} s", "make it smaller, or raise timing.query")
    return _checked(result[0])


def _checked(result: QueryResult | Exception) -> QueryResult:
    if isinstance(result, QueryResult):
        if not result.columns:
            raise UsageError("SQL: there is no statement in it", 'write for example "SELECT * FROM runs"')
        return result
    words = str(result)
    if isinstance(result, MemoryError) or "out of memory" in words or "too big" in words:
        raise FabrikError(*TOO_MUCH_MEMORY)
    denied = any(word in words for word in ("not authorized", "prohibited", "readonly"))
    raise UsageError(f"SQL: {words}", "only SELECT is possible here" if denied else "see 'fabrik-daemon query --help'")


def query_helper(cache: str, seconds: str, out: TextIO) -> int:
    """Be the helper process of the daemon's `query`: SQL on stdin, JSON on stdout, which the daemon passes on as it is.

    One that parsed and wrote it anew would tell nobody anything meanwhile.
    """
    try:
        result = run_query(CacheReader(cache), sys.stdin.read(), float(seconds))
        rows = [[shown_value(value) for value in row] for row in result.rows]
        text = json.dumps({"columns": result.columns, "rows": rows, "is_cut": result.is_cut}, separators=(",", ":"))
    except FabrikError as error:
        text = json.dumps({"error": error_message(error, {})})
    except MemoryError:
        text = json.dumps({"error": error_message(FabrikError(*TOO_MUCH_MEMORY), {})})
    if len(text) > QUERY_ANSWER_BYTES:
        too_long = FabrikError(f"the answer is over {QUERY_ANSWER_BYTES >> 20} MiB", "ask for less of it")
        text = json.dumps({"error": error_message(too_long, {})})
    out.write(text)
    return 0


def schema_columns() -> list[tuple[str, str, str]]:
    """Return table or view, column and type of all that a cache holds, views last."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        for script in (META, *MIGRATIONS):
            connection.executescript(script)
        found = connection.execute(
            "SELECT m.name, c.name, c.type FROM sqlite_master m, pragma_table_info(m.name) c"
            " WHERE m.type IN ('table', 'view') AND m.name NOT LIKE 'sqlite%' ORDER BY m.type, m.rowid, c.cid"
        )
        return [(table, column, kind) for table, column, kind in found]


def shown_value(value: Any) -> Any:
    """Return a value of SQLite's as JSON has it: a blob in hexadecimal, infinity as a word."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value.hex() if isinstance(value, bytes) else value


# ----------------------------------------------------------------------------------------------------------------------
# Credentials
# ----------------------------------------------------------------------------------------------------------------------


def own_command(*words: str) -> list[str]:
    """Return the command line that runs this program again: the executable where there is one, else this module."""
    folder = os.path.dirname(os.path.abspath(__file__))
    enter = f"import sys; sys.path.insert(0, {folder!r}); import fabrik_daemon; fabrik_daemon.run()"
    return [sys.executable, "-c", enter, *words]


class Credentials:
    """Resolves connections in a helper process, so that a hung plugin can be killed and the daemon stays small."""

    def __init__(self, reactor: Reactor, timing: Timing) -> None:
        self._reactor = reactor
        self._timing = timing
        self._helpers = Helpers()

    def close(self) -> None:
        """End the helpers that still run, and start no more."""
        self._helpers.close()

    def resolve(self, spec: ClusterSpec, done: Callable[[Connection | FabrikError], None]) -> None:
        """Resolve a cluster's connection anew; `done` gets it, or what is wrong with it, in the loop."""

        def finish(result: Any, error: BaseException | None) -> None:
            if isinstance(error, FabrikError):
                done(error)
            elif error is not None:
                done(CredentialsError(f"{spec.kubeconfig}: {error}"))
            else:
                done(result)

        self._reactor.run_blocking(
            lambda: resolve_connection(spec, self._timing.credentials, self._helpers), finish, "credentials"
        )


class Helpers:
    """The helper processes that run now, each the leader of its own process group, with a TMPDIR of its own."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: set[int] = set()
        self._closed = False

    def run(self, command: Sequence[str], timeout: float) -> bytes:
        """Run a helper and return what it prints. Raises TimeoutExpired; whatever it started or left goes with it."""
        place = tempfile.mkdtemp(prefix="fabrik-helper-")  # kubernetes.config leaves key files when it is killed
        with self._changed:
            if self._closed:
                os.rmdir(place)
                raise CredentialsError("the daemon is stopping")
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "TMPDIR": place},
                start_new_session=True,
            )
            self._running.add(process.pid)
        try:
            output: bytes = process.communicate(timeout=timeout)[0]
            return output
        finally:
            _kill_group(process.pid)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
            shutil.rmtree(place, ignore_errors=True)
            with self._changed:
                self._running.discard(process.pid)
                self._changed.notify_all()

    def close(self) -> None:
        """End those that run, and start no more."""
        with self._changed:
            self._closed = True
            for pid in self._running:
                _kill_group(pid)
            self._changed.wait_for(lambda: not self._running, HELPERS_END_S)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def file_times(paths: Iterable[str]) -> tuple[tuple[str, float], ...]:
    """Return when files were last changed, 0 for one that is not there."""
    found = []
    for path in paths:
        try:
            found.append((path, os.stat(path).st_mtime))
        except OSError:
            found.append((path, 0.0))
    return tuple(found)


def resolve_connection(spec: ClusterSpec, timeout: float, helpers: Helpers) -> Connection:
    """Run the helper process for one cluster and wait for it. Raises ConfigError."""
    try:
        output = helpers.run(own_command("_credentials", spec.kubeconfig, spec.context or ""), timeout)
    except subprocess.TimeoutExpired:
        told = f"{spec.kubeconfig}: its credentials took over {timeout:g} s"
        raise CredentialsError(told, "run its plugin by hand") from None
    resolved = parse_json(output.decode("utf-8", "replace"))
    if resolved is None:
        raise CredentialsError(f"{spec.kubeconfig}: its credentials cannot be resolved")
    return connection_from(resolved)._replace(files=file_times(resolved.get("files", [])))


def query_in_process(settings: Settings, sql: str) -> bytes:
    """Return what query_helper answers in a process of its own. Raises QueryTimeoutError, FabrikError."""
    seconds = settings.timing.query
    try:
        done = subprocess.run(
            own_command("_query", settings.cache, str(seconds)),
            input=sql.encode("utf-8", "replace"),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds + CLIENT_TIMEOUT_S / 2,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise QueryTimeoutError(f"the query was ended after {seconds:g} s", "make it smaller") from None
    if done.stdout.startswith(b'{"error":'):
        raise RemoteError(json.loads(done.stdout)["error"])
    if not done.stdout.endswith(b"}"):
        raise FabrikError("the query needs too much memory or time", "make it smaller")
    return done.stdout


def credentials_helper(path: str, context: str, out: TextIO) -> int:
    """Be the helper process: print one context's resolved connection, or `error`, as JSON."""
    try:
        resolved = _resolve(path, context)
    except FabrikError as error:
        resolved = {"error": error.message, "hint": error.hint, "is_configuration": isinstance(error, ConfigError)}
    except (kubernetes.config.ConfigException, LookupError, TypeError, ValueError, AttributeError, OSError) as error:
        resolved = {"error": f"{path}: {' '.join(str(error).split())[:300]}", "is_configuration": True}
    out.write(json.dumps(resolved))
    return 0


def _resolve(path: str, context: str) -> JsonObject:
    if path == IN_CLUSTER:
        return _resolve_in_cluster()
    where = path.split(os.pathsep)
    present = [name for name in where if os.path.exists(name)]
    if not present:
        raise ConfigError(f"{path}: no such kubeconfig", "correct the path in clusters.yaml")
    for name in present:
        read_kubeconfig(name)
    kube_config = kubernetes.config.kube_config
    merged = kube_config.KubeConfigMerger(os.pathsep.join(present)).config
    name = context or merged.value.get("current-context") or ""
    known = [entry["name"] for entry in merged["contexts"].value]
    if name not in known:
        said = f"no context {name!r}" if name else "no current context"
        raise ConfigError(f"{path}: {said}", nearest(name, known) if name else "name one with 'context:'")
    entry = merged["contexts"].get_with_name(name)["context"]
    cluster = merged["clusters"].get_with_name(entry["cluster"])["cluster"]
    found = merged["users"].get_with_name(entry["user"], safe=True) if entry.safe_get("user") else None
    if entry.safe_get("user") and found is None:
        raise ConfigError(f"{path}: context {name!r} names user {entry['user']!r}, which is not there", "add it")
    user = found["user"] if found and found.safe_get("user") else None
    _refuse_unsupported(path, cluster.value, user.value if user else {})
    files = [*where, *_files_named(cluster), *(_files_named(user) if user else ())]
    status: JsonObject = {}
    if user is not None and user.safe_get("exec"):
        status = _run_plugin(user["exec"], user.path or path)
        del user.value["exec"]  # else the loader would run it again, and take its failure for no credentials
    configuration = kubernetes.client.Configuration()
    kube_config.KubeConfigLoader(config_dict=merged, active_context=name, config_base_path=None).load_and_set(
        configuration
    )
    return {**_connection_json(configuration, cluster.value, status), "files": files}


def read_kubeconfig(path: str) -> JsonObject:
    """Return a kubeconfig file's document. Raises ConfigError."""
    try:
        with open(path, encoding="utf-8") as file:
            return parse_kubeconfig(file.read(), path)
    except OSError as error:
        hint = "only root may read it: copy it, or run as root" if error.errno == errno.EACCES else "correct the path"
        raise ConfigError(f"{path}: {error.strerror}", hint) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8", "this is no kubeconfig") from None


def read_mounted(place: str) -> list[ClusterSpec]:
    """Return the clusters of a kubeconfig, or of a folder of them, in the files' order. Raises ConfigError.

    A mounted Secret is a folder whose names with a leading dot are how its files change all at once.
    """
    try:
        names = sorted(name for name in os.listdir(place) if not name.startswith("."))
        paths = [os.path.join(place, name) for name in names]
    except OSError:
        paths = [place]
    return mounted_clusters({path: read_kubeconfig(path) for path in paths if os.path.isfile(path)})


def _refuse_unsupported(path: str, cluster: JsonObject, user: JsonObject) -> None:
    if not isinstance(cluster.get("server"), str) or not cluster["server"]:
        raise ConfigError(f"{path}: its cluster has no server", "add 'server: https://...'")
    for key, value in (*cluster.items(), *user.items()):
        if key.endswith("-data"):
            try:
                base64.b64decode("".join(str(value).split()), validate=True)
            except ValueError:
                raise ConfigError(f"{path}: {key} is no base64", "copy the kubeconfig anew") from None
    if "username" in user or "password" in user:
        raise ConfigError(f"{path}: basic authentication left Kubernetes in 1.19", "use a token or a certificate")
    if cluster.get("proxy-url"):
        parse_proxy(cluster["proxy-url"])


def _run_plugin(plugin: Any, path: str) -> JsonObject:
    """Run an exec plugin (client.authentication.k8s.io) and return its status; what it prints on stderr is dropped."""
    command = plugin.value.get("command", "?")
    try:
        status = kubernetes.config.exec_provider.ExecProvider(plugin, os.path.dirname(os.path.abspath(path))).run()
    except OSError as error:
        raise ConfigError(
            f"{path}: exec plugin {command!r}: {error.strerror}", "install it, or correct its path"
        ) from None
    except kubernetes.config.ConfigException as error:
        why = re.match(r"exec: (process returned \d+|failed to decode|malformed \w+|plugin api version)", str(error))
        raise CredentialsError(
            f"{path}: exec plugin {command!r}: {why[1] if why else 'failed'}", "run it by hand"
        ) from None
    if not isinstance(status, dict) or not (status.get("token") or status.get("clientCertificateData")):
        raise CredentialsError(f"{path}: exec plugin {command!r}: no credential in its answer", "run it by hand")
    return status


def _connection_json(configuration: Any, cluster: JsonObject, status: JsonObject) -> JsonObject:
    def text_of(file: str | None) -> str | None:
        if not file:
            return None
        with open(file, encoding="utf-8") as opened:
            return opened.read()

    bearer = str(configuration.api_key.get("authorization") or "")
    return {
        "server": configuration.host,
        "ca_pem": text_of(configuration.ssl_ca_cert),
        "insecure": not configuration.verify_ssl,
        "tls_server_name": cluster.get("tls-server-name"),
        "cert_pem": status.get("clientCertificateData") or text_of(configuration.cert_file),
        "key_pem": status.get("clientKeyData") or text_of(configuration.key_file),
        "token": str(status.get("token") or bearer.partition(" ")[2]).strip() or None,
        "expires_at": epoch_of(status.get("expirationTimestamp")),
        "proxy_url": cluster.get("proxy-url") or _proxy_of_environment(configuration.host),
    }


def _proxy_of_environment(server: str) -> str | None:
    """Return the proxy of HTTPS_PROXY and NO_PROXY, as kubectl has it: none for this host itself."""
    try:
        endpoint = parse_server(server)
    except ConfigError:
        return None  # told where the connection is made
    proxy = urllib.request.getproxies().get("https" if endpoint.tls else "http")
    if not proxy or urllib.request.proxy_bypass(endpoint.host):
        return None
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(endpoint.host)
        if address.is_loopback or address.is_unspecified:
            return None
    return None if endpoint.host == "localhost" else proxy if "://" in proxy else f"http://{proxy}"


def _files_named(node: Any) -> list[str]:
    """Return the files that a cluster or user of a kubeconfig names, relative to the file it stands in."""
    keys = ("certificate-authority", "client-certificate", "client-key", "tokenFile")
    folder = os.path.dirname(os.path.abspath(node.path or "."))
    return [os.path.join(folder, node.value[key]) for key in keys if isinstance(node.value.get(key), str)]


def _resolve_in_cluster() -> JsonObject:
    configuration = kubernetes.client.Configuration()
    kubernetes.config.load_incluster_config(client_configuration=configuration)
    return {
        **_connection_json(configuration, {}, {}),
        "files": [f"{_SERVICE_ACCOUNT}/token", f"{_SERVICE_ACCOUNT}/ca.crt"],
    }


_SERVICE_ACCOUNT: Final = "/var/run/secrets/kubernetes.io/serviceaccount"


# ----------------------------------------------------------------------------------------------------------------------
# Watcher
# ----------------------------------------------------------------------------------------------------------------------


class WatchOwner(Protocol):
    """What a watch needs of its cluster."""

    traits: ServerTraits

    def connect(self, handler: StreamHandler) -> tuple[Stream, HttpClientCodec, str]:
        """Return a new connection to the API server, and the path that leads every target."""

    def headers(self) -> dict[str, str]:
        """Return what a request says of us, with the credentials of this moment."""

    def on_head(self, head: ResponseHead) -> None:
        """Take in the head of any response."""

    def on_watch_state(self, watcher: Watcher) -> None:
        """Take in that a watch is in another state."""

    def positions(self) -> Mapping[WatchStatus, int]:
        """Return how far the watches of one store are."""

    def on_list(self, before: Mapping[WatchStatus, int], version: str) -> None:
        """Take in at which version the store itself was listed, and how far the watches were when it was asked."""

    def renew(self) -> None:
        """Resolve the credentials anew."""


class WatchSink(Protocol):
    """What a cluster's watches tell the daemon."""

    def on_events(self, scope: Scope, events: Sequence[WatchEvent], synced_at: str | None) -> None:
        """Take in that objects were added, modified or deleted, and when the scope was known whole."""

    def on_list(self, scope: Scope, resource_version: str, items: list[Facts]) -> None:
        """Take in the whole list of a scope."""

    def on_watch_open(self, scope: Scope) -> None:
        """Take in that a watch has begun."""

    def on_bookmark(self, scope: Scope, resource_version: str) -> None:
        """Take in that everything up to this version is known."""

    def on_watch_state(self, scope: Scope, told: Told) -> None:
        """Take in that a watch is in another state."""

    def on_cluster_state(self, name: str) -> None:
        """Take in that a cluster is connected, or not any more, or has another error."""

    def on_new_epoch(self, name: str) -> None:
        """Take in that another cluster answers under this name."""

    def on_identity(self, name: str) -> bool:
        """Take in that a cluster's identity is known; False where it is another one's twin and must not be followed."""


class ClientHandler:
    """What a stream of ours to a server has to tell at the least: nothing, until bytes come."""

    def on_open(self) -> None:
        """Do nothing: what is to be sent waits in the stream."""

    def on_drained(self) -> None:
        """Do nothing: a request is small."""


class ResponseReader:
    """Takes one response of a list or a watch apart."""

    def __init__(self, resource_name: str, *, is_watch: bool) -> None:
        self._resource_name = resource_name
        self._began_at = time.monotonic()
        self.is_watch = is_watch
        self.head: ResponseHead | None = None
        self.refusal = b""
        self.lines = PodLineDecoder() if resource_name == PODS.name else LineDecoder(resource_name)
        self.list = ListDecoder()

    @property
    def is_settled(self) -> bool:
        """Whether an event is news by now; those that come first are of the time while nobody watched, and in part."""
        return time.monotonic() - self._began_at > BACKLOG_S

    def facts(self, data: bytes, items: dict[tuple[str, str], Facts], *, last: bool = False) -> Iterator[None]:
        """Add what a list's items tell to what is kept, one at each step."""
        for item in self.list.receive(data, last=last):
            facts = facts_from(self._resource_name, item)
            if facts is not None:
                facts = shared(facts)
                items[facts.namespace, facts.name] = facts
            yield

    def keep(self, event: WatchEvent, items: dict[tuple[str, str], Facts]) -> None:
        """Add what an event of a streamed list tells."""
        facts = event.project(self._resource_name) if event.type != "DELETED" else None
        if facts is None:
            items.pop(event.name, None)
        else:
            items[event.name] = facts

    @property
    def is_refused(self) -> bool:
        """Whether the response is no answer to what was asked."""
        return self.head is None or self.head.status != 200


class WatchStatus(ClientHandler):
    """How far a watch is, and what is to be told of it."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.told = Told(CONNECTING, "", None)
        self.once = False  # end when the scope has been listed
        self.is_following = False  # nothing that happens is missed
        self.was_listed = False  # by this process
        self.version: str | None = None  # the last that a list or a bookmark told
        self.synced_at: str | None = None  # when its part was the last word, None where it never was
        self.last_byte_at: str | None = None
        self.last_event_at: str | None = None


class Watcher(WatchStatus):
    """Drives one Watch machine over one connection at a time."""

    def __init__(
        self, reactor: Reactor, scope: Scope, machine: WatchMachine, owner: WatchOwner, sink: WatchSink
    ) -> None:
        self._reactor = reactor
        self._machine = machine
        self._owner = owner
        self._sink = sink
        self._stream: Stream | None = None
        self._codec: HttpClientCodec | None = None
        self._base = ""
        self._reader = ResponseReader(scope.resource, is_watch=False)
        self._items: dict[tuple[str, str], Facts] = {}  # of a list that is not whole yet
        self._work: Iterator[None] | None = None
        self._news: list[WatchEvent] = []  # not told yet; empty but within `_pump`
        self._alarm = Alarm(reactor, lambda: machine.deadline, lambda now: self._do(machine.due(now)))
        self._others: Mapping[WatchStatus, int] = {}  # how far they were when the list was asked for
        super().__init__(scope)

    def start(self) -> None:
        """Begin, or begin again with new credentials."""
        self._hang_up()
        self._do(self._machine.start(self._reactor.now()))

    def recycle(self, reason: str) -> None:
        """Give up the connection and go on over another."""
        self._do(self._machine.recycle(reason, self._reactor.now()))

    def relist(self, reason: str) -> None:
        """List everything anew."""
        self._do(self._machine.relist(reason, self._reactor.now()))

    def forget_version(self) -> None:
        """Have the start list everything anew."""
        self._machine.forget()

    def stop(self) -> None:
        """End; nothing is told any more."""
        self._hang_up()
        self._alarm.cancel()

    def on_data(self, data: bytes) -> None:
        """Take in bytes of the present response; empty: the server ended the connection."""
        if data:
            self._machine.heard(self._reactor.now())
            self.last_byte_at = format_time(time.time(), milliseconds=True)
        if self._codec is not None:
            self._work = self._process(self._codec, data)
            self._pump()

    def on_error(self, error: str) -> None:
        """Take in that the connection is lost."""
        self._do(self._machine.on_failure(error, self._reactor.now()))

    def _pump(self) -> None:
        """Work on what came for some milliseconds, then let others have their turn."""
        stream, ends_at = self._stream, time.monotonic() + CALLBACK_S
        if stream is None or self._work is None:
            return
        try:
            for _ in self._work:
                if time.monotonic() > ends_at:
                    stream.pause()
                    self._reactor.call_soon(self._pump)
                    self._tell_news()
                    return
        except ProtocolError as error:
            if self._stream is stream:
                self._do(self._machine.on_failure(error.message, self._reactor.now()))
            return
        self._work = None
        if self._stream is stream:
            stream.resume()

    def _process(self, codec: HttpClientCodec, data: bytes) -> Iterator[None]:
        for part in codec.receive(data):
            if isinstance(part, ResponseHead):
                self._on_head(part)
            else:
                for _ in self._on_body(part) if isinstance(part, bytes) else self._on_end(part):
                    yield
                    if self._codec is not codec:
                        return
            if self._codec is not codec:
                return
        if not data:
            self._do(self._machine.on_failure("the server closed the connection", self._reactor.now()))

    def _on_head(self, head: ResponseHead) -> None:
        self._reader.head = head
        self._owner.on_head(head)
        if head.status == 200 and self._reader.is_watch:
            self._sink.on_watch_open(self.scope)
            self._do(self._machine.on_watch_open(self._reactor.now()))

    def _on_body(self, data: bytes) -> Iterator[None]:
        reader = self._reader
        if reader.is_refused:
            reader.refusal = (reader.refusal + data)[:REFUSAL_MAX_BYTES]
        elif reader.is_watch:
            yield from self._follow(reader.lines.receive(data))
        else:
            yield from reader.facts(data, self._items)

    def _follow(self, events: Iterator[WatchEvent]) -> Iterator[None]:
        """Take in a watch's events; news is told together, since each telling costs as much as an event."""
        try:
            for event in events:
                actions = self._machine.on_event(event, self._reactor.now())
                if actions and isinstance(actions[0], Apply):
                    self._news.append(event)
                else:
                    self._tell_news()
                    self._do(actions)
                if len(self._news) >= EVENTS_AT_ONCE:
                    self._tell_news()
                yield
        finally:
            self._tell_news()

    def _tell_news(self) -> None:
        news, self._news = self._news, []
        if news:
            self.last_event_at = format_time(time.time(), milliseconds=True)
            self.synced_at = self.last_event_at if self._reader.is_settled else self.synced_at
            self._sink.on_events(self.scope, news, self.synced_at)

    def _on_end(self, end: ResponseEnd) -> Iterator[None]:
        reader, now = self._reader, self._reactor.now()
        if not reader.is_refused and not reader.is_watch:
            yield from reader.facts(b"", self._items, last=True)
            if not reader.list.resource_version:
                raise ProtocolError("a list without a resource version")
        if not end.reusable:
            self._hang_up()
        if reader.is_refused:
            refusal = refusal_from_response(reader.head or ResponseHead(502, {}), reader.refusal)
            self._do(self._machine.on_refusal(refusal, now))
        elif reader.is_watch:
            self._do(self._machine.on_watch_end(now))
        else:
            self._do(self._machine.on_page(reader.list.resource_version, reader.list.continue_token, now))

    def _do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Told):
                self._tell(action)
            elif isinstance(action, Keep):
                self._reader.keep(action.event, self._items)
            elif isinstance(action, Get):
                self._get(action)
            elif isinstance(action, HangUp):
                self._hang_up()
            elif isinstance(action, Renew):
                self._owner.renew()
            elif isinstance(action, (Advance, Swap)) and not self._take_version(action):
                return
        self._alarm.set()

    def _take_version(self, action: Advance | Swap) -> bool:
        """Take in that the scope is known up to a version; False where that was all that was wanted."""
        self.synced_at, self.version = format_time(time.time(), milliseconds=True), action.resource_version
        if isinstance(action, Advance):
            self._sink.on_bookmark(self.scope, action.resource_version)
            return True
        items, self._items, self.was_listed = self._items, {}, True
        self._owner.on_list(self._others, action.resource_version)
        self._sink.on_list(self.scope, action.resource_version, list(items.values()))
        if self.once:
            self.stop()
            self._tell(Told(WATCHING, "", None))
        return not self.once

    def _tell(self, told: Told) -> None:
        before, self.told = self.told, told.after(self.told.error) if not self.is_following else told
        told = self.told
        if told.state == WATCHING:
            self.is_following = True
        elif told.error:
            self.is_following = False
        if told != before:
            self._sink.on_watch_state(self.scope, told)
            self._owner.on_watch_state(self)

    def _get(self, get: Get) -> None:
        self._reader = ResponseReader(self.scope.resource, is_watch=get.watch)
        if get.first_page:
            self._items = {}
            self._others = {} if "resourceVersion=" in get.target else self._owner.positions()
        if self._stream is None or self._codec is None:
            self._stream, self._codec, self._base = self._owner.connect(self)
        target, headers = self._base + get.target, self._owner.headers()
        self._stream.send(self._codec.send_get(target, headers, compressed=not get.watch))

    def _hang_up(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream, self._codec, self._work = None, None, None


# ----------------------------------------------------------------------------------------------------------------------
# Watcher: clusters
# ----------------------------------------------------------------------------------------------------------------------


class Probe(ClientHandler):
    """One GET: its response, or why there is none."""

    def __init__(
        self,
        owner: WatchOwner,
        target: str,
        done: Callable[[ResponseHead | None, bytes, str], None],
        limit: int = REFUSAL_MAX_BYTES,
    ) -> None:
        self._done = done
        self._limit = limit
        self._head: ResponseHead | None = None
        self._body = b""
        self._stream, self._codec, base = owner.connect(self)
        self._stream.send(self._codec.send_get(base + target, owner.headers(), compressed=False))

    def cancel(self) -> None:
        """Give up; nothing is told any more."""
        self._stream.close()

    def on_data(self, data: bytes) -> None:
        """Take in bytes of the response."""
        try:
            for part in self._codec.receive(data):
                if isinstance(part, ResponseHead):
                    self._head = part
                elif isinstance(part, bytes):
                    self._body = (self._body + part)[: self._limit]
                else:
                    self._stream.close()
                    self._done(self._head, self._body, "")
                    return
        except ProtocolError as error:
            self._stream.close()
            self.on_error(error.message)

    def on_error(self, error: str) -> None:
        """Take in that the connection is lost."""
        self._done(None, b"", error)


class IdentityProbe:
    """Asks a server who it is, the uid of kube-system: until it says so, and again now and then."""

    def __init__(self, owner: WatchOwner, reactor: Reactor, timing: Timing, done: Callable[[str | None], None]) -> None:
        """`done` gets the uid at each answer, None where there was none or the server does not tell."""
        self._owner = owner
        self._reactor = reactor
        self._timing = timing
        self._done = done
        self._backoff = Backoff(timing, random.random)
        self._probe: Probe | None = None
        self._timer: Timer | None = None
        self._again = False  # what is under way may be the answer of whoever was there before

    def ask(self) -> None:
        """Ask, or ask once more after the question that is under way."""
        self._again = self._probe is not None
        if self._probe is None:
            self._after(self._timing.answer, self._on_silence)
            self._probe = Probe(self._owner, "/api/v1/namespaces/kube-system", self._on_answer)

    def cancel(self) -> None:
        """Ask no more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._probe is not None:
            self._probe.cancel()

    def _after(self, seconds: float, callback: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._reactor.call_later(seconds, callback)

    def _on_silence(self) -> None:
        if self._probe is not None:
            self._probe.cancel()
        self._on_answer(None, b"", "")

    def _on_answer(self, head: ResponseHead | None, body: bytes, _error: str) -> None:
        self._probe = None
        said = parse_json_object(body.decode("utf-8", "replace")) if head and head.status == 200 else None
        uid = text_at(said, "metadata", "uid") if said else None
        if head is not None:
            self._owner.on_head(head)
        self._after(self._pause(head, body, uid), self.ask)
        self._done(uid)

    def _pause(self, head: ResponseHead | None, body: bytes, uid: str | None) -> float:
        """Return when to ask again, in seconds: a balancer may hand over to another cluster, and nothing else tell."""
        if uid is None and (head is None or head.status not in (403, 404)):
            return self._backoff.delay(refusal_from_response(head, body).retry_after_s if head is not None else None)
        self._backoff.failures = 0
        if self._again:
            return 0.0
        return self._timing.relist * (0.9 + 0.2 * random.random()) if uid else self._timing.forbidden_retry


class ClusterState:
    """How a cluster's watches are, taken together."""

    def __init__(self) -> None:
        self.error: FabrikError | None = None  # why there is no connection to try at all
        self.renewal_error: str | None = None  # why the credentials cannot be resolved anew
        self.expires_at: float | None = None  # the credentials, as seconds since 1970
        self.watchers: list[Watcher] = []

    @property
    def is_connected(self) -> bool:
        """Whether every watch that is allowed misses nothing."""
        allowed = [watcher for watcher in self.watchers if watcher.told.state != FORBIDDEN]
        return self.error is None and bool(allowed) and all(watcher.is_following for watcher in allowed)

    @property
    def synced_at(self) -> str | None:
        """When the cluster's part was the last word, by the watch furthest behind; None before all are listed."""
        times = [watcher.synced_at for watcher in self.watchers if watcher.told.state != FORBIDDEN]
        times = times or [watcher.synced_at for watcher in self.watchers if watcher.synced_at]  # all are forbidden now
        return min((moment or "" for moment in times), default="") or None

    @property
    def last_event_at(self) -> str | None:
        """When the last event came."""
        return latest(*(watcher.last_event_at for watcher in self.watchers))

    @property
    def is_settled(self) -> bool:
        """Whether every watch was listed once, or cannot be at present."""
        if self.error is not None:
            return True
        return all(watcher.was_listed or watcher.told.retry_at is not None for watcher in self.watchers)

    @property
    def trouble(self) -> str | None:
        """What is wrong, in words that a person can act on; None where nothing is."""
        if self.error is not None:
            return str(self.error)
        if self.renewal_error is not None:
            return self.renewal_error
        return next((watcher.told.error for watcher in self.watchers if watcher.told.error), None)

    def positions(self) -> Mapping[WatchStatus, int]:
        """Return how far the watches of one store are; Events may have another (--etcd-servers-overrides)."""
        known = [watcher for watcher in self.watchers if watcher.scope.resource != EVENTS.name]
        return {watcher: int(watcher.version) for watcher in known if watcher.version and watcher.version.isdigit()}

    def on_list(self, before: Mapping[WatchStatus, int], version: str) -> None:
        """Have watches list anew that were further than the store is now: it was restored from an older state.

        By the time that one of them resumes, the new history may have passed its version, and nothing else would tell.
        """
        for watcher in self.watchers:
            position = before.get(watcher, 0)
            if version.isdigit() and position > int(version) and watcher.version == str(position):
                watcher.version = None
                watcher.relist("resource versions went back")


class Cluster(ClusterState):
    """One cluster: who it is, how it is reached, and its watches, five for each namespace."""

    def __init__(
        self, spec: ClusterSpec, reactor: Reactor, credentials: Credentials, sink: WatchSink, timing: Timing
    ) -> None:
        super().__init__()
        self.spec = spec
        self.traits = ServerTraits()
        self.server: str | None = None
        self.uid: str | None = None  # of kube-system: the cluster's identity
        self.skew_s: float | None = None  # the server's clock less ours
        self._reactor = reactor
        self._credentials = credentials
        self._sink = sink
        self._timing = timing
        self._connection: Connection | None = None
        self._route: Route | None = None
        self._identity_probe = IdentityProbe(self, reactor, timing, self._on_identity)
        self._timers: dict[str, Timer] = {}  # one of each kind
        self._resolving = False
        self._begun = False  # the watches are on their way
        self._stopped = self._was_away = False  # away: a watch was in trouble since the identity was asked for
        self._files: tuple[tuple[str, float], ...] = ()

    def start(self, resumption: Mapping[Scope, tuple[str, str]], uid: str | None, *, once: bool) -> None:
        """Begin to follow the cluster, each watch from the version it was left at."""
        self.uid = uid
        for namespace in self.spec.namespaces:
            for kind in RESOURCES:
                scope = Scope(self.spec.name, kind.name, namespace)
                version, synced_at = resumption.get(scope, (None, None))
                selector = self.spec.label_selector if kind is not EVENTS else None
                target = WatchTarget(kind.path(namespace), f"{kind.name} in {namespace or 'all namespaces'}", selector)
                resumed = None if once else version
                machine = WatchMachine(target, self.traits, self._timing, random.random, resumed)
                if resumed is None and (once or uid is not None):
                    machine.forget()  # a server's memory may be older than what is known already
                watcher = Watcher(self._reactor, scope, machine, self, self._sink)
                watcher.once, watcher.version, watcher.synced_at = once, version, synced_at
                self.watchers.append(watcher)
        self.renew()

    def stop(self, error: FabrikError | None = None) -> None:
        """End all watches; `error` says why, to whoever asks."""
        self._stopped, self.error = True, error or self.error
        for watcher in self.watchers:
            watcher.stop()
        for timer in self._timers.values():
            timer.cancel()
        self._identity_probe.cancel()

    def recycle(self, reason: str) -> None:
        """Give up all connections and go on over others."""
        if self._begun and not self._stopped:
            for watcher in self.watchers:
                watcher.recycle(reason)

    @property
    def identity(self) -> tuple[str, ...] | None:
        """What tells one cluster from another: kube-system's uid, else the server and its CA; None before either."""
        if self.uid is not None:
            return (self.uid,)
        return None if self._connection is None else self._connection.identity

    def renew(self) -> None:
        """Resolve the credentials anew, once at a time; watches that wait for them begin."""
        if not self._resolving and not self._stopped:
            self._resolving = True
            self._credentials.resolve(self.spec, self._on_resolved)

    def check_files(self) -> None:
        """Resolve anew where a kubeconfig, certificate or token file has changed; they are looked at in the pool."""
        paths = [path for path, _ in self._files]

        def done(found: Any, error: BaseException | None) -> None:
            if error is None and found != self._files and not self._stopped and not self._resolving:
                self._files = found
                self.renew()

        if paths and not self._stopped:
            self._reactor.run_blocking(lambda: file_times(paths), done)

    def connect(self, handler: StreamHandler) -> tuple[Stream, HttpClientCodec, str]:
        """Return a new connection to the API server, and the path that leads every target."""
        route = self._route
        if route is None:
            raise UnreachableError(f"{self.spec.name}: its credentials are not resolved")
        stream = Stream(self._reactor, handler)
        stream.connect(route, self._timing)
        return stream, HttpClientCodec(route.endpoint.authority), route.endpoint.base

    def headers(self) -> dict[str, str]:
        """Return what a request says of us, with the credentials of this moment."""
        headers = {"User-Agent": f"fabrik-daemon/{__version__}", "Accept": "application/json"}
        if self._connection is not None and self._connection.token:
            headers["Authorization"] = f"Bearer {self._connection.token}"
        return headers

    def on_head(self, head: ResponseHead) -> None:
        """Measure the server's clock; its Date has whole seconds."""
        server_time = parse_http_date(head.headers.get("date", ""))
        if server_time is not None:
            self.skew_s = round(server_time + 0.5 - time.time(), 1)

    def on_watch_state(self, watcher: Watcher) -> None:
        """Take in that a watch is in another state; one that comes back may have found another cluster."""
        if watcher.told.error:
            self._was_away = True
        elif watcher.told.state == WATCHING and self._was_away and not self._stopped:
            self._was_away = False
            self._identity_probe.ask()
        self._sink.on_cluster_state(self.spec.name)

    def _on_resolved(self, result: Connection | FabrikError) -> None:
        self._resolving = False
        if self._stopped:
            return
        if isinstance(result, Connection):
            try:
                route = route_of(result)
            except ConfigError as error:
                self._on_unresolved(ConfigError(f"{self.spec.kubeconfig}: {error.message}", error.hint))
                return
            before, self._connection, self._route, self.expires_at = self._connection, result, route, result.expires_at
            self.server, self.error, self.renewal_error, self._files = result.server, None, None, result.files
            self._after("renew", result.renew_in(time.time(), self._timing), self.renew)
            self._go_on(before, result)
        else:
            self._on_unresolved(result)

    def _go_on(self, before: Connection | None, now: Connection) -> None:
        if not self._begun:
            self._after("identity", self._timing.identity, self._begin)
            self._identity_probe.ask()
        elif before is not None and before.identity != now.identity:
            for watcher in self.watchers:
                watcher.relist("the kubeconfig has changed")
        else:
            for watcher in self.watchers:
                if watcher.told.state == UNAUTHORISED:
                    watcher.start()
        self._sink.on_cluster_state(self.spec.name)

    def _on_unresolved(self, error: FabrikError) -> None:
        if not self._begun:
            self.error = error
        self.renewal_error = str(error)
        self._files = self._files or file_times([self.spec.kubeconfig])
        self._after("renew", self._timing.backoff_max, self.renew)
        self._sink.on_cluster_state(self.spec.name)

    def _after(self, kind: str, seconds: float | None, callback: Callable[[], None]) -> None:
        if kind in self._timers:
            self._timers.pop(kind).cancel()
        if seconds is not None:
            self._timers[kind] = self._reactor.call_later(seconds, callback)

    def _on_identity(self, uid: str | None) -> None:
        """Take in who the server is; one that does not tell its uid is known by its address and CA."""
        before, self.uid = self.uid, uid or self.uid
        if uid and before and uid != before:
            self._on_new_epoch()
        if not self._stopped and not self._sink.on_identity(self.spec.name):
            return
        self._begin()

    def _on_new_epoch(self) -> None:
        self._sink.on_new_epoch(self.spec.name)
        for watcher in self.watchers:
            if self._begun:
                watcher.relist("another cluster answers under this name")
            else:
                watcher.forget_version()

    def _begin(self) -> None:
        if not self._begun and not self._stopped:
            self._begun = True
            self._after("identity", None, self._begin)
            for watcher in self.watchers:
                watcher.start()


def route_of(connection: Connection) -> Route:
    """Return how a connection's server is reached. Raises ConfigError."""
    endpoint = parse_server(connection.server)
    context = tls_context(connection) if endpoint.tls else None
    proxy = parse_proxy(connection.proxy_url) if connection.proxy_url else None
    return Route(endpoint, context, connection.tls_server_name, proxy)


# ----------------------------------------------------------------------------------------------------------------------
# Watcher: calls
# ----------------------------------------------------------------------------------------------------------------------


class Receiver(Protocol):
    """What takes a response in as it comes."""

    def on_head(self, head: ResponseHead) -> None:
        """Take in status and headers."""

    def on_body(self, data: bytes) -> None:
        """Take in some of the body."""

    def on_end(self, error: str) -> None:
        """Take in that it is over; `error` says why it is not whole, empty where it is."""


class Origin(Protocol):
    """A server that can be asked."""

    reactor: Reactor
    timing: Timing

    def prepare(self, done: Callable[[FabrikError | None], None]) -> None:
        """Find out how it is reached; `done` gets what is wrong with that, in the loop."""

    def forget(self) -> None:
        """Have the credentials resolved anew for what is asked next: they were refused."""

    def connect(self, handler: StreamHandler) -> tuple[Stream, HttpClientCodec, str]:
        """Return a new connection, and the path that leads every target; only after `prepare`."""

    def headers(self) -> dict[str, str]:
        """Return what a request says of us, with the credentials of this moment."""


class Call(ClientHandler):
    """One request. Credentials that are refused are resolved anew once; silence for too long ends it."""

    def __init__(
        self, origin: Origin, target: str, receiver: Receiver, *, body: bytes | None = None, endless: bool = False
    ) -> None:
        self._origin = origin
        self._target = target
        self._receiver = receiver
        self._body = body  # None: a GET, else a POST
        self._endless = endless  # what is asked for goes on: it may be silent for as long as it likes
        self._stream: Stream | None = None
        self._codec: HttpClientCodec | None = None
        self._timer: Timer | None = None
        self._renewed = self._over = self._may_be_silent = False
        origin.prepare(self._on_prepared)

    def cancel(self) -> None:
        """Give up; nothing is told any more."""
        self._over = True
        self._hang_up()

    def on_data(self, data: bytes) -> None:
        """Take in bytes of the response; empty: the server ended the connection."""
        codec = self._codec
        if codec is None:
            return
        self._wait()
        try:
            for part in codec.receive(data):
                self._take(part)
                if self._codec is not codec:
                    return
        except ProtocolError as error:
            self._end(error.message)
            return
        if not data:
            self._end("the server closed the connection")

    def on_error(self, error: str) -> None:
        """Take in that the connection is lost, or never came to be."""
        self._end(error)

    def _on_prepared(self, error: FabrikError | None) -> None:
        if self._over:
            return
        if error is not None:
            self._end(str(error))
            return
        self._stream, self._codec, base = self._origin.connect(self)
        target, headers = base + self._target, self._origin.headers()
        if self._body is None:
            self._stream.send(self._codec.send_get(target, headers, compressed=False))
        else:
            self._stream.send(self._codec.send_post(target, headers, self._body))
        self._wait()

    def _take(self, part: ResponsePart) -> None:
        if isinstance(part, bytes):
            self._receiver.on_body(part)
        elif isinstance(part, ResponseEnd):
            self._end("")
        elif part.status == 401 and not self._renewed:
            self._renewed = True
            self._hang_up()
            self._origin.forget()
            self._origin.prepare(self._on_prepared)
        else:
            self._may_be_silent = self._endless and part.status == 200
            self._wait()
            self._receiver.on_head(part)

    def _wait(self) -> None:
        """Allow for so much silence from here on."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._may_be_silent:
            silence_s = self._origin.timing.answer
            self._timer = self._origin.reactor.call_later(silence_s, lambda: self._end(f"silent for {silence_s:g} s"))

    def _end(self, error: str) -> None:
        if not self._over:
            self.cancel()
            self._receiver.on_end(error)

    def _hang_up(self) -> None:
        self._codec = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._stream is not None:
            self._stream.close()


class Got(NamedTuple):
    """What came of a request: a whole response, or why there is none."""

    head: ResponseHead | None
    body: bytes
    error: str

    @property
    def is_ok(self) -> bool:
        """Whether the response is what was asked for."""
        return not self.error and self.head is not None and self.head.status in (200, 201)

    @property
    def status(self) -> int:
        """The HTTP status of a whole response, else 0."""
        return self.head.status if self.head is not None and not self.error else 0

    @property
    def complaint(self) -> str:
        """What is wrong, in words for a person; empty where nothing is."""
        if self.is_ok or self.head is None or self.error:
            return self.error
        return refusal_from_response(self.head, self.body).message

    def document(self) -> JsonObject:
        """Return the JSON object in the body, an empty one where there is none."""
        return (parse_json(self.body.decode("utf-8", "replace")) or {}) if self.is_ok else {}


class Collector:
    """Collects a response whose body is of some size at most."""

    def __init__(self, done: Callable[[Got], None], max_bytes: int) -> None:
        self._done = done
        self._max_bytes = max_bytes
        self._head: ResponseHead | None = None
        self._pieces: list[bytes] = []
        self._bytes = 0
        self.cancel: Callable[[], None] = lambda: None  # ends the call

    def on_head(self, head: ResponseHead) -> None:
        """Take in status and headers."""
        self._head = head

    def on_body(self, data: bytes) -> None:
        """Take in some of the body."""
        self._pieces.append(data)
        self._bytes += len(data)
        if self._bytes > self._max_bytes:
            self.cancel()
            self.on_end(f"an answer of over {self._max_bytes} bytes")

    def on_end(self, error: str) -> None:
        """Tell what came."""
        self._done(Got(self._head, b"".join(self._pieces), error))


def fetch(origin: Origin, target: str, done: Callable[[Got], None], max_bytes: int = ITEM_MAX_BYTES) -> Call:
    """Ask for a path; `done` gets what came, in the loop."""
    collector = Collector(done, max_bytes)
    call = Call(origin, target, collector)
    collector.cancel = call.cancel
    return call


# ----------------------------------------------------------------------------------------------------------------------
# Server: listeners
# ----------------------------------------------------------------------------------------------------------------------


class Listener:
    """Accepts connections on a listening socket, some at a time."""

    def __init__(self, reactor: Reactor, sock: socket.socket, admit: Callable[[socket.socket], None]) -> None:
        self._reactor = reactor
        self._socket: socket.socket | None = sock
        self._admit = admit
        self._listen()

    def close(self) -> None:
        """Listen no more."""
        if self._socket is not None:
            self._reactor.unregister(self._socket)
            self._socket.close()
            self._socket = None

    def _listen(self) -> None:
        if self._socket is not None:
            self._reactor.register(self._socket, selectors.EVENT_READ, self._on_ready)

    def _on_ready(self, _events: int) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            if self._socket is None:
                return
            try:
                sock, _address = self._socket.accept()
            except BlockingIOError:
                return
            except OSError:  # no descriptor is left: without a pause the loop would do nothing but try
                self._reactor.unregister(self._socket)
                self._reactor.call_later(ACCEPT_PAUSE_S, self._listen)
                return
            sock.setblocking(False)
            self._admit(sock)


class UnixListener:
    """The listener at a path, which lets in its owner, root and a group, and whose file it keeps there."""

    def __init__(self, reactor: Reactor, admit: Callable[[socket.socket], None]) -> None:
        self._reactor = reactor
        self._admit = admit
        self._listener: Listener | None = None
        self._path = ""
        self._inode = (0, 0)
        self._group: int | None = None

    def open(self, path: str, group: str | None = None) -> None:
        """Listen at a path, in place of a stale socket, for a group's members too. Raises SocketError."""
        self._group = None if group is None else group_id(group)
        self._bind(path)

    def _bind(self, path: str) -> None:
        self._listener = Listener(self._reactor, bind_private(path, self._group), self._on_accept)
        self._path = path
        found = os.stat(path)
        self._inode = found.st_dev, found.st_ino

    def adopt(self, listener: socket.socket) -> None:
        """Listen on a socket whose file is the service manager's, and so is the group that may write to it."""
        found = os.stat(listener.getsockname())
        self._group = found.st_gid if found.st_mode & stat.S_IWGRP else None
        self._listener = Listener(self._reactor, listener, self._on_accept)

    def keep(self) -> None:
        """Make the socket again where its file has vanished or is another's now. Raises SocketError."""
        if self._path and not self._is_in_place():
            self._close_listener()
            self._bind(self._path)

    def close(self) -> None:
        """Listen no more, and take the file away."""
        if self._is_in_place():
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        self._close_listener()

    def _is_in_place(self) -> bool:
        try:
            found = os.stat(self._path)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._inode

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _on_accept(self, sock: socket.socket) -> None:
        if peer_uid(sock) in (os.geteuid(), 0) or self._group in peer_groups(sock):
            self._admit(sock)
        else:
            sock.close()


def socket_candidates(settings: Settings) -> list[str]:
    """Return where the daemon's socket may be, in this order; daemon and commands choose alike."""
    if settings.socket is not None:
        return [settings.socket]
    beside = os.path.join(os.path.dirname(os.path.abspath(settings.cache)), "daemon.sock")
    return [DEFAULT_SOCKET, f"{DEFAULT_SOCKET[:-5]}-{os.geteuid()}.sock", beside]


def choose_socket(settings: Settings) -> str:
    """Return the first place for the socket that no other user holds. Raises SocketError."""
    for path in socket_candidates(settings):
        try:
            found = os.lstat(path)
        except OSError:
            return path
        if found.st_uid == os.geteuid():
            return path
    raise SocketError(f"{path}: another user holds this path", "choose another with --socket")


def check_socket_path(path: str) -> None:
    """Refuse a place where others could put a socket of theirs in place of ours. Raises SocketError."""
    above = os.path.dirname(os.path.abspath(path))
    if max(len(os.fsencode(path)), len(os.fsencode(above)) + len(_PRIVATE_SUFFIX)) > SOCKET_PATH_BYTES:
        raise SocketError(f"{path}: too long for a socket", f"choose a path under {SOCKET_PATH_BYTES - 14} bytes")
    _check_links(above)
    folder = os.path.realpath(above)
    while True:
        try:
            found = os.stat(folder)
        except OSError as error:
            raise SocketError(
                f"{folder}: {error.strerror}", "make the folder, or choose another with --socket"
            ) from None
        if found.st_uid not in (0, os.geteuid()):
            raise SocketError(f"{folder} belongs to another user", "choose another place with --socket")
        if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
            raise SocketError(f"others may write in {folder}", f"chmod go-w {folder}, or choose another with --socket")
        if folder == os.path.dirname(folder):
            return
        folder = os.path.dirname(folder)


def _check_links(folder: str) -> None:
    """Refuse a symbolic link on the way that another user could let point elsewhere. Raises SocketError."""
    while folder != os.path.dirname(folder):
        with contextlib.suppress(OSError):
            found = os.lstat(folder)
            if stat.S_ISLNK(found.st_mode) and found.st_uid not in (0, os.geteuid()):
                raise SocketError(f"{folder} is another user's link", "choose another place with --socket")
        folder = os.path.dirname(folder)


def bind_private(path: str, group: int | None = None) -> socket.socket:
    """Return a listener for us, or us and a group: bound in a private folder, then put in place. Raises SocketError."""
    check_socket_path(path)
    _check_not_taken(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    folder = ""
    try:
        folder = tempfile.mkdtemp(prefix=".f", dir=os.path.dirname(os.path.abspath(path)))  # 0700
        listener.bind(f"{folder}/s")
        if group is not None and os.stat(f"{folder}/s").st_gid != group:  # a service may be denied the very call
            os.chown(f"{folder}/s", -1, group)
        os.chmod(f"{folder}/s", 0o600 if group is None else 0o660)
        listener.listen(LISTEN_BACKLOG)
        listener.setblocking(False)
        os.rename(f"{folder}/s", path)
    except OSError as error:
        listener.close()
        raise SocketError(f"{path}: {error.strerror or error}", "choose another with --socket") from None
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
    return listener


def _check_not_taken(path: str) -> None:
    try:
        found = os.lstat(path)
    except OSError:
        return
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
        raise SocketError(f"{path} is not a socket of ours", "remove it, or choose another with --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return  # stale: nobody listens
        except OSError:
            pass
    raise SocketError(f"another daemon answers at {path}", "stop it, or choose another with --socket")


def peer_uid(sock: socket.socket) -> int:
    """Return the user at the other end of a Unix socket: SO_PEERCRED on Linux, LOCAL_PEERCRED on macOS."""
    if hasattr(socket, "SO_PEERCRED"):
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", credentials)[1])
    return int(struct.unpack_from("II", sock.getsockopt(0, 1, 76))[1])  # SOL_LOCAL, LOCAL_PEERCRED: struct xucred


def peer_groups(sock: socket.socket) -> set[int]:
    """Return the groups of the process at the other end of a Unix socket; none where the system does not tell."""
    if not hasattr(socket, "SO_PEERCRED"):
        return set()
    own = int(struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))[2])
    try:
        others = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 4 * PEER_GROUPS_MAX)
    except OSError:
        return {own}
    return {own, *struct.unpack(f"{len(others) // 4}I", others)}


def group_id(name: str) -> int:
    """Return a group's number. Raises SocketError where there is no such group."""
    try:
        return int(grp.getgrnam(name).gr_gid)
    except KeyError:
        raise SocketError(f"no group {name!r}, to which the socket is to be open", "make it, or name another") from None


_PRIVATE_SUFFIX: Final = "/.f12345678/s"


# ----------------------------------------------------------------------------------------------------------------------
# Server: remote
# ----------------------------------------------------------------------------------------------------------------------


class Secrets(NamedTuple):
    """What a remote daemon's files hold: never log it."""

    digests: tuple[bytes, ...]
    context: ssl.SSLContext | None  # None: plain HTTP


def read_secrets(exposure: Exposure) -> Secrets:
    """Read token and certificate. Raises ConfigError."""
    if exposure.token_file is not None:
        digests = parse_tokens(_read_file(exposure.token_file), exposure.token_file)
    else:
        digests = parse_tokens(exposure.token or "", "FABRIK_TOKEN")
    return Secrets(digests, _server_context(exposure))


def _read_file(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None


def _server_context(exposure: Exposure) -> ssl.SSLContext | None:
    if exposure.tls_cert is None:
        return None

    def password() -> str:
        raise ValueError("encrypted")  # without it OpenSSL asks on the terminal

    for path in (exposure.tls_cert, exposure.tls_key):
        _read_file(path or "")  # its words name the file that is missing; OpenSSL's do not
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(exposure.tls_cert, exposure.tls_key, password)
    except ValueError:
        raise ConfigError(f"{exposure.tls_key}: the key is encrypted", "write it without a password") from None
    except (ssl.SSLError, OSError) as error:
        why = getattr(error, "reason", None) or "not PEM"
        told = f"{exposure.tls_cert} and {exposure.tls_key} do not load ({why})"
        raise ConfigError(told, "they must be PEM, and belong together") from None
    return context


class RemoteListener:
    """The TCP listener of remote mode: its connections pass limits and TLS here, then a request at a time the gate.

    Raises ConfigError for token or certificate files that are of no use, SocketError where it cannot listen.
    """

    def __init__(
        self,
        reactor: Reactor,
        exposure: Exposure,
        timing: Timing,
        admit: Callable[[socket.socket, Access], None],
    ) -> None:
        self._reactor = reactor
        self._exposure = exposure
        self._timing = timing
        self._admit = admit
        self._log = logging.getLogger("fabrik-daemon.remote")
        self._times = file_times(exposure.files)
        self._secrets = read_secrets(exposure)
        self._gate = Gate(exposure, self._secrets.digests, reactor.now)
        self._open: dict[socket.socket, RemoteAccess] = {}
        self._turned_away = 0  # connections, by the limits
        self._told = (0, 0)
        sock = _bind(exposure)
        host, port = sock.getsockname()[:2]
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._listener = Listener(reactor, sock, self._on_accept)
        reactor.call_every(timing.files_check, self._keep)
        self._log.info("listening on %s with %s", self._address, "TLS" if self._secrets.context else "plain HTTP")

    def close(self) -> None:
        """Listen no more, and end the handshakes that are under way."""
        self._listener.close()
        for sock in self._open:
            self._reactor.unregister(sock)
            sock.close()

    def status(self) -> JsonObject:
        """Return what `status` tells of remote mode."""
        self._forget_closed()
        return {
            "listen": self._address,
            "tls": self._secrets.context is not None,
            "behind_proxy": self._exposure.behind_proxy,
            "connections": len(self._open),
            "turned_away": self._turned_away,
            "refused": self._gate.refused,
        }

    def _keep(self) -> None:
        """Read token and certificate again where they have changed; tell how many were refused meanwhile."""
        refused, turned_away = self._gate.refused - self._told[0], self._turned_away - self._told[1]
        if refused or turned_away:
            self._log.warning("refused %d requests and %d connections of remote clients", refused, turned_away)
            self._told = self._gate.refused, self._turned_away

        def done(found: Any, error: BaseException | None) -> None:
            if isinstance(error, FabrikError):
                self._log.error("goes on with the token and certificate from before: %s", error)
            elif found is not None:
                self._replace_secrets(found)

        def look() -> Secrets | None:
            times = file_times(self._exposure.files)
            if times == self._times:
                return None
            self._times = times
            return read_secrets(self._exposure)

        self._reactor.run_blocking(look, done)

    def _replace_secrets(self, secrets: Secrets) -> None:
        """Take up new ones; who came with a token that is good no more must come again."""
        self._secrets = secrets
        self._gate.digests = secrets.digests
        self._log.info("token and certificate were read anew")
        self._forget_closed()
        for sock, access in self._open.items():
            if not access.is_good:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)  # its owner sees the end, and lets go

    def _on_accept(self, sock: socket.socket) -> None:
        try:
            address = peer_name(sock.getpeername()[0])
            tune(sock)
        except OSError:  # gone already
            sock.close()
            return
        if not self._has_room_for(address):
            self._turned_away += 1
            sock.close()
            return
        access = RemoteAccess(self._gate, address)
        if self._secrets.context is None:
            self._open[sock] = access
            self._admit(sock, access)
        else:
            self._secure(sock, access, self._secrets.context)

    def _has_room_for(self, address: str) -> bool:
        self._forget_closed()
        same = sum(access.address == address for access in self._open.values())
        is_one_too_many = same >= REMOTE_CONNECTIONS_EACH and not self._exposure.behind_proxy
        return len(self._open) < REMOTE_CONNECTIONS and not is_one_too_many and self._gate.may_connect(address)

    def _secure(self, sock: socket.socket, access: RemoteAccess, context: ssl.SSLContext) -> None:
        try:
            secured = context.wrap_socket(
                sock, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=False
            )
        except OSError:  # gone already
            sock.close()
            return
        self._open[secured] = access

        def done(error: OSError | None) -> None:
            timer.cancel()
            self._reactor.unregister(secured)
            if error is None:
                self._admit(secured, access)
            else:
                self._log.debug("no TLS with %s: %s", access.address, getattr(error, "reason", None) or error)
                secured.close()

        timer = self._reactor.call_later(self._timing.request, lambda: done(TimeoutError("too slow")))
        shake_hands(self._reactor, secured, done)

    def _forget_closed(self) -> None:
        """Let go of connections that are over: a closed socket has no descriptor."""
        for sock in [sock for sock in self._open if sock.fileno() < 0]:
            del self._open[sock]


def _bind(exposure: Exposure) -> socket.socket:
    """Return a listener on TCP; without an address, on all of them, IPv6 and IPv4. Raises SocketError."""
    host, port = exposure.host, exposure.port
    try:
        if host:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            sock = socket.create_server(address[:2], family=family, backlog=LISTEN_BACKLOG)
        elif socket.has_dualstack_ipv6():
            sock = socket.create_server(("", port), family=socket.AF_INET6, backlog=LISTEN_BACKLOG, dualstack_ipv6=True)
        else:
            sock = socket.create_server(("", port), backlog=LISTEN_BACKLOG)
    except OSError as error:
        told = f"{host or '*'}:{port}: {error.strerror or error}"
        raise SocketError(told, "choose another with --listen and --port") from None
    sock.setblocking(False)
    return sock


# ----------------------------------------------------------------------------------------------------------------------
# Server
# ----------------------------------------------------------------------------------------------------------------------


class _Outbox:
    """What is still to be sent on a connection: answers in pieces, then what subscriptions have to tell."""

    def __init__(self, reactor: Reactor, stream: Stream, again: Callable[[], None]) -> None:
        """Send to a stream; `again` is called when a client that reads one message at a time may have read it."""
        self._reactor = reactor
        self._stream = stream
        self._again = again
        self._poll: Timer | None = None  # until the client has read
        self._poll_s = UNREAD_POLL_S
        self._answers: deque[Iterator[bytes]] = deque()
        self.subscriptions: list[Subscription] = []

    def put(self, answer: Iterable[bytes]) -> None:
        """Send an answer, in the connection's framing, after those before it."""
        self._answers.append(iter(answer))

    def subscribe(self, subscription: Subscription) -> None:
        """Send what a subscription has to tell. Raises UsageError where one has its id, or there are too many."""
        if subscription.mark and any(subscription.mark == one.mark for one in self.subscriptions):
            raise UsageError("this connection has a subscription of this id", "give each an id of its own")
        if len(self.subscriptions) >= SUBSCRIPTIONS_MAX:
            raise UsageError(f"this connection has {SUBSCRIPTIONS_MAX} subscriptions", "end one, or connect again")
        self.subscriptions.append(subscription)

    def unsubscribe(self, mark: bytes | None) -> list[Subscription]:
        """Send no more of the subscription with a mark, or (None) of all; return which. Raises NotFoundError."""
        ended = [one for one in self.subscriptions if mark is None or one.mark == mark]
        if not ended:
            raise NotFoundError("no such subscription", "name the id of a subscribe on this connection")
        self.subscriptions[:] = [one for one in self.subscriptions if one not in ended]
        return ended

    def clear(self) -> None:
        """Send nothing more."""
        self._answers.clear()
        self.subscriptions.clear()

    @property
    def is_waiting(self) -> bool:
        """Whether an answer has not been sent to its end."""
        return bool(self._answers)

    @property
    def is_full(self) -> bool:
        """Whether the client has asked for more than it reads."""
        return len(self._answers) >= ANSWERS_WAITING

    def pump(self, framing: Framing) -> bool:
        """Send until the client must read first; return whether nothing is left."""
        while not self.has_to_wait(framing):
            pieces, size, piece = [], 0, self._next(framing)
            while piece is not None:
                pieces.append(piece)
                size += len(piece)
                piece = self._next(framing) if size < SEND_BYTES and not framing.singly else None
            if not pieces:
                return True
            self._stream.send(b"".join(pieces))
        if framing.singly and self._poll is None:
            self._poll = self._reactor.call_later(self._poll_s, self._on_poll)
            self._poll_s = min(2 * self._poll_s, UNREAD_POLL_MAX_S)
        return False

    def _on_poll(self) -> None:
        self._poll = None
        if not self._stream.is_closed:
            self._poll_s = self._poll_s if self._stream.is_unread else UNREAD_POLL_S
            self._again()

    def has_to_wait(self, framing: Framing) -> bool:
        """Say whether the client must read first."""
        return self._stream.pending_bytes >= OUTPUT_HIGH_BYTES or (framing.singly and self._stream.is_unread)

    def _next(self, framing: Framing) -> bytes | None:
        while self._answers:
            piece = next(self._answers[0], None)
            if piece is not None:
                return piece
            self._answers.popleft()
        for subscription in self.subscriptions:
            line = subscription.take()
            if line is not None:
                return framing.line(line)
        return None


class ServerConnection:
    """One client: what it says becomes requests, and their answers go back in its framing."""

    def __init__(self, server: Server, sock: socket.socket, access: Access) -> None:
        self._server = server
        self._access = access
        self._stream = Stream(server.reactor, self)
        self._outbox = _Outbox(server.reactor, self._stream, self.pump)
        self._framing: Framing | None = None  # until the first byte tells
        self._inbox: deque[bytes] = deque()  # that was not looked at; b"" is the end
        self._said: Iterator[Said] = iter(())
        self._waiting = 0  # answers that are being made
        self._ended = False  # the client sends no more
        self._over = False  # nor is it told more
        self._heard_at = server.reactor.now()
        self._partial_since = None if access.is_local else self._heard_at  # a request that has begun and not ended
        self._stream.adopt(sock)

    def on_open(self) -> None:
        """Do nothing: the client speaks first."""

    def on_data(self, data: bytes) -> None:
        """Take in what the client sent; empty: it sends no more, but may still read."""
        self._ended = self._ended or not data
        self._heard_at = self._server.reactor.now()
        if self._framing is None and data:
            self._framing = framing_for(data, self._access)
        if not self._over:
            self._inbox.append(data)
        self.pump()

    def on_drained(self) -> None:
        """Take in that the client has room again."""
        self.pump()

    def on_error(self, error: str) -> None:
        """Take in that the client is gone."""
        del error
        self._server.forget(self)

    @property
    def subscriptions(self) -> Sequence[Subscription]:
        """What the client is told."""
        return self._outbox.subscriptions

    def close(self) -> None:
        """Close, whatever is still to be sent."""
        if self._framing is not None and not self._stream.is_closed:
            self._stream.send(self._framing.end(WS_GOING_AWAY))
        self._stream.close()
        self._server.forget(self)

    def pump(self) -> None:
        """Send what there is to send and take in what there is room for; close where all is done."""
        framing = self._framing
        while not self._stream.is_closed and framing is not None:
            self._send_waiting(framing)
            if not self._take_in(framing):
                break
            framing = self._framing or framing
        if self._stream.is_closed or self._stream.pending_bytes:
            return
        busy = self._waiting or self._inbox or self._outbox.is_waiting or (framing is not None and framing.is_busy)
        if (self._over or (self._ended and not self.subscriptions)) and (framing is None or not busy):
            self.close()

    def tell(self) -> None:
        """Send what subscriptions have to tell; whatever else there is to do waits for something else."""
        if self._framing is not None and not self._stream.is_closed:
            self._send_waiting(self._framing)

    def check_time(self, now: float, timing: Timing) -> None:
        """Ask a client that is silent whether it is there; let go of one that does not answer, or never ends."""
        framing = self._framing
        if self._stream.is_closed or self._over:
            return
        if self._partial_since is not None and now - self._partial_since > timing.request:
            self._refuse(SlowError(f"a request must come within {timing.request:g} s"))
            self.pump()
        elif framing is not None and now - self._heard_at > timing.ping and not self._stream.pending_bytes:
            ping = framing.ping()
            self._stream.send(ping)
            may_be_silent = not ping and (self._access.is_local or framing.is_busy)
            if not may_be_silent and now - self._heard_at > 2 * timing.ping:
                self.close()

    def _send_waiting(self, framing: Framing) -> None:
        if self._outbox.pump(framing):
            for subscription in self.subscriptions:
                if subscription.lack is not None:
                    self._server.supply(subscription, subscription.lack)

    def _take_in(self, framing: Framing) -> bool:
        """Look at the next thing a client said that reads its answers; say whether there was one."""
        full = self._outbox.is_full or self._stream.pending_bytes >= OUTPUT_HIGH_BYTES  # pongs go past the outbox
        if full or self._waiting >= ANSWERS_WAITING or framing.is_busy or self._over:
            if self._inbox:
                self._stream.pause()
            return False
        try:
            said = self._next_said(framing)
        except ProtocolError as error:
            self._refuse(UsageError(error.message))
            return True
        if said is not None:
            self._partial_since = None
            self._on_said(framing, said)
            return True
        self._partial_since = (self._partial_since or self._heard_at) if framing.is_partial else None
        if not framing.is_open:
            self._finish()
        elif not self._ended:
            self._stream.resume()
        return False

    def _next_said(self, framing: Framing) -> Said | None:
        said = next(self._said, None)
        if said is None:
            self._said = framing.following()
            said = next(self._said, None)
        while said is None and self._inbox:
            self._said = framing.receive(self._inbox.popleft())
            said = next(self._said, None)
        return said

    def _on_said(self, framing: Framing, said: Said) -> None:
        if isinstance(said, bytes):
            self._stream.send(said)
            if not framing.is_open:
                self._finish()
        elif isinstance(said, Switch):
            self._framing, self._said = said.framing, iter(said.requests)
            self._stream.send(said.reply)
            if said.rest:
                self._inbox.appendleft(said.rest)
        elif isinstance(said, FabrikError):
            self._outbox.put(framing.answer(said, {}))
        else:
            self._on_request(framing, said)

    def _on_request(self, framing: Framing, request: JsonObject) -> None:
        try:
            self._access.check(request)
            answer = self._server.requests.answer(request)
            if isinstance(answer, Subscribed):
                self._subscribe(answer.subscription)
            elif isinstance(answer, Unsubscribed):
                self._server.release(self._outbox.unsubscribe(answer.mark))
                answer = answer.reply
        except FabrikError as error:
            self._outbox.put(framing.answer(error, request))
            return
        if isinstance(answer, Later):
            self._make(framing, answer, request)
        else:
            self._outbox.put(framing.answer(answer, request))

    def _subscribe(self, subscription: Subscription) -> None:
        try:
            self._outbox.subscribe(subscription)
        except UsageError:
            self._server.release([subscription])
            raise
        self._server.listen(subscription, self)

    def _make(self, framing: Framing, later: Later, request: JsonObject) -> None:
        self._waiting += 1

        def done(reply: Any, error: BaseException | None) -> None:
            self._waiting -= 1
            if self._stream.is_closed or not framing.is_open:
                return
            if error is not None:
                reply = error if isinstance(error, FabrikError) else FabrikError(f"a defect: {error}")
            self._outbox.put(framing.answer(reply, request))
            self.pump()

        self._server.reactor.run_blocking(later.work, done)

    def _refuse(self, error: FabrikError) -> None:
        """Tell a client that does not keep to the protocol, once, and close when it has read that."""
        if self._framing is not None:
            self._outbox.put([self._framing.refuse(error)])
        self._inbox.clear()
        self._said = iter(())
        self._over = True
        self._stream.pause()

    def _finish(self) -> None:
        """Tell no more; close when the client has read what was sent."""
        self._server.release(self.subscriptions)
        self._outbox.clear()
        self._inbox.clear()
        self._over = True


class Server:
    """The connections of every listener, and what they are told."""

    def __init__(
        self, reactor: Reactor, requests: Requests, unsubscribe: Callable[[Subscription], None], settings: Settings
    ) -> None:
        timing, exposure = settings.timing, settings.exposure
        self.reactor = reactor
        self.requests = requests
        self.remote = RemoteListener(reactor, exposure, timing, self.admit) if exposure is not None else None
        self._timing = timing
        self._unsubscribe = unsubscribe
        self._unix = UnixListener(reactor, lambda sock: self.admit(sock, FullAccess()))
        self._connections: dict[ServerConnection, None] = {}
        self._listeners: dict[Subscription, ServerConnection] = {}
        self._woken: dict[ServerConnection, None] = {}
        self.open = self._unix.open
        self.adopt = self._unix.adopt
        self.keep = self._unix.keep
        reactor.call_every(min(timing.request, timing.ping) / 2, self._check_time)

    def admit(self, sock: socket.socket, access: Access) -> None:
        """Serve a connection that was accepted; it does not block."""
        if len(self._connections) >= CONNECTIONS_MAX:
            sock.close()
        else:
            self._connections[ServerConnection(self, sock, access)] = None

    def close(self) -> None:
        """Close the listeners and every connection."""
        self._unix.close()
        for connection in list(self._connections):
            connection.close()
        if self.remote is not None:
            self.remote.close()

    def wake(self, subscriptions: Iterable[Subscription]) -> None:
        """Send what subscriptions have to tell."""
        if not self._woken:
            self.reactor.call_soon(self._pump_woken)
        self._woken.update({self._listeners[one]: None for one in subscriptions if one in self._listeners})

    def _pump_woken(self) -> None:
        woken, self._woken = self._woken, {}
        for connection in woken:
            connection.tell()

    def listen(self, subscription: Subscription, connection: ServerConnection) -> None:
        """Note whose a subscription is."""
        self._listeners[subscription] = connection

    def forget(self, connection: ServerConnection) -> None:
        """Let go of a connection that is closed."""
        self._connections.pop(connection, None)
        self.release(connection.subscriptions)

    def release(self, subscriptions: Iterable[Subscription]) -> None:
        """Tell subscribers no more."""
        for subscription in subscriptions:
            self._listeners.pop(subscription, None)
            self._unsubscribe(subscription)

    def supply(self, subscription: Subscription, lack: Lack) -> None:
        """Read what a subscription lacks, and let it go on."""

        def done(held: Any, _error: BaseException | None) -> None:
            lack.take(held if isinstance(held, Held) else Held((), False))
            self.wake([subscription])

        subscription.lack = None
        self.reactor.run_blocking(lack.read, done)

    def _check_time(self) -> None:
        now = self.reactor.now()
        for connection in list(self._connections):
            connection.check_time(now, self._timing)


# ----------------------------------------------------------------------------------------------------------------------
# Pusher
# ----------------------------------------------------------------------------------------------------------------------


class Post(NamedTuple):
    """What couriers share."""

    reactor: Reactor
    timing: Timing
    meter: Meter
    log: logging.Logger


class _Ready(NamedTuple):
    """A request whose body, secrets and TLS settings were made off the loop."""

    route: Route
    headers: list[tuple[str, str]]
    body: bytes


class Courier(ClientHandler):
    """Takes what a shipper has to send to one service, one connection a request; it never waits in the loop.

    Whatever takes time has threads of its own, so that a service that hangs keeps neither watches nor other
    services from theirs.
    """

    def __init__(self, post: Post, target: str, service: LaosService, shipper: Shipper) -> None:
        self.target = target
        self.service = service
        self.shipper = shipper
        self.taken_at: float | None = None  # seconds since 1970
        self._post = post
        self._shipment: Shipment | None = None  # on its way
        self._preparing = False  # in a thread, which is not left behind
        self._stream: Stream | None = None
        self._codec: HttpClientCodec | None = None
        self._head: ResponseHead | None = None
        self._said = b""
        self._timer: Timer | None = None
        self.trouble = ""  # why the last request was not taken
        self.on_answered: Callable[[], None] = lambda: None
        self._route: Route | None = None
        self._ca_file: tuple[tuple[str, float], ...] = ()
        self._stopped = False

    def poke(self) -> None:
        """Look again when to send: there may be something new."""
        if self._shipment is not None or self._preparing or self._stopped:
            return
        deadline = self.shipper.deadline
        if self._timer is not None and (self._timer.at > deadline or self._timer.callback is None):
            self._timer.cancel()
            self._timer = None
        if self._timer is None and deadline < math.inf:
            self._timer = self._post.reactor.call_at(deadline, self._on_due)

    def stop(self) -> None:
        """Send no more."""
        self._stopped = True
        self._hang_up()

    def on_data(self, data: bytes) -> None:
        """Take in bytes of the answer."""
        codec = self._codec
        if codec is None:
            return
        try:
            for part in codec.receive(data):
                if isinstance(part, ResponseHead):
                    self._head = part
                elif isinstance(part, bytes):
                    self._said = (self._said + part)[:REFUSAL_MAX_BYTES]
                elif self._head is not None:
                    refusal = refusal_from_response(self._head, self._said)
                    self._finish(self._head.status, refusal.message, refusal.retry_after_s)
                    return
        except ProtocolError as error:
            self._finish(0, error.message)
            return
        if not data:
            self._finish(0, "the connection ended without an answer")

    def on_error(self, error: str) -> None:
        """Take in that the connection is lost, or never came to be."""
        self._finish(0, error)

    def _on_due(self) -> None:
        self._timer = None
        self._shipment = shipment = self.shipper.due(self._post.reactor.now())
        if shipment is None:
            self.poke()
            return
        patience = self._post.timing.laos_answer
        overdue = f"no answer within {patience:g} s"
        self._timer = self._post.reactor.call_later(patience, lambda: self._finish(0, overdue))
        self._preparing = True

        def done(ready: Any, error: BaseException | None) -> None:
            self._preparing = False
            if self._shipment is not shipment or self._stopped:
                self.poke()  # it was given up meanwhile
            elif error is not None:
                self._finish(0, error.message if isinstance(error, FabrikError) else f"a defect: {error}")
            else:
                self._send(shipment, ready)

        self._post.reactor.run_blocking(lambda: self._prepare(shipment), done, "laos")

    def _prepare(self, shipment: Shipment) -> _Ready:
        """Make a request whole, in a thread. Raises ConfigError where a file cannot be used."""
        service = self.service
        headers = [("User-Agent", f"fabrik-daemon/{__version__}"), ("Connection", "close"), *shipment.headers.items()]
        if service.tenant:
            headers.append(("X-Scope-OrgID", service.tenant))
        headers += authorization_of(service)
        ca_file = file_times([service.ca_file] if service.ca_file else [])
        if self._route is None or ca_file != self._ca_file:
            self._route, self._ca_file = route_to(service), ca_file
        return _Ready(self._route, headers, shipment.body())

    def _send(self, shipment: Shipment, ready: _Ready) -> None:
        base = ready.route.endpoint.base  # the address of a push may have been written out whole
        target = base if base.endswith(shipment.path) else base + shipment.path
        self._stream, self._codec = Stream(self._post.reactor, self), HttpClientCodec(ready.route.endpoint.authority)
        try:
            request = self._codec.send(shipment.method, target, ready.headers, ready.body)
        except ProtocolError as error:
            self._finish(0, error.message)
            return
        self._stream.connect(ready.route, self._post.timing)
        self._stream.send(request)

    def _finish(self, status: int, said: str, retry_after_s: float | None = None) -> None:
        if self._shipment is None or self._stopped:
            return
        verdict = self.shipper.on_answer(status, said, retry_after_s, self._post.reactor.now())
        self._hang_up()
        self._post.meter.count("fabrik_daemon_deliveries_total", self.target, verdict)
        self.taken_at = time.time() if verdict == TAKEN else self.taken_at
        self._tell("" if verdict == TAKEN else f"{verdict}: {said}")
        self.poke()
        self.on_answered()

    def _hang_up(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._stream is not None:
            self._stream.close()
        self._shipment = self._stream = self._codec = self._head = self._timer = None
        self._said = b""

    def _tell(self, trouble: str) -> None:
        """Log once that a service is in trouble, and once that it is not any more."""
        if trouble and not self.trouble:
            self._post.log.warning("%s at %s: %s", self.target, self.service.url, trouble)
        elif self.trouble and not trouble:
            self._post.log.info("%s at %s takes what it is sent again", self.target, self.service.url)
        self.trouble = trouble


def authorization_of(service: LaosService) -> list[tuple[str, str]]:
    """Return the header that lets in, from the files of this moment. Raises ConfigError."""
    if service.bearer_token_file:
        return [("Authorization", f"Bearer {_read_secret(service.bearer_token_file)}")]
    if service.username and service.password_file:
        user = f"{service.username}:{_read_secret(service.password_file)}"
        return [("Authorization", f"Basic {base64.b64encode(user.encode()).decode()}")]
    return []


def route_to(service: LaosService) -> Route:
    """Return how a service of LAOS is reached. Raises ConfigError."""
    ca_pem = None
    if service.ca_file:
        try:
            with open(service.ca_file, encoding="ascii") as file:
                ca_pem = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{service.ca_file}: {getattr(error, 'strerror', None) or 'not PEM'}") from None
    try:
        return route_of(Connection(service.url, ca_pem=ca_pem))._replace(pool="names of laos")
    except ConfigError:
        raise ConfigError(f"{service.ca_file or service.url}: no certificates that can be used") from None


def _read_secret(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            secret = file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    if not secret or not secret.isprintable():
        raise ConfigError(f"{path}: no secret that a header can hold")
    return secret


# ----------------------------------------------------------------------------------------------------------------------
# Pusher: discovery
# ----------------------------------------------------------------------------------------------------------------------


class LaosSearch:
    """Looks for the services of LAOS in one cluster, and whether they can be reached from here."""

    def __init__(self, post: Post, cluster: Cluster, done: Callable[[str, list[LaosFinding], list[str]], None]) -> None:
        """Begin; `done` gets the cluster's name, what was found, and what went wrong."""
        self._post = post
        self._cluster = cluster
        self._done = done
        self._namespaces = list(LAOS_NAMESPACES)
        self._found: list[LaosFinding] = []
        self._troubles: list[str] = []
        self._probe: Probe | None = None
        self._timer: Timer | None = None
        self._next()

    def cancel(self) -> None:
        """Give up; nothing is told any more."""
        self._done = lambda name, found, troubles: None
        self._hang_up()

    def _hang_up(self) -> None:
        if self._probe is not None:
            self._probe.cancel()
            self._probe = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _next(self) -> None:
        if not self._namespaces:
            self._post.reactor.run_blocking(self._try_all, self._tell, "laos")
            return
        namespace = self._namespaces.pop(0)
        patience = self._post.timing.laos_answer
        overdue = f"no answer within {patience:g} s"
        self._timer = self._post.reactor.call_later(patience, lambda: self._on_answer(namespace, None, b"", overdue))
        try:
            self._probe = Probe(
                self._cluster,
                f"/api/v1/namespaces/{namespace}/services",
                lambda head, body, error: self._on_answer(namespace, head, body, error),
                LAOS_LIST_MAX_BYTES,
            )
        except FabrikError as error:
            self._on_answer(namespace, None, b"", error.message)

    def _on_answer(self, namespace: str, head: ResponseHead | None, body: bytes, error: str) -> None:
        self._hang_up()
        if head is not None and head.status == 200:
            document = parse_json(body.decode("utf-8", "replace")) or {}
            host = parse_server(self._cluster.server or "").host if self._cluster.server else ""
            in_cluster = self._cluster.spec.kubeconfig == IN_CLUSTER
            self._found += services_from(document, host, in_cluster=in_cluster)
        elif head is None or head.status != 404:
            told = refusal_from_response(head, body).message if head is not None else error
            self._troubles.append(f"services in {namespace} cannot be listed: {told}")
        self._next()

    def _try_all(self) -> list[LaosFinding]:
        """Try the addresses that were found, in a thread."""
        return [
            finding if finding.url is None or _answers(finding.url) else finding._replace(url=None)
            for finding in self._found
        ]

    def _tell(self, found: Any, error: BaseException | None) -> None:
        self._done(self._cluster.spec.name, found if error is None else [], self._troubles)


def _answers(url: str) -> bool:
    endpoint = parse_server(url)
    try:
        with socket.create_connection((endpoint.host, endpoint.port), LAOS_TRY_S):
            return True
    except OSError:
        return False


# ----------------------------------------------------------------------------------------------------------------------
# Daemon: log
# ----------------------------------------------------------------------------------------------------------------------


class LogRing:
    """The last log lines, in memory, for `logs`; as a queue it is what logging's QueueHandler writes to."""

    def __init__(self) -> None:
        self._lines: deque[JsonObject] = deque(maxlen=LOG_RING_LINES)
        self._followers: dict[Subscription, int] = {}
        self.wake: Callable[[Iterable[Subscription]], None] = lambda subscriptions: None
        self.on_line: Callable[[JsonObject], None] = lambda line: None

    def put_nowait(self, record: logging.LogRecord) -> None:
        """Keep a record, from whichever thread."""
        line = {
            "time": format_time(record.created, milliseconds=True),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **{name: record.__dict__[name] for name in ("cluster", "run_id") if name in record.__dict__},
        }
        self._lines.append(line)
        self.on_line(line)
        told = [one for one, level in list(self._followers.items()) if record.levelno >= level]
        for subscription in told:
            subscription.put(format_line({"type": "log", **line}))
        if told:
            self.wake(told)

    def last(self, count: int, level: str) -> list[JsonObject]:
        """Return the last lines of at least a level, the oldest first."""
        wanted = LOG_LEVELS[LOG_LEVELS.index(level) :]
        lines = [line for line in list(self._lines) if line["level"] in wanted]
        return lines[-count:] if count else []

    def follow(self, count: int, level: str, envelope: JsonObject) -> Subscription:
        """Return a subscription to the last lines and those to come."""
        subscription = Subscription(Filter(), identity_mark(envelope), "", lambda: iter(()))
        first = [{"type": "subscribed"}, *({"type": "log", **line} for line in self.last(count, level))]
        subscription.say([format_line(line) for line in first])
        self._followers[subscription] = int(getattr(logging, level.upper()))
        return subscription

    def unfollow(self, subscription: Subscription) -> None:
        """Tell a follower no more."""
        self._followers.pop(subscription, None)


def _make_harmless(record: logging.LogRecord) -> bool:
    """Take out of a message what could steer a terminal: clusters and peers put what they like into it."""
    record.msg, record.args = safe_text(record.getMessage()), ()
    return True


def make_log(level: str, errors: TextIO, ring: LogRing) -> logging.Logger:
    """Return the daemon's log, which goes to stderr and to the ring; no file is ever written."""
    log = logging.getLogger("fabrik-daemon")
    handler = logging.StreamHandler(errors)
    formatter = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    handler.addFilter(_make_harmless)
    log.handlers[:] = [handler, logging.handlers.QueueHandler(ring)]  # type: ignore[arg-type]  # all it needs is put_nowait
    log.handlers[1].addFilter(_make_harmless)
    log.setLevel(level.upper())
    log.propagate = False
    return log


def crash_path(cache: str) -> str:
    """Return where a background daemon's last words are."""
    return os.path.join(os.path.dirname(os.path.abspath(cache)), "daemon.crash")


def detach(cache: str) -> None:
    """Let go of the terminal: from here on stderr is daemon.crash, which only last words reach."""
    log = logging.getLogger("fabrik-daemon")
    log.handlers[:] = [handler for handler in log.handlers if isinstance(handler, logging.handlers.QueueHandler)]
    file = os.open(crash_path(cache), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    sys.stderr.flush()
    os.dup2(file, 2)
    os.close(file)
    faulthandler.enable()


def last_words(cache: str) -> str:
    """Return what the last background daemon said when it died, empty where it ended in order."""
    try:
        with open(crash_path(cache), encoding="utf-8", errors="replace") as file:
            return file.read(LAST_WORDS_CHARS).strip()
    except OSError:
        return ""


def take_last_words(cache: str, *, starting: bool) -> str:
    """Return the last words once to whoever asks how the daemon is, and once more to whoever starts the next."""
    path, told = crash_path(cache), crash_path(cache) + ".told"
    words = last_words(cache)
    with contextlib.suppress(OSError):
        if words:  # an empty file is that of a daemon that starts or runs
            os.replace(path, told)
        elif starting:
            with open(told, encoding="utf-8", errors="replace") as file:
                words = file.read(LAST_WORDS_CHARS).strip()
        if starting:
            os.unlink(told)
    return words


def end_without_words(cache: str) -> None:
    """Take away the file for last words, where none were said."""
    if not last_words(cache):
        with contextlib.suppress(OSError):
            os.unlink(crash_path(cache))


# ----------------------------------------------------------------------------------------------------------------------
# Daemon: following
# ----------------------------------------------------------------------------------------------------------------------


class Follower:
    """Takes what the clusters' watches tell into store, cache and bus."""

    def __init__(self, store: Store, cache: CacheThread, bus: Bus, log: logging.Logger) -> None:
        self._store = store
        self._cache = cache
        self._bus = bus
        self._log = log.getChild("clusters")
        self._rows: dict[str, ClusterRow] = {}
        self._synced: set[str] = set()
        self._stale: set[str] = set()
        self.clusters: dict[str, Cluster] = {}
        self.meter = Meter()
        self._listing: set[Scope] = set()
        self._in_trouble: set[Scope] = set()
        self.on_changes: list[Callable[[Sequence[Change]], None]] = []  # once subscribers were told
        self.on_news: Callable[[list[Subscription]], None] = lambda subscriptions: None
        self.on_settled: Callable[[Cluster], None] = lambda cluster: None
        self.on_rewritten: Callable[[], None] = lambda: None

    def on_events(self, scope: Scope, events: Sequence[WatchEvent], synced_at: str | None) -> None:
        """Take events of objects into the store, in order; their types are ADDED, MODIFIED and DELETED."""
        began, now = time.monotonic(), time.time()
        progress = Progress(scope, events[-1].resource_version, synced_at)
        seen = [Seen(event.name, event.project(scope.resource), event.type == "DELETED") for event in events]
        commit = self._store.observe(progress, seen, now)
        self.take(commit, last_event_statement(scope.cluster, format_time(now, milliseconds=True)))
        self.meter.count("fabrik_daemon_events_total", scope.cluster, scope.resource, by=len(events))
        if commit.changes and len(self._bus):
            histogram = self.meter.histograms["fabrik_daemon_event_to_subscriber_seconds"]
            histogram.observe(time.monotonic() - began, len(commit.changes))

    def on_list(self, scope: Scope, resource_version: str, items: list[Facts]) -> None:
        """Take a whole list into the store."""
        now = time.time()
        self.take(self._store.replace(progress_of(scope, resource_version, now), items, now))
        self.meter.count("fabrik_daemon_list_total", scope.cluster, scope.resource, "success")
        told = "%s: listed %d %s", scope.cluster, len(items), scope.resource
        self._log.info(*told, extra={"cluster": scope.cluster})

    def on_watch_open(self, scope: Scope) -> None:
        """Count a watch that has begun."""
        self.meter.count("fabrik_daemon_watch_total", scope.cluster, scope.resource, "success")

    def on_bookmark(self, scope: Scope, resource_version: str) -> None:
        """Note that nothing else happened up to a version."""
        now = time.time()
        self.take(self._store.advance(progress_of(scope, resource_version, now), now))

    def on_watch_state(self, scope: Scope, told: Told) -> None:
        """Note a watch's state, and log what a person should know of it."""
        self._count_state(scope, told)
        columns: JsonObject = {"state": told.state, "error": told.error or None}
        if told.state == LISTING:  # what is listed anew must not be resumed from where it was
            columns["resource_version"] = None
        self._cache.put([watch_statement(scope, columns)])
        if told.state == FORBIDDEN:
            self.take(self._store.forbid(scope, time.time()))
        elif told.state == STALE and scope.cluster not in self._stale:
            self._stale.add(scope.cluster)
            self.take(self._store.announce("cluster:stale", self._row(self.clusters[scope.cluster]), time.time()))
        level = logging.WARNING if told.error else logging.DEBUG
        where = f"{scope.resource} in {scope.namespace or 'all namespaces'}"
        message = "%s: %s: %s%s", scope.cluster, where, told.state, f": {told.error}" if told.error else ""
        self._log.log(level, *message, extra={"cluster": scope.cluster})

    def _count_state(self, scope: Scope, told: Told) -> None:
        if told.error and told.retry_at is not None:
            name = "fabrik_daemon_list_total" if scope in self._listing else "fabrik_daemon_watch_total"
            self.meter.count(name, scope.cluster, scope.resource, "error")
            self._in_trouble.add(scope)
        elif told.state == WATCHING and scope in self._in_trouble:
            self._in_trouble.discard(scope)
            self.meter.count("fabrik_daemon_reconnects_total", scope.cluster, scope.resource)
        (self._listing.add if told.state == LISTING else self._listing.discard)(scope)

    def on_cluster_state(self, name: str) -> None:
        """Note whether a cluster is connected, and why not."""
        cluster = self.clusters[name]
        if cluster.error is not None and (name not in self._rows or self._rows[name].error != cluster.trouble):
            self._log.error("%s: %s", name, cluster.error, extra={"cluster": name})
        self.write_cluster(cluster)
        self.on_settled(cluster)

    def write_cluster(self, cluster: Cluster) -> None:
        """Write a cluster's row where it says something new; tell subscribers of its connection."""
        spec, now = cluster.spec, time.time()
        row = self._row(cluster)
        before = self._rows.get(spec.name)
        if row == before:
            return
        self._rows[spec.name] = row
        columns = {name: value for name, value in row._asdict().items() if value is not None or name == "error"}
        self._cache.put([cluster_statement(spec.name, columns)])
        if row.connected != (before.connected if before else 0):
            verb = "connected" if row.connected else "disconnected"
            self._stale.discard(spec.name)
            self.take(self._store.announce(f"cluster:{verb}", row, now))
        if row.connected and spec.name not in self._synced:
            self._synced.add(spec.name)
            self.take(self._store.announce("cluster:synced", row, now))

    def rewrite_cluster(self, cluster: Cluster) -> None:
        """Write a cluster's rows again, into a cache that was made anew."""
        self._rows.pop(cluster.spec.name, None)
        self.write_cluster(cluster)
        for watcher in cluster.watchers:
            told = {"state": watcher.told.state, "error": watcher.told.error or None, "synced_at": watcher.synced_at}
            self._cache.put([watch_statement(watcher.scope, told)])

    def on_new_epoch(self, name: str) -> None:
        """Void the versions before the new uid is written: a crash between must not take old rows for new ones."""
        scopes = [watcher.scope for watcher in self.clusters[name].watchers]
        self._cache.put([watch_statement(scope, {"resource_version": None}) for scope in scopes])

    def on_identity(self, name: str) -> bool:
        """Follow a cluster under one of its names only: that of clusters.yaml, else the first in order."""
        cluster = self.clusters[name]
        for other in self.clusters.values():
            if other is not cluster and not isinstance(other.error, TwinError) and other.identity == cluster.identity:
                first, twin = sorted((cluster, other), key=lambda each: each.spec.rank)
                error = TwinError(f"the same cluster as {first.spec.name}", "remove one of the two")
                twin.stop(error)
                self._log.warning("%s: %s", twin.spec.name, error, extra={"cluster": twin.spec.name})
                self.write_cluster(twin)
        self.write_cluster(cluster)
        return cluster.error is None

    @staticmethod
    def _row(cluster: Cluster) -> ClusterRow:
        spec, connected = cluster.spec, int(cluster.is_connected)
        return ClusterRow(spec.name, cluster.server, cluster.uid, spec.priority, connected, None, cluster.trouble)

    def forget_cluster(self, name: str) -> None:
        """Note that a cluster is followed no more; its rows stay."""
        row = self._rows.pop(name, None)
        if row is not None and row.connected:
            gone = row._replace(connected=0, error="not configured")
            self.take(self._store.announce("cluster:disconnected", gone, time.time()))
        self._synced.discard(name)
        self._stale.discard(name)
        self._cache.put([cluster_statement(name, {"connected": 0, "error": "not configured"})])

    def rows(self, wanted: Filter) -> list[Row]:
        """Return the rows of all tables that are asked for, and of the clusters."""
        return [*self._store.rows(wanted), *filter(wanted.matches, self._rows.values())]

    def take(self, commit: Commit, *also: Statement) -> None:
        """Write a commit and tell subscribers of it."""
        for run_id, keys in commit.malformed:
            run = self._store.tables.run(run_id)
            about = {"run_id": run_id, **({"cluster": run.cluster} if run else {})}
            self._log.warning("run %s reports values that do not parse: %s", run_id, ", ".join(keys), extra=about)
        if max(len(commit.changes), len(commit.objects)) <= COMMIT_CHANGES:
            self._cache.put([*commit_statements(commit), *also])
        else:
            for part in commit_parts(commit):
                self._cache.put(LateStatements(part))
            self._cache.put([*also])
        if commit.changes:
            self.on_news(self._bus.publish(commit.changes))
            for take_in in self.on_changes:
                take_in(commit.changes)

    def rewrite(self) -> None:
        """Fill a cache that was made anew; where the watches are follows with their next word."""
        self._cache.put(dump_statements(self._store.rows(Filter()), self._store.objects()))
        self._cache.put(stream_statements(Cursor(self._bus.stream, self._bus.seq), self._store.tables.reserve()))
        for cluster in self.clusters.values():
            self.rewrite_cluster(cluster)
        self.on_rewritten()


def progress_of(scope: Scope, resource_version: str, now: float) -> Progress:
    """Return how far a scope is followed now."""
    return Progress(scope, resource_version, format_time(now, milliseconds=True))


# ----------------------------------------------------------------------------------------------------------------------
# Daemon: kept logs
# ----------------------------------------------------------------------------------------------------------------------


class ClusterOrigin:
    """A cluster that is followed, to be asked for something else."""

    def __init__(self, cluster: Cluster, reactor: Reactor, timing: Timing) -> None:
        self.reactor = reactor
        self.timing = timing
        self._cluster = cluster

    def prepare(self, done: Callable[[FabrikError | None], None]) -> None:
        """Tell whether the cluster can be asked."""
        error = None if self._cluster.is_connected else UnreachableError(f"{self._cluster.spec.name} is not connected")
        self.reactor.call_soon(lambda: done(error))

    def forget(self) -> None:
        """Have the credentials resolved anew."""
        self._cluster.renew()

    def connect(self, handler: StreamHandler) -> tuple[Stream, HttpClientCodec, str]:
        """Return a new connection, and the path that leads every target."""
        return self._cluster.connect(handler)

    def headers(self) -> dict[str, str]:
        """Return what a request says of us."""
        return self._cluster.headers()


class LastLines:
    """Fetches the last lines of the container that made a run fail, up to its end."""

    def __init__(self, origin: Origin, run: Run, done: Callable[[list[ShowLine] | None, int], None]) -> None:
        self._origin = origin
        self._run = run
        self._done = done  # gets the lines, or None and the HTTP status, 0 where there is no response
        self._decoder = LogDecoder()
        self._status = 0
        self._name = ("", "")
        self._lines: deque[LogLine] = deque(maxlen=KEPT_LINES)
        self._timer: Timer | None = None
        selector = urllib.parse.quote(f"metadata.name={run.pod_name}")
        self._call = fetch(origin, f"{PODS.path(run.namespace)}?fieldSelector={selector}", self._on_pod)

    def on_head(self, head: ResponseHead) -> None:
        """Take in the status."""
        self._status = head.status

    def on_body(self, data: bytes) -> None:
        """Take in some of the log."""
        if self._status == 200:
            self._lines.extend(self._decoder.receive(data))

    def on_end(self, error: str) -> None:
        """Tell what there was; of a log that broke off, what came."""
        if self._timer is not None:
            self._timer.cancel()
        if self._status == 200 and not error:
            self._lines.extend(self._decoder.end())
        if self._status != 200 or (error and not self._lines):
            self._done(None, 0 if error else self._status)
        else:
            self._done([ShowLine(*self._name, line) for line in self._lines], self._status)

    def _on_pod(self, got: Got) -> None:
        pods = [pod_view(item) for item in list_at(got.document(), "items")]
        pods = [pod for pod in pods if pod.name == self._run.pod_name]
        if not pods:
            self._done(None, 404 if got.is_ok else got.status)
            return
        container = pods[0].culprit
        self._name = pods[0].name, container
        wanted = OpenLog(*self._name, previous=False, follow=True, tail=KEPT_LINES)  # it may still be about to end
        target = f"{PODS.path(self._run.namespace)}/{urllib.parse.quote(pods[0].name, safe='')}/log?{wanted.query}"
        self._call = Call(self._origin, f"{target}&limitBytes={KEPT_READ_BYTES}", self)
        self._timer = self._origin.reactor.call_later(self._origin.timing.answer, self._stop_waiting)

    def _stop_waiting(self) -> None:
        self._call.cancel()
        self.on_end("it goes on")


class KeptLogs:
    """Keeps the last lines of runs that fail, so that a failure can be read when the Pod is gone."""

    def __init__(
        self, reactor: Reactor, store: Store, timing: Timing, log: logging.Logger, kept: Mapping[str, str]
    ) -> None:
        self._reactor = reactor
        self._store = store
        self._timing = timing
        self._log = log
        self._kept = dict(kept)  # run_id -> the uid of the Job whose lines were fetched
        self._queue: dict[str, int] = {}  # run_id -> how often it was tried
        self._active: dict[str, LastLines] = {}
        self._refused: set[str] = set()  # clusters that do not let us read logs
        self.clusters: Mapping[str, Cluster] = {}
        self.write: Callable[[Commit, Statement], None] = lambda commit, statement: None

    def on_changes(self, changes: Iterable[Change]) -> None:
        """Fetch what runs that fail printed last; what an end of the daemon prevented, when their cluster is back."""
        for change in changes:
            if change.type == "cluster:connected":
                runs = [row for row in self._store.tables.rows(Run) if row.cluster == change.row.cluster]
                for row in runs:
                    self._consider(row)
            elif change.type != "run:removed":
                self._consider(change.row)

    def _consider(self, row: Row) -> None:
        if not isinstance(row, Run) or row.status != FAILED or self._kept.get(row.run_id) == (row.job_uid or ""):
            return
        is_new = row.run_id not in self._active and row.run_id not in self._queue
        pod = self._store.known(ObjectKey(row.cluster, PODS.name, row.namespace, row.pod_name or ""))
        if is_new and row.cluster not in self._refused and pod is not None and not pod.gone:
            self._queue[row.run_id] = 0
            self._reactor.call_soon(self._next)

    def _next(self) -> None:
        while self._queue and len(self._active) < KEPT_AT_ONCE:
            run_id = next(iter(self._queue))
            tries = self._queue.pop(run_id)
            run = self._store.tables.run(run_id)
            cluster = self.clusters.get(run.cluster) if run is not None else None
            if run is not None and cluster is not None and run.cluster not in self._refused:
                self._fetch(run, cluster, tries)

    def _fetch(self, run: Run, cluster: Cluster, tries: int) -> None:
        def done(lines: list[ShowLine] | None, status: int) -> None:
            del self._active[run.run_id]
            if lines is None and status == 403:
                self._refuse(run.cluster)
            elif lines is not None or status in (400, 404):  # no such Pod, or a container that never began
                self._keep(run, lines or [])
            elif tries + 1 < LOG_TRIES:
                self._reactor.call_later(
                    self._timing.backoff_max / LOG_TRIES, lambda: self._again(run.run_id, tries + 1)
                )
            self._reactor.call_soon(self._next)

        self._active[run.run_id] = LastLines(ClusterOrigin(cluster, self._reactor, self._timing), run, done)

    def _again(self, run_id: str, tries: int) -> None:
        if run_id not in self._active:
            self._queue.setdefault(run_id, tries)
            self._next()

    def _refuse(self, cluster: str) -> None:
        if cluster not in self._refused:
            self._refused.add(cluster)
            told = (
                "its Pods' logs may not be read, so the last lines of failed runs are not kept: grant get on pods/log"
            )
            self._log.warning("%s: %s, or set keepLogs: false", cluster, told)

    def _keep(self, run: Run, lines: Sequence[ShowLine]) -> None:
        self._kept[run.run_id] = run.job_uid or ""
        said = [
            (
                {"pod": shown.pod, "container": shown.container, "line": clip(shown.line.text) or ""},
                shown.line.time or None,
            )
            for shown in lines
        ]
        commit = self._store.keep_lines(run.run_id, said, time.time())
        self.write(commit, set_meta(KEPT_META + run.run_id, run.job_uid or ""))


# ----------------------------------------------------------------------------------------------------------------------
# Daemon: sidecars
# ----------------------------------------------------------------------------------------------------------------------


class SidecarReports:
    """Asks the sidecars of Pods that run what Smithers reports, through the API server (`statusSources: [sidecar]`)."""

    def __init__(self, reactor: Reactor, store: Store, timing: Timing, log: logging.Logger) -> None:
        self._reactor = reactor
        self._store = store
        self._timing = timing
        self._log = log
        self._waiting: deque[tuple[str, PodFacts]] = deque()
        self._active: dict[tuple[str, str], Call] = {}  # by cluster and the Pod's uid
        self._told: set[str] = set()  # clusters whose missing right was logged
        self.clusters: Mapping[str, Cluster] = {}
        self.write: Callable[[Commit], None] = lambda commit: None

    def start(self) -> None:
        """Ask now and then."""
        self._reactor.call_every(self._timing.sidecar, self._ask_all)

    def _ask_all(self) -> None:
        if not self._waiting:  # else the last round is not over
            pods = ((key.cluster, pod) for key, pod in self._store.objects() if isinstance(pod, PodFacts))
            is_there = ((name, pod) for name, pod in pods if pod.phase == "Running" and not pod.gone)
            self._waiting.extend((name, pod) for name, pod in is_there if pod.sidecar_port)
            self._next()

    def _next(self) -> None:
        while self._waiting and len(self._active) < SIDECARS_AT_ONCE:
            name, pod = self._waiting.popleft()
            cluster = self.clusters.get(name)
            if cluster is not None and cluster.is_connected and (name, pod.uid) not in self._active:
                self._ask(cluster, pod)

    def _ask(self, cluster: Cluster, pod: PodFacts) -> None:
        name = cluster.spec.name

        def done(got: Got) -> None:
            del self._active[name, pod.uid]
            if got.document():
                now = time.time()
                self.write(self._store.take_sidecar(name, pod, report_from_status(got.document(), now), now))
            elif got.status == 403 and name not in self._told:
                self._told.add(name)
                self._log.warning("%s: its sidecars may not be asked: grant get on pods/proxy", name)
            self._reactor.call_soon(self._next)

        origin = ClusterOrigin(cluster, self._reactor, self._timing)
        self._active[name, pod.uid] = fetch(origin, sidecar_path(pod), done, REFUSAL_MAX_BYTES)


def sidecar_path(pod: PodFacts) -> str:
    """Return the path of a sidecar's status, through the API server's proxy."""
    name = urllib.parse.quote(f"{pod.name}:{pod.sidecar_port}", safe="")
    return f"{PODS.path(pod.namespace)}/{name}/proxy/status"


# ----------------------------------------------------------------------------------------------------------------------
# Daemon: service manager
# ----------------------------------------------------------------------------------------------------------------------


class ServiceManager:
    """What systemd hands in and is told (sd_notify(3), sd_listen_fds(3)), and the signals; without systemd just these.

    The variables are taken out of the environment: helper processes must not take them for theirs.
    """

    def __init__(self, environment: MutableMapping[str, str], reactor: Reactor, log: logging.Logger) -> None:
        self._reactor = reactor
        self._log = log
        self._address = environment.pop("NOTIFY_SOCKET", "")
        self._status = ""
        usec, pid = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
        watched = self._address and usec.isdigit() and int(usec) > 0 and pid in ("", str(os.getpid()))
        self._watchdog_s = int(usec) / 1e6 if watched else None
        self._listener = self._given_listener(environment)

    def open(self, server: Server, settings: Settings) -> str:
        """Listen on the socket handed in, else where the settings say; return its path. Raises SocketError."""
        if self._listener is not None:
            server.adopt(self._listener)
            return str(self._listener.getsockname())
        path = choose_socket(settings)
        server.open(path, settings.socket_group)
        return path

    def attend(self, reload: Callable[[], object], stop: Callable[[], None]) -> None:
        """Take signals from now on, and tell the watchdog that the loop turns."""
        signal.set_wakeup_fd(self._reactor.wake_fd, warn_on_full_buffer=False)

        def on_signal(number: int, _frame: object) -> None:
            if number == signal.SIGHUP:
                self._reactor.call_soon(lambda: self.reload(reload))
                return
            self._log.info("%s: stopping", signal.Signals(number).name)
            stop()

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, on_signal)
        if self._watchdog_s is not None:
            faulthandler.enable()  # systemd ends a daemon that hangs with SIGABRT; so the journal tells where it hung
            self._reactor.call_every(self._watchdog_s / 2, lambda: self._tell("WATCHDOG=1"))

    def reload(self, reload: Callable[[], object]) -> None:
        """Reload, for want of somebody to answer telling the log what fails."""
        try:
            reload()
        except FabrikError as error:
            self._log.error("not reloaded: %s", error)

    def ready(self) -> None:
        """Say that the daemon has started, or that it has reloaded."""
        self._tell("READY=1")

    def reloading(self) -> None:
        """Say that a reload begins; `ready` must follow."""
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """Say that the end begins."""
        self._tell("STOPPING=1")

    def status(self, text: str) -> None:
        """Say in one line how it is, where that is news."""
        if text != self._status:
            self._status = text
            self._tell(f"STATUS={text}")

    def _tell(self, state: str) -> None:
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            try:
                sock.sendto(state.encode(), address)
            except OSError as error:
                self._log.warning("systemd was not told %r: %s", state, error)

    def _given_listener(self, environment: MutableMapping[str, str]) -> socket.socket | None:
        """Return the Unix socket that systemd opened for us, None where there is none."""
        count, pid = environment.pop("LISTEN_FDS", ""), environment.pop("LISTEN_PID", "")
        environment.pop("LISTEN_FDNAMES", None)
        if not count.isdigit() or pid != str(os.getpid()):
            return None
        found = None
        for descriptor in range(FIRST_GIVEN_FD, FIRST_GIVEN_FD + int(count)):
            try:
                os.set_inheritable(descriptor, False)
                sock = socket.socket(fileno=descriptor)
            except OSError as error:
                self._log.warning("descriptor %d from systemd is no socket: %s", descriptor, error)
                continue
            if found is None and _is_listener(sock):
                sock.setblocking(False)
                found = sock
            else:
                self._log.warning("socket %d from systemd is not used: one Unix stream socket is", descriptor)
                sock.close()
        return found


def service_status(clusters: Iterable[Cluster]) -> str:
    """Return in one line which clusters are followed, and which of them are away."""
    named = [(cluster.spec.name, cluster.is_connected) for cluster in clusters]
    connected, away = ([name for name, is_there in named if is_there is wanted] for wanted in (True, False))
    told = f"following {', '.join(connected)}" if connected else "no cluster is connected"
    return safe_text(f"{told}; not connected: {', '.join(away)}" if away else told)


def _is_listener(sock: socket.socket) -> bool:
    """Say whether this is a listening Unix stream socket that has a path."""
    name = sock.getsockname()
    kind = sock.family == socket.AF_UNIX and sock.type == socket.SOCK_STREAM and isinstance(name, str) and bool(name)
    return kind and bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


# ----------------------------------------------------------------------------------------------------------------------
# Daemon: metrics
# ----------------------------------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """What the daemon is made of, as far as LAOS hears of it."""

    reactor: Reactor
    settings: Settings
    store: Store
    cache: CacheThread
    bus: Bus
    follower: Follower
    ring: LogRing
    log: logging.Logger


class Readings:
    """Reads the metrics' values out of what the daemon is made of."""

    def __init__(self, parts: Parts, times: StatusTimes, couriers: Callable[[], Iterable[Courier]]) -> None:
        self._parts = parts
        self._times = times
        self._couriers = couriers
        self._meter = parts.follower.meter
        self._process: list[Any] = []
        self.requests: Requests | None = None

    def read(self, cluster: str = "") -> Callable[[], bytes]:
        """Read the values of this moment, only a cluster's where one is named; return what makes their text."""
        samples = list(self._samples())
        samples = samples_of_cluster(samples, cluster) if cluster else samples
        histograms = {name: histogram.copy() for name, histogram in self._meter.histograms.items()}

        def text() -> bytes:
            if not self._process:  # made off the loop, as prometheus_client is imported there
                self._process.append(prometheus_client.ProcessCollector(registry=None))
            return format_metrics(samples, histograms, *self._process)

        return text

    def _samples(self) -> Iterator[Sample]:
        now, bus, clusters = time.time(), self._parts.bus, self._parts.follower.clusters
        yield Sample("fabrik_daemon_build_info", (__version__, "{}.{}.{}".format(*sys.version_info), str(PROTOCOL)), 1)
        yield Sample("fabrik_daemon_metrics_timestamp_seconds", (), now)
        yield from self._meter.samples()
        for name in ("fabrik_daemon_events_dropped_total", "fabrik_daemon_events_dropped"):
            yield Sample(name, (), bus.dropped)
        yield Sample("fabrik_daemon_subscribers", (), len(bus))
        yield Sample("fabrik_daemon_subscriber_queue_length", (), bus.waiting)
        yield Sample("fabrik_daemon_cache_queue_length", (), self._parts.cache.waiting)
        hits, misses = (self.requests.hits, self.requests.misses) if self.requests else (0, 0)
        yield Sample("fabrik_daemon_cache_requests_total", ("hit",), hits)
        yield Sample("fabrik_daemon_cache_requests_total", ("miss",), misses)
        yield Sample("fabrik_daemon_cache_hit_ratio", (), hits / (hits + misses) if hits + misses else math.nan)
        for cluster in clusters.values():
            yield from self._samples_of(cluster, now)
        tables = self._parts.store.tables
        runs = [row for row in tables.rows(Run) if isinstance(row, Run)]
        yield from run_samples(runs, self._times, clusters, now)
        for row in tables.rows(Schedule):
            if isinstance(row, Schedule):
                yield Sample("fabrik_schedule_missed", (row.cluster, row.namespace, row.name), row.missed)
        for courier in self._couriers():
            yield from _samples_of_courier(courier)

    def _samples_of(self, cluster: Cluster, now: float) -> Iterator[Sample]:
        name = cluster.spec.name
        books = [courier.shipper for courier in self._couriers() if isinstance(courier.shipper, AlertBook)]
        direct = any(name in book.clusters for book in books)
        yield Sample("fabrik_daemon_cluster_connected", (name,), cluster.is_connected)
        yield Sample("fabrik_daemon_alerts_direct", (name,), direct)
        if cluster.skew_s is not None:
            yield Sample("fabrik_daemon_clock_skew_seconds", (name,), cluster.skew_s)
        if cluster.expires_at is not None:
            yield Sample("fabrik_daemon_credentials_expiry_timestamp_seconds", (name,), cluster.expires_at)
        lags: dict[str, float] = {}
        for watcher in cluster.watchers:
            heard_at = epoch_of(watcher.synced_at)
            if heard_at is not None:
                resource_name = watcher.scope.resource
                lags[resource_name] = max(lags.get(resource_name, 0.0), now - heard_at)
        for resource_name, lag_s in lags.items():
            yield Sample("fabrik_daemon_sync_lag_seconds", (name, resource_name), lag_s)


def _samples_of_courier(courier: Courier) -> Iterator[Sample]:
    shipper, target = courier.shipper, courier.target
    if courier.taken_at is not None:
        yield Sample("fabrik_daemon_delivery_timestamp_seconds", (target,), courier.taken_at)
    if isinstance(shipper, LogSpool):
        yield Sample("fabrik_daemon_log_queue_length", (target,), len(shipper))
        yield Sample("fabrik_daemon_log_lines_total", (target, "sent"), shipper.sent)
        yield Sample("fabrik_daemon_log_lines_total", (target, "dropped"), shipper.dropped)
    elif isinstance(shipper, AlertBook):
        for labels, count in shipper.firing().items():
            yield Sample("fabrik_daemon_alerts_firing", labels, count)


# ----------------------------------------------------------------------------------------------------------------------
# Daemon: telemetry
# ----------------------------------------------------------------------------------------------------------------------


class MetricsAccess:
    """The metrics and nothing else: for whoever reaches the port that metrics.listen names."""

    is_local = False

    def check_http(self, http: HttpRequest) -> None:
        """Let every HTTP request pass, to be looked at as a request."""

    def check(self, request: JsonObject) -> None:
        """Let requests for the metrics pass. Raises NotFoundError."""
        if request.get("action") != "metrics":
            raise NotFoundError("there is nothing else here", "see /metrics")


class LaosFinder:
    """Looks for the services of LAOS in clusters, where that is wished, every now and then."""

    def __init__(self, post: Post, parts: Parts, on_news: Callable[[], None]) -> None:
        self._post = post
        self._parts = parts
        self._on_news = on_news
        self._told: dict[str, list[str]] = {}  # by cluster, what was said last
        self._searches: dict[str, tuple[float, LaosSearch]] = {}  # by cluster, when the last began
        self.found: dict[str, Laos] = {}  # by cluster

    def close(self) -> None:
        """Look no more."""
        for _, search in self._searches.values():
            search.cancel()

    def search(self, specs: Iterable[ClusterSpec]) -> None:
        """Look for services in clusters that are connected, where that is wished, every now and then."""
        now = self._parts.reactor.now()
        for spec in specs:
            cluster = self._parts.follower.clusters.get(spec.name)
            began_at = self._searches[spec.name][0] if spec.name in self._searches else -math.inf
            wished = spec.laos.over(self._parts.settings.laos).discover and cluster is not None
            if wished and cluster and cluster.is_connected and now - began_at >= self._post.timing.laos_discovery:
                self._searches[spec.name] = now, LaosSearch(self._post, cluster, self._on_found)

    def _on_found(self, name: str, found: list[LaosFinding], troubles: list[str]) -> None:
        told = [*troubles, *map(format_finding, sorted(found, key=lambda each: (each.kind, each.rank)))]
        told = told or [f"no service of LAOS in {' or '.join(LAOS_NAMESPACES)}"]
        if told != self._told.get(name):
            for line in told:
                self._post.log.info("%s: %s", name, line, extra={"cluster": name})
        laos = laos_of(found)
        self._told[name] = told
        urls = {kind: service.url for kind, service in laos._asdict().items() if isinstance(service, LaosService)}
        self._parts.cache.put([set_meta(LAOS_META + name, json.dumps(urls))])
        if laos != self.found.get(name, Laos()) and (found or not troubles):
            self.found[name] = laos
            self._on_news()


class Telemetry:
    """What LAOS hears of the daemon: its metrics, its log, and alerts."""

    def __init__(self, parts: Parts, resumption: Resumption) -> None:
        self._parts = parts
        self._timing = parts.settings.timing
        self._meter = parts.follower.meter
        self._post = Post(parts.reactor, self._timing, self._meter, parts.log.getChild("laos"))
        self._host = socket.gethostname()
        self._times = StatusTimes()
        self._times.load(resumption.since)
        self._alert_rows = {row.fingerprint: row for row in resumption.alerts}
        self._known: set[str] = set()  # clusters that were connected since the start
        self._targets: list[Target] = []
        self._couriers: dict[tuple[str, LaosService], Courier] = {}
        self._checking = False
        self._specs: list[ClusterSpec] = []
        self._finder = LaosFinder(self._post, parts, lambda: self.follow(self._specs))
        self._listener: Listener | None = None
        self.readings = Readings(parts, self._times, self._couriers.values)
        self.address: str | None = None  # of the metrics on TCP
        parts.follower.on_changes.append(self._on_changes)
        parts.follower.on_rewritten = self._rewrite
        parts.cache.on_written = self._meter.histograms["fabrik_daemon_event_to_cache_seconds"].observe

    def start(self, specs: Iterable[ClusterSpec], server: Server) -> None:
        """Begin to tell. Raises SocketError where the metrics' address cannot be had."""
        self.readings.requests = server.requests
        if self._parts.settings.metrics_listen is not None:
            self._listen(*self._parts.settings.metrics_listen, server)
        self.follow(specs)
        for spec in self._specs:
            laos = self._laos_of(spec)
            if laos.alerts == "direct" and laos.alertmanager is None and not laos.discover:
                self._post.log.warning("%s: alerts: direct, but no alertmanager is named under laos:", spec.name)
        for line in self._parts.ring.last(LOG_RING_LINES, LOG_LEVELS[0]):
            self._put(line)
        self._parts.ring.on_line = lambda line: self._parts.reactor.call_soon(lambda: self._put(line))
        self._parts.reactor.call_every(min(ALERT_CHECK_S, self._timing.alert_resend / 4), self._check)

    def follow(self, specs: Iterable[ClusterSpec]) -> None:
        """Tell of these clusters from now on, whom their settings name."""
        self._specs = sorted(specs, key=lambda spec: (spec.priority, spec.name))
        clusters = {spec.name: self._laos_of(spec) for spec in self._specs}
        self._targets = laos_targets(self._parts.settings.laos, clusters)
        wanted = {target.key: target for target in self._targets}
        for key in [key for key in self._couriers if key not in wanted]:
            self._couriers.pop(key).stop()
        for key, target in wanted.items():
            if key not in self._couriers:
                self._couriers[key] = self._courier(target)
            courier = self._couriers[key]
            if isinstance(courier.shipper, AlertBook):
                self._fill(courier.shipper, target)
            courier.poke()

    def close(self) -> None:
        """Tell nothing more, once Loki has the last lines, if it takes them at once."""
        spools = [courier for courier in self._couriers.values() if isinstance(courier.shipper, LogSpool)]
        self._hurry([courier for courier in spools if not courier.trouble])
        self._parts.ring.on_line = lambda line: None
        if self._listener is not None:
            self._listener.close()
        for courier in self._couriers.values():
            courier.stop()
        self._finder.close()

    def status(self) -> list[JsonObject]:
        """Return how the services are that something is sent to."""
        return [
            {
                "target": courier.target,
                "url": courier.service.url,
                "error": courier.trouble or None,
                "taken_at": None if courier.taken_at is None else format_time(courier.taken_at, milliseconds=True),
            }
            for courier in self._couriers.values()
        ]

    def _rewrite(self) -> None:
        """Write the alerts into a cache that was made anew."""
        self._parts.cache.put([alert_statement(tuple(row)) for row in self._alert_rows.values()])

    def _hurry(self, couriers: Sequence[Courier]) -> None:
        reactor = self._parts.reactor

        def stop_where_done() -> None:
            if not any(len(courier.shipper) for courier in couriers if isinstance(courier.shipper, LogSpool)):
                reactor.stop()

        for courier in couriers:
            courier.on_answered = stop_where_done
            if isinstance(courier.shipper, LogSpool):
                courier.shipper.is_hurried = True
            courier.poke()
        if couriers:
            reactor.call_later(LAOS_LAST_S, reactor.stop)
            reactor.call_soon(stop_where_done)  # behind the lines that are on their way to the spool
            reactor.run()

    def _listen(self, host: str, port: int, server: Server) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            sock = socket.create_server((host, port), family=family, backlog=LISTEN_BACKLOG)
        except (OSError, UnicodeError) as error:
            told = f"metrics.listen {host}:{port}: {getattr(error, 'strerror', None) or error}"
            raise SocketError(told, "choose another address in config.yaml") from None
        sock.setblocking(False)
        bound = sock.getsockname()
        self.address = f"[{bound[0]}]:{bound[1]}" if ":" in bound[0] else f"{bound[0]}:{bound[1]}"
        self._listener = Listener(self._parts.reactor, sock, lambda client: server.admit(client, MetricsAccess()))
        self._post.log.info("metrics are on http://%s/metrics", self.address)

    def _laos_of(self, spec: ClusterSpec) -> Laos:
        """Return a cluster's services: as configured for it, overall, and as discovered, in this order."""
        laos = spec.laos.over(self._parts.settings.laos).over(self._finder.found.get(spec.name, Laos()))
        # On a host alerts must be switched on: those of one that sleeps would resolve by themselves.
        in_cluster = "KUBERNETES_SERVICE_HOST" in os.environ
        return laos._replace(alerts=laos.alerts or ("direct" if in_cluster else None))

    def _courier(self, target: Target) -> Courier:
        shipper: Shipper
        if target.kind == "loki":
            labels = {"job": "fabrik-daemon", "host": self._host}
            about = {"version": __version__, "pid": str(os.getpid())}
            shipper = LogSpool(self._timing, random.random, labels, about)
        elif target.kind == "alertmanager":
            shipper = AlertBook(self._timing, random.random, time.time() - self._parts.reactor.now())
            shipper.clusters = target.clusters
            shipper.load_rows(self._alert_rows.values())
        else:
            cluster = "" if target.is_overall else min(target.clusters)
            shipper = MetricsPush(self._timing, random.random, self._host, lambda: self.readings.read(cluster))
        name = target.kind if target.is_overall else f"{target.kind}/{min(target.clusters)}"
        return Courier(self._post, name, target.service, shipper)

    def _put(self, line: JsonObject) -> None:
        """Have a line of the log go to its cluster's Loki, else to the overall one."""
        targets = [target for target in self._targets if target.kind == "loki"]
        own = [target for target in targets if line.get("cluster") in target.clusters]
        for target in own or [target for target in targets if target.is_overall]:
            courier = self._couriers[target.key]
            if isinstance(courier.shipper, LogSpool):
                courier.shipper.put(line, self._parts.reactor.now())
                courier.poke()

    def _books(self) -> list[AlertBook]:
        return [courier.shipper for courier in self._couriers.values() if isinstance(courier.shipper, AlertBook)]

    def _fill(self, book: AlertBook, target: Target) -> None:
        """Have a book know the rows of its clusters; what it knows of them already stays."""
        book.clusters = target.clusters
        for row in [*self._parts.store.tables.rows(Run), *self._parts.store.tables.rows(Schedule)]:
            if isinstance(row, (Run, Schedule)):
                self._observe(book, row)

    def _observe(self, book: AlertBook, row: Run | Schedule, *, gone: bool = False) -> None:
        cluster = self._parts.follower.clusters.get(row.cluster)
        since = self._times.of(row.run_id) if isinstance(row, Run) else None
        skew_s = (cluster.skew_s if cluster else None) or 0.0
        causes = [] if gone or row.cluster not in book.clusters else causes_of(row, since, self._timing, skew_s)
        book.observe(row, causes)

    def _on_changes(self, changes: Sequence[Change]) -> None:
        books = self._books()
        for change in changes:
            self._times.take(change)
            if isinstance(change.row, (Run, Schedule)):
                for book in books:
                    self._observe(book, change.row, gone=change.type.endswith(":removed"))
        if books and not self._checking:
            self._checking = True  # once for all changes of this turn
            self._parts.reactor.call_soon(self._check)

    def _check(self) -> None:
        self._checking = False
        self._finder.search(self._specs)
        clusters = self._parts.follower.clusters
        live = {name for name, cluster in clusters.items() if cluster.is_connected}
        self._known |= live
        at, now, statements = time.time(), self._parts.reactor.now(), []
        for book in self._books():
            for row in book.check(at, now, known=self._known, live=live):
                self._alert_rows[row.fingerprint] = row
                statements.append(alert_statement(tuple(row)))
            for row in book.forget(at):
                self._alert_rows.pop(row.fingerprint, None)
                statements.append(forget_alert_statement(row.fingerprint))
        self._parts.cache.put(statements)
        for courier in self._couriers.values():
            courier.poke()


# ----------------------------------------------------------------------------------------------------------------------
# Daemon
# ----------------------------------------------------------------------------------------------------------------------


def _seconds_until(moment: float | None) -> float | None:
    return None if moment is None else round(max(0.0, moment - time.monotonic()), 1)


class DaemonKnowledge:
    """What requests may ask of the daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def status(self) -> JsonObject:
        """Return what `status` answers."""
        daemon = self._daemon
        runs = [row.status or UNKNOWN for row in daemon.store.tables.rows(Run) if isinstance(row, Run)]
        return {
            "version": __version__,
            "protocol": PROTOCOL,
            "pid": os.getpid(),
            "uptime_seconds": round(time.monotonic() - daemon.started_at, 3),
            "socket": daemon.socket_path,
            "cache": os.path.abspath(daemon.settings.cache),
            "cache_error": daemon.cache.error,
            "metrics": daemon.telemetry.address,
            "laos": daemon.telemetry.status(),
            "runs": len(runs),
            "runs_by_status": {status: runs.count(status) for status in (*STATUSES, UNKNOWN) if status in runs},
            "subscribers": len(daemon.bus),
            "remote": daemon.server.remote.status() if daemon.server.remote is not None else None,
            "stream": daemon.bus.stream,
            "seq": daemon.bus.seq,
            "events_dropped": daemon.bus.dropped,
            "clusters": [self._cluster(cluster) for cluster in daemon.clusters_in_order()],
        }

    def rows(self, kind: type[TableRow], wanted: Filter) -> list[TableRow]:
        """Return the rows of a table that are asked for."""
        return wanted.select(self._daemon.store.tables.rows(kind), kind)

    def freshness(self) -> list[Freshness]:
        """Return how fresh each cluster's part of an answer is."""
        return [
            Freshness(
                cluster.spec.name, cluster.is_connected, cluster.synced_at, cluster.trouble, cluster.skew_s or 0.0
            )
            for cluster in self._daemon.clusters_in_order()
        ]

    def run_details(self, run: Run) -> JsonObject:
        """Return a run's events, volumes and warnings; takes disk. Raises CacheError."""
        with contextlib.closing(CacheReader(self._daemon.settings.cache)) as reader:
            return reader.run_details(run.run_id)

    def query(self, sql: str) -> bytes:
        """Return `columns`, `rows` and `is_cut` of user SQL as a JSON text; takes a process. Raises FabrikError."""
        return query_in_process(self._daemon.settings, sql)

    def logs(self, lines: int, level: str) -> list[JsonObject]:
        """Return the last log lines of at least a level."""
        return self._daemon.ring.last(lines, level)

    def edition(self, kind: type[TableRow]) -> str:
        """Return what is another whenever a row of a table is."""
        bus, tables = self._daemon.bus, self._daemon.store.tables
        return f"{bus.stream} {bus.begun_at} {tables.editions[kind]}"

    def subscribe(self, wish: Wish, envelope: JsonObject) -> Subscription:
        """Return a new subscription to changes."""
        return self._daemon.bus.subscribe(wish, envelope)

    def follow_logs(self, lines: int, level: str, envelope: JsonObject) -> Subscription:
        """Return a new subscription to log lines."""
        return self._daemon.ring.follow(lines, level, envelope)

    def reload(self) -> JsonObject:
        """Read the settings of clusters again; return what that changed. Raises ConfigError."""
        return self._daemon.reload()

    def shutdown(self) -> None:
        """End the daemon in order, once this has been answered."""
        self._daemon.stop_soon()

    def metrics(self) -> Callable[[], bytes]:
        """Read the metrics of this moment; return what makes their text."""
        return self._daemon.telemetry.readings.read()

    def cache_path(self) -> str:
        """Return which cache the daemon keeps."""
        return os.path.abspath(self._daemon.settings.cache)

    @staticmethod
    def _cluster(cluster: Cluster) -> JsonObject:
        watches = [
            {
                "resource": watcher.scope.resource,
                "namespace": watcher.scope.namespace,
                "state": watcher.told.state,
                "error": watcher.told.error or None,
                "retry_in_seconds": _seconds_until(watcher.told.retry_at),
                "last_byte_at": watcher.last_byte_at,
                "last_event_at": watcher.last_event_at,
                "synced_at": watcher.synced_at,
            }
            for watcher in cluster.watchers
        ]
        return {
            "name": cluster.spec.name,
            "server": cluster.server,
            "priority": cluster.spec.priority,
            "connected": cluster.is_connected,
            "synced": cluster.synced_at is not None,
            "synced_at": cluster.synced_at,
            "last_event_at": cluster.last_event_at,
            "clock_skew_seconds": cluster.skew_s,
            "uid": cluster.uid,
            "error": cluster.trouble,
            "watches": watches,
        }


class Daemon:
    """The composition root: makes the parts, lets them run, and ends them in order."""

    def __init__(self, settings: Settings, read_clusters: Callable[[], list[ClusterSpec]], errors: TextIO) -> None:
        self.settings = settings
        self.started_at = time.monotonic()
        self.ring = LogRing()
        self._log = make_log(settings.log_level, errors, self.ring)
        self._read_clusters = read_clusters
        self._specs = {spec.name: spec for spec in read_clusters() if spec.enabled}
        prepare_cache_folder(settings.cache)
        self._lock = SingleInstance(settings.cache)
        self._lock.acquire()
        connection = open_cache(settings.cache, self._log)
        self._resumption = resume_from(settings.cache, connection, self._log)
        self.cache = CacheThread(settings.cache, connection, settings.timing, self._log)
        self.cache.on_rebuilt = lambda: self._reactor.call_soon(self._follower.rewrite)
        self.store = Store(zone_of)
        self.store.load(self._resumption.snapshot)
        rows: SnapshotRows = lambda wanted: self._follower.rows(wanted)  # noqa: E731, PLW0108 - it is made below
        self.bus: Bus = Bus(self._resumption.past, rows, self.cache.held)
        self._reactor = Reactor(self._log)
        self._credentials = Credentials(self._reactor, settings.timing)
        self._follower = Follower(self.store, self.cache, self.bus, self._log)
        self.server = Server(self._reactor, Requests(DaemonKnowledge(self)), self._unsubscribe, settings)
        self._manager = ServiceManager(os.environ, self._reactor, self._log)
        parts = Parts(self._reactor, settings, self.store, self.cache, self.bus, self._follower, self.ring, self._log)
        self.telemetry = Telemetry(parts, self._resumption)
        self._follower.on_news = self.server.wake
        self._follower.on_settled = self._on_settled
        self._kept_logs = KeptLogs(self._reactor, self.store, settings.timing, self._log, self._resumption.kept)
        self._kept_logs.clusters, self._kept_logs.write = self._follower.clusters, self._follower.take
        self._sidecars = SidecarReports(self._reactor, self.store, settings.timing, self._log)
        self._sidecars.clusters, self._sidecars.write = self._follower.clusters, self._follower.take
        self.ring.wake = lambda subscriptions: self._reactor.call_soon(lambda: self.server.wake(subscriptions))
        self._once = False
        self._ready: Callable[[], None] | None = None
        self._ever_worked = False  # a configuration that never did is an error; later it may mend itself
        self._clusters_file = file_times(settings.cluster_files)
        self._failure: FabrikError | None = None
        self.socket_path: str | None = None

    def run(self, ready: Callable[[], None]) -> None:
        """Serve and follow until a signal; `ready` is called when that can begin. Raises FabrikError."""
        self.socket_path = self._manager.open(self.server, self.settings)
        raise_descriptor_limit()
        gc.set_threshold(GC_OBJECTS, 20, 20)
        self.telemetry.start(self._specs.values(), self.server)
        self._reactor.call_every(self.settings.timing.housekeeping, self._keep_house)
        self._reactor.call_every(self.settings.timing.idle_seq, lambda: self.server.wake(self.bus.idle()))
        self._reactor.call_every(self.settings.timing.socket_check, self._keep_socket)
        self._reactor.call_every(self.settings.timing.files_check, self._check_files)
        self._reactor.watch_sleep(self.settings.timing.sleep, self._on_sleep)
        if self.settings.keep_logs:
            self._follower.on_changes.append(self._kept_logs.on_changes)
        if "sidecar" in self.settings.status_sources:
            self._sidecars.start()
        self._run(ready)

    def run_once(self) -> None:
        """List each cluster once. Raises ConfigError where none of them can be used."""
        self._once = True
        self._log.getChild("clusters").setLevel(logging.CRITICAL)  # what went wrong is told at the end
        self._reactor.call_later(self.settings.timing.sync, self._reactor.stop)
        self._run(lambda: None)

    def clusters_in_order(self) -> list[Cluster]:
        """Return the clusters as people put them."""
        return sorted(self._follower.clusters.values(), key=lambda cluster: (cluster.spec.priority, cluster.spec.name))

    def reload(self) -> JsonObject:
        """Follow the clusters that are configured now; return what that changed. Raises ConfigError."""
        self._manager.reloading()
        try:
            return self._reload()
        finally:
            self._manager.ready()

    def _reload(self) -> JsonObject:
        specs = {spec.name: spec for spec in self._read_clusters() if spec.enabled}
        twins = {name for name, cluster in self._follower.clusters.items() if isinstance(cluster.error, TwinError)}
        changed = [
            name for name in specs if name in self._specs and (specs[name] != self._specs[name] or name in twins)
        ]
        removed = [name for name in self._specs if name not in specs]
        added = [name for name in specs if name not in self._specs]
        for name in (*removed, *changed):
            cluster = self._follower.clusters.pop(name)
            cluster.stop()
            self._resumption.uids.update({name: cluster.uid} if cluster.uid else {})
            self._follower.forget_cluster(name)
        self._specs = specs
        self.store.set_priorities({spec.name: spec.priority for spec in specs.values()})
        for name in (*added, *changed):
            self._begin(specs[name])
        self.telemetry.follow(specs.values())
        self._log.info("reloaded: added %s, changed %s, removed %s", added, changed, removed)
        return {"added": added, "changed": changed, "removed": removed}

    def stop_soon(self) -> None:
        """End the run when the present answers are on their way."""
        self._reactor.call_soon(lambda: self._reactor.call_soon(self._reactor.stop))

    def _run(self, ready: Callable[[], None]) -> None:
        self.cache.start()
        self._manager.attend(self.reload, self._reactor.stop)
        for name in self._resumption.followed:
            if name not in self._specs:
                self._follower.forget_cluster(name)
        try:
            self.store.set_priorities({spec.name: spec.priority for spec in self._specs.values()})
            for spec in self._specs.values():
                self._begin(spec)
            self._ready = ready
            self._reactor.call_later(READY_AT_LATEST_S, self._be_ready)
            self._reactor.run()
        finally:
            self._end()
        if self._failure is not None:
            raise self._failure

    def _begin(self, spec: ClusterSpec) -> None:
        cluster = Cluster(spec, self._reactor, self._credentials, self._follower, self.settings.timing)
        self._follower.clusters[spec.name] = cluster
        followed = json.dumps([spec.kubeconfig, spec.context, spec.label_selector])
        self.cache.put([set_meta(f"followed:{spec.name}", followed)])
        versions = self._resumption.take_versions(spec.name, followed)
        cluster.start(versions, self._resumption.uids.get(spec.name), once=self._once)
        self._follower.write_cluster(cluster)
        names = ", ".join(spec.namespaces) if spec.namespaces != ("",) else "all namespaces"
        self._log.info("%s: following %s", spec.name, names)

    def _on_settled(self, cluster: Cluster) -> None:
        clusters = self._follower.clusters.values()
        self._manager.status(service_status(self.clusters_in_order()))
        self._ever_worked = self._ever_worked or any(each.error is None and each.server for each in clusters)
        if len(clusters) == len(self._specs) and all(each.is_settled for each in clusters):
            self.store.settle()
            if self._once:
                self._reactor.call_soon(self._reactor.stop)
                return
        if self._ever_worked:
            self._be_ready()
        elif clusters and all(isinstance(each.error, ConfigError) for each in clusters):
            self._failure = cluster.error
            self._reactor.stop()

    def _be_ready(self) -> None:
        ready, self._ready = self._ready, None
        if ready is not None:
            ready()
            self._manager.ready()

    def _unsubscribe(self, subscription: Subscription) -> None:
        self.bus.unsubscribe(subscription)
        self.ring.unfollow(subscription)

    def _keep_house(self) -> None:
        now, retention = time.time(), self.settings.timing.retention
        self._follower.take(self.store.tick(now, retention))
        self.cache.put(retention_statements(self.store.tables.seq, format_time(now - retention)))

    def _keep_socket(self) -> None:
        try:
            self.server.keep()
        except SocketError as error:
            self._log.error("the socket cannot be made again: %s", error)

    def _check_files(self) -> None:
        """Read kubeconfigs and clusters.yaml again where they have changed."""
        for cluster in self._follower.clusters.values():
            cluster.check_files()

        def done(found: Any, _error: BaseException | None) -> None:
            if found is not None and found != self._clusters_file:
                self._clusters_file = found
                self._manager.reload(self.reload)

        self._reactor.run_blocking(lambda: file_times(self.settings.cluster_files), done)

    def _on_sleep(self) -> None:
        """Trust no connection that was there before the host slept."""
        self._log.warning("the host slept: all connections are made anew")
        for cluster in self._follower.clusters.values():
            cluster.recycle("the host slept")

    def _end(self) -> None:
        self._manager.stopping()
        for cluster in self._follower.clusters.values():
            cluster.stop()
            self.cache.put([cluster_statement(cluster.spec.name, {"connected": 0})])
        self.telemetry.close()
        if not self.cache.close(self.settings.timing.stop):
            self._log.error("the cache could not be written to its end within %g s", self.settings.timing.stop)
        self._credentials.close()
        self.server.close()
        self._reactor.close()
        self._lock.release()


def zone_of(name: str) -> Any:
    """Return the time zone of an IANA name. Raises KeyError where this host does not know it."""
    return zoneinfo.ZoneInfo(name)


def raise_descriptor_limit() -> None:
    """Allow for a thousand clients and many clusters, as far as the host does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# ----------------------------------------------------------------------------------------------------------------------
# Client: remote
# ----------------------------------------------------------------------------------------------------------------------


class _Place:
    """Where in the stream a subscriber is, so that after a break it goes on there: no gap, no repeat."""

    def __init__(self, fields: JsonObject) -> None:
        self._fields = fields
        self._stream: str | None = None
        self._seq: int | None = None if fields.keys() & {"since", "includeHistory", "snapshot"} else -1
        self.is_resumed = False

    def request(self) -> JsonObject:
        """Return the fields of the subscription that goes on from here."""
        if self._stream is None or self._seq is None:
            return self._fields  # nothing was told yet
        self.is_resumed = True
        kept = {name: value for name, value in self._fields.items() if name not in ("includeHistory", "snapshot")}
        return {**kept, "since": {"stream": self._stream, "seq": self._seq}}

    def note(self, message: JsonObject) -> None:
        """Take in a message. A snapshot counts when it is whole, and `lagged` not at all: what follows it does."""
        kind, seq = message.get("type"), parse_int(message.get("seq"))
        if kind == "subscribed":
            self._stream = message.get("stream")
            if self._seq == -1:
                self._seq = seq
        elif seq is not None and (kind != "snapshot" or message.get("last")):
            self._seq = seq


def other_version(speaks: object) -> str:
    """Return which other version a daemon says it is, empty where it is this one; the first said nothing."""
    if speaks == [__version__, PROTOCOL]:
        return ""
    return f"version {speaks[0]}" if isinstance(speaks, list) and speaks else "an older version"


class RemoteClient:
    """A connection to a daemon on another host, which blocks; for commands. It can do what Client can."""

    def __init__(self, remote: RemoteDaemon, timing: Timing, tell: Callable[[str], None]) -> None:
        self._remote = remote
        self._timing = timing
        self._tell = tell  # gets what a person should know while it goes on
        self._knows_version = False
        self._patient = False
        self._socket = _dial(remote)

    def ask(self, action: str, **fields: Any) -> JsonObject:
        """Return the daemon's answer to one request. Raises RemoteError, or NotRunningError where it ends."""
        return next(self.follow(action, **fields))

    def follow(self, action: str, **fields: Any) -> Iterator[JsonObject]:
        """Yield the messages that answer a request. Raises as `ask` does.

        After `wait_forever` a subscription outlasts the connection: it goes on in the next one where it broke off.
        """
        place = _Place({name: value for name, value in fields.items() if value is not None})
        while True:
            try:
                for message in self._messages({"action": action, "speaks": [__version__, PROTOCOL], **place.request()}):
                    place.note(message)
                    if message.get("type") != "subscribed" or not place.is_resumed:
                        yield message
            except NotRunningError as error:
                if not self._patient or action != "subscribe":
                    raise
                self._tell(f"{error}; trying again")
            self._redial()

    def wait_forever(self) -> None:
        """Wait for messages however long they take, and for the daemon where it is away."""
        self._patient = True
        self._socket.settimeout(self._timing.idle)  # a daemon that is there says so every 30 s

    def wait_for_end(self) -> None:
        """Wait until the daemon has closed the connection."""
        with contextlib.suppress(websocket.WebSocketException, OSError):
            while self._socket.recv():
                pass

    def hang_up(self) -> None:
        """End the connection under a thread that waits for messages; that one closes it."""
        self._patient = False
        with contextlib.suppress(OSError):
            self._socket.abort()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Close the connection."""
        self._socket.shutdown()  # type: ignore[no-untyped-call]

    def _messages(self, request: JsonObject) -> Iterator[JsonObject]:
        try:
            self._socket.send(format_line(request).decode())
            while True:
                message = parse_json(str(self._socket.recv()))
                if message is None:
                    raise NotRunningError("the daemon has ended the connection")
                self._check_version(message.pop("speaks", None))
                if message.get("type") == "error":
                    raise RemoteError(message)
                yield message
        except websocket.WebSocketTimeoutException:
            raise NotRunningError("the daemon does not answer") from None
        except (websocket.WebSocketException, OSError, ValueError):
            raise NotRunningError("the connection to the daemon broke") from None

    def _check_version(self, speaks: object) -> None:
        other = other_version(speaks)
        if other and not self._knows_version:
            self._tell(f"the daemon there is {other}, this is {__version__}")
        self._knows_version = True

    def _redial(self) -> None:
        self.close()
        pause_s = self._timing.remote_backoff_min
        while True:
            time.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, self._timing.remote_backoff_max)
            try:
                self._socket = _dial(self._remote)
            except NotRunningError:
                continue  # it was told that the connection broke
            except RemoteError as error:
                if error.http_status != RateError.http_status:
                    raise
                continue
            self.wait_forever()
            self._tell("connected again")
            return


def _dial(remote: RemoteDaemon) -> websocket.WebSocket:
    """Return a WebSocket to a remote daemon. Raises RemoteError where it refuses, else NotRunningError."""
    url = f"{remote.url}/v1/stream"
    try:
        connection: websocket.WebSocket = websocket.create_connection(
            url,
            timeout=CLIENT_TIMEOUT_S,
            header=[
                f"Sec-WebSocket-Protocol: {SUBPROTOCOL}",  # as `subprotocols`, what others speak would be no WebSocket
                *([f"Authorization: Bearer {remote.token}"] if remote.token else []),
            ],
            suppress_origin=True,
            redirect_limit=0,  # it would take the token along
            sslopt={"context": _client_context(remote)},
        )
    except websocket.WebSocketBadStatusException as error:
        told = parse_json((error.resp_body or b"").decode("utf-8", "replace"))
        if told is not None and told.get("type") == "error":
            if remote.token is None and told.get("code") == TokenError.code:
                told["hint"] = "give it with --token-file or FABRIK_TOKEN"
            raise RemoteError(told) from None
        raise NotRunningError(f"no daemon at {remote.url} (HTTP {error.status_code})", "check the URL") from None
    except ssl.SSLCertVerificationError as error:
        why = f"its certificate is not accepted: {error.verify_message}"
        raise RefusedError(f"{remote.url}: {why}", "name its authority with --ca-file") from None
    except (websocket.WebSocketException, OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise NotRunningError(f"no daemon answers at {remote.url}: {why}") from None
    status = connection.getstatus()  # type: ignore[no-untyped-call]
    if status == 101 and connection.headers.get("sec-websocket-protocol") == SUBPROTOCOL:
        return connection
    connection.shutdown()  # type: ignore[no-untyped-call]
    if status == 101:
        raise RefusedError(f"{remote.url} does not speak {SUBPROTOCOL}", "update the older of the two")
    raise NotRunningError(f"no daemon at {remote.url} (HTTP {status})", "check the URL")


def _client_context(remote: RemoteDaemon) -> ssl.SSLContext | None:
    """Return the TLS settings for a remote daemon, None for ws://. Raises ConfigError."""
    if remote.url.startswith("ws:"):
        return None
    try:
        context = ssl.create_default_context(cafile=remote.ca_file)
    except (ssl.SSLError, OSError) as error:
        why = getattr(error, "reason", None) or error.strerror or "not PEM"
        raise ConfigError(f"{remote.ca_file}: {why}", "give a PEM file of certificates with --ca-file") from None
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # as tls_context has it, and for the same reason
    return context


# ----------------------------------------------------------------------------------------------------------------------
# Client
# ----------------------------------------------------------------------------------------------------------------------


class Client:
    """A connection to the daemon, which blocks; for commands."""

    def __init__(self, sock: socket.socket, cache: str | None, tell: Callable[[str], None] = lambda line: None) -> None:
        self._socket = sock
        self._file = sock.makefile("rb")
        self._cache = None if cache is None else os.path.abspath(cache)
        self._tell: Callable[[str], None] | None = tell  # until the first answer

    def ask(self, action: str, **fields: Any) -> JsonObject:
        """Return the daemon's answer to one request. Raises RemoteError, or NotRunningError where it ends."""
        return next(self.follow(action, **fields))

    def follow(self, action: str, **fields: Any) -> Iterator[JsonObject]:
        """Yield the messages that answer a request. Raises as `ask` does."""
        said = {name: value for name, value in fields.items() if value is not None}
        said.update({} if self._cache is None else {"cache": self._cache})
        try:
            self._socket.sendall(format_line({"action": action, "speaks": [__version__, PROTOCOL], **said}))
            for line in self._file:
                message = json.loads(line)
                self._check_version(message.pop("speaks", None))
                if message.get("type") == "error":
                    raise RemoteError(message)
                yield message
        except socket.timeout:
            raise NotRunningError("the daemon does not answer", "see its logs, or 'fabrik-daemon restart'") from None
        except (OSError, ValueError):
            pass
        raise NotRunningError("the daemon has ended")

    def _check_version(self, speaks: object) -> None:
        """Say once that the daemon is another version than this one; what both know goes on."""
        tell, self._tell = self._tell, None
        other = other_version(speaks)
        if tell is not None and other:
            tell(f"the daemon is {other}, this is {__version__}: 'fabrik-daemon restart' makes them one")

    def wait_forever(self) -> None:
        """Wait for messages however long they take."""
        self._socket.settimeout(None)

    def hang_up(self) -> None:
        """End the connection under a thread that waits for messages; that one closes it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def wait_for_end(self) -> None:
        """Wait until the daemon has closed the connection."""
        with contextlib.suppress(OSError):
            self._file.read()

    def close(self) -> None:
        """Close the connection."""
        self._file.close()
        self._socket.close()


def connect(
    settings: Settings, tell: Callable[[str], None] = lambda line: None, *, own: bool = False
) -> Client | RemoteClient | None:
    """Return a connection to the daemon, None where none answers; one of another user is never asked.

    A remote daemon answers, or it raises NotRunningError or RemoteError; `tell` gets what a person should know of a
    connection that breaks and goes on. Where none of ours answers and it need not be our `own`, the host's system
    service does, which has a cache of its own.
    """
    if settings.remote is not None:
        return RemoteClient(settings.remote, settings.timing, tell)
    paths = socket_candidates(settings)
    if not own and settings.socket is None and not settings.is_cache_named:
        paths.append(SYSTEM_SOCKET)
    for path in paths:
        is_system = path == SYSTEM_SOCKET
        try:
            found = os.lstat(path)
            users = {0, os.stat(os.path.dirname(path)).st_uid} if is_system else {0, os.geteuid()}
        except OSError:
            continue
        if not stat.S_ISSOCK(found.st_mode) or found.st_uid not in users:
            continue
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(CLIENT_TIMEOUT_S)
        try:
            sock.connect(path)
            trusted = peer_uid(sock) in users
        except OSError:
            trusted = False
        if trusted:
            return Client(sock, None if is_system and not settings.is_cache_named else settings.cache, tell)
        sock.close()
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Direct
# ----------------------------------------------------------------------------------------------------------------------


Resolve = Callable[[Callable[[Union[Connection, FabrikError]], None]], None]  # calls back with what it found


class Site:
    """One cluster as a command asks it, without watches; credentials are resolved when they are first needed."""

    def __init__(self, spec: ClusterSpec, reactor: Reactor, resolve: Resolve, timing: Timing) -> None:
        self.spec = spec
        self.reactor = reactor
        self.timing = timing
        self.connection: Connection | None = None
        self._resolve_anew = resolve
        self._route: Route | None = None
        self._waiting: list[Callable[[FabrikError | None], None]] = []

    def prepare(self, done: Callable[[FabrikError | None], None]) -> None:
        """Find out how the cluster is reached; `done` gets what is wrong with that, in the loop."""
        if self._route is not None:
            self.reactor.call_soon(lambda: done(None))
            return
        self._waiting.append(done)
        if len(self._waiting) == 1:
            self._resolve_anew(self._on_resolved)

    def forget(self) -> None:
        """Have the credentials resolved anew for what is asked next: they were refused."""
        self._route = None

    def connect(self, handler: StreamHandler) -> tuple[Stream, HttpClientCodec, str]:
        """Return a new connection, and the path that leads every target; only after `prepare`."""
        stream, endpoint = self.dial(handler)
        return stream, HttpClientCodec(endpoint.authority), endpoint.base

    def dial(self, handler: StreamHandler) -> tuple[Stream, Endpoint]:
        """Return a new connection, and where it leads; only after `prepare`."""
        if self._route is None:
            raise UnreachableError(f"{self.spec.name}: its credentials are not resolved")
        stream = Stream(self.reactor, handler)
        stream.connect(self._route, self.timing)
        return stream, self._route.endpoint

    def headers(self) -> dict[str, str]:
        """Return what a request says of us, with the credentials of this moment."""
        headers = {"User-Agent": f"fabrik-daemon/{__version__}", "Accept": "application/json, */*"}
        if self.connection is not None and self.connection.token:
            headers["Authorization"] = f"Bearer {self.connection.token}"
        return headers

    def _on_resolved(self, result: Connection | FabrikError) -> None:
        error = result if isinstance(result, FabrikError) else None
        if isinstance(result, Connection):
            try:
                self.connection, self._route = result, route_of(result)
            except ConfigError as problem:
                error = ConfigError(f"{self.spec.kubeconfig}: {problem.message}", problem.hint)
        waiting, self._waiting = self._waiting, []
        for done in waiting:
            done(error)


class Direct:
    """What a command asks clusters at once, in a loop of its own. To be closed."""

    def __init__(self, settings: Settings, errors: TextIO) -> None:
        self.reactor = Reactor(make_log("error", errors, LogRing()))
        self.timing = settings.timing
        self._credentials = Credentials(self.reactor, settings.timing)
        self._sites: dict[str, Site] = {}

    def site(self, spec: ClusterSpec) -> Site:
        """Return a cluster, the same for the same name."""
        if spec.name not in self._sites:

            def resolve(done: Callable[[Connection | FabrikError], None]) -> None:
                self._credentials.resolve(spec, done)

            self._sites[spec.name] = Site(spec, self.reactor, resolve, self.timing)
        return self._sites[spec.name]

    @staticmethod
    def get(site: Site, target: str, done: Callable[[Got], None], max_bytes: int = ITEM_MAX_BYTES) -> Call:
        """Ask for a path; `done` gets what came, in the loop."""
        return fetch(site, target, done, max_bytes)

    @staticmethod
    def post(site: Site, target: str, document: JsonObject, done: Callable[[Got], None]) -> Call:
        """Post a document, which only a user's explicit flag may ask for; `done` gets what came."""
        collector = Collector(done, ITEM_MAX_BYTES)
        call = Call(site, target, collector, body=format_line(document))
        collector.cancel = call.cancel
        return call

    def run(self, seconds: float = math.inf) -> None:
        """Let it all happen until `reactor.stop`, at most so long."""
        timer = None if seconds == math.inf else self.reactor.call_later(seconds, self.reactor.stop)
        self.reactor.run()
        if timer is not None:
            timer.cancel()

    def close(self) -> None:
        """Give everything back."""
        self._credentials.close()
        self.reactor.close()


# ----------------------------------------------------------------------------------------------------------------------
# Direct: storage
# ----------------------------------------------------------------------------------------------------------------------


class PrometheusError(FabrikError):
    """Prometheus does not answer a query."""

    exit_code, http_status, code = 5, 502, "prometheus"


def query_prometheus(service: LaosService, expression: str, seconds: float) -> list[JsonObject]:
    """Return the samples of an instant query (prometheus.io, "HTTP API"); it blocks. Raises PrometheusError."""
    base = service.url.rstrip("/")
    url = f"{base}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    try:
        request = urllib.request.Request(url, headers=dict(authorization_of(service)))
        context = ssl.create_default_context(cafile=service.ca_file) if base.startswith("https:") else None
        handlers = [
            urllib.request.ProxyHandler({}),
            *([urllib.request.HTTPSHandler(context=context)] if context else []),
        ]
        with urllib.request.build_opener(*handlers).open(request, timeout=seconds) as answer:
            document = parse_json(answer.read(LAOS_LIST_MAX_BYTES).decode("utf-8", "replace")) or {}
    except (OSError, http.client.HTTPException) as error:
        raise PrometheusError(f"Prometheus at {base}: {getattr(error, 'reason', None) or error}") from None
    if document.get("status") != "success":
        raise PrometheusError(f"Prometheus at {base}: {text_at(document, 'error') or 'no answer to a query'}")
    return list_at(document, "data", "result")


def volume_usage(service: LaosService, volumes: Iterable[JsonObject], seconds: float) -> dict[tuple[str, str], int]:
    """Return the used bytes of volumes by namespace and name, of those that kubelets tell of."""
    names = {str(row[key]) for row in volumes for key in ("namespace", "name")}
    plain = sorted(re.escape(name) for name in names if re.fullmatch(r"[a-z0-9.-]+", name, re.ASCII))
    wanted = "|".join(plain).replace("\\", "\\\\")
    labels = f'namespace=~"{wanted}",persistentvolumeclaim=~"{wanted}"'
    expression = f"max by (namespace, persistentvolumeclaim) (kubelet_volume_stats_used_bytes{{{labels}}})"
    found: dict[tuple[str, str], int] = {}
    for result in query_prometheus(service, expression, seconds) if plain else []:
        metric, value = object_at(result, "metric"), result.get("value")
        with contextlib.suppress(ValueError, TypeError, IndexError, OverflowError):
            used = int(float(value[1]))  # type: ignore[index]
            found[text_at(metric, "namespace") or "", text_at(metric, "persistentvolumeclaim") or ""] = used
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Direct: logs
# ----------------------------------------------------------------------------------------------------------------------


class LogSink(Protocol):
    """What takes the logs of runs in."""

    def show(self, run: Run, line: ShowLine) -> None:
        """Show a line."""

    def say(self, run: Run, text: str) -> None:
        """Tell the user something beside the log."""

    def over(self, run: Run, end: LogOver) -> None:
        """Take in that there is no more of this run."""


class LogPrinter(Protocol):
    """What shows the lines of logs."""

    def show(self, run: Run, line: ShowLine) -> None:
        """Show a line."""

    def say(self, run: Run, text: str) -> None:
        """Tell the user something beside the log."""


class LogTail:
    """Reads one run's log, as its machine has it."""

    def __init__(self, direct: Direct, site: Site, run: Run, wish: LogWish, sink: LogSink) -> None:
        self._direct = direct
        self._site = site
        self._run = run
        self._sink = sink
        self._machine = LogMachine(wish, site.timing, random.random)
        self._decoder = LogDecoder()
        self._head: ResponseHead | None = None
        self._refusal = b""
        self._call: Call | None = None
        self._timer: Timer | None = None
        self._found: dict[str, Got] = {}  # Pods and Job, while both are asked for
        self._over = False

    def start(self) -> None:
        """Begin."""
        self._do(self._machine.due())

    def on_head(self, head: ResponseHead) -> None:
        """Take in status and headers of the log's response."""
        self._head = head

    def on_body(self, data: bytes) -> None:
        """Take in some of the log."""
        self._arm(self._site.timing.idle)
        if self._head is None or self._head.status != 200:
            self._refusal = (self._refusal + data)[:REFUSAL_MAX_BYTES]
            return
        call = self._call
        for line in self._decoder.receive(data):
            self._do(self._machine.on_line(line))
            if self._call is not call:
                return

    def on_end(self, error: str) -> None:
        """Take in that the log's response is over."""
        head, self._call = self._head, None
        status = head.status if head is not None and not error else 0
        if not error and head is not None and status != 200:
            error = refusal_from_response(head, self._refusal).message
        elif not error:
            for line in self._decoder.end():
                self._do(self._machine.on_line(line))
        self._do(self._machine.on_log_end(status, error))

    def _do(self, actions: Iterable[LogAction]) -> None:
        for action in actions:
            if self._over:
                return
            if isinstance(action, ShowLine):
                self._sink.show(self._run, action)
            elif isinstance(action, Say):
                self._sink.say(self._run, action.text)
            elif isinstance(action, OpenLog):
                self._open(action)
            elif isinstance(action, CloseLog):
                self._close()
            elif isinstance(action, FindPods):
                self._find_pods()
            elif isinstance(action, Pause):
                self._arm(action.seconds)
            else:
                self._over = True
                self._close()
                self._arm(None)
                self._sink.over(self._run, action)

    def _open(self, wanted: OpenLog) -> None:
        self._decoder, self._head, self._refusal = LogDecoder(), None, b""
        target = f"{PODS.path(self._run.namespace)}/{urllib.parse.quote(wanted.pod, safe='')}/log?{wanted.query}"
        self._arm(self._site.timing.idle)
        self._call = Call(self._site, target, self, endless=wanted.follow)

    def _close(self) -> None:
        if self._call is not None:
            self._call.cancel()
            self._call = None

    def _arm(self, seconds: float | None) -> None:
        """Look around after so many seconds: a silent log may be that of a Pod that is gone."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self._site.reactor.call_later(seconds, self._on_time)

    def _on_time(self) -> None:
        self._arm(self._site.timing.idle)
        self._do(self._machine.due())

    def _find_pods(self) -> None:
        run = self._run
        self._found.clear()
        selector = f"job-name={run.job_name}" if run.job_name else f"{FABRIK_PREFIX}run-id={run.id}"
        targets = {PODS: f"labelSelector={urllib.parse.quote(selector)}"}
        if run.job_name:
            targets[JOBS] = f"fieldSelector={urllib.parse.quote(f'metadata.name={run.job_name}')}"
        for resource_, query in targets.items():

            def done(got: Got, name: str = resource_.name) -> None:
                self._found[name] = got
                if len(self._found) == len(targets):
                    self._on_found(self._found[PODS.name], self._found.get(JOBS.name))

            self._direct.get(self._site, f"{resource_.path(run.namespace)}?{query}", done)

    def _on_found(self, pods: Got, jobs: Got | None) -> None:
        if not pods.is_ok:
            self._do(self._machine.on_trouble(pods.status, pods.complaint))
            return
        over: bool | None = None
        if jobs is not None and jobs.is_ok:
            facts = [facts_from(JOBS.name, item) for item in list_at(jobs.document(), "items")]
            over = not any(isinstance(job, JobFacts) and job.outcome is None for job in facts)
        views = [pod_view(item) for item in list_at(pods.document(), "items")]
        self._do(self._machine.on_pods(views, over=over))


class LokiTail:
    """Reads what Loki has of a run's Pods, page by page (Loki's HTTP API, query_range)."""

    def __init__(self, site: Site, run: Run, wish: LogWish, show: Callable[[ShowLine], None]) -> None:
        self._site = site
        self._wish = wish
        self._show = show
        now = time.time()
        since = now - wish.since_s if wish.since_s is not None else (epoch_of(run.created_at) or now - LOKI_RANGE_S)
        self._start_ns, self._end_ns = int(since * 1e9), int(now * 1e9)
        self._query = loki_query(run, wish.container)
        self._last: list[tuple[int, ShowLine]] = []  # those of the last page's last moment
        self._count = 0
        self._done: Callable[[int, str], None] = lambda count, error: None

    def start(self, done: Callable[[int, str], None]) -> None:
        """Begin; `done` gets how many lines there were, and what is wrong, if anything."""
        self._done = done
        self._ask()

    def _ask(self) -> None:
        tail = self._wish.tail
        parameters = {
            "query": self._query,
            "start": self._start_ns,
            "end": self._end_ns,
            "limit": LOKI_PAGE_LINES if tail is None else min(tail, LOKI_PAGE_LINES),
            "direction": "forward" if tail is None else "backward",
        }
        target = "/loki/api/v1/query_range?" + urllib.parse.urlencode(parameters)
        Direct.get(self._site, target, self._on_page)

    def _on_page(self, got: Got) -> None:
        if not got.is_ok:
            self._done(self._count, got.complaint or "no answer")
            return
        lines = parse_loki(got.document(), backward=self._wish.tail is not None)
        fresh = [line for line in lines if line not in self._last]
        for _, line in fresh:
            self._show(line)
        self._count += len(fresh)
        if self._wish.tail is not None or len(lines) < LOKI_PAGE_LINES:
            self._done(self._count, "")
            return
        last_ns = lines[-1][0]
        self._start_ns = last_ns if fresh and last_ns > self._start_ns else last_ns + 1
        self._last = [line for line in lines if line[0] == last_ns]
        self._ask()


def loki_query(run: Run, container: str | None) -> str:
    """Return the LogQL selector of a run's Pods, by the labels that Promtail and Alloy give them."""
    pods = re.escape(run.job_name) + "-.+" if run.job_name else re.escape(run.pod_name or "")
    labels = [f"namespace={json.dumps(run.namespace)}", f"pod=~{json.dumps(pods)}"]
    return "{" + ", ".join([*labels, *([f"container={json.dumps(container)}"] if container else [])]) + "}"


def parse_loki(document: JsonObject, *, backward: bool) -> list[tuple[int, ShowLine]]:
    """Return the lines of all streams of a query_range answer, each with its time in ns, in the order of time."""
    found = []
    for stream in list_at(document, "data", "result"):
        pod, container = text_at(stream, "stream", "pod") or "", text_at(stream, "stream", "container") or ""
        values = stream.get("values")
        entries = values if isinstance(values, list) else []
        for entry in reversed(entries) if backward else entries:
            if isinstance(entry, list) and len(entry) > 1 and isinstance(entry[1], str):
                at_ns = parse_int(entry[0]) or 0
                text = entry[1].rstrip("\r\n")
                found.append((at_ns, ShowLine(pod, container, LogLine(_time_of_ns(at_ns), text))))
    return sorted(found, key=lambda entry: entry[0])


def _time_of_ns(at_ns: int) -> str:
    try:
        return f"{format_time(at_ns // 10**9)[:-1]}.{at_ns % 10**9:09d}Z"
    except (ValueError, OverflowError, OSError):
        return ""


class ServiceSite(Site):
    """A service of LAOS as a site; what its files hold is read when it is asked."""

    def __init__(self, direct: Direct, name: str, service: LaosService) -> None:
        super().__init__(ClusterSpec(name, name), direct.reactor, self._resolve, direct.timing)
        self.url = service.url
        self._service = service
        self._headers: dict[str, str] = {}

    def headers(self) -> dict[str, str]:
        """Return what a request says of us, with the service's own credentials."""
        return {**super().headers(), **self._headers}

    def _resolve(self, done: Callable[[Connection | FabrikError], None]) -> None:
        service = self._service
        try:
            ca_pem = read_secret(service.ca_file) if service.ca_file else None
            if service.username and service.password_file:
                pair = f"{service.username}:{read_secret(service.password_file)}".encode()
                self._headers["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
            elif service.bearer_token_file:
                self._headers["Authorization"] = f"Bearer {read_secret(service.bearer_token_file)}"
            if service.tenant:
                self._headers["X-Scope-OrgID"] = service.tenant
            result: Connection | FabrikError = Connection(service.url, ca_pem=ca_pem)
        except ConfigError as error:
            result = error
        self.reactor.call_soon(lambda: done(result))


def read_secret(path: str) -> str:
    """Return what a file of the user's holds, without the newline at its end. Raises ConfigError."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8'}", "correct its path") from None


class LogSources(NamedTuple):
    """Where a run's log may be: None for what is not there."""

    run: Run
    site: Site | None
    loki: ServiceSite | None


class LogOutcome(NamedTuple):
    """What came of a run's log; `error` is empty where there was one to show."""

    run: Run
    error: str = ""
    is_unreachable: bool = False


class LogSession:
    """Reads the logs of several runs at once: from their clusters, else from Loki, else what the cache has kept."""

    def __init__(
        self, direct: Direct, wish: LogWish, printer: LogPrinter, kept: Callable[[Run], list[ShowLine]]
    ) -> None:
        self._direct = direct
        self._wish = wish
        self._printer = printer
        self._kept = kept
        self._sources: dict[str, LogSources] = {}
        self._shown: set[str] = set()  # run_ids
        self._waiting: deque[LogSources] = deque()
        self._active = 0
        self.outcomes: list[LogOutcome] = []

    def read(self, sources: Iterable[LogSources]) -> list[LogOutcome]:
        """Show everything; return what came of each run."""
        self._waiting.extend(sources)
        self._sources = {one.run.run_id: one for one in self._waiting}
        while self._waiting and self._active < LOGS_AT_ONCE:
            self._next()
        self._direct.run()
        return self.outcomes

    def show(self, run: Run, line: ShowLine) -> None:
        """Show a line."""
        self._shown.add(run.run_id)
        self._printer.show(run, line)

    def say(self, run: Run, text: str) -> None:
        """Tell the user something beside the log."""
        self._printer.say(run, text)

    def over(self, run: Run, end: LogOver) -> None:
        """Take in that a cluster has no more of a run; turn to other sources where it had nothing."""
        if run.run_id in self._shown or self._wish.previous or not (end.is_gone or end.error):
            self._end(LogOutcome(run, end.error, end.is_unreachable))
            return
        told = "its Pod is gone" if end.is_gone else end.error
        loki = self._sources[run.run_id].loki
        if loki is None:
            self._show_kept(run, told, end)
            return

        def done(count: int, error: str) -> None:
            if count and not error:
                self.say(run, f"{told}; these {count} lines are from Loki, {loki.url}")
                self._end(LogOutcome(run))
            elif count:
                self._end(LogOutcome(run, f"Loki: {error}"))
            else:
                self._show_kept(run, f"{told}; Loki, {loki.url}: {error or 'it has no line of it'}", end)

        LokiTail(loki, run, self._wish, lambda line: self.show(run, line)).start(done)

    def _show_kept(self, run: Run, told: str, end: LogOver) -> None:
        lines = [line for line in self._kept(run) if self._wish.container in (None, line.container)]
        for line in lines[-self._wish.tail :] if self._wish.tail else lines:
            self.show(run, line)
        if lines:
            self.say(run, f"{told}; these are the last lines, kept when it failed")
        kept = "" if lines else f"{told}; no lines of it were kept"
        self._end(LogOutcome(run, kept, end.is_unreachable and not lines))

    def _next(self) -> None:
        sources = self._waiting.popleft()
        self._active += 1
        if sources.site is None:
            self.over(sources.run, LogOver(f"cluster {sources.run.cluster} is not configured", is_unreachable=True))
        else:
            LogTail(self._direct, sources.site, sources.run, self._wish, self).start()

    def _end(self, outcome: LogOutcome) -> None:
        self.outcomes.append(outcome)
        self._active -= 1
        if self._waiting:
            self._direct.reactor.call_soon(self._next)
        elif not self._active:
            self._direct.reactor.call_soon(self._direct.reactor.stop)


# ----------------------------------------------------------------------------------------------------------------------
# Direct: reports
# ----------------------------------------------------------------------------------------------------------------------

_EXEC_PROTOCOLS: Final = ("v5.channel.k8s.io", "v4.channel.k8s.io")
_STDOUT: Final = 1  # channels: the first byte of every message (k8s.io/apimachinery, remotecommand)
_STATUS: Final = 3


class ExecCall(ClientHandler):
    """Runs a command in a container over WebSocket, and returns what it prints. Only a user's explicit flag may ask."""

    def __init__(self, site: Site, target: str, done: Callable[[bytes, str], None]) -> None:
        self._site = site
        self._target = target
        self._done = done  # gets the output, and what is wrong, if anything
        self._stream: Stream | None = None
        self._socket = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
        self._message = self._output = self._refusal = b""
        self._status = 0
        self._over = False
        self._timer = site.reactor.call_later(site.timing.answer, lambda: self._end("no answer in time"))
        site.prepare(self._on_prepared)

    def on_data(self, data: bytes) -> None:
        """Take in bytes; empty: the server ended the connection."""
        try:
            self._socket.receive_data(data or None)
            for event in self._socket.events():
                self._take(event)
        except wsproto.utilities.ProtocolError as error:
            self._end(str(error) or "no WebSocket")

    def on_error(self, error: str) -> None:
        """Take in that the connection is lost."""
        self._end(error)

    def _on_prepared(self, error: FabrikError | None) -> None:
        if error is not None:
            self._end(str(error))
            return
        self._stream, endpoint = self._site.dial(self)
        headers = [(name.encode(), value.encode("latin-1")) for name, value in self._site.headers().items()]
        request = wsproto.events.Request(
            host=endpoint.authority,
            target=endpoint.base + self._target,
            extra_headers=headers,
            subprotocols=list(_EXEC_PROTOCOLS),
        )
        self._stream.send(self._socket.send(request))

    def _take(self, event: wsproto.events.Event) -> None:
        if isinstance(event, wsproto.events.RejectConnection):
            self._status = event.status_code
            if not event.has_body:
                self._end(f"HTTP {event.status_code}")
        elif isinstance(event, wsproto.events.RejectData):
            self._refusal += event.data
            if event.body_finished:
                head = ResponseHead(self._status, {})
                self._end(refusal_from_response(head, self._refusal[:REFUSAL_MAX_BYTES]).message)
        elif isinstance(event, wsproto.events.BytesMessage):
            self._message = (self._message + event.data)[: 2 * JSON_MAX_CHARS]
            if event.message_finished:
                message, self._message = self._message, b""
                self._on_channel(message)
        elif isinstance(event, wsproto.events.CloseConnection):
            self._end("" if self._output else "it printed nothing")

    def _on_channel(self, data: bytes) -> None:
        if data[:1] == bytes([_STDOUT]):
            self._output = (self._output + data[1:])[:JSON_MAX_CHARS]
        elif data[:1] == bytes([_STATUS]):
            status = parse_json(data[1:].decode("utf-8", "replace")) or {}
            failed = status.get("status") != "Success"
            self._end(text_at(status, "message") or "it failed" if failed else "")

    def _end(self, error: str) -> None:
        if not self._over:
            self._over = True
            self._timer.cancel()
            if self._stream is not None:
                self._stream.close()
            self._done(self._output, error)


class ReportAsked(NamedTuple):
    """What a run's own processes report now; `troubles` says what could not be asked."""

    report: Report
    troubles: tuple[str, ...]


def ask_report(site: Site, run: Run, sources: Sequence[str], done: Callable[[ReportAsked], None]) -> None:
    """Ask the sidecar and the workspace of a run's Pod, where `statusSources` has them; `done` gets what they say."""
    said: dict[str, Report] = {}
    troubles: list[str] = []
    asked = [source for source in ("sidecar", "exec") if source in sources]

    def finish(source: str, document: JsonObject, error: str) -> None:
        if error or not document:
            troubles.append(f"{source}: {error or 'no JSON'}")
        said[source] = report_from_status(document, time.time()) if document else NO_REPORT
        if len(said) == len(asked):
            done(ReportAsked(merge_reports([said[name] for name in asked]), tuple(troubles)))

    def on_pod(got: Got) -> None:
        items = [item for item in list_at(got.document(), "items") if pod_view(item).name == run.pod_name]
        facts = facts_from(PODS.name, items[0]) if items else None
        if not isinstance(facts, PodFacts):
            for source in asked:
                finish(source, {}, got.complaint or "its Pod is gone")
            return
        if "sidecar" in asked:
            _ask_sidecar(site, facts, finish)
        if "exec" in asked:
            _exec_status(site, pod_view(items[0]), facts, finish)

    if not asked or not run.pod_name:
        done(ReportAsked(NO_REPORT, ()))
        return
    fetch(
        site, f"{PODS.path(run.namespace)}?fieldSelector={urllib.parse.quote(f'metadata.name={run.pod_name}')}", on_pod
    )


_Finish = Callable[[str, JsonObject, str], None]


def _ask_sidecar(site: Site, pod: PodFacts, finish: _Finish) -> None:
    if pod.sidecar_port is None:
        finish("sidecar", {}, f"its Pod has no container {SIDECAR} with a port")
        return
    fetch(site, sidecar_path(pod), lambda got: finish("sidecar", got.document(), _right(got, "get pods/proxy")))


def _right(got: Got, right: str) -> str:
    return f"{got.complaint} (grant {right})" if got.status == 403 else got.complaint


def _exec_status(site: Site, view: PodView, pod: PodFacts, finish: _Finish) -> None:
    def on_output(output: bytes, error: str) -> None:
        told = f"{error} (grant get and create on pods/exec)" if "forbidden" in error else error
        finish("exec", parse_json_object(output.decode("utf-8", "replace")) or {}, told)

    words = [("command", "cat"), ("command", STATUS_FILE), ("stdout", "true"), ("container", view.chosen)]
    path = f"{PODS.path(pod.namespace)}/{urllib.parse.quote(pod.name, safe='')}/exec"
    ExecCall(site, f"{path}?{urllib.parse.urlencode(words)}", on_output)


def fill_run(run: Run, report: Report) -> Run:
    """Return a run's row with what annotations do not say taken from a report; a run that is over stays as it is."""
    if run.status in TERMINAL:
        return run
    said: JsonObject = {
        "phase": report.phase,
        "current_task": report.task,
        "task_attempt": report.attempt,
        "iteration": report.iteration,
        "heartbeat_at": report.heartbeat_at,
    }
    if run.progress_finished is None:
        run = run._replace(progress_finished=report.finished, progress_total=report.total)
    run = run._replace(**{name: value for name, value in said.items() if getattr(run, name) is None})
    return run._replace(status=BLOCKED) if run.status == RUNNING and is_gated(report) else run


# ----------------------------------------------------------------------------------------------------------------------
# Direct: fresh
# ----------------------------------------------------------------------------------------------------------------------


class Fresh(NamedTuple):
    """What API servers say at this moment, and who said nothing in time."""

    store: Store
    parts: list[Freshness]  # of those that answered
    failed: list[Freshness]

    def rows(self, kind: type[TableRow]) -> list[TableRow]:
        """Return the rows of a table of those that answered."""
        answered = {part.cluster for part in self.parts}
        return [row for row in self.store.tables.rows(kind) if row.cluster in answered]


class _Listener:
    """Takes what clusters list into a store of its own; nothing of it is kept."""

    def __init__(self, reactor: Reactor, store: Store) -> None:
        self._reactor = reactor
        self._store = store
        self.clusters: list[Cluster] = []

    def on_events(self, scope: Scope, events: Sequence[WatchEvent], synced_at: str | None) -> None:
        """Do nothing: the list is all that is asked for."""

    def on_list(self, scope: Scope, resource_version: str, items: list[Facts]) -> None:
        """Take in a whole list."""
        now = time.time()
        self._store.replace(progress_of(scope, resource_version, now), items, now)

    def on_watch_open(self, scope: Scope) -> None:
        """Do nothing: this one only lists."""

    def on_bookmark(self, scope: Scope, resource_version: str) -> None:
        """Do nothing."""

    def on_watch_state(self, scope: Scope, told: Told) -> None:
        """Take in that a scope may not be read."""
        if told.state == FORBIDDEN:
            self._store.forbid(scope, time.time())

    def on_new_epoch(self, name: str) -> None:
        """Do nothing."""

    def on_identity(self, name: str) -> bool:
        """Go on."""
        return True

    def on_cluster_state(self, name: str) -> None:
        """End when every cluster has answered or failed."""
        if all(cluster.is_settled for cluster in self.clusters):
            self._reactor.call_soon(self._reactor.stop)


def ask_clusters(specs: Sequence[ClusterSpec], settings: Settings, snapshot: Snapshot, errors: TextIO) -> Fresh:
    """List clusters as the daemon does, all at once, within `timing.fresh`.

    `snapshot` is what the cache holds: a run keeps its key, and one whose Job is gone stays known.
    """
    reactor, store = Reactor(make_log("error", errors, LogRing())), Store(zone_of)
    logging.getLogger("fabrik-daemon").setLevel(logging.CRITICAL)  # what went wrong is told at the end
    store.load(snapshot)
    store.set_priorities({spec.name: spec.priority for spec in specs})
    credentials = Credentials(reactor, settings.timing)
    listener = _Listener(reactor, store)
    listener.clusters = [Cluster(spec, reactor, credentials, listener, settings.timing) for spec in specs]
    for cluster in listener.clusters:
        cluster.start({}, None, once=True)
    reactor.call_later(settings.timing.fresh, reactor.stop)
    reactor.run()
    now = format_time(time.time(), milliseconds=True)
    parts, failed = [], []
    for cluster in listener.clusters:
        trouble = cluster.trouble or "no answer in time"
        if _has_answered(cluster):
            skew_s = cluster.skew_s or 0.0
            parts.append(Freshness(cluster.spec.name, connected=True, synced_at=now, skew_s=skew_s))
        else:
            failed.append(Freshness(cluster.spec.name, connected=False, synced_at=None, error=trouble))
        cluster.stop()
    credentials.close()
    reactor.close()
    return Fresh(store, parts, failed)


def _has_answered(cluster: Cluster) -> bool:
    """Say whether all was listed that may be: a right that is missing for some resources is no failure."""
    listed = [watcher for watcher in cluster.watchers if watcher.was_listed]
    forbidden = [watcher for watcher in cluster.watchers if watcher.told.state == FORBIDDEN]
    return bool(listed) and len(listed) + len(forbidden) == len(cluster.watchers)


def cached_snapshot(cache: str) -> Snapshot:
    """Return what the cache holds, nothing where there is none or it cannot be read."""
    try:
        with contextlib.closing(CacheReader(cache)) as reader:
            rows: list[TableRow] = []
            for table, kind in TABLES.items():
                rows += (kind(**row) for row in reader.rows(f"SELECT {', '.join(kind._fields)} FROM {table}"))  # noqa: S608
            objects = []
            for row in reader.rows("SELECT cluster, resource, namespace, name, facts FROM objects"):
                with contextlib.suppress(ValueError, KeyError):
                    facts = facts_from_json(row["resource"], row.pop("facts"))
                    objects.append((ObjectKey(**row), facts))
    except CacheError:
        return Snapshot()
    return Snapshot(objects, rows)


def fill_from_sources(settings: Settings, spec: ClusterSpec, run: Run, errors: TextIO) -> tuple[Run, tuple[str, ...]]:
    """Return a run with what its sidecar and its workspace say, as `statusSources` has it, and what went wrong."""
    direct = Direct(settings, errors)
    found: list[ReportAsked] = []

    def take(asked: ReportAsked) -> None:
        found.append(asked)
        direct.reactor.call_soon(direct.reactor.stop)

    try:
        ask_report(direct.site(spec), run, settings.status_sources, take)
        direct.run(settings.timing.fresh)
    finally:
        direct.close()
    if not found:
        return run, ("no answer in time",)
    return fill_run(run, found[0].report), found[0].troubles


# ----------------------------------------------------------------------------------------------------------------------
# Diagnosis
# ----------------------------------------------------------------------------------------------------------------------


class _Examiner:
    """Takes what clusters tell while they are tested, and keeps nothing of it."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self.clusters: list[Cluster] = []

    def on_events(self, scope: Scope, events: Sequence[WatchEvent], synced_at: str | None) -> None:
        """Do nothing: what there is does not matter here."""

    def on_list(self, scope: Scope, resource_version: str, items: list[Facts]) -> None:
        """Do nothing: that it can be listed is all."""

    def on_watch_open(self, scope: Scope) -> None:
        """Do nothing: this one only lists."""

    def on_bookmark(self, scope: Scope, resource_version: str) -> None:
        """Do nothing."""

    def on_watch_state(self, scope: Scope, told: Told) -> None:
        """Do nothing: it is read at the end."""

    def on_new_epoch(self, name: str) -> None:
        """Do nothing."""

    def on_identity(self, name: str) -> bool:
        """Go on."""
        return True

    def on_cluster_state(self, name: str) -> None:
        """End when every cluster has answered or failed."""
        if all(cluster.is_settled for cluster in self.clusters):
            self._reactor.call_soon(self._reactor.stop)


def examine_clusters(specs: Sequence[ClusterSpec], settings: Settings, errors: TextIO) -> list[JsonObject]:
    """Connect to clusters as the daemon does, list what it follows, and return what came of it, a row a cluster."""
    reactor = Reactor(make_log("error", errors, LogRing()))
    credentials = Credentials(reactor, settings.timing)
    examiner = _Examiner(reactor)
    examiner.clusters = [Cluster(spec, reactor, credentials, examiner, settings.timing) for spec in specs]
    for cluster in examiner.clusters:
        cluster.start({}, None, once=True)
    reactor.call_later(settings.timing.sync, reactor.stop)
    reactor.run()
    rows = [_examined(cluster) for cluster in examiner.clusters]
    for cluster in examiner.clusters:
        cluster.stop()
    credentials.close()
    reactor.close()
    return rows


def _examined(cluster: Cluster) -> JsonObject:
    watches = [
        {
            "resource": watcher.scope.resource,
            "namespace": watcher.scope.namespace,
            "ok": watcher.was_listed,
            "error": None if watcher.was_listed else watcher.told.error or "no answer in time",
        }
        for watcher in cluster.watchers
    ]
    return {
        "name": cluster.spec.name,
        "server": cluster.server,
        "uid": cluster.uid,
        "clock_skew_seconds": cluster.skew_s,
        "ok": all(watch["ok"] for watch in watches),
        "error": cluster.trouble,
        "watches": [] if cluster.error is not None else watches,
    }


# ----------------------------------------------------------------------------------------------------------------------
# Diagnosis: this host
# ----------------------------------------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """What a look at one thing found: `level` is ok, note (nothing to do) or problem, which `fix` says how to end."""

    check: str
    subject: str
    level: str
    message: str
    fix: str = ""


def problem_of(check: str, subject: str, error: FabrikError) -> Finding:
    """Return an error as a finding."""
    return Finding(check, subject, "problem", error.message, error.hint)


def examine_host(settings: Settings, home: str) -> list[Finding]:
    """Look at folders, cache, daemon and service on this host."""
    return [*_folders(settings), *_cache(settings), *_daemon(settings), *_service(home)]


def _folders(settings: Settings) -> Iterator[Finding]:
    """Look for what others could read or write: the cache holds what runs print."""
    cache_folder = os.path.dirname(os.path.abspath(settings.cache))
    config_folder = os.path.dirname(os.path.abspath(settings.config))
    for path, forbidden in (
        (cache_folder, 0o077),
        (settings.cache, 0o077),
        (config_folder, 0o022),
        (settings.config, 0o022),
        (settings.clusters_file, 0o022),
    ):
        found = examined_path(path, forbidden)
        if found is not None:
            yield found
    try:
        path = choose_socket(settings)
        check_socket_path(path)
        yield Finding("socket", path, "ok", "its folders are safe")
    except SocketError as error:
        yield problem_of("socket", settings.socket or DEFAULT_SOCKET, error)


def examined_path(path: str, forbidden: int) -> Finding | None:
    """Return whether a path is ours alone, None where it is not there; `forbidden` are bits of its mode."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        return Finding("folders", path, "problem", str(error.strerror), "run as its owner, or name another place")
    if found.st_uid not in (0, os.geteuid()):
        return Finding("folders", path, "problem", "it belongs to another user", f"chown {os.geteuid()} {path}")
    others = found.st_mode & forbidden
    if others:
        what = "write to" if others & 0o022 else "read"
        mode = "go-rwx" if forbidden == 0o077 else "go-w"
        return Finding("folders", path, "problem", f"others may {what} it", f"chmod {mode} {path}")
    if not os.access(path, os.W_OK):
        return Finding("folders", path, "problem", "it cannot be written", f"chmod u+w {path}, or name another place")
    return Finding("folders", path, "ok", "only its owner may write to it" if forbidden == 0o022 else "it is private")


def _cache(settings: Settings) -> Iterator[Finding]:
    path = settings.cache
    if not os.path.exists(path):
        yield Finding("cache", path, "note", "there is none yet", "run 'fabrik-daemon start' or 'fabrik-daemon sync'")
        return
    size, log_size = os.stat(path).st_size, os.stat(path + "-wal").st_size if os.path.exists(path + "-wal") else 0
    again = "'fabrik-daemon restart'" if is_kept_up(path) else "'fabrik-daemon start' or 'fabrik-daemon sync'"
    try:
        with contextlib.closing(CacheReader(path)) as reader:
            told = reader.rows("PRAGMA quick_check(1)")[0]["quick_check"]
            runs = reader.rows("SELECT count(*) AS runs FROM runs")[0]["runs"]
    except CacheError as error:
        newer = "use the same version" in error.hint
        fix = error.hint if newer else f"run {again}, which sets it aside and makes it anew from the clusters"
        yield Finding("cache", path, "problem", error.message, fix)
        return
    if told != "ok":
        fix = f"run {again}, which sets it aside and makes it anew from the clusters"
        yield Finding("cache", path, "problem", f"it is damaged: {' '.join(told.split())[:200]}", fix)
    else:
        yield Finding("cache", path, "ok", f"it is whole: {runs} runs, {format_bytes(size)}")
    if log_size > WAL_MAX_BYTES:
        fix = "end the program that keeps it open for reading: see 'fuser' or 'lsof'"
        yield Finding("cache", path + "-wal", "problem", f"it has grown to {format_bytes(log_size)}", fix)
    space = os.statvfs(os.path.dirname(os.path.abspath(path)))
    if space.f_bavail * space.f_frsize < DISK_FREE_BYTES:
        told = f"only {format_bytes(space.f_bavail * space.f_frsize)} are free"
        yield Finding("cache", path, "problem", told, "make room on its disk, or name another place with --cache")


def _daemon(settings: Settings) -> Iterator[Finding]:
    words = last_words(settings.cache)
    if words and not is_kept_up(settings.cache):
        told = f"the last daemon died: {safe_text(words.splitlines()[0])[:200]}"
        yield Finding(
            "daemon", crash_path(settings.cache), "problem", told, "run 'fabrik-daemon start', which shows all"
        )
    client = connect(settings)
    if client is None:
        yield from _no_daemon(settings)
        return
    try:
        said = client.ask("status")
    except (RemoteError, NotRunningError) as error:
        yield Finding("daemon", settings.cache, "problem", error.message, error.hint or "run 'fabrik-daemon restart'")
        return
    finally:
        client.close()
    if said.get("version") != __version__ or said.get("protocol") != PROTOCOL:
        told = f"version {said.get('version')} runs, this is {__version__}"
        yield Finding("daemon", settings.cache, "problem", told, "run 'fabrik-daemon restart'")
    if said.get("cache_error"):
        told = f"it cannot write its cache: {said['cache_error']}"
        yield Finding("daemon", settings.cache, "problem", told, "make room, or free the file, and it goes on")
    yield Finding("daemon", str(said.get("socket")), "ok", f"it runs, pid {said.get('pid')}")
    yield from _watches(said)


def _no_daemon(settings: Settings) -> Iterator[Finding]:
    if is_kept_up(settings.cache):
        pid = (read_words(lock_path(settings.cache)) or "unknown").strip()
        told = f"process {pid} holds it, and does not answer on the socket"
        yield Finding("daemon", lock_path(settings.cache), "problem", told, f"kill {pid}, then 'fabrik-daemon start'")
        return
    for path in socket_candidates(settings):
        if os.path.lexists(path) and os.lstat(path).st_uid == os.geteuid():
            fix = f"rm {path}, or run 'fabrik-daemon start', which puts its own there"
            yield Finding("socket", path, "problem", "nobody answers at it", fix)
    yield Finding("daemon", settings.cache, "note", "it does not run; the cache answers", "run 'fabrik-daemon start'")


def _watches(status: JsonObject) -> Iterator[Finding]:
    """Return what the daemon's watches met."""
    for cluster in list_at(status, "clusters"):
        for watch in list_at(cluster, "watches"):
            if watch.get("state") == FORBIDDEN:
                where = f"{watch.get('resource')} in {watch.get('namespace') or 'all namespaces'}"
                fix = f"grant list and watch on {where}, then 'fabrik-daemon restart'"
                yield Finding("watches", str(cluster.get("name")), "problem", f"{where}: {watch.get('error')}", fix)


def read_words(path: str) -> str:
    """Return the beginning of a small file, empty where there is none to read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(LAST_WORDS_CHARS)
    except OSError:
        return ""


def _service(home: str) -> Iterator[Finding]:
    for path in (
        f"{home}/.config/systemd/user/fabrik-daemon.service",
        "/etc/systemd/system/fabrik-daemon.service",
        f"{home}/Library/LaunchAgents/fabrik.daemon.plist",
    ):
        text = read_words(path)
        if not text:
            continue
        if path.endswith(".plist"):
            words = re.findall(
                r"<string>(/[^<]*)</string>", text.partition("ProgramArguments")[2].partition("</array>")[0]
            )
        else:
            line = re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)
            words = shlex.split(line[1]) if line else []
        missing = [word for word in words if word.startswith("/") and not os.path.exists(word)]
        if missing:
            told = f"it starts {missing[0]}, which is not there"
            yield Finding("service", path, "problem", told, "run 'fabrik-daemon install-service' again")
        elif _has_failed(path):
            which = "--user " if "/user/" in path else ""
            fix = f"see 'journalctl {which}-u fabrik-daemon', then 'systemctl {which}restart fabrik-daemon'"
            yield Finding("service", path, "problem", "systemd gave it up after it failed", fix)
        else:
            yield Finding("service", path, "ok", "what it starts is there")


def _has_failed(path: str) -> bool:
    """Say whether systemd has given a unit up; where there is no systemd that answers, nobody has."""
    which = ["--user"] if "/user/" in path else []
    try:
        done = subprocess.run(
            ["systemctl", *which, "is-failed", os.path.basename(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=CLIENT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return path.endswith(".service") and done.stdout.strip() == b"failed"


# ----------------------------------------------------------------------------------------------------------------------
# Diagnosis: clusters and LAOS
# ----------------------------------------------------------------------------------------------------------------------

_FIXES: Final = (  # of connections that fail, by words in the error
    ("certificate has expired", "renew the server's certificate (k3s does at its restart), or set this host's clock"),
    ("not yet valid", "set this host's clock"),
    ("certificate is not valid for", "set 'tls-server-name:' in {file} to a name in the server's certificate"),
    ("Hostname mismatch", "set 'tls-server-name:' in {file} to a name in the server's certificate"),
    ("certificate is not accepted", "take the cluster's CA anew: copy its kubeconfig to {file}"),
    ("cannot be resolved", "correct the name in 'server:' in {file}, or this host's DNS"),
    ("proxy", "correct 'proxy-url:' in {file}, or HTTPS_PROXY"),
)
_READY_PATHS: Final = {
    "loki": "/loki/api/v1/labels",
    "alertmanager": "/-/ready",
    "prometheus": "/-/ready",
    "pushgateway": "/-/ready",
}
_REVIEWS: Final = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"


class Right(NamedTuple):
    """A right that the daemon uses."""

    verb: str
    resource: str
    group: str
    namespace: str
    name: str = ""
    why: str = ""

    @property
    def words(self) -> str:
        """It in words, as a role has it."""
        kind = f"{self.resource}.{self.group}" if self.group else self.resource
        where = f"in namespace {self.namespace}" if self.namespace else "in all namespaces"
        return f"{self.verb} {kind}{' ' + self.name if self.name else ''} {where}"

    def review(self) -> JsonObject:
        """Return the SelfSubjectAccessReview that asks for it."""
        resource_, _, part = self.resource.partition("/")
        asked = {"namespace": self.namespace, "verb": self.verb, "group": self.group, "resource": resource_}
        asked.update({"subresource": part} if part else {}, **({"name": self.name} if self.name else {}))
        head = {"kind": "SelfSubjectAccessReview", "apiVersion": "authorization.k8s.io/v1"}
        return {**head, "spec": {"resourceAttributes": asked}}


def rights_used(spec: ClusterSpec, settings: Settings) -> list[Right]:
    """Return the rights that the daemon and its commands use on a cluster."""
    rights = []
    for namespace in spec.namespaces:
        for kind in RESOURCES:
            group = "batch" if "batch" in kind.root else ""
            rights += [Right(verb, kind.name, group, namespace) for verb in ("list", "watch")]
        rights.append(Right("get", "pods/log", "", namespace, why="for 'runs logs' and the last lines of failed runs"))
        if "sidecar" in settings.status_sources:
            rights.append(Right("get", "pods/proxy", "", namespace, why="for the sidecar's status"))
        if "exec" in settings.status_sources:
            rights += [Right(verb, "pods/exec", "", namespace, why="for the exec status") for verb in ("get", "create")]
    return [*rights, Right("get", "namespaces", "", "", "kube-system", "to tell a rebuilt cluster from the old one")]


class ClusterCheck:
    """Looks at one cluster: credentials, certificates, reach, clock and rights."""

    def __init__(self, site: Site, settings: Settings, *, rbac: bool, done: Callable[[], None]) -> None:
        self._site = site
        self._settings = settings
        self._rbac = rbac
        self._on_done = done
        self._open = 0  # requests on their way
        self._over = False
        self.identity: tuple[str, ...] | None = None
        self.findings: list[Finding] = []
        site.prepare(self._on_prepared)

    def give_up(self) -> None:
        """Note that the time is over, where it is not done."""
        if not self._over:
            self._find("problem", "no answer in time", "see whether its API server is overloaded")

    def _done(self) -> None:
        self._over = True
        self._on_done()

    def _find(self, level: str, message: str, fix: str = "", check: str = "cluster") -> None:
        self.findings.append(Finding(check, self._site.spec.name, level, message, fix))

    def _on_prepared(self, error: FabrikError | None) -> None:
        if error is not None:
            fix = error.hint or f"correct {self._site.spec.kubeconfig}"
            self._find("problem", error.message, fix, "credentials")
            self._done()
            return
        self._look_at_credentials()
        fetch(self._site, "/version", self._on_version)

    def _look_at_credentials(self) -> None:
        spec, connection, now = self._site.spec, self._site.connection, time.time()
        for path in spec.kubeconfig.split(os.pathsep):
            found = examined_path(path, 0o077) if os.path.exists(path) else None
            if found is not None and found.level == "problem" and "cannot be written" not in found.message:
                self._find("problem", f"{path}: {found.message}", found.fix, "credentials")
        if connection is None:
            return
        self.identity = connection.identity
        ends = {
            "the client certificate": certificate_expiry(connection.cert_pem or ""),
            "the token": connection.expires_at or token_expiry(connection.token or ""),
            "the CA's certificate": certificate_expiry(connection.ca_pem or ""),
        }
        for what, at in ends.items():
            renewed = what == "the token" and connection.expires_at is not None  # by its plugin
            if at is not None and at < now + (0 if renewed else CERTIFICATE_WARN_S):
                told = f"{what} {'expired' if at < now else 'expires'} on {format_time(at)[:10]}"
                self._find("problem", told, f"renew it in {spec.kubeconfig}", "credentials")

    def _on_version(self, got: Got) -> None:
        spec = self._site.spec
        if not got.status:
            known = next((fix for words, fix in _FIXES if words in got.complaint), "")
            fix = (known or "start the cluster, or correct 'server:' in {file}").format(file=spec.kubeconfig)
            self._find("problem", got.complaint, fix)
        elif got.status == 401:
            self._find(
                "problem", "the credentials are refused", f"log in anew: renew them in {spec.kubeconfig}", "credentials"
            )
        else:
            self._look_at_clock(got)
            version = text_at(got.document(), "gitVersion") or "of an unknown version"
            server = self._site.connection.server if self._site.connection else ""
            self._find("ok", f"{server} answers, {version}")
            self._look_at_rights()
            return
        self._done()

    def _look_at_clock(self, got: Got) -> None:
        server_time = parse_http_date(got.head.headers.get("date", "") if got.head else "")
        skew_s = 0.0 if server_time is None else server_time + 0.5 - time.time()
        if abs(skew_s) > CLOCK_SKEW_S:
            told = f"its clock is {format_age(abs(skew_s))} {'ahead of' if skew_s > 0 else 'behind'} this host's"
            self._find("problem", told, "set the one that is wrong: timedatectl set-ntp true", "clock")

    def _look_at_rights(self) -> None:
        rights = rights_used(self._site.spec, self._settings)
        asked = rights if self._rbac else [right for right in rights if right.verb == "list" or right.name]
        self._open = len(asked)
        for right in asked:

            def done(got: Got, right: Right = right) -> None:
                self._on_right(right, got)

            if self._rbac:
                Direct.post(self._site, _REVIEWS, right.review(), done)
            elif right.name:
                fetch(self._site, f"/api/v1/namespaces/{right.name}", done)
            else:
                kind = next(kind for kind in RESOURCES if kind.name == right.resource)
                fetch(self._site, f"{kind.path(right.namespace)}?limit=1", done)

    def _on_right(self, right: Right, got: Got) -> None:
        refused = got.status == 403 or (self._rbac and object_at(got.document(), "status").get("allowed") is not True)
        if self._rbac and not got.is_ok:
            self._find(
                "problem", f"the rights cannot be reviewed: {got.complaint}", "run doctor without --rbac", "rights"
            )
        elif refused:
            why = f", {right.why}" if right.why else ""
            self._find("problem", f"it may not {right.words}{why}", f"grant it to this user: {right.words}", "rights")
        elif not got.is_ok:
            self._find("problem", f"{right.words}: {got.complaint}", "look at the API server's own log", "rights")
        elif right.name and not self._rbac:
            uid = text_at(got.document(), "metadata", "uid")
            self.identity = (uid,) if uid else self.identity
        self._open -= 1
        if not self._open:
            self._done()


def examine_clusters_and_laos(
    specs: Sequence[ClusterSpec], settings: Settings, errors: TextIO, *, rbac: bool
) -> list[Finding]:
    """Look at all clusters and services of LAOS at once."""
    direct = Direct(settings, errors)
    services = _services(specs, settings)
    waiting = len(specs) + len(services)
    found: dict[str, Finding] = {}

    def done() -> None:
        nonlocal waiting
        waiting -= 1
        if not waiting:
            direct.reactor.call_soon(direct.reactor.stop)

    checks = [ClusterCheck(direct.site(spec), settings, rbac=rbac, done=done) for spec in specs]
    for name, service in services.items():

        def answered(got: Got, name: str = name, service: LaosService = service) -> None:
            found[name] = _service_finding(name, service, got)
            done()

        fetch(ServiceSite(direct, name, service), _READY_PATHS[name.split()[0]], answered)
    if waiting:
        direct.run(settings.timing.sync)
    direct.close()
    too_late = Finding("laos", "", "problem", "no answer in time", "see whether it is overloaded")
    for name in services:
        found.setdefault(name, too_late._replace(subject=name))
    for check in checks:
        check.give_up()
    return [*(one for check in checks for one in check.findings), *_twins(specs, checks), *found.values()]


def _services(specs: Sequence[ClusterSpec], settings: Settings) -> dict[str, LaosService]:
    """Return the services of LAOS that are configured, each once, under `loki of prod`."""
    named: dict[str, LaosService] = {}
    for where, laos in (("", settings.laos), *((f" of {spec.name}", spec.laos) for spec in specs)):
        for name in LAOS_SERVICES:
            service = getattr(laos, name)
            if service is not None and service not in named.values():
                named[name + where] = service
    return named


def _service_finding(name: str, service: LaosService, got: Got) -> Finding:
    if got.is_ok:
        return Finding("laos", name, "ok", f"{service.url} answers")
    fix = f"start it, or correct its url under 'laos:', {service.url}"
    if got.status in (401, 403):
        fix = "correct its username and passwordFile, or bearerTokenFile"
    elif not got.status and "correct its path" in got.complaint:
        fix = "write that file, or correct its path under 'laos:'"
    elif "certificate" in got.complaint:
        fix = "set caFile to the authority that signed its certificate"
    return Finding("laos", name, "problem", got.complaint or f"HTTP {got.status}", fix)


def _twins(specs: Sequence[ClusterSpec], checks: Sequence[ClusterCheck]) -> Iterator[Finding]:
    names: dict[tuple[str, ...], str] = {}
    for spec, check in sorted(zip(specs, checks), key=lambda pair: pair[0].rank):
        first = names.setdefault(check.identity, spec.name) if check.identity else spec.name
        if first != spec.name:
            fix = f"remove one of the two: 'fabrik-daemon clusters remove {spec.name}'"
            yield Finding("cluster", spec.name, "problem", f"it is the same cluster as {first}", fix)


# ----------------------------------------------------------------------------------------------------------------------
# Dashboard: palettes
# ----------------------------------------------------------------------------------------------------------------------

PLAIN_PALETTE: Final = "plain"
PALETTES: Final = (
    "dark",
    "light",
    "ansi",
    PLAIN_PALETTE,
)  # 24 bits on dark and on light; the terminal's 16; none at all
_ROLES: Final = {  # role -> its style in each palette, as rich writes them
    "": ("#d5dae6 on #14171f", "#20242c on #fbfbfc", "", ""),
    "dim": ("#7f8aa3", "#68707d", "dim", "dim"),
    "rest": ("#3a4257", "#c3c9d4", "dim", "dim"),
    "label": ("#7f8aa3", "#68707d", "cyan", "dim"),
    "title": ("bold #ffffff", "bold #000000", "bold", "bold"),
    "brand": ("bold #14171f on #7aa2f7", "bold #ffffff on #2a5bd7", "bold reverse blue", "bold reverse"),
    "id": ("#e6eaf5", "#101318", "", ""),
    "accent": ("#7aa2f7", "#2a5bd7", "blue", ""),
    "key": ("bold #7aa2f7", "bold #2a5bd7", "bold blue", "bold"),
    "bar": ("on #1d212c", "on #eceef2", "", ""),
    "head": ("#8f9ab3 on #1d212c", "#5a6270 on #eceef2", "bold dim", "bold"),
    "sorted": ("bold #7aa2f7 on #1d212c", "bold #2a5bd7 on #eceef2", "bold blue", "bold underline"),
    "selected": ("on #2c3550", "on #d5e0fa", "reverse", "reverse"),
    "away": ("#8b92a3", "#6b7380", "", ""),
    "stale": ("#e0a65c", "#9a5b00", "yellow", "italic"),
    "alarm": ("bold #ff8f6b", "bold #b5400f", "bold red", "bold"),
    "live": ("#7fd88f", "#167a33", "green", ""),
    "chosen": ("bold #ffffff on #3a4a78", "bold #0d2a6b on #c4d4f8", "bold reverse", "bold reverse"),
    "notice": ("#14171f on #e0a65c", "#ffffff on #8a5200", "reverse yellow", "reverse"),
    "match": ("bold #14171f on #f0d060", "bold #000000 on #ffe27a", "black on yellow", "bold reverse"),
    PENDING: ("#a3adc2", "#59616e", "", ""),
    RUNNING: ("#6cb6ff", "#0a5fd0", "bright_blue", ""),
    BLOCKED: ("bold #f5c04a", "bold #8a5a00", "bold yellow", "bold"),
    FAILED: ("bold #ff6f7d", "bold #c31f30", "bold red", "bold"),
    FINISHED: ("#7fd88f", "#167a33", "green", ""),
    CANCELLED: ("#8b92a3", "#6b7380", "dim", "dim"),
    UNKNOWN: ("#c39bf0", "#7038c0", "magenta", ""),
}


def palette_for(asked: str, environment: Mapping[str, str]) -> str:
    """Return the palette that was asked for, or for `auto` the one that suits the terminal.

    COLORFGBG, which some terminals set, ends with the number of the background's colour; others are taken for dark.
    """
    if environment.get("NO_COLOR"):
        return PLAIN_PALETTE
    if asked != "auto":
        return asked
    term, depth = environment.get("TERM", ""), environment.get("COLORTERM", "")
    if term in ("", "dumb") or term.endswith("-mono") or term.startswith("vt"):
        return "plain"
    if depth not in ("truecolor", "24bit") and "256color" not in term and "kitty" not in term:
        return "ansi"
    return "light" if environment.get("COLORFGBG", "").rpartition(";")[2] in ("7", "15") else "dark"


def style_of(palette: str, role: str, base: str) -> rich.style.Style:
    """Return how a role is painted on a line of some base; what the selected line's own colours are gives way."""
    place = PALETTES.index(palette)
    parts = [_ROLES[name][place] for name in ("", base, role if role else base) if _ROLES[name][place]]
    style = rich.style.Style.combine([rich.style.Style(), *map(rich.style.Style.parse, parts)])
    is_flat = base == "selected" and palette in ("ansi", "plain")  # reversed colours of their own would be backgrounds
    return rich.style.Style(reverse=True, bold=style.bold) if is_flat else style


# ----------------------------------------------------------------------------------------------------------------------
# Dashboard: columns
# ----------------------------------------------------------------------------------------------------------------------

Span = tuple[str, str]  # a text, and the role that it plays: PALETTES say how that is painted


class Line(NamedTuple):
    """One line of the screen; `base` is the role of what stands behind and between its texts."""

    spans: tuple[Span, ...] = ()
    base: str = ""


class Moment(NamedTuple):
    """What rows are shown against: the time, and how fresh each cluster's rows are."""

    now: float
    freshness: Mapping[str, Freshness] = {}

    def is_away(self, cluster: str) -> bool:
        """Say whether a cluster's rows may be old."""
        part = self.freshness.get(cluster)
        return part is not None and not part.connected

    def stale_age(self, cluster: str) -> str:
        """Return how old a cluster's rows are; empty where they are live."""
        part = self.freshness.get(cluster)
        return "" if part is None or part.connected else age_of(part.synced_at, self.now) or "never"


class Field(NamedTuple):
    """A column of a list: its cells, how they sort, and how wide it may be."""

    title: str
    text: Callable[[Any, Moment], str]
    order: Callable[[Any], Any]  # of one type, whatever the row
    most: int = 24
    least: int = 0  # narrower, it is left out; 0: as wide as its cells
    role: Callable[[Any, Moment], str] = lambda row, moment: ""
    right: bool = False
    wide: bool = False  # only shown when all columns are asked for
    weight: int = 5  # the columns of the lowest give way first; below 5, also where no row has anything in it
    grows: bool = False  # takes the room that is left
    draw: Callable[[Any, int, int], tuple[Span, ...]] | None = None  # instead: row, cells, those of the longest text


class View(NamedTuple):
    """One list of the dashboard."""

    name: str
    table: str
    fields: tuple[Field, ...]
    searched: tuple[str, ...]  # what a filter's bare words look at
    sorted_by: str
    is_reversed: bool = False


STATUS_MARKS: Final = {
    RUNNING: "●",
    BLOCKED: "◆",
    FAILED: "✗",
    FINISHED: "✓",
    PENDING: "○",
    CANCELLED: "⊘",
    UNKNOWN: "?",
}
ATTENTION: Final = (BLOCKED, FAILED)  # what a person may have to act on, in this order
HEARTBEAT_LATE_S: Final = 60.0  # Smithers reports every 30 s


def shown_status(row: Any) -> str:
    """Return the status of a run as it is shown: one that nobody knows has a word too."""
    return row.status or UNKNOWN


def progress_bar(row: Run, width: int, figures_width: int) -> tuple[Span, ...]:
    """Return a run's progress in exactly so many cells: a bar and its figures, or the figures where it is narrow."""
    finished, total, figures = row.progress_finished, row.progress_total, _figures(row)
    if finished is None or total is None:
        return ((" " * width, ""),)
    cells = width - max(figures_width, len(figures)) - 1
    if cells < 3:
        return ((f"{figures:>{width}}"[-width:], ""),)
    filled = int(cells * min(1.0, finished / total)) if total > 0 else 0
    return (
        ("━" * filled, shown_status(row)),
        ("─" * (cells - filled), "rest"),
        (f"{figures:>{width - cells}}", ""),
    )


def fit(text: str, width: int, *, right: bool = False) -> str:
    """Return a text in exactly so many cells, its end cut where it is longer."""
    size = len(text) if text.isascii() else rich.cells.cell_len(text)
    if size > width:
        return rich.cells.set_cell_size(text, width - 1) + "…" if width > 1 else "…"[:width]
    return " " * (width - size) + text if right else text + " " * (width - size)


def short_id(text: str, width: int) -> str:
    """Return an id whose middle is left out: ids of one day begin alike, and their ends tell them apart."""
    return text if len(text) <= width or width < 5 else text[: width - 6] + "…" + text[-5:]


def _value(name: str) -> Callable[[Any, Moment], str]:
    return lambda row, moment: safe_text(getattr(row, name))


def _text_order(name: str) -> Callable[[Any], str]:
    return lambda row: str(getattr(row, name) or "")


def _number_order(name: str) -> Callable[[Any], float]:
    return lambda row: float(getattr(row, name) or 0)


def _age_field(name: str) -> Callable[[Any, Moment], str]:
    return lambda row, moment: age_of(getattr(row, name), moment.now)


def _until(moment_text: str | None, now: float) -> str:
    epoch = epoch_of(moment_text)
    return "" if epoch is None else f"in {format_age(epoch - now)}" if epoch > now else "now"


def heartbeat_age_s(row: Run, moment: Moment) -> float | None:
    """Return how long a run has said nothing, by its cluster's clock; None for one that need not."""
    beat = None if row.status in TERMINAL else epoch_of(row.heartbeat_at)
    part = moment.freshness.get(row.cluster)
    skew_s = part.skew_s if part is not None and abs(part.skew_s) > SKEW_MIN_S else 0.0
    return None if beat is None else max(0.0, moment.now + skew_s - beat)


def _heartbeat_text(row: Run, moment: Moment) -> str:
    age_s = heartbeat_age_s(row, moment)
    return "" if age_s is None else format_age(age_s)


def _heartbeat_role(row: Run, moment: Moment) -> str:
    age_s = heartbeat_age_s(row, moment)
    return "alarm" if age_s is not None and age_s > HEARTBEAT_LATE_S and row.status == RUNNING else "dim"


def _cluster_text(row: Any, moment: Moment) -> str:
    age = moment.stale_age(row.cluster)
    return safe_text(row.cluster) + (f" ({age})" if age else "")


def _cluster_role(row: Any, moment: Moment) -> str:
    return "stale" if moment.is_away(row.cluster) else ""


def _run_name(row: Run, _moment: Moment) -> str:
    """Return the label id: of the key, cluster and namespace stand in columns of their own."""
    return safe_text(row.id or row.run_id)


def _status_text(row: Run, _moment: Moment) -> str:
    status = shown_status(row)
    return f"{STATUS_MARKS[status]} {status}"


def _ratio(row: Run) -> float:
    finished, total = row.progress_finished, row.progress_total
    return -1.0 if finished is None or not total else finished / total


def _figures(row: Run, _moment: Moment | None = None) -> str:
    finished, total = row.progress_finished, row.progress_total
    return "" if finished is None or total is None else f"{finished}/{total}"


def _dim(_row: Any, _moment: Moment) -> str:
    return "dim"


def _text_field(title: str, name: str, **more: Any) -> Field:
    return Field(title, _value(name), _text_order(name), **more)


_CLUSTER: Final = Field("CLUSTER", _cluster_text, _text_order("cluster"), 20, 7, _cluster_role, weight=8)
_NAMESPACE: Final = _text_field("NAMESPACE", "namespace", most=20, least=8, role=_dim, wide=True, weight=2)

RUNS_VIEW: Final = View(
    "runs",
    "runs",
    (
        Field("RUN", _run_name, _text_order("run_id"), 32, 12, lambda row, moment: "id", weight=7),
        _CLUSTER,
        Field("STATUS", _status_text, shown_status, 11, 11, lambda row, moment: shown_status(row), weight=10),
        _text_field("PHASE", "phase", most=10, least=8, weight=4),
        _text_field("TASK", "current_task", most=18, least=7, weight=6),
        Field("PROGRESS", _figures, _ratio, 44, 8, weight=8, grows=True, draw=progress_bar),
        Field("BEAT", _heartbeat_text, lambda row: row.heartbeat_at or "", 6, 5, _heartbeat_role, right=True, weight=5),
        Field("AGE", _age_field("created_at"), lambda row: row.created_at or "", 6, 5, _dim, right=True, weight=6),
        _text_field("REASON", "reason", most=24, least=12, role=lambda row, moment: shown_status(row), weight=3),
        Field("TRY", _value("task_attempt"), _number_order("task_attempt"), 3, right=True, wide=True, weight=1),
        _text_field("SPEC", "spec_id", most=24, least=8, wide=True, weight=3),
        _text_field("PROJECT", "project", most=16, least=8, wide=True, weight=2),
        _text_field("TEMPLATE", "template", most=12, least=8, role=_dim, wide=True, weight=1),
        _NAMESPACE,
    ),
    ("run_id", "id", "cluster", "namespace", "status", "phase", "current_task", "spec_id", "project", "reason"),
    "AGE",
    is_reversed=True,
)
SCHEDULES_VIEW: Final = View(
    "schedules",
    "schedules",
    (
        Field("SCHEDULE", lambda row, moment: safe_text(row.schedule_id or row.name), _text_order("name"), 32, 8),
        _CLUSTER,
        _text_field("CRON", "schedule", most=20, least=9, role=lambda row, moment: "accent"),
        _text_field("ZONE", "time_zone", most=18, least=4, role=_dim, weight=3),
        Field("ACTIVE", _value("active"), _number_order("active"), 6, right=True),
        Field("LAST", _age_field("last_run_at"), _text_order("last_run_at"), 6, right=True),
        Field("NEXT", lambda row, moment: _until(row.next_run_at, moment.now), _text_order("next_run_at"), 9),
        Field(
            "MISSED",
            lambda row, moment: safe_text(row.missed or ""),
            _number_order("missed"),
            6,
            role=lambda row, moment: "alarm",
            right=True,
            weight=4,
        ),
        Field(
            "STATE", lambda row, moment: "suspended" if row.suspended else "", _number_order("suspended"), 9, role=_dim
        ),
        _text_field("NAME", "name", most=40, least=8, role=_dim, wide=True, weight=2),
        _NAMESPACE,
    ),
    ("name", "schedule_id", "cluster", "namespace", "schedule"),
    "SCHEDULE",
)
STORAGE_VIEW: Final = View(
    "storage",
    "volumes",
    (
        _text_field("VOLUME", "name", most=48, least=12, role=lambda row, moment: "id", weight=8),
        _CLUSTER,
        _text_field("PHASE", "phase", most=8, role=lambda row, moment: FINISHED if row.phase == "Bound" else BLOCKED),
        Field(
            "CAPACITY",
            lambda row, moment: format_bytes(row.capacity_bytes),
            _number_order("capacity_bytes"),
            10,
            right=True,
        ),
        _text_field("CLASS", "storage_class", most=16, least=5, weight=4),
        Field("AGE", _age_field("created_at"), _text_order("created_at"), 6, 5, _dim, right=True),
        _text_field("RUN", "run_id", most=40, least=12, role=_dim, weight=3),
        _NAMESPACE,
    ),
    ("name", "run_id", "cluster", "namespace", "phase", "storage_class"),
    "AGE",
    is_reversed=True,
)
WARNINGS_VIEW: Final = View(
    "warnings",
    "cluster_events",
    (
        Field("LAST", _age_field("last_at"), _text_order("last_at"), 6, 5, _dim, right=True, weight=9),
        Field("COUNT", _value("count"), _number_order("count"), 6, right=True, weight=6),
        _CLUSTER,
        _text_field("REASON", "reason", most=20, least=8, role=lambda row, moment: BLOCKED, weight=9),
        Field(
            "OBJECT",
            lambda row, moment: safe_text(f"{(row.object_kind or '').lower()}/{row.object_name or ''}"),
            _text_order("object_name"),
            40,
            12,
            lambda row, moment: "id",
        ),
        _text_field("MESSAGE", "message", most=400, least=10, weight=7, grows=True),
        _NAMESPACE,
    ),
    ("reason", "message", "object_name", "object_kind", "cluster", "namespace", "run_id"),
    "LAST",
    is_reversed=True,
)


# ----------------------------------------------------------------------------------------------------------------------
# Dashboard: model
# ----------------------------------------------------------------------------------------------------------------------

TERM_NAMES: Final = {
    "status": ("status",),
    "cluster": ("cluster", "name"),
    "phase": ("phase",),
    "task": ("current_task",),
    "spec": ("spec_id",),
    "project": ("project",),
    "template": ("template",),
    "namespace": ("namespace",),
    "ns": ("namespace",),
    "run": ("run_id",),
    "id": ("run_id", "id"),
    "reason": ("reason",),
    "schedule": ("schedule_id", "name"),
    "class": ("storage_class",),
    "object": ("object_name",),
}


class ClusterView(NamedTuple):
    """How a cluster is reached, as the daemon's status or the cache tells."""

    name: str
    server: str | None = None
    priority: int = 100
    connected: bool = False
    synced_at: str | None = None
    last_event_at: str | None = None
    error: str | None = None
    skew_s: float = 0.0
    uid: str | None = None
    watches: tuple[JsonObject, ...] = ()

    @property
    def cluster(self) -> str:
        """The cluster's name, as other rows have it."""
        return self.name

    @property
    def freshness(self) -> Freshness:
        """How old its rows are."""
        return Freshness(self.name, self.connected, self.synced_at, self.error, self.skew_s)


class Term(NamedTuple):
    """One word of a filter: which columns (none: the view's own), what they must or must not hold."""

    columns: tuple[str, ...]
    pattern: re.Pattern[str]
    is_inverse: bool

    def matches(self, row: Any, searched: Sequence[str]) -> bool:
        """Say whether a row has it; a named column from its beginning, others anywhere."""
        if self.columns:
            values = [getattr(row, name) for name in self.columns if hasattr(row, name)]
            found = any(self.pattern.match(str(value or UNKNOWN)) for value in values)
        else:
            found = any(self.pattern.search(str(getattr(row, name) or "")) for name in searched)
        return found is not self.is_inverse


def parse_terms(text: str) -> tuple[Term, ...]:
    """Return the terms of a filter, all of which a row must match: `status:blocked,failed cluster:prod !nightly 1[67]`.

    A word is a regular expression, or just a text where it is none; `!` before it inverts it. What follows a column's
    name must stand at the beginning of the column; commas part alternatives.
    """
    terms = []
    for word in text.split():
        asked = word.lstrip("!")
        name, colon, value = asked.partition(":")
        columns = TERM_NAMES.get(name.lower(), ()) if colon else ()
        wanted = "|".join(f"(?:{_regex(part)})" for part in value.split(",")) if columns else _regex(asked)
        terms.append(Term(columns, re.compile(wanted, re.IGNORECASE), asked != word))
    return tuple(terms)


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return re.escape(text)
    return text


class Query(NamedTuple):
    """What a list shows, and in which order."""

    sorted_by: Field
    is_reversed: bool
    cluster: str = ""  # empty: all
    terms: tuple[Term, ...] = ()
    attention: bool = False  # blocked and failed runs first


class Listing:
    """The rows of a view that a query asks for, in its order; a change moves one row and leaves the others alone."""

    def __init__(self, view: View, query: Query) -> None:
        self.view = view
        self.query = query
        self._entries: list[tuple[Any, RowKey]] = []
        self._rows: dict[RowKey, Any] = {}

    def __len__(self) -> int:
        """Return how many rows there are."""
        return len(self._entries)

    def fill(self, rows: Mapping[RowKey, Any], query: Query) -> None:
        """Take other rows, or ask something else of the same."""
        self.query = query
        self._rows = {key: row for key, row in rows.items() if self._wants(row)}
        self._entries = sorted((self._order(row), key) for key, row in self._rows.items())

    def put(self, key: RowKey, row: Any) -> None:
        """Take a row's new state; None: it is gone."""
        before = self._rows.pop(key, None)
        if before is not None:
            del self._entries[self._place(before, key)]
        if row is not None and self._wants(row):
            self._rows[key] = row
            bisect.insort(self._entries, (self._order(row), key))

    def key_at(self, index: int) -> RowKey | None:
        """Return the key of the row at a place; None where there is none."""
        return self._entries[self._mirrored(index)][1] if 0 <= index < len(self._entries) else None

    def row_at(self, index: int) -> Any:
        """Return the row at a place."""
        return self._rows[self._entries[self._mirrored(index)][1]]

    def index_of(self, key: RowKey | None) -> int | None:
        """Return a row's place; None where it is not asked for."""
        row = self._rows.get(key) if key is not None else None
        return None if row is None or key is None else self._mirrored(self._place(row, key))

    def _mirrored(self, index: int) -> int:
        return len(self._entries) - 1 - index if self.query.is_reversed else index

    def _place(self, row: Any, key: RowKey) -> int:
        return bisect.bisect_left(self._entries, (self._order(row), key))

    def _wants(self, row: Any) -> bool:
        query = self.query
        if query.cluster and row.cluster != query.cluster:
            return False
        return all(term.matches(row, self.view.searched) for term in query.terms)

    def _order(self, row: Any) -> Any:
        order = self.query.sorted_by.order(row)
        if not self.query.attention or not isinstance(row, Run):
            return order
        rank = ATTENTION.index(row.status) if row.status in ATTENTION else len(ATTENTION)
        return (-rank if self.query.is_reversed else rank, order)


class Board:
    """All rows known now, counted by cluster and status."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[RowKey, Any]] = {name: {} for name in (*TABLES, "clusters")}
        self.counts: dict[tuple[str, str], int] = {}  # cluster and status -> runs

    @property
    def clusters(self) -> list[ClusterView]:
        """The clusters by priority and name, as everywhere."""
        return sorted(self.tables["clusters"].values(), key=lambda state: (state.priority, state.name))

    @property
    def freshness(self) -> dict[str, Freshness]:
        """How old each cluster's rows are."""
        return {state.name: state.freshness for state in self.tables["clusters"].values()}

    def replace(self, tables: Mapping[str, Iterable[Any]], counts: Mapping[tuple[str, str], int] | None = None) -> None:
        """Take whole tables; the others stay. `counts` says how many runs there are where these are not all."""
        for name, rows in tables.items():
            self.tables[name] = {key_of(row): row for row in rows}
        if counts is not None:
            self.counts = dict(counts)
        elif "runs" in tables:
            self.counts = {}
            for row in self.tables["runs"].values():
                self._count(row, 1)

    def apply(self, table: str, row: Any, *, is_removed: bool = False) -> Any:
        """Take one row's new state, or that it is gone; return the row before, None where there was none."""
        key = key_of(row)
        before = self.tables[table].pop(key, None)
        if table == "runs" and before is not None:
            self._count(before, -1)
        if not is_removed:
            self.tables[table][key] = row
            if table == "runs":
                self._count(row, 1)
        return before

    def count(self, *, status: str = "", cluster: str = "") -> int:
        """Return how many runs have a status, in a cluster; empty: any."""
        return sum(
            count
            for (where, what), count in self.counts.items()
            if (not status or what == status) and (not cluster or where == cluster)
        )

    def _count(self, row: Run, change: int) -> None:
        key = row.cluster, shown_status(row)
        self.counts[key] = self.counts.get(key, 0) + change


def key_of(row: Any) -> RowKey:
    """Return what names a row within its table."""
    return (row.name,) if isinstance(row, ClusterView) else row_key(row)


def _state_text(state: ClusterView, moment: Moment) -> str:
    if state.connected:
        return "● live" if state.synced_at else "● listing"
    age = moment.stale_age(state.name)
    return f"○ away {age}" if state.synced_at else "○ not synced"


def _watching(state: ClusterView) -> int:
    return sum(1 for watch in state.watches if watch.get("state") == "watching")


def cluster_error(state: ClusterView) -> str:
    """Return what is wrong with a cluster, or with one of its watches; empty where nothing is."""
    if state.error:
        return state.error
    return next((f"{watch['resource']}: {watch['error']}" for watch in state.watches if watch.get("error")), "")


CLUSTERS_VIEW: Final = View(
    "clusters",
    "clusters",
    (
        Field("CLUSTER", lambda row, moment: safe_text(row.name), lambda row: row.name, 24, 6, weight=10),
        Field(
            "STATE",
            _state_text,
            lambda row: not row.connected,
            18,
            6,
            lambda row, moment: "live" if row.connected else "stale",
            weight=9,
        ),
        Field(
            "LAG",
            lambda row, moment: age_of(row.last_event_at, moment.now),
            lambda row: row.last_event_at or "",
            8,
            4,
            right=True,
        ),
        Field(
            "WATCHES",
            lambda row, moment: f"{_watching(row)}/{len(row.watches)}" if row.watches else "",
            _watching,
            7,
            right=True,
        ),
        Field("PRIO", lambda row, moment: str(row.priority), lambda row: row.priority, 4, right=True, weight=3),
        Field("SERVER", lambda row, moment: safe_text(row.server), lambda row: row.server or "", 48, 12, weight=4),
        Field(
            "ERROR",
            lambda row, moment: safe_text(cluster_error(row)),
            cluster_error,
            400,
            10,
            lambda row, moment: "alarm",
            weight=8,
            grows=True,
        ),
    ),
    ("name", "server", "error"),
    "PRIO",
)


VIEWS: Final = {view.name: view for view in (RUNS_VIEW, SCHEDULES_VIEW, STORAGE_VIEW, WARNINGS_VIEW, CLUSTERS_VIEW)}


# ----------------------------------------------------------------------------------------------------------------------
# Dashboard: pages
# ----------------------------------------------------------------------------------------------------------------------


class Page(Protocol):
    """What fills the screen between its bars: lines, of which some are seen."""

    name: str
    title: str
    headings: int  # lines that stay above the others
    top: int  # the first line seen of the others

    def size(self, width: int, moment: Moment) -> int:
        """Return how many lines there are."""

    def draw(self, width: int, height: int, moment: Moment) -> list[Line]:
        """Return the lines that are seen, headings first: `height` of them at most."""

    def move(self, by: int, height: int) -> None:
        """Go so many lines down, or up; `height` lines are seen."""


def arrange(fields: Sequence[Field], wanted: Sequence[int], width: int) -> tuple[list[tuple[Field, int]], int]:
    """Return the columns that fit with the cells each gets, and the gap between them."""
    gap = 2 if width >= 100 else 1
    least = {field.title: min(want, field.least or want) for field, want in zip(fields, wanted)}
    shown = [(field, want) for field, want in zip(fields, wanted) if want]
    while shown and sum(least[field.title] + gap for field, _ in shown) - gap > width:
        shown.remove(min(shown, key=lambda pair: pair[0].weight))
    room = width - sum(least[field.title] + gap for field, _ in shown) + gap
    sizes = {field.title: least[field.title] for field, _ in shown}
    for field, want in sorted(shown, key=lambda pair: pair[1] - least[pair[0].title]):  # who lacks least, first
        more = min(room, want - sizes[field.title])
        sizes[field.title] += more
        room -= more
    for field, _ in shown:
        if field.grows:
            more = min(room, field.most - sizes[field.title])
            sizes[field.title] += more
            room -= more
    return [(field, sizes[field.title]) for field, _ in shown], gap


class ListPage:
    """A view's rows under their titles; the cursor stays with its row wherever that goes."""

    def __init__(self, view: View) -> None:
        self.name = self.title = view.name
        self.headings = 1
        self.view = view
        self.top = 0
        self.cursor: RowKey | None = None  # None: the first row, whichever it is
        self.filter = ""
        self.sorted_by = next(field for field in view.fields if field.title == view.sorted_by)
        self.is_reversed = view.is_reversed
        self.is_wide = False
        self.listing = Listing(view, Query(self.sorted_by, self.is_reversed))
        self.layout: list[tuple[Field, int]] = []  # as last drawn
        self.gap = 1
        self._measured: dict[str, int] = {}  # a column's widest cell seen so far

    @property
    def index(self) -> int:
        """Where the cursor is."""
        return self.listing.index_of(self.cursor) or 0

    @property
    def selected(self) -> Any:
        """The row under the cursor, None where there is none."""
        return self.listing.row_at(self.index) if len(self.listing) else None

    def size(self, width: int, moment: Moment) -> int:
        """Return how many lines there are."""
        return len(self.listing)

    def fill(self, rows: Mapping[RowKey, Any], cluster: str, *, attention: bool) -> None:
        """Take all rows anew, as they are asked for now."""
        terms = parse_terms(self.filter)
        self.listing.fill(rows, Query(self.sorted_by, self.is_reversed, cluster, terms, attention))
        self.measure_again()

    def measure_again(self) -> None:
        """Forget how wide cells were."""
        self._measured = {}

    def put(self, key: RowKey, row: Any) -> None:
        """Take one row's new state; what is seen stays where it is."""
        before, index = self.listing.index_of(self.cursor), self.index
        self.listing.put(key, row)
        after = self.listing.index_of(self.cursor)
        if before is not None and after is None:
            self.cursor = self.listing.key_at(min(index, len(self.listing) - 1))
        elif before is not None and after is not None and self.top:
            self.top = max(0, self.top + after - before)

    def move(self, by: int, height: int) -> None:
        """Put the cursor so many rows down, or up, and see to it that it is seen."""
        self.point_at(max(0, min(len(self.listing) - 1, self.index + by)))
        self.reveal(height)

    def point_at(self, index: int) -> None:
        """Put the cursor on a row; at the first one it stays first."""
        self.cursor = self.listing.key_at(index) if index > 0 else None

    def reveal(self, height: int) -> None:
        """Scroll as far as the cursor needs to be seen."""
        index = self.index
        self.top = max(0, min(max(self.top, index - height + 2), index, max(0, len(self.listing) - height + 1)))

    def sort_by(self, field: Field) -> None:
        """Sort by a column; once more: the other way round."""
        self.is_reversed = not self.is_reversed if field is self.sorted_by else False
        self.sorted_by = field

    def fields(self) -> list[Field]:
        """Return the columns to show if there is room."""
        return [field for field in self.view.fields if self.is_wide or not field.wide]

    def draw(self, width: int, height: int, moment: Moment) -> list[Line]:
        """Return the titles and the rows that are seen."""
        self.top = max(0, min(self.top, len(self.listing) - height + 1))
        last = min(len(self.listing), self.top + height - 1)
        rows = [self.listing.row_at(index) for index in range(self.top, last)]
        fields = self.fields()
        cells = [[field.text(row, moment) for field in fields] for row in rows]
        for place, field in enumerate(fields):
            widest = max([_cells_of(line[place]) for line in cells] or [0])
            self._measured[field.title] = max(self._measured.get(field.title, 0), widest)
        wanted = [self._wanted(field) for field in fields]
        self.layout, self.gap = arrange(fields, wanted, width - 2)
        texts = [dict(zip((field.title for field in fields), line)) for line in cells]
        selected = self.index - self.top
        if not rows:
            return [self._heading(), Line(), Line(((f"  no {self.name}{' like that' if self.filter else ''}", "dim"),))]
        return [self._heading()] + [
            self._line(row, text, moment, is_selected=place == selected)
            for place, (row, text) in enumerate(zip(rows, texts))
        ]

    def field_at(self, x: int) -> Field | None:
        """Return the column that is drawn at a place of a line."""
        left = 1
        for field, size in self.layout:
            if left <= x < left + size + self.gap:
                return field
            left += size + self.gap
        return None

    def _wanted(self, field: Field) -> int:
        measured = self._measured[field.title]
        if not measured and len(self.listing) and field.weight < 5 and field is not self.sorted_by:
            return 0
        if field.draw is not None:
            return BAR_CELLS
        return max(len(field.title) + (field is self.sorted_by), min(measured, field.most))

    def _heading(self) -> Line:
        spans: list[Span] = [(" ", "head")]
        for field, size in self.layout:
            is_sorted = field is self.sorted_by
            arrow = ("↓" if self.is_reversed else "↑") if is_sorted else ""
            title = field.title + arrow if len(field.title) < size else field.title
            spans.append((fit(title, size, right=field.right), "sorted" if is_sorted else "head"))
            spans.append((" " * self.gap, "head"))
        return Line(tuple(spans[:-1]), "head")

    def _line(self, row: Any, texts: Mapping[str, str], moment: Moment, *, is_selected: bool) -> Line:
        status = row.status if isinstance(row, Run) else ""
        spans: list[Span] = [("▌", status) if status in ATTENTION else (" ", "")]
        for field, size in self.layout:
            if field.draw is not None:
                spans += field.draw(row, size, self._measured[field.title])
            else:
                text = texts[field.title]
                shown = short_id(text, size) if field.role(row, moment) == "id" else text
                spans.append((fit(shown, size, right=field.right), field.role(row, moment)))
            spans.append((" " * self.gap, ""))
        return Line(tuple(spans[:-1]), "selected" if is_selected else "away" if moment.is_away(row.cluster) else "")


def _cells_of(text: str) -> int:
    return len(text) if text.isascii() else rich.cells.cell_len(text)


class TextPage:
    """Lines that are made for a width and a moment; they can be searched."""

    def __init__(self, name: str, title: str, make: Callable[[int, Moment], list[Line]], about: Any = None) -> None:
        self.name = name
        self.title = title
        self.headings = 0
        self.about = about  # the row that it shows
        self.top = 0
        self.search: re.Pattern[str] | None = None
        self._make = make
        self._lines: list[Line] = []
        self._made_for: object = None

    def lines(self, width: int, moment: Moment) -> list[Line]:
        """Return all lines; made anew for another width, or once a second: ages stand in them."""
        if self._made_for != (width, int(moment.now)):
            self._made_for = width, int(moment.now)
            self._lines = self._make(width, moment)
        return self._lines

    def renew(self) -> None:
        """Make the lines anew: there is news."""
        self._made_for = None

    def size(self, width: int, moment: Moment) -> int:
        """Return how many lines there are."""
        return len(self.lines(width, moment))

    def draw(self, width: int, height: int, moment: Moment) -> list[Line]:
        """Return the lines that are seen, with what was searched for marked."""
        seen = self.lines(width, moment)[self.top : self.top + height]
        return [mark_matches(line, self.search) for line in seen] if self.search else seen

    def move(self, by: int, height: int) -> None:
        """Go so many lines down, or up."""
        self.top = max(0, min(self.top + by, len(self._lines) - height))

    def find(self, direction: int) -> bool:
        """Go to the next line that matches: below (1), above (-1), or from here on (0); say whether there is one."""
        count = len(self._lines)
        for step in range(abs(direction), count + 1):
            index = (self.top + (direction or 1) * step) % count
            if self.search and self.search.search("".join(text for text, _ in self._lines[index].spans)):
                self.top = index
                return True
        return False


def mark_matches(line: Line, pattern: re.Pattern[str] | None) -> Line:
    """Return the line with all matches of a pattern in the role `match`."""
    spans: list[Span] = []
    for text, role in line.spans:
        at = 0
        for match in pattern.finditer(text) if pattern else ():
            spans += [(text[at : match.start()], role), (match[0], "match")]
            at = match.end()
        spans.append((text[at:], role))
    return Line(tuple(spans), line.base)


class LogPage(TextPage):
    """A run's log: lines that come, the last of them in sight while it is followed."""

    def __init__(self, about: Run) -> None:
        super().__init__("logs", f"of {safe_text(about.run_id)}", lambda width, moment: [], about)
        self.headings = 1
        self.is_following = True
        self.has_times = False
        self.source = "waiting for the log"
        self._texts: deque[tuple[str, str]] = deque(maxlen=LOG_LINES_SHOWN)  # time and text

    def add(self, texts: Iterable[tuple[str, str]], source: str) -> None:
        """Take more lines, each with its time, and where they come from."""
        self._texts.extend(texts)
        self.source = source
        self.renew()

    def lines(self, width: int, moment: Moment) -> list[Line]:
        """Return the lines, long ones on several."""
        if self._made_for != width:
            self._made_for = width
            self._lines = [line for at, text in self._texts for line in self._wrapped(at, text, width)]
            if not self._lines:
                self._lines = [Line(((" no lines yet", "dim"),))]
        return self._lines

    def draw(self, width: int, height: int, moment: Moment) -> list[Line]:
        """Return the lines that are seen under a line that says where they come from."""
        if self.is_following:
            self.top = max(0, self.size(width, moment) - height + 1)
        words = f" {self.source}{', followed' if self.is_following else ''}"
        return [Line(((fit(words, width), "dim"),)), *super().draw(width, height - 1, moment)]

    def move(self, by: int, height: int) -> None:
        """Go so many lines down, or up; up ends following."""
        self.is_following = self.is_following and by > 0
        super().move(by, height - 1)

    def _wrapped(self, at: str, text: str, width: int) -> list[Line]:
        head = (f" {clock_time(at)} ", "dim") if self.has_times else (" ", "")
        pieces = rich.cells.chop_cells(safe_text(text.expandtabs()), max(10, width - len(head[0]))) or [""]
        rest = (" " * len(head[0]), "")
        return [Line(((head if number == 0 else rest), (piece, ""))) for number, piece in enumerate(pieces)]


def clock_time(moment: object) -> str:
    """Return the local time of day of a row's time."""
    epoch = epoch_of(moment)
    return " " * 8 if epoch is None else datetime.fromtimestamp(epoch, timezone.utc).astimezone().strftime("%H:%M:%S")


# ----------------------------------------------------------------------------------------------------------------------
# Dashboard: texts
# ----------------------------------------------------------------------------------------------------------------------

_PAIR_CELLS: Final = 40  # a label and its value, side by side as many as fit


class TimelineEntry(NamedTuple):
    """One entry of a run's timeline."""

    at: str | None
    mark: str
    role: str
    words: str


def timeline(events: Sequence[JsonObject]) -> list[TimelineEntry]:
    """Return what a run's events tell, in order; a gate's own event says more than the change of status before it."""
    entries: list[TimelineEntry] = []
    for event in events:
        said = event.get("payload")
        said = said if isinstance(said, dict) else {}
        at, kind = event.get("cluster_timestamp") or event.get("local_timestamp"), event.get("event_type")
        if kind == "status_changed":
            status = said.get("to") if said.get("to") in STATUS_MARKS else UNKNOWN
            words = f"{status}  {said['reason']}" if said.get("reason") else str(status)
            entries.append(TimelineEntry(at, STATUS_MARKS[str(status)], str(status), words))
        elif kind == "task_completed":
            figures = f"  {said.get('finished')}/{said.get('total')}" if said.get("total") else ""
            is_before = bool(entries) and entries[-1].at == at  # what ends with a task comes after it
            done = TimelineEntry(at, "│", "dim", f"{said.get('task')} done{figures}")
            entries.insert(len(entries) - is_before, done)
        elif kind == "blocked":
            where = "  ".join(str(said[name]) for name in ("phase", "task", "reason") if said.get(name))
            if entries and entries[-1].role == BLOCKED:
                entries.pop()
            entries.append(TimelineEntry(at, STATUS_MARKS[BLOCKED], BLOCKED, f"blocked  {where}"))
    return entries


def log_texts(events: Sequence[JsonObject]) -> list[tuple[str, str]]:
    """Return the kept log lines among a run's events: time and text each."""
    texts = []
    for event in events:
        if event.get("event_type") == "log_line":
            said = event.get("payload")
            said = said if isinstance(said, dict) else {"line": event.get("payload")}
            at = said.get("at") or event.get("cluster_timestamp") or event.get("local_timestamp") or ""
            texts.append((str(at), str(said.get("line", ""))))
    return texts


def run_lines(row: Run, details: JsonObject | None, width: int, moment: Moment) -> list[Line]:
    """Return a run for a person: what it is, what it did, what it has, what went wrong, what it wrote last."""
    status = shown_status(row)
    reason = f"  {safe_text(row.reason)}" if row.reason else ""
    lines = [
        Line(),
        Line(((" ", ""), (f"{STATUS_MARKS[status]} {status}", status), (reason, status))),
        Line(((" ", ""), *progress_bar(row, min(width - 2, 60), 0))),
        Line(),
        *_pair_lines(_run_pairs(row, moment), width),
    ]
    if details is None:
        return [*lines, Line(), Line(((" ...", "dim"),))]
    lines += _titled("timeline", _timeline_lines(row, details.get("events") or [], width, moment))
    for title, fields, rows in (
        ("volumes", _VOLUME_FIELDS, [_row_of(Volume, said) for said in details.get("volumes") or []]),
        ("warnings", _WARNING_FIELDS, [_row_of(ClusterEvent, said) for said in details.get("warnings") or []]),
    ):
        lines += _titled(title, _table_lines(fields, rows, width, moment))
    kept = [Line(((fit(f"   {safe_text(text)}", width), ""),)) for _, text in log_texts(details.get("events") or [])]
    return [*lines, *_titled("last log lines", kept)]


_VOLUME_FIELDS: Final = tuple(
    field for field in STORAGE_VIEW.fields if field.title in ("VOLUME", "PHASE", "CAPACITY", "CLASS", "AGE")
)
_WARNING_FIELDS: Final = tuple(
    field for field in WARNINGS_VIEW.fields if field.title in ("LAST", "COUNT", "REASON", "MESSAGE")
)


def _row_of(kind: type[TableRow], said: JsonObject) -> Any:
    return kind(**{name: value for name, value in said.items() if name in kind._fields})


def _run_pairs(row: Run, moment: Moment) -> list[tuple[str, str, str]]:
    age = moment.stale_age(row.cluster)
    beat_s = heartbeat_age_s(row, moment)
    started, finished = epoch_of(row.started_at), epoch_of(row.finished_at)
    ended = finished if finished is not None or row.status in TERMINAL else moment.now
    return [
        ("cluster", row.cluster + (f" (as of {age} ago)" if age else ""), "stale" if age else ""),
        ("namespace", row.namespace, ""),
        ("phase", row.phase or "", ""),
        ("task", row.current_task or "", ""),
        ("attempt", str(row.task_attempt or ""), ""),
        ("iteration", str(row.iteration or ""), ""),
        ("heartbeat", f"{format_age(beat_s)} ago" if beat_s is not None else "", _heartbeat_late(row, beat_s)),
        ("age", age_of(row.created_at, moment.now), ""),
        ("runtime", format_age(ended - started) if started is not None and ended is not None else "", ""),
        ("ended", f"{age_of(row.finished_at, moment.now)} ago" if row.finished_at else "", ""),
        ("spec", row.spec_id or "", ""),
        ("project", row.project or "", ""),
        ("template", row.template or "", ""),
        ("schedule", row.schedule_id or "", ""),
        ("job", row.job_name or "", "dim"),
        ("pod", row.pod_name or "", "dim"),
    ]


def _heartbeat_late(row: Run, age_s: float | None) -> str:
    return "alarm" if age_s is not None and age_s > HEARTBEAT_LATE_S and row.status == RUNNING else ""


def _pair_lines(pairs: Sequence[tuple[str, str, str]], width: int) -> list[Line]:
    """Return labels and values, as many beside each other as fit; a long value has a line of its own."""
    lines: list[Line] = []
    spans: list[Span] = []
    for label, value, role in pairs:
        text = f"{safe_text(value)} "
        if not value:
            continue
        cells = -(-max(_PAIR_CELLS, 13 + len(text)) // _PAIR_CELLS) * _PAIR_CELLS
        if spans and sum(len(text) for text, _ in spans) + cells > width:
            lines.append(Line(tuple(spans)))
            spans = []
        spans += [(f" {label:<11} ", "label"), (fit(text, min(cells, width) - 13), role)]
    return [*lines, Line(tuple(spans))]


def _titled(title: str, lines: Sequence[Line]) -> list[Line]:
    return [Line(), Line(((f" {title.upper()}", "title"),)), *lines] if lines else []


def _timeline_lines(row: Run, events: Sequence[JsonObject], width: int, moment: Moment) -> list[Line]:
    """Return a run's timeline with the time that passed before each entry, and what it does now."""
    entries = timeline(events)
    lines, before = [], None
    for entry in entries:
        at = epoch_of(entry.at)
        passed = f"+{format_age(at - before)}" if at is not None and before is not None else ""
        before = at if at is not None else before
        words = fit(safe_text(entry.words), max(10, width - 24))
        lines.append(
            Line(
                (
                    (f"   {clock_time(entry.at)} {passed:>7}  ", "dim"),
                    (f"{entry.mark} ", entry.role),
                    (words, "" if entry.role == "dim" else entry.role),
                )
            )
        )
    if row.status in (RUNNING, BLOCKED) and row.current_task and before is not None:
        attempt = f"  attempt {row.task_attempt}" if (row.task_attempt or 1) > 1 else ""
        passed = f"+{format_age(moment.now - before)}"
        words = fit(f"{safe_text(row.current_task)}{attempt}  now", max(10, width - 24))
        lines.append(Line(((f"   {'':8} {passed:>7}  ", "dim"), ("▸ ", "accent"), (words, "accent"))))
    return lines


def _table_lines(fields: Sequence[Field], rows: Sequence[Any], width: int, moment: Moment) -> list[Line]:
    wanted = [
        max([len(field.title), *(rich.cells.cell_len(field.text(row, moment)) for row in rows)]) for field in fields
    ]
    layout, gap = arrange(fields, [min(want, field.most) for want, field in zip(wanted, fields)], width - 4)
    return [
        Line(
            (
                ("   ", ""),
                *(
                    (fit(field.text(row, moment), size, right=field.right) + " " * gap, field.role(row, moment))
                    for field, size in layout
                ),
            )
        )
        for row in rows
    ]


def describe_lines(row: Any, width: int, moment: Moment) -> list[Line]:
    """Return every column of a row; long values on several lines."""
    lines = [Line()]
    for name, value in row._asdict().items():
        if value in (None, "", ()) or name == "watches":
            continue
        ago = f"  ({age_of(value, moment.now)} ago)" if name.endswith("_at") and age_of(value, moment.now) else ""
        pieces = rich.cells.chop_cells(f"{safe_text(value)}{ago}", max(10, width - 22))
        lines += [
            Line(((f" {name if number == 0 else '':<19} ", "label"), (piece, "")))
            for number, piece in enumerate(pieces)
        ]
    watches = row.watches if isinstance(row, ClusterView) else ()
    return lines + _titled("watches", [line for watch in watches for line in _watch_lines(watch, width, moment)])


def _watch_lines(watch: JsonObject, width: int, moment: Moment) -> list[Line]:
    where = f"{safe_text(watch.get('resource'))} in {safe_text(watch.get('namespace') or 'all namespaces')}"
    synced = age_of(watch.get("synced_at"), moment.now)
    is_good = watch.get("state") == WATCHING
    state = ("live" if is_good else "stale", f"{safe_text(watch.get('state') or 'not started'):<12}")
    lines = [Line(((f"   {where:<46} ", ""), state[::-1], (f"synced {synced} ago" if synced else "", "dim")))]
    if watch.get("error"):
        lines.append(Line(((fit(f"     {safe_text(watch['error'])}", width), "alarm"),)))
    return lines


def yaml_lines(row: Any, width: int) -> list[Line]:
    """Return a row as YAML."""
    said = {name: value for name, value in row._asdict().items() if value is not None}
    text = yaml.safe_dump(json.loads(json.dumps(said)), sort_keys=False, allow_unicode=True, width=max(20, width - 4))
    lines = [Line()]
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        is_pair = colon and not name.startswith((" ", "'", '"'))
        spans = (
            ((f" {safe_text(name)}:", "label"), (safe_text(value), "")) if is_pair else ((f" {safe_text(line)}", ""),)
        )
        lines.append(Line(spans))
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Dashboard: desk
# ----------------------------------------------------------------------------------------------------------------------


class Effect(NamedTuple):
    """What a key or a message wants done outside: quit, copy, details, prompt, bell, theme, suspend."""

    kind: str
    value: Any = None


class RowsTold(NamedTuple):
    """The rows of some tables, whole."""

    tables: Mapping[str, Sequence[Any]]
    counts: Mapping[tuple[str, str], int] | None = None  # where these are not all runs: how many there are


class ChangeTold(NamedTuple):
    """One row changed."""

    table: str
    row: Any
    is_removed: bool = False


class SourceTold(NamedTuple):
    """Where rows come from at present."""

    words: str
    is_live: bool = False


class DetailsTold(NamedTuple):
    """A run's events, volumes and warnings."""

    run_id: str
    details: JsonObject


class LogTold(NamedTuple):
    """Lines of a run's log, each with its time."""

    run_id: str
    texts: Sequence[tuple[str, str]]
    source: str


class NoticeTold(NamedTuple):
    """Something for the person to read."""

    words: str


FeedMessage = Union[RowsTold, ChangeTold, SourceTold, DetailsTold, LogTold, NoticeTold]


class Desk:
    """What the dashboard shows and how it stands: rows and keys in, lines and effects out; it does nothing itself."""

    def __init__(self) -> None:
        self.board = Board()
        self.lists = {name: ListPage(view) for name, view in VIEWS.items()}
        self.pages: list[ListPage | TextPage] = [self.lists["runs"]]  # the last is seen
        self.cluster = ""  # the one whose rows are shown; empty: all
        self.attention = False
        self.has_bell = False
        self.source = SourceTold("reading the cache")
        self.title = "fabrik"
        self.effects: list[Effect] = []
        self.height = 20  # of the page, as last drawn
        self.is_touched = False  # by a person
        self.now = 0.0
        self._notice = ("", 0.0)
        self._details: dict[str, JsonObject] = {}
        self._was_live = False

    @property
    def page(self) -> ListPage | TextPage:
        """What is seen."""
        return self.pages[-1]

    @property
    def listed(self) -> ListPage:
        """The list that is seen, or lies below what is."""
        return next(page for page in reversed(self.pages) if isinstance(page, ListPage))

    @property
    def row(self) -> Any:
        """The row that is meant: the page's own, or the one under the cursor; as it is known now."""
        about = self.page.about if isinstance(self.page, TextPage) else self.page.selected
        return None if about is None else self.row_now(about)

    @property
    def notice(self) -> str:
        """What the person is told at present."""
        words, until = self._notice
        return words if self.now < until else ""

    def row_now(self, row: Any) -> Any:
        """Return what is known of a row now; the row itself where it is gone."""
        return self.board.tables[table_of(row)].get(key_of(row), row)

    def say(self, words: str) -> None:
        """Tell the person something for a few seconds."""
        self._notice = words, self.now + NOTICE_S

    def moment(self, now: float) -> Moment:
        """Return what rows are shown against now."""
        self.now = now
        return Moment(now, self.board.freshness)

    def take_effects(self) -> list[Effect]:
        """Return what is to be done outside, once."""
        effects, self.effects = self.effects, []
        return effects

    def take(self, message: FeedMessage) -> None:
        """Take what the feed tells."""
        if isinstance(message, RowsTold):
            self._take_rows(message)
        elif isinstance(message, ChangeTold):
            self._take_change(message)
        elif isinstance(message, SourceTold):
            self.source = message
            self._was_live = self._was_live or message.is_live
        elif isinstance(message, DetailsTold):
            self._details[message.run_id] = message.details
            self._renew(message.run_id)
        elif isinstance(message, LogTold):
            for page in self.pages:
                if isinstance(page, LogPage) and _is_about(page, message.run_id):
                    page.add(message.texts, message.source)
        else:
            self.say(message.words)

    def refill(self, *tables: str) -> None:
        """Ask the lists anew, of these tables or of all."""
        for page in self.lists.values():
            if not tables or page.view.table in tables:
                page.fill(self.board.tables[page.view.table], self.cluster, attention=self.attention)
                page.reveal(self.height)

    def show(self, name: str) -> None:
        """Show a view's list."""
        self.pages = [self.lists[name]]

    def push(self, page: TextPage) -> None:
        """Show a page above what is seen; the same kind of page takes the place of its like."""
        self.pages = [kept for kept in self.pages if kept.name != page.name] + [page]

    def details_of(self, run_id: str) -> JsonObject | None:
        """Return a run's events, volumes and warnings as far as they were told."""
        return self._details.get(run_id)

    def choose_cluster(self, name: str) -> None:
        """Show one cluster's rows only; empty: all."""
        self.cluster = name
        self.refill()

    def set_filter(self, text: str) -> None:
        """Filter the list that is seen, or search the page."""
        page = self.page
        if isinstance(page, ListPage):
            page.filter = text
            page.fill(self.board.tables[page.view.table], self.cluster, attention=self.attention)
            page.reveal(self.height)
        else:
            page.search = parse_search(text)
            page.find(0)

    def _take_rows(self, message: RowsTold) -> None:
        gates = self._gates()
        fresh = {name: part.connected for name, part in self.board.freshness.items()}
        self.board.replace(message.tables, message.counts)
        self.refill(*message.tables)
        if fresh != {name: part.connected for name, part in self.board.freshness.items()}:
            self.listed.measure_again()  # a cluster's age stands beside its name, or does no more
        if self._was_live:
            self._ring(self._gates() - gates)
        for page in self.pages:
            if isinstance(page, TextPage) and isinstance(page.about, Run):
                self.effects.append(Effect("details", page.about.run_id))

    def _take_change(self, message: ChangeTold) -> None:
        row = message.row
        before = self.board.apply(message.table, row, is_removed=message.is_removed)
        for page in self.lists.values():
            if page.view.table == message.table:
                page.put(key_of(row), None if message.is_removed else row)
        if message.table == "runs":
            if row.status == BLOCKED and (before is None or before.status != BLOCKED):
                self._ring({row.run_id})
            self._renew(row.run_id)
            if any(isinstance(page, TextPage) and _is_about(page, row.run_id) for page in self.pages):
                self.effects.append(Effect("details", row.run_id))

    def _gates(self) -> set[str]:
        return {row.run_id for row in self.board.tables["runs"].values() if row.status == BLOCKED}

    def _ring(self, run_ids: set[str]) -> None:
        if run_ids:
            first, *others = sorted(map(safe_text, run_ids))
            self.say(f"waiting at a human gate: {first}" + (f" and {len(others)} more" if others else ""))
            self.effects += [Effect("bell")] if self.has_bell else []

    def _renew(self, run_id: str) -> None:
        for page in self.pages:
            if isinstance(page, TextPage) and _is_about(page, run_id):
                page.renew()


def _is_about(page: TextPage, run_id: str) -> bool:
    return isinstance(page.about, Run) and page.about.run_id == run_id


def table_of(row: Any) -> str:
    """Return which table a row is of."""
    return (
        "clusters" if isinstance(row, ClusterView) else next(name for name, kind in TABLES.items() if type(row) is kind)
    )


def parse_search(text: str) -> re.Pattern[str] | None:
    """Return what a page is searched for: a regular expression, or a text where it is none; None for nothing."""
    if not text:
        return None
    try:
        return re.compile(text, re.IGNORECASE)
    except (re.error, RecursionError, OverflowError):
        return re.compile(re.escape(text), re.IGNORECASE)


# ----------------------------------------------------------------------------------------------------------------------
# Dashboard: keys
# ----------------------------------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """A key, what it does, and how help and footer tell of it."""

    names: tuple[str, ...]  # a character, or Textual's name; "g r": one after the other
    act: Callable[[Desk], None]
    shown: str
    words: str
    hint: str = ""  # in the footer of lists


def press(desk: Desk, pending: str, name: str) -> str:
    """Do what a key is for, given the keys before it that await another; return those that do after it."""
    desk.is_touched = True
    whole = f"{pending} {name}".strip()
    if any(other.startswith(whole + " ") for key in KEYS for other in key.names):
        return whole
    if name.isdigit() and not pending:
        _choose_numbered(desk, int(name))
    for key in KEYS:
        if whole in key.names:
            key.act(desk)
    return ""


def _mover(pages: float = 0, rows: int = 0) -> Callable[[Desk], None]:
    return lambda desk: desk.page.move(rows or int(pages * max(1, desk.height - 2)), desk.height)


def _viewer(name: str) -> Callable[[Desk], None]:
    return lambda desk: desk.show(name)


def _effect(kind: str, value: Any = None) -> Callable[[Desk], None]:
    return lambda desk: desk.effects.append(Effect(kind, value))


def back(desk: Desk) -> None:
    """Leave the page; in a list: drop the filter, then the cluster, then go to the runs."""
    if len(desk.pages) > 1:
        desk.pages.pop()
    elif desk.listed.filter:
        desk.set_filter("")
    elif desk.cluster:
        desk.choose_cluster("")
    else:
        desk.show("runs")


def open_row(desk: Desk) -> None:
    """Show the row under the cursor whole."""
    row = desk.row
    if isinstance(desk.page, TextPage) or row is None:
        return
    if not isinstance(row, Run):
        _describe(desk)
        return
    desk.push(
        TextPage(
            "run",
            safe_text(row.run_id),
            lambda width, moment: run_lines(desk.row_now(row), desk.details_of(row.run_id), width, moment),
            row,
        )
    )
    desk.effects.append(Effect("details", row.run_id))


def open_logs(desk: Desk) -> None:
    """Show the log of the run that is meant."""
    row = desk.row
    if not isinstance(row, Run):
        desk.say("logs are of runs: choose one first")
        return
    desk.push(LogPage(row))


def _describe(desk: Desk) -> None:
    row = desk.row
    if row is not None:
        make = lambda width, moment: describe_lines(desk.row_now(row), width, moment)  # noqa: E731 - closes over row
        desk.push(TextPage("describe", _title_of(row), make, row))


def _yaml(desk: Desk) -> None:
    row = desk.row
    if row is not None:
        make = lambda width, moment: yaml_lines(desk.row_now(row), width)  # noqa: E731 - closes over row
        desk.push(TextPage("yaml", _title_of(row), make, row))


def _title_of(row: Any) -> str:
    return safe_text(row.run_id if isinstance(row, Run) else row.name)


def _help(desk: Desk) -> None:
    desk.push(TextPage("help", "keys", lambda width, moment: help_lines(width)))


def _sort(desk: Desk) -> None:
    """Sort by the next column that is shown."""
    page = desk.listed
    shown = [field for field, _ in page.layout] or page.fields()
    place = shown.index(page.sorted_by) if page.sorted_by in shown else -1
    sort_by(desk, shown[(place + 1) % len(shown)])


def sort_by(desk: Desk, field: Field) -> None:
    """Sort the list by a column; by the same once more: the other way round."""
    desk.listed.sort_by(field)
    desk.refill(desk.listed.view.table)
    desk.say(f"sorted by {field.title}{', reversed' if desk.listed.is_reversed else ''}")


def _attention(desk: Desk) -> None:
    desk.attention = not desk.attention
    desk.listed.cursor, desk.listed.top = None, 0
    desk.refill("runs")
    desk.say("blocked and failed runs first" if desk.attention else "no run before others")


def _next_cluster(desk: Desk) -> None:
    names = ["", *(state.name for state in desk.board.clusters)]
    desk.choose_cluster(names[(names.index(desk.cluster) + 1) % len(names)] if desk.cluster in names else "")


def _choose_numbered(desk: Desk, number: int) -> None:
    clusters = desk.board.clusters
    if number <= len(clusters):
        desk.choose_cluster(clusters[number - 1].name if number else "")


def _wide(desk: Desk) -> None:
    desk.listed.is_wide = not desk.listed.is_wide
    desk.say("all columns, as far as there is room" if desk.listed.is_wide else "the usual columns")


def _follow(desk: Desk) -> None:
    page = desk.page
    if isinstance(page, LogPage):
        page.is_following = not page.is_following
    else:
        desk.say("f follows a log: open one with l")


def _times(desk: Desk) -> None:
    if isinstance(desk.page, LogPage):
        desk.page.has_times = not desk.page.has_times
        desk.page.renew()


def _copy(desk: Desk) -> None:
    row = desk.row
    if row is not None:
        name = row.run_id if isinstance(row, Run) else row.name
        desk.effects.append(Effect("copy", name))
        desk.say(f"copied {safe_text(name)}")


def _finder(direction: int) -> Callable[[Desk], None]:
    def find(desk: Desk) -> None:
        if isinstance(desk.page, TextPage) and desk.page.search and not desk.page.find(direction):
            desk.say("nothing like that here")

    return find


def _bell(desk: Desk) -> None:
    desk.has_bell = not desk.has_bell
    desk.say(f"the bell at new human gates is {'on' if desk.has_bell else 'off'}")


KEYS: Final = (
    Key(("j", "down"), _mover(rows=1), "j ↓", "down"),
    Key(("k", "up"), _mover(rows=-1), "k ↑", "up"),
    Key(("pagedown", "ctrl+f", "space"), _mover(1), "PgDn space", "a page down"),
    Key(("pageup", "ctrl+b"), _mover(-1), "PgUp", "a page up"),
    Key(("ctrl+d",), _mover(0.5), "^D", "half a page down"),
    Key(("ctrl+u",), _mover(-0.5), "^U", "half a page up"),
    Key(("g g", "home"), _mover(rows=-INT_MAX), "g g Home", "to the top"),
    Key(("G", "end"), _mover(rows=INT_MAX), "G End", "to the end"),
    Key(("enter", "right"), open_row, "Enter →", "the run, or the row, whole", "open"),
    Key(("escape", "h", "left"), back, "Esc h ←", "back; in a list: drop the filter, then the cluster"),
    Key(("l",), open_logs, "l", "the run's log", "logs"),
    Key(("d",), _describe, "d", "describe: every column"),
    Key(("y",), _yaml, "y", "the row as YAML", "yaml"),
    Key(("g r",), _viewer("runs"), "g r", "runs"),
    Key(("g s",), _viewer("schedules"), "g s", "schedules"),
    Key(("g l",), open_logs, "g l", "the run's log"),
    Key(("g v",), _viewer("storage"), "g v", "storage"),
    Key(("g w",), _viewer("warnings"), "g w", "warnings"),
    Key(("g c",), _viewer("clusters"), "g c", "clusters"),
    Key((":",), _effect("prompt", ":"), ":", "command: runs @prod, logs RUN, sort AGE, theme light", "command"),
    Key(("/",), _effect("prompt", "/"), "/", "filter: text, regex, !not, status:blocked cluster:prod", "filter"),
    Key(("n",), _finder(1), "n", "the next match on a page"),
    Key(("N",), _finder(-1), "N", "the match before"),
    Key(("a",), _attention, "a", "attention: blocked and failed runs first", "attention"),
    Key(("s",), _sort, "s", "sort by the next column", "sort"),
    Key(("S",), lambda desk: sort_by(desk, desk.listed.sorted_by), "S", "the other way round"),
    Key(("tab",), _next_cluster, "Tab", "the next cluster", "cluster"),
    Key((), lambda desk: None, "1-9 0", "that cluster; all"),
    Key(("w",), _wide, "w", "wide: all columns"),
    Key(("f",), _follow, "f", "follow the log, or stay"),
    Key(("t",), _times, "t", "times in the log"),
    Key(("c",), _copy, "c", "copy the id"),
    Key(("b",), _bell, "b", "bell at new human gates, on or off"),
    Key(("T",), _effect("theme"), "T", "dark, light"),
    Key(("?",), _help, "?", "this help", "help"),
    Key(("ctrl+z",), _effect("suspend"), "^Z", "to the shell; fg comes back"),
    Key(("q", "ctrl+c", "ctrl+q"), _effect("quit"), "q", "quit", "quit"),
)
HELP_TERMS: Final = (
    ("search", "text or regex, upper and lower case alike; several words: all of them"),
    ("!nightly", "not that"),
    ("status:blocked,failed", "a column begins with one of these; also cluster: phase: task: spec: project:"),
    ("", "template: namespace: run: reason: schedule: class: object:"),
)


def help_lines(width: int) -> list[Line]:
    """Return what `?` shows: the keys in as many columns as fit, then filters and marks."""
    cells = max(len(key.shown) + len(key.words) + 6 for key in KEYS)
    columns = max(1, min(3, width // cells))
    rows = -(-len(KEYS) // columns)
    lines = [Line()]
    for row in range(rows):
        spans: list[Span] = []
        for key in KEYS[row::rows]:
            spans += [(f" {fit(key.shown, 11)} ", "key"), (fit(key.words, max(8, width // columns - 13)), "")]
        lines.append(Line(tuple(spans)))
    lines += [Line(), Line(((" FILTER", "title"),))]
    lines += [Line(((f" {term:<22} ", "key"), (fit(words, max(8, width - 24)), ""))) for term, words in HELP_TERMS]
    lines += [Line(), Line(((" STATUS", "title"),))]
    marks = [span for status, mark in STATUS_MARKS.items() for span in ((f" {mark} {status} ", status), (" ", ""))]
    return [*lines, Line(tuple(marks)), Line(((" it only reads: no key changes a cluster", "dim"),))]


# ----------------------------------------------------------------------------------------------------------------------
# Dashboard: bars
# ----------------------------------------------------------------------------------------------------------------------

ABOVE_LINES: Final = 3  # of the bars above the page


class Chip(NamedTuple):
    """A part of a bar; a click on it runs its command."""

    spans: tuple[Span, ...]
    command: str = ""

    @property
    def cells(self) -> int:
        """How wide it is."""
        return sum(_cells_in(text) for text, _ in self.spans)


def _cells_in(text: str) -> int:
    return len(text) if text.isascii() else rich.cells.cell_len(text)


def bars_above(desk: Desk, width: int, moment: Moment) -> list[list[Chip]]:
    """Return what stands above the page: what is seen and where it comes from; the counts; the clusters."""
    return [_title_bar(desk, width), _count_bar(desk, width), _cluster_bar(desk, width, moment)]


def line_of(chips: Sequence[Chip], base: str) -> Line:
    """Return a bar as a line."""
    return Line(tuple(span for chip in chips for span in chip.spans), base)


def command_at(chips: Sequence[Chip], x: int) -> str:
    """Return the command of what stands at a place of a bar; empty where there is none."""
    left = 0
    for chip in chips:
        if left <= x < left + chip.cells:
            return chip.command
        left += chip.cells
    return ""


def _title_bar(desk: Desk, width: int) -> list[Chip]:
    page = desk.page
    chips = [
        Chip(((f" {desk.title} ", "brand"),), "runs"),
        Chip(((f" {desk.listed.name}", "title"),), desk.listed.name),
    ]
    if isinstance(page, ListPage):
        shown, known = len(page.listing), len(desk.board.tables[page.view.table])
        known = desk.board.count() if page.view.table == "runs" else known
        chips.append(Chip(((f" {shown}" if shown == known else f" {shown} of {known}", "dim"),)))
    else:
        chips.append(Chip(((f" > {page.name} {page.title}", "title"),)))
    if isinstance(page, ListPage) and page.filter:
        chips.append(Chip(((f"  /{safe_text(page.filter)}", "alarm"),), "filter"))
    if desk.attention and isinstance(page, ListPage) and page.view.table == "runs":
        chips.append(Chip((("  ▌attention", BLOCKED),), "attention"))
    state = (f"{'●' if desk.source.is_live else '○'} {desk.source.words} ", "live" if desk.source.is_live else "stale")
    room = width - sum(chip.cells for chip in chips)
    return [*chips, Chip(((fit(state[0], max(0, room), right=True), state[1]),), "clusters")]


def _count_bar(desk: Desk, width: int) -> list[Chip]:
    counts = {status: desk.board.count(status=status, cluster=desk.cluster) for status in STATUS_MARKS}
    for words in ({status: f" {status}" for status in counts}, dict.fromkeys(counts, "")):
        chips = [
            Chip(((f"{STATUS_MARKS[status]} {count}{words[status]}", status), ("  ", "")), f"filter status:{status}")
            for status, count in counts.items()
            if count
        ]
        if sum(chip.cells for chip in chips) < width:
            break
    return [Chip(((" ", ""),)), *chips] if chips else [Chip(((" no runs known", "dim"),))]


def _cluster_bar(desk: Desk, width: int, moment: Moment) -> list[Chip]:
    chips = [_cluster_chip(desk, 0, "", desk.board.count(), "")]
    for number, state in enumerate(desk.board.clusters, 1):
        age = moment.stale_age(state.name)
        chip = _cluster_chip(desk, number, state.name, desk.board.count(cluster=state.name), age)
        if sum(chip.cells for chip in chips) + chip.cells > width - 2:
            return [*chips, Chip(((" …", "dim"),), "clusters")]
        chips.append(chip)
    return chips


def _cluster_chip(desk: Desk, number: int, name: str, count: int, age: str) -> Chip:
    role = "chosen" if desk.cluster == name else "stale" if age else ""
    words = f"{safe_text(name) or 'all'} {count}" + (
        f" ⚠ {age} old" if age not in ("", "never") else " ⚠ not synced" if age else ""
    )
    digit = f" {number} " if number < 10 else " "
    return Chip(
        ((digit, "key" if desk.cluster != name else "chosen"), (f"{words} ", role), (" ", "")), f"cluster {name}"
    )


def bar_below(desk: Desk, pending: str, width: int) -> list[Chip]:
    """Return what stands below the page: what the person is told, else the keys."""
    if pending:
        words = ", ".join(
            f"{name[2:]} {key.words}" for key in KEYS for name in key.names if name.startswith(pending + " ")
        )
        return [Chip(((fit(f" {pending} … {words}", width), "notice"),))]
    if desk.notice:
        return [Chip(((fit(f" {desk.notice}", width), "notice"),))]
    hints = [(key.shown.split()[0], key.hint) for key in KEYS if key.hint]
    if isinstance(desk.page, LogPage):
        hints = [
            ("Esc", "back"),
            ("f", "follow"),
            ("t", "times"),
            ("/", "search"),
            ("n", "next"),
            ("?", "help"),
            ("q", "quit"),
        ]
    elif isinstance(desk.page, TextPage):
        hints = [
            ("Esc", "back"),
            ("l", "logs"),
            ("y", "yaml"),
            ("c", "copy id"),
            ("/", "search"),
            ("?", "help"),
            ("q", "quit"),
        ]
    chips = [Chip(((f" {key}", "key"), (f" {words} ", "dim"))) for key, words in hints]
    while sum(chip.cells for chip in chips) > width:
        chips.pop(-3 if len(chips) > 2 else -1)
    return chips


# What `:` takes, and what is completed.


def run_command(desk: Desk, text: str) -> None:
    """Do what a command says; one that cannot be meant is told of."""
    words = text.split()
    cluster = next((word[1:] for word in words if word.startswith("@")), None)
    name, *rest = [word for word in words if not word.startswith("@")] or [""]
    if name and name not in _COMMANDS:
        desk.say(f"no command '{safe_text(name)}': {nearest(name, _COMMANDS)}")
    elif (cluster is None or _go_to_cluster(desk, cluster)) and name:
        _COMMANDS[name](desk, rest)


def _view_command(name: str) -> Callable[[Desk, Sequence[str]], None]:
    def show(desk: Desk, words: Sequence[str]) -> None:
        desk.show(name)
        if words:
            desk.set_filter(" ".join(words))

    return show


def _key_command(name: str) -> Callable[[Desk, Sequence[str]], object]:
    return lambda desk, words: press(desk, "", name)


def _set_theme(desk: Desk, words: Sequence[str]) -> None:
    if words and words[0] not in PALETTES:
        desk.say(f"themes are {', '.join(PALETTES)}")
    else:
        desk.effects.append(Effect("theme", words[0] if words else None))


def _filter_list(desk: Desk, words: Sequence[str]) -> None:
    desk.pages = [desk.listed]
    desk.set_filter(" ".join(words))


def _go_to_cluster(desk: Desk, name: str) -> bool:
    names = [state.name for state in desk.board.clusters]
    if name and name not in names:
        desk.say(f"no cluster '{safe_text(name)}'" + (f": {nearest(name, names)}" if names else ""))
        return False
    desk.choose_cluster(name)
    return True


def _go_to_run(desk: Desk, words: Sequence[str], act: Callable[[Desk], None]) -> None:
    if words:
        runs = desk.board.tables["runs"]
        keys = [key for key in runs if key[0] == words[0]] or [key for key in runs if key[0].startswith(words[0])]
        if len(keys) != 1:
            desk.say(f"{len(keys) or 'no'} runs begin with '{safe_text(words[0])}'")
            return
        desk.show("runs")
        page = desk.lists["runs"]
        if page.listing.index_of(keys[0]) is None:
            page.filter, desk.cluster = "", ""
            desk.refill()
        page.cursor = keys[0]
        page.reveal(desk.height)
    act(desk)


def _sort_by_title(desk: Desk, words: Sequence[str]) -> None:
    fields = {field.title.lower(): field for field in desk.listed.view.fields}
    field = fields.get(words[0].lower()) if words else None
    if field is None:
        desk.say(f"sort by {', '.join(fields)}")
    else:
        sort_by(desk, field)


_COMMANDS: Final[dict[str, Callable[[Desk, Sequence[str]], object]]] = {
    **{name: _view_command(name) for name in VIEWS},
    "volumes": _view_command("storage"),
    "run": lambda desk, words: _go_to_run(desk, words, open_row),
    "logs": lambda desk, words: _go_to_run(desk, words, open_logs),
    "cluster": lambda desk, words: _go_to_cluster(desk, words[0] if words else ""),
    "filter": _filter_list,
    "sort": _sort_by_title,
    "theme": _set_theme,
    "attention": _key_command("a"),
    "help": _key_command("?"),
    "quit": _key_command("q"),
}


def complete(desk: Desk, text: str) -> list[str]:
    """Return what a command that begins so may be, the likeliest first."""
    head, _, last = text.rpartition(" ")
    name = head.split()[0] if head else ""
    if last.startswith("@"):
        words = [f"@{state.name}" for state in desk.board.clusters]
    elif not head:
        words = list(_COMMANDS)
    elif name in ("run", "logs"):
        words = [key[0] for key in desk.board.tables["runs"]]
    elif name == "cluster":
        words = [state.name for state in desk.board.clusters]
    elif name == "sort":
        words = [field.title.lower() for field in desk.listed.view.fields]
    elif name == "theme":
        words = list(PALETTES)
    else:
        words = [f"status:{status}" for status in STATUS_MARKS]
    return [f"{head} {word}".lstrip() for word in words if word.startswith(last)][:COMPLETIONS_SHOWN]


def completions(desk: Desk, sign: str, text: str) -> list[str]:
    """Return what is typed at a prompt may become: a command at `:`, a filter's terms at `/`."""
    if sign == ":":
        return complete(desk, text)
    name, colon, value = text.rpartition(" ")[2].lstrip("!").partition(":")
    words = {"status": list(STATUS_MARKS), "cluster": [state.name for state in desk.board.clusters]}
    found = words.get(name, []) if colon else TERM_NAMES
    start = text[: len(text) - len(value if colon else name)]
    return [start + word + ("" if colon else ":") for word in found if word.startswith(value if colon else name)]


def click(desk: Desk, x: int, y: int, clicks: int) -> None:
    """Do what a click on the page means: choose a row, twice: open it; on a title: sort by it."""
    page, desk.is_touched = desk.page, True
    if not isinstance(page, ListPage):
        return
    if y == 0:
        field = page.field_at(x)
        if field is not None:
            sort_by(desk, field)
    elif page.top + y - 1 < len(page.listing):
        page.point_at(page.top + y - 1)
        if clicks > 1:
            open_row(desk)


# ----------------------------------------------------------------------------------------------------------------------
# Dashboard: feed
# ----------------------------------------------------------------------------------------------------------------------

_EVENT_TABLES: Final = {"run": "runs", "schedule": "schedules", "volume": "volumes", "warning": "cluster_events"}

AnyClient = Union[Client, RemoteClient]


class Places(NamedTuple):
    """Where the dashboard finds things."""

    cache: str  # empty: the daemon is another host's, and this one's cache is of other clusters
    open_client: Callable[[Callable[[str], None]], AnyClient | None]  # gets what tells of a connection that breaks
    open_log: Callable[[str], subprocess.Popen[bytes]] | None = None  # follows a run's log, each line with its time
    start_daemon: Callable[[], AnyClient] | None = None


class Feed:
    """Tells the desk what there is: from the daemon as it happens, from the cache where none answers.

    `tell` is called in the feed's own threads.
    """

    def __init__(self, places: Places, tell: Callable[[FeedMessage], None]) -> None:
        self._places = places
        self._start_daemon = places.start_daemon
        self.clusters_every_ticks = CLUSTERS_EVERY_TICKS if places.cache else REMOTE_CLUSTERS_EVERY_TICKS
        self._tell = tell
        self._closed = threading.Event()
        self._asked: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._client: AnyClient | None = None
        self._reader: CacheReader | None = None
        self._log: LogReader | None = None
        self._is_live = False
        self._threads = [
            threading.Thread(target=work, name=f"dashboard {name}", daemon=True)
            for name, work in (("stream", self._stream), ("questions", self._answer))
        ]

    def start(self) -> None:
        """Begin to tell."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Tell no more."""
        self._closed.set()
        self._asked.put(None)
        self.follow_log("")
        if self._client is not None:
            self._client.hang_up()
        for thread in self._threads:
            thread.join(FEED_END_S)

    def ask_details(self, run_id: str) -> None:
        """Have a run's events, volumes and warnings told."""
        self._asked.put(lambda: self._tell_details(run_id))

    def ask_clusters(self) -> None:
        """Have the state of the clusters told."""
        self._asked.put(self._tell_clusters)

    def follow_log(self, run_id: str) -> None:
        """Have one run's log told as it comes, and no other's; empty: none."""
        if run_id == (self._log.run_id if self._log is not None else ""):
            return
        if self._log is not None:
            self._log.close()
            self._log = None
        if run_id and self._places.open_log is not None:
            self._log = LogReader(run_id, self._places.open_log, self._tell)
        elif run_id:
            self._asked.put(lambda: self._tell_kept_log(run_id))

    # The stream: the daemon's changes while it answers, the cache meanwhile.

    def _stream(self) -> None:
        version = None
        while not self._closed.is_set():
            self._client = self._connect()
            if self._client is None:
                version = self._tell_cache(version)
                self._closed.wait(RECONNECT_S)
                continue
            try:
                self._follow(self._client)
            except (NotRunningError, RemoteError) as error:
                self._lost(error)
            finally:
                self._client.close()
                version = None

    def _connect(self) -> AnyClient | None:
        try:
            client = self._places.open_client(self._on_trouble)
            if client is None and self._start_daemon is not None:
                start, self._start_daemon = self._start_daemon, None
                self._tell(SourceTold("starting the daemon"))
                client = start()
        except FabrikError as error:
            self._on_trouble(str(error))
            return None
        return client

    def _on_trouble(self, words: str) -> None:
        self._is_live = False
        self._tell(SourceTold("not connected"))
        self._tell(NoticeTold(safe_text(words)))

    def _lost(self, error: FabrikError) -> None:
        self._is_live = False
        if not self._closed.is_set():
            self._tell(SourceTold("no daemon: the cache" if self._places.cache else "no daemon"))
            self._tell(NoticeTold(f"{safe_text(error)}; what was known is shown until one answers"))

    def _follow(self, client: AnyClient) -> None:
        client.wait_forever()
        pieces: dict[str, list[Any]] = {}
        for message in client.follow("subscribe", clusters=["*"], snapshot=True):
            kind, _, change = str(message["type"]).partition(":")
            if kind in _EVENT_TABLES:
                row = row_from(_EVENT_TABLES[kind], message["row"])
                self._tell(ChangeTold(_EVENT_TABLES[kind], row, is_removed=change == "removed"))
            elif kind == "cluster":
                self.ask_clusters()
            elif kind == "snapshot":
                for table in TABLES:
                    pieces.setdefault(table, []).extend(row_from(table, said) for said in message.get(table) or ())
                if message.get("last"):
                    self.ask_clusters()
                    self._tell(RowsTold(pieces))
                    pieces = {}
            if not self._is_live and not pieces and kind != "subscribed":
                self._is_live = True
                self._tell(SourceTold("live", is_live=True))

    def _tell_cache(self, version: int | None) -> int | None:
        """Tell what the cache holds, if it was written since it had this version; return the version it has."""
        if not self._places.cache:
            return None
        try:
            if self._reader is None:
                self._reader = CacheReader(self._places.cache)
            found = int(self._reader.rows("PRAGMA data_version")[0]["data_version"])
            if found != version:
                told = cached_rows(self._reader)
                away = [state._replace(connected=False) for state in told.tables["clusters"]]  # whatever its lock says
                self._tell(RowsTold({**told.tables, "clusters": away}))
                self._tell(SourceTold("no daemon: the cache"))
        except CacheError as error:
            self._reader = None
            self._tell(SourceTold(f"no daemon: {safe_text(error.message)}"))
            return None
        return found

    # Questions: one after the other, each on a connection of its own.

    def _answer(self) -> None:
        for work in iter(self._asked.get, None):
            if not self._closed.is_set():
                with contextlib.suppress(FabrikError):  # the stream tells what is wrong
                    work()

    def _ask(self, action: str, **fields: Any) -> JsonObject | None:
        """Return the daemon's answer; None where none answers."""
        client = self._places.open_client(lambda line: None)
        if client is None:
            return None
        try:
            return client.ask(action, **fields)
        except NotRunningError:
            return None
        finally:
            client.close()

    def _tell_clusters(self) -> None:
        reply = self._ask("status")
        if reply is not None:
            self._tell(RowsTold({"clusters": [_cluster_from_status(said) for said in reply["clusters"]]}))

    def _tell_details(self, run_id: str) -> None:
        self._tell(DetailsTold(run_id, self._details_of(run_id)))

    def _tell_kept_log(self, run_id: str) -> None:
        texts = log_texts(self._details_of(run_id).get("events") or [])
        self._tell(LogTold(run_id, texts, "the lines that were kept of this run"))

    def _details_of(self, run_id: str) -> JsonObject:
        reply = self._ask("run", runId=run_id)
        if reply is not None:
            details: JsonObject = reply["run"]
            return details
        if not self._places.cache:
            return {}
        with contextlib.closing(CacheReader(self._places.cache)) as reader:
            return reader.run_details(run_id)


class LogReader:
    """Reads one run's log from a process that follows it, in a thread of its own."""

    def __init__(
        self, run_id: str, open_log: Callable[[str], subprocess.Popen[bytes]], tell: Callable[[FeedMessage], None]
    ) -> None:
        self.run_id = run_id
        self._tell = tell
        self._process = open_log(run_id)
        self._source = "what its Pods print"
        self._is_closed = False
        threading.Thread(target=self._read, name="dashboard log", daemon=True).start()

    def close(self) -> None:
        """Read no more; the process ends."""
        self._is_closed = True
        self._process.terminate()

    def _read(self) -> None:
        """Tell lines as they come, those that come together at once; what the process says of itself is the source."""
        with self._process as process:
            streams = {stream.fileno(): b"" for stream in (process.stdout, process.stderr) if stream is not None}
            out = next(iter(streams))
            while streams and not self._is_closed:
                for file in select.select(list(streams), [], [])[0]:
                    data = os.read(file, READ_BYTES)
                    *lines, streams[file] = (streams[file] + data).split(b"\n")
                    if not data:
                        del streams[file]
                    self._take([line.decode("utf-8", "replace") for line in lines], is_log=file == out)
        if not self._is_closed:
            self._tell(LogTold(self.run_id, (), f"{self._source}; it is over"))

    def _take(self, lines: Sequence[str], *, is_log: bool) -> None:
        if not is_log and lines:
            self._source = safe_text(lines[-1].rpartition(f"{self.run_id}: ")[2].replace("fabrik-daemon: ", ""))
        texts = [_timed(line) for line in lines] if is_log else []
        if lines and not self._is_closed:
            self._tell(LogTold(self.run_id, texts, self._source))


def _timed(line: str) -> tuple[str, str]:
    """Return a log line's time and text; lines that were kept may have no time."""
    at, _, text = line.partition(" ")
    return (at, text) if epoch_of(at) is not None else ("", line)


def open_log(run_id: str, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a process that follows a run's log: `runs logs`."""
    words = ("runs", "logs", "--id", run_id, "--follow", "--timestamps", "--tail", str(LOG_TAIL_LINES))
    return subprocess.Popen(
        own_command(*words),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(environment),
    )


def row_from(table: str, said: JsonObject) -> TableRow:
    """Return a row as the daemon said it; columns that only another version knows are left out."""
    kind = TABLES[table]
    return kind(**{name: value for name, value in said.items() if name in kind._fields})


def cached_rows(reader: CacheReader, first: int = -1) -> RowsTold:
    """Return the rows of the cache, or so many runs, the newest first; all clusters. Raises CacheError."""
    tables: dict[str, list[Any]] = {}
    counts = None
    try:
        for table, kind in TABLES.items():
            gone = " WHERE deleted_at IS NULL" if table == "volumes" else ""
            order = f" ORDER BY created_at DESC, run_id DESC LIMIT {first}" if table == "runs" and first > 0 else ""
            found = reader.connection.execute(f"SELECT {', '.join(kind._fields)} FROM {table}{gone}{order}")  # noqa: S608
            tables[table] = [kind(*values) for values in found]
        if first > 0:
            grouped = reader.connection.execute("SELECT cluster, status, count(*) FROM runs GROUP BY cluster, status")
            counts = {(cluster, status or UNKNOWN): count for cluster, status, count in grouped}
    except sqlite3.Error as error:
        raise CacheError(f"the cache cannot be read: {error}") from None
    watches: dict[str, list[JsonObject]] = {}
    for watch in reader.rows("SELECT * FROM watches ORDER BY namespace, resource"):
        watches.setdefault(watch["cluster"], []).append(watch)
    columns = "SELECT name, server, priority, last_event_at, error, uid FROM clusters"
    fresh = {part.cluster: part for part in reader.freshness()}
    tables["clusters"] = [
        ClusterView(
            **row,
            connected=fresh[row["name"]].connected,
            synced_at=fresh[row["name"]].synced_at,
            watches=tuple(watches.get(row["name"], ())),
        )
        for row in reader.rows(columns)
    ]
    return RowsTold(tables, counts)


def _cluster_from_status(said: JsonObject) -> ClusterView:
    names = ("name", "server", "priority", "connected", "synced_at", "last_event_at", "error", "uid")
    known: JsonObject = {name: said.get(name) for name in names}
    skew_s = said.get("clock_skew_seconds") or 0.0
    return ClusterView(**known, skew_s=skew_s, watches=tuple(said.get("watches") or ()))


# ----------------------------------------------------------------------------------------------------------------------
# Dashboard: screens
# ----------------------------------------------------------------------------------------------------------------------

_CSS: Final = f"""
Screen {{ overflow: hidden; }}
Bar {{ height: 1; }}
#above {{ height: {ABOVE_LINES}; }}
Rows {{ height: 1fr; scrollbar-size-vertical: 1; overflow-x: hidden; overflow-y: auto; }}
Prompt {{ height: 1; display: none; layout: horizontal; }}
Prompt Bar {{ width: 3; }}
Prompt Input {{ border: none; padding: 0; height: 1; width: 1fr; }}
Prompt Input:focus {{ border: none; }}
"""
_THEMES: Final[dict[str, Any]] = {  # what Textual itself paints: scrollbars and the prompt
    "dark": {"primary": "#7aa2f7", "background": "#14171f", "surface": "#1d212c", "panel": "#1d212c", "dark": True},
    "light": {"primary": "#2a5bd7", "background": "#fbfbfc", "surface": "#eceef2", "panel": "#eceef2", "dark": False},
}


class DashboardOptions(NamedTuple):
    """How the dashboard begins."""

    palette: str = "dark"
    has_bell: bool = False
    title: Callable[[], str] = lambda: "fabrik"
    is_over: Callable[[], bool] = lambda: False  # then it ends, unless somebody has pressed a key


def theme_of(palette: str) -> str:
    """Return the name of Textual's theme that goes with a palette."""
    return f"fabrik-{palette}" if palette in _THEMES else "ansi-dark"


class Painter:
    """Lines -> strips, in one palette."""

    def __init__(self, palette: str) -> None:
        self.palette = palette
        self._styles: dict[tuple[str, str], rich.style.Style] = {}

    def paint(self, line: Line, width: int) -> textual.strip.Strip:
        """Return a line in exactly so many cells. No text is ever taken for markup."""
        segments = [rich.segment.Segment(text, self._style(role, line.base)) for text, role in line.spans if text]
        return textual.strip.Strip(segments).adjust_cell_length(width, self._style("", line.base))

    def _style(self, role: str, base: str) -> rich.style.Style:
        style = self._styles.get((role, base))
        if style is None:
            style = self._styles[role, base] = style_of(self.palette, role, base)
        return style


def _widget_classes() -> Any:  # noqa: C901 - its classes' methods count
    """Return the classes of bars, of the rows, and of the prompt."""

    class Bar(textual.widget.Widget):
        """Lines at an edge of the screen; a click on one of its chips runs that one's command."""

        def __init__(self, **more: Any) -> None:
            super().__init__(**more)
            self._chips: list[list[Chip]] = []
            self._lines: list[Line] = []
            self.painter = Painter("dark")

        def show(self, bars: list[list[Chip]]) -> None:
            """Show these from now on."""
            lines = [line_of(chips, "bar" if place == 0 else "") for place, chips in enumerate(bars)]
            self._chips = bars
            if lines != self._lines:
                self._lines = lines
                self.refresh()

        def render_line(self, y: int) -> textual.strip.Strip:
            return self.painter.paint(self._lines[y] if y < len(self._lines) else Line(), self.size.width)

        def on_click(self, event: textual.events.Click) -> None:
            command = command_at(self._chips[event.y], event.x) if event.y < len(self._chips) else ""
            if command:
                self.app.do_command(command)  # type: ignore[attr-defined]

    class Rows(textual.scroll_view.ScrollView):
        """A page's lines; only those that are seen are ever made, and of them only those that changed are drawn."""

        def __init__(self) -> None:
            super().__init__()
            self._lines: list[Line] = []
            self._is_syncing = False
            self.painter = Painter("dark")

        def show(self, desk: Desk, moment: Moment) -> None:
            """Show the desk's page as it is now."""
            page, size = desk.page, self.scrollable_content_region.size
            desk.height = size.height
            lines = page.draw(size.width, size.height, moment)
            self._is_syncing = True
            whole = textual.geometry.Size(size.width, page.size(size.width, moment) + page.headings)
            if self.virtual_size != whole:
                self.virtual_size = whole
            self.scroll_target_y = self.scroll_y = page.top
            self._is_syncing = False
            before, self._lines = self._lines, lines
            if len(before) != len(lines):
                self.refresh()
                return
            for y, line in enumerate(lines):
                if line != before[y]:
                    self.refresh(textual.geometry.Region(0, y, size.width, 1))

        def watch_scroll_y(self, old_value: float, new_value: float) -> None:
            super().watch_scroll_y(old_value, new_value)
            if not self._is_syncing:
                self.app.on_scrolled(round(new_value))  # type: ignore[attr-defined]

        def render_line(self, y: int) -> textual.strip.Strip:
            return self.painter.paint(self._lines[y] if y < len(self._lines) else Line(), self.size.width)

        def on_click(self, event: textual.events.Click) -> None:
            self.app.on_row_clicked(event.x, event.y, event.chain)  # type: ignore[attr-defined]

    class Typed(textual.widgets.Input):
        """What is typed at the prompt; keys that came after it was closed are the dashboard's."""

        def on_key(self, event: textual.events.Key) -> None:
            if self.app.on_prompt_key(event):  # type: ignore[attr-defined]
                event.stop()
                event.prevent_default()

    class Prompt(textual.widget.Widget):
        """Where commands and filters are typed."""

        def compose(self) -> Iterator[textual.widget.Widget]:
            yield Bar()
            yield Typed(select_on_focus=False)

        def open(self, sign: str, text: str) -> None:
            """Let something be typed, from a text on."""
            self.display = True
            self.query_one(Bar).show([[Chip(((f" {sign} ", "key"),))]])
            field = self.query_one(Typed)
            field.value = text
            field.cursor_position = len(text)
            self.app.set_focus(field)

    return Bar, Rows, Prompt


def make_dashboard(  # noqa: C901 - its classes' methods count
    desk: Desk, make_feed: Callable[[Callable[[FeedMessage], None]], Feed], options: DashboardOptions
) -> textual.app.App[int]:
    """Return the app; its classes stand in functions, since importing what they inherit from takes 130 ms."""
    bar_class, rows_class, prompt_class = _widget_classes()

    class Completion(textual.suggester.Suggester):
        """Completes what is typed at the prompt."""

        async def get_suggestion(self, value: str) -> str | None:
            return next(iter(completions(desk, app.sign, value)), None) if value else None

    class Dashboard(textual.app.App[int]):
        """Keys, clicks and the feed's messages -> the desk; the desk -> the screen."""

        CSS = _CSS
        ENABLE_COMMAND_PALETTE = False
        AUTO_FOCUS = None

        def __init__(self) -> None:
            super().__init__(ansi_color=None if options.palette in _THEMES else True)
            self.sign = ""  # of the open prompt: ":" or "/"
            self._pending = ""  # keys that await another
            self._told: deque[FeedMessage] = deque()
            self._is_woken = False
            self._drawn_at = 0.0
            self._draws_soon = False
            self._ticks = 0
            self._feed = make_feed(self._on_told)
            for name, colours in _THEMES.items():
                self.register_theme(textual.theme.Theme(name=f"fabrik-{name}", **colours))
            self.palette = options.palette
            self.theme = theme_of(self.palette)  # here, where no style sheet needs parsing again for it

        def compose(self) -> Iterator[textual.widget.Widget]:
            yield bar_class(id="above")
            yield rows_class()
            yield bar_class(id="below")
            yield prompt_class()

        def on_mount(self) -> None:
            self.query_one("Input", textual.widgets.Input).suggester = Completion(use_cache=False, case_sensitive=True)
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):  # not in the main thread
                    loop.add_signal_handler(number, self.exit, 128 + number)
            self.set_interval(1.0, self._tick)
            self.use_palette(self.palette)
            self.call_after_refresh(self._start_feed)

        def _start_feed(self) -> None:
            """Begin once the first screen stands there: reading all rows would delay it."""
            self.draw()
            self.call_after_refresh(self._feed.start)

        def on_unmount(self) -> None:
            self._feed.close()

        def use_palette(self, name: str) -> None:
            """Paint in other colours, if in any."""
            if self.no_color:
                name = PLAIN_PALETTE
            self.palette, self.theme, self.ansi_color = name, theme_of(name), None if name in _THEMES else True
            for widget in self.query("Bar, Rows"):
                widget.painter = Painter(name)  # type: ignore[attr-defined]
                widget.refresh()

        # Messages of the feed

        def _on_told(self, message: FeedMessage) -> None:
            """Take a message in the feed's thread."""
            self._told.append(message)
            if not self._is_woken:
                self._is_woken = True
                self.call_later(self._take_told)

        def _take_told(self) -> None:
            self._is_woken = False
            while self._told:
                desk.take(self._told.popleft())
            self.draw_soon()

        def _tick(self) -> None:
            self._ticks += 1
            if self._ticks % self._feed.clusters_every_ticks == 0 and desk.source.is_live:
                self._feed.ask_clusters()
            if options.is_over() and not desk.is_touched:
                self.exit(0)
            self.draw()

        # Drawing

        def draw_soon(self) -> None:
            """Draw, but not more often than anybody could see."""
            if self._draws_soon:
                return
            wait_s = self._drawn_at + DRAW_EVERY_S - time.monotonic()
            if wait_s <= 0:
                self.draw()
            else:
                self._draws_soon = True
                self.set_timer(wait_s, self.draw)

        def draw(self) -> None:
            """Bring the screen up to date."""
            self._draws_soon, self._drawn_at = False, time.monotonic()
            moment, width, desk.title = desk.moment(time.time()), self.size.width, options.title()
            self.query_one("Rows", rows_class).show(desk, moment)
            self.query_one("#above", bar_class).show(bars_above(desk, width, moment))
            self.query_one("#below", bar_class).show([bar_below(desk, self._pending, width)])
            self._do_effects()

        def on_resize(self) -> None:
            self.call_after_refresh(self.draw)

        # What the person does

        async def on_event(self, event: textual.events.Event) -> None:
            """Take keys before a widget gets them, so that those after `/` and `:` find the prompt open."""
            if isinstance(event, textual.events.Key) and not event.is_forwarded and not self.sign:
                self._press(event)
            else:
                await super().on_event(event)

        def _press(self, event: textual.events.Key) -> None:
            is_character = event.is_printable and event.character and event.key != "space"
            self._pending = press(desk, self._pending, (is_character and event.character) or event.key)
            self.draw()

        def on_prompt_key(self, event: textual.events.Key) -> bool:
            """Take a key that has reached the prompt; say whether it meant something else than a text."""
            field = self.query_one("Input", textual.widgets.Input)
            if not self.sign:
                self._press(event)
            elif event.key in ("escape", "ctrl+c"):
                if self.sign == "/":
                    desk.set_filter("")
                self.close_prompt()
            elif event.key == "tab":
                field.value = next(iter(completions(desk, self.sign, field.value)), field.value)
                field.cursor_position = len(field.value)
            elif event.key == "enter":
                sign = self.sign
                self.close_prompt()
                if sign == ":":
                    self.do_command(field.value)
                else:
                    desk.set_filter(field.value)  # what changed last may not have been told yet
                    self.draw()
            else:
                return False
            return True

        def open_prompt(self, sign: str) -> None:
            """Let something be typed."""
            self.sign = sign
            is_filter = sign == "/" and isinstance(desk.page, ListPage)
            self.query_one("Prompt", prompt_class).open(sign, desk.listed.filter if is_filter else "")

        def close_prompt(self) -> None:
            """Have keys mean keys again."""
            self.sign = ""
            self.query_one("Prompt").display = False
            self.set_focus(None)
            desk.say("")
            self.draw()

        def on_input_changed(self, event: textual.widgets.Input.Changed) -> None:
            if self.sign == "/":
                desk.set_filter(event.value)
            elif self.sign:
                desk.say("  ".join(completions(desk, ":", event.value)))
            self.draw()

        def do_command(self, text: str) -> None:
            """Do what a command or a click says."""
            run_command(desk, text)
            self.draw()

        def on_scrolled(self, top: int) -> None:
            """Show the lines from there on."""
            if top != desk.page.top:
                desk.page.top = top
                if isinstance(desk.page, LogPage):
                    desk.page.is_following = False
                self.draw_soon()

        def on_row_clicked(self, x: int, y: int, clicks: int) -> None:
            """Choose a row, open it, or sort by a column."""
            click(desk, x, y, clicks)
            self.draw()

        # What the desk wants done

        def _do_effects(self) -> None:
            for effect in desk.take_effects():
                if effect.kind == "quit":
                    self.exit(0)
                elif effect.kind == "prompt":
                    self.open_prompt(effect.value)
                elif effect.kind == "copy":
                    self.copy_to_clipboard(effect.value)
                elif effect.kind == "bell":
                    self.bell()
                elif effect.kind == "theme":
                    self.use_palette(effect.value or ("light" if self.palette == "dark" else "dark"))
                elif effect.kind == "suspend":
                    self.action_suspend_process()
                elif effect.kind == "details":
                    self._feed.ask_details(effect.value)
            logs = [page.about.run_id for page in desk.pages if isinstance(page, LogPage)]
            self._feed.follow_log(logs[0] if logs else "")

    app = Dashboard()
    return app


def run_dashboard(places: Places, options: DashboardOptions) -> int:
    """Show the dashboard until it is left; return the exit code. The cache is on the screen before anybody is asked."""
    gc.disable()  # imports and the first rows make no garbage
    desk = Desk()
    desk.has_bell = options.has_bell
    if places.cache:
        with contextlib.suppress(CacheError), contextlib.closing(CacheReader(places.cache)) as reader:
            desk.take(cached_rows(reader, FIRST_ROWS))
    app = make_dashboard(desk, lambda tell: Feed(places, tell), options)
    gc.freeze()
    gc.enable()
    code = app.run()
    if code is None and app.return_code:
        raise FabrikError("the dashboard has met a defect", "please report the lines above")
    return code or 0


# ----------------------------------------------------------------------------------------------------------------------
# Services
# ----------------------------------------------------------------------------------------------------------------------


class Manifest(NamedTuple):
    """One kind of what `manifests` prints: its template, what it is, and the names in it with their defaults.

    A name may stand in the template's own name, to choose between some; `included` is one that goes into the other.
    """

    template: str
    summary: str
    defaults: Mapping[str, str]
    included: str = ""


MANIFESTS: Final = {
    "deployment": Manifest(
        "deployment.yaml",
        "the daemon in a cluster, in remote mode",
        {
            "namespace": "fabrik-system",
            "image": f"ghcr.io/dtechvision/fabrik-daemon:{__version__}",
            "host": "fabrik.example.com",  # what clients call it, beside the Service's names
            "ingress_namespace": "kube-system",  # where k3s has its ingress controller
            "monitoring_namespace": "monitoring",
        },
    ),
    "prometheus": Manifest(
        "prometheus-$form.yaml",
        "how Prometheus finds the daemon",
        {
            "form": "service",
            "address": "192.0.2.10",  # RFC 5737: nobody's
            "port": "9464",
            "namespace": "monitoring",
            "daemon_namespace": "fabrik-system",
            "release": "prometheus",
            "interval": "15s",
        },
    ),
    "prometheus-rules": Manifest(
        "prometheus-rules-$form.yaml",
        "the alerts as rules over the metrics",
        {"form": "operator", "namespace": "monitoring", "release": "prometheus"},
        included="prometheus-rules-file.yaml",
    ),
    "alertmanager": Manifest(
        "alertmanager.yaml",
        "routes and receivers for the alerts",
        {
            "pagerduty_key": "REPLACE-WITH-THE-ROUTING-KEY",
            "pagerduty_url": "https://events.pagerduty.com/v2/enqueue",
            "zulip_url": "https://zulip.example.com/api/v1/external/alertmanager?api_key=REPLACE&stream=fabrik",
        },
    ),
    "grafana": Manifest("grafana.json", "a dashboard", {}),
}
_FORMS: Final = {  # which values a name that chooses a template may have
    "prometheus": ("service", "scrapeconfig", "cluster", "file"),
    "prometheus-rules": ("operator", "file"),
}


def fill_template(name: str, values: Mapping[str, str]) -> str:
    """Return a file of service-templates/, `$$` made `$`, each `$name` its value. Raises KeyError for one without."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "service-templates", name)
    with open(path, encoding="utf-8") as file:
        return string.Template(file.read()).substitute(values)


def format_manifest(kind: str, chosen: Mapping[str, str]) -> str:
    """Return one of MANIFESTS with the values chosen in place of its defaults. Raises UsageError."""
    manifest = MANIFESTS[kind]
    for name, value in chosen.items():
        if name not in manifest.defaults:
            raise UsageError(f"manifest {kind} has no {name!r} to set", nearest(name, manifest.defaults))
        if not value.isprintable():
            raise UsageError(f"--set {name}: {value!r} is not one line of text")
    values = {**manifest.defaults, **chosen}
    if "form" in values and values["form"] not in _FORMS[kind]:
        raise UsageError(f"manifest {kind} has no form {values['form']!r}", nearest(values["form"], _FORMS[kind]))
    if manifest.included:
        lines = fill_template(manifest.included, values).splitlines()
        values["included"] = "\n".join(f"  {line}" for line in lines if not line.startswith("#"))
    return fill_template(string.Template(manifest.template).substitute(values), values)


# ----------------------------------------------------------------------------------------------------------------------
# Services: installing
# ----------------------------------------------------------------------------------------------------------------------


class Installation(NamedTuple):
    """What is to be installed, where, and what of this moment the service takes along."""

    manager: str  # one of MANAGERS
    system: bool  # the host's, with a user of its own; else its user's
    on_demand: bool  # systemd listens, and starts it for the first who asks
    root: str  # put before every path, for an image; empty: this host
    home: str
    program: str  # the executable's place after installing
    command: tuple[str, ...]  # that starts it: interpreter and program, both absolute
    environment: Mapping[str, str]
    socket: str  # what systemd listens on
    crash_file: str  # launchd: where last words go

    @property
    def unit(self) -> str:
        """The unit that is enabled."""
        return "fabrik-daemon.socket" if self.on_demand else "fabrik-daemon.service"

    @property
    def main_file(self) -> str:
        """The path of the file that describes the service."""
        return self.files()[-1].path

    def files(self) -> list[ServiceFile]:
        """Return the files that make the service, the one that describes it last."""
        if self.manager == "launchd":
            path = f"{self.home}/Library/LaunchAgents/fabrik.daemon.plist"
            return [ServiceFile(path, launchd_plist(self), 0o644)]
        if self.manager == "openrc":
            return [ServiceFile("/etc/init.d/fabrik-daemon", openrc_script(self).encode(), 0o755)]
        folder = "/etc/systemd/system" if self.system else f"{self.home}/.config/systemd/user"
        files = []
        if self.system:
            users = fill_template("fabrik-daemon.sysusers", {})
            files.append(ServiceFile("/etc/sysusers.d/fabrik-daemon.conf", users.encode(), 0o644))
        if self.on_demand:
            group = {"mode": "0660", "group": "SocketGroup=fabrik"} if self.system else {"mode": "0600", "group": ""}
            socket_unit = fill_template("fabrik-daemon.socket", {"socket": _specifiers(self.socket), **group})
            files.append(ServiceFile(f"{folder}/fabrik-daemon.socket", socket_unit.encode(), 0o644))
        # A proxy's password may stand in a user's; a system unit is told to everybody whatever its mode.
        mode = 0o644 if self.system else 0o600
        return [*files, ServiceFile(f"{folder}/fabrik-daemon.service", systemd_unit(self).encode(), mode)]


class ServiceFile(NamedTuple):
    """A file of a service."""

    path: str
    content: bytes
    mode: int


MANAGERS: Final = ("systemd", "launchd", "openrc")
# What exec plugins and the kubernetes client take from the environment: places and names of profiles, never secrets.
SERVICE_VARIABLES: Final = (
    *("PATH", "KUBECONFIG", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
    *("AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("AZURE_CONFIG_DIR", "CLOUDSDK_CONFIG", "CLOUDSDK_ACTIVE_CONFIG_NAME", "GOOGLE_APPLICATION_CREDENTIALS"),
)
_HOMES: Final = ("/home/", "/root/", "/run/user/")  # what ProtectHome hides


def manager_of_host() -> str:
    """Return which service manager runs this host. Raises ServiceError where none of MANAGERS does."""
    if sys.platform == "darwin":
        return "launchd"
    if os.path.isdir("/run/systemd/system"):  # sd_booted(3)
        return "systemd"
    if os.path.isdir("/run/openrc"):
        return "openrc"
    raise ServiceError("neither systemd, launchd nor OpenRC runs this host", "--manager names the one to install for")


def service_environment(environment: Mapping[str, str], *, system: bool) -> tuple[dict[str, str], list[str]]:
    """Return what a service keeps of the environment, and notes on what it does not.

    Of paths only the absolute are kept, and of a system service's only those outside homes, which it cannot see.
    """
    kept: dict[str, str] = {}
    notes: list[str] = []
    for name in SERVICE_VARIABLES:
        value = environment.get(name, "")
        if name in ("PATH", "KUBECONFIG"):
            parts = value.split(os.pathsep)
            if name == "KUBECONFIG":
                parts = [os.path.abspath(expand_home(part, environment)) for part in parts if part]
            hidden = [part for part in parts if system and f"{part}/".startswith(_HOMES)]
            if hidden and name == "KUBECONFIG":
                notes.append(f"the service cannot read {', '.join(hidden)}: put a copy into /etc/fabrik/daemon")
            parts = [part for part in parts if part.startswith("/") and part not in hidden]
            value = os.pathsep.join(dict.fromkeys(parts))
        elif system and f"{value}/".startswith(_HOMES):
            continue
        if value:
            kept[name] = value
        if system and "proxy" in name.lower() and "@" in value:
            notes.append(f"everybody on this host can read the password in {name}")
    for name, value in kept.items():
        if not value.isprintable():
            raise UsageError(f"{name} is not one line of text", "set it anew, or unset it")
    return kept, notes


def service_command(program: str, *, system: bool) -> tuple[str, ...]:
    """Return interpreter and program of the service: the executable's copy, else what runs now. Raises ServiceError.

    The executable needs nothing of a virtual environment, which may go.
    """
    source = os.path.realpath(sys.argv[0])
    if not zipfile.is_zipfile(source):
        return sys.executable, source
    interpreter = os.path.abspath(getattr(sys, "_base_executable", sys.executable))
    if system and interpreter.startswith(_HOMES):
        hint = f"run this with the system's own, as in: /usr/bin/python3 {sys.argv[0]} install-service --system"
        raise ServiceError(f"the service's user cannot run {interpreter}", hint)
    return interpreter, program


def systemd_unit(installation: Installation) -> str:
    """Return the service unit."""
    name = "fabrik-daemon-system.service" if installation.system else "fabrik-daemon.service"
    environment = [f"Environment={_systemd_word(f'{key}={value}')}" for key, value in installation.environment.items()]
    interpreter, *words = map(_systemd_word, installation.command)
    command = [interpreter, *(word.replace("$", "$$") for word in words)]  # no variable is looked for in the first
    return fill_template(name, {"command": " ".join(command), "environment": "\n".join(environment) or "# (nothing)"})


def openrc_script(installation: Installation) -> str:
    """Return the OpenRC service script."""
    words = [*installation.command, "start", "--foreground"]
    exports = [f"export {key}={shlex.quote(value)}" for key, value in installation.environment.items()]
    values = {
        "interpreter": shlex.quote(words[0]),
        "arguments": shlex.quote(" ".join(shlex.quote(word) for word in words[1:])),
        "environment": "\n".join(exports) or "# (nothing)",
    }
    return fill_template("fabrik-daemon.openrc", values)


def launchd_plist(installation: Installation) -> bytes:
    """Return the launchd agent: once it is ready, last words alone reach the file for them."""
    agent = plistlib.loads(fill_template("fabrik.daemon.plist", {}).encode())
    agent["ProgramArguments"] = [*installation.command, *agent["ProgramArguments"]]
    agent["EnvironmentVariables"] = dict(installation.environment)
    agent["StandardErrorPath"] = installation.crash_file
    return plistlib.dumps(agent, sort_keys=False)


def _systemd_word(text: str) -> str:
    """Return a word in a unit's quotes, as systemd.syntax(7) has it."""
    quoted = _specifiers(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{quoted}"'


def _specifiers(text: str) -> str:
    return text.replace("%", "%%")


class Installer:
    """Does what an installation takes, or only tells it, a line for each step."""

    def __init__(self, installation: Installation, tell: Callable[[str], None], *, dry_run: bool) -> None:
        self._service = installation
        self._tell = tell
        self._dry_run = dry_run
        self._changed = False

    def install(self, stop_other: Callable[[], None] | None) -> None:
        """Put the files in place and enable the service. Raises ServiceError.

        With `stop_other`, which ends a daemon that was started by hand, the service is also started now.
        """
        service = self._service
        self._copy_program()
        for file in service.files():
            self._write(file)
        if service.system:
            self._make_user()
            self._make_configuration()
        if service.manager == "launchd":
            self._make_folder(os.path.dirname(service.crash_file))
        elif service.manager == "openrc":
            self._run("rc-update", "add", "fabrik-daemon", "default")
        else:
            if not service.root:
                self._systemctl("daemon-reload")
            self._systemctl("enable", service.unit)
        if stop_other is not None:
            if not self._is_running():
                self._step("a daemon that was started by hand is ended", "end a daemon that was started by hand")
                if not self._dry_run:
                    stop_other()
            self._start()

    def uninstall(self) -> None:
        """End the service and take its files away; settings, cache and executable stay. Raises ServiceError."""
        service = self._service._replace(on_demand=self._service.manager == "systemd")
        found = [file.path for file in service.files() if os.path.exists(self._at(file.path))]
        if not found:
            self._tell("nothing is installed")
            return
        if service.manager == "launchd":
            self._run("launchctl", "bootout", self._agent(), may_fail=True)
        elif service.manager == "openrc":
            self._run("rc-service", "--ifstarted", "fabrik-daemon", "stop")
            self._run("rc-update", "delete", "fabrik-daemon", "default", may_fail=True)
        else:
            units = [os.path.basename(path) for path in found if path.endswith((".socket", ".service"))]
            self._systemctl("disable", *(() if service.root else ("--now",)), *units)
        for path in found:
            self._step(f"removed {self._at(path)}", f"remove {self._at(path)}")
            if not self._dry_run:
                os.unlink(self._at(path))
        if service.manager == "systemd" and not service.root:
            self._systemctl("daemon-reload")

    def _copy_program(self) -> None:
        """Copy the executable, where it is one and does not stand there already."""
        source, target = os.path.realpath(sys.argv[0]), os.path.realpath(self._at(self._service.program))
        if self._service.program in self._service.command and target != source:
            with open(source, "rb") as file:
                self._write(ServiceFile(self._service.program, file.read(), 0o755))

    def _write(self, file: ServiceFile) -> None:
        """Write a file whole or not at all, where it is not so already."""
        path = self._at(file.path)
        try:
            with open(path, "rb") as old:
                same = old.read() == file.content and os.stat(path).st_mode & 0o777 == file.mode
        except OSError:
            same = False
        if same:
            self._step(f"{path} is as it should be", f"leave {path} as it is")
            return
        self._changed = True
        self._step(f"wrote {path}", f"write {path}")
        if self._dry_run:
            return
        self._make_folder(os.path.dirname(file.path))
        try:
            handle, name = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".fabrik-")
            with open(handle, "wb") as new:
                os.fchmod(handle, file.mode)
                new.write(file.content)
            os.replace(name, path)
        except OSError as error:
            raise ServiceError(f"{path}: {error.strerror}") from None

    def _make_folder(self, folder: str) -> None:
        try:
            if not self._dry_run:
                os.makedirs(self._at(folder), mode=0o755 if self._service.system else 0o700, exist_ok=True)
        except OSError as error:
            raise ServiceError(f"{self._at(folder)}: {error.strerror}") from None

    def _make_user(self) -> None:
        if self._service.manager == "systemd":
            root = (f"--root={self._service.root}",) if self._service.root else ()
            self._run("systemd-sysusers", *root, "fabrik-daemon.conf")
        elif user_id("fabrik") is None and shutil.which("useradd"):
            home = ("--home-dir", "/var/lib/fabrik", "--shell", "/sbin/nologin")
            self._run("useradd", "--system", "--user-group", *home, "fabrik")
        elif user_id("fabrik") is None:  # busybox's
            self._run("addgroup", "-S", "fabrik")
            self._run(
                "adduser", "-S", "-D", "-H", "-h", "/var/lib/fabrik", "-s", "/sbin/nologin", "-G", "fabrik", "fabrik"
            )

    def _make_configuration(self) -> None:
        """Make settings where there are none: root's, for the service's group to read, as is what replaces them."""
        for name, text in _FIRST_SETTINGS.items():
            path = f"/etc/fabrik/daemon/{name}"
            if not os.path.exists(self._at(path)):
                self._write(ServiceFile(path, text.encode(), 0o640))
                if not self._dry_run and not self._service.root:
                    os.chown(path, 0, group_id("fabrik"))

    def _is_running(self) -> bool:
        if self._service.manager == "launchd":
            return self._call("launchctl", "print", self._agent()).returncode == 0
        if self._service.manager == "openrc":
            return self._call("rc-service", "fabrik-daemon", "status").returncode == 0
        scope = () if self._service.system else ("--user",)
        return self._call("systemctl", *scope, "is-active", "--quiet", self._service.unit).returncode == 0

    def _start(self) -> None:
        """Have the service run what is installed now; what runs already and has not changed goes on."""
        if self._service.manager == "openrc":
            self._run("rc-service", "fabrik-daemon", "restart" if self._changed else "start")
        elif self._service.manager == "launchd":
            if self._changed:
                self._run("launchctl", "bootout", self._agent(), may_fail=True)
            self._run("launchctl", "enable", self._agent())
            domain = self._agent().rpartition("/")[0]
            self._run("launchctl", "bootstrap", domain, self._service.main_file, may_fail=not self._changed)
        else:
            if self._changed and self._service.on_demand:
                self._systemctl("stop", "fabrik-daemon.service")  # a socket is not made anew under its service
            self._systemctl("restart" if self._changed else "start", self._service.unit)

    def _systemctl(self, *words: str) -> None:
        place = () if self._service.system else ("--user",)
        self._run("systemctl", *place, *((f"--root={self._service.root}",) if self._service.root else ()), *words)

    def _run(self, *words: str, may_fail: bool = False) -> None:
        line = " ".join(shlex.quote(word) for word in words)
        self._step(f"ran {line}", f"run {line}")
        if self._dry_run:
            return
        done = self._call(*words)
        if done.returncode and not may_fail:
            said = (done.stderr or done.stdout).decode("utf-8", "replace").strip().splitlines()
            raise ServiceError(f"{line}: {said[-1] if said else f'exit code {done.returncode}'}")

    @staticmethod
    def _call(*words: str) -> subprocess.CompletedProcess[bytes]:
        try:
            return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        except OSError as error:
            raise ServiceError(f"{words[0]}: {error.strerror}") from None

    def _step(self, done: str, would: str) -> None:
        self._tell(f"would {would}" if self._dry_run else done)

    def _at(self, path: str) -> str:
        return self._service.root + path

    @staticmethod
    def _agent() -> str:
        return f"gui/{os.getuid()}/fabrik.daemon"


def user_id(name: str) -> int | None:
    """Return a user's number, None where there is no such user."""
    try:
        return int(pwd.getpwnam(name).pw_uid)
    except KeyError:
        return None


_FIRST_SETTINGS: Final = {
    "config.yaml": "# logLevel, timing and the like; where cache and socket are is the service's affair\n",
    "clusters.yaml": "clusters: []\n",
}


# ----------------------------------------------------------------------------------------------------------------------
# Services: unpacked copies
# ----------------------------------------------------------------------------------------------------------------------


ORIGIN_FILE: Final = ".origin"  # in an unpacked copy: the executable's path; who uses the copy for long has it locked
_GONE: Final = ".gone-"


def unpacked_copy() -> str:
    """Return the folder into which the running executable was unpacked."""
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def hold_unpacked() -> None:
    """Keep our copy from being cleaned away while this process runs: modules are still read from it."""
    with contextlib.suppress(OSError):
        file = os.open(os.path.join(unpacked_copy(), ORIGIN_FILE), os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def note_unpacked(executable: str) -> None:
    """Note in our copy, which was unpacked just now, whose it is."""
    with contextlib.suppress(OSError):
        file = os.open(os.path.join(unpacked_copy(), ORIGIN_FILE), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(file, 0)  # never another file in its place: this one may be locked already
            os.pwrite(file, os.fsencode(executable), 0)
        finally:
            os.close(file)


def clean_unpacked() -> None:
    """Take away copies beside ours of what ours has replaced, and of executables that are gone, unless in use."""
    folder, own = os.path.split(unpacked_copy())
    origin = _origin_of(os.path.join(folder, own))
    if origin is None:
        return
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.startswith(_GONE):
            shutil.rmtree(path, ignore_errors=True)  # a process was killed over it
            continue
        its_origin = _origin_of(path)
        if name != own and its_origin is not None and (its_origin == origin or not os.path.exists(its_origin)):
            _remove_copy(folder, name)


def _origin_of(copy: str) -> str | None:
    try:
        with open(os.path.join(copy, ORIGIN_FILE), "rb") as file:
            return os.fsdecode(file.read())
    except OSError:
        return None


def _remove_copy(folder: str, name: str) -> None:
    path, gone = os.path.join(folder, name), os.path.join(folder, f"{_GONE}{name}")
    with contextlib.suppress(OSError):
        file = os.open(os.path.join(path, ORIGIN_FILE), os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(path, gone)
            shutil.rmtree(gone, ignore_errors=True)
            os.unlink(os.path.join(folder, f".{name}_lock"))  # the unpacking's
        finally:
            os.close(file)


# ----------------------------------------------------------------------------------------------------------------------
# Services: demo server
# ----------------------------------------------------------------------------------------------------------------------

_BOOKMARK_S: Final = 10.0
_WATCH_S: Final = 300.0  # for a watch that does not say how long
_PEER_S: Final = 5.0  # what is written to a peer that does not read, or read from one that says nothing

DemoAnswer = Union[JsonObject, Iterator[JsonObject], Iterator[str]]  # an object, a watch's events, a log's lines


class DemoServer:
    """One scripted cluster's API server on loopback: plain HTTP, GET only, lists and watches what was applied to it.

    It keeps every event since its start, so no resource version of its own ever expires.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._events: list[DemoStep] = []  # the n-th brings its collection to resource version n + 1
        self._closed = False
        self._uid = str(uuid.uuid4())
        # Not HTTPServer, which asks a name server for the name of 127.0.0.1; its threads are joined when it closes.
        self._listener = socketserver.ThreadingTCPServer(("127.0.0.1", 0), _handler_for(self))
        self.url = f"http://127.0.0.1:{self._listener.server_address[1]}"
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.05,), name="demo", daemon=True)
        self._thread.start()

    def apply(self, step: DemoStep) -> None:
        """Let a step happen: it gets the next resource version, and watches tell it."""
        with self._changed:
            metadata = {**step.object["metadata"], "resourceVersion": str(len(self._events) + 1)}
            self._events.append(step._replace(object={**step.object, "metadata": metadata}))
            self._changed.notify_all()

    def close(self) -> None:
        """End all watches and threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._listener.shutdown()
        self._listener.server_close()
        self._thread.join()

    @property
    def versions(self) -> dict[str, int]:
        """The resource version that each collection's last event brought it to."""
        with self._changed:
            return {event.resource: number for number, event in enumerate(self._events, 1)}

    def answer(self, target: str) -> tuple[int, DemoAnswer]:
        """Return the HTTP status and the answer to a GET (kubernetes.io, API concepts)."""
        parts = urllib.parse.urlsplit(target)
        query = dict(urllib.parse.parse_qsl(parts.query))
        for kind in RESOURCES:
            match = re.fullmatch(rf"{kind.root}/(?:namespaces/([^/]+)/)?{kind.name}", parts.path)
            if match and query.get("watch") in ("true", "1"):
                return self._answer_watch(Scope("", kind.name, match[1] or ""), query)
            if match:
                return 200, self._list(kind, match[1] or "")
        if parts.path == "/api/v1/namespaces/kube-system":
            return 200, {"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": "kube-system", "uid": self._uid}}
        printed = re.fullmatch(rf"{PODS.root}/namespaces/[^/]+/{PODS.name}/([^/]+)/log", parts.path)
        if printed and query.get("previous") != "true":
            return 200, self._log(printed[1], query)
        return 404, _failure(404, "NotFound", "the server could not find the requested resource")

    def _list(self, kind: Resource, namespace: str) -> JsonObject:
        with self._changed:
            events, version = [event for event in self._events if event.resource == kind.name], len(self._events)
        items: dict[str, JsonObject] = {}
        for event in events:
            metadata = event.object["metadata"]
            if event.type == "DELETED":
                items.pop(metadata["uid"], None)
            elif namespace in ("", metadata["namespace"]):
                items[metadata["uid"]] = event.object
        head = {"kind": api_kind(kind.name) + "List", "apiVersion": _api_version(kind)}
        return {**head, "metadata": {"resourceVersion": str(version)}, "items": list(items.values())}

    def _answer_watch(self, scope: Scope, query: Mapping[str, str]) -> tuple[int, DemoAnswer]:
        if query.get("sendInitialEvents") == "true":
            return 200, self._stream_list(scope, query)
        version = parse_int(query.get("resourceVersion", "0"))
        if version is None or version > len(self._events):
            return 410, _failure(410, "Expired", "the resource version is none of this server's")
        seconds = float(query.get("timeoutSeconds") or _WATCH_S)
        return 200, self._watch(scope, version, seconds, bookmarks=query.get("allowWatchBookmarks") == "true")

    def _stream_list(self, scope: Scope, query: Mapping[str, str]) -> Iterator[JsonObject]:
        """Yield what there is as events, the bookmark that ends it, then what follows."""
        kind = next(kind for kind in RESOURCES if kind.name == scope.resource)
        head = {"kind": api_kind(kind.name), "apiVersion": _api_version(kind)}
        listed = self._list(kind, scope.namespace)
        for item in listed["items"]:
            yield {"type": "ADDED", "object": {**head, **item}}
        version = listed["metadata"]["resourceVersion"]
        end = {"resourceVersion": version, "annotations": {"k8s.io/initial-events-end": "true"}}
        yield {"type": "BOOKMARK", "object": {**head, "metadata": end}}
        seconds = float(query.get("timeoutSeconds") or _WATCH_S)
        yield from self._watch(scope, int(version), seconds, bookmarks=True)

    def _watch(self, scope: Scope, version: int, seconds: float, *, bookmarks: bool) -> Iterator[JsonObject]:
        kind = next(kind for kind in RESOURCES if kind.name == scope.resource)
        head = {"kind": api_kind(kind.name), "apiVersion": _api_version(kind)}
        now = time.monotonic()
        ends_at, bookmark_at = now + seconds, now + _BOOKMARK_S
        while now < ends_at:
            with self._changed:
                if len(self._events) == version and not self._closed:
                    self._changed.wait(min(ends_at, bookmark_at) - now)
                if self._closed:
                    return
                events, version = self._events[version:], len(self._events)
            for event in events:
                if event.resource == kind.name and scope.namespace in ("", event.object["metadata"]["namespace"]):
                    yield {"type": event.type, "object": {**head, **event.object}}
            now = time.monotonic()
            if now >= bookmark_at and bookmarks:
                bookmark_at = now + _BOOKMARK_S
                yield {"type": "BOOKMARK", "object": {**head, "metadata": {"resourceVersion": str(version)}}}

    def _log(self, pod: str, query: Mapping[str, str]) -> Iterator[str]:
        """Yield what a Pod prints, a line for each of its reports, its time before it; followed, until it ends."""
        version, since, tail = 0, epoch_of(query.get("sinceTime")) or 0.0, int(query.get("tailLines") or INT_MAX)
        is_over = query.get("follow") != "true"
        while not self._closed:
            with self._changed:
                events, version = self._events[version:], len(self._events)
            pods = [event for event in events if (event.resource, event.object["metadata"]["name"]) == (PODS.name, pod)]
            printed = [line for line in map(_printed, pods) if line]
            lines = [line for line in printed if (epoch_of(line.partition(" ")[0]) or 0.0) >= since]
            yield from lines[-tail:]
            tail = INT_MAX
            ended = [pod.type == "DELETED" or pod.object["status"]["phase"] in ("Succeeded", "Failed") for pod in pods]
            if is_over or any(ended):
                return
            with self._changed:
                if len(self._events) == version and not self._closed:
                    self._changed.wait(_BOOKMARK_S)


def _printed(step: DemoStep) -> str:
    """Return the line that a Pod printed with a report: its time, then what it did; empty where it reported nothing."""
    facts = facts_from(PODS.name, step.object)
    report = facts.report if isinstance(facts, PodFacts) else NO_REPORT
    done = f"{report.finished} of {report.total} done"
    return f"{report.heartbeat_at} {report.phase} {report.task}: {done}" if report.heartbeat_at else ""


def kubeconfig_text(servers: Mapping[str, str]) -> str:
    """Return a kubeconfig with a context for each name and server URL."""
    return format_json(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": name, "cluster": {"server": url}} for name, url in servers.items()],
            "users": [{"name": "demo", "user": {}}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": "demo"}} for name in servers],
        }
    )


def _handler_for(server: DemoServer) -> type[socketserver.BaseRequestHandler]:
    """Return the class of a server's connections; it cannot stand above, since http.server is imported when used."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = _PEER_S

        def handle(self) -> None:
            with contextlib.suppress(OSError):  # the daemon hangs up as it likes
                super().handle()

        def do_GET(self) -> None:  # noqa: N802 - the base class looks for this name
            code, answer = server.answer(self.path)
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Connection", "close")  # so that no thread is left to wait for another request
            if isinstance(answer, dict):
                body = json.dumps(answer).encode()
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                return
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for event in answer:
                line = (event if isinstance(event, str) else json.dumps(event)).encode() + b"\n"
                self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            self.wfile.write(b"0\r\n\r\n")

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    return Handler


def _api_version(kind: Resource) -> str:
    return kind.root.partition("/api/")[2] or kind.root.partition("/apis/")[2]


def _failure(code: int, reason: str, message: str) -> JsonObject:
    head = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return {**head, "message": message, "reason": reason, "code": code}


# ----------------------------------------------------------------------------------------------------------------------
# Services: demo
# ----------------------------------------------------------------------------------------------------------------------

_PIPED_SPEED: Final = 7.5  # the minute in eight seconds: the shortest step still takes longer than a turn
_TURN_S: Final = 0.02
_LOOK_S: Final = 0.1  # between two looks at the cache
_BEGIN_S: Final = 30.0  # for the daemon to follow both clusters; it takes about one
_CATCH_UP_S: Final = 10.0  # for the cache to hold what the servers told last
_LINGER_S: Final = 2.0  # on a terminal, after the last step
_END_S: Final = 5.0  # for the daemon to stop, before it is killed


class DemoRows(NamedTuple):
    """What the demo's daemon knows at one moment."""

    version: int = -1
    clusters: Sequence[JsonObject] = ()
    runs: Sequence[JsonObject] = ()
    schedules: Sequence[JsonObject] = ()
    volumes: Sequence[JsonObject] = ()
    warnings: Sequence[JsonObject] = ()


def demo_rows(reader: CacheReader, before: DemoRows) -> DemoRows:
    """Return what the cache holds now; `before` itself where nothing was written since."""
    version = reader.rows("PRAGMA data_version")[0]["data_version"]
    if version == before.version:
        return before
    return DemoRows(
        version,
        clusters=reader.rows("SELECT name, connected FROM clusters ORDER BY priority, name"),
        runs=reader.rows("SELECT * FROM runs ORDER BY created_at DESC, run_id DESC"),
        schedules=reader.rows("SELECT * FROM schedules ORDER BY cluster, name"),
        volumes=reader.rows("SELECT CASE WHEN deleted_at IS NULL THEN phase ELSE 'removed' END AS phase FROM volumes"),
        warnings=reader.rows("SELECT reason, sum(count) AS count FROM cluster_events GROUP BY reason ORDER BY reason"),
    )


def format_demo(rows: DemoRows, now: float, width: int | None, height: int | None) -> str:
    """Return the runs and what goes with them; of too many runs for the height, the oldest are only counted."""
    if rows.version < 0:
        return ""
    # The key of a scheduled run is its id with cluster and namespace: half a terminal, and the cluster stands beside.
    runs = [{**row, "run_id": row["id"]} for row in rows.runs]
    for hidden in ((), ("AGE",), ("AGE", "HEARTBEAT"), ("AGE", "HEARTBEAT", "TASK")):  # REASON tells more
        columns = [column for column in RUN_COLUMNS if column.title not in hidden]
        table = format_table(columns, runs, now, width).splitlines()
        if not any(line.endswith("~") for line in table):
            break
    under = [
        "",
        "runs       " + (_counted(rows.runs, "status", STATUSES) or "none"),
        "schedules  " + ("; ".join(_schedule_words(row, now) for row in rows.schedules) or "none"),
        "volumes    " + (_counted(rows.volumes, "phase", ("Pending", "Bound", "removed")) or "none"),
        "warnings   " + (", ".join(f"{row['count']} {row['reason']}" for row in rows.warnings) or "none"),
    ]
    room = len(table) if height is None else max(2, height - len(under))
    if len(table) > room:
        table[room - 1 :] = [f"... and {len(table) - room + 1} older ones"]
    return "".join(safe_text(line)[:width] + "\n" for line in [*table, *under])


def run_demo(out: TextIO, environment: Mapping[str, str], speed: float | None) -> int:
    """Show the scripted clusters as a daemon of their own sees them. Raises FabrikError."""
    is_terminal = out.isatty() and sys.stdin.isatty() and environment.get("TERM", "dumb") != "dumb"
    demo = Demo(environment, speed or (1.0 if is_terminal else _PIPED_SPEED), on_screen=is_terminal)
    code = demo.run()
    if code == 0:
        width = shutil.get_terminal_size().columns if is_terminal else None
        out.write(format_demo(demo.rows, time.time(), width, None))
    return code


class Demo:
    """Two scripted clusters and a daemon that follows them, in a folder that is removed however this ends."""

    def __init__(self, environment: Mapping[str, str], speed: float, *, on_screen: bool) -> None:
        self.rows = DemoRows()
        self._environment = environment
        self._speed = speed
        self._on_screen = on_screen
        # The script's last moment is the clock's: the times in the final table are true at any speed.
        self._steps = deque(demo_steps(time.time() - DEMO_S + DEMO_S / speed))
        self._servers: dict[str, DemoServer] = {}
        self._folder = ""
        self._daemon: subprocess.Popen[bytes] | None = None
        self._reader: CacheReader | None = None
        self._words = "starting"
        self._signal = 0
        self._is_quit = False
        self._is_over = False
        self._error: FabrikError | None = None

    def run(self) -> int:
        """Play the script to its end, or until `q` or a signal; return the exit code. Raises FabrikError."""
        with contextlib.ExitStack() as undo:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                undo.callback(signal.signal, number, signal.signal(number, self._on_signal))
            for name in DEMO_CLUSTERS:
                self._servers[name] = DemoServer()
                undo.callback(self._servers[name].close)
            self._advance(0)
            room = SOCKET_PATH_BYTES - len("/fabrik-demo-12345678/daemon.sock/.f12345678/s")
            is_short = len(os.fsencode(tempfile.gettempdir())) <= room
            self._folder = tempfile.mkdtemp(prefix="fabrik-demo-", dir=None if is_short else "/tmp")  # noqa: S108
            undo.callback(shutil.rmtree, self._folder, ignore_errors=True)
            undo.callback(self._stop_daemon)
            self._start_daemon()
            if self._on_screen:
                self._play_on_screen()
            else:
                self._play()
        return 128 + self._signal if self._signal else 0

    def _play_on_screen(self) -> None:
        """Play in a thread under the dashboard, which stays after the end where a person has touched it."""
        player = threading.Thread(target=self._play_in_thread, name="demo player")
        player.start()
        cache, path = os.path.join(self._folder, "cache.db"), os.path.join(self._folder, "daemon.sock")
        settings = settings_from(Flags(cache=cache, socket=path), {}, lambda _: None)
        options = DashboardOptions(
            palette_for("auto", self._environment), title=lambda: f"demo: {self._words}", is_over=lambda: self._is_over
        )
        try:
            code = run_dashboard(Places(cache, lambda tell: connect(settings, tell), self._open_log), options)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, self._on_signal)  # the dashboard's loop took them
            self._is_quit = True
            player.join()
        self._signal = self._signal or (code - 128 if code > 128 else 0)
        if self._error is not None:
            raise self._error

    def _play_in_thread(self) -> None:
        try:
            self._play()
        except FabrikError as error:
            self._error = error
        self._is_over = True

    def _on_signal(self, number: int, _frame: object) -> None:
        self._signal = number  # no exception: it could come between making something and noting that it is there

    def _start_daemon(self) -> None:
        kubeconfig = os.path.join(self._folder, "kubeconfig")
        specs = [ClusterSpec(name, kubeconfig, name, priority=place) for place, name in enumerate(self._servers)]
        urls = {name: server.url for name, server in self._servers.items()}
        files = {
            "kubeconfig": kubeconfig_text(urls),
            "clusters.yaml": format_clusters(specs),
            "config.yaml": "logLevel: warning\n",
        }
        for name, text in files.items():
            with open(os.path.join(self._folder, name), "w", encoding="utf-8") as file:
                file.write(text)
        with open(os.path.join(self._folder, "log"), "wb") as log:
            self._daemon = subprocess.Popen(
                own_command("start", "--foreground"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._own_environment(),
            )

    def _own_environment(self) -> dict[str, str]:
        names = {"FABRIK_CONFIG": "config.yaml", "FABRIK_CACHE": "cache.db", "FABRIK_SOCKET": "daemon.sock"}
        places = {variable: os.path.join(self._folder, name) for variable, name in names.items()}
        # Without a kubeconfig of its own, the user's clusters would be found.
        return {
            **self._environment,
            **places,
            "KUBECONFIG": os.path.join(self._folder, "kubeconfig"),
            "TMPDIR": self._folder,
        }

    def _open_log(self, run_id: str) -> subprocess.Popen[bytes]:
        return open_log(run_id, self._own_environment())

    def _stop_daemon(self) -> None:
        if self._reader is not None:
            self._reader.connection.close()
        if self._daemon is not None:
            self._daemon.terminate()
            try:
                self._daemon.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._daemon.kill()
                self._daemon.wait()

    def _play(self) -> None:
        self._until(self._is_followed, _BEGIN_S, "did not begin to follow", lambda: "starting")
        began_at = time.monotonic()

        def played_s() -> float:
            return (time.monotonic() - began_at) * self._speed

        def is_played() -> bool:
            self._advance(played_s())
            return not self._steps and played_s() > DEMO_S

        def words() -> str:
            return f"{min(played_s(), DEMO_S):.0f} s of {DEMO_S:.0f} s"

        self._until(is_played, None, "", words)
        self._until(self._is_caught_up, _CATCH_UP_S, "did not take in the last change", words)
        if self._on_screen:
            lingers_until = time.monotonic() + _LINGER_S
            self._until(lambda: time.monotonic() > lingers_until, None, "", lambda: "over, q leaves")

    def _until(self, holds: Callable[[], bool], limit_s: float | None, trouble: str, words: Callable[[], str]) -> None:
        """Go on looking and showing until something holds, or the user ends it. Raises FabrikError past the limit."""
        now = time.monotonic()
        deadline, look_at = now + (limit_s or INT_MAX), now
        while not self._is_ended() and not holds():
            now = time.monotonic()
            if now > deadline:
                raise FabrikError(f"the demo's daemon {trouble} within {limit_s:g} s", self._last_words())
            if now >= look_at:
                look_at = now + _LOOK_S
                self._look(words())
            time.sleep(_TURN_S)
        self._look(words())

    def _is_ended(self) -> bool:
        """Say whether the user ended the demo. Raises FabrikError where the daemon ended by itself."""
        code = self._daemon.poll() if self._daemon is not None else None
        if self._signal:
            return True
        if code is not None:
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with {code}"
            raise FabrikError(f"the demo's daemon was ended {how}", self._last_words())
        return self._is_quit

    def _look(self, words: str) -> None:
        if self._reader is None and os.path.exists(os.path.join(self._folder, "cache.db")):
            with contextlib.suppress(CacheError):  # it is being made
                self._reader = CacheReader(os.path.join(self._folder, "cache.db"))
        if self._reader is not None:
            self.rows = demo_rows(self._reader, self.rows)
        self._words = words

    def _advance(self, played_s: float) -> None:
        while self._steps and self._steps[0].at_s <= played_s:
            step = self._steps.popleft()
            self._servers[step.cluster].apply(step)

    def _is_followed(self) -> bool:
        return {row["name"] for row in self.rows.clusters if row["connected"]} == set(self._servers)

    def _is_caught_up(self) -> bool:
        if self._reader is None:
            return False
        rows = self._reader.rows("SELECT cluster, resource, resource_version AS version FROM watches")
        seen = {(row["cluster"], row["resource"]): int(row["version"] or 0) for row in rows}
        return all(
            seen.get((cluster, resource_name), 0) >= version  # higher after a bookmark
            for cluster, server in self._servers.items()
            for resource_name, version in server.versions.items()
        )

    def _last_words(self) -> str:
        with open(os.path.join(self._folder, "log"), encoding="utf-8", errors="replace") as log:
            lines = log.read().splitlines()
        return lines[-1] if lines else "it said nothing"


def _counted(rows: Sequence[JsonObject], name: str, order: Sequence[str]) -> str:
    found = [row[name] or UNKNOWN for row in rows]
    return ", ".join(f"{found.count(value)} {value}" for value in (*order, UNKNOWN) if value in found)


def _schedule_words(row: JsonObject, now: float) -> str:
    ran = f"last run {age_of(row['last_run_at'], now)} ago"
    return f"{row['schedule_id']} ({row['schedule']}) on {row['cluster']}, {row['active']} active, {ran}"


# ----------------------------------------------------------------------------------------------------------------------
# Commands: reading
# ----------------------------------------------------------------------------------------------------------------------


class Context(NamedTuple):
    """What every command gets: where things are, and where to write."""

    settings: Settings
    environment: Mapping[str, str]
    out: TextIO
    errors: TextIO
    style: Style = PLAIN  # of tables

    @property
    def daemon(self) -> str:
        """What the daemon that answers is called."""
        remote = self.settings.remote
        return "the daemon" if remote is None else f"the daemon at {remote.url.partition('://')[2]}"

    @property
    def width(self) -> int | None:
        """The terminal's width; None where the output is none, or where a wide table was asked for."""
        return shutil.get_terminal_size().columns if self.out.isatty() and not self.style.wide else None

    def warn(self, line: str) -> None:
        """Tell the user something beside the answer."""
        self.errors.write(f"fabrik-daemon: {safe_text(line)}\n")


def ask(context: Context, action: str, **fields: Any) -> JsonObject | None:
    """Return the daemon's answer, None where no daemon of this cache answers: then the cache does."""
    client = connect(context.settings, context.warn)
    if client is None:
        return None
    try:
        return client.ask(action, **fields)
    except RemoteError as error:
        if error.code == OtherCacheError.code:
            return None
        raise
    except NotRunningError as error:
        if context.settings.remote is not None:
            raise  # this host's cache is of other clusters
        context.warn(f"{error}; the cache answers")
        return None
    finally:
        client.close()


def connect_or_start(context: Context, *, may_start: bool) -> Client | RemoteClient:
    """Return a connection to the daemon, which is started where none runs and that is wished. Raises FabrikError."""
    client = connect(context.settings, context.warn)
    if client is not None:
        return client
    if not (may_start and context.settings.autostart):
        raise NotRunningError("the daemon is not running", "run 'fabrik-daemon start'")
    context.warn("no daemon runs: one is started")
    return start_in_background(context)


def start_in_background(context: Context) -> Client | RemoteClient:
    """Start the daemon as a process of its own and return a connection to it. Raises with its words where it dies."""
    settings = context.settings
    places = ["--config", settings.config] if os.path.exists(settings.config) else []
    places += ["--cache", settings.cache, *(["--socket", settings.socket] if settings.socket else [])]
    places += settings.exposure.words if settings.exposure is not None else ["--mode", "host"]
    environment = {**os.environ, "FABRIK_CONFIG": settings.config}
    process = subprocess.Popen(
        own_command("start", "--foreground", "--detach", *places),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
        cwd="/",
    )
    words = process.stderr.read().decode("utf-8", "replace") if process.stderr is not None else ""  # until it detaches
    ends_at = time.monotonic() + CLIENT_TIMEOUT_S
    while time.monotonic() < ends_at:
        client = connect(settings, own=True)
        if client is not None:
            return client
        if process.poll() is not None and not is_kept_up(settings.cache):
            break
        time.sleep(LOCK_POLL_S)  # another start was quicker, and its daemon is about to listen
    said = [line for line in words.splitlines() if line.startswith("fabrik-daemon: ")]
    error = StartError(said[-1][len("fabrik-daemon: ") :] if said else "the daemon does not answer", "")
    error.exit_code = process.returncode or FabrikError.exit_code
    raise error


def tell_source(context: Context, source: str, parts: Sequence[Freshness], max_age_s: float | None = None) -> None:
    """Say on stderr how old an answer is that is not live. Raises StaleError where that is more than is allowed."""
    now = time.time()
    check_age(parts, max_age_s, now)
    if not all(part.connected and part.synced_at for part in parts):
        context.warn(format_freshness(source, parts, now))


def print_answer(
    context: Context, output: str, answer: object, table: Callable[[float], str], names: Sequence[str] = ()
) -> None:
    """Write an answer in the format asked for; `table` makes the one for people, given the time.

    `names` are the columns of a list that may be empty.
    """
    if output in ("table", "wide"):
        context.out.write(table(time.time()))
    else:
        context.out.write(format_answer(answer, output, titles=context.style.titles, names=names))


def print_rows(
    context: Context, output: str, columns: Sequence[Column], rows: list[JsonObject], names: Sequence[str] = ()
) -> None:
    """Write rows in the format asked for, under these columns where that is a table."""
    table = partial(format_table, columns, rows, width=context.width, style=context.style)
    print_answer(context, output, rows, lambda now: table(now=now), names)


def configured_clusters(settings: Settings, environment: Mapping[str, str]) -> list[ClusterSpec]:
    """Return the clusters of clusters.yaml, then those discovered in kubeconfigs. Raises ConfigError."""
    clusters = parse_clusters(read_text(settings.clusters_file) or "", settings.clusters_file, environment)
    names = {cluster.name for cluster in clusters}
    contexts = {(cluster.kubeconfig, cluster.context) for cluster in clusters}
    mounted = read_mounted(settings.exposure.kubeconfig) if settings.exposure is not None else []
    for cluster in mounted or discover(environment).clusters:
        if cluster.name not in names and (cluster.kubeconfig, cluster.context) not in contexts:
            names.add(cluster.name)
            clusters.append(cluster)
    return clusters


class Discovery(NamedTuple):
    """What kubeconfigs tell of fabrik's clusters, and which of them could not be read."""

    clusters: list[ClusterSpec]
    notes: list[str]


def discover(environment: Mapping[str, str]) -> Discovery:
    """Look for fabrik's contexts in $KUBECONFIG (its files merged) or ~/.kube/config, and in k3s's own file.

    In a Pod, where none of them has one, it is the cluster around it.
    """
    notes: list[str] = []
    found: list[ClusterSpec] = []
    named = environment.get("KUBECONFIG") or expand_home("~/.kube/config", environment)
    paths = [os.path.abspath(expand_home(path, environment)) for path in named.split(os.pathsep) if path]
    groups = [paths, [K3S_KUBECONFIG]]
    for group in groups:
        contexts: list[JsonObject] = []
        readable = []
        for path in group:
            if os.path.exists(path) and (path not in paths or group is paths):
                try:
                    contexts += list_at(read_kubeconfig(path), "contexts")
                    readable.append(path)
                except ConfigError as error:
                    notes.append(str(error))
        found += fabrik_clusters({"contexts": contexts}, os.pathsep.join(readable))
    if not found and "KUBERNETES_SERVICE_HOST" in environment:
        found.append(ClusterSpec(IN_CLUSTER, IN_CLUSTER, is_discovered=True))
    return Discovery(found, notes)


def read_text(path: str) -> str | None:
    """Return a file's text, None where there is no such file. Raises ConfigError for one that cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Commands: reading lists
# ----------------------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """Rows, where they come from, and how fresh they are."""

    source: str
    parts: list[Freshness]
    rows: list[JsonObject]
    exit_code: int = 0


class ListOf(NamedTuple):
    """A list: what it is called, what its rows are, and how they are shown."""

    name: str  # as the daemon's action, and as the rows in its answer
    kind: type[Any]  # a TableRow or ClusterRow
    columns: Sequence[Column]


RUNS: Final = ListOf("runs", Run, RUN_COLUMNS)
SCHEDULES: Final = ListOf("schedules", Schedule, SCHEDULE_COLUMNS)
VOLUME_LIST: Final = ListOf("volumes", Volume, VOLUME_LIST_COLUMNS)
WARNINGS: Final = ListOf("warnings", ClusterEvent, WARNING_LIST_COLUMNS)
CLUSTERS: Final = ListOf("clusters", ClusterRow, CLUSTER_COLUMNS)
CLUSTER_FIELDS: Final = ("name", "server", "priority", "status", "connected", "error", "last_event_at")


def runs_list(context: Context, arguments: argparse.Namespace) -> int:
    """List runs, the newest first; with `--at` those of an earlier time."""
    if arguments.at is not None and (arguments.watch or arguments.fresh):
        raise UsageError("--at excludes --watch and --fresh", "what was changes no more")
    return _list(context, arguments, RUNS) if arguments.at is None else _list_past(context, arguments)


def schedules_list(context: Context, arguments: argparse.Namespace) -> int:
    """List schedules by cluster and name."""
    return _list(context, arguments, SCHEDULES)


def volumes_list(context: Context, arguments: argparse.Namespace) -> int:
    """List volumes by cluster and name."""
    return _list(context, arguments, VOLUME_LIST, usage=arguments.usage)


def warnings_list(context: Context, arguments: argparse.Namespace) -> int:
    """List warnings, the last first."""
    return _list(context, arguments, WARNINGS)


def clusters_list(context: Context, arguments: argparse.Namespace) -> int:
    """List the clusters by priority: those configured or discovered, and what is known of them."""
    asked = (("status", frozenset(arguments.status)),) if arguments.status else ()
    wanted = Filter(frozenset(arguments.cluster), asked)
    arguments.sort_by = "connected" if arguments.sort_by == "status" else arguments.sort_by
    request = list_request(arguments, ClusterRow, time.time())
    if arguments.watch:
        return _watch(context, arguments, CLUSTERS, wanted, request)
    rows = find_clusters(context)
    names = [row.name for row in rows]
    for name in arguments.cluster:
        if name not in names:
            raise NotFoundError(f"no cluster {name!r} is known", nearest(name, names) if names else "none is")
    found = select_rows(filter(wanted.matches, rows), ClusterRow, parse_selection(request, ClusterRow))
    print_rows(context, arguments.output, CLUSTER_COLUMNS, list(map(_shown_row, found)), CLUSTER_FIELDS)
    return 0


def _list(context: Context, arguments: argparse.Namespace, listing: ListOf, *, usage: bool = False) -> int:
    request = list_request(arguments, listing.kind, time.time())
    if arguments.watch and arguments.fresh:
        raise UsageError("--watch and --fresh exclude each other", "what is watched is live")
    if arguments.watch:
        return _watch(context, arguments, listing, parse_filter(request, LIST_FILTERS[listing.kind]), request)
    found = find_fresh(context, listing, request) if arguments.fresh else find_rows(context, listing, request)
    tell_source(context, found.source, found.parts, arguments.max_age)
    if usage and not add_usage(context, found.rows):
        raise UsageError("--usage: no Prometheus is configured", "set laos.prometheus.url in config.yaml")
    columns, shown = columns_with_age(columns_with_usage(listing.columns, found.rows), found.rows, found.parts)
    fields = (*listing.kind._fields, "used_bytes") if usage else listing.kind._fields
    table = partial(format_table, columns, shown, width=context.width, style=context.style)
    print_answer(context, arguments.output, found.rows, lambda now: table(now=now), fields)
    return found.exit_code


def _watch(
    context: Context, arguments: argparse.Namespace, listing: ListOf, wanted: Filter, request: JsonObject
) -> int:
    """Show a list, then each of its rows that changes, once more when it leaves; say which clusters come and go."""
    types = EVENT_TYPES[listing.kind]
    client = connect_or_start(context, may_start=not arguments.no_start)
    client.wait_forever()
    if listing is not CLUSTERS:
        _tell_what_is_away(context, listing, arguments)
    shown = _LiveList(context, arguments.output, listing, wanted, parse_selection(request, listing.kind))
    asked = {"type": [*types, *(_COMINGS if listing is not CLUSTERS else ())]}
    for message in client.follow("subscribe", clusters=arguments.cluster or ["*"], filter=asked, snapshot=True):
        if message["type"] == "snapshot":
            shown.begin(message)
        elif message["type"] in types:
            shown.change(row_from_object(listing.kind, message["row"]))
        elif message["type"] == "lagged":
            context.warn("some changes were missed; the list begins anew")
        elif message["type"] in _COMINGS:
            error = f" ({message['error']})" if message.get("error") else ""
            context.warn(f"{message['cluster']}: {message['type'].partition(':')[2]}{error}")
        context.out.flush()
    return 0


class _LiveList:
    """A list that goes on: which rows it has, and what is written when one of them changes."""

    def __init__(self, context: Context, output: str, listing: ListOf, wanted: Filter, selection: Selection) -> None:
        self._context = context
        self._output = output
        self._listing = listing
        self._wanted = wanted
        self._selection = selection
        self._table = next((name for name, kind in TABLES.items() if kind is listing.kind), listing.name)
        self._key_size = len(key_columns(listing.kind))
        self._begun: list[Any] = []  # of a snapshot that is not whole yet
        self._rows: dict[Values, Any] = {}  # all that match, by their keys
        self._shown: list[JsonObject] = []

    def begin(self, message: JsonObject) -> None:
        """Take in a snapshot; write the list once it is whole."""
        kind = self._listing.kind
        self._begun += (row_from_object(kind, row) for row in message.get(self._table, ()))
        if not message["last"]:
            return
        known = find_clusters(self._context) if self._listing is CLUSTERS else self._begun
        self._rows = {row[: self._key_size]: row for row in known if self._wanted.matches(row)}
        self._begun = []
        self._shown = list(map(_shown_row, select_rows(self._rows.values(), kind, self._selection)))
        print_rows(self._context, self._output, self._listing.columns, self._shown, _fields_of(self._listing))

    def change(self, row: Any) -> None:
        """Write a row that has changed and is asked for, or was until now."""
        key, is_asked_for = row[: self._key_size], self._wanted.matches(row)
        before = self._rows.pop(key, None)
        if isinstance(row, ClusterRow) and before is not None:
            row = row._replace(last_event_at=before.last_event_at)  # an event does not tell of it
        if is_asked_for:
            self._rows[key] = row
        if (is_asked_for or before is not None) and (self._listing is not CLUSTERS or row != before):
            self._write(_shown_row(row))

    def _write(self, row: JsonObject) -> None:
        """Write one row, under the columns of the list before it."""
        context = self._context
        if self._output in ("table", "wide"):
            rows = [*self._shown[:WATCH_ALIGNED_ROWS], row]
            text = format_table(self._listing.columns, rows, time.time(), context.width, context.style)
            context.out.write(text.splitlines()[-1] + "\n")
        else:
            is_yaml = "---\n" if self._output == "yaml" else ""
            context.out.write(is_yaml + format_answer(row, self._output, titles=False))


_COMINGS: Final = ("cluster:connected", "cluster:disconnected", "cluster:stale")


def _tell_what_is_away(context: Context, listing: ListOf, arguments: argparse.Namespace) -> None:
    """Say how old a list is that is about to begin. Raises NotFoundError or StaleError as one that ends does."""
    try:
        found = find_rows(context, listing, {"clusters": arguments.cluster, "limit": 1})
    except (RemoteError, NotSyncedError) as error:
        if error.code != NotSyncedError.code:
            raise
        context.warn(f"{error.message}; what comes is shown")
    else:
        tell_source(context, found.source, found.parts, arguments.max_age)


def _fields_of(listing: ListOf) -> Sequence[str]:
    return CLUSTER_FIELDS if listing is CLUSTERS else tuple(listing.kind._fields)


def _shown_row(row: Any) -> JsonObject:
    """Return a row as its list shows it."""
    shown: JsonObject = row._asdict()
    if isinstance(row, ClusterRow):
        said = {**shown, "status": row.status, "connected": bool(row.connected)}
        return {name: said[name] for name in CLUSTER_FIELDS}
    return shown


def add_usage(context: Context, volumes: Sequence[JsonObject]) -> bool:
    """Add `used_bytes` to volumes, as far as their clusters' Prometheus tells; say whether one is configured."""
    services: dict[LaosService, list[JsonObject]] = {}
    for row in volumes:
        service = laos_for(context, str(row["cluster"])).prometheus
        if service is not None:
            services.setdefault(service, []).append(row)
    for service, rows in services.items():
        try:
            used = volume_usage(service, rows, context.settings.timing.usage)
        except FabrikError as error:
            context.warn(f"what volumes use is not known: {error}")
            used = {}
        for row in rows:
            row["used_bytes"] = used.get((str(row["namespace"]), str(row["name"])))
    return bool(services) or not volumes or context.settings.laos.prometheus is not None


def laos_for(context: Context, cluster: str) -> Laos:
    """Return a cluster's services of LAOS: those configured for it, overall, or found by the daemon, in this order."""
    path = context.settings.clusters_file
    text = read_text(path) or ""
    specs = parse_clusters(text, path, context.environment) if "laos" in text else []
    own = next((spec.laos for spec in specs if spec.name == cluster), Laos())
    laos = own.over(context.settings.laos)
    if not laos.discover or not os.path.exists(context.settings.cache):
        return laos
    with contextlib.closing(CacheReader(context.settings.cache)) as reader:
        rows = reader.rows("SELECT value FROM meta WHERE key = ?", (LAOS_META + cluster,))
    return laos.over(laos_from_urls(parse_json(rows[0]["value"]) or {})) if rows else laos


def _list_past(context: Context, arguments: argparse.Namespace) -> int:
    """List runs as they were known at an earlier time."""
    if context.settings.remote is not None:
        raise UsageError("--at reads the cache of this host", "leave out --remote")
    now = time.time()
    moment = parse_time_argument("--at", arguments.at, now)
    if moment > now:
        raise UsageError("--at: that is still to come", "name an earlier time")
    request = list_request(arguments, Run, moment)
    wanted = parse_filter(request, LIST_FILTERS[Run])
    reader = CacheReader(context.settings.cache)
    check_synced(reader.freshness(), sorted(wanted.clusters))
    at, reach = format_time(moment, milliseconds=True), reader.changes_reach()
    known = runs_at(at, reader.runs(), reader.run_changes(), reader.status_events(), reach)
    sources = {run.run_id: source for run, source in known}
    matching = [run for run, _ in known if wanted.matches(run)]
    runs = select_rows(matching, Run, parse_selection(request, Run))
    rows = [{**run._asdict(), "known_from": sources[run[0]]} for run in runs]
    partly = any(row["known_from"] == RUN_EVENTS for row in rows)
    told = f"; of some only status and reason: changes are held from {reach or 'now'} on" if partly else ""
    context.warn(f"from the cache: as known at {at}{told}")
    columns = (*RUN_COLUMNS, Column("KNOWN FROM", field("known_from"))) if partly else RUN_COLUMNS
    table = partial(format_table, columns, rows, moment, context.width, context.style)
    print_answer(context, arguments.output, rows, lambda _now: table(), (*Run._fields, "known_from"))
    return 0


def list_request(arguments: argparse.Namespace, kind: type[Row], now: float) -> JsonObject:
    """Return the request that asks for what a command's arguments ask for. Raises UsageError."""
    request: JsonObject = {"clusters": arguments.cluster}
    wanted = {key: getattr(arguments, key) for key in LIST_FILTERS.get(kind, ()) if getattr(arguments, key, None)}
    if wanted:
        request["filter"] = wanted
    if arguments.since:
        request["since"] = format_time(parse_time_argument("--since", arguments.since, now) // 1)
    if arguments.sort_by:
        request["sortBy"] = arguments.sort_by
    if arguments.reverse:
        request["reverse"] = True
    if arguments.limit:
        request["limit"] = arguments.limit
    parse_selection(request, kind)
    return request


def parse_time_argument(flag: str, text: str, now: float) -> float:
    """Return the seconds since 1970 that a flag's value means. Raises UsageError."""
    try:
        return parse_moment(text, now)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from None


def find_rows(context: Context, listing: ListOf, request: JsonObject) -> Found:
    """Return the rows that a request for a list asks for, from the daemon or else from the cache."""
    reply = ask(context, listing.name, **request)
    if reply is not None:
        return Found(context.daemon, [freshness_from(part) for part in reply["clusters"]], reply[listing.name])
    reader = CacheReader(context.settings.cache)
    wanted = parse_filter(request, LIST_FILTERS[listing.kind])
    parts = check_synced(reader.freshness(), sorted(wanted.clusters))
    statement = list_statement(listing.kind, wanted, parse_selection(request, listing.kind))
    return Found("the cache", parts, reader.rows(*statement))


def find_fresh(context: Context, listing: ListOf, request: JsonObject) -> Found:
    """Return the rows that a request for a list asks for, from the API servers themselves."""
    wanted = parse_filter(request, LIST_FILTERS[listing.kind])
    fresh = ask_fresh(context, sorted(wanted.clusters))
    rows = [row for row in fresh.rows(listing.kind) if wanted.matches(row)]
    selected = select_rows(rows, listing.kind, parse_selection(request, listing.kind))
    exit_code = UnreachableError.exit_code if fresh.failed else 0
    return Found("the API servers", fresh.parts, [row._asdict() for row in selected], exit_code)


def ask_fresh(context: Context, names: Sequence[str]) -> Fresh:
    """Ask the API servers of some clusters, all where none is named, and tell who does not answer."""
    if context.settings.remote is not None:
        raise UsageError("--fresh asks the clusters from this host", "leave out --remote")
    specs = {spec.name: spec for spec in configured_clusters(context.settings, context.environment) if spec.enabled}
    for name in names:
        if name not in specs:
            raise NotFoundError(f"no cluster {name!r}", nearest(name, specs) if specs else "none is configured")
    if not specs:
        raise NotFoundError("no cluster is configured", "see 'fabrik-daemon clusters add --help'")
    asked = [specs[name] for name in names or specs]
    fresh = ask_clusters(asked, context.settings, cached_snapshot(context.settings.cache), context.errors)
    for part in fresh.failed:
        context.warn(f"{part.cluster}: {part.error}")
    return fresh


def find_clusters(context: Context) -> list[ClusterRow]:
    """Return what the daemon, or else the cache, knows of clusters, and those that are configured on this host."""
    reply = ask(context, "clusters")
    known = reply["clusters"] if reply is not None else _clusters_in_cache(context)
    rows: dict[str, ClusterRow] = {said["name"]: row_from_object(ClusterRow, said) for said in known}
    here = context.settings.remote is None
    for spec in configured_clusters(context.settings, context.environment) if here else []:
        row = rows.get(spec.name, ClusterRow(spec.name))._replace(priority=spec.priority)
        rows[spec.name] = row if spec.enabled else row._replace(error=DISABLED)
    return list(rows.values())


def _clusters_in_cache(context: Context) -> list[JsonObject]:
    if not os.path.exists(context.settings.cache):
        return []
    reader = CacheReader(context.settings.cache)
    parts = reader.freshness()
    tell_source(context, "the cache", parts)
    connected = {part.cluster: part.connected for part in parts}
    rows = reader.rows("SELECT name, server, priority, error, last_event_at FROM clusters")
    return [{**row, "connected": connected[row["name"]]} for row in rows]


# ----------------------------------------------------------------------------------------------------------------------
# Commands: reading runs
# ----------------------------------------------------------------------------------------------------------------------


def runs_show(context: Context, arguments: argparse.Namespace) -> int:
    """Show one run whole."""
    named = [word for word in (arguments.id, arguments.run) if word is not None]
    if len(named) != 1:
        raise UsageError("name one run", "for example 'fabrik-daemon runs show @latest'")
    wanted, code = named[0], 0
    reply = None if arguments.fresh else ask(context, "run", runId=wanted)
    if arguments.fresh:
        source, parts, row, code = _fresh_run(context, wanted)
    elif reply is not None:
        source, parts = context.daemon, [freshness_from(part) for part in reply["clusters"]]
        row = reply["run"]
    else:
        reader = CacheReader(context.settings.cache)
        check_synced(reader.freshness(), [])
        run = pick_run([Run(**values) for values in reader.rows(*candidates_statement(wanted))], wanted)
        source, parts = "the cache", check_synced(reader.freshness(), [run.cluster])
        row = {**run._asdict(), **reader.run_details(run.run_id)}
    tell_source(context, source, parts, arguments.max_age)
    row["timeline"] = timeline_of(row, row["events"], time.time())
    row["log"] = [event["payload"] for event in row["events"] if event["event_type"] == "log_line"]
    add_usage(context, row["volumes"])
    shown = {**row, "events": row["events"] if arguments.events else None, "log": row["log"][-KEPT_LINES_SHOWN:]}
    print_answer(context, arguments.output, row, lambda now: format_run(shown, now, context.width, context.style))
    return code


def _fresh_run(context: Context, wanted: str) -> tuple[str, list[Freshness], JsonObject, int]:
    """Return where it comes from, how fresh it is, a run's row as its API server has it, and the exit code."""
    settings = context.settings
    try:  # what is known already says which cluster to ask
        names = [
            pick_run([row for row in cached_snapshot(settings.cache).rows if isinstance(row, Run)], wanted).cluster
        ]
    except (NotFoundError, UsageError):
        names = []
    fresh = ask_fresh(context, [] if wanted.startswith("@") else names)
    if not fresh.parts:
        raise UnreachableError("no cluster answered", "leave out --fresh to see what is known")
    run = pick_run([row for row in fresh.rows(Run) if isinstance(row, Run)], wanted)
    specs = {spec.name: spec for spec in configured_clusters(settings, context.environment)}
    if set(settings.status_sources) & {"sidecar", "exec"} and run.cluster in specs:
        run, troubles = fill_from_sources(settings, specs[run.cluster], run, context.errors)
        for trouble in troubles:
            context.warn(f"{run.run_id}: {trouble}")
    events: list[JsonObject] = []
    with contextlib.suppress(CacheError), contextlib.closing(CacheReader(settings.cache)) as reader:
        events = reader.run_details(run.run_id)["events"]
    tables = {"volumes": Volume, "warnings": ClusterEvent}
    details = {
        name: [row._asdict() for row in fresh.rows(kind) if getattr(row, "run_id", None) == run.run_id]
        for name, kind in tables.items()
    }
    parts = [part for part in fresh.parts if part.cluster == run.cluster]
    code = UnreachableError.exit_code if fresh.failed else 0
    return "the API server", parts, {**run._asdict(), "events": events, **details}, code


# ----------------------------------------------------------------------------------------------------------------------
# Commands: reading runs over time
# ----------------------------------------------------------------------------------------------------------------------

STATISTICS_BY: Final = {
    "spec": "spec_id",
    "template": "template",
    "project": "project",
    "cluster": "cluster",
    "namespace": "namespace",
    "schedule": "schedule_id",
}
GOALS: Final = (FINISHED, FAILED, BLOCKED, "terminal")


def runs_stats(context: Context, arguments: argparse.Namespace) -> int:
    """Show how runs went: counts, success rate, durations and time blocked."""
    now = time.time()
    request = list_request(arguments, Run, now)
    wanted = parse_filter(request, LIST_FILTERS[Run])
    reader = CacheReader(context.settings.cache)
    parts = check_synced(reader.freshness(), sorted(wanted.clusters))
    tell_source(context, "the cache", parts, arguments.max_age)
    selection = parse_selection(request, Run)._replace(limit=0, sort_by="", reverse=False)
    runs = [Run(**row) for row in reader.rows(*list_statement(Run, wanted, selection))]
    column = STATISTICS_BY[arguments.by]
    rows = run_statistics(runs, blocked_seconds(reader.status_events(), now), column)
    print_rows(context, arguments.output, statistics_columns(column), rows)
    return 0


def runs_wait(context: Context, arguments: argparse.Namespace) -> int:
    """Wait until runs have come to a status; end with 1 where one of them ended otherwise."""
    waiting = {run.run_id: run for run in _runs_to_wait_for(context, arguments)}
    codes = {_settle(context, run, arguments.goal) for run in list(waiting.values())}
    undecided = [run_id for run_id, run in waiting.items() if _has_come(run, arguments.goal) is None]
    if arguments.timeout is not None and undecided:
        signal.signal(signal.SIGALRM, _time_out)
        signal.setitimer(signal.ITIMER_REAL, max(arguments.timeout, LOCK_POLL_S))
    try:
        for run in _news_of(context, undecided):
            if run.run_id in undecided and _has_come(run, arguments.goal) is not None:
                undecided.remove(run.run_id)
                codes.add(_settle(context, run, arguments.goal))
            if not undecided:
                break
    finally:
        if arguments.timeout is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
    return max(code for code in codes if code is not None)


def _time_out(_number: int, _frame: object) -> NoReturn:
    raise TimedOutError("timed out", "the runs that were waited for go on")


def _runs_to_wait_for(context: Context, arguments: argparse.Namespace) -> list[Run]:
    """Return the runs that are named, or else match. Raises NotFoundError where there is none."""
    names = [*arguments.run, *arguments.id]
    request = {"clusters": arguments.cluster}
    wanted = {key: getattr(arguments, key) for key in LIST_FILTERS[Run] if getattr(arguments, key, None)}
    if not names and not wanted and not arguments.cluster:
        raise UsageError("which run?", "name one, or say --spec or --status")
    found = find_rows(context, RUNS, {**request, "filter": wanted} if wanted else request)
    tell_source(context, found.source, found.parts)
    runs = [row_from_object(Run, row) for row in found.rows]
    if not runs and not names:
        raise NotFoundError("no run matches", "see 'fabrik-daemon runs list'")
    return [pick_run(runs, name) for name in names] or runs


def _has_come(run: Run, goal: str) -> bool | None:
    """Return whether a run came to what is waited for, None while it still may."""
    is_over = run.status in TERMINAL or run.status is None or run.deleted_at is not None
    if run.status == goal or (goal == "terminal" and is_over):
        return True
    return False if is_over else None


def _settle(context: Context, run: Run, goal: str) -> int | None:
    """Tell of a run whose outcome is known; return its part of the exit code."""
    outcome = _has_come(run, goal)
    if outcome is None:
        return None
    reason = f" ({run.reason})" if run.reason else ""
    context.out.write(safe_text(f"{run.run_id} {run.status or UNKNOWN}{reason}") + "\n")
    context.out.flush()
    return 0 if outcome else FabrikError.exit_code


def _news_of(context: Context, run_ids: Sequence[str]) -> Iterator[Run]:
    """Yield runs as they are and as they change; outlasts a daemon that is restarted."""
    told = False
    while run_ids:
        client = connect(context.settings, context.warn)
        if client is None and not told:
            raise NotRunningError("the daemon is not running, and it alone sees changes", "run 'fabrik-daemon start'")
        try:
            if client is not None:
                client.wait_forever()
                wanted = {"run_id": list(run_ids), "type": ["run:*"]}
                for message in client.follow("subscribe", clusters=["*"], filter=wanted, snapshot=True):
                    rows = message.get("runs", ()) if message["type"] == "snapshot" else [message.get("row")]
                    yield from (_run_told(message, row) for row in rows if row)
        except NotRunningError as error:
            context.warn(f"{error}; waiting for it")
        told = True
        time.sleep(RECONNECT_S)


def _run_told(message: JsonObject, row: JsonObject) -> Run:
    run: Run = row_from_object(Run, row)
    is_gone = message["type"] == "run:removed" and run.deleted_at is None
    return run._replace(deleted_at=message.get("localTimestamp")) if is_gone else run


# ----------------------------------------------------------------------------------------------------------------------
# Commands: reading SQL
# ----------------------------------------------------------------------------------------------------------------------


def query(context: Context, arguments: argparse.Namespace) -> int:
    """Answer a user's SQL from the cache, within limits of time, memory and rows."""
    if arguments.schema:
        return _query_schema(context, arguments)
    sql, values = _sql_from(arguments.sql), dict(arguments.param)
    for name in values:
        if not re.search(rf"[:@$]{re.escape(name)}\b", sql):
            raise UsageError(f"--param {name}: no :{name} in the statement", "write it where its value belongs")
    reader = CacheReader(context.settings.cache)
    parts = check_synced(reader.freshness(), [])
    check_age(parts, arguments.max_age, time.time())
    result = run_query(reader, sql, context.settings.timing.query, values)
    tell_source(context, "the cache", parts)
    if result.is_cut:
        context.warn(f"only the first {QUERY_ROWS} rows are shown; add LIMIT or a condition")
    names = _different(result.columns)
    try:
        answer = [dict(zip(names, map(shown_value, row))) for row in result.rows]
        print_rows(context, arguments.output, columns_for(names), answer, names)
    except MemoryError:
        raise FabrikError(*TOO_MUCH_MEMORY) from None
    failed = arguments.fail_if == ("rows" if answer else "empty")
    return MATCHED_EXIT_CODE if failed else 0


MATCHED_EXIT_CODE: Final = 8  # of `query --fail-if`


def _sql_from(said: str | None) -> str:
    """Return the statement: as it stands, of a file (`@file.sql`), or of stdin (`-`). Raises UsageError."""
    if said is None:
        raise UsageError("SQL: a statement is missing", 'write for example "SELECT * FROM v_blocked", or see --schema')
    if said == "-":
        return sys.stdin.read()
    if not said.startswith("@"):
        return said
    text = read_text(said[1:])
    if text is None:
        raise UsageError(f"{said[1:]}: no such file", "after @ comes the path of a file with a statement")
    return text


def _different(names: Sequence[str]) -> list[str]:
    """Return the columns' names, numbered where they are the same, so that none hides another."""
    found: list[str] = []
    for name in names:
        same = sum(1 for other in names[: len(found)] if other == name)
        found.append(f"{name}_{same + 1}" if same else name)
    return found


def _query_schema(context: Context, arguments: argparse.Namespace) -> int:
    """Show the tables and columns that SQL can ask, and what they mean."""
    told = meanings()
    rows: list[JsonObject] = []
    for table, column, kind in schema_columns():
        if column and not any(row["table"] == table for row in rows):
            rows.append({"table": table, "column": None, "type": None, "meaning": told.get((table, ""))})
        meaning = told.get((table, column)) or told.get(("runs", column)) or told.get(("volumes", column))
        rows.append({"table": table, "column": column, "type": kind, "meaning": meaning})
    columns = (
        Column("TABLE", lambda row, now: "" if row["column"] else row["table"]),
        Column("COLUMN", field("column")),
        Column("TYPE", field("type"), rank=1),
        Column("MEANING", field("meaning"), least=20),
    )
    print_rows(context, arguments.output, columns, rows)
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# Commands: reading settings
# ----------------------------------------------------------------------------------------------------------------------


def config_show(context: Context, arguments: argparse.Namespace) -> int:
    """Show every setting, and what sets it."""
    flags = Flags(arguments.config, arguments.cache, arguments.socket)
    text = read_text(context.settings.config) or ""
    rows = settings_rows(context.settings, flags, context.environment, text)
    rows = [row if row["key"] != "socket" or row["value"] else {**row, "value": DEFAULT_SOCKET} for row in rows]
    columns = (
        Column("KEY", field("key")),
        Column("VALUE", field("value"), least=20),
        Column("SET BY", field("set_by")),
    )
    print_rows(context, arguments.output, columns, rows)
    return 0


def config_path(context: Context, arguments: argparse.Namespace) -> int:
    """Show where everything is."""
    settings = context.settings
    places = {
        "config": settings.config,
        "clusters": settings.clusters_file,
        "cache": settings.cache,
        "socket": settings.socket or socket_candidates(settings)[0],
        "lock": lock_path(settings.cache),
        "crash": crash_path(settings.cache),
    }
    rows = [{"name": name, "path": path, "exists": os.path.exists(path)} for name, path in places.items()]
    exists = Column("EXISTS", lambda row, now: "yes" if row["exists"] else "no")
    print_rows(context, arguments.output, (Column("NAME", field("name")), Column("PATH", field("path")), exists), rows)
    return 0


def config_check(context: Context, arguments: argparse.Namespace) -> int:
    """Check config.yaml, clusters.yaml and the kubeconfigs that it names; end with 2 where one cannot be used."""
    del arguments
    settings = context.settings
    clusters = parse_clusters(read_text(settings.clusters_file) or "", settings.clusters_file, context.environment)
    for path, what in ((settings.config, "no clusters in it"), (settings.clusters_file, f"{len(clusters)} clusters")):
        told = "ok" if path == settings.config else f"ok, {what}"
        context.out.write(
            safe_text(f"{path}: {told if os.path.exists(path) else 'not there, which is no fault'}") + "\n"
        )
    complaints = list(filter(None, map(_complaint_of, clusters)))
    for complaint in complaints:
        context.warn(complaint)
    return ConfigError.exit_code if complaints else 0


def _complaint_of(spec: ClusterSpec) -> str | None:
    """Return what is wrong with a cluster's kubeconfig, as far as reading it tells."""
    if spec.kubeconfig == IN_CLUSTER:
        return None
    contexts: list[str] = []
    try:
        for path in spec.kubeconfig.split(os.pathsep):
            contexts += [text_at(entry, "name") or "" for entry in list_at(read_kubeconfig(path), "contexts")]
    except ConfigError as error:
        return f"{spec.name}: {error}"
    if spec.context is not None and spec.context not in contexts:
        return f"{spec.name}: {spec.kubeconfig}: no context {spec.context!r}: {nearest(spec.context, contexts)}"
    return None


def config_init(context: Context, arguments: argparse.Namespace) -> int:
    """Write a config.yaml that explains every key."""
    path = context.settings.config
    if os.path.exists(path) and not arguments.force:
        raise ConfigError(f"{path}: there is one already", "say --force to write over it")
    write_whole(path, config_example())
    context.out.write(safe_text(f"wrote {path}") + "\n")
    return 0


_COMPLETION_SCRIPTS: Final = {
    "bash": """\
# bash completion of fabrik-daemon: source <(fabrik-daemon completion bash)
_fabrik_daemon() {
    local found
    COMPREPLY=()
    while IFS= read -r found; do
        COMPREPLY+=("$found")
    done < <("${1/#\\~/$HOME}" _complete bash "$2" "${COMP_LINE:0:COMP_POINT}" 2>/dev/null)
}
complete -o bashdefault -o default -F _fabrik_daemon fabrik-daemon fabrik
""",
    "zsh": """\
#compdef fabrik-daemon fabrik
# zsh completion of fabrik-daemon: source <(fabrik-daemon completion zsh), after compinit
_fabrik_daemon() {
    local -a found
    found=(${(f)"$(${(Q)words[1]} _complete zsh '' "${(j: :)words[1,CURRENT]}" 2>/dev/null)"})
    if (( ${#found} )); then
        _describe -V fabrik-daemon found
    else
        _files
    fi
}
if [ "$funcstack[1]" = "_fabrik_daemon" ]; then
    _fabrik_daemon "$@"
else
    compdef _fabrik_daemon fabrik-daemon fabrik
fi
""",
    "fish": """\
# fish completion of fabrik-daemon: fabrik-daemon completion fish | source
complete -c fabrik-daemon -f -a '(fabrik-daemon _complete fish "" (commandline -cp | string collect) 2>/dev/null)'
for flag in config cache socket kubeconfig token-file ca-file
    complete -c fabrik-daemon -r -F -l $flag
end
complete -c fabrik -w fabrik-daemon
""",
}


def completion(context: Context, arguments: argparse.Namespace) -> int:
    """Print what makes a shell complete this program's words."""
    context.out.write(_COMPLETION_SCRIPTS[arguments.shell])
    return 0


def write_whole(path: str, text: str) -> None:
    """Write a file of settings whole or not at all; who might read the old one may read it. Raises ConfigError."""
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        file, name = tempfile.mkstemp(dir=folder, prefix=f".{os.path.basename(path)}-")
        with open(file, "w", encoding="utf-8") as opened:
            if os.path.exists(path):
                old = os.stat(path)
                os.fchmod(file, old.st_mode & 0o777)
                with contextlib.suppress(PermissionError):
                    os.fchown(file, old.st_uid, old.st_gid)
            opened.write(text)
        os.replace(name, os.path.realpath(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", "name another place with --config") from None


# ----------------------------------------------------------------------------------------------------------------------
# Commands: reading logs
# ----------------------------------------------------------------------------------------------------------------------

_PREFIX_COLOURS: Final = ("36", "33", "32", "35", "34", "31")  # SGR


class _Printer:
    """Shows the lines of one run's log as they are, of several under their names, each in a colour."""

    def __init__(self, context: Context, direct: Direct, runs: Sequence[Run], *, timestamps: bool) -> None:
        self._context = context
        self._reactor = direct.reactor
        self._timestamps = timestamps
        self._several = len(runs) > 1
        colours = _PREFIX_COLOURS if context.style.colour else ("",)
        self._colours = {run.run_id: colours[index % len(colours)] for index, run in enumerate(runs)}
        self._to_flush = False
        self.is_unread = False  # the reader of our output has what it wanted

    def show(self, run: Run, line: ShowLine) -> None:
        """Show a line."""
        text = f"{line.line.time} {line.line.text}" if self._timestamps and line.line.time else line.line.text
        prefix, colour = (run.run_id, self._colours[run.run_id]) if self._several else ("", "")
        try:
            self._context.out.write(format_printed(text, prefix, colour))
        except BrokenPipeError:
            self._give_up()
        if not self._to_flush:
            self._to_flush = True
            self._reactor.call_soon(self._flush)

    def say(self, run: Run, text: str) -> None:
        """Tell the user something beside the log."""
        self._context.warn(f"{run.run_id}: {text}")

    def _flush(self) -> None:
        self._to_flush = False
        try:
            self._context.out.flush()
        except BrokenPipeError:
            self._give_up()

    def _give_up(self) -> None:
        self.is_unread = True
        self._reactor.stop()


def runs_logs(context: Context, arguments: argparse.Namespace) -> int:
    """Show what the containers of runs print: from their clusters, from Loki, or what was kept of a failed one."""
    if arguments.previous and arguments.follow:
        raise UsageError("--previous and --follow exclude each other", "what is over does not go on")
    runs = _chosen_runs(context, arguments)
    wish = LogWish(arguments.follow, arguments.previous, arguments.container, arguments.since, arguments.tail)
    direct = Direct(context.settings, context.errors)
    printer = _Printer(context, direct, runs, timestamps=arguments.timestamps)
    specs = {spec.name: spec for spec in configured_clusters(context.settings, context.environment)}
    lokis: dict[str, ServiceSite] = {}
    sources = []
    for run in runs:
        spec = specs.get(run.cluster)
        service = laos_for(context, run.cluster).loki
        if service is not None:
            lokis.setdefault(run.cluster, ServiceSite(direct, f"Loki of {run.cluster}", service))
        sources.append(LogSources(run, direct.site(spec) if spec else None, lokis.get(run.cluster)))
    try:
        outcomes = LogSession(direct, wish, printer, lambda run: kept_lines(context.settings.cache, run)).read(sources)
    finally:
        direct.close()
    if printer.is_unread:
        raise BrokenPipeError
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        context.warn(f"{outcome.run.run_id}: {outcome.error}")
    codes = [UnreachableError.exit_code if outcome.is_unreachable else FabrikError.exit_code for outcome in failed]
    return max(codes, default=0)


def _chosen_runs(context: Context, arguments: argparse.Namespace) -> list[Run]:
    """Return the runs that are named, or else match. Raises FabrikError where there is none."""
    names = [*arguments.run, *arguments.id]
    asked = {key: getattr(arguments, key) for key in LIST_FILTERS[Run] if getattr(arguments, key, None)}
    if not names and not asked and not arguments.cluster:
        raise UsageError("which run?", "name one, or say --status running")
    known = _known_runs(context)
    wanted = parse_filter({"clusters": arguments.cluster, "filter": asked}, LIST_FILTERS[Run])
    runs = list({run.run_id: run for run in (pick_run(known, name) for name in names)}.values())
    runs = runs or [run for run in known if wanted.matches(run)]
    if not runs:
        raise NotFoundError("no run matches", "see 'fabrik-daemon runs list'")
    if len(runs) > LOGS_AT_ONCE:
        raise UsageError(f"{len(runs)} runs match, {LOGS_AT_ONCE} at most can be read at once", "choose fewer")
    return runs


def _known_runs(context: Context) -> list[Run]:
    reply = ask(context, "runs")
    if reply is not None:
        rows = reply["runs"]
    else:
        reader = CacheReader(context.settings.cache)
        check_synced(reader.freshness(), [])
        rows = reader.rows(f"SELECT {', '.join(Run._fields)} FROM runs ORDER BY created_at DESC")  # noqa: S608
    return [Run(**{name: row.get(name) for name in Run._fields}) for row in rows]


def kept_lines(cache: str, run: Run) -> list[ShowLine]:
    """Return the last lines of a run that the cache has kept, none where there are none."""
    try:
        with contextlib.closing(CacheReader(cache)) as reader:
            found = reader.rows(
                "SELECT payload, cluster_timestamp FROM run_events WHERE run_id = ? AND event_type = 'log_line'"
                " ORDER BY id",
                (run.run_id,),
            )
    except CacheError:
        return []
    lines = []
    for row in found:
        said = parse_json(row["payload"]) or {}
        line = LogLine(row["cluster_timestamp"] or "", str(said.get("line", "")))
        lines.append(ShowLine(text_at(said, "pod") or "", text_at(said, "container") or "", line))
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Commands: daemon and clusters
# ----------------------------------------------------------------------------------------------------------------------


def start(context: Context, arguments: argparse.Namespace) -> int:
    """Start the daemon: in the background, or here until a signal comes."""
    context = _exposed(context, arguments)
    if arguments.rebuild_cache:
        aside = replace_cache(context.settings.cache)
        context.warn(f"the cache is made anew; the old one, and what clusters know no more, is {aside or 'not there'}")
    for note in discover(context.environment).notes:
        context.warn(note)
    if arguments.foreground:
        try:
            daemon = _make_daemon(context, context.settings.log_level)
        except AlreadyRunningError as error:
            context.warn(str(error))
            return 0
        threading.Thread(target=clean_unpacked, daemon=True).start()
        daemon.run(lambda: detach(context.settings.cache) if arguments.detach else None)
        end_without_words(context.settings.cache)
        return 0
    words = take_last_words(context.settings.cache, starting=True)
    if words:
        context.warn("the last daemon died; its last words:")
        context.errors.write(safe_lines(words))
    client = connect(context.settings, context.warn, own=True)
    verb = "runs already" if client else "started"
    if client is None:
        client = start_in_background(context)
    context.out.write(f"fabrik-daemon {verb}\n" + format_status(client.ask("status"), time.time(), context.width))
    client.close()
    return 0


def _exposed(context: Context, arguments: argparse.Namespace) -> Context:
    """Return the context of a daemon that is reached as the flags of `start` say. Raises ConfigError."""
    flags = ExposureFlags(**{name: getattr(arguments, name) for name in ExposureFlags._fields})
    exposure = exposure_from(flags, arguments.token_file, context.environment)
    if exposure is not None:
        names = ("tls_cert", "tls_key", "token_file", "kubeconfig")
        paths = {name: os.path.abspath(getattr(exposure, name)) for name in names if getattr(exposure, name)}
        exposure = exposure._replace(**paths)  # the daemon's own folder is another
        read_secrets(exposure)  # what is wrong with them is told here, before there is a daemon
    if arguments.foreground:
        os.environ.pop("FABRIK_TOKEN", None)  # exec plugins of kubeconfigs need not have it
    return context._replace(settings=context.settings._replace(exposure=exposure))


def stop(context: Context, arguments: argparse.Namespace) -> int:
    """End the daemon, and wait until it has."""
    del arguments
    client = connect(context.settings, own=True)
    if client is None:
        raise NotRunningError("the daemon is not running", "there is nothing to stop")
    client.ask("shutdown")
    client.wait_for_end()
    ends_at = time.monotonic() + context.settings.timing.stop + CLIENT_TIMEOUT_S
    while is_kept_up(context.settings.cache) and time.monotonic() < ends_at:
        time.sleep(LOCK_POLL_S)  # the lock is let go last, and only asking tells
    context.out.write("fabrik-daemon stopped\n")
    return 0


def restart(context: Context, arguments: argparse.Namespace) -> int:
    """End the daemon where it runs, and start it again."""
    with contextlib.suppress(NotRunningError):
        stop(context, arguments)
    return start(context, arguments)


def reload(context: Context, arguments: argparse.Namespace) -> int:
    """Have the daemon read clusters.yaml and kubeconfigs again."""
    del arguments
    client = _running(context, own=True)
    reply = client.ask("reload")
    told = [f"{what} {', '.join(reply[what])}" for what in ("added", "changed", "removed") if reply.get(what)]
    context.out.write(f"reloaded: {safe_text('; '.join(told) or 'nothing changed')}\n")
    return 0


def status(context: Context, arguments: argparse.Namespace) -> int:
    """Say how the daemon is, and how it stands with each cluster."""
    client = connect(context.settings, context.warn)
    if client is None:
        words = take_last_words(context.settings.cache, starting=False)
        if words:
            context.warn("the last daemon died; its last words:")
            context.errors.write(safe_lines(words))
        raise NotRunningError("the daemon is not running", "run 'fabrik-daemon start'")
    reply = client.ask("status")
    del reply["type"]
    print_answer(context, arguments.output, reply, lambda now: format_status(reply, now, context.width))
    return 0


def logs(context: Context, arguments: argparse.Namespace) -> int:
    """Show the daemon's last log lines, and those to come."""
    client = _running(context)
    if not arguments.follow:
        for line in client.ask("logs", lines=arguments.lines, level=arguments.level)["lines"]:
            context.out.write(format_log_line(line))
        return 0
    client.wait_forever()
    for message in client.follow("logs", lines=arguments.lines, level=arguments.level, follow=True):
        if message["type"] == "log":
            context.out.write(format_log_line(message))
            context.out.flush()
    return 0


def runs_watch(context: Context, arguments: argparse.Namespace) -> int:
    """Show changes of runs as they come."""
    client = connect_or_start(context, may_start=not arguments.no_start)
    client.wait_forever()
    wanted = {key: getattr(arguments, key) for key in STREAM_FILTERS if getattr(arguments, key, None)}
    fields = {"clusters": arguments.cluster or ["*"], "filter": wanted, "includeHistory": arguments.history}
    for message in client.follow("subscribe", **fields):
        if arguments.output in ("json", "jsonl"):
            context.out.write(format_json_line(message))
        elif str(message["type"]).startswith("run:"):
            context.out.write(format_run_event(message, context.width, context.style))
        elif message["type"] == "lagged":
            context.warn("some changes were missed; the list begins anew")
        elif message["type"] == "snapshot" and message["runs"]:
            context.out.write(format_table(RUN_COLUMNS, message["runs"], time.time(), context.width))
        context.out.flush()
    return 0


def demo(context: Context, arguments: argparse.Namespace) -> int:
    """Show a daemon at work on scripted clusters."""
    return run_demo(context.out, context.environment, arguments.speed)


def dashboard(context: Context, arguments: argparse.Namespace) -> int:
    """Show all runs of all clusters live, in the terminal."""
    if not (context.out.isatty() and sys.stdin.isatty()) or context.environment.get("TERM", "dumb") == "dumb":
        raise UsageError("the dashboard needs a terminal", "use 'fabrik-daemon runs list' or 'runs watch'")
    settings = context.settings
    is_here = settings.remote is None
    environment = {**os.environ, "FABRIK_CONFIG": settings.config, "FABRIK_CACHE": settings.cache}
    if settings.socket:
        environment["FABRIK_SOCKET"] = settings.socket
    places = Places(
        settings.cache if is_here else "",
        lambda tell: connect(settings, tell),
        (lambda run_id: open_log(run_id, environment)) if is_here else None,
        (lambda: start_in_background(context)) if is_here and settings.autostart and not arguments.no_start else None,
    )
    return run_dashboard(places, DashboardOptions(palette_for(arguments.theme, context.environment), arguments.bell))


def sync(context: Context, arguments: argparse.Namespace) -> int:
    """List every cluster once, bring the cache up to date, and end."""
    del arguments
    try:
        daemon = _make_daemon(context, "warning")
    except AlreadyRunningError:
        return _daemon_keeps_it(context)
    daemon.run_once()
    clusters = daemon.clusters_in_order()
    for cluster in clusters:
        if isinstance(cluster.error, TwinError) or not all(watcher.was_listed for watcher in cluster.watchers):
            context.warn(f"{cluster.spec.name}: {cluster.trouble or 'no answer in time'}")
    codes = {_sync_code(cluster) for cluster in clusters}
    return codes.pop() if len(codes) == 1 else UnreachableError.exit_code


def _sync_code(cluster: Cluster) -> int:
    """Return a cluster's part of the exit code: rights that are missing for some resources are no failure."""
    if isinstance(cluster.error, TwinError):
        return 0
    if isinstance(cluster.error, ConfigError):
        return ConfigError.exit_code
    listed = [watcher for watcher in cluster.watchers if watcher.was_listed]
    forbidden = [watcher for watcher in cluster.watchers if watcher.told.state == FORBIDDEN]
    return 0 if listed and len(listed) + len(forbidden) == len(cluster.watchers) else UnreachableError.exit_code


def clusters_add(context: Context, arguments: argparse.Namespace) -> int:
    """Add a cluster to clusters.yaml; a daemon that runs follows it at once."""
    settings, path = context.settings, context.settings.clusters_file
    clusters = parse_clusters(read_text(path) or "", path, context.environment)
    check_cluster_name(arguments.name, "--name")
    if any(cluster.name == arguments.name for cluster in clusters):
        raise UsageError(
            f"a cluster named {arguments.name!r} stands in {path}", "remove it first, or take another name"
        )
    kubeconfig = os.path.abspath(expand_home(arguments.kubeconfig, context.environment))
    names = [text_at(entry, "name") or "" for entry in list_at(read_kubeconfig(kubeconfig), "contexts")]
    if arguments.context is not None and arguments.context not in names:
        raise UsageError(f"{kubeconfig}: no context {arguments.context!r}", nearest(arguments.context, names))
    spec = ClusterSpec(
        arguments.name,
        kubeconfig,
        context=arguments.context,
        namespaces=parse_namespaces(arguments.namespace or ["fabrik-runs"], "--namespace"),
        label_selector=arguments.label_selector,
        priority=arguments.priority,
    )
    _write_clusters(settings, [*clusters, spec])
    context.out.write(f"added {spec.name} to {path}\n")
    _reload_if_running(context)
    return 0


def clusters_discover(context: Context, arguments: argparse.Namespace) -> int:
    """Show which contexts of kubeconfigs are fabrik's, and whether they are followed."""
    discovery = discover(context.environment)
    path = context.settings.clusters_file
    named = parse_clusters(read_text(path) or "", path, context.environment)
    configured = {(spec.kubeconfig, spec.context) for spec in named}
    names = {spec.name for spec in named}
    rows = []
    for spec in discovery.clusters:
        taken = "another cluster in clusters.yaml has this name" if spec.name in names else "followed"
        status = "in clusters.yaml" if (spec.kubeconfig, spec.context) in configured else taken
        rows.append({"name": spec.name, "context": spec.context, "kubeconfig": spec.kubeconfig, "status": status})
    for note in discovery.notes:
        context.warn(note)
    print_answer(
        context,
        arguments.output,
        rows,
        lambda now: format_table(DISCOVERY_COLUMNS, rows, now, context.width, context.style),
    )
    return 0


def clusters_test(context: Context, arguments: argparse.Namespace) -> int:
    """Connect to clusters and list what the daemon would follow; nothing is kept."""
    specs = {spec.name: spec for spec in configured_clusters(context.settings, context.environment)}
    for name in arguments.name:
        if name not in specs:
            raise NotFoundError(f"no cluster {name!r}", nearest(name, specs) if specs else "none is configured")
    wanted = [specs[name] for name in arguments.name or specs]
    if not wanted:
        raise NotFoundError("no cluster is configured", "see 'fabrik-daemon clusters add --help'")
    rows = examine_clusters(wanted, context.settings, context.errors)
    print_answer(context, arguments.output, rows, lambda now: format_examination(rows, context.width))
    return 0 if all(row["ok"] for row in rows) else UnreachableError.exit_code


def clusters_remove(context: Context, arguments: argparse.Namespace) -> int:
    """Take a cluster out of clusters.yaml; what the cache knows of it stays until its retention ends."""
    path = context.settings.clusters_file
    clusters = parse_clusters(read_text(path) or "", path, context.environment)
    kept = [cluster for cluster in clusters if cluster.name != arguments.name]
    if len(kept) == len(clusters):
        names = [cluster.name for cluster in clusters]
        hint = nearest(arguments.name, names) if names else "it lists none"
        raise NotFoundError(f"no cluster {arguments.name!r} in {path}", hint)
    _write_clusters(context.settings, kept)
    context.out.write(f"removed {arguments.name} from {path}; its runs stay in the cache until their retention ends\n")
    _reload_if_running(context)
    return 0


def _running(context: Context, *, own: bool = False) -> Client | RemoteClient:
    client = connect(context.settings, context.warn, own=own)
    if client is None:
        raise NotRunningError("the daemon is not running", "run 'fabrik-daemon start'")
    return client


def _reload_if_running(context: Context) -> None:
    client = connect(context.settings, own=True)
    if client is not None:
        try:
            client.ask("reload")
        except (RemoteError, NotRunningError) as error:
            context.warn(f"the daemon goes on as before: {error}")
        client.close()


def _make_daemon(context: Context, log_level: str) -> Daemon:
    def read_clusters() -> list[ClusterSpec]:
        clusters = configured_clusters(context.settings, context.environment)
        if not any(cluster.enabled for cluster in clusters):
            raise ConfigError(
                "no cluster is configured, and no kubeconfig has one of fabrik's",
                "see 'fabrik-daemon clusters add --help'",
            )
        return clusters

    return Daemon(context.settings._replace(log_level=log_level), read_clusters, context.errors)


def _daemon_keeps_it(context: Context) -> int:
    """Answer a sync while a daemon runs: it is the daemon that keeps the cache up to date."""
    away = [part for part in CacheReader(context.settings.cache).freshness() if not part.connected]
    state = "and follows every cluster" if not away else "but not every cluster answers it"
    context.warn(f"a daemon keeps this cache up to date, {state}")
    if away:
        context.warn(format_freshness("the cache", away, time.time()))
    return UnreachableError.exit_code if away else 0


def _write_clusters(settings: Settings, clusters: Sequence[ClusterSpec]) -> None:
    """Write clusters.yaml whole or not at all."""
    head = "# Written by 'fabrik-daemon clusters'; edit it as you like.\n"
    write_whole(settings.clusters_file, head + format_clusters(clusters))


# ----------------------------------------------------------------------------------------------------------------------
# Commands: daemon and clusters: doctor
# ----------------------------------------------------------------------------------------------------------------------


def doctor(context: Context, arguments: argparse.Namespace) -> int:
    """Look at everything that the daemon needs, and say how to end what is wrong with it."""
    home = context.environment.get("HOME", "/")
    findings, specs = _configured(context, named=arguments.config is not None)
    findings += examine_host(context.settings, home)
    findings += examine_clusters_and_laos(specs, context.settings, context.errors, rbac=arguments.rbac)
    rows = [finding._asdict() for finding in findings]
    print_answer(context, arguments.output, rows, lambda _now: format_findings(rows, context.style))
    return FabrikError.exit_code if any(finding.level == "problem" for finding in findings) else 0


def _configured(context: Context, *, named: bool) -> tuple[list[Finding], list[ClusterSpec]]:
    """Look at the files of settings; return also the clusters that can be looked at."""
    settings, environment = context.settings, context.environment
    findings: list[Finding] = []
    try:
        text = read_text(settings.config)
        parse_config(text or "", settings.config, environment)
        if text is not None or not named:
            told = "it can be used" if text is not None else "there is none: defaults hold"
            findings.append(Finding("configuration", settings.config, "ok", told))
        else:
            fix = "name the config.yaml to use with --config"
            findings.append(Finding("configuration", settings.config, "problem", "no such file", fix))
    except ConfigError as error:
        findings.append(problem_of("configuration", settings.config, error))
    try:
        specs = [spec for spec in configured_clusters(settings, environment) if spec.enabled]
    except ConfigError as error:
        specs = discover(environment).clusters
        findings.append(problem_of("configuration", settings.clusters_file, error))
    for note in discover(environment).notes:
        findings.append(
            Finding("configuration", "kubeconfig", "problem", note, "correct it, or leave it out of KUBECONFIG")
        )
    if not specs:
        told = "no cluster is configured, and no kubeconfig has one of fabrik's"
        fix = "fabrik-daemon clusters add --name NAME --kubeconfig FILE"
        findings.append(Finding("configuration", settings.clusters_file, "problem", told, fix))
    return findings, specs


# ----------------------------------------------------------------------------------------------------------------------
# Commands: installing
# ----------------------------------------------------------------------------------------------------------------------


def install_service(context: Context, arguments: argparse.Namespace) -> int:
    """Have the host's service manager start the daemon."""
    installation, notes = _installation(context, arguments)
    if arguments.print:
        context.out.write(installation.files()[-1].content.decode())
        return 0
    for note in notes:
        context.warn(note)
    _check_rights(arguments)
    installer = Installer(installation, lambda line: _tell(context, line), dry_run=arguments.dry_run)
    installer.install((lambda: _end_daemon(context)) if arguments.now else None)
    for hint in _hints(installation, now=arguments.now):
        _tell(context, hint)
    return 0


def uninstall_service(context: Context, arguments: argparse.Namespace) -> int:
    """Take the service away again; settings, cache and executable stay."""
    arguments.on_demand, arguments.env = False, []
    installation, _ = _installation(context, arguments, ("fabrik-daemon",))
    _check_rights(arguments)
    Installer(installation, lambda line: _tell(context, line), dry_run=arguments.dry_run).uninstall()
    return 0


def _tell(context: Context, line: str) -> None:
    context.out.write(f"{safe_text(line)}\n")


def _installation(
    context: Context, arguments: argparse.Namespace, command: tuple[str, ...] = ()
) -> tuple[Installation, list[str]]:
    """Return what the arguments and this moment make of a service, and notes on what it lacks. Raises UsageError.

    Without a `command` it is the one that runs now.
    """
    manager = arguments.manager or manager_of_host()
    if manager == "launchd" and arguments.system:
        raise UsageError("launchd starts it as an agent of its user", "leave out --system")
    if manager == "openrc" and not arguments.system:
        raise UsageError("OpenRC's services are the system's", "say --system, as root")
    if arguments.root and not arguments.system:
        raise UsageError("--root is for the system's service", "say --system too")
    if arguments.on_demand and manager != "systemd":
        raise UsageError("--on-demand is systemd's", "leave it out")
    home = os.path.abspath(expand_home("~", context.environment))
    settings, system = context.settings, arguments.system
    environment, notes = service_environment(context.environment, system=system)
    if not system:
        environment.update(FABRIK_CONFIG=os.path.abspath(settings.config), FABRIK_CACHE=settings.cache)
        environment.update({"FABRIK_SOCKET": settings.socket} if settings.socket else {})
    environment.update(dict(arguments.env))
    program = "/usr/local/bin/fabrik-daemon" if system else f"{home}/.local/bin/fabrik-daemon"
    own_socket = choose_socket(settings) if arguments.on_demand and not system else SYSTEM_SOCKET
    return Installation(
        manager=manager,
        system=system,
        on_demand=arguments.on_demand,
        root=os.path.abspath(arguments.root).rstrip("/") if arguments.root else "",
        home=home,
        program=program,
        command=command or service_command(program, system=system),
        environment=environment,
        socket=own_socket,
        crash_file=crash_path(settings.cache),
    ), notes


def _check_rights(arguments: argparse.Namespace) -> None:
    if arguments.system and not arguments.root and not arguments.dry_run and os.geteuid() != 0:
        raise UsageError("a service of the system needs root", "run it with sudo, or leave out --system")


def _end_daemon(context: Context) -> None:
    client = connect(context.settings, own=True)
    if client is not None:
        client.ask("shutdown")
        client.wait_for_end()


def _hints(installation: Installation, *, now: bool) -> Iterator[str]:
    """Yield what there is left to do."""
    if installation.manager == "systemd" and not installation.system:
        lingering = [entry.pw_name for entry in pwd.getpwall() if entry.pw_uid == os.getuid()]
        if not any(os.path.exists(f"/var/lib/systemd/linger/{name}") for name in lingering):
            yield "it runs while you are logged in; for it to start with the host: loginctl enable-linger"
    if installation.system and not installation.root:
        yield "clusters are told with: fabrik-daemon --config /etc/fabrik/daemon/config.yaml clusters add ..."
        yield "who may ask it: members of the group fabrik, for instance: usermod --append --groups fabrik NAME"
    if not now and not installation.root:
        starts = {
            "systemd": f"systemctl {'' if installation.system else '--user '}restart {installation.unit}",
            "launchd": f"launchctl load {installation.main_file}",
            "openrc": "rc-service fabrik-daemon restart",
        }
        moment = "boot" if installation.system else "login"
        yield f"it starts with the next {moment}, or now: {starts[installation.manager]}"


def licenses(context: Context, arguments: argparse.Namespace) -> int:
    """Tell what the executable carries, and under which licences."""
    bill = read_text(os.path.join(os.path.dirname(os.path.abspath(__file__)), BILL_OF_MATERIALS))
    if bill is None:
        raise NotFoundError("there is no bill of materials", "it is part of the executable that ./build.sh makes")
    if arguments.sbom:
        context.out.write(f"{bill}\n")
        return 0
    rows = [_licence_row(component) for component in list_at(json.loads(bill), "components")]
    if arguments.texts:
        for row in rows:
            context.out.write(f"---- {row['name']} {row['version']} ({row['licence']})\n\n")
            context.out.writelines(f"{text.strip()}\n\n" for text in _licence_texts(str(row["name"])))
        return 0
    print_answer(context, arguments.output, rows, lambda now: format_table(LICENCE_COLUMNS, rows, now, context.width))
    return 0


def _licence_row(component: JsonObject) -> JsonObject:
    licence = " AND ".join(str(part.get("expression")) for part in list_at(component, "licenses"))
    return {"name": component["name"], "version": component["version"], "licence": licence}


def _licence_texts(name: str) -> Iterator[str]:
    """Yield the texts of a library's licences, as it brings them."""
    libraries = os.path.dirname(os.path.abspath(__file__))
    for folder in sorted(os.listdir(libraries)):
        library = folder[: -len(".dist-info")].rpartition("-")[0] if folder.endswith(".dist-info") else ""
        if re.sub(r"[-_.]+", "-", library).lower() == name:
            for where, _, files in os.walk(os.path.join(libraries, folder)):
                for file in sorted(files):
                    if file.startswith(("LICENSE", "NOTICE", "COPYING", "AUTHORS")):
                        yield read_text(os.path.join(where, file)) or ""


def manifests(context: Context, arguments: argparse.Namespace) -> int:
    """Print what puts the daemon, and what watches it, into a cluster."""
    context.out.write(format_manifest(arguments.kind, dict(arguments.set)))
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# Command line: reading
# ----------------------------------------------------------------------------------------------------------------------


class Command(NamedTuple):
    """A command: its words, what it does, examples, its arguments, its function."""

    words: str
    summary: str
    examples: tuple[str, ...]
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Context, argparse.Namespace], int]


def output_argument(parser: argparse.ArgumentParser) -> None:
    """Add the choice of a format."""
    parser.add_argument("-o", "--output", choices=FORMATS, default="table", help="format (default: table)")
    parser.add_argument("--no-headers", action="store_true", help="without titles (table, wide, csv, tsv)")


def _fresh_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fresh", action="store_true", help="ask the API servers themselves; 5 where one does not answer in time"
    )


def _freshness_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-age", type=_seconds_argument, metavar="AGE", help="end with 6 where what is known is older than AGE (5m)"
    )


def _cluster_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster", action="append", default=[], metavar="NAME", help="only this cluster's (repeatable)"
    )


def _column_argument(parser: argparse.ArgumentParser, flag: str, column: str, what: str) -> None:
    metavar = flag[2:].upper()
    parser.add_argument(flag, action="append", default=[], dest=column, metavar=metavar, help=f"{what} (repeatable)")


def _selection_arguments(parser: argparse.ArgumentParser) -> None:
    _cluster_argument(parser)
    parser.add_argument(
        "--status", action="append", default=[], choices=(*STATUSES, UNKNOWN), help="only this status (repeatable)"
    )
    _column_argument(
        parser, "--phase", "phase", "only this phase: discover, implement, validate, review, human-gate, done"
    )
    _column_argument(parser, "--spec", "spec_id", "only runs of this spec")
    _column_argument(parser, "--project", "project", "only runs of this project")
    _column_argument(parser, "--template", "template", "only runs of this template")
    _column_argument(parser, "--namespace", "namespace", "only this namespace's")


def _start_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-start", action="store_true", help="start no daemon where none runs")


def _watch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-w", "--watch", action="store_true", help="then go on with each row that changes")
    _start_argument(parser)


def _list_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every list of rows takes."""
    _watch_arguments(parser)
    _order_arguments(parser, "only what is not older: 24h, 7d, 2026-02-16, 2026-02-16T20:00Z")
    _fresh_argument(parser)
    _freshness_arguments(parser)
    output_argument(parser)


def _order_arguments(parser: argparse.ArgumentParser, since: str) -> None:
    parser.add_argument("--since", metavar="TIME", help=since)
    parser.add_argument("--sort-by", metavar="COLUMN", help="rising by a column, as -o json names them")
    parser.add_argument("--reverse", action="store_true", help="the other way round")
    parser.add_argument("--limit", type=count_argument, metavar="N", help="at most the first N rows")


def _runs_list_arguments(parser: argparse.ArgumentParser) -> None:
    _selection_arguments(parser)
    parser.add_argument("--at", metavar="TIME", help="as they were known then: 2h (ago), 2026-02-16T20:00Z")
    _list_arguments(parser)


def _runs_stats_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--by", choices=tuple(STATISTICS_BY), default="spec", help="counted by this (default: spec)")
    _selection_arguments(parser)
    parser.add_argument("--since", metavar="TIME", help="only runs that are not older: 24h, 7d, 2026-02-16")
    parser.set_defaults(sort_by=None, reverse=False, limit=None)
    _freshness_arguments(parser)
    output_argument(parser)


def _runs_wait_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", nargs="*", metavar="RUN", help="a run_id, its beginning, @latest, or @running and the like"
    )
    parser.add_argument("--id", action="append", default=[], metavar="RUN", help="the same (repeatable)")
    parser.add_argument(
        "--for", dest="goal", choices=GOALS, default="terminal", help="what to wait for (default: terminal, any end)"
    )
    parser.add_argument("--timeout", type=_seconds_argument, metavar="TIME", help="end with 7 after so long (30m)")
    _selection_arguments(parser)


def _schedules_list_arguments(parser: argparse.ArgumentParser) -> None:
    _cluster_argument(parser)
    parser.add_argument(
        "--status",
        action="append",
        default=[],
        choices=SCHEDULE_STATES,
        dest="state",
        help="only this state (repeatable)",
    )
    _column_argument(parser, "--namespace", "namespace", "only this namespace's")
    _list_arguments(parser)


def _volumes_list_arguments(parser: argparse.ArgumentParser) -> None:
    _cluster_argument(parser)
    _column_argument(parser, "--namespace", "namespace", "only this namespace's")
    _column_argument(parser, "--run", "run_id", "only this run's")
    parser.add_argument(
        "--phase",
        "--status",
        action="append",
        default=[],
        dest="phase",
        metavar="PHASE",
        help="only this phase: Pending, Bound, Lost (repeatable)",
    )
    parser.add_argument("--usage", action="store_true", help="with the bytes in use, from Prometheus")
    _list_arguments(parser)


def _warnings_list_arguments(parser: argparse.ArgumentParser) -> None:
    _cluster_argument(parser)
    _column_argument(parser, "--namespace", "namespace", "only this namespace's")
    _column_argument(parser, "--run", "run_id", "only this run's")
    _column_argument(parser, "--reason", "reason", "only warnings for this reason")
    _list_arguments(parser)


def _clusters_list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", action="append", default=[], metavar="NAME", help="only this one (repeatable)")
    parser.add_argument(
        "--status", action="append", default=[], choices=CLUSTER_STATUSES, help="only this status (repeatable)"
    )
    _watch_arguments(parser)
    _order_arguments(parser, "only those that told something since then: 24h, 7d, 2026-02-16")
    output_argument(parser)


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", nargs="?", metavar="RUN", help="a run_id, its beginning, @latest, or @blocked and the like"
    )
    parser.add_argument("--id", metavar="RUN", help="the same")


def _runs_show_arguments(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    parser.add_argument("--events", action="store_true", help="with every event of its history")
    _fresh_argument(parser)
    _freshness_arguments(parser)
    output_argument(parser)


def _runs_logs_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="*", metavar="RUN", help="run_id, its beginning, @latest or @blocked")
    parser.add_argument("--id", action="append", default=[], metavar="RUN", help="the same (repeatable)")
    _selection_arguments(parser)
    parser.add_argument(
        "-f", "--follow", action="store_true", help="go on over restarts, new Pods and lost connections"
    )
    parser.add_argument("-p", "--previous", action="store_true", help="of the container before the present one")
    parser.add_argument("-c", "--container", metavar="NAME", help="another container than the main one")
    parser.add_argument("--since", type=_seconds_argument, metavar="AGE", help="only lines of so long, as 10m")
    parser.add_argument("--tail", type=count_argument, metavar="N", help="only the last N lines")
    parser.add_argument("--timestamps", action="store_true", help="begin each line with its time")


def _seconds_argument(text: str) -> float:
    return parse_duration(text)


def _config_init_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="write over the one that is there")


def _completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), metavar="SHELL", help="bash, zsh or fish")


def _query_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sql", nargs="?", metavar="SQL", help="one SELECT; @FILE takes it from a file, - from stdin")
    parser.add_argument("--schema", action="store_true", help="show tables, views and columns, and what they mean")
    parser.add_argument(
        "--param", action="append", default=[], type=_parameter, metavar="NAME=VALUE", help="the value of :NAME"
    )
    parser.add_argument(
        "--fail-if", choices=("rows", "empty"), help="end with 8 where there are rows, or none (for cron)"
    )
    _freshness_arguments(parser)
    output_argument(parser)


def _parameter(text: str) -> tuple[str, str | int | float]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    number = parse_number(value)
    if number is None:
        return name, value
    return name, int(value) if "." not in value and abs(number) <= INT_MAX else number


def _runs_watch_arguments(parser: argparse.ArgumentParser) -> None:
    _selection_arguments(parser)
    parser.add_argument("--history", type=count_argument, metavar="N", help="begin with the last N changes")
    _start_argument(parser)
    output_argument(parser)


def count_argument(text: str) -> int:
    """Return the number that an argument is, 1 or more. Raises ValueError."""
    if not text.isdigit() or int(text) < 1:
        raise ValueError(text)
    return min(int(text), INT_MAX)


READING: Final = (
    Command(
        "runs list",
        "list runs",
        (
            "runs list",
            "runs list --cluster prod --status blocked --status failed --since 24h",
            "runs list --sort-by finished_at --reverse --limit 50 -o jsonl",
            "runs list --at 2h",
        ),
        _runs_list_arguments,
        runs_list,
    ),
    Command(
        "runs watch",
        "show changes of runs as they come",
        ("runs watch", "runs watch --status blocked --history 10 -o json"),
        _runs_watch_arguments,
        runs_watch,
    ),
    Command(
        "runs show",
        "show one run whole",
        ("runs show --id 01jk7v8x9m3qn5r2t4w6y8z0ab", "runs show @latest", "runs show @blocked --events -o yaml"),
        _runs_show_arguments,
        runs_show,
    ),
    Command(
        "runs stats",
        "show how runs went: counts, success, durations, time blocked",
        ("runs stats", "runs stats --by cluster --since 7d -o json"),
        _runs_stats_arguments,
        runs_stats,
    ),
    Command(
        "runs wait",
        "wait until runs have come to a status (0 it came, 1 it ended otherwise, 7 timed out)",
        ("runs wait @latest --for finished --timeout 30m", "runs wait --spec feature-7"),
        _runs_wait_arguments,
        runs_wait,
    ),
    Command(
        "runs logs",
        "show what runs print",
        (
            "runs logs 01jk7v8x9m3qn5r2t4w6y8z0ab --tail 100",
            "runs logs --status running --follow",
            "runs logs --id 01jk7v8x9m3qn5r2t4w6y8z0ab --previous --timestamps",
        ),
        _runs_logs_arguments,
        runs_logs,
    ),
    Command(
        "schedules list",
        "list schedules",
        ("schedules list", "schedules list --cluster prod --sort-by next_run_at"),
        _schedules_list_arguments,
        schedules_list,
    ),
    Command(
        "volumes list",
        "list volumes",
        ("volumes list", "volumes list --sort-by capacity_bytes --reverse --limit 10", "volumes list --usage"),
        _volumes_list_arguments,
        volumes_list,
    ),
    Command(
        "warnings list",
        "list warnings",
        ("warnings list --since 24h", "warnings list --run 01jk7v8x9m3qn5r2t4w6y8z0ab -o jsonl"),
        _warnings_list_arguments,
        warnings_list,
    ),
    Command(
        "clusters list",
        "list the clusters",
        ("clusters list", "clusters list --status disconnected -o json", "clusters list --watch"),
        _clusters_list_arguments,
        clusters_list,
    ),
    Command(
        "query",
        "answer SQL from the cache",
        (
            "query \"SELECT run_id, status FROM runs WHERE status = 'blocked'\"",
            "query --schema",
            'query "SELECT * FROM v_failures WHERE cluster = :c" --param c=prod -o csv',
            'query "SELECT * FROM v_blocked WHERE blocked_seconds > 3600" --fail-if rows',
        ),
        _query_arguments,
        query,
    ),
    Command(
        "config show",
        "show every setting, and what sets it",
        ("config show", "config show -o json"),
        output_argument,
        config_show,
    ),
    Command(
        "config path", "show where everything is", ("config path", "config path -o json"), output_argument, config_path
    ),
    Command(
        "config check",
        "check config.yaml, clusters.yaml and the kubeconfigs they name",
        ("config check", "config check --config ./config.yaml"),
        lambda parser: None,
        config_check,
    ),
    Command(
        "config init",
        "write a config.yaml that explains every key",
        ("config init", "config init --config ./config.yaml"),
        _config_init_arguments,
        config_init,
    ),
    Command(
        "completion",
        "print what makes a shell complete commands, run ids, clusters and the like",
        ("completion bash > ~/.local/share/bash-completion/completions/fabrik-daemon",),
        _completion_arguments,
        completion,
    ),
)


# ----------------------------------------------------------------------------------------------------------------------
# Command line: commands
# ----------------------------------------------------------------------------------------------------------------------


def _start_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--foreground", action="store_true", help="stay in the terminal; end with ^C")
    parser.add_argument("--rebuild-cache", action="store_true", help="put the cache aside, and fill a new one")
    parser.add_argument("--detach", action="store_true", help=argparse.SUPPRESS)  # what the background process is told
    remote = parser.add_argument_group("remote mode (README has its variables)")
    remote.add_argument("--mode", choices=MODES, help="remote: serve other hosts too (default: $MODE, else host)")
    remote.add_argument(
        "--listen", metavar="ADDRESS", help="'*' for all (default: that with TLS or a proxy, else 127.0.0.1)"
    )
    remote.add_argument("--port", metavar="N", help="TCP port (default: $WEBSOCKET_PORT, else 8080)")
    remote.add_argument("--tls-cert", metavar="PATH", help="its certificate, and those between it and its authority")
    remote.add_argument("--tls-key", metavar="PATH", help="its key")
    remote.add_argument("--behind-proxy", action="store_true", help="a proxy in front does TLS")
    remote.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name it goes by (repeatable)"
    )
    remote.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL", help="of web pages that may ask (repeatable)"
    )


def _logs_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-n", "--lines", type=count_argument, default=100, metavar="N", help="the last N lines (default: 100)"
    )
    parser.add_argument("--level", choices=LOG_LEVELS, default="debug", help="this level and above (default: debug)")
    parser.add_argument("--follow", "-f", action="store_true", help="go on with the lines to come")


def _clusters_add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", required=True, help="the cluster's name here")
    parser.add_argument("--kubeconfig", required=True, metavar="FILE", help="its kubeconfig")
    parser.add_argument("--context", help="the kubeconfig's context (default: its current one)")
    parser.add_argument(
        "--namespace", action="append", help="a namespace to follow, '*' for all (default: fabrik-runs)"
    )
    parser.add_argument("--label-selector", metavar="SELECTOR", help="only objects with these labels")
    parser.add_argument(
        "--priority", type=int, default=100, metavar="N", help="place in lists, lower first (default: 100)"
    )


def _clusters_test_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="*", metavar="NAME", help="the clusters to test (default: all)")
    output_argument(parser)


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rbac", action="store_true", help="ask each cluster for every right, by SelfSubjectAccessReviews"
    )
    output_argument(parser)


def _clusters_remove_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the cluster's name")


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--speed", type=_factor, metavar="X", help="X times as fast (default: 1 on a terminal, else 7.5)"
    )


def _manifests_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=tuple(MANIFESTS), metavar="KIND", help=", ".join(MANIFESTS))
    names = "; ".join(f"{kind}: {', '.join(manifest.defaults)}" for kind, manifest in MANIFESTS.items())
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=_assignment,
        metavar="NAME=VALUE",
        help=f"instead of a default; {names}",
    )


def _licenses_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--texts", action="store_true", help="the licences themselves")
    parser.add_argument("--sbom", action="store_true", help="the whole bill of materials, CycloneDX 1.6 in JSON")
    output_argument(parser)


def _service_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", action="store_true", help="the host's, with a user of its own, instead of yours")
    parser.add_argument("--manager", choices=MANAGERS, help="instead of the one that runs this host")
    parser.add_argument("--root", metavar="DIR", help="with --system: below this folder, for an image")
    parser.add_argument("--dry-run", action="store_true", help="tell every step, and do none")


def _install_arguments(parser: argparse.ArgumentParser) -> None:
    _service_arguments(parser)
    parser.add_argument("--now", action="store_true", help="start it too, or restart it where something has changed")
    parser.add_argument("--on-demand", action="store_true", help="systemd: start it for the first who asks its socket")
    parser.add_argument("--print", action="store_true", help="print the unit, and do nothing")
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        type=_assignment,
        metavar="NAME=VALUE",
        help="in the service's environment",
    )


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _dashboard_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--theme", choices=("auto", *PALETTES), default="auto", help="colours (default: what suits the terminal)"
    )
    parser.add_argument("--bell", action="store_true", help="ring when a run comes to a human gate")
    parser.add_argument("--no-start", action="store_true", help="show the cache where no daemon runs; start none")


def _factor(text: str) -> float:
    factor = float(text)
    if not 0.1 <= factor <= 100:
        raise ValueError(text)
    return factor


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


_ADD: Final = (
    "clusters add --name prod --kubeconfig ~/.kube/prod",
    "clusters add --name dev --kubeconfig ~/.kube/config --context k3d-dev --namespace fabrik-runs --priority 1",
)
COMMANDS: Final = (
    Command("start", "start the daemon", ("start", "start --foreground"), _start_arguments, start),
    Command("stop", "end the daemon", ("stop",), _no_arguments, stop),
    Command("restart", "end the daemon and start it again", ("restart",), _start_arguments, restart),
    Command("reload", "have the daemon read clusters.yaml and kubeconfigs again", ("reload",), _no_arguments, reload),
    Command("status", "say how the daemon and its clusters are", ("status", "status -o json"), output_argument, status),
    Command(
        "logs",
        "show the daemon's log",
        ("logs -n 20 --level warning", "logs --follow"),
        _logs_arguments,
        logs,
    ),
    Command(
        "dashboard",
        "show all runs of all clusters live, in the terminal",
        ("dashboard", "dashboard --theme light --bell"),
        _dashboard_arguments,
        dashboard,
    ),
    Command(
        "demo",
        "show a minute of scripted clusters; needs none, leaves nothing behind",
        ("demo", "demo --speed 3", "demo | cat"),
        _demo_arguments,
        demo,
    ),
    Command("sync", "list every cluster once and end (for cron)", ("sync",), _no_arguments, sync),
    *READING,
    Command("clusters add", "add a cluster to clusters.yaml", _ADD, _clusters_add_arguments, clusters_add),
    Command(
        "add-cluster",
        "the same as 'clusters add'",
        ("add-cluster --name staging --kubeconfig ~/.kube/staging",),
        _clusters_add_arguments,
        clusters_add,
    ),
    Command(
        "clusters discover",
        "show which contexts of kubeconfigs are fabrik's",
        ("clusters discover",),
        output_argument,
        clusters_discover,
    ),
    Command(
        "clusters test",
        "connect to clusters and say what is missing",
        ("clusters test", "clusters test prod -o json"),
        _clusters_test_arguments,
        clusters_test,
    ),
    Command(
        "doctor",
        "find what is wrong, and say how to end it",
        ("doctor", "doctor --rbac", "doctor -o json"),
        _doctor_arguments,
        doctor,
    ),
    Command(
        "clusters remove",
        "take a cluster out of clusters.yaml",
        ("clusters remove prod",),
        _clusters_remove_arguments,
        clusters_remove,
    ),
    Command(
        "install-service",
        "have the host start the daemon: systemd, launchd, OpenRC",
        (
            "install-service --now",
            "install-service --print",
            "install-service --system --dry-run",
            "install-service --env AWS_PROFILE=prod",
        ),
        _install_arguments,
        install_service,
    ),
    Command(
        "uninstall-service",
        "take that away; settings and cache stay",
        ("uninstall-service", "uninstall-service --system"),
        _service_arguments,
        uninstall_service,
    ),
    Command(
        "licenses",
        "show the libraries in the executable and their licences",
        ("licenses", "licenses --texts", "licenses --sbom"),
        _licenses_arguments,
        licenses,
    ),
    Command(
        "manifests",
        "print Kubernetes manifests",
        ("manifests deployment | kubectl apply -f -", "manifests deployment --set namespace=fabrik-system"),
        _manifests_arguments,
        manifests,
    ),
)

# ----------------------------------------------------------------------------------------------------------------------
# Command line: parser
# ----------------------------------------------------------------------------------------------------------------------

GLOBAL_FLAGS: Final = {
    "--config": ("PATH", "where config.yaml is"),
    "--cache": ("PATH", "where cache.db is"),
    "--socket": ("PATH", "where the daemon's socket is"),
    "--remote": ("URL", "ask the daemon there: wss://host/daemon"),
    "--token-file": ("PATH", "where the token of a remote daemon is (default: $FABRIK_TOKEN)"),
    "--ca-file": ("PATH", "the authorities for its certificate (default: this host's)"),
}


def find_command(words: Sequence[str]) -> tuple[Command, list[str]]:
    """Return the command that the words begin with, and the words after it. Raises UsageError."""
    for command in COMMANDS:
        parts = command.words.split()
        if list(words[: len(parts)]) == parts:
            return command, list(words[len(parts) :])
    groups = {command.words.split()[0] for command in COMMANDS if " " in command.words}
    if words[0] in groups:
        known = [command.words.split()[1] for command in COMMANDS if command.words.startswith(words[0] + " ")]
        if len(words) == 1:
            raise UsageError(f"'{words[0]}' needs another word", f"choose from {', '.join(known)}")
        raise UsageError(f"no command '{words[0]} {words[1]}'", nearest(words[1], known))
    raise UsageError(f"no command {words[0]!r}", nearest(words[0], {command.words.split()[0] for command in COMMANDS}))


def make_parser(command: Command) -> argparse.ArgumentParser:
    """Return the parser of one command, which raises UsageError instead of ending the process."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            flag = re.fullmatch(r"unrecognized arguments: (--[a-z-]+).*", message, re.DOTALL)
            hint = f"see 'fabrik-daemon {command.words} --help'"
            if flag:
                elsewhere = _commands_with(flag[1])
                message = f"'{command.words}' has no {flag[1]}"
                hint = nearest(flag[1], re.findall(r"--[a-z-]+", self.format_usage()))
                hint = f"it is for {', '.join(elsewhere)}" if elsewhere else hint
            choice = re.fullmatch(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message, re.DOTALL)
            if choice:
                message, hint = f"{choice[1]}: no {choice[2]!r}", nearest(choice[2], re.findall(r"[\w-]+", choice[3]))
            raise UsageError(message, hint)

    examples = "".join(f"  fabrik-daemon {example}\n" for example in command.examples)
    parser = Parser(
        prog=f"fabrik-daemon {command.words}",
        description=command.summary[0].upper() + command.summary[1:] + ".",
        epilog=f"examples:\n{examples}" if examples else None,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, width=HELP_COLUMNS
        ),  # else it loads shutil
        allow_abbrev=False,
        add_help=False,  # argparse would write it past `out` and end the process
    )
    _add_arguments(parser, command)
    return parser


def _add_arguments(parser: argparse.ArgumentParser, command: Command) -> None:
    parser.add_argument("-h", "--help", action="store_true", help="show this")
    command.arguments(parser)
    parser.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="colours (default: on a terminal)"
    )
    for flag, (metavar, what) in GLOBAL_FLAGS.items():
        parser.add_argument(flag, metavar=metavar, help=what)


class PlainArguments:
    """What plain words say: whole flags, each value a word or behind `=`, at most one word without a flag.

    It learns a command's arguments as an ArgumentParser does, and says what that would say, 5 ms sooner.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._flags: dict[str, tuple[str, Mapping[str, Any]]] = {}
        self._place: tuple[str, Mapping[str, Any]] | None = None  # where a word without a flag goes
        self._missing: set[str] = set()

    def add_argument(self, *names: str, **options: Any) -> None:
        """Learn an argument from what ArgumentParser.add_argument takes."""
        long = next((name for name in names if name.startswith("--")), names[0])
        dest = options.get("dest", long.lstrip("-").replace("-", "_"))
        sole = long[:1] != "-"
        self.values[dest] = options.get("default", [] if options.get("nargs") == "*" else None)
        if options.get("action") == "store_true":
            self.values[dest], options["type"] = False, bool
        if options.get("required", sole and "nargs" not in options):
            self._missing.add(dest)
        if sole:
            self._place = dest, options
        else:
            self._flags.update((name, (dest, options)) for name in names)

    def add_argument_group(self, _title: str) -> PlainArguments:
        """Return what learns the arguments that stand together in the help."""
        return self

    def set_defaults(self, **values: Any) -> None:
        """Set what no argument sets."""
        self.values.update(values)

    def take(self, words: Sequence[str]) -> bool:
        """Set `values` to what the words say; return whether they are plain, right and complete."""
        left = iter(words)
        for word in left:
            name, equals, text = word.partition("=") if word.startswith("--") else (word, "", "")
            argument = self._flags.get(name)
            if argument is None:
                argument, self._place, text = self._place, None, word
            elif argument[1].get("action") == "store_true":
                text = "" if equals else "set"
            elif not equals:
                text = next(left, "")
            if argument is None or not self._set(*argument, text):
                return False
        return not self._missing

    def _set(self, dest: str, options: Mapping[str, Any], text: str) -> bool:
        try:
            value = options.get("type", str)(text)
        except (ValueError, argparse.ArgumentTypeError):
            return False
        many = options.get("action") == "append" or options.get("nargs") == "*"
        self._missing.discard(dest)
        self.values[dest] = [*(self.values[dest] or ()), value] if many else value
        return text[:1] not in ("", "-") and value in options.get("choices", (value,))


def parse_arguments(command: Command, words: Sequence[str]) -> argparse.Namespace:
    """Return what the words behind a command say, as an object with an attribute each. Raises UsageError."""
    plain: Any = PlainArguments()
    _add_arguments(plain, command)
    said: Any = types.SimpleNamespace(**plain.values) if plain.take(words) else make_parser(command).parse_args(words)
    return said  # type: ignore[no-any-return]


def _commands_with(flag: str) -> list[str]:
    """Return the commands that take a flag."""
    return [
        command.words
        for command in COMMANDS
        if re.search(rf"{re.escape(flag)}(?![\w-])", make_parser(command).format_usage())
    ]


def help_of(words: Sequence[str]) -> str:
    """Return what `--help` prints behind some words: of a command, of a group of commands, of all."""
    group = [command for command in COMMANDS if command.words.split()[0] == (words[0] if words else None)]
    if words and (len(words) > 1 or [command.words for command in group] == [words[0]] or not group):
        return make_parser(find_command(words)[0]).format_help()
    return f"commands:\n{_command_lines(group)}" if words else format_help()


def _command_lines(commands: Sequence[Command]) -> str:
    width = max(len(command.words) for command in COMMANDS)
    return "".join(f"  {command.words:<{width}}   {command.summary}\n" for command in commands)


def format_help() -> str:
    """Return what `--help` prints: every command in a line."""
    return (
        "usage: fabrik-daemon COMMAND [ARGUMENT...]\n\n"
        "Follows Kubernetes clusters, keeps their fabrik runs in a local cache, and answers from it.\n"
        "'fabrik daemon COMMAND' and 'fabrik COMMAND' mean the same.\n\n"
        f"commands:\n{_command_lines(COMMANDS)}\n"
        "'fabrik-daemon COMMAND --help' shows a command's arguments and examples.\n"
        "exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 no such run or cluster,\n"
        "            4 the daemon is not running, 5 a cluster did not answer, 6 older than --max-age,\n"
        "            7 timed out, 8 query --fail-if matched, 9 refused, 130 interrupted\n"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Command line: completion
# ----------------------------------------------------------------------------------------------------------------------


class _Word(NamedTuple):
    """What a word on the command line may be, and what that is."""

    text: str
    meaning: str = ""


def complete_words(shell: str, current: str, line: str, environment: Mapping[str, str]) -> str:
    """Return what may stand at the end of a command line, a line each, as the shell wants it.

    `current` is the part of the last word that bash would replace. Only the cache is asked; what goes wrong is nothing.
    """
    words = line.split()[1:] + ([""] if line[-1:].isspace() else [])
    while len(words) > 1 and words[0].startswith("--"):
        words = words[1 if "=" in words[0] else 2 :]
    words = words[1:] if words[:1] == ["daemon"] and len(words) > 1 else words
    if not words:
        return ""
    try:
        settings = settings_from(Flags(), environment, read_text)
        found = _words_after(words[:-1], words[-1], settings.cache)
    except FabrikError:
        found = []
    last, told = words[-1], []
    cut = len(last) - len(current) if shell == "bash" and last.endswith(current) else 0
    for word in found:
        if word.text.startswith(last) and re.fullmatch(
            r"[\w@%+=:,./-]+", word.text, re.ASCII
        ):  # a shell takes it as it is
            told.append(_format_word(shell, word.text[cut:], safe_text(word.meaning)))
    return "".join(dict.fromkeys(told))


def _format_word(shell: str, text: str, meaning: str) -> str:
    if shell == "zsh":
        return text.replace(":", "\\:") + (f":{meaning}" if meaning else "") + "\n"
    return f"{text}\t{meaning}\n" if shell == "fish" and meaning else f"{text}\n"


def _words_after(before: Sequence[str], last: str, cache: str) -> list[_Word]:
    """Return what may follow some words: the next word of a command, a flag, or the value of one."""
    begun = [command for command in COMMANDS if command.words.split()[: len(before)] == list(before)]
    following = [
        _Word(command.words.split()[len(before)], command.summary)
        for command in begun
        if command.words.split()[len(before) :]
    ]
    if following:
        groups = {word.text for word in following if sum(other.text == word.text for other in following) > 1}
        return [_Word(word.text) if word.text in groups else word for word in following]
    command, rest = find_command(before)
    actions: list[argparse.Action] = vars(make_parser(command))["_actions"]  # argparse tells of them nowhere else
    flags = {flag: action for action in actions for flag in action.option_strings if action.help != argparse.SUPPRESS}
    name, equals, _ = last.partition("=")
    if equals and name in flags:
        return [_Word(f"{name}={word.text}", word.meaning) for word in _values_of(flags[name], command, cache)]
    if rest and rest[-1] in flags and flags[rest[-1]].nargs != 0:
        return _values_of(flags[rest[-1]], command, cache)
    if last.startswith("-"):
        return [
            _Word(flag, action.help or "") for flag, action in flags.items() if flag.startswith("--") or last == flag
        ]
    places = [action for action in actions if not action.option_strings]
    return [word for action in places for word in _values_of(action, command, cache)]


def _values_of(action: argparse.Action, command: Command, cache: str) -> list[_Word]:
    """Return what an argument's value may be, as far as this program or the cache knows it."""
    if action.choices is not None:
        return [_Word(str(choice)) for choice in action.choices]
    if action.dest == "sort_by":
        kind = next((kind for table, kind in _COMPLETED_LISTS.items() if command.words.startswith(table)), Run)
        return [_Word(name) for name in kind._fields]
    if action.metavar == "RUN":
        named = [_Word(f"@{word}", f"the newest {word} run") for word in ("latest", BLOCKED, FAILED, RUNNING)]
        found = _column_in_cache(cache, "SELECT run_id, coalesce(status, 'unknown') || ' ' || coalesce(spec_id, '')")
        return [*named, *found] if found else []
    if action.dest == "cluster" or (action.metavar == "NAME" and command.words.startswith("clusters ")):
        return _column_in_cache(cache, "SELECT name, server", "FROM clusters ORDER BY priority, name")
    if action.dest in ("spec_id", "project", "template", "phase", "namespace"):
        table = next((table for table in ("volumes", "schedules") if command.words.startswith(table)), "runs")
        return _column_in_cache(cache, f"SELECT DISTINCT {action.dest}, ''", f"FROM {table} ORDER BY 1")
    return []


_COMPLETED_LISTS: Final[dict[str, type[Row]]] = {
    "schedules": Schedule,
    "volumes": Volume,
    "warnings": ClusterEvent,
    "clusters": ClusterRow,
}
_NEWEST_RUNS: Final = "FROM runs ORDER BY created_at DESC, run_id DESC"


def _column_in_cache(cache: str, columns: str, rest: str = _NEWEST_RUNS) -> list[_Word]:
    with contextlib.closing(CacheReader(cache)) as reader:
        rows = reader.rows(f"{columns} {rest} LIMIT {COMPLETED_WORDS}")
    values = (tuple(row.values()) for row in rows)
    return [_Word(str(text), str(meaning or "")) for text, meaning in values if text]


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------

_HELP_FLAGS: Final = frozenset(("-h", "--help"))
_REMOTE_COMMANDS: Final = frozenset(
    (
        *("status", "runs list", "runs show", "runs watch", "runs wait", "clusters list", "dashboard"),
        *("schedules list", "volumes list", "warnings list"),
    )
)
_HELPERS: Final = {"_credentials": credentials_helper, "_query": query_helper}
_LONG_COMMANDS: Final = frozenset(
    ("start", "demo", "sync", "logs", "runs watch", "runs logs", "dashboard", "runs wait")
)


def style_from(arguments: argparse.Namespace, environment: Mapping[str, str], *, is_terminal: bool) -> Style:
    """Return how tables are drawn; `--color` leads, then NO_COLOR (no-color.org), then whether it is a terminal."""
    plain = bool(environment.get("NO_COLOR")) or environment.get("TERM", "dumb") == "dumb"
    colour = arguments.color == "always" or (arguments.color == "auto" and is_terminal and not plain)
    titles = not getattr(arguments, "no_headers", False)
    return Style(colour, titles, getattr(arguments, "output", None) == "wide")


def _split_global_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the global flags that stand before the command, and the rest."""
    flags: list[str] = []
    rest = list(words)
    while rest and rest[0].startswith("--") and rest[0] not in ("--help", "--version"):
        flag, equals, _ = rest[0].partition("=")
        if flag not in GLOBAL_FLAGS:
            raise UsageError(
                f"no flag {flag!r} before a command", nearest(flag, (*GLOBAL_FLAGS, "--help", "--version"))
            )
        size = 1 if equals else 2
        if len(rest) < size:
            raise UsageError(f"{flag} needs a value")
        flags += rest[:size]
        rest = rest[size:]
    return flags, rest


def _dispatch(argv: Sequence[str], out: TextIO, errors: TextIO) -> int:
    flags, words = _split_global_flags(argv)
    if words[:1] == ["daemon"]:  # the spec's spelling: fabrik daemon start
        words = words[1:]
    if words[:1] and words[0] in _HELPERS:
        return _HELPERS[words[0]](words[1], words[2], out)
    if words[:1] == ["_complete"]:
        out.write(complete_words(words[1], words[2], words[3], os.environ))
        return 0
    if not words:
        raise UsageError("a command is missing", "see 'fabrik-daemon --help'")
    if words[0] in ("--version", "help") or set(words) & _HELP_FLAGS:
        wanted = [word for word in words if word not in (*_HELP_FLAGS, "help")]
        out.write(f"fabrik-daemon {__version__}\n" if words[0] == "--version" else help_of(wanted))
        return 0
    command, rest = find_command(words)
    if command.words in _LONG_COMMANDS:
        hold_unpacked()
    arguments = parse_arguments(command, [*rest, *flags])
    places = Flags(arguments.config, arguments.cache, arguments.socket)
    try:
        settings = settings_from(places, os.environ, read_text)
    except ConfigError:
        if command.words not in ("doctor", "config init"):
            raise
        settings = settings_from(places, os.environ, lambda _: "")  # it tells of the error itself, or ends it
    settings = settings._replace(cache=os.path.abspath(settings.cache))  # the daemon's own folder is another
    if settings.socket is not None:
        settings = settings._replace(socket=os.path.abspath(settings.socket))
    settings = settings._replace(remote=_remote_of(command, arguments, os.environ))
    style = style_from(arguments, os.environ, is_terminal=out.isatty())
    return command.run(Context(settings, os.environ, out, errors, style), arguments)


def _remote_of(command: Command, arguments: argparse.Namespace, environment: Mapping[str, str]) -> RemoteDaemon | None:
    """Return the remote daemon that a command is to ask. A place on this host leads over FABRIK_REMOTE."""
    here = arguments.cache or arguments.socket
    if command.words not in _REMOTE_COMMANDS:
        if arguments.remote:
            raise RefusedError(f"'{command.words}' is for the daemon on its own host", "leave out --remote")
        if command.words in ("query", "runs stats") and environment.get("FABRIK_REMOTE") and not here:
            told = f"'{command.words}' reads the cache of this host, and FABRIK_REMOTE is set"
            raise RefusedError(told, "name the cache with --cache, or unset FABRIK_REMOTE")
        return None
    url = arguments.remote or (None if here else environment.get("FABRIK_REMOTE"))
    if not url:
        return None
    return remote_from(url, arguments.token_file, arguments.ca_file, environment, read_text)


def main(argv: Sequence[str], out: TextIO, errors: TextIO) -> int:
    """Run a command and return its exit code; what is wrong goes to `errors` in one line."""
    try:
        code = _dispatch(argv, out, errors)
        out.flush()
    except FabrikError as error:
        errors.write(f"fabrik-daemon: {safe_text(error)}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has what it wanted
        return 0
    except OSError as error:
        errors.write(f"fabrik-daemon: {safe_text(error)}\n")
        return FabrikError.exit_code
    except Exception as error:  # noqa: BLE001 - the last resort: a defect, told as one
        traceback.print_exc(file=errors)
        errors.write(f"fabrik-daemon: a defect: {type(error).__name__}; please report the lines above\n")
        return 1
    return code


def run() -> NoReturn:
    """Be the program. The process ends at once: taking the interpreter down in order costs 5 ms and does nothing."""
    gc.freeze()  # what was imported stays; looking through it takes 1 ms
    gc.enable()  # the executable's entry switches it off
    if "_bootstrap" in sys.modules:  # the slow way in: this start has unpacked the executable
        note_unpacked(os.path.realpath(sys.argv[0]))
        clean_unpacked()
    out, errors = (stream or open(os.devnull, "w", encoding="utf-8") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (out, errors):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character is no failure
    code = main(sys.argv[1:], out, errors)
    with contextlib.suppress(OSError, ValueError):
        errors.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
