"""What the tests of presets share: responses with gaps of every size, and comparisons with a trainer's tensors."""

from types import SimpleNamespace

import torch

from rewardfuse import approx_kl, kl_penalized_rewards

BETA = 0.05
# float32: values are at most 25 nats but for unclamped k3, which is held to a relative error
CLOSE = {"rtol": 2e-6, "atol": 2e-6}
GAPS = (-25.0, -15.3, -11.0, -10.0, -8.0, -4.0, -2.6, -1.0, 1.0, 4.4, 4.5, 9.9, 11.1, 15.0, 19.9, 20.1, 25.0)


def responses():
    """Six of them, [6, 24], with padding on both sides and a hole; no row without a valid token."""
    generator = torch.Generator().manual_seed(0)
    logprobs = -3 * torch.rand(6, 24, generator=generator)
    gaps = 0.5 * torch.randn(6, 24, generator=generator)
    gaps[::2, 4 : 4 + len(GAPS)] = torch.tensor(GAPS)
    mask = torch.ones(6, 24, dtype=torch.bool)
    mask[0, 22:], mask[1, :5], mask[2, 7:9], mask[3, 1:] = False, False, False, False
    return SimpleNamespace(
        logprobs=logprobs.requires_grad_(),
        ref=(logprobs - gaps).detach(),
        mask=mask,
        scores=torch.tensor([1.0, -14.0, 0.25, 12.0, -3.0, 0.0]),
        weights=torch.randn(6, 24, generator=generator),
    )


def gap(batch):
    """log π − log π_ref."""
    return (batch.logprobs - batch.ref).detach()


def same_on_valid_tokens(batch, ours, theirs):
    """Assert it of the values, and of the gradients of a random combination of them."""
    valid = batch.mask
    torch.testing.assert_close(ours[valid], theirs[valid], **CLOSE)
    weighted = [(batch.weights * out)[valid].sum() for out in (ours, theirs)]
    gradients = [torch.autograd.grad(total, batch.logprobs, retain_graph=True)[0] for total in weighted]
    assert not gradients[0][~valid].any()
    torch.testing.assert_close(*(gradient[valid] for gradient in gradients), **CLOSE)


def rewards_of(batch, preset, **options):
    """KLRewards by a preset."""
    return kl_penalized_rewards(
        batch.logprobs, batch.ref, batch.mask, scores=batch.scores, kl_coef=BETA, **preset.rewards, **options
    )


def kl_of(batch, preset, **options):
    """The KL of each token by a preset."""
    return approx_kl(batch.logprobs, batch.ref, mask=batch.mask, **preset.kl, **options)
