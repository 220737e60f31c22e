"""What comes from outside is understood or refused in a line, whatever it is: nothing else is raised, ever."""

from __future__ import annotations

import ast
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import PROGRAM, Cloud
from test_download import image, offer, site, template, web  # noqa: F401 (fixtures)
from webserver import Site, redirect

import nocloud

SHA = "sha256"


class Parsers:
    """Each takes bytes, as a file, a guest or a server has them."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "file"
        self.path = str(self.file)
        self.tree = SimpleNamespace(base=str(folder))

    def kept(self, data: bytes) -> str:
        self.file.write_bytes(data)
        return self.path

    def parse_qmp(self, data: bytes) -> object:
        message = nocloud.parse_qmp(data)
        return message.get("data", {}).get("reason"), message.get("error", {}).get("desc")

    def parse_assignments(self, data: bytes) -> object:
        found = nocloud.parse_assignments(text(data), "FILE", {})
        assert not any("\0" in each.value for each in found)
        return found

    def parse_description(self, data: bytes) -> object:
        return nocloud.parse_description(text(data), "FILE", "default")

    def parse_manifest(self, data: bytes) -> object:
        return nocloud.parse_manifest(data, "PATH")

    def read_checksums(self, data: bytes) -> object:
        pages = SimpleNamespace(text=lambda url: data.decode("utf-8", "replace"))
        return nocloud.read_checksums(pages, "URL", SHA, "x*.img")  # type: ignore[arg-type]

    def parse_os_release(self, data: bytes) -> object:
        return nocloud.parse_os_release(text(data))

    def qcow2_header(self, data: bytes) -> object:
        return nocloud.qcow2_header(self.kept(b"QFI\xfb" + data))

    def key(self, data: bytes) -> object:
        known = nocloud.KnownHosts(self.tree)  # type: ignore[arg-type]
        Path(known.path).write_bytes(data)
        return known.names(), known.key("uuid")

    def lease_lines(self, data: bytes) -> object:
        bridge = nocloud.HostBridge(nocloud.Config({"bridgeLeases": self.kept(data)}))
        return [nocloud.lease_text(until) for _, _, _, until in bridge.lease_lines()]

    def helper_rules(self, data: bytes) -> object:
        return nocloud.helper_rules(self.kept(data))

    def members(self, data: bytes) -> object:
        hosts = nocloud.HostFiles(str(self.file.parent / "hosts of"))
        for kind in ("dhcp", "hosts"):
            os.makedirs(hosts.folder_of(kind), exist_ok=True)
            Path(hosts.folder_of(kind), "uuid").write_bytes(data)
        return list(hosts.members()), hosts.addresses(), hosts.orphans(set())

    def entries(self, data: bytes) -> object:
        inbox = nocloud.Inbox(str(self.file.parent / "inbox"), "tree")
        os.makedirs(inbox.folder, exist_ok=True)
        Path(inbox.folder, "00000000-0000-4000-8000-000000000000").write_bytes(data)
        return [words for _, _, words in inbox.entries()], inbox.orphans(set())

    def parse_ports(self, data: bytes) -> object:
        return nocloud.parse_ports(nocloud.checked(nocloud.PORTS, text(data), "port="))

    def parse_shares(self, data: bytes) -> object:
        return nocloud.parse_shares(nocloud.checked(nocloud.SHARES, text(data), "share="))

    def png_of(self, data: bytes) -> object:
        return nocloud.png_of(data)

    def monitors(self, data: bytes) -> object:
        process = nocloud.QemuProcess(0)
        process.words = data.decode("utf-8", "surrogateescape").split("\0")
        return list(map(nocloud.suboptions, process.values("monitor"))), process.mac

    def read_firmware(self, data: bytes) -> object:
        return nocloud.read_firmware(self.kept(data), "uefi", "x86_64", "pc-q35-7.2")

    def read(self, data: bytes) -> object:
        catalogue = nocloud.Catalogue()
        catalogue.read(text(data), "FILE")
        return [nocloud.ENTRY_KEYS["image"](each["image"]) for each in catalogue.entries.values() if each["image"]]


ROWS = [name for name in vars(Parsers) if not name.startswith("_") and name != "kept"]
# What the bytes are made of besides any: what these formats have, and what is nearly that.
WORDS = [
    *map(str.encode, ("²", "٣", "\0", "\n", "\r", " ", "\t", "=", ":", ";", ",", "#", "/", "'", '"', "$", "${", "}")),
    b"[", b"]", b"\xff", b"{", b'{"data":[', b'"error":', b"null", b"9" * 5000, b"0" * 64, b"00:50:56:00:00:01",
    b"10.0.0.2", b"x1.img", b"vmMem", b"vmUser", b"name", b"user-data", b"debian:1:web:", b"[x]\n", b"image", b"uuid",
    b"http://[::1", b"https://x/", b"include ", b"allow", b"-monitor\0", b"-mon\0", b"-chardev\0", b"unix:",
    b"telnet:", b"ID=", b"mac=", b"-1", b"1e9",
    b'{"nocloud": 1, "group": "g", "vms": [{"name": "a", "settings": {', b'"vmMem": "1"}, "files": {"a_0.qcow2": [1, ',
    b"/a:/b:rw", b"P6\n", b"1 1\n255\n",
    b'{"mapping":', b'"features":[', b'"targets":[', b'"architecture":"x86_64"', b'"machines":["*"]', b"}", b"]",
]  # fmt: skip
ANY = st.one_of(
    st.binary(max_size=200),
    st.lists(st.one_of(st.sampled_from(WORDS), st.binary(max_size=3)), max_size=30).map(b"".join),
    st.builds(
        lambda word, times: word * times,
        st.sampled_from([b"[", b'{"a":', b"x:", b"'", b"${a:-"]),
        st.integers(1, 20000),
    ),
)


def text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def tried(parse: Callable[[bytes], object], data: bytes) -> None:
    try:
        parse(data)
    except (nocloud.Error, OSError) as error:
        assert "\n" not in nocloud.printable(str(error))


def check(parsers: Parsers, name: str, examples: int) -> None:
    @settings(max_examples=examples, database=None, suppress_health_check=list(HealthCheck))
    @given(ANY)
    def run(data: bytes) -> None:
        tried(getattr(parsers, name), data)

    run()


@pytest.mark.parametrize("name", ROWS)
def test_anything_is_understood_or_refused(tmp_path: Path, name: str) -> None:
    check(Parsers(tmp_path), name, 200)


@pytest.mark.long
@pytest.mark.parametrize("name", ROWS)
def test_a_million_things_are_understood_or_refused(tmp_path: Path, name: str) -> None:
    check(Parsers(tmp_path), name, 1_000_000 // len(ROWS) + 1)


def guarded() -> Iterator[str]:
    """The functions that parse, by their names, or that say so of what they do."""
    for node in ast.walk(ast.parse(PROGRAM.read_text())):
        if isinstance(node, ast.FunctionDef):
            guards = (
                each
                for each in ast.walk(node)
                if isinstance(each, ast.With) and "Parsing(" in ast.unparse(each.items[0])
            )
            if node.name.startswith("parse_") or any(guards):
                yield node.name


ELSEWHERE = {
    "parse_checksums": "read_checksums",
    "open": "test_a_server_that_sends_us_nowhere",
    "exported_files": "test_what_is_no_archive",
    "check_frozen": "test_a_manifest_that_is_garbage",
    "read_manifest": "test_a_manifest_that_is_garbage",
    "describe_machine": "test_one_that_does_not_start_leaves_nothing",
}


def test_every_parser_has_a_row() -> None:
    found = {ELSEWHERE.get(name, name) for name in guarded()}
    assert found and found <= {*ROWS, *ELSEWHERE.values()}, "give it a row in Parsers of tests/test_parsers.py"


# The cases by which the kind was found ###############################################################


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("parse_qmp", b"[" * 100000),
        ("parse_qmp", b'{"data": ["reason"], "event": "SHUTDOWN"}'),
        ("parse_qmp", b'{"error": "refused", "id": 1}'),
        ("read_checksums", f"{'0' * 64}  x².img\n{'1' * 64}  x1.img\n".encode()),
        ("read_checksums", f"{'0' * 64}  x{'9' * 5000}.img\n{'1' * 64}  x1.img\n".encode()),
        ("lease_lines", b"99999999999999999999 00:50:56:00:00:01 10.0.0.2 web *\n"),
        ("lease_lines", b"\xc2\xb2 00:50:56:00:00:01 10.0.0.2 web *\n"),
        ("key", b"nothing\nuuid ssh-ed25519 AAAA\n"),
        ("parse_description", b"x:1:web:user-data=a\0b"),
        ("read_firmware", b'{"features": [[]]}'),
        ("parse_assignments", b"vmDisk=a\0b"),
        ("helper_rules", b"include\x1f\0"),
    ],
)
def test_what_once_was_a_defect(tmp_path: Path, name: str, data: bytes) -> None:
    tried(getattr(Parsers(tmp_path), name), data)


def test_the_line_beside_a_wrong_one_counts(tmp_path: Path) -> None:
    parsers = Parsers(tmp_path)
    assert parsers.key(b"nothing\nuuid ssh-ed25519 AAAA\n") == ({"uuid"}, "ssh-ed25519 AAAA")
    assert nocloud.choose_listed([("x²9.img", "a"), ("x10.img", "b")], "x*.img")
    assert nocloud.choose_listed([("x9.img", "a"), ("x10.img", "b")], "x*.img") == ("x10.img", "b")


@pytest.mark.parametrize(
    "target", ["http://[::1", "http://[zz]/x", "http://x:y:z/", "http://a\u0000b/", "//[", "http://"]
)
def test_a_server_that_sends_us_nowhere(web: Cloud, site: Site, image: bytes, target: str) -> None:  # noqa: F811
    site.tricks[offer(web, site, image)] = redirect(target.replace("\0", "%00"))
    done = template(web, "x")
    done.fails(1, site.base)


@pytest.mark.parametrize("address", ["https://[::1", "https://[zz]/x", "https://x]/", "http://[", "https://[::1]x[/"])
def test_an_address_that_is_none(cloud: Cloud, address: str) -> None:
    cloud.run("vmtemplate", "x", "--image", address, "--sha256", "a" * 64).fails(2, address, "http://")


def test_a_pathname_with_a_nul(cloud: Cloud) -> None:
    (cloud.home / "shop").write_bytes(b"x:1:web:user-data=a\0b\n")
    cloud.run("vminstantiate", "-f", cloud.home / "shop").fails(2, "shop:1: ", "NUL")
    (cloud.home / ".nocloud.conf").write_bytes(b"isoDir=a\0b\n")
    cloud.run("vmrunning").fails(2, ".nocloud.conf:1: ")


def test_a_hint_names_no_file_that_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It may have been removed with the half-made thing that it was in."""
    log = tmp_path / "a log"
    told = {
        f"see {log}": "",
        f"see {log}; --no-clean takes it as it is": "--no-clean takes it as it is",
        f"vmWaitTimeout sets the longest wait; its console: {log}": "vmWaitTimeout sets the longest wait",
        "mkdir -p /nothing": "mkdir -p /nothing",
    }
    for hint, shown in told.items():
        nocloud.report.error(nocloud.Error("it failed", hint))
        assert capsys.readouterr().err == "nocloud: it failed\n" + (f"(hint: {shown})\n" if shown else "")
    log.touch()
    for hint in told:
        nocloud.report.error(nocloud.Error("it failed", hint))
        assert capsys.readouterr().err == f"nocloud: it failed\n(hint: {hint})\n"


@pytest.mark.parametrize("limit", [8, 16, 24])
def test_few_descriptors_are_an_error_and_nothing_else(cloud: Cloud, limit: int) -> None:
    """Each is one line; what can't be asked for is not taken for what isn't there."""
    for words in (["vmrunning", "-a"], ["vmtemplate", "--list"], ["vminventory", "--list"]):
        argv = ["prlimit", f"--nofile={limit}:{limit}", *cloud.argv(*words)]
        done = subprocess.run(argv, env=cloud.env, capture_output=True, text=True, check=False, cwd=cloud.home)
        if limit > 8 or "nocloud" in done.stderr:  # with fewer, Python itself doesn't start
            assert "a defect in nocloud" not in done.stderr and "Traceback" not in done.stderr, done
