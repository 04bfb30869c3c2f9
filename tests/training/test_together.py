"""Runs that are trained together end as each of them does alone, whatever becomes of the others."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from spectune.blocks.execution import Execution
from spectune.deltas import Attachment, Method, attach, attached
from spectune.errors import ConfigError, DivergedError, InterruptedRun, OutOfMemoryError, RunsFailedError
from spectune.methods import FullFineTuning, LoRA, PromptTuning, method_from_name
from spectune.results import RunResult
from spectune.training import Run, TrainingConfig, decisions, joint_pass, train, train_together
from spectune.training import loop as loop_module
from spectune.training.joint_batches import Share, in_passes
from spectune.training.rounds import Rounds
from tests.support import make_model, make_rows, make_tokenizer

Weights = dict[str, torch.Tensor]
QUIET = Console(quiet=True)
TOKENIZER = make_tokenizer()


def eight() -> list[Run]:
    """Eight methods, no two of which have the same settings, rows, or number of steps."""
    methods = [
        LoRA(r=2, lora_dropout=0.1), method_from_name("dora", r=3), method_from_name("adapter", bottleneck_dim=4),
        method_from_name("bitfit"), method_from_name("ia3"), method_from_name("ln"),
        method_from_name("prefix", num_virtual_tokens=3), PromptTuning(num_virtual_tokens=2),
    ]  # fmt: skip
    settings: list[dict[str, Any]] = [
        {"max_steps": 5, "eval_steps": 2}, {"num_train_epochs": 1.0, "lr_scheduler_type": "cosine"},
        {"max_steps": 4, "max_grad_norm": 0.01}, {"max_steps": 6, "gradient_accumulation_steps": 2},
        {"max_steps": 3, "warmup_steps": 2}, {"max_steps": 5, "weight_decay": 0.1}, {"max_steps": 4, "eval_steps": 1},
        {"max_steps": 5, "load_best_at_end": False, "optim": "adamw_8bit"},
    ]  # fmt: skip
    return [
        Run(method, make_rows(12 + 2 * n), make_rows(5), config(seed=n, learning_rate=(1 + n) * 1e-3,
                                                               per_device_train_batch_size=2 + n % 3, **own))
        for n, (method, own) in enumerate(zip(methods, settings, strict=True))
    ]  # fmt: skip


def config(**settings: Any) -> TrainingConfig:
    return TrainingConfig(**{"memory_check": "off", "packing": False, "max_steps": 4, **settings})


def alone(run: Run, dropout: float = 0.0, precision: torch.dtype = torch.float32) -> tuple[RunResult, Weights]:
    model = make_model(dropout=dropout, dtype=precision)
    method = run.method
    assert isinstance(method, Method)
    result = train(model, TOKENIZER, method, run.train_rows, run.valid_rows, run.config, console=QUIET)
    return result, weights(model, "default")


def weights(model: Any, name: str) -> Weights:
    return {key: tensor.clone() for key, tensor in attached(model)[name].training_state_dict().items()}


def equal(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def told(result: RunResult) -> dict[str, Any]:
    """What a result says of what was learned."""
    names = ("steps", "best_step", "train_tokens", "target_tokens", "train_loss", "valid_loss", "last_valid_loss",
             "base_valid_loss", "stopped_early", "learning_rate", "seed")  # fmt: skip
    return {name: getattr(result, name) for name in names}


def test_eight_methods_with_dropout_trained_together_end_as_each_does_alone_to_the_last_bit() -> None:
    runs, model = eight(), make_model(dropout=0.1)
    found = train_together(model, TOKENIZER, runs, console=QUIET)
    assert [result.trained_together for result in found] == [8] * 8
    for run, result in zip(runs, found, strict=True):
        expected, ended = alone(run, dropout=0.1)
        assert told(result) == told(expected)
        assert equal(weights(model, result.name), ended), result.name


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The rows of each pass with gradient."""
    rows, forward = list[int](), torch.nn.Embedding.forward

    def noted(self: Any, ids: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.num_embeddings == 300:
            rows.append(ids.shape[0])
        return forward(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", noted)
    return rows


class Asking(TorchDispatchMode):
    """Notes what would wait for a device: numbers that the host reads, and tensors whose size depends on numbers."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "repeat_interleave", "bincount", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.partition("::")[2]
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
        self.asked += [name] if name in self.WAITS or by_mask else []
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [False, True])
def test_a_shared_step_asks_the_device_nothing(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tests/cuda has it; the first steps trace, and look at what is the same in all."""
    if masked:
        monkeypatch.setattr(decisions, "why_mask_is_needed", lambda model: "the test says so")
    launch, rounds, asking = Rounds._launch, list[int](), Asking()

    def watched(self: Any, *given: Any) -> Any:
        rounds.append(len(rounds))
        with asking if len(rounds) in (3, 4) else contextlib.nullcontext():
            return launch(self, *given)

    monkeypatch.setattr(Rounds, "_launch", watched)
    methods = [LoRA(r=2), method_from_name("prefix", num_virtual_tokens=3), PromptTuning(num_virtual_tokens=2)]
    runs = [Run(method, make_rows(16 + n), make_rows(5), config(max_steps=5)) for n, method in enumerate(methods)]
    train_together(make_model(), TOKENIZER, runs, console=QUIET, share_passes=True)
    assert len(rounds) == 5
    assert asking.asked == []


def test_rows_of_unlike_methods_share_a_pass_and_learn_what_they_do_alone(passes: list[int]) -> None:
    runs = [run for run in eight() if not getattr(run.method, "lora_dropout", 0)]
    runs = [Run(without_dropout(run.method), run.train_rows, run.valid_rows, run.config) for run in runs]
    model = make_model(dtype=torch.float64)
    found = train_together(model, TOKENIZER, runs, console=QUIET, share_passes=True)
    longest = max(result.steps for result in found)
    assert max(passes) == sum(run.config.per_device_train_batch_size for run in runs if run.config is not None)
    assert len(passes) < 2.5 * longest + 5  # seven runs would take seven each
    for run, result in zip(runs, found, strict=True):
        expected, ended = alone(run, precision=torch.float64)
        for name, value in told(expected).items():
            assert getattr(result, name) == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value)
        for key, tensor in weights(model, result.name).items():
            assert torch.allclose(tensor, ended[key], atol=1e-4), (result.name, key)


def without_dropout(method: Any) -> Method:
    return method.model_copy(update={"dropout": 0.0}) if hasattr(method, "dropout") else method  # type: ignore[no-any-return]


def test_a_run_that_draws_random_numbers_steps_by_itself_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = [Run(LoRA(r=2), make_rows(), None, config(), "plain"), Run(LoRA(r=2), make_rows(), None, config(), "other"),
            Run(LoRA(r=2, lora_dropout=0.2), make_rows(), make_rows(5), config(seed=3), "draws")]  # fmt: skip
    model = make_model()
    found = train_together(model, TOKENIZER, runs, share_passes=True)
    assert "draws takes its steps by itself: random numbers are drawn in a pass" in capsys.readouterr().out
    expected, ended = alone(runs[2])
    assert told(found[2]) == told(expected)
    assert equal(weights(model, "draws"), ended)


@pytest.mark.parametrize("share", [False, True])
def test_a_run_that_diverges_leaves_without_a_trace_in_the_others(share: bool, tmp_path: Path) -> None:
    good = [Run(LoRA(r=2), make_rows(), make_rows(5), config(max_steps=6, eval_steps=1), "good"),
            Run(method_from_name("ia3"), make_rows(), make_rows(5), config(max_steps=6), "fine")]  # fmt: skip
    bad = Run(LoRA(r=2), make_rows(), make_rows(5), config(max_steps=6, learning_rate=1e30, warmup_steps=0), "bad")
    model, together = make_model(dtype=torch.float64), make_model(dtype=torch.float64)
    expected = train_together(together, TOKENIZER, good, console=QUIET, share_passes=share)
    with pytest.raises(RunsFailedError, match="1 of 3 runs failed:\nbad: ") as failed:
        train_together(
            model, TOKENIZER, [good[0], bad, good[1]], output_dir=tmp_path, console=QUIET, share_passes=share
        )
    assert isinstance(failed.value.failures["bad"], DivergedError)
    assert failed.value.exit_code == DivergedError.exit_code
    assert "the weights of the start (step 0) are kept in" in str(failed.value)
    for result, one in zip(failed.value.results, expected, strict=True):
        assert isinstance(result, RunResult)
        assert result.valid_loss == pytest.approx(one.valid_loss, abs=1e-9)
        assert (tmp_path / result.name / "result.json").is_file()
        for key, tensor in weights(model, result.name).items():
            assert torch.allclose(tensor, weights(together, result.name)[key], atol=0 if not share else 1e-5)
    assert (tmp_path / "bad" / "best").exists()
    assert not (tmp_path / "bad" / "result.json").exists()


def four(folder: Path, *, resume: bool = False) -> list[Run]:
    """Runs that write at other steps."""
    methods = [LoRA(r=2, lora_dropout=0.1), LoRA(r=2), method_from_name("adapter", bottleneck_dim=4), PromptTuning()]
    return [
        Run(method, make_rows(), make_rows(5), config(output_dir=folder / str(n), resume=resume, save_steps=1 + n,
                                                     max_steps=4 + 2 * n, seed=n, eval_steps=2), f"run-{n}")
        for n, method in enumerate(methods)
    ]  # fmt: skip


def behind(patch: pytest.MonkeyPatch, step: int, name: str, how: Callable[[], object]) -> None:
    """Something happens behind a step of one run."""
    finish = loop_module.Loop.finish

    def finished(self: Any) -> float:
        loss = finish(self)
        if self.run.progress.step == step and self.run.delta.name == name:
            how()
        return loss

    patch.setattr(loop_module.Loop, "finish", finished)


def killed() -> None:
    raise MemoryError("killed")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Weights]:
    """What the four end with when nothing happens."""
    model = make_model(dropout=0.1)
    train_together(model, TOKENIZER, four(tmp_path_factory.mktemp("whole")), console=QUIET)
    return {name: weights(model, name) for name in attached(model)}


@pytest.mark.parametrize("signalled", [False, True])
def test_each_run_goes_on_from_its_own_checkpoint_to_the_last_bit(
    whole: dict[str, Weights], tmp_path: Path, signalled: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # in the middle: the first has ended, the others are at their fifth step
        behind(patch, 5, "run-2", (lambda: os.kill(os.getpid(), signal.SIGINT)) if signalled else killed)
        with pytest.raises(InterruptedRun if signalled else MemoryError) as stopped:
            train_together(make_model(dropout=0.1), TOKENIZER, four(tmp_path), console=QUIET)
    if signalled:
        assert str(stopped.value).count("SIGINT after step 5") == 3
        assert "--resume" in str(stopped.value)
        assert all((tmp_path / str(n) / "checkpoint-5").is_dir() for n in (1, 2, 3))
    assert (tmp_path / "0" / "result.json").is_file()
    model = make_model(dropout=0.1)
    found = train_together(model, TOKENIZER, four(tmp_path, resume=True), console=QUIET)
    assert [result.steps for result in found] == [4, 6, 8, 10]
    for name, expected in whole.items():
        assert equal(weights(model, name), expected), name


def test_a_run_that_stops_early_leaves_and_the_others_go_on(passes: list[int]) -> None:
    still = Run(LoRA(r=2), make_rows(), make_rows(5), config(learning_rate=1e-12, max_steps=9, eval_steps=1,
                                                            early_stopping_patience=1), "still")  # fmt: skip
    others = [Run(LoRA(r=2), make_rows(), make_rows(5), config(max_steps=8, seed=n), f"run-{n}") for n in (1, 2)]
    found = train_together(make_model(), TOKENIZER, [still, *others], console=QUIET, share_passes=True)
    assert found[0].stopped_early
    assert found[0].steps < 8
    assert [result.steps for result in found[1:]] == [8, 8]
    assert passes[-1] == 16


def test_memory_that_runs_out_in_a_shared_pass_names_the_runs_and_what_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [Run(LoRA(r=2), make_rows(), make_rows(5), config(seed=n), f"run-{n}") for n in range(4)]

    def full(*_: Any, **__: Any) -> Any:
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(*_, **__)

    objective = type(loop_module.objective_of(make_model()))
    losses = objective.token_losses
    monkeypatch.setattr(objective, "token_losses", full)
    with pytest.raises(OutOfMemoryError, match=r"4 runs together, with a batch of 32 rows .* Train at most 2 of them"):
        train_together(make_model(), TOKENIZER, runs, console=QUIET, share_passes=True)


def refused(runs: Sequence[Run], match: str, **given: Any) -> None:
    model = make_model()
    with pytest.raises(ConfigError, match=match):
        train_together(model, TOKENIZER, runs, console=QUIET, **given)
    assert not attached(model)


def test_what_cannot_be_trained_together_is_refused_by_name_before_anything_is_trained(tmp_path: Path) -> None:
    refused([], "no runs")
    refused([Run(FullFineTuning(), make_rows(), name="all")], "all: .* trains the base itself")
    refused([Run(LoRA(), make_rows(), name="one")] * 2, "several runs are named one")
    shared = [Run(LoRA(), make_rows(), config=config(output_dir=tmp_path / "same"), name=name) for name in "ab"]
    refused(shared, "several runs are written to .*same")
    refused([LoRA()], "expected runs such as spectune.Run")  # type: ignore[list-item]
    refused([Run("lora", make_rows())], "expected a method such as spectune.LoRA")  # type: ignore[arg-type]
    folder = tmp_path / "late"
    good, bad = (Run(LoRA(r=2, target_modules=[name]), make_rows(), config=config()) for name in ("c_fc", "nowhere"))
    refused([good, bad], "nowhere", output_dir=folder)
    assert not folder.exists()
    model = make_model()
    delta = attach(model, LoRA(r=2), "mine")
    with pytest.raises(ConfigError, match="run 'other' trains a delta that is attached as 'mine'"):
        train_together(model, TOKENIZER, [Run(delta, make_rows(), name="other")], console=QUIET)


@pytest.mark.parametrize("share", [False, True])
def test_runs_share_the_time_where_steps_are_in_flight_behind_each_other(
    share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "steps_ahead", lambda _: 1)  # as on CUDA
    runs = [Run(LoRA(r=2), make_rows(), None, config(max_steps=6, seed=n), f"run-{n}") for n in range(3)]
    found = train_together(make_model(), TOKENIZER, runs, console=QUIET, share_passes=share)
    assert [result.steps for result in found] == [6, 6, 6]
    passed = sum(result.seconds_by_phase["steps"] for result in found)
    assert 0 < sum(result.train_seconds for result in found) < 1.2 * passed


def test_runs_are_named_by_their_methods_and_have_a_folder_of_that_name(tmp_path: Path) -> None:
    model = make_model()
    delta = attach(model, LoRA(r=2), "mine")
    runs = [Run(method, make_rows(), make_rows(5), config(max_steps=1)) for method in (LoRA(r=2), LoRA(r=1), delta)]
    runs.append(Run(method_from_name("ia3"), make_rows(), make_rows(5), config(max_steps=1)))
    found = train_together(model, TOKENIZER, runs, output_dir=tmp_path, console=QUIET)
    assert [result.name for result in found] == ["lora-1", "lora-2", "mine", "ia3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ia3", "lora-1", "lora-2", "mine"]
    assert all(result.folder == str(tmp_path / result.name) for result in found)


def test_batches_of_unlike_lengths_do_not_share_a_pass() -> None:
    def share(run: int, length: int) -> Share:
        return Share(run, str(run), [Example(length)] * 4, 1)  # type: ignore[list-item]

    class Example:
        def __init__(self, length: int) -> None:
            self.length = length

    given = [share(0, 100), share(1, 10), share(2, 95), share(1, 90), share(0, 11)]
    found = [[(part.run, part.longest) for part in batch] for batch in in_passes(given)]
    assert found == [[(0, 100), (1, 90), (2, 95)], [(0, 11), (1, 10)]]


def test_what_was_found_of_a_company_of_rows_is_kept_of_the_latest_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint_pass, "_MOST_ROUTES", 2)
    model = make_model()
    for name in "ab":
        attach(model, LoRA(r=2), name)
    passes = joint_pass.JointPasses(model, Execution())
    attachment = Attachment.of(model)
    assert attachment is not None
    for names in ["a", "ab", "ba", "ab", "bb"]:
        with passes._routed(tuple(names)):
            assert attachment.state.current.names == tuple(names)
    assert list(passes._routes) == [("a", "b"), ("b", "b")]
