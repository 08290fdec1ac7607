"""Controls and panels of the viewer, on a real viser server; the browser is driven in test_viewer_browser.py."""

import base64
import contextlib
import io
import re
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import viser
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import Frustums, RaySamples
from nerfstudio.viewer.viewer import Viewer
from PIL import Image

from ddm_training import rgbd
from ddm_training.errors import InputError
from ddm_training.rgbd import RgbdSpec
from ddm_training.unet import make_scheduler
from diffusionerf_ns import viewer as ours
from diffusionerf_ns.contract import PatchBatch
from diffusionerf_ns.inspection import DepthRange
from diffusionerf_ns.patches import camera_rays, random_rotation, window_directions
from diffusionerf_ns.prior import PatchPrior
from diffusionerf_ns.score_loss import JudgedPatch

SIZE = 16
SPEC = RgbdSpec(patch_size=SIZE, focal=40.0, focal_range=(30.0, 50.0), image_size=(64, 48))


def stub(kind: type, **attributes: Any) -> Any:
    """An object of a class with these attributes and nothing else of it running."""
    made = object.__new__(kind)
    made.__dict__.update(attributes)
    return made


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def make_server(port: int) -> viser.ViserServer:
    """viser looks at all processes of the machine when it starts, and fails where one ends meanwhile."""
    for _ in range(5):
        with contextlib.suppress(psutil.NoSuchProcess):
            return viser.ViserServer(port=port, verbose=False)
    raise AssertionError("no viser server")


def make_config() -> SimpleNamespace:
    weights = {"frustum_weight": 0.01, "foreground_weight": 1.0, "distortion_weight": 0.02}
    return SimpleNamespace(**dict.fromkeys(ours.TERMS, 0.0) | weights, score_weight=1.0, tau_start=0.1, tau_fixed=None)


def make_prior() -> PatchPrior:
    return PatchPrior(lambda x, t: 0.1 * x, make_scheduler().alphas_cumprod, SPEC)


class Model(SimpleNamespace):
    """What the panel asks of a model; `lost` makes its prior one that cannot be loaded."""

    lost = False

    @property
    def prior(self) -> PatchPrior:
        if self.lost:
            raise InputError("no prior 'lost'")
        return make_prior()

    def patch_spec(self) -> RgbdSpec:
        return self.prior.spec


class Views(SimpleNamespace):
    """What the panel asks of a model's views."""

    def depth_range(self) -> tuple[float, float]:
        return 0.5, 4.0

    def depth_colour_range(self) -> tuple[float, float]:
        return self.depth_colours.by_hand or self.depth_range()


def cameras(count: int) -> Cameras:
    poses = torch.eye(3, 4).repeat(count, 1, 1)
    poses[:, 0, 3] = torch.arange(count)
    return Cameras(poses, fx=66.0, fy=66.0, cx=48.0, cy=36.0, width=96, height=72)


class Data(list):
    """A data set of so many cameras."""

    def __init__(self, count: int) -> None:
        super().__init__(range(count))
        self.cameras = cameras(count)


@pytest.fixture
def server():
    made = make_server(free_port())
    yield made
    made.stop()


class Panel:
    """The panel on a server, and the run's folder."""

    def __init__(self, server: viser.ViserServer, folder: Path, *, training: bool = True, **changes: Any) -> None:
        values = {"config": make_config(), "step": 7, "last_patch": None}
        values |= {"views": Views(depth_colours=DepthRange(), verdict_tau=0.1)}
        values |= {"tau": 0.05, "metres_per_unit": 2.0} | changes
        self.model, self.server, self.folder = Model(**values), server, folder
        self.lock = threading.Lock()
        self.data = SimpleNamespace(
            config=SimpleNamespace(image_patch_share=0.25),
            train_dataset=Data(3),
            eval_dataset=Data(2),
            images_with_patches=lambda spec: None,
        )
        settings = SimpleNamespace(
            websocket_port=server.get_port(), websocket_port_default=7007, camera_frustum_scale=0.1
        )
        viewer = stub(
            Viewer,
            viser_server=server,
            config=settings,
            trainer=object() if training else None,
            train_lock=self.lock,
            pipeline=SimpleNamespace(datamanager=self.data),
            log_filename=folder / "viewer.log",
            viewer_info=[],
            ready=True,
            render_statemachines={},
        )
        self.panel = ours.InspectionPanel(self.model)
        self.panel._setup(viewer)

    def set(self, **values: Any) -> None:
        """As a user would, e.g. ``set(Prior_on=False)``."""
        for label, value in values.items():
            self.handle(label.replace("_", " ")).value = value

    def handle(self, label: str) -> Any:
        for handle in self.server.gui._gui_input_handle_from_id.values():
            created = getattr(handle, "_impl", None)
            if created is not None and created.label == label:
                return handle
        raise KeyError(label)

    def log(self) -> str:
        file = self.folder / ours.LOG_FILE
        return file.read_text() if file.exists() else ""


def eventually(condition, seconds: float = 20.0) -> bool:
    """Callbacks run in threads of the server."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.fixture
def panel(server, tmp_path):
    return Panel(server, tmp_path)


@pytest.mark.parametrize(
    ("values", "field", "new", "line"),
    [
        ({"Prior_on": False}, "score_weight", 0.0, "score_weight 1.0 -> 0.0"),
        ({"Weight": 0.5}, "score_weight", 0.5, "score_weight 1.0 -> 0.5"),
        ({"Fixed_tau": True}, "tau_fixed", 0.1, "tau_fixed None -> 0.1"),
        ({"Frustum": False}, "frustum_weight", 0.0, "frustum_weight 0.01 -> 0.0"),
        ({"Foreground": False}, "foreground_weight", 0.0, "foreground_weight 1.0 -> 0.0"),
        ({"Distortion": False}, "distortion_weight", 0.0, "distortion_weight 0.02 -> 0.0"),
    ],
)
def test_a_control_sets_what_the_next_step_reads_and_the_log_says_so(panel, values, field, new, line):
    panel.set(**values)
    assert eventually(lambda: getattr(panel.model.config, field) == new)
    assert eventually(lambda: panel.log() == f"after step 7: {line}\n")


def test_the_mix_of_patch_sources_reaches_the_data_manager(panel):
    panel.set(Image_patches=0.6)
    assert eventually(lambda: panel.data.config.image_patch_share == 0.6)
    assert eventually(lambda: "image_patch_share 0.25 -> 0.6" in panel.log())


def test_a_paused_term_returns_with_its_own_weight(panel):
    panel.set(Distortion=False)
    assert eventually(lambda: panel.model.config.distortion_weight == 0.0)
    panel.set(Distortion=True)
    assert eventually(lambda: panel.model.config.distortion_weight == 0.02)


def test_the_prior_returns_with_the_weight_of_the_slider(panel):
    panel.set(Prior_on=False)
    assert eventually(lambda: panel.model.config.score_weight == 0.0)
    panel.set(Weight=2.0)
    time.sleep(0.2)
    assert panel.model.config.score_weight == 0.0, "off stays off"
    panel.set(Prior_on=True)
    assert eventually(lambda: panel.model.config.score_weight == 2.0)


def test_the_schedule_of_tau_returns(panel):
    panel.set(Fixed_tau=True)
    panel.set(Tau=0.3)
    assert eventually(lambda: panel.model.config.tau_fixed == 0.3)
    panel.set(Fixed_tau=False)
    assert eventually(lambda: panel.model.config.tau_fixed is None)


def test_tau_of_the_schedule_is_not_touched_by_the_slider(panel):
    panel.set(Tau=0.3)
    time.sleep(0.2)
    assert panel.model.config.tau_fixed is None
    assert panel.log() == ""


def test_nothing_changes_within_a_step(panel):
    with panel.lock:
        panel.set(Frustum=False)
        time.sleep(0.3)
        assert panel.model.config.frustum_weight == 0.01
    assert eventually(lambda: panel.model.config.frustum_weight == 0.0)


def test_of_many_fast_changes_the_last_one_stays(panel):
    with panel.lock:
        for weight in np.linspace(0.1, 3.0, 30).tolist():
            panel.set(Weight=weight)
    assert eventually(lambda: panel.model.config.score_weight == 3.0)
    time.sleep(0.3)
    assert panel.model.config.score_weight == 3.0


def test_a_term_that_is_not_computed_has_no_switch(panel):
    with pytest.raises(KeyError):
        panel.handle("Stereo depth")


def test_a_prior_that_cannot_be_loaded_stays_off_and_training_goes_on(server, tmp_path, capsys):
    panel = Panel(server, tmp_path, lost=True)
    panel.model.config.score_weight = 0.0
    panel.set(Prior_on=False)
    panel.set(Prior_on=True)
    assert eventually(lambda: panel.handle("Prior on").value is False)
    assert panel.model.config.score_weight == 0.0


def test_image_patches_that_do_not_fit_are_refused(server, tmp_path):
    panel = Panel(server, tmp_path)

    def refuse(spec: Any) -> None:
        raise InputError("too small")

    panel.data.images_with_patches = refuse
    panel.set(Image_patches=0.5)
    assert eventually(lambda: panel.data.config.image_patch_share == 0.0)
    assert panel.handle("Image patches").value == 0.0


def test_the_depth_range_starts_at_the_scenes_and_is_adjustable(panel):
    assert (panel.handle("Near").value, panel.handle("Far").value) == (0.5, 4.0)
    assert panel.handle("Near").disabled
    panel.set(Range="by hand")
    assert eventually(lambda: panel.model.views.depth_colours.by_hand == (0.5, 4.0))
    assert not panel.handle("Near").disabled
    panel.set(Far=2.5)
    assert eventually(lambda: panel.model.views.depth_colours.by_hand == (0.5, 2.5))
    panel.set(Far=0.1)
    assert eventually(lambda: panel.model.views.depth_colours.by_hand == (0.5, 0.5001)), "never empty"
    panel.set(Range="of the scene")
    assert eventually(lambda: panel.model.views.depth_colours.by_hand is None)
    assert panel.log() == "", "what is shown is no change of the training"


def test_a_finished_run_has_no_controls_of_training(server, tmp_path):
    panel = Panel(server, tmp_path, training=False)
    with pytest.raises(KeyError):
        panel.handle("Weight")
    panel.set(Verdict_tau=0.4)
    assert eventually(lambda: panel.model.views.verdict_tau == 0.4)


def patch(pose: torch.Tensor, offset: tuple[float, float] = (24.0, 16.0)) -> JudgedPatch:
    directions = window_directions(SIZE, 40.0, offset, (64, 48))
    rays = camera_rays(directions.to(pose), pose, 40.0, camera=0)
    before = camera_rays(torch.rand(3, 3, 3), torch.eye(3, 4), 40.0, camera=0)
    samples = RaySamples(
        Frustums(
            origins=torch.cat([before.origins, rays.origins])[:, None].expand(-1, 5, 3),
            directions=torch.cat([before.directions, rays.directions])[:, None].expand(-1, 5, 3),
            starts=torch.zeros(9 + SIZE**2, 5, 1),
            ends=torch.ones(9 + SIZE**2, 5, 1),
            pixel_area=torch.ones(9 + SIZE**2, 5, 1),
        )
    )
    batch = PatchBatch(first_ray=9, size=SIZE, rgb=[None], cameras=[0], poses=[pose])
    z = torch.full((1, SIZE, SIZE), 3.0)
    x = rgbd.encode(torch.rand(1, 3, SIZE, SIZE), z)
    return JudgedPatch.of(samples, batch, x, torch.ones_like(x), 0.1)


def some_pose() -> torch.Tensor:
    return torch.cat([random_rotation(3.0), torch.tensor([[1.0], [2.0], [3.0]])], dim=1)


def test_a_patch_in_the_middle_of_its_camera_is_drawn_as_that_camera():
    pose = some_pose()
    shown = patch(pose)
    torch.testing.assert_close(shown.origin, pose[:, 3])
    rotation, fov = ours.corner_camera(shown.corners.double().numpy())
    np.testing.assert_allclose(rotation, pose[:, :3].numpy() @ ours.OPENGL_TO_OPENCV, atol=1e-5)
    # Corner rays go through pixel centres, half a pixel inside of the window.
    assert fov == pytest.approx(2 * np.arctan(0.5 * (SIZE - 1) / 40.0), rel=0.01)


def test_a_patch_of_rays_that_a_camera_optimizer_moves_keeps_nothing_of_the_step():
    shown = patch(some_pose().requires_grad_())
    assert not shown.origin.requires_grad
    assert not shown.corners.requires_grad


def test_a_patch_beside_the_optical_axis_is_drawn_looking_through_its_middle():
    pose = some_pose()
    rotation, _ = ours.corner_camera(patch(pose, (44.0, 30.0)).corners.double().numpy())
    middle = torch.tensor([(52.0 - 32.0) / 40.0, -(38.0 - 24.0) / 40.0, -1.0])
    towards = (pose[:, :3] @ middle / middle.norm()).numpy()
    assert towards @ rotation[:, 2] > np.cos(np.radians(1.0))
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(3), atol=1e-6)
    assert np.linalg.det(rotation) == pytest.approx(1.0)


def test_the_patch_panel_shows_colour_depth_clean_depth_and_score():
    shown = patch(some_pose())
    picture = ours.patch_picture(shown, make_prior(), near=1.0, far=5.0)
    assert picture.shape == (6 * SIZE, 6 * SIZE, 3)
    colour, depth = picture[1 : 3 * SIZE : 3, 1 : 3 * SIZE : 3], picture[: 3 * SIZE, 3 * SIZE :]
    torch.testing.assert_close(colour, 0.5 * (shown.x[:3].permute(1, 2, 0) + 1.0))
    assert (depth == depth[0, 0]).all(), "one depth, one colour"
    clean = picture[3 * SIZE :, : 3 * SIZE]
    assert not torch.allclose(clean[0, 0], depth[0, 0]), "a positive score brings surfaces nearer"


def test_the_panel_is_refreshed_every_few_steps_and_only_while_somebody_looks(panel, monkeypatch):
    panel.model.last_patch = patch(some_pose())
    panel.panel.after_step(20)
    assert panel.panel._patch.content == "No patch yet."
    monkeypatch.setattr(panel.server, "get_clients", lambda: {0: None})
    panel.panel.after_step(21)
    content = panel.panel._patch.content
    assert content.startswith("Step 21, tau 0.100")
    with Image.open(io.BytesIO(base64.b64decode(re.findall(r"base64,([^)]*)\)", content)[0]))) as picture:
        assert picture.size == (6 * SIZE, 6 * SIZE)
    panel.panel.after_step(22)
    assert panel.panel._patch.content == content, "too soon"
    monkeypatch.setattr(ours.time, "time", lambda: 1e12)
    panel.panel.after_step(24)
    assert panel.panel._patch.content == content, "too few steps"
    panel.panel.after_step(26)
    assert panel.panel._patch.content.startswith("Step 26")


def test_test_cameras_stand_in_the_scene(panel):
    nodes = panel.server.scene._handle_from_node_name
    assert {"/test_cameras/camera_00000", "/test_cameras/camera_00001"} <= set(nodes)
    np.testing.assert_allclose(nodes["/test_cameras/camera_00001"].position, [10.0, 0.0, 0.0])


def test_a_new_client_starts_at_a_training_camera(panel):
    client = stub(viser.ClientHandle, camera=SimpleNamespace(), atomic=threading.Lock)
    panel.panel._start_at_training_camera(client)
    np.testing.assert_allclose(client.camera.position, [10.0, 0.0, -0.3], rtol=1e-6)  # beyond its own frustum
    assert client.camera.fov == pytest.approx(2 * np.arctan(36.0 / 66.0), rel=1e-5)


def test_a_port_in_use_is_named_with_the_one_that_is_taken_instead(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = make_server(port)
        try:
            viewer = stub(
                Viewer,
                viser_server=server,
                config=SimpleNamespace(websocket_port=port, websocket_port_default=7007),
                viewer_info=[f"Viewer running locally at: http://localhost:{port} (listening on 0.0.0.0)"],
            )
            ours.say_port(viewer)
        finally:
            server.stop()
    said = capsys.readouterr().out
    assert f"Port {port} is in use" in said
    assert str(server.get_port()) in said
    assert f":{server.get_port()} " in viewer.viewer_info[0]


@pytest.mark.parametrize(("device", "before", "after"), [("cpu", 512, 128), ("cpu", 64, 64), ("cuda", 512, 512)])
def test_the_viewer_begins_small_without_a_gpu(device, before, after):
    panel = SimpleNamespace(_max_res=SimpleNamespace(value=before), max_res=before)
    ours.draw_small_on_cpu(SimpleNamespace(viewer_state=SimpleNamespace(control_panel=panel)), device)
    assert panel._max_res.value == after
    ours.draw_small_on_cpu(SimpleNamespace(viewer_state=None), device)
