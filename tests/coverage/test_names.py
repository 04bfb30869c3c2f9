"""No type of model is known by name in src: not in a string, not as a class."""

from __future__ import annotations

import ast
from pathlib import Path

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SOURCE = Path(__file__).parents[2] / "src" / "spectune"
TYPES = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
CLASSES = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *(CONFIG_MAPPING_NAMES.get(t, "") for t in TYPES)} - {""}
#: what is named in src all the same, and why it decides nothing there
ALLOWED = {
    ("planning/counts.py", "GPT2Config"): "a shape that everybody knows, for scale",
    ("planning/counts.py", "LlamaConfig"): "a shape that everybody knows, for scale",
}
#: files about another program's own table of types
OTHERS_TABLES = {"storage/gguf_adapter.py": "llama.cpp's names of types, and where its converter puts their rows"}


def named(path: Path) -> set[str]:
    """Strings equal to a model type or holding a class of the mapping, and such classes as identifiers; docstrings and
    comments may speak of models."""
    tree = ast.parse(path.read_text())
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            found |= {node.value} & TYPES
            found |= {name for name in CLASSES if name in node.value}
        elif isinstance(node, ast.Name | ast.Attribute | ast.alias):
            name = (
                node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else node.name
            )
            found |= {name.rpartition(".")[2]} & CLASSES
            if isinstance(node, ast.alias):  # from transformers.models.TYPE import ...
                found |= set(name.split(".")) & TYPES
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("transformers"):
            found |= set(node.module.split(".")) & TYPES
    return found


def test_no_type_of_model_is_named_in_src() -> None:
    found = {
        (path.relative_to(SOURCE).as_posix(), name) for path in sorted(SOURCE.rglob("*.py")) for name in named(path)
    }
    assert {(file, name) for file, name in found if file not in OTHERS_TABLES} == set(ALLOWED)
    assert set(OTHERS_TABLES) <= {file for file, _ in found}, "an exception that is none any more"


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    for line in (
        'if config.model_type == "llama": pass',
        'x = {"gpt2": 1}',
        "from transformers import GPT2LMHeadModel",
        "isinstance(model, modeling.LlamaForCausalLM)",
        "from transformers.models.gpt_neox import modeling_gpt_neox",
        'name = "transformers.LlamaForCausalLM"',
    ):
        (tmp_path / "file.py").write_text(line + "\n")
        assert named(tmp_path / "file.py"), line
    (tmp_path / "file.py").write_text('"""As llama does."""\nx = "a llama"  # gpt2\n')
    assert not named(tmp_path / "file.py")
