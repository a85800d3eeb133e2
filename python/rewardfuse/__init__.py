"""Fused preference likelihoods and KL-penalized rewards for reward modelling."""

from rewardfuse._backend import backend, checks, use_backend
from rewardfuse.ops.all_pairs import AllPairsLoss, all_pairs_loss
from rewardfuse.ops.bradley_terry import BradleyTerryLoss, BradleyTerryStats, bradley_terry_log_prob, bradley_terry_loss
from rewardfuse.ops.bradley_terry_tie import BradleyTerryTieLoss, bradley_terry_tie_loss
from rewardfuse.ops.plackett_luce import (
    PlackettLuceLoss,
    plackett_luce_log_prob,
    plackett_luce_loss,
    plackett_luce_loss_packed,
    plackett_luce_sample,
)

__version__ = "0.1.0"

__all__ = [
    "AllPairsLoss",
    "BradleyTerryLoss",
    "BradleyTerryStats",
    "BradleyTerryTieLoss",
    "PlackettLuceLoss",
    "RewardModel",
    "__version__",
    "all_pairs_loss",
    "backend",
    "bradley_terry_log_prob",
    "bradley_terry_loss",
    "bradley_terry_tie_loss",
    "checks",
    "plackett_luce_log_prob",
    "plackett_luce_loss",
    "plackett_luce_loss_packed",
    "plackett_luce_sample",
    "use_backend",
]


def __getattr__(name: str):
    if name == "RewardModel":  # needs transformers, which loads only for who asks
        from rewardfuse.reward_model import RewardModel

        return RewardModel
    raise AttributeError(f"module 'rewardfuse' has no attribute {name!r}")
