"""ONNX files and torch.hub: what others run gives what predict.py writes."""
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints import SHIPPED, load_model
from datasets.synthetic import generate_scene
from export import check_onnx
from runtime import RunError

REPO = Path(__file__).parents[1]
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A folder with model.onnx, which takes photographs, logits.onnx, and photo.jpg."""
    folder = tmp_path_factory.mktemp("export")
    generate_scene(3, 131, 90)[0].save(folder / "photo.jpg", quality=95)
    for name, flags in (("logits.onnx", []), ("model.onnx", ["--with_preprocessing"])):
        command = [sys.executable, str(REPO / "export.py"), "--out", name, "--checkpoint", str(SHIPPED), *flags]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0 and name in done.stdout and not done.stderr, done.stderr
    assert {path.name for path in folder.iterdir()} == {"photo.jpg", "logits.onnx", "model.onnx"}
    return folder


def test_the_readmes_example_writes_predicts_mask_without_torch(exported):
    blocks = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.S)
    example, = (block for block in blocks if "onnxruntime" in block)
    code = f"{example}\nimport sys\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=exported, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Road" in done.stdout, done.stderr
    subprocess.run([sys.executable, str(REPO / "predict.py"), "--image_dir", "photo.jpg", "--save_dir", "out",
                    "--checkpoint", str(SHIPPED), "--device", "cpu"], cwd=exported, check=True, capture_output=True)
    with Image.open(exported / "mask.png") as ours, Image.open(exported / "out" / "photo_mask.png") as theirs:
        assert (np.asarray(ours) == np.asarray(theirs)).mean() > 0.999
        assert ours.convert("RGB").getpixel((60, 80)) == theirs.convert("RGB").getpixel((60, 80))


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 16, 16), (2, 47, 200)])
def test_logits_of_any_batch_and_size(exported, size):
    count, height, width = size
    images = torch.randn(count, 3, height, width)
    ours = onnxruntime.InferenceSession(exported / "logits.onnx").run(None, {"image": images.numpy()})[0]
    with torch.inference_mode():
        np.testing.assert_allclose(ours, load_model(SHIPPED)[0](images), atol=1e-4)


def test_a_file_that_computes_something_else_is_refused(exported):
    model = load_model(SHIPPED)[0]
    assert check_onnx(model, exported / "logits.onnx", False) < 1e-4
    with torch.no_grad():
        model.classifier.bias[3] += 0.01
    with pytest.raises(RunError, match="differ"):
        check_onnx(model, exported / "logits.onnx", False)


def test_torch_hub_gives_the_shipped_network(tmp_path):
    code = (f"import torch; hub = lambda **options: torch.hub.load({str(REPO)!r}, 'unet', source='local', **options)\n"
            "assert hub(num_classes=5, width=4)(torch.zeros(1, 3, 20, 30)).shape == (1, 5, 20, 30)\n"
            "torch.manual_seed(0); torch.save(hub(pretrained=True)(torch.ones(1, 3, 20, 30)).detach(), 'logits.pth')")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
    with torch.inference_mode():
        expected = load_model(SHIPPED)[0](torch.ones(1, 3, 20, 30))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pth"), expected)
