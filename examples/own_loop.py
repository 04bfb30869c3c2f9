"""A training loop of your own over an attached delta: spectune only supplies the method.

python examples/own_loop.py --steps 60
"""

from __future__ import annotations

import argparse

import torch

import spectune
from spectune import embedded
from spectune.data import batches, collate, encode, load_rows


def main(steps: int = 60) -> tuple[float, float]:
    model, tokenizer = spectune.load("spectune-tiny")
    examples = encode(load_rows(embedded.TRAIN), tokenizer, max_length=128).examples
    order = batches([len(e.input_ids) for e in examples], 16, seed=0, epoch=0)

    delta = spectune.attach(model, spectune.LoRA(r=8), name="sentences")
    delta.print_trainable_parameters()
    optimizer = torch.optim.AdamW(delta.parameters(), lr=2e-3, weight_decay=0.0)

    model.train()
    losses = []
    for step in range(steps):
        batch = collate([examples[i] for i in order[step % len(order)]], tokenizer.pad_token_id)
        loss = model(**batch).loss  # the base's own loss; labels are -100 on prompts and padding
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()

    prompt = "name: Anna Hill | job: baker | town: York\n"
    ids = tokenizer(prompt, return_tensors="pt")
    for name in (None, "sentences"):  # the bare base, then the delta
        with spectune.route(model, name):
            out = model.generate(**ids, max_new_tokens=24, do_sample=False)
        print(f"{name}: {tokenizer.decode(out[0, ids['input_ids'].shape[1] :], skip_special_tokens=True)!r}")

    spectune.detach(model, "sentences")  # the base is bit for bit what it was
    few = max(1, steps // 5)
    return sum(losses[:few]) / few, sum(losses[-few:]) / few


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    first, last = main(parser.parse_args().steps)
    print(f"training loss: {first:.3f} at first, {last:.3f} at last")
