"""nocloud.pyz as users meet it: built anywhere, copied anywhere, called by any name, in hostile surroundings."""

from __future__ import annotations

import marshal
import os
import shutil
import signal
import stat
import subprocess
import sys
from importlib.util import source_hash
from pathlib import Path
from typing import Callable

import pytest

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("3.9", "3.10", "3.11", "3.12", "3.13")
NOBODY = 65534
# The #! line finds the Python that runs the tests, also where `python3` is a wrapper that looks for its own HOME.
PATH = f"{Path(sys.executable).resolve().parent}:/usr/bin:/bin"

Run = subprocess.CompletedProcess[str]


def run(*argv: object, env: dict[str, str] | None = None, cwd: object = "/") -> Run:
    words = [str(word) for word in argv]
    return subprocess.run(
        words,
        env={"PATH": PATH, **(env or {})},
        cwd=str(cwd),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# What a first build, which installs shiv, needs of the caller's environment.
PIP = {name: value for name, value in os.environ.items() if name.lower().startswith(("pip_", "home", "ssl_", "http"))}


def build(tree: Path, out: Path, **env: str) -> None:
    done = run(tree / "build.sh", out, env={**PIP, **env})
    assert done.returncode == 0, done.stderr


def builder() -> str:
    """The Python that has shiv after a first build; with it, a further build installs nothing."""
    private = ROOT / "build/venv/bin/python"
    return str(private) if private.exists() else sys.executable


def copy_sources(tree: Path) -> Path:
    tree.mkdir(parents=True)
    for name in ("build.sh", "pyproject.toml", "nocloud.py"):
        shutil.copy(ROOT / name, tree)
    for name in ("etc", "systemd"):
        shutil.copytree(ROOT / name, tree / name)
    return tree


@pytest.fixture(scope="session")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("zipapp") / "nocloud.pyz"
    build(ROOT, out)
    return out


@pytest.fixture(scope="session")
def version(pyz: Path) -> str:
    done = run(pyz, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def pythons() -> list[str]:
    places = [*os.get_exec_path(), *map(str, sorted(Path.home().glob(".pyenv/versions/*/bin")))]
    found = []
    for name in VERSIONS:
        for path in filter(None, (shutil.which(f"python{name}", path=place) for place in places)):
            probe = [path, "-IS", "-c", "import sys; print(sys.version_info[:2])"]
            if subprocess.run(probe, capture_output=True, check=False).returncode == 0:  # else a wrapper of none
                found.append(path)
                break
    return found


# --- the build ---


def test_archive_is_readable_and_complete(pyz: Path) -> None:
    names = run(sys.executable, "-m", "zipfile", "-l", pyz).stdout
    assert {"nocloud.py", "__main__.py"} <= set(names.split())
    for file in filter(Path.is_file, [*(ROOT / "etc").rglob("*"), *(ROOT / "systemd").rglob("*")]):
        assert str(file.relative_to(ROOT)) in names
    assert pyz.read_bytes().startswith(b"#!/usr/bin/env -S python3 -X utf8 -IS\n")
    assert stat.S_IMODE(pyz.stat().st_mode) == 0o755


@pytest.mark.parametrize(
    ("mask", "env"),
    [
        (0o077, {"TZ": "Pacific/Kiritimati", "LC_ALL": "C", "SOURCE_DATE_EPOCH": "1700000000"}),
        (0o000, {"TZ": "America/St_Johns", "LC_ALL": "tr_TR.UTF-8", "PYTHONHASHSEED": "7", "SHIV_ROOT": "/none"}),
    ],
)
def test_same_bytes_elsewhere(pyz: Path, tmp_path: Path, home: Path, mask: int, env: dict[str, str]) -> None:
    tree = copy_sources(tmp_path / "another folder ü")
    os.utime(tree / "nocloud.py", (1, 1))
    (tree / "nocloud.py").chmod(0o600)
    out = tmp_path / "out.pyz"
    before = os.umask(mask)
    try:
        build(tree, out, HOME=str(home), PYTHON=builder(), **env)
    finally:
        os.umask(before)
    assert out.read_bytes() == pyz.read_bytes()
    assert stat.S_IMODE(out.stat().st_mode) == 0o755
    assert not list((tree / "build").iterdir()), "a build leaves nothing behind"


@pytest.mark.parametrize("python", pythons())
def test_same_bytes_with_another_python(pyz: Path, tmp_path: Path, python: str) -> None:
    place = "import os, shiv, sys; print(os.path.dirname(os.path.dirname(shiv.__file__)))"
    site = run(builder(), "-I", "-c", place).stdout.strip()
    venv = tmp_path / "venv"
    assert run(python, "-m", "venv", "--without-pip", venv).returncode == 0
    next(venv.glob("lib/python3*/site-packages")).joinpath("shiv.pth").write_text(site)
    if run(venv / "bin/python", "-I", "-m", "shiv", "--version").returncode:
        pytest.skip("the libraries that shiv needs were installed for a newer Python")
    out = tmp_path / "out.pyz"
    build(copy_sources(tmp_path / "tree"), out, PYTHON=str(venv / "bin/python"))
    assert out.read_bytes() == pyz.read_bytes()


# `env`, since what setpriv itself starts is still found with root's rights.
as_nobody = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "env")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@needs_root
def test_same_bytes_from_another_user(pyz: Path, public_folder: Path) -> None:
    python = builder()
    if run(*as_nobody, python, "-I", "-c", "import shiv").returncode:
        python = "/usr/bin/python3"  # ours is below a folder of root's; then this one installs a shiv of its own
    tree = copy_sources(public_folder / "tree")
    out = public_folder / "out"
    out.mkdir()
    os.chown(out, NOBODY, NOBODY)
    done = run(*as_nobody, tree / "build.sh", out / "x.pyz", env={**PIP, "PYTHON": python, "HOME": "/nonexistent"})
    assert done.returncode == 0, done.stderr
    assert (out / "x.pyz").read_bytes() == pyz.read_bytes()


def test_output_path_is_the_callers(pyz: Path, tmp_path: Path) -> None:
    tree = copy_sources(tmp_path / "tree")
    done = run(tree / "build.sh", "here.pyz", env={"PYTHON": builder()}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here.pyz").read_bytes() == pyz.read_bytes()


# --- what it brings with it ---


def unpacked_wheel(pyz: Path, tmp_path: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps", "-w", tmp_path]
    done = run(*pip, copy_sources(tmp_path / "tree"), env=PIP)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "wheel", "zip")
    return tmp_path / "wheel"


def installed(pyz: Path, tmp_path: Path) -> Path:
    done = run(pyz, "setup", f"--destdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    return tmp_path / "usr/local/bin/nocloud"


PLACES = {
    "checkout": lambda pyz, tmp_path: ROOT,
    "zipapp": lambda pyz, tmp_path: pyz,
    "installation": installed,
    "wheel": unpacked_wheel,
}


@pytest.mark.parametrize("place", PLACES)
def test_files_are_found_everywhere(pyz: Path, tmp_path: Path, place: str) -> None:
    """All of etc/, with hidden and empty files, and a folder of it with paths relative to that."""
    script = """if True:
        import sys
        sys.path.insert(0, sys.argv[1])
        import nocloud
        print({name: nocloud.packaged(name) for name in nocloud.packaged_files("")})
        print(nocloud.packaged_files("build/tree"), nocloud.packaged_files("nosuch"))
    """
    done = run(sys.executable, "-IBS", "-c", script, PLACES[place](pyz, tmp_path))
    etc = ROOT / "etc"
    names = sorted(str(path.relative_to(etc)) for path in etc.rglob("*") if path.is_file())
    texts = {name: (etc / name).read_text() for name in names}
    below = [name.split("/", 2)[2] for name in names if name.startswith("build/tree/")]
    assert (done.stdout, done.stderr) == (f"{texts}\n{below} []\n", "")


def test_copied_without_its_files_it_says_so(tmp_path: Path) -> None:
    """Where the work can't be done without one; a table that is missing costs a hint its precision."""
    shutil.copy(ROOT / "nocloud.py", tmp_path)
    script = """if True:
        import nocloud
        print(nocloud.packaged("packages"), nocloud.packaged_files("build"), nocloud.package_of("ip", 0))
        try:
            nocloud.guest_script("hostname.sh", NAME="web00")
        except nocloud.Error as error:
            print(error, error.hint)
    """
    done = run(sys.executable, "-BS", "-c", script, cwd=tmp_path)
    missing = f"etc/guest/hostname.sh is missing: {tmp_path}/nocloud.py was copied without it"
    assert done.stdout == f" [] ip\n{missing} nocloud.pyz is all in one file\n", done.stderr


# --- what it runs ---


@pytest.mark.parametrize("python", pythons())
def test_every_python(pyz: Path, version: str, home: Path, python: str) -> None:
    for _ in "compiled", "from the cache":
        done = run(python, pyz, "--version", env={"HOME": str(home)})
        assert (done.returncode, done.stdout, done.stderr) == (0, version, "")
    assert len(list(home.glob(".cache/nocloud/bytecode/*"))) == 1


def test_old_python_is_told_so(pyz: Path) -> None:
    old = sorted(Path.home().glob(".pyenv/versions/3.[678].*/bin/python3"))
    if not old:
        pytest.skip("no Python 3.6 to 3.8 here")
    done = run(old[-1], pyz, "--version")
    assert done.returncode == 1
    assert "needs Python 3.9" in done.stderr and done.stderr.count("\n") == 1


def test_exit_statuses(pyz: Path) -> None:
    assert run(pyz, "--version").returncode == 0
    assert run(pyz, "--no-such-option").returncode == 2
    assert run(pyz, "nosuchcommand").returncode == 127


def test_links_know_their_names(pyz: Path, tmp_path: Path) -> None:
    links = tmp_path / "bin"
    links.mkdir()
    assert run(pyz, "links", links).returncode == 0
    assert {"vmrun", "vmstop", "vmrunning", "vmssh"} <= set(os.listdir(links))
    done = run("vmrunning", "-h", env={"PATH": f"{links}:{PATH}"})  # as from a shell: found on PATH
    assert done.returncode == 0
    assert "vmrunning" in done.stdout


def test_link_to_a_link_in_a_path_with_spaces(pyz: Path, version: str, tmp_path: Path) -> None:
    copy = tmp_path / "a folder" / "ü" / "no cloud"
    copy.parent.mkdir(parents=True)
    shutil.copy(pyz, copy)
    (tmp_path / "one").symlink_to(copy)
    (tmp_path / "nocloud").symlink_to("one")
    assert run("./nocloud", "--version", cwd=tmp_path).stdout == version
    (tmp_path / "vmrunning").symlink_to("nocloud")
    assert "vmrunning" in run("./vmrunning", "-h", cwd=tmp_path).stdout


def test_homes_that_cannot_be_written(pyz: Path, version: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for home in (None, "", "/nonexistent", "/proc", str(file), "relative"):
        env = {"TMPDIR": str(scratch)} if home is None else {"TMPDIR": str(scratch), "HOME": home}
        done = run(pyz, "--version", env=env, cwd=scratch)
        assert (done.returncode, done.stdout, done.stderr) == (0, version, ""), home
    assert not list(scratch.iterdir()), "no cache in a place that others can guess"


@needs_root
def test_home_of_another_user_stays_clean(pyz: Path, version: str, home: Path) -> None:
    """As under sudo: a cache of root's there would be one that its owner can't replace, nor root trust."""
    os.chown(home, NOBODY, NOBODY)
    assert run(pyz, "--version", env={"HOME": str(home)}).stdout == version
    assert not list(home.iterdir())


@needs_root
def test_ordinary_user(pyz: Path, version: str, public_folder: Path) -> None:
    shutil.copy(pyz, public_folder)
    done = run(*as_nobody, public_folder / pyz.name, "--version", env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"})
    assert (done.stdout, done.stderr) == (version, "")


def test_variables_of_shiv_change_nothing(pyz: Path, version: str, home: Path, tmp_path: Path) -> None:
    evil = tmp_path / "evil"
    env = {
        "SHIV_ENTRY_POINT": "os:getcwd",
        "SHIV_CONSOLE_SCRIPT": "evil",
        "SHIV_MODULE": "this",
        "SHIV_INTERPRETER": "1",
        "SHIV_ROOT": str(evil),
        "SHIV_FORCE_EXTRACT": "1",
        "SHIV_EXTEND_PYTHONPATH": "1",
        "SHIV_COMPILE_PYC": "1",
        "SHIV_PREAMBLE": str(evil),
    }
    done = run(pyz, "--version", env={"HOME": str(home), **env})
    assert (done.returncode, done.stdout, done.stderr) == (0, version, "")
    assert os.listdir(home / ".cache") == ["nocloud"]
    assert not evil.exists()


def test_no_other_module_gets_in(pyz: Path, version: str, tmp_path: Path) -> None:
    evil = tmp_path / "evil"
    evil.mkdir()
    for name in ("nocloud", "argparse", "json", "os", "runpy", "sitecustomize", "etc"):
        (evil / f"{name}.py").write_text("raise SystemExit('evil')\n")
    env = dict.fromkeys(("PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "PYTHONPLATLIBDIR"), str(evil))
    done = run(pyz, "--version", env=env, cwd=evil)
    assert (done.returncode, done.stdout, done.stderr) == (0, version, "")
    # Without the #! line's flags the standard library is the caller's business; nocloud is not.
    for path in evil.iterdir():
        if path.name != "nocloud.py":
            path.unlink()
    done = run(sys.executable, pyz, "--version", env={"PYTHONPATH": str(evil)}, cwd=evil)
    assert (done.returncode, done.stdout, done.stderr) == (0, version, "")


# --- its bytecode cache ---


@pytest.fixture
def cached(pyz: Path, home: Path) -> Path:
    """The one file of a cache just made."""
    assert run(sys.executable, pyz, "--version", env={"HOME": str(home)}).returncode == 0
    (file,) = home.glob(".cache/nocloud/bytecode/*")
    return file


def poison(file: Path) -> None:
    """What somebody who can write there would put: right in every respect but the code."""
    stamp = bytes.fromhex(file.name.rpartition("-")[2])
    body = marshal.dumps(compile("def main(): print('evil'); return 0", "evil", "exec"))
    file.write_bytes(source_hash(stamp + body) + body)


def test_cache_is_private_and_used(pyz: Path, home: Path, cached: Path) -> None:
    assert [stat.S_IMODE(path.stat().st_mode) for path in (cached.parent, cached)] == [0o700, 0o600]
    poison(cached)  # which shows that it's read at all, and that the tests below would notice
    assert run(sys.executable, pyz, "--version", env={"HOME": str(home)}).stdout == "evil\n"


def test_cache_follows_xdg(pyz: Path, version: str, home: Path, tmp_path: Path) -> None:
    env = {"HOME": str(home), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert run(pyz, "--version", env=env).stdout == version
    assert list(tmp_path.glob("cache/nocloud/bytecode/*")) and not list(home.iterdir())
    assert run(pyz, "--version", env={**env, "XDG_CACHE_HOME": "relative"}, cwd=tmp_path).stdout == version
    assert not (tmp_path / "relative").exists() and list(home.glob(".cache/nocloud/bytecode/*"))


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def take_from_another_version(file: Path) -> None:
    poison(file)
    data = file.read_bytes()
    file.write_bytes(source_hash(b"another!" + data[8:]) + data[8:])


def be_writable_by_others(file: Path) -> None:
    poison(file)
    file.chmod(0o666)


def be_in_a_public_folder(file: Path) -> None:
    poison(file)
    file.parent.chmod(0o777)


def be_in_a_linked_folder(file: Path) -> None:
    poison(file)
    target = file.parent.with_name("elsewhere")
    file.parent.rename(target)
    file.parent.symlink_to(target)


def be_a_link(file: Path) -> None:
    poison(file)
    target = file.parent.parent / "elsewhere"
    file.rename(target)
    file.symlink_to(target)


def be_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o600)


def be_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir(0o700)


def belong_to_another(file: Path) -> None:
    poison(file)
    os.chown(file, NOBODY, NOBODY)


def be_in_another_ones_folder(file: Path) -> None:
    poison(file)
    os.chown(file.parent, NOBODY, NOBODY)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(os.urandom(9999)),
        truncate,
        flip_a_bit,
        take_from_another_version,
        be_writable_by_others,
        be_in_a_public_folder,
        be_in_a_linked_folder,
        be_a_link,
        be_a_pipe,
        be_a_folder,
        pytest.param(belong_to_another, marks=needs_root),
        pytest.param(be_in_another_ones_folder, marks=needs_root),
    ],
)
def test_spoilt_cache(pyz: Path, version: str, home: Path, cached: Path, spoil: Callable[[Path], object]) -> None:
    spoil(cached)
    for _ in "found", "perhaps mended":
        done = run(sys.executable, pyz, "--version", env={"HOME": str(home)})
        assert (done.returncode, done.stdout, done.stderr) == (0, version, "")


def test_cache_stays_small(pyz: Path, home: Path, cached: Path, tmp_path: Path) -> None:
    download = cached.parent.parent / "debian-12.qcow2"
    download.touch()
    os.utime(download, (0, 0))
    for number in range(30):
        (cached.parent / f"old-{number}").touch()
        os.utime(cached.parent / f"old-{number}", (number, number))
    shutil.copy(pyz, tmp_path / "copy")
    assert run(sys.executable, tmp_path / "copy", "--version", env={"HOME": str(home)}).returncode == 0
    assert download.exists()  # a neighbour that is none of the start's business
    left = os.listdir(cached.parent)
    assert len(left) == 16 and cached.name in left and "old-29" in left and "old-15" not in left


def test_parallel_first_runs(pyz: Path, version: str, home: Path) -> None:
    env = {"PATH": PATH, "HOME": str(home)}
    runs = [subprocess.Popen([pyz, "--version"], env=env, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    assert [process.communicate(timeout=60)[0] for process in runs] == [version] * 6
    assert len(list(home.glob(".cache/nocloud/bytecode/*"))) == 1


# --- the start itself, with a module of the test's own ---

STAND_IN = """\
import os, signal, sys, time, traceback
__version__ = "0"
def main():
    what = sys.argv[1]
    if what == "name":
        data = os.path.join(os.path.dirname(__file__), "etc/data")
        print(os.path.basename(sys.argv[0]), __file__, __loader__.get_data(data))
    elif what == "trace":
        os.chdir("/")
        try:
            raise LookupError("here")
        except LookupError:
            traceback.print_exc()
    elif what == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(9)
    else:
        return int(what)
    return 0
"""


@pytest.fixture(scope="module")
def stand_in(pyz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert pyz.exists()  # so that shiv is there
    tree = tmp_path_factory.mktemp("stand-in") / "tree"
    for name in ("etc", "systemd"):
        (tree / name).mkdir(parents=True)
    for name in ("build.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    (tree / "nocloud.py").write_text(STAND_IN)
    (tree / "etc/data").write_bytes(b"from etc\n\xff")
    build(tree, tree / "nocloud.pyz", PYTHON=builder())
    return tree / "nocloud.pyz"


@pytest.mark.parametrize("status", [0, 1, 2, 7, 124, 127, 130])
def test_statuses_pass_through(stand_in: Path, status: int) -> None:
    assert run(stand_in, status).returncode == status


def test_interrupt_has_no_traceback(stand_in: Path) -> None:
    done = run(stand_in, "interrupt")
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, "")


def test_name_file_and_data(stand_in: Path, tmp_path: Path) -> None:
    (tmp_path / "vmstop").symlink_to(stand_in)
    for _ in "compiled", "from the cache":
        done = run("./vmstop", "name", env={"HOME": str(tmp_path)}, cwd=tmp_path)
        assert done.stdout == f"vmstop {stand_in}/nocloud.py {b'from etc' + bytes([10, 255])!r}\n"


def test_tracebacks_show_the_source(stand_in: Path, tmp_path: Path) -> None:
    """Also from cached bytecode, after a change of folder, and at the place that the archive has now."""
    moved = tmp_path / "moved.pyz"
    shutil.copy(stand_in, moved)
    for _ in "compiled", "from the cache":
        done = run("./moved.pyz", "trace", env={"HOME": str(tmp_path)}, cwd=tmp_path)
        assert f'File "{moved}/nocloud.py", line 11, in main' in done.stderr
        assert 'raise LookupError("here")' in done.stderr
