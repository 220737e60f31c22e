"""Templates from packages: what is asked of which archive, the cache of builds, and Debian 13 for real (long).

Where mmdebstrap is replaced, its stand-in makes a tar of just what the steps after it need; they run for real.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import has_subordinate_ids
from support import ROOT, Cloud, eventually, replace_program
from webserver import Site, status

import nocloud

KEY = "/usr/share/keyrings/debian-archive-keyring.gpg"
DEBIAN_HOST = {"ID": "debian", "VERSION_CODENAME": "bookworm"}
UBUNTU_HOST = {"ID": "ubuntu", "VERSION_CODENAME": "noble", "ID_LIKE": "debian"}


Archives = list[tuple[str, str, str]]


def archives(uri: str, *suites: str, components: str = "main") -> Archives:
    return [(uri, suite, component) for suite in suites for component in components.split()]


MIRROR = archives("http://mirror/debian/", "bookworm", "bookworm-updates", "bookworm-backports")
SECURITY = archives("http://mirror/security/", "bookworm-security")
OTHERS = archives("http://own/", "bookworm", components="extra")
NOBLE = archives("http://mirror/ubuntu/", "noble", "noble-security", components="main universe restricted")
needs_keys = pytest.mark.skipif(not os.path.exists(KEY), reason="debian-archive-keyring is not installed")


@pytest.mark.parametrize(
    ("suite", "found", "host", "expected"),
    [
        (
            "bookworm", MIRROR + SECURITY + OTHERS, DEBIAN_HOST,
            ["http://mirror/debian/ bookworm main", "http://mirror/debian/ bookworm-updates main",
             "http://mirror/security/ bookworm-security main"],
        ),
        (
            "trixie", MIRROR + SECURITY, DEBIAN_HOST,
            ["http://mirror/debian/ trixie main", "http://mirror/debian/ trixie-updates main",
             "http://mirror/security/ trixie-security main"],
        ),
        ("sid", MIRROR + SECURITY, DEBIAN_HOST, ["http://mirror/debian/ sid main"]),
        (
            "bookworm", archives("http://m/", "bookworm", components="main contrib"), DEBIAN_HOST,
            ["http://m/ bookworm contrib main"],
        ),
        (
            "trixie", archives("http://m/", "bookworm", components="main contrib"), DEBIAN_HOST,
            ["http://m/ trixie main"],
        ),
        (
            "noble", NOBLE, UBUNTU_HOST,
            ["http://mirror/ubuntu/ noble main restricted universe",
             "http://mirror/ubuntu/ noble-security main restricted universe"],
        ),
        (
            "jammy", NOBLE, UBUNTU_HOST,
            ["http://mirror/ubuntu/ jammy main universe", "http://mirror/ubuntu/ jammy-security main universe"],
        ),
    ],
)  # fmt: skip
def test_the_hosts_own_mirrors(suite: str, found: Archives, host: dict[str, str], expected: list[str]) -> None:
    distribution = nocloud.Build(suite, [], 10).distribution
    if not os.path.exists(distribution.keys):
        pytest.skip(f"{distribution.keyring} is not installed")
    lines = nocloud.package_sources(suite, distribution, found, host)
    assert lines == [f"deb [signed-by={distribution.keys}] {line}" for line in expected]


def test_only_the_distributions_own_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """apt-get leaves the others out, whose suites may be called the same."""
    script = 'case "$*" in *"Origin: Debian"*) ;; *) echo "http://others/|bookworm|main";; esac; '
    script += 'echo "http://m/|bookworm|main"'
    monkeypatch.setenv("PATH", replace_program(tmp_path / "bin", "apt-get", script))
    assert nocloud.host_archives(nocloud.DEBIAN) == [("http://m/", "bookworm", "main")]


@needs_keys
@pytest.mark.parametrize("host", [UBUNTU_HOST, {"ID": "fedora"}, {}])
def test_the_public_archive_for_other_hosts(host: dict[str, str]) -> None:
    """mmdebstrap is given no sources then, and takes its own."""
    assert nocloud.package_sources("trixie", nocloud.DEBIAN, NOBLE, host) == []
    build = nocloud.Build("noble", [], 10)
    assert nocloud.archive_state(build, nocloud.Web(1)) == time.strftime("%Y%m%d")


def test_without_a_keyring_nothing_is_trusted() -> None:
    other = nocloud.Distribution("nosuch", "Nosuch", "nosuch-keyring", "main", "linux")
    with pytest.raises(nocloud.Error, match="nosuch-archive-keyring") as caught:
        nocloud.package_sources("one", other, MIRROR, DEBIAN_HOST)
    assert caught.value.hint == "sudo apt install nosuch-keyring"


@pytest.mark.parametrize(
    ("suite", "distribution", "kernel", "init", "more"),
    [
        ("bookworm", "Debian", "linux-image-cloud-amd64", "systemd", []),
        ("trixie", "Debian", "linux-image-cloud-amd64", "systemd", []),
        ("noble", "Ubuntu", "linux-image-virtual", "systemd", []),
        ("jammy", "Ubuntu", "linux-image-virtual", "cloud-init", ["cloud-init", "cloud-guest-utils"]),
    ],
)
def test_what_is_installed(suite: str, distribution: str, kernel: str, init: str, more: list[str]) -> None:
    build = nocloud.Build(suite, ["jq"], 10)
    seeded = nocloud.Build(suite, ["jq"], 10, seeded=True)
    assert seeded.init == "cloud-init" and seeded.packages[-3:] == ["cloud-init", "cloud-guest-utils", "jq"]
    assert (build.distribution.name, build.packages[0], build.init) == (distribution, kernel, init)
    assert build.packages[-len(more) - 1 :] == [*more, "jq"] and "openssh-server" in build.packages
    assert build.title == f"packages of {suite}, with jq"


@pytest.mark.parametrize(("suite", "kernel"), [("trixie", "linux-image-cloud-arm64"), ("noble", "linux-image-virtual")])
def test_what_is_installed_for_arm64(suite: str, kernel: str) -> None:
    """No boot loader for a BIOS; and what was built for another architecture is another build."""
    build, other = nocloud.Build(suite, [], 10, arch="aarch64"), nocloud.Build(suite, [], 10)
    assert (build.arch, build.packages[0]) == ("arm64", kernel)
    assert {*other.packages[1:]} - {*build.packages} == {"grub-pc-bin"}
    assert nocloud.build_recipe(build) != nocloud.build_recipe(other)


@pytest.mark.skipif(os.path.exists(nocloud.UBUNTU.keys), reason="ubuntu-keyring is installed")
def test_ubuntu_without_its_keys(cloud: Cloud) -> None:
    cloud.run("vmtemplate", "x", "--build", "noble").fails(1, nocloud.UBUNTU.keys, "apt install ubuntu-keyring")
    assert not cloud.base.exists()


@pytest.mark.parametrize("folder", ["", "boot/"])
def test_the_kernel_is_found_where_the_distribution_links_it(tmp_path: Path, folder: str) -> None:
    (tmp_path / "boot").mkdir()
    target = "vmlinuz-6.8.0-31-generic" if folder else "boot/vmlinuz-6.8.0-31-generic"
    (tmp_path / folder / "vmlinuz").symlink_to(target)
    assert nocloud.boot_links(str(tmp_path)) == (f"{folder}vmlinuz", f"{folder}initrd.img")
    assert os.readlink(tmp_path / folder / "initrd.img") == target.replace("vmlinuz", "initrd.img")
    (tmp_path / folder / "vmlinuz").unlink()
    with pytest.raises(nocloud.Error, match="no link vmlinuz"):
        nocloud.boot_links(str(tmp_path))


@pytest.mark.parametrize("name", ["tree/usr/lib/nocloud/grow", "links", "litter", "dpkg.cfg", "target.sh"])
def test_what_a_guest_is_made_of_is_part_of_the_recipe(tmp_path: Path, name: str) -> None:
    """Else a build of an older nocloud's would be taken from the cache."""
    shutil.copy(ROOT / "nocloud.py", tmp_path)
    shutil.copytree(ROOT / "etc", tmp_path / "etc")
    script = "import nocloud; print(nocloud.build_recipe(nocloud.Build('bookworm', [], 10)))"
    argv = [sys.executable, "-BS", "-c", script]
    before = subprocess.check_output(argv, cwd=tmp_path)
    with open(tmp_path / "etc/build" / name, "a") as file:
        file.write("# changed\n")
    assert subprocess.check_output(argv, cwd=tmp_path) != before


# The cache of builds #################################################################################

PACKAGES = "aa" * 32


class Builder:
    """A cloud whose apt-get names an archive on 127.0.0.1, and whose mmdebstrap makes a tar of hardly anything."""

    def __init__(self, cloud: Cloud, site: Site) -> None:
        self.cloud, self.site = cloud, site
        host = nocloud.os_release()
        self.suite = host["VERSION_CODENAME"]
        self.index = f"/debian/dists/{self.suite}/InRelease"
        line = f"{site.base}/debian/|{self.suite}|main"
        programs = cloud.home / "bin"
        replace_program(programs, "apt-get", f"echo '{line}'")
        replace_program(programs, "apt-config", "exit 0")
        path = replace_program(
            programs,
            "mmdebstrap",
            'echo run >>"$HOME/runs"; printf "%s\\n" "$@" >"$HOME/words"\n'
            'while [ -e "$HOME/gate" ]; do sleep 0.05; done\n'
            'for word; do case $word in *root.tar) tar -C "$HOME/system" -cf "$word" . ;; esac; done',
        )
        cloud.env |= {"PATH": path, "NOCLOUD_vmCreateDiskSize": "1", "NOCLOUD_vmDownloadTimeout": "1"}
        system = cloud.home / "system"
        for folder in ("boot/grub", "usr/lib/grub/i386-pc", "etc"):
            (system / folder).mkdir(parents=True)
        (system / "boot/vmlinuz-1").write_bytes(b"kernel")
        (system / "vmlinuz").symlink_to("boot/vmlinuz-1")
        (system / "boot/grub/core.img").write_bytes(b"core")
        (system / "boot/esp").write_bytes(b"FAT")
        (system / "usr/lib/grub/i386-pc/boot.img").write_bytes(bytes(512))
        self.publish(PACKAGES, "Mon")

    def publish(self, digest: str, date: str) -> None:
        other = f" {'bb' * 32} 99 contrib/binary-amd64/Packages\n {'cc' * 32} 9 main/binary-arm64/Packages"
        text = f"Origin: Debian\nDate: {date}\nSHA256:\n {digest} 1234 main/binary-amd64/Packages\n{other}{date}\n"
        self.site.files[self.index] = text.encode()

    def argv(self, name: str, *words: str) -> tuple[str, ...]:
        return ("vmtemplate", name, "--build", self.suite, *words)

    def build(self, name: str, *words: str) -> str:
        return self.cloud.run(*self.argv(name, *words)).ok().stderr

    @property
    def runs(self) -> int:
        file = self.cloud.home / "runs"
        return len(file.read_text().splitlines()) if file.exists() else 0

    @property
    def kept(self) -> list[Path]:
        return sorted((self.cloud.home / "cache/nocloud/images").glob("*"))

    def disk(self, name: str) -> Path:
        return self.cloud.base / f"templates/{name}/{name}_0.img"


@pytest.fixture
def builder(cloud: Cloud, vms: None) -> Iterator[Builder]:
    if os.geteuid() != 0 and not has_subordinate_ids():
        pytest.skip("this user has no subordinate uids in /etc/subuid")
    if nocloud.os_release().get("ID") not in ("debian", "ubuntu"):
        pytest.skip("the host's apt is asked for its mirrors on Debian and Ubuntu only")
    with Site() as site:
        yield Builder(cloud, site)


def test_the_same_is_built_once(builder: Builder) -> None:
    assert "built in" in builder.build("one")
    assert "the build is in the cache" in builder.build("two") and builder.runs == 1
    subprocess.run(["qemu-img", "compare", "-q", builder.disk("one"), builder.disk("two")], check=True)
    one, two = builder.cloud.conf("templates/one"), builder.cloud.conf("templates/two")
    assert one["vmUuid"] != two["vmUuid"] and one["vmSource"] == two["vmSource"] == f"packages of {builder.suite}"
    assert builder.disk("two").stat().st_mode & 0o222 == 0
    builder.publish(PACKAGES, "Tue")
    assert "in the cache" in builder.build("three"), "only the packages count, not when their list was signed"
    builder.build("four", "--rebuild")
    assert builder.runs == 2 and len(builder.kept) == 1
    names = {path.name for path in (builder.cloud.base / "templates/four").iterdir()}
    assert names == {"four.conf", "four_0.img"}


def test_each_firmware_finds_its_boot_loader(builder: Builder) -> None:
    """The root comes last, where it can grow, and is the first partition nevertheless."""
    builder.build("one")
    raw = builder.cloud.home / "raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", builder.disk("one"), raw], check=True)
    told = json.loads(subprocess.check_output([nocloud.find_program("sfdisk"), "--json", raw]))["partitiontable"]
    root, uefi = told["partitions"]
    assert (root["type"], root["bootable"], root["start"] + root["size"]) == ("83", True, 2 << 20)
    assert (uefi["type"], uefi["start"], uefi["start"] + uefi["size"]) == ("ef", 2048, root["start"])
    with open(raw, "rb") as file:
        assert file.read(516)[512:] == b"core"
        file.seek(1 << 20)
        assert file.read(3) == b"FAT"


def test_what_differs_is_built_again(builder: Builder) -> None:
    builder.build("one")
    first = builder.kept
    builder.publish("dd" * 32, "Tue")
    assert "built in" in builder.build("two") and builder.runs == 2
    assert len(builder.kept) == 1 and builder.kept != first, "the old one can't be asked for any more"
    assert "built in" in builder.build("three", "--include", "jq") and len(builder.kept) == 2
    builder.cloud.env["NOCLOUD_vmCreateDiskSize"] = "2"
    assert "built in" in builder.build("four") and builder.runs == 4 and len(builder.kept) == 3


def test_a_damaged_build_is_not_used(builder: Builder) -> None:
    builder.build("one")
    image = builder.kept[0] / "image"
    image.write_bytes(b"x" + image.read_bytes()[1:])
    assert "is damaged, it is built again" in builder.build("two") and builder.runs == 2
    (builder.kept[0] / "sha256").unlink()
    builder.build("three")
    assert builder.runs == 3
    assert "in the cache" in builder.build("four")


def test_progress_says_sizes_and_nothing_twice(capsys: pytest.CaptureFixture[str]) -> None:
    progress = nocloud.BuildProgress("a-suite")
    for line in (
        "Get:1 http://deb.debian.org/debian bookworm InRelease [151 kB]",  # a list: no package yet
        "0 upgraded, 2 newly installed, 0 to remove and 1 not upgraded.",
        "Need to get 22.2 MB of archives.",
        "Get:1 http://deb.debian.org/debian bookworm/main amd64 libc6 amd64 2.36-9+deb12u14 [2759 kB]",
        "Get:2 http://deb.debian.org/debian bookworm/main amd64 bash amd64 5.2 [1490 kB]",
        *("Unpacking libc6 (2.36)", "Setting up libc6 (2.36)", "Unpacking bash (5.2)", "Setting up bash (5.2)"),
        "0 upgraded, 1 newly installed, 0 to remove and 1 not upgraded.",
        "Need to get 5616 B of archives.",
        "Get:1 http://deb.debian.org/debian bookworm/main amd64 hello amd64 1 [5616 B]",
        "Setting up hello (1)",
    ):
        progress(line)
    assert [line.removeprefix("a-suite: ") for line in capsys.readouterr().err.splitlines()] == [
        "downloading packages, 22.2 MB",
        "unpacking packages",
        "setting up packages",
        "downloading packages, 5616 B",
    ]


def test_a_suite_that_is_mistyped(builder: Builder) -> None:
    """What was typed is named, and not the suite of its security updates, whichever the archive is asked for first."""
    hint = "did you mean bookworm?"
    done = builder.cloud.run("vmtemplate", "x", "--build", "bokworm")
    done.fails(1, "bokworm: no such suite on ", hint)
    error = nocloud.build_error(
        nocloud.Build("bokworm", [], 1), "The repository 'http://x/debian-security bokworm-security Release' "
        "does not have a Release file."
    )  # fmt: skip
    assert (error.text, error.hint) == ("bokworm: no such suite on http://x/debian-security", hint)


def test_an_archive_that_does_not_answer(builder: Builder) -> None:
    """mmdebstrap may know ways that we don't: it is tried, and its work counts for the day."""
    del builder.site.files[builder.index]
    builder.cloud.run(*builder.argv("x")).fails(1, f"{builder.suite}: no such suite on {builder.site.base}/debian/")
    assert builder.runs == 0
    builder.site.tricks[builder.index] = status(403)
    builder.build("one")
    assert "in the cache" in builder.build("two") and builder.runs == 1


@needs_keys
def test_mmdebstrap_finds_the_keys_of_its_own_sources(builder: Builder) -> None:
    """The host's apt doesn't trust another distribution: without a signed-by, its archive would be refused."""
    builder.build("one")
    words = (builder.cloud.home / "words").read_text().splitlines()
    assert "--skip=check/signed-by" in words and any(word.startswith("deb ") for word in words)
    replace_program(builder.cloud.home / "bin", "apt-get", "exit 0")
    builder.cloud.run("vmtemplate", "two", "--build", "trixie").ok()
    words = (builder.cloud.home / "words").read_text().splitlines()
    assert "--skip=check/signed-by" not in words and not any(word.startswith("deb ") for word in words)
    assert "--components=main" in words


def test_the_archive_is_asked_through_apts_own_proxy(builder: Builder) -> None:
    programs = builder.cloud.home / "bin"
    text = (programs / "apt-get").read_text()
    (programs / "apt-get").write_text(text.replace(builder.site.base, "http://archive.invalid"))
    replace_program(programs, "apt-config", f"echo \"http_proxy='{builder.site.base}'\"")
    builder.build("one")
    assert builder.site.asked(builder.index) == [""] and "build-" in builder.kept[0].name
    builder.publish("dd" * 32, "Tue")
    assert "built in" in builder.build("two")


@pytest.mark.parametrize("names", [("one", "two"), ("one", "one")])
def test_two_builds_at_once(builder: Builder, names: tuple[str, str]) -> None:
    gate = builder.cloud.home / "gate"
    gate.touch()
    first = builder.cloud.spawn(*builder.argv(names[0]))
    eventually(lambda: builder.runs, "the first one builds")
    second = builder.cloud.spawn(*builder.argv(names[1]))
    eventually(lambda: len(builder.site.asked(builder.index)) == 2, "the second one has asked the archive")
    gate.unlink()
    told = [child.communicate(timeout=60)[1] for child in (first, second)]
    assert (first.returncode, second.returncode, builder.runs) == (0, int(names[0] == names[1]), 1), told
    assert ("is in the cache" if names[0] != names[1] else "there is such a template already") in told[1], told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_builds(builder: Builder, number: signal.Signals) -> None:
    gate = builder.cloud.home / "gate"
    gate.touch()
    child = builder.cloud.spawn(*builder.argv("x"))
    eventually(lambda: builder.runs, "it builds")
    os.kill(child.pid, number)
    child.communicate(timeout=20)
    assert child.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, -9)
    gate.unlink()
    if number != signal.SIGKILL:
        assert not builder.kept and not (builder.cloud.base / "templates").exists()
    builder.build("x")
    assert os.listdir(builder.cloud.base / "templates") == ["x"] and len(builder.kept) == 1


# For real ############################################################################################


@pytest.mark.long
@pytest.mark.parametrize("suite", ["trixie", "noble", "jammy"])
def test_a_suite_for_real(cloud: Cloud, vms: None, suite: str) -> None:
    """Built, cloned, asked for its name; shut down properly, and started again; frozen, with its own host key."""
    distribution = nocloud.Build(suite, [], 1).distribution
    if not os.path.exists(distribution.keys):
        pytest.skip(f"{distribution.keys} isn't there ({distribution.keyring})")
    cloud.run("vmtemplate", "new", "--build", suite, "--include", "jq", "--mem", 512, timeout=900).ok()
    assert "in the cache" in cloud.run("vmtemplate", "again", "--build", suite, "--include", "jq").ok().stderr
    assert cloud.run("vminstantiate", "-n", "new", "-g", "pf", "-o", "name=web", "-w", "500", timeout=600).ok().lines
    script = "hostname; cat /etc/hostname; . /etc/os-release; echo $VERSION_CODENAME; jq --version"
    words = cloud.ssh("web00", script).ok().lines
    assert words[:3] == ["web00", "web00", suite] and words[3].startswith("jq-")
    planted = (cloud.folder("pf/default/web00") / "ssh_host_ed25519_key.pub").read_text().split()[1]
    assert planted in cloud.ssh("web00", "cat /etc/ssh/ssh_host_ed25519_key.pub").ok().stdout
    assert cloud.ssh("web00", "systemctl is-system-running --wait; systemctl --failed -q").stdout == "running\n"
    shown = cloud.ssh("web00", "cat /etc/default/grub /boot/grub/grub.cfg").ok().stdout
    assert shown.count(distribution.name) == 2
    assert cloud.run("vmstop", "-n", "web00", "--timeout", 90, timeout=120).quiet().seconds < 60
    cloud.start("pf/default/web00").ok()
    cloud.env["NOCLOUD_vmWaitTimeout"] = "600"
    assert cloud.ssh("web00", "hostname", timeout=620).ok().stdout == "web00\n"
    cloud.run("vmtemplate", "again", "--warm", timeout=600).ok()
    done = cloud.run("vminstantiate", "-n", "again", "-g", "pf", "-o", "name=warm", "-w", "300", timeout=500).ok()
    assert " boots: " not in done.stderr and cloud.ssh("warm00", "hostname").ok().stdout == "warm00\n"
