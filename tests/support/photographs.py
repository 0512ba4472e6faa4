"""Folders of photographs as people have them: of any size, mode, orientation and format."""

from __future__ import annotations

import numpy as np
from PIL import ExifTags, Image

T = Image.Transpose
# How pixels are stored that each EXIF orientation turns upright (Exif 2.32, table 4.6.4 A).
STORED = {
    1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM,
    5: T.TRANSPOSE, 6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270,
}  # fmt: skip
# Mode and ending; what can carry an orientation does.
KINDS = (
    ("RGB", ".jpg"), ("RGB", ".JPG"), ("L", ".jpeg"), ("CMYK", ".jpg"), ("YCbCr", ".jfif"),
    ("RGB", ".png"), ("RGBA", ".PNG"), ("LA", ".png"), ("P", ".png"), ("1", ".png"),
    ("I;16", ".png"), ("RGB", ".webp"), ("RGBA", ".webp"), ("RGB", ".tif"), ("CMYK", ".tiff"),
    ("L", ".bmp"), ("P", ".gif"), ("RGB", ".Tiff"),
)  # fmt: skip
ORIENTED = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".tif", ".tiff")
CLASSES = ("at the left", "below", "oben")  # where it is bright, in the upright image


def photographs(folder, count=300, seed=0):
    """Write ``count`` photographs of three classes that only the upright image tells apart.

    Returns their paths below ``folder`` with width and height as they are looked at, in order.
    """
    rng = np.random.default_rng(seed)
    sizes = {}
    for i in range(count):
        label = CLASSES[i % 3]
        mode, ending = KINDS[i // 3 % len(KINDS)]
        width, height = (int(n) for n in rng.integers(40, 160, 2))
        path = folder / label / ("2023" if i % 7 else "") / f"IMG_{i:04}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        save(in_mode(_scene(label, width, height, rng), mode), path, orientation=1 + i % 8)
        sizes[path.relative_to(folder).as_posix()] = (width, height)
    (folder / CLASSES[0] / "._IMG_0000.jpg").write_bytes(b"\0\5\26\7")  # as macOS leaves them
    (folder / CLASSES[0] / ".DS_Store").write_bytes(b"\0")
    (folder / CLASSES[0] / "Thumbs.db").write_bytes(b"\0")
    return dict(sorted(sizes.items()))


def _scene(label, width, height, rng):
    """(H, W, 3) bytes: dark, but for the third that names the class."""
    scene = rng.uniform(20, 90, 3) * np.ones((height, width, 3))
    bright = rng.uniform(150, 240, 3)
    if label == "at the left":
        scene[:, : width // 3] = bright
    elif label == "below":
        scene[-(height // 3) :] = bright
    else:
        scene[: height // 3] = bright
    return (scene + rng.normal(0, 6, (height, width, 1))).clip(0, 255).astype(np.uint8)


def in_mode(scene, mode):
    """An image of (H, W, 3) bytes in one of Pillow's modes; where there is alpha, half is clear."""
    image = Image.fromarray(scene)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    image = image.convert(mode)
    if mode in ("LA", "RGBA"):
        alpha = np.full(scene.shape[:2], 255, np.uint8)
        alpha[:, ::2] = 0
        image.putalpha(Image.fromarray(alpha))
    if mode == "P":
        image.info["transparency"] = 3
    return image


def save(image, path, orientation=1, **options):
    """Write ``image`` so that it is upright by its EXIF orientation, where its format has one."""
    options = {"quality": 95, "compression": None, **options}
    if path.suffix.lower() == ".webp":
        options["lossless"] = True
    if path.suffix.lower() == ".gif":
        options |= {"save_all": True, "append_images": [Image.new("P", image.size)]}
    if path.suffix.lower() in ORIENTED:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        options["exif"] = exif
        if STORED[orientation] is not None:
            image = image.transpose(STORED[orientation])
    image.save(path, "JPEG" if path.suffix.lower() == ".jfif" else None, **options)
