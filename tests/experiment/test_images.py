"""A directory of images, a subdirectory for each class, is trained on as torchvision reads it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import everystep
from everystep.experiment import data, images

NAMES = ["cat/b.png", "cat/a.jpg", "cat/more/0.bmp", "dog/x.WEBP", "dog/y.png", "owl/1.png", "owl/2.png"]
ORDER = ["cat/a.jpg", "cat/b.png", "cat/more/0.bmp", *NAMES[3:]]


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("EVERYSTEP_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for name in NAMES:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(path)
    (tmp_path / "images/cat/notes.txt").write_text("not an image")
    return tmp_path / "images"


def trained(run, layers=("Flatten()", "LazyLinear(3)"), loss="CrossEntropyLoss", **source):
    experiment = {
        "steps": 4,
        "batch_size": 2,
        "data": {"source": "images", "path": "images"} | source,
        "model": {"layers": list(layers)},
        "loss": {"name": loss},
        "optimizer": {"name": "AdamW"},
    }
    return everystep.train_experiment(experiment, run=run, progress=False)


def tensors(folder, mode="RGB", size=None):
    """Return the images as `ImageFolder` with `Resize` and `ToTensor` does."""
    found = [Image.open(folder / name).convert(mode) for name in ORDER]
    found = [each.resize(size, Image.Resampling.BILINEAR) if size else each for each in found]
    arrays = [np.asarray(each).reshape(each.height, each.width, -1) for each in found]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float().div(255)


@pytest.mark.parametrize("is_large", [False, True])
def test_images_are_read_as_torchvision_reads_them(folder, is_large, monkeypatch):
    monkeypatch.setattr(data, "IN_MEMORY", 0 if is_large else 10**9)
    run = trained("run")
    assert (run.directory / "data.safetensors").exists() != is_large
    assert run.facts.training.preparation["classes"] == ["cat", "dog", "owl"]
    opened, seen = everystep.open("run"), torch.zeros(7, dtype=torch.bool)
    for step in range(1, 4):
        rows, batch = [*opened.rows(step).numbers], opened[step].batch
        assert torch.equal(batch.x, tensors(folder)[rows])
        assert batch.y.tolist() == [[0, 0, 0, 1, 1, 2, 2][row] for row in rows]
        seen[rows] = True
    assert seen.sum() >= 6 and opened.verify().is_exact
    small = trained("small", size=[3, 4], grayscale=True)
    assert torch.equal(small[2].batch.x, tensors(folder, "L", (4, 3))[[*small.rows(2).numbers]])
    assert trained("scaled", scale="standard", validation=0.3).verify().is_exact


def test_images_are_decoded_once_and_again_only_if_one_has_changed(folder, monkeypatch):
    first = trained("first")
    with monkeypatch.context() as patch:
        patch.setattr(images, "_pixels", None)
        assert trained("second").losses.equals(first.losses)
    Image.new("RGB", (5, 6), "red").save(folder / "owl/2.png")
    assert not trained("third").losses.equals(first.losses)
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    trained("large")
    (folder / "owl/2.png").rename(folder / "owl/3.png")
    with pytest.raises(everystep.EverystepError, match="images has changed since the run was trained"):
        everystep.open("large")[1]


def test_all_faults_of_images_are_reported_at_once(folder, monkeypatch):
    (folder / "cat/b.png").write_bytes(b"no image")
    Image.new("I;16", (5, 6), 40_000).save(folder / "dog/x.png")
    Image.new("RGB", (9, 9)).save(folder / "dog/y.png")
    (folder / "owl/1.png").write_bytes((folder / "owl/1.png").read_bytes()[:-60])
    with pytest.raises(everystep.DataError) as caught:
        trained("run")
    found = [str(each) for each in caught.value.faults]
    assert found[0] == "cat/b.png: cannot be read: it is not an image, or of another format"
    assert found[1].startswith("dog/x.png: cannot be read: its pixels have more than 8 bits; save it")
    assert found[2] == (
        "dog/y.png: has 9 x 9 pixels, but cat/a.jpg has 6 x 5; set data.size = [height, width]"
    )
    assert found[3].startswith("owl/1.png: cannot be read: ") and len(found) == 4
    with pytest.raises(everystep.DataError, match="images have classes; use a classification loss"):
        trained("run", loss="MSELoss")
    (folder / "ant").mkdir()
    with pytest.raises(everystep.DataError, match="ant: has no images"):
        trained("run")
    with pytest.raises(everystep.DataError, match="with a subdirectory for each class"):
        trained("run", path="nowhere")
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    with pytest.raises(everystep.DataError, match="needs Pillow, which is not installed: pip install"):
        trained("run")
    assert not Path("runs").exists()
