"""Projection matrices, as DTU's calibration and IDR's files of cameras have them: checked, and taken apart."""

import numpy as np
from jaxtyping import Float

from ddm_training.errors import InputError


def checked_projection(matrix: np.ndarray, where: str) -> Float[np.ndarray, "3 4"]:
    """The matrix, in double precision.

    Raises:
        InputError: it is no projection.
    """
    if matrix.shape != (3, 4) or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix[:, :3])) < 1e-9:
        raise InputError(f"{where}: expected a 3 x 4 projection of finite numbers and full rank.")
    return matrix.astype(np.float64)


def decompose(
    projections: Float[np.ndarray, "n 3 4"],
) -> tuple[Float[np.ndarray, "n 4"], Float[np.ndarray, "n 3 4"]]:
    """P = K [R | -R c] -> fx, fy, cx, cy and camera to world [R^T | c] with OpenCV axes.

    RQ by way of QR of the reversed rows; signs are chosen so that K has a positive diagonal and R is a rotation.
    DTU's skew is below .001 pixels at 1600 x 1200 and is left out.
    """
    intrinsics, poses = [], []
    for projection in projections:
        block = projection[:, :3] * np.sign(np.linalg.det(projection[:, :3]))
        q, r = np.linalg.qr(block[::-1].T)
        k, rotation = r.T[::-1, ::-1], q.T[::-1]
        signs = np.sign(np.diag(k))
        k, rotation = k * signs, signs[:, None] * rotation
        k = k / k[2, 2]
        centre = -np.linalg.solve(projection[:, :3], projection[:, 3])
        intrinsics.append([k[0, 0], k[1, 1], k[0, 2], k[1, 2]])
        poses.append(np.concatenate([rotation.T, centre[:, None]], axis=1))
    return np.array(intrinsics), np.stack(poses)
