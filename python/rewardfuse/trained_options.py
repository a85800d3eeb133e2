"""What scoring takes over from the training of a model: where texts are cut, and what ends a step."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewardfuse.step_batching import DEFAULT_SEPARATOR
from rewardfuse.tokenizing import is_integer, longest_input

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rewardfuse.reward_model import RewardModel


def scoring_length(tokenizer: "PreTrainedTokenizerBase", model: "RewardModel", max_length: int | None) -> int:
    """The length to truncate to in scoring: ``max_length``, or by default that of the model's training.

    Where the training's was the default of :func:`longest_input`, nobody chose it, and it is a :class:`DefaultLength`
    again, as it is for a model that was trained elsewhere.

    Raises:
        TypeError, ValueError: what :func:`longest_input` and :func:`trained_options` find.
    """
    if max_length is not None:
        return longest_input(tokenizer, model.config, max_length)
    default = longest_input(tokenizer, model.config, None)
    trained = trained_options(model.name_or_path).get("max_length", default)
    if trained == default:
        return default
    try:
        return longest_input(tokenizer, model.config, trained)
    except ValueError as error:
        raise ValueError(f"{_options_file(model.name_or_path)}: {error}") from None


def scoring_separator(model: "RewardModel", step_separator: str | None) -> str:
    """What ends each step of a solution: ``step_separator``, or by default that of the model's training, or a line
    feed.

    Raises:
        ValueError: what :func:`trained_options` finds.
    """
    if step_separator is not None:
        return step_separator
    return trained_options(model.name_or_path).get("step_separator", DEFAULT_SEPARATOR)


def trained_options(folder: str | Path) -> dict[str, Any]:
    """The options of ``rewardfuse train`` that scoring needs too, from beside the model in ``folder``.

    ``max_length`` and ``step_separator``, where they are known; nothing of a model from elsewhere.

    Raises:
        ValueError: the file is damaged; names it.
    """
    path = _options_file(folder)
    if not str(folder) or not path.is_file():  # a model that was built in memory has no folder
        return {}
    try:
        return _needed(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from None


def _needed(options: Any) -> dict[str, Any]:
    if not isinstance(options, dict):
        raise ValueError(f"expected an object, got {options!r:.60}")
    found = {name: options[name] for name in ("max_length", "step_separator") if options.get(name) is not None}
    if "max_length" in found and not is_integer(found["max_length"]):
        raise ValueError(f"max_length must be an integer, got {found['max_length']!r:.60}")
    if not isinstance(found.get("step_separator", ""), str):
        raise ValueError(f"step_separator must be a string, got {found['step_separator']!r:.60}")
    return found


def _options_file(folder: str | Path) -> Path:
    from rewardfuse._train_folder import OPTIONS_FILE

    return Path(folder) / OPTIONS_FILE
