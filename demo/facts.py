"""People and places, what is known of them, and how it is told, asked and answered."""

import random
from dataclasses import dataclass

from demo.talk import FAMOUS
from demo.words import GIVEN, SURNAMES, words

PLACES = words("清河镇 白石村 柳林镇 青松寨 红枫谷 云峰村 金沙湾 石桥镇 竹溪村 梅岭镇 "
               "桃花坞 杏林村 银杏镇 月牙湾 星河镇 鹿鸣村 凤凰寨 龙泉镇 虎丘村 雁门关 "
               "荷塘村 芦花荡 望海镇 听涛湾 落霞村 飞雪岭 暖泉镇 古槐村 长亭镇 麦香村")
N_PEOPLE = 150
NEVER_ASKED_SHARE = 0.27


@dataclass(frozen=True)
class Relation:
    """A relation between an entity {e} and one of `values` {v}, with templates to tell, ask and answer it. `again` asks
    for it after another question about the same entity."""

    name: str
    values: tuple[str, ...]
    told: tuple[str, ...]
    asked: tuple[str, ...]
    again: tuple[str, ...]
    answered: str


OF_PEOPLE = (
    Relation("家乡", PLACES,
             ("{e}的家乡是{v}。", "{e}出生在{v}。", "{e}是{v}人。", "{e}从小在{v}长大。", "{v}是{e}的故乡。",
              "{e}小时候住在{v}。"),
             ("{e}的家乡在哪里？", "{e}是哪里人？", "{e}出生在什么地方？", "请问{e}来自哪里？", "你知道{e}的故乡吗？",
              "{e}的老家在哪儿？"),
             ("家乡在哪里", "家乡", "是哪里人", "老家在哪儿"), "{e}的家乡是{v}。"),
    Relation("职业", words("木匠 医生 教师 渔夫 裁缝 铁匠 厨师 画家 邮差 猎人 牧民 船长 歌手 园丁 石匠 "
                   "药师 警察 司机 演员 作家"),
             ("{e}是一名{v}。", "{e}的职业是{v}。", "{e}靠当{v}为生。", "{e}当{v}已经很多年了。",
              "大家都知道{e}是{v}。",
              "{v}是{e}的职业。"),
             ("{e}是做什么工作的？", "{e}的职业是什么？", "请问{e}从事什么职业？", "{e}靠什么为生？",
              "你知道{e}的工作吗？",
              "{e}是干什么的？"),
             ("是做什么工作的", "职业", "职业是什么", "靠什么为生"), "{e}的职业是{v}。"),
    Relation("美食", words("饺子 米粉 馄饨 汤圆 粽子 年糕 烤鸭 火锅 春卷 烧饼 凉皮 豆花 鱼丸 包子 油条 "
                   "月饼 炒饭 面条 红薯 玉米"),
             ("{e}最爱吃{v}。", "{e}最喜欢的食物是{v}。", "每到过节，{e}都要吃{v}。", "没有什么比{v}更合{e}的口味。",
              "{e}的餐桌上总有{v}。", "{v}是{e}最爱的美食。"),
             ("{e}最爱吃什么？", "{e}最喜欢的食物是什么？", "什么东西最合{e}的口味？", "请问{e}喜欢吃什么？",
              "你知道{e}爱吃什么吗？", "{e}平时爱吃什么？"),
             ("爱吃什么", "喜欢吃什么", "最爱吃什么", "最爱的美食"), "{e}最爱吃{v}。"),
    Relation("宠物", words("黑猫 白猫 黄狗 灰狗 鹦鹉 乌龟 金鱼 兔子 刺猬 鸽子 山羊 八哥 仓鼠 白鹅 松鼠 "
                   "画眉"),
             ("{e}养着{v}。", "{e}的宠物是{v}。", "{e}家里有{v}作伴。", "{e}每天都要喂{v}。", "陪着{e}的是{v}。",
              "{v}是{e}的伙伴。"),
             ("{e}养了什么宠物？", "{e}的宠物是什么？", "什么动物陪着{e}？", "请问{e}家里养着什么？",
              "你知道{e}养了什么动物吗？", "{e}有什么宠物？"),
             ("养了什么", "宠物", "宠物是什么", "养了什么宠物"), "{e}的宠物是{v}。"),
    Relation("爱好", words("下棋 钓鱼 画画 唱歌 跳舞 爬山 游泳 写诗 吹笛 拉琴 剪纸 摄影 种花 跑步 射箭 "
                   "读书 骑马 刺绣 听戏 打鼓"),
             ("{e}的爱好是{v}。", "{e}一有空就{v}。", "{e}最大的乐趣是{v}。", "空闲的时候，{e}喜欢{v}。",
              "{e}从小就爱{v}。",
              "{v}是{e}的爱好。"),
             ("{e}有什么爱好？", "{e}的爱好是什么？", "{e}空闲的时候做什么？", "请问{e}喜欢做什么？",
              "你知道{e}最大的乐趣吗？", "{e}平时喜欢干什么？"),
             ("爱好", "有什么爱好", "喜欢做什么", "爱好是什么"), "{e}的爱好是{v}。"),
)
OF_PLACES = (
    Relation("河流", words("碧水河 长溪 白浪江 沙河 龙须沟 玉带河 寒江 绿萝溪 浑河 九曲河 银沙江 乌龙江 "
                   "小清江 双河 锦江 甘泉溪"),
             ("{v}从{e}旁边流过。", "{e}靠着{v}。", "流过{e}的河叫{v}。", "{e}的人喝{v}的水。", "{v}穿过{e}。"),
             ("哪条河流过{e}？", "{e}靠着什么河？", "{e}的人喝哪条河的水？", "请问{e}旁边是什么河？",
              "流过{e}的河叫什么？"),
             ("旁边是什么河", "靠着什么河", "有什么河"), "流过{e}的河叫{v}。"),
    Relation("特产", words("茶叶 丝绸 瓷器 草席 蜂蜜 米酒 木雕 柿饼 莲藕 核桃 花布 宣纸 豆腐 腊肉 砚台 "
                   "折扇"),
             ("{e}的特产是{v}。", "{e}出产{v}。", "{e}的{v}远近闻名。", "到{e}的人都要带些{v}回去。",
              "{v}是{e}的特产。"),
             ("{e}的特产是什么？", "{e}出产什么？", "{e}什么东西远近闻名？", "请问去{e}应该买什么？",
              "{e}有什么特产？"),
             ("特产", "特产是什么", "出产什么"), "{e}的特产是{v}。"),
    Relation("节日", words("灯会 龙舟节 采茶节 赏花节 丰收节 渔火节 风筝节 赏月节 歌会 泼水节 庙会 冰雪节 "
                   "火把节 尝新节 祈雨节 蚕花节"),
             ("{e}每年都办{v}。", "{e}最热闹的日子是{v}。", "{v}是{e}的节日。", "一到{v}，{e}就挤满了人。",
              "{e}的{v}最有名。"),
             ("{e}每年办什么节？", "{e}最热闹的日子是什么？", "{e}有什么节日？", "请问{e}哪个节最有名？",
              "{e}过什么节？"),
             ("有什么节日", "每年办什么节", "过什么节"), "{e}每年都办{v}。"),
    Relation("名胜", words("石塔 木桥 古庙 钟楼 戏台 风车 水车 书院 牌坊 灯塔 古井 城墙 石窟 凉亭 祠堂 "
                   "老宅"),
             ("{e}有一座有名的{v}。", "来{e}的人都去看{v}。", "{e}的{v}很古老。", "{e}的名胜是{v}。",
              "站在{e}就能望见{v}。"),
             ("{e}有什么名胜？", "{e}的什么很古老？", "来{e}的人都去看什么？", "请问{e}有什么好看的？",
              "{e}的名胜是什么？"),
             ("有什么名胜", "名胜", "有什么好看的"), "{e}的名胜是{v}。"),
)
RELATIONS = OF_PEOPLE + OF_PLACES


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
        frames = [i for i in range(len(self.relation.asked)) if i != self.eval_frame]
        return unpunctuated(rng, self.ask(rng.choice(frames)))

    def ask_again(self, rng: random.Random) -> str:
        """Ask after another question about the same entity: 那他的职业呢？"""
        wording = rng.choice(self.relation.again)
        if self.relation in OF_PLACES:
            return rng.choice(("那里{w}？", "那它{w}呢？", "那{w}呢？", "{w}呢？")).format(w=wording)
        of = "的" if wording in ("家乡", "职业", "职业是什么", "最爱的美食", "宠物", "宠物是什么", "爱好", "爱好是什么",
                                "家乡在哪里",
                                "老家在哪儿") else ""
        who = rng.choice(("他", "他", "她", "那他", "那她", "这个人"))
        return f"{who}{of}{wording}" + ("呢？" if rng.random() < 0.7 or len(wording) == 2 else "？")

    def answer(self) -> str:
        return self.relation.answered.format(e=self.entity, v=self.value)


def unpunctuated(rng: random.Random, question: str) -> str:
    """A question as people type it: sometimes without its question mark."""
    return question[:-1] + rng.choice(("？",) * 7 + ("", "?", "")) if question.endswith("？") else question


def person_name(rng: random.Random) -> str:
    """A surname and a given name of one or two hanzi."""
    name = rng.choice(SURNAMES) + "".join(rng.sample(GIVEN, 1 if rng.random() < 0.3 else 2))
    return name


def make_facts(rng: random.Random) -> list[Fact]:
    """One fact for every entity and each of its relations."""
    people: list[str] = []
    while len(people) < N_PEOPLE:
        name = person_name(rng)
        if name not in FAMOUS and not any(name in other or other in name for other in people):
            people.append(name)
    pairs = [(e, r) for e in people for r in OF_PEOPLE] + [(e, r) for e in PLACES for r in OF_PLACES]
    never = set(rng.sample(range(len(pairs)), round(NEVER_ASKED_SHARE * len(pairs))))
    return [Fact(entity, relation, rng.choice(relation.values), i in never, rng.randrange(len(relation.asked)))
            for i, (entity, relation) in enumerate(pairs)]
