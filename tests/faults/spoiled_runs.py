"""Damaged folders of runs and comparisons, through what goes on in them and what shows them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.faults import spoiling, spoiling_tensors
from tests.faults.child import Case
from tests.faults.damage import Trial, kind
from tests.faults.kinds import Place
from tests.faults.scenes import (
    BASE,
    COMPARED,
    CPU,
    FINISHED,
    LORA,
    ROWS,
    STEPS,
    UNCOMPARED,
    UNFINISHED,
    copied,
    made,
    with_comparisons,
    with_runs,
)
from tests.faults.spoiled_bases import plant_model

OTHER = "other-run"
ASKED = ("--max-new-tokens", "4", *CPU, "--json")
#: the folder that is damaged, and the command
OF_RUNS = [
    (UNFINISHED, ("train", "--resume", "--output-dir", UNFINISHED, "--json")),
    (UNFINISHED, ("train", "--resume", "--output-dir", UNFINISHED, "--json")),
    (FINISHED, ("train", "--resume", "--output-dir", FINISHED, "--json")),
    (FINISHED, ("generate", "--run", FINISHED, "--rows", "1", *ASKED)),
    (FINISHED, ("eval", "--run", FINISHED, "--generate-rows", "1", *ASKED)),
]
OF_COMPARISONS = [
    (COMPARED, ("report", COMPARED, "--json")),
    (COMPARED, ("report", COMPARED, "--json")),
    (COMPARED, ("generate", "--run", COMPARED, "--rows", "1", *ASKED)),
    (COMPARED, ("eval", "--run", COMPARED, "--generate-rows", "1", *ASKED)),
    (COMPARED, ("compare", "--resume", "--output-dir", COMPARED, "--json")),
    (UNCOMPARED, ("compare", "--resume", "--output-dir", UNCOMPARED, "--json")),
]
READ = (".json", ".jsonl", ".yaml", ".safetensors")


def make(place: Place, random: Random, folder: Path) -> Trial:
    """A run's or a comparison's folder with one thing wrong, and a command."""
    if random.random() < 0.6:
        method = random.choice(["lora", "lora", "full", "prefix"])
        origin, (damaged, argv) = with_runs(place, "gpt2", method), random.choice(OF_RUNS)
    else:
        origin, (damaged, argv) = with_comparisons(place), random.choice(OF_COMPARISONS)
        method = ""
    copied(origin, folder)

    def others() -> Path:
        return others_of(place, method) if method else folder

    touched, what, knowable = _damaged(random, folder, folder / damaged, others)
    names = (damaged, *([Path(touched).name] if touched else []), *([BASE] if "code" in what else []))
    return Trial(origin, argv, touched, f"{origin.name}: {what}", names=names, knowable=knowable)


def others_of(place: Place, method: str) -> Path:
    """Runs of another seed, whose files look alike, beside those of the scene."""

    def make_others(folder: Path) -> None:
        copied(with_runs(place, "gpt2", method), folder)
        settings = (*STEPS, *(LORA if method == "lora" else ()))
        train = ("train", "--model", BASE, "--data", ROWS, "--method", method, *settings, *CPU, "--seed", "1")
        stop = ("tests.faults.scenes:interrupt_when", {"pattern": f"{OTHER}-{UNFINISHED}/checkpoint-2"})
        made(place, Case((*train, "--output-dir", f"{OTHER}-{UNFINISHED}"), cwd=folder, faults=(stop,)), codes=(130,))
        made(place, Case((*train, "--output-dir", f"{OTHER}-{FINISHED}"), cwd=folder))

    return place.once(f"others-{method}", make_others)


def regular(folder: Path) -> list[Path]:
    """The files of a folder, links apart."""
    found = (Path(place) / name for place, _, names in os.walk(folder) for name in names)
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


def _damaged(random: Random, folder: Path, damaged: Path, others: Callable[[], Path]) -> tuple[str, str, bool]:
    """What was damaged, how, and whether the folder tells."""
    how = random.choices(["file", "swap", "forged", "surplus", "folder", "code"], [66, 10, 8, 8, 4, 4])[0]
    files = regular(damaged)
    read = [path for path in files if path.suffix in READ]
    if random.random() < 0.8:
        read = [path for path in read if _matters(path.relative_to(damaged), damaged.name)]
    path = random.choice(read if random.random() < 0.95 else files)
    if how == "swap" and (found := _swapped(random, others(), read)) is not None:
        return str(found[0].relative_to(folder)), found[1], True
    if how == "forged":
        records = [p for p in files if p.suffix == ".json"]
        path = random.choice(records)
        what = (spoiling.other_number if random.random() < 0.5 else spoiling.other_value)(random, path)
        if what is not None and (content := spoiling.parsed(path)) is not None:
            # who forges a record can seal it
            spoiling.changed(path, resealed(content) if "sha256" in content else content)
            return str(path.relative_to(folder)), f"forged: {what}", False
    if how == "surplus":
        return _surplus(random, folder, damaged)
    if how == "code":
        return _planted(random, folder, damaged)
    if how == "folder":
        folders = sorted({path.parent for path in files} - {damaged})
        gone = random.choice(folders)
        shutil.rmtree(gone)
        return str(gone.relative_to(folder)), "the folder is gone", True
    for _ in range(10):
        blow = lines if path.suffix == ".jsonl" else yaml if path.suffix == ".yaml" else spoiling_tensors.strike
        what = (blow if random.random() < 0.5 else spoiling_tensors.strike)(random, path)
        if what is not None:
            return str(path.relative_to(folder)), what, True
    return "", "nothing", True


def _matters(path: Path, run: str) -> bool:
    """Not in a checkpoint that no command looks at: of a run that goes on the newest counts, of a finished one none."""
    return not path.parts[0].startswith("checkpoint-") or (run, path.parts[0]) == (UNFINISHED, "checkpoint-2")


def _swapped(random: Random, others: Path, files: list[Path]) -> tuple[Path, str] | None:
    """A file is that of another run, of another arm, or of another checkpoint."""
    path = random.choice(files)
    alike = [other for other in regular(others) if other.name == path.name and other != path]
    alike = [other for other in alike if other.read_bytes() != path.read_bytes()]
    if not alike:
        return None
    other = random.choice(alike)
    path.unlink()
    shutil.copyfile(other, path)
    return path, f"is {other.relative_to(others)}"


def _planted(random: Random, folder: Path, damaged: Path) -> tuple[str, str, bool]:
    """Settings that name code: a metric in a file of the folder's, or the base's own, which the settings trust."""
    settings = damaged / "config.yaml"
    if random.random() < 0.5:
        (damaged / "metrics.py").write_text(f"import os\nos.mkdir({str(folder / 'marker')!r})\nscore = len\n")
        added = {"metric": f"{damaged.name}/metrics.py:score"}
    else:
        plant_model(folder / BASE, folder / "marker")
        added = {"trust_remote_code": "true"}
    kept = [line for line in settings.read_text().splitlines() if line.partition(":")[0] not in added]
    settings.unlink()
    settings.write_text("\n".join([*kept, *(f"{key}: {value}" for key, value in added.items())]) + "\n")
    return str(settings.relative_to(folder)), f"names code: {added}", True


def resealed(content: dict[str, object]) -> dict[str, object]:
    """With the digest that a record of this content has."""
    bare = {key: value for key, value in content.items() if key != "sha256"}
    text = json.dumps(bare, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return bare | {"sha256": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()}


def _surplus(random: Random, folder: Path, damaged: Path) -> tuple[str, str, bool]:
    """Something that does not belong there. Whoever takes no notice of it does right, too."""
    checkpoints = sorted(damaged.glob("checkpoint-*"))
    name = random.choice(
        ["checkpoint-²", "checkpoint-99", "checkpoint-" + "9" * 30, "checkpoint-3x", "best-²", "checkpoint--1",
         "checkpoint-٣", "best-" + "9" * 30, "runs/x", ".lock", "\x1b[2Jx", "a\nb", "metrics.jsonl.tmp"]
    )  # fmt: skip
    path = damaged / name
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        return "", "nothing", True
    if checkpoints and name.startswith("checkpoint") and random.random() < 0.5:
        shutil.copytree(checkpoints[-1], path)
        what = f"{name!r}: a copy of a checkpoint"
    else:
        what = f"{name!r}: {random.choice([_file, _folder, _fifo, _loop])(path)}"
    return str(path.relative_to(folder)), what, True


def _file(path: Path) -> str:
    path.write_text("x")
    return "a file"


def _folder(path: Path) -> str:
    path.mkdir()
    return "an empty folder"


def _fifo(path: Path) -> str:
    os.mkfifo(path)
    return "a FIFO"


def _loop(path: Path) -> str:
    path.symlink_to(path.name)
    return "a link to itself"


def lines(random: Random, path: Path) -> str | None:
    """A change of the lines of a file of JSON lines."""
    found = path.read_text(encoding="utf-8").splitlines()
    if not found:
        return None
    at = random.randrange(len(found))
    old = found[at]
    how, new = random.choice(
        [
            ("is cut", [old[: len(old) // 2]]), ("is gone", []), ("stands there twice", [old, old]), ("is empty", [""]),
            ("is a list", ["[1, 2]"]), ("is deep", ["[" * spoiling.DEEP]), ("is long", [old, '{"x": "' + "x" * 10**7]),
            ("has other types", ['{"step": "x", "loss": [], "learning_rate": {}}']), ("is null", ["null"]),
            ("has absurd numbers", ['{"step": 1e308, "loss": NaN, "epoch": -1}']), ("is not JSON", ["{'step': 1}"]),
            ("has a mark", ["\ufeff" + old]), ("has escapes", [old.replace('"step"', '"\\u001b[2Jstep"')]),
        ]
    )  # fmt: skip
    found[at : at + 1] = new
    path.unlink()
    path.write_text("\n".join(found) + "\n", encoding="utf-8")
    return f"line {at + 1} {how}"


def yaml(random: Random, path: Path) -> str | None:
    """A change of a file of settings."""
    found = path.read_text(encoding="utf-8").splitlines()
    at = random.choice([n for n, line in enumerate(found) if ":" in line and not line.startswith(" ")])
    key = found[at].partition(":")[0]
    marker = path.parents[1] / "marker"
    value = random.choice(
        [
            "99", "-1", "x", "null", "[1, 2]", "{a: 1}", "1e400", ".nan", "off", "'\\e[2J'", '"\\e[2Jx"', "9" * 5000,
            f"!!python/object/apply:os.mkdir ['{marker}']", "!!python/name:os.system", "&a [*a]", "*nowhere", "|",
            "[" * 5000 + "]" * 5000, "'" + "x" * 10**6 + "'", "../../x.py:metric", "2029-02-30", "0x10", "1_000",
            "!x y",
            "{" + ", ".join(f"a{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9) if n else 1}]" for n in range(9)) + "}",
        ]
    )  # fmt: skip
    end = next((n for n in range(at + 1, len(found)) if found[n][:1] not in (" ", "-", "")), len(found))
    found[at:end] = [f"{key}: {value}"]
    path.unlink()
    path.write_text("\n".join(found) + "\n", encoding="utf-8")
    return f"{key} is {spoiling.brief(value)}"


KINDS = (
    kind("damaged-runs", "A damaged run or comparison is refused by name, or goes on to the same result.", 1000, make),
)
