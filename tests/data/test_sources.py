from __future__ import annotations

import gzip
import hashlib
import importlib.resources
import struct

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import truenorm
from samples import blobs
from truenorm import InputError
from truenorm.data import sources
from truenorm.data.readers.idx import read_idx
from truenorm.data.readers.tables import Asked
from truenorm.data.reading import Reading


def write_idx(path, array, code=8, compress=False):
    raw = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    raw += array.tobytes()
    path.write_bytes(gzip.compress(raw) if compress else raw)


def idx_folder(folder, compress=False, test=True, prefix=""):
    """A folder named as Fashion-MNIST and KMNIST name theirs."""
    rng = np.random.default_rng(0)
    ending = ".gz" if compress else ""
    for part, count in (("train", 40), ("t10k", 10))[: 2 if test else 1]:
        images = rng.integers(0, 256, (count, 6, 5), np.uint8)
        labels = (np.arange(count) % 4).astype(np.uint8)
        write_idx(folder / f"{prefix}{part}-images-idx3-ubyte{ending}", images, 8, compress)
        write_idx(folder / f"{prefix}{part}-labels-idx1-ubyte{ending}", labels, 8, compress)
    return folder


@pytest.fixture(scope="module")
def mnist():
    return truenorm.load("mnist")


def test_mnist_has_its_published_counts_and_pixels(mnist):
    whole = torch.cat([mnist.train.y, mnist.valid.y])
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert torch.bincount(whole).tolist() == counts
    test_counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert torch.bincount(mnist.test.y).tolist() == test_counts
    pixels = torch.cat([mnist.train.x, mnist.valid.x]).double() / 255
    assert pixels.mean().item() == pytest.approx(0.13066, abs=5e-6)
    assert pixels.std().item() == pytest.approx(0.30811, abs=5e-6)


def test_mnist_is_cut_80_to_20_and_its_test_set_held_out(mnist):
    assert [len(p) for p in (mnist.train, mnist.valid, mnist.test)] == [48000, 12000, 10000]
    assert mnist.train.x.dtype == torch.uint8
    assert mnist.input_shape == (1, 28, 28)


def test_the_shipped_files_have_their_published_checksums():
    folder = importlib.resources.files("truenorm") / "mnist"
    lines = (folder / "SHA256SUMS").read_text().split("\n")
    sums = dict(reversed(line.split()) for line in lines if line)
    assert len(sums) == 4
    for name, expected in sums.items():
        raw = gzip.decompress((folder / f"{name}.gz").read_bytes())
        assert hashlib.sha256(raw).hexdigest() == expected
    assert "CC BY-SA 3.0" in (folder / "NOTICE.md").read_text()


@pytest.mark.parametrize(
    ("name", "count", "shape", "classes"),
    [
        ("digits", 1797, (1, 8, 8), 10),
        ("breast_cancer", 569, (30,), 2),
        ("wine", 178, (13,), 3),
        ("iris", 150, (4,), 3),
    ],
)
def test_scikit_learns_own_sets_are_embedded(name, count, shape, classes):
    splits = truenorm.load(name)
    assert sum(len(p) for p in (splits.train, splits.valid, splits.test)) == count
    assert splits.input_shape == shape
    assert len(splits.classes) == classes


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("prefix", ["", "emnist-letters-"])
def test_a_folder_of_idx_files_is_read(tmp_path, compress, prefix):
    splits = truenorm.load(str(idx_folder(tmp_path, compress, prefix=prefix)))
    assert len(splits.train) + len(splits.valid) == 40
    assert len(splits.test) == 10
    assert splits.input_shape == (1, 6, 5)


def test_emnist_calls_its_test_part_test(tmp_path):
    idx_folder(tmp_path)
    for path in list(tmp_path.iterdir()):
        path.rename(tmp_path / path.name.replace("t10k", "test"))
    assert len(truenorm.load(str(tmp_path)).test) == 10


def test_an_idx_folder_without_a_test_part_is_cut_in_three(tmp_path):
    splits = truenorm.load(str(idx_folder(tmp_path, test=False)))
    assert [len(p) for p in (splits.train, splits.valid, splits.test)] == [26, 6, 8]


@pytest.mark.parametrize(("code", "kind"), [(8, "u1"), (9, "i1"), (11, ">i2"), (13, ">f4")])
def test_idx_files_of_every_type_are_read(tmp_path, code, kind):
    array = np.arange(12).reshape(3, 4).astype(kind)
    write_idx(tmp_path / "a-idx2", array, code)
    assert read_idx(tmp_path / "a-idx2").tolist() == array.tolist()


def damaged(tmp_path, change):
    folder = idx_folder(tmp_path)
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(change(path.read_bytes()))
    return folder


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda raw: raw[:-7], r"promises shape \(40, 6, 5\), so 1216 bytes, got 1209"),
        (lambda raw: raw + b"x", "so 1216 bytes, got 1217"),
        (lambda raw: b"\1" + raw[1:], "magic at byte 0 must be 00 00.*01 00 08 03"),
        (lambda raw: raw[:2] + b"\7" + raw[3:], "magic at byte 0"),
        (lambda raw: b"", "an empty file"),
        (lambda raw: raw[:9], "ends inside its header, at byte 9 of 16"),
        (lambda raw: gzip.compress(raw)[:-20], "gzip stream is cut short or damaged"),
    ],
)
def test_a_damaged_idx_file_is_refused_with_file_and_place(tmp_path, change, text):
    with pytest.raises(InputError, match=f"train-images-idx3-ubyte.*{text}"):
        truenorm.load(str(damaged(tmp_path, change)))


def test_a_file_named_gz_that_is_not_is_refused(tmp_path):
    idx_folder(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.rename(tmp_path / "train-images-idx3-ubyte.gz")
    with pytest.raises(InputError, match=r"named \.gz but is not gzip"):
        truenorm.load(str(tmp_path))


def test_missing_or_unequal_idx_labels_are_refused(tmp_path):
    idx_folder(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte"
    write_idx(labels, np.zeros(39, np.uint8))
    with pytest.raises(InputError, match=r"\(39,\) labels for \(40, 6, 5\) images"):
        truenorm.load(str(tmp_path))
    labels.unlink()
    with pytest.raises(InputError, match=r"expected a file like train-labels-idx1-ubyte"):
        truenorm.load(str(tmp_path))


def test_two_idx_data_sets_in_one_folder_are_refused(tmp_path):
    idx_folder(tmp_path)
    idx_folder(tmp_path, prefix="emnist-")
    with pytest.raises(InputError, match="leave one data set"):
        truenorm.load(str(tmp_path))


def image_folder(folder, size=(5, 4), mode="L", per_class=6):
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for i in range(per_class):
            shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
            Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / label / f"{i}.png")
    return folder


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_a_folder_of_images_per_class_is_read(tmp_path, mode, channels):
    splits = truenorm.load(str(image_folder(tmp_path, mode=mode)))
    assert splits.input_shape == (channels, 4, 5)
    assert splits.classes == ("cat", "dog")
    assert splits.train.x.dtype == torch.uint8


def test_image_bytes_and_labels_survive_reading(tmp_path):
    image_folder(tmp_path)
    found = sources.read(str(tmp_path), Asked(None), Reading()).train
    first = np.asarray(Image.open(tmp_path / "dog" / "2.png"))
    assert np.array_equal(found.x[8], first)
    assert found.y[8] == "dog"


def test_train_and_test_folders_of_images_are_kept_apart(tmp_path):
    image_folder(tmp_path / "train", per_class=10)
    image_folder(tmp_path / "test", per_class=3)
    splits = truenorm.load(str(tmp_path))
    assert [len(p) for p in (splits.train, splits.valid, splits.test)] == [16, 4, 6]


def test_a_validation_folder_is_the_validation_part(tmp_path):
    for part, count in (("train", 10), ("val", 4), ("test", 3)):
        image_folder(tmp_path / part, per_class=count)
    splits = truenorm.load(str(tmp_path))
    assert [len(p) for p in (splits.train, splits.valid, splits.test)] == [20, 8, 6]
    (tmp_path / "test").rename(tmp_path / "other")
    splits = truenorm.load(str(tmp_path))
    assert [len(splits.train), len(splits.valid), splits.test] == [20, 8, None]


def test_sixteen_bit_images_are_scaled_not_clipped(tmp_path):
    image_folder(tmp_path)
    Image.fromarray(np.full((4, 5), 30_000, np.uint16)).save(tmp_path / "dog" / "3.png")
    splits = truenorm.load(str(tmp_path))
    assert "1 image of 16 bits is scaled to 8" in splits.notes[0]
    parts = (splits.train, splits.valid, splits.test)
    found = [p.x[list(p.ids).index("dog/3.png")] for p in parts if "dog/3.png" in p.ids]
    assert found[0].unique().tolist() == [round(30_000 * 255 / 65_535)]


def test_grey_and_colour_images_together_are_read_as_colour(tmp_path):
    image_folder(tmp_path)
    Image.new("RGB", (5, 4), (9, 8, 7)).save(tmp_path / "cat" / "0.png")
    assert truenorm.load(str(tmp_path)).input_shape == (3, 4, 5)


def test_images_of_mixed_sizes_are_read_at_one_that_is_told(tmp_path):
    image_folder(tmp_path, size=(70, 40))
    Image.new("L", (90, 40)).save(tmp_path / "dog" / "3.png")
    splits = truenorm.load(str(tmp_path))
    assert splits.input_shape == (1, 32, 32)
    assert "12 images of 2 sizes, 70 x 40 to 90 x 40 pixels, are read at 32 x 32" in splits.notes[0]
    assert truenorm.load(str(tmp_path), image_size=20).input_shape == (1, 20, 20)


def test_a_broken_image_is_refused_by_name(tmp_path):
    image_folder(tmp_path)
    whole = (tmp_path / "dog" / "3.png").read_bytes()
    (tmp_path / "dog" / "3.png").write_bytes(whole[:40])
    with pytest.raises(InputError, match=r"dog/3\.png: is no readable image"):
        truenorm.load(str(tmp_path))


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="no images found; expected one folder per class"):
        truenorm.load(str(tmp_path))


def test_a_folder_with_one_class_is_refused(tmp_path):
    image_folder(tmp_path)
    for path in (tmp_path / "dog").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="at least two classes"):
        truenorm.load(str(tmp_path))


@pytest.mark.parametrize("keys", [("x", "y"), ("X", "y"), ("data", "target")])
def test_an_npz_file_is_read(tmp_path, keys):
    x, y = blobs(40)
    np.savez(tmp_path / "a.npz", **dict(zip(keys, (x, y), strict=True)))
    assert truenorm.load(str(tmp_path / "a.npz")).input_shape == (6,)


def test_an_npz_file_may_bring_its_own_test_part(tmp_path):
    x, y = blobs(40)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
    assert len(truenorm.load(str(tmp_path / "a.npz")).test) == 9
    np.savez(tmp_path / "b.npz", x_train=x, y_train=y, x_val=x[:7], y_val=y[:7, None])
    splits = truenorm.load(str(tmp_path / "b.npz"))
    assert [len(splits.train), len(splits.valid), splits.test] == [40, 7, None]


def test_an_npz_file_with_other_names_or_objects_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", foo=np.zeros(3))
    with pytest.raises(InputError, match=r"got foo \(3,\)"):
        truenorm.load(str(tmp_path / "a.npz"))
    np.savez(tmp_path / "b.npz", x=np.array([{}]), y=np.zeros(1))
    with pytest.raises(InputError, match=r"'x' holds Python objects, .* y\.astype\(str\)"):
        truenorm.load(str(tmp_path / "b.npz"))
    (tmp_path / "c.npz").write_bytes(b"PK nonsense")
    with pytest.raises(InputError, match=r"no readable \.npz"):
        truenorm.load(str(tmp_path / "c.npz"))


def table(count=40):
    x, y = blobs(count, features=2)
    return pyarrow.table({"a": x[:, 0], "kind": [f"k{v}" for v in y], "b": x[:, 1]})


def write_table(path, content):
    if path.suffix == ".csv":
        pyarrow.csv.write_csv(content, path)
    else:
        pyarrow.parquet.write_table(content, path)
    return str(path)


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_table_is_read_with_its_label_column(tmp_path, ending):
    path = write_table(tmp_path / f"t{ending}", table())
    splits = truenorm.load(path, target="kind")
    assert splits.classes == ("k0", "k1", "k2")
    assert splits.train.features == ("a", "b")
    rows = torch.cat([splits.train.x, splits.valid.x, splits.test.x])
    expected = np.sort(np.asarray(table()["a"]))
    np.testing.assert_allclose(np.sort(rows[:, 0].numpy()), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("target", "text"),
    [(None, "Say --target NAME with one of a, kind, b"), ("c", "no column 'c' .* a, kind, b")],
)
def test_a_table_without_its_label_column_is_refused(tmp_path, target, text):
    path = write_table(tmp_path / "t.csv", table())
    with pytest.raises(InputError, match=text):
        truenorm.load(path, target=target)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,k\n1,x\n,y\n3,x\n", r"row 1 \(counted from 0\), column 'a' is empty"),
        ("a,k\n1,x\n2,\n3,x\n", r"row 1 .*column 'k': the label is missing"),
        ("a,k\n1,x\nnan,y\n3,x\n", r"row 1 .*column 'a' is"),
        ("a,k\n1,x\ninf,y\n3,x\n", r"row 1 .*column 'a' is inf"),
        ("a,k\n1,x\nfoo,y\n3,x\n", "no column is left .*: a holds numbers, but for .foo. in row 1"),
        ("a,k\n1,x\n2\n3,x\n", "does not parse"),
        ("a,a,k\n1,1,x\n2,2,y\n", "two columns named 'a'"),
        ("k\nx\ny\n", "no column beside the label"),
        ("", "is empty; a table needs a line of column names"),
        ("a,k\n", r"column names \(a, k\) and no rows"),
    ],
)
def test_a_bad_csv_is_refused_with_row_and_column(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        truenorm.load(str(path), target="k", missing="refuse")


def test_a_missing_label_in_a_table_is_refused(tmp_path):
    content = pyarrow.table({"a": [1.0, 2.0, 3.0], "k": [1, None, 2]})
    path = write_table(tmp_path / "t.parquet", content)
    with pytest.raises(InputError, match=r"row 1 .*column 'k': the label is missing"):
        truenorm.load(path, target="k")


def test_a_source_that_is_not_there_is_refused_with_what_there_is():
    with pytest.raises(InputError, match=r"'cifar' is neither .* \(mnist, digits, breast_cancer"):
        truenorm.load("cifar")


def test_a_file_of_unknown_kind_is_refused(tmp_path):
    (tmp_path / "a.xyz").write_text("x")
    with pytest.raises(InputError, match=r"cannot tell what this is from '\.xyz'"):
        truenorm.load(str(tmp_path / "a.xyz"))


def test_arrays_and_tensors_load_alike():
    x, y = blobs(40)
    a = truenorm.load((x, y), seed=1)
    b = truenorm.load((torch.from_numpy(x), torch.from_numpy(y)), seed=1)
    assert a.fingerprint() == b.fingerprint()
