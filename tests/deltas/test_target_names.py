"""Which linears a user's names mean: as PEFT has it, in bounded time, and nothing is dropped in silence."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel

from spectune.deltas import Search, attach, attached, checked_pattern, detach, exact_names, targets
from spectune.errors import ConfigError
from spectune.families import describe
from spectune.methods import LoRA
from tests.contract.families import SIZES, llama, opt

PATHS = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1, 10)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.experts.3.up_proj")
] + ["lm_head", "model.vision_tower.layers.0.self_attn.q_proj"]
#: nothing in it tells early that it cannot match: time doubles with each character
SLOW = r"(([a-z0-9_.]{1,50}){1,50}){1,50}[^a-z0-9_.]"

PIECES = st.sampled_from([
    "model", "layers", r"\.", ".", ".*", "[01]", r"\d+", "(q|k)_proj", "up_proj", "(?:mlp|self_attn)", ".+?", "?", "|",
    "[^.]*", "$", "^", "{1,2}", "{x}", r"(?!lm)", r"\w", "proj", "(?i:MODEL)", r"\{", "[{]",
])  # fmt: skip


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.lists(PIECES, min_size=1, max_size=7).map("".join))
def test_a_pattern_matches_what_pythons_re_matches(pattern: str) -> None:
    try:
        checked_pattern(pattern)
    except ValueError:
        return
    search = Search()
    for path in PATHS:
        assert search.whole(pattern, path) is (re.fullmatch(pattern, path) is not None), path
        assert search.end(pattern, path) is (re.match(rf"(.*\.)?({pattern})$", path) is not None), path


def test_what_compiles_otherwise_or_not_at_all_is_refused() -> None:
    for pattern in ("(", "*q_proj", "[[:alpha:]]+", "x" * 20_001, "(" * 5000 + "a" + ")" * 5000):
        for field, value in (
            ("target_modules", pattern),
            ("rank_pattern", {pattern: 2}),
            ("alpha_pattern", {pattern: 2.0}),
        ):
            with pytest.raises(ValidationError, match=r"no regular expression|characters|nested too deep"):
                LoRA(**{field: value})
    assert LoRA(target_modules=r".*\.(q|v)_proj").target_modules == r".*\.(q|v)_proj"


def test_all_paths_together_have_one_budget() -> None:
    """A pattern that takes nearly all of it on the first path is stopped on the second."""
    search = Search(seconds=0.2)
    paths = ["model.language_model.layers.10.self_attn.q_proj"] * 1000
    with pytest.raises(ConfigError, match=r"is not matched in 0\.2 seconds .*repeats what is repeated itself"):
        [path for path in paths if search.whole(SLOW, path)]
    with pytest.raises(ConfigError, match="not matched"):
        search.end(SLOW, "model.layers.1.mlp.experts.3.up_proj")


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("q_proj", r"regular expression for whole module paths, as in PEFT.*target_modules=\['q_proj'\]"),
        ("q_proj, v_proj", r"target_modules=\['q_proj', 'v_proj'\]"),
        ("(q_proj|self_attn.v_proj)", r"target_modules=\['q_proj', 'self_attn.v_proj'\]"),
        ("['down_proj']", r"target_modules=\['down_proj'\]"),
        ("all_linear", "did you mean 'all-linear'"),
        ("linear", "did you mean 'all-linear'"),
        (("all-linear",), "stands in a list; write it alone"),
        (("q_proj", "qproj"), "'qproj' matches no linear of this llama model; the nearest is 'q_proj'"),
        ("model.layers.9.self_attn.q_proj", r"matches the whole path of no linear.*the nearest is 'model\.layers"),
        (r"(.*\.)?(q_proj|lm_head)", r"also names lm_head \(the head\)"),
        (".*(q_proj|head)", r"also names lm_head \(the head\)"),
        (("q_proj", "lm_head"), r"also names lm_head \(the head\)"),
        (("q_proj", "embed_tokens"), r"also names model\.embed_tokens \(the token embeddings\)"),
    ],
)  # fmt: skip
def test_what_names_nothing_or_too_much_is_refused_in_words(wanted: str | tuple[str, ...], said: str) -> None:
    model = llama()
    with pytest.raises(ConfigError, match=said):
        attach(model, LoRA(target_modules=wanted), "task")
    assert not attached(model)


def test_a_projection_beside_the_layers_is_no_linear_of_theirs() -> None:
    model = opt()
    model.model.decoder.project_in = torch.nn.Linear(32, 32)
    with pytest.raises(ConfigError, match=r"also names model\.decoder\.project_in"):
        targets(describe(model), r".*(q_proj|project_in)")


def test_all_linear_may_be_written_in_capitals_as_in_peft() -> None:
    assert LoRA(target_modules="ALL-Linear") == LoRA()


def with_a_vision_tower() -> PreTrainedModel:
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    sizes = {**SIZES, "num_hidden_layers": 2}
    text = {**sizes, "head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    ).eval()


def test_names_that_another_tower_has_too_are_said_once_and_not_trained(caplog: pytest.LogCaptureFixture) -> None:
    model = with_a_vision_tower()
    first = attach(model, LoRA(target_modules=("q_proj",)), "a")
    attach(model, LoRA(target_modules=("q_proj",)), "b")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "also names 1 modules that text does not go through" in said[0]
    assert all("language_model" in site.path for site, _ in first.sites)
    detach(model, "a")
    with pytest.raises(ConfigError, match=r"'out_proj' names only modules that text does not go through"):
        attach(model, LoRA(target_modules=("q_proj", "out_proj")), "c")
    caplog.clear()
    attach(model, LoRA(target_modules=r".*language_model.*q_proj"), "d")
    attach(model, LoRA(), "e")
    assert not caplog.records


NAMES = st.lists(st.sampled_from(["a", "b", "q", "0", "1"]), min_size=1, max_size=4).map(".".join)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.sets(NAMES, min_size=1, max_size=6), st.sets(NAMES, max_size=8))
def test_exact_names_match_the_wanted_and_no_other(wanted: set[str], others: set[str]) -> None:
    """By PEFT's own rule: equal, or the end after a dot; a text is a pattern for whole paths."""
    names = exact_names(sorted(wanted), others - wanted)

    def named(path: str) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, path) is not None
        return path in names or any(path.endswith(f".{name}") for name in names)

    assert {path for path in wanted | others if named(path)} == wanted
