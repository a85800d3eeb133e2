"""Digests of what scores depend on: data files, a model's weights, a tokenizer."""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rewardfuse.reward_model import RewardModel

SHOWN = 16  # hexadecimal digits, 64 bits: enough to tell runs apart, short enough for a message


def digest_files(paths: Sequence[str | os.PathLike]) -> str:
    """Digest of the bytes of files, in their order; their names do not matter."""
    digest = hashlib.sha256()
    for path in paths:
        content = hashlib.sha256()
        with open(path, "rb") as stream:
            while block := stream.read(1 << 20):
                content.update(block)
        digest.update(content.digest())
    return digest.hexdigest()[:SHOWN]


def digest_model(model: "RewardModel") -> str:
    """Digest of configuration and weights.

    The weights are read, not the size and time of their files: a file that was copied or downloaded again is the same
    model, one that was trained further within a second is not, and a model in memory may have no file. At about 1 GB a
    second this is soon done beside scoring.
    """
    beside = ("_name_or_path", "architectures", "dtype")  # say nothing of the rewards; saving a model changes them
    config = {key: value for key, value in model.config.to_dict().items() if key not in beside}
    config["attn_implementation"] = model.config._attn_implementation
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:SHOWN]


def digest_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Digest of the files that the tokenizer saves: vocabulary, rules, special tokens, chat template."""
    tokenizer("")  # drops the padding and truncation that an earlier call may have left in it: they would be saved too
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return digest_files(sorted(path for path in Path(folder).rglob("*") if path.is_file()))
