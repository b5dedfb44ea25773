"""What others run gives what predict.py writes: ONNX files, weights in half precision, torch.hub."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, code_blocks, finish, opened, start
from PIL import Image

from datasets.synthetic import generate_scene
from export import check_onnx, export_onnx
from support.command import RunError
from training.checkpoints import SHIPPED, load_model, load_predictor

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A folder with model.onnx, which takes images, logits.onnx, and photo.jpg."""
    folder = tmp_path_factory.mktemp("export")
    generate_scene(3, 131, 90)[0].save(folder / "photo.jpg", quality=95)
    out, err = finish(start("export.py", "--out", "model.onnx", "--with_preprocessing", cwd=folder))
    assert "wrote model.onnx" in out and err == ""
    export_onnx(SHIPPED, folder / "logits.onnx", False)
    assert {path.name for path in folder.iterdir()} == {"photo.jpg", "logits.onnx", "model.onnx"}
    return folder


def test_the_documented_example_writes_predicts_mask_without_torch(exported, call):
    example, = code_blocks("docs/deploy.md", "python")
    code = f"{example}\nimport sys\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=exported, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Road" in done.stdout, done.stderr
    assert call("predict.py", "--image_dir", "photo.jpg", "--save_dir", "out", "--device", "cpu", cwd=exported)[0] == 0
    ours, theirs = opened(exported / "mask.png"), opened(exported / "out" / "photo_mask.png")
    assert (np.asarray(ours) == np.asarray(theirs)).mean() > 0.999
    assert ours.convert("RGB").getpixel((60, 80)) == theirs.convert("RGB").getpixel((60, 80))


@pytest.mark.parametrize("size, equal", [((480, 360), 1), ((1600, 1200), 0.995), ((1200, 1600), 0.995),
                                         ((33, 17), 0.995)])
def test_ids_are_those_of_the_predictor(exported, size, equal):
    """The last but one is a portrait; those above the checkpoint's max_side of 480 are shrunk inside the graph."""
    predictor, classes, config = load_predictor(SHIPPED)
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    image = np.array(generate_scene(1, 480, 360)[0].resize(size, Image.Resampling.BICUBIC))
    ours, theirs = session.run(None, {"photo": image[None]})[0], predictor.predict([image])
    assert ours.shape == theirs.shape == (1, *size[::-1]) and (ours == theirs).mean() >= equal
    metadata = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
    assert metadata == {"classes": classes.to_dict(), "normalize": config["normalize"], "max_side": 480}


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


def test_half_precision_predicts_the_same_without_this_machines_paths(trained, scenes, tmp_path, call):
    best = trained / "checkpoint" / "unet_best.pth"
    assert call("export.py", "--out", "model.pth", "--checkpoint", best)[0] == 0
    state, before = (torch.load(path, weights_only=True) for path in (tmp_path / "model.pth", best))
    assert {tensor.dtype for tensor in state["state_dict"].values()} == {torch.float16, torch.int64}
    local = {"data_root", "checkpoint", "resume", "init_from", "cache", "workers", "device"}
    assert before["config"]["train"].keys() - state["config"]["train"].keys() == local
    assert str(state["scores"]) == str(before["scores"]) and str(scenes) not in str(state["config"])
    images = [np.array(opened(path)) for path in sorted((scenes / "train").iterdir())]
    ours, theirs = (load_predictor(path)[0].predict(images) for path in (tmp_path / "model.pth", best))
    assert (ours == theirs).mean() >= 0.999


def test_torch_hub_gives_the_shipped_network(tmp_path):
    code = (f"import torch; hub = lambda **options: torch.hub.load({str(REPO)!r}, 'unet', source='local', **options)\n"
            "assert hub(num_classes=5, width=4)(torch.zeros(1, 3, 20, 30)).shape == (1, 5, 20, 30)\n"
            "torch.save(hub(pretrained=True)(torch.ones(1, 3, 20, 30)).detach(), 'logits.pth')")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
    with torch.inference_mode():
        expected = load_model(SHIPPED)[0](torch.ones(1, 3, 20, 30))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pth"), expected)
