"""Score data files with a reward model: every record gets the rewards of its responses.

Records are scored in windows, in the order of the files, and a finished window is saved (``_score_journal``): a call
that was stopped at any moment goes on there when it is made again, and the output is byte for byte that of an
uninterrupted one on the same machine. Memory is bounded by the window, not by the files.

Several processes (``torchrun``, ``accelerate launch``) share the windows out among them. What a window's scores are
does not depend on anything outside it, so the output is the same for any number of processes.
"""

import os
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

import rewardfuse
from rewardfuse import _processes
from rewardfuse._score_identity import digest_files, digest_model, digest_tokenizer
from rewardfuse._score_journal import ScoreJournal
from rewardfuse._score_records import Scorable, ScorableRecords
from rewardfuse.data import DataError
from rewardfuse.scoring import check_count, check_options, score_sequences, score_steps, score_tokens
from rewardfuse.step_batching import Steps, tokenize_steps
from rewardfuse.tokenizing import DefaultLength, check_token_ids, tokenize_each
from rewardfuse.trained_options import scoring_length, scoring_separator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rewardfuse.reward_model import RewardModel

__all__ = ["ScoreResult", "score_dataset", "score_sequences"]


@dataclass(frozen=True)
class ScoreResult:
    """Counts of a run: records scored, their responses (of solutions: one each), those of them that were truncated at
    the beginning, and records skipped."""

    output_file: str
    records: int
    responses: int
    truncated: int
    skipped: int


def score_dataset(
    model: "RewardModel",
    tokenizer: "PreTrainedTokenizerBase",
    dataset_name: str | Sequence[str],
    output_file: str,
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    step_separator: str | None = None,
    data_format: str = "auto",
    skip_bad: bool = False,
    normalize_reward: bool = False,
    window_size: int = 1024,
    overwrite: bool = False,
    progress: bool = False,
) -> ScoreResult:
    """Copy the records of data files to ``output_file`` as JSON lines, in order, each with its rewards added.

    Pairs get ``chosen_reward`` and ``rejected_reward``; lists (``responses``) get ``rewards``; single texts
    (``response``, ``text`` or ``messages``, with or without ``prompt``) get ``reward``; solutions in steps get
    ``step_rewards`` and the lowest of them as ``reward``. Beside them stand the values of attributes or of an
    ensemble's heads (:meth:`rewardfuse._score_records.Scorable.with_rewards`), and the texts where a format has them
    under other keys. Rewards that are there already are replaced.

    Every record is checked, and tokenized, before the first is scored. Responses run through the model longest first
    within a window, in batches of like length; the model stays on its device. The output appears, or is replaced, when
    it is complete.

    Under a launcher of several processes every one of them must make the same call, each with the model on a device of
    its own and ``output_file`` in a folder that all of them see. They score a window each at a time, and all return,
    with the same result, when the output is there. What fails in one fails in all. A call that was stopped goes on with
    any number of processes.

    Args:
        dataset_name: one file or several, whose records follow one another.
        step_separator: what ends each step of a solution. By default as the model was trained.
        data_format: as in :func:`rewardfuse.data.load_records`; labels are not needed.
        skip_bad: leave bad records out of the output and count them, instead of raising.
        normalize_reward: see :func:`rewardfuse.scoring.score_inputs`; ``batch_size`` and ``max_length`` too.
        window_size: records scored and saved at once; a call that was stopped loses at most so many.
        overwrite: start anew where ``<output_file>.partial`` was left by a run with other data, model or options.

    Raises:
        DataError: what :func:`rewardfuse.data.read_records` finds, a record with nothing to score, a prompt that does
            not fit, or a token that the model has no embedding for: before anything is scored. Or a reward that is not
            finite; finished windows are kept.
        TypeError: ``batch_size``, ``max_length`` or ``window_size`` is no integer.
        ValueError: an option out of range, an output file that is one of the data files, a damaged
            ``train_options.json`` beside the model, or what an interrupted run with other data, model or options left.
            Of several processes also: other options, data or model in one of them, or a folder that one does not see.
        OSError: the output cannot be written; finished windows are kept.
        OtherProcessError: another process failed, a ValueError.
    """
    _processes.connect(use_cpu=model.device.type == "cpu")
    with _processes.together():
        check_options(model, batch_size, normalize_reward)
        check_count("window_size", window_size)
        paths = [dataset_name] if isinstance(dataset_name, str | os.PathLike) else list(dataset_name)
        _check_output(output_file, paths)
        longest = scoring_length(tokenizer, model, max_length)
        reading = {"max_length": longest, "step_separator": scoring_separator(model, step_separator)}
        records = ScorableRecords(paths, data_format, skip_bad)
    scoring = {"batch_size": batch_size, "normalize_reward": normalize_reward}
    options = {
        "data_format": data_format,
        **reading,
        "max_length": f"by default {longest}" if isinstance(longest, DefaultLength) else longest,  # what fits differs
        **scoring,
        "window_size": window_size,
    }
    files = {"dataset_name": paths, "output_file": output_file, "skip_bad": skip_bad, "overwrite": overwrite}
    _processes.check_same({**files, **options})
    total = _check_records(model, tokenizer, records, reading, window_size)
    skipped = records.skipped
    with _processes.together():
        identity = {
            "data": digest_files(paths),
            "model": digest_model(model),
            "tokenizer": digest_tokenizer(tokenizer),
            **options,
            "device": model.device.type,
            "versions": [rewardfuse.__version__, torch.__version__],
        }
    _processes.check_same(identity)
    with ScoreJournal(output_file, identity, overwrite) as journal:
        options = {**scoring, "progress": progress and _processes.rank() == 0}
        _score_windows(model, tokenizer, records, journal, total, window_size, reading, options)
        counts = journal.publish(_window_count(total, window_size))
    return ScoreResult(str(output_file), skipped=skipped, **counts)


def _check_output(output_file: str, paths: Sequence[str]) -> None:
    for path in paths:
        if os.path.exists(path) and os.path.exists(output_file) and os.path.samefile(path, output_file):
            raise ValueError(f"output_file {output_file} must be another file than the data, got the same as {path}")


def _check_records(
    model: "RewardModel",
    tokenizer: "PreTrainedTokenizerBase",
    records: ScorableRecords,
    reading: dict[str, Any],
    window_size: int,
) -> int:
    """Read all records, tokenize this process's share of them, and return how many there are to score.

    What cannot be tokenized is refused, or left out of ``records`` in every process where they skip bad ones: found in
    its own window only, it would cost those that were scored before.
    """
    total = 0
    with _processes.together():
        for number, window in enumerate(_windows(iter(records), window_size)):
            total += len(window)
            if number % _processes.count() == _processes.rank():
                _check_window(model, tokenizer, window, records, reading)
    for left_out in _processes.gather(records.left_out):
        records.left_out.update(left_out)
    with _processes.together():
        # a line of several records is left out with all of them
        return sum(1 for _ in records) if records.left_out else total


def _check_window(
    model: "RewardModel",
    tokenizer: "PreTrainedTokenizerBase",
    window: list[Scorable],
    records: ScorableRecords,
    reading: dict[str, Any],
) -> None:
    try:
        _tokenize(model, tokenizer, window, reading)
    except DataError:
        if not records.skip_bad:
            raise
        for record in window:
            try:
                _tokenize(model, tokenizer, [record], reading)
            except DataError as error:
                records.leave_out(record, error)


def _windows(records: Iterator[Scorable], size: int) -> Iterator[list[Scorable]]:
    while window := list(islice(records, size)):
        yield window


def _window_count(total: int, window_size: int) -> int:
    return -(-total // window_size)


def _turns(windows: int, finished: Container[int], count: int) -> list[list[int]]:
    """The numbers of the windows that are left to score, as many a turn as there are processes: each takes the one at
    its own place, or none."""
    left = [number for number in range(windows) if number not in finished]
    return [left[start : start + count] for start in range(0, len(left), count)]


def _score_windows(
    model: "RewardModel",
    tokenizer: "PreTrainedTokenizerBase",
    records: ScorableRecords,
    journal: ScoreJournal,
    total: int,
    window_size: int,
    reading: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Score this process's share of the windows that the journal does not have.

    The processes wait for one another after each window: so all of them stop soon after one has failed, and none waits
    so long at the end that the connection gives up.
    """
    turns = _turns(_window_count(total, window_size), journal.finished, _processes.count())
    sizes = {number: min(window_size, total - number * window_size) for turn in turns for number in turn}
    rank, windows = _processes.rank(), enumerate(_windows(iter(records), window_size))
    with tqdm(total=total, initial=total - sum(sizes.values()), desc="records", disable=not options["progress"]) as bar:
        for turn in turns:
            with _processes.together():
                if rank < len(turn):
                    mine = turn[rank]
                    window = next((window for number, window in windows if number == mine), [])
                    if len(window) != sizes[mine]:
                        raise ValueError("the data files were changed while they were read")
                    journal.append(mine, *_score_window(model, tokenizer, window, reading, options))
            bar.update(sum(sizes[number] for number in turn))


def _tokenize(
    model: "RewardModel", tokenizer: "PreTrainedTokenizerBase", records: list[Scorable], reading: dict[str, Any]
) -> tuple[list[list[int]], list[bool], list[Steps]]:
    """Token ids of the texts of records and whether each was truncated, and the solutions among the records."""
    plain = [record for record in records if record.kind != "steps"]
    texts = [(record.prompt, text) for record in plain for text in record.texts]
    sources = [record.source for record in plain for _ in record.texts]
    ids, truncated = tokenize_each(texts, tokenizer, reading["max_length"], sources=sources)
    check_token_ids(ids, tokenizer, model, sources=sources)

    stepped = [record for record in records if record.kind == "steps"]
    solutions = [(record.prompt, record.texts) for record in stepped]
    sources = [record.source for record in stepped]
    # Not all tokenizers have a token for the separator: without solutions none is needed.
    tokenized = tokenize_steps(solutions, tokenizer, sources=sources, **reading) if solutions else []
    check_token_ids([steps.input_ids for steps in tokenized], tokenizer, model, sources=sources)
    return ids, truncated, tokenized


def _score_window(
    model: "RewardModel",
    tokenizer: "PreTrainedTokenizerBase",
    window: list[Scorable],
    reading: dict[str, Any],
    options: dict[str, Any],
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The window's output records, and its counts."""
    ids, truncated, solutions = _tokenize(model, tokenizer, window, reading)
    rewards, outputs = (iter(values.tolist()) for values in score_tokens(model, tokenizer, ids, **options))
    step_rewards = iter(score_steps(model, tokenizer, solutions, **options))
    head, scored = model.head_config, []
    for record in window:
        if record.kind == "steps":
            scored.append(record.with_step_rewards(next(step_rewards)))
        else:
            count = len(record.texts)
            scored.append(record.with_rewards(list(islice(rewards, count)), list(islice(outputs, count)), head))
    cut = sum(truncated) + sum(steps.truncated for steps in solutions)
    return scored, {"records": len(window), "responses": len(ids) + len(solutions), "truncated": cut}
