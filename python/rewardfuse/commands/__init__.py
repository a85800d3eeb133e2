"""The commands of ``rewardfuse``, one a module, and what they share: flags, loading a model, printing a result."""

import argparse
import json
from typing import Any


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Both spellings of a flag with its value once, and defaults only where there are some."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.required:
            return f"{action.help} (required)"
        if action.default is None or action.default is False or action.default is argparse.SUPPRESS:
            return action.help
        return super()._get_help_string(action)


def command(commands: Any, name: str, text: str, handler: Any, note: str | None = None) -> argparse.ArgumentParser:
    """Add a command; ``note`` stands below its options."""
    parser = commands.add_parser(
        name, help=text, description=text, epilog=note, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.set_defaults(command=handler)
    return parser


def launched(name: str) -> str:
    """What the help of a command says that several processes can do."""
    return (
        f"Several processes: torchrun --nproc_per_node N -m rewardfuse {name} ..., or accelerate launch -m rewardfuse "
        f"{name} ...; see docs/scale.md."
    )


def flag(parser: Any, name: str, text: str, **settings: Any) -> None:
    """Add ``--some_name``, also accepted as ``--some-name``; without a type it is a switch."""
    if "type" not in settings and "action" not in settings:
        settings.update(action="store_true")
    parser.add_argument(f"--{name}", *([f"--{name.replace('_', '-')}"] if "_" in name else []), help=text, **settings)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    flag(parser, "model_name_or_path", "model folder, or a name on the Hugging Face hub", type=str, required=True)
    flag(parser, "trust_remote_code", "run Python code that comes with the model; only for authors you trust")


def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    flag(parser, "data_format", "format of the data; auto: by the keys of the first record", type=str, default="auto")
    flag(parser, "skip_bad", "leave records out that cannot be used and count them, instead of stopping at the first")


def add_scoring_flags(parser: argparse.ArgumentParser, printed: str) -> None:
    """Flags of the commands that score texts; ``printed`` is what ``--json`` prints."""
    flag(parser, "batch_size", "responses the device takes at once", type=int, default=16)
    flag(parser, "use_cpu", "score on the CPU even where there is an accelerator")
    flag(parser, "disable_tqdm", "show no progress bar")
    flag(parser, "json", f"print the {printed} as JSON")


def add_trained_flags(parser: argparse.ArgumentParser) -> None:
    """Flags whose default stands beside a model that was trained here."""
    from rewardfuse.step_batching import typed_separator

    text = "tokens kept of a text, counted from its end; default: as in training"
    flag(parser, "max_length", text, type=int)
    text = r"what ends each step of a solution, \n is a line break; default: as in training"
    flag(parser, "step_separator", text, type=typed_separator)


def load_model(arguments: argparse.Namespace, **options: Any) -> tuple[Any, Any]:
    from rewardfuse.reward_model import RewardModel, load_tokenizer

    shared = {"trust_remote_code": arguments.trust_remote_code}
    model = RewardModel.from_pretrained(arguments.model_name_or_path, **shared, **options)
    return model, load_tokenizer(arguments.model_name_or_path, **shared)


def load_to_score(arguments: argparse.Namespace, **options: Any) -> tuple[Any, Any]:
    """As :func:`load_model`, on the accelerator if there is one and ``--use_cpu`` does not say otherwise."""
    from rewardfuse import _processes

    model, tokenizer = load_model(arguments, **options)
    return model.to(_processes.device(arguments.use_cpu)), tokenizer


def print_result(as_json: bool, result: dict[str, Any]) -> None:
    if as_json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name:>24}  {_readable(value)}" for name, value in result.items() if value is not None))


def _readable(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
