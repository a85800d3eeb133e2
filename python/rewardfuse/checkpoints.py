"""Checkpoints of reward models as they are found: safetensors files, their heads, and errors of one line."""

import contextlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HEAD = "score"
# HF, TRL and NeMo-RL call the head score; then DeepSpeed-Chat and older reward models. OpenRLHF's config names it.
HEAD_NAMES = (HEAD, "v_head", "reward_head", "value_head", "regression_head", "v_head.summary")
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Sizes that do not match come back in the loading info, by name, in place of an error that names nothing.
LOADING = {"output_loading_info": True, "use_safetensors": True, "ignore_mismatched_sizes": True}
# DeepSpeed-Chat wraps the backbone once more.
BACKBONE_RENAMINGS = {r"^rwtransformer\.": ""}


class HeadWeights(NamedTuple):
    """A head found in a checkpoint: its name there, ``weight`` ``[K, hidden]`` and ``bias`` ``[K]`` or None."""

    name: str
    weight: torch.Tensor
    bias: torch.Tensor | None


class WeightFiles:
    """The safetensors files of a checkpoint, in a folder or on the Hugging Face hub.

    Raises:
        ValueError: there are none; pickled weights (``.bin``) are not read, since loading one may run code.
    """

    def __init__(self, name_or_path: str | Path, revision: str | None = None):
        from transformers.utils import cached_file

        self._source = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
        self._name = name_or_path
        single = cached_file(name_or_path, WEIGHTS, **self._source)
        index = None if single else cached_file(name_or_path, WEIGHTS_INDEX, **self._source)
        if single:
            self.files = dict.fromkeys(_tensor_names(single), single)
        elif index:
            files = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            paths = {file: cached_file(name_or_path, file, **self._source) for file in sorted(set(files.values()))}
            absent = [file for file, path in paths.items() if path is None]
            if absent:
                raise ValueError(f"{name_or_path}: {absent[0]} is missing, {WEIGHTS_INDEX} names it")
            self.files = {name: paths[file] for name, file in files.items()}
        else:
            raise ValueError(
                f"{name_or_path}: no weights (neither {WEIGHTS} nor {WEIGHTS_INDEX}; pickles are not read)"
            )

    def read(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    def head(self, config: Any) -> HeadWeights | None:
        """The head: the one that OpenRLHF's ``value_head_prefix`` in the configuration names, or the only one of
        :data:`HEAD_NAMES`; None where there is none.

        Raises:
            ValueError: several of these heads, or one that is no matrix.
        """
        prefix = getattr(config, "value_head_prefix", None)
        candidates = [prefix] if prefix and f"{prefix}.weight" in self.files else HEAD_NAMES
        present = [name for name in candidates if f"{name}.weight" in self.files]
        if len(present) > 1:
            raise ValueError(f"{self._name}: several heads ({', '.join(present)}), expected one")
        if not present:
            return None
        weight, bias = self.read(f"{present[0]}.weight"), f"{present[0]}.bias"
        if weight.dim() != 2 or not weight.is_floating_point() or weight.dtype.itemsize < 2:
            got = f"{list(weight.shape)} of {str(weight.dtype).removeprefix('torch.')}"
            raise ValueError(f"{self._name}: {present[0]}.weight must be floats [1, hidden], got {got}")
        return HeadWeights(present[0], weight, self.read(bias) if bias in self.files else None)

    def wrapped(self) -> bool:
        """Whether the backbone is wrapped as DeepSpeed-Chat does."""
        return any(name.startswith("rwtransformer.") for name in self.files)


def _tensor_names(path: str) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as tensors:
        return list(tensors.keys())


def check_folder(name: str | Path) -> None:
    """What can be said without loading anything; a name that is no path may be one on the hub.

    Raises:
        ValueError: a folder without a model, or none where the name can only be a folder.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{name}: the folder holds no model (no config.json)")
        if not (path / WEIGHTS).is_file() and not (path / WEIGHTS_INDEX).is_file():
            raise ValueError(f"{name}: the folder holds no weights (neither {WEIGHTS} nor {WEIGHTS_INDEX})")
    elif path.exists() or path.is_absolute() or str(name).startswith("."):
        raise ValueError(f"{name}: no such model folder")


def check_complete(found: dict[str, Any], name: str | Path) -> None:
    """Refuse what ``transformers`` would draw at random or leave out: weights missing from the checkpoint (``found`` is
    its loading info; a pooler may be missing, it is not used), and layers that the configuration knows nothing of."""
    missing = sorted(key for key in found["missing_keys"] if "pooler." not in key)
    if missing:
        raise ValueError(f"{name}: {len(missing)} weights of the backbone are missing, first {missing[0]}")
    mismatched = sorted(str(key) for key in found.get("mismatched_keys", ()))
    if mismatched:
        raise ValueError(f"{name}: {len(mismatched)} weights have another shape than config.json says: {mismatched[0]}")
    layers = sorted(key for key in found["unexpected_keys"] if re.search(r"(^|\.)(layers?|h|blocks?)\.\d+\.", key))
    if layers:
        raise ValueError(f"{name}: {len(layers)} weights of layers that config.json does not have, first {layers[0]}")


def is_adapter(name_or_path: str | Path) -> bool:
    """Whether this folder holds a PEFT adapter in place of a whole model."""
    return (Path(name_or_path) / ADAPTER_CONFIG).is_file() and not (Path(name_or_path) / "config.json").is_file()


def output_width(config: "PreTrainedConfig") -> int:
    """Width of the hidden states that a backbone gives; some OPT models project them."""
    return getattr(config, "word_embed_proj_dim", None) or config.hidden_size


def without_pooler(backbone: "PreTrainedModel") -> "PreTrainedModel":
    """Drop the pooler of BERT's kin: unused here, it would be trained on nothing and stall distributed gradients."""
    if "add_pooling_layer" in inspect.signature(type(backbone).__init__).parameters:
        backbone.pooler = None
    return backbone


def architecture(config: "PreTrainedConfig", backbone_name: str) -> str:
    """The sequence classifier that can read this checkpoint, or the backbone's name if it has another head."""
    from transformers import AutoModelForSequenceClassification

    try:
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(config)
    except ValueError:  # there is none for this configuration
        return backbone_name
    return type(classifier).__name__ if isinstance(getattr(classifier, HEAD, None), nn.Linear) else backbone_name


def load_tokenizer(name_or_path: str | Path, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer that belongs to a model; a ``ValueError`` of one line where there is none."""
    from transformers import AutoTokenizer

    with one_line_errors(name_or_path, "a tokenizer"), quiet_transformers():
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hush the loading report and the bars of ``transformers``: what matters in them is raised as an error here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def one_line_errors(name: str | Path, what: str = "a model") -> Iterator[None]:
    """Loading fails in many types with many lines: make it one ``ValueError`` of one line that names the folder."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # a damaged checkpoint can raise anything, strict dataclasses of the hub included
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(first if str(name) in first else f"{name}: cannot load {what} ({first})") from error


def take_weights(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """``module.load_state_dict(state)``, also where FSDP has sharded the module: each process keeps its part."""
    if all(type(parameter.data) is torch.Tensor for parameter in module.parameters()):
        module.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True))
