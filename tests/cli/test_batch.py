"""`spectune generate --input --output`: every request has its line, in order, whatever becomes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spectune.cli import batch
from spectune.inference import Engine

Spectune = Callable[..., Any]
PROMPTS = [f"number {i}" for i in range(7)]
NAMES = ("lora", "prefix", None, "bitfit")


@pytest.fixture(scope="module")
def deltas(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """Three deltas that change what is written, saved as any program of the library's saves them."""
    from tests.contract.conftest import move

    from spectune import attach, detach, load
    from spectune.methods import BitFit, LoRA, PrefixTuning

    folder = tmp_path_factory.mktemp("deltas")
    model, _ = load(str(base), device="cpu")
    for name, method in {"lora": LoRA(r=2), "prefix": PrefixTuning(num_virtual_tokens=3), "bitfit": BitFit()}.items():
        delta = attach(model, method, name)
        move(delta, 0.3)
        delta.save(folder / name)
        detach(model, name)
    return folder


@pytest.fixture
def ask(spectune: Spectune, base: Path, deltas: Path) -> Callable[..., Any]:
    def call(requests: list[Any], *flags: str, output: str = "out.jsonl") -> Any:
        lines = [one if isinstance(one, str) else json.dumps(one) for one in requests]
        Path("in.jsonl").write_text("".join(line + "\n" for line in lines))
        given = ("--input", "in.jsonl", "--output", output, "--deltas", deltas, "--model", base, "--device", "cpu")
        return spectune("generate", *given, "--max-new-tokens", "4", *flags)

    return call


def lines(path: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_requests_of_all_deltas_in_one_file_are_answered_as_alone(
    ask: Callable[..., Any], spectune: Spectune, base: Path, deltas: Path
) -> None:
    asked = [{"prompt": p, "delta": NAMES[i % 4], "id": f"id-{i}"} for i, p in enumerate(PROMPTS)]
    found = ask(asked, "--json")
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout) == {
        "output": "out.jsonl", "lines": 7, "failed": 0, "resumed": 0,
        "tokens": sum(line["completion_tokens"] for line in lines()),
    }  # fmt: skip
    assert [line["line"] for line in lines()] == [*range(1, 8)]
    assert [line["id"] for line in lines()] == [one["id"] for one in asked]
    for number, name in enumerate(NAMES):
        run = () if name is None else ("--run", deltas / name)
        mine = [i for i in range(7) if i % 4 == number]
        prompts = [PROMPTS[i] for i in mine]
        alone = spectune("generate", *prompts, *run, "--model", base, "--max-new-tokens", "4", "--json")
        assert alone.exit_code == 0, alone.stderr
        expected = [output["completion"] for output in json.loads(alone.stdout)["outputs"]]
        assert [lines()[i]["completion"] for i in mine] == expected, name


def test_openais_words_mean_the_same(ask: Callable[..., Any], spectune: Spectune, base: Path) -> None:
    """A `model` and a `max_tokens` were passed over, and the base answered."""
    asked: list[dict[str, Any]] = [
        {"delta": "lora", "max_new_tokens": 3}, {"model": "lora", "max_tokens": 3},
        {"model": base.name, "max_completion_tokens": 2}, {"max_new_tokens": 2},
        {"model": "lroa"}, {"delta": "prefix", "model": "of a column"}, {"delta": "prefix"}, {"model": None},
    ]  # fmt: skip
    found = ask([{"prompt": "number 3", **one} for one in asked])
    assert found.exit_code == 1, found.stderr
    said = [line.get("completion") for line in lines()]
    assert said[0] == said[1] != said[2] == said[3]
    assert "no delta 'lroa' in " in lines()[4]["error"]
    assert said[5] == said[6]
    assert [line.get("delta") for line in lines()[:4]] == ["lora", "lora", base.name, None]
    assert [line.get("completion_tokens") for line in lines()[:4]] == [3, 3, 2, 2]
    # of a dataset that says who wrote its answers
    Path("rows.jsonl").write_text(json.dumps({"prompt": "number 3", "model": "gpt-4", "max_new_tokens": 2}) + "\n")
    words = ("generate", "--input", "rows.jsonl", "--output", "rows-out.jsonl", "--model", base, "--device", "cpu")
    assert spectune(*words).exit_code == 0
    assert lines("rows-out.jsonl")[0]["completion"] == said[3]


def test_a_request_that_cannot_be_answered_has_a_line_that_says_why(ask: Callable[..., Any]) -> None:
    wrong: dict[str, Any] = {
        "{broken": "malformed JSON",
        '{"prompt": 5}': "prompt is int '5', expected text",
        '{"prompt": ""}': "empty",
        '{"question": "x"}': "question",
        '{"prompt": "x", "delta": "nobody"}': "no delta 'nobody'",
        '{"prompt": "x", "delta": "../deltas"}': "no delta",
        '{"prompt": "x", "delta": 7}': "expected the name of a delta",
        '{"prompt": "x", "temperature": "hot"}': "temperature is 'hot', expected a number",
        '{"prompt": "x", "max_new_tokens": 0}': "expected a whole number",
        '{"prompt": "x", "stop": [""]}': "none of them empty",
        json.dumps({"prompt": "x" * 400}): "tokens; this base takes 160",
    }
    found = ask([*wrong, {"prompt": "number 1"}], "--json")
    assert found.exit_code == 1
    assert "Traceback" not in found.stderr
    for line, expected in zip(lines(), wrong.values(), strict=False):
        assert expected in line["error"], line
    assert "completion" in lines()[-1]
    assert json.loads(found.stdout)["failed"] == len(wrong)


def test_what_a_row_says_of_its_answer_counts_and_the_flags_hold_for_the_others(ask: Callable[..., Any]) -> None:
    row = {"prompt": "number 1"}
    drawn = [{**row, "seed": seed, "temperature": 2.0, "max_new_tokens": 12} for seed in (1, 1, 2)]
    assert ask([row, {**row, "max_new_tokens": 2}, *drawn, {**row, "completion": " is odd"}]).exit_code == 0
    plain, short, first, again, other, with_answer = lines()
    assert (plain["completion_tokens"], short["completion_tokens"]) == (4, 2)
    assert first["completion"] == again["completion"] != other["completion"]
    assert with_answer["completion"] == plain["completion"]
    stop = plain["completion"][1:2]
    assert ask([{**row, "stop": stop}], output="stopped.jsonl").exit_code == 0
    [line] = lines("stopped.jsonl")
    assert (line["completion"], line["finish_reason"]) == (plain["completion"].partition(stop)[0], "stop")


@pytest.mark.parametrize("cut", [0, 1, 40, 200])
def test_going_on_after_any_end_comes_to_the_same_file(
    ask: Callable[..., Any], cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [{"prompt": p, "id": i} for i, p in enumerate(PROMPTS)]
    assert ask(asked, output="whole.jsonl").exit_code == 0
    whole = Path("whole.jsonl").read_bytes()
    Path("out.jsonl").write_bytes(whole[: len(whole) - cut] if cut else whole)
    if not cut:
        monkeypatch.setattr(batch, "loader", None)  # there is nothing to load a base for
    found = ask(asked, "--resume", "--json")
    assert found.exit_code == 0, found.stderr
    assert Path("out.jsonl").read_bytes() == whole
    refused = ask([{"prompt": "x", "id": "other"}, *asked], "--resume")
    assert refused.exit_code == 3
    assert "--resume goes on with the same --input" in refused.stderr


def test_ctrl_c_leaves_whole_lines_and_says_how_to_go_on(
    ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [{"prompt": p} for p in PROMPTS * 6]
    assert ask(asked, output="whole.jsonl").exit_code == 0
    step, steps = Engine.step, []

    def interrupted(self: Engine) -> Any:
        steps.append(1)
        if len(steps) == 9:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    stopped = ask(asked)
    assert stopped.exit_code == 130
    assert "lines are in out.jsonl. Go on with: " in stopped.stderr
    assert "--resume" in stopped.stderr
    assert 0 < len(lines()) < len(asked)
    assert ask(asked, "--resume").exit_code == 0
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def test_no_more_is_held_than_a_window_of_requests(ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "AHEAD", 20)
    read: list[int] = []
    put_down = batch.Writing._put_down

    def looked(self: Any) -> None:
        read.append(len(self._done) + len(self._running))
        put_down(self)

    monkeypatch.setattr(batch.Writing, "_put_down", looked)
    first = {"prompt": PROMPTS[0], "max_new_tokens": 60}
    assert ask([first, *[{"prompt": p, "max_new_tokens": 1} for p in PROMPTS * 10]]).exit_code == 0
    assert max(read) <= 20
    assert [line["line"] for line in lines()] == [*range(1, 72)]


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--input", "in.jsonl"), 2, "--input and --output go together"),
        (("--output", "o"), 2, "--input and --output go together"),
        (("--deltas", "d"), 2, "--deltas is for files of requests: give --input and --output"),
        (("--resume",), 2, "--resume is for files of requests: give --input and --output"),
        (("--input", "in.jsonl", "--output", "o", "--rows", "3"), 2, "leave out --rows"),
        (("--input", "nothing.jsonl", "--output", "o"), 3, "nothing.jsonl: no such file"),
        (("--input", "in.jsonl", "--output", "in.jsonl"), 2, "--output in.jsonl is --input"),
        (("--input", "in.jsonl", "--output", "o", "--deltas", "nowhere"), 3, "nowhere is not a folder"),
        (("--input", "empty.jsonl", "--output", "o"), 3, "holds no request"),
        (("--input", "in.jsonl", "--output", "o", "--device-memory", "much"), 2, "--device-memory"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_and_nothing_is_written(
    spectune: Spectune, flags: tuple[str, ...], code: int, said: str
) -> None:
    Path("in.jsonl").write_text('{"prompt": "x"}\n')
    Path("empty.jsonl").write_text("")
    found = spectune("generate", *flags)
    assert found.exit_code == code, found.stderr
    assert said in found.stderr
    assert not Path("o").exists()
    assert Path("in.jsonl").read_text() == '{"prompt": "x"}\n'
