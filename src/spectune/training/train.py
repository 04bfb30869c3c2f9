"""`train`: from rows and a method to a trained delta, a folder and a result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune.blocks.compile import compiled
from spectune.blocks.cuda_graphs import graphed
from spectune.compute.cudnn import cudnn_attention
from spectune.deltas import Delta, Method, attach, attached, route
from spectune.errors import ConfigError, DivergedError
from spectune.evaluation import perplexity
from spectune.training.attention import takes_cudnn
from spectune.training.checkpoint import Progress, latest_checkpoint, read_state, restore
from spectune.training.checkpointing import memory_budget, modes_of, recomputing
from spectune.training.config import TrainingConfig
from spectune.training.display import Display
from spectune.training.distribution import World
from spectune.training.environment import environment
from spectune.training.execution import compiles, records
from spectune.training.identity import check_identity, read_identity
from spectune.training.loop import Loop
from spectune.training.memory import Predicted, check_memory, predict_memory
from spectune.training.optimizers import make_optimizer
from spectune.training.packing import Packing, decide
from spectune.training.prepare import DEFAULT_LENGTH, Prepared, prepare
from spectune.training.result import RunResult
from spectune.training.run_folder import RunFolder, check_folder, load_end

__all__ = ["DEFAULT_LENGTH", "train"]


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method_or_delta: Method | Delta,
    train_rows: Any,
    valid_rows: Any = None,
    config: TrainingConfig | None = None,
    *,
    name: str = "default",
    origin: Mapping[str, Any] | None = None,
    console: Console | None = None,
    base_valid_loss: float | None = None,
) -> RunResult:
    """Train one method (attached as `name`) or an attached delta; the delta ends as the best of validation.

    Args:
        train_rows, valid_rows: what `spectune.data.load_rows` takes: paths, lists of dicts, `datasets` objects.
            Without `valid_rows` a seeded tenth of the training rows is held out.
        config: see `TrainingConfig`; with an `output_dir` everything is written there.
        origin: entries for config.yaml that say where base and data came from (model, data, valid, device, dtype).
        console: where to print; default is standard output.
        base_valid_loss: the bare base's loss on the validation rows, where it is known already.

    Raises:
        ConfigError, DataError: bad settings or data, a delta that is not of this model or that nothing may be trained
            of, or a run to resume that had other settings, data or base; nothing was trained.
        DoesNotFitError: the plan says that the run does not fit into memory, and `memory_check` is "refuse".
        InterruptedRun, OutOfMemoryError, DivergedError: see `spectune.errors`.
    """
    config = config or TrainingConfig()
    world = World()
    out = (console or Console()) if world.leads else Console(quiet=True)
    folder = config.output_dir
    finished = check_folder(folder, config.resume)
    torch.manual_seed(config.seed)
    if isinstance(method_or_delta, Delta):
        delta = method_or_delta
        _check_delta(model, delta)
    else:
        delta = attach(model, method_or_delta, name, tokenizer=tokenizer, seed=config.seed)
    prepared = prepare(model, tokenizer, delta.method, train_rows, valid_rows, config, delta.base_fingerprint)
    if finished is not None:
        assert folder is not None
        check_identity(read_identity(folder), prepared.identity, folder, "finished run")
        load_end(folder, delta)
        out.print(f"the run in {folder} is finished already: nothing to do", soft_wrap=True, highlight=False)
        return finished

    trained = [parameter for parameter in delta.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError(
            f"delta {delta.name!r} has no weight that may be trained: load it with "
            "spectune.load_delta(..., trainable=True), or set requires_grad on its parameters()"
        )
    packing = decide(model, delta, prepared.examples, config)
    total = total_steps(len(prepared.examples), config, world.size)
    lengths = [len(example.input_ids) for example in prepared.examples]
    length = sum(lengths) // len(lengths)
    compiling = compiles(config, delta.family, delta.method, length=length, steps=total, device_type=model.device.type)
    recording_with = partial(
        records, config, delta, tokens=config.per_device_train_batch_size * length, length=length, packs=packing.on
    )
    cudnn = takes_cudnn(delta.family, lengths, total, config, packs=packing.on)
    predicted = predict_memory(
        model, delta, prepared, config, world, packing, cudnn=cudnn, compiling=compiling,
        recording=recording_with(recomputation=modes_of(model, config.gradient_checkpointing)[0]),
    )  # fmt: skip
    check_memory(predicted, model, delta, config.memory_check)
    optimizer = make_optimizer(trained, config, prepared.learning_rate, world.size)
    progress, best = Progress(), None
    if folder is not None and config.resume and (checkpoint := latest_checkpoint(folder)) is not None:
        progress, recorded = read_state(checkpoint)
        check_identity(recorded, prepared.identity, checkpoint, "checkpoint")
        best = restore(checkpoint, delta, optimizer)
        out.print(f"going on from {checkpoint}", soft_wrap=True, highlight=False)

    run = RunFolder(
        folder if world.leads else None,
        delta,
        optimizer,
        progress,
        best,
        prepared.identity,
        config,
        tokenizer,
        prepared.rows,
    )
    recording = recording_with(recomputation=predicted.checkpointing)
    chosen = {
        "gradient_checkpointing": predicted.checkpointing, "torch_compile": compiling, "cuda_graphs": recording
    }  # fmt: skip
    run.begin(prepared.encoded, {**environment(), **chosen}, origin or {})
    _announce(out, delta, prepared, total, config, packing)
    for notice in (predicted.notice, _COMPILES if compiling else None):
        if notice is not None:
            out.print(notice, soft_wrap=True, highlight=False, markup=False)
    loop = Loop(
        model=model,
        delta=delta,
        optimizer=optimizer,
        train_examples=prepared.examples,
        valid_examples=prepared.valid,
        pad_token_id=pad_token_id(tokenizer),
        config=config,
        learning_rate=prepared.learning_rate,
        total_steps=total,
        progress=progress,
        keeper=run.keeper(),
        world=world,
        packing=packing,
        compiled=compiling,
    )
    try:
        if progress.base_valid_loss is None:
            progress.base_valid_loss = base_valid_loss
        if progress.base_valid_loss is None:
            progress.base_valid_loss = _base_loss(loop, model, delta)
        # by name: whatever else is attached, or active, this delta is what is trained and validated
        with (
            route(model, delta.name),
            cudnn_attention(cudnn),
            compiled(model, delta.family, memory_budget=memory_budget(predicted.checkpointing))
            if compiling
            else nullcontext(),
            recomputing(model, predicted.checkpointing),
            graphed(model, delta.family, trained) if recording else nullcontext(),
            Display(out, delta.method.label, total, progress.step) as display,
        ):
            stopped = loop.run(display)
    except DivergedError:
        run.go_back()
        raise
    finally:
        model.train(False)
        optimizer.close()
        run.close()
    if config.load_best_at_end and progress.best_step != progress.step:
        delta.load_training_state_dict(run.best)
    run.keep_end()
    world.barrier()
    result = _result(run, prepared, predicted, stopped)
    if run.folder is not None:
        result.save(run.folder / "result.json")
    return result


_COMPILES = "the blocks are compiled in the first step, which takes a minute or so (torch_compile=false: not)"


def _check_delta(model: PreTrainedModel, delta: Delta) -> None:
    if delta.model is not model:
        raise ConfigError(
            f"delta {delta.name!r} is attached to another model than the one given: pass delta.model, or attach its "
            "method to this model"
        )
    if attached(model).get(delta.name) is not delta:
        raise ConfigError(
            f"delta {delta.name!r} is not attached to the model any more (attached are: "
            f"{', '.join(attached(model)) or 'none'}): attach or load it again, and train what that returns"
        )


def _base_loss(loop: Loop, model: PreTrainedModel, delta: Delta) -> float:
    # full fine-tuning is at its base until the first step; all others leave the base as it is
    with route(model, delta.name if delta.method.trains_base else None):
        loss = loop.valid_loss()
    if not math.isfinite(loss):
        raise DivergedError(
            f"the validation loss of the bare base is {loss}, before any step: nothing was trained. Try another dtype "
            "(float32 or bfloat16), and look at the base and the data."
        )
    return loss


def _result(run: RunFolder, prepared: Prepared, predicted: Predicted, stopped: bool) -> RunResult:
    delta, progress, config = run.delta, run.progress, run.config
    valid_loss = progress.best_loss if config.load_best_at_end else progress.valid_loss
    return RunResult(
        method=delta.method.name,
        name=delta.name,
        settings=delta.method.model_dump(mode="json"),
        seed=config.seed,
        learning_rate=prepared.learning_rate,
        trainable_parameters=delta.num_trained_parameters(),
        stored_parameters=delta.num_parameters(),
        total_parameters=delta.family.num_parameters,
        stored_bytes=run.stored_bytes(),
        steps=progress.step,
        best_step=progress.best_step,
        train_tokens=progress.tokens,
        target_tokens=progress.targets,
        train_loss=progress.last_epoch_loss,
        valid_loss=valid_loss,
        last_valid_loss=progress.valid_loss,
        base_valid_loss=progress.base_valid_loss,
        valid_perplexity=None if valid_loss is None else perplexity(valid_loss),
        train_tokens_per_second=(progress.timed_tokens or progress.tokens)
        / (progress.timed_seconds or progress.seconds),
        train_seconds=progress.seconds,
        peak_memory_bytes=progress.peak_memory_bytes,
        predicted_memory_bytes=predicted.memory,
        memory_prediction_source=predicted.source,
        gradient_checkpointing=predicted.checkpointing,
        stopped_early=stopped,
        folder=None if config.output_dir is None else str(config.output_dir),
    )


def total_steps(rows: int, config: TrainingConfig, processes: int) -> int:
    """Optimizer steps of a run on so many examples."""
    if config.max_steps > 0:
        return config.max_steps
    batch_count = math.ceil(rows / (config.per_device_train_batch_size * processes))
    per_epoch = math.ceil(batch_count / config.gradient_accumulation_steps)
    return max(1, round(per_epoch * config.num_train_epochs))


def _announce(
    out: Console, delta: Delta, prepared: Prepared, total: int, config: TrainingConfig, packing: Packing
) -> None:
    trained, base = delta.num_trained_parameters(), delta.family.num_parameters
    lines = [
        f"{delta.method.label}: {trained:,} trainable of {base:,} weights ({100 * trained / base:.4g}%)",
        f"{total} steps of {config.per_device_train_batch_size * config.gradient_accumulation_steps} rows, "
        f"{len(prepared.examples):,} rows to train on, {len(prepared.valid):,} to validate, learning rate "
        f"{prepared.learning_rate:g}"
        + ("" if config.learning_rate else f" (default; {delta.method.default_learning_rate_source})"),
    ]
    if (notice := delta.method.notice(delta.family)) is not None:
        lines.append(f"note: {notice}")
    if packing.notice is not None:
        lines.append(packing.notice)
    # nothing is cut or dropped in silence; data_report.json has every row
    summaries = [found.report.summary(part) for part, found in zip(("train", "valid"), prepared.encoded, strict=True)]
    lines += [f"{line} (see data_report.json)" for line in summaries if line]
    for line in lines:
        out.print(line, soft_wrap=True, highlight=False, markup=False)


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands where a row has no token; it is masked, so any id will do."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(pad or 0)
