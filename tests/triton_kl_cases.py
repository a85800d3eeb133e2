"""The Triton kernels of KL-penalized rewards, as triton_cases.py has those on pairs."""

import triton.language as tl
from rewardfuse.kernels.approx_kl import triton as approx_kl
from rewardfuse.kernels.kl_penalized_rewards import launch as rewards_launch
from rewardfuse.kernels.kl_penalized_rewards import triton as rewards
from rewardfuse.kernels.pairwise import triton as pairwise
from rewardfuse.kernels.token_logprobs.gradient import backward_kernel
from rewardfuse.kernels.token_logprobs.launch import BYTES, Tile
from rewardfuse.kernels.token_logprobs.triton import forward_kernel

STORED = {"float32": "*fp32", "bfloat16": "*bf16", "float64": "*fp64"}
SIZES = {"float32": 4, "bfloat16": 2, "float64": 8}
SCALARS = dict.fromkeys(("items", "inner", "count", "nonce"), "i64") | dict.fromkeys(("size", "vocab"), "i32")
# direction, and what else is asked for
VOCABULARIES = {
    "sampled": {},
    "reverse": {"DIRECTION": 1},
    "reverse_all": {"DIRECTION": 1, "entropy": True, "CAPPED": True},
    "forward_unaligned": {"DIRECTION": 2, "entropy": True, "CAPPED": True, "aligned": False},
}
COMPILED = {"bfloat16": ("sampled", "reverse"), "float32": ("forward_unaligned",), "float64": ("reverse_all",)}


def _case(name, kernel, dtype, pointers, constants, strides, numbers, options):
    wide = dtype == "float64"
    acc = "*fp64" if wide else "*fp32"
    constants |= {"ACC": tl.float64 if wide else tl.float32, "TERMS": 16 if wide else 7, "PROGRAMS": 1024}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    tuples = {"strides": ("i64",) * strides, "numbers": ("fp32",) * numbers}
    scratch = {"flags": "*i64", "partials": "*fp64", "denominator": "*fp64", "mask": "*i1"}
    scratch |= {"lse": "*fp64", "ref_lse": "*fp64"}
    kinds = SCALARS | tuples | scratch | pointers | dict.fromkeys(constants, "constexpr")
    return f"{name}_{dtype}", kernel, {arg: kinds.get(arg, acc) for arg in kernel.arg_names}, constants, options


def _vocabulary_cases():
    for dtype, names in COMPILED.items():
        stored = dict.fromkeys(("logits", "ref_logits", "gradient"), STORED[dtype]) | {"tokens": "*i64"}
        for name in names:
            given = {"DIRECTION": 0, "CAPPED": False} | VOCABULARIES[name]
            entropy, aligned = given.pop("entropy", False), given.pop("aligned", True)
            paired = given["DIRECTION"] != 0
            given |= {"HAS_MASK": True, "HAS_TEMPERATURE": True, "HAS_LOGPROB": True}
            given |= {"ENTROPY": entropy, "HAS_ENTROPY": entropy}
            passes = {
                "forward": (BYTES["forward"] // (2 if paired else 1), 10),
                "backward": (BYTES["backward of KL"] // 2 if paired else BYTES["backward"], 16),
            }
            for step, (per_thread, strides) in passes.items():
                constants = Tile.of(151936, SIZES[dtype], per_thread, aligned).constants()
                options = {"num_warps": constants.pop("num_warps")}
                kernel = forward_kernel if step == "forward" else backward_kernel
                title = f"token_logprobs_{name}_{step}"
                yield _case(title, kernel, dtype, stored, given | constants, strides, 4, options)


def _token_cases():
    for dtype in ("float32", "float64"):
        stored = dict.fromkeys(("a", "b", "grad_a", "grad_b"), STORED[dtype])
        flags = dict.fromkeys(("HAS_P", "HAS_MASK", "NEED_A", "NEED_P", "SUM_P"), True)
        flags |= dict.fromkeys(("HAS_Q", "HAS_WEIGHT", "HAS_NORMALIZER", "COUNTS", "STATS", "NEED_B"), False)
        flags |= {"REDUCTION": 0, "BLOCK": pairwise.BLOCK, "LOSS": approx_kl._value, "GRADIENT": approx_kl._gradient}
        options = {"num_warps": pairwise.WARPS}
        for step, strides in (("forward", 12), ("backward", 14)) if dtype == "float64" else ():  # float32: as below
            kernel = getattr(pairwise, f"{step}_kernel")
            yield _case(f"approx_kl_{step}", kernel, dtype, stored, dict(flags), strides, 20, options)
        stored = dict.fromkeys(("logprobs", "ref_logprobs", "d_logprobs"), STORED[dtype]) | {"ended": "*i1"}
        names = ("MASK", "ENDED", "COEF")
        flags = {f"HAS_{name}": True for name in names} | {
            "REPLACE": dtype == "float32",
            "ONE_PAST": dtype == "float32",
        }
        flags |= dict.fromkeys(("OF_REWARDS", "OF_KL", "OF_SEQUENCE_KL", "OF_SEQUENCE_REWARD"), True)
        flags |= {"NEED_LOGPROBS": True, "NEED_SCORES": True, "SCORES": 1 if dtype == "float32" else 2}
        flags |= dict(zip(("ROWS", "BLOCK"), rewards_launch.Tile.of(100, dtype == "float64"), strict=True))
        options = {"num_warps": rewards_launch.WARPS}
        for step, strides in (("forward", 9), ("backward", 15)):
            kernel = getattr(rewards, f"{step}_kernel")
            yield _case(f"kl_penalized_rewards_{step}", kernel, dtype, stored, dict(flags), strides, 20, options)


CASES = [*_vocabulary_cases(), *_token_cases()]
