"""The Triton kernels on lists, as triton_cases.py has those on pairs."""

import itertools

import torch
import triton.language as tl
from rewardfuse.kernels.all_pairs import triton as all_pairs
from rewardfuse.kernels.lists.launch import Tile
from rewardfuse.kernels.plackett_luce import triton as plackett_luce
from rewardfuse.kernels.plackett_luce.launch import CHUNK

SCORES = {"float32": "*fp32", "bfloat16": "*bf16", "float64": "*fp64"}
ALL = {"HAS_ORDER": True, "HAS_LENGTHS": True, "HAS_TOP_K": True, "HAS_U": True, "HAS_V": True, "HAS_WEIGHT": True}
# What lists are given and how many items of one a tile takes; what is not named is absent.
SHAPES = {
    "plain": ({}, 64),
    "plain_chunks": ({"HAS_LENGTHS": True, "CHUNKED": True}, CHUNK),
    "order": (ALL | {"HAS_MASK": True}, 128),
    "mask": ({"HAS_MASK": True, "HAS_LENGTHS": True, "HAS_TOP_K": True, "HAS_U": True}, 16),
    "chunks": (ALL | {"HAS_MASK": True, "CHUNKED": True}, CHUNK),
    "packed": (ALL | {"HAS_LENGTHS": False, "PACKED": True, "CHUNKED": True}, 128),
    "packed_long": (ALL | {"HAS_LENGTHS": False, "PACKED": True, "CHUNKED": True}, CHUNK),
}
COMPILED = {"bfloat16": ("plain",), "float64": ("plain_chunks", "chunks", "packed")}
FLAGS = ("PACKED", *ALL, "HAS_MASK", "HAS_NORMALIZER", "CHUNKED")


def _case(name, kernel, dtype, tile, constants, tensors, strides):
    wide = dtype == "float64"
    acc = "*fp64" if wide else "*fp32"
    scalars = dict.fromkeys(("count", "size", "slots", "limit", "nonce"), "i64")
    tuples = {"strides": ("i64",) * strides, "numbers": ("fp32",) * 14}
    tensors |= {"scores": SCORES[dtype], "gradient": SCORES[dtype], "mask": "*i1", "lengths": "*i64", "flags": "*i64"}
    tensors |= dict.fromkeys(("denominator", "partials"), "*fp64")
    tensors |= dict.fromkeys(("weight", "normalizer", "grad_output", "loss", "list_loss"), acc)
    constants |= tile.constants() | {"REDUCTION": 2, "PROGRAMS": 2048, "ACC": tl.float64 if wide else tl.float32}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    kinds = scalars | tuples | tensors | dict.fromkeys(constants, "constexpr")
    return f"{name}_{dtype}", kernel, {arg: kinds[arg] for arg in kernel.arg_names}, constants, tile.options()


def _cases():
    for dtype in SCORES:
        acc = "*fp64" if dtype == "float64" else "*fp32"
        both = zip(("forward", "backward"), (13, 15), strict=True)
        for (step, strides), (shape, (given, block)) in itertools.product(both, SHAPES.items()):
            if dtype != "float32" and shape not in COMPILED[dtype]:
                continue
            lowest = torch.finfo(torch.float64 if dtype == "float64" else torch.float32).min
            constants = dict.fromkeys(FLAGS, False) | given | {"LOWEST": lowest}
            tensors = dict.fromkeys(("order", "cu_seqlens", "top_k"), "*i64") | dict.fromkeys(("u", "v", "saved"), acc)
            kernel = getattr(plackett_luce, f"{step}_kernel")
            tile = Tile.of(block, plain=shape.startswith("plain"), wide=dtype == "float64")
            yield _case(f"plackett_luce_{shape}_{step}", kernel, dtype, tile, constants, tensors, strides)
        for step, strides in (("forward", 8), ("backward", 9)) if dtype != "bfloat16" else ():
            constants = dict.fromkeys(("HAS_LENGTHS", "HAS_MASK", "HAS_WEIGHT", "HAS_MARGIN"), True)
            constants |= {"HAS_NORMALIZER": False, "TERMS": 16 if dtype == "float64" else 7}
            constants["LABEL"] = tl.float64 if dtype == "float64" else tl.int64
            tensors = {"labels": "*fp64" if dtype == "float64" else "*i64", "margin": "*fp32", "pairs": "*fp64"}
            kernel = getattr(all_pairs, f"{step}_kernel")
            tile = Tile.of(all_pairs.BLOCK, plain=False, wide=dtype == "float64")
            yield _case(f"all_pairs_{step}", kernel, dtype, tile, constants, tensors, strides)


CASES = list(_cases())
