"""The rules that hold the house together: who imports whom, what a command loads, and what is written nowhere."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("agentops", "graphs", "evals", "tui")
HEAVY = {"torch", "langgraph", "langchain_core", "ragas", "textual", "sqlmodel", "sqlalchemy", "numpy", "transformers", "rich"}
LONGEST = 700


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def loaded_by(code: str) -> set[str]:
    """Top-level modules in memory after `code` ran in a fresh interpreter."""
    probe = (
        f"import sys, json, contextlib, io\n"
        f"with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n    {code}\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(done.stdout))


def test_the_import_contracts_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Contracts: [1-9]\d* kept, 0 broken", done.stdout)


@pytest.mark.parametrize(
    "code",
    [
        "sys.argv = ['agentops', '--help']; import agentops.cli; agentops.cli.main()",
        "sys.argv = ['agentops', 'run', '--help']; import agentops.cli; agentops.cli.main()",
        "sys.argv = ['agentops', '--version']; import agentops.cli; agentops.cli.main()",
        "import agentops; agentops.load_settings()",
        "import tui.app, tui.screens",
        "import graphs, evals",
        "import agentops.engine.scripted",
    ],
)
def test_what_is_not_needed_is_not_loaded(code: str) -> None:
    allowed = {"numpy"} if "engine" in code else set()
    if "tui.app" in code:
        allowed = {"textual", "rich", "sqlmodel", "sqlalchemy"}
    loaded = loaded_by(code)
    assert "agentops" in loaded or "tui" in loaded or "graphs" in loaded, "the probe saw nothing"
    assert not loaded & (HEAVY - allowed)


def test_the_probe_would_see_a_heavy_import() -> None:
    assert "numpy" in loaded_by("import numpy")


def test_tests_and_packages_are_of_a_readable_length() -> None:
    long = {}
    for path in sources(*PACKAGES, "tests", "bench"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > LONGEST:
            long[str(path.relative_to(ROOT))] = lines
    assert not long


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in sources(*PACKAGES)
        if path.read_text(encoding="utf-8").strip() and path.name != "__main__.py"
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent


FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "shelve", "marshal", "cloudpickle", "diskcache"}
FORBIDDEN_CALLS = {
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
    "eval",
    "exec",
    "os.system",
    "os.popen",
    "numpy.load",
    "np.load",
}
FORBIDDEN_ARGUMENTS = {
    "shell": True,
    "trust_remote_code": True,
    "allow_pickle": True,
    "verify_certs": False,
    "weights_only": False,
}


def dangers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in names:
                if name.partition(".")[0] in FORBIDDEN_IMPORTS or name == "langchain_core.load":
                    yield node.lineno, f"import {name}"
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS:
                yield node.lineno, f"{name}()"
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if keyword.arg in FORBIDDEN_ARGUMENTS and value is FORBIDDEN_ARGUMENTS[keyword.arg]:
                    yield node.lineno, f"{keyword.arg}={value}"


def third_party_imports() -> dict[str, str]:
    """Where each third-party top-level module is first imported, under `if TYPE_CHECKING` and in functions included."""
    found: dict[str, str] = {}
    for path in sources(*PACKAGES):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                found.setdefault(name.partition(".")[0], f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}")
    return {name: place for name, place in found.items() if name not in sys.stdlib_module_names and name not in PACKAGES}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = [line for name, lines in project["optional-dependencies"].items() if name != "all" for line in lines]
    required = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    declared = required | {canonicalize_name(Requirement(line).name) for line in optional}
    providers = metadata.packages_distributions()
    imported = {name: {canonicalize_name(provider) for provider in providers.get(name, [name])} for name in third_party_imports()}
    undeclared = {name: third_party_imports()[name] for name, by in imported.items() if not by & declared}
    assert not undeclared
    unused = required.difference(*imported.values())
    assert not unused


def test_what_is_installed_runs_on_the_oldest_python_that_we_promise() -> None:
    oldest = "3.11.2"  # Debian 12
    too_new = [
        f"{distribution.name} {distribution.version} wants Python {wanted}"
        for distribution in metadata.distributions()
        if (wanted := distribution.metadata["Requires-Python"]) and not SpecifierSet(wanted).contains(oldest)
    ]
    assert not too_new


def test_no_construct_that_could_run_what_was_only_to_be_read() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in sources(*PACKAGES)
        for line, what in dangers(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found


def test_the_search_for_dangers_finds_them() -> None:
    bad = "import pickle\nfrom langchain_core.load import x\ntorch.load('x')\nrun('x', shell=True)\nload(trust_remote_code=True)"
    assert [line for line, _ in dangers(ast.parse(bad))] == [1, 2, 3, 4, 5]
    assert not list(dangers(ast.parse("run('x', shell=False)\nmodel.eval()\njson.load(f)")))


def test_nothing_is_left_unfinished() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sources(*PACKAGES)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if marks.search(line)
    ]
    assert not found


def test_each_package_is_typed() -> None:
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").is_file()
