"""Which base is meant, and which deltas of it by name: what `serve`, `chat` and batches of `generate` work with."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spectune.cli.console import import_libraries, note
from spectune.errors import ConfigError, DataError, SpectuneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spectune.cli.runs import Run
    from spectune.serving.catalogue import Catalogue
    from spectune.serving.loaded import Loaded

#: what is imported to write with a model, and takes long
WRITING = ("transformers.modeling_utils", "spectune.storage.bases", "spectune.inference")
LEAST_MEMORY = 2 << 30


@dataclass(frozen=True)
class BaseAndDeltas:
    """A base, its name, how its prompts are made, and deltas by name.

    Attributes:
        named: the delta that is meant where nobody names one.
        compared: those of a comparison.
    """

    base: str
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    named: Mapping[str, Path] = field(default_factory=dict)
    compared: Mapping[str, Path] = field(default_factory=dict)

    def catalogue(self, deltas: Path | None) -> Catalogue:
        """With the deltas of a folder. Raises ConfigError: one of them has the base's name."""
        from spectune.serving.catalogue import Catalogue

        return Catalogue(self.name, deltas, {**self.compared, **self.named}, settings_of, self.settings)


def what_is_asked(run: Path | None, model: str | None, deltas: Path | None) -> BaseAndDeltas:
    """Raises ConfigError, DataError: as the flags' own commands do; a run has a head, which writes no text."""
    if deltas is None:
        return _base_asked(run, model)
    if not deltas.is_dir():
        raise DataError(f"--deltas {deltas} is not a folder; expected one whose folders are deltas or runs")
    compared = compared_in(deltas)
    found = _base_of_deltas(deltas, compared) if run is None and model is None else _base_asked(run, model)
    return replace(found, compared=compared)


def compared_in(folder: Path) -> dict[str, Path]:
    """The finished runs of a comparison that write text on one base, by their arm, and by seed where an arm has
    several; empty where the folder is none."""
    from spectune.cli.runs import is_finished, is_model

    arms: dict[str, list[Path]] = {}
    for run in filter(is_finished, sorted(folder.glob("runs/*/seed-*"))):
        if is_model(run / "best"):
            note(f"{run} is a base of its own, and is not served: name it with --run")
        elif _has_head(run):
            note(f"{run} has a head, which gives labels and writes no text: it is not served")
        else:
            arms.setdefault(run.parent.name, []).append(run)
    found: dict[str, Path] = {}
    for arm, runs in arms.items():
        seeds = Counter(_seed(run) for run in runs)
        for run in runs:
            of_seed = f"{arm}-{_seed(run) if seeds[_seed(run)] == 1 else run.name}"
            found[arm if len(runs) == 1 else of_seed] = run
    return found


def _has_head(run: Path) -> bool:
    from spectune.cli.runs import find_run

    with contextlib.suppress(SpectuneError):  # whoever asks for it is told
        return find_run(run).labels is not None
    return False


def _seed(run: Path) -> str:
    """`seed-0` of `seed-0-9f3c079b`."""
    return "-".join(run.name.split("-")[:2])


def _base_asked(run: Path | None, model: str | None) -> BaseAndDeltas:
    from spectune.cli.input_rows import run_on
    from spectune.cli.runs import RUNS, find_run
    from spectune.embedded import NAME as TINY

    if run is None and model is None:
        try:
            found = find_run(None)
        except ConfigError:  # there is none yet
            return BaseAndDeltas(TINY, TINY)
        note(f"the newest run under {RUNS}/: {found.folder}")
    else:
        found = run_on(run, model)
    return _of_run(found)


def _of_run(found: Run) -> BaseAndDeltas:
    from spectune.cli.runs import is_model

    # a base by itself is looked at when it is loaded: its config takes torch to read, or the hub
    if found.delta_folder is not None and found.labels is not None:
        raise _head(found.name)
    name = _base_name(found.base)
    if found.delta_folder is None:
        return BaseAndDeltas(found.base, name)
    folder = found.folder.absolute()
    own = folder.parent.name if folder.name == "best" else folder.name
    if is_model(found.delta):  # a fully tuned base is a base
        return BaseAndDeltas(str(found.delta), own, found.config)
    return BaseAndDeltas(found.base, name, {}, {own: found.delta})


def _base_of_deltas(deltas: Path, compared: Mapping[str, Path]) -> BaseAndDeltas:
    """The base that the first of the deltas names."""
    from spectune.cli.runs import find_run
    from spectune.embedded import NAME as TINY
    from spectune.serving.catalogue import delta_in

    folders = (*compared.values(), *sorted(deltas.iterdir()))
    first = next((folder for folder in folders if delta_in(folder) is not None), None)
    if first is None:
        return BaseAndDeltas(TINY, TINY)
    base = find_run(first).base
    note(f"base: {base}, as {first} has it")
    return BaseAndDeltas(base, _base_name(base))


def _base_name(base: str) -> str:
    """What a base is called: its hub id, or the name of its folder."""
    return Path(base).absolute().name if Path(base).is_dir() else base


def settings_of(delta: Path) -> Mapping[str, Any]:
    """How the rows that a delta was trained on were made into prompts. Raises DataError."""
    from spectune.cli.runs import find_run

    return find_run(delta).config


def _head(name: str) -> ConfigError:
    return ConfigError(f"{name} has a head, which gives labels and writes no text: spectune generate runs it")


#: deltas whose files are looked at for their methods
_LOOKED_AT = 256


def loader(
    base: str, how: Mapping[str, Any], rows: int | None, memory: int | Literal["auto"] | None,
    warmed: Catalogue | None = None,
) -> Callable[[], Loaded]:  # fmt: skip
    """Loads the base; `memory`: of the bank of its deltas on the device, None where there is none; off the device they
    have half of what is free. `warmed`: on a GPU, decoding steps for these models are made before the first request.
    What it gives raises ConfigError: the base has a head, which writes no text."""

    def load() -> Loaded:
        import_libraries(WRITING)
        from spectune.cli.heads import labels_of_checkpoint
        from spectune.serving.loaded import Loaded
        from spectune.storage import load as load_base

        code, missing = bool(how["trust_remote_code"]), bool(how["allow_missing_weights"])
        if not missing and labels_of_checkpoint(base, code) is not None:
            raise _head(base)
        model, tokenizer = load_base(base, **how)
        warm = None
        if warmed is not None and model.device.type == "cuda":
            note("making the decoding steps (--no-warm-up: as requests come)")
            warm = [] if memory is None else one_of_each_method(warmed)
        if memory is None:
            return Loaded.of(model, tokenizer, None, rows, warm)
        from spectune.planning.device_memory import free_memory
        from spectune.storage import Bank

        size = memory_for_deltas(model) if memory == "auto" else memory
        free = free_memory("cpu")
        bank = Bank(model, device_memory=size, host_memory=None if free is None else free // 2)
        return Loaded.of(model, tokenizer, bank, rows, warm)

    return load


def one_of_each_method(catalogue: Catalogue) -> list[str]:
    """The names in a bank of deltas that stand for all: one of each method, of the method that most have first; of one
    whose sizes can differ, the largest folder."""
    from spectune.storage.delta_folder import stored_method

    found: dict[str, list[tuple[int, str]]] = {}
    for entry in itertools.islice(catalogue.entries(), _LOOKED_AT):
        if entry.delta is not None:
            with contextlib.suppress(SpectuneError, OSError):  # whoever asks for it is told
                size = sum(file.stat().st_size for file in Path(entry.delta).glob("*.safetensors"))
                found.setdefault(stored_method(Path(entry.delta)).name, []).append((size, entry.delta))
    return [max(each)[1] for each in sorted(found.values(), key=len, reverse=True)]


def memory_for_deltas(model: PreTrainedModel) -> int:
    """A quarter of what is free beside the base on a GPU; 2 GiB elsewhere, and at least."""
    import torch

    if model.device.type != "cuda":
        return LEAST_MEMORY
    return max(LEAST_MEMORY, torch.cuda.mem_get_info(model.device)[0] // 4)
