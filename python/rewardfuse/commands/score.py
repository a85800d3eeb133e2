"""``rewardfuse score``."""

import argparse
import dataclasses
from typing import Any

from rewardfuse.commands import (
    add_model_flags,
    add_reading_flags,
    add_scoring_flags,
    add_trained_flags,
    command,
    flag,
    launched,
    load_to_score,
    print_result,
)


def add_parser(commands: Any) -> None:
    parser = command(commands, "score", "write a reward for every response of a file", _score, launched("score"))
    add_model_flags(parser)
    text = "files with pairs, lists of responses, single responses or steps: .jsonl, .json, .csv or .parquet"
    flag(parser, "dataset_name", text, type=str, nargs="+", required=True)
    flag(parser, "output_file", "JSON lines with the rewards added", type=str, required=True)
    add_reading_flags(parser)
    add_trained_flags(parser)
    flag(parser, "normalize_reward", "write (reward - mean)/std with the model's mean and std")
    text = "numbers of the model's layers (its head is always float32); default: those of the checkpoint"
    flag(parser, "dtype", text, type=str, choices=("float32", "bfloat16"))
    text = "records scored and saved at once; the same call after a kill goes on behind the last of them"
    flag(parser, "window_size", text, type=int, default=1024)
    flag(parser, "overwrite", "start anew where OUTPUT_FILE.partial was left by a run with other data or options")
    add_scoring_flags(parser, "counts")


def _score(arguments: argparse.Namespace) -> None:
    from rewardfuse import _processes
    from rewardfuse.score import score_dataset

    with _processes.connected(arguments.use_cpu):
        with _processes.together():
            model, tokenizer = load_to_score(arguments, **({"dtype": arguments.dtype} if arguments.dtype else {}))
        result = score_dataset(
            model,
            tokenizer,
            arguments.dataset_name,
            arguments.output_file,
            batch_size=arguments.batch_size,
            max_length=arguments.max_length,
            step_separator=arguments.step_separator,
            data_format=arguments.data_format,
            skip_bad=arguments.skip_bad,
            normalize_reward=arguments.normalize_reward,
            window_size=arguments.window_size,
            overwrite=arguments.overwrite,
            progress=not arguments.disable_tqdm,
        )
    if _processes.rank() == 0:
        print_result(arguments.json, dataclasses.asdict(result))
