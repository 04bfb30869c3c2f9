"""Exports are proved on a GPU as on a CPU: PEFT's kernels and ours round within the rules there, too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks.exports.faults import wrong_prefix

from spectune import embedded
from spectune.data import collate, encode, load_rows
from spectune.deltas import Method, attach, merge_and_measure
from spectune.deltas.difference import own_rounding
from spectune.errors import ExportError
from spectune.methods import DoRA, LoRA, PrefixTuning, PromptTuning
from spectune.storage import expected_answers, load, prove_export, spread, write_model, write_peft, write_prompt_embeds

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore::FutureWarning")]
DEVICE = "cuda"


@pytest.mark.parametrize("method", [LoRA(), DoRA(), PrefixTuning(), PromptTuning()], ids=lambda method: method.name)
def test_exports_pass_and_what_does_nothing_is_refused(method: Method, tmp_path: Path) -> None:
    model, tokenizer = load("spectune-tiny", device=DEVICE, dtype="float32")
    delta = attach(model, method, "run")
    generator = torch.Generator(DEVICE).manual_seed(0)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, device=DEVICE) * 0.01)
    examples = spread(encode(load_rows(embedded.TEST), tokenizer, max_length=256).examples)
    expected = expected_answers(delta, [collate([example], 0) for example in examples])

    def rounding() -> float | None:
        return own_rounding(model, "run", [batch["input_ids"][0] for batch in expected.batches])

    write_peft(delta, tmp_path / "peft")
    print(prove_export(tmp_path / "peft", expected, own_rounding=rounding))
    if method.can_merge:
        merged, _ = merge_and_measure(model, "run", rows=examples)
        write_model(merged, tokenizer, tmp_path / "merged")
        print(prove_export(tmp_path / "merged", expected, own_rounding=rounding))
        wrong_prefix(tmp_path / "peft", tmp_path)
        with pytest.raises(ExportError, match="does nothing"):
            prove_export(tmp_path / "peft", expected, own_rounding=rounding)
    if method.name == "prompt":
        write_prompt_embeds(delta, tmp_path / "embeds")
        print(prove_export(tmp_path / "embeds", expected, own_rounding=rounding))
