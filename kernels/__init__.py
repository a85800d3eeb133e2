"""The Triton backend: the same differentiable functions as rewardfuse._C and rewardfuse.reference."""

from rewardfuse.kernels.all_pairs.launch import all_pairs_loss
from rewardfuse.kernels.bradley_terry.triton import bradley_terry_loss
from rewardfuse.kernels.bradley_terry_tie.triton import bradley_terry_tie_loss
from rewardfuse.kernels.plackett_luce.launch import plackett_luce_loss

__all__ = ["all_pairs_loss", "bradley_terry_loss", "bradley_terry_tie_loss", "plackett_luce_loss"]
