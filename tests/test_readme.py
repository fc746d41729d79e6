"""README's commands, word for word, in a fresh clone with an empty home.

In a block fenced ```console, each line that begins with `$ ` is a command (one that ends in a backslash goes on in the
next); the other lines are what it prints. All of them are run, in order, and must end with 0. A block fenced
```console no-test is for what needs a cluster of the reader's own; it is only read. Those of
```console with-cache are run by test_readme_reading.py, in a home that has a cache.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parent.parent
DEMO: Final = "./build.sh && dist/fabrik-daemon demo"
TEST: Final = "./build.sh test"  # not run here: it would run this file again
COMMAND_S: Final = 600
# Where packages come from is the machine's affair, not the home's.
KEPT: Final = re.compile(r"PATH|LANG|(PIP|UV|SSL)_.*|REQUESTS_CA_BUNDLE|(https?|no|all)_proxy", re.IGNORECASE)


class Block(NamedTuple):
    """A fenced block of console: its commands, and whether they are run."""

    tested: bool
    commands: list[str]


def console_blocks(text: str) -> list[Block]:
    """Return the console blocks of a Markdown text."""
    blocks = []
    for fence, body in re.findall(r"^```(console[^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        assert fence.strip() in {"console", "console no-test", "console with-cache"}, f"unknown fence: ```{fence}"
        joined = re.sub(r"\\\n(?:> )?\s*", "", body)
        commands = [line[2:].strip() for line in joined.splitlines() if line.startswith("$ ")]
        assert commands, f"a block without a command:\n{body}"
        blocks.append(Block(fence.strip() == "console", commands))
    return blocks


def commands_run(text: str) -> list[str]:
    """Return the commands that are run, in order."""
    return [command for block in console_blocks(text) if block.tested for command in block.commands]


class Clone(NamedTuple):
    """A fresh clone, and the environment of a newcomer."""

    folder: Path
    environment: dict[str, str]

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command as README's reader would."""
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )

    def left_behind(self) -> list[Path]:
        """Return what of ours stands in the home, and anything in the temporary folder."""
        home = Path(self.environment["HOME"])
        return [*home.glob(".c*/fabrik/*"), *Path(self.environment["TMPDIR"]).iterdir()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("this is no git checkout")
    folder = tmp_path_factory.mktemp("readme")
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder / "clone")], check=True, capture_output=True)
    (folder / "home").mkdir(mode=0o700)
    environment = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name)}
    environment["HOME"] = str(folder / "home")
    environment["TMPDIR"] = tempfile.mkdtemp(prefix="f")  # short: sockets may stand there
    for settings in (Path.home() / ".config" / "pip" / "pip.conf", Path.home() / ".pip" / "pip.conf"):
        if settings.exists():
            environment.setdefault("PIP_CONFIG_FILE", str(settings))
    found = Clone(folder / "clone", environment)
    yield found
    if (found.folder / "dist" / "fabrik-daemon").exists():
        found.run("dist/fabrik-daemon stop")
    shutil.rmtree(environment["TMPDIR"])


def test_readme_is_what_is_committed() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    readme = subprocess.run(["git", "show", "HEAD:README.md"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert commands_run(readme.stdout) == commands_run((ROOT / "README.md").read_text())


def test_the_first_commands_are_those_of_a_newcomer() -> None:
    commands = commands_run((ROOT / "README.md").read_text())
    assert commands[:2] == [DEMO, TEST]


def test_ci_runs_what_readme_says() -> None:
    *_, last = (ROOT / ".ci" / "run").read_text().splitlines()
    assert last == 'exec "$(dirname "${BASH_SOURCE[0]}")/../build.sh" test "$@"'


def test_every_command_in_a_fresh_clone(clone: Clone) -> None:
    commands = commands_run((clone.folder / "README.md").read_text())
    assert commands, "README shows no command"
    for command in commands:
        if command != TEST:
            done = clone.run(command)
            assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
            if command == DEMO:
                assert_is_a_final_table(done.stdout)
                assert clone.left_behind() == []
    status = subprocess.run(
        ["git", "status", "--porcelain"], cwd=clone.folder, check=True, capture_output=True, text=True
    )
    assert status.stdout == "", "the commands leave the clone as it was"


def assert_is_a_final_table(output: str) -> None:
    """Fail unless this is the demo's last list, once and without anything for a terminal."""
    titles = [line for line in output.splitlines() if line.split()[:3] == ["RUN", "CLUSTER", "STATUS"]]
    assert len(titles) == 1, output
    assert "\x1b" not in output
    assert "finished" in output


def test_how_commands_are_found() -> None:
    text = """
```console
$ one --flag \\
    'two words'
what it prints
$ two
```

```sh
$ not this
```

```console no-test
$ three
```
"""
    assert console_blocks(text) == [Block(True, ["one --flag 'two words'", "two"]), Block(False, ["three"])]
    assert commands_run(text) == ["one --flag 'two words'", "two"]
