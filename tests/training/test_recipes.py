"""The training recipes, on small files of the formats that the data sets have on disk."""

import csv
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import blocksparse_compiler as bsc
from examples import train as recipes
from examples.datasets import DATASETS, IGNORE, DataError
from examples.paper_networks import NETWORKS, VGG11, vgg

Image = pytest.importorskip("PIL.Image")


def write_cifar(root, classes, binary):
    """32 images a batch, in which the brightest colour tells the class."""
    rng = np.random.default_rng(0)
    name = f"cifar-{classes}-" + (
        ("batches-bin" if binary else "batches-py") if classes == 10 else ("binary" if binary else "python")
    )
    (root / name).mkdir()
    files = ["data_batch_1", "data_batch_2", "test_batch"] if classes == 10 else ["train", "test"]
    for file in files:
        labels = rng.integers(0, 3, 32)
        images = rng.integers(0, 100, (32, 3, 32, 32), dtype=np.uint8)
        images[np.arange(32), labels] += 100
        rows = images.reshape(32, 3072)
        if binary:
            head = [labels[:, None]] if classes == 10 else [labels[:, None] * 0, labels[:, None]]
            np.concatenate([*(h.astype(np.uint8) for h in head), rows], 1).tofile(root / name / f"{file}.bin")
        else:
            key = b"labels" if classes == 10 else b"fine_labels"
            batch = {b"data": rows, key: labels.tolist(), b"batch_label": b"small"}
            (root / name / file).write_bytes(pickle.dumps(batch, protocol=2))


def write_imagenet(root):
    rng = np.random.default_rng(0)
    for split, n in (("train", 4), ("val", 2)):
        for wnid in ("n01440764", "n01443537"):
            folder = root / split / wnid
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 255, (40 + i, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{wnid}_{i}.JPEG")


def write_cityscapes(root):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("leftImg8bit", "gtFine"):
            (root / kind / split / "ulm").mkdir(parents=True)
        for i in range(2):
            stem = f"ulm_{i:06d}_000019"
            image = Image.fromarray(rng.integers(0, 255, (32, 64, 3), dtype=np.uint8))
            image.save(root / "leftImg8bit" / split / "ulm" / f"{stem}_leftImg8bit.png")
            ids = Image.fromarray(rng.choice([0, 7, 26, 33], (32, 64)).astype(np.uint8))
            ids.save(root / "gtFine" / split / "ulm" / f"{stem}_gtFine_labelIds.png")


# ---- loaders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [10, 100])
def test_both_versions_of_cifar_are_the_same(classes, tmp_path):
    data = []
    for binary in (False, True):
        root = tmp_path / str(binary)
        root.mkdir()
        write_cifar(root, classes, binary)
        data.append(DATASETS[f"cifar{classes}"](root))
    pickled, binary = data
    assert (len(pickled.train), len(pickled.test)) == ((64, 32) if classes == 10 else (32, 32))
    assert pickled.classes == classes
    assert torch.equal(pickled.train.images, binary.train.images)
    assert torch.equal(pickled.train.labels, binary.train.labels)
    assert all(torch.equal(a, b) for a, b in zip(pickled.test.tensors, binary.test.tensors, strict=True))
    torch.testing.assert_close(pickled.train.images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    image, label = pickled.train[3]
    assert image.shape == (3, 32, 32)
    assert label == pickled.train.images[3].mean((1, 2)).argmax()


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Bad:
        def __reduce__(self):
            return print, ("owned",)

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": Bad()}))
    with pytest.raises(DataError, match="print, which is no array"):
        DATASETS["cifar10"](tmp_path)


def test_imagenet_crops(tmp_path):
    write_imagenet(tmp_path)
    data = DATASETS["imagenet"](tmp_path)
    assert (len(data.train), len(data.test), data.classes) == (8, 4, 2)
    assert [data.train[i][1] for i in range(8)] == [0] * 4 + [1] * 4
    for dataset in (data.train, data.test):
        image, _ = dataset[0]
        assert image.shape == (3, 224, 224)
        assert -3 < image.min() < image.max() < 3


def test_cityscapes_labels_become_training_ids(tmp_path):
    write_cityscapes(tmp_path)
    data = DATASETS["cityscapes"](tmp_path)
    image, label = data.test[0]
    assert image.shape == (3, 512, 1024)
    assert label.shape == (512, 1024)
    assert set(label.unique().tolist()) == {0, 13, 18, IGNORE}


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagenet", "cityscapes"])
def test_missing_files_are_named(name, tmp_path):
    with pytest.raises(DataError, match=r"^no .* in "):
        DATASETS[name](tmp_path)


def test_broken_files_are_named(tmp_path):
    write_cifar(tmp_path, 10, True)
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_1.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"data_batch_1\.bin is not a whole number of records"):
        DATASETS["cifar10"](tmp_path)


# ---- training -------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(NETWORKS, "tiny", lambda classes: vgg((16, 0, 16, 0), classes))


@pytest.mark.parametrize(
    "how", [{"density": 0.5}, {"gamma": 0.5}, {"density": 0.5, "budget": "macs"}, {}], ids=str
)
def test_a_resumed_training_is_the_same(how, tiny, tmp_path):
    write_cifar(tmp_path, 10, True)
    data = DATASETS["cifar10"](tmp_path)
    recipe = recipes.Recipe("tiny", 4, 16, 0.05, block=8, **how)
    device = torch.device("cpu")
    straight = recipes.train(recipe, data, tmp_path / "a", device)
    recipes.train(recipe, data, tmp_path / "b", device, stop=2)
    resumed = recipes.train(recipe, data, tmp_path / "b", device, resume=True)
    for key, tensor in straight.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[key]), key
    rows = [list(csv.DictReader((tmp_path / x / "log.csv").open())) for x in "ab"]
    assert rows[0] == rows[1]
    assert [row["epoch"] for row in rows[0]] == ["1", "2", "3", "4"]
    if "density" in how:  # a block is a quarter of the large layer
        assert 0.24 < float(rows[0][-1]["density"]) <= 0.5


def test_from_the_command_line_to_the_folded_model(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    from typer import Typer
    from typer.testing import CliRunner

    write_cifar(tmp_path, 100, False)
    app, out = Typer(), tmp_path / "out"
    app.command()(recipes.main)
    words = f"cifar100 --data {tmp_path} --network tiny --epochs 2 --batch 16 --density 0.5 --amp --out {out}"
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 0, result.output
    assert "accuracy" in result.output
    assert "8x8" in result.output
    written = {path.name for path in out.iterdir()}
    assert {"checkpoint.pt", "folded.pt", "log.csv", "report.json", "blocks.png"} <= written
    model = bsc.load_folded(NETWORKS["tiny"](100), torch.load(out / "folded.pt", weights_only=True))
    rows = [row for row in bsc.sparsity_report(model).rows if row.block_shape]
    assert sum(row.kept_tiles * 64 for row in rows) > 0
    assert all(row.block_shape == (8, 8) for row in rows)


def test_a_log_goes_to_tensorboard_where_it_is_installed(tiny, tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            written.append((Path(self.folder).name, name, value, step))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    write_cifar(tmp_path, 10, True)
    recipe = recipes.Recipe("tiny", 2, 16, 0.05, block=8, density=0.5)
    recipes.train(recipe, DATASETS["cifar10"](tmp_path), tmp_path / "out", torch.device("cpu"))
    rows = list(csv.DictReader((tmp_path / "out" / "log.csv").open()))
    losses = [(folder, float(row["loss"])) for folder, row in zip(["tensorboard"] * 2, rows, strict=True)]
    assert [(f, v) for f, name, v, _ in written if name == "loss"] == losses
    assert [step for _, name, _, step in written if name == "accuracy"] == [1, 2]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # not installed
    assert recipes.Log(tmp_path / "out", resume=True).board is None


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_under_torchrun(tmp_path):
    write_cifar(tmp_path, 10, True)
    out = tmp_path / "out"
    words = f"cifar10 --data {tmp_path} --network resnet20 --epochs 2 --batch 16 --density 0.5 --out {out}"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [*launch, "-m", "examples.train", *words.split()]
    root = Path(recipes.__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = list(csv.DictReader((out / "log.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]  # written by one of the two
    assert {"checkpoint.pt", "folded.pt", "report.json"} <= {path.name for path in out.iterdir()}
    resumed = subprocess.run(
        [*command, "--resume"], env=environment, cwd=root, capture_output=True, timeout=240
    )
    assert resumed.returncode == 0  # nothing is left to do but the report


def test_imagenet_and_cityscapes_train(tiny, tmp_path, monkeypatch):
    write_imagenet(tmp_path)
    recipe = recipes.Recipe("tiny", 1, 4, 0.01, block=8, density=0.5, amp=True)
    trainer = recipes.train(recipe, DATASETS["imagenet"](tmp_path), tmp_path / "a", torch.device("cpu"))
    assert trainer.sparsifier.density == 0.5
    from examples.datasets import cityscapes
    from examples.paper_networks import erfnet

    write_cityscapes(tmp_path)
    data = cityscapes(tmp_path, (32, 64))
    monkeypatch.setitem(NETWORKS, "erfnet", erfnet)
    recipe = recipes.Recipe("erfnet", 1, 2, 0.01, block=8, density=0.7)
    trainer = recipes.train(recipe, data, tmp_path / "b", torch.device("cpu"))
    row = next(csv.DictReader((tmp_path / "b" / "log.csv").open()))
    assert 0 <= float(row["mean_iou"]) <= float(row["accuracy"]) <= 1
    assert 0.69 < trainer.sparsifier.density <= 0.7


# ---- networks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "side", "classes", "parameters", "macs"),
    [  # as published: millions of parameters, billions of multiply-accumulates
        ("resnet18", 32, 10, 11.17, 0.555),
        ("resnet20", 32, 10, 0.27, 0.041),
        ("resnet50", 224, 1000, 25.56, 4.09),
        ("resnext50", 224, 1000, 25.03, 4.23),
        ("vgg16", 32, 10, 14.72, 0.313),
        ("mobilenet_v1", 224, 1000, 4.23, 0.569),
        ("mobilenet_v2", 224, 1000, 3.50, 0.301),
        ("erfnet", 64, 20, 2.06, None),
    ],
)
def test_networks_have_their_published_size(name, side, classes, parameters, macs):
    total = bsc.sparsity_report(NETWORKS[name](classes), torch.zeros(1, 3, side, side)).total
    assert round(total.parameters / 1e6, 2) == parameters
    if macs is not None:
        assert total.macs / 1e9 == pytest.approx(macs, abs=0.0051 if macs > 1 else 0.00051)


def test_vgg11_takes_every_mode_of_pruning():
    model = vgg(VGG11, 10)
    sparsifier = bsc.BlockSparsifier(model, (32, 32), target_density=0.25, importance="magnitude")
    sparsifier.step()
    assert len(sparsifier.layers) == 7
    assert sparsifier.density <= 0.25


def test_where_dbsrs_rows_land():
    """ResNet-50 A and B (17.89 M, 2.74 G and 13.36 M, 2.19 G) as a uniform density of all but the stem."""
    report = bsc.sparsity_report(NETWORKS["resnet50"](1000), torch.zeros(1, 3, 224, 224))
    rows = [row for row in report.rows if not row.name.startswith("stem")]
    weights = sum(row.dense_parameters for row in rows)
    macs = sum(row.dense_macs for row in rows)

    def densities(parameters, printed_macs):
        by_weights = 1 - (report.total.parameters - parameters) / weights
        return by_weights, 1 - (report.total.macs - printed_macs) / macs

    a, b = densities(17.89e6, 2.74e9), densities(13.36e6, 2.19e9)
    assert a == pytest.approx((0.699, 0.660), abs=0.002)
    assert b == pytest.approx((0.522, 0.522), abs=0.002)  # as even as if drawn so
