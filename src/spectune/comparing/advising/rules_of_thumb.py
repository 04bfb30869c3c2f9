"""Rules of thumb from the literature and from this project's own measurements, none of them a law."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from spectune.deltas import Method

GIB = 2**30
#: where the rules draw their lines; each is named where a rule uses it
FEW_ROWS, MANY_ROWS = 1_000, 10_000
MANY_TASKS = 10
LOW_MEMORY, HIGH_MEMORY = 24 * GIB, 80 * GIB
#: stored weights as a share of GPT-2 124M: below the first a task costs next to nothing, from the second on methods
#: have come near full fine-tuning in the measurements here
TINY_SHARE, NEAR_FULL_SHARE = 0.001, 0.005
#: bytes of device memory for each weight: trained by Adam in mixed precision (Rajbhandari et al. 2020, section 3.1),
#: and frozen in bfloat16
TRAINED_BYTES, FROZEN_BYTES = 16, 2


class Answers(BaseModel):
    """The user's answers about the task. None and False are "not answered".

    Attributes:
        rows: training rows.
        tasks: tasks that one base will serve.
        compute: memory of the device in words: low is one consumer card, high is more than one card of 80 GiB.
        memory_bytes: the same as a figure.
        must_merge: the result has to be plain model weights, without code or time of its own.
        keep_base: the base must stay as it is, and what it knows too.
        fast_iteration: results soon matter more than the last per cent.
        max_quality: the lowest loss matters more than cost.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int | None = Field(None, ge=1)
    tasks: int | None = Field(None, ge=1)
    compute: Literal["low", "medium", "high"] | None = None
    memory_bytes: int | None = Field(None, gt=0)
    must_merge: bool = False
    keep_base: bool = False
    fast_iteration: bool = False
    max_quality: bool = False

    @property
    def level(self) -> str | None:
        """Low, medium or high, from the word or the figure."""
        if self.memory_bytes is None:
            return self.compute
        return "low" if self.memory_bytes <= LOW_MEMORY else "medium" if self.memory_bytes <= HIGH_MEMORY else "high"


@dataclass(frozen=True)
class Traits:
    """What rules look at in a method. `share`: stored weights as a share of GPT-2 124M."""

    method: Method
    share: float

    @property
    def frozen(self) -> bool:
        return not self.method.trains_base

    @property
    def tiny(self) -> bool:
        return self.share < TINY_SHARE

    @property
    def near_full(self) -> bool:
        return self.share >= NEAR_FULL_SHARE


Which = Callable[[Traits], bool]


@dataclass(frozen=True)
class Rule:
    """A rule of thumb. `decides` is for rules of fact, which no measurement can overrule."""

    name: str
    condition: str
    applies: Callable[[Answers], bool]
    toward: Which
    away: Which
    why: str
    source: str
    decides: bool = False


def _billions(memory: int, bytes_each: int) -> str:
    return f"{memory / bytes_each / 1e9:.2g}"


def _none(_: Traits) -> bool:
    return False


FEW, MANY = f"fewer than {FEW_ROWS:,} rows", f"{MANY_ROWS:,} rows or more"
RULES = (
    Rule(
        "few rows, train few weights",
        f"{FEW} (rule of thumb)",
        lambda a: a.rows is not None and a.rows < FEW_ROWS,
        lambda m: m.frozen,
        lambda m: not m.frozen,
        "a whole base overfits small data; with 50 to 500 examples prefix tuning was 2.9 BLEU above full "
        "fine-tuning on average",
        "Li and Liang 2021 (arXiv 2101.00190), section 6.3",
    ),
    Rule(
        "few rows, no virtual tokens",
        f"{FEW} (rule of thumb; it contradicts the other one for prefix tuning)",
        lambda a: a.rows is not None and a.rows < FEW_ROWS,
        _none,
        lambda m: m.method.virtual_tokens > 0,
        "on 100 examples of MNLI with GPT-3, virtual tokens came last: full 60.2, LoRA 63.8, prefix 48.3, prompt 37.6",
        "Hu et al. 2021 (arXiv 2106.09685), table 16",
    ),
    Rule(
        "between few and many rows",
        f"{FEW_ROWS:,} to {MANY_ROWS:,} rows (rule of thumb)",
        lambda a: a.rows is not None and FEW_ROWS <= a.rows < MANY_ROWS,
        lambda m: m.near_full and m.frozen,
        _none,
        "enough for methods of about 1% of the weights, not yet for all of them: the usual place of LoRA and adapters",
        "Houlsby et al. 2019 (arXiv 1902.00751): within 0.4 points of full on GLUE with 3.6% of the weights",
    ),
    Rule(
        "many rows carry all weights",
        f"{MANY} (rule of thumb)",
        lambda a: a.rows is not None and a.rows >= MANY_ROWS,
        lambda m: m.near_full,
        lambda m: m.tiny,
        "the more data, the more the number of trained weights counts: on 42,061 rows of E2E full reached 0.975 "
        "nats, LoRA 1.047, the adapter 1.110, BitFit 1.454, prompt tuning 1.750",
        "measured by this project: docs/results/e2e_reference.md (gpt2-27m, one seed)",
    ),
    Rule(
        "many tasks, small files",
        f"{MANY_TASKS} tasks or more (rule of thumb)",
        lambda a: a.tasks is not None and a.tasks >= MANY_TASKS,
        lambda m: m.frozen,
        lambda m: not m.frozen,
        "each task of a fully tuned model is a whole model on disk and in memory; a delta is 0.01% to 2% of it, "
        "and rows of different deltas share a batch",
        "arithmetic: `spectune compare` shows the shares; Houlsby et al. 2019, section 1",
    ),
    Rule(
        "merged weights serve one task",
        "more than one task on one copy of the base, and the result must be merged (a fact)",
        lambda a: a.must_merge and (a.tasks or 1) > 1,
        _none,
        _none,
        "a merged delta is a whole model: several tasks then take as many copies, or stay unmerged",
        "arithmetic",
    ),
    Rule(
        "little memory, frozen base",
        f"at most {LOW_MEMORY // GIB} GiB (rule of thumb)",
        lambda a: a.level == "low",
        lambda m: m.frozen,
        lambda m: not m.frozen,
        f"Adam in mixed precision takes {TRAINED_BYTES} bytes for each trained weight, a frozen one in bfloat16 "
        f"{FROZEN_BYTES}: {LOW_MEMORY // GIB} GiB hold the states of {_billions(LOW_MEMORY, TRAINED_BYTES)} "
        f"billion weights or {_billions(LOW_MEMORY, FROZEN_BYTES)} billion frozen ones, before activations",
        "Rajbhandari et al. 2020 (arXiv 1910.02054), section 3.1; `spectune plan` gives the figures for a base",
    ),
    Rule(
        "medium memory",
        f"{LOW_MEMORY // GIB} to {HIGH_MEMORY // GIB} GiB (rule of thumb)",
        lambda a: a.level == "medium",
        lambda m: m.near_full,
        _none,
        f"{HIGH_MEMORY // GIB} GiB hold the states of full fine-tuning of {_billions(HIGH_MEMORY, TRAINED_BYTES)} "
        "billion weights, before activations; beyond that the base stays frozen",
        "Rajbhandari et al. 2020 (arXiv 1910.02054), section 3.1",
    ),
    Rule(
        "much memory, all weights",
        f"more than {HIGH_MEMORY // GIB} GiB (rule of thumb)",
        lambda a: a.level == "high",
        lambda m: not m.frozen,
        _none,
        "where memory does not bind, full fine-tuning is the yardstick; on code and mathematics LoRA learned less",
        "Biderman et al. 2024 (arXiv 2405.09673)",
    ),
    Rule(
        "prompt tuning needs a large base",
        f"at most {HIGH_MEMORY // GIB} GiB, so that the base has fewer than about 10 billion weights (rule of "
        "thumb)",
        lambda a: a.level in ("low", "medium"),
        _none,
        lambda m: m.method.name == "prompt",  # what its paper says of bases' sizes holds for it alone
        "it came up to full fine-tuning at 11 billion weights only, and fell behind more the smaller the base",
        "Lester et al. 2021 (arXiv 2104.08691), figure 1; here at 27 million: docs/results/e2e_reference.md",
    ),
    Rule(
        "must merge",
        "the result has to be plain weights (a fact)",
        lambda a: a.must_merge,
        lambda m: m.method.can_merge,
        lambda m: not m.method.can_merge,
        "a delta that stays beside the base costs time for each token: adapters 20% to 30% at batch 1 and length "
        "128; merged ones cost none",
        "Hu et al. 2021 (arXiv 2106.09685), table 1; what merges is in docs/contract.md",
        decides=True,
    ),
    Rule(
        "keep the base",
        "the base must stay as it is (a fact)",
        lambda a: a.keep_base,
        lambda m: m.frozen,
        lambda m: not m.frozen,
        "full fine-tuning changes the base in place; deltas come off and leave it bit for bit",
        "docs/contract.md, point 6",
        decides=True,
    ),
    Rule(
        "fewer weights forget less",
        "what the base knows must be kept (rule of thumb)",
        lambda a: a.keep_base,
        lambda m: m.frozen and not m.method.virtual_tokens,
        lambda m: not m.frozen,
        "LoRA forgot less than full fine-tuning on code and mathematics; but it depends on rate and steps: in "
        "PEFT's suite full fine-tuning at a rate of 1e-5 forgot less than LoRA, prefix, prompt tuning and IA3",
        "Biderman et al. 2024 (arXiv 2405.09673); PEFT's method_comparison, MetaMathQA",
    ),
    Rule(
        "fast iteration",
        "results soon (rule of thumb)",
        lambda a: a.fast_iteration,
        lambda m: m.method.starts_at_identity and m.frozen,
        lambda m: m.method.virtual_tokens > 0,
        "methods that start as the base itself improve from the first steps; prompt tuning took 30,000 in its "
        "paper, and came to anything from 5.7% to 34.3% by settings alone, prefix tuning to 18.6% to 41.6%",
        "Lester et al. 2021, section 3; PEFT's method_comparison, MetaMathQA",
    ),
    Rule(
        "highest quality",
        f"the lowest loss, whatever it costs (rule of thumb: at least {100 * NEAR_FULL_SHARE:g}% of the weights)",
        lambda a: a.max_quality,
        lambda m: m.near_full,
        lambda m: not m.near_full,
        "the order of losses on E2E was that of the numbers of trained weights: full, LoRA, adapter, prefix, "
        "BitFit, prompt",
        "measured by this project: docs/results/e2e_reference.md (gpt2-27m, one seed)",
    ),
)  # fmt: skip
