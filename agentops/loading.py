"""Loading: imports a user's Python file or module and gets the graph out of it.

Every form is taken that LangGraph's own server takes: a compiled graph, a builder, or a function that makes one, plain or
asynchronous, with nothing, a config or a runtime as argument. A file gets a stable private module name, so that types it
defines mean the same in every process that reads its checkpoints. What goes wrong is told with the user's own line.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import linecache
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from langgraph.graph import StateGraph
from langgraph.pregel import Pregel
from langgraph.store.base import BaseStore
from langgraph.store.memory import InMemoryStore

from agentops.errors import GraphBroken, GraphNotFound
from agentops.project import Project, Target

_lock = threading.RLock()
_folders: set[Path] = set()
"""Folders that users' modules were imported from."""
_entered = contextlib.ExitStack()
atexit.register(_entered.close)


@dataclass(frozen=True, slots=True)
class FactoryRuntime:
    """What a factory of graphs that asks for a runtime is given; LangGraph's `ServerRuntime` has the same attributes."""

    access_context: str = "threads.create_run"
    user: None = None
    context: None = None
    store: BaseStore = field(default_factory=InMemoryStore)

    @property
    def execution_runtime(self) -> FactoryRuntime:
        return self

    def ensure_user(self) -> None:
        raise PermissionError("there are no users here; who runs a graph is its user")


def import_graph(target: Target) -> tuple[Any, Path]:
    """The compiled graph of a target, and the file that defines it.

    Raises:
        GraphNotFound: there is no such module or attribute, or it is no graph.
        GraphBroken: it raises when imported or made; file, line and text of the line are shown.
    """
    if target.project is not None:
        target.project.set_environment()
    with _lock, _importable(target.folders):
        module = _import_module(target) if target.module else _import_file(target)
        file = Path(str(module.__file__ or target.root))
        try:
            found = getattr(module, target.attribute)
        except AttributeError:
            graphs = [key for key, value in vars(module).items() if isinstance(value, StateGraph | Pregel)]
            hint = f"it has: {', '.join(graphs)}" if graphs else "the file defines no graph"
            place = target.reference if target.project else target.reference.rpartition(":")[0] or target.name
            raise GraphNotFound(f"{place} has no '{target.attribute}'", hint=hint) from None
        try:
            return compile_graph(_made(found, target.attribute), f"'{target.attribute}'"), file
        except GraphNotFound:
            raise
        except Exception as error:
            raise _broken_in(error, file, target) from error


def compile_graph(graph: Any, what: str) -> Any:
    """
    Raises:
        GraphNotFound: it is neither a graph nor a builder of one.
    """
    if isinstance(graph, StateGraph):
        return graph.compile()
    if isinstance(graph, Pregel):
        return graph
    raise GraphNotFound(
        f"{what} is a {type(graph).__name__}, not a LangGraph graph", hint="give a StateGraph or what its compile() returns"
    )


def _made(found: Any, name: str) -> Any:
    """The graph that a factory makes; anything else as it is."""
    if callable(found) and not isinstance(found, StateGraph | Pregel):
        found = found(*_arguments(found, name))
    if inspect.isawaitable(found):
        found = _awaited(found)
    if hasattr(found, "__aenter__") and not hasattr(found, "__enter__"):
        raise GraphNotFound(
            f"'{name}' gives an asynchronous context manager, which is not run here",
            hint="give a function that returns the graph, and open in its nodes what they need",
        )
    if hasattr(found, "__enter__") and not isinstance(found, StateGraph | Pregel):
        found = _entered.enter_context(found)
    return found


def _arguments(factory: Any, name: str) -> list[Any]:
    """A config, a runtime, or both, as the annotations of the factory's required parameters say."""
    given: list[Any] = []
    for parameter in inspect.signature(factory).parameters.values():
        if parameter.default is not parameter.empty or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        untyped = parameter.annotation is parameter.empty
        wants_runtime = "Runtime" in str(parameter.annotation) or (untyped and parameter.name == "runtime")
        given.append(FactoryRuntime() if wants_runtime else {"configurable": {}})
    if len(given) > 2:
        raise GraphNotFound(
            f"'{name}' wants {len(given)} arguments", hint="a function that makes a graph takes none, a config or a runtime"
        )
    return given


def _awaited(awaitable: Any) -> Any:
    """On a loop of its own, since the caller's may be the one that waits here."""

    async def wait() -> Any:
        return await awaitable

    with ThreadPoolExecutor(1) as one:
        return one.submit(asyncio.run, wait()).result()


@contextlib.contextmanager
def _importable(folders: Sequence[Path]) -> Iterator[None]:
    """First in the search path while a graph is imported, last in it from then on: nodes import too, when they run."""
    for folder in folders:
        _make_way(_modules_of(folder), folder)
    names = [str(folder) for folder in folders]
    sys.path[:0] = names
    try:
        yield
    finally:
        for name in names:
            sys.path.remove(name)
        sys.path.extend(name for name in names if name not in sys.path)
        _folders.update(folders)


def _modules_of(folder: Path) -> set[str]:
    return {child.stem for child in folder.iterdir() if child.suffix == ".py" or child.is_dir()}


def _make_way(names: Iterable[str], folder: Path) -> None:
    """Forgets modules of these names that another project has: its `tools.py` is not this one's."""
    taken = set(names)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in taken:
            continue
        file = Path(getattr(module, "__file__", None) or "/")
        if not file.is_relative_to(folder) and any(file.is_relative_to(other) for other in _folders):
            del sys.modules[name]


def _import_module(target: Target) -> ModuleType:
    if target.module.startswith("graphs.") and target.file:
        _make_way({"graphs"}, target.root)
    try:
        return importlib.import_module(target.module)
    except ModuleNotFoundError as error:
        if error.name and (target.module == error.name or target.module.startswith(f"{error.name}.")):
            looked = ", ".join(map(str, target.folders)) or "the installed packages"
            raise GraphNotFound(
                f"there is no module {target.module}, where {target.reference.rpartition(':')[0]} has the graph '{target.name}'",
                hint=f'looked in {looked}; other folders go under "dependencies"',
            ) from error
        raise _broken_in(error, target.root / "_", target) from error
    except SyntaxError as error:
        raise _broken(error, error.filename or target.module, error.lineno) from error
    except Exception as error:
        raise _broken_in(error, target.root / "_", target) from error


def _import_file(target: Target) -> ModuleType:
    file = target.file or target.root
    name = "agentops_graph_" + hashlib.blake2b(str(file).encode(), digest_size=8).hexdigest()
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise GraphNotFound(f"{file} is not a Python file", hint="name a graph as path/to/file.py:attribute")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        sys.modules.pop(name, None)
        raise _broken(error, error.filename or str(file), error.lineno) from error
    except Exception as error:
        sys.modules.pop(name, None)
        raise _broken_in(error, file, target) from error
    return module


def _broken_in(error: Exception, file: Path, target: Target) -> GraphBroken:
    """Where in the user's folders an error came from; the library's own frames say nothing to its user."""
    roots = (file.parent, *target.folders)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if any(Path(frame.filename).is_relative_to(root) for root in roots) and "site-packages" not in Path(frame.filename).parts
    ]
    place = frames[-1].filename if frames else str(file if file.is_file() else target.root)
    return _broken(error, place, frames[-1].lineno if frames else None, _lacking(error, target.project))


def _lacking(error: Exception, project: Project | None) -> str:
    """What to install where an import failed, as far as the project says."""
    if not isinstance(error, ImportError):
        return ""
    lacking = project.missing() if project else []
    if lacking and project:
        return f"{project.manifest.name} asks for what is not installed: pip install {' '.join(map(repr, lacking))}"
    return f"install what has the module {error.name} where agentops runs" if isinstance(error, ModuleNotFoundError) else ""


def _broken(error: Exception, file: str, line: int | None, hint: str = "") -> GraphBroken:
    linecache.checkcache(file)
    text = linecache.getline(file, line).rstrip() if line else ""
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    place = f"{file}, line {line}" if line else file
    shown = f"\n  {line} | {text}" if text else ""
    return GraphBroken(
        f"{place}: {type(error).__name__}: {said}{shown}",
        file=file,
        line=line,
        hint=hint or ("mend that line and run again" if line else "mend the file and run again"),
    )
