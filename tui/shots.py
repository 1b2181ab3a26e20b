"""Pictures of the screens, as SVG: `python -m tui.shots FOLDER` draws those of the record that the settings name.

What is on them is what is on record: run `agentops demo` first, or point `AGENTOPS_PATHS_HOME` at the record that is to be shown.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from agentops.settings import Settings, load_settings
from tui.app import TerminalApp

SHOTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "runs": ("runs", ()),
    "run": ("run/last", ("down", "down")),
    "inbox": ("inbox", ()),
    "evals": ("evals", ()),
    "engine": ("engine", ()),
}
"""Each picture's name, where the screens are opened for it, and the keys that are pressed."""


async def shoot(settings: Settings, folder: Path, *, size: tuple[int, int] = (120, 34)) -> list[Path]:
    """Draws the pictures into `folder`; the files that were written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (place, keys) in SHOTS.items():
        app = TerminalApp(settings, open_at=place, read_only=True, theme="textual-dark")
        async with app.run_test(size=size) as pilot:
            for key in ("", *keys):
                if key:
                    await pilot.press(key)
                for _ in range(200):
                    await pilot.pause(0.02)
                    if app.reader.idle:
                        break
            await pilot.pause(0.3)
            file = folder / f"{name}.svg"
            file.write_text(app.export_screenshot(title=f"agentops tui {place}"), encoding="utf-8")
            written.append(file)
    return written


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("pictures")
    for file in asyncio.run(shoot(load_settings(), folder)):
        print(file)


if __name__ == "__main__":
    main()
