"""The routes: from requests to answers, whole or streamed."""

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route

from bltjax.runtime.terminal import short
from bltjax.serving import asked as requests
from bltjax.serving.answers import Choice, Delta, Form, most_probable, usage
from bltjax.serving.asked import Asked
from bltjax.serving.errors import RequestError
from bltjax.serving.fields import DETOKENIZE, PATCHES, TOKENIZE, checked
from bltjax.serving.metrics import Metrics
from bltjax.serving.openapi import description
from bltjax.serving.patches import check_threshold, show
from bltjax.serving.text import BOS_NAME, BOS_TOKEN
from bltjax.serving.worker import Worker, broken
from bltjax.vocabulary import text_bytes

PAGE = Path(__file__).parent / "page.html"
CSP = "Content-Security-Policy"
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)
OPEN_PATHS = ("/", "/health")  # without the key
CLOSED = 499  # the client went before its answer; for the metrics alone


@dataclass
class Settings:
    """Settings of the server: its name for the model, and its limits."""

    name: str
    api_key: str | None = None
    max_body_bytes: int = 4 * 2**20
    max_text_bytes: int = 2**13  # of a prompt that is scored or shown
    root_path: str = ""  # with which a proxy passes paths on, or without it
    origins: tuple[str, ...] = ()  # of other sites' pages that may ask; "*": all
    warm_up: bool = True  # compile what usual requests need, as long as there is none


class Server:
    """Handlers of all routes, and which of them are at work."""

    def __init__(self, model, worker: Worker, metrics: Metrics, settings: Settings):
        self.model, self.worker, self.metrics, self.settings = model, worker, metrics, settings
        self.draining = False
        self.at_work = self.num_answered = 0  # requests that are being, and have been, answered
        self.created = int(time.time())
        posts = {
            "/v1/completions": self.completions,
            "/v1/chat/completions": self.chat,
            "/v1/patches": self.patches,
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
        }
        gets = {
            "/": self.page,
            "/health": self.health,
            "/metrics": self.show_metrics,
            "/openapi.json": self.openapi,
            "/v1/models": self.models,
            "/v1/models/{name:path}": self.one_model,
            "/tokenizer_info": self.tokenizer_info,
        }
        self._paths = {*posts, *gets}
        routes: list[BaseRoute] = [
            *(Route(path, handler, methods=["POST"]) for path, handler in posts.items()),
            *(Route(path, handler, methods=["GET"]) for path, handler in gets.items()),
        ]
        if settings.root_path:
            routes.append(Mount(settings.root_path, routes=list(routes)))
        self._routes = Starlette(
            routes=routes,
            exception_handlers={
                RequestError: _refused,
                HTTPException: _no_route,
                RecursionError: _too_deep,
                ClientDisconnect: _gone,
                Exception: _failed,
            },
        )

    async def __call__(self, scope, receive, send):
        """Answers one request as an ASGI application, and counts it."""
        if scope["type"] != "http":
            return await self._routes(scope, receive, send)
        status = CLOSED

        async def watched(message):
            nonlocal status
            status = message.get("status", status)
            await send(message)

        self.at_work += 1
        try:
            refusal = self._refusal(scope)
            await (refusal or self._routes)(scope, receive, watched)
        finally:
            self.at_work -= 1
            self.num_answered += 1
            path = self._path(scope)
            known = path if path in self._paths else "other"
            self.metrics.requests.labels(known, str(status)).inc()

    def _path(self, scope) -> str:
        return scope["path"].removeprefix(self.settings.root_path) or "/"

    def _refusal(self, scope) -> Response | None:
        """Returns the answer to a request without the key, or that comes while the server ends."""
        path, headers = self._path(scope), dict(scope["headers"])
        if self.settings.api_key is not None and path not in OPEN_PATHS:
            given = headers.get(b"authorization", b"")
            given = given[7:] if given[:7].lower() == b"bearer " else given
            if not hmac.compare_digest(given, self.settings.api_key.encode()):
                text = "the key is missing or wrong: send it as 'Authorization: Bearer KEY'"
                return _error(RequestError(text, status=401, code="invalid_api_key"))
        if self.draining and path not in ("/metrics", "/health"):
            text = "this server ends, and takes no more requests: ask another one"
            return _error(RequestError(text, status=503, code="ending", retry_after=1))
        return None

    # ---- texts

    async def completions(self, request: Request) -> Response:
        asked = requests.completion(await self._body(request))
        return await self._answer(request, asked, Form(self.settings.name, False, asked))

    async def chat(self, request: Request) -> Response:
        body = await self._body(request)
        try:
            template = self.model.chat_template()
        except (ValueError, AttributeError):
            raise RequestError(
                "this model was not trained on conversations: use /v1/completions, or serve one "
                "that was (docs/finetuning.md)",
                code="no_chat_template",
            ) from None
        asked = requests.chat(body, template)
        return await self._answer(request, asked, Form(self.settings.name, True, asked))

    async def _answer(self, request: Request, asked: Asked, form: Form) -> Response:
        check_threshold(self.model.patching, asked.threshold)
        choices = [Choice(i, asked) for i in range(asked.num_texts)]
        deltas = self._deltas(asked, choices)
        self.metrics.prompt_bytes.inc(sum(len(prompt.data) for prompt in asked.prompts))
        if not asked.stream:
            found = await _unless_gone(request, _all(deltas))
            return _json(form.whole(found, self._usage(asked, choices)))
        # What is refused is refused before the answer begins.
        first = await _unless_gone(request, anext(deltas))
        events = self._events(first, deltas, form, asked, choices)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    def _usage(self, asked: Asked, choices: list[Choice]) -> dict:
        return usage(asked, (choice.counts for choice in choices))

    async def _deltas(self, asked: Asked, choices: list[Choice]) -> AsyncIterator[Delta]:
        """Yields what the texts of an answer grow by, until all are finished."""
        scored = None
        if asked.is_scored:
            for prompt in asked.prompts:
                self._check_length(prompt.data)
            scored = await self.worker.log_probs([prompt.data for prompt in asked.prompts])
        if asked.echo:
            for choice in choices:
                number = choice.index // asked.n
                log_p = scored and scored[number]
                yield choice.begin(asked.prompts[number], log_p)
        if asked.needs_no_loop:
            for choice in choices:
                yield _without_loop(choice, scored and scored[choice.index // asked.n], asked)
            return
        jobs, started, waits = asked.jobs(), time.perf_counter(), True
        with self.worker.submit(jobs) as answer:
            async for number, piece in answer:
                if waits and (piece.text or piece.finish):
                    self.metrics.first_byte.observe(time.perf_counter() - started)
                    waits = False
                choices[number].counts = piece.counts
                yield choices[number].add(piece.text, piece.log_p, piece.finish)

    async def _events(self, first, deltas, form: Form, asked: Asked, choices):
        """Yields the events of a stream. A client that goes ends it: its jobs are cancelled."""
        async with contextlib.aclosing(deltas):
            try:
                for piece in form.opening():
                    yield _event(piece)
                if _says_something(first):
                    yield _event(form.piece(first))
                async for delta in deltas:
                    if _says_something(delta):
                        yield _event(form.piece(delta))
                for piece in form.closing(self._usage(asked, choices)):
                    yield _event(piece)
            except RequestError as error:  # too late for a status
                yield _event(error.content())
            yield b"data: [DONE]\n\n"

    # ---- patches, and bytes as tokens

    async def patches(self, request: Request) -> Response:
        given = checked(await self._body(request), PATCHES)
        prompts = requests.prompts_of(given["prompt"])
        if len(prompts) != 1:
            raise RequestError(f"prompt holds {len(prompts)} texts: give one", "prompt")
        self._check_length(prompts[0].data)
        check_threshold(self.model.patching, given["threshold"])
        work = self.worker.call(lambda: show(self.model, prompts[0].data, given["threshold"]))
        return _json(await _unless_gone(request, work))

    async def tokenize(self, request: Request) -> Response:
        text = checked(await self._body(request), TOKENIZE)["prompt"]
        if text is None:
            raise RequestError("prompt is missing: give a string", "prompt")
        tokens = [BOS_TOKEN] if text == BOS_NAME else list(text_bytes(text))
        most = self.settings.max_text_bytes
        return _json(dict(tokens=tokens, count=len(tokens), max_model_len=most))

    async def detokenize(self, request: Request) -> Response:
        tokens = checked(await self._body(request), DETOKENIZE)["tokens"]
        if tokens is None:
            raise RequestError("tokens is missing: give a list of bytes", "tokens")
        data = bytes(token for token in tokens if token != BOS_TOKEN)
        return _json(dict(prompt=data.decode("utf-8", "replace")))

    async def tokenizer_info(self, request: Request) -> Response:
        return _json(dict(tokenizer_class="bytes", bos_token=BOS_NAME, eos_token=None))

    # ---- the rest

    async def page(self, request: Request) -> Response:
        return FileResponse(PAGE, media_type="text/html", headers={CSP: POLICY})

    async def health(self, request: Request) -> Response:
        if not self.worker.alive:
            return _error(RequestError("the model has failed", status=503, code="model_failed"))
        if self.draining:
            return _error(RequestError("this server ends", status=503, code="ending"))
        if not self.worker.is_warm:
            text = "programs are being compiled: a request may wait for that, ask again for this"
            return _error(RequestError(text, status=503, code="warming_up", retry_after=1))
        return _json(dict(status="ok"))

    async def models(self, request: Request) -> Response:
        return _json(dict(object="list", data=[self._model()]))

    async def one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.settings.name:
            text = f"no model {short(name)} here: there is {self.settings.name}"
            raise RequestError(text, "model", status=404, code="model_not_found")
        return _json(self._model())

    def _model(self) -> dict:
        owner = dict(created=self.created, owned_by="bltjax")
        return dict(id=self.settings.name, object="model", **owner)

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        return _json(description(self.settings.root_path))

    def _check_length(self, data: bytes):
        if len(data) > self.settings.max_text_bytes:
            raise RequestError(
                f"prompt has {len(data)} bytes, and {self.settings.max_text_bytes} are read at "
                "most: shorten it",
                "prompt",
            )

    async def _body(self, request: Request):
        """Returns the JSON of a request. Raises RequestError for what is too large, or none."""
        if not self.worker.alive:
            raise broken()
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which pages of other sites cannot send unasked
            raise RequestError("send 'Content-Type: application/json'", status=415)
        most, data = self.settings.max_body_bytes, b""
        async for part in request.stream():
            data += part
            if len(data) > most:
                text = f"the body has more than {most} bytes: send a smaller one"
                raise RequestError(text, status=413, code="body_too_large")
        try:
            return json.loads(data, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is no JSON ({error}): send an object") from None


def _without_loop(choice: Choice, log_p, asked: Asked) -> Delta:
    """Returns the end of a text of which no byte, or the most probable one, is asked for."""
    if asked.max_new_bytes == 0:
        return choice.add(b"", None, "length")
    text, finish = most_probable(log_p[-1])
    choice.counts = choice.counts._replace(new_bytes=len(text))
    return choice.add(text, log_p[-1:], finish)


def _says_something(delta: Delta) -> bool:
    return bool(delta.text or delta.entries or delta.finish)


async def _all(deltas: AsyncIterator[Delta]) -> list[Delta]:
    async with contextlib.aclosing(deltas):
        return [delta async for delta in deltas]


async def _unless_gone(request: Request, work: Coroutine):
    """Returns what work gives, and cancels it where the client goes meanwhile."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        working.cancel()
        await asyncio.wait({working})
        raise ClientDisconnect
    finally:
        gone.cancel()


async def _disconnected(request: Request):
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refuse_constant(name: str):
    raise ValueError(f"it holds {name}")


def _json(content, status: int = 200, headers: dict | None = None) -> Response:
    return Response(_dumped(content), status, headers, "application/json")


def _event(content) -> bytes:
    return b"data: " + _dumped(content) + b"\n\n"


def _dumped(content) -> bytes:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")  # of a lone surrogate: JSON's own escape


def _error(error: RequestError) -> Response:
    again = error.retry_after
    headers = None if again is None else {"Retry-After": str(again)}
    return _json(error.content(), error.status, headers)


async def _refused(request: Request, error: RequestError) -> Response:
    return _error(error)


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=CLOSED)


async def _too_deep(request: Request, error: Exception) -> Response:
    return _error(RequestError("the body is nested too deeply: send a flat object"))


async def _failed(request: Request, error: Exception) -> Response:
    return _error(RequestError("this request failed: see the log of the server", status=500))


async def _no_route(request: Request, error: HTTPException) -> Response:
    path = request.url.path
    text = f"no {path} here: see /openapi.json" if error.status_code == 404 else error.detail
    refused = RequestError(text, status=error.status_code)
    return _json(refused.content(), error.status_code, dict(error.headers or {}))
