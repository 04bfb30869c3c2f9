"""Transformers' environment for chat templates, in which nothing grows without being counted.

Sandboxes of jinja keep a template away from Python; they let it loop and grow as it likes. Here each rendering has a
`Meter`: what is made is looked at before, where an operation could make much of little, and behind it. What writes
another text each time is refused: resumed runs, prompts and labels depend on a template that does not.
"""

import functools
import string
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

from jinja2 import Environment, Template, nodes, pass_context
from jinja2.exceptions import TemplateRuntimeError
from jinja2.filters import make_attrgetter
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import _PassArg
from markupsafe import Markup

from spectune.data.chats import metered_syntax as hooks
from spectune.data.chats.template_bounds import check_filter, check_method, check_operator, widths
from spectune.data.chats.template_meter import CONTAINERS, SCALARS, SMALL, Meter, TemplateLimitError, odd

Made = TypeVar("Made")
_DICT_NAMES = frozenset(dir(dict))
_SIZED = frozenset({list, tuple, dict, str, type({}.keys()), type({}.values()), type({}.items())})
_LONGEST_RANGE = 100_000
#: what a clock's format may have
_LONGEST_FORMAT = 1000


class Counted:
    """Something to walk through in a known number of rounds that is not to be asked for its length."""

    __slots__ = ()

    @property
    def rounds(self) -> int:
        raise NotImplementedError


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """Made of the one that transformers compiles templates in: its settings, extensions, filters and globals."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, theirs: Environment) -> None:
        super().__init__(
            trim_blocks=theirs.trim_blocks, lstrip_blocks=theirs.lstrip_blocks,
            extensions=[type(extension) for extension in theirs.extensions.values()],
        )  # fmt: skip
        #: of the rendering that goes on
        self.meter: ContextVar[Meter] = ContextVar("meter")
        self.filters = {name: self._metered(name, function) for name, function in theirs.filters.items()}
        self.filters |= {name: pass_context(hook) for name, hook in _hooks(self.meter).items()}
        self.tests = dict(theirs.tests)
        self.globals = dict(theirs.globals)
        self.globals |= {
            "range": _range, "lipsum": _random_text, "namespace": _namespace(self.globals["namespace"]),
        }  # fmt: skip

    def render(self, given: Collection[Any], work: Callable[..., Made], *arguments: Any) -> Made:
        """What `work` renders of what it is given. Raises TemplateLimitError, and whatever the template raises."""
        token = self.meter.set(Meter(given))
        try:
            return work(*arguments)
        except RecursionError:
            raise TemplateLimitError("calls itself, or nests, without an end") from None
        except MemoryError:
            raise TemplateLimitError("makes more than memory has room for") from None
        finally:
            self.meter.reset(token)

    def metered(self, source: str) -> nodes.Template:
        """The syntax tree of a template, with its hooks."""
        return hooks.meter(self.parse(source))

    def compiled(self, tree: nodes.Template) -> Template:
        """With the globals in one dict: jinja goes through its chain of them anew for each rendering, which takes as
        long as rendering a short conversation."""
        template = self.from_string(tree)
        template.globals = dict(template.globals)
        return template

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute in obj and attribute not in _DICT_NAMES:
            return obj[attribute]  # as jinja does, which looks for an attribute of a dict first, and catches the error
        return super().getattr(obj, attribute)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        kind = type(obj)
        if kind is types.BuiltinMethodType and type(owner := obj.__self__) is str:
            if kwargs:  # jinja's own, for functions that take the context
                kwargs.pop("_loop_vars", None)
                kwargs.pop("_block_vars", None)
            check_method(self.meter, owner, obj.__name__, args, kwargs)
            result = obj(*args, **kwargs)  # jinja would look at what it is, in vain, for longer than it takes
        else:
            self.meter.get().step(1)
            if kind is types.BuiltinMethodType or kind is types.MethodType:
                if isinstance(obj.__self__, str):
                    check_method(self.meter, obj.__self__, obj.__name__, args, kwargs)
                widths(obj.__name__, (*args, *kwargs.values()))
            result = super().call(context, obj, *args, **kwargs)
        if type(result) is str and len(result) < SMALL:
            return result
        return _made(self.meter, result)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        check_operator(self.meter.get(), operator, left, right)
        return _made(self.meter, super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text: str = value.__self__
        formatter, is_map = _Formatter(self), value.__name__ == "format_map"

        def formatted(*args: Any, **kwargs: Any) -> str:
            if isinstance(text, Markup):
                raise TemplateRuntimeError("format of a text that is marked as safe")
            if is_map:
                return formatter.vformat(text, (), args[0])
            return formatter.vformat(text, args, kwargs)

        return functools.update_wrapper(formatted, value)

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that is looked at before and behind. It is none that jinja works out when it compiles."""
        kind, variable = _PassArg.from_obj(function), self.meter
        if name == "random":
            return pass_context(_random_choice)
        if name == "join":
            function, kind = _join, _PassArg.context
        small = name not in check_filter.grows

        @pass_context
        def filtered(context: Context, value: Any = None, *args: Any, **kwargs: Any) -> Any:
            if not (small and type(value) is str and len(value) < SMALL):
                value = check_filter(variable.get(), name, value, args, kwargs)
            if kind is None:
                result = function(value, *args, **kwargs)
            elif kind is _PassArg.context:
                result = function(context, value, *args, **kwargs)
            else:
                first: Any = context.eval_ctx if kind is _PassArg.eval_context else self
                result = function(first, value, *args, **kwargs)
            if type(result) is str and len(result) < SMALL:
                return result
            return _made(variable, result)

        return filtered


class _Formatter(SandboxedFormatter):
    def __init__(self, environment: MeteredEnvironment) -> None:
        super().__init__(environment)
        self._meter = environment.meter

    def vformat(self, format_string: str, args: Any, kwargs: Any) -> str:
        self._meter.get().step(format_string.count("{"))
        return string.Formatter.vformat(self, format_string, args, kwargs)

    def format_field(self, value: Any, format_spec: str) -> Any:
        widths("format", [int(number) for number in _numbers(format_spec)])
        _shown(self._meter, value)
        return _made(self._meter, super().format_field(value, format_spec))

    def convert_field(self, value: Any, conversion: Any) -> Any:
        _shown(self._meter, value)
        return _made(self._meter, super().convert_field(value, conversion))


def _numbers(text: str) -> list[str]:
    """The runs of digits in a text, none longer than matters."""
    return [run[:12] for run in "".join(c if c.isascii() and c.isdigit() else " " for c in text).split()]


def _hooks(variable: ContextVar[Meter]) -> dict[str, Callable[..., Any]]:
    def made(context: Context, value: Any) -> Any:
        if type(value) is str and len(value) < SMALL:
            return value
        return _made(variable, value)

    def sliced(context: Context, value: Any) -> Any:
        if type(value) is str:
            return value if len(value) < SMALL else _made(variable, value)
        if isinstance(value, list | tuple):  # not larger than what it was cut from
            variable.get().take(8 * len(value))
        return value

    def shown(context: Context, value: Any) -> Any:
        if type(value) is str and len(value) < SMALL:
            return value
        return _shown(variable, value)

    def rounds(context: Context, value: Any, cost: int) -> Any:
        if type(value) in _SIZED:
            variable.get().step(cost * len(value))
            return value
        meter = variable.get()
        if isinstance(value, Undefined):
            return value
        if isinstance(value, Counted):
            meter.step(cost * value.rounds)
            return value
        if isinstance(value, set):
            raise TemplateLimitError("walks through a set, which has another order each time")
        return _counted(meter, value, cost)

    def step(context: Context, value: Any, cost: int) -> None:
        variable.get().step(cost)

    def applied(context: Context, value: Any, function: Callable[[Any], Any]) -> Any:
        return function(value)

    return {
        hooks.MADE: made, hooks.SLICED: sliced, hooks.SHOWN: shown, hooks.ROUNDS: rounds, hooks.STEP: step,
        hooks.APPLIED: applied,
    }  # fmt: skip


def _made(variable: ContextVar[Meter], value: Any) -> Any:
    kind = type(value)
    if kind in SCALARS or kind is bool:
        return value
    meter = variable.get()
    if isinstance(value, str | bytes):
        if len(value) >= SMALL:
            meter.take(value.__sizeof__())
        return value
    if kind in CONTAINERS:
        meter.step(1 + len(value) // 8)
        meter.take(16 * len(value))
        meter.weigh(value)
        return value
    if isinstance(value, set):
        raise TemplateLimitError("makes a set, which has another order each time")
    if isinstance(value, Iterator) and not isinstance(value, Undefined):
        return _counted(meter, value, 1)
    return value


def _counted(meter: Meter, values: Any, cost: int) -> Iterator[Any]:
    for value in values:
        meter.step(cost)
        if type(value) is list:  # of a batch
            meter.take(16 * len(value))
        yield value


def _shown(variable: ContextVar[Meter], value: Any) -> Any:
    """A value that is written. Raises TemplateLimitError: its text is another one each time."""
    kind = type(value)
    if kind in SCALARS or isinstance(value, Undefined):
        return value
    meter = variable.get()
    if isinstance(value, str):
        meter.take(value.__sizeof__())
        return value
    if isinstance(value, list | tuple | Mapping):
        meter.take(meter.weigh(value))
    if (found := meter.odd(value)) is not None:
        raise TemplateLimitError(odd(found))
    return value


def _range(*args: int) -> range:
    found = range(*args)
    if len(found) > _LONGEST_RANGE:
        raise TemplateLimitError(f"asks for a range of more than {_LONGEST_RANGE:,} numbers")
    return found


def _join(context: Context, value: Any, d: str = "", attribute: str | int | None = None) -> Any:
    """jinja's, with the parts known before."""
    if attribute is not None:
        value = map(make_attrgetter(context.environment, attribute), value)
    check = context.environment.meter  # type: ignore[attr-defined]
    parts = list(value) if isinstance(value, Undefined) else [_shown(check, part) for part in value]
    check.get().fits(
        len(parts) * (len(d) if isinstance(d, str) else 0) + sum(len(p) for p in parts if isinstance(p, str))
    )
    if any(hasattr(part, "__html__") for part in (d, *parts)):
        return Markup(d).join(parts)
    return str(d).join(map(str, parts))


def _random_text(*args: Any, **kwargs: Any) -> str:
    raise TemplateLimitError("writes random text (lipsum), which is another one each time")


def _random_choice(context: Context, value: Any) -> Any:
    raise TemplateLimitError("takes a random item (| random), which is another one each time")


def _namespace(theirs: Any) -> type:
    """Their class, which does not write out what it holds: it may hold itself."""
    return type("Namespace", (theirs,), {"__repr__": lambda self: "<Namespace>"})


def clock(day: Any) -> Callable[[str], str]:
    """What templates call to format the current date: a date's own `strftime`, of short formats."""

    def strftime_now(form: str) -> str:
        if len(form) > _LONGEST_FORMAT:
            raise TemplateLimitError(f"gives the clock a format of more than {_LONGEST_FORMAT:,} characters")
        return str(day.strftime(form))

    return strftime_now
