#!/usr/bin/env bash
# Makes dist/fabrik-daemon, one executable for every Python from 3.9 on, and tests it. ./build.sh --help says how.
set -euo pipefail
# Nothing of the caller's Python set-up reaches the tools; the user's package index (pip's and uv's settings) does.
unset PYTHONPATH PYTHONHOME PYTHONOPTIMIZE VIRTUAL_ENV
export PIP_DISABLE_PIP_VERSION_CHECK=1 LC_ALL=C

UV_VERSION=0.13.9 # only ./build.sh lock uses it
AUDIT_VERSION=2.10.1 # of pip-audit; only ./build.sh audit uses it
BUILD_TOOLS='shiv|click|pip|setuptools' # the part of tests/requirements.lock that ./build.sh alone needs

usage() {
  cat <<'END'
usage: ./build.sh [COMMAND]

  ./build.sh                make dist/fabrik-daemon from requirements.lock with shiv; the same commit gives the same bytes
  ./build.sh test [ARG...]  make .venv with the locked tools, build, then ruff, mypy and pytest; ARGs go to pytest
  ./build.sh audit [ARG...] look the locked versions up among known vulnerabilities; ARGs go to pip-audit
  ./build.sh lock [ARG...]  resolve requirements.lock and tests/requirements.lock again; ARGs go to uv (--upgrade)
  ./build.sh --help         show this

It needs Python 3.9 or newer with venv (PYTHON=... names one) and a package index; it writes to .venv/, build/ and dist/ only.
SOURCE_DATE_EPOCH sets the time inside the executable; by default it is that of the last commit.
END
}

say() { printf 'build.sh: %s\n' "$*" >&2; }

fail() {
  say "$1"
  exit "${2:-1}"
}

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11 python3.10 python3.9 /usr/bin/python3; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 9))' >/dev/null 2>&1; then
      "$candidate" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))'
      return
    elif [[ -n ${PYTHON:-} ]]; then
      fail "PYTHON=$PYTHON is no Python 3.9 or newer with venv" 2
    fi
  done
  fail "no Python 3.9 or newer with venv found (on Debian and Ubuntu: apt install python3-venv); PYTHON=... names one" 2
}

fingerprint() { # of everything on stdin
  "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

development_lock() {
  cat tests/requirements.lock requirements.lock
}

# Whether the virtual environment $1 was made by this Python and holds what the lock $2 says.
up_to_date() {
  [[ -f $1/stamp && $(<"$1/stamp") == "$(stamp_of "$2")" ]]
}

stamp_of() {
  { "$python" -VV && printf '%s\n' "$python" "$1"; } | fingerprint
}

# Makes the virtual environment $1 hold what the lock $2 says, unless it does already.
environment() {
  if up_to_date "$1" "$2"; then
    return
  fi
  say "installing locked tools into $1"
  rm -rf "$1"
  "$python" -m venv "$1"
  printf '%s\n' "$2" >"$1/lock"
  # The lock is the whole closure, so there is nothing to resolve; wheels only, so nothing runs while installing.
  "$1/bin/python" -m pip install -qq --require-hashes --no-deps --only-binary :all: -r "$1/lock"
  stamp_of "$2" >"$1/stamp"
}

# Fills build/libraries with what requirements.lock says. The wheels are always those for Linux on x86-64 under Python 3.9,
# wherever this runs: with their compiled files taken out, every machine gets the same portable files.
libraries() {
  local tools=$1 stamp
  stamp=$(cat requirements.lock build.sh | fingerprint)
  if [[ -f build/libraries.stamp && $(<build/libraries.stamp) == "$stamp" ]]; then
    return
  fi
  say "installing requirements.lock into build/libraries"
  rm -rf build/libraries build/libraries.stamp
  "$tools/bin/python" -m pip install -qq --require-hashes --no-deps --no-compile --target build/libraries -r requirements.lock \
    --only-binary :all: --implementation cp --python-version 3.9 --abi cp39 --abi abi3 --abi none --platform manylinux2014_x86_64
  find build/libraries -type f \( -name '*.so' -o -name '*.pyd' -o -name '*.dylib' \) -delete
  # What differs from folder to folder or serves pip alone; the licences stay.
  find build/libraries -path '*.dist-info/*' -type f \
    \( -name RECORD -o -name WHEEL -o -name INSTALLER -o -name REQUESTED -o -name direct_url.json \) -delete
  rm -rf build/libraries/bin build/libraries/{certifi,websocket}/tests
  find build/libraries -depth -type d -name __pycache__ -exec rm -rf {} +
  if [[ -n $(find build/libraries -name '*.pth') ]]; then
    fail "a library brings a .pth file, which the executable's direct entry would not read"
  fi
  printf '%s\n' "$stamp" >build/libraries.stamp
}

# Writes what the tree $1 is made of as a CycloneDX bill of materials into the tree, from requirements.lock and the
# libraries' own words; `fabrik-daemon licenses` shows it.
bill_of_materials() {
  "$python" - "$1" <<'END'
import datetime
import email
import hashlib
import json
import os
import re
import sys
import uuid

# What libraries call the licence whose SPDX name they do not say.
SPDX = {
    "MIT": "MIT",
    "MIT License": "MIT",
    "Apache-2.0": "Apache-2.0",
    "Apache License Version 2.0": "Apache-2.0",
    "BSD-3-Clause": "BSD-3-Clause",
    "ISC": "ISC",
    "MPL-2.0": "MPL-2.0",
    "cronsim: License :: OSI Approved :: BSD License": "BSD-3-Clause",
    "markdown-it-py: License :: OSI Approved :: MIT License": "MIT",
    "mdit-py-plugins: License :: OSI Approved :: MIT License": "MIT",
    "mdurl: License :: OSI Approved :: MIT License": "MIT",
    "python-dateutil: Dual License": "Apache-2.0 AND BSD-3-Clause",
}

tree = sys.argv[1]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def licence(name, metadata):
    said = metadata["License-Expression"]
    if said:
        return said
    words = [metadata["License"] or "", *metadata.get_all("Classifier", [])]
    for word in words:
        found = SPDX.get(f"{name}: {word}") or SPDX.get(word)
        if found:
            return found
    sys.exit(f"build.sh: {name} does not say its licence in SPDX's words; add {words} to SPDX in build.sh")


def component(kind, name, version, text):
    purl = f"pkg:pypi/{name}@{version}"
    shown = {"type": kind, "bom-ref": purl, "name": name, "version": version, "purl": purl, "description": text}
    return {key: value for key, value in shown.items() if value}


with open("fabrik_daemon.py", "rb") as file:
    module = file.read()
with open("requirements.lock", encoding="utf-8") as file:
    lock = file.read()
version = re.search(rb'^__version__ = "(.+)"$', module, re.M)[1].decode()
program = component("application", "fabrik-daemon", version, "Follows fabrik's Kubernetes clusters")
program["hashes"] = [{"alg": "SHA-256", "content": hashlib.sha256(module).hexdigest()}]  # of fabrik_daemon.py

refs, wanted_by = {"fabrik-daemon": program["bom-ref"]}, {}
for name, pinned, block in re.findall(r"^(\S+)==(\S+) (.*?)(?=^\S|\Z)", lock, re.M | re.S):
    refs[name] = f"pkg:pypi/{name}@{pinned}"
    vias = re.findall(r"^    # +(?:via +)?([A-Za-z0-9][A-Za-z0-9._-]*)", block, re.M)
    wanted_by[name] = {normal(via) for via in vias if via != "via"}

components = []
for folder in sorted(os.listdir(tree)):
    if folder.endswith(".dist-info"):
        with open(os.path.join(tree, folder, "METADATA"), encoding="utf-8") as file:
            metadata = email.message_from_file(file)
        name = normal(metadata["Name"])
        found = component("library", name, metadata["Version"], metadata["Summary"])
        if refs.get(name) != found["bom-ref"]:
            sys.exit(f"build.sh: {found['bom-ref']} is not what requirements.lock says")
        components.append({**found, "licenses": [{"expression": licence(name, metadata)}]})
if len(components) != len(wanted_by):
    sys.exit("build.sh: requirements.lock and the libraries differ")
components.sort(key=lambda found: found["name"])

depends = [
    {"ref": ref, "dependsOn": sorted(refs[other] for other, users in wanted_by.items() if name in users)}
    for name, ref in sorted(refs.items())
]
moment = datetime.datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), datetime.timezone.utc)
bill = {
    "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
    "bomFormat": "CycloneDX",
    "specVersion": "1.6",
    "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, hashlib.sha256(module + lock.encode()).hexdigest())}",
    "version": 1,
    "metadata": {"timestamp": moment.isoformat(), "component": program},
    "components": components,
    "dependencies": depends,
}
with open(os.path.join(tree, "fabrik-daemon.cdx.json"), "w", encoding="utf-8") as file:
    json.dump(bill, file, indent=1)
END
}

# The executable's __main__.py. Python 2.7 and 3.6 must be able to parse it, and every start compiles it: keep it short.
bundle_main() {
  cat <<'END'
"""Enter the unpacked fabrik-daemon directly, or have shiv unpack it first, where only its user can write."""
import os
import sys

BUILD_ID = "@BUILD_ID@"


def note(text):
    sys.stderr.write("fabrik-daemon: %s\n" % text)


def closed(folder):
    """Whether nobody but us and root can put something else at this path."""
    while True:
        found = os.stat(folder)
        if found.st_uid not in (0, os.geteuid()) or (found.st_mode & 0o022 and not found.st_mode & 0o1000):
            return False
        if folder == os.path.dirname(folder):
            return True
        folder = os.path.dirname(folder)


def enterable(tree):
    """Whether the tree is whole, ours and closed to everybody else; None where there is none."""
    try:
        top, site = os.lstat(tree), os.lstat(os.path.join(tree, "site-packages"))
    except OSError:
        return False if os.path.lexists(tree) else None
    # 0o40000 marks a real folder, not a link to one.
    private = top.st_mode & 0o170777 == 0o40700 and site.st_mode & 0o170022 == 0o40000
    return private and top.st_uid == site.st_uid == os.geteuid() and closed(os.path.dirname(tree))


def enter(tree):
    """Run the program as shiv's bootstrap would, without what that costs."""
    if sys.path[0] == sys.argv[0]:
        del sys.path[0]  # the archive: nothing more comes from it, and every import would ask it first
    others = [os.path.basename(part) in ("site-packages", "dist-packages") for part in sys.path] + [True]
    sys.path.insert(others.index(True), os.path.join(tree, "site-packages"))
    import gc

    gc.disable()  # nothing that a start makes is garbage; run() switches it on
    import fabrik_daemon

    fabrik_daemon.run()


def writable(place):
    """Whether a tree may be unpacked in this folder, which is made if need be."""
    umask = os.umask(0o077)
    try:
        if not os.path.isdir(place):
            os.makedirs(place)
        return os.access(place, os.W_OK | os.X_OK) and closed(place)
    except OSError:
        return False
    finally:
        os.umask(umask)


def main():
    if sys.version_info < (3, 9):
        note("needs Python 3.9 or newer, and %s is %d.%d" % ((sys.executable,) + tuple(sys.version_info[:2])))
        sys.exit(2)
    name = "%s_%s" % (os.path.basename(os.path.realpath(sys.argv[0])), BUILD_ID)
    places = [os.environ.get("SHIV_ROOT") or os.path.join("~", ".shiv")]
    if os.path.isabs(os.environ.get("XDG_CACHE_HOME", "")):
        places.append(os.path.join(os.environ["XDG_CACHE_HOME"], "fabrik", "shiv"))
    places.append(os.path.join(os.environ.get("TMPDIR") or "/tmp", "fabrik-daemon-%d" % os.geteuid()))
    # shiv's other switches (SHIV_INTERPRETER, SHIV_FORCE_EXTRACT, ...) are its bootstrap's to follow.
    switched = any(key.startswith("SHIV_") and key != "SHIV_ROOT" for key in os.environ)
    unwritable = []
    for place in places:
        place = os.path.expanduser(place)
        if place.startswith("~"):
            continue  # nobody knows this user's home
        place = os.path.realpath(place)
        tree = os.path.join(place, name)
        found = enterable(tree)
        if found and not switched:
            return enter(tree)
        if found or (found is None and writable(place)):
            if unwritable:
                note("cannot write safely to %s, so this is unpacked into %s" % (unwritable[0], place))
            import _unpack

            return _unpack.bootstrap(tree, note)
        if found is None:
            unwritable.append(place)
        else:
            note("does not enter %s: it is damaged or others can write there; remove it" % tree)
    note("finds no place of its own to unpack into; SHIV_ROOT names one")
    sys.exit(1)


main()
END
}

# The executable's _unpack.py, for a start that finds no tree to enter.
bundle_unpack() {
  cat <<'END'
"""Unpack the tree."""
import fcntl
import importlib.util
import io
import os
import subprocess
import sys
import zipfile

import _bootstrap


def bootstrap(tree, note):
    """Have shiv's own bootstrap unpack this very tree, if it is not there, and run the program."""
    extract = _bootstrap.extract_site_packages

    def extract_privately(archive, *args):
        umask = os.umask(0o077)
        try:
            with zipfile.ZipFile(io.BytesIO(archive.read("tree.zip"))) as packed:
                extract(packed, *args)
            # In a process of its own: compiling leaves 45 MB behind, which a daemon would keep as long as it lives.
            # Of those who start at once one does it, a second's work, and the others wait for that.
            module = os.path.join(tree, "site-packages", "fabrik_daemon.py")
            with open(module, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not os.path.exists(importlib.util.cache_from_source(module)):
                    subprocess.call([sys.executable, "-I", "-m", "py_compile", module], stderr=subprocess.DEVNULL)
        except OSError as error:
            note("cannot unpack into %s: %s; SHIV_ROOT names another place" % (tree, error.strerror or error))
            sys.exit(1)
        finally:
            os.umask(umask)

    _bootstrap.cache_path = lambda *args: _bootstrap.Path(tree)
    _bootstrap.extract_site_packages = extract_privately
    _bootstrap.bootstrap()
END
}

# Writes what shiv made ($1) again as $3: with the modules in the folder $2, entries sorted, the same permissions whatever
# the umask, and nothing to be inflated before the program is entered.
# What shiv's bootstrap unpacks stands in an archive of its own inside: Python reads the whole list of the outer one at every
# start, and 1,700 entries there cost as much as half a bare interpreter.
finish() {
  "$python" - "$@" <<'END'
import io
import json
import sys
import zipfile

made, entry, target = sys.argv[1:]


def add(archive, name, data, method=zipfile.ZIP_DEFLATED):
    entry = zipfile.ZipInfo(name, date)
    entry.create_system = 3  # Unix, so that the permissions count
    entry.external_attr = 0o100644 << 16
    archive.writestr(entry, data, method, 9)


with open(target, "wb") as file:
    file.write(b"#!/usr/bin/env python3\n")
with zipfile.ZipFile(made) as source, zipfile.ZipFile(target, "a") as outer:
    names = sorted(source.namelist())
    date = source.getinfo("environment.json").date_time
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as tree:
        for name in names:
            if name.startswith("site-packages/"):
                add(tree, name, source.read(name))
            elif name != "__main__.py":
                add(outer, name, source.read(name))
    build_id = json.loads(source.read("environment.json"))["build_id"]
    for name in ("__main__.py", "_unpack.py"):
        with open(f"{entry}/{name}", "rb") as file:
            add(outer, name, file.read().replace(b"@BUILD_ID@", build_id.encode()), zipfile.ZIP_STORED)
    add(outer, "tree.zip", packed.getvalue(), zipfile.ZIP_STORED)
END
  chmod 755 "$3"
}

# Makes dist/fabrik-daemon with the shiv of the environment $1.
build() {
  local tools=$1
  [[ -f fabrik_daemon.py ]] || fail "there is no fabrik_daemon.py"
  libraries "$tools"
  rm -rf build/tree
  mkdir -p build/tree dist
  cp -R build/libraries/. build/tree/
  cp fabrik_daemon.py build/tree/
  if [[ -d service-templates ]]; then
    cp -R service-templates build/tree/
  fi
  if [[ -z ${SOURCE_DATE_EPOCH:-} ]]; then
    # Where git does not know: 1980, the first year a zip file can tell.
    SOURCE_DATE_EPOCH=$(git log -1 --format=%ct 2>/dev/null) || SOURCE_DATE_EPOCH=315532800
  fi
  export SOURCE_DATE_EPOCH
  bill_of_materials build/tree
  "$tools/bin/python" -W ignore::DeprecationWarning -m shiv --reproducible --uncompressed --entry-point fabrik_daemon:run \
    --site-packages build/tree --output-file build/bundle.pyz
  mkdir -p build/entry
  bundle_main >build/entry/__main__.py
  bundle_unpack >build/entry/_unpack.py
  finish build/bundle.pyz build/entry build/fabrik-daemon
  mv build/fabrik-daemon dist/fabrik-daemon
  rm -rf build/tree build/bundle.pyz build/entry
  say "made dist/fabrik-daemon"
}

build_alone() {
  if up_to_date .venv "$(development_lock)"; then
    build .venv
  else
    environment build/env "$(awk -v names="^($BUILD_TOOLS)==" '/^[^ #]/ { wanted = $0 ~ names } wanted' tests/requirements.lock)"
    build build/env
  fi
}

test_all() {
  local failed=0
  environment .venv "$(development_lock)"
  build .venv
  .venv/bin/ruff format --check . || failed=1
  .venv/bin/ruff check . || failed=1
  .venv/bin/mypy || failed=1
  .venv/bin/pytest -q -n auto --dist loadfile "$@" || failed=1
  return "$failed"
}

lock() {
  [[ -x build/uv/bin/uv ]] || "$python" -m venv build/uv
  build/uv/bin/python -m pip install -qq "uv==$UV_VERSION"
  export UV_CUSTOM_COMPILE_COMMAND='./build.sh lock'
  touch requirements.lock tests/requirements.lock
  # One version of each for every Python, which is what 3.9 takes: the tools read its syntax, and all find the same.
  build/uv/bin/uv pip compile --quiet --generate-hashes --no-build --python-version 3.9 --python-platform linux \
    "$@" pyproject.toml --output-file requirements.lock
  build/uv/bin/uv pip compile --quiet --generate-hashes --no-build --python-version 3.9 --universal --fork-strategy fewest \
    --group dev --constraint requirements.lock "$@" --output-file tests/requirements.lock
}

audit() {
  [[ -x build/audit/bin/pip-audit ]] || "$python" -m venv build/audit
  build/audit/bin/python -m pip install -qq "pip-audit==$AUDIT_VERSION"
  local ignored=() id reason
  while read -r id reason; do
    if [[ -n $id && $id != \#* ]]; then
      [[ -n $reason ]] || fail "tests/audit-ignored.txt: $id has no reason"
      ignored+=(--ignore-vuln "$id")
    fi
  done <tests/audit-ignored.txt
  build/audit/bin/pip-audit --requirement requirements.lock --disable-pip --require-hashes --strict \
    --progress-spinner off ${ignored[@]+"${ignored[@]}"} "$@" ||
    fail "something is known of these versions, or the package index here does not tell what is (PyPI's JSON API does)"
}

cd "$(dirname "${BASH_SOURCE[0]}")"
case ${1-build} in
  -h | --help | help) usage ;;
  build)
    python=$(find_python)
    build_alone
    ;;
  test)
    python=$(find_python)
    test_all "${@:2}"
    ;;
  audit)
    python=$(find_python)
    audit "${@:2}"
    ;;
  lock)
    python=$(find_python)
    lock "${@:2}"
    ;;
  *) fail "unknown command '$1'; ./build.sh --help tells the known ones" 2 ;;
esac
