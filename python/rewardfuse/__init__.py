"""Fused preference likelihoods and KL-penalized rewards for reward modelling."""

from rewardfuse._backend import backend, checks, use_backend
from rewardfuse.ops.bradley_terry import BradleyTerryLoss, BradleyTerryStats, bradley_terry_log_prob, bradley_terry_loss
from rewardfuse.ops.bradley_terry_tie import BradleyTerryTieLoss, bradley_terry_tie_loss

__version__ = "0.1.0"

__all__ = [
    "BradleyTerryLoss",
    "BradleyTerryStats",
    "BradleyTerryTieLoss",
    "RewardModel",
    "__version__",
    "backend",
    "bradley_terry_log_prob",
    "bradley_terry_loss",
    "bradley_terry_tie_loss",
    "checks",
    "use_backend",
]


def __getattr__(name: str):
    if name == "RewardModel":  # needs transformers, which loads only for who asks
        from rewardfuse.reward_model import RewardModel

        return RewardModel
    raise AttributeError(f"module 'rewardfuse' has no attribute {name!r}")
