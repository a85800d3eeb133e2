"""What the emulation of CUDA (cuda_runtime.h) has to show, on the kernels of probes.cpp."""

import pytest
import torch

from simt import emulator
from simt.emulator import Strided

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

VALUES = torch.arange(64, dtype=torch.int32)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulator.build_once(tmp_path_factory.getbasetemp())


@pytest.fixture
def out(library):
    return library.empty((64,), torch.int32)


@pytest.mark.parametrize("threads", [32, 64])
@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_a_missing_barrier_stays_hidden(library, threads, rounds):
    values, found = VALUES[:threads], {}
    for kernel in ("hand_round", "hand_round_unread", "hand_round_unwritten"):
        out = library.empty((threads,), torch.int32)
        library.run(kernel, out=out, threads=threads, rounds=rounds, **{"in": Strided(values)})
        found[kernel] = torch.equal(out.tensor, values.roll(-rounds))
    assert found == {"hand_round": True, "hand_round_unread": rounds == 1, "hand_round_unwritten": False}


@pytest.mark.parametrize(
    "kernel, error",
    [
        ("some_threads_wait", "wait for ever"),
        ("some_lanes_shuffle", "wait for ever"),
        ("part_of_a_warp_shuffles", "part of a warp"),
        ("block_0_waits", "has not run"),
    ],
)
def test_a_barrier_that_not_all_threads_reach_stays_hidden(library, out, kernel, error):
    with pytest.raises(RuntimeError, match=error):
        library.run(kernel, out=out)


@pytest.mark.parametrize("at_end, offset", [(True, 1), (True, 1000), (False, -1), (False, -1000), (True, 1 << 60)])
def test_an_access_out_of_bounds_stays_hidden(library, monkeypatch, at_end, offset):
    monkeypatch.setattr(library, "at_end", at_end)
    out = library.empty((64,), torch.int32)
    with pytest.raises(RuntimeError, match="out of bounds"):
        library.run("read_at", out=out, offset=offset, **{"in": Strided(VALUES)})
    with pytest.raises(RuntimeError, match="out of bounds"):
        library.run("write_at", out=out, offset=offset)


def test_a_failed_launch_spoils_the_next_one(library, out):
    with pytest.raises(RuntimeError, match="out of bounds"):
        library.run("write_at", out=out, offset=1)
    library.run("read_at", out=out, offset=0, **{"in": Strided(VALUES)})
    assert torch.equal(out.tensor, VALUES)


def test_a_write_to_an_input_stays_hidden(library):
    with pytest.raises(RuntimeError, match="out of bounds"):
        library.run("write_at", out=Strided(VALUES), offset=0)


def test_an_access_beyond_shared_memory_stays_hidden(library, out):
    with pytest.raises(RuntimeError, match="undefined behaviour"):
        library.run("leave_shared_memory", out=out, offset=1)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_an_unaligned_access_stays_hidden(library, out, offset):
    library.run("read_unaligned", out=out, offset=0, **{"in": Strided(VALUES)})
    with pytest.raises(RuntimeError, match="undefined behaviour"):
        library.run("read_unaligned", out=out, offset=offset, **{"in": Strided(VALUES)})


def test_a_misspelt_name_is_passed_over(library, out):
    with pytest.raises(RuntimeError, match="unknown argument scoers"):
        library.run("plackett_luce_forward", scoers=out)
    with pytest.raises(RuntimeError, match="unknown kernel nothing"):
        library.run("nothing")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_differ_from_those_of_torch(library, dtype):
    def converted(values, to):
        out = library.empty(values.shape, to)
        library.run("convert", out=out, count=len(values), **{"in": Strided(values, 0, 1)})
        return out.tensor.float().nan_to_num(7.0, torch.inf, -torch.inf)

    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    assert torch.equal(converted(halves, torch.float32), halves.float().nan_to_num(7.0, torch.inf, -torch.inf))
    above = torch.nextafter(halves.float(), torch.tensor(torch.inf))
    between = torch.cat([halves.float(), above, torch.randn(1000), halves.float() * 1.0009765625])
    expected = between.to(dtype).float().nan_to_num(7.0, torch.inf, -torch.inf)
    assert torch.equal(converted(between, dtype), expected)
