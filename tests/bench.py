#!/usr/bin/env python3
"""The speed budgets, measured on this machine: `make bench`. Exits 1 over a budget.

Each figure is a ratio to bare commands that are measured in the same run, in turn with ours (A B A B …), so that a
slow or busy machine slows both. Of several runs the median counts. nocloud is called as installed: through a symlink to
the zipapp, by its own #! line. All VMs are real, on an empty disk: they get no further than their firmware.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import hashlib
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VMS = 20
NAMES = [f"web{number:02d}" for number in range(VMS)]
FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux
PYTHON = ["python3", "-IS", "-c", "import argparse, json"]
CONF = """\
vmName={0}
vmMem=512
vmCpu=2
vmDisk=group/default/{0}/{0}_0.img
vmExtraDisk=
vmUuid=00000000-0000-4000-8000-{1:012x}
vmNetwork=private
vmMac=00:50:56:00:{2:02x}:{3:02x}
vmAddress=10.127.{2}.{3}
vmTemplate=empty
vmInit=systemd
"""
IDLE_SECONDS = 30
# Servers for the guests' addresses, on the bridge of the private network: each opens in its turn, and says when.
BANNERS = """
import socket, subprocess, sys, time
for address in sys.argv[1:]:
    subprocess.run(["ip", "addr", "add", address + "/32", "dev", "nocloud"], check=True)
    time.sleep(0.73)
    server = socket.create_server((address, 22))
    print(time.time(), flush=True)
    server.accept()[0].sendall(b"SSH-2.0-bench\\r\\n")
"""
# A server for the address of a guest that isn't up, likewise; it sends as much as it can.
SENDER = """
import socket, subprocess, sys
subprocess.run(["ip", "addr", "add", sys.argv[1] + "/32", "dev", "nocloud"], check=True)
server, piece, size = socket.create_server((sys.argv[1], 80)), bytes(1 << 20), int(sys.argv[2])
print("up", flush=True)
while True:
    with server.accept()[0] as client:
        client.recv(4096)
        client.sendall(b"HTTP/1.0 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % size)
        for _ in range(size >> 20):
            client.sendall(piece)
"""
# A job that waited for its qemu would make the bare commands slower, and ours look better than they are.
BARE = """cd "$1" || exit
qemu-img create -q -f qcow2 -F qcow2 -b ../template.img "$1_0.img" || exit
. ./start >log 2>&1 </dev/null &
"""


class Failed(Exception):
    """A command that is measured didn't work, so there is nothing to measure."""


class Table:
    """The rows, each printed as soon as it is known."""

    def __init__(self) -> None:
        self.over = self.rows = 0
        print(f"{'what':<49} {'it took':>10} {'bare':>10} {'ratio':>7} {'budget':>7}", flush=True)

    def row(self, what: str, took: str, bare: str, value: float, budget: float, unit: str = "×") -> None:
        verdict = "ok" if value <= budget else "OVER"
        self.rows += 1
        self.over += verdict != "ok"
        figures = f"{value:>6.{0 if unit != '×' else 2}f}{unit} {budget:>6g}{unit}"
        print(f"{what:<49} {took:>10} {bare:>10} {figures} {verdict}", flush=True)

    def pairs(self, what: str, pairs: Sequence[tuple[float, float]], budget: float) -> None:
        """Times of ours and of the bare command, taken in turn: the median of the ratios, pair by pair."""
        ours, bare = (statistics.median(column) for column in zip(*pairs))
        ratio = statistics.median(a / b for a, b in pairs)
        self.row(what, milliseconds(ours), milliseconds(bare), ratio, budget)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def timed(argv: Sequence[object], env: dict[str, str], cwd: Path | None = None) -> float:
    """How long a command takes. What it says goes to a file, not a pipe: what it leaves running may hold that open."""
    words = [str(word) for word in argv]
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        child = subprocess.Popen(words, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            status = child.wait(120)
        except BaseException as error:
            child.terminate()
            child.wait(10)
            if isinstance(error, subprocess.TimeoutExpired):
                raise Failed(f"{shlex.join(words)}: not done after 120 s") from None
            raise
        took = time.perf_counter() - start
        said.seek(0)
        if status:
            raise Failed(f"{shlex.join(words)}: exit status {status}\n{said.read().decode(errors='replace')}")
    return took


def in_turn(one: Callable[[], float], other: Callable[[], float], runs: int) -> list[tuple[float, float]]:
    """(one, other) again and again, after a first time of each that doesn't count."""
    one(), other()
    return [(one(), other()) for _ in range(runs)]


def lock_holder(path: Path) -> int:
    """The process that holds the write lock of a pidfile, as a running qemu does; else 0."""
    try:
        with path.open("rb") as file:
            asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, _, _, pid = struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    except FileNotFoundError:
        return 0
    return int(pid) if kind != fcntl.F_UNLCK else 0


def wait_until(done: Callable[[], bool], seconds: float, what: str, interval: float = 0.002) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise Failed(f"{what}: not within {seconds:.0f} s")
        time.sleep(interval)


def cpu_seconds(pids: Sequence[int]) -> float:
    """The CPU time that processes have used: fields 14 and 15 of /proc/PID/stat, counted after the name."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Bench:
    """A home, a folder of vm* links and VM trees of its own, all in one temporary folder."""

    def __init__(self, folder: Path, program: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.tree, self.empty, self.thousand, self.bare = (folder / name for name in ("vms", "none", "1000", "bare"))
        for place in (self.bin, self.empty, self.thousand, self.bare):
            place.mkdir()
        # The Python that runs this, also where `python3` is a wrapper that looks for one in the caller's home.
        path = f"{self.bin}:{Path(sys.executable).resolve().parent}:/usr/sbin:/usr/bin:/sbin:/bin"
        self.env = {"PATH": path, "HOME": str(folder), "LC_ALL": "C.UTF-8"}
        self.call(self.tree, program, "links", self.bin)
        disk = folder / "empty.qcow2"
        timed(["qemu-img", "create", "-q", "-f", "qcow2", disk, "1T"], self.env)
        # systemd: the kind that has most to prepare, a host key and credentials.
        words = ("--image", disk, "--mem", 64, "--cpu", 1, "--init")
        self.call(self.tree, "vmtemplate", "empty", *words, "systemd")
        self.call(self.tree, "vmtemplate", "plain", *words, "none")

    def call(self, tree: Path, *words: object) -> float:
        return timed(words, {**self.env, "NOCLOUD_vmBaseDir": str(tree)}, self.folder)

    def list_time(self, tree: Path) -> float:
        return self.call(tree, "vminventory", "--list")

    def make(self, group: str, count: int) -> float:
        return self.call(self.tree, "vminstantiate", "-n", "empty", "-C", count, "-g", group, "-o", "name=web")

    def stop(self, group: str) -> float:
        return self.call(self.tree, "vmstop", "-d", "-g", group)

    def pid_files(self, group: str) -> list[Path]:
        return sorted((self.tree / group).glob("*/*/*.pid"))

    def stop_everything(self) -> None:
        """On the way out, whatever happened."""
        for pid in filter(None, map(lock_holder, self.bare.glob("*/*.pid"))):
            os.kill(pid, signal.SIGKILL)
        for group in self.tree.glob("[a-z]*"):
            if group.name != "templates":
                self.stop(group.name)
        self.call(self.tree, "nocloud", "net", "down")

    # the bare commands

    def prepare_bare(self) -> None:
        """What `web00.command` of a running VM starts, twenty times; own folders, names and UUIDs, else equal."""
        shutil.rmtree(self.bare)
        self.bare.mkdir()
        source = next((self.tree / "many").glob("*/web00"))
        (self.bare / "template.img").symlink_to(next((self.tree / "templates/empty").glob("empty_0.*")))
        for number, name in enumerate(NAMES):
            folder = self.bare / name
            folder.mkdir()
            if (source / "credentials").exists():
                shutil.copy(source / "credentials", folder)
            (folder / "start").write_text(shlex.join(bare_argv(source / "web00.command", name, number)) + "\n")

    def start_bare(self) -> float:
        """The bare commands, until each qemu runs: it greets at its QMP socket, as the one that nocloud waits for; in
        namespaces, where they may open taps."""
        jobs = f"printf '%s\\n' {' '.join(NAMES)} | xargs -P{os.cpu_count()} -I@ sh -c {shlex.quote(BARE)} sh @"
        start = time.perf_counter()
        timed(["unshare", "-Urn", "sh", "-c", jobs], self.env, self.bare)
        files = [self.bare / name / f"{name}.pid" for name in NAMES]
        wait_until(lambda: all(map(lock_holder, files)), 60, "the bare commands")
        wait_until(lambda: all(greets(file.parent) for file in files), 60, "the bare commands' qemus")
        took = time.perf_counter() - start
        for pid in map(lock_holder, files):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(map(lock_holder, files)), 10, "the end of the bare commands")
        return took


def greets(folder: Path) -> bool:
    """Whether the qemu of a VM's folder runs: it greets whoever connects to its QMP socket, once."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(folder / "qmp.sock"))
            return bool(connection.recv(1))
    except OSError:
        return False  # it has made its pidfile before that


def bare_argv(command: Path, name: str, number: int) -> list[str]:
    """qemu's words of a .command file, for another VM. Its tap comes from nocloud: this one opens its own."""
    words = shlex.split(command.read_text().replace("\\\n", " "), comments=True)
    first = next(at for at, word in enumerate(words) if re.search(r"/qemu-(system-\w+|kvm)$", word))
    words = [word.replace("web00", name) for word in words[first:]]
    words[words.index("-uuid") + 1] = f"00000000-0000-4000-8000-{number:012x}"
    mac, tap = f"00:50:56:00:00:{number:02x}", ",script=no,downscript=no"
    own = {r"(?<=mac=)[0-9a-fA-F:]+": mac, r"(?<=^tap,id=net0).*": tap}
    for pattern, new in own.items():
        words = [re.sub(pattern, new, word) for word in words]
    return words


# --- the rows ---


def start_up(bench: Bench, table: Table, runs: int) -> None:
    pairs = in_turn(lambda: bench.list_time(bench.empty), lambda: timed(PYTHON, bench.env), runs)
    table.pairs("vminventory --list, no VM; bare: python3 -IS", pairs, 2.0)


def clones(bench: Bench, table: Table, rounds: int) -> None:
    """Making and destroying. The private network is not up at first; another time it is."""
    cold, warm, stops, singles = [], [], [], []
    for _ in range(rounds):
        took = bench.make("many", VMS)
        check_running(bench, "many")
        bench.prepare_bare()
        stops.append(bench.stop("many"))
        bare = bench.start_bare()
        cold.append((took, bare))
        bench.make("one", 1)
        took = bench.make("many", VMS)
        stops.append(bench.stop("many"))
        singles.append(bench.stop("one"))
        warm.append((took, bare))
    table.pairs(f"vminstantiate -C {VMS}; bare: qemu-img, qemu, xargs", cold, 1.5)
    table.pairs("  the same, the private network being up", warm, 1.5)
    allowed = 1 + 1.5 * max(singles)
    took = statistics.median(stops)
    table.row(
        f"vmstop -d of {VMS}; bare: 1 s + 1.5 × one", milliseconds(took), milliseconds(allowed), took / allowed, 1.0
    )


def check_running(bench: Bench, group: str) -> None:
    running = sum(map(bool, map(lock_holder, bench.pid_files(group))))
    if running != VMS:
        raise Failed(f"vminstantiate came back, and {running} of {VMS} VMs run")


def twenty(bench: Bench, table: Table, runs: int) -> None:
    bench.make("many", VMS)
    sizes = [folder_size(path.parent) for path in bench.pid_files("many")]
    table.row("a clone's folder, of a 1 TB template", f"{max(sizes) // 1024} KB", "", max(sizes) / 1024, 256, " KB")
    settle([lock_holder(path) for path in bench.pid_files("many")])
    pairs = in_turn(lambda: bench.list_time(bench.tree), lambda: bench.list_time(bench.empty), runs)
    table.pairs(f"vminventory --list, {VMS} VMs run; bare: no VM", pairs, 1.3)
    resident = keepers_memory(bench)
    table.row("what bounds a VM's console: resident", f"{resident / 1024:.1f} MB", "", resident / 1024, 2, " MB")
    idle(bench, table)
    bench.stop("many")


def keepers_memory(bench: Bench) -> float:
    """The KB that run beside each qemu, the pages that all of them share divided among them (proc(5), Pss)."""
    total = count = 0
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if (place / "comm").read_text() in ("sh\n", "flock\n") and bench.tree in (place / "cwd").readlink().parents:
                total += int((place / "smaps_rollup").read_text().partition("\nPss:")[2].split()[0])
                count += (place / "comm").read_text() == "sh\n"
        except OSError:
            continue  # it has ended
    if count != VMS:
        raise Failed(f"{count} of {VMS} VMs have a bound on their console")
    return total / count


class Supervisor:
    """A vmrun in the foreground, its log in a file; in the end it goes, and its VMs stay."""

    def __init__(self, bench: Bench, *words: object, wait: int) -> None:
        self.log = bench.folder / "vmrun.log"
        env = {**bench.env, "NOCLOUD_vmBaseDir": str(bench.tree), "NOCLOUD_vmWaitTimeout": str(wait)}
        with self.log.open("w") as out:
            argv = ["vmrun", *map(str, words)]
            self.child = subprocess.Popen(
                argv, env=env, cwd=bench.folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def said(self, words: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if words in line]

    def status(self, key: str) -> int:
        """A number of /proc/PID/status."""
        found = re.search(rf"^{key}:\s+(\d+)", Path(f"/proc/{self.child.pid}/status").read_text(), re.M)
        if not found:
            raise Failed(f"vmrun: no {key} in its status")
        return int(found.group(1))

    def cpu_milliseconds(self) -> float:
        """proc(5), schedstat: nanoseconds on a processor. It has one thread then."""
        return int(Path(f"/proc/{self.child.pid}/schedstat").read_text().split()[0]) / 1e6

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.child.send_signal(signal.SIGHUP)
        try:
            self.child.wait(30)
        finally:
            self.child.kill()


def idle(bench: Bench, table: Table) -> None:
    """What vmrun costs while nothing happens: it has taken over VMs that run, and has given up waiting for them."""
    with Supervisor(bench, "-r", "many", wait=1) as vmrun:
        wait_until(lambda: len(vmrun.said("is not ready")) == VMS, 60, "the end of vmrun's waits", 0.1)
        wait_until(lambda: vmrun.status("Threads") == 1, 30, "the end of vmrun's threads", 0.1)
        cpu, wakeups = vmrun.cpu_milliseconds(), vmrun.status("voluntary_ctxt_switches")
        time.sleep(IDLE_SECONDS)
        cpu, wakeups = vmrun.cpu_milliseconds() - cpu, vmrun.status("voluntary_ctxt_switches") - wakeups
        resident = vmrun.status("VmRSS") / 1024
    what = f"idle vmrun, {VMS} VMs, {IDLE_SECONDS} s"
    table.row(f"{what}: CPU time", f"{cpu:.0f} ms", "", cpu, 100, " ms")
    table.row(f"{what}: wake-ups", str(wakeups), "", wakeups, IDLE_SECONDS, "")
    table.row(f"{what}: resident", f"{resident:.1f} MB", "", resident, 25, " MB")


def banners(bench: Bench, table: Table) -> None:
    """From the instant that a guest's port 22 opens to vmrun's line. No guest is up: a server stands in for each."""
    (bench.folder / "ssh").write_text("plain:5:default:name=ssh\n")
    with Supervisor(bench, "-f", "ssh", wait=120) as vmrun:
        wait_until(lambda: len(vmrun.said("has IP")) == 5, 60, "five VMs", 0.1)
        names, addresses = zip(*((line.split()[2], line.split()[-1]) for line in vmrun.said("has IP")))
        argv = ["nocloud", "net", "exec", sys.executable, "-IS", "-c", BANNERS, *addresses]
        env = {**bench.env, "NOCLOUD_vmBaseDir": str(bench.tree)}
        servers = subprocess.run(argv, env=env, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
        wait_until(lambda: len(vmrun.said("is ready")) == 5, 30, "five that are ready", 0.1)
        opened = dict(zip(names, map(float, servers.stdout.split())))
        late = [log_time(line) - opened[line.split()[2]] for line in vmrun.said("is ready")]
    bench.stop("ssh")
    table.row("from ssh banner to vmrun saying so", milliseconds(max(late)), "", 1000 * max(late), 300, " ms")


def port(bench: Bench, table: Table, runs: int) -> None:
    """1 GB through a published port, against the same inside the network. A server stands in for the guest."""
    env = {**bench.env, "NOCLOUD_vmBaseDir": str(bench.tree)}
    bench.call(bench.tree, "vminstantiate", "-n", "plain", "-g", "port", "-o", "name=web;port=0:80")
    conf = (bench.tree / "port/default/web00/web00.conf").read_text()
    address, number = (re.findall(rf"^{key}=(.*)", conf, re.M)[0] for key in ("vmAddress", "vmPorts"))
    argv = ["nocloud", "net", "exec", sys.executable, "-IS", "-c", SENDER, address, str(1 << 30)]
    server = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True)
    try:
        if not server.stdout or server.stdout.readline() != "up\n":
            raise Failed("the server in the network didn't start")
        inmate = (bench.tree / ".net/dnsmasq.pid").read_text().strip()  # the holder itself is outside
        curl = ["curl", "-sSf", "-o", "/dev/null"]
        inside = ["nsenter", "-t", inmate, "-U", "-n", "--preserve-credentials", *curl, f"http://{address}/"]
        outside = [*curl, f"http://127.0.0.1:{number.split(':')[1]}/"]
        pairs = in_turn(lambda: timed(outside, env), lambda: timed(inside, env), runs)
    finally:
        server.kill()
        server.wait()
    bench.stop("port")
    table.pairs("1 GB through a published port; by nsenter", pairs, 2)


def log_time(line: str) -> float:
    """The time at the beginning of a line of vmrun's log."""
    day, clock, *_ = line.split()
    whole, _, fraction = clock.partition(".")
    return time.mktime(time.strptime(f"{day} {whole}", "%Y/%m/%d %H:%M:%S")) + float(f"0.{fraction}")


def folder_size(folder: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in [folder, *folder.iterdir()])


def settle(pids: Sequence[int]) -> None:
    """Wait until the guests have given up looking for a system to boot, so that they don't take our processors."""

    def quiet() -> bool:
        before = cpu_seconds(pids)
        time.sleep(1)
        return cpu_seconds(pids) - before < 0.2

    wait_until(quiet, 60, "quiet guests")


def thousand(bench: Bench, table: Table, runs: int) -> None:
    for number in range(1000):
        name = f"vm{number:03d}"
        folder = bench.thousand / f"group{number % 10}" / "default" / name
        folder.mkdir(parents=True)
        (folder / f"{name}.conf").write_text(CONF.format(name, number, number // 250, number % 250 + 2))
        (folder / f"{name}.pid").write_text("1\n")
        (folder / "qmp.sock").touch()  # by which a running VM of nocloud's own is known
    full, none = (lambda: bench.list_time(bench.thousand)), (lambda: bench.list_time(bench.empty))
    table.pairs("vminventory --list, 1000 VMs; bare: no VM", in_turn(full, none, runs), 5.0)
    with locked(sorted(bench.thousand.glob("*/*/*/*.pid"))):
        table.pairs("  the same, their pidfiles locked as if they ran", in_turn(full, none, runs), 5.0)


def download(bench: Bench, table: Table, runs: int) -> None:
    """A template from a compressed image, to the disk that clones stand on; bare: only its checksum is kept."""
    name, site = "packed", bench.folder / "site"
    pieces = site / f"{name}/{name}.img"
    pieces.mkdir(parents=True)
    (site / f"{name}/compression").write_text("xz")
    (site / f"{name}/{name}.conf").write_text("vmMem=64\n")
    checksum = make_packed(pieces / f"{name}.img.000.xz")
    with served(site) as url:
        catalogue = bench.folder / ".config/nocloud/templates.conf"
        catalogue.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"[{name}]", "kind = classic", f"base = {url}/{name}", "last = 0", f"checksum = sha512:{checksum}"]
        catalogue.write_text("\n".join(lines) + "\n")
        pipe = f"curl -s {url}/{name}/{name}.img/{name}.img.000.xz | xz -d | sha512sum"

        def ours() -> float:
            took = bench.call(bench.empty, "vmtemplate", name)
            bench.call(bench.empty, "vmtemplate", "--delete", name)
            shutil.rmtree(bench.folder / ".cache/nocloud/images")
            return took

        pairs = in_turn(ours, lambda: timed(["sh", "-c", pipe], bench.env), runs)
    table.pairs("vmtemplate, xz; bare: curl | xz -d | sha512sum", pairs, 2.0)


def make_packed(target: Path, size: int = 128 << 20) -> str:
    """A disk of programs and libraries, and as much again of zeros, compressed; the checksum of the disk."""
    disk = target.with_suffix("")
    with disk.open("wb") as file:
        file.write(bytes(510) + b"\x55\xaa")
        for path in sorted(Path("/usr").rglob("*")):
            if file.tell() >= size:
                break
            if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK):
                file.write(path.read_bytes()[:size])
        file.truncate(2 * size)
    checksum = hashlib.sha512(disk.read_bytes()).hexdigest()
    timed(["xz", "-1", "-T0", disk], dict(os.environ))
    return checksum


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """A web server on 127.0.0.1; its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def locked(files: Sequence[Path]) -> Iterator[None]:
    """A process that locks pidfiles as that many qemus would."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    mine, its = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            held = [path.open("r+b") for path in files]
            for file in held:
                fcntl.lockf(file, fcntl.LOCK_EX)
            os.write(its, b"+")
            signal.pause()
        finally:
            os._exit(1)
    os.close(its)
    try:
        if os.read(mine, 1) != b"+":
            raise Failed(f"{len(files)} files can't be locked at once")
        yield
    finally:
        os.close(mine)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def measure(program: Path, runs: int, rounds: int) -> Table:
    """All rows, in a folder that is gone afterwards, with all that was started in it."""
    with tempfile.TemporaryDirectory(prefix="nocloud-bench-") as folder:
        table = Table()
        bench = Bench(Path(folder), program)
        try:
            start_up(bench, table, runs)
            thousand(bench, table, runs)
            twenty(bench, table, runs)
            banners(bench, table)
            port(bench, table, rounds)
            clones(bench, table, rounds)
            download(bench, table, rounds)
        finally:
            bench.stop_everything()
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description="measure nocloud's speed budgets")
    parser.add_argument("program", nargs="?", type=Path, default=ROOT / "nocloud.pyz", help="the zipapp [%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help=f"how often {VMS} VMs are made [%(default)s]")
    parser.add_argument("--runs", type=int, default=21, help="how often the quick commands run [%(default)s]")
    args = parser.parse_args()
    return run(lambda: measure(args.program.resolve(), args.runs, args.rounds))


def run(measured: Callable[[], Table]) -> int:
    """Measure, and sum it up; the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        table = measured()
    except Failed as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130
    print(f"{table.over} of {table.rows} over budget" if table.over else f"all {table.rows} within budget")
    return 1 if table.over else 0


if __name__ == "__main__":
    sys.exit(main())
