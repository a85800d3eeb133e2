"""``rewardfuse train``."""

import argparse
import dataclasses
import types
import typing
import warnings
from collections.abc import Sequence
from typing import Any

from rewardfuse import _processes
from rewardfuse.commands import add_model_flags, add_reading_flags, command, flag, launched, load_model, print_result


def add_parser(commands: Any) -> None:
    from rewardfuse.step_batching import typed_separator
    from rewardfuse.train_options import TrainOptions

    text = "train a reward model on preference pairs, ranked lists, rated responses or step-labelled solutions"
    parser = command(commands, "train", text, _train, launched("train"))
    add_model_flags(parser)
    files = "files to train on: .jsonl or .json, also .gz, .csv, .parquet"
    flag(parser, "dataset_name", files, type=str, nargs="+", required=True)
    add_reading_flags(parser)
    text = "files with several votes a pair: majority, share (a soft target) or each (a pair for each vote)"
    flag(parser, "votes", text, type=str, default="majority", choices=("majority", "share", "each"))
    flag(parser, "new_head", "start with a fresh reward head, for models that have none, or another one")
    flag(parser, "json", "print the final metrics as JSON")
    kinds = typing.get_type_hints(TrainOptions)
    for option in dataclasses.fields(TrainOptions):
        settings: dict[str, Any] = {"dest": option.name}
        if option.default is dataclasses.MISSING:
            settings["required"] = True
        else:
            settings["default"] = option.default
        if option.name == "resume_from_checkpoint":
            settings.update(nargs="?", const=True, type=str, metavar="FOLDER")
        elif kinds[option.name] is not bool:
            settings.update(_value_settings(kinds[option.name]))
        if option.name == "step_separator":
            settings["type"] = typed_separator
        flag(parser, option.name, option.metadata["help"], **settings)


def _value_settings(kind: Any) -> dict[str, Any]:
    """``int`` for ``int | None``; several values for a tuple."""
    if isinstance(kind, types.UnionType):
        kind = next(member for member in typing.get_args(kind) if member is not type(None))
    if typing.get_origin(kind) is tuple:
        return {"type": typing.get_args(kind)[0], "nargs": "+"}
    return {"type": kind}


def _train(arguments: argparse.Namespace) -> None:
    from rewardfuse.train import train_reward_model

    with _processes.connected(arguments.use_cpu):
        with _processes.together():
            prepared = _prepare(arguments)
        result = train_reward_model(*prepared[:-1], data_report=prepared[-1])
    if _processes.rank() == 0:
        print_result(arguments.json, {"output_dir": result.output_dir, **result.metrics})


def _prepare(arguments: argparse.Namespace) -> tuple[Any, ...]:
    """Model, tokenizer, records to train and to evaluate on, options, and the report on the data."""
    from rewardfuse.data import find_duplicates, load_records, split_held_out
    from rewardfuse.train import head_for
    from rewardfuse.train_options import TrainOptions

    values = vars(arguments)
    options = TrainOptions(**{option.name: values[option.name] for option in dataclasses.fields(TrainOptions)})
    reading = {"data_format": arguments.data_format, "skip_bad": arguments.skip_bad, "votes": arguments.votes}
    records = load_records(arguments.dataset_name, **reading)
    read = [records]
    if options.eval_dataset_name:
        train_records, eval_records = records, load_records(options.eval_dataset_name, **reading)
        read.append(eval_records)
    else:
        train_records, eval_records = split_held_out(records, options.eval_split, options.seed)
    head = head_for(train_records, eval_records, options)  # before the model is loaded, which takes longer
    report = _report(read, find_duplicates(train_records, eval_records))
    new = {"head": head} if arguments.new_head else {}
    model, tokenizer = load_model(arguments, new_head=arguments.new_head, seed=options.seed, dtype="float32", **new)
    return model, tokenizer, train_records, eval_records, options, report


def _report(read: Sequence[Any], duplicates: Any) -> dict[str, int]:
    """What is wrong with the data, for the metrics; each finding is also a warning of one line."""
    report = {
        "skipped_records": sum(records.skipped for records in read),
        "duplicate_records": duplicates.duplicates,
        "conflicting_records": duplicates.conflicting,
        "leaked_records": duplicates.leaked,
    }
    if report["skipped_records"]:
        first = next(records.first_skipped for records in read if records.first_skipped)
        warnings.warn(f"skipped {report['skipped_records']} records that cannot be used, first {first}", stacklevel=2)
    found = [f"{count} {name.replace('_', ' ')}" for name, count in report.items() if count and "skipped" not in name]
    if found:
        examples = f" (such as {duplicates.examples[0]})" if duplicates.examples else ""
        warnings.warn(f"the data holds {', '.join(found)}{examples}", stacklevel=2)
    return report
