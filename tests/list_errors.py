"""Wrong arguments of the ops on lists: calls, and the type and text of their errors."""

import torch

import rewardfuse


def pl(**changes):
    return lambda: rewardfuse.plackett_luce_loss(**{"scores": torch.zeros(2, 3), **changes})


def packed(cu_seqlens=(0, 2, 5), **changes):
    scores = changes.pop("scores", torch.zeros(5))
    return lambda: rewardfuse.plackett_luce_loss_packed(scores, torch.tensor(cu_seqlens), **changes)


def pairs(**changes):
    arguments = {"scores": torch.zeros(2, 3), "labels": torch.zeros(2, 3), **changes}
    return lambda: rewardfuse.all_pairs_loss(**arguments)


WANTS_GRADIENT = torch.ones(3, requires_grad=True)
RANKS, TRUE = torch.tensor([[1, 2, 3], [1, 1, 2]]), torch.ones(2, 3, dtype=torch.bool)
REAL_DTYPES = "expected a tensor of float16, bfloat16, float32 or float64, got torch.int64"
ONCE = "order: expected each valid item's index once, best first, got"
PER_LIST = "expected one value a list, [2], got"
BY_POSITION = "position_weight: expected one value a position, [3], or the shape of scores, [2, 3], got [2]"
LIST_CASES = [
    (pl(scores=[0.0]), TypeError, "scores: expected a tensor, got list"),
    (pl(scores=torch.zeros(2, 3).long()), TypeError, f"scores: {REAL_DTYPES}"),
    (pl(scores=torch.zeros(())), ValueError, "scores: expected a tensor [*, N], got a 0-d tensor"),
    (pl(lengths=torch.tensor([3, 4])), ValueError, "lengths: expected from 0 to 3, got 4 at list 1"),
    (pl(lengths=torch.tensor([-1, 4])), ValueError, "lengths: expected from 0 to 3, got -1 at list 0"),
    (pl(lengths=torch.ones(2)), TypeError, "lengths: expected a tensor of an integer dtype, got torch.float32"),
    (pl(lengths=torch.tensor([3])), ValueError, f"lengths: {PER_LIST} [1]"),
    (pl(lengths=[3, 3]), TypeError, "lengths: expected a tensor, got list"),
    (
        pl(lengths=torch.tensor([3, 3]).to("meta")),
        ValueError,
        "lengths: expected the device of scores, cpu, got meta",
    ),
    (
        pl(lengths=torch.tensor([3, 3]), mask=TRUE),
        ValueError,
        "lengths: expected without mask, which says the same",
    ),
    (pl(mask=TRUE.float()), TypeError, "mask: expected a tensor of torch.bool, got torch.float32"),
    (pl(mask=TRUE[0]), ValueError, "mask: expected the shape of scores, [2, 3], got [3]"),
    (
        pl(order=RANKS - 1, ranks=RANKS),
        ValueError,
        "order: expected without ranks, which says the same (order lists items, ranks numbers them)",
    ),
    (pl(order=RANKS - 1), ValueError, f"{ONCE} [0, 0, 1] at list 1"),
    (pl(order=torch.tensor([[0, 1, 3], [0, 1, 2]])), ValueError, f"{ONCE} [0, 1, 3] at list 0"),
    (pl(order=torch.tensor([[0, 1, 2], [-1, 1, 2]])), ValueError, f"{ONCE} [-1, 1, 2] at list 1"),
    (
        pl(order=torch.tensor([[0, 1, 9], [0, 2, 9]]), lengths=torch.tensor([2, 2])),
        ValueError,
        f"{ONCE} [0, 2] at list 1",
    ),
    (
        pl(order=torch.tensor([[0, 1, 9], [0, 2, 9]]), mask=torch.tensor([[True, True, False]] * 2)),
        ValueError,
        f"{ONCE} [0, 2] at list 1",
    ),
    (pl(order=RANKS.float()), TypeError, "order: expected a tensor of an integer dtype, got torch.float32"),
    (pl(order=RANKS[0]), ValueError, "order: expected the shape of scores, [2, 3], got [3]"),
    (pl(ranks=RANKS[0]), ValueError, "ranks: expected the shape of scores, [2, 3], got [3]"),
    (pl(ranks=RANKS.cfloat()), TypeError, "ranks: expected a tensor of a real dtype, got torch.complex64"),
    (pl(ranks=RANKS - 1), ValueError, "ranks: expected finite numbers from 1, the best, got 0 at index 0"),
    (
        pl(ranks=torch.tensor([[1, 1, 1], [1, torch.nan, 1]])),
        ValueError,
        "ranks: expected finite numbers from 1, the best, got nan at index 4",
    ),
    (
        pl(ranks=RANKS.double().requires_grad_()),
        ValueError,
        "ranks: expected a tensor that requires no gradient",
    ),
    (pl(top_k=0), ValueError, "top_k: expected at least 1, got 0"),
    (pl(top_k=-2, ranks=RANKS), ValueError, "top_k: expected at least 1, got -2"),
    (pl(top_k=torch.tensor([1, 0])), ValueError, "top_k: expected at least 1, got 0 at list 1"),
    (
        pl(top_k=torch.tensor([0, 1]), ranks=RANKS, ties="efron"),
        ValueError,
        "top_k: expected at least 1, got 0 at list 0",
    ),
    (pl(top_k=torch.tensor([[1, 2]])), ValueError, f"top_k: {PER_LIST} [1, 2]"),
    (pl(top_k=1.5), TypeError, "top_k: expected an int or a tensor of an integer dtype, got float"),
    (pl(top_k=torch.ones(2)), TypeError, "top_k: expected a tensor of an integer dtype, got torch.float32"),
    (pl(ties="exact"), ValueError, 'ties: expected "breslow" or "efron", got \'exact\''),
    (pl(position_weight=torch.ones(2)), ValueError, BY_POSITION),
    (pl(position_weight=torch.ones(2), ranks=RANKS), ValueError, BY_POSITION),
    (
        pl(position_weight=WANTS_GRADIENT),
        ValueError,
        "position_weight: expected a tensor that requires no gradient",
    ),
    (pl(weight=WANTS_GRADIENT[:2]), ValueError, "weight: expected a tensor that requires no gradient"),
    (
        pl(weight=torch.ones(2, 3)),
        ValueError,
        "weight: expected a number, a 0-d tensor or one value a list, [2], got [2, 3]",
    ),
    (pl(weight="1"), TypeError, "weight: expected a number or a tensor, got str"),
    (pl(reduction="avg"), ValueError, 'reduction: expected "none", "sum" or "mean", got \'avg\''),
    (pl(normalizer=0), ValueError, "normalizer: expected a positive number or a 0-d tensor, got 0"),
    (
        pl(normalizer=torch.tensor(-1.0)),
        ValueError,
        "normalizer: expected a positive number or a 0-d tensor, got -1",
    ),
    (pl(normalizer=2, reduction="none"), ValueError, 'normalizer: expected only with reduction="mean"'),
    (
        pl(normalizer=WANTS_GRADIENT[0]),
        ValueError,
        "normalizer: expected a tensor that requires no gradient",
    ),
    (packed((1, 2, 5)), ValueError, "cu_seqlens: expected to start at 0, got 1"),
    (packed((0, 4, 3, 5)), ValueError, "cu_seqlens: expected not to decrease, got 3 at 2"),
    (packed((0, 2, 4)), ValueError, "cu_seqlens: expected to end at the number of scores, 5, got 4"),
    (packed((0, 2, 6)), ValueError, "cu_seqlens: expected to end at the number of scores, 5, got 6"),
    (packed(()), TypeError, "cu_seqlens: expected a tensor of an integer dtype, got torch.float32"),
    (packed([[0, 5]]), ValueError, "cu_seqlens: expected [lists + 1] bounds, got shape [1, 2]"),
    (
        packed((0, 4, 3, 5), ranks=torch.ones(5)),
        ValueError,
        "cu_seqlens: expected not to decrease, got 3 at 2",
    ),
    (
        packed(scores=torch.zeros(5, 1)),
        ValueError,
        "scores: expected packed lists, [total], got shape [5, 1]",
    ),
    (packed(ranks=torch.ones(4)), ValueError, "ranks: expected the shape of scores, [5], got [4]"),
    (
        packed(ranks=torch.arange(5)),
        ValueError,
        "ranks: expected finite numbers from 1, the best, got 0 at index 0",
    ),
    (packed(top_k=torch.ones(5).long()), ValueError, f"top_k: {PER_LIST} [5]"),
    (
        packed(position_weight=torch.ones(2)),
        ValueError,
        "position_weight: expected a value for each of 3 positions, got 2",
    ),
    (pairs(labels=torch.zeros(3)), ValueError, "labels: expected the shape of scores, [2, 3], got [3]"),
    (pairs(labels=[0.0]), TypeError, "labels: expected a tensor, got list"),
    (
        pairs(labels=torch.tensor([[0, 1, 2], [0, 1, torch.nan]])),
        ValueError,
        "labels: expected finite numbers, got nan at index 5",
    ),
    (
        pairs(labels=torch.zeros(2, 3, requires_grad=True)),
        ValueError,
        "labels: expected a tensor that requires no gradient",
    ),
    (pairs(lengths=torch.tensor([3, 4])), ValueError, "lengths: expected from 0 to 3, got 4 at list 1"),
    (
        pairs(lengths=torch.tensor([3, 3]), mask=TRUE),
        ValueError,
        "lengths: expected without mask, which says the same",
    ),
    (pairs(margin=torch.ones(2)), ValueError, "margin: expected a number or a 0-d tensor, got shape [2]"),
    (pairs(margin=WANTS_GRADIENT[0]), ValueError, "margin: expected a tensor that requires no gradient"),
    (pairs(margin=float("nan")), ValueError, "margin: expected a number, got nan"),
    (
        pairs(weight=torch.ones(3)),
        ValueError,
        "weight: expected a number, a 0-d tensor or one value a list, [2], got [3]",
    ),
    (
        lambda: rewardfuse.plackett_luce_sample(torch.zeros(3), -1),
        ValueError,
        "n: expected a whole number from 0, got -1",
    ),
    (
        lambda: rewardfuse.plackett_luce_sample(torch.zeros(2, 3), 1, lengths=torch.tensor([1, 4])),
        ValueError,
        "lengths: expected from 0 to 3, got 4 at list 1",
    ),
]
