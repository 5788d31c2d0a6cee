"""Possession is proof: what executes a file takes a verified release, and only `trust` makes one.

The claims are about the source as a whole, so the source is what is read here.
The checker is code as well: each of its rules is broken on purpose, once for each
way in which a change could get around it.
"""

from __future__ import annotations

import ast
import functools
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from programs import write_program

import selfupdate
from selfupdate import settings, versions
from selfupdate.candidates import Scanner
from selfupdate.journal import Journal
from selfupdate.listener import parse_address
from selfupdate.releases import Store
from selfupdate.started import Started
from selfupdate.trust import Release, Trust

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SOURCE = {path.stem: path.read_text(encoding="utf-8") for path in Path(selfupdate.__file__).parent.glob("*.py")}

MAKERS = {("trust", "Trust.recall"), ("trust", "Reading.verify")}
"""The functions that make a release: by module, and by name in it."""

STARTERS = {
    ("posix", "spawn", "os.posix_spawn"),
    ("posix", "become", "os.execve"),
    ("posix", "start_piped", "subprocess.Popen"),
    ("posix", "execute_instead", "os.execv"),
    ("windows", "_start", "subprocess.Popen"),
}
"""Where another program is started: only the operating system's rooms do that."""

CALLERS = {
    ("posix", "Guard.__init__", "spawn"),
    ("launch", "Child.start", "posix.spawn"),
    ("launch", "Comeback.execute", "posix.become"),
    ("process", "capture", "start_piped"),
    ("started", "Started.start", "system.Child"),
    ("candidates", "Scanner._run", "process.capture"),
    ("verifier", "Verifier._run", "process.capture"),
    ("service", "_Service._execute_anew", "system.execute_instead"),
}
"""Who calls those: the first starts a shell, `verifier` the platform's own tools, and the last one is the program
that was installed, which is executed anew."""

IMPORTERS = {
    "from selfupdate.launch import Channel, Child, Comeback, Parent, adopt, join, shared": "system",
    "from selfupdate.system import Process, ready, start_piped, wait_for_end": "process",
}
"""What names them for its own use; `system` also names what `posix` and `windows` have."""

KNOWN = {
    ("program", "file_of_this_program", "sys.modules"),
    ("journal", "", "get_type_hints"),
    ("watch", "_eye_on", "import ctypes"),
    ("win32", "", "import ctypes"),
    ("win32", "", "from ctypes import wintypes"),
}
"""What could lead elsewhere: where this program itself was loaded from, the types of a record's fields, and the calls
of inotify and Windows."""

TAKERS = {("started", "Started.__init__"), ("candidates", "Scanner._run")}
"""What starts a program that came from the upgrade directory, or keeps it to be started."""

_OF_OS = ("exec", "spawn", "posix_spawn", "fork", "system", "popen", "startfile")
_OF_SUBPROCESS = {"Popen", "run", "call", "check_call", "check_output", "getoutput", "getstatusoutput"}
_OF_PROCESS = {"spawn", "become", "capture", "start_piped", "execute_instead", "Child"}
_ROOMS = {"process", "system", "posix", "launch", "windows"}
_OF_WINDOWS = ("CreateProcess", "ShellExecute", "WinExec")
_BUILT_IN = {"eval", "exec", "compile", "__import__", "globals"}
_MODULES = {
    *("asyncio", "builtins", "cffi", "code", "codeop", "commands", "concurrent", "ctypes", "_ctypes", "importlib"),
    *("imp", "multiprocessing", "nt", "pickle", "_posixsubprocess", "posix", "pty", "runpy", "site", "zipimport"),
    *("marshal", "webbrowser", "distutils", "setuptools", "inspect", "annotationlib"),
}
"""What starts programs, or runs code, in ways of its own, or hands out what stands in annotations."""
_OF_TYPING = {"get_type_hints", "get_args"}
"""What hands out what stands in annotations."""
_INNARDS = {
    "__class__",
    "__dict__",
    "__new__",
    "__globals__",
    "__builtins__",
    "__annotations__",
    "__annotate__",
    "__args__",
}
"""What leads from a thing to what it is made of."""
_OF_ANNOTATIONS = (
    *(ast.Name, ast.Attribute, ast.Subscript, ast.Tuple, ast.List, ast.BinOp, ast.BitOr, ast.Constant),
    ast.expr_context,
)
"""What an annotation consists of."""

Found = set[tuple[str, str, str]]


class _Reader(ast.NodeVisitor):
    """Collects what one module does that only a few may: each with the function in which it stands."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.makers: Found = set()
        self.starters: Found = set()
        self.callers: Found = set()
        self.faults: Found = set()
        self._where: list[str] = []

    def _note(self, found: Found, what: str) -> None:
        found.add((self.module, ".".join(self._where), what))

    def _visit_scope(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        for decorator in node.decorator_list:
            self.visit(decorator)
        self._where.append(node.name)
        returned = None if isinstance(node, ast.ClassDef) else node.returns
        self._pass_over(returned)
        for child in ast.iter_child_nodes(node):
            if child not in node.decorator_list and child is not returned:
                self.visit(child)
        self._where.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _visit_scope  # noqa: N815 - ast's names

    def _pass_over(self, annotation: ast.expr | None) -> None:
        """Pass over what names types and does nothing: it may be evaluated."""
        if annotation and any(not isinstance(part, _OF_ANNOTATIONS) for part in ast.walk(annotation)):
            self._note(self.faults, ast.unparse(annotation))

    def visit_arg(self, node: ast.arg) -> None:
        self._pass_over(node.annotation)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._pass_over(node.annotation)
        for child in (node.target, node.value):
            if child is not None:
                self.visit(child)

    def visit_If(self, node: ast.If) -> None:
        """Pass over what is imported for annotations alone."""
        if ast.unparse(node.test) == "TYPE_CHECKING":
            node = ast.If(node.test, [], node.orelse)
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            root = alias.name.partition(".")[0]
            is_renamed = alias.asname is not None and root in {"os", "subprocess", "sys", "selfupdate"}
            if root in _MODULES or is_renamed or (root == "subprocess" and self.module not in {"posix", "windows"}):
                self._note(self.faults, ast.unparse(node))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module, names = node.module or "", {alias.name for alias in node.names}
        is_forbidden = (
            node.level
            or module.partition(".")[0] in _MODULES
            or module == "subprocess"
            or "*" in names
            or (module == "os" and any(name.startswith(_OF_OS) for name in names))
            or (module == "sys" and "modules" in names)
            or (module.removeprefix("selfupdate.") in _ROOMS and names & _OF_PROCESS and not self._may_import(node))
            or "Release" in names
            or any(alias.asname and alias.name in _ROOMS | _OF_TYPING for alias in node.names)
        )
        if is_forbidden:
            self._note(self.faults, ast.unparse(node))

    def _may_import(self, node: ast.ImportFrom) -> bool:
        is_all_of_a_room = self.module == "system" and node.module in {"selfupdate.posix", "selfupdate.windows"}
        renames = any(alias.asname for alias in node.names)
        return not renames and (is_all_of_a_room or IMPORTERS.get(ast.unparse(node)) == self.module)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner, name = ast.unparse(node.value), node.attr
        if (owner == "os" and name.startswith(_OF_OS)) or name.startswith(_OF_WINDOWS):
            self._note(self.starters, f"{owner}.{name}")
        elif owner == "subprocess" and name in _OF_SUBPROCESS:
            self._note(self.starters, f"subprocess.{name}")
        elif owner in _ROOMS and name in _OF_PROCESS:
            self._note(self.callers, f"{owner}.{name}")
        elif name == "Release":
            self._note(self.makers, f"{owner}.Release")
        elif name in _INNARDS | _OF_TYPING or (owner, name) == ("sys", "modules"):
            self._note(self.faults, f"{owner}.{name}")
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id == "Release":
            self._note(self.makers, "Release")
        elif node.id in _BUILT_IN | _OF_TYPING:
            self._note(self.faults, node.id)
        elif node.id in _OF_PROCESS:
            self._note(self.callers, node.id)

    def visit_Call(self, node: ast.Call) -> None:
        name, first = ast.unparse(node.func), ast.unparse(node.args[0]) if node.args else ""
        if name in {"getattr", "vars"} and first in {"os", "subprocess", "selfupdate", "", *_ROOMS}:
            wanted = node.args[1] if len(node.args) > 1 else None
            if not isinstance(wanted, ast.Constant) or not str(wanted.value).startswith("O_"):
                self._note(self.faults, ast.unparse(node))
        owner, _, method = name.rpartition(".")
        is_copied = name in {"replace", "copy.replace", "type", "copy.copy"} and "release" in first.lower()
        if is_copied or (method in {"_replace", "_make"} and "release" in owner.lower()):
            self._note(self.makers, ast.unparse(node))  # it would be a release of another file
        self.generic_visit(node)


@functools.cache
def _read_one(module: str, text: str) -> _Reader:
    reader = _Reader(module)
    reader.visit(ast.parse(text))
    return reader


def _read(source: dict[str, str]) -> tuple[Found, Found, Found, Found]:
    """Return what makes releases, what starts programs, what calls those, and what is not allowed at all."""
    readers = [_read_one(module, text) for module, text in source.items()]
    makers, starters, callers, faults = (
        set().union(*(getattr(reader, what) for reader in readers))
        for what in ("makers", "starters", "callers", "faults")
    )
    return makers, starters, callers, faults


def _is_proved(source: dict[str, str]) -> bool:
    """Tell whether only what is listed above makes a release, or starts a program."""
    makers, starters, callers, faults = _read(source)
    return (
        makers == {(*maker, "Release") for maker in MAKERS}
        and (starters, callers) == (STARTERS, CALLERS)
        and faults == KNOWN
    )


def _parameters(module: str, where: str) -> dict[str, str]:
    """Return the annotations of a function's parameters, by name."""
    name_of_class, name = where.split(".")
    for body in ast.parse(SOURCE[module]).body:
        for function in body.body if isinstance(body, ast.ClassDef) and body.name == name_of_class else []:
            if isinstance(function, ast.FunctionDef) and function.name == name:
                return {one.arg: ast.unparse(one.annotation) for one in function.args.args if one.annotation}
    raise AssertionError(where)


def test_only_verification_makes_a_release() -> None:
    """Outside of `trust`, no module has so much as the name, but for annotations; in it, two functions use it."""
    makers, _, _, _ = _read(SOURCE)
    assert makers == {(*maker, "Release") for maker in MAKERS}


def test_only_a_few_places_start_programs() -> None:
    """Whatever starts another program, or runs code that is not this program's, is listed, and nothing else does."""
    _, starters, callers, faults = _read(SOURCE)
    assert starters == STARTERS
    assert callers == CALLERS
    assert faults == KNOWN


def test_what_starts_a_candidate_takes_a_release() -> None:
    """Its signature says so, and its command is that release's, which nothing else has."""
    for module, where in TAKERS:
        assert _parameters(module, where)["release"].removeprefix("trust.") == "Release", where
    assert "self.command = release.command(" in SOURCE["started"]
    assert 'process.capture(\n                release.command("-version"),' in SOURCE["candidates"]


def test_the_program_that_is_executed_anew_is_the_one_that_was_installed() -> None:
    """A start executes another file only after it has put it there itself, from the store."""
    assert SOURCE["service"].count("self._execute_anew()") == 1
    assert "elif self._estate.take():\n            self._execute_anew()" in SOURCE["service"]
    assert "return recover(self.journal, self.store, self.program.path)" in SOURCE["estate"]
    anew = SOURCE["service"].partition("def _execute_anew")[2].partition("\n    def ")[0]
    assert anew.index("path = str(self._estate.program.path)") < anew.index("system.execute_instead(path")


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("candidates", "from selfupdate.trust import Release"),
        ("candidates", "import selfupdate.trust\nx = selfupdate.trust.Release(None, ())"),
        ("upgrade", "from selfupdate import trust\ndef _go(copy): return trust.Release(copy, ())"),
        ("trust", "def trusted(copy): return Release(copy, ())"),
        ("trust", "make = Release"),
        ("trust", "class Shortcut(Release): pass"),
        ("trust", "def trusted(copy: Release(None, ())): pass"),
        ("candidates", "def trusted() -> trust.Release(None, ()): pass"),
        ("candidates", "class Trusted:\n    release: trust.Release(None, ())"),
        ("candidates", "class Trusted:\n    release: (lambda copy: copy)"),
        ("candidates", "def _go(copy): return Candidate.__annotations__['release'](copy, ())"),
        ("candidates", "def _go(copy): return Candidate.__annotate__(1)['release'](copy, ())"),
        ("candidates", "def _go(copy, union): return union.__args__[0](copy, ())"),
        ("upgrade", "from typing import get_type_hints as types\ndef _go(of): return types(of)"),
        ("upgrade", "import typing\ndef _go(of): return typing.get_type_hints(of)"),
        ("upgrade", "def _go(of): return get_args(of)"),
        ("upgrade", "import inspect"),
        ("upgrade", "def _go(release, copy): return type(release)(copy, ())"),
        ("upgrade", "def _go(release, copy): return release.__class__(copy, ())"),
        ("upgrade", "def _go(candidate, copy): return replace(candidate.release, copy=copy)"),
        ("upgrade", "def _go(candidate, copy): return candidate.release._replace(copy=copy)"),
        ("upgrade", "def _go(release, copy): return release._make((copy, ()))"),
        ("upgrade", "from selfupdate.trust import *"),
        ("upgrade", "import os\nos.execv('/bin/true', ['true'])"),
        ("upgrade", "import os\nos.posix_spawnp('true', ['true'], {})"),
        ("upgrade", "import os\nos.fork()"),
        ("upgrade", "import os\nos.system('true')"),
        ("upgrade", "import os\nos.popen('true')"),
        ("upgrade", "import os as system\nsystem.execv('/bin/true', ['true'])"),
        ("upgrade", "from os import execv"),
        ("upgrade", "from os import *"),
        ("upgrade", "import os\ngetattr(os, 'exec' + 'v')('/bin/true', ['true'])"),
        ("upgrade", "import os\ngetattr(os, 'system')('true')"),
        ("upgrade", "import sys\nsys.modules['os'].system('true')"),
        ("upgrade", "from sys import modules"),
        ("upgrade", "import os\nos.__dict__['system']('true')"),
        ("upgrade", "import os\nvars(os)['system']('true')"),
        ("upgrade", "import os\nvars()['os'].system('true')"),
        ("upgrade", "import subprocess\nsubprocess.run(['true'])"),
        ("posix", "def also(): subprocess.run(['true'])"),
        ("posix", "from subprocess import Popen"),
        ("posix", "def also(): os.posix_spawn('/bin/true', ['true'], {})"),
        ("upgrade", "from selfupdate.posix import spawn"),
        ("upgrade", "from selfupdate import system\nsystem.start_piped(['true'], {}, '.', stdin=0, fds=[], mark='')"),
        ("upgrade", "from selfupdate import launch\nlaunch.Child(1.0).start(['true'], {}, {}, [], 0)"),
        ("system", "from selfupdate.posix import spawn as go"),
        ("upgrade", "from selfupdate.process import spawn"),
        ("upgrade", "from selfupdate import process as other"),
        ("upgrade", "from selfupdate import process\ngo = process.capture"),
        ("candidates", "def also(path): return process.capture([path], {}, path)"),
        ("upgrade", "from . import process"),
        ("windows", "def also(): subprocess.run(['true'])"),
        ("win32", "def also(): _kernel.CreateProcessW(None)"),
        ("upgrade", "import pty"),
        ("upgrade", "import ctypes"),
        ("upgrade", "import runpy"),
        ("upgrade", "import importlib.util"),
        ("upgrade", "def late():\n    import multiprocessing"),
        ("upgrade", "eval('1')"),
        ("upgrade", "exec('x = 1')"),
        ("upgrade", "__import__('os')"),
        ("upgrade", "compile('1', '', 'eval')"),
    ],
)
def test_the_checker_finds_a_way_around(module: str, statement: str) -> None:
    """Each way to make a release, or to start a program, that a change could bring in is found."""
    assert _is_proved({**SOURCE, module: f"{SOURCE[module]}\npass\n"})
    assert not _is_proved({**SOURCE, module: f"{SOURCE[module]}\n{statement}\n"})


@pytest.mark.parametrize(("module", "name"), [("posix", "os.posix_spawn("), ("candidates", "process.capture(")])
def test_the_checker_finds_what_has_gone(module: str, name: str) -> None:
    """A list that is longer than the source is wrong, too: it would let something in."""
    assert not _is_proved({**SOURCE, module: SOURCE[module].replace(name, "nothing(")})


def test_a_release_does_not_change() -> None:
    """What was verified can't be exchanged behind its proof."""
    copy = Store(Path("/nonexistent"), 1)
    release = Release(copy, ())  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        release.copy = copy  # type: ignore[assignment,misc]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Make a store of releases."""
    (tmp_path / "state").mkdir(mode=0o700)
    store = Store(tmp_path / "state", 10000)
    store.open()
    return store


@pytest.fixture
def candidate(tmp_path: Path) -> Path:
    """Make a program that leaves a marker when it is executed."""
    (tmp_path / "upgrades").mkdir(mode=0o700)
    return write_program(tmp_path / "upgrades" / "app", f"#!/bin/sh\n: > {tmp_path / 'ran'}\necho 2.0.0\n".encode())


@pytest.fixture
def ask(tmp_path: Path, store: Store) -> Iterator[Callable[[Any], versions.Version]]:
    """Ask whatever it is for its version."""
    stop_out, stop_in = socket.socketpair()
    given = settings.parse(["-insecure-allow-unsigned"], {"HOME": "/"})
    scanner = Scanner(
        tmp_path / "upgrades",
        store,
        Trust(given, store, stop_out.fileno()),
        running=versions.parse("1.0.0"),
        running_sha256=lambda: None,
        allow=None,
        floor=lambda: None,
        fault_of=Journal(tmp_path / "journal").fault_of,
        needed=lambda: None,
        stop_fd=stop_out.fileno(),
        limits=given.limits,
    )
    with stop_out, stop_in:
        yield scanner._ask  # noqa: SLF001 - what executes candidates is private


@pytest.mark.parametrize("what", ["path", "name", "copy"])
def test_what_is_no_release_is_not_asked(
    tmp_path: Path, store: Store, candidate: Path, ask: Callable[[Any], versions.Version], what: str
) -> None:
    """Neither a path nor a private copy that nobody verified is executed: only a release is."""
    unverified: Any = {"path": candidate, "name": str(candidate), "copy": store.stage(candidate)}[what]
    with pytest.raises((AssertionError, AttributeError, TypeError)):
        ask(unverified)
    assert not (tmp_path / "ran").exists()
    assert str(ask(Release(store.stage(candidate), ()))) == "2.0.0"
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("what", ["path", "name", "copy"])
def test_what_is_no_release_is_not_started(store: Store, candidate: Path, what: str) -> None:
    """The same for a successor, which is not even prepared with anything else."""
    unverified: Any = {"path": candidate, "name": str(candidate), "copy": store.stage(candidate)}[what]
    given = settings.parse([], {"HOME": "/"})
    addresses = ([parse_address("localhost:0")], parse_address("localhost:0"))
    Started(Release(store.stage(candidate), ()), "2.0.0", given, *addresses)
    with pytest.raises((AssertionError, AttributeError, TypeError)):
        Started(unverified, "2.0.0", given, *addresses)
