"""The dashboard on the demo's clusters, followed by a real daemon: what README shows of it.

`FABRIK_SCREENSHOTS=1 .venv/bin/python -m pytest tests/test_screenshots.py` writes the pictures in screenshots/ anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from harness import wait_until

import fabrik_daemon

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).resolve().parent.parent
PICTURES: Final = ROOT / "screenshots"
PLAYED_S: Final = 50.0  # how far the script is then: everything that can happen is on the screen
STEP_S: Final = 0.012  # between two steps, for the daemon to see each and keep the history
READY_S: Final = 60.0
TITLE: Final = "fabrik-daemon dashboard"
PLAYS: Final = {  # picture -> palette, size, keys, what must be on it
    "runs": ("dark", (112, 26), "a j", ("attention", "◆ blocked", "✗ failed", "● running", "OOMKilled")),
    "run": ("dark", (112, 36), "a enter", ("run ", "TIMELINE", "◆ blocked", "human-gate", "VOLUMES")),
    "log": ("dark", (112, 20), "slash s t a t u s colon r u n enter l t", ("logs of ", "followed", "of 48 done")),
    "light": ("light", (80, 24), "j j", ("dev", "prod", "● running", "○ pending")),
}


@pytest.fixture(scope="module")
def settings(executable: Path, unpacked: Path) -> Iterator[fabrik_daemon.Settings]:
    """Play the demo's script to a daemon; yield where it answers."""
    with tempfile.TemporaryDirectory(prefix="fabrik-", dir="/tmp") as folder, contextlib.ExitStack() as undo:
        servers = {name: fabrik_daemon.DemoServer() for name in fabrik_daemon.DEMO_CLUSTERS}
        for server in servers.values():
            undo.callback(server.close)
        place = Path(folder)
        kubeconfig = place / "kubeconfig"
        kubeconfig.write_text(fabrik_daemon.kubeconfig_text({name: server.url for name, server in servers.items()}))
        specs = [
            fabrik_daemon.ClusterSpec(name, str(kubeconfig), name, priority=number)
            for number, name in enumerate(servers)
        ]
        (place / "clusters.yaml").write_text(fabrik_daemon.format_clusters(specs))
        steps = [step for step in fabrik_daemon.demo_steps(time.time() - PLAYED_S) if step.at_s <= PLAYED_S]
        for step in steps:
            if step.at_s <= 0:
                servers[step.cluster].apply(step)
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("FABRIK_", "XDG_"))},
            "HOME": folder,
            "SHIV_ROOT": str(unpacked),
            "KUBECONFIG": str(kubeconfig),
            "FABRIK_CONFIG": str(place / "config.yaml"),
            "FABRIK_CACHE": str(place / "cache.db"),
            "FABRIK_SOCKET": str(place / "d.sock"),
        }
        command = [sys.executable, str(executable), "start", "--foreground"]
        daemon = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        undo.callback(daemon.wait)
        undo.callback(daemon.terminate)
        with pytest.MonkeyPatch.context() as patch:
            for name in ("KUBECONFIG", "FABRIK_CONFIG", "FABRIK_CACHE", "FABRIK_SOCKET", "HOME"):
                patch.setenv(name, environment[name])
            found = fabrik_daemon.settings_from(fabrik_daemon.Flags(), environment, fabrik_daemon.read_text)
            wait_until(lambda: is_synced(found), READY_S, "both clusters are followed")
            for step in steps:
                if step.at_s > 0:
                    servers[step.cluster].apply(step)
                    time.sleep(STEP_S)
            yield found


def is_synced(settings: fabrik_daemon.Settings) -> bool:
    """Tell whether the daemon has listed both clusters."""
    client = fabrik_daemon.connect(settings)
    if client is None:
        return False
    with contextlib.closing(client):
        return all(row["synced"] for row in client.ask("status")["clusters"])


def taken(settings: fabrik_daemon.Settings, palette: str, size: tuple[int, int], keys: str, *words: str) -> str:
    """Return a picture of the dashboard after some keys, as soon as these words are on it."""
    places = fabrik_daemon.Places(
        settings.cache,
        lambda tell: fabrik_daemon.connect(settings, tell),
        lambda run_id: fabrik_daemon.open_log(run_id, os.environ),
    )
    desk = fabrik_daemon.Desk()
    options = fabrik_daemon.DashboardOptions(palette)

    async def until(holds: Any) -> None:
        deadline = time.monotonic() + READY_S
        while not holds():
            assert time.monotonic() < deadline, picture_text(app.export_screenshot())
            await asyncio.sleep(0.1)

    async def play() -> str:
        async with app.run_test(size=size) as pilot:
            await until(lambda: desk.source.is_live and desk.board.count(status="blocked"))
            for key in keys.split():
                await pilot.press(key)
            desk.say("")
            app.draw()  # type: ignore[attr-defined]
            await until(lambda: all(word in picture_text(app.export_screenshot()) for word in words))
            return app.export_screenshot(title=TITLE)

    app = fabrik_daemon.make_dashboard(desk, lambda tell: fabrik_daemon.Feed(places, tell), options)
    return asyncio.run(play())


def picture_text(svg: str) -> str:
    """Return the texts of a picture, a line each."""
    return unescape("\n".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg))).replace("\xa0", " ")


@pytest.mark.parametrize("name", PLAYS)
def test_pictures(name: str, settings: fabrik_daemon.Settings) -> None:
    palette, size, keys, words = PLAYS[name]
    svg = taken(settings, palette, size, keys, *words)
    assert "live" in picture_text(svg)
    if os.environ.get("FABRIK_SCREENSHOTS"):
        PICTURES.mkdir(exist_ok=True)
        (PICTURES / f"{name}.svg").write_text(svg)


def test_readme_shows_pictures_that_there_are() -> None:
    shown = re.findall(r"!\[[^\]]+\]\((screenshots/[^)]+)\)", (ROOT / "README.md").read_text())
    assert sorted(shown) == sorted(f"screenshots/{name}.svg" for name in PLAYS)
    for name, (_, _, _, words) in PLAYS.items():
        text = picture_text((PICTURES / f"{name}.svg").read_text())
        for word in words:
            assert word in text, f"{name}: {word}; take the pictures anew"
