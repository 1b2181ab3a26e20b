"""The journal: what was acknowledged is read back, whatever happens to the process, the disk or the bytes behind it."""

from __future__ import annotations

import fcntl
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from agentops.errors import JournalFull
from agentops.tracer.journal import Event, Journal, claim, frame, home_id, read


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


def test_a_segment_whose_beginning_was_given_back_is_cut_and_flipped_too(journal: Journal, tmp_path: Path) -> None:
    events = some_events(12)
    journal.append(*events)
    ends = [end for _, end in read(journal.path)]
    raw = bytes(ends[4]) + journal.path.read_bytes()[ends[4] :]
    hurt, dice = tmp_path / "hurt", random.Random(5)
    for size in range(len(raw) + 1):
        hurt.write_bytes(raw[:size])
        assert events_in(hurt) == events[5 : max(5, sum(end <= size for end in ends))]
    for _ in range(300):
        place, bit = dice.randrange(len(raw)), 1 << dice.randrange(8)
        hurt.write_bytes(raw[:place] + bytes([raw[place] ^ bit]) + raw[place + 1 :])
        at = sum(end <= place for end in ends)
        whole = events[5:at]
        for position in (0, ends[4]):
            found = events_in(hurt, position)
            if place < ends[4] <= position:
                assert found == events[5:]
            else:
                assert found in ([], whole, [*whole, None, *events[at + 1 :]])


def test_several_damaged_records_in_a_row_cost_only_themselves(journal: Journal, tmp_path: Path) -> None:
    events = some_events(12)
    journal.append(*events)
    raw, ends = bytearray(journal.path.read_bytes()), [end for _, end in read(journal.path)]
    for record in (3, 4, 5, 8):
        raw[ends[record] - 1] ^= 1
    (broken := tmp_path / "broken").write_bytes(raw)
    assert events_in(broken) == [None if index in (3, 4, 5, 8) else event for index, event in enumerate(events)]


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
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_segments_are_named_after_their_home_which_stays_the_same(tmp_path: Path) -> None:
    here, there = Journal(tmp_path / "here"), Journal(tmp_path / "there")
    again = Journal(tmp_path / "here")
    assert here.segment.startswith(f"{home_id(tmp_path / 'here')}-")
    assert again.segment.startswith(f"{home_id(tmp_path / 'here')}-")
    assert here.segment != again.segment
    assert home_id(tmp_path / "there") != home_id(tmp_path / "here")
    for journal in (here, there, again):
        journal.close()


def test_processes_that_start_at_once_give_their_home_one_name(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib, time; from agentops.tracer.journal import home_id\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(*{home_id(pathlib.Path(sys.argv[1]) / str(number)) for number in range(200)}, sep=' ')"
    )
    for number in range(200):
        (tmp_path / str(number)).mkdir()
    children = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for child in children:
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin
        child.stdin.write("\n")
        child.stdin.flush()
    found = [set(child.communicate(timeout=30)[0].split()) for child in children]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 200


@pytest.mark.parametrize("left", [b"", b"home_01", b"home_01\n", bytes(32)])
def test_a_name_that_was_not_finished_is_given_anew(tmp_path: Path, left: bytes) -> None:
    (tmp_path / "home").write_bytes(left)
    name = home_id(tmp_path)
    assert len(name) == len("home_") + 26
    assert home_id(tmp_path) == name


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


def test_what_the_end_of_one_run_took_of_the_space_kept_back_is_kept_back_again_before_any_run_goes_on(small_disk: Path) -> None:
    journal = Journal(small_disk / "journal")
    filler = small_disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4_096))
    journal.append({"number": "end of one"}, last_word=True)
    # There is room for an event now, but none for the ends of other runs after it.
    with pytest.raises(JournalFull, match="No space left"):
        journal.append({"text": "x" * 20_000})
    journal.append({"number": "end of another"}, last_word=True)
    filler.unlink()
    journal.append({"number": "goes on"})
    assert [event["number"] for event in events_in(journal.path) if event] == ["end of one", "end of another", "goes on"]
    assert len(list(journal.folder.glob("*.reserve"))) == 1
    journal.close()


@pytest.mark.parametrize("written", [0, 7, 10_000])
def test_an_append_that_a_signal_breaks_off_leaves_no_half_and_cuts_nothing_later(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    journal.append({"number": 1})

    def broken_off(fd: int, data: bytes) -> int:
        real(fd, data[:written])
        raise KeyboardInterrupt

    real = os.write
    monkeypatch.setattr(os, "write", broken_off)
    with pytest.raises(KeyboardInterrupt):
        journal.append({"number": "never acknowledged"})
    monkeypatch.undo()
    journal.append({"number": 2})
    assert [event["number"] for event in events_in(journal.path) if event] == [1, 2]
    assert journal.size == journal.path.stat().st_size


def test_a_drainer_that_takes_the_new_file_for_a_dead_one_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stolen: list[Path] = []
    lock = fcntl.flock

    def slow_lock(fd: int, how: int) -> None:
        if not stolen:
            (path,) = tmp_path.glob("*.seg")
            path.unlink()
            stolen.append(path)
        lock(fd, how)

    home_id(tmp_path)
    monkeypatch.setattr("agentops.tracer.journal.fcntl.flock", slow_lock)
    journal = Journal(tmp_path)
    journal.append({"a": 1})
    assert journal.path not in stolen
    assert events_in(journal.path) == [{"a": 1}]
    journal.close()


def test_a_store_that_takes_nothing_stops_appends_at_the_limit_and_once_only_waits(tmp_path: Path) -> None:
    journal = Journal(tmp_path, limit_bytes=10_000)
    written: list[int] = []

    def fill() -> None:
        for number in range(1_000):
            journal.append({"number": number, "text": "x" * 500})
            written.append(number)

    with pytest.raises(JournalFull, match="the store has not taken") as caught:
        fill()
    assert "record.journal_bytes" in str(caught.value.hint)
    assert 9_000 < journal.size <= 10_000
    with pytest.raises(JournalFull):
        journal.append({"number": -1, "text": "x" * 500})
    journal.append({"number": "last"}, last_word=True)
    journal.drained(journal.segment, journal.size)
    journal.append({"number": "again"})
    assert [event["number"] for event in events_in(journal.path) if event] == [*written, "last", "again"]
    journal.close()


def test_an_append_at_the_limit_waits_for_a_drainer_that_comes(tmp_path: Path) -> None:
    journal = Journal(tmp_path, limit_bytes=10_000)
    drained: list[int] = []
    stop = threading.Event()

    def drain() -> None:
        while not stop.wait(0.005):
            drained.append(size := journal.size)
            journal.drained(journal.segment, size)

    thread = threading.Thread(target=drain)
    thread.start()
    for number in range(2_000):
        journal.append({"number": number, "text": "x" * 500})
    journal.append({"number": "larger than the limit", "text": "x" * 50_000})
    stop.set()
    thread.join()
    assert len(events_in(journal.path)) == 2_001
    assert len(set(drained)) > 5
    journal.close()


def test_what_was_drained_is_given_back_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentops.tracer.journal._GIVEN_BACK_BYTES", 300_000)
    journal = Journal(tmp_path)
    # A length of 256 begins with a zero byte, which must not be taken for one of those given back.
    for size in [20_000] * 30 + [247, 248, 249, 250, 251, 252] + [5_000] * 4:
        journal.append({"text": "x" * size})
    ends = [0, *(end for _, end in read(journal.path))]
    whole, events = journal.path.stat().st_blocks, events_in(journal.path)
    at = 25
    for at in range(25, 40):
        journal._given_back = 0
        journal.drained(journal.segment, ends[at])
        if journal.path.stat().st_blocks == whole:
            pytest.skip("this file system gives nothing back")
        assert events_in(journal.path, ends[at]) == events[at:]
        assert events_in(journal.path) == events[at:], "a reader that begins anew finds the first record behind the zeros"
    assert journal.path.stat().st_blocks < whole / 5
    journal.append({"text": "after"})
    assert events_in(journal.path, ends[at])[-1] == {"text": "after"}
    assert journal.size == journal.path.stat().st_size
    journal.drained("another.seg", journal.size)
    journal.close()


class JournalMachine(RuleBasedStateMachine):
    """A journal and a reader that keeps its position, as the store does, against two lists: acknowledged, and taken."""

    def __init__(self) -> None:
        super().__init__()
        self.place = tempfile.TemporaryDirectory()
        self.folder = Path(self.place.name)
        self.positions: dict[str, int] = {}
        self.taken: list[int] = []
        self.acknowledged: list[int] = []
        self.count = 0
        self.journal = Journal(self.folder)

    @rule(size=st.integers(0, 3_000), several=st.integers(1, 3))
    def append(self, size: int, several: int) -> None:
        numbers = list(range(self.count, self.count + several))
        self.count += several
        self.journal.append(*({"number": number, "text": "x" * size} for number in numbers))
        self.acknowledged += numbers

    @rule(part=st.floats(0.0, 0.99), size=st.integers(0, 3_000))
    def torn_append_and_crash(self, part: float, size: int) -> None:
        """The process dies in the middle of a write that nobody was told of."""
        torn = frame({"number": -1, "text": "x" * size})
        os.write(self.journal._fd, torn[: int(part * len(torn))])
        self.crash()

    @rule()
    def crash(self) -> None:
        """Its descriptor is gone, and with it the lock; nothing is tidied."""
        os.close(self.journal._fd)
        self.journal._closed = True
        self.journal = Journal(self.folder)

    @rule()
    def close(self) -> None:
        self.journal.close()
        self.journal = Journal(self.folder)

    @rule(limit=st.integers(0, 5))
    def partial_drain(self, limit: int) -> None:
        self._drain(limit)

    @rule()
    def drain(self) -> None:
        self._drain(None)

    def _drain(self, limit: int | None) -> None:
        for path in sorted(self.folder.glob("*.seg")):
            dead = claim(path)
            whole = True
            for index, (event, end) in enumerate(read(path, self.positions.get(path.name, 0))):
                if index == limit:
                    whole = False
                    break
                assert event is not None
                self.taken.append(event["number"])
                self.positions[path.name] = end
            if dead is not None:
                if whole:
                    path.unlink()
                    self.positions.pop(path.name, None)
                os.close(dead)

    @rule()
    def give_back(self) -> None:
        self.journal._given_back = -(10**9)
        self.journal.drained(self.journal.segment, self.positions.get(self.journal.segment, 0))

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        waiting = [
            event["number"]
            for path in self.folder.glob("*.seg")
            for event, _ in read(path, self.positions.get(path.name, 0))
            if event
        ]
        assert sorted([*self.taken, *waiting]) == self.acknowledged

    def teardown(self) -> None:
        self.journal.close()
        self.place.cleanup()


class TestJournalMachine(JournalMachine.TestCase):  # type: ignore[misc]
    settings = hypothesis_settings(max_examples=60, stateful_step_count=25, deadline=None)
