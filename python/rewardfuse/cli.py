"""The command line: ``rewardfuse train | score | eval | doctor | bench | info``.

Modules are imported inside the handlers, so that ``rewardfuse info`` and every ``--help`` answer without
``transformers``.
"""

import argparse
import errno
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from rewardfuse.commands import command, doctor, eval, flag, score, train

EXIT_BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, or 2 with one line on stderr for bad input, or 130 when interrupted.

    With ``REWARDFUSE_DEBUG=1`` errors keep their traceback.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["bench"]:  # it has its own parser, --help included
        handler = _bench
        arguments: Any = argv[1:]
    else:
        arguments = build_parser().parse_args(argv)
        handler = arguments.command
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = handler(arguments) or 0
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # the reader of a pipe (head, less) has left; nobody is there to be told
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except KeyboardInterrupt:
            print("rewardfuse: interrupted", file=sys.stderr)
            return 130
        except (ValueError, OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _lost_connection(error):
                raise
            if os.environ.get("REWARDFUSE_DEBUG") == "1":
                raise
            print(f"rewardfuse: {_process()}error: {_one_line(error)}", file=sys.stderr)
            return EXIT_BAD_INPUT


def _show_warning(message: Any, category: type[Warning], *_: Any) -> None:
    # Deprecations inside other packages are nothing a user can act on; of several processes one may speak for all.
    if issubclass(category, UserWarning) and os.environ.get("RANK", "0") == "0":
        print(f"rewardfuse: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _process() -> str:
    """Which of several processes speaks; nothing where there is only one."""
    return f"process {os.environ.get('RANK', '0')}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def _lost_connection(error: RuntimeError) -> bool:
    """Whether another process of the job has ended while this one waited for it."""
    lost = any(sign in str(error) for sign in ("Connection closed by peer", "Connection reset by peer", "NCCL"))
    return lost and bool(_process())


def _one_line(error: Exception) -> str:
    if isinstance(error, RuntimeError):
        return "another process has ended, its own line says why"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        place = f" while writing {error.filename}" if error.filename else ""
        return f"no space left on the disk{place}; no half-written file stands under its final name"
    return " ".join(str(error).split()) or type(error).__name__


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command but ``bench``, which parses its own arguments."""
    parser = argparse.ArgumentParser(prog="rewardfuse", description="Train and run reward models with fused losses.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    train.add_parser(commands)
    score.add_parser(commands)
    eval.add_parser(commands)
    doctor.add_parser(commands)
    commands.add_parser("bench", help="measure the ops against their peers", add_help=False)
    info = command(commands, "info", "print every backend, the device it serves, and why one is missing", _info)
    flag(info, "json", "print JSON")
    return parser


def _info(arguments: argparse.Namespace) -> int:
    from rewardfuse import _info

    return _info.main(arguments)


def _bench(argv: list[str]) -> int:
    from rewardfuse import bench

    return bench.main(argv)
