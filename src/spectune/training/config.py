"""Settings of a training run, by transformers' names."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Lt
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

#: tokens of a row where the user says nothing, if the base has room for them
DEFAULT_LENGTH = 1024
#: so large that no step ever gets there, and no more than a tensor's sizes
Whole = Annotated[int, Lt(2**63)]


class TrainingConfig(BaseModel):
    """How to train. The same for every method; only `learning_rate` has a default of each method's own.

    Attributes:
        task_type: what is learned of the rows: "CAUSAL_LM" (their text), "SEQ_CLS" (a class or a number for a text) or
            "TOKEN_CLS" (a class for each word), the latter two with a head of the model; "auto": by the rows, `text` +
            `label` is SEQ_CLS, `tokens` + `tags` is TOKEN_CLS, all others are CAUSAL_LM. A model that is given as an
            object has its head already.
        output_dir: the run's folder; None writes nothing.
        learning_rate: None is the method's default for a base of this size (`method.learning_rates`).
        num_train_epochs: may be a fraction.
        max_steps: optimizer steps; -1 leaves it to the epochs.
        per_device_train_batch_size, per_device_eval_batch_size: rows.
        gradient_accumulation_steps: batches for each step; the step's loss is the mean over all their target tokens.
            A step's rows are drawn at random, and rows of like length then share a batch.
        warmup_steps: 1 and more are steps, below 1 a share of all steps.
        optim: AdamW as "adamw_torch_fused"; "adamw_8bit" keeps its moments in eight bits (2 bytes a weight, not 8);
            "adamw_in_backward" steps each weight as soon as its gradient is there (2 bytes a weight of a bfloat16 base
            less), without clipping and accumulation.
        weight_decay: not on vectors (biases, norms, offsets).
        max_grad_norm: gradients are clipped to this norm; 0 leaves them.
        max_length: tokens of a row; None is the base's context (at most 1,024) less virtual tokens.
        separator: goes between prompt and completion.
        train_on: which turns of a chat are learned: "all" those of the assistant, or the "last".
        truncation: what a row that is too long loses: its "start" (but for BOS), the "middle" of what stands before its
            last answer; or it is a bad row ("refuse").
        columns: names of the data's columns by what they are taken for, such as `{"prompt": "question"}`; None for a
            key that is to be ignored.
        delimiter, encoding: of CSV and text files; found where they are not given.
        template_date: the current date as chat templates see it; by default the day on which the run begins.
        eval_steps, save_steps, logging_steps: None is once each epoch (logging: every step).
        early_stopping_patience: validations without improvement before training ends; None never.
        load_best_at_end: the delta ends as the best one of validation.
        group_by_length: draw rows of like length for the same step. Less padding, and a worse result: see
            docs/decisions.md for what it cost.
        packing: rows of one step share sequences, best-fit, and none sees another: losses and gradients are those of
            padded batches. "auto" packs where that leaves out a tenth of a step's tokens or more and the model can keep
            documents apart; True refuses to begin where it cannot.
        gradient_checkpointing: recompute activations in backward instead of keeping them. "auto": only where the plan
            says that memory does not suffice without, and then the first that fits of "selective" (all but matrix
            products and attention is recomputed), True (every block), "offload" (every block, with its input in host
            memory: CUDA only). False never does. A run's numbers do not depend on it.
        torch_compile: compile the decoder's blocks (`spectune.blocks.compile`); "auto" does where the run is long
            enough to pay the compiler's time back (CUDA; a CPU where there is a C++ compiler), and says so.
        cuda_graphs: capture the blocks of batches whose shape comes back, and replay them
            (`spectune.blocks.cuda_graphs`); "auto" does on CUDA where a step is so small that launching its kernels
            takes longer than running them. Not with packs or recomputation.
        resume: go on from `output_dir`.
        memory_check: before the first step, where the plan says that memory does not suffice: "refuse" to begin,
            "warn" and begin, or "off" (nothing is predicted).
    """

    # no setting means anything when infinite: such a rate diverges at once, such epochs never end
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    task_type: Literal["auto", "CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS"] = "auto"
    output_dir: Path | None = None
    learning_rate: float | None = Field(None, gt=0)
    num_train_epochs: float = Field(3.0, gt=0)
    max_steps: Whole = Field(-1, ge=-1)
    per_device_train_batch_size: Whole = Field(8, ge=1)
    per_device_eval_batch_size: Whole = Field(16, ge=1)
    gradient_accumulation_steps: Whole = Field(1, ge=1)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: float = Field(0.06, ge=0)
    optim: Literal["adamw_torch_fused", "adamw_8bit", "adamw_in_backward"] = "adamw_torch_fused"
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0)
    max_length: Whole | None = Field(None, ge=2)
    separator: str = ""
    train_on: Literal["all", "last"] = "all"
    truncation: Literal["start", "middle", "refuse"] = "start"
    columns: dict[str, str | None] = Field(default_factory=dict)
    delimiter: str | None = Field(None, min_length=1, max_length=1)
    encoding: str | None = None
    template_date: datetime.date | None = None
    seed: int = Field(0, ge=-(2**63), lt=2**63)
    eval_steps: Whole | None = Field(None, ge=1)
    save_steps: Whole | None = Field(None, ge=1)
    logging_steps: Whole | None = Field(None, ge=1)
    early_stopping_patience: Whole | None = Field(None, ge=1)
    load_best_at_end: bool = True
    group_by_length: bool = False
    packing: bool | Literal["auto"] = "auto"
    gradient_checkpointing: bool | Literal["auto", "selective", "offload"] = "auto"
    torch_compile: bool | Literal["auto"] = "auto"
    cuda_graphs: bool | Literal["auto"] = "auto"
    report_to: Literal["none", "tensorboard"] = "none"
    resume: bool = False
    skip_bad_rows: bool = False
    memory_check: Literal["refuse", "warn", "off"] = "refuse"

    @field_validator("task_type", mode="before")
    @classmethod
    def _as_peft_writes_it(cls, value: Any) -> Any:
        written = value.strip().upper().replace("-", "_") if isinstance(value, str) else value
        return "auto" if written == "AUTO" else written

    @field_validator("memory_check", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` so

    @property
    def row_options(self) -> dict[str, Any]:
        """How rows are read: arguments of `spectune.data.load_rows`."""
        return {
            "skip_bad_rows": self.skip_bad_rows, "columns": self.columns, "delimiter": self.delimiter,
            "encoding": self.encoding,
        }  # fmt: skip

    @property
    def encode_options(self) -> dict[str, Any]:
        """How rows become token ids: arguments of `spectune.data.encode`, beside the length."""
        return {
            "separator": self.separator, "train_on": self.train_on, "truncation": self.truncation,
            "today": None if self.template_date is None else self.template_date.isoformat(),
        }  # fmt: skip

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.max_steps == 0:
            raise ValueError("max_steps = 0 trains nothing; give -1 to train by epochs")
        in_backward = self.optim == "adamw_in_backward"
        if in_backward and self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"optim=adamw_in_backward and gradient_accumulation_steps={self.gradient_accumulation_steps}: weights "
                "are stepped in the backward pass of each batch. Set gradient_accumulation_steps=1, or another optim"
            )
        if in_backward and self.max_grad_norm:
            raise ValueError(
                f"optim=adamw_in_backward and max_grad_norm={self.max_grad_norm:g}: the norm of all gradients is not "
                "known before the first weight is stepped. Set max_grad_norm=0, or another optim"
            )
        return self
