"""Projects: the folder a user works in, the graphs that it has, and what `langgraph.json` says of them.

A name is looked up in the current folder first and among the graphs of the package after that. In a folder, the nearest
`langgraph.json` (here or in a parent) says what the graphs are; without one they are `NAME.py` and `graphs/NAME.py`.
Nothing is imported here and no code of the project runs, so that names can be listed and completed at once.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from agentops.errors import GraphBroken, GraphNotFound

MANIFEST = "langgraph.json"
_USED = {"$schema", "graphs", "dependencies", "env"}
_JAVASCRIPT = (".js", ".mjs", ".cjs", ".jsx", ".ts", ".mts", ".cts", ".tsx")
_VARIABLE = re.compile(
    r"""[ \t]*(?:export[ \t]+)?(?P<name>[A-Za-z_][\w.]*)[ \t]*=[ \t]*
    (?: '(?P<plain>[^']*)' | "(?P<quoted>(?:\\.|[^"\\])*)" | (?P<bare>(?!['"])[^\n]*?) )
    [ \t]*(?:(?<![^\s'"=])\#[^\n]*)?(?:\n|\Z)""",
    re.VERBOSE | re.DOTALL,
)
_NOTHING = re.compile(r"[ \t]*(?:#[^\n]*)?(?:\n|\Z)")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}


@dataclass(frozen=True, slots=True)
class Target:
    """Where a graph's object is: an attribute of a file, or of a module that is looked for in `folders`.

    `reference` finds the same graph from every folder. `root` is the project's folder, `prompts` the one with its prompts.
    """

    name: str
    reference: str
    attribute: str
    root: Path
    file: Path | None = None
    module: str = ""
    folders: tuple[Path, ...] = ()
    about: str = ""
    project: Project | None = field(default=None, compare=False)

    def prompts(self, file: Path) -> Path:
        """The folder of prompts for a graph that `file` defines: beside it, else the project's."""
        beside = file.parent / "prompts"
        return beside if beside.is_dir() or not (self.root / "prompts").is_dir() else self.root / "prompts"


@dataclass(frozen=True, slots=True)
class Project:
    """What a `langgraph.json` says. `graphs` holds what it maps each name to, `unused` the keys that mean nothing here."""

    manifest: Path
    graphs: Mapping[str, str]
    about: Mapping[str, str]
    folders: tuple[Path, ...]
    packages: tuple[str, ...]
    env: Path | Mapping[str, str] | None
    unused: tuple[str, ...]

    @property
    def root(self) -> Path:
        return self.manifest.parent

    def target(self, name: str) -> Target:
        """
        Raises:
            GraphNotFound: no such graph, or it is not a Python object.
        """
        if name not in self.graphs:
            raise GraphNotFound(
                f"{self.manifest} has no graph '{name}'", hint=f"it has: {', '.join(self.graphs)}" if self.graphs else ""
            )
        place, _, attribute = self.graphs[name].rpartition(":")
        if place.endswith(_JAVASCRIPT):
            raise GraphNotFound(f"the graph '{name}' is JavaScript ({place})", hint="only graphs in Python are run here")
        file = (self.root / place).absolute() if _is_path(place) else None
        if file is not None and not file.is_file():
            raise GraphNotFound(
                f"there is no file {place}, where {self.manifest} has the graph '{name}'",
                hint=f'mend the path under "graphs"; it counts from {self.root}',
            )
        return Target(
            name=name,
            reference=f"{self.manifest}:{name}",
            attribute=attribute,
            root=self.root,
            file=file,
            module="" if file else place,
            folders=self.folders,
            about=self.about.get(name, ""),
            project=self,
        )

    def missing(self) -> list[str]:
        """The packages under `dependencies` that are not installed, or in another version than is asked for."""
        lacking = []
        for line in self.packages:
            try:
                wanted = Requirement(line)
            except InvalidRequirement:
                continue
            if wanted.marker is not None and not wanted.marker.evaluate():
                continue
            try:
                there = importlib.metadata.version(wanted.name)
            except importlib.metadata.PackageNotFoundError:
                lacking.append(line)
            else:
                if not wanted.specifier.contains(there, prereleases=True):
                    lacking.append(line)
        return lacking

    def set_environment(self) -> None:
        """Sets the variables of `env` for this process, but for those that are set already. Values are shown nowhere.

        Raises:
            GraphBroken: the file is not there, or a line of it is none.
        """
        values = _read_env(self.env, self.manifest) if isinstance(self.env, Path) else self.env or {}
        for name, value in values.items():
            os.environ.setdefault(name, value)


@dataclass(frozen=True, slots=True)
class Listed:
    """A graph that can be run from a folder. `source` is "package" or a path; a `hidden` one has another of its name before
    it. `problem` says why it cannot be loaded, where that is known without running it."""

    name: str
    about: str
    source: str
    reference: str
    hidden: bool = False
    problem: str = ""


def package_graphs() -> dict[str, Path]:
    """Names and files of the graphs that come with the package."""
    spec = importlib.util.find_spec("graphs")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.py") if not file.stem.startswith("_"))
    return {file.stem: file for file in files}


def find_project(folder: Path | None = None) -> Project | None:
    """The project of the nearest `langgraph.json`, in the folder (default: the current one) or a parent.

    Raises:
        GraphBroken: it cannot be read.
    """
    here = (folder or Path.cwd()).absolute()
    for place in (here, *here.parents):
        if (place / MANIFEST).is_file():
            return read_manifest(place / MANIFEST)
    return None


def locate(reference: str, *, folder: Path | None = None, recorded: bool = False) -> Target:
    """What a reference means: a name, `path/to/file.py:attribute`, or `path/to/langgraph.json:name`.

    What is on record with a run (`recorded`) means the same from everywhere: a plain name is one of the package's.

    Raises:
        GraphNotFound: no such name or file.  GraphBroken: a `langgraph.json` that cannot be read.
    """
    here = (folder or Path.cwd()).absolute()
    path, _, attribute = reference.partition(":")
    if path.endswith(".json"):
        manifest = _absolute(path, here)
        if not manifest.is_file():
            raise GraphNotFound(f"there is no file {path}", hint="name a graph as path/to/langgraph.json:name")
        return read_manifest(manifest).target(attribute)
    if ".py" in reference or "/" in reference:
        file = _absolute(path, here)
        if not file.is_file():
            raise GraphNotFound(f"there is no file {path}", hint="name a graph as path/to/file.py:attribute")
        return _of_file(file, attribute or "graph")
    shipped = package_graphs()
    if not recorded:
        project = find_project(here)
        if project is not None and reference in project.graphs:
            return project.target(reference)
        if project is None and (found := _in_folder(reference, here, shipped)):
            return found
    if reference in shipped:
        file = shipped[reference]
        return Target(reference, reference, "graph", file.parent, file=file, module=f"graphs.{reference}")
    known = list(dict.fromkeys(one.name for one in list_graphs(here))) if not recorded else list(shipped)
    stray = here / f"{reference}.py"
    more = (
        f"{stray.name} is here and defines no 'graph'" if stray.is_file() else "a graph of your own is path/to/file.py:attribute"
    )
    raise GraphNotFound(f"no graph is called '{reference}'", hint=f"there are: {', '.join(known)}; {more}")


def list_graphs(folder: Path | None = None) -> list[Listed]:
    """All graphs that can be named in a folder, its own first.

    Raises:
        GraphBroken: a `langgraph.json` that cannot be read.
    """
    here = (folder or Path.cwd()).absolute()
    shipped = package_graphs()
    project = find_project(here)
    found: list[Listed] = []
    if project is not None:
        for name in project.graphs:
            try:
                target = project.target(name)
                file = target.file or _module_file(target)
                problem = "" if file else f"there is no module {target.module} in its folders"
                about = target.about or (_about(file) if file else "")
            except GraphNotFound as error:
                about, problem = project.about.get(name, ""), str(error)
            found.append(Listed(name, about, str(project.manifest), f"{project.manifest}:{name}", problem=problem))
    else:
        for name, file in _files(here, shipped):
            twice = any(one.name == name for one in found)
            found.append(Listed(name, _about(file), str(file), f"{file}:graph", hidden=twice))
    taken = {one.name for one in found}
    return found + [Listed(name, _about(file), "package", name, hidden=name in taken) for name, file in shipped.items()]


def read_manifest(manifest: Path) -> Project:
    """
    Raises:
        GraphBroken: not JSON, or a key has a value of the wrong type, or a folder that it names is not there.
    """

    def off(what: str, hint: str, line: int | None = None) -> GraphBroken:
        place = f"{manifest}, line {line}" if line else str(manifest)
        return GraphBroken(f"{place}: {what}", file=str(manifest), line=line, hint=hint)

    try:
        tree = json.loads(manifest.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise off(f"this is not JSON: {error.msg}", "mend that line", error.lineno) from error
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise off(f"it cannot be read: {error}", "it must be a JSON file") from error
    if not isinstance(tree, dict):
        raise off("it must hold a JSON object", '{"graphs": {"agent": "./agent.py:graph"}}')

    entries = tree.get("graphs", {})
    if not isinstance(entries, dict):
        raise off('"graphs" must be an object', '"graphs": {"agent": "./agent.py:graph"}')
    graphs, about = {}, {}
    for name, value in entries.items():
        place = value.get("path") if isinstance(value, dict) else value
        if not isinstance(place, str) or not all(place.rpartition(":")[::2]):
            raise off(f"the graph '{name}' has no place", f'write "{name}": "./path/to/file.py:graph" or "package.module:graph"')
        graphs[name] = place
        if isinstance(value, dict) and isinstance(value.get("description"), str):
            about[name] = value["description"]

    wanted = tree.get("dependencies", [])
    if not isinstance(wanted, list) or not all(isinstance(one, str) for one in wanted):
        raise off('"dependencies" must be a list of folders and package names', '"dependencies": ["."]')
    folders, packages = [manifest.parent], []
    for one in wanted:
        if not one.startswith((".", "/")):
            packages.append(one)
            continue
        place = Path(os.path.normpath(manifest.parent / one))
        if not place.is_dir():
            raise off(f'"dependencies" names the folder {one}, which is not there', f"it counts from {manifest.parent}")
        folders += [place, *([place / "src"] if (place / "src").is_dir() else [])]

    env = tree.get("env")
    variables: Path | dict[str, str] | None = None
    if isinstance(env, str) and env:
        variables = manifest.parent / env
    elif isinstance(env, dict):
        if odd := [name for name, value in env.items() if not isinstance(value, str | int | float) or "\0" in str(value)]:
            raise off(f'the variable {odd[0]} under "env" is not text', '"env": {"NAME": "value"}')
        variables = {name: json.dumps(value) if isinstance(value, bool) else str(value) for name, value in env.items()}
    elif env not in (None, ""):
        raise off('"env" must be a file or an object', '"env": ".env" or "env": {"NAME": "value"}')
    return Project(
        manifest=manifest,
        graphs=graphs,
        about=about,
        folders=tuple(dict.fromkeys(folders)),
        packages=tuple(packages),
        env=variables,
        unused=tuple(key for key in tree if key not in _USED),
    )


def _of_file(file: Path, attribute: str) -> Target:
    """A graph that was named by its file. What the project around it depends on can be imported all the same."""
    project = find_project(file.parent)
    root = project.root if project else file.parent.parent if file.parent.name == "graphs" else file.parent
    folders = (file.parent, *(project.folders if project else (root,)))
    reference = f"{file}:{attribute}"
    return Target(file.stem, reference, attribute, root, file, folders=tuple(dict.fromkeys(folders)), project=project)


def _in_folder(name: str, folder: Path, shipped: Mapping[str, Path]) -> Target | None:
    return next((_of_file(file, "graph") for found, file in _files(folder, shipped, name) if found == name), None)


def _files(folder: Path, shipped: Mapping[str, Path], name: str = "*") -> Iterator[tuple[str, Path]]:
    """Files of a folder that define `graph`, those of the package left out where the folder is its own checkout."""
    if name != "*" and not name.isidentifier():
        return
    own = {file.resolve() for file in shipped.values()}
    for file in (*sorted(folder.glob(f"{name}.py")), *sorted((folder / "graphs").glob(f"{name}.py"))):
        if not file.stem.startswith("_") and file.is_file() and file.resolve() not in own and _defines_graph(file):
            yield file.stem, file


def _defines_graph(file: Path) -> bool:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    if "graph" not in text:
        return False
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        # Found all the same, so that loading it tells what is wrong with it.
        return re.search(r"(?m)^(graph\s*[:=]|(async )?def graph\b)", text) is not None
    return any(_binds_graph(statement) for statement in tree.body)


def _binds_graph(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
        return statement.name == "graph"
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    named = [part for target in targets if target for part in ast.walk(target)]
    inner = [each for block in ("body", "orelse", "handlers", "finalbody") for each in getattr(statement, block, [])]
    if isinstance(statement, ast.ClassDef):
        return False
    return any(isinstance(part, ast.Name) and part.id == "graph" for part in named) or any(map(_binds_graph, inner))


def _module_file(target: Target) -> Path | None:
    """The file of a module in the project's folders, or of one that is installed; its packages are not imported."""
    path = Path(*target.module.split("."))
    for folder in target.folders:
        for file in (folder / path.with_suffix(".py"), folder / path / "__init__.py"):
            if file.is_file():
                return file
    try:
        spec = importlib.util.find_spec(target.module.partition(".")[0])
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin else None


def _about(file: Path) -> str:
    try:
        said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
        return ""
    return " ".join(said.partition("\n\n")[0].split()).partition(". ")[0].rstrip(".")


def _is_path(place: str) -> bool:
    return place.endswith(".py") or "/" in place


def _absolute(path: str, folder: Path) -> Path:
    return Path(os.path.normpath(folder / Path(path).expanduser()))


def _read_env(file: Path, manifest: Path) -> dict[str, str]:
    try:
        text = file.read_text(encoding="utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        why = "is not there" if isinstance(error, FileNotFoundError) else "cannot be read as text"
        example = file.with_name(file.name + ".example")
        mend = f"copy {example.name} to it and fill it in" if example.is_file() else f'make it, or take "env" out of {manifest}'
        raise GraphBroken(
            f"{file}, which holds the variables of {manifest}, {why}", file=str(file), line=None, hint=mend
        ) from None
    found: dict[str, str] = {}
    at = 0
    while at < len(text):
        if nothing := _NOTHING.match(text, at):
            at = nothing.end() if nothing.end() > at else len(text)
            continue
        one = _VARIABLE.match(text, at)
        if one is None or "\0" in one[0]:
            line = text.count("\n", 0, at) + 1
            raise GraphBroken(
                f"{file}, line {line}: this is no variable", file=str(file), line=line, hint="write each as NAME=value"
            )
        value = one["plain"] if one["plain"] is not None else one["bare"]
        if one["quoted"] is not None:
            value = re.sub(r"\\(.)", lambda escape: _ESCAPES.get(escape[1], escape[1]), one["quoted"], flags=re.DOTALL)
        found[one["name"]] = value
        at = one.end()
    return found


def as_plain(listed: Listed) -> dict[str, Any]:
    """The entry for JSON; what does not hold is left out."""
    plain = {name: getattr(listed, name) for name in ("name", "about", "source", "reference", "hidden", "problem")}
    return {name: value for name, value in plain.items() if value or name in ("name", "about")}
