"""A program on a pseudo-terminal, and what stands on its screen: pyte plays the terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import termios
import time
from typing import TYPE_CHECKING, Final

import pyte

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LOOK_S: Final = 0.5
SHOWN_S: Final = 60.0  # others may keep this machine busy
ENTER: Final = b"\r"
ESCAPE: Final = b"\x1b"
LEAVE: Final = "\x1b[?1049l"  # back to the normal screen


class Terminal:
    """A program on a terminal of this size; reading fails past a deadline."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        lines: int = 24,
        columns: int = 80,
        environment: Mapping[str, str],
        deadline_s: float = SHOWN_S,
    ) -> None:
        self.raw = ""
        self.is_drawn = True  # else only what was written is kept
        self._deadline_s = deadline_s
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self.pid, self._end = pty.fork()
        if self.pid == 0:
            os.execve(command[0], list(command), dict(environment))  # noqa: S606
        self.resize(lines, columns)
        self.modes = termios.tcgetattr(self._end)

    def resize(self, lines: int, columns: int) -> None:
        """Give the terminal another size."""
        self._screen.resize(lines, columns)
        fcntl.ioctl(self._end, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    @property
    def lines(self) -> list[str]:
        """What stands on the screen."""
        return [line.rstrip() for line in self._screen.display]

    @property
    def text(self) -> str:
        """The same, as one text."""
        return "\n".join(self.lines)

    def read(self, wait_s: float) -> bool:
        """Take in what was written; say whether there was anything within that time."""
        if not select.select([self._end], [], [], wait_s)[0]:
            return False
        try:
            data = os.read(self._end, 65536)
        except OSError:  # EIO, once the other end is closed
            return False
        self.raw += data.decode("utf-8", "replace")
        if self.is_drawn:
            self._stream.feed(data)
        return bool(data)

    def wait_for(self, *patterns: str, within_s: float | None = None) -> float:
        """Read on until all patterns stand on the screen; return how long that took."""
        began = time.monotonic()
        deadline = began + (within_s or self._deadline_s)
        while not all(re.search(pattern, self.text, re.MULTILINE) for pattern in patterns):
            assert time.monotonic() < deadline, (
                f"not within {deadline - began:g} s: {patterns}\n{self.text}\n{self.raw[-400:]!r}"
            )
            self.read(LOOK_S)
        return time.monotonic() - began

    def wait_for_raw(self, text: str) -> None:
        """Read on until a text was written, escape sequences included."""
        deadline = time.monotonic() + self._deadline_s
        while text not in self.raw:  # what was read already counts
            assert time.monotonic() < deadline, f"not within {self._deadline_s:g} s: {text!r}\n{self.raw[-2000:]!r}"
            self.read(LOOK_S)

    def press(self, *keys: bytes) -> None:
        """Press keys, one after the other."""
        for key in keys:
            os.write(self._end, key)

    def close(self) -> int:
        """Read to the end; return the exit code."""
        deadline = time.monotonic() + self._deadline_s
        code = None
        while code is None:
            assert time.monotonic() < deadline, f"it goes on\n{self.text}"
            while self.read(0.05):
                pass
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if pid else None
        while self.read(0):
            pass
        self.modes_after = termios.tcgetattr(self._end)
        os.close(self._end)
        return code

    def kill(self) -> None:
        """End it at once, if it is still there."""
        with contextlib.suppress(OSError):
            os.kill(self.pid, 9)
            os.waitpid(self.pid, 0)
        with contextlib.suppress(OSError):
            os.close(self._end)

    @property
    def left(self) -> str:
        """What was written to the normal screen after the program left its own."""
        return self.raw.rpartition(LEAVE)[2]
