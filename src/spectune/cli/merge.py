"""`spectune merge`: a run's delta written into its base, as a plain transformers folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectune.cli import options
from spectune.cli.console import note, print_answer, say, work
from spectune.cli.heads import auto_class
from spectune.cli.proving import DTYPE, Proving, proved_folder, unproved
from spectune.cli.runs import find_run, free_folder
from spectune.errors import ConfigError
from spectune.files.plain_text import command_line

if TYPE_CHECKING:
    from rich.console import Console


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
    check: options.Check = True,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_missing_weights: options.AllowMissingWeights = False,
    as_json: options.Json = False,
) -> None:
    """Merge a run's delta into its base: a transformers folder with the tokenizer, which loads without spectune.

    The merged model's logits are compared with the unmerged one's, on rows, and again as transformers loads them from
    the folder; it is refused where they differ by more than rounding. LoRA and BitFit can be merged; a fully tuned base
    is copied.

    \b
    Examples:
      spectune merge
      spectune merge --run runs/2026-01-31-lora-1 --output-dir out/model
      spectune merge --data test.jsonl --json
    """
    found = find_run(run).allowing(trust_remote_code, allow_missing_weights)
    folder = free_folder(output_dir, found.folder / "merged")
    with work(as_json=as_json) as out:
        from spectune.storage import stored_method

        method = stored_method(found.delta)
        if not method.can_merge:
            raise ConfigError(
                f"the run {found.folder} is {method.label}, which cannot be merged: it does not act as a change of the "
                f"base's weights. For other engines: {command_line('spectune', 'export', '--run', found.folder)}"
            )
        note(f"run: {found.folder}")
        answer = write_merged(Proving(found, data, device, dtype, check), folder, out)
    print_answer(answer, as_json=as_json)


def write_merged(proving: Proving, folder: Path, out: Console) -> dict[str, Any]:
    """Merge, compare, write, prove and say so; also for `export --format merged`. The method is one that can merge."""
    from spectune import storage

    found = proving.run
    answer: dict[str, Any] = {"run": str(found.folder), "base": found.base, "format": "merged", "folder": str(folder)}
    copied = storage.stored_method(found.delta).trains_base and proving.dtype is None
    fill = _copy if copied else _merge
    answer |= proved_folder(folder, lambda draft: fill(proving, draft, out))
    answer["load"] = f"model = transformers.AutoModel{auto_class(found.labels)}.from_pretrained({str(folder)!r})"
    say(out, f"written to {folder}\n{answer['load']}")
    return answer


def _copy(proving: Proving, folder: Path, out: Console) -> dict[str, Any]:
    """The weights of a run that trained the base itself, bit for bit."""
    from spectune import storage

    found = proving.run
    storage.copy_model(found.delta, found.tokenizer(), folder)
    say(out, "copied: the run trained the base itself, and its weights are written bit for bit")
    if not proving.check:
        return unproved()
    # in the dtype that they have
    stored = getattr(storage.load_config(folder), "dtype", None)
    model, tokenizer = proving.loaded(str(stored or DTYPE).removeprefix("torch."))
    expected = proving.expected(model, *proving.examples(model, tokenizer))
    del model, tokenizer
    return proving.prove(folder, expected, out)


def _merge(proving: Proving, folder: Path, out: Console) -> dict[str, Any]:
    """The delta written into its base, compared before it is written and after."""
    from spectune.deltas import merge_and_measure
    from spectune.storage import write_model

    # lower precision mostly rounds the delta away, and is refused then; a merged model can be cast later
    model, tokenizer = proving.loaded()
    if not proving.check:
        merged, _ = merge_and_measure(model, "run", check=False)
        write_model(merged, tokenizer, folder)
        return unproved()
    examples, source = proving.examples(model, tokenizer)
    merged, difference = merge_and_measure(model, "run", rows=examples, tokenizer=tokenizer)
    write_model(merged, tokenizer, folder)
    expected = proving.expected(model, examples, source)
    del merged, model, tokenizer
    answer = {}
    if difference is not None:
        say(out, f"rows: {source}\n{difference}")
        answer = {
            "largest_logit_difference": difference.largest, "largest_logit": difference.largest_logit,
            "mean_logit_difference": difference.mean, "mean_logit_effect": difference.mean_effect,
            "own_rounding_of_logits": difference.own_rounding, "measured_on": f"{difference.measured_on} of {source}",
        }  # fmt: skip
    return answer | proving.prove(folder, expected, out)
