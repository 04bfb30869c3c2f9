"""`route`: which delta each row of the batches inside a `with` uses."""

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn

from spectune.deltas.attachment import Attachment
from spectune.deltas.layout import Route
from spectune.deltas.probes.prompt_mixing import prove_prompts_mix
from spectune.errors import ConfigError

Names = str | None | Sequence[str | None]


@contextlib.contextmanager
def route(model: nn.Module, names: Names) -> Iterator[None]:
    """Choose the delta of each row of the batches inside the `with`; None is the bare base.

    Rows do not touch each other: each has the result that it has alone, whatever the others use and whatever else is
    attached. In `generate` a row's beams and return sequences carry its delta along. The route belongs to the thread
    and the task that enter it: others that share the model do not see it. A thread that is started inside begins
    without one (`contextvars.copy_context().run` takes it along).

    Args:
        names: one name (or None) for all rows, or a list with one for each row.

    Raises:
        ConfigError: a name that is not attached; a fully tuned base in a batch with others, or the bare base under one
            of which no copy was kept; a delta whose place in the model something else has taken; prompts of unlike
            lengths in one batch, on a base whose rows do not stay themselves then; and, from the model, a batch with
            another number of rows.
    """
    attachment = Attachment.of(model)
    wanted = [names] if names is None or isinstance(names, str) else list(names)
    if not wanted:
        raise ConfigError("an empty route: give a name, None, or one of them for each row")
    known = {} if attachment is None else attachment.deltas
    for name in wanted:
        if name is not None and name not in known:
            raise ConfigError(f"no delta {name!r} is attached; attached are: {', '.join(known) or 'none'}")
    if attachment is None:
        yield
        return
    attachment.places.check(wanted)
    tuned = attachment.tuned
    if tuned is not None and tuned.name in wanted and any(name != tuned.name for name in wanted):
        raise ConfigError(
            f"{tuned.name!r} is a fully tuned base ({tuned.method.label}): all weights are its own, so it cannot "
            "share a batch with other deltas or the bare base. Route its rows in a batch of their own."
        )
    prove_prompts_mix(attachment, wanted)
    bare = contextlib.nullcontext() if tuned is None or tuned.name == wanted[0] else tuned.suspended()
    with bare, attachment.state.routed(Route(wanted, per_row=not (names is None or isinstance(names, str)))):
        yield
