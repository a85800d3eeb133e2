"""The reference backend: plain differentiable torch. The fallback where nothing faster is built, and the baseline."""

from rewardfuse.reference.all_pairs import all_pairs_loss
from rewardfuse.reference.bradley_terry import bradley_terry_loss
from rewardfuse.reference.bradley_terry_tie import bradley_terry_tie_loss
from rewardfuse.reference.plackett_luce import plackett_luce_loss

__all__ = ["all_pairs_loss", "bradley_terry_loss", "bradley_terry_tie_loss", "plackett_luce_loss"]
