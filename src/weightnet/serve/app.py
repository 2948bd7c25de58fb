"""The application: what it answers to what. Every error is a row that says what is wrong, as in `predict --json`."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weightnet import __version__
from weightnet.errors import ImageError
from weightnet.serve.body import FIELD, read_body
from weightnet.serve.limits import LINGER_S, RefusedError
from weightnet.serve.metrics import CONTENT_TYPE, Metrics
from weightnet.serve.page import add_page
from weightnet.serve.reference import reference_page
from weightnet.serve.service import ServedModel, Service, WantedMap

CLIENT_GONE = 499  # nobody reads it; it is counted
_logger = logging.getLogger(__name__)
_RETRY_LATER = {429, 503}
T = TypeVar("T")


class Score(BaseModel):
    """One class of a prediction."""

    label: str
    index: int
    probability: float


class Place(BaseModel):
    """A rectangle in the photo, in fractions of its width and height."""

    left: float
    top: float
    right: float
    bottom: float


class Map(BaseModel):
    """What each part of the photo said for the class `index`."""

    index: int
    rows: int
    columns: int
    values: list[list[float]] = Field(
        description="Evidence in each cell, row by row, in units of logits, below 0 against the class; their mean and "
        "the class's bias make its logit"
    )
    box: Place = Field(description="Where the whole map lies; it may reach beyond what is seen, and beyond the photo")
    seen: Place = Field(description="The part of the photo that the network sees")


class Row(BaseModel):
    """A photo's prediction, or what is wrong with the request."""

    path: str | None
    status: Literal["ok", "error"]
    error: str | None
    top: list[Score]
    known: bool | None = Field(
        default=None,
        description="Whether the photo shows one of the model's classes at all; only of models that can tell",
    )
    heatmap: Map | None = Field(default=None, description="Only where the request asks for it")


class ModelEntry(BaseModel):
    """A model that is served; the first of the list answers requests that name none."""

    name: str
    network: str
    classes: int
    measured: dict[str, Any]
    heatmap: bool = Field(description="Whether it says where it looked")


class State(BaseModel):
    """How the service is."""

    status: Literal["ok", "loading", "ready", "draining"]


_ERRORS = {
    408: "The body did not come in time",
    413: "The body is too large",
    422: "The photo, the form or a parameter is not usable; `error` says what is wrong",
    429: "Too much is in work: try again after Retry-After",
    503: "The models are being loaded, or the service is about to end",
    504: "The answer took too long",
}
_CLASSIFY_ERRORS = _ERRORS | {404: "No such model is served", 500: "The network failed"}
_ClassIndex = Annotated[int, Field(ge=0)]
_WANTED_MAP: dict[str, WantedMap] = {"true": "top", "false": None}
_BYTES = {"type": "string", "format": "binary"}
_FORM = {"type": "object", "properties": {FIELD: _BYTES}, "required": [FIELD]}
_PHOTO_BODY = {
    "required": True,
    "content": {"multipart/form-data": {"schema": _FORM}, "image/*": {"schema": _BYTES}},
}


def create_app(service: Service, metrics: Metrics) -> ASGIApp:
    """Return the application of a service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="WeightNet",
        version=__version__,
        description="Classifies photos. A request's body is a photo, or a form with one.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_classify(app, service)
    _add_state(app, service, metrics)
    add_page(app)
    for kind, answer in _HANDLERS.items():
        app.add_exception_handler(kind, answer)
    return _Edge(app, metrics, known_paths={route.path for route in app.routes if hasattr(route, "path")})


def _add_classify(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/classify",
        summary="Classify a photo",
        response_model=Row,
        responses={status: {"model": Row, "description": text} for status, text in _CLASSIFY_ERRORS.items()},
        openapi_extra={"requestBody": _PHOTO_BODY},
    )
    async def classify(
        request: Request,
        k: Annotated[int, Query(ge=1, description="How many classes to name, the most probable first")] = 5,
        model: Annotated[str | None, Query(description="One of /v1/models; the first where it is left out")] = None,
        heatmap: Annotated[
            Literal["true", "false"] | _ClassIndex,
            Query(description="Where the network looked: true for the most probable class, or the index of a class"),
        ] = "false",
    ) -> Response:
        chosen = service.model(model)
        wanted_map = _WANTED_MAP[heatmap] if isinstance(heatmap, str) else heatmap
        service.check_map(chosen, wanted_map)
        with service.admission.enter() as ticket:
            body = await read_body(request.headers, request.stream(), limits=service.limits, ticket=ticket)
            content_type = request.headers.get("content-type", "")
            work = service.classify(chosen, body, content_type, k=k, wanted_map=wanted_map)
            answer = await _while_wanted(request, work, service.limits.answer_timeout_s)
        return JSONResponse(answer.to_dict())

    @app.get(
        "/v1/models",
        summary="List the models that are served",
        response_model=list[ModelEntry],
        responses={503: {"model": Row, "description": _ERRORS[503]}},
    )
    async def models() -> list[ModelEntry]:
        service.model(None)
        return [_entry(model) for model in service.models.values()]


def _add_state(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.get("/healthz", summary="Say that the process is alive", response_model=State)
    async def healthz() -> State:
        return State(status="ok")

    @app.get(
        "/readyz",
        summary="Say whether photos are taken",
        response_model=State,
        responses={503: {"model": State, "description": "Not yet, or no longer"}},
    )
    async def readyz() -> Response:
        status = 200 if service.state == "ready" else 503
        return JSONResponse({"status": service.state}, status, _retry_after(status))

    @app.get(
        "/metrics",
        summary="Count, for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(reference_page(app.openapi()))


def _entry(model: ServedModel) -> ModelEntry:
    card = model.engine.card
    return ModelEntry(
        name=model.name,
        network=card.name,
        classes=len(card.classes),
        measured=dict(card.measured),
        heatmap=model.class_weights is not None,
    )


async def _while_wanted(request: Request, work: Awaitable[T], timeout_s: float) -> T:
    """Return what the work gives, unless it takes too long or the client goes away: then it is cancelled."""
    answer = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({answer, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        if gone.done():
            raise ClientDisconnect
        raise RefusedError(504, f"An answer must be there within {timeout_s:g} s. It is not. Send a smaller photo.")
    finally:
        answer.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _row(status: int, error: str, headers: dict[str, str] | None = None) -> JSONResponse:
    row: dict[str, Any] = {"path": None, "status": "error", "error": error, "top": []}
    return JSONResponse(row, status, {**_retry_after(status), **(headers or {})})


def _retry_after(status: int) -> dict[str, str]:
    return {"Retry-After": "1"} if status in _RETRY_LATER else {}


async def _on_refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return _row(error.status, error.text)


async def _on_bad_photo(_: Request, error: Exception) -> Response:
    return _row(422, str(error))


async def _on_bad_parameter(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first, *others = error.errors()
    where = first["loc"][:2]  # "query" and the parameter; a longer one says which of several forms it was held against
    why = "; ".join([first["msg"], *(other["msg"] for other in others if other["loc"][:2] == where)])
    return _row(422, f"{where[-1]} must fit. Got {str(first.get('input'))[:100]!r}: {why}.")


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = f"{error.detail}: {request.method} {request.url.path[:200]}. See /docs."
    return _row(error.status_code, text, dict(error.headers or {}))


async def _on_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _on_bug(_: Request, error: Exception) -> Response:
    return _row(500, f"This is a bug of the service, or its machine is short of memory. Got {type(error).__name__}.")


_HANDLERS = {
    RefusedError: _on_refusal,
    ImageError: _on_bad_photo,
    RequestValidationError: _on_bad_parameter,
    HTTPException: _on_http_error,
    ClientDisconnect: _on_gone,
    Exception: _on_bug,
}


class _Edge:
    """Around the application: counts answers, takes HEAD for GET, and reads on for a moment after a refusal.

    A refusal is sent before the body has come. Were the connection closed with bytes of it unread, the system would
    destroy the answer on its way: so what still comes is thrown away, for a limited time, before the answer ends.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, *, known_paths: set[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._known_paths = known_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, body_ended, answered = time.perf_counter(), 500, _has_no_body(scope), False

        async def receive_and_watch() -> Message:
            nonlocal body_ended
            message = await receive()
            body_ended = body_ended or not message.get("more_body", False)
            return message

        async def send_and_linger(message: Message) -> None:
            nonlocal status, answered
            status = message.get("status", status)
            answered = message["type"] == "http.response.body" and not message.get("more_body", False)
            if body_ended:
                await send(message)
            elif message["type"] == "http.response.start":
                await send({**message, "headers": [*message["headers"], (b"connection", b"close")]})
            else:
                await send({**message, "more_body": True})
                if not message.get("more_body", False):
                    with suppress(TimeoutError):
                        async with asyncio.timeout(LINGER_S):
                            while not body_ended:
                                await receive_and_watch()
                    await send({"type": "http.response.body", "body": b""})

        try:
            inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
            await self._app(inner, receive_and_watch, send_and_linger)
        except Exception:
            if not answered:
                raise
            _logger.exception("A request failed")  # it has its answer; its connection may serve on
        finally:
            path = scope["path"] if scope["path"] in self._known_paths else "other"
            self._metrics.answered(path, status, time.perf_counter() - begun)


def _has_no_body(scope: Scope) -> bool:
    names = {name for name, value in scope["headers"] if value != b"0"}
    return not names & {b"content-length", b"transfer-encoding"}
