"""The command line: ``rewardfuse train | score | bench | info``.

Modules are imported inside the handlers, so that ``rewardfuse info`` and every ``--help`` answer without
``transformers``.
"""

import argparse
import dataclasses
import errno
import json
import os
import signal
import sys
import types
import typing
import warnings
from collections.abc import Sequence
from typing import Any

EXIT_BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, or 2 with one line on stderr for bad input, or 130 when interrupted.

    With ``REWARDFUSE_DEBUG=1`` errors keep their traceback.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["bench"]:  # it has its own parser, --help included
        command = _bench
        arguments: Any = argv[1:]
    else:
        arguments = build_parser().parse_args(argv)
        command = arguments.command
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = command(arguments) or 0
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # the reader of a pipe (head, less) has left; nobody is there to be told
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except KeyboardInterrupt:
            print("rewardfuse: interrupted", file=sys.stderr)
            return 130
        except (ValueError, OSError) as error:
            if os.environ.get("REWARDFUSE_DEBUG") == "1":
                raise
            print(f"rewardfuse: error: {_one_line(error)}", file=sys.stderr)
            return EXIT_BAD_INPUT


def _show_warning(message: Any, category: type[Warning], *_: Any) -> None:
    if issubclass(category, UserWarning):  # deprecations inside other packages are nothing a user can act on
        print(f"rewardfuse: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        place = f" while writing {error.filename}" if error.filename else ""
        return f"no space left on the disk{place}; nothing half-written was left"
    return " ".join(str(error).split()) or type(error).__name__


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command but ``bench``, which parses its own arguments."""
    parser = argparse.ArgumentParser(prog="rewardfuse", description="Train and run reward models with fused losses.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_score(commands)
    commands.add_parser("bench", help="measure the ops against their peers", add_help=False)
    info = _command(commands, "info", "print every backend, the device it serves, and why one is missing", _info)
    _flag(info, "json", "print JSON")
    return parser


def _command(commands: Any, name: str, text: str, handler: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.set_defaults(command=handler)
    return parser


def _flag(parser: Any, name: str, text: str, **settings: Any) -> None:
    """Add ``--some_name``, also accepted as ``--some-name``; without a type it is a switch."""
    if "type" not in settings and "action" not in settings:
        settings.update(action="store_true")
    parser.add_argument(f"--{name}", *([f"--{name.replace('_', '-')}"] if "_" in name else []), help=text, **settings)


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    _flag(parser, "model_name_or_path", "model folder, or a name on the Hugging Face hub", type=str, required=True)
    _flag(parser, "trust_remote_code", "run Python code that comes with the model; only for authors you trust")


def _add_train(commands: Any) -> None:
    from rewardfuse.train import TrainOptions

    parser = _command(commands, "train", "train a reward model on preference pairs or ranked lists", _train)
    _add_model_flags(parser)
    text = "pairs (chosen, rejected, prompt) or ranked lists (responses, ranks or order or labels, prompt); "
    _flag(parser, "dataset_name", text + ".jsonl or .json, also .gz", type=str, required=True)
    _flag(parser, "new_head", "start with a fresh reward head, for models that have none")
    _flag(parser, "json", "print the final metrics as JSON")
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
            settings["type"] = _scalar(kinds[option.name])
        _flag(parser, option.name, option.metadata["help"], **settings)


def _scalar(kind: Any) -> type:
    """``int`` for ``int | None``."""
    if isinstance(kind, types.UnionType):
        return next(member for member in typing.get_args(kind) if member is not type(None))
    return kind


def _add_score(commands: Any) -> None:
    parser = _command(commands, "score", "write a reward for every response of a file", _score)
    _add_model_flags(parser)
    text = "records with chosen and rejected, or response, text or messages; .jsonl or .json, also .gz"
    _flag(parser, "dataset_name", text, type=str, required=True)
    _flag(parser, "output_file", "JSON lines with the rewards added", type=str, required=True)
    _flag(parser, "batch_size", "responses the device takes at once", type=int, default=16)
    _flag(parser, "max_length", "tokens kept of a text, counted from its end; default: as in training", type=int)
    _flag(parser, "use_cpu", "score on the CPU even where there is an accelerator")
    _flag(parser, "disable_tqdm", "show no progress bar")
    _flag(parser, "json", "print the counts as JSON")


def _train(arguments: argparse.Namespace) -> None:
    from rewardfuse.data import split_held_out
    from rewardfuse.ranked_lists import read_preferences
    from rewardfuse.train import TrainOptions, train_reward_model

    values = vars(arguments)
    options = TrainOptions(**{option.name: values[option.name] for option in dataclasses.fields(TrainOptions)})
    records = read_preferences(arguments.dataset_name)
    if options.eval_dataset_name:
        train_records, eval_records = records, read_preferences(options.eval_dataset_name)
    else:
        train_records, eval_records = split_held_out(records, options.eval_split, options.seed)
    model, tokenizer = _load(arguments, new_head=arguments.new_head, seed=options.seed, dtype="float32")
    result = train_reward_model(model, tokenizer, train_records, eval_records, options)
    _print_result(arguments.json, {"output_dir": result.output_dir, **result.metrics})


def _score(arguments: argparse.Namespace) -> None:
    import torch

    from rewardfuse.score import score_dataset

    model, tokenizer = _load(arguments)
    if torch.cuda.is_available() and not arguments.use_cpu:
        model.cuda()
    result = score_dataset(
        model,
        tokenizer,
        arguments.dataset_name,
        arguments.output_file,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length or _trained_max_length(arguments.model_name_or_path),
        progress=not arguments.disable_tqdm,
    )
    _print_result(arguments.json, dataclasses.asdict(result))


def _load(arguments: argparse.Namespace, **options: Any) -> tuple[Any, Any]:
    from rewardfuse.reward_model import RewardModel, load_tokenizer

    shared = {"trust_remote_code": arguments.trust_remote_code}
    model = RewardModel.from_pretrained(arguments.model_name_or_path, **shared, **options)
    return model, load_tokenizer(arguments.model_name_or_path, **shared)


def _trained_max_length(model_name_or_path: str) -> int | None:
    from rewardfuse.train import OPTIONS_FILE

    path = os.path.join(model_name_or_path, OPTIONS_FILE)
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as stream:
        return json.load(stream)["max_length"]


def _info(arguments: argparse.Namespace) -> int:
    from rewardfuse import _info

    return _info.main(arguments)


def _bench(argv: list[str]) -> int:
    from rewardfuse import bench

    return bench.main(argv)


def _print_result(as_json: bool, result: dict[str, Any]) -> None:
    if as_json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name:>24}  {_readable(value)}" for name, value in result.items() if value is not None))


def _readable(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
