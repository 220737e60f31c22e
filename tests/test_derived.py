"""Templates of VMs, what stands on what, and the first start of a classic download."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import tinyguest
from support import READY, Cloud, Terminal, add_template, nothing_made
from test_download import offer_classic
from test_layers import (
    add_clone,
    add_stub,
    chain,
    digest,
    disk_of,
    files,
    press_key,
    second_sector,
    start_stub,
    stub_image,
)
from webserver import Site

import nocloud


@pytest.fixture
def stub(cloud: Cloud, vms: None) -> Cloud:
    add_stub(cloud)
    return cloud


def mark(cloud: Cloud, place: str) -> Path:
    """Write what a guest could have written to a clone's disk that is switched off; its path."""
    disk = disk_of(cloud, place)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 0x5a 512 512", disk], check=True, capture_output=True)
    return disk


def test_a_template_of_a_vm_is_one_file(stub: Cloud) -> None:
    disk = mark(stub, "kept/x/old00")
    before = digest(disk)
    stub.run("vmtemplate", "new", "--from", "kept/x/old00", "--no-clean", "--mem", 48).quiet()
    conf, old = stub.conf("templates/new"), stub.conf("kept/x/old00")
    assert {key: conf[key] for key in ("vmCpu", "vmUser", "vmInit", "vmMachine")} == {
        key: old[key] for key in ("vmCpu", "vmUser", "vmInit", "vmMachine")
    }
    assert (conf["vmMem"], conf["vmSource"], conf["vmDisk"]) == ("48", "kept/x/old00", "templates/new/new_0.img")
    assert not {"vmMac", "vmAddress", "vmTemplate", "vmExtraDisk"} & set(conf) and conf["vmUuid"] != old["vmUuid"]
    made = disk_of(stub, "templates/new")
    assert chain(made) == ["new_0.img"] and second_sector(made) == b"Z" * 512 and made.stat().st_mode & 0o222 == 0
    assert digest(disk) == before and {path.name for path in made.parent.iterdir()} == {"new.conf", "new_0.img"}
    stub.run("vmstop", "-d", "-g", "kept").quiet()
    stub.run("vmtemplate", "stub", "--delete").quiet()
    assert second_sector(disk_of(stub, add_clone(stub, "n", "new"))) != bytes(512)


@pytest.mark.long
def test_a_template_that_shares_its_disk(stub: Cloud) -> None:
    disk = mark(stub, "kept/x/old00")
    stub.run("vmtemplate", "new", "--from", "old00", "--layer", "--no-clean").quiet()
    made = disk_of(stub, "templates/new")
    assert chain(made) == ["new_0.img", "stub_0.img"] and second_sector(made) == b"Z" * 512
    assert made.stat().st_blocks <= disk.stat().st_blocks + 256
    new = add_clone(stub, "n", "new")
    assert chain(disk_of(stub, new)) == ["n00_0.img", "new_0.img", "stub_0.img"]
    stub.run("vmstop", "-d", "-n", "kept/old00").quiet()
    stub.run("vmtemplate", "stub", "--delete").fails(1, "1 clone and 1 template", "templates/new", "kept/x/n00")
    start_stub(stub)  # on a layer, though all that stands on it is a template and its clone
    press_key(stub)
    stub.run("vmstop", "-n", "templates/stub").quiet()
    assert files(stub) == {"stub_0.img", "stub.l1.img"}
    stub.run("vmstop", "-d", "-g", "kept").quiet()
    stub.run("vmtemplate", "stub", "--delete").fails(1, "1 template", "templates/new")
    stub.run("vmtemplate", "new", "--delete").quiet()
    stub.run("vmtemplate", "stub", "--delete").quiet()


def test_what_can_be_no_template(stub: Cloud) -> None:
    stub.run("vminstantiate", "-n", "stub", "-g", "run", "-o", "name=run;dsk=1").ok()
    with nothing_made(stub):
        stub.run("vmtemplate", "new", "--from", "run00", "--no-clean").says(
            1, "run00: it is running", "vmstop -n run00"
        )
        stub.run("vmtemplate", "new", "--from", "nobody").fails(1, "nobody", "no such VM")
        stub.run("vmtemplate", "stub", "--from", "old00").fails(1, "stub", "already")
        stub.run("vmtemplate", "new", "--from", "templates/stub", "--layer").says(
            1, "stub: its disk stands on no other, there is nothing to share", "leave out --layer"
        )
        stub.run("vmtemplate", "new", "--layer").fails(2, "--layer goes with --from")
        stub.run("vmtemplate", "new", "--image", "x", "--no-clean").fails(2, "--no-clean goes with --from")
        stub.run("vmtemplate", "new", "--from", "old00", "--build", "x").fails(2, "exclude")
    stub.run("vmstop", "-g", "run", "--kill").ok()
    done = stub.run("vmtemplate", "new", "--from", "run00", "--no-clean").ok()
    assert "left out: run00_1.img" in done.stderr


@pytest.mark.long
def test_what_cannot_be_cleaned_is_no_template(stub: Cloud) -> None:
    """The guest has no ssh."""
    with nothing_made(stub):
        env = {"NOCLOUD_vmWaitTimeout": "1"}
        done = stub.run("vmtemplate", "new", "--from", "old00", env=env)
        assert done.status == 124 and "new: not ready after" in done.stderr and "--no-clean" in done.stderr
    assert not (stub.base / ".known_hosts").exists()


def test_the_tree_is_shown(stub: Cloud) -> None:
    start_stub(stub)
    press_key(stub)
    add_clone(stub, "new")
    stub.run("vmtemplate", "other", "--from", "new00", "--layer", "--no-clean").quiet()
    add_clone(stub, "leaf", "other")
    rows = stub.run("vmtemplate", "--tree").ok().lines
    assert [re.sub(r"  [0-9.]+ MB", "", row) for row in rows] == [
        "stub",
        "  stub_0.img",
        "    kept/x/old00",
        "    stub.l1.img  new clones stand on this",
        "      kept/x/new00",
        "      other",
        "        other_0.img  new clones stand on this",
        "          kept/x/leaf00",
        "group kept, all files",
        "cache",
    ]
    wanted = sum(path.stat().st_blocks for path in [stub.base / "kept", *(stub.base / "kept").rglob("*")]) / 2048
    assert rows[-2] == f"group kept, all files  {wanted:.1f} MB"
    assert all(re.search(r"  [0-9]+\.[0-9] MB", row) for row in rows)


def test_what_nothing_needs_is_removed(stub: Cloud) -> None:
    add_clone(stub, "old")
    before = stub.files()
    stub.run("vmtemplate", "--prune").quiet()
    cached = stub.home / "cache/nocloud/images/sha256-1"
    busy = stub.home / "cache/nocloud/images/sha256-2"
    killed = stub.base / "kept/x/.new-web00"
    for folder in (cached, busy, killed):
        folder.mkdir(parents=True, mode=0o700)
        (folder / "image").write_bytes(os.urandom(2 << 20))
    with nocloud.FolderLock(str(busy)):
        with Terminal(stub, "vmtemplate", "--prune") as terminal:
            terminal.see("Go on? [y/N]")
            terminal.type("n\n")
            terminal.see("nothing has been done")
        done = stub.run("vmtemplate", "--prune", "-y").ok()
    assert [row.split()[:3] for row in done.lines] == [["2.0", "MB", str(cached)], ["2.0", "MB", str(killed)]]
    assert stub.files() == before and busy.exists() and not cached.exists()


@pytest.mark.long
def test_a_template_of_a_vm_is_cleaned(tiny: Cloud) -> None:
    tiny.run("vminstantiate", "-n", "tiny", "-g", "pf", "-t", "web", "-o", "name=web", "-w", READY).ok()
    script = "echo kept >/root/file; echo secret >/root/.ash_history; echo 0123456789abcdef >/etc/machine-id"
    tiny.ssh("web00", script).ok()
    tiny.run("vmstop", "-n", "web00").quiet()
    disk, conf = disk_of(tiny, "pf/web/web00"), tiny.conf("pf/web/web00")
    before, known = digest(disk), (tiny.base / ".known_hosts").read_text()
    tiny.run("vmtemplate", "new", "--from", "web00").ok()
    assert digest(disk) == before and tiny.conf("pf/web/web00") == conf
    assert (tiny.base / ".known_hosts").read_text() == known
    assert os.listdir(tiny.base / ".net/hosts") == [conf["vmUuid"]]
    assert sorted(os.listdir(tiny.folder("templates/new"))) == ["new.conf", "new_0.img"]
    assert not {"vmMac", "vmAddress", "vmNetwork"} & set(tiny.conf("templates/new"))
    tiny.run("vminstantiate", "-n", "new", "-g", "pf", "-t", "new", "-o", "name=new", "-w", READY).ok()
    shown = tiny.ssh("new00", "cat /root/file; hostname; wc -c </etc/machine-id; ls -a /root").ok().stdout.split()
    assert shown[:3] == ["kept", "new00", "0"] and ".ash_history" not in shown
    keys = {(tiny.folder(f"pf/{each}") / "ssh_host_ed25519_key.pub").read_text() for each in ("web/web00", "new/new00")}
    assert len(keys) == 2


def test_no_template_is_left_of_a_vm_whose_clones_cannot_be(blank: Cloud) -> None:
    blank.run("vminstantiate", "-n", "blank", "-g", "pf", "-t", "web", "-o", "name=web").ok()
    blank.run("vmstop", "-g", "pf", "--kill").ok()
    code = """
make = nocloud.template_from_vm
nocloud.template_from_vm = lambda *words: make(*words[:-1], False)  # it isn't booted
sys.exit(nocloud.main(["vminstantiate", "-n", "pf/web/web00", "-o", "mem=16000000", *sys.argv[1:]]))"""
    done = blank.script(code)
    assert done.status == 1 and "16000000 MB of memory are asked for" in done.stderr
    failed = "nocloud.instantiate = lambda *words: ([], [nocloud.Error('none could be made')])\n"
    done = blank.script(failed + code, "--force")
    assert done.status == 1 and "none could be made" in done.stderr
    assert [line.split()[0] for line in blank.run("vmtemplate", "-L").ok().lines] == ["blank"]
    blank.script(code, "--force", "--dry-run").fails(2)


@pytest.mark.long
def test_clones_of_a_vm(tiny: Cloud) -> None:
    """As it is, while it runs and when it is stopped; with identities of their own, and it stays what it was."""
    tiny.run("vminstantiate", "-n", "tiny", "-g", "pf", "-t", "web", "-o", "name=web", "-w", READY).ok()
    for number, state in enumerate(("running", "stopped")):
        tiny.ssh("web00", f"echo {state} >/root/file").ok()
        if state == "stopped":
            tiny.run("vmstop", "-n", "web00").quiet()
        conf = tiny.conf("pf/web/web00")
        done = tiny.run("vminstantiate", "-n", "pf/web/web00", "-C2", "-g", "pf", "-o", f"name={state[0]}", "-w", READY)
        name = "pf.web.web00" + ".2" * number
        assert f"web00 is copied into the template {name}" in done.ok().stderr
        assert done.stdout.split() == [f"{state[0]}00", f"{state[0]}01"] and name in tiny.run("vmtemplate", "-L").stdout
        shown = tiny.ssh(f"{state[0]}01", "cat /root/file; hostname").ok().stdout.split()
        assert shown == [state, f"{state[0]}01"]
        assert {key: value for key, value in tiny.conf("pf/web/web00").items() if key != "vmDisk"} == {
            key: value for key, value in conf.items() if key != "vmDisk"
        }
        assert tiny.run("vmsnapshot", "-L").stdout.count("clone-") == 0
    names = ("web/web00", "default/r00", "default/r01", "default/s00", "default/s01")
    keys = {(tiny.folder(f"pf/{each}") / "ssh_host_ed25519_key.pub").read_text() for each in names}
    assert len(keys) == 5


@pytest.mark.long
def test_a_vm_that_was_never_asked_whether_it_has_cloud_init(cloud: Cloud, tiny_image: Path, vms: None) -> None:
    add_template(cloud, tiny_image, "tiny", "--mem", 96, "--cpu", 1, "--init", "auto")
    cloud.run("vmtemplate", "new", "--from", add_clone(cloud, "old", "tiny")).ok()
    assert sorted(os.listdir(cloud.folder("templates/new"))) == ["new.conf", "new_0.img"]
    assert cloud.conf("templates/new")["vmInit"] == "auto"
    cloud.run("vminstantiate", "-n", "new", "-g", "pf", "-t", "web", "-o", "name=web", "-w", READY).ok()
    assert cloud.ssh("web00", "hostname").ok().stdout == "web00\n"


# The classic kind ####################################################################################################


@pytest.fixture
def publisher(tmp_path: Path) -> Path:
    key = tmp_path / "publisher"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "publisher", "-f", key], check=True)
    return key


def offer(cloud: Cloud, site: Site, image: Path, *more: str) -> None:
    """A server of the bash tools that has the image; lines for its entry."""
    offer_classic(cloud, site, image.read_bytes(), "xz")
    with (cloud.home / "config/nocloud/templates.conf").open("a") as file:
        file.writelines(f"{line}\n" for line in more)


@pytest.mark.long
def test_a_classic_image_is_opened_with_its_publishers_key(cloud: Cloud, guest_cache: Path, publisher: Path) -> None:
    public = publisher.with_suffix(".pub").read_text().strip()
    image = tinyguest.build(guest_cache, public, reads="")
    with Site() as site:
        offer(cloud, site, image, f"key = {publisher}")
        cloud.run("vmtemplate", "old").ok()
    assert sorted(os.listdir(cloud.folder("templates/old"))) == ["old.conf", "old_0.img"]
    assert not (cloud.base / ".known_hosts").exists() and not cloud.processes()
    cloud.run("vminstantiate", "-n", "old", "-g", "pf", "-t", "web", "-o", "name=web", "-w", READY).ok()
    keys = cloud.ssh("web00", "cat /root/.ssh/authorized_keys").ok().stdout
    assert public.split()[1] not in keys
    assert (cloud.home / "config/nocloud/id_ed25519.pub").read_text().split()[1] in keys


@pytest.mark.long
def test_a_key_that_does_not_open_it(cloud: Cloud, guest_cache: Path, publisher: Path) -> None:
    image = tinyguest.build(guest_cache, "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + 43 * "A", reads="")
    with Site() as site, nothing_made(cloud):
        offer(cloud, site, image, f"key = {publisher}")
        done = cloud.run("vmtemplate", "old")
        assert done.status == 1 and "no key lets root in" in done.stderr and str(publisher) in done.stderr


def test_a_key_that_cannot_be_used(cloud: Cloud, publisher: Path, vms: None) -> None:
    """Nothing is downloaded."""
    image = stub_image(cloud)
    with Site() as site:
        offer(cloud, site, image, "key = nowhere")
        cloud.run("vmtemplate", "old").fails(1, f"{cloud.home}/config/nocloud/nowhere", "templates.conf")
        publisher.chmod(0o644)
        offer(cloud, site, image, f"key = {publisher}")
        cloud.run("vmtemplate", "old").fails(1, str(publisher), "ermissions", "chmod 600")
        publisher.write_text("no key\n")
        publisher.chmod(0o600)
        cloud.run("vmtemplate", "old").fails(1, str(publisher))
        assert not [path for path, _ in site.requests if ".img" in path]
    assert not cloud.base.exists()


def test_without_a_publishers_key_it_is_kept_as_it_is(cloud: Cloud, vms: None) -> None:
    image = stub_image(cloud)
    with Site() as site:
        offer(cloud, site, image)
        assert "names no key" in cloud.run("vmtemplate", "old").ok().stderr
    subprocess.run(["qemu-img", "compare", "-q", image, disk_of(cloud, "templates/old")], check=True)
