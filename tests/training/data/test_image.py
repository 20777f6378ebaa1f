"""Pictures of every kind, against torchvision's transforms and known colours."""

from __future__ import annotations

import io
import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from tests.support.image_folders import encoded
from training.data.image import BrokenImageError, fit, open_image, upright_size


def noise(height, width, channels=3):
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels))
    return Image.fromarray(values.astype(np.uint8))


def turned(orientation=6):
    """EXIF that says so."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def reference(resize, crop):
    return transforms.Compose(
        [
            transforms.Resize(resize, interpolation=InterpolationMode.BILINEAR),
            transforms.CenterCrop(crop),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )


@pytest.mark.parametrize(
    "height, width",
    [(64, 64), (65, 64), (64, 67), (200, 130), (131, 200), (37, 41), (97, 31), (480, 640)],
)
def test_crops_are_torchvisions(height, width):
    image = noise(height, width)
    fitted = fit(image, (64, 64))
    assert torch.equal(fitted.pixels, reference(64, 64)(image))  # as the reference script has it
    assert fitted.pixels.dtype == torch.float32
    assert fitted.pixels.is_contiguous()
    for size in [(64, 128), (128, 64), (64, 96), (192, 128)]:
        scale = max(size[0] / height, size[1] / width)
        covering = int(height * scale + 1e-9), int(width * scale + 1e-9)
        fitted = fit(image, size)
        assert torch.equal(fitted.pixels, reference(covering, size)(image))
        slack = covering[0] - size[0], covering[1] - size[1]
        assert (fitted.top, fitted.left) == (round(slack[0] / 2), round(slack[1] / 2))
        assert 0 in slack


def test_all_sides_are_covered():
    for height in range(1, 80, 7):
        for width in range(1, 80, 5):
            if max(height, width) <= 32 * min(height, width):
                assert fit(noise(height, width), (24, 40)).pixels.shape == (3, 24, 40)


def palette_with_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    return encoded(image, transparency=1)


def deep(mode):
    values = np.array([[0, 32768, 65535]], dtype="<u2")
    if mode == "I;16B":
        return Image.frombytes("I;16B", (3, 1), values.astype(">u2").tobytes())
    return Image.fromarray(values).convert(mode)


def half(mode):
    image = Image.new("RGBA", (2, 1), "red")
    image.putpixel((1, 0), (255, 0, 0, 128))
    return image.convert(mode)


RED, WHITE = (255, 0, 0), (255, 255, 255)
PALER = [RED, (255, 127, 127)]
SHADES = [(0, 0, 0), (128, 128, 128), WHITE]


@pytest.mark.parametrize(
    "picture, expected",
    [
        (encoded(Image.new("RGB", (2, 1), "red")), [RED] * 2),
        (encoded(Image.new("L", (2, 1), 100)), [(100, 100, 100)] * 2),
        (encoded(Image.new("1", (2, 1), 1)), [WHITE] * 2),
        (encoded(half("RGBA")), PALER),
        (encoded(half("RGBA"), "WEBP", lossless=True), PALER),
        (half("RGBa"), PALER),
        (encoded(Image.new("LA", (1, 1), (0, 0))), [WHITE]),
        (encoded(Image.new("LA", (1, 1), (9, 255))), [(9, 9, 9)]),
        (palette_with_transparency(), [RED, WHITE]),
        (encoded(Image.new("RGB", (1, 1)), transparency=(0, 0, 0)), [WHITE]),
        (encoded(Image.new("L", (1, 1), 7), transparency=7), [WHITE]),
        (encoded(deep("I;16")), SHADES),
        (encoded(deep("I;16"), "TIFF"), SHADES),
        (deep("I;16B"), SHADES),
        (deep("I"), SHADES),
        (encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF"), [RED]),
        (Image.new("HSV", (1, 1), (0, 255, 255)), [RED]),
    ],
)
def test_modes(picture, expected):
    opened = open_image(picture)
    assert opened.mode == "RGB"
    assert np.asarray(opened).reshape(-1, 3).tolist() == [list(colour) for colour in expected]


def test_sixteen_bit_keeps_its_shades():
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    opened = open_image(encoded(Image.fromarray(ramp)))
    assert np.array_equal(np.asarray(opened)[..., 0].ravel(), np.arange(256))


def test_cmyk_jpeg():
    opened = open_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert np.allclose(np.asarray(opened), RED, atol=4)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_give_their_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.allclose(np.asarray(open_image(data)), RED, atol=3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(kind, orientation):
    image = Image.new("RGB", (16, 8), "white")
    image.paste("black", (0, 0, 8, 4))  # top left as stored
    data = encoded(image, kind, exif=turned(orientation))
    image.info["exif"] = turned(orientation).tobytes()
    expected = ImageOps.exif_transpose(image)
    opened = open_image(data)
    assert opened.size == expected.size
    assert np.allclose(np.asarray(opened), np.asarray(expected), atol=40)
    assert upright_size(data) == (opened.height, opened.width)


@pytest.mark.parametrize("mode", ["I;16", "P", "LA"])
def test_exif_orientation_of_other_modes(mode):
    image = deep("I;16") if mode == "I;16" else noise(4, 6).convert(mode)
    data = encoded(image, exif=turned())
    assert open_image(data).size == image.size[::-1]
    assert upright_size(data) == image.size


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_damaged_exif_beside_sound_pixels(kind):
    data = encoded(noise(8, 9), kind, exif=b"Exif\0\0damaged")
    assert open_image(data).size == (9, 8)
    assert upright_size(data) == (8, 9)


def test_a_picture_that_is_open_stays_so():
    image = Image.open(io.BytesIO(encoded(noise(8, 10, 4), exif=turned())))
    assert open_image(image).size == (8, 10)
    assert upright_size(image) == (10, 8)
    assert (image.mode, image.size) == ("RGBA", (10, 8))
    assert image.getexif()[0x0112] == 6


NOISE = encoded(noise(64, 64))


@pytest.mark.parametrize(
    "picture, reason",
    [
        (b"", "empty (0 bytes)"),
        (b"<html>not found</html>", "cannot identify image file"),
        (encoded(noise(64, 64), "JPEG")[:-200], "truncated"),
        (NOISE[:-2000], "truncated"),
        (NOISE[:60], ""),
        (NOISE[:3000] + bytes(40) + NOISE[3040:], ""),
        (encoded(Image.new("RGB", (3300, 100))), "strip of 3300 × 100"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "floating-point"),
        (Image.new("I", (4, 4), 70000), "more than 16 bits"),
        (Image.new("I", (4, 4), -1), "more than 16 bits"),
    ],
)
def test_broken_pictures(picture, reason):
    with pytest.raises(BrokenImageError) as error:
        open_image(picture)
    assert reason in str(error.value)
    assert str(error.value)
    assert "0x" not in str(error.value)


def test_what_has_no_size_either(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    for wrong, said in (
        (tmp_path / "a.jpg", "no such file"),
        (tmp_path, "directory"),
        (NOISE, "decompression bomb"),
        (NOISE[:16] + struct.pack(">II", 0, 8) + NOISE[24:], None),
    ):
        for function in (open_image, upright_size):
            with pytest.raises(BrokenImageError, match=said):
                function(wrong)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
def test_sizes_need_no_pixels(kind, monkeypatch):
    data = encoded(noise(8, 9), kind)
    plugin = type(Image.open(io.BytesIO(data)))
    monkeypatch.setattr(plugin, "load", lambda self: pytest.fail("pixels were decoded"))
    assert upright_size(data) == (8, 9)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_files_are_closed_and_unchanged(tmp_path):
    good, bad = tmp_path / "a.png", tmp_path / "b.png"
    good.write_bytes(NOISE)
    bad.write_bytes(NOISE[:-2000])
    before = len(os.listdir("/proc/self/fd")), good.stat().st_mtime_ns
    for _ in range(5):
        open_image(good)
        upright_size(good)
        upright_size(bad)
        with pytest.raises(BrokenImageError):
            open_image(bad)
    assert (len(os.listdir("/proc/self/fd")), good.stat().st_mtime_ns) == before
    assert good.read_bytes() == NOISE
