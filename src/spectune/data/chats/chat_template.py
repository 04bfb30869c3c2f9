"""Conversations as a tokenizer's own chat template writes them, and what that template puts around a turn."""

import dataclasses
import datetime
import functools
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from jinja2 import Template
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from spectune.data.chats.message_forms import MessageForms, disputed, find_forms
from spectune.data.chats.metered_environment import MeteredEnvironment, clock
from spectune.data.chats.prompt_beginnings import MarkedTemplate
from spectune.data.chats.template_meter import TemplateLimitError
from spectune.data.chats.template_watch import the_watch
from spectune.data.problem import RowProblem
from spectune.data.shapes import Row
from spectune.errors import ConfigError, first_line

#: stands for an answer where the template's own text is looked for
PROBE = "spectuneprobe"
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
#: what looks like a special token, whether the tokenizer has it as one or not
_TAG = r"<[^<>\s]+>|\[/?[A-Z_]+\]"

#: characters of a template; the largest of published ones have about 40,000
LONGEST_TEMPLATE = 1 << 18
#: characters of a template's own error that are shown
_LONGEST_REFUSAL = 300

Message = dict[str, Any]
Made = TypeVar("Made")
Span = tuple[int, int]


class TurnTexts(NamedTuple):
    """What a template writes around an answer; each may be empty.

    Attributes:
        header: between a prompt and the answer, where the template has no generation prompt of its own.
        end: behind an answer that is followed by another message.
        trailing: behind the last turn, where the template always writes a generation prompt.
        ends_otherwise: an answer that ends the conversation ends with EOS, and `end` is something else. A model that is
            asked has to write the former (gpt-oss: `<|return|>`, and `<|end|>` in what is history).
    """

    header: str
    end: str
    trailing: str
    ends_otherwise: bool = False


@dataclasses.dataclass(slots=True)
class Whole:
    """A whole conversation as it is written.

    Attributes:
        text: without a generation prompt behind it.
        marks: the spans that the template marks as the assistant's; None where it marks none.
        ends: by a number of messages, where the part of the text ends that is written for so many alone, where that is
            known.
        behind: what is written behind such a part, by whether a generation prompt is asked for.
    """

    text: str
    marks: list[Span] | None = None
    ends: dict[int, int] = dataclasses.field(default_factory=dict)
    behind: dict[bool, str] = dataclasses.field(default_factory=dict)


class _Compiled(NamedTuple):
    """A template's text, what jinja makes of it, and that with its loop over the messages marked, where that helps."""

    source: str
    environment: MeteredEnvironment
    template: Template
    marks: bool
    marked: MarkedTemplate | None


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        today: the date that templates see as the current one, ISO; by default the clock's.

    Raises:
        ConfigError: the tokenizer has no chat template, or `today` is no date.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, today: str | None = None) -> None:
        if tokenizer.chat_template is None:
            raise ConfigError(
                "the rows are chats (messages), but this tokenizer has no chat template; put one into a copy of the "
                "base's folder (chat_template.jinja; in Python: set tokenizer.chat_template), or give the rows as "
                "prompt + completion"
            )
        self.tokenizer = tokenizer
        self.eos = str(tokenizer.eos_token or "")
        folder = str(getattr(tokenizer, "name_or_path", "") or "")
        #: in messages
        self.named = f"the tokenizer's chat template{f' ({folder})' if folder else ''}"
        self._globals = {**tokenizer.special_tokens_map, "strftime_now": _clock(today)}
        self._compiled: dict[bool, _Compiled] = {}
        self._behind: dict[bool, str] = {}
        self._skipped: dict[tuple[str, ...], frozenset[int]] = {}
        self._forms: dict[bool, MessageForms] = {}

    def prompt(self, row: Row) -> str:
        """What the model is asked with for the next turn of a conversation that has no answer yet. Raises RowProblem:
        the template refuses the messages."""
        text = self.asked(row, len(row.asked), Whole(""))
        if not self._of(row).marks:
            return text
        # what stands between the generation prompt and the marked answer is not learned, so it has to be given
        probe = dataclasses.replace(row, messages=[*row.asked, {"role": "assistant", "content": PROBE}])
        whole = self.whole(probe, probe.messages or [])
        begins = [
            start
            for start, stop in whole.marks or ()
            if PROBE in whole.text[start:stop] and whole.text.startswith(text)
        ]
        return text + whole.text[len(text) : begins[-1]] if begins else text

    def whole(self, row: Row, messages: Sequence[Message]) -> Whole:
        """Messages as text. Raises RowProblem: the template refuses them."""
        compiled = self._of(row)
        shown = self.forms(row).shown(messages) if disputed(messages) else list(messages)
        if compiled.marks:
            try:
                return self._bounded(row, shown, _with_marks, compiled, shown, self._given(row))
            except ConfigError:
                raise
            except Exception as error:  # templates raise what they like: jinja's errors, and their own
                raise _refusal(error) from error
        if (marked := compiled.marked) is not None:
            try:
                text, ends = self._bounded(row, shown, marked.render, shown, self._given(row))
            except ConfigError:
                raise
            except Exception:  # the messages are refused, or the template wants more of them than can be followed
                return Whole(self.without_trailing(self.render(row, messages)))
            alone = row.tools or row.documents or row.template_kwargs
            return Whole(self.without_trailing(text), None, ends, {} if alone else self._behind)
        return Whole(self.without_trailing(self.render(row, messages)))

    def beginning(self, row: Row, count: int, whole: Whole, *, generation: bool) -> str:
        """What `render` gives for the row's first messages, of which the whole is known."""
        messages = (row.messages or [])[:count]
        if (end := whole.ends.get(count)) is None:
            return self.render(row, messages, generation=generation)
        if generation not in whole.behind:
            text = self.render(row, messages, generation=generation)
            if not text.startswith(whole.text[:end]):  # cannot be; if it is, nothing of this is taken for true
                whole.ends.clear()
                return text
            whole.behind[generation] = text[end:]
        return whole.text[:end] + whole.behind[generation]

    def render(self, row: Row, messages: Sequence[Message], *, generation: bool = False, as_given: bool = False) -> str:
        """Messages as text, with the row's tools, documents and template arguments; as they are given, or in the forms
        that the template wants."""
        template, given = self._of(row).template, self._given(row)
        if not as_given and disputed(messages):
            messages = self.forms(row).shown(messages)
        given |= {"messages": messages, "add_generation_prompt": generation}
        try:
            return str(self._bounded(row, messages, template.render, given))
        except ConfigError:
            raise
        except Exception as error:  # templates raise what they like: jinja's errors, and their own
            raise _refusal(error) from error

    def forms(self, row: Row) -> MessageForms:
        """What messages are to be for the template; found once for rows with tools, and once for those without."""
        has_tools = bool(row.tools)
        if has_tools not in self._forms:
            self._forms[has_tools] = find_forms(lambda messages: self.render(row, messages, as_given=True))
        return self._forms[has_tools]

    def asked(self, row: Row, count: int, whole: Whole) -> str:
        """What the model is asked with behind the first messages."""
        text = self.beginning(row, count, whole, generation=True)
        return text if "add_generation_prompt" in self.source(row) else text + self.turn.header

    @cached_property
    def turn(self) -> TurnTexts:
        """Found by rendering a short conversation."""
        user, answer = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": PROBE}
        row = Row("probe", messages=[])
        try:
            asked, prompt = self.render(row, [user]), self.render(row, [user], generation=True)
            one, two = self.render(row, [user, answer]), self.render(row, [user, answer, user])
        except RowProblem:
            return TurnTexts("", "", "")
        if PROBE not in one or PROBE not in two:
            return TurnTexts("", "", "")
        (before, _, last), (_, _, behind) = one.rpartition(PROBE), two.partition(PROBE)
        header = before[len(asked) :] if prompt == asked and before.startswith(asked) else ""
        if not header.strip():  # white space before an answer is the answer's: engines ask without it
            header = ""
        if behind.startswith(last):
            return TurnTexts(header, last, "")
        specials = map(re.escape, sorted(map(str, self.tokenizer.all_special_tokens), key=len, reverse=True))
        tag = re.match(rf"\s*(?:{'|'.join([*specials, _TAG])})?\s*", behind)
        end = tag[0] if tag else ""
        trailing = last[len(end) :] if last.startswith(end) else ""
        otherwise = bool(self.eos) and last.strip() == self.eos and end.strip() not in ("", self.eos)
        return TurnTexts(header, end, trailing if prompt == asked and asked.endswith(trailing) else "", otherwise)

    def without_trailing(self, text: str) -> str:
        if "add_generation_prompt" in str(self.tokenizer.chat_template):
            return text
        return text.removesuffix(self.turn.trailing)

    def left_out(self, row: Row) -> frozenset[int]:
        """The places of messages that the template leaves out, whatever they say: found once for messages of these
        roles."""
        messages = row.messages or []
        roles = (str(bool(row.tools)), *(message["role"] for message in messages))
        if roles not in self._skipped:
            try:
                text = self.render(row, [{**m, "content": f"{PROBE}{i}x"} for i, m in enumerate(messages)])
            except RowProblem:  # it wants other contents than probes: what is written is looked for, row by row
                return frozenset()
            written = (i for i, m in enumerate(messages) if m.get("tool_calls") or f"{PROBE}{i}x" in text)
            self._skipped[roles] = frozenset(range(len(messages))) - frozenset(written)
        return self._skipped[roles]

    def _bounded(self, row: Row, messages: Sequence[Message], work: Callable[..., Made], *arguments: Any) -> Made:
        """What a rendering gives. Raises ConfigError: it takes more time or memory than templates may, or is another
        one each time; and whatever the template raises."""
        given = (messages, row.tools, row.documents, row.template_kwargs)
        try:
            made: Made = the_watch().run(self._of(row).environment.render, given, work, *arguments)
        except TemplateLimitError as limit:
            raise ConfigError(
                f"{row.origin}: {self.named} {limit}. Chat templates are programs of whoever made the base: mend this "
                "one (chat_template.jinja or tokenizer_config.json in the base's folder), use another base, or leave "
                "this row out"
            ) from None
        return made

    def _given(self, row: Row) -> dict[str, Any]:
        return {**self._globals, "tools": row.tools, "documents": row.documents, **(row.template_kwargs or {})}

    def source(self, row: Row) -> str:
        return self._of(row).source

    def _of(self, row: Row) -> _Compiled:
        """The template for a row: a tokenizer may have another one for rows with tools."""
        has_tools = bool(row.tools)
        if has_tools not in self._compiled:
            try:
                source = str(self.tokenizer.get_chat_template(tools=row.tools or None))
            except Exception as error:  # several templates, and none for this
                raise ConfigError(f"{self.named} cannot be used: {_shortened(error)}") from error
            if len(source) > LONGEST_TEMPLATE:
                raise ConfigError(
                    f"{self.named} has {len(source):,} characters; expected at most "
                    f"{LONGEST_TEMPLATE:,}: use another tokenizer, or mend its template"
                )
            try:
                self._compiled[has_tools] = the_watch().run(_compiled, source)
            except TemplateLimitError as limit:
                raise ConfigError(f"{self.named} {limit}; use another one") from None
            except (RecursionError, MemoryError) as error:
                raise ConfigError(
                    f"{self.named} nests its blocks or expressions too deeply to be compiled; use another one"
                ) from error
            except Exception as error:
                raise ConfigError(f"{self.named} is no Jinja template: {_shortened(error)}") from error
        return self._compiled[has_tools]


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> _Compiled:
    """A template, compiled once, whoever uses it: that takes longer than rendering a hundred conversations.

    Transformers' own function for rendering hides from templates what they could do harm with; that includes callables
    such as the clock, which is why the template is called, in an environment made of transformers', and not the
    function.
    """
    compile_template: Any = chat_template_utils._compile_jinja_template
    environment = MeteredEnvironment(compile_template("").environment)
    template, marked = environment.compiled(environment.metered(source)), MarkedTemplate.of(environment, source)
    return _Compiled(source, environment, template, _MARKS.search(source) is not None, marked)


def _with_marks(compiled: _Compiled, messages: Sequence[Message], given: dict[str, Any]) -> Whole:
    """A conversation, and what the template marks of it, as transformers finds it."""
    pieces, spans = list[str](), list[Span]()
    tracked: Any = compiled.environment
    context = compiled.template.new_context({**given, "messages": messages, "add_generation_prompt": False})
    with tracked.activate_tracker(pieces, spans):
        pieces += compiled.template.root_render_func(context)
    return Whole("".join(pieces), [(int(start), int(stop)) for start, stop in spans])


def _clock(today: str | None) -> Callable[[str], str]:
    """What templates call to format the current date: midnight, as a text with the time in it would be another one for
    each row."""
    try:
        day = datetime.date.today() if today is None else datetime.datetime.fromisoformat(today)
    except ValueError:
        raise ConfigError(f"template_date = {today!r}; expected a date such as 2026-01-31") from None
    return clock(day)


def _shortened(error: Exception) -> str:
    text = first_line(error)
    return text if len(text) <= _LONGEST_REFUSAL else f"{text[:_LONGEST_REFUSAL]}..."


def _refusal(error: Exception) -> RowProblem:
    return RowProblem(f"the tokenizer's chat template refuses these messages: {_shortened(error)}")
