"""From step-labelled solutions to the batch of a process reward model: token ids, and where each step ends.

A solution is read as prompt, then its steps, each followed by the separator; the reward of a step is the model's output
at the last token of its separator, which has seen the step and all before it. Prompt, steps and separator are tokenized
apart and joined as token ids, as TRL does, so that a separator is always the same tokens.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm.auto import tqdm

from rewardfuse.batching import Collator, Rows, TokenizedDataset
from rewardfuse.data import DataError, Text
from rewardfuse.tokenizing import TOKENIZER_CHUNK, DefaultLength, as_messages, compact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rewardfuse.data import SteppedSolution

DEFAULT_SEPARATOR = "\n"  # TRL's
IGNORED = -100.0  # the label of a step that has none, and of a place where there is no step


def typed_separator(text: str) -> str:
    r"""What ``--step_separator`` means: a shell has no easy way to type a line break, so ``\n`` stands for one.

    >>> len(typed_separator(r"\n\n"))
    2
    """
    return text.replace("\\n", "\n")


class Steps(NamedTuple):
    """A tokenized solution.

    Attributes:
        input_ids: its tokens.
        positions: the last token of each step's separator, counted from the first of ``input_ids``.
        dropped: how many steps at the beginning were cut, and have no place; ``positions`` holds the others.
        truncated: whether any token was cut.
    """

    input_ids: list[int]
    positions: list[int]
    dropped: int
    truncated: bool


def tokenize_steps(
    solutions: "Sequence[tuple[Text | None, Sequence[str]]]",
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    sources: Sequence[str],
    step_separator: str = DEFAULT_SEPARATOR,
    progress: bool = False,
) -> list[Steps]:
    """Token ids of every ``(prompt, steps)`` and the places of its steps.

    A prompt of plain text is followed by a separator too, unless it ends with it; chat messages end as the chat
    template begins an answer. Truncation to ``max_length`` cuts the beginning, but for the tokenizer's first special
    token. A step that loses a token loses its place too; only the last one keeps it, whatever is left of the step.

    Raises:
        DataError: where ``max_length`` is a :class:`rewardfuse.tokenizing.DefaultLength`, a prompt alone has so many
            tokens or more; names its place from ``sources``.
        ValueError: the separator gives no token.
    """
    separator = _ids([step_separator], tokenizer)[0]
    if not separator:
        raise ValueError(
            f"step_separator {step_separator!r} gives no token with this tokenizer, pass another, such as "
            f"{tokenizer.sep_token or tokenizer.eos_token or '#'!r}"
        )
    start = _first_special_token(tokenizer)
    made = []
    for begin in tqdm(range(0, len(solutions), TOKENIZER_CHUNK), "tokenizing", disable=not progress, leave=False):
        chunk = solutions[begin : begin + TOKENIZER_CHUNK]
        prompts = [_render_prompt(prompt, tokenizer, step_separator) for prompt, _ in chunk]
        prompt_ids = _ids([text for text, _ in prompts], tokenizer)
        step_ids = iter(_ids([step for _, steps in chunk for step in steps], tokenizer))
        for (_, steps), (_, templated), prompt in zip(chunk, prompts, prompt_ids, strict=True):
            pieces = [next(step_ids) + separator for _ in steps]
            prompt = prompt if templated else start + prompt
            if isinstance(max_length, DefaultLength) and len(prompt) >= max_length:
                says = f"the prompt alone has {len(prompt)} tokens, an input at most {int(max_length)}"
                mend = f"max_length (--max_length {int(max_length)}) cuts the beginning of long texts"
                raise DataError(sources[len(made)], None, f"{says}; {mend}")
            made.append(_join(prompt, pieces, 0 if templated else len(start), max_length))
    return made


def _join(prompt: list[int], pieces: list[list[int]], prefix: int, max_length: int) -> Steps:
    """One sequence of them, cut behind its first ``prefix`` tokens."""
    ids = [*prompt, *(token for piece in pieces for token in piece)]
    bounds = list(accumulate(map(len, pieces), initial=len(prompt)))
    cut = max(0, len(ids) - max_length)
    kept = min(prefix, max_length - 1) if cut else 0
    whole = [index for index, begin in enumerate(bounds[:-1]) if begin - cut >= kept]
    dropped = min([*whole, len(pieces) - 1])
    positions = [end - cut - 1 for end in bounds[dropped + 1 :]]
    return Steps(ids[:kept] + ids[kept + cut :], positions, dropped, cut > 0)


def _render_prompt(prompt: Text | None, tokenizer: "PreTrainedTokenizerBase", separator: str) -> tuple[str, bool]:
    """The text before the first step, and whether the chat template made it."""
    if isinstance(prompt, list) and tokenizer.chat_template:
        return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True), True
    if isinstance(prompt, list):
        prompt = "\n\n".join(f"{message['role']}: {message['content']}" for message in as_messages(prompt, "user"))
    if prompt and not prompt.endswith(separator):
        prompt += separator
    return prompt or "", False


def _ids(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    # verbose=False: the warning about long sequences is beside the point, they are truncated afterwards
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return tokenizer(list(texts), **options)["input_ids"] if texts else []


def _first_special_token(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What the tokenizer begins plain text with: ``[CLS]``, bos, or nothing."""
    beginning = list(tokenizer("", return_attention_mask=False)["input_ids"])[:1]
    return [token for token in beginning if token in (tokenizer.bos_token_id, tokenizer.cls_token_id)]


class StepDataset(TokenizedDataset):
    """Tokenized solutions, items ``{"input_ids", "step_positions", "step_labels"}``; a step without a label has -100.

    Steps that truncation cut off have neither place nor label.
    """

    def __init__(
        self,
        solutions: "Sequence[SteppedSolution]",
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int,
        *,
        step_separator: str = DEFAULT_SEPARATOR,
        progress: bool = False,
    ):
        texts = [(solution.prompt, solution.steps) for solution in solutions]
        options = {"sources": [solution.source for solution in solutions], "progress": progress}
        tokenized = tokenize_steps(texts, tokenizer, max_length, step_separator=step_separator, **options)
        self.truncated = sum(steps.truncated for steps in tokenized)
        self.items = [
            {
                "input_ids": compact(steps.input_ids),
                "step_positions": steps.positions,
                "step_labels": [IGNORED if label is None else float(label) for label in labels[steps.dropped :]],
            }
            for steps, labels in zip(tokenized, (solution.labels for solution in solutions), strict=True)
        ]


class StepCollator(Collator):
    """Collates items of a :class:`StepDataset`: one row a solution.

    ``step_positions`` int64 ``[B, S]`` are counted from the first token of each solution, whatever the padding, -1
    beyond its last step; ``step_labels`` float32 ``[B, S]`` in [0, 1], -100 beyond it and where a step has no label.
    """

    def _lay_out(self, items: Sequence[dict[str, Any]]) -> Rows:
        most = max(len(item["step_positions"]) for item in items)
        positions = torch.full((len(items), most), -1, dtype=torch.int64)
        labels = torch.full((len(items), most), IGNORED, dtype=torch.float32)
        for row, item in enumerate(items):
            count = len(item["step_positions"])
            positions[row, :count] = torch.tensor(item["step_positions"], dtype=torch.int64)
            labels[row, :count] = torch.tensor(item["step_labels"], dtype=torch.float32)
        return [item["input_ids"] for item in items], {"step_positions": positions, "step_labels": labels}
