"""The examples run as they stand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.pylabtools import select_figure_formats
from nbclient import NotebookClient

import spectune
from spectune.comparing import beginning, final_runs, isolated, measure
from spectune.storage import load, load_delta

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_own_loop() -> None:
    first, last = example("own_loop").main(steps=10)
    assert last < first


def test_the_trainer_without_accelerate_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    module = example("hf_trainer")
    monkeypatch.setattr(module, "is_accelerate_available", lambda: False)
    with pytest.raises(SystemExit, match=r"pip install 'spectune\[examples\]'"):
        module.main()


@pytest.mark.filterwarnings("ignore::UserWarning:torch.utils.data")
def test_hf_trainer(tmp_path: Path) -> None:
    loss, saved = example("hf_trainer").main(steps=4, folder=str(tmp_path))
    assert loss > 0
    model, _ = load("spectune-tiny")
    delta = load_delta(model, saved)
    assert any(tensor.abs().max() > 0 for name, tensor in delta.state_dict().items() if name.endswith("up.weight"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_notebook_as_it_stands() -> None:
    notebook = nbformat.read(EXAMPLES / "comparison.ipynb", as_version=4)
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown_is_whole([output.data for output in outputs if output.output_type == "execute_result"])


def test_the_notebook_s_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, without a kernel, and with less of what takes most of their time and has tests of its own."""
    compare, passages = spectune.compare, beginning.retained_passages
    monkeypatch.setattr(final_runs, "train_memory_in_own_process", isolated._measure)
    monkeypatch.setattr(measure, "DECODE_TOKENS", 3)
    monkeypatch.setattr(measure, "ROUNDS", 1)
    monkeypatch.setattr(beginning, "retained_passages", lambda *args, **kwargs: passages(*args, **kwargs)[:2])

    def small(base: str, rows: list[Any], held_out: list[Any], config: spectune.TrainingConfig, **settings: Any) -> Any:
        settings["methods"] = settings["methods"][:2]
        return compare(base, rows[:16], held_out[:2], config=config.model_copy(update={"max_steps": 2}), **settings)

    monkeypatch.setattr(spectune, "compare", small)
    shell, shown = InteractiveShell(), []
    select_figure_formats(shell, {"png"})
    for cell in nbformat.read(EXAMPLES / "comparison.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            found = shell.run_cell(cell.source)
            found.raise_error()
            shown.append(shell.display_formatter.format(found.result)[0])
    shown_is_whole(shown)


def shown_is_whole(shown: list[dict[str, Any]]) -> None:
    assert any("<table>" in data.get("text/html", "") for data in shown)
    assert any("image/png" in data for data in shown)
