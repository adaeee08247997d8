from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from sinfkit.zoo import CIFAR100_SUPERCLASSES, load_cifar10, load_cifar100, load_image_folder

# The labels as the release's own files have them: fine ones in order, and the coarse one of each.
FINE = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup
dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid
otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray
road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
""".split()
COARSE = """
aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices
household_furniture insects large_carnivores large_man-made_outdoor_things
large_natural_outdoor_scenes large_omnivores_and_herbivores medium_mammals non-insect_invertebrates
people reptiles small_mammals trees vehicles_1 vehicles_2
""".split()
COARSE_OF_FINE = """
4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 12 14 16 9 11 5
5 19 8 8 15 13 14 17 18 10 16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 9 19 2 10 0 1 16 12 9 13
15 13 16 19 2 4 6 19 5 5 8 19 18 1 2 15 6 0 17 8 14 13
""".split()

TABLE = "wnid,name,cluster\nn02,tabby cat,pets\nn01,oak,plants\nn03,dog,pets\n"


def write_image(path: Path, side: int | tuple[int, int] = 8, seed: int = 0) -> np.ndarray:
    """A random image, without loss; returns its pixels as (3, height, width)."""
    width, height = (side, side) if isinstance(side, int) else side
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels.transpose(2, 0, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, wnid in enumerate(["n03", "n01", "n02"]):
        for image in (2, 1, 4, 3):
            write_image(tmp_path / "train" / wnid / f"{image}.png", seed=10 * index + image)
    (tmp_path / "classes.csv").write_text(TABLE)
    return tmp_path


def pickled(path: Path, content: dict) -> str:
    """Write a pickle as the CIFAR releases hold; return its MD5."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))
    return hashlib.md5(path.read_bytes()).hexdigest()


def small_cifar100(root: Path) -> type[CIFAR100]:
    """CIFAR-100's files with 200 and 100 random images, and torchvision's class for them."""
    rng = np.random.default_rng(0)
    folder = root / CIFAR100.base_folder
    sums = {}
    for part, n in (("train", 200), ("test", 100)):
        labels = rng.permutation(n) % 100
        content = {
            "data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
            "fine_labels": labels.tolist(),
            "coarse_labels": [int(COARSE_OF_FINE[label]) for label in labels],
            "filenames": [f"{i}.png" for i in range(n)],
            "batch_label": part,
        }
        sums[part] = pickled(folder / part, content)
    names = {"fine_label_names": FINE, "coarse_label_names": COARSE}
    checksum = pickled(folder / "meta", names)

    class Small(CIFAR100):
        train_list = [["train", sums["train"]]]
        test_list = [["test", sums["test"]]]
        meta = {"filename": "meta", "key": "fine_label_names", "md5": checksum}

    return Small


def small_cifar10(root: Path) -> type[CIFAR10]:
    """CIFAR-10's files, five for training, with 20 random images each."""
    rng = np.random.default_rng(0)
    folder = root / CIFAR10.base_folder
    sums = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        content = {
            "data": rng.integers(0, 256, (20, 3072), dtype=np.uint8),
            "labels": rng.integers(0, 10, 20).tolist(),
        }
        sums[name] = pickled(folder / name, content)
    labels = [f"class{i}" for i in range(10)]
    checksum = pickled(folder / "batches.meta", {"label_names": labels})

    class Small(CIFAR10):
        train_list = [[name, sums[name]] for name, _ in CIFAR10.train_list]
        test_list = [["test_batch", sums["test_batch"]]]
        meta = {"filename": "batches.meta", "key": "label_names", "md5": checksum}

    return Small


def test_superclasses_partition_a_hundred_classes():
    members = [name for names in CIFAR100_SUPERCLASSES.values() for name in names]
    assert len(CIFAR100_SUPERCLASSES) == 20
    assert all(len(names) == 5 for names in CIFAR100_SUPERCLASSES.values())
    assert len(set(members)) == 100


@pytest.mark.parametrize(("train", "n"), [(True, 200), (False, 100)])
def test_cifar100_gives_every_label_the_superclass_in_its_file(tmp_path, monkeypatch, train, n):
    source = small_cifar100(tmp_path)
    monkeypatch.setattr("torchvision.datasets.CIFAR100", source)
    data = load_cifar100(tmp_path, train)
    raw = pickle.loads(
        (tmp_path / source.base_folder / ("train" if train else "test")).read_bytes()
    )
    names = pickle.loads((tmp_path / source.base_folder / "meta").read_bytes())
    assert data.X.shape == (n, 3, 32, 32) and data.X.dtype == np.uint8
    assert data.X.flags.c_contiguous
    np.testing.assert_array_equal(data.X.reshape(n, -1), raw["data"])
    np.testing.assert_array_equal(data.y, raw["fine_labels"])
    assert data.y.dtype == np.int64 and len(data) == n
    assert data.class_names == tuple(names["fine_label_names"])
    coarse = [names["coarse_label_names"][label] for label in raw["coarse_labels"]]
    assert [data.clusters[label] for label in data.y.tolist()] == coarse
    assert "100 classes, 20 clusters" in repr(data)


def test_cifar10(tmp_path, monkeypatch):
    source = small_cifar10(tmp_path)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", source)
    data = load_cifar10(tmp_path)
    batches = [
        pickle.loads((tmp_path / source.base_folder / name).read_bytes())
        for name, _ in source.train_list
    ]
    np.testing.assert_array_equal(
        data.X.reshape(100, -1), np.concatenate([batch["data"] for batch in batches])
    )
    np.testing.assert_array_equal(data.y, np.concatenate([batch["labels"] for batch in batches]))
    assert data.clusters is None and data.class_names[3] == "class3"
    assert load_cifar10(tmp_path, train=False).X.shape == (20, 3, 32, 32)


@pytest.mark.parametrize("load", [load_cifar10, load_cifar100])
def test_missing_cifar_says_what_to_do(tmp_path, load):
    with pytest.raises(FileNotFoundError, match="download=True"):
        load(tmp_path)


def test_damaged_cifar(tmp_path, monkeypatch):
    source = small_cifar100(tmp_path)
    monkeypatch.setattr("torchvision.datasets.CIFAR100", source)
    path = tmp_path / source.base_folder / "train"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileNotFoundError, match="damaged"):
        load_cifar100(tmp_path)


def test_class_without_superclass(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR100", small_cifar10(tmp_path))
    with pytest.raises(ValueError, match="without a superclass: class0, .* and 5 more"):
        load_cifar100(tmp_path)


@pytest.mark.parametrize("n_jobs", [None, 2])
def test_folder_order_pixels_and_table(folder, n_jobs):
    data = load_image_folder(folder / "train", folder / "classes.csv", n_jobs=n_jobs)
    assert data.class_names == ("oak", "tabby cat", "dog")
    assert data.clusters == {0: "plants", 1: "pets", 2: "pets"}
    assert data.y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert [f"{p.parent.name}/{p.name}" for p in data.paths] == [
        f"{wnid}/{image}.png" for wnid in ("n01", "n02", "n03") for image in (1, 2, 3, 4)
    ]
    for image, path in zip(data.X, data.paths, strict=True):
        np.testing.assert_array_equal(image, np.asarray(Image.open(path)).transpose(2, 0, 1))
    assert repr(data) == "ImageDataset(12 images of shape (3, 8, 8), 3 classes, 2 clusters)"


def test_folder_without_table(folder):
    data = load_image_folder(str(folder / "train"))
    assert data.class_names == ("n01", "n02", "n03") and data.clusters is None


def test_folder_passes_over_what_is_no_image(folder):
    (folder / "train" / "n01" / "notes.txt").write_text("no image")
    (folder / "train" / "n01" / "._1.png").write_text("left behind by a system")
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / "readme.md").write_text("no class")
    data = load_image_folder(folder / "train", folder / "classes.csv")
    assert len(data) == 12 and len(data.class_names) == 3


def test_table_with_byte_order_mark_spaces_and_more_columns(folder):
    lines = TABLE.splitlines()
    lines = [f"extra,{lines[0]}", *(f"x, {line.replace(',', ' , ')}" for line in lines[1:])]
    (folder / "classes.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    data = load_image_folder(folder / "train", folder / "classes.csv")
    assert data.class_names == ("oak", "tabby cat", "dog")
    (folder / "classes.csv").write_text(TABLE, encoding="utf-8-sig")
    assert load_image_folder(folder / "train", folder / "classes.csv").clusters == data.clusters


def test_grey_transparent_and_palette_images_become_colour(tmp_path):
    (tmp_path / "a").mkdir()
    for mode in ("L", "RGBA", "P"):
        Image.new(mode, (4, 4)).save(tmp_path / "a" / f"{mode}.png")
    assert load_image_folder(tmp_path).X.shape == (3, 3, 4, 4)


@pytest.mark.parametrize("side", [(10, 6), (6, 10), (6, 6), (3, 3), (3, 100)])
def test_size_resizes_the_shorter_side_and_cuts_the_centre(tmp_path, side):
    write_image(tmp_path / "a" / "1.png", side)
    assert load_image_folder(tmp_path, size=6).X.shape == (1, 3, 6, 6)


def test_size_keeps_the_centre_of_the_image(tmp_path):
    pixels = write_image(tmp_path / "a" / "1.png", (10, 6))
    np.testing.assert_array_equal(load_image_folder(tmp_path, size=6).X[0], pixels[:, :, 2:8])


def test_images_of_two_sizes(tmp_path):
    write_image(tmp_path / "a" / "1.png", 8)
    write_image(tmp_path / "b" / "2.png", (9, 8))
    with pytest.raises(ValueError, match=r"2.png has 9 x 8 pixels, .*1.png has 8 x 8; give size="):
        load_image_folder(tmp_path)
    assert load_image_folder(tmp_path, size=8).X.shape == (2, 3, 8, 8)


@pytest.mark.parametrize("position", ["1.png", "9.png"])
@pytest.mark.parametrize("damage", ["text", "truncated", "empty"])
def test_unreadable_image_is_named(folder, position, damage):
    path = folder / "train" / "n01" / position
    write_image(path, 8)
    content = {"text": b"not an image", "truncated": path.read_bytes()[:-40], "empty": b""}[damage]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{position} cannot be read"):
        load_image_folder(folder / "train", n_jobs=2)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (TABLE + "n04,bird,pets\n", "without a folder in .*: n04"),
        (TABLE.replace("n03,dog,pets\n", ""), "without a row in .*: n03"),
        (TABLE + "n01,ash,plants\n", "line 5: n01 appears a second time"),
        (TABLE.replace("cluster", "group"), "lacks cluster"),
        (TABLE.replace("oak", " "), "line 3: .* is empty"),
        (TABLE.replace(",plants", ""), "line 3: .* is empty"),
        ("", "lacks wnid, name, cluster"),
    ],
)
def test_bad_table(folder, table, message):
    (folder / "classes.csv").write_text(table)
    with pytest.raises(ValueError, match=message):
        load_image_folder(folder / "train", folder / "classes.csv")


def test_missing_folder_table_classes_and_images(folder):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_image_folder(folder / "nowhere")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_image_folder(folder / "classes.csv")
    with pytest.raises(FileNotFoundError, match="class_table"):
        load_image_folder(folder / "train", folder / "nowhere.csv")
    with pytest.raises(ValueError, match="no sub-folders"):
        load_image_folder(folder / "train" / "n01")
    with pytest.raises(ValueError, match="size"):
        load_image_folder(folder / "train", size=0)
    (folder / "train" / "n00").mkdir()
    with pytest.raises(ValueError, match="n00 holds no images"):
        load_image_folder(folder / "train")
