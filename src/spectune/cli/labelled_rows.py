"""What a run's head says of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spectune.cli.input_rows import row_length
from spectune.errors import DataError

if TYPE_CHECKING:
    from spectune.cli.runs import Run
    from spectune.data import Row


def labelled(
    run: Run, rows: list[Row], device: str | None, dtype: str | None, base_precision: str | None
) -> list[dict[str, Any]]:
    """A record of each row: its text, what the head says of it (`completion`), of classes how likely that is
    (`probability`), and its own label where it has one. Raises DataError: a row has no text."""
    from spectune.data import pad_token_id
    from spectune.data.head_encoding import HeadEncoder
    from spectune.data.problem import RowProblem
    from spectune.evaluation.judge_head import answers, asked_of, written
    from spectune.inference import head_outputs

    labels = run.labels
    assert labels is not None
    model, tokenizer = run.load(device, dtype, base_precision)
    how = {key: value for key, value in run.encode_options.items() if key != "train_on"}
    encoder = HeadEncoder(tokenizer, labels, longest=row_length(model, run.config.get("max_length")), **how)
    try:
        examples = encoder.unlabelled(rows)
    except RowProblem as problem:
        raise DataError(f"the prompts: {problem}") from problem
    found = []
    for example, output in zip(examples, head_outputs(model, examples, pad_token_id(tokenizer)), strict=True):
        record: dict[str, Any] = {"origin": example.row.origin, "prompt": asked_of(example)}
        record |= {"completion": written(answers(output, labels), labels), "references": _references(example.row)}
        if labels.names and example.label is not None:
            record["probability"] = round(float(output.softmax(-1).max()), 4)
        found.append(record)
    return found


def _references(row: Row) -> list[str]:
    import json

    from spectune.data.head_labels import label_of

    if row.tags is not None:
        return [json.dumps([str(tag) for tag in row.tags], ensure_ascii=False)]
    label = label_of(row)
    return [] if label is None else [str(label)]
