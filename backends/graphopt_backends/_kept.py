"""What a compiler made of sources of this package, kept in the user's cache."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from graphopt.errors import WriteError
from graphopt_backends._link import Linker

__all__ = ["kept"]


def kept(
    cache: Path,
    linker: Linker,
    sources: Sequence[Path],
    compile_in: Callable[[Path], None],
    digested: Sequence[Path] = (),
) -> Path:
    """A folder with sources and what was compiled of them, by the same compiler from the same sources.

    Args:
        cache: Folder for such folders.
        linker: The compiler.
        sources: Files that are copied into the folder before.
        compile_in: Compiles in a folder with the sources, where that was not done before.
        digested: Further files that the result depends on.

    Raises:
        BackendError: The compiler fails.
        WriteError: The cache cannot be written.
    """
    digest = hashlib.sha256(" ".join((linker.name, *linker.command, linker.version())).encode())
    for source in (*sources, *digested):
        digest.update(source.read_bytes())
    known = (cache / digest.hexdigest()[:32]).resolve()
    if known.is_dir():
        return known
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="graphopt-", dir=cache) as scratch:
            folder = Path(scratch) / "made"
            folder.mkdir()
            for source in sources:
                shutil.copyfile(source, folder / source.name)
            compile_in(folder)
            folder.rename(known)
    except OSError as e:
        if not known.is_dir():  # else another process was faster
            hint = "set XDG_CACHE_HOME to a folder that can be written"
            raise WriteError(str(cache), (e.strerror or str(e)).lower(), hint) from e
    return known
