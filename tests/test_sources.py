"""Where data comes from: names in data/, PATH=SHARE, the order of several sources, and that resuming them is exact."""

import gzip
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make_chats, make_texts, read_rows, train, write_jsonl
from faults import course, end_of

from Config import UserError
from dataset import StepLoader, epoch_order, load_splits
from text.records import is_held_out, text_hash
from text.sources import find_files, find_mixture, find_sources

# ---------------------------------------------------------------------------------------------
# which files an argument names


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder with data/ in it."""
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("names", [["a.jsonl"], ["a.jsonl.gz"], ["a.jsonl.xz"], ["a.jsonl.zst"],
                                   ["a-1.jsonl", "a-2.jsonl"], ["a-1.jsonl.gz", "a-2.jsonl.zst"], ["a/x.jsonl"]])
def test_a_name_stands_for_files_in_data(here, names):
    for name in [*names, "another.jsonl", "ab.jsonl"]:
        (here / "data" / name).parent.mkdir(exist_ok=True)
        (here / "data" / name).touch()
    assert [str(file) for file in find_files("a")] == [f"data/{name}" for name in names]


def test_data_comes_before_the_working_folder(here):
    """A folder of the same name in the working folder does not change what a default name stands for."""
    (here / "a").mkdir()
    (here / "data" / "a.jsonl").touch()
    assert find_files("a") == [Path("data/a.jsonl")]
    (here / "data" / "a.jsonl").unlink()
    (here / "a" / "x.jsonl").touch()
    assert find_files("a") == [Path("a/x.jsonl")]


@pytest.mark.parametrize("first, second", [("data/a.jsonl", "data/a.jsonl.gz"), ("data/a.jsonl", "data/a-1.jsonl"),
                                           ("data/a-1.jsonl", "data/a-1.jsonl.xz")])
def test_two_forms_of_a_name_are_refused(here, first, second):
    (here / first).touch()
    (here / second).touch()
    with pytest.raises(UserError, match="--data_path a: .*remove one"):
        find_files("a")


def test_a_name_without_files_says_how_to_get_them(here):
    for place in ("", "data"):
        with pytest.raises(UserError, match="make_demo_data.py --out_dir data.*Harris/pretrain") as refused:
            find_files("pretrain")
        assert "data/pretrain.jsonl" in str(refused.value) and "\n" not in str(refused.value), place
        (here / "data").rmdir() if place == "" else None


def test_shares(here):
    for name in ("a.jsonl", "b.jsonl", "c=1.jsonl", "d=3"):
        (here / name).touch()

    def found(*arguments):
        return [(s.name, s.share, [file.name for file in s.files]) for s in find_sources(list(arguments))]

    assert found("a.jsonl", "b.jsonl", "a.jsonl") == [("a.jsonl b.jsonl a.jsonl", None, ["a.jsonl", "b.jsonl"])]
    assert found("a.jsonl=3", "b.jsonl=1.0") == [("a.jsonl", 0.75, ["a.jsonl"]), ("b.jsonl", 0.25, ["b.jsonl"])]
    assert found("a.jsonl=3e-1", "b.jsonl=1e-1")[0][1] == pytest.approx(0.75)
    assert found("c=1.jsonl=.5", "d=3=1.5") == [("c=1.jsonl", 0.25, ["c=1.jsonl"]), ("d=3", 0.75, ["d=3"])]
    assert found("d=3") == [("d=3", None, ["d=3"])], "a file that bears the whole name has no share"
    for arguments, reason in ((["a.jsonl=1", "b.jsonl"], "b.jsonl: all sources or none"),
                              (["a.jsonl=0.5", "b.jsonl=0"], "b.jsonl=0: all .*, a positive number, as in b.jsonl=0.5"),
                              (["a.jsonl=-1"], "a share is a positive number"), (["x=1"], "--data_path x: there is no"),
                              (["a.jsonl=1", "a.jsonl=1"], "a.jsonl: named twice")):
        with pytest.raises(UserError, match=reason):
            find_sources(arguments)


def test_a_mixture_takes_what_is_there(here):
    """By default the first name must be there and the others may be, in any form that a name stands for; a file of the
    name in the working folder is none of them. What is named must all be there."""
    words = ["a=0.6", "b=0.3", "c=0.1"]
    for name in ("a.jsonl", "b-1.jsonl", "b-2.jsonl.gz"):
        (here / "data" / name).touch()
    (here / "c").mkdir()
    sources, (line,) = find_mixture(words, True)
    assert [(source.name, len(source.files)) for source in sources] == [("a", 1), ("b", 2)]
    assert [source.share for source in sources] == pytest.approx([2 / 3, 1 / 3])
    assert line == "default data: a=0.6 b=0.3; not in data/: c=0.1, without which earlier skills fade"
    with pytest.raises(UserError, match="--data_path d: there is no"):
        find_mixture(["a=0.6", "d=0.4"], False)
    assert find_mixture(words[:2], False) == (find_sources(words[:2]), [])
    (here / "data" / "c").mkdir()
    (here / "c").rmdir()
    (here / "data" / "c" / "x.jsonl").touch()
    assert find_mixture(words, True) == (find_sources(words), ["default data: a=0.6 b=0.3 c=0.1"])
    assert find_mixture(["a=0.6", "d=0.4"], True)[0] == find_sources(["a"]), "alone it has no share"
    (here / "data" / "b.jsonl").touch()
    with pytest.raises(UserError, match="--data_path b: .*remove one"):
        find_mixture(words, True)


# ---------------------------------------------------------------------------------------------
# the order of several sources


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A large and a small file of texts, and one of conversations."""
    folder = tmp_path_factory.mktemp("sources")
    long = [{"text": "水" * 700}]
    return {"large": write_jsonl(folder / "large.jsonl", make_texts(1, 60, longest=200)),
            "small": write_jsonl(folder / "small.jsonl", [*make_texts(2, 9, longest=120), *long]),
            "chat": write_jsonl(folder / "chat.jsonl", make_chats(3, 30, longest=150, reply=60))}


def split(files, tokenizer, folder, kind="text", max_seq_len=64, say=lambda line: None, **shares):
    arguments = [f"{files[name]}={share}" for name, share in shares.items()]
    return load_splits(find_sources(arguments), None, tokenizer, kind, str(folder / "cache"), max_seq_len, say=say)


@pytest.mark.parametrize("order", ["shuffled", "file"])
@pytest.mark.parametrize("shares", [dict(large=0.7, small=0.3), dict(large=1, small=1, chat=2),
                                    dict(small=1, large=99)])
def test_the_next_document_is_of_the_source_furthest_behind(files, tokenizer, tmp_path, shares, order):
    """At any moment each source has its share but for less than a document of each; one that is used up begins again,
    each document once before any a second time; the epoch ends with the source that lasts longest."""
    documents, _ = split(files, tokenizer, tmp_path, "chat" if "chat" in shares else "text", **shares)
    sequence, passes = epoch_order(documents, seed=5, epoch=1, order=order)
    source, length = documents.source[sequence], documents.length[sequence].astype(float)
    longest = documents.length.max()
    total = np.cumsum(length)
    for number, share in enumerate(documents.shares):
        own = np.cumsum(length * (source == number))
        assert np.all(own <= share * total + longest) and np.all(own >= share * (total - longest * len(shares)) - 1)
        mine = sequence[source == number]
        n = int((documents.source == number).sum())
        for i in range(0, len(mine), n):
            assert len(set(mine[i:i + n].tolist())) == len(mine[i:i + n]), "a document twice in one pass"
            assert np.all(passes[source == number][i:i + n] == i // n)
        if order == "shuffled" and len(mine) >= 2 * n > 2:
            assert mine[:n].tolist() != mine[n:2 * n].tolist(), "another order"
        assert len(mine) >= n, "every document is seen"
    whole = [share for number, share in enumerate(documents.shares)
             if (source == number).sum() == (documents.source == number).sum()]
    assert whole, "one source is seen just once"
    again = epoch_order(documents, seed=5, epoch=1, order=order)[0]
    other = epoch_order(documents, seed=5, epoch=2, order=order)[0]
    assert again.tolist() == sequence.tolist() and (other.tolist() == sequence.tolist()) == (order == "file")


@pytest.mark.parametrize("first, second, share", [("small", "large", 0.5), ("large", "small", 9)])
def test_an_epoch_of_a_default_mixture_is_one_pass_over_its_first_source(
        files, tokenizer, tmp_path, first, second, share):
    """However large the others are: one that is used up begins again; of a larger one a part is seen, each epoch
    another."""
    documents, _ = split(files, tokenizer, tmp_path, **{first: 1, second: share})
    without = documents.fingerprint()
    documents.own_first = True
    assert documents.fingerprint() != without and documents.take(np.arange(3)).own_first
    epochs = [epoch_order(documents, 5, epoch, "shuffled") for epoch in (0, 1)]
    for sequence, _ in epochs:
        own = sequence[documents.source[sequence] == 0].tolist()
        assert sorted(own) == list(range(int((documents.source == 0).sum())))
    seen = [set(sequence[documents.source[sequence] == 1].tolist()) for sequence, _ in epochs]
    n = int((documents.source == 1).sum())
    assert (len(seen[0]) < n and seen[0] != seen[1]) if first == "small" else len(seen[0]) == n


def test_rows_of_text_are_full_and_steps_can_be_asked_for_in_any_order(files, tokenizer, tmp_path):
    documents, _ = split(files, tokenizer, tmp_path, large=0.5, small=0.5)
    loader = StepLoader(documents, 64, 2, 2, seed=1)
    ends = loader.epoch_ends(2)
    for epoch, n in enumerate([ends[0], ends[1] - ends[0]]):
        steps = [loader.step(epoch, number) for number in range(n)]
        assert all(step.tokens == loader.step_tokens for step in steps[:-1])
        order = epoch_order(documents, 1, epoch, "shuffled")[0]
        assert [s[0] for step in steps for s in step.segments if s[1] == 0] == order.tolist()
    fresh = StepLoader(documents, 64, 2, 2, seed=1)
    assert fresh.step(1, 3).segments == loader.step(1, 3).segments
    visits = loader.visits(ends, ends[-1])
    assert visits.tolist() == [sum((documents.source[epoch_order(documents, 1, epoch, "shuffled")[0]] == s).sum()
                                   for epoch in (0, 1)) for s in (0, 1)]


def test_text_among_chats(files, tokenizer, tmp_path):
    """Long text is cut into segments of a row and all of it has a loss; no document comes a second time before all
    others of its source, although some are kept back."""
    said = []
    documents, val = split(files, tokenizer, tmp_path, "chat", 128, said.append, chat=0.5, small=0.5)
    loader = StepLoader(documents, 128, 3, 1, seed=2)
    n = loader.steps_in_epoch(0)
    seen, begun = {}, [set() for _ in range(n)]
    for number in range(n):
        step = loader.step(0, number)
        assert max(length for _, _, length in step.segments) <= 128 and step.tokens <= loader.step_tokens
        for document, offset, length in step.segments:
            seen.setdefault(document, []).append((number, offset, length))
            begun[number] |= {document} if offset == 0 else set()
        weight = sum(float(m.weights.sum()) for m in step.micro_batches)
        assert weight == pytest.approx(step.total_weight)
    text = documents.source == 1
    assert documents.length[text].max() > 500
    for document in np.flatnonzero(text):
        length, row = int(documents.length[document]), documents.index[document]
        times = sum(length_ for _, _, length_ in seen[document]) / length
        assert times == int(times) >= 1, f"document {row}: whole each time"
    counts = np.zeros(len(documents), int)
    for step in begun:
        for source in (0, 1):
            mine = [d for d in step if documents.source[d] == source]
            counts[mine] += 1
            own = counts[documents.source == source]
            assert own.max() - own.min() <= 1, "one came a second time before another came once"
    for counted in ("small.jsonl: 10 lines", "chat.jsonl: 30 lines"):
        assert any(counted in line for line in said)
    assert len(val.names) == 2 and all((val.source == s).any() for s in (0, 1))


def test_no_text_is_on_both_sides(tokenizer, tmp_path):
    """Also where one source holds out a text that another has too; no text validates twice."""
    records = sorted((r for r in make_texts(8, 40, longest=40) if not is_held_out(text_hash(r))), key=text_hash)
    data = {"a": write_jsonl(tmp_path / "a.jsonl", records[5:]), "b": write_jsonl(tmp_path / "b.jsonl", records[:20])}
    documents, val = split(data, tokenizer, tmp_path, a=1, b=2)
    assert sorted(val.hash.tolist()) == [text_hash(records[0]), text_hash(records[5])]  # the lowest of each
    assert not set(documents.hash.tolist()) & set(val.hash.tolist())
    assert documents.counts[1]["also in the validation data"] == 1
    same = {"a": data["a"], "c": write_jsonl(tmp_path / "c.jsonl", records[5:])}
    _, val = split(same, tokenizer, tmp_path, a=1, c=1)
    assert val.hash.tolist() == [text_hash(records[5])]


def test_no_chat_overtakes_an_earlier_pass_over_its_source():
    """A long document of a small source waits for room; its next pass does not begin before it has come."""
    lengths = [90] * 20 + [60, 5, 5]  # a large source; a small one, seen many times
    loader = StepLoader.__new__(StepLoader)
    loader.step_tokens = 100
    loader.documents = SimpleNamespace(source=np.array([0] * 20 + [1] * 3))
    loader._order = np.array([0, 20, 21, 22, 21, 22, 20, 1, 21, 20, 22, 2])
    passes = np.array([0, 0, 0, 0, 1, 1, 1, 0, 2, 2, 2, 0])
    loader._of, loader._length = np.arange(12), np.array(lengths)[loader._order]
    plan = loader._plan_epoch(passes)
    assert sorted(segment for step in plan for segment in step) == list(range(12))
    at = {segment: number for number, step in enumerate(plan) for segment in step}
    for earlier in range(12):
        for later in range(12):
            if loader.documents.source[loader._order[earlier]] == 1 == loader.documents.source[loader._order[later]]:
                assert passes[earlier] >= passes[later] or at[earlier] <= at[later]


def test_a_source_of_a_few_documents_may_have_any_share(tokenizer, tmp_path):
    """Two lines beside thousands at equal shares: thousands of passes, ordered in a moment. Sources whose shares are
    their sizes are each seen once, in spite of rounding."""
    data = {"few": write_jsonl(tmp_path / "few.jsonl", [{"text": "a"}, {"text": "b"}, {"text": "c"}]),
            "many": write_jsonl(tmp_path / "many.jsonl", [{"text": f"{i}"} for i in range(20_000)])}
    documents, _ = split(data, tokenizer, tmp_path, few=1, many=1)
    begin = time.monotonic()
    order, passes = epoch_order(documents, 1, 0, "shuffled")
    assert passes.max() > 5000 and time.monotonic() - begin < 2
    equal = replace(documents, shares=[int(documents.length[documents.source == s].sum()) / documents.length.sum()
                                       for s in (0, 1)])
    order, passes = epoch_order(equal, 1, 0, "shuffled")
    assert sorted(order.tolist()) == list(range(len(equal))) and not passes.any()


def test_chats_with_other_keys_are_chats(files, tokenizer, tmp_path):
    """Other keys are ignored: a mix does not take conversations with "question" and "answer" for something else."""
    records = [record | {"question": "1", "answer": "2"} for record in make_chats(5, 12)]
    data = {"odd": write_jsonl(tmp_path / "odd.jsonl", records), "large": files["large"]}
    documents, _ = split(data, tokenizer, tmp_path, "chat", 512, odd=1, large=1)
    assert documents.caches[0].is_chat and (documents.targets < documents.length - 5)[documents.source == 0].all()


def test_validation_files(files, tokenizer, tmp_path):
    """Several paths are one source; among mixed sources chats and texts have a figure each; shares are an error."""
    mix = find_sources([f"{files['chat']}=1", f"{files['small']}=1"])
    options = tokenizer, "chat", str(tmp_path / "cache"), 128
    other = write_jsonl(tmp_path / "other.jsonl", make_chats(9, 6, longest=100, reply=40))
    _, val = load_splits(mix, [str(other), str(files["large"])], *options, say=lambda line: None)
    assert len(val.names) == 2 and val.names[0].endswith("(chat)") and val.names[1].endswith("(text)")
    with pytest.raises(UserError, match="--val_path .*has no shares"):
        load_splits(mix, [f"{files['chat']}=0.5"], *options, say=lambda line: None)


def test_sources_that_do_not_fit_a_stage(files, tokenizer, tmp_path):
    with pytest.raises(UserError, match="none of the sources has conversations"):
        split(files, tokenizer, tmp_path, "chat", large=1, small=1)
    with pytest.raises(UserError, match="chat.jsonl: .* malformed"):
        split(files, tokenizer, tmp_path, "text", large=1, chat=1)


# ---------------------------------------------------------------------------------------------
# runs


def test_a_run_says_what_it_takes_of_each(files, tokenizer_dir, tmp_path, capsys):
    flags = dict(preset="nano", max_seq_len=64, batch_size=4, eval_interval=0, epochs=2)
    shares = [f"{files['large']}=0.5", f"{files['small']}=0.5"]
    rows = train("pretrain", shares, tokenizer_dir, tmp_path, **flags)
    said = capsys.readouterr().out
    assert said.count("source ") == 2 and ", 0 unseen" in said and "share 50.0% of all tokens" in said
    names = [str(files[name]) for name in ("large", "small")]
    assert list(rows[-1]["val_loss_by_source"]) == names and f"val_loss[{names[0]}]:" in said
    low, high = sorted(rows[-1]["val_loss_by_source"].values())
    assert low <= rows[-1]["val_loss"] <= high
    assert read_rows(tmp_path, "pretrain") == rows


@pytest.mark.parametrize("stage", ["pretrain", "SFT"])
def test_killed_and_resumed_it_ends_the_same_and_other_shares_are_refused(tmp_path_factory, tokenizer_dir, files, stage,
                                                                          tmp_path):
    runs = course(tmp_path_factory, tokenizer_dir)
    runs.reference("pretrain")
    names = ("large", "small") if stage == "pretrain" else ("chat", "small")

    def run(out, *shares, resume=True, fault=None):
        paths = [f"{files[name]}={share}" for name, share in zip(names, shares, strict=True)]
        return runs.run(stage, out, resume, fault, flags=dict(data_path=paths, cache_dir=tmp_path / "cache", epochs=2,
                                                              max_seq_len=96, batch_size=2))

    assert run(tmp_path / "whole", 0.6, 0.4, resume=False).code == 0
    expected = end_of(stage, tmp_path / "whole")
    assert {row["epoch"] for row in expected["metrics"]} == {1, 2}
    for moment, nth in (("before rename checkpoint", 3),):
        out = tmp_path / moment
        assert run(out, 0.6, 0.4, fault={"at": moment, "nth": nth}).code == -signal.SIGKILL
        refused = run(out, 0.5, 0.5)
        assert refused.code == 2 and "the shares of the sources changed" in refused.one_line
        assert run(out, 0.6, 0.4).code == 0
        assert end_of(stage, out) == expected


def test_compressed_names_train(here, tokenizer_dir, capsys):
    """Without --data_path a stage reads its name in data/, here compressed shards."""
    import pretrain

    for number in (1, 2):
        lines = write_jsonl(here / "x.jsonl", make_texts(number, 12, longest=60)).read_bytes()
        (here / "data" / f"pretrain-{number}.jsonl.gz").write_bytes(gzip.compress(lines))
    pretrain.main(["--preset", "nano", "--tokenizer_path", str(tokenizer_dir), "--max_steps", "1", "--device", "cpu"])
    assert "24 lines" in capsys.readouterr().out and (here / "out" / "pretrain.pth").is_file()
