"""OpenRLHF's functions on the fused ops. Needs no OpenRLHF; in a run with it, one call puts them in place."""

import torch

from rewardfuse.integrations.openrlhf import PairWiseLoss, compute_approx_kl, compute_reward

# A reward model: trainer.loss_fn = PairWiseLoss(), or install() before the trainer is made.
chosen, rejected = torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)
PairWiseLoss()(chosen, rejected).backward()

# PPO: rewards of tokens. In a run: rewardfuse.integrations.openrlhf.install() in every process, before training.
log_probs, base = -torch.rand(4, 16), -torch.rand(4, 16)
action_mask = torch.arange(16) < torch.tensor([[16], [9], [12], [0]])
log_probs[~action_mask] = float("nan")  # what stands in masked places never matters
kl = compute_approx_kl(log_probs, base, kl_estimator="k1")
rewards = compute_reward(torch.randn(4), 0.01, kl, action_mask, reward_clip_range=(-10.0, 10.0))
assert not rewards.isnan().any() and not rewards[3].any()

# KL in the loss: the value is k3's, the gradient that of KL(π‖π_ref), weighted by π/π_old where that is off policy.
policy = (-torch.rand(4, 16)).requires_grad_()
kl = compute_approx_kl(policy, base, policy.detach() + 0.1, kl_estimator="k3", unbiased_gradient=True)
kl.mean().backward()
print(rewards[1].numpy().round(3))
