#!/usr/bin/env python3
"""Run the Autobahn test suite's server cases against the WebSocket codec, behind an echo server of this process.

The suite (PyPI autobahntestsuite) needs Python 2.7: make a virtual environment of that, `pip install
autobahntestsuite` there, and name its `wstest`. The daemon takes text messages of up to 1 MiB and no compression:
cases of binary messages and of longer ones are left out, those of compression count as not implemented.
The same cases, without the suite, are in tests/test_websocket.py.

    .venv/bin/python tests/bench/autobahn.py --wstest /path/to/env27/bin/wstest [--cases '6.*']
"""

from __future__ import annotations

import argparse
import collections
import json
import socketserver
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fabrik_daemon import HttpServerCodec, WebSocketCodec, accept_websocket  # noqa: E402 - found through the path above

BINARY: Final = ("1.2.*", "9.2.*", "9.4.*", "9.6.*", "9.8.*")
LONGER: Final = ("9.1.4", "9.1.5", "9.1.6", "9.3.*")
GOOD: Final = {"OK", "NON-STRICT", "INFORMATIONAL", "UNIMPLEMENTED"}


class Echo(socketserver.BaseRequestHandler):
    """Sends every text message back."""

    def handle(self) -> None:
        """Serve one connection."""
        codec = HttpServerCodec()
        reply, rest = b"", b""
        while not reply:
            for http in codec.receive(self.request.recv(65536)):
                reply, rest = codec.switch(accept_websocket(http))
        self.request.sendall(reply)
        websocket = WebSocketCodec()
        while websocket.is_open:
            data, rest = rest or self.request.recv(65536), b""
            if not data:
                return
            for said in websocket.receive(data):
                self.request.sendall(said if isinstance(said, bytes) else websocket.text(said.encode(), last=True))


def run(wstest: str, cases: list[str]) -> dict[str, dict[str, str]]:
    """Return what the suite says of each case."""
    socketserver.ThreadingTCPServer.allow_reuse_address = True
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server, tempfile.TemporaryDirectory() as folder:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"ws://127.0.0.1:{server.server_address[1]}/v1/stream"
        spec = {
            "outdir": f"{folder}/reports",
            "servers": [{"agent": "fabrik-daemon", "url": url}],
            "cases": cases,
            "exclude-cases": [*BINARY, *LONGER],
            "exclude-agent-cases": {},
        }
        Path(folder, "spec.json").write_text(json.dumps(spec))
        subprocess.run([wstest, "-m", "fuzzingclient", "-s", f"{folder}/spec.json"], check=True, stdout=sys.stderr)
        server.shutdown()
        found = json.loads(Path(folder, "reports", "index.json").read_text())["fabrik-daemon"]
        assert isinstance(found, dict)
        return found


def main() -> int:
    """Run, print, and say with the exit code whether all is well."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wstest", required=True, metavar="PATH", help="the suite's program")
    parser.add_argument("--cases", nargs="+", default=["*"], metavar="CASE", help="which (default: *)")
    arguments = parser.parse_args()
    found = run(arguments.wstest, arguments.cases)
    counted = collections.Counter((case["behavior"], case["behaviorClose"]) for case in found.values())
    bad = {name: case for name, case in found.items() if {case["behavior"], case["behaviorClose"]} - GOOD}
    for (behaviour, close), count in sorted(counted.items()):
        print(f"{count:4} {behaviour}, closed {close}")
    for name in sorted(bad, key=lambda name: [int(part) for part in name.split(".")]):
        print(f"case {name}: {bad[name]['behavior']}, closed {bad[name]['behaviorClose']}")
    return 1 if bad or not found else 0


if __name__ == "__main__":
    sys.exit(main())
