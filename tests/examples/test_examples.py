"""The examples run as they stand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbclient import NotebookClient

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


#: put before the notebook's own cells, which run as they stand: what takes most of their time has tests of its own
SHORT = """
import importlib
names = ("measure", "beginning", "isolated", "final_runs")
measure, beginning, isolated, final_runs = (importlib.import_module(f"spectune.comparing.{name}") for name in names)
final_runs.train_memory_in_own_process = isolated._measure  # in this process
import spectune
compare = spectune.compare
spectune.compare = lambda base, rows, held_out, **settings: compare(base, rows[:24], held_out[:4], **settings)
measure.DECODE_TOKENS, measure.ROUNDS = 3, 1
passages = beginning.retained_passages
beginning.retained_passages = lambda *args, **kwargs: passages(*args, **kwargs)[:2]
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("first", [SHORT, pytest.param("", marks=pytest.mark.slow)], ids=["short", "as it stands"])
def test_notebook_shows_table_and_figure(first: str) -> None:
    notebook = nbformat.read(EXAMPLES / "comparison.ipynb", as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output.data for output in outputs if output.output_type == "execute_result"]
    assert any("<table>" in data.get("text/html", "") for data in shown)
    assert any("image/png" in data for data in shown)
