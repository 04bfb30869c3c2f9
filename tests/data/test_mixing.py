"""Several sources in one training set: weights, names, and errors that name what is wrong."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import spectune
from spectune.data import Encoded, Source, encode, load_rows, mixture, split_rows, weighted
from spectune.errors import ConfigError, DataError
from tests.support import make_tokenizer

LENGTH = 32


def rows_of(name: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{name} {i}:", "completion": f" {i}"} for i in range(count)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mixed(weights: dict[str, float], counts: dict[str, int], seed: int = 0) -> Encoded:
    rows = load_rows([Source(rows_of(name, counts[name]), weight, name) for name, weight in weights.items()])
    return weighted(encode(rows, make_tokenizer(), max_length=LENGTH), rows.weights, seed)


def times(encoded: Encoded) -> dict[str | None, Counter[str | None]]:
    """How often each row of each source is there."""
    found: dict[str | None, Counter[str | None]] = {}
    for example in encoded.examples:
        found.setdefault(example.row.source, Counter())[example.row.prompt] += 1
    return found


def test_weights_worked_out_by_hand() -> None:
    found = times(mixed({"a": 0.5, "b": 2, "c": 1.5, "d": 1}, {"a": 10, "b": 3, "c": 4, "d": 5}))
    assert sorted(found["a"].values()) == [1] * 5
    assert sorted(found["b"].values()) == [2] * 3
    assert sorted(found["c"].values()) == [1, 1, 2, 2]
    assert sorted(found["d"].values()) == [1] * 5


def test_what_is_drawn_follows_from_the_seed_and_from_nothing_else() -> None:
    weights, counts = {"a": 0.5, "b": 1.5}, {"a": 20, "b": 20}
    random.seed(1)
    first = mixed(weights, counts, seed=3)
    random.seed(2)
    assert mixed(weights, counts, seed=3).sha256 == first.sha256
    assert mixed(weights, counts, seed=4).sha256 != first.sha256
    # nor does the other source, or its weight, change it
    assert times(mixed({"b": 2, "a": 0.5}, {"a": 20, "b": 7}, seed=3))["a"] == times(first)["a"]


def test_a_long_text_is_drawn_or_left_out_whole() -> None:
    texts = [{"text": f"{letter} " * 60} for letter in "abcdefgh"]
    rows = load_rows([Source(texts, 0.5, "long"), Source(rows_of("b", 2), 2, "short")])
    encoded = encode(rows, make_tokenizer(), max_length=LENGTH)
    windows = Counter(id(example.row) for example in encoded.examples if example.row.source == "long")
    assert min(windows.values()) > 1
    drawn = weighted(encoded, rows.weights, 0).examples
    kept = Counter(id(example.row) for example in drawn if example.row.source == "long")
    assert len(kept) == 4
    assert all(kept[row] == windows[row] for row in kept)


def test_the_report_and_the_sentence_say_what_an_epoch_has() -> None:
    found = mixed({"a": 0.5, "b": 2}, {"a": 54, "b": 36})
    assert mixture(found.report) == "54 rows of a (x 0.5), 36 of b (x 2): 99 examples an epoch"
    sources = found.report.to_dict()["sources"]
    for name, weight, rows, examples in (("a", 0.5, 54, 27), ("b", 2, 36, 72)):
        of_epoch = [example for example in found.examples if example.row.source == name]
        assert sources[name]["weight"] == weight
        assert (sources[name]["rows"], sources[name]["examples"]) == (rows, rows)
        assert sources[name]["epoch_examples"] == examples == len(of_epoch)
        assert sources[name]["epoch_tokens"] == sum(example.length for example in of_epoch)
        assert sources[name]["epoch_target_tokens"] == sum(example.target_tokens for example in of_epoch)
    assert sum(source["tokens"] for source in sources.values()) == found.report.tokens
    assert sum(source["target_tokens"] for source in sources.values()) == found.report.target_tokens


def test_without_weights_the_rows_are_as_they_are_and_each_source_is_counted() -> None:
    found = mixed({"a": 1, "b": 1}, {"a": 2, "b": 3})
    assert [example.row.prompt for example in found.examples] == ["a 0:", "a 1:", "b 0:", "b 1:", "b 2:"]
    assert mixture(found.report) == "2 rows of a, 3 of b: 5 examples an epoch"
    rows = load_rows(rows_of("a", 3))
    alone = encode(rows, make_tokenizer(), max_length=LENGTH)
    assert weighted(alone, rows.weights, 0) is alone
    assert mixture(alone.report) == ""
    assert "sources" not in alone.report.to_dict()


def test_a_weight_that_leaves_no_row_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"data a: weight = 0\.1 leaves none of its 4 rows; expected more, such as 0\.25"
    ):
        mixed({"a": 0.1, "b": 1}, {"a": 4, "b": 3})


def test_a_source_of_which_no_row_is_left_to_train_on_stays_in_the_report() -> None:
    rows = load_rows([Source(rows_of("a", 20), 2, "a"), Source(rows_of("b", 1), 2, "b")])
    for seed in range(100):
        train, valid = split_rows(rows, seed=seed)
        if any(row.source == "b" for row in valid):
            break
    found = weighted(encode(train, make_tokenizer(), max_length=LENGTH), train.weights, seed)
    assert mixture(found.report) == "19 rows of a (x 2), 0 of b (x 2): 38 examples an epoch"


def test_validation_rows_are_taken_once_whatever_the_weight() -> None:
    rows = load_rows([Source(rows_of("a", 10), 2, "a"), Source(rows_of("b", 10), 0.5, "b")])
    assert len(rows) == 20
    _, valid = split_rows(rows, share=0.5)
    assert len({row.prompt for row in valid}) == len(valid) == 10


def test_sources_with_the_same_file_name_are_told_apart(tmp_path: Path) -> None:
    paths = [write(tmp_path / folder / "train.jsonl", rows_of(folder, 2)) for folder in ("x", "y", "z")]
    rows = load_rows([Source(paths[0]), Source(paths[1], 2), Source(paths[2], name="train-2")])
    assert rows.weights == {"train": 1, "train-2": 2, "train-2-2": 1}
    assert [row.source for row in rows] == ["train"] * 2 + ["train-2"] * 2 + ["train-2-2"] * 2
    assert rows[2].origin == f"{paths[1]}:1"


def test_a_path_among_sources_is_one_of_weight_1_and_one_source_needs_no_list(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows_of("a", 2))
    assert load_rows([str(path), Source(rows_of("b", 1), 3, "b")]).weights == {"a": 1, "b": 3}
    assert load_rows(Source(path, 2)).weights == {"a": 2}
    with pytest.raises(ConfigError, match=r"a dict beside a Source; expected Source\(dict, \.\.\.\) for each"):
        load_rows([Source(path), {"text": "x"}])
    with pytest.raises(ConfigError, match="a source within a source"):
        Source([Source(path)])


def test_the_bad_rows_of_all_sources_are_named_at_once(tmp_path: Path) -> None:
    bad = {"text": 1}
    a = write(tmp_path / "a.jsonl", [*rows_of("a", 2), bad])
    b = write(tmp_path / "b.jsonl", [bad, bad])
    with pytest.raises(DataError) as caught:
        load_rows([Source(a), Source(b)])
    assert [line.split(": ")[0] for line in caught.value.problems] == [f"{a}:3", f"{b}:1", f"{b}:2"]
    assert "3 bad of 5 rows" in str(caught.value)
    with pytest.raises(DataError, match=r"b\.jsonl: no rows"):
        load_rows([Source(a), Source(b)], skip_bad_rows=True)
    c = write(tmp_path / "c.jsonl", [bad, *rows_of("c", 1)])
    rows = load_rows([Source(a), Source(c)], skip_bad_rows=True)
    assert (len(rows), len(rows.skipped)) == (3, 2)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "2", None, True])
def test_a_weight_that_is_no_number_above_0_is_refused(weight: Any) -> None:
    with pytest.raises(ConfigError, match=r"data a: weight = .+; expected a number above 0"):
        Source("folder/a.jsonl", weight)


@pytest.mark.parametrize("name", ["", " ", 3])
def test_a_name_that_is_no_text_is_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match="expected text"):
        Source("a.jsonl", name=name)


def test_it_is_public() -> None:
    assert spectune.Source is Source
