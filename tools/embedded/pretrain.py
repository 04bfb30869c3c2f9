"""Pretrain spectune-tiny on the corpus within a budget of wall-clock time, on one GPU (or, for a test, on a CPU).

    python tools/embedded/pretrain.py --corpus CORPUS --tokenizer src/spectune/embedded/model --out OUT --minutes 6.5

Writes config, weights in bfloat16, `report.json` and `samples.txt`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections import deque
from pathlib import Path

import torch
from corpus import documents
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

CONTEXT = 512
END_ID = 0
PROMPTS = ["", "The river", "In 1869 the", '"I do not know," she said', "The government announced on"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6.5, help="of training, compilation not counted")
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds from the start, all counted")
    parser.add_argument("--batch", type=int, default=128, help="windows of 512 tokens for each step")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--warm-up", type=int, default=150, help="steps")
    parser.add_argument("--documents", type=int, default=None, help="use only so many (to try the script)")
    parser.add_argument("--width", type=int, default=224)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--heads", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def token_stream(paths: list[Path], folder: Path, limit: int | None) -> Tensor:
    """All documents as one stream of ids `[tokens]` int16, each after an `<|endoftext|>`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pieces = []
    for path in paths:
        texts = list(documents(path))[:limit]
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            pieces.append(torch.tensor([END_ID, *encoding.ids], dtype=torch.int16))
    return torch.cat(pieces)


def parameter_groups(model: torch.nn.Module) -> list[dict[str, object]]:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def held_out_loss(model: GPT2LMHeadModel, folder: Path, path: Path, limit: int | None) -> tuple[float, int]:
    """Mean nats per token over whole documents, in windows of 512 that do not overlap; and the number of tokens."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    device = next(model.parameters()).device
    total, count = 0.0, 0
    windows = []
    for encoding in tokenizer.encode_batch_fast(list(documents(path))[:limit], add_special_tokens=False):
        ids = [END_ID, *encoding.ids, END_ID]
        windows += [ids[start : start + CONTEXT + 1] for start in range(0, len(ids) - 1, CONTEXT)]
    windows.sort(key=len)
    for start in range(0, len(windows), 32):
        chunk = windows[start : start + 32]
        longest = max(map(len, chunk))
        batch = torch.full((len(chunk), longest), -100)
        for row, ids in enumerate(chunk):
            batch[row, : len(ids)] = torch.tensor(ids)
        batch = batch.to(device)
        with torch.no_grad():
            logits = model(batch[:, :-1].clamp(min=0)).logits.float()
        labels = batch[:, 1:]
        total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count, count


def samples(model: GPT2LMHeadModel, folder: Path, seed: int) -> str:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    device = next(model.parameters()).device
    parts = []
    for temperature in (0.7, 1.0):
        for prompt in PROMPTS:
            torch.manual_seed(seed)
            ids = torch.tensor([[END_ID, *tokenizer.encode(prompt).ids]], device=device)
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=70,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                pad_token_id=END_ID,
            )
            parts.append(
                f"[temperature {temperature}] {tokenizer.decode(out[0, 1:].tolist(), skip_special_tokens=False)}"
            )
    return "\n\n".join(parts) + "\n"


class SpikeGuard:
    """Goes back to the last good state when the loss climbs, and trains on at a lower rate.

    At 3e-3 this model's loss left its course after 6,000 steps and did not come back within 20,000 more.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, tolerance: float = 0.2) -> None:
        self.model, self.optimizer, self.tolerance = model, optimizer, tolerance
        self.recent: deque[float] = deque(maxlen=10)
        self.best, self.scale, self.returns = math.inf, 1.0, 0
        self.keep()

    def keep(self) -> None:
        self.kept = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
        self.kept_loss = self.best

    def check(self, loss: float, snapshot: bool) -> None:
        """`loss` of one batch; with `snapshot`, a state that is as good as the best is kept."""
        if not loss < self.best + self.tolerance:
            self.model.load_state_dict(self.kept[0])
            self.optimizer.load_state_dict(self.kept[1])
            self.scale *= 0.7
            self.returns += 1
            self.best = self.kept_loss
            self.recent.clear()
            return
        self.recent.append(loss)
        if len(self.recent) == self.recent.maxlen:
            mean = sum(self.recent) / len(self.recent)
            self.best = min(self.best, mean)
            if snapshot and mean < self.best + 0.03:
                self.keep()


def write_report(folder: Path, report: dict[str, object]) -> None:
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def main() -> None:
    args = arguments()
    begin = time.time()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stream = token_stream(sorted(args.corpus.glob("train-*")), args.tokenizer, args.documents)
    print(f"{len(stream):,} tokens after {time.time() - begin:.0f} s", flush=True)
    config = GPT2Config(
        vocab_size=8192,
        n_positions=CONTEXT,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
    )
    model = GPT2LMHeadModel(config).to(device)
    weights = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(
        parameter_groups(model), lr=args.learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda"
    )

    def loss_of(batch: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model(batch[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    torch._dynamo.config.suppress_errors = True  # a graph that does not compile runs as it is
    step_loss = torch.compile(loss_of) if device.type == "cuda" else loss_of
    stream = stream.to(device)
    generator = torch.Generator().manual_seed(args.seed)
    inside = torch.arange(CONTEXT + 1, device=device)

    def epoch_batches():
        """Windows at a random offset, shuffled; whole batches only, so that shapes never change."""
        while True:
            offset = int(torch.randint(0, CONTEXT, (1,), generator=generator))
            starts = torch.arange(offset, len(stream) - CONTEXT - 1, CONTEXT)
            starts = starts[torch.randperm(len(starts), generator=generator)].to(device)
            for group in starts.split(args.batch):
                if len(group) == args.batch:
                    yield stream[group[:, None] + inside].long()

    batches = epoch_batches()
    guard = SpikeGuard(model, optimizer)
    budget = args.minutes * 60
    curve, step, share = [], 0, 0.0
    clock = time.time()
    while share < 1.0:
        # the schedule follows the clock: the rate is zero when the time is up, however fast the machine is
        rate = guard.scale * args.learning_rate * min((step + 1) / args.warm_up, 1.0) * (1 - share)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = step_loss(next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step == 5:
            if device.type == "cuda":
                torch.cuda.synchronize()
            clock = time.time()  # compilation is over
            budget = max(min(budget, begin + args.deadline - clock), 1.0)
        if step % 20 == 0 or device.type == "cpu":
            value = loss.item()
            share = (time.time() - clock) / budget
            guard.check(value, snapshot=step % 200 == 0)
            if step % 200 == 0 or share >= 1.0:
                seen = step * args.batch * CONTEXT
                curve.append({"step": step, "loss": round(value, 4), "tokens": seen})
                print(
                    f"step {step} loss {value:.3f} share {share:.2f} {seen / (time.time() - clock):,.0f} tok/s",
                    flush=True,
                )

    seconds = time.time() - clock
    model = model.to(torch.bfloat16)
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    # stored in half the space, computed in float32: in bfloat16 the gradients of this small model are noise in part
    # (docs/decisions.md), and transformers loads in the type that the config names
    config = json.loads((args.out / "config.json").read_text())
    (args.out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    report = {
        "weights": weights,
        "layers": args.layers,
        "width": args.width,
        "heads": args.heads,
        "corpus_tokens": len(stream),
        "steps": step,
        "tokens": step * args.batch * CONTEXT,
        "epochs": round(step * args.batch * CONTEXT / len(stream), 2),
        "seconds": round(seconds, 1),
        "learning_rate": args.learning_rate,
        "batch_tokens": args.batch * CONTEXT,
        "returns_to_last_good_state": guard.returns,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "seed": args.seed,
        "curve": curve,
    }
    write_report(args.out, report)  # what follows may be cut off
    model = GPT2LMHeadModel.from_pretrained(args.out, dtype=torch.float32).to(device).eval()  # what a user will load
    loss_value, held_out_tokens = held_out_loss(model, args.tokenizer, args.corpus / "val.txt", args.documents)
    report |= {"held_out_loss": round(loss_value, 4), "held_out_tokens": held_out_tokens}
    write_report(args.out, report)
    (args.out / "samples.txt").write_text(samples(model, args.tokenizer, args.seed))
    print(json.dumps({k: v for k, v in report.items() if k != "curve"}), flush=True)
    print((args.out / "samples.txt").read_text())


if __name__ == "__main__":
    main()
