"""The validation of a run: the loss of its rows under its weights, and the memory that it takes."""

from collections.abc import Sequence

from spectune.compute.memory import counts_tensors
from spectune.data import Example
from spectune.evaluation import RowLosses, row_losses
from spectune.training.peaks import Peaks
from spectune.training.run_state import RunState
from spectune.training.shared_validation import shared_losses


def valid_losses(run: RunState, examples: Sequence[Example] | None = None) -> RowLosses:
    """The loss of each validation row under the current route, of which each process takes a share; of these examples,
    if there are any, on this process alone."""
    model, batch = run.delta.model, run.config.per_device_eval_batch_size

    def losses(rows: Sequence[Example]) -> RowLosses:
        return row_losses(model, rows, run.batches.pad_token_id, batch)

    if examples is not None:
        return losses(examples)
    return shared_losses(run.valid_examples, losses, run.batches.world, model.device)


def measured_losses(run: RunState, peaks: Peaks) -> RowLosses:
    """The same of all rows, between two stretches of training, with their peak of memory kept."""
    peaks.pause()
    if counts_tensors(run.delta.model.device.type):
        if run.observer.memory and not any(name.startswith("valid_") for name in peaks.found):
            # its peak of memory is that of its first batch, the longest rows. They are run once for it, beside the
            # run's own validation, which counting tensors would slow down
            order = sorted(run.valid_examples, key=lambda example: -example.length)
            with peaks.of("valid"):
                valid_losses(run, order[: run.config.per_device_eval_batch_size])
        losses = valid_losses(run)
    else:
        with peaks.of("valid"):
            losses = valid_losses(run)
    peaks.resume()
    return losses
