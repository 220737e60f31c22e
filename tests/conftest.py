"""Fixtures: the tiny guest's image, clouds in temporary homes, and the check that no test leaves anything."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `import nocloud`

import tinyguest
from support import Cloud, add_blank, add_template, interfaces, kill_all, open_homes, processes_with


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the long tests too (make test-all)")


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.register_profile("nocloud", deadline=None)  # a busy machine is no failure
    hypothesis.settings.load_profile("nocloud")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a script started us with &; children must know ^C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "long: takes minutes; only make test-all runs it")


# Where several processes share the work, each file is one's: these, which take longest, come first, to end together.
LONGEST = ("test_debian", "test_lifecycle", "test_supervisor", "test_network", "test_identity", "test_cloudinit")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="long: make test-all runs it"))
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def guest_cache(request: pytest.FixtureRequest) -> Path:
    """Where the tiny guest's images are kept from one run to the next: in pytest's cache, or NOCLOUD_TEST_CACHE."""
    own = os.environ.get("NOCLOUD_TEST_CACHE")
    return Path(own) if own else Path(str(request.config.cache.mkdir("tinyguest")))


@pytest.fixture(scope="session")
def tiny_image(guest_cache: Path) -> Path:
    """The tiny guest's disk, built once."""
    return tinyguest.build(guest_cache)


@pytest.fixture(scope="session")
def vms() -> None:
    """Skips where this machine lets this user run no VM."""
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("/dev/net/tun isn't open for this user")
    for program in ("qemu-system-x86_64", "qemu-img", "dnsmasq", "ip", "ssh", "nsenter"):
        path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        if not shutil.which(program, path=path):
            pytest.fail(f"{program} is not installed: make test installs what the tests need")


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that other users can reach, which tmp_path isn't."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    """A cloud of this test's own; empty."""
    with Cloud(tmp_path / "home") as cloud:
        yield cloud


@pytest.fixture
def tiny(cloud: Cloud, tiny_image: Path, vms: None) -> Cloud:
    """A cloud of this test's own with the template `tiny`."""
    add_template(cloud, tiny_image)
    return cloud


@pytest.fixture
def blank(cloud: Cloud, vms: None) -> Cloud:
    """A cloud of this test's own with the template `blank`, whose clones only run."""
    add_blank(cloud)
    return cloud


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, tiny_image: Path, vms: None) -> Iterator[Cloud]:
    """A cloud with the template `tiny` that the tests of a module share."""
    with Cloud(tmp_path_factory.mktemp("shared") / "home") as cloud:
        add_template(cloud, tiny_image)
        yield cloud


@pytest.fixture(scope="session")
def debian(tmp_path_factory: pytest.TempPathFactory, vms: None) -> Iterator[Cloud]:
    """A cloud with the template `deb`."""
    if not shutil.which("mmdebstrap"):
        pytest.fail("mmdebstrap is not installed: make test installs what the tests need")
    if os.geteuid() != 0 and not has_subordinate_ids():
        pytest.skip("this user has no subordinate uids in /etc/subuid")
    with Cloud(tmp_path_factory.mktemp("debian") / "home") as cloud:
        done = cloud.run("vmtemplate", "deb", "--build", "bookworm", "--mem", 384, timeout=900).ok()
        assert done.stderr, "progress is visible while it works"
        yield cloud


@pytest.fixture
def survived(request: pytest.FixtureRequest) -> Callable[[str, int], None]:
    """Counts what a storm tried, for the table at the end of the run: `survived("SIGKILL of vmrun", 50)`."""

    def count(what: str, times: int = 1) -> None:
        request.node.user_properties.append((what, times))

    return count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One table of what was tried and survived."""
    tried: Counter[str] = Counter()
    for told in terminalreporter.stats.get("passed", []):
        tried.update({what: times for what, times in told.user_properties if told.when == "call"})
    if tried:
        terminalreporter.section("tried, and survived")
        for what, times in tried.items():
            terminalreporter.line(f"{times:>9,}  {what}")


def has_subordinate_ids() -> bool:
    import pwd

    name = pwd.getpwuid(os.geteuid()).pw_name
    return any(line.startswith(f"{name}:") for line in Path("/etc/subuid").read_text().splitlines())


@pytest.fixture(scope="session")
def debian_image(request: pytest.FixtureRequest) -> Path:
    """The disk of a Debian template: of the one that the tests build, or, where NOCLOUD_TEST_CACHE is set, the last."""
    own = os.environ.get("NOCLOUD_TEST_CACHE")
    kept = Path(own) / "debian.qcow2" if own else None
    if kept and kept.exists():
        return kept
    built: Cloud = request.getfixturevalue("debian")
    disk = built.base / "templates/deb/deb_0.img"
    if kept:
        shutil.copyfile(disk, kept.with_suffix(".new"))
        kept.with_suffix(".new").rename(kept)
    return disk


def _own_places() -> set[str]:
    """Where a program that didn't heed its environment would leave files."""
    home = Path.home()
    places = [home / ".config/nocloud", home / ".local/share/nocloud", home / ".ssh", Path("/var/lib/nocloud")]
    found = {str(path) for path in Path("/dev/shm").glob("*nocloud*")}
    for place in places:
        if place.is_dir():
            found |= {str(path) for path in place.iterdir()}
    return found


@pytest.fixture(autouse=True)
def nothing_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No process, no network interface and no file outside the temporary folders survives a test.

    A namespace lives as long as a process in it; processes are known by the home in their environment, which is below
    a folder of this process's own. The rest is the machine's: it may be of a test that another process runs just now.
    """
    places, cards = _own_places(), interfaces()
    yield

    def left_over() -> dict[int, str]:
        mine = processes_with(f"{tmp_path_factory.getbasetemp()}/")
        open_ones = {pid for home in open_homes for pid in processes_with(home)}
        return {pid: words for pid, words in mine.items() if pid not in open_ones}

    deadline = time.monotonic() + 5  # what ends with its qemu is a moment behind it
    while (left := left_over()) and time.monotonic() < deadline:
        time.sleep(0.1)
    kill_all(left)
    assert not left, f"processes are left: {left}"
    assert not {name for name in interfaces() - cards if name.startswith(("tap", "nocloud"))}
    assert not _own_places() - places
