"""Training steps of spectune and of its peers, measured in one run.

    PYTHONPATH=src python -m benchmarks.step_speed --out step_speed.jsonl --budget-seconds 540
    PYTHONPATH=src python -m benchmarks.step_speed --out step_speed.jsonl --table docs/results/step_speed.md
    PYTHONPATH=src python -m benchmarks.step_speed --out tiny.jsonl --tiny --device cpu       a check of this script

Peers are what is installed of `peft`, `accelerate` (the Trainer), `liger-kernel` and `unsloth`; what is not, or fails,
is a row with its reason. Every measurement is a process of its own, repeats are interleaved (all systems once, then all
again), the most important first. Weights are random and made on the device, token ids, rows, order, compute dtype,
trained targets and first LoRA weights are the same for all, every token is a target; transfer of the batch, clipping
and the optimizer are in the step. One JSON line for each measurement, written at once.
"""
