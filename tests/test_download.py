"""Templates from the web: the catalogue, downloads from servers that behave and from those that don't, verification."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import pty
import random
import re
import select
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urljoin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT, Cloud, Result, eventually
from webserver import Content, Handler, Site, announce, break_off, drip, hold, make_certificate, page, redirect, status

import nocloud

HASH = {"sha512": "a" * 128, "sha256": "b" * 64, "md5": "c" * 32}


def digest(data: Content, algorithm: str = "sha256") -> str:
    return hashlib.new(algorithm, data if isinstance(data, bytes) else data.read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A qcow2 image of about 3 MB."""
    folder = tmp_path_factory.mktemp("image")
    with open(folder / "raw", "wb") as raw:
        raw.write(random.Random(1).randbytes(3 << 20))
        raw.truncate(64 << 20)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "raw", "qcow2"], cwd=folder, check=True)
    return (folder / "qcow2").read_bytes()


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as made:
        yield made


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def web(cloud: Cloud, vms: None) -> Cloud:
    """A cloud whose every way out but 127.0.0.1 is a proxy that isn't there."""
    dead = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https")}
    cloud.env |= dead | {"no_proxy": "127.0.0.1", "NOCLOUD_vmDownloadTimeout": "1"}
    return cloud


def extend(cloud: Cloud, text: str) -> None:
    path = cloud.home / "config/nocloud/templates.conf"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def offer(cloud: Cloud, site: Site, content: bytes, algorithm: str = "sha256", path: str = "/dir/x.qcow2") -> str:
    """The entry `x`, served well; its path."""
    site.files[path] = content
    site.files["/dir/SUMS"] = f"{digest(content, algorithm)}  {os.path.basename(path)}\n".encode()
    extend(cloud, f"[x]\nimage = {site.base}{path}\nchecksums = SUMS\nalgorithm = {algorithm}\nuser = fred\n")
    return path


def template(cloud: Cloud, name: str, *words: object, env: dict[str, str] | None = None) -> Result:
    return cloud.run("vmtemplate", name, *words, env=env)


def image_refused(cloud: Cloud, name: str, *words: str, options: Sequence[str] = ()) -> None:
    """It came whole, and that was told; then it was refused."""
    done = template(cloud, name, *options)
    first, _, done.stderr = done.stderr.partition("\n")
    assert first.startswith(f"{name}: downloaded "), repr(done)
    done.fails(1, *words)


def cached(cloud: Cloud) -> list[Path]:
    return sorted(path for path in (cloud.home / "cache").rglob("*") if path.is_file())


def nothing_came(cloud: Cloud, parts: bool = False) -> None:
    """No template, nothing half-made, and nothing in the cache but, if so said, a part to go on with."""
    assert not cloud.base.exists() or not cloud.files() - {"templates"}
    names = {path.name for path in cached(cloud)}
    assert names <= ({"image.part"} if parts else set()), names


def same_disk(cloud: Cloud, name: str, content: bytes, format: str = "qcow2") -> None:
    """The template's disk holds what the image holds, and is read-only."""
    disk = cloud.base / f"templates/{name}/{name}_0.img"
    original = cloud.temporary / "original"
    original.write_bytes(content)
    try:
        subprocess.run(["qemu-img", "compare", "-f", format, "-F", "qcow2", original, disk], check=True)
    finally:
        original.unlink()
    assert stat.S_IMODE(disk.stat().st_mode) == 0o444


# The catalogue #######################################################################################

PACKAGED = nocloud.Catalogue()
PACKAGED.read((ROOT / "etc/nocloud_templates.conf").read_text(), "nocloud_templates.conf")

# How the distributions' servers write their checksum files, typed from their own: the notation of its lines by the
# server's name, or by the entry's where one server has several. One that isn't here has lines `HASH  NAME`.
SUMS, STAR, BSD, BARE = "{hash}  {name}\n", "{hash} *{name}\n", "SHA256 ({name}) = {hash}\n", "{hash}\n"
NOTATIONS = {
    "cloud-images.ubuntu.com": STAR,
    "dl.fedoraproject.org": BSD,
    "dl.rockylinux.org": BSD,
    "cloud.centos.org": BSD,
    "dl-cdn.alpinelinux.org": BARE,
}
# Entries with a moving name whose checksum file gives the image a dated one: what it lists, the dated one first.
DATED = {
    "almalinux9": ["AlmaLinux-9-GenericCloud-9.7-20251118.x86_64.qcow2",
                   "AlmaLinux-9-GenericCloud-latest.x86_64.qcow2"],
    "almalinux10": ["AlmaLinux-10-GenericCloud-10.1-20251125.0.x86_64.qcow2",
                    "AlmaLinux-10-GenericCloud-latest.x86_64.qcow2"],
    "arch": ["Arch-Linux-x86_64-cloudimg-20261001.604814.qcow2"],
    "centos9": ["CentOS-Stream-GenericCloud-9-20260504.0.x86_64.qcow2"],
    "opensuse15.6": ["openSUSE-Leap-15.6-Minimal-VM.x86_64-15.6.0-Cloud-Build19.146.qcow2"],
}  # fmt: skip
DATED |= {
    f"{entry}-arm64": [name.replace("x86_64", "aarch64") for name in names]
    for entry, names in DATED.items()
    if f"{entry}-arm64" in PACKAGED.entries
}
NATIVE, FOREIGN = ([name for name in PACKAGED.entries if name.endswith("-arm64") == other] for other in (False, True))


def path_of(url: str) -> str:
    """Where the site has it: HOST/PATH, and [mirrors] sends downloads there."""
    return url.partition("://")[2]


def send_here(cloud: Cloud, site: Site, entries: Sequence[nocloud.Entry], more: str = "") -> None:
    """Have the local site stand for all servers that these entries name."""
    urls = [url for entry in entries for url in (*entry["image"].split(), entry["checksums"]) if "://" in url]
    hosts = {url.split("/")[2]: "/".join(url.split("/")[:3]) for url in urls}
    extend(cloud, more + "[mirrors]\n" + "".join(f"{url}/ = {site.base}/{host}/\n" for host, url in hosts.items()))


def lay_out(site: Site, entry: nocloud.Entry, content: bytes) -> tuple[str, str]:
    """Serve what the distribution has; the paths of the image, and of the one that is to be downloaded."""
    path = path_of(entry["image"].split()[0])
    folder, _, file = path.rpartition("/")
    if entry["kind"] != "cloud" or "*" in file:
        pytest.fail(f"[{entry.name}] of the catalogue: no test lays out such a server: teach lay_out() to")
    names = DATED.get(entry.name, [file])
    for each in {file, *names}:
        site.files[f"/{folder}/{each}"] = content
    if entry["checksum"]:
        return path, path
    sums, algorithm = path_of(urljoin(entry["image"].split()[0], entry["checksums"])), entry["algorithm"]
    notation = NOTATIONS.get(entry.name) or NOTATIONS.get(sums.partition("/")[0], SUMS)
    text = "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n# comment: 123 bytes\n"
    for other in ("other-amd64.qcow2", "other-amd64.raw") if entry.name not in DATED and notation != BARE else ():
        text += notation.format(name=other, hash=HASH[algorithm])
    text += "".join(notation.format(name=each, hash=digest(content, algorithm)) for each in names)
    site.files[f"/{sums}"] = (text if notation != BARE else text.splitlines()[-1] + "\n").encode()
    return path, f"{folder}/{names[0]}"


def try_entry(web: Cloud, site: Site, image: bytes, entry: nocloud.Entry, more: str = "") -> None:
    """It becomes a template, with what the catalogue says of it."""
    path, wanted = lay_out(site, entry, image)
    algorithm = entry["checksum"].partition(":")[0] or entry["algorithm"]
    if entry["checksum"]:
        send_here(web, site, [entry], more)
        template(web, entry.name).fails(1, path, f"refused: its {algorithm} checksum is not the published one")
        site.requests.clear()
        more += f"[{entry.name}]\nchecksum = {algorithm}:{digest(image, algorithm)}\n"
    send_here(web, site, [entry], more)
    template(web, entry.name).ok()
    conf = web.conf(f"templates/{entry.name}")
    assert conf["vmChecksum"] == f"{algorithm}:{digest(image, algorithm)}"
    assert conf["vmSource"] == f"{site.base}/{wanted}"
    assert (conf["vmUser"], conf["vmInit"]) == (entry["user"], entry["init"] or "auto")
    assert int(conf["vmMem"]) == int(entry["mem"] or 512)
    same_disk(web, entry.name, image)
    asked = [each for each, _ in site.requests]
    assert asked[0 if entry["checksum"] else 1 :] == [f"/{wanted}"], "the checksum file first, then one image"


@pytest.mark.parametrize("name", NATIVE)
def test_every_entry_of_the_catalogue(web: Cloud, site: Site, image: bytes, name: str) -> None:
    try_entry(web, site, image, PACKAGED.entries[name])


def test_every_entry_for_arm64(site: Site) -> None:
    """What it means; and that it is, but for the architecture, what the entry of the same system is."""
    for name in FOREIGN:
        entry, same = PACKAGED.entries[name], PACKAGED.entries[name[: -len("-arm64")]]
        assert (entry["arch"], same["arch"]) == ("aarch64", "x86_64")
        for key in ("algorithm", "user", "init", "mem", "kind"):
            assert entry[key] == same[key], name
        assert entry["title"] == f"{same['title']}, arm64" and re.search("arm64|aarch64", entry["image"])
        _, wanted = lay_out(site, entry, b"image")
        catalogue, hosts = nocloud.Catalogue(), {url.split("/")[2] for url in entry["image"].split()}
        hosts |= {entry["checksums"].split("/")[2]} if "://" in entry["checksums"] else set()
        catalogue.mirrors = {f"https://{host}/": f"{site.base}/{host}/" for host in hosts}
        source = nocloud.resolve(catalogue, entry, nocloud.Web(5))
        assert source.urls[0] == f"{site.base}/{wanted}", name
        assert entry["checksum"] or source.digest == digest(b"image", entry["algorithm"]), name


def test_the_entry_for_an_architecture() -> None:
    """By its own name, or by the system's where that is asked for."""
    native, need = os.uname().machine, PACKAGED.need
    names = {"x86_64": "debian13", "aarch64": "debian13-arm64"}
    assert need("debian13") is PACKAGED.entries[names[native]] and need("debian13-arm64").name == "debian13-arm64"
    for arch, name in names.items():
        assert need("debian13", arch).name == name
    for name, arch in (("arch", "aarch64"), ("debian13-arm64", "x86_64")):
        with pytest.raises(nocloud.NotFound, match=f"{name}: not in the catalogue for {arch}"):
            need(name, arch)


@pytest.mark.skipif(not shutil.which("qemu-system-aarch64"), reason="no qemu-system-aarch64")
def test_a_template_for_another_architecture(web: Cloud, site: Site, image: bytes, tmp_path: Path) -> None:
    try_entry(web, site, image, PACKAGED.entries["debian13-arm64"])
    (tmp_path / "x.qcow2").write_bytes(image)
    template(web, "x", "--image", tmp_path / "x.qcow2", "--arch", "aarch64").ok()
    for name in ("debian13-arm64", "x"):
        conf = web.conf(f"templates/{name}")
        assert (conf["vmArch"], conf["vmMachine"][:5]) == ("aarch64", "virt-")
    template(web, "x", "--warm", "--arch", "aarch64").fails(2, "is said when it is made")


def test_an_entry_with_its_own_checksum(web: Cloud, site: Site, image: bytes) -> None:
    text = f"[x]\nimage = https://server.example/dir/x.qcow2\nchecksum = sha512:{HASH['sha512']}\nuser = fred\n"
    catalogue = nocloud.Catalogue()
    catalogue.read(text + "init = cloud-init\n", "x")
    try_entry(web, site, image, catalogue.entries["x"], text + "init = cloud-init\n")


def test_no_row_is_of_a_server_or_an_entry_that_is_gone() -> None:
    text = (ROOT / "etc/nocloud_templates.conf").read_text()
    assert [row for row in DATED if row not in PACKAGED.entries] == []
    assert [row for row in NOTATIONS if f"https://{row}/" not in text and row not in PACKAGED.entries] == []


def test_check_catalogue(web: Cloud, site: Site, image: bytes) -> None:
    """What asks the real servers, asked of the local one."""
    entries = [PACKAGED.entries[name] for name in ("debian12", "arch", "rocky9")]
    for entry in entries:
        lay_out(site, entry, image)
    send_here(web, site, [*PACKAGED.entries.values()])
    words = [web.argv("template")[0], "-IS", ROOT / "tests/check_catalogue.py"]
    done = web.execute([*words, "debian12", "arch", "rocky9"]).ok()
    assert "3 of 3 entries are right" in done.lines[-1] and f"{DATED['arch'][0]}, 3 MB, sha256:" in done.stdout
    done = web.execute([*words, "debian12", "alpine3.23"])
    assert done.status == 1 and "alpine3.23: WRONG: " in done.stdout and "1 of 2 entries are right" in done.stdout


def test_dated_name_that_is_not_there(web: Cloud, site: Site, image: bytes) -> None:
    path, wanted = lay_out(site, PACKAGED.entries["arch"], image)
    del site.files[f"/{wanted}"]
    send_here(web, site, [PACKAGED.entries["arch"]])
    template(web, "arch").ok()
    assert site.asked(f"/{wanted}") == site.asked(f"/{path}") == [""]
    same_disk(web, "arch", image)


def test_newest_of_a_pattern(web: Cloud, site: Site, image: bytes) -> None:
    names = ["x-1.9.qcow2", "x-1.10.qcow2", "x-1.2.qcow2", "y-2.qcow2"]
    site.files["/x/SUMS"] = "".join(f"{digest(image) if '10' in n else HASH['sha256']}  {n}\n" for n in names).encode()
    site.files["/x/x-1.10.qcow2"] = image
    extend(web, f"[x]\nimage = {site.base}/x/x-*.qcow2\nchecksums = SUMS\nalgorithm = sha256\n")
    template(web, "x").ok()
    assert web.conf("templates/x")["vmSource"].endswith("/x-1.10.qcow2")


def test_lists(web: Cloud, site: Site, image: bytes) -> None:
    offer(web, site, image)
    template(web, "x").ok()
    shown = web.run("vmtemplate", "--list", "--available").ok().lines
    assert [line.split()[0] for line in shown] == [*PACKAGED.entries, "x"]
    assert re.fullmatch(r"x +there +fred +-", shown[-1])
    assert re.fullmatch(r"debian12 +- +debian +Debian 12 \(bookworm\)", shown[0])
    help = web.run("vmtemplate", "-h").ok().stdout
    assert all(name in help.split() for name in [*PACKAGED.entries, "x"])


def test_users_lines_win(web: Cloud, site: Site, image: bytes) -> None:
    """Single lines of a packaged entry can be changed, and the command line wins over all."""
    site.files["/mine.qcow2"] = image
    extend(web, f"[debian12] # mine\nimage = {site.base}/mine.qcow2\nchecksum = sha256:{digest(image)}\nmem = 777\n")
    template(web, "debian12", "--cpu", "3").ok()
    conf = web.conf("templates/debian12")
    assert (conf["vmMem"], conf["vmCpu"], conf["vmUser"], conf["vmInit"]) == ("777", "3", "debian", "cloud-init")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image = http://x/y", ["templates.conf:1", "expected [NAME] or KEY = VALUE"]),
        ("[x]\nnonsense", ["templates.conf:2", "expected [NAME] or KEY = VALUE"]),
        ("[../x]\n", ["templates.conf:1", "'/' is not allowed"]),
        ("[x]\nimage = ftp://x/y", ["templates.conf:2", "image", "http"]),
        ("[x]\nimage = http://u:p@x/y", ["templates.conf:2", "image", "login"]),
        ("[x]\nmem = 1G", ["templates.conf:2", "MB"]),
        ("[x]\nkind = odd", ["templates.conf:2", "cloud, classic"]),
        ("[x]\nchecksum = sha256:12", ["templates.conf:2", "all digits"]),
        ("[x]\n", ["templates.conf:1", "image ="]),
        ("[x]\nimage = http://127.0.0.1:9/y.img", ["templates.conf:1", "algorithm ="]),
        (
            "[x]\nimage = http://127.0.0.1:9/y.img\nalgorithm = sha256\nchecksums = file:///etc/passwd",
            ["templates.conf:1", "checksums = file:///etc/passwd", "http"],
        ),
        ("[x]\nimage = http://127.0.0.1:9/y.img\nchecksum = md5:" + "0" * 32, ["templates.conf:1", "md5"]),
    ],
)
def test_wrong_catalogues(web: Cloud, text: str, words: list[str]) -> None:
    extend(web, text)
    template(web, "x").fails(2, *words)
    nothing_came(web)
    web.run("vmtemplate", "-h").ok()


def test_unknown_names(web: Cloud) -> None:
    template(web, "debain12").fails(1, "not in the catalogue", "did you mean debian12?")
    template(web, "../x").fails(2, "is not allowed in a template name")
    extend(web, "[x]\nimag = http://127.0.0.1/\n")
    assert "unknown key imag, did you mean image?" in web.run("vmtemplate", "--available").ok().stderr


def test_catalogue_of_others(web: Cloud) -> None:
    extend(web, "[x]\nimage = http://127.0.0.1:9/y\n")
    (web.home / "config/nocloud/templates.conf").chmod(0o666)
    shown = web.run("vmtemplate", "--available").ok()
    assert "is skipped: others may write to it" in shown.stderr and "\nx " not in shown.stdout


def test_catalogue_of_the_installation(web: Cloud, tmp_path: Path) -> None:
    for folder in ("lib", "lib/etc", "etc"):
        (tmp_path / folder).mkdir()
    (tmp_path / "lib/nocloud.py").write_bytes((ROOT / "nocloud.py").read_bytes())
    (tmp_path / "lib/etc/nocloud_templates.conf").write_text("[first]\ntitle = packaged\n[second]\ntitle = packaged\n")
    (tmp_path / "etc/nocloud_templates.conf").write_text("[second]\ntitle = site\n[third]\ntitle = site\n")
    extend(web, "[third]\ntitle = own\n")
    (web.home / "config/nocloud/templates.conf").chmod(0o600)
    python = web.argv("vmtemplate")[0]
    shown = web.execute([python, "-IS", tmp_path / "lib/nocloud.py", "vmtemplate", "--available"]).ok()
    assert [line.split()[::3] for line in shown.lines] == [["first", "packaged"], ["second", "site"], ["third", "own"]]


# Checksum files ######################################################################################


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{HASH['sha256']}  x.img\n", [("x.img", HASH["sha256"])]),
        (f"{HASH['sha256']} *x.img\r\n", [("x.img", HASH["sha256"])]),
        (f"{HASH['sha256']}  ./folder/x.img", [("x.img", HASH["sha256"])]),
        (f"SHA256 (x.img) = {HASH['sha256']}", [("x.img", HASH["sha256"])]),
        (f"sha256(a (b).img)= {HASH['sha256'].upper()}", [("a (b).img", HASH["sha256"])]),
        (f"  {HASH['sha256']}  \n", [("", HASH["sha256"])]),
        (f"SHA512 (x.img) = {HASH['sha512']}\n{HASH['sha512']}  x.img\n{HASH['md5']}  x.img", []),
        (f"# x.img: 12 bytes\n{HASH['sha256']}x  y\n", []),
    ],
)
def test_notations(text: str, expected: list[tuple[str, str]]) -> None:
    assert nocloud.parse_checksums(text, "sha256") == expected


@given(st.text(), st.sampled_from(["sha512", "sha256", "md5"]))
def test_any_checksum_file(text: str, algorithm: str) -> None:
    for name, found in nocloud.parse_checksums(text, algorithm):
        assert "/" not in name and re.fullmatch("[0-9a-f]+", found)


A, B = HASH["sha256"], "d" * 64


@pytest.mark.parametrize(
    ("listed", "wanted", "expected"),
    [
        ([("x.img", A), ("y.img", B)], "x.img", ("x.img", A)),
        ([("", A)], "x.img", ("x.img", A)),
        ([("x-Build1.img", A)], "x.img", ("x-Build1.img", A)),
        ([("x-latest.img", A), ("x-20260101.img", A), ("x-20260101.raw", A)], "x-latest.img", ("x-20260101.img", A)),
        ([("x.img", A), ("alias.img", A)], "x.img", ("x.img", A)),
        ([("x-9.img", A), ("x-10.img", B)], "x-*.img", ("x-10.img", B)),
    ],
)
def test_choice(listed: list[tuple[str, str]], wanted: str, expected: tuple[str, str]) -> None:
    assert nocloud.choose_listed(listed, wanted) == expected


@pytest.mark.parametrize(
    ("listed", "wanted"),
    [
        ([("y.img", A), ("z.img", B)], "x.img"),
        ([("x.img.sig", A)], "x.img"),
        ([("x.img", A), ("x.img", B)], "x.img"),
    ],
)
def test_no_choice(listed: list[tuple[str, str]], wanted: str) -> None:
    with pytest.raises(ValueError):
        nocloud.choose_listed(listed, wanted)


@pytest.mark.parametrize(
    ("sums", "words"),
    [
        (b"<!DOCTYPE html><html>sign in</html>", ["not the checksum file", "web page"]),
        (b"", ["holds no sha256 checksums"]),
        ((HASH["md5"] + "  x.qcow2").encode(), ["holds no sha256 checksums"]),
        ((A + "  y.qcow2\n" + B + "  z.qcow2").encode(), ["doesn't list x.qcow2"]),
        ((A + "  x.qcow2\n" + B + "  x.qcow2").encode(), ["two checksums for x.qcow2"]),
        (b"x" * (5 << 20), ["longer than 4 MB"]),
    ],
)
def test_wrong_checksum_files(web: Cloud, site: Site, image: bytes, sums: bytes, words: list[str]) -> None:
    path = offer(web, site, image)
    site.files["/dir/SUMS"] = sums
    template(web, "x").fails(1, "/dir/SUMS", *words)
    assert not site.asked(path)
    nothing_came(web)


# Servers that don't behave ###########################################################################


def test_broken_off_and_gone_on(web: Cloud, site: Site, image: bytes) -> None:
    path = offer(web, site, image)
    site.tricks[path] = break_off(1 << 20, 1 << 20)
    template(web, "x").ok()
    assert site.asked(path) == ["", "bytes=1048576-", "bytes=2097152-"]
    same_disk(web, "x", image)
    assert [each.name for each in cached(web)] == ["image"]


def test_broken_off_without_ranges(web: Cloud, site: Site, image: bytes) -> None:
    path = offer(web, site, image)
    site.tricks[path] = break_off(1 << 20, ranges=False)
    template(web, "x").ok()
    same_disk(web, "x", image)


def test_broken_off_each_time(web: Cloud, site: Site, image: bytes) -> None:
    path = offer(web, site, image)
    site.tricks[path] = break_off(*[100] * 9)
    template(web, "x").fails(1, path, "broke off", "4 tries")
    nothing_came(web, parts=True)
    del site.tricks[path]
    template(web, "x").ok()
    assert site.asked(path)[-1] == "bytes=400-"
    same_disk(web, "x", image)


@pytest.mark.parametrize("length", [-1000, 1000])
def test_wrong_length(web: Cloud, site: Site, image: bytes, length: int) -> None:
    path = offer(web, site, image)
    site.tricks[path] = announce(len(image) + length)
    template(web, "x").fails(1, path, "checksum is not the published" if length < 0 else "broke off")
    nothing_came(web, parts=length > 0)


def test_wrong_checksum(web: Cloud, site: Site, image: bytes) -> None:
    path = offer(web, site, image)
    site.files[path] = image[:-1] + b"x"
    template(web, "x").fails(1, path, "refused", "sha256 checksum is not the published one")
    nothing_came(web)


def test_part_of_another_file(web: Cloud, site: Site, image: bytes) -> None:
    """What was pieced together of two files is thrown away, and the next command fetches it anew."""
    path = offer(web, site, image)
    folder = web.home / f"cache/nocloud/images/sha256-{digest(image)}"
    folder.mkdir(parents=True)
    (folder / "image.part").write_bytes(b"x" * 5000)
    template(web, "x").fails(1, "checksum is not the published one", "try again")
    nothing_came(web)
    template(web, "x").ok()
    assert site.asked(path) == ["bytes=5000-", ""]
    same_disk(web, "x", image)


def test_new_release_while_downloading(web: Cloud, site: Site, image: bytes) -> None:
    """The checksum file was read, and then both files were replaced: the next call gets them."""
    path = offer(web, site, image)
    site.files["/dir/SUMS"] = (A + "  x.qcow2").encode()
    new = f"{digest(image)}  x.qcow2".encode()

    def trick(handler: object) -> bool:
        site.files["/dir/SUMS"] = new
        return False

    site.tricks[path] = trick
    template(web, "x").fails(1, path, "is not the published one", "replaced just now")
    template(web, "x").ok()
    same_disk(web, "x", image)


def test_not_there(web: Cloud, site: Site, image: bytes) -> None:
    path = offer(web, site, image)
    del site.files[path]
    template(web, "x").fails(1, path, "no such file (404)", "catalogue")
    nothing_came(web)
    del site.files["/dir/SUMS"]
    template(web, "x").fails(1, "/dir/SUMS", "no such file (404)")
    nothing_came(web)


def test_second_url(web: Cloud, site: Site, image: bytes) -> None:
    path = offer(web, site, image)
    extend(
        web,
        f"[x]\nimage = {site.base}/gone.qcow2 {site.base}{path}\nchecksum = sha256:{digest(image)}\n",
    )
    template(web, "x").ok()
    same_disk(web, "x", image)


def test_out_of_order_for_a_while(web: Cloud, site: Site, image: bytes) -> None:
    path = offer(web, site, image)
    site.tricks[path] = status(500, 2)
    site.tricks["/dir/SUMS"] = status(503, 1)
    template(web, "x").ok()
    same_disk(web, "x", image)


def test_out_of_order(web: Cloud, site: Site, image: bytes) -> None:
    site.tricks[offer(web, site, image)] = status(500)
    template(web, "x").fails(1, "the server says 500", "4 tries")
    nothing_came(web)


def test_forbidden(web: Cloud, site: Site, image: bytes) -> None:
    path = offer(web, site, image)
    site.tricks[path] = status(403)
    template(web, "x").fails(1, "the server says 403")
    assert len(site.asked(path)) == 1
    nothing_came(web)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirect(web: Cloud, site: Site, image: bytes, code: int) -> None:
    path = offer(web, site, image)
    site.files["/else/y"] = site.files.pop(path)
    site.tricks[path] = redirect("/else/y", code)
    template(web, "x").ok()
    same_disk(web, "x", image)


def test_redirect_loop(web: Cloud, site: Site, image: bytes) -> None:
    path = offer(web, site, image)
    site.tricks[path] = redirect("/other")
    site.tricks["/other"] = redirect(path)
    template(web, "x").fails(1, path, "in circles")
    nothing_came(web)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_redirect_to_no_web_server(web: Cloud, site: Site, image: bytes, target: str) -> None:
    site.tricks[offer(web, site, image)] = redirect(target)
    template(web, "x").fails(1, "refused")
    nothing_came(web)


def test_https(web: Cloud, site: Site, image: bytes, certificate: tuple[Path, Path]) -> None:
    """Its certificate is checked, and from there no way leads to http."""
    with Site(certificate) as safe:
        path = offer(web, safe, image)
        template(web, "x").fails(1, "certificate is refused", "clock may be wrong")
        trusted = {"SSL_CERT_FILE": str(certificate[0])}
        site.files[path] = image
        safe.tricks[path] = redirect(site.base + path)
        template(web, "x", env=trusted).fails(1, "refused", "isn't https")
        assert not site.requests
        nothing_came(web)
        site.tricks[path] = redirect(safe.base + path)
        del safe.tricks[path]
        extend(web, f"[x]\nimage = {site.base}{path}\nchecksum = sha256:{digest(image)}\n")
        template(web, "x", env=trusted).ok()
        same_disk(web, "x", image)


@pytest.mark.long
def test_endless_trickle(web: Cloud, site: Site, image: bytes) -> None:
    stop = threading.Event()
    site.tricks[offer(web, site, image)] = drip(stop)
    try:
        template(web, "x").fails(1, "too slow")
    finally:
        stop.set()
    nothing_came(web, parts=True)


def test_silence(web: Cloud, site: Site, image: bytes) -> None:
    gate = threading.Event()
    site.tricks[offer(web, site, image)] = hold(10, gate)
    try:
        done = template(web, "x")
    finally:
        gate.set()
    done.ok()  # since what is asked for again comes at once
    assert site.asked("/dir/x.qcow2") == ["", "bytes=10-"]


def test_nobody_listens(web: Cloud, site: Site, image: bytes) -> None:
    extend(web, f"[x]\nimage = http://127.0.0.1:9/x\nchecksum = sha256:{A}\n")
    template(web, "x").fails(1, "http://127.0.0.1:9/x", "Connection refused", "4 tries")
    nothing_came(web)


def test_page_instead_of_image(web: Cloud, site: Site, image: bytes) -> None:
    site.tricks[offer(web, site, image)] = page()
    template(web, "x").fails(1, "a web page came, not a file")
    nothing_came(web)
    site.tricks["/dir/x.qcow2"] = page(kind="application/octet-stream")
    template(web, "x").fails(1, "checksum is not the published one")
    nothing_came(web)


def test_folder_instead_of_image(web: Cloud, site: Site, image: bytes) -> None:
    site.tricks[offer(web, site, image)] = redirect("/dir/x.qcow2/")
    site.tricks["/dir/x.qcow2/"] = page("<html>Index of", "text/html")
    template(web, "x").fails(1, "is a folder, not a file")
    nothing_came(web)


@pytest.mark.parametrize("option", ["backing_file=/etc/passwd,backing_fmt=raw", "data_file=/tmp/data,data_file_raw=on"])
def test_image_that_stands_on_a_file_of_the_host(web: Cloud, site: Site, tmp_path: Path, option: str) -> None:
    option = option.replace("/tmp/data", str(tmp_path / "data"))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-o", option, tmp_path / "x", "1G"], check=True)
    path = offer(web, site, (tmp_path / "x").read_bytes())
    image_refused(web, "x", f"{site.base}{path}: refused", "another file")
    nothing_came(web)


def test_no_image_at_all(web: Cloud, site: Site) -> None:
    offer(web, site, b"#!/bin/sh\necho hello\n" * 1000)
    image_refused(web, "x", "neither a qcow2 image nor a raw disk")
    nothing_came(web)


# The cache ###########################################################################################


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_and_gone_on(web: Cloud, site: Site, image: bytes, number: signal.Signals) -> None:
    path, gate, reached = offer(web, site, image), threading.Event(), threading.Event()
    site.tricks[path] = hold(2 << 20, gate, reached)
    child = web.spawn("vmtemplate", "x", env={"NOCLOUD_vmDownloadTimeout": "60"})
    try:
        assert reached.wait(20)
        part = web.home / f"cache/nocloud/images/sha256-{digest(image)}/image.part"
        eventually(lambda: part.exists() and part.stat().st_size == 2 << 20, "two MB have come")
        child.send_signal(number)
        child.wait(20)
    finally:
        gate.set()
    assert child.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, -9)
    nothing_came(web, parts=True)
    assert "2 MB of them before" in template(web, "x").ok().stderr
    assert site.asked(path)[1:] == [f"bytes={2 << 20}-"]
    same_disk(web, "x", image)


def test_fetched_once(web: Cloud, site: Site, image: bytes) -> None:
    path = offer(web, site, image)
    template(web, "x").ok()
    template(web, "x").fails(1, "there is such a template already")
    assert len(site.requests) == 2, "what is there isn't asked for"
    web.run("vmtemplate", "--delete", "x").ok()
    assert "in the cache" in template(web, "x").ok().stderr
    template(web, "y", "--image", f"{site.base}{path}", "--sha256", digest(image)).ok()
    assert site.asked(path) == [""]
    images = web.home / "cache/nocloud/images"
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 for path in images.rglob("*"))


def test_damaged_cache(web: Cloud, site: Site, image: bytes) -> None:
    path = offer(web, site, image)
    template(web, "x").ok()
    cached(web)[0].write_bytes(b"x" + image[1:])
    web.run("vmtemplate", "--delete", "x").ok()
    assert "is damaged" in template(web, "x").ok().stderr
    assert site.asked(path) == ["", ""]
    same_disk(web, "x", image)


def test_cache_of_others(web: Cloud, site: Site, image: bytes) -> None:
    offer(web, site, image)
    images = web.home / "cache/nocloud/images"
    images.mkdir(parents=True)
    images.chmod(0o777)
    template(web, "x").fails(1, "others may write to it", "XDG_CACHE_HOME")


def test_cache_that_can_not_be_made(web: Cloud, site: Site, image: bytes) -> None:
    path = offer(web, site, image)
    done = template(web, "x", env={"XDG_CACHE_HOME": "/dev/null/cache"})
    done.fails(1, "/dev/null/cache/nocloud/images: Not a directory", "set XDG_CACHE_HOME")
    assert not site.asked(path)
    nothing_came(web)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no second file system")
def test_cache_on_another_file_system(web: Cloud, site: Site, image: bytes) -> None:
    offer(web, site, image)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        assert os.stat(folder).st_dev != os.stat(web.home).st_dev
        template(web, "x", env={"XDG_CACHE_HOME": folder}).ok()
        assert [path.name for path in Path(folder).rglob("*") if path.is_file()] == ["image"]
    same_disk(web, "x", image)


def test_cache_forgets(web: Cloud, site: Site, image: bytes) -> None:
    old = web.home / "cache/nocloud/images/sha256-old"
    old.mkdir(parents=True)
    (web.home / "cache/nocloud/bytecode").mkdir()
    (old / "image").write_bytes(b"x")
    os.utime(old, (1, 1))
    os.utime(web.home / "cache/nocloud/bytecode", (1, 1))
    offer(web, site, image)
    template(web, "x").ok()
    assert not old.exists() and (web.home / "cache/nocloud/bytecode").exists()


def test_two_at_once(web: Cloud, site: Site, image: bytes) -> None:
    path, gate, reached = offer(web, site, image), threading.Event(), threading.Event()
    site.tricks[path] = hold(1 << 20, gate, reached)
    env = {"NOCLOUD_vmDownloadTimeout": "60"}
    first = web.spawn("vmtemplate", "x", env=env)
    try:
        assert reached.wait(20)
        second = web.spawn("vmtemplate", "x", env=env)
        eventually(lambda: len(site.asked("/dir/SUMS")) == 2, "the second one has read the checksums")
        time.sleep(0.5)
    finally:
        gate.set()
    told = [child.communicate(timeout=60)[1] for child in (first, second)]
    assert (first.returncode, second.returncode) == (0, 1), told
    assert "x: there is such a template already" in told[1]
    assert site.asked(path) == [""]
    same_disk(web, "x", image)


def test_no_space(web: Cloud, site: Site, image: bytes) -> None:
    path = offer(web, site, image)
    site.tricks[path] = announce(1 << 60)
    template(web, "x").fails(1, "the image takes", "are free", "free some disk space")
    nothing_came(web)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a tmpfs")
def test_a_download_without_an_end(web: Cloud, site: Site, image: bytes) -> None:
    """It says no length, and never stops: the disk isn't filled, and nothing of it stays."""
    cache = web.home / "cache"
    cache.mkdir()
    path = offer(web, site, image)

    def endless(handler: Handler) -> bool:
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(bytes(1 << 20))

    site.tricks[path] = endless
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "nocloud-test", cache], check=True)
    try:
        template(web, "x").fails(1, str(cache), "no end in sight, 64 MB are kept free", "free some disk space")
        assert not sum(path.stat().st_size for path in cached(web))
    finally:
        subprocess.run(["umount", "-l", cache], check=True)


# How it is told ######################################################################################


def on_terminal(cloud: Cloud, *words: str) -> str:
    """What a command shows on a terminal of 100 columns."""
    master, slave = pty.openpty()
    child = subprocess.Popen(
        cloud.argv("vmtemplate", *words), env=cloud.env | {"COLUMNS": "100"}, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=slave, cwd=cloud.home,
    )  # fmt: skip
    os.close(slave)
    shown = b""
    while select.select([master], [], [], 30)[0]:
        try:
            shown += os.read(master, 65536)
        except OSError:
            break
    os.close(master)
    assert child.wait(30) == 0, shown
    return shown.decode()


def test_bar_on_a_terminal(web: Cloud, site: Site, image: bytes) -> None:
    path, gate, reached = offer(web, site, image), threading.Event(), threading.Event()
    web.env["NOCLOUD_vmDownloadTimeout"] = "20"
    site.tricks[path] = hold(len(image) // 2, gate, reached)

    def open_later() -> None:
        reached.wait(20)
        time.sleep(0.5)
        gate.set()

    later = threading.Thread(target=open_later)
    later.start()
    shown = on_terminal(web, "x")
    later.join()
    assert re.search(r"\r\x1b\[Kx: \[#+\.+\] \d+% \d+ of 3 MB, [\d.]+ MB/s, \d+:\d\d left", shown), repr(shown)
    assert re.search(r"\r\x1b\[Kx: downloaded 3\.\d MB in \d+ s\r\n", shown), repr(shown)


def test_lines_elsewhere(web: Cloud, site: Site, image: bytes) -> None:
    offer(web, site, image)
    told = template(web, "x").ok().stderr.splitlines()
    assert re.fullmatch(r"x: downloaded 3\.\d MB in \d+ s", "\n".join(told)), told


def test_proxy(web: Cloud, site: Site, image: bytes) -> None:
    site.files["/x.qcow2"] = image
    extend(web, f"[x]\nimage = http://images.invalid/x.qcow2\nchecksum = sha256:{digest(image)}\n")
    template(web, "x", env={"http_proxy": site.base}).ok()
    same_disk(web, "x", image)


def test_proxy_for_https(web: Cloud, site: Site, image: bytes, certificate: tuple[Path, Path]) -> None:
    """The proxy is asked for a tunnel, and sees no more than the name; the certificate is the server's."""
    with Site(certificate) as safe:
        safe.files["/x.qcow2"] = image
        extend(web, f"[x]\nimage = {safe.base}/x.qcow2\nchecksum = sha256:{digest(image)}\n")
        env = {"https_proxy": site.base, "no_proxy": "", "SSL_CERT_FILE": str(certificate[0])}
        template(web, "x", env=env).ok()
        assert site.requests == [(safe.base.partition("://")[2], "")] and safe.asked("/x.qcow2") == [""]
        same_disk(web, "x", image)


# --image #############################################################################################


def test_url_needs_a_checksum(web: Cloud, site: Site, image: bytes) -> None:
    site.files["/x.qcow2"] = image
    url = f"{site.base}/x.qcow2"
    template(web, "x", "--image", url).fails(2, "nothing says what it must be", "--sha256")
    assert not site.requests
    template(web, "x", "--image", url, "--sha512", HASH["sha512"]).fails(1, "checksum is not the published one")
    nothing_came(web)
    template(web, "x", "--image", url, "--sha512", digest(image, "sha512").upper()).ok()
    assert web.conf("templates/x")["vmChecksum"] == f"sha512:{digest(image, 'sha512')}"
    same_disk(web, "x", image)


def test_insecure(web: Cloud, site: Site, image: bytes) -> None:
    site.files["/x.qcow2"] = image
    site.tricks["/x.qcow2"] = break_off(1 << 20)
    template(web, "x", "--image", f"{site.base}/x.qcow2", "--insecure").ok()
    assert web.conf("templates/x")["vmChecksum"] == f"sha256:{digest(image)}"
    same_disk(web, "x", image)
    assert not cached(web)
    assert {path.name for path in (web.base / "templates/x").iterdir()} == {"x.conf", "x_0.img"}


@pytest.mark.parametrize("content", [b"<html>sign in</html>", b""])
def test_insecure_is_checked_too(web: Cloud, site: Site, content: bytes) -> None:
    site.files["/x.qcow2"] = content
    image_refused(
        web, "x", "neither a qcow2 image nor a raw", options=["--image", f"{site.base}/x.qcow2", "--insecure"]
    )
    nothing_came(web)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--image", "ftp://127.0.0.1/x"], "http"),
        (["--image", "http://u:p@127.0.0.1/x", "--insecure"], "login"),
        (["--image", "http://127.0.0.1/x", "--sha256", "12"], "all digits"),
        (["--image", "http://127.0.0.1/x", "--sha256", A, "--insecure"], "exclude each other"),
        (["--image", "http://127.0.0.1/x", "--build", "bookworm"], "exclude each other"),
        (["--sha256", A], "--sha256 goes with --image"),
        (["--insecure"], "--insecure goes with --image"),
    ],
)
def test_wrong_words(web: Cloud, words: list[str], told: str) -> None:
    template(web, "x", *words).fails(2, told)
    nothing_came(web)


def test_folder_instead_of_a_file(web: Cloud, tmp_path: Path) -> None:
    template(web, "x", "--image", tmp_path).fails(1, f"{tmp_path}: a folder, not a file")
    nothing_came(web)


def test_file_with_a_checksum(web: Cloud, image: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(image)
    template(web, "x", "--image", tmp_path / "x", "--sha256", A).fails(1, "its checksum is sha256:" + digest(image))
    nothing_came(web)
    template(web, "x", "--image", tmp_path / "x", "--sha512", digest(image, "sha512")).ok()
    assert web.conf("templates/x")["vmChecksum"] == f"sha512:{digest(image, 'sha512')}"


# The classic kind ####################################################################################


def pack(kind: str, data: bytes) -> bytes:
    if kind == "xz":
        return lzma.compress(data, preset=0)
    return gzip.compress(data, 1) if kind == "gzip" else data


def offer_classic(
    cloud: Cloud, site: Site, content: bytes, compression: str, algorithm: str = "sha256", pieces: int = 3
) -> list[str]:
    """The entry `old`, as a server of the bash tools has it; the paths of its pieces."""
    packed = pack(compression, content)
    extension = {"xz": ".xz", "gzip": ".gz"}.get(compression, "")
    size = -(-len(packed) // pieces)
    paths = [f"/t/old/old.img/old.img.{number:03d}{extension}" for number in range(pieces)]
    for number, path in enumerate(paths):
        site.files[path] = packed[number * size : (number + 1) * size]
    site.files["/t/old/compression"] = f"{compression}\n".encode()
    site.files["/t/old/old.conf"] = b"vmName=old\nvmMem=333\nvmCpu=1\nvmDisk=templates/old/old_0.img\n"
    lines = ["[old]", "kind = classic", f"base = {site.base}/t/old", f"last = {pieces - 1}", "user = root"]
    extend(cloud, "\n".join([*lines, f"checksum = {algorithm}:{digest(content, algorithm)}", ""]))
    return paths


@pytest.mark.parametrize("compression", ["xz", "gzip", "none"])
def test_classic(web: Cloud, site: Site, image: bytes, compression: str) -> None:
    paths = offer_classic(web, site, image, compression)
    site.tricks[paths[1]] = break_off(1000)
    template(web, "old").ok()
    conf = web.conf("templates/old")
    assert (conf["vmMem"], conf["vmCpu"], conf["vmUser"], conf["vmInit"]) == ("333", "1", "root", "ssh")
    assert "vmMachine" not in conf, "it runs as bash ran it"
    assert conf["vmChecksum"] == f"sha256:{digest(image)}"
    assert [asked for path in paths for asked in site.asked(path)] == ["", "", "bytes=1000-", ""]
    same_disk(web, "old", image)
    assert [path.name for path in cached(web)] == ["image"]


def test_classic_without_compression_file(web: Cloud, site: Site, image: bytes) -> None:
    offer_classic(web, site, image, "none")
    del site.files["/t/old/compression"]
    template(web, "old").ok()
    same_disk(web, "old", image)


def test_classic_checksum_file(web: Cloud, site: Site, image: bytes) -> None:
    offer_classic(web, site, image, "xz")
    site.files["/t/old/SUMS"] = f"{digest(image)}  old.img\n".encode()
    lines = ["[old]", "kind = classic", f"base = {site.base}/t/old/", "last = 2", "checksums = SUMS"]
    extend(web, "\n".join([*lines, "algorithm = sha256\n"]))
    template(web, "old").ok()
    same_disk(web, "old", image)


def test_classic_md5(web: Cloud, site: Site, image: bytes) -> None:
    offer_classic(web, site, image, "gzip", "md5")
    assert "md5 checksum shows damage, but not who" in template(web, "old").ok().stderr


def test_classic_interrupted(web: Cloud, site: Site, image: bytes) -> None:
    """The pieces that have come stay; the image is unpacked from them when it goes on."""
    paths, gate, reached = offer_classic(web, site, image, "xz"), threading.Event(), threading.Event()
    site.tricks[paths[2]] = hold(1000, gate, reached)
    child = web.spawn("vmtemplate", "old", env={"NOCLOUD_vmDownloadTimeout": "60"})
    try:
        assert reached.wait(20)
        eventually(lambda: any(p.name.endswith(".002.xz") and p.stat().st_size for p in cached(web)), "a part came")
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == 130
    finally:
        gate.set()
    assert [path.name for path in cached(web)] == [os.path.basename(path) for path in paths]
    template(web, "old").ok()
    assert [len(site.asked(path)) for path in paths[:2]] == [2, 2]
    assert site.asked(paths[2]) == ["", "bytes=1000-"]
    same_disk(web, "old", image)


def test_classic_damaged(web: Cloud, site: Site, image: bytes) -> None:
    paths = offer_classic(web, site, image, "xz")
    good = site.files[paths[1]]
    assert isinstance(good, bytes)
    for bad, words in (
        (b"x" * len(good), "damaged"),
        (good[:-5], "damaged"),
        (b"", "damaged"),
    ):
        site.files[paths[1]] = bad
        template(web, "old").fails(1, words)
        nothing_came(web)
    del site.files[paths[2]]
    site.files[paths[1]] = good
    template(web, "old").fails(1, paths[2], "404")
    assert not (web.base / "templates/old").exists()


def test_classic_cut_short(web: Cloud, site: Site, image: bytes) -> None:
    paths = offer_classic(web, site, image, "xz")
    last = site.files[paths[2]]
    assert isinstance(last, bytes)
    site.files[paths[2]] = last[:-20]
    template(web, "old").fails(1, "ends in the middle")
    nothing_came(web)


def test_classic_conf_is_input(web: Cloud, site: Site, image: bytes) -> None:
    offer_classic(web, site, image, "xz")
    site.files["/t/old/old.conf"] = b"vmMem=$(touch /tmp/owned)\n"
    template(web, "old").fails(2, "old.conf:1")
    site.files["/t/old/old.conf"] = b"vmExtraOpts='-evil'\nvmMem=99\nvmAppend=x\n"
    template(web, "old").ok()
    conf = web.conf("templates/old")
    assert conf["vmMem"] == "99" and not {"vmExtraOpts", "vmAppend"} & set(conf)


def unpack(folder: Path, kind: str, data: bytes, size: int) -> bytes:
    paths = [folder / f"{start:08d}" for start in range(0, len(data), size)]
    for number, path in enumerate(paths):
        path.write_bytes(data[number * size : (number + 1) * size])
    pieces = list(nocloud.piped(["cat", os.devnull, *map(str, paths)], nocloud.UNPACKERS[kind]))
    assert all(len(piece) <= 1 << 20 for piece in pieces)
    return b"".join(pieces)


@pytest.mark.parametrize("size", [1000, 1 << 20])
@pytest.mark.parametrize("kind", ["xz", "gzip"])
def test_streams(tmp_path: Path, kind: str, size: int) -> None:
    data = random.Random(2).randbytes(20000) + bytes(5 << 20)
    packed = pack(kind, data)
    assert unpack(tmp_path, kind, packed, size) == data
    assert unpack(tmp_path, kind, packed * 2 + bytes(4), size) == data * 2, "streams can be joined, and padded"
    with pytest.raises(nocloud.CommandFailed):
        unpack(tmp_path, kind, packed[:-1], size)
    with pytest.raises(nocloud.CommandFailed):
        unpack(tmp_path, kind, bz2.compress(data), size)
    assert unpack(tmp_path, "", data, size) == data


def test_greedy_stream(tmp_path: Path) -> None:
    """A stream may say that it needs 4 GB to be read."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 256 << 20}]
    packed = lzma.LZMACompressor(filters=filters)
    data = packed.compress(b"x" * 100) + packed.flush()
    with pytest.raises(nocloud.CommandFailed, match="limit is 128 MiB"):
        unpack(tmp_path, "xz", data, 1000)


@pytest.mark.parametrize("kind", ["xz", "gzip"])
@pytest.mark.parametrize("data", [b"", b"x", b"\0" * 100, b"\x1f\x8b\x08", b"\xfd7zXZ\0" + b"x" * 100])
def test_any_stream(tmp_path: Path, data: bytes, kind: str) -> None:
    try:
        unpack(tmp_path, kind, data, 10)
    except nocloud.CommandFailed as error:
        assert str(error).startswith(f"{kind}: ")


# How much it takes ###################################################################################


@pytest.mark.long
@pytest.mark.parametrize("kind", ["cloud", "classic"])
def test_memory(web: Cloud, site: Site, tmp_path: Path, kind: str) -> None:
    """An image of 2 GB, half of it zeros, in less than 60 MB."""
    disk, block = tmp_path / "disk", random.Random(3).randbytes(1 << 16) * 16  # which xz is quick with
    with disk.open("wb") as file:
        file.write(bytes(510) + b"\x55\xaa")
        file.truncate(1 << 30)
        file.seek(1 << 30)
        for number in range(1024):
            file.write(number.to_bytes(512, "big") + block[512:])
    hasher = hashlib.sha512()
    with disk.open("rb") as source:
        for piece in iter(lambda: source.read(1 << 20), b""):
            hasher.update(piece)
    if kind == "cloud":
        site.files["/x.img"] = disk
        extend(web, f"[x]\nimage = {site.base}/x.img\nchecksum = sha512:{hasher.hexdigest()}\n")
    else:
        subprocess.run(["xz", "-6", disk], check=True)
        offer_classic(web, site, b"", "xz", pieces=1)
        site.files["/t/x/x.img/x.img.000.xz"] = disk.with_suffix(".xz")
        site.files["/t/x/compression"], site.files["/t/x/x.conf"] = b"xz", b""
        lines = ["[x]", "kind = classic", f"base = {site.base}/t/x", "last = 0"]
        extend(web, "\n".join([*lines, f"checksum = sha512:{hasher.hexdigest()}\n"]))
    code = "status = nocloud.main(['nocloud', 'vmtemplate', 'x'])\n"
    code += "print(open('/proc/self/status').read())\nsys.exit(status)"
    done = web.script(code).ok()
    found = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert found and int(found.group(1)) < 60_000, found
