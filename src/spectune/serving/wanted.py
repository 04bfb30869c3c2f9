"""Requests: JSON from anybody, made into what is wanted, or into an error that names the parameter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spectune.errors import did_you_mean
from spectune.serving.api_error import ApiError, invalid
from spectune.serving.bounds import Bounds

#: parameters that say who asks, or how fast; nothing that is written depends on them
IGNORED = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "prediction",
})  # fmt: skip
#: parameters of OpenAI's that are not served, with the values that change nothing
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "suffix": ("",), "echo": (False,),
    "best_of": (1,), "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none", "auto"),
    "functions": ([],), "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (),
    "reasoning_effort": ("none",), "verbosity": (), "web_search_options": (), "repetition_penalty": (1,), "min_p": (0,),
}  # fmt: skip
#: below it, sampling is taking the likeliest: a logit divided by less has no float
_COLDEST = 1e-5
#: of a completion that names no limit, as OpenAI has it
_COMPLETION_TOKENS = 16
_Text = Annotated[str, Field(min_length=1)]


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool = False


class _Body(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    model: str
    stream: bool = False
    stream_options: _StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: _Text | Annotated[list[_Text], Field(max_length=4)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None


class _Completion(_Body):
    prompt: Any  # see `_prompts`
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class _Chat(_Body):
    messages: Annotated[list[Any], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn; `seed` None: by chance."""

    temperature: float
    top_p: float
    top_k: int
    seed: int | None


@dataclass(frozen=True)
class Wanted:
    """A request that may be answered.

    Attributes:
        prompts: texts or ids; None of a chat.
        messages: None of a completion.
        n: choices for each prompt.
        max_tokens: None: as many as there is room for.
        stops: texts that end a choice.
        drawing: None: the likeliest token each time.
        logprobs: how many tokens are named beside each that was written; None: no likelihoods at all.
    """

    model: str
    prompts: tuple[str | tuple[int, ...], ...] | None
    messages: tuple[dict[str, Any], ...] | None
    n: int
    stream: bool
    include_usage: bool
    max_tokens: int | None
    stops: tuple[str, ...]
    drawing: Drawing | None
    logprobs: int | None

    @property
    def chat(self) -> bool:
        return self.messages is not None

    @property
    def choices(self) -> int:
        return self.n * (1 if self.prompts is None else len(self.prompts))


def read_json(body: bytes) -> dict[str, Any]:
    """A request's body. Raises ApiError: it is no JSON object."""
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise invalid(f"the body is no text in UTF-8 (byte {error.start}); expected a JSON object") from None
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body cannot be read as JSON ({error}); expected a JSON object") from None
    if not isinstance(found, dict):
        raise invalid(f"the body is a JSON {_kind(found)}; expected an object, such as {{'model': ...}}")
    return found


def wanted(given: Mapping[str, Any], kind: Literal["chat", "completion"], bounds: Bounds) -> Wanted:
    """What a request wants. Raises ApiError: a parameter is missing, unknown, not served, or not what it has to be; it
    wants more than one request may."""
    # null is as if it were not there, as OpenAI has it
    named = {key: value for key, value in given.items() if value is not None and key not in IGNORED}
    model: type[_Chat | _Completion] = _Chat if kind == "chat" else _Completion
    for key in named.keys() & NEUTRAL.keys():
        value = named.pop(key)
        if not any((type(value) is not bool and value == neutral) or value is neutral for neutral in NEUTRAL[key]):
            raise invalid(
                f"{key} is not served here; leave it out"
                + "".join(f", or give {json.dumps(neutral)}" for neutral in NEUTRAL[key][:1]),
                key, "unsupported_parameter",
            )  # fmt: skip
    for key in named.keys() - model.model_fields.keys():
        hint = did_you_mean(key, model.model_fields)
        raise invalid(f"unrecognized request argument supplied: {key[:80]}{hint}", key[:80], "unknown_parameter")
    try:
        body = model.model_validate(named)
    except ValidationError as error:
        raise _first(error) from None
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options is only allowed with stream: true", "stream_options")
    return _bounded(_of_chat(body) if isinstance(body, _Chat) else _of_completion(body), bounds)


def _of_chat(body: _Chat) -> Wanted:
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs is only allowed with logprobs: true", "top_logprobs")
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) == 2:
        raise invalid("max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    most = next(iter(limits), None)
    wrong = next((place for place, message in enumerate(body.messages) if type(message) is not dict), None)
    if wrong is not None:
        said = f"messages.{wrong}: expected an object; given {_kind(body.messages[wrong])}"
        raise invalid(said, "messages", "invalid_value")
    return Wanted(prompts=None, messages=tuple(body.messages), max_tokens=most, logprobs=logprobs, **_common(body))


def _of_completion(body: _Completion) -> Wanted:
    prompts = _prompts(body.prompt)
    if not prompts or not all(prompts):
        raise invalid("prompt is empty; expected text, ids, or a list of one of them", "prompt")
    most = _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    return Wanted(prompts=prompts, messages=None, max_tokens=most, logprobs=body.logprobs, **_common(body))


def _prompts(given: Any) -> tuple[str | tuple[int, ...], ...]:
    """Text, ids, or a list of one of them. Raises ApiError. It stops at the first thing that is wrong: a validator of
    every form keeps what is wrong with each of a million items, once for each form."""
    if isinstance(given, str):
        return (given,)
    if isinstance(given, list):
        kinds = set(map(type, given))
        if kinds == {int}:
            return (tuple(given),)
        if kinds <= {str}:
            return tuple(given)
        if kinds == {list} and all(set(map(type, ids)) <= {int} for ids in given):
            return tuple(map(tuple, given))
    raise invalid(
        f"prompt: expected text, ids, or a list of one of them; given {_kind(given)}", "prompt", "invalid_value"
    )


def _common(body: _Body) -> dict[str, Any]:
    greedy = body.temperature < _COLDEST or body.top_p == 0 or body.top_k == 1
    drawing = None if greedy else Drawing(body.temperature, body.top_p, max(body.top_k, 0), body.seed)
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    usage = body.stream_options is not None and body.stream_options.include_usage
    return {
        "model": body.model, "n": body.n, "stream": body.stream, "include_usage": usage, "drawing": drawing,
        "stops": stops,
    }  # fmt: skip


def _bounded(found: Wanted, bounds: Bounds) -> Wanted:
    if found.choices > bounds.max_choices:
        raise invalid(
            f"{found.choices:,} choices (n for each prompt); one request may ask for {bounds.max_choices:,}", "n"
        )
    if (found.max_tokens or 0) > bounds.max_new_tokens:
        raise invalid(f"max_tokens = {found.max_tokens:,}; this server writes at most {bounds.max_new_tokens:,}",
                      "max_tokens")  # fmt: skip
    return found


def _first(error: ValidationError) -> ApiError:
    """The first thing that is wrong; of the types that a value might have the one that it is most like."""
    problems = error.errors(include_url=False, include_context=False)
    problem = max(problems, key=lambda found: len(found["loc"])) if len(problems) > 1 else problems[0]
    param = str(problem["loc"][0]) if problem["loc"] else None
    place = ".".join(str(part) for part in problem["loc"] if isinstance(part, int) or part == param)
    if problem["type"] == "missing":
        return invalid(f"you must provide a {param} parameter", param, "missing_required_parameter")
    return invalid(f"{place}: {problem['msg']}; given {_kind(problem['input'])}", param, "invalid_value")


def _kind(value: Any) -> str:
    """What was given, by its JSON type, and itself where it is short."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    name = names.get(type(value), "number")
    shown = repr(value) if isinstance(value, str | int | float) and len(str(value)[:41]) <= 40 else ""
    return f"{name} {shown}".rstrip()


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
