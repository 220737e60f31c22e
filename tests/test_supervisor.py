"""vmrun and vm: the supervisor, its signals, and one VM by name; with real qemu and real guests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from support import ROOT, Cloud, Result, add_template, eventually, is_alive, kill_hard, nothing_made, until

STAMP = re.compile(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d\.\d{9} (\S.*)")
QUICK = {"NOCLOUD_vmStopTimeout": "1", "NOCLOUD_vmWaitTimeout": "600"}  # blank disks hear no power button


class Run:
    """A vmrun in the foreground, its log in files: what it said can be looked at while it runs."""

    def __init__(
        self, cloud: Cloud, *words: object, env: dict[str, str] | None = None, argv: list[str] | None = None
    ) -> None:
        self.out, self.err = cloud.home / "vmrun.out", cloud.home / "vmrun.err"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.child = subprocess.Popen(
                [*(argv or cloud.argv("vmrun")), *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=cloud.env | (QUICK if env is None else env),
                cwd=cloud.home,
                start_new_session=True,
            )

    def log(self) -> list[str]:
        """What the log says, without the times, which are checked."""
        found = [STAMP.fullmatch(line) for line in self.out.read_text().splitlines()]
        assert all(found), self.out.read_text()
        return [match.group(1) for match in found if match]

    def says(self, text: str, seconds: float = 30) -> None:
        eventually(lambda: text in self.log() or self.child.poll() is not None, f"{text!r} in {self.log()}", seconds)
        assert text in self.log(), (self.log(), self.err.read_text())

    def spawned(self, *names: str, group: str = "pf", type: str = "web") -> None:
        for name in names:
            self.says(f"{name} of {type} type has been spawned in {group} group")

    def signal(self, number: int) -> None:
        self.child.send_signal(number)

    def ends(self, status: int, seconds: float = 40) -> None:
        got = self.child.wait(seconds)
        assert got == status, (got, self.log(), self.err.read_text())
        assert "Traceback" not in self.err.read_text() and "defect" not in self.err.read_text()

    def stops(self, number: int, status: int = 0) -> None:
        self.signal(number)
        self.ends(status)


def describe(cloud: Cloud, text: str, name: str = "pf") -> Path:
    path = cloud.home / name
    path.write_text(text)
    return path


@pytest.fixture
def running(blank: Cloud) -> Iterator[tuple[Cloud, Run]]:
    """A vmrun with web00 and web01 of pf/web, which run and do no more."""
    run = Run(blank, "-f", describe(blank, "blank:2:web:name=web\n"))
    try:
        run.spawned("web00", "web01")
        yield blank, run
    finally:
        kill(run.child.pid)
        run.child.wait(10)


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def rows(cloud: Cloud) -> list[str]:
    return [line.split()[0] for line in cloud.run("vmrunning").ok().lines]


def destroyed(cloud: Cloud, group: str = "pf") -> None:
    assert not (cloud.base / group).exists()
    assert not (cloud.base / ".net").exists()
    assert (cloud.base / "templates").exists()
    assert rows(cloud) == []


# Guests that boot ####################################################################################


def test_ready_kept_and_run_again(tiny: Cloud) -> None:
    """Spawned, IP, ready, in this order; vmrun -s keeps all; -r brings back names, MACs, addresses and data."""
    template = tiny.base / "templates/tiny/tiny_0.img"
    untouched = template.read_bytes()
    description = describe(tiny, "tiny:1:web:name=web # one\n\n tiny : 1 : sql : name=db;mem=112", "pf.conf")
    run = Run(tiny, "-f", description, env={})
    for name, type in (("web00", "web"), ("db00", "sql")):
        run.says(f"{name} is ready", 120)
        address = tiny.conf(f"pf/{type}/{name}")["vmAddress"]
        mine = [line for line in run.log() if line.startswith(name)]
        assert mine[0] == f"{name} of {type} type has been spawned in pf group"
        assert mine[1].startswith(f"{name} has console ")
        assert mine[2:] == [f"{name} has IP {address}", f"{name} is ready"]
    before = {vm: tiny.conf(vm) for vm in ("pf/web/web00", "pf/sql/db00")}
    tiny.ssh("web00", "echo kept >/data/mine").ok()
    tiny.run("vmrun", "-s", "pf").quiet()
    run.ends(0, 5)
    assert "switched off" not in run.err.read_text()
    assert rows(tiny) == [] and not (tiny.base / "pf/.vmrun.pid").exists()
    again = Run(tiny, "-r", "pf", env={})
    again.says("web00 is ready", 120)
    again.says("db00 is ready", 120)
    assert {vm: tiny.conf(vm) for vm in before} == before
    assert tiny.ssh("web00", "hostname; cat /data/mine").ok().stdout == "web00\nkept\n"
    again.stops(signal.SIGINT)
    assert "shutting down and keeping the VMs of pf group" in again.log()
    assert "switched off" not in again.err.read_text(), "properly"
    assert rows(tiny) == [] and {vm: tiny.conf(vm) for vm in before} == before
    assert template.read_bytes() == untouched


@pytest.mark.long
def test_a_description_makes_those_machines(cloud: Cloud, tiny_image: Path, vms: None) -> None:
    """Memory, processors and disks as the guests themselves see them; what isn't said is the template's."""
    add_template(cloud, tiny_image, "archlinux", "--mem", 128, "--cpu", 2, "--init", "systemd")
    lines = "archlinux:1:sql:mem=1024;cpu=4;dsk=5,5", "archlinux:2:web:mem=512;name=web"
    done = cloud.run("vminstantiate", "-f", describe(cloud, "\n".join(lines)), "-w", 240, timeout=300).ok()
    look = "nproc; awk '/MemTotal/ { print $2 }' /proc/meminfo; cat /sys/block/vd?/size"
    sql, *webs = done.lines
    assert re.fullmatch("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", sql) and webs == ["web00", "web01"]
    for place, mem, cpus, disks in ((f"sql/{sql}", 1024, 4, 3), ("web/web00", 512, 2, 1), ("web/web01", 512, 2, 1)):
        processors, memory, _, *extra = map(int, cloud.ssh(f"pf/{place}", look).ok().lines)
        assert processors == cpus and 0.85 * mem < memory / 1024 <= mem
        assert extra == [5 << 21] * (disks - 1)  # in sectors


@pytest.mark.long
def test_vm_starts_and_connects(tiny: Cloud) -> None:
    """A template, then a stopped clone; the words after the options are ssh's, and the status is the command's."""
    done = tiny.run("vm", "-n", "tiny", "hostname")
    assert done.ok().stdout.strip() == "tiny"
    assert tiny.run("vm", "-n", "tiny", "exit", "7").status == 7  # it runs already
    tiny.run("vmstop", "-n", "tiny").ok()
    tiny.run("vminstantiate", "-n", "tiny", "-g", "pf", "-t", "web", "-o", "name=web").ok()
    tiny.run("vmstop", "-g", "pf", "--kill").quiet()
    assert tiny.run("vm", "-n", "web00", "-g", "pf", "-t", "web", "hostname").ok().stdout == "web00\n"
    assert "tiny has clones" in tiny.run("vm", "-n", "tiny", "true").ok().stderr


# Signals #############################################################################################


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_destroyed_on_signal(running: tuple[Cloud, Run], number: int) -> None:
    cloud, run = running
    run.stops(number)
    assert "web00 has been switched off" in run.log()
    destroyed(cloud)


def test_more_signals_while_destroying(running: tuple[Cloud, Run]) -> None:
    cloud, run = running
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM):
        run.signal(number)
        time.sleep(0.02)
    run.ends(0)
    destroyed(cloud)


def test_stopped_by_usr1_then_destroyed(running: tuple[Cloud, Run]) -> None:
    """^C while VMs are shut down properly: destroyed after all, without waiting for the rest of the time."""
    cloud, run = running
    run.stops(signal.SIGUSR1)
    assert "switched off: web00, web01" in run.err.read_text()
    assert (cloud.base / "pf/web/web00").is_dir() and rows(cloud) == []
    again = Run(cloud, "-r", "pf", "--destroy", env=QUICK | {"NOCLOUD_vmStopTimeout": "300"})
    again.spawned("web00", "web01")
    again.signal(signal.SIGUSR1)
    again.says("shutting down and keeping the VMs of pf group")
    time.sleep(0.5)
    again.stops(signal.SIGINT)
    destroyed(cloud)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_kept_on_purpose(running: tuple[Cloud, Run], number: int) -> None:
    """What -r runs isn't destroyed by ^C, however often, nor by SIGTERM; in the background neither."""
    cloud, run = running
    run.stops(signal.SIGUSR1)
    before = cloud.files()
    again = Run(cloud, "-r", "pf")
    again.spawned("web00", "web01")
    for each in (number, signal.SIGINT, signal.SIGTERM):
        again.signal(each)
    again.ends(0)
    assert rows(cloud) == [] and before <= cloud.files()
    assert cloud.run("vmrun", "-r", "pf", "--background", env=QUICK | {"NOCLOUD_vmWaitTimeout": "1"}).status == 124
    os.kill(manager(cloud), number)
    eventually(lambda: not (cloud.base / "pf/.vmrun.pid").exists(), "it ended")
    assert rows(cloud) == [] and before <= cloud.files()


def manager(cloud: Cloud) -> int:
    """The vmrun in the background."""
    (pid,) = [pid for pid, words in cloud.processes().items() if " run -r pf" in words]
    return pid


def test_hangup_leaves_the_vms_running(running: tuple[Cloud, Run]) -> None:
    cloud, run = running
    qemus = [cloud.qemu(f"pf/web/{name}") for name in ("web00", "web01")]
    run.stops(signal.SIGHUP)
    assert all(map(is_alive, qemus)) and rows(cloud) == ["web00", "web01"]
    assert not (cloud.base / "pf/.vmrun.pid").exists()
    cloud.run("vmrun", "-s", "pf").says(1, "pf: no vmrun manages it", "vmstop -g pf stops its VMs")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize("delay", [0.3, 0.9, 1.5])
def test_signal_while_starting(blank: Cloud, number: int, delay: float) -> None:
    """At whatever instant: all gone, all kept, or all running."""
    run = Run(blank, "-f", describe(blank, "blank:6:web:name=web\n"))
    pid_file = blank.base / "pf/.vmrun.pid"
    eventually(lambda: pid_file.exists() or run.child.poll() is not None, "the claim")
    time.sleep(delay)
    run.stops(number)
    if number == signal.SIGINT:
        return destroyed(blank)
    assert len(list((blank.base / "pf/web").iterdir())) == 6
    assert len(rows(blank)) == (6 if number == signal.SIGHUP else 0)
    assert not pid_file.exists()
    return None


def test_killed_and_taken_over(running: tuple[Cloud, Run]) -> None:
    """After a SIGKILL of vmrun the VMs go on, and the next one has them without a restart."""
    cloud, run = running
    qemus = {name: cloud.qemu(f"pf/web/{name}") for name in ("web00", "web01")}
    kill(run.child.pid)
    run.child.wait(10)
    cloud.run("vmstop", "-n", "web01", "--kill").quiet()
    again = Run(cloud, "-r", "pf")
    again.spawned("web00", "web01")
    assert is_alive(qemus["web00"]) and cloud.qemu("pf/web/web00") == qemus["web00"]
    assert cloud.qemu("pf/web/web01") != qemus["web01"]
    kill_hard(qemus["web00"])
    again.says("web00 has vanished", 2)
    kill(again.child.pid)
    again.child.wait(10)
    cloud.run("vmstop", "-d", "-g", "pf").quiet()  # a pidfile that a killed vmrun left keeps no folder
    destroyed(cloud)


# Others at work ######################################################################################


def children(pid: int) -> list[str]:
    """The processes that are its children, zombies too."""
    argv = ["ps", "-o", "pid=", "--ppid", str(pid)]
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.split()


def test_vanished_and_joined(running: tuple[Cloud, Run]) -> None:
    cloud, run = running
    before = len(children(run.child.pid))
    kill_hard(cloud.qemu("pf/web/web00"))
    run.says("web00 has vanished", 2)
    eventually(lambda: len(children(run.child.pid)) <= before - 2, "its qemu and its log's keeper are no zombies")
    cloud.run("vminstantiate", "-n", "blank", "-g", "pf", "-t", "sql", "-o", "name=db").ok()
    run.says("db00 has joined", 4)
    cloud.start("web00").ok()
    run.says("web00 has joined", 4)
    cloud.run("vmstop", "-g", "pf", "--kill").quiet()
    run.ends(0)  # nothing is left to run
    assert run.log()[-3:] == sorted(run.log()[-3:]) or "web01 has vanished" in run.log()
    assert (cloud.base / "pf/web/web01").is_dir()
    assert not (cloud.base / ".net/holder.pid").exists()


def test_destroyed_by_vmstop(running: tuple[Cloud, Run]) -> None:
    cloud, run = running
    cloud.run("vmstop", "-d", "-g", "pf").quiet()
    run.ends(0)
    destroyed(cloud)


def test_one_vmrun_for_a_group(running: tuple[Cloud, Run]) -> None:
    cloud, _ = running
    with nothing_made(cloud):
        cloud.run("vmrun", "-r", "pf").fails(1, "manages it already", "vmrun -s pf")
        cloud.run("vmrun", "-f", "pf", "--add").fails(1, "manages it already")


def test_group_that_has_vms(blank: Cloud) -> None:
    description = describe(blank, "blank:1:web:name=web\n")
    blank.run("vminstantiate", "-f", description).ok()
    with nothing_made(blank):
        blank.run("vmrun", "-f", description).says(
            1,
            "pf: the group has VMs already",
            "vmrun -r pf runs them, vmstop -d -g pf destroys them, --add adds to them",
        )
    run = Run(blank, "-f", description, "--add", "-g")
    run.spawned("web00", "web01")
    assert blank.conf("pf/web/web01")["vmGui"] == "yes"
    run.stops(signal.SIGINT)
    destroyed(blank)


# What goes wrong #####################################################################################


def test_one_does_not_start(running: tuple[Cloud, Run]) -> None:
    """It is told, the others go on, and the status at the end is 1; without -f nothing of it is removed."""
    cloud, run = running
    run.stops(signal.SIGUSR1)
    disk = cloud.base / "pf/web/web00/web00_0.img"
    disk.write_bytes(b"QFI\xfbnonsense")
    again = Run(cloud, "-r", "pf", "--destroy")
    again.spawned("web01")
    eventually(
        lambda: "vmrun: web00: qemu did not start" in again.err.read_text().replace("nocloud run", "vmrun"), "why"
    )
    assert rows(cloud) == ["web01"] and disk.exists()
    again.stops(signal.SIGINT, status=1)
    destroyed(cloud)


def test_none_starts(blank: Cloud) -> None:
    conf = blank.base / "templates/blank/blank.conf"
    conf.write_text(conf.read_text() + "vmExtraOpts='-no-such-option'\n")
    run = Run(blank, "-f", describe(blank, "blank:2:web:name=web\n"))
    run.ends(1)
    destroyed(blank)


def test_a_defect_ends_it(cloud: Cloud) -> None:
    """Though a worker still waits."""
    done = cloud.script(
        "class NoVM: type = group = 'x'\n"
        "def begin(spawned):\n"
        "    spawned(NoVM())\n"
        "    nocloud.wait_for(lambda: False, 600)\n"
        "with nocloud.Cloud(nocloud.load_config()) as cloud:\n"
        "    nocloud.Supervisor(cloud, 'pf', nocloud.DESTROY, print).run(begin)\n"
    )
    assert done.status == 1 and "AttributeError" in done.stderr and done.seconds < 60


def test_not_ready_is_told(blank: Cloud) -> None:
    run = Run(blank, "-f", describe(blank, "blank:1:web:name=web\n"), env=QUICK | {"NOCLOUD_vmWaitTimeout": "1"})
    eventually(lambda: any(line.startswith("web00 is not ready: not ready after 1 s") for line in run.log()), "told")
    assert rows(blank) == ["web00"]
    run.stops(signal.SIGINT)


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ((), 2, "exactly one"),
        (("-f", "x", "-r", "y"), 2, "exactly one"),
        (("-r", "nosuch"), 1, "no such group"),
        (("-s", "nosuch"), 1, "no such group"),
        (("-r", "templates"), 2, "vm -n NAME"),
        (("-r", "x", "--add"), 2, "-f FILE only"),
        (("-f", "x", "--destroy"), 2, "--destroy goes with -r GROUP and --apply only"),
        (("-f", "-"), 2, "--group"),
        (("-f", "nosuch"), 2, "No such file"),
        (("-f", "bad"), 2, "bad:2"),
    ],
)
def test_refused(blank: Cloud, words: tuple[str, ...], status: int, said: str) -> None:
    describe(blank, "blank:1\nblank:x\n", "bad")
    with nothing_made(blank):
        blank.run("vmrun", *words).fails(status, said)


# Screens #############################################################################################


def test_kept_vms_with_a_screen(blank: Cloud) -> None:
    """-r -g: this time; without a display that is said once, and they go on."""
    blank.run("vminstantiate", "-f", describe(blank, "blank:2:web:name=web\n")).ok()
    blank.run("vmstop", "-g", "pf", "--kill").quiet()
    conf = blank.conf("pf/web/web00")
    for words, count in ((("-g",), 2), ((), 0)):
        run = Run(blank, "-r", "pf", *words)
        run.spawned("web00", "web01")
        said = "no display here, no window for web00, web01"
        if words:
            eventually(lambda: said in run.err.read_text(), said)  # noqa: B023
        assert len([*blank.folder("pf/web").glob("*/spice.sock"), *blank.folder("pf/web").glob("*/vnc.sock")]) == count
        run.stops(signal.SIGUSR1)
        assert (said in run.err.read_text()) == bool(words)
    assert blank.conf("pf/web/web00") == conf
    blank.run("vmrun", "-s", "pf", "-g").fails(2, "-g goes with")


# -f -, --background, vm ##############################################################################


def test_background(blank: Cloud) -> None:
    """From stdin; the caller gets the log until all are ready, or aren't; then it goes on without a terminal."""
    told = blank.run(
        "vmrun", "-f", "-", "--group", "pf", "--background", input="blank:1:web:name=web\n",
        env=QUICK | {"NOCLOUD_vmWaitTimeout": "1"},
    )  # fmt: skip
    assert told.status == 124 and "web00 is not ready" in told.lines[-1], told
    assert (blank.base / "pf/.vmrun.log").exists()
    blank.run("vminstantiate", "-n", "blank", "-g", "pf", "-t", "sql", "-o", "name=db").ok()
    eventually(lambda: "db00 has joined" in (blank.base / "pf/.vmrun.log").read_text(), "a log that goes on", 4)
    blank.run("vmrun", "-s", "pf", env=QUICK).quiet()
    assert rows(blank) == []
    assert sorted(os.listdir(blank.base / "pf")) == ["sql", "web"]
    with nothing_made(blank):
        blank.run("vmrun", "-f", "-", "--group", "pf", "--background", input="blank:1\n").fails(1, "vmrun -r pf")


def test_vm_with_iso_and_screen(blank: Cloud) -> None:
    """-i boots an ISO first; -G starts with a screen and doesn't connect, and isn't possible once it runs headless."""
    iso = blank.home / "isos/little.iso"
    iso.parent.mkdir()
    iso.write_bytes(bytes(16 * 2048 + 1) + b"CD001" + bytes(64 * 2048))
    env = {"NOCLOUD_isoDir": str(iso.parent)}
    blank.run("vm", "-n", "blank", "-i", "litle", env=env).fails(1, "did you mean little.iso?")
    blank.run("vm", "-n", "blank", "-i", "little", "-G", env=env).ok()
    argv = Path(f"/proc/{blank.qemu('templates/blank')}/cmdline").read_text().split("\0")
    assert any(f"file.filename={iso}" in word for word in argv)
    assert any("drive=iso" in word and "bootindex=0" in word for word in argv)
    assert any("drive=disk0" in word and "bootindex=1" in word for word in argv)
    blank.run("vm", "-n", "blank", "-i", "little", "-G", env=env).says(
        1, "blank: it runs already, without that ISO", "vmstop -n blank stops it"
    )
    blank.run("vmstop", "-n", "blank", "--kill").ok()
    blank.run("vminstantiate", "-n", "blank", "-g", "pf", "-o", "name=web").ok()
    for name in ("web00", "pf/web00"):
        said = "web00: it runs without a screen"
        blank.run("vm", "-n", name, "-G").says(1, said, "vmconsole -s -n web00")
    blank.run("vm", "-n", "nosuch").fails(1, "no such VM")
    blank.run("vm").fails(2, "-n NAME")


def test_idle_costs_nothing(running: tuple[Cloud, Run]) -> None:
    """Once all is quiet: one thread, hardly a wake-up, 25 MB.

    As installed, imported: Python keeps a script's syntax tree, 12 MB, for as long as it runs.
    """
    cloud, run = running
    run.stops(signal.SIGHUP)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = 'vmrun'; import nocloud; nocloud.main()"
    argv = [sys.executable, "-IS", "-c", code]
    again = Run(cloud, "-r", "pf", env=QUICK | {"NOCLOUD_vmWaitTimeout": "1"}, argv=argv)
    status = Path(f"/proc/{again.child.pid}/status")

    def value(key: str) -> int:
        match = re.search(rf"^{key}:\s+(\d+)", status.read_text(), re.M)
        assert match
        return int(match.group(1))

    eventually(lambda: sum("not ready" in line for line in again.log()) == 2, "the waits' end")
    eventually(lambda: value("Threads") == 1, "the threads' end")
    wakeups = value("voluntary_ctxt_switches")
    time.sleep(5)
    assert value("voluntary_ctxt_switches") - wakeups <= 5
    assert value("VmRSS") <= 25 * 1024
    again.stops(signal.SIGINT)


def test_help_names_the_program(cloud: Cloud) -> None:
    shown: Result = cloud.run("vmrun", "-h").ok()
    for letter in ("-f", "-r", "-s", "-g"):
        assert f" {letter}" in shown.stdout


# Long ################################################################################################


@pytest.mark.long
def test_killed_at_any_instant(blank: Cloud) -> None:
    """A storm of SIGKILL: each time the tree is consistent, and each of the ways to go on works."""
    seed = int(os.environ.get("SEED") or time.time_ns() % 10**9)
    print(f"SEED={seed}")
    random = Random(seed)
    before, description = blank.files(), describe(blank, "blank:3:web:name=web;dsk=1\n")
    for number in range(24):
        run = Run(blank, "-f", description)
        time.sleep(random.uniform(0.1, 2.5))
        os.killpg(run.child.pid, signal.SIGKILL)
        run.child.wait(10)
        listed = [line.split() for line in blank.run("vmrunning", "-a").ok().lines]
        assert all(row[2] in ("running", "stopped") and len(row) == 4 for row in listed if row[0] != "blank"), listed
        here = [row[0] for row in listed if row[0] != "blank"]
        qemus = {name: blank.qemu(f"pf/web/{name}") for name, _, state, *_ in listed if state == "running"}
        if here and number % 3 == 0:
            again = Run(blank, "-r", "pf", "--destroy")
            again.spawned(*here)
            assert all(blank.qemu(f"pf/web/{name}") == pid for name, pid in qemus.items())  # none was started anew
            again.stops(signal.SIGINT)
        elif here and number % 3 == 1:
            again = Run(blank, "-f", description, "--add")
            again.spawned(*here)
            eventually(lambda: len(rows(blank)) == len(here) + 3, "all run")  # noqa: B023
            again.stops(signal.SIGTERM)
        else:
            blank.run("vmstop", "-d", "-g", "pf").ok()
        run = Run(blank, "-f", description)
        run.spawned("web00", "web01", "web02")
        run.stops(signal.SIGINT)
        assert blank.files() == before
        assert not blank.processes()


def test_a_daemon_of_a_shared_folder_that_ended_is_told(blank: Cloud) -> None:
    """Once, and the VM goes on."""
    (blank.home / "src").mkdir()
    file = describe(blank, "blank:1:web:name=web;share=src:/src\n")
    run = Run(blank, "-f", file, env=QUICK | {"NOCLOUD_vmWaitTimeout": "1"})
    run.spawned("web00")
    (daemon,) = (pid for pid, words in blank.processes().items() if words.split("/virtiofsd ")[1:])
    kill_hard(daemon)
    told = "web00 is running (without a shared folder): vmstop -n web00"
    eventually(lambda: any(line.startswith(told) for line in run.log()), "it is told", 60)
    assert not until(lambda: sum(line.startswith(told) for line in run.log()) > 1, 5)  # two looks more
    run.stops(signal.SIGINT)


LOOKS = """
asked = []
def wake(vm, resume=False):
    asked.append(vm.name)
    return states[vm.name].pop(0)
nocloud.wake, nocloud.free_bytes = wake, lambda path: free.pop(0)
with nocloud.Cloud(nocloud.load_config()) as cloud:
    loop = nocloud.Supervisor(cloud, "group", nocloud.DESTROY, lambda status: None)
    loop._starting = False
    for vm in cloud.tree.vms("group"):
        loop._members[vm.folder] = nocloud.Member(vm, None)
    lost, full = nocloud.SHARE_LOST, nocloud.DISK_FULL
    states = {"a00": [lost, "running", lost, full, lost, lost], "b00": [full, "running"]}
    free = [1 << 40] * 3 + [0] + [1 << 40] * 2
    while free:
        loop._look_at = 0
        loop._look()
        while loop._jobs:
            for key, _ in loop._selector.select():
                key.data()
        print(*sorted(asked))
        asked.clear()
"""


def test_who_is_looked_at_and_what_is_told_once(blank: Cloud) -> None:
    """A look that failed says `running`; who has lost a folder may fill the disk, too."""
    for name in ("a", "b"):
        blank.run("vminstantiate", "-n", "blank", "-g", "group", "-o", f"name={name}").ok()
    blank.run("vmstop", "-g", "group", "--kill").ok()
    with (blank.folder("group/default/a00") / "a00.conf").open("a") as conf:
        conf.write(f"vmShares={blank.home}:/home\n")
    said = "\n".join(blank.script(LOOKS).ok().lines)
    lost, full = (
        "is running (without a shared folder): vmstop",
        "is paused (disk full), and goes on when there is room in",
    )
    patterns = [
        *(f".*a00 {lost} .*", "a00", "a00", "a00"),
        *(f".*a00 {full} .*", f".*b00 {full} .*", "a00 b00"),
        *(".*a00 goes on", ".*b00 goes on", "a00 b00", "a00"),
    ]
    assert re.fullmatch("\n".join(patterns).replace("(", r"\(").replace(")", r"\)"), said), said
