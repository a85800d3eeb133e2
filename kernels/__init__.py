"""The Triton backend: the same differentiable functions as rewardfuse._C and rewardfuse.reference."""

from rewardfuse.kernels.bradley_terry.triton import bradley_terry_loss
from rewardfuse.kernels.bradley_terry_tie.triton import bradley_terry_tie_loss

__all__ = ["bradley_terry_loss", "bradley_terry_tie_loss"]
