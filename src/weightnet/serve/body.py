"""From a request's body to the bytes of a photo: read under a deadline and a size limit, out of a form or as it is."""

import asyncio
from collections.abc import AsyncIterator, Mapping

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from weightnet.errors import ImageError
from weightnet.serve.limits import SLOW_AFTER_S, Limits, RefusedError, Ticket

MAX_PARTS = 20
FIELD = "file"


async def read_body(
    headers: Mapping[str, str], chunks: AsyncIterator[bytes], *, limits: Limits, ticket: Ticket
) -> bytes:
    """Read a request's whole body. While it comes slowly, its place among those in work is free for others.

    Raises: RefusedError: 413 for one that says it is too large, or turns out to be; 408 for one that takes too long;
        429 where the bodies of all requests together are too large, or a slow one's place is taken.
    """
    _check_size(int(headers.get("content-length", 0)), limits)
    body = bytearray()
    slow = asyncio.get_running_loop().call_later(SLOW_AFTER_S, ticket.give_place_up)
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for chunk in chunks:
                _check_size(len(body) + len(chunk), limits)
                ticket.hold(len(chunk))
                body += chunk
    except TimeoutError:
        raise RefusedError(
            408,
            f"A body must come within {limits.body_timeout_s:g} s. Got {len(body)} bytes by then. Send less.",
        ) from None
    finally:
        slow.cancel()
    ticket.take_place()
    return bytes(body)


def _check_size(size_bytes: int, limits: Limits) -> None:
    if size_bytes > limits.max_body_bytes:
        raise RefusedError(413, f"A body must be at most {limits.max_body_mb} MB. Got more. Send a smaller photo.")


def find_photo(body: bytes, content_type: str) -> tuple[str | None, bytes]:
    """Return the photo in a body, and its file's name where the body is a form (multipart/form-data) that says so.

    Any other type of content is taken for the photo itself: its own bytes say what it is.

    Raises: ImageError where the form is malformed or has not exactly one photo.

    >>> find_photo(b"...", "image/png")
    (None, b'...')
    """
    kind, options = parse_options_header(content_type)
    if kind.lower() != b"multipart/form-data":
        return None, body
    boundary = options.get(b"boundary")
    if not boundary:
        raise _malformed("its Content-Type has no boundary")
    form = _Form()
    try:
        parser = MultipartParser(boundary, form.callbacks())  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except (FormParserError, ValueError) as error:
        raise _malformed(str(error)) from None
    if not form.ended:
        raise _malformed("its last boundary is missing: it is cut off")
    if len(form.photos) != 1:
        raise ImageError(
            f"A form must have one photo, in its field {FIELD!r}. Got {len(form.photos)}. Send each photo by itself."
        )
    return form.photos[0]


class _Form:
    """Collects the photos of a form: parts with a file name, or called "file"."""

    def __init__(self) -> None:
        self.photos: list[tuple[str | None, bytes]] = []
        self.ended = False
        self._parts = 0
        self._begin()

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_part_data": lambda data, start, end: self._data.append(data[start:end]),
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._name, self._value = bytearray(), bytearray()
        self._data: list[bytes] = []
        self._disposition = b""

    def _end_header(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._name, self._value = bytearray(), bytearray()

    def _end_part(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise ValueError("it has too many parts")
        _, options = parse_options_header(self._disposition)
        name = options.get(b"filename")
        if name is not None or options.get(b"name") == FIELD.encode():
            self.photos.append((name.decode("utf-8", "replace") if name else None, b"".join(self._data)))

    def _end(self) -> None:
        self.ended = True


def _malformed(why: str) -> ImageError:
    return ImageError(
        f"A form must be well-formed multipart/form-data. Got one that is not: {why}. Send the photo's bytes instead."
    )
