"""Looking at VMs: what --json and -l say of them, their logs, their screens, and what waits tell."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from support import READY, ROOT, Cloud, Terminal, eventually

import nocloud

VM = "pf/web/web00"


@pytest.fixture(scope="module")
def web(shared: Cloud) -> Cloud:
    """pf/web/web00, a tiny guest that is ready, with a port."""
    options = "name=web;port=0:80"
    shared.run("vminstantiate", "-n", "tiny", "-g", "pf", "-t", "web", "-o", options, "-w", READY).ok()
    return shared


# Facts ###############################################################################################


def facts(cloud: Cloud, *words: str) -> list[dict[str, Any]]:
    answer: list[dict[str, Any]] = json.loads(cloud.run("vmrunning", "--json", *words).ok().stdout)
    return answer


def test_json_of_a_vm_that_is_stopped(blank: Cloud) -> None:
    """Each key is there; what a VM that doesn't run hasn't is null."""
    assert facts(blank) == []
    blank.run("vminstantiate", "-n", "blank", "-g", "pf", "-t", "web", "-o", "name=web;port=0:80").ok()
    blank.run("vmstop", "--kill", "-g", "pf").quiet()
    assert facts(blank) == []
    conf, disk = blank.conf(VM), blank.folder(VM) / "web00_0.img"
    template, vm = sorted(facts(blank, "-a"), key=lambda each: str(each["group"]), reverse=True)
    assert vm == {
        "name": "web00",
        "group": "pf",
        "type": "web",
        "state": "stopped",
        "stage": None,
        "address": conf["vmAddress"],
        "template": "blank",
        "user": "root",
        "uuid": conf["vmUuid"],
        "mac": conf["vmMac"],
        "network": "private",
        "ports": [{"ip": "127.0.0.1", "host": int(conf["vmPorts"].split(":")[1]), "guest": 80}],
        "mem_mb": 32,
        "cpus": 1,
        "pid": None,
        "uptime_seconds": None,
        "cpu_seconds": None,
        "resident_bytes": None,
        "disk_bytes": disk.stat().st_blocks * 512,
        "folder": str(blank.folder(VM)),
    }
    assert set(template) == set(vm)
    assert (template["name"], template["type"], template["template"], template["ports"]) == ("blank", None, None, [])


def test_json_of_a_vm_that_runs(web: Cloud) -> None:
    pid = web.qemu(VM)
    (vm,) = facts(web, "-g", "pf")
    assert (vm["state"], vm["stage"], vm["pid"], vm["cpus"], vm["mem_mb"]) == ("running", "ready", pid, 1, 96)
    assert 0 < vm["uptime_seconds"] < time.time() - (web.folder(VM) / "web00.conf").stat().st_ctime + 5
    assert 0 < vm["cpu_seconds"] < os.cpu_count() * vm["uptime_seconds"]
    assert 10 << 20 < vm["resident_bytes"] < 1 << 30
    assert facts(web, "-g", "pf", "-t", "web")[0]["uptime_seconds"] > vm["uptime_seconds"]
    web.run("vmmanage", "-n", "web00", "stop").ok()
    assert [each["state"] for each in facts(web)] == ["paused"]
    web.run("vmmanage", "-n", "web00", "cont").ok()


def test_stage_is_of_this_start(blank: Cloud) -> None:
    """Whoever has seen it ready; nobody has since it was started again."""
    blank.run("vminstantiate", "-n", "blank", "-g", "pf", "-t", "web", "-o", "name=web").ok()
    assert [each["stage"] for each in facts(blank)] == [None]
    (blank.folder(VM) / "ready").touch()
    assert [each["stage"] for each in facts(blank)] == ["ready"]
    blank.run("vmstop", "--kill", "-g", "pf").quiet()
    blank.start(VM).ok()
    assert [each["stage"] for each in facts(blank)] == [None]


def test_json_of_what_can_not_be_read(blank: Cloud) -> None:
    """It is listed all the same."""
    blank.run("vminstantiate", "-n", "blank", "-g", "pf", "-t", "web", "-o", "name=web").ok()
    conf = blank.folder(VM) / "web00.conf"
    text = conf.read_text()
    conf.write_text("vmMem=much\n")
    done = blank.run("vmrunning", "--json", "-g", "pf").ok()
    (vm,) = json.loads(done.stdout)
    assert "vmMem" in done.stderr
    assert (vm["name"], vm["state"], vm["pid"]) == ("web00", "running", blank.qemu(VM))
    assert (vm["mem_mb"], vm["address"], vm["ports"], vm["disk_bytes"]) == (None, None, [], 0)
    row = blank.run("vmrunning", "-l", "-g", "pf").ok().lines[1]
    assert row.split()[:4] == ["web00", "pf/web", "running", "-"]
    conf.write_text(text)


def table(cloud: Cloud, *words: str) -> list[list[str]]:
    """The cells of each row below the heading."""
    heading, *rows = (re.split(" {2,}", line) for line in cloud.run("vmrunning", "-l", *words).ok().lines)
    assert len(heading) == 8 and heading[3] == "ADDRESS"
    return rows


def test_long_list(web: Cloud) -> None:
    (name, place, state, address, uptime, load, memory, port), (template, *rest) = table(web, "-a")
    assert (name, place, state, address) == ("web00", "pf/web", "running", web.conf(VM)["vmAddress"])
    hours, minutes, seconds = map(int, uptime.split(":"))
    assert 0 < 3600 * hours + 60 * minutes + seconds < 3600 and load.endswith("%")
    assert memory.endswith(" MB") and int(memory.split()[0]) > 10
    assert port == web.conf(VM)["vmPorts"]
    assert (template, *rest) == ("tiny", "templates", "stopped", "-", "-", "-", "-", "-")


def test_long_list_shows_what_is_used_now(web: Cloud) -> None:
    """A guest that computes, and one that can't: its qemu is stopped."""
    busy = web.spawn("vmssh", "web00", "while :; do :; done")
    eventually(lambda: int(table(web)[0][5].strip("%")) > 5, "the guest computes", 60)
    pid = web.qemu(VM)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert table(web)[0][5] == "0%"
    finally:
        os.kill(pid, signal.SIGCONT)
    busy.kill()
    web.ssh("web00", "killall -9 sh ash; true")


def test_one_form_at_a_time(web: Cloud) -> None:
    web.run("vmrunning", "-l", "--json").says(2, "--long and --json exclude each other")


# Logs ################################################################################################


@pytest.fixture
def still(blank: Cloud) -> Cloud:
    """pf/web/web00, whose guest says nothing: the tests do."""
    blank.run("vminstantiate", "-n", "blank", "-g", "pf", "-t", "web", "-o", "name=web").ok()
    return blank


def write(cloud: Cloud, text: bytes) -> Path:
    """Add to a console's log, as qemu does; its path."""
    path = cloud.folder(VM) / "console.log"
    with path.open("ab") as log:
        log.write(text)
    return path


def test_log_of_the_console(web: Cloud) -> None:
    shown = web.run("vmlog", "-n", "web00").ok()
    assert "Linux version" in shown.stdout and shown.stderr == ""
    assert shown.stdout == web.run("log", "-n", "pf/web/web00").ok().stdout


def test_log_goes_on_until_the_vm_ends(still: Cloud) -> None:
    """Nothing is lost or shown twice where the log becomes too long meanwhile, even for one that was too slow to see
    it: what it has not read is in the older part."""
    before = write(still, b"").read_text()
    write(still, b"1 before\n")
    log = still.spawn("vmlog", "-f", "-n", "web00")
    assert log.stdout
    deadline = threading.Timer(60, log.kill)  # else a line that doesn't come would be waited for
    deadline.start()
    while log.stdout.readline() != "1 before\n":
        assert log.poll() is None
    path = write(still, b"2 seen\n" + b"." * 2000 + b"\n")
    assert [log.stdout.readline(), log.stdout.readline()] == ["2 seen\n", "." * 2000 + "\n"]
    log.send_signal(signal.SIGSTOP)
    write(still, b"3 put aside\n")
    keeper = subprocess.Popen(["sh", ROOT / "etc/console.sh", "1000", "0.05"], cwd=path.parent)
    eventually(lambda: not path.stat().st_size, "it is put aside")
    write(still, b"4 after\n")
    log.send_signal(signal.SIGCONT)
    assert [log.stdout.readline(), log.stdout.readline()] == ["3 put aside\n", "4 after\n"]
    write(still, b"5 last")
    still.run("vmstop", "--kill", "-g", "pf").quiet()
    assert log.communicate(timeout=30) == ("5 last", "")
    deadline.cancel()
    assert log.returncode == 0 and keeper.wait(10) == 0
    everything = f"{before}1 before\n2 seen\n{'.' * 2000}\n3 put aside\n4 after\n5 last"
    for words in ((), ("-f",)):
        assert still.run("vmlog", "-n", "web00", *words).ok().stdout == everything


def test_log_ends_with_its_reader(still: Cloud) -> None:
    log = still.spawn("vmlog", "-f", "-n", "web00")
    assert log.stdout
    log.stdout.close()
    assert log.wait(20) == 0


RAW = b"\x1b[1;31mred\x1b[0m\r\n\x07\xc3\xa9\t\x1b]0;title\x1b\\\x1b(B\x9bx\x1b]2;\x07\x1b[2Jend"
SHOWN = "red\n\\x07\xe9\t\ufffdxend"


def test_what_a_terminal_is_shown() -> None:
    """However the pieces are cut."""
    for at in range(len(RAW)):
        assert b"".join(nocloud.for_terminal([RAW[:at], RAW[at:]])).decode() == SHOWN, RAW[:at]
    banner = b"\x1bc\x1b[!p\x1b7BIOS\x1b8\r\r\n[ * ] a\r\x1b[K[ ** ] a\r\x1b[K\n\x1b=\x1b>[ OK ]\x1bM\x1bD\x1bE\x1bH\n"
    for at in range(len(banner)):
        shown = b"".join(nocloud.for_terminal([banner[:at], banner[at:]])).decode()
        assert shown == "BIOS\n[ * ] a\n[ ** ] a\n[ OK ]\n", banner[:at]
    flood = b"\x1b" + b"1" * 1000
    assert b"".join(nocloud.for_terminal([flood, b"x"])).decode() == "\\x1b" + "1" * 1000 + "x"


def test_log_on_a_terminal_obeys_no_guest(still: Cloud) -> None:
    """In a pipe it is as it was written."""
    write(still, RAW + b"!\n")
    assert (
        still.run("vmlog", "-n", "web00").ok().stdout.endswith(RAW.decode(errors="replace").replace("\r", "") + "!\n")
    )
    with Terminal(still, "vmlog", "-f", "-n", "web00") as terminal:
        assert terminal.see("end!\r\n").endswith(SHOWN.replace("\n", "\r\n").removesuffix("end"))
        terminal.process.send_signal(signal.SIGINT)
        terminal.ends(130)


def test_log_of_qemu(still: Cloud) -> None:
    log = still.folder(VM) / "web00.log"
    with log.open("a") as file:
        file.write("qemu-system: something\n")
    assert still.run("vmlog", "-q", "-n", "web00").ok().stdout == log.read_text()
    still.run("vmlog").says(2, "which VM? give -n NAME", "vmrunning -a lists them")
    still.run("vmlog", "-n", "blank").says(
        1, "blank: it has no console.log: nocloud hasn't started it yet", "vm -n blank starts it"
    )
    still.run("vmlog", "-q", "-n", "blank").says(
        1, "blank: it has no blank.log: nocloud hasn't started it yet", "vm -n blank starts it"
    )


# Screens #############################################################################################


def pixels_of(png: bytes) -> tuple[int, int, bytes]:
    """(width, height, RGB) of a PNG that uses no filter, its checksums looked at."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = [], 8
    while at < len(png):
        (size,) = struct.unpack_from(">I", png, at)
        kind, data, check = png[at + 4 : at + 8], png[at + 8 : at + 8 + size], png[at + 8 + size : at + 12 + size]
        assert check == struct.pack(">I", zlib.crc32(kind + data))
        chunks.append((kind, data))
        at += 12 + size
    assert [kind for kind, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert rest == [8, 2, 0, 0, 0]
    rows = zlib.decompress(chunks[1][1])
    lines = [rows[at : at + 1 + 3 * width] for at in range(0, len(rows), 1 + 3 * width)]
    assert len(lines) == height and {line[0] for line in lines} == {0}
    return width, height, b"".join(line[1:] for line in lines)


def test_png_of_ppm() -> None:
    """Pixels that look like white space or like a header are pixels."""
    picture = b"\n 255\nP6\n3 2" + bytes(range(6))
    assert pixels_of(nocloud.png_of(b"P6\n3 2\n255\n" + picture)) == (3, 2, picture)
    for wrong in (b"", b"P6\n3 2\n255\n", b"P5\n3 2\n255\n" + picture, b"P6\n3 x\n255\n" + picture, picture):
        with pytest.raises(nocloud.Error, match="no PPM"):
            nocloud.png_of(wrong)


def test_screenshot(web: Cloud) -> None:
    """Of a VM without a window: what its boot loader or its kernel shows; nothing else is left."""
    files = web.files()
    web.run("vmconsole", "-n", "web00", "--screenshot", "shot.png").quiet()
    width, height, pixels = pixels_of((web.home / "shot.png").read_bytes())
    assert width >= 640 and height >= 400 and len(set(pixels)) > 1
    assert web.files() == files
    web.run("vmconsole", "-n", "web00", "--screenshot", "none/shot.png").fails(1, "none/shot.png")
    web.run("vmconsole", "-n", "web00", "-s", "--screenshot", "x").says(
        2, "--serial and --screenshot exclude each other"
    )
    web.run("vmconsole", "-n", "tiny", "--screenshot", "x").fails(1, "not running")
    assert web.files() == files and not (web.home / "x").exists()


# Waits ###############################################################################################

GONE = """
import sys; sys.path.insert(0, {root!r}); import nocloud
nocloud.report.progress("1 of 2 ready")
sys.stdin.read()
nocloud.report.log("one")
nocloud.report.progress("2 of 2 ready")
nocloud.report.say("said to nobody")
nocloud.report.data("two")
"""


def test_the_terminal_goes_away_and_the_log_goes_on(tmp_path: Path) -> None:
    """Between a progress line and the next of the log."""
    master, slave = pty.openpty()
    argv = [sys.executable, "-c", GONE.format(root=str(ROOT))]
    with (tmp_path / "log").open("wb") as log:
        child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=log, stderr=slave)
    os.close(slave)
    assert b"1 of 2 ready" in os.read(master, 4096)
    os.close(master)
    child.communicate(timeout=60)
    assert re.fullmatch(r"\S+ \S+ one\ntwo\n", (tmp_path / "log").read_text())
    assert child.returncode == 0


STAGES = """
import sys; sys.path.insert(0, {root!r}); import nocloud
class VM:
    def __init__(self, name): self.name = name
vms = [VM(f"web{{number}}") for number in range(5)]
progress = nocloud.WaitProgress(vms)
progress.show()
for number, stage in enumerate(["ssh", "configured", "cloud-init", "failed"]):
    progress.tell(vms[number], stage)
progress.tell(VM("gone"), "ready")
for vm in vms[:3] + vms[4:]:
    progress.tell(vm, "ready")
nocloud.report.say("done")
"""


def test_stages_on_a_terminal_and_elsewhere(cloud: Cloud) -> None:
    argv = [sys.executable, "-c", STAGES.format(root=str(ROOT))]
    with Terminal(cloud, "", argv=argv) as terminal:
        shown = terminal.see("\r\x1b[Kdone\r\n")
        terminal.ends(0)
    assert shown.split("\r\x1b[K")[1:] == [
        "0 of 5 ready, 5 booting",
        "0 of 5 ready, 4 booting, 1 starting ssh",
        "0 of 5 ready, 3 booting, 1 starting ssh, 1 configuring",
        "0 of 5 ready, 2 booting, 1 starting ssh, 1 configuring, 1 in cloud-init",
        "0 of 5 ready, 1 failed, 1 booting, 1 starting ssh, 1 configuring, 1 in cloud-in",  # of 80 columns
        "1 of 5 ready, 1 failed, 1 booting, 1 configuring, 1 in cloud-init",
        "2 of 5 ready, 1 failed, 1 booting, 1 in cloud-init",
        "3 of 5 ready, 1 failed, 1 booting",
    ]
    assert cloud.execute(argv).ok().stderr.splitlines() == [
        "nocloud: waiting for web0: ssh to answer",
        "nocloud: waiting for web1: its configuration",
        "nocloud: waiting for web2: cloud-init in the guest to finish",
        *(f"nocloud: web{number} is ready" for number in (0, 1, 2, 4)),
        "done",
    ]


def test_a_wait_on_a_terminal(blank: Cloud) -> None:
    """Its line makes room for what else is said."""
    words = ("-n", "blank", "-g", "pf", "-C", 2, "-o", "name=web", "-w", 2)
    with Terminal(blank, "vminstantiate", *words) as terminal:
        terminal.see("\r\x1b[K0 of 2 ready, 2 booting")
        assert terminal.see("web00\r\nweb01\r\n").endswith("\r\x1b[K")
        terminal.see("web01: not ready after ")
        terminal.ends(124)


@pytest.mark.long
def test_what_waits_tell(tiny: Cloud) -> None:
    """vminstantiate -w on stderr, as its stdout has names; vmrun's line is there again after each line of its log."""
    options = ("-g", "pf", "-t", "web", "-o", "name=web")
    done = tiny.run("vminstantiate", "-n", "tiny", *options, "-w", READY).ok()
    told = [line for line in done.stderr.splitlines() if ": warning: " not in line]
    assert done.lines == ["web00"] and told[-1] == "nocloud instantiate: web00 is ready"
    for line in told[:-1]:
        assert re.fullmatch("nocloud instantiate: waiting for web00: (ssh to answer|its configuration)", line), told
    tiny.run("vmstop", "-g", "pf").quiet()
    with Terminal(tiny, "vmrun", "-r", "pf") as terminal:
        terminal.see("web00 has IP ", 60)
        terminal.see("\r\x1b[K0 of 1 ready, 1 ", 60)
        assert terminal.see("web00 is ready", 90).rpartition("\r\x1b[K")[2].startswith("2")  # the log's own date
        terminal.type("\x03")
        terminal.see("web00 has been stopped", 90)
        terminal.ends(0)


# Processor time ######################################################################################


@pytest.mark.long
def test_a_limit_of_processor_time(tiny: Cloud) -> None:
    """A guest that computes all the time gets its part of one processor, measured."""
    tiny.run("vmcreate", "-a", "-n", "tiny", "-C", 20).quiet()
    done = tiny.run("vminstantiate", "-n", "tiny", "-g", "pf", "-t", "web", "-o", "name=web", "-w", 2 * int(READY)).ok()
    if "vmCpuCap=20 is not enforced" in done.stderr:
        pytest.skip("no cgroup can be written here, as the start says")
    tiny.ssh("web00", "(while :; do :; done) >/dev/null 2>&1 &").ok()

    def used() -> float:
        """The part of one processor that its qemu has used in five seconds."""
        (before,) = facts(tiny)
        time.sleep(5)
        (now,) = facts(tiny)
        part = now["cpu_seconds"] - before["cpu_seconds"]
        return float(part / (now["uptime_seconds"] - before["uptime_seconds"]))

    parts = [used()]
    while parts[-1] < 0.15 and len(parts) < 4:
        parts.append(used())
    is_busy = os.getloadavg()[0] > 2 * (os.cpu_count() or 1)  # others have the processors
    assert max(parts) < 0.25 and (parts[-1] > 0.15 or is_busy), parts
    limited = "/nocloud-" in nocloud.process_file(tiny.qemu(VM), "cgroup") or bool(nocloud.scope_words(20))
    info = tiny.folder(VM).stat()
    tiny.run("vmstop", "web00", "--kill").quiet()
    left = list(Path("/sys/fs/cgroup").glob(f"**/nocloud-{info.st_dev}-{info.st_ino}"))
    assert limited and not left, "its cgroup went with it"
    conf = tiny.folder(VM) / "web00.conf"
    conf.write_text(conf.read_text().replace("vmCpuCap=20", "vmCpuCap=0"))
    tiny.run("vmstart", "web00").quiet()
    assert "/nocloud-" not in nocloud.process_file(tiny.qemu(VM), "cgroup")


def test_a_limit_that_can_not_be_kept_is_told(blank: Cloud) -> None:
    blank.run("vmcreate", "-a", "-n", "blank", "-C", 20).quiet()
    words = ("vminstantiate", "-n", "blank", "-g", "pf", "-o", "name=web")
    done = blank.script("nocloud.CGROUPS = '/nowhere'\nsys.exit(nocloud.main(sys.argv[1:]))\n", *words).ok()
    assert f"warning: web00: vmCpuCap=20 is not enforced: {nocloud.NO_LIMIT}" in done.stderr
    assert blank.run("vmrunning").ok().stdout.startswith("web00 ")
