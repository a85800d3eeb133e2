"""How far twenty steps differ from TRL's own: the figures of docs/integrations.md.

python tests/trl_differences.py    # about three minutes on two cores
"""

import contextlib
import io
import tempfile
import warnings

import torch
import trl

import test_integration_trl as pairs
import test_integration_trl_lists as lists
import test_integration_trl_policy as policy
from rewardfuse.byte_tokenizer import byte_tokenizer
from rewardfuse.integrations import trl as ours

LAYOUTS = ("padded", "grouped", "packed")
SHOWN = ("loss", "grad_norm", "mean_reward", "margin")


def difference(one, other):
    """The largest of each logged figure over all steps."""
    found = {}
    for first, second in zip(one, other, strict=True):
        for name, value in first.items():
            found[name] = max(found.get(name, 0.0), abs(value - second[name]))
    return "  ".join(f"{name} {found[name]:.1e}" for name in SHOWN)


def reward_trainers(tokenizer):
    def run(module, **options):
        made = pairs.make_trainer(module, tempfile.mkdtemp(), tokenizer, pairs.pairs(), **options)
        return pairs.history(made)

    theirs = run(trl)
    print("RewardTrainer, as it is            ", difference(run(ours), theirs))
    for layout in LAYOUTS:
        print(
            f"pooling by the mask, {layout:14}",
            difference(run(ours, pooling="attention_mask", row_layout=layout), theirs),
        )


def list_trainers(tokenizer):
    def run(**options):
        data = lists.lists(60)
        return lists.history(lists.make_trainer(tempfile.mkdtemp(), tokenizer, data, max_steps=20, **options))

    padded = run(pooling="attention_mask")
    for layout in LAYOUTS[1:]:
        print(
            f"ranked lists, {layout} and padded ", difference(run(pooling="attention_mask", row_layout=layout), padded)
        )


def policies(tokenizer):
    folder = policy.save(policy.make_model(tokenizer), tempfile.mkdtemp())
    for name, (kind, options) in policy.RUNS.items():
        options = {**options, "max_steps": policy.STEPS}
        runs = []
        for module in (ours, trl):
            own = {**options, **({"peft": options["peft"]()} if "peft" in options else {})}
            with contextlib.redirect_stdout(io.StringIO()):
                runs.append(policy.history(policy.make_trainer(module, kind, folder, tokenizer, **own)))
        found = policy.largest_difference(runs[0][0], runs[1][0])
        worst = max(found, key=found.get)
        same = "the same texts" if runs[0][1] == runs[1][1] else "OTHER TEXTS"
        print(f"{name:55} loss {found['loss']:.1e}  largest {found[worst]:.1e} ({worst})  {same}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    reward_trainers(byte_tokenizer())
    list_trainers(byte_tokenizer())
    policies(byte_tokenizer())
