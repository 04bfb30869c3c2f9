"""The limits of a user and the recommendation within them, as a comparison's file has them."""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from spectune.results.record import Record


class Limits(BaseModel):
    """Limits on what a method may cost. None is no limit.

    Attributes:
        max_memory_bytes: peak of device memory in training and evaluation: reserved by the allocator where that was
            measured (CUDA), else tensors alone.
        max_latency_overhead: extra time for each decoded token at batch 1, as a share of the bare base's; of the merged
            model where the method merges and one task is served, else unmerged.
        tenants: tasks served at once. With more than one nothing is merged, and stored bytes count for each.
        max_stored_bytes: of all tenants together.
        min_quality: relative performance, see `spectune.results.arm_result.relative_performance`. Where full
            fine-tuning was not run or did not improve on the base: the improvement on the bare base, as a percentage of
            the best method's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_memory_bytes: int | None = Field(None, gt=0)
    max_latency_overhead: float | None = Field(None, ge=0)
    tenants: int = Field(1, ge=1)
    max_stored_bytes: int | None = Field(None, gt=0)
    min_quality: float | None = None


@dataclass(frozen=True)
class Axis:
    """A number that methods are compared by: as a list of axes has it, and in "less ... than"."""

    title: str
    cost: str


#: the axes of the Pareto set: the loss, then the costs
AXES = {
    "judged_loss": Axis("loss", "loss"),
    "train_memory_bytes": Axis("memory in training", "training memory"),
    "stored_bytes": Axis("stored size", "storage"),
    "inference_overhead": Axis("inference overhead", "time a decoded token"),
    "train_seconds": Axis("training time", "training time"),
}


class Reason(Record):
    """A sentence, and the files or folders below the comparison's that prove it."""

    text: str = ""
    runs: list[str] = Field(default_factory=list)


class Exclusion(Reason):
    """A limit that an arm does not keep; `value` is None where it was not measured."""

    name: str = ""
    limit: str = ""
    value: float | None = None


class Recommendation(Record):
    """Either `pick` (an arm's name) or `abstains` (a sentence) is None. `axes` are those that were measured of some
    arm, `pareto` the arms that no other beats on all of them."""

    limits: Limits = Field(default_factory=Limits)
    axes: list[str] = Field(default_factory=list)
    pareto: list[str] = Field(default_factory=list)
    pick: str | None = None
    abstains: str | None = None
    reasons: list[Reason] = Field(default_factory=list)
    excluded: list[Exclusion] = Field(default_factory=list)
