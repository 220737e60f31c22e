"""Debian clones that wake up instead of booting: each is itself from its first moment on, and stays so."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import Cloud, add_template, eventually
from test_inventory import ansible
from test_supervisor import Run

pytestmark = pytest.mark.long

NAMES = ["web00", "web01"]
WAIT = ("-w", 300)
# What a guest is, a word a line: what must be its own, then what must be as it should be.
WHO = (
    "hostname; cat /etc/hostname /etc/machine-id; cut -d ' ' -f 2 /etc/ssh/ssh_host_ed25519_key.pub;"
    " card=$(ls /sys/class/net | grep -v lo); cat /sys/class/net/$card/address;"
    " ip -4 -o addr show dev $card | awk '{ print $4 }'; echo $card; ls /etc/ssh | grep -c 'host.*key$'"
)


def clones(cloud: Cloud, group: str, *words: object, options: str = "name=web") -> list[str]:
    """Make clones; those that had to boot."""
    done = cloud.run("vminstantiate", "-n", "deb", "-g", group, "-o", options, *words, *WAIT, timeout=500).ok()
    return re.findall(r"(\S+) boots: .*", done.stderr)


def who(cloud: Cloud, vm: str) -> list[str]:
    return cloud.ssh(vm, WHO).ok().lines


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory, debian_image: Path, vms: None) -> Iterator[Cloud]:
    """A cloud with the frozen template `deb`."""
    with Cloud(tmp_path_factory.mktemp("warm") / "home") as cloud:
        add_template(cloud, debian_image, "deb", "--mem", 384, "--cpu", 1, "--init", "systemd")
        done = cloud.run("vmtemplate", "deb", "--warm", timeout=600).ok()
        assert "deb: frozen; its memory takes " in done.stderr
        yield cloud


@pytest.fixture(scope="module")
def warm(frozen: Cloud) -> Cloud:
    """And two clones, which woke up on it."""
    assert clones(frozen, "pf", "-C", 2) == []
    return frozen


def test_no_two_draw_the_same_random_bytes(warm: Cloud) -> None:
    """The first thing that is asked of them. That ssh gets in shows each one's host key at the first contact."""
    drawn = [
        warm.ssh(name, "head -c16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid").ok() for name in NAMES
    ]
    assert drawn[0].lines[0] != drawn[1].lines[0] and drawn[0].lines[1] != drawn[1].lines[1]


def test_each_is_itself(warm: Cloud) -> None:
    rows = {}
    for name in NAMES:
        conf = warm.conf(f"pf/default/{name}")
        key = (warm.folder(f"pf/default/{name}") / "ssh_host_ed25519_key.pub").read_text().split()[1]
        rows[name] = who(warm, name)
        identity = [name, name, conf["vmUuid"].replace("-", ""), key, conf["vmMac"]]
        assert rows[name][:5] == identity and rows[name][7:] == ["1"]
        assert rows[name][5].startswith(conf["vmAddress"] + "/"), "and no address of the template's"
    assert not set(rows["web00"][:6]) & set(rows["web01"][:6]) and rows["web00"][6] == rows["web01"][6]


def test_each_has_the_hosts_time(warm: Cloud) -> None:
    """Though what it remembers is minutes old."""
    for name in NAMES:
        before = time.time()
        told = float(warm.ssh(name, "date +%s.%N").ok().stdout)
        assert before - 1 < told < time.time() + 1


def test_they_reach_each_other(warm: Cloud) -> None:
    assert " 0% packet loss" in warm.ssh("web00", "ping -c 2 -W 30 web01.pf").ok().stdout
    assert " 0% packet loss" in warm.ssh("web01", "ping -c 2 -W 30 web00").ok().stdout


def test_a_playbook(warm: Cloud) -> None:
    """On five."""
    assert clones(warm, "pf", "-C", 3, options="name=more") == []
    book = warm.home / "book.yml"
    book.write_text(
        "- hosts: pf\n  gather_facts: false\n  tasks:\n    - copy: {content: here, dest: /root/played}\n"
        "    - command: grep '[be]0' /etc/hostname\n"
    )
    told = ansible(warm, "ansible-playbook", book, timeout=900).ok().stdout
    assert told.count("failed=0") == 5 and told.count("changed=2") == 5
    for number in range(3):
        warm.run("vmstop", "-d", "-n", f"more0{number}").ok()


def test_nothing_in_it_has_failed(warm: Cloud) -> None:
    said = warm.ssh(
        "web00",
        "systemctl --failed --no-legend --plain; apt-get -q=2 check; echo tried; ip -4 route show default | wc -l;"
        " logger -t waking it goes on; sleep 1; journalctl -q -o cat -t waking; journalctl -q -o cat -b | wc -l",
    ).ok()
    assert said.lines[:3] == ["tried", "1", "it goes on"] and int(said.lines[3]) > 50
    agent = "systemctl is-active nocloud-agent"
    eventually(lambda: warm.ssh("web00", agent).stdout == "inactive\n", "it has told the others", 60)
    named = warm.ssh("web00", "udevadm settle; ls /dev/disk/by-id").ok().lines
    assert {"virtio-web00_0", "virtio-web00_0-part1"} <= set(named) and not [name for name in named if "deb" in name]


def test_one_that_boots_beside_them(warm: Cloud) -> None:
    """It is as they are, its network card too, and they are neighbours."""
    clones(warm, "pf", "--cold", options="name=cold")
    conf, row = warm.conf("pf/default/cold00"), who(warm, "cold00")
    assert row[:3] == ["cold00", "cold00", conf["vmUuid"].replace("-", "")] and row[4] == conf["vmMac"]
    assert row[5].startswith(conf["vmAddress"] + "/") and row[6:] == who(warm, "web00")[6:]
    assert " 0% packet loss" in warm.ssh("web00", "ping -c 2 -W 30 cold00").ok().stdout
    warm.run("vmstop", "-d", "-n", "cold00").ok()


def boot_id(cloud: Cloud, vm: str) -> str:
    return cloud.ssh(vm, "cat /proc/sys/kernel/random/boot_id", timeout=300).stdout


def test_it_reboots_as_itself(warm: Cloud) -> None:
    row, first = who(warm, "web00"), boot_id(warm, "web00")
    warm.ssh("web00", "systemctl reboot")
    eventually(lambda: boot_id(warm, "web00") not in ("", first), "it boots", 300)
    assert who(warm, "web00") == row


def test_it_stops_and_starts_as_itself(warm: Cloud) -> None:
    row, first = who(warm, "web01"), boot_id(warm, "web01")
    warm.ssh("web01", "echo kept >/root/kept").ok()
    warm.run("vmstop", "-n", "web01", timeout=300).ok()
    warm.start("pf/default/web01").ok()
    assert warm.ssh("web01", "cat /root/kept", timeout=300).ok().stdout == "kept\n"
    assert who(warm, "web01") == row and boot_id(warm, "web01") != first


def test_the_time_that_it_is_told_counts(frozen: Cloud) -> None:
    """One that is told an hour more has an hour more, as one has that wakes up an hour after the freeze."""
    line = "import time; real = time.time; time.time = lambda: real() + 3600"
    words = ("vminstantiate", "-n", "deb", "-g", "later", "-o", "name=late", "-w", "300")
    done = frozen.script(f"{line}\nsys.exit(nocloud.main(['nocloud', *sys.argv[1:]]))", *words).ok()
    assert " boots: " not in done.stderr
    told = float(frozen.ssh("late00", "date +%s.%N").ok().stdout)
    assert -1 < told - time.time() - 3600 < 1
    frozen.run("vmstop", "-d", "-g", "later").ok()


def test_under_vmrun(frozen: Cloud) -> None:
    (frozen.home / "shop").write_text("deb:2:web:name=shop;dsk=1\n")
    vmrun = Run(frozen, "-f", frozen.home / "shop", env={})
    for name in ("shop00", "shop01"):
        vmrun.says(f"{name} is ready", 300)
        assert any(re.fullmatch(rf"{name} woke up in \d+\.\d s", line) for line in vmrun.log())
    sizes = frozen.ssh("shop00", "lsblk -bnro SIZE /dev/disk/by-id/virtio-shop00_1").ok().stdout
    assert sizes == f"{1 << 30}\n"
    vmrun.signal(signal.SIGINT)
    vmrun.ends(0, 300)
    assert "shop" not in frozen.groups()


@pytest.mark.parametrize("seconds", [3, 40])
def test_a_freeze_that_is_interrupted(frozen: Cloud, seconds: int) -> None:
    """The template is what it was, and its clones wake up."""

    def files() -> set[str]:
        return frozen.files() - {"templates/deb/deb.command"}  # it goes with the layer that it would write to

    before = files()
    freeze = frozen.spawn("vmtemplate", "deb", "--warm")
    with pytest.raises(subprocess.TimeoutExpired):
        freeze.wait(seconds)
    freeze.send_signal(signal.SIGINT)
    assert freeze.wait(60) == 130
    assert files() == before
    assert clones(frozen, "again") == []
    frozen.run("vmstop", "-d", "-g", "again").ok()


# Says how far it is to its neighbours, five times a second, and keeps what it hears of them; a number that isn't higher
# than the last one of that neighbour is from before what is remembered here. One a second goes to the disk.
COUNT = """
import os, socket, sys, time
name, others = sys.argv[1], sys.argv[2:]
line = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
line.bind(("", 4444))
line.settimeout(0.2)
seen, number, began = {}, 0, time.monotonic()
def keep(path, text):
    with open(path + ".new", "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(path + ".new", path)
while True:
    number += 1
    for other in others:
        try:
            line.sendto(f"{name} {number}".encode(), (other, 4444))
        except OSError:
            pass
    until = time.monotonic() + 0.2
    while time.monotonic() < until:
        try:
            who, _, told = line.recv(99).decode().partition(" ")
        except OSError:
            continue
        if int(told) <= seen.get(who, 0):
            keep("/root/wrong", f"{who} said {told} after {seen[who]}")
        seen[who] = int(told)
    with open("/run/count", "w") as file:
        file.write(f"{number} {min(seen.values(), default=0)}")
    if number % 5 == 0:
        keep("/root/count", str(number))
"""


@pytest.fixture(scope="module")
def busy(frozen: Cloud) -> Iterator[list[str]]:
    """Three clones that tell each other how far they are."""
    names = [f"load0{number}" for number in range(3)]
    assert clones(frozen, "busy", "-C", 3, options="name=load") == []
    for name in names:
        words = shlex.join(["python3", "-c", COUNT, name, *(f"{each}.busy" for each in names if each != name)])
        frozen.ssh(name, f"setsid {words} >/root/said 2>&1 </dev/null &").ok()
    yield names
    frozen.run("vmstop", "-d", "-g", "busy", "-y").ok()


def counts(cloud: Cloud, name: str) -> tuple[int, int]:
    """How far it is, and the least that it has heard of a neighbour since it runs."""
    told = cloud.ssh(name, "cat /run/count; test ! -e /root/wrong || cat /root/wrong").ok().stdout.split()
    assert len(told) == 2, told
    return int(told[0]), int(told[1])


def all_heard(cloud: Cloud, names: list[str], more: int = 10) -> None:
    """Each hears of each: numbers that are higher than all that were said until now."""
    highest = max(counts(cloud, name)[0] for name in names)
    eventually(lambda: all(counts(cloud, name)[1] > highest + more for name in names), "they hear each other", 120)


def test_a_group_goes_back_in_time_together(frozen: Cloud, busy: list[str]) -> None:
    all_heard(frozen, busy)
    low = {name: counts(frozen, name)[0] for name in busy}
    frozen.run("vmsnapshot", "ram", "-g", "busy", "--ram", timeout=300).quiet()
    high = {name: counts(frozen, name)[0] for name in busy}
    all_heard(frozen, busy, 50)
    frozen.run("vmrollback", "ram", "-g", "busy", timeout=300).ok()
    now = {name: counts(frozen, name)[0] for name in busy}
    assert all(low[name] <= now[name] for name in busy) and min(high.values()) > min(low.values())
    all_heard(frozen, busy)
    for _ in range(2):  # as often as one likes
        frozen.run("vmrollback", "ram", "-g", "busy", timeout=300).ok()
    all_heard(frozen, busy)


def test_a_group_is_saved_and_goes_on_together(frozen: Cloud, busy: list[str]) -> None:
    frozen.run("vmstop", "--save", "-g", "busy", timeout=300).quiet()
    frozen.start(*(f"busy/default/{name}" for name in busy)).ok()
    all_heard(frozen, busy)


def test_disks_go_back_together(frozen: Cloud, busy: list[str]) -> None:
    """Without memory: each boots, its file system is sound, and nothing on it is later than the snapshot."""
    frozen.run("vmsnapshot", "disks", "-g", "busy").quiet()
    high = {name: counts(frozen, name)[0] for name in busy}
    all_heard(frozen, busy)
    frozen.run("vmrollback", "disks", "-g", "busy", timeout=300).ok()
    for name in busy:
        said = frozen.ssh(name, "cat /root/count; echo; journalctl -k -q -o cat | grep -c 'EXT4-fs error'", timeout=600)
        number, errors = said.stdout.split()
        assert 0 < int(number) <= high[name] and errors == "0"


def test_snapshots_leave_no_trace(warm: Cloud) -> None:
    """Twenty are taken of a guest that writes, four are kept at a time: then its disk has what was written, and stands
    on what it stood on."""

    def chain() -> list[str]:
        disk = warm.base / warm.conf("pf/default/web01")["vmDisk"]
        info = warm.execute(["qemu-img", "info", "-U", "--backing-chain", disk]).ok().stdout
        return [Path(path).parent.name for path in re.findall(r"^image: (.*)$", info, re.M)]

    before, sums = chain(), []
    for number in range(20):
        made = f"head -c 2000000 /dev/urandom >/root/file{number}; sync; md5sum </root/file{number}"
        sums.append(warm.ssh("web01", made).ok().stdout)
        warm.run("vmsnapshot", f"number{number}", "-n", "web01").quiet()
        if number >= 4:
            warm.run("vmsnapshot", "--delete", f"number{(number - 4 * (number % 2))}", "-n", "web01").quiet()
    for row in warm.run("vmsnapshot", "-L", "-g", "pf").ok().lines:
        warm.run("vmsnapshot", "--delete", row.split()[0], "-n", "web01").quiet()
    assert chain() == before
    read = "sync; echo 3 >/proc/sys/vm/drop_caches; for n in $(seq 0 19); do md5sum </root/file$n; done"
    assert warm.ssh("web01", read).ok().stdout == "".join(sums)
    warm.run("vmstop", "-n", "web01", timeout=300).ok()
    disk = warm.base / warm.conf("pf/default/web01")["vmDisk"]
    warm.execute(["qemu-img", "check", "-q", disk]).ok()
