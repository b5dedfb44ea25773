"""What others run gives what predict.py writes: ONNX files, half precision, torch.hub, the benchmark's plain loop."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PALETTE, REPO, TURNED, code_blocks, compare_per_class, finish, opened, start
from PIL import Image

from datasets.synthetic import generate_scene
from export import FromPhotos, check_onnx, export_onnx
from support.command import RunError
from training.checkpoints import SHIPPED, load_model, load_predictor

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
sys.path.append(str(REPO / "benchmarks"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A folder with model.onnx, which takes images, logits.onnx, and photo.jpg."""
    folder = tmp_path_factory.mktemp("export")
    on_its_side = generate_scene(3, 131, 90)[0].transpose(Image.Transpose.ROTATE_90)
    on_its_side.save(folder / "photo.jpg", quality=95, exif=TURNED)
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
    assert call("predict.py", "--image_dir", "photo.jpg", "--save_dir", "out", "--amp", "off", cwd=exported)[0] == 0
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


def test_logits_of_any_size_are_the_networks_and_another_networks_are_refused(exported):
    (model, _, config), session = load_model(SHIPPED), onnxruntime.InferenceSession(exported / "logits.onnx")
    for count, *size in ((1, 1, 1), (3, 16, 16), (2, 47, 200)):
        images = torch.randn(count, 3, *size)
        with torch.inference_mode():
            np.testing.assert_allclose(session.run(None, {"image": images.numpy()})[0], model(images), atol=1e-4)
    model.classifier.bias.data[3] += 0.01
    with pytest.raises(RunError, match="differ"):
        check_onnx(model, exported / "logits.onnx")
    model.classifier.bias.data[0] = 100  # the ignored class is never predicted
    assert FromPhotos(model, **config["normalize"], ignore_index=0, max_side=480)(torch.zeros(1, 9, 7, 3)).min() > 0


def test_half_precision_predicts_the_same_without_this_machines_paths(trained, scenes, tmp_path, call):
    best = trained / "checkpoint" / "unet_best.pth"
    assert call("export.py", "--out", "model.pth", "--checkpoint", best)[0] == 0
    state, before = (torch.load(path, weights_only=True) for path in (tmp_path / "model.pth", best))
    assert {tensor.dtype for tensor in state["state_dict"].values()} == {torch.float16, torch.int64}
    local = {"data_root", "checkpoint", "resume", "init_from", "workers", "device"}
    kept = {key: value for key, value in before["config"]["train"].items() if key not in local}
    assert state["config"] == {**before["config"], "train": kept} and str(state["scores"]) == str(before["scores"])
    images = [np.array(opened(path)) for path in sorted((scenes / "train").iterdir())]
    ours, theirs = (load_predictor(path)[0].predict(images) for path in (tmp_path / "model.pth", best))
    assert (ours == theirs).mean() >= 0.995
    before["state_dict"]["classifier.weight"][:] = 1e6
    torch.save(before, tmp_path / "large.pth")
    status, _, err = call("export.py", "--out", "none.pth", "--checkpoint", "large.pth")
    assert status == 2 and "classifier.weight has values beyond half precision" in err
    assert not (tmp_path / "none.pth").exists()


def test_torch_hub_gives_the_shipped_network():
    images = torch.ones(1, 3, 20, 30)
    assert torch.hub.load(REPO, "unet", source="local", num_classes=5, width=4)(images).shape == (1, 5, 20, 30)
    with torch.inference_mode():
        shipped = torch.hub.load(REPO, "unet", source="local", pretrained=True)
        torch.testing.assert_close(shipped(images), load_model(SHIPPED)[0](images))


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_torch_hub_beside_modules_of_the_same_names(tmp_path, first):
    """Such as Hugging Face's ``datasets`` and a ``model.py`` of the user's own, imported before or after."""
    (tmp_path / "datasets" / "classes").mkdir(parents=True)
    for path in ("datasets/__init__.py", "datasets/classes/__init__.py", "datasets/later.py", "model.py"):
        (tmp_path / path).write_text("mine = True")
    theirs = "import model, datasets.classes\n"
    ours = f"import torch\nnet = torch.hub.load({str(REPO)!r}, 'unet', source='local', pretrained=True)\n"
    code = (theirs + "before = model, datasets, datasets.classes\n" + ours if first == "theirs" else ours + theirs) + (
        "import datasets.later, sys\nassert model.mine and datasets.mine and datasets.classes.mine\n"
        "assert 'before' not in dir() or before == (model, datasets, sys.modules['datasets.classes'])\n"
        f"assert net(torch.ones(1, 3, 20, 30)).shape == (1, 12, 20, 30) and {str(REPO)!r} not in sys.path")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_masks_of_the_shipped_network_equal_those_of_the_plain_loop(tmp_path, call):
    import references
    images = tmp_path / "images"
    images.mkdir()
    for i, size in enumerate([(160, 120), (160, 120), (160, 120), (90, 131), (33, 20)]):
        generate_scene(i, *size)[0].save(images / f"{i}.png")
    status, out, _ = call("predict.py", "--image_dir", images, "--save_dir", "ours", "--amp", "off")
    assert status == 0 and "camvid_unet.pth on 5 images" in out
    references.predict(SHIPPED, images, tmp_path / "plain", "cpu")
    for path in (tmp_path / "plain").iterdir():
        ours, plain = (np.array(opened(p).convert("RGB")) for p in (tmp_path / "ours" / path.name, path))
        assert (ours != plain).any(-1).mean() < 1e-3, "but for pixels where two classes are equal to six digits"
    assert len(list((tmp_path / "plain").glob("[!.]*"))) == len(list((tmp_path / "ours").glob("[!.]*"))) == 10


def test_the_benchmark_prints_its_table_and_writes_its_rows(scenes, tmp_path, monkeypatch, capsys):
    import bench
    import references
    for path in (scenes / "train_labels").iterdir():
        rgb = np.array(opened(path))
        assert (references.mask_to_ids(rgb) == compare_per_class(rgb, PALETTE)).all()
    monkeypatch.chdir(tmp_path)
    flags = ["masks", "items", "start", "--runs", "1", "--data_root", str(scenes)]
    bench.main(bench.get_args_parser().parse_args(flags))
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["stage"] for row in rows] == [line.split(" | ")[0][2:] for line in
                                              capsys.readouterr().out.splitlines()[4:]]
    assert len(rows) == 4 and all(row["ours"] > 0 for row in rows)
    assert [row["ratio"] for row in rows] == [row["reference"] and row["reference"] / row["ours"] for row in rows]
