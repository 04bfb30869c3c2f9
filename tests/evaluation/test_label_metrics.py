"""Metrics of labels against their definitions, written out plainly, and against values that were worked out by hand."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from spectune.data import Labels, Row
from spectune.errors import ConfigError, DataError
from spectune.evaluation import Task
from spectune.evaluation.label_metrics import LABEL_METRICS
from spectune.evaluation.label_scores import agreement, pearson_statistics
from spectune.evaluation.spans import are_spans, span_statistics, spans_of


def drawn(seed: int, classes: int = 4, rows: int = 60) -> list[tuple[int, int]]:
    rng = random.Random(seed)
    return [(label := rng.randrange(classes), label if rng.random() < 0.6 else rng.randrange(classes))
            for _ in range(rows)]  # fmt: skip


def plain_macro_f1(pairs: list[tuple[int, int]]) -> float:
    """The mean over classes of 2 precision recall / (precision + recall)."""
    found = []
    for name in sorted({name for pair in pairs for name in pair}):
        hits = sum(label == guess == name for label, guess in pairs)
        guessed, labelled = sum(guess == name for _, guess in pairs), sum(label == name for label, _ in pairs)
        precision, recall = hits / guessed if guessed else 0.0, hits / labelled if labelled else 0.0
        found.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    return sum(found) / len(found)


def plain_matthews(pairs: list[tuple[int, int]]) -> float:
    """Gorodkin's R_K by its covariances: of one-hot labels and one-hot guesses, summed over classes."""
    count, names = len(pairs), sorted({name for pair in pairs for name in pair})

    def covariance(one: int, other: int) -> float:
        total = 0.0
        for name in names:
            a, b = ([float(pair[side] == name) for pair in pairs] for side in (one, other))
            total += sum(x * y for x, y in zip(a, b, strict=True)) / count - sum(a) / count * (sum(b) / count)
        return total

    scale = math.sqrt(covariance(0, 0) * covariance(1, 1))
    return covariance(0, 1) / scale if scale else 0.0


@pytest.mark.parametrize("seed", range(5))
def test_metrics_of_classes_are_their_definitions(seed: int) -> None:
    pairs = drawn(seed)
    rows = [[float(label), float(guess), 4.0] for label, guess in pairs]
    assert agreement("macro_f1", rows) == pytest.approx(plain_macro_f1(pairs), abs=1e-12)
    assert agreement("matthews", rows) == pytest.approx(plain_matthews(pairs), abs=1e-12)


def test_metrics_of_two_classes_by_hand() -> None:
    # 3 right positives, 1 missed, 2 false alarms, 4 right negatives: F1 6/9 and 8/11, R = (12 - 2) / sqrt(4*6*5*5)
    rows = [[1, 1, 2]] * 3 + [[1, 0, 2]] + [[0, 1, 2]] * 2 + [[0, 0, 2]] * 4
    assert agreement("macro_f1", rows) == pytest.approx((6 / 9 + 8 / 11) / 2)
    assert agreement("matthews", rows) == pytest.approx(10 / math.sqrt(600))


def test_guesses_that_do_not_vary_have_no_correlation() -> None:
    assert agreement("matthews", [[0, 1, 2], [1, 1, 2]]) == 0.0
    assert agreement("matthews", [[1, 1, 2], [1, 1, 2]]) == 0.0
    assert agreement("pearson", pearson_statistics([2.0, 2.0], [1.0, 3.0])) == 0.0


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (1e6, 1e-3)])
def test_pearson_is_its_definition_wherever_the_numbers_lie(shift: float, scale: float) -> None:
    rng = random.Random(0)
    labels = [shift + scale * rng.gauss(0, 1) for _ in range(50)]
    values = [label + scale * rng.gauss(0, 1) for label in labels]
    x, y = (math.fsum(of) / 50 for of in (values, labels))
    both = math.fsum((a - x) * (b - y) for a, b in zip(values, labels, strict=True))
    spread = math.fsum((a - x) ** 2 for a in values) * math.fsum((b - y) ** 2 for b in labels)
    found = agreement("pearson", pearson_statistics(values, labels))
    assert found == pytest.approx(both / math.sqrt(spread), abs=1e-6)


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O O", set()),
        ("B-PER I-PER O B-LOC", {("PER", 0, 1), ("LOC", 3, 3)}),
        ("B-PER B-PER", {("PER", 0, 0), ("PER", 1, 1)}),
        ("I-PER I-PER O I-LOC", {("PER", 0, 1), ("LOC", 3, 3)}),
        ("B-PER I-LOC I-LOC", {("PER", 0, 0), ("LOC", 1, 2)}),
        ("I-PER B-PER I-PER", {("PER", 0, 0), ("PER", 1, 2)}),
        ("B-PER E-PER S-PER S-PER", {("PER", 0, 1), ("PER", 2, 2), ("PER", 3, 3)}),
        ("B-A-b I-A-b", {("A-b", 0, 1)}),
    ],
)
def test_spans_are_counted_as_seqeval_counts_them(tags: str, spans: set[tuple[str, int, int]]) -> None:
    assert spans_of(tags.split()) == spans


def test_span_f1_and_token_accuracy_by_hand() -> None:
    labelled = ["B-PER I-PER O B-LOC", "O B-LOC I-LOC O"]
    guessed = ["B-PER I-PER O O", "O B-LOC O B-PER"]
    counts = [span_statistics(a.split(), b.split()) for a, b in zip(guessed, labelled, strict=True)]
    assert counts == [[1, 1, 2], [0, 2, 1]]
    assert agreement("span_f1", counts) == pytest.approx(2 * 1 / (3 + 3))
    assert agreement("token_accuracy", [[3, 4], [2, 4]]) == pytest.approx(5 / 8)


def test_only_classes_of_spans_have_a_span_f1() -> None:
    assert are_spans(["O", "B-PER", "I-PER"])
    assert not any(map(are_spans, (["NOUN", "VERB"], ["O"], ["O", "B-PER", "person"], ["B", "I", "O"])))


def rows(*choices: list[str]) -> list[Row]:
    return [Row(f"row {i}", prompt="p", completion=c[0], choices=tuple(c), label=c[0]) for i, c in enumerate(choices)]


def test_choices_that_are_the_same_in_all_rows_are_classes() -> None:
    task = Task.of(rows(["a", "b"], ["b", "a"]), max_length=16)
    assert task.higher_is_better == {"accuracy": True, "macro_f1": True, "matthews": True}
    own = rows(["a", "b"], ["c", "d"])
    assert Task.of(own, max_length=16).higher_is_better == {"accuracy": True}
    with pytest.raises(DataError, match="metric macro_f1: rows have choices of their own"):
        Task.of(own, metric="macro_f1", max_length=16)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (Labels("SEQ_CLS", ("a", "b")), {"accuracy": True, "macro_f1": True, "matthews": True}),
        (Labels("SEQ_CLS"), {"mse": False, "pearson": True}),
        (Labels("TOKEN_CLS", ("B-X", "O")), {"span_f1": True, "token_accuracy": True}),
        (Labels("TOKEN_CLS", ("NOUN", "VERB")), {"token_accuracy": True}),
    ],
)
def test_a_head_has_the_metrics_of_its_labels(labels: Labels, expected: dict[str, bool]) -> None:
    given = [Row("row 1", text="a", label="a")]
    task = Task.of(given, max_length=16, labels=labels)
    assert task.higher_is_better == expected
    assert (task.to_write, task.to_choose) == ((), ())
    for name in itertools.chain(set(LABEL_METRICS) - set(expected), ("rouge_l",)):
        with pytest.raises(ConfigError, match=f"metric {name}"):
            Task.of(given, max_length=16, labels=labels, metric=name)


def test_metrics_of_numbers_and_words_are_none_of_a_language_model() -> None:
    with pytest.raises(ConfigError, match="metric mse, span_f1: of a head"):
        Task.of(rows(["a", "b"]), max_length=16, metric="mse,span_f1")
