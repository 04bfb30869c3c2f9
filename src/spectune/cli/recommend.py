"""`spectune recommend`: which method to take, from a comparison's measurements, or from the textbook without any."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectune.cli import limits, options
from spectune.cli.console import note, print_answer, say, work
from spectune.cli.runs import RUNS, find_comparison
from spectune.errors import ConfigError
from spectune.sizes import bytes_of

if TYPE_CHECKING:
    from rich.console import Console

COMPARISON = "comparison.json"
#: the parameters that are questions of the guide
QUESTIONS = ("rows", "tasks", "compute", "must_merge", "keep_base", "fast_iteration", "max_quality")


def recommend(
    context: typer.Context,
    run: Annotated[
        Path | None, typer.Option("--run", help="A comparison's folder.", show_default="the newest under runs/")
    ] = None,
    max_memory: limits.MaxMemory = None,
    max_latency_overhead: limits.MaxLatencyOverhead = None,
    tenants: limits.Tenants = None,
    max_stored_bytes: limits.MaxStoredBytes = None,
    min_quality: limits.MinQuality = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Guide: training rows.")] = None,
    tasks: Annotated[int | None, typer.Option(min=1, help="Guide: tasks that one base will serve.")] = None,
    compute: Annotated[str | None, typer.Option(help="Guide: low, medium, high, or memory such as 24GiB.")] = None,
    must_merge: Annotated[bool, typer.Option("--must-merge", help="Guide: the result must be plain weights.")] = False,
    keep_base: Annotated[bool, typer.Option("--keep-base", help="Guide: the base must stay as it is.")] = False,
    fast_iteration: Annotated[bool, typer.Option("--fast-iteration", help="Guide: quick results matter most.")] = False,
    max_quality: Annotated[bool, typer.Option("--max-quality", help="Guide: the lowest loss, at any cost.")] = False,
    as_json: options.Json = False,
) -> None:
    """Recommend a method, with the reasons.

    From a comparison: the cheapest within your limits that is not worse than the best within noise, with the runs that
    prove each sentence; or what the evidence leaves open. Without a limit those count that the comparison was made
    with. Without a comparison, or with one of the guide's flags: the textbook's rules that apply, their sources, and
    the command that would measure it.

    \b
    Examples:
      spectune recommend --max-memory 24GiB --tenants 10
      spectune recommend --run runs/2026-01-31-compare-1 --max-latency-overhead 5% --min-quality 95
      spectune recommend --rows 800 --tasks 20 --compute 24GiB --keep-base
    """
    wanted, asked = limits.fields(context), _asked(context)
    if asked and (run is not None or wanted):
        raise ConfigError(
            f"{_flags(asked)} ask the textbook's guide, {_flags(wanted) if wanted else '--run'} a comparison: give one "
            "kind or the other"
        )
    folder = None if asked else find_comparison(run, COMPARISON)
    if folder is None and wanted:
        raise ConfigError(
            f"{_flags(wanted)} is a limit on what a comparison measured, and there is none under {RUNS.absolute()}. "
            "`spectune compare` makes one; or name its folder with --run."
        )
    with work(as_json=as_json) as out:
        if folder is None:
            from spectune.comparing.advising.guide import guide
            from spectune.comparing.advising.rules_of_thumb import Answers

            answer = guide(Answers(**asked))
            if not as_json:
                _print_guide(out, answer)
        else:
            answer = {"folder": str(folder), **_measured(folder, wanted)}
            if not as_json:
                note(f"from {folder}")
                _print_measured(out, answer)
    print_answer(answer, as_json=as_json)


def _asked(context: typer.Context) -> dict[str, Any]:
    """The guide's questions that the user answered, by the names of its `Answers`."""
    given = {name: context.params[name] for name in QUESTIONS if context.params[name]}
    if (compute := given.pop("compute", "")).lower() in ("low", "medium", "high"):
        given["compute"] = compute.lower()
    elif compute:
        given["memory_bytes"] = bytes_of(compute, "--compute (low, medium, high or memory)")
    return given


def _flags(keys: dict[str, Any]) -> str:
    names = {"memory_bytes": "compute", "max_memory_bytes": "max-memory"}
    return ", ".join("--" + names.get(key, key).replace("_", "-") for key in keys)


def _measured(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    from spectune.comparing.advising.recommend import recommend
    from spectune.comparing.judging.verdict import verdict
    from spectune.results import ComparisonResult, Limits

    result = ComparisonResult.load(folder)
    result.verdict = result.verdict or verdict(result, folder)  # none in files from before there were verdicts
    made_with = None if result.recommendation is None else result.recommendation.limits
    found = recommend(result, Limits(**wanted) if wanted else made_with)
    return {**found.to_dict(), "verdict": result.verdict.sentences}


def _print_measured(out: Console, answer: dict[str, Any]) -> None:
    say(out, answer["abstains"] or f"Recommended: {answer['pick']}", style="bold")
    for title, reasons in (("", answer["reasons"]), ("\nLeft out by your limits", answer["excluded"])):
        if title and reasons:
            say(out, title, style="bold")
        for reason in reasons:
            say(out, f"- {reason['text']}")
            say(out, f"  proved by {', '.join(reason['runs'])}", style="dim")
    say(out, "\nNo other method is as good on all of loss, memory, storage, inference and training time", style="bold")
    say(out, f"  {', '.join(answer['pareto']) or '-'}")
    say(out, "\nThe verdict of the comparison", style="bold")
    for sentence in answer["verdict"]:
        say(out, f"  {sentence}")


def _print_guide(out: Console, answer: dict[str, Any]) -> None:
    none = "No question was answered, so no rule applies yet; these are the rules, and when they apply"
    say(out, "Rules of thumb that apply" if answer["rules"] else none, style="bold")
    for rule in answer["rules"] or answer["others"]:
        say(out, f"\n{rule['name']}: {rule['condition']}")
        say(out, f"  {rule['why']}")
        for words, names in (("toward", rule["toward"]), ("away from", rule["away"])):
            if names:
                say(out, f"  {words} {', '.join(names)}")
        say(out, f"  source: {rule['source']}", style="dim")
    if answer["rules"]:
        say(out, "\nFor and against", style="bold")
        for method in answer["methods"]:
            for word in ("for", "against"):
                if method[word]:
                    say(out, f"  {method['label']:<14} {word + ':':<9} {'; '.join(method[word])}")
    else:
        say(out, "\nAnswer with --rows --tasks --compute --must-merge --keep-base --fast-iteration --max-quality.")
    say(out, "\nRules of thumb rank settings of other people's tasks. To measure it on yours:", style="bold")
    say(out, f"  {answer['command']}\n  {answer['then']}")
