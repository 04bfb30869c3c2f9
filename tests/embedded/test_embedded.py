"""The embedded base, its task and its retained passages, as they ship."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, GPT2LMHeadModel

from spectune import embedded
from spectune.storage import resolve_dtype

TOOLS = Path(__file__).parents[2] / "tools" / "embedded"
PARTS = {"train": embedded.TRAIN, "valid": embedded.VALID, "test": embedded.TEST}
SENTENCES = [
    "The king was born in London and died in the war.",
    "She opened the door and went into the room, where the old man was sitting by the fire.",
    "The city is the capital of the country and has a population of about one million people.",
]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(embedded.MODEL_FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(embedded.MODEL_FOLDER)


def test_everything_ships_within_12_megabytes() -> None:
    folder = Path(embedded.__file__).parent
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 12_000_000


def test_architecture(model: GPT2LMHeadModel) -> None:
    assert 3_000_000 <= sum(p.numel() for p in model.parameters()) <= 6_000_000
    assert model.config.vocab_size == 8192
    assert model.config.n_positions == 512
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_computes_in_float32_on_every_device() -> None:
    """In bfloat16 this base's gradients are noise in part: docs/decisions.md."""
    stored = json.loads((embedded.MODEL_FOLDER / "config.json").read_text(encoding="utf-8"))["dtype"]
    for device in ("cpu", "cuda"):
        assert resolve_dtype("auto", torch.device(device), stored) is torch.float32


def test_tokenizer(tokenizer: Any) -> None:
    assert len(tokenizer) == 8192
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    text = "Any text goes round: naïve café, 東京,\ttabs\n\nand  spaces."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_it_knows_english(model: GPT2LMHeadModel, tokenizer: Any) -> None:
    """Uniform guessing would cost ln 8192 = 9.01 nats per token."""
    for sentence in SENTENCES:
        words = sentence.rstrip(".").split()
        loss, shuffled = (_loss(model, tokenizer, text) for text in (sentence, " ".join(sorted(words)) + "."))
        assert loss < 4.5, sentence
        assert shuffled > loss + 1.0, "word order makes no difference"


def _loss(model: GPT2LMHeadModel, tokenizer: Any, text: str) -> float:
    ids = torch.tensor([[0, *tokenizer(text)["input_ids"]]])
    with torch.no_grad():
        logits = model(ids).logits
    return F.cross_entropy(logits[0, :-1], ids[0, 1:]).item()


@pytest.mark.parametrize(("part", "count"), [("train", 1200), ("valid", 200), ("test", 200)])
def test_rows(part: str, count: int, tokenizer: Any) -> None:
    part_rows = rows(PARTS[part])
    assert len(part_rows) == count
    for row in part_rows:
        assert row["prompt"].endswith("\n")
        assert row["completion"].endswith(".")
        assert row["completion"][0].isupper()
        if part != "train":
            references = row["references"]
            assert len(set(references)) == len(references) >= 2
            assert row["completion"] in references
    lengths = [len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) for row in part_rows]
    assert 30 <= sum(lengths) / count <= 45
    assert max(lengths) <= 70


def test_prompt_and_completion_split_where_the_tokens_do(tokenizer: Any) -> None:
    for row in rows(embedded.VALID):
        apart = tokenizer(row["prompt"])["input_ids"] + tokenizer(row["completion"])["input_ids"]
        assert apart == tokenizer(row["prompt"] + row["completion"])["input_ids"]


def test_no_record_is_in_two_parts() -> None:
    prompts = [row["prompt"] for path in PARTS.values() for row in rows(path)]
    assert len(set(prompts)) == len(prompts)


def test_sentences_say_what_the_record_says() -> None:
    for row in rows(embedded.VALID):
        for field in row["prompt"].strip().split(" | "):
            value = field.split(": ", 1)[1].lower()
            assert all(value in reference.lower() for reference in row["references"]), row


def test_generator_makes_the_committed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_data = _tool("make_data")
    assert sum(map(len, make_data.PLANS.values())) >= 30
    monkeypatch.setattr(sys, "argv", ["make_data.py", str(tmp_path)])
    make_data.main()
    for part, path in PARTS.items():
        assert (tmp_path / f"{part}_rows.jsonl").read_bytes() == path.read_bytes()


def _tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tools_embedded_{name}", TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_retained_passages_are_the_base_s_own(model: GPT2LMHeadModel, tokenizer: Any) -> None:
    passages = rows(embedded.RETAINED)
    assert len(passages) == 64
    ids = torch.tensor([passage["ids"] for passage in passages])
    assert ids.shape == (64, 128)
    assert (ids[:, 0] == 0).all()
    assert [tokenizer.decode(passage["ids"][1:]) for passage in passages] == [p["text"] for p in passages]
    with torch.no_grad():
        logs = torch.log_softmax(model(ids[:16, :-1]).logits, dim=-1)
    surprise = -logs.gather(-1, ids[:16, 1:, None]).mean()
    entropy = -(logs.exp() * logs).sum(-1).mean()
    # what a model draws from itself surprises it, on average, by its own entropy; other text surprises it more
    assert abs(surprise - entropy) < 0.15


def test_card_names_what_ships(model: GPT2LMHeadModel) -> None:
    card = (embedded.MODEL_FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"{sum(p.numel() for p in model.parameters()):,}" in card
    for word in ("CC BY-SA", "nats per token", "Limits"):
        assert word in card
