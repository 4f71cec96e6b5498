"""Generates the built-in corpus, a small Chinese world, from a seed, in the project's data formats.

    python make_demo_data.py --out_dir data/demo --seed 1

Each person has a hometown, a job, a favorite dish, a pet and a hobby. Each place has a river, a specialty, a festival
and a sight. Word problems count things that are bought, lost, multiplied and divided. The files:

    pretrain.jsonl     portraits, comparisons, scenes, retellings, counting and sums; contains every fact
    sft_512.jsonl      short chats: small talk, facts, sums, a few problems answered without a thought
    sft_1024.jsonl     long chats of the same kinds, nearly all of 513 to 1,024 tokens of the quickstart's tokenizer
    r1_1024.jsonl      replies that think first: mostly problems, some of every other kind
    val/               validation texts, chats and thoughts of the same kinds; some small talk and sums are also in training
    eval/              questions with checkable answers: facts, one_step and multi_step

Held-out guarantees, which tests/test_demo_data.py checks in the files:

    facts, asked         chats ask for the fact, but never in the wording of eval/facts.jsonl
    facts, never_asked   no chat and no thought mentions the fact; only pretrain.jsonl contains it
    one_step             (number, operation, number) appears in no training file, not even as a step of a longer
                         problem; its inverse may (26-3 for the question 23+3)
    multi_step           the numbers and steps appear in no training file, not even as part of a longer problem
"""

import argparse
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from common import exits
from common.files import write_jsonl
from Config import OneLineParser, UserError

# ---------------------------------------------------------------------------------------------
# the world: people and places, and how facts about them are told, asked and answered


def words(text: str) -> tuple[str, ...]:
    """Split a text at whitespace."""
    return tuple(text.split())


SURNAMES = "林陈王李张刘杨赵周吴徐孙马朱胡郭何高罗郑"
GIVEN_FIRST = "小文子雨思云若家一明"
GIVEN_SECOND = "梅兰竹菊松柏荷枫舟石川溪岚晴朗"
PLACES = words("清河镇 白石村 柳林镇 青松寨 红枫谷 云峰村 金沙湾 石桥镇 竹溪村 梅岭镇 "
               "桃花坞 杏林村 银杏镇 月牙湾 星河镇 鹿鸣村 凤凰寨 龙泉镇 虎丘村 雁门关 "
               "荷塘村 芦花荡 望海镇 听涛湾 落霞村 飞雪岭 暖泉镇 古槐村 长亭镇 麦香村")


@dataclass(frozen=True)
class Relation:
    """A relation between an entity {e} and one of `values` {v}, with templates to tell, ask and answer it."""

    name: str
    values: tuple[str, ...]
    told: tuple[str, ...]
    asked: tuple[str, ...]
    answered: str


OF_PEOPLE = (
    Relation("家乡", PLACES,
             ("{e}的家乡是{v}。", "{e}出生在{v}。", "{e}是{v}人。", "{e}从小在{v}长大。", "{v}是{e}的故乡。",
              "{e}小时候住在{v}。"),
             ("{e}的家乡在哪里？", "{e}是哪里人？", "{e}出生在什么地方？", "请问{e}来自哪里？", "你知道{e}的故乡吗？"),
             "{e}的家乡是{v}。"),
    Relation("职业", words("木匠 医生 教师 渔夫 裁缝 铁匠 厨师 画家 邮差 猎人 牧民 船长 歌手 园丁 石匠 "
                   "药师 警察 司机 演员 作家"),
             ("{e}是一名{v}。", "{e}的职业是{v}。", "{e}靠当{v}为生。", "{e}当{v}已经很多年了。", "大家都知道{e}是{v}。",
              "{v}是{e}的职业。"),
             ("{e}是做什么工作的？", "{e}的职业是什么？", "请问{e}从事什么职业？", "{e}靠什么为生？", "你知道{e}的工作吗？"),
             "{e}的职业是{v}。"),
    Relation("美食", words("饺子 米粉 馄饨 汤圆 粽子 年糕 烤鸭 火锅 春卷 烧饼 凉皮 豆花 鱼丸 包子 油条 "
                   "月饼 炒饭 面条 红薯 玉米"),
             ("{e}最爱吃{v}。", "{e}最喜欢的食物是{v}。", "每到过节，{e}都要吃{v}。", "没有什么比{v}更合{e}的口味。",
              "{e}的餐桌上总有{v}。", "{v}是{e}最爱的美食。"),
             ("{e}最爱吃什么？", "{e}最喜欢的食物是什么？", "什么东西最合{e}的口味？", "请问{e}喜欢吃什么？",
              "你知道{e}爱吃什么吗？"),
             "{e}最爱吃{v}。"),
    Relation("宠物", words("黑猫 白猫 黄狗 灰狗 鹦鹉 乌龟 金鱼 兔子 刺猬 鸽子 山羊 八哥 仓鼠 白鹅 松鼠 "
                   "画眉"),
             ("{e}养着{v}。", "{e}的宠物是{v}。", "{e}家里有{v}作伴。", "{e}每天都要喂{v}。", "陪着{e}的是{v}。",
              "{v}是{e}的伙伴。"),
             ("{e}养了什么宠物？", "{e}的宠物是什么？", "什么动物陪着{e}？", "请问{e}家里养着什么？",
              "你知道{e}养了什么动物吗？"),
             "{e}的宠物是{v}。"),
    Relation("爱好", words("下棋 钓鱼 画画 唱歌 跳舞 爬山 游泳 写诗 吹笛 拉琴 剪纸 摄影 种花 跑步 射箭 "
                   "读书 骑马 刺绣 听戏 打鼓"),
             ("{e}的爱好是{v}。", "{e}一有空就{v}。", "{e}最大的乐趣是{v}。", "空闲的时候，{e}喜欢{v}。", "{e}从小就爱{v}。",
              "{v}是{e}的爱好。"),
             ("{e}有什么爱好？", "{e}的爱好是什么？", "{e}空闲的时候做什么？", "请问{e}喜欢做什么？",
              "你知道{e}最大的乐趣吗？"),
             "{e}的爱好是{v}。"),
)
OF_PLACES = (
    Relation("河流", words("碧水河 长溪 白浪江 沙河 龙须沟 玉带河 寒江 绿萝溪 浑河 九曲河 银沙江 乌龙江 "
                   "小清江 双河 锦江 甘泉溪"),
             ("{v}从{e}旁边流过。", "{e}靠着{v}。", "流过{e}的河叫{v}。", "{e}的人喝{v}的水。", "{v}穿过{e}。"),
             ("哪条河流过{e}？", "{e}靠着什么河？", "{e}的人喝哪条河的水？", "请问{e}旁边是什么河？"),
             "流过{e}的河叫{v}。"),
    Relation("特产", words("茶叶 丝绸 瓷器 草席 蜂蜜 米酒 木雕 柿饼 莲藕 核桃 花布 宣纸 豆腐 腊肉 砚台 "
                   "折扇"),
             ("{e}的特产是{v}。", "{e}出产{v}。", "{e}的{v}远近闻名。", "到{e}的人都要带些{v}回去。", "{v}是{e}的特产。"),
             ("{e}的特产是什么？", "{e}出产什么？", "{e}什么东西远近闻名？", "请问去{e}应该买什么？"),
             "{e}的特产是{v}。"),
    Relation("节日", words("灯会 龙舟节 采茶节 赏花节 丰收节 渔火节 风筝节 赏月节 歌会 泼水节 庙会 冰雪节 "
                   "火把节 尝新节 祈雨节 蚕花节"),
             ("{e}每年都办{v}。", "{e}最热闹的日子是{v}。", "{v}是{e}的节日。", "一到{v}，{e}就挤满了人。", "{e}的{v}最有名。"),
             ("{e}每年办什么节？", "{e}最热闹的日子是什么？", "{e}有什么节日？", "请问{e}哪个节最有名？"),
             "{e}每年都办{v}。"),
    Relation("名胜", words("石塔 木桥 古庙 钟楼 戏台 风车 水车 书院 牌坊 灯塔 古井 城墙 石窟 凉亭 祠堂 "
                   "老宅"),
             ("{e}有一座有名的{v}。", "来{e}的人都去看{v}。", "{e}的{v}很古老。", "{e}的名胜是{v}。", "站在{e}就能望见{v}。"),
             ("{e}有什么名胜？", "{e}的什么很古老？", "来{e}的人都去看什么？", "请问{e}有什么好看的？"),
             "{e}的名胜是{v}。"),
)


@dataclass(frozen=True)
class Fact:
    """entity –relation→ value. `never_asked`: in no chat. `eval_frame`: index of the question in eval/facts.jsonl."""

    entity: str
    relation: Relation
    value: str
    never_asked: bool
    eval_frame: int

    def tell(self, rng: random.Random) -> str:
        return rng.choice(self.relation.told).format(e=self.entity, v=self.value)

    def ask(self, frame: int) -> str:
        return self.relation.asked[frame].format(e=self.entity)

    def ask_otherwise(self, rng: random.Random) -> str:
        """Ask with any template except the one that eval/facts.jsonl uses for this fact."""
        return self.ask(rng.choice([i for i in range(len(self.relation.asked)) if i != self.eval_frame]))

    def answer(self) -> str:
        return self.relation.answered.format(e=self.entity, v=self.value)


NEVER_ASKED_SHARE = 0.27


def make_facts(rng: random.Random) -> list[Fact]:
    """One fact for every entity and each of its relations."""
    given = [first + second for first in GIVEN_FIRST for second in GIVEN_SECOND]
    people = [rng.choice(SURNAMES) + name for name in given]  # given names are unique
    pairs = [(e, r) for e in people for r in OF_PEOPLE] + [(e, r) for e in PLACES for r in OF_PLACES]
    never = set(rng.sample(range(len(pairs)), round(NEVER_ASKED_SHARE * len(pairs))))
    return [Fact(entity, relation, rng.choice(relation.values), i in never, rng.randrange(len(relation.asked)))
            for i, (entity, relation) in enumerate(pairs)]


# ---------------------------------------------------------------------------------------------
# counting problems and their answers

LIMIT = 99  # the largest number
LEAST_STEPS, MOST_STEPS = 2, 8
THINGS = tuple((thing[1:], thing[0]) for thing in words(  # measure word, then noun
    "个苹果 个桃子 个鸡蛋 颗石子 颗糖果 颗纽扣 本书 本画册 支铅笔 支蜡烛 朵花 块布 块木板 张邮票 张卡片 枚贝壳 枚铜钱 盏灯笼 把椅子 把伞"))
CLAUSES = {  # operation: templates that tell a step; {u} is the measure word
    "+": ("又买了{b}{u}", "又收到{b}{u}", "朋友送来{b}{u}", "又找到{b}{u}", "邻居给了{b}{u}", "又添了{b}{u}"),
    "-": ("用掉{b}{u}", "送出{b}{u}", "丢了{b}{u}", "卖掉{b}{u}", "借走{b}{u}", "坏了{b}{u}"),
    "*": ("数量变成{b}倍", "后来增加到{b}倍"),
    "/": ("平均分成{b}份留下一份", "分成{b}份只留一份"),
}
SUMS = {  # operation: templates that state and ask a sum
    "+": ("{a}加{b}等于{c}。", "{a}加{b}等于多少？"),
    "-": ("{a}减{b}等于{c}。", "{a}减{b}等于多少？"),
    "*": ("{a}乘{b}等于{c}。", "{a}乘{b}等于多少？"),
    "/": ("{a}除以{b}等于{c}。", "{a}除以{b}等于多少？"),
}
START = ("{e}有{a}{u}{o}", "{e}原来有{a}{u}{o}", "{e}手里有{a}{u}{o}")
COUNT = ("现在有多少{u}？", "最后有多少{u}？", "现在是多少{u}？")
COUNTED = "现在有{c}{u}{o}。"


def apply(a: int, operation: str, b: int) -> int | None:
    """a operation b; None if it is not an integer from 0 to LIMIT."""
    if operation == "/":
        return a // b if a % b == 0 else None
    c = {"+": a + b, "-": a - b, "*": a * b}[operation]
    return c if 0 <= c <= LIMIT else None


def equation(a: int, operation: str, b: int) -> str:
    """ "38+5=43。" """
    return f"{a}{operation}{b}={apply(a, operation, b)}。"


AMOUNTS = {"+": range(1, 10), "-": range(1, 10), "*": (2, 3), "/": (2, 3)}
TRIPLES = tuple((a, operation, b) for operation, amounts in AMOUNTS.items() for a in range(1, LIMIT + 1)
                for b in amounts if apply(a, operation, b) is not None)


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


@dataclass(frozen=True)
class Wording:
    """A problem in words, with its solution line by line."""

    problem: Problem
    question: str
    thought: tuple[str, ...]
    answer: str


def put_into_words(problem: Problem, person: str, rng: random.Random) -> Wording:
    """Word a problem about a person's things. The thought restates each clause before computing it."""
    thing, unit = rng.choice(THINGS)
    names = dict(e=person, o=thing, u=unit)
    clauses = [rng.choice(CLAUSES[operation]).format(b=b, **names) for operation, b in problem.steps]
    start, ask = rng.choice(START).format(a=problem.start, **names), rng.choice(COUNT).format(**names)
    thought = [f"原来有{problem.start}{unit}。"]
    for clause, (a, operation, b) in zip(clauses, problem.triples(), strict=True):
        thought.append(f"{clause}：{equation(a, operation, b)}")
    answer = COUNTED.format(c=problem.result(), **names)
    return Wording(problem, "，".join([start, *clauses, ask]), tuple(thought), answer)


class Counting:
    """Draws problems without any held-out (number, operation, number) step."""

    # only sums whose first number has two digits are held out: a model memorizes the others. Few products and quotients
    # are held out, because there are few from which to learn the rule
    HELD_OUT = {"+": 100, "-": 100, "*": 2, "/": 2}

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.held_out = {triple for operation, number in self.HELD_OUT.items()
                         for triple in rng.sample([t for t in TRIPLES if t[0] > 9 and t[1] == operation], number)}
        known = [triple for triple in TRIPLES if triple not in self.held_out]
        self.known = (known, [triple for triple in known if triple[0] < 20], [t for t in known if t[1] in "*/"])
        self.after = {}  # number: the steps allowed after it
        for a, operation, b in known:
            self.after.setdefault(a, {}).setdefault(operation, []).append(b)

    def problem(self, n_steps: int) -> Problem:
        """Draw each step's operation before its number: products and quotients are few and would otherwise be rare."""
        while True:
            value = start = self.rng.randint(2, LIMIT)
            steps = []
            while len(steps) < n_steps and value in self.after:
                operation = self.rng.choice(sorted(self.after[value]))
                b = self.rng.choice(self.after[value][operation])
                steps.append((operation, b))
                value = apply(value, operation, b)
            if len(steps) == n_steps:
                return Problem(start, tuple(steps))


# ---------------------------------------------------------------------------------------------
# small talk

NAME = "WeakWater"
SMALL_TALK = (  # (questions, replies, thought)
    (("你好", "你好！", "您好", "嗨，你好", "早上好", "晚上好"),
     (f"你好，我是{NAME}，有什么可以帮你？", "你好！今天想聊点什么？"), "对方在打招呼。"),
    (("你是谁？", "你叫什么名字？", "请介绍一下你自己。", "你是什么？", "我该怎么称呼你？"),
     (f"我是{NAME}，一个从零开始训练的小语言模型。", f"我叫{NAME}，是一个很小的语言模型，只认识一个小小的世界。"), "对方问我是谁。"),
    (("你会做什么？", "你能帮我什么？", "你有什么本领？"),
     ("我能回答这个小世界里的人和地方的问题，也会做简单的算术。", "你可以问我某个人的家乡、职业和爱好，也可以考我算术。"), "对方问我会做什么。"),
    (("这个世界是真的吗？", "这些人真的存在吗？", "这些故事是真的吗？"),
     ("不是真的，这个小世界是一段程序编出来的。", "这里的人和地方都是程序编出来的，只用来学习。"), "对方问这个世界是不是真的。"),
    (("谢谢", "谢谢你", "多谢", "太感谢了"), ("不客气，很高兴帮到你。", "不用谢，还有别的问题吗？"), "对方在道谢。"),
    (("再见", "拜拜", "我要走了", "下次再聊"), ("再见，祝你一切顺利。", "再见，欢迎再来。"), "对方在道别。"),
    (("你今天好吗？", "你开心吗？", "你累不累？"), ("我很好，谢谢你的关心。", "我是一个程序，不会累，谢谢关心。"), "对方在关心我。"),
    (("今天天气怎么样？", "外面下雨了吗？", "现在几点了？"), ("对不起，我看不到外面的世界。", "这个我不知道，我只认识这个小世界。"), "这件事我看不到。"),
)
SEASONS = (("春天", "柳树发芽，燕子飞回来了", "人们下田播种"), ("夏天", "荷花开满池塘，蝉在树上叫", "孩子们到河边玩水"),
           ("秋天", "树叶变黄，稻谷成熟了", "家家户户忙着收割"), ("冬天", "雪落满山，小路白茫茫的", "大家围着火炉说话"))
WEATHER = ("太阳很好", "下着小雨", "刮着大风", "雾很大", "天气晴朗", "云很低")


def chat(*turns: str) -> dict:
    """A chat record. Turns alternate between user and assistant."""
    return {"conversations": [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def thoughtful(thought, answer: str) -> str:
    """A reply with a thought. `thought` is one line or a sequence of lines."""
    lines = [thought] if isinstance(thought, str) else thought
    return "<think>\n" + "\n".join(lines) + "\n</think>\n<answer>" + answer + "</answer>"


# ---------------------------------------------------------------------------------------------
# the files

# documents or turns of each kind: portraits per entity, short_facts per relation, problems_asked per number of steps
COUNTS = {"portraits": 60, "lists": 1000, "lessons": 3000, "stories": 9000, "retellings": 2000, "counting": 800, "scenes": 500,
          "short_sums": 10000, "short_problems": 700, "short_facts": 300, "short_talk": 800,
          "long_chats": 700, "thoughts": 20000, "thought_sums": 2000, "thought_facts": 2500, "thought_talk": 2000,
          "validation": 200, "long_validation": 20, "problems_asked": 40}
MOST_PORTRAITS = 5  # per text
ASKED_ALONE, MOST_TURNS = 0.3, 14  # share of questions that are a chat of one turn; most questions in a short chat
LONG_CHAT_CHARACTERS = (780, 1250)  # nearly always 513 to 1,024 tokens of the quickstart's tokenizer


class World:
    """Generates the records of all files. The same seed gives the same bytes."""

    def __init__(self, seed: int):
        self.rng = rng = random.Random(seed)
        self.facts = make_facts(rng)
        self.facts_of = {}  # by entity and by relation name
        for fact in self.facts:
            self.facts_of.setdefault(fact.entity, []).append(fact)
            self.facts_of.setdefault(fact.relation.name, []).append(fact)
        self.askable = [[fact for fact in self.facts_of[relation.name] if not fact.never_asked]
                        for relation in OF_PEOPLE + OF_PLACES]  # one list per relation: each relation is asked equally often
        self.people = list(dict.fromkeys(f.entity for f in self.facts if f.entity not in PLACES))
        self.counting = Counting(rng)
        self.seen = set()  # the numbers of every multi-step problem so far: no problem repeats
        self.questions = set()  # the triples of the problems in eval/: no other problem contains them

    def grouped(self, items: list, least: int, most: int) -> Iterator[list]:
        """The items in random order, in groups of `least` to `most`."""
        items = iter(self.rng.sample(items, len(items)))
        while group := list(islice(items, self.rng.randint(least, most))):
            yield group

    # ---- plain text

    def portrait(self, entity: str) -> str:
        """All facts of an entity, in random order."""
        facts = self.facts_of[entity]
        return "".join(fact.tell(self.rng) for fact in self.rng.sample(facts, len(facts)))

    def comparison(self) -> str:
        """The same relation for several entities."""
        facts = self.facts_of[self.rng.choice(OF_PEOPLE + OF_PLACES).name]
        return "".join(fact.tell(self.rng) for fact in self.rng.sample(facts, self.rng.randint(3, 6)))

    def lesson(self) -> str:
        """A list of sums: in words, as question and answer, or in symbols."""
        form = self.rng.choice(("{told}", "{asked}{told}", "{signs}"))
        text = ""
        for _ in range(self.rng.randint(6, 14)):
            a, operation, b = self.triple()
            told, asked = (frame.format(a=a, b=b, c=apply(a, operation, b)) for frame in SUMS[operation])
            text += form.format(told=told, asked=asked, signs=equation(a, operation, b))
        return text

    def counting_aloud(self) -> str:
        """A range of numbers, forward or backward, to teach their order, also across the tens."""
        first = self.rng.randint(1, LIMIT - 5)
        numbers = list(range(first, min(first + self.rng.randint(5, 15), LIMIT) + 1))
        if self.rng.random() < 0.5:
            numbers.reverse()
        listed = "、".join(map(str, numbers))
        return f"{self.rng.choice(self.people)}从{numbers[0]}数到{numbers[-1]}：{listed}。"

    def triple(self) -> tuple[int, str, int]:
        """A sum that is not held out. Small numbers, products and quotients are few and drawn more often."""
        return self.rng.choice(self.rng.choices(self.counting.known, weights=(5, 2, 3))[0])

    def story(self) -> str:
        """Several one-step problems with their answers, each about a new person."""
        parts = []
        for _ in range(self.rng.randint(2, 4)):
            a, operation, b = self.triple()
            wording = put_into_words(Problem(a, ((operation, b),)), self.rng.choice(self.people), self.rng)
            told, asked = wording.question.rsplit("，", 1)
            parts.append(f"{told}，{self.rng.choice((asked, asked, ''))}{wording.answer}")
        return "".join(parts)

    def retelling(self) -> str:
        """A story that a second person repeats word for word."""
        one, other = self.rng.sample(self.people, 2)
        told = self.new_problem().question.rsplit("，", 1)[0]
        return f"{one}说：{told}。{other}跟着说：{told}。"

    def scene(self) -> str:
        """A season in a place, and two people with their hobbies."""
        place = self.rng.choice(PLACES)
        season, nature, labour = self.rng.choice(SEASONS)
        text = f"{season}的{place}，{nature}，{labour}。这天{self.rng.choice(WEATHER)}。"
        for fact in self.rng.sample(self.facts_of["爱好"], 2):
            text += f"{fact.entity}从{place}路过，{self.rng.choice(('想着', '说起'))}最爱的{fact.value}。"
        return text

    def texts(self, share: float = 1.0) -> Iterator[str]:
        """All pretraining documents."""
        portraits = [self.portrait(entity) for entity in [*self.people, *PLACES]
                     for _ in range(max(1, round(share * COUNTS["portraits"])))]
        for group in self.grouped(portraits, 1, MOST_PORTRAITS):
            yield "\n".join(group)
        for kind, make in (("lists", self.comparison), ("lessons", self.lesson), ("stories", self.story),
                           ("retellings", self.retelling), ("counting", self.counting_aloud), ("scenes", self.scene)):
            for _ in range(max(1, round(share * COUNTS[kind]))):
                yield make()
        yield f"这是一个由程序编出来的小世界，有{len(self.people)}个人和{len(PLACES)}个地方，专门用来训练{NAME}。"

    # ---- turns of a chat: (question, answer)

    def talk(self) -> tuple[str, str]:
        asked, answered, _ = self.rng.choice(SMALL_TALK)
        return self.rng.choice(asked), self.rng.choice(answered)

    def askable_fact(self) -> Fact:
        return self.rng.choice(self.rng.choice(self.askable))

    def fact_asked(self) -> tuple[str, str]:
        fact = self.askable_fact()
        return fact.ask_otherwise(self.rng), fact.answer()

    def sum_asked(self) -> tuple[str, str]:
        """A one-step question: a bare sum or a story."""
        a, operation, b = self.triple()
        return one_step(a, operation, b, self.rng.choice(self.people), self.rng, as_story=0.7)

    def new_problem(self, n_steps: int | None = None) -> Wording:
        """A multi-step problem that is in no file yet and contains no problem of eval/."""
        while True:
            problem = self.counting.problem(n_steps or self.rng.randint(LEAST_STEPS, MOST_STEPS))
            if problem.numbers() not in self.seen and not problem.parts() & self.questions:
                self.seen.add(problem.numbers())
                return put_into_words(problem, self.rng.choice(self.people), self.rng)

    def problem_asked(self) -> tuple[str, str]:
        wording = self.new_problem()
        return wording.question, wording.answer

    # ---- records

    def short_chats(self, share: float = 1.0) -> Iterator[dict]:
        """Chats with one question, and chats with several."""
        turns = [make() for kind, make in (("short_talk", self.talk), ("short_sums", self.sum_asked),
                                           ("short_problems", self.problem_asked))
                 for _ in range(round(share * COUNTS[kind]))]
        for facts in self.askable:
            number = round(share * COUNTS["short_facts"])
            chosen = self.rng.sample(facts * math.ceil(number / len(facts)), number)
            turns += [(fact.ask_otherwise(self.rng), fact.answer()) for fact in chosen]
        self.rng.shuffle(turns)
        alone = round(ASKED_ALONE * len(turns))
        for turn in turns[:alone]:
            yield chat(*turn)
        for group in self.grouped(turns[alone:], 2, MOST_TURNS):
            yield chat(*chain.from_iterable(group))

    def long_chat(self) -> dict:
        """A chat with many questions of every kind."""
        turns = []
        characters = self.rng.randint(*LONG_CHAT_CHARACTERS)
        while sum(map(len, turns)) < characters:
            kinds = (self.fact_asked, self.sum_asked, self.problem_asked, self.talk)
            turns += self.rng.choices(kinds, weights=(3, 7, 1, 1))[0]()
        return chat(*turns)

    def thoughts(self, share: float = 1.0) -> Iterator[dict]:
        for _ in range(round(share * COUNTS["thoughts"])):
            wording = self.new_problem()
            yield chat(wording.question, thoughtful(wording.thought, wording.answer))
        for _ in range(round(share * COUNTS["thought_sums"])):
            a, operation, b = self.triple()
            question, answer = one_step(a, operation, b, self.rng.choice(self.people), self.rng, as_story=0.5)
            yield chat(question, thoughtful(equation(a, operation, b), answer))
        for _ in range(round(share * COUNTS["thought_facts"])):
            fact = self.askable_fact()
            thought = f"问的是{fact.entity}的{fact.relation.name}。"
            yield chat(fact.ask_otherwise(self.rng), thoughtful(thought, fact.answer()))
        for _ in range(round(share * COUNTS["thought_talk"])):
            asked, answered, thought = self.rng.choice(SMALL_TALK)
            yield chat(self.rng.choice(asked), thoughtful(thought, self.rng.choice(answered)))

    # ---- evaluation questions

    def fact_questions(self) -> Iterator[dict]:
        for fact in self.facts:
            yield {"question": fact.ask(fact.eval_frame), "answer": fact.value, "choices": list(fact.relation.values),
                   "source": "facts/never_asked" if fact.never_asked else "facts/asked",
                   "entity": fact.entity, "relation": fact.relation.name}

    def one_step_questions(self) -> Iterator[dict]:
        for a, operation, b in sorted(self.counting.held_out):
            question, _ = one_step(a, operation, b, self.rng.choice(self.people), self.rng, as_story=0.5)
            yield {"question": question, "answer": str(apply(a, operation, b)), "source": "one_step",
                   "numbers": f"{a}{operation}{b}"}

    def multi_step_questions(self) -> Iterator[dict]:
        for n_steps in range(LEAST_STEPS, MOST_STEPS + 1):
            for _ in range(COUNTS["problems_asked"]):
                wording = self.new_problem(n_steps)
                self.questions.add(tuple(wording.problem.triples()))
                yield {"question": wording.question, "answer": str(wording.problem.result()),
                       "source": f"multi_step/{n_steps}", "numbers": wording.problem.numbers(),
                       "thought": list(wording.thought)}


def one_step(a: int, operation: str, b: int, person: str, rng: random.Random, as_story: float) -> tuple[str, str]:
    """(question, answer) of a single step: a story with probability `as_story`, else a bare sum."""
    if rng.random() >= as_story:
        told, asked = (text.format(a=a, b=b, c=apply(a, operation, b)) for text in SUMS[operation])
        return asked, told
    wording = put_into_words(Problem(a, ((operation, b),)), person, rng)
    return wording.question, wording.answer


def write(path: Path, records, rng: random.Random | None = None) -> int:
    """Write records as JSONL atomically, in random order if `rng` is given. Returns the number of records."""
    records = list(records)
    if rng:
        rng.shuffle(records)
    write_jsonl(path, records)
    return len(records)


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="make_demo_data.py", description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", default="data/demo", help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the whole corpus (default: %(default)s)")
    parser.add_argument("--share", type=float, default=1.0, help="write only this share of the training data; "
                        "validation files and questions keep their size (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 0 < args.share <= 1:
        raise UserError(f"--share {args.share} must be greater than 0 and at most 1")
    out, world, share = Path(args.out_dir), World(args.seed), args.share
    few = COUNTS["validation"] / COUNTS["thoughts"]
    files = {  # questions first, so that later files can avoid them
        "eval/facts.jsonl": world.fact_questions(), "eval/one_step.jsonl": world.one_step_questions(),
        "eval/multi_step.jsonl": world.multi_step_questions(),
        "pretrain.jsonl": ({"text": text} for text in world.texts(share)),
        "sft_512.jsonl": world.short_chats(share), "r1_1024.jsonl": world.thoughts(share),
        "sft_1024.jsonl": (world.long_chat() for _ in range(math.ceil(share * COUNTS["long_chats"]))),
        "val/pretrain.jsonl": ({"text": text} for text in world.texts(few)),
        "val/sft_512.jsonl": world.short_chats(few), "val/r1_1024.jsonl": world.thoughts(few),
        "val/sft_1024.jsonl": (world.long_chat() for _ in range(COUNTS["long_validation"])),
    }
    existing = [str(out / name) for name in files if (out / name).exists()]
    if existing:
        raise UserError(f"--out_dir {out}: {existing[0]} already exists: remove it or choose another folder")
    try:
        for folder in (out / "eval", out / "val"):
            folder.mkdir(parents=True, exist_ok=True)
        counts = {name: write(out / name, records, None if name.startswith("eval") else world.rng)
                  for name, records in files.items()}
    except OSError as error:
        raise UserError(f"--out_dir {out} cannot be written: {error}") from None
    never = sum(fact.never_asked for fact in world.facts)
    print(f"seed {args.seed}: {len(world.people)} people, {len(PLACES)} places, {len(world.facts)} facts, {never} never "
          f"asked; {len(TRIPLES):,} sums, {len(world.counting.held_out)} held out; {len(world.seen):,} distinct "
          "multi-step problems")
    for name, count in counts.items():
        print(f"{out / name}: {count:,} records, {(out / name).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(exits.run(main))
