"""The verdict: its shape, its words, and whatever may be missing or broken in a comparison's folder."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectune.files.strict_json import strict_json
from tests.comparing.invented import invent, read_rows, write_rows
from tests.comparing.invented import judged as verdict

SIX = {"full": 1.0, "lora": 1.0, "adapter": 1.002, "prefix": 1.04, "bitfit": 1.06, "prompt": 1.12}


def test_shape(tmp_path: Path) -> None:
    content = invent(tmp_path, SIX, metric=True)
    found = verdict(content, tmp_path)
    json.loads(strict_json(found))
    assert (found["measure"], found["rows"], found["seeds"]) == ("judged_loss", 200, 3)
    assert (found["covers_training_noise"], found["confidence"], found["correction"]) == (True, 0.95, "holm")
    assert found["base"] == pytest.approx(4.0)
    means = [arm["mean"] for arm in found["arms"]]
    assert means == sorted(means)
    for arm in found["arms"]:
        assert arm["low"] < arm["mean"] < arm["high"]
        lines = [read_rows(tmp_path / run["rows_file"]) for run in content["runs"] if run["name"] == arm["name"]]
        losses = [sum(row["loss_sum"] for row in rows) / sum(row["target_tokens"] for row in rows) for rows in lines]
        assert arm["mean"] == pytest.approx(np.mean(losses))
        assert arm["seed_sd"] == pytest.approx(np.std(losses, ddof=1))
    names = [arm["name"] for arm in found["arms"]]
    assert [(pair["a"], pair["b"]) for pair in found["pairs"]] == list(combinations(names, 2))
    by_name = {arm["name"]: arm["mean"] for arm in found["arms"]}
    for pair in found["pairs"]:
        assert pair["difference"] == pytest.approx(by_name[pair["b"]] - by_name[pair["a"]])
        assert pair["relative"] == pytest.approx(pair["difference"] / by_name[pair["a"]])
        assert pair["low"] <= pair["difference"] <= pair["high"]
        assert pair["p"] <= pair["p_adjusted"]
    assert set(found["versus_full"]) == set(SIX) - {"full"}


def test_order_and_words_against_full(tmp_path: Path) -> None:
    found = verdict(invent(tmp_path, SIX), tmp_path)
    assert found["versus_full"] == {
        "lora": "no difference",
        "adapter": "no difference",
        "prefix": "worse",
        "bitfit": "worse",
        "prompt": "worse",
    }
    assert {arm["name"] for arm in found["arms"] if arm["best"]} == {"full", "lora", "adapter"}
    assert ["bitfit", "prompt"] in found["order"]
    assert ["full", "prompt"] not in found["order"]  # it follows from the others
    assert sorted(found["groups"][0]) == ["adapter", "full", "lora"]
    headline = found["sentences"][0]
    assert "match full fine-tuning within noise; prefix tuning, BitFit and prompt tuning are worse (by " in headline
    assert headline.endswith("% of its loss).")
    assert "BitFit is better than prompt tuning" in found["sentences"][1]
    assert "% of the loss is not excluded (" in found["sentences"][2]
    assert found["sentences"][3] == "3 seeds, 200 rows, Holm-corrected 95%."


def test_no_difference_is_not_sold_as_equivalence(tmp_path: Path) -> None:
    found = verdict(invent(tmp_path, {"full": 1.0, "lora": 1.0, "bitfit": 1.0}), tmp_path)
    assert found["sentences"][0] == "No difference between any of the three methods was found."
    widest = max(max(abs(p["low"]), abs(p["high"])) / next(a["mean"] for a in found["arms"] if a["name"] == p["a"])
                 for p in found["pairs"])  # fmt: skip
    assert f"up to {100 * widest:.1f}% of the loss is not excluded" in found["sentences"][1]
    assert found["order"] == []
    assert [sorted(group) for group in found["groups"]] == [["bitfit", "full", "lora"]]
    two = verdict(invent(tmp_path, {"lora": 1.0, "bitfit": 1.0}), tmp_path)
    assert two["sentences"][0] in (
        "No difference between LoRA and BitFit was found.",
        "No difference between BitFit and LoRA was found.",
    )


def test_words_without_full(tmp_path: Path) -> None:
    found = verdict(invent(tmp_path, {"lora": 1.0, "prefix": 1.1, "bitfit": 1.2}), tmp_path)
    wanted = r"LoRA is best; prefix tuning and BitFit are worse \(by (10|9\.\d)% to (19|20|21)% of its loss\)\."
    assert re.fullmatch(wanted, found["sentences"][0])
    assert found["sentences"][1] == "Prefix tuning is better than BitFit."
    assert found["versus_full"] == {}


def test_better_than_full(tmp_path: Path) -> None:
    found = verdict(invent(tmp_path, {"full": 1.2, "lora": 1.0}), tmp_path)
    assert re.match(r"LoRA is better than full fine-tuning \(by 1[67]% of its loss\)", found["sentences"][0])


def test_one_seed_does_not_cover_training_noise(tmp_path: Path) -> None:
    found = verdict(invent(tmp_path, SIX, seeds=1), tmp_path)
    assert (found["seeds"], found["covers_training_noise"]) == (1, False)
    assert all(arm["seed_sd"] is None and arm["low"] < arm["mean"] for arm in found["arms"])
    assert found["sentences"][-1].startswith(
        "One seed each, 200 rows, Holm-corrected 95%: training noise is not covered"
    )


def test_fewer_seeds_are_named(tmp_path: Path) -> None:
    content = invent(tmp_path, {"full": 1.0, "lora": 1.1})
    content["runs"] = [run for run in content["runs"] if run["name"] == "full" or run["seed"] == 0]
    found = verdict(content, tmp_path)
    assert (found["seeds"], found["covers_training_noise"]) == (3, False)
    assert "Fewer seeds: 1 of LoRA; the training noise of LoRA is taken to be that of the others." in found["sentences"]


def test_metrics_and_forgetting(tmp_path: Path) -> None:
    content = invent(tmp_path, {"full": 1.0, "prompt": 1.5}, metric=True)
    found = verdict(content, tmp_path)
    rouge, forgetting = found["metrics"]["rouge_l"], found["forgetting"]
    assert rouge["higher_is_better"]
    assert [arm["name"] for arm in rouge["arms"]] == ["full", "prompt"]  # best first: the highest
    assert rouge["rows"] == 50  # only these were written
    assert rouge["pairs"][0]["difference"] < 0
    assert rouge["order"] == [["full", "prompt"]]
    assert [arm["name"] for arm in forgetting["arms"]] == ["full", "prompt"]
    wanted = np.mean([sum(run["forgetting_by_passage"]) / (16 * 128) for run in content["runs"][:3]])
    assert forgetting["arms"][0]["mean"] == pytest.approx(wanted)
    assert forgetting["sentences"][-1] == "3 seeds, 16 passages, Holm-corrected 95%."


def test_corpus_metrics_from_their_statistics(tmp_path: Path) -> None:
    content = invent(tmp_path, {"lora": 1.0, "bitfit": 1.1}, rows=40)
    for run in content["runs"]:
        rows = read_rows(tmp_path / run["rows_file"])
        hits = [9, 8, 7, 6] if run["name"] == "lora" else [6, 4, 2, 1]
        for row in rows[:30]:
            row["statistics"] = {"bleu": [10, 10, *hits, 10, 9, 8, 7]}
        write_rows(tmp_path / run["rows_file"], rows)
    bleu = verdict(content, tmp_path)["metrics"]["bleu"]
    assert [arm["name"] for arm in bleu["arms"]] == ["lora", "bitfit"]
    assert bleu["arms"][0]["mean"] == pytest.approx(100 * (9 / 10 * 8 / 9 * 7 / 8 * 6 / 7) ** 0.25)


def test_rows_with_one_prompt_are_one_draw(tmp_path: Path) -> None:
    found = verdict(invent(tmp_path, {"lora": 1.0, "bitfit": 1.1}, prompts=50), tmp_path)
    assert (found["rows"], found["units"]) == (200, 50)
    assert "200 rows with 50 different prompts" in found["sentences"][-1]
    few = verdict(invent(tmp_path, {"lora": 1.0, "bitfit": 1.1}, prompts=3), tmp_path)
    assert few["units"] == 200  # one instruction for all rows parts nothing


def test_old_content_has_no_intervals_and_says_why(tmp_path: Path) -> None:
    runs = [
        {"name": "lora", "method": "lora", "label": "LoRA", "seed": 0, "valid_loss": 1.5},
        {"name": "full", "method": "full", "label": "Full", "seed": 0, "valid_loss": 1.2},
    ]
    found = verdict({"runs": runs, "failed": []}, tmp_path)
    assert [(arm["name"], arm["mean"], arm["low"]) for arm in found["arms"]] == [
        ("full", 1.2, None),
        ("lora", 1.5, None),
    ]
    assert found["pairs"] == []
    assert found["sentences"][0].startswith("No verdict: these runs were saved without a loss for each row")


def test_one_arm(tmp_path: Path) -> None:
    found = verdict(invent(tmp_path, {"lora": 1.0}), tmp_path)
    assert found["sentences"][0] == "Only LoRA was judged: there is nothing to compare it with."
    assert found["groups"] == [["lora"]]
    assert found["arms"][0]["best"]


def test_failed_arms_are_named(tmp_path: Path) -> None:
    content = invent(tmp_path, {"lora": 1.0, "bitfit": 1.1})
    content["failed"] = [
        {"name": "prompt", "method": "prompt", "label": "Prompt tuning", "seed": 0, "reason": "diverged"},
        {"name": "lora", "method": "lora", "label": "LoRA", "seed": 3, "reason": "diverged"},
    ]
    sentences = verdict(content, tmp_path)["sentences"]
    assert "Prompt tuning failed and is not judged." in sentences
    assert "Failed runs, left out: 1 of LoRA." in sentences


def test_a_best_rate_on_the_edge_of_the_search_is_told_beside_the_headline(tmp_path: Path) -> None:
    content = invent(tmp_path, {"lora": 1.0, "bitfit": 1.1, "prompt": 1.2})
    trials = [{"learning_rate": rate} for rate in (1e-3, 3e-3, 9e-3)]
    content["searches"] = {
        "lora": {"best": 3e-3, "edge": None, "trials": trials},
        "bitfit": {"best": 9e-3, "edge": "high", "trials": trials},
    }
    sentences = verdict(content, tmp_path)["sentences"]
    assert sentences[0].startswith("LoRA is best")
    assert sentences[1] == (
        "The best learning rate of BitFit (0.009, the highest of 3) lies on the edge of what was tried: with a better "
        "one it may stand higher than here."
    )
    content["searches"]["prompt"] = {"best": 1e-3, "edge": "low", "trials": trials}
    assert (
        "BitFit (0.009, the highest of 3) and prompt tuning (0.001, the lowest of 3)"
        in verdict(content, tmp_path)["sentences"][1]
    )


def test_runs_on_other_rows_are_left_out_and_named(tmp_path: Path) -> None:
    content = invent(tmp_path, {"lora": 1.0, "bitfit": 1.1})
    path = tmp_path / content["runs"][0]["rows_file"]
    write_rows(path, read_rows(path)[:150])
    found = verdict(content, tmp_path)
    assert {arm["name"]: arm["seeds"] for arm in found["arms"]} == {"lora": 2, "bitfit": 3}
    assert any("lora with seed 0 is left out: it was judged on 150 rows" in text for text in found["sentences"])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"loss_sum": None}, "row 3 has the loss None"),
        ({"loss_sum": float("nan")}, "NaN is not a number"),
        ({"target_tokens": -1}, "target_tokens: Input should be greater"),
    ],
)
def test_damaged_rows_are_left_out_and_named(tmp_path: Path, damage: dict[str, Any], said: str) -> None:
    content = invent(tmp_path, {"lora": 1.0, "bitfit": 1.1})
    path = tmp_path / content["runs"][0]["rows_file"]
    rows = read_rows(path)
    rows[3].update(damage)
    write_rows(path, rows)
    found = verdict(content, tmp_path)
    assert {arm["name"]: arm["seeds"] for arm in found["arms"]} == {"lora": 2, "bitfit": 3}
    assert any(said in text for text in found["sentences"])


@pytest.mark.parametrize(
    "text", ["", "not json\n", "[1, 2]\n", '{"row": 0}\n', '{"row": 0, "loss_sum": 1, "target_tokens": 0}\n']
)
def test_broken_files_never_raise(tmp_path: Path, text: str) -> None:
    content = invent(tmp_path, {"lora": 1.0, "bitfit": 1.1}, seeds=1)
    for run in content["runs"]:
        (tmp_path / run["rows_file"]).write_text(text)
    found = verdict(content, tmp_path)
    assert found["sentences"][0].startswith("No verdict: what the runs saved of each row cannot be used")
    assert len(found["arms"]) == 2
    (tmp_path / content["runs"][0]["rows_file"]).unlink()
    verdict(content, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"runs": [], "failed": []},
        {"runs": None, "failed": None},
        {"runs": [{}], "failed": [{}]},
        {"runs": [{"name": "lora"}], "failed": [{"method": "prompt"}]},
        {"runs": [{"name": "lora", "valid_loss": float("nan"), "forgetting_by_passage": [None]}]},
        {"runs": [{"name": "lora", "forgetting_by_passage": [1.0]}], "data": None},
        {
            "runs": [
                {"name": "lora", "forgetting_by_passage": [1.0, 2.0]},
                {"name": "b", "forgetting_by_passage": [1.0]},
            ]
        },
    ],
)
def test_partial_content_never_raises(tmp_path: Path, content: dict[str, Any]) -> None:
    found = verdict(content, tmp_path / "nowhere")
    assert found["sentences"][0].startswith("No verdict: ")
    json.loads(strict_json(found))


def test_two_arms_of_one_method_have_names(tmp_path: Path) -> None:
    found = verdict(invent(tmp_path, {"lora": 1.0, "lora-2": 1.2}), tmp_path)
    assert found["sentences"][0].startswith("LoRA (lora) is best; LoRA (lora-2) is worse (by ")


def test_one_row_is_not_enough(tmp_path: Path) -> None:
    content = invent(tmp_path, {"lora": 1.0, "bitfit": 1.1})
    for run in content["runs"]:
        write_rows(tmp_path / run["rows_file"], read_rows(tmp_path / run["rows_file"])[1:2])
    found = verdict(content, tmp_path)
    assert found["sentences"][0] == "No verdict on judged_loss: it takes two rows at least."
