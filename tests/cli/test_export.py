"""`spectune export`: folders that PEFT, plain transformers and engines with prompt embeddings take."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.cli.test_merge import logits
from tests.support import make_model
from transformers import AutoModelForCausalLM

from spectune.deltas import attach
from spectune.methods import BY_NAME
from spectune.storage import export_formats, load, load_delta, write_prompt_embeds

Spectune = Callable[..., Any]
Trained = Callable[[str], Path]
IN_PEFT = ("lora", "prefix", "prompt")


@pytest.mark.parametrize("method", IN_PEFT)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_loads_the_folder(spectune: Spectune, trained: Trained, base: Path, method: str) -> None:
    run = trained(method)
    result = spectune("export", "--device", "cpu")  # peft is the usual one where the method has it
    assert result.exit_code == 0, result.stderr
    folder = run / "export-peft"
    assert f"run: {run}" in result.stderr
    assert f"model = peft.AutoPeftModelForCausalLM.from_pretrained('{folder}')" in result.stdout
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    known = peft.PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]
    assert set(config) <= {field.name for field in fields(known)}
    if method == "lora":  # what vLLM asks for
        assert {"r", "lora_alpha", "target_modules"} <= set(config)
    model, _ = load(base)
    load_delta(model, run / "best")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(str(folder)).eval()
    assert float((logits(theirs)[:, -12:] - logits(model)).abs().max()) <= 1e-5
    mine, _ = load(base)
    load_delta(mine, folder)
    assert torch.equal(logits(mine), logits(model))
    again = spectune("export")
    assert again.exit_code == 2
    assert "is not empty" in again.stderr


def test_every_method_has_the_formats_that_it_says() -> None:
    found = {name: export_formats(attach(make_model(), method(), keep_base=False)) for name, method in BY_NAME.items()}
    assert (
        found
        | {
            "full": ["merged"],
            "adapter": [],
            "prefix": ["peft"],
            "prompt": ["peft", "prompt-embeds"],
            "lora": ["peft", "merged", "gguf-lora"],
            "bitfit": ["merged"],
        }
        == found
    )


def test_merged(spectune: Spectune, trained: Trained, base: Path) -> None:
    run = trained("lora")
    answer = json.loads(spectune("export", "--format", "merged", "--json").stdout)
    assert (answer["format"], answer["folder"]) == ("merged", str(run / "export-merged"))
    assert answer["largest_logit_difference"] <= 1e-5 * answer["largest_logit"]
    model, _ = load(base)
    load_delta(model, run / "best")
    found = AutoModelForCausalLM.from_pretrained(run / "export-merged")
    assert float((logits(found) - logits(model)).abs().max()) <= 1e-5


def test_a_full_run_is_exported_merged(spectune: Spectune, trained: Trained) -> None:
    run = trained("full")
    result = spectune("export")
    assert result.exit_code == 0, result.stderr
    AutoModelForCausalLM.from_pretrained(run / "export-merged")


def test_prompt_embeds_before_the_text_on_the_bare_base(spectune: Spectune, trained: Trained, base: Path) -> None:
    run = trained("prompt")
    result = spectune("export", "--format", "prompt-embeds")
    assert result.exit_code == 0, result.stderr
    folder = run / "export-prompt-embeds"
    assert {path.name for path in folder.iterdir()} == {"prompt_embeds.safetensors", "README.md"}
    tensors = load_file(folder / "prompt_embeds.safetensors")
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {"prompt_embeds": [20, 16]}
    with safe_open(folder / "prompt_embeds.safetensors", "pt") as file:
        assert file.metadata()["base_model_name_or_path"] == str(base)

    ids = torch.arange(1, 25).reshape(2, 12)
    bare = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        text = bare.get_input_embeddings()(ids)
        together = torch.cat([tensors["prompt_embeds"].expand(2, -1, -1), text], dim=1)
        found = bare(inputs_embeds=together).logits[:, 20:]
    model, _ = load(base)
    load_delta(model, run / "best")
    assert float((found - logits(model)).abs().max()) <= 1e-5
    assert float((logits(bare) - found).abs().max()) > 1e-3

    page = (folder / "README.md").read_text()
    for words in (str(base), "enable_prompt_embeds=True", "input_embeds", "--disable-radix-cache"):
        assert words in page


def test_the_python_in_the_page_runs(spectune: Spectune, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained("prompt")
    assert spectune("export", "--format", "prompt-embeds", "--dtype", "bfloat16").exit_code == 0
    monkeypatch.chdir(run / "export-prompt-embeds")
    code = Path("README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["prompt"].shape == (20 + 3, 16)
    assert names["prompt"].dtype == torch.bfloat16


def test_the_tensor_has_the_bases_dtype(tmp_path: Path) -> None:
    model = make_model(dtype=torch.bfloat16)
    delta = attach(model, BY_NAME["prompt"](num_virtual_tokens=2), "p")
    write_prompt_embeds(delta, tmp_path / "out")
    assert load_file(tmp_path / "out" / "prompt_embeds.safetensors")["prompt_embeds"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("method", "format_", "words"),
    [
        ("bitfit", "peft", "BitFit has no format 'peft': PEFT has no such method. This one can be written as --format"),
        ("full", "peft", "Full has no format 'peft': PEFT has no such method."),
        ("adapter", "peft", "Keep its folder"),
        ("adapter", None, "Adapter has no form that other programs load"),
        (
            "prefix",
            "merged",
            "it does not act as a change of the base's weights. This one can be written as --format p",
        ),
        ("lora", "prompt-embeds", "it is not made of embeddings that stand before the text"),
        ("lora", "gguf", "'gguf' is not one of 'peft', 'merged', 'prompt-embeds', 'gguf-lora'"),
    ],
)
def test_refusals_are_in_words(
    spectune: Spectune, trained: Trained, method: str, format_: str | None, words: str
) -> None:
    run = trained(method)
    result = spectune("export", *(("--format", format_) if format_ else ()))
    assert result.exit_code == 2
    assert words in result.stderr
    assert not list(run.glob("export*"))
