"""Prompts of requests as token ids, and the room behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spectune.errors import ConfigError, SpectuneError
from spectune.serving.api_error import invalid
from spectune.serving.bounds import Bounds
from spectune.serving.wanted import Wanted

if TYPE_CHECKING:
    from spectune.data.asking import PromptForm
    from spectune.data.encoding import RowEncoder
    from spectune.serving.loaded import Loaded

#: characters that a token stands for at most, as a bound: a longer text is not even tokenized
_CHARACTERS = 128


class AskedPrompts:
    """Makes ids of prompts; on one thread."""

    def __init__(self) -> None:
        self._encoders: dict[tuple[Any, ...], RowEncoder] = {}

    def ids(self, loaded: Loaded, wanted: Wanted, form: PromptForm) -> list[tuple[int, ...]]:
        """Token ids of the prompts of a request. Raises ApiError."""
        part = _part(wanted)
        try:
            return [self._one(loaded, wanted, form, number) for number in range(len(wanted.prompts or (None,)))]
        except SpectuneError as error:
            folder = f" ({loaded.tokenizer.name_or_path})"  # nothing of the server's files
            raise invalid(str(error).replace(folder, ""), part, "invalid_prompt") from error

    def _one(self, loaded: Loaded, wanted: Wanted, form: PromptForm, number: int) -> tuple[int, ...]:
        from spectune.data.asking import asked_ids

        if wanted.messages is not None:
            _check_length(loaded, sum(len(str(m.get("content") or "")) for m in wanted.messages), wanted)
            row = form.chat(list(wanted.messages), loaded.tokenizer)
            return tuple(asked_ids(row, self._encoder(loaded, form)))
        prompt = (wanted.prompts or ())[number]
        if isinstance(prompt, tuple):
            return _checked(prompt, loaded.vocabulary)
        _check_length(loaded, len(prompt), wanted)
        return tuple(asked_ids(form.prompt(prompt, f"prompt {number + 1}"), self._encoder(loaded, form)))

    def _encoder(self, loaded: Loaded, form: PromptForm) -> RowEncoder:
        """One for all deltas whose rows were made into text in the same way."""
        key = (form.separator, form.train_on, form.template_date)
        if key not in self._encoders:
            self._encoders[key] = form.encoder(loaded.tokenizer)
        return self._encoders[key]


def room_for(loaded: Loaded, wanted: Wanted, prompt: int, bounds: Bounds) -> int:
    """How many tokens may follow a prompt of so many. Raises ApiError: not so many as are wanted."""
    most, asked = loaded.context, wanted.max_tokens
    if most is not None and prompt + (asked or 1) > most:
        part = _part(wanted)
        raise invalid(
            f"this model's context is {most:,} tokens, and {prompt + (asked or 1):,} were requested ({prompt:,} in "
            f"the {part}, {asked or 1:,} for the answer); shorten the {part}, or ask for fewer", part,
            "context_length_exceeded",
        )  # fmt: skip
    room = bounds.max_new_tokens if most is None else min(bounds.max_new_tokens, most - prompt)
    return room if asked is None else asked


def _part(wanted: Wanted) -> str:
    return "messages" if wanted.chat else "prompt"


def _check_length(loaded: Loaded, characters: int, wanted: Wanted) -> None:
    if loaded.context is not None and characters > loaded.context * _CHARACTERS:
        raise invalid(
            f"the {_part(wanted)} has {characters:,} characters, more than this model's context of "
            f"{loaded.context:,} tokens holds", _part(wanted), "context_length_exceeded",
        )  # fmt: skip


def _checked(ids: tuple[int, ...], vocabulary: int) -> tuple[int, ...]:
    wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise ConfigError(f"prompt holds the token id {wrong}; expected ids from 0 to {vocabulary - 1}")
    return ids
