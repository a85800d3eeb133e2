"""Every Triton kernel on pairs with the argument types, constants and options that it is compiled ahead of time for."""

import triton.language as tl
from rewardfuse.kernels.bradley_terry import triton as bradley_terry
from rewardfuse.kernels.bradley_terry_tie import triton as tie
from rewardfuse.kernels.pairwise import triton as pairwise

MODELS = {
    "bradley_terry": (bradley_terry._loss, bradley_terry._gradient),
    "rao_kupper": (tie._rao_kupper_loss, tie._rao_kupper_gradient),
    "davidson": (tie._davidson_loss, tie._davidson_gradient),
}
OPTIONS = {"num_warps": pairwise.WARPS}
SCORES = {"float32": "*fp32", "bfloat16": "*bf16", "float64": "*fp64"}


def _signature(kernel, pointers, constants, strides):
    scalars = {"items": "i64", "inner": "i64", "nonce": "i64"}
    tuples = {"strides": ("i64",) * strides, "numbers": ("fp32",) * 14}
    kinds = {**scalars, **tuples, **dict.fromkeys(constants, "constexpr"), **pointers}
    return {name: kinds[name] for name in kernel.arg_names}


def _cases():
    for model, (loss, gradient) in MODELS.items():
        for dtype, scores in SCORES.items():
            if dtype == "bfloat16" and model != "bradley_terry":
                continue  # the same maths behind the same cast
            wide = dtype == "float64"
            acc = "*fp64" if wide else "*fp32"
            common = {
                **{f"HAS_{x}": True for x in ("P", "Q", "WEIGHT", "MASK")},
                **{"HAS_NORMALIZER": False, "COUNTS": True, "REDUCTION": 2, "PROGRAMS": 1024},
                **{"ACC": tl.float64 if wide else tl.float32, "TERMS": 16 if wide else 7, "BLOCK": pairwise.BLOCK},
            }
            operands = {
                "a": scores,
                "b": scores,
                "p": acc,
                "q": acc,
                "weight": acc,
                "mask": "*i1",
                "normalizer": "*fp32",
            }
            scratch = {"flags": "*i64", "partials": "*fp64", "denominator": "*fp64"}
            constants = common | {"LOSS": loss, "STATS": True}
            pointers = operands | scratch | {"loss": acc, "stats": acc}
            signature = _signature(pairwise.forward_kernel, pointers, constants, 12)
            yield f"{model}_forward_{dtype}", pairwise.forward_kernel, signature, constants, OPTIONS
            constants = common | {"GRADIENT": gradient, "NEED_A": True, "NEED_B": True, "NEED_P": True, "SUM_P": True}
            outputs = {"grad_output": acc, "grad_a": scores, "grad_b": scores, "grad_p": acc}
            signature = _signature(pairwise.backward_kernel, operands | scratch | outputs, constants, 14)
            yield f"{model}_backward_{dtype}", pairwise.backward_kernel, signature, constants, OPTIONS


CASES = list(_cases())
