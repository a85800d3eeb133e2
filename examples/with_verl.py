"""verl's KL by verl's names on the fused op. Needs no verl; a run of verl takes it through one variable,
VERL_USE_EXTERNAL_MODULES=rewardfuse.integrations.verl.plugin, in the environment of every process."""

from types import SimpleNamespace

import torch

from rewardfuse.integrations.verl import AdaptiveKLController, apply_kl_penalty, kl_penalty

log_prob, ref = (-torch.rand(4, 16)).requires_grad_(), -torch.rand(4, 16)
kl_penalty(log_prob, ref, "k3+").mean().backward()  # the value is k3's, the gradient that of KL(π‖π_ref)

mask = torch.arange(16) < torch.tensor([[16], [9], [12], [0]])  # the last response is empty
scores = torch.zeros(4, 16)
scores[torch.arange(4), [15, 8, 11, 0]] = torch.randn(4)
batch = {"response_mask": mask, "token_level_scores": scores, "old_log_probs": log_prob.detach(), "ref_log_prob": ref}
controller = AdaptiveKLController(init_kl_coef=0.01, target_kl=0.1, horizon=1000)
data, metrics = apply_kl_penalty(SimpleNamespace(batch=batch), controller, "kl")
print(metrics, controller.value)

resumed = AdaptiveKLController(init_kl_coef=1.0, target_kl=1.0, horizon=1)
resumed.load_state_dict(controller.state_dict())  # goes into the checkpoint
assert resumed.value == controller.value
