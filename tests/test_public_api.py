"""The public surface, pinned: a name that appears or goes away shows up here first."""

from __future__ import annotations

from importlib import import_module

import pytest

import agentops

SURFACE = [
    "AgentOpsError",
    "Context",
    "Document",
    "EngineChatModel",
    "Generation",
    "LocalEngine",
    "Message",
    "Query",
    "Request",
    "RunResult",
    "Runtime",
    "ScriptedEngine",
    "Settings",
    "load_settings",
]


def test_the_surface_is_what_it_was() -> None:
    assert list(agentops.__all__) == SURFACE
    assert agentops.__all__ == sorted(agentops.__all__)
    assert set(agentops.__all__) == set(agentops._HOMES)
    assert set(SURFACE) <= set(dir(agentops))


@pytest.mark.parametrize("name", SURFACE)
def test_every_public_name_can_be_had_and_is_documented(name: str) -> None:
    found = getattr(agentops, name)
    assert found.__name__ == name
    assert found.__module__.startswith("agentops.")
    assert found.__doc__, f"{name} says nothing about itself"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Runtme'"):
        agentops.Runtme  # noqa: B018


def test_errors_are_one_tree_and_the_docstring_draws_all_of_it() -> None:
    errors = import_module("agentops.errors")
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    drawn = {word for line in str(errors.__doc__).splitlines() for word in line.replace("│", " ").split()}
    assert len(kinds) > 20
    for kind in kinds:
        assert issubclass(kind, errors.AgentOpsError)
        assert kind.__name__ in drawn, f"{kind.__name__} is missing in the drawing"
        assert kind.__doc__
