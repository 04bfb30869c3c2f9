"""Run the whole contract, fast and slow, and write docs/contract.md: each method on each family, check by check.

python tools/contract_matrix.py             runs tests/contract (minutes) and writes the page
python tools/contract_matrix.py --report F  writes it from a JUnit file of `pytest tests/contract -m "slow or not slow"`
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "contract.md"
EVERY_METHOD = "(all of them together)"

#: test -> what it checks, in the order of DESIGN's contract
CHECKS = {
    "test_starts_at_the_base_or_not_as_the_method_says": "1. Starts at the base, bit for bit (prefix and prompt: not)",
    "test_every_weight_gets_gradient_within_two_steps_and_no_base_weight_does": "2. Gradient in every weight",
    "test_every_unit_of_the_prefix_and_of_every_adapter_gets_gradient": "2. Gradient in every slot and layer",
    "test_every_site_changes_the_output": "2. Every site changes the output",
    "test_left_right_and_no_padding_give_the_same_logits": "3. Left, right and no padding, eager and SDPA",
    "test_padding_in_generate": "3. Padding in generate",
    "test_eager_equals_sdpa": "4. Eager equals SDPA",
    "test_attention_may_be_set_after_attach": "4. Attention set after attach",
    "test_gradient_checkpointing_changes_nothing": "4. Gradient checkpointing, reentrant or not",
    "test_cached_logits_equal_uncached": "4. Cached logits equal uncached, dynamic and static",
    "test_generation_equals_repeated_forwards": "4. Greedy generation equals repeated forwards; dynamic, static, no cache",
    "test_beams_and_samples_with_cache_write_what_they_write_without": "4. Beam search, sampling, return sequences: with cache as without",
    "test_bare_then_every_method_compiled_in_one_process": "4. Compiled (fullgraph), bare first, then every method",
    "test_save_and_load_elsewhere_gives_the_same_logits_bit_for_bit": "5. Save, load elsewhere, same logits",
    "test_load_refuses_another_base": "5. Another base is refused, bfloat16 is the same base",
    "test_two_saved_deltas_swapped_by_name": "5. Two saved deltas swapped by name",
    "test_detach_restores_the_base_bit_for_bit": "6. Detach restores the base bit for bit",
    "test_merge_matches_or_is_refused": "6. Merge equals unmerged, or is refused",
    "test_logits_and_gradients_of_a_mixed_batch_equal_solo_runs": "7. Mixed batch: logits and gradients of solo runs",
    "test_positions_that_nobody_gave_are_each_rows_own": "7. Mixed batch: each row's own positions",
    "test_generation_of_a_mixed_batch_equals_solo_runs": "7. Mixed batch: greedy, static cache, no cache, beams",
    "test_several_sampled_sequences_carry_their_route": "7. Mixed batch: return sequences carry their route",
    "test_checkpointing_recomputes_each_rows_route": "7. Mixed batch: checkpointing",
    "test_no_row_depends_on_its_neighbours_or_on_what_else_is_attached": "7. No row depends on another",
    "test_after_an_error_inside_a_mixed_forward_nothing_is_left": "7. Errors and Ctrl-C inside leave nothing",
    "test_there_and_back_with_one_step_of_training": "9. PEFT there and back, one step of training",
    "test_weights_stay_float32_when_the_base_is_cast": "Weights stay float32 when the base is cast",
    "test_outputs_that_a_caller_may_ask_for": "Hidden states, logits_to_keep, tuples",
}

Cell = dict[str, list[str]]  # outcome -> notes


def run(report: Path) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-m", "slow or not slow", "tests/contract"]
    return subprocess.call([*command, f"--junitxml={report}", "-o", "junit_family=xunit1"], cwd=ROOT)


def read(report: Path) -> dict[str, dict[tuple[str, str], Cell]]:
    """check -> (method, family) -> outcomes with their notes."""
    found: dict[str, dict[tuple[str, str], Cell]] = defaultdict(dict)
    for case in ET.parse(report).iter("testcase"):
        title = CHECKS.get((case.get("name") or "").partition("[")[0])
        said = {p.get("name"): p.get("value") or "" for p in case.iter("property")}
        if title is None or "family" not in said:
            continue
        if case.find("failure") is not None or case.find("error") is not None:
            outcome, note = "FAILED", ""
        elif (skipped := case.find("skipped")) is not None:
            outcome, note = "does not apply", (skipped.get("message") or "").removeprefix("Skipped: ")
        elif "refused" in said:
            outcome, note = "refused", said["refused"]
        else:
            outcome, note = "passed", ""
        cell = found[title].setdefault((said.get("case", EVERY_METHOD), said["family"]), defaultdict(list))
        cell[outcome].append(note)
    return found


def words(cell: Cell | None, refusal: str | None) -> str:
    if cell is None:
        return f"refused: {refusal}" if refusal else ""
    parts = []
    for outcome, notes in cell.items():
        note = next((n for n in notes if n), "")
        parts.append(f"{outcome} ({len(notes)})" if outcome == "passed" else f"{outcome}: {note}".rstrip(": "))
    return "; ".join(parts)


def page(found: dict[str, dict[tuple[str, str], Cell]]) -> str:
    sys.path.insert(0, str(ROOT))
    from tests.contract.conftest import CASES, REFUSED
    from tests.contract.families import FAMILIES

    cells = [cell for check in found.values() for cell in check.values()]
    total = sum(len(notes) for cell in cells for notes in cell.values())
    failed = sum(len(cell.get("FAILED", [])) for cell in cells)
    lines = [
        "# The contract, cell by cell",
        "",
        f"Made by `python tools/contract_matrix.py` on {date.today()}: torch {version('torch')}, transformers "
        f"{version('transformers')}, peft {version('peft')}, CPU, float32, tiny random models. {total:,} tests, "
        f"{failed} failed. Each check of DESIGN's contract, every method (and the variants whose code differs) on every "
        "family. A number in brackets counts the cell's tests (attention functions, caches, padding sides ...). "
        "Tolerances are in [tests/contract](../tests/contract).",
        "",
        "| family | what is particular about it |",
        "|---|---|",
    ]
    lines += [f"| {name} | {' '.join((make.__doc__ or '').split())} |" for name, make in FAMILIES.items()]
    for title in dict.fromkeys(CHECKS.values()):
        check = found.get(title, {})
        rows = [c for c in dict.fromkeys([*CASES, *(case for case, _ in check)]) if any(k[0] == c for k in check)]
        lines += ["", f"## {title}", "", f"| method | {' | '.join(FAMILIES)} |", "|---|" + "---|" * len(FAMILIES)]
        for case in rows:
            texts = [words(check.get((case, family)), REFUSED.get((family, case))) for family in FAMILIES]
            lines.append(f"| {case} | {' | '.join(text.replace('|', '/') for text in texts)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    code = 0
    with tempfile.TemporaryDirectory() as folder:
        report = args.report or Path(folder) / "report.xml"
        if args.report is None:
            code = run(report)
        PAGE.write_text(page(read(report)), encoding="utf-8")
    sys.exit(code)


if __name__ == "__main__":
    main()
