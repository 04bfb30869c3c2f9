"""`spectune validate`: are the data good, and what will the loss be taken on?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectune.cli import options
from spectune.cli.checked_text import print_overlaps, print_part, print_rows
from spectune.cli.console import note, print_answer, work
from spectune.cli.heads import decided
from spectune.cli.input_rows import check_inputs, named, note_losses
from spectune.cli.settings import Settings, own_code
from spectune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from spectune.data import Rows
    from spectune.data.checked import Checked
    from spectune.training import TrainingConfig


def validate(
    context: typer.Context,
    data: options.Data = None,
    valid: options.Valid = None,
    test: Annotated[
        list[str] | None,
        typer.Option(help="Rows that a comparison is judged on. Repeatable.", show_default="none are checked"),
    ] = None,
    model: options.Model = None,
    config: options.Config = None,
    assignments: options.Set = None,
    task_type: options.TaskType = None,
    train_on: options.TrainOn = None,
    show: Annotated[int, typer.Option(min=0, help="Rows of each shape to show with what is learned of them.")] = 3,
    skip_bad_rows: options.SkipBadRows = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Check data against a base's tokenizer: show what is learned of a few rows, and count what is lost, doubled or
    shared between train, valid and test.

    What is learned is green on a terminal, and stands between [[ and ]] elsewhere; nothing else has a loss. All bad
    rows are listed at once with file:line; exit code 3. No weights are read.

    \b
    Examples:
      spectune validate --data train.jsonl --valid valid.jsonl --test test.jsonl --model gpt2
      spectune validate --data train.jsonl --set max_length=256 --set 'separator="\\n"' --show 10
      spectune validate --data chats.jsonl --model ./my-model --train-on last --json > checked.json
    """
    settings = Settings.collect(config, assignments, options.flags(context, own={"show"}))
    with work(as_json=as_json) as out:
        check_inputs(settings)
        from spectune.storage import load_tokenizer

        tokenizer = load_tokenizer(settings.base, **own_code(settings))
        parts = _checked(settings, tokenizer)
        overlaps = _overlaps(parts, settings.training())
        shown = parts[0].shown(show)
        for part in parts:
            note_losses(part.encoded.report, part.source)
        if not as_json:
            print_rows(out, shown, tokenizer)
            for part in parts:
                print_part(out, part)
            print_overlaps(out, overlaps)
    answer: dict[str, Any] = parts[0].to_dict()
    answer |= {"duplicates": {part.name: part.seen.repeats.to_dict() for part in parts}, "overlaps": overlaps}
    answer |= {part.name: part.to_dict() for part in parts[1:]}
    print_answer(answer | {"rows": [row.to_dict(tokenizer) for row in shown]}, as_json=as_json)


def _checked(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> list[Checked]:
    """Train, valid and test, as far as they are given. Raises ConfigError: the rows are chats, and the tokenizer has no
    chat template. Raises DataError: the bad rows of all parts at once."""
    from spectune.data.checked import check
    from spectune.storage import load_config
    from spectune.storage.descriptions import positions_of
    from spectune.training.config import DEFAULT_LENGTH

    chosen, base = (
        settings.training(),
        load_config(settings.base, **own_code(settings)),
    )
    length = chosen.max_length or min(positions_of(base) or DEFAULT_LENGTH, DEFAULT_LENGTH)
    how = {**chosen.encode_options, "vocab_size": getattr(base.get_text_config(), "vocab_size", None)}
    if how["vocab_size"] is not None and len(tokenizer) > how["vocab_size"]:
        note(f"{settings.base}: its tokenizer knows {len(tokenizer)} tokens, and its config.json {how['vocab_size']}")
    found, problems = list["Checked"](), list[DataError]()
    for name, (source, data) in _sources(settings).items():
        try:
            rows = _rows(data, chosen)
            if name == "train":
                how["labels"] = decided(settings, rows, base)
            _need_template(rows, tokenizer, settings)
            found.append(
                check(name, source, rows, tokenizer, skip_bad_rows=chosen.skip_bad_rows, max_length=length, how=how)
            )
        except DataError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise DataError("\n".join(map(str, problems)))
    return found


def _rows(data: Any, chosen: TrainingConfig) -> Rows:
    from spectune.data import load_rows

    try:
        return load_rows(data, **{**chosen.row_options, "skip_bad_rows": True})
    except DataError:  # no row is left: what is wrong with them is said where they are not to be skipped
        return load_rows(data, **chosen.row_options)


def _sources(settings: Settings) -> dict[str, tuple[str, Any]]:
    """By part where its rows are from, in words and as `load_rows` takes it."""
    from spectune import embedded

    given = {"train": settings.rows("data"), "valid": settings.rows("valid"), "test": settings.rows("test")}
    found = {name: (named(data), data) for name, data in given.items() if data is not None}
    if found:
        return found if "train" in found else {"train": ("the embedded training rows", embedded.TRAIN), **found}
    return {
        "train": ("the embedded training rows", embedded.TRAIN),
        "valid": ("the embedded validation rows", embedded.VALID),
        "test": ("the embedded test rows", embedded.TEST),
    }


def _need_template(rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> None:
    chat = next((row for row in rows if row.messages is not None), None)
    if chat is None or tokenizer.chat_template is not None:
        return
    whose = settings.base if settings.get("model") is not None else f"{settings.base}, which is taken without --model,"
    raise ConfigError(
        f"{chat.origin}: the row is a chat ({chat.shape}), and the tokenizer of {whose} has no chat template. Name the "
        "base that you will train with --model; if it has none, put one into a copy of its folder "
        "(chat_template.jinja), or write the rows as prompt and completion."
    )


def _overlaps(parts: list[Checked], chosen: TrainingConfig) -> list[dict[str, Any]]:
    """What each part has in common with those before it; where training holds out rows of its own, these with the
    rest."""
    from spectune.data import split_rows
    from spectune.data.overlaps import Seen

    found = []
    train, later = parts[0], parts[1:]
    doubled = train.seen.repeats.rows + train.seen.repeats.prompts > 0
    if all(part.name != "valid" for part in later) and doubled:
        rest, held = split_rows(train.rows, seed=chosen.seed)
        found.append({"of": "held out", "in": "train", "of_rows": len(held), **Seen(rest).repeated(held).to_dict()})
    for place, part in enumerate(later, start=1):
        for earlier in parts[:place]:
            repeats = earlier.seen.repeated(part.rows).to_dict()
            found.append({"of": part.name, "in": earlier.name, "of_rows": len(part.rows), **repeats})
    return found
