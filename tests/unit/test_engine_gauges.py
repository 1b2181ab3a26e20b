"""What the machine says of memory and energy. NVIDIA's library is a stand-in here: shape and manners only, no card was asked."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from agentops.engine import generate
from agentops.engine.gauges import CardGauges, ProcessGauges, open_gauges
from agentops.records import Request


def library(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[bytes]:
    asked: list[bytes] = []
    energy = iter(range(1_000, 100_000, 250))
    parts = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: asked.append(uuid) or "card",
        "nvmlDeviceGetTotalEnergyConsumption": lambda card: next(energy),
    }
    module = ModuleType("pynvml")
    for name, part in {**parts, **changes}.items():
        setattr(module, name, part)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="aa-bb"))
    return asked


def refused(*_: Any) -> Any:
    raise RuntimeError("Not Supported")


def test_a_processor_has_memory_and_no_energy() -> None:
    gauges = open_gauges("cpu")
    assert isinstance(gauges, ProcessGauges)
    assert gauges.peak_memory_bytes() > 10_000_000
    assert gauges.energy_mj() == 0


def test_a_cards_energy_is_read_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = library(monkeypatch)
    gauges = open_gauges("cuda")
    assert isinstance(gauges, CardGauges)
    assert asked == [b"GPU-aa-bb"]
    assert (gauges.energy_mj(), gauges.energy_mj()) == (1_000, 1_250)


@pytest.mark.parametrize("missing", ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption"])
def test_a_card_that_says_nothing_harms_nothing(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    library(monkeypatch, **{missing: refused})
    assert open_gauges("cuda").energy_mj() == 0


def test_a_library_that_is_not_there_harms_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_gauges("cuda").energy_mj() == 0


async def test_a_calls_energy_is_what_the_card_used_meanwhile_and_shared_where_others_were_at_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    import asyncio

    from scripted_runner import scripted_engine
    from tiny_model import write_tiny_model

    library(monkeypatch)
    monkeypatch.setattr("agentops.engine.local.open_gauges", lambda _: open_gauges("cuda"))
    engine, _ = scripted_engine(write_tiny_model(tmp_path / "tiny"))
    try:
        alone = (await generate(engine, Request(text="the quick", max_tokens=5))).footprint
        assert (alone.energy_mj, alone.shared) == (250, False)
        both = await asyncio.gather(*(generate(engine, Request(text=f"{name} fox", max_tokens=50)) for name in "ab"))
        assert all(one.footprint.energy_mj > 0 and one.footprint.shared for one in both)
    finally:
        await engine.close()
