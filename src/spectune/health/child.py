"""`python -m spectune.health.child CHECK [ARGUMENTS]`: one check, in a process that may crash.

Its outcome is the last line of stdout, as JSON.
"""

import json
import sys

from spectune.health.outcome import Outcome


def check(name: str, arguments: list[str]) -> Outcome:
    """What a check finds; each imports what it needs."""
    if name in ("output-folder", "cache-folder"):
        from spectune.health.disk import disk

        [folder] = arguments
        return disk(name, folder)
    if name in ("compile", "graphs"):
        from spectune.health import compiling

        return compiling.compiled_block() if name == "compile" else compiling.recorded_graph()
    if name == "processes":
        from spectune.health.processes import between_processes

        return between_processes()
    from spectune.health import numbers

    return {"attention": numbers.attention, "fp8": numbers.fp8, "int8-nf4": numbers.codes}[name]()


def main(arguments: list[str]) -> None:
    name, *rest = arguments
    if name == "rank":
        from spectune.health.processes import one_of

        rank, count, backend, folder = rest
        one_of(int(rank), int(count), backend, folder)
        return
    sys.stdout.write("\n" + json.dumps(check(name, rest).to_dict()) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
