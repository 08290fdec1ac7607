"""Masks in a folder beside the images, trained by where that is asked for: of LLFF's and COLMAP's captures."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nerfstudio.utils.rich_utils import CONSOLE
from rich.markup import escape

from ddm_training.errors import InputError
from diffusionerf_ns.dataparsers.base import FewViewBaseConfig
from diffusionerf_ns.dataparsers.images import list_images

FOLDER = "masks"


@dataclass
class MaskedFewViewConfig(FewViewBaseConfig):
    """Of captures whose masks are files of their own."""

    mask_folder: Path | None = None
    """Folder of the masks. Unset: looked for beside the images."""
    masked_training: bool = False
    """Draw training pixels inside the masks only. DTU's protocol uses masks for evaluation alone."""


def are_trained_by(data: Path, name: str, config: MaskedFewViewConfig) -> bool:
    """Whether masks are asked for; where they are not but there are some, that is said.

    Args:
        data: folder of the capture.
        name: of the folder of masks in it.
        config: says whether and where.

    Raises:
        InputError: a folder is given that would not be used.
    """
    if config.masked_training:
        return True
    if config.mask_folder is not None:
        raise InputError(f"--mask-folder {config.mask_folder} would not be used: give --masked-training True as well.")
    if (data / name).is_dir():
        said = f"The masks of {escape(str(data))} are not used; --masked-training True trains inside them only."
        CONSOLE.print(said)
    return False


def find_masks(
    names: Sequence[str], used: Iterable[int], data: Path, config: MaskedFewViewConfig
) -> tuple[Path, ...] | None:
    """The mask of each image, where they are asked for; None: no masks.

    That of a.jpg is a.jpg.png, as COLMAP itself reads masks, or a with a suffix of images.

    Args:
        names: of the images, in their folder.
        used: images that must have one; of others it may be any path.
        data: folder of the capture.
        config: says whether and where.

    Raises:
        InputError: a mask is missing, or a folder is given that would not be used.
    """
    if not are_trained_by(data, FOLDER, config):
        return None
    folder = config.mask_folder or data / FOLDER
    files = {
        str(parent / path.stem): path
        for parent in {Path(name).parent for name in names}
        for path in list_images(folder / parent)
    }
    if not files:
        raise InputError(f"--masked-training: no masks were found in {folder}; give --mask-folder.")
    masks = [files.get(name) or files.get(str(Path(name).with_suffix(""))) for name in names]
    if missing := [names[i] for i in used if masks[i] is None]:
        raise InputError(
            f"{folder}: the masks of {', '.join(missing[:5])} are missing; expected {missing[0]}.png or "
            f"{Path(missing[0]).with_suffix('.png')}."
        )
    return tuple(mask or Path() for mask in masks)
