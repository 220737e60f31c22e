"""Snapshots, rollback, saved memory and pauses: what VMs were at a moment comes back, and nothing else is left."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
from support import READY, Cloud, Terminal, add_blank, eventually, kill_hard, replace_program
from test_storms import Apart

import nocloud

VM = "pf/web/web00"


def clones(cloud: Cloud, count: int = 1, running: bool = False, template: str = "blank") -> None:
    words = ["-w", READY] if template == "tiny" else []
    cloud.run("vminstantiate", "-n", template, "-g", "pf", "-t", "web", "-C", count, "-o", "name=web", *words).ok()
    if not running:
        cloud.run("vmstop", "-g", "pf", "--kill").ok()


def disk(cloud: Cloud, vm: str = VM) -> Path:
    return cloud.base / cloud.conf(vm)["vmDisk"]


def put(cloud: Cloud, pattern: int, at: str = "0", vm: str = VM) -> None:
    """Write 64 KB of a byte to the disk of a VM that is switched off."""
    cloud.execute(["qemu-io", "-f", "qcow2", "-c", f"write -q -P {pattern} {at} 64k", disk(cloud, vm)]).ok()


def holds(cloud: Cloud, pattern: int, at: str = "0", vm: str = VM) -> bool:
    read = cloud.execute(
        ["qemu-io", "-r", "-U", "-f", "qcow2", "-c", f"read -q -P {pattern} {at} 64k", disk(cloud, vm)]
    )
    assert "Pattern verification failed" in read.stdout or not read.status, repr(read)
    return not read.status


def images(cloud: Cloud, vm: str = VM) -> list[str]:
    return sorted(path.name for path in cloud.folder(vm).iterdir() if path.suffix == ".img")


def state(cloud: Cloud, vm: str = "web00") -> str:
    found = json.loads(cloud.run("vmrunning", "-a", "--json", "-g", "pf").ok().stdout)
    return str(next(each["state"] for each in found if each["name"] == vm))


def snapshots(cloud: Cloud) -> list[list[str]]:
    return [re.split("  +", line) for line in cloud.run("vmsnapshot", "-L").ok().lines]


def sound(cloud: Cloud, vm: str = VM) -> None:
    for name in images(cloud, vm):
        cloud.execute(["qemu-img", "check", "-U", "-q", "-f", "qcow2", cloud.folder(vm) / name]).ok()


# Switched off ########################################################################################


def test_disk_and_conf_come_back(blank: Cloud) -> None:
    clones(blank, 2)
    put(blank, 1)
    blank.run("vmsnapshot", "one", "-g", "pf").quiet()
    before = blank.conf(VM)
    put(blank, 2)
    blank.run("vmcreate", "-a", "-n", "web00", "-m", 48).ok()
    blank.run("vmport", "-n", "web00", "127.0.0.1:0:80").ok()
    extra = blank.folder(VM) / "web00_1.img"
    blank.execute(["qemu-img", "create", "-q", "-f", "qcow2", extra, "1M"]).ok()
    with (blank.folder(VM) / "web00.conf").open("a") as conf:
        conf.write("vmExtraDisk=pf/web/web00/web00_1.img\nvmDiskFormat=qcow2,qcow2\n")
    blank.run("vmsnapshot", "two", "-n", "web00").quiet()
    clones(blank)  # another one, made since
    blank.run("vmstop", "-d", "-y", "-n", "web01").ok()
    done = blank.run("vmrollback", "one", "-g", "pf").ok()
    assert "not in one, and left as they are: web02" in done.stderr
    assert "in one, but destroyed since, with what it was then: pf/web/web01" in done.stderr
    found = re.search(r"web00: it has got a disk since, which is kept: (\S+)", done.stderr)
    assert found and Path(found[1]).exists() and Path(found[1]).stat().st_nlink == 1
    assert holds(blank, 1)
    after = blank.conf(VM)
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed == {"vmDisk"}
    assert "destroyed" not in blank.run("vmrollback", "two", "-n", "web00").ok().stderr
    assert holds(blank, 2)
    assert (blank.conf(VM)["vmMem"], blank.conf(VM)["vmExtraDisk"].count("web00_1.")) == ("48", 1)
    sound(blank)
    with Terminal(blank, "vmrollback", "one", "-g", "pf", "--exact") as terminal:
        terminal.see("what has changed since is lost. Destroyed will be web02. Go on? [y/N]")
        terminal.type("n\n")
        terminal.ends(1)
    assert holds(blank, 2)
    assert "left as they are" not in blank.run("vmrollback", "one", "-g", "pf", "--exact", "-y").ok().stderr
    assert holds(blank, 1) and [row.split()[0] for row in blank.run("vmrunning", "-a", "-g", "pf").lines] == ["web00"]


def test_what_a_list_shows(blank: Cloud) -> None:
    assert blank.run("vmsnapshot", "-L").ok().stdout == ""
    clones(blank, 2)
    blank.run("vmsnapshot", "one", "-g", "pf").quiet()
    blank.run("vmsnapshot", "two", "-n", "web01").quiet()
    (one, two) = snapshots(blank)
    assert [*one[:2], *one[4:]] == ["one", "pf", "-", "web00,web01"]
    assert [*two[:2], *two[4:]] == ["two", "pf", "-", "web01"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", one[2]) and re.fullmatch(r"\d+ MB", one[3])
    assert blank.run("vmsnapshot", "-L", "-g", "pf").ok().lines == blank.run("vmsnapshot", "-L").ok().lines
    blank.run("vmsnapshot", "--delete", "one").quiet()
    assert [each[0] for each in snapshots(blank)] == ["two"]


def test_a_disk_that_came_since_is_kept_under_the_name_that_is_told(blank: Cloud) -> None:
    clones(blank)
    blank.run("vmsnapshot", "one", "-n", "web00").quiet()
    for number in range(1, 5):
        blank.run("vmchange", "web00", "--add-disk", 1).ok()
        said = blank.run("vmrollback", "one", "-n", "web00", "-y").ok().stderr
        (name,) = re.findall(r"a disk since, which is kept: (\S+)", said)
        found = [path for path in blank.folder(VM).glob("web00_1.*.img") if path.stat().st_nlink == 1]
        assert len(found) == number and Path(name) in found, (name, found)


def test_a_second_name_of_a_disk_is_nothing_to_us(blank: Cloud) -> None:
    """A copy of the tree by links, say: what a disk stands on isn't removed for that."""
    clones(blank)
    for number, name in enumerate(("one", "two")):
        put(blank, 1 + number, f"{number}M")
        blank.run("vmsnapshot", name, "-n", "web00").quiet()
    subprocess.run(["cp", "-al", blank.folder(VM), blank.home / "copy"], check=True)
    blank.run("vmsnapshot", "--delete", "two").quiet()
    assert holds(blank, 1) and holds(blank, 2, "1M")
    sound(blank)


@pytest.mark.parametrize("newest_first", [pytest.param(False, marks=pytest.mark.long), True])
def test_what_is_deleted_is_merged(blank: Cloud, newest_first: bool) -> None:
    clones(blank)
    begun = blank.files()
    for number in range(1, 11):
        put(blank, number, f"{number * 64}k")
        blank.run("vmsnapshot", f"s{number}", "-n", "web00").quiet()
    put(blank, 99)
    for number in sorted(range(1, 11), reverse=newest_first):
        blank.run("vmsnapshot", "--delete", f"s{number}", "-n", "web00").quiet()
        sound(blank)
    assert holds(blank, 99) and all(holds(blank, number, f"{number * 64}k") for number in range(1, 11))
    assert len(images(blank)) == 1
    assert len(blank.files()) == len(begun)
    blank.start(VM).ok()


def test_branches(blank: Cloud) -> None:
    """Two lines of snapshots stand on one file; either goes without the other."""
    clones(blank)
    for pattern, name in ((1, "base"), (2, "left")):
        put(blank, pattern)
        blank.run("vmsnapshot", name, "-n", "web00").quiet()
    blank.run("vmrollback", "base", "-n", "web00").ok()
    put(blank, 3)
    blank.run("vmsnapshot", "right", "-n", "web00").quiet()
    put(blank, 4)
    blank.run("vmsnapshot", "--delete", "base").quiet()
    assert holds(blank, 4)
    for name, pattern in (("left", 2), ("right", 3), ("left", 2)):
        blank.run("vmrollback", name, "-n", "web00").ok()
        assert holds(blank, pattern)
        sound(blank)
    blank.run("vmsnapshot", "--delete", "right").quiet()
    assert holds(blank, 2)
    blank.run("vmsnapshot", "--delete", "left").quiet()
    assert holds(blank, 2) and len(images(blank)) == 1


@pytest.mark.long
def test_at_most_so_deep(blank: Cloud) -> None:
    clones(blank)
    for number in range(1, 17):
        done = blank.run("vmsnapshot", f"s{number}", "-n", "web00").ok()
        told = f"web00: its disk stands on {number - 1} snapshots, 16 is the most"
        assert (told in done.stderr) == (number > 12), repr(done)
    blank.run("vmsnapshot", "more", "-n", "web00").fails(1, "stands on 16 snapshots", "--delete NAME -n web00")
    blank.run("vmsnapshot", "--delete", "s7").quiet()
    blank.run("vmsnapshot", "more", "-n", "web00").ok()


def test_what_was_there_then_is_not_made_since(blank: Cloud) -> None:
    """--exact destroys what was made since, not what wasn't asked for then, nor who has lost his snapshot."""
    clones(blank, 2)
    blank.run("vminstantiate", "-n", "blank", "-g", "pf", "-t", "sql", "-o", "name=db").ok()
    blank.run("vmsnapshot", "one", "-g", "pf", "-t", "web").quiet()
    blank.run("vmsnapshot", "--delete", "one", "-n", "web01").quiet()
    clones(blank)
    refused = blank.run("vmrollback", "one", "-g", "pf", "--exact")
    refused.fails(1, "Destroyed will be web02. Nothing has been done", "-y says that it is meant")
    said = blank.run("vmrollback", "one", "-g", "pf", "--exact", "-y").ok().stderr
    assert "not in one, and left as they are: db00, web01" in said
    assert len(blank.run("vmrunning", "-a", "-g", "pf").ok().lines) == 3


def test_what_is_refused(blank: Cloud) -> None:
    clones(blank)
    blank.run("vmsnapshot", "monday", "-n", "web00").quiet()
    files = blank.files()
    for which, said in ((("-g", ""), "group"), (("-t", "web"), "which group?")):  # not those of all groups
        blank.run("vmsnapshot", "--delete", "monday", *which).fails(2, said)
    again = blank.run("vmsnapshot", "Monday", "-n", "web00")
    again.says(1, "web00: it has a snapshot Monday", "vmsnapshot --delete Monday -n web00")
    for name in ("", "a/b", "../x", ".x", "a b", "x" * 64):
        blank.run("vmsnapshot", name, "-n", "web00").fails(2)
    for words in (("vmrollback", "munday", "-n", "web00"), ("vmsnapshot", "--delete", "munday")):
        blank.run(*words).fails(1, "munday: no such snapshot", "did you mean monday?")
    blank.run("vmsnapshot", "x", "-n", "blank").fails(1, "no snapshot is taken of it")
    blank.run("vmsnapshot", "x").fails(2, "which group?")
    blank.run("vmrollback", "-n", "web00").fails(2)
    blank.run("vmstop", "--save", "-n", "web00").fails(1, "it is stopped, there is nothing to save")
    blank.run("vmpause", "-n", "web00").fails(1, "it is not running")
    assert blank.files() == files


@pytest.mark.long
def test_a_guest_that_cannot_be_asked_to_write_out(blank: Cloud) -> None:
    """None is taken then."""
    blank.run("vminstantiate", "-n", "blank", "-g", "pf", "-t", "web", "-o", "name=web").ok()
    blank.run("vmsnapshot", "one", "-g", "pf", "--sync").fails(1, "web00: its guest has not written out", "--sync")
    assert blank.run("vmsnapshot", "-L").ok().stdout == ""


def test_to_destroy_is_to_switch_off(blank: Cloud) -> None:
    """Both may be asked for, as ever; what is kept excludes both."""
    blank.run("vminstantiate", "-n", "blank", "-g", "pf", "-t", "web", "-o", "name=web").ok()
    for other in ("-d", "--kill", "--discard"):
        blank.run("vmstop", "--save", other, "-g", "pf").fails(2, "exclude each other")
    blank.run("vmstop", "-d", "--kill", "-g", "pf").quiet()
    assert blank.run("vmrunning", "-a", "-g", "templates").ok().lines and blank.run("vmrunning").ok().stdout == ""


def test_a_group_with_snapshots_is_destroyed(blank: Cloud) -> None:
    clones(blank, 2)
    blank.run("vmsnapshot", "one", "-g", "pf").quiet()
    question = "2 VMs with 2 snapshots will be gone."
    for answer, status in (("n\n", 1), ("y\n", 0)):
        with Terminal(blank, "vmstop", "-d", "-g", "pf") as terminal:
            terminal.see(f"{question} Go on? [y/N]")
            terminal.type(answer)
            terminal.ends(status)
        assert blank.folder(VM).exists() == bool(status)
    clones(blank)
    blank.run("vmsnapshot", "one", "-g", "pf").quiet()
    closed = ["sh", "-c", 'exec "$@" <&-', "sh", *blank.argv("vmstop", "-d", "-g", "pf", "-y")]
    assert "1 VM with 1 snapshot will be gone." in blank.execute(closed).ok().stderr


# Running #############################################################################################


def test_running_ones(blank: Cloud) -> None:
    """Of a group of which one runs: all of them; merged under a qemu that writes; the other branch too."""
    clones(blank, 2, running=True)
    blank.run("vmstop", "-n", "web01", "--kill").ok()
    begun, qemu = blank.files(), blank.qemu(VM)
    for number in range(5):
        blank.run("vmsnapshot", f"s{number}", "-g", "pf").quiet()
    blank.run("vmsnapshot", "ram", "-g", "pf", "--ram").quiet()
    assert [each[4] for each in snapshots(blank)] == ["-"] * 5 + ["memory"]
    for name in ("s3", "s4", "s0", "s1", "ram", "s2"):
        blank.run("vmsnapshot", "--delete", name, "-g", "pf").quiet()
        sound(blank)
    assert (blank.qemu(VM), state(blank)) == (qemu, "running")
    assert len(blank.files()) == len(begun) and len(images(blank)) == len(images(blank, "pf/web/web01")) == 1
    blank.run("vmsnapshot", "last", "-g", "pf").quiet()
    blank.run("vmrollback", "last", "-g", "pf").ok()
    assert (state(blank), state(blank, "web01")) == ("running", "stopped")


COUNT = "i=0; while :; do i=$((i+1)); echo $i >/run/count; sleep 0.1; done"


def count(cloud: Cloud, vm: str = "web00") -> int:
    return int(cloud.ssh(vm, "cat /run/count").ok().stdout or 0)


@pytest.mark.long
def test_a_guest_goes_back(tiny: Cloud) -> None:
    clones(tiny, running=True, template="tiny")
    tiny.ssh("web00", f"setsid sh -c {shlex.quote(COUNT)} >/dev/null 2>&1 </dev/null & echo one >/data/file; sync").ok()
    eventually(lambda: count(tiny) > 0, "it counts")
    tiny.run("vmsnapshot", "disk", "-n", "web00", "--sync").quiet()
    low = count(tiny)
    tiny.run("vmsnapshot", "ram", "-n", "web00", "--ram").quiet()
    high = count(tiny)
    make = "head -c 3000000 /dev/urandom >/data/big; echo two >/data/file; sync"
    tiny.ssh("web00", make).ok()
    sums = tiny.ssh("web00", "md5sum </data/big").ok().stdout
    tiny.run("vmsnapshot", "big", "-n", "web00").quiet()
    tiny.run("vmrollback", "ram", "-n", "web00").ok()
    tiny.ssh("web00", "cat /data/file").ok()
    assert low <= count(tiny) and tiny.ssh("web00", "cat /data/file; ls /data").ok().stdout.split()[0] == "one"
    assert high > low
    clock = lambda: abs(float(tiny.ssh("web00", "date +%s").ok().stdout) - time.time()) < 5  # noqa: E731
    eventually(clock, "its clock is set")
    assert not (tiny.folder(VM) / "late").exists()
    for name in ("ram", "disk"):
        tiny.run("vmsnapshot", "--delete", name, "-n", "web00").quiet()
    tiny.run("vmrollback", "big", "-n", "web00").ok()
    assert tiny.ssh("web00", "md5sum </data/big").ok().stdout == sums
    tiny.run("vmsnapshot", "--delete", "big", "-n", "web00").quiet()
    assert tiny.ssh("web00", "sync; echo 3 >/proc/sys/vm/drop_caches; md5sum </data/big").ok().stdout == sums
    assert len(images(tiny)) == 1
    kill_hard(tiny.qemu(VM))  # what was merged is on the disk
    sound(tiny)
    tiny.start(VM).ok()
    assert tiny.ssh("web00", "md5sum </data/big; mount | grep -c /data").ok().stdout.startswith(sums)


# Saved, paused #######################################################################################


@pytest.mark.long
def test_saved_and_gone_on(tiny: Cloud) -> None:
    """Two guests that talk; a connection survives; nobody goes on twice, nor on another disk or machine."""
    clones(tiny, 2, running=True, template="tiny")
    address = tiny.run("vmrunning", "-g", "pf").ok().lines[1].split()[2]
    tiny.ssh("web01", "sleep 999 | setsid nc -l -p 99 >/run/heard 2>/run/error &").ok()
    talk = f"i=0; while sleep 0.2; do i=$((i+1)); echo $i; done | nc {address} 99"
    tiny.ssh("web00", f"setsid sh -c {shlex.quote(talk)} >/dev/null 2>&1 </dev/null &").ok()

    def heard() -> int:
        words = tiny.ssh("web01", "tail -n 1 /run/heard").ok().stdout.split()
        return int(words[0]) if words else 0

    eventually(lambda: heard() > 0, "they talk")
    before = heard()
    tiny.run("vmstop", "--save", "-g", "pf").quiet()
    assert (state(tiny), state(tiny, "web01")) == ("saved", "saved")
    tiny.run("vmsnapshot", "x", "-n", "web00").fails(1, "its memory is saved")
    tiny.start(VM, "pf/web/web01").ok()
    eventually(lambda: heard() > before + 5, "they go on talking", 60)
    told = tiny.ssh("web01", "cat /run/heard").ok().stdout.split()
    assert told == [str(number) for number in range(1, len(told) + 1)]
    assert not any((tiny.folder(VM) / name).exists() for name in ("saved", "still"))


def test_nobody_goes_on_where_he_cannot(blank: Cloud) -> None:
    clones(blank, running=True)
    saved = blank.folder(VM) / "saved"
    blank.run("vmstop", "--save", "-n", "web00").quiet()
    assert saved.stat().st_mode & 0o777 == 0o600
    conf = blank.folder(VM) / "web00.conf"
    text = conf.read_text()
    conf.write_text(text.replace("vmMem=32", "vmMem=64"))
    hint = "vmstop --discard -n web00 forgets its saved memory: it boots then, as after a power cut"
    blank.start(VM).fails(1, "it can't go on where it was saved", hint)
    assert saved.exists() and state(blank) == "saved"
    conf.write_text(text)
    blank.start(VM).ok()
    assert not saved.exists() and state(blank) == "running"
    for disk in blank.folder(VM).glob("*.img"):
        os.utime(disk, (time.time() + 86400,) * 2)  # the clock has gone back
    blank.run("vmstop", "--save", "-n", "web00").quiet()
    blank.start(VM).ok()
    assert not saved.exists() and state(blank) == "running"
    blank.run("vmstop", "--save", "-n", "web00").quiet()
    put(blank, 7)
    blank.start(VM).says(1, "web00: its disks have changed since its memory was saved", hint)
    assert saved.exists()
    blank.run("vmstop", "--discard", "-n", "web00").quiet()
    blank.start(VM).ok()
    assert state(blank) == "running" and holds(blank, 7)


@pytest.mark.parametrize("written", [True, False])
def test_a_rollback_that_is_killed_beside_its_conf(
    blank: Cloud, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    """The snapshot's memory, and what its firmware kept, go with its disks: a VM has all of them, or none."""
    clones(blank, running=True)
    variables = blank.folder(VM) / "firmware/uefi"
    variables.parent.mkdir()
    variables.write_text("then")
    blank.run("vmsnapshot", "one", "-n", "web00", "--ram").quiet()
    blank.run("vmstop", "-g", "pf", "--kill").ok()
    variables.write_text("now")
    vm = nocloud.VM(nocloud.Tree(nocloud.Config({"vmBaseDir": str(blank.base)})), "pf", "web", "web00")

    def die(*words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(nocloud.VM if written else nocloud, "reread" if written else "write_file", die)
    with pytest.raises(KeyboardInterrupt):
        nocloud.roll_back(nocloud.need_snapshots([vm], "one")[0])
    assert state(blank) == "stopped"
    blank.run("vmsnapshot", "two", "-n", "web00").fails(1, "its memory is saved") if written else None
    blank.start(VM).ok()
    assert (blank.folder(VM) / "late").exists() == written, "it went on, or booted"
    assert variables.read_text() == ("then" if written else "now")
    assert not [path.name for path in blank.folder(VM).iterdir() if path.name.startswith((".new-", "saved"))]


def test_a_delete_that_is_interrupted_leaves_saved_memory(blank: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is merged into its disk by then is no change of it."""
    clones(blank, running=True)
    blank.run("vmsnapshot", "one", "-n", "web00").quiet()
    blank.run("vmstop", "--save", "-n", "web00").quiet()
    vm = nocloud.VM(nocloud.Tree(nocloud.Config({"vmBaseDir": str(blank.base)})), "pf", "web", "web00")

    def merge(vm: nocloud.VM, qemu: object) -> None:
        os.utime(vm.disks()[0])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(nocloud, "clear_up", merge)
        nocloud.delete_snapshot(nocloud.need_snapshots([vm], "one")[0])
    blank.start(VM).ok()
    assert (blank.folder(VM) / "late").exists(), "it has gone on"


@pytest.mark.long
def test_a_screen_for_this_time_is_one_of_saved_memory(blank: Cloud) -> None:
    clones(blank)
    blank.run("vm", "-n", "web00", "-g", "pf", "-G").ok()
    blank.run("vmsnapshot", "one", "-n", "web00", "--ram").quiet()
    assert "vmGui" not in blank.conf(VM)
    blank.run("vmstop", "--save", "-n", "web00").quiet()
    blank.start(VM).ok()
    assert state(blank) == "running" and (blank.folder(VM) / "late").exists()
    blank.run("vmstop", "-n", "web00", "--kill").ok()
    blank.run("vmrollback", "one", "-n", "web00", "-y").ok()
    assert state(blank) == "running"


def test_paused_and_gone_on(blank: Cloud) -> None:
    clones(blank, 2, running=True)
    blank.run("vmpause", "-g", "pf").quiet()
    assert blank.run("vmrunning").ok().lines[0].split()[:3] == ["web00", "pf/web", "paused"]
    blank.run("vmsnapshot", "one", "-g", "pf", "--ram").quiet()
    assert state(blank) == "paused"
    blank.run("vmresume", "-n", "web00").quiet()
    assert (state(blank), state(blank, "web01")) == ("running", "paused")


@pytest.fixture
def slow(blank: Cloud) -> Cloud:
    """Three that run; each memory that lands takes until it is killed: `sync` waits."""
    clones(blank, 3, running=True)
    blank.env["PATH"] = replace_program(
        blank.home / "bin",
        "sync",
        f'case $* in *memory*) touch {blank.home}/there; sleep 60;; *) exec "$REAL" "$@";; esac',
    )
    return blank


def test_a_command_that_is_killed_while_guests_stand_still(slow: Cloud) -> None:
    child = slow.spawn("vmsnapshot", "one", "-g", "pf", "--ram")
    eventually((slow.home / "there").exists, "the memory is written")
    names = ("web00", "web01", "web02")
    wake = "print(nocloud.wake(next(nocloud.Tree(nocloud.load_config()).vms('pf'))))"
    slow.script(wake).ok()  # not while the command is at work
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert [state(slow, name) for name in names] == ["paused"] * 3
    slow.env["PATH"] = os.environ["PATH"]
    assert slow.script(wake).ok().stdout == "running\n"
    slow.run("vmsnapshot", "two", "-g", "pf").quiet()
    assert [state(slow, name) for name in names] == ["running"] * 3
    assert not list(slow.base.rglob("still")) and not list(slow.base.rglob(".new-*"))
    slow.run("vmsnapshot", "--delete", "two").quiet()
    assert len(images(slow)) == 1


@pytest.mark.parametrize("goes_on", [["vmresume"], ["vmstart"], ["vmstop", "--timeout", "1"]])
def test_what_a_save_that_was_killed_has_kept_is_old(blank: Cloud, goes_on: list[str]) -> None:
    """Once the guest goes on, however it was made to, it never does from there again."""
    clones(blank, running=True)
    code = "nocloud.pull_the_plug = lambda *words: os._exit(137)\nsys.exit(nocloud.main(['vmstop', *sys.argv[1:]]))"
    assert blank.script(f"import os\n{code}", "--save", "-n", "web00").status == 137
    assert state(blank) == "paused" and (blank.folder(VM) / "saved").exists()
    blank.run(*goes_on, "-n", "web00").ok()
    assert state(blank) == ("stopped" if goes_on[0] == "vmstop" else "running")
    assert not (blank.folder(VM) / "saved").exists()


# In the middle #######################################################################################


@pytest.mark.parametrize("what", ["overlay", "memory", "qemu"])
def test_none_where_one_cannot_be_taken(blank: Cloud, what: str) -> None:
    clones(blank, 3, running=True)
    blank.run("vmstop", "-n", "web01", "--kill").ok()
    confs = [blank.conf(f"pf/web/web0{number}") for number in range(3)]
    begun = blank.files()
    if what == "qemu":
        os.kill(blank.qemu("pf/web/web02"), signal.SIGKILL)
        (blank.folder("pf/web/web02") / "qmp.sock").unlink()
    program, script = {
        "overlay": ("qemu-img", 'case $* in *create*web02*) echo no room >&2; exit 1;; *) exec "$REAL" "$@";; esac'),
        "memory": ("sync", 'case $* in *web02*memory*) echo no room >&2; exit 1;; *) exec "$REAL" "$@";; esac'),
        "qemu": ("qemu-img", 'case $* in *create*web02*) exit 1;; *) exec "$REAL" "$@";; esac'),
    }[what]
    path = replace_program(blank.home / "bin", program, script)
    done = blank.run("vmsnapshot", "one", "-g", "pf", "--ram", env={"PATH": path})
    assert done.status == 1 and "Traceback" not in done.stderr, repr(done)
    assert state(blank) == "running" and not snapshots(blank)
    if what != "memory":  # else what was sealed is merged: its disk is another file
        assert [blank.conf(f"pf/web/web0{number}") for number in range(3)] == confs
        assert {each for each in begun ^ blank.files() if "web02/" not in each} == set()
    assert len(blank.files()) <= len(begun)
    blank.run("vmsnapshot", "one", "-n", "web00").quiet()
    sound(blank)


def test_a_disk_that_is_full(cloud: Cloud, vms: None) -> None:
    """Of two VMs on a small file system neither has a snapshot with memory where there is no room; with room both."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a tmpfs")
    cloud.base.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500m", "nocloud-test", cloud.base], check=True)
    try:
        add_blank(cloud)
        clones(cloud, 2, running=True)
        confs, files = [cloud.conf(f"pf/web/web0{number}") for number in range(2)], cloud.files()
        for left, ram in ((20 << 10, []), (300 << 10, []), (600 << 10, []), (100 << 20, ["--ram"])):
            info = os.statvfs(cloud.base)
            with (cloud.home / "vms/ballast").open("wb") as ballast:
                os.posix_fallocate(ballast.fileno(), 0, info.f_bavail * info.f_frsize - left)
            done = cloud.run("vmsnapshot", "one", "-g", "pf", *ram).fails(1)
            (cloud.base / "ballast").unlink()
            assert not snapshots(cloud) and cloud.files() == files, repr(done)
            assert [cloud.conf(f"pf/web/web0{number}") for number in range(2)] == confs
            assert (state(cloud), state(cloud, "web01")) == ("running", "running")
        cloud.run("vmsnapshot", "one", "-g", "pf", "--ram").quiet()
        info = os.statvfs(cloud.base)
        with (cloud.home / "vms/ballast").open("wb") as ballast:
            os.posix_fallocate(ballast.fileno(), 0, info.f_bavail * info.f_frsize - (100 << 10))
        done = cloud.run("vmrollback", "one", "-g", "pf", "-y")
        assert done.status == 1 and "going back takes up to 2 MB, 0 MB are free" in done.stderr
        assert (state(cloud), state(cloud, "web01")) == ("running", "running")
        (cloud.base / "ballast").unlink()
        cloud.run("vmstop", "-d", "-g", "pf").ok()
        cloud.run("net", "--private", "down")
    finally:
        subprocess.run(["umount", "-l", cloud.base], check=True)


# Others ##############################################################################################


def test_under_vmrun(blank: Cloud) -> None:
    """It has them go on where they were saved; what others do to them it logs."""
    clones(blank, 2, running=True)
    blank.run("vmstop", "--save", "-g", "pf").quiet()
    vmrun = blank.spawn("vmrun", "-r", "pf")
    assert vmrun.stdout
    said: list[str] = []

    def hear(words: str, times: int) -> None:
        while sum(words in line for line in said) < times:
            said.append(vmrun.stdout.readline())  # type: ignore[union-attr]
            assert said[-1], said

    hear("has been spawned", 2)
    assert all((blank.folder(f"pf/web/web0{number}") / "late").exists() for number in range(2))
    blank.run("vmsnapshot", "one", "-g", "pf", "--ram").quiet()
    for number in (1, 2):
        blank.run("vmrollback", "one", "-g", "pf").ok()
        hear("has joined", 2 * number)
    hear("has vanished", 4)
    blank.run("vmstop", "--save", "-n", "web00").quiet()
    hear("web00 has been saved", 1)
    blank.start(VM).ok()
    hear("web00 has joined", 3)
    blank.run("vmstop", "-g", "pf", "--kill").ok()
    assert vmrun.wait(30) == 0


@pytest.mark.parametrize("layered", [False, True])
def test_a_template_of_a_snapshot(blank: Cloud, layered: bool) -> None:
    clones(blank)
    put(blank, 1)
    blank.run("vmsnapshot", "one", "-n", "web00").quiet()
    put(blank, 2)
    blank.start(VM).ok()
    words = ["--layer"] if layered else []
    blank.run("vmtemplate", "more", "--from", f"{VM}@one", "--no-clean", *words).ok()
    blank.run("vmtemplate", "again", "--from", f"{VM}@on", "--no-clean").fails(1, "no such snapshot", "mean one?")
    conf = blank.conf("templates/more")
    assert conf["vmSource"] == f"{VM}@one"
    blank.run("vmstop", "-d", "-g", "pf", "-y").ok()
    image = blank.base / conf["vmDisk"]
    assert blank.execute(["qemu-io", "-r", "-f", "qcow2", "-c", "read -q -P 1 0 64k", image]).ok().stdout == ""
    info = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", image]))
    assert info.get("backing-filename", "") == ("../blank/blank_0.img" if layered else "")
    blank.run("vminstantiate", "-n", "more", "-g", "pf", "-o", "name=web").ok()
    blank.run("vmtemplate", "--delete", "blank").fails(1) if layered else None


# Storms ##############################################################################################


LINES = (
    "vmsnapshot more -g pf",
    "vmsnapshot more -g pf --ram",
    "vmrollback one -g pf",
    "vmsnapshot --delete one -g pf",
    "vmstop --save -g pf",
    "vmrun -r pf",
)


@pytest.mark.long
def test_snapshots_killed_at_any_instant(blank: Cloud, vms: None, survived: Callable[[str, int], None]) -> None:
    """A hundred times: each VM is as before or as after, each disk is sound, the next command clears up and goes on."""
    seed = int(os.environ.get("SEED") or time.time_ns() % 10**9)
    print(f"SEED={seed}")
    random, longest = Random(seed), dict.fromkeys(LINES, 1.0)
    clones(blank, 2)
    put(blank, 7, "1M")
    names = ("pf/web/web00", "pf/web/web01")
    for number in range(100):
        line = random.choice(LINES)
        blank.run("vmstop", "-g", "pf", "--kill")
        blank.run("vmstop", "--discard", "-g", "pf").ok()
        put(blank, 1)
        if random.random() < 0.8 or line != LINES[0]:
            blank.start(*names).ok()
        blank.run("vmsnapshot", "one", "-g", "pf", *random.choice(((), ("--ram",)))).ok()
        if line == "vmrollback one -g pf":
            blank.run("vmstop", "-g", "pf", "--kill").ok()
            put(blank, 2)
        if line == "vmrun -r pf":
            blank.run("vmstop", "--save", "-g", "pf").ok()
        began = time.monotonic()
        child = blank.spawn(*line.split())
        with suppress(subprocess.TimeoutExpired):
            child.wait(random.uniform(0.1, longest.get(line, 1.5)))
        longest[line] = max(longest.get(line, 0.5), min(time.monotonic() - began, 3))
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        told = f"SEED={seed}, round {number}: {line}"
        print(told)
        assert holds(blank, 7, "1M"), told
        assert holds(blank, 1) or (holds(blank, 2) and "rollback" in line), told
        blank.run("vmstop", "--discard", "-g", "pf").ok()
        done = blank.run("vmsnapshot", "next", "-g", "pf")
        assert done.status == 0, f"{told}: {done!r}"
        assert not [*blank.base.rglob(".new-*"), *blank.base.rglob(".del-*"), *blank.base.rglob("still")], told
        for name in {row[0] for row in snapshots(blank)}:
            blank.run("vmsnapshot", "--delete", name, "-g", "pf").ok()
        for vm in names:
            assert len(images(blank, vm)) == 1, f"{told}: {images(blank, vm)}"
            sound(blank, vm)
    survived("SIGKILL of snapshots, rollbacks and saves", 100)


# What a disk fills up under; the VMs have a snapshot `one` where it says so, and run but for a rollback's end.
FILLED = ("snapshot one", "snapshot one --ram", "rollback one -y", "snapshot --delete one", "stop --save")


@pytest.mark.long
@pytest.mark.parametrize("line", FILLED)
def test_a_disk_that_fills_up_meanwhile(
    tmp_path: Path, vms: None, survived: Callable[[str, int], None], line: str
) -> None:
    """From no room on, a little more each time, never asked for before: done, or undone with a word. VMs run on."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a disk of its own that its namespaces of users can use")
    unasked = "nocloud.check_room = lambda *rest, **named: None\nsys.exit(nocloud.main(['nocloud', *sys.argv[1:]]))"
    tried = done = 0
    with Apart(tmp_path / "home") as cloud:
        add_blank(cloud)
        while done < 2:  # twice: it fits
            assert tried < 400, "it never had room enough"
            clones(cloud, 2)
            for vm in (VM, "pf/web/web01"):
                put(cloud, 7, "1M", vm)
            before = images(cloud)
            if line in ("rollback one -y", "snapshot --delete one"):
                cloud.run("vmsnapshot", "one", "-g", "pf").ok()
                put(cloud, 7, "2M")
            cloud.run("vmstart", "-g", "pf").ok()
            files = cloud.files()
            cloud.resize(max(cloud.used() + (tried << 15), 4096))
            ended = cloud.script(unasked, *line.split(), "-g", "pf")
            cloud.resize(64 << 20)
            told = f"{tried}: {ended!r}"
            assert "Traceback" not in ended.stderr and (ended.status == 0 or ended.stderr), told
            states = {state(cloud), state(cloud, "web01")}
            if ended.status and "rollback" not in line:
                assert states <= {"running", "saved" if "save" in line else ""}, told
            if ended.status and "snapshot one" in line:  # merging what was written to meanwhile takes room
                left = {name for name in cloud.files() - files if "--ram" not in line or ".s1.img" not in name}
                assert not left and states == {"running"}, told
            cloud.run("vmstop", "-g", "pf", "--kill").ok()
            cloud.run("vmstop", "-g", "pf", "--discard").ok()
            cloud.run("vmsnapshot", "next", "-g", "pf").ok()
            for name in {row[0] for row in snapshots(cloud)}:
                cloud.run("vmsnapshot", "--delete", name, "-g", "pf").ok()
            for vm in (VM, "pf/web/web01"):
                assert len(images(cloud, vm)) == len(before) and holds(cloud, 7, "1M", vm), told
                sound(cloud, vm)
            assert not [*cloud.base.rglob(".new-*"), *cloud.base.rglob(".del-*"), *cloud.base.rglob("*.part")], told
            cloud.run("vmstop", "-d", "-g", "pf").ok()
            tried, done = tried + 1, done + (ended.status == 0)
        cloud.run("net", "--private", "down").ok()
    survived(f"a disk that fills up under {line}", tried)
