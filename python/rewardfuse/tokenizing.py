"""From texts and chat messages to token ids: rendering, tokenizing, truncation."""

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from rewardfuse.data import DataError, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rewardfuse.reward_model import RewardModel

DEFAULT_MAX_LENGTH = 1024  # TRL's
Tokens = array  # of ints
TOKENIZER_CHUNK = 1000  # texts handed to the tokenizer at once; the progress bar moves this often


class DefaultLength(int):
    """A longest input that nobody asked for: a prompt that does not fit into it is an error, not a cut."""


def render(prompt: Text | None, response: Text, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, bool]:
    """Return the text that the model reads, and whether the chat template made it.

    Strings are concatenated, ``prompt + response``. As soon as one side is a list of messages, a string on the other
    side becomes one message (``user`` for the prompt, ``assistant`` for the response), and the tokenizer's chat
    template renders them; a tokenizer without one gets ``role: content`` paragraphs with an empty line between them.

    Raises:
        ValueError: the chat template fails on these messages.
    """
    if isinstance(response, str) and not isinstance(prompt, list):
        return (prompt or "") + response, False
    messages = as_messages(prompt, "user") + as_messages(response, "assistant")
    if tokenizer.chat_template:
        return _apply_template(messages, tokenizer), True
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages), False


def _apply_template(messages: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase") -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError) as error:  # a TypeError is the template's too: None + "text", say
        roles = ", ".join(message["role"] for message in messages)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the tokenizer's chat template fails on the roles {roles} ({reason})") from error


def as_messages(text: Text | None, role: str) -> list[dict[str, Any]]:
    """A text as chat messages: a string is one message of ``role``, None is no message."""
    if isinstance(text, str):
        return [{"role": role, "content": text}]
    return text or []


def longest_input(tokenizer: "PreTrainedTokenizerBase", config: Any, max_length: int | None) -> int:
    """The length to truncate to: ``max_length``, or by default what the model takes, at most 1024 tokens.

    The default is a :class:`DefaultLength`, with which :func:`tokenize` refuses prompts that do not fit.

    Raises:
        TypeError: ``max_length`` is no integer.
        ValueError: ``max_length`` is below 1 or more than the tokenizer or the model's position embeddings allow.
    """
    if max_length is not None and not is_integer(max_length):
        raise TypeError(f"max_length must be an integer, got {max_length!r}")
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    limit = min((value for value in limits if value and value > 0), default=DEFAULT_MAX_LENGTH)
    if max_length is None:
        return DefaultLength(min(limit, DEFAULT_MAX_LENGTH))
    if not 1 <= max_length <= limit:
        raise ValueError(f"max_length must lie between 1 and the {limit} tokens that the model takes, got {max_length}")
    return max_length


def is_integer(value: Any) -> bool:
    """Whether it counts something: True and False do not."""
    return isinstance(value, int) and not isinstance(value, bool)


def tokenize(
    texts: Sequence[tuple[Text | None, Text]],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    sources: Sequence[str],
    progress: bool = False,
) -> tuple[list[Tokens], int]:
    """Token ids of every ``(prompt, response)`` and how many had to be truncated; see :func:`tokenize_each`."""
    ids, truncated = tokenize_each(texts, tokenizer, max_length, sources=sources, progress=progress)
    return ids, sum(truncated)


def tokenize_each(
    texts: Sequence[tuple[Text | None, Text]],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    sources: Sequence[str],
    progress: bool = False,
) -> tuple[list[Tokens], list[bool]]:
    """Token ids of every ``(prompt, response)``, and whether each had to be truncated.

    Plain text gets the tokenizer's special tokens and, as in TRL, ends with its eos token if it has one; the chat
    template writes its own. Truncation cuts the beginning, never the end of the response: special tokens that the
    text begins with are kept, then the last tokens up to ``max_length``.

    Raises:
        DataError: names its place from ``sources``: a text gives no token, its chat template fails, or, where
            ``max_length`` is a :class:`DefaultLength`, its prompt alone has so many tokens or more. Of a conversation
            without a prompt of its own, everything before the last message is the prompt.
    """
    ids: list[Tokens] = []
    truncated: list[bool] = []
    for start in tqdm(range(0, len(texts), TOKENIZER_CHUNK), "tokenizing", disable=not progress, leave=False):
        rows = range(start, min(start + TOKENIZER_CHUNK, len(texts)))
        rendered = [_render_at(sources[row], *texts[row], tokenizer) for row in rows]
        for row, (_, templated), sequence in zip(rows, rendered, _encode(rendered, tokenizer), strict=True):
            if not sequence:
                raise DataError(sources[row], None, "the text gives no token")
            prefix = _prefix_length(sequence, templated, tokenizer)
            truncated.append(len(sequence) > max_length)
            if truncated[-1] and isinstance(max_length, DefaultLength):
                _check_prompt_fits(sources[row], *texts[row], tokenizer, prefix, max_length)
            ids.append(compact(_cut_beginning(sequence, prefix, max_length)))
    return ids, truncated


def compact(tokens: Sequence[int]) -> Tokens:
    """Token ids at 4 bytes each; in a list they take 36."""
    return array("i", tokens)


def check_token_ids(
    sequences: Sequence[Sequence[int]],
    tokenizer: "PreTrainedTokenizerBase",
    model: "RewardModel",
    *,
    sources: Sequence[str],
) -> None:
    """Refuse tokens that the model has no embedding for: the tokenizer is another model's, or was extended.

    Raises:
        DataError: names the place of the first such text, from ``sources``.
        ValueError: the pad token is one of them.
    """
    size = getattr(model.backbone.get_input_embeddings(), "num_embeddings", None)
    if size is None:  # a model with code of its own
        return
    mend = "pass the model's own tokenizer, or resize the embeddings (model.backbone.resize_token_embeddings) and train"
    pad = tokenizer.pad_token_id
    if pad is not None and pad >= size:
        raise ValueError(f"the pad token {tokenizer.pad_token!r} has id {pad}, the model has {size} embeddings: {mend}")
    for source, sequence in zip(sources, sequences, strict=True):
        token = max(sequence)
        if token >= size:
            name = tokenizer.convert_ids_to_tokens(token)
            raise DataError(source, None, f"the token {name!r} has id {token}, the model has {size} embeddings: {mend}")


def _render_at(
    source: str, prompt: Text | None, response: Text, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[str, bool]:
    try:
        return render(prompt, response, tokenizer)
    except ValueError as error:
        raise DataError(source, None, str(error)) from error


def _check_prompt_fits(
    source: str, prompt: Text | None, response: Text, tokenizer: "PreTrainedTokenizerBase", prefix: int, limit: int
) -> None:
    """Called for texts that are too long only, since it tokenizes the prompt once more."""
    if isinstance(response, list):
        prompt = response[:-1] if prompt is None else as_messages(prompt, "user")
    if not prompt:
        return
    text, templated = _render_at(source, None, prompt, tokenizer)
    tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) + (0 if templated else prefix)
    if tokens >= limit:
        mend = f"max_length (--max_length {limit}) cuts the beginning of long texts"
        raise DataError(source, None, f"the prompt alone has {tokens} tokens, an input at most {int(limit)}; {mend}")


def _encode(rendered: list[tuple[str, bool]], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    ids: list[list[int]] = [[] for _ in rendered]
    for kind in (False, True):
        rows = [row for row, (_, templated) in enumerate(rendered) if templated is kind]
        if not rows:
            continue
        texts = [rendered[row][0] for row in rows]
        # verbose=False: the warning about long sequences is beside the point, they are truncated afterwards
        encoded = tokenizer(texts, add_special_tokens=not kind, return_attention_mask=False, verbose=False)["input_ids"]
        for row, sequence in zip(rows, encoded, strict=True):
            ids[row] = list(sequence)
            eos = tokenizer.eos_token_id
            if not kind and eos is not None and sequence[-1:] != [eos]:
                ids[row].append(eos)
    return ids


def _prefix_length(sequence: list[int], templated: bool, tokenizer: "PreTrainedTokenizerBase") -> int:
    """How many special tokens (``[CLS]``, bos) the sequence begins with."""
    beginnings = {tokenizer.bos_token_id} if templated else {tokenizer.bos_token_id, tokenizer.cls_token_id}
    return int(sequence[0] in beginnings - {None})


def _cut_beginning(sequence: list[int], prefix: int, max_length: int) -> list[int]:
    if len(sequence) <= max_length:
        return sequence
    prefix = min(prefix, max_length - 1)
    return sequence[:prefix] + sequence[len(sequence) - (max_length - prefix) :]
