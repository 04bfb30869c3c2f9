"""Damaged delta folders, of every method and of PEFT's, through what takes one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

from tests.faults import spoiling, spoiling_tensors
from tests.faults.child import Case
from tests.faults.damage import Trial, kind
from tests.faults.kinds import Place
from tests.faults.scenes import BASE, CPU, ROWS, copied, made, scene

DELTA, OURS, CONFIG = "strangers-delta", "spectune.json", "adapter_config.json"
METHODS = ("lora", "prefix", "prompt", "adapter", "bitfit", "dora", "ia3", "oft", "miss", "ln", "full")
#: methods whose folders PEFT reads and writes: without spectune.json they are PEFT's
PEFTS = ("lora", "prefix", "prompt", "ia3", "ln")
FOLDERS = (*METHODS, *(f"{name}-peft" for name in PEFTS))
ON = ("--run", DELTA, "--model", BASE)
COMMANDS = {
    "generate": ("generate", "name: Ada | town: Leeds\n", *ON, "--max-new-tokens", "4", *CPU, "--json"),
    "eval": ("eval", *ON, "--data", ROWS, "--generate-rows", "1", "--max-new-tokens", "4", *CPU, "--json"),
    "merge": ("merge", "--run", DELTA, "--output-dir", "new", "--data", ROWS, *CPU, "--json"),
    "export": ("export", "--run", DELTA, "--format", "peft", "--output-dir", "new", "--no-check", *CPU, "--json"),
}  # fmt: skip
MERGED = ("lora", "bitfit", "dora", "oft", "miss", "full")
EXPORTED = ("lora", "prefix", "prompt")
#: sizes and settings that a forged config may have; each is taken where the config has such a key
FIELDS: dict[str, list[Any]] = {
    "r": [10**12, 10**30, 10**400, -1, 0, 2.5, 3, "2", None],
    "bottleneck_dim": [10**12, 10**30, -1, 0, 3],
    "num_virtual_tokens": [10**12, 10**30, -1, 0, 4],
    "encoder_hidden_size": [10**12, -1],
    "lora_alpha": [-1.0, 10**400, True, "x", 0, 64.0],
    "target_modules": [[], [1], "(", "(a+)+$", "\ud800", ["../x"], ["x" * 10_000], "all-linear", None],
    "name": ["lorra", 4, "full", "bitfit", "prompt", "prefix", "../x"],
    "peft_type": ["LORA", "NOSUCH", 4, "PREFIX_TUNING", "IA3"],
    "base_model_name_or_path": ["someone/model", 4, "../x", "\x1b[2J", None],
    "base_name": ["someone/model", 4, "\x1b[2J"],
    "format": [0, 3, -1, 10**30, "2", None],
    "auto_mapping": [{"base_model_class": "os.system", "parent_library": "os"}],
    "task_type": ["SEQ_CLS", 4, "NOSUCH"],
    "modules_to_save": [["lm_head"], "x", [4]],
    "layers_to_transform": [[10**9], -1, "x"],
    "rank_pattern": [{"(a+)+$": 4}, {"c_attn": 10**9}, []],
    "init_lora_weights": ["pissa", "x", 4],
}


def make(place: Place, random: Random, folder: Path) -> Trial:
    """A delta's folder with one thing wrong, and a command or `spectune.load_delta`."""
    name = random.choice(FOLDERS)
    method = name.removesuffix("-peft")
    origin = place.once(f"delta-{name}", lambda folder: _make_scene(place, name, folder))
    commands = ["load", "load", "generate", "eval"]
    commands += ["merge"] * (method in MERGED) + ["export"] * (method in EXPORTED)
    command = random.choice(commands)
    copied(origin, folder)
    touched, what, names, knowable = _damaged(place, random, folder / DELTA, name)
    call = (
        {"call": "tests.faults.spoiled_deltas:load", "argv": ()} if command == "load" else {"argv": COMMANDS[command]}
    )
    return Trial(
        origin, touched=touched and f"{DELTA}/{touched}", what=f"{name}: {what}",
        names=(DELTA, "merging 'run'", *names),
        knowable=knowable, hub="base_name is" in what or "base_model_name_or_path is" in what, **call,
    )  # fmt: skip


def _make_scene(place: Place, name: str, folder: Path) -> None:
    copied(scene(place, "gpt2"), folder)
    made(place, Case(call="tests.faults.spoiled_deltas:save", given={"name": name}, cwd=folder))


def _damaged(place: Place, random: Random, delta: Path, name: str) -> tuple[str, str, tuple[str, ...], bool]:
    """The file that was damaged, how, what else a message may name, and whether the folder tells."""
    ours = not name.endswith("-peft")
    how = random.choices(["file", "weights", "field", "code", "swap", "undigested"], [35, 25, 15, 8, 7, 10])[0]
    weights = sorted(delta.glob("*.safetensors"))
    config = delta / (OURS if ours else CONFIG)
    if how == "undigested" and ours:
        # as a folder from before there were digests, or one that was changed on purpose
        content = json.loads(config.read_text())
        for key in ("weights", "digests", "sha256"):
            content.pop(key, None)
        spoiling.changed(config, content)
        what = spoiling_tensors.other_tensors(random, random.choice(weights))
        return weights[0].name, f"no digest, {what}", tuple(w.name for w in weights), False
    if how == "field":
        return *_field(random, config), (), ours
    if how == "code":
        return *_planted(random, delta, config), (), True
    if how == "swap":
        other = random.choice(FOLDERS)
        theirs = place.once(f"delta-{other}", lambda folder: _make_scene(place, other, folder)) / DELTA
        path = random.choice(sorted(p for p in theirs.iterdir() if p.is_file()))
        (delta / path.name).unlink(missing_ok=True)
        shutil.copyfile(path, delta / path.name)
        # a whole other delta's weights and config may be there; then it is that delta
        return path.name, f"is that of {other}", (), ours
    files = sorted(path for path in delta.iterdir() if path.is_file())
    path = random.choice(weights if how == "weights" else files)
    for _ in range(10):
        blows = random.choice([spoiling.BYTES, spoiling_tensors.TENSORS]) if how == "weights" else None
        what = random.choice(blows)(random, path) if blows else spoiling_tensors.strike(random, path)
        if what is not None:
            return path.name, what, (), ours
    return "", "nothing", (), ours


def _field(random: Random, config: Path) -> tuple[str, str]:
    content = json.loads(config.read_text())
    holders = [content, *(value for value in content.values() if isinstance(value, dict))]
    places = [(holder, key) for holder in holders for key in FIELDS if key in holder]
    holder, key = random.choice(places) if places and random.random() < 0.8 else (content, random.choice(list(FIELDS)))
    holder[key] = random.choice(FIELDS[key])
    spoiling.changed(config, content)
    return config.name, f"{key} is {spoiling.brief(holder[key])}"


def _planted(random: Random, delta: Path, config: Path) -> tuple[str, str]:
    marker = delta.parent / "marker"
    name = random.choice(["adapter_model.safetensors", "adapter_model.bin", "pytorch_model.bin", config.name])
    if name.endswith(".bin"):
        for path in delta.glob("*.safetensors"):
            path.unlink()
    (delta / name).unlink(missing_ok=True)
    (delta / name).write_bytes(spoiling.bomb(marker))
    return name, "is a pickle"


# -- inside of the fork server's processes ---------------------------------------------------------------------------


def save(name: str) -> None:
    """A delta with weights that matter, in `strangers-delta`."""
    import torch

    import spectune
    from spectune.methods import method_from_name

    small: dict[str, dict[str, Any]] = {
        "lora": {"r": 2, "target_modules": ("c_attn", "c_fc")}, "prefix": {"num_virtual_tokens": 3},
        "prompt": {"num_virtual_tokens": 3}, "adapter": {"bottleneck_dim": 2},
        "dora": {"r": 2, "target_modules": ("c_attn",)}, "oft": {"oft_block_size": 4, "target_modules": ("c_attn",)},
        "miss": {"r": 2, "target_modules": ("c_attn",)},
    }  # fmt: skip
    method = name.removesuffix("-peft")
    model, _ = spectune.load(BASE)
    delta = spectune.attach(
        model, method_from_name(method, **small.get(method, {})), "task", keep_base=method == "full"
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in delta.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
    delta.save(DELTA)
    if name.endswith("-peft"):
        os.unlink(f"{DELTA}/{OURS}")


def load() -> dict[str, Any]:
    """`spectune.load_delta` in Python: what the model says then; it is as it was where the folder is refused."""
    import torch

    import spectune
    from spectune.errors import SpectuneError

    model, _ = spectune.load(BASE)
    asked = torch.arange(8)[None]

    def said() -> list[float]:
        with torch.no_grad():
            return [float(value) for value in model(input_ids=asked).logits.flatten()[::97]]

    before = said()
    try:
        spectune.load_delta(model, DELTA, name="theirs")
    except SpectuneError as error:
        assert said() == before, "a folder that was refused has changed the model"
        return stopped(error)
    return {"logits": said()}


def stopped(error: Any) -> Any:
    """End as the command line does."""
    import sys

    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(error.exit_code)


KINDS = (
    kind("damaged-deltas", "A damaged delta folder is refused by name, and leaves the model as it was.", 1000, make),
)
