"""Preference files: what is read, what is refused and with which place, and how texts become padded batches."""

import gzip
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewardfuse.batching import PairCollator, PairDataset, pad
from rewardfuse.byte_tokenizer import byte_tokenizer
from rewardfuse.data import (
    DataError,
    PreferencePair,
    RankedList,
    RatedResponse,
    SteppedSolution,
    load_records,
    split_held_out,
)
from rewardfuse.data.formats import named, recognised
from rewardfuse.tokenizing import longest_input, render, tokenize

GOOD = {"chosen": "yes", "rejected": "no"}
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def write(folder, *records, name="pairs.jsonl"):
    path = folder / name
    content = "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return str(path)


def test_every_accepted_form_is_read(tmp_path):
    full = {"prompt": "p", **GOOD, "margin": 1, "weight": 0.5, "target": 0, "id": "ignored"}
    path = write(tmp_path, GOOD, "", full, {"chosen": MESSAGES, "rejected": MESSAGES, "prompt": None, "margin": None})
    plain, numbers, chat = load_records(path)
    assert (plain.prompt, plain.chosen, plain.rejected, plain.margin) == (None, "yes", "no", None)
    assert (numbers.prompt, numbers.margin, numbers.weight, numbers.target) == ("p", 1.0, 0.5, 0.0)
    assert (chat.prompt, chat.chosen) == (MESSAGES[:1], MESSAGES[1:])  # the prompt that both conversations begin with
    assert [pair.source for pair in (plain, numbers, chat)] == [f"{path}:{line}" for line in (1, 3, 4)]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_byte_order_mark_and_windows_line_ends_do_not_hurt(tmp_path, name):
    path = write(tmp_path, "\ufeff" + json.dumps(GOOD) + "\r", json.dumps(GOOD) + "\r", name=name)
    assert len(load_records(path)) == 2


@pytest.mark.parametrize("name", ["pairs.json", "pairs.json.gz"])
def test_json_list_is_read(tmp_path, name):
    assert len(load_records(write(tmp_path, json.dumps([GOOD, GOOD], indent=1), name=name))) == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"chosen": "yes", ', "invalid JSON, .* column 19"),
        ("[1]", "expected a JSON object, got a list"),
        ({"rejected": "no", "answer": "yes"}, "no `chosen` .found: 'rejected', 'answer'"),
        ({"chosen": "yes"}, "no `rejected`"),
        ({}, "no `chosen` .found: no key at all"),
        ({**GOOD, "chosen": 3}, "`chosen` must be a string or a list of chat messages, got a number"),
        ({**GOOD, "chosen": None}, "`chosen` must be .* got null"),
        ({**GOOD, "rejected": []}, "`rejected` must be .* got an empty list"),
        ({**GOOD, "prompt": {"a": 1}}, "`prompt` must be .* got an object"),
        ({**GOOD, "chosen": [{"role": "user"}]}, "`chosen`: a message must have the strings `role` and `content`"),
        ({**GOOD, "chosen": ["hi"]}, "`chosen`: a message must have"),
        (
            {**GOOD, "chosen": [{"role": "bot", "content": "hi"}]},
            "`chosen`: unknown role 'bot', expected one of system",
        ),
        ({**GOOD, "prompt": [{"role": "Human", "content": "hi"}]}, "`prompt`: unknown role 'Human'"),
        ({**GOOD, "chosen": ""}, "`chosen` is empty, expected a response"),
        ({**GOOD, "rejected": " \n"}, "`rejected` is empty, expected a response"),
        ({**GOOD, "chosen": [MESSAGES[0], {"role": "assistant", "content": " "}]}, "`chosen` is empty .the content of"),
        ({**GOOD, "votes": [0, 0, 0]}, "`votes` must be three counts"),
        ({**GOOD, "votes": [1, 2]}, "`votes` must be three counts"),
        ({**GOOD, "votes": "abc"}, "`votes` must be three counts"),
        ({**GOOD, "votes": [10**30, 0, 1]}, "`votes` must be three counts .*, none above 2.53"),
        ({**GOOD, "votes": [0, 0, 3]}, r"`votes` .* must agree with no target, which means 1, got \[0, 0, 3\]"),
        ({**GOOD, "votes": [1, 0, 3], "target": 0.7}, r"`votes` .* must agree with the target 0.7, got \[1, 0, 3\]"),
        ({**GOOD, "votes": [3, 0, 1], "target": 0.3}, r"`votes` .* must agree with the target 0.3, got \[3, 0, 1\]"),
        ('{"chosen": "a", "rejected": "b", "chosen": "c"}', "invalid JSON, an object has the key 'chosen' twice"),
        (
            '{"chosen": [{"role": "user", "role": "assistant", "content": "a"}], "rejected": "b"}',
            "the key 'role' twice",
        ),
        ({**GOOD, "category": 3}, "`category` must be a string, got a number"),
        ({**GOOD, "margin": "1"}, "`margin` must be a number, got a string"),
        ({**GOOD, "weight": True}, "`weight` must be a number, got a boolean"),
        ({**GOOD, "weight": -1}, "`weight` must be finite and at least 0, got -1"),
        ({**GOOD, "target": 1.5}, r"`target` must lie in \[0, 1\], got 1.5"),
        ('{"chosen": "a", "rejected": "b", "margin": NaN}', "NaN is not a JSON number"),
        ('{"chosen": "a", "rejected": "b", "margin": 1e999}', "`margin` must be a finite number, got inf"),
        ('{"chosen": "a", "rejected": "b", "margin": 1%s}' % ("0" * 400), "`margin` must be a finite number"),
        ('{"chosen": "\\ud800", "rejected": "b"}', "`chosen` holds a lone surrogate at character 0"),
        ("[" * 100_000, "invalid JSON"),
    ],
)
@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_bad_line_is_refused_with_file_and_line(tmp_path, bad, message, name):
    path = write(tmp_path, GOOD, "", bad, GOOD, name=name)
    with pytest.raises(DataError, match=message) as error:
        load_records(path)
    assert str(error.value).startswith(f"{path}:3: ") and "\n" not in str(error.value)


def test_bad_item_of_a_json_list_is_refused_with_its_number(tmp_path):
    with pytest.raises(DataError, match=r"pairs\.json:2: no `chosen`"):
        load_records(write(tmp_path, json.dumps([GOOD, {"rejected": "no"}]), name="pairs.json"))


def test_json_file_that_is_no_list_is_refused(tmp_path):
    with pytest.raises(DataError, match="expected a JSON list of objects, got an object"):
        load_records(write(tmp_path, GOOD, name="pairs.json"))


def test_syntax_error_in_a_json_list_names_the_line(tmp_path):
    with pytest.raises(DataError, match=r"pairs\.json:3: invalid JSON"):
        load_records(write(tmp_path, "[", json.dumps(GOOD) + ",", "oops", "]", name="pairs.json"))


def test_votes_that_leave_the_pair_open_are_refused(tmp_path):
    open_pairs = [{**GOOD, "votes": votes} for votes in ([1, 0, 1], [0, 2, 0])]
    path = write(tmp_path, *open_pairs, {**GOOD, "votes": [0, 0, 3], "target": 0.5}, {**GOOD, "votes": [2**53, 1, 0]})
    assert [pair.votes for pair in load_records(path)] == [(1, 0, 1), (0, 2, 0), (0, 0, 3), (2**53, 1, 0)]


def test_long_number_makes_a_long_message(tmp_path):
    for key in ("target", "weight"):
        with pytest.raises(DataError) as error:
            load_records(write(tmp_path, {**GOOD, key: -int("9" * 4000)}))
        assert len(str(error.value)) - len(str(tmp_path)) < 120
    with pytest.raises(DataError) as error:
        load_records(write(tmp_path, {"prompt": "p", "completion": "a", "label": int("9" * 4000)}))
    assert len(str(error.value)) - len(str(tmp_path)) < 120


def test_key_twice_in_a_list_of_many_lines_has_the_place_of_another_record(tmp_path):
    path = write(tmp_path, "[", json.dumps(GOOD) + ",", '{"chosen": "a", "chosen": "b"}', "]", name="pairs.json")
    with pytest.raises(DataError, match=r"pairs\.json: invalid JSON, an object has the key 'chosen' twice"):
        load_records(path)


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json"])
def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path, name):
    path = tmp_path / name
    opening, separator = (b"[", b",\n") if name.endswith(".json") else (b"", b"\n")
    path.write_bytes(opening + json.dumps(GOOD).encode() + separator + '{"chosen": "ä"'.encode("latin-1") + b"\n")
    with pytest.raises(DataError, match=rf"{name}:2: not UTF-8 \(byte 0xe4\)"):
        load_records(str(path))


def test_missing_empty_and_unknown_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):
        load_records(str(tmp_path / "absent.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="expected a file, got a folder"):
        load_records(str(tmp_path / "folder.jsonl"))
    with pytest.raises(DataError, match="expected a file named"):
        load_records("some/hub-name")
    for name in ("pairs.jsonl", "pairs.jsonl.gz", "pairs.json"):
        with pytest.raises(DataError, match="the file holds no records"):
            load_records(write(tmp_path, "", name=name))


def test_truncated_and_false_gzip_are_refused(tmp_path):
    path = tmp_path / "pairs.jsonl.gz"
    content = gzip.compress(b"".join(json.dumps({**GOOD, "id": index}).encode() + b"\n" for index in range(2000)))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"pairs\.jsonl\.gz:\d+: damaged gzip file"):
        load_records(str(path))
    path.write_bytes(json.dumps(GOOD).encode())
    with pytest.raises(DataError, match=r":1: damaged gzip file .Not a gzipped file"):
        load_records(str(path))


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
fractions = st.none() | st.floats(0, 1)


def votes_agree(pair):
    target = 1.0 if pair.target is None else pair.target
    return pair.votes is None or (target - 0.5) * (pair.votes[0] - pair.votes[2]) >= 0


pairs = st.builds(
    PreferencePair,
    texts,
    texts,
    prompt=st.none() | texts,
    margin=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    weight=st.none() | st.floats(0, 1e9),
    target=fractions,
    votes=st.none() | st.tuples(*[st.integers(0, 9)] * 3).filter(any),
    category=st.none() | texts,
    source=st.just("f:1"),
).filter(votes_agree)
ratings = st.builds(
    RatedResponse,
    texts,
    st.dictionaries(texts, st.floats(-9, 9), min_size=1),
    prompt=st.none() | texts,
    source=st.just("f:1"),
)
solutions = st.lists(st.tuples(texts, fractions), min_size=1).map(
    lambda steps: SteppedSolution(*map(tuple, zip(*steps, strict=True)), source="f:1")
)


@given(st.sampled_from(["preference", "ratings", "steps"]), st.data())
def test_our_own_records_come_back_changed(name, data):
    record = data.draw({"preference": pairs, "ratings": ratings, "steps": solutions}[name])
    again = json.loads(json.dumps({key: value for key, value in vars(record).items() if key != "source"}))
    assert name == "preference" or recognised(again).name == name
    assert named(name).convert(again, "f:1") == [record]


@pytest.mark.parametrize(
    "make",
    [
        lambda: PreferencePair("", "b"),
        lambda: PreferencePair("a", [{"role": "assistant", "content": " "}]),
        lambda: PreferencePair("a", "b", prompt=[{"role": "bot", "content": "x"}]),
        lambda: PreferencePair("a", "b", margin=math.nan),
        lambda: PreferencePair("a", "b", weight=-1),
        lambda: PreferencePair("a", "b", target=1.1),
        lambda: PreferencePair("a", "b", target=math.nan),
        lambda: PreferencePair("a", "b", votes=(1.0, 0, 0)),
        lambda: PreferencePair("a", "b", votes=(2**53 + 1, 0, 0)),
        lambda: RankedList(("a", "b"), (1, 2), prompt=3),
        lambda: RankedList(("a", "b"), (1, 2), category=3),
        lambda: RatedResponse("", {"x": 1}),
        lambda: RatedResponse("a", {"x": math.inf}),
        lambda: RatedResponse("a", 3),
        lambda: SteppedSolution((), ()),
        lambda: SteppedSolution(("a", " "), (1, 1)),
        lambda: SteppedSolution(("a",), (math.nan,)),
        lambda: SteppedSolution(("a",), (2,)),
    ],
)
def test_record_made_in_python_is_not_checked(make):
    with pytest.raises(ValueError, match="`"):
        make()


def test_split_is_the_same_for_the_same_seed_and_loses_no_record():
    pairs = [PreferencePair(str(index), "x") for index in range(50)]
    train, held_out = split_held_out(pairs, 0.2, seed=1)
    assert split_held_out(pairs, 0.2, seed=1) == (train, held_out) == split_held_out(pairs, 10, seed=1)
    assert len(held_out) == 10 and sorted(train + held_out, key=lambda pair: int(pair.chosen)) == pairs
    assert split_held_out(pairs, 0.2, seed=2)[1] != held_out
    assert split_held_out(pairs, 0, seed=1) == (pairs, [])
    assert len(split_held_out(pairs[:3], 0.1, seed=1)[1]) == 1
    for refused in (50, 2.5, -1, 1000, math.inf, math.nan):
        with pytest.raises(ValueError, match="eval_split must be"):
            split_held_out(pairs, refused, seed=1)


def test_byte_tokenizer_gives_back_every_byte_and_survives_saving(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "".join(map(chr, range(0x300))) + "€\U0001f600"
    for each in (tokenizer, loaded):
        ids = each(text)["input_ids"]
        assert ids == [each.bos_token_id, *text.encode(), each.eos_token_id]
        assert each.decode(ids, skip_special_tokens=True) == text
    assert len(loaded) == 259


def test_messages_go_through_the_chat_template_and_fall_back_to_paragraphs(tokenizer):
    templated = byte_tokenizer()
    templated.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    answer = [{"role": "assistant", "content": "ho"}]
    assert render("hi", answer, templated) == ("<user>hi<assistant>ho", True)
    assert render([{"role": "user", "content": "hi"}], "ho", templated) == ("<user>hi<assistant>ho", True)
    assert render(None, MESSAGES, templated) == ("<user>hi<assistant>ho", True)
    assert render("hi", answer, tokenizer) == ("user: hi\n\nassistant: ho", False)
    assert render("hi ", "ho", templated) == ("hi ho", False)
    assert render(None, "ho", templated) == ("ho", False)


def test_template_text_gets_no_second_special_tokens(tokenizer):
    templated = byte_tokenizer()
    templated.chat_template = "<|bos|>{{ messages[0].content }}"
    texts = [(None, [{"role": "user", "content": "ab"}]), (None, "ab")]
    ids, _ = tokenize(texts, templated, 10, sources=["a", "b"])
    assert list(map(list, ids)) == [[257, 97, 98], [257, 97, 98, 258]]


def test_truncation_keeps_the_response_end_and_is_counted(tokenizer):
    ids, truncated = tokenize([("x" * 50, "end"), ("", "short")], tokenizer, 6, sources=["a", "b"])
    assert truncated == 2
    assert list(map(list, ids)) == [[257, ord("x"), *b"end", 258], [257, *b"hort", 258]]


def test_text_without_any_token_is_refused_with_its_place():
    bare = byte_tokenizer()
    bare.backend_tokenizer.post_processor = None
    bare.eos_token = None
    with pytest.raises(DataError, match=r"pairs.jsonl:7: the text gives no token"):
        tokenize([(None, "a"), (None, "")], bare, 6, sources=["pairs.jsonl:6", "pairs.jsonl:7"])


def test_order_survives_mixed_chat_and_plain_texts_over_several_chunks(tokenizer, monkeypatch):
    monkeypatch.setattr("rewardfuse.tokenizing.TOKENIZER_CHUNK", 4)
    templated = byte_tokenizer()
    templated.chat_template = "{{ messages[0].content }}"
    texts = [(None, str(i) if i % 3 else [{"role": "user", "content": str(i)}]) for i in range(11)]
    ids, _ = tokenize(texts, templated, 8, sources=[""] * 11)
    assert [templated.decode(row, skip_special_tokens=True) for row in ids] == [str(index) for index in range(11)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_collator_stacks_chosen_then_rejected_and_fills_absent_numbers(tokenizer, side):
    tokenizer.padding_side = side
    pairs = [PreferencePair("aa", "b", margin=0.5), PreferencePair("c", "dddd", target=0.25)]
    dataset = PairDataset(pairs, tokenizer, 16)
    batch = PairCollator(tokenizer)([dataset[0], dataset[1]])
    assert set(batch) == {"input_ids", "attention_mask", "margin", "target"}
    assert batch["margin"].tolist() == [0.5, 0.0] and batch["target"].tolist() == [1.0, 0.25]
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in rows] == ["aa", "c", "b", "dddd"]
    assert batch["attention_mask"][1].tolist() == ([0, 0, 0, 1, 1, 1] if side == "left" else [1, 1, 1, 0, 0, 0])
    tokenizer.padding_side = "right"


def test_padding_without_pad_token_uses_eos():
    bare = byte_tokenizer()
    bare.pad_token = None
    batch = pad([[1], [1, 2]], bare)
    assert batch["input_ids"].tolist() == [[1, 258], [1, 2]]
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 0], [1, 1]]))


def test_max_length_beyond_the_position_embeddings_is_refused(tokenizer):
    class Config:
        max_position_embeddings = 64

    assert longest_input(tokenizer, Config, None) == 64
    assert longest_input(tokenizer, object(), None) == 1024
    assert longest_input(tokenizer, Config, 10) == 10
    for refused in (0, 65):
        with pytest.raises(ValueError, match="max_length must lie between 1 and the 64 tokens"):
            longest_input(tokenizer, Config, refused)


def test_records_of_one_line_are_torn_apart_by_the_split():
    pairs = [PreferencePair("a", "b", source=f"votes.json:{index // 3}") for index in range(30)]
    train, held_out = split_held_out(pairs, 0.3, 1)
    assert len(held_out) == 9 and not {p.source for p in train} & {p.source for p in held_out}
    _, drawn = split_held_out([PreferencePair(str(index), "b") for index in range(30)], 0.3, 1)
    assert len(drawn) == 9  # without a line each record stands alone
