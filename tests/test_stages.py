"""The stage scripts: one loop in each, who imports whom, flags, schedules, optimizers, and what stops a run."""

import ast
import contextlib
import functools
import importlib
import json
import math
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_chats, make_r1, make_texts, read_rows, stage_argv, train, write_jsonl

from common import checkpoint, exits
from common.optim import Muon, learning_rate, make_optimizers, set_learning_rate
from common.run_state import STATE_KEYS, RunState
from common.runtime import Distributed
from common.weights import load_weights, save_weights
from Config import FLAGS, LLMConfig, UserError, parse_args
from model import WeakWater
from text.tokenizer import TextEncoder, load_tokenizer

STAGES = ("pretrain", "SFT", "SFT_long", "distill")
LOOPS = ("pretrain", "SFT", "distill")  # SFT_long is SFT with other defaults


def parse(path) -> ast.Module:
    """A file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------
# the scripts as text


def core_of_the_loop(stage: str) -> list[str]:
    """`for count, micro_batch in …` and the statements after it, to the end of the step, dumped."""
    for node in ast.walk(parse(ROOT / f"{stage}.py")):
        for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
            sources = [ast.unparse(statement) for statement in body] if isinstance(body, list) else []
            begin = [i for i, source in enumerate(sources) if source.startswith("for count, micro_batch in")]
            if begin:
                assert "scaler.update()" in sources
                return [ast.dump(statement) for statement in body[begin[0]:]]
    raise AssertionError(f"{stage}.py has no such loop")


def test_the_loop_is_the_same_in_every_stage():
    """Forward, scaled backward, clip, check, step, validation, log and save are the same lines."""
    first = core_of_the_loop("pretrain")
    for word in ("backward", "unscale_", "clip_grad_norm_", "total_weight", "may_step", "autocast"):
        assert any(f"'{word}'" in statement for statement in first), word
    for stage in LOOPS[1:]:
        assert core_of_the_loop(stage) == first, stage


@pytest.mark.parametrize("stage", LOOPS)
def test_what_a_stage_does_is_in_sight(stage):
    """Each of these calls stands in the script itself, in this order: no function of ours owns the loop."""
    source = (ROOT / f"{stage}.py").read_text(encoding="utf-8")
    place = source.index("def main(")
    for call in ("parse_args(", "RunState(", "choose_tokenizer(", "load_splits(", "StepLoader(", "build_model(",
                 "accelerate(", "make_optimizers(", "GradScaler(", "run.restore(", "for step in range(",
                 "learning_rate(", "runtime.autocast(", "model(**", ".backward()", "scaler.unscale_(",
                 "clip_grad_norm_(", "loader.step(", "optimizer.step()", "scaler.update()", "optimizer.zero_grad(",
                 "score_documents(", "save_if_best(", "log.step(", "run.save()"):
        place = source.index(call, place)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_can_be_read(stage):
    """A stage script has about 130 lines and begins with commands to copy."""
    source = (ROOT / f"{stage}.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 135
    commands = ast.get_docstring(ast.parse(source))
    assert commands.count(f"python {stage}.py") == 2 and "--resume" in commands


SCRIPTS = {"pretrain", "SFT", "SFT_long", "distill", "train_tokenizer", "eval_model", "evaluate", "export",
           "make_demo_data", "serve"}
FOR_ALL = {"common.files", "common.exits"}  # import nothing but Config, and no torch
ALL = {"Config", "model", "dataset", "text", "common", "fastpath", "formats"}
MAY_IMPORT = {"Config": set(), "model": {"Config"}, "text": {"Config"}, "dataset": {"Config", "text"},
              "fastpath": {"Config", "model"}, "formats": {"Config", "model", "text", "common"},
              "common": ALL - {"formats"}, "serving": ALL - {"formats"}} | {script: ALL for script in SCRIPTS} | {
    "SFT_long": ALL | {"SFT"}, "serve": ALL | {"serving"}} | {file: {"Config"} for file in FOR_ALL}


def imports_of(path) -> list[str]:
    """The names of the modules that a file imports."""
    names = []
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def test_who_imports_whom():
    """Scripts → all below them; common → fastpath, dataset, text, model; dataset → text; all → Config, and common's
    files and exits. No script imports another, but SFT_long SFT."""
    parts = {path.stem for path in ROOT.glob("*.py")} | {
        "common", "fastpath", "formats", "serving", "text", "tests", "experiments", "benchmarks"}
    seen = set()
    for path in [*ROOT.glob("*.py"), *(file for folder in ("common", "fastpath", "formats", "serving", "text")
                                       for file in (ROOT / folder).glob("*.py"))]:
        part = path.stem if path.parent == ROOT else path.parent.name
        if part not in MAY_IMPORT:
            continue
        seen.add(part)
        own = f"{part}.{path.stem}"
        allowed = MAY_IMPORT.get(own, MAY_IMPORT[part] | {part})
        for name in imports_of(path):
            target = name.split(".")[0]
            for_all = part in MAY_IMPORT and own not in FOR_ALL and any(name.startswith(each) for each in FOR_ALL)
            assert target not in parts or target in allowed or for_all, f"{path.name} imports {name}"
            assert own not in FOR_ALL or target != "torch", f"{path.name} imports torch"
    assert seen >= {"Config", "model", "dataset", "text", "common", "fastpath", "formats", "train_tokenizer", *STAGES}


@pytest.mark.parametrize("module", ["common.files", "common.exits", "dataset", "train_tokenizer", "make_demo_data",
                                    "serve"])
def test_these_do_not_load_torch(module):
    """It takes seconds and 190 MB."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_nothing_is_assigned_into_another_module():
    """`module.name = …`, `setattr(module, …)` and the same for a class of model.py: what computes would then depend on
    who was imported before. Instances of a model may be changed."""
    for folder in (ROOT, *(ROOT / name for name in ("common", "text", "fastpath", "experiments", "benchmarks"))):
        for path in folder.glob("*.py"):
            tree, foreign = parse(path), set()
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    foreign |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):  # a module of the project, or a class of the network
                    foreign |= {alias.asname or alias.name for alias in node.names if node.module in (
                        "common", "text", "fastpath", "benchmarks", "experiments") or node.module == "model"}
            foreign -= {"torch", "sys", "os"}  # settings of libraries and of the process
            for node in ast.walk(tree):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(
                    node, (ast.AugAssign, ast.AnnAssign)) else []
                targets = [t.value for t in targets if isinstance(t, ast.Attribute)]
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
                    targets = node.args[:1]
                for target in targets:
                    name = ast.unparse(target).split(".")[0]
                    assert name not in foreign, f"{path.name}:{node.lineno} assigns into {name}"


def test_the_network_is_read_in_one_sitting():
    """model.py: at most 300 lines, no hand-written gradient, nothing of how it is made faster."""
    source = (ROOT / "model.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 300
    for word in ("autograd.Function", "is_compiling", "kernels", "varlen", "ctypes"):
        assert word not in source, word


# ---------------------------------------------------------------------------------------------
# flags

CONTRACT = """--data_path --val_path --tokenizer_path --out_dir --init_from --preset --max_seq_len --min_tokens
--max_tokens --epochs --max_steps --batch_size --accumulation_steps --learning_rate --lr_schedule --warmup_ratio
--decay_ratio --min_lr_ratio --optimizer --weight_decay --grad_clip --dropout --dtype --device --compile
--gradient_checkpointing --deterministic --seed --order --log_interval --eval_interval --eval_tokens --save_interval
--keep_checkpoints --max_bad_ratio --resume --use_wandb --wandb_project --tag_weight --think_weight --without_thoughts
--plain""".split()
CHOICES = {"--lr_schedule": "{constant,cosine,trapezoid}", "--optimizer": "{adamw,muon}", "--order": "{shuffled,file}",
           "--output_init": "{zero,normal}", "--dtype": "{auto,bf16,fp16,fp32}", "--device": "{auto,cpu,cuda,mps}"}
DEFAULTS = {"pretrain": dict(max_seq_len=512, batch_size=32, learning_rate=4e-3),
            "SFT": dict(max_seq_len=512, batch_size=32, learning_rate=1e-3, max_tokens=512, min_tokens=0),
            "SFT_long": dict(max_seq_len=1024, batch_size=16, learning_rate=1e-3, min_tokens=513, max_tokens=1024),
            "distill": dict(max_seq_len=1024, batch_size=16, learning_rate=2e-3, tag_weight=1.0, think_weight=1.0)}


MIXTURES = {"SFT": "sft_512=0.9 pretrain=0.1", "SFT_long": "sft_1024=0.9 pretrain=0.1",
            "distill": "r1_1024=0.7 sft_512=0.2 pretrain=0.1"}


def exit_of(stage: str, argv: list, capsys) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a stage's script with these arguments, run in this process."""
    main = importlib.import_module(stage).main
    capsys.readouterr()
    try:
        code = exits.run(lambda: main([str(word) for word in argv]))
    except SystemExit as stop:
        code = stop.code or 0
    return code, *capsys.readouterr()


@pytest.mark.parametrize("stage", STAGES)
def test_help(stage, capsys):
    """--help names every flag of the contract that applies, with its choices and this stage's defaults."""
    code, text, errors = exit_of(stage, ["--help"], capsys)
    assert code == 0 and not errors and "advanced flags:" in text
    assert re.findall(r"^  --(\w+)", text, re.MULTILINE)[:10] == (
        "data_path val_path out_dir init_from preset epochs batch_size learning_rate device resume".split())
    assert text.count("common flags:") == 1 and text.index("common flags:") < text.index("--data_path PATH")
    flags = set(re.findall(r"^  (--\w+)", text, re.MULTILINE))
    of_distill = {"--tag_weight", "--think_weight", "--without_thoughts"}
    not_here = {"pretrain": {"--min_tokens", "--max_tokens"} | of_distill, "distill": set()}.get(stage, of_distill)
    assert flags >= set(CONTRACT) - not_here and not flags & not_here
    flat = re.sub(r"\s+", " ", text)
    for flag, choices in CHOICES.items():
        assert f"{flag} {choices}" in flat
    defaults = dict(out_dir="out", lr_schedule="trapezoid", optimizer="muon",
                    accumulation_steps=1, output_init="zero")
    defaults |= DEFAULTS[stage]
    for name, value in defaults.items():
        described = flat[flat.rindex(f"--{name} "):]
        assert re.match(rf"--{name} [^(]*(\([^d][^)]*\)[^(]*)*\(default: {re.escape(str(value))}\)", described), name
    mixture = MIXTURES.get(stage)
    shown = f"{mixture}: the first, and those of the others that are in data/" if mixture else "pretrain"
    assert f"(default: {shown})" in flat
    for name, flag in FLAGS.items():  # a % in a help text must not be a format
        if f"--{name}" in flags:
            assert re.sub(r"\s+", "", flag.help.replace("%%", "%")) in re.sub(r"\s+", "", text)


def test_the_original_optimizer_decays_all_weights():
    """One AdamW with betas 0.9 and 0.999 and the same decay on every weight."""
    model = WeakWater(LLMConfig.preset("nano"))
    (adamw,) = make_optimizers(model, "adamw", 5e-4, 0.01, 0.999, "all")
    assert {group["weight_decay"] for group in adamw.param_groups} == {0.01}
    assert {group["betas"] for group in adamw.param_groups} == {(0.9, 0.999)}
    assert sum(len(group["params"]) for group in adamw.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("argv, reason", [
    (["--learning_rat", "1"], "--learning_rat"), (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
    (["--batch_size", "many"], "--batch_size"), (["--learning_rate", "nan"], "--learning_rate nan"),
    (["--warmup_ratio", "1.5"], "between 0 and 1"), (["--dropout", "1"], "--dropout 1.0"),
    (["--order", "random"], "--order"), (["--preset", "7b"], "--preset"), (["--recipe", "original"], "--recipe"),
    (["--min_tokens", "9", "--max_tokens", "8", "--data_path", "x"], "--min_tokens 9 is greater than --max_tokens 8"),
])
def test_wrong_flags(argv, reason, capsys):
    """The user's mistake is one line on stderr that names it, and exit code 2."""
    code, _, errors = exit_of("SFT", argv, capsys)
    assert code == 2 and reason in errors and errors.count("\n") == 1


def test_help_as_a_command():
    """The script itself, from anywhere, prints its help."""
    command = [sys.executable, str(ROOT / "SFT_long.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0 and "SFT_long.py" in done.stdout and not done.stderr


@pytest.mark.parametrize("stage, before", [("SFT", "pretrain"), ("SFT_long", "SFT"), ("distill", "SFT_long")])
def test_starting_weights_default(stage, before, data_dir, tokenizer_dir, tmp_path, cache_dir, capsys):
    """A stage starts from the weights of the one before in --out_dir, and says who makes them where they lack."""
    code, _, errors = exit_of(stage, stage_argv(data_dir / "sft.jsonl", tokenizer_dir, tmp_path, cache_dir=cache_dir),
                              capsys)
    assert code == 2 and str(tmp_path / f"{before}.pth") in errors and f"{before}.py makes it" in errors
    assert errors.count("\n") == 1


# ---------------------------------------------------------------------------------------------
# the data of a chat stage


@pytest.fixture
def in_data(tokenizer_dir, tmp_path, monkeypatch, capsys):
    """in_data(stage, names, *flags): two steps in a working folder whose data/ holds these names; what it printed."""
    monkeypatch.setattr("common.runlog.RunLog.charts", lambda log: None)
    records = {"sft_512": make_chats(5, 30, longest=200), "sft_1024": make_chats(3, 30, shortest=800, longest=1180),
               "r1_1024": make_r1(6, 20), "pretrain": make_texts(7, 20)}

    def run(stage: str, names: list[str], *flags, expected: int = 0) -> str:
        folder = tmp_path / f"{stage} {' '.join(names)}"
        (folder / "data").mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(folder)
        for name in names:
            write_jsonl(folder / "data" / f"{name}.jsonl", records[name])
        code, said, errors = exit_of(stage, [
            "--init_from", "none", "--preset", "nano", "--tokenizer_path", tokenizer_dir, "--cache_dir",
            tmp_path / "cache", "--max_steps", "2", "--batch_size", "2", "--eval_interval", "0", "--device", "cpu",
            "--plain", *flags], capsys)
        assert code == expected, errors
        return said if not expected else errors

    return run


def shares_in(said: str) -> dict[str, str]:
    """{source: share of all tokens} as a run prints it."""
    return dict(re.findall(r"^source (\S+): share (\S+) of all tokens", said, re.MULTILINE))


@pytest.mark.parametrize("stage, names, line, shares", [
    ("SFT", ["sft_512", "pretrain"], "sft_512=0.9 pretrain=0.1", {"sft_512": "90.0%", "pretrain": "10.0%"}),
    ("SFT", ["sft_512"], "sft_512; not in data/: pretrain=0.1, without which earlier skills fade", {}),
    ("SFT_long", ["sft_1024", "pretrain", "sft_512"], "sft_1024=0.9 pretrain=0.1",
     {"sft_1024": "90.0%", "pretrain": "10.0%"}),
    ("distill", ["r1_1024", "sft_512", "pretrain"], "r1_1024=0.7 sft_512=0.2 pretrain=0.1",
     {"r1_1024": "70.0%", "sft_512": "20.0%", "pretrain": "10.0%"}),
    ("distill", ["r1_1024", "pretrain"],
     "r1_1024=0.7 pretrain=0.1; not in data/: sft_512=0.2, without which earlier skills fade",
     {"r1_1024": "87.5%", "pretrain": "12.5%"}),
    ("distill", ["r1_1024"], "r1_1024; not in data/: sft_512=0.2 pretrain=0.1, without which earlier skills fade", {}),
])
def test_default_mixtures(in_data, stage, names, line, shares):
    """Without --data_path a chat stage takes what is in data/ of its mixture, and says once what that is and what is
    missing; the shares sum to 1."""
    said = in_data(stage, names)
    assert re.findall(r"^default data: (.*)$", said, re.MULTILINE) == [line]
    assert shares_in(said) == shares and said.count("skills fade") == line.count("skills fade")


def test_the_first_name_of_a_mixture_must_be_there(in_data):
    """Its own data is what a stage is for: without it, the error says how to get it."""
    error = in_data("distill", ["sft_512", "pretrain"], expected=2)
    assert "--data_path r1_1024: there is no data/r1_1024.jsonl" in error and error.count("\n") == 1


TEXT = "text; add some with a share, such as pretrain=0.1"


@pytest.mark.parametrize("stage, paths, lacking", [
    ("SFT", ["sft_512"], TEXT), ("SFT", ["sft_512=0.5", "pretrain=0.5"], None), ("SFT", ["r1_1024"], TEXT),
    ("SFT", ["sft_512=0.9", "r1_1024=0.1"], TEXT), ("SFT_long", ["sft_1024"], TEXT), ("distill", ["r1_1024=1"],
     "chats without thoughts and no text; add some with a share, such as sft_512=0.2 pretrain=0.1"),
    ("distill", ["r1_1024=0.8", "sft_512=0.2"], TEXT),
    ("distill", ["r1_1024=0.8", "pretrain=0.2"],
     "chats without thoughts; add some with a share, such as sft_512=0.2"),
    ("distill", ["r1_1024=0.8", "sft_512=0.1", "pretrain=0.1"], None), ("pretrain", ["pretrain"], None),
])
def test_what_is_named_is_all_that_is_taken(in_data, stage, paths, lacking):
    """With --data_path nothing is added; one line says which earlier skills nothing in it keeps."""
    said = in_data(stage, ["sft_512", "sft_1024", "r1_1024", "pretrain"], "--data_path", *paths)
    lines = [line for line in said.splitlines() if "skills fade" in line]
    assert lines == ([f"earlier skills fade: --data_path names no {lacking}"] if lacking else [])
    assert "default data" not in said
    assert set(shares_in(said)) == ({path.split("=")[0] for path in paths} if len(paths) > 1 else set())


def test_a_default_mixture_is_resumed_only_as_it_was(in_data):
    """A source that came to data/ since is another mixture: refused. As it was it goes on."""
    in_data("SFT", ["sft_512"])
    said = in_data("SFT", ["sft_512"], "--resume", "--max_steps", "3")
    assert "done: 3 steps" in said
    write_jsonl(Path("data/pretrain.jsonl"), make_texts(7, 20))
    error = in_data("SFT", ["sft_512"], "--resume", "--max_steps", "4", expected=2)
    assert "the shares of the sources changed" in error


def test_distill_needs_thoughts_or_the_word_that_none_are_wanted(in_data):
    """Replies without thoughts are a mistake, unless --without_thoughts says that they are the control."""
    names, flags = ["r1_1024", "sft_512", "pretrain"], ("--data_path", "sft_512=0.9", "pretrain=0.1")
    assert "no reply has a thought" in in_data("distill", names, *flags, expected=2)
    assert "done: 2 steps" in in_data("distill", names, *flags, "--without_thoughts")


def start_of(stage: str, tokenizer_dir, out_dir, *argv) -> WeakWater:
    """The model a stage starts from."""
    args = parse_args(stage, "", ["--preset", "nano", "--tokenizer_path", str(tokenizer_dir), "--out_dir", str(out_dir),
                                  *argv])
    torch.manual_seed(3)
    run = RunState(args, Distributed())
    run.choose_tokenizer()
    return run.build_model()


def test_output_init(tokenizer_dir, tmp_path):
    """From scratch, layers begin as the identity and all else is as without; weights to start from stay as they are."""
    flags = ("--init_from", "none", "--output_init")
    zero, normal = (start_of("pretrain", tokenizer_dir, tmp_path, *flags, value) for value in ("zero", "normal"))
    tokens = torch.arange(20).unsqueeze(0)
    embedded = zero.model.embed_tokens(tokens)
    assert torch.equal(zero(tokens), zero.lm_head(zero.model.norm(embedded)))
    for (name, ours), theirs in zip(zero.state_dict().items(), normal.state_dict().values(), strict=True):
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert not ours.any() and theirs.std().item() == pytest.approx(0.02 / math.sqrt(2 * 2), rel=0.05)
        else:
            assert torch.equal(ours, theirs)
    save_weights(tmp_path / "normal.pth", normal, {})
    later = start_of("SFT", tokenizer_dir, tmp_path, "--init_from", str(tmp_path / "normal.pth"))
    assert all(map(torch.equal, later.state_dict().values(), normal.state_dict().values()))


# ---------------------------------------------------------------------------------------------
# schedules and optimizers


def test_learning_rates():
    """Warm-up, constant, cosine and trapezoid at the points that define them."""
    def rate(step, schedule, **options):
        usual = dict(warmup_ratio=0.0, decay_ratio=0.2, min_lr_ratio=0.1)
        return learning_rate(step, 100, 2.0, schedule, **usual | options)

    assert [rate(step, "constant") for step in (0, 50, 99)] == [2.0] * 3
    assert rate(0, "cosine") == 2.0 and rate(50, "cosine") == pytest.approx(1.1) and rate(100, "cosine") == 0.2
    assert [rate(step, "trapezoid", min_lr_ratio=0.0) for step in (0, 80, 90, 99)] == pytest.approx([2, 2, 1, 0.1])
    assert rate(75, "trapezoid", decay_ratio=0.5, min_lr_ratio=0.5) == pytest.approx(1.5)
    for schedule in ("constant", "cosine", "trapezoid"):
        warm = [rate(step, schedule, warmup_ratio=0.1) for step in range(100)]
        assert warm[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)]) and warm[10] == 2.0
        assert all(a >= b for a, b in zip(warm[10:], warm[11:], strict=False))
        rates = [rate(step, schedule, min_lr_ratio=0.25) for step in range(100)]
        assert min(rates) >= 0.5 and max(rates) == 2.0
        for total in (1, 2):  # no division by nothing
            for ratio in (0.0, 1.0):
                values = [learning_rate(s, total, 1.0, schedule, ratio, ratio, 0.0) for s in range(total)]
                assert all(0 < value <= 1 for value in values)
    # the published log of the original run: Epoch:[1/2](10/17664) lr:0.000549999901, 5.5e-4 falling to 5e-5
    original = learning_rate(10, 2 * 17664, 5.5e-4, "cosine", warmup_ratio=0.0, decay_ratio=0.0, min_lr_ratio=1 / 11)
    assert f"{original:.12f}" == "0.000549999901"
    with pytest.raises(UserError, match="linear"):
        rate(0, "linear")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_groups(name, tied):
    """Every parameter once; decay on matrices only; Muon gets exactly the matrices in the layers."""
    model = WeakWater(LLMConfig.preset("nano", qk_norm=True, tie_embeddings=tied))
    names = {id(p): n for n, p in model.named_parameters()}
    optimizers = make_optimizers(model, name, 0.01, 0.3)
    placed = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert id(parameter) not in placed
                placed[id(parameter)] = (type(optimizer).__name__, group["weight_decay"])
    assert set(placed) == set(names)
    for key, (optimizer, decay) in placed.items():
        matrix, hidden = ".weight" in names[key] and "norm" not in names[key], "layers." in names[key]
        assert decay == (0.3 if matrix else 0.0), names[key]
        assert optimizer == ("Muon" if name == "muon" and matrix and hidden else "AdamW"), names[key]
    set_learning_rate(optimizers, 0.5)
    assert {group["lr"] for optimizer in optimizers for group in optimizer.param_groups} == {0.5}


def test_the_first_step_waits_for_neither_torchs_compiler_nor_transformers(tokenizer_dir):
    """Importing them takes two seconds; optimizers would import the one to keep it away."""
    code = f"""
import sys, torch
sys.path.insert(0, {str(ROOT)!r})
from common.optim import make_optimizers
from Config import LLMConfig
from text.tokenizer import TextEncoder, load_tokenizer
from model import WeakWater
TextEncoder.of(load_tokenizer({str(tokenizer_dir)!r}))
model = WeakWater(LLMConfig.preset("nano"))
optimizers = make_optimizers(model, "muon", 1e-3, 0.1) + make_optimizers(model, "adamw", 1e-3, 0.1)
model(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
for optimizer in optimizers:
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
assert not {{"torch._dynamo", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_muon_is_that_of_torch():
    """Batched by shape, it takes the steps torch.optim.Muon takes one matrix after another, and its state is theirs."""
    torch.manual_seed(0)
    shapes = [(64, 64), (192, 64), (64, 192), (64, 64), (48, 80), (80, 48)]
    weights = [[torch.nn.Parameter(torch.randn(shape)) for shape in shapes]]
    weights.append([torch.nn.Parameter(p.detach().clone()) for p in weights[0]])
    settings = dict(lr=0.1, weight_decay=0.3, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    optimizers = [torch.optim.Muon(weights[0], **settings), Muon(weights[1], **settings)]
    begin = [p.detach().clone() for p in weights[0]]
    for step in range(4):
        for mine, theirs in zip(*weights, strict=True):
            mine.grad = torch.randn_like(mine)
            theirs.grad = mine.grad.clone()
        if step == 3:  # one without a gradient stays as it is
            weights[0][0].grad = weights[1][0].grad = None
        for optimizer in optimizers:
            optimizer.step()
    for theirs, ours, before in zip(*weights, begin, strict=True):
        assert (ours - theirs).norm() <= 0.01 * (theirs - before).norm()
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    for theirs, ours in zip(states[0].values(), states[1].values(), strict=True):
        assert theirs.keys() == ours.keys() and torch.equal(theirs["momentum_buffer"], ours["momentum_buffer"])


def test_muon_leaves_a_matrix_without_gradient_where_it_is():
    """As in the first step from layers that begin as the identity, where only their outputs have one."""
    weights = [torch.nn.Parameter(torch.ones(4, 8)), torch.nn.Parameter(torch.ones(4, 8))]
    weights[0].grad, weights[1].grad = torch.zeros(4, 8), torch.eye(4, 8)
    Muon(weights, lr=0.1, weight_decay=0, momentum=0.95, adjust_lr_fn="match_rms_adamw").step()
    assert torch.equal(weights[0], torch.ones(4, 8)) and not torch.equal(weights[1], torch.ones(4, 8))


# ---------------------------------------------------------------------------------------------
# runs

SMALL = dict(preset="nano", max_seq_len=64, batch_size=2, accumulation_steps=2, eval_interval=0, eval_tokens=500)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_trains(text_file, tokenizer_dir, tmp_path, dtype, optimizer):
    """bf16, and fp16 with its scaler, train on a CPU, and the weights that are saved are float32 and finite."""
    rows = train("pretrain", text_file, tokenizer_dir, tmp_path, dtype=dtype, optimizer=optimizer, epochs=9,
                 learning_rate=3e-3, max_steps=12, **SMALL)
    assert len(rows) == 12 and rows[-1]["loss"] < rows[0]["loss"] - 0.2
    state, config, meta = load_weights(tmp_path / "pretrain.pth")
    assert all(tensor.dtype == torch.float32 and torch.isfinite(tensor).all() for tensor in state.values())
    assert meta["stage"] == "pretrain" and meta["step"] == 12 and config.vocab_size == 800


def test_fp16_overflow_skips_the_step(text_file, tokenizer_dir, tmp_path, monkeypatch, capsys):
    """A gradient beyond fp16 leaves the weights as they are, halves the scale, and training goes on; the JSONL stays
    JSON, which knows no NaN."""
    flags = SMALL | dict(dtype="fp16", epochs=9, learning_rate=3e-3, grad_clip=0)
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**24))
    rows = train("pretrain", text_file, tokenizer_dir, tmp_path / "a", max_steps=16, **flags)
    said = capsys.readouterr().out
    skipped = re.findall(r"step (\d+): gradient overflow in fp16, step skipped at scale", said)
    assert "1" in skipped and len(skipped) < 10
    assert [str(row["step"]) for row in rows if row["grad_norm"] is None] == skipped
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2

    path = tmp_path / "a" / "pretrain.pth"
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**60))
    flags |= dict(init_from=path, preset=False)
    train("pretrain", text_file, tokenizer_dir, tmp_path / "b", max_steps=2, **flags)
    assert capsys.readouterr().out.count("gradient overflow") == 2
    before, after = (load_weights(out)[0] for out in (path, tmp_path / "b" / "pretrain.pth"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def nan_weights(path, tokenizer_dir, token: str) -> None:
    """A weights file in which one token's embedding is NaN."""

    tokenizer = load_tokenizer(str(tokenizer_dir))
    torch.manual_seed(1)
    model = WeakWater(LLMConfig.preset("nano", vocab_size=800, tie_embeddings=False))
    (number,) = TextEncoder.of(tokenizer).encode([token])[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[number] = float("nan")
    save_weights(path, model, {})


def test_weights_that_are_not_finite_are_refused(text_file, tokenizer_dir, tmp_path, capsys):
    """By their file: the rows are not to blame."""
    nan_weights(tmp_path / "nan.pth", tokenizer_dir, "9")
    flags = SMALL | dict(preset=False, init_from=tmp_path / "nan.pth")
    code, _, errors = exit_of("pretrain", stage_argv(text_file, tokenizer_dir, tmp_path / "out", **flags), capsys)
    assert code == 2 and "nan.pth: NaN or infinity in 1 of its weight tensors (the first: model.embed_tokens" in errors


def test_a_loss_that_is_not_finite_stops_the_run(tokenizer_dir, tmp_path, monkeypatch, capsys):
    """Exit code 1 before the optimizer touches the weights; the guilty row is named, and all rows and the weights are
    in a file."""
    monkeypatch.setattr("common.run_state.load_strict", lambda net, weights, path: net.load_state_dict(weights))
    records = [{"text": f"{i % 8}{i % 8}"} for i in range(40)] + [{"text": "99"}]
    file = write_jsonl(tmp_path / "t.jsonl", records)
    val = write_jsonl(tmp_path / "v.jsonl", [{"text": "no"}])
    nan_weights(tmp_path / "nan.pth", tokenizer_dir, "9")
    flags = SMALL | dict(preset=False, init_from=tmp_path / "nan.pth", val_path=val, batch_size=4, order="file")
    argv = stage_argv(file, tokenizer_dir, tmp_path / "out", **flags)
    code, _, errors = exit_of("pretrain", argv, capsys)
    assert code == 1 and errors.count("\n") == 1
    assert "step 1: loss nan" in errors and f"rows {file}:41 (tokens 0 to 4)" in errors and f"{file}:40" not in errors
    (saved,) = (tmp_path / "out" / "checkpoints" / "pretrain").glob("nonfinite_*.pth")
    assert str(saved) in errors
    content = torch.load(saved, weights_only=True)
    assert content["step"] == 1 and math.isnan(content["loss"]) and len(content["rows"]) == 41
    assert content["guilty"] == [f"{file}:41 (tokens 0 to 4)"]
    assert sum(tokens.numel() for tokens in content["tokens"]) == 41 * 4
    before = torch.load(tmp_path / "nan.pth", weights_only=True)["model"]
    for source in (content, torch.load(tmp_path / "out" / "pretrain.pth", weights_only=True)):
        assert all(torch.equal(source["model"][name].nan_to_num(7), before[name].nan_to_num(7)) for name in before)


@pytest.mark.parametrize("stage", LOOPS)
def test_a_gradient_that_is_not_finite_stops_the_run(stage, data_dir, tokenizer_dir, cache_dir, tmp_path, monkeypatch,
                                                     capsys):
    """The same where only the gradient is not finite, in every loop; the last whole step can be resumed."""
    clip, norms = torch.nn.utils.clip_grad_norm_, iter([1.0, 1.0, math.inf])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a, **k: clip(*a, **k) * next(norms))
    data = data_dir / ("pretrain.jsonl" if stage == "pretrain" else "r1.jsonl")
    flags = SMALL | dict(max_seq_len=256, init_from="none", cache_dir=cache_dir)
    code, _, errors = exit_of(stage, stage_argv(data, tokenizer_dir, tmp_path, **flags), capsys)
    assert code == 1 and "step 3: loss" in errors and "gradient norm inf" in errors and ".jsonl:" in errors
    folder = tmp_path / "checkpoints" / stage
    assert {path.name for path in folder.iterdir()} == {"step_00000002.pth", "nonfinite_step_00000003.pth"}
    state = checkpoint.load(folder / "step_00000002.pth", STATE_KEYS)["model"]
    for path in (folder / "nonfinite_step_00000003.pth", tmp_path / f"{stage}.pth"):
        left = checkpoint.load(path, ("model",))["model"]
        assert all(torch.equal(tensor, state[name]) for name, tensor in left.items())
    assert [row["step"] for row in read_rows(tmp_path, stage)] == [1, 2]


def test_too_high_a_learning_rate_stops_the_run(text_file, tokenizer_dir, tmp_path, capsys):
    """Weights blown up by a step are found out by the next, not trained on."""
    argv = stage_argv(text_file, tokenizer_dir, tmp_path, learning_rate=1e30, **SMALL)
    code, _, errors = exit_of("pretrain", argv, capsys)
    assert code == 1 and "stopped before the weights were changed" in errors and "step 2: " in errors


# ---------------------------------------------------------------------------------------------
# what a run leaves


def test_a_resume_that_computes_otherwise_says_so(text_file, tokenizer_dir, tmp_path, capsys):
    said = []
    for steps, flags in ((2, {}), (3, dict(resume=True)), (4, dict(resume=True, plain=True))):
        train("pretrain", text_file, tokenizer_dir, tmp_path, **SMALL, max_steps=steps, **flags)
        said.append(re.findall(r"^earlier steps were computed with: .*", capsys.readouterr().out, re.MULTILINE))
    assert said[:2] == [[], []] and len(said[2]) == 1 and "faster than model.py" in said[2][0]
    meta = load_weights(tmp_path / "pretrain.pth")[2]
    assert meta["computed_by"] == ["computed as model.py says, without replacements: --plain"]


def test_what_a_run_leaves(text_file, tokenizer_dir, tmp_path, capsys):
    """Console line, log, JSONL, charts, weights and checkpoints are where and what the contract says."""
    flags = SMALL | dict(epochs=2, eval_interval=3, save_interval=4, learning_rate=2.0, warmup_ratio=1.0)
    importlib.import_module("pretrain").main(stage_argv(text_file, tokenizer_dir, tmp_path, **flags))
    said = capsys.readouterr().out
    line = r"^Epoch:\[1/2\]\(1/\d+\) loss:\d\.\d{3} lr:0\.\d{12} epoch_Time:\d+\.\dmin tokens/s:[\d,]+ grad_norm:\d"
    assert re.search(line, said, re.MULTILINE)
    printed = [line for line in said.splitlines() if not line.startswith("tokenizing")]
    assert printed == (tmp_path / "log" / "pretrain.log").read_text(encoding="utf-8").splitlines()
    for fact in ("parameters: ", "no padding tokens", "target share: ", "FLOPs per token: ", "dtype fp32: as asked"):
        assert fact in said
    rows = read_rows(tmp_path, "pretrain")
    keys = ["step", "epoch", "loss", "lr", "tokens", "tokens_per_second", "grad_norm", "minutes_left"]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)) and rows[-1]["epoch"] == 2
    for row in rows:
        evaluated = row["step"] % 3 == 0 or row["step"] == len(rows)
        assert list(row) == keys + ["val_loss", "val_ppl", "val_bpb"] * evaluated
    for chart in ("loss", "lr", "epoch_time"):
        picture = (tmp_path / "charts_pretrain" / f"{chart}_pretrain.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    state, config, meta = load_weights(tmp_path / "pretrain.pth")
    assert LLMConfig.from_dict(torch.load(tmp_path / "pretrain.pth", weights_only=True)["config"]) == config
    assert {"stage", "step", "tokens", "val"} <= set(meta) and meta["tokens"] == rows[-1]["tokens"]
    best = load_weights(tmp_path / "pretrain_best.pth")[2]
    lowest = min((row for row in rows if "val_loss" in row), key=lambda row: row["val_loss"])
    assert lowest is not rows[-1]  # the rate rises until it gets worse again
    assert best["step"] == lowest["step"] and best["val"]["loss"] == lowest["val_loss"]
    steps = sorted(path.name for path in (tmp_path / "checkpoints" / "pretrain").iterdir())
    saved = [step for step in range(1, len(rows) + 1) if step % 4 == 0 or step == len(rows)][-2:]
    assert steps == [f"step_{step:08d}.pth" for step in saved]  # the newest --keep_checkpoints
    assert not [path for path in tmp_path.rglob("*") if ".tmp" in path.name or ".partial" in path.name]


@pytest.mark.parametrize("fault", ["missing", "init", "log", "finish", None])
def test_wandb_never_stops_training(text_file, tokenizer_dir, tmp_path, monkeypatch, capsys, fault):
    """With wandb missing or failing at any moment training goes on and says so; else it gets what the JSONL gets."""
    logged = []

    def call(name):
        if name == fault:
            raise RuntimeError(f"no network\nfor {name}")

    def log(values, step):
        call("log")
        logged.append(values | {"step": step})

    run = types.SimpleNamespace(log=log, finish=lambda: call("finish"))
    def init(mode, **settings):
        assert mode == "offline", "nobody is logged in"
        return call("init") or run

    fake = types.SimpleNamespace(init=init, login=lambda prompt: False)
    monkeypatch.setitem(sys.modules, "wandb", None if fault == "missing" else fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    rows = train("pretrain", text_file, tokenizer_dir, tmp_path, use_wandb=True, max_steps=3, **SMALL)
    said = capsys.readouterr().out
    assert len(rows) == 3 and (tmp_path / "pretrain.pth").is_file()
    moment = "init" if fault == "missing" else fault
    assert (f"wandb {moment} failed" in said and "continuing without it" in said) == bool(fault)
    if fault in (None, "finish"):
        assert logged == rows


def test_later_stages_inherit(data_dir, tokenizer_dir, cache_dir, tmp_path, capsys):
    """SFT takes architecture and weights from pretrain.pth, prints that, and refuses another --preset."""
    flags = SMALL | dict(max_seq_len=256, cache_dir=cache_dir, max_steps=2)
    train("pretrain", data_dir / "pretrain.jsonl", tokenizer_dir, tmp_path, **flags)
    capsys.readouterr()
    argv = stage_argv(data_dir / "sft.jsonl", tokenizer_dir, tmp_path, **flags | dict(preset="demo"))
    code, _, errors = exit_of("SFT", argv, capsys)
    assert code == 2 and "--preset demo is not the architecture" in errors
    with contextlib.suppress(FileNotFoundError):
        (tmp_path / "log" / "SFT.jsonl").unlink()
    train("SFT", data_dir / "sft.jsonl", tokenizer_dir, tmp_path, **flags | dict(preset=False))
    said = capsys.readouterr().out
    assert f"inherited from {tmp_path / 'pretrain.pth'} (pretrain, step 2)" in said and "dim 64" in said
    meta = [load_weights(tmp_path / f"{stage}.pth")[2] for stage in ("pretrain", "SFT")]
    assert meta[1]["init_from_sha256"] == meta[0]["weights_sha256"] != meta[1]["weights_sha256"]
    assert json.loads((tmp_path / "log" / "SFT.jsonl").read_text(encoding="utf-8").splitlines()[0])["step"] == 1
