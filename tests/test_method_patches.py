"""Patch cameras and the patch pixel sampler, against closed forms and nerfstudio's own rays."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import Frustums, RayBundle, RaySamples
from nerfstudio.model_components.renderers import DepthRenderer

from ddm_training.errors import InputError
from ddm_training.rgbd import RgbdSpec
from diffusionerf_ns import patches

IDENTITY = torch.eye(3, 4)
SPEC = RgbdSpec(patch_size=16, focal=40.0, focal_range=(30.0, 50.0), image_size=(64, 48))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_pose(seed: int) -> torch.Tensor:
    draw = generator(seed)
    return torch.cat([patches.random_rotation(math.pi, draw), torch.randn(3, 1, generator=draw)], dim=1)


def camera(pose: torch.Tensor = IDENTITY, **changes: float) -> Cameras:
    """One camera of 64 x 48 pixels at a focal length of 40 pixels, unless changed."""
    values = {"fx": 40.0, "fy": 40.0, "cx": 32.0, "cy": 24.0, "width": 64, "height": 48} | changes
    return Cameras(pose[None], **values)


def pixel_coordinates(rays: RayBundle, pose: torch.Tensor, cameras: Cameras) -> tuple[torch.Tensor, torch.Tensor]:
    """u, v where rays of the camera's own centre meet its image, by plain projection."""
    local = rays.directions @ pose[:, :3]
    slope = local[:, :2] / -local[:, 2:]
    return cameras.cx[0] + cameras.fx[0] * slope[:, 0], cameras.cy[0] - cameras.fy[0] * slope[:, 1]


def test_patch_rays_of_an_identity_camera_equal_the_closed_form_in_row_major_order():
    size, focal, offset, image_size = 5, 30.0, (3.25, -1.5), (40, 20)
    directions = patches.window_directions(size, focal, offset, image_size)
    rays = patches.camera_rays(directions, IDENTITY, focal, camera=7)
    assert len(rays) == size * size
    for row in range(size):
        for column in range(size):
            x = (3.25 + column + 0.5 - 20.0) / 30.0
            y = -(-1.5 + row + 0.5 - 10.0) / 30.0
            norm = math.sqrt(x * x + y * y + 1.0)
            index = row * size + column
            assert rays.directions[index].tolist() == pytest.approx([x / norm, y / norm, -1.0 / norm], abs=1e-6)
            assert rays.metadata["directions_norm"][index].item() == pytest.approx(norm, abs=1e-6)
    assert (rays.origins == 0).all()
    assert rays.camera_indices.tolist() == [[7]] * size**2


def test_patch_rays_equal_nerfstudios_rays_of_the_same_pinhole_camera_at_any_pose():
    pose = random_pose(0)
    directions = patches.window_directions(8, 40.0, (10.0, 20.0), (64, 48))
    ours = patches.camera_rays(directions, pose, 40.0, camera=0)
    theirs = camera(pose).generate_rays(0)[20:28, 10:18].flatten()
    torch.testing.assert_close(ours.directions, theirs.directions)
    torch.testing.assert_close(ours.origins, theirs.origins)
    torch.testing.assert_close(ours.metadata["directions_norm"], theirs.metadata["directions_norm"])


def test_a_window_in_the_middle_is_symmetric_about_the_optical_axis():
    directions = patches.window_directions(16, 40.0, (24.0, 16.0), (64, 48))
    torch.testing.assert_close(directions.mean((0, 1)), torch.tensor([0.0, 0.0, -1.0]))
    assert (directions[0, :, 1] > 0).all(), "the first row looks up"
    assert (directions[:, 0, 0] < 0).all(), "the first column looks left"


def test_perturbed_poses_stay_within_jitter_and_angle_and_use_all_of_them():
    draw, pose = generator(1), random_pose(1)
    poses = [patches.perturb_pose(pose, 0.2, 0.1 * math.pi, draw) for _ in range(500)]
    rotations = torch.stack([p[:, :3] for p in poses])
    shifts = torch.stack([p[:, 3] - pose[:, 3] for p in poses])

    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(3).expand(500, 3, 3), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(500))

    relative = (rotations @ pose[:, :3].T).double()
    angles = torch.acos(((relative.diagonal(dim1=1, dim2=2).sum(-1) - 1.0) / 2.0).clamp(-1.0, 1.0))
    assert angles.max() <= 0.1 * math.pi + 1e-3
    assert angles.max() > 0.097 * math.pi
    assert angles.mean() == pytest.approx(0.05 * math.pi, rel=0.1), "uniform"
    axes = torch.stack([relative[:, i, j] - relative[:, j, i] for i, j in ((2, 1), (0, 2), (1, 0))], dim=-1)
    axes = axes / axes.norm(dim=-1, keepdim=True)
    assert axes.mean(0).abs().max() < 0.1, "no axis is preferred"
    assert axes.square().mean(0).tolist() == pytest.approx([1 / 3] * 3, abs=0.05)

    assert shifts.abs().max() <= 0.2 + 1e-6
    assert (shifts.max(0).values > 0.19).all()
    assert (shifts.min(0).values < -0.19).all()
    assert shifts.std(0).tolist() == pytest.approx([0.4 / math.sqrt(12)] * 3, rel=0.1), "uniform"


def test_a_pose_perturbed_by_nothing_is_the_pose():
    torch.testing.assert_close(patches.perturb_pose(random_pose(2), 0.0, 0.0, generator()), random_pose(2))


def test_rendered_patches_lie_anywhere_in_the_pseudo_image_and_up_to_half_a_patch_over_its_edge():
    draw, pose = generator(3), random_pose(3)
    cameras = camera(pose, fx=500.0, fy=500.0, width=640, height=480)  # its own size plays no part
    pseudo = camera(pose)
    corners = []
    for _ in range(150):
        patch = patches.sample_rendered_patch(cameras, SPEC, jitter=0.0, max_angle=0.0, generator=draw)
        assert patch.rgb is None
        u, v = (c.reshape(16, 16) for c in pixel_coordinates(patch.rays, pose, pseudo))
        corners.append((float(u[0, 0]) - 0.5, float(v[0, 0]) - 0.5))
        torch.testing.assert_close(u[0].diff(), torch.ones(15), atol=1e-3, rtol=0.0)
        torch.testing.assert_close(v[:, 0].diff(), torch.ones(15), atol=1e-3, rtol=0.0)
    corner = torch.tensor(corners)
    low, high = torch.tensor([-8.0, -8.0]), torch.tensor([64.0 - 8.0, 48.0 - 8.0])
    assert (corner >= low - 1e-3).all()
    assert (corner <= high + 1e-3).all()
    assert (corner.min(0).values < low + 2.0).all()
    assert (corner.max(0).values > high - 2.0).all()


def test_rendered_patches_come_from_near_every_camera_and_name_it():
    poses = torch.stack([random_pose(i) for i in range(3)])
    poses[:, 0, 3] = torch.tensor([0.0, 100.0, 200.0])
    cameras = Cameras(poses, fx=40.0, fy=40.0, cx=32.0, cy=24.0, width=64, height=48)
    draw, seen = generator(4), set()
    for _ in range(60):
        patch = patches.sample_rendered_patch(cameras, SPEC, jitter=0.2, max_angle=0.3, generator=draw)
        assert (patch.pose[:, 3] - poses[patch.camera, :, 3]).abs().max() <= 0.2 + 1e-4
        assert (patch.rays.camera_indices == patch.camera).all()
        assert torch.equal(patch.rays.origins, patch.pose[:, 3].expand(256, 3))
        seen.add(patch.camera)
    assert seen == {0, 1, 2}


@pytest.mark.parametrize(
    ("image_focal", "patch_focal"), [(400.0, 40.0), (40.0, 40.0), (35.0, 35.0), (30.0, 30.0), (10.0, 30.0)]
)
def test_a_patch_of_an_image_has_the_priors_focal_length_or_that_of_a_coarser_image(image_focal, patch_focal):
    assert patches.image_patch_focal(SPEC, image_focal) == patch_focal


@pytest.mark.parametrize(("width", "height", "atol"), [(64, 32, 0.0), (100, 75, 1e-4)])
def test_an_aligned_patch_equals_the_image_and_its_rays_are_the_pixels_rays(width, height, atol):
    """Equal focal lengths and a whole-numbered corner. To the bit where the size divides exactly in floating point."""
    pose = random_pose(5)
    cameras = camera(pose, cx=width / 2 + 3.0, cy=height / 2 - 2.0, width=width, height=height)
    image = torch.rand(height, width, 3, generator=generator(5))
    patch = patches.cut_image_patch(cameras, image, 0, SPEC, (21.0, 9.0))
    assert patch.rgb is not None
    torch.testing.assert_close(patch.rgb, image[9:25, 21:37], atol=atol, rtol=0.0)
    theirs = cameras.generate_rays(0)[9:25, 21:37].flatten()
    assert torch.equal(patch.rays.directions, theirs.directions)
    assert torch.equal(patch.rays.origins, theirs.origins)
    assert torch.equal(patch.rays.metadata["directions_norm"], theirs.metadata["directions_norm"])
    assert torch.equal(patch.pose, pose)


@pytest.mark.parametrize("focal", [20.0, 35.0, 40.0, 97.0])
def test_colours_and_rays_of_an_image_patch_belong_to_the_same_points_at_every_scale(focal):
    """Of an image whose colours are linear in u and v, they tell where rays should be, to a twentieth of a pixel: each
    pixel is of one colour, of which an average of areas may take a part."""
    pose = random_pose(6)
    cameras = camera(pose, fx=focal, fy=1.1 * focal, cx=50.0, cy=41.0, width=120, height=80)
    v, u = torch.meshgrid(torch.arange(80) + 0.5, torch.arange(120) + 0.5, indexing="ij")
    image = torch.stack([u / 120, v / 80, (u + v) / 200], dim=-1)
    patch = patches.cut_image_patch(cameras, image, 0, SPEC, (12.3, 7.7))
    assert patch.rgb is not None
    u, v = pixel_coordinates(patch.rays, pose, cameras)
    torch.testing.assert_close(
        patch.rgb.reshape(-1, 3), torch.stack([u / 120, v / 80, (u + v) / 200], dim=-1), atol=0.05 / 80, rtol=0.0
    )
    step = focal / patches.image_patch_focal(SPEC, focal)
    assert u[0].item() == pytest.approx(12.3 + step / 2, abs=1e-3)
    assert (u[15] - u[0]).item() == pytest.approx(15 * step, abs=1e-2)


def test_patches_of_finer_images_are_averages_of_areas():
    cameras = camera(random_pose(6), fx=4 * SPEC.focal, fy=2 * SPEC.focal, width=160, height=80)
    image = torch.rand(80, 160, 3, generator=generator(6))
    patch = patches.cut_image_patch(cameras, image, 0, SPEC, (40.0, 20.0))
    assert patch.rgb is not None
    blocks = image[20 : 20 + 32, 40 : 40 + 64].reshape(16, 2, 16, 4, 3)
    torch.testing.assert_close(patch.rgb, blocks.mean(dim=(1, 3)))
    bytes_of_it = patches.cut_image_patch(cameras, (255 * image).round().byte(), 0, SPEC, (40.0, 20.0)).rgb
    assert bytes_of_it is not None
    torch.testing.assert_close(bytes_of_it, patch.rgb, atol=0.5 / 255, rtol=0.0)


@pytest.mark.parametrize("focal", [20.0, 40.0, 70.0])
def test_image_patches_lie_wholly_inside_their_image_and_reach_its_edges(focal):
    pose, draw = random_pose(7), generator(7)
    cameras = camera(pose, fx=focal, fy=focal)
    half = 0.5 * focal / patches.image_patch_focal(SPEC, focal)
    image, lows, highs = torch.rand(48, 64, 3), [], []
    for _ in range(100):
        patch = patches.sample_image_patch(cameras, [image], SPEC, generator=draw)
        u, v = pixel_coordinates(patch.rays, pose, cameras)
        lows.append([float(u.min()) - half, float(v.min()) - half])
        highs.append([float(u.max()) + half, float(v.max()) + half])
    low, high = torch.tensor(lows).min(0).values, torch.tensor(highs).max(0).values
    assert (low > -1e-3).all()
    assert (high < torch.tensor([64.0, 48.0]) + 1e-3).all()
    assert (low < 2.0).all()
    assert (high > torch.tensor([62.0, 46.0])).all()


def test_image_patches_take_the_image_of_their_camera():
    poses = torch.stack([random_pose(i) for i in range(3)])
    cameras = Cameras(poses, fx=40.0, fy=40.0, cx=32.0, cy=24.0, width=64, height=48)
    images = torch.arange(3.0)[:, None, None, None].expand(3, 48, 64, 3) / 2
    draw, seen = generator(8), set()
    for _ in range(40):
        patch = patches.sample_image_patch(cameras, images, SPEC, generator=draw)
        assert patch.rgb is not None
        torch.testing.assert_close(patch.rgb, torch.full((16, 16, 3), patch.camera / 2))
        assert torch.equal(patch.rays.origins[0], poses[patch.camera, :, 3])
        seen.add(patch.camera)
    assert seen == {0, 1, 2}


def test_a_patch_larger_than_an_image_raises_with_both_sizes():
    spec = RgbdSpec(patch_size=48, focal=100.0, focal_range=(100.0, 100.0))
    fits = camera(fx=100.0, fy=100.0, width=48, height=48)
    patches.images_with_patches(fits, spec)
    with pytest.raises(InputError, match=r"96 x 96 pixels of training image 0, which has only 120 x 90"):
        patches.images_with_patches(camera(fx=200.0, fy=200.0, width=120, height=90), spec)
    with pytest.raises(InputError, match=r"48 x 48 pixels of training image 0, which has only 47 x 90"):
        patches.images_with_patches(camera(fx=100.0, fy=100.0, width=47, height=90), spec)


def test_unequal_focal_lengths_are_checked_each_against_its_own_side():
    spec = RgbdSpec(patch_size=16, focal=40.0, focal_range=(30.0, 40.0))
    patches.images_with_patches(camera(fx=80.0, fy=40.0, width=32, height=16), spec)
    with pytest.raises(InputError, match="32 x 16 pixels"):
        patches.images_with_patches(camera(fx=80.0, fy=40.0, width=31, height=99), spec)


BUILTIN = RgbdSpec(patch_size=48, focal=175.0, focal_range=(60.0, 270.0))


@pytest.mark.parametrize("width", [252, 1008, 1013])
def test_a_patch_of_a_telephoto_image_has_the_shortest_focal_length_of_the_prior_that_fits(width):
    """98 mm on 35 mm film and more: larger images would not help, as the focal length grows with them."""
    height, draw = width * 3 // 4, generator(12)
    cameras = camera(fx=width * 3.33, fy=width * 3.33, cx=width / 2, cy=height / 2, width=width, height=height)
    patches.images_with_patches(cameras, BUILTIN)
    for _ in range(5):
        patch = patches.sample_image_patch(cameras, [torch.rand(height, width, 3)], BUILTIN, generator=draw)
        assert patch.rgb is not None
        assert patch.rgb.isfinite().all()
        _, v = pixel_coordinates(patch.rays, IDENTITY, cameras)
        assert float(v[-1] - v[0]) == pytest.approx(height * 47 / 48, rel=1e-3)


def test_a_patch_of_the_longest_focal_length_that_does_not_fit_is_refused_without_asking_for_larger_images():
    with pytest.raises(
        InputError, match=r"at a focal length of 270\) covers 213 x 213 .* only 252 x 189, .*: give a wider"
    ):
        patches.images_with_patches(camera(fx=1200.0, fy=1200.0, width=252, height=189), BUILTIN)


@pytest.mark.parametrize(("focal", "side"), [(10.0, 16 / 3), (35.0, 16.0), (40.0, 16.0), (97.0, 38.8)])
def test_a_patch_that_fits_keeps_the_priors_focal_length(focal, side):
    cameras = camera(fx=focal, fy=focal)
    assert patches._window_side(cameras, 0, SPEC) == pytest.approx((side, side), rel=1e-12)


@pytest.mark.parametrize("of_an_image", [True, False])
def test_planar_depth_of_a_plane_facing_the_camera_is_constant(of_an_image):
    """Through nerfstudio's expected depth, with its gradient, divided by ``directions_norm`` as the model does."""
    distance, pose, draw = 3.5, random_pose(9), generator(9)
    cameras = camera(pose, fx=97.0, fy=97.0, width=120, height=80)
    if of_an_image:
        patch = patches.sample_image_patch(cameras, [torch.rand(80, 120, 3)], SPEC, generator=draw)
    else:
        patch = patches.sample_rendered_patch(cameras, SPEC, jitter=0.5, max_angle=0.3, generator=draw)
    # Where each ray meets the plane that lies `distance` before the patch's camera and faces it.
    meets = distance / (patch.rays.directions @ -patch.pose[:, 2])
    assert meets.max() / meets.min() > 1.01, "distances along the rays do differ"
    edges = torch.stack([0.5 * meets, meets - 0.01, meets + 0.01, 2.0 * meets], dim=-1)[..., None]
    samples = RaySamples(
        Frustums(
            origins=patch.rays.origins[:, None].expand(-1, 3, -1),
            directions=patch.rays.directions[:, None].expand(-1, 3, -1),
            starts=edges[:, :-1],
            ends=edges[:, 1:],
            pixel_area=torch.ones(len(patch.rays), 3, 1),
        )
    )
    weights = torch.tensor([0.0, 1.0, 0.0])[None, :, None].repeat(len(patch.rays), 1, 1).requires_grad_(True)
    expected_depth = DepthRenderer(method="expected")(weights, samples)
    planar = expected_depth / patch.rays.metadata["directions_norm"]
    torch.testing.assert_close(planar, torch.full_like(planar, distance), atol=1e-4, rtol=0.0)
    planar.sum().backward()
    assert (weights.grad[:, 0] < 0).all(), "weight before the plane brings it nearer"
    assert (weights.grad[:, 2] > 0).all(), "weight behind it moves it away"


def test_concatenated_rays_keep_their_order_and_directions_norm():
    rays = camera().generate_rays(0).flatten()
    rays.metadata["of_no_interest"] = torch.ones(len(rays), 1)
    patch = patches.sample_rendered_patch(camera(), SPEC, jitter=0.1, max_angle=0.1, generator=generator(10))
    both = patches.concatenate_rays([rays, patch.rays])
    assert len(both) == len(rays) + 256
    assert list(both.metadata) == ["directions_norm", patches.OF_PATCH]
    assert both.metadata[patches.OF_PATCH][:, 0].tolist() == [False] * len(rays) + [True] * 256
    assert list(patches.concatenate_rays([rays, rays]).metadata) == ["directions_norm"]
    for name in ("origins", "directions", "pixel_area", "camera_indices"):
        assert torch.equal(getattr(both, name)[: len(rays)], getattr(rays, name))
        assert torch.equal(getattr(both, name)[len(rays) :], getattr(patch.rays, name))
    assert torch.equal(both.metadata["directions_norm"][len(rays) :], patch.rays.metadata["directions_norm"])


def test_the_same_generator_draws_the_same_patches_and_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    first, second = (
        patches.sample_rendered_patch(camera(), SPEC, jitter=0.1, max_angle=0.1, generator=generator(11))
        for _ in range(2)
    )
    images = [torch.rand(48, 64, 3, generator=generator(12))]
    third, fourth = (patches.sample_image_patch(camera(), images, SPEC, generator=generator(11)) for _ in range(2))
    assert torch.equal(first.rays.directions, second.rays.directions)
    assert torch.equal(third.rgb, fourth.rgb)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "call",
    [
        lambda: patches.camera_rays(torch.zeros(4, 5, 3), IDENTITY, 40.0, 0),
        lambda: patches.camera_rays(torch.zeros(4, 4, 3), torch.eye(4), 40.0, 0),
        lambda: patches.perturb_pose(torch.eye(4), 0.1, 0.1),
        lambda: patches.cut_image_patch(camera(), torch.zeros(3, 48, 64), 0, SPEC, (0.0, 0.0)),
        lambda: patches.cut_image_patch(camera(), torch.zeros(48, 64, 3, dtype=torch.int32), 0, SPEC, (0.0, 0.0)),
        lambda: patches.sample_image_patch(camera(), torch.zeros(48, 64, 3), SPEC),
    ],
)
def test_a_wrong_shape_or_type_raises(call):
    with pytest.raises(TypeCheckError):
        call()
