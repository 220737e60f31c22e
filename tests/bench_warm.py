#!/usr/bin/env python3
"""Clones that wake up against clones that boot, measured on this machine: `make bench-warm`. Exits 1 over a budget.

Debian clones of one template, cold and warm in turn, to the same end: its sshd's banner, or a login that is done. Of
several runs the median counts.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import ROOT, Bench, Failed, Table, bare_argv, greets, lock_holder, run, timed, wait_until

MEMORY, CPUS, SECONDS = 512, 1, 900
# In the guests' network: returns when the sshd at each address that it is given has said its banner.
BANNERS = """
import socket, sys, time
print("ready", flush=True)
for address in map(str.strip, sys.stdin):
    while True:
        try:
            # What is sent before it has its address is lost, and would be sent again only after a second.
            with socket.create_connection((address, 22), 0.2) as connection:
                connection.settimeout(60)
                if connection.recv(4) == b"SSH-":
                    break
        except OSError:
            time.sleep(0.02)
"""


class WarmBench(Bench):
    """With the frozen template `deb`."""

    def prepare(self, image: str) -> None:
        words = ["--image", image, "--init", "systemd"] if image else ["--build", "bookworm"]
        self.long("vmtemplate", "deb", *words, "--mem", MEMORY, "--cpu", CPUS)
        self.long("vmtemplate", "deb", "--warm")

    def long(self, *words: object) -> str:
        """A command that may take minutes; what it says on stdout."""
        env = {**self.env, "NOCLOUD_vmBaseDir": str(self.tree)}
        argv = [str(word) for word in words]
        done = subprocess.run(
            argv, env=env, cwd=self.folder, timeout=SECONDS, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Failed(f"{shlex.join(argv)}: exit status {done.returncode}\n{done.stderr}")
        if " boots: " in done.stderr:
            raise Failed(done.stderr)
        return done.stdout

    def clones(self, count: int, cold: bool) -> list[str]:
        how = ["--cold"] if cold else []
        return self.long("vminstantiate", "-n", "deb", "-C", count, "-g", "many", "-o", "name=web", *how).split()

    def to_banner(self, count: int, cold: bool) -> float:
        env = {**self.env, "NOCLOUD_vmBaseDir": str(self.tree)}
        words = ["nocloud", "net", "exec", "python3", "-c", BANNERS]
        self.long("nocloud", "net", "--private", "up")  # it ends with its last VM
        with subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as waiting:
            assert waiting.stdin and waiting.stdout
            waiting.stdout.readline()  # it is there before
            start = time.perf_counter()
            self.clones(count, cold)
            confs = [path.read_text() for path in (self.tree / "many").glob("*/*/*.conf")]
            waiting.stdin.writelines(re.findall(r"^vmAddress=(.*\n)", "\n".join(confs), re.M))
            waiting.stdin.close()
            if waiting.wait(SECONDS):
                raise Failed("no banner")
            took = time.perf_counter() - start
        self.stop("many")
        return took

    def to_login(self, count: int, cold: bool) -> float:
        start = time.perf_counter()
        names = self.clones(count, cold)
        env = {**self.env, "NOCLOUD_vmBaseDir": str(self.tree), "NOCLOUD_vmWaitTimeout": str(SECONDS)}
        logins = [subprocess.Popen(["vmssh", name, "true"], env=env, stderr=subprocess.DEVNULL) for name in names]
        if any(login.wait(SECONDS) for login in logins):
            raise Failed("a login failed")
        took = time.perf_counter() - start
        self.stop("many")
        return took

    def memory(self, count: int, cold: bool) -> float:
        """The KB that they have in memory when all are ready, what is shared divided among them (proc(5), Pss)."""
        self.clones(count, cold)
        self.long("vmrun", "-r", "many", "--background")
        total = 0
        for pid in map(lock_holder, self.pid_files("many")):
            total += int(Path(f"/proc/{pid}/smaps_rollup").read_text().partition("\nPss:")[2].split()[0])
        self.long("vmrun", "-s", "many")
        self.stop("many")
        return total

    def to_running(self) -> float:
        """One warm clone, until its guest runs: then, and no sooner, the agent in it is spoken to."""
        env = {**self.env, "NOCLOUD_vmBaseDir": str(self.tree)}
        words = ["vminstantiate", "-n", "deb", "-g", "many", "-o", "name=web"]
        start = time.perf_counter()
        child = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def spoken_to() -> bool:
            # qemu's end of the connection is of the network namespace that was connected from (net/unix/af_unix.c)
            lines = [line.split() for line in Path("/proc/self/net/unix").read_text().splitlines()]
            return any(line[-1] == "agent.sock" and line[5] == "03" for line in lines)

        wait_until(spoken_to, 60, "a clone that runs")
        took = time.perf_counter() - start
        child.wait(120)
        return took

    def by_hand(self) -> float:
        """The same by bare commands, from the .command file of a clone that is there."""
        source, template = next((self.tree / "many").glob("*/web00")), self.tree / "templates/deb"
        layer = next(template.glob("*.memory")).with_suffix("")
        shutil.rmtree(self.bare)
        self.bare.mkdir()
        shutil.copy(source / "credentials", self.bare)
        place = f"size={MEMORY}M,mem-path={layer}.memory,share=off"
        memory = f"memory-backend-file,id=pc.ram,x-use-canonical-path-for-ramblock-id=off,{place}"
        words = bare_argv(source / "web00.command", "web00", 0)
        words += ["-object", memory, "-machine", "memory-backend=pc.ram", "-incoming", "defer"]
        disk = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(layer), "web00_0.img"]
        start = time.perf_counter()
        timed(disk, self.env, self.bare)
        with Path(f"{layer}.state").open("rb") as state:
            child = subprocess.Popen(
                ["unshare", "-Urn", *words],
                env=self.env, cwd=self.bare, pass_fds=[state.fileno()], stdout=subprocess.DEVNULL,
            )  # fmt: skip
            try:
                wait_until(lambda: greets(self.bare), 30, "qemu")
                wake(self.bare / "qmp.sock", state.fileno())
                return time.perf_counter() - start
            finally:
                child.kill()
                child.wait()


def wake(path: Path, fd: int) -> None:
    """Load the devices' state from a descriptor that a qemu inherited, and have the guest go on."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        file = connection.makefile("rw")
        file.readline()

        def execute(command: str, **arguments: Any) -> Any:
            file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
            file.flush()
            while "return" not in (answer := json.loads(file.readline())):
                if "error" in answer:
                    raise Failed(f"{command}: {answer['error']}")
            return answer["return"]

        execute("qmp_capabilities")
        execute("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
        execute("migrate-incoming", uri=f"fd:{fd}")
        wait_until(lambda: execute("query-status")["status"] != "inmigrate", 60, "the devices' state")
        execute("cont")


def measure(program: Path, image: str, runs: int) -> Table:
    with tempfile.TemporaryDirectory(prefix="nocloud-bench-", dir="/var/tmp") as folder:
        table = Table()
        bench = WarmBench(Path(folder), program)

        def sooner(what: str, ours: Callable[[int, bool], float], count: int, times: float, rounds: int = runs) -> None:
            """How many times less the warm ones take: 1 is what the budget allows."""
            pairs = [(ours(count, True), ours(count, False)) for _ in range(rounds)]
            cold, warm = (statistics.median(column) for column in zip(*pairs))
            text, unit = (f"{each / 1024:.0f} MB" if ours == bench.memory else f"{each:.1f} s" for each in (warm, cold))
            table.row(f"{what}; bare: cold / {times:g}", text, unit, warm * times / cold, 1.0)

        try:
            bench.prepare(image)
            later = []
            for _ in range(runs):
                took = bench.to_running()
                later.append(took - bench.by_hand())
                bench.stop("many")
            late = statistics.median(later)
            table.row("a warm clone runs later than by hand", f"{late * 1000:.0f} ms", "", late, 0.5, " s")
            sooner("1 warm clone to the banner", bench.to_banner, 1, 12)
            sooner("5 warm clones to the banner", bench.to_banner, 5, 7)
            sooner("5 warm clones to a login", bench.to_login, 5, 4)
            sooner("10 warm clones: memory", bench.memory, 10, 1 / 0.75, 1)
        finally:
            bench.stop_everything()
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description="measure clones that wake up against clones that boot")
    parser.add_argument("program", nargs="?", type=Path, default=ROOT / "nocloud.pyz", help="the zipapp [%(default)s]")
    parser.add_argument("--image", default="", help="a disk that --build bookworm made; else it is built")
    parser.add_argument("--runs", type=int, default=3, help="how often each is measured [%(default)s]")
    args = parser.parse_args()
    return run(lambda: measure(args.program.resolve(), args.image, args.runs))


if __name__ == "__main__":
    sys.exit(main())
