"""The fused losses in the Trainer of transformers: the mean over a step's pairs, however they are batched."""

import doctest
import math
import pickle
import runpy

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install rewardfuse[train]")
pytest.importorskip("accelerate", reason="accelerate is not installed: pip install rewardfuse[train]")

from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaModel, Trainer, TrainingArguments

import oracles
from rewardfuse import RewardModel, bradley_terry_loss, plackett_luce_loss
from rewardfuse.byte_tokenizer import byte_tokenizer
from rewardfuse.integrations import transformers as ours

WORDS = ["the", "reward", "of", "a", "good", "answer", "is", "more", "than", "bad", "one"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def texts(tokenizer, count):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 6, (count,), generator=generator).tolist()
    words = [torch.randint(len(WORDS), (length,), generator=generator).tolist() for length in lengths]
    return [tokenizer(" ".join(WORDS[i] for i in row))["input_ids"] for row in words]


def pairs(tokenizer, count=5, **columns):
    ids = texts(tokenizer, 2 * count)
    rows = zip(ids[::2], ids[1::2], strict=True)
    return [
        {"chosen_ids": chosen, "rejected_ids": rejected, **{key: of(i) for key, of in columns.items()}}
        for i, (chosen, rejected) in enumerate(rows)
    ]


def lists(tokenizer):
    rest = iter(texts(tokenizer, 15))
    return [{"response_ids": [next(rest) for _ in range(size)]} for size in (3, 2, 5, 4, 1)]


def configuration(tokenizer):
    return LlamaConfig(
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


def classifier(tokenizer):
    """A tiny model, the same one every time."""
    torch.manual_seed(1)
    return LlamaForSequenceClassification(configuration(tokenizer))


def reward_model(tokenizer):
    torch.manual_seed(1)
    return RewardModel(LlamaModel(configuration(tokenizer)))


def trainer_of(
    tmp_path, model, collator, loss_func, items, per_device=2, accumulated=3, label_names=("labels",), **options
):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        label_names=label_names and list(label_names),
        remove_unused_columns=False,
        per_device_train_batch_size=per_device,
        per_device_eval_batch_size=per_device,
        gradient_accumulation_steps=accumulated,
        max_steps=2,
        learning_rate=0.05,
        max_grad_norm=0.0,
        optim="sgd",  # AdamW's first steps do not know the size of a gradient
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    return Trainer(
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=items,
        eval_dataset=items,
        compute_loss_func=loss_func,
        **options,
    )


def trained(*arguments, **options):
    """(losses, parameters) after two steps over all the items."""
    trainer = trainer_of(*arguments, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def kind_of(name, tokenizer):
    """(items, collator, loss function, the loss of a whole batch's rewards by the library)."""
    if name == "pairs":
        items, collator = pairs(tokenizer, target=lambda i: 1 - i / 8), ours.PairDataCollator(tokenizer)
        options = {"label_smoothing": 0.1, "beta": 0.5, "margin": 0.25, "center_rewards_coefficient": 0.01}

        def loss(rewards):
            return bradley_terry_loss(*rewards.chunk(2), target=1 - torch.arange(5) / 8, **options)

        return items, collator, ours.PairLossFunc(**options), loss

    def loss(rewards):
        padded = torch.nn.utils.rnn.pad_sequence(rewards.split([3, 2, 5, 4, 1]), batch_first=True)
        return plackett_luce_loss(padded, lengths=torch.tensor([3, 2, 5, 4, 1]), top_k=2)

    return lists(tokenizer), ours.ListDataCollator(tokenizer), ours.ListLossFunc(top_k=2), loss


@pytest.mark.parametrize("kind, make", [("pairs", classifier), ("lists", reward_model)])
def test_uneven_accumulation_leads_elsewhere(tmp_path, tokenizer, kind, make):
    items, collator, loss_func, by_the_library = kind_of(kind, tokenizer)
    whole = trained(tmp_path, make(tokenizer), collator, loss_func, items, per_device=5, accumulated=1)
    parts = trained(tmp_path, make(tokenizer), collator, loss_func, items)  # 2 + 2 + 1
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-5, atol=1e-6)
    rewards = ours._rewards(make(tokenizer)(**{k: v for k, v in collator(items).items() if k != "labels"}))
    assert whole[0][0] == pytest.approx(by_the_library(rewards).item(), rel=1e-5)

    def mean_of_each(outputs, labels, num_items_in_batch=None):  # what a loss that ignores the count does
        return loss_func(outputs, labels) / 3

    wrong = trained(tmp_path, make(tokenizer), collator, mean_of_each, items)
    assert (wrong[1] - whole[1]).abs().max() > 100 * (parts[1] - whole[1]).abs().max()


@pytest.mark.parametrize("make", [classifier, reward_model])
@pytest.mark.parametrize("kind", ["pairs", "lists"])
def test_evaluation_weighs_a_small_last_batch_as_a_whole_one(tmp_path, tokenizer, kind, make):
    items, collator, loss_func, by_the_library = kind_of(kind, tokenizer)
    model = make(tokenizer)
    found = trainer_of(tmp_path, model, collator, loss_func, items).evaluate()["eval_loss"]  # the loss alone
    with torch.no_grad():
        rewards = ours._rewards(model(**{k: v for k, v in collator(items).items() if k != "labels"}))
    assert found == pytest.approx(by_the_library(rewards).item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["pairs", "lists"])
def test_predictions_of_the_last_batch_are_cut_in_half(tmp_path, tokenizer, kind):
    items, collator, loss_func, _ = kind_of(kind, tokenizer)
    seen = {}

    def compute_metrics(evaluated):
        seen["predictions"], seen["labels"] = evaluated.predictions, evaluated.label_ids
        return {}

    table = ours.paired_logits if kind == "pairs" else ours.listed_logits
    model = classifier(tokenizer)
    options = {"compute_metrics": compute_metrics, "preprocess_logits_for_metrics": table}
    trainer_of(tmp_path, model, collator, loss_func, items, **options).evaluate()
    whole = collator(items)
    labels = whole.pop("labels")
    with torch.no_grad():
        expected = table(model(**whole).logits, labels)
    torch.testing.assert_close(torch.as_tensor(seen["predictions"]), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.as_tensor(seen["labels"]), labels)


@pytest.mark.parametrize("make", [classifier, lambda tokenizer: ours.ForTrainer(reward_model(tokenizer))])
def test_prediction_loses_a_reward_of_every_batch(tmp_path, tokenizer, make):
    items, collator, loss_func, _ = kind_of("pairs", tokenizer)
    model = make(tokenizer)
    trainer = trainer_of(tmp_path, model, collator, loss_func, items)
    batches = [collator(items[start : start + 2]) for start in (0, 2, 4)]
    with torch.no_grad():
        rewards = [model(batch["input_ids"], batch["attention_mask"]) for batch in batches]
    expected = torch.cat(
        [ours.paired_logits(ours._rewards(found), torch.ones(len(found["logits"]) // 2)) for found in rewards]
    )
    trainer.preprocess_logits_for_metrics = ours.paired_logits
    predicted = torch.as_tensor(trainer.predict(items).predictions)
    torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-5)


def test_reward_model_cannot_be_evaluated_without_label_names_or_saved(tmp_path, tokenizer):
    items, collator, loss_func, by_the_library = kind_of("pairs", tokenizer)
    inner = reward_model(tokenizer)
    trainer = trainer_of(tmp_path, ours.ForTrainer(inner), collator, loss_func, items, label_names=None)
    with torch.no_grad():
        rewards = inner(**{k: v for k, v in collator(items).items() if k != "labels"})
    assert trainer.evaluate()["eval_loss"] == pytest.approx(by_the_library(rewards).item(), rel=1e-5)
    assert trainer.model.config is inner.config
    trainer.model.save_pretrained(tmp_path)
    for name, value in RewardModel.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(value, inner.state_dict()[name])
    assert not hasattr(trainer.model, "no_such_attribute")


# the functions themselves


def test_table_is_as_wide_as_this_process_needs(monkeypatch):
    def maximum(tensor, op):  # as if another process had a list of five
        assert op is torch.distributed.ReduceOp.MAX
        tensor.clamp_(min=5)

    rewards, labels = torch.tensor([[2.0], [0.5], [1.0]]), torch.tensor([1, 2])
    alone = ours.listed_logits(rewards, labels)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", maximum)
    table = ours.listed_logits(rewards, labels)
    assert table.shape == (2, 5)
    assert torch.equal(table[:, :2], alone) and (table[:, 2:] == -100).all()
    assert ours.listed_logits(rewards[:0], labels[:0]).shape == (0, 5)


def test_masked_nan_reaches_the_loss():
    rewards = torch.tensor([0.5, math.nan, -0.25, 0.0, math.nan, 1.0], requires_grad=True)
    labels = torch.tensor([1.0, -100.0, 0.75])
    for count in (None, torch.tensor(2), 2):
        loss = ours.PairLossFunc()(rewards, labels, count)
        [gradient] = torch.autograd.grad(loss, rewards)
        expected = oracles.bradley_terry([0.5, -0.25], [0.0, 1.0], target=[1.0, 0.75])
        assert loss.item() == pytest.approx(expected["loss"], rel=1e-6)
        assert gradient[[0, 2]].tolist() == pytest.approx(list(expected["d_chosen"]), rel=1e-6)
        assert gradient[[1, 4]].tolist() == [0, 0]


def test_other_count_than_the_trainers_divides():
    rewards, labels = torch.randn(6), torch.tensor([1, 1, 1])  # integers, as a data set may have them
    mean = ours.PairLossFunc()(rewards, labels)
    torch.testing.assert_close(ours.PairLossFunc()(rewards, labels, torch.tensor(12)), mean / 4)
    mean = ours.ListLossFunc()(rewards, torch.tensor([4, 2]))
    torch.testing.assert_close(ours.ListLossFunc()(rewards, torch.tensor([4, 2]), 8), mean / 4)


def test_step_without_items_divides_by_zero():
    rewards = torch.full((4,), math.nan, requires_grad=True)
    for count in (None, 0, torch.tensor(0)):
        loss = ours.PairLossFunc()(rewards, torch.full((2,), -100), count)
        loss.backward()
        assert loss.item() == 0
        none = ours.ListLossFunc()(rewards[:0], torch.full((2,), -100), count)
        assert none.item() == 0
    assert not rewards.grad.any()


def test_uncounted_list_shifts_the_others():
    rewards = torch.randn(5)
    loss = ours.ListLossFunc()(rewards, torch.tensor([3, -100, 2]))
    torch.testing.assert_close(loss, ours.ListLossFunc()(rewards, torch.tensor([3, 2])))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda rewards: rewards,
        lambda rewards: rewards[:, None],
        lambda rewards: {"logits": rewards[:, None]},
        lambda rewards: type("Output", (), {"logits": rewards[:, None]})(),
    ],
    ids=["[2B]", "[2B, 1]", "a mapping", "an object"],
)
def test_kind_of_output_is_not_taken(wrap):
    rewards, labels = torch.randn(6), torch.ones(3)
    assert torch.equal(ours.PairLossFunc()(wrap(rewards), labels), ours.PairLossFunc()(rewards, labels))


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: ours.PairLossFunc(beta=0.0), ValueError, "beta"),
        (lambda: ours.PairLossFunc(label_smoothing=0.7), ValueError, "label_smoothing"),
        (lambda: ours.ListLossFunc(top_k=0), ValueError, "top_k"),
        (lambda: ours.ListLossFunc(top_k=1.5), ValueError, "top_k"),
        (lambda: ours.PairLossFunc()(torch.zeros(4), None), TypeError, "labels"),
        (lambda: ours.PairLossFunc()(torch.zeros(4), torch.ones(3)), ValueError, "two rows a label"),
        (lambda: ours.PairLossFunc()(torch.zeros(4, 2), torch.ones(2)), ValueError, "one reward a row"),
        (lambda: ours.PairLossFunc()("?", torch.ones(2)), TypeError, "outputs"),
        (lambda: ours.PairLossFunc()(torch.zeros(4), torch.ones(2, 1)), ValueError, "labels"),
        (lambda: ours.PairLossFunc()(torch.zeros(4), torch.tensor([2.0, 1.0])), ValueError, "^labels"),
        (lambda: ours.PairLossFunc()(torch.zeros(4), torch.ones(2), torch.ones(2, 1)), ValueError, "one process a GPU"),
        (lambda: ours.ListLossFunc()(torch.zeros(4), torch.tensor([2, 1])), ValueError, "as many rows"),
        (lambda: ours.ListLossFunc()(torch.zeros(4), torch.tensor([2.0, 2.0])), TypeError, "integer"),
        (lambda: ours.ListLossFunc()(torch.zeros(3), torch.tensor([4, -1])), ValueError, "^labels"),
        (lambda: ours.PairLossFunc()(torch.zeros(4).long(), torch.ones(2)), TypeError, "^outputs"),
        (lambda: ours.PairLossFunc()(torch.zeros(4), torch.ones(2) * 1j), TypeError, "^labels"),
        (lambda: ours.PairLossFunc()(torch.zeros(4), torch.ones(2), "3"), TypeError, "^num_items_in_batch"),
        (lambda: ours.PairLossFunc()(torch.zeros(4), torch.ones(2), math.nan), ValueError, "^num_items_in_batch"),
        (lambda: ours.PairLossFunc()(torch.zeros(4), torch.ones(4)), ValueError, "dispatch_batches"),
        (lambda: ours.ListLossFunc()(torch.zeros(4), torch.tensor([2, 4])), ValueError, "dispatch_batches"),
        (lambda: ours.paired_logits(torch.zeros(3), torch.ones(2)), ValueError, r"ForTrainer\(model\)"),
        (lambda: ours.listed_logits(torch.zeros(4, 1), torch.tensor([2, 3])), ValueError, r"ForTrainer\(model\)"),
    ],
)
def test_wrong_argument_is_not_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_loss_function_cannot_be_pickled():
    for function in (ours.PairLossFunc(beta=2.0), ours.ListLossFunc(top_k=3)):
        assert pickle.loads(pickle.dumps(function)) == function


# the collators


def test_targets_or_order_are_lost(tokenizer):
    items = pairs(tokenizer, 2)
    items[1]["target"] = 0.25
    batch = ours.PairDataCollator(tokenizer)(items)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["labels"].tolist() == [1.0, 0.25]
    real = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert real == [item[key] for key in ("chosen_ids", "rejected_ids") for item in items]

    ranked = [{"response_ids": [[1], [2], [3]], "ranks": [3, 1, 2]}, {"response_ids": [[4], [5]]}]
    batch = ours.ListDataCollator(tokenizer)(ranked)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["labels"].tolist() == [3, 2]
    assert batch["input_ids"].flatten().tolist() == [2, 3, 1, 4, 5]


def test_none_among_the_ranks_hides_the_order_or_tensors_warn(tokenizer, recwarn):
    items = [{"response_ids": [[1], [2], [3]], "ranks": [3, 1, 2]}, {"response_ids": [[4], [5]], "ranks": None}]
    expected = [2, 3, 1, 4, 5]
    assert ours.ListDataCollator(tokenizer)(items)["input_ids"].flatten().tolist() == expected
    items[0] = {"response_ids": torch.tensor([[1], [2], [3]]), "ranks": torch.tensor([3, 1, 2])}
    assert ours.ListDataCollator(tokenizer)(items)["input_ids"].flatten().tolist() == expected
    assert not recwarn.list


@pytest.mark.parametrize(
    "item, words",
    [
        ({"response_ids": [[1], [2], [3]], "ranks": [2, 1]}, "ranks a response, 3, got 2"),
        ({"response_ids": [[1], [2]], "ranks": [2, 1, 3]}, "ranks a response, 2, got 3"),
        ({"response_ids": []}, "response_ids, got none"),
        ({"response_ids": None}, "response_ids, got none"),
        ({"response_ids": [[1], []]}, "at least one token id"),
        ({"chosen_ids": [], "rejected_ids": [65]}, "at least one token id"),
        ({"chosen_ids": [65], "rejected_ids": None}, "at least one token id"),
    ],
)
def test_response_is_dropped_or_empty(tokenizer, item, words):
    collator = ours.ListDataCollator if "response_ids" in item else ours.PairDataCollator
    with pytest.raises(ValueError, match=words):
        collator(tokenizer)([item])


@pytest.mark.parametrize("extra", ["margin", "weight", "head"])
def test_number_that_reaches_no_loss_is_taken(tokenizer, extra):
    with pytest.raises(ValueError, match=extra):
        ours.PairDataCollator(tokenizer)(pairs(tokenizer, 2, **{extra: lambda i: 1}))


@pytest.mark.parametrize("extra", [{"ranks": [1, 1]}, {"weight": 2.0}, {"top_k": 1}])
def test_ties_or_numbers_of_lists_that_reach_no_loss_are_taken(tokenizer, extra):
    with pytest.raises(ValueError, match=next(iter(extra))):
        ours.ListDataCollator(tokenizer)([{"response_ids": [[1], [2]], **extra}])


def test_dropped_columns_are_not_explained(tmp_path, tokenizer):
    for collator in (ours.PairDataCollator(tokenizer), ours.ListDataCollator(tokenizer)):
        with pytest.raises(ValueError, match="remove_unused_columns"):
            collator([{}])
        with pytest.raises(ValueError, match="items"):
            collator([])


def test_documented_examples_are_wrong():
    result = doctest.testmod(ours)
    assert result.attempted >= 4
    assert not result.failed


def test_untested_version_passes_in_silence(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "6.0.1")
    with pytest.warns(UserWarning, match=r"tested with transformers 5\.23, but transformers 6\.0\.1 is installed"):
        runpy.run_module("rewardfuse.integrations.transformers")
