"""Stage before all others: raw files → training files, cleaned, without duplicates and without validation text.

    python prepare_data.py --data_path raw/ --dry_run                      # 1,000 records a file: what would go, and why
    python prepare_data.py --data_path raw/ --val_path val/ --out_dir data
    python prepare_data.py --data_path raw/ --val_path val/ --out_dir data --resume

--data_path: JSON lines, a JSON array, Parquet, CSV or plain text, packed or not; files, folders, globs or addresses that
fsspec knows; pretraining text and chats in the common shapes, R1 replies too. In --out_dir the stages find, without a
flag, what the input holds:

    pretrain-*.jsonl.zst       documents
    sft_512-*.jsonl.zst        chats of up to 512 tokens of the tokenizer; sft_mini_512 is a sample of them
    sft_1024-*.jsonl.zst       chats of 513 to 1,024 tokens
    r1_1024-*.jsonl.zst        chats whose replies think, of up to 1,024 tokens
    data_report.md, charts/    what each step changed and dropped; manifest.json: the same for programs
    dropped/, listed/          every record that was dropped, by step; replies that refuse or name another assistant

docs/DATA.md gives every rule, and the commands for well-known data sets. Chats need a tokenizer: where there is none yet,
the text is written, and the run says how to go on.
"""

import argparse
import dataclasses
import json
import os
import platform
import shlex
import shutil
import signal
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are as many as the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

from common import exits  # noqa: E402
from common.lock import OutDirLock  # noqa: E402
from Config import OneLineParser, UserError, number  # noqa: E402
from prepare.step import BALANCE, SORT_BY, WEIGHT_BY, Options  # noqa: E402
from text.sources import PUBLISHING  # noqa: E402
from text.tokenizer import DEFAULT_FOLDER, TextEncoder, load_tokenizer  # noqa: E402

DRY_RUN = 1000  # records of each file
# how long the phases take beside one another, for the estimate of what is left
WEIGHTS = {"read": 10, "clean": 55, "exact": 1, "leaks": 1, "sign": 30, "bands": 4, "verify": 2, "decide": 1,
           "good": 5, "score": 150, "keep": 1, "clusters": 10, "categorize": 20, "arrange": 1,
           "write_text": 5, "write_chats": 15, "mini": 3}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments. Exits with 2, after one line, where one is wrong."""
    default = Options()
    parser = OneLineParser(prog="prepare_data.py", description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_path", nargs="+", metavar="PATH", required=True, help="raw files, folders, globs or addresses")
    add("--val_path", nargs="+", metavar="PATH", default=[],
        help="validation and test files: nothing that they hold stays in the output")
    add("--out_dir", default="data", help="folder to write (default: %(default)s)")
    add("--tokenizer_path", default=DEFAULT_FOLDER, help="folder of the tokenizer that measures chats (default: %(default)s)")
    add("--dry_run", action="store_true", help=f"read {DRY_RUN:,} records a file, print what each step would drop, write nothing")
    add("--resume", action="store_true", help="go on with a run that was stopped")
    add("--workers", type=number(int, 1), default=n_cores(), help="processes; the output is the same (default: %(default)s)")
    add("--executor", choices=("local", "slurm", "ray"), default="local",
        help="who runs the tasks: this machine, Slurm or Ray; --workers are tasks at a time (default: %(default)s)")
    add("--slurm", nargs="+", metavar="KEY=VALUE", default=[], help="options of sbatch, as in partition=cpu time=4:00:00")
    add("--rename_field", nargs="+", metavar="OLD=NEW", default=[], help="names of fields, as in body=text q=question a=answer")
    add("--simplify", action="store_true", help="traditional → simplified characters (pip install opencc)")
    add("--min_chars", type=number(int, 0), default=default.min_chars,
        help="drop shorter documents, white space not counted (default: %(default)s)")
    add("--max_chars", type=number(int, 1), default=default.max_chars, help="drop longer documents and chats (default: %(default)s)")
    add("--min_han", type=number(float, 0, 1), default=default.min_han,
        help="drop text with a smaller share of hanzi among its letters (default: %(default)s)")
    add("--blocklist", metavar="FILE", help="drop every record that holds one of these words, one a line")
    add("--assistant_name", metavar="NAME", help="what an assistant calls itself instead of ChatGPT and the like")
    add("--drop_refusals", action="store_true", help="drop replies that refuse without need (else they are only listed)")
    add("--near", type=number(float, 0.3, 1), default=default.near, help="overlap of near-duplicates (default: %(default)s)")
    add("--keep_other_numbers", action="store_true",
        help="keep a chat that is like a validation record but for its numbers: word problems of one wording")
    add("--contained", type=number(float, 0.1, 1), default=default.contained,
        help="share of the shorter text that makes a leak (default: %(default)s)")
    add("--mini_share", type=number(float, 0, 1), default=default.mini_share,
        help="share of sft_512 that is in sft_mini_512 (default: %(default)s)")
    add("--skip", nargs="+", metavar="STEP", default=[], help="steps to leave out, by the names in the report")
    add("--max_bad_ratio", type=number(float, 0, 1), default=0.01,
        help="stop when more than this share of the records is malformed (default: %(default)s)")
    add("--score_with", metavar="WEIGHTS", help="score documents by bits per byte of these weights of ours, as out/pretrain.pth")
    add("--good", nargs="+", metavar="FILE", default=[], help="score documents by their likeness to the texts of these files")
    add("--keep", type=number(float, 0, 1), default=default.keep,
        help="share of the documents to keep, those with the best scores (default: %(default)s)")
    add("--categories", type=number(int, 0, 1000), default=default.categories,
        help="clusters that the records are put into; 0: none (default: %(default)s)")
    add("--balance", choices=BALANCE, help="a file for each category, and shares that lift the small ones")
    add("--sort_by", choices=SORT_BY, help="write simple before complex: short before long, or by --score_with")
    add("--weight_by", choices=WEIGHT_BY, help='give easy documents a smaller "weight", by --score_with')
    add("--shard_mb", type=number(int, 1), default=default.shard_mb, help="size of an output file (default: %(default)s)")
    add("--task_mb", type=number(int, 1), default=16, help="size of a task, a part of the records, before compression (default: %(default)s)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=default.seed,
        help="seed of the sample, the categories and the order inside a band (default: %(default)s)")
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "prepare_data.py", *(sys.argv[1:] if argv is None else argv)])
    args.rename_field = tuple(tuple(pair.split("=", 1)) for pair in args.rename_field)
    if any(len(pair) != 2 or not all(pair) for pair in args.rename_field):
        parser.error("--rename_field: each is OLD=NEW, as in body=text")
    if len(dict(args.rename_field)) < len(args.rename_field):
        parser.error("--rename_field: a field is renamed twice")
    if args.keep < 1 and not (args.score_with or args.good):
        parser.error(f"--keep {args.keep} needs scores: --score_with WEIGHTS, --good FILE or both")
    for flag in ("sort_by", "weight_by"):
        if getattr(args, flag) == "score" and not args.score_with:
            parser.error(f"--{flag} score needs --score_with WEIGHTS")
    if args.balance and not args.categories:
        parser.error("--balance category needs --categories of at least 1")
    if args.slurm and args.executor != "slurm":
        parser.error("--slurm needs --executor slurm")
    if args.min_chars > args.max_chars:
        parser.error(f"--min_chars {args.min_chars} is greater than --max_chars {args.max_chars}")
    return args


def n_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_options(args: argparse.Namespace, names: set[str]) -> Options:
    """The options of the steps. Raises UserError on an unknown step and on a blocklist that cannot be read."""
    if "too_long" in args.skip:
        raise UserError("--skip too_long: no stage has rows for longer chats")
    if "quality" in args.skip and args.keep < 1:
        raise UserError(f"--skip quality: leave out --keep {args.keep} instead")
    if unknown := sorted(set(args.skip) - names):
        raise UserError(f"--skip {unknown[0]}: no such step; the steps are {', '.join(sorted(names))}")
    words = ()
    if args.blocklist:
        try:
            lines = Path(args.blocklist).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--blocklist {args.blocklist}: {error}") from None
        words = tuple(sorted({line.strip() for line in lines if line.strip()}))
        if not words:
            raise UserError(f"--blocklist {args.blocklist}: no words in it, one a line")
    taken = {field.name: getattr(args, field.name) for field in dataclasses.fields(Options) if field.name != "blocklist"}
    return Options(**taken | {"blocklist": words, "skip": tuple(sorted(args.skip)), "good": tuple(args.good)})


def main(argv: list[str] | None = None) -> int:
    """Run the recipe. Returns 0, or 2 where chats wait for a tokenizer. Raises UserError."""
    args = parse_args(argv)
    try:
        import datatrove  # noqa: F401
    except ImportError:
        raise UserError("prepare_data.py needs the package datatrove: pip install -r requirements-extra.txt") from None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out_dir = Path(args.out_dir)
    for path in args.data_path + args.val_path:
        if os.path.isdir(path) and out_dir.resolve().is_relative_to(Path(path).resolve()):
            raise UserError(f"--out_dir {out_dir}: it is in {path}, whose files are read: choose another")
    try:
        if args.dry_run:
            with tempfile.TemporaryDirectory() as folder:
                return run(args, Path(folder), None)
        lock = OutDirLock.take(args.out_dir, args.command)
        try:
            return run(args, out_dir / ".prepare", out_dir)
        finally:
            del lock
    except MemoryError:
        raise UserError("out of memory: fewer --workers or a smaller --task_mb need less") from None
    except (KeyboardInterrupt, SystemExit) as stop:
        if args.dry_run:
            raise
        code = stop.code if isinstance(stop, SystemExit) else 130
        raise exits.TrainingStopped(f"stopped; go on with: {resuming(args)}", code) from None


def resuming(args: argparse.Namespace) -> str:
    """The command that goes on with this run."""
    return args.command if args.resume else f"{args.command} --resume"


def is_finished(args: argparse.Namespace, out_dir: Path, work: Path, settings: dict, names: tuple[str, ...]) -> bool:
    """True where out_dir holds the whole result of these settings. Raises UserError where --resume is missing, where what
    is there was begun with other settings, and where files of the outputs' `names` are there that are not ours."""
    before, manifest = work / "settings.json", out_dir / "manifest.json"
    if not before.exists() and not manifest.exists():
        for name in names:
            for file in sorted({*out_dir.glob(f"{name}.jsonl*"), *out_dir.glob(f"{name}-*.jsonl*")}):
                raise UserError(f"--out_dir {out_dir}: {file} is there, and the stages would find two: move it away, or "
                                "choose another --out_dir")
        if args.resume:
            print(f"{out_dir}: nothing to go on with; from the beginning")
        return False
    if not args.resume:
        raise UserError(f"--out_dir {out_dir}: a run of prepare_data.py is there already: add --resume to go on with it, "
                        "or choose another --out_dir")
    if not before.exists():
        raise UserError(f"{before} is missing: remove {manifest} and the files it names, or choose another --out_dir")
    begun, now = json.loads(before.read_text(encoding="utf-8")), json.loads(json.dumps(settings))
    if set(begun["options"]) != set(now["options"]):
        raise UserError(f"--out_dir {out_dir}: its run was begun by another version of prepare_data.py; choose another")
    for name in sorted({*begun["options"], *now["options"]}):
        if begun["options"].get(name) != now["options"].get(name):
            value = "other words" if name == "blocklist" else begun["options"].get(name)
            raise UserError(f"--{name}: this run was begun with {value}; repeat its command, or choose another --out_dir")
    if begun.get("scoring") != now["scoring"]:
        raise UserError("--score_with, --good: the files are not those that this run was begun with; choose another --out_dir")
    if begun["files"] != now["files"]:
        changed = next(new or old for old, new in zip_longest(begun["files"], now["files"]) if old != new)
        raise UserError(f"{changed[0]}: the files of --data_path and --val_path, their sizes or times, are not those that this "
                        "run was begun with; choose another --out_dir")
    return (manifest.exists() and not (out_dir / PUBLISHING).exists()
            and json.loads(manifest.read_text(encoding="utf-8"))["complete"])


def find_tokenizer(path: str, work: Path) -> str | None:
    """The fingerprint of the tokenizer by which chats are sorted, or None where its folder is not there yet. Raises
    UserError where it is no tokenizer, or another than that which sorted chats of this run."""
    noted = work / "tokenizer.json"
    before = json.loads(noted.read_text(encoding="utf-8")) if noted.exists() else None
    fingerprint = TextEncoder.of(load_tokenizer(path)).fingerprint if before or os.path.isdir(path) else None
    if before not in (None, fingerprint):
        raise UserError(f"--tokenizer_path {path}: this run was begun with another tokenizer; choose another --out_dir")
    return fingerprint


def run(args: argparse.Namespace, work: Path, out_dir: Path | None) -> int:
    """The phases, in order, in the folder `work`; then the files in out_dir (None: a dry run)."""
    from prepare import arrange, categories, duplicates, outputs, pipeline, quality, summary, worker  # noqa: F401  worker: for its children
    from prepare.executors import check
    from prepare.inputs import find_raw_files
    from prepare.report import write_report
    from prepare.steps import LAST_STEPS, STEPS
    from prepare.work import Phases, save_json

    begin = time.monotonic()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    executor = "local" if args.dry_run else args.executor  # its folder is on this machine
    slurm = check(executor, args.slurm)
    options = make_options(args, {step.name for step in (*STEPS, *LAST_STEPS)})

    # -- what comes in
    files, others = find_raw_files(args.data_path, "--data_path")
    val_files, more = find_raw_files(args.val_path, "--val_path") if args.val_path else ([], [])
    others += more
    files += val_files
    print(f"{len(files) - len(val_files):,} files to prepare, {len(val_files):,} of validation, "
          f"{sum(file.size for file in files) / 1e6:,.1f} MB; {args.workers} workers", flush=True)
    if others:
        print(f"ignored (no data file name): {len(others):,} ({', '.join(others[:3])}{', …' * (len(others) > 3)})")
    if not val_files:
        print("no --val_path: nothing keeps your validation and test texts out of the training files")
    choices = dataclasses.asdict(options) | {"task_mb": args.task_mb, "max_bad_ratio": args.max_bad_ratio,
        "good": [os.path.basename(path) for path in args.good],  # which files they are, `scoring` says
        "score_with": os.path.basename(args.score_with) if args.score_with else None}
    good_files = find_raw_files(args.good, "--good")[0] if args.good else []
    if good_files:
        quality.check_good(good_files, options.rename_field)
    settings = {"options": choices, "files": [list(file) for file in files],
                "scoring": {"weights": quality.fingerprint(args.score_with), "good": [list(file) for file in good_files]}}
    finished = out_dir is not None and is_finished(args, out_dir, work, settings, outputs.OUTPUTS)
    tokenizer = find_tokenizer(args.tokenizer_path, work)
    if finished:
        clean_up(work)
        print(f"{out_dir}: finished before")
        return 0
    for leftover in work.rglob(".*.tmp"):  # of processes that were killed: the lock is ours
        leftover.unlink()
    noted = work / "started.json"
    started = json.loads(noted.read_text(encoding="utf-8")) if noted.exists() else started
    save_json(noted, started)
    save_json(work / "settings.json", settings)
    weights_file = quality.keep_weights(args.score_with, work) if args.score_with else None
    is_scored, is_arranged = bool(args.score_with or good_files), bool(options.sort_by or options.balance)
    asked = {"good": good_files, "score": is_scored, "keep": is_scored, "clusters": options.categories,
             "categorize": options.categories, "arrange": is_arranged}
    weights = {phase: weight for phase, weight in WEIGHTS.items() if asked.get(phase, True)}
    phases = Phases(work, args.workers, weights, lambda line: print(line, flush=True), executor, slurm)

    # -- read
    reading = pipeline.ReadRaw(work, files, options.rename_field, DRY_RUN if out_dir is None else None)
    phases.run("read", len(files), [reading, pipeline.WriteShards(work, reading, args.task_mb * 1_000_000)])
    inputs, shards = pipeline.read_results(work, len(files))
    try:
        summary.say_inputs(inputs, args.max_bad_ratio)
    except UserError:
        shutil.rmtree(work)  # other flags may read it, and would be refused as another run
        raise

    # -- clean
    phases.run("clean", len(shards), pipeline.clean_pipeline(work, shards, options))
    for shard in shards:  # they are half of what the work folder takes
        shard.path.unlink(missing_ok=True)
    corpus, validation = duplicates.corpora(work, shards)
    n_of = sum((Counter(corpus.meta(shard)["kind"].tolist()) for shard in range(len(corpus.tasks))), Counter())
    if good_files and n_of[pipeline.TEXT] < quality.GOOD_LEAST:
        shutil.rmtree(work)  # without --good it is another run
        raise UserError(f"--good: {n_of[pipeline.TEXT]} documents in --data_path are too few to learn from, at least "
                        f"{quality.GOOD_LEAST} are needed")

    # -- duplicates and leaks
    n_shards = len(corpus.tasks)
    if "exact" not in options.skip:
        phases.run("exact", duplicates.n_ranges(len(corpus)), [duplicates.FindExact(work, corpus)])
    phases.run("leaks", 1, [duplicates.IndexValidation(work, validation)])
    phases.run("sign", n_shards, [duplicates.Sign(work, corpus, validation, options)])
    bands = duplicates.BANDS * duplicates.n_ranges(len(corpus))
    phases.run("bands", bands, [duplicates.FindPairs(work, n_shards, options.near)])
    n_pairs = duplicates.merge_pairs(work, bands)
    parts = -(-n_pairs // duplicates.PAIRS_IN_TASK)
    phases.run("verify", parts, [duplicates.Verify(work, corpus, options.near)])
    phases.run("decide", 1, [duplicates.Decide(work, corpus, options.near, parts)])

    # -- quality, categories, order
    if good_files:
        phases.run("good", 1, [quality.LearnGood(work, corpus, good_files, options)])
    if is_scored:
        phases.run("score", n_shards, [quality.Score(work, corpus, weights_file, bool(good_files))])
        phases.run("keep", 1, [quality.KeepBest(work, n_shards, options.keep)])
    if options.categories:
        phases.run("clusters", 1, [categories.FitCategories(work, corpus, options.categories, options.seed)])
        phases.run("categorize", n_shards, [categories.Categorize(work, corpus)])
    if is_arranged:
        phases.run("arrange", 1, [arrange.Arrange(work, corpus, options.sort_by, options.balance, options.seed)])

    # -- write
    has_chats = bool(set(n_of) - {pipeline.TEXT})
    phases.run("write_text", n_shards, [outputs.WriteStage(work, "write_text", corpus, validation, options, None)])
    if has_chats and tokenizer:
        save_json(work / "tokenizer.json", tokenizer)
        phases.run("write_chats", n_shards, [outputs.WriteStage(
            work, "write_chats", corpus, validation, options, args.tokenizer_path)])
        outputs.choose_sample(work, options.mini_share)
        phases.run("mini", n_shards, [outputs.WriteSample(work)])

    # -- publish
    tally, written = outputs.sum_counts(work)
    whole = tokenizer is not None or not has_chats
    steps = [step for step in (*STEPS, *LAST_STEPS) if step.name not in options.skip and step.when(options)]
    manifest = {
        "format": 1, "complete": whole, "tokenizer": tokenizer if has_chats else None,
        "run": {"command": args.command, "started": started, "seconds": round(time.monotonic() - begin, 1),
                "workers": args.workers, "executor": executor, "versions": {"python": platform.python_version()} | {
                    name: version(name) for name in ("datatrove", "numpy", "zstandard", "tokenizers", "pyarrow")} | {
                    "unicode": unicodedata.unidata_version}},
        "settings": choices, "scoring": settings["scoring"], "inputs": inputs, "left_alone": others, "outputs": [],
        "steps": [summary.describe_step(step, tally) for step in steps], "near": duplicates.describe_near(work, n_pairs),
        "quality": quality.describe_quality(work) if is_scored else None,
        "categories": categories.describe_categories(work) if options.categories else [],
    }
    staged = work / "staged"
    shutil.rmtree(staged, ignore_errors=True)
    for name in outputs.OUTPUTS:
        if name in written.outputs:
            pieces = outputs.join_output(work, staged, name, written.outputs[name], options)
            manifest["outputs"].append(outputs.describe_output(name, written.outputs[name], pieces))
    for folder in ("dropped", "listed"):
        manifest[folder] = [
            {"file": f"{folder}/{path.name}"} | outputs.describe_file(path)
            for name in sorted(path.name for path in (work / folder).glob("*"))
            for path in outputs.join_pieces(work / folder, staged / folder, name)]
    summary.check_account(manifest, is_whole=whole)
    if out_dir is None:
        summary.say_steps(manifest)
        if not whole:
            print(f"{sum(manifest['waiting'].values()):,} chats would wait for a tokenizer, since {args.tokenizer_path} is "
                  "not there: exact, leak and near do not count them yet")
        return 0
    save_json(staged / "manifest.json", manifest)
    write_report(staged, manifest)
    outputs.publish(staged, out_dir)
    summary.say_steps(manifest)
    print(f"{out_dir}/data_report.md has the full account" + (
        f"; {out_dir}/dropped/ holds what was dropped" if manifest["dropped"] else ""))
    if not whole:
        text = out_dir / "pretrain-*.jsonl.zst" if "pretrain" in written.outputs else "FILES with text or chats"
        print(f"not finished: {sum(manifest['waiting'].values()):,} chats wait for a tokenizer, which splits them by tokens, "
              f"and there is no folder {args.tokenizer_path}. Run python train_tokenizer.py --data_path {shlex.quote(str(text))} --tokenizer_path "
              f"{shlex.quote(args.tokenizer_path)}, then {resuming(args)}", file=sys.stderr)
        return 2
    clean_up(work)
    return 0


def clean_up(work: Path) -> None:
    """Remove what a finished run no longer needs: all but what tells another run from it."""
    for path in work.iterdir():
        if path.name not in ("settings.json", "tokenizer.json"):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    sys.exit(exits.run(main))
