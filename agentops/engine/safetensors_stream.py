"""Writes a safetensors file one tensor at a time, so that a model larger than memory can be written.

The format (https://huggingface.co/docs/safetensors): eight bytes with the length of a JSON header, the header, then the
tensors' bytes back to back. It knows nothing of models; reading is left to the `safetensors` library.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


class SafetensorsWriter:
    """A file being written. `layout` names every tensor with its type and shape, in the order in which they will come.

    Used as a context manager: leaving it flushes the bytes to the disk. Leaving it early by an exception leaves a
    file that no reader accepts.
    """

    def __init__(self, path: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self._pending = iter(layout.items())
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape) in layout.items():
            size = dtype.itemsize * int(torch.Size(shape).numel())
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Appends the next tensor.

        Raises:
            ValueError: when it is not the one that the layout has next, or differs in type or shape.
        """
        expected, (dtype, shape) = next(self._pending, ("nothing", (None, ())))
        if (name, tensor.dtype, tuple(tensor.shape)) != (expected, dtype, shape):
            raise ValueError(f"expected {expected} {dtype} {shape}, got {name} {tensor.dtype} {tuple(tensor.shape)}")
        self._file.write(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                missing = next(self._pending, None)
                if missing is not None:
                    raise ValueError(f"the file ends before {missing[0]}")
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
