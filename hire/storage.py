"""Atomic file writes, and cached files with checksums.

A file is written under a scratch name in the folder of its target and renamed when it is complete.
A lock admits one writer of a file at a time. A scratch file that remains while the lock is free is
thus from a process that was killed, and is removed. The SHA-256 of a cached file is in a sidecar
file, which also contains a checksum of itself. A file that does not match its checksum is made
again.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_cache_dir

SIDECAR = ".sha256.json"  # suffix to the name of the (first) file that it covers
MAX_SIDECAR_BYTES = 2**20
# group 1 is the name of the file for which a writer created the lock or the scratch folder
LEFT_BEHIND = re.compile(r"\.(.+?)(?:\.lock|\.\d+-[0-9a-f]{8}\.scratch)")
DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
}


def cache_folder() -> Path:
    """Returns the folder that stores slow results between runs.

    It is $HIRE_CACHE, or the cache folder of the user. It is created if it does not exist.
    """
    folder = Path(os.environ.get("HIRE_CACHE") or user_cache_dir("hire"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def digest(path: str | Path) -> str:
    """Computes the SHA-256 of a file, in hexadecimal.

    Raises:
        OSError: When the file cannot be read.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason_of(error: BaseException) -> str:
    """Returns the first line of an exception's message, or its type if the message is empty."""
    return str(error).strip().partition("\n")[0].strip() or type(error).__name__


@contextlib.contextmanager
def locked(path: str | Path, *, wait: bool = True) -> Iterator[None]:
    """Locks a path against other processes and threads.

    After it takes the lock it removes the scratch files of killed writers.

    Args:
        path: The path to lock.
        wait: False raises TimeoutError at once if the path is locked.

    Raises:
        TimeoutError: When `wait` is False and another process or thread has the lock.
        OSError: When the folder cannot be written.
    """
    path = Path(path)
    lock_path = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_path, timeout=-1 if wait else 0, poll_interval=0.01)
        lock.acquire()
    except Timeout:
        raise TimeoutError(
            f"{path}: another process is at work on it; wait until it ends"
        ) from None
    except OSError as error:
        raise not_written(path, error) from None
    try:
        remove_scratch(path)
        yield
    finally:
        # Remove the file before the lock is released: a waiting process then sees that the file is
        # gone, and opens a new one.
        with contextlib.suppress(OSError):
            lock_path.unlink()
        lock.release()


def scratch_of(path: Path) -> list[Path]:
    """Lists the scratch folders of all writers of a path, including those that were killed."""
    return [
        entry
        for entry in path.parent.glob(f".{glob_escape(path.name)}.*.scratch")
        if entry.is_dir()
    ]


def glob_escape(name: str) -> str:
    """Escapes the special characters of glob patterns."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def remove_scratch(path: Path) -> None:
    """Removes the scratch folders of a path; the caller must have its lock."""
    for folder in scratch_of(path):
        shutil.rmtree(folder, ignore_errors=True)


def tidy(folder: str | Path) -> None:
    """Removes the files of killed writers from a folder, but not those of locked paths."""
    folder = Path(folder)
    names = {
        match[1] for entry in folder.glob(".*") if (match := LEFT_BEHIND.fullmatch(entry.name))
    }
    for name in names:
        with contextlib.suppress(OSError), locked(folder / name, wait=False):
            pass


@contextlib.contextmanager
def replacing(*paths: str | Path) -> Iterator[list[Path]]:
    """Yields scratch paths for files that replace the given ones when the block ends.

    All scratch paths are in one folder. When the block ends, the scratch files are renamed in
    order. A path that the block did not write stays as it was. If the block raises, no path
    changes. The first path is locked from the beginning, so the block may read a file and rewrite
    it.

    Args:
        *paths: Paths to replace.

    Yields:
        One scratch path for each path.

    Raises:
        OSError: When the disk is full or cannot be written. The message has one line.
    """
    targets = [Path(path) for path in paths]
    with locked(targets[0]):
        folder = targets[0].with_name(
            f".{targets[0].name}.{os.getpid()}-{secrets.token_hex(4)}.scratch"
        )
        try:
            folder.mkdir()
            scratch = [folder / target.name for target in targets]
            yield scratch
            for scratch_file, target in zip(scratch, targets, strict=True):
                if scratch_file.exists():
                    scratch_file.replace(target)
        except OSError as error:
            raise not_written(targets[0], error) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def not_written(path: Path, error: OSError) -> OSError:
    """Returns an error of the disk with a one-line message that says what to do.

    Args:
        path: The path that could not be written.
        error: The error to explain.

    Returns:
        The new error, or `error` unchanged if it does not come from the disk.
    """
    if error.errno is None and (type(error) is not OSError or "could not be written" in str(error)):
        return error
    outside_folder = error.filename is not None and not Path(
        os.fsdecode(error.filename)
    ).is_relative_to(path.parent)
    if error.errno is not None and (error.errno not in DISK_ERRORS or outside_folder):
        return error
    reason = os.strerror(error.errno) if error.errno else reason_of(error)
    return OSError(
        f"{path} could not be written ({reason}): free some space, or allow writing, and run it "
        "again"
    )


def sidecar(path: str | Path) -> Path:
    """Returns the path of the checksums of a file, or of several files if it is the first."""
    return Path(path).with_name(Path(path).name + SIDECAR)


def checksums(digests: Mapping[str, str], metadata: Mapping) -> bytes:
    """Returns the contents of a sidecar file.

    Args:
        digests: SHA-256 of every file, by its name.
        metadata: Metadata of the files.

    Returns:
        JSON with the digests, the metadata, and a digest of the two.
    """
    covered = json.dumps(dict(files=dict(digests), metadata=dict(metadata)), sort_keys=True)
    sha256 = hashlib.sha256(covered.encode()).hexdigest()
    return f'{{"sha256": "{sha256}", "covers": {covered}}}\n'.encode()


def verified(paths: Sequence[str | Path]) -> dict | None:
    """Checks files against the checksums in their sidecar file.

    Args:
        paths: The files. The first one names the sidecar.

    Returns:
        The metadata of the files if every byte is as it was written, or None if none of the files
        exists.

    Raises:
        ValueError: When a file is damaged or missing. The message names the file.
    """
    files = [Path(path) for path in paths]
    sidecar_path = sidecar(files[0])
    if not any(file.exists() for file in [*files, sidecar_path]):
        return None
    try:
        if sidecar_path.stat().st_size > MAX_SIDECAR_BYTES:
            raise ValueError(f"{sidecar_path}: larger than any list of checksums")
        text = sidecar_path.read_bytes()
        metadata = json.loads(text)["covers"]["metadata"]
        for file in files:
            if not file.is_file():
                raise ValueError(f"{file}: missing beside {sidecar_path.name}")
        digests = json.loads(text)["covers"]["files"]
        if checksums(digests, metadata) != text or sorted(digests) != sorted(
            file.name for file in files
        ):
            raise ValueError(f"{sidecar_path}: not as it was written")
        for file in files:
            if digest(file) != digests[file.name]:
                raise ValueError(f"{file}: its contents are not those that were written")
    except OSError as error:
        raise ValueError(
            f"{error.filename or sidecar_path}: cannot be read ({reason_of(error)})"
        ) from None
    except (
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        UnicodeDecodeError,
        json.JSONDecodeError,
    ) as error:
        raise ValueError(f"{sidecar_path}: no list of checksums ({type(error).__name__})") from None
    return metadata


def cached(paths: Sequence[str | Path], make: Callable[[list[Path]], Mapping | None]) -> dict:
    """Makes files once, and again if they are damaged.

    One printed line names a damaged file. If two processes request the same files, only one of them
    makes the files.

    Args:
        paths: The files.
        make: A function that gets scratch paths of the same names, writes all of them, and returns
            metadata that JSON can store. Its exceptions are passed on.

    Returns:
        The metadata of the files.

    Raises:
        OSError: When the files cannot be written.
    """
    files = [Path(path) for path in paths]
    tidy(files[0].parent)
    with contextlib.suppress(ValueError):
        if (metadata := verified(files)) is not None:
            return metadata
    with replacing(*files, sidecar(files[0])) as scratch:
        try:
            metadata = verified(files)  # another process may have made the files meanwhile
        except ValueError as error:
            print(f"{files[0].name}: the cached copy is damaged, made again ({error})", flush=True)
            metadata = None
        if metadata is None:
            clear(*files, sidecar(files[0]))
            *parts, sidecar_path = scratch
            metadata = json.loads(json.dumps(dict(make(parts) or {})))
            sidecar_path.write_bytes(
                checksums({part.name: digest(part) for part in parts}, metadata)
            )
    return metadata


def cached_known(path: str | Path, sha256: str, make: Callable[[Path], object]) -> Path:
    """Makes a file with a known SHA-256 if it is missing or damaged.

    One printed line says that the file was damaged.

    Args:
        path: The file.
        sha256: The expected SHA-256, in hexadecimal.
        make: A function that gets a scratch path of the same name and writes it. Its exceptions
            are passed on.

    Returns:
        The path of the file.

    Raises:
        ValueError: When the new file has another digest.
        OSError: When the file cannot be written.
    """
    path = Path(path)
    tidy(path.parent)
    if path.is_file() and digest(path) == sha256:
        return path
    with replacing(path) as [scratch]:
        if path.exists():
            if path.is_file() and digest(path) == sha256:
                return path
            print(f"{path.name}: the cached copy is damaged, made again", flush=True)
            clear(path)
        make(scratch)
        if (actual_sha256 := digest(scratch)) != sha256:
            raise ValueError(
                f"{path}: was made with SHA-256 {actual_sha256}, expected {sha256}; fetch its "
                "source again"
            )
    return path


def clear(*paths: Path) -> None:
    """Removes files and folders if they exist."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
