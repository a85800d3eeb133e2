"""What an interrupted ``score`` leaves behind, so that the same call goes on where it stopped.

``<output_file>.partial`` holds windows of records as they will stand in the output, one record a line, and lines of its
own, which begin with ``#``: the first says what the run is made of (data, model, options), and one follows each window
with its number and its counts. Whatever stands behind the last of them was being written when the run was stopped, and
is dropped. Of several processes each writes a journal of its own: process 0 that one, process 3
``<output_file>.partial.3``. They hold the same kind of windows, so any number of processes goes on with what another
number left.
"""

import contextlib
import errno
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from rewardfuse import _processes
from rewardfuse._files import atomic_file

MARK = b"#"  # a record begins with {
TITLE = "scores of an interrupted run, made of"
OPENING = MARK + json.dumps({TITLE: None}).encode().removesuffix(b"null}")
FORMAT = {"journal": 2}  # in 1 the counts grew from window to window, and windows had no number
COUNTS = ("records", "responses", "truncated")


class Window(NamedTuple):
    """Where the records of a finished window stand, and its counts.

    Attributes:
        journal: the name of the journal.
        start, end: in its bytes.
        counts: of this window, by name.
    """

    journal: str
    start: int
    end: int
    counts: dict[str, int]


class Journal:
    """One file of finished windows, locked for as long as it is open.

    Nothing in it changes before :meth:`begin`.

    Attributes:
        windows: what it holds, by the window's number.

    Raises:
        ValueError: another run is writing it.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path):
        self.path = path
        self.windows: dict[int, Window] = {}
        self._end, self._begun = 0, False
        self._stream = open(path, "a+b")  # noqa: SIM115 (closed in close)
        try:
            self._lock()
        except BaseException:
            self._stream.close()
            raise

    def _lock(self) -> None:
        """Two runs at once would mix their records. Where files cannot be locked, nothing guards against it."""
        try:
            import fcntl

            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = not self.path.exists()  # its run ended, and removed it, between our opening and locking it
        except BlockingIOError:
            taken = True
        except (ImportError, OSError):
            taken = False
        if taken:
            raise ValueError(f"{self.path} is being written by another run")

    def read(self, identity: Mapping[str, Any], overwrite: bool = False) -> None:
        """Take up the finished windows; of a journal with another identity none, if it may be overwritten.

        Raises:
            ValueError: another run left it and ``overwrite`` is False (names what differs), or it is no journal.
        """
        self._stream.seek(0)
        first = self._stream.readline()
        if first[: len(OPENING)] != OPENING[: len(first)]:
            raise ValueError(f"{self.path} is in the way: it was not left by an interrupted score")
        if not first.endswith(b"\n"):  # stopped before anything was on the disk
            return
        identity, found = {**identity, **FORMAT}, json.loads(first[len(MARK) :])[TITLE]
        changed = [
            f"{name} (was {found.get(name)}, is {identity.get(name)})"
            for name in dict.fromkeys([*identity, *found])
            if found.get(name) != identity.get(name)
        ]
        if changed and not overwrite:
            what = f"was left by an interrupted run that differs: {', '.join(changed)}"
            raise ValueError(f"{self.path} {what}; overwrite (--overwrite) starts anew")
        if not changed:
            self._read_windows(len(first))

    def _read_windows(self, start: int) -> None:
        position = self._end = start
        for line in self._stream:
            position += len(line)
            if line.startswith(MARK) and line.endswith(b"\n"):
                counts = json.loads(line[len(MARK) :])
                number = counts.pop("window")
                self.windows[number] = Window(self.path.name, self._end, position - len(line), counts)
                self._end = position

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Drop what stands behind the last finished window, so that windows can follow it."""
        self._begun = True
        self._stream.truncate(self._end)
        if not self._end:
            self._write(_mark({TITLE: {**identity, **FORMAT}}))

    def append(self, number: int, records: Iterable[dict[str, Any]], counts: dict[str, int]) -> None:
        """Save a finished window; it is on the disk when this returns."""
        content, start = b"".join(map(_line, records)), self._end
        self._write(content + _mark({"window": number, **counts}))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.windows[number] = Window(self.path.name, start, start + len(content), counts)

    def _write(self, content: bytes) -> None:
        self._stream.write(content)
        self._end += len(content)

    def close(self) -> None:
        """Unlock the file, and remove it if it has no window to save; never one that is not ours."""
        empty = not os.fstat(self._stream.fileno()).st_size
        self._close(remove=not self.windows and (self._begun or empty))

    def remove(self) -> None:
        self._close(remove=True)

    def _close(self, remove: bool) -> None:
        # removed while it is still locked, where the system allows it: the file of a run that comes next must stay
        if remove and os.name == "posix":
            self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a full disk again, with what was left in the buffer
            self._stream.close()
        if remove and os.name != "posix":
            self.path.unlink(missing_ok=True)


def journal_numbers(first: Path, rank: int, count: int) -> list[int]:
    """The journals that process ``rank`` of ``count`` takes care of: its own, and of those that more processes have
    left every ``count``-th, so that each has one keeper."""
    prefix = f"{first.name}."
    found = (entry.name.removeprefix(prefix) for entry in first.parent.iterdir() if entry.name.startswith(prefix))
    left = {int(number) for number in found if number.isascii() and number.isdigit() and number == str(int(number))}
    return [rank, *sorted(number for number in left if number > rank and number % count == rank)]


def journal_path(first: Path, number: int) -> Path:
    return first.with_name(f"{first.name}.{number}") if number else first


class ScoreJournal:
    """The scores of finished windows, on disk. Use it as a context manager; every process of the job must.

    A call that is stopped, or fails, leaves the windows that it has finished; :meth:`publish` removes the journals.

    Args:
        output_file: where :meth:`publish` puts the records.
        identity: everything that the scores depend on, by a name that users know; the same in every process.
        overwrite: drop what another run left, if it does not match.

    Attributes:
        finished: the windows that are on disk, whichever process wrote them; of this call those of this process only.

    Raises:
        ValueError: there is the file of another run and ``overwrite`` is False (names what differs), one that a run is
            writing now, or one that is no such file at all; or processes do not see the same folder.
        OSError: one cannot be read or written.
        OtherProcessError: another process found one of these.
    """

    def __init__(self, output_file: str, identity: dict[str, Any], overwrite: bool = False):
        self.output_file = Path(output_file)
        self.finished: dict[int, Window] = {}
        self._journals: list[Journal] = []
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        try:
            self._open()
            with _processes.together():
                for journal in self._journals:
                    journal.read(identity, overwrite)
            with _processes.together():  # only now is it known that no process objects
                for journal in self._journals:
                    journal.begin(identity)
            self._exchange()
        except BaseException:
            self._close()
            raise

    def _open(self) -> None:
        rank, path = _processes.rank(), None
        with _processes.together():
            if rank == 0:  # the lock on this one guards all the others
                path = self._first_path()
                self._journals.append(Journal(path))
        self._first = Path(_processes.gather(path)[0])
        with _processes.together():
            if not self._first.exists():
                place = f"process {rank} does not see {self._first}, which process 0 began"
                raise ValueError(f"output_file must lie in a folder that all processes see; {place}")
            numbers = journal_numbers(self._first, rank, _processes.count())
            for number in numbers[len(self._journals) :]:
                self._journals.append(Journal(journal_path(self._first, number)))

    def _first_path(self) -> Path:
        if self.output_file.is_dir():
            text = "output_file must be a file, got a folder"
            raise IsADirectoryError(errno.EISDIR, text, str(self.output_file))
        if self.output_file.exists() and not self.output_file.is_file():  # a device or a pipe: nothing to go on from
            self._scratch = tempfile.TemporaryDirectory()
            return Path(self._scratch.name) / "scores.partial"
        return self.output_file.with_name(self.output_file.name + ".partial")

    def _exchange(self) -> None:
        """Learn what all the processes have."""
        for windows in _processes.gather({n: w for journal in self._journals for n, w in journal.windows.items()}):
            self.finished = {**windows, **self.finished}  # a window that was found twice counts once

    def append(self, number: int, records: Iterable[dict[str, Any]], counts: dict[str, int]) -> None:
        """Save a window of this process, and its counts; it is on the disk when this returns."""
        self._journals[0].append(number, records, counts)

    def publish(self, windows: int) -> dict[str, int]:
        """Move the records of so many windows, in order, to ``output_file``, which appears complete or not at all.

        Every process must call it, and returns when the file is there, with the sums of the windows' counts.
        """
        self._exchange()
        with _processes.together():
            if _processes.rank() == 0:
                self._write(windows)
        with _processes.together():
            while self._journals:
                self._journals.pop().remove()
        return {name: sum(self.finished[number].counts[name] for number in range(windows)) for name in COUNTS}

    def _write(self, windows: int) -> None:
        with contextlib.ExitStack() as stack:
            names = sorted({window.journal for window in self.finished.values()})
            streams = {name: stack.enter_context(open(self._first.with_name(name), "rb")) for name in names}
            output = stack.enter_context(atomic_file(self.output_file))
            for number in range(windows):
                window = self.finished[number]
                stream = streams[window.journal]
                stream.seek(window.start)
                while stream.tell() < window.end:
                    if not (line := stream.readline()):
                        raise OSError(errno.EIO, "finished windows are gone from a journal", stream.name)
                    output.write(line.decode("utf-8"))

    def __enter__(self) -> "ScoreJournal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        while self._journals:
            self._journals.pop().close()
        if self._scratch:
            self._scratch.cleanup()


def _line(record: dict[str, Any]) -> bytes:
    """A record as JSON. What JSON has no form for, in fields that are not scored, becomes a string (dates of a table),
    null (NaN) or stays escaped (lone surrogates)."""
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False, default=str).encode("utf-8") + b"\n"
    except ValueError:
        return json.dumps(_without_nan(record), default=str).encode("ascii") + b"\n"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mark(content: dict[str, Any]) -> bytes:
    return MARK + json.dumps(content).encode("utf-8") + b"\n"
