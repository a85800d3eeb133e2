"""A small world of preferences whose truth is known.

A guest asks a bar for something ("2 tea+jam?") and the bar answers ("3 tea+fig. Enjoy!"). The oracle
reward of an answer depends on the prompt and on the answer (`oracle_reward`). A pool of annotators compares answers;
annotator A sees the reward through a bounded bias and chooses the answer that looks better to her with a probability
that rises from 1/2 to 1 with the gap (`xi`):

    u_A(x, y) = r*(x, y) + b(x, y; A),   |b| <= BIAS_BOUND
    P_A(y1 preferred to y2 | x) = xi(|d|) if d >= 0 else 1 - xi(|d|),   d = u_A(x, y1) - u_A(x, y2)

This is the annotator model of Sun, Shen & Ton, "Rethinking Reward Modeling in Preference-based Large Language Model
Alignment", ICLR 2025 (arXiv:2411.04991): a label is right with probability xi of the gap, and annotators are biased.
`xi` is not logistic on purpose: the annotators do not follow Bradley-Terry, and yet the model is trained with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import xlog1py, xlogy

# Words of one field have one width, so that a field stands at the same place in every prompt: a model trained for about
# a minute can learn where to look.
COUNTS = ("1", "2", "3", "4")
DRINKS = ("tea", "gin", "rum", "pop")
EXTRAS = ("fig", "jam", "ham", "nut")
FIELDS = (COUNTS, DRINKS, EXTRAS)  # a wish is one index into each

CLOSERS = ("", " Ugh.", " Bye.", " Enjoy!", " Thanks!", " Nice to see you.")
COURTESY = np.array([0.0, -1.0, 0.0, 0.25, 0.5, 0.5])
EXCLAIMS = np.array([float("!" in closer) for closer in CLOSERS])

# Multiples of 1/4 keep every reward exact in binary: equal rewards compare equal, whatever the order of their sums.
DRINK_WORTH, EXTRA_WORTH, COUNT_COST = 2.0, 1.5, 0.75

XI_SCALE = 0.5
BIAS_BOUND = 1.0
# How each annotator weighs an answer's length, courtesy, exclamation marks, and whether the count is the one asked for.
TASTES = np.array(
    [
        [0.8, 0.0, 0.0, 0.0],  # likes long answers
        [0.4, 0.5, 0.0, 0.0],  # likes long and courteous answers
        [-0.6, 0.0, 0.0, 0.0],  # likes short answers
        [0.0, 0.8, 0.0, 0.0],  # likes courtesy
        [0.0, -0.4, -0.6, 0.0],  # likes it plain
        [0.0, 0.0, 0.6, 0.0],  # likes exclamation marks
        [0.0, 0.0, 0.0, 0.8],  # cares about the count above all
        [0.0, 0.0, 0.0, 0.0],  # unbiased
    ]
)
MATCH_PROBABILITY = 0.5  # of copying a field from the prompt; a uniform draw can hit it, too


@dataclass(frozen=True)
class Answers:
    """Answers to prompts, as indices; every array shares the leading shape `[...]`.

    Attributes:
        wish: `[..., 3]` what the prompt asks for, an index into each of `FIELDS`.
        given: `[..., 3]` what the answer offers, likewise.
        closer: `[...]` index into `CLOSERS`.
    """

    wish: np.ndarray
    given: np.ndarray
    closer: np.ndarray

    def __getitem__(self, index) -> Answers:
        return Answers(self.wish[index], self.given[index], self.closer[index])

    def interleave(self, other: Answers) -> Answers:
        """Answers `[..., 2 n]` that alternate between this one's and the other's, from `[..., n]` each."""
        lead = self.closer.shape[:-1]
        wish, given = (
            np.stack(parts, axis=-2).reshape(*lead, -1, 3)
            for parts in ((self.wish, other.wish), (self.given, other.given))
        )
        return Answers(wish, given, np.stack((self.closer, other.closer), axis=-1).reshape(*lead, -1))

    def flat(self) -> Answers:
        """The same answers with one leading dimension, `[n]`."""
        return Answers(*(part.reshape(-1, 3) for part in (self.wish, self.given)), self.closer.reshape(-1))

    def prompts(self) -> np.ndarray:
        """The prompts as an array of str, `[...]`."""
        return _order(self.wish) + "?"

    def texts(self) -> np.ndarray:
        """The answers as an array of str, `[...]`."""
        return _order(self.given) + "." + np.array(CLOSERS, dtype=object)[self.closer]


def _order(fields: np.ndarray) -> np.ndarray:
    """`[..., 3]` indices as words: "2 tea+jam"."""
    words = [np.array(names, dtype=object)[fields[..., i]] for i, names in enumerate(FIELDS)]
    return words[0] + " " + words[1] + "+" + words[2]


def split_prompts(held_out: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Every wish there is, shuffled and cut in two: `(train [n, 3], held_out [held_out, 3])`, with none in common."""
    total = int(np.prod([len(names) for names in FIELDS]))
    if not 0 < held_out < total:
        raise ValueError(f"held_out: expected an int between 1 and {total - 1}, got {held_out}")
    wishes = np.stack(np.unravel_index(rng.permutation(total), [len(names) for names in FIELDS]), axis=-1)
    return wishes[held_out:], wishes[:held_out]


def sample_answers(wish: np.ndarray, rng: np.random.Generator) -> Answers:
    """One answer for each wish `[..., 3]`; each field is the wish's with `MATCH_PROBABILITY`, else uniform."""
    shape = wish.shape[:-1]
    offered = np.stack([rng.integers(len(names), size=shape) for names in FIELDS], axis=-1)
    given = np.where(rng.random(wish.shape) < MATCH_PROBABILITY, wish, offered)
    return Answers(wish, given, rng.integers(len(CLOSERS), size=shape))


def sample_two_answers(wish: np.ndarray, rng: np.random.Generator) -> tuple[Answers, Answers]:
    """Two answers for each wish `[..., 3]`, independent but for this: where they come out alike, the second one gets
    another closing, since a pair of equal texts can teach and test nothing."""
    first, second = sample_answers(wish, rng), sample_answers(wish, rng)
    alike = (first.given == second.given).all(axis=-1) & (first.closer == second.closer)
    step = rng.integers(1, len(CLOSERS), size=alike.shape)
    closer = np.where(alike, (second.closer + step) % len(CLOSERS), second.closer)
    return first, Answers(second.wish, second.given, closer)


def oracle_reward(answers: Answers) -> np.ndarray:
    """The true reward r*(x, y), float64 `[...]`.

    `r* = 2 [drink right] + 1.5 [extra right] - 0.75 |count asked - given| + courtesy`
    """
    right = answers.given == answers.wish
    off = np.abs(answers.given - answers.wish)
    wish_part = DRINK_WORTH * right[..., 1] + EXTRA_WORTH * right[..., 2] - COUNT_COST * off[..., 0]
    return wish_part + COURTESY[answers.closer]


def annotator_bias(answers: Answers) -> np.ndarray:
    """Each annotator's bias b(x, y; A) = BIAS_BOUND tanh(taste_A . features(x, y)), float64 `[annotators, ...]`."""
    length = np.vectorize(len, otypes=[np.float64])(answers.texts())
    courtesy = COURTESY[answers.closer]
    exclaims = EXCLAIMS[answers.closer]
    count_right = (answers.given[..., 0] == answers.wish[..., 0]).astype(np.float64)
    features = np.stack([(length - 16.0) / 6.0, courtesy, exclaims, count_right], axis=-1)
    return BIAS_BOUND * np.tanh(np.moveaxis(features @ TASTES.T, -1, 0))


def xi(gap: np.ndarray) -> np.ndarray:
    """Probability that an annotator names the answer that looks better to her by `gap >= 0`: 1 - exp(-gap/XI_SCALE)/2.

    xi(0) = 1/2, strictly rising, tends to 1: the order of utilities with Laplace noise on their difference.
    """
    return 1.0 - 0.5 * np.exp(-np.asarray(gap, dtype=np.float64) / XI_SCALE)


def first_wins_probability(first: Answers, second: Answers) -> np.ndarray:
    """Each annotator's probability of preferring `first`, float64 `[annotators, ...]`."""
    gap = oracle_reward(first) + annotator_bias(first) - oracle_reward(second) - annotator_bias(second)
    right = xi(np.abs(gap))
    return np.where(gap >= 0, right, 1.0 - right)


@dataclass(frozen=True)
class LabelledPairs:
    """`n` pairs of answers to the same prompt, each labelled once by an annotator drawn uniformly from the pool.

    Attributes:
        first, second: the answers, `[n]`.
        probability: `[n]` probability, over the draw of the annotator and her choice, that `first` is preferred.
        first_wins: bool `[n]`, the label.
    """

    first: Answers
    second: Answers
    probability: np.ndarray
    first_wins: np.ndarray

    def records(self) -> list[dict[str, str]]:
        """The pairs as `prompt`, `chosen`, `rejected`: what a trainer sees. Annotators stay unnamed."""
        prompts, first, second = self.first.prompts(), self.first.texts(), self.second.texts()
        chosen = np.where(self.first_wins, first, second)
        rejected = np.where(self.first_wins, second, first)
        return [
            {"prompt": str(p), "chosen": str(c), "rejected": str(r)}
            for p, c, r in zip(prompts, chosen, rejected, strict=True)
        ]


def label_pairs(first: Answers, second: Answers, rng: np.random.Generator) -> LabelledPairs:
    """Ask one annotator, drawn uniformly and independently for each pair, which of two answers `[n]` is better."""
    by_annotator = first_wins_probability(first, second)
    n = by_annotator.shape[1]
    annotator = rng.integers(len(TASTES), size=n)
    first_wins = rng.random(n) < by_annotator[annotator, np.arange(n)]
    return LabelledPairs(first, second, by_annotator.mean(axis=0), first_wins)


def sample_pairs(wishes: np.ndarray, n: int, rng: np.random.Generator) -> LabelledPairs:
    """`n` labelled pairs whose prompts are drawn uniformly from `wishes [m, 3]`."""
    wish = wishes[rng.integers(len(wishes), size=n)]
    return label_pairs(*sample_two_answers(wish, rng), rng)


def best_accuracy(probability: np.ndarray) -> float:
    """The highest expected accuracy against the labels for any rule that does not see the annotator.

    A rule that names `first` is right with probability `P`, one that names `second` with `1 - P`; the best names the
    likelier at each pair, so the bound is mean(max(P, 1 - P)), with `P [n]` averaged over the pool. It bounds the
    expectation over labels: on one draw of n labels the figure scatters around it.
    """
    return float(np.maximum(probability, 1.0 - probability).mean())


def best_log_likelihood(probability: np.ndarray) -> float:
    """The highest expected log-likelihood per pair, in nats: mean(P ln P + (1 - P) ln(1 - P)) (Gibbs' inequality)."""
    return float((xlogy(probability, probability) + xlog1py(1.0 - probability, -probability)).mean())


def oracle_accuracy(reward_gap: np.ndarray, probability: np.ndarray) -> float:
    """Expected accuracy of the oracle's own order against the labels; a pair that the oracle ties counts one half.

    Args:
        reward_gap: `[n]` r*(x, first) - r*(x, second).
        probability: `[n]` pool-averaged probability that `first` is preferred.
    """
    named = np.where(reward_gap > 0, probability, 1.0 - probability)
    return float(np.where(reward_gap == 0, 0.5, named).mean())
