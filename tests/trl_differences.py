"""How far twenty steps differ from TRL's own: the figures of docs/integrations.md.

python tests/trl_differences.py    # about a minute on two cores
"""

import contextlib
import io
import logging
import tempfile
import warnings

import datasets
import torch
import transformers
import trl

import test_integration_trl as pairs
import test_integration_trl_lists as lists
import test_integration_trl_policy as policy
from rewardfuse.byte_tokenizer import byte_tokenizer
from rewardfuse.integrations import trl as ours

LAYOUTS = ("padded", "grouped", "packed")
SIXTEEN_BIT = {"bf16": True, "gradient_checkpointing": True}


def quiet(function, *arguments):
    """What ``function`` returns, without what trainers print."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


def report(name, one, other):
    """Print the largest difference of the losses, and of all other logged figures over all steps."""
    largest = {}
    for first, second in zip(one, other, strict=True):
        assert first.keys() == second.keys()
        for figure, value in first.items():
            largest[figure] = max(largest.get(figure, 0.0), abs(value - second[figure]))
    loss = largest.pop("loss")
    worst = max(largest, key=largest.get)
    print(f"{name:60} loss {loss:.1e}  all others {largest[worst]:.1e} ({worst})", flush=True)


def reward_trainers(tokenizer):
    def run(module, columns, options):
        made = pairs.make_trainer(module, tempfile.mkdtemp(), tokenizer, pairs.pairs(**columns), **options)
        return pairs.history(made)

    def compare(name, theirs, columns=None, **options):
        report(f"pairs, {name}", quiet(run, ours, columns or {}, options), theirs)

    theirs = quiet(run, trl, {}, {})
    compare("defaults", theirs)
    margin = {"margin": lambda index: 0.25 * (index % 4)}
    centered = {"center_rewards_coefficient": 0.01}
    compare("margin column and center_rewards_coefficient=0.01", quiet(run, trl, margin, centered), margin, **centered)
    compare("bf16=True, gradient_checkpointing=True", quiet(run, trl, {}, SIXTEEN_BIT), **SIXTEEN_BIT)
    for layout in LAYOUTS:
        compare(f"pooling by the mask, {layout}", theirs, pooling="attention_mask", row_layout=layout)


def list_trainers(tokenizer):
    def run(data, options):
        made = lists.make_trainer(tempfile.mkdtemp(), tokenizer, data, max_steps=pairs.STEPS, **options)
        return lists.history(made)

    theirs = quiet(pairs.history, pairs.make_trainer(trl, tempfile.mkdtemp(), tokenizer, pairs.pairs()))
    for loss in ("plackett_luce", "all_pairs"):
        options = {"loss": loss, "per_device_train_batch_size": pairs.PAIRS_PER_STEP}
        report(f"ranked lists of two, {loss}", quiet(run, lists.lists_of_two(pairs.pairs()), options), theirs)
    by_mask = {"pooling": "attention_mask"}
    data = lists.lists(60)
    padded = quiet(run, data, by_mask)
    for layout in LAYOUTS[1:]:
        report(f"ranked lists, {layout} and padded", quiet(run, data, {**by_mask, "row_layout": layout}), padded)


def policies(tokenizer):
    """Relative to 1 + the size of TRL's figure."""
    folder = policy.save(policy.make_model(tokenizer), tempfile.mkdtemp())
    for name, (kind, options) in policy.RUNS.items():
        options = {**options, "max_steps": policy.STEPS}
        runs = []
        for module in (ours, trl):
            own = {**options, **({"peft": options["peft"]()} if "peft" in options else {})}
            runs.append(quiet(policy.history, policy.make_trainer(module, kind, folder, tokenizer, **own)))
        found = policy.largest_difference(runs[0][0], runs[1][0])
        worst = max(found, key=found.get)
        same = "the same texts" if runs[0][1] == runs[1][1] else "OTHER TEXTS"
        print(f"{name:60} loss {found['loss']:.1e}  largest {found[worst]:.1e} ({worst})  {same}", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    reward_trainers(byte_tokenizer())
    list_trainers(byte_tokenizer())
    policies(byte_tokenizer())
