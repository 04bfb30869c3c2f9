"""What a user can spend: the limits that a recommendation keeps."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Limits(BaseModel):
    """Limits on what a method may cost. None is no limit.

    Attributes:
        max_memory_bytes: peak of device memory in training and evaluation: reserved by the allocator where that was
            measured (CUDA), else tensors alone.
        max_latency_overhead: extra time for each decoded token at batch 1, as a share of the bare base's; of the merged
            model where the method merges and one task is served, else unmerged.
        tenants: tasks served at once. With more than one nothing is merged, and stored bytes count for each.
        max_stored_bytes: of all tenants together.
        min_quality: relative performance: `100 (base - method) / (base - full)` of the judged loss, so that 0 is the
            bare base and 100 is full fine-tuning (the best method, where full was not run or did not improve).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_memory_bytes: int | None = Field(None, gt=0)
    max_latency_overhead: float | None = Field(None, ge=0)
    tenants: int = Field(1, ge=1)
    max_stored_bytes: int | None = Field(None, gt=0)
    min_quality: float | None = None
