"""What a user types as a row that a model is asked with: in the form that the rows had which it was trained on.

One rule for `generate`, `chat` and `serve`: a prompt reaches the model exactly as a training row's prompt did.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spectune.data.problem import RowProblem
from spectune.data.shapes import Row, row_of, unencodable
from spectune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from spectune.data.encoding import RowEncoder

#: stands in the place of the answer that is to be written
_ANSWER = "-"
#: between a system message and what is asked, where the rows had no place for the former
_APART = "\n\n"


@dataclass(frozen=True)
class PromptForm:
    """How the rows of a run were made into prompts, as its config.yaml and training.json have it.

    Attributes:
        row_shape: the rows' shape; None of a model that no run trained: a prompt is text, and a chat goes through the
            chat template where the tokenizer has one.
        prompt_ends_with: white space that all prompts ended with.
        row_system, row_tools, row_template_kwargs: what all chats had in common.
        separator, train_on, template_date: see `spectune.data.encode`.
    """

    row_shape: str | None = None
    prompt_ends_with: str = ""
    row_system: str | None = None
    row_tools: list[Any] | None = None
    row_template_kwargs: dict[str, Any] | None = None
    separator: str = ""
    train_on: str = "all"
    template_date: str | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> PromptForm:
        """Of a run's settings; an empty mapping is a model as it is."""

        def text(key: str) -> str | None:
            return None if config.get(key) is None else str(config[key])

        return cls(
            config.get("row_shape"), text("prompt_ends_with") or "", text("row_system"), config.get("row_tools"),
            config.get("row_template_kwargs"), text("separator") or "", text("train_on") or "all",
            text("template_date"),
        )  # fmt: skip

    def prompt(self, typed: str, origin: str, note: Callable[[str], None] = lambda _: None) -> Row:
        """A typed prompt as a row without an answer.

        Args:
            origin: what the prompt is called in messages.
            note: is told what was done to it.

        Raises:
            ConfigError: it is no Unicode text, or not what such rows may be.
        """
        if (wrong := unencodable(typed)) is not None:
            raise ConfigError(f"{origin} holds {wrong}, which is no Unicode text; expected text in UTF-8")
        if self.row_shape == "messages":
            return self._question(origin, typed, note)
        if self.row_shape == "text":
            return Row(origin, text=typed)
        if self.row_shape == "tokens":
            return Row(origin, tokens=tuple(typed.split()), shape=self.row_shape)
        if self.row_shape == "alpaca":
            made = asked_row(origin, {"instruction": typed, "output": _ANSWER})
            note(f"{origin}: put into the form of an instruction, as every prompt in training was")
            return dataclasses.replace(made, completion="")
        prompt = self._ended(typed)
        if prompt != typed:
            note(f"{origin}: {prompt[len(typed) :]!r} is put at its end, as every prompt in training ended so")
        return Row(origin, prompt=prompt, completion="")

    def templated(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether a chat goes through the tokenizer's chat template; else its turns are prompts and completions."""
        if self.row_shape is None:
            return tokenizer.chat_template is not None
        return self.row_shape == "messages"

    def chat(self, messages: Sequence[Any], tokenizer: PreTrainedTokenizerBase, origin: str = "messages") -> Row:
        """A conversation that ends with what is to be answered, as a row without an answer.

        Where the model was trained on prompts and completions, the last message of the user is the prompt, earlier
        turns stand before it as the `history` of rows does, and a system message before the first of them.

        Raises:
            ConfigError: it is no conversation, does not end with a question, or has messages that such rows cannot.
        """
        spelled = [_current(message) for message in messages]
        whole = [*spelled, {"role": "assistant", "content": _ANSWER}]
        read = asked_row(origin, {"messages": whole}).messages or []
        asked = read[:-1]
        if not asked or asked[-1]["role"] == "assistant":
            last = f"end with {asked[-1]['role']!r}" if asked else "are none"
            raise ConfigError(f"{origin} {last}; expected the last one to be the user's (or a tool's): it is answered")
        if self.templated(tokenizer):
            if self.row_system is not None and asked[0]["role"] != "system":
                asked = [{"role": "system", "content": self.row_system}, *asked]
            return Row(origin, messages=asked, tools=self.row_tools, template_kwargs=self.row_template_kwargs)
        return self._turns(origin, asked)

    def encoder(self, tokenizer: PreTrainedTokenizerBase) -> RowEncoder:
        """Makes ids of rows by these conventions; worth keeping. Raises ConfigError: the tokenizer has no EOS."""
        from spectune.data.encoding import RowEncoder

        how: dict[str, Any] = {"separator": self.separator, "train_on": self.train_on, "today": self.template_date}
        return RowEncoder(tokenizer, **how)

    def _question(self, origin: str, typed: str, note: Callable[[str], None]) -> Row:
        """A user's message, behind the system message and with the tools that all chats in training had."""
        messages = [{"role": "user", "content": typed}]
        if self.row_system is not None:
            messages = [{"role": "system", "content": self.row_system}, *messages]
            note(f"{origin}: behind the system message that every chat in training began with")
        return Row(origin, messages=messages, tools=self.row_tools, template_kwargs=self.row_template_kwargs)

    def _turns(self, origin: str, asked: list[dict[str, Any]]) -> Row:
        system = [str(message["content"]) for message in asked if message["role"] == "system"]
        turns = [message for message in asked if message["role"] != "system"]
        wanted = ["user", "assistant"] * (len(turns) // 2) + ["user"]
        if len(system) > 1 or [message["role"] for message in turns] != wanted:
            raise ConfigError(
                f"{origin}: this model has no chat template and was trained on no chats; expected messages of the user "
                "and the assistant in turn, from the user's to the user's, and at most one of the system"
            )
        said = [str(message["content"]) for message in turns]
        pairs = list(zip(said[:-1:2], said[1::2], strict=True))
        if self.row_shape == "alpaca":
            record = {"instruction": said[-1], "output": _ANSWER, "system": "".join(system), "history": pairs}
            return asked_row(origin, record)
        prompts = [self._ended(text) for text in said[::2]]
        prompts[0] = _APART.join([*system, prompts[0]])
        history = tuple((prompt, answer) for prompt, (_, answer) in zip(prompts[:-1], pairs, strict=True))
        # with an answer: what stands before that is then what training has there, ends of texts between turns included
        return Row(origin, prompt=prompts[-1], completion=_ANSWER if history else "", history=history)

    def _ended(self, prompt: str) -> str:
        """The prompt, with as much of the ending put behind it as is not there yet."""
        ending = self.prompt_ends_with
        there = next(n for n in range(len(ending), -1, -1) if prompt.endswith(ending[:n]))
        return prompt + ending[there:]


def asked_ids(row: Row, encoder: RowEncoder) -> list[int]:
    """The ids that the model is asked with: all that training has before the row's answer. Raises ConfigError: the row
    cannot be learned as it is written, or the chat template refuses it."""
    try:
        if row.completion or row.answered:
            [(_, found)] = encoder.encoded([row])
            if isinstance(found, RowProblem):
                raise found
            if found and (learned := found[-1].learned):
                return found[-1].ids[: learned[-1][0]]
        return encoder.asked(row)
    except RowProblem as problem:
        raise ConfigError(f"{row.origin}: {problem}") from problem


def asked_row(origin: str, record: Mapping[str, Any]) -> Row:
    """What somebody asks as a row of data. Raises ConfigError: it is none."""
    try:
        return row_of(origin, record)
    except RowProblem as problem:
        raise ConfigError(f"{origin}: {problem}") from problem


def _current(message: Any) -> Any:
    """A message with the name that templates know for its role: `developer` is what OpenAI calls `system` now."""
    if isinstance(message, Mapping) and message.get("role") == "developer":
        return {**message, "role": "system"}
    return message
