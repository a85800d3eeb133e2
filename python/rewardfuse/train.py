"""Train a reward model on pairs, lists, ratings or steps: checks and outputs around the ``transformers`` Trainer.

The output folder ends with model and tokenizer, ``train_options.json``, ``metrics.jsonl`` (one line for every log and
evaluation) and ``metrics.json`` (the final figures, written last). Checkpoints are ``checkpoint-<step>`` folders. All
of them are written beside and moved into place, so a kill or a full disk leaves no half-written one.
"""

import dataclasses
import json
import time
import warnings
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from rewardfuse import _processes, lora
from rewardfuse._train_folder import prepare_output, shared_checkpoint
from rewardfuse.train_options import TrainOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from rewardfuse._objective_base import Objective
    from rewardfuse.batching import TokenizedDataset
    from rewardfuse.data import PreferencePair, RankedList, RatedResponse, SteppedSolution
    from rewardfuse.reward_head import HeadConfig
    from rewardfuse.reward_model import RewardModel

    Records = Sequence[PreferencePair] | Sequence[RankedList] | Sequence[RatedResponse] | Sequence[SteppedSolution]


@dataclass(frozen=True)
class TrainResult:
    """What a run gave: ``metrics`` is the content of metrics.json, ``history`` the lines of metrics.jsonl."""

    output_dir: str
    global_step: int
    metrics: dict[str, Any]
    history: list[dict[str, Any]]


def train_reward_model(
    model: "RewardModel",
    tokenizer: "PreTrainedTokenizerBase",
    train_records: "Records",
    eval_records: "Records | None",
    options: TrainOptions,
    callbacks: "Sequence[TrainerCallback]" = (),
    *,
    data_report: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train ``model`` in place and write everything to ``options.output_dir`` (layout: see the module).

    The records and ``options.loss`` decide the objective: Bradley–Terry, with ties or not, or classification for pairs;
    Plackett–Luce or all ordered pairs for ranked lists, of which each response is encoded once; regression or
    classification for rated responses; cross-entropy at the ends of steps for step-labelled solutions. The model's head
    must fit it: :func:`head_for` says which one a new model needs.

    ``eval_records`` are evaluated as often as ``options`` say and once at the end, with the metrics that ``summarize``
    of the objective describes; ``None`` or an empty list means no evaluation. Splitting off or reading them is the
    caller's job (``split_held_out``, ``load_records``). ``data_report`` is added to the final metrics. The same seed on
    the same machine gives the same numbers, and a resumed run the same weights, bit for bit, as one that was never
    interrupted.

    Raises:
        DataError: a response gives no token, or a prompt does not fit.
        ValueError: an option out of range or not one for these records, records of several kinds, a head that does not
            fit, labels out of range, an output folder that holds another run, or a checkpoint made with other options
            or data.
        NonFiniteLossError: the loss or the weights became NaN or infinite; names the step. No checkpoint holds such
            weights.
        OSError: an output cannot be written; no half-written file is left.
    """
    from rewardfuse._trainer import build_trainer

    _processes.connect(options.use_cpu)
    data = _tokenized(model, tokenizer, train_records, eval_records, options)
    record = _record(options, data)
    if options.use_peft:
        record["base_sha256"] = lora.digest(model)
    head = [parameter.detach().cpu().numpy().tobytes() for parameter in model.head_parameters()]
    shown = {name: value for name, value in record.items() if name != "disable_tqdm"}
    _processes.check_same({**shown, "model": [model.name_or_path, _digest(head)]})
    objective, train_set, eval_set = data.objective, data.train_set, data.eval_set
    with _processes.together():
        objective.prepare(model, train_records)
        if model.head_config.std is not None:  # of the rewards that it gave before
            model.head_config = dataclasses.replace(model.head_config, mean=None, std=None)
        adapters = lora.Lora(model, options) if options.use_peft else None
        checkpoint = prepare_output(options, record) if _processes.rank() == 0 else None
    checkpoint = shared_checkpoint(checkpoint)
    trainer = build_trainer(model, tokenizer, objective, train_set, eval_set, options, record, callbacks, adapters)
    started = time.monotonic()
    metrics = {**trainer.run(checkpoint), **(data_report or {})}
    if adapters:
        adapters.merge()
    if data.calibration:
        batch_size = options.per_device_eval_batch_size
        metrics |= _calibrate(model, data.calibration, tokenizer, max_length=data.max_length, batch_size=batch_size)
    metrics |= {f"train_{objective.unit}": len(train_set), f"eval_{objective.unit}": len(eval_set or ())}
    metrics["truncated_responses"] = train_set.truncated + (eval_set.truncated if eval_set else 0)
    metrics |= {"max_length": data.max_length, "seconds": round(time.monotonic() - started, 3)}
    trainer.write_outputs(metrics)
    return TrainResult(options.output_dir, trainer.state.global_step, metrics, trainer.history())


class _Data(NamedTuple):
    """What a run trains on, checked and tokenized."""

    objective: "Objective"
    train_set: "TokenizedDataset"
    eval_set: "TokenizedDataset | None"
    calibration: list[Any]  # texts whose rewards normalize_reward measures
    max_length: int


def _tokenized(
    model: "RewardModel",
    tokenizer: "PreTrainedTokenizerBase",
    train_records: "Records",
    eval_records: "Records | None",
    options: TrainOptions,
) -> _Data:
    from rewardfuse._objectives import objective_of
    from rewardfuse.tokenizing import longest_input

    with _processes.together():
        if options.keeps_best and not eval_records:
            raise ValueError("load_best_model_at_end and early_stopping_patience need evaluation records, got none")
        objective = objective_of(train_records, eval_records or (), options)
        objective.fit_head(model.head_config)
        calibration = _calibration_texts(objective, eval_records or train_records) if options.normalize_reward else []
        max_length = longest_input(tokenizer, model.config, options.max_length)
    named = {"training": train_records, "evaluation": eval_records or ()}
    if _processes.count() > 1:  # before each takes its share of them
        _processes.check_same({f"{where} records": _digest_records(records) for where, records in named.items()})
    shared = (objective, tokenizer, model, max_length, options)
    sets = [_tokenized_set(where, records, *shared) if records else None for where, records in named.items()]
    return _Data(objective, *sets, calibration, max_length)


def _tokenized_set(
    where: str,
    records: "Records",
    objective: "Objective",
    tokenizer: "PreTrainedTokenizerBase",
    model: "RewardModel",
    max_length: int,
    options: TrainOptions,
) -> "TokenizedDataset":
    """Each process tokenizes and checks its share of the records; then all have all of them, as token ids."""
    own = _processes.share(records)
    with _processes.together():
        progress = not options.disable_tqdm and _processes.rank() == 0
        data = objective.dataset(own, tokenizer, max_length, progress=progress)
        _check_tokens(own, data, objective, tokenizer, model)
    data.items, data.truncated = _processes.join(data.items), sum(_processes.gather(data.truncated))
    with _processes.together():
        objective.check_truth(data.items, where)
    return data


def head_for(train_records: "Records", eval_records: "Records | None", options: TrainOptions) -> "HeadConfig":
    """The head that a new model needs to be trained on these records.

    Raises:
        ValueError: an option out of range or not one for these records, or records of several kinds.
    """
    from rewardfuse._objectives import objective_of

    return objective_of(train_records, eval_records or (), options).head()


def _check_tokens(
    records: "Records",
    data: "TokenizedDataset",
    objective: "Objective",
    tokenizer: "PreTrainedTokenizerBase",
    model: "RewardModel",
) -> None:
    """Refuse tokens that the model has no embedding for, by the place of their record."""
    from rewardfuse.tokenizing import check_token_ids

    collator = objective.collator(tokenizer)
    rows = [collator.rows([item])[0] for item in data.items]
    sources = [record.source for record, own in zip(records, rows, strict=True) for _ in own]
    check_token_ids([ids for own in rows for ids in own], tokenizer, model, sources=sources)


def _calibration_texts(objective: "Objective", records: "Records") -> list[Any]:
    texts = [text for record in records for text in objective.responses(record)]
    if len(texts) < 2:
        raise ValueError(f"normalize_reward needs at least two held-out (or training) responses, got {len(texts)}")
    return texts


def _calibrate(model: "RewardModel", texts: list[Any], *arguments: Any, **options: Any) -> dict[str, float]:
    """Mean and std for the metrics. A trained model is not lost because it gives all responses one reward."""
    try:
        mean, std = model.calibrate(texts, *arguments, **options)
    except ValueError as error:
        warnings.warn(f"normalize_reward: the model is saved without mean and std ({error})", stacklevel=3)
        return {}
    return {"reward_mean": mean, "reward_std": std}


def _record(options: TrainOptions, data: _Data) -> dict[str, Any]:
    """What every checkpoint keeps, to be compared when it is resumed; as JSON reads it back."""
    record = {**dataclasses.asdict(options), "loss": data.objective.loss_name, "max_length": data.max_length}
    record["records_a_step"] = (
        options.per_device_train_batch_size * options.gradient_accumulation_steps * _processes.count()
    )
    name = f"train_{data.objective.unit}"
    record[name] = len(data.train_set)
    record[f"{name}_sha256"] = _digest(map(_item_bytes, data.train_set.items))
    return json.loads(json.dumps(record))


def _item_bytes(item: dict[str, Any]) -> bytes:
    """All that an item holds; token ids as they lie in memory, since spelling them out would take minutes."""
    parts = []
    for name, value in sorted(item.items()):
        rows = value if isinstance(value, list) and value and isinstance(value[0], array) else [value]
        for row in rows:
            own = row.tobytes() if isinstance(row, array) else repr(row).encode()
            parts.append(f"{name} {len(own)} ".encode() + own)
    return b"".join(parts)


def _digest_records(records: "Records") -> str:
    return _digest(repr(record).encode() for record in records)


def _digest(parts: Iterable[bytes]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
