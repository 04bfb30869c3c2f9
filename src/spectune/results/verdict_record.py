"""The verdict of a comparison, as its file has it."""

from pydantic import Field

from spectune.results.record import Record


class JudgedArm(Record):
    """An arm's mean over seeds and its interval, which is None where runs left no value for each row; `seed_sd` is the
    standard deviation of one run over seeds (None with one seed). `best`: no arm is better beyond noise."""

    name: str = ""
    label: str = ""
    seeds: int = 1
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    seed_sd: float | None = None
    best: bool = False


class JudgedPair(Record):
    """`difference` is b - a, `relative` the same as a share of a's mean. `low` and `high` leave out zero exactly where
    the corrected test finds a difference (`differs`)."""

    a: str = ""
    b: str = ""
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    relative: float | None = None
    p: float | None = None
    p_adjusted: float | None = None
    differs: bool = False
    effect_size: float | None = None

    def seen_from(self, arm: str) -> tuple[float, float, float] | None:
        """Difference, low and high of the other arm less this one; None without an interval."""
        if self.difference is None or self.low is None or self.high is None:
            return None
        if self.a == arm:
            return self.difference, self.low, self.high
        return -self.difference, -self.high, -self.low


class Judgement(Record):
    """The order of the arms by one measure.

    Attributes:
        rows: judged by every arm (passages, of forgetting).
        units: what the bootstrap draws: rows with the same prompt are one.
        covers_training_noise: every arm has more than one seed.
        arms: best first.
        groups: largest sets of arms none of which differ; they may overlap.
        order: (better, worse) pairs from which all others follow.
        versus_full: of every other arm, "better", "worse" or "no difference".
        sentences: the headline first.
    """

    measure: str = ""
    higher_is_better: bool | None = None
    rows: int | None = None
    units: int | None = None
    seeds: int = 0
    covers_training_noise: bool = False
    confidence: float = 0.95
    correction: str | None = None
    arms: list[JudgedArm] = Field(default_factory=list)
    pairs: list[JudgedPair] = Field(default_factory=list)
    groups: list[list[str]] = Field(default_factory=list)
    order: list[list[str]] = Field(default_factory=list)
    versus_full: dict[str, str | None] = Field(default_factory=dict)
    sentences: list[str] = Field(default_factory=list)

    def arm(self, name: str) -> JudgedArm:
        """The arm of that name; one without any number where it was not judged."""
        return next((arm for arm in self.arms if arm.name == name), JudgedArm(name=name))

    @property
    def means(self) -> dict[str, float]:
        return {arm.name: arm.mean for arm in self.arms if arm.mean is not None}


class Verdict(Judgement):
    """The judgement on the judged loss, or on the metric that decides where losses do not compare (`measure` names it),
    and on every other metric and on forgetting (nats per token) beside it. `base` is the bare base's loss on the same
    rows."""

    base: float | None = None
    metrics: dict[str, Judgement] = Field(default_factory=dict)
    forgetting: Judgement | None = None
