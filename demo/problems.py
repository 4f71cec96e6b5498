"""Counting problems: numbers, clauses and questions composed of words, and the thought that solves them.

A clause is a time word, a frame and a verb; a question is a lead, the one who is asked about, what is asked and a tail.
One combination in eight is held out (`is_held_out`): no training file has it, but all its parts occur there. Not
under this rule: clauses about what somebody else does, and the questions of the other forms of one step.
"""

import random
import re
import zlib
from dataclasses import dataclass, field, replace

from demo.words import (
    AGENT_FRAMES,
    AGENT_GAIN,
    AGENT_LOSE,
    ASKED,
    BOXES,
    COMMAS,
    DONE,
    ENDS,
    FACTORS,
    FRAMES,
    FRAMES_OF_PEOPLE,
    GAIN,
    GAIN_ENDINGS,
    GAIN_HELD_OUT,
    GIVEN_BY_OWNER,
    GIVEN_TO_OWNER,
    GOODS,
    KIN,
    LEADS,
    LOSE,
    LOSE_ENDINGS,
    LOSE_HELD_OUT,
    MONEY,
    NEXT_GAIN,
    NEXT_LOSE,
    PASSIVE,
    PASSIVE_FRAMES,
    PRICE_ASKED,
    STARTS,
    TAILS,
    TIME_ENDINGS,
    TIMES,
    WHOSE,
    random_word,
)

# ---------------------------------------------------------------------------------------------
# numbers

LIMIT = 100  # the largest number
LEAST_STEPS, MOST_STEPS = 2, 8
AMOUNTS = {"+": range(1, 10), "-": range(1, 10), "*": range(2, 10), "/": range(2, 10)}


def apply(a: int, operation: str, b: int) -> int | None:
    """a operation b; None if it is not an integer from 0 to LIMIT, or a product or quotient that is not taught: 4 to 9
    are a factor or divisor only within the multiplication table, 2 and 3 of any number."""
    if operation == "/":
        c = a // b if a % b == 0 else None
        return c if c is None or b < 4 or c < 10 else None
    c = {"+": a + b, "-": a - b, "*": a * b}[operation]
    return c if 0 <= c <= LIMIT and (operation != "*" or b < 4 or a < 10) else None


TRIPLES = tuple((a, operation, b) for operation, amounts in AMOUNTS.items() for a in range(1, LIMIT + 1)
                for b in amounts if apply(a, operation, b) is not None)
# sums of two numbers of two digits, thought in two steps: 25+38 is 25+30 and 55+8
LONG_SUMS = tuple((a, operation, b) for operation in "+-" for a in range(11, LIMIT + 1) for b in range(11, LIMIT + 1)
                  if b % 10 and apply(a, operation, b))
TENS = tuple((a, operation, b) for operation in "+-" for a in range(11, LIMIT + 1) for b in range(10, LIMIT, 10)
             if apply(a, operation, b) is not None)


def equations(a: int, operation: str, b: int) -> str:
    """ "38+5=43", or "25+38：25+30=55，55+8=63": the digits of 38 stand where the next two sums find them."""
    if operation in "+-" and b > 10 and b % 10:
        between = apply(a, operation, b - b % 10)
        both = equations(a, operation, b - b % 10), equations(between, operation, b % 10)
        return f"{a}{operation}{b}：{'，'.join(both)}"
    return f"{a}{operation}{b}={apply(a, operation, b)}"


@dataclass(frozen=True)
class Problem:
    """A number of things and the steps that change it."""

    start: int
    steps: tuple[tuple[str, int], ...]

    def triples(self) -> list[tuple[int, str, int]]:
        """(number before, operation, number) of each step."""
        triples, value = [], self.start
        for operation, b in self.steps:
            triples.append((value, operation, b))
            value = apply(value, operation, b)
        return triples

    def result(self) -> int:
        return apply(*self.triples()[-1])

    def parts(self) -> set[tuple]:
        """The triples of every run of two or more steps: the problem itself and the problems it contains."""
        triples = tuple(self.triples())
        return {triples[i:j] for i in range(len(triples)) for j in range(i + 2, len(triples) + 1)}

    def numbers(self) -> str:
        """The problem without its wording, for example "23+5*2"."""
        return str(self.start) + "".join(f"{operation}{b}" for operation, b in self.steps)


class Counting:
    """Draws problems without any held-out (number, operation, number) step."""

    # only sums whose first number has two digits are held out: a model memorizes the others. Few products and quotients
    # are held out, because there are few from which to learn the rule
    HELD_OUT = {"+": 100, "-": 100, "*": 4, "/": 4}
    LONG_HELD_OUT = 100

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.held_out = {triple for operation, number in self.HELD_OUT.items()
                         for triple in rng.sample([t for t in TRIPLES if t[0] > 9 and t[1] == operation], number)}
        # a long sum whose second step is held out would spell it
        spelled = [t for t in LONG_SUMS if (apply(*t[:2], t[2] - t[2] % 10), t[1], t[2] % 10) not in self.held_out]
        self.long_held_out = set(rng.sample(spelled, self.LONG_HELD_OUT))
        # 38+25 would give 25+38 away
        given_away = self.long_held_out | {(b, "+", a) for a, operation, b in self.long_held_out if operation == "+"}
        self.long_known = [t for t in spelled if t not in given_away]
        self.tens = [t for t in TENS if t not in given_away]
        self.known = [triple for triple in TRIPLES if triple not in self.held_out]
        self.drawn_from = (self.known, [t for t in self.known if t[0] < 20], [t for t in self.known if t[1] in "*/"])
        self.after = {}  # number: the steps allowed after it
        self.before = {}  # number: the sums that it is the result of
        for a, operation, b in self.known:
            self.after.setdefault(a, {}).setdefault(operation, []).append(b)
            self.before.setdefault(apply(a, operation, b), []).append((a, operation, b))

    def triple(self) -> tuple[int, str, int]:
        """A sum that is not held out. Small numbers, products and quotients are few and drawn more often."""
        return self.rng.choice(self.rng.choices(self.drawn_from, weights=(5, 2, 3))[0])

    def long_sum(self) -> tuple[int, str, int]:
        """A sum of two numbers of two digits that is not held out, or one with a round second number."""
        return self.rng.choice(self.long_known if self.rng.random() < 0.7 else self.tens)

    def problem(self, n_steps: int, operations: str = "+-*/") -> Problem:
        """Draw each step's operation before its number: products and quotients are few and would otherwise be rare."""
        while True:
            value = start = self.rng.randint(2, LIMIT)
            steps = []
            while len(steps) < n_steps and (allowed := sorted(set(operations) & self.after.get(value, {}).keys())):
                operation = self.rng.choice(allowed)
                b = self.rng.choice(self.after[value][operation])
                steps.append((operation, b))
                value = apply(value, operation, b)
            if len(steps) == n_steps:
                return Problem(start, tuple(steps))


# ---------------------------------------------------------------------------------------------
# wording

KNOWN, HELD_OUT = "known", "held out"  # which combinations a wording may have
RANDOM_VERBS, RANDOM_TIMES = 0.15, 0.1  # of the verbs and time words in training
PASSIVE_SHARE, AGENT_SHARE = 0.04, 0.06  # of the clauses that lose, and of all, are about what somebody else does
SPENT_SHARE = 0.2  # of the clauses that lose money say what was bought
MONEY_SHARE = 0.6  # of the questions for money say 多少钱


def is_held_out(*parts: str) -> bool:
    """True for one combination in eight. A common short one (its first part is empty) never is."""
    return bool(parts[0]) and zlib.crc32("|".join(parts).encode()) % 8 == 0


@dataclass(frozen=True)
class Style:
    """What the wording of a problem may use: clauses and questions KNOWN or HELD_OUT, verbs that are held out, or also
    verbs and time words of any hanzi and an ending: a verb's tells the direction."""

    clauses: str = KNOWN
    question: str = KNOWN
    new_verbs: bool = False
    random_words: bool = False


TRAINED, IN_THE_WORLD = Style(random_words=True), Style()


@dataclass(frozen=True)
class Story:
    """Who has what: the owner's name and pronoun ("" for a place), the thing, its measure word, other people."""

    owner: str
    pronoun: str
    thing: str
    unit: str
    others: tuple[str, ...]

    def fill(self, template: str, **more) -> str:
        return template.format(e=self.owner, p=self.pronoun, o=self.thing, u=self.unit, **more)


@dataclass(frozen=True)
class Wording:
    """A problem in words, with its solution line by line. `clauses` and `asking` are the wording without numbers and
    measure words, as the held-out guarantees compare it."""

    problem: Problem
    question: str
    thought: tuple[str, ...]
    answer: str
    clauses: tuple[str, ...] = field(default=(), compare=False)
    asking: str = field(default="", compare=False)


def fits(wanted: str, *parts: str) -> bool:
    """True if a combination of parts is KNOWN or HELD_OUT, as `wanted`."""
    return is_held_out(*parts) == (wanted == HELD_OUT)


def asked_up_to_number(question: str) -> str:
    """A question as the thought restates it: up to the word that stands for its number."""
    return question[:re.search("几|多少|呢", question).end()]


class Writer:
    """Puts problems into words."""

    def __init__(self, rng: random.Random):
        self.rng = rng

    def clause(self, operation: str, b: int, story: Story, style: Style = TRAINED,
               named_share: float = 0.1) -> tuple[str, str]:
        """(clause up to its number, the rest) of one step. Where the owner gives or gets, `named_share` of the clauses
        name him instead of 他: then the names alone say which it is."""
        rng = self.rng
        while True:
            time = rng.choice(TIMES) if style.clauses == HELD_OUT or rng.random() < 0.5 else ""
            if time and style.random_words and rng.random() < RANDOM_TIMES:
                time = random_word(rng, rng.choice((1, 2))) + rng.choice(TIME_ENDINGS)
            if operation in FACTORS:
                verb = rng.choice(FACTORS[operation])
                if fits(style.clauses, time, verb):
                    begin, end = verb.split("{b}")
                    return time + begin, end
                continue
            gain, pronoun = operation == "+", story.pronoun
            # a held-out clause has no names, so that it can be searched for
            with_names = not style.new_verbs and style.clauses == KNOWN
            draw = rng.random() if with_names else 1
            if with_names and not gain and (story.thing, story.unit) in MONEY and rng.random() < SPENT_SHARE:
                return f"{time}买{rng.choice(GOODS)}{rng.choice(('花了', '用了', '花'))}", story.unit
            if draw < AGENT_SHARE or not gain and draw < AGENT_SHARE + PASSIVE_SHARE:
                verbs, frames = (AGENT_GAIN if gain else AGENT_LOSE, AGENT_FRAMES) if draw < AGENT_SHARE else (
                    PASSIVE, PASSIVE_FRAMES)
                verb, frame = rng.choice(verbs), rng.choice(frames)
                if not fits(style.clauses, time, verb, frame):
                    continue
                return frame.format(t=time, g=rng.choice((*story.others, rng.choice(KIN))), v=verb), story.unit
            if pronoun and with_names and rng.random() < 0.22:
                other = rng.choice(story.others)
                named = rng.random() < named_share
                if gain:
                    verb, frame = rng.choice(GIVEN_TO_OWNER), rng.choice(("{t}{g}{v}", "{t}{g}又{v}", "{g}{t}{v}"))
                    text = verb.format(p=story.owner if named else pronoun)
                else:
                    verb, frame = rng.choice(GIVEN_BY_OWNER), rng.choice(("{t}{v}{g}", "{t}又{v}{g}", "{t}{p}{v}{g}"))
                    text = verb
                if not fits(style.clauses, time, verb, frame):
                    continue
                owner = story.owner if named else pronoun
                return frame.format(t=time, g=other, v=text, p=owner), story.unit
            verb = rng.choice(GAIN if gain else LOSE)
            if style.new_verbs:
                verb = rng.choice(GAIN_HELD_OUT if gain else LOSE_HELD_OUT)
            elif style.random_words and rng.random() < RANDOM_VERBS:
                verb = random_word(rng, 1) + rng.choice(GAIN_ENDINGS if gain else LOSE_ENDINGS)
                if verb in GAIN_HELD_OUT + LOSE_HELD_OUT + (LOSE if gain else GAIN):
                    continue
            frame = rng.choice(FRAMES_OF_PEOPLE if pronoun and rng.random() < 0.25 else FRAMES)
            if frame == "{t}{v}" and not time:
                continue
            if fits(style.clauses, time, verb, frame):
                rest = story.unit + (story.thing if rng.random() < 0.2 else "")
                return frame.format(t=time, v=verb, p=pronoun), rest

    def next_clause(self, operation: str, b: int, story: Story) -> tuple[str, str]:
        """(clause up to its number, the rest) of a step that is asked about behind an answer."""
        rng = self.rng
        if operation in FACTORS or not story.others or rng.random() < 0.6:
            return self.clause(operation, b, story)
        verb = rng.choice(NEXT_GAIN if operation == "+" else NEXT_LOSE)
        return verb.format(p=story.pronoun or "他", g=rng.choice(story.others)), story.unit

    def asking(self, operations: set[str], story: Story, style: Style, whose: str | None = None,
               kind: str | None = None) -> tuple[str, str, str]:
        """(question, its wording without the names, what is asked: a key of ASKED)."""
        rng = self.rng
        while True:
            lead = rng.choice(LEADS) if style.question == HELD_OUT or rng.random() < 0.6 else ""
            chosen = kind or rng.choice([kind for kind in ASKED if not (
                kind == "一共" and operations - {"+"} or kind == "还剩" and not operations & {"-", "/"})])
            core, tail = rng.choice(ASKED[chosen]), rng.choice(TAILS)
            who, unit = rng.choice(WHOSE) if whose is None else whose, story.unit
            if (story.thing, unit) in MONEY and rng.random() < MONEY_SHARE:
                unit, core, tail = "钱", core.replace("几", "多少"), tail.replace("{o}", "")
            if ("{p}" in who or "家" in who or "手" in who) and not story.pronoun or "没用" in core and tail:
                continue
            if who == "{e}" and story.owner == "我":
                continue
            if style.question == HELD_OUT and ("{e}" in who or "{o}" in tail):  # so that it can be searched for
                continue
            if fits(style.question, lead, "{e}" if whose else who, core, tail):
                wording = lead + who + core + tail
                return replace(story, unit=unit).fill(wording), wording, chosen

    def put(self, problem: Problem, story: Story, style: Style = TRAINED) -> Wording:
        """Word a problem about somebody's things. The thought restates each clause up to its number, and the question
        up to 几 or 多少."""
        rng, comma = self.rng, self.rng.choice(COMMAS)
        start = rng.choice(STARTS) if story.pronoun else rng.choice(("有", "原来有", "本来有", "一共有", "放着"))
        told = [f"{story.owner}{start}{problem.start}{story.unit}{story.thing}"]
        thought, clauses = [f"{story.owner}{start}{problem.start}"], []
        named_share = 0.5 if len(problem.steps) == 1 else 0.1  # learned where nothing else is difficult
        for operation, b in problem.steps:
            begin, rest = self.clause(operation, b, story, style, named_share)
            while f"{begin}{b}" in thought:  # nobody could say at which of two equal clauses a thought is
                begin, rest = self.clause(operation, b, story, style, named_share)
            told.append(f"{begin}{b}{rest}")
            clauses.append(begin)
            thought.append(f"{begin}{b}")
        question, wording, kind = self.asking({operation for operation, _ in problem.steps}, story, style)
        return self.finish(problem, story, told, thought, question, kind, comma, tuple(clauses), wording)

    def finish(self, problem: Problem, story: Story, told: list[str], thought: list[str], question: str, kind: str,
               comma: str = "，", clauses: tuple[str, ...] = (), wording: str = "", asked: str = "",
               question_decides: bool = False) -> Wording:
        """A wording from the parts of its question and the restated clauses of its thought. `asked` is the part of the
        question that is restated, if not all of it. Where the `question_decides` what to do with two numbers, the sum
        stands behind it."""
        lines = [*thought, asked_up_to_number(asked or question)]
        first = 2 if question_decides else 1
        for number, triple in enumerate(problem.triples(), start=first):
            lines[number] += f"：{equations(*triple)}"
        end = self.rng.choice(ENDS)
        return Wording(problem, comma.join(told) + comma + question + end, tuple(lines),
                       f"{kind}{problem.result()}{story.unit}。", clauses, wording)

    def in_one_step(self, triple: tuple[int, str, int], story: Story, style: Style = TRAINED) -> Wording:
        """Word a single step: a story like the longer ones, or one of its own form."""
        own_forms = {"*": self.boxes_or_price, "/": self.shared, "+": self.compared, "-": self.compared}[triple[1]]
        if not story.pronoun or self.rng.random() < (0.5 if triple[1] in FACTORS else 0.6):
            return self.put(Problem(triple[0], (triple[1:],)), story, style)
        return own_forms(triple, story, style)

    def boxes_or_price(self, triple: tuple[int, str, int], story: Story, style: Style) -> Wording:
        """Boxes with as many things each, or things at a price."""
        (a, _, b), rng, unit, thing = triple, self.rng, story.unit, story.thing
        problem = Problem(a, (triple[1:],))
        if thing and unit not in "块元人名位" and rng.random() < 0.4:
            price = rng.choice(("一{u}{o}", "每{u}{o}", "{o}每{u}", "{o}一{u}")).format(u=unit, o=thing) + str(a)
            told, asked = [f"{price}元", f"买{b}{unit}"], rng.choice(PRICE_ASKED)
            lead = rng.choice(("", "", "", *LEADS))
            if is_held_out(lead, "", asked[:-1] + "{u}", ""):  # 元 as a measure word
                lead = ""
            question = lead + asked
            if rng.random() < 0.5:  # 买3个要多少元？
                question = told.pop() + asked
            return self.finish(problem, replace(story, unit="元"), told, [price, f"买{b}"], question, "要", asked=asked)
        box = rng.choice(BOXES)
        if box not in "天人家" and rng.random() < 0.3:
            told = [f"有{b}{box}{thing}", f"每{box}{rng.choice(('', '有'))}{a}{unit}"]
            question, _, kind = self.asking({"+"}, story, style, whose="", kind="一共")
            return self.finish(problem, story, told, [f"有{b}", told[1].removesuffix(unit)], question, kind)
        each = rng.choice((f"每{box}有{a}", f"一{box}{a}", f"一{box}有{a}", f"每{box}{a}"))
        question, _, kind = self.asking({"+"}, story, style, whose=f"{b}{box}", kind="一共")
        return self.finish(problem, story, [each + unit + thing], [each, f"{b}{box}"], question, kind,
                           asked=question.replace(f"{b}{box}", "", 1))

    def shared(self, triple: tuple[int, str, int], story: Story, style: Style) -> Wording:
        """Things that are shared equally."""
        (a, _, b), rng, things = triple, self.rng, story.unit + story.thing
        people = rng.choice(("人", "人", "小朋友", "同学", "孩子", "学生"))
        box = rng.choice(("盒子", "箱子", "袋子", "盘子"))
        person = rng.choice(("人", "个人", f"个{people}"))
        told, first, second, each = rng.choice((  # the question, the clauses up to their numbers, and of whom it asks
            (f"把{a}{things}平均分给{b}个{people}", f"把{a}", f"平均分给{b}", person),
            (f"{story.owner}有{a}{things}，平均分给{b}个{people}", f"{story.owner}有{a}", f"平均分给{b}", person),
            (f"{b}个{people}平分{a}{things}", f"{b}个{people}", f"平分{a}", person),
            (f"{a}{things}平均分成{b}份", f"{a}", f"平均分成{b}", "份"),
            (f"把{a}{things}平均分成{b}份", f"把{a}", f"平均分成{b}", "份"),
            (f"{a}{things}平均装进{b}个{box}", f"{a}", f"平均装进{b}", f"个{box}")))
        gets = rng.choice(("", "有", "有") if each == f"个{box}" else ("", "有", "有", "分", "分到", "得到", "能分到"))
        question = f"{rng.choice(('', '', *LEADS))}每{each}{gets}{rng.choice(('几', '多少'))}{story.unit}"
        tail = rng.choice(("", "", "", story.thing, "呢"))
        return self.finish(Problem(a, (triple[1:],)), story, [told], [first, second], question + tail, "有")

    def compared(self, triple: tuple[int, str, int], story: Story, style: Style) -> Wording:
        """Things of two people: together, more or fewer, the difference; or their ages."""
        (a, operation, b), rng = triple, self.rng
        problem, owner, other = Problem(a, (triple[1:],)), story.owner, story.others[0]
        verb = rng.choice(DONE) if rng.random() < 0.3 else ""
        have, draw = f"{verb}了" if verb else "有", rng.random()
        has, other_has = f"{owner}{have}{a}", f"{other}{have}{b}"
        told = [has + story.unit + story.thing, other_has + story.unit + (story.thing if rng.random() < 0.3 else "")]
        if draw < 0.15:
            than = f"{other}比{rng.choice((owner, story.pronoun))}{'大' if operation == '+' else '小'}{b}"
            question = rng.choice(("", "", *LEADS)) + other + rng.choice(("", "今年")) + rng.choice(("几岁", "多少岁"))
            return self.finish(problem, replace(story, unit="岁"), [f"{owner}今年{a}岁", than + "岁"],
                               [f"{owner}今年{a}", than], question, "今年")
        if operation == "+" and draw < 0.65:
            both = rng.choice(("", "", "他们", "两人", "两个人"))
            question, _, kind = self.asking({"+"}, story, style, both, "一共")
            if verb and rng.random() < 0.5:
                question = f"{both}一共{verb}了" + rng.choice(("几", "多少")) + story.unit
            return self.finish(problem, story, told, [has, other_has], question, kind, question_decides=True)
        if operation == "-" and draw < 0.6 and a > b:
            more = rng.random() < 0.7
            question = f"{owner}比{other}多" if more else f"{other}比{owner}少"
            question += rng.choice((verb, "")) + rng.choice(("几", "多少")) + story.unit
            question = rng.choice(("", "", *LEADS)) + question
            return self.finish(problem, story, told, [has, other_has], question, "多" if more else "少",
                               question_decides=True)
        than = f"{other}比{rng.choice((owner, story.pronoun))}{'多' if operation == '+' else '少'}{b}"
        question, _, kind = self.asking(set(), story, style, whose=other, kind="有")
        return self.finish(problem, story, [told[0], than + story.unit], [has, than], question, kind)


# ---------------------------------------------------------------------------------------------
# bare sums

SUMS = {  # operation: wordings of a sum; the first two are the most common
    "+": ("{a}加{b}", "{a}+{b}", "{a}加上{b}", "{a}再加{b}", "{a} + {b}", "{a}＋{b}"),
    "-": ("{a}减{b}", "{a}-{b}", "{a}减去{b}", "{a}再减{b}", "{a} - {b}", "{a}－{b}"),
    "*": ("{a}乘{b}", "{a}*{b}", "{a}乘以{b}", "{a}×{b}", "{a}x{b}"),
    "/": ("{a}除以{b}", "{a}/{b}", "{a}÷{b}"),
}
SUM_LEADS = ("", "", "", "", "帮我算算", "算一下", "请问", "计算", "你知道", "算算", "那么", "请算出", "告诉我",
             "问一下")
SUM_TAILS = ("等于多少？", "等于多少？", "等于几？", "是多少？", "=", "=?", "=？", "", "？", "等于多少", "得多少？",
             "等于多少呢？", "结果是多少？")


def sum_asked(rng: random.Random, a: int, operation: str, b: int) -> str:
    """A question for a bare sum."""
    core = rng.choice(SUMS[operation][:2] if rng.random() < 0.5 else SUMS[operation]).format(a=a, b=b)
    return rng.choice(SUM_LEADS) + core + rng.choice(SUM_TAILS)

