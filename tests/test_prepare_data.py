"""prepare_data.py from end to end, on a raw corpus in which every fault is planted (dirty_corpus.py)."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import dirty_corpus
import pytest
from conftest import ROOT

import prepare_data
from common import exits
from Config import UserError
from prepare.steps import LAST_STEPS, STEPS
from text.sources import PUBLISHING, find_files

pytest.importorskip("datatrove")
from prepare.pipeline import read_jsonl  # noqa: E402  needs it

pytestmark = pytest.mark.extra
TOKENIZER = ROOT / "tests" / "golden" / "tokenizer"
ENV = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
OUTPUTS = ("pretrain", "sft_512", "sft_1024", "r1_1024")


def start(*argv, before=None, **options) -> subprocess.Popen:
    """Start prepare_data.py; `before` is called in the new process."""
    command = [sys.executable, ROOT / "prepare_data.py", *map(str, argv)]
    return subprocess.Popen(command, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=before, **options)


def children(process: int) -> list[int]:
    """The processes that a process started."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True)
    return [int(number) for number in listed.stdout.split()]


def run(*argv, code: int = 0, **options) -> tuple[str, str]:
    """(stdout, stderr) of a run that must end with this exit code."""
    process = start(*argv, **options)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, (process.returncode, out[-2000:], err[-4000:])
    return out, err


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an output but the work folder and the lock; of the manifest, what is not of the run."""
    assert not (folder / PUBLISHING).exists()
    files = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and path.relative_to(folder).parts[0] not in (".prepare", "run.lock"):
            files[name] = path.read_bytes()
    manifest = json.loads(files["manifest.json"])
    assert manifest.pop("run")["command"].startswith("python prepare_data.py ")
    return files | {"manifest.json": json.dumps(manifest).encode()}


def records(folder: Path, name: str) -> list[dict]:
    """The records of an output, or of dropped/STEP or listed/NAME."""
    return [record for file in sorted(folder.glob(f"{name}*.jsonl.zst")) for record in read_jsonl(file)]


def text_of(record: dict) -> str:
    """The text of a record; of a chat, its messages joined by line feeds."""
    return record["text"] if "text" in record else "\n".join(m["content"] for m in record["conversations"])


class Result:
    """An output folder, with each record by the file and line it came from."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.report = (folder / "data_report.md").read_text(encoding="utf-8")
        self.kept, self.dropped, self.listed = {}, {}, {}
        for name in OUTPUTS:
            for record in records(folder, f"{name}-"):
                assert self.place(record) not in self.kept, "written twice"
                self.kept[self.place(record)] = name, record
        for file in (folder / "dropped").glob("*"):
            for record in read_jsonl(file):
                assert self.place(record) not in self.kept and self.place(record) not in self.dropped
                self.dropped[self.place(record)] = file.name.partition(".")[0], record
        for file in (folder / "listed").glob("*"):
            for record in read_jsonl(file):
                self.listed.setdefault(file.name.partition(".")[0], set()).add(self.place(record))

    @staticmethod
    def place(record: dict) -> tuple[str, int]:
        path, _, number = record["id"].rpartition(":")
        return Path(path).name, int(number)

    def step(self, name: str) -> dict:
        return next(step for step in self.manifest["steps"] if step["name"] == name)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return dirty_corpus.make(tmp_path_factory.mktemp("raw"), seed=1)


@pytest.fixture(scope="module")
def argv(corpus) -> list:
    blocklist = corpus.folder / "blocked.words"
    blocklist.write_text("\n".join(corpus.blocklist), encoding="utf-8")
    return ["--data_path", *corpus.train, "--val_path", *corpus.val, "--tokenizer_path", TOKENIZER, "--rename_field",
            *corpus.rename, "--blocklist", blocklist, "--max_bad_ratio", 0.2, "--task_mb", 1, "--categories", 0]


@pytest.fixture(scope="module")
def done(argv, tmp_path_factory) -> Result:
    """The whole recipe with two workers."""
    folder = tmp_path_factory.mktemp("two workers") / "data"
    run(*argv, "--out_dir", folder, "--workers", 2)
    return Result(folder)


@pytest.fixture(scope="module")
def small_argv(corpus, argv, tokenizer_dir) -> list:
    """A part of the corpus with something for every phase, which takes seconds. The golden tokenizer, by which the
    corpus counts, is one that transformers loads; this one is ours, and loads at once."""
    kept = ("03", "13", "20", "21", "24", "30", "36", "41")
    files = [path for path in corpus.train if path.name[:2] in kept]
    assert len(files) == len(kept)
    rest = [tokenizer_dir if word == TOKENIZER else word for word in argv[1 + len(corpus.train):]]
    return ["--data_path", *files, *rest]


@pytest.fixture(scope="module")
def small(small_argv, tmp_path_factory) -> dict[str, bytes]:
    """What an undisturbed run writes of it."""
    folder = tmp_path_factory.mktemp("small") / "data"
    run(*small_argv, "--out_dir", folder, "--workers", 2)
    return contents(folder)


# ---------------------------------------------------------------------------------------------
# what becomes of what was planted


def test_the_planted_corpus_is_what_it_says(corpus):
    """By brute force: overlaps, containments, copies, markers."""
    assert dirty_corpus.check(corpus) == []


def test_every_record_goes_where_it_must(corpus, done):
    flags, wrong = ("blocklist",), []
    for fate in corpus.fates:
        place = (fate.file, fate.line)
        step, dropped = done.dropped.get(place, (None, None))
        name, kept = done.kept.get(place, (None, None))
        assert (name is None) != (step is None), f"{place} is nowhere, or in two places: {fate.about}"
        if not fate.sure:
            continue
        stays = fate.stays_with(*flags)
        if stays != (step is None) or not stays and step != fate.step or fate.out and stays and name != fate.out:
            wrong.append((fate.about, place, f"wanted {fate.step or fate.out or 'to stay'}, got {step or name}"))
        elif not stays and fate.reason not in dropped["reason"]:
            wrong.append((fate.about, place, f"wanted {fate.reason}, got {dropped['reason']}"))
    assert not wrong, "\n".join(map(str, wrong[:20]))


def test_what_stays_is_cleaned_as_it_must_be(corpus, done):
    wrong = []
    for fate in corpus.fates:
        if (fate.file, fate.line) not in done.kept:
            continue
        record = done.kept[fate.file, fate.line][1]
        content, text = record.get("text", record.get("conversations")), text_of(record)
        if fate.expected is not None and content != fate.expected:
            wrong.append((fate.about, fate.expected, content))
        wrong += [(fate.about, "lacks", string) for string in fate.keeps if string not in text]
        wrong += [(fate.about, "still holds", string) for string in fate.loses if string in text]
    assert not wrong, "\n".join(map(str, wrong[:10]))


def test_near_duplicates_are_found_and_others_are_not(corpus, done):
    found = sum(done.dropped.get(pair.other, ("", {}))[0] in ("near", "exact") for pair in corpus.near)
    assert found >= 0.95 * len(corpus.near) > 10
    for pair in corpus.apart:
        steps = {done.dropped.get(place, ("",))[0] for place in (pair.kept, pair.other)}
        assert not steps & {"near", "exact"}, pair
    for place, (step, record) in done.dropped.items():
        if step == "near":  # what it names stays, and overlaps as it says
            path, _, number = record["duplicate_of"].rpartition(":")
            kept = done.kept[Path(path).name, int(number)][1]
            true = dirty_corpus.overlap(text_of(record), text_of(kept))
            assert true == pytest.approx(record["overlap"], abs=0.02), place
            assert record["overlap"] >= 0.6


def test_nothing_of_validation_is_left(corpus, done):
    assert len(corpus.leaks) > 5 and len(corpus.shared) > 0
    for leak in corpus.leaks:
        assert done.dropped.get(leak.record, ("",))[0] in ("leak", "exact"), leak
    for leak in corpus.shared:
        assert leak.record in done.kept, leak
    for name, record in done.kept.values():
        for val in corpus.val_texts.values():
            assert dirty_corpus.containment(text_of(record), val) < 0.5, (name, record["id"], val)


def test_bad_input_is_counted_and_named(corpus, done):
    by_name = {Path(item["path"]).name: item for item in done.manifest["inputs"]}
    for name, planted in corpus.malformed.items():
        item = by_name[name]
        reasons = Counter({reason: sum(n for found, n in item["reasons"].items() if reason.lower() in found.lower())
                           for reason in planted})
        assert reasons == planted and item["malformed"] >= planted.total(), (name, item)
        assert any(name in example for example in item["examples"])
    for name, why in corpus.unreadable.items():
        item = by_name[name]
        assert item["malformed"] and (why != "truncated" or "not read beyond" in item["unreadable"]), item
        assert name in done.report
    read = sum(item["records"] for item in done.manifest["inputs"] if item["role"] == "train")
    assert read == len(corpus.fates) == len(done.kept) + len(done.dropped)


def test_the_manifest_and_the_report_say_what_is_in_the_files(done):
    dropped = Counter(step for step, _ in done.dropped.values())
    assert {step["name"]: sum(step["dropped"].values()) for step in done.manifest["steps"] if any(
        step["dropped"].values())} == dropped
    for output in done.manifest["outputs"]:
        lines = records(done.folder, f"{output['name']}-")
        assert output["records"] == len(lines) == sum(file["records"] for file in output["files"])
        assert output["records"] == sum(output["lengths"]["counts"]) == sum(output["by_source"].values())
        assert output["characters"] == sum(len(text_of(line)) for line in lines)
        assert f"| {output['name']} | {len(lines):,} |" in done.report
    for file in done.manifest["dropped"] + done.manifest["listed"]:
        assert len([*read_jsonl(done.folder / file["file"])]) == file["records"]
    whole = {record["id"]: record for record in records(done.folder, "sft_512-")}
    sample = records(done.folder, "sft_mini_512-")
    assert 0 < len(sample) < len(whole) and all(whole[record["id"]] == record for record in sample)
    assert {record["source"] for record in sample} == {record["source"] for record in whole.values()}
    for chart in ("lengths", "sources", "steps"):
        assert (done.folder / "charts" / f"{chart}.png").read_bytes().startswith(b"\x89PNG")
    assert [step["name"] for step in done.manifest["steps"]] == [
        step.name for step in (*STEPS, *LAST_STEPS) if step.name not in ("simplify", "quality")]


def test_options(corpus, argv, tmp_path):
    out = tmp_path / "data"
    run(*argv, "--out_dir", out, "--workers", 2, "--simplify", "--assistant_name", "小水", "--drop_refusals", "--skip",
        "template_lines", "near")
    result = Result(out)
    for fate in corpus.fates:
        place = (fate.file, fate.line)
        if fate.simplified is not None and place in result.kept:
            assert result.kept[place][1]["text"] == fate.simplified
        if fate.flag == "drop_refusals" and fate.sure:
            assert result.dropped[place][0] == "refusals", fate
        if fate.renamed and place in result.kept:
            text = text_of(result.kept[place][1])
            assert not any(name in text for name in fate.renamed), (fate.about, text)
        for name in fate.listed:
            assert place in result.listed[name], fate
    assert not {"near", "template_lines"} & {step["name"] for step in result.manifest["steps"]}
    assert not {"near", "template_lines"} & {step for step, _ in result.dropped.values()}


def test_word_problems_that_differ_in_their_numbers_all_stay(tmp_path):
    """Also those with Chinese numerals or in another order; a copy that differs in one word goes."""
    story = ("今天清早，果园的主人请{}位邻居帮忙摘橘子，每人摘了{}筐，{}筐放在路边的棚子里，剩下的装上了去县城的卡车。"
             "请问一共装上卡车的橘子有多少筐？请把每一步的算式都写出来，再写答案。")
    numbers = [(a, b, c) for a in (3, 4, 5) for b in (6, 7, 8) for c in (1, 2)]
    numbers += [("七", "八", "九"), ("七", "九", "八"), ("八", "七", "九")]
    with open(tmp_path / "raw.jsonl", "w", encoding="utf-8") as file:
        for text in [*(story.format(*values) for values in numbers), story.format(*numbers[0]).replace("县城", "省城")]:
            chat = [{"role": "user", "content": text},
                    {"role": "assistant", "content": "先求一共摘了多少筐，再减去路边的。"}]
            file.write(json.dumps({"conversations": chat}, ensure_ascii=False) + "\n")
    run("--data_path", tmp_path / "raw.jsonl", "--out_dir", tmp_path / "data", "--tokenizer_path", TOKENIZER)
    result = Result(tmp_path / "data")
    assert len(result.kept) == len(numbers)
    assert [(place, step) for place, (step, _) in result.dropped.items()] == [(("raw.jsonl", len(numbers) + 1), "near")]


def test_documents_and_chats_in_one_file(tmp_path):
    """Each loses a copy; both copies are in the same file of dropped records."""
    text = "渡口的老船工每天清早就起来擦船，等第一班去镇上卖菜的人，天黑以前再把他们一个个接回来。"
    chat = [{"role": "user", "content": "渡口几点开船？"}, {"role": "assistant", "content": "清早六点开第一班。"}]
    with open(tmp_path / "raw.jsonl", "w", encoding="utf-8") as file:
        for record in ({"text": text}, {"conversations": chat}) * 2:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    run("--data_path", tmp_path / "raw.jsonl", "--out_dir", tmp_path / "data", "--tokenizer_path", TOKENIZER)
    result = Result(tmp_path / "data")
    assert {place: step for place, (step, _) in result.dropped.items()} == {
        ("raw.jsonl", 3): "exact", ("raw.jsonl", 4): "exact"}


def test_messages_of_validation_are_found_in_other_surroundings(tmp_path):
    """A validation question before another reply, inside a longer question and inside a document. A question of the
    same wording about something else stays, and so does one with other numbers."""
    question = "鲁迅的原名是什么？他是哪里人？"
    answer = "他本名周樟寿，后来改名周树人，是浙江绍兴人，家里祖上做过官，到他小时候已经败落了。"
    problem = "水池里原有{}吨水，进水管每小时注入{}吨，排水管每小时放走{}吨，几小时以后水池里有{}吨水？"
    val = [[question, answer],
           [problem.format(12, 8, 3, 47), "先求每小时净增多少，再看还差多少，除一下就得到时间。"]]
    train = {
        "before another reply": [question, "我不清楚。"],
        "inside a longer question": [f"请看看这道题：{problem.format(12, 8, 3, 47)}谢谢，写清楚每一步。", "好。"],
        "inside a document": f"老师问大家：{question}同学们七嘴八舌，有人说是北京人，有人说是上海人，谁也说不准。",
        "another subject": ["老舍的原名是什么？他是哪里人？", "舒庆春，北京人。"],
        "other numbers": [f"请看看这道题：{problem.format(30, 9, 4, 75)}谢谢，写清楚每一步。", "好的，我来算一算。"]}

    def write(name: str, records) -> Path:
        with open(tmp_path / name, "w", encoding="utf-8") as file:
            for record in records:
                made = {"text": record} if isinstance(record, str) else {"conversations": [
                    {"role": role, "content": text} for role, text in zip(("user", "assistant"), record, strict=True)]}
                file.write(json.dumps(made, ensure_ascii=False) + "\n")
        return tmp_path / name

    run("--data_path", write("train.jsonl", train.values()), "--val_path", write("val.jsonl", val), "--out_dir",
        tmp_path / "data", "--tokenizer_path", TOKENIZER)
    result = Result(tmp_path / "data")
    dropped = {[*train][number - 1]: step for (_, number), (step, _) in result.dropped.items()}
    assert dropped == dict.fromkeys([*train][:3], "leak")


# ---------------------------------------------------------------------------------------------
# the same bytes


def test_one_worker_gives_the_same_bytes(argv, done, tmp_path):
    run(*argv, "--out_dir", tmp_path / "data", "--workers", 1)
    assert contents(tmp_path / "data") == contents(done.folder)


def test_killed_again_and_again_it_gives_the_same_bytes(small_argv, small, tmp_path):
    """kill -9 at random moments; the workers, which are left without their main process, end by themselves."""
    rng, out, kills = random.Random(5), tmp_path / "data", 0
    while True:
        process = start(*small_argv, "--out_dir", out, "--workers", 2, *["--resume"] * (kills > 0))
        try:
            _, err = process.communicate(timeout=rng.uniform(1, 3) if kills < 4 else 300)
            assert process.returncode == 0, err
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    assert kills >= 3 and contents(out) == small


def test_a_killed_worker_and_a_signal_are_told_and_resumed(small_argv, small, tmp_path):
    out = tmp_path / "data"
    # SIGINT is ignored, as in a job that a script starts in the background
    process = start(*small_argv, "--out_dir", out, "--workers", 2,
                    before=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    workers = []
    while not workers and process.poll() is None:  # of the process that they are forked from
        time.sleep(0.05)
        for child in children(process.pid):
            workers += children(child)
    time.sleep(0.1)  # they have their first tasks
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "a worker was killed in the phase" in err and "--resume" in err, err
    assert len(err.strip().splitlines()) == 1, err

    process = start(*small_argv, "--out_dir", out, "--workers", 2, "--resume")
    while "MB; 2 workers" not in process.stdout.readline():  # the first line
        pass
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143 and "stopped; go on with: python prepare_data.py" in err, err
    assert not (out / "manifest.json").exists()
    run(*small_argv, "--out_dir", out, "--workers", 2, "--resume")
    assert contents(out) == small
    assert "finished before" in run(*small_argv, "--out_dir", out, "--resume")[0]


@pytest.mark.parametrize("limit", [2_000, 20_000])
def test_a_full_disk_is_told_and_nothing_half_written_is_taken_for_whole(small_argv, small, tmp_path, limit):
    out = tmp_path / "data"
    _, err = run(*small_argv, "--out_dir", out, "--workers", 2, code=2,
                 before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert "File too large" in err and len(err.strip().splitlines()) == 1, err
    assert not (out / "manifest.json").exists() and not list(out.glob("*.jsonl.zst"))
    run(*small_argv, "--out_dir", out, "--workers", 2, "--resume")
    assert contents(out) == small


# ---------------------------------------------------------------------------------------------
# refused, and left


def test_too_much_bad_input_is_refused(corpus, argv, tmp_path):
    _, err = run(*argv, "--max_bad_ratio", 0.001, "--out_dir", tmp_path / "data", code=2)
    assert "are malformed, more than --max_bad_ratio 0.001; most of them in" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("flags, message", [
    ([], "add --resume to go on with it"), (["--resume", "--skip", "too_long"], "no stage has rows for longer chats"),
    (["--resume", "--max_bad_ratio", 0.3], "--max_bad_ratio: this run was begun with 0.2"),
    (["--resume", "--near", 0.7], "--near: this run was begun with 0.6"),
    (["--resume", "--skip", "html"], "--skip: this run was begun with"),
    (["--resume", "--skip", "htm"], "no such step"),
    (["--resume", "--task_mb", 2], "--task_mb: this run was begun with 1")])
def test_another_run_in_the_same_folder_is_refused(argv, done, flags, message):
    before = contents(done.folder)
    _, err = run(*argv, "--out_dir", done.folder, *flags, code=2)
    assert message in err and len(err.splitlines()) == 1 and contents(done.folder) == before


def test_files_of_others_in_the_way_are_named(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pretrain.jsonl").write_text("mine")
    _, err = run("--data_path", ROOT / "README.md", "--out_dir", tmp_path / "data", code=2)
    assert "pretrain.jsonl is there" in err and (tmp_path / "data" / "pretrain.jsonl").read_text() == "mine"


def test_an_output_among_the_input_is_refused(tmp_path):
    _, err = run("--data_path", tmp_path, "--out_dir", tmp_path / "data", code=2)
    assert "whose files are read: choose another" in err


def test_after_too_much_bad_input_other_flags_may_read_it(tmp_path):
    raw = tmp_path / "raw.jsonl"
    text = "春天的河水涨了起来，渡船停在对岸等人，船夫坐在石阶上抽烟，看云慢慢飘过山顶。"
    raw.write_text(json.dumps({"words": text}, ensure_ascii=False), encoding="utf-8")
    assert "no known shape" in run("--data_path", raw, "--out_dir", tmp_path / "data", code=2)[1]
    run("--data_path", raw, "--out_dir", tmp_path / "data", "--rename_field", "words=text")
    assert len(Result(tmp_path / "data").kept) == 1


def test_changed_input_is_refused(tmp_path):
    raw = tmp_path / "raw.jsonl"
    raw.write_text('{"text": "' + "春天的河水涨了起来，渡船停在对岸等人。" * 3 + '"}\n', encoding="utf-8")
    run("--data_path", raw, "--out_dir", tmp_path / "data")
    raw.write_text('{"text": "短"}\n', encoding="utf-8")
    _, err = run("--data_path", raw, "--out_dir", tmp_path / "data", "--resume", code=2)
    assert f"{raw}: the files" in err


def test_without_a_tokenizer_the_text_is_written_and_the_chats_wait(small_argv, small, tokenizer_dir, tmp_path):
    out, tokenizer = tmp_path / "data", tmp_path / "tokenizer"
    changed = [tokenizer if word == tokenizer_dir else word for word in small_argv]
    _, err = run(*changed, "--out_dir", out, "--workers", 2, code=2)
    assert "train_tokenizer.py" in err and "--resume" in err and len(err.splitlines()) == 1
    assert {file.name for file in out.glob("*.jsonl.zst")} == {"pretrain-00000.jsonl.zst"}
    report = (out / "data_report.md").read_text(encoding="utf-8")
    assert "chats wait for a tokenizer" in report
    shutil.copytree(tokenizer_dir, tokenizer)
    run(*changed, "--out_dir", out, "--workers", 2, "--resume")
    assert contents(out) == small
    (tokenizer / "tokenizer.json").write_text("{}")
    assert "not a tokenizer" in run(*changed, "--out_dir", out, "--resume", code=2)[1]


@pytest.mark.parametrize("n_renamed", [0, 3, -1])
def test_stopped_while_files_get_their_names(small_argv, small, tmp_path, monkeypatch, n_renamed):
    """The stages refuse what is there, and the run goes on."""
    out, replace, done = tmp_path / "data", os.replace, []

    def stop_after(source, target):
        if ".prepare/staged" in str(source) and ".prepare" not in str(target):
            files = sum(path.is_file() for path in (out / ".prepare" / "staged").rglob("*"))
            if len(done) == n_renamed or n_renamed < 0 and files == 1:
                raise KeyboardInterrupt
            done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop_after)
    with pytest.raises(exits.TrainingStopped):
        prepare_data.main([*map(str, small_argv), "--out_dir", str(out), "--workers", "1"])
    monkeypatch.undo()
    assert (out / PUBLISHING).exists() and not (out / "manifest.json").exists()
    with pytest.raises(UserError, match="repeat its command with --resume"):
        find_files(str(out))
    run(*small_argv, "--out_dir", out, "--resume")
    assert contents(out) == small


def test_a_dry_run_writes_nothing(small_argv, tmp_path):
    out, _ = run(*small_argv, "--dry_run", cwd=tmp_path)
    assert [*tmp_path.iterdir()] == []
    for step in ("encoding", "personal", "repetition", "exact", "leak", "near"):
        assert f"\n{step} " in out
    assert "sft_512: " in out


def test_a_folder_that_is_half_published_is_refused(done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(done.folder, tmp_path / "data", ignore=shutil.ignore_patterns(".prepare"))
    assert [path.name for path in find_files("pretrain")] == ["pretrain-00000.jsonl.zst"]
    (tmp_path / "data" / PUBLISHING).touch()
    for path in ("pretrain", "data", "data/sft_512-*"):
        with pytest.raises(UserError, match="repeat its command with --resume"):
            find_files(path)


# ---------------------------------------------------------------------------------------------
# beside the project


def test_the_stages_find_the_output(done, tmp_path):
    shutil.copytree(done.folder, tmp_path / "data", ignore=shutil.ignore_patterns(".prepare"))
    shutil.copytree(TOKENIZER, tmp_path / "weakwater_tokenizer")
    for stage in ("pretrain", "SFT", "SFT_long", "distill"):
        command = [sys.executable, ROOT / f"{stage}.py", "--max_steps", "2", "--batch_size", "2", "--device", "cpu",
                   *(["--preset", "nano"] if stage == "pretrain" else [])]
        ended = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert "malformed" not in ended.stdout or "0 malformed" in ended.stdout


def test_evaluate_py_is_not_taken_for_the_package_of_that_name(tmp_path):
    """Some libraries import a package called evaluate where there is one; ours at the top level is a script."""
    raw = tmp_path / "raw.jsonl"
    raw.write_text('{"text": "' + "春天的河水涨了起来，渡船停在对岸等人。" * 3 + '"}\n', encoding="utf-8")
    code = ("import sys, prepare_data; "
            f"assert prepare_data.main(['--data_path', {str(raw)!r}, '--out_dir', {str(tmp_path / 'data')!r}, "
            "'--workers', '1']) == 0; import datasets, datatrove.pipeline.readers, datatrove.pipeline.writers; "
            "assert 'datatrove' in sys.modules and 'evaluate' not in sys.modules")
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
