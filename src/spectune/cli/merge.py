"""`spectune merge`: a run's delta written into its base, as a plain transformers folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectune.cli import options
from spectune.cli.console import note, print_answer, say, work
from spectune.cli.heads import auto_class
from spectune.cli.input_rows import row_length, rows_to_measure
from spectune.cli.runs import Run, find_run, free_folder
from spectune.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

#: Merging in lower precision mostly rounds the delta away, and is refused then; a merged model can be cast later.
DTYPE = "float32"


def merge(
    run: options.Run = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder to write.", show_default="merged/ in the run's folder")
    ] = None,
    data: options.ComparedOn = None,
    device: options.Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="auto, float32, bfloat16 or float16: dtype of the merge and of the written model.", show_default=DTYPE
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Merge a run's delta into its base: a transformers folder with the tokenizer, which loads without spectune.

    The merged model's logits are compared with the unmerged one's, on rows, and it is refused where they differ by
    more than rounding. LoRA and BitFit can be merged; a fully tuned base is copied.

    \b
    Examples:
      spectune merge
      spectune merge --run runs/2026-01-31-lora-1 --output-dir out/model
      spectune merge --data test.jsonl --json
    """
    found = find_run(run)
    folder = free_folder(output_dir, found.folder / "merged")
    with work(as_json=as_json) as out:
        from spectune.storage import stored_method

        method = stored_method(found.delta)
        if not method.can_merge:
            raise ConfigError(
                f"the run {found.folder} is {method.label}, which cannot be merged: it does not act as a change of the "
                f"base's weights. For other engines: spectune export --run {found.folder}"
            )
        note(f"run: {found.folder}")
        answer = write_merged(found, folder, data, device, dtype, out)
    print_answer(answer, as_json=as_json)


def write_merged(
    found: Run, folder: Path, data: str | None, device: str | None, dtype: str | None, out: Console
) -> dict[str, Any]:
    """Merge, compare, write, and say so; also for `export --format merged`. The method is one that can merge."""
    from spectune import storage

    answer: dict[str, Any] = {"run": str(found.folder), "base": found.base, "format": "merged", "folder": str(folder)}
    if storage.stored_method(found.delta).trains_base and dtype is None:
        storage.copy_model(found.delta, storage.load_tokenizer(found.base), folder)
        say(out, "copied: the run trained the base itself, and its weights are written bit for bit")
    else:
        answer |= _merge(found, folder, data, device, dtype or DTYPE, out)
    answer["load"] = f"model = transformers.AutoModel{auto_class(found.labels)}.from_pretrained({str(folder)!r})"
    say(out, f"written to {folder}\n{answer['load']}")
    return answer


def _merge(found: Run, folder: Path, data: str | None, device: str | None, dtype: str, out: Console) -> dict[str, Any]:
    from spectune.data import encode
    from spectune.deltas import merge_and_measure
    from spectune.storage import write_model

    rows, source = rows_to_measure(data, found)
    model, tokenizer = found.load(device, dtype)
    max_length = row_length(model, found.config.get("max_length"))
    encoded = encode(rows, tokenizer, max_length=max_length, labels=found.labels, **found.encode_options)
    merged, difference = merge_and_measure(model, "run", rows=encoded.examples, tokenizer=tokenizer)
    write_model(merged, tokenizer, folder)
    if difference is None:
        return {}
    say(out, f"rows: {source}\n{difference}")
    return {
        "largest_logit_difference": difference.largest, "largest_logit": difference.largest_logit,
        "mean_logit_difference": difference.mean, "mean_logit_effect": difference.mean_effect,
        "own_rounding_of_logits": difference.own_rounding, "measured_on": f"{difference.measured_on} of {source}",
    }  # fmt: skip
