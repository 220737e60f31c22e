"""Ways in by ssh: vmssh, the names of `nocloud ssh-config`, vmcp; with the host's real programs and a real guest."""

from __future__ import annotations

import io
import os
import re
import shutil
import socket
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import NOBODY, READY, Cloud, Result, add_blank, add_template, end_child, eventually, tree_at
from test_inventory import program

import nocloud

# ssh asks no HOME but /etc/passwd where its user's home is.  /dev/net/tun may be closed to an ordinary user.
ENTER = """set -e
mount --bind "$HOME/passwd" /etc/passwd
if [ "$1" != 0 ]; then mount -t tmpfs tmpfs /dev/net; mknod -m 666 /dev/net/tun c 10 200; fi
uid=$1; shift
exec setpriv --reuid="$uid" --regid="$uid" --clear-groups "$@"
"""


class Resident(Cloud):
    """A cloud whose user has its home for ssh too; all its programs run in a mount namespace."""

    def __init__(self, home: Path, uid: int) -> None:
        super().__init__(home)
        self.uid = uid
        (home / "passwd").write_text(f"root:x:0:0::{home}:/bin/sh\nguest:x:{NOBODY}:{NOBODY}::{home}:/bin/sh\n")
        (home / ".ssh").mkdir(0o700)

    def own(self) -> None:
        for path in [self.home, *self.home.rglob("*")]:
            os.chown(path, self.uid, self.uid, follow_symlinks=False)

    def inside(self, argv: list[str]) -> list[str]:
        return ["unshare", "--mount", "sh", "-c", ENTER, "sh", str(self.uid), *argv]

    def execute(self, argv: Iterable[object], *args: Any, **how: Any) -> Result:
        return super().execute(self.inside([*map(str, argv)]), *args, **how)

    def script(self, code: str, *words: object) -> Result:
        raise NotImplementedError

    @property
    def config(self) -> Path:
        return self.home / ".ssh/config"

    def configure(self, text: str) -> None:
        """The user's own ssh configuration, but for the Include."""
        include = [line for line in self.config.read_text().splitlines(True) if "Include" in line]
        self.config.write_text("".join(include) + text)
        os.chown(self.config, self.uid, self.uid)


def equipment() -> bytes:
    """A tar of what the tiny guest lacks: sftp-server, rsync and git, with their libraries, and a repository."""
    programs = {"/usr/lib/sftp-server": "/usr/lib/openssh/sftp-server"}
    programs.update({f"/usr/bin/{name}": f"/usr/bin/{name}" for name in ("rsync", "git")})
    for path in list(programs.values()):
        if not os.path.exists(path):
            pytest.fail(f"{path} is not installed: make test installs what the tests need")
        shown = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
        for library in re.findall(r"=> (/\S+)", shown):
            if "libc.so" not in library:
                programs[f"/lib/{os.path.basename(library)}"] = library
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", dereference=True) as tar, tempfile.TemporaryDirectory() as folder:
        for name, path in programs.items():
            tar.add(path, name.lstrip("/"), recursive=False)
        git = ["git", "-C", folder, "-c", "user.name=A", "-c", "user.email=a@example.org"]
        for words in (["init", "-q", "-b", "main"], ["commit", "-q", "--allow-empty", "-m", "the first"]):
            subprocess.run([*git, *words], check=True)
        tar.add(folder, "root/repository")
        for name in ("usr/lib/git-core/git", "usr/bin/git-upload-pack"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, "/usr/bin/git"
            tar.addfile(link)
    return stream.getvalue()


@pytest.fixture(scope="module", params=["root", pytest.param("user", marks=pytest.mark.long)])
def people(request: pytest.FixtureRequest, tiny_image: Path) -> Iterator[Resident]:
    """web00 and web01 of shop/web run for root, or for an ordinary user, and have what ssh's kin needs."""
    if os.geteuid() != 0:
        pytest.skip("another /etc/passwd is root's to mount")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        cloud = Resident(folder / "home", 0 if request.param == "root" else NOBODY)
        with cloud:
            image = cloud.home / "tiny.qcow2"
            shutil.copyfile(tiny_image, image)
            cloud.own()
            add_template(cloud, image)
            words = ("-g", "shop", "-t", "web", "-C", 2, "-o", "name=web;mem=160", "-w", READY)
            cloud.run("vminstantiate", "-n", "tiny", *words).ok()
            tar = equipment()
            for name in ("web00", "web01"):
                argv = cloud.inside(cloud.argv("vmssh", name, "tar xf - -C /"))
                subprocess.run(argv, input=tar, env=cloud.env, cwd=cloud.home, check=True)
            cloud.run("ssh-config", "--install").ok()
            yield cloud
    finally:
        shutil.rmtree(folder)


# The installed configuration #########################################################################

NAMES = ("web00.shop.nocloud", "shop/web00", "web00.shop", "web00")


@pytest.mark.parametrize("name", NAMES)
def test_ssh_by_name(people: Resident, name: str) -> None:
    assert people.execute(["ssh", name, "hostname"]).ok().stdout == "web00\n"
    assert not (people.home / ".ssh/known_hosts").exists()


def test_scp_sftp_rsync_and_git_by_name(people: Resident) -> None:
    (people.home / "file").write_text("by name\n")
    people.execute(["scp", "file", "web00.shop.nocloud:/tmp/one"]).ok()
    people.execute(["sftp", "-b", "-", "web00"], input="rename /tmp/one /tmp/two\nget /tmp/two back\n").ok()
    assert (people.home / "back").read_text() == "by name\n"
    people.execute(["rsync", "-a", "web00.shop:/tmp/two", "rsynced"]).ok()
    assert (people.home / "rsynced").read_text() == "by name\n"
    people.execute(["git", "clone", "-q", "ssh://web00.shop.nocloud/root/repository", "cloned"]).ok()
    assert "the first" in people.execute(["git", "-C", "cloned", "log"]).ok().stdout


def test_what_else_calls_ssh_by_name(people: Resident) -> None:
    """ssh-copy-id; and an editor's remote half, which wants a shell without a terminal, and a SOCKS proxy beside it."""
    people.execute(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", people.home / "other"]).ok()
    people.execute(["ssh-copy-id", "-f", "-i", "other.pub", "web01.shop"]).ok()  # -f: a key of ours gets in already
    key = (people.home / "other.pub").read_text()
    assert (
        key in people.execute(["ssh", "web01", "cat /etc/dropbear/authorized_keys"]).ok().stdout
    )  # that is root's, it knows
    words = ["ssh", "-T", "-D", people.home / "proxy", "-o", "ConnectTimeout=60", "shop/web01", "sh"]
    assert people.execute(words, input="hostname\n").ok().stdout == "web01\n"


# The user's own configuration ########################################################################

LINES = [  # what must not keep vmssh out
    "RemoteCommand /bin/false",
    "Port 2222",
    "HostName 192.0.2.1",
    "HostKeyAlias other",
    "HostKeyAlgorithms rsa-sha2-512",
    "PubkeyAcceptedAlgorithms rsa-sha2-512",
    "PreferredAuthentications password",
    "PubkeyAuthentication no",
    "SessionType none",
    "ForkAfterAuthentication yes",
    "StdinNull yes",
    "RequestTTY force",
    "ProxyJump 192.0.2.1",
    "User nobody",
    "IdentitiesOnly yes\n IdentityFile /dev/null",
    "CanonicalizeHostname always\n CanonicalDomains example.org",
    "AddressFamily inet6",
    "StrictHostKeyChecking no\n UserKnownHostsFile /dev/null",
    "IgnoreUnknown UseKeychain\n UseKeychain yes",
]


def says_its_name(people: Resident) -> None:
    done = people.run("vmssh", "web00", "hostname; cat; exit 7", input="a\nb\n")
    assert (done.status, done.stdout) == (7, "web00\na\nb\n"), repr(done)


def test_no_configuration_of_the_users_keeps_vmssh_out(people: Resident) -> None:
    people.configure("Host *\n" + "".join(f" {line}\n" for line in LINES))
    says_its_name(people)
    (people.home / "a file").write_text("copied\n")
    for words in (("--sync",), ()):
        people.run("vmcp", *words, "a file", "web00:/tmp/").ok()
    assert people.run("vmcp", "web00:/tmp/a file", "-").ok().stdout == "copied\n"


@pytest.mark.long
def test_nor_ansible(people: Resident) -> None:
    """By ssh, and with a file that it copies by sftp first."""
    people.configure("Host *\n" + "".join(f" {line}\n" for line in LINES))
    links = people.home / "links"
    links.mkdir()
    (people.home / "script").write_text("#!/bin/sh\nhostname\n")
    people.own()
    people.run("links", links).ok()
    for way in ("sftp", "piped"):
        argv = [program("ansible"), "-i", links / "vminventory", "all", "-m", "script", "-a", "./script"]
        env = {"ANSIBLE_SSH_ARGS": "-o ControlMaster=no", "ANSIBLE_SSH_TRANSFER_METHOD": way, "ANSIBLE_NOCOLOR": "1"}
        path = f"{Path(program('ansible')).parent}:{people.env['PATH']}"
        done = people.execute(argv, env=env | {"PATH": path}).ok()
        assert '"web00"' in done.stdout and '"web01"' in done.stdout, repr(done)


@pytest.mark.long
@pytest.mark.parametrize("line", LINES)
def test_nor_does_a_line_alone(people: Resident, line: str) -> None:
    people.configure(f"Host *\n {line}\n")
    says_its_name(people)


def test_agents_and_forwarding_are_the_users(people: Resident) -> None:
    people.configure("Host *\n ForwardAgent yes\n LocalForward 4711 localhost:80\n SendEnv SHOP\n Port 2222\n")
    shown = people.run("vmssh", "-G", "web00").ok().lines
    for line in ("forwardagent yes", "localforward 4711 [localhost]:80", "sendenv SHOP", "port 22", "user root"):
        assert line in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("ann@web00", "user ann"),
        ("-l ann web00", "user ann"),
        ("web00 -l ann", "user ann"),
        ("-p2200 web00", "port 2200"),
        ("-o Port=2200 shop/web00", "port 2200"),
        ("-NT -D 1080 web00", "dynamicforward 1080"),
        ("web00 -N -D 1080", "sessiontype none"),
        ("-s web00 sftp", "sessiontype subsystem"),
        ("-o Compression=yes web00 -4", "compression yes"),
    ],
)
def test_options_are_ssh_s(people: Resident, words: str, said: str) -> None:
    people.configure("")
    assert said in people.run("vmssh", "-G", *words.split()).ok().lines


def test_a_port_forwarded_while_a_command_runs(people: Resident) -> None:
    """`vmssh -L …  VM COMMAND`: its server's banner comes through the forwarded socket."""
    path = people.home / "socket"
    child = subprocess.Popen(
        people.inside(people.argv("vmssh", "-L", f"{path}:localhost:22", "web00", "cat")),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=people.env, cwd=people.home, text=True,
    )  # fmt: skip
    try:
        eventually(path.exists, "ssh has logged in and listens")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            assert connection.recv(4) == b"SSH-"
        assert child.communicate("the end\n", 30)[0] == "the end\n"
    finally:
        end_child(child)


# vmcp ################################################################################################


def test_files_into_and_out_of_a_vm(people: Resident) -> None:
    (people.home / "in/deep").mkdir(parents=True)
    (people.home / "in/deep/file").write_text("deep\n")
    (people.home / "a:b").write_text("a colon\n")
    people.own()
    people.run("vmcp", "-r", "in/", "web00:/new").ok()  # DST isn't there: it becomes it, with a slash or without
    people.run("vmcp", "-r", "in/", "./a:b", "root@shop/web/web00:/new").ok()  # it is: they come into it
    listed = people.ssh("web00", "cd /new; find . -type f | sort").ok().lines
    assert listed == ["./a:b", "./deep/file", "./in/deep/file"]
    people.run("vmcp", "web00:/new/a:b", "web00:/new/deep/file", ".").ok()
    assert (people.home / "a:b").read_text() == "a colon\n" and (people.home / "file").read_text() == "deep\n"


def test_streams(people: Resident) -> None:
    people.run("vmcp", "-", "web00:it's a file", input="in\n").ok()
    assert people.run("vmcp", "web00:~/it's a file", "-").ok().stdout == "in\n"
    assert people.ssh("web00", "cat", "/root/it*").ok().stdout == "in\n"
    assert people.run("vmcp", "web00:/no/such", "-").status == 1


@pytest.mark.long
def test_from_vm_to_vm_and_to_several(people: Resident) -> None:
    people.ssh("web00", "echo between >/tmp/between").ok()
    people.run("vmcp", "web00:/tmp/between", "web01:/tmp/").ok()
    assert people.ssh("web01", "cat /tmp/between").ok().stdout == "between\n"
    (people.home / "all").write_text("all\n")
    people.own()
    for pattern in ("web*:/tmp/", "shop/*:/tmp/", "shop/web/web0?:/tmp/"):
        people.run("vmcp", "all", pattern).quiet()
        for name in ("web00", "web01"):
            assert people.ssh(name, "cat /tmp/all; rm /tmp/all").ok().stdout == "all\n"
    people.ssh("web01", "mkdir /tmp/only-here").ok()
    done = people.run("vmcp", "all", "web*:/tmp/only-here/")
    assert done.status == 1 and "web00: scp: " in done.stderr and "web01" not in done.stderr
    assert people.ssh("web01", "cat /tmp/only-here/all").ok().stdout == "all\n"


def test_sync_copies_what_differs(people: Resident) -> None:
    folder = people.home / "tree"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / name).write_text(name)
    people.own()
    people.run("vmcp", "--sync", "tree/", "web*:/mirror").quiet()
    people.ssh("web00", "echo changed >/mirror/one; echo kept >/mirror/three").ok()
    people.run("vmcp", "--sync", "tree/", "web00:/mirror").ok()
    assert people.ssh("web00", "cd /mirror; cat one two three").ok().stdout == "onetwokept\n"
    people.run("vmcp", "--sync", "web00:/mirror/", "back-again").ok()
    assert {path.name for path in (people.home / "back-again").iterdir()} == {"one", "two", "three"}


@pytest.mark.long
def test_a_vm_of_the_same_name_again(people: Resident) -> None:
    """Its host key is another one, and no stale one is in the way."""
    before = people.execute(["ssh", "web01.shop", "hostname; cat /etc/ssh/ssh_host_ed25519_key.pub"]).ok().lines
    people.run("vmstop", "-d", "-n", "web01").ok()
    assert "could not resolve" in people.execute(["ssh", "web01.shop", "true"]).stderr.lower()
    people.run("vminstantiate", "-n", "tiny", "-g", "shop", "-t", "web", "-o", "name=web", "-w", READY).ok()
    after = people.execute(["ssh", "web01.shop", "hostname; cat /etc/ssh/ssh_host_ed25519_key.pub"]).ok().lines
    assert before[0] == after[0] == "web01" and before[1] != after[1]


# Without a guest #####################################################################################


@pytest.fixture
def resident(public_folder: Path) -> Iterator[Resident]:
    if os.geteuid() != 0:
        pytest.skip("another /etc/passwd is root's to mount")
    cloud = Resident(public_folder / "home", 0)
    with cloud:
        yield cloud


def add_vm(cloud: Cloud, place: str, number: int) -> None:
    folder = cloud.base / place
    folder.mkdir(parents=True)
    uuid = f"00000000-0000-4000-8000-{number:012}"
    text = f"vmName={folder.name}\nvmUuid={uuid}\nvmAddress=10.88.0.{number}\nvmNetwork=private\n"
    (folder / f"{folder.name}.conf").write_text(text)


def offered(config: str) -> list[str]:
    return [line.removeprefix("Host ") for line in config.splitlines() if line.startswith("Host ")]


def test_what_is_offered_and_what_is_not(resident: Resident) -> None:
    """No name of the user's own, of the Internet or of two VMs; and every block is of literal names."""
    places = ("com/web/github", "shop/web/web00", "shop/db/db00", "test/web/web00", "a.b/web/x", "shop/web/localhost")
    for number, place in enumerate((*places, "shop/web/company", "shop/web/known", "shop/web/part", "my/sql/s0"), 2):
        add_vm(resident, place, number)
    add_vm(resident, "shop/web/bare", 90)
    conf = resident.base / "shop/web/bare/bare.conf"
    conf.write_text(conf.read_text().replace("vmUuid", "#"))
    (resident.home / ".ssh/more").mkdir()
    (resident.home / ".ssh/more/one.conf").write_text("Match originalhost part exec true\n")
    resident.config.write_text("Include more/*.conf\nInclude ~/nothing\nHost *\n Port 1\nHost comp* other\n User me\n")
    key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGb0mFyV3vuH4jtqE1Y0ZGGIS8vhPQHc1E5bUtG6aDnp"
    known = resident.home / ".ssh/known_hosts"
    known.write_text(f"known {key}\nknown.shop {key}\n")
    resident.execute(["ssh-keygen", "-H", "-f", known]).ok()  # hashed, as on Debian
    shown = resident.run("ssh-config").ok()
    assert offered(shown.stdout) == [
        "x.a.b.nocloud a.b/x",
        "github.com.nocloud com/github github",
        "s0.my.nocloud my/s0 s0",
        "db00.shop.nocloud shop/db00 db00.shop db00",
        "company.shop.nocloud shop/company",
        "known.shop.nocloud shop/known",
        "localhost.shop.nocloud shop/localhost",
        "part.shop.nocloud shop/part part.shop",
        "web00.shop.nocloud shop/web00 web00.shop",
        "web00.test.nocloud test/web00 web00.test",
    ]
    left = [line for line in shown.stdout.splitlines() if line.startswith("# not offered: ")]
    others = "it may be a name of this host's or the Internet's"
    config, listed = f"{resident.home}/.ssh/config has it", f"{known} has it"
    assert [tuple(line.removeprefix("# not offered: ").split(": ")) for line in left] == [
        *((name, others) for name in ("x.a.b", "x", "github.com", "s0.my")),
        ("shop/web/bare", "it has no address yet"),
        *((name, config) for name in ("company.shop", "company")),
        *((name, listed) for name in ("known.shop", "known")),
        *((name, others) for name in ("localhost.shop", "localhost")),
        ("part", config),
        ("web00", "another VM is called so"),
        ("web00", "another VM is called so"),
    ]
    assert not re.search(r"^Host .*[*?!]", shown.stdout, re.M)
    told = resident.run("ssh-config", "--install").ok().stderr.splitlines()
    assert [line.removeprefix("nocloud ssh-config: not offered: ") for line in told] == [each[15:] for each in left]


def test_one_include_at_the_top(resident: Resident) -> None:
    """Once, outside any block, by rename, 0600; a link stays a link; what was there is there again after --remove."""
    own = b"# mine\r\nHost *\r\n    User \xff\n"
    target = resident.home / "dotfiles"
    target.write_bytes(own)
    target.chmod(0o644)
    resident.home.chmod(0o755)
    resident.config.symlink_to("../dotfiles")
    before = target.stat().st_ino
    for _ in range(2):
        resident.run("ssh-config", "--install").quiet()
        include = f'Include "{resident.base}/.ssh_config"\n'.encode()
        assert target.read_bytes() == include + own and resident.config.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o600 and target.stat().st_ino != before
    target.write_bytes(own + include)  # the user moved it into a block
    resident.run("ssh-config", "--install").quiet()
    assert target.read_bytes() == include + own
    for _ in range(2):
        resident.run("ssh-config", "--remove").quiet()
        assert target.read_bytes() == own and resident.config.is_symlink()
        assert not (resident.base / ".ssh_config").exists()
    resident.run("ssh-config", "--remove", "--install").says(2, "--install and --remove exclude each other")
    assert not list((resident.home / ".ssh").glob("*.tmp"))
    assert resident.home.stat().st_mode & 0o777 == 0o755  # where the link leads is no folder of ssh's
    resident.config.unlink()
    os.mkfifo(resident.config)
    resident.run("ssh-config", "--install").says(1, f"{resident.config}: not a regular file")


def test_it_is_kept_up_to_date(resident: Resident, vms: None) -> None:
    add_blank(resident)
    file = resident.base / ".ssh_config"
    resident.run("vminstantiate", "-n", "blank", "-g", "shop", "-o", "name=web").ok()
    assert not file.exists()  # as long as nobody asked for it
    resident.run("ssh-config", "--install").quiet()
    assert offered(file.read_text()) == ["web00.shop.nocloud shop/web00 web00.shop web00"]
    resident.run("vminstantiate", "-n", "blank", "-g", "test", "-o", "name=web").ok()
    both = ["web00.shop.nocloud shop/web00 web00.shop", "web00.test.nocloud test/web00 web00.test"]
    assert offered(file.read_text()) == both
    resident.run("vmstop", "-d", "-g", "shop").ok()
    assert offered(file.read_text()) == ["web00.test.nocloud test/web00 web00.test web00"]
    resident.run("vmstop", "-d", "-g", "test").ok()
    assert file.read_text() == ""


@pytest.mark.parametrize(
    ("words", "status", "text", "hint"),
    [
        ("one", 2, "SRC and DST are needed", "vmcp FILE VM:PATH, or vmcp VM:PATH FILE"),
        ("one two", 2, "none of them is in a VM", "VM:PATH is, and ./a:b is a file of this host"),
        ("one web00:/x", 1, "web00: no such VM", "vmrunning -a lists them"),
        ("one shop/w*:/x", 1, "shop/w*: no such running VM", "vmrunning -a lists them"),
    ],
)
def test_what_vmcp_says(cloud: Cloud, words: str, status: int, text: str, hint: str) -> None:
    cloud.run("vmcp", *words.split()).says(status, text, hint)


def test_names_with_dots_are_no_other_vms() -> None:
    """a.b/c/d and a/b.c/d: scp is told neither by the dots alone."""
    tree = tree_at(Path("/nowhere"))
    vms = [nocloud.VM(tree, "a.b", "c", "d"), nocloud.VM(tree, "a", "b.c", "d"), nocloud.VM(tree, "a", "b", "d")]
    for number, vm in enumerate(vms):
        vm._conf = {"vmUuid": f"uuid-{number}"}
    assert [nocloud.copy_host(vm) for vm in vms] == ["uuid-0", "uuid-1", "a.b.d"]


def test_what_vmcp_cannot(blank: Cloud) -> None:
    blank.run("vminstantiate", "-n", "blank", "-g", "shop", "-C", 2, "-o", "name=web").ok()
    streams = "- is for one file, in one VM, without --sync"
    for words in ("- web*:/x", "- one web00:/x", "--sync - web00:/x", "web00:/x web01:/x -"):
        blank.run("vmcp", *words.split()).says(2, streams)
    hint = "only DST may be a pattern that several fit"
    blank.run("vmcp", "web*:/x", "here").says(2, "several VMs to copy from", hint)
