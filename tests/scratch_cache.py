"""A cache folder for tests: the user's is never written to.

As a command, `python tests/scratch_cache.py COMMAND ...` runs a command with such a folder.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from platformdirs import user_cache_dir

NAME = "HIRE_CACHE"
# Made anew where they are wanted, or of a process that is at work.
LEFT_OUT = ("hidden_states", "*.partial", "*.lock", "*.tmp")


def users_cache() -> Path:
    """The user's cache folder, which need not exist."""
    return Path(os.environ.get(NAME) or user_cache_dir("hire"))


def link(source: Path, target: Path) -> None:
    """Make the folder `target`, with links to the files of `source` in folders of its own."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()) if source.is_dir() else []:
        if any(path.match(pattern) for pattern in LEFT_OUT):
            continue
        if path.is_dir():
            link(path, target / path.name)
        else:
            (target / path.name).symlink_to(path.resolve())


@contextlib.contextmanager
def scratch_cache() -> Iterator[Path]:
    """HIRE_CACHE as a folder that lasts as long as this, in this process and those that it
    starts.
    """
    before = os.environ.get(NAME)
    with tempfile.TemporaryDirectory(prefix="hire-test-cache-") as folder:
        link(users_cache(), Path(folder))
        os.environ[NAME] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ[NAME]
            else:
                os.environ[NAME] = before


if __name__ == "__main__":
    with scratch_cache():
        status = subprocess.run(sys.argv[1:]).returncode
    sys.exit(status)
