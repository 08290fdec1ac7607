"""Photographs of a folder: read, written as a capture's images, and refused with a reason."""

import shutil
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from corner import noise, render, save_with_exif
from corner import poses as corner_poses
from PIL import Image

from ddm_training.errors import InputError
from diffusionerf_ns import photographs
from diffusionerf_ns.dataparsers.images import PHOTOGRAPH_SUFFIXES, list_images


@pytest.fixture
def picture(tmp_path_factory) -> Path:
    """A photograph of noise, 40 x 30."""
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(path)
    return path


def test_the_focal_length_of_any_photograph_counts(picture, tmp_path):
    for name, focal in (("0", None), ("1", 30), ("2", None)):
        save_with_exif(picture, tmp_path / f"{name}.jpg", focal)
    focals = photographs.write_images(sorted(tmp_path.glob("*.jpg")), tmp_path / "images")
    assert focals == {"0.jpg": None, "1.jpg": 30.0, "2.jpg": None}
    assert photographs.one_focal(focals) == 30.0


def test_fingerprints_are_of_names_and_contents(tmp_path):
    for folder, content in (("a", b"abc"), ("b", b"abc"), ("c", b"abd")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.jpg").write_bytes(content)
    a, b, c = (photographs.fingerprints([tmp_path / folder / "0.jpg"]) for folder in "abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert a == b == {"0.jpg": {"bytes": 3, "sha256": known}}
    assert c != a
    shutil.copy(tmp_path / "a" / "0.jpg", tmp_path / "1.jpg")
    assert photographs.fingerprints([tmp_path / "1.jpg"]) != a


def test_an_orientation_that_means_nothing_changes_nothing(picture, tmp_path):
    save_with_exif(picture, tmp_path / "0.jpg", None, orientation=0)
    photographs.write_images([tmp_path / "0.jpg"], tmp_path / "images")
    assert (tmp_path / "images" / "0.jpg").read_bytes() == (tmp_path / "0.jpg").read_bytes()


def test_a_photograph_that_is_gone_or_damaged_is_named(picture, tmp_path):
    cut, gone = tmp_path / "cut.tif", tmp_path / "gone.png"
    Image.open(picture).save(cut)
    cut.write_bytes(cut.read_bytes()[:1000])
    for number, source in enumerate((cut, gone)):
        with pytest.raises(InputError, match=rf"{source} cannot be read: .*Save it as JPEG anew, or take it out"):
            photographs.write_images([picture, source], tmp_path / str(number))
    with pytest.raises(InputError, match=rf"{gone} cannot be read"):
        photographs.fingerprints([picture, gone])


@pytest.mark.parametrize("suffix", [".png", ".bmp"])  # copied to the byte, and written as another format
def test_a_folder_that_cannot_be_written_is_not_blamed_on_a_photograph(picture, tmp_path, monkeypatch, suffix):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    source = tmp_path / f"picture{suffix}"
    Image.open(picture).save(source)
    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        photographs.write_images([source], tmp_path / "images")


def test_exif_of_every_format_is_read_and_copied_with_the_pixels(picture, tmp_path):
    """Also of TIFF, whose file Pillow closes once it is decoded."""
    made, exif = Image.Exif(), Image.Exif()
    made[0x010E] = "where"  # ImageDescription
    made.get_ifd(photographs.EXIF_IFD)[photographs.FOCAL_35MM] = 26
    made.get_ifd(0x8825)[2] = (48.0, 8.0, 0.0)  # GPSLatitude
    exif.load(made.tobytes())  # TIFF takes only what was read
    for number, name in enumerate(("a.tif", "b.webp", "c.jpg", "d.png")):
        shade = Image.fromarray(np.random.default_rng(number).integers(0, 255, (30, 40, 3), dtype=np.uint8))
        shade.save(tmp_path / name, exif=exif)
    sources = photographs.find_photographs(tmp_path)
    assert [p.name for p in sources] == ["a.tif", "b.webp", "c.jpg", "d.png"]
    focals = photographs.write_images(sources, tmp_path / "images")
    assert focals == {"a.png": 26.0, "b.png": 26.0, "c.jpg": 26.0, "d.png": 26.0}
    for name in focals:
        written = Image.open(tmp_path / "images" / name).getexif()
        assert written[0x010E] == "where"
        assert written.get_ifd(0x8825)[2] == (48.0, 8.0, 0.0)


def test_other_modes_and_formats_become_rgb(tmp_path):
    rgba, gray = tmp_path / "a.png", tmp_path / "b.tif"
    Image.new("RGBA", (40, 30), (10, 20, 30, 255)).save(rgba)
    Image.new("L", (40, 30), 99).save(gray)
    assert photographs.write_images([rgba, gray], tmp_path / "images") == {"a.png": None, "b.png": None}
    for name, color in (("a.png", (10, 20, 30)), ("b.png", (99, 99, 99))):
        image = Image.open(tmp_path / "images" / name)
        assert image.mode == "RGB"
        assert image.getpixel((3, 3)) == color


def test_photographs_of_phones_are_read_with_their_exif_and_turned(tmp_path):
    pillow_heif.register_heif_opener()
    shown = np.zeros((60, 80, 3), dtype=np.uint8)
    shown[:30, :40] = 200, 30, 30
    exif = Image.Exif()
    exif[photographs.ORIENTATION] = 6  # the phone was held upright: what is stored is to be turned to the right
    exif.get_ifd(photographs.EXIF_IFD)[photographs.FOCAL_35MM] = 26
    for green, name in enumerate(("a.HEIC", "b.heic", "c.heif")):
        shown[40:, 40:, 1] = 100 * green
        Image.fromarray(shown).save(tmp_path / name, format="HEIF", exif=exif.tobytes(), quality=95)
    sources = photographs.find_photographs(tmp_path)
    assert photographs.write_images(sources, tmp_path / "images") == {"a.png": 26.0, "b.png": 26.0, "c.png": 26.0}
    with Image.open(tmp_path / "images" / "a.png") as copy:
        assert copy.size == (60, 80)
        assert copy.getexif().get(photographs.ORIENTATION, 1) == 1
        red = np.asarray(copy)[..., 0] > 100
    assert red[2:38, 32:58].all()
    assert not red[42:].any()
    assert not red[:, :28].any()


def test_two_photographs_of_one_name_are_refused(tmp_path):
    for name in ("a.tif", "a.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    with pytest.raises(InputError, match=r"would be written as a\.png"):
        photographs.write_images([tmp_path / "a.png", tmp_path / "a.tif"], tmp_path / "images")


def test_photographs_of_16_bits_are_read_and_those_of_floating_point_refused(tmp_path):
    Image.fromarray(np.full((30, 40), 128 * 257, dtype=np.uint16)).save(tmp_path / "a.png")
    photographs.write_images([tmp_path / "a.png"], tmp_path / "images")
    assert Image.open(tmp_path / "images" / "a.png").convert("RGB").getpixel((20, 15)) == (128, 128, 128)
    Image.fromarray(np.full((30, 40), 0.5, dtype=np.float32)).save(tmp_path / "b.tif")
    with pytest.raises(InputError, match=r"b\.tif: .*floating point"):
        photographs.write_images([tmp_path / "b.tif"], tmp_path / "more")


def test_photographs_of_one_lens_with_more_and_fewer_pixels_become_of_one_size(tmp_path, capsys):
    sizes = {"a.png": (120, 90), "b.png": (80, 60), "c.png": (90, 120)}
    for name, size in sizes.items():
        half = Image.new("RGB", size, "blue")
        half.paste("red", (0, 0, size[0], size[1] // 2))
        half.save(tmp_path / name)
    assert photographs.one_size(tmp_path, tuple(sizes)) == ((80, 60), ("c.png",))
    pixels = {name: np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in sizes}
    assert all(p.shape == (60, 80, 3) for p in pixels.values())
    assert (pixels["a.png"][:25, :, 0] > 200).all()
    assert (pixels["c.png"][:, :35, 0] > 200).all(), "upright and turned to the left: its top is at the left"
    said = "".join(capsys.readouterr().out.split())
    assert "Reducedto80x60asthesmallest:a.png,c.png." in said


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "has 0 photographs"),
        (("a.png", "c.png"), "has 2 photographs .* expected 3 or more"),
        (("a.png", "b.DNG"), r"cannot be read here: b\.DNG.*Save them as JPEG"),
        (("a.png", "c.png", "broken.heic"), r"broken\.heic .*is damaged or cut short: fetch it again, or take it out"),
        (("a.png", "c.png", "broken.jpg"), r"broken\.jpg .*is damaged or cut short: fetch it again, or take it out"),
        (("a.png", "c.png", "film.jpg"), r"film\.jpg .*HEIC, AVIF or film file: save it as JPEG, or take it out"),
    ],
)
def test_folders_that_cannot_be_used_are_refused(tmp_path, files, message):
    for name in files:
        if name in ("a.png", "c.png"):
            Image.new("RGB", (40, 30), "red" if name == "a.png" else "blue").save(tmp_path / name)
        else:
            (tmp_path / name).write_bytes(b"\0\0\0\x18ftypqt  " if name == "film.jpg" else b"no image")
    with pytest.raises(InputError, match=message):
        photographs.find_photographs(tmp_path)


def test_exif_that_cannot_be_written_again_is_left_out(picture, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x8769] = {0xA405: 28}
    exif[0x0128] = "inches"  # ResolutionUnit is a number
    with pytest.raises(Exception):  # noqa: B017, PT011  whatever Pillow raises: it is why there is this test
        Image.open(picture).save(tmp_path / "x.jpg", exif=exif)
    photographs._save(Image.open(picture), tmp_path / "a.jpg", exif)
    assert Image.open(tmp_path / "a.jpg").size == (40, 30)
    assert "EXIF of a.jpg is left out" in capsys.readouterr().out
    words = Image.Exif()
    words.get_ifd(0x8769)[0xA405] = "28 mm"
    assert photographs._focal_of(words) is None


def test_copies_to_the_byte_are_left_out_and_named(tmp_path, capsys):
    for seed, name in enumerate(("IMG.png", "a.png", "b.png")):
        noise(tmp_path / name, seed)
    shutil.copy(tmp_path / "IMG.png", tmp_path / "IMG (1).png")  # sorted before it
    assert [p.name for p in photographs.find_photographs(tmp_path)] == ["IMG.png", "a.png", "b.png"]
    assert "Copies are left out: IMG (1).png (of IMG.png)." in capsys.readouterr().out
    (tmp_path / "b.png").unlink()
    with pytest.raises(
        InputError, match=r"has 2 photographs .* without the copies .*IMG \(1\)\.png.*expected 3 or more"
    ):
        photographs.find_photographs(tmp_path)


def test_the_same_shot_in_other_formats_and_sizes_is_a_copy_and_the_largest_stays(tmp_path, real_data):
    """Of two real scenes, turned by EXIF too; different views of them are far above `SAME_SHOT`: see below."""
    pillow_heif.register_heif_opener()
    for scene in ("fern", "flower"):
        folder = tmp_path / scene
        folder.mkdir()
        shot = Image.open(real_data(f"llff/{scene}") / "images_8" / "image003.png").convert("RGB")
        shot.save(folder / "a.HEIC", format="HEIF", quality=50)
        shot.resize((252, 189), Image.Resampling.LANCZOS).save(folder / "a.jpg", quality=50)
        exif = Image.Exif()
        exif[photographs.ORIENTATION] = 6
        turned = shot.resize((400, 300), Image.Resampling.LANCZOS).transpose(Image.Transpose.ROTATE_90)
        turned.save(folder / "sent.jpg", quality=80, exif=exif)
        sources = sorted(folder.iterdir())
        assert photographs.without_copies(sources) == ([sources[0]], {"a.jpg": "a.HEIC", "sent.jpg": "a.HEIC"})


@pytest.mark.parametrize("images", ["llff/fern/images_8", "llff/flower/images_8", "dtu/rs_dtu_4/scan24/image"])
def test_different_views_are_no_copies_by_far(real_data, images, monkeypatch):
    """The nearest two are .12 (fern), .17 (flower) and .16 (scan24) apart; a copy of quality 50 is .025 at most."""
    monkeypatch.setattr(photographs, "SAME_SHOT", 3.5 * photographs.SAME_SHOT)
    sources = sorted(real_data(images).iterdir())
    assert photographs.without_copies(sources) == (sources, {})


def test_faint_views_and_cut_outs_are_told_apart_by_what_is_seen(tmp_path):
    names = ("a.png", "b.png")
    for name, pose in zip(names, corner_poses(9)):
        Image.fromarray(render(pose, contrast=10.0)).save(tmp_path / name)
    assert photographs.without_copies([tmp_path / name for name in names])[1] == {}
    for x, name in enumerate(names):  # the same colours below, other parts of them seen
        image = Image.new("RGBA", (64, 48), (200, 100, 50, 0))
        image.paste((200, 100, 50, 255), (10 + 8 * x, 10, 30 + 8 * x, 30))
        image.save(tmp_path / name)
    assert photographs.without_copies([tmp_path / name for name in names])[1] == {}


def test_two_sides_of_a_dark_object_before_white_are_no_copies(tmp_path):
    """The background has nearly all of the contrast, but nothing to tell them by."""
    texture = np.random.default_rng(0).integers(40, 90, (10, 20), dtype=np.uint8)
    for side, name in enumerate(("a.png", "b.png")):
        image = Image.new("L", (320, 240), 255)
        image.paste(Image.fromarray(np.roll(texture, 5 * side, axis=1)).resize((160, 120)), (80, 60))
        image.save(tmp_path / name)
    assert photographs.without_copies([tmp_path / "a.png", tmp_path / "b.png"])[1] == {}


def test_photographs_whose_exif_is_damaged_are_named(picture, tmp_path, monkeypatch):
    def fail(image):
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(Image.Image, "getexif", fail)
    with pytest.raises(InputError, match=r"picture\.png cannot be read: not a TIFF file.*take it out"):
        photographs.without_copies([picture])


def test_of_equal_copies_that_with_a_focal_length_stays(picture, tmp_path):
    save_with_exif(picture, tmp_path / "a.jpg", None)
    save_with_exif(picture, tmp_path / "from-camera.jpg", 30)
    sources = sorted(tmp_path.glob("*.jpg"))
    assert photographs.without_copies(sources) == ([tmp_path / "from-camera.jpg"], {"a.jpg": "from-camera.jpg"})


def test_alpha_is_kept_where_a_pixel_is_transparent(tmp_path):
    seen = np.full((30, 40, 4), (10, 20, 30, 255), dtype=np.uint8)
    seen[:15] = 99, 98, 97, 0
    rgba = Image.fromarray(seen)
    rgba.save(tmp_path / "copied.png")
    rgba.save(tmp_path / "other.webp", lossless=True, exact=True)
    exif = Image.Exif()
    exif[photographs.ORIENTATION] = 3
    rgba.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "turned.png", exif=exif)
    palette = Image.new("P", (40, 30), 1)
    palette.putpalette([255, 0, 0, 10, 20, 30])
    palette.paste(0, (0, 0, 40, 15))
    palette.save(tmp_path / "palette.png", transparency=0)
    photographs.write_images(sorted(p for p in tmp_path.iterdir()), tmp_path / "images")
    for name in ("copied.png", "other.png", "turned.png", "palette.png"):
        image = Image.open(tmp_path / "images" / name)
        assert image.mode == "RGBA", name
        pixels = np.asarray(image)
        assert pixels[20, 3].tolist() == [10, 20, 30, 255], name
        assert pixels[3, 3, 3] == 0, name
    assert (tmp_path / "images" / "copied.png").read_bytes() == (tmp_path / "copied.png").read_bytes()


def test_jfif_is_jpeg_by_another_name(picture, tmp_path):
    save_with_exif(picture, tmp_path / "a.jpg", 30)
    save_with_exif(picture, tmp_path / "b.jpg", 30, orientation=6)
    for name in "ab":
        (tmp_path / f"{name}.jpg").rename(tmp_path / f"{name}.jfif")
    sources = list_images(tmp_path, PHOTOGRAPH_SUFFIXES)
    assert photographs.write_images(sources, tmp_path / "images") == {"a.jfif": 30.0, "b.jfif": 30.0}
    assert (tmp_path / "images" / "a.jfif").read_bytes() == (tmp_path / "a.jfif").read_bytes()
    assert Image.open(tmp_path / "images" / "b.jfif").format == "JPEG"
