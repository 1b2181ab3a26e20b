"""`agentops init`: a small project of the user's own, which runs and whose test passes before anything is changed in it."""

from __future__ import annotations

import importlib.util
import keyword
import re
from pathlib import Path
from typing import Annotated

import typer

from agentops.errors import UsageError

QUESTION = "When does the library open on Saturday?"
_SUFFIX = ".template"
"""Ends the names of Python files in the template, which are not modules of this package."""


def register(app: typer.Typer) -> None:
    app.command("init")(init)


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make; it may be there if nothing is in it.")],
    name: Annotated[str | None, typer.Option("--name", help="Name of the graph. Default: that of the folder.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Add what is missing to a folder with files; none is changed.")] = False,
) -> None:
    """Make a small project. It has a graph, a tool, prompts, and a test that needs no model."""
    from agentops.cli.render import clean

    graph = _checked(name, folder) if name is not None else _from_folder(folder)
    made, kept = make_project(folder, graph, force=force)
    for path in made:
        print(clean(f"  made  {folder / path}"))
    for path in kept:
        print(clean(f"  kept  {folder / path}"))
    print(clean(f'\nNext:\n  cd {_quoted(folder)}\n  agentops run {graph} "{QUESTION}"\n  pytest\n  agentops graph draw {graph}'))


def make_project(folder: Path, name: str, *, force: bool = False) -> tuple[list[Path], list[Path]]:
    """Writes the project's files into a folder; those that are there stay as they are. Returns what was made and what kept,
    counted from the folder.

    Raises:
        UsageError: the folder has files and `force` is not given, or it cannot be written.
    """
    template = Path(__file__).resolve().parents[1] / "templates" / "project"
    made, kept = [], []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A repository without a commit, or an environment, is no project yet.
        if not force and (there := sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))):
            raise UsageError(
                f"{folder} is not empty: it has {', '.join(there[:3])}{' and more' if len(there) > 3 else ''}",
                hint="name another folder, or add what is missing with --force; no file is ever changed",
            )
        for source in sorted(path for path in template.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
            path = Path(str(source.relative_to(template)).removesuffix(_SUFFIX).replace("NAME", name))
            goal = folder / path
            goal.parent.mkdir(parents=True, exist_ok=True)
            text = source.read_text(encoding="utf-8").replace("{{name}}", name)
            try:
                with goal.open("x", encoding="utf-8") as file:
                    file.write(text)
                made.append(path)
            except FileExistsError:
                kept.append(path)
    except OSError as error:
        raise UsageError(f"{error.filename or folder} cannot be made: {error.strerror}", hint="name another folder") from error
    return made, kept


def _from_folder(folder: Path) -> str:
    """The folder's name as that of a module, where it can be one."""
    name = re.sub(r"\W+", "_", folder.absolute().name, flags=re.ASCII).strip("_").lower()
    return name if _fault(name, folder) is None else "agent"


def _checked(name: str, folder: Path) -> str:
    if fault := _fault(name, folder):
        raise UsageError(f"a graph cannot be called '{name}': {fault}", hint="use letters, digits and '_', as in --name my_agent")
    return name


def _fault(name: str, folder: Path) -> str | None:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or keyword.iskeyword(name):
        return "it must be the name of a Python module"
    if name == "tools" or name.startswith("test_") or name == "conftest":
        return "the project has another file of that name"
    spec = importlib.util.find_spec(name)
    if spec is not None and (spec.origin is None or Path(spec.origin).parent != folder.absolute()):
        return "there is a module of that name, which it would hide"
    return None


def _quoted(folder: Path) -> str:
    import shlex

    return shlex.quote(str(folder))
