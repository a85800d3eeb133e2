"""``rewardfuse info``: it tells the truth about this installation, and loads nothing that it need not."""

import json
import subprocess
import sys

import pytest
import torch

import rewardfuse
from rewardfuse import _backend, _info, cli


def run(capsys, *arguments):
    assert cli.main(["info", *arguments]) == 0
    return capsys.readouterr().out


def test_json_disagrees_with_the_backends_that_really_serve(capsys):
    facts = json.loads(run(capsys, "--json"))
    x = torch.zeros(1)
    for name in _backend.BACKENDS:
        with rewardfuse.use_backend(name):
            if facts["missing"][name]["cpu"] is None:
                assert rewardfuse.bradley_terry_loss(x, x).item() == pytest.approx(0.6931, abs=1e-4)
            else:
                with pytest.raises(RuntimeError, match=name):
                    rewardfuse.bradley_terry_loss(x, x)
    assert facts["chosen"]["cpu"]["backend"] == rewardfuse.backend("cpu")
    assert facts["torch"]["version"] == torch.__version__
    assert len(facts["gpus"]) == torch.cuda.device_count()


def test_text_leaves_out_a_backend_or_its_reason(capsys):
    text = run(capsys)
    facts = _info.collect()
    for name, devices in facts["missing"].items():
        assert sum(line.split()[:1] == [name] and line.startswith("  ") for line in text.splitlines()) >= len(devices)
        for reason in devices.values():
            assert reason is None or reason in text
    assert facts["build"]["native"] in text and facts["build"]["cuda"] in text


def test_a_wish_that_cannot_be_met_breaks_info_or_is_hidden(capsys, monkeypatch):
    monkeypatch.setenv("REWARDFUSE_BACKEND", "tritn")
    facts = json.loads(run(capsys, "--json"))
    assert facts["chosen"]["cpu"]["backend"] is None
    assert "tritn" in facts["chosen"]["cpu"]["reason"]
    assert facts["environment"]["REWARDFUSE_BACKEND"] == "tritn"


def test_without_the_extension_the_way_to_it_is_not_told(capsys, monkeypatch):
    monkeypatch.setattr(_backend, "_C", None)
    monkeypatch.setattr(_backend, "_native_error", "no module named _C", raising=False)
    text = run(capsys)
    assert "pip install --no-build-isolation rewardfuse" in text
    assert json.loads(run(capsys, "--json"))["chosen"]["cpu"]["backend"] == "reference"


def test_a_mismatched_torch_goes_unnoticed(capsys, monkeypatch):
    if _backend._C is None:
        pytest.skip("needs the native backend")
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    facts = json.loads(run(capsys, "--json"))
    assert facts["torch"]["matches"] is False
    assert any("another torch" in hint for hint in facts["hints"])
    assert f"extension built for {_backend._C.torch_version}" in run(capsys)


def test_info_loads_transformers_or_triton():
    script = (
        "import sys; from rewardfuse import cli; code = cli.main(['info']);"
        "loaded = {'transformers', 'triton', 'datasets', 'trl', 'accelerate'} & set(sys.modules);"
        "sys.exit(f'loaded {sorted(loaded)}' if loaded else code)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "backends" in result.stdout
