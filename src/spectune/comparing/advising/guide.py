"""The textbook's advice without any run: which rules of thumb apply, their sources, and what would measure it."""

from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

from spectune.comparing.advising.rules_of_thumb import GIB, RULES, Answers, Rule, Traits
from spectune.deltas import Method
from spectune.files.plain_text import command_line
from spectune.methods import BY_NAME, method_from_name
from spectune.planning import reference_shares


def guide(answers: Answers | None = None) -> dict[str, Any]:
    """Which rules apply to the answers, all that overlap, contradicting ones too.

    Returns:
        `answers`; `rules` that apply and `others` that do not, each with `name, condition, why, source, toward, away,
        decides`; `methods` with the rules for and against each; `excluded` by rules of fact; `shortlist`, what is worth
        measuring; `command`, which measures it, and `then`, which asks the measurements.
    """
    answers = answers or Answers()
    methods = [method_from_name(name) for name in BY_NAME]
    traits = [Traits(method, _shares()[method.name]) for method in methods]
    rules = [_as_dict(rule, traits) for rule in RULES if rule.applies(answers)]
    others = [_as_dict(rule, traits) for rule in RULES if not rule.applies(answers)]
    table: list[dict[str, Any]] = [
        {
            "name": method.name,
            "label": method.label,
            "best_for": method.best_for,
            "for": [rule["name"] for rule in rules if method.name in rule["toward"]],
            "against": [rule["name"] for rule in rules if method.name in rule["away"]],
        }
        for method in methods
    ]
    excluded = list(dict.fromkeys(name for rule in rules if rule["decides"] for name in rule["away"]))
    left = [row for row in table if row["name"] not in excluded]
    # more rules for than against it; all that are left where the rules cancel out
    favoured = [row for row in left if len(row["for"]) > len(row["against"])]
    shortlist = [row["name"] for row in favoured or left]
    command, then = _commands(answers, shortlist, methods)
    return {
        "answers": answers.model_dump(exclude_defaults=True),
        "rules": rules,
        "others": others,
        "methods": table,
        "excluded": excluded,
        "shortlist": shortlist,
        "command": command,
        "then": then,
    }


@cache
def _shares() -> Mapping[str, float]:
    """Of GPT-2 124M, what each method at its defaults stores; 0 where it cannot act there."""
    smallest: Any = reference_shares(method_from_name(name) for name in BY_NAME)[0]["shares"]
    return MappingProxyType({name: float(found["share"] or 0) for name, found in smallest.items()})


def _as_dict(rule: Rule, methods: Sequence[Traits]) -> dict[str, Any]:
    toward, away = ([m.method.name for m in methods if leads(m)] for leads in (rule.toward, rule.away))
    words = {"name": rule.name, "condition": rule.condition, "why": rule.why, "source": rule.source}
    return {**words, "toward": toward, "away": away, "decides": rule.decides}


def _commands(answers: Answers, shortlist: Sequence[str], methods: Sequence[Method]) -> tuple[str, str]:
    """The comparison that would measure the shortlist, with full fine-tuning as its yardstick where there is room."""
    yardstick = [method.name for method in methods if method.trains_base and answers.level != "low"]
    names = list(dict.fromkeys([*yardstick, *shortlist]))
    quick = ["--quick"] if answers.fast_iteration else []
    command = command_line("spectune", "compare", "--data", "train.jsonl", "--methods", ",".join(names), *quick)
    limits = ["--tenants", str(answers.tasks)] if (answers.tasks or 1) > 1 else []
    if answers.memory_bytes is not None:
        limits += ["--max-memory", f"{answers.memory_bytes / GIB:g}GiB"]
    return command, command_line("spectune", "recommend", *limits)
