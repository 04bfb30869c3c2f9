"""How an engine's steps are run: as they are, recorded as CUDA graphs, or compiled before that: what pays."""

import logging
from collections.abc import Callable
from functools import partial

from transformers import PreTrainedModel

from spectune.blocks.recorded_steps import Form, PlainSteps, RecordedSteps, Steps
from spectune.blocks.step_blocks import Compiling, StepBlocks
from spectune.errors import ConfigError
from spectune.families import Family
from spectune.inference.decode_batch import DecodeBatch

log = logging.getLogger("spectune")

#: steps from which on recording one pays: it takes about as long as five of them
RECORDING_PAYS = 8
#: seconds for compiling a block in its few shapes, and seconds that a step is faster by for each block: what some
#: thirty small kernels take that become four
COMPILING_TAKES, COMPILING_SAVES = 60.0, 60e-6


def steps_for(
    model: PreTrainedModel, family: Family, expected: float, *, compiling: Compiling | None = None
) -> Callable[[DecodeBatch], Steps]:
    """What makes the steps of a batch.

    Args:
        expected: about how many steps are to come.
        compiling: compile so, whether it pays or not.
    """
    if model.device.type != "cuda" or expected < RECORDING_PAYS:
        return lambda batch: PlainSteps(batch.run)
    if compiling is None and expected * len(family.layers) * COMPILING_SAVES > COMPILING_TAKES:
        compiling = Compiling()
    costly = compiling is not None
    return lambda batch: RecordedSteps(batch.run, model.dtype, forms_of(batch, family, compiling), costly=costly)


def forms_of(batch: DecodeBatch, family: Family, compiling: Compiling | None) -> list[Form]:
    """The ways in which a batch's step can be recorded, the fastest first."""
    found = []
    try:
        for how in (compiling, None) if compiling else (None,):
            blocks = StepBlocks(batch.call.model, family, how)
            name = "a step by lengths" if how is None else "a compiled step"
            found.append(Form(name, partial(blocks.exchanged, batch.cache)))
    except ConfigError as error:
        log.debug("decoding: %s", error)
    return [*found, Form("a step as it is")]
