"""What can be done: one table that the keys, the footer, the palette, the help and the documentation are made of."""

from __future__ import annotations

from dataclasses import dataclass

from textual.binding import Binding

SECTIONS = ("runs", "inbox", "evals", "engine")


@dataclass(frozen=True, slots=True)
class Action:
    """`name` is that of the method `action_NAME` of the screens in `where`, or of the application where that is empty. One that
    `acts` changes something and is not there when the screens may only be looked at."""

    key: str
    name: str
    label: str
    about: str
    where: tuple[str, ...] = ()
    acts: bool = False
    footer: bool = True

    @property
    def shown_key(self) -> str:
        return {
            "escape": "Esc",
            "question_mark": "?",
            "slash": "/",
            "enter": "Enter",
            "ctrl+p": "Ctrl+P",
            "ctrl+l": "Ctrl+L",
        }.get(self.key, self.key)


ACTIONS = (
    Action("1", "section('runs')", "Runs", "The list of runs, live.", footer=False),
    Action("2", "section('inbox')", "Inbox", "What runs wait for.", footer=False),
    Action("3", "section('evals')", "Evals", "Experiments and their scores.", footer=False),
    Action("4", "section('engine')", "Engine", "Speed, cache, queue and memory.", footer=False),
    Action("enter", "open", "Open", "Open the run, experiment or case under the cursor.", ("runs", "inbox", "evals", "cases")),
    Action("slash", "filter", "Filter", "Filter the runs: status:failed graph:rag since:2h words.", ("runs",)),
    Action("s", "sort", "Sort", "Sort by the next column.", ("runs",)),
    Action("S", "reverse", "Reverse", "Sort the other way round.", ("runs",), footer=False),
    Action("f", "follow", "Follow", "Stay on the newest run; in a run, on the newest span.", ("runs", "run")),
    Action(
        "c",
        "cancel",
        "Stop",
        "Stop the run, and nothing else that its process does; it can be resumed.",
        ("runs", "run"),
        acts=True,
    ),
    Action("r", "replay", "Replay", "Run it again from its recording, with no model called.", ("runs", "run"), acts=True),
    Action("n", "problem", "Error", "Go to the next span that failed or was stopped.", ("run",)),
    Action("z", "fold_all", "Fold", "Fold all branches, or unfold them.", ("run",)),
    Action("d", "detail", "Zoom", "Give the detail of the span all the room, or give it back.", ("run",)),
    Action("a", "approve", "Approve", "Approve what is proposed; the run goes on.", ("inbox",), acts=True),
    Action("e", "edit", "Edit", "Edit what is proposed, or answer the question; the run goes on.", ("inbox",), acts=True),
    Action(
        "x", "reject", "Reject", "Refuse what is proposed, with a reason for the model; the run goes on.", ("inbox",), acts=True
    ),
    Action("v", "mark", "Mark", "Mark the experiment for a comparison, or take the mark away.", ("evals",)),
    Action("m", "compare", "Compare", "Compare the marked experiment with the one under the cursor.", ("evals",), acts=True),
    Action("s", "metric", "Metric", "Order by the next metric, its worst cases first; after the last, by all.", ("cases",)),
    Action("l", "log", "Log", "What the last verb that was started here says.", footer=False),
    Action("t", "theme", "Theme", "The next theme.", footer=False),
    Action("escape", "back", "Back", "Leave this screen.", ("run", "cases")),
    Action("question_mark", "help", "Help", "All keys."),
    Action("ctrl+p", "command_palette", "Palette", "Find an action by its name.", footer=False),
    Action("ctrl+l", "redraw", "Redraw", "Draw all of the screen anew, where something else has written on it.", footer=False),
    Action("q", "quit", "Quit", "Leave; what was started goes on."),
)


def bindings(where: str = "") -> list[Binding]:
    """The keys of a screen, or those that are the same everywhere."""
    return [
        Binding(action.key, action.name, action.label, show=action.footer, key_display=action.shown_key)
        for action in ACTIONS
        if (where in action.where if where else not action.where)
    ]


def of(where: str, *, acting: bool = True) -> list[Action]:
    """What can be done on a screen, what can be done everywhere included."""
    return [action for action in ACTIONS if (not action.where or where in action.where) and (acting or not action.acts)]
