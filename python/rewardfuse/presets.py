r"""Trainers' KL terms as options: what to pass to get the numbers of TRL, OpenRLHF, verl and NeMo-RL.

Each function takes a trainer's own options, under the trainer's names and with its defaults, and returns a
:class:`Preset`. The KL coefficient is passed beside it, as always::

    from rewardfuse import approx_kl, kl_penalized_rewards, presets

    options = presets.openrlhf().rewards
    shaped = kl_penalized_rewards(logprobs, ref_logprobs, mask, scores=scores, kl_coef=0.01, **options)
    kl = approx_kl(logprobs, ref_logprobs, mask=mask, **presets.trl_grpo().kl)

Values and gradients are the trainer's at every valid token. Its defects are not: they stand in the docstrings, and
``docs/kl.md`` shows them beside what happens here. Two are common. Trainers multiply by the mask where this library
selects: a NaN in a masked place leaks there. And they evaluate :math:`e^{-x} - 1 + x` in float32 as it stands: 0 or
1.7e-8 at x = −1e-4, where k3 is 5e-9, and even negative values nearby.

Throughout, :math:`x = \log π(a) - \log π_{ref}(a)` of a sampled token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rewardfuse.ops._kl_options import bounds

Clip = tuple[float, float]


@dataclass(frozen=True)
class Preset:
    """Options that reproduce a trainer's KL term.

    >>> import rewardfuse.presets
    >>> rewardfuse.presets.openrlhf()  # doctest: +NORMALIZE_WHITESPACE
    Preset(name='OpenRLHF', version='0.11.2', kl={'estimator': 'k1', 'output_clamp': 10.0},
           rewards={'estimator': 'k1', 'output_clamp': 10.0, 'score_clip': (-10.0, 10.0)})
    """

    name: str  #: of the trainer
    version: str  #: of the trainer, whose source was read
    kl: dict[str, Any]  #: for :func:`rewardfuse.approx_kl`: the KL as a term of the loss
    rewards: dict[str, Any] | None  #: for :func:`rewardfuse.kl_penalized_rewards`; None: no KL in the reward there


def trl_rloo(reward_clip_range: Clip | None = None) -> Preset:
    r"""TRL's ``RLOOTrainer``: k1 in the reward, one number a response.

    .. math:: R = \mathrm{clamp}(s) - β \sum_t m_t x_t

    is ``KLRewards.sequence_reward``; the trainer has no reward of single tokens. Its β is ``RLOOConfig.beta``, 0.05. It
    keeps no graph: for the gradient of R pass ``differentiable_rewards=True``.

    Args:
        reward_clip_range: (low, high) of the score, or None.

    Source: TRL 1.16.0, ``RLOOTrainer._generate_and_score_completions``.

    Not reproduced: a NaN log-prob in a masked place makes the whole R NaN. Other on purpose: a response without a valid
    token (``mask_truncated_completions``) keeps its score there, and has reward 0 here.

    Raises:
        ValueError: ``reward_clip_range`` is no range.

    >>> from rewardfuse import presets
    >>> presets.trl_rloo(reward_clip_range=(-5, 5)).rewards
    {'estimator': 'k1', 'score_clip': (-5.0, 5.0)}
    """
    return Preset("TRL RLOO", "1.16.0", {"estimator": "k1"}, {"estimator": "k1", **_score_clip(reward_clip_range)})


def trl_grpo(use_bias_correction_kl: bool = True) -> Preset:
    r"""TRL's ``GRPOTrainer``: k3 in the loss, by default times the policy ratio :math:`w = π/π_{old}`.

    .. math:: k = w\,(e^{-x} - 1 + x) \qquad \frac{\partial k}{\partial \log π} = w\,x

    The gradient is that of w·k3 through both factors, and is taken here as such: value k3, gradient k2. While π_old
    is π, w is 1. Off policy pass ``importance_weight=(logprobs - old_logprobs).exp().detach()``. Its β is
    ``GRPOConfig.beta``, 0.0; ``rewards`` is None, since the reward has no KL.

    Args:
        use_bias_correction_kl: False leaves w out: value and gradient of k3. True is the trainer's with
            ``importance_sampling_level="token"``.

    Source: TRL 1.16.0, ``GRPOTrainer._compute_loss``.

    Not reproduced: k3 is inf for x < −88.7, and its gradient then NaN; the gradient :math:`w\,x` comes out there as a
    difference of two numbers of size :math:`e^{-x}`, off by up to 0.25 around x = −15, and by its own size around
    x = −20; a NaN in a masked place makes the loss NaN.

    >>> from rewardfuse import presets
    >>> presets.trl_grpo().kl
    {'estimator': 'k3', 'gradient_estimator': 'k2'}
    """
    return Preset("TRL GRPO", "1.16.0", _straight_through("k3", use_bias_correction_kl), None)


def openrlhf(
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
    reward_clip_range: Clip | None = (-10.0, 10.0),
) -> Preset:
    r"""OpenRLHF's ``compute_approx_kl`` and ``compute_reward``: the KL clamped to ±10, the score at the last action.

    .. math:: r_t = [t = last]\,\mathrm{clamp}(s) - β\,\mathrm{clamp}(k(x_t), \pm 10)

    and k3 takes x no lower than −10. The clamps leave no gradient beyond 10 nats (k1), 4.5 nats (k2), and beyond
    x ≈ −2.6 and x ≈ 11 (k3). β is ``--algo.kl.init_coef``, 0.01.

    Args:
        kl_estimator: ``--algo.kl.estimator``: "k1", "k2" or "k3".
        unbiased_gradient: ``--algo.kl.unbiased_gradient``, for the KL in the loss: the gradient of k2, whatever the
            clamps. Off policy the trainer weighs this gradient, not the value, by
            w = min(π/π_old, 10): ``kl.detach() + w * (kl - kl.detach())``.
        reward_clip_range: ``--reward.clip_range``, (low, high) of the score, or None.

    Source: OpenRLHF 0.11.2, ``openrlhf/models/utils.py``.

    Not reproduced: a response without a valid token has its score in the last column; masked places carry −β·k, and
    NaN where the log-prob is; float64 log-probs are cut to float32.

    Raises:
        ValueError: an unknown estimator, or ``reward_clip_range`` is no range.

    >>> from rewardfuse import presets
    >>> presets.openrlhf(kl_estimator="k3", reward_clip_range=None).rewards
    {'estimator': 'k3', 'input_clamp': (-10.0, None), 'output_clamp': 10.0}
    """
    _one_of("kl_estimator", kl_estimator, ("k1", "k2", "k3"))
    floor = {"input_clamp": (-10.0, None)} if kl_estimator == "k3" else {}
    clamps = {**floor, "output_clamp": 10.0}
    kl = {**_straight_through(kl_estimator, unbiased_gradient), **clamps}
    rewards = {"estimator": kl_estimator, **clamps, **_score_clip(reward_clip_range)}
    return Preset("OpenRLHF", "0.11.2", kl, rewards)


_VERL = {
    "kl": "k1",
    "k1": "k1",
    "abs": "abs",
    "mse": "k2",
    "k2": "k2",
    "low_var_kl": "k3",
    "k3": "k3",
}


def verl(kl_penalty: str = "kl", kl_loss_type: str = "low_var_kl") -> Preset:
    r"""verl's ``kl_penalty``, in the reward (``apply_kl_penalty``) and in the loss: two options, two defaults.

    .. math:: r_t = [t = last]\,s - β\,k(x_t)

    k1, k2 and abs as they are; k3 with x clamped to ±20 and then itself to ±10, which leaves no gradient beyond
    x ≈ −2.6 and x ≈ 11. β is ``algorithm.kl_ctrl.kl_coef`` in the reward and ``actor.kl_loss_coef`` in the loss, 0.001.

    Args:
        kl_penalty: ``algorithm.kl_penalty``, for ``Preset.rewards``: "kl" or "k1", "abs", "mse" or "k2",
            "low_var_kl" or "k3"; with a "+" behind it the gradient is that of k2, whatever the clamps.
        kl_loss_type: ``actor.kl_loss_type``, for ``Preset.kl``; the same names.

    Source: verl 0.9.1, ``verl/trainer/ppo/core_algos.py`` and ``ray_trainer.py``.

    Not reproduced: "full" raises NotImplementedError there (here it is
    ``kl_penalized_rewards_from_logits(..., estimator="full")``); a response without a token has its score in the last
    column, and counts as 0 in the mean KL that the controller sees; a NaN in a masked place is NaN in the rewards.

    Raises:
        ValueError: an unknown name.

    >>> from rewardfuse import presets
    >>> presets.verl().rewards
    {'estimator': 'k1'}
    >>> presets.verl(kl_loss_type="k3+").kl
    {'estimator': 'k3', 'gradient_estimator': 'k2', 'input_clamp': 20.0, 'output_clamp': 10.0}
    """
    return Preset("verl", "0.9.1", _verl("kl_loss_type", kl_loss_type), _verl("kl_penalty", kl_penalty))


def _verl(name: str, value: str) -> dict[str, Any]:
    base = value.removesuffix("+") if isinstance(value, str) else value
    if base == "full":
        raise ValueError(f'{name}: "full" needs the logits: kl_penalized_rewards_from_logits(..., estimator="full")')
    _one_of(name, base, tuple(_VERL), value)
    estimator = _VERL[base]
    clamps = {"input_clamp": 20.0, "output_clamp": 10.0} if estimator == "k3" else {}
    return {**_straight_through(estimator, value.endswith("+")), **clamps}


def nemo_rl(
    kl_type: str = "k3",
    kl_input_clamp_value: float | None = 20.0,
    kl_output_clamp_value: float | None = 10.0,
) -> Preset:
    r"""NeMo-RL's ``calculate_kl``, in the loss or (``use_kl_in_reward``) in the reward.

    .. math:: r_t = [t = last]\,s - β\,\mathrm{clamp}(k(\mathrm{clamp}(x_t, \pm 20)), \pm 10)

    The rewards are those of ``GeneralizedAdvantageEstimator``; for Reinforce++, which gives the score to every token,
    pass it as ``scores=scores[:, None].expand_as(mask)``. The loss multiplies the KL by w before the output clamp; w is
    π over itself (1, but with a gradient): pass ``importance_weight=(logprobs - logprobs.detach()).exp()``; with
    ``use_on_policy_kl_approximation`` it is π over the generator's. β is ``reference_policy_kl_penalty``, 0.01.

    Args:
        kl_type: ``reference_policy_kl_type``: "k1", "k2" or "k3".
        kl_input_clamp_value: x is clamped to ±c; None: not at all. The trainer cuts the gradient to w there too.
        kl_output_clamp_value: likewise the KL. On k3, 10 leaves no gradient beyond x ≈ −2.6 and x ≈ 11.

    Source: NeMo-RL, main branch of August 2026, ``algorithms/utils.py`` and ``algorithms/advantage_estimator.py``. PyPI
    has its name alone, so the tests hold this preset to the formula, not to the trainer's function.

    Not reproduced: a NaN in a masked place is NaN in the rewards; versions whose advantage estimators do not hand the
    clamp options on to ``calculate_kl`` always clamp to 20 and 10 in the reward.

    Raises:
        ValueError: an unknown estimator, or a clamp that is not positive.

    >>> from rewardfuse import presets
    >>> presets.nemo_rl(kl_output_clamp_value=None).rewards
    {'estimator': 'k3', 'input_clamp': 20.0}
    """
    _one_of("kl_type", kl_type, ("k1", "k2", "k3"))
    options: dict[str, Any] = {"estimator": kl_type}
    given = {"input_clamp": kl_input_clamp_value, "output_clamp": kl_output_clamp_value}
    for option, clamp in given.items():
        bounds(f"kl_{option}_value", clamp)
        if clamp is not None:
            options[option] = clamp
    return Preset("NeMo-RL", "main, August 2026", options, dict(options))


def _straight_through(estimator: str, yes: bool) -> dict[str, Any]:
    return {"estimator": estimator, **({"gradient_estimator": "k2"} if yes else {})}


def _score_clip(reward_clip_range: Clip | None) -> dict[str, Any]:
    return {} if reward_clip_range is None else {"score_clip": bounds("reward_clip_range", reward_clip_range)}


def _one_of(name: str, value: object, known: tuple[str, ...], given: object = None) -> None:
    if value not in known:
        listed = ", ".join(f'"{option}"' for option in known[:-1])
        raise ValueError(f'{name}: expected {listed} or "{known[-1]}", got {given or value!r}')
