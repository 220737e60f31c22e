"""What guests and servers may fill: each has its bound."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, Cloud, eventually, is_alive

import nocloud

MIB = 1 << 20


def keepers(cloud: Cloud) -> list[int]:
    """The shells that bound a console.log."""
    return [pid for pid, words in cloud.processes().items() if "/sh -c " in words]


def test_a_console_log_keeps_its_last_part(tmp_path: Path) -> None:
    """Whatever is written, by who appends as qemu does; the end of the lock's owner is the keeper's own."""
    log, old = tmp_path / "console.log", tmp_path / "console.log.1"
    with log.open("ab", buffering=0) as qemu:
        fcntl.flock(qemu, fcntl.LOCK_EX)
        keeper = subprocess.Popen(["sh", ROOT / "etc/console.sh", "1000", "0.05"], cwd=tmp_path)
        qemu.write(b"a" * 1000)
        qemu.write(b"b" * 500)
        eventually(lambda: old.exists() and not log.stat().st_size, "the first part is put aside")
        assert old.read_bytes() == b"a" * 1000 + b"b" * 500
        qemu.write(b"c" * 1001)
        eventually(lambda: not log.stat().st_size, "the next one is")
        assert old.read_bytes() == b"c" * 1001
        qemu.write(b"end")
        assert log.read_bytes() == b"end", "there is no hole before it"
    assert keeper.wait(10) == 0
    assert log.read_bytes() == b"end"


def test_a_console_log_on_a_full_disk_is_emptied_all_the_same(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    (tmp_path / "console.log.1").mkdir()  # cp can't replace that
    (tmp_path / "console.log.1/console.log").mkdir()
    with log.open("ab", buffering=0) as qemu:
        fcntl.flock(qemu, fcntl.LOCK_EX)
        keeper = subprocess.Popen(["sh", ROOT / "etc/console.sh", "10", "0.05"], cwd=tmp_path)
        qemu.write(b"a" * 100)
        eventually(lambda: not log.stat().st_size, "it is emptied")
    assert keeper.wait(10) == 0


def test_each_vm_has_one_that_bounds_its_console(blank: Cloud) -> None:
    """It ends with its qemu, and qemu doesn't with it."""
    blank.run("vminstantiate", "-n", "blank", "-C", 2, "-g", "pf", "-o", "name=web").ok()
    eventually(lambda: len(keepers(blank)) == 2, "one each")
    for pid in keepers(blank):
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not keepers(blank), "they are killed")
    assert len(blank.run("vmrunning").ok().lines) == 2
    blank.run("vmstop", "--kill", "-g", "pf").quiet()
    blank.start("pf/web00").ok()
    (keeper,) = keepers(blank)
    blank.run("vmstop", "--kill", "-g", "pf").quiet()
    eventually(lambda: not is_alive(keeper), "it ends with its qemu", 2)


@pytest.mark.long
def test_a_vm_that_floods_its_console(blank: Cloud) -> None:
    """25 MB of it, as far as its size goes."""
    blank.run("vminstantiate", "-n", "blank", "-g", "pf", "-o", "name=web").ok()
    folder = blank.folder("pf/default/web00")
    os.truncate(folder / "console.log", 25 * MIB)
    eventually(lambda: (folder / "console.log").stat().st_size < MIB, "it is emptied", 60)
    assert (folder / "console.log.1").stat().st_size >= 25 * MIB
    assert (folder / "console.log.1").stat().st_mode & 0o777 == 0o600
    blank.run("vmstop", "--kill", "-g", "pf").quiet()
    blank.start("pf/web00").ok()
    assert not (folder / "console.log.1").exists(), "it is of this start"


def memory_after(code: str) -> int:
    """How many MB a Python that did this with the module has had at most."""
    before = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import nocloud\n"
    after = "\nprint(nocloud.process_file('self', 'status').partition('VmHWM:')[2].split()[0])"
    words = [sys.executable, "-IS", "-c", before + code + after]
    return int(subprocess.run(words, check=True, capture_output=True, timeout=180).stdout) // 1024


FLOOD = "head -c 300000000 /dev/zero | tr '\\0' '{}'; echo; echo the end"


def test_only_the_end_of_what_a_guest_says_is_kept() -> None:
    status, output = nocloud.try_run(["sh", "-c", FLOOD.format("x") + "; exit 3"], 180, guest=True)
    assert (status, len(output), output[-9:]) == (3, 65536, "\nthe end\n"[-9:])
    assert nocloud.try_run(["sh", "-c", "yes"], 0.5, guest=True) == (-1, "sh: no end after 0 s")
    lines: list[str] = []
    flood = ["sh", "-c", FLOOD.format("x")]
    nocloud.run_watched(flood, lines.append)
    assert len(lines[0]) <= 65536 and lines[1:] == ["the end"]
    assert memory_after(f"nocloud.run_watched({flood!r})") < 100
