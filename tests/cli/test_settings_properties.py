"""Configs come back from what they are written as, and nothing a user can type raises anything but a ConfigError."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from transformers.activations import ACT2FN

from spectune.cli.settings import RUN_KEYS, Settings
from spectune.deltas import Method
from spectune.errors import ConfigError
from spectune.methods import BY_NAME, METHODS, method_from_dict
from spectune.training import TrainingConfig

SLOW_TO_DRAW = [HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much, HealthCheck.too_slow]
PROPERTY = settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=SLOW_TO_DRAW)

#: fields whose type says less than their check
KNOWN: dict[str, st.SearchStrategy[Any]] = {
    "activation": st.sampled_from(sorted(ACT2FN)),
    "output_dir": st.none() | st.text("ab./ é", min_size=1).map(Path),
}


def values(field: FieldInfo) -> st.SearchStrategy[Any]:
    """Values of a field's type within its bounds; those bounds are of no concern to None."""
    types = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else (field.annotation,)
    bounds = tuple(field.metadata)
    found = [st.from_type(Annotated[(kind, *bounds)] if bounds and kind is not NoneType else kind) for kind in types]
    return st.one_of(found)


@st.composite
def config(draw: st.DrawFn, cls: type[BaseModel]) -> Any:
    """A config with some of its fields set to any value that it accepts."""
    fields = {}
    for name, field in cls.model_fields.items():
        if name != "name" and draw(st.booleans()):
            value = draw(KNOWN[name] if name in KNOWN else values(field))
            assume(not isinstance(value, float) or math.isfinite(value))
            fields[name] = value
    try:
        return cls(**fields)
    except (ValidationError, ConfigError):
        assume(False)


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: str(cls.model_fields["name"].default))
def test_methods_come_back(cls: type[Method]) -> None:
    @PROPERTY
    @given(config(cls))
    def check(method: Method) -> None:
        assert method_from_dict(method.model_dump()) == method
        written = json.dumps(method.model_dump(mode="json"))
        assert method_from_dict(json.loads(written)) == method
        # a saved delta's method is read as strictly as JSON can be
        assert cls.model_validate_json(written, strict=True) == method
        stored = method.as_stored()
        assert stored.as_stored() == stored
        assert method_from_dict(json.loads(json.dumps(stored.model_dump(mode="json")))) == stored

    check()


@PROPERTY
@given(config(TrainingConfig))
def test_training_configs_come_back(given_config: TrainingConfig) -> None:
    assert TrainingConfig(**given_config.model_dump()) == given_config
    written = yaml.safe_dump(given_config.model_dump(mode="json"))
    assert TrainingConfig(**yaml.safe_load(written)) == given_config


@PROPERTY
@given(config(TrainingConfig))
def test_training_configs_come_back_through_a_file(tmp_path: Path, given_config: TrainingConfig) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(given_config.model_dump(mode="json")), encoding="utf-8")
    assert Settings.collect(path, None, {}).training() == given_config


@pytest.mark.parametrize("name", list(BY_NAME))
def test_unknown_keys_are_named(name: str) -> None:
    known = set(BY_NAME[name].model_fields) | set(TrainingConfig.model_fields) | RUN_KEYS

    @PROPERTY
    @given(st.text(alphabet="abr_.-é0", min_size=1, max_size=8).filter(lambda key: key not in known), st.integers())
    def check(key: str, value: int) -> None:
        with pytest.raises(ConfigError) as caught:
            method_from_dict({"name": name, key: value})
        assert repr(key) in str(caught.value)
        with pytest.raises(ConfigError) as caught:
            Settings.collect(None, [f"{key}={value}"], {}).methods([name])
        assert repr(key) in str(caught.value)

    check()


@pytest.mark.parametrize("key", ["learning_rate", "num_train_epochs", "weight_decay", "max_grad_norm", "warmup_steps"])
@pytest.mark.parametrize("value", [".inf", ".nan", "-.inf", "1e999"])
def test_numbers_that_are_none(key: str, value: str) -> None:
    """An infinite rate diverges at once, infinite epochs never end: neither is meant."""
    with pytest.raises(ConfigError, match=f"--set {key}={value}: {key}"):
        Settings.collect(None, [f"{key}={value}"], {}).training()


# -- anything at all ------------------------------------------------------------------------------------------------

KEYS = sorted(
    set(TrainingConfig.model_fields) | RUN_KEYS | {"r", "method.r", "lora.r", "method.name", "target_modules"}
)
YAML = st.text(alphabet="[]{}:,&*!|>-?'\"#%@` \n\t\\=a0.1_xe~<", max_size=14)
#: what YAML's own constructors stumble over
TRAPS = st.sampled_from(
    [
        "2024-99-99",
        "2024-02-30 25:61:00",
        "0b",
        "0x_",
        "0o9",
        "1:99:99",
        "!!int x",
        "!!float ''",
        "!!timestamp never",
        "!!binary é",
        "!!python/object/apply:os.getcwd []",
        "!!set {a, b}",
        "&a [*a]",
        "{&a x: *a}",
        "&a {b: *a}",
        "*nobody",
        "? [a]",
        "{[a]: b}",
        "{{a: b}: c}",
        "<<: 3",
        "{<<: [1]}",
        "!!map [a]",
        "\x00",
        "\ud800",
        "[" * 900,
        "1" * 5000,
        "0x" + "f" * 5000,
        "-" * 50,
        "'",
        "=",
        "!!omap [a]",
    ]
)
VALUE = YAML | TRAPS | st.text(max_size=8) | st.integers().map(str) | st.floats().map(str)


def use(settings: Settings) -> None:
    """Everything a command asks of its settings."""
    for ask in (
        settings.training,
        lambda: settings.methods(settings.method_names(["lora"])),
        lambda: settings.methods([]),
        *(lambda key=key: settings.text(key) for key in sorted(RUN_KEYS)),
        lambda: (settings.base, settings.placement),
    ):
        with contextlib.suppress(ConfigError):
            ask()


@settings(PROPERTY, max_examples=300)
@given(st.sampled_from(KEYS) | st.text(max_size=6), VALUE)
def test_set_raises_nothing_but_config_errors(key: str, value: str) -> None:
    with contextlib.suppress(ConfigError):
        use(Settings.collect(None, [f"{key}={value}"], {}))


@settings(PROPERTY, max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(KEYS) | YAML, VALUE), max_size=3), st.booleans())
def test_files_raise_nothing_but_config_errors(tmp_path: Path, lines: list[tuple[str, str]], nested: bool) -> None:
    path = tmp_path / "run.yaml"
    text = "".join(f"{'  ' * nested}{key}: {value}\n" for key, value in lines)
    path.write_text("lora:\n" * nested + text, encoding="utf-8", errors="surrogatepass")
    try:
        found = Settings.collect(path, None, {})
    except ConfigError as error:
        if str(path) not in str(error):
            raise
    else:
        use(found)


@PROPERTY
@given(st.binary(max_size=30))
def test_files_of_any_bytes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    with contextlib.suppress(ConfigError):
        use(Settings.collect(tmp_path / "run.yaml", None, {}))


def test_a_config_that_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        Settings.collect(tmp_path, None, {})
