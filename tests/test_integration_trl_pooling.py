"""Where TRL's reward trainers read a reward: against each row run alone."""

import json
import math
import warnings
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install rewardfuse[trl]")

import trl
from accelerate.utils import find_batch_size
from datasets import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification, LlamaForSequenceClassification

from rewardfuse.byte_tokenizer import byte_tokenizer
from rewardfuse.integrations import trl as ours
from rewardfuse.integrations._trl_pooling import pool_by_mask
from test_integration_trl import make_model, make_trainer

LAYOUTS = ("padded", "grouped", "packed")
BY_MASK = {"pooling": "attention_mask"}
STEPS = 20


@pytest.fixture(scope="module")
def eos_is_pad():
    """A tokenizer as TRL makes it where there is no pad token."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="module")
def eos_is_not_pad():
    return byte_tokenizer()


def text(index, part):
    """Short and long ones by turns, so that a batch falls into more than one group."""
    return f"{part} {index} " + "word " * (1 + index % 3 if (index + len(part)) % 4 else 18 + index % 5)


def pairs(count=40):
    rows = [{"prompt": "say: ", "chosen": text(i, "good"), "rejected": text(i + 1, "poor")} for i in range(count)]
    return Dataset.from_list(rows)


def lists(count=30):
    rows = []
    for index in range(count):
        responses = [text(index + place, "item") for place in range(2 + index % 3)]
        rows.append(
            {"prompt": "say: ", "responses": responses, "ranks": [1 + place % 2 for place in range(len(responses))]}
        )
    return Dataset.from_list(rows)


def first_rows(trainer, count=4):
    """(batch, rewards) of the trainer's collator and model, and the token ids of each row."""
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(count)])
    _, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    examples = trainer.train_dataset.select(range(count))
    return batch, outputs.logits, [*examples["chosen_ids"], *examples["rejected_ids"]]


def alone(model, ids):
    """The reward of one row by itself, without padding: the head at its last token."""
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state
        return model.score(hidden[0, -1]).item()


def assert_close_logs(got, expected):
    assert len(got) == len(expected) > 0
    for mine, other in zip(got, expected, strict=True):
        assert mine.keys() == other.keys()
        for name in [name for name in other if "runtime" not in name and "second" not in name]:
            assert mine[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), (other["step"], name)


def test_last_token_does_not_reach_the_reward_where_pad_is_eos(tmp_path, eos_is_pad):
    rewards = {}
    for name, module, options in (("trl", trl, {}), ("ours", ours, BY_MASK)):
        trainer = make_trainer(module, tmp_path / name, eos_is_pad, pairs(8), **options)
        model = trainer.model.eval()
        ids = trainer.train_dataset[0]["chosen_ids"]
        eos = eos_is_pad.eos_token_id
        assert ids[-2:] == [eos, eos] and ids[-3] != eos  # the text's own, and the tokenizer's
        for row, kept in (("whole", ids), ("cut", ids[:-2])):
            inputs = {"input_ids": torch.tensor([kept]), "attention_mask": torch.ones(1, len(kept), dtype=torch.int64)}
            rewards[name, row] = model(**inputs).logits.item()
        rewards[name, "alone"] = alone(model, ids)
    assert rewards["trl", "whole"] == pytest.approx(rewards["trl", "cut"], abs=1e-6)  # TRL's defect: eos is not read
    assert abs(rewards["trl", "whole"] - rewards["trl", "alone"]) > 1e-2
    assert rewards["ours", "whole"] == pytest.approx(rewards["ours", "alone"], abs=1e-6)
    assert abs(rewards["ours", "whole"] - rewards["ours", "cut"]) > 1e-2


@pytest.mark.parametrize("row_layout", LAYOUTS)
def test_reward_is_not_that_of_the_row_alone(tmp_path, eos_is_pad, row_layout):
    trainer = make_trainer(ours, tmp_path, eos_is_pad, pairs(8), row_layout=row_layout, **BY_MASK)
    batch, logits, rows = first_rows(trainer)
    if row_layout == "grouped":
        assert len(batch["input_ids"]) > 1
    assert logits.shape == (8, 1) and logits.requires_grad
    assert logits.squeeze(1).tolist() == pytest.approx([alone(trainer.model, ids) for ids in rows], abs=2e-6)
    assert find_batch_size(batch) == 8
    if row_layout != "padded":
        assert batch["row_lengths"].tolist() == [len(ids) for ids in rows]
    trainer.log({})
    assert trainer.state.log_history[-1]["num_tokens"] == sum(map(len, rows))


TINY = {"vocab_size": 40, "num_labels": 1, "pad_token_id": 39, "initializer_range": 0.3}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "gemma2": {**SIZES, "num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "gpt_neox": SIZES,
    "mistral": {**SIZES, "num_key_value_heads": 1},
    "opt": {
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 8,
    },
    "qwen3": {**SIZES, "num_key_value_heads": 1, "head_dim": 8},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_reward_of_a_family_differs_from_its_own_forward(family):
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(family, **FAMILIES[family], **TINY)
    ).eval()
    lengths = torch.tensor([9, 3, 6])
    mask = (torch.arange(9) < lengths[:, None]).long()
    ids = torch.randint(1, 39, (3, 9)).where(mask.bool(), 39)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    expected = model(**inputs).logits
    assert expected.std() > 1e-2
    pool_by_mask(model)
    torch.testing.assert_close(model(**inputs).logits, expected)
    assert isinstance(model(**inputs, return_dict=False), tuple)
    full = torch.where(mask.bool(), ids, torch.randint(1, 39, (3, 9)))  # what stands under the mask must not matter
    torch.testing.assert_close(model(**{**inputs, "input_ids": full}).logits, expected)


def test_masked_nan_reaches_the_gradient_of_the_head(tmp_path, eos_is_not_pad):
    finite = {}
    for name, module, options in (("trl", trl, {}), ("ours", ours, BY_MASK)):
        trainer = make_trainer(module, tmp_path / name, eos_is_not_pad, pairs(8), **options)
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
        masked = batch["attention_mask"] == 0
        assert masked.any()

        def poison(_, __, hidden, masked=masked):
            return hidden.masked_fill(masked[..., None], torch.nan)

        trainer.model.base_model.norm.register_forward_hook(poison)
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        assert loss.isfinite()
        finite[name] = bool(trainer.model.score.weight.grad.isfinite().all())
    assert finite == {"trl": False, "ours": True}


def test_pad_that_is_eos_passes_in_silence_or_warns_without_need(tmp_path, eos_is_pad, eos_is_not_pad):
    def said(tokenizer, **options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(ours, tmp_path, tokenizer, pairs(4), **options)
        return [entry for entry in caught if "pad and eos" in str(entry.message)]

    (warning,) = said(eos_is_pad)
    assert "one token early: set pooling='attention_mask'" in str(warning.message)
    assert "LlamaForSequenceClassification" in str(warning.message)
    assert said(eos_is_pad, **BY_MASK) == [] and said(eos_is_not_pad) == []


def test_saved_model_is_another_class_or_reads_elsewhere_after_a_path(tmp_path, eos_is_pad):
    make_model(eos_is_pad).save_pretrained(tmp_path / "start")
    eos_is_pad.save_pretrained(tmp_path / "start")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "start")
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 2, "disable_tqdm": True, **BY_MASK}
    args = ours.RewardConfig(str(tmp_path / "run"), row_layout="packed", gradient_checkpointing=True, **options)
    trainer = ours.RewardTrainer(str(tmp_path / "start"), args, train_dataset=pairs(32))
    trainer.train()
    trainer.save_model(str(tmp_path / "end"))
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "end")
    assert type(saved) is type(trainer.model) is LlamaForSequenceClassification
    assert saved.state_dict().keys() == plain.state_dict().keys()
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("start", "end")]
    assert configs[0].keys() == configs[1].keys()
    ids = trainer.train_dataset[0]["chosen_ids"]
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
    trained = trainer.model.eval()(**inputs).logits.item()
    assert trained == pytest.approx(alone(saved, ids), abs=1e-6)  # the weights as saved, and still the right place
    assert abs(trained - alone(plain, ids)) > 1e-6


@pytest.mark.parametrize("row_layout", LAYOUTS)
def test_adapters_around_the_model_hide_the_pooling(tmp_path, eos_is_pad, row_layout):
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False, modules_to_save=["score"])
    options = {"use_cpu": True, "bf16": True, "report_to": "none", "max_steps": 2, "logging_steps": 1, **BY_MASK}
    args = ours.RewardConfig(str(tmp_path), row_layout=row_layout, disable_tqdm=True, save_strategy="no", **options)
    trainer = ours.RewardTrainer(
        make_model(eos_is_pad), args, processing_class=eos_is_pad, train_dataset=pairs(32), peft_config=lora
    )
    _, logits, rows = first_rows(trainer)
    inner = trainer.model.get_base_model().eval()
    assert logits.squeeze(1).tolist() == pytest.approx([alone(inner, ids) for ids in rows], abs=2e-5)
    before = inner.score.modules_to_save["default"].weight.clone()
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    assert not torch.equal(inner.score.modules_to_save["default"].weight, before)


def test_virtual_tokens_are_pooled_in_silence(tmp_path, eos_is_pad):
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    args = ours.RewardConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **BY_MASK)
    prompt = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="does not go with the virtual tokens of PromptTuningConfig"):
        ours.RewardTrainer(
            make_model(eos_is_pad), args, processing_class=eos_is_pad, train_dataset=pairs(4), peft_config=prompt
        )


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("bert", SIZES),
        ("modernbert-decoder", {**SIZES, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 3, "sep_token_id": 4}),
    ],
)
def test_classifier_of_another_kind_is_pooled_in_silence(family, sizes):
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **sizes, **TINY))
    with pytest.raises(ValueError, match=f"needs a decoder with a head `score` .* got {type(model).__name__}"):
        pool_by_mask(model)


@pytest.mark.parametrize("cut", ["cp_enabled", "sp_enabled"])
def test_rows_that_are_cut_between_processes_are_pooled_in_silence(tmp_path, eos_is_pad, cut):
    trainer = make_trainer(ours, tmp_path, eos_is_pad, pairs(4), **BY_MASK)
    parallelism = SimpleNamespace(**{"cp_enabled": False, "sp_enabled": False, cut: True})
    trainer.accelerator = SimpleNamespace(parallelism_config=parallelism)
    with pytest.raises(ValueError, match="does not go with context or sequence parallelism, which cuts rows apart"):
        trainer._set_up_rows()


@pytest.mark.parametrize(
    "given", [{"labels": torch.zeros(1)}, {"output_hidden_states": True}], ids=["labels", "hidden"]
)
def test_argument_that_cannot_be_honoured_is_dropped(eos_is_pad, given):
    model = make_model(eos_is_pad)
    pool_by_mask(model)
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match=f"does not take {next(iter(given))}"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), **given)
    with pytest.raises(ValueError, match="groups of input_ids need as many of attention_mask, and restore"):
        model(input_ids=[ids, ids], attention_mask=[torch.ones_like(ids)])
    with pytest.raises(ValueError, match="input_ids and attention_mask must share a shape"):
        model(input_ids=ids, attention_mask=torch.ones(1, 2))
    with pytest.raises(TypeError, match="attention_mask"):
        model(ids, torch.ones_like(ids), attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize(
    "family", ["mistral", "gpt2"]
)  # the mask is the second argument of one, the third of the other
def test_call_by_position_or_without_a_mask_is_refused(family):
    config = AutoConfig.for_model(family, **FAMILIES[family], **TINY)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    mask = (torch.arange(9) < torch.tensor([9, 3, 6])[:, None]).long()
    ids = torch.randint(1, 39, (3, 9)).where(mask.bool(), 39)
    positional = [ids, mask] if family == "mistral" else [ids, None, mask]
    with torch.no_grad():
        expected, whole = model(*positional).logits, model(ids[:1]).logits
        pool_by_mask(model)
        torch.testing.assert_close(model(*positional).logits, expected)
        torch.testing.assert_close(model(ids[:1]).logits, whole)
        all_valid = model(ids, attention_mask=torch.ones_like(mask)).logits
        torch.testing.assert_close(model(ids).logits, all_valid)
    assert (all_valid - expected).abs().max() > 1e-2


@pytest.mark.parametrize("bf16", [False, True])  # accelerate wraps the forward then
def test_pooling_of_an_earlier_trainer_is_kept(tmp_path, eos_is_pad, bf16):
    def trainer(model, pooling):
        options = {"use_cpu": True, "report_to": "none", "max_steps": 1, "learning_rate": 0.0, "disable_tqdm": True}
        args = ours.RewardConfig(str(tmp_path), pooling=pooling, bf16=bf16, save_strategy="no", **options)
        return ours.RewardTrainer(model, args, processing_class=eos_is_pad, train_dataset=pairs(8))

    def rewards(made):
        return first_rows(made)[1].flatten().tolist()

    model = make_model(eos_is_pad)
    plain = rewards(trainer(make_model(eos_is_pad), "transformers"))
    first = trainer(model, "attention_mask")
    by_mask = rewards(first)
    first.train()
    assert max(abs(a - b) for a, b in zip(by_mask, plain, strict=True)) > 1e-2
    assert rewards(trainer(model, "transformers")) == plain
    assert "forward" not in vars(model)
    assert rewards(trainer(model, "attention_mask")) == by_mask
