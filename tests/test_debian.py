"""A Debian template built from packages, and what users do with clones of it. Built once per test run."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from support import PROGRAM, Cloud, kill_hard
from test_inventory import ansible, program

WAIT = "280"


@pytest.fixture(scope="module")
def names(request: pytest.FixtureRequest) -> list[str]:
    """One clone, which takes long enough; two with --long."""
    return ["deb00", "deb01"] if request.config.getoption("--long") else ["deb00"]


@pytest.fixture(scope="module")
def clones(debian: Cloud, names: list[str]) -> Cloud:
    words = ("-g", "pf", "-t", "db", "-C", len(names), "-o", "name=deb;disk=12", "-w", WAIT)
    assert debian.run("vminstantiate", "-n", "deb", *words, timeout=900).ok().lines == names
    return debian


def test_the_template_is_clean(debian: Cloud) -> None:
    conf = debian.conf("templates/deb")
    assert (conf["vmInit"], conf["vmUser"], conf["vmMem"]) == ("systemd", "root", "384")
    assert os.listdir(debian.base / "templates") == ["deb"]
    row = debian.run("vmtemplate", "-L").ok().stdout
    assert row.startswith("deb ") and "bookworm" in row
    disk = debian.base / "templates/deb/deb_0.img"
    assert disk.stat().st_mode & 0o222 == 0 and disk.stat().st_blocks * 512 < 1 << 30
    debian.run("vmtemplate", "deb", "--build", "bookworm").fails(1, "already")


def test_each_has_a_name_an_identity_and_keys_of_its_own(clones: Cloud, names: list[str]) -> None:
    ids = set()
    for name in names:
        script = "hostname -f; getent hosts localhost | tr -s ' ' | cut -d ' ' -f 2; hostname;"
        script += "cat /etc/hostname /etc/machine-id; ls /etc/ssh/ssh_host_*_key; systemctl is-system-running"
        full, local, *words = clones.ssh(name, script).stdout.split()
        assert (full, words[:2]) == (f"{name}.pf.nocloud", [name, name]) and local == "localhost"
        ids.add(words[2])
        assert words[3:-1] == ["/etc/ssh/ssh_host_ed25519_key"]
        assert words[-1] in ("running", "degraded", "starting")
        planted = (clones.folder(f"pf/db/{name}") / "ssh_host_ed25519_key.pub").read_text().split()[1]
        assert planted in clones.ssh(name, "cat /etc/ssh/ssh_host_ed25519_key.pub").ok().stdout
    assert len(ids) == len(names)
    known = (clones.base / ".known_hosts").read_text()
    assert known.count("\n") == len(names) and "ecdsa" not in known


def test_our_way_in_is_a_file_of_our_own(clones: Cloud) -> None:
    """Whatever becomes of the login's own list of keys."""
    clones.ssh("deb00", "rm /root/.ssh/authorized_keys").ok()
    ours = (clones.home / "config/nocloud/id_ed25519.pub").read_text()
    assert clones.ssh("deb00", "ls -A /root/.ssh; cat /etc/ssh/nocloud_keys").ok().stdout == ours


def test_the_root_file_system_fills_a_larger_disk(clones: Cloud) -> None:
    """The template has 10 GB, the clones 12: at the first boot the partition and what is in it have grown."""
    script = "cd /sys/block/vda; cat size vda1/size; df -B512 --output=size / | tail -n 1; ls /usr/lib/nocloud"
    disk, partition, size, *files = clones.ssh("deb00", script).ok().stdout.split()
    assert int(disk) == 12 << 21 and int(partition) == (12 << 21) - 2048 - 32768
    assert int(size) > 0.97 * int(disk) and files == ["grow", "resolv"]


SPIN = """
import os, subprocess, sys, time
sys.path.insert(0, "/root")
import nocloud
child = subprocess.Popen([*nocloud.scope_words(20), "sh", "-c", "while :; do :; done"])
while nocloud.process_file(child.pid, "comm") != "sh\\n":
    time.sleep(0.1)
limited, before = nocloud.limit_process(child.pid, 20, "none"), nocloud.process_usage(child.pid)
time.sleep(10)
after = nocloud.process_usage(child.pid)
print(limited, (after[1] - before[1]) / (after[0] - before[0]), nocloud.process_file(child.pid, "cgroup"))
child.kill()
"""


@pytest.mark.long
def test_a_scope_of_systemd_limits_processor_time(clones: Cloud) -> None:
    """What a start does where systemd runs, measured there."""
    clones.run("vmcp", PROGRAM, "deb00:/root/").quiet()
    limited, part, cgroup = clones.ssh("deb00", f"python3 -c '{SPIN}'").ok().stdout.split()
    assert limited == "True" and 0.1 < float(part) < 0.25 and re.search(r"/run-\w+\.scope$", cgroup)


@pytest.mark.long
def test_they_reach_each_other_by_name(clones: Cloud) -> None:
    address = clones.conf("pf/db/deb01")["vmAddress"]
    for name in ("deb01", "deb01.pf", "deb01.pf.nocloud"):
        assert clones.ssh("deb00", f"getent ahostsv4 {name}").ok().stdout.startswith(address)
    assert "SSH-2.0" in clones.ssh("deb00", "bash -c 'exec 3<>/dev/tcp/deb01/22; head -c 8 <&3'").ok().stdout


@pytest.mark.long
def test_ansible_pings_all(clones: Cloud) -> None:
    done = ansible(clones, "ansible", "all", "-m", "ping").ok()
    assert done.stdout.count('"ping": "pong"') == 2 and done.stdout.count("SUCCESS") == 2


PLAY = """\
- hosts: type_db
  become: true
  tasks:
    - ansible.builtin.user: {name: ann}
    - ansible.builtin.command: id -un
      become_user: ann
      become_method: ansible.builtin.su  # sudo isn't in a guest that nocloud builds
      register: who
    - ansible.builtin.copy: {content: "{{ who.stdout }} {{ ansible_hostname }}", dest: /root/who}
    - ansible.builtin.fail: {msg: on purpose}
      when: inventory_hostname == broken | default('')
"""


@pytest.mark.long
def test_a_playbook_as_people_have_them(clones: Cloud, names: list[str]) -> None:
    """An inventory folder with a link of its own name, become, pipelining, @retry, and molecule's arguments for ssh."""
    inventory, play = clones.home / "inventory", clones.home / "site.yml"
    inventory.mkdir()
    (inventory / "my_inventory").symlink_to(PROGRAM)
    play.write_text(PLAY)
    env = {
        "ANSIBLE_PIPELINING": "True",
        "ANSIBLE_RETRY_FILES_ENABLED": "True",
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_SSH_ARGS": "-o ControlMaster=no -o ForwardX11=no -o LogLevel=ERROR -o IdentitiesOnly=yes "
        "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null",
        "NOCLOUD_vmInventoryHosts": "name",
        "PATH": f"{Path(program('ansible')).parent}:{clones.env['PATH']}",
    }
    argv = [program("ansible-playbook"), "-i", inventory, play]
    failed = clones.execute([*argv, "-e", f"broken={names[1]}"], env=env, timeout=900)
    assert failed.status == 2 and (clones.home / "site.retry").read_text() == f"{names[1]}\n"
    again = clones.execute([*argv, "--limit", f"@{clones.home}/site.retry"], env=env, timeout=900).ok()
    assert names[1] in again.stdout and names[0] not in again.stdout
    for name in names:
        assert clones.ssh(name, "cat /root/who").ok().stdout == f"ann {name}"


@pytest.mark.long
def test_restarted_with_one_disk_more_it_is_the_same(clones: Cloud) -> None:
    """Off and on again: address, MAC, host key and data are the same; so is the card's name, though a disk came."""
    before = clones.conf("pf/db/deb01")
    card = clones.ssh("deb01", "ls /sys/class/net | grep -v lo; ip -br link | grep -v ^lo").ok().stdout
    assert before["vmMac"] in card
    clones.ssh("deb01", "echo kept > /root/file").ok()
    clones.run("vmstop", "-n", "deb01", "--timeout", 90, timeout=120).quiet()
    disk = clones.folder("pf/db/deb01") / "deb01_1.img"
    clones.execute(["qemu-img", "create", "-q", "-f", "qcow2", disk, "1G"]).ok()
    conf = clones.folder("pf/db/deb01") / "deb01.conf"
    text = re.sub(r"^vmExtraDisk=.*$", "vmExtraDisk=pf/db/deb01/deb01_1.img", conf.read_text(), flags=re.M)
    conf.write_text(text)
    clones.start("pf/db/deb01").ok()
    assert clones.ssh("deb01", "cat /root/file; hostname", timeout=300).ok().stdout == "kept\ndeb01\n"
    shown = clones.ssh("deb01", "ls /sys/class/net | grep -v lo; ip -br link | grep -v ^lo").ok().stdout
    assert shown.split()[0] == card.split()[0] and before["vmMac"] in shown
    assert clones.ssh("deb01", "lsblk -no SIZE /dev/vdb; ls /dev/disk/by-id").ok().stdout.split()[:1] == ["1G"]
    after = clones.conf("pf/db/deb01")
    assert {key: after[key] for key in ("vmUuid", "vmMac", "vmAddress")} == {
        key: before[key] for key in ("vmUuid", "vmMac", "vmAddress")
    }
    journal = clones.ssh("deb01", "journalctl -b -1 -n 3 --no-pager 2>&1 || true").stdout
    assert "corrupt" not in journal


def test_the_end(clones: Cloud) -> None:
    """The last test of the module: a clone is killed, the group is destroyed; the template stays."""
    kill_hard(clones.qemu("pf/db/deb00"))
    clones.run("vmstop", "-d", "-g", "pf").quiet()
    assert not clones.processes()
    assert sorted(path.name for path in clones.base.iterdir()) == ["templates"]
