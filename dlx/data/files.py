"""Where the authors' own files lie: found, downloaded where there is internet, and verified."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import shutil
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from dlx.errors import BadInput


def folders(name: str, installed: Sequence[str] = ()) -> list[Path]:
    """Where a data set is looked for: DLX_DATA_DIR/name, DLX_DATA_DIR itself, the cache, and the
    folders of packages that carry it."""
    given = os.environ.get("DLX_DATA_DIR")
    roots = [Path(given) / name, Path(given)] if given else []
    return [*roots, cache() / name, *map(Path, installed)]


def cache() -> Path:
    """The user's cache folder, where downloads go where DLX_DATA_DIR is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dlx" / "data"


def find(name: str, file: str, url: str, installed: Sequence[str] = ()) -> Path:
    """The path of one of a data set's files, downloaded from `url` where it is nowhere.

    Args:
      name: of the data set.
      file: its name as its authors publish it.
      url: the authors' address of the file.
      installed: folders of packages that carry the set.

    Raises:
      BadInput: it is nowhere and cannot be downloaded; names the places and the address.
    """
    places = folders(name, installed)
    for place in places:
        if (place / file).is_file():
            return place / file
    home = places[0]
    draft = home / f"{file}.part"
    try:
        with urllib.request.urlopen(url, timeout=20) as source:
            home.mkdir(parents=True, exist_ok=True)
            with open(draft, "wb") as target:
                shutil.copyfileobj(source, target)
        draft.replace(home / file)
    except OSError as e:  # URLError is one
        with contextlib.suppress(OSError):
            draft.unlink()
        raise BadInput(
            f"{name}: {file} is in none of {', '.join(map(str, places))}: get it from "
            f"{url.rpartition('/')[0]}/ and set DLX_DATA_DIR"
        ) from e
    return home / file


def payload(path: Path, sha256: str) -> bytes:
    """A file's content, decompressed where its name ends in .gz, if it is the known one.

    The digest is of the content: a .gz of the same content may differ by name and time.

    Raises:
      BadInput: it cannot be read, or is another one.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, gzip.zlib.error) as e:  # type: ignore[attr-defined]
        raise BadInput(f"{path} cannot be read ({e}): remove it and get it anew") from e
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise BadInput(
            f"{path} has sha256 {found[:12]}... and should have {sha256[:12]}...: remove it "
            "and get it anew"
        )
    return content
