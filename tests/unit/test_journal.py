"""The journal: what was acknowledged is read back, whatever happens to the process, the disk or the bytes behind it."""

from __future__ import annotations

import fcntl
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentops.errors import JournalFull
from agentops.tracer.journal import Event, Journal, claim, frame, read


def events_in(segment: Path, position: int = 0) -> list[Event | None]:
    return [event for event, _ in read(segment, position)]


def some_events(count: int) -> list[Event]:
    dice = random.Random(7)
    return [{"t": "span", "number": number, "text": "x" * dice.randrange(0, 60)} for number in range(count)]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(tmp_path / "journal")
    yield opened
    opened.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB that can really be filled."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_what_was_appended_is_read_from_any_position(journal: Journal) -> None:
    events = some_events(20)
    journal.append(*events[:5])
    for event in events[5:]:
        journal.append(event)
    assert events_in(journal.path) == events
    assert journal.size == journal.path.stat().st_size
    for index, (_, position) in enumerate(read(journal.path)):
        assert events_in(journal.path, position) == events[index + 1 :]


@given(
    st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()) | st.binary(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=5,
    )
)
def test_any_event_can_be_framed(event: Event) -> None:
    assert len(frame(event)) > 8


def test_what_msgpack_refuses_is_written_as_text(journal: Journal) -> None:
    journal.append({"surrogate": "a\udc80b", "huge": 2**70, "object": {1, 2}, "bytes": b"\xff", "key": {3: "x"}})
    (event,) = events_in(journal.path)
    assert event == {"surrogate": "a\\udc80b", "huge": str(2**70), "object": "{1, 2}", "bytes": b"\xff", "key": {"3": "x"}}


def test_a_segment_cut_at_any_byte_gives_the_whole_records_before_the_cut(journal: Journal, tmp_path: Path) -> None:
    events = some_events(12)
    journal.append(*events)
    raw, ends = journal.path.read_bytes(), [end for _, end in read(journal.path)]
    cut = tmp_path / "cut"
    for size in range(len(raw) + 1):
        cut.write_bytes(raw[:size])
        assert events_in(cut) == events[: sum(end <= size for end in ends)]


def test_a_flipped_bit_never_reads_as_another_event(journal: Journal, tmp_path: Path) -> None:
    events = some_events(12)
    journal.append(*events)
    raw, ends = journal.path.read_bytes(), [end for _, end in read(journal.path)]
    broken, dice, passed_over = tmp_path / "broken", random.Random(3), 0
    for _ in range(600):
        place, bit = dice.randrange(len(raw)), 1 << dice.randrange(8)
        broken.write_bytes(raw[:place] + bytes([raw[place] ^ bit]) + raw[place + 1 :])
        hurt = sum(end <= place for end in ends)
        found = events_in(broken)
        assert found[:hurt] == events[:hurt]
        # Behind the damage: nothing, or a mark for the lost record and all that followed it.
        assert found[hurt:] in ([], [None, *events[hurt + 1 :]])
        passed_over += bool(found[hurt:])
    assert passed_over > 300, "most flips hit a payload, and must cost that record only"


def test_many_threads_append_whole_records(journal: Journal) -> None:
    def work(name: int) -> None:
        for number in range(200):
            journal.append({"name": name, "number": number, "text": "y" * 300})

    threads = [threading.Thread(target=work, args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [event for event in events_in(journal.path) if event]
    assert len(found) == 1200
    for name in range(6):
        assert [event["number"] for event in found if event["name"] == name] == list(range(200))


def test_a_living_owner_cannot_be_claimed_and_a_dead_one_can(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append({"a": 1})
    assert claim(journal.path) is None
    journal.close()
    fd = claim(journal.path)
    assert fd is not None
    os.close(fd)
    assert claim(tmp_path / "gone.seg") is None


def test_a_killed_process_leaves_what_it_acknowledged(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from agentops.tracer.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1])); number = 0\n"
        "while True:\n"
        "    journal.append({'number': number, 'text': 'z' * (number % 5000)}); print(number, flush=True); number += 1\n"
    )
    for round_ in range(4):
        folder = tmp_path / str(round_)
        child = subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        last = -1
        for line in child.stdout:
            last = int(line)
            if last >= 300 + 77 * round_:
                child.kill()
                break
        last = max([last, *(int(line) for line in child.stdout.read().split())])
        child.stdout.close()
        child.wait()
        (segment,) = folder.glob("*.seg")
        numbers = [event["number"] for event in events_in(segment) if event]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) > last, "an acknowledged event is missing"
        fd = claim(segment)
        assert fd is not None, "the dead owner's lock is still held"
        os.close(fd)


def test_a_forked_child_writes_a_segment_of_its_own(tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib; from agentops.tracer.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1])); journal.append({'who': 'parent'})\n"
        "if os.fork() == 0:\n    journal.append({'who': 'child'}); os._exit(0)\n"
        "os.wait(); journal.append({'who': 'parent again'}); journal.close()"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    found = sorted([[event["who"] for event in events_in(path) if event] for path in tmp_path.glob("*.seg")])
    assert found == [["child"], ["parent", "parent again"]]


def test_a_forked_childs_segment_is_named_by_its_own_file_from_the_start(tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib; from agentops.tracer.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1])); mine = journal.segment\n"
        "if os.fork() == 0:\n"
        "    journal.append({'named': journal.segment, 'parent': mine}); journal.close(); os._exit(0)\n"
        "os.wait(); assert journal.segment == mine; journal.close(); assert journal.segment == mine"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    (segment,) = tmp_path.glob("*.seg")
    (event,) = events_in(segment)
    assert event is not None
    assert event["named"] == segment.name != event["parent"]


def test_a_closed_journal_takes_nothing(journal: Journal) -> None:
    journal.append({"a": 1})
    journal.close()
    journal.close()
    with pytest.raises(JournalFull, match="closed"):
        journal.append({"a": 2})
    assert events_in(journal.path) == [{"a": 1}]


def test_a_journal_that_was_not_used_leaves_nothing(tmp_path: Path) -> None:
    Journal(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text("in the way")
    with pytest.raises(JournalFull, match="cannot be written") as caught:
        Journal(tmp_path / "journal")
    assert caught.value.hint


def test_a_full_disk_loses_nothing_and_the_last_word_still_fits(small_disk: Path) -> None:
    journal = Journal(small_disk / "journal")
    written: list[int] = []

    def fill() -> None:
        for number in range(10_000):
            journal.append({"number": number, "text": "x" * 3_001})
            written.append(number)

    with pytest.raises(JournalFull, match="No space left"):
        fill()
    assert len(written) > 50
    with pytest.raises(JournalFull):
        journal.append({"number": -1, "text": "x" * 60_000})
    journal.append({"number": "last"}, last_word=True)
    assert [event["number"] for event in events_in(journal.path) if event] == [*written, "last"]
    assert journal.size == journal.path.stat().st_size
    journal.close()


def test_a_drainer_that_takes_the_new_file_for_a_dead_one_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stolen: list[Path] = []
    lock = fcntl.flock

    def slow_lock(fd: int, how: int) -> None:
        if not stolen:
            (path,) = tmp_path.glob("*.seg")
            path.unlink()
            stolen.append(path)
        lock(fd, how)

    monkeypatch.setattr("agentops.tracer.journal.fcntl.flock", slow_lock)
    journal = Journal(tmp_path)
    journal.append({"a": 1})
    assert journal.path not in stolen
    assert events_in(journal.path) == [{"a": 1}]
    journal.close()
