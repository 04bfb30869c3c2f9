"""What else a machine did while something was timed."""

from spectune.results.record import Record

#: a process that ran for less of the time that it could have run had to share
LEAST_SHARE = 0.9
#: tasks that are ready to run, for each core: a process of our own is up to one a core
MOST_TASKS = 1.25


class MachineLoad(Record):
    """Seen while something was timed; None where the system does not say.

    Attributes:
        ran_share: the CPU time that the working thread (on CUDA the process, at most 1) got, as a share of the time
            that passed.
        load_average: tasks that were ready to run, over the last minute, our own among them.
        cores: of the machine.
    """

    ran_share: float | None = None
    load_average: float | None = None
    cores: int | None = None

    @property
    def busy(self) -> bool:
        """Whether something else ran, so that times are those of the machine's other work too."""
        crowded = (
            self.load_average is not None and bool(self.cores) and self.load_average > MOST_TASKS * (self.cores or 1)
        )
        return crowded or (self.ran_share is not None and self.ran_share < LEAST_SHARE)
