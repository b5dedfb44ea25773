"""What others run gives what predict.py writes: ONNX files, half precision, torch.hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, TURNED, code_blocks, opened
from PIL import Image

from datasets.synthetic import generate_scene
from export import FromPhotos, check_onnx, example, export_onnx, write_onnx
from inference.checkpoints import SHIPPED, load_model, load_predictor, release
from inference.predictor import fold_batch_norm
from model import build_model
from support.images import read_image

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
sys.path.append(str(REPO / "benchmarks"))
import bench  # noqa: E402
import references  # noqa: E402


def run(code, folder):
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with model.onnx, which takes images, and photo.jpg, which is turned."""
    folder = tmp_path_factory.mktemp("export")
    photo = generate_scene(3, 131, 90)[0].transpose(Image.Transpose.ROTATE_90)
    photo.save(folder / "photo.jpg", exif=TURNED)
    export_onnx(SHIPPED, folder / "model.onnx", True)
    return folder


@pytest.mark.slow
def test_the_documented_example_writes_predicts_mask_without_torch(exported, call):
    (example,) = code_blocks("docs/deploy.md", "python")
    run(f"{example}\nimport sys\nassert 'torch' not in sys.modules", exported)
    flags = ("--image_dir", "photo.jpg", "--save_dir", "out", "--amp", "off")
    assert call("predict.py", *flags, cwd=exported)[0] == 0
    ours = opened(exported / "out" / "photo_mask.png")
    theirs = opened(exported / "mask.png")
    assert ours.getpalette()[:36] == theirs.getpalette()[:36]
    assert (np.asarray(ours) == np.asarray(theirs)).mean() > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("size", [(480, 360), (1200, 1600), (33, 17)])
def test_ids_are_those_of_the_predictor(exported, size):
    """Images longer than the checkpoint's max_side of 480 are shrunk inside the graph."""
    predictor = load_predictor(SHIPPED)[0]
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    image = np.array(generate_scene(1)[0].resize(size))
    (ids,) = session.run(None, {"photo": image[None]})
    assert (ids[0] == predictor.predict(image)).mean() > 0.995


def test_a_network_of_16_bit_images_takes_their_values(tmp_path):
    checkpoint = torch.load(SHIPPED)
    checkpoint["config"]["value_range"] = [1000, 4000]
    torch.save(checkpoint, tmp_path / "deep.pth")
    scene = np.array(generate_scene(3, 240, 180)[0].convert("L"), int)
    values = (1000 + 3000 * scene // 255).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "photo.png")
    predictor = load_predictor(tmp_path / "deep.pth")[0]
    expected = predictor.predict(read_image(tmp_path / "photo.png", predictor.value_range))
    photo = torch.from_numpy(values.astype(np.int32))[None, ..., None].expand(-1, -1, -1, 3)
    network = FromPhotos(*load_model(tmp_path / "deep.pth")).eval()
    assert example(network, 1, 4, 5).dtype == torch.int32
    with torch.inference_mode():
        ids = network(photo)[0].numpy()
    assert (ids == expected).mean() > 0.999
    assert (ids == predictor.predict(read_image(tmp_path / "photo.png"))).mean() < 0.9


@pytest.mark.slow
def test_the_file_of_another_network_is_refused(tmp_path):
    export_onnx(SHIPPED, tmp_path / "logits.onnx", max_side=100)
    session = onnxruntime.InferenceSession(tmp_path / "logits.onnx")
    assert session.get_modelmeta().custom_metadata_map["max_side"] == "100"
    model = load_model(SHIPPED)[0]
    model.classifier.bias.data[3] += 0.01
    with pytest.raises(RuntimeError):
        check_onnx(model, tmp_path / "logits.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet_lite0", "unet_resnet18"])
def test_networks_with_other_encoders_are_exported(name, tmp_path):
    torch.manual_seed(0)
    network = build_model(name, 12, width=4)
    with torch.no_grad():
        network(torch.randn(2, 3, 64, 96))  # gives batch norm statistics, so that all stages count
    network = fold_batch_norm(network.eval())
    write_onnx(network, tmp_path / "model.onnx", {})
    assert check_onnx(network, tmp_path / "model.onnx") < 1e-4


def test_half_precision_predicts_the_same_without_this_machines_paths(trained, scenes, tmp_path):
    """Even where the variances of batch norm exceed 65,504, the range of half precision."""
    checkpoint = torch.load(trained / "checkpoint" / "unet_best.pth")
    for name, factor in {"0.weight": 1e4, "1.running_mean": 1e4, "1.running_var": 1e8}.items():
        checkpoint["state_dict"][f"decoder.0.conv.{name}"] *= factor
    assert checkpoint["state_dict"]["decoder.0.conv.1.running_var"].max() > 65504
    torch.save(checkpoint, tmp_path / "full.pth")
    release(tmp_path / "full.pth", tmp_path / "half.pth")
    assert str(scenes) not in str(torch.load(tmp_path / "half.pth"))
    image = np.array(opened(min((scenes / "train").iterdir())))
    full, half = (load_predictor(tmp_path / f"{name}.pth")[0] for name in ("full", "half"))
    assert (full.predict(image) == half.predict(image)).mean() > 0.995


HUB = f"""
import model
import torch
net = torch.hub.load({str(REPO)!r}, "unet", source="local", pretrained=True)
assert net(torch.ones(1, 3, 20, 30)).shape == (1, 12, 20, 30)
weights = torch.load({str(SHIPPED)!r})["state_dict"]
assert all(torch.equal(value, weights[name].to(value)) for name, value in net.state_dict().items())
import datasets.own
assert "UNet" not in dir(model)
"""


def test_torch_hub_beside_the_users_own_modules_of_the_same_names(tmp_path):
    """Such as Hugging Face's ``datasets``, imported before or after."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "own.py").touch()
    (tmp_path / "model.py").touch()
    run(HUB, tmp_path)


def test_masks_of_the_shipped_network_equal_those_of_the_plain_loop(scenes, tmp_path, call):
    images = scenes / "val"
    flags = ("--image_dir", images, "--save_dir", "ours", "--amp", "off")
    assert call("predict.py", *flags, "--checkpoint", SHIPPED)[0] == 0
    references.predict(SHIPPED, images, tmp_path / "plain", "cpu")
    for path in (tmp_path / "plain").iterdir():
        plain = np.asarray(opened(path))
        ours = np.asarray(opened(tmp_path / "ours" / path.name).convert("RGB"))
        assert (ours == plain).all(-1).mean() > 0.999, "but for nearly equal probabilities"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
def test_the_script_for_a_gpu_runs_on_a_cpu(scenes, tmp_path):
    flags = ("--smoke", "--runs", "1", "--data_root", scenes, "--out", tmp_path / "bench.json")
    path = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(["bash", REPO / "benchmarks" / "gpu.sh", *flags], env=environment, check=True)
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["stage"].split()[0] for row in rows] == [
        "predict.py,",
        "train.py",
        "step,",
        "pixels",
    ]


def test_the_benchmark_writes_its_rows_and_trains(scenes, tmp_path):
    out = tmp_path / "bench.json"
    flags = ["masks", "items", "--runs", "1", "--data_root", str(scenes), "--out", str(out)]
    args = bench.get_args_parser().parse_args(flags)
    bench.main(args)
    assert len(json.loads(out.read_text())["rows"]) == 3
    batches = bench.stages.random_batches(1, 2)
    assert bench.stages.our_steps(args, batches, "--width", "4")()["train_loss"] > 0
