"""Imports point one way: training -> app -> nothing of ours. The deployed side needs neither torchvision nor numpy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT

APP = sorted((ROOT / "app").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module a file imports, wherever the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", APP, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_app_imports_neither_training_nor_its_libraries(path: Path) -> None:
    assert not tops(path) & {"training", "tests", "torchvision", "numpy", "matplotlib", "tqdm"}


CODEC = [f"open_inference/{name}" for name in ("spec", "request", "tensors", "response")]
HTTP = ["application.py", "boundary.py", "exchange.py", "main.py", "protocol.py", "server.py"]
SCHEMAS = ["application.py", "schemas.py", "open_inference/schemas.py"]


@pytest.mark.parametrize("path", APP, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_http_layer_imports_http_libraries_and_only_schemas_pydantic(path: Path) -> None:
    """A new module is core until it is named above."""
    name = path.relative_to(ROOT / "app").as_posix()
    if name not in HTTP and not name.startswith("routes/"):
        assert not tops(path) & {"fastapi", "starlette", "uvicorn", "httptools"}
    if name not in SCHEMAS:
        assert "pydantic" not in tops(path)


def test_only_one_file_knows_pillow() -> None:
    assert [path.name for path in APP if "PIL" in tops(path)] == ["images.py"]


def test_batcher_and_codec_import_no_torch_and_leaf_modules_nothing_of_ours() -> None:
    for name in ["batching", "entries", "admission", *CODEC]:
        assert "torch" not in tops(ROOT / "app" / f"{name}.py")
    for leaf in ("errors", "model", "report", "calibration", "statistics", "steps"):
        assert "app" not in tops(ROOT / "app" / f"{leaf}.py")


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("app.main", {"training", "torchvision", "matplotlib"}),
        ("app.__main__", {"torch", "app.processes"}),  # the latter cannot be imported on Windows
        ("training.commands", {"torchvision"}),
    ],
)
def test_modules_do_not_load_unneeded_libraries(module: str, names: set[str]) -> None:
    """Neither directly nor through another library. (Torch itself takes numpy and tqdm where it finds them.)"""
    code = f"import sys, {module}; print(sorted({names!r} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_weights_holds_data_and_never_code() -> None:
    suffixes = {path.suffix for path in (ROOT / "weights").rglob("*") if path.is_file()}
    assert suffixes <= {".pth", ".md", ".png", ".json", ".jsonl"}
