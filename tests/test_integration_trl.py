"""TRL's reward trainer on the fused loss: equal to TRL's own by default, and every further option reaches the loss."""

import importlib
import importlib.metadata
import math
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install rewardfuse[trl]")

import trl
from datasets import Dataset
from transformers import HfArgumentParser, LlamaConfig, LlamaForSequenceClassification

import oracles
import rewardfuse.integrations
from rewardfuse.byte_tokenizer import byte_tokenizer
from rewardfuse.integrations import trl as ours
from rewardfuse.integrations._patching import HookChangedError

STEPS, PAIRS_PER_STEP = 20, 4
BY_MASK = {"pooling": "attention_mask"}
WORDS = ["the", "reward", "of", "a", "good", "answer", "is", "more", "than", "bad", "one"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def pairs(**columns):
    """STEPS x PAIRS_PER_STEP pairs of different lengths, with further columns as functions of the pair's number."""
    generator = torch.Generator().manual_seed(0)

    def text():
        length = int(torch.randint(1, 6, (1,), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())

    rows = [{"prompt": "say: ", "chosen": text(), "rejected": text()} for _ in range(STEPS * PAIRS_PER_STEP)]
    return Dataset.from_list(
        [{**row, **{name: value(i) for name, value in columns.items()}} for i, row in enumerate(rows)]
    )


def make_model(tokenizer):
    """A tiny model, the same one every time."""
    torch.manual_seed(1)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=128,
            num_labels=1,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.4,  # reward differences of order 1, where the sigmoid is not linear
        )
    )


def make_trainer(module, folder, tokenizer, dataset, config=None, **options):
    """A trainer of ``module`` (trl or the drop-in) around the same tiny model."""
    arguments = {"max_steps": STEPS, "logging_steps": 1, "learning_rate": 3e-3, "seed": 7}
    arguments.update({"bf16": False, "gradient_checkpointing": False, **options})
    args = (config or module.RewardConfig)(
        output_dir=str(folder),
        per_device_train_batch_size=PAIRS_PER_STEP,
        per_device_eval_batch_size=PAIRS_PER_STEP,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **arguments,
    )
    model = make_model(tokenizer)
    return module.RewardTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=dataset)


def history(trainer):
    """The logged steps, without wall-clock figures."""
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == STEPS // trainer.args.logging_steps
    return steps


def assert_same_history(got, expected):
    for ours_step, trl_step in zip(got, expected, strict=True):
        assert ours_step.keys() == trl_step.keys()
        for name in trl_step:
            assert ours_step[name] == pytest.approx(trl_step[name], rel=1e-5, abs=1e-5), (trl_step["step"], name)


def first_batch_loss(trainer):
    """(loss, chosen rewards, rejected rewards, batch) of the first PAIRS_PER_STEP pairs at the initial weights."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(PAIRS_PER_STEP)])
    loss, outputs = trainer.compute_loss(trainer.model.train(), dict(batch), return_outputs=True)
    chosen, rejected = outputs.logits.detach().squeeze(-1).double().chunk(2)
    return loss.item(), chosen, rejected, batch


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        ({}, {}),
        ({"margin": lambda i: 0.25 * (i % 4)}, {"center_rewards_coefficient": 0.01}),
        ({}, {"gradient_accumulation_steps": 2, "logging_steps": 5}),
    ],
    ids=["defaults", "margin and centering", "accumulation and sparse logs"],
)
def test_twenty_steps_differ_from_trl(tmp_path, tokenizer, columns, options):
    runs = {}
    for name, module in (("trl", trl), ("ours", ours)):
        runs[name] = history(make_trainer(module, tmp_path / name, tokenizer, pairs(**columns), **options))
    assert {"loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward", "grad_norm"} <= runs["trl"][
        0
    ].keys()
    assert len({step["loss"] for step in runs["trl"]}) > 1
    assert_same_history(runs["ours"], runs["trl"])


def test_evaluation_differs_from_trl(tmp_path, tokenizer):
    results = []
    for name, module in (("trl", trl), ("ours", ours)):
        trainer = make_trainer(module, tmp_path / name, tokenizer, pairs(), max_steps=3)
        trainer.train()
        result = trainer.evaluate(pairs(margin=lambda i: 0.1 * (i % 3)))
        results.append(
            {key: value for key, value in result.items() if "runtime" not in key and "per_second" not in key}
        )
    assert results[0].keys() == results[1].keys()
    assert results[0]["eval_num_tokens"] > 0
    assert results[1] == pytest.approx(results[0], rel=1e-5, abs=1e-5)


def test_trls_own_config_is_refused_or_changes_the_loss(tmp_path, tokenizer):
    mine = first_batch_loss(make_trainer(ours, tmp_path / "ours", tokenizer, pairs(), config=trl.RewardConfig))
    theirs = first_batch_loss(make_trainer(trl, tmp_path / "trl", tokenizer, pairs()))
    assert mine[0] == pytest.approx(theirs[0], rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"label_smoothing": 0.2}, {"beta": 0.5}, {"center_rewards_coefficient": 0.3}],
    ids=["label_smoothing", "beta", "center_rewards_coefficient"],
)
def test_option_is_ignored(tmp_path, tokenizer, options):
    loss, chosen, rejected, _ = first_batch_loss(make_trainer(ours, tmp_path, tokenizer, pairs(), **options))
    expected = oracles.bradley_terry(chosen, rejected, **options)["loss"]
    assert abs(expected - oracles.bradley_terry(chosen, rejected)["loss"]) > 1e-3
    assert loss == pytest.approx(expected, rel=1e-5)


COLUMNS = {"margin": lambda i: 0.5 * i, "weight": lambda i: float(i), "target": lambda i: (i % 3) / 2}


@pytest.mark.parametrize("name", COLUMNS)
def test_column_is_dropped_on_its_way_to_the_loss(tmp_path, tokenizer, name):
    trainer = make_trainer(ours, tmp_path, tokenizer, pairs(**{name: COLUMNS[name]}))
    loss, chosen, rejected, batch = first_batch_loss(trainer)
    column = [COLUMNS[name](i) for i in range(PAIRS_PER_STEP)]
    assert batch[name].tolist() == column
    expected = oracles.bradley_terry(chosen, rejected, **{name: column})["loss"]
    assert abs(expected - oracles.bradley_terry(chosen, rejected)["loss"]) > 1e-3
    assert loss == pytest.approx(expected, rel=1e-5)
    # the way of a training run, past the removal of unused columns
    assert name in next(iter(trainer.get_train_dataloader()))


def test_zero_weight_pair_trains_or_counts(tmp_path, tokenizer):
    trainer = make_trainer(ours, tmp_path, tokenizer, pairs(weight=lambda i: float(i == 0)))
    loss, chosen, rejected, _ = first_batch_loss(trainer)
    trainer.log({})
    expected = oracles.bradley_terry(chosen, rejected, weight=[1, 0, 0, 0])
    assert loss == pytest.approx(expected["loss"], rel=1e-5)
    logged = trainer.state.log_history[-1]
    assert logged["accuracy"] == expected["accuracy"]
    assert logged["margin"] == pytest.approx(expected["reward_margin"], rel=1e-5)


def test_metrics_are_lost_or_doubled_when_a_run_logs_rarely(tmp_path, tokenizer):
    trainer = make_trainer(ours, tmp_path, tokenizer, pairs())
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(PAIRS_PER_STEP)])
    trainer.model.train()
    batches = 300  # more than are kept on the device
    with torch.no_grad():
        for _ in range(batches):
            trainer.compute_loss(trainer.model, dict(batch))
    trainer.log({})
    assert trainer.state.log_history[-1]["num_tokens"] == batches * int(batch["attention_mask"].sum())
    trainer.compute_loss(trainer.model, dict(batch))
    trainer.log({})
    assert trainer.state.log_history[-1]["num_tokens"] == (batches + 1) * int(batch["attention_mask"].sum())


@pytest.mark.parametrize("value", [None, "much", [1.0]])
def test_column_without_a_number_gives_an_obscure_error(value):
    rows = [{"chosen_ids": [1], "rejected_ids": [2], "weight": w} for w in (1.0, value)]
    with pytest.raises(TypeError, match="column 'weight' must hold a number for every pair, got"):
        ours.DataCollatorForPreference(pad_token_id=0)(rows)


@pytest.mark.parametrize("name", COLUMNS)
def test_column_that_the_first_pair_lacks_is_dropped(name):
    rows = [{"chosen_ids": [1], "rejected_ids": [2], **more} for more in ({}, {name: 0.5})]
    for order in (rows, rows[::-1]):
        with pytest.raises(TypeError, match=f"column '{name}' must hold a number for every pair, got None"):
            ours.DataCollatorForPreference(pad_token_id=0)(order)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 0.6}, "label_smoothing must be between 0 and 0.5, got 0.6"),
        ({"label_smoothing": -0.1}, "label_smoothing must be between 0 and 0.5, got -0.1"),
        ({"beta": 0.0}, "beta must be positive and finite, got 0.0"),
        ({"beta": float("nan")}, "beta must be positive and finite, got nan"),
    ],
)
def test_option_out_of_range_reaches_training(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ours.RewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


def test_options_are_missing_on_the_command_line(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--label_smoothing", "0.1", "--beta", "0.5"]
    (config,) = HfArgumentParser(ours.RewardConfig).parse_args_into_dataclasses(flags)
    assert (config.label_smoothing, config.label_smoothing_factor, config.beta) == (0.1, 0.0, 0.5)


def test_label_smoothing_factor_is_taken_for_label_smoothing(tmp_path):
    with pytest.warns(
        UserWarning, match="label_smoothing_factor=0.1 has no effect on a reward loss: set label_smoothing"
    ):
        ours.RewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, label_smoothing_factor=0.1)


@pytest.fixture
def fresh_import(monkeypatch):
    """Import the drop-in anew; afterwards everything is as before."""
    name = "rewardfuse.integrations.trl"
    monkeypatch.setattr(rewardfuse.integrations, "trl", ours)
    monkeypatch.delitem(sys.modules, name)
    return lambda: importlib.import_module(name)


def test_untested_trl_version_passes_in_silence(monkeypatch, fresh_import):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: {"trl": "1.17.0"}[package])
    with pytest.warns(UserWarning, match=r"tested with trl 1\.16, but trl 1\.17\.0 is installed"):
        fresh_import()


def test_tested_trl_version_warns(monkeypatch, fresh_import):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: {"trl": "1.16.3"}[package])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh_import()


@pytest.mark.parametrize("options", [{}, BY_MASK, {"row_layout": "packed", **BY_MASK}], ids=str)
def test_prediction_loses_rewards_of_the_last_batch(tmp_path, tokenizer, options):
    trainer = make_trainer(ours, tmp_path, tokenizer, pairs(), **options)
    dataset = trainer.train_dataset.select(range(6))  # a batch of four, and one of two
    predicted = trainer.predict(dataset).predictions
    assert predicted.shape == (6, 2)
    for index in range(6):
        batch = trainer.data_collator([dataset[index]])
        _, outputs = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
        assert predicted[index].tolist() == pytest.approx(outputs.logits.squeeze(-1).tolist(), abs=1e-5)
    assert abs(predicted[:, 0] - predicted[:, 1]).min() > 1e-3
    assert math.isfinite(trainer.evaluate(dataset)["eval_loss"])


def _other_parameters(self, model, batch):
    raise AssertionError("not to be called")


@pytest.mark.parametrize("name", sorted(ours.HOOKS))
def test_method_with_other_parameters_is_overridden_in_silence(monkeypatch, fresh_import, name):
    monkeypatch.setattr(trl.RewardTrainer, name, _other_parameters)
    message = r"takes \(self, model, batch\), expected \(" + ", ".join(("self", *ours.HOOKS[name])) + r"\)"
    with pytest.raises(HookChangedError, match=message):
        fresh_import()


def test_method_that_trl_has_no_more_is_overridden_in_silence():
    with pytest.raises(HookChangedError, match=r"Empty has no compute_loss any more"):
        ours.check_hooks(type("Empty", (), {}), {"compute_loss": ()})


def test_policy_trainers_are_imported_too_early_or_not_at_all(monkeypatch, fresh_import):
    policy = SimpleNamespace(**{name: object() for name in ours.POLICY_TRAINERS})
    monkeypatch.setattr(rewardfuse.integrations, "_trl_policy", policy, raising=False)
    monkeypatch.setitem(sys.modules, "rewardfuse.integrations._trl_policy", policy)
    module = fresh_import()
    assert set(ours.POLICY_TRAINERS) < set(module.__all__)
    for name in ours.POLICY_TRAINERS:
        assert name not in vars(module) and getattr(module, name) is getattr(policy, name)
    with pytest.raises(AttributeError, match=r"module 'rewardfuse\.integrations\.trl' has no attribute 'PPOTrainer'"):
        module.PPOTrainer  # noqa: B018


def test_batches_are_cut_apart_between_processes(tmp_path, tokenizer):
    with pytest.warns(UserWarning, match="dispatch_batches=True would cut pairs and lists apart"):
        trainer = make_trainer(ours, tmp_path, tokenizer, pairs(), accelerator_config={"dispatch_batches": True})
    assert trainer.accelerator.dispatch_batches is False


def test_missing_trl_does_not_say_what_to_install(monkeypatch):
    name = "rewardfuse.integrations.trl"
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, name)
    for wanted in ours.__all__:
        with pytest.raises(ImportError, match=r"pip install rewardfuse\[trl\]"):
            exec(f"from {name} import {wanted}")
