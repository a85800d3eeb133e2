"""NeMo-RL's reward-model loss on the fused op. Needs no NeMo-RL; there it is the loss_fn that rm_train is given."""

import torch

from rewardfuse.integrations.nemo_rl import PreferenceLossFn, calculate_kl

logits = torch.randn(8, 1, requires_grad=True)  # chosen, rejected, chosen, rejected, ...
sample_mask = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0])  # the third pair is left out
with torch.no_grad():
    logits[4:6] = float("nan")  # and may be anything
loss, metrics = PreferenceLossFn()(
    logits=logits,
    data={"sample_mask": sample_mask},
    global_valid_seqs=sample_mask.sum(),  # over all micro-batches and processes
    global_valid_toks=None,
)
loss.backward()
assert not logits.grad.isnan().any()
print(metrics)

policy = (-torch.rand(4, 16)).requires_grad_()
calculate_kl(policy, -torch.rand(4, 16), kl_type="k3").mean().backward()
