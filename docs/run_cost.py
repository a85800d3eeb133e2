"""What `rewardfuse train` costs on many pairs and several processes, from pieces measured here: the tables of scale.md.

python docs/run_cost.py pairs.jsonl TOKENIZER --pairs 10e6 --processes 8 --parameters 8e9

Reading, checking, tokenizing and collating are measured on the given pairs, on one process of this machine. The
device's part is measured nowhere: it is 6 · parameters · places FLOP (a place is a token or padding) at a share of the
device's peak, or follows from the tokens per second, padding not counted, that you have measured with your model.
"""

import argparse
import time
import tracemalloc
import types
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer

from rewardfuse.batching import PairCollator, PairDataset
from rewardfuse.data import find_duplicates, load_records
from rewardfuse.packing import GroupedCollator
from rewardfuse.train import _digest, _digest_records, _item_bytes

ADAM_BYTES = 16  # a parameter's float32 weight, gradient and two moments


def measured(work: Callable[[], Any]) -> tuple[Any, float]:
    """What ``work`` gives, and its seconds: the shortest of three times."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - started)
    return result, min(times)


def kept_bytes(work: Callable[[], Any]) -> int:
    """The memory that the result of ``work`` holds."""
    tracemalloc.start()
    result = work()
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del result
    return size


def pieces(path: str, tokenizer: Any, max_length: int, batch_size: int) -> types.SimpleNamespace:
    """Seconds and bytes of one pair, and its tokens."""
    records, reading = measured(lambda: load_records(path, skip_bad=True))
    pairs = list(records)
    count = len(pairs)
    found = types.SimpleNamespace(count=count, read=reading / count)
    found.text_bytes = kept_bytes(lambda: load_records(path, skip_bad=True)) / count
    found.duplicates = measured(lambda: find_duplicates(records, []))[1] / count
    found.compare = measured(lambda: _digest_records(pairs))[1] / count
    data, tokenizing = measured(lambda: PairDataset(pairs, tokenizer, max_length))
    found.tokenize = tokenizing / count
    found.token_bytes = kept_bytes(lambda: PairDataset(pairs, tokenizer, max_length)) / count
    found.digest = measured(lambda: _digest(map(_item_bytes, data.items)))[1] / count
    lengths = [len(item[key]) for item in data.items for key in ("chosen_ids", "rejected_ids")]
    found.tokens = sum(lengths) / count
    starts = range(0, count - batch_size + 1, batch_size)
    batches = [data.items[start : start + batch_size] for start in starts]
    for name, collator in {
        "padded": PairCollator(tokenizer),
        "grouped": GroupedCollator(PairCollator(tokenizer)),
    }.items():
        made, seconds = measured(lambda collator=collator: [collator(batch) for batch in batches])
        setattr(found, f"collate_{name}", seconds / (len(batches) * batch_size))
        ids = [batch["input_ids"] if name == "grouped" else [batch["input_ids"]] for batch in made]
        places = sum(part.numel() for parts in ids for part in parts) / (len(batches) * batch_size)
        setattr(found, f"places_{name}", places)
    return found


def report(found: types.SimpleNamespace, options: argparse.Namespace) -> None:
    pairs, processes = options.pairs, options.processes
    print(f"measured on {found.count} pairs of {found.tokens:.0f} tokens (both responses), for one pair:")
    for name, text in {
        "read": "read and check",
        "duplicates": "look for duplicates",
        "compare": "compare records with the other processes",
        "tokenize": "tokenize, check",
        "digest": "digest for checkpoints",
        "collate_padded": "collate, padded",
        "collate_grouped": "collate, groups of like length",
    }.items():
        print(f"  {text:42} {getattr(found, name) * 1e6:8.1f} µs")
    print(f"  {'memory of the records':42} {found.text_bytes:8.0f} B")
    print(f"  {'memory of the token ids':42} {found.token_bytes:8.0f} B")
    alone = found.read + found.duplicates + found.compare + found.digest
    print(f"\n{pairs:.3g} pairs on {processes} processes:")
    print(f"  each process reads, checks, compares   {alone * pairs / 60:8.1f} min")
    print(f"  each tokenizes its share               {found.tokenize * pairs / processes / 60:8.1f} min")
    print(f"  memory of a process for the data       {(found.text_bytes + found.token_bytes) * pairs / 1e9:8.0f} GB")
    rate = options.peak * options.utilisation / (6 * options.parameters)  # of places, padding among them
    for name in ("padded", "grouped"):
        hours = getattr(found, f"places_{name}") * pairs / processes / rate / 3600
        if options.tokens_per_second:
            hours = found.tokens * pairs / processes / options.tokens_per_second / 3600
        waits = getattr(found, f"collate_{name}") * pairs / processes / 3600
        print(f"  one epoch, {name:8} {hours:20.1f} h on the devices, and {waits:.2f} h to collate")
    states = ADAM_BYTES * options.parameters / 1e9
    print(f"  weights, gradients, Adam: {states:.0f} GB a device with DDP, {states / processes:.0f} GB with FSDP")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("tokenizer", help="folder or name of a tokenizer")
    parser.add_argument("--pairs", type=float, default=10e6)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--parameters", type=float, default=8e9)
    parser.add_argument("--batch_size", type=int, default=8, help="pairs of a process in a step")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument(
        "--peak", type=float, default=989e12, help="dense bfloat16 FLOP a second of a device; an H100's"
    )
    parser.add_argument(
        "--utilisation", type=float, default=0.4, help="share of it that training reaches: an assumption"
    )
    parser.add_argument("--tokens_per_second", type=float, help="real ones, without padding, of one device: measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    report(pieces(options.dataset, tokenizer, options.max_length, options.batch_size), options)


if __name__ == "__main__":
    main()
