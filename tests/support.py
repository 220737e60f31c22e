"""What the tests share: a cloud of their own in a temporary home, and ways to look at the machine from outside."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import tinyguest

if TYPE_CHECKING:
    from typing_extensions import Self

    import nocloud

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "nocloud.py"
LAUNCHER = ROOT / "tests/launch.py"
DATA = Path(__file__).resolve().parent / "data"
NOBODY = 65534

# What a guest of 128 MB needs under emulation on a busy machine is 5 s; ten times that is no guest at all.
READY = "90"


class Result:
    """How a command ended: status, stdout, stderr."""

    def __init__(self, argv: list[str], status: int, stdout: str, stderr: str, seconds: float = 0) -> None:
        self.argv, self.status, self.stdout, self.stderr, self.seconds = argv, status, stdout, stderr, seconds

    def __repr__(self) -> str:
        return f"{shlex.join(self.argv)}\n-> {self.status}\n-- stdout\n{self.stdout}\n-- stderr\n{self.stderr}"

    @property
    def lines(self) -> list[str]:
        return self.stdout.splitlines()

    def ok(self) -> Result:
        assert self.status == 0, repr(self)
        return self

    def quiet(self) -> Result:
        """Done, and nothing said, but that a guest on a busy machine takes its time."""
        assert (self.status, self.stdout, without_waits(self.stderr)) == (0, "", ""), repr(self)
        return self

    def fails(self, status: int, *words: str) -> Result:
        """Ended with this status and one line that holds these words, and at most a hint; no traceback, no data."""
        assert self.status == status, repr(self)
        told = [line for line in without_waits(self.stderr).splitlines() if ": warning: " not in line]
        assert 1 <= len(told) <= 2, repr(self)
        assert re.match(r"(nocloud( [a-z-]+)?|vm[a-z]*): \S", told[0]), repr(self)
        assert len(told) == 1 or re.fullmatch(r"\(hint: .+\)", told[1]), repr(self)
        for word in words:
            assert word in self.stderr, f"no {word!r} in: {self!r}"
        assert "Traceback" not in self.stderr and "a defect in nocloud" not in self.stderr, repr(self)
        return self

    def says(self, status: int, text: str, hint: str = "") -> Result:
        """Ended with this status and, but for warnings, these very words: the whole line, and the whole hint."""
        self.fails(status)
        told = [line for line in without_waits(self.stderr).splitlines() if ": warning: " not in line]
        assert [told[0].partition(": ")[2], *told[1:]] == [text, *([f"(hint: {hint})"] if hint else [])], repr(self)
        return self


def without_waits(stderr: str) -> str:
    """What was said, but for how far guests are that are waited for."""
    return re.sub(r"(?m)^[a-z -]+: (waiting for \S+(: | to shut down, for up to ).*|\S+ is ready)\n", "", stderr)


# The homes of the clouds that are in use: what runs in them is no leftover.
open_homes: set[str] = set()


class Cloud:
    """A nocloud with a home, a configuration and a VM tree of its own; what it leaves behind is found and told."""

    def __init__(self, home: Path, base: Path | None = None) -> None:
        self.home, self.base = home, base or home / "vms"
        self.temporary = home / "tmp"
        for folder in (home, self.temporary):
            folder.mkdir(parents=True, exist_ok=True)
        # Found first, so that what is in the machine's /etc/nocloud.conf doesn't count.
        (home / ".nocloud.conf").touch(0o600)
        self.env = clean_environment() | {
            "HOME": str(home),
            "XDG_CONFIG_HOME": str(home / "config"),
            "XDG_DATA_HOME": str(home / "data"),
            "XDG_CACHE_HOME": str(home / "cache"),
            "XDG_RUNTIME_DIR": str(home / "run"),
            "TMPDIR": str(self.temporary),
            "NOCLOUD_NOKVM": "1",
            "NOCLOUD_vmBaseDir": str(self.base),
            "NOCLOUD_vmNetwork": "private",
        }
        self._children: list[subprocess.Popen[str]] = []

    # calling it

    def argv(self, name: str, *words: object) -> list[str]:
        """`vmX` or a subcommand, as a real call of the module."""
        sub = name[2:] if name.startswith("vm") and name != "vm" else name
        return [sys.executable, "-IS", str(LAUNCHER), *([sub] if sub else []), *map(str, words)]

    def run(
        self,
        name: str,
        *words: object,
        input: str | None = None,
        timeout: float = 150,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Result:
        return self.execute(self.argv(name, *words), input=input, timeout=timeout, env=env, cwd=cwd)

    def execute(
        self,
        argv: Iterable[object],
        input: str | None = None,
        timeout: float = 150,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Result:
        """Any program, in this cloud's environment."""
        words = [str(word) for word in argv]
        started = time.monotonic()
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL if input is None else None,
            input=input,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=self.env | (env or {}),
            cwd=cwd or self.home,
            check=False,
        )
        return Result(words, done.returncode, done.stdout, done.stderr, time.monotonic() - started)

    def spawn(self, name: str, *words: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a command and go on; it is killed, at the latest, when the cloud is closed."""
        child = subprocess.Popen(
            self.argv(name, *words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=self.env | (env or {}),
            cwd=self.home,
            start_new_session=True,
        )
        self._children.append(child)
        return child

    def script(self, code: str, *words: object) -> Result:
        """Python code that has the module as `nocloud`: for what no command of today does."""
        return self.execute(self.script_argv(code, *words))

    def script_argv(self, code: str, *words: object) -> list[str]:
        before = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import nocloud\n"
        return [sys.executable, "-IS", "-c", before + code, *map(str, words)]

    def start(self, *names: str) -> Result:
        """Start stopped VMs again and do no more, which vmstart does."""
        return self.script(
            "try:\n"
            "    with nocloud.Cloud(nocloud.load_config()) as cloud:\n"
            "        results = nocloud.start_all(cloud, [cloud.tree.need(name) for name in sys.argv[1:]])\n"
            "        sys.exit(nocloud.report_errors([error for error in results if error]))\n"
            "except nocloud.Error as error:\n"
            "    sys.exit(nocloud.report_errors([error]))\n",
            *names,
        )

    # what is there

    def folder(self, vm: str) -> Path:
        """The folder of GROUP/TYPE/NAME."""
        return self.base / vm

    def conf(self, vm: str) -> dict[str, str]:
        """A VM's conf, as bash reads it."""
        folder = self.folder(vm)
        return bash_values(folder / f"{folder.name}.conf")

    def ssh(self, vm: str, *words: str, timeout: float = 120) -> Result:
        return self.run("vmssh", vm, *words, timeout=timeout)

    def qemu(self, vm: str) -> int:
        """The pid that a running VM's pidfile names."""
        folder = self.folder(vm)
        return int((folder / f"{folder.name}.pid").read_text())

    def files(self) -> set[str]:
        """What is in the tree now, without the network's state."""
        return {str(path.relative_to(self.base)) for path in self.base.rglob("*") if ".net" not in path.parts}

    def processes(self) -> dict[int, str]:
        """Everything alive that was started in this cloud: its home is in their environment, or in their words."""
        return processes_with(str(self.home))

    def groups(self) -> list[str]:
        if not self.base.is_dir():
            return []
        return [
            path.name
            for path in self.base.iterdir()
            if path.is_dir() and path.name[0] != "." and path.name != "templates"
        ]

    # the end

    def close(self) -> list[str]:
        """Stop everything with nocloud's own commands; what those leave behind is killed, and told."""
        for child in self._children:
            end_child(child)
        told = []
        if self.base.is_dir() and os.access(self.base, os.W_OK):
            for group in self.groups():
                done = self.run("vmstop", "-d", "-g", group)
                if done.status:
                    told.append(f"vmstop -d -g {group}: {done!r}")
            if any(self.base.glob("templates/*/*.pid")):  # each command costs a tenth of a second, in each test
                self.run("vmstop", "-g", "templates", "--kill")
            if (self.base / ".net").exists():
                self.run("net", "--private", "down")
        if not until(lambda: not self.processes(), 10):
            left = self.processes()
            told += [f"process {pid} is left: {words}" for pid, words in left.items()]
            kill_all(left)
        told += [f"file is left: {path}" for path in self.temporary.iterdir()]
        return told

    def __enter__(self) -> Self:
        open_homes.add(str(self.home))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            told = self.close()
        finally:
            open_homes.discard(str(self.home))
        if error is None:
            assert not told, "\n".join(told)


class Terminal:
    """A command in a terminal of its own, as a user sits before it."""

    def __init__(
        self, cloud: Cloud, name: str, *words: object, env: dict[str, str] | None = None, argv: list[str] | None = None
    ) -> None:
        """A command of nocloud, or any program: `argv`."""
        self.master, self.slave = pty.openpty()
        self.modes = termios.tcgetattr(self.slave)
        self.shown = ""
        self.process = subprocess.Popen(
            argv or cloud.argv(name, *words),
            stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=True, cwd=cloud.home,
            env=cloud.env | {"TERM": "xterm"} | (env or {}),
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 (no threads here)
        )  # fmt: skip

    def see(self, text: str, seconds: float = 30) -> str:
        """What was shown up to `text`, which must come."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline, f"no {text!r} in {self.shown!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                self.shown += os.read(self.master, 65536).decode(errors="replace")
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def raw(self) -> None:
        """Wait until the terminal is in raw mode."""
        eventually(lambda: not termios.tcgetattr(self.slave)[3] & termios.ICANON, "raw mode")

    def restored(self) -> bool:
        return termios.tcgetattr(self.slave) == self.modes

    def ends(self, status: int) -> None:
        """The command ended with this status, and the terminal is as it was."""
        deadline = time.monotonic() + 30
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self.master], [], [], 0.05)[0]:
                self.shown += os.read(self.master, 65536).decode(errors="replace")
        assert self.process.poll() == status, repr(self.shown)
        assert self.restored()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def clean_environment() -> dict[str, str]:
    """The caller's environment, without what would steer nocloud, ssh or Python."""
    doomed = ("NOCLOUD_", "XDG_", "SHIV_", "SSH_", "PYTHON", "ANSIBLE_", "PYTEST_", "LC_", "DISPLAY", "WAYLAND_")
    return {key: value for key, value in os.environ.items() if not key.startswith(doomed)}


def until(ready: Callable[[], object], seconds: float, interval: float = 0.05) -> bool:
    """Ask until it is so, or the time is over; whether it was."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval)
    return True


def eventually(ready: Callable[[], object], what: str, seconds: float = 30) -> None:
    assert until(ready, seconds), f"not within {seconds} s: {what}"


# Processes ###########################################################################################


def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def proc_words(pid: int, name: str) -> list[str]:
    """/proc/PID/cmdline or environ; empty where it can't be read."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace").split("\0")
    except OSError:
        return []


def is_alive(pid: int) -> bool:
    """Whether it runs; a zombie that nobody has waited for is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def processes_with(marker: str) -> dict[int, str]:
    """The processes that have `marker` as a folder in their environment or words."""
    found = {}
    for pid in set(pids()) - ancestors():
        words = proc_words(pid, "cmdline")
        if any(marker in word for word in [*words, *proc_words(pid, "environ")]) and is_alive(pid):
            found[pid] = " ".join(words)
    return found


def ancestors() -> set[int]:
    """This process and those it was started by, whose words may name the tests' folders."""
    found = {pid := os.getpid()}
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.add(pid)
    return found


def root_offset(raw: Path) -> int:
    """Where the largest partition of a raw disk begins, in bytes."""
    sfdisk = shutil.which("sfdisk", path="/usr/sbin:/sbin") or "sfdisk"
    shown = subprocess.run([sfdisk, "--json", raw], check=True, capture_output=True).stdout
    root = max(json.loads(shown)["partitiontable"]["partitions"], key=lambda each: int(each["size"]))
    return int(root["start"]) * 512


def kill_all(doomed: Iterable[int]) -> None:
    for pid in doomed:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def end_child(child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        child.kill()
    child.communicate()


def kill_hard(pid: int) -> None:
    """SIGKILL, and wait until it is gone."""
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not is_alive(pid), f"process {pid} is gone", 10)


# The machine #########################################################################################


def open_ports(cloud: Cloud) -> set[str]:
    """The host's ports that the processes of a cloud hold open: TCP that listens, UDP that is bound.

    pasta's UDP sockets don't count: they are the outer ends of what guests send, and let nothing but answers in.
    An ordinary user can't look into pasta at all: it is given what listens as this user and is no other process's.
    """
    listening: dict[str, str] = {}
    bound: dict[str, str] = {}
    mine: set[str] = set()
    for name in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if name.startswith("udp") or fields[3] == "0A":
                (bound if name.startswith("udp") else listening)[f"socket:[{fields[9]}]"] = f"{name} {fields[1]}"
                mine |= {f"socket:[{fields[9]}]"} if int(fields[7]) == os.geteuid() else set()
    found = set()
    for pid, words in cloud.processes().items():
        sockets = sockets_of(pid)
        if sockets is None:
            assert "/pasta " in words, f"can't look into {words}"
            others: set[str] = set().union(*(sockets_of(each) or set() for each in pids()))
            sockets = (mine & set(listening)) - others
        counted = listening if "/pasta " in words else {**listening, **bound}
        found |= {f"{counted[socket]} of {words}" for socket in sockets & set(counted)}
    return found


def sockets_of(pid: int) -> set[str] | None:
    """The sockets that a process holds, as its descriptors name them; None where it may not be looked into."""
    try:
        return {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}
    except FileNotFoundError:
        return set()
    except PermissionError:
        return None


def interfaces() -> set[str]:
    return set(os.listdir("/sys/class/net"))


def tree_at(base: Path) -> nocloud.Tree:
    """The tree in a folder, with all settings at their defaults."""
    import nocloud

    return nocloud.Tree(nocloud.Config({"vmBaseDir": str(base)}))


def bash_values(path: Path) -> dict[str, str]:
    """The assignments of a conf, as the real bash sees them after sourcing it."""
    keys = re.findall(r"^\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=", path.read_text(), re.M)
    code = 'set -e; . "$1"; shift; for key; do printf "%s=%s\\0" "$key" "${!key}"; done'
    done = subprocess.run(["bash", "-c", code, "bash", path, *keys], capture_output=True, check=True)
    words = done.stdout.decode(errors="surrogateescape").split("\0")
    return dict(word.split("=", 1) for word in words if word)


def link_programs(folder: Path, *without: str) -> str:
    """A PATH of one folder that has every program of /usr/bin and /usr/sbin but those that begin so."""
    folder.mkdir()
    for place in ("/usr/bin", "/usr/sbin", "/bin", "/sbin"):
        for name in os.listdir(place):
            if not name.startswith(without) and not (folder / name).is_symlink():
                (folder / name).symlink_to(f"{place}/{name}")
    return str(folder)


def replace_program(folder: Path, name: str, script: str) -> str:
    """A PATH on which a program is another one: a sh script; `$REAL` is what it stands for."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\nREAL={shlex.quote(shutil.which(name) or name)}\n{script}\n")
    path.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


# The tiny guest ######################################################################################


def add_template(cloud: Cloud, image: Path, name: str = "tiny", *words: object) -> None:
    """A template for 96 MB and one processor."""
    settings = words or ("--mem", 96, "--cpu", 1, "--init", "systemd")
    cloud.run("vmtemplate", name, "--image", image, *settings).ok()


def keyed_image(cloud: Cloud, cache: Path) -> Path:
    """The disk of a tiny guest that takes nothing from nocloud and knows one key, which becomes the user's own."""
    key = cache / "id_ed25519"
    if not key.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "tests", "-f", key], check=True)
    (cloud.home / ".ssh").mkdir(0o700, exist_ok=True)
    for suffix in ("", ".pub"):
        target = cloud.home / f".ssh/id_ed25519{suffix}"
        target.write_text(key.with_suffix(suffix).read_text())
        target.chmod(0o600)
    return tinyguest.build(cache, key.with_suffix(".pub").read_text(), reads="")


def add_blank(cloud: Cloud, name: str = "blank") -> Path:
    """A template without a system: its clones run, wait for nothing and take no time. Its disk's path."""
    image = cloud.home / f"{name}.qcow2"
    cloud.execute(["qemu-img", "create", "-q", "-f", "qcow2", image, "8M"]).ok()
    add_template(cloud, image, name, "--mem", 32, "--cpu", 1, "--init", "none")
    return cloud.base / "templates" / name / f"{name}_0.img"


@contextlib.contextmanager
def nothing_made(cloud: Cloud) -> Iterator[None]:
    """What is done meanwhile changes nothing in the tree and leaves nothing running."""
    files, running = cloud.files(), cloud.processes()
    yield
    assert cloud.files() == files
    assert set(cloud.processes()) <= set(running)
