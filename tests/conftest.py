"""What every test shares: offline, one thread, and the backends that this machine has."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its kernels then run on the CPU

import contextlib
import gc

import hypothesis
import pytest

import rewardfuse
from rewardfuse import _backend

hypothesis.settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],  # a backend serves all examples alike
)
hypothesis.settings.load_profile("default")


def pytest_collection_finish(session):
    """Modules, and ten thousand tests, are there to stay: the collector need not look at them again and again."""
    gc.collect()
    gc.freeze()


class Backend:
    """One way to run an op: a backend, a device and, on the CPU, an instruction set."""

    def __init__(self, name, device="cpu", instruction_set=None):
        self.name, self.device, self.instruction_set = name, device, instruction_set
        self.interpreted = name == "triton" and device == "cpu"

    def __str__(self):
        return "-".join(filter(None, (self.name, self.device, self.instruction_set)))

    @contextlib.contextmanager
    def active(self):
        """Serve ops by this backend."""
        before = _backend._C.instruction_set() if _backend._C else None
        if self.instruction_set:
            _backend._C.set_instruction_set(self.instruction_set)
        try:
            with rewardfuse.use_backend(self.name):
                yield self
        finally:
            if self.instruction_set:
                _backend._C.set_instruction_set(before)


def instruction_sets():
    """The instruction sets that this machine can run, all of them worse ones included."""
    names = ("baseline", "avx2", "avx512")
    return names[: names.index(_backend._C.instruction_set()) + 1] if _backend._C else ()


def backends():
    """Every backend of this machine."""
    found = [Backend("reference")] + [Backend("native", "cpu", name) for name in instruction_sets()]
    if _backend.missing("triton", "cpu") is None:
        found.append(Backend("triton"))
    if torch.cuda.is_available():
        found.append(Backend("reference", "cuda"))
        found += [Backend(name, "cuda") for name in ("native", "triton") if _backend.missing(name, "cuda") is None]
    return found


BACKENDS = backends()


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request):
    with request.param.active():
        yield request.param


@pytest.fixture(params=[b for b in BACKENDS if not b.interpreted], ids=str)
def compiled_backend(request):
    """Every backend but interpreted Triton, for tests that would take it minutes."""
    with request.param.active():
        yield request.param


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def native():
    if _backend._C is None:
        pytest.skip("the C++ extension is not built")
    with rewardfuse.use_backend("native"):
        yield _backend._C
