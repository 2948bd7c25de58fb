"""What models there are and where their weights are: names, the published checkpoints, downloads. Needs no PyTorch."""

import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urljoin, urlsplit

from weightnet.errors import DownloadError, UnknownModelError, UsageError, WeightsError, nearest
from weightnet.nn.variants import VARIANTS
from weightnet.zoo.cards import embedded_models, read_file, write_atomically

if TYPE_CHECKING:
    import requests

MAX_DOWNLOAD_BYTES = 1 << 30
BACKOFF_S = 0.5  # before the first retry; doubled before each one after it
RETRYABLE_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_CHUNK_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Published:
    """A checkpoint that its authors published; size and SHA-256 are None where they never said them."""

    url: str
    size: int | None = None
    sha256: str | None = None


PUBLISHED: dict[str, Published] = {
    f"shufflenet_v2_x{width.replace('.', '_')}": Published(
        f"https://data.megengine.org.cn/models/weights/wnet/snetv2_{width}x_wnet1x_M2G2.model"
    )
    for width in ("0.5", "1.0", "1.5", "2.0")
}


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of the zoo's networks and of the models inside the package.

    Args:
        pattern: which names, with the wildcards `*`, `?` and `[...]`.

    Returns: the names, in the order of the published tables, then the embedded models.

    Example:
        >>> list_models("*x2_0*")
        ['shufflenet_v2_x2_0.plain', 'shufflenet_v2_x2_0', 'shufflenet_v2_x2_0.wn4x']
    """
    return [name for name in [*VARIANTS, *embedded_models()] if fnmatch.fnmatchcase(name, pattern)]


def find_weights(model: str | os.PathLike[str], *, progress: bool = True) -> Path:
    """Return the file with a model's weights, downloaded first where it must be.

    Args:
        model: a name of `list_models()` (of a network: its published checkpoint), an http(s) address, a run folder, or
            a weights file. A name goes before a file: write `./default` for a folder of an embedded model's name.
        progress: whether to show a progress bar on standard error while downloading.

    Raises:
        UnknownModelError: it is nothing of these.
        UsageError: nobody published weights for this network.
        DownloadError: the weights could not be downloaded whole; the message says where to put them by hand.
        WeightsError: the folder holds no weights.
    """
    name = os.fspath(model)
    if name in PUBLISHED:
        checkpoint = PUBLISHED[name]
        return fetch(checkpoint.url, sha256=checkpoint.sha256, size=checkpoint.size, progress=progress)
    if name in VARIANTS:
        raise UsageError(
            f"Published weights must exist to load them. Got {name}, for which nobody published any "
            f"(there are some for {', '.join(PUBLISHED)}). Train it with `weightnet train`, or pass pretrained=PATH."
        )
    embedded = embedded_models()
    if name in embedded:
        return embedded[name]
    if "://" in name:
        return fetch(name, progress=progress)
    path = Path(name)
    if name and os.path.isdir(path):  # unlike Path.is_dir, it takes any text for an answer of False
        if not (path / "weights.safetensors").is_file():
            raise WeightsError(
                f"A run folder must hold weights.safetensors. Got {path} without it. "
                "Wait for the run's first evaluation, or give the weights file itself."
            )
        return path / "weights.safetensors"
    if not name or not os.path.exists(path):
        raise UnknownModelError(
            "A model must be a name of `weightnet models`, a run folder, a weights file or an exported file. "
            f"Got model={name!r}. {nearest(name, list_models()) or 'See `weightnet models` for the names.'}"
        )
    return path


def embedded_export(name: str) -> Path | None:
    """Return the exported file of a model inside the package, None where the name is not of one that has any.

    The models inside the package are there twice: exported, and as weights to train on.
    """
    weights = embedded_models().get(name)
    exported = weights.with_suffix(".onnx") if weights else None
    return exported if exported and exported.is_file() else None


def cache_folder() -> Path:
    """Return the platform's own folder for this package's downloads (on Linux `~/.cache/weightnet`)."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("weightnet", appauthor=False))


def cached_path(url: str) -> Path:
    """Return where the download of an address is kept, whether it is there or not.

    A published checkpoint keeps its own name; other names begin with a hash of the address.

    Example:
        >>> cached_path(PUBLISHED["shufflenet_v2_x0_5"].url).name
        'snetv2_0.5x_wnet1x_M2G2.model'
    """
    name = unquote(urlsplit(url).path).rpartition("/")[2][-80:]
    if url not in {checkpoint.url for checkpoint in PUBLISHED.values()}:
        kept = "".join(character if character.isalnum() or character in "._-" else "_" for character in name)
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{kept or 'weights'}"
    return cache_folder() / name


def fetch(
    url: str,
    *,
    sha256: str | None = None,
    size: int | None = None,
    progress: bool = True,
    timeout_s: float = 30.0,
    retries: int = 3,
) -> Path:
    """Return the local copy of a file, downloaded at first use and checked at every use.

    The copy appears whole or not at all; two processes that want the same file download it once. Where the SHA-256 is
    not known beforehand, that of the first use is recorded beside the file and holds from then on. A file put there by
    hand is used like a downloaded one.

    Args:
        url: an http or https address.
        sha256: the content's SHA-256, in hexadecimal, where it is known.
        size: its size in bytes, where it is known.
        progress: whether to show a progress bar on standard error.
        timeout_s: how long to wait for a connection, and for each next part of the file, in seconds.
        retries: how often to try again after a failure that may pass.

    Raises:
        UsageError: the address is not of http or https.
        DownloadError: the file could not be downloaded whole, is a web page, or is not the expected one.
    """
    try:
        path = cached_path(url) if urlsplit(url).scheme in ("http", "https") else None
    except ValueError:  # brackets that do not close, bytes that are no text
        path = None
    if path is None:
        raise UsageError(
            f"A download must be from an http or https address. Got url={url!r}. Save the file and pass it."
        )
    expected = Published(url, size, sha256)
    try:
        if not path.is_file():
            import filelock

            path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(path.with_name(f"{path.name}.lock")):
                if not path.is_file():  # another process may have brought it while this one waited
                    _download(expected, path, progress, timeout_s, retries)
        _check_copy(expected, path)
    except OSError as error:
        raise _failed(url, path, error) from error
    return path


def _download(expected: Published, path: Path, progress: bool, timeout_s: float, retries: int) -> None:
    """Download to a temporary file beside `path`, check it, and move it to its place."""
    import requests

    temporary = path.with_name(f"{path.name}.part")  # the lock makes it this process's own
    try:
        for attempt in range(retries + 1):
            try:
                _transfer(expected.url, temporary, progress, timeout_s)
                _check_content(expected, temporary)
                break
            except (requests.RequestException, _TruncatedError) as error:
                if attempt == retries or not _may_pass(error):
                    raise _failed(expected.url, path, error) from error
                time.sleep(BACKOFF_S * 2**attempt)
        os.replace(temporary, path)
    except (_RefusedError, ValueError) as error:  # ValueError: pooch meets a Content-Length that is no number
        raise _failed(expected.url, path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


class _TruncatedError(Exception):
    """The connection ended before the file did."""


class _RefusedError(Exception):
    """The server sends what must not be taken; trying again will not help."""


def _transfer(url: str, target: Path, progress: bool, timeout_s: float) -> None:
    import pooch

    with contextlib.ExitStack() as opened, _Meter(progress, target.name.removesuffix(".part")) as meter:
        announced: dict[str, int] = {}

        def on_response(response: "requests.Response", *_: Any, **__: Any) -> None:
            opened.callback(response.close)  # where it fails, pooch leaves the connection open
            _check_redirect(response)
            if response.ok and not response.is_redirect:
                announced.update(_announced_size(response))

        download = pooch.HTTPDownloader(
            progressbar=meter,
            chunk_size=_CHUNK_BYTES,
            timeout=timeout_s,
            headers={"Accept-Encoding": "identity"},  # so that Content-Length is the file's own size
            hooks={"response": on_response},
        )
        download(url, str(target), None)
    got = target.stat().st_size
    if got != announced.get("size", got):
        raise _TruncatedError(f"the connection ended after {got} of {announced['size']} bytes")


def _check_redirect(response: "requests.Response") -> None:
    """Refuse to be led away from an encrypted connection."""
    if not response.is_redirect:
        return
    target = urljoin(response.url, response.headers["location"])
    allowed = ("https",) if urlsplit(response.url).scheme == "https" else ("http", "https")
    if urlsplit(target).scheme not in allowed:
        raise _RefusedError(f"the server redirects to {target}, which is not of {' or '.join(allowed)}")


def _announced_size(response: "requests.Response") -> dict[str, int]:
    if response.headers.get("content-type", "").startswith("text/html"):
        raise _RefusedError("the server answers with a web page (text/html) in place of the file")
    length = response.headers.get("content-length", "")
    if not length.isdigit() or response.headers.get("content-encoding", "identity") != "identity":
        return {}
    _check_size(int(length))
    return {"size": int(length)}


def _check_size(size: int) -> None:
    if size > MAX_DOWNLOAD_BYTES:
        raise _RefusedError(f"the file has more than the allowed {MAX_DOWNLOAD_BYTES} bytes")


def _may_pass(error: Exception) -> bool:
    if isinstance(error, ValueError):  # an address that cannot be
        return False
    response = getattr(error, "response", None)
    return response is None or response.status_code in RETRYABLE_STATUS


def _check_content(expected: Published, path: Path) -> str:
    """Return the file's SHA-256 after checking it against what is known."""
    data = read_file(path, max_bytes=MAX_DOWNLOAD_BYTES)
    sha256 = hashlib.sha256(data).hexdigest()
    is_safetensors = data[8:9] == b"{"  # its length comes before, in bytes that may look like anything
    if not data or (data[:64].lstrip().startswith(b"<") and not is_safetensors):
        raise _RefusedError("the file is a web page or empty, not weights")
    if expected.size not in (None, len(data)):
        raise _RefusedError(f"the file has {len(data)} bytes, not the expected {expected.size}")
    if expected.sha256 not in (None, sha256):
        raise _RefusedError(f"the file has SHA-256 {sha256}, not the expected {expected.sha256}")
    return sha256


def _check_copy(expected: Published, path: Path) -> None:
    """Check the local copy against what is known, or else against its first use, which is recorded beside it."""
    record = path.with_name(f"{path.name}.record.json")
    try:
        if expected.sha256 is None and record.is_file():
            recorded = json.loads(record.read_text(encoding="utf-8"))
            expected = Published(expected.url, int(recorded["size"]), str(recorded["sha256"]))
        sha256 = _check_content(expected, path)
    except (_RefusedError, WeightsError, ValueError, KeyError, TypeError) as error:
        raise DownloadError(
            f"The local copy must be the file that was downloaded first. Got {path}: {error}. "
            f"Delete it and {record.name} to download it again; delete {record.name} alone to keep it as it is."
        ) from error
    if not record.is_file():
        fields = {"url": expected.url, "size": path.stat().st_size, "sha256": sha256}
        with contextlib.suppress(OSError):  # a cache that cannot be written, filled by its owner, serves all the same
            write_atomically(record, json.dumps(fields, indent=2).encode())


def _failed(url: str, path: Path, error: BaseException) -> DownloadError:
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner  # the first says why; what requests and urllib3 wrap around it repeats the address at length
    return DownloadError(
        f"The weights must be downloaded once. Got no file from {url}: {error}. "
        f"Check the network, or download the address elsewhere and save the file as {path}: it will be used from there."
    )


class _Meter:
    """A progress bar on standard error, in the form that pooch calls, which also stops a body without end."""

    def __init__(self, visible: bool, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not (visible and console.is_terminal))
        self._task = self._progress.add_task(title, total=None)
        self._received = 0

    def __enter__(self) -> "_Meter":
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    @property
    def total(self) -> int:
        """Bytes announced by the server, 0 where it announced none."""
        return int(self._progress.tasks[0].total or 0)

    @total.setter
    def total(self, size: int) -> None:
        self._progress.update(self._task, total=size or None)

    def update(self, size: int) -> None:
        """Count bytes that arrived (pooch gives the size of its buffer, which the last part may fall short of)."""
        self._received += size
        _check_size(self._received - _CHUNK_BYTES)
        self._progress.update(self._task, completed=self._received)

    def reset(self) -> None:
        """Go back to nothing, as pooch does before it fills the bar at the end."""
        self._received = 0

    def close(self) -> None:
        """Do nothing: leaving the context ends the bar."""
