"""OpenRLHF's reward-model losses on the fused Bradley-Terry loss.

The modules take OpenRLHF's arguments in OpenRLHF's order, so that one line changes a trainer::

    from rewardfuse.integrations.openrlhf import PairWiseLoss

    trainer.loss_fn = PairWiseLoss()  # trainer: openrlhf.trainer.RewardModelTrainer

Tested against OpenRLHF 0.11.2, which need not be installed.
"""

import torch
from torch import nn

from rewardfuse import bradley_terry_loss


class PairWiseLoss(nn.Module):
    r"""Mean Bradley-Terry loss of pairs, :math:`-\log\sigma(r_c - r_r - m)`.

    Call with ``(chosen_reward, reject_reward, margin=None)``: rewards of one shape and floating dtype, margin a
    number, a 0-d tensor or a tensor of the same shape, of any real dtype. Returns a 0-d tensor: float32, or float64
    for float64 rewards.

    Deviations from OpenRLHF 0.11.2 ``PairWiseLoss``: 16-bit rewards give a float32 loss instead of a 16-bit one; an
    empty batch gives 0 instead of NaN; a margin of another shape is an error and never broadcasts.

    Source: Bradley and Terry 1952; margin: Touvron et al. 2023 (Llama 2), eq. 2.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, see :func:`rewardfuse.bradley_terry_loss`.

    >>> loss_fn = PairWiseLoss()
    >>> round(loss_fn(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([1.0])).item(), 4)
    0.6931
    """

    def forward(
        self,
        chosen_reward: torch.Tensor,  # [pairs]
        reject_reward: torch.Tensor,  # [pairs]
        margin: torch.Tensor | float | None = None,  # [pairs]
    ) -> torch.Tensor:
        return bradley_terry_loss(chosen_reward, reject_reward, margin)


class LogExpLoss(PairWiseLoss):
    r"""Mean of :math:`\log(1 + e^{r_r - r_c + m})`: the same function as :class:`PairWiseLoss`, and here the same code.

    Arguments, result and errors as in :class:`PairWiseLoss`.

    Deviations from OpenRLHF 0.11.2 ``LogExpLoss``, which evaluates the formula literally: in float32 that overflows
    at a gap :math:`r_r - r_c` of about 89 (the loss is inf and the gradient NaN) and rounds to exactly 0 beyond
    :math:`r_c - r_r \approx 17`, where this one stays exact; and it ignores ``margin``, which counts here.

    Source: Bai et al. 2022, arXiv 2204.05862, section 2.3.

    >>> LogExpLoss()(torch.tensor([0.0]), torch.tensor([100.0])).item()
    100.0
    """
