"""Rows, masks and batches: nothing dropped in silence, every bad row named, labels by position."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from spectune.data import (
    Example,
    Row,
    batches,
    by_length,
    collate,
    encode,
    load_rows,
    prompt_ids,
    split_rows,
)
from spectune.errors import ConfigError, DataError
from tests.support import make_rows, make_tokenizer

TOKENIZER = make_tokenizer()


def render_mask(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The row as text, what is learned between `[[` and `]]`."""
    before = tokenizer.decode(example.input_ids[: example.prompt_length])
    return f"{before}[[{tokenizer.decode(example.input_ids[example.prompt_length :])}]]"


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_malformed_json_in_line_17_is_named_with_all_other_bad_rows(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in make_rows(20)]
    lines[16] = '{"prompt": "broken'
    lines[3] = json.dumps({"prompt": "p", "completion": "  "})
    lines[5] = json.dumps({"prompt": "p", "completion": 4})
    lines[7] = json.dumps({"prompt": "p", "completoin": "c"})
    lines[9] = json.dumps([1, 2])
    path = write(tmp_path / "rows.jsonl", lines)
    with pytest.raises(DataError) as caught:
        load_rows(path)
    text = str(caught.value)
    assert "5 bad of 20 rows" in text
    assert f"{path}:17: malformed JSON at column" in text
    assert f"{path}:4: completion is empty" in text
    assert f"{path}:6: completion is int '4', expected text" in text
    assert f"{path}:8: prompt without completion (is 'completoin' meant?)" in text
    assert f"{path}:10: a list, expected an object" in text
    assert caught.value.exit_code == 3


def test_skipping_bad_rows_counts_them(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [json.dumps(make_rows(1)[0]), "{", "", json.dumps(make_rows(2)[1])])
    rows = load_rows(path, skip_bad_rows=True)
    report = encode(rows, TOKENIZER, max_length=60).report.to_dict()
    assert report["rows"] == 3
    assert report["kept"] == 2
    assert report["bad"] == 1
    assert rows[1].origin == f"{path}:4"


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ["{}"])
    with pytest.raises(DataError, match=r"no such file \(did you mean .*train\.jsonl\?\)"):
        load_rows(tmp_path / "trian.jsonl")
    (tmp_path / "figures").mkdir()
    with pytest.raises(DataError, match=r"is a folder that holds more than data files \(figures\)"):
        load_rows(tmp_path)
    with pytest.raises(DataError, match="no rows"):
        load_rows(write(tmp_path / "empty.jsonl", [""]))


def test_not_utf8_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: byte"):
        load_rows(tmp_path / "a.jsonl")


def test_kinds_of_file(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = make_rows(3)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, rows)))
    csv = ["prompt,completion", '"name: A, town: B\nsecond line","It is ""A""."', "p,c"]
    write(tmp_path / "a.csv", csv)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("one\n\ntwo\n<|endoftext|>\nthree\n")
    for kind in ("json", "jsonl", "parquet"):
        assert [r.completion for r in load_rows(tmp_path / f"a.{kind}")] == [r["completion"] for r in rows]
    from_csv = load_rows(tmp_path / "a.csv")
    assert from_csv[0].completion == 'It is "A".'
    assert from_csv[1].origin == f"{tmp_path / 'a.csv'}:4"
    assert [r.text for r in load_rows(tmp_path / "a.txt")] == ["one\n\ntwo", "three"]
    with pytest.raises(DataError, match=r"unknown kind of file '\.xlsx'"):
        load_rows(write(tmp_path / "a.xlsx", ["x"]))


def test_csv_with_a_column_too_few_names_the_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv:3: not 2 columns as in the header"):
        load_rows(write(tmp_path / "a.csv", ["prompt,completion", "p,c", "only"]))


def test_shapes() -> None:
    alpaca, with_input, sharegpt, both = load_rows(
        [
            {"instruction": "Add.", "output": "2"},
            {"instruction": "Add.", "input": "1+1", "output": "2"},
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
            {"prompt": "p", "completion": "c", "instruction": "i", "output": "o", "references": ["c", "d"], "id": 4},
        ]
    )
    assert alpaca.prompt is not None
    assert alpaca.prompt.endswith("### Instruction:\nAdd.\n\n### Response:\n")
    assert with_input.prompt is not None
    assert "### Input:\n1+1" in with_input.prompt
    assert sharegpt.messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert (both.prompt, both.references, both.columns["id"]) == ("p", ("c", "d"), 4)
    with pytest.raises(DataError, match="not among its choices"):
        load_rows([{"prompt": "p", "completion": "a", "label": "x", "choices": ["a", "b"]}])


def test_targets_are_the_completion_and_eos_by_position() -> None:
    """EOS is the padding token too: it is learned where it ends a target and nowhere else."""
    encoded = encode(load_rows(make_rows(4)), TOKENIZER, max_length=60)
    assert encoded.report.ends_with_eos == 4
    for side in ("left", "right"):
        batch = collate(encoded.examples, TOKENIZER.pad_token_id, padding_side=side)
        for i, example in enumerate(encoded.examples):
            real = batch["attention_mask"][i].bool()
            assert batch["input_ids"][i][real].tolist() == example.input_ids
            labels = batch["labels"][i]
            assert (labels[~real] == -100).all()
            learned = labels[real].tolist()
            assert learned[: example.prompt_length] == [-100] * example.prompt_length
            assert learned[example.prompt_length :] == example.input_ids[example.prompt_length :]
            assert learned[-1] == TOKENIZER.eos_token_id
    assert (
        TOKENIZER.decode(encoded.examples[1].input_ids) == "name: Ben | town: Leeds\nBen lives in Leeds.<|endoftext|>"
    )
    assert render_mask(encoded.examples[1], TOKENIZER).endswith("\n[[Ben lives in Leeds.<|endoftext|>]]")


@pytest.mark.parametrize("bos", [False, True])
def test_prompt_ids_are_the_training_prefix(bos: bool) -> None:
    tokenizer = make_tokenizer(bos=bos)
    for row in load_rows(make_rows(6)):
        for separator in ("", "\n", " "):
            example = encode([row], tokenizer, max_length=60, separator=separator).examples[0]
            ids = prompt_ids(row, tokenizer, separator)
            assert example.input_ids[: example.prompt_length] == ids
            assert ids.count(1) == int(bos)


def test_chats() -> None:
    tokenizer = make_tokenizer(chat=True)
    row = {"messages": [{"role": "user", "content": "York ?"}, {"role": "assistant", "content": "It is."}]}
    example = encode(load_rows([row]), tokenizer, max_length=60).examples[0]
    assert render_mask(example, tokenizer) == "user: York ?\nassistant: [[It is.<|endoftext|>]]"
    with pytest.raises(ConfigError, match="no chat template"):
        encode(load_rows([row]), TOKENIZER, max_length=60)
    with pytest.raises(DataError, match="ends with 'user'"):
        load_rows([{"messages": row["messages"][:1]}])


def test_rows_that_are_too_long_are_cut_and_counted() -> None:
    row = make_rows(1)[0]
    whole = encode(load_rows([row]), TOKENIZER, max_length=200).examples[0]
    targets = whole.target_tokens
    cut = encode(load_rows([row]), TOKENIZER, max_length=targets + 3)
    assert cut.examples[0].input_ids == whole.input_ids[-(targets + 3) :]
    assert cut.report.to_dict()["tokens_lost"] == len(whole.input_ids) - targets - 3
    shorter = encode(load_rows([row]), TOKENIZER, max_length=5)
    assert len(shorter.examples[0].input_ids) == 5
    assert shorter.report.ends_with_eos == 0
    assert shorter.report.to_dict()["cut"] == 1


@given(st.lists(st.integers(1, 40), min_size=1, max_size=70), st.integers(1, 9), st.integers(0, 5), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_batches_hold_every_index_once_and_are_a_function_of_seed_and_epoch(
    lengths: list[int], size: int, seed: int, epoch: int
) -> None:
    for grouped in (False, True):
        found = batches(lengths, size, seed=seed, epoch=epoch, group_by_length=grouped)
        assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
        assert found == batches(lengths, size, seed=seed, epoch=epoch, group_by_length=grouped)
        if epoch == 0:
            assert max(lengths[i] for i in found[0]) == max(lengths)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=70), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_a_step_s_rows_are_cut_by_length(lengths: list[int], size: int) -> None:
    rows = list(range(len(lengths)))
    found = by_length(rows, lengths, size)
    assert sorted(i for batch in found for i in batch) == rows
    assert [len(batch) for batch in found[:-1]] == [size] * (len(found) - 1)
    ordered = [lengths[i] for batch in found for i in batch]
    assert ordered == sorted(lengths, reverse=True)


def test_grouping_by_length_saves_padding() -> None:
    lengths = [5, 40] * 200
    padded = {}
    for grouped in (False, True):
        found = batches(lengths, 4, seed=0, epoch=1, group_by_length=grouped)
        padded[grouped] = sum(max(lengths[i] for i in batch) * len(batch) for batch in found)
    assert padded[True] < 0.65 * padded[False]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_labels_for_any_rows(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=5))
    examples = [
        Example(data.draw(st.lists(st.integers(0, 3), min_size=p + t, max_size=p + t)), p, Row("row"))
        for p, t in lengths
    ]
    for side in ("left", "right"):
        batch = collate(examples, 0, padding_side=side)
        assert (batch["labels"] != -100).sum() == sum(e.target_tokens for e in examples)
        assert batch["attention_mask"].sum() == sum(len(e.input_ids) for e in examples)


def test_split_is_seeded_and_loses_nothing() -> None:
    rows = load_rows(make_rows(20))
    train, valid = split_rows(rows, 0.2, seed=3)
    assert len(valid) == 4
    assert {r.origin for r in train} | {r.origin for r in valid} == {r.origin for r in rows}
    assert split_rows(rows, 0.2, seed=3) == (train, valid)
    with pytest.raises(DataError, match="cannot be split"):
        split_rows(rows[:1])
