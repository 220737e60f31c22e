"""Clone, start, wait, stop, destroy: with real qemu and real guests."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random

import pytest
import tinyguest
from support import (
    READY,
    Cloud,
    Result,
    add_blank,
    add_template,
    eventually,
    interfaces,
    is_alive,
    kill_hard,
    link_programs,
    nothing_made,
    pids,
    proc_words,
    processes_with,
    replace_program,
    until,
)

import nocloud

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a tmpfs")


def instantiate(cloud: Cloud, *words: object, template: str = "blank", env: dict[str, str] | None = None) -> Result:
    return cloud.run("vminstantiate", "-n", template, *words, env=env)


def qemus(cloud: Cloud) -> list[int]:
    return [pid for pid, words in cloud.processes().items() if "qemu-system" in words.split(" ", 1)[0]]


def taps(cloud: Cloud) -> list[str]:
    shown = cloud.run("net", "exec", "ip", "-o", "link").ok().stdout
    return re.findall(r"\b(tap[0-9a-f]+)", shown)


def rows(cloud: Cloud, *words: str) -> list[list[str]]:
    return [line.split() for line in cloud.run("vmrunning", *words).ok().lines]


# Guests that boot ####################################################################################


@pytest.fixture(scope="module")
def pair(shared: Cloud, guest_cache: Path) -> Cloud:
    """web00 and web01 of pf/web, ready, with two data disks each.

    Their guest asks for its address with the same DHCP client id, as clones with one machine-id do, and configures a
    network card of this name only: that both answer shows that neither troubles them.
    """
    add_template(shared, tinyguest.build(guest_cache, ifname="enp0s3", client_id="ff00112233"), "picky")
    words = ("-g", "pf", "-t", "web", "-C", 2, "-o", "name=web;dsk=1,2", "-w", READY)
    assert instantiate(shared, *words, template="picky").ok().lines == ["web00", "web01"]
    return shared


def test_ready_clones_answer(pair: Cloud) -> None:
    for name in ("web00", "pf/web01", "pf/web/web00"):
        assert pair.ssh(name, "hostname").ok().stdout.strip() == name[-5:]
    listed = rows(pair)
    assert [row[:2] for row in listed] == [["web00", "pf/web"], ["web01", "pf/web"]]
    assert pair.ssh(listed[1][2], "hostname").ok().stdout == "web01\n"  # by address


def test_conf_of_a_clone(pair: Cloud) -> None:
    confs = [pair.conf("pf/web/web00"), pair.conf("pf/web/web01")]
    for name, conf in zip(("web00", "web01"), confs):
        digits = conf["vmUuid"].replace("-", "")
        assert conf["vmMac"] == f"00:50:56:{digits[:2]}:{digits[2:4]}:{digits[4:6]}"
        assert conf["vmDisk"] == f"pf/web/{name}/{name}_0.img"
        assert conf["vmExtraDisk"] == f"pf/web/{name}/{name}_1.img,pf/web/{name}/{name}_2.img"
        wanted = {"vmName": name, "vmMem": "96", "vmCpu": "1", "vmTemplate": "picky", "vmNetwork": "private"}
        assert wanted.items() <= conf.items()
        assert re.fullmatch(r"pc-q35-\d+\.\d+", conf["vmMachine"])
    for key in ("vmUuid", "vmMac", "vmAddress"):
        assert confs[0][key] != confs[1][key]


def test_clone_is_a_small_overlay_by_relative_path(pair: Cloud) -> None:
    disk = pair.folder("pf/web/web01") / "web01_0.img"
    info = json.loads(pair.execute(["qemu-img", "info", "-U", "--output=json", disk]).ok().stdout)
    assert info["backing-filename"] == "../../../templates/picky/picky_0.img"
    assert info["backing-filename-format"] == "qcow2"
    template = pair.base / "templates/picky/picky_0.img"
    assert template.stat().st_mode & 0o222 == 0


def test_data_disks_are_vdb_and_vdc(pair: Cloud) -> None:
    script = "cd /sys/block; for d in vdb vdc; do cat $d/size $d/serial; echo; done"
    script += "; readlink -f /dev/disk/by-id/virtio-web00_1"
    words = pair.ssh("web00", script).ok().stdout.split()
    assert words == [str(1 << 21), "web00_1", str(2 << 21), "web00_2", "/dev/vdb"]


def test_vms_reach_each_other_by_every_name(pair: Cloud) -> None:
    address = pair.conf("pf/web/web01")["vmAddress"]
    for name in ("web01", "web01.pf", "web01.pf.nocloud", address):
        assert f"({address})" in pair.ssh("web00", f"ping -c 1 -W 5 {name}").ok().stdout


def test_vmssh_passes_stdin_words_and_status_through(pair: Cloud) -> None:
    done = pair.run("vmssh", "web00", "cat; exit 7", input="one\ntwo\n")
    assert (done.status, done.stdout, done.stderr) == (7, "one\ntwo\n", "")
    assert pair.ssh("web00", "echo", "-n", "a  b", "--", "-C5").ok().stdout == "a b -- -C5"


def test_vmssh_leaves_the_users_known_hosts_alone(pair: Cloud) -> None:
    pair.ssh("web00", "true").ok()
    assert not (pair.home / ".ssh/known_hosts").exists()


def test_modes_of_what_is_secret(pair: Cloud) -> None:
    folder = pair.folder("pf/web/web00")
    assert folder.stat().st_mode & 0o777 == 0o700
    for name in ("ssh_host_ed25519_key", "credentials", "web00.pid", "web00.log"):
        assert (folder / name).stat().st_mode & 0o077 == 0, name
    assert (pair.home / "config/nocloud/id_ed25519").stat().st_mode & 0o777 == 0o600
    assert (pair.home / "config/nocloud").stat().st_mode & 0o777 == 0o700


def secrets(cloud: Cloud) -> list[str]:
    """A piece of each private key, as text and as the base64 of a credential would hold it."""
    import base64

    found = []
    for path in [cloud.home / "config/nocloud/id_ed25519", *cloud.base.rglob("ssh_host_ed25519_key")]:
        body = path.read_text()
        found += [body.splitlines()[2], base64.b64encode(body.encode()).decode()[80:140]]
    for path in cloud.base.rglob("credentials"):
        found.append(path.read_text().partition("tmpfiles.extra=")[2][80:140])
    assert len(found) >= 4 and all(len(text) >= 40 for text in found)
    return found


def test_key_material_is_nowhere(pair: Cloud) -> None:
    done = pair.run("vminstantiate", "--debug", "-n", "tiny", "-g", "keys", "-o", "name=k").ok()
    assert "+ " in done.stderr
    texts = {"--debug": done.stderr + done.stdout}
    for pid in pids():
        texts[f"/proc/{pid}/cmdline"] = " ".join(proc_words(pid, "cmdline"))
    for folder in (pair.folder("pf/web/web00"), pair.folder("keys/default/k00"), pair.base / ".net"):
        for path in folder.rglob("*"):
            if path.suffix in (".command", ".log", ".conf") or ".net" in path.parts:
                texts[str(path)] = path.read_text() if path.is_file() else ""
    for secret in secrets(pair):
        assert not [place for place, text in texts.items() if secret in text]
    assert any("credentials" in text for place, text in texts.items() if place.endswith(".command"))
    pair.run("vmstop", "-d", "-g", "keys").quiet()


def test_qemu_runs_in_its_sandbox_and_its_own_session(pair: Cloud) -> None:
    pid = pair.qemu("pf/web/web00")
    status = Path(f"/proc/{pid}/status").read_text()
    assert "Seccomp:\t2" in status
    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/cwd") == str(pair.folder("pf/web/web00"))
    out = os.readlink(f"/proc/{pid}/fd/1")
    assert out == str(pair.folder("pf/web/web00") / "web00.log")


def test_a_running_vm_is_not_started_twice(pair: Cloud) -> None:
    before = pair.qemu("pf/web/web00")
    pair.start("pf/web/web00").says(1, "web00: it is running already")
    assert pair.qemu("pf/web/web00") == before and is_alive(before)


def test_console_log_has_what_the_guest_said(pair: Cloud) -> None:
    assert "tinyguest: ready" in (pair.folder("pf/web/web00") / "console.log").read_text(errors="replace")


def test_stopped_and_started_it_is_the_same_vm(pair: Cloud) -> None:
    """A file written one second before a proper stop survives, and everything by which the VM is known."""
    before = pair.conf("pf/web/web01")
    key = pair.ssh("web01", "dropbearkey -y -f /etc/dropbear/dropbear_ed25519_host_key | grep ssh-").ok().stdout
    pair.ssh("web01", "echo kept > /root/file").ok()
    started = time.monotonic()
    pair.run("vmstop", "-n", "web01").quiet()
    assert time.monotonic() - started < 30  # by the power button, not the timeout
    assert "stopped" in pair.run("vmrunning", "-a").ok().lines[1].split()
    assert [row[0] for row in rows(pair)] == ["web00"]
    pair.run("vmstop", "-n", "web01").quiet()  # stopped already

    pair.start("web01").ok()
    assert pair.ssh("web01", "cat /root/file; hostname").ok().stdout == "kept\nweb01\n"
    assert pair.ssh("web01", "dropbearkey -y -f /etc/dropbear/dropbear_ed25519_host_key | grep ssh-").ok().stdout == key
    after = pair.conf("pf/web/web01")
    assert {name: after[name] for name in ("vmUuid", "vmMac", "vmAddress")} == {
        name: before[name] for name in ("vmUuid", "vmMac", "vmAddress")
    }
    assert before["vmMac"] in pair.ssh("web01", "ip link").ok().stdout


@pytest.mark.long
def test_killed_qemu_is_listed_no_more_and_starts_again(pair: Cloud) -> None:
    pid = pair.qemu("pf/web/web01")
    assert len(taps(pair)) == 2
    kill_hard(pid)
    assert [row[0] for row in rows(pair)] == ["web00"]
    eventually(lambda: len(taps(pair)) == 1, "the tap of the killed qemu is gone")
    pair.start("pf/web/web01").ok()
    assert pair.qemu("pf/web/web01") != pid
    assert pair.ssh("web01", "cat /root/file").ok().stdout == "kept\n"
    assert len(taps(pair)) == 2


@pytest.mark.long
def test_command_file_starts_the_same_vm_by_hand(pair: Cloud) -> None:
    """web01.command, run as a user would: the VM is seen, reached and stopped like any other."""
    pair.run("vmstop", "-n", "web01").quiet()
    child = subprocess.Popen(
        [pair.folder("pf/web/web01") / "web01.command"],
        env=pair.env,
        cwd=pair.home,
        stdin=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: len(rows(pair)) == 2 or child.poll() is not None, "web01 runs by hand")
        assert child.poll() is None, "it ended"
        assert pair.ssh("web01", "hostname").ok().stdout == "web01\n"
        pair.run("vmstop", "-n", "web01").quiet()
        assert child.wait(10) == 0
    finally:
        child.kill()
        child.wait()


def test_destroyed_nothing_of_it_is_left(pair: Cloud) -> None:
    """The last test with the pair: one type, then the group, then the network goes with its last VM."""
    words = ("-g", "pf", "-t", "sql", "-o", "name=db")
    assert instantiate(pair, *words, template="tiny").ok().lines == ["db00"]
    pair.run("vmstop", "-d", "-g", "pf", "-t", "web").quiet()
    assert [row[0] for row in rows(pair, "-a")] == ["db00", "picky", "tiny"]
    assert not (pair.base / "pf/web").exists()
    pair.run("vmstop", "-dg", "pf").quiet()
    assert not (pair.base / "pf").exists()
    assert {path.name for path in pair.base.iterdir()} == {"templates"}
    assert not pair.processes()
    pair.run("vmstop", "-d", "-g", "pf").fails(0, "pf: no such group, so there is nothing to destroy")


# Names and numbers ###################################################################################


def fake_vm(cloud: Cloud, vm: str) -> None:
    """A stopped VM, as far as names go."""
    folder = cloud.folder(vm)
    folder.mkdir(parents=True)
    (folder / f"{folder.name}.conf").write_text(f"vmName={folder.name}\n")


def test_names_go_on_after_the_highest(blank: Cloud) -> None:
    words = ("-g", "pf", "-t", "web", "-o", "name=web")
    assert instantiate(blank, *words, "-C", 12).ok().lines == [f"web{number:02d}" for number in range(12)]
    assert len(qemus(blank)) == 12
    blank.run("vmstop", "-d", "-n", "web03").quiet()
    assert instantiate(blank, "-g", "pf", "-t", "sql", "-o", "name=WEB").ok().lines == ["WEB12"]  # names have no case
    fake_vm(blank, "pf/web/web99")
    assert instantiate(blank, *words).ok().lines == ["web100"]
    macs = {blank.conf(f"pf/web/web{number:02d}")["vmMac"] for number in (0, 1, 2, *range(4, 12))}
    assert len(macs) == 11


def test_a_prefix_is_not_another_one(blank: Cloud) -> None:
    for name in ("web7", "webs41", "web-05", "web"):
        fake_vm(blank, f"pf/web/{name}")
    assert instantiate(blank, "-g", "pf", "-t", "web", "-o", "name=web").ok().lines == ["web00"]


def test_without_a_prefix_names_are_uuids(blank: Cloud) -> None:
    names = instantiate(blank, "-C", 2).ok().lines
    for name in names:
        assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", name)
        assert blank.conf(f"group/default/{name}")["vmUuid"] == name
    assert len(set(names)) == 2


def test_two_shells_at_once_never_collide(blank: Cloud) -> None:
    """Ten clones from each of two shells, twice: names, MACs and addresses are all different."""
    words = ("-n", "blank", "-g", "pf", "-t", "web", "-C", 10, "-o", "name=web;mem=16")
    names: list[str] = []
    for _ in range(2):
        children = [blank.spawn("vminstantiate", *words) for _ in range(2)]
        for child in children:
            stdout, stderr = child.communicate(timeout=120)
            assert child.returncode == 0, stderr
            assert len(stdout.splitlines()) == 10
            names += stdout.splitlines()
    assert sorted(names) == sorted(f"web{number:02d}" for number in range(40))
    confs = [blank.conf(f"pf/web/{name}") for name in names]
    for key in ("vmUuid", "vmMac", "vmAddress"):
        assert len({conf[key] for conf in confs}) == 40
    assert len(qemus(blank)) == 40 and len(taps(blank)) == 40
    started = time.monotonic()
    blank.run("vmstop", "-d", "-g", "pf").quiet()
    assert time.monotonic() - started < 30
    assert not qemus(blank)


def test_two_groups_with_the_same_name_live_side_by_side(blank: Cloud) -> None:
    for group in ("one", "two"):
        assert instantiate(blank, "-g", group, "-o", "name=web").ok().lines == ["web00"]
    several = "web00: several VMs are called so: one/default/web00, two/default/web00"
    for words in (("vmssh", "web00", "true"), ("vmstop", "-n", "web00", "-d"), ("vmconsole", "-n", "web00")):
        blank.run(*words).says(1, several, "name the group too: GROUP/NAME")
    blank.start("one/web00").says(1, "one/web00: it is running already")
    blank.run("vm", "-n", "web00", "-g", "two", "-G").says(
        1, "two/web00: it runs without a screen", "vmconsole -s -n two/web00"
    )
    assert len(rows(blank)) == 2
    blank.run("vmstop", "-d", "-n", "two/web00").quiet()
    assert [row[1] for row in rows(blank)] == ["one/default"]


def test_clones_of_a_description_file(blank: Cloud) -> None:
    file = blank.home / "shop.v2.txt"
    file.write_text(
        "# a shop\n\nblank:1:sql:mem=48; cpu=2;name=db\n  blank : 2 : web : name=web ; mem=16  # two\nblank:1"
    )
    done = blank.run("vminstantiate", "-f", file).ok()
    assert done.lines[:3] == ["db00", "web00", "web01"] and len(done.lines) == 4
    assert [row[1] for row in rows(blank, "-g", "shop.v2")] == ["shop.v2/default", "shop.v2/sql"] + ["shop.v2/web"] * 2
    conf = blank.conf("shop.v2/sql/db00")
    assert (conf["vmMem"], conf["vmCpu"]) == ("48", "2")
    assert [row[0] for row in rows(blank, "-g", "shop.v2", "-t", "web")] == ["web00", "web01"]


def test_dry_run_makes_nothing(blank: Cloud) -> None:
    with nothing_made(blank):
        instantiate(blank, "-C", 3, "-g", "pf", "--dry-run").ok()


# Stopping ############################################################################################


def test_a_guest_that_does_not_stop_is_switched_off_with_one_warning(blank: Cloud) -> None:
    instantiate(blank, "-g", "pf", "-C", 3, "-o", "name=web").ok()
    done = blank.run("vmstop", "-g", "pf", "--timeout", 1)
    assert (done.status, done.stdout, len(done.stderr.splitlines())) == (0, "", 1)
    assert re.match(r"(vmstop|nocloud stop): warning: .*web00, web01, web02", done.stderr)
    assert not qemus(blank)
    blank.run("vmstop", "-g", "pf").quiet()
    leftovers = [name for name in os.listdir(blank.folder("pf/default/web00")) if name.endswith((".sock", ".pid"))]
    assert not leftovers


def test_kill_switches_off_at_once_and_keeps(blank: Cloud) -> None:
    instantiate(blank, "-g", "pf", "-o", "name=web").ok()
    done = blank.run("vmstop", "--kill", "-g", "pf").quiet()
    assert done.seconds < 10 and not qemus(blank)
    assert blank.folder("pf/default/web00").is_dir()


def test_destroy_removes_the_groups_folder_and_nothing_else(blank: Cloud) -> None:
    for group in ("pf", "pf2", "p"):
        instantiate(blank, "-g", group, "-o", "name=web").ok()
    (blank.base / "pf/notes").mkdir()
    (blank.base / "pf/notes/mine.txt").write_text("mine")
    blank.run("vmstop", "-d", "-g", "pf").quiet()
    assert (blank.base / "pf/notes/mine.txt").read_text() == "mine"  # no VM of ours
    assert not (blank.base / "pf/default").exists()
    assert [row[1] for row in rows(blank)] == ["p/default", "pf2/default"]


@pytest.mark.parametrize("level", ["group", "type", "name"])
def test_destroy_never_follows_a_symlink(blank: Cloud, level: str) -> None:
    """A folder of the tree that is a symlink to VMs elsewhere: refused, and all is there afterwards."""
    outside = blank.home / "outside"
    fake_vm(Cloud(blank.home, outside), "g/t/web00")
    (outside / "g/t/web00/web00_0.img").write_text("data")
    link, target = {
        "group": (blank.base / "pf", outside / "g"),
        "type": (blank.base / "pf/t", outside / "g/t"),
        "name": (blank.base / "pf/t/web00", outside / "g/t/web00"),
    }[level]
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)
    blank.run("vmstop", "-d", "-g", "pf").says(
        1, f"web00: {link} is a symlink: nothing behind it is removed", "remove it yourself"
    )
    assert (outside / "g/t/web00/web00_0.img").read_text() == "data"
    assert link.is_symlink()
    link.unlink()


def test_destroy_leaves_what_symlinks_in_a_vms_folder_point_to(blank: Cloud) -> None:
    instantiate(blank, "-g", "pf", "-o", "name=web").ok()
    keep = blank.home / "keep"
    keep.mkdir()
    (keep / "file").write_text("data")
    (blank.folder("pf/default/web00") / "link").symlink_to(keep)
    blank.run("vmstop", "-d", "-g", "pf").quiet()
    assert (keep / "file").read_text() == "data"
    assert not (blank.base / "pf").exists()


def test_templates_are_not_destroyed(blank: Cloud) -> None:
    with nothing_made(blank):
        for words in (("-g", "templates"), ("-n", "blank")):
            done = blank.run("vmstop", "-d", *words)
            done.says(2, "templates are not destroyed with vmstop", "vmtemplate --delete NAME")


def test_a_group_that_is_not_there(blank: Cloud) -> None:
    instantiate(blank, "-g", "pftest", "-o", "name=web").ok()
    blank.run("vmstop", "-g", "pftets").says(1, "pftets: no such group", "did you mean pftest?")
    blank.run("vmrunning", "-g", "pftets").says(1, "pftets: no such group", "did you mean pftest?")
    for words in (("vmstop", "-g", "pftest"), ("vmrunning", "-g", "pftest")):
        blank.run(*words, "-t", "defualt").says(1, "defualt: no such type in pftest", "did you mean default?")
    blank.run("vmrunning", "-t", "defualt").says(1, "defualt: no such type", "did you mean default?")
    nothing = "so there is nothing to destroy"
    blank.run("vmstop", "-d", "-g", "pftets").says(0, f"pftets: no such group, {nothing}", "did you mean pftest?")
    done = blank.run("vmstop", "-d", "-g", "pftest", "-t", "x").says(
        0, f"x: no such type in pftest, {nothing}", "vmrunning -a lists them"
    )
    assert not done.stdout and len(rows(blank)) == 1


def test_folders_that_were_moved_by_hand(blank: Cloud) -> None:
    """Lists, and the tree of disks, say what they no longer find."""
    blank.run("vminstantiate", "-n", "blank", "-C", 3, "-g", "pf", "-o", "name=web").ok()
    blank.run("vmstop", "--kill", "-g", "pf").ok()
    place = blank.base / "pf/default"
    (place / "web00").rename(place / "renamed")
    (blank.base / "shop/default").mkdir(parents=True)
    (place / "web01").rename(blank.base / "shop/default/web01")
    renamed = f"warning: {place}/renamed is no VM: web00.conf is in it, and not renamed.conf (renamed by hand?)"
    conf = blank.base / "shop/default/web01/web01.conf"
    disk = f"{place}/web01/web01_0.img"
    gone = f"warning: shop/default/web01: its disk is gone: {disk} (moved by hand? see vmDisk in {conf})"
    mend = f"; mended by: mv {place}/renamed {place}/web00"
    for words, more in ((("vmrunning", "-a"), mend), (("vmtemplate", "--tree"), "")):
        done = blank.run(*words).ok()
        said = [line.partition(": ")[2] for line in done.stderr.splitlines()]
        assert sorted(said) == sorted([renamed + more, gone]), repr(done)
        assert "web02" in done.stdout
    blank.run("vmtemplate", "--list").ok()
    blank.run("vmstop", "-d", "-g", "shop").ok()
    blank.run("vmstop", "-d", "-n", "web02").ok()
    told = "blank: 1 clone would break: pf/default/renamed"  # what is no VM any more stands on it all the same
    blank.run("vmtemplate", "blank", "--delete").says(1, told, "vmstop -d destroys clones")
    (place / "renamed").rename(place / "web00")
    (blank.base / "templates/blank").rename(blank.base / "templates/other")
    done = blank.run("vmtemplate", "--tree").ok()
    assert "warning: pf/default/web00: what its disk stands on is gone: " in done.stderr and "Errno" not in done.stderr


def test_started_and_stopped_by_their_names(blank: Cloud) -> None:
    blank.run("vminstantiate", "-n", "blank", "-C", 3, "-g", "pf", "-t", "web", "-o", "name=web").ok()
    blank.run("vmstop", "web00", "pf/WEB02", "--kill").quiet()
    assert [row[0] for row in rows(blank)] == ["web01"]
    blank.run("vmssh", "web00").says(1, "web00: it is not running", "vmstart web00 starts it")
    blank.run("vmstart", "web00", "-n", "web00").quiet()
    assert [row[0] for row in rows(blank)] == ["web00", "web01"]
    uuids = {name: blank.conf(f"pf/web/{name}")["vmUuid"] for name in ("web00", "web01", "web02")}
    blank.run("vmstart", "-g", "pf").quiet()
    blank.run("vmstart", "-g", "pf", "-t", "web", "web01").quiet()  # they all run
    assert len(rows(blank)) == 3
    assert uuids == {name: blank.conf(f"pf/web/{name}")["vmUuid"] for name in uuids}
    assert blank.run("vmmanage", "web01", "info", "status").ok().lines == ["VM status: running"]
    assert blank.run("vmmanage", "-n", "web01", "info", "status").ok().lines == ["VM status: running"]
    blank.run("vmpause", "web01").quiet()
    assert blank.run("vmrunning").ok().lines[1].split()[:3] == ["web01", "pf/web", "paused"]
    blank.run("vmresume", "web01").quiet()
    blank.run("vmlog", "-q", "web01").ok()
    blank.run("vmlog", "web").says(1, "web: no such VM, but a type", "vmrunning -a -t web lists its VMs")
    blank.run("vmstop", "pf").says(1, "pf: no such VM, but a group", "vmrunning -a -g pf lists its VMs")
    blank.run("vmstop", "-t", "wbe").says(1, "wbe: no such type", "did you mean web?")
    blank.run("vmstop", "-t", "web").says(2, "which group? give -g GROUP, or -n VM", "vmrunning lists them")
    blank.run("vmstop", "-d", "web00", "web03").says(1, "web03: no such VM", "did you mean web02?")
    assert len(rows(blank)) == 3
    blank.run("vmstop", "-d", "web00", "web02").quiet()
    assert [row[0] for row in rows(blank)] == ["web01"]


def test_a_group_is_the_same_in_any_case(blank: Cloud, tmp_path: Path) -> None:
    blank.run("vminstantiate", "-n", "blank", "-g", "Shop", "-o", "name=web").ok()
    blank.run("vminstantiate", "-n", "blank", "-g", "sHOP", "-o", "name=web").ok()
    (tmp_path / "SHOP").write_text("blank:1:default:name=web")
    blank.run("vminstantiate", "-f", tmp_path / "SHOP").ok()
    assert blank.groups() == ["Shop"] and len(blank.run("vmrunning", "-g", "shop").ok().lines) == 3
    assert len(blank.run("vmrunning", "-g", "SHOP").ok().lines) == len(rows(blank))
    blank.run("vmstop", "SHOP/web00", "--kill").quiet()
    blank.run("vmstart", "-n", "web00", "-g", "shop").quiet()
    blank.run("vmstop", "-d", "-g", "SHOP").quiet()
    assert blank.groups() == []


def test_interrupted_in_a_wait(blank: Cloud) -> None:
    """What was made runs on, and that is told; a wait that runs out names the option that set it."""
    child = blank.spawn("vminstantiate", "-n", "blank", "-C", 2, "-g", "pf", "-o", "name=web", "-w", 100)
    eventually(lambda: len(rows(blank)) == 2, "both run")
    eventually(lambda: len(list(blank.base.glob("pf/default/web0?/web0?.command"))) == 2, "both are made")
    assert child.stderr
    time.sleep(1)
    child.send_signal(signal.SIGINT)
    assert child.wait(30) == 130
    assert ": these VMs run on: web00, web01\n" in child.stderr.read() and len(rows(blank)) == 2
    done = blank.run("vminstantiate", "-n", "blank", "-g", "pf", "-o", "name=db", "-w", 1)
    assert done.status == 124 and "(hint: -w SECONDS sets the longest wait; its console: " in done.stderr, repr(done)
    blank.run("net", "exec", "nosuchcmd").says(127, "nosuchcmd: not found")  # and no package is guessed
    env = {"NOCLOUD_vmWaitTimeout": "1"}
    done = blank.run("vminstantiate", "-n", "blank", "-g", "pf", "-o", "name=db", "-w", env=env)
    assert done.status == 124 and "(hint: vmWaitTimeout sets the longest wait; " in done.stderr, repr(done)


# The state of a VM is asked of the lock ##############################################################


def test_a_stale_pidfile_with_a_foreign_live_pid(blank: Cloud) -> None:
    instantiate(blank, "-g", "pf", "-o", "name=web").ok()
    blank.run("vmstop", "--kill", "-g", "pf").quiet()
    stale = blank.folder("pf/default/web00") / "web00.pid"
    other = subprocess.Popen(["sleep", "300"])
    try:
        stale.write_text(f"{other.pid}\n")
        assert rows(blank) == []
        blank.run("vmstop", "-g", "pf").quiet()
        stale.write_text(f"{other.pid}\n")
        blank.start("pf/default/web00").ok()
        assert blank.qemu("pf/default/web00") != other.pid
        assert len(rows(blank)) == 1
        blank.run("vmstop", "--kill", "-g", "pf").quiet()
        stale.write_text(f"{other.pid}\n")
        blank.run("vmstop", "-d", "-g", "pf").quiet()
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


LOCKER = """
import fcntl, sys, time
file = open(sys.argv[1], "r+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(300)
"""


def test_a_vm_that_cannot_be_told_is_never_started_or_destroyed(blank: Cloud, tmp_path: Path) -> None:
    """A pidfile locked from another pid namespace: the kernel tells pid 0."""
    instantiate(blank, "-g", "pf", "-o", "name=web").ok()
    blank.run("vmstop", "--kill", "-g", "pf").quiet()
    pidfile = blank.folder("pf/default/web00") / "web00.pid"
    pidfile.write_text("1\n")
    inside = ["unshare", "-Urp", "--fork", "--kill-child", sys.executable, "-c", LOCKER, str(pidfile)]
    # Seen from inside a pid namespace of their own, nocloud's calls can't name the holder, who is outside.
    outside = subprocess.Popen([sys.executable, "-c", LOCKER, str(pidfile)], stdout=subprocess.PIPE, text=True)
    try:
        assert outside.stdout is not None and outside.stdout.readline() == "locked\n"
        before = inside[: inside.index(sys.executable)]
        listed = blank.execute([*before, "--mount-proc", *blank.argv("vmrunning", "-a")]).ok()
        assert listed.lines[0].split()[:3] == ["web00", "pf/default", "unknown"]
        for words in (("-g", "pf"), ("-d", "-g", "pf"), ("--kill", "-n", "web00")):
            done = blank.execute([*before, *blank.argv("vmstop", *words)])
            done.says(1, f"web00: can't tell whether it runs: {pidfile}", "stop it as the user who started it")
        assert blank.folder("pf/default/web00").is_dir()
        assert outside.poll() is None
    finally:
        outside.kill()
        outside.communicate()


# What goes wrong #####################################################################################


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("-n", "nothere"), 1, "nothere: no such template"),
        (("-n", "blanc"), 1, "did you mean blank?"),
        (("-n", "../x"), 2, "'.'"),
        (("-n", "a,b"), 2, "','"),
        (("-n", ""), 2, "which template?"),
        (("-n", "é"), 2, "'é'"),
        (("-n", "x" * 64), 2, "63"),
        (("-n", "blank", "-C", "0"), 2, "1 to"),
        (("-n", "blank", "-C", "-1"), 2, "-1"),
        (("-n", "blank", "-C", "abc"), 2, "abc"),
        (("-n", "blank", "-C", ""), 2, "whole number"),
        (("-n", "blank", "-g", "../x"), 2, "'.'"),
        (("-n", "blank", "-g", "a,b"), 2, "','"),
        (("-n", "blank", "-g", "a/b"), 2, "'/'"),
        (("-n", "blank", "-g", ""), 2, "empty"),
        (("-n", "blank", "-g", "ü"), 2, "'ü'"),
        (("-n", "blank", "-g", "x" * 64), 2, "63"),
        (("-n", "blank", "-g", "templates"), 2, "reserved"),
        (("-n", "blank", "-g", "all"), 2, "all"),
        (("-n", "blank", "-g", "ungrouped"), 2, "ungrouped"),
        (("-n", "blank", "-t", ""), 2, "empty"),
        (("-n", "blank", "-t", "a b"), 2, "' '"),
        (("-n", "blank", "-t", "-x"), 2, "'-'"),
        (("-n", "blank", "-o", "name=a_b"), 2, "'_'"),
        (("-n", "blank", "-o", "name=../x"), 2, "'.'"),
        (("-n", "blank", "-o", "name=" + "x" * 62), 2, "63"),
        (("-n", "blank", "-o", "mem=1G"), 2, "MB"),
        (("-n", "blank", "-o", "mem=0"), 2, "mem"),
        (("-n", "blank", "-o", "zone=red"), 2, "zone"),
        (("-n", "blank", "-o", "mme=64"), 2, "mem?"),
        (("-n", "blank", "-o", "dsk=1,x"), 2, "dsk"),
        (("-n", "blank", "-o", "gui=1"), 2, "gui"),
        (("-n", "blank", "-z"), 2, "-z"),
        (("-n", "blank", "--coun", "2"), 2, "--coun"),
        (("-n", "blank", "extra"), 2, "extra"),
        (("-n", "blank", "-w", "soon"), 2, "soon"),
        ((), 2, "-n"),
        (("-f", "/nonexistent/file"), 2, "/nonexistent/file"),
        (("-f", "/dev/null", "-n", "blank"), 2, "-n"),
    ],
)
def test_wrong_words(blank_once: Cloud, words: tuple[str, ...], status: int, said: str) -> None:
    with nothing_made(blank_once):
        blank_once.run("vminstantiate", *words).fails(status, said)


NOT_LISTED, HELP = "vmrunning -a lists them", "-h shows how it is called"
NO_TEMPLATE = "vmtemplate --list shows what is there, vmtemplate --list --available what can be"
ANOTHER = "choose another name"
GROUP_CHARACTERS = "use letters, digits, '.', '_' and '-'"
A_B = "-o: name=a_b: 'a_b00': '_' is not allowed in a VM name"
PORTS = "[IP:]HOST:GUEST, ports of TCP (no others), comma-separated"
TWICE = "another of the VMs asks for port 8080 of 127.0.0.1 too"
A_LINE = "a line is TEMPLATE:COUNT[:TYPE[:OPTIONS]]"
OPTIONS = (
    "options are mem=MB cpu=N disk=GB dsk=GB,GB name=PREFIX user-data=FILE port=[IP:]HOST:GUEST"
    " share=HOSTDIR:GUESTDIR[:rw] gui cold cap=PERCENT, separated by ';'"
)


@pytest.mark.parametrize(
    ("words", "status", "said", "hint"),
    [
        ("vminstantiate", 2, "which template? give -n TEMPLATE, or -f FILE", NO_TEMPLATE),
        ("vminstantiate -n nothere", 1, "nothere: no such template", NO_TEMPLATE),
        ("vminstantiate -n blanc", 1, "blanc: no such template", "did you mean blank?"),
        ("vminstantiate -n blank extra", 2, "'extra': one word too many", "nocloud instantiate -g extra"),
        ("vmstop", 2, "which group? give -g GROUP, or -n VM", "vmrunning lists them"),
        ("vmstop --name=", 2, "the VM's name is empty", "vmrunning lists the VMs"),
        ("vmstop --group=", 2, "the group name is empty", "vmrunning -a lists the groups"),
        ("vmstop -g pf", 1, "pf: no such group", NOT_LISTED),
        ("vmstop -n web00", 1, "web00: no such VM", NOT_LISTED),
        ("vmstop -n --", 1, "--: no such VM", NOT_LISTED),
        ("vm -n x -g pf", 1, "pf: no such group", NOT_LISTED),
        ("vmstop -n blanc", 1, "blanc: no such VM", "did you mean blank?"),
        ("vmstop -n blank -g pf -t web", 1, "blank: no such VM in pf/web", "did you mean templates/blank?"),
        ("vmssh", 2, "which VM?", "vmssh VM|IP [WORDS...]; vmrunning lists the VMs"),
        ("vmssh 10.88.0.9", 1, "10.88.0.9: no such VM", NOT_LISTED),
        ("vmssh blank", 1, "blank: it is not running", "vmstart blank starts it"),
        ("vmconsole", 2, "which VM? give -n NAME", NOT_LISTED),
        ("vmconsole -n templates/blank", 1, "blank: it is not running", "vmstart blank starts it"),
        ("vmmanage -n blank", 1, "blank: it is not running", "vmstart blank starts it"),
        ("vm", 2, "which VM? give -n NAME", NOT_LISTED),
        ("vm -n x -t web", 1, "x: no such VM of type web", NOT_LISTED),
        ("vm -n x -g templates", 1, "x: no such template", NO_TEMPLATE),
        ("vmcreate", 2, "-n NAME is missing", HELP),
        ("vmcreate -n x", 2, "-i ISO is missing", HELP),
        ("vmcreate -an blank", 2, "nothing to adjust: give -m, -c, -C or -d", HELP),
        ("vmcreate -an nothing -m 64", 1, "nothing: no such VM", NOT_LISTED),
        ("vmrun", 2, "give exactly one of -f FILE, -r GROUP and -s GROUP", HELP),
        ("vmrun -r pf", 1, "pf: no such group", NOT_LISTED),
        ("vmrun -r templates", 2, "templates are not run as a group", "vm -n NAME runs one"),
        ("vmrun -f -", 2, "which group? a description from stdin has no name", "give --group GROUP too"),
        ("vmrunning pf", 2, "'pf': one word too many", "nocloud running -g pf"),
        ("vmstop web00", 1, "web00: no such VM", "vmrunning -a lists them"),
        ("vmupgrade", 2, "TEMPLATE is missing", HELP),
        ("vmupgrade nothere", 1, "nothere: no such template", NO_TEMPLATE),
        ("vmtemplate new --from nobody", 1, "nobody: no such VM", NOT_LISTED),
        ("vmtemplate --delete nothere", 1, "nothere: no such template", NO_TEMPLATE),
        ("net", 2, "no verb: expected up, down, status, exec or connect", ""),
        ("vminstantiate -n blank -g templates", 2, "'templates' is reserved and can't be a group of clones", ANOTHER),
        (
            "vminstantiate -n blank -g .x",
            2,
            "'.x': a group name can't start with '.'",
            "start with a letter or a digit",
        ),
        ("vminstantiate -n blank -g a/b", 2, "'a/b': '/' is not allowed in a group name", GROUP_CHARACTERS),
        ("vminstantiate -n blank -o name=a_b", 2, A_B, "use letters, digits and '-'"),
        ("vminstantiate -n blank -o name=", 2, "-o: name= is empty", "name=web makes web00, web01 …"),
        ("vminstantiate -n blank -o zone=red", 2, "-o: unknown option 'zone'", OPTIONS),
        ("vminstantiate -n blank -o mme=64", 2, "-o: unknown option 'mme', did you mean mem?", OPTIONS),
        ("vminstantiate -n blank -o gui=1", 2, "-o: gui takes no value", ""),
        ("vminstantiate -n blank -o mem=1G", 2, "-o: mem=1G: expected a whole number from 16 to 16777216, in MB", ""),
        ("vminstantiate -n blank -o port=80/udp", 2, f"-o: port=80/udp: expected {PORTS}", ""),
        ("vminstantiate -n blank -o port=8080:80,8080:81", 2, f"port=8080: {TWICE}", ""),
        ("vminstantiate -n blank -C 2 -o port=65535:80", 2, f"port=127.0.0.1:65536:80: expected {PORTS}", ""),
        ("vmport -n blank", 2, "[IP:]HOST:GUEST is missing", HELP),
        ("vmport 8080:80", 2, "which VM? give -n NAME", NOT_LISTED),
        ("vmport -n x 8080:80", 1, "x: no such VM", NOT_LISTED),
        ("vmport -n blank 8080", 2, f"'8080': expected {PORTS}", ""),
        ("vmport -n blank 8080:80 --delete", 1, "blank: 127.0.0.1:8080:80 is not published", "vmport -L lists what is"),
        ("vmport -L x", 2, "'x': one word too many", HELP),
        ("vminstantiate -f /dev/null", 2, "/dev/null: no VM is described in it", A_LINE),
        ("vminstantiate -f /dev/null -n blank", 2, "-f and -n exclude each other", "the description file says it all"),
        ("vmrun -r pf --add", 2, "--add goes with -f FILE only", ""),
        ("vmrun -r pf --allow-share /x", 2, "--allow-share goes with -f FILE only", ""),
        ("vminstantiate -n blank --allow-share /x", 2, "--allow-share goes with -f FILE only", ""),
        ("vmrun -g -s pf", 2, "-g goes with -f FILE and -r GROUP", ""),
        ("vmtemplate new --image /nothere", 1, "/nothere: no such file", "--image takes a qcow2 or raw disk image"),
        ("vmtemplate new --layer", 2, "--layer goes with --from", ""),
        ("vmtemplate new --insecure", 2, "--insecure goes with --image", ""),
        ("vmstop -d -n blank", 2, "templates are not destroyed with vmstop", "vmtemplate --delete NAME"),
        ("net up --private --bridge", 2, "--private and --bridge: one of them", ""),
        ("net connect x/y 22", 2, "'x/y': expected an address or a name", ""),
        ("net connect", 2, "connect takes an address and a port", "nocloud net connect 10.88.0.2 22"),
        ("net exec", 2, "which command?", "nocloud net exec CMD..."),
        ("bridge", 2, "no verb: expected start, stop, accept, dnsmasq, ready or subnet", ""),
        ("completion tcsh", 2, "tcsh: no completion for that shell", "one of bash, zsh, fish"),
        ("zap", 127, "zap: no such command", "nocloud -h lists them"),
    ],
)
def test_messages_to_the_word(blank_once: Cloud, words: str, status: int, said: str, hint: str) -> None:
    with nothing_made(blank_once):
        blank_once.run(*words.split()).says(status, said, hint)


@pytest.fixture(scope="module")
def blank_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """A cloud with the template `blank` for what makes nothing."""
    with Cloud(tmp_path_factory.mktemp("blank") / "home") as cloud:
        add_blank(cloud)
        yield cloud


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("blank:1:web\nnothere:1:web\n", 2, "no such template"),
        ("\n#\nblank:x:web", 3, "x"),
        ("blank:0", 1, "1 to"),
        ("blank", 1, "TEMPLATE:COUNT"),
        ("blank:1:we b", 1, "' '"),
        ("blank:1::color=red", 1, "color"),
        ("blank:1::mem=1G", 1, "MB"),
        ("blank:1::cpu=many", 1, "many"),
        ("blank:1::name=a_b", 1, "'_'"),
        ("blank:1::dsk=0", 1, "dsk"),
        ("blank:1\n../x:1", 2, "'.'"),
        ("blank:2:web:mem=1000000", 1, "memory"),
        ("blank:1\nblank:1000:web:dsk=" + ",".join(["1"] * 20) + "\n", 2, ""),
    ],
)
def test_wrong_description_files(blank_once: Cloud, text: str, line: int, said: str) -> None:
    file = blank_once.home / "shop"
    file.write_text(text)
    with nothing_made(blank_once):
        done = blank_once.run("vminstantiate", "-f", file)
        done.fails(done.status, f"{file}:{line}: ", said)
        assert done.status in (1, 2)


def test_a_description_files_name_must_be_a_groups(blank_once: Cloud) -> None:
    for name in ("a,b", "all.txt", "templates"):
        file = blank_once.home / name
        file.write_text("blank:1")
        with nothing_made(blank_once):
            blank_once.run("vminstantiate", "-f", file).fails(2)


def test_a_group_that_ansible_would_mix_up(blank: Cloud) -> None:
    """GROUP_TYPE of one and the name of another must not be equal, neither way round."""
    instantiate(blank, "-g", "a", "-t", "b_c").ok()
    with nothing_made(blank):
        said = "a_b_c: ansible would mix it up with a/b_c"
        instantiate(blank, "-g", "a_b_c").says(2, said, "choose another name")
        said = "a_b/c: ansible would mix it up with a/b_c: both are a_b_c"
        instantiate(blank, "-g", "a_b", "-t", "c").says(2, said, "choose another name")
        for group in ("type", "type_b"):
            said = f"{group}: ansible would mix it up with type_TYPE, the VMs of a type in all groups"
            instantiate(blank, "-g", group).says(2, said, "choose another name")
        file = blank.home / "a_b_c"
        file.write_text("blank:1")
        blank.run("vminstantiate", "-f", file).fails(2, f"{file}:1: ")
    instantiate(blank, "-g", "x_y").ok()
    with nothing_made(blank):
        instantiate(blank, "-g", "x", "-t", "y").fails(2, "x_y")


def test_more_memory_than_the_host_has(blank: Cloud) -> None:
    with nothing_made(blank):
        instantiate(blank, "-o", "mem=8000000").fails(1, "8000000 MB", "--force")
        instantiate(blank, "-C", 1000, "-o", "mem=8000").fails(1, "8000000 MB", "--force")
        instantiate(blank, "-o", "mem=8000000", "--force", "--dry-run").ok()


def test_more_memory_than_is_available_is_a_warning(blank: Cloud) -> None:
    numbers = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M))
    asked = int(numbers["MemTotal"]) // 1024 - 1
    done = instantiate(blank, "-o", f"mem={asked}", "--dry-run").ok()
    assert "warning" in done.stderr and f"{asked} MB" in done.stderr


def test_a_running_template_is_not_cloned(blank: Cloud) -> None:
    blank.start("templates/blank").ok()
    assert [row[:2] for row in rows(blank)] == [["blank", "templates"]]
    with nothing_made(blank):
        instantiate(blank).says(1, "blank: the template is running and can't be cloned", "vmstop -n blank")
        blank.run("vmtemplate", "--delete", "blank").says(1, "blank: the template is running", "vmstop -n blank")
    blank.run("vmstop", "--kill", "-n", "templates/blank").quiet()
    assert instantiate(blank, "-o", "name=a").ok().lines == ["a00"]


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"QFI\xfb", b"QFI\xfb" + b"\xff" * 4000])
def test_a_corrupt_template(blank: Cloud, content: bytes) -> None:
    disk = blank.base / "templates/blank/blank_0.img"
    disk.chmod(0o600)
    disk.write_bytes(content)
    with nothing_made(blank):
        done = instantiate(blank, "-g", "pf", "-o", "name=web")
        done.fails(1)
        assert "blank" in done.stderr or "web00" in done.stderr


def test_a_template_without_its_disk(blank: Cloud) -> None:
    (blank.base / "templates/blank/blank_0.img").unlink()
    with nothing_made(blank):
        instantiate(blank, "-g", "pf").fails(1, "blank")


@pytest.mark.parametrize("program", ["qemu-system", "qemu-img"])
def test_no_qemu(blank: Cloud, tmp_path: Path, program: str) -> None:
    without = ("qemu-system", "kvm", "qemu-kvm") if program == "qemu-system" else ("qemu-img",)
    if os.path.exists("/usr/libexec/qemu-kvm"):
        pytest.skip("this machine has /usr/libexec/qemu-kvm, which is looked for by its path")
    path = link_programs(tmp_path / "bin", *without)
    with nothing_made(blank):
        instantiate(blank, "-g", "pf", env={"PATH": path}).fails(127, program, "(hint: ")


def test_unwritable_base_folder(blank: Cloud) -> None:
    with nothing_made(blank):
        place = {"NOCLOUD_vmBaseDir": "/proc/nocloud/vms"}
        done = blank.run("vmtemplate", "x", "--image", blank.home / "blank.qcow2", env=place)
        done.fails(1, "/proc/nocloud/vms")
        instantiate(blank, env=place).fails(1)
    if os.geteuid() != 0:
        blank.base.chmod(0o500)
        with nothing_made(blank):
            instantiate(blank).fails(1, str(blank.base))
        blank.base.chmod(0o700)


@needs_root
def test_disk_full(cloud: Cloud, vms: None) -> None:
    """On a file system of 3 MB: refused before anything is made, and nothing stays."""
    cloud.base.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "nocloud-test", cloud.base], check=True)
    try:
        add_blank(cloud)
        with nothing_made(cloud):
            instantiate(cloud, "-C", 20, "-o", "name=web").fails(1, "free")
        (cloud.base / "ballast").write_bytes(b"x" * (2 * 1024 * 1024))
        with nothing_made(cloud):
            instantiate(cloud, "-C", 3, "-o", "name=web").fails(1)
        (cloud.base / "ballast").unlink()
        assert instantiate(cloud, "-o", "name=web").ok().lines == ["web00"]
        cloud.run("vmstop", "-d", "-g", "group").quiet()
    finally:
        subprocess.run(["umount", "-l", cloud.base], check=True)  # -l: also where something was left in it


@needs_root
def test_disk_full_in_the_middle(cloud: Cloud, vms: None) -> None:
    """The room goes while the disks are made: each clone says so and is gone, but for one that got the last of it."""
    cloud.base.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "nocloud-test", cloud.base], check=True)
    try:
        add_blank(cloud)
        script = f'dd if=/dev/zero of={cloud.base}/ballast bs=64k 2>/dev/null; exec "$REAL" "$@"'
        path = replace_program(cloud.home / "bin", "qemu-img", script)
        done = instantiate(cloud, "-g", "pf", "-C", 3, "-o", "name=web", env={"PATH": path})
        assert done.status == 1 and "Traceback" not in done.stderr and "defect" not in done.stderr, repr(done)
        told = {name for name in ("web00", "web01", "web02") if f": {name}: " in done.stderr}
        assert told and told.isdisjoint(done.lines) and len(told) + len(done.lines) == 3, repr(done)
        left = os.listdir(cloud.base / "pf/default") if (cloud.base / "pf").exists() else []
        assert sorted(left) == done.lines, repr(done)
        (cloud.base / "ballast").unlink()
        cloud.run("vmstop", "-d", "-g", "pf").ok()
        assert not (cloud.base / "pf").exists() and not cloud.processes()
    finally:
        subprocess.run(["umount", "-l", cloud.base], check=True)  # -l: also where something was left in it


def test_one_clone_that_cannot_be_made(blank: Cloud) -> None:
    """It says which and why, the others run, and the exit status is 1."""
    script = 'case "$*" in *web01_0*) echo "qemu-img: no way" >&2; exit 1;; esac; exec "$REAL" "$@"'
    path = replace_program(blank.home / "bin", "qemu-img", script)
    done = instantiate(blank, "-g", "pf", "-C", 3, "-o", "name=web", env={"PATH": path})
    done.says(1, "web01: qemu-img: qemu-img: no way")
    assert done.lines == ["web00", "web02"]
    assert [row[0] for row in rows(blank, "-a")] == ["web00", "web02", "blank"]
    assert sorted(os.listdir(blank.base / "pf/default")) == ["web00", "web02"]


def test_one_clone_that_does_not_start(blank: Cloud) -> None:
    script = 'case "$*" in *guest=web01*) echo "qemu: out of luck" >&2; exit 1;; esac; exec "$REAL" "$@"'
    path = replace_program(blank.home / "bin", "qemu-system-x86_64", script)
    done = instantiate(blank, "-g", "pf", "-C", 3, "-o", "name=web", env={"PATH": path})
    done.says(1, "web01: qemu did not start: qemu: out of luck")  # its log went with it
    assert done.lines == ["web00", "web02"]
    assert sorted(os.listdir(blank.base / "pf/default")) == ["web00", "web02"]
    assert len(taps(blank)) == 2


def test_a_wait_that_runs_out_names_the_stage(blank: Cloud) -> None:
    done = instantiate(blank, "-g", "pf", "-o", "name=web", "-w", 1)
    done.fails(124, "web00", "address", "console")
    assert done.lines == ["web00"] and len(rows(blank)) == 1


def test_a_vm_that_ends_while_it_is_waited_for(blank: Cloud) -> None:
    child = blank.spawn("vminstantiate", "-n", "blank", "-g", "pf", "-o", "name=web", "-w", "60")
    eventually(partial(qemus, blank), "web00 runs")
    folder = blank.folder("pf/default/web00")
    eventually(lambda: rows(blank) and not nocloud.is_locked(str(folder)), "its start, which holds its lock, is over")
    kill_hard(blank.qemu("pf/default/web00"))
    _, stderr = child.communicate(timeout=30)
    assert child.returncode == 1 and "web00" in stderr and "stopped" in stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_it_waits(blank: Cloud, number: signal.Signals) -> None:
    child = blank.spawn("vminstantiate", "-n", "blank", "-g", "pf", "-o", "name=web", "-C", 2, "-w", "60")
    eventually(lambda: len(qemus(blank)) == 2, "both run")
    eventually(lambda: len(rows(blank)) == 2, "both are listed")
    child.send_signal(number)
    _, stderr = child.communicate(timeout=20)
    assert child.returncode == 128 + number
    assert "Traceback" not in stderr
    blank.run("vmstop", "-d", "-g", "pf").quiet()
    assert not (blank.base / "pf").exists()


def test_interrupted_while_it_makes(blank: Cloud) -> None:
    """^C in the middle of qemu-img: nothing half-made stays."""
    path = replace_program(blank.home / "bin", "qemu-img", f'touch {blank.home}/begun; sleep 2; exec "$REAL" "$@"')
    with nothing_made(blank):
        child = blank.spawn("vminstantiate", "-n", "blank", "-g", "pf", "-C", 4, env={"PATH": path})
        eventually((blank.home / "begun").exists, "qemu-img was called")
        os.killpg(child.pid, signal.SIGINT)
        _, stderr = child.communicate(timeout=20)
        assert child.returncode == 130 and "Traceback" not in stderr
        eventually(lambda: not blank.processes(), "all is over")


def test_killed_while_it_makes_the_next_command_cleans_up(blank: Cloud) -> None:
    path = replace_program(blank.home / "bin", "qemu-img", f'touch {blank.home}/begun; sleep 2; exec "$REAL" "$@"')
    child = blank.spawn("vminstantiate", "-n", "blank", "-g", "pf", "-C", 4, "-o", "name=web", env={"PATH": path})
    eventually((blank.home / "begun").exists, "qemu-img was called")
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    assert rows(blank, "-a") == [["blank", "templates", "stopped"]]
    assert instantiate(blank, "-g", "pf", "-o", "name=web").ok().lines == ["web00"]
    assert os.listdir(blank.base / "pf/default") == ["web00"]
    blank.run("vmtemplate", "--delete", "blank").fails(1, "pf/default/web00")


@pytest.mark.parametrize(
    "line", ["vmMem=$(touch x)", "vmMem=`touch x`", "vmMem=64; touch x", "touch x", 'vmName="$(touch x)"']
)
def test_a_conf_with_a_command_in_it(blank: Cloud, line: str) -> None:
    instantiate(blank, "-g", "pf", "-o", "name=web").ok()
    blank.run("vmstop", "--kill", "-g", "pf").quiet()
    conf = blank.folder("pf/default/web00") / "web00.conf"
    text = conf.read_text()
    conf.write_text(f"{text}{line}\n")
    number = len(text.splitlines()) + 1
    blank.start("pf/default/web00").fails(2, f"{conf}:{number}: ")
    assert not list(blank.home.rglob("x")) and not qemus(blank)
    assert any("web00" in row for row in rows(blank, "-a"))


def test_a_conf_that_others_may_write_is_not_used(blank: Cloud) -> None:
    instantiate(blank, "-g", "pf", "-o", "name=web").ok()
    blank.run("vmstop", "--kill", "-g", "pf").quiet()
    conf = blank.folder("pf/default/web00") / "web00.conf"
    conf.chmod(0o666)
    blank.start("pf/default/web00").fails(2, str(conf), "others")
    conf.chmod(0o644)
    if os.geteuid() == 0:
        os.chown(conf, 65534, 65534)
        blank.start("pf/default/web00").fails(2, str(conf), "another user")


def test_one_vm_with_a_bad_conf_does_not_keep_others_from_starting(blank: Cloud) -> None:
    instantiate(blank, "-g", "pf", "-C", 2, "-o", "name=web").ok()
    blank.run("vmstop", "--kill", "-g", "pf").quiet()
    (blank.folder("pf/default/web00") / "web00.conf").write_text("touch x\n")
    done = blank.start("pf/default/web00", "pf/default/web01")
    assert done.status and "web00.conf:1: " in done.stderr
    assert [row[0] for row in rows(blank)] == ["web01"]


def test_a_disk_that_is_gone(blank: Cloud) -> None:
    instantiate(blank, "-g", "pf", "-o", "name=web").ok()
    blank.run("vmstop", "--kill", "-g", "pf").quiet()
    disk = blank.folder("pf/default/web00") / "web00_0.img"
    disk.unlink()
    conf = disk.with_name("web00.conf")
    blank.start("pf/default/web00").says(1, f"web00: its disk is gone: {disk}", f"see vmDisk and vmExtraDisk in {conf}")
    blank.run("vmstop", "-d", "-g", "pf").quiet()


def test_a_clone_inherits_and_the_tree_can_be_moved(blank: Cloud) -> None:
    """Memory, CPUs, login and init are the template's; the tree works under another name, by relative paths."""
    image = blank.home / "blank.qcow2"
    blank.run("vmtemplate", "own", "--image", image, "--mem", 40, "--cpu", 2, "--user", "ann", "--init", "none").ok()
    instantiate(blank, "-g", "pf", "-o", "name=web", template="own").ok()
    conf = blank.conf("pf/default/web00")
    assert (conf["vmMem"], conf["vmCpu"], conf["vmUser"], conf["vmInit"]) == ("40", "2", "ann", "none")
    blank.run("vmstop", "--kill", "-g", "pf").quiet()
    moved = blank.home / "moved, and renamed"
    blank.base.rename(moved)
    blank.base = moved
    blank.env["NOCLOUD_vmBaseDir"] = str(moved)
    blank.start("pf/default/web00").ok()
    assert [row[0] for row in rows(blank)] == ["web00"]
    file = blank.folder("pf/default/web00") / "web00.conf"
    file.write_text(file.read_text().replace("vmUser=ann\n", ""))  # as bash made them: the configuration counts
    found = json.loads(blank.run("vminventory", "--list", env={"NOCLOUD_vmUser": "bob"}).ok().stdout)
    assert found["pf"]["vars"]["ansible_user"] == "bob"


# What a template can have for each key that its clones inherit; HOME is the test's.
INHERITED = {
    "vmMem": "40",
    "vmCpu": "2",
    "vmUser": "ann",
    "vmInit": "none",
    "vmMachine": "q35",
    "vmAccel": "tcg",
    "vmExtraOpts": "-no-user-config",
    "vmCpuCap": "70",
    "vmKernel": "HOME/vmlinuz",
    "vmInitrd": "HOME/initrd",
    "vmAppend": "quiet",
    "vmFirmware": "uefi",
    "vmTpm": "yes",
    "vmArch": "x86_64",
}
# A qemu that leaves out the kernel, which is none.
WITHOUT_KERNEL = """#!/bin/sh
for word; do
    shift
    case $word in
    -kernel | -initrd | -append) skip=1 ;;
    *) [ "$skip" ] || set -- "$@" "$word"; skip= ;;
    esac
done
exec qemu-system-x86_64 "$@"
"""


def test_a_clone_keeps_what_its_template_started_with(blank: Cloud) -> None:
    """Also where that came from the configuration, which may be another one tomorrow."""
    file = blank.folder("templates/blank") / "blank.conf"
    bare = [line for line in file.read_text().splitlines(True) if not line.startswith(("vmMem", "vmCpu", "vmUser"))]
    file.write_text("".join(bare))
    mine = {"vmMem": "48", "vmCpu": "1", "vmUser": "ann"}
    blank.run("vminstantiate", "-n", "blank", "-g", "pf", env={f"NOCLOUD_{k}": v for k, v in mine.items()}).ok()
    (folder,) = (blank.base / "pf/default").iterdir()
    conf = blank.conf(f"pf/default/{folder.name}")
    assert {key: conf[key] for key in mine} == mine


def test_clones_and_what_is_made_of_them_inherit_each_of_these_keys(blank: Cloud) -> None:
    declared = {each.key for each in nocloud.SETTINGS if each.inherited}
    missing, gone = declared - INHERITED.keys(), INHERITED.keys() - declared
    assert not missing, f"clones inherit {missing}: give each a value in INHERITED of tests/test_lifecycle.py"
    assert not gone, f"clones don't inherit {gone}, says SETTINGS; tests/test_lifecycle.py has it in INHERITED"
    (blank.home / "qemu").write_text(WITHOUT_KERNEL)
    (blank.home / "qemu").chmod(0o755)
    for name in ("vmlinuz", "initrd"):
        (blank.home / name).write_text("")
    blank.env["NOCLOUD_vmQemu"] = str(blank.home / "qemu")
    wanted = {key: value.replace("HOME", str(blank.home)) for key, value in INHERITED.items()}
    conf = blank.folder("templates/blank") / "blank.conf"
    conf.write_text(nocloud.update_assignments(conf.read_text(), {**wanted, "vmQemu": "/old", "vmGui": "no"}))
    instantiate(blank, "-g", "pf", "-o", "name=web").ok()
    blank.run("vmstop", "--kill", "-g", "pf").quiet()
    blank.run("vmtemplate", "new", "--from", "web00", "--no-clean").ok()
    for vm in ("pf/default/web00", "templates/new"):
        assert {key: blank.conf(vm).get(key) for key in wanted} == wanted, vm
        assert not {"vmQemu", "vmGui"} & set(blank.conf(vm)), vm


APPEND = "console=ttyS0 no_timer_check marker=of-the-test"


def test_a_kernel_of_the_host_is_booted(blank: Cloud, guest_cache: Path, tiny_image: Path) -> None:
    """Directly, with its ramdisk and its command line, as the conf says."""
    parts = tinyguest._parts(guest_cache)
    conf = blank.folder("templates/blank") / "blank.conf"
    boot = {"vmMem": "128", "vmKernel": f"{parts}/vmlinuz", "vmInitrd": f"{parts}/initrd", "vmAppend": APPEND}
    conf.write_text(nocloud.update_assignments(conf.read_text(), boot))
    instantiate(blank, "-g", "pf", "-o", "name=web").ok()
    log = blank.folder("pf/default/web00") / "console.log"
    words = (f"Command line: {APPEND}", "Run /init as init process")
    eventually(lambda: all(each in log.read_text(errors="replace") for each in words), str(words), 90)


def test_no_interface_of_the_host(blank: Cloud) -> None:
    before = interfaces()
    instantiate(blank, "-g", "pf", "-C", 2, "-o", "name=web").ok()
    assert {name for name in interfaces() - before if name.startswith(("tap", "nocloud", "out"))} == set()
    assert processes_with(str(blank.home))


# Long ################################################################################################


@pytest.mark.long
def test_killed_at_any_instant(blank: Cloud) -> None:
    """A storm of SIGKILL: whenever it hits, the next commands find a consistent tree and clear it up."""
    seed = int(os.environ.get("SEED") or time.time_ns() % 10**9)
    print(f"SEED={seed}")
    random = Random(seed)
    before = blank.files()
    for _ in range(30):
        child = blank.spawn("vminstantiate", "-n", "blank", "-g", "pf", "-C", "4", "-o", "name=web")
        until(lambda: False, random.uniform(0.1, 2.0))
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        listed = rows(blank, "-a", "-g", "pf") if (blank.base / "pf").exists() else []
        assert all(len(row) == 4 and row[2] in ("running", "stopped") for row in listed), listed
        again = instantiate(blank, "-g", "pf", "-o", "name=web").ok()
        assert len(again.lines) == 1
        blank.run("vmstop", "-d", "-g", "pf").ok()
        assert blank.files() == before
        assert not blank.processes()


@pytest.mark.long
def test_stop_killed_at_any_instant(blank: Cloud) -> None:
    seed = int(os.environ.get("SEED") or time.time_ns() % 10**9)
    print(f"SEED={seed}")
    random = Random(seed)
    before = blank.files()
    for _ in range(20):
        instantiate(blank, "-g", "pf", "-C", 4, "-o", "name=web").ok()
        child = blank.spawn("vmstop", "-d", "-g", "pf")
        until(lambda: False, random.uniform(0.05, 0.6))
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        blank.run("vmstop", "-d", "-g", "pf").ok()
        blank.run("net", "down").ok()
        assert blank.files() == before
        assert not blank.processes()
