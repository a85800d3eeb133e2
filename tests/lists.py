"""The ops on lists behind one face, so that their contract is tested once, and draws of their arguments."""

import math

import torch
from hypothesis import strategies as st

import rewardfuse

# Largest error of a value or gradient against float64 on the same inputs, relative to max(1, |value|), for scores near
# each other; rounding() says what wide lists and large weights add.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}
# A gradient is rounded once more, to the storage type.
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
SPREADS = ("normal", "wide", "offset", "equal")


class PlackettLuce:
    """plackett_luce_loss with one kind of ranking, the same at each call."""

    op = "plackett_luce_loss"

    def __init__(self, name, **options):
        self.name, self.options = name, options

    def function(self, scores, **arguments):
        lists, n = scores.shape[:-1], scores.shape[-1]
        steps = torch.arange(n, device=scores.device)
        if self.name == "order":
            arguments["order"] = steps.flip(0).expand(*lists, n)
        elif self.name != "given":
            arguments["ranks"] = (1 + steps // 2).flip(0).expand(*lists, n)
        return rewardfuse.plackett_luce_loss(scores, **self.options, **arguments)


class Packed:
    """plackett_luce_loss_packed on lists of equal length, given as a matrix."""

    op = "plackett_luce_loss"  # one kernel serves both

    def __init__(self, name, **options):
        self.name, self.options = name, options

    def function(self, scores, **arguments):
        lists, n = scores.shape
        cu_seqlens = torch.arange(lists + 1, device=scores.device) * n
        if self.options:
            arguments["ranks"] = (1 + torch.arange(n, device=scores.device) // 2).flip(0).repeat(lists)
        return rewardfuse.plackett_luce_loss_packed(scores.reshape(-1), cu_seqlens, **self.options, **arguments)


class AllPairs:
    name = "all_pairs"
    op = "all_pairs_loss"

    @staticmethod
    def function(scores, **arguments):
        labels = (torch.arange(scores.shape[-1], device=scores.device) // 2).expand(scores.shape)
        return rewardfuse.all_pairs_loss(scores, labels, margin=0.25, **arguments)


PADDED = (
    PlackettLuce("given"),
    PlackettLuce("order", top_k=2),
    PlackettLuce("breslow", ties="breslow"),
    PlackettLuce("efron", ties="efron"),
    AllPairs(),
)
OPS = (*PADDED, Packed("packed"), Packed("packed efron", ties="efron"))


def lists_of_all_kinds():
    """Functions and their arguments by name: every way to say what a list holds and how it is ranked."""
    scores, ranks = torch.randn(4, 6), torch.tensor([[1, 2, 2, 3, 3, 3]] * 4)
    lengths, mask = torch.tensor([6, 0, 1, 4]), torch.rand(4, 6) > 0.3
    order = random_order(torch.arange(6) < lengths[:, None], rubbish=-1)
    cu_seqlens, top_k = torch.tensor([0, 5, 5, 6, 24]), torch.tensor([1, 2, 3, 9])
    padded, packed = rewardfuse.plackett_luce_loss, rewardfuse.plackett_luce_loss_packed
    weights = {"position_weight": torch.rand(6), "weight": torch.tensor([1.0, 2.0, 0.0, 0.5])}
    weights_by_item = {"position_weight": torch.rand(4, 6), "weight": torch.rand(4), "normalizer": torch.tensor(3.0)}
    return {
        "lengths": (padded, {"scores": scores, "lengths": lengths, **weights}),
        "order": (padded, {"scores": scores, "order": order, "lengths": lengths, "top_k": top_k, **weights_by_item}),
        "mask": (padded, {"scores": scores, "mask": mask, "top_k": 3, **weights}),
        "breslow": (padded, {"scores": scores, "ranks": ranks, "mask": mask, **weights}),
        "efron": (padded, {"scores": scores, "ranks": ranks.float(), "lengths": lengths, "ties": "efron", **weights}),
        "packed": (packed, {"scores": scores.flatten(), "cu_seqlens": cu_seqlens, "top_k": top_k}),
        "packed efron": (
            packed,
            {"scores": scores.flatten(), "cu_seqlens": cu_seqlens, "ranks": ranks.flatten(), "ties": "efron"},
        ),
        "all pairs": (
            rewardfuse.all_pairs_loss,
            {"scores": scores, "labels": ranks, "mask": mask, "weight": weights["weight"], "margin": 0.5},
        ),
    }


def scores_of(spread, shape, dtype):
    """Scores: N(0, 1), within ±1000, about ±10000 (one side a list), or all equal."""
    if spread == "wide":
        scores = torch.rand(shape, dtype=torch.float64) * 2000 - 1000
    elif spread == "offset":
        side = torch.randint(0, 2, (*shape[:-1], 1)) * 2 - 1
        scores = torch.randn(shape, dtype=torch.float64) + 1e4 * side
    elif spread == "equal":
        scores = torch.full(shape, 3.0, dtype=torch.float64)
    else:
        scores = torch.randn(shape, dtype=torch.float64)
    return scores.to(dtype)


def rounding(scores, arguments, backend):
    """What rounding adds to a stage of the largest weight. Plain torch rounds a log-sum-exp as large as a list is wide,
    and so do ties, whose means are scores; kernels hold it relative to its largest score."""
    accumulated = torch.float64 if scores.dtype is torch.float64 else torch.float32
    size = width(scores) if backend.name == "reference" or "ranks" in arguments else 1.0
    weight = largest(arguments, "position_weight") * largest(arguments, "weight")
    return torch.finfo(accumulated).eps * size * weight


def width(scores):
    """Distance between the largest and the smallest finite score of the widest list, at least 1."""
    gaps = [max(row) - min(row) for row in ([s for s in row if math.isfinite(s)] for row in rows_of(scores)) if row]
    return max([1.0, *gaps])


def largest(arguments, name):
    """Largest finite weight of that name, at least 1."""
    value = arguments.get(name)
    values = torch.as_tensor(1.0 if value is None else value).double().flatten().nan_to_num(0.0)
    return max([1.0, *values.tolist()])


def draw_valid(draw, shape):
    """``lengths`` or ``mask`` (with holes) or neither, and which items that makes valid."""
    n = shape[-1]
    kind = draw(st.sampled_from(["all", "lengths", "mask"]))
    if kind == "lengths":
        lengths = torch.randint(0, n + 1, shape[:-1], dtype=draw(st.sampled_from([torch.int64, torch.int32])))
        return {"lengths": lengths}, torch.arange(n) < lengths[..., None]
    if kind == "mask":
        mask = torch.rand(shape) > 0.4
        return {"mask": mask}, mask
    return {}, torch.ones(shape, dtype=torch.bool)


def draw_ranking(draw, valid):
    """``order`` or ``ranks`` (tied or not) or neither; what is not to be read holds rubbish."""
    kind = draw(st.sampled_from(["given", "order", "ranks"]))
    if kind == "order":
        return {"order": random_order(valid, rubbish=draw(st.sampled_from([-7, 10**6])))}
    if kind == "ranks":
        return {"ranks": draw_ranks(draw, valid), "ties": draw(st.sampled_from(["breslow", "efron"]))}
    return {}


def random_order(valid, rubbish):
    """A random permutation of every list's valid positions, and rubbish after it."""
    shuffled = torch.where(valid, torch.rand(valid.shape), 2.0).argsort(-1)
    return torch.where(torch.arange(valid.shape[-1]) < valid.sum(-1, keepdim=True), shuffled, rubbish)


def draw_ranks(draw, valid):
    """Ranks from few to many levels, with gaps, of any real dtype."""
    n = valid.shape[-1]
    levels = draw(st.sampled_from([1, 2, n // 2 + 1, 3 * n + 1]))
    dtype = draw(st.sampled_from([torch.int64, torch.float32, torch.int32, torch.float64]))
    ranks = (torch.randint(0, levels, valid.shape) * 1.5 + 1).to(dtype)
    return torch.where(valid, ranks, torch.nan if dtype.is_floating_point else -3)


def draw_options(draw, valid):
    """top_k, position_weight, weight, reduction and normalizer."""
    shape, n = valid.shape, valid.shape[-1]
    per_position = torch.rand(shape).double().masked_fill(torch.arange(n) >= valid.sum(-1, keepdim=True), torch.nan)
    reduction = draw(st.sampled_from(["none", "sum", "mean"]))
    return {
        "top_k": draw(st.sampled_from([None, 1, 2, n // 2 + 1, n + 3, torch.randint(1, n + 3, shape[:-1])])),
        "position_weight": draw(st.sampled_from([None, torch.rand(n), torch.arange(n), per_position])),
        "weight": draw_weight(draw, shape[:-1]),
        "reduction": reduction,
        "normalizer": draw(st.sampled_from([None, 3.0, torch.tensor(5.0)])) if reduction == "mean" else None,
    }


def draw_weight(draw, lists):
    """A list's weight: zeros among them."""
    kinds = [None, 2.0, 0, torch.tensor(0.5), torch.rand(lists).half(), torch.randint(0, 3, lists)]
    return draw(st.sampled_from(kinds))


def poisoned(draw, scores, valid, weight):
    """Scores with NaN or an infinity wherever they must not be read."""
    read = valid if weight is None else valid & (torch.as_tensor(weight) != 0).expand(valid.shape[:-1])[..., None]
    return torch.where(read, scores, draw(st.sampled_from([torch.nan, torch.inf, -torch.inf])))


def numbers(arguments, shape):
    """Arguments of an op on scores of ``shape`` as the oracle takes them: lists of rows, one value a list, numbers."""
    result = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().double() if value.is_floating_point() else value.cpu()
            per_item = name in ("order", "ranks", "mask", "labels")
            if per_item or (name == "position_weight" and value.shape == shape):
                value = value.reshape(math.prod(shape[:-1]), shape[-1]).tolist()
            else:
                value = value.flatten().tolist() if value.dim() else value.item()
        result[name] = value
    return result


def rows_of(scores):
    """Scores as the oracle takes them."""
    return scores.detach().cpu().double().reshape(math.prod(scores.shape[:-1]), scores.shape[-1]).tolist()
