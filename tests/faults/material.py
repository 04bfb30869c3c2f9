"""What faults are put into: a tiny base, rows, commands that train and compare, and whether two folders of theirs hold
the same but for where the time went."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from tests.faults.child import Case, Outcome
from tests.faults.kinds import Place

OUT = "out"
_COMMON = ("--device", "cpu", "--set", "per_device_train_batch_size=4")
_STEPS = ("--set", "max_steps=6", "--set", "save_steps=2", "--set", "eval_steps=3")
#: commands by name; `BASE` and `ROWS` are put in
TRAIN: dict[str, tuple[str, ...]] = {
    "lora": ("--method", "lora", "--set", "r=2", *_STEPS),
    "prefix": ("--method", "prefix", "--set", "num_virtual_tokens=4", *_STEPS),
    "full": ("--method", "full", *_STEPS),
    "head": ("--method", "lora", "--set", "r=2", "--task-type", "SEQ_CLS", *_STEPS),
    # best/ holds other weights than those at the end, which are in end.safetensors
    "end": ("--method", "bitfit", "--set", "learning_rate=0.5", "--set", "load_best_at_end=false", *_STEPS[:-1],
            "eval_steps=1"),
}  # fmt: skip
COMPARE: dict[str, tuple[str, ...]] = {
    "searched": ("--methods", "lora,bitfit", "--quick", "--set", "lora.r=2", "--set", "max_steps=8"),
    "given": ("--methods", "lora,prompt", "--quick", "--set", "lora.r=2", "--set", "learning_rate=0.01",
              "--set", "max_steps=4", "--set", "save_steps=2"),
}  # fmt: skip
#: part of the names of what no two runs share
_VOLATILE = (
    "second", "memory", "machine_load", "latency", "overhead", "sha256", "created", "date", "peak", "decode", "swap",
    "loading", "timed", "command", "recommendation",
)  # fmt: skip


def make_material(folder: str) -> None:
    """In a child: a random GPT-2 of two layers with a tokenizer of bytes, and rows."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    place, eos = Path(folder), "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate([eos, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=eos).save_pretrained(place / "base")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_embd=16, n_layer=2, n_head=2, n_positions=160, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(place / "base")
    pairs = [{"prompt": f"number {i}", "completion": f" is {'even' if i % 2 == 0 else 'odd'}"} for i in range(30)]
    labelled = [{"text": f"number {i}", "label": "even" if i % 2 == 0 else "odd"} for i in range(30)]
    for name, rows in (("pairs", pairs), ("labelled", labelled)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:24]))
        (place / f"{name}-valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[24:]))


def material(place: Place) -> Path:
    def make(folder: Path) -> None:
        done = place.forks.run(
            Case(call="tests.faults.material:make_material", given={"folder": str(folder)}, cwd=folder, limit_s=60)
        )
        assert done.rc == 0, done

    return place.once("material", make)


def command(place: Place, name: str, *more: str) -> tuple[str, ...]:
    """The words of a scenario's command, which writes to `out`; `name` is one of TRAIN or COMPARE."""
    where = material(place)
    rows = "labelled" if name == "head" else "pairs"
    verb, words = ("train", TRAIN[name]) if name in TRAIN else ("compare", COMPARE[name])
    given = ("--model", str(where / "base"), "--data", str(where / f"{rows}.jsonl"))
    given += ("--valid", str(where / f"{rows}-valid.jsonl"))
    return (verb, *given, *words, *_COMMON, "--output-dir", OUT, *more)


def case(place: Place, name: str, *more: str, cwd: Path | None = None, **how: Any) -> Case:
    """A scenario's command as a case."""
    short = ("tests.faults.injection:short_measurements", {"page": not place.few})
    faults = (short,) if name in COMPARE else ()
    faults += tuple(how.pop("faults", ()))
    how.setdefault("limit_s", 60.0 if name in COMPARE else 20.0)
    return Case(command(place, name, *more), cwd=cwd or place.folder, faults=faults, **how)


def unbroken(place: Place, name: str) -> Path:
    """The folder of a scenario that nothing happened to: `out`, and `calls.jsonl`, its calls that write."""

    def make(folder: Path) -> None:
        log = {"root": str(folder / OUT), "log": str(folder / "calls.jsonl")}
        done = place.forks.run(case(place, name, cwd=folder, faults=[("tests.faults.injection:count", log)]))
        assert done.rc == 0, done

    return place.once(f"unbroken-{name}{'-few' if place.few else ''}", make)


def calls(place: Place, name: str) -> list[tuple[str, list[str], int]]:
    lines = (unbroken(place, name) / "calls.jsonl").read_text().splitlines()
    return [(call, paths, size) for call, paths, size in map(json.loads, lines)]


def trained(place: Place) -> list[str]:
    """The scenarios of `train`."""
    return ["lora"] if place.few else [*TRAIN]


def compared(place: Place) -> list[str]:
    """The scenarios of `compare`."""
    return ["given"] if place.few else [*COMPARE]


def either(place: Place) -> list[str]:
    """Of few the ones that train."""
    return trained(place) if place.few else [*TRAIN, *COMPARE]


def resumed(place: Place, name: str, *, stopped: bool = False) -> tuple[Outcome, list[str]]:
    """The same command with --resume, and what of its end is not as the unbroken run's; `stopped`: a signal has left
    checkpoints at other steps."""
    done = place.forks.run(case(place, name, "--resume"))
    if done.rc != 0 or done.traceback:
        return done, [f"--resume: {done}"]
    return done, differences(unbroken(place, name) / OUT, place.folder / OUT, own_checkpoints=stopped)


def _checkpoint_of(name: str) -> str | None:
    return next((part for part in name.split(os.sep) if part.startswith("checkpoint-")), None)


def differences(expected: Path, found: Path, *, own_checkpoints: bool = False) -> list[str]:
    """What is not the same in two folders: names, links, weights to the bit, and records but for the time they took;
    with `own_checkpoints` of the checkpoints those of steps at which both have one."""
    names, others = tree(expected), tree(found)
    if own_checkpoints:
        both = [name for name in names if name in others]
        names, others = (
            {name: kind for name, kind in own.items() if not _checkpoint_of(name) or name in both}
            for own in (names, others)
        )
    missing = [name for name in names if name not in others]
    problems = [f"missing: {name}" for name in missing if os.path.dirname(name) not in missing]
    left_over = [name for name in others if name not in names]
    problems += [f"left over: {name}" for name in left_over if os.path.dirname(name) not in left_over]
    for name, kind in names.items():
        if name in others and kind != others[name]:
            problems.append(f"{name} is {others[name]}, expected {kind}")
        elif name in others and kind == "file" and (problem := _difference(expected / name, found / name)):
            problems.append(f"{name}: {problem}")
    return problems


def tree(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            kind = f"a link to {os.readlink(path)}" if path.is_symlink() else "a folder" if path.is_dir() else "file"
            if path.is_symlink() and not path.exists():
                kind += ", where there is nothing"
            found[str(path.relative_to(folder))] = kind
    return dict(sorted(found.items()))


def _difference(expected: Path, found: Path) -> str | None:
    one, other = expected.read_bytes(), found.read_bytes()
    if expected.name in ("environment.json", "search.json") or expected.suffix not in (".json", ".jsonl", ".yaml"):
        if expected.suffix == ".safetensors" and one != other:
            return "other bytes"
        return None if bool(one) == bool(other) else "empty"
    if expected.suffix == ".yaml":
        return None if one == other else "other settings"
    try:
        if expected.suffix == ".json":
            return _first(timeless(json.loads(one)), timeless(json.loads(other)))
        lines = [[timeless(json.loads(line)) for line in text.splitlines()] for text in (one, other)]
    except ValueError as error:
        return f"is no JSON: {error}"
    return _first(*lines)


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if not any(part in key for part in _VOLATILE)}
        if "bytes" in value and "sha256" in value:  # of a file that has its times, too: compared by itself
            return None
        return {key: timeless(item) for key, item in kept.items()}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def _first(one: Any, other: Any, where: str = "") -> str | None:
    """Where two values first differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            if key not in one or key not in other:
                return f"{where}.{key} is there once only"
            if found := _first(one[key], other[key], f"{where}.{key}"):
                return found
        return None
    if isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            return f"{where} has {len(other)} entries, expected {len(one)}"
        return next(
            (f for i, pair in enumerate(zip(one, other, strict=True)) if (f := _first(*pair, f"{where}[{i}]"))), None
        )
    return None if one == other else f"{where} is {str(other)[:80]}, expected {str(one)[:80]}"


def finished(place: Place, name: str) -> Path:
    """A copy of what a scenario leaves that nothing happened to."""
    return Path(shutil.copytree(unbroken(place, name) / OUT, place.folder / OUT, symlinks=True))
