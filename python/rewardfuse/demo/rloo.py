"""The demo's third part: a policy learns from the trained reward model, with and without a KL penalty.

A small transformer first imitates the world's answers; frozen, it is the reference. From there a policy takes RLOO
steps (Ahmadian et al., "Back to Basics", ACL 2024) for each KL coefficient β, with the same seed, prompts and number of
steps:

    reward of a response = learned reward - β log(π/π_ref)
    its advantage        = its reward - mean reward of the other responses to the same prompt

The reward model has seen the world's answers only; a policy writes bytes, and can leave the world's language. The
oracle, which judges what was written as text, is asked at each step and never told to the policy: where the learned
reward climbs while the oracle's falls, the reward model is gamed (Goodhart's law; for reward models Gao, Schulman &
Hilton, ICML 2023).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from rewardfuse import kl_penalized_rewards
from rewardfuse.demo.policy import Policy, Responses, imitate, oracle_rewards
from rewardfuse.demo.setting import SCORING_BATCH, model_config
from rewardfuse.reward_model import RewardModel
from rewardfuse.score import score_sequences

MEASURES = ("learned_reward", "oracle_reward", "kl", "answers")


@dataclass(frozen=True)
class PolicyOptions:
    """Size of the policies and of their training.

    Attributes:
        kl_coefs: the β to compare.
        responses: to each prompt of a step.
        window: steps, the samples of which make one point of a curve.
        measured_responses: to each training prompt, where a policy is measured at the start and the end.
    """

    kl_coefs: tuple[float, ...] = (0.0, 0.01, 0.1)
    steps: int = 100
    prompts_per_step: int = 8
    responses: int = 8
    learning_rate: float = 1e-3
    window: int = 10
    measured_responses: int = 8
    imitation_steps: int = 500
    imitation_batch: int = 32
    imitation_learning_rate: float = 4e-3
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        if self.responses < 2:
            raise ValueError(f"responses: expected an int of at least 2, got {self.responses}")
        if self.steps % self.window:
            raise ValueError(f"steps: expected a multiple of window = {self.window}, got {self.steps}")

    @classmethod
    def quick(cls) -> PolicyOptions:
        """Seconds, too few to learn anything."""
        return cls(
            steps=4,
            prompts_per_step=2,
            responses=4,
            window=2,
            measured_responses=1,
            imitation_steps=10,
            imitation_batch=16,
            hidden_size=16,
        )


def rloo_advantages(rewards: Tensor) -> Tensor:
    """Reward of each response minus the mean reward of the other `k - 1` to the same prompt, `[prompts, k]`, k >= 2."""
    k = rewards.shape[1]
    return (rewards - rewards.mean(dim=1, keepdim=True)) * (k / (k - 1))


@dataclass(frozen=True)
class Judges:
    """Who says what a response is worth: the reward model, the oracle, and the reference of the KL."""

    reward_model: RewardModel
    reference: Policy
    tokenizer: Any

    def learned(self, responses: Responses) -> Tensor:
        """The reward model's rewards `[n]`; a response that was written several times is read once."""
        sequences = [tuple(sequence) for sequence in responses.sequences(self.tokenizer.eos_token_id)]
        different = list(dict.fromkeys(sequences))
        rewards = score_sequences(self.reward_model, self.tokenizer, different, batch_size=SCORING_BATCH)
        by_sequence = dict(zip(different, rewards, strict=True))
        return torch.tensor([by_sequence[sequence] for sequence in sequences])

    @torch.no_grad()
    def reference_logprobs(self, responses: Responses) -> Tensor:
        """Log-probs `[n, T]` under the reference."""
        return self.reference.logprobs(responses)

    def measures(self, wish: np.ndarray, responses: Responses, learned: Tensor, kl: Tensor) -> np.ndarray:
        """The rows of `MEASURES` for each response, `[4, n]`: the KL in nats, and whether it is an answer at all."""
        oracle, is_answer = oracle_rewards(wish, responses.texts())
        return np.stack([learned.numpy(), oracle, kl.detach().numpy(), is_answer])


def compare_kl_coefs(
    options: PolicyOptions,
    reward_model: RewardModel,
    tokenizer: Any,
    wishes: np.ndarray,
    seed: int,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Train one policy for each of `kl_coefs` on prompts `wishes [m, 3]`, all from one reference.

    Returns:
        `start`: the reference's figures, measured on fresh responses; `runs`: for each β its `curve`, its `end`
        (measured as `start`) and its `best`, the point with the highest oracle reward; and the sizes of it all.
    """
    reference = _reference(options, tokenizer, wishes, seed, progress)
    judges = Judges(reward_model, reference, tokenizer)
    start = _measure(reference, judges, options, wishes, seed)
    runs = []
    with tqdm(total=len(options.kl_coefs) * options.steps, unit="step", disable=not progress) as bar:
        for kl_coef in options.kl_coefs:
            bar.set_description(f"RLOO, β = {kl_coef:g}")
            policy = copy.deepcopy(reference).requires_grad_(True)
            by_step = _train(policy, judges, options, kl_coef, wishes, seed, bar)
            end = _measure(policy, judges, options, wishes, seed)
            runs.append(_run_figures(kl_coef, by_step, start, end, options))
    return {
        "start": start,
        "runs": runs,
        "steps": options.steps,
        "responses_per_step": options.prompts_per_step * options.responses,
        "responses_per_point": options.window * options.prompts_per_step * options.responses,
        "responses_measured": len(wishes) * options.measured_responses,
        "parameters": sum(p.numel() for p in reference.parameters()),
    }


def _reference(options: PolicyOptions, tokenizer: Any, wishes: np.ndarray, seed: int, progress: bool) -> Policy:
    """A policy that has learned to imitate the world's answers, frozen."""
    rng = np.random.default_rng([seed, 4])
    config = model_config(tokenizer, options.hidden_size, options.layers, options.heads)
    reference = Policy(config, tokenizer, int(rng.integers(2**31)))
    imitate(
        reference,
        wishes,
        rng,
        steps=options.imitation_steps,
        batch_size=options.imitation_batch,
        learning_rate=options.imitation_learning_rate,
        progress=progress,
    )
    return reference.requires_grad_(False)


def _train(
    policy: Policy,
    judges: Judges,
    options: PolicyOptions,
    kl_coef: float,
    wishes: np.ndarray,
    seed: int,
    bar: tqdm,
) -> np.ndarray:
    """Take RLOO steps in place; returns the mean `MEASURES` of what each step sampled, before its update `[4, steps]`.

    Every β draws the same prompts, and its first responses are the same.
    """
    rng = np.random.default_rng([seed, 5])
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    optimizer = torch.optim.Adam(policy.parameters(), lr=options.learning_rate)
    by_step = np.empty((len(MEASURES), options.steps))
    for step in range(options.steps):
        drawn = wishes[rng.integers(len(wishes), size=options.prompts_per_step)]
        wish = np.repeat(drawn, options.responses, axis=0)
        responses = policy.write(wish, generator)
        scores = judges.learned(responses)
        logprobs = policy.logprobs(responses)
        shaped = kl_penalized_rewards(
            logprobs, judges.reference_logprobs(responses), responses.mask, scores=scores, kl_coef=kl_coef
        )
        advantages = rloo_advantages(shaped.sequence_reward.reshape(-1, options.responses)).reshape(-1)
        loss = -(advantages * logprobs.sum(dim=1)).mean()  # masked log-probs are 0
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        by_step[:, step] = judges.measures(wish, responses, scores, shaped.sequence_kl).mean(axis=1)
        bar.update()
    return by_step


def _measure(policy: Policy, judges: Judges, options: PolicyOptions, wishes: np.ndarray, seed: int) -> dict[str, Any]:
    """Mean and standard error of `MEASURES` over fresh responses to all prompts, and the first response to each of the
    first three as it came."""
    generator = torch.Generator().manual_seed(int(np.random.default_rng([seed, 6]).integers(2**62)))
    wish = np.repeat(wishes, options.measured_responses, axis=0)
    responses = policy.write(wish, generator)
    with torch.no_grad():
        logprobs = policy.logprobs(responses)
    kl = kl_penalized_rewards(logprobs, judges.reference_logprobs(responses), responses.mask, kl_coef=0.0).sequence_kl
    values = judges.measures(wish, responses, judges.learned(responses), kl)
    figures: dict[str, Any] = {
        name: {"mean": float(row.mean()), "standard_error": float(row.std(ddof=1) / math.sqrt(len(row)))}
        for name, row in zip(MEASURES, values, strict=True)
    }
    texts, prompts = responses.texts(), responses.prompts.tolist()
    figures["examples"] = [
        {
            "prompt": bytes(prompts[row][1:]).decode(),
            "response": texts[row],
            "learned_reward": float(values[0, row]),
            "oracle_reward": float(values[1, row]),
        }
        for row in range(0, len(texts), options.measured_responses)[:3]
    ]
    return figures


def _run_figures(
    kl_coef: float, by_step: np.ndarray, start: dict[str, Any], end: dict[str, Any], options: PolicyOptions
) -> dict[str, Any]:
    """What one β came to; a point of its curve stands in the middle of the steps that it averages."""
    windows = by_step.reshape(len(MEASURES), -1, options.window).mean(axis=2)
    middle = options.window * (np.arange(windows.shape[1]) + 0.5)
    points = [
        {"step": float(step), **dict(zip(MEASURES, map(float, values), strict=True))}
        for step, values in zip(middle, windows.T, strict=True)
    ]
    first, last = ({name: figures[name]["mean"] for name in MEASURES} for figures in (start, end))
    curve = [{"step": 0.0, **first}, *points, {"step": float(options.steps), **last}]
    best = max(curve, key=lambda point: point["oracle_reward"])
    return {"kl_coef": kl_coef, "curve": curve, "best": best, "end": end}
