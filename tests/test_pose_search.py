"""Poses of a few photographs: found, written as a capture, and refused with a reason."""

import json
import shutil
from pathlib import Path

import corner
import cv2
import numpy as np
import pytest
from PIL import Image
from script_modules import load_script

from ddm_training.errors import InputError
from diffusionerf_ns import pose_search, structure_from_motion
from diffusionerf_ns.dataparsers.few_view import FewViewDataParserConfig, is_photographs
from diffusionerf_ns.dataset import FewViewDataset
from diffusionerf_ns.pose_search import find_poses

pose_errors = load_script("pose_errors").pose_errors
FOCAL_35 = 30.3  # millimetres: 43.27 mm of film are the 600 pixels of the corner's diagonal, 420 its focal length


def test_errors_of_poses_are_of_the_best_alignment():
    true = corner.poses(4)
    turn = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    moved = np.concatenate([turn @ true[:, :, :3], 3.0 * (turn @ true[:, :, 3:]) + 5.0], axis=2)
    degrees, distances = pose_errors(moved, true)
    assert degrees.max() < 1e-4
    assert distances.max() < 1e-9
    angle = np.radians(4.0)
    about_z = np.array([[np.cos(angle), -np.sin(angle), 0.0], [np.sin(angle), np.cos(angle), 0.0], [0.0, 0.0, 1.0]])
    moved[0, :, :3] = moved[0, :, :3] @ about_z
    assert pose_errors(moved, true)[0].tolist() == pytest.approx([3.0, 1.0, 1.0, 1.0], abs=0.05)
    spread = np.linalg.norm(true[:, :, 3] - true[:, :, 3].mean(axis=0), axis=1).mean()
    apart = true.copy()
    apart[0, :, 3] += [0.0, 0.01 * spread, 0.0]
    assert 0.003 < pose_errors(apart, true)[1].max() < 0.012


def test_three_photographs_have_their_poses_and_the_focal_length(taken, placed):
    capture, found = placed
    content = json.loads((capture / "transforms.json").read_text())
    degrees, distances = corner.errors_of(content["frames"], taken[1])
    assert degrees.max() < 0.3
    assert distances.max() < 0.02
    assert content["frames"][0]["fl_x"] == pytest.approx(corner.FOCAL, rel=0.02)
    assert found.focal == pytest.approx(FOCAL_35, rel=0.02)
    assert found.known_focal is None
    assert found.error < 0.5
    assert found.missing == ()
    assert min(found.points.values()) > pose_search.FEW_POINTS


def test_the_capture_holds_the_photographs_and_cameras_and_nothing_else(taken, placed):
    capture, _ = placed
    assert sorted(p.name for p in capture.iterdir()) == ["images", "transforms.json"]
    assert sorted(p.name for p in capture.parent.iterdir()) == ["capture"]
    for name in ("0.png", "1.png", "2.png"):
        assert (capture / "images" / name).read_bytes() == (taken[0] / name).read_bytes()


def test_the_data_parser_reads_the_capture(placed):
    outputs = FewViewDataParserConfig(data=placed[0]).setup().get_dataparser_outputs("train")
    assert [path.name for path in outputs.image_filenames] == ["0.png", "1.png", "2.png"]
    assert outputs.cameras.fx.mean() == pytest.approx(corner.FOCAL, rel=0.02)


def test_the_same_photographs_give_the_same_poses(taken, placed, tmp_path):
    again = find_poses(taken[0], tmp_path / "again")
    assert again == placed[1]
    first, second = (json.loads((p / "transforms.json").read_text()) for p in (placed[0], tmp_path / "again"))
    assert first == second


def test_photographs_are_turned_as_their_exif_says_and_have_its_focal_length(taken, tmp_path):
    turned = tmp_path / "turned"
    turned.mkdir()
    for source in sorted(taken[0].iterdir()):
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees clockwise
        exif.get_ifd(0x8769)[0xA405] = round(FOCAL_35)
        image = Image.open(source).transpose(Image.Transpose.ROTATE_90)
        image.save(turned / f"{source.stem}.jpg", quality=97, exif=exif)
    found = find_poses(turned, tmp_path / "capture")
    assert found.known_focal == pytest.approx(30.0)
    assert found.focal == pytest.approx(30.0)  # it is 30.3
    assert "30 mm as on 35 mm film (as it was known)" in found.summary()
    assert found.missing == ()
    written = Image.open(tmp_path / "capture" / "images" / "0.jpg")
    assert written.size == (corner.WIDTH, corner.HEIGHT)
    assert written.getexif().get(0x0112, 1) == 1
    difference = np.asarray(written, dtype=float) - np.asarray(Image.open(taken[0] / "0.png"), dtype=float)
    assert np.abs(difference).mean() < 4
    content = json.loads((tmp_path / "capture" / "transforms.json").read_text())
    assert corner.errors_of(content["frames"], taken[1])[0].max() < 0.5


def test_a_focal_length_that_the_photographs_contradict_is_not_kept(taken, tmp_path, monkeypatch):
    began = []
    search = structure_from_motion.search
    monkeypatch.setattr(structure_from_motion, "search", lambda *given: (began.append(given[-1]), search(*given))[1])
    found = find_poses(taken[0], tmp_path / "capture", focal_35mm=35.0)
    assert began == [pytest.approx(35.0 * 600.0 / 43.27)]
    assert found.known_focal == pytest.approx(35.0)
    assert found.focal == pytest.approx(FOCAL_35, rel=0.02)
    assert "the photographs contradict the known 35 mm" in found.summary()
    for focal in (-1.0, 4.25, float("inf")):  # the second is the lens's own
        with pytest.raises(InputError, match=r"--focal-35mm must be within 8 and 400, found .*not the lens's own"):
            find_poses(taken[0], tmp_path / "x", focal_35mm=focal)


def test_photographs_of_little_contrast_need_the_second_search(tmp_path):
    truth = corner.photographs(tmp_path / "faint", contrast=10.0)
    names = ["0.png", "1.png", "2.png"]
    first = structure_from_motion.search(tmp_path / "faint", names, structure_from_motion.SEARCHES[0], "one", None)
    assert first[0] == []
    find_poses(tmp_path / "faint", tmp_path / "capture")
    frames = json.loads((tmp_path / "capture" / "transforms.json").read_text())["frames"]
    assert corner.errors_of(frames, truth)[0].max() < 0.5


def test_two_photographs_that_no_third_shares_anything_with_are_placed(taken, tmp_path):
    """COLMAP by itself makes no points of what two images alone have matched."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for name in ("0.png", "1.png"):
        shutil.copy(taken[0] / name, folder)
    corner.noise(folder / "2.png")
    found = find_poses(folder, tmp_path / "capture", focal_35mm=FOCAL_35)
    assert found.missing == ("2.png",)
    frames = json.loads((tmp_path / "capture" / "transforms.json").read_text())["frames"]
    first, second = (np.array(frame["transform_matrix"])[:3, :3] for frame in frames)
    true = [pose[:, :3].T for pose in taken[1][:2]]
    flip = np.diag([1.0, -1.0, -1.0])
    turn, expected = second.T @ first, flip @ true[1].T @ true[0] @ flip
    assert np.degrees(np.arccos((np.trace(turn @ expected.T) - 1.0) / 2.0)) < 1.0


def test_photographs_of_several_zooms_are_refused_by_name(taken, tmp_path):
    zooms = tmp_path / "zooms"
    zooms.mkdir()
    for name, focal in (("0", 30), ("1", 30), ("2", 60)):
        corner.save_with_exif(taken[0] / f"{name}.png", zooms / f"{name}.jpg", focal)
    with pytest.raises(InputError, match=r"different lenses or zooms \(0\.jpg 30 mm, 1\.jpg 30 mm, 2\.jpg 60 mm\)"):
        find_poses(zooms, tmp_path / "capture")


def test_what_a_file_holds_decides_not_its_suffix(taken, tmp_path):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for number, (kind, suffix) in enumerate((("WEBP", "jpg"), ("TIFF", "png"), ("PNG", "png"))):
        Image.open(taken[0] / f"{number}.png").save(mixed / f"{number}.{suffix}", format=kind, lossless=True)
    found = find_poses(mixed, tmp_path / "capture")
    assert found.names == ("0.png", "1.png", "2.png")
    assert found.missing == ()


def test_a_photograph_of_another_place_is_left_out_and_named(taken, placed, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(taken[0], mixed)
    corner.noise(mixed / "elsewhere.png")
    found = find_poses(mixed, tmp_path / "capture")
    assert found.missing == ("elsewhere.png",)
    assert "3 of 4 photographs have a pose" in found.summary()
    assert "Without a pose, and left out: elsewhere.png" in found.summary()
    frames = json.loads((tmp_path / "capture" / "transforms.json").read_text())["frames"]
    assert [frame["file_path"] for frame in frames] == ["images/0.png", "images/1.png", "images/2.png"]
    # The harder search finds more points; with those of two photographs alone, which place nothing more, twice as many.
    assert found.num_points < 1.5 * placed[1].num_points


def test_unrelated_photographs_are_refused_and_nothing_is_left_behind(tmp_path, capsys):
    folder = tmp_path / "unrelated"
    folder.mkdir()
    for seed in range(3):
        corner.noise(folder / f"{seed}.png", seed)
    with pytest.raises(SystemExit) as stopped:
        pose_search.main(["--data", str(folder), "--output", str(tmp_path / "capture")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "none of the 3 photographs could be placed; 0 points at most agree" in said
    assert "share more than half" in said
    assert "Traceback" not in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["unrelated"]


def test_photographs_taken_by_turning_on_the_spot_are_refused_with_that_reason(taken, tmp_path):
    pose, angle = taken[1][1], np.radians(6.0)
    turn = np.array([[np.cos(angle), 0.0, np.sin(angle)], [0.0, 1.0, 0.0], [-np.sin(angle), 0.0, np.cos(angle)]])
    for number, times in enumerate((-1, 0, 1)):
        turned = np.linalg.matrix_power(turn if times >= 0 else turn.T, abs(times)) @ pose
        Image.fromarray(corner.render(turned)).save(tmp_path / f"{number}.png")
    with pytest.raises(InputError, match=r"Probably they were taken from one place: take them a step apart"):
        find_poses(tmp_path, tmp_path / "capture", focal_35mm=FOCAL_35)


def test_photographs_of_different_shapes_are_refused(taken, tmp_path):
    sizes = tmp_path / "sizes"
    shutil.copytree(taken[0], sizes)
    Image.open(sizes / "1.png").resize((360, 240)).save(sizes / "1.png")
    with pytest.raises(InputError, match=r"different shapes \(0\.png 480 x 360, 1\.png 360 x 240, 2\.png 480 x 360\)"):
        find_poses(sizes, tmp_path / "capture")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sizes"]


def test_each_photograph_may_have_a_lens_of_its_own(taken, tmp_path):
    for name, focal, count in (("known", FOCAL_35, 1), ("unknown", None, 3)):
        find_poses(taken[0], tmp_path / name, cameras="each", focal_35mm=focal)
        frames = json.loads((tmp_path / name / "transforms.json").read_text())["frames"]
        assert len({frame["fl_x"] for frame in frames}) == count
        if focal is not None:
            assert corner.errors_of(frames, taken[1])[0].max() < 0.5


def test_a_known_focal_length_is_kept_and_no_distortion_is_made_up(taken, tmp_path):
    assert find_poses(taken[0], tmp_path / "capture", focal_35mm=30.0).focal == pytest.approx(30.0)  # it is 30.3
    frames = json.loads((tmp_path / "capture" / "transforms.json").read_text())["frames"]
    assert [frame["k1"] for frame in frames] == [0.0] * 3
    assert corner.errors_of(frames, taken[1])[0].max() < 0.3


def test_a_lens_that_distorts_is_found_out(taken, tmp_path):
    bent, k1 = tmp_path / "bent", -0.25
    bent.mkdir()
    lens = np.array([[corner.FOCAL, 0, corner.WIDTH / 2], [0, corner.FOCAL, corner.HEIGHT / 2], [0, 0, 1]])
    u, v = np.meshgrid(np.arange(corner.WIDTH) + 0.5, np.arange(corner.HEIGHT) + 0.5)
    straight = cv2.undistortPoints(np.stack([u, v], axis=-1).reshape(-1, 1, 2), lens, np.array([k1, 0, 0, 0]), P=lens)
    where = straight.reshape(corner.HEIGHT, corner.WIDTH, 2).astype(np.float32) - 0.5
    for source in taken[0].iterdir():
        image = cv2.remap(cv2.imread(str(source)), where[..., 0], where[..., 1], cv2.INTER_CUBIC)
        cv2.imwrite(str(bent / source.name), image)
    assert find_poses(bent, tmp_path / "capture", focal_35mm=FOCAL_35).missing == ()
    frames = json.loads((tmp_path / "capture" / "transforms.json").read_text())["frames"]
    assert frames[0]["k1"] == pytest.approx(k1, abs=0.05)
    assert corner.errors_of(frames, taken[1])[0].max() < 0.5


def test_an_output_that_holds_something_is_refused(taken, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="exists and holds something"):
        find_poses(taken[0], tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_an_empty_output_folder_is_filled_also_behind_a_link(taken, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    find_poses(taken[0], tmp_path / "link")
    assert sorted(p.name for p in (tmp_path / "real").iterdir()) == ["images", "transforms.json"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    find_poses(taken[0], Path("."))
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == ["images", "transforms.json"]


def test_an_output_that_cannot_be_written_is_refused(taken, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        find_poses(taken[0], tmp_path / "file" / "capture")


@pytest.mark.parametrize("place", ["fingerprints", "write_images"])
def test_a_photograph_that_goes_away_is_not_blamed_on_the_output(taken, tmp_path, monkeypatch, place):
    """After all were read once: a card was pulled out, say."""
    folder = tmp_path / "photographs"
    shutil.copytree(taken[0], folder)
    work = getattr(pose_search, place)

    def late(sources, *others):
        (folder / "1.png").unlink()
        return work(sources, *others)

    monkeypatch.setattr(pose_search, place, late)
    with pytest.raises(InputError, match=r"photographs/1\.png cannot be read: .*No such file") as raised:
        find_poses(folder, tmp_path / "capture")
    assert "--output" not in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["photographs"]


def test_folders_that_were_to_be_made_are_not_left_behind(tmp_path):
    folder = tmp_path / "unrelated"
    folder.mkdir()
    for seed in range(3):
        corner.noise(folder / f"{seed}.png", seed)
    with pytest.raises(InputError):
        find_poses(folder, tmp_path / "new" / "capture")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["unrelated"]


def test_training_on_photographs_alone_says_how_to_find_their_poses(taken):
    with pytest.raises(InputError, match=rf"diffusionerf-poses --data {taken[0]} --output FOLDER"):
        FewViewDataParserConfig(data=taken[0]).setup().get_dataparser_outputs("train")


def test_a_copy_is_no_third_photograph(taken, tmp_path, capsys):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for name in ("0.png", "1.png"):
        shutil.copy(taken[0] / name, folder)
    shutil.copy(folder / "0.png", folder / "0 (1).png")
    Image.open(folder / "1.png").save(folder / "1.jpg", quality=90)
    with pytest.raises(InputError, match=r"has 2 photographs .* without the copies .*0 \(1\)\.png.*expected 3 or more"):
        find_poses(folder, tmp_path / "capture")
    assert "Copies are left out: 0 (1).png (of 0.png), 1.png (of 1.jpg)." in " ".join(capsys.readouterr().out.split())


def test_a_copy_more_makes_no_other_photographs_of_them(taken, placed, tmp_path):
    folder = tmp_path / "photographs"
    shutil.copytree(taken[0], folder)
    Image.open(folder / "0.png").resize((240, 180)).save(folder / "0-sent.jpg")
    shutil.copy(folder / "1.png", folder / "1 (1).png")
    assert pose_search.was_made_of(placed[0], folder)
    (folder / "1.png").unlink()
    assert not pose_search.was_made_of(placed[0], folder)  # of another name now
    (folder / "2.png").write_bytes(b"no image")
    assert not pose_search.was_made_of(placed[0], folder)


def test_cut_outs_keep_their_alpha(taken, tmp_path):
    cut = tmp_path / "cut"
    cut.mkdir()
    alpha = Image.new("L", (corner.WIDTH, corner.HEIGHT))
    alpha.paste(255, (40, 30, 440, 330))
    for source in taken[0].iterdir():
        image = Image.open(source)
        image.putalpha(alpha)
        image.save(cut / source.name)
    assert find_poses(cut, tmp_path / "capture").missing == ()
    dataset = FewViewDataset(FewViewDataParserConfig(data=tmp_path / "capture").setup().get_dataparser_outputs("train"))
    assert np.array_equal(dataset.get_numpy_image(0)[..., 3], np.asarray(alpha))
    frames = json.loads((tmp_path / "capture" / "transforms.json").read_text())["frames"]
    assert corner.errors_of(frames, taken[1])[0].max() < 0.5


def test_other_folders_with_pictures_are_not_taken_for_photographs(taken, placed, tmp_path):
    assert is_photographs(taken[0])
    assert not is_photographs(placed[0] / "images")
    with pytest.raises(InputError, match=rf"is a folder of a capture \(transforms\); give {placed[0]}"):
        FewViewDataParserConfig(data=placed[0] / "images").setup().get_dataparser_outputs("train")
    for other in ("transforms_train.json", "sparse"):
        folder = tmp_path / other.split(".")[0]
        shutil.copytree(taken[0], folder)
        (folder / other).mkdir() if other == "sparse" else (folder / other).write_text("{}")
        assert not is_photographs(folder)
        shutil.copytree(taken[0], folder / "images")
        assert not is_photographs(folder / "images")
    exported = tmp_path / "phone" / "exported"
    shutil.copytree(taken[0], exported)
    (exported / "0.png.json").write_text("{}")  # as some exports have them beside each photograph
    assert is_photographs(exported)


def test_few_points_are_told():
    posed = pose_search.Posed(
        names=("a", "b"),
        points={"a": pose_search.FEW_POINTS - 1, "b": pose_search.FEW_POINTS},
        num_points=60,
        error=0.4,
        focal=28.0,
        known_focal=27.0,
        longest=pose_search.FEW_PIXELS - 1,
    )
    assert "Few points hold the poses of a (49):" in posed.summary()
    assert "b (" not in posed.summary()
    assert "Larger images" in posed.summary()
    assert "unlikely" not in posed.summary()


@pytest.mark.parametrize(("found", "known"), [(16.0, 30.0), (45.0, 30.0), (5.0, None), (500.0, None)])
def test_an_unlikely_focal_length_is_told(found, known):
    posed = pose_search.Posed(
        names=("a",), points={"a": 400}, num_points=400, error=0.2, focal=found, known_focal=known, longest=2000
    )
    assert "That focal length is unlikely" in posed.summary()


@pytest.mark.parametrize(("scene", "train"), [("fern", (1, 10, 19)), ("flower", (1, 17, 33))])
def test_three_real_photographs_have_the_poses_that_were_found_with_all(real_data, tmp_path, scene, train):
    source = real_data(f"llff/{scene}")
    images = sorted((source / "images_8").iterdir())
    folder = tmp_path / "photographs"
    folder.mkdir()
    for i in train:
        shutil.copy(images[i], folder)
    found = find_poses(folder, tmp_path / "capture")
    assert found.missing == ()
    down_right_back = np.load(source / "poses_bounds.npy")[list(train), :15].reshape(-1, 3, 5)[:, :, :4]
    pose = down_right_back[:, :, [1, 0, 2, 3]] * [1.0, 1.0, -1.0, 1.0]  # right, down, forward, position
    rotation = pose[:, :, :3].transpose(0, 2, 1)
    truth = np.concatenate([rotation, -rotation @ pose[:, :, 3:]], axis=2)
    degrees, distances = corner.errors_of(
        json.loads((tmp_path / "capture" / "transforms.json").read_text())["frames"], truth
    )
    assert degrees.max() < 1.0
    assert distances.max() < 0.15
