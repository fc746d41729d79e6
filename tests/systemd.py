"""A stand-in for systemd: starts a service as it does, and reads what it is told (sd_notify, sd_listen_fds)."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

TOLD_S: Final = 30.0  # the executable unpacks itself at its first start
LISTEN_FDS_START: Final = 3
# The variables name the process that the service will be, which only that process knows.
AS_SERVICE: Final = f"""
import os, sys
given = [int(word) for word in sys.argv[1].split(",") if word]
for place, descriptor in enumerate(given, {LISTEN_FDS_START}):
    os.dup2(descriptor, place)
os.environ.update(LISTEN_PID=str(os.getpid()), WATCHDOG_PID=str(os.getpid()))
os.execvp(sys.argv[2], sys.argv[2:])
"""


class Told(NamedTuple):
    """One message of a service: its assignments, and who sent it when."""

    values: dict[str, str]
    pid: int
    at: float  # on the monotonic clock


class Systemd:
    """The manager of one service; it knows, as systemd does, which process a message came from."""

    def __init__(self, folder: Path, *, abstract: bool = False) -> None:
        self.address = f"@{folder}/notify" if abstract else f"{folder}/notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind("\0" + self.address[1:] if abstract else self.address)
        self._service: subprocess.Popen[bytes] | None = None
        self.told: list[Told] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._service:
            self._service.kill()
            self._service.wait()
        self._socket.close()

    @property
    def pid(self) -> int:
        """The service's main process."""
        assert self._service
        return self._service.pid

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        sockets: Sequence[socket.socket] = (),
        watchdog_s: float = 0,
    ) -> None:
        """Start the service; the sockets stand at descriptor 3 and behind, its output in a file."""
        env = {**environment, "NOTIFY_SOCKET": self.address}
        if watchdog_s:
            env["WATCHDOG_USEC"] = str(int(watchdog_s * 1e6))
        if sockets:
            env["LISTEN_FDS"] = str(len(sockets))
            env["LISTEN_FDNAMES"] = ":".join(["daemon"] * len(sockets))
        given = ",".join(str(sock.fileno()) for sock in sockets)
        with log.open("ab") as output:
            self._service = subprocess.Popen(
                [sys.executable, "-c", AS_SERVICE, given, *command],
                env=env,
                cwd="/",
                pass_fds=[sock.fileno() for sock in sockets],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def next(self, timeout_s: float = TOLD_S) -> Told:
        """Return the service's next message."""
        self._socket.settimeout(timeout_s)
        data, ancillary, _, _ = self._socket.recvmsg(65536, socket.CMSG_SPACE(12))
        ((_, _, credentials),) = ancillary
        pid = struct.unpack("3i", credentials)[0]
        values = dict(line.split("=", 1) for line in data.decode().split("\n"))
        self.told.append(Told(values, pid, time.monotonic()))
        return self.told[-1]

    def until(self, name: str, value: str = "") -> Told:
        """Return the next message that tells this, of this value where one is given."""
        deadline = time.monotonic() + TOLD_S
        while True:
            assert time.monotonic() < deadline, f"{name} was not told, but {self.told}"
            told = self.next(max(0.01, deadline - time.monotonic()))
            if name in told.values and value in ("", told.values[name]):
                return told

    def is_silent(self, seconds: float) -> bool:
        """Tell whether, after what was said already, nothing more is said for so long."""
        for _ in range(10):
            try:
                self.next(seconds)
            except socket.timeout:
                return True
        return False

    def signal(self, number: int) -> None:
        """Send the service a signal."""
        os.kill(self.pid, number)

    def stop(self) -> int:
        """End the service as systemd does; return its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Wait for the service's end; return its exit code, that of a signal below 0."""
        assert self._service
        code = self._service.wait(TOLD_S)
        self._service = None
        return code


def listener(path: Path, mode: int = 0o600) -> socket.socket:
    """Return a listening socket as a .socket unit opens it."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    path.chmod(mode)
    sock.listen(16)
    return above(sock)


def above(sock: socket.socket) -> socket.socket:
    """Return the same socket under a descriptor that a service will not find taken: those from 3 on are moved to."""
    duplicate = socket.socket(fileno=fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, 16))
    sock.close()
    return duplicate
