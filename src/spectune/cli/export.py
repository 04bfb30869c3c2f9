"""`spectune export`: a run's delta in a form that other programs load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from spectune.cli import options
from spectune.cli.console import note, print_answer, say, work
from spectune.cli.heads import auto_class
from spectune.cli.merge import write_merged
from spectune.cli.proving import Proving, proved_folder, unproved
from spectune.cli.runs import find_run, free_folder
from spectune.errors import ConfigError
from spectune.files.plain_text import command_line

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from spectune.deltas import Delta

#: https://github.com/vllm-project/vllm/issues/48019, 40307
_VLLM = (
    "this base holds a text model inside another: vLLM is known to leave LoRA out there, in silence. vLLM has not run "
    "this folder; ask it about a row of yours with and without, or export --format merged"
)

Format = Literal["peft", "merged", "prompt-embeds", "gguf-lora"]


def export(
    run: options.Run = None,
    format_: Annotated[
        Format | None, typer.Option("--format", help="What to write.", show_default="peft, where the method has it")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder to write.", show_default="export-<format>/ in the run's folder")
    ] = None,
    data: options.ComparedOn = None,
    device: options.Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="auto, float32, bfloat16 or float16: dtype of merged and prompt-embeds.",
            show_default="float32 for merged, the base's own for prompt-embeds",
        ),
    ] = None,
    check: options.Check = True,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_missing_weights: options.AllowMissingWeights = False,
    as_json: options.Json = False,
) -> None:
    """Write a run's delta for other programs, and prove it.

    What was written is run by the program that it is for, over rows of the run, before it gets its name: an export that
    does nothing, or answers otherwise than the run, is refused.

    \b
    peft           LoRA, prefix and prompt tuning as PEFT's folder, which PEFT loads (vLLM: LoRA); run by PEFT
    merged         LoRA, BitFit and full fine-tuning as a plain transformers folder, as `spectune merge` writes it
    prompt-embeds  prompt tuning as one tensor to put before the embedded text (vLLM, SGLang), with a README.md
    gguf-lora      LoRA as llama.cpp's adapter file (needs the package gguf); read back, llama.cpp is not run

    \b
    Examples:
      spectune export
      spectune export --format merged --run runs/2026-01-31-lora-1 --output-dir out/model
      spectune export --format prompt-embeds --dtype bfloat16
      spectune export --format gguf-lora --json
    """
    found = find_run(run).allowing(trust_remote_code, allow_missing_weights)
    if format_ is not None:
        free_folder(output_dir, found.folder / f"export-{format_}")
    with work(as_json=as_json) as out:
        if format_ == "gguf-lora":
            from spectune.storage import gguf_package

            gguf_package()  # what is missing is said before a base is loaded
        note(f"run: {found.folder}")
        proving = Proving(found, data, device, dtype, check)
        answer = _written(proving, format_, output_dir, out)
    print_answer(answer, as_json=as_json)


def _written(proving: Proving, wanted: Format | None, output_dir: Path | None, out: Console) -> dict[str, Any]:
    """Write and prove; for JSON. The base is given up before what was written is run."""
    from spectune.deltas import attached

    found = proving.run
    # PEFT's folder holds float32 weights whatever the base is, and lower precision would hide what differs
    here = proving if wanted == "prompt-embeds" else replace(proving, dtype="auto" if wanted == "gguf-lora" else None)
    model, tokenizer = here.loaded()
    delta = attached(model)["run"]
    chosen = _choose(delta, wanted)
    folder = free_folder(output_dir, found.folder / f"export-{chosen}")
    if chosen == "merged":
        del delta, model, tokenizer  # merging loads its own, in its own dtype
        return write_merged(proving, folder, out)
    answer = {"run": str(found.folder), "base": found.base, "format": chosen, "folder": str(folder)}
    expected = None
    if proving.check and chosen != "gguf-lora":
        expected = here.expected(model, *here.examples(model, tokenizer))
    wraps_text = model.config.get_text_config() is not model.config
    # held here and nowhere else, so that it is given up there
    held = [delta]
    del delta, model, tokenizer

    def fill(draft: Path) -> dict[str, Any]:
        written = held.pop()
        if chosen == "gguf-lora":
            return _gguf(written, draft, proving.check, out)
        _write(chosen, written, draft, _tensor_dtype(proving))
        del written
        return unproved() if expected is None else here.prove(draft, expected, out)

    answer |= proved_folder(folder, fill) | {"load": _how(chosen, folder, proving)}
    say(out, f"written to {folder}\n{answer['load']}")
    if chosen == "peft" and wraps_text:
        note(_VLLM)
    return answer


def _choose(delta: Delta, wanted: str | None) -> str:
    """The format asked for, or the first that the method has."""
    from spectune.storage import check_format, export_formats

    if wanted is not None:
        check_format(delta, wanted)
        return wanted
    if formats := export_formats(delta):
        return formats[0]
    raise ConfigError(
        f"{delta.method.label} has no form that other programs load: PEFT has no such method, and it cannot be "
        "merged. Keep the run's best/, and load it with spectune.load_delta."
    )


def _write(chosen: str, delta: Delta, folder: Path, dtype: torch.dtype) -> None:
    from spectune.storage import write_peft, write_prompt_embeds

    if chosen == "peft":
        write_peft(delta, folder)
    else:
        write_prompt_embeds(delta, folder, dtype)


def _gguf(delta: Delta, folder: Path, check: bool, out: Console) -> dict[str, Any]:
    from spectune.storage import prove_gguf_lora, write_gguf_lora

    write_gguf_lora(delta, folder)
    if not check:
        return unproved()
    proof = prove_gguf_lora(folder, delta)
    say(out, str(proof))
    return {"proof": proof.as_dict()}


def _tensor_dtype(proving: Proving) -> torch.dtype:
    """Of prompt embeddings: that of the base's checkpoint, in which an engine computes, not that of this CPU."""
    from spectune.storage import load_config, resolve_device, resolve_dtype

    own = getattr(load_config(proving.run.base, trust_remote_code=proving.run.trust_remote_code), "dtype", None)
    if proving.dtype is None and own is not None:
        return resolve_dtype(own, resolve_device("cpu"))
    return resolve_dtype(proving.dtype or "float32", resolve_device(proving.device or "auto"), own)


def _how(chosen: str, folder: Path, proving: Proving) -> str:
    """How what was written is loaded."""
    labels = proving.run.labels
    # the base's checkpoint has no head, or one for other classes
    more = "" if labels is None else f", num_labels={labels.num_labels}"
    peft = f"model = peft.AutoPeftModel{auto_class(labels)}.from_pretrained({str(folder)!r}{more})"
    return {
        "peft": peft,
        "prompt-embeds": f"see {folder / 'README.md'}",
        "gguf-lora": command_line("llama-cli", "--model", "BASE.gguf", "--lora", folder / "adapter.gguf"),
    }[chosen]
