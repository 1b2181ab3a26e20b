"""What the machine says of memory and energy while an engine works.

Energy is that of a whole card, from NVIDIA's management library: it is read where the package `nvidia-ml-py` is installed and the
engine runs on such a card. Nothing here may harm a request: what cannot be measured is 0.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any, Protocol


class Gauges(Protocol):
    """Read by the engine's thread."""

    def peak_memory_bytes(self) -> int:
        """The most there has been."""
        ...

    def energy_mj(self) -> int:
        """Millijoules since some moment before the engine was opened."""
        ...


def open_gauges(device: str) -> Gauges:
    """Those for an engine on `device`."""
    return CardGauges(*_card()) if device.startswith("cuda") else ProcessGauges()


class ProcessGauges:
    """The process's own memory; its energy is not known."""

    def peak_memory_bytes(self) -> int:
        try:
            from resource import RUSAGE_SELF, getrusage
        except ImportError:
            return 0
        return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def energy_mj(self) -> int:
        return 0


class CardGauges:
    """What torch has taken of the card's memory; the card's energy, where `nvml` and the `card`'s handle are there."""

    def __init__(self, nvml: Any = None, card: Any = None) -> None:
        self._nvml, self._card = nvml, card

    def peak_memory_bytes(self) -> int:
        import torch

        return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0

    def energy_mj(self) -> int:
        if self._card is None:
            return 0
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._card))
        except Exception:
            # Cards before Volta, and some virtual ones, do not count it: they are not asked again.
            self._card = None
            return 0


def _card() -> tuple[Any, Any]:
    try:
        import torch

        nvml = import_module("pynvml")
        nvml.nvmlInit()
        # The library counts all cards of the machine, torch those that it is shown: only their names are the same.
        return nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}".encode())
    except Exception:
        return None, None
