"""The terminal application: its screens, the thread that reads for them, the verbs it has started, and what it remembers.

It reads the record and acts by the verbs of the command line; it never loads the engine. `TerminalApp(settings).run()` shows it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

from textual import events
from textual.app import App, SystemCommand
from textual.binding import BindingType
from textual.screen import Screen

from agentops.cancelling import cancel
from agentops.errors import AgentOpsError, UsageError
from agentops.settings import Settings
from agentops.store.pages import Pages, RunLine
from agentops.text import clean
from tui.actions import SECTIONS, bindings, of
from tui.data import Answer, Changed, Reader, Trouble
from tui.screens.base import Base
from tui.screens.dialogs import Confirm, Help, JobScreen
from tui.screens.engine import EngineScreen
from tui.screens.evals import EvalsScreen, Interval, Scales
from tui.screens.inbox import InboxScreen
from tui.screens.run import RunScreen
from tui.screens.runs import RunsScreen
from tui.state import load_state, save_state
from tui.verbs import Job
from tui.wire import Wire, thinned

THEMES = ("textual-dark", "textual-light", "nord", "gruvbox", "tokyo-night", "solarized-light")
_JOB_POLL_S = 0.25


class TerminalApp(App[None]):
    """Shows the record of `settings`. `open_at` is a section, or `run/ID`. A `read_only` one does nothing but look. `catch_up`
    brings the record up to date where no other process does; `interval` gives the interval of a mean, `scales` the bounds of
    metrics by their names; `now_ns` is the clock."""

    TITLE = "agentops"
    ALLOW_SELECT = False
    ENABLE_COMMAND_PALETTE = True
    MODES: ClassVar[dict[str, Any]] = {
        "runs": RunsScreen,
        "inbox": InboxScreen,
        "evals": EvalsScreen,
        "engine": EngineScreen,
    }
    BINDINGS: ClassVar[list[BindingType]] = [*bindings()]
    CSS = """
    Base { background: $background; layers: base over; }
    #nothing { display: none; height: 1fr; width: 1fr; content-align: left middle; padding: 1 8; color: $text-muted; }
    #small { display: none; layer: over; width: 100%; height: 100%; background: $background; content-align: center middle; }
    .-small > #small { display: block; }
    #news { height: 1; padding: 0 1; color: $text-warning; }
    #summary { height: 1; padding: 0 1; color: $text-muted; text-wrap: nowrap; text-overflow: ellipsis; }
    #head { height: auto; max-height: 3; padding: 0 1; text-wrap: nowrap; text-overflow: ellipsis; }
    #meters { padding: 0 1; }
    #filter { height: 3; }
    #table, #trace, #detail, #meters { height: 1fr; }
    #halves { height: 1fr; layout: vertical; }
    #halves > #detail { border-top: solid $panel-lighten-2; padding: 0 1; }
    .-wide #halves { layout: horizontal; }
    .-wide #halves > #trace, .-wide #halves > #table { width: 3fr; }
    .-wide #halves > #detail { width: 2fr; border-top: none; border-left: solid $panel-lighten-2; }
    .-detail #halves > #trace { display: none; }
    .dialog { width: 90%; height: 80%; margin: 2 4; border: round $primary; background: $surface; padding: 0 1; }
    .dialog.small { height: 7; }
    .dialog .title { height: auto; max-height: 3; margin: 0 0 1 0; }
    .dialog #said, .dialog #text { height: 1fr; }
    ModalScreen { align: center middle; }
    """

    def __init__(
        self,
        settings: Settings,
        *,
        open_at: str = "",
        read_only: bool = False,
        theme: str = "",
        catch_up: Callable[[], None] | None = None,
        interval: Interval | None = None,
        scales: Scales | None = None,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """
        Raises:
            UsageError: there is no such section or theme.
        """
        self.wire = Wire()
        super().__init__(driver_class=thinned(self.get_driver_class(), self.wire))
        self.settings = settings
        self.read_only = read_only
        self.interval = interval
        self.scales: Scales = scales or {}
        self.now_ns = now_ns
        self.state = load_state(settings)
        self.counts: dict[str, int] = {}
        self.trouble: AgentOpsError | None = None
        self.jobs: list[Job] = []
        self.catch_up = None if read_only else catch_up
        self.reader = Reader(settings, self.post_message, self.catch_up)
        section, _, self._first_run = open_at.partition("/")
        if section == "run" and self._first_run:
            section = "runs"
        if section and section not in SECTIONS:
            raise UsageError(f"there is no screen '{open_at}'", hint=f"one of: {', '.join(SECTIONS)}, run/ID")
        self._first_section = section or self.state.section
        if theme and theme not in self.available_themes:
            raise UsageError(f"there is no theme '{theme}'", hint=f"one of: {', '.join(sorted(self.available_themes))}")
        wanted = theme or self.state.theme
        self.theme = wanted if wanted in self.available_themes else THEMES[0]

    def on_mount(self) -> None:
        self.reader.start()
        self.set_interval(_JOB_POLL_S, self._poll_jobs)
        self.switch_mode(self._first_section)
        if self._first_run:
            self.open_run(self._first_run)

    def on_unmount(self) -> None:
        self.reader.close()
        for job in self.jobs:
            job.leave()
        self.jobs.clear()
        if not self.read_only:
            self.state.theme = self.theme
            save_state(self.settings, self.state)

    async def on_event(self, event: events.Event) -> None:
        # What is pasted comes from anywhere; whatever takes it shows it.
        if isinstance(event, events.Paste) and not event.is_forwarded:
            event.text = clean(event.text)
        await super().on_event(event)

    def on_resize(self, event: events.Resize) -> None:
        with self.wire.lock:
            self.wire.forget(*event.size)

    # What the reader says.

    def on_answer(self, message: Answer) -> None:
        message.deliver()

    def on_changed(self, message: Changed) -> None:
        if (screen := self._under()) is not None:
            screen.read(calm=True)

    def on_trouble(self, message: Trouble) -> None:
        self.trouble = message.error
        self.tell_bar()
        if message.error is not None and message.error.hint:
            self.tell(message.error.hint, "yellow")

    def _under(self) -> Base | None:
        """The screen below any dialog."""
        return next((screen for screen in reversed(self.screen_stack) if isinstance(screen, Base)), None)

    def tell(self, text: str, ink: str = "") -> None:
        """Foreign text on the line for news."""
        if (screen := self._under()) is not None and screen.is_mounted:
            screen.news(text, ink)

    def tell_bar(self) -> None:
        screen = self._under()
        if screen is None or not screen.is_mounted:
            return
        from tui.widgets.bar import Bar

        said = "read only" if self.read_only else ""
        if self.trouble is not None:
            said = str(self.trouble)
        elif busy := sum(job.code is None for job in self.jobs):
            said = f"{busy} at work: {next(job for job in self.jobs if job.code is None).line}"
        numbers = {"runs": self.counts.get("running", 0), "inbox": self.counts.get("waiting", 0)}
        screen.query_one(Bar).tell(numbers, said, bad=self.trouble is not None)

    # What screens ask for.

    def open_run(self, prefix: str, span: str | None = None) -> None:
        """Opens a run by its id, the beginning of it, or `last`."""

        def deliver(found: str | AgentOpsError) -> None:
            if isinstance(found, str):
                self.push_screen(RunScreen(found, span))
            else:
                self.tell(f"{found}; {found.hint}", "red")

        def work(pages: Any) -> str | AgentOpsError:
            from agentops.errors import RunNotFound

            try:
                return str(pages.run(prefix).id)
            except RunNotFound as error:
                return error

        self.reader.ask("open", work, deliver)

    def start_job(self, words: Sequence[str], *, given: str = "") -> None:
        """Starts a verb of the command line, and shows what it says."""
        if self.read_only:
            return
        try:
            job = Job(self.settings, words, given=given)
        except OSError as error:
            self.tell(f"it could not be started: {error}", "red")
            return
        self.jobs = [one for one in self.jobs if one.code is None] + [job]
        self.tell_bar()
        self.push_screen(JobScreen(job))

    def cancel(self, run_id: str) -> None:
        """Stops a run, once that is confirmed."""

        def look(run: RunLine | None) -> None:
            if run is None or run.status not in ("running", "waiting", "queued"):
                self.tell(f"run {run_id} is {run.status if run else 'gone'}; there is nothing to stop")
                return
            question = f"Stop run {run.id}? It can be resumed."
            self.push_screen(Confirm(question), lambda yes: self.reader.ask("cancel", now, stop) if yes else None)

        def now(pages: Pages) -> RunLine | None:
            # The answer took its time: what is still in the journal counts too.
            if self.catch_up is not None:
                self.catch_up()
            return pages.run_line(run_id)

        def stop(run: RunLine | None) -> None:
            if run is not None and run.status in ("waiting", "queued"):
                self.start_job(["cancel", run.id])
                return
            if run is None or run.status != "running":
                self.tell(f"run {run_id} is {run.status if run else 'gone'} by now; there is nothing to stop")
                return
            try:
                cancel(self.settings, run.id)
            except AgentOpsError as error:
                self.tell(f"{error} {error.hint}", "red")
            else:
                self.tell(f"run {run.id} was asked to stop")

        if not self.read_only:
            self.reader.ask("cancel", now, look)

    def _poll_jobs(self) -> None:
        for job in self.jobs:
            was = job.code
            if job.poll():
                if isinstance(self.screen, JobScreen) and self.screen.job is job:
                    self.screen.show()
                if was is None and job.code is not None:
                    self.tell(f"{job.line}: {'done' if job.code == 0 else f'ended with code {job.code}'}; l shows what it said")
                    self.tell_bar()

    # What can be done everywhere.

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if self.read_only and action == "log":
            return False
        return super().check_action(action, parameters)

    async def action_section(self, name: str) -> None:
        if name in SECTIONS and isinstance(self.screen, Base):
            self.state.section = name
            await self.switch_mode(name)

    def action_help(self) -> None:
        self.push_screen(Help(acting=not self.read_only))

    def action_log(self) -> None:
        if self.jobs:
            self.push_screen(JobScreen(self.jobs[-1]))
        else:
            self.tell("nothing was started from here yet")

    def action_theme(self) -> None:
        place = THEMES.index(self.theme) if self.theme in THEMES else -1
        self.theme = THEMES[(place + 1) % len(THEMES)]
        self.tell(f"theme: {self.theme}")

    def action_redraw(self) -> None:
        with self.wire.lock:
            self.wire.forget(*self.size)
        self.screen.refresh()

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        under = self._under()
        where = under.where if under is not None else ""
        for action in of(where, acting=not self.read_only):
            if action.name == "command_palette":
                continue

            async def run(name: str = action.name, target: Any = under if action.where else self) -> None:
                await self.run_action(name, target)

            yield SystemCommand(f"{action.label} ({action.shown_key})", action.about, run)
