"""A real browser as a client: Chromium, from a page of another origin, over the daemon's WebSocket."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import queue
import shutil
import subprocess
import threading
from typing import TYPE_CHECKING, Any, Final

import pytest
from clients import LinesClient
from fabrik_objects import Report, job, pod, run_id
from fakes import ModelServer
from harness import Cluster
from remotes import TOKEN, RemoteHost

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fakes import Authority

CHROMIUM: Final = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BROWSER_S: Final = 90.0  # its first start takes some seconds, on a busy machine many

PAGE: Final = """<!doctype html><title>fabrik</title><script>
const tell = (what) => fetch("/told", {method: "POST", body: JSON.stringify(what)});
const socket = new WebSocket("ws://127.0.0.1:PORT/daemon/v1/stream", ["fabrik.v1", "fabrik.bearer.TOKEN"]);
socket.onopen = () => {
  tell({protocol: socket.protocol, extensions: socket.extensions});
  socket.send(JSON.stringify({action: "subscribe", id: 1, snapshot: true}));
};
socket.onmessage = (event) => {
  const message = JSON.parse(event.data);
  tell(message);
  if (message.type === "run:updated") socket.send("x".repeat(70000) + "\\u2603");
  if (message.type === "error") socket.close(4000, "enough");
};
socket.onclose = (event) => tell({closed: event.code, clean: event.wasClean});
</script>"""


class PageServer(http.server.ThreadingHTTPServer):
    """Serves the page, and takes what it tells."""

    def __init__(self, page: str) -> None:
        super().__init__(("127.0.0.1", 0), PageHandler)
        self.page = page
        self.told: queue.SimpleQueue[Any] = queue.SimpleQueue()

    @property
    def origin(self) -> str:
        """Where the page is from."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class PageHandler(http.server.BaseHTTPRequestHandler):
    """One request of the browser."""

    server: PageServer

    def do_GET(self) -> None:
        """Send the page."""
        self._answer(self.server.page.encode(), "text/html")

    def do_POST(self) -> None:
        """Take what the page tells."""
        self.server.told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._answer(b"", "text/plain")

    def _answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_words: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def browsing(url: str, folder: Path) -> Iterator[None]:
    """Have Chromium show a page."""
    assert CHROMIUM
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-sync", f"--user-data-dir={folder}"]
    with (folder.parent / "chromium.log").open("wb") as log:
        browser = subprocess.Popen([CHROMIUM, *flags, url], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield
    finally:
        browser.terminate()
        try:
            browser.wait(20)
        except subprocess.TimeoutExpired:
            browser.kill()
            browser.wait()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")
def test_a_page_subscribes_and_is_told(authority: Authority, executable: Path, unpacked: Path, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(ModelServer(authority))
        model.put("jobs", job(1))
        host = stack.enter_context(RemoteHost(executable, unpacked, tmp_path / "host", [Cluster(model)]))
        token = base64.urlsafe_b64encode(TOKEN.encode()).decode().rstrip("=")
        server = stack.enter_context(PageServer(PAGE.replace("PORT", str(host.port)).replace("TOKEN", token)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        host.environment["FABRIK_ALLOWED_ORIGINS"] = server.origin
        host.start()

        def told(count: int) -> dict[str, Any]:
            """Return what the page tells next, by type; each comes by a request of its own, in any order."""
            found = [server.told.get(timeout=BROWSER_S) for _ in range(count)]
            return {one.get("type", "page"): one for one in found}

        with browsing(server.origin, tmp_path / "profile"):
            first = told(3)
            assert first["page"] == {"protocol": "fabrik.v1", "extensions": ""}
            assert first["subscribed"]["id"] == 1
            assert [row["run_id"] for row in first["snapshot"]["runs"]] == [run_id(1)]
            model.put("pods", pod(1, report=Report(finished=7, total=9)))
            last = told(3)  # then it sends what is no JSON, and longer than one short frame
            event = last["run:updated"]
            assert (event["runId"], event["id"], event["progress"]) == (run_id(1), 1, {"finished": 7, "total": 9})
            assert last["error"]["code"] == "bad_request"
            assert last["page"] == {"closed": 4000, "clean": True}
            with LinesClient(host.socket) as client:
                assert client.ask("status")["subscribers"] == 0
