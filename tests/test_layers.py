"""Who may import whom, and that model.py, loss.py and metric.py can be copied out."""
import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

# A layer -> what of the project it may import beside its own folder (docs/design.md).
MAY_IMPORT = {
    "support": (), "model": (), "loss": (), "metric": (),
    "datasets": ("support",),
    "inference": ("datasets.classes", "support"),
    "output": ("datasets.classes", "metric", "support"),
    "training": ("inference", "output", "datasets", "model", "loss", "metric", "support"),
}
PROJECT = {path.relative_to(REPO).parts[0].removesuffix(".py") for path in (*REPO.glob("*.py"), *REPO.glob("*/*.py"))}
USES = {
    "model": "all(model.build_model(name, 3, width=2)(torch.ones(2, 3, 5, 7)).shape[1:] == (3, 5, 7) "
             "for name in ('unet', 'unet_resnet18'))",
    "loss": "0.693 < loss.SegmentationLoss(0)(torch.zeros(1, 2, 1, 1), one.view(1, 1, 1)) < 0.694",
    "metric": "metric.SegmentationMetric(2).update(one, one) is None",
}


def imports(path: Path) -> set[str]:
    """The full names that a file imports, anywhere in it; a relative import begins with a dot."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {f"{'.' * node.level}{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
            for node in nodes for alias in node.names}


def test_imports_point_down_only():
    assert {"model.build_model", "training.engine.validate"} <= imports(REPO / "train.py")
    wrong = []
    for path in (*REPO.glob("*.py"), *(path for layer in MAY_IMPORT for path in (REPO / layer).glob("**/*.py"))):
        layer = path.relative_to(REPO).parts[0].removesuffix(".py")
        allowed = tuple(f"{place}." for place in (layer, *MAY_IMPORT.get(layer, MAY_IMPORT)))  # a command: every layer
        wrong += [f"{path.relative_to(REPO)} imports {name}" for name in imports(path)
                  if name.split(".")[0] in {"", *PROJECT} and not f"{name}.".startswith(allowed)]
    assert not wrong


@pytest.mark.parametrize("name", USES)
def test_file_works_on_its_own(tmp_path, name):
    shutil.copy(REPO / f"{name}.py", tmp_path)
    code = f"import torch, {name}\none = torch.ones((), dtype=torch.long)\nassert {USES[name]}"
    done = subprocess.run([sys.executable, "-E", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
