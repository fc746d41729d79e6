"""README's protocol page says what the daemon says: each message, and every type that there is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from protocol import BLOCK, README, made

import fabrik_daemon

if TYPE_CHECKING:
    from pathlib import Path

    from fakes import Authority


@pytest.fixture(scope="module")
def said(
    authority: Authority, executable: Path, unpacked: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    return made(executable, unpacked, authority, tmp_path_factory.mktemp("protocol") / "host")


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    blocks = BLOCK.findall(README.read_text())
    assert len(dict(blocks)) == len(blocks), "a name stands twice"
    return dict(blocks)


def test_readme_has_what_the_daemon_says(said: dict[str, str], written: dict[str, str]) -> None:
    assert written == said, "run .venv/bin/python tests/protocol.py"


def test_every_action_and_every_event_is_there(written: dict[str, str]) -> None:
    actions = set(fabrik_daemon.Requests(None)._actions)  # type: ignore[arg-type]
    answered = {name for name in actions if f'> {{"action": "{name}"' in "".join(written.values())}
    assert actions - answered == {"healthz", "readyz", "metrics"} & actions, "those are asked over HTTP"
    events = {name for names in fabrik_daemon.EVENT_TYPES.values() for name in names}
    told = {name for name in events if f'< {{"type": "{name}"' in written.get(name, "")}
    assert told == events
