"""The fault plugin: makes something go wrong in a named function of the program.

Its folder is on PYTHONPATH, so that Python imports this file before the program. The program itself has no
test hooks. The environment variable ``FAULT_PLAN`` is JSON, a list of faults (the names of functions come
from ``tests/faults/checkpoints.py``), each with

* ``at``: ``module:name`` or ``module:Class.name``, wrapped as soon as the module is imported;
* ``when``: ``before`` or ``after`` the call;
* ``do``: ``kill`` (SIGKILL to itself), ``abort``, ``slow`` (sleep ``seconds``), ``hold`` (write the file
  ``reached`` and wait until it is removed), or ``memory``, ``library``, ``files`` (raise what is raised when
  they are short);
* ``nth``: which matching call of the process, from 1 on. 0: every call;
* ``match``: optional regular expression, searched for in the arguments (a descriptor counts as the path of
  its file, bytes as Latin-1);
* ``command``: optional. The fault happens only in a process of this command (``watch``);
* ``fuse``: optional file. The fault happens only while it exists, and removes it.

A name that does not exist ends the process with 97. Otherwise a renamed function would look like a fault that
the program has survived.
"""

import errno
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import io
import json
import os
import re
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

NO_SUCH_NAME = 97

_ADVICE = "change its line in tests/faults/checkpoints.py"


def _give_up(message: str) -> None:
    os.write(2, f"fault plugin: {message}\n".encode())
    os._exit(NO_SUCH_NAME)


def _text(argument: object) -> str:
    if isinstance(argument, bytes):
        return argument.decode("latin-1")
    if isinstance(argument, int) and not isinstance(argument, bool):
        try:
            return os.readlink(f"/proc/self/fd/{argument}")  # noqa: PTH115 -- pathlib itself may be wrapped
        except OSError:
            return str(argument)
    if isinstance(argument, io.BytesIO):
        return argument.getvalue().decode("latin-1")
    return str(argument)


class Fault:
    """One fault, with the number of calls so far."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.module, _, self.name = plan["at"].partition(":")
        self._when = plan["when"]
        self._do = plan["do"]
        self._nth = plan.get("nth", 1)
        self._match = re.compile(plan["match"], re.DOTALL) if plan.get("match") else None
        self._command = plan.get("command")
        self._fuse = plan.get("fuse")
        self._reached = plan.get("reached", "")
        self._seconds = plan.get("seconds", 0.0)
        self._n = 0
        self._lock = threading.Lock()

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function with the fault before or after it."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            strikes = self._is_due(args)
            if strikes and self._when == "before":
                self._strike()
            try:
                return function(*args, **kwargs)
            finally:  # also after a call that fails
                if strikes and self._when == "after":
                    self._strike()

        return wrapped

    def _is_due(self, args: Sequence[object]) -> bool:
        if self._command and self._command not in sys.argv[1:2]:
            return False
        if self._match and not any(self._match.search(_text(a)) for a in args):
            return False
        with self._lock:
            self._n += 1
            return self._nth in (0, self._n)

    def _strike(self) -> None:
        if self._fuse:
            try:
                os.unlink(self._fuse)  # noqa: PTH108 -- pathlib itself may be wrapped
            except FileNotFoundError:
                return
        match self._do:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
            case "abort":
                os.abort()
            case "slow":
                time.sleep(self._seconds)
            case "hold":
                os.close(os.open(self._reached, os.O_CREAT | os.O_WRONLY))
                while os.path.exists(self._reached):  # noqa: PTH110
                    time.sleep(0.01)
            case "memory":
                raise MemoryError
            case "library":
                raise ImportError("libgomp.so.1: cannot open shared object file")
            case "files":
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            case other:
                _give_up(f"no such fault: {other}")

    def install(self, module: ModuleType) -> None:
        """Wraps the function."""
        owner: Any = module
        *path, name = self.name.split(".")
        if self.module == "sqlite3" and path == ["Connection"]:
            owner, path = _own_connection(), []
        for part in path:
            owner = getattr(owner, part, None)
        found = inspect.getattr_static(owner, name, None) if owner is not None else None
        if isinstance(found, (classmethod, staticmethod)):
            setattr(owner, name, type(found)(self.wrap(found.__func__)))
        elif callable(found) and not inspect.isgeneratorfunction(found):
            setattr(owner, name, self.wrap(found))
        else:
            _give_up(f"{self.module} has no function {self.name} any more: {_ADVICE}")


def _own_connection() -> type[sqlite3.Connection]:
    """A subclass of SQLite's connection that can be changed, and that `sqlite3.connect` makes from now on."""

    class Connection(sqlite3.Connection):
        pass

    sqlite3.connect = functools.partial(sqlite3.connect, factory=Connection)  # type: ignore[assignment]
    return Connection


class _Loader(importlib.abc.Loader):
    """Loads a module with its own loader, then installs the faults."""

    def __init__(self, loader: importlib.abc.Loader, faults: list[Fault]) -> None:
        self._loader = loader
        self._faults = faults

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        for fault in self._faults:
            fault.install(module)

    def __getattr__(self, name: str) -> Any:  # importlib.resources and runpy ask the real loader
        return getattr(self._loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, faults: dict[str, list[Fault]]) -> None:
        self._faults = faults

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        faults = self._faults.get(fullname)
        if faults is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            _give_up(f"there is no module {fullname} any more: {_ADVICE}")
            return None
        spec.loader = _Loader(spec.loader, faults)
        return spec


def _install(plan: str) -> None:
    faults: dict[str, list[Fault]] = {}
    for item in json.loads(plan):
        fault = Fault(item)
        faults.setdefault(fault.module, []).append(fault)
    ours = {name: found for name, found in faults.items() if name.split(".")[0] == "rbc_edge"}
    for name in ours:
        # Checked now, because the process may never import the module.
        top = Path(importlib.util.find_spec("rbc_edge").submodule_search_locations[0])  # type: ignore[union-attr,index]
        if not top.joinpath(*name.split(".")[1:]).with_suffix(".py").exists():
            _give_up(f"there is no module {name} any more: {_ADVICE}")
    for name, found in faults.items():
        if name not in ours:
            for fault in found:
                fault.install(importlib.import_module(name))
    sys.meta_path.insert(0, _Finder(ours))


if os.environ.get("FAULT_PLAN"):
    _install(os.environ["FAULT_PLAN"])
