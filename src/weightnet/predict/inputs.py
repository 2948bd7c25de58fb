"""Which photos are meant by paths, folders and patterns: found lazily, in a fixed order, whatever links there are."""

import fnmatch
import glob
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from weightnet.images.decode import IMAGE_SUFFIXES


def find_images(inputs: Iterable[str], *, report: Callable[[str], None]) -> Iterator[str]:
    """Yield the paths of the photos that files, folders and patterns stand for.

    - A file is yielded whatever its name, and so is a path where nothing is: reading it says what is wrong.
    - A folder stands for all files in it and its subfolders that end like image files (`IMAGE_SUFFIXES`).
    - Anything else with `*`, `?` or `[...]` is a pattern and stands for what it matches, as in a shell: files whatever
      their names, and folders; `**` stands for any number of folders, and then only files count.

    Names that begin with a dot are left out of folders and of what a pattern matches, unless it names the dot.
    A folder's files come first, by name, then its subfolders, by name. Links are followed, but no folder is walked
    twice for one input. Nothing is held in memory but the names in the folders on the way.

    Args:
        inputs: the paths, folders and patterns, each as the user wrote it.
        report: called with a message for a folder that cannot be listed and for an input without a photo.

    Example:
        >>> list(find_images(["missing.jpg", "*.missing"], report=print))
        *.missing: no photo matches this pattern.
        ['missing.jpg']
    """
    for text in inputs:
        if os.path.isdir(text):
            found = _Walk(report).images_in(text)
            yield from _or_report(found, f"{text}: no photo is in this folder.", report)
        elif stands_for_many(text):
            root, parts = _split(text)
            found = _Walk(report, files_only="**" in parts).matches(root, parts)
            yield from _or_report(found, f"{text}: no photo matches this pattern.", report)
        else:
            yield text


def stands_for_many(text: str) -> bool:
    """Return whether an input is a folder or a pattern.

    >>> stands_for_many("cat.jpg"), stands_for_many("*.jpg")
    (False, True)
    """
    return os.path.isdir(text) or (glob.has_magic(text) and not os.path.lexists(text))


class _Walk:
    """The search for one input; it remembers the folders that it walked, and which of them could not be listed."""

    def __init__(self, report: Callable[[str], None], *, files_only: bool = True) -> None:
        self._report = report
        self._files_only = files_only
        self._walked: set[tuple[int, int, int]] = set()
        self._unlistable: set[str] = set()

    def images_in(self, folder: str) -> Iterator[str]:
        """Yield the image files in a folder and its subfolders."""
        for subfolder in self._folders(folder, place=0):
            for path in self._named(subfolder, "*", "files"):
                if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES:
                    yield path

    def matches(self, folder: str, parts: tuple[str, ...]) -> Iterator[str]:
        """Yield what matches the parts of a pattern under a folder, "" for the current one."""
        part, rest = parts[0], parts[1:]
        if part == "**":
            for subfolder in self._folders(folder, place=len(parts)):
                yield from self.matches(subfolder, rest or ("*",))
        elif rest:
            for subfolder in self._named(folder, part, "folders"):
                yield from self.matches(subfolder, rest)
        else:
            yield from self._named(folder, part, "files")
            if not self._files_only:
                for subfolder in self._named(folder, part, "folders"):
                    yield from self.images_in(subfolder)

    def _folders(self, top: str, *, place: int) -> Iterator[str]:
        """Yield a folder and all below it, each once for one place of the pattern: links that lead back end here."""
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            try:
                status = os.stat(folder or os.curdir)
            except OSError:  # deleted meanwhile
                continue
            key = (status.st_dev, status.st_ino, place)
            if key not in self._walked:
                self._walked.add(key)
                yield folder
                waiting.extend(reversed(list(self._named(folder, "*", "folders"))))

    def _named(self, folder: str, part: str, kind: Literal["files", "folders"]) -> Iterator[str]:
        """Yield the paths of a folder's files or subfolders that match one part of a pattern, by name."""
        if not glob.has_magic(part):
            path = os.path.join(folder, part)
            if os.path.isdir(path) if kind == "folders" else os.path.isfile(path):
                yield path
            return
        for name in self._names(folder, kind):
            if fnmatch.fnmatchcase(name, part) and (part.startswith(".") or not name.startswith(".")):
                yield os.path.join(folder, name)

    def _names(self, folder: str, kind: Literal["files", "folders"]) -> list[str]:
        wanted = _is_folder if kind == "folders" else _is_file
        try:
            with os.scandir(folder or os.curdir) as entries:
                return sorted(entry.name for entry in entries if wanted(entry))
        except OSError as error:
            if folder not in self._unlistable:
                self._unlistable.add(folder)
                self._report(f"{folder}: this folder cannot be listed: {error.strerror or error}.")
            return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a file or a link that leads nowhere; not a pipe or device, which may never end."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True


def _split(pattern: str) -> tuple[str, tuple[str, ...]]:
    """Return the folder that a pattern starts from, "" for the current one, and the pattern's parts below it."""
    drive, rest = os.path.splitdrive(pattern)
    rest = rest.replace(os.altsep or os.sep, os.sep)
    root = drive + os.sep if rest.startswith(os.sep) else drive
    return root, tuple(part for part in rest.split(os.sep) if part)


def _or_report(found: Iterator[str], message: str, report: Callable[[str], None]) -> Iterator[str]:
    empty = True
    for path in found:
        empty = False
        yield path
    if empty:
        report(message)
