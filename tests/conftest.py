"""What all tests share: the repo root on sys.path, a small corpus from a seed, and a tokenizer made from it."""

import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else `tokenizers` warns about every fork
# a shell starts background jobs with Ctrl-C ignored, and the programs under test would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):  # `tests` for `from conftest import …` when a test file runs as a script
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

# ---------------------------------------------------------------------------------------------
# a corpus from a seed

WHO = "小明 小红 老师 妈妈 医生 农民 画家 邻居 爷爷 司机".split()
WHERE = "学校 公园 厨房 车站 河边 图书馆 北京 田里 山上 商店".split()
WHAT = "苹果 雨伞 铅笔 自行车 地图 茶叶 照片 面包 石头 书信".split()
DID = "看见了 带来了 买下 画出 忘记了 修好了 送给朋友 藏起来".split()
CODE = ["for i in range({}):\n    print(i)\n", "x = {} * 2\nif x > 10:\n    x -= 1\n", "SELECT name FROM t LIMIT {};"]


def sentence(rng: random.Random) -> str:
    """About fifteen characters: a Chinese sentence, a sum, English, or code."""
    kind = rng.random()
    if kind < 0.7:
        return f"{rng.choice(WHO)}在{rng.choice(WHERE)}{rng.choice(DID)}{rng.choice(WHAT)}，共{rng.randint(1, 99)}个。"
    if kind < 0.85:
        a, b = rng.randint(1, 99), rng.randint(1, 99)
        return f"{a} + {b} = {a + b}；"
    if kind < 0.93:
        return rng.choice(["The cat sat on the mat. ", "Hello, world! ", "Water is weak, yet it wins. 🌊 "])
    return rng.choice(CODE).format(rng.randint(1, 99))


def paragraph(rng: random.Random, n_chars: int) -> str:
    """Sentences until there are `n_chars` characters."""
    text = ""
    while len(text) < n_chars:
        text += sentence(rng)
    return text


def make_texts(seed: int, n: int, longest: int = 1500) -> list[dict]:
    """Pretraining records of 20 to `longest` characters; every seventh has a weight."""
    rng = random.Random(f"text {seed}")
    records = [{"text": paragraph(rng, rng.randint(20, longest))} for _ in range(n)]
    for record in records[::7]:
        record["weight"] = 0.5
    return records


def make_chats(seed: int, n: int, shortest: int = 20, longest: int = 400, reply: int = 120) -> list[dict]:
    """Conversations of `shortest` to `longest` characters in one or more turns, some with a system message, a
    weight, or another key."""
    rng = random.Random(f"chat {seed}")
    records = []
    for number in range(n):
        messages = [{"role": "system", "content": "你是一个助手。"}] if number % 5 == 0 else []
        wanted, size = rng.randint(shortest, longest), 0
        while size < wanted:
            question = f"{rng.choice(WHO)}问：{sentence(rng)}？"
            answer = paragraph(rng, rng.randint(1, reply))
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            size += len(question) + len(answer)
        record = {"conversations": messages}
        if number % 7 == 0:
            record["weight"] = 0.5
        if number % 4 == 0:
            record["source"] = "made up"
        records.append(record)
    return records


def make_r1(seed: int, n: int, thought: int = 400) -> list[dict]:
    """Sums with <think>…</think><answer>…</answer> replies."""
    rng = random.Random(f"r1 {seed}")
    records = []
    for _ in range(n):
        a, b = rng.randint(1, 99), rng.randint(1, 99)
        think = f"要算{a}加{b}。{paragraph(rng, rng.randint(1, thought))}所以是{a + b}。"
        reply = f"<think>\n{think}\n</think>\n<answer>\n{a + b}\n</answer>"
        records.append({"conversations": [{"role": "user", "content": f"{a} + {b} = ?"},
                                          {"role": "assistant", "content": reply}]})
    return records


def write_jsonl(path: Path, records: list[dict]) -> Path:
    """Write records as JSON lines and return the path."""
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8",
                    errors="backslashreplace")
    return path


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Folder with pretrain.jsonl, sft.jsonl (conversations below and above 512 tokens, up to 1,024) and r1.jsonl."""
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "pretrain.jsonl", make_texts(seed=1, n=120))
    short, long = make_chats(seed=2, n=90, longest=550), make_chats(seed=3, n=60, shortest=800, longest=1180)
    write_jsonl(folder / "sft.jsonl", [*short, *long])
    write_jsonl(folder / "r1.jsonl", make_r1(seed=4, n=80))
    return folder


# ---------------------------------------------------------------------------------------------
# a tokenizer from that corpus

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
CHAT_TEMPLATE = ("{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}")


def save_tokenizer(backend, folder: Path, **config) -> Path:
    """Write a `tokenizers` tokenizer as a folder that AutoTokenizer reads."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                  clean_up_tokenization_spaces=False, chat_template=CHAT_TEMPLATE) | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def byte_level(texts: list[str], vocab_size: int, tags: list[str] = TAGS):
    """A byte-level BPE in the project's form, trained on texts, with `tags` as single ids."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", *(AddedToken(tag, special=False, normalized=False) for tag in tags)]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    state = json.loads(tokenizer.to_str())  # the trainer makes them all special: then decoding would hide the tags
    for token in state["added_tokens"]:
        token["special"] = token["content"] not in tags
    return Tokenizer.from_str(json.dumps(state))


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory, data_dir) -> Path:
    """Folder of a tokenizer with 800 entries and the four tags, which train_tokenizer.py makes from data_dir."""
    import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer") / "weakwater_tokenizer"
    data = str(data_dir / "pretrain.jsonl")
    train_tokenizer.main(["--data_path", data, "--tokenizer_path", str(folder), "--vocab_size", "800"])
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir):
    """The tokenizer in tokenizer_dir, loaded as the stages load it."""
    from text.tokenizer import load_tokenizer

    return load_tokenizer(str(tokenizer_dir))


# ---------------------------------------------------------------------------------------------
# a model's faster forwards


def replace_forwards(model, dtype):
    """`model`, on a CPU, with the first replacement of each part that is made for `dtype`, and without the check that
    `accelerate` makes first: that knows no float64, in which a test sees more."""
    import torch

    from fastpath import REPLACEMENTS, Case, patch

    case = Case(model.config, torch.device("cpu"), dtype, compile=False)
    for choices in REPLACEMENTS.values():
        patch(model, next(each for each in choices if each.supported(case)), case)
    return model


@pytest.fixture
def without_check(monkeypatch):
    """Replacements are used without the check that they agree with model.py: it takes longer than a small test, and
    what it would refuse is to be seen."""
    from faults import Agreed

    import fastpath

    monkeypatch.setattr(fastpath, "make_twin", lambda model, device, dtype: (Agreed(), None))


# ---------------------------------------------------------------------------------------------
# a stage, run in this process


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Forty short documents."""
    return write_jsonl(tmp_path_factory.mktemp("text") / "t.jsonl", make_texts(31, 40, longest=120))


def stage_argv(data, tokenizer_dir, out_dir, **flags) -> list[str]:
    """The arguments of a small fp32 run; a flag given as True stands alone, as False not at all, a
    list as several values."""
    flags = dict(data_path=data, tokenizer_path=tokenizer_dir, out_dir=out_dir, device="cpu", dtype="fp32",
                 log_interval=1) | flags
    argv = []
    for name, value in flags.items():
        if value is not False:
            values = [] if value is True else value if isinstance(value, list) else [value]
            argv += [f"--{name}", *map(str, values)]
    return argv


def train(stage: str, data, tokenizer_dir, out_dir, **flags) -> list[dict]:
    """Run a stage's `main` in this process, without charts, and return its JSONL as rows."""
    import importlib
    from unittest import mock

    main = importlib.import_module(stage).main
    with mock.patch("common.runlog.RunLog.charts"):  # a second each, and tested elsewhere
        main(stage_argv(data, tokenizer_dir, out_dir, **flags))
    return read_rows(out_dir, stage)


def read_rows(out_dir, stage: str) -> list[dict]:
    """The JSONL of a stage as rows; each line must be JSON, which knows no NaN."""
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    lines = (Path(out_dir) / "log" / f"{stage}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """One token cache for all runs on data_dir: each file is tokenized once."""
    return tmp_path_factory.mktemp("cache")
