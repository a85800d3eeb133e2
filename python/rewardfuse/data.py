"""Preference pairs: reading and checking data files, splitting off held-out records (``batching`` makes tensors).

A data file is ``.jsonl`` (one JSON object a line) or ``.json`` (one list of objects), either also gzipped (``.gz``),
in UTF-8. A pair is TRL's: ``chosen`` and ``rejected``, with or without ``prompt``, each a string or a list of chat
messages ``{"role", "content"}``; optionally the numbers ``margin``, ``weight`` (>= 0) and ``target`` (in [0, 1], the
probability that ``chosen`` is the better one). Other keys are ignored. Ranked lists: see ``ranked_lists``.
"""

import gzip
import json
import math
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Record = TypeVar("Record")
Text = str | list[dict[str, Any]]  # plain text, or chat messages
PAIR_NUMBERS = {"margin": 0.0, "weight": 1.0, "target": 1.0}  # optional numbers of a pair, and what absence means


class DataError(ValueError):
    """A data file that cannot be used; the message is one line, ``file:line: what is wrong``."""

    def __init__(self, path: object, line: int | None, message: str):
        super().__init__(f"{path}:{line}: {message}" if line is not None else f"{path}: {message}")


@dataclass(frozen=True)
class PreferencePair:
    """Two responses to one prompt, the first preferred. ``source`` says where it was read, ``file:line``."""

    chosen: Text
    rejected: Text
    prompt: Text | None = None
    margin: float | None = None
    weight: float | None = None
    target: float | None = None
    source: str = "pair"


def read_records(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield ``(line, object)`` for every JSON object of the file; lines count from 1 (for ``.json``: list items do).

    Raises:
        DataError: missing or empty file, damaged gzip, bytes that are not UTF-8, invalid JSON, or something other than
            an object.
    """
    name = str(path).removesuffix(".gz")
    if not name.endswith((".jsonl", ".json")):
        raise DataError(path, None, "expected a file named .jsonl, .json, .jsonl.gz or .json.gz")
    if name.endswith(".jsonl"):
        lines = ((line, raw.rstrip(b"\r\n")) for line, raw in _raw_lines(path) if raw.strip())
        records = ((line, _parse(path, line, raw)) for line, raw in lines)
    else:
        records = enumerate(_read_list(path), 1)
    empty = True
    for line, record in records:
        empty = False
        if not isinstance(record, dict):
            raise DataError(path, line, f"expected a JSON object, got {kind_of(record)}")
        yield line, record
    if empty:
        raise DataError(path, None, "the file holds no records")


def _raw_lines(path: str) -> Iterator[tuple[int, bytes]]:
    line = 0
    try:
        with gzip.open(path, "rb") if str(path).endswith(".gz") else open(path, "rb") as stream:
            for line, raw in enumerate(stream, 1):
                yield line, raw
    except FileNotFoundError:
        raise DataError(path, None, "no such file") from None
    except IsADirectoryError:
        raise DataError(path, None, "expected a file, got a folder") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(path, line + 1, f"damaged gzip file ({error})") from None


def _read_list(path: str) -> list:
    raw = b"".join(raw for _, raw in _raw_lines(path))
    if not raw.strip():
        return []
    records = _parse(path, 1, raw)
    if not isinstance(records, list):
        raise DataError(path, 1, f"expected a JSON list of objects, got {kind_of(records)}; name one a line .jsonl")
    return records


def _parse(path: str, first_line: int, raw: bytes) -> Any:
    try:
        text = raw.decode("utf-8-sig" if first_line == 1 else "utf-8")
        return json.loads(text, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        raise DataError(path, line, f"not UTF-8 (byte 0x{raw[error.start]:02x})") from None
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(path, line, f"invalid JSON, {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(path, first_line, f"invalid JSON, {error}") from None


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def read_pairs(path: str) -> list[PreferencePair]:
    """Read every preference pair of a file; see the module's description for the format.

    Raises:
        DataError: whatever :func:`read_records` finds, a missing ``chosen`` or ``rejected``, a wrong type, a number
            that is not finite, a negative ``weight``, or a ``target`` outside [0, 1].
    """
    return [parse_pair(path, line, record) for line, record in read_records(path)]


def parse_pair(path: str, line: int, record: dict[str, Any]) -> PreferencePair:
    """Check one record and make it a :class:`PreferencePair`; raises :class:`DataError`."""
    numbers = {key: parse_number(path, line, record, key) for key in PAIR_NUMBERS}
    if numbers["weight"] is not None and numbers["weight"] < 0:
        raise DataError(path, line, f"`weight` must be at least 0, got {numbers['weight']}")
    if numbers["target"] is not None and not 0 <= numbers["target"] <= 1:
        raise DataError(path, line, f"`target` must lie in [0, 1], got {numbers['target']}")
    return PreferencePair(
        chosen=parse_text(path, line, record, "chosen"),
        rejected=parse_text(path, line, record, "rejected"),
        prompt=parse_text(path, line, record, "prompt") if record.get("prompt") is not None else None,
        source=f"{path}:{line}",
        **numbers,
    )


def parse_text(path: str, line: int, record: dict[str, Any], key: str) -> Text:
    """Check that ``record[key]`` is a string or a list of chat messages; raises :class:`DataError`."""
    if key not in record:
        raise DataError(path, line, f"no `{key}` (found: {', '.join(map(repr, record)) or 'no key at all'})")
    return check_text(path, line, key, record[key])


def check_text(path: str, line: int, name: str, value: Any) -> Text:
    """Check that ``value`` is a string or a list of chat messages; raises :class:`DataError` naming it ``name``."""
    if isinstance(value, list) and value:
        for message in value:
            strings = isinstance(message, dict) and [message.get("role"), message.get("content")]
            if not strings or not all(isinstance(string, str) for string in strings):
                raise DataError(path, line, f"`{name}`: a message must have the strings `role` and `content`")
            _check_encodable(path, line, name, "".join(strings))
    elif isinstance(value, str):
        _check_encodable(path, line, name, value)
    else:
        raise DataError(path, line, f"`{name}` must be a string or a list of chat messages, got {kind_of(value)}")
    return value


def _check_encodable(path: str, line: int, name: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(path, line, f"`{name}` holds a lone surrogate at character {error.start}") from None


def parse_number(path: str, line: int, record: dict[str, Any], key: str) -> float | None:
    """Check that ``record[key]``, if there is one, is a finite number; raises :class:`DataError`."""
    value = record.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(path, line, f"`{key}` must be a number, got {kind_of(value)}")
    number = to_float(value)
    if not math.isfinite(number):
        raise DataError(path, line, f"`{key}` must be a finite number, got {number}")
    return number


def to_float(value: float) -> float:
    """``float(value)``, infinite for an int beyond the range of floats."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def kind_of(value: Any) -> str:
    """What a JSON value is, for messages."""
    names = {type(None): "null", bool: "a boolean", str: "a string", dict: "an object"}
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return names.get(type(value), "a number")


def split_held_out(records: Sequence[Record], eval_split: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Split into training and held-out records, the same way for the same seed; both keep the order of the file.

    ``eval_split`` is a fraction in (0, 1) or a whole number of records; 0 holds out nothing.

    Raises:
        ValueError: ``eval_split`` is negative, or leaves no record to train on.
    """
    count = max(1, round(eval_split * len(records))) if 0 < eval_split < 1 else eval_split
    if count != int(count) or not 0 <= count < len(records):
        accepted = f"0, a fraction in (0, 1) or a whole number below the {len(records)} records"
        raise ValueError(f"eval_split must be {accepted}, got {eval_split}")
    held_out = set(random.Random(seed).sample(range(len(records)), int(count)))
    train = [record for index, record in enumerate(records) if index not in held_out]
    return train, [records[index] for index in sorted(held_out)]
