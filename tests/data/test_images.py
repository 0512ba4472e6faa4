from __future__ import annotations

import io
import os
import random
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import truenorm
from photographs import KINDS, STORED, in_mode, photographs, save
from truenorm import InputError
from truenorm.data.readers.pictures import read_pictures
from truenorm.data.reading import Reading
from truenorm.data.sources import load_for_prediction

CORNERED = np.zeros((32, 48, 3), np.uint8)  # no turn or mirroring leaves it as it is
CORNERED[:10, :20, 0] = 255
CORNERED[20:, 30:, 1] = 255


def noise(seed, height=40, width=50):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def folder_of(folder, count=6, classes=("cat", "dog"), height=40, width=50):
    """A folder of images of one size."""
    for k, label in enumerate(classes):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(noise(10 * k + i, height, width)).save(folder / label / f"{i}.png")
    return folder


def read(folder, **fields):
    """Every image by its name, and the notes."""
    splits = truenorm.load(str(folder), **fields)
    parts = [p for p in (splits.train, splits.valid, splits.test) if p is not None]
    return {p.name_of(i): p.x[i] for p in parts for i in range(len(p))}, splits.notes


# Upright, in any mode -------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".jpg", ".png", ".tif", ".webp"])
def test_a_photograph_is_read_upright_by_each_of_the_eight_exif_orientations(tmp_path, ending):
    for orientation in STORED:
        for label in ("cat", "dog"):
            (tmp_path / label).mkdir(exist_ok=True)
            path = tmp_path / label / f"{orientation}{ending}"
            lossy = {"quality": 100, "subsampling": 0} if ending == ".jpg" else {}
            save(Image.fromarray(CORNERED), path, orientation, **lossy)
    found, notes = read(tmp_path)
    assert len(found) == 16
    assert notes == ()  # all are of one size, as they are looked at
    for name, x in found.items():
        difference = np.abs(x.permute(1, 2, 0).numpy().astype(int) - CORNERED)
        assert difference.max() <= (12 if ending == ".jpg" else 0), name


def test_exif_that_does_not_parse_leaves_the_pixels(tmp_path):
    folder_of(tmp_path)
    Image.fromarray(noise(1)).save(tmp_path / "cat" / "1.png", exif=b"Exif\0\0MM\0*\0\0\0\xff\1")
    found, _ = read(tmp_path)
    assert np.array_equal(found["cat/1.png"].permute(1, 2, 0), noise(1))


@pytest.mark.parametrize(("mode", "ending"), KINDS, ids=["".join(k) for k in KINDS])
def test_every_mode_becomes_bytes_as_pillow_converts_it(tmp_path, mode, ending):
    path = tmp_path / f"a{ending}"
    stored = in_mode(noise(0), mode)
    save(stored, path)
    x, kept, notes = read_pictures([path], tmp_path, None, Reading())
    grey = mode in ("1", "L", "LA", "I;16")
    if mode == "I;16":
        expected = np.asarray(Image.fromarray(noise(0)).convert("L"))
        assert "16 bits is scaled to 8" in notes[0]
    else:
        with Image.open(path) as image:
            expected = np.asarray(image.convert("RGBA").convert("L" if grey else "RGB"))
    assert kept == [0]
    assert x.dtype == np.uint8
    assert np.array_equal(x[0] if grey else x[0].transpose(1, 2, 0), expected)
    as_grey = read_pictures([path], None, (1, 40, 50), Reading()).x
    as_colour = read_pictures([path], None, (3, 40, 50), Reading()).x
    assert (as_grey.shape, as_colour.shape) == ((1, 40, 50), (1, 3, 40, 50))


def test_of_an_animation_the_first_picture_is_read_and_that_is_told(tmp_path):
    folder_of(tmp_path)
    first = Image.new("P", (50, 40), 0)
    first.putpalette([200, 10, 20] + [0] * 765)
    more = [Image.new("P", (50, 40), k) for k in (1, 2)]
    first.save(tmp_path / "cat" / "a.gif", save_all=True, append_images=more)
    pages = [Image.new("RGB", (50, 40), (k, k, k)) for k in (90, 10)]
    pages[0].save(tmp_path / "cat" / "b.tif", save_all=True, append_images=pages[1:])
    found, notes = read(tmp_path)
    assert found["cat/a.gif"][:, 0, 0].tolist() == [200, 10, 20]
    assert found["cat/b.tif"].unique().tolist() == [90]
    assert notes == (f"{tmp_path}: of 2 files with several pictures the first is read",)


# Sizes ----------------------------------------------------------------------------------------

OF_BEFORE = {  # fingerprints of the version before images had a size
    "L": "1998ad0c84720801dbc838e143d7dc80d749de4a4609b13baf0ae4956acc9233",
    "RGB": "e4c7618eb44e5730983c5f1db5f0edff5335958adff617e2663e760475024dc1",
    "RGBA": "3118da92da3a75fb9399a27e0ba2ee6900dabcd228fb45c268b840adcc114c6f",
}


def test_images_of_one_size_are_the_bytes_that_they_always_were(tmp_path):
    rng = np.random.default_rng(0)
    for mode, fingerprint in OF_BEFORE.items():
        for label in ("cat", "dog"):
            (tmp_path / mode / label).mkdir(parents=True)
            for i in range(6):
                image = Image.fromarray(rng.integers(0, 256, (7, 5, 3), np.uint8)).convert(mode)
                image.save(tmp_path / mode / label / f"{i}.png")
        splits = truenorm.load(str(tmp_path / mode))
        assert splits.input_shape == (1 if mode == "L" else 3, 7, 5)
        assert splits.fingerprint() == fingerprint
        assert splits.notes == ()


@pytest.mark.parametrize(
    ("sizes", "side"),
    [
        ([(100, 70), (70, 100), (90, 75)], 64),
        ([(33, 90), (31, 40), (95, 32)], 32),
        ([(31, 90), (20, 40), (95, 32)], 31),
        ([(5, 90), (6, 40), (7, 7)], 8),
        ([(900, 700), (600, 800), (10, 10)], 128),
    ],
)
def test_mixed_sizes_are_read_at_one_below_the_median_short_side(tmp_path, sizes, side):
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for path, size in zip(files, sizes, strict=True):
        Image.new("RGB", size).save(path)
    x, _, notes = read_pictures(files, tmp_path, None, Reading())
    assert x.shape == (3, 3, side, side)
    assert "3 images of 3 sizes, " in notes[0]
    assert f"are read at {side} x {side}: short side resized, centre cropped" in notes[0]
    assert read_pictures(files, tmp_path, None, Reading(image_size=20)).x.shape[2:] == (20, 20)


@pytest.mark.parametrize(("size", "shape"), [((512, 512), (512, 512)), ((600, 500), (128, 128))])
def test_images_of_one_large_size_are_made_smaller(tmp_path, size, shape):
    Image.new("L", size).save(tmp_path / "a.png")
    x, _, notes = read_pictures([tmp_path / "a.png"], tmp_path, None, Reading())
    assert x.shape[1:] == shape
    assert ("600 x 500 pixels" in str(notes)) == (shape != size)


@pytest.mark.parametrize(("width", "height"), [(300, 100), (100, 300)])
def test_the_short_side_is_resized_and_the_centre_kept(tmp_path, width, height):
    thirds = np.zeros((100, 300, 3), np.uint8)
    for k in range(3):
        thirds[:, 100 * k : 100 * k + 100, k] = 200
    thirds = thirds if width > height else thirds.transpose(1, 0, 2)
    Image.fromarray(thirds).save(tmp_path / "a.png")
    x = read_pictures([tmp_path / "a.png"], None, None, Reading(image_size=32)).x[0]
    inside = x[:, 2:-2, 2:-2].reshape(3, -1)
    assert np.unique(inside, axis=1).T.tolist() == [[0, 200, 0]]


@pytest.mark.parametrize("ending", [".jpg", ".png"])
def test_a_large_photograph_is_averaged_not_sampled(tmp_path, ending):
    """Stripes a pixel wide become their mean; so does each half of the image."""
    stripes = np.full((1600, 1200), 40, np.uint8)
    stripes[:800] += 80
    stripes[::2] += 40
    Image.fromarray(stripes).save(tmp_path / f"a{ending}", quality=95)
    x = read_pictures([tmp_path / f"a{ending}"], None, None, Reading(image_size=24)).x[0]
    assert np.abs(x[:10].astype(int) - 140).max() <= 2
    assert np.abs(x[14:].astype(int) - 60).max() <= 2


def test_a_part_of_other_sizes_takes_that_of_the_training_part(tmp_path):
    folder_of(tmp_path / "train", height=20, width=30)
    folder_of(tmp_path / "Test", count=3, height=45, width=35)
    Image.new("L", (80, 90)).save(tmp_path / "Test" / "cat" / "grey.png")
    splits = truenorm.load(str(tmp_path))
    assert splits.input_shape == splits.test.x.shape[1:] == (3, 20, 30)
    assert sorted(splits.test.ids)[:2] == ["Test/cat/0.png", "Test/cat/1.png"]
    assert all(name.startswith("train/") for name in splits.train.ids)


@pytest.mark.parametrize("size", [0, -1, 5000, 2.5, True])
def test_an_impossible_image_size_is_refused(tmp_path, size):
    with pytest.raises(InputError, match=r"image_size must be an integer from 1 to 4096"):
        truenorm.load(str(tmp_path), image_size=size)


# What cannot be read --------------------------------------------------------------------------


def spoilt(folder):
    """Eight files that cannot be read, each in a way of its own, in ``folder``."""
    whole = io.BytesIO()
    Image.fromarray(noise(3, 300, 400)).save(whole, "JPEG")
    (folder / "cut.jpg").write_bytes(whole.getvalue()[:9000])
    (folder / "empty.JPG").write_bytes(b"")
    Image.fromarray(np.zeros((40, 50), np.float32)).save(folder / "float.tif")
    Image.fromarray(np.full((40, 50), 100_000, np.int32)).save(folder / "int.tif")
    os.symlink("/nowhere/at/all.png", folder / "link.png")
    (folder / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "text.jpg").write_text("no image")
    Image.new("1", (8, 8)).save(folder / "vast.png")
    png = bytearray((folder / "vast.png").read_bytes())
    png[16:24] = struct.pack(">II", 20_000, 20_000)  # width and height, in the header
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    (folder / "vast.png").write_bytes(png)


REASONS = {
    "cut.jpg": "image file is truncated",
    "empty.JPG": "an empty file",
    "float.tif": "pixels of mode F do not fit in bytes; convert it to 8-bit grey or RGB",
    "int.tif": "pixels of 32 bits do not fit in bytes",
    "link.png": "a link to nothing",
    "phone.HEIC": "HEIC, which Pillow does not read; convert it to JPEG",
    "text.jpg": "no image, or of a kind that Pillow does not read",
    "vast.png": "more pixels than Pillow opens, against decompression bombs",
}


def test_all_unreadable_files_are_told_in_one_message(tmp_path):
    spoilt(folder_of(tmp_path) / "dog")
    with pytest.raises(InputError) as refused:
        truenorm.load(str(tmp_path))
    text = str(refused.value)
    assert text.startswith(f"{tmp_path}: 8 of 20 images cannot be read: dog/cut.jpg (image file")
    assert [f"dog/{name} (" in text for name in REASONS] == [True] * 5 + [False] * 3
    assert text.endswith("; and 3 more. Mend or remove them, or leave them out with "
                         "--skip-unreadable.")  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_an_unreadable_file_is_named_with_the_reason(tmp_path, name):
    folder_of(tmp_path / "images")
    spoilt(tmp_path)
    shutil.move(tmp_path / name, tmp_path / "images" / "dog" / name)
    with pytest.raises(InputError) as refused:
        truenorm.load(str(tmp_path / "images"))
    assert f"dog/{name}: is no readable image ({REASONS[name]}" in str(refused.value)
    found, notes = read(tmp_path / "images", skip_unreadable=True)
    assert len(found) == 12
    assert len(notes) == 1
    assert f"1 of 13 images cannot be read and is left out: dog/{name} ({REASONS[name]}" in notes[0]


def test_what_is_left_out_decides_neither_size_nor_colour(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for i in range(6):
            Image.fromarray(noise(i)[..., 0]).save(tmp_path / label / f"{i}.png")
    spoilt(tmp_path / "dog")  # among them a truncated photograph in colour, of another size
    found, notes = read(tmp_path, skip_unreadable=True)
    assert {tuple(x.shape) for x in found.values()} == {(1, 40, 50)}
    assert len(notes) == 1


def test_a_file_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    folder_of(tmp_path)
    opened = Image.open

    def guarded(path, *more):
        if Path(path).name == "3.png":
            raise PermissionError(13, "Permission denied")
        return opened(path, *more)

    monkeypatch.setattr(Image, "open", guarded)
    with pytest.raises(InputError, match=r"2 of 12 .*cat/3\.png \(Permission denied\); dog/3\.png"):
        truenorm.load(str(tmp_path))


def test_a_large_photograph_is_read_without_pillows_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 50 - 1)  # some phones take 108 megapixels
    assert len(read(folder_of(tmp_path))[0]) == 12


@pytest.mark.parametrize("skip", [False, True])
def test_a_class_of_which_nothing_can_be_read_is_refused(tmp_path, skip):
    folder_of(tmp_path, classes=("bad", "cat", "dog"))
    for path in (tmp_path / "bad").iterdir():
        path.write_bytes(b"x")
    text = r"bad: none of its images can be read" if skip else "6 of 18 images cannot be read"
    with pytest.raises(InputError, match=text):
        truenorm.load(str(tmp_path), skip_unreadable=skip)


@pytest.mark.parametrize("skip", [False, True])
def test_a_folder_of_which_nothing_can_be_read_is_refused_with_the_reasons(tmp_path, skip):
    for path in folder_of(tmp_path, count=2).rglob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(InputError, match=r"4 of 4 images .*cat/0\.png \(no image.*\. Mend them\."):
        truenorm.load(str(tmp_path), skip_unreadable=skip)


FORMATS = ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM")


@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_file_of_any_format_is_read_or_left_out(tmp_path, format):
    rng, raw = random.Random(0), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    with_exif = {"exif": exif} if format in ("PNG", "JPEG", "TIFF", "WEBP") else {}
    Image.fromarray(noise(0, 30, 30)).save(raw, format, **with_exif)
    files = [tmp_path / f"{k}.{format.lower()}" for k in range(60)]
    for path in files:
        damaged = bytearray(raw.getvalue())
        for _ in range(rng.choice((1, 3, 10))):
            near = min(len(damaged), rng.choice((60, len(damaged))))  # most in the header
            damaged[rng.randrange(near)] = rng.randrange(256)
        path.write_bytes(damaged[: rng.choice((len(damaged), rng.randrange(len(damaged))))])
    files[0].write_bytes(raw.getvalue())
    x, kept, notes = read_pictures(files, None, (3, 8, 8), Reading(skip_unreadable=True))
    assert 0 in kept
    assert len(x) == len(kept) < 60
    assert f"{60 - len(kept)} of 60 images cannot be read and are left out" in notes[-1]


# Folders --------------------------------------------------------------------------------------


def test_hidden_files_and_folders_are_no_images_and_no_classes(tmp_path):
    folder_of(tmp_path)
    for hidden in (".cache", "cat/.ipynb_checkpoints", "__MACOSX/cat"):
        (tmp_path / hidden).mkdir(parents=True)
        name = "._0.png" if hidden.startswith("_") else "x.png"
        Image.new("L", (9, 9)).save(tmp_path / hidden / name)
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / "dog" / name).write_bytes(b"\0")
    found, notes = read(tmp_path)
    assert len(found) == 12
    assert notes == (f"{tmp_path}: folders without images are no classes: __MACOSX",)


def test_a_folder_named_like_an_image_is_a_folder(tmp_path):
    folder_of(tmp_path)
    (tmp_path / "cat" / "album.jpg").mkdir()
    shutil.move(tmp_path / "cat" / "0.png", tmp_path / "cat" / "album.jpg" / "0.PNG")
    found, _ = read(tmp_path)
    assert torch.equal(found["cat/album.jpg/0.PNG"], torch.from_numpy(noise(0)).permute(2, 0, 1))


def test_what_lies_beside_the_classes_is_told(tmp_path):
    folder_of(tmp_path / "train")
    Image.new("L", (9, 9)).save(tmp_path / "train" / "x.png")
    (tmp_path / "train" / "none").mkdir()
    (tmp_path / "train" / "cat" / "film.MP4").write_bytes(b"x")
    (tmp_path / "more").mkdir()
    found, notes = read(tmp_path)
    assert len(found) == 12
    assert notes == (
        f"{tmp_path}/train: images outside the class folders are left out, 1 in all: x.png",
        f"{tmp_path}/train: folders without images are no classes: none",
        f"{tmp_path}/train: files that are no images are left out, 1 in all: .mp4",
        f"{tmp_path}: folders that are no part are left out: more",
    )


def test_images_without_class_folders_are_refused_for_training(tmp_path):
    for i in range(3):
        Image.new("L", (9, 9)).save(tmp_path / f"{i}.png")
    with pytest.raises(
        InputError, match=r"holds 3 images, such as 0\.png, but no folder of images"
    ):
        truenorm.load(str(tmp_path))


def test_class_folders_one_level_too_deep_are_pointed_at(tmp_path):
    folder_of(tmp_path / "animals")
    with pytest.raises(InputError, match=rf"two classes .*cat, dog; give {tmp_path}/animals if"):
        truenorm.load(str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "option"),
    [({"image_size": 16}, "--image-size"), ({"skip_unreadable": True}, "--skip-unreadable")],
)
def test_options_of_image_files_are_refused_for_other_data(tmp_path, fields, option):
    (tmp_path / "t.csv").write_text("a,b\n" + "1,x\n2,y\n" * 20)
    np.savez(tmp_path / "a.npz", x=np.zeros((8, 4, 4)), y=np.arange(8) % 2)
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train-images-idx3-ubyte").write_bytes(b"")
    given = [tmp_path / name for name in ("t.csv", "a.npz", "mnist")]
    for source in (*map(str, given), "digits", (np.zeros((8, 4, 4)), np.arange(8) % 2)):
        with pytest.raises(InputError, match=f"has no meaning for .*; leave {option} out"):
            truenorm.load(source, **fields)


def test_one_image_is_refused_for_training(tmp_path):
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png: is one image; give a folder of images for each"):
        truenorm.load(str(tmp_path / "a.png"))


# For a trained model --------------------------------------------------------------------------


def for_model(source, shape, **fields):
    return load_for_prediction(
        source, features=None, preparation=None, target=None, label=None, image=shape,
        reading=Reading(**fields),
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 16, 24), (3, 24, 16)])
def test_files_of_any_kind_become_what_the_model_takes(tmp_path, shape):
    names = [str(tmp_path / name) for name in photographs(tmp_path, 24)]
    several, alone = for_model(names[::-1], shape), for_model(names[3], shape)
    folder = for_model(str(tmp_path), shape)
    assert several.x.shape == (24, *shape)
    assert several.labels is None
    assert several.ids.tolist() == names[::-1]
    assert alone.ids.tolist() == [names[3]]
    assert torch.equal(alone.x[0], several.x[-4])
    assert torch.equal(folder.x, several.x.flip(0))
    assert [str(tmp_path / name) for name in folder.ids] == names
    assert len(folder.labels) == 24


def test_a_folder_without_classes_is_read_for_a_model(tmp_path):
    for i in range(3):
        Image.fromarray(noise(i)).save(tmp_path / f"{i}.PNG")
    given = for_model(str(tmp_path), (3, 40, 50))
    assert given.ids.tolist() == ["0.PNG", "1.PNG", "2.PNG"]
    assert given.labels is None
    assert np.array_equal(given.x[2].permute(1, 2, 0), noise(2))


def test_files_that_no_model_of_images_can_take_are_refused(tmp_path):
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"x")
    (tmp_path / "c.txt").write_text("x")
    (tmp_path / "d.png").mkdir()
    a, b, c, d, e = (str(tmp_path / n) for n in ("a.png", "b.png", "c.txt", "d.png", "e.png"))
    for source, shape, text in (
        (a, None, "is an image; the model takes none"),
        ([a, b], (1, 9, 9), r"b\.png: is no readable image \(no image"),
        ([a, c], (1, 9, 9), "of several files each must be an image"),
        ([a, d], (1, 9, 9), "of several files each must be an image"),
        ([a, e], (1, 9, 9), "is not there"),
        (b, (1, 9, 9), r"b\.png: is no readable image \(no image.*\); mend it\."),
    ):
        with pytest.raises(InputError, match=text):
            for_model(source, shape)
    left = for_model([b, a], (1, 9, 9), skip_unreadable=True)
    assert left.ids.tolist() == [a]
