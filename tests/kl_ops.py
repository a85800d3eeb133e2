"""The KL ops behind one face, so that their contract is tested once for all."""

import torch

import rewardfuse
from pairs import to_device

OPTIONS = {"estimator": "k3", "input_clamp": (-2.0, 2.5), "output_clamp": (None, 4.0)}
LEAVES = ("logprobs", "importance_weight", "scores", "logits")


class Op:
    """An op as a function of tensors by name, which returns everything that carries gradients."""

    def __init__(self, name, op, names, function):
        self.name, self.op, self.names, self.function = name, op, names, function
        self.wants = [name for name in names if name in LEAVES]

    def tensors(self, device, dtype=torch.float32, shape=(3, 5)):
        """Arguments with padding and a hole; those that may want a gradient do."""
        made = {name: t for name, t in tensors_of(shape, dtype).items() if name in self.names}
        made = to_device(made, device)
        return made | {name: made[name].requires_grad_() for name in self.wants}

    def gradients(self, tensors, outputs, upstream=None, keep=False):
        """Of all outputs that carry a graph, for all leaves; the graph is freed unless it is to be kept."""
        outputs = [o for o in outputs if o.requires_grad]
        upstream = [torch.ones_like(o) for o in outputs] if upstream is None else upstream
        return torch.autograd.grad(outputs, [tensors[name] for name in self.wants], upstream, retain_graph=keep)


def tensors_of(shape, dtype):
    """By name; logits have a padded vocabulary of 7, of which 6 are real."""
    floats = {name: torch.randn(shape, dtype=torch.float64) for name in ("logprobs", "ref_logprobs", "token_scores")}
    floats["importance_weight"] = torch.rand(shape, dtype=torch.float64) + 0.5
    floats["scores"] = torch.randn(shape[:-1], dtype=torch.float64)
    floats["logits"], floats["ref_logits"] = (torch.randn(*shape, 7, dtype=torch.float64) for _ in "ab")
    return {name: t.to(dtype) for name, t in floats.items()} | {
        "mask": (torch.arange(shape[-1]) < 4) & (torch.rand(shape) > 0.2),
        "ended": torch.rand(shape[:-1]) > 0.5,
        "kl_coef": torch.tensor(0.3, dtype=dtype),
        "tokens": torch.randint(0, 6, shape),
        "temperature": torch.rand(shape[:-1]).to(dtype) + 0.5,
    }


def rewards(logprobs, ref_logprobs, **arguments):
    arguments = {"missing_eos_penalty": 0.5, **OPTIONS, **arguments}
    result = rewardfuse.kl_penalized_rewards(logprobs, ref_logprobs, differentiable_rewards=True, **arguments)
    return result.rewards, result.kl, result.sequence_kl, result.sequence_reward, torch.stack(result.stats)


def per_token(logprobs, ref_logprobs, mask, scores):
    """Scores a token from one a sequence, so that one name holds both."""
    scores = scores.unsqueeze(-1) + torch.linspace(-1, 1, logprobs.shape[-1], device=scores.device, dtype=scores.dtype)
    return rewards(logprobs, ref_logprobs, mask=mask, scores=scores, missing_eos_penalty=None, kl_coef=0.5)


OPS = (
    Op(
        "approx_kl",
        "approx_kl",
        ("logprobs", "ref_logprobs", "importance_weight", "mask"),
        lambda **t: (rewardfuse.approx_kl(**t, **OPTIONS),),
    ),
    Op(
        "straight through",
        "approx_kl",
        ("logprobs", "ref_logprobs", "mask"),
        lambda **t: (rewardfuse.approx_kl(**t, **OPTIONS, importance_weight=0.5, gradient_estimator="k2"),),
    ),
    Op(
        "rewards",
        "kl_penalized_rewards",
        ("logprobs", "ref_logprobs", "mask", "scores", "ended", "kl_coef"),
        lambda **t: rewards(**t, terminal="one_past", score_clip=1.5),
    ),
    Op("token rewards", "kl_penalized_rewards", ("logprobs", "ref_logprobs", "mask", "scores"), per_token),
    Op(
        "token_logprobs",
        "token_logprobs",
        ("logits", "tokens", "mask", "temperature"),
        lambda **t: rewardfuse.token_logprobs(**t, return_entropy=True, logit_softcap=5.0, vocab_size=6),
    ),
)
