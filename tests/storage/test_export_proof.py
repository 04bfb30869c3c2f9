"""An export is run by the program that it is for: good ones pass, what does nothing or something else is refused."""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.exports.cases import METHODS, TYPES, attached, batches, formats, save_base, write
from benchmarks.exports.faults import FAULTS, targets_miss_a_linear, wrong_prefix, zeros
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from spectune.data import collate, encode, load_rows
from spectune.deltas import attach, detach, route
from spectune.deltas.difference import own_rounding
from spectune.errors import ConfigError, ExportError
from spectune.evaluation import row_losses
from spectune.methods import LoRA, PromptTuning
from spectune.storage import ExportProof, expected_answers, prove_export, quantise_base, spread, write_peft
from tests.support import make_model, make_rows, make_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning"),
]

#: a type and its methods: Conv1D and a tied head, separate projections, and a text model inside one of images
PLANTED = [
    ("gpt2", ["lora", "dora", "prompt", "bitfit", "full"]),
    ("llama", ["rslora", "prefix", "full"]),
    pytest.param("gemma3", ["lora"], marks=pytest.mark.slow),
]
#: for good exports alone
GOOD = [("gpt_neox", ["lora", "prompt"]), ("phi3", ["lora", "dora"]), ("opt", ["lora", "bitfit", "prefix"]),
        ("mixtral", ["lora"]), ("qwen3", ["prefix", "rslora"])]  # fmt: skip


def check(model_type: str, methods: list[str], root: Path, *, planted: bool) -> tuple[int, int]:
    """Every export of the type's methods passes, every fault that can be made of one is refused; how many of each."""
    kind = save_base(model_type, root / "base")
    good = caught = 0
    for method in methods:
        for format_ in formats(attached(kind, root / "base", METHODS[method])):
            delta = attached(kind, root / "base", METHODS[method])
            folder, bad = root / f"{method}-{format_}", root / "bad"
            expected = write(delta, format_, folder)
            proof = prove_export(folder, expected)
            assert proof.largest <= 1e-5 * proof.largest_logit
            assert proof.mean_effect > 100 * proof.mean
            assert proof.loss_change == pytest.approx(0, abs=1e-5)
            good += 1
            for fault in FAULTS[format_] if planted else ():
                shutil.rmtree(bad, ignore_errors=True)
                shutil.copytree(folder, bad)
                if fault(bad, root / "base"):
                    with pytest.raises(ExportError):
                        prove_export(bad, expected)
                    caught += 1
    return good, caught


@pytest.mark.parametrize(("model_type", "methods"), PLANTED)
def test_good_exports_pass_and_planted_faults_are_refused(model_type: str, methods: list[str], tmp_path: Path) -> None:
    good, caught = check(model_type, methods, tmp_path, planted=True)
    assert good >= len(methods)
    assert caught >= 6 * good


@pytest.mark.parametrize(("model_type", "methods"), GOOD)
def test_good_exports_of_other_families_pass(model_type: str, methods: list[str], tmp_path: Path) -> None:
    assert check(model_type, methods, tmp_path, planted=False)[0] >= len(methods)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_no_false_alarm_and_no_fault_missed(model_type: str, tmp_path: Path) -> None:
    from benchmarks.exports.__main__ import lines_of

    lines = list(lines_of(model_type, list(METHODS)))
    wrong = [line for line in lines if line["outcome"] in ("passed", "refused")]
    wrong = [line for line in wrong if (line["outcome"] == "refused") != ("fault" in line)]
    assert not wrong


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, Any]:
    """A LoRA of gpt2 in PEFT's layout, and what it has to answer."""
    kind = save_base("gpt2", tmp_path / "base")
    delta = attached(kind, tmp_path / "base", METHODS["lora"])
    return tmp_path / "lora", write(delta, "peft", tmp_path / "lora")


def test_a_refusal_says_what_differs_what_the_program_said_and_what_to_do(exported: tuple[Path, Any]) -> None:
    folder, expected = exported
    wrong_prefix(folder, folder)
    with pytest.raises(ExportError) as refused:
        prove_export(folder, expected)
    text = str(refused.value)
    for words in ("does nothing: with PEFT", "as the bare base", "largest logit difference", "nats per token",
                  "missing adapter keys", "another format", "spectune.load_delta"):  # fmt: skip
        assert words in text
    assert refused.value.exit_code == 1


def test_without_peft_it_is_read_back_and_that_is_said(
    exported: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = exported
    monkeypatch.setitem(sys.modules, "peft", None)
    proof = prove_export(folder, expected)
    assert "PEFT itself has not run this folder" in str(proof)
    assert "pip install peft" in str(proof)
    zeros(folder, folder)
    with pytest.raises(ExportError, match="does nothing: with spectune's own reader"):
        prove_export(folder, expected)


def test_losses_are_those_of_whole_rows_and_logits_those_of_their_last_positions(tmp_path: Path) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    (tmp_path / "rows.txt").write_text("")
    examples = encode(load_rows(make_rows(24)), tokenizer, max_length=64).examples
    delta = attach(model, PromptTuning(num_virtual_tokens=3), "run")
    chosen = spread(examples, 5)
    assert [examples.index(example) for example in chosen] == [0, 4, 9, 14, 19]
    found = expected_answers(delta, [collate([example], 0) for example in chosen], "24 rows")
    assert found.measured_on.startswith("5 of 24 rows (")
    assert found.tuned_loss == pytest.approx(row_losses(model, chosen, 0).mean_per_token, rel=1e-6)
    with route(model, None):
        assert found.bare_loss == pytest.approx(row_losses(model, chosen, 0).mean_per_token, rel=1e-6)
    long = torch.arange(61)[None]
    kept = expected_answers(delta, [{"input_ids": long, "attention_mask": torch.ones_like(long), "labels": long}])
    with torch.no_grad():
        assert torch.equal(kept.tuned[0], model(input_ids=long, attention_mask=torch.ones_like(long)).logits[0][-64:])
    detach(model, "run")


def test_what_cannot_be_proved_is_said_before(tmp_path: Path) -> None:
    model = make_model()
    delta = attach(model, LoRA(r=2), "run")
    with pytest.raises(ConfigError, match="have none that can be encoded"):
        expected_answers(delta, [], "the rows of x.jsonl")
    high = torch.tensor([[1, 300]])
    with pytest.raises(ConfigError, match="have token 300, this base has 300"):
        expected_answers(delta, [{"input_ids": high, "attention_mask": high, "labels": high}])
    write_peft(delta, tmp_path / "nameless")
    expected = expected_answers(delta, batches())
    with pytest.raises(ConfigError, match="this base was not loaded from a folder or the hub"):
        prove_export(tmp_path / "nameless", expected)
    with pytest.raises(ConfigError, match="holds nothing that can be run"):
        prove_export(tmp_path, expected)
    few = make_model()
    quantise_base(few, "int8", device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="is quantised"):
        expected_answers(attach(few, LoRA(r=2), "run"), batches())


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered.*:UserWarning")
def test_on_a_checkpoint_in_four_bits_it_is_proved_there(tmp_path: Path) -> None:
    """Its reader has it in four bits too; two right programs differ in what they round."""
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")
    four_bits = BitsAndBytesConfig(load_in_4bit=True)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=four_bits, dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    delta = attached(LlamaForCausalLM, tmp_path / "base", METHODS["lora"])
    expected = write(delta, "peft", tmp_path / "lora")
    assert not prove_export(tmp_path / "lora", expected).exact
    targets_miss_a_linear(tmp_path / "lora", tmp_path)
    with pytest.raises(ExportError, match=r"a mean of 1% of the delta's effect\."):
        prove_export(tmp_path / "lora", expected)


PROOF = ExportProof(
    engine="PEFT", measured_on="rows", exact=True, largest=1e-6, largest_logit=1.0, mean=1e-7, mean_effect=0.1,
    mean_from_base=0.1, loss=1.0, delta_loss=1.0, base_loss=2.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "same", "nothing"),
    [
        ({}, True, False),
        ({"largest": 2e-5}, False, False),
        ({"largest": 2e-5, "own_rounding": 1e-5}, True, False),
        ({"largest": 2e-5, "own_rounding": math.nan}, False, False),
        ({"largest": math.nan, "mean": math.nan}, False, False),
        # a delta that moves logits by less than the tolerance, left out
        ({"mean": 1e-6, "mean_effect": 1e-6, "mean_from_base": 0.0}, False, True),
        ({"largest": 0.0, "mean": 0.0, "mean_effect": 0.0, "mean_from_base": 0.0}, True, False),
        ({"exact": False, "largest": 0.1, "mean": 9e-4}, True, False),
        ({"exact": False, "largest": 0.1, "mean": 2e-3}, False, False),
    ],
)
def test_the_rules(changed: dict[str, float], same: bool, nothing: bool) -> None:
    proof = replace(PROOF, **changed)
    assert (proof.same, proof.does_nothing) == (same, nothing)


def test_rounding_is_asked_for_only_where_it_may_be_that(exported: tuple[Path, Any]) -> None:
    folder, expected = exported
    asked: list[int] = []

    def rounding() -> float:
        asked.append(1)
        return 1.0

    prove_export(folder, expected, own_rounding=rounding)
    assert not asked
    shifted = replace(expected, tuned=[logits + 3e-5 * expected.tuned[0].abs().max() for logits in expected.tuned])
    assert prove_export(folder, shifted, own_rounding=rounding).own_rounding == 1.0
    assert asked
    zeros(folder, folder)
    asked.clear()
    with pytest.raises(ExportError):
        prove_export(folder, expected, own_rounding=rounding)
    assert not asked


def test_own_rounding_of_a_delta_is_float64s_difference(tmp_path: Path) -> None:
    kind = save_base("llama", tmp_path / "base")
    delta = attached(kind, tmp_path / "base", METHODS["lora"])
    found = own_rounding(delta.model, "run", [batch["input_ids"][0] for batch in batches()])
    assert found is not None
    assert 0 < found < 1e-4
