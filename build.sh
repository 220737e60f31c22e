#!/bin/sh
# Makes nocloud.pyz (or $1) from nocloud.py, etc/ and systemd/: one file that runs wherever there is Python 3.9.
# The same sources give the same bytes, whoever builds them, where, when and with which Python.
#
# shiv gathers the archive, and what it adds for the start is then replaced by the text at the end of this
# script: shiv 1.0's bootstrap unpacks into the home folder and dies without a usable one, lets the SHIV_*
# variables of the caller choose what runs, and costs 25 ms; the metadata it adds differ from build to build.
set -eu
umask 022 # a virtual environment that root made must serve an ordinary user too
unset SOURCE_DATE_EPOCH

fail() {
    echo "build.sh: $*" >&2
    exit 1
}

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)
out=${1:-$here/nocloud.pyz}
python=${PYTHON:-python3}
[ ! -d "$out" ] || fail "$out: is a folder"

mkdir -p "$here/build" 2>/dev/null || : # a checkout that this user may not write: all goes to the temporary folder
tmp=$(mktemp -d "$here/build/tmp.XXXXXX" 2>/dev/null) || tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# Without shiv, it goes into a virtual environment of our own, kept until pyproject.toml asks for another shiv.
venv=$here/build/venv
shiv=$(sed -n 's/^build = \["\(shiv[^"]*\)"\]$/\1/p' "$here/pyproject.toml")
[ -n "$shiv" ] || fail "pyproject.toml: no line build = [\"shiv…\"]"
if "$python" -I -c 'import shiv' 2>/dev/null; then
    :
elif [ "$(cat "$venv/requirement" 2>/dev/null)" = "$shiv" ] && "$venv/bin/python" -I -c 'import shiv' 2>/dev/null; then
    python=$venv/bin/python
else
    echo "build.sh: installing $shiv into $venv" >&2
    "$python" -I -m venv "$tmp/venv" >&2 || fail "$python has no venv (Debian: apt install python3-venv)"
    "$tmp/venv/bin/python" -I -m pip install --quiet --disable-pip-version-check "$shiv" >&2
    echo "$shiv" >"$tmp/venv/requirement"
    { rm -rf "$venv" && mv -T "$tmp/venv" "$venv"; } 2>/dev/null || venv=$tmp/venv
    python=$venv/bin/python
fi

mkdir "$tmp/files"
cp "$here/nocloud.py" "$tmp/files/"
cp -RL "$here/etc" "$here/systemd" "$tmp/files/"
cat >"$tmp/main.py" <<'END'
"""Runs the nocloud.py of this archive and keeps its bytecode: compiling takes longer than most commands."""

import sys

if sys.version_info < (3, 9):
    sys.exit(f"nocloud: needs Python 3.9 or newer, and {sys.executable} is {sys.version.split()[0]}")

import gc
import marshal
import os
import stat
from importlib.machinery import ModuleSpec
from importlib.util import MAGIC_NUMBER, module_from_spec, source_hash  # which runpy has imported already
from types import CodeType
from zipimport import zipimporter

KEPT = 16  # files in the cache: a few Pythons, a few versions


def private(status: os.stat_result) -> bool:
    """Bytecode is code: only what nobody but this user can have put there (under sudo HOME may be another's)."""
    return status.st_uid == os.geteuid() and not status.st_mode & 0o077


def cache_folder() -> str:
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # to be ignored, says the XDG specification
        base = os.path.join(os.environ.get("HOME", ""), ".cache")
    if not os.path.isabs(base):
        raise FileNotFoundError("no home folder")
    return os.path.join(base, "nocloud", "bytecode")  # of its own, since old files in it are removed


def make_folder(path: str) -> None:
    for folder in (os.path.dirname(os.path.dirname(path)), os.path.dirname(path), path):
        if not os.path.lexists(folder) and os.stat(os.path.dirname(folder)).st_uid == os.geteuid():
            os.mkdir(folder, 0o700)


def open_folder(path: str) -> int:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    if not private(os.fstat(folder)):
        os.close(folder)
        raise PermissionError(path)
    return folder


def read_cache(name: str, stamp: bytes) -> CodeType:
    folder = open_folder(cache_folder())
    try:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)
    with open(file, "rb") as stream:
        status = os.fstat(file)
        if not (stat.S_ISREG(status.st_mode) and private(status)):
            raise PermissionError(name)
        data = stream.read()
    if data[:8] != source_hash(stamp + data[8:]):  # marshal may crash on damaged input
        raise ValueError(name)
    code: CodeType = marshal.loads(memoryview(data)[8:])
    return code


def write_cache(name: str, stamp: bytes, code: CodeType) -> None:
    make_folder(cache_folder())
    folder = open_folder(cache_folder())
    temporary = f"{name}.{os.getpid()}"
    try:
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
        try:
            with open(file, "wb") as stream:
                body = marshal.dumps(code)
                stream.write(source_hash(stamp + body) + body)
            os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            os.unlink(temporary, dir_fd=folder)
            raise
        with os.scandir(folder) as entries:
            oldest_first = sorted((entry.stat(follow_symlinks=False).st_mtime_ns, entry.name) for entry in entries)
        for _, old in oldest_first[:-KEPT]:
            os.unlink(old, dir_fd=folder)
    finally:
        os.close(folder)


def load(loader: zipimporter, filename: str) -> CodeType:
    source = loader.get_data("nocloud.py")
    # The path is part of the key because the code carries it, into tracebacks.
    stamp = source_hash(b"%b %d %b\n%b" % (MAGIC_NUMBER, sys.flags.optimize, os.fsencode(filename), source))
    name = f"{sys.implementation.cache_tag}-{stamp.hex()}"
    try:
        return read_cache(name, stamp)
    except Exception:  # whatever is wrong with the cache, the source is still there
        pass
    code: CodeType = compile(source, filename, "exec", dont_inherit=True)
    try:
        if not sys.dont_write_bytecode:
            write_cache(name, stamp, code)
    except OSError:
        pass
    return code


def main() -> int:
    # Not by `import`: that would ask sys.path. And by its real path: the caller may change folders, a link may go.
    archive = os.path.realpath(os.path.dirname(__file__))
    filename = os.path.join(archive, "nocloud.py")
    loader = zipimporter(archive)
    spec = ModuleSpec("nocloud", loader, origin=filename)
    spec.has_location = True
    module = sys.modules["nocloud"] = module_from_spec(spec)
    exec(load(loader, filename), module.__dict__)
    try:
        status: int = module.main()
    finally:
        gc.freeze()  # spares the interpreter its last search for garbage: 4 ms of 30
    return status


try:
    sys.exit(main())
except KeyboardInterrupt:  # while nocloud.py was still being compiled
    sys.exit(130)
END

"$python" -I -m shiv --reproducible --uncompressed --entry-point nocloud:main --python '/usr/bin/env -S python3 -X utf8 -IS' \
    --site-packages "$tmp/files" --output-file "$tmp/shiv.pyz"
# Stored, not deflated: it starts sooner, and zlib's output differs between its versions.
"$python" -I - "$tmp/shiv.pyz" "$tmp/main.py" "$tmp/nocloud.pyz" <<'END'
import sys
import zipfile

with zipfile.ZipFile(sys.argv[1]) as made:
    folder = "site-packages/"
    files = {name[len(folder) :]: made.read(name) for name in made.namelist() if name.startswith(folder)}
with open(sys.argv[1], "rb") as made_file, open(sys.argv[2], "rb") as main_file, open(sys.argv[3], "wb") as out:
    files["__main__.py"] = main_file.read()
    compile(files["nocloud.py"], "nocloud.py", "exec", dont_inherit=True)  # a slip shows here, not at the users'
    out.write(made_file.readline())  # the #! line
    with zipfile.ZipFile(out, "w") as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name)  # dated 1980
            info.create_system, info.external_attr = 3, 0o100644 << 16
            archive.writestr(info, files[name])
END
chmod 755 "$tmp/nocloud.pyz"
mv -fT -- "$tmp/nocloud.pyz" "$out"
