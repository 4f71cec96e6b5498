"""serve.py under load and under attack, on loopback.

    python benchmarks/serve_load.py load                        beside llama.cpp's server and transformers serve
    python benchmarks/serve_load.py hostile --requests 12500    hostile requests, beside a well-behaved client

load starts each server as a process of its own on the same weights, and 1, 8 and 32 clients at once each ask --asks
questions, one behind the other, streamed, greedily, with answers of exactly --new_tokens tokens: the weights are
changed so that `</s>` is never the likeliest token. An answer that ends earlier all the same is counted. Servers and
numbers of clients take turns. "first token" is the time until the first text, from the moment when the client
connects; of all turns, the median and the 95th percentile. "8 clients vs 1" is how much longer 8 clients take than one.

    ours            serve.py with 16 slots
    llama.cpp       its server (xllamacpp) with 16 slots, the same weights as GGUF in the same precision
    transformers    transformers serve --continuous-batching, the same weights as a folder of transformers

A server that cannot be started, or fails, is named with the reason, and the others go on. Without --checkpoint the
weights are random.

hostile sends at least 20 kinds of requests (benchmarks/hostile.py), mixed in random order: each has a set of answers
that a sound server may give, and every other answer is a fault. Beside them a well-behaved client asks the same
questions over and over, greedily and with a seed, and must get the answers that it got before. The server computes in
float32: a row in company may be rounded in another way than alone, and with these margins no token depends on it.
Faults are also: a 5xx, a traceback, memory that grows, files that stay open, requests that stay, an exit code.
The memory is flat if the server's, averaged over the last tenth of the requests, is at most --most_growth MiB above the
average over the third tenth: 16 MiB are 1.8 KiB for each of the 8,750 requests between them. Before the attack a
prompt of every length is sent, since PyTorch keeps kernels for each; "first" and "lengths" are the memory before and
after that.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import hostile
from benchmarks.decode_throughput import make_model, why_no_llama_cpp
from benchmarks.hostile import CLOSED, HALF, IN_STREAM, LEAVE, LEFT, SLOWLY, Attack
from benchmarks.measure import (
    ROOT,
    WorkerFailed,
    end,
    make_corpus,
    make_parser,
    print_head,
    print_row,
    ratio,
    run_script,
    take_turns,
    train_a_tokenizer,
    warn_of_load,
)
from common import exits, runtime
from common.weights import load_model, refuse_int8, save_weights
from Config import LLMConfig, UserError, number
from text.tokenizer import TextEncoder, choose_tokenizer, load_tokenizer, tokenizer_files

CPU = torch.device("cpu")
SLOTS, QUEUE = 16, 64
CONTEXT = 1024  # of each slot of llama.cpp
START_WITHIN, REQUEST_WITHIN = 60, 120  # seconds
TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
GGUF_NAMES = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}
CORPUS_MEGABYTES = 2  # on which a tokenizer is trained

SMALL_QUEUE, HOSTILE_CONTEXT = 24, 256
KEY = "secret"
FAST, SLOW, CROWDED = 24, 64, 4  # attacks at once: the server refuses the 513th connection
PAUSE = 0.25  # seconds between two looks at the memory
STEADY_TOKENS = 24
EXAMPLES = 20  # of faults that are shown


# ---------------------------------------------------------------------------------------------
# weights


def prepare(args, folder: Path, changed: bool, **sizes) -> Path:
    """A weights file for all servers: random ones, or --checkpoint. `changed`: greedy answers do not end."""
    path = folder / "weights.pth"
    if args.checkpoint is not None:
        model, meta = load_model(args.checkpoint, hint="--checkpoint")
        refuse_int8(args.checkpoint, meta)
        if meta.get("stage") == "pretrain":
            raise UserError(f"--checkpoint {args.checkpoint}: these weights hold no conversation; take a later stage's")
        tokenizer = choose_tokenizer(args.tokenizer_path, args.checkpoint, meta.get("tokenizer"),
                                     meta.get("tokenizer_sha256"))
        encoder = TextEncoder.of(tokenizer)
        if changed:
            with torch.no_grad():  # as unlikely as `<s>`, which no reply has
                model.lm_head.weight[encoder.eos_id] = model.lm_head.weight[encoder.bos_id]
        meta = meta | {"tokenizer": tokenizer_files(tokenizer)}
    else:
        corpus = folder / "corpus.jsonl"
        make_corpus(corpus, CORPUS_MEGABYTES)
        tokenizer = load_tokenizer(args.tokenizer_path or train_a_tokenizer(str(corpus), folder, args.preset))
        encoder = TextEncoder.of(tokenizer)
        torch.manual_seed(0)
        model = make_model(LLMConfig.preset(args.preset, vocab_size=encoder.vocab_size, **sizes), CPU)
        meta = {"stage": "SFT", "step": 0, "tokenizer": tokenizer_files(tokenizer),
                "tokenizer_sha256": encoder.fingerprint}
    save_weights(path, model, meta)
    return path


# ---------------------------------------------------------------------------------------------
# servers


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server as a process of its own on loopback. Raises WorkerFailed, with its last line, where it does not start.

    `measured` lists the results of `load`, by number of clients.
    """

    def __init__(self, command: list[str], folder: Path, name: str, threads: int, model: str | None = None, **fields):
        self.log, self.model, self.fields = folder / f"{name}.log", model, fields
        self.port = free_port()
        self.measured: dict[int, list[dict]] = {}
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen([*command, "--port", str(self.port)], stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=log, env=environment, cwd=ROOT)
        deadline = time.monotonic() + START_WITHIN
        while (health := asyncio.run(self.health())) is None:
            if self.process.poll() is not None or time.monotonic() > deadline:
                said = self.said.strip().splitlines()
                self.close()
                raise WorkerFailed(f"did not start: {(said or ['no reason given'])[-1][:200]}")
            time.sleep(0.2)
        self.started = health

    @property
    def said(self) -> str:
        """What it wrote on stdout and stderr."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    async def health(self) -> dict | None:
        """What /health says, or None."""
        try:
            async with asyncio.timeout(5):
                (answer,) = await exchange(self.port, hostile.http(path="/health", method="GET"))
            return json.loads(answer.body) if answer.status == 200 else None
        except (OSError, TimeoutError, ValueError):
            return None

    def proc(self, name: str) -> Path:
        """A file of /proc about it."""
        return Path("/proc") / str(self.process.pid) / name

    @property
    def resident(self) -> float:
        """MiB of memory now."""
        return int(re.search(r"VmRSS:\s+(\d+)", self.proc("status").read_text())[1]) / 2**10

    @property
    def open_files(self) -> int:
        """Files and connections that are open."""
        return len(list(self.proc("fd").iterdir()))

    def close(self, within: float = 20) -> int | None:
        """End it. Returns its exit code, or None if it had to be killed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None


def start(name: str, weights: Path, folder: Path, dtype: str, threads: int) -> Server:
    """Start one of the servers of `load`. Raises WorkerFailed."""
    if name == "ours":
        return Server([sys.executable, "serve.py", "--checkpoint", str(weights), "--device", "cpu", "--dtype", dtype,
                       "--slots", str(SLOTS), "--queue", str(QUEUE)], folder, name, threads)
    try:
        if name == "llama.cpp":
            if trouble := why_no_llama_cpp(CPU):
                raise WorkerFailed(f"did not start: {trouble}")
            run_script("export.py", "--checkpoint", str(weights), "--format", "gguf", "--quant", GGUF_NAMES[dtype],
                       "--out", str(folder / "gguf"))
            (path,) = (folder / "gguf").glob("*.gguf")
            return Server([sys.executable, __file__, "llama_cpp", "--gguf", str(path), "--threads", str(threads)],
                          folder, name, threads, ignore_eos=True, cache_prompt=False)
        run_script("export.py", "--checkpoint", str(weights), "--format", "hf", "--out", str(folder / "hf"))
    except UserError as error:
        raise WorkerFailed(f"did not start: {error}") from None
    model = str(folder / "hf")
    return Server([sys.executable, "-m", "transformers.cli.transformers", "serve", model, "--continuous-batching",
                   "--cb-block-size", "32", "--cb-num-blocks", str(SLOTS * CONTEXT // 32), "--device", "cpu", "--dtype",
                   TORCH_NAMES[dtype], "--host", "127.0.0.1"], folder, name, threads, model)


def llama_cpp_alone(args) -> int:
    """llama.cpp's server in this process, until SIGTERM."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.n_ctx, params.port = args.gguf, SLOTS, SLOTS * CONTEXT, args.port
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    params.fit_params, params.verbosity = False, 0
    server = xllamacpp.Server(params)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    print(server.listening_address, flush=True)
    while True:
        signal.pause()


# ---------------------------------------------------------------------------------------------
# HTTP


class Answer:
    """The answer to a request: its status and its body, as it comes. `status` is CLOSED if there is none."""

    def __init__(self, status, headers: dict[str, str] | None = None, body: bytes = b""):
        self.status, self.headers, self.body = status, headers or {}, body


async def read_head(reader: asyncio.StreamReader) -> Answer:
    """An answer without its body."""
    try:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    except (asyncio.IncompleteReadError, OSError):
        return Answer(CLOSED)
    headers = dict(line.lower().split(":", 1) for line in lines if line)
    return Answer(int(first.split(" ")[1]), {name: value.strip() for name, value in headers.items()})


async def body_parts(reader: asyncio.StreamReader, answer: Answer):
    """The parts of a body, as they come. Raises IncompleteReadError where it is cut."""
    if answer.headers.get("transfer-encoding") == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
    elif "content-length" in answer.headers:
        yield await reader.readexactly(int(answer.headers["content-length"]))
    elif answer.status not in (204, 304):
        while part := await reader.read(2**16):
            yield part


async def read_answers(reader: asyncio.StreamReader) -> list[Answer]:
    """All answers up to the end of the connection; a last one of CLOSED if there was none, or it was cut."""
    answers = []
    while (answer := await read_head(reader)).status != CLOSED:
        try:
            answer.body = b"".join([part async for part in body_parts(reader, answer)])
        except (asyncio.IncompleteReadError, OSError):
            return [*answers, Answer(CLOSED)]
        answers.append(answer)
    return answers or [Answer(CLOSED)]


async def exchange(port: int, data: bytes) -> list[Answer]:
    """Send bytes, read all answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        with contextlib.suppress(ConnectionError):  # it may have answered, and closed, before all was sent
            writer.write(data)
            await writer.drain()
        return await read_answers(reader)
    finally:
        leave(writer)


def leave(writer: asyncio.StreamWriter, reset: bool = False) -> None:
    """Close a connection, with a reset instead of a farewell."""
    if reset and (sock := writer.get_extra_info("socket")) is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    else:
        writer.close()


def sse_objects(data: bytes) -> list[dict]:
    """The objects of server-sent events, without the end [DONE]."""
    found = (line.removeprefix(b"data:").strip() for line in data.split(b"\n") if line.startswith(b"data:"))
    return [json.loads(each) for each in found if each != b"[DONE]"]


# ---------------------------------------------------------------------------------------------
# load


def percentile(values: list[float], percent: float) -> float:
    """The least value that `percent` % of the values do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


def question(client: int, ask: int, turn: int) -> str:
    """A question that no other client asks, of about 60 tokens: what a server remembers of others does not help."""
    rng = random.Random(f"{client} {ask} {turn}")
    return f"请把这些数从小到大排列：{'、'.join(str(rng.randint(10, 99)) for _ in range(16))}。"


async def ask(server: Server, content: str, new_tokens: int) -> tuple[float, int]:
    """Ask, and read the stream. Returns (seconds to the first text, tokens). Raises WorkerFailed."""
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": new_tokens, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True}} | server.fields
    if server.model is not None:
        body["model"] = server.model
    begin, first, tokens, rest = time.perf_counter(), None, None, b""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(hostile.http(json.dumps(body).encode()))
        answer = await read_head(reader)
        async for part in body_parts(reader, answer):
            if answer.status != 200:
                raise WorkerFailed(f"answers {answer.status}: {part[:200].decode(errors='replace')}")
            *events, rest = (rest + part).split(b"\n\n")
            for said in sse_objects(b"\n".join(events)):
                if "error" in said:
                    raise WorkerFailed(f"answers in its stream {said['error']}"[:200])
                if first is None and any(any(choice["delta"].get(field) for field in ("content", "reasoning_content"))
                                         for choice in said["choices"]):
                    first = time.perf_counter() - begin
                if said.get("usage"):
                    tokens = said["usage"]["completion_tokens"]
    except (OSError, asyncio.IncompleteReadError) as error:
        raise WorkerFailed(f"cut a stream: {type(error).__name__}") from None
    finally:
        writer.close()
    if tokens is None:
        raise WorkerFailed(f"ended a stream without the number of its tokens (status {answer.status})")
    return time.perf_counter() - begin if first is None else first, tokens


def load(server: Server, clients: int, asks: int, new_tokens: int, deadline: float) -> float:
    """Let clients ask. Adds a result to server.measured, returns the seconds that all took. Raises WorkerFailed."""
    turn = len(server.measured.setdefault(clients, []))

    async def client(number: int) -> list[tuple[float, int]]:
        return [await ask(server, question(number, each, turn), new_tokens) for each in range(asks)]

    async def all_clients() -> list[list[tuple[float, int]]]:
        async with asyncio.timeout(min(REQUEST_WITHIN * asks, deadline - time.monotonic())):
            return await asyncio.gather(*(client(number) for number in range(clients)))

    begin = time.perf_counter()
    try:
        done = [each for answers in asyncio.run(all_clients()) for each in answers]
    except TimeoutError:
        late = time.monotonic() >= deadline - 1
        raise WorkerFailed("not measured: --limit_s is over" if late else "failed: no answer in time") from None
    except OSError as error:
        raise WorkerFailed(f"failed: {error}") from None
    seconds = time.perf_counter() - begin
    server.measured[clients].append({
        "seconds": seconds, "requests": len(done), "tokens": sum(tokens for _, tokens in done),
        "first": [first for first, _ in done], "short": sum(tokens < new_tokens for _, tokens in done)})
    return seconds


def compare(args, result: dict) -> None:
    """Start the servers, measure them in turns. Fills `result` and prints the table."""
    deadline, servers = time.monotonic() + args.limit_s, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = prepare(args, folder, changed=True)
        try:
            for name in dict.fromkeys(args.servers):
                try:
                    servers[name] = start(name, weights, folder, result["dtype"], args.threads)
                except WorkerFailed as failure:
                    result["failures"][name] = str(failure)
                    print(f"{name} {failure}", flush=True)
            work = {f"{name}, {clients} clients": partial(guarded, result["failures"], name, partial(
                load, server, clients, args.asks, args.new_tokens, deadline))
                for clients in args.clients for name, server in servers.items()}
            if work:
                take_turns(work, args.repeats)
            show(args, result, servers)
        finally:
            for server in servers.values():
                server.close()


def guarded(failures: dict, name: str, measure) -> float:
    """The result of `measure`; a failure is also noted under the server's name."""
    try:
        return measure()
    except WorkerFailed as failure:
        failures.setdefault(name, str(failure))
        raise


def show(args, result: dict, servers: dict[str, Server]) -> None:
    """Print a row for each server and number of clients; fill the cases and ratios of `result`."""
    head = ["clients", "server", "requests/s", "tokens/s", "range", "first token, ms", "95 %, ms", "ended early"]
    widths = [7, 12, 10, 8, 14, 15, 8, 11]
    print_head(head, widths)
    turns = {}  # (server, clients) → seconds of each turn, without the warm-up
    for clients in args.clients:
        for name, server in servers.items():
            runs = server.measured.get(clients, [])[1:]
            if not runs:
                print_row([str(clients), name, "not measured", *[""] * 5], [*widths[:2], 12, *widths[3:]])
                continue
            turns[name, clients] = [run["seconds"] for run in runs]
            rates = [run["tokens"] / run["seconds"] for run in runs]
            requests = statistics.median(run["requests"] / run["seconds"] for run in runs)
            firsts = [first for run in runs for first in run["first"]]
            short = sum(run["short"] for run in runs)
            result["cases"][f"{clients} clients, {name}"] = dict(
                requests_per_second=requests, tokens_per_second=rates, first_token=statistics.median(firsts),
                first_token_95=percentile(firsts, 95), ended_early=short, seconds=turns[name, clients])
            print_row([str(clients), name, f"{requests:.2f}", f"{statistics.median(rates):,.0f}",
                       f"{min(rates):,.0f} to {max(rates):,.0f}", f"{1000 * statistics.median(firsts):,.0f}",
                       f"{1000 * percentile(firsts, 95):,.0f}", str(short)], widths)
    fewest = min(args.clients)
    for (name, clients), seconds in turns.items():
        if clients > fewest and (name, fewest) in turns:
            result["ratios"][f"{name}_{clients}_clients_vs_{fewest}"] = turn_ratio(seconds, turns[name, fewest])
        if name != "ours" and ("ours", clients) in turns:
            result["ratios"][f"{clients}_clients_vs_{name}"] = turn_ratio(seconds, turns["ours", clients])


def turn_ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """`ratio` of the turns that both have."""
    turns = min(len(slow), len(fast))
    return ratio(slow[:turns], fast[:turns])


# ---------------------------------------------------------------------------------------------
# hostile


async def strike(attack: Attack, ports: dict[bool, int]) -> list[Answer]:
    """Send an attack. Returns the answers; one of LEFT where the client went before it had any."""
    if attack.crowd > 1:
        answers = await asyncio.gather(*(strike_once(attack, ports) for _ in range(attack.crowd)))
        return [answer for each in answers for answer in each]
    return await strike_once(attack, ports)


async def strike_once(attack: Attack, ports: dict[bool, int]) -> list[Answer]:
    """Send an attack over one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", ports[attack.keyed])
    try:
        with contextlib.suppress(ConnectionError):  # the server may have answered, and closed, before all was sent
            if attack.how == SLOWLY:
                for byte in attack.data:
                    if writer.transport.is_closing():
                        break
                    writer.write(bytes([byte]))
                    await asyncio.sleep(0.001)
            else:
                writer.write(attack.data)
                await writer.drain()
            if attack.how == HALF:
                writer.write_eof()
        if attack.how == LEAVE:
            await asyncio.sleep(attack.hold)
            return [Answer(LEFT)]
        if attack.how == IN_STREAM:
            return await read_some(reader, attack.events)
        return await read_answers(reader)
    finally:
        leave(writer, attack.reset)


async def read_some(reader: asyncio.StreamReader, events: int) -> list[Answer]:
    """LEFT behind so many events of a stream; the answer itself where it is shorter or no stream."""
    answer = await read_head(reader)
    if answer.status == CLOSED:
        return [answer]
    try:
        async for part in body_parts(reader, answer):
            answer.body += part
            if answer.status == 200 and answer.body.count(b"data:") >= events:
                return [Answer(LEFT)]
    except (asyncio.IncompleteReadError, OSError):
        return [Answer(CLOSED)]
    return [answer]


def fault_of(answer: Answer) -> str | None:
    """What is wrong with the form of an answer."""
    if answer.status in (CLOSED, LEFT):
        return None
    try:
        if "event-stream" in answer.headers.get("content-type", ""):
            return None if answer.body.endswith(b"data: [DONE]\n\n") and sse_objects(answer.body) else "a cut stream"
        said = json.loads(answer.body)
    except ValueError:
        return f"no JSON: {answer.body[:80]}"
    if answer.status >= 400 and not (said.keys() == {"error"} and said["error"].keys() == {
            "message", "type", "param", "code"} and said["error"]["message"]):
        return f"an error of another shape: {answer.body[:80]}"
    return None


class Steady:
    """The well-behaved client."""

    def __init__(self, port: int, seed: int):
        rng = random.Random(seed)
        self.port, self.learned, self.faults = port, [], []
        self.seconds, self.busy, self.requests = [], 0, []
        texts = ["你好", "上善若水", "Water is weak.", "1 + 1 = ?", "<think>", hostile.words(rng, 20)]
        for place, text in enumerate(texts):
            body = {"temperature": 0} if place % 2 == 0 else {"temperature": 0.8, "top_p": 0.9, "seed": place}
            body |= {"max_tokens": STEADY_TOKENS, "stream": place % 3 == 2}
            if place < 5:
                request = hostile.dump(body | {"messages": [{"role": "user", "content": text}]}), hostile.CHAT
            else:
                request = hostile.dump(body | {"prompt": text}), hostile.TEXT
            self.requests.append(hostile.http(*request))

    async def answer(self, request: bytes) -> tuple:
        """(thought, answer, reason) of a request; asks again after a 429."""
        while True:
            async with asyncio.timeout(REQUEST_WITHIN):
                (answer,) = await exchange(self.port, request)
            if answer.status != 429:
                break
            self.busy += 1
            await asyncio.sleep(0.05)
        if answer.status != 200:
            return answer.status, answer.body[:200]
        streamed = "event-stream" in answer.headers["content-type"]
        thought, text, reason = "", "", None
        for said in sse_objects(answer.body) if streamed else [json.loads(answer.body)]:
            for choice in said["choices"]:
                part = choice.get("delta") or choice.get("message") or choice
                thought += part.get("reasoning_content") or ""
                text += part.get("content") or part.get("text") or ""
                reason = choice["finish_reason"] or reason
        return thought, text, reason

    async def learn(self) -> None:
        """Ask everything once, alone."""
        self.learned = [await self.answer(request) for request in self.requests]

    async def compare(self, times: float, over: asyncio.Event) -> None:
        """Ask again and again, until `over` or so many rounds, and note every answer that is another."""
        while times > 0 and not over.is_set():
            times -= 1
            for place, request in enumerate(self.requests):
                begin = time.perf_counter()
                try:
                    answer = await self.answer(request)
                except (OSError, TimeoutError, ValueError) as error:
                    answer = (type(error).__name__, str(error))
                self.seconds.append(time.perf_counter() - begin)
                if answer != self.learned[place]:
                    self.faults.append(f"question {place}: {answer}, not {self.learned[place]}"[:400])


def attack_all(args, result: dict) -> None:
    """Start the servers, attack them. Fills `result` and prints the tables."""
    with tempfile.TemporaryDirectory() as name:
        folder, servers = Path(name), []
        weights = prepare(args, folder, changed=False, max_seq_len=HOSTILE_CONTEXT)
        command = [sys.executable, "serve.py", "--checkpoint", str(weights), "--device", "cpu", "--dtype", "fp32",
                   "--slots", str(SLOTS), "--queue", str(SMALL_QUEUE)]
        try:
            servers.append(Server(command, folder, "ours", args.threads))
            servers.append(Server([*command, "--api_key", KEY], folder, "ours with a key", args.threads))
            asyncio.run(Siege(args, servers, result).run())
            codes = [server.close() for server in servers]
            said = "\n".join(server.said for server in servers)
            if any(codes):
                result["failures"]["ours, end"] = f"exit codes {codes} after SIGTERM"
            if "Traceback" in said or "Exception" in said:
                result["failures"]["ours, stderr"] = "a traceback"
                print(said[-10_000:], flush=True)
        except WorkerFailed as failure:
            result["failures"]["ours"] = str(failure)
        finally:
            for server in servers:
                server.close()


class Siege:
    """All hostile requests to two servers, the second one with a key, and what is measured meanwhile."""

    def __init__(self, args, servers: list[Server], result: dict):
        self.args, self.servers, self.result = args, servers, result
        self.ports = {False: servers[0].port, True: servers[1].port}
        self.kinds: dict[str, Counter] = {kind: Counter() for kind in hostile.KINDS}
        self.faults: Counter = Counter()
        self.examples: list[str] = []
        self.done, self.memory = 0, []  # (requests done, MiB of each server)

    async def run(self) -> None:
        """Everything. Raises WorkerFailed where a server ends."""
        over, steady = asyncio.Event(), Steady(self.ports[False], self.args.seed)
        await steady.learn()
        self.before = self.servers[0].resident
        await self.send_every_length()
        await steady.compare(1, over)
        alone = steady.seconds[:]
        steady.seconds.clear()
        files = [server.open_files for server in self.servers]
        begin, self.total = time.monotonic(), -(-self.args.requests // len(hostile.KINDS)) * len(hostile.KINDS)
        beside = [asyncio.create_task(steady.compare(math.inf, over)), asyncio.create_task(self.watch(over))]
        fast, slow, crowded = asyncio.Semaphore(FAST), asyncio.Semaphore(SLOW), asyncio.Semaphore(CROWDED)
        tasks = set()
        for name, attack in hostile.in_order(self.args.requests, self.args.seed):
            place = crowded if attack.crowd > 1 else slow if attack.slow else fast
            await place.acquire()
            if any(server.process.poll() is not None for server in self.servers):
                break
            if time.monotonic() - begin > self.args.limit_s:
                self.result["failures"]["ours, time"] = f"only {self.done:,} requests in --limit_s {self.args.limit_s}"
                break
            task = asyncio.create_task(self.attack(name, attack, place))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        seconds = time.monotonic() - begin
        over.set()
        await asyncio.gather(*beside)
        beside_seconds = steady.seconds[:]
        if any(server.process.poll() is not None for server in self.servers):
            raise WorkerFailed(f"ended: exit codes {[server.process.returncode for server in self.servers]}")
        await self.look_after(files)
        await steady.compare(1, asyncio.Event())
        self.report(steady, alone, beside_seconds, seconds)

    async def send_every_length(self) -> None:
        """A prompt of each number of digits, which are tokens of their own, that the context holds."""
        (models,) = await exchange(self.ports[False], hostile.http(path="/v1/models", method="GET"))
        for length in range(1, json.loads(models.body)["data"][0]["weakwater"]["context"] - 1):
            body = hostile.dump({"prompt": "7" * length, "max_tokens": 1})
            (answer,) = await exchange(self.ports[False], hostile.http(body, hostile.TEXT))
            if answer.status != 200:
                raise WorkerFailed(f"answered {answer.status} to a prompt of {length} digits")

    async def attack(self, name: str, attack: Attack, place: asyncio.Semaphore) -> None:
        """Send one attack, and note the answers."""
        try:
            async with asyncio.timeout(REQUEST_WITHIN):
                answers = await strike(attack, self.ports)
        except (OSError, TimeoutError, ValueError) as error:
            answers = [Answer(type(error).__name__)]
        finally:
            place.release()
        self.done += 1
        statuses = {answer.status for answer in answers}
        self.kinds[name]["/".join(sorted(map(str, statuses)))] += 1
        for answer in answers:
            fault = f"answered {answer.status}" if answer.status not in attack.expected else fault_of(answer)
            if fault:
                self.faults[f"{name}: {fault}"] += 1
                if len(self.examples) < EXAMPLES:
                    body = answer.body[:200].decode(errors="replace")
                    self.examples.append(f"{name}, {attack.how}: {fault}; sent {attack.data[:600]!r}, got {body}")
                break

    async def watch(self, over: asyncio.Event) -> None:
        """Look at the memory until `over`."""
        while not over.is_set():
            with contextlib.suppress(OSError, TypeError):  # it has ended
                self.memory.append((self.done, [server.resident for server in self.servers]))
            await asyncio.sleep(PAUSE)

    async def look_after(self, files: list[int]) -> None:
        """What has stayed in the servers, when they had time to clear up."""
        failures, deadline = self.result["failures"], time.monotonic() + 30
        while True:
            states = [await server.health() for server in self.servers]
            now = [server.open_files for server in self.servers]
            quiet = all(state is not None and state["status"] == "ok" and not state["running"] and not state["waiting"]
                        for state in states)
            if quiet and all(after <= before for after, before in zip(now, files, strict=True)):
                break
            if time.monotonic() > deadline:
                failures["ours, left over"] = f"/health {states}, open files {now}, {files} before"
                break
            await asyncio.sleep(0.2)
        self.result["open_files"] = {"before": files, "after": now}

    def report(self, steady: Steady, alone: list[float], beside: list[float], seconds: float) -> None:
        """Fill the result, print the tables."""
        result, failures = self.result, self.result["failures"]
        result["kinds"] = {kind: dict(sorted(counts.items())) for kind, counts in self.kinds.items()}
        result["requests"], result["seconds"], result["faults"] = self.done, seconds, dict(self.faults)
        if self.faults:
            failures["ours, answers"] = f"{sum(self.faults.values())} of {self.done} are faults"
        if steady.faults:
            failures["ours, well-behaved client"] = f"{len(steady.faults)} wrong answers"
        print(f"{self.done:,} requests of {len(self.kinds)} kinds in {seconds:.0f} s", flush=True)
        widths = [max(map(len, self.kinds)), 6, 60]
        print_head(["kind", "sent", "answers"], widths)
        for kind, counts in result["kinds"].items():
            answers = ", ".join(f"{n} × {answer}" for answer, n in counts.items())
            print_row([kind, str(sum(counts.values())), answers], widths)
        faults = [f"fault, {n} ×: {fault}" for fault, n in self.faults.items()]
        for line in [*faults, *self.examples, *steady.faults[:EXAMPLES]]:
            print(line, flush=True)
        result["well_behaved"] = {"answers": len(beside), "wrong": len(steady.faults), "retries_after_429": steady.busy,
                                  "seconds_alone": statistics.median(alone)}
        if beside:
            result["well_behaved"] |= {"seconds": statistics.median(beside), "seconds_95": percentile(beside, 95),
                                       "seconds_most": max(beside)}
            print(f"well-behaved client: {len(beside):,} answers, {len(steady.faults)} wrong; median "
                  f"{1000 * statistics.median(beside):.0f} ms, alone {1000 * statistics.median(alone):.0f} ms, the "
                  f"longest {max(beside):.1f} s", flush=True)
        growth = {"first": self.before} | memory_growth([(done, each[:1]) for done, each in self.memory], self.total)
        result["mebibytes"] = growth | {"with_a_key": [each[1] for _, each in (self.memory[0], self.memory[-1])]}
        print("memory, MiB: " + ", ".join(f"{name} {value:.1f}" for name, value in growth.items()), flush=True)
        if growth["grown"] > self.args.most_growth:
            failures["ours, memory"] = f"grew by {growth['grown']:.1f} MiB, more than {self.args.most_growth:g}"


def memory_growth(looks: list[tuple[int, list[float]]], total: int) -> dict[str, float]:
    """{"lengths", "third_tenth", "last_tenth", "most", "grown"} in MiB, of all servers together: before the requests,
    averages over a tenth of them, and how much the last is above the third."""
    def average(low: float, high: float) -> float:
        found = [sum(resident) for done, resident in looks if low * total <= done <= high * total]
        return statistics.mean(found) if found else math.nan

    third, last = average(0.2, 0.3), average(0.9, 1)
    return {"lengths": sum(looks[0][1]), "third_tenth": third, "last_tenth": last,
            "most": max(sum(resident) for _, resident in looks), "grown": last - third}


# ---------------------------------------------------------------------------------------------


def read_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags. Raises UserError."""
    shared = make_parser("", preset_help="of random weights (default: weakwater-30m; hostile: nano)")
    parser = type(shared)(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True, parser_class=type(shared))
    for mode in ("load", "hostile"):
        each = modes.add_parser(mode, formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
        each.add_argument("--checkpoint", metavar="PATH",
                          help="weights of any stage after pretraining (default: random ones)")
        each.add_argument("--tokenizer_path", metavar="PATH", help="of weights that hold none")
        each.add_argument("--threads", type=number(int, 1), default=torch.get_num_threads(),
                          help="of each server (default: %(default)s)")
        each.add_argument("--limit_s", type=number(int, 1), default=540, help="seconds in all (default: %(default)s)")
        each.add_argument("--preset", default="weakwater-30m" if mode == "load" else "nano", help="of random weights")
        if mode == "load":
            each.add_argument("--clients", type=number(int, 1), nargs="+", default=[1, 8, 32], help="(default: 1 8 32)")
            each.add_argument("--asks", type=number(int, 1), default=2, help="requests of a client (default: 2)")
            each.add_argument("--new_tokens", type=number(int, 1, 512), default=64, help="(default: %(default)s)")
            each.add_argument("--repeats", type=number(int, 1), default=3, help="measured turns (default: %(default)s)")
            each.add_argument("--servers", nargs="+", default=["ours", "llama.cpp", "transformers"],
                              choices=("ours", "llama.cpp", "transformers"), help="(default: all)")
            each.add_argument("--dtype", default="auto", choices=("auto", *TORCH_NAMES),
                              help="of all servers (default: %(default)s)")
        else:
            each.add_argument("--requests", type=number(int, 1), default=12_500, help="(default: %(default)s)")
            each.add_argument("--seed", type=number(int, 0), default=1, help="(default: %(default)s)")
            each.add_argument("--most_growth", type=number(float, 0), default=16.0,
                              help="MiB that the memory may grow (default: %(default)g)")
    alone = modes.add_parser("llama_cpp", description="llama.cpp's server alone, as `load` starts it")
    alone.add_argument("--gguf", required=True)
    alone.add_argument("--port", type=int, required=True)
    alone.add_argument("--threads", type=int, required=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = read_args(argv)
    if args.mode == "llama_cpp":
        return llama_cpp_alone(args)
    warn_of_load()
    result = {"ratios": {}, "machine": runtime.describe_machine(CPU), "weights": args.checkpoint or args.preset,
              "threads": args.threads, "failures": {}}
    print(f"{result['machine']}; {result['weights']}; {args.threads} threads", flush=True)
    if args.mode == "hostile":
        return end(result | {"seed": args.seed}, partial(attack_all, args))
    result |= {"dtype": runtime.pick_dtype(args.dtype, CPU)[0], "cases": {}}
    print(f"{result['dtype']}; {args.asks} requests a client, each of {args.new_tokens} tokens; {args.repeats} turns",
          flush=True)
    return end(result, partial(compare, args))


if __name__ == "__main__":
    sys.exit(exits.run(main))
