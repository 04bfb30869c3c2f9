"""What the runs of `ordinary.py` are made of: rows that are carried to the device, bases that are made there.

python -m benchmarks.ordinary_data pack FOLDER      from what lies in ../shared, for a machine that has none of it
python -m benchmarks.ordinary_data bases ...        as `ordinary.py` calls it, in a process of its own
"""

from __future__ import annotations

import io
import json
import lzma
import os
import shutil
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

#: rows and characters that are carried: enough for the steps of all runs within one epoch
ROWS, CHATS, TEXT, VALID = 3200, 1100, 2_600_000, 64
#: of a base that was made: the last file to be written
READY = "ready"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pack(folder: Path, shared: Path) -> None:
    """Everything that must travel: rows and tokenizer as one archive, and the small base's weights as they are (a
    bfloat16's upper bytes compress, its lower ones do not)."""
    folder.mkdir(parents=True, exist_ok=True)
    base = shared / "bases/gpt2-27m"
    files: dict[str, bytes] = {}
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        files[f"base/{name}"] = (base / name).read_bytes()
    rows = (shared / "data/e2e/train.jsonl").read_text("utf-8").splitlines()
    # from all over the file: rows of one record stand together
    files["rows/rows.jsonl"] = _lines(rows[:: len(rows) // ROWS][:ROWS])
    valid = (shared / "data/e2e/valid.jsonl").read_text("utf-8").splitlines()
    files["rows/valid.jsonl"] = _lines(valid[:: len(valid) // VALID][:VALID])
    chats = (shared / "data/chat_sgd/train.jsonl").read_text("utf-8").splitlines()
    plain = [json.dumps({"messages": json.loads(line)["messages"]}, ensure_ascii=False) for line in chats]
    files["rows/chat.jsonl"] = _lines(plain[:CHATS])
    files["rows/valid-chat.jsonl"] = _lines(plain[CHATS : CHATS + VALID])
    text = (shared / "corpus/val.txt").read_text("utf-8")
    files["rows/text.txt"], files["rows/valid.txt"] = text[:TEXT].encode(), text[TEXT : TEXT + 60_000].encode()
    with tarfile.open(folder / "files.tar.xz", "w:xz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    weights = (base / "model.safetensors").read_bytes()
    (folder / "weights.low").write_bytes(weights[::2])
    (folder / "weights.high.xz").write_bytes(lzma.compress(weights[1::2], preset=6))
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size / 1e6:6.1f} MB  {path}")


def _lines(rows: list[str]) -> bytes:
    return ("\n".join(rows) + "\n").encode()


def unpack(payload: Path, bases: Path) -> None:
    """Rows into `bases`/rows, and the base of 27M, where its weights were carried, into `bases`/27M and, with a chat
    template, `bases`/27M-chat."""
    if (bases / "27M-chat" / READY).exists():
        return
    bases.mkdir(parents=True, exist_ok=True)
    with tarfile.open(payload / "files.tar.xz") as archive:
        archive.extractall(bases, filter="data")
    if not (payload / "weights.low").exists():
        print(f"no weights of the 27M in {payload}: they will be random ones of its shape", flush=True)
        return
    low, high = (payload / "weights.low").read_bytes(), lzma.decompress((payload / "weights.high.xz").read_bytes())
    weights = bytearray(len(low) + len(high))
    weights[::2], weights[1::2] = low, high
    shutil.copytree(bases / "base", bases / "27M", dirs_exist_ok=True)
    (bases / "27M/model.safetensors").write_bytes(weights)
    _finish(bases / "27M")


def unpack_small(bases: Path) -> None:
    """Rows of the embedded task, and its tokenizer, for a check of the script on a CPU."""
    from spectune import embedded

    rows, base = bases / "rows", bases / "base"
    rows.mkdir(parents=True, exist_ok=True)
    base.mkdir(exist_ok=True)
    for path in Path(embedded.MODEL_FOLDER).glob("tokenizer*"):
        shutil.copy(path, base)
    found = [json.loads(line) for line in Path(embedded.TRAIN).read_text("utf-8").splitlines()[:120]]
    plain = [{"prompt": row["prompt"], "completion": row["completion"]} for row in found]
    chats = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
        for r in plain
    ]
    text = "\n<|endoftext|>\n".join(row["prompt"] + row["completion"] for row in plain)
    for name, wanted in (("rows", plain[:96]), ("valid", plain[96:]), ("chat", chats[:96]), ("valid-chat", chats[96:])):
        (rows / f"{name}.jsonl").write_bytes(_lines([json.dumps(row) for row in wanted]))
    (rows / "text.txt").write_text(text, "utf-8")
    (rows / "valid.txt").write_text(text[:2000], "utf-8")


def _finish(folder: Path) -> None:
    """The same base beside itself, its tokenizer with a chat template; both are ready then."""
    chat = folder.with_name(f"{folder.name}-chat")
    shutil.rmtree(chat, ignore_errors=True)
    shutil.copytree(folder, chat, copy_function=os.link)
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    (chat / "tokenizer_config.json").unlink()
    (chat / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHATML}), "utf-8")
    for made in (folder, chat):
        (made / READY).write_text(time.strftime("%Y-%m-%dT%H:%M:%S\n"))


def make_bases(bases: Path, wanted: dict[str, str | None], device: str) -> None:
    """Random weights of these shapes (name -> config; None for the 27M's own), one folder each, as transformers saves
    them: bfloat16 on a GPU, the vocabulary the config's own (text takes the first ids of it), the tokenizer that of the
    27M."""
    import torch
    from benchmarks.shapes import CONFIGS, build
    from transformers import AutoConfig, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(bases / "base")
    for name, config_name in wanted.items():
        if (bases / f"{name}-chat" / READY).exists():
            continue
        begin = time.perf_counter()
        config = AutoConfig.from_pretrained(bases / "base") if config_name is None else CONFIGS[config_name]()
        config.vocab_size = max(config.vocab_size, len(tokenizer))
        config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
        torch.manual_seed(0)
        model = build(config, torch.device(device), torch.bfloat16 if device == "cuda" else torch.float32)
        made = time.perf_counter() - begin
        model.save_pretrained(bases / name, max_shard_size="4GB")
        for path in (bases / "base").glob("tokenizer*"):
            shutil.copy(path, bases / name)
        size = model.num_parameters()
        del model
        if device == "cuda":
            torch.cuda.empty_cache()
        _finish(bases / name)
        seconds = time.perf_counter() - begin
        print(f"{name}: {size / 1e6:,.0f}M weights made in {made:.0f} s, saved in {seconds - made:.0f} s", flush=True)


def main() -> int:
    if sys.argv[1] == "pack":
        pack(Path(sys.argv[2]), Path(__file__).parents[1].parent / "shared" if len(sys.argv) < 4 else Path(sys.argv[3]))
    else:
        make_bases(Path(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
