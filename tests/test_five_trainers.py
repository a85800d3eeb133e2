"""The page on KL-penalized rewards: its code runs and prints what it says, its tables are those of its script."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "kl.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("five_trainers", DOCS / "five_trainers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_code_on_the_kl_page_fails_or_prints_something_else(capsys):
    code = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert len(code) > 5
    names = {}
    for block in code:
        exec(compile(block, "kl.md", "exec"), names)  # one after the other, as a reader would
        printed = capsys.readouterr().out
        said = [line[2:] for line in block.splitlines() if line.startswith("# ")]
        assert printed.splitlines() == said


def test_tables_on_the_kl_page_are_not_what_the_script_prints(script):
    for table in script.tables():
        assert f"\n\n{table}\n\n" in PAGE


def test_a_wide_gap_is_not_in_the_trajectory(script):
    logprobs, ref = script.trajectory()
    assert (logprobs <= 0).all()
    assert (ref <= 0).all()
    gaps = (logprobs - ref)[0]
    wide = (gaps.abs() > 2).nonzero().flatten().tolist()
    assert wide == sorted(script.WIDE)
    torch.testing.assert_close(gaps[wide], torch.tensor(list(script.WIDE.values())))


def test_the_picture_cannot_be_drawn(script, tmp_path):
    path = tmp_path / "picture.png"
    script.draw(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000
