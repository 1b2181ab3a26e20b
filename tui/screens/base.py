"""What all screens have in common: the bar, a line for news, the footer, what to do next where nothing is, the smallest size."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar, cast

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Footer, Static

from agentops.store.pages import Pages
from tui.actions import ACTIONS
from tui.text import flatten
from tui.widgets.bar import Bar
from tui.widgets.table import Table

if TYPE_CHECKING:
    from tui.app import TerminalApp

T = TypeVar("T")
R = TypeVar("R")
LEAST_CELLS, LEAST_LINES = 60, 14


class Base(Screen[None]):
    """`where` is the screen's name in the table of actions, `section` the one marked in the bar."""

    where: ClassVar[str] = ""
    section: ClassVar[str] = "runs"
    nothing: ClassVar[str] = ""
    BINDINGS: ClassVar[list[BindingType]] = []
    # The first widget that can be focused may be one that is hidden, such as the filter of the runs.
    AUTO_FOCUS: ClassVar[str | None] = ""

    @property
    def terminal(self) -> TerminalApp:
        from tui.app import TerminalApp

        assert isinstance(self.app, TerminalApp)
        return self.app

    def compose(self) -> ComposeResult:
        yield Bar(self.section)
        yield from self.body()
        yield Static(self.nothing, id="nothing", markup=False)
        yield Static("", id="small", markup=False)
        yield Static("", id="news", markup=False)
        yield Footer(show_command_palette=False)

    def body(self) -> ComposeResult:
        yield from ()

    def read(self, *, calm: bool = False) -> None:
        """Asks for what is shown, anew. `calm` after a change that nobody here made."""

    def ask(self, name: str, work: Callable[[Pages], T], deliver: Callable[[T], None], *, calm: bool = False) -> None:
        """As `Reader.ask`; an answer that comes after the screen was left is dropped."""

        def here(answer: T) -> None:
            # One that is being taken down is attached still, but displayed no more, and may have lost its parts.
            if self.is_attached and self.display:
                deliver(answer)

        self.terminal.reader.ask(f"{self.where}.{name}", work, here, calm=calm)

    def on_screen_resume(self) -> None:
        self.terminal.tell_bar()
        self.read()

    def on_resize(self) -> None:
        width, height = self.app.size
        small = width < LEAST_CELLS or height < LEAST_LINES
        self.set_class(small, "-small")
        self.set_class(width >= 140, "-wide")
        if small:
            said = f"This terminal is too small: {width} x {height}.\nAt least {LEAST_CELLS} x {LEAST_LINES} are needed."
            self.query_one("#small", Static).update(said)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if self.terminal.read_only and any(one.acts and one.name == action for one in ACTIONS):
            return False
        return super().check_action(action, parameters)

    def show_nothing(self, empty: bool, *, instead_of: Widget, said: str = "") -> None:
        """Shows what to do next instead of a widget that has nothing to show."""
        if said:
            self.query_one("#nothing", Static).update(said)
        self.query_one("#nothing").display = empty
        instead_of.display = not empty

    def news(self, text: str, ink: str = "") -> None:
        """Foreign text on the line above the footer."""
        self.query_one("#news", Static).update(Text(flatten(text), style=ink, no_wrap=True, overflow="ellipsis"))

    def action_back(self) -> None:
        self.app.pop_screen()


class ListScreen(Base, Generic[R]):
    """A screen around a table of rows; a click on the row under the cursor opens it as Enter does."""

    def on_mount(self) -> None:
        self._table.focus()

    @property
    def _table(self) -> Table[R]:
        return cast("Table[R]", self.query_one("#table", Table))

    def on_lines_chosen(self) -> None:
        self.action_open()

    def action_open(self) -> None:
        """Shows the row under the cursor in full."""
