// The chat page of serve.py: plain JavaScript, no library. Sections: words, what is kept, stages, the request, one reply,
// the conversation, controls. All text of users and models is put in as text nodes, so none of it can become markup.
"use strict";

// ---------------------------------------------------------------------------------------------
// words: one dictionary; an element says by data-text, data-label or data-placeholder which of them it shows

const WORDS = {
  zh: {
    lang: "zh-CN", otherLanguage: "Switch to English", otherLanguageShort: "EN",
    stage: "模型阶段", option: "{id}：{about}", newChat: "新对话", settings: "设置", theme: "深色模式", conversation: "对话", composer: "发送消息",
    stage_distill: "先思考，再回答", stage_SFT_long: "长对话", stage_SFT: "对话", stage_pretrain: "续写文本",
    greeting: "问点什么", greetingText: "写个开头",
    about: "这是一个从零训练的小型中文模型。试试这些：",
    aboutThinking: "这是一个从零训练的小型中文模型，先思考，再回答。试试这些：",
    aboutText: "预训练模型只会续写文本，不会回答问题。试试这些开头：",
    examples: "例子", message: "消息", placeholder: "输入消息", placeholderText: "输入开头，模型接着写",
    hintKeys: "Enter 发送，Shift+Enter 换行，Esc 停止。", hint: "小模型常会出错。",
    hintText: "这个阶段只接着每段文字往下写，不回答问题。",
    thinkingSwitch: "思考", send: "发送", stop: "停止", jump: "回到最新",
    you: "你", model: "WeakWater", waiting: "正在等待回复", thinking: "思考中… {n} 字", thoughtFor: "思考了 {s} 秒",
    thoughtForMs: "思考了 {ms} 毫秒",
    copy: "复制", copied: "已复制", notCopied: "无法复制", again: "重新生成", stopped: "已停止", lengthReached: "已到长度上限",
    emptyReply: "回复是空的", usage: "{n} 个 token", usageRate: "{n} 个 token，每秒 {rate} 个", replyDone: "回复：",
    temperature: "温度 (temperature)", temperatureHint: "越低越稳定；0 表示每次都取最可能的词。",
    topP: "Top-p", topPHint: "只从概率之和达到 top-p 的最可能的词中选。",
    length: "最大长度 (token)", reset: "恢复默认", done: "完成", cancel: "取消",
    askNewChat: "换阶段会开始新对话，当前对话将被清空。", begun: "新对话已开始",
    network: "连不上服务器。", cut: "连接中断，回复不完整。", busy: "服务器正忙。", busyFor: "服务器正忙，请在 {n} 秒后重试。",
    key: "服务器需要 API 密钥。", full: "对话太长，超出了模型的上下文。请开始新对话，你刚写的话会回到输入框里。",
    long: "这条消息太长，超出了模型的上下文。请缩短后再发。", edit: "修改消息",
    server: "服务器出错。", refused: "服务器不接受这个请求。",
    apiKey: "API 密钥", useKey: "使用", retry: "重试",
  },
  en: {
    lang: "en", otherLanguage: "切换到中文", otherLanguageShort: "中",
    stage: "Stage of the model", option: "{id}: {about}", newChat: "New chat", settings: "Settings", theme: "Dark mode",
    conversation: "Conversation", composer: "Send a message",
    stage_distill: "thinks, then answers", stage_SFT_long: "long chats", stage_SFT: "chats",
    stage_pretrain: "continues text",
    greeting: "Ask something", greetingText: "Write a beginning",
    about: "A small Chinese model, trained from nothing. Try one of these:",
    aboutThinking: "A small Chinese model, trained from nothing. It thinks before it answers. Try one of these:",
    aboutText: "Pretrained weights continue text; they do not answer. Try one of these beginnings:",
    examples: "Examples", message: "Message", placeholder: "Message (the model knows Chinese only)",
    placeholderText: "A beginning, which the model continues",
    hintKeys: "Enter sends, Shift+Enter starts a new line, Esc stops.", hint: "A small model is often wrong.",
    hintText: "This stage continues each text by itself; it does not answer.",
    thinkingSwitch: "Think", send: "Send", stop: "Stop", jump: "Jump to latest",
    you: "You", model: "WeakWater", waiting: "Waiting for the reply", thinking: "Thinking… {n} characters",
    thoughtFor: "Thought for {s} s", thoughtForMs: "Thought for {ms} ms",
    copy: "Copy", copied: "Copied", notCopied: "Cannot copy", again: "Regenerate", stopped: "Stopped",
    lengthReached: "Length limit reached", emptyReply: "The reply is empty", usage: "{n} tokens",
    usageRate: "{n} tokens, {rate} tokens/s", replyDone: "Reply: ",
    temperature: "Temperature", temperatureHint: "Lower is steadier; 0 always takes the likeliest token.",
    topP: "Top-p", topPHint: "Choose among the likeliest tokens whose probabilities add up to top-p.",
    length: "Longest reply (tokens)", reset: "Reset", done: "Done", cancel: "Cancel",
    askNewChat: "Another stage begins a new chat. This one will be cleared.", begun: "New chat",
    network: "The server cannot be reached.", cut: "The connection broke; the reply is not complete.",
    busy: "The server is busy.", busyFor: "The server is busy. Try again in {n} s.",
    key: "The server asks for an API key.",
    full: "The chat is longer than the model's context. Begin a new chat; what you wrote returns to the input.",
    long: "This message is longer than the model's context. Please shorten it.", edit: "Edit the message",
    server: "The server failed.", refused: "The server refuses this request.",
    apiKey: "API key", useKey: "Use", retry: "Retry",
  },
};
const EXAMPLES = {  // the model's language, whatever the page's is; from the quickstart's small world
  chat: ["你好", "小明有3个苹果，又买了5个，一共几个？", "树上有9只鸟，飞走4只，又飞来3只，还有几只？", "25+38等于多少？"],
  text: ["小明有3个苹果，", "他的爱好是", "25+38="],
};

const $ = (id) => document.getElementById(id);

/** The dictionary's words for `key` in the page's language, with {name} filled in from `values`. */
function words(key, values = {}) {
  return WORDS[language][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** Show words in an element, in a way that a later change of language changes them too. */
function say(element, key, values = {}) {
  element.dataset.text = key;
  element.dataset.values = JSON.stringify(values);
  element.textContent = words(key, values);
}

function translate(root) {
  for (const element of root.querySelectorAll("[data-text]")) {
    element.textContent = words(element.dataset.text, JSON.parse(element.dataset.values || "{}"));
  }
  for (const element of root.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", words(element.dataset.label));
    if (element.matches("button, select")) element.title = words(element.dataset.label);
  }
  for (const element of root.querySelectorAll("[data-placeholder]")) {
    element.placeholder = words(element.dataset.placeholder);
  }
}

/** A copy of a <template>'s element, in the page's language. */
function clone(template) {
  const copy = $(template).content.cloneNode(true);
  translate(copy);
  return copy.firstElementChild;
}

function announce(text) {
  $("announcer").textContent = text;
}

// ---------------------------------------------------------------------------------------------
// what is kept: settings in localStorage (which a browser may refuse), the key for this tab only

const DEFAULTS = {temperature: 0.7, top_p: 0.9, max_tokens: 512};
const kept = attempt(() => JSON.parse(localStorage.getItem("weakwater"))) || {};
let language = kept.language in WORDS ? kept.language : /^zh\b/i.test(navigator.language) ? "zh" : "en";
let apiKey = attempt(() => sessionStorage.getItem("weakwater-key")) || "";

function attempt(action) {
  try {
    return action();
  } catch {
    return null;
  }
}

function keep(name, value) {
  kept[name] = value;
  attempt(() => localStorage.setItem("weakwater", JSON.stringify(kept)));
}

/** The value of a setting, within its field's bounds; the default where the field holds no number. */
function setting(name) {
  const {min, max, valueAsNumber} = $(name);
  if (Number.isNaN(valueAsNumber)) return DEFAULTS[name];
  const value = Math.min(Math.max(valueAsNumber, min), max);
  return name === "max_tokens" ? Math.round(value) : value;
}

function showSettings() {
  for (const name in DEFAULTS) {
    $(name).value = kept[name] ?? DEFAULTS[name];
    $(name).value = setting(name);
    showOutput(name);
  }
}

function showOutput(name) {
  const output = document.querySelector(`output[for=${name}]`);
  if (output) output.textContent = setting(name).toFixed(2);
}

const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (kept.theme ? kept.theme === "dark" : systemIsDark.matches);

function showTheme() {
  document.documentElement.dataset.theme = kept.theme || "";
  $("theme").setAttribute("aria-pressed", isDark());
}

function showLanguage() {
  document.documentElement.lang = words("lang");
  translate(document);
  showModels();
}

// ---------------------------------------------------------------------------------------------
// stages: each model is the weights of a stage

let models = [], chosen = "";

/** What the server says about the chosen model: thinks, continues_text, context. */
const stage = () => models.find((model) => model.id === chosen)?.weakwater || {};

async function loadModels() {
  $("log").querySelector(":scope > .error")?.remove();
  try {
    const response = await request("v1/models");
    models = (await response.json()).data;
    chosen = models[0]?.id || "";
    showModels();
    showStage();
    focusInput();
  } catch (error) {
    $("log").prepend(errorBox(asFailure(error), loadModels));
  }
}

function showModels() {
  $("model").replaceChildren(...models.map(({id, weakwater}) => {
    const key = `stage_${weakwater?.stage}`;
    return new Option(key in WORDS.zh ? words("option", {id, about: words(key)}) : id, id, false, id === chosen);
  }));
  $("model").hidden = !models.length;
}

function showStage() {
  const {thinks, continues_text, context} = stage();
  document.body.classList.toggle("continues", Boolean(continues_text));
  $("thinking-label").hidden = !thinks;
  $("max_tokens").max = context || 32768;
  showSettings();
  say($("empty").querySelector("h2"), continues_text ? "greetingText" : "greeting");
  say($("about"), continues_text ? "aboutText" : thinks ? "aboutThinking" : "about");
  say($("caution"), continues_text ? "hintText" : "hint");
  $("input").dataset.placeholder = continues_text ? "placeholderText" : "placeholder";
  translate($("composer"));
  $("examples").replaceChildren(...EXAMPLES[continues_text ? "text" : "chat"].map((text) => {
    const item = document.createElement("li"), button = document.createElement("button");
    button.type = "button";
    button.lang = "zh-CN";
    button.textContent = text;
    button.addEventListener("click", () => ask(text));
    item.append(button);
    return item;
  }));
}

// ---------------------------------------------------------------------------------------------
// the request, its errors, and the events of a stream

class Failure extends Error {
  /** `kind` is a key of the dictionary; `detail` the server's own words; `seconds` its Retry-After. */
  constructor(kind, detail = "", seconds = 0) {
    super(detail);
    Object.assign(this, {kind, seconds});
  }
}

/** Any error as a Failure: what is none comes from a connection that broke or sent what is not JSON. */
const asFailure = (error) => (error instanceof Failure ? error : new Failure("cut", error.message));

function failureOf(error, status = 500, seconds = 0) {
  const kind = error?.code === "context_length_exceeded" ? "full" : status === 401 ? "key" : status === 429 ? "busy"
    : status >= 500 ? "server" : "refused";
  return new Failure(kind, error?.message || `HTTP ${status}`, seconds);
}

/** The response to a GET, or to a POST of `body`; throws a Failure where it is an error. */
async function request(path, body, signal) {
  const headers = {"Content-Type": "application/json"};
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  const options = body ? {method: "POST", headers, body: JSON.stringify(body), signal} : {headers, signal};
  const response = await fetch(path, options).catch((error) => { throw new Failure("network", error.message); });
  if (response.ok) return response;
  const answered = await response.json().catch(() => null);
  throw failureOf(answered?.error, response.status, Number(response.headers.get("Retry-After")) || 0);
}

/** The data of each server-sent event. A read may end anywhere: inside a character (the decoder waits for the rest),
 *  inside a line, or between \r and \n. */
async function* events(body) {
  const reader = body.getReader(), decoder = new TextDecoder();
  let rest = "", data = [];
  try {
    for (;;) {
      const {done, value} = await reader.read();
      if (done) return;
      rest += decoder.decode(value, {stream: true});
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        } else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Path and body of the request for a turn's reply: earlier questions and answers, without thoughts. */
function requestFor(turn) {
  const {thinks, continues_text} = stage();
  const body = {stream: true, stream_options: {include_usage: true}};
  for (const name in DEFAULTS) body[name] = setting(name);
  if (chosen) body.model = chosen;
  if (continues_text) return ["v1/completions", {...body, prompt: turn.question}];
  body.messages = [];
  for (const {question, answer} of turns.slice(0, turns.indexOf(turn)).filter((each) => each.answer)) {
    body.messages.push({role: "user", content: question}, {role: "assistant", content: answer});
  }
  body.messages.push({role: "user", content: turn.question});
  if (thinks) body.chat_template_kwargs = {enable_thinking: $("thinking").checked};
  return ["v1/chat/completions", body];
}

// ---------------------------------------------------------------------------------------------
// one reply: its text as it comes, then its buttons or its error

let running = null;  // the AbortController of the reply that is being written
let follow = true;  // the reader is at the end, so new text scrolls into view

/** Add text, one paragraph a line, so that a paint lays out the last one only, however long the reply is; a line without
 *  end is cut. */
function appendText(parent, text) {
  if (!parent.firstChild) text = text.trimStart();
  if (!text) return;
  let paragraph = parent.lastChild;
  const begin = () => { paragraph = parent.appendChild(document.createElement("p")); };
  text.split("\n").forEach((line, index) => {
    if (index > 0 || !paragraph) begin();
    for (const piece of line.match(/.{1,2000}/gsu) || []) {
      if (paragraph.textContent.length > 2000) begin();
      paragraph.append(piece);
    }
  });
}

/** Writes a reply into its element, at most once for each frame of the display. */
class Writer {
  constructor(view) {
    const part = (name) => view.querySelector(name);
    Object.assign(this, {view, details: part("details"), thought: part(".thought"), answer: part(".answer"),
      waiting: part(".waiting"), newThought: "", newAnswer: "", characters: 0, frame: 0, sent: performance.now()});
  }

  add(thought, answer) {
    if (!thought && !answer) return;
    this.begun ??= performance.now();
    if (answer && this.characters) this.thoughtEnd ??= performance.now();
    this.last = performance.now();
    this.newThought += thought || "";
    this.newAnswer += answer || "";
    this.characters += (thought || "").trim().length;
    this.frame ||= requestAnimationFrame(() => this.paint());
  }

  paint() {
    cancelAnimationFrame(this.frame);  // a hidden tab has no frames: then the end paints all at once
    this.frame = 0;
    appendText(this.thought, this.newThought);
    appendText(this.answer, this.newAnswer);
    this.newThought = this.newAnswer = "";
    this.waiting.hidden = Boolean(this.characters || this.answer.firstChild);
    this.details.hidden = !this.characters;
    if (this.thoughtEnd) this.endThought();
    else say(this.details.firstElementChild, "thinking", {n: this.characters});
    scroll();
  }

  endThought() {
    const ms = Math.round((this.thoughtEnd ?? this.last ?? this.sent) - this.sent);
    say(this.details.firstElementChild, ms < 1000 ? "thoughtForMs" : "thoughtFor", {ms, s: (ms / 1000).toFixed(1)});
  }
}

/** Ask for the reply of a turn, in place of what an earlier try has left. */
async function reply(turn) {
  const view = clone("reply"), writer = new Writer(view), mine = new AbortController();
  turn.element.querySelector(".reply").replaceWith(view);
  turn.answer = "";
  turn.failed = false;
  setRunning(mine);
  announce("");
  let reason, usage, failure;
  try {
    const [path, body] = requestFor(turn);
    const response = await request(path, body, mine.signal);
    for await (const data of events(response.body)) {
      if (data === "[DONE]") {
        reason ??= "stop";
        break;
      }
      const chunk = JSON.parse(data), choice = chunk.choices?.[0];
      if (chunk.error) throw failureOf(chunk.error);
      usage = chunk.usage || usage;
      reason = choice?.finish_reason || reason;
      const answer = choice?.delta?.content ?? choice?.text ?? "";
      turn.answer += answer;
      writer.add(choice?.delta?.reasoning_content, answer);
    }
    if (!reason) throw new Failure("cut");
  } catch (error) {
    if (mine.signal.aborted) reason = "stopped";
    else failure = asFailure(error);
  }
  if (!view.isConnected) return;  // a new chat was begun
  turn.answer = stage().continues_text ? turn.answer : turn.answer.trim();
  writer.paint();
  writer.endThought();
  if (running === mine) setRunning(null);
  finish(turn, view, writer, {reason, usage, failure});
}

function finish(turn, view, writer, {reason, usage, failure}) {
  writer.waiting.hidden = true;
  view.classList.add("finished");
  view.querySelector(".copy").hidden = !turn.answer;
  view.querySelector(".again").addEventListener("click", () => retry(turn));
  view.querySelector(".copy").addEventListener("click", (event) => copy(turn.answer, event.currentTarget));
  const note = {stopped: "stopped", length: "lengthReached"}[reason] || (turn.answer ? "" : "emptyReply");
  if (failure) {
    turn.failed = true;
    view.querySelector(".below").hidden = true;
    view.append(errorBox(failure, () => retry(turn)));
  } else {
    if (note) say(view.querySelector(".note"), note);
    announce((turn.answer ? words("replyDone") + turn.answer : "") + (note ? ` ${words(note)}` : ""));
  }
  if (usage) {  // the first token comes after the prompt: it is no part of the rate
    const n = usage.completion_tokens, seconds = (writer.last - writer.begun) / 1000;
    const rate = n > 1 && seconds > 0.2 ? Math.round((n - 1) / seconds) : "";
    say(view.querySelector(".usage"), rate ? "usageRate" : "usage", {n, rate});
  }
  scroll();
}

/** An error, in the chat: what happened, the server's words, and what can be done. */
function errorBox(failure, again) {
  const box = clone("error"), part = (name) => box.querySelector(name), form = part("form");
  const alone = failure.kind === "full" && turns.length === 1;  // not the chat is too long, but the message
  const what = alone ? "long" : failure.kind === "busy" && failure.seconds ? "busyFor" : failure.kind;
  say(part(".what"), what, {n: failure.seconds});
  announce(part(".what").textContent);
  part(".detail").textContent = failure.message;
  part(".retry").hidden = failure.kind === "key" || failure.kind === "full";
  part(".retry").addEventListener("click", again);
  part(".fresh").hidden = failure.kind !== "full";
  say(part(".fresh"), alone ? "edit" : "newChat");
  part(".fresh").addEventListener("click", newChat);
  form.hidden = failure.kind !== "key";
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    apiKey = form.querySelector("input").value;
    attempt(() => sessionStorage.setItem("weakwater-key", apiKey));
    if (!models.length && again !== loadModels) loadModels();
    again();
  });
  if (!form.hidden) requestAnimationFrame(() => form.querySelector("input").focus());
  return box;
}

async function copy(text, button) {
  const copied = await navigator.clipboard?.writeText(text).then(() => true, () => false) || copyOldWay(text);
  button.focus();
  say(button, copied ? "copied" : "notCopied");
  announce(words(copied ? "copied" : "notCopied"));
  setTimeout(() => say(button, "copy"), 1500);
}

/** For a page that came by plain http from another machine: browsers give it no navigator.clipboard. */
function copyOldWay(text) {
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  return copied;
}

// ---------------------------------------------------------------------------------------------
// the conversation

let turns = [];  // {question, answer, failed, element}, in memory only

function ask(question) {
  if (running || !question.trim()) return false;
  const element = clone("turn"), turn = {question, answer: "", element};
  element.querySelector(".question").textContent = question;
  turns.push(turn);
  $("log").append(element);
  $("empty").hidden = true;
  follow = true;
  focusInput();
  reply(turn);
  return true;
}

function retry(turn) {
  if (running) return;
  follow = true;
  focusInput();
  reply(turn);
}

function newChat() {
  running?.abort();
  setRunning(null);
  const last = turns.at(-1);
  if (last?.failed && !$("input").value) $("input").value = last.question;  // what was typed is not lost
  turns = [];
  $("log").replaceChildren(...$("log").querySelectorAll(":scope > .error"));  // loadModels must still be retried
  $("empty").hidden = false;
  follow = true;
  $("scroller").scrollTop = 0;
  $("jump").hidden = true;
  fitInput();
  announce(words("begun"));
  focusInput();
}

function setRunning(controller) {
  running = controller;
  $("send").hidden = Boolean(controller);
  $("stop").hidden = !controller;
  $("log").setAttribute("aria-busy", Boolean(controller));
}

function scroll() {
  const scroller = $("scroller");
  if (follow && turns.length) scroller.scrollTop = scroller.scrollHeight;
  $("jump").hidden = follow || !turns.length;
}

/** Back to the input; not by touch, where it would open the keyboard over the reply. */
function focusInput() {
  if (!matchMedia("(pointer: coarse)").matches) $("input").focus();
  else document.activeElement?.blur();
}

function fitInput() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight}px`;
}

// ---------------------------------------------------------------------------------------------
// controls

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (ask($("input").value)) $("input").value = "";
  fitInput();
});
$("input").addEventListener("input", fitInput);
$("input").addEventListener("keydown", (event) => {
  // Enter that chooses a word in an input method must not send; Safari says so by keyCode 229 only
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || !running || document.querySelector("dialog[open]")) return;
  running.abort();
  focusInput();
});
$("stop").addEventListener("click", () => {
  running?.abort();
  focusInput();
});
$("new").addEventListener("click", newChat);
$("scroller").addEventListener("scroll", () => {
  const {scrollHeight, scrollTop, clientHeight} = $("scroller");
  follow = scrollHeight - scrollTop - clientHeight < 40;
  $("jump").hidden = follow || !turns.length;
});
window.addEventListener("resize", scroll);
$("jump").addEventListener("click", () => {
  follow = true;
  scroll();
  focusInput();
});

$("model").addEventListener("change", async () => {
  if (turns.length && !await confirmed()) {
    $("model").value = chosen;
    return;
  }
  chosen = $("model").value;
  if (turns.length) newChat();
  showStage();
});

function confirmed() {
  $("ask").returnValue = "no";  // Esc closes it with this answer
  $("ask").showModal();
  return new Promise((resolve) => {
    $("ask").addEventListener("close", () => resolve($("ask").returnValue === "yes"), {once: true});
  });
}

$("thinking").checked = kept.thinking ?? true;
$("thinking").addEventListener("change", () => keep("thinking", $("thinking").checked));
$("open-settings").addEventListener("click", () => $("settings").showModal());
$("settings").addEventListener("close", focusInput);
for (const name in DEFAULTS) {
  $(name).addEventListener("input", () => showOutput(name));
  $(name).addEventListener("change", () => {
    keep(name, setting(name));
    showSettings();
  });
}
$("reset").addEventListener("click", () => {
  for (const name in DEFAULTS) keep(name, undefined);
  showSettings();
});
$("theme").addEventListener("click", () => {
  const theme = isDark() ? "light" : "dark";
  keep("theme", theme === (systemIsDark.matches ? "dark" : "light") ? undefined : theme);  // follow the system again
  showTheme();
});
systemIsDark.addEventListener("change", showTheme);
$("language").addEventListener("click", () => {
  language = language === "zh" ? "en" : "zh";
  keep("language", language);
  showLanguage();
});

showTheme();
showLanguage();
showStage();
fitInput();
loadModels();
