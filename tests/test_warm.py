"""Debian clones that wake up instead of booting: each is itself from its first moment on, and stays so."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import Cloud, add_template
from test_inventory import ansible

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
    book = warm.home / "book.yml"
    book.write_text(
        "- hosts: pf\n  gather_facts: false\n  tasks:\n    - copy: {content: here, dest: /root/played}\n"
        "    - command: grep web0 /etc/hostname\n"
    )
    told = ansible(warm, "ansible-playbook", book).ok().stdout
    assert told.count("failed=0") == 2 and told.count("changed=2") == 2
