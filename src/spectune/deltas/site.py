"""The four kinds of place where a delta acts: plain values."""

from dataclasses import dataclass, field

from spectune.families import Attention


@dataclass(frozen=True)
class _AtModule:
    """A place at the module at `path`."""

    path: str

    @property
    def host(self) -> str:
        """The path of the module that the delta's module is a child of."""
        return self.path


@dataclass(frozen=True)
class OutputSite(_AtModule):
    """After a module: the delta's module sees its input and output and returns a new output.

    Attributes:
        entry: it acts before the module instead: it sees the input and returns a new one (`EntryModule`).
        on: the module's parameter that is changed instead of its input or output (`SideModule.acts_on`), where the
            base uses the parameter without calling the module, or the output is more than the linear map; else None.
        overwritten: the base writes into the output in place: what a backward pass needs of it has to be kept apart.
    """

    in_features: int
    out_features: int
    entry: bool = field(default=False, kw_only=True)
    on: str | None = field(default=None, kw_only=True)
    overwritten: bool = field(default=False, kw_only=True, compare=False)


@dataclass(frozen=True)
class AttentionSite(_AtModule):
    """Inside attention: the delta's module supplies keys and values that stand before the layer's own."""

    attention: Attention


@dataclass(frozen=True)
class InputSite(_AtModule):
    """The sequence itself: the delta's module supplies embeddings that stand before the text at the decoder's entry."""

    hidden_size: int


@dataclass(frozen=True)
class ParameterSite:
    """In place of a parameter of the base, while the layer that holds it runs: the delta's module makes the changed one
    of it. For weights that are not used through a module's own output (state-space steps, convolutions, experts).

    Attributes:
        host: path of the module that holds the parameter, and that the delta's module is a child of.
        name: its name there.
    """

    host: str
    name: str
    shape: tuple[int, ...]

    @property
    def path(self) -> str:
        return f"{self.host}.{self.name}"


@dataclass(frozen=True)
class MatrixSite(ParameterSite):
    """A parameter that is a matrix, or one for each expert (`families.Matrix`). `transposed`: each is `[in, out]`."""

    transposed: bool


Site = OutputSite | AttentionSite | InputSite | ParameterSite
