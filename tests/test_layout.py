"""The module's own order: sections, sizes of functions, what may be named where, and what importing it costs."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator

from support import PROGRAM, ROOT

SECTIONS = [
    "Constants, errors, reporting",
    "Settings",
    "Names and the VM tree",
    "Programs",
    "Disks",
    "qemu's command line",
    "QMP",
    "Network",
    "Identity",
    "Templates",
    "Lifecycle",
    "Inventory",
    "Installation",
    "Commands",
    "Dispatch",
]

TEXT = PROGRAM.read_text()
MODULE = ast.parse(TEXT)
BANNERS = [
    (number, match.group(1))
    for number, line in enumerate(TEXT.splitlines(), 1)
    for match in [re.fullmatch(r"# (\S.*?) #{3,}", line)]
    if match
]


def section(line: int) -> str:
    """The section that a line is in."""
    return next((name for number, name in reversed(BANNERS) if number <= line), "")


def functions() -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(MODULE) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """What is evaluated when the module runs: no annotations, nothing under TYPE_CHECKING."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        if (
            isinstance(node, ast.If)
            and isinstance(node.test, ast.Name)
            and node.test.id == "TYPE_CHECKING"
            and name == "body"
        ):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from run_time_nodes(child)


def test_sections_stand_in_the_order_of_the_architecture() -> None:
    names = [name for _, name in BANNERS]
    assert [name for name in names if name in SECTIONS] == SECTIONS
    assert len(set(names)) == len(names)


def test_every_section_says_what_it_owns() -> None:
    lines = TEXT.splitlines()
    for number, name in BANNERS:
        assert lines[number] == "#" and re.match(r"# \S", lines[number + 1]), name


def test_functions_are_short() -> None:
    long = {node.name: length(node) for node in functions() if length(node) > 60}
    assert not long
    assert statistics.median(map(length, functions())) <= 12
    for name in ("machine_args", "cpu_args", "firmware_args", "disk_args", "net_args", "console_args", "monitor_args"):
        (builder,) = (node for node in functions() if node.name == name)
        assert length(builder) <= 40


def test_every_signature_is_typed() -> None:
    for node in functions():
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare = [each.arg for each in arguments if each.annotation is None and each.arg not in ("self", "cls")]
        assert not bare and node.returns is not None, node.name


STARTERS = re.compile(r"subprocess\..*|os\.(exec\w+|spawn\w+|posix_spawn\w*|fork|forkpty|system|popen)|pty\..*")


def test_only_programs_starts_processes() -> None:
    named = []
    for node in run_time_nodes(MODULE):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Attribute) and STARTERS.fullmatch(ast.unparse(node)):
            named.append((section(line), line, ast.unparse(node)))
        if isinstance(node, (ast.Import, ast.ImportFrom)) and "subprocess" in ast.unparse(node):
            named.append((section(line), line, ast.unparse(node)))
    assert [each for each in named if each[0] != "Programs"] == []


def test_only_reporting_writes() -> None:
    assert not [node.lineno for node in ast.walk(MODULE) if isinstance(node, ast.Name) and node.id == "print"]
    streams = [
        node.lineno
        for node in ast.walk(MODULE)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node) in ("sys.stdout.write", "sys.stderr.write", "sys.stdout.buffer")
    ]
    assert {section(line) for line in streams} <= {"Constants, errors, reporting"}


def test_no_shell_and_no_evaluation() -> None:
    for node in ast.walk(MODULE):
        assert not (isinstance(node, ast.keyword) and node.arg == "shell")
        assert not (isinstance(node, ast.Name) and node.id in ("eval", "exec", "__import__"))
        assert "pickle" not in ast.unparse(node) if isinstance(node, (ast.Import, ast.ImportFrom)) else True


def test_each_section_uses_only_those_above_it() -> None:
    defined: dict[str, int] = {}
    for node in MODULE.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined[node.name] = node.lineno
        elif isinstance(node, ast.Assign):
            defined.update({target.id: node.lineno for target in node.targets if isinstance(target, ast.Name)})
    order = {name: number for number, (_, name) in enumerate(BANNERS)}
    wrong = []
    for top in MODULE.body:
        own = names_bound_in(top)
        for part in run_time_nodes(top):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load) and part.id in defined.keys() - own:
                here, there = section(part.lineno), section(defined[part.id])
                if order.get(there, -1) > order.get(here, -1):
                    wrong.append(f"{here}, line {part.lineno}: {part.id} of {there}")
    assert wrong == []


def names_bound_in(top: ast.AST) -> set[str]:
    """Arguments and local variables, which hide the module's names."""
    if not isinstance(top, (ast.FunctionDef, ast.ClassDef)):
        return set()
    stored = {node.id for node in ast.walk(top) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return stored | {node.arg for node in ast.walk(top) if isinstance(node, ast.arg)}


def test_only_the_standard_library_is_imported() -> None:
    names = set()
    for node in ast.walk(MODULE):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    assert names <= set(sys.stdlib_module_names)


def test_importing_it_does_nothing_and_costs_little() -> None:
    code = (
        f"import sys, os, threading; sys.path.insert(0, {str(ROOT)!r})\n"
        "def state(): return os.listdir('/proc/self/fd'), threading.active_count(), dict(os.environ), os.getcwd()\n"
        "before = set(sys.modules), *state()\n"
        "import nocloud\n"
        "after = set(sys.modules), *state()\n"
        "assert before[1:] == after[1:]\n"
        "print(*(after[0] - before[0]))\n"
    )
    done = subprocess.run([sys.executable, "-IS", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    heavy = {
        "subprocess",
        "json",
        "typing",
        "dataclasses",
        "pathlib",
        "argparse",
        "socket",
        "logging",
        "shutil",
        "tempfile",
        "inspect",
        "ctypes",
        "urllib",
        "concurrent",
        "difflib",
        "shlex",
        "asyncio",
    }
    assert not heavy & set(done.stdout.split())


def test_it_is_python_3_9() -> None:
    ast.parse(TEXT, feature_version=(3, 9))
    for node in ast.walk(MODULE):
        assert not isinstance(node, getattr(ast, "Match", ())), node


def test_comments_are_about_the_program() -> None:
    """No registry's or machine's name, no ticket, no private path."""
    for line in TEXT.splitlines():
        assert not re.search(r"pypi|pythonhosted|/work/|/tmp/lab|issue #?\d", line, re.I), line
