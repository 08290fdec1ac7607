"""Controls and panels in nerfstudio's viewer: what the prior sees and wants, and knobs that act on the next step.

nerfstudio's viewer finds the `InspectionPanel` of the model when it opens and calls `_setup`. Without a viewer nothing
of this module does anything.
"""

import base64
import contextlib
import io
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import viser
import viser.transforms
from jaxtyping import Float
from nerfstudio.utils import colormaps
from nerfstudio.utils.rich_utils import CONSOLE
from nerfstudio.viewer.render_state_machine import RenderAction
from nerfstudio.viewer.viewer import VISER_NERFSTUDIO_SCALE_RATIO, Viewer
from nerfstudio.viewer.viewer_elements import ViewerControl
from PIL import Image
from rich.markup import escape
from torch import Tensor

from ddm_training import rgbd
from ddm_training.errors import InputError
from diffusionerf_ns.inspection import score_picture
from diffusionerf_ns.prior import PatchPrior
from diffusionerf_ns.score_loss import JudgedPatch

if TYPE_CHECKING:
    from diffusionerf_ns.model import DiffusioNeRFModel

LOG_FILE = "viewer_changes.log"
"""In the run's folder: one line for each change made in the viewer."""
STEPS_PER_REFRESH = 5
"""Steps between two refreshes of the panel of the last patch, at most one a second."""
MAX_TEST_CAMERAS = 50
CPU_RESOLUTION = 128
"""Pixels up to which the viewer draws at first where there is no GPU: training waits for every frame, and one at
nerfstudio's 512 takes half a minute there."""
OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0])
TERMS = {
    "chroma_weight": "Chroma",
    "frustum_weight": "Frustum",
    "foreground_weight": "Foreground",
    "distortion_weight": "Distortion",
    "stereo_depth_weight": "Stereo depth",
    "completed_depth_weight": "Completed depth",
}


def draw_small_on_cpu(trainer: Any, device: torch.device | str) -> None:
    """Lower the viewer's "Max res" to what a CPU draws in a moment; it can be raised again in the viewer.

    Args:
        trainer: nerfstudio's; one without a viewer is left alone.
        device: that renders.
    """
    panel = getattr(getattr(trainer, "viewer_state", None), "control_panel", None)
    if panel is not None and torch.device(device).type == "cpu":
        panel._max_res.value = min(CPU_RESOLUTION, panel.max_res)  # as nerfstudio's own presets of resolution do


class InspectionPanel(ViewerControl):
    """The folder "DiffusioNeRF" of the viewer, and the cameras that it adds to the scene.

    Args:
        model: whose config the controls set.
    """

    viewer: Viewer

    def __init__(self, model: "DiffusioNeRFModel") -> None:
        self._model = model
        self._ready = False
        self._refreshed = (-STEPS_PER_REFRESH, 0.0)

    def _setup(self, viewer: Viewer) -> None:
        super()._setup(viewer)
        say_port(viewer)
        gui = viewer.viser_server.gui
        with gui.add_folder("DiffusioNeRF"):
            if viewer.trainer is not None:
                self._add_prior_controls()
                self._add_term_controls()
            self._add_depth_range()
            with gui.add_folder("Verdict of the prior"):
                tau = gui.add_slider(
                    "Verdict tau",
                    0.0,
                    max(0.5, self._model.views.verdict_tau),
                    0.01,
                    self._model.views.verdict_tau,
                    hint="Noise level for PriorScore... and PriorCleanDepth; training has its own",
                )
                tau.on_update(lambda _: self._display(lambda: setattr(self._model.views, "verdict_tau", tau.value)))
            if viewer.trainer is not None:
                with gui.add_folder("Last patch"):
                    self._patch = gui.add_markdown("No patch yet.")
        self._add_test_cameras()
        viewer.viser_server.on_client_connect(self._start_at_training_camera)
        self._ready = True

    # Changes

    def _locked(self) -> contextlib.AbstractContextManager[Any]:
        """No training step and no rendering runs meanwhile."""
        return self.viewer.train_lock or contextlib.nullcontext()

    def _change(self, owner: Any, field: str, value: Callable[[], Any]) -> None:
        """Set a field of a config between two steps, log it and render again.

        Args:
            owner: of the field.
            field: its name.
            value: gives the new value; asked for under the lock, so that of many fast changes the last one stays.
        """
        with self._locked():
            old, new = getattr(owner, field), value()
            if old == new:
                return
            setattr(owner, field, new)
            step = self._model.step
        line = f"after step {step}: {field} {old} -> {new}"
        CONSOLE.print(f"Viewer, {line}")
        with (self.viewer.log_filename.parent / LOG_FILE).open("a") as file:
            file.write(line + "\n")
        self._render_again()

    def _display(self, change: Callable[[], None]) -> None:
        """Change what is shown only: nothing that training knows of."""
        change()
        self._render_again()

    def _render_again(self) -> None:
        if not self.viewer.ready:
            return
        for number, client in self.viewer.viser_server.get_clients().items():
            machine = self.viewer.render_statemachines.get(number)
            if machine is not None:  # the client may be leaving
                machine.action(RenderAction("move", self.viewer.get_camera_state(client)))

    # Training controls

    def _add_prior_controls(self) -> None:
        gui, config = self.viewer.viser_server.gui, self._model.config
        data: Any = self.viewer.pipeline.datamanager
        weight = config.score_weight or 1.0
        with gui.add_folder("Prior"):
            on = gui.add_checkbox("Prior on", config.score_weight > 0.0)
            slider = gui.add_slider(
                "Weight", 0.0, max(4.0, 2.0 * weight), 0.05, weight, hint="Overall factor of the score term"
            )
            fixed = gui.add_checkbox("Fixed tau", config.tau_fixed is not None, hint="Instead of the schedule")
            level = config.tau_start if config.tau_fixed is None else config.tau_fixed
            tau = gui.add_slider("Tau", 0.0, max(0.5, level), 0.005, level)
            share = gui.add_slider(
                "Image patches",
                0.0,
                1.0,
                0.05,
                data.config.image_patch_share,
                hint="Share of patches whose colours come from a training image",
            )

        def fits() -> bool:
            return share.value == 0.0 or not self._refused(lambda: data.images_with_patches(self._model.patch_spec()))

        def set_weight(_: Any) -> None:
            if on.value and slider.value > 0.0 and (self._refused(lambda: self._model.prior) or not fits()):
                on.value = False
            self._change(config, "score_weight", lambda: slider.value if on.value else 0.0)

        def set_share(_: Any) -> None:
            if not fits():
                share.value = 0.0
            self._change(data.config, "image_patch_share", lambda: share.value)

        for handle in (on, slider):
            handle.on_update(set_weight)
        for handle in (fixed, tau):
            handle.on_update(lambda _: self._change(config, "tau_fixed", lambda: tau.value if fixed.value else None))
        share.on_update(set_share)

    def _refused(self, attempt: Callable[[], Any]) -> bool:
        """Whether an attempt fails by a mistake of the user's, which is then told: training must not die of it."""
        try:
            attempt()
        except InputError as error:
            CONSOLE.print(f"[yellow]Viewer: {escape(str(error))}")
            for client in self.viewer.viser_server.get_clients().values():
                client.add_notification("Not possible", str(error), color="red")
            return True
        return False

    def _add_term_controls(self) -> None:
        gui, config = self.viewer.viser_server.gui, self._model.config
        with gui.add_folder("Geometric terms"):
            for field, label in TERMS.items():
                weight = getattr(config, field)
                if weight > 0.0:
                    self._add_term(field, label, weight)

    def _add_term(self, field: str, label: str, weight: float) -> None:
        box = self.viewer.viser_server.gui.add_checkbox(label, True, hint="Off pauses this term")
        box.on_update(lambda _: self._change(self._model.config, field, lambda: weight if box.value else 0.0))

    # What is shown

    def _add_depth_range(self) -> None:
        gui = self.viewer.viser_server.gui
        near, far = self._model.views.depth_range()
        with gui.add_folder("Depth colours"):
            choice = gui.add_dropdown("Range", ("of the scene", "by hand"))
            numbers = [gui.add_number(n, round(v, 4), step=1e-4) for n, v in (("Near", near), ("Far", far))]
        for number in numbers:
            number.disabled = True

        def choose(_: Any) -> None:
            hand = choice.value == "by hand"
            for number in numbers:
                number.disabled = not hand
            low, high = (float(number.value) for number in numbers)
            with self._locked():
                self._model.views.depth_colours.by_hand = (low, max(high, low + 1e-4)) if hand else None
            self._render_again()

        for handle in (choice, *numbers):
            handle.on_update(choose)

    def _start_at_training_camera(self, client: viser.ClientHandle) -> None:
        """With few views there is little to see from anywhere else.

        A little in front of the camera: its frustum, drawn with the training image on it, would cover the rendering.
        """
        dataset: Any = getattr(self.viewer.pipeline.datamanager, "train_dataset", None)
        if dataset is None:
            return
        cameras, i = dataset.cameras, len(dataset) // 2
        pose = cameras.camera_to_worlds[i].cpu().numpy()
        with client.atomic():
            front = 3.0 * self.viewer.config.camera_frustum_scale * pose[:, 2]  # OpenGL: z looks backwards
            client.camera.position = pose[:, 3] * VISER_NERFSTUDIO_SCALE_RATIO - front
            client.camera.wxyz = viser.transforms.SO3.from_matrix(pose[:, :3] @ OPENGL_TO_OPENCV).wxyz
            client.camera.fov = float(2.0 * torch.atan(cameras.cy[i] / cameras.fy[i]))

    def _add_test_cameras(self) -> None:
        dataset: Any = getattr(self.viewer.pipeline.datamanager, "eval_dataset", None)
        if dataset is None:
            return
        cameras = dataset.cameras
        for i in np.unique(np.linspace(0, len(cameras) - 1, min(MAX_TEST_CAMERAS, len(cameras))).astype(int)).tolist():
            pose = cameras.camera_to_worlds[i].cpu().numpy()
            self.viser_server.scene.add_camera_frustum(
                name=f"/test_cameras/camera_{i:05d}",
                fov=float(2.0 * torch.atan(cameras.cy[i] / cameras.fy[i])),
                aspect=float(cameras.width[i] / cameras.height[i]),
                scale=0.7 * self.viewer.config.camera_frustum_scale,
                color=(80, 160, 255),
                wxyz=viser.transforms.SO3.from_matrix(pose[:, :3] @ OPENGL_TO_OPENCV).wxyz,
                position=pose[:, 3] * VISER_NERFSTUDIO_SCALE_RATIO,
            )

    def after_step(self, step: int) -> None:
        """Show the last patch, where somebody looks."""
        patch = self._model.last_patch
        last_step, last_time = self._refreshed
        if not self._ready or patch is None or step < last_step + STEPS_PER_REFRESH or time.time() < last_time + 1.0:
            return
        if not self.viewer.viser_server.get_clients():
            return
        self._refreshed = (step, time.time())
        near, far = self._model.views.depth_colour_range()
        scale = self._model.metres_per_unit
        picture = patch_picture(patch, self._model.prior, near * scale, far * scale)
        self._patch.content = (
            f"Step {step}, tau {patch.tau:.3f}, {scale:.3g} m per scene unit. Colour | depth / the prior's clean "
            f"estimate of depth | score\n\n![patch](data:image/png;base64,{_png(picture)})"
        )
        self._draw_patch_camera(patch)

    def _draw_patch_camera(self, patch: JudgedPatch) -> None:
        rotation, fov = corner_camera(patch.corners.cpu().double().numpy())
        rgb = (255.0 * (0.5 * (patch.x[:3] + 1.0)).clamp(0.0, 1.0)).byte()
        self.viser_server.scene.add_camera_frustum(
            name="/patch_camera",
            fov=fov,
            aspect=1.0,
            scale=2.0 * self.viewer.config.camera_frustum_scale,
            color=(255, 140, 0),
            image=rgb.permute(1, 2, 0).cpu().numpy(),
            wxyz=viser.transforms.SO3.from_matrix(rotation).wxyz,
            position=patch.origin.cpu().numpy() * VISER_NERFSTUDIO_SCALE_RATIO,
        )


def say_port(viewer: Viewer) -> None:
    """Where the wanted port is in use, viser takes the next free one: say so, and correct nerfstudio's banner."""
    wanted = viewer.config.websocket_port or viewer.config.websocket_port_default
    taken = viewer.viser_server.get_port()
    if taken != wanted:
        CONSOLE.print(f"[yellow]Port {wanted} is in use: the viewer is at port {taken}, http://localhost:{taken}")
        viewer.viewer_info = [line.replace(f":{wanted}", f":{taken}") for line in viewer.viewer_info]


def patch_picture(patch: JudgedPatch, prior: PatchPrior, near: float, far: float) -> Float[Tensor, "h w 3"]:
    """Four tiles: colour and depth above, the prior's clean estimate of depth and its score of depth below.

    Args:
        patch: see there.
        prior: that judged it.
        near: of depth's colours, metres.
        far: of depth's colours, metres.
    """
    sigma = prior.sigma(patch.tau)
    rgb, z = rgbd.decode(patch.x, prior.spec.near)
    clean = rgbd.decode_depth(patch.x[3] + sigma**2 * patch.score[3], prior.spec.near)
    depths = [colormaps.apply_depth_colormap(d[..., None], near_plane=near, far_plane=far).to(rgb) for d in (z, clean)]
    tiles = [rgb.permute(1, 2, 0), depths[0], depths[1], score_picture(patch.score[3:], sigma).to(rgb)]
    tiles = [t.repeat_interleave(3, 0).repeat_interleave(3, 1) for t in tiles]
    return torch.cat([torch.cat(tiles[:2], dim=1), torch.cat(tiles[2:], dim=1)], dim=0)


def corner_camera(corners: Float[np.ndarray, "4 3"]) -> tuple[Float[np.ndarray, "3 3"], float]:
    """The symmetric camera that looks through the middle of a window: rotation (OpenCV convention) and field of view.

    A window beside the optical axis is seen at a slant, which such a camera cannot show; its middle and size are right.

    Args:
        corners: directions of the window's corners: upper left, upper right, lower left, lower right.
    """
    corners = corners / np.linalg.norm(corners, axis=-1, keepdims=True)
    forward = corners.sum(0) / np.linalg.norm(corners.sum(0))
    right = corners[1] + corners[3] - corners[0] - corners[2]
    right -= forward * (right @ forward)
    right /= np.linalg.norm(right)
    top, bottom = corners[0] + corners[1], corners[2] + corners[3]
    cosine = top @ bottom / (np.linalg.norm(top) * np.linalg.norm(bottom))
    fov = float(np.arccos(np.clip(cosine, -1.0, 1.0)))
    return np.stack([right, np.cross(forward, right), forward], axis=1), fov


def _png(picture: Float[Tensor, "h w 3"]) -> str:
    buffer = io.BytesIO()
    Image.fromarray((255.0 * picture.clamp(0.0, 1.0)).byte().cpu().numpy()).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
