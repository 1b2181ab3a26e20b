"""Finding graphs: of a folder, of an existing LangGraph app, of the package; and what is said when one cannot be found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentops import Runtime, Settings
from agentops.cli.graph import names
from agentops.errors import GraphBroken, GraphError, GraphNotFound
from agentops.graph import load_graph
from agentops.project import find_project, list_graphs, locate, package_graphs, read_manifest
from agentops.text import short_name

MADE = """
'''{about}'''
from typing import TypedDict
from langgraph.graph import START, END, StateGraph

class State(TypedDict):
    text: str

def loud(state: State) -> State:
    return {{"text": state["text"].upper()}}

{name} = StateGraph(State).add_node(loud).add_edge(START, "loud").add_edge("loud", END)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to stand in; what loading a graph leaves behind in the process is taken away again."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before, variables = set(sys.modules), dict(os.environ)
    yield folder
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]
    os.environ.clear()
    os.environ.update(variables)


def write(file: Path, text: str = MADE.format(about="Says it loud.", name="graph")) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def manifest(folder: Path, **keys: Any) -> Path:
    return write(folder / "langgraph.json", json.dumps(keys))


# -- a folder without a manifest


def test_files_that_define_graph_are_the_graphs_of_a_folder(here: Path) -> None:
    write(here / "mine.py")
    write(here / "graphs" / "other.py")
    write(here / "not_one.py", "from mine import graph\n")
    write(here / "odd.py", "class A:\n    graph = 1\ndef f():\n    graph = 2\n")
    own = [one for one in list_graphs() if one.source != "package"]
    assert [(one.name, one.about) for one in own] == [("mine", "Says it loud"), ("other", "Says it loud")]
    for name in ("mine", "other"):
        loaded = load_graph(name)
        assert loaded.compiled.invoke({"text": "hi"}) == {"text": "HI"}
        assert loaded.name == name
    assert load_graph("other").reference == f"{here}/graphs/other.py:graph"


def test_the_folders_own_graph_hides_that_of_the_package_but_not_on_record(here: Path) -> None:
    write(here / "graphs" / "rag.py")
    own, hidden = (one for one in list_graphs() if one.name == "rag")
    assert (own.hidden, hidden.hidden, hidden.source) == (False, True, "package")
    assert not load_graph("rag").uses_context
    assert load_graph("rag", recorded=True).uses_context


def test_what_is_on_record_finds_the_same_graph_from_another_folder(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(here / "mine.py")
    write(here / "app" / "agent.py")
    manifest(here / "app", graphs={"agent": "./agent.py:graph"})
    first = load_graph("mine").reference
    monkeypatch.chdir(here / "app")
    second = load_graph("agent").reference
    monkeypatch.chdir(tmp_path)
    for reference, name in ((first, "mine"), (second, "agent")):
        assert load_graph(reference, recorded=True).name == name
    assert (short_name(first), short_name(second), short_name("rag")) == ("mine.py:graph", "agent", "rag")
    with pytest.raises(GraphNotFound, match="mine"):
        load_graph("mine", recorded=True)


def test_a_checkout_of_the_package_does_not_hide_its_own_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(package_graphs()["rag"].parents[1])
    assert {one.source for one in list_graphs() if one.name == "rag"} == {"package"}


def test_prompts_are_beside_the_graph_or_in_the_project(here: Path) -> None:
    write(here / "prompts" / "ask.md", "## user\n{text}\n")
    write(here / "graphs" / "other.py")
    assert load_graph("other").prompts.names() == ["ask"]
    write(here / "graphs" / "prompts" / "near.md", "## user\n{text}\n")
    assert load_graph("other").prompts.names() == ["near"]


def test_modules_of_two_projects_that_have_one_name_are_kept_apart(here: Path) -> None:
    for folder, word in (("one", "first"), ("two", "second")):
        write(here / folder / "tools.py", f"word = {word!r}\n")
        text = MADE.format(about="", name="graph").replace('state["text"].upper()', "word")
        write(here / folder / "mine.py", "from tools import word\n" + text)
    first, second = load_graph("one/mine.py"), load_graph("two/mine.py")
    assert second.compiled.invoke({"text": ""}) == {"text": "second"}
    assert first.compiled.invoke({"text": ""}) == {"text": "first"}


def test_an_unknown_name_is_told_what_there_is(here: Path) -> None:
    write(here / "mine.py")
    with pytest.raises(GraphNotFound, match="no graph is called 'mime'") as unknown:
        locate("mime")
    assert "mine" in unknown.value.hint
    assert "rag" in unknown.value.hint
    write(here / "nearly.py", "agent = 1\n")
    with pytest.raises(GraphNotFound) as stray:
        locate("nearly")
    assert "nearly.py is here and defines no 'graph'" in stray.value.hint


def test_a_file_that_does_not_parse_is_told_when_it_is_run(here: Path) -> None:
    write(here / "mine.py", "x = (\ngraph = 1\n")
    with pytest.raises(GraphBroken, match=r"mine\.py, line 1: SyntaxError"):
        load_graph("mine")


ASKS = """
from typing import TypedDict
from langgraph.graph import START, END, StateGraph
from langgraph.types import interrupt

class State(TypedDict, total=False):
    question: str
    answer: str

def ask(state: State) -> State:
    from words import said
    return {"answer": said(interrupt("well?"))}

graph = StateGraph(State).add_node(ask).add_edge(START, "ask").add_edge("ask", END)
"""


@pytest.mark.parametrize("name", ["asks", "rag"])
def test_a_waiting_run_goes_on_in_another_folder(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings, name: str
) -> None:
    write(here / "graphs" / f"{name}.py", ASKS)
    write(here / "words.py", "said = str.upper\n")
    with Runtime(settings) as runtime:
        waiting = runtime.run(name, "hi")
        assert waiting.status == "waiting"
    monkeypatch.chdir(tmp_path)
    with Runtime(settings) as runtime:
        assert runtime.resume(waiting.run_id, answer="yes").output["answer"] == "YES"


# -- an existing LangGraph app

MODEL = '''
"""A chat model that answers by itself."""
import os
from typing import Any
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult

class Parrot(BaseChatModel):
    @property
    def _llm_type(self) -> str:
        return "parrot"

    def _generate(self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        said = f"{os.environ['PARROT_NAME']}: {messages[-1].content}"
        return ChatResult(generations=[ChatGeneration(message=AIMessage(said))])
'''
AGENT = '''
"""Repeats what it is told."""
from langgraph.graph import START, END, MessagesState, StateGraph
from my_agent.model import Parrot

async def chat(state: MessagesState) -> dict:
    from my_agent import late
    return {"messages": [await Parrot().ainvoke(state["messages"])]}

graph = StateGraph(MessagesState).add_node(chat).add_edge(START, "chat").add_edge("chat", END).compile()
'''


@pytest.fixture
def app(here: Path) -> Path:
    write(here / "my_agent" / "__init__.py", "")
    write(here / "my_agent" / "model.py", MODEL)
    write(here / "my_agent" / "late.py", "")
    write(here / "my_agent" / "agent.py", AGENT)
    write(here / ".env", "# the name\nexport PARROT_NAME='Polly # 1'\nSECRET=do-not-show\n")
    manifest(
        here,
        python_version="3.12",
        dependencies=[".", "langchain-core"],
        graphs={"agent": "./my_agent/agent.py:graph", "again": {"path": "my_agent.agent:graph", "description": "As a module"}},
        env=".env",
        store={"index": {"dims": 3}},
    )
    return here


def test_an_existing_app_runs_unchanged_and_is_on_record(app: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    def agentops(*words: str, cwd: Path = app) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "agentops", *words], cwd=cwd, env=environment, capture_output=True, text=True
        )

    for name in ("agent", "again"):
        done = agentops("run", name, "hi", "--json", cwd=app / "my_agent")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["status"] == "done"
        assert result["output"]["messages"][-1]["content"] == "Polly # 1: hi"
        assert "do-not-show" not in done.stdout + done.stderr
    listed = agentops("runs", "--graph", "again", "--json")
    (row,) = json.loads(listed.stdout)
    assert row["graph"] == f"{app}/langgraph.json:again"
    shown = agentops("show", row["id"], cwd=tmp_path).stdout
    assert "chat" in shown
    assert "generation" in shown


def test_the_graphs_of_an_app_are_listed_with_what_is_not_used(app: Path, environment: dict[str, str]) -> None:
    def graphs(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["agentops", "graphs", *words], cwd=app, env=environment, capture_output=True, text=True)

    shown = graphs()
    assert "agent   " in shown.stdout
    assert "Repeats what it is told" in shown.stdout
    assert "As a module" in shown.stdout
    assert shown.stdout.index("langgraph.json:") < shown.stdout.index("the package:") < shown.stdout.index("rag ")
    assert shown.stderr == "not used here, of langgraph.json: python_version, store\n"
    plain = {one["name"]: one for one in json.loads(graphs("--json").stdout)}
    assert plain["agent"]["source"] == f"{app}/langgraph.json"
    assert plain["rag"]["source"] == "package"


def test_a_variable_that_is_set_is_not_set_anew(app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARROT_NAME", "Rio")
    load_graph("agent")
    assert os.environ["PARROT_NAME"] == "Rio"
    assert os.environ["SECRET"] == "do-not-show"


FACTORIES = """
import contextlib
from typing import Any
from langchain_core.runnables import RunnableConfig
from langgraph_sdk.runtime import ServerRuntime
from built import built
from built import built as compiled_later

compiled = built.compile()
def plain(): return built
def with_config(config: RunnableConfig): return built if config["configurable"] == {} else None
def untyped(config): return built if "configurable" in config else None
def with_runtime(runtime: ServerRuntime): return built if runtime.execution_runtime.store is not None else None
def with_both(config: RunnableConfig, runtime: "ServerRuntime[Any]"): return built if runtime.user is None else None
def with_default(depth: int = 3): return built
async def later(config: RunnableConfig): return compiled
@contextlib.contextmanager
def opened(config: RunnableConfig):
    yield compiled
@contextlib.asynccontextmanager
async def opened_later():
    yield compiled
def three(one, two, more): return built
def asks(runtime: ServerRuntime): return runtime.ensure_user()
def nothing(): return None
"""


@pytest.mark.parametrize(
    "attribute",
    [
        "compiled",
        "compiled_later",
        "plain",
        "with_config",
        "untyped",
        "with_runtime",
        "with_both",
        "with_default",
        "later",
        "opened",
    ],
)
def test_every_form_of_a_graph_is_taken(here: Path, attribute: str) -> None:
    write(here / "built.py", MADE.format(about="", name="built"))
    write(here / "forms.py", FACTORIES)
    manifest(here, graphs={"one": f"./forms.py:{attribute}"})
    assert load_graph("one").compiled.invoke({"text": "hi"}) == {"text": "HI"}


@pytest.mark.parametrize(
    ("attribute", "said"),
    [
        ("opened_later", "asynchronous context manager"),
        ("three", "wants 3 arguments"),
        ("asks", "there are no users here"),
        ("nothing", "is a NoneType, not a LangGraph graph"),
        ("absent", "has no 'absent'"),
    ],
)
def test_a_form_that_is_not_taken_is_told(here: Path, attribute: str, said: str) -> None:
    write(here / "built.py", MADE.format(about="", name="built"))
    write(here / "forms.py", FACTORIES)
    manifest(here, graphs={"one": f"./forms.py:{attribute}"})
    with pytest.raises(GraphError, match=said) as refused:
        load_graph("one")
    assert refused.value.hint


def test_a_factory_is_called_inside_a_running_loop(here: Path) -> None:
    import asyncio

    write(here / "built.py", MADE.format(about="", name="built"))
    write(here / "forms.py", FACTORIES)

    async def inside() -> Any:
        return load_graph("forms.py:later")

    assert asyncio.run(inside()).name == "forms"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "line 1: this is not JSON"),
        ("[]", "must hold a JSON object"),
        ("[" * 100_000, "cannot be read"),
        ('{"graphs": []}', '"graphs" must be an object'),
        ('{"graphs": {"a": 7}}', "the graph 'a' has no place"),
        ('{"graphs": {"a": "./agent.py"}}', "the graph 'a' has no place"),
        ('{"graphs": {"a": {"description": "no path"}}}', "the graph 'a' has no place"),
        ('{"dependencies": "."}', '"dependencies" must be a list'),
        ('{"dependencies": ["./nowhere"]}', "the folder ./nowhere, which is not there"),
        ('{"env": 7}', '"env" must be a file or an object'),
        ('{"env": {"A": ["secret"]}}', "the variable A"),
    ],
)
def test_a_manifest_that_is_off_is_told_with_its_mend(here: Path, text: str, said: str) -> None:
    write(here / "langgraph.json", text)
    for call in (lambda: list_graphs(), lambda: load_graph("rag")):
        with pytest.raises(GraphBroken, match=r"langgraph\.json") as broken:
            call()
        assert said in str(broken.value)
        assert broken.value.hint
        assert "secret" not in str(broken.value) + broken.value.hint
    assert names("") == []


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("./nowhere.py:graph", r"there is no file \./nowhere\.py"),
        ("../outside.py:graph", r"there is no file \.\./outside\.py"),
        ("not.there:graph", r"there is no module not\.there"),
        ("./src/agent.ts:graph", "is JavaScript"),
    ],
)
def test_a_graph_that_is_not_there_is_told_and_the_others_still_run(here: Path, place: str, said: str) -> None:
    write(here / "mine.py")
    manifest(here, graphs={"off": place, "mine": "./mine.py:graph"})
    with pytest.raises(GraphNotFound, match=said) as refused:
        load_graph("off")
    assert refused.value.hint
    assert load_graph("mine").name == "mine"
    problems = {one.name: one.problem for one in list_graphs() if one.source != "package"}
    assert problems["off"]
    assert not problems["mine"]


def test_a_path_may_lead_out_of_the_project(here: Path) -> None:
    write(here.parent / "shared" / "mine.py")
    manifest(here, graphs={"mine": "../shared/mine.py:graph"})
    assert load_graph("mine").name == "mine"


def test_a_reference_to_a_manifest_that_is_gone_is_told(here: Path) -> None:
    with pytest.raises(GraphNotFound, match="there is no file"):
        load_graph(f"{here}/langgraph.json:mine", recorded=True)
    manifest(here, graphs={"other": "./mine.py:graph"})
    with pytest.raises(GraphNotFound, match="has no graph 'mine'") as gone:
        load_graph(f"{here}/langgraph.json:mine", recorded=True)
    assert "other" in gone.value.hint


def test_a_package_that_is_not_installed_is_named_when_an_import_fails(here: Path) -> None:
    write(here / "agent.py", "import langchain_of_nowhere\ngraph = None\n")
    manifest(
        here,
        dependencies=[".", "langchain-of-nowhere>=2", "langgraph>=99", "langchain-core", "git+https://example.org/x.git"],
        graphs={"agent": "./agent.py:graph"},
    )
    with pytest.raises(GraphBroken, match="line 1: ModuleNotFoundError") as broken:
        load_graph("agent")
    assert "pip install 'langchain-of-nowhere>=2' 'langgraph>=99'" in broken.value.hint
    project = find_project()
    assert project is not None
    assert project.missing() == ["langchain-of-nowhere>=2", "langgraph>=99"]


def test_an_error_in_a_module_of_the_app_shows_its_line(here: Path) -> None:
    write(here / "src" / "pkg" / "__init__.py", "")
    write(here / "src" / "pkg" / "agent.py", "import pkg.deep\n")
    write(here / "src" / "pkg" / "deep.py", "x = 1\ny = x.nothing\n")
    manifest(here, dependencies=["."], graphs={"agent": "pkg.agent:graph"})
    with pytest.raises(GraphBroken, match=r"deep\.py, line 2: AttributeError") as broken:
        load_graph("agent")
    assert broken.value.line == 2
    write(here / "src" / "pkg" / "deep.py", "x = (\n")
    with pytest.raises(GraphBroken, match=r"deep\.py, line 1: SyntaxError"):
        load_graph("agent")


# -- variables

READ = {
    'A=1\nB = two words # said\n C=\'a # b\'\nexport D="x\\ny \\"q\\""\n': {
        "A": "1",
        "B": "two words",
        "C": "a # b",
        "D": 'x\ny "q"',
    },
    "\n# only this\n\nKEY=\nURL=http://a/#b\n": {"KEY": "", "URL": "http://a/#b"},
    'PEM="-----BEGIN\nline\n-----END"\r\nNEXT=1': {"PEM": "-----BEGIN\nline\n-----END", "NEXT": "1"},
    "\ufeffA=ü\n": {"A": "ü"},
}


@pytest.mark.parametrize("text", READ, ids=range(len(READ)))
def test_a_file_of_variables_is_read(here: Path, text: str) -> None:
    (here / ".env").write_bytes(text.encode())
    for name in READ[text]:
        os.environ.pop(name, None)
    read_manifest(manifest(here, env=".env")).set_environment()
    assert {name: os.environ[name] for name in READ[text]} == READ[text]


def test_variables_may_stand_in_the_manifest(here: Path) -> None:
    read_manifest(manifest(here, env={"PROJECT_A": "x", "PROJECT_B": 7})).set_environment()
    assert (os.environ["PROJECT_A"], os.environ["PROJECT_B"]) == ("x", "7")


@pytest.mark.parametrize("text", ["GOOD=1\nthis is sk-secret\n", "A='sk-secret\n", "=sk-secret\n", "A=sk-secret\0\n"])
def test_a_line_that_is_no_variable_is_told_without_being_shown(here: Path, text: str) -> None:
    write(here / ".env", text)
    with pytest.raises(GraphBroken, match=r"\.env, line \d: this is no variable") as broken:
        read_manifest(manifest(here, env=".env")).set_environment()
    assert "sk-secret" not in str(broken.value) + broken.value.hint


def test_a_missing_file_of_variables_is_told(here: Path) -> None:
    project = read_manifest(manifest(here, env=".env"))
    with pytest.raises(GraphBroken, match="is not there") as broken:
        project.set_environment()
    assert "langgraph.json" in broken.value.hint
    write(here / ".env.example", "A=\n")
    with pytest.raises(GraphBroken) as broken:
        project.set_environment()
    assert broken.value.hint == "copy .env.example to it and fill it in"


# -- completion


def test_names_are_completed_without_anything_heavy(here: Path, loaded: Callable[[str], set[str]]) -> None:
    write(here / "ragged.py")
    assert names("ra") == ["ragged", "rag"]
    assert not loaded("from agentops.cli.graph import names; names('')") & {"langgraph", "torch", "langchain_core", "rich"}


@pytest.fixture
def loaded() -> Callable[[str], set[str]]:
    def probe(code: str) -> set[str]:
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"], capture_output=True, text=True, check=True
        )
        return {name.partition(".")[0] for name in done.stdout.split()}

    return probe
