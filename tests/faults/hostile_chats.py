"""Chat templates made to harm: endless, growing, recursive, escaping; and known families', changed at random."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from tests.faults import spoiling
from tests.faults.damage import Trial, kind
from tests.faults.kinds import Place
from tests.faults.scenes import BASE, CHATS, CPU, QUICK, copied, scene
from tests.support.chat_templates import CHATML, TEMPLATES, turns

COMMANDS = [
    ("validate", "--model", BASE, "--data", CHATS, "--json"),
    ("validate", "--model", BASE, "--data", CHATS, "--show", "2"),
    ("train", "--model", BASE, "--data", CHATS, "--output-dir", "new", *QUICK, *CPU),
]
COUNTS = [300, 99_999, 10**6, 10**9, 10**18]
#: `@N` is a large number, `@M` the path of the marker
ENDLESS = [
    "{% for a in range(@N) %}{% endfor %}", "{% for a in range(@N) %}{% for b in range(@N) %}{% endfor %}{% endfor %}",
    "{% for a in range(@N) %}{{ a }}{% endfor %}", "{{ range(@N) | list | length }}", "{{ range(@N) | sum }}",
    "{{ 'a' * @N }}", "{{ ('a' * @N) | length }}", "{{ [0] * @N }}", "{{ ([0] * @N) | length }}", "{{ 9 ** @N }}",
    "{{ 9 ** 9 ** 9 ** 9 }}", "{% set x = 9 ** @N %}", "{{ 1 << @N }}", "{{ 'a'.ljust(@N) }}", "{{ 'a'.zfill(@N) }}",
    "{{ '%' ~ @N ~ 'd' }}", "{{ ('%' ~ @N ~ 'd') % 1 }}", "{{ ('{:' ~ @N ~ '}').format(1) }}", "{{ 'a' | center(@N) }}",
    "{{ 'a' | indent(@N) }}", "{{ lipsum(n=@N) }}", "{{ 'ab' | replace('a', 'b' * @N) }}",
    "{{ 'x' | wordwrap(1) * @N }}",
    "{% set n = namespace(x='aa') %}{% for a in range(64) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x | length }}",
    "{% set n = namespace(x=[1]) %}{% for a in range(64) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x | length }}",
    "{% set n = namespace(x=9) %}{% for a in range(64) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}", "{{ messages | tojson(indent=@N) }}",
    "{{ 'a' | tojson | tojson | batch(@N, 'x') | list }}", "{{ messages | batch(@N, 'x') | list | length }}",
    "{% for a in range(@N) %}{% break %}{% endfor %}", "{{ (('a' * 9999) | list | permutations) }}",
    "{% set x = [] %}{% for a in range(@N) %}{% do x.append(a) %}{% endfor %}",
    "{% set x = [] %}{% set _ = x.append(x) %}{{ x | tojson }}", "{% set d = {} %}{% set _ = d.update(a=d) %}{{ d }}",
    "{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!' is match('(a+)+$') }}", "{{ 'a' | string | float ** @N }}",
    "{% for a in range(@N) if a is divisibleby 7 %}x{% endfor %}", "{{ messages | map('string') | join('a' * @N) }}",
    "{{ range(@N) | random }}", "{{ 'a'.translate({97: 'b' * @N}) }}",
    "{{ '\\n'.expandtabs(@N) }}{{ '\\t'.expandtabs(@N) }}",
]  # fmt: skip
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.mkdir('@M') }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').mkdir('@M') }}",
    "{{ raise_exception.__globals__['os'].mkdir('@M') }}", "{{ strftime_now.__globals__ }}",
    "{{ lipsum.__globals__['os'].mkdir('@M') }}", "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ ''['__class__'] }}", "{{ '' | attr('__class__') | attr('__mro__') }}", "{{ namespace.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}{{ os.mkdir('@M') }}", "{% extends '../x' %}",
    "{{ '{0.__class__.__mro__}'.format('') }}", "{{ '%(x)s'.__mod__ }}",
    "{{ '{0.__globals__}'.format(raise_exception) }}",
    "{{ '{0.__globals__[os]}'.format_map({'0': raise_exception}) }}", "{{ joiner.__init__.__globals__ }}",
    "{{ (messages | map(attribute='__class__') | list) }}", "{{ range.__self__ }}", "{{ tojson.__globals__ }}",
    "{% set x = raise_exception %}{{ x.__code__ }}", "{{ strftime_now('%Y' * @N) }}", "{{ strftime_now(4) }}",
    "{{ strftime_now('\\x00\\ud83d') }}", "{% set messages = 4 %}{{ messages.x.y }}", "{{ messages.clear() }}",
    "{{ messages.append(4) }}", "{% set _ = messages[0].update(content='x') %}", "{% set _ = messages.pop() %}",
    "{{ messages[0].content.__len__.__self__ }}", "{{ dict(a=1).__init__.__objclass__ }}", "{{ (1).__class__ }}",
]  # fmt: skip
BROKEN = [
    "{{", "{% for %}", "{% endfor %}", "{{ x.y.z }}", "{{ 1 / 0 }}", "{{ messages[99] }}",
    "{{ raise_exception('no') }}",
    "{{ raise_exception('\\x1b[2J' * 999) }}", "{{ raise_exception('x' * 10**6) }}", "{{ raise_exception() }}",
    "{{ raise_exception(4) }}", "{% raw %}", "", " ", "\0", "{{ undefined_function() }}", "{% " + "if x %}{% " * 300,
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{{ " + "-" * 5000 + "1 }}", "{{ [" * 1000,
    "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "{{ 1" + " + 1" * 20_000 + " }}", "x" * 1_000_000, "{{ 'x' }}" * 50_000, "{{ messages | nosuch }}",
    "{{ messages is nosuch }}",
    "{% nosuch %}", "{# x", "{{ '\\ud83d' }}", "{{ '\\x1b[2J' }}", "{{ loop.index }}", "{{ 'a' + 1 }}",
    "{{ messages + 'a' }}",
    "{% set x %}", "{{ ''.encode('rot13') }}", "{{ 'a'.nosuch() }}", "{{ messages.0.content.9 }}", "{{ caller() }}",
]  # fmt: skip


def make(place: Place, random: Random, folder: Path) -> Trial:
    """A base's folder with another chat template, and chats."""
    origin = scene(place, random.choice(["gpt2", "llama"]))
    copied(origin, folder)
    text, what = template(random, folder / "marker")
    base = folder / BASE
    name = "chat_template.jinja"
    settings = json.loads((base / "tokenizer_config.json").read_text())
    how = random.choices(["file", "settings", "named", "odd"], [5, 2, 1, 1])[0]
    if how == "file":
        (base / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    else:
        (base / name).unlink(missing_ok=True)
        name = "tokenizer_config.json"
        odd = random.choice([4, [], {}, [{"name": "x"}], [4], {"default": 4}, True, "x" * 10**6])
        value = {"settings": text, "named": [{"name": "default", "template": text}], "odd": odd}[how]
        spoiling.changed(base / name, settings | {"chat_template": value})
        what = f"{what}, {how}" if how != "odd" else f"chat_template is {spoiling.brief(odd)}"
    return Trial(
        origin, random.choice(COMMANDS), f"{BASE}/{name}", what, names=(BASE, name, CHATS), compared=False
    )  # fmt: skip


def template(random: Random, marker: Path) -> tuple[str, str]:
    """A template, and what is wrong with it."""
    group = random.choice([ENDLESS, ENDLESS, ENDLESS, ESCAPES, BROKEN, None, None])
    if group is None:
        return mutated(random)
    text = random.choice(group)
    text = text.replace("@N", str(random.choice(COUNTS))).replace("@M", str(marker))
    # where it stands: in each turn, before a template that is whole, behind it, or alone
    whole = random.choice([turns(text + "{{ m.content }}"), text + CHATML, CHATML + text, text])
    return whole, f"template: {text[:80]!r}"


def mutated(random: Random) -> tuple[str, str]:
    """A known family's, with a piece of it doubled, dropped, or exchanged for another's."""
    name, other = random.sample(sorted(TEMPLATES), 2)
    text, donor = TEMPLATES[name].text, TEMPLATES[other].text
    for _ in range(random.choice([1, 1, 2, 5])):
        start = random.randrange(len(text))
        end = min(len(text), start + random.choice([1, 3, 20, 100]))
        piece = donor[(at := random.randrange(len(donor))) : at + random.choice([1, 3, 20, 100])]
        text = text[:start] + random.choice(["", text[start:end] * 2, piece, "%}", "{{", "'"]) + text[end:]
    return text, f"template of {name}, mutated"


KINDS = (kind("hostile-templates", "A chat template made to harm is refused by name, within bounds.", 300, make),)
