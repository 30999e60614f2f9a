"""Image files of a source, wherever its mirrors put them below the folder that the user names."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from medsyn_jax.core.errors import UserError, shortened

NOT_IN_TABLE = "image in no table"  # a reason to leave an image out


def images_below(
    root: Path, suffixes: Sequence[str], name_of: Callable[[str], str]
) -> dict[str, str]:
    """Lists the images of a folder; none is opened.

    Args:
      root: the folder. Links to folders are followed in it, not farther down.
      suffixes: of images, in lower case.
      name_of: from a path below root, with slashes and without suffix, to the name of the image in
        the tables; "" for no image of the source.

    Returns:
      name -> path. Of several files of one name, the first in sorted order.

    Raises:
      UserError: root is no folder.
    """
    if not root.is_dir():
        raise UserError(f"no folder: {root} does not exist: set ingest.path")
    images: dict[str, str] = {}
    links = [path for path in sorted(root.iterdir()) if path.is_symlink()]
    for top in (root, *links):  # os.walk follows a link at the top alone
        for place, folders, names in os.walk(top):
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
            for name in sorted(names):
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in suffixes and not name.startswith("."):
                    path = Path(place) / stem
                    images.setdefault(name_of(path.relative_to(root).as_posix()), f"{path}{suffix}")
    images.pop("", None)
    return images


def table_in(root: Path, *names: str) -> Path:
    """The first of the tables that is in a folder; the path of the first where none is."""
    return next((root / name for name in names if (root / name).is_file()), root / names[0])


def only(root: Path, pattern: str, advice: str) -> Path:
    """The one file of a pattern in a folder; raises UserError, with `advice` if there are more."""
    paths = sorted(root.glob(pattern))
    if not paths:
        raise UserError(f"no table: {root / pattern} does not exist: check the path")
    if len(paths) > 1:
        names = shortened(", ".join(path.name for path in paths), 300)
        raise UserError(f"several tables: {root}: {names}: {advice}")
    return paths[0]
