"""The shells' completion, in real shells on pseudo-terminals, of the program as it is installed."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT, Cloud, Terminal, end_child
from test_zipapp import PATH, build

import nocloud

SHELLS = ("bash", "zsh", "fish")
TAB, START, ENTER, ALL = "\t", "\x01", "\r", "\x1b*"

RUNNING = ("pf/web/web00", "pf/web/web01", "pf/sql/sql00", "two/web/west", "old ones/a b/we'ird $x")
STOPPED = ("pf/web/wet00", "two/sql/sql00", "templates/debian12", "templates/de luxe")

# A process that holds the locks which qemu would hold on its pidfiles.
HOLDER = """
import fcntl, signal, sys
files = [open(path, "w") for path in sys.argv[1:]]
for file in files:
    fcntl.lockf(file, fcntl.LOCK_EX)
print("+", flush=True)
signal.pause()
"""


def add_vm(base: Path, place: str) -> Path:
    folder = base / place
    folder.mkdir(parents=True)
    (folder / f"{folder.name}.conf").write_text(f"vmName='{folder.name}'\n".replace("we'ird", "weird"))
    (folder / f"{folder.name}.conf").chmod(0o600)
    return folder / f"{folder.name}.pid"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """A zipapp with its links and completion files in a prefix of its own, and a tree in which VMs run."""
    with Cloud(tmp_path_factory.mktemp("completion") / "home") as cloud:
        prefix = cloud.home / "prefix"
        (prefix / "bin").mkdir(parents=True)
        program = prefix / "bin/nocloud"
        build(ROOT, program)
        cloud.env["PATH"] = f"{prefix}/bin:{PATH}"
        cloud.execute([program, "links", prefix / "bin"]).quiet()
        for each in nocloud.planned_documents(str(prefix)):
            path = Path(each.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            if each.link:
                path.symlink_to(each.link)
            else:
                path.write_bytes(each.content)
        pidfiles = [add_vm(cloud.base, place) for place in RUNNING]
        for place in STOPPED:
            add_vm(cloud.base, place)
        with (cloud.base / "pf/web/web00/web00.conf").open("a") as conf:
            conf.write("vmAddress=10.88.0.7\n")
        (cloud.home / "isos").mkdir()
        for name in ("debian live.iso", "arch.iso", "notes.txt"):
            (cloud.home / "isos" / name).touch()
        (cloud.home / "we").mkdir()  # a folder that is called as VMs begin
        (cloud.home / "my shop").touch()
        (cloud.home / ".nocloud.conf").write_text(f"isoDir={cloud.home}/isos\n")
        holder = subprocess.Popen(
            ["python3", "-ISc", HOLDER, *map(str, pidfiles)], stdout=subprocess.PIPE, text=True, env=cloud.env
        )
        try:
            assert holder.stdout and holder.stdout.readline() == "+\n"
            yield cloud
        finally:
            end_child(holder)


class Shell(Terminal):
    """An interactive shell with the completion, in which `args WORDS` shows the words that it read."""

    STARTS = {
        "bash": (
            "bash --norc --noprofile",
            "args() { printf '{%s}' \"$@\"; echo; }; source <(nocloud completion bash)",
        ),
        "zsh": (
            "zsh -f",
            "args() { printf '{%s}' \"$@\"; echo; }; autoload -Uz compinit; compinit -u -D; bindkey -e;"
            " unsetopt zle_bracketed_paste; source <(nocloud completion zsh)",
        ),
        "fish": (
            "fish --no-config --private",
            "function args; printf '{%s}' $argv; echo; end; function fish_prompt; printf '$ '; end;"
            " function fish_right_prompt; end; set -g fish_autosuggestion_enabled 0; nocloud completion fish | source",
        ),
    }

    def __init__(self, cloud: Cloud, name: str, load: str = "") -> None:
        if not shutil.which(name):
            if os.environ.get("CI"):
                pytest.fail(f"{name} is not installed: make test installs it")
            pytest.skip(f"{name} is not installed; make test installs it")
        self.name = name
        argv, start = self.STARTS[name]
        super().__init__(cloud, "", argv=argv.split(), env={"PS1": "$ ", "TERM": "xterm", "fish_greeting": ""})
        fcntl.ioctl(self.slave, 0x5414, b"\x32\x00\xc8\x00\x00\x00\x00\x00")  # TIOCSWINSZ: 50 lines of 200
        self.type(f"{load or start}; echo 're'ady{ENTER}")
        self.see("ready\r\n")

    def words(self, typed: str, keys: str = TAB) -> list[str]:
        """The words of the line that is there after TAB, as the shell reads them."""
        self.type(typed + keys)
        self.type(START + "args " + ENTER)
        return re.findall(r"\{([^{}]*)\}", self.see("}\r\n", 5) + "}")

    def __enter__(self) -> Shell:
        return self


# What is typed before TAB, and the words that are on the line after it.
CASES = [
    ("vmssh wes", ["vmssh", "west"]),  # wet00 is stopped
    ("vmssh wet00", ["vmssh", "wet00"]),
    ("X=1 vmssh wes", ["X=1", "vmssh", "west"]),
    ("nocloud ssh two/w", ["nocloud", "ssh", "two/west"]),
    ("nocloud --debug vmssh wes", ["nocloud", "--debug", "vmssh", "west"]),
    ("vmssh web01 wes", ["vmssh", "web01", "wes"]),  # the guest's words
    ("vmssh -4 -L 80:a:80 wes", ["vmssh", "-4", "-L", "80:a:80", "west"]),  # ssh's before it
    ("vmssh -NL wes", ["vmssh", "-NL", "wes"]),
    ("vmssh we\\'", ["vmssh", "we'ird $x"]),
    ("vm -n wet", ["vm", "-n", "wet00"]),
    ("vmstop -g two -n s", ["vmstop", "-g", "two", "-n", "sql00"]),
    ("vmstop --group=o", ["vmstop", "--group=old ones"]),
    ("vmstop -dg o", ["vmstop", "-dg", "old ones"]),
    ("vmstop -g pf -t s", ["vmstop", "-g", "pf", "-t", "sql"]),
    ("vmstop --des", ["vmstop", "--destroy"]),
    ("nocloud instant", ["nocloud", "instantiate"]),
    ("nocloud completion z", ["nocloud", "completion", "zsh"]),
    ("vmtemplate --delete 'de ", ["vmtemplate", "--delete", "de luxe"]),
    ("vmtemplate ubuntu24", ["vmtemplate", "ubuntu24.04"]),
    ("vmrun --file=my", ["vmrun", "--file=my shop"]),
    ("vmcreate -i debian", ["vmcreate", "-i", "debian live.iso"]),
    ("nocloud-bridge sto", ["nocloud-bridge", "stop"]),
    ("nocloud links iso", ["nocloud", "links", "isos"]),
]
# In zsh and fish, these are for make test-all.
MORE_CASES = [
    ("vmssh web01", ["vmssh", "web01"]),
    ("vmssh web", ["vmssh", "web0"]),  # as far as they are the same
    ("vmssh web01 --vers", ["vmssh", "web01", "--vers"]),
    ("vmssh -- wes", ["vmssh", "--", "west"]),
    ("vmconsole -n wes", ["vmconsole", "-n", "west"]),
    ("vmconsole wes", ["vmconsole", "west"]),
    ("vmstop sql00 wet", ["vmstop", "sql00", "wet00"]),
    ("vmstart -g two s", ["vmstart", "-g", "two", "sql00"]),
    ("vmmanage -n old\\ ones/w", ["vmmanage", "-n", "old ones/we'ird $x"]),
    ("vmssh \"we'", ["vmssh", "we'ird $x"]),
    ("vmstop -n wet", ["vmstop", "-n", "wet00"]),
    ("vmstop -n two/s", ["vmstop", "-n", "two/sql00"]),
    ("vmstop -n two/sql/", ["vmstop", "-n", "two/sql/sql00"]),
    ("vmstop -g o", ["vmstop", "-g", "old ones"]),
    ("vmstop -d -g tem", ["vmstop", "-d", "-g", "templates"]),
    ("nocloud stop --kil", ["nocloud", "stop", "--kill"]),
    ("nocloud vmstop --kil", ["nocloud", "vmstop", "--kill"]),
    ("nocloud --vers", ["nocloud", "--version"]),
    ("nocloud net st", ["nocloud", "net", "status"]),
    ("vmtemplate --delete deb", ["vmtemplate", "--delete", "debian12"]),
    ("vmtemplate debian13 --build boo", ["vmtemplate", "debian13", "--build", "bookworm"]),
    ("vmtemplate --init sy", ["vmtemplate", "--init", "systemd"]),
    ("vminstantiate -n debi", ["vminstantiate", "-n", "debian12"]),
    ("vminstantiate -f my", ["vminstantiate", "-f", "my shop"]),
    ("vmcreate -i ./my", ["vmcreate", "-i", "./my shop"]),
    ("vmcreate -n wet", ["vmcreate", "-n", "wet"]),
    ("vmcreate -a -n wet", ["vmcreate", "-a", "-n", "wet00"]),
    ("vminventory --host 10.", ["vminventory", "--host", "10.88.0.7"]),
    ("vmrunning nothing", ["vmrunning", "nothing"]),
]


@pytest.fixture(scope="module", params=SHELLS)
def shell(installed: Cloud, request: pytest.FixtureRequest) -> Iterator[Shell]:
    with Shell(installed, request.param) as shell:
        yield shell


@pytest.fixture(scope="module")
def bash(installed: Cloud) -> Iterator[Shell]:
    with Shell(installed, "bash") as shell:
        yield shell


@pytest.mark.parametrize(("typed", "words"), CASES)
def test_completes(shell: Shell, typed: str, words: list[str]) -> None:
    assert [word.rstrip("/") for word in shell.words(typed)] == words  # zsh takes the slash away at the next space


@pytest.mark.parametrize(("typed", "words"), MORE_CASES)
def test_completes_more_in_bash(bash: Shell, typed: str, words: list[str]) -> None:
    test_completes(bash, typed, words)


@pytest.mark.long
@pytest.mark.parametrize(("typed", "words"), MORE_CASES)
def test_completes_more(shell: Shell, typed: str, words: list[str]) -> None:
    test_completes(shell, typed, words)


CHECKERS = {"bash": ("shellcheck", "--shell=bash"), "zsh": ("zsh", "-n"), "fish": ("fish", "--no-execute")}


@pytest.mark.parametrize("name", SHELLS)
def test_the_script_is_clean(cloud: Cloud, name: str) -> None:
    """Its file as it is, and as it is printed."""
    if not shutil.which(CHECKERS[name][0]):
        pytest.skip(f"{CHECKERS[name][0]} is not installed")
    path = cloud.home / "script"
    path.write_text(cloud.run("completion", name).ok().stdout)
    for each in (ROOT / f"etc/completion/nocloud.{name}", path):
        assert cloud.execute([*CHECKERS[name], each]).ok().stdout == ""


def given_to(cloud: Cloud, *words: str) -> list[str]:
    """What the script of a shell is told."""
    return cloud.execute(["nocloud", "complete", *words]).ok().stdout.split("\n")[:-1]


def test_what_is_joined_and_what_is_given_already(installed: Cloud) -> None:
    """The engine, asked as the scripts do: what the files that they look for begin with, and no option twice."""
    assert given_to(installed, "zsh", "vmrun", "-fmy") == ["file", "-f"]
    assert given_to(installed, "zsh", "vmrun", "--file=my") == ["file", "--file="]
    assert given_to(installed, "zsh", "vmrun", "-f", "my") == ["file", ""]
    groups = ["old ones", "pf", "two", "templates"]
    assert given_to(installed, "fish", "vmstop", "-dgo") == ["", "-dg", *(f"{each}\t" for each in groups)]
    assert given_to(installed, "bash", "vmrun -f 'a:b", "b") == ["file", "", "a:", "a:b"]
    assert given_to(installed, "bash", "vmrun --file=a:b", "b") == ["file", "", "a:", "a:b"]
    assert given_to(installed, "bash", "vmrun -fb", "-fb") == ["file", "-f", "", "b"]
    offered = given_to(installed, "bash", "vmstop -g pf --destroy -", "-")[4:]
    assert "-t" in offered and not {"-g", "--group", "-d", "--destroy"} & set(offered)
    assert given_to(installed, "bash", "vminstantiate --wait -", "-")[4:]
    assert given_to(installed, "bash", "vminstantiate -w ", "") == [""] * 4  # the value may be left out: an operand
    assert given_to(installed, "fish", "nocloud", "-x", "ss") == ["", ""]
    installed.run("complete", "fish", "nocloud", "nothing", "").fails(127, "nothing")


# All of it, without a terminal #######################################################################

ASK_BASH = """
eval "$(nocloud completion bash)"
compopt() { :; }
while IFS= read -r COMP_LINE; do
    COMP_POINT=${#COMP_LINE}
    _nocloud "${COMP_LINE%% *}" "${COMP_LINE##*[ =:]}" 2>&1
    printf '%s\n' "${COMPREPLY[@]}" --
done
"""


def offered(cloud: Cloud, shell: str, lines: list[str]) -> list[set[str]]:
    """What the shell's completion offers at the end of each of these lines."""
    if shell == "bash":
        done = cloud.execute(["bash", "-c", ASK_BASH], input="".join(f"{line}\n" for line in lines)).ok()
        return [set(part.split("\n")) - {""} for part in done.stdout.split("\n--\n")][: len(lines)]
    code = "nocloud completion fish | source; while read -d \\n line; complete -C $line; echo ==; end"
    done = cloud.execute(["fish", "--no-config", "-c", code], input="".join(f"{line}\n" for line in lines)).ok()
    parts = done.stdout.split("==\n")[: len(lines)]
    return [{row.split("\t")[0] for row in part.splitlines()} for part in parts]


def typed_names(command: nocloud.Command) -> list[str]:
    """All that it is called by."""
    return [f"nocloud {command.name}", *([command.alias, f"nocloud {command.alias}"] if command.alias else [])]


@pytest.mark.long
@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_every_option_of_every_command_is_offered(installed: Cloud, shell: str) -> None:
    lines, expected = [], []
    for command in nocloud.COMMANDS.values():
        for name in typed_names(command) if not command.hidden else []:
            for start in ("-", "--"):
                lines.append(f"{name} {start}")
                options = [*command.options, *nocloud.GENERAL_OPTIONS]
                expected.append({each for option in options for each in option.names if each.startswith(start)})
    for line, found, names in zip(lines, offered(installed, shell, lines), expected):
        assert found == names, line


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_every_option_is_described(installed: Cloud, shell: str) -> None:
    """What zsh and fish show beside each."""
    for command in nocloud.visible_commands():
        rows = installed.run("complete", shell, "nocloud", command.name, "-").ok().lines[2:]
        options = [*command.options, *nocloud.GENERAL_OPTIONS]
        expected = {name: option.help for option in options for name in option.names}
        found = dict(row.split("\t") for row in rows)
        assert found == expected
    commands = {each.name: each.help for each in nocloud.visible_commands()}
    rows = installed.run("complete", shell, "nocloud", "").ok().lines[2:]
    assert dict(row.split("\t") for row in rows) == commands


FROB = """\
option = nocloud.Option('-k --knob VM', 'a new knob', complete='running-vm')
@nocloud.declare(nocloud.Command('frob', 'vmfrob', 'GROUP', ('group',)), option)
def cmd_frob(config, args, words):
    'turn a knob'
sys.exit(nocloud.main(['nocloud', *sys.argv[1:]]))
"""


def test_what_is_declared_appears_in_all_of_them(installed: Cloud) -> None:
    """A command that no script knows of is declared, and the printing asked again."""
    for shell in SHELLS:
        assert "vmfrob" in installed.script(FROB, "completion", shell).ok().stdout.split()
    for shell in ("zsh", "fish"):
        for words, expected in ((("vmfrob", "--k"), "knob"), (("vmfrob", "-k", ""), "west"), (("frob", ""), "two")):
            name = () if words[0] == "vmfrob" else ("nocloud",)
            assert expected in installed.script(FROB, "complete", shell, *name, *words).ok().stdout
    for line, expected in (("vmfrob --k", "--knob"), ("vmfrob -k wes", "west"), ("nocloud frob tw", "two")):
        assert installed.script(FROB, "complete", "bash", line, "").ok().lines[4:] == [
            expected[len(line.split()[-1]) :]
        ]


# Where it is installed ###############################################################################


def test_bash_loads_it_from_its_folder(installed: Cloud) -> None:
    """As bash-completion does: the file that is called as the command, at the first TAB."""
    folder = installed.home / "prefix/share/bash-completion/completions"
    load = (
        "args() { printf '{%s}' \"$@\"; echo; };"
        f"_load() {{ . {folder}/${{1##*/}} 2>/dev/null && return 124; }}; complete -D -F _load"
    )
    with Shell(installed, "bash", load) as shell:
        assert shell.words("vmssh wes") == ["vmssh", "west"]
        assert shell.words("vmstop -dg tw") == ["vmstop", "-dg", "two"]
        assert shell.words("nocloud ssh wes") == ["nocloud", "ssh", "west"]


def test_zsh_loads_it_from_its_folder(installed: Cloud) -> None:
    folder = installed.home / "prefix/share/zsh/site-functions"
    load = (
        f"args() {{ printf '{{%s}}' \"$@\"; echo; }}; fpath=({folder} $fpath); autoload -Uz compinit;"
        " compinit -u -D; bindkey -e"
    )
    with Shell(installed, "zsh", load) as shell:
        assert shell.words("vmssh wes") == ["vmssh", "west"]
        assert shell.words("nocloud stop --des") == ["nocloud", "stop", "--destroy"]


def test_fish_loads_it_from_its_folder(installed: Cloud) -> None:
    folder = installed.home / "prefix/share/fish/vendor_completions.d"
    load = (
        "function args; printf '{%s}' $argv; echo; end; function fish_prompt; printf '$ '; end;"
        f" set -g fish_autosuggestion_enabled 0; set -p fish_complete_path {folder}"
    )
    with Shell(installed, "fish", load) as shell:
        assert shell.words("vmssh wes") == ["vmssh", "west"]
        assert shell.words("nocloud ssh wes") == ["nocloud", "ssh", "west"]


def test_a_program_that_is_called_by_its_path(installed: Cloud) -> None:
    """Nothing of that name is on the PATH."""
    (installed.home / "away").mkdir()
    path = installed.home / "away/nocloud.pyz"
    shutil.copy(installed.home / "prefix/bin/nocloud", path)
    env = {"PATH": PATH}
    script = ASK_BASH.replace("nocloud completion", f"{path} completion")
    done = installed.execute(["bash", "-c", script], input="away/nocloud.pyz ssh wes\n~/away/nocloud.pyz ssh wes\n"
                             "vmssh wes\n", env=env).ok()  # fmt: skip
    assert done.stdout.split() == ["west", "--", "west", "--", "--"]


# Quick, and without a trace ##########################################################################


def test_a_tab_is_answered_at_once(installed: Cloud) -> None:
    """`vmssh wes<TAB>` within 150 ms; a machine that is busy with other things gets more than one try."""
    with Shell(installed, "bash") as shell:
        shell.words("vmssh wes")  # what compiling took is kept
        taken = []
        for _ in range(20):
            shell.type("vmssh wes")
            shell.see("vmssh wes")
            started = time.monotonic()
            shell.type(TAB)
            shell.see("t ")
            taken.append(time.monotonic() - started)
            if taken[-1] <= 0.15:
                break
            shell.type(START + "args " + ENTER)
            shell.see("}\r\n")
    assert taken[-1] <= 0.15, taken


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = {}
    for path in [folder, *folder.rglob("*")]:
        info = path.lstat()
        found[str(path)] = (info.st_mtime_ns, info.st_size, info.st_mode)
    return found


def test_it_changes_and_starts_nothing(installed: Cloud) -> None:
    """Also where a network that was killed is to be mended, which is the next real command's work."""
    net = installed.base / ".net"
    net.mkdir(mode=0o700)
    for name in ("holder.pid", "subnet", "kept"):
        (net / name).write_text("10.88.0\n")
    installed.run("complete", "fish", "vmssh", "")
    before = state(installed.home)
    for kind in nocloud.WORD_KINDS:
        done = installed.script(FROB.replace("running-vm", kind), "complete", "fish", "vmfrob", "-k", "").ok()
        assert done.stderr == ""
    assert state(installed.home) == before
    shutil.rmtree(net)


def test_it_loads_no_more_than_it_needs(installed: Cloud) -> None:
    program = shutil.which("nocloud", path=installed.env["PATH"])
    done = installed.execute(["python3", "-IS", "-X", "importtime", program, "complete", "bash", "vmssh we", "we"]).ok()
    loaded = set(re.findall(r"\| +(\S+)$", done.stderr, re.M))
    assert "fcntl" in loaded
    heavy = {"argparse", "subprocess", "json", "socket", "ctypes", "threading", "difflib", "shlex", "shutil", "typing"}
    assert not heavy & loaded


def test_a_wrong_configuration_offers_nothing_and_says_nothing(installed: Cloud) -> None:
    with Shell(installed, "bash") as shell:
        (installed.home / ".nocloud.conf").rename(installed.home / "kept.conf")
        try:
            (installed.home / ".nocloud.conf").write_text("vmMem=$(rm -rf /)\n")
            assert shell.words("vmssh wes") == ["vmssh", "wes"]
            assert "nocloud" not in shell.shown
        finally:
            (installed.home / "kept.conf").rename(installed.home / ".nocloud.conf")


def test_a_thousand_vms(installed: Cloud) -> None:
    """The time does not explode: names that several have are told apart in one go."""
    base = installed.home / "thousand"
    for group in ("a", "b"):
        for number in range(500):
            add_vm(base, f"{group}/web/web{number:03d}")
    env = {"NOCLOUD_vmBaseDir": str(base)}
    words = ("complete", "fish", "vmstop", "-n")
    done = installed.execute(["nocloud", *words, "a/web49"], env=env).ok()
    assert len(done.lines) == 1002 and "a/web499\t" in done.lines
    assert "a/web/web007\t" in installed.execute(["nocloud", *words, "a/web/"], env=env).ok().lines


def test_bash_completion_loads_it(installed: Cloud) -> None:
    """The package of that name, where it is installed: it finds the file, and completes behind other commands too."""
    package = "/usr/share/bash-completion/bash_completion"
    if not os.path.exists(package):
        pytest.skip("bash-completion is not installed")
    load = (
        "args() { printf '{%s}' \"$@\"; echo; };"
        f" export XDG_DATA_DIRS={installed.home}/prefix/share:/usr/share; . {package}"
    )
    with Shell(installed, "bash", load) as shell:
        assert shell.words("vmssh wes") == ["vmssh", "west"]
        assert shell.words("nohup vmssh wes") == ["nohup", "vmssh", "west"]
        assert shell.words("nohup nocloud stop --group=o") == ["nohup", "nocloud", "stop", "--group=old ones"]


def test_every_kind_that_is_declared_is_known() -> None:
    for command in nocloud.COMMANDS.values():
        for complete in (*command.complete, *(option.complete for option in command.options)):
            kinds = [] if isinstance(complete, tuple) else [kind for kind in complete.split("+") if kind]
            assert set(kinds) <= {*nocloud.WORD_KINDS, *nocloud.SHELL_KINDS}, (command.name, kinds)
            words = complete if isinstance(complete, tuple) else ()
            assert all(re.fullmatch(r"[A-Za-z0-9._-]+", word) for word in words), (command.name, words)
