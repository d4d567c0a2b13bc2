"""The routes: POST /v1/completions and /v1/chat/completions, GET /v1/models, /v1/models/NAME and /health.

Starlette alone, because FastAPI would check requests in a form and with status codes of its own. Whatever a request
does wrong is answered by an ``ApiError``, and the connection lives on.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from umv2_megatron.evaluation.local_export import LocalExport
from umv2_megatron.serving.answers import Answer
from umv2_megatron.serving.choices import Piece, generate_choice
from umv2_megatron.serving.engine import Engine, Job
from umv2_megatron.serving.errors import ApiError, failed
from umv2_megatron.serving.fields import wrong
from umv2_megatron.serving.names import ModelNames
from umv2_megatron.serving.requests import READERS, Ask

log = logging.getLogger("umv2_megatron.serving")

BODY_SECONDS = 60.0
"""In which a request's body must have come."""

Pieces = asyncio.Queue["Piece | ApiError | None"]
Handler = Callable[[Request], Awaitable[Response]]


class Api:
    """What the routes do.

    Args:
        max_request_bytes: of a request's body.
    """

    def __init__(self, export: LocalExport, names: ModelNames, engine: Engine, max_request_bytes: int) -> None:
        # a copy of the tokenizer of its own: one that is in use in another thread may raise
        self._export = export
        self._reading = dataclasses.replace(export, tokenizer=copy.deepcopy(export.tokenizer))
        self._reader = ThreadPoolExecutor(1, "umv2 tokenize")
        self._names = names
        self._engine = engine
        self._max_request_bytes = max_request_bytes
        self._created = int(time.time())

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [Route(path, _answered(self.generate), methods=["POST"]) for path in READERS]
        routes += [
            Route("/v1/models", _answered(self.models), methods=["GET"]),
            Route("/v1/models/{name:path}", _answered(self.model), methods=["GET"]),
            Route("/health", _answered(self.health), methods=["GET"]),
        ]
        app = Starlette(routes=routes, exception_handlers={HTTPException: _no_route})
        app.router.redirect_slashes = False
        return app

    async def generate(self, request: Request) -> Response:
        """The two routes that generate."""
        self._engine.check()  # before the body is read
        body = await self._body(request)
        model = body.get("model")
        if model is None:
            raise ApiError("model is missing; give the name of a model of GET /v1/models", "model")
        if not isinstance(model, str):
            raise wrong("model", model, "a string")
        if model not in self._names:
            raise _no_model(model)
        loop = asyncio.get_running_loop()
        ask = await loop.run_in_executor(self._reader, READERS[request.url.path], body, self._reading)
        pieces: Pieces = asyncio.Queue()
        steps = chain.from_iterable(generate_choice(self._export, choice) for choice in ask.choices)
        job = self._engine.submit(steps, lambda piece: _put(loop, pieces, piece))
        if ask.stream:
            return EventStream(_events(ask, Answer(ask, self._names.id), pieces), job)
        return JSONResponse(await _whole(request, Answer(ask, self._names.id), pieces, job))

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """The model by one of its names."""
        name = request.path_params["name"]
        if name not in self._names:
            raise _no_model(name)
        return JSONResponse(self._model())

    async def health(self, request: Request) -> Response:
        """200 while requests are taken; 503 from the signal on that ends the server."""
        self._engine.check_running()
        return JSONResponse({"status": "ok"})

    def _model(self) -> dict[str, Any]:
        return {"id": self._names.id, "object": "model", "created": self._created, "owned_by": "umv2_megatron",
                "max_model_len": self._export.context}  # fmt: skip

    async def _body(self, request: Request) -> dict[str, Any]:
        """The request's JSON object."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # browsers let any page send the other types here, without asking
            raise ApiError(f"Content-Type is {ascii(kind)[:80]}; expected application/json")
        limit = self._max_request_bytes
        too_large = ApiError(
            f"the request's body is larger than {limit} bytes (--max-request-bytes); send a shorter one",
            code="request_too_large",
            status=413,
        )
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > limit:
            raise too_large
        data = bytearray()

        async def read() -> None:
            async for part in request.stream():
                data.extend(part)
                if len(data) > limit:
                    raise too_large

        try:
            await asyncio.wait_for(read(), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(
                f"the request's body did not come within {BODY_SECONDS:g} seconds; send it at once",
                status=408,
                headers={"Connection": "close"},
            ) from None
        try:
            body = json.loads(data, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise ApiError("the request's body is no JSON; send one JSON object in UTF-8") from None
        if not isinstance(body, dict):
            raise ApiError("the request's body is JSON, but no object; send one JSON object")
        return body


class EventStream(Response):
    """Sends events as they come; ends the job when the client leaves, or anything else stops it."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], job: Job) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.ensure_future(_gone(receive))
        watch.add_done_callback(lambda _: self._job.cancel())
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event.encode("utf-8"), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watch.cancel()
            self._job.cancel()


async def _events(ask: Ask, answer: Answer, pieces: Pieces) -> AsyncIterator[str]:
    """Server-sent events; after an error nothing follows, not even [DONE]."""
    while (piece := await pieces.get()) is not None:
        if isinstance(piece, ApiError):
            yield _event(piece.body)
            return
        for chunk in answer.chunks(piece):
            yield _event(chunk)
    for chunk in answer.last_chunks():
        yield _event(chunk)
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _whole(request: Request, answer: Answer, pieces: Pieces, job: Job) -> dict[str, Any]:
    """The whole answer. Raises ``ApiError`` for a fault and ``ClientDisconnect`` when nobody waits any more."""

    async def all_of_them() -> list[Piece]:
        found: list[Piece] = []
        while (piece := await pieces.get()) is not None:
            if isinstance(piece, ApiError):
                raise piece
            found.append(piece)
        return found

    collect, watch = asyncio.ensure_future(all_of_them()), asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({collect, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not collect.done():
            raise ClientDisconnect
        return answer.whole(collect.result())
    finally:
        job.cancel()
        collect.cancel()
        watch.cancel()


async def _gone(receive: Receive) -> None:
    """Until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _put(loop: asyncio.AbstractEventLoop, pieces: Pieces, piece: Piece | ApiError | None) -> None:
    """Hand a piece from the engine's thread to the event loop's."""
    loop.call_soon_threadsafe(pieces.put_nowait, piece)


def _answered(work: Handler) -> Handler:
    """``work``, whose faults become answers."""

    async def handle(request: Request) -> Response:
        try:
            return await work(request)
        except ApiError as error:
            return _refused(error)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except Exception:
            log.exception("a request failed")
            return _refused(failed())

    return handle


def _refused(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


def _no_model(name: str) -> ApiError:
    return ApiError(
        f"The model {ascii(name)[:200]} does not exist; GET /v1/models lists the one served",
        "model",
        code="model_not_found",
        status=404,
    )


async def _no_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    what = f"{request.method} {ascii(request.url.path)[:200]}"
    code = "method_not_allowed" if status == 405 else "unknown_url"
    headers = getattr(error, "headers", None)
    return _refused(ApiError(f"{what} is no request of this server", code=code, status=status, headers=headers))


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
