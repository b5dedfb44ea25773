"""Who may import whom, what an import may do, and which files can be copied out."""

import ast
import shutil
import subprocess
import sys

import pytest
from conftest import REPO

# Package or module -> what it may import beside itself. Commands may import everything below them.
MAY_IMPORT = {
    "support": set(),
    "model": set(),
    "loss": set(),
    "metric": set(),
    "datasets": {"support"},
    "inference": {"datasets.classes", "metric", "model", "support"},
    "output": {"datasets.classes", "metric", "support"},
    "training": {"inference", "output", "datasets", "model", "loss", "metric", "support"},
}
PRODUCT = [path for folder in ("", *MAY_IMPORT) for path in (REPO / folder).glob("*.py")]
INSTALLED = """
import signal, sys
def installed():
    return sys.excepthook, [signal.getsignal(number) for number in signal.valid_signals()]
before = installed()
import NAMES
assert installed() == before
"""
ALONE = """
import loss, metric, model, torch
logits = model.build_model("unet", 3, width=2)(torch.ones(2, 3, 5, 7))
mask = torch.zeros(2, 5, 7, dtype=torch.long)
assert loss.SegmentationLoss()(logits, mask) > 0
metric.SegmentationMetric(3).update(logits.argmax(1), mask)
"""


def run(code, folder):
    subprocess.run([sys.executable, "-E", "-c", code], cwd=folder, check=True)


def imports(path):
    """The full names that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(REPO)))
def test_imports_point_down(path):
    own = {p.relative_to(REPO).parts[0].removesuffix(".py") for p in PRODUCT}
    layer = path.relative_to(REPO).parts[0].removesuffix(".py")
    allowed = {layer, *MAY_IMPORT.get(layer, MAY_IMPORT)}
    for name in imports(path):
        first, second = f"{name}.".split(".")[:2]
        assert first not in own or {first, f"{first}.{second}"} & allowed, name


def test_importing_every_module_installs_nothing():
    names = [".".join(path.relative_to(REPO).with_suffix("").parts) for path in PRODUCT]
    run(INSTALLED.replace("NAMES", ", ".join(names)), REPO)


def test_model_loss_and_metric_can_be_copied_out(tmp_path):
    for name in ("model.py", "loss.py", "metric.py"):
        shutil.copy(REPO / name, tmp_path)
    run(ALONE, tmp_path)
