"""What a record of a data file holds to score, and the record with its rewards."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rewardfuse.data import DataError, PreferencePair, RankedList, RatedResponse, SteppedSolution, Text, formats
from rewardfuse.data.checks import required_list, valid_response, valid_text
from rewardfuse.data.files import decode, raw_records
from rewardfuse.data.pair_formats import settle_votes
from rewardfuse.scoring import first_nonfinite

if TYPE_CHECKING:
    from rewardfuse.reward_head import HeadConfig

SINGLE_KEYS = ("response", "text", "messages")
KINDS = {  # of a converted record: what it is here, and the keys of its texts
    PreferencePair: ("pair", ("chosen", "rejected")),
    RankedList: ("list", ("responses",)),
    RatedResponse: ("single", ("response",)),
    SteppedSolution: ("steps", ("steps",)),
}


class Scorable(NamedTuple):
    """A record and its texts.

    Attributes:
        path, line: where it was read.
        fields: what the output keeps of it: the record as it was read, with the texts where a conversion made them.
        kind: ``"single"``, ``"pair"`` (chosen, rejected), ``"list"`` or ``"steps"``.
        prompt: of all its texts.
        texts: the responses; of ``"steps"`` the steps of one solution.
    """

    path: str
    line: int
    fields: dict[str, Any]
    kind: str
    prompt: Text | None
    texts: Sequence[Text]

    @property
    def source(self) -> str:
        return f"{self.path}:{self.line}"

    def names(self) -> list[str]:
        """What the reward of each text is called in messages."""
        if self.kind == "pair":
            return ["chosen_reward", "rejected_reward"]
        return ["reward"] if self.kind == "single" else [f"rewards[{index}]" for index in range(len(self.texts))]

    def with_rewards(self, rewards: Sequence[float], outputs: Sequence[Sequence[float]], head: "HeadConfig") -> dict:
        """The output record: ``chosen_reward`` and ``rejected_reward``, or ``rewards``, or ``reward``.

        Of a head with attributes each has an object of the attributes' values beside it (``reward_by_attribute``), of
        an ensemble a list of the heads' values and their standard deviation, ddof 0 (``reward_by_head``,
        ``reward_std``).

        Raises:
            DataError: a value that is not finite.
        """
        values = []
        for name, reward, output in zip(self.names(), rewards, outputs, strict=True):
            if (wrong := first_nonfinite([reward, *output])) is not None:
                raise DataError(self.path, self.line, f"the model's `{name}` is {wrong}, expected a finite number")
            values.append(_values(reward, output, head))
        made: dict[str, Any] = {}
        for suffix in values[0]:
            column = [value[suffix] for value in values]
            if self.kind == "list":
                made[f"rewards{suffix}"] = column
            else:
                made.update(zip([name + suffix for name in self.names()], column, strict=True))
        return {**self.fields, **made}

    def with_step_rewards(self, rewards: Sequence[float]) -> dict:
        """The output record of a solution: ``step_rewards``, null for steps that truncation cut off at the beginning,
        and ``reward``, the lowest of them.

        Raises:
            DataError: a reward that is not finite.
        """
        if (wrong := first_nonfinite(rewards)) is not None:
            raise DataError(self.path, self.line, f"the model's `step_rewards` hold {wrong}, expected finite numbers")
        absent = [None] * (len(self.texts) - len(rewards))
        return {**self.fields, "step_rewards": [*absent, *map(_short, rewards)], "reward": _short(min(rewards))}


def _values(reward: float, outputs: Sequence[float], head: "HeadConfig") -> dict[str, Any]:
    """What is written of one text, by the suffix of its key."""
    values: dict[str, Any] = {"": _short(reward)}
    if head.kind == "attributes":
        values["_by_attribute"] = {name: _short(value) for name, value in zip(head.names, outputs, strict=True)}
    elif head.kind == "ensemble":
        mean = math.fsum(outputs) / len(outputs)
        values["_by_head"] = [_short(value) for value in outputs]
        values["_std"] = _short(math.sqrt(math.fsum((value - mean) ** 2 for value in outputs) / len(outputs)))
    return values


def _short(value: float) -> float:
    return float(f"{value:.9g}")  # nine digits tell any two float32 apart


class ScorableRecords:
    """What there is to score in data files, in order, read anew by each iteration.

    ``responses``, or one of ``response``, ``text`` and ``messages``, are scored wherever they are found, with labels
    beside them or without. Every other record must be of one format, by default that of the first of them, and is
    converted as for training (:func:`rewardfuse.data.load_records`; of several votes the majority decides which
    response is ``chosen``).

    Attributes:
        skip_bad: whether bad records are left out, instead of raising.
        skipped: how many bad records the iteration has left out so far.
        left_out: what :meth:`leave_out` was given: messages by path and line.

    Raises:
        DataError: what :func:`rewardfuse.data.load_records` finds, or a record with nothing to score.
        ValueError: an unknown ``data_format``.
    """

    def __init__(self, paths: Sequence[str], data_format: str = "auto", skip_bad: bool = False):
        self._paths, self.skip_bad = paths, skip_bad
        self.left_out: dict[tuple[str, int], str] = {}
        self._named = None if data_format == "auto" else formats.named(data_format)
        self.skipped = 0

    def leave_out(self, record: Scorable, error: DataError) -> None:
        """Skip a record in later iterations: it is bad in a way that does not show in reading it."""
        self.left_out[record.path, record.line] = str(error)

    def __iter__(self) -> Iterator[Scorable]:
        self.skipped, self._format, first = 0, self._named, None
        found = False
        for path in self._paths:
            for line, raw in raw_records(path):
                reason = self.left_out.get((path, line))
                try:
                    records = self._scorable(path, line, decode(path, line, raw))
                except DataError as error:
                    if not self.skip_bad:
                        raise
                    reason = str(error)
                if reason is not None:
                    self.skipped, first = self.skipped + 1, first or reason
                    continue
                found = True
                yield from records
        if not found:
            raise DataError(self._paths[0], None, f"all {self.skipped} records were skipped, the first: {first}")

    def _scorable(self, path: str, line: int, record: dict[str, Any]) -> list[Scorable]:
        try:
            if self._named is None and not {"chosen", "rejected"} & set(record):
                prompt = None if record.get("prompt") is None else valid_text("prompt", record["prompt"])
                if "responses" in record:
                    return [Scorable(path, line, record, "list", prompt, _responses(record))]
                present = [key for key in SINGLE_KEYS if key in record]
                if len(present) == 1:
                    text = valid_response(present[0], record[present[0]])
                    return [Scorable(path, line, record, "single", prompt, [text])]
            return [_converted(path, line, record, each) for each in self._convert(record, f"{path}:{line}")]
        except ValueError as error:
            raise DataError(path, line, str(error)) from None

    def _convert(self, record: dict[str, Any], source: str) -> list[Any]:
        if self._format is None:
            try:
                self._format = formats.recognised(record)
            except ValueError as error:
                raise ValueError(f"{error}; or exactly one of {', '.join(SINGLE_KEYS)}") from None
        converted = self._format.convert(record, source)
        if self._format.voted:
            return [each for pair in converted for each in settle_votes(pair, "majority")]
        return converted


def _responses(record: dict[str, Any]) -> list[Text]:
    responses = required_list(record, "responses")
    if not responses:
        raise ValueError("`responses` must hold at least one response, got none")
    return [valid_response(f"responses[{index}]", text) for index, text in enumerate(responses)]


def _converted(path: str, line: int, fields: dict[str, Any], record: Any) -> Scorable:
    kind, keys = KINDS[type(record)]
    made = {key: getattr(record, key) for key in keys}
    texts = list(made.values()) if kind in ("single", "pair") else made[keys[0]]
    if kind == "pair" and record.target is not None:
        made["target"] = record.target
    added = {key: value for key, value in made.items() if key not in fields}
    return Scorable(path, line, {**fields, **added}, kind, record.prompt, texts)
