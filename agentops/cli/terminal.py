"""`agentops tui`: the screens for the record, in this terminal or, read only, in a browser on this machine."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated

import typer

from agentops.errors import UsageError

if TYPE_CHECKING:
    from aiohttp import web


def register(app: typer.Typer) -> None:
    app.command("tui")(tui)


def tui(
    screen: Annotated[
        str, typer.Argument(metavar="[SCREEN]", help="runs, inbox, evals, engine or run/ID; else the last one.")
    ] = "",
    serve: Annotated[bool, typer.Option("--serve", help="Show it in a browser on this machine instead, read only.")] = False,
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port of --serve.")] = 8_420,
    read_only: Annotated[bool, typer.Option("--read-only", help="Look at everything, start and stop nothing.")] = False,
    theme: Annotated[str, typer.Option(help="Colours: textual-dark, textual-light, nord, gruvbox, ...")] = "",
) -> None:
    """Open the screens: watch runs, read traces, answer what runs ask, look at experiments and the engine."""
    from agentops.settings import load_settings
    from agentops.store import open_store
    from agentops.store.pages import open_pages
    from agentops.tracer.drain import catch_up

    settings = load_settings()
    browser = "TEXTUAL_DRIVER" in os.environ  # a process that --serve has started: its terminal is a page
    dumb = os.environ.get("TERM", "dumb") == "dumb" or not (sys.stdout.isatty() and sys.stdin.isatty())
    if dumb and not serve and not browser:
        raise UsageError("the screens need a terminal", hint="without one: agentops runs, agentops show, agentops inbox")
    # Opened before the screens are, so that what is wrong with it is said in one line.
    if read_only or serve:
        open_pages(settings, wait_s=settings.record.lock_timeout_s).close()
    else:
        catch_up(settings)
        open_store(settings).close()
    if serve:
        _serve(screen, theme, port)
        return
    from evals.metrics.registry import ENTRIES
    from tui.app import TerminalApp
    from tui.screens.evals import Scale

    app = TerminalApp(
        settings,
        open_at=screen,
        read_only=read_only,
        theme=theme,
        catch_up=lambda: catch_up(settings),
        interval=_interval,
        scales={name: Scale(one.low, one.high if math.isfinite(one.high) else None, one.better) for name, one in ENTRIES.items()},
    )
    app.run()


def _interval(name: str, values: Sequence[float], threads: Sequence[str]) -> tuple[float, float] | None:
    return _estimated(name, tuple(values), tuple(threads))


@lru_cache(maxsize=128)
def _estimated(name: str, values: tuple[float, ...], threads: tuple[str, ...]) -> tuple[float, float] | None:
    from evals.metrics.registry import ENTRIES
    from evals.report.build import THUMBS
    from evals.statistics import estimate

    found = estimate(values, threads, binary=name == THUMBS or (name in ENTRIES and ENTRIES[name].binary))
    return None if found.low is None or found.high is None else (found.low, found.high)


def _serve(screen: str, theme: str, port: int) -> None:
    """Serves the screens on loopback. Each visitor has a process of its own, which only looks.

    Raises:
        UsageError: what serves them is not installed.
    """
    try:
        from aiohttp import web
        from textual_serve.server import Server
    except ImportError:
        raise UsageError("nothing that serves the screens is installed", hint="pip install 'agentops-runtime[serve]'") from None

    here = (f"127.0.0.1:{port}", f"localhost:{port}")

    @web.middleware
    async def only_from_here(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        # Any page that the user's browser shows may call this port: it must not read the record through that.
        origin = request.headers.get("Origin")
        if request.host not in here or (origin is not None and origin.removeprefix("http://") not in here):
            raise web.HTTPForbidden(text="only pages of this server may be here")
        return await handler(request)

    class Loopback(Server):
        async def _make_app(self) -> web.Application:
            app = await super()._make_app()
            app.middlewares.append(only_from_here)
            return app

    words = [sys.executable, "-m", "agentops", "tui", *([screen] if screen else []), "--read-only"]
    command = shlex.join([*words, "--theme", theme] if theme else words)
    print(f"the screens, read only: http://127.0.0.1:{port}  (Ctrl-C ends it)", file=sys.stderr)
    Loopback(command, host="127.0.0.1", port=port, title="AgentOps").serve()
