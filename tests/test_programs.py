"""Starting other programs: found, run, failed, ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import Cloud, eventually, is_alive

import nocloud


def test_output_status_and_error() -> None:
    done = nocloud.run(["sh", "-c", "echo out; echo err >&2"])
    assert (done.returncode, done.stdout) == (0, "out\nerr\n")
    done = nocloud.run(["sh", "-c", "echo out; echo err >&2; exit 3"], check=False, merge=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    with pytest.raises(nocloud.CommandFailed) as raised:
        nocloud.run(["sh", "-c", "echo first; echo last; exit 3"])
    assert (raised.value.returncode, str(raised.value)) == (3, "sh: last")
    with pytest.raises(nocloud.CommandFailed, match="sh: exit status 4"):
        nocloud.run(["sh", "-c", "exit 4"])
    with pytest.raises(nocloud.CommandFailed, match="sh: killed by SIGKILL"):
        nocloud.run(["sh", "-c", "kill -9 $$"])


def test_stdin_is_empty_unless_given() -> None:
    assert nocloud.run(["cat"]).stdout == ""
    assert nocloud.run(["cat"], input=b"x").stdout == "x"


def test_output_that_is_no_utf8() -> None:
    assert nocloud.run(["printf", "\\377"]).stdout == "�"


def test_a_program_that_does_not_end() -> None:
    with pytest.raises(nocloud.TimedOut, match="sleep") as raised:
        nocloud.run(["sleep", "60"], timeout=0.1)
    assert raised.value.status == 124


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # subprocess has no status of what another has waited for
def test_what_is_watched_ends_though_it_ignores_sigterm(tmp_path: Path) -> None:
    """All of its session; and where that is gone already, what was raised is not hidden."""
    script = f"trap '' TERM; sleep 60 & echo $! $$ >{tmp_path}/pids; wait; wait; sleep 60"
    status, said = nocloud.try_run(["sh", "-c", script], 0.5, guest=True)
    assert (status, said) == (-1, "sh: no end after 0 s")
    assert not any(is_alive(int(pid)) for pid in (tmp_path / "pids").read_text().split())

    def on_line(line: str) -> None:
        os.waitpid(int(line), 0)
        raise nocloud.Error("what happened")

    with pytest.raises(nocloud.Error, match="what happened"):
        nocloud.run_watched(["sh", "-c", "echo $$"], on_line)


def test_words_are_not_a_shells() -> None:
    assert nocloud.run(["echo", "$HOME; `x` *"]).stdout == "$HOME; `x` *\n"


def test_messages_are_english() -> None:
    code = 'printf \'%s %s\' "$LC_ALL" "${LANGUAGE-unset}"'
    os.environ["LANGUAGE"] = "de"
    try:
        assert nocloud.run(["sh", "-c", code]).stdout == "C.UTF-8 unset"
    finally:
        del os.environ["LANGUAGE"]


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(nocloud.MissingProgram, match="no-such-program") as raised:
        nocloud.run(["no-such-program"])
    assert raised.value.status == 127 and raised.value.hint
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    assert nocloud.find_program(str(script)) == ""  # not executable
    assert nocloud.find_program(str(tmp_path)) == ""


def put_programs(folder: Path, *names: str) -> str:
    """Make programs of these names in a new folder, which may be PATH."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    return str(folder)


def test_the_hint_names_this_systems_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for manager, words in (("apt-get", "apt install"), ("dnf", "dnf install"), ("pacman", "pacman -S")):
        monkeypatch.setenv("PATH", put_programs(tmp_path / manager, manager))
        with pytest.raises(nocloud.MissingProgram) as raised:
            nocloud.need_program("no-such-program")
        assert raised.value.hint == f"sudo {words} no-such-program"


@pytest.mark.parametrize(
    ("release", "present", "chosen"),
    [
        ("ID=debian", "apt-get", ("apt install", 0)),
        ("ID=debian", "pacman dnf apt-get", ("apt install", 0)),
        ("ID=ubuntu\nID_LIKE=debian", "apt-get", ("apt install", 0)),
        ('ID=linuxmint\nID_LIKE="ubuntu debian"', "dnf apt-get", ("apt install", 0)),
        ("ID=fedora", "apt-get dnf", ("dnf install", 1)),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"', "dnf", ("dnf install", 1)),
        ("ID=arch", "apt-get pacman", ("pacman -S", 2)),
        ("ID=manjaro\nID_LIKE=arch", "pacman", ("pacman -S", 2)),
        ("ID=something", "dnf", ("dnf install", 1)),
        ("ID=alpine", "", ("", 0)),
    ],
)
def test_the_distribution_says_how_packages_are_installed(
    release: str, present: str, chosen: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", put_programs(tmp_path / "bin", *present.split()))
    assert nocloud.choose_installer(nocloud.parse_os_release(f"{release}\nVERSION_ID=1\n")) == chosen


def test_each_distribution_has_its_own_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {program: [nocloud.package_of(program, column) for column in range(3)] for program in ("qemu-img", "ip")}
    assert names == {"qemu-img": ["qemu-utils", "qemu-img", "qemu-img"], "ip": ["iproute2", "iproute", "iproute2"]}
    assert nocloud.package_of("no-such-program", 1) == "no-such-program"
    for name, package in (("bookworm", "qemu-system-common"), ("trixie", "virtiofsd")):
        monkeypatch.setattr(nocloud, "os_release", lambda: {"VERSION_CODENAME": name})  # noqa: B023
        assert nocloud.package_of("virtiofsd", 0) == package
    assert all(len(line.split()) == 4 for line in nocloud.packaged_list("packages"))


def test_sbin_is_looked_in_without_being_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert nocloud.find_program("ip") in ("/usr/sbin/ip", "/sbin/ip")
    assert nocloud.find_program("bash") == ""


def test_an_empty_element_of_path_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil").write_text("#!/bin/sh\n")
    (tmp_path / "evil").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", ":/usr/bin")
    assert nocloud.find_program("evil") == ""


def test_what_outlives_us_has_a_session_and_a_log_of_its_own(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    log.chmod(0o600)
    child = nocloud.spawn(["sh", "-c", "echo out; echo err >&2; cat; sleep 60"], log=str(log))
    try:
        eventually(lambda: log.read_text() == "before\nout\nerr\n", "it writes in its log")
        assert os.getsid(child.pid) == child.pid
        new = tmp_path / "new"
        nocloud.spawn(["true"], log=str(new)).wait()
        assert new.stat().st_mode & 0o777 == 0o600
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def test_no_descriptor_of_ours_leaks(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w") as file:
        os.set_inheritable(file.fileno(), True)
        shown = nocloud.run(["ls", "-l", "/proc/self/fd"]).stdout
        assert "/file" not in shown
        shown = nocloud.run(["ls", "-l", "/proc/self/fd"], pass_fds=[file.fileno()]).stdout
        assert "/file" in shown


def test_processes_are_held_by_pidfd() -> None:
    child = subprocess.Popen(["sleep", "60"])
    with nocloud.Process(child.pid) as process:
        assert not process.ended()
        process.signal(signal.SIGTERM)
        assert process.ended(5)
        child.wait()
        process.signal(signal.SIGTERM)  # gone: no error
        assert process.ended()
    with nocloud.Process(child.pid) as process:
        assert process.ended()
    for pid in (1, 0, -1):
        with pytest.raises(nocloud.WrongState):
            nocloud.Process(pid)


def test_debug_shows_each_command_before_it_runs(cloud: Cloud) -> None:
    cloud.execute(["qemu-img", "create", "-q", "-f", "qcow2", "my disk.qcow2", "1M"]).ok()
    done = cloud.run("vmtemplate", "--debug", "x", "--image", "my disk.qcow2").ok()
    traced = [line for line in done.stderr.splitlines() if line.startswith("+ ")]
    assert any("qemu-img info" in line and "my disk.qcow2'" in line for line in traced)
    assert done.stdout == ""
    quiet = cloud.run("vmtemplate", "y", "--image", "my disk.qcow2").ok()
    assert "+ " not in quiet.stderr


def test_own_command_needs_no_environment() -> None:
    argv = nocloud.self_argv("-v")
    done = subprocess.run(
        argv, env={"PYTHONPATH": "/x", "PYTHONHOME": "/x"}, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"nocloud {nocloud.__version__}\n"
    assert argv[0] == sys.executable


def test_in_parallel_keeps_order_and_errors() -> None:
    def work(number: int) -> int:
        if number == 2:
            raise nocloud.NotFound("two")
        if number == 3:
            raise OSError(28, "No space left on device", "/x")
        return number * 10

    results = nocloud.in_parallel(work, [1, 2, 3, 4])
    assert (results[0], results[3]) == (10, 40)
    assert isinstance(results[1], nocloud.NotFound)
    assert isinstance(results[2], nocloud.Error) and "/x: No space left" in str(results[2]) and results[2].hint
    assert nocloud.in_parallel(work, []) == []
    assert isinstance(nocloud.in_parallel(work, [2])[0], nocloud.NotFound)


def test_a_forked_child_keeps_only_what_it_is_told(tmp_path: Path) -> None:
    import ctypes  # noqa: F401 - as its callers do

    with open(tmp_path / "lock", "w") as file, open(tmp_path / "kept", "w") as kept:
        number = kept.fileno()

        def work() -> None:
            for fd in range(64):
                try:
                    os.write(number, os.readlink(f"/proc/self/fd/{fd}").encode() + b"\n")
                except OSError:
                    pass
            os._exit(0)

        pid = nocloud.fork_child(work, keep=(number,))
        os.waitpid(pid, 0)
        assert not is_alive(pid)
        assert file.name not in Path(kept.name).read_text()
        assert set(Path(kept.name).read_text().split()) == {"/dev/null", kept.name}
