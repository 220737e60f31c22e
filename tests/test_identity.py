"""Who a VM is: UUID, MAC, keys, known_hosts; guests that take keys, and one that doesn't."""

from __future__ import annotations

import base64
import os
import re
import subprocess
from pathlib import Path

import pytest
from support import READY, Cloud, add_template, eventually, keyed_image, tree_at

import nocloud


def test_mac_is_of_the_uuid() -> None:
    assert nocloud.mac_of_uuid("6BA7B810-9dad-41d1-80b4-00c04fd430c8") == "00:50:56:6b:a7:b8"
    taken: set[str] = set()
    for _ in range(50):
        uuid, mac = nocloud.new_identity(taken)
        assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", uuid)
        assert mac == nocloud.mac_of_uuid(uuid) and mac in taken
    assert len(taken) == 50


def test_a_taken_mac_is_drawn_again() -> None:
    """All MACs but those that end in an even byte are taken: what is drawn isn't among them."""

    class Odd(set[str]):
        def __contains__(self, mac: object) -> bool:
            return int(str(mac)[-1], 16) % 2 == 1

    for _ in range(20):
        _, mac = nocloud.new_identity(Odd())
        assert int(mac[-1], 16) % 2 == 0


def known_hosts(tmp_path: Path) -> nocloud.KnownHosts:
    return nocloud.KnownHosts(tree_at(tmp_path))


def test_known_hosts_of_our_own(tmp_path: Path) -> None:
    known = known_hosts(tmp_path)
    assert not known.knows("uuid-1")
    known.update({"uuid-1": ("10.88.0.2", "ssh-ed25519 AAAA root@web00\n"), "uuid-2": ("", "ssh-ed25519 BBBB")})
    file = tmp_path / ".known_hosts"
    assert file.read_text() == "uuid-1,10.88.0.2 ssh-ed25519 AAAA\nuuid-2 ssh-ed25519 BBBB\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert known.knows("uuid-1") and known.knows("uuid-2") and not known.knows("uuid")
    known.update({"uuid-3": ("10.88.0.2", "ssh-ed25519 CCCC")})  # the address is another VM's now
    assert file.read_text() == "uuid-2 ssh-ed25519 BBBB\nuuid-3,10.88.0.2 ssh-ed25519 CCCC\n"
    known.update({}, ["uuid-2", "uuid-3"])
    assert not file.exists()


def test_ssh_agrees_with_our_known_hosts(tmp_path: Path) -> None:
    """ssh-keygen -F finds the line by UUID and by address."""
    key = str(tmp_path / "key")
    nocloud.make_key(key, "x")
    known_hosts(tmp_path).update({"uuid-1": ("10.88.0.2", Path(key + ".pub").read_text())})
    for name in ("uuid-1", "10.88.0.2"):
        done = subprocess.run(
            ["ssh-keygen", "-F", name, "-f", tmp_path / ".known_hosts"], capture_output=True, text=True, check=True
        )
        assert "ed25519" in done.stdout.lower()


def test_keys_land_whole(tmp_path: Path) -> None:
    path = str(tmp_path / "key")
    nocloud.make_key(path, "a comment")
    assert sorted(os.listdir(tmp_path)) == ["key", "key.pub"]
    assert Path(path).stat().st_mode & 0o777 == 0o600
    assert Path(path + ".pub").read_text().startswith("ssh-ed25519 ") and "a comment" in Path(path + ".pub").read_text()


def fake_clone(tmp_path: Path, user: str = "root") -> nocloud.VM:
    vm = nocloud.VM(tree_at(tmp_path), "pf", "web", "web00")
    os.makedirs(vm.folder)
    vm.write_conf({"vmName": "web00", "vmUser": user, "vmInit": "systemd"})
    Path(vm.host_key).write_text("PRIVATE\n")
    Path(vm.host_key + ".pub").write_text("PUBLIC\n")
    return vm


HOSTS = """127.0.0.1 localhost
127.0.1.1 web00.pf.nocloud web00
::1 localhost ip6-localhost ip6-loopback
"""


@pytest.mark.parametrize("init", ["systemd", "cloud-init"])
@pytest.mark.parametrize(("user", "home"), [("root", "/root"), ("ann", "/home/ann")])
def test_credentials_are_tmpfiles_lines(tmp_path: Path, user: str, home: str, init: str) -> None:
    vm = fake_clone(tmp_path, user)
    vm.write_conf({"vmInit": init})
    text = nocloud.credentials(vm, ["ssh-ed25519 AAAA one", "ssh-ed25519 BBBB two"]).decode()
    kind, _, value = text.partition("=")
    assert kind == "io.systemd.credential.binary:tmpfiles.extra" and "\n" not in text
    files = {}
    for line in base64.b64decode(value).decode().splitlines():
        what, path, mode, owner, group, age, *rest = line.split(" ")
        assert age == "-" and owner == group
        files[path] = (what, mode, owner, base64.b64decode(rest[0]).decode() if rest else "")
    keys = "ssh-ed25519 AAAA one\nssh-ed25519 BBBB two\n"
    ours = {
        "/etc/ssh/ssh_host_ed25519_key": ("f+~", "0600", "root", "PRIVATE\n"),
        "/etc/ssh/ssh_host_ed25519_key.pub": ("f+~", "0644", "root", "PUBLIC\n"),
        "/etc/ssh/nocloud_keys": ("f+~", "0644", "root", keys),
        "/etc/ssh/sshd_config.d/00-nocloud.conf": ("f+~", "0644", "root", nocloud.LOGIN_LINE + "\n"),
    }
    without_cloud_init = {
        "/etc/hostname": ("f+~", "0644", "root", "web00\n"),
        "/etc/hosts": ("f~", "0644", "root", HOSTS),
        f"{home}/.ssh": ("d", "0700", user, ""),
        f"{home}/.ssh/authorized_keys": ("f+~", "0600", user, keys),
    }
    assert files == {**ours, **(without_cloud_init if init == "systemd" else {})}


def test_the_users_keys_are_planted_besides_ours(cloud: Cloud) -> None:
    folder = cloud.home / ".ssh"
    folder.mkdir(0o700)
    (folder / "a.pub").write_text("ssh-ed25519 AAAA me\n# comment\n\nssh-rsa BBBB other\n")
    (folder / "b.pub").write_text("ssh-ed25519 AAAA me\nnot a key\n")
    (folder / "id_rsa").write_text("secret")
    done = cloud.script("print('\\n'.join(nocloud.login_keys()))").ok()
    assert done.lines[1:] == ["ssh-ed25519 AAAA me", "ssh-rsa BBBB other"]
    assert done.lines[0].endswith(" nocloud") and done.lines[0].startswith("ssh-ed25519 ")


def test_our_key_is_made_once_by_many(cloud: Cloud) -> None:
    code = "import concurrent.futures as f; print(nocloud.own_key()); print(open(nocloud.own_key() + '.pub').read())"
    first = cloud.script(code).ok()
    assert cloud.script(code).ok().stdout == first.stdout
    assert sorted(os.listdir(cloud.home / "config/nocloud")) == ["id_ed25519", "id_ed25519.pub"]


def test_paths_in_sshs_configuration_are_quoted() -> None:
    assert nocloud.ssh_path("/a b/50%") == '"/a b/50%%"'


# Guests ##############################################################################################


def test_login_and_keys_of_a_guest_with_systemd(shared: Cloud) -> None:
    """Strict host keys from the first contact; the user's key works; a stranger's config of ssh changes nothing."""
    folder = shared.home / ".ssh"
    folder.mkdir(0o700)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "me", "-f", folder / "id_ed25519"], check=True)
    # Our own waits must not read this; were it obeyed, they would fail.
    (folder / "config").write_text("Host *\n  ProxyJump nowhere.invalid\n  User nobody\n")
    (folder / "config").chmod(0o600)
    shared.run("vminstantiate", "-n", "tiny", "-g", "id", "-o", "name=a", "-w", READY).ok()
    (folder / "config").unlink()
    keys = shared.ssh("a00", "cat /root/.ssh/authorized_keys").ok().stdout
    assert (folder / "id_ed25519.pub").read_text() in keys
    assert (shared.home / "config/nocloud/id_ed25519.pub").read_text() in keys
    known = (shared.base / ".known_hosts").read_text()
    conf = shared.conf("id/default/a00")
    public = (shared.folder("id/default/a00") / "ssh_host_ed25519_key.pub").read_text().split()[1]
    assert known == f"{conf['vmUuid']},{conf['vmAddress']} ssh-ed25519 {public}\n"
    assert not (folder / "known_hosts").exists()


def test_another_host_key_is_refused(shared: Cloud) -> None:
    file = shared.base / ".known_hosts"
    good = file.read_text()
    other = shared.home / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    file.write_text(f"{good.split(' ')[0]} {' '.join(other.with_suffix('.pub').read_text().split()[:2])}\n")
    done = shared.ssh("a00", "echo in")
    assert done.status == 255 and done.stdout == "" and "HOST IDENTIFICATION HAS CHANGED" in done.stderr
    file.write_text(good)
    assert shared.ssh("a00", "echo in").ok().stdout == "in\n"


def test_the_key_goes_with_the_vm(shared: Cloud) -> None:
    shared.run("vmstop", "-d", "-g", "id").quiet()
    assert not (shared.base / ".known_hosts").exists()


@pytest.fixture(scope="module")
def keyed(guest_cache: Path, shared: Cloud) -> Cloud:
    """The template `keyed`: it knows one key of the user's and takes nothing from nocloud."""
    image = keyed_image(shared, guest_cache)
    add_template(shared, image, "keyed", "--mem", 96, "--cpu", 1, "--init", "ssh")
    add_template(shared, image, "plain", "--mem", 96, "--cpu", 1, "--init", "none")
    return shared


@pytest.mark.long
def test_a_guest_that_takes_nothing_is_configured_over_ssh(keyed: Cloud) -> None:
    """Hostname set over ssh, its host key pinned at first contact; with -w before it returns, else by a helper."""
    keyed.run("vminstantiate", "-n", "keyed", "-g", "a", "-o", "name=waited", "-w", READY).ok()
    assert keyed.ssh("waited00", "hostname; cat /etc/hostname").ok().stdout == "waited00\n" * 2
    assert keyed.conf("a/default/waited00")["vmUuid"] in (keyed.base / ".known_hosts").read_text()
    keyed.run("vmstop", "-d", "-g", "a").quiet()

    done = keyed.run("vminstantiate", "-n", "keyed", "-g", "b", "-o", "name=helped").ok()
    assert done.seconds < 30
    folder = keyed.folder("b/default/helped00")
    eventually((folder / "configured").exists, "the helper has configured it", 90)
    assert keyed.ssh("helped00", "cat /etc/hostname").ok().stdout == "helped00\n"
    eventually(
        lambda: not [words for words in keyed.processes().values() if "configure" in words], "the helper has ended", 20
    )
    keyed.run("vmstop", "-d", "-g", "b").quiet()


@pytest.mark.long
def test_init_none_touches_nothing(keyed: Cloud) -> None:
    keyed.run("vminstantiate", "-n", "plain", "-g", "c", "-o", "name=bare", "-w", READY).ok()
    assert not (keyed.folder("c/default/bare00") / "configured").exists()
    done = keyed.ssh("bare00", "cat /etc/hostname || echo none")
    assert done.ok().stdout.strip() in ("", "none")
    keyed.run("vmstop", "-d", "-g", "c").quiet()


@pytest.mark.long
def test_a_guest_that_lets_nobody_in_is_told_at_once(keyed: Cloud) -> None:
    """Without the user's key nothing can be set: said, not waited for until the time is over."""
    hidden = keyed.home / ".ssh/id_ed25519"
    hidden.rename(keyed.home / "hidden")
    try:
        done = keyed.run("vminstantiate", "-n", "keyed", "-g", "d", "-o", "name=shut", "-w", READY)
        done.fails(1, "shut00", "keys")
    finally:
        (keyed.home / "hidden").rename(hidden)
    keyed.run("vmstop", "-d", "-g", "d").quiet()
