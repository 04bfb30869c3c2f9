"""Settings from file, --set and flags: who wins, and what an error names."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.hostile_files import HOSTILE_YAML

from spectune.cli.arms import given_arms
from spectune.cli.settings import Settings
from spectune.errors import ConfigError
from spectune.methods import BitFit, LoRA, PrefixTuning


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-3\nmax_steps: 7\nmodel: gpt2\nmethod:\n  name: lora\n  r: 4\n")
    return path


def test_flags_win_over_set_and_set_over_the_file(run_yaml: Path) -> None:
    settings = Settings.collect(run_yaml, ["max_steps=9", "method.r=8"], {"model": "other", "data": None})
    assert settings.base == "other"
    assert settings.text("data") is None
    assert settings.training().max_steps == 9
    assert settings.training().learning_rate == pytest.approx(1e-3)
    assert settings.method_names(["bitfit"]) == ["lora"]
    assert settings.methods(["lora"]) == [LoRA(r=8)]


def test_keys_reach_the_methods_that_have_them() -> None:
    settings = Settings.collect(None, ["num_virtual_tokens=3", "lora.r=2"], {})
    assert settings.methods(["lora", "prefix", "bitfit"]) == [LoRA(r=2), PrefixTuning(num_virtual_tokens=3), BitFit()]


def test_lists_and_blocks(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("methods: [lora, bitfit]\nlora:\n  target_modules: [q_proj]\nprefix: {num_virtual_tokens: 2}\n")
    settings = Settings.collect(path, None, {})
    names = settings.method_names([])
    assert names == ["lora", "bitfit"]
    assert settings.methods(names) == [LoRA(target_modules=("q_proj",)), BitFit()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rat: 1\n", [":1", "'learning_rat'", "did you mean 'learning_rate'?"]),
        ("max_steps: 1\ncutoff_len: 5\n", [":2", "did you mean 'max_length'?"]),
        ("method:\n  name: lora\n  lora_rank: 5\n", [":3", "method.lora_rank", "did you mean 'r'?"]),
        ("lora:\n  alpha: 5\n", [":2", "lora.alpha", "lora_alpha"]),
        ("a: 1\nb: 2\n", [":1: unknown key 'a'", ":2: unknown key 'b'"]),
    ],
)
def test_unknown_keys_are_errors_with_file_and_line(tmp_path: Path, text: str, expected: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Settings.collect(path, None, {}).methods(["lora"])
    assert str(path) in str(caught.value)
    for part in expected:
        assert part in str(caught.value)


def test_a_key_of_another_method_is_unknown() -> None:
    with pytest.raises(ConfigError, match="--set r=8: unknown key 'r'"):
        Settings.collect(None, ["r=8"], {}).methods(["bitfit"])


def test_unknown_method_suggests() -> None:
    with pytest.raises(ConfigError, match="no method 'lorra'; did you mean 'lora'"):
        Settings().methods(["lorra"])


def test_bad_values_name_their_place(run_yaml: Path) -> None:
    run_yaml.write_text("learning_rate: fast\nmethod: {name: lora, r: 0}\n")
    settings = Settings.collect(run_yaml, None, {})
    with pytest.raises(ConfigError, match=r"run\.yaml:1: learning_rate: .*given 'fast'"):
        settings.training()
    with pytest.raises(ConfigError, match=r"run\.yaml:2: r: .*given 0"):
        settings.methods(["lora"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n", "expected keys with values"),
        ("a: [1\n", "not YAML"),
        ("seed: 1\nseed: 2\n", "is there twice"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        Settings.collect(path, None, {})


def test_missing_file_and_malformed_assignment(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        Settings.collect(tmp_path / "no.yaml", None, {})
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        Settings.collect(None, ["max_steps"], {})


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("# nothing yet\n")
    assert Settings.collect(path, None, {}).given == {}


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ("1e-3", 1e-3),
        ("3", 3),
        ("010", 10),
        ("off", "off"),
        ("12:30", "12:30"),
        ("2024-01-31", "2024-01-31"),
        ("true", True),
        ("null", None),
        ("[a, b]", ["a", "b"]),
        (": ", ": "),
        (" ", " "),
        ("\n", "\n"),
        ('"\\n"', "\n"),
        (" | ", " | "),
        ("a: b", "a: b"),
        ("x=y", "x=y"),
    ],
)
def test_set_takes_yaml_values_and_text_as_it_stands(raw: str, value: object) -> None:
    assert Settings.collect(None, [f"separator={raw}"], {}).get("separator") == value


def test_a_key_of_another_method_says_whose_it_is() -> None:
    with pytest.raises(ConfigError, match="belongs to prefix and prompt, and this command has lora"):
        Settings.collect(None, ["num_virtual_tokens=5"], {}).methods(["lora"])


def test_a_method_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="--methods: lora is named more than once"):
        Settings.collect(None, None, {"methods": "lora,bitfit,lora"}).method_names([])


#: what YAML 1.1, or a number's own writing, makes something else of
WORDS = [
    "off",
    "on",
    "yes",
    "no",
    "y",
    "N",
    "1e-3",
    "12:30",
    "1:02:03",
    "2024-01-31",
    "010",
    "0o17",
    "0x1F",
    "1_000",
]


@pytest.mark.parametrize("word", WORDS)
def test_where_a_setting_is_text_a_word_is_the_word_that_was_written(tmp_path: Path, word: str) -> None:
    path = tmp_path / "run.yaml"
    lines = ["model: W", "separator: W", "columns: {prompt: W}", "encoding: W", "data: [{path: W, weight: 010}]"]
    lines += ["lora: {target_modules: [W]}", "arms: [{method: lora, name: W}]"]
    path.write_text("\n".join(lines).replace("W", word))
    given = [f"{key}={word}" for key in ("model", "separator", "columns.prompt", "encoding")]
    for settings in (Settings.collect(path, None, {}), Settings.collect(None, given, {})):
        config = settings.training()
        found = {settings.base, config.separator, config.columns["prompt"], config.encoding}
        assert found == {word}
    settings = Settings.collect(path, None, {})
    assert [(str(source.data), source.weight) for source in settings.rows("data") or []] == [(word, 10)]
    assert settings.methods(["lora"]) == [LoRA(target_modules=(word,))]
    assert [arm.name for arm in given_arms(settings, [])] == [word]
    [arm] = given_arms(Settings.collect(None, [f"methods=lora:task_type={word}"], {}), [])
    assert arm.given["task_type"].text == word


@pytest.mark.parametrize("word", ["off", "refuse", "warn"])
def test_memory_check_is_the_word_that_was_written(tmp_path: Path, word: str) -> None:
    (tmp_path / "run.yaml").write_text(f"memory_check: {word}\nmax_steps: 010\npacking: off\n")
    for settings in (
        Settings.collect(tmp_path / "run.yaml", None, {}),
        Settings.collect(None, [f"memory_check={word}", "max_steps=010", "packing=off"], {}),
    ):
        assert settings.get("memory_check") == word
        config = settings.training()
        assert (config.memory_check, config.max_steps, config.packing) == (word, 10, False)


@pytest.mark.parametrize("kind", sorted(HOSTILE_YAML))
def test_a_hostile_config_is_one_sentence_that_names_the_file(tmp_path: Path, kind: str) -> None:
    path = HOSTILE_YAML[kind](tmp_path / "run.yaml")
    with pytest.raises(ConfigError) as caught:
        Settings.collect(path, None, {}).check()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
