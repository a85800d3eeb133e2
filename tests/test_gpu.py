"""What only a GPU can show: captured graphs, streams, no synchronization, the number of launches."""

import pytest
import torch

import rewardfuse
from rewardfuse import _backend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SIZES = (64, 1 << 16, 1 << 22)  # one block, some, all that the device holds


@pytest.fixture(params=["native", "triton"])
def gpu_backend(request):
    reason = _backend.missing(request.param, "cuda")
    if reason:
        pytest.skip(reason)
    with rewardfuse.use_backend(request.param):
        yield request.param


def inputs(n):
    return [torch.randn(n, device="cuda", requires_grad=True) for _ in "ab"] + [torch.rand(n, device="cuda") > 0.3]


def step(a, b, mask):
    loss, stats = rewardfuse.bradley_terry_loss(a, b, mask=mask, return_stats=True)
    return loss, stats.accuracy, *torch.autograd.grad(loss, (a, b))


def capture(tensors):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(*tensors)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(*tensors)
    return graph, outputs


@pytest.mark.parametrize("n", SIZES)
def test_a_replayed_graph_reuses_stale_sums(gpu_backend, n):
    tensors = inputs(n)
    graph, outputs = capture(tensors)
    for seed in range(5):
        torch.manual_seed(seed)
        with torch.no_grad():
            for tensor in tensors[:2]:
                tensor.normal_()
        graph.replay()
        torch.testing.assert_close(outputs, step(*tensors), rtol=0, atol=0)


def test_two_replayed_graphs_share_scratch(gpu_backend):
    cases = [inputs(1 << 20) for _ in range(2)]
    graphs = [capture(tensors) for tensors in cases]
    expected = [step(*tensors) for tensors in cases]
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(50):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for (_, outputs), right in zip(graphs, expected, strict=True):
        torch.testing.assert_close(outputs, right, rtol=0, atol=0)


def test_two_streams_share_scratch(gpu_backend):
    cases = [inputs(1 << 20) for _ in range(2)]
    expected = [step(*tensors) for tensors in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(50):
        for tensors, stream, found in zip(cases, streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(step(*tensors))
    torch.cuda.synchronize()
    for found, right in zip(results, expected, strict=True):
        for outputs in found:
            torch.testing.assert_close(outputs, right, rtol=0, atol=0)


@pytest.mark.parametrize("n", SIZES)
def test_a_step_waits_for_the_device(gpu_backend, n):
    tensors = inputs(n)
    step(*tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("n", SIZES)
def test_a_step_launches_more_than_two_kernels_of_ours(gpu_backend, n):
    a, b, _ = inputs(n)
    grad = torch.ones((), device="cuda")
    rewardfuse.bradley_terry_loss(a, b).backward(grad)
    a.grad = b.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        rewardfuse.bradley_terry_loss(a, b).backward(grad)
        torch.cuda.synchronize()
    launches = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launches) == 2, launches


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_than_the_current_device_fail(gpu_backend):
    tensors = [t.detach().to("cuda:1").requires_grad_(t.requires_grad) for t in inputs(1000)]
    on_one = step(*tensors)
    with torch.cuda.device(1):
        torch.testing.assert_close(step(*tensors), on_one)
