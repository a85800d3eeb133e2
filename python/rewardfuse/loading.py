"""Loading a :class:`rewardfuse.reward_model.RewardModel` from the checkpoints that exist."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from rewardfuse.checkpoints import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BACKBONE_RENAMINGS,
    LOADING,
    HeadWeights,
    WeightFiles,
    check_complete,
    check_folder,
    is_adapter,
    one_line_errors,
    output_width,
    quiet_transformers,
    take_weights,
    without_pooler,
)
from rewardfuse.encoder_classifier import EncoderRewardModel, has_own_classifier
from rewardfuse.reward_head import HeadConfig
from rewardfuse.reward_model import RewardModel

ADVICE = "new_head=True (--new_head) starts a fresh one"


def load_reward_model(
    name_or_path: str | Path,
    *,
    new_head: bool = False,
    head: HeadConfig | None = None,
    seed: int | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> RewardModel:
    """Load a reward model from a folder or from the Hugging Face hub.

    It reads what :meth:`RewardModel.save_pretrained` wrote; a decoder with a linear head, as
    ``AutoModelForSequenceClassification`` (TRL, NeMo-RL; ``score``), OpenRLHF (``value_head_prefix``, ``mean`` and
    ``std``), DeepSpeed-Chat (``v_head``) and others (``reward_head``, ``value_head``, ``regression_head``) save it; an
    encoder with the classifier of its family (BERT, RoBERTa, DeBERTa, …), see :class:`EncoderRewardModel`; and a PEFT
    adapter of a reward model, merged into the base model that it names. Only safetensors are read.

    Args:
        name_or_path: a folder, or a name on the hub.
        new_head: start with a fresh head (drawn with ``seed``), whatever the checkpoint has.
        head: what the outputs are, where the checkpoint does not say it itself.
        trust_remote_code: run Python code that comes with the checkpoint.
        kwargs: handed to ``AutoModel.from_pretrained`` (``dtype``, ``revision``, ``attn_implementation``, …).

    Raises:
        ValueError: no model there, weights cut short or missing, no head (says what was found), several heads, or a
            number of outputs that is not the one expected.
    """
    source = {"trust_remote_code": trust_remote_code}
    source |= {"revision": kwargs["revision"]} if "revision" in kwargs else {}
    wishes = {"new_head": new_head, "head": head, "seed": seed, **source, **kwargs}
    load = _load_adapter if is_adapter(name_or_path) else _load_whole
    with one_line_errors(name_or_path):
        model = load(name_or_path, **wishes)
    model.name_or_path, model.tokenizer_options = str(name_or_path), source
    return model


def _load_whole(
    name: str | Path,
    *,
    new_head: bool,
    head: HeadConfig | None,
    seed: int | None,
    trust_remote_code: bool,
    **kwargs: Any,
) -> RewardModel:
    from transformers import AutoConfig, AutoModel

    revision = {"revision": kwargs["revision"]} if "revision" in kwargs else {}
    options = {"trust_remote_code": trust_remote_code, **kwargs}
    check_folder(name)
    with quiet_transformers():
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **revision)
        files = WeightFiles(name, **revision)
        found = None if new_head else files.head(config)
        if not new_head and found is None and has_own_classifier(config, files.files):
            if head not in (None, HeadConfig()):
                raise ValueError(f"{name}: head cannot be chosen, the classifier of its family is the head; {ADVICE}")
            return EncoderRewardModel.load(name, **options)
        if files.wrapped():
            options["key_mapping"] = BACKBONE_RENAMINGS
        backbone, info = AutoModel.from_pretrained(name, **LOADING, **options)
    check_complete(info, name)
    if new_head:
        return RewardModel(backbone, head=head, seed=seed)
    if found is None:
        others = ", ".join(sorted(info["unexpected_keys"])[:5]) or "nothing beside the backbone"
        raise ValueError(f"{name}: no reward head (score.weight or the like; found: {others}); {ADVICE}")
    head = head or HeadConfig.read(config)
    _check_head(found, [head.outputs, output_width(backbone.config.get_text_config())], name)
    model = RewardModel(backbone, head=head, seed=seed, bias=found.bias is not None)
    model.head.load_state_dict(_head_state(found))
    if getattr(config, "log_tie", None) is not None:
        model.read_log_tie(config, name)
    return model


def load_weights(model: RewardModel, folder: str | Path) -> None:
    """See :meth:`RewardModel.load_weights`."""
    with one_line_errors(folder), quiet_transformers():
        check_folder(folder)
        saved, info = type(model.backbone).from_pretrained(folder, dtype=model.backbone.dtype, **LOADING)
        found = WeightFiles(folder).head(saved.config)
        check_complete(info, folder)
        if found is None:
            raise ValueError(f"{folder}: no reward head")
        take_weights(model.head, _head_state(found))
        take_weights(model.backbone, without_pooler(saved).state_dict())
        if model.log_tie is not None:
            model.read_log_tie(saved.config, folder)


def _head_state(found: HeadWeights) -> dict[str, torch.Tensor]:
    state = {"weight": found.weight, "bias": found.bias}
    return {name: value for name, value in state.items() if value is not None}


def _check_head(found: HeadWeights, expected: list[int], name: str | Path) -> None:
    if list(found.weight.shape) != expected:
        outputs = "one output" if expected[0] == 1 else f"{expected[0]} outputs"
        got = list(found.weight.shape)
        raise ValueError(f"{name}: {found.name}.weight must have {outputs}, shape {expected}, got {got}; {ADVICE}")


def _load_adapter(name: str | Path, *, new_head: bool, **options: Any) -> RewardModel:
    """The base model that the adapter names, with the adapter merged into it.

    TRL's adapters call the head ``score``, adapters made of a :class:`RewardModel` call it ``head``.
    """
    import peft
    from safetensors.torch import load_file

    folder = Path(name)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"{folder}: no {ADAPTER_WEIGHTS} beside {ADAPTER_CONFIG} (pickles are not read)")
    state = load_file(folder / ADAPTER_WEIGHTS)
    config = peft.PeftConfig.from_pretrained(folder)
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(f"{folder}: {ADAPTER_CONFIG} names no base model (base_model_name_or_path)")
    state = {name.replace("base_model.model.score.", "base_model.model.head."): state[name] for name in state}
    if new_head:
        state = {name: state[name] for name in state if not name.startswith("base_model.model.head.")}
    brings_head = any(name.startswith("base_model.model.head.") for name in state)
    model = load_reward_model(base, new_head=new_head or brings_head, **options)
    if type(model) is not RewardModel:
        raise ValueError(f"{folder}: an adapter of {type(model.backbone).__name__}; merge it into its base model first")
    saved = sorted({*(config.modules_to_save or ())} - {"score", "head"}) + ["head"] * brings_head
    return _merged(model, state, dataclasses.replace(config, modules_to_save=saved or None), folder)


def _merged(model: RewardModel, state: dict[str, torch.Tensor], config: Any, folder: Path) -> RewardModel:
    import peft

    # The task would have peft call the model with arguments of its own; the base's name it would warn of.
    config.task_type = config.base_model_name_or_path = None
    with quiet_transformers():
        adapted = peft.get_peft_model(model, config)
        result = peft.set_peft_model_state_dict(adapted, state)
    absent = [name for name in result.missing_keys if "lora_" in name or ".modules_to_save." in name]
    if absent or result.unexpected_keys:
        first = [*result.unexpected_keys, *absent][0]
        raise ValueError(f"{folder}: the adapter does not fit its base model, first {first}")
    return adapted.merge_and_unload()
