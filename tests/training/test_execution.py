"""How a run is executed is decided once: whoever asks, and by whatever route, is given the same, and the same plan."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig
from typer.testing import CliRunner

from spectune.blocks.call import call_of, decoder_blocks
from spectune.blocks.cuda_graphs import BEFORE_CAPTURE
from spectune.blocks.execution import Execution, Packing
from spectune.cli.app import build_app
from spectune.comparing import isolated, job
from spectune.comparing.isolated import _measure, memory_job
from spectune.comparing.job import Arm, Job
from spectune.compute.cudnn import cudnn_allowed
from spectune.data import encode, load_rows
from spectune.deltas import Method, attach
from spectune.errors import ConfigError
from spectune.families import describe, family_from_config
from spectune.methods import METHODS, FullFineTuning, LoRA, PrefixTuning
from spectune.storage import load
from spectune.storage.bases import load_config
from spectune.training import TrainingConfig, run_state, starting, train
from spectune.training.decisions import compiling_gain, decide, launch_bound
from spectune.training.prediction import Prediction
from tests.contract.families import FAMILIES
from tests.support import make_model, make_rows, make_tokenizer
from tests.training.test_graphs import Again, batches, passes

QUIET = Console(quiet=True)
STEPS = 2


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, training rows of which every third is long, and validation rows, on disk."""
    folder = tmp_path_factory.mktemp("execution")
    make_model().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    rows = [{**row, "completion": row["completion"] * (3 if n % 3 == 0 else 1)} for n, row in enumerate(make_rows(24))]
    found = {"base": folder / "base"}
    for name, part in {"train": rows, "valid": make_rows(30)[24:]}.items():
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps(row) + "\n" for row in part))
    return found


class Routes:
    """The routes through the program to a plan, on the same base, method, settings and rows."""

    def __init__(self, method: Method, settings: dict[str, Any], files: dict[str, Path], patch: Any) -> None:
        self.method, self.settings, self.files, self.patch = method, settings, files, patch
        self.config = TrainingConfig(**settings)
        self.predicted: list[Prediction] = []
        for module in (starting, job):
            patch.setattr(module, "predict", self._noting(module.predict))  # type: ignore[attr-defined]

    def _noting(self, real: Any) -> Any:
        def noting(*args: Any) -> Prediction:
            self.predicted.append(real(*args))
            return self.predicted[-1]

        return noting

    def train(self) -> Prediction:
        model, tokenizer = load(str(self.files["base"]), device="cpu")
        train(model, tokenizer, self.method, self.files["train"], self.files["valid"], self.config, console=QUIET)
        return self.predicted.pop()

    def comparison(self) -> Prediction:
        model, tokenizer = load(str(self.files["base"]), device="cpu")
        parts = [encode(load_rows(self.files[name]), tokenizer, max_length=56) for name in ("train", "valid")]
        unused: Any = None
        # an arm is checked before its rate and steps are chosen: the comparison's config has neither
        config = self.config.model_copy(update={"max_steps": -1})
        rows: Any = SimpleNamespace(train=parts[0], valid=parts[1])
        schedule: Any = SimpleNamespace(final_steps=STEPS)
        checked = Job(
            Path(), "", None, model, tokenizer, arms=[], config=config, inputs=rows, passages=[], schedule=schedule,
            conditions=unused, origin=None, console=QUIET,
        )  # fmt: skip
        checked.check_memory(Arm("arm", self.method))
        return self.predicted.pop()

    def dry_run(self) -> Prediction:
        self._command("train", "--dry-run")
        return self.predicted.pop()

    def plan(self) -> dict[str, Any]:
        [found] = self._command("plan")["methods"]
        return dict(found)

    def _command(self, name: str, *flags: str) -> Any:
        given = [f"--set={key}={str(value).lower()}" for key, value in self.settings.items()]
        own = self.method.model_dump(exclude={"name"}, exclude_defaults=True)
        given += [f"--set={key}={value}" for key, value in own.items()]
        where = ["--model", str(self.files["base"]), "--data", str(self.files["train"]), "--device", "cpu"]
        where += [f"--set=valid={self.files['valid']}", "--method", self.method.name, "--json"]
        result = CliRunner().invoke(build_app(), [name, *flags, *where, *given])
        assert result.exit_code == 0, result.stderr or result.exception
        return json.loads(result.stdout)

    def own_process(self) -> Execution:
        """What the measuring process executes; its work is done here."""
        seen: list[Execution] = []
        loop = isolated.Loop

        def noting(run: Any, execution: Execution) -> Any:
            seen.append(execution)
            return loop(run, execution)

        self.patch.setattr(isolated, "Loop", noting)
        base = {"name": str(self.files["base"]), "device": "cpu", "dtype": "float32"}
        _measure(memory_job(base, self.method, self.config, self.files["train"]))
        [found] = seen
        return found


def small(method: type[Method]) -> Method:
    virtual = {"num_virtual_tokens": 4} if "num_virtual_tokens" in method.model_fields else {}
    return method(**virtual)


def value(found: Any, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """An estimate field by field."""
    return {name: field for name, field in found.items() if name not in {"model", "label", "fits", *without}}


SETTINGS: dict[str, dict[str, Any]] = {
    "auto": {},
    "selective": {"packing": False, "gradient_checkpointing": "selective", "gradient_accumulation_steps": 2},
    "compiled": {"torch_compile": True, "packing": False},
}
#: what a method can be to a plan: it trains the base, has tokens of its own, has weights beside the base's. These are
#: asked for as they are, and one of them with each further setting; the rest is behind `-m slow`
KINDS = (FullFineTuning, LoRA)
FURTHER = {"selective": PrefixTuning, "compiled": LoRA}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        pytest.param(
            method,
            settings,
            id=f"{method.__name__}-{name}",
            marks=[] if method is FURTHER.get(name) or (name == "auto" and method in KINDS) else pytest.mark.slow,
        )
        for method in METHODS
        for name, settings in SETTINGS.items()
    ],
)
def test_the_plan_of_an_arm_is_the_plan_of_its_run_by_every_route(
    method: type[Method], settings: dict[str, Any], files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"max_steps": STEPS, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4,
              "max_length": 56}  # fmt: skip
    routes = Routes(small(method), {**common, **settings}, files, monkeypatch)
    run = routes.train()
    assert run.estimate is not None
    assert run.execution.packing.on is ("packing" not in settings)
    arm, dry = routes.comparison(), routes.dry_run()
    assert arm == run
    assert dry.execution == run.execution
    assert dry.estimate == run.estimate
    planned = routes.plan()
    # what the user is told is whether the run compiles: its first steps, which are planned, do not on a CPU
    assert planned["torch_compile"] is run.execution.compiled
    without = ("torch_compile",)
    expected = json.loads(json.dumps(run.estimate.to_dict() | run.memory))
    assert value(planned, without=without) == value(expected, without=without)
    assert routes.own_process() == run.execution


def test_what_memory_asks_for_is_recomputed_by_every_route(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from spectune.training import prediction

    common = {"max_steps": STEPS, "per_device_train_batch_size": 4, "packing": False, "max_length": 56,
              "memory_check": "warn"}  # fmt: skip
    routes = Routes(LoRA(), common, files, monkeypatch)
    monkeypatch.setattr(prediction, "free_memory", lambda device: 1)
    run = routes.train()
    assert run.execution.recomputation is True
    assert routes.comparison() == run
    assert routes.dry_run().execution == run.execution


def test_without_a_model_what_only_it_can_tell_is_taken_to_be_so_and_said() -> None:
    model = make_model()
    delta = attach(model, LoRA())
    unlike, alike = [40, 20, 19, 18] * 8, [20] * 32
    for lengths in (unlike, alike):
        config = TrainingConfig(per_device_train_batch_size=4)
        known = decide(config, delta.family, delta.method, lengths, "cpu", steps=9, delta=delta)
        unknown = decide(config, describe(make_model()), LoRA(), lengths, "cpu", steps=9)
        assert replace(unknown, packing=known.packing) == known
        assert unknown.packing.on == known.packing.on == (lengths is unlike)
        assert unknown.packing.mask_free == known.packing.mask_free
    config = TrainingConfig(per_device_train_batch_size=4)
    reason = decide(config, delta.family, LoRA(), unlike, "cpu", steps=9).reason("packing")
    assert reason is not None
    assert "if the model keeps documents apart" in reason
    proved = decide(config, delta.family, LoRA(), unlike, "cpu", steps=9, delta=delta).reason("packing")
    assert proved is not None
    assert "fewer tokens to compute than padded" in proved


def test_blocks_whose_experts_a_delta_changes_are_compiled_only_where_it_is_asked_for() -> None:
    """A compiled graph makes the sum of weights and change, which takes the experts' memory again."""
    family, experts = describe(FAMILIES["mixtral"]()), LoRA(target_parameters="all-experts")
    for method, compiled in ((LoRA(), True), (experts, False)):
        found = decide(TrainingConfig(), family, method, [60], "cuda", steps=10**9)
        assert found.compiled is compiled
        assert ("changed weights of all experts" in str(found.reason("torch_compile"))) is not compiled
    assert decide(TrainingConfig(torch_compile=True), family, experts, [60], "cuda", steps=1).compiled


def test_a_run_is_judged_by_the_rows_it_has() -> None:
    config, method = TrainingConfig(per_device_train_batch_size=2), LoRA()
    family, large = family_from_config(load_config("spectune-tiny")), family_from_config(LlamaConfig())
    alike, unlike = [100] * 10, [100] * 10 + [5] * 10
    found = decide(config, family, method, alike, "cuda", steps=15)
    assert found.graphs is launch_bound(family, method, tokens=200, length=100)
    gain = compiling_gain(family, method, tokens=3000, steps=15, length=100, device_type="cuda")
    assert gain is not None
    assert found.compiled is gain.pays
    assert found.reason("torch_compile") == str(gain)
    assert not found.packing.on
    assert decide(config, family, method, unlike, "cpu", steps=15).packing.on
    # a GPU waits for the host here, with padding and without
    assert not decide(config, family, method, unlike, "cuda", steps=15).packing.on
    many = TrainingConfig(per_device_train_batch_size=64)
    packed = decide(many, large, method, unlike * 10, "cuda", steps=15)
    assert packed.packing.on
    assert not packed.graphs
    with pytest.raises(ConfigError, match="packing=false"):
        decide(many.model_copy(update={"cuda_graphs": True}), large, method, unlike * 10, "cuda", steps=15)
    short = decide(config, family, method, [512], "cuda", steps=None)
    assert (short.compiled, short.packing.on, short.cudnn) == (False, False, True)


def test_where_tensors_are_counted_the_first_steps_are_not_compiled() -> None:
    compiled = Execution(compiled=True, recomputation="selective")
    assert compiled.of_first_steps("cuda") == compiled
    assert compiled.of_first_steps("cpu") == replace(compiled, compiled=False)


def test_graphs_go_with_no_recomputation() -> None:
    graphs = Execution(graphs=True)
    assert graphs.recomputing(False).graphs
    for mode in ("selective", True, "offload"):
        assert graphs.recomputing(mode) == Execution(recomputation=mode)  # type: ignore[arg-type]


def test_it_is_applied_and_taken_back_whatever_happens() -> None:
    delta = attach(make_model(), LoRA(r=4))
    delta.model.train()
    blocks, before = decoder_blocks(delta.model, delta.family), cudnn_allowed()
    for execution in (
        Execution(compiled=True, cudnn=False),
        Execution(compiled=True, recomputation=True),
        Execution(recomputation="selective"),
        Execution(compiled=True, graphs=True),
    ):

        def fails(execution: Execution = execution) -> None:
            assert all(call_of(block) is not None for block in blocks)
            assert cudnn_allowed() is (before and execution.cudnn)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError), execution.applied(delta, backend="eager", capture=Again):
            fails()
        assert all(call_of(block) is None for block in blocks)
        assert cudnn_allowed() is before


def test_compiled_blocks_are_captured_with_what_compiles_them_inside() -> None:
    torch._dynamo.reset()
    plain, applied = (attach(make_model(), LoRA(r=4)) for _ in range(2))
    for delta in (plain, applied):
        delta.model.train()
    expected = passes(plain.model, plain, batches(BEFORE_CAPTURE + 2))
    with Execution(compiled=True, graphs=True).applied(applied, backend="eager", capture=Again):
        found = passes(applied.model, applied, batches(BEFORE_CAPTURE + 2))
    torch._dynamo.reset()
    assert found[0] == pytest.approx(expected[0], rel=1e-5)


def test_it_is_a_value() -> None:
    one, other = (Execution(packing=Packing(True), graphs=True).because("packing", why) for why in ("so", "for"))
    assert one == other
    assert hash(one) == hash(other)
    assert (one.reason("packing"), one.reason("cuda_graphs")) == ("so", None)
    assert one.because("packing", None) is one


def test_a_run_s_memory_is_free_when_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when Python's collector comes by: the next run of a comparison would find it in its way."""
    optimizers: list[weakref.ref[Any]] = []
    real = run_state.make_optimizer

    def noting(*args: Any) -> Any:
        optimizer = real(*args)
        optimizers.append(weakref.ref(optimizer))
        return optimizer

    monkeypatch.setattr(run_state, "make_optimizer", noting)
    config = TrainingConfig(max_steps=3, per_device_train_batch_size=4, output_dir=tmp_path / "run")
    gc.collect()
    gc.disable()
    try:
        train(make_model(), make_tokenizer(), LoRA(r=2), make_rows(), make_rows(6), config, console=QUIET)
        assert [optimizer() for optimizer in optimizers] == [None]
    finally:
        gc.enable()
