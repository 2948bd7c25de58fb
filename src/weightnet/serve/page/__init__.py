"""The web page at /: plain files, read once, that load nothing from anywhere else."""

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response

_FOLDER = Path(__file__).parent
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".jpg": "image/jpeg",
}
_HEADERS = {
    # Whatever a photo's name or a model's label says: no script, style or picture from elsewhere is loaded or run.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # a newer version's page must not meet an older one's script
}


def add_page(app: FastAPI) -> None:
    """Answer / with the page, and /page/... with what it is made of."""
    for file in sorted(_FOLDER.rglob("*")):
        if file.suffix in _TYPES:
            path = "/" if file.name == "index.html" else f"/page/{file.relative_to(_FOLDER).as_posix()}"
            _add(app, path, file.read_bytes(), _TYPES[file.suffix])


def _add(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    @app.get(path, include_in_schema=False)
    async def answer() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)
