"""What the trainer does otherwise under FSDP2, which ``accelerate`` starts."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import save_fsdp_optimizer
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from rewardfuse import _processes
from rewardfuse.train_options import TrainOptions

if TYPE_CHECKING:
    import transformers

    from rewardfuse.reward_model import RewardModel


def prepare_fsdp(model: "RewardModel", plugin: Any, options: TrainOptions) -> None:
    """Shard the head by itself and keep rewards as they are: accelerate's 16-bit policy would cast both.

    Raises:
        ValueError: FSDP of version 1, or a run whose parameters it cannot shard.
    """
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version must be 2 (FSDP_VERSION, or in accelerate's config), got {plugin.fsdp_version}")
    if options.use_peft:
        raise ValueError("use_peft does not run under FSDP: adapters are small, run it with DDP")
    if model.log_tie is not None:
        raise ValueError("the loss bradley_terry_tie does not run under FSDP, which shards no single number: use DDP")
    if options.group_by_length and _processes.count() > 1:
        raise ValueError(
            "group_by_length does not run under FSDP: processes with another number of groups would wait for each other"
        )
    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(policy.param_dtype, policy.reduce_dtype, None)
        for module in model.children():
            if module is not model.backbone:
                fully_shard(module)


def save_fsdp_state(trainer: "transformers.Trainer", folder: str) -> None:
    """Write optimizer and schedule of a checkpoint; the weights are there as safetensors already."""
    accelerator = trainer.accelerator
    save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, trainer.optimizer, trainer.model, folder)
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), Path(folder, "scheduler.pt"))
