"""`rewardfuse doctor`: on checkpoints with one known defect each, the line of that defect and no other is a fault."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from doctor_models import EOS, PAD, llama_config, pairs_of, saved, tokenizer_of, trained, write
from rewardfuse import cli
from rewardfuse.doctor import examine
from rewardfuse.doctor.report import CHECKS
from rewardfuse.doctor.wrappers import CLASSIFIER, OURS
from rewardfuse.reward_head import HeadConfig
from rewardfuse.reward_model import RewardModel

BEHAVIOUR = ("bfloat16", "ties", "length", "bullets", "bold", "confidence")  # of a toy model: anything but a fault


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    model = trained()
    saved(model, root / "right")
    model.config.pad_token_id = EOS
    saved(model, root / "pad is eos", tokenizer_of(EOS))
    saved(RewardModel.from_config(llama_config(), seed=2), root / "random")
    return root


@pytest.fixture(scope="module")
def learned_pairs(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "learned.jsonl", pairs_of(60))


@pytest.fixture(scope="module")
def coin_pairs(tmp_path_factory):
    """Pairs about which nothing can be known: both answers are drawn alike."""
    letters = np.random.default_rng(3).integers(97, 123, size=(60, 2, 8), dtype=np.uint8)
    pairs = [{"prompt": "p ", "chosen": bytes(a).decode(), "rejected": bytes(b).decode()} for a, b in letters]
    return write(tmp_path_factory.mktemp("data") / "coin.jsonl", pairs)


@pytest.fixture
def copy_of(folders, tmp_path):
    def copy(name):
        return shutil.copytree(folders / name, tmp_path / "model")

    return copy


def change_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def verdicts(report):
    """The verdict of each line, the lines of a toy's behaviour left out."""
    lines = {(finding.check, finding.through): finding.verdict for finding in report.findings}
    return {line: verdict for line, verdict in lines.items() if line[0] not in BEHAVIOUR}


ALL_OK = {
    **{(check, ""): "ok" for check in ("weights", "custom_code", "tokenizer", "padding_token", "vocabulary")},
    **{(check, ""): "ok" for check in ("chat_template", "agreement", "accuracy", "calibration")},
    **{(check, way): "ok" for check in ("loading", "right_token", "batch_size") for way in (CLASSIFIER, OURS)},
    **{(check, way): "ok" for check in ("right_padding", "left_padding") for way in (CLASSIFIER, OURS)},
    ("head", CLASSIFIER): "ok",
}


def test_right_model_is_blamed_for_anything(folders, learned_pairs):
    report = examine(str(folders / "right"), dataset_name=learned_pairs)
    assert verdicts(report) == ALL_OK
    assert report.scores_from == CLASSIFIER and report.data.startswith("60 of ")
    assert {report.find(check).verdict for check in BEHAVIOUR} <= {"ok", "warning"}
    assert report.find("accuracy").numbers["value"] > 0.9


def test_pad_is_eos_bug_is_missed(folders, learned_pairs):
    report = examine(str(folders / "pad is eos"), dataset_name=learned_pairs)
    expected = {
        **ALL_OK,
        ("padding_token", ""): "warning",
        ("right_token", CLASSIFIER): "fault",
        ("agreement", ""): "warning",
    }
    del expected["calibration", ""], expected["accuracy", ""]
    found = verdicts(report)
    assert found.pop(("calibration", "")) in ("ok", "warning")
    # The token before eos does not tell the answers apart: chance, or by chance a little less.
    assert found.pop(("accuracy", "")) in ("warning", "fault") and found == expected
    assert "16 through rewardfuse" in report.find("agreement").measured
    line = report.find("right_token", CLASSIFIER)
    length = line.numbers["lengths"][0]
    assert line.measured.startswith(f"reads position {length - 1} of {length} (the token before eos)")
    assert "pad token that is not eos" in line.mend and "RewardModel" in line.mend


def test_random_head_on_the_users_pairs_passes(folders, coin_pairs):
    report = examine(str(folders / "random"), dataset_name=coin_pairs)
    found = verdicts(report)
    calibrated = found.pop(("calibration", ""))
    expected = {**ALL_OK, ("head", CLASSIFIER): "fault", ("accuracy", ""): "warning"}
    del expected["calibration", ""]
    assert found == expected and calibrated in ("ok", "warning")
    assert report.find("head").measured.startswith("looks random: weights look like a fresh draw (N(0, 0.02²)")


def test_random_head_passes_because_pairs_differ_in_one_way_throughout(folders, learned_pairs):
    """A random function is no coin: of answers that all end in '!' or '?' it ranks nearly all alike."""
    report = examine(str(folders / "random"), dataset_name=learned_pairs)
    low, high = (report.find("accuracy").numbers[key] for key in ("low", "high"))
    assert not low <= 0.5 <= high
    head = report.find("head")
    assert head.verdict == "fault" and "gaps are like those of fresh heads" in head.measured


def test_smoke_test_condemns_a_model_for_chance_on_pairs_it_was_not_made_for(folders):
    report = examine(str(folders / "random"))
    assert report.find("accuracy").verdict != "fault" and report.find("head").verdict != "fault"
    assert "smoke test" in report.data and "smoke test" in report.find("accuracy").measured


def test_trained_head_that_still_looks_fresh_is_called_random(copy_of, learned_pairs):
    folder = copy_of("right")
    model = RewardModel.from_pretrained(folder)
    with (
        torch.no_grad()
    ):  # the backbone learned as well: a fresh head in the direction of the old one keeps the ranking
        fresh = 0.02 * torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
        order = model.head.weight.flatten().argsort()
        model.head.weight[0, order] = fresh.flatten().sort().values
    model.save_pretrained(folder)
    head = examine(str(folder), dataset_name=learned_pairs).find("head")
    assert head.numbers["p_value"] > 0.01 and head.verdict == "ok" and "stand out from" in head.measured


def test_missing_head_is_filled_in_silently(tmp_path):
    saved(transformers.AutoModel.from_config(llama_config()), tmp_path)
    report = examine(str(tmp_path))
    head = report.find("head")
    assert (head.verdict, head.through) == ("fault", CLASSIFIER)
    assert "score.weight missing, filled with random numbers" in head.measured
    assert report.find("loading", OURS).verdict == "not measured"
    assert report.find("right_token", CLASSIFIER).verdict == "ok"
    assert report.find("accuracy").verdict == "not measured" and report.scores_from == ""


def test_two_outputs_pass_for_a_reward(tmp_path):
    classifier = transformers.AutoModelForSequenceClassification.from_config(llama_config(num_labels=2))
    report = examine(str(saved(classifier, tmp_path)))
    assert report.find("head").verdict == "fault" and report.find("head").measured.startswith("2 outputs")
    assert report.find("right_padding", CLASSIFIER).verdict == "ok"
    assert report.find("length").verdict == "not measured"


def test_several_outputs_that_the_configuration_explains_are_a_fault(tmp_path):
    model = RewardModel.from_config(llama_config(), seed=1, head=HeadConfig("attributes", ("help", "truth")))
    report = examine(str(saved(model, tmp_path)))
    assert report.find("head", CLASSIFIER).verdict == "warning" and report.scores_from == OURS
    assert report.find("accuracy").verdict != "not measured"


def test_head_of_another_size_than_the_configuration_says_is_not_told(copy_of):
    folder = copy_of("right")
    change_config(folder, id2label={"0": "no", "1": "yes"}, label2id={"no": 0, "yes": 1})
    head = examine(str(folder)).find("head", CLASSIFIER)
    assert head.verdict == "fault" and "2 label(s), but score.weight has the shape [1, 16]" in head.measured


def test_encoder_without_its_classifier_is_a_fault_though_our_model_reads_it(tmp_path):
    config = transformers.BertConfig(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    report = examine(str(saved(RewardModel.from_config(config, seed=1), tmp_path)))
    assert report.find("head", CLASSIFIER).verdict == "warning" and "RewardModel" in report.find("head").mend
    assert report.scores_from == OURS and report.verdict != "fault"


def test_encoder_with_its_classifier_is_read_at_the_wrong_end(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=259, num_labels=1, pad_token_id=PAD, **sizes)
    classifier = transformers.AutoModelForSequenceClassification.from_config(config)
    report = examine(str(saved(classifier, tmp_path)))
    assert report.find("right_token", CLASSIFIER).measured.startswith(
        "reads the first token of a text alone, but padded"
    )
    assert report.find("left_padding", CLASSIFIER).verdict == "warning"  # its tokenizer pads on the right
    assert report.find("right_token", OURS).verdict == report.find("left_padding", OURS).verdict == "ok"


@pytest.mark.parametrize("index", [{"weight_map": []}, {"weight_map": {"score.weight": 5}}, [], {}])
def test_damaged_index_crashes_the_doctor(copy_of, index):
    folder = copy_of("right")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = examine(str(folder)).find("weights")
    assert weights.verdict == "fault" and "must hold a weight_map" in weights.measured


def test_configuration_without_a_text_part_crashes_the_doctor(copy_of):
    folder = copy_of("right")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "text_config": None}))
    assert examine(str(folder)).find("padding_token").verdict == "ok"


def test_ties_alone_are_reported_as_nan(folders, tmp_path):
    data = write(tmp_path / "ties.jsonl", [{**pair, "target": 0.5} for pair in pairs_of(20)])
    report = examine(str(folders / "right"), dataset_name=data)
    for check in ("length", "accuracy", "calibration"):
        assert report.find(check).verdict == "not measured" and "tie by its label" in report.find(check).measured
    assert "too few pairs to tell" in report.find("head").measured or report.find("head").verdict == "ok"
    assert "nan" not in str(report.findings)


def test_edit_that_truncation_removed_passes_for_one_that_moves_nothing(folders, tmp_path):
    long = [{"prompt": "p", "chosen": "It is so. " * 12, "rejected": "No. " * 30} for _ in range(40)]
    report = examine(str(folders / "right"), dataset_name=write(tmp_path / "long.jsonl", long), max_length=100)
    for check in ("bullets", "bold", "confidence"):
        assert report.find(check).verdict == "not measured"
    assert report.find("bold").measured == "0 answers are whole with the edit, 6 are needed"


def test_edited_answers_that_still_fit_are_not_the_ones_that_count(folders, tmp_path):
    pairs = [{"prompt": f"{i}", "chosen": "x" * (50 + 40 * (i % 2)) + "!", "rejected": "no?"} for i in range(20)]
    report = examine(str(folders / "right"), dataset_name=write(tmp_path / "some.jsonl", pairs), max_length=110)
    assert report.find("confidence").numbers["answers"] == 10  # 48 characters more fit into the short ones alone
    assert report.find("bold").numbers["answers"] == 20


@pytest.mark.parametrize("kind", ["cut short", "no header", "pickle", "none", "shard"])
def test_damaged_or_pickled_weights_crash_the_doctor(copy_of, kind):
    folder = copy_of("right")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    if kind in ("cut short", "no header"):
        weights.write_bytes(content[:-100] if kind == "cut short" else b"{}")
    elif kind == "pickle":
        (folder / "pytorch_model.bin").write_bytes(b"never opened")
    elif kind == "shard":
        index = {"weight_map": {"score.weight": "model-00001-of-00001.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    report = examine(str(folder))
    says = {"pickle": "pickles only (pytorch_model.bin)", "none": "neither", "shard": "not in the folder"}
    assert report.find("weights").verdict == "fault"
    assert says.get(kind, "cannot be read") in report.find("weights").measured
    unmeasured = {finding.check for finding in report.findings if finding.verdict == "not measured"}
    assert {"loading", "head", "right_token", "accuracy"} <= unmeasured
    assert report.find("tokenizer").verdict == "ok"


def test_missing_weight_of_the_backbone_is_not_noticed(copy_of):
    from safetensors.torch import load_file, save_file

    folder = copy_of("right")
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    line = examine(str(folder)).find("loading", CLASSIFIER)
    assert line.verdict == "fault" and "1 weights of the backbone are missing" in line.measured


def test_missing_tokenizer_crashes_the_doctor(folders, tmp_path):
    RewardModel.from_pretrained(folders / "right").save_pretrained(tmp_path)
    report = examine(str(tmp_path))
    assert report.find("tokenizer").verdict == "fault"
    assert report.find("loading").verdict == "ok" and report.find("right_token").verdict == "not measured"


def test_token_without_embedding_crashes_the_doctor(tmp_path):
    report = examine(str(saved(RewardModel.from_config(llama_config(pad=0, vocab_size=258), seed=1), tmp_path)))
    line = report.find("vocabulary")
    assert line.verdict == "fault" and "1 token(s) beyond the 258 embeddings, first '<|eos|>' (258)" in line.measured


def test_batches_refused_without_a_pad_token_are_not_reported(copy_of):
    folder = copy_of("right")
    change_config(folder, pad_token_id=None)
    report = examine(str(folder))
    line = report.find("batch_size", CLASSIFIER)
    assert line.verdict == "fault" and "no padding token is defined" in line.measured and "pad_token_id" in line.mend
    assert report.find("right_padding", CLASSIFIER).verdict == "not measured"
    assert report.find("right_padding", OURS).verdict == "ok"
    assert report.find("accuracy").verdict != "not measured"


@pytest.mark.parametrize(
    ("template", "verdict", "says"),
    [
        (None, "warning", "none"),
        ("{{ raise_exception('no') }}", "fault", "fails on a question with an answer: no"),
        ("{{ messages[0]['content'] }}", "fault", "drops 'an answer' from the conversation"),
    ],
)
def test_bad_chat_template_is_not_reported(copy_of, template, verdict, says):
    folder = copy_of("right")
    tokenizer = tokenizer_of()
    tokenizer.chat_template = template
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    line = examine(str(folder)).find("chat_template")
    assert (line.verdict, line.measured) == (verdict, says)


def test_custom_code_is_run_or_kept_secret(copy_of):
    folder = copy_of("right")
    change_config(folder, auto_map={"AutoModel": "modeling.Never"})
    line = examine(str(folder)).find("custom_code")
    assert line.verdict == "warning" and "it was not run" in line.measured


def test_nan_weight_is_scored(copy_of):
    folder = copy_of("right")
    model = RewardModel.from_pretrained(folder)
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    model.save_pretrained(folder)
    line = examine(str(folder)).find("batch_size")
    assert (line.verdict, line.measured) == ("fault", "scores are not finite")


# The command


def run(capsys, *argv):
    code = cli.main(["doctor", *argv])
    return code, capsys.readouterr()


def test_exit_codes_tell_a_fault_from_none(folders, learned_pairs, capsys):
    flags = ["--dataset-name", learned_pairs, "--max_pairs", "40", "--disable_tqdm"]
    code, captured = run(capsys, str(folders / "right"), *flags)
    assert code == 0 and captured.err == "" and "0 fault" in captured.out
    assert all(title in captured.out for title in CHECKS.values())
    code, captured = run(capsys, "--model_name_or_path", str(folders / "pad is eos"), *flags, "--json")
    report = json.loads(captured.out)
    assert code == 1 and report["verdict"] == "fault" and captured.err == ""
    assert {finding["check"] for finding in report["findings"]} == set(CHECKS)


def test_progress_goes_to_stdout(copy_of, capsys):
    code, captured = run(capsys, str(copy_of("random")), "--max_pairs", "4", "--json")
    assert "7/7" in captured.err and json.loads(captured.out)["model"] and code in (0, 1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "expected one model"),
        (["a", "--model_name_or_path", "b"], "expected one model"),
        (["./nothing-here"], "no such model folder"),
        (["EMPTY"], "holds no model (no config.json)"),
        (["MODEL", "--dataset_name", "absent.jsonl"], "absent.jsonl: no such file"),
        (["MODEL", "--max_pairs", "1"], "max_pairs must be at least 2, got 1"),
        (["MODEL", "--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["MODEL", "--seed", "-1"], "seed must be at least 0, got -1"),
        (["MODEL", "--max_length", "4096", "--disable_tqdm"], "max_length must lie between 1 and the 128 tokens"),
    ],
)
def test_bad_input_is_no_finding_but_one_line_and_exit_code_2(folders, tmp_path, capsys, argv, message):
    places = {"EMPTY": str(tmp_path), "MODEL": str(folders / "right")}
    code, captured = run(capsys, *[places.get(word, word) for word in argv])
    assert code == 2 and captured.out == ""
    assert captured.err.count("\n") == 1 and message in captured.err


def test_ratings_pass_for_pairs(folders, tmp_path, capsys):
    path = write(tmp_path / "ratings.jsonl", [{"prompt": "p", "response": "r", "helpfulness": 3}] * 3)
    code, captured = run(capsys, str(folders / "right"), "--dataset_name", path)
    assert code == 2 and captured.err.count("\n") == 1


# The guide


def test_guide_shows_another_report_than_its_command_gives(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "doctor.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    [shown] = re.findall(r"^```text\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "doctor.md", "exec"), {})
    findings = [finding for finding in examine("tiny").findings if finding.check not in BEHAVIOUR]
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    for finding in findings:
        begins = " ".join(f"{CHECKS[finding.check]} {finding.through} {finding.verdict}".split())
        assert [line for line in lines if line.startswith(begins)], begins


def test_guide_explains_every_line():
    page = (Path(__file__).parents[1] / "docs" / "doctor.md").read_text(encoding="utf-8")
    explained = {name for bold in re.findall(r"^\*\*(.*?)\*\* —", page, re.MULTILINE) for name in bold.split(", ")}
    explained |= {f"{name} added" for name in explained}  # "bullets, bold, confidence added"
    assert set(CHECKS.values()) <= explained
