"""A distribution's cloud image, from its server to clones: the real cloud-init, in an image built from packages."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import Cloud, root_offset, without_waits
from test_inventory import ansible
from webserver import Site

pytestmark = pytest.mark.long

WAIT = "900"  # three cloud-inits at once on two processors without KVM take four minutes
PACKAGES = "cloud-init,cloud-guest-utils,sudo"
PLACE = "/images/cloud/bookworm/latest/"
NAME = "debian-12-genericcloud-amd64.qcow2"
# What --build does for its own templates, and cloud-init is to do here.
OWN = (
    "systemd/system/sysinit.target.wants/nocloud-grow.service",
    "systemd/system/sysinit.target.wants/nocloud-hostname.service",
    "systemd/system/multi-user.target.wants/nocloud-hostkey.service",
    "systemd/network/80-ethernet.network",
)
ADDED = """\
#cloud-config
ssh_authorized_keys:
 - ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ5lrRBlRZ3IzRmA0mXnDbJhbB8mZ0C0s8kMxTq4m1b4 theirs
write_files:
 - path: /etc/added
   content: "by the user\\n"
runcmd:
 - [sh, -c, "sleep 5; cat /etc/added > /root/ran"]
"""


BROKEN = """\
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary="b"

--b
Content-Type: text/cloud-config; charset="utf-8"

#cloud-config
foo: [a
--b
Content-Type: text/cloud-config
Content-Disposition: attachment; filename="mine"

#cloud-config
ssh_authorized_keys:
runcmd:
 - echo starting
 - cat /nonexistent/cause
--b--
"""
# What each does to a guest: the words that tell, and who can log in.
HOSTILE = {
    "null": ("#cloud-config\nssh_authorized_keys:\n", ["did not do all", "ssh_authorized_keys: None"], "debian"),
    "users": ("#cloud-config\nusers:\n - 17\n - [a]\n", ["failed", "users-groups"], "root"),
    "include": ("#include\nhttp://127.0.0.1:9/x\n", ["failed", "for url: http://127.0.0.1:9/x"], "root"),
    "parts": (BROKEN, ["failed", "Invalid format at line 2 column 6", "cat: /nonexistent/cause"], "debian"),
}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, vms: None) -> Path:
    """The image: what --build makes, with cloud-init, and without what makes that a template of nocloud's."""
    folder = tmp_path_factory.mktemp("image")
    with Cloud(folder / "home") as cloud:
        cloud.run("vmtemplate", "image", "--build", "bookworm", "--include", PACKAGES, timeout=900).ok()
        disk, raw, made = cloud.base / "templates/image/image_0.img", folder / "raw", folder / NAME
        subprocess.run(["qemu-img", "convert", "-O", "raw", disk, raw], check=True)
    script = folder / "script"
    script.write_text("".join(f"rm /etc/{name}\n" for name in OWN))
    debugfs = ["debugfs", "-w", "-f", str(script), f"{raw}?offset={root_offset(raw)}"]
    env = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    done = subprocess.run(debugfs, env=env, check=True, capture_output=True, text=True)
    assert not [line for line in done.stderr.splitlines() if not line.startswith("debugfs ")], done.stderr
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, made], check=True)
    raw.unlink()
    return made


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory, image: Path) -> Iterator[Cloud]:
    """A cloud whose template debian12 is the catalogue's entry of that name, from a mirror of Debian's server."""
    digest = hashlib.sha512(image.read_bytes()).hexdigest()
    with Site() as site, Cloud(tmp_path_factory.mktemp("web") / "home") as cloud:
        site.files = {PLACE + NAME: image, PLACE + "SHA512SUMS": f"{digest}  {NAME}\n".encode()}
        cloud.env |= {"no_proxy": "127.0.0.1", "NOCLOUD_vmWaitTimeout": WAIT}
        config = cloud.home / "config/nocloud"
        config.mkdir(parents=True)
        (config / "templates.conf").write_text(f"[mirrors]\nhttps://cloud.debian.org/images/ = {site.base}/images/\n")
        cloud.run("vmtemplate", "debian12", "--mem", 512, timeout=300).ok()
        yield cloud


@pytest.fixture(scope="module")
def clones(web: Cloud) -> Cloud:
    """Three of them, ready."""
    (web.home / "added").write_text(ADDED)
    (web.home / "pf").write_text("debian12:3:web:name=web;disk=12;dsk=1;user-data=added\n")
    done = web.run("vminstantiate", "-f", web.home / "pf", "-w", WAIT, timeout=1000).ok()
    assert done.lines == ["web00", "web01", "web02"] and "in it did not do all" not in done.stderr
    return web


def test_the_template_is_a_cloud_image(web: Cloud) -> None:
    conf = web.conf("templates/debian12")
    assert (conf["vmInit"], conf["vmUser"]) == ("cloud-init", "debian")
    assert conf["vmChecksum"].startswith("sha512:") and conf["vmSource"].endswith(NAME)


def test_each_is_who_it_should_be(clones: Cloud) -> None:
    """Hostname, login, keys of ours and of the user's, and the planted host key as the only one."""
    known = (clones.base / ".known_hosts").read_text()
    assert known.count("\n") == 3
    machines = set()
    for name in clones.run("vmrunning", "-g", "pf").ok().stdout.split()[::3]:
        conf = clones.conf(f"pf/web/{name}")
        planted = (clones.folder(f"pf/web/{name}") / "ssh_host_ed25519_key.pub").read_text().split()[1]
        assert f"{conf['vmUuid']},{conf['vmAddress']} ssh-ed25519 {planted}\n" in known
        script = (
            "hostname; cat /etc/hostname; hostname -f; whoami; sudo -n id -un; sudo -n cat /etc/ssh/ssh_host_*.pub;"
            " cat ~/.ssh/authorized_keys /etc/machine-id"
        )
        said = clones.ssh(name, script).ok().stdout
        assert said.split()[:5] == [name, name, f"{name}.pf.nocloud", "debian", "root"]
        assert said.count(planted) == 1 and said.count("theirs") == 1
        assert (clones.home / "config/nocloud/id_ed25519.pub").read_text() in said
        machines.add(said.split()[-1])
    assert len(machines) == 3


def test_the_disks_have_grown(clones: Cloud) -> None:
    """By cloud-init's growpart; the data disk is vdb all the same."""
    for name in ("web00", "web02"):
        script = "cat /sys/block/vda/size; df -B512 --output=size / | tail -n 1; lsblk -dno NAME,SIZE,SERIAL | sort"
        disk, size, *disks = clones.ssh(name, script).ok().stdout.split()
        assert int(disk) == 12 << 21 and int(size) > 0.97 * int(disk)
        assert disks[3:6] == ["vdb", "1G", f"{name}_1"] and disks[6] == "vdc"


def test_what_the_user_adds_is_done_when_they_are_ready(clones: Cloud) -> None:
    said = clones.ssh("web01", "cat /etc/added; sudo -n cat /root/ran; cloud-init status").ok()
    assert said.stdout == "by the user\n" * 2 + "status: done\n"


def test_ansible_pings_all_three(clones: Cloud) -> None:
    done = ansible(clones, "ansible", "all", "-m", "ping").ok()
    assert done.stdout.count('"ping": "pong"') == 3 and done.stdout.count("SUCCESS") == 3


def test_started_again_it_is_the_same_machine(clones: Cloud) -> None:
    """Alone, so that the boot is short: cloud-init sees the same instance, and runs nothing a second time."""
    key = "sudo -n cut -d ' ' -f 2 /etc/ssh/ssh_host_ed25519_key.pub"  # cloud-init ends no line of it, systemd does
    script = f"{key}; cat /etc/machine-id; ls /var/lib/cloud/instances"
    before = clones.ssh("web00", script).ok().stdout.split()
    assert before[-1] == clones.conf("pf/web/web00")["vmUuid"]
    clones.ssh("web00", "sudo -n rm /root/ran; sync").ok()
    clones.run("vmstop", "-g", "pf", "--timeout", 120, timeout=180).quiet()
    clones.start("pf/web/web00").ok()
    assert clones.ssh("web00", script, timeout=1000).ok().stdout.split() == before
    done = clones.script(
        "with nocloud.Cloud(nocloud.load_config()) as cloud:\n"
        "    sys.exit(nocloud.report_errors(nocloud.wait_all(cloud, [cloud.tree.need('web00')], 400)))"
    )
    assert done.quiet()
    status = json.loads(clones.ssh("web00", "cloud-init status --format=json").ok().stdout)
    assert (status["status"], status["errors"]) == ("done", [])
    assert clones.ssh("web00", "sudo -n ls /root/ran").status == 2
    clones.run("vmstop", "-d", "-g", "pf").quiet()


def test_no_user_data_keeps_us_out_or_fails_in_silence(web: Cloud) -> None:
    """What breaks cloud-init is told with the file and the cause, and vmssh gets in all the same: as root, at least."""
    lines = [f"debian12:1::name={name};user-data={name}\n" for name in HOSTILE]
    for name, (text, _, _) in HOSTILE.items():
        (web.home / name).write_text(text)
    (web.home / "hostile").write_text("".join(lines))
    done = web.run("vminstantiate", "-f", web.home / "hostile", "-w", WAIT, timeout=1000)
    assert done.status == 1, done
    for name, (_, words, user) in HOSTILE.items():
        (told,) = [line for line in without_waits(done.stderr).splitlines() if f"{name}00: cloud-init" in line]
        for word in (*words, str(web.folder(f"hostile/default/{name}00") / "user-data")):
            assert word in told, done
        assert f"{name}00: debian can't log in" in done.stderr or user == "debian", done
        said = web.ssh(f"{name}00", "id -un; hostname -f").ok().stdout
        assert said.split()[0] == user and web.conf(f"hostile/default/{name}00")["vmUser"] == user
        assert said.split()[1] == f"{name}00.hostile.nocloud" or name in ("users", "include")
    web.run("vmstop", "-d", "-g", "hostile").quiet()


def test_an_image_that_nobody_knows_about(web: Cloud, image: Path) -> None:
    """--image takes auto: its cloud-init is found out, root logs in, and the host key was the planted one."""
    web.run("vmtemplate", "some", "--image", image, "--mem", 512, timeout=300).ok()
    web.run("vminstantiate", "-n", "some", "-g", "some", "-o", "name=some", "-w", WAIT, timeout=1000).ok()
    conf, folder = web.conf("some/default/some00"), web.folder("some/default/some00")
    assert conf["vmInit"] == "cloud-init"
    assert (folder / "ssh_host_ed25519_key.pub").read_text().split()[1] in (web.base / ".known_hosts").read_text()
    assert web.ssh("some00", "hostname; whoami").ok().stdout == "some00\nroot\n"
    web.run("vmstop", "-d", "-g", "some").quiet()
