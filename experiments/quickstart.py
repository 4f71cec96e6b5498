"""Helpers of quickstart.sh: a time estimate before the run, a report and its thresholds after it.

    python experiments/quickstart.py estimate
    python experiments/quickstart.py report --out_dir out/quickstart --seed 1
    python experiments/quickstart.py compare docs/results/quickstart/seed_*.json

`report` reads the output of evaluate.py in <out_dir>/eval and writes report.json, report.md and two charts. It exits
with 1 if one of THRESHOLDS is missed. `compare` prints the thresholds of several reports in one table (runs/seeds.sh).
"""

import argparse
import json
import math
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.answers import read_reply, wilson
from common.exits import run
from common.files import write_lines
from common.runtime import describe_machine, pick_device
from Config import LLMConfig, OneLineParser, UserError

STAGES = {  # row of the report: (stage, does it think, label)
    "pretrain": ("pretrain", None, "pretrain"), "SFT": ("SFT", None, "SFT"), "SFT_long": ("SFT_long", None, "SFT_long"),
    "control": ("control", False, "control: no thoughts"), "distill": ("distill", True, "distill: thinks first"),
    "distill_off": ("distill", False, "distill, thinking off"),
}
QUESTIONS = {"facts/asked": "facts asked in other words", "facts/never_asked": "facts never asked",
             "one_step": "one-step problems", "multi_step": "2 to 8 steps", "elsewhere": "elsewhere, a to d"}
ELSEWHERE = {"a": "names, things, measure words", "b": "clauses", "c": "questions", "d": "a to c together",
             "e": "verbs (no threshold)"}


def accuracy(stage: str, what: str):
    """A threshold's value: one stage's share of `what`."""
    return lambda scores: scores[stage][what]


THRESHOLDS = (  # name, smallest share, and how to get it from the scores of all stages
    ("SFT_long answers one-step problems", 0.90, accuracy("SFT_long", "one_step")),
    ("SFT_long answers facts asked in other words", 0.95, accuracy("SFT_long", "facts/asked")),
    ("SFT_long answers facts never asked", 0.80, accuracy("SFT_long", "facts/never_asked")),
    ("thinking: 2 to 8 steps in the world's words", 0.93, accuracy("distill", "multi_step")),
    ("thinking: sums and one-step problems", 0.92, accuracy("distill", "one_step")),
    ("thinking: of these replies, the thought's number", 0.98, accuracy("distill", "thought_answers")),
    ("thinking: elsewhere a, names and things", 0.90, accuracy("distill", "elsewhere/a")),
    ("thinking: elsewhere b, clauses", 0.85, accuracy("distill", "elsewhere/b")),
    ("thinking: elsewhere c, questions", 0.85, accuracy("distill", "elsewhere/c")),
    ("thinking: elsewhere d, all of these", 0.80, accuracy("distill", "elsewhere/d")),
    ("thinking: above the control on elsewhere a to d", 0.30, lambda scores: gain(scores, "control")),
    ("thinking: facts asked in other words", 0.90, accuracy("distill", "facts/asked")),
    ("thinking: facts never asked", 0.80, accuracy("distill", "facts/never_asked")),
    ("thinking off: facts asked in other words", 0.90, accuracy("distill_off", "facts/asked")),
    ("thinking off: facts never asked", 0.80, accuracy("distill_off", "facts/never_asked")),
    ("thinking: follow-ups", 0.85, accuracy("distill", "follow_up")),
    ("thinking: unknown people and topics declined", 0.90, accuracy("distill", "unknown")),
    ("thinking: facts that are not declined", 0.97, accuracy("distill", "facts_not_declined")),
    ("thinking: well-formed", 0.98, accuracy("distill", "well_formed")),
    ("thinking off: without tags, ended", 0.98, accuracy("distill_off", "well_formed")),
)
SECONDS_HERE = 445  # training and scoring, on the two cores with AMX on which PROBE_SECONDS was measured
PROBE_SECONDS = 0.08


# ---------------------------------------------------------------------------------------------
# before the run


def estimate() -> int:
    """Print how long the quickstart should take, estimated from a few training steps of its model."""
    import torch

    from common import runtime
    from common.optim import make_optimizers
    from fastpath import accelerate
    from model import WeakWater

    device, _ = runtime.pick_device("auto")
    dtype, reason = runtime.pick_dtype("auto", device)
    runtime.prepare(device, 0, False)
    model = WeakWater(LLMConfig.preset("demo", vocab_size=1700)).to(device)
    accelerate(model, device, dtype)
    optimizers = make_optimizers(model, "muon", 1e-3, 0.1)
    lengths = [64] * 64
    tokens = torch.randint(0, 1700, (1, sum(lengths)), device=device)
    batch = dict(tokens=tokens, lengths=lengths, target_index=torch.arange(tokens.numel(), device=device),
                 targets=tokens[0], weights=torch.ones(tokens.numel(), device=device))
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        with runtime.autocast(device, dtype):
            loss = model(**batch) / tokens.numel()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - begin)
    step = sorted(seconds[1:])[2]
    print(f"{describe_machine(device)}; {dtype}: {reason}; a training step takes {step:.2f} s: "
          f"about {math.ceil(SECONDS_HERE * step / PROBE_SECONDS / 60)} minutes in all")
    return 0


# ---------------------------------------------------------------------------------------------
# after the run


def share(hits: list[bool], what: str) -> dict:
    """The share of True in `hits` with its 95 % interval. Raises UserError if there are none."""
    if not hits:
        raise UserError(f"no reply to a question of {what}: run quickstart.sh")
    return {"n": len(hits), "correct": sum(hits), "accuracy": sum(hits) / len(hits),
            "interval95": wilson(sum(hits), len(hits))}


def thought_lines(reply: str) -> list[str]:
    """The lines inside a reply's <think>."""
    match = re.search(r"<think>(.*?)</think>", reply, re.DOTALL)
    return [line.strip() for line in match.group(1).strip().split("\n")] if match else []


def last_line(path: Path) -> dict:
    """The JSON object on the last line of a command's output."""
    return json.loads(path.read_text(encoding="utf-8").splitlines()[-1])


def scores_of(out: Path, row: str) -> dict:
    """The scores of one row of the report, from the last line of evaluate.py and its generations: of each source that
    was asked, and of some sources together."""
    stage, thinking, _ = STAGES[row]
    result = last_line(out / "eval" / f"{stage}.json")
    replies = [json.loads(line) for line in (out / "eval" / f"{stage}.jsonl").read_text(encoding="utf-8").splitlines()]
    replies = [reply for reply in replies if reply["thinking"] is thinking]
    scores = {"bpb": {Path(f["file"]).name.split(".")[0]: f["bpb"] for f in result["files"]}}

    def add(name: str, chosen: list[dict], hit=lambda reply: reply["correct"]) -> None:
        if chosen or name in ("facts/asked", "facts/never_asked", "one_step"):
            scores[name] = share([hit(reply) for reply in chosen], name)

    for source in sorted({reply["source"] for reply in replies} | {"facts/asked", "facts/never_asked", "one_step"}):
        add(source, [reply for reply in replies if reply["source"] == source])
    for group in ("multi_step", "follow_up", "unknown"):
        add(group, [reply for reply in replies if reply["source"].startswith(f"{group}/")])
    elsewhere = [r for r in replies if r["source"].startswith("elsewhere/") and r["source"] != "elsewhere/e"]
    add("elsewhere", elsewhere)
    scores["right_elsewhere"] = sorted(reply["line"] for reply in elsewhere if reply["correct"])
    facts = [reply for reply in replies if reply["source"].startswith("facts/")]
    add("facts_not_declined", facts, lambda reply: not reply["declined"])
    add("well_formed", replies, lambda reply: reply["well_formed"])
    if thinking:
        add("thought_answers", [r for r in replies if r["source"] == "one_step"],
            lambda r: gives_its_thought(r["reply"]))
        asked = (out / "data" / "eval" / "multi_step.jsonl").read_text(encoding="utf-8").splitlines()
        add("thoughts_right", [r for r in replies if r["source"].startswith("multi_step/")],
            lambda r: thought_lines(r["reply"]) == json.loads(asked[r["line"] - 1])["thought"])
    return scores


def gives_its_thought(reply: str) -> bool:
    """True if the answer of a reply is the last number in its thought."""
    numbers = re.findall(r"\d+", " ".join(thought_lines(reply)))
    return bool(numbers) and read_reply(reply, is_number=True) == int(numbers[-1])


def gain(scores: dict, other: str) -> dict:
    """The accuracy of thinking on elsewhere a to d minus that of another row: {"accuracy", "interval95"}.

    Both answer the same questions, so only the questions that exactly one of them answers count (Bonett & Price 2012,
    adjusted Wald interval for paired proportions). The interval does not cover the variation between training seeds.
    """
    n, ours, theirs = (scores["distill"]["elsewhere"]["n"], set(scores["distill"]["right_elsewhere"]),
                       set(scores[other]["right_elsewhere"]))
    only_ours, only_theirs = ((len(one) + 1) / (n + 2) for one in (ours - theirs, theirs - ours))
    middle = only_ours - only_theirs
    reach = 1.959964 * math.sqrt((only_ours + only_theirs - middle**2) / (n + 2))
    return {"accuracy": (len(ours) - len(theirs)) / n, "interval95": [middle - reach, middle + reach]}


def percent(score: dict | None) -> str:
    """ "93 % (90–95)"; nothing for what was not asked."""
    if score is None:
        return ""
    low, high = score["interval95"]
    return f"{score['accuracy']:.0%} ({100 * low:.0f}–{100 * high:.0f})"


def draw(out: Path, scores: dict) -> None:
    """Draw thinking.png, accuracy by number of steps, and stages.png, accuracy of each stage by kind of question."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def error_bars(parts: list[dict]) -> list[list[float]]:
        return [[abs(p["accuracy"] - p["interval95"][end]) for p in parts] for end in (0, 1)]

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for row, colour in (("SFT_long", "tab:gray"), ("control", "tab:orange"), ("distill", "tab:blue")):
        steps = steps_of(scores[row])
        parts = [scores[row][f"multi_step/{n}"] for n in steps]
        axes.errorbar(steps, [p["accuracy"] for p in parts], error_bars(parts), marker="o", capsize=3,
                      label=STAGES[row][2], color=colour)
    axes.set(title="Problems answered whose numbers are held out, by steps", xlabel="steps", ylabel="share right",
             ylim=(0, 1.02))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(out / "thinking.png", dpi=110)
    plt.close(figure)

    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    width = 0.8 / len(STAGES)
    for i, (row, (_, _, label)) in enumerate(STAGES.items()):
        asked = [(x, scores[row][question]) for x, question in enumerate(QUESTIONS) if question in scores[row]]
        parts = [part for _, part in asked]
        axes.bar([x + (i - 2.5) * width for x, _ in asked], [p["accuracy"] for p in parts], width,
                 yerr=error_bars(parts), capsize=2, label=label)
    axes.set_xticks(range(len(QUESTIONS)), list(QUESTIONS.values()))
    axes.set(title="What each stage answers (held out, greedy, 95 % intervals)", ylabel="share right", ylim=(0, 1.02))
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3, axis="y")
    figure.savefig(out / "stages.png", dpi=110)
    plt.close(figure)


def steps_of(scores: dict) -> list[int]:
    """The numbers of steps of the longer problems that were asked."""
    return sorted(int(name.split("/")[1]) for name in scores if name.startswith("multi_step/"))


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def write_report(args) -> int:
    """Compute the scores, write the report and return the exit code. Raises UserError if a run is incomplete."""
    out = Path(args.out_dir)
    try:
        scores = {row: scores_of(out, row) for row in STAGES}
        seconds = {name: int(n) for name, n in (line.split() for line in (out / "seconds").read_text().splitlines())}
        control = {key: last_line(out / "control.json")[key]
                   for key in ("targets", "control_targets", "conversations", "control_conversations")}
        if not seconds:
            raise UserError("no times")
    except (OSError, ValueError, KeyError, IndexError) as error:
        mistake = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"--out_dir {out} holds no whole run of quickstart.sh ({mistake})") from None
    verdicts = []
    for what, least, value in THRESHOLDS:
        score = value(scores)
        verdicts.append({"what": what, "least": least, "value": score["accuracy"], "interval95": score["interval95"],
                         "met": score["accuracy"] >= least})
    machine = describe_machine(pick_device("auto")[0])
    report = {"seed": args.seed, "smoke": args.smoke, "machine": machine, "seconds": seconds, "targets": control,
              "stages": scores, "gain": gain(scores, "control"), "thresholds": verdicts}
    write_lines(out / "report.json", [json.dumps(report, ensure_ascii=False, indent=1)])
    draw(out, scores)
    def judged(met: bool) -> str:
        return "not judged" if args.smoke else "met" if met else "**missed**"

    files, steps = list(scores["pretrain"]["bpb"]), steps_of(scores["distill"])
    above = percent(report["gain"]).replace("%", " points")
    lines = [
        "# Quickstart" + (" (smoke test: too short to learn anything)" if args.smoke else ""), "",
        f"`bash quickstart.sh --seed {args.seed}{' --smoke' if args.smoke else ''}` on {machine}: "
        f"{sum(seconds.values()) / 60:.1f} minutes ({', '.join(f'{k} {v} s' for k, v in seconds.items())}).", "",
        "Replies are greedy, questions held out; in brackets the 95 % interval (Wilson). Every stage is asked in chat "
        "form, the pretrained model too, which has never seen a chat. `distill` is asked in its default mode, in which "
        "it thinks, and with thinking off.", "",
        "## What each stage can do", "",
        table(["stage", *(f"bits per byte, {f}" for f in files), *QUESTIONS.values()],
              [[STAGES[row][2], *(f"{scores[row]['bpb'][f]:.3f}" for f in files),
                *(percent(scores[row].get(q)) for q in QUESTIONS)] for row in STAGES]), "",
        "![what each stage answers](stages.png)", "",
        "## Does thinking help?", "",
        f"`control` starts from the same SFT_long weights and trains on the same mixture with the thoughts taken out, "
        f"for as many target tokens ({control['control_targets']:,}; distill: {control['targets']:,}). Without "
        f"thoughts replies are short, so it sees {control['control_conversations']:,} conversations where distill sees "
        f"{control['conversations']:,}. On elsewhere a to d, thinking is {above} above the control.", "",
        table(["problems in the world's words, of", *(f"{n} steps" for n in steps), "all", "thoughts all right"],
              [[STAGES[row][2], *(percent(scores[row][f"multi_step/{n}"]) for n in steps),
                percent(scores[row]["multi_step"]), percent(scores[row].get("thoughts_right"))]
               for row in ("SFT_long", "control", "distill")]), "",
        "![accuracy by number of steps](thinking.png)", "",
        "Problems of 1 to 5 steps, `eval/elsewhere.jsonl`. Numbers are held out everywhere; beside them these words "
        "are in no training file:", "",
        table(["elsewhere", *(f"{part}: {what}" for part, what in ELSEWHERE.items())],
              [[STAGES[row][2], *(percent(scores[row][f"elsewhere/{part}"]) for part in ELSEWHERE)]
               for row in ("SFT_long", "control", "distill")]), "",
        "## Thinking on and off", "",
        table(["distill", "thinking", "thinking off"], [
            [label, percent(scores["distill"].get(name)), percent(scores["distill_off"].get(name))] for name, label in (
                ("facts/asked", "facts asked in other words"), ("facts/never_asked", "facts never asked"),
                ("one_step", "one-step problems"), ("thought_answers", "of these, the answer is the thought's"),
                ("one_step/two_digits", "one step, second number of two digits"), ("multi_step", "2 to 8 steps"),
                ("elsewhere", "elsewhere, a to d"), ("follow_up/relation", "follow-up: another relation"),
                ("follow_up/entity", "follow-up: another person or place"),
                ("follow_up/step", "follow-up: one more step"),
                ("follow_up/sum", "follow-up: a sum goes on"), ("unknown/people", "unknown people declined"),
                ("unknown/topics", "unknown topics declined"), ("facts_not_declined", "facts that are not declined"),
                ("well_formed", "well-formed, ended by `</s>`"))]), "",
        "## Thresholds", "",
        table(["what", "at least", "is", ""], [[v["what"], f"{v['least']:.0%}", percent(
            {"accuracy": v["value"], "interval95": v["interval95"]}), judged(v["met"])] for v in verdicts]), "",
    ]
    write_lines(out / "report.md", lines[:-1])  # the last is empty
    print("\n".join(line for line in lines if not line.startswith("![")))
    print(f"report: {out / 'report.md'}, report.json, thinking.png, stages.png")
    missed = [v["what"] for v in verdicts if not v["met"]]
    if missed and not args.smoke:
        print("missed: " + "; ".join(missed), file=sys.stderr)
        return 1
    return 0


def compare(paths: list[str]) -> int:
    """Print each threshold's value in several reports and the smallest. Returns 1 if one is missed."""
    try:
        reports = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
        reports.sort(key=lambda report: report["seed"])
        if len({tuple(v["what"] for v in report["thresholds"]) for report in reports}) > 1:
            raise UserError("the reports have other thresholds: they come from different versions of this script")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"not a report.json of quickstart.sh: {type(error).__name__}: {error}") from None
    rows, missed = [], False
    for verdicts in zip(*(report["thresholds"] for report in reports), strict=True):
        smallest = min(verdict["value"] for verdict in verdicts)
        missed |= smallest < verdicts[0]["least"]
        rows.append([verdicts[0]["what"], f"{verdicts[0]['least']:.0%}", *(f"{v['value']:.1%}" for v in verdicts),
                     f"**{smallest:.1%}**"])
    rows.append(["minutes", "", *(f"{sum(report['seconds'].values()) / 60:.1f}" for report in reports), ""])
    print(table(["what", "at least", *(f"seed {report['seed']}" for report in reports), "smallest"], rows))
    for machine in sorted({report["machine"] for report in reports}):
        print(f"\n{machine}")
    return int(missed)


def main() -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("estimate", help="how long quickstart.sh will take here")
    reporting = commands.add_parser("report", help="write the report and check the thresholds")
    reporting.add_argument("--out_dir", default="out/quickstart")
    reporting.add_argument("--seed", type=int, default=1)
    reporting.add_argument("--smoke", action="store_true", help="do not check the thresholds")
    comparing = commands.add_parser("compare", help="compare several reports")
    comparing.add_argument("reports", nargs="+", metavar="report.json")
    args = parser.parse_args()
    if args.command == "estimate":
        return estimate()
    return write_report(args) if args.command == "report" else compare(args.reports)


if __name__ == "__main__":
    sys.exit(run(main))
