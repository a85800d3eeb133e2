"""Scoring by several processes: the bytes of one, from wherever another number of them was stopped, and nobody waits
for a process that has failed.

Most tests run the processes as threads that meet where processes would (``Job``); the last one runs real ones.
"""

import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
import transformers

from rewardfuse import _processes
from rewardfuse._processes import OtherProcessError
from rewardfuse._score_journal import Journal, ScoreJournal, journal_numbers
from rewardfuse.byte_tokenizer import byte_tokenizer
from rewardfuse.data import DataError
from rewardfuse.reward_model import RewardModel
from rewardfuse.score import ScoreResult, score_dataset

LONG = {"prompt": "p" * 70, "response": "does not fit"}
RECORDS = [
    {"prompt": "p ", "chosen": "a long answer", "rejected": "b", "id": 1},
    LONG,
    {"response": "ä", "prompt": "q"},
    {"text": "plain text"},
    {"chosen": "", "rejected": "skipped"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    {"prompt": "p ", "responses": ["one", "two", "three"], "note": "\ud800"},
    LONG,
    {"text": "z"},
    {"chosen": "x", "rejected": "y" * 30},
    {"text": "c" * 80},
    {"prompt": "p ", "responses": ["one"]},
    {"text": "end"},
]
OPTIONS = {"batch_size": 2, "window_size": 2, "skip_bad": True}
WINDOWS = 5  # of 10 records, the last three are left out


def make_model(seed=1):
    sizes = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    config = transformers.LlamaConfig(**sizes, **heads, pad_token_id=256)
    return RewardModel.from_config(config, seed=seed).eval()


class Job:
    """Runs a function as several processes, each a thread."""

    def __init__(self, monkeypatch):
        self.here = threading.local()
        self.count = 1
        monkeypatch.setattr(_processes, "count", lambda: self.count)
        monkeypatch.setattr(_processes, "rank", lambda: getattr(self.here, "rank", 0))
        monkeypatch.setattr(_processes, "gather", self.gather)
        monkeypatch.setattr(_processes, "connect", lambda use_cpu=False: None)

    def gather(self, value):
        if self.count == 1:
            return [value]
        self.values[self.here.rank] = pickle.dumps(value)
        self.barrier.wait()
        values = [pickle.loads(each) for each in self.values]
        self.barrier.wait()
        return values

    def run(self, count, work):
        """What ``work(rank)`` returned or raised, by rank; a process that waits in vain raises BrokenBarrierError."""
        self.count, self.values, self.barrier = count, [None] * count, threading.Barrier(count, timeout=30)
        outcomes = [None] * count

        def process(rank):
            self.here.rank = rank
            torch.set_num_threads(1)
            try:
                outcomes[rank] = work(rank)
            except Exception as error:
                outcomes[rank] = error

        threads = [threading.Thread(target=process, args=(rank,)) for rank in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.count = 1
        return outcomes


class Call:
    """A call of score_dataset that any number of processes can make."""

    def __init__(self, folder, job):
        self.job, self.model, self.folder = job, make_model(), folder
        self.source, self.target = folder / "in.jsonl", folder / "out.jsonl"
        self.write(RECORDS)

    def write(self, records):
        self.source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")

    def __call__(self, count, options=None, models=None, **changes):
        """The outcomes; ``options`` and ``models`` differ by rank."""

        def work(rank):
            own = (options or {}).get(rank, {})
            model = (models or {}).get(rank, self.model)
            files = str(self.source), str(self.target)
            return score_dataset(model, byte_tokenizer(), *files, **{**OPTIONS, **changes, **own})

        return self.job.run(count, work)

    def partial(self, number=0):
        return self.folder / ("out.jsonl.partial" + (f".{number}" if number else ""))

    def left(self):
        return sorted(path.name.removeprefix("out.jsonl.") for path in self.folder.iterdir() if path != self.source)

    def stopped(self, monkeypatch, count, window, **changes):
        """Make the call, and let the process that comes to this window fail there; return the windows on disk."""
        with monkeypatch.context() as patch:
            append = Journal.append

            def fail_at(journal, number, *arguments):
                if number == window:
                    raise OSError(28, "No space left on device")
                append(journal, number, *arguments)

            patch.setattr(Journal, "append", fail_at)
            outcomes = self(count, **changes)
        assert sum(isinstance(outcome, OSError) for outcome in outcomes) == 1
        assert all(isinstance(outcome, OSError | OtherProcessError) for outcome in outcomes)
        marks = [line for path in self.folder.glob("*.partial*") for line in path.read_bytes().splitlines()]
        return sorted(json.loads(mark[1:])["window"] for mark in marks if mark.startswith(b'#{"window"'))


@pytest.fixture
def job(monkeypatch):
    return Job(monkeypatch)


@pytest.fixture
def call(tmp_path, job):
    return Call(tmp_path, job)


@pytest.fixture
def whole(call):
    """The bytes that one process writes."""
    [result] = call(1)
    assert result == ScoreResult(str(call.target), records=10, responses=14, truncated=1, skipped=3)
    content = call.target.read_bytes()
    call.target.unlink()
    return content


@pytest.fixture
def scored(monkeypatch):
    """The numbers of the windows that are scored."""
    numbers, append = [], ScoreJournal.append
    seen = lambda journal, number, *rest: numbers.append(number) or append(journal, number, *rest)  # noqa: E731
    monkeypatch.setattr(ScoreJournal, "append", seen)
    return numbers


@pytest.mark.parametrize("count", [2, 3, 7])
def test_output_depends_on_the_number_of_processes(call, whole, scored, count):
    outcomes = call(count)
    assert outcomes == [ScoreResult(str(call.target), records=10, responses=14, truncated=1, skipped=3)] * count
    assert call.target.read_bytes() == whole and call.left() == ["out.jsonl"]
    assert sorted(scored) == list(range(WINDOWS))


@pytest.mark.parametrize(
    ("before", "window", "after", "done"),
    [
        (1, 2, 2, [0, 1]),
        (2, 2, 1, [0, 1, 3]),
        (3, 4, 2, [0, 1, 2, 3]),
        (5, 3, 2, [0, 1, 2, 4]),
        (2, 1, 4, [0]),
    ],
)
def test_another_number_of_processes_repeats_or_loses_a_window(
    call, whole, monkeypatch, scored, before, window, after, done
):
    assert call.stopped(monkeypatch, before, window) == done
    for path in call.folder.glob("*.partial*"):  # of each process
        path.write_bytes(path.read_bytes() + b'{"prompt": "p ", "chos')
    scored.clear()
    outcomes = call(after)
    assert outcomes == [ScoreResult(str(call.target), records=10, responses=14, truncated=1, skipped=3)] * after
    assert call.target.read_bytes() == whole and call.left() == ["out.jsonl"]
    assert sorted(scored) == [number for number in range(WINDOWS) if number not in done]


def test_window_that_two_journals_hold_is_written_twice(call, whole, monkeypatch, scored):
    call.stopped(monkeypatch, 2, 4)
    for number in (3, 4, 8):
        call.partial(number).write_bytes(call.partial(number % 2).read_bytes())
    scored.clear()
    assert all(result.records == 10 for result in call(2))
    assert call.target.read_bytes() == whole and scored == [4] and call.left() == ["out.jsonl"]


def test_stopped_again_and_again_by_changing_numbers_of_processes(call, whole, monkeypatch):
    for count, window in ((3, 1), (1, 3), (4, 4)):
        call.stopped(monkeypatch, count, window)
    assert call(2)[0].records == 10
    assert call.target.read_bytes() == whole and call.left() == ["out.jsonl"]


@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_journal_of_another_run_is_mixed_in_or_harmed(call, whole, monkeypatch, number):
    call.stopped(monkeypatch, 1, 2, batch_size=3)
    call.partial().rename(call.folder / "other")
    call.stopped(monkeypatch, 2, 4)
    (call.folder / "other").rename(call.partial(number))
    for path in call.folder.glob("*.partial*"):  # which is to be cut, but not before all have agreed
        path.write_bytes(path.read_bytes() + b'{"prompt": "p ", "chos')
    before = {path.name: path.read_bytes() for path in call.folder.iterdir()}
    for outcome in call(2):
        assert isinstance(outcome, ValueError)
        assert "was left by an interrupted run that differs: batch_size (was 3, is 2)" in str(outcome)
    assert {path.name: path.read_bytes() for path in call.folder.iterdir()} == before
    assert call(2, overwrite=True)[1].records == 10
    assert call.target.read_bytes() == whole and call.left() == ["out.jsonl"]


def test_file_of_somebody_else_is_taken_for_a_journal(call):
    call.partial(3).write_text("my notes\n")
    for outcome in call(2, overwrite=True):
        assert isinstance(outcome, ValueError) and "out.jsonl.partial.3 is in the way" in str(outcome)
    assert call.left() == ["partial.3"] and call.partial(3).read_text() == "my notes\n"


def test_journals_get_no_keeper_or_two(tmp_path):
    first = tmp_path / "out.jsonl.partial"
    names = ["", ".1", ".2", ".3", ".7", ".10", ".08", ".x", ".²", ".1.gz"]
    for name in names:
        first.with_name(first.name + name).touch()
    assert [journal_numbers(first, rank, 3) for rank in range(3)] == [[0, 3], [1, 7, 10], [2]]
    assert journal_numbers(first, 0, 1) == [0, 1, 2, 3, 7, 10]
    assert [journal_numbers(first, rank, 20) for rank in (0, 1, 19)] == [[0], [1], [19]]


@pytest.mark.skipif(sys.platform == "win32", reason="files are locked in another way there")
@pytest.mark.parametrize("number", [0, 1, 4])
def test_run_with_a_process_that_is_still_alive_is_joined(call, number):
    journal = Journal(call.partial(number))
    journal.begin({})
    for outcome in call(2):
        assert isinstance(outcome, ValueError) and f"{journal.path} is being written by another run" in str(outcome)
    journal.close()
    assert call.left() == []


def test_bad_record_that_one_process_sees_lets_the_others_wait(call, scored):
    call.write([*[{"text": "a"}] * 5, LONG, {"text": "b"}])  # of the windows 0, 1, 2, 3 process 2 checks the bad one
    outcomes = call(3, skip_bad=False)
    assert [type(outcome) for outcome in outcomes] == [OtherProcessError, OtherProcessError, DataError]
    assert "in.jsonl:6: the prompt alone has 71 tokens" in str(outcomes[2])
    assert str(outcomes[0]) == f"process 2 failed: {outcomes[2]}"
    assert call.left() == [] and scored == []


def test_records_that_no_process_can_use_leave_an_empty_output(call):
    call.write([LONG] * 5)
    for outcome in call(2):
        assert isinstance(outcome, DataError)
        assert "all 5 records were skipped, the first:" in str(outcome) and "in.jsonl:1: the prompt" in str(outcome)
    assert call.left() == []


@pytest.mark.parametrize(
    ("options", "models", "message"),
    [
        ({1: {"batch_size": 3}}, {}, r"given different options or data: batch_size \(2 and 3\)"),
        ({1: {"skip_bad": False}}, {}, r"different options or data: skip_bad \(true and false\)"),
        ({1: {"window_size": 0}}, {}, "window_size must be at least 1, got 0"),
        ({}, {1: make_model(seed=2)}, "different options or data: model"),
    ],
)
def test_processes_with_different_work_mix_their_windows(call, options, models, message):
    for outcome in call(3, options, models):
        with pytest.raises(ValueError, match=message):
            raise outcome
    assert call.left() == []


def test_nan_found_by_one_process_costs_the_windows_of_all(call, scored):
    call.write([*[{"text": "a"}] * 5, {"text": "ß"}, *[{"text": "b"}] * 6])
    with torch.no_grad():
        call.model.backbone.embed_tokens.weight[0xC3] = torch.nan
    nan, other = call(2)
    assert isinstance(nan, DataError) and "in.jsonl:6: the model's `reward` is nan" in str(nan)
    assert isinstance(other, OtherProcessError)
    assert sorted(scored) in ([0, 1], [0, 1, 3])  # and none of the later turns
    assert call.left() == ["partial", "partial.1"]


def test_folder_that_one_process_does_not_see_splits_the_output(call, monkeypatch):
    exists = Path.exists
    unseen = lambda path, **options: exists(path, **options) and _processes.rank() != 1  # noqa: E731
    monkeypatch.setattr(Path, "exists", unseen)
    for outcome in call(2):
        assert isinstance(outcome, ValueError)
        assert "must lie in a folder that all processes see; process 1 does not see" in str(outcome)
    assert call.left() == []


def test_journal_that_shrinks_before_the_end_makes_publishing_endless(call, monkeypatch):
    write = ScoreJournal._write

    def shrunk(journal, windows):
        os.truncate(call.partial(1), os.path.getsize(call.partial(1)) - 100)
        write(journal, windows)

    monkeypatch.setattr(ScoreJournal, "_write", shrunk)
    gone, other = call(2)
    assert isinstance(gone, OSError) and "finished windows are gone" in str(gone)
    assert isinstance(other, OtherProcessError) and not call.target.exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_gets_the_scores_of_process_0_only(call, whole):
    os.mkfifo(call.target)
    read = []
    reader = threading.Thread(target=lambda: read.append(call.target.read_bytes()), daemon=True)
    reader.start()
    assert all(result.records == 10 for result in call(2))
    reader.join(30)
    assert read == [whole] and call.left() == ["out.jsonl"]


REAL = """
    import contextlib, io, json, os, signal, sys
    from pathlib import Path
    from rewardfuse import _processes, cli
    from rewardfuse._score_journal import Journal

    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    model = ["score", "--model_name_or_path", str(folder / "model"), "--json", "--use_cpu", "--disable_tqdm"]

    def run(name, *flags, source="in.jsonl"):
        files = ["--dataset_name", str(folder / source), "--output_file", str(folder / name)]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main([*model, *files, "--batch_size", "2", "--window_size", "2", *flags])
        said = [code, out.getvalue(), err.getvalue()]
        (folder / f"{name}.{rank}.json").write_text(json.dumps(said))

    _processes.connect(use_cpu=True)  # for all runs: the first would part the processes at its end
    run("whole", "--skip_bad")
    run("resumed", "--skip_bad")
    run("bad", source="bad.jsonl")
    run("other", "--batch_size", str(2 + rank), "--skip_bad")
    run("absent", source="in.jsonl" if rank else "absent.jsonl")

    processes = _processes.gather(os.getpid())
    append = Journal.append

    def killed(journal, number, records, counts):
        if number == 3:  # process 1 in its second turn
            journal._stream.write(b'{"text": "torn')
            journal._stream.flush()
            for process in processes:
                os.kill(process, signal.SIGKILL)
        append(journal, number, records, counts)

    Journal.append = killed
    run("killed", "--skip_bad")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="processes are killed in another way there")
def test_real_processes_differ_from_one_or_wait_for_a_failed_one(call, whole, monkeypatch, tmp_path):
    call.model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    model = RewardModel.from_pretrained(tmp_path / "model")

    def alone(target):
        return score_dataset(model, tokenizer, str(call.source), str(tmp_path / target), **OPTIONS)

    with monkeypatch.context() as patch:
        patch.setattr(ScoreJournal, "publish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            alone("resumed")
    left = (tmp_path / "resumed.partial").read_bytes()
    (tmp_path / "resumed.partial").write_bytes(left[: left.index(b'#{"window": 2')])
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n' * 3 + json.dumps(LONG) + "\n")
    (tmp_path / "driver.py").write_text(textwrap.dedent(REAL))

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(tmp_path / "driver.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode != 0 and "SIGKILL" in done.stderr, done.stderr

    said = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.?.json")}
    for name in ("whole", "resumed"):
        assert (tmp_path / name).read_bytes() == whole
        first, second = said[f"{name}.0.json"], said[f"{name}.1.json"]
        assert json.loads(first[1])["records"] == 10 and second[1] == ""  # printed once
        assert first[0] == second[0] == 0
    for name, message in {
        "bad": "bad.jsonl:4: the prompt alone has 71 tokens",
        "other": "different options or data: batch_size (2 and 3)",
        "absent": "absent.jsonl",
    }.items():
        for rank in (0, 1):
            code, _, printed = said[f"{name}.{rank}.json"]
            assert code == 2 and message in printed, (name, rank, printed)
        assert not list(tmp_path.glob(f"{name}*partial*")) and not (tmp_path / name).exists()

    assert not (tmp_path / "killed").exists() and len(list(tmp_path.glob("killed.partial*"))) == 2
    assert alone("killed").records == 10
    assert (tmp_path / "killed").read_bytes() == whole and not list(tmp_path.glob("killed.partial*"))
