"""The files of the trainer: whole checkpoints, weights as safetensors, no pickled arguments."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rewardfuse._files import STAGING, atomic_file, publish_files, publish_folder, remove_folder, staging_folder
from rewardfuse._fsdp import save_fsdp_state
from rewardfuse._train_folder import METRICS_FILE, OPTIONS_FILE, damage_named, disk_named, list_checkpoints


class TrainerFiles:
    """Mixin for ``transformers.Trainer``: a checkpoint is written beside its place and moved there when it is complete.

    Attributes that it needs: ``options``, ``record`` (of :data:`OPTIONS_FILE`), ``adapters`` and ``_stage``, None.
    """

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._stage or self.args.output_dir)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Let the Trainer write its checkpoint in a staging folder, and move it to its name when it is complete."""
        self._check_finite(weights=True)
        folder = Path(self.args.output_dir)
        target = folder / f"checkpoint-{self.state.global_step}"
        with self._staging(folder) as stage, disk_named(folder):
            self._stage = stage
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._stage = None
            self.accelerator.wait_for_everyone()
            best = self._best_checkpoint(arriving=target)
            self.state.best_model_checkpoint = str(best) if best else None
            if self.is_world_process_zero():
                staged = stage / target.name
                self.state.save_to_json(str(staged / "trainer_state.json"))  # now with the final path of the best one
                publish_folder(staged, target)
                self._remove_old_checkpoints(best)

    def write_outputs(self, metrics: dict[str, Any]) -> None:
        """Write the final model, tokenizer and options, then metrics.json, whose presence means that all is there."""
        folder = Path(self.args.output_dir)
        with self._staging(folder) as stage, disk_named(folder):
            self.save_model(str(stage), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                (folder / METRICS_FILE).unlink(missing_ok=True)  # that of a run which is now extended
                publish_files(stage, folder)
                with atomic_file(folder / METRICS_FILE) as stream:
                    stream.write(json.dumps(metrics, indent=2) + "\n")

    @contextlib.contextmanager
    def _staging(self, folder: Path) -> Iterator[Path]:
        """A staging folder that all processes share; the first one makes and removes it."""
        first = self.is_world_process_zero()
        with staging_folder(folder) if first else contextlib.nullcontext(folder / STAGING) as stage:
            self.accelerator.wait_for_everyone()
            yield stage
            self.accelerator.wait_for_everyone()

    def _best_checkpoint(self, arriving: Path | None = None) -> Path | None:
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        return best if best == arriving or best.is_dir() else None

    def _remove_old_checkpoints(self, best: Path | None) -> None:
        for path in list_checkpoints(Path(self.args.output_dir))[: -self.options.save_total_limit]:
            if path != best:
                remove_folder(path)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's, but whole weights also where FSDP keeps its own checkpoints in shards."""
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        state = self.accelerator.get_state_dict(self.model)  # gathers: on every process
        return self._save(output_dir, state)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Model, tokenizer and options; the Trainer's own would add its arguments as a pickle."""
        folder = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if self.adapters and self._stage:  # of a checkpoint; the final model is merged by now
            state_dict = self.adapters.merged_state()
            self.adapters.save(folder)
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=state_dict)
        self.processing_class.save_pretrained(folder)
        (folder / OPTIONS_FILE).write_text(json.dumps(self.record, indent=2) + "\n", encoding="utf-8")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As the Trainer's, but under FSDP without the weights once more, as a pickle."""
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        return save_fsdp_state(self, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Strictly: a weight under another name must not be passed over in silence, as the Trainer's own does."""
        if self.adapters:
            self.adapters.load(resume_from_checkpoint)
        else:
            (self.model if model is None else model).load_weights(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        plain = bool(checkpoint) and Path(checkpoint, "optimizer.pt").is_file()
        if checkpoint and not self.is_deepspeed_enabled and self.is_fsdp_enabled == plain:
            kinds = ("without FSDP", "with FSDP")
            made, runs = kinds[not self.is_fsdp_enabled], kinds[self.is_fsdp_enabled]
            raise ValueError(f"resume_from_checkpoint: {checkpoint} was made {made}, this run is {runs}")
        with damage_named(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with damage_named(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
