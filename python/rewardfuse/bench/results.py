"""The files that benchmark runs leave: a JSON file a machine, which gathers ops run by run, and its picture."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

import rewardfuse
from rewardfuse._files import atomic_file
from rewardfuse.bench import picture, trainer_picture

#: Facts that make it another machine, so that its figures do not belong into the same file.
SAME = ("cpu", "cores", "gpu")
#: Packages that some op is held against.
PEERS = ("trl", "transformers", "liger_kernel", "triton")


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rewardfuse": rewardfuse.__version__,
        "backend": rewardfuse.backend(device),
    }
    facts["peers"] = {name: version for name in PEERS if (version := _version(name))}
    from rewardfuse import _backend

    if _backend._C is not None:
        facts["instruction_set"] = _backend._C.instruction_set()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = properties.name
        facts["gpu_memory_bytes"] = properties.total_memory
        facts["gpu_compute_capability"] = f"{properties.major}.{properties.minor}"
        facts["cuda"] = torch.version.cuda
    return facts


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return " ".join(line.partition(":")[2].split())
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def slug(machine: dict[str, Any]) -> str:
    """A file name's stem for a machine: its GPU, or its CPU."""
    return re.sub(r"[^a-z0-9.]+", "-", machine.get("gpu", machine["cpu"]).lower()).strip("-.") or "machine"


def earlier(machine: dict[str, Any], folder: Path, stem: str) -> dict[str, Any]:
    """What runs on this machine have left in <stem>.json: op to its figures, with the machine and settings of its run.

    Raises:
        ValueError: the file holds no figures, or those of another machine.
    """
    path = folder / f"{stem}.json"
    if not path.exists():
        return {}
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        ops, run = result["ops"], {"machine": result["machine"], "settings": result["settings"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected figures of earlier runs, got something else; move it away") from error
    for fact in SAME:
        before, now = run["machine"].get(fact), machine.get(fact)
        if before != now:
            raise ValueError(f"{path}: expected figures of this machine, {fact} {now}, got {before}; give a --name")
    return {name: {**run, **op} for name, op in ops.items()}


def write(result: dict[str, Any], before: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Write <stem>.json and, with matplotlib installed, pictures of it; returns what was written.

    <stem>.png shows the ops whose steps are timed, <stem>-trainer.png training runs. Each op stands with the machine
    and settings of its run; `before` are ops measured earlier, which stay.
    """
    run = {"machine": result["machine"], "settings": result["settings"]}
    result = {**result, "ops": {**before, **{name: {**run, **op} for name, op in result["ops"].items()}}}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.json"
    with atomic_file(path) as stream:
        json.dump(result, stream, indent=2)
        stream.write("\n")
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed", file=sys.stderr)
        return [path]
    written = [path]
    if any("cases" in op for op in result["ops"].values()):
        written.append(folder / f"{stem}.png")
        picture.draw(result, written[-1])
    if any("runs" in op for op in result["ops"].values()):
        written.append(folder / f"{stem}-trainer.png")
        trainer_picture.draw(result, written[-1])
    return written
