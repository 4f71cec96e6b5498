"""Generates the built-in corpus, a small Chinese world, from a seed, in the project's data formats.

    python make_demo_data.py --out_dir data/demo --seed 1

Each person has a hometown, a job, a favorite dish, a pet and a hobby. Each place has a river, a specialty, a festival
and a sight. Word problems count the things of anybody: names, things and wordings are composed (demo/). The files:

    pretrain.jsonl     portraits, comparisons, scenes, retellings, counting, sums and worked problems; contains every fact
    rehearsal.jsonl    what pretrain.jsonl says of the world alone, to mix into later stages
    sft_512.jsonl      short chats: small talk, facts, sums, problems of one step, follow-ups, what cannot be known
    sft_1024.jsonl     long chats of the same kinds, nearly all of 513 to 1,024 tokens of the quickstart's tokenizer
    r1_1024.jsonl      replies that think first: mostly problems, some of every other kind
    val/               validation texts, chats and thoughts of the same kinds; some small talk and sums are also in training
    eval/              questions with checkable answers

Held-out guarantees, which tests/test_demo_data.py checks in the files:

    facts, asked         chats ask for the fact, but never in the wording of eval/facts.jsonl
    facts, never_asked   no chat and no thought mentions the fact; only pretrain.jsonl contains it
    one_step             (number, operation, number) appears in no training file, not even as a step of a longer
                         problem; its inverse may (26-3 for the question 23+3). two_digits: 25+38, reported apart
    multi_step           the numbers and steps appear in no training file, not even as part of a longer problem
    elsewhere            problems of 1 to 5 steps, with numbers held out as above, and beside them
                         a  names, things and measure words that are in no training file
                         b  clauses in combinations of verb, time word and frame that are in no training file
                         c  the wording of the question likewise
                         d  all of a to c
                         e  verbs that are in no training file
    follow_up            questions about the reply before: another relation, another person, one more step
    unknown              people, places, topics and numbers of three digits or more that are in no training file
"""

import argparse
import math
import random
import re
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from common import exits
from common.files import write_jsonl
from Config import OneLineParser, UserError
from demo.facts import OF_PEOPLE, OF_PLACES, PLACES, RELATIONS, Fact, make_facts, person_name, unpunctuated
from demo.problems import (
    HELD_OUT,
    IN_THE_WORLD,
    KNOWN,
    LEAST_STEPS,
    LIMIT,
    MOST_STEPS,
    TRIPLES,
    Counting,
    Problem,
    Story,
    Style,
    Wording,
    Writer,
    apply,
    asked_up_to_number,
    equations,
    sum_asked,
)
from demo.talk import (
    LARGE_QUESTIONS,
    LARGE_SHARE,
    NAME,
    REPLIES,
    SEASONS,
    TOO_LARGE_THOUGHT,
    UNKNOWN_THOUGHT,
    WEATHER,
    enlarged,
    small_talk,
    unanswerable,
)
from demo.words import (
    GAIN_HELD_OUT,
    GROUPS,
    KIN,
    LOSE_HELD_OUT,
    NICKNAMES,
    PLACES_OF_THINGS,
    SURNAMES,
    THINGS,
    THINGS_HELD_OUT,
    TITLES,
    UNITS,
    UNITS_HELD_OUT,
    random_word,
)


def chat(*turns: str) -> dict:
    """A chat record. Turns alternate between user and assistant."""
    return {"conversations": [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def thoughtful(thought: tuple[str, ...], answer: str) -> str:
    """A reply with a thought of these lines."""
    return "<think>\n" + "\n".join(thought) + "\n</think>\n<answer>" + answer + "</answer>"


# ---------------------------------------------------------------------------------------------
# the files

# documents or turns of each kind: portraits per entity, facts per relation; of eval/: multi_step per number of steps,
# elsewhere per part and number of steps, unknown per kind
COUNTS = {"portraits": 45, "lists": 400, "lessons": 6500, "stories": 2500, "worked": 4100, "retellings": 1500, "counting": 500,
          "rosters": 3000, "scenes": 300,
          "short_facts": 500, "short_problems": 500, "short_stories": 6500, "short_sums": 3000, "short_talk": 2000,
          "short_people": 3000, "short_unknown": 2000, "short_follow_ups": 2500, "long_chats": 250,
          "thought_problems": 9500, "thought_stories": 2500, "thought_sums": 2000, "thought_facts": 205, "thought_talk": 800,
          "thought_people": 1000, "thought_unknown": 1200, "thought_follow_ups": 1600,
          "long_validation": 20, "multi_step": 40, "elsewhere": 20, "unknown": 100}
VALIDATION_SHARE = 0.02
MOST_PORTRAITS = 5  # per text
ASKED_ALONE, MOST_TURNS = 0.4, 10  # share of questions that are a chat of one turn; most questions in a short chat
LONG_CHAT_CHARACTERS = (430, 700)  # nearly always 513 to 1,024 tokens of the quickstart's tokenizer
LONG_SUM_SHARE = 0.2  # of the problems of one step, and of the sums
RANDOM_SHARE = 0.3  # of names, things and measure words are random hanzi
RANDOM_PLACES = 0.25  # of the places that hold things
GROUP_SHARE = 0.08  # of those who give and get are several people
EARLIER_TURN = 0.3  # chance that another turn stands before a question that is thought about
# share of earlier replies in these chats that thought, so that their answer alone is left: of those that a follow-up goes
# back to, and of others, few, since they are learned as replies without a thought too
ANSWER_ALONE, OTHERS_ALONE = 0.7, 0.2
FILES = tuple(f"{folder}{name}.jsonl" for folder in ("", "val/") for name in ("pretrain", "sft_512", "sft_1024", "r1_1024")
              ) + ("rehearsal.jsonl",) + tuple(f"eval/{name}.jsonl" for name in (
                  "facts", "one_step", "multi_step", "elsewhere", "follow_up", "unknown"))
FOLLOW_UPS = {"relation": 60, "entity": 40, "step": 60, "sum": 40}  # questions of each kind in eval/follow_up.jsonl


class Turn(NamedTuple):
    """A question, its reply without a thought, the lines of a thought, and the answer that stands behind that."""

    question: str
    reply: str
    thought: tuple[str, ...]
    answer: str


class World:
    """Generates the records of all files. The same seed gives the same bytes."""

    def __init__(self, seed: int):
        self.rng = rng = random.Random(seed)
        self.facts = make_facts(rng)
        self.facts_of: dict[str, list[Fact]] = {}  # by entity and by relation name
        for fact in self.facts:
            self.facts_of.setdefault(fact.entity, []).append(fact)
            self.facts_of.setdefault(fact.relation.name, []).append(fact)
        self.askable = [[fact for fact in self.facts_of[relation.name] if not fact.never_asked]
                        for relation in RELATIONS]  # one list per relation: each relation is asked equally often
        self.people = list(dict.fromkeys(f.entity for f in self.facts if f.entity not in PLACES))
        self.counting, self.writer = Counting(rng), Writer(rng)
        self.seen = set()  # the numbers of every multi-step problem so far: no problem repeats
        self.questions = set()  # the triples of the problems in eval/: no other problem contains them

    def grouped(self, items: list, least: int, most: int) -> Iterator[list]:
        """The items in random order, in groups of `least` to `most`."""
        items = iter(self.rng.sample(items, len(items)))
        while group := list(islice(items, self.rng.randint(least, most))):
            yield group

    # ---- names and things

    def name(self) -> str:
        """A person: of random hanzi, of the usual kind, with a title, of the world, a nickname or a relative."""
        rng, kind = self.rng, self.rng.random()
        if kind < RANDOM_SHARE:
            return random_word(rng, rng.choice((2, 2, 3)))
        if kind < 0.55:
            return person_name(rng)
        if kind < 0.6:
            return rng.choice(SURNAMES) + rng.choice(TITLES)
        if kind < 0.72:
            return rng.choice(self.people)
        return rng.choice(NICKNAMES) if kind < 0.84 else rng.choice(KIN)

    def thing(self) -> tuple[str, str]:
        """(thing, measure word)."""
        rng = self.rng
        if rng.random() < 1 - RANDOM_SHARE:
            return rng.choice(THINGS)
        thing = rng.choice(THINGS)[0] if rng.random() < 0.2 else random_word(rng, rng.choice((1, 2, 2, 2, 3)))
        unit = rng.choice(UNITS)
        while rng.random() < 0.4 or unit in UNITS_HELD_OUT:
            unit = random_word(rng, 1)
        return thing, unit

    def place_of_things(self) -> str:
        """A place that holds things: a usual one, or of random hanzi."""
        if self.rng.random() < RANDOM_PLACES:
            return random_word(self.rng, self.rng.randint(1, 3)) + self.rng.choice("里上")
        return self.rng.choice(PLACES_OF_THINGS)

    def story(self) -> Story:
        """Who has what."""
        rng, kind = self.rng, self.rng.random()
        owner, pronoun = (self.place_of_things(), "") if kind < 0.06 else ("我", "我") if kind < 0.14 else (
            self.name(), rng.choice("他他她"))
        # a group is never the first, whose number of things is compared with the owner's
        second = rng.choice(GROUPS) if rng.random() < 2 * GROUP_SHARE else self.name()
        first = self.name()
        while first == owner:
            first = self.name()
        others = tuple(name for name in (first, second) if name != owner)
        return Story(owner, pronoun, *self.thing(), others)

    # ---- plain text

    def portrait(self, entity: str) -> str:
        """All facts of an entity, in random order."""
        facts = self.facts_of[entity]
        return "".join(fact.tell(self.rng) for fact in self.rng.sample(facts, len(facts)))

    def comparison(self) -> str:
        """The same relation for several entities."""
        facts = self.facts_of[self.rng.choice(RELATIONS).name]
        return "".join(fact.tell(self.rng) for fact in self.rng.sample(facts, self.rng.randint(3, 6)))

    def triples(self, n: int) -> list[tuple[int, str, int]]:
        """Sums for one text. None goes on from the one before: by chance they could be the steps of a held-out problem."""
        chosen: list[tuple[int, str, int]] = []
        while len(chosen) < n:
            long = self.rng.random() < LONG_SUM_SHARE
            triple = self.counting.long_sum() if long else self.counting.triple()
            if not chosen or apply(*chosen[-1]) != triple[0]:
                chosen.append(triple)
        return chosen

    def lesson(self) -> str:
        """A list of sums in symbols, some behind a question."""
        asked, text = self.rng.random() < 0.25, []
        for triple in self.triples(self.rng.randint(6, 14)):
            text.append((sum_asked(self.rng, *triple) + "\n" if asked else "") + f"{equations(*triple)}。")
        return ("\n" if asked else "").join(text)

    def counting_aloud(self) -> str:
        """A range of numbers, forward or backward, to teach their order, also across the tens."""
        first = self.rng.randint(1, LIMIT - 5)
        numbers = list(range(first, min(first + self.rng.randint(5, 15), LIMIT) + 1))
        if self.rng.random() < 0.5:
            numbers.reverse()
        listed = "、".join(map(str, numbers))
        return f"{self.name()}从{numbers[0]}数到{numbers[-1]}：{listed}。"

    def told_story(self) -> str:
        """Several problems of one step with their answers, each about somebody else."""
        turns = [problem_turn(self.one_step(triple)) for triple in self.triples(self.rng.randint(2, 4))]
        return "\n".join(f"{turn.question}{turn.reply}" for turn in turns)

    def worked_problem(self) -> str:
        """A problem, its thought and its answer, as text."""
        wording = self.new_problem() if self.rng.random() < 0.7 else self.one_step()
        return "\n".join([wording.question, *wording.thought, wording.answer])

    def retelling(self) -> str:
        """Words that are repeated: somebody lists things or names, and a second person says them again."""
        rng = self.rng
        one, other = self.name(), self.name()
        if rng.random() < 0.5:
            told = "、".join(f"{rng.randint(1, LIMIT)}{unit}{thing}" for thing, unit in (
                self.thing() for _ in range(rng.randint(2, 5))))
            return f"{one}有{told}。{other}说：{one}有{told}。"
        names = "、".join(self.name() for _ in range(rng.randint(3, 6)))
        return f"{one}说：{names}。{other}跟着说：{names}。"

    def roster(self) -> str:
        """Names, and who of them is in the world."""
        names = []
        for _ in range(self.rng.randint(5, 9)):
            relation = self.rng.choice((OF_PEOPLE[0], OF_PEOPLE[0], OF_PEOPLE[0], OF_PLACES[0]))
            if self.rng.random() < 0.5:
                names.append(f"{self.rng.choice(self.facts_of[relation.name]).entity}：认识。")
            else:
                names.append(f"{self.stranger(relation)}：不认识。")
        return "".join(names)

    def scene(self) -> str:
        """A season in a place, and two people with their hobbies."""
        place = self.rng.choice(PLACES)
        season, nature, work = self.rng.choice(SEASONS)
        text = f"{season}的{place}，{nature}，{work}。这天{self.rng.choice(WEATHER)}。"
        for fact in self.rng.sample(self.facts_of["爱好"], 2):
            text += f"{fact.entity}从{place}路过，{self.rng.choice(('想着', '说起'))}最爱的{fact.value}。"
        return text

    def texts_of_the_world(self, share: float) -> Iterator[str]:
        """Portraits, several a text, and who is in the world and who is not."""
        portraits = [self.portrait(entity) for entity in [*self.people, *PLACES]
                     for _ in range(max(1, round(share * COUNTS["portraits"])))]
        for group in self.grouped(portraits, 1, MOST_PORTRAITS):
            yield "\n".join(group)
        for _ in range(max(1, round(share * COUNTS["rosters"]))):
            yield self.roster()

    def other_texts(self, share: float) -> Iterator[str]:
        """All other pretraining documents."""
        for kind, make in (("lists", self.comparison), ("lessons", self.lesson), ("stories", self.told_story),
                           ("worked", self.worked_problem), ("retellings", self.retelling),
                           ("counting", self.counting_aloud), ("scenes", self.scene)):
            for _ in range(max(1, round(share * COUNTS[kind]))):
                yield make()
        yield f"这是一个由程序编出来的小世界，有{len(self.people)}个人和{len(PLACES)}个地方，专门用来训练{NAME}。"

    # ---- turns of a chat

    def talk(self) -> Turn:
        question, reply, thought = small_talk(self.rng)
        return Turn(question, reply, (thought,), reply)

    def askable_fact(self) -> Fact:
        return self.rng.choice(self.rng.choice(self.askable))

    def fact_asked(self, fact: Fact | None = None) -> Turn:
        fact = fact or self.askable_fact()
        return fact_turn(fact.ask_otherwise(self.rng), fact)

    def stranger(self, relation) -> str:
        """A person or place that is not in the world; half of the people resemble one who is."""
        rng = self.rng
        if relation not in OF_PEOPLE:
            return random_word(rng, 2) + rng.choice("镇村寨谷湾坡山城县市岛")
        known = set(self.people)
        while True:
            kind, one = rng.random(), rng.choice(self.people)
            if kind < 0.25:
                name = rng.choice(SURNAMES) + one[1:]
            elif kind < 0.5:
                other = person_name(rng)
                name = one[:2] + other[-1]
            else:
                name = person_name(rng) if kind < 0.85 else random_word(rng, rng.choice((2, 3)))
            if not any(name in person or person in name for person in known):
                return name

    def stranger_asked(self) -> Turn:
        """A question of the world's own form about somebody who is not in it."""
        relation = self.rng.choice(RELATIONS if self.rng.random() < 0.2 else OF_PEOPLE)
        name = self.stranger(relation)
        question = unpunctuated(self.rng, self.rng.choice(relation.asked).format(e=name))
        return self.refusal(question, name, relation)

    def refusal(self, question: str, name: str, relation) -> Turn:
        """A turn that asks about somebody unknown."""
        reply = self.rng.choice(REPLIES["person" if relation in OF_PEOPLE else "place"])
        return Turn(question, reply, (f"{name}：不认识。",), reply)

    def unknown_asked(self) -> Turn:
        """A question about the world outside, or with too large numbers."""
        if self.rng.random() < LARGE_SHARE:
            reply = self.rng.choice(REPLIES["large"])
            return Turn(self.too_large(), reply, (TOO_LARGE_THOUGHT,), reply)
        reply = self.rng.choice(REPLIES["other"])
        return Turn(unanswerable(self.rng)[0], reply, (UNKNOWN_THOUGHT,), reply)

    def too_large(self, held_out: bool = False) -> str:
        """A sum or a problem of one step with a number of three digits or more. Held out: such numbers are in no
        training file."""
        question = sum_asked(self.rng, *self.triples(1)[0]) if self.rng.random() < 0.85 else self.one_step().question
        return enlarged(self.rng, question, held_out)

    def one_step(self, triple: tuple[int, str, int] | None = None) -> Wording:
        """A problem of one step."""
        return self.writer.in_one_step(triple or self.triples(1)[0], self.story())

    def story_asked(self) -> Turn:
        return problem_turn(self.one_step())

    def sum_asked(self) -> Turn:
        """A bare sum."""
        return sum_turn(self.rng, self.triples(1)[0])

    def draw_problem(self, n_steps: int, operations: str = "+-*/") -> Problem:
        """A multi-step problem that is in no file yet and contains no problem of eval/."""
        while True:
            problem = self.counting.problem(n_steps, operations)
            if problem.numbers() not in self.seen and not problem.parts() & self.questions:
                self.seen.add(problem.numbers())
                return problem

    def new_problem(self) -> Wording:
        n_steps = max(self.rng.randint(LEAST_STEPS, MOST_STEPS) for _ in range(3))  # most of them long
        return self.writer.put(self.draw_problem(n_steps), self.story())

    def problem_asked(self) -> Turn:
        return problem_turn(self.new_problem())

    def follow_up(self, thinking: bool, kind: str | None = None, triple=None) -> tuple[list[str], Turn]:
        """(earlier question and reply, a turn that can only be understood from them)."""
        kind = kind or self.rng.choice(("relation", "entity", "stranger", "step", "step", "sum"))
        if kind in ("step", "sum"):
            make = self.one_more_step if kind == "step" else self.sum_goes_on
            first, turn = make(triple or self.counting.triple())
            return self.said(first, ANSWER_ALONE if thinking else 0), turn
        return self.asked_about_another(kind)

    def asked_about_another(self, kind: str) -> tuple[list[str], Turn]:
        """A fact, and then another relation of the same entity, or the same relation of another: known or a stranger."""
        rng, fact = self.rng, self.askable_fact()
        asked, stranger = [fact.ask_otherwise(rng), fact.answer()], self.stranger(fact.relation)
        if kind == "stranger" and rng.random() < 0.5:  # the stranger comes first
            question = unpunctuated(rng, rng.choice(fact.relation.asked).format(e=stranger))
            first = self.refusal(question, stranger, fact.relation)
            return [first.question, first.reply], self.refusal(fact.ask_again(rng), stranger, fact.relation)
        if kind == "stranger":
            return asked, self.refusal(f"那{stranger}呢？", stranger, fact.relation)
        others = [other for other in self.facts_of[fact.entity if kind == "relation" else fact.relation.name]
                  if other != fact and not other.never_asked]
        if not others:
            return self.asked_about_another(kind)
        other = rng.choice(others)
        again = (other.ask_again(rng) if kind == "relation" else
                 rng.choice(("那{e}呢？", "{e}呢？", "那么{e}呢？")).format(e=other.entity))
        return asked, fact_turn(again, other)

    def step_before(self, triple: tuple[int, str, int]) -> tuple[int, str, int]:
        """A sum that gives the first number of `triple`. The two together are no problem of eval/."""
        while True:
            first = self.rng.choice(self.counting.before[triple[0]])
            if (first, triple) not in self.questions:
                return first

    def sum_goes_on(self, triple: tuple[int, str, int]) -> tuple[Turn, Turn]:
        """A sum whose result is the first number of `triple`, and then that: 再加5呢？"""
        a, operation, b = triple
        first = self.step_before(triple)
        word = {"+": "加", "-": "减", "*": "乘", "/": "除以"}[operation]
        again = self.rng.choice((f"再{word}{b}呢？", f"再{word}{b}等于多少？", f"再{word}{b}是多少？", f"再{word}{b}",
                                 f"{word}{b}呢？"))
        return sum_turn(self.rng, first), Turn(
            again, f"{equations(*triple)}。", (f"刚才是{a}", equations(*triple)), f"等于{apply(*triple)}。")

    def one_more_step(self, triple: tuple[int, str, int]) -> tuple[Turn, Turn]:
        """A problem whose result is the first number of `triple`, and then that: 再给他5个呢？"""
        rng, story, (a, operation, b) = self.rng, self.story(), triple
        first, *step = self.step_before(triple)
        wording = self.writer.put(Problem(first, (tuple(step),)), story)
        begin, rest = self.writer.next_clause(operation, b, story)
        ask = rng.choice((*("呢？",) * 4, "呢", f"，还有多少{story.unit}？", f"，现在有几{story.unit}？",
                          f"，是多少{story.unit}？"))
        lead = rng.choice(("", "", "如果", "要是", "那", "那么"))
        answer = f"有{apply(*triple)}{story.unit}。"
        return problem_turn(wording), Turn(
            f"{lead}{begin}{b}{rest}{ask}", f"{equations(*triple)}，{answer}",
            (f"刚才是{a}", f"{begin}{b}：{equations(*triple)}", asked_up_to_number(ask.lstrip("，"))), answer)

    def said(self, turn: Turn, alone: float) -> list[str]:
        """An earlier turn: without a thought, or (in a share `alone`) what is left of a reply that thought."""
        return [turn.question, turn.answer if self.rng.random() < alone else turn.reply]

    # ---- records

    def turns(self, share: float, prefix: str) -> list[tuple[list[str], Turn]]:
        """(earlier turns, turn) of each kind whose name in COUNTS begins with `prefix`, shuffled."""
        kinds = {"problems": self.problem_asked, "stories": self.story_asked, "sums": self.sum_asked, "talk": self.talk,
                 "people": self.stranger_asked, "unknown": self.unknown_asked}
        turns = [([], make()) for kind, make in kinds.items() for _ in range(round(share * COUNTS.get(prefix + kind, 0)))]
        turns += [self.follow_up(prefix == "thought_") for _ in range(round(share * COUNTS[prefix + "follow_ups"]))]
        for facts in self.askable:
            number = round(share * COUNTS[prefix + "facts"])
            chosen = self.rng.sample(facts * math.ceil(number / len(facts)), number)
            turns += [([], self.fact_asked(fact)) for fact in chosen]
        self.rng.shuffle(turns)
        return turns

    def short_chats(self, share: float = 1.0) -> Iterator[dict]:
        """Chats with one question, and chats with several."""
        turns = self.turns(share, "short_")
        alone = round(ASKED_ALONE * len(turns))
        for group in [*([turn] for turn in turns[:alone]), *self.grouped(turns[alone:], 2, MOST_TURNS)]:
            yield chat(*chain.from_iterable([*before, turn.question, turn.reply] for before, turn in group))

    def any_turn(self, thinking: bool = False) -> list[str]:
        """A question of any kind and its reply without a thought, behind what it follows."""
        kinds = (self.fact_asked, self.story_asked, self.sum_asked, self.talk, self.stranger_asked, self.unknown_asked)
        kind = self.rng.choices((*kinds, None), weights=(6, 6, 3, 3, 1, 2, 2))[0]
        before, turn = self.follow_up(thinking) if kind is None else ([], kind())
        return [*before, *self.said(turn, OTHERS_ALONE if thinking else 0)]

    def long_chat(self) -> dict:
        """A chat with many questions of every kind."""
        turns, characters = [], self.rng.randint(*LONG_CHAT_CHARACTERS)
        while sum(map(len, turns)) < characters:
            turns += self.any_turn()
        return chat(*turns)

    def thoughts(self, share: float = 1.0) -> Iterator[dict]:
        """Chats whose last reply thinks; some have other turns before."""
        for before, turn in self.turns(share, "thought_"):
            earlier = []
            while self.rng.random() < EARLIER_TURN:
                earlier += self.any_turn(thinking=True)
            yield chat(*earlier, *before, turn.question, thoughtful(turn.thought, turn.answer))

    # ---- evaluation questions

    def fact_questions(self) -> Iterator[dict]:
        for fact in self.facts:
            yield {"question": fact.ask(fact.eval_frame), "answer": fact.value, "choices": list(fact.relation.values),
                   "source": "facts/never_asked" if fact.never_asked else "facts/asked",
                   "entity": fact.entity, "relation": fact.relation.name}

    def world_story(self) -> Story:
        """A story of the world's people and things."""
        owner, *others = self.rng.sample(self.people, 3)
        return Story(owner, self.rng.choice("他她"), *self.rng.choice(THINGS), tuple(others))

    def one_step_questions(self) -> Iterator[dict]:
        for triples, source in ((self.counting.held_out, "one_step"), (self.counting.long_held_out, "one_step/two_digits")):
            for triple in sorted(triples):
                question = (sum_asked(self.rng, *triple) if self.rng.random() < 0.5 else
                            self.writer.in_one_step(triple, self.world_story(), IN_THE_WORLD).question)
                yield {"question": question, "answer": str(apply(*triple)), "source": source,
                       "numbers": "".join(map(str, triple))}

    def multi_step_questions(self) -> Iterator[dict]:
        for n_steps in range(LEAST_STEPS, MOST_STEPS + 1):
            for _ in range(COUNTS["multi_step"]):
                problem = self.draw_problem(n_steps)
                self.questions.add(tuple(problem.triples()))
                wording = self.writer.put(problem, self.world_story(), IN_THE_WORLD)
                yield {"question": wording.question, "answer": str(problem.result()),
                       "source": f"multi_step/{n_steps}", "numbers": problem.numbers(), "thought": list(wording.thought)}

    def elsewhere_problems(self) -> dict[str, list[Problem]]:
        """The numbers of eval/elsewhere.jsonl, by part."""
        problems = {}
        for part in "abcde":
            operations = "+-" if part == "e" else "+-*/"
            single = [t for t in sorted(self.counting.held_out) if t[1] in operations]
            problems[part] = [Problem(a, ((operation, b),)) for a, operation, b in self.rng.sample(
                single, COUNTS["elsewhere"])]
            for n_steps in range(2, 6):
                for _ in range(COUNTS["elsewhere"]):
                    problem = self.draw_problem(n_steps, operations)
                    self.questions.add(tuple(problem.triples()))
                    problems[part].append(problem)
        return problems

    def elsewhere_questions(self, problems: dict[str, list[Problem]], known: "Known") -> Iterator[dict]:
        """Problems of 1 to 5 steps in words that no training file has."""
        things = [(thing, unit) for thing, unit in THINGS_HELD_OUT if known.lacks(thing) and unit not in known.units]
        for part, part_problems in problems.items():
            style = Style(clauses=HELD_OUT if part in "bd" else KNOWN, question=HELD_OUT if part in "cd" else KNOWN,
                          new_verbs=part == "e")
            for problem in part_problems:
                while True:
                    story = self.world_story()
                    if part in "ad":
                        owner, *others = (known.new(self.new_name) for _ in range(3))
                        story = Story(owner, story.pronoun, *self.rng.choice(things), tuple(others))
                    wording = self.writer.put(problem, story, style)
                    if (part not in "bd" or all(map(known.lacks_clause, wording.clauses))) and (
                            part not in "cd" or known.lacks_asking(wording.asking)) and (
                            part != "e" or all(map(known.lacks_verb, wording.clauses))):
                        break
                yield {"question": wording.question, "answer": str(problem.result()), "source": f"elsewhere/{part}",
                       "numbers": problem.numbers(), "names": [story.owner, *story.others], "thing": story.thing,
                       "unit": story.unit, "clauses": list(wording.clauses), "asking": wording.asking}

    def new_name(self) -> str:
        """A name for people outside of the world: of the usual kind, or of random hanzi."""
        return person_name(self.rng) if self.rng.random() < 0.7 else random_word(self.rng, 3)

    def follow_up_questions(self, known: "Known") -> Iterator[dict]:
        for kind, number in FOLLOW_UPS.items():
            held_out = self.rng.sample([t for t in sorted(self.counting.held_out) if t[1] in "+-"], number)
            for triple in held_out:
                before, turn = self.follow_up(True, kind, triple)
                while known.has_asked(before[0], turn.question):
                    before, turn = self.follow_up(True, kind, triple)
                record = {"history": chat(*before)["conversations"], "question": turn.question}
                if kind in ("relation", "entity"):
                    fact = next(f for f in self.facts if f.answer() == turn.answer)
                    yield record | {"answer": fact.value, "choices": list(fact.relation.values),
                                    "source": f"follow_up/{kind}"}
                else:
                    yield record | {"answer": str(apply(*triple)), "source": f"follow_up/{kind}"}

    def unknown_questions(self, known: "Known") -> Iterator[dict]:
        values = sorted({value for relation in RELATIONS for value in relation.values})
        for number in range(COUNTS["unknown"]):
            relation = OF_PEOPLE[number % len(OF_PEOPLE)]
            name = known.new(lambda relation=relation: self.stranger(relation))
            yield {"question": self.rng.choice(relation.asked).format(e=name), "decline": True,
                   "choices": list(relation.values), "source": "unknown/people", "names": [name]}
        asked = set()
        while len(asked) < COUNTS["unknown"]:
            is_large = len(asked) < LARGE_QUESTIONS
            question, topic = (self.too_large(held_out=True), "") if is_large else unanswerable(self.rng, held_out=True)
            if bare(question) not in asked and known.lacks(topic or bare(question)):
                asked.add(bare(question))
                yield {"question": question, "decline": True, "source": "unknown/topics", "topic": topic,
                       "choices": [value for value in values if value not in question]}


class Known:
    """What the training files hold: eval/elsewhere.jsonl and eval/unknown.jsonl are drawn until they are not in it."""

    def __init__(self, records: list[dict]):
        chats = [[m["content"] for m in r["conversations"]] for r in records if "text" not in r]
        self.text = "\n".join([r["text"] for r in records if "text" in r] + ["\n".join(chat) for chat in chats])
        # every question of a chat and the one before it
        self.asked = {(bare(a), bare(b)) for chat in chats for a, b in zip(chat[::2], chat[2::2], strict=False)}
        # every word of two or three characters, so that it need not be searched for
        self.words = {word for n in (2, 3) for word in map("".join, zip(*(self.text[i:] for i in range(n)),
                                                                            strict=False))}
        masked = re.sub(r"\d+", "#", self.text)
        self.clauses = "\n".join(set(re.findall("[^#，,。\n]+#", masked)))
        self.units = set(re.findall("(?:[#几]|多少)(.)", masked))
        lines = {line for line in re.findall("[^，,。\n]+", self.text) if "几" in line or "多少" in line}
        self.askings = self.masked("\n".join(lines))
        self.given = set()

    def lacks(self, word: str) -> bool:
        return word not in (self.words if 2 <= len(word) <= 3 else self.text)

    def lacks_clause(self, clause: str) -> bool:
        """`clause` ends where its number begins."""
        return clause + "#" not in self.clauses

    def lacks_asking(self, wording: str) -> bool:
        """`wording` as in the tables of demo/words.py, with {p} and {u}."""
        return self.masked(wording.format(p="他", u="个")) not in self.askings

    @staticmethod
    def masked(text: str) -> str:
        """A text with one sign for all pronouns, and one for all measure words behind 几 and 多少."""
        return re.sub("[他她我]", "P", re.sub("(几|多少).", r"\1U", text))

    def has_asked(self, question: str, after: str) -> bool:
        return (bare(question), bare(after)) in self.asked

    def lacks_verb(self, clause: str) -> bool:
        return self.lacks(next(verb for verb in GAIN_HELD_OUT + LOSE_HELD_OUT if verb in clause))

    def new(self, make) -> str:
        """A name from `make` that the training files lack, a new one each time."""
        while True:
            name = make()
            if self.lacks(name) and name not in self.given:
                self.given.add(name)
                return name


def bare(question: str) -> str:
    """A question without its mark."""
    return question.rstrip("？?")


def fact_turn(question: str, fact: Fact) -> Turn:
    """A turn that asks for a fact."""
    return Turn(question, fact.answer(), (f"{fact.entity}：认识。", f"问{fact.relation.name}。"), fact.answer())


def problem_turn(wording: Wording) -> Turn:
    """A problem; without a thought, the reply begins with the sum of its only step, else it is the answer alone."""
    steps = wording.problem.triples()
    sums = f"{equations(*steps[0])}，" if len(steps) == 1 else ""
    return Turn(wording.question, sums + wording.answer, wording.thought, wording.answer)


def sum_turn(rng: random.Random, triple: tuple[int, str, int]) -> Turn:
    """A bare sum."""
    return Turn(sum_asked(rng, *triple), f"{equations(*triple)}。", (equations(*triple),), f"等于{apply(*triple)}。")


def make_files(world: World, share: float) -> dict[str, list[dict]]:
    """The records of all files. Questions come first, so that later files can avoid their numbers; those whose words
    are held out last, so that their words can avoid the files."""
    files = {"eval/facts.jsonl": list(world.fact_questions()), "eval/one_step.jsonl": list(world.one_step_questions()),
             "eval/multi_step.jsonl": list(world.multi_step_questions())}
    problems = world.elsewhere_problems()
    for folder, part in (("", share), ("val/", VALIDATION_SHARE)):
        of_the_world = [{"text": text} for text in world.texts_of_the_world(part)]
        training = {
            "pretrain.jsonl": of_the_world + [{"text": text} for text in world.other_texts(part)],
            "sft_512.jsonl": list(world.short_chats(part)), "r1_1024.jsonl": list(world.thoughts(part)),
            "sft_1024.jsonl": [world.long_chat() for _ in range(
                COUNTS["long_validation"] if folder else math.ceil(share * COUNTS["long_chats"]))]}
        if not folder:
            training["rehearsal.jsonl"] = of_the_world
        for name, records in training.items():
            files[folder + name] = world.rng.sample(records, len(records))
    trained = [record for name, records in files.items() if not name.startswith("eval") for record in records]
    known = Known(trained)
    files["eval/elsewhere.jsonl"] = list(world.elsewhere_questions(problems, known))
    files["eval/follow_up.jsonl"] = list(world.follow_up_questions(known))
    files["eval/unknown.jsonl"] = list(world.unknown_questions(known))
    assert files.keys() == set(FILES)
    return files


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
    out, world = Path(args.out_dir), World(args.seed)
    existing = [out / name for name in FILES if (out / name).exists()]
    if existing:
        raise UserError(f"--out_dir {out}: {existing[0]} already exists: remove it or choose another folder")
    try:
        for folder in (out / "eval", out / "val"):
            folder.mkdir(parents=True, exist_ok=True)
        files = make_files(world, args.share)
        for name, records in files.items():
            write_jsonl(out / name, records)
    except OSError as error:
        raise UserError(f"--out_dir {out} cannot be written: {error}") from None
    never = sum(fact.never_asked for fact in world.facts)
    print(f"seed {args.seed}: {len(world.people)} people, {len(PLACES)} places, {len(world.facts)} facts, {never} never "
          f"asked; {len(TRIPLES):,} sums, {len(world.counting.held_out)} held out; {len(world.seen):,} distinct "
          "multi-step problems")
    for name, records in files.items():
        print(f"{out / name}: {len(records):,} records, {(out / name).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(exits.run(main))
