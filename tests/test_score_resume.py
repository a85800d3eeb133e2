"""Scoring that was stopped goes on where it stopped: no record twice, none lost, the same bytes in the end."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers

from rewardfuse import _score_records, cli, score
from rewardfuse._score_journal import ScoreJournal
from rewardfuse.byte_tokenizer import byte_tokenizer
from rewardfuse.reward_model import RewardModel
from rewardfuse.score import score_dataset

RECORDS = [{"prompt": "p ", "chosen": "good" * (index % 5 + 1), "rejected": "bad", "id": index} for index in range(11)]
RECORDS[4] = {"chosen": "", "rejected": "skipped"}
OPTIONS = {"batch_size": 2, "window_size": 3, "max_length": 16, "skip_bad": True}
COUNTS = {"records": 10, "responses": 20, "truncated": 3, "skipped": 1}


def make_model(seed=1):
    sizes = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    return RewardModel.from_config(transformers.LlamaConfig(**sizes, **heads, pad_token_id=256), seed=seed)


class Call:
    """A call of score_dataset that can be made again and again."""

    def __init__(self, folder):
        self.model, self.tokenizer = make_model(), byte_tokenizer()
        self.source, self.target = folder / "in.jsonl", folder / "out.jsonl"
        self.partial = folder / "out.jsonl.partial"
        self.write(RECORDS)

    def write(self, records):
        self.source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")

    def __call__(self, **changes):
        options = {**OPTIONS, **changes}
        return score_dataset(self.model, self.tokenizer, str(self.source), str(self.target), **options)

    def interrupted(self, monkeypatch, windows):
        """Make the call and stop it as Ctrl-C does after so many windows."""
        with monkeypatch.context() as patch:
            append = ScoreJournal.append

            def stop_at(journal, number, records, counts):
                if number == windows:
                    raise KeyboardInterrupt
                append(journal, number, records, counts)

            patch.setattr(ScoreJournal, "append", stop_at)
            with pytest.raises(KeyboardInterrupt):
                self()


@pytest.fixture
def call(tmp_path):
    return Call(tmp_path)


@pytest.fixture
def whole(call):
    """The bytes that an uninterrupted call writes."""
    result = call()
    assert {name: getattr(result, name) for name in COUNTS} == COUNTS and not call.partial.exists()
    content = call.target.read_bytes()
    call.target.unlink()
    return content


KILLED_RUN = """
    import os, signal, sys
    from pathlib import Path
    from rewardfuse._score_journal import Journal
    from test_score_resume import Call

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def at_sync(number):
        def sync(descriptor):
            at_sync.seen += 1
            return die() if at_sync.seen == number else None
        at_sync.seen = 0
        os.fsync = sync

    def in_the_middle_of_a_window():
        append = Journal.append
        def torn(journal, number, records, counts):
            if number == 0:
                return append(journal, number, records, counts)
            journal._stream.write(b'{"prompt": "p ", "chosen": "go')
            journal._stream.flush()
            die()
        Journal.append = torn

    def before_the_journal_goes():
        Path.unlink = die

    Call(Path(sys.argv[1]))()  # loads every module, once for all children
    moments = [lambda number=number: at_sync(number) for number in (1, 2, 3, 4, 5)]
    for index, moment in enumerate([*moments, in_the_middle_of_a_window, before_the_journal_goes]):
        folder = Path(sys.argv[1]) / str(index)
        folder.mkdir()
        call = Call(folder)
        child = os.fork()
        if not child:
            moment()
            call()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.WIFSIGNALED(status) and os.WTERMSIG(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_killed_at_any_moment_the_same_call_ends_with_the_same_bytes(call, whole, tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(KILLED_RUN), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["9"] * 7, done.stderr
    for index in range(7):
        again = Call(tmp_path / str(index))
        assert again.partial.exists()
        result = again()
        assert {name: getattr(result, name) for name in COUNTS} == COUNTS
        assert again.target.read_bytes() == whole and not again.partial.exists()


def test_journal_cut_at_any_byte_is_continued_to_the_same_bytes(call, whole, monkeypatch):
    monkeypatch.setattr(ScoreJournal, "publish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call()
    monkeypatch.undo()
    journal = call.partial.read_bytes()
    ends = [index for index in range(len(journal)) if journal[index : index + 1] == b"\n"]
    cuts = {cut for end in ends for cut in (end, end + 1, end + 2)} | set(range(0, len(journal), 211))
    for cut in sorted(cuts):
        call.partial.write_bytes(journal[:cut])
        call()
        assert call.target.read_bytes() == whole, f"cut at {cut}"
        call.target.unlink()


def test_finished_windows_are_not_scored_again(call, whole, monkeypatch):
    call.interrupted(monkeypatch, windows=2)
    assert not call.target.exists()
    scored, score_tokens = [], score.score_tokens

    def counted(model, tokenizer, sequences, **options):
        scored.extend(sequences)
        return score_tokens(model, tokenizer, sequences, **options)

    monkeypatch.setattr(score, "score_tokens", counted)
    result = call()
    assert len(scored) == 8 and result.responses == 20
    assert call.target.read_bytes() == whole


def test_only_a_window_of_records_is_read_ahead(call, monkeypatch):
    read, at_windows, decode, append = [], [], _score_records.decode, ScoreJournal.append
    monkeypatch.setattr(_score_records, "decode", lambda path, line, raw: read.append(line) or decode(path, line, raw))
    monkeypatch.setattr(ScoreJournal, "append", lambda *arguments: at_windows.append(len(read)) or append(*arguments))
    call()
    first_pass = len(RECORDS)
    assert at_windows == [first_pass + count for count in (3, 7, 10, 11)]  # the fifth record is skipped


def test_record_left_out_for_its_prompt_is_scored_or_counted_on_resuming(call, monkeypatch):
    call.write([RECORDS[0], {"prompt": "p" * 70, "response": "a"}, *RECORDS[1:]])
    result = call(max_length=None)
    whole = call.target.read_bytes()
    call.target.unlink()
    assert (result.records, result.skipped) == (10, 2)
    with monkeypatch.context() as patch:
        patch.setitem(OPTIONS, "max_length", None)
        call.interrupted(monkeypatch, windows=2)
    with pytest.raises(ValueError, match=r"differs: max_length \(was by default 64, is 64\)"):
        call(max_length=64)  # the long prompt is not left out then
    assert call(max_length=None) == result and call.target.read_bytes() == whole


def change_data(call):
    call.write(RECORDS[:-1])


def change_model(call):
    call.model = make_model(seed=2)


def change_tokenizer(call):
    call.tokenizer.chat_template = "{{ messages }}"


def change_nothing(call):
    pass


@pytest.mark.parametrize(
    ("change", "options", "named"),
    [
        (change_data, {}, "data"),
        (change_model, {}, "model"),
        (change_tokenizer, {}, "tokenizer"),
        (change_nothing, {"max_length": 20}, r"max_length \(was 16, is 20\)"),
        (change_nothing, {"batch_size": 3}, r"batch_size \(was 2, is 3\)"),
        (change_nothing, {"window_size": 4}, r"window_size \(was 3, is 4\)"),
    ],
)
def test_another_run_is_not_mixed_into_what_was_left(call, monkeypatch, change, options, named):
    call.interrupted(monkeypatch, windows=1)
    left = call.partial.read_bytes()
    change(call)
    with pytest.raises(ValueError, match=rf"out\.jsonl\.partial was left by an interrupted .* differs: {named}"):
        call(**options)
    assert call.partial.read_bytes() == left and not call.target.exists()
    call(**options, overwrite=True)
    content = call.target.read_bytes()
    call(**options)
    assert call.target.read_bytes() == content and not call.partial.exists()


def test_further_training_of_a_weight_makes_another_model_and_moving_it_does_not(call, monkeypatch, tmp_path):
    call.interrupted(monkeypatch, windows=1)
    call.model.save_pretrained(tmp_path / "moved")
    call.tokenizer.save_pretrained(tmp_path / "moved")
    flags = ["score", "--model_name_or_path", str(tmp_path / "moved"), "--dataset_name", str(call.source)]
    flags += ["--output_file", str(call.target), "--use_cpu", "--disable_tqdm", "--json", "--skip_bad"]
    flags += ["--batch_size", "2", "--window_size", "3", "--max_length", "16"]
    call.tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "moved")
    call.model = RewardModel.from_pretrained(tmp_path / "moved")
    call(overwrite=True)
    whole = call.target.read_bytes()
    call.interrupted(monkeypatch, windows=1)
    assert cli.main(flags) == 0
    assert call.target.read_bytes() == whole
    call.interrupted(monkeypatch, windows=1)
    with torch.no_grad():
        next(call.model.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(ValueError, match=r"differs: model \(was"):
        call()


@pytest.mark.parametrize("notes", ["my notes\n", "# My notes", '{"reward": 1}\n', "#{}\n"])
def test_file_of_somebody_else_in_the_way_is_left_alone(call, notes):
    call.partial.write_text(notes)
    with pytest.raises(ValueError, match="is in the way"):
        call(overwrite=True)
    assert call.partial.read_text() == notes and not call.target.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="files are locked in another way there")
def test_two_runs_at_once_do_not_mix_their_records(call, whole):
    with ScoreJournal(str(call.target), {"data": 1}) as other:
        other.append(0, [{"reward": 1.0}], {"records": 1, "responses": 1, "truncated": 0})
        with pytest.raises(ValueError, match="is being written by another run"):
            call()
        assert other.publish(1)["records"] == 1
    assert call.target.read_bytes() == b'{"reward": 1.0}\n'
    call()
    assert call.target.read_bytes() == whole


def test_nan_in_a_later_window_costs_the_windows_before_it(call, monkeypatch):
    call.write([*RECORDS, {"text": "ß"}])
    with torch.no_grad():
        call.model.backbone.embed_tokens.weight[0xC3] = torch.nan
    scored, score_window = [], score._score_window
    monkeypatch.setattr(score, "_score_window", lambda *a: scored.append(len(a[2])) or score_window(*a))
    for windows in ([3, 3, 3, 2], [2]):
        with pytest.raises(ValueError, match=r"in\.jsonl:12: the model's `reward` is nan"):
            call()
        assert scored == windows and call.partial.exists() and not call.target.exists()
        scored.clear()


def test_journal_of_an_older_format_is_another_runs(call, monkeypatch):
    call.interrupted(monkeypatch, windows=1)
    old = call.partial.read_bytes().replace(b', "journal": 2}}', b"}}").replace(b'"window": 0, ', b"")
    call.partial.write_bytes(old)
    with pytest.raises(ValueError, match=r"differs: journal \(was None, is 2\); overwrite"):
        call()
    assert call.partial.read_bytes() == old
    assert call(overwrite=True).records == 10


def test_data_that_changes_while_it_is_scored_gets_the_rewards_of_other_records(call, monkeypatch):
    digest = score.digest_files
    monkeypatch.setattr(score, "digest_files", lambda paths: (digest(paths), call.write(RECORDS[:7]))[0])
    with pytest.raises(ValueError, match="the data files were changed while they were read"):
        call()
    assert not call.target.exists()


def test_disk_that_fills_up_later_costs_no_finished_window(call, whole, monkeypatch):
    with monkeypatch.context() as patch:
        synced = []

        def full(descriptor):
            synced.append(descriptor)
            if len(synced) > 2:
                raise OSError(28, "No space left on device")

        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            call()
    assert call.partial.read_bytes().count(b'"chosen_reward"') >= 6 and not call.target.exists()
    assert call().records == 10 and call.target.read_bytes() == whole
