"""`spectune export`: a run's delta in a form that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from spectune.cli import options
from spectune.cli.console import note, print_answer, say, work
from spectune.cli.heads import auto_class
from spectune.cli.merge import write_merged
from spectune.cli.runs import Run, find_run, free_folder
from spectune.errors import ConfigError

if TYPE_CHECKING:
    from spectune.deltas import Delta

Format = Literal["peft", "merged", "prompt-embeds"]


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
    as_json: options.Json = False,
) -> None:
    """Write a run's delta for other programs.

    \b
    peft           LoRA, prefix and prompt tuning as PEFT's folder, which PEFT loads (vLLM: LoRA)
    merged         LoRA, BitFit and full fine-tuning as a plain transformers folder, as `spectune merge` writes it
    prompt-embeds  prompt tuning as one tensor to put before the embedded text (vLLM, SGLang), with a README.md

    \b
    Examples:
      spectune export
      spectune export --format merged --run runs/2026-01-31-lora-1 --output-dir out/model
      spectune export --format prompt-embeds --dtype bfloat16
    """
    found = find_run(run)
    if format_ is not None:
        free_folder(output_dir, found.folder / f"export-{format_}")
    with work(as_json=as_json) as out:
        from spectune.deltas import attached

        note(f"run: {found.folder}")
        delta = attached(found.load(device, dtype)[0])["run"]
        chosen = _choose(delta, format_)
        folder = free_folder(output_dir, found.folder / f"export-{chosen}")
        if chosen == "merged":
            del delta  # merging loads its own, in its own dtype
            answer = write_merged(found, folder, data, device, dtype, out)
        else:
            answer = {"run": str(found.folder), "base": found.base, "format": chosen, "folder": str(folder)}
            answer["load"] = _write(chosen, found, delta, folder, dtype)
            say(out, f"written to {folder}\n{answer['load']}")
    print_answer(answer, as_json=as_json)


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


def _write(chosen: str, found: Run, delta: Delta, folder: Path, dtype: str | None) -> str:
    """Write the folder; returns how it is loaded."""
    from spectune.storage import load_config, write_peft, write_prompt_embeds

    if chosen == "peft":
        write_peft(delta, folder)
        more = "" if found.labels is None else f", num_labels={found.labels.num_labels}"
        return f"model = peft.AutoPeftModel{auto_class(found.labels)}.from_pretrained({str(folder)!r}{more})"
    # the dtype of the base's checkpoint, which is what an engine computes in, not that of this CPU
    own = None if dtype is not None else getattr(load_config(found.base), "dtype", None)
    write_prompt_embeds(delta, folder, own)
    return f"see {folder / 'README.md'}"
