"""What only a GPU can show: captured graphs, streams, no synchronization, the number of launches."""

import pytest
import torch

import rewardfuse
from rewardfuse import _backend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(params=["native", "triton"])
def gpu_backend(request):
    reason = _backend.missing(request.param, "cuda")
    if reason:
        pytest.skip(reason)
    with rewardfuse.use_backend(request.param):
        yield request.param


class Pairs:
    """Pairs with a mask, and their statistics."""

    def __init__(self, n, device="cuda"):
        self.leaves = [torch.randn(n, device=device, requires_grad=True) for _ in "ab"]
        self.mask = torch.rand(n, device=device) > 0.3

    def step(self):
        loss, stats = rewardfuse.bradley_terry_loss(*self.leaves, mask=self.mask, return_stats=True)
        return loss, stats.accuracy, *torch.autograd.grad(loss, self.leaves)

    def plain(self):
        return rewardfuse.bradley_terry_loss(*self.leaves)


class Lists:
    """Padded lists, all of a length or not."""

    def __init__(self, lists, n, device="cuda"):
        self.leaves = [torch.randn(lists, n, device=device, requires_grad=True)]
        self.lengths = torch.randint(0, n + 1, (lists,), device=device)

    def step(self):
        loss = rewardfuse.plackett_luce_loss(*self.leaves, lengths=self.lengths)
        return loss, *torch.autograd.grad(loss, self.leaves)

    def plain(self):
        return rewardfuse.plackett_luce_loss(*self.leaves)


class Packed:
    """Thousands of packed lists, most of them short."""

    def __init__(self, lists, longest, device="cuda"):
        lengths = torch.randint(0, 24, (lists,))
        lengths[lists // 2] = longest
        self.cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device)
        self.leaves = [torch.randn(int(lengths.sum()), device=device, requires_grad=True)]

    def step(self):
        loss = self.plain()
        return loss, *torch.autograd.grad(loss, self.leaves)

    def plain(self):
        return rewardfuse.plackett_luce_loss_packed(*self.leaves, self.cu_seqlens)


class AllPairs:
    """All pairs of padded lists."""

    def __init__(self, lists, n, device="cuda"):
        self.leaves = [torch.randn(lists, n, device=device, requires_grad=True)]
        self.labels = torch.randint(0, 4, (lists, n), device=device)

    def step(self):
        loss = self.plain()
        return loss, *torch.autograd.grad(loss, self.leaves)

    def plain(self):
        return rewardfuse.all_pairs_loss(*self.leaves, self.labels, margin=0.5)


class Rewards:
    """KL-penalized rewards of padded rows, and the gradient of their KL."""

    def __init__(self, rows, n, device="cuda"):
        self.leaves = [torch.randn(rows, n, device=device, requires_grad=True)]
        self.rest = torch.randn(rows, n, device=device), torch.rand(rows, n, device=device) > 0.2
        self.scores = torch.randn(rows, device=device)
        self.ones = torch.ones(rows, n, device=device)

    def shaped(self):
        options = {"scores": self.scores, "kl_coef": 0.1, "estimator": "k3", "score_clip": 2.0}
        ref_logprobs = self.rest[0].to(self.leaves[0].dtype)
        return rewardfuse.kl_penalized_rewards(*self.leaves, ref_logprobs, self.rest[1], **options)

    def step(self):
        shaped = self.shaped()
        gradient = torch.autograd.grad(shaped.kl, self.leaves, self.ones.to(shaped.kl.dtype))
        return shaped.rewards.clone(), shaped.sequence_reward, *shaped.stats, *gradient


class Vocabulary:
    """Exact KL from logits of an odd vocabulary, which Triton serves whatever else is built."""

    def __init__(self, rows, n, device="cuda"):
        self.leaves = [torch.randn(4, rows, n, device=device, requires_grad=True)]
        self.ref_logits = torch.randn(4, rows, n, device=device)
        self.tokens = torch.randint(0, n, (4, rows), device=device)
        self.mask = torch.rand(4, rows, device=device) > 0.2
        self.ones = torch.ones(4, rows, device=device)

    def step(self):
        (logits,) = self.leaves
        of_both = logits, self.ref_logits.to(logits.dtype), self.tokens, self.mask
        with rewardfuse.use_backend("triton" if logits.dtype is torch.float32 else "reference"):
            shaped = rewardfuse.kl_penalized_rewards_from_logits(*of_both, kl_coef=0.1, estimator="full")
            gradient = torch.autograd.grad(shaped.kl, self.leaves, self.ones.to(shaped.kl.dtype))
        return shaped.rewards.clone(), shaped.logprobs.detach(), shaped.sequence_kl.detach(), *gradient


CASES = {  # one block, some, all that the device holds
    "64 pairs": lambda **on: Pairs(64, **on),
    "65536 pairs": lambda **on: Pairs(1 << 16, **on),
    "4194304 pairs": lambda **on: Pairs(1 << 22, **on),
    "16 lists of 8": lambda **on: Lists(16, 8, **on),
    "100000 lists of 8": lambda **on: Lists(100_000, 8, **on),
    "300 lists of 3000": lambda **on: Lists(300, 3000, **on),
    "a list of 1048576": lambda **on: Lists(1, 1 << 20, **on),
    "20000 packed lists": lambda **on: Packed(20_000, 50_000, **on),
    "5000 lists of 6, all pairs": lambda **on: AllPairs(5000, 6, **on),
    "40 lists of 300, all pairs": lambda **on: AllPairs(40, 300, **on),
}
REWARDS = {  # several outputs, of which none is a loss
    "5 rows of 7": lambda **on: Rewards(5, 7, **on),
    "3000 rows of 513": lambda **on: Rewards(3000, 513, **on),
    "2 rows of 100000": lambda **on: Rewards(2, 100_000, **on),
    "12 rows of a vocabulary of 50257": lambda **on: Vocabulary(3, 50257, **on),
    "2000 rows of a vocabulary of 4096": lambda **on: Vocabulary(500, 4096, **on),
}
SEVERAL_BLOCKS = ("4194304 pairs", "100000 lists of 8", "20000 packed lists", "5000 lists of 6, all pairs")


@pytest.fixture(params=CASES)
def make_loss(request):
    torch.manual_seed(0)
    return CASES[request.param]


@pytest.fixture(params=CASES | REWARDS)
def make(request):
    torch.manual_seed(0)
    return (CASES | REWARDS)[request.param]


@pytest.fixture(params=SEVERAL_BLOCKS)
def two(request):
    torch.manual_seed(0)
    return [CASES[request.param]() for _ in range(2)]


def capture(case):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            case.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = case.step()
    return graph, outputs


def test_a_replayed_graph_reuses_stale_sums(gpu_backend, make):
    case = make()
    graph, outputs = capture(case)
    for seed in range(5):
        torch.manual_seed(seed)
        with torch.no_grad():
            for tensor in case.leaves:
                tensor.normal_()
        graph.replay()
        torch.testing.assert_close(outputs, case.step(), rtol=0, atol=0)


def test_two_replayed_graphs_share_scratch(gpu_backend, two):
    graphs = [capture(case) for case in two]
    expected = [case.step() for case in two]
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(50):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for (_, outputs), right in zip(graphs, expected, strict=True):
        torch.testing.assert_close(outputs, right, rtol=0, atol=0)


def test_two_streams_share_scratch(gpu_backend, two):
    expected = [case.step() for case in two]
    streams = [torch.cuda.Stream() for _ in two]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(50):
        for case, stream, found in zip(two, streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(case.step())
    torch.cuda.synchronize()
    for found, right in zip(results, expected, strict=True):
        for outputs in found:
            torch.testing.assert_close(outputs, right, rtol=0, atol=0)


def test_a_step_waits_for_the_device(gpu_backend, make):
    case = make()
    case.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_launches_more_than_two_kernels_of_ours(gpu_backend, make_loss):
    case = make_loss()
    grad = torch.ones((), device="cuda")
    case.plain().backward(grad)
    for leaf in case.leaves:
        leaf.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        case.plain().backward(grad)
        torch.cuda.synchronize()
    launches = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launches) == 2, launches


def test_a_device_and_the_reference_disagree(gpu_backend, make):
    case = make()
    found = case.step()
    case.leaves = [leaf.detach().double().requires_grad_() for leaf in case.leaves]
    with rewardfuse.use_backend("reference"):
        expected = case.step()
    for x, y in zip(found, expected, strict=True):
        assert (x - y).abs().max() <= 1e-5 * y.abs().max()


@pytest.mark.parametrize("n", [40, 300])
def test_a_ranking_that_cannot_be_spoils_its_neighbours(gpu_backend, n):
    scores = torch.randn(6, n, device="cuda", requires_grad=True)
    order = torch.rand(6, n, device="cuda").argsort(-1)
    lengths, top_k = torch.full((6,), n, device="cuda"), torch.full((6,), 7, device="cuda")
    good = rewardfuse.plackett_luce_loss(scores, order=order, lengths=lengths, top_k=top_k, reduction="none")
    order[0, 5], order[1, -1], lengths[2], lengths[3], top_k[4] = n, order[1, -2], n + 1, -1, 0
    found = rewardfuse.plackett_luce_loss(scores, order=order, lengths=lengths, top_k=top_k, reduction="none")
    assert found[:5].isnan().all()
    (gradient,) = torch.autograd.grad(found.sum(), scores)
    (expected,) = torch.autograd.grad(good[5], scores)
    torch.testing.assert_close((found[5], gradient[5]), (good[5], expected[5]), rtol=0, atol=0)
    assert gradient[[0, 1, 2, 4]].isnan().all()


def test_falling_bounds_spoil_other_lists(gpu_backend):
    scores = torch.randn(100, device="cuda", requires_grad=True)
    bounds = torch.tensor([10, 30, 20, 60, 90], device="cuda")
    found = rewardfuse.plackett_luce_loss_packed(scores, bounds, reduction="none")
    alone = rewardfuse.plackett_luce_loss(scores[60:90])
    assert found.isnan().tolist() == [False, True, False, False]
    (gradient,) = torch.autograd.grad(found[3], scores)
    (expected,) = torch.autograd.grad(alone, scores)
    torch.testing.assert_close((found[3], gradient[60:]), (alone, expected[60:]))
    assert gradient[:10].tolist() == [0] * 10


def test_bounds_outside_of_the_scores_are_followed(gpu_backend):
    scores = torch.randn(100, device="cuda", requires_grad=True)
    bounds = torch.tensor([0, 1 << 40, 60, 100, -(1 << 40)], device="cuda")
    found = rewardfuse.plackett_luce_loss_packed(scores, bounds, reduction="none")
    torch.autograd.grad(found.sum(), scores)
    assert found.isnan().tolist() == [True, True, False, True]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_than_the_current_device_fail(gpu_backend, make):
    case = make(device="cuda:1")
    on_one = case.step()
    with torch.cuda.device(1):
        torch.testing.assert_close(case.step(), on_one)
