"""What `spectune plan` takes a run to be: how long it is, and so whether its blocks are compiled and recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectune.blocks.execution import Execution
    from spectune.data import Example
    from spectune.deltas import Method
    from spectune.families import Family
    from spectune.planning import Estimate
    from spectune.training import TrainingConfig


@dataclass(frozen=True)
class PlannedRun:
    """A run as far as a plan is told of it.

    Attributes:
        place: kind of device.
        length: tokens of a row, on average.
        longest: tokens of a row of the batch that is planned.
        steps: optimizer steps; None where nobody says how many.
        packs: rows share sequences, as far as that is known.
        cudnn: steps may take cuDNN's attention, where the device has it.
    """

    config: TrainingConfig
    family: Family
    place: str
    length: int
    longest: int
    steps: int | None
    packs: bool
    cudnn: bool

    @classmethod
    def of(cls, config: TrainingConfig, base: Any, place: str, longest: int, examples: Sequence[Example] | None) -> Any:
        """The run on these rows, or where there are none, on as many rows of `longest` tokens as the settings say."""
        from spectune.families import family_from_config
        from spectune.training.attention import takes_cudnn
        from spectune.training.packing import wanted
        from spectune.training.train import total_steps

        family, cudnn = family_from_config(base), True
        length, steps, packs = longest, config.max_steps if config.max_steps > 0 else None, config.packing is True
        if examples:
            lengths = [len(example.input_ids) for example in examples]
            length, longest = sum(lengths) // len(lengths), max(lengths)
            steps = total_steps(len(lengths), config, 1)
            packs = wanted(family, lengths, config, place)
            cudnn = takes_cudnn(family, lengths, steps, config, packs=packs)
        return cls(config, family, place, length, longest, steps, packs, cudnn)

    def compiles(self, method: Method) -> bool:
        """Whether its blocks are compiled. A run of unknown length is taken to be short where "auto" decides."""
        from spectune.training.execution import compiles

        return compiles(self.config, self.family, method, length=self.length, steps=self.steps or 0,
                        device_type=self.place)  # fmt: skip

    def records(self, method: Method) -> bool:
        """Whether its blocks are recorded as CUDA graphs, if nothing is recomputed.

        Raises:
            ConfigError: they cannot be, and are to be.
        """
        from spectune.training.execution import records_on

        tokens, mode = self.config.per_device_train_batch_size * self.length, self.config.gradient_checkpointing
        return records_on(self.place, self.config, self.family, method, tokens=tokens, length=self.length,
                          packs=self.packs, recomputation=False if mode == "auto" else mode)  # fmt: skip

    def execution(self, method: Method) -> Execution:
        """How its blocks run, recomputation aside. On a CPU a run's first steps, which hold its longest batch, are not
        compiled, as tensors are counted in them. So that is planned.

        Raises:
            ConfigError: they cannot be captured as CUDA graphs, and are to be.
        """
        from spectune.blocks.execution import Execution

        return Execution(self.compiles(method) and self.place != "cpu", self.records(method), cudnn=self.cudnn)

    def said(self, estimates: Sequence[tuple[Method, Estimate]]) -> list[str]:
        """Lines on what "auto" came to, and why."""
        lines = [*self._said_of_compiling([method for method, _ in estimates])]
        if recorded := [method.name for method, estimate in estimates if estimate.cuda_graphs]:
            lines.append(
                f"cuda_graphs={_word(self.config.cuda_graphs)}: blocks are recorded for {', '.join(recorded)}. Planned "
                "is what the recordings of one shape of a batch keep; each further shape that comes back keeps its own"
            )
        return lines

    def _said_of_compiling(self, methods: Sequence[Method]) -> list[str]:
        compiled = [method.name for method in methods if self.compiles(method)]
        lines = []
        if self.config.torch_compile == "auto":
            if self.steps is None:
                lines.append(
                    "torch_compile=auto: blocks are planned without the compiler, as nothing says how long the run is. "
                    "--data or --set max_steps=N says it, --set torch_compile=true plans compiled blocks"
                )
            elif len(compiled) in (0, len(methods)):
                lines.append(f"torch_compile=auto: {_word(bool(compiled))}, for a run of {self.steps:,} steps")
            else:
                lines.append(
                    f"torch_compile=auto: true for {', '.join(compiled)}, false for the others, in a run of "
                    f"{self.steps:,} steps"
                )
        if compiled and self.place == "cpu":
            lines.append(
                "on a CPU the first steps, which hold the longest batch, run without the compiler: they are planned"
            )
        return lines


def _word(value: bool | str) -> str:
    return str(value).lower()
