"""`agentops graphs` lists the graphs that can be run from here, `agentops graph draw` shows one as a picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentops.errors import UsageError

if TYPE_CHECKING:
    from agentops.drawing import Shape

_COLOURS = {"line": "dim", "choice": "cyan", "box": "dim", "name": "bold", "group": "magenta"}
_NARROWEST, _WIDEST = 40, 160


def register(app: typer.Typer) -> None:
    app.command("graphs")(graphs)
    group = typer.Typer(help="One graph: its picture.", rich_markup_mode=None, no_args_is_help=True)
    group.callback()(_group)  # without one, a group of a single verb would be that verb
    group.command("draw")(draw)
    app.add_typer(group, name="graph")


def _group() -> None:
    pass


def names(incomplete: str) -> list[str]:
    """Names of graphs for the shell's completion, which must stay silent whatever is wrong here."""
    from agentops.errors import AgentOpsError
    from agentops.project import list_graphs

    try:
        return [one.name for one in list_graphs() if not one.hidden and one.name.startswith(incomplete)]
    except (AgentOpsError, OSError):
        return []


def graphs(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False) -> None:
    """List the graphs of the current folder and those that come with the package."""
    from agentops.cli.render import clean
    from agentops.project import as_plain, find_project, list_graphs

    found = list_graphs()
    if as_json:
        print(json.dumps([as_plain(one) for one in found], indent=2))
        return
    wide = max(len(one.name) for one in found)
    sources = list(dict.fromkeys(one.source if one.source == "package" else _origin(one.source) for one in found))
    for source in sources:
        if len(sources) > 1 or source != "package":
            print(clean(f"{'the package' if source == 'package' else source}:"))
        for one in found:
            if source != ("package" if one.source == "package" else _origin(one.source)):
                continue
            note = f"not to be loaded: {one.problem}" if one.problem else one.about
            hidden = "hidden by the graph of this name above; " if one.hidden else ""
            print(clean(f"  {one.name:{wide}}  {hidden}{note}".rstrip()))
    project = find_project()
    if project is not None and project.unused:
        print(clean(f"not used here, of {project.manifest.name}: {', '.join(project.unused)}"), file=sys.stderr)
    if project is not None and (lacking := project.missing()):
        print(clean(f"not installed, of {project.manifest.name}: {', '.join(lacking)}"), file=sys.stderr)


def _origin(source: str) -> str:
    """A manifest as it is, a graph's file by its folder."""
    path = Path(source)
    shown = path if path.suffix == ".json" else path.parent
    return str(shown.relative_to(Path.cwd())) if shown.is_relative_to(Path.cwd()) and shown != Path.cwd() else str(shown)


def draw(
    graph: Annotated[
        str, typer.Argument(help="A graph's name (see: agentops graphs) or path/to/file.py:attribute.", autocompletion=names)
    ],
    mermaid: Annotated[bool, typer.Option("--mermaid", help="Print Mermaid, which GitHub and other pages show.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write to this file: .txt, .mmd for Mermaid, or into a .md page between its marks."),
    ] = None,
    width: Annotated[int | None, typer.Option(help="Columns to draw in. Default: those of the terminal.", min=20)] = None,
) -> None:
    """Draw a graph with its subgraphs: in the terminal, or as Mermaid."""
    from agentops.drawing import draw as drawn
    from agentops.drawing import mermaid as as_mermaid
    from agentops.drawing import plain
    from agentops.graph import load_graph

    if output is not None and output.suffix not in (".mmd", ".txt", ".md"):
        raise UsageError(f"a picture cannot be written to {output}", hint="name a file that ends in .txt, .mmd or .md")
    loaded = load_graph(graph)
    shape = shape_of(loaded.compiled)
    if output is not None and output.suffix == ".md":
        _put(_pictured(output, loaded.name, as_mermaid(shape)), output)
        return
    if mermaid or (output and output.suffix == ".mmd"):
        _put(as_mermaid(shape) + "\n", output)
        return
    lines = drawn(shape, width or _columns())
    if output or not sys.stdout.isatty():
        _put(f"{plain(lines)}\n\n{_legend(shape)}\n", output)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for line in lines:
        console.print(
            Text.assemble(*((text, _COLOURS[style] if style else "") for text, style in line)), no_wrap=True, crop=False
        )
    console.print(Text("\n" + _legend(shape), style="dim"))


def _columns() -> int:
    import shutil

    return max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size((100, 24)).columns))


def _put(text: str, output: Path | None) -> None:
    if output is None:
        print(text, end="")
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror}", hint="name a file in a folder that is there") from error


def _pictured(page: Path, name: str, picture: str) -> str:
    """The text of a page with the picture of a graph between the marks that the page has for it."""
    begin, end = f"<!-- picture of {name} -->", "<!-- end of picture -->"
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{page} cannot be read: {error}", hint="make it first, with marks for the picture") from error
    before, _, rest = text.partition(begin + "\n")
    _, found, after = rest.partition(end)
    if not found:
        raise UsageError(f"{page} has no marks for a picture of {name}", hint=f"write a line '{begin}' and one '{end}' into it")
    return f"{before}{begin}\n```mermaid\n{picture}\n```\n{end}{after}"


def _legend(shape: Shape) -> str:
    said = ["● start", "◉ end"]
    if any(edge.choice for one in _all(shape) for edge in one.edges):
        said += ["─ always", "╌ one of these"]
    return "   ".join(said)


def _all(shape: Shape) -> Iterable[Shape]:
    yield shape
    for inner in shape.inner.values():
        yield from _all(inner)


def shape_of(compiled: Any) -> Shape:
    """What there is to draw of a compiled graph, subgraphs included, also those that a node calls by itself."""
    from langgraph.pregel import Pregel

    from agentops.cli.render import clean
    from agentops.drawing import Edge, Shape

    inner = {name: shape_of(graph) for name, graph in compiled.get_subgraphs() if isinstance(graph, Pregel)}
    picture = compiled.get_graph()
    nodes = {name: clean(node.name) for name, node in picture.nodes.items()}
    edges = [
        Edge(edge.source, edge.target, edge.conditional, clean(str(edge.data)) if edge.data not in (None, edge.target) else "")
        for edge in picture.edges
    ]
    order = {name: number for number, name in enumerate(nodes)}
    edges.sort(key=lambda edge: (order[edge.source], order[edge.target]))
    return Shape(nodes, tuple(edges), inner={name: one for name, one in inner.items() if name in nodes})
