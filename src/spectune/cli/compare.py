"""`spectune compare`: many methods on one base and one data set, under one budget, measured alike."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectune.cli import limits, options
from spectune.cli.arms import arms_of, given_arms, names_of
from spectune.cli.console import complain, import_libraries, note, print_answer, work
from spectune.cli.dry_run import asked, dry_run
from spectune.cli.evaluate import JUDGING, refuse_recorded_code
from spectune.cli.given import Given
from spectune.cli.input_rows import check_inputs
from spectune.cli.known_keys import method_names
from spectune.cli.runs import origin, output_folder, resumed
from spectune.cli.settings import NAMING, Settings
from spectune.errors import ConfigError, InterruptedRun, SpectuneError
from spectune.files.plain_text import command_line

if TYPE_CHECKING:
    from rich.console import Console

    from spectune.comparing import Arm, Comparison

#: Steps of a final run under --quick: enough for each method to fall below the bare base on the embedded task.
QUICK_STEPS = 120


Methods = Annotated[
    str | None,
    typer.Option(
        help=f"Methods, comma-separated: {method_names()}; with settings of their own behind a colon, joined by +: "
        "lora,lora:r=64+task_type=SEQ_CLS.",
        show_default="all of them",
    ),
]
Test = Annotated[
    list[str] | None,
    typer.Option(help="Rows that final runs are evaluated on. Repeatable.", show_default="the validation rows"),
]
Quick = Annotated[
    bool,
    typer.Option("--quick", help=f"Six methods, 3 to 5 learning rates, one run of {QUICK_STEPS} steps each."),
]
Thorough = Annotated[
    bool, typer.Option("--thorough", help="Twice the search, 5 seeds, each memory figure measured in its own process.")
]
Seeds = Annotated[int | None, typer.Option(min=1, help="Final runs of each method.", show_default="3; 1 with --quick")]
Fractions = Annotated[
    str | None,
    typer.Option(help="A data curve: shares of the rows such as 0.1,0.3,1, or numbers of rows such as 100,1000."),
]
Metric = Annotated[
    str | None,
    typer.Option(
        help="loss, exact_match, rouge_l, bleu, chrf, accuracy, macro_f1, matthews, of heads also mse, pearson, "
        "span_f1, token_accuracy, or package.module:function; comma-separated.",
        show_default="by what the rows have",
    ),
]
GenerateRows = Annotated[
    int | None, typer.Option(min=0, help="Rows that every final run generates completions for.", show_default="64")
]
Retain = Annotated[
    Path | None, typer.Option(help="Text on which forgetting is measured.", show_default="sampled from the base itself")
]


def compare(
    context: typer.Context,
    model: options.Model = None,
    data: options.Data = None,
    valid: options.Valid = None,
    methods: Methods = None,
    test: Test = None,
    quick: Quick = False,
    thorough: Thorough = False,
    seeds: Seeds = None,
    fractions: Fractions = None,
    metric: Metric = None,
    generate_rows: GenerateRows = None,
    choice_normalization: options.ChoiceNormalization = None,
    max_memory: limits.MaxMemory = None,
    max_latency_overhead: limits.MaxLatencyOverhead = None,
    tenants: limits.Tenants = None,
    max_stored_bytes: limits.MaxStoredBytes = None,
    min_quality: limits.MinQuality = None,
    retain: Retain = None,
    output_dir: options.OutputDir = None,
    config: options.Config = None,
    assignments: options.Set = None,
    task_type: options.TaskType = None,
    train_on: options.TrainOn = None,
    seed: options.Seed = None,
    resume: options.Resume = False,
    together: options.Together = None,
    dry: options.DryRun = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    base_precision: options.BasePrecision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_missing_weights: options.AllowMissingWeights = False,
    skip_bad_rows: options.SkipBadRows = False,
    as_json: options.Json = False,
) -> None:
    """Measure methods side by side on the same rows, and report which differ.

    Each method gets the same budget: a search for its learning rate, then final runs with several seeds. What is
    measured: loss, metrics of what it writes, forgetting, memory, speed, bytes on disk; with intervals, a verdict that
    says "no difference" where there is none, and a recommendation. As a table here, and as report.html, JSON, CSV,
    Markdown and plots in the folder. Exit code 1 if any run failed; the others are still compared.

    \b
    Examples:
      spectune compare --quick
      spectune compare --model gpt2 --data train.jsonl --valid valid.jsonl --test test.jsonl --methods full,lora,bitfit
      spectune compare --data train.jsonl --fractions 100,300,1 --max-memory 24GiB
      spectune compare --config run.yaml --set lora.r=8 --output-dir runs/ranks
      spectune compare --data train.jsonl --methods lora,lora:task_type=SEQ_CLS
    """
    if quick and thorough:
        raise ConfigError("--quick and --thorough: expected one of them, or neither")
    preset = "quick" if quick else "thorough" if thorough else None
    flags = {**options.flags(context, {"quick", "thorough", *limits.FLAGS}), "preset": preset}
    settings = Settings.collect(config, assignments, flags)
    if quick:
        settings.given.setdefault("max_steps", Given(QUICK_STEPS, "--quick"))
    _run(_gone_on_with(settings), limits.fields(context), quick=quick, dry=dry, as_json=as_json)


def _gone_on_with(settings: Settings) -> Settings:
    """With --resume: what the user left open as the folder has it, but for code."""
    whole = resumed(settings)
    if "metric" not in settings.given:
        refuse_recorded_code(whole.text("metric"), Path(settings.text("output_dir") or ""))
    return whole


def _run(settings: Settings, given: dict[str, Any], *, quick: bool, dry: bool, as_json: bool) -> None:
    """The command with its settings and limits (`given`)."""
    failed = False
    with work(as_json=as_json) as out:
        check_inputs(settings, names_of(given_arms(settings, [])))
        import_libraries()
        from spectune.methods import BY_NAME, SPECTRUM

        default = [str(method.model_fields["name"].default) for method in SPECTRUM] if quick else list(BY_NAME)
        if (precision := settings.text("base_precision")) is not None:  # a base in few bits is not trained itself
            training_it = [name for name in default if BY_NAME[name].trains_base]
            default = [name for name in default if name not in training_it]
            if not any(key in settings.given for key in (*NAMING, "arms")):
                left_out = ", ".join(training_it)
                note(f"base_precision {precision}: {left_out} trains the base's own weights and is left out")
        chosen = arms_of(settings, given_arms(settings, default))
        if dry:
            answer = dry_run(chosen, settings, "compare", out)
        else:
            comparison = _compare(chosen, settings, given, out)
            answer, failed = {"folder": str(comparison.folder), **comparison.to_dict()}, bool(comparison.failed)
            out.print(comparison.table())
            for run in comparison.result.failed:
                seeded = "" if run.seed is None else f", seed {run.seed},"
                complain(f"{run.name}{seeded} failed: {run.reason}")
            note(f"written to {comparison.folder}; the page: {comparison.folder / 'report.html'}")
    print_answer(answer, as_json=as_json)
    if failed:
        raise typer.Exit(SpectuneError.exit_code)


def _compare(arms: list[Arm], settings: Settings, limits: dict[str, Any], out: Console) -> Comparison:
    from spectune.comparing.experiment import WITHIN

    resume = settings.training().resume
    how: dict[str, Any] = {"resume": resume, "within": WITHIN}
    with output_folder(settings.text("output_dir"), "compare", "spectune compare", **how) as folder:
        try:
            return _compare_in(folder, arms, settings, limits, out)
        except (InterruptedRun, KeyboardInterrupt) as stop:
            again = command_line("--output-dir", folder, "--resume")
            raise InterruptedRun(f"the comparison is in {folder}. To go on: the same command with {again}") from stop


def _compare_in(folder: Path, arms: list[Arm], settings: Settings, limits: dict[str, Any], out: Console) -> Comparison:
    from spectune import comparing, embedded
    from spectune.results import Limits

    wanted = settings.training()
    data, valid = settings.rows("data"), settings.rows("valid")
    if data is None:
        data, valid = str(embedded.TRAIN), valid or str(embedded.VALID)
    # each run's config.yaml: its own seed is not that of the split, and eval measures it as it was judged here
    usual = asked(Settings({}))  # is not recorded, nor where --resume finds it so
    judged = {key: value for key, value in asked(settings).items() if key in JUDGING and value != usual[key]}
    named = {key: value for key, value in origin(settings).items() if key != "split_seed"}
    recorded = named | judged | {"split_seed": wanted.seed}
    note(f"base: {settings.base}; methods: {', '.join(arm.name for arm in arms)}; folder: {folder}")
    return comparing.compare(
        settings.base, data, valid, test_rows=settings.rows("test"), methods=arms, **asked(settings),
        limits=Limits(**limits) if limits else None, output_dir=folder, config=wanted, seed=wanted.seed,
        **settings.placement, retain=settings.text("retain"), resume=wanted.resume, origin=recorded,
        console=out,
    )  # fmt: skip
