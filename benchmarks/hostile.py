"""Hostile requests by kind, made from a seed, each with the answers that a sound server may give to it."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

CLOSED, LEFT = "closed", "left"  # answers besides a status: the server ended the connection; the client did
REFUSED = frozenset({400})
SERVED = frozenset({200, 429})  # nothing is wrong with the request, but the queue may be full
UNFIT = frozenset({400, 429})  # seen to be wrong only behind the queue's check
ENDED = frozenset({400, CLOSED})  # the server may close while bytes still come, and its answer is lost then
GONE = frozenset({LEFT})

WHOLE, SLOWLY, WAIT, LEAVE, IN_STREAM, HALF = "whole", "slowly", "wait", "leave", "in stream", "half"  # see Attack.how
CHAT, TEXT, KEYED = "/v1/chat/completions", "/v1/completions", "/v1/models"
MEBIBYTE = 2**20  # the limit of a body

FORGED = ("<think>", "</think>", "<answer>", "</answer>", "<s>", "</s>", "<unk>", "<|im_end|>", "<|im_start|>system\n",
          "</s>\n<s>assistant\n<think>", "<｜User｜>", "[INST]", "<start_of_turn>", "<s>system\n", "<th", "ink>")
WORDS = "河水 上善若水 Water is weak 1 + 1 = ? 🌊 不争 \u2028 \u202e \ufeff 几於道 <p> \\n".split(" ")
WRONG = {bool: True, int: 7, float: 1.5, str: "x", list: [1], dict: {"a": 1}}  # a value of each type
TYPES = {  # the types of each field
    "messages": (), "model": (str,), "stream": (bool,), "stream_options": (dict,), "max_tokens": (int,),
    "max_completion_tokens": (int,), "n": (int,), "seed": (int,), "top_k": (int,), "temperature": (int, float),
    "top_p": (int, float), "repetition_penalty": (int, float), "stop": (str,), "reasoning_effort": (str,),
    "chat_template_kwargs": (dict,)}
BAD_VALUES = (
    {"temperature": -1}, {"temperature": 2.01}, {"temperature": 1e300}, {"top_p": -0.1}, {"top_p": 7}, {"n": 2},
    {"n": 0}, {"n": -1}, {"max_tokens": 0}, {"max_tokens": -5}, {"max_completion_tokens": 0}, {"top_k": -2},
    {"repetition_penalty": 0}, {"repetition_penalty": -1}, {"stop": list("abcde")}, {"stop": [""]}, {"stop": ["a", 1]},
    {"stop": [None]}, {"stream_options": {"include_usage": "yes"}}, {"chat_template_kwargs": {"enable_thinking": 1}})


@dataclass(frozen=True)
class Attack:
    """Bytes for a server, and how they come.

    WHOLE: at once, and the answers are read; SLOWLY: byte by byte; WAIT: not all of it, and the client waits for an
    answer; LEAVE: the client goes after `hold` seconds; IN_STREAM: after `events` events; HALF: it closes its sending
    side at once. With `reset` it goes without a farewell. `crowd` clients come at once. `keyed`: to the server that has
    a key.
    """

    data: bytes
    expected: frozenset
    how: str = WHOLE
    hold: float = 0.0
    reset: bool = False
    events: int = 0
    crowd: int = 1
    keyed: bool = False

    @property
    def slow(self) -> bool:
        """True if the connection is held for longer than the server needs."""
        return self.how in (SLOWLY, WAIT) or self.hold > 0.1


KINDS: dict[str, Callable[[random.Random], Attack]] = {}


def kind(make: Callable[[random.Random], Attack]):
    """Add a kind, named as its function."""
    KINDS[make.__name__] = make
    return make


def in_order(requests: int, seed: int) -> Iterator[tuple[str, Attack]]:
    """(kind, attack) of at least `requests`, as many of each kind, in a random order that the seed decides."""
    each = -(-requests // len(KINDS))
    numbered = [(name, number) for name in KINDS for number in range(each)]
    random.Random(f"{seed}").shuffle(numbered)
    for name, number in numbered:
        yield name, KINDS[name](random.Random(f"{seed} {name} {number}"))


# ---------------------------------------------------------------------------------------------
# parts


def http(body: bytes = b"", path: str = CHAT, method: str = "POST", headers: dict | None = None,
         length: int | None = None) -> bytes:
    """A request. `headers` are added, or with None taken out; `length` is what it says of its body."""
    said = {"Host": "127.0.0.1", "Content-Type": "application/json", "Connection": "close",
            "Content-Length": str(len(body) if length is None else length)} | (headers or {})
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in said.items() if value is not None)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8") + body


def words(rng: random.Random, n: int = 6) -> str:
    """A short text."""
    return " ".join(rng.choices(WORDS, k=n))


def asked(rng: random.Random, **fields) -> dict:
    """A sound request of a chat, with other fields."""
    return {"messages": [{"role": "user", "content": words(rng)}], "max_tokens": rng.randint(1, 4),
            "temperature": rng.choice([0, 0.7]), "stream": rng.random() < 0.5} | fields


def dump(content, **how) -> bytes:
    """JSON, in escapes or not."""
    return json.dumps(content, **how).encode("utf-8", "surrogatepass")


def chat(rng: random.Random, **fields) -> bytes:
    """The bytes of a sound request, with other fields."""
    return http(dump(asked(rng, **fields), ensure_ascii=rng.random() < 0.5))


def chunked(parts: list[bytes]) -> bytes:
    """A body in chunks, with its end."""
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


def noise(rng: random.Random, n: int) -> bytes:
    """Random bytes."""
    return rng.randbytes(n)


def one_of(rng: random.Random, *makers: Callable[[], Attack]) -> Attack:
    """One of several attacks; only it is made."""
    return rng.choice(makers)()


# ---------------------------------------------------------------------------------------------
# JSON


@kind
def bad_json(rng: random.Random) -> Attack:
    body = dump(asked(rng))
    return Attack(http(rng.choice([
        b"", b" ", b"null", b"[]", b"7", b'"text"', b"true", b"{,}", b"{'messages': []}", b"messages=hello",
        b"\xef\xbb\xbf" + body, body + body, body + b"}", b"//\n" + body, body.replace(b":", b"=", 1),
        body.replace(b"}", b",}", 1), noise(rng, rng.randint(1, 300)), b"{" + body[1:].replace(b'"', b""),
        b'{"messages": [], "messages": [],' + body[1:], body[:-1] + b', "seed": 1, "seed": 1}',
        body[:-1] + b', "extra": {"a": 1, "a": 2}}'])), REFUSED)


@kind
def truncated_json(rng: random.Random) -> Attack:
    body = dump(asked(rng), ensure_ascii=rng.random() < 0.5)
    return Attack(http(body[:rng.randrange(1, len(body))]), REFUSED)


@kind
def wrong_types(rng: random.Random) -> Attack:
    if rng.random() < 0.3:
        bad = rng.choice([7, True, 1.5, {"type": "text", "text": "x"}, [7], [{"type": "text", "text": 7}], [{}], None])
        message = rng.choice([{"role": "user", "content": bad}, {"role": bad, "content": "x"}, {"role": "user"}, bad])
        return Attack(chat(rng, messages=[message]), REFUSED)
    name = rng.choice(list(TYPES))
    value = rng.choice([value for type_, value in WRONG.items() if type_ not in TYPES[name]])
    return Attack(chat(rng, **{name: value}), REFUSED)


@kind
def wrong_values(rng: random.Random) -> Attack:
    if rng.random() < 0.5:
        return Attack(chat(rng, **rng.choice(BAD_VALUES)), REFUSED)
    said = words(rng)
    image = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]
    return Attack(chat(rng, messages=[{"role": "user", "content": said}, *rng.choice([
        [{"role": "assistant", "content": said}], [{"role": "system", "content": said}],
        [{"role": "tool", "content": "1"}], [{"role": "user", "content": image}],
        [{"role": "root", "content": said}, {"role": "user", "content": said}],
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, {"role": "user", "content": said}]])]),
        REFUSED)


@kind
def deep_nesting(rng: random.Random) -> Attack:
    depth, close = rng.choice([10**5, 2 * 10**5]), rng.random() < 0.5
    opened, closed = rng.choice([(b"[", b"]"), (b'{"":', b"}")])
    nested = opened * depth + (b"1" + closed * depth if close else b"")
    return Attack(http(rng.choice([nested, b'{"extra": %s}' % nested, b'{"messages": %s}' % nested])), REFUSED)


@kind
def odd_numbers(rng: random.Random) -> Attack:
    sound = dump(asked(rng, stream=False))[:-1]
    number = rng.choice([b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"9" * 5000, b"0x10", b"01", b"1.",
                         b"+1", b"1" + b"0" * 10**5])
    if rng.random() < 0.3:  # large, but numbers
        huge = rng.choice([b'"seed": %s' % (b"9" * 4000), b'"seed": -%s' % (b"9" * 300), b'"top_k": %s' % (b"9" * 300),
                           b'"extra": 1e999', b'"temperature": 1e-999'])
        return Attack(http(sound.replace(b'"temperature"', b'"x"') + b", " + huge + b"}"), SERVED)
    name = rng.choice([b"top_p", b"seed", b"n", b"top_k", b"repetition_penalty"])
    return Attack(http(sound + b', "%s": %s}' % (name, number)), REFUSED)


@kind
def huge_fields(rng: random.Random) -> Attack:
    size = int(10**rng.uniform(4, 5.9))
    text = rng.choice(["a", "7", " ", "<think>", "a b ", "水", "\n"])
    text = (text * size)[:size // len(text.encode("utf-8"))]
    long = words(rng, 2000)  # more than a context
    turn = [{"role": "user", "content": "水"}, {"role": "assistant", "content": "善"}]
    return one_of(
        rng, lambda: Attack(chat(rng, messages=[{"role": "user", "content": long + text[:size // 8]}]), UNFIT),
        lambda: Attack(chat(rng, messages=[*turn * (size // 400), {"role": "user", "content": long}]), UNFIT),
        lambda: Attack(http(dump({"prompt": long + text[:size // 8], "max_tokens": 1}), TEXT), UNFIT),
        lambda: Attack(chat(rng, model="m" * size), frozenset({404})),
        lambda: Attack(chat(rng, messages=[{"role": "r" * size, "content": "x"}]), REFUSED),
        lambda: Attack(chat(rng, extra=["x" * 9] * (size // 20)), SERVED),
        lambda: Attack(chat(rng, **{f"x{i}": i for i in range(size // 20)}), SERVED),
        lambda: Attack(chat(rng, stop=["s" * (size // 4)] * 4), SERVED | REFUSED),
        lambda: Attack(chat(rng, user="u" * size, reasoning_effort="e" * (size // 8)), SERVED))


@kind
def empty_fields(rng: random.Random) -> Attack:
    user = [{"role": "user", "content": "x"}]
    return one_of(
        rng, lambda: Attack(chat(rng, messages=[]), REFUSED), lambda: Attack(chat(rng, messages=[{}]), REFUSED),
        lambda: Attack(chat(rng, messages=None), REFUSED), lambda: Attack(chat(rng, stop=""), REFUSED),
        lambda: Attack(chat(rng, stop=[]), SERVED), lambda: Attack(chat(rng, model=""), SERVED),
        lambda: Attack(chat(rng, chat_template_kwargs={}, stream_options={}), SERVED), lambda: Attack(http(), REFUSED),
        lambda: Attack(chat(rng, **{name: None for name in TYPES if name != "messages"}, stop_token_ids=[]),
                       SERVED) if rng.random() < 0.1 else Attack(http(b"{}"), REFUSED),
        lambda: Attack(http(dump({"prompt": "", "max_tokens": 1}), TEXT), SERVED),
        lambda: Attack(chat(rng, messages=[{"role": "", "content": ""}]), REFUSED),
        lambda: Attack(chat(rng, messages=[{"role": "user", "content": ""}]), SERVED | REFUSED),
        lambda: Attack(chat(rng, messages=[{"role": "user", "content": []}]), SERVED | REFUSED),
        lambda: Attack(chat(rng, messages=[{"role": "system", "content": ""}, *user]), SERVED),
        lambda: Attack(http(b"{}", TEXT), REFUSED), lambda: Attack(http(headers={"": "x"}), REFUSED))


# ---------------------------------------------------------------------------------------------
# text


@kind
def forged_tags(rng: random.Random) -> Attack:
    def forged() -> str:
        return "".join(rng.choice([*FORGED, words(rng, 1)]) for _ in range(rng.randint(1, 6)))

    messages = [{"role": "system", "content": forged()}] if rng.random() < 0.3 else []
    for _ in range(rng.randint(0, 1)):
        messages += [{"role": "user", "content": forged()},
                     {"role": "assistant", "content": forged(), "reasoning_content": forged()}]
    content = forged()
    if rng.random() < 0.2:
        content = [{"type": "text", "text": part} for part in ("<th", "ink>", content)]
    if rng.random() < 0.2:
        return Attack(http(dump({"prompt": forged(), "max_tokens": 2}), TEXT), SERVED)
    messages.append({"role": "user", "content": content})
    return Attack(chat(rng, messages=messages, stop=rng.choice([None, "</s>"])), SERVED)


@kind
def broken_text(rng: random.Random) -> Attack:
    lone = rng.choice(["\ud800", "\udfff", "x\udbff", "\udc00\ud800", "水\ud83c"])
    body = dump(asked(rng, stream=False), ensure_ascii=False)
    broken = rng.choice([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe6\xb0", b"\x80"])
    raw = rng.choice([b"\0", b"\x01", b"\n", b"\x1b", b"\x08"])
    return one_of(
        rng, lambda: Attack(chat(rng, messages=[{"role": "user", "content": lone}]), REFUSED),
        lambda: Attack(chat(rng, stop=[lone]), REFUSED), lambda: Attack(chat(rng, model=lone), REFUSED),
        lambda: Attack(chat(rng, messages=[{"role": lone, "content": "x"}]), REFUSED),
        lambda: Attack(http(dump({"prompt": lone}), TEXT), REFUSED),
        lambda: Attack(http(body.replace(b'"role"', b'"' + broken + b'"', 1)), REFUSED),
        lambda: Attack(http(body.replace(b'"content": "', b'"content": "' + broken, 1)), REFUSED),
        lambda: Attack(http(body.replace(b'"content": "', b'"content": "' + raw, 1)), REFUSED),
        lambda: Attack(http(body.decode("utf-8").encode(rng.choice(["utf-16", "utf-32"]))), REFUSED),
        lambda: Attack(chat(rng, messages=[{"role": "user", "content": "a\0\0b\x7f\ufffe\uffff\U0010ffff"}]), SERVED))


@kind
def endless(rng: random.Random) -> Attack:
    never = {"stop": ["".join(rng.choices("阿吗呢✓xyz", k=40)) for _ in range(4)], "stream": True}
    most = {"max_tokens": rng.choice([10**3, 10**6, 2**63, 10**100]), "stream": rng.random() < 0.5}
    data = chat(rng, **rng.choice([never | most, most | {"repetition_penalty": 1.3}, most]))
    if rng.random() < 0.25:
        return Attack(data, SERVED)
    return Attack(data, GONE, LEAVE, hold=rng.uniform(0, 0.5), reset=rng.random() < 0.5)


# ---------------------------------------------------------------------------------------------
# HTTP


@kind
def large_bodies(rng: random.Random) -> Attack:
    size, too_large = MEBIBYTE + rng.choice([1, 7, 10**3, 10**6]), frozenset({413})
    return one_of(
        rng, lambda: Attack(http(b"x" * size), too_large),
        lambda: Attack(http(b'{"a": "%s"}' % (b"x" * size)), too_large),
        lambda: Attack(http(b"{", length=rng.choice([10**9, 10**12, 10**19, 17 * MEBIBYTE])), too_large),
        lambda: Attack(http(headers={"Transfer-Encoding": "chunked", "Content-Length": None})
                       + chunked([b"x" * 2**16] * 17), too_large),
        lambda: Attack(http(b" " * (MEBIBYTE - 2) + b"{}"), REFUSED))


@kind
def wrong_lengths(rng: random.Random) -> Attack:
    body = dump(asked(rng, stream=False))
    n, more = len(body), rng.randint(1, 500)
    if rng.random() < 0.03:
        return Attack(http(body, length=n + more), frozenset({408}), WAIT)
    same = {"Content-Length": f"{n}, {n + 1}"}
    return one_of(
        rng, lambda: Attack(http(body, length=n + more), ENDED, HALF),
        lambda: Attack(http(body, length=n + more), GONE, LEAVE, hold=rng.uniform(0, 0.05)),
        lambda: Attack(http(body, length=max(1, n - more)), REFUSED),
        lambda: Attack(http(body, headers=rng.choice([same, {"Content-Length": rng.choice([
            "-1", "+5", "1e3", "0x10", "", "five", "9" * 30, "٣", "5 5", "5;"])}])), REFUSED),
        lambda: Attack(http(body, headers={"content-length": str(n + 1)}), REFUSED),
        lambda: Attack(http(headers={"Transfer-Encoding": "chunked", "Content-Length": str(n)}) + chunked([body]),
                       SERVED | REFUSED),
        lambda: Attack(http(headers={"Content-Length": None}), REFUSED))


@kind
def broken_chunks(rng: random.Random) -> Attack:
    body = dump(asked(rng, stream=False))
    head = http(headers={"Transfer-Encoding": "chunked", "Content-Length": None})
    whole = chunked([body[:20], body[20:]])
    return one_of(
        rng, lambda: Attack(head + whole[:rng.randrange(len(whole) - 5)], GONE, LEAVE, hold=rng.uniform(0, 0.05),
                            reset=rng.random() < 0.5),
        lambda: Attack(head + whole[:rng.randrange(len(whole) - 5)], ENDED, HALF),
        lambda: Attack(head + rng.choice([b"zz\r\n", b"-5\r\nhello\r\n", b"f" * 40 + b"\r\n", b"5\r\nhello!!\r\n",
                                          noise(rng, 64) + b"\r\n"]), ENDED),
        lambda: Attack(http(body, headers={"Transfer-Encoding": rng.choice(["gzip", "chunked, chunked", "x"]),
                                           "Content-Length": None}), frozenset({400, 501})),
        lambda: Attack(head + chunked([bytes([byte]) for byte in body]), SERVED))


@kind
def bad_request_lines(rng: random.Random) -> Attack:
    return Attack(rng.choice([
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + noise(rng, 100) + b"\r\n\r\n",  # TLS
        b"GET\r\n\r\n", b"GET /\r\n\r\n",
        b"GET  /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /health HTTP/1.1 x\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/11\r\nHost: localhost\r\n\r\n", b"GET /health HTTP/1.1\r\n\r\n", b"HELO mail\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost localhost\r\n\r\n", b"GET /health HTTP/1.1\r\nHost : localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: x\r\n\r\n", b"\0" * 20 + b"\r\n\r\n",
        b"GET /he\0alth HTTP/1.1\r\nHost: localhost\r\n\r\n", b"G(T /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x80" + noise(rng, rng.randint(1, 400)) + b"\r\n\r\n"]), REFUSED)


@kind
def long_headers(rng: random.Random) -> Attack:
    size = rng.choice([17, 20, 64, 256]) * 1024
    return one_of(
        rng, lambda: Attack(http(headers={"X-Long": "x" * size}), ENDED | {431}),
        lambda: Attack(http(headers={f"X-{i}": "y" * 50 for i in range(size // 50)}), ENDED | {431}),
        lambda: Attack(http(path="/" + "p" * size), ENDED | {404, 414, 431}),
        lambda: Attack(b"X" * size, ENDED | {431}),
        lambda: Attack(http(headers={"X": "a\0b"}), REFUSED), lambda: Attack(http(headers={"X Y": "z"}), REFUSED),
        lambda: Attack(http(headers={"X": "\x7f\x01"}), REFUSED),
        lambda: Attack(chat(rng).replace(b"Host:", b"Cookie: %s\r\nHost:" % (b"c" * 9000), 1), SERVED))


@kind
def paths_and_methods(rng: random.Random) -> Attack:
    method, unknown, wrong = rng.choice(["PUT", "DELETE", "PATCH", "TRACE", "FOO", "OPTIONS"]), {404}, {405}
    upgrade = {"Connection": "close, Upgrade", "Upgrade": rng.choice(["websocket", "h2c"]), "Sec-WebSocket-Key": "x"}
    return one_of(
        rng, lambda: Attack(http(path=rng.choice([
            "/v1", "/v2/chat/completions", "/v1/chat", "/v1/chat/completions/", "/admin", "/.git/config", "/docs",
            "/openapi.json", "/../serve.py", "/%2e%2e/serve.py", "/..%2f..%2fetc/passwd", "//health", "/app.js/../x",
            "http://evil.example/health", "/%00", "/%ff%fe", "/index.html%00", "/" + "a/" * 500, "/x?q=" * 9 + "#y"]),
            method=rng.choice(["GET", "POST"])), frozenset(unknown | wrong)),
        lambda: Attack(http(path=rng.choice([CHAT, TEXT]), method=rng.choice([method, "GET"])), frozenset(wrong)),
        lambda: Attack(http(path=rng.choice(["/health", "/v1/models", "/", "/app.js"]),
                            method=rng.choice([method, "POST"])), frozenset(wrong)),
        lambda: Attack(http(path="/v1/models/" + rng.choice(
            ["no", "../../etc/passwd", "%00", "%2e%2e", "a" * 9000, "%E6%B0%B4"]), method="GET"), frozenset(unknown)),
        lambda: Attack(chat(rng, model=rng.choice(["gpt-4o", "../out", "/etc/passwd", "\0", "水" * 200])),
                       frozenset(unknown)),
        lambda: Attack(http(path="/health", method="GET", headers=upgrade), frozenset({200, 400})))


@kind
def foreign_sites(rng: random.Random) -> Attack:
    headers = rng.choice([
        {"Host": "evil.example"}, {"Host": "127.0.0.1.evil.example"}, {"Host": "localhost.evil.example:8000"},
        {"Host": ""}, {"Host": "192.168.1.1"}, {"Host": "evil.example:80:80"}, {"Origin": "http://evil.example"},
        {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"}, {"Origin": "http://localhost.evil.example"}, {"Origin": "file://"},
        {"Origin": "http://evil.example", "Content-Type": "text/plain"}, {"Origin": ""}])
    return Attack(http(dump(asked(rng)), headers=headers), frozenset({403}))


@kind
def wrong_keys(rng: random.Random) -> Attack:
    value = rng.choice([None, "", "Bearer", "Bearer ", f"Bearer {rng.getrandbits(64):x}", "Basic a2V5", "Bearer kéy",
                        "Bearer " + "k" * 8000, "bearer  secre", "Bearer secret2", "Bearer secret secret", "secret",
                        "Bearer \u6c34", "Token secret", "Bearer SECRET"])
    body = dump(asked(rng)) if rng.random() < 0.5 else b""
    return Attack(http(body, CHAT if body else KEYED, "POST" if body else "GET", {"Authorization": value}),
                  frozenset({401}), keyed=True)


# ---------------------------------------------------------------------------------------------
# connections


@kind
def slow_clients(rng: random.Random) -> Attack:
    data = chat(rng)
    if rng.random() < 0.04:  # they wait to the end
        return Attack(rng.choice([data[:rng.randrange(20, 100)], data[:-5], b""]), frozenset({408, CLOSED}), WAIT)
    return one_of(
        rng, lambda: Attack(data, SERVED, SLOWLY),
        lambda: Attack(data[:rng.randrange(1, 100)], GONE, LEAVE, hold=rng.uniform(0.1, 1), reset=rng.random() < 0.5),
        lambda: Attack(data[:-rng.randint(1, 60)], GONE, LEAVE, hold=rng.uniform(0.1, 1), reset=rng.random() < 0.5),
        lambda: Attack(b"", GONE, LEAVE, hold=rng.uniform(0.1, 1)))


@kind
def cut_before_reply(rng: random.Random) -> Attack:
    return Attack(chat(rng, stream=rng.random() < 0.3, max_tokens=100), GONE, LEAVE,
                  hold=rng.choice([0, 0, rng.uniform(0, 0.05)]), reset=rng.random() < 0.5)


@kind
def cut_streams(rng: random.Random) -> Attack:
    return Attack(chat(rng, stream=True, max_tokens=200), GONE | SERVED, IN_STREAM, reset=rng.random() < 0.5,
                  events=rng.randint(1, 12))


@kind
def cut_in_queue(rng: random.Random) -> Attack:
    return Attack(chat(rng, stream=rng.random() < 0.5, max_tokens=200), GONE, LEAVE, hold=rng.uniform(0, 0.1),
                  reset=True, crowd=28)


@kind
def half_closed(rng: random.Random) -> Attack:
    data = rng.choice([chat(rng), http(path="/health", method="GET"), chat(rng)[:80], b""])
    return Attack(data, SERVED | ENDED, HALF)


@kind
def pipelined(rng: random.Random) -> Attack:
    open_ = {"Connection": "keep-alive"}
    parts = [http(path="/health", method="GET", headers=open_), http(b"{}", headers=open_),
             http(path="/none", method="GET", headers=open_), http(dump(asked(rng)), headers=open_)]
    data = b"".join(rng.choices(parts, k=rng.randint(1, 12)))
    last = rng.choice([http(path="/health", method="GET"), b"\x80 garbage\r\n\r\n", http(b"{", path=TEXT)])
    return Attack(data + last, SERVED | {400, 404})
