"""From our options to the arguments of the ``transformers`` Trainer."""

import torch
import transformers

from rewardfuse import _processes
from rewardfuse._objective_base import LOWER_IS_BETTER
from rewardfuse.train_options import TrainOptions


def training_arguments(options: TrainOptions, *, evaluates: bool) -> transformers.TrainingArguments:
    """The arguments of a run; ``evaluates``: whether there are records to evaluate on.

    Raises:
        ValueError: checkpoints that would not meet the evaluations which say what is best.
    """
    names = "output_dir learning_rate weight_decay num_train_epochs max_steps per_device_train_batch_size seed bf16 "
    names += "per_device_eval_batch_size gradient_accumulation_steps max_grad_norm lr_scheduler_type logging_steps "
    names += "metric_for_best_model disable_tqdm"
    save_steps = options.save_steps or options.eval_steps
    if options.keeps_best and bool(save_steps) != bool(options.eval_steps):
        raise ValueError("save_steps without eval_steps cannot keep the best model: checkpoints must meet evaluations")
    if options.keeps_best and save_steps and save_steps % options.eval_steps:
        raise ValueError(f"save_steps must be a multiple of eval_steps to keep the best model, got {save_steps}")
    return transformers.TrainingArguments(
        **{name: getattr(options, name) for name in names.split()},
        warmup_steps=options.warmup_ratio or options.warmup_steps,  # transformers reads a value below 1 as a ratio
        eval_strategy=("steps" if options.eval_steps else "epoch") if evaluates else "no",
        eval_steps=options.eval_steps,
        save_strategy="steps" if save_steps else "epoch",
        save_steps=save_steps or 500,
        load_best_model_at_end=options.keeps_best,
        greater_is_better=options.metric_for_best_model not in LOWER_IS_BETTER,
        restore_callback_states_from_checkpoint=True,
        use_cpu=_processes.on_cpu(options.use_cpu),
        logging_nan_inf_filter=False,  # it would synchronize in every step, and hide what must stop the run
        remove_unused_columns=False,
        label_names=[],
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available() and not options.use_cpu,
    )
