"""Files that are written whole or not at all, and cached files that are checked before they are believed.

A file is written under a scratch name in its own folder and renamed when it is complete. Writers of
one file take turns by a lock, so what bears its scratch name while the lock is free was left by a
process that was killed, and is removed. A cached file has its SHA-256 in a sidecar file, which
covers itself as well; whatever does not match is made again.
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

SIDECAR = ".sha256.json"  # follows the name of the (first) file that it covers
MAX_SIDECAR_BYTES = 2**20
LEFT_BEHIND = re.compile(r"\.(.+?)(?:\.lock|\.\d+-[0-9a-f]{8}\.scratch)")  # by a writer of group 1
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}


def digest(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises OSError when it cannot be read."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason_of(error: BaseException) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    return str(error).strip().partition("\n")[0].strip() or type(error).__name__


@contextlib.contextmanager
def locked(path: str | Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a path: no other process or thread holds it. Removes what killed writers of it left.

    Raises TimeoutError with wait=False when another one holds it, OSError when its folder cannot be
    written.
    """
    path = Path(path)
    lock_path = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_path, timeout=-1 if wait else 0, poll_interval=0.01)
        lock.acquire()
    except Timeout:
        raise TimeoutError(f"{path}: another process is at work on it; wait until it ends") from None
    except OSError as error:
        raise not_written(path, error) from None
    try:
        remove_scratch(path)
        yield
    finally:
        # Removed while it is held: whoever waits for it sees that its file is gone, and opens a new one.
        with contextlib.suppress(OSError):
            lock_path.unlink()
        lock.release()


def scratch_of(path: Path) -> list[Path]:
    """Scratch folders of writers of a path, those of killed ones included."""
    return [entry for entry in path.parent.glob(f".{glob_escape(path.name)}.*.scratch") if entry.is_dir()]


def glob_escape(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def remove_scratch(path: Path) -> None:
    """Remove the scratch folders of a path, whose lock is held."""
    for folder in scratch_of(path):
        shutil.rmtree(folder, ignore_errors=True)


def tidy(folder: str | Path) -> None:
    """Remove what killed writers left in a folder, but for files that another process is at work on now."""
    folder = Path(folder)
    names = {match[1] for entry in folder.glob(".*") if (match := LEFT_BEHIND.fullmatch(entry.name))}
    for name in names:
        with contextlib.suppress(OSError), locked(folder / name, wait=False):
            pass


@contextlib.contextmanager
def replacing(*paths: str | Path) -> Iterator[list[Path]]:
    """Scratch paths, one for each path, all in one folder: what is written there takes their places at the end.

    They are renamed in order, and what was not written is left as it was; nothing is when the block
    raises. The lock of the first path is held from the beginning, so the block may read a file and
    write it changed. Raises OSError, in one line, when the disk is full or cannot be written.
    """
    places = [Path(path) for path in paths]
    with locked(places[0]):
        folder = places[0].with_name(f".{places[0].name}.{os.getpid()}-{secrets.token_hex(4)}.scratch")
        try:
            folder.mkdir()
            scratch = [folder / place.name for place in places]
            yield scratch
            for part, place in zip(scratch, places, strict=True):
                if part.exists():
                    part.replace(place)
        except OSError as error:
            raise not_written(places[0], error) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def not_written(path: Path, error: OSError) -> OSError:
    """The error in one line that says what to do; one that does not come from the disk, as it is."""
    if error.errno is None and (type(error) is not OSError or "could not be written" in str(error)):
        return error
    elsewhere = error.filename is not None and not Path(os.fsdecode(error.filename)).is_relative_to(path.parent)
    if error.errno is not None and (error.errno not in DISK_ERRORS or elsewhere):
        return error
    reason = os.strerror(error.errno) if error.errno else reason_of(error)
    return OSError(f"{path} could not be written ({reason}): free some space, or allow writing, and run it again")


def sidecar(path: str | Path) -> Path:
    """Where the checksums of a file, or of several whose first it is, are kept."""
    return Path(path).with_name(Path(path).name + SIDECAR)


def checksums(digests: Mapping[str, str], metadata: Mapping) -> bytes:
    """What a sidecar holds: the digest of every file by its name, metadata, and a digest of both."""
    covered = json.dumps(dict(files=dict(digests), metadata=dict(metadata)), sort_keys=True)
    return f'{{"sha256": "{hashlib.sha256(covered.encode()).hexdigest()}", "covers": {covered}}}\n'.encode()


def verified(paths: Sequence[str | Path]) -> dict | None:
    """The metadata in the sidecar of these files, when every byte of all of them is as it was written.

    None when none of them exists. Raises ValueError, which names the file, when one is damaged or
    missing.
    """
    places = [Path(path) for path in paths]
    record = sidecar(places[0])
    if not any(place.exists() for place in [*places, record]):
        return None
    try:
        if record.stat().st_size > MAX_SIDECAR_BYTES:
            raise ValueError(f"{record}: larger than any list of checksums")
        text = record.read_bytes()
        metadata = json.loads(text)["covers"]["metadata"]
        for place in places:
            if not place.is_file():
                raise ValueError(f"{place}: missing beside {record.name}")
        known = json.loads(text)["covers"]["files"]
        if checksums(known, metadata) != text or sorted(known) != sorted(place.name for place in places):
            raise ValueError(f"{record}: not as it was written")
        for place in places:
            if digest(place) != known[place.name]:
                raise ValueError(f"{place}: its contents are not those that were written")
    except OSError as error:
        raise ValueError(f"{error.filename or record}: cannot be read ({reason_of(error)})") from None
    except (KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{record}: no list of checksums ({type(error).__name__})") from None
    return metadata


def cached(paths: Sequence[str | Path], make: Callable[[list[Path]], Mapping | None]) -> dict:
    """Make files once, and again when they are damaged; returns the metadata that was kept with them.

    `make` is given scratch paths of the same names, writes every one of them, and returns metadata
    that JSON can hold. A damaged entry is named in one printed line. Two processes that ask for the
    same files make them once. Raises OSError when they cannot be written, and what `make` raises.
    """
    places = [Path(path) for path in paths]
    tidy(places[0].parent)
    with contextlib.suppress(ValueError):
        if (metadata := verified(places)) is not None:
            return metadata
    with replacing(*places, sidecar(places[0])) as scratch:
        try:
            metadata = verified(places)  # another process may have made it while this one waited
        except ValueError as error:
            print(f"{places[0].name}: the cached copy is damaged, made again ({error})", flush=True)
            metadata = None
        if metadata is None:
            clear(*places, sidecar(places[0]))
            *parts, record = scratch
            metadata = json.loads(json.dumps(dict(make(parts) or {})))
            record.write_bytes(checksums({part.name: digest(part) for part in parts}, metadata))
    return metadata


def cached_known(path: str | Path, sha256: str, make: Callable[[Path], object]) -> Path:
    """A file whose SHA-256 is known beforehand: made when it is missing or damaged, which one printed line says.

    `make` is given a scratch path of the same name. Raises ValueError when what it made has another
    digest, OSError when it cannot be written, and what `make` raises.
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
        if (found := digest(scratch)) != sha256:
            raise ValueError(f"{path}: was made with SHA-256 {found}, expected {sha256}; fetch its source again")
    return path


def clear(*paths: Path) -> None:
    """Remove files and folders, where they exist."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
