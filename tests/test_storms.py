"""Hostile days, on purpose: SIGKILL at any instant, full disks, few descriptors, crowds, clocks, stopped helpers.

Each storm prints its seed (SEED=N repeats it) and counts what it tried; `make test-all` shows the table at its end.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
from support import READY, Cloud, Result, add_blank, bash_values, kill_hard, proc_words, until

pytestmark = pytest.mark.long

Survived = Callable[[str, int], None]

CLONES = "vminstantiate -n blank -g pf -t web -C 3 -o name=web"
OFF = "vmstop -g pf --kill"
MORE = "vmtemplate more --image blank.qcow2 --mem 32 --init none"

# What is killed, and the commands before it.
KILLED = {
    CLONES: [],
    "vmstop -d -g pf": [CLONES],
    OFF: [CLONES],
    "vmrun -f pf": [],
    "vmrun -r pf": [CLONES, OFF],
    MORE: [],
    "vmtemplate more --from pf/web/web00": [CLONES, OFF],
    "vmtemplate --delete more": [MORE],
    "vmcreate -a -n pf/web/web00 -m 48 -d 1": [CLONES, OFF],
    "net --private up": [],
}


@pytest.fixture
def random() -> Random:
    seed = int(os.environ.get("SEED") or time.time_ns() % 10**9)
    print(f"SEED={seed}")
    return Random(seed)


@pytest.fixture
def storm(cloud: Cloud, vms: None) -> Cloud:
    """A cloud with the template `blank` and the description file `pf` of three clones."""
    add_blank(cloud)
    (cloud.home / "pf").write_text("blank:3:web:name=web\n")
    return cloud


def call(cloud: Cloud, line: str, timeout: float = 150) -> Result:
    name, *words = line.split()
    return cloud.run(name, *words, timeout=timeout)


def sound(done: Result) -> Result:
    """It did its work, but for guests that never get ready (124), or said in its own words why not."""
    assert done.status in (0, 124) or (done.status > 0 and done.stderr), repr(done)
    assert "Traceback" not in done.stderr and "a defect in nocloud" not in done.stderr, repr(done)
    return done


def consistent(cloud: Cloud) -> list[list[str]]:
    """Every list works, every conf is whole; the rows of `vmrunning -a`."""
    rows = [line.split() for line in cloud.run("vmrunning", "-a").ok().lines]
    assert all(row[2] in ("running", "stopped") for row in rows if row[1] != "templates"), rows
    cloud.run("vmtemplate", "--list").ok()
    cloud.run("vminventory", "--list").ok()
    for row in rows:
        conf = cloud.base / row[1] / row[0] / f"{row[0]}.conf"
        assert {"vmName", "vmDisk", "vmUuid"} <= set(bash_values(conf)), conf.read_text()
    return rows


def cleared(cloud: Cloud, before: set[str]) -> None:
    """The next commands go on as if nothing had been, and leave nothing."""
    call(cloud, "vminstantiate -n blank -g pf").ok()
    call(cloud, "vmstop -d -g pf").ok()
    if not (cloud.base / "templates/more").exists():
        call(cloud, MORE).ok()
    call(cloud, "vmtemplate --delete more").ok()
    call(cloud, "net --private down").ok()
    assert cloud.files() == before
    assert until(lambda: not cloud.processes(), 10), cloud.processes()


@pytest.mark.parametrize("line", KILLED)
def test_killed_at_any_instant(storm: Cloud, random: Random, survived: Survived, line: str) -> None:
    """Fifty times: whenever SIGKILL hits, the tree is consistent and the next commands clear it up."""
    before, rounds, longest = storm.files(), 50, 0.0
    name, *words = line.split()
    for number in range(rounds):
        for earlier in KILLED[line]:
            call(storm, earlier).ok()
        started = time.monotonic()
        child = storm.spawn(name, *words)
        with suppress(subprocess.TimeoutExpired):  # the first round tells how long it takes
            child.wait(random.uniform(0.05, longest) if number else 3)
        longest = longest or min(time.monotonic() - started, 3)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        consistent(storm)
        cleared(storm, before)
    survived(f"SIGKILL of {shlex.join([name, *words])}", rounds)


# A full disk #########################################################################################


class Apart(Cloud):
    """A cloud whose tree lies on a disk of its own: a tmpfs in a mount namespace that ends with this process."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.base.mkdir()
        script = "mount -t tmpfs -o size=64M tree . && echo ready && exec env -i sleep infinity"
        self.holder = subprocess.Popen(
            ["unshare", "--mount", "--kill-child", "--fork", "sh", "-c", script],
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.base,
            env={"PATH": os.environ["PATH"]},  # without its home: it is none of the cloud's processes
        )
        assert self.holder.stdout and self.holder.stdout.readline() == "ready\n"
        children = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children").read_text().split()
        self.enter = ["nsenter", f"--target={children[0]}", "--mount", f"--wd={home}"]
        self.base = Path(f"/proc/{children[0]}/root{self.base}")  # where this process finds what is in it

    def argv(self, name: str, *words: object) -> list[str]:
        return [*self.enter, *super().argv(name, *words)]

    def script_argv(self, code: str, *words: object) -> list[str]:
        return [*self.enter, *super().script_argv(code, *words)]

    def resize(self, size: int) -> None:
        """Give the disk room for `size` bytes in all."""
        tree = self.env["NOCLOUD_vmBaseDir"]
        self.execute([*self.enter, "mount", "-o", f"remount,size={size}", tree]).ok()

    def used(self) -> int:
        room = os.statvfs(self.base)
        return (room.f_blocks - room.f_bfree) * room.f_frsize

    def close(self) -> list[str]:
        told = super().close()
        self.holder.kill()
        self.holder.communicate()
        return told


@pytest.fixture
def apart(tmp_path: Path, vms: None) -> Iterator[Apart]:
    if os.geteuid() != 0:
        pytest.skip("only root mounts a disk of its own that its namespaces of users can use")
    cloud = Apart(tmp_path / "home")
    with cloud:
        add_blank(cloud)
        (cloud.home / "pf").write_text("blank:3:web:name=web\n")
        yield cloud


FILLED = (
    "vminstantiate -n blank -g pf -t web -C 2 -o name=web",
    MORE,
    "vmtemplate more --from pf/web/web00 --no-clean",
    "vmrun -f pf --background",
)


@pytest.mark.parametrize("line", FILLED)
def test_a_disk_that_is_full_at_any_write(apart: Apart, survived: Survived, line: str) -> None:
    """From no room at all, 8 KB more each time: done, or undone with a word; then, with room, everything goes on."""
    apart.env["NOCLOUD_vmWaitTimeout"] = "1"  # none of these guests gets ready
    before, room, tried, done = apart.files(), 0, 0, False
    while room < 4 << 20:
        if "--from" in line:
            call(apart, "vminstantiate -n blank -g pf -t web -o name=web").ok()
            call(apart, OFF).ok()
        apart.resize(max(apart.used() + room, 4096))
        ended = sound(call(apart, line))
        apart.resize(64 << 20)
        consistent(apart)
        cleared(apart, before)
        tried, room = tried + 1, room + ((64 if "up to here take" in ended.stderr else 8) << 10)
        if done and ended.status in (0, 124):  # twice: it fits
            break
        done = ended.status in (0, 124)
    assert done, "it never had room enough"
    survived(f"a full disk under {line}", tried)


# Crowds, few descriptors, clocks, stopped programs ###################################################


def test_a_crowd_on_one_group(storm: Cloud, random: Random, survived: Survived) -> None:
    """64 commands at once: each does its work or says why not; no name, MAC or address is given twice."""
    before = storm.files()
    lines = ["vminstantiate -n blank -g pf -t web -o name=web"] * 28
    lines += ["vmrunning -a"] * 12 + ["vminventory --list"] * 8 + ["vmstop -g pf --kill"] * 4
    lines += [f"vmstop -d -n pf/web/web{number:02}" for number in range(4)] + ["vmtemplate --list"] * 8
    random.shuffle(lines)
    assert len(lines) == 64
    children = [storm.spawn(*line.split()) for line in lines]
    for line, child in zip(lines, children):
        out, err = child.communicate(timeout=300)
        sound(Result(line.split(), child.returncode, out, err))
    confs = [storm.conf(f"{row[1]}/{row[0]}") for row in consistent(storm) if row[1] != "templates"]
    assert len(confs) >= 20
    for key in ("vmUuid", "vmMac", "vmAddress"):
        assert len({conf[key] for conf in confs}) == len(confs), key
    cleared(storm, before)
    survived("64 commands at once on one group", 1)


def test_few_descriptors(storm: Cloud, survived: Survived) -> None:
    """With any `ulimit -n` from 10 to 64: done, or undone with a word; a VM that runs is never taken for stopped."""
    before = storm.files()
    call(storm, "vminstantiate -n blank -g kept -o name=kept").ok()
    qemu = storm.qemu("kept/default/kept00")
    few = ["sh", "-c", 'ulimit -n "$1"; shift; exec "$@"', "sh"]
    lines = ("vmrunning -a", "vminstantiate -n blank -g pf -t web -o name=web", "vminventory --list", "vmstop -d -g pf")
    for limit in range(10, 65):
        for line in lines:
            name, *words = line.split()
            done = storm.execute([*few, limit, *storm.argv(name, *words)])
            sound(done)
            if line == lines[0] and done.status == 0:
                assert "kept00 kept/default running" in done.stdout, repr(done)
        assert storm.qemu("kept/default/kept00") == qemu
        call(storm, "vmstop -d -g pf").ok()
        consistent(storm)
    call(storm, "vmstop -d -g kept").ok()
    cleared(storm, before)
    survived("commands with 10 to 64 descriptors", 55 * len(lines))


def helpers(cloud: Cloud) -> dict[str, int]:
    """The pids of qemu, dnsmasq and pasta, by program."""
    found: dict[str, int] = {}
    for pid in cloud.processes():
        name = os.path.basename(proc_words(pid, "cmdline")[0])
        found |= {short: pid for short in ("qemu", "dnsmasq", "pasta") if name.startswith(short)}
    return found


@pytest.mark.parametrize("which", ["qemu", "dnsmasq", "pasta"])
def test_a_program_that_is_stopped(storm: Cloud, tiny_image: Path, survived: Survived, which: str) -> None:
    """SIGSTOP: lists and stops end in their time, what can't be done says so; SIGCONT, and everything goes on."""
    if which == "pasta" and not shutil.which("pasta"):
        pytest.skip("no pasta here")
    storm.run("vmtemplate", "tiny", "--image", tiny_image, "--mem", 96, "--cpu", 1, "--init", "systemd").ok()
    call(storm, f"vminstantiate -n tiny -g pf -o name=web -w {READY}").ok()
    pid = helpers(storm)[which]
    os.kill(pid, signal.SIGSTOP)
    try:
        assert storm.run("vmrunning", timeout=15).ok().stdout.startswith("web00 pf/default")
        storm.run("vminventory", "--list", timeout=15).ok()
        storm.run("net", "status", timeout=30)
        sound(call(storm, "vminstantiate -n blank -g other -o name=more", timeout=60))
        if which == "qemu":
            waited = storm.run("vmssh", "web00", "true", env={"NOCLOUD_vmWaitTimeout": "3"}, timeout=30)
            assert waited.status == 124 and "web00: not ready after 3 s" in waited.stderr, repr(waited)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert storm.ssh("web00", "hostname").ok().stdout == "web00\n"
    os.kill(helpers(storm)[which], signal.SIGSTOP)
    call(storm, "vmstop -d -g other", timeout=60)
    call(storm, "vmstop -g pf --timeout 2", timeout=60).ok()
    call(storm, "vmstop -d -g pf", timeout=60).ok()
    call(storm, "net --private down", timeout=60).ok()
    assert until(lambda: not storm.processes(), 10), storm.processes()
    survived(f"SIGSTOP of {which}", 2)


def test_a_qemu_that_is_killed(storm: Cloud, survived: Survived) -> None:
    """Ten times the qemu of a clone is killed from outside: it is stopped, is started again, and is the same VM."""
    call(storm, "vminstantiate -n blank -g pf -o name=web").ok()
    before = storm.conf("pf/default/web00")
    for _ in range(10):
        kill_hard(storm.qemu("pf/default/web00"))
        assert "web00 pf/default stopped" in storm.run("vmrunning", "-a").ok().stdout
        storm.start("pf/default/web00").ok()
    after = storm.conf("pf/default/web00")
    assert [after[key] for key in ("vmUuid", "vmMac", "vmAddress")] == [
        before[key] for key in ("vmUuid", "vmMac", "vmAddress")
    ]
    survived("SIGKILL of a VM's qemu", 10)
