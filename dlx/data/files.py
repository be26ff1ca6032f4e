"""Where the authors' own files lie: found, downloaded where there is internet, and verified."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import os
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from dlx.errors import BadInput


def folders(name: str, installed: Sequence[str] = ()) -> list[Path]:
    """Where a data set is looked for: DLX_DATA_DIR/name, DLX_DATA_DIR itself, the caches, and the
    folders of packages that carry it."""
    given = os.environ.get("DLX_DATA_DIR")
    roots = [Path(given) / name, Path(given)] if given else []
    return [*roots, *(place / name for place in caches()), *map(Path, installed)]


def caches() -> list[Path]:
    """The user's cache folders; downloads go to the first where DLX_DATA_DIR is not set."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dlx"
    return [home / "data", home]


def find(name: str, file: str, url: str, sha256: str = "", installed: Sequence[str] = ()) -> Path:
    """The path of one of a data set's files, downloaded from `url` where it is nowhere.

    Args:
      name: of the data set.
      file: its name as its authors publish it.
      url: the authors' address of the file.
      sha256: what is downloaded must have it, as of `payload`.
      installed: folders of packages that carry the set.

    Raises:
      BadInput: it is nowhere and cannot be downloaded; names the places and the address.
    """
    places = folders(name, installed)
    for place in places:
        if there(place / file):
            return place / file
    home = places[0]
    draft = home / f"part.{file}"
    try:
        with urllib.request.urlopen(url, timeout=20) as source:
            content = source.read()  # of a part of the file it raises an error
        home.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(content)
        if sha256:
            payload(draft, sha256)
        draft.replace(home / file)
    except (OSError, http.client.HTTPException, BadInput) as e:  # URLError is an OSError
        with contextlib.suppress(OSError):
            draft.unlink()
        raise BadInput(
            f"{name}: {file} is in none of {', '.join(map(str, places))}: get it from "
            f"{url.rpartition('/')[0]}/ and set DLX_DATA_DIR"
        ) from e
    return home / file


def there(path: Path) -> bool:
    """Whether it is a file.

    Raises:
      BadInput: its folder cannot be looked into.
    """
    with readable(path):
        return path.is_file()


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raises BadInput where the system refuses what is asked of a path."""
    try:
        yield
    except OSError as e:
        raise BadInput(
            f"{path} cannot be read ({e.strerror}): change its permissions, or DLX_DATA_DIR"
        ) from e


def payload(path: Path, sha256: str) -> bytes:
    """A file's content, decompressed where its name ends in .gz, if it is the known one.

    The digest is of the content: a .gz of the same content may differ by name and time. A .tar.gz
    is left as it is.

    Raises:
      BadInput: it cannot be read, or is another one.
    """
    packed = path.suffix == ".gz" and not path.stem.endswith(".tar")
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if packed else content
    except (OSError, EOFError, gzip.zlib.error) as e:  # type: ignore[attr-defined]
        raise BadInput(f"{path} cannot be read ({e}): remove it and get it anew") from e
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise BadInput(
            f"{path} has sha256 {found[:12]}... and should have {sha256[:12]}...: remove it "
            "and get it anew"
        )
    return content
