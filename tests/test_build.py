"""The executable: one file, the same bytes everywhere, entered directly and only where nobody else can write."""

import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from harness import wait_until

ROOT = Path(__file__).parent.parent
REAL_HOME = Path.home()
BUILD_INPUTS = ("build.sh", "fabrik_daemon.py", "pyproject.toml", "requirements.lock", "tests/requirements.lock")
UNWANTED = (".so", ".pyd", ".dylib", ".dll", ".a", ".pyc", ".pth", "direct_url.json", "/RECORD")
PLANTED = 'raise SystemExit("PLANTED")\n'


class Interpreter(NamedTuple):
    path: str
    version: tuple[int, int]


def interpreters() -> list[Interpreter]:
    """Find one CPython of each version that this machine has."""
    names = ["python2.7", *(f"python3.{minor}" for minor in range(6, 20)), "python3", "/usr/bin/python3"]
    candidates = [shutil.which(name) for name in names]
    candidates += [str(path) for path in sorted((REAL_HOME / ".pyenv" / "versions").glob("*/bin/python"))]
    ask = "import sys, platform; print(platform.python_implementation(), sys.version_info[0], sys.version_info[1])"
    found: dict[tuple[int, int], str] = {}
    for path in filter(None, [sys.executable, *candidates]):
        answer = subprocess.run([path, "-c", ask], capture_output=True, text=True, check=False).stdout.split()
        if answer[:1] == ["CPython"]:
            found.setdefault((int(answer[1]), int(answer[2])), path)
    return [Interpreter(path, version) for version, path in sorted(found.items())]


INTERPRETERS = interpreters()


class Bundle(NamedTuple):
    """The executable, and the places that a start of it may use."""

    path: Path
    home: Path
    temporary: Path

    @property
    def build_id(self) -> str:
        with zipfile.ZipFile(self.path) as archive:
            return str(json.loads(archive.read("environment.json"))["build_id"])

    @property
    def tree(self) -> Path:
        return self.home / ".shiv" / f"fabrik-daemon_{self.build_id}"

    def command(self, *words: str, python: str = sys.executable, options: tuple[str, ...] = ()) -> list[str]:
        return [python, *options, str(self.path), *(words or ("--version",))]

    def environment(self, **more: str) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "HOME": str(self.home), "TMPDIR": str(self.temporary), **more}

    def start(
        self,
        *words: str,
        python: str = sys.executable,
        options: tuple[str, ...] = (),
        umask: int = 0o022,
        env: Optional[dict[str, str]] = None,
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self.command(*words, python=python, options=options),
            capture_output=True,
            text=True,
            check=False,
            env=self.environment(**(env or {})),
            umask=umask,
        )


@pytest.fixture
def bundle(executable: Path, tmp_path: Path) -> Bundle:
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    return Bundle(executable, home, temporary)


@pytest.fixture
def unpacked_bundle(bundle: Bundle) -> Bundle:
    """Start the executable once, so that its tree stands in the home."""
    assert_version(bundle.start())
    assert bundle.tree.is_dir()
    return bundle


def assert_version(done: "subprocess.CompletedProcess[str]", stderr_lines: int = 0) -> None:
    assert (done.returncode, done.stdout) == (0, f"fabrik-daemon {declared_version()}\n"), done.stderr
    assert len(done.stderr.splitlines()) == stderr_lines, done.stderr


def declared_version() -> str:
    lines = (ROOT / "fabrik_daemon.py").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("__version__")).split('"')[1]


def test_holds_the_program_and_no_compiled_file(executable: Path) -> None:
    with zipfile.ZipFile(executable) as outer:
        own = {name: outer.read(name) for name in outer.namelist()}
    with zipfile.ZipFile(io.BytesIO(own.pop("tree.zip"))) as tree:
        files = {name: tree.read(name) for name in tree.namelist()}
    assert files["site-packages/fabrik_daemon.py"] == (ROOT / "fabrik_daemon.py").read_bytes()
    for template in (ROOT / "service-templates").rglob("*"):
        if template.is_file():
            assert files[f"site-packages/{template.relative_to(ROOT).as_posix()}"] == template.read_bytes()
    for name, data in {**own, **files}.items():
        assert not name.endswith(UNWANTED), name
        assert not {"__pycache__", "bin", "tests", "test"} & set(Path(name).parts[:3]), name
        # ELF, Windows and the four Mach-O beginnings, whatever the file is called.
        assert data[:4] not in (b"\x7fELF", b"\xcf\xfa\xed\xfe", b"\xce\xfa\xed\xfe", b"\xca\xfe\xba\xbe"), name
        assert data[:2] != b"MZ", name


@pytest.mark.parametrize(
    "python", [found for found in INTERPRETERS if found.version >= (3, 9)], ids=lambda found: f"{found.version}"
)
def test_starts_under_every_python(bundle: Bundle, python: Interpreter) -> None:
    assert_version(bundle.start(python=python.path))
    assert_version(bundle.start(python=python.path))


@pytest.mark.parametrize(
    "python", [found for found in INTERPRETERS if found.version >= (3, 9)], ids=lambda found: f"{found.version}"
)
def test_libraries_import_under_every_python_without_a_warning(unpacked_bundle: Bundle, python: Interpreter) -> None:
    site_packages = str(unpacked_bundle.tree / "site-packages")
    program = f"""
import sys
sys.path.insert(0, {site_packages!r})
import cronsim, h11, kubernetes.client, kubernetes.config, yaml
for module in (cronsim, h11, kubernetes, yaml):
    assert module.__file__.startswith({site_packages!r}), module
print(yaml.safe_load("a: [1, 2]"))
"""
    done = subprocess.run(
        [python.path, "-I", "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env=unpacked_bundle.environment(),
    )
    assert (done.stdout, done.stderr) == ("{'a': [1, 2]}\n", "")


@pytest.mark.parametrize(
    "python", [found for found in INTERPRETERS if found.version < (3, 9)], ids=lambda found: f"{found.version}"
)
def test_tells_a_python_that_is_too_old_in_one_line(bundle: Bundle, python: Interpreter) -> None:
    done = bundle.start(python=python.path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "needs Python 3.9 or newer" in line
    assert "{}.{}".format(*python.version) in line
    assert not list(bundle.home.iterdir())


def imported(done: "subprocess.CompletedProcess[str]") -> set[str]:
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


def test_second_start_enters_the_tree_directly(bundle: Bundle) -> None:
    first = imported(bundle.start(options=("-X", "importtime")))
    second = imported(bundle.start(options=("-X", "importtime")))
    assert {"_bootstrap", "zipfile"} <= first
    assert "fabrik_daemon" in second
    assert not {"_bootstrap", "zipfile"} & second


def test_what_is_entered_is_the_tree(unpacked_bundle: Bundle) -> None:
    (unpacked_bundle.tree / "site-packages" / "fabrik_daemon.py").write_text(PLANTED)
    assert "PLANTED" in unpacked_bundle.start().stderr


def test_a_link_of_another_name_enters_the_same_tree(unpacked_bundle: Bundle) -> None:
    link = unpacked_bundle.home / "fabrik"
    link.symlink_to(unpacked_bundle.path)
    done = unpacked_bundle._replace(path=link).start(options=("-X", "importtime"))
    assert "fabrik_daemon" in imported(done)
    assert "_bootstrap" not in imported(done)


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077], ids=oct)
def test_unpacks_closed_to_others_and_keeps_umask_and_argv(bundle: Bundle, umask: int) -> None:
    # What the program runs under is told when its interpreter ends.
    hook = bundle.home / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os, sys\n"
        "end = os._exit\n"
        "def told(code):\n"
        "    sys.stderr.write('%o %s' % (os.umask(0), sys.argv[0]))\n"
        "    sys.stderr.flush()\n"
        "    end(code)\n"
        "os._exit = told\n"
    )
    for _ in range(2):
        done = bundle.start(umask=umask, env={"PYTHONPATH": str(hook)})
        assert done.stderr == f"{umask:o} {bundle.path}"
    assert bundle.tree.stat().st_mode & 0o777 == 0o700
    assert bundle.tree.parent.stat().st_mode & 0o777 == 0o700
    unpacked = [path for path in bundle.tree.rglob("*") if "__pycache__" not in path.parts]
    assert not [path for path in unpacked if path.stat().st_mode & 0o022]


@pytest.mark.parametrize(
    ("inside", "mode"),
    [(".", 0o770), (".", 0o707), (".", 0o755), ("site-packages", 0o770), ("site-packages", 0o707), ("..", 0o770)],
)
def test_never_enters_a_tree_that_others_may_write(unpacked_bundle: Bundle, inside: str, mode: int) -> None:
    (unpacked_bundle.tree / "site-packages" / "fabrik_daemon.py").write_text(PLANTED)
    (unpacked_bundle.tree / inside).chmod(mode)
    for _ in range(2):
        done = unpacked_bundle.start()
        assert_version(done, stderr_lines=1)
        assert str(unpacked_bundle.tree) in done.stderr


def test_never_enters_a_link_or_half_a_tree(unpacked_bundle: Bundle) -> None:
    tree, elsewhere = unpacked_bundle.tree, unpacked_bundle.home / "elsewhere"
    tree.rename(elsewhere)
    tree.symlink_to(elsewhere)
    assert_version(unpacked_bundle.start(), stderr_lines=1)
    tree.unlink()
    tree.mkdir(mode=0o700)
    assert_version(unpacked_bundle.start(), stderr_lines=1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_never_enters_a_tree_of_another_user(unpacked_bundle: Bundle) -> None:
    (unpacked_bundle.tree / "site-packages" / "fabrik_daemon.py").write_text(PLANTED)
    os.chown(unpacked_bundle.tree, 12345, 12345)
    assert_version(unpacked_bundle.start(), stderr_lines=1)


@pytest.mark.parametrize("cache", [None, "cache"])
def test_unwritable_home(bundle: Bundle, cache: Optional[str]) -> None:
    # A file is no home for anybody, not even for root.
    nowhere = bundle.home / "file"
    nowhere.touch()
    homeless = bundle._replace(home=nowhere)
    env = {"XDG_CACHE_HOME": str(bundle.home / cache)} if cache else {}
    first = homeless.start(env=env)
    assert_version(first, stderr_lines=1)
    assert str(bundle.home / cache if cache else bundle.temporary) in first.stderr
    second = homeless.start(env=env, options=("-X", "importtime"))
    assert "_bootstrap" not in imported(second)
    assert all(line.startswith("import time:") for line in second.stderr.splitlines())


def test_no_place_at_all(bundle: Bundle) -> None:
    nowhere = bundle.home / "file"
    nowhere.touch()
    done = bundle._replace(home=nowhere, temporary=nowhere).start()
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert "SHIV_ROOT" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody whom nobody knows")
@pytest.mark.parametrize("home", [None, "/nowhere"])
def test_a_user_without_a_home_in_a_read_only_place(executable: Path, home: Optional[str]) -> None:
    paths = [*(one.path for one in INTERPRETERS if one.version >= (3, 9)), "/usr/bin/python3"]
    python = next((path for path in paths if not in_a_home(path) and Path(path).exists()), None)
    if python is None:
        pytest.skip("every Python here is in root's home")
    with tempfile.TemporaryDirectory(prefix="fabrik-") as name:
        root = Path(name)
        own, temporary, cwd = root / "bin" / "fabrik-daemon", root / "tmp", root / "cwd"
        for folder in (own.parent, temporary, cwd):
            folder.mkdir()
        shutil.copy(executable, own)
        own.parent.chmod(0o555)
        root.chmod(0o755)
        temporary.chmod(0o1777)
        cwd.chmod(0o1777)
        env = {"PATH": "/usr/bin:/bin", "TMPDIR": str(temporary), **({"HOME": home} if home else {})}
        user = 54321  # in no passwd
        for lines in (1, 0) if home else (0, 0):
            done = subprocess.run(
                [python, str(own), "--version"],
                capture_output=True,
                text=True,
                check=False,
                cwd=cwd,
                env=env,
                user=user,
                group=user,
                extra_groups=(),
            )
            assert_version(done, stderr_lines=lines)
        assert list(cwd.iterdir()) == []
        assert [path.name for path in temporary.iterdir()] == [f"fabrik-daemon-{user}"]
        assert [path.name for path in own.parent.iterdir()] == ["fabrik-daemon"]


def in_a_home(python: str) -> bool:
    """Tell whether an interpreter, or the one behind it, is in somebody's home."""
    return os.path.realpath(python).startswith(("/root/", "/home/"))


def other_version(bundle: Bundle, path: Path) -> Bundle:
    """Write the executable of another version: the same but for a line that does nothing."""
    with zipfile.ZipFile(bundle.path) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name in ("__main__.py", "environment.json"):
                data = data.replace(bundle.build_id.encode(), bundle.build_id[::-1].encode())
            target.writestr(name, data)
    return bundle._replace(path=path)


def test_an_upgrade_takes_the_old_copy_away(bundle: Bundle) -> None:
    program, other = bundle.home / "bin" / "fabrik-daemon", bundle.home / "other" / "fabrik-daemon"
    for path in (program, other):
        path.parent.mkdir()
    installed, kept = bundle._replace(path=program), other_version(bundle, other)
    shutil.copy(bundle.path, program)
    assert_version(installed.start())
    assert_version(kept.start())
    trees = {installed.tree, kept.tree}
    assert unpacked(bundle) == trees, "two executables, two copies"

    # The installed one becomes another version, in place.
    newer = bundle.home / "newer"
    with zipfile.ZipFile(program) as source, zipfile.ZipFile(newer, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(bundle.build_id.encode(), b"0" * len(bundle.build_id)))
    newer.replace(program)
    upgraded = bundle._replace(path=program)
    assert_version(upgraded.start())
    assert unpacked(bundle) == {upgraded.tree, kept.tree}
    assert not [path for path in upgraded.tree.parent.iterdir() if bundle.build_id in path.name], "no lock of it either"

    # The other one is removed by hand; what unpacks next takes its copy away.
    kept.path.unlink()
    again = other_version(installed._replace(path=bundle.path), program)
    shutil.rmtree(again.tree)
    assert_version(again.start())
    assert unpacked(bundle) == {again.tree}


def unpacked(bundle: Bundle) -> set[Path]:
    """Return the unpacked copies in the home."""
    return {path for path in bundle.tree.parent.iterdir() if path.is_dir()}


def test_a_copy_in_use_stays_until_it_is_not(bundle: Bundle) -> None:
    program = bundle.home / "fabrik-daemon"
    shutil.copy(bundle.path, program)
    installed = bundle._replace(path=program)
    assert_version(installed.start())
    old = installed.tree
    demo = subprocess.Popen(
        installed.command("demo", "--speed", "0.1"),
        env=installed.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: is_locked(old / ".origin"), 30, "the demo has its copy locked")
        upgraded = other_version(installed, bundle.home / "new")
        upgraded.path.replace(program)
        upgraded = upgraded._replace(path=program)
        assert_version(upgraded.start())
        assert unpacked(bundle) == {old, upgraded.tree}
    finally:
        demo.terminate()  # its daemon ends with it
        demo.wait()
    shutil.rmtree(upgraded.tree)
    assert_version(upgraded.start())
    assert unpacked(bundle) == {upgraded.tree}


def is_locked(path: Path) -> bool:
    """Tell whether some process has locked a file."""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def test_other_programs_copies_are_left_alone(bundle: Bundle) -> None:
    stranger = bundle.tree.parent / "stranger_0123456789abcdef"
    (stranger / "site-packages").mkdir(parents=True)
    for path in (bundle.tree.parent, stranger):
        path.chmod(0o700)
    assert_version(bundle.start())
    assert stranger.is_dir()


@pytest.fixture(scope="module")
def bill(executable: Path) -> dict[str, Any]:
    """Return the executable's bill of materials."""
    done = subprocess.run([sys.executable, str(executable), "licenses", "--sbom"], capture_output=True, check=True)
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_the_bill_of_materials_is_valid(bill: dict[str, Any]) -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bill)) is None
    broken = {**bill, "components": [{"name": "without a type"}]}
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(broken)) is not None, "it looks"


def test_the_bill_of_materials_is_what_is_in_it(bill: dict[str, Any], executable: Path) -> None:
    with zipfile.ZipFile(executable) as outer, zipfile.ZipFile(io.BytesIO(outer.read("tree.zip"))) as tree:
        folders = {name.split("/")[1] for name in tree.namelist() if ".dist-info/" in name}
        module = tree.read("site-packages/fabrik_daemon.py")
    carried = {re.sub(r"[-_.]+", "-", folder[: -len(".dist-info")]).lower() for folder in folders}
    listed = {f"{found['name']}-{found['version']}" for found in bill["components"]}
    assert {re.sub(r"[-_.]+", "-", name) for name in listed} == carried
    locked = re.findall(r"^(\S+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert {(found["name"], found["version"]) for found in bill["components"]} == set(locked)
    assert bill["metadata"]["component"]["hashes"][0]["content"] == hashlib.sha256(module).hexdigest()
    depends = {entry["ref"]: entry["dependsOn"] for entry in bill["dependencies"]}
    root = depends[bill["metadata"]["component"]["bom-ref"]]
    declared = declared_dependencies()
    assert {ref.split("/")[1].split("@")[0] for ref in root} == declared
    reached, waiting = set(), list(root)
    while waiting:
        ref = waiting.pop()
        if ref not in reached:
            reached.add(ref)
            waiting += depends[ref]
    assert reached == {found["bom-ref"] for found in bill["components"]}, "nothing that nothing needs"


def declared_dependencies() -> set[str]:
    """Return the names in pyproject.toml's list of dependencies."""
    text = (ROOT / "pyproject.toml").read_text()
    block = text.split("dependencies = [", 1)[1].split("\n]", 1)[0]
    return {name.lower() for name in re.findall(r'^    "([A-Za-z0-9-]+)', block, re.MULTILINE)}


def test_licences_and_their_texts(bundle: Bundle, bill: dict[str, Any]) -> None:
    table = bundle.start("licenses").stdout
    texts = bundle.start("licenses", "--texts").stdout
    for found in bill["components"]:
        assert re.search(rf"^{found['name']} +{re.escape(found['version'])} ", table, re.MULTILINE)
        (text,) = re.findall(rf"^---- {found['name']} [^\n]*\n(.*?)(?=^---- |\Z)", texts, re.MULTILINE | re.DOTALL)
        assert len(text.strip()) > 400, f"{found['name']} without its licence"


def test_unpacking_that_fails(bundle: Bundle) -> None:
    bundle.tree.parent.mkdir(mode=0o700)
    bundle.tree.with_name(bundle.tree.name + ".tmp").write_text("not a folder")
    done = bundle.start()
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert "cannot unpack" in done.stderr


def test_shivs_own_switches(unpacked_bundle: Bundle) -> None:
    (unpacked_bundle.tree / "site-packages" / "fabrik_daemon.py").write_text(PLANTED)
    assert_version(unpacked_bundle.start(env={"SHIV_FORCE_EXTRACT": "1"}))
    assert_version(unpacked_bundle.start())
    done = unpacked_bundle.start("-c", "import h11; print(h11.__file__)", env={"SHIV_INTERPRETER": "1"})
    assert done.stdout.startswith(str(unpacked_bundle.tree))


def test_fifty_first_starts_at_once(bundle: Bundle) -> None:
    running = [
        subprocess.Popen(
            bundle.command(), env=bundle.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(50)
    ]
    for process in running:
        out, err = process.communicate()
        assert_version(subprocess.CompletedProcess(process.args, process.returncode, out, err))


def test_two_folders_and_two_umasks_give_the_same_bytes(tmp_path: Path) -> None:
    # pip alone sees the user's settings and cache; the environment of this very run saves installing another.
    env = {**os.environ, "HOME": str(tmp_path)}
    env.pop("SOURCE_DATE_EPOCH", None)
    env.setdefault("XDG_CONFIG_HOME", str(REAL_HOME / ".config"))
    env.setdefault("XDG_CACHE_HOME", str(REAL_HOME / ".cache"))
    running = []
    for name, umask in (("one", 0o002), ("another folder", 0o077)):
        copy = tmp_path / name
        (copy / "tests").mkdir(parents=True)
        for source in BUILD_INPUTS:
            shutil.copy(ROOT / source, copy / source)
        if (ROOT / "service-templates").is_dir():
            shutil.copytree(ROOT / "service-templates", copy / "service-templates")
        (copy / ".venv").symlink_to(ROOT / ".venv")
        running.append((copy, subprocess.Popen([copy / "build.sh"], env=env, umask=umask)))
    for _, process in running:
        assert process.wait() == 0
    one, other = ((copy / "dist" / "fabrik-daemon").read_bytes() for copy, _ in running)
    assert one == other


def test_build_script_says_what_it_does() -> None:
    helped = subprocess.run([ROOT / "build.sh", "--help"], capture_output=True, text=True, check=True)
    assert "./build.sh test" in helped.stdout
    unknown = subprocess.run([ROOT / "build.sh", "tset"], capture_output=True, text=True, check=False)
    assert (unknown.returncode, unknown.stdout, len(unknown.stderr.splitlines())) == (2, "", 1)
    assert "tset" in unknown.stderr
