"""A small policy for the demo: a transformer that answers byte by byte, and the oracle that reads what it wrote.

Taught by examples of the world's answers (`imitate`) it writes much like the world; nothing but this keeps it to the
world's language. What it wrote is text, and the oracle judges it as text (`oracle_rewards`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm

from rewardfuse import token_logprobs
from rewardfuse.demo import world
from rewardfuse.demo.setting import longest_text


@dataclass(frozen=True)
class Responses:
    """Responses to `n` prompts of one length.

    Attributes:
        prompts: `[n, P]` tokens, bos first.
        tokens: `[n, T]` tokens of the responses; eos where a response has ended.
        mask: bool `[n, T]`, True on what was written, the eos that ends a response included.
    """

    prompts: Tensor
    tokens: Tensor
    mask: Tensor

    def written(self) -> list[list[int]]:
        """The bytes of each response, without eos."""
        counts = (self.mask & (self.tokens < 256)).sum(dim=1).tolist()
        return [row[:count] for row, count in zip(self.tokens.tolist(), counts, strict=True)]

    def texts(self) -> list[str]:
        """The responses as text; bytes that are no UTF-8 become U+FFFD."""
        return [bytes(row).decode("utf-8", "replace") for row in self.written()]

    def sequences(self, eos: int) -> list[list[int]]:
        """Prompt, response and eos as a reward model reads them: eos also ends a response that was cut off."""
        return [[*prompt, *row, eos] for prompt, row in zip(self.prompts.tolist(), self.written(), strict=True)]


class Policy(nn.Module):
    """A causal transformer over the tokens of `byte_tokenizer`, which never writes pad or bos.

    Args:
        config: of a `transformers` decoder.
        seed: draws the first weights; torch's global generator stays as it is.
    """

    def __init__(self, config: transformers.PreTrainedConfig, tokenizer: Any, seed: int):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = transformers.AutoModelForCausalLM.from_config(config)
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.never = torch.tensor([tokenizer.pad_token_id, tokenizer.bos_token_id])

    def prompts(self, wish: np.ndarray) -> Tensor:
        """Tokens `[n, P]` of the prompts of `wish [n, 3]`."""
        nothing = world.Answers(wish, wish, np.zeros(len(wish), int))
        return torch.tensor([[self.bos, *prompt.encode()] for prompt in nothing.prompts()])

    def examples(self, answers: world.Answers) -> Responses:
        """The world's answers `[n]` as responses that end with eos."""
        rows = [[*text.encode(), self.eos] for text in answers.texts()]
        lengths = torch.tensor([len(row) for row in rows])
        longest = int(lengths.max())
        tokens = torch.tensor([row + [self.eos] * (longest - len(row)) for row in rows])
        return Responses(self.prompts(answers.wish), tokens, torch.arange(longest) < lengths.unsqueeze(1))

    @torch.no_grad()
    def write(self, wish: np.ndarray, generator: torch.Generator) -> Responses:
        """One response to each of `wish [n, 3]`, sampled at temperature 1.

        A response ends with eos, or is cut off where the longest answer of the world ends.
        """
        prompts = self.prompts(wish)
        inputs, past = prompts, None
        open_rows = torch.ones(len(prompts), dtype=torch.bool)
        tokens, mask = [], []
        for _ in range(longest_text() - prompts.shape[1] - 1):
            output = self.model(input_ids=inputs, past_key_values=past, use_cache=True)
            past = output.past_key_values
            probability = self._allowed(output.logits[:, -1]).softmax(dim=-1)
            drawn = torch.multinomial(probability, 1, generator=generator).squeeze(1)
            tokens.append(torch.where(open_rows, drawn, self.eos))
            mask.append(open_rows)
            open_rows = open_rows & (drawn != self.eos)
            if not open_rows.any():
                break
            inputs = tokens[-1].unsqueeze(1)
        return Responses(prompts, torch.stack(tokens, dim=1), torch.stack(mask, dim=1))

    def logprobs(self, responses: Responses) -> Tensor:
        """Log-probs `[n, T]` of what was written, in nats, with gradients; 0 where the mask is False."""
        inputs = torch.cat([responses.prompts, responses.tokens], dim=1)[:, :-1]
        logits = self.model(input_ids=inputs, use_cache=False).logits[:, responses.prompts.shape[1] - 1 :]
        return token_logprobs(self._allowed(logits), responses.tokens, mask=responses.mask)

    def _allowed(self, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, self.never, -torch.inf)


def imitate(
    policy: Policy,
    wishes: np.ndarray,
    rng: np.random.Generator,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    progress: bool = True,
) -> None:
    """Maximum likelihood on the world's answers to `wishes [m, 3]`, drawn anew in each step."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    for _ in tqdm(range(steps), "a policy imitates the world", unit="step", disable=not progress):
        answers = world.sample_answers(wishes[rng.integers(len(wishes), size=batch_size)], rng)
        responses = policy.examples(answers)
        loss = -policy.logprobs(responses).sum() / responses.mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def oracle_rewards(wish: np.ndarray, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The true reward of any text as an answer to `wish [n, 3]`, and whether it is an answer at all.

    A text that is, letter for letter, one of the world's answers gets that answer's reward. Any other text serves
    nobody: it gets the reward of the worst answer that there is to this prompt.

    Returns:
        float64 `[n]` and bool `[n]`.
    """
    places, rewards = _answers_by_text()
    rows = rewards[tuple(np.asarray(wish).T)]
    place = np.array([places.get(text, -1) for text in texts], dtype=np.int64)
    is_answer = place >= 0
    return np.where(is_answer, rows[np.arange(len(rows)), place], rows.min(axis=1)), is_answer


@functools.cache
def _answers_by_text() -> tuple[dict[str, int], np.ndarray]:
    """Every answer that there is with its place among them, and the reward of each to each wish, `[4, 4, 4, n]`."""
    sizes = [len(names) for names in world.FIELDS]
    *given, closer = np.unravel_index(np.arange(np.prod(sizes) * len(world.CLOSERS)), (*sizes, len(world.CLOSERS)))
    given = np.stack(given, axis=-1)
    texts = world.Answers(given, given, closer).texts()
    wish = np.stack(np.indices(sizes), axis=-1)[..., None, :]
    shape = (*sizes, len(closer))
    answers = world.Answers(
        np.broadcast_to(wish, (*shape, 3)), np.broadcast_to(given, (*shape, 3)), np.broadcast_to(closer, shape)
    )
    return {text: place for place, text in enumerate(texts)}, world.oracle_reward(answers)
