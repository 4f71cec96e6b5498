"""benchmarks/serve_load.py: its statistics, the hostile requests it makes, how it reads answers, and small runs."""

import asyncio
import json
import math
import random
import subprocess
import sys

import pytest
from conftest import ROOT

from benchmarks import hostile, serve_load
from benchmarks.hostile import CLOSED, KINDS, LEFT, Attack
from benchmarks.serve_load import Answer, Siege, Steady, fault_of, memory_growth, percentile, read_answers, turn_ratio

# ---- statistics -----------------------------------------------------------------------------


@pytest.mark.parametrize("values, percent, value", [
    ([3, 1, 2], 50, 2), ([3, 1, 2], 95, 3), ([7], 95, 7), ([7], 0, 7), (list(range(1, 101)), 95, 95), ([1, 2], 50, 1)])
def test_percentile(values, percent, value):
    assert percentile(values, percent) == value


def test_memory_growth():
    looks = [(0, [50.0, 50.0]), (10, [90.0, 60.0]), (25, [100.0, 60.0]), (30, [104.0, 60.0]), (60, [190.0, 60.0]),
             (95, [106.0, 60.0]), (100, [110.0, 60.0])]
    assert memory_growth(looks, 100) == {"lengths": 100, "third_tenth": 162, "last_tenth": 168, "most": 250, "grown": 6}
    assert math.isnan(memory_growth(looks[:2], 100)["grown"])


def test_turns_that_one_server_lacks_are_not_compared():
    assert turn_ratio([4, 9, 1], [2, 3]) == {"median": 2.5, "min": 2, "max": 3}


def test_no_client_asks_what_another_asks():
    asked = {serve_load.question(client, ask, turn) for client in range(32) for ask in range(2) for turn in range(4)}
    assert len(asked) == 32 * 2 * 4 and serve_load.question(1, 0, 2) == serve_load.question(1, 0, 2)


# ---- hostile requests -----------------------------------------------------------------------


def test_hostile_requests_are_many_of_each_kind_in_an_order_from_the_seed():
    assert len(KINDS) >= 20
    made = list(hostile.in_order(10 * len(KINDS) - 3, 1))
    names = [name for name, _ in made]
    assert all(names.count(kind) == 10 for kind in KINDS) and names[:25] != list(KINDS)
    assert made == list(hostile.in_order(10 * len(KINDS) - 3, 1)) != list(hostile.in_order(10 * len(KINDS) - 3, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_requests_of_a_kind_differ(kind):
    made = [KINDS[kind](random.Random(f"{kind} {number}")) for number in range(60)]
    assert len({attack.data for attack in made}) >= 10
    for attack in made:
        assert attack.expected and attack.expected <= {CLOSED, LEFT, 200, 501, *range(400, 432)}
        assert (LEFT in attack.expected) == (attack.how in (hostile.LEAVE, hostile.IN_STREAM))
        assert attack.keyed == (kind == "wrong_keys")


def test_a_sound_request_is_whole():
    head, _, body = hostile.chat(random.Random(1)).partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n")
    assert f"Content-Length: {len(body)}".encode() in head and json.loads(body)["messages"][0]["role"] == "user"
    assert b"Host" not in hostile.http(headers={"Host": None}) and b"Content-Length: 9" in hostile.http(length=9)


# ---- answers --------------------------------------------------------------------------------


def answers(data: bytes) -> list[Answer]:
    async def read():
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await read_answers(reader)

    return asyncio.run(read())


def test_answers_are_read_to_the_end_of_the_connection():
    first, second, third = answers(
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3\r\nda\n\r\n1\r\n\r\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n\r\nto the end")
    assert (first.status, first.body) == (404, b"{}") and (second.status, second.body) == (200, b"da\n\r")
    assert (third.status, third.body) == (200, b"to the end")


@pytest.mark.parametrize("data, statuses", [
    (b"", [CLOSED]), (b"HTTP/1.1 200", [CLOSED]), (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", [CLOSED]),
    (b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel", [204, CLOSED])])
def test_answers_that_are_cut(data, statuses):
    assert [answer.status for answer in answers(data)] == statuses


ERROR = {"error": {"message": "m", "type": "t", "param": None, "code": None}}
STREAM = {"content-type": "text/event-stream; charset=utf-8"}


@pytest.mark.parametrize("answer, fault", [
    (Answer(400, {}, json.dumps(ERROR).encode()), None), (Answer(200, {}, b"{}"), None), (Answer(CLOSED), None),
    (Answer(LEFT), None), (Answer(200, STREAM, b'data: {"a": 1}\n\ndata: [DONE]\n\n'), None),
    (Answer(200, STREAM, b'data: {"a": 1}\n\n'), "a cut stream"),
    (Answer(200, STREAM, b"data: [DONE]\n\n"), "a cut stream"),
    (Answer(422, {}, b'{"detail": []}'), "an error of another shape"), (Answer(400, {}, b"Bad Request"), "no JSON"),
    (Answer(400, {}, json.dumps({"error": ERROR["error"] | {"message": ""}}).encode()), "an error of another shape")])
def test_forms_of_answers(answer, fault):
    found = fault_of(answer)
    assert found is None if fault is None else found.startswith(fault)


class Fake:
    """A server in this event loop: each client gets the next of these bytes, or the last ones, and the end."""

    def __init__(self, *replies: bytes):
        self.replies = list(replies)

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        return self.server.sockets[0].getsockname()[1]

    async def __aexit__(self, *_):
        self.server.close()

    async def serve(self, reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(self.replies.pop(0) if len(self.replies) > 1 else self.replies[0])
        writer.close()


def reply(status: int, content) -> bytes:
    body = json.dumps(content)
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return (head + body).encode()


@pytest.mark.parametrize("how, expected", [
    (dict(), [200]), (dict(how=hostile.SLOWLY), [200]), (dict(how=hostile.HALF), [200]), (dict(crowd=3), [200] * 3),
    (dict(how=hostile.LEAVE, reset=True), [LEFT]), (dict(how=hostile.IN_STREAM, events=1), [LEFT]),
    (dict(how=hostile.IN_STREAM, events=9), [200])])
def test_attacks(how, expected):
    async def attack():
        async with Fake(reply(200, {"text": "data:"})) as port:
            found = await serve_load.strike(Attack(b"GET / HTTP/1.1\r\n\r\n", frozenset(), **how), {False: port})
            return [answer.status for answer in found]

    assert asyncio.run(attack()) == expected


def said(text: str) -> bytes:
    return reply(200, {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})


def test_the_well_behaved_client_notes_every_other_answer():
    """A 429 is no answer; a wrong text and an error are."""
    async def ask():
        again = [reply(429, ERROR), *[said("a")] * 3, said("b"), reply(500, ERROR), b""]
        async with Fake(*[said("a")] * 6, *again) as port:
            client = Steady(port, 1)
            await client.learn()
            await client.compare(1, asyncio.Event())
            return client

    client = asyncio.run(ask())
    assert client.learned == [("", "a", "stop")] * 6 and client.busy == 1 and len(client.seconds) == 6
    assert [fault[:10] for fault in client.faults] == ["question 3", "question 4", "question 5"]


def test_unexpected_answers_are_faults(monkeypatch):
    """Counted by kind and by status, with an example."""
    async def siege():
        async with Fake(reply(500, ERROR)) as port:
            found = Siege(None, [type("Server", (), {"port": port})()] * 2, {})
            place = asyncio.Semaphore(1)
            for expected in ({400}, {400}, {500}):
                await place.acquire()
                await found.attack("bad_json", Attack(b"{\r\n\r\n", frozenset(expected)), place)
            return found

    found = asyncio.run(siege())
    assert found.done == 3 and found.kinds["bad_json"] == {"500": 3} and found.faults == {"bad_json: answered 500": 2}
    assert len(found.examples) == 2 and "sent b'{" in found.examples[0]


@pytest.mark.parametrize("flags", ["load --clients 0", "load --servers vllm", "hostile --requests 0", "both", ""])
def test_invalid_flags(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        serve_load.main(flags.split())
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# ---- small runs -----------------------------------------------------------------------------


def run(*flags) -> tuple[int, dict, str]:
    command = [sys.executable, str(ROOT / "benchmarks/serve_load.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


@pytest.mark.extra
def test_hostile_requests_find_no_fault():
    code, result, said = run("hostile", "--requests", str(20 * len(KINDS)), "--most_growth", "128", "--threads", "2")
    assert code == 0 and not result["failures"], said
    assert result["requests"] == 20 * len(KINDS) and result["well_behaved"]["answers"] >= 6
    assert {kind: sum(counts.values()) for kind, counts in result["kinds"].items()} == dict.fromkeys(KINDS, 20)


@pytest.mark.extra
def test_load_beside_other_servers():
    code, result, said = run("load", "--preset", "nano", "--clients", "1", "4", "--repeats", "1", "--new_tokens", "16")
    assert code == 0 and not result["failures"], said
    assert set(result["cases"]) == {f"{clients} clients, {name}" for clients in (1, 4)
                                    for name in ("ours", "llama.cpp", "transformers")}
    assert all(case["ended_early"] == 0 and case["first_token"] > 0 for case in result["cases"].values())
    assert {"ours_4_clients_vs_1", "4_clients_vs_llama.cpp", "1_clients_vs_transformers"} <= set(result["ratios"])
