"""What holds for any rows: every index once, labels by position, prompts as in generation, nothing lost unsaid."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from spectune.data import Example, batches, by_length, collate, encode, load_rows, prompt_ids, split_rows
from spectune.data.loading import Row, Rows
from spectune.errors import DataError
from tests.support import make_tokenizer

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
ON_DISK = settings(PROPERTY, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])

LENGTHS = st.lists(st.integers(1, 300), max_size=130)
#: any text, and the marks that tokenizers and files treat as their own
TEXT = st.text(max_size=12) | st.lists(
    st.sampled_from(
        ["<|endoftext|>", "<s>", " ", "\n", "\u2028", "Ada", " lives", "é", "e\u0301", "🙂", "\x00", "日本"]
    ),
    max_size=6,
).map("".join)
SOME_TEXT = TEXT.filter(str.strip)


@functools.cache
def tokenizer(bos: bool, chat: bool = False) -> PreTrainedTokenizerFast:
    return make_tokenizer(bos=bos, chat=chat)


# -- batches --------------------------------------------------------------------------------------------------------


@PROPERTY
@given(LENGTHS, st.integers(1, 40), st.integers(), st.integers(0, 10**6), st.booleans())
def test_batches(lengths: list[int], size: int, seed: int, epoch: int, grouped: bool) -> None:
    found = batches(lengths, size, seed=seed, epoch=epoch, group_by_length=grouped)
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    assert sum(len(batch) < size for batch in found) <= 1
    assert all(0 < len(batch) <= size for batch in found)
    assert found == batches(tuple(lengths), size, seed=seed, epoch=epoch, group_by_length=grouped)
    first = batches(lengths, size, seed=seed, epoch=0, group_by_length=grouped)
    if first:
        assert max(lengths[i] for i in first[0]) == max(lengths)


def test_batches_differ_by_seed_and_by_epoch() -> None:
    lengths = list(range(1, 41))
    drawn = {
        (seed, epoch): str(batches(lengths, 4, seed=seed, epoch=epoch)) for seed in (-1, 0, 1, 11) for epoch in (1, 11)
    }
    assert len(set(drawn.values())) == len(drawn)


@PROPERTY
@given(LENGTHS, st.integers(1, 40), st.data())
def test_a_step_in_batches(lengths: list[int], size: int, data: st.DataObject) -> None:
    rows = data.draw(st.permutations(range(len(lengths))))[: data.draw(st.integers(0, len(lengths)))]
    found = by_length(rows, lengths, size)
    assert sorted(i for batch in found for i in batch) == sorted(rows)
    ordered = [lengths[i] for batch in found for i in batch]
    assert ordered == sorted(ordered, reverse=True)


# -- collate --------------------------------------------------------------------------------------------------------


@st.composite
def example(draw: st.DrawFn) -> Example:
    """Ids of few kinds, so that padding, EOS and -100's neighbours all stand in prompts and in targets."""
    ids = draw(st.lists(st.integers(0, 3), min_size=2, max_size=9))
    return Example(ids, draw(st.integers(0, len(ids) - 1)), Row("row"))


@PROPERTY
@given(st.lists(example(), min_size=1, max_size=6), st.integers(0, 3), st.integers(1, 8))
def test_collate(examples: list[Example], pad: int, multiple: int) -> None:
    for side in ("left", "right"):
        batch = collate(examples, pad, padding_side=side, pad_to_multiple_of=multiple)
        width = batch["input_ids"].shape[1]
        assert width % multiple == 0
        assert width - max(len(e.input_ids) for e in examples) < multiple
        for e, ids, mask, labels in zip(examples, *batch.values(), strict=True):
            length = len(e.input_ids)
            real = slice(0, length) if side == "right" else slice(width - length, width)
            expected = torch.zeros(width, dtype=torch.int64)
            expected[real] = 1
            assert torch.equal(mask, expected)
            assert ids[real].tolist() == e.input_ids
            assert ids[mask == 0].eq(pad).all()
            learned = max(e.prompt_length, 1)
            assert labels[real].tolist() == [-100] * learned + e.input_ids[learned:]
            assert labels[mask == 0].eq(-100).all()
            assert int((labels != -100).sum()) == e.target_tokens


# -- encode ---------------------------------------------------------------------------------------------------------


@st.composite
def record(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["text", "prompt", "messages", "alpaca"]))
    if kind == "text":
        return {"text": draw(SOME_TEXT)}
    if kind == "prompt":
        return {"prompt": draw(TEXT), "completion": draw(SOME_TEXT)}
    if kind == "alpaca":
        return {"instruction": draw(SOME_TEXT), "input": draw(TEXT), "output": draw(SOME_TEXT)}
    user, answer = draw(TEXT), draw(SOME_TEXT)
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}


@PROPERTY
@given(record(), st.sampled_from(["", " ", "\n", "é", "\u0301"]), st.booleans())
def test_a_row_s_prompt_is_what_generation_sees(record: dict[str, Any], separator: str, bos: bool) -> None:
    words = tokenizer(bos, chat=True)
    (row,) = load_rows([record])
    target = row.text or row.completion or ""
    assume(re.sub(r"(<\|endoftext\|>)+\s*$", "", f"{row.prompt or ''}{separator}{target}") or row.messages)
    e = encode([row], words, max_length=10_000, separator=separator).examples[0]
    ids = prompt_ids(row, words, separator)
    if row.text is None:
        assert e.input_ids[: e.prompt_length] == ids
    else:
        assert e.prompt_length == 0
        assert e.input_ids[: len(ids)] == ids
    assert e.input_ids[-1] == words.eos_token_id
    if row.prompt is not None:
        # EOS is learned once, whether it stands at the end of the row already or not
        answer = re.sub(r"(<\|endoftext\|>)+\s*$", "", str(row.completion))
        whole = f"{row.prompt}{separator}{answer}"
        said = words.decode(e.input_ids[:-1], clean_up_tokenization_spaces=False)
        assert said.removeprefix("<s>") == whole.removeprefix("<s>")


@PROPERTY
@given(
    st.lists(record(), min_size=1, max_size=8), st.lists(TEXT, max_size=3), st.integers(2, 40), st.booleans(), st.data()
)
def test_the_report_accounts_for_every_row_and_token(
    records: list[dict[str, Any]], bad: list[str], longest: int, bos: bool, data: st.DataObject
) -> None:
    words = tokenizer(bos, chat=True)
    mixed = data.draw(st.permutations([*records, *({"prompt": text} for text in bad)]))
    rows = load_rows(list(mixed), skip_bad_rows=True)
    whole = {id(e.row): e for e in encode(list(rows), words, max_length=100_000).examples}
    encoded = encode(rows, words, max_length=longest)
    report = encoded.report.to_dict()
    assert report["rows"] == len(mixed) == report["kept"] + report["dropped"] + report["bad"]
    assert report["bad"] == len(bad) == len(report["bad_rows"])
    assert report["examples"] == len(encoded.examples)
    assert report["kept"] == len({id(e.row) for e in encoded.examples})
    assert report["tokens"] == sum(len(e.input_ids) for e in encoded.examples)
    assert report["target_tokens"] == sum(e.target_tokens for e in encoded.examples)
    assert report["longest_row_tokens"] == max(len(e.input_ids) for e in encoded.examples) <= longest
    prompted = [e for e in encoded.examples if e.row.text is None]
    assert report["tokens_lost"] == sum(len(whole[id(e.row)].input_ids) - len(e.input_ids) for e in prompted)
    assert report["cut"] == sum(len(whole[id(e.row)].input_ids) > len(e.input_ids) for e in prompted)
    places = {entry["origin"]: entry["from"] for entry in report["cut_rows"]}
    for e in prompted:
        before = whole[id(e.row)]
        target = before.input_ids[before.prompt_length :]
        kept = e.input_ids[e.prompt_length :]
        assert e.target_tokens >= 1
        # what is left is a part of the row in one piece, and the report says which end went
        assert kept == target[: len(kept)]
        # BOS stays
        asked, all_asked = e.input_ids[: e.prompt_length], before.input_ids[: before.prompt_length]
        lead = int(bos and asked[:1] == all_asked[:1] == [1])
        assert asked[lead:] == all_asked[len(all_asked) - len(asked) + lead :]
        if e.row.origin in places:
            assert places[e.row.origin] == " and ".join(
                ["prompt"] * (e.prompt_length < before.prompt_length) + ["end"] * (len(kept) < len(target))
            )
        else:
            assert e.input_ids == before.input_ids
    # a text is learned whole, in windows: each token but the first is a target once
    for row in {id(e.row): e.row for e in encoded.examples if e.row.text is not None}.values():
        windows = [e for e in encoded.examples if e.row is row]
        learned = [token for e in windows for token in e.input_ids[len(e.input_ids) - e.target_tokens :]]
        assert learned == whole[id(row)].input_ids[1:]


# -- rows -----------------------------------------------------------------------------------------------------------


@PROPERTY
@given(st.integers(2, 60), st.floats(0, 1), st.integers())
def test_split_is_a_partition(count: int, share: float, seed: int) -> None:
    rows = Rows([Row(str(i), text="x") for i in range(count)], ["bad"])
    train, valid = split_rows(rows, share, seed)
    assert sorted([*train, *valid], key=lambda row: int(row.origin)) == list(rows)
    assert 1 <= len(valid) < count
    assert abs(len(valid) - share * count) <= 1
    for part in (train, valid):
        assert [int(row.origin) for row in part] == sorted(int(row.origin) for row in part)
    assert train.skipped + valid.skipped == ["bad"]
    assert split_rows(rows, share, seed) == (train, valid)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["text", "prompt", "completion", "messages", "conversations", "instruction", "input", "output", "references"]
ANY_RECORD = st.dictionaries(st.sampled_from([*KEYS, "label", "choices", "role"]), JSON, max_size=4) | JSON


@ON_DISK
@given(st.lists(ANY_RECORD, max_size=5))
def test_any_json_is_rows_or_one_error(tmp_path: Path, records: list[Any]) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "a.json").write_text(json.dumps(records))
    for source in (tmp_path / "a.jsonl", tmp_path / "a.json", records):
        with contextlib.suppress(DataError):
            assert len(load_rows(source)) == len(records)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".txt"])
def test_any_bytes_are_rows_or_one_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"

    @ON_DISK
    @given(st.binary(max_size=60) | st.text(alphabet='{}[]",:\n\\ \rtextprompt\0', max_size=60).map(str.encode))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        with contextlib.suppress(DataError):
            load_rows(path)

    check()


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "1" * 10_000, '{"text": ' + "1" * 10_000 + "}"])
def test_json_that_the_parser_itself_refuses(tmp_path: Path, content: str) -> None:
    for suffix in (".jsonl", ".json"):
        path = tmp_path / f"a{suffix}"
        path.write_text(content)
        with pytest.raises(DataError, match=str(path)):
            load_rows(path)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a \ud800"},
        {"prompt": "\udfff", "completion": "c"},
        {"prompt": "p", "completion": "\ud83d"},
        {"instruction": "i", "input": "\ud800", "output": "o"},
        {"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "a"}]},
        {"prompt": "p", "completion": "c", "references": ["\ud800"]},
    ],
)
def test_half_a_character_is_a_bad_row(tmp_path: Path, row: dict[str, Any]) -> None:
    """JSON can escape one half of a surrogate pair, which no tokenizer and no file can take."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps(row))
    with pytest.raises(DataError, match=r"a\.jsonl:2: .* half a character"):
        load_rows(path)
