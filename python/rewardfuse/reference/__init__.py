"""The reference backend: plain differentiable torch. The fallback where nothing faster is built, and the baseline."""

from rewardfuse.reference.bradley_terry import bradley_terry_loss
from rewardfuse.reference.bradley_terry_tie import bradley_terry_tie_loss

__all__ = ["bradley_terry_loss", "bradley_terry_tie_loss"]
