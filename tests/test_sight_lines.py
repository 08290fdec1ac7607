"""Lines of sight from between the cameras: where they begin and end, and what they keep away from."""

import math

import pytest
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from torch.nn import functional as F

from diffusionerf_ns import sight_lines
from diffusionerf_ns.matched_depth import MatchedDepth
from diffusionerf_ns.working_view import View

HEIGHT, WIDTH, FOCAL = 48, 64, 60.0
CENTRES = [(-0.5, 0.0, 0.0), (0.0, 0.3, 0.1), (0.5, 0.0, 0.0)]
WALL = 4.0  # planar depth of a wall at z = -4, from z = 0
NEAREST = [[1, 2], [0, 2], [1, 0]]


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def turned(count: int, turn: float) -> torch.Tensor:
    """Rotations of views along -z, those beside the second turned about y."""
    angle = turn * (torch.arange(count) - 1.0)
    zero, one = torch.zeros(count), torch.ones(count)
    rows = [[angle.cos(), zero, angle.sin()], [zero, one, zero], [-angle.sin(), zero, angle.cos()]]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=1)


def make_views(centres: list[tuple[float, float, float]], turn: float = 0.0) -> list[View]:
    return [
        View(
            torch.zeros(1, 1, HEIGHT, WIDTH),
            torch.full((2,), FOCAL),
            torch.tensor([WIDTH / 2, HEIGHT / 2]),
            rotation,
            torch.tensor(centre),
        )
        for rotation, centre in zip(turned(len(centres), turn), centres)
    ]


def make_cameras(centres: list[tuple[float, float, float]], turn: float = 0.0) -> Cameras:
    """The cameras of the same views."""
    poses = torch.cat([turned(len(centres), turn), torch.tensor(centres)[..., None]], dim=-1)
    return Cameras(poses, FOCAL, FOCAL, WIDTH / 2, HEIGHT / 2, WIDTH, HEIGHT, camera_type=CameraType.PERSPECTIVE)


def wall(views: list[View]) -> list[torch.Tensor]:
    """Planar depth of a wall."""
    return [(-WALL - view.position[2]) / view.directions()[..., 2] for view in views]


def points_of(views: list[View], depth: list[torch.Tensor]) -> torch.Tensor:
    """Where the matched pixels' surfaces are, in the order of matches."""
    return torch.cat([(v.position + v.directions() * z[..., None])[z > 0] for v, z in zip(views, depth)])


def test_lines_begin_evenly_in_the_hull_of_the_cameras_that_see_the_surface() -> None:
    views = make_views(CENTRES)
    depth = wall(views)
    lines = sight_lines.find(views, NEAREST, depth, depth)
    assert len(lines) == sight_lines.CANDIDATES, "nothing is in the way"
    corners = torch.cat([torch.tensor(CENTRES).T, torch.ones(1, 3)])
    sides = torch.cat([lines.origin.T, torch.ones(1, len(lines))])
    shares = torch.linalg.lstsq(corners, sides).solution  # barycentric coordinates in the triangle of the cameras
    assert float(shares.min()) > -1e-4
    assert float(shares.max()) < 1.0 + 1e-4
    x = points_of(views, depth)[lines.match][:, 0]
    middle = x.abs() < 1.0
    assert float(middle.float().mean()) > 0.3
    torch.testing.assert_close(shares[:, middle].mean(dim=1), torch.full((3,), 1 / 3), atol=0.02, rtol=0.0)
    beyond = x > 0.5 * WIDTH / FOCAL * WALL - 0.4  # of which the first camera sees nothing
    assert float(shares[0, beyond].abs().max()) < 1e-4


def test_what_one_camera_alone_sees_has_no_lines() -> None:
    views = make_views(CENTRES)
    depth = wall(views)
    alone = [depth[0], torch.zeros_like(depth[1]), torch.zeros_like(depth[2])]
    assert len(sight_lines.find(views, NEAREST, alone, alone)) == 0
    disagreeing = [z * factor for z, factor in zip(depth, (1.0, 1.2, 1.5))]
    assert len(sight_lines.find(views, NEAREST, alone, disagreeing)) == 0
    assert len(sight_lines.find(views, NEAREST, alone, depth)) > 0, "but if others say the same of it, it has"


def test_few_lines_are_none() -> None:
    """The same few surfaces would be looked at in every step."""
    views = make_views(CENTRES)
    depth = wall(views)
    for rows, some in ((2, False), (6, True)):
        few = [torch.zeros_like(z) for z in depth]
        for z, plain in zip(few, depth):
            z[:rows] = plain[:rows]
        assert (len(sight_lines.find(views, NEAREST, few, depth)) > 0) == some


def test_cameras_all_around_a_ball_do_not_forbid_lines_to_its_near_side() -> None:
    """Those on the far side see its back, behind which all lines to the front would be."""
    views, depth = [], []
    for angle in torch.linspace(0.0, 2.0 * math.pi, 13)[:-1].tolist():
        back = torch.tensor([math.cos(angle), 0.0, math.sin(angle)])
        up = torch.tensor([0.0, 1.0, 0.0])
        view = View(
            torch.zeros(1, 1, HEIGHT, WIDTH),
            torch.full((2,), FOCAL),
            torch.tensor([WIDTH / 2, HEIGHT / 2]),
            torch.stack([torch.linalg.cross(up, back), up, back], dim=1),
            4.0 * back,
        )
        ray = view.directions()  # with planar depth 1
        b, square = (ray * view.position).sum(-1), ray.square().sum(-1)
        root = b.square() - square * (16.0 - 1.0)  # a ball of radius 1 about the origin
        views.append(view)
        depth.append(torch.where(root > 0.0, (-b - root.clamp_min(0.0).sqrt()) / square, 0.0))
    nearest = [[(i + k) % 12 for k in (1, 11)] for i in range(12)]
    lines = sight_lines.find(views, nearest, depth, depth)
    assert len(lines) > 0.5 * sight_lines.CANDIDATES
    ends = points_of(views, depth)[lines.match]
    assert float((F.normalize(ends, dim=1) * F.normalize(lines.origin - ends, dim=1)).sum(1).min()) > 0.0, (
        "from outside"
    )


def test_no_line_begins_between_cameras_on_two_sides_of_a_surface() -> None:
    """What stands between them need not be in the way of either."""
    for apart, some in ((0.5, True), (5.0, False)):
        views = make_views([(-apart, 0.0, 0.0), (apart, 0.0, 0.0)])
        for view, side in zip(views, (-1.0, 1.0)):  # both look at the middle of the wall
            back = torch.tensor([side * apart, 0.0, WALL])
            back = back / back.norm()
            right = torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]), back)
            view.rotation[:] = torch.stack([right, torch.tensor([0.0, 1.0, 0.0]), back], dim=1)
        depth = wall(views)
        assert (len(sight_lines.find(views, [[1], [0]], depth, depth)) > 0) == some


@pytest.mark.parametrize("known_as", ["matched", "completed"])
def test_lines_keep_away_from_what_is_known_before_the_wall(known_as: str) -> None:
    """A post at z = -2 in all three images; at its own pixels they do not see the wall."""
    views = make_views(CENTRES)
    plain = wall(views)
    post = []
    for view, z in zip(views, plain):
        z_post = 2.0 + float(view.position[2])
        column = (torch.arange(WIDTH) + 0.5 - WIDTH / 2) / FOCAL * z_post + float(view.position[0])
        post.append(torch.where(column.abs() < 0.15, torch.tensor(z_post), z))
    matched = [torch.where(z < 3.0, 0.0, z) for z in post]
    if known_as == "matched":
        seldom = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
        seldom[::5] = True  # a row in five; the neighbourhood counts
        completed = matched
        matched = [torch.where((z < 3.0) & ~seldom, 0.0, z) for z in post]
    else:
        completed = post
    lines = sight_lines.find(views, NEAREST, matched, completed)
    ends = points_of(views, matched)[lines.match]
    far = (ends[:, 2] + WALL).abs() < 0.1
    assert int(far.sum()) > 5000
    start, end = lines.origin[far], ends[far]
    at = start + (end - start) * ((-2.0 - start[:, 2]) / (end[:, 2] - start[:, 2]))[:, None]
    assert float((at[:, 0].abs() < 0.15).float().mean()) == 0.0, "none goes through the post"
    unknown = [torch.where(z < 3.0, 0.0, z) for z in post]
    lines = sight_lines.find(views, NEAREST, unknown, unknown)
    start, end = lines.origin, points_of(views, unknown)[lines.match]
    at = start + (end - start) * ((-2.0 - start[:, 2]) / (end[:, 2] - start[:, 2]))[:, None]
    assert float((at[:, 0].abs() < 0.15).float().mean()) > 0.02, "they would if nobody knew of it"


def matched_depth(views: list[View], depth: list[torch.Tensor]) -> MatchedDepth:
    v, u = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    pixel = (torch.stack([u, v], dim=-1).reshape(-1, 2) + 0.5).repeat(len(views), 1)
    view = torch.arange(len(views)).repeat_interleave(HEIGHT * WIDTH)
    z = torch.cat([d.reshape(-1) for d in depth])
    return MatchedDepth(view, pixel, z, lines=sight_lines.find(views, NEAREST, depth, depth))


def test_rays_along_lines_end_at_their_surface_and_keep_their_share() -> None:
    views, cameras = make_views(CENTRES, turn=0.2), make_cameras(CENTRES, turn=0.2)
    known = matched_depth(views, wall(views))
    rays, distance = known.draw(cameras, 400, between=0.75)
    assert len(rays) == len(distance) == 400
    ends = rays.origins + rays.directions * distance[:, None]
    torch.testing.assert_close(ends[:, 2], torch.full((400,), -WALL), atol=1e-4, rtol=0.0)
    torch.testing.assert_close(rays.directions.norm(dim=-1), torch.ones(400))
    axes = cameras.camera_to_worlds[rays.camera_indices[:, 0], :, 2]
    torch.testing.assert_close(1.0 / rays.metadata["directions_norm"][:, 0], -(rays.directions * axes).sum(-1))
    away = (rays.origins[:, None] - torch.tensor(CENTRES)).norm(dim=-1).amin(dim=1) > 1e-5
    assert away.tolist() == [False] * 100 + [True] * 300


def test_without_lines_all_rays_begin_at_the_cameras() -> None:
    views, cameras = make_views(CENTRES), make_cameras(CENTRES)
    depth = wall(views)
    alone = [depth[0], torch.zeros_like(depth[1]), torch.zeros_like(depth[2])]
    v, u = torch.nonzero(alone[0] > 0, as_tuple=True)
    pixel = torch.stack([u, v], dim=-1) + 0.5
    known = MatchedDepth(
        torch.zeros_like(u), pixel, alone[0][v, u], lines=sight_lines.find(views, NEAREST, alone, alone)
    )
    rays, distance = known.draw(cameras, 50, between=1.0)
    assert len(rays) == len(distance) == 50
    torch.testing.assert_close(rays.origins, torch.tensor(CENTRES[:1]).expand(50, 3))
