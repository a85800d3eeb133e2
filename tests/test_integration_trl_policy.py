"""TRL's RLOO and GRPO through this library: TRL's own figures by default, and none of its NaNs."""

import copy
import warnings

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install rewardfuse[trl]")

import trl
import trl.trainer.grpo_trainer
import trl.trainer.rloo_trainer
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from rewardfuse.byte_tokenizer import byte_tokenizer
from rewardfuse.integrations import _trl_head
from rewardfuse.integrations import _trl_policy as ours
from rewardfuse.integrations._patching import HookChangedError, with_statements

STEPS, BATCH, LENGTH = 20, 4, 8
TOLERANCE = 5e-5  # relative to 1 + the figure; the largest seen is 8.2e-6, of a gradient norm
PROMPTS = ["say: ", "a word ", "bring ", "one more", "x"]
VALID = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]])  # of four completions


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    """The folder of a tiny model, which TRL loads the reference from. Its completions end at different lengths."""
    return save(make_model(tokenizer), tmp_path_factory.mktemp("model"))


def make_model(tokenizer, **options):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        initializer_range=0.3,
        **options,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 4
    return model


def save(model, folder):
    model.save_pretrained(folder)
    return str(folder)


def reward(completions, **_):
    """Spread out, and independent of everything but the text."""
    return [len(text) / 4 + sum(map(text.count, "aeiou")) for text in completions]


def make_trainer(module, kind, folder, tokenizer, config=None, peft=None, **options):
    """A trainer of ``module`` (trl or the drop-in) on the model in ``folder``."""
    arguments = {"max_steps": STEPS, "logging_steps": 1, "learning_rate": 3e-3, "beta": 0.1, **options}
    args = getattr(config or module, f"{kind}Config")(
        output_dir=f"{folder}/out",
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        num_generations=4,
        max_completion_length=LENGTH,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=7,
        **arguments,
    )
    return getattr(module, f"{kind}Trainer")(
        model=LlamaForCausalLM.from_pretrained(folder),
        args=args,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        eval_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS[:2]]),
        reward_funcs=reward,
        peft_config=peft,
    )


def history(trainer):
    """The logged steps and the evaluations, without wall-clock figures; and the completions of the last step."""
    torch.manual_seed(3)
    trainer.train()
    steps = [
        {key: value for key, value in entry.items() if not key.endswith(("time", "runtime", "per_second"))}
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]
    return steps, list(trainer._logs["completion"])


def largest_difference(got, expected):
    """Of all logged figures, each relative to 1 + its size, by name."""
    largest = {}
    for ours_step, trl_step in zip(got, expected, strict=True):
        assert ours_step.keys() == trl_step.keys()
        for name, value in trl_step.items():
            # the median of no ended completion is NaN in TRL's log
            same = value == ours_step[name] or (value != value and ours_step[name] != ours_step[name])
            difference = 0.0 if same else abs(ours_step[name] - value) / (1 + abs(value))
            largest[name] = max(largest.get(name, 0.0), difference)
    return largest


def lora():
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


RUNS = {
    "RLOO": ("RLOO", {}),
    "RLOO, clipped scores, two iterations": ("RLOO", {"reward_clip_range": (0.5, 1.0), "num_iterations": 2}),
    "RLOO, truncated left out": ("RLOO", {"mask_truncated_completions": True, "max_steps": 8}),
    "RLOO, LoRA": ("RLOO", {"peft": lora, "max_steps": 6}),
    "GRPO": ("GRPO", {}),
    "GRPO, TRL's config, evaluation": (
        "GRPO",
        {"config": trl, "eval_strategy": "steps", "eval_steps": 4, "max_steps": 8},
    ),
    "GRPO, no bias correction": ("GRPO", {"use_bias_correction_kl": False, "num_iterations": 2, "max_steps": 8}),
    "GRPO, two iterations": ("GRPO", {"num_iterations": 2, "temperature": 0.7, "loss_type": "grpo", "max_steps": 8}),
    "GRPO, sequence level": ("GRPO", {"num_iterations": 2, "importance_sampling_level": "sequence", "max_steps": 8}),
    "GRPO, entropy": ("GRPO", {"top_entropy_quantile": 0.5, "entropy_coef": 0.05, "max_steps": 8}),
    "GRPO, no KL": ("GRPO", {"beta": 0.0, "cast_lm_head_to_fp32": True, "max_steps": 8}),
    "GRPO, LoRA": ("GRPO", {"peft": lora, "max_steps": 6}),
}


@pytest.mark.parametrize("name", RUNS)
def test_twenty_steps_differ_from_trl(tokenizer, checkpoint, name):
    kind, options = RUNS[name]
    made = {**options, **({"peft": options["peft"]()} if "peft" in options else {})}
    runs = {}
    for module in (trl, ours):
        runs[module] = history(make_trainer(module, kind, checkpoint, tokenizer, **made))
    (theirs, their_texts), (mine, my_texts) = runs[trl], runs[ours]
    steps = [step for step in theirs if "loss" in step]
    assert len(steps) == made.get("max_steps", STEPS)
    assert len({step["grad_norm"] for step in steps}) > 1
    if made.get("beta") != 0:
        assert max(abs(step.get("kl", 0.0)) for step in steps) > 1e-3
    if "num_iterations" in made:
        assert max(step["clip_ratio/region_mean"] for step in steps) > 0
    assert my_texts == their_texts
    assert max(largest_difference(mine, theirs).values()) < TOLERANCE


def labelled(tokenizer, valid=0.7):
    """Token ids [3, 9] and labels, -100 at some."""
    torch.manual_seed(2)
    ids = torch.randint(len(tokenizer), (3, 9))
    return ids, ids.masked_fill(torch.rand(3, 9) > valid, -100)


HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "softcap": {"final_logit_softcapping": 2.0, "temperature": 1.7},
    "scale": {"logit_scale": 0.25},
    "softcap and scale": {"final_logit_softcapping": 1.5, "logits_scaling": 0.4, "temperature": 0.8},
    "bias": {"bias": True, "final_logit_softcapping": 3.0},
    "cast": {"cast_lm_head_to_fp32": True, "dtype": torch.bfloat16},
    "shifted labels": {"shift": True},
    "nothing valid": {"valid": 0.0},
}


@pytest.mark.parametrize("name", HEADS)
def test_head_gives_other_log_probs_entropy_or_gradients(tokenizer, name):
    case = dict(HEADS[name])
    given = {key: case.pop(key) for key in ("temperature", "cast_lm_head_to_fp32") if key in case}
    bias, shift, valid, dtype = (case.pop(key, None) for key in ("bias", "shift", "valid", "dtype"))
    ids, labels = labelled(tokenizer, 0.7 if valid is None else valid)
    results = []
    for add in (add_fused_lm_head, _trl_head.head_adder()):
        model = make_model(tokenizer)
        for option, value in case.items():
            setattr(model.config, option, value)
        if bias:
            model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, len(tokenizer)))
        if dtype is not None:
            model.model.to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            add(model, outputs=("log_probs", "entropy"), **given)
        output = model(ids, fused_lm_head=True, **{"shift_labels" if shift else "labels": labels})
        (output.log_probs.square().sum() + output.entropy.sum() + output.loss).backward()
        results.append((output, [parameter.grad for parameter in model.parameters()]))
    (theirs, their_grads), (mine, my_grads) = results
    assert mine.keys() == theirs.keys()
    assert type(mine) is type(theirs)
    for field in theirs:
        torch.testing.assert_close(mine[field], theirs[field], rtol=1e-5, atol=1e-5, msg=field)
    assert (mine.log_probs.count_nonzero() > 0) == (valid is None)
    tolerance = 1e-4 if dtype is None else 2e-2  # bfloat16 layers below round the head's gradient to 8 bits
    for got, expected in zip(my_grads, their_grads, strict=True):
        assert (got - expected).abs().max() <= tolerance * (1 + expected.abs().max())


def test_generate_or_plain_forward_changes(tokenizer):
    ids, labels = labelled(tokenizer)
    model = make_model(tokenizer)
    before = model(ids, labels=labels), model.generate(ids, max_new_tokens=4, do_sample=False)
    _trl_head.head_adder()(model)
    after = model(ids, labels=labels), model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(before[0].logits, after[0].logits)
    assert before[0].loss == after[0].loss
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize(
    ("change", "outputs", "reason"),
    [
        ({"logit_scale": -1.0}, ("log_probs",), "logit scale: expected positive and finite, got -1.0"),
        ({"final_logit_softcapping": 0.0}, ("log_probs",), "final_logit_softcapping: expected positive"),
        ({}, ("log_probs", "is_top1"), "outputs: expected log_probs and entropy, got is_top1 too"),
    ],
)
def test_what_cannot_be_computed_is_computed_wrong_or_in_silence(tokenizer, change, outputs, reason):
    ids, labels = labelled(tokenizer)
    results = []
    for add in (add_fused_lm_head, _trl_head.head_adder()):
        model = make_model(tokenizer)
        for option, value in change.items():
            setattr(model.config, option, value)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            add(model, outputs=outputs)
            add(copy.deepcopy(model), outputs=outputs)  # the reference: the reason has been told
        results.append(model(ids, labels=labels, fused_lm_head=True))
    assert [reason in str(warning.message) for warning in caught] == [True]
    assert torch.equal(results[0].log_probs, results[1].log_probs)
    if "is_top1" in outputs:
        assert torch.equal(results[0].is_top1, results[1].is_top1)


def test_training_stops_where_the_head_is_not_ours(tokenizer, tmp_path):
    folder = save(make_model(tokenizer, logit_scale=-1.0), tmp_path)
    with pytest.warns(UserWarning, match="TRL's own LM head computes the log-probs of LlamaForCausalLM") as caught:
        trainer = make_trainer(ours, "GRPO", folder, tokenizer, max_steps=3)
    assert sum("LM head" in str(warning.message) for warning in caught) == 1
    mine, _ = history(trainer)
    theirs, _ = history(make_trainer(trl, "GRPO", folder, tokenizer, max_steps=3))
    assert max(largest_difference(mine, theirs).values()) < TOLERANCE


@pytest.mark.parametrize(("kind", "module"), [("RLOO", trl.trainer.rloo_trainer), ("GRPO", trl.trainer.grpo_trainer)])
def test_trl_stays_patched(tokenizer, checkpoint, kind, module):
    trainer = make_trainer(ours, kind, checkpoint, tokenizer)
    assert module.add_fused_lm_head is add_fused_lm_head
    assert trainer.model.forward.__func__.__globals__ is add_fused_lm_head.__globals__
    assert "fused_head" in trainer.model.forward.__func__.__code__.co_freevars
    with pytest.raises(ValueError, match="sync_ref_model"):  # TRL's own, after it has added the head
        make_trainer(ours, kind, checkpoint, tokenizer, sync_ref_model=True, beta=0.0)
    assert module.add_fused_lm_head is add_fused_lm_head


def changed_method(self, model, inputs):
    per_token_kl = inputs["ref_per_token_logps"] - inputs["per_token_logps"]
    return per_token_kl.mean()


@pytest.mark.parametrize("changes", [ours.RLOO_SCORING, ours.RLOO_LOSS, ours.GRPO_LOSS, _trl_head.STATEMENTS])
def test_changed_trl_goes_unnoticed(changes):
    for old, new in changes.items():
        with pytest.raises(HookChangedError, match=r"changed_method has the statement `(.|\n)* 0 times, expected once"):
            with_statements(changed_method, {old: new})


def test_changed_signature_of_the_head_goes_unnoticed(tokenizer, checkpoint, monkeypatch):
    monkeypatch.setattr(trl.trainer.grpo_trainer, "add_fused_lm_head", lambda model, outputs: None)
    with pytest.raises(HookChangedError, match=r"takes \(model, outputs\), expected \(model, temperature"):
        make_trainer(ours, "GRPO", checkpoint, tokenizer)


def loss_inputs(tokenizer, seed=0):
    """What ``_compute_loss`` is given, and the policy's log-probs and entropies, which stand for a model."""
    generator = torch.Generator().manual_seed(seed)

    def logprobs():
        return -4 * torch.rand(VALID.shape, generator=generator)

    policy = logprobs().requires_grad_()
    inputs = {
        "prompt_ids": torch.zeros(4, 2, dtype=torch.long),
        "prompt_mask": torch.ones(4, 2, dtype=torch.long),
        "completion_ids": torch.randint(len(tokenizer), VALID.shape, generator=generator),
        "completion_mask": VALID.clone(),
        "advantages": torch.randn(4, generator=generator),
        "num_items_in_batch": VALID.sum(),
        "old_per_token_logps": policy.detach() + 0.1 * torch.randn(VALID.shape, generator=generator),
        "ref_per_token_logps": logprobs(),
    }
    inputs["old_logps"] = (inputs["old_per_token_logps"] * VALID).sum(1)
    return inputs, policy, logprobs()


def loss_of(base, trainer, inputs, policy, entropies):
    """(loss, its gradient, what is logged as the KL) of a class's ``_compute_loss``."""
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (policy, entropies, None)
    trainer.current_gradient_accumulation_steps = 1
    trainer._metrics["train"].clear()
    trainer.model.train()
    loss = base._compute_loss(trainer, None, inputs)
    [gradient] = torch.autograd.grad(loss, policy)
    return loss.detach(), gradient, trainer._metrics["train"]


POISONED = ["policy", "old_per_token_logps", "ref_per_token_logps", "entropies"]


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_masked_nan_reaches_the_loss_of_grpo(tokenizer, checkpoint, level, bad):
    trainer = make_trainer(ours, "GRPO", checkpoint, tokenizer, importance_sampling_level=level)
    inputs, policy, entropies = loss_inputs(tokenizer)
    clean = loss_of(ours.GRPOTrainer, trainer, inputs, policy, entropies)
    expected = loss_of(trl.GRPOTrainer, trainer, inputs, policy, entropies)
    torch.testing.assert_close(clean[0], expected[0])
    torch.testing.assert_close(clean[1], expected[1], rtol=1e-5, atol=1e-6)
    for name in POISONED:
        given = {"policy": policy.detach(), "entropies": entropies, **inputs}
        given[name] = given[name].masked_fill(VALID == 0, bad)
        policy_given, entropies_given = given.pop("policy").requires_grad_(), given.pop("entropies")
        arguments = trainer, given, policy_given, entropies_given
        mine = loss_of(ours.GRPOTrainer, *arguments)
        assert torch.equal(mine[0], clean[0]), name
        assert torch.equal(mine[1], clean[1]), name
        assert mine[2]["kl"][0] == mine[2]["kl"][0], name
        theirs = loss_of(trl.GRPOTrainer, *arguments)
        spoilt = [theirs[0], theirs[1], torch.tensor([theirs[2]["kl"][0], theirs[2]["entropy"][0]])]
        assert not all(value.isfinite().all() for value in spoilt), name


def test_masked_nan_reaches_the_loss_of_rloo(tokenizer, checkpoint):
    trainer = make_trainer(ours, "RLOO", checkpoint, tokenizer)
    inputs, policy, entropies = loss_inputs(tokenizer)
    clean = loss_of(ours.RLOOTrainer, trainer, inputs, policy, entropies)
    poisoned = policy.detach().masked_fill(VALID == 0, float("nan")).requires_grad_()
    mine = loss_of(ours.RLOOTrainer, trainer, inputs, poisoned, entropies)
    theirs = loss_of(trl.RLOOTrainer, trainer, inputs, poisoned, entropies)
    assert torch.equal(mine[0], clean[0])
    assert torch.equal(mine[1], clean[1])
    assert theirs[0].isnan()


def scored(base, trainer, poison=None):
    """What a class's ``_generate_and_score_completions`` makes of four completions to one prompt."""
    plain = trl.RLOOTrainer._get_per_token_logps_and_entropies

    def poisoned(model, ids, attention_mask, keep, *rest, **options):
        logprobs, *others = plain(trainer, model, ids, attention_mask, keep, *rest, **options)
        return logprobs.masked_fill(attention_mask[:, -keep:] == 0, poison), *others

    if poison is not None:
        trainer._get_per_token_logps_and_entropies = poisoned
    else:
        vars(trainer).pop("_get_per_token_logps_and_entropies", None)
    trainer.model.train()
    trainer._metrics["train"].clear()
    torch.manual_seed(5)
    return base._generate_and_score_completions(trainer, [{"prompt": "say: "}] * 4)


def drift(trainer):
    """Away from the reference, so that the KL is not 0."""
    with torch.no_grad():
        trainer.model.model.norm.weight.mul_(1.5)


def test_masked_nan_reaches_the_reward_of_rloo(tokenizer, checkpoint):
    trainer = make_trainer(ours, "RLOO", checkpoint, tokenizer, beta=0.5)
    drift(trainer)
    clean, trls = scored(ours.RLOOTrainer, trainer), scored(trl.RLOOTrainer, trainer)
    assert not clean["completion_mask"].all()
    assert clean["advantages"].abs().max() > 0.1
    torch.testing.assert_close(clean["advantages"], trls["advantages"])
    mine = scored(ours.RLOOTrainer, trainer, float("nan"))
    kl = trainer._metrics["train"]["kl"][0]
    theirs = scored(trl.RLOOTrainer, trainer, float("nan"))
    assert torch.equal(mine["advantages"], clean["advantages"])
    assert torch.equal(mine["old_logps"], clean["old_logps"])
    assert kl == kl
    assert theirs["old_logps"].isnan().any()
    assert not torch.allclose(theirs["advantages"], clean["advantages"])
