"""What ships with the package: small, whole, reproducible, and a language model."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune import embedded
from spectune.data import encode, load_rows
from spectune.evaluation import row_losses
from spectune.storage import load

TOOLS = Path(__file__).parents[2] / "tools" / "embedded"
CARD = embedded.MODEL_FOLDER / "README.md"


@pytest.fixture(scope="module")
def base() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load("spectune-tiny")


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_at_most_12_megabytes() -> None:
    folder = Path(embedded.__file__).parent
    assert (
        sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts) <= 12_000_000
    )


def test_shape(base: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = base
    weights = sum(p.numel() for p in model.parameters())
    assert 3_000_000 <= weights <= 6_000_000
    assert f"{weights:,} weights" in CARD.read_text()
    assert model.config.model_type == "gpt2"
    assert model.config.n_positions == 512
    assert len(tokenizer) == model.config.vocab_size == 8192
    assert any(name.endswith("bias") for name, _ in model.named_parameters())


def test_it_knows_english(base: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    """A sentence in order is far likelier than its words shuffled."""
    model, tokenizer = base
    text = "The old man sat down by the fire and looked at the letter in his hand."
    words = text.split()
    shuffled = " ".join(words[::2] + words[1::2])
    losses = []
    for sentence in (text, shuffled):
        examples = encode(load_rows([{"text": sentence}]), tokenizer, max_length=64).examples
        losses.append(row_losses(model, examples, 0).mean_per_token)
    assert losses[0] < 5.0
    assert losses[0] + 1.0 < losses[1]


def test_the_card_says_what_it_must() -> None:
    card = CARD.read_text()
    for part in ("Held-out loss", "licences", "tokens", "CC BY-SA", "temperature"):
        assert part in card, part


def test_data_is_what_the_script_makes() -> None:
    made = tool("make_data").make()
    for part, path in (("train", embedded.TRAIN), ("valid", embedded.VALID), ("test", embedded.TEST)):
        expected = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made[part])
        assert path.read_text(encoding="utf-8") == expected
    assert [len(made[part]) for part in ("train", "valid", "test")] == [1200, 200, 200]
    assert sum(len(plans) for plans in tool("make_data").PLANS.values()) >= 30


def test_no_record_is_in_two_parts() -> None:
    prompts = [{str(row["prompt"]) for row in read(p)} for p in (embedded.TRAIN, embedded.VALID, embedded.TEST)]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == 1600


def test_references() -> None:
    for path in (embedded.VALID, embedded.TEST):
        for row in read(path):
            references = row["references"]
            assert isinstance(references, list)
            assert row["completion"] in references
            assert len(references) >= 2


def test_retained_passages(base: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = base
    passages = read(embedded.RETAINED)
    assert len(passages) == 64
    for passage in passages:
        ids = passage["ids"]
        assert isinstance(ids, list)
        assert len(ids) == 128
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == passage["text"]
    # the base finds its own text about as likely as its entropy: far likelier than random tokens
    ids = torch.tensor([passage["ids"] for passage in passages[:8]])
    with torch.no_grad():
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert loss < 6.0
