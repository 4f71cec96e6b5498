"""The server's routes: OpenAI's API over the models, and the page. Every error is an object in OpenAI's shape."""

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from common.weights import Loaded
from Config import UserError
from serving.engine import Engine, Job
from serving.errors import ApiError, dump, stopping
from serving.guard import Guard
from serving.models import Models
from serving.replies import DONE, Form, Reply, Splitter, Whole, event
from serving.requests import ChatRequest, CompletionRequest, read_chat, read_completion, read_object, wrong
from text.chat import encode_chat

LARGEST_BODY = 2**20  # bytes
MAX_DRAINED = 2**24  # bytes of a larger body that are read and dropped, so that its client comes to read the answer
SMALL_BODY = 2**15  # bytes; larger ones are read one at a time beside the event loop, which others wait for
TOKENS_AROUND = 4  # of a message at least: <s>, its role, </s>, a line break
NEXT_BYTE_WITHIN, BODY_WITHIN = 10, 60  # seconds
WEB = Path(__file__).parent.parent / "web"
PAGE = {"/": ("index.html", "text/html; charset=utf-8"), "/style.css": ("style.css", "text/css; charset=utf-8"),
        "/app.js": ("app.js", "text/javascript; charset=utf-8"), "/icon.svg": ("icon.svg", "image/svg+xml")}
POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
PAGE_HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache",
                "Referrer-Policy": "no-referrer"}
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


RequestType = TypeVar("RequestType", ChatRequest, CompletionRequest)
Result = TypeVar("Result")


class ClientGone(Exception):
    """The client has closed its connection."""


def make_app(models: Models, engine: Engine, max_new_tokens: int, key: str | None = None, host: str = "127.0.0.1",
             cors: list[str] | None = None) -> Guard:
    """The ASGI app. `max_new_tokens` is for requests that name none; `key`, `host` and `cors` are Guard's."""
    reader, encoder = ThreadPoolExecutor(1, "reader"), ThreadPoolExecutor(2, "encoder")
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)

    async def show_file(request: Request) -> Response:
        name, type_ = PAGE[request.url.path]
        try:
            return Response((WEB / name).read_bytes(), media_type=type_, headers=PAGE_HEADERS)
        except OSError:
            raise ApiError(404, f"web/{name} is missing") from None

    for path in PAGE:
        app.api_route(path, methods=["GET", "HEAD"])(show_file)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        content = {"status": "stopping" if engine.stopping else "ok", "running": len(engine.running),
                   "waiting": engine.queued, "slots": engine.slots}
        return answer(content, 503 if engine.stopping else 200)

    @app.get("/v1/models")
    @app.get("/models")
    async def list_models() -> Response:
        listed = await asyncio.to_thread(lambda: [model.about() for model in models.present])
        return answer({"object": "list", "data": listed})

    @app.get("/v1/models/{name:path}")
    @app.get("/models/{name:path}")
    async def show_model(name: str) -> Response:
        return answer(await asyncio.to_thread(models.named(name).about))

    @app.post("/v1/chat/completions")
    @app.post("/chat/completions")
    async def chat(request: Request) -> Response:
        asked, name, loaded = await begin(request, read_chat)
        if loaded.continues_text:
            raise wrong(f"{loaded.stage} weights continue text and hold no conversation; use /v1/completions", "model")
        opened = loaded.thinks and asked.thinking
        ids = await in_pool(encoder, lambda: chat_prompt(loaded, asked))
        return await reply_to(request, asked, loaded, ids, Form("chat", name), Splitter(opened, asked.stop))

    @app.post("/v1/completions")
    @app.post("/completions")
    async def complete(request: Request) -> Response:
        asked, name, loaded = await begin(request, read_completion)
        ids = await in_pool(encoder, lambda: text_prompt(loaded, asked))
        return await reply_to(request, asked, loaded, ids, Form("text", name), Whole(asked.stop))

    async def begin(request: Request, check: Callable[[dict], RequestType]) -> tuple[RequestType, str, Loaded]:
        """(what is asked, the model's name, its weights)."""
        asked = await read(request, check)
        model = models.named(asked.model)
        engine.check_capacity()
        if model.loaded is None:
            await unless_gone(request, engine.until_loaded(model.load()))
        return asked, model.name, model.opened()

    async def reply_to(request: Request, asked: ChatRequest | CompletionRequest, loaded: Loaded, ids: list[int],
                       form: Form, splitter: Splitter | Whole) -> Response:
        if len(ids) >= loaded.model.config.max_seq_len:
            raise too_long(loaded, len(ids), form.chat)
        job = engine.submit(loaded, ids, asked.max_tokens or max_new_tokens, asked.sampling, asked.seed)
        reply = Reply(loaded.tokenizer, splitter, len(ids))
        try:
            if not asked.stream:
                return answer(form.whole(reply, await unless_gone(request, all_pieces(job, reply))))
            first = await unless_gone(request, anext(job))  # an error before it has a status of its own
        except BaseException:
            job.cancel()
            raise
        return EventStream(events(job, first, reply, form, asked.include_usage), job)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return answer(error.content, error.status, error.headers)

    @app.exception_handler(ClientGone)
    async def client_gone(request: Request, error: ClientGone) -> Response:
        return answer(ApiError(499, "the client has gone").content, 499)  # nobody gets it: an app must answer

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        messages = {404: f"there is no {request.url.path[:200]}",
                    405: f"{request.method} is not allowed for {request.url.path[:200]}"}
        message = messages.get(error.status_code, str(error.detail))
        return answer(ApiError(error.status_code, message).content, error.status_code, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        return answer(ApiError(500, "a defect of the server; its log has the traceback").content, 500)

    async def read(request: Request, check: Callable[[dict], RequestType]) -> RequestType:
        if engine.stopping:
            raise stopping()
        body = await body_of(request)
        if len(body) <= SMALL_BODY:
            return check(read_object(body))
        return await in_pool(reader, lambda: check(read_object(body)))

    return Guard(app, key, host, cors or [])


def answer(content: dict, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(dump(content), status, headers, media_type="application/json")


# ---------------------------------------------------------------------------------------------
# what comes


async def body_of(request: Request) -> bytes:
    """The body of a request. Raises ApiError where it is too large or does not come, ClientGone where nobody waits."""
    begin, body, size, more = time.monotonic(), bytearray(), 0, True
    close = {"Connection": "close"}  # what may still come is not read
    too_large = ApiError(413, f"the body must have at most {LARGEST_BODY:,} bytes", None, "body_too_large", close)
    announced = request.headers.get("content-length", "0")
    if len(announced) > 9 or int(announced) > MAX_DRAINED:
        raise too_large
    while more:
        try:
            left = BODY_WITHIN - (time.monotonic() - begin)
            message = await asyncio.wait_for(request.receive(), min(NEXT_BYTE_WITHIN, max(left, 0)))
        except TimeoutError:
            raise ApiError(408, "the request's body did not come in time", None, "timeout", close) from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
        if size <= LARGEST_BODY:
            body += message.get("body", b"")
        elif size > MAX_DRAINED or not more:
            raise too_large
    return bytes(body)


def too_long(loaded: Loaded, tokens: int, chat: bool, at_least: bool = False) -> ApiError:
    """The error of a prompt that leaves no room for an answer."""
    return wrong(f"this model's context is {loaded.model.config.max_seq_len:,} tokens, but the prompt has "
                 f"{'at least ' * at_least}{tokens:,}, which leaves no room for an answer; please shorten it",
                 "messages" if chat else "prompt", "context_length_exceeded")


@functools.lru_cache
def longest_token(tokenizer) -> int:
    """The characters of the longest entry of a vocabulary."""
    return max(map(len, tokenizer.get_vocab()))


def check_size(loaded: Loaded, texts: list[str], each: int, chat: bool) -> None:
    """Raises ApiError for texts, each with `each` tokens around it, that need not be encoded to see that they are too
    long: no token is longer than the longest of the vocabulary."""
    longest = longest_token(loaded.tokenizer)
    tokens = sum(each + len(text) // longest for text in texts)
    if tokens >= loaded.model.config.max_seq_len:
        raise too_long(loaded, tokens, chat, at_least=True)


def chat_prompt(loaded: Loaded, asked: ChatRequest) -> list[int]:
    """The ids of a conversation, up to the reply. Raises ApiError."""
    check_size(loaded, [message["content"] for message in asked.messages], TOKENS_AROUND, chat=True)
    try:
        thinking = asked.thinking if loaded.thinks else None
        return encode_chat(loaded.tokenizer, asked.messages, add_generation_prompt=True, thinking=thinking)[0]
    except UserError as error:
        raise wrong(str(error), "messages") from None


def text_prompt(loaded: Loaded, asked: CompletionRequest) -> list[int]:
    """The ids of a text to continue. Raises ApiError."""
    check_size(loaded, [asked.prompt], 1, chat=False)
    return [loaded.encoder.bos_id, *loaded.encoder.encode([asked.prompt])[0]]


def in_pool(pool: ThreadPoolExecutor, work: Callable[[], Result]) -> Awaitable[Result]:
    """The result of `work`, done beside the event loop."""
    return asyncio.get_running_loop().run_in_executor(pool, work)


async def unless_gone(request: Request, work: Awaitable):
    """The result of `work`. Raises ClientGone, with the work cancelled, when the client goes first."""
    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGone
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


# ---------------------------------------------------------------------------------------------
# what goes


async def all_pieces(job: Job, reply: Reply) -> list[tuple[str, str]]:
    """The pieces of a whole reply."""
    pieces = []
    async for ids, reason in job:
        pieces += reply.push(ids, reason)
        if reply.finish_reason is not None:
            break
    job.cancel()  # a stop string was found
    return pieces


async def events(job: Job, first: tuple[list[int], str | None], reply: Reply, form: Form,
                 include_usage: bool) -> AsyncIterator[bytes]:
    """The server-sent events of a reply."""
    null_usage = {"usage": None} if include_usage else {}
    try:
        for chunk in form.first():
            yield event(chunk | null_usage)
        ids, reason = first
        while True:
            if pieces := reply.push(ids, reason):
                yield b"".join(event(form.piece(*piece) | null_usage) for piece in pieces)
            if reply.finish_reason is not None:
                break
            ids, reason = await anext(job)
        job.cancel()
        yield event(form.last(reply) | null_usage)
        if include_usage:
            yield event(form.usage(reply))
    except ApiError as error:
        yield event(error.content)
    yield DONE


class EventStream(StreamingResponse):
    """A stream whose job is cancelled when it ends, in whatever way."""

    def __init__(self, content: AsyncIterator[bytes], job: Job):
        super().__init__(content, headers=STREAM_HEADERS, media_type="text/event-stream")
        self.job = job

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.cancel()
