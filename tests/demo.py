#!/usr/bin/env python3
"""`make demo`: a group of three VMs from a description file, from nothing to gone, each command as one would type it.

It works in the caller's own VM tree and keeps the template that it makes there. A command that fails ends it, with what
it made destroyed and status 1.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

GROUP = "demo"  # the description file's name is the group's
TEMPLATE, SUITE = "debian12", "bookworm"
DESCRIPTION = f"""\
# TEMPLATE:COUNT:TYPE:OPTIONS
{TEMPLATE}:1:db:name=db
{TEMPLATE}:2:web:name=web;port=0:80
"""
BOLD, PLAIN = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")


class Failed(Exception):
    """A step didn't work."""


class Demo:
    """A folder to work in, and a PATH that has the commands."""

    def __init__(self, folder: Path, commands: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "PATH": f"{commands}:{os.environ.get('PATH', os.defpath)}"}
        self.env.setdefault("ANSIBLE_PYTHON_INTERPRETER", "auto_silent")  # else a warning as long as all the rest
        self.inventory = commands / "vminventory"
        self.made = False

    def step(self, *words: str, shown: str = "") -> None:
        """Run a command, its output being seen as it comes."""
        print(f"\n{BOLD}$ {shown or shlex.join(words)}{PLAIN}", flush=True)
        start = time.monotonic()
        try:
            child = subprocess.Popen(words, env=self.env, cwd=self.folder, stdin=subprocess.DEVNULL)
        except OSError as error:
            raise Failed(f"{words[0]}: {error.strerror}") from None
        try:
            status = child.wait()
        except BaseException:  # ^C: the terminal has told the command too
            child.terminate()
            child.wait()
            raise
        print(f"({time.monotonic() - start:.1f} s)", flush=True)
        if status:
            raise Failed(f"{shlex.join(words)}: exit status {status}")

    def ask(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command out of sight."""
        null = subprocess.DEVNULL
        return subprocess.run(words, env=self.env, stdin=null, capture_output=True, text=True, check=False)

    # the steps

    def checked_group(self) -> None:
        found = self.ask("vmrunning", "-a", "-g", GROUP)
        if found.returncode == 0:
            raise Failed(f"you have a group {GROUP!r} already, which is left alone (vmstop -d -g {GROUP} destroys it)")
        if "no such group" not in found.stderr:
            raise Failed(found.stderr.strip())

    def template(self) -> None:
        listed = self.ask("vmtemplate", "--list")
        if TEMPLATE not in (line.split()[0] for line in listed.stdout.splitlines() if line.strip()):
            self.step("vmtemplate", TEMPLATE, "--build", SUITE)
        self.step("vmtemplate", "--list")

    def start(self) -> None:
        (self.folder / GROUP).write_text(DESCRIPTION)
        self.step("cat", GROUP)
        self.made = True
        self.step("vminstantiate", "-f", GROUP, "--wait", "600")

    def look(self) -> None:
        self.step("vmrunning", "-g", GROUP)
        self.step("vmport", "-L", "-g", GROUP)
        self.step("vminventory", "--list")
        self.step("vmssh", f"{GROUP}/db00", "hostname; uname -sr; uptime -p")
        self.step("vmssh", f"{GROUP}/web00", f"ping -c 2 db00.{GROUP}")
        self.step("vmssh", f"{GROUP}/web01", f"getent hosts db00.{GROUP} web00.{GROUP}")

    def ansible(self) -> None:
        beside = Path(__file__).resolve().parent.parent / "build/test-venv/bin"  # where `make test` puts one
        program = shutil.which("ansible", path=f"{self.env['PATH']}:{beside}")
        if not program:
            way = 'ansible -i "$(command -v vminventory)" demo -m ping'
            print(f"\n(no ansible here: with it, `{way}` would ping the three)")
            return
        words = [program, "-i", str(self.inventory), GROUP, "-m", "ping"]
        self.step(*words, shown=f'ansible -i "$(command -v vminventory)" {GROUP} -m ping')

    def end(self) -> None:
        self.step("vmstop", "-g", GROUP)
        self.step("vmrunning", "-a", "-g", GROUP)
        self.step("vmstop", "-d", "-g", GROUP)
        self.made = False

    def clean_up(self) -> None:
        if self.made:
            print(f"\ndemo: destroying what it made: vmstop -d -g {GROUP}", file=sys.stderr, flush=True)
            print(self.ask("vmstop", "-d", "-g", GROUP).stderr, end="", file=sys.stderr)


def interrupted(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str]) -> int:
    if len(argv) != 2:
        print("usage: demo.py FOLDER-OF-THE-COMMANDS", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nocloud-demo-") as folder:
        demo = Demo(Path(folder), Path(argv[1]).absolute())
        try:
            demo.checked_group()
            for part in (demo.template, demo.start, demo.look, demo.ansible, demo.end):
                part()
        except Failed as error:
            print(f"\ndemo: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\ndemo: interrupted", file=sys.stderr)
            return 130
        finally:
            demo.clean_up()
    took = time.monotonic() - start
    print(f"\nDone in {took:.0f} s. The template is kept; vmtemplate {TEMPLATE} --delete removes it.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
