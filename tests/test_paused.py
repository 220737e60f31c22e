"""Guests that don't run though their qemu does: shown as what they are, and what mends it is said and done."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import READY, Cloud, add_template, eventually

VM = "pf/web/web00"
FILL = "tr '\\0' x </dev/zero | head -c 20000000 >/data/big; sync"


def row(cloud: Cloud, *options: str, name: str = "vmrunning") -> list[str]:
    return next(line for line in cloud.run(name, *options).ok().lines if line.startswith("web00")).split()[:-1]


def shown(cloud: Cloud, state: str) -> bool:
    return row(cloud) == ["web00", "pf/web", *state.split()]


@pytest.fixture
def web00(tiny: Cloud) -> Cloud:
    clone(tiny)
    return tiny


def clone(cloud: Cloud) -> None:
    cloud.run("vminstantiate", "-n", "tiny", "-g", "pf", "-t", "web", "-o", "name=web", "-w", READY).ok()


@pytest.fixture
def small(cloud: Cloud, tiny_image: Path, vms: None) -> Iterator[Cloud]:
    """The same on a file system of its own."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a tmpfs")
    cloud.base.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "nocloud-test", cloud.base], check=True)
    try:
        add_template(cloud, tiny_image)
        clone(cloud)
        yield cloud
        cloud.run("vmstop", "-d", "-g", "pf").ok()
        cloud.run("net", "--private", "down")
    finally:
        subprocess.run(["umount", "-l", cloud.base], check=True)


def fill(cloud: Cloud) -> Path:
    """Leave 2 MB; the file that has the rest."""
    info = os.statvfs(cloud.base)
    ballast = cloud.base / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, info.f_bavail * info.f_frsize - (2 << 20))
    return ballast


def test_a_full_disk(small: Cloud) -> None:
    """It is shown, named and told, and nothing that the guest wrote is lost."""
    ballast = fill(small)
    writer = small.spawn("vmssh", "web00", FILL)
    eventually(lambda: shown(small, "paused (disk full)"), "it is paused", 60)
    assert row(small, "-a") == row(small, name="vminventory") == ["web00", "pf/web", "paused", "(disk", "full)"]
    room = f"vmresume -n web00  # once there is room in {small.folder(VM)}"
    small.ssh("web00", "true").says(1, "web00: it is paused (disk full)", room)
    asked = small.run("vmstop", "-g", "pf")
    asked.says(1, "web00: it is paused (disk full)", f"{room}; --kill switches it off as it is")
    told = small.run("doctor", "vms").stdout.splitlines()
    at = told.index("warning  vms: pf/web/web00 is paused (disk full)")
    assert told[at + 1].strip() == room
    vmrun = small.spawn("vmrun", "-r", "pf", env={"NOCLOUD_vmWaitTimeout": "5"})
    assert vmrun.stdout
    said = ""
    while "goes on when there is room in" not in said:
        said = vmrun.stdout.readline()
        assert said, vmrun.wait()
    ballast.unlink()
    while "web00 goes on" not in said:
        said = vmrun.stdout.readline()
        assert said, vmrun.wait()
    assert writer.wait(60) == 0
    assert shown(small, "") and row(small, "-a") == ["web00", "pf/web", "running"]
    vmrun.send_signal(signal.SIGHUP)
    vmrun.wait(30)
    count = "tr -d x </data/big | wc -c; wc -c </data/big"
    assert small.ssh("web00", count).ok().stdout.split() == ["0", "20000000"]


@pytest.mark.long
def test_room_again(small: Cloud) -> None:
    """vmssh, and vmstop, have it go on."""
    for number in range(2):
        ballast = fill(small)
        writer = small.spawn("vmssh", "web00", FILL.replace("big", f"big{number}").replace("20000000", "9000000"))
        eventually(lambda: shown(small, "paused (disk full)"), "it is paused", 60)
        ballast.unlink()
        if number:
            small.run("vmstop", "-n", "web00").quiet()
            writer.kill()
        else:
            assert small.ssh("web00", "echo here").ok().stdout == "here\n"
            assert writer.wait(60) == 0
    assert not small.run("vmrunning").ok().lines


def test_one_that_was_paused_by_hand(web00: Cloud) -> None:
    web00.run("vmmanage", "-n", "web00", "stop").ok()
    assert row(web00, "-a") == row(web00) == ["web00", "pf/web", "paused"]
    web00.ssh("web00", "true").says(1, "web00: it is paused", "vmresume -n web00")
    web00.run("vmstop", "-g", "pf").quiet()


@pytest.mark.long
def test_one_that_has_shut_down_and_stays(tiny: Cloud) -> None:
    """No power button helps there, so nothing is waited for."""
    conf = tiny.base / "templates/tiny/tiny.conf"
    conf.write_text(conf.read_text() + "vmExtraOpts=-no-shutdown\n")
    clone(tiny)
    tiny.ssh("web00", "poweroff")
    eventually(lambda: shown(tiny, "shutdown"), "it has shut down")
    tiny.ssh("web00", "true").says(1, "web00: it is shutdown", "vmstop --kill -n web00")
    assert tiny.run("vmstop", "-g", "pf", "--timeout", 60).ok().seconds < 30


def test_a_qemu_that_does_not_answer(blank: Cloud) -> None:
    """Lists take a second longer, for all of them together, and go by what is known."""
    blank.run("vminstantiate", "-n", "blank", "-C", 3, "-g", "pf", "-o", "name=web").ok()
    names = [f"web0{number}" for number in range(3)]
    os.kill(blank.qemu("pf/default/web00"), signal.SIGSTOP)
    with socket.socket(socket.AF_UNIX) as other:
        place = os.open(blank.folder("pf/default/web01"), os.O_PATH)
        other.connect(f"/proc/self/fd/{place}/qmp.sock")
        os.close(place)
        started = time.monotonic()
        listed = blank.run("vmrunning", "-a", "-g", "pf").ok().lines
        assert time.monotonic() - started < 5
    assert [line.split()[:3] for line in listed] == [[name, "pf/default", "running"] for name in names]
    os.kill(blank.qemu("pf/default/web00"), signal.SIGCONT)


def test_what_a_stop_waits_for(blank: Cloud) -> None:
    """It is told once, after 3 s."""
    blank.run("vminstantiate", "-n", "blank", "-g", "pf", "-o", "name=web").ok()
    done = blank.run("vmstop", "-g", "pf", "--timeout", 7).ok()
    told, warned = done.stderr.splitlines()
    assert told.endswith(": waiting for web00 to shut down, for up to 7 s"), repr(done)
    assert re.search("warning: no shutdown within 7 s, switched off: web00", warned)
