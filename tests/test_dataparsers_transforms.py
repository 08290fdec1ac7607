"""transforms.json: its own lists, intrinsics, metric depth, masks, agreement with nerfstudio's parser, bad input."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image
from small_capture import make_capture, names, parse, write

from ddm_training.errors import InputError
from diffusionerf_ns.dataset import FewViewDataset


def test_every_eighth_is_held_out_and_views_are_spread_over_the_rest(tmp_path):
    make_capture(tmp_path, 10)
    assert names(parse(tmp_path, "test")) == ["f00", "f08"]
    assert names(parse(tmp_path, num_views=3)) == ["f01", "f05", "f09"]  # of 1 2 3 4 5 6 7 9: positions 0, 3.5 -> 4, 7
    assert len(names(parse(tmp_path))) == 8


def test_lists_of_the_file_win_over_every_eighth(tmp_path):
    content = make_capture(tmp_path, 10)
    content["train_filenames"] = [f"images/f{i:02d}.png" for i in (0, 2, 4, 6, 8)]
    content["test_filenames"] = ["images/f09.png", "./images/f01.png"]
    write(tmp_path, content)
    assert names(parse(tmp_path, num_views=3)) == ["f00", "f04", "f08"]
    assert names(parse(tmp_path, "test")) == ["f01", "f09"]
    del content["test_filenames"]
    write(tmp_path, content)
    assert names(parse(tmp_path, "test")) == ["f01", "f03", "f05", "f07", "f09"]
    content["val_filenames"] = ["images/f03.png"]
    write(tmp_path, content)
    assert names(parse(tmp_path, "test")) == ["f03"]
    del content["train_filenames"]
    write(tmp_path, content)
    assert "f03" not in names(parse(tmp_path))
    assert len(names(parse(tmp_path))) == 9


@pytest.mark.parametrize("orientation", ["up", "none"])
def test_cameras_equal_those_of_nerfstudios_own_parser(tmp_path, orientation):
    turned = {"applied_transform": [[0, 1, 0, 0.5], [1, 0, 0, 0], [0, 0, -1, 2]], "applied_scale": 0.7}
    make_capture(tmp_path, 10, depth=True, k1=0.1, p2=-0.02, **turned)
    theirs = NerfstudioDataParserConfig(
        data=tmp_path, eval_mode="interval", orientation_method=orientation, downscale_factor=1
    ).setup()
    for split in ("train", "test"):
        ours, their = parse(tmp_path, split, orientation_method=orientation), theirs.get_dataparser_outputs(split)
        assert [p.name for p in ours.image_filenames] == [p.name for p in their.image_filenames]
        assert torch.allclose(ours.cameras.camera_to_worlds, their.cameras.camera_to_worlds, atol=1e-6)
        assert torch.allclose(ours.dataparser_transform, their.dataparser_transform, atol=1e-6)
        assert ours.dataparser_scale == pytest.approx(their.dataparser_scale)
        coords = torch.tensor([[3.5, 8.5]])
        rays = [c.generate_rays(1, coords=coords).directions for c in (ours.cameras, their.cameras)]
        assert torch.allclose(rays[0], rays[1], atol=1e-6)  # intrinsics and distortion


def test_each_frame_may_have_its_own_intrinsics_and_distortion(tmp_path):
    content = make_capture(tmp_path, 4)
    for frame in content["frames"]:
        frame |= {"fl_x": 30.0 + int(frame["file_path"][-6:-4]), "k1": 0.01, "cx": 20.0}
    write(tmp_path, content)
    cameras = parse(tmp_path, train_ids=(0, 3)).cameras
    assert cameras.fx.flatten().tolist() == [30.0, 33.0]
    assert cameras.fy.flatten().tolist() == [37.0, 37.0]
    assert cameras.cx.flatten().tolist() == [20.0, 20.0]
    assert cameras.distortion_params is not None
    assert cameras.distortion_params[:, 0].tolist() == pytest.approx([0.01, 0.01])


def test_a_field_of_view_serves_where_there_is_no_focal_length(tmp_path):
    content = make_capture(tmp_path, 3)
    for key in ("fl_x", "fl_y", "cx", "cy"):
        del content[key]
    write(tmp_path, content | {"camera_angle_x": 2 * math.atan(0.5)})
    cameras = parse(tmp_path).cameras
    assert cameras.fx[0].item() == pytest.approx(40.0)
    assert (cameras.cx[0].item(), cameras.cy[0].item()) == (20, 15)


def test_intrinsics_and_pixels_shrink_together(tmp_path):
    make_capture(tmp_path, 4)
    outputs = parse(tmp_path, downscale_factor=2)
    assert outputs.image_filenames[0].parent == tmp_path / "images_2"
    camera = outputs.cameras
    found = [getattr(camera, key)[0].item() for key in ("fx", "fy", "cx", "cy", "width", "height")]
    assert found == [18.0, 18.5, 9.5, 7.75, 20, 15]


def test_wide_images_are_reduced_though_one_side_does_not_divide(tmp_path):
    content = make_capture(tmp_path, 3, w=400, h=35)
    for frame in content["frames"]:
        Image.new("RGB", (400, 35)).save(tmp_path / frame["file_path"])
    camera = parse(tmp_path, downscale_factor=4).cameras
    found = [getattr(camera, key)[0].item() for key in ("width", "height", "fx", "fy")]
    assert found == pytest.approx([100, 8, 9.0, 37.0 * 8 / 35])


def test_reduced_images_of_the_user_are_used(tmp_path):
    make_capture(tmp_path, 4)
    (tmp_path / "images_2").mkdir()
    for i in range(4):
        Image.new("RGB", (20, 15), (i, 0, 0)).save(tmp_path / "images_2" / f"f{i:02d}.png")
    path = parse(tmp_path, downscale_factor=2).image_filenames[1]
    assert np.asarray(Image.open(path))[0, 0].tolist() == [1, 0, 0]
    assert len(list((tmp_path / "images_2").iterdir())) == 4


def test_depth_is_planar_metres_and_goes_to_scene_units_by_the_stated_factor(tmp_path):
    make_capture(tmp_path, 10, depth=True)
    outputs = parse(tmp_path, "test", downscale_factor=2)
    item = FewViewDataset(outputs)[1]  # f08: 1800 mm
    assert item["image"].shape == (15, 20, 3)
    assert item["depth_image"].shape == (15, 20, 1)
    assert torch.allclose(item["depth_image"], torch.tensor(1.8))
    # two cameras 0.3 m apart in x: their distance in the scene gives the same factor
    c2w = parse(tmp_path, train_ids=(0, 3)).cameras.camera_to_worlds[:, :, 3]
    assert float((c2w[1] - c2w[0]).norm()) == pytest.approx(0.9 * outputs.metadata["scene_units_per_metre"], rel=1e-5)


def test_depth_that_some_frames_lack_is_zero_there_and_other_units_are_scaled(tmp_path):
    content = make_capture(tmp_path, 4, depth=True)
    for frame in content["frames"]:
        if "f02" in frame["file_path"]:
            del frame["depth_file_path"]
    write(tmp_path, content)
    dataset = FewViewDataset(parse(tmp_path, depth_unit_scale_factor=0.01, train_ids=(1, 2, 3)))
    assert [float(dataset[i]["depth_image"].max()) for i in range(3)] == pytest.approx([11.0, 0.0, 13.0])


def test_a_capture_without_depth_makes_no_claim_to_be_metric(tmp_path):
    make_capture(tmp_path, 4)
    outputs = parse(tmp_path)
    assert "scene_units_per_metre" not in outputs.metadata
    assert "near" not in outputs.metadata
    assert outputs.metadata["depth_filenames"] is None
    assert "depth_image" not in FewViewDataset(outputs)[0]


def test_masks_of_the_file_reach_training(tmp_path):
    make_capture(tmp_path, 4, mask=True)
    outputs = parse(tmp_path, downscale_factor=2)
    mask = FewViewDataset(outputs)[0]["mask"]
    assert mask.dtype == torch.bool
    assert mask.shape == (15, 20, 1)
    assert not mask[:, :10].any()
    assert mask[:, 10:].all()


def test_a_json_file_itself_can_be_given(tmp_path):
    make_capture(tmp_path, 4)
    (tmp_path / "transforms.json").rename(tmp_path / "mine.json")
    assert names(parse(tmp_path / "mine.json")) == ["f00", "f01", "f02", "f03"]


NULL = {
    **dict.fromkeys(("k1", "p2", "fl_y", "cx", "cy", "w", "h", "distortion_params", "camera_model", "is_fisheye")),
    **dict.fromkeys(("applied_scale", "applied_transform", "orientation_override")),
    **dict.fromkeys(("train_filenames", "val_filenames", "test_filenames")),
}


def test_what_is_null_counts_as_absent(tmp_path):
    content = make_capture(tmp_path, 4)
    plain = {key: value for key, value in content.items() if key not in NULL}
    write(tmp_path, plain)
    expected = parse(tmp_path)
    for frame in content["frames"]:
        frame |= dict.fromkeys(("fl_x", "k1", "depth_file_path", "mask_path", "camera_model"))
    write(tmp_path, content | NULL)
    found = parse(tmp_path)
    assert names(found) == names(expected)
    for key in ("camera_to_worlds", "fx", "fy", "cx", "cy", "width", "height"):
        assert torch.equal(getattr(found.cameras, key), getattr(expected.cameras, key))
    assert found.cameras.distortion_params is None
    assert found.dataparser_scale == expected.dataparser_scale


@pytest.mark.parametrize("model", ["opencv", "Pinhole", "PERSPECTIVE"])
def test_a_camera_model_may_be_written_in_any_case(tmp_path, model):
    make_capture(tmp_path, 3, camera_model=model)
    assert len(names(parse(tmp_path))) == 3


def test_six_numbers_of_distortion_may_be_those_of_some_frames_only(tmp_path):
    content = make_capture(tmp_path, 3)
    content["frames"][0]["distortion_params"] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]  # f02
    write(tmp_path, content)
    distortion = parse(tmp_path).cameras.distortion_params
    assert distortion is not None
    assert distortion.flatten().tolist() == pytest.approx([0.0] * 12 + [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def test_an_image_listed_twice_trains_once(tmp_path):
    make_capture(tmp_path, 4, train_filenames=["images/f01.png", "images/f02.png", "./images/f01.png"])
    assert names(parse(tmp_path)) == ["f01", "f02"]


def frame_without(key):
    def damage(content, _folder):
        del content["frames"][3][key]

    return damage


def set_top(**values):
    return lambda content, _folder: content.update(values)


def set_frame(**values):
    return lambda content, _folder: content["frames"][3].update(values)


def damage_image_missing(_content, folder):
    (folder / "images" / "f03.png").unlink()


def damage_pose(content, _folder):
    content["frames"][0]["transform_matrix"][0][3] = math.nan


def damage_shape(content, _folder):
    content["frames"][0]["transform_matrix"] = [[1, 2], [3, 4]]


def damage_words(content, _folder):
    content["frames"][0]["transform_matrix"] = [["a"] * 4] * 4


def damage_mask(content, _folder):
    content["frames"][0]["mask_path"] = "masks/f09.png"


def damage_depth(content, _folder):
    content["frames"][5]["depth_file_path"] = "depths/none.png"


def damage_twice(content, _folder):
    content["frames"][0]["file_path"] = content["frames"][1]["file_path"]


def damage_focal(content, _folder):
    del content["fl_x"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (frame_without("file_path"), "'file_path'"),
        (frame_without("transform_matrix"), "'transform_matrix'"),
        (set_top(frames=[]), "no frames"),
        (set_top(camera_model="OPENCV_FISHEYE"), "OPENCV_FISHEYE is not supported"),
        (set_top(is_fisheye=True, k1=0.1), "is_fisheye"),
        (set_top(train_filenames=["images/zz.png"]), r"zz\.png"),
        (set_top(train_filenames=["images/f01.png"], test_filenames=["images/f01.png"]), r"f01\.png"),
        (set_top(w=30, h=40), "another shape"),
        (set_top(fl_x=-1.0), "intrinsics"),
        (damage_focal, "no focal length"),
        (damage_image_missing, r"missing: images/f03\.png"),
        (damage_pose, "NaN"),
        (damage_shape, "4 x 4"),
        (damage_words, "other things than numbers"),
        (damage_mask, "no mask_path"),
        (damage_depth, r"none\.png"),
        (damage_twice, "same file_path"),
        (set_top(frames=["a"]), "frame 0 is 'a'; expected an object"),
        (set_top(frames=[None]), "frame 0 is None; expected an object"),
        (set_frame(file_path=None), "no 'file_path'"),
        (set_frame(file_path=7), "file_path is 7 .*name of a file"),
        (set_frame(depth_file_path=["a"]), r"depth_file_path is \['a'\] .*name of a file"),
        (set_frame(transform_matrix=None), "no 'transform_matrix'"),
        (set_frame(k1="much"), r"k1 is 'much' \(frame './images/f06.png'\); expected a number"),
        (set_top(cx=[19.0]), r"cx is \[19.0\] \(a value for all frames\); expected a number"),
        (set_top(w=math.inf), "w is inf .*expected a number"),
        (set_top(k1=math.nan), "k1 is nan .*expected a number"),
        (set_top(applied_scale="one"), "applied_scale is 'one'"),
        (set_top(applied_scale=0), "applied_scale is 0; expected a positive number"),
        (set_top(applied_transform=[[1, 0], [0, 1]]), "applied_transform is .*expected 4 x 4 or 3 x 4"),
        (set_top(applied_transform=[[None] * 4] * 3), "applied_transform holds null"),
        (set_top(fl_x=None, camera_angle_x=0), "camera_angle_x .* is 0; expected .*between 0 and pi"),
        (set_top(train_filenames="images/f01.png"), "train_filenames is 'images/f01.png'; expected a list"),
        (set_top(test_filenames=[1, 2]), r"test_filenames is \[1, 2\]; expected a list"),
        (set_top(orientation_override="down"), "orientation_override is 'down'; expected one of pca, up, vertical"),
        (set_top(distortion_params=[0.1, 0, 0, 0]), r"distortion_params is \[0.1, 0, 0, 0\] .*the 6 numbers k1 k2"),
        (set_frame(distortion_params=[0.1, 0, 0, 0]), "distortion_params .*f06.png.*the 6 numbers k1 k2"),
        (set_top(distortion_params=["a"] * 6), "distortion_params is 'a' .*expected a number"),
        (set_top(camera_model=5), "camera model 5 is not supported"),
    ],
)
def test_bad_files_are_refused_with_what_is_wrong(tmp_path, damage, words):
    content = make_capture(tmp_path, 10)
    damage(content, tmp_path)
    write(tmp_path, content)
    with pytest.raises(InputError, match=words):
        parse(tmp_path)


def test_ids_win_over_lists_that_overlap(tmp_path):
    both = ["images/f01.png"]
    make_capture(tmp_path, 4, train_filenames=both, test_filenames=both)
    assert names(parse(tmp_path, train_ids=(0, 1), test_ids=(2,))) == ["f00", "f01"]


def test_captures_far_from_the_origin_keep_their_shape(tmp_path):
    """Positions on the earth: float32 keeps halves of metres there."""
    content = make_capture(tmp_path / "here", 6)
    here = parse(tmp_path / "here")
    (tmp_path / "utm").mkdir()
    (tmp_path / "here" / "images").rename(tmp_path / "utm" / "images")
    offset = np.array([451_234.4, 5_412_345.6, 310.0])
    for frame in content["frames"]:
        for row, shift in zip(frame["transform_matrix"], offset):
            row[3] += shift
    write(tmp_path / "utm", content)
    there = parse(tmp_path / "utm")
    torch.testing.assert_close(there.cameras.camera_to_worlds, here.cameras.camera_to_worlds, atol=1e-5, rtol=0.0)
    moved = there.dataparser_transform[:, :3].double() @ torch.from_numpy(offset) + there.dataparser_transform[:, 3]
    torch.testing.assert_close(moved.float(), here.dataparser_transform[:, 3], atol=1.0, rtol=0.0)


def test_a_camera_says_that_there_is_no_more_to_say(tmp_path):
    """`ns-export cameras` asserts that there is metadata."""
    make_capture(tmp_path, 4)
    assert parse(tmp_path).cameras.metadata == {}


def test_broken_json_is_refused(tmp_path):
    make_capture(tmp_path, 3)
    (tmp_path / "transforms.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        parse(tmp_path)


def test_a_folder_that_is_not_there_is_said_with_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"--data caps: there is no such folder in {tmp_path}"):
        parse(Path("caps"))


# Two files in its place


def split_in_two(folder: Path, content: dict) -> None:
    """As the synthetic NeRF scenes are laid out: names without a suffix."""
    for kind, chosen in (("train", range(6)), ("test", range(6, 10))):
        frames = [f for f in content["frames"] if int(Path(f["file_path"]).stem[1:]) in chosen]
        frames = [f | {"file_path": f["file_path"].removesuffix(".png")} for f in frames]
        (folder / f"transforms_{kind}.json").write_text(json.dumps({"camera_angle_x": 1.2, "frames": frames}))
    (folder / "transforms.json").unlink()


def test_training_and_test_images_of_two_files(tmp_path):
    split_in_two(tmp_path, make_capture(tmp_path, 10))
    assert names(parse(tmp_path, num_views=3)) == ["f00", "f02", "f05"]
    test = parse(tmp_path, "test")
    assert names(test) == ["f06", "f07", "f08", "f09"]
    assert float(test.cameras.fx[0]) == pytest.approx(0.5 * 40 / math.tan(0.6))
    assert test.alpha_color.tolist() == [1.0, 1.0, 1.0]


def test_one_of_two_files_alone_is_refused(tmp_path):
    split_in_two(tmp_path, make_capture(tmp_path, 10))
    (tmp_path / "transforms_test.json").unlink()
    with pytest.raises(InputError, match=r"transforms_train\.json and transforms_test\.json"):
        parse(tmp_path)


# Images of several sizes


def test_sizes_are_read_off_the_images_where_the_file_gives_none(tmp_path):
    content = make_capture(tmp_path, 6)
    Image.new("RGB", (30, 40)).save(tmp_path / "images" / "f02.png")
    frames = [{key: f[key] for key in ("file_path", "transform_matrix")} for f in content["frames"]]
    write(tmp_path, {"camera_angle_x": 1.2, "frames": frames, "alpha_color": "white"})
    outputs = parse(tmp_path)
    other = names(outputs).index("f02")
    assert float(outputs.cameras.fx[other]) == pytest.approx(0.5 * 30 / math.tan(0.6))
    assert float(outputs.cameras.cy[other]) == 20.0
    assert outputs.alpha_color is None


def test_each_image_has_its_own_size_and_intrinsics(tmp_path):
    content = make_capture(tmp_path, 6)
    for frame in content["frames"]:
        if frame["file_path"].endswith("f02.png"):
            Image.new("RGB", (80, 50)).save(tmp_path / "images" / "f02.png")
            frame |= {"w": 80, "h": 50, "fl_x": 72.0, "fl_y": 70.0, "cx": 40.0, "cy": 25.0}
    write(tmp_path, content)
    outputs = parse(tmp_path)
    other = names(outputs).index("f02")
    assert outputs.cameras.width[:, 0].tolist() == [80 if i == other else 40 for i in range(len(outputs.cameras))]
    assert outputs.cameras.height[other, 0] == 50
    assert outputs.cameras.fx[:, 0].tolist() == [72.0 if i == other else 36.0 for i in range(len(outputs.cameras))]


def test_files_of_windows_tools_are_read(tmp_path):
    content = make_capture(tmp_path, 4, mask=True)
    for frame in content["frames"]:
        frame["file_path"] = frame["file_path"].replace("./images/", "images\\")
        frame["mask_path"] = frame["mask_path"].replace("/", "\\")
    (tmp_path / "transforms.json").write_text(json.dumps(content), encoding="utf-8-sig")
    outputs = parse(tmp_path, num_views=3)
    assert [p.parent.name for p in outputs.image_filenames] == ["images"] * 3
    assert [p.parent.name for p in outputs.mask_filenames] == ["masks"] * 3


def test_of_images_that_were_not_copied_the_others_are_named(tmp_path):
    make_capture(tmp_path, 4)
    (tmp_path / "images" / "f01.png").unlink()
    with pytest.raises(
        InputError, match=r"1 image files .*f01\.png\. .*both --train-ids and --test-ids among those there: 0, 2, 3\."
    ):
        parse(tmp_path)
    assert names(parse(tmp_path, train_ids=(0, 2), test_ids=(3,))) == ["f00", "f02"]


def test_masks_that_no_frame_names_are_told_of(tmp_path, capsys):
    make_capture(tmp_path, 4)
    (tmp_path / "masks").mkdir(exist_ok=True)
    assert parse(tmp_path, num_views=3).mask_filenames is None
    assert "no frame has a mask_path" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(InputError, match=r"--masked-training means nothing .* the mask_path of its frames"):
        parse(tmp_path, masked_training=True)
