"""The output folder of a training run: what an earlier run left there, and the checkpoint to go on from."""

import contextlib
import errno
import json
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rewardfuse import _processes
from rewardfuse._files import remove_folder, remove_leftovers
from rewardfuse.train_options import TrainOptions

OPTIONS_FILE, JOURNAL_FILE, METRICS_FILE = "train_options.json", "metrics.jsonl", "metrics.json"
CHECKPOINT_FILES = ("trainer_state.json", "optimizer*", "scheduler.pt", "rng_state*.pth")  # beside the model

# What may differ when a run is resumed: these change no weight ...
_FREE_ON_RESUME = {"output_dir", "logging_steps", "save_total_limit", "resume_from_checkpoint", "overwrite_output_dir"}
_FREE_ON_RESUME |= {"disable_tqdm", "save_steps", "eval_steps", "gradient_checkpointing", "per_device_eval_batch_size"}
_FREE_ON_RESUME |= {"eval_dataset_name", "use_cpu", "normalize_reward"}
# ... nor do these, as long as their product with the number of processes, records_a_step, stays ...
_FREE_ON_RESUME |= {"per_device_train_batch_size", "gradient_accumulation_steps"}
# ... and these do, but people extend a run or end it otherwise on purpose.
_WARN_ON_RESUME = {"num_train_epochs", "max_steps", "early_stopping_patience", "load_best_model_at_end"}
_WARN_ON_RESUME |= {"metric_for_best_model"}


def shared_checkpoint(mine: Path | None) -> Path | None:
    """The checkpoint that the first process has chosen, in every process."""
    checkpoint = _processes.gather(mine)[0]
    with _processes.together():
        if checkpoint is not None and not checkpoint.is_dir():
            raise ValueError(
                f"resume_from_checkpoint: this process does not see {checkpoint}: all need one file system"
            )
    return checkpoint


def prepare_output(options: TrainOptions, record: dict[str, Any]) -> Path | None:
    """Make the output folder usable and return the checkpoint to resume from, if any."""
    folder = Path(options.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} must be a folder, got a file")
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = None
    if options.resume_from_checkpoint:
        checkpoint = _checkpoint_to_resume(options.resume_from_checkpoint, folder)
    if checkpoint is not None:
        _compare_records(checkpoint, record)
    remove_leftovers(folder, files=(METRICS_FILE, JOURNAL_FILE), folders="checkpoint-*")
    if checkpoint is None or checkpoint.resolve().parent != folder.resolve():
        _clear_output(folder, options.overwrite_output_dir)
    return checkpoint


def _clear_output(folder: Path, overwrite: bool) -> None:
    """Remove another run's outputs, or refuse to write into them."""
    checkpoints = list_checkpoints(folder)
    found = [*checkpoints, *(path for path in (folder / METRICS_FILE, folder / "config.json") if path.exists())]
    if found and not overwrite:
        raise ValueError(
            f"output_dir {folder} already holds {found[-1].name}: pass --resume_from_checkpoint without a value, "
            "--overwrite_output_dir or another folder"
        )
    for path in checkpoints:
        remove_folder(path)
    for name in (METRICS_FILE, JOURNAL_FILE, OPTIONS_FILE, "config.json"):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()


def list_checkpoints(folder: Path) -> list[Path]:
    """The folder's checkpoints, by step."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def _checkpoint_to_resume(wish: str | bool, folder: Path) -> Path | None:
    """The one that is named, or the newest one; None where a run was killed before its first one."""
    checkpoints = list_checkpoints(folder)
    if wish is True and not checkpoints:
        warnings.warn(f"resume_from_checkpoint: {folder} holds no checkpoint, the run starts anew", stacklevel=4)
        return None
    checkpoint = checkpoints[-1] if wish is True else Path(wish)
    for pattern in CHECKPOINT_FILES:  # the Trainer would go on without one of them, and say nothing
        if not any(checkpoint.glob(pattern)):
            raise ValueError(f"resume_from_checkpoint: {checkpoint} is no checkpoint (no {pattern})")
    return checkpoint


@contextlib.contextmanager
def damage_named(checkpoint: str | Path) -> Iterator[None]:
    """A file that is cut short fails to load in many types: make it one ``ValueError`` that names the checkpoint."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"resume_from_checkpoint: {checkpoint} is damaged ({reason})") from error


@contextlib.contextmanager
def disk_named(folder: Path) -> Iterator[None]:
    """torch and safetensors say in types of their own that a file could not be written: make it one ``OSError``."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        if isinstance(error, OSError) or not ("SafetensorError" in type(error).__name__ or "inline_container" in text):
            raise
        full = "No space left" in text or "unexpected pos" in text  # how torch finds that less was written than given
        reason = "no space left" if full else text
        raise OSError(errno.ENOSPC if full else errno.EIO, reason, str(folder)) from error


def _compare_records(checkpoint: Path, record: dict[str, Any]) -> None:
    path = checkpoint / OPTIONS_FILE
    if not path.is_file():
        raise ValueError(f"resume_from_checkpoint: {checkpoint} was not written by rewardfuse (no {OPTIONS_FILE})")
    with damage_named(checkpoint):
        saved = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name in record if name not in _FREE_ON_RESUME and saved.get(name) != record[name]]
    shown = {"records_a_step": "per_device_train_batch_size · gradient_accumulation_steps · processes"}
    texts = {name: f"{shown.get(name, name)} (was {saved.get(name)}, is {record[name]})" for name in changed}
    fatal = [texts[name] for name in changed if name not in _WARN_ON_RESUME]
    if fatal:
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} was made with other options or data: {', '.join(fatal)}"
        )
    if changed:
        warnings.warn(f"resuming {checkpoint} with another {', '.join(texts.values())}", stacklevel=4)
