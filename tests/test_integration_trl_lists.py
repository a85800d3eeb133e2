"""The trainer for ranked lists in TRL's manner: loss, metrics, columns, and that lists of two are TRL's pairs."""

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install rewardfuse[trl]")

import trl
from datasets import Dataset, IterableDataset
from transformers import HfArgumentParser

import list_oracles
from rewardfuse.byte_tokenizer import byte_tokenizer
from rewardfuse.integrations.trl import DataCollatorForRankedLists, ListwiseRewardConfig, ListwiseRewardTrainer
from test_integration_trl import PAIRS_PER_STEP, STEPS, make_model, pairs

LISTS_PER_STEP = 3
TEXTS = [f"{'very ' * (index % 4)}good {index}" for index in range(5)]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def lists(count=30, **columns):
    """Lists of 2 to 5 responses with ties, with further columns as functions of the list's number."""
    rows = []
    for index in range(count):
        responses = [f"{text} of {index}" for text in TEXTS[: 2 + index % 4]]
        ranks = [1 + (place * 7 + index) % 3 for place in range(len(responses))]
        rows.append({"prompt": "say: ", "responses": responses, "ranks": ranks, "note": "dropped"})
        rows[-1].update({name: value(index) for name, value in columns.items()})
    return Dataset.from_list(rows)


def lists_of_two(dataset):
    rows = [{"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]]} for row in dataset]
    return Dataset.from_list([{**row, "order": [0, 1]} for row in rows])


def make_trainer(folder, tokenizer, dataset, **options):
    arguments = {"max_steps": 10, "logging_steps": 1, "learning_rate": 3e-3, "seed": 7, **options}
    arguments.setdefault("per_device_train_batch_size", LISTS_PER_STEP)
    args = ListwiseRewardConfig(
        output_dir=str(folder),
        per_device_eval_batch_size=LISTS_PER_STEP,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **arguments,
    )
    model = make_model(tokenizer)
    return ListwiseRewardTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=dataset)


def first_batch(trainer):
    """(loss, rewards of each list, ranks of each list, batch) of the first lists at the initial weights."""
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(LISTS_PER_STEP)])
    loss, outputs = trainer.compute_loss(trainer.model.train(), dict(batch), return_outputs=True)
    lengths = batch["cu_seqlens"].diff().tolist()
    rewards = [row.tolist() for row in outputs.logits.detach().squeeze(-1).double().split(lengths)]
    return loss.item(), rewards, [row.tolist() for row in batch["ranks"].split(lengths)], batch


def history(trainer):
    """The logged steps, without wall-clock figures."""
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "options", [{}, {"ties": "efron"}, {"top_k": 1}, {"loss": "all_pairs"}, {"loss": "all_pairs", "top_k": 1}], ids=str
)
def test_loss_or_option_differs_from_the_oracle(tmp_path, tokenizer, options):
    loss, rewards, ranks, _ = first_batch(make_trainer(tmp_path, tokenizer, lists(), **options))
    assert [len(row) for row in rewards] == [2, 3, 4]
    k = options.get("top_k", 99)
    if options.get("loss") == "all_pairs":
        labels = [[-min(rank, k + 1) for rank in row] for row in ranks]
        expected = list_oracles.all_pairs(rewards, labels)["loss"]
    else:
        expected = list_oracles.plackett_luce(rewards, ranks=ranks, top_k=k, ties=options.get("ties", "breslow"))[
            "loss"
        ]
    assert loss == pytest.approx(expected, rel=1e-5)


def test_ten_steps_log_something_else_than_the_batch_says(tmp_path, tokenizer):
    steps = history(make_trainer(tmp_path, tokenizer, lists()))
    assert [step["step"] for step in steps] == list(range(1, 11))
    assert len({step["loss"] for step in steps}) == 10 and len({step["grad_norm"] for step in steps}) == 10
    trainer = make_trainer(tmp_path, tokenizer, lists())
    _, rewards, ranks, batch = first_batch(trainer)
    trainer.log({})
    logged = trainer.state.log_history[-1]
    right, total, margins = 0, 0, []
    for row, places in zip(rewards, ranks, strict=True):
        ordered = [(a, b) for a, x in zip(row, places, strict=True) for b, y in zip(row, places, strict=True) if x < y]
        right, total = right + sum(a > b for a, b in ordered), total + len(ordered)
        best = [a for a, x in zip(row, places, strict=True) if x == 1]
        others = [a for a, x in zip(row, places, strict=True) if x > 1]
        margins.append(sum(best) / len(best) - sum(others) / len(others))
    flat = [reward for row in rewards for reward in row]
    expected = {"accuracy": right / total, "margin": sum(margins) / len(margins), "mean_reward": sum(flat) / len(flat)}
    expected.update(min_reward=min(flat), max_reward=max(flat), num_tokens=batch["attention_mask"].sum().item())
    for name, value in expected.items():
        assert logged[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("loss", ["plackett_luce", "all_pairs"])
def test_lists_of_two_differ_from_trl_on_the_pairs(tmp_path, tokenizer, loss):
    dataset = pairs()
    two = lists_of_two(dataset)
    shared = {"per_device_train_batch_size": PAIRS_PER_STEP, "max_steps": STEPS}
    ours = history(make_trainer(tmp_path / "ours", tokenizer, two, loss=loss, **shared))
    args = make_trainer(tmp_path / "args", tokenizer, two, **shared).args
    options = {name: getattr(args, name) for name in ("max_steps", "logging_steps", "learning_rate", "seed", "use_cpu")}
    options.update(bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True)
    config = trl.RewardConfig(str(tmp_path / "trl"), per_device_train_batch_size=PAIRS_PER_STEP, **options)
    trainer = trl.RewardTrainer(make_model(tokenizer), config, processing_class=tokenizer, train_dataset=dataset)
    theirs = history(trainer)
    assert len(ours) == len(theirs) == STEPS
    for mine, trls in zip(ours, theirs, strict=True):
        assert mine.keys() == trls.keys()
        for name in trls:
            assert mine[name] == pytest.approx(trls[name], rel=1e-5, abs=1e-5), (trls["step"], name)


def test_weight_and_top_k_columns_are_dropped_on_their_way_to_the_loss(tmp_path, tokenizer):
    columns = {"weight": lambda i: [None, 0.0, 3.0][i % 3], "top_k": lambda i: [1, None, 2][i % 3]}
    trainer = make_trainer(tmp_path, tokenizer, lists(**columns))
    loss, rewards, ranks, batch = first_batch(trainer)
    assert batch["weight"].tolist() == [1.0, 0.0, 3.0] and batch["top_k"].tolist() == [1, 3, 2]
    expected = list_oracles.plackett_luce(rewards, ranks=ranks, top_k=[1, 3, 2], weight=[1.0, 0.0, 3.0])["loss"]
    assert abs(expected - list_oracles.plackett_luce(rewards, ranks=ranks)["loss"]) > 1e-3
    assert loss == pytest.approx(expected, rel=1e-5)
    # the way of a training run, past the removal of unused columns
    assert {"weight", "top_k", "cu_seqlens", "rows"} <= next(iter(trainer.get_train_dataloader())).keys()


def test_evaluation_takes_other_lists_than_it_is_given(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, lists(), max_steps=1)
    trainer.train()
    plain = trainer.evaluate(lists(6))
    tokenized = trainer.evaluate(trainer.train_dataset.select(range(6)))
    kept = ("eval_loss", "eval_accuracy", "eval_margin", "eval_mean_reward")
    assert [plain[name] for name in kept] == [tokenized[name] for name in kept]
    trainer.model.eval()
    batches = [trainer.data_collator([trainer.train_dataset[i] for i in range(start, start + 3)]) for start in (0, 3)]
    losses = [trainer.compute_loss(trainer.model, batch).item() for batch in batches]
    assert plain["eval_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_prediction_loses_rewards_of_the_last_batch(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, lists())
    trainer.model.eval()
    dataset = trainer.train_dataset.select(range(5))  # a batch of three lists, and one of two: up to 4 and 5 responses
    predicted = trainer.predict(dataset).predictions
    assert predicted.shape == (5, 5)
    for row, example in zip(predicted.tolist(), dataset, strict=True):
        with torch.no_grad():
            alone = [
                trainer.model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits.item()
                for ids in example["response_ids"]
            ]
        best_first = [alone[place] for place in sorted(range(len(alone)), key=example["ranks"].__getitem__)]
        assert row == pytest.approx(best_first + [-100.0] * (5 - len(alone)), abs=1e-5)


def test_tokenizer_without_eos_gives_an_obscure_error(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="train data set, row 0: the tokenizer has no eos token"):
        make_trainer(tmp_path, tokenizer, lists(2))


@pytest.mark.parametrize("prompt", ["hi", [{"role": "user", "content": "hi"}], None])
@pytest.mark.parametrize("chat", [True, False])
def test_chat_messages_are_read_another_way_than_by_the_template(tmp_path, prompt, chat):
    templated = byte_tokenizer()
    templated.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    answers = [[{"role": "assistant", "content": text}] if chat else text for text in ("yes", "no")]
    row = {"responses": answers, "labels": [0.5, 2.0]}
    dataset = Dataset.from_list([{**row, "prompt": prompt} if prompt else row])
    prepared = make_trainer(tmp_path, templated, dataset).train_dataset[0]
    said = ("<user>hi" if prompt else "") if chat or isinstance(prompt, list) else prompt or ""
    speaker = "<assistant>" if chat or isinstance(prompt, list) else ""
    texts = [templated.decode(ids, skip_special_tokens=True) for ids in prepared["response_ids"]]
    assert texts == [f"{said}{speaker}yes", f"{said}{speaker}no"] and prepared["ranks"] == [2, 1]


def test_list_with_an_overlong_response_or_a_stream_is_not_taken_as_by_trl(tmp_path, tokenizer):
    dataset = lists(8)
    ids = [
        [tokenizer(f"say: {text}{tokenizer.eos_token}")["input_ids"] for text in row] for row in dataset["responses"]
    ]
    longest = [max(map(len, row)) for row in ids]
    limit = sorted(longest)[3]
    kept = sum(length <= limit for length in longest)
    trainer = make_trainer(tmp_path, tokenizer, dataset, max_length=limit)
    assert len(trainer.train_dataset) == kept < 8
    stream = IterableDataset.from_generator(lambda: iter(dataset.to_list()))
    trainer = make_trainer(tmp_path, tokenizer, stream, max_length=limit, max_steps=2)
    assert len(list(trainer.train_dataset)) == kept
    assert len(history(trainer)) == 2


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"ranking": lambda i: [1]}, "train data set, row 0: `ranking` may mean two things"),
        ({"order": lambda i: [1, 0, 2, 3, 4][: 2 + i % 4]}, r"train data set, row \d+: `ranks` and `order` disagree"),
        ({"ranks": lambda i: [1, 2]}, "train data set, row 1: `ranks` must hold one number for each of the 3"),
        ({"top_k": lambda i: 2 - i}, "train data set, row 2: `top_k` must be an integer of at least 1, got 0"),
        ({"weight": lambda i: "much"}, "row 0: column 'weight' must hold a number for every list, got 'much'"),
        ({"responses": lambda i: ["only one"], "ranks": lambda i: [1]}, "row 0: `responses` must hold at least two"),
    ],
)
def test_bad_row_is_trained_on_or_not_named(tmp_path, tokenizer, columns, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_trainer(tmp_path, tokenizer, lists(6, **columns))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"responses": "abc", "ranks": [1, 2, 3]}, "row 1: `responses` must be a list, got a string"),
        ({"responses": None}, "row 1: `responses` must be a list, got null"),
        ({"responses": ["a", None]}, r"row 1: `responses\[1\]` must be a string or .* got null"),
        ({"responses": ["a", 3]}, r"row 1: `responses\[1\]` must be a string or .* got a number"),
        ({"responses": ["a", []]}, r"row 1: `responses\[1\]` must be a string or .* got an empty list"),
        ({"response_ids": "ab"}, "row 1: `response_ids` must be a list, got a string"),
        ({"response_ids": [[], [1]]}, r"row 1: `response_ids\[0\]` must be a list of at least one token id, got \[\]"),
        ({"response_ids": [[1], None]}, r"row 1: `response_ids\[1\]` must be .* got None"),
        ({"response_ids": [[1], [0.5]]}, r"row 1: `response_ids\[1\]` must be .* got \[0.5\]"),
        ({"weight": float("inf")}, "row 1: `weight` must be finite and at least 0, got inf"),
        ({"prompt": 3}, "row 1: `prompt` must be a string or a list of chat messages, got a number"),
    ],
    ids=str,
)
def test_row_of_another_kind_is_trained_on_or_fails_elsewhere(tmp_path, tokenizer, row, message):
    good = {"responses": ["a", "b"], "ranks": [1, 2]}
    stream = IterableDataset.from_generator(lambda: iter([good, {**good, **row}]))
    with pytest.raises(ValueError, match=f"train data set, {message}"):
        list(make_trainer(tmp_path, tokenizer, stream).train_dataset)


def test_error_of_a_tokenizer_loses_its_row(tmp_path):
    class Failing(type(byte_tokenizer())):
        def __call__(self, text, **options):
            return b"\xff".decode("utf-8")  # its error takes five arguments

    tokenizer = byte_tokenizer()
    tokenizer.__class__ = Failing
    with pytest.raises(ValueError, match="train data set, row 0: 'utf-8' codec can't decode byte 0xff"):
        make_trainer(tmp_path, tokenizer, lists(2))


@pytest.mark.parametrize("stream", [False, True])
def test_data_set_without_lists_gives_an_obscure_error_or_none(tmp_path, tokenizer, stream):
    dataset = lists(4)
    empty = dataset.select([])
    if stream:
        dataset, empty = dataset.to_iterable_dataset(), IterableDataset.from_generator(lambda: iter([]))
    with pytest.raises(ValueError, match="train data set: expected at least one row, got none"):
        make_trainer(tmp_path, tokenizer, empty)
    with pytest.raises(ValueError, match="train data set: every list has a response longer than max_length=3"):
        make_trainer(tmp_path, tokenizer, dataset, max_length=3)
    trainer = make_trainer(tmp_path, tokenizer, dataset)
    with pytest.raises(ValueError, match="eval data set: expected at least one row, got none"):
        trainer.evaluate(empty)


def test_pairs_give_an_obscure_error(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"row 0: no `responses` .found: 'prompt', 'chosen', 'rejected'"):
        make_trainer(tmp_path, tokenizer, pairs())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "bradley_terry"}, "loss must be one of plackett_luce, all_pairs, got 'bradley_terry'"),
        ({"ties": "exact"}, "ties must be one of breslow, efron, got 'exact'"),
        ({"loss": "all_pairs", "ties": "efron"}, "ties is an option of the loss plackett_luce"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"center_rewards_coefficient": 0.1}, "center_rewards_coefficient is an option of pairs, got 0.1"),
    ],
)
def test_option_out_of_range_reaches_training(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ListwiseRewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


def test_config_of_pairs_is_taken_in_silence_and_options_are_missing_on_the_command_line(tmp_path, tokenizer):
    config = trl.RewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match="args must be a ListwiseRewardConfig, got RewardConfig"):
        ListwiseRewardTrainer(make_model(tokenizer), config, processing_class=tokenizer, train_dataset=lists())
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--loss", "all_pairs", "--top_k", "3"]
    (config,) = HfArgumentParser(ListwiseRewardConfig).parse_args_into_dataclasses(flags)
    assert (config.loss, config.ties, config.top_k) == ("all_pairs", "breslow", 3)


def test_collator_pads_another_way_than_trls():
    examples = [
        {"response_ids": [[1, 2], [3]], "ranks": [2, 1]},
        {"response_ids": [[4], [5], [6, 7, 8]], "ranks": [1, 2, 3]},
    ]
    batch = DataCollatorForRankedLists(pad_token_id=9, pad_to_multiple_of=4)(examples)
    assert batch["input_ids"].tolist() == [[3, 9, 9, 9], [1, 2, 9, 9], [4, 9, 9, 9], [5, 9, 9, 9], [6, 7, 8, 9]]
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] != 9).long())
    assert batch["cu_seqlens"].tolist() == [0, 2, 5]
