"""A chat template is a stranger's program: its time and its memory have a limit, and it writes the same each time."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from spectune.data import encode, load_rows
from spectune.data.chats.chat_template import LONGEST_TEMPLATE
from spectune.data.chats.template_meter import TemplateLimitError
from spectune.data.chats.template_watch import TemplateWatch, the_watch
from spectune.errors import ConfigError, DataError
from tests.support.chat_templates import TEMPLATES, tokenizer_for

TURNS = r"{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
CHAT = [{"role": "user", "content": "York ?"}, {"role": "assistant", "content": "It is."}]


def doubled(expression: str, first: str = "'ab'") -> str:
    return f"{{% set n = namespace(x={first}) %}}{{% for i in range(60) %}}{{% set n.x = {expression} %}}{{% endfor %}}"


LOOPS = {
    "two loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a long range": "{% for i in range(10 ** 12) %}{% endfor %}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a macro that branches": "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a filter in a loop": "{% for i in range(9999) %}{{ range(9999) | select('even') | list | length }}{% endfor %}",
    "a recursive loop": "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
}
GROWTH = {
    "times": "{{ 'a' * 3000000000 }}", "a list": "{{ ([0] * 3000000000) | length }}",
    "a number": doubled("n.x * n.x", "3"), "a power": "{{ 9 ** 999999999 }}",
    "percent": "{{ '%3000000000s' % 'x' }}", "percent and a star": "{{ '%*s' % (3000000000, 'x') }}",
    "format": "{{ '{:3000000000}'.format(1) }}", "format of format": "{{ '{:{w}}'.format(1, w=3000000000) }}",
    "ljust": "{{ 'x'.ljust(3000000000) }}", "center": "{{ 'x' | center(3000000000) }}",
    "zfill": "{{ 'x'.zfill(3000000000) }}", "indent": "{{ ('x\n' * 100000) | indent(100000) }}",
    "tilde": doubled("n.x ~ n.x"), "plus": doubled("n.x + n.x"), "replace": doubled("n.x.replace('a', 'aa')"),
    "the filter replace": doubled("n.x | replace('a', 'aa')"), "lists": doubled("n.x + n.x", "[1]"),
    "lists in lists": doubled("[n.x, n.x]", "[1]") + "{{ n.x | tojson }}",
    "objects in objects": doubled("dict(a=n.x, b=n.x)", "{}") + "{{ n.x }}",
    "join": "{{ (['x' * 1000] * 100000) | join('y' * 1000) }}", "tojson": "{{ messages | tojson(indent=3000000000) }}",
    "batch": "{{ [1] | batch(3000000000, 'x') | list }}", "blocks": doubled("n.x") + "{% set y %}"
    + "{{ 'x' * 30000000 }}" * 9 + "{% endset %}", "an error": "{{ raise_exception('x' * 1000000000) }}",
    "split": "{{ ('a ' * 15000000).split() | length }}",
    "translate": "{{ ('x' * 90000).translate({120: 'y' * 90000}) }}",
}  # fmt: skip
OTHERWISE = {
    "lipsum": "{{ lipsum() }}", "random": "{{ [1, 2] | random }}", "an address": "{{ 'x'.strip }}",
    "an address in a list": "{{ [messages[0].get] }}", "a cycler": "{{ cycler('a') ~ '' }}",
}  # fmt: skip
REFUSED = {**LOOPS, **GROWTH, **OTHERWISE}


def encoded(template: str, *rows: dict[str, Any]) -> None:
    tokenizer = tokenizer_for("chatml", "byte_level")
    before, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        encode(load_rows(list(rows) or [{"messages": CHAT}]), tokenizer, max_length=100_000)
    finally:
        tokenizer.chat_template = before


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_does_without_an_end_is_refused_with_its_row(name: str) -> None:
    for template in (REFUSED[name] + TURNS, TURNS.replace("{{ '<", REFUSED[name] + "{{ '<", 1)):
        with pytest.raises(ConfigError, match=r"^row 1: the tokenizer's chat template"):
            encoded(template)


def test_each_way_of_rendering_is_counted() -> None:
    marked = TEMPLATES["marked"].text
    for template in (
        LOOPS["two loops"] + marked,
        "{% if add_generation_prompt %}" + LOOPS["two loops"] + "{% endif %}" + TURNS,
    ):
        with pytest.raises(ConfigError, match="more rounds of loops"):
            encoded(template)
    calls = {"messages": [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}]}
    with pytest.raises(ConfigError, match="more rounds of loops"):
        encoded("{% if messages[1].tool_calls %}" + LOOPS["two loops"] + "{% endif %}" + TURNS, calls)


def test_a_template_too_long_or_too_deep_to_be_compiled_is_refused() -> None:
    for template in ("x" * (LONGEST_TEMPLATE + 1), "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}", "{% if 1 %}" * 5000):
        with pytest.raises(ConfigError, match="chat template"):
            encoded(template + TURNS)


def test_a_template_s_own_error_is_short() -> None:
    with pytest.raises(DataError) as caught:
        encoded("{{ raise_exception('x' * 100000) }}" + TURNS)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("escape", ["''.__class__.__mro__", "cycler.__init__.__globals__", "(''|attr('__class__')).x"])
def test_attributes_of_python_cannot_be_reached(escape: str) -> None:
    with pytest.raises(DataError, match="refuses these messages"):
        encoded("{{ " + escape + " }}" + TURNS)


def test_long_conversations_may_take_long() -> None:
    body = "{% for other in messages %}{% if other.role == m.role %}{{ '' ~ '' }}{% endif %}{% endfor %}"
    quadratic = TURNS.replace("{{ '<", body + "{{ '<", 1)
    encoded(quadratic, {"messages": CHAT * 60})
    encoded(TURNS, {"messages": [CHAT[0], {"role": "assistant", "content": "word " * 60_000}]})


def test_what_no_count_stops_the_clock_does() -> None:
    def endless() -> None:
        while True:
            pass

    watch, begin = TemplateWatch(seconds=0.1), time.monotonic()
    for _ in range(2):
        with pytest.raises(TemplateLimitError, match="takes more than"):
            watch.run(endless)
    assert watch.run(lambda: 7) == 7
    assert time.monotonic() - begin < 10


def test_one_thread_watches_all_templates() -> None:
    """There was one for each, for ten seconds: of hundreds of templates, and little else ran."""

    def watching() -> int:
        return sum(thread.name == "template watch" for thread in threading.enumerate())

    before = watching()
    for number in range(20):
        encoded(f"{{# {number} #}}{TURNS}")
    assert watching() <= max(before, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_has_a_watch_of_its_own() -> None:
    """The thread is not there, and what other threads were rendering is not either."""

    def endless() -> None:
        while True:
            pass

    def of_parent() -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads that there are
            child = os.fork()
        if child == 0:
            try:
                the_watch().seconds = 0.1
                with pytest.raises(TemplateLimitError):
                    the_watch().run(endless)
                os._exit(7)
            finally:
                os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    watch = the_watch()
    assert watch.run(of_parent) == 7
    assert the_watch() is watch


def test_a_rendering_inside_another_is_watched_and_so_is_the_rest_of_the_outer_one() -> None:
    def endless() -> None:
        while True:
            pass

    watch = TemplateWatch(seconds=0.1)

    def outer(first: Callable[[], object]) -> None:
        assert watch.run(first) == 3
        endless()

    with pytest.raises(TemplateLimitError, match="takes more than"):
        watch.run(outer, lambda: 3)
    caught = []

    def outer_that_goes_on() -> int:
        with pytest.raises(TemplateLimitError):
            watch.run(endless)
        caught.append(True)
        return 4

    assert watch.run(outer_that_goes_on) == 4
    assert caught
    assert watch.run(lambda: 5) == 5


def test_many_threads_are_watched_at_once() -> None:
    watch = TemplateWatch(seconds=0.2)

    def ends(number: int) -> bool:
        def work() -> int:
            while number % 2:
                pass
            return number

        try:
            return watch.run(work) == number
        except TemplateLimitError:
            return bool(number % 2)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ends, range(8)))


def test_objects_with_methods_are_not_shown_to_templates() -> None:
    with pytest.raises(DataError, match="messages holds a "):
        load_rows([{"messages": [{"role": "user", "content": "a", "image": object()}, CHAT[1]]}])
