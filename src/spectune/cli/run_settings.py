"""The types of a run's settings that are used again after it: what its config.yaml and training.json may hold."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

#: keys whose values are text, or made of text
TEXTS = (
    "model", "data", "valid", "test", "retain", "separator", "train_on", "truncation", "template_date", "columns",
    "delimiter", "encoding", "task_type", "row_labels", "row_answers", "row_shape", "prompt_ends_with", "row_system",
    "metric", "choice_normalization", "dtype", "device", "base_precision",
)  # fmt: skip
_Texts = list[str]


class RunSettings(BaseModel):
    """Values as they are used; keys that are not here are checked where they are used, or only shown."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    model: str | None = None
    retain: str | None = None
    separator: str | None = None
    train_on: str | None = None
    truncation: str | None = None
    template_date: str | None = None
    max_length: Annotated[int, Field(ge=2, lt=2**31)] | None = None
    columns: dict[str, str | None] | None = None
    delimiter: str | None = None
    encoding: str | None = None
    task_type: str | None = None
    base_precision: str | None = None
    row_labels: _Texts | None = None
    row_answers: _Texts | None = None
    row_shape: str | None = None
    prompt_ends_with: str | None = None
    row_system: str | None = None
    row_tools: list[Any] | None = None
    row_template_kwargs: dict[str, Any] | None = None
    metric: str | None = None
    generate_rows: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    choice_normalization: str | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    split_seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stored_bytes: Annotated[int, Field(ge=0)] | None = None
