"""Every causal language model type of the installed transformers, whatever it is, works with a method or is refused in
words that docs/coverage.md knows."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import pytest
from benchmarks.coverage import heads
from benchmarks.coverage.bases import Bare, BaseFailsError, all_types, measure
from benchmarks.coverage.checks import METHODS, REFUSED, WORKS, Found, check
from benchmarks.coverage.configs import tiny_config
from benchmarks.coverage.driver import versions
from benchmarks.coverage.page import without_heads
from benchmarks.coverage.reasons import sort

from spectune.methods import BY_NAME
from tests.support.quick import others_slow

#: types of unlike structure, and what refuses each: all else works
FAST: dict[str, set[str]] = {
    "gpt2": set(),  # `Conv1D`, one projection for queries, keys and values, learned positions
    "llama": set(),  # rotary positions, no biases
    "bloom": {"prefix"},  # ALiBi, attention code of its own
    "gpt_neox": set(),  # attention and feed-forward in parallel, fused head by head
    "gpt_oss": set(),  # experts in 3-D parameters with biases, attention sinks, windows
    "deepseek_v3": set(),  # latent attention: keys wider than values, shared experts
    "longcat_flash": {"bitfit"},  # two attentions in a layer, a router used by its weight
    "gemma3": set(),  # a text model inside one for pictures
    "gemma3n_text": {"prompt", "bitfit"},  # shared keys and values, tables for each layer
    "mamba": {"prefix"},  # no attention at all
    "jamba": set(),  # attention in some layers
    "qwen3_next": set(),  # gated linear attention beside attention, experts
    "bart": set(),  # the decoder of an encoder-decoder: cross-attention that text does not reach
}
#: the ones with a site of their own; the two variants of LoRA and IA3 are among the slow ones
FAST_METHODS = ("adapter", "lora", "bitfit", "prompt", "prefix")


@lru_cache(maxsize=2)
def bare(model_type: str) -> Bare:
    return measure(model_type)


def hold(found: Found) -> None:
    """No defect, and no refusal but of a kind that the page explains."""
    assert found.status in (WORKS, REFUSED), "\n".join(found.problems)
    if found.status == REFUSED:
        assert sort(found.reason) is not None, found.reason


def test_every_method_is_checked() -> None:
    assert {method.name for method in METHODS.values()} == set(BY_NAME)


#: the others are held by the contract, or are like one of these in all but one thing
FIRST = ("gpt2", "bloom", "gpt_oss", "deepseek_v3", "gemma3n_text", "mamba", "qwen3_next", "bart")


@pytest.mark.parametrize("model_type", others_slow([t for t in FAST if t in all_types()], FIRST))
def test_types_of_unlike_structure(model_type: str) -> None:
    for case in FAST_METHODS:
        found = check(model_type, case, bare(model_type))
        hold(found)
        assert (found.status == REFUSED) is (case in FAST[model_type]), (case, found.reason)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", all_types())
def test_every_type_works_or_is_refused(model_type: str) -> None:
    try:
        base = bare(model_type)
    except BaseFailsError as error:
        pytest.skip(f"the bare base does not run: {error}")
    for case in METHODS:
        hold(check(model_type, case, base))


def test_a_type_that_nobody_has_heard_of_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that transformers adds tomorrow: built from its default config, in which layers differ."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    class TomorrowConfig(LlamaConfig):
        model_type = "tomorrow"

        def __init__(self, **settings: object) -> None:
            super().__init__(**{"num_hidden_layers": 30, "attention_bias": True, **settings})

    class TomorrowForCausalLM(LlamaForCausalLM):
        config_class = TomorrowConfig

    AutoConfig.register("tomorrow", TomorrowConfig, exist_ok=True)
    AutoModelForCausalLM.register(TomorrowConfig, TomorrowForCausalLM, exist_ok=True)
    config = tiny_config("tomorrow")
    assert (config.num_hidden_layers, config.hidden_size, config.attention_bias) == (3, 32, True)
    assert tiny_config("llama").num_hidden_layers == 3
    for case in ("lora", "prefix"):
        found = check("tomorrow", case, measure("tomorrow"))
        assert found.status == WORKS, found.problems


def test_the_checks_see_a_method_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A site whose hook does not act, and a count that is wrong, are defects and no success."""
    from spectune.deltas.hooks.output import OutputHook
    from spectune.methods import LoRA

    base = bare("llama")
    with monkeypatch.context() as patch:
        patch.setattr(OutputHook, "run", lambda *_: None)
        found = check("llama", "lora", base)
        assert found.status != WORKS
    with monkeypatch.context() as patch:
        patch.setattr(LoRA, "num_parameters", lambda self, family: 1)
        found = check("llama", "lora", base)
        assert any("counts" in problem for problem in found.problems)


PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"


def test_the_page_keeps_what_was_promised() -> None:
    text = without_heads(PAGE.read_text())
    rows = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in text.splitlines()
            if line.startswith("|")}  # fmt: skip
    works = dict(zip(rows[""], map(int, rows["works"]), strict=True))
    assert all(works[method] >= 170 for method in ("adapter", "lora", "bitfit", "prompt"))
    assert works["prefix"] >= 130
    assert "defect" not in text.lower()
    assert "refused (?)" not in text
    if f"transformers {versions()['transformers']})" in text:
        assert set(all_types()) <= set(rows)
    for number in map(int, re.findall(r"refused \((\d+)\)", text)):
        assert f"**{number}.**" in text


def test_the_page_keeps_what_was_promised_of_heads() -> None:
    whole = PAGE.read_text()
    texts, words = whole[len(without_heads(whole)) :].split("### TOKEN_CLS")
    assert "defect" not in whole.lower()
    for part, least in ((texts, 60), (words, 58)):
        [row] = [line for line in part.splitlines() if line.startswith("| works |")]
        assert int(row.split("|")[2]) >= least


@pytest.mark.parametrize(("task", "model_type"), [("SEQ_CLS", "gemma3"), ("TOKEN_CLS", "gpt_neox")])
def test_a_head_is_checked_as_on_the_page(task: str, model_type: str) -> None:
    assert heads.check(task, model_type, "lora")["status"] == WORKS
    assert heads.check("SEQ_CLS", "bert", "lora")["status"] == REFUSED
