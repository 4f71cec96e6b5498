"""The page of serve.py in Debian's Chromium, before a server that replies by a script, and before serve.py itself."""

import itertools
import json
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import ROOT
from test_evaluate import save_nano

from common.weights import load_model, save_weights
from text.tokenizer import TextEncoder

pytestmark = pytest.mark.extra
WEB = ROOT / "web"
POLICY = {"Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
          "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}  # as serving/app.py
STAGES = {"distill": (True, False), "SFT": (False, False), "pretrain": (False, True)}  # thinks, continues text
PATIENCE = 10  # seconds for anything to appear


# ---------------------------------------------------------------------------------------------
# a server that replies by a script


def event(**fields) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def delta(content: str | None = None, thought: str | None = None, finish: str | None = None) -> bytes:
    """A piece of a chat reply."""
    parts = {"content": content, "reasoning_content": thought}
    return event(choices=[{"index": 0, "delta": {k: v for k, v in parts.items() if v}, "finish_reason": finish}])


DONE = b"data: [DONE]\n\n"
END = delta(finish="stop") + event(choices=[], usage={"completion_tokens": 7, "prompt_tokens": 5}) + DONE


def failure(status: int, message: str, code: str | None = None, **headers) -> tuple[int, dict, bytes]:
    """An error of the server in OpenAI's form, with response headers (Retry_After=…)."""
    error = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, json.dumps(error).encode()


class Scripted(ThreadingHTTPServer):
    """Serves web/, the models in `stages`, and to each POST the next of `replies`: an error, or bytes to send, with
    seconds (a float) or an Event wherever it waits. `bodies` holds what was asked, `key` what is demanded."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.stages, self.key = dict(STAGES), None
        self.replies, self.bodies, self.left = queue.Queue(), [], threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def reply(self, *steps):
        """Put a reply by the script in line."""
        self.replies.put(steps[0] if isinstance(steps[0], tuple) else steps)

    def handle_error(self, request, client_address):
        """The browser has gone away: that is what `left` is for."""
        self.left.set()


class Handler(BaseHTTPRequestHandler):
    disable_nagle_algorithm = True  # each write is sent at once

    def log_message(self, *_):
        pass

    def respond(self, status: int, kind: str, body: bytes = b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Type": kind, **POLICY, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def refused(self) -> bool:
        """True if the request lacks the key; then it is answered."""
        if not self.server.key or self.headers["Authorization"] == f"Bearer {self.server.key}":
            return False
        status, headers, body = failure(401, "wrong key", "invalid_api_key")
        self.respond(status, "application/json", body, **headers)
        return True

    def do_GET(self):
        files = {"/": ("index.html", "text/html"), "/style.css": ("style.css", "text/css"),
                 "/app.js": ("app.js", "text/javascript"), "/icon.svg": ("icon.svg", "image/svg+xml")}
        if self.path in files:
            name, kind = files[self.path]
            self.respond(200, f"{kind}; charset=utf-8", (WEB / name).read_bytes())
        elif self.path != "/v1/models":
            self.respond(404, "text/plain")
        elif not self.refused():
            data = [{"id": name, "object": "model", "created": 1, "owned_by": "weakwater", "weakwater": {
                "stage": name, "thinks": thinks, "continues_text": continues, "context": 1024}}
                for name, (thinks, continues) in self.server.stages.items()]
            self.respond(200, "application/json", json.dumps({"object": "list", "data": data}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return
        self.server.bodies.append({"path": self.path, **body})
        steps = self.server.replies.get(timeout=PATIENCE)
        if isinstance(steps, tuple) and isinstance(steps[0], int):
            status, headers, body = steps
            self.respond(status, "application/json", body, **headers)
            return
        self.respond(200, "text/event-stream")
        for step in steps:
            if isinstance(step, threading.Event):
                for _ in range(100 * PATIENCE):
                    if step.wait(0.01):
                        break
                    self.wfile.write(b": still here\n\n")  # fails where the browser has left
            elif isinstance(step, float):
                time.sleep(step)
            else:
                self.wfile.write(step)


@pytest.fixture
def site():
    """A scripted server; each has an address of its own, and so a localStorage of its own in the browser."""
    with Scripted() as server:
        yield server
        server.shutdown()


# ---------------------------------------------------------------------------------------------
# the browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """Debian's Chromium, without a window, in Chinese."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.fail("the page is tested in Chromium: apt-get install chromium chromium-driver fonts-noto-cjk")
    try:
        from selenium import webdriver
    except ImportError:
        pytest.fail("the page is tested with Selenium: pip install -r requirements-extra.txt")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1000,800",
                     "--lang=zh-CN", "--accept-lang=zh-CN", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as opened:
        yield opened


class Page:
    """The page as a test uses it: elements by CSS selector, keys, and Chromium's own commands."""

    def __init__(self, driver, address: str):
        self.driver, self.address = driver, address

    def open(self):
        """Load the page, and wait for its models."""
        self.driver.get(self.address)
        self.wait(lambda: self.js("return document.querySelector('#model').options.length || "
                                  "document.querySelector('.error')"))

    def js(self, script: str, *args):
        return self.driver.execute_script(script, *args)

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str):
        """The only element of a selector that is displayed."""
        found = self.wait(lambda: [each for each in self.all(selector) if each.is_displayed()], selector)
        assert len(found) == 1, (selector, [each.text for each in found])
        return found[0]

    def shown(self, selector: str) -> bool:
        return any(each.is_displayed() for each in self.all(selector))

    def text(self, selector: str) -> str:
        """What the last element of a selector displays."""
        found = self.all(selector)
        return found[-1].text if found else ""

    def click(self, selector: str):
        self.one(selector).click()

    def wait(self, condition, what: str = ""):
        """The first true value of condition()."""
        end = time.monotonic() + PATIENCE
        while not (value := condition()):
            assert time.monotonic() < end, f"waited in vain: {what}\n{self.text('body')[-2000:]}"
            time.sleep(0.02)
        return value

    def until(self, selector: str, words: str):
        """Wait until the last element of a selector displays these words."""
        self.wait(lambda: words in self.text(selector), f"{words} in {selector}")

    def press(self, *keys: str):
        """Type keys into whatever has the focus."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def send(self, question: str):
        from selenium.webdriver import Keys

        self.one("#input").send_keys(question + Keys.ENTER)

    def finished(self, turns: int = 1):
        """Wait until the replies of so many turns are complete."""
        self.wait(lambda: len(self.all(".turn .finished")) == turns == len(self.all(".turn")), f"{turns} replies")

    def focused(self) -> str:
        return self.js("return document.activeElement.id || document.activeElement.className || "
                       "document.activeElement.localName")

    def value(self, selector: str) -> str:
        return self.js("return document.querySelector(arguments[0]).value", selector)

    def spoken(self) -> str:
        """What the screen reader was told last."""
        return self.js("return document.querySelector('[role=status]').textContent")

    def cdp(self, command: str, **parameters):
        return self.driver.execute_cdp_cmd(command, parameters)

    def resize(self, width: int, height: int, phone: bool = False):
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)


@pytest.fixture
def make_page(chromium):
    """Opens the page of an address. Afterwards: no request went elsewhere, and the console has no error but those of
    failed replies."""
    pages = []
    chromium.get_log("performance"), chromium.get_log("browser")  # what the test before has left

    def opened(address: str) -> Page:
        pages.append(Page(chromium, address))
        pages[-1].open()
        return pages[-1]

    yield opened
    addresses = tuple(page.address for page in pages)
    for entry in chromium.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            assert message["params"]["request"]["url"].startswith(addresses), message["params"]["request"]
    console = [entry for entry in chromium.get_log("browser") if not (
        entry["source"] == "network" and entry["message"].startswith(tuple(f"{each}/v1/" for each in addresses)))]
    assert not console, console
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    chromium.get("about:blank")


@pytest.fixture
def page(make_page, site) -> Page:
    """The page of the scripted server."""
    return make_page(site.address)


# ---------------------------------------------------------------------------------------------
# replies


def test_a_reply_streams_and_its_thought_is_folded_above_it(page, site):
    gates = [threading.Event() for _ in range(3)]
    site.reply(delta(thought="小明有3，"), gates[0], delta(thought="又买5。"), gates[1], delta("一共"), gates[2],
               delta("8个。"), END)
    page.send("小明有3个苹果，又买了5个，一共几个？")
    page.until("summary", "思考中… 5 字")
    assert page.all("details")[0].get_attribute("open") is None and page.text(".thought") == ""
    assert page.shown("#stop") and not page.shown("#send") and page.focused() == "input"
    page.click("summary")
    page.until(".thought", "小明有3，")
    gates[0].set()
    page.until(".thought", "小明有3，又买5。")
    gates[1].set()
    page.until(".answer", "一共")
    assert page.text(".answer") == "一共" and page.spoken() == ""  # a screen reader hears no pieces
    assert re.fullmatch(r"思考了 (\d+\.\d 秒|\d+ 毫秒)", page.text("summary"))
    page.send("草稿")  # not sent while a reply is written, and not lost
    gates[2].set()
    page.finished()
    assert page.text(".answer") == "一共8个。" and page.spoken() == "回复：一共8个。"
    assert re.fullmatch(r"7 个 token，每秒 \d+ 个", page.text(".usage"))
    assert page.shown("#send") and not page.shown("#stop")
    assert page.text(".question") == "小明有3个苹果，又买了5个，一共几个？" and page.value("#input") == "草稿"


def test_the_request_and_its_history_without_thoughts(page, site):
    site.reply(delta(thought="嗯") + delta("\n你好。\n") + END)
    site.reply(delta("好") + END)
    page.send("你好")
    page.finished()
    page.send("再见")
    page.finished(2)
    first, second = site.bodies
    assert first == {"path": "/v1/chat/completions", "model": "distill", "stream": True, "temperature": 0.7,
                     "top_p": 0.9, "max_tokens": 512, "stream_options": {"include_usage": True},
                     "chat_template_kwargs": {"enable_thinking": True},
                     "messages": [{"role": "user", "content": "你好"}]}
    assert second["messages"] == [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好。"},
                                  {"role": "user", "content": "再见"}]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_a_stream_cut_at_any_byte(page, site, newline):
    """Each byte comes alone, so also those of a character, of an escape and of a line's end; characters as they are."""
    text = '鳄🐊 \u2028"\\n<'
    first = json.dumps({"choices": [{"delta": {"content": text}}]}, ensure_ascii=False).encode()
    first = first.replace(b' [', b"\ndata: [", 1)  # an event's data may have several lines
    stream = b"\xef\xbb\xbf: comment\n\nevent: x\nid: 1\ndata:" + first + b"\n\n" + delta(text, "想")
    site.reply(*itertools.chain.from_iterable((bytes([byte]), 0.004) for byte in stream.replace(b"\n", newline)), END)
    page.send("?")
    page.finished()
    assert page.js("return document.querySelector('.answer').textContent") == text * 2
    assert not page.shown(".error") and page.all("details")[0].is_displayed()


def test_a_long_reply_is_painted_in_linear_time(page, site):
    """Forty thousand pieces in one line and in many; once a frame."""
    for piece in ("字字 ", "一行\n"):
        site.reply(delta(piece) * 40_000 + END)
    page.js("window.frames_ = 0; const each = () => { frames_++; requestAnimationFrame(each); }; each()")
    begin = time.monotonic()
    page.send("?")
    page.finished()
    page.send("?")
    page.finished(2)
    assert time.monotonic() - begin < 2 * PATIENCE
    assert page.js("return [...document.querySelectorAll('.answer')].map(e => e.textContent.length)") == [
        120_000, 80_000]  # newlines are paragraphs
    assert page.js("return document.querySelector('.answer').firstChild.childNodes.length <= frames_ + 1")


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stop_keeps_what_came(page, site, way):
    from selenium.webdriver import Keys

    site.reply(delta("一半"), threading.Event(), delta("另一半") + END)
    site.reply(delta("好") + END)
    page.send("问")
    page.until(".answer", "一半")
    page.click("#stop") if way == "button" else page.press(Keys.ESCAPE)
    page.finished()
    assert page.text(".answer") == "一半" and page.text(".note") == "已停止" and "已停止" in page.spoken()
    assert site.left.wait(PATIENCE), "the connection was not closed"
    assert page.focused() == "input" and not page.shown(".error")
    page.send("继续")
    page.finished(2)
    assert [each["content"] for each in site.bodies[1]["messages"]] == ["问", "一半", "继续"]


def test_regenerate_replaces_the_last_reply(page, site):
    for answer in ("甲", "乙", "丙"):
        site.reply(delta(answer) + END)
    page.send("一")
    page.finished()
    page.send("二")
    page.finished(2)
    page.click(".again")  # the only one displayed: the last turn's
    page.until(".answer", "丙")
    assert [each.text for each in page.all(".answer")] == ["甲", "丙"]
    assert site.bodies[2] == site.bodies[1] and page.focused() == "input"


def test_length_limit_and_empty_replies_are_said(page, site):
    site.reply(delta("很长") + delta(finish="length") + DONE)
    site.reply(END)
    page.send("问")
    page.finished()
    assert page.text(".note") == "已到长度上限" and page.text(".usage") == ""
    page.send("再问")
    page.finished(2)
    assert page.text(".note") == "回复是空的" and not page.all(".copy")[1].is_displayed()
    site.reply(failure(500, "x"))
    page.send("又问")
    page.until(".error", "服务器出错")
    site.reply(delta("好") + END)
    page.send("还问")
    page.finished(4)
    assert [each["content"] for each in site.bodies[3]["messages"]] == ["问", "很长", "还问"]  # what was answered


ERRORS = {
    "busy": (failure(429, "queue is full", "rate_limit_exceeded", Retry_After="3"), "服务器正忙，请在 3 秒后重试"),
    "server": (failure(500, "out of memory"), "服务器出错"),
    "refused": (failure(400, "top_p must be at most 1"), "服务器不接受"),
    "no JSON": ((502, {}, b"<html>"), "服务器出错"),
    "in the stream": ((delta("一半") + event(error={"message": "out of memory", "type": "server_error"}) + DONE,),
                      "服务器出错"),
    "cut": ((delta("一半"),), "连接中断"),
    "bad event": ((b"data: {\n\n",), "连接中断"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_is_shown_and_can_be_retried(page, site, kind):
    reply, words = ERRORS[kind]
    site.replies.put(reply)
    site.reply(delta("好") + END)
    page.send("问")
    page.until(".error", words)
    assert words in page.spoken() and page.text(".question") == "问" and page.focused() == "input"
    if kind in ("busy", "server", "refused", "in the stream"):
        assert page.text(".detail") in ("queue is full", "out of memory", "top_p must be at most 1")
    assert ("一半" in page.text(".answer")) == (kind in ("in the stream", "cut"))
    page.click(".retry")
    page.until(".answer", "好")
    page.finished()
    assert not page.shown(".error") and site.bodies[1] == site.bodies[0]


def test_a_server_that_is_gone(page, site):
    site.shutdown()
    site.server_close()
    page.send("问")
    page.until(".error", "连不上服务器")
    assert page.text(".question") == "问" and page.shown(".retry")
    page.click("#new")
    assert page.value("#input") == "问"  # what was typed is not lost


def test_a_new_chat_while_the_models_have_not_come(site, make_page):
    stages, site.stages = site.stages, None  # breaks the connection
    page = make_page(site.address)
    page.until(".error", "连不上服务器")
    page.click("#new")
    site.stages = stages
    page.click(".retry")
    page.wait(lambda: page.all("#model option") and not page.shown(".error"), "models")
    assert page.shown("#model")


@pytest.mark.parametrize("turns_before", [0, 1])
def test_a_message_or_a_chat_too_long_for_the_model(page, site, turns_before):
    for number in range(turns_before):
        site.reply(delta("好") + END)
        page.send("早")
        page.finished(number + 1)
    site.reply(failure(400, "1,200 tokens, the context is 1,024", "context_length_exceeded"))
    site.reply(delta("好") + END)
    page.send("问")
    page.until(".error", "开始新对话" if turns_before else "请缩短")
    assert not page.shown(".retry")
    page.click(".fresh")
    assert page.value("#input") == "问" and page.focused() == "input" and not page.all(".turn")
    page.press("？\ue007")
    page.finished()
    assert [each["content"] for each in site.bodies[-1]["messages"]] == ["问？"]


def test_an_api_key_is_asked_for_and_kept_for_the_tab(site, make_page):
    site.key = "秘".encode().hex()
    page = make_page(site.address)
    page.until(".error", "API 密钥")
    page.wait(lambda: page.js("return document.activeElement.type") == "password", "focus")
    page.press("wrong\ue007")
    page.wait(lambda: page.js("return document.activeElement.value") == "", "a second question")
    page.press(site.key + "\ue007")
    page.wait(lambda: not page.shown(".error") and page.all("#model option"), "models")
    site.reply(delta("好") + END)
    page.send("问")
    page.finished()
    kept = page.js("return [localStorage, sessionStorage].map((storage) => Object.values(storage).join())")
    assert kept == ["", site.key]
    site.key = "changed"
    page.send("再问")
    page.until(".error", "API 密钥")
    site.reply(delta("好") + END)
    page.one("input[type=password]").send_keys("changed\ue007")
    page.finished(2)
    assert page.text(".answer") == "好"


# ---------------------------------------------------------------------------------------------
# safety


def test_script_as_chat_text_is_shown_and_not_run(page, site):
    attack = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script><b>&lt;</b>"
    site.reply(delta(attack, attack) + END)
    site.reply(failure(500, attack))
    page.send(attack)
    page.finished()
    page.click("summary")
    assert page.text(".question") == page.text(".answer") == page.text(".thought") == attack
    page.send("再问")
    page.until(".detail", attack)
    assert page.js("return document.title") == "WeakWater"
    assert not page.all("#log img, #log script, #log b")


def test_the_page_has_no_inline_script_or_style():
    html, script = ((WEB / name).read_text(encoding="utf-8") for name in ("index.html", "app.js"))
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?! src)|https?://", html)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|https?://", script)


# ---------------------------------------------------------------------------------------------
# the conversation and its settings


def test_the_thinking_switch(page, site):
    for _ in range(3):
        site.reply(delta("好") + END)
    assert page.all("#thinking")[0].is_selected()
    page.click("#thinking-label")
    page.send("问")
    page.finished()
    page.open()
    assert not page.all("#thinking")[0].is_selected()  # kept
    page.send("问")
    page.finished()
    choose(page, "SFT", "yes")
    assert not page.shown("#thinking-label")
    page.send("问")
    page.finished()
    assert [body.get("chat_template_kwargs") for body in site.bodies] == [
        {"enable_thinking": False}, {"enable_thinking": False}, None]


def choose(page: Page, stage: str, answer: str = ""):
    """Choose a stage, and answer the question that this asks where there is a chat."""
    from selenium.webdriver.support.select import Select

    Select(page.one("#model")).select_by_value(stage)
    if answer:
        page.click(f"#ask button[value={answer}]")
        page.wait(lambda: not page.shown("#ask"), "closed")


def test_the_stage_picker(page, site):
    options = [each.text for each in page.all("#model option")]
    assert options == ["distill：先思考，再回答", "SFT：对话", "pretrain：续写文本"]
    choose(page, "SFT")  # an empty chat asks nothing
    assert not page.shown("#ask")
    site.reply(delta("好") + END)
    site.reply(event(choices=[{"text": "他把苹果"}]),
               event(choices=[{"text": "给了小红。", "finish_reason": "stop"}]), DONE)
    page.send("问")
    page.finished()
    choose(page, "pretrain", "no")
    assert page.value("#model") == "SFT" and len(page.all(".turn")) == 1
    choose(page, "pretrain", "yes")
    assert page.value("#model") == "pretrain" and not page.all(".turn") and "不会回答" in page.text("#about")
    assert "不回答问题" in page.text("#hint") and not page.shown("#thinking-label")
    page.send("小明有3个苹果，")
    page.finished()
    assert page.text(".answer") == "他把苹果给了小红。"
    first, second = site.bodies
    assert first["model"] == "SFT" and second["path"] == "/v1/completions" and second["model"] == "pretrain"
    assert second["prompt"] == "小明有3个苹果，" and "messages" not in second


def test_new_chat_while_a_reply_is_written(page, site):
    site.reply(delta("旧"), threading.Event())
    site.reply(delta("新") + END)
    page.send("一")
    page.until(".answer", "旧")
    page.click("#new")
    assert not page.all(".turn") and page.shown("#examples") and page.focused() == "input" and page.shown("#send")
    assert site.left.wait(PATIENCE)
    page.click("#examples li:nth-child(2) button")
    page.finished()
    assert page.text(".answer") == "新" and [each["content"] for each in site.bodies[1]["messages"]] == [
        "小明有3个苹果，又买了5个，一共几个？"]


def test_settings_are_sent_and_kept(page, site):
    from selenium.webdriver import Keys

    for _ in range(3):
        site.reply(delta("好") + END)
    page.click("#open-settings")
    page.one("#temperature").send_keys(Keys.HOME)
    page.one("#top_p").send_keys(Keys.END)
    page.one("#max_tokens").send_keys(Keys.CONTROL + "a" + Keys.NULL + "64")
    assert page.text("output[for=temperature]") == "0.00"
    page.press(Keys.ESCAPE)
    page.wait(lambda: page.focused() == "input", "focus")
    page.open()
    page.send("问")
    page.finished()
    page.click("#open-settings")
    page.one("#max_tokens").send_keys(Keys.CONTROL + "a" + Keys.NULL + "99999")  # more than the model's context
    page.press(Keys.ESCAPE)
    page.send("问")
    page.finished(2)
    page.click("#open-settings")
    page.click("#reset")
    page.click("#settings .main")
    page.send("问")
    page.finished(3)
    assert [(b["temperature"], b["top_p"], b["max_tokens"]) for b in site.bodies] == [
        (0, 1, 64), (0, 1, 1024), (0.7, 0.9, 512)]


def test_copy(page, site):
    page.cdp("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    paste = "navigator.clipboard.readText().then(arguments[0])"
    for answer in ("第一\n\n第二", "又一"):
        site.reply(delta(answer, "想") + END)
    page.send("问")
    page.finished()
    page.click(".copy")
    page.until(".copy", "已复制")
    assert page.driver.execute_async_script(paste) == "第一\n\n第二" and page.spoken() == "已复制"
    page.wait(lambda: page.text(".copy") == "复制", "the button as before")
    page.js("Object.defineProperty(navigator, 'clipboard', {value: undefined, configurable: true})")  # plain http
    page.send("问")
    page.finished(2)
    page.all(".copy")[1].click()
    page.until(".copy", "已复制")
    page.js("delete navigator.clipboard")
    assert page.driver.execute_async_script(paste) == "又一"


# ---------------------------------------------------------------------------------------------
# keyboard, input methods, screen readers


def test_keyboard_only(page, site):
    from selenium.webdriver import Keys

    site.reply(delta("答案", "想法") + END)
    site.reply(delta("长"), threading.Event())
    assert page.focused() == "input"
    page.one("#input").send_keys("一" + Keys.SHIFT + Keys.ENTER + Keys.NULL + "二")
    assert page.value("#input") == "一\n二" and not page.all(".turn")
    page.press(Keys.ENTER)
    page.finished()
    assert site.bodies[0]["messages"][0]["content"] == "一\n二"

    def tab_to(name: str):
        visited = []
        while page.focused() != name:
            visited.append(page.focused())
            assert len(visited) < 30, visited
            page.press(Keys.TAB)
            outline = page.js("const s = getComputedStyle(document.activeElement); return s.outlineStyle")
            assert outline != "none" or page.focused() in ("input", "body"), page.focused()

    tab_to("summary")
    page.press(Keys.ENTER)
    page.until(".thought", "想法")
    for name in ("copy", "again", "input", "thinking", "send", "model", "new", "open-settings"):
        tab_to(name)
    page.press(Keys.ENTER)
    assert page.shown("#settings")
    page.press(Keys.ESCAPE)
    page.wait(lambda: page.focused() == "input", "focus")
    page.press("问", Keys.ENTER)
    page.until(".answer", "长")
    tab_to("stop")
    page.press(Keys.SPACE)
    page.finished(2)
    assert page.text(".note") == "已停止" and page.focused() == "input"


def test_enter_in_an_input_method_does_not_send(page, site):
    enter = dict(key="Enter", code="Enter", nativeVirtualKeyCode=13)
    site.reply(delta("好") + END)
    page.one("#input").click()
    page.cdp("Input.imeSetComposition", text="ni'hao", selectionStart=6, selectionEnd=6)
    page.js("document.addEventListener('keydown', e => { window.composing = [e.isComposing, e.keyCode]; }, true)")
    page.cdp("Input.dispatchKeyEvent", type="rawKeyDown", windowsVirtualKeyCode=13, **enter)
    assert page.js("return composing") == [True, 13]
    page.cdp("Input.insertText", text="你好")  # the composition ends
    page.cdp("Input.dispatchKeyEvent", type="rawKeyDown", windowsVirtualKeyCode=229, **enter)  # Safari's way
    assert page.js("return composing") == [False, 229]
    assert page.value("#input") == "你好" and not page.all(".turn")
    page.press("\ue007")
    page.finished()
    assert site.bodies[0]["messages"][0]["content"] == "你好"


def test_everything_has_a_name(page, site):
    """In Chromium's accessibility tree: landmarks, the log, and a name for all that can have the focus."""
    site.reply(delta("答案", "想法") + END)
    site.reply(failure(500, "x"))
    page.send("问")
    page.finished()
    page.send("问")
    page.until(".error", "服务器")
    page.cdp("Accessibility.enable")
    nodes = [node for node in page.cdp("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    roles = {node["role"]["value"] for node in nodes}
    assert {"banner", "main", "form", "contentinfo", "log", "status", "switch", "combobox", "heading"} <= roles
    for node in nodes:
        properties = {each["name"]: each["value"].get("value") for each in node.get("properties", [])}
        if properties.get("focusable") and node["role"]["value"] not in ("RootWebArea", "MenuListOption", "option"):
            assert node["name"]["value"].strip(), node
    page.cdp("Accessibility.disable")
    assert page.js("return document.querySelector('#log').getAttribute('aria-live')") == "off"


def test_what_moves_stands_still_where_less_motion_is_asked(page, site):
    site.reply(threading.Event())
    page.send("问")
    moving = "return getComputedStyle(document.querySelector('.waiting i')).animationName"
    assert page.js(moving) != "none"
    page.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
    assert page.js(moving) == "none"


# ---------------------------------------------------------------------------------------------
# looks


def fits(page: Page, width: int):
    """Nothing is wider than the window, and each control that is displayed lies within it."""
    assert page.js("return document.documentElement.scrollWidth") <= width
    assert page.js("const s = document.querySelector('#scroller'); return s.scrollWidth <= s.clientWidth")
    for control in page.all("button, select, textarea, summary, input"):
        if control.is_displayed():
            page.js("arguments[0].scrollIntoView({block: 'nearest'})", control)
            box = page.js("const b = arguments[0].getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]",
                          control)
            name = control.get_attribute("outerHTML")[:100]
            assert box[0] >= 0 and box[2] <= width and box[1] >= -1, (name, box)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_a_narrow_screen(page, site, language):
    page.resize(320, 568, phone=True)
    if language == "en":
        page.click("#language")
    fits(page, 320)
    site.reply(delta("长" * 300 + "w" * 300, "想" * 200 + "w" * 200) + END)
    site.reply(failure(401, "x" * 300, "invalid_api_key"))
    page.send("w" * 200)
    page.finished()
    page.click("summary")
    page.send("问")
    page.one("input[type=password]")
    fits(page, 320)
    page.click("#open-settings")
    fits(page, 320)
    page.click("#settings .main")
    page.resize(320, 240, phone=True)  # with a keyboard on the screen
    page.one("#input").send_keys("行\ue008\ue007\ue000" * 12)
    assert page.one("#input").rect["height"] <= 100
    fits(page, 320)


# for each element with text: how it contrasts with what is behind it (WCAG's formula), and its beginning
CONTRAST = """
const parse = (color) => color.match(/[\\d.]+/g).map(Number);
const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
const behind = (element) => {
  const color = getComputedStyle(element).backgroundColor;
  return parse(color)[3] === 0 ? behind(element.parentElement) : color;
};
const hasText = (element) => element.id === "input" ||
  [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
return [...document.querySelectorAll("body *")].filter((element) => hasText(element) &&
  element.checkVisibility({visibilityProperty: true}) && !element.closest(".unseen, svg, option")).map((element) => {
  const pair = [getComputedStyle(element).color, behind(element)].map((color) => light(parse(color)));
  return [(Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05), element.outerHTML.slice(0, 80)];
});
"""


def test_dark_and_light(page, site):
    site.reply(delta("答案", "想法") + END)
    site.reply(failure(429, "full"))
    page.send("问")
    page.finished()
    page.click("summary")
    page.send("问")
    page.until(".error", "服务器正忙")
    paper = "return getComputedStyle(document.body).backgroundColor"
    pressed = "return document.querySelector('#theme').ariaPressed"
    seen = {}
    for scheme in ("light", "dark"):
        page.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        seen[scheme] = page.js(paper)
        assert page.js(pressed) == str(scheme == "dark").lower()
        contrasts = page.js(CONTRAST)
        assert len(contrasts) > 10 and not [each for each in contrasts if each[0] < 4.5], (scheme, contrasts)
    assert seen["light"] != seen["dark"]
    page.click("#theme")  # against the system's choice, and kept
    assert page.js(paper) == seen["light"] and page.js(pressed) == "false"
    page.open()
    assert page.js(paper) == seen["light"]
    page.click("#theme")  # with the system again
    assert page.js(paper) == seen["dark"]
    page.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    assert page.js(paper) == seen["light"]


def test_language(page, site):
    site.reply(delta("好", "想") + END)
    site.reply(failure(429, "full", Retry_After="2"))
    assert page.js("return document.documentElement.lang") == "zh-CN"
    page.send("问")
    page.finished()
    page.send("问")
    page.until(".error", "2 秒")
    page.click("#language")
    assert page.js("return document.documentElement.lang") == "en"
    assert re.fullmatch(r"Thought for (\d+\.\d s|\d+ ms)", page.one("summary").text)
    assert "again in 2 s" in page.text(".error")
    assert page.one("#send").get_attribute("aria-label") == "Send"
    page.js("document.querySelector('[role=status]').textContent = ''")  # said already
    left = page.js("return document.body.innerText.replace(/[问好中]/g, '').match(/[\\u4e00-\\u9fff]+/g)")
    assert left is None, left
    page.open()
    assert page.js("return document.documentElement.lang") == "en"  # kept


def test_the_browsers_language(site, chromium, make_page):
    agent = chromium.execute_script("return navigator.userAgent")
    try:
        chromium.execute_cdp_cmd("Network.setUserAgentOverride", {"userAgent": agent, "acceptLanguage": "en-GB"})
        page = make_page(site.address)
        assert page.js("return [navigator.language, document.documentElement.lang]") == ["en-GB", "en"]
    finally:
        chromium.execute_cdp_cmd("Network.setUserAgentOverride", {"userAgent": agent, "acceptLanguage": "zh-CN"})


def test_both_languages_have_all_words(page):
    keys = page.js("return Object.values(WORDS).map((words) => Object.keys(words).sort().join())")
    assert len(set(keys)) == 1
    used = set(re.findall(r'data-(?:text|label|placeholder)="(\w+)"', (WEB / "index.html").read_text(encoding="utf-8")))
    assert used <= set(keys[0].split(","))


def test_new_text_scrolls_only_for_a_reader_at_the_end(page, site):
    gates = [threading.Event() for _ in range(3)]
    site.reply(delta("行\n" * 60), gates[0], delta("行\n" * 60), gates[1], delta("行\n" * 60), gates[2], END)
    page.send("问")
    bottom = "const s = document.querySelector('#scroller'); return s.scrollHeight - s.scrollTop - s.clientHeight"
    lines = "return document.querySelectorAll('.answer p').length"
    page.wait(lambda: page.js(lines) > 60, "60 lines")
    assert page.js(bottom) < 2 and not page.shown("#jump")
    page.js("document.querySelector('#scroller').scrollTop = 100")
    page.wait(lambda: page.shown("#jump"), "the way back")
    gates[0].set()
    page.wait(lambda: page.js(lines) > 120, "120 lines")
    assert page.js("return document.querySelector('#scroller').scrollTop") == 100
    page.click("#jump")
    assert page.js(bottom) < 2 and not page.shown("#jump")
    gates[1].set()
    page.wait(lambda: page.js(lines) > 180, "180 lines")
    page.wait(lambda: page.js(bottom) < 2, "the end")
    gates[2].set()
    page.finished()
    assert page.js(bottom) < 2


# ---------------------------------------------------------------------------------------------
# serve.py itself


@pytest.fixture(scope="module")
def served(tmp_path_factory, tokenizer):
    """The address of serve.py with distill weights that think "嗯" and answer "鳄🐊", and random pretrain weights."""
    folder = tmp_path_factory.mktemp("served")
    encoder = TextEncoder.of(tokenizer)
    tags = encoder.tag_ids
    answer = [tags["<answer>"], *encoder.encode(["鳄🐊"])[0], tags["</answer>"]]
    thought = [*encoder.encode(["嗯"])[0], tags["</think>"]]
    save_nano(folder / "pretrain.pth", tokenizer, "pretrain")
    save_nano(folder / "distill.pth", tokenizer, "distill", answer, thought)
    model, meta = load_model(folder / "distill.pth")
    with torch.no_grad():  # behind the thought comes the answer
        model.lm_head.weight[encoder.eos_id] -= model.model.embed_tokens.weight[thought[-1]]
        model.lm_head.weight[answer[0]] += model.model.embed_tokens.weight[thought[-1]]
    save_weights(folder / "distill.pth", model, meta | {"tokenizer": tokenizer.files})
    model, meta = load_model(folder / "pretrain.pth")
    save_weights(folder / "pretrain.pth", model, meta | {"tokenizer": tokenizer.files})
    command = [sys.executable, "serve.py", "--out_dir", folder, "--port", "0", "--device", "cpu", "--dtype", "fp32"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, encoding="utf-8") as server:
        printed = []
        for line in server.stderr:
            printed.append(line)
            if match := re.search(r"serving on (http://\S+)", line):
                break
        else:
            pytest.fail("serve.py did not start:\n" + "".join(printed))
        threading.Thread(target=server.stderr.read, daemon=True).start()
        yield match[1]
        server.terminate()
        server.wait(PATIENCE)


def greedy(page: Page):
    from selenium.webdriver import Keys

    page.click("#open-settings")
    page.one("#temperature").send_keys(Keys.HOME)
    page.click("#settings .main")


def test_a_conversation_with_serve_py(served, make_page):
    page = make_page(served)
    greedy(page)
    page.send("你好")
    page.finished()
    assert page.text(".answer") == "鳄🐊" and not page.shown(".error")
    assert re.search(r"\d+ 个 token", page.text(".usage"))
    page.click("summary")
    assert page.text(".thought") == "嗯"
    page.click("#thinking-label")
    page.send("<script>document.title='run'</script></s><s>")
    page.finished(2)
    assert page.text(".answer") == "鳄🐊" and not page.all("details")[1].is_displayed()
    page.send("字" * 400)
    page.until(".error", "新对话")
    assert page.js("return document.title") == "WeakWater"


def test_text_is_continued_by_serve_py(served, make_page):
    page = make_page(served)
    choose(page, "pretrain")
    page.send("小明在学校")
    page.finished()
    assert page.js("return document.querySelector('.answer').textContent") and page.text(".usage")
    assert not page.shown(".error")
