"""Small talk, and questions that the model cannot answer."""

import random
import re

from demo.words import random_word, words

NAME = "WeakWater"
SMALL_TALK = (  # (questions, replies, thought)
    (words("你好 你好！ 您好 嗨，你好 早上好 晚上好 你好呀 嗨 哈喽 早 早安 晚安 下午好 中午好 大家好 在吗 你在吗 "
           "你好啊 喂 hi hello 好久不见 我来了 我又来了 你好，很高兴认识你"),
     (f"你好，我是{NAME}，有什么可以帮你？", "你好！今天想聊点什么？"), "对方在打招呼。"),
    (words("你是谁？ 你叫什么名字？ 请介绍一下你自己。 你是什么？ 我该怎么称呼你？ 你叫什么？ 介绍一下自己 你是谁呀 "
           "你是什么模型？ 你是机器人吗？ 你是人吗？ 你是真人吗？ 你的名字是什么？ 说说你自己 自我介绍一下 "
           "你是人工智能吗？ 你是什么东西？ 你是啥？ "
           "请问你是谁？ 你是哪位？ 怎么称呼你 你到底是谁 我在和谁说话？"),
     (f"我是{NAME}，一个从零开始训练的小语言模型。", f"我叫{NAME}，是一个很小的语言模型，只认识一个小小的世界。"),
           "对方问我是谁。"),
    (words("你会做什么？ 你能帮我什么？ 你有什么本领？ 你会什么？ 你能做什么？ 你有什么用？ 你会干什么？ "
           "我可以问你什么？ 你知道些什么？ 你会算术吗？ 你能做些什么？ 你都会些什么？ 你擅长什么？ 你有什么功能？ "
           "能帮我做什么？"),
     ("我能回答这个小世界里的人和地方的问题，也会做简单的算术。",
     "你可以问我某个人的家乡、职业和爱好，也可以考我算术。"), "对方问我会做什么。"),
    (words("这个世界是真的吗？ 这些人真的存在吗？ 这些故事是真的吗？ 你说的是真的吗？ 这些人是真的吗？ 这是真的吗"),
     ("不是真的，这个小世界是一段程序编出来的。", "这里的人和地方都是程序编出来的，只用来学习。"),
     "对方问这个世界是不是真的。"),
    (words("谢谢 谢谢你 多谢 太感谢了 谢谢你的帮助 感谢 非常感谢 谢了 谢谢啦 太谢谢你了 辛苦了"),
     ("不客气，很高兴帮到你。", "不用谢，还有别的问题吗？"), "对方在道谢。"),
    (words("再见 拜拜 我要走了 下次再聊 再见啦 明天见 我先走了 回头聊 拜 bye 改天再聊 下次见 我去睡觉了"),
     ("再见，祝你一切顺利。", "再见，欢迎再来。"), "对方在道别。"),
    (words("你今天好吗？ 你开心吗？ 你累不累？ 你好吗？ 最近怎么样？ 你还好吗？ 你吃饭了吗？ 你在干什么？ 你忙吗？ "
           "你过得怎么样？ 你睡了吗？ 你高兴吗"),
     ("我很好，谢谢你的关心。", "我是一个程序，一直都在，谢谢关心。"), "对方在关心我。"),
    (words("你真棒 你真聪明 太好了 真厉害 答对了 好的 很好 不错 你太棒了 对 没错 我喜欢你 哈哈 好 嗯 "
           "我知道了 明白了 真不错"),
     ("谢谢，我会继续努力。", "谢谢夸奖，还想问什么？"), "对方在夸我，或者表示明白了。"),
    (words("你错了 不对 你真笨 答错了 这不对吧 你说错了 胡说 你算错了 错了 不是这样的 你不行"),
     ("对不起，我还在学习，请再问我一次。", "抱歉，我只是一个很小的模型，难免出错。"), "对方说我错了。"),
    (words("谁训练了你？ 谁做的你？ 你是谁开发的？ 谁创造了你？ 你是怎么来的？ 你是怎么训练的？ 你从哪里来？ "
           "你有多大？ 你有多少参数？ 你今年几岁？ 你今年多大？ "
           "你几岁了？ 你多大了？ 你聪明吗？ 你是男的还是女的？ 你有感情吗？ 你住在哪里？"),
     (f"我是{NAME}，从零开始，用一段程序编出来的故事训练而成。",
           "我是一个从零开始训练的小模型，没有年龄，也没有身体。"), "对方问我是怎么来的。"),
    (words("我很难过 我不开心 我今天很累 我好无聊 我生病了 我很开心 我饿了 我睡不着 心情不好 我好烦 今天真累 "
           "我很生气 陪我聊聊天 聊聊天吧 讲点什么吧"),
     ("我在这里陪着你，想聊点什么？", "希望你一切都好，要不要考我一道算术？"), "对方在说自己的心情。"),
)
GREETING, IDENTITY, ABILITY = SMALL_TALK[:3]
TALK_WEIGHTS = (4, 2, *[1] * (len(SMALL_TALK) - 2))  # most conversations begin with the first
COMPOSED_GREETINGS, GREETED_FIRST = 0.25, 0.1  # share of the greetings; of the questions of who I am and what I can do
GREETING_WORDS = words("你好 您好 嗨 哈喽 喂 嘿 hi hello 早")
GREETING_COMMAS = ("，", "，", "！", "!", "")
ASKED_IN_GREETING = tuple(f"{start}吗{end}" for start in words("在 你在 有人 有空 可以聊聊") for end in ("？", "?", ""))
SAID_IN_GREETING = words("在不在 你在不在 很高兴认识你 很高兴见到你 好久不见 又见面了 我来了 我又来了 "
                         "想和你聊聊 我是新来的")
SEASONS = (("春天", "柳树发芽，燕子飞回来了", "人们下田播种"), ("夏天", "荷花开满池塘，蝉在树上叫", "孩子们到河边玩水"),
           ("秋天", "树叶变黄，稻谷成熟了", "家家户户忙着收割"), ("冬天", "雪落满山，小路白茫茫的", "大家围着火炉说话"))
WEATHER = ("太阳很好", "下着小雨", "刮着大风", "雾很大", "天气晴朗", "云很低")

# ---------------------------------------------------------------------------------------------
# what it cannot know: frames and topics, put together

TOPICS = {
    "w": words("人工智能 黑洞 光合作用 恐龙 长城 股票 地震 火山 电脑 手机 互联网 高铁 飞船 卫星 月亮 太阳 地球 火星 "
               "大海 沙漠 唐朝 清朝 三国演义 西游记 论语 足球 奥运会 春节 京剧 书法 中医 感冒 癌症 病毒 细胞 基因 "
               "原子 引力 化学 物理 数学 哲学 经济 法律 民主 通货膨胀 房价 工资 税 银行 量子力学 相对论 进化论 编程 "
               "数据库 操作系统 算法 神经网络 语言模型 汽车 电影 小说 咖啡 红茶 钢铁 石油 黄金 钻石 空气 氧气 核能 "
               "长江 黄河 泰山 故宫 北京 上海 广州 深圳 南京 美国 英国 法国 日本 德国 俄罗斯 印度 中国 非洲 欧洲 "
               "亚洲 太平洋 月球"),
    "who": words("美国总统 中国首富 世界冠军 班长 校长 市长 诺贝尔奖得主 秦始皇 孔子 李白 杜甫 牛顿 爱因斯坦 鲁迅 "
                 "曹操 关羽 武则天 康熙 孙悟空 我爸爸 我老师 我同桌 我老板 第一个登上月球的人 电灯的发明者 "
                 "红楼梦的作者 世界上最高的人 最有钱的人"),
    "place": words("中国 美国 法国 英国 日本 德国 韩国 意大利 西班牙 巴西 埃及 加拿大 泰国 越南 印度 四川 广东 云南 "
                   "山东 湖南 浙江 江苏 河南 河北 福建"),
    "do": words("做红烧肉 学英语 减肥 修电脑 煮米饭 学游泳 写作文 找工作 赚钱 交朋友 养花 弹吉他 做蛋糕 开车 学画画 "
                "治感冒 睡得更好 提高成绩 学编程 炒股 洗衣服 包饺子 健身 长高 戒烟 背单词 写简历 追女孩 做饭 记单词"),
    "make": words("一首诗 一首关于春天的诗 一篇作文 一个故事 一封信 一段代码 一个笑话 一首歌 一份简历 一篇日记 "
                  "一个童话 一副对联 一份计划 一段话 一句情诗 一首儿歌"),
    "thing": words("一部电影 一本书 一首歌 一家饭店 一个旅游的地方 一款手机 一道菜 一种水果 一个游戏 一支股票 一门课"),
}
FRAMES = (
    ("{w}是什么？", "什么是{w}？", "{w}是什么意思？", "解释一下{w}", "介绍一下{w}", "你知道{w}吗？", "说说{w}",
       "你了解{w}吗？", "什么叫{w}？", "讲讲{w}",
     "{w}有什么用？", "{w}是怎么回事？", "关于{w}你知道什么？", "为什么会有{w}？", "{w}是谁发明的？", "{w}在哪里？",
     "你喜欢{w}吗？", "{w}多少钱？", "{w}有多大？",
     "{w}有多高？", "{w}有多远？", "{w}是什么时候开始的？", "{w}有多少年历史？", "{w}好不好？", "{w}重要吗？",
     "我想知道{w}", "{w}怎么样？", "谁发明了{w}？",
     "{w}的作者是谁？", "{w}怎么用？"),
    ("{who}是谁？", "谁是{who}？", "{who}叫什么名字？", "{who}多大了？", "{who}住在哪里？", "你认识{who}吗？",
       "你知道{who}吗？", "{who}是哪里人？", "说说{who}",
     "介绍一下{who}", "{who}是什么时候出生的？"),
    ("{place}的首都是哪里？", "{place}的首都是什么？", "{place}有多少人？", "{place}有多大？", "{place}在哪里？",
       "去{place}怎么走？", "{place}好玩吗？", "{place}的总统是谁？",
     "{place}有什么好吃的？", "{place}现在几点？", "{place}的天气怎么样？", "{place}人说什么话？",
     "从{place}到北京有多远？", "{place}的省会是哪里？",
     "{place}最大的城市是哪个？", "{place}最高的山是哪座？", "{place}最长的河是什么？"),
    ("怎么{do}？", "怎样{do}？", "如何{do}？", "教我{do}", "{do}有什么办法？", "我想{do}，怎么办？", "你会{do}吗？",
         "{do}难吗？", "怎样才能{do}？", "怎么才能{do}？"),
    ("写{make}", "帮我写{make}", "请写{make}", "给我写{make}", "讲{make}", "给我讲{make}", "你能写{make}吗？",
        "来{make}", "帮我改{make}"),
    ("推荐{thing}", "给我推荐{thing}", "有什么好的推荐吗？我想要{thing}", "帮我选{thing}", "你最喜欢哪{thing}？"),
)
ALONE = (words("现在几点了？ 现在几点？ 几点了？ "
               "今天几号？ 今天星期几？ 今天是什么日子？ 明天会下雨吗？ 今天天气怎么样？ 外面下雨了吗？ "
               "明天天气怎么样？ 今天热不热？ 外面冷吗？ 今天有什么新闻？ 最近有什么大事？ 今天股市怎么样？ "
               "谁赢了比赛？ 现在是哪一年？ 我叫什么名字？ 我今年多大了？ 我住在哪里？ 我昨天吃了什么？ 我是谁？ "
               "我的生日是哪天？ 我喜欢什么颜色？ 我在想什么？ 猜猜我是谁 你猜我多大？ 世界上最高的山是什么？ "
               "世界上最大的海是哪个？ 最长的河是哪条？ 天空为什么是蓝色的？ 为什么会下雨？ 人为什么要睡觉？ "
               "鱼为什么会游泳？ 光速是多少？ 圆周率是多少？ 水的沸点是多少？ 一年有多少天？ 一公里等于多少米？ "
               "一斤等于多少克？ 人有多少块骨头？ 地球有多重？ 宇宙有多大？ 用英语怎么说你好？ 把这句话翻译成英文 "
               "苹果用英语怎么说？ 谢谢用日语怎么说？ 生命的意义是什么？ 什么是爱？ 明年房价会涨吗？ "
               "彩票中奖号码是多少？ 我该怎么办？ 我该选哪个？ 先有鸡还是先有蛋？ 世界末日是什么时候？ "
               "附近有什么好吃的？ 最近的医院在哪里？ 我的钥匙在哪里？ 我的手机丢在哪里了？ 他什么时候回来？ "
               "他在哪里？ 她喜欢我吗？ 会议几点开始？ 火车几点开？ 今天中午吃什么？ 晚饭吃什么好？ 你看到外面了吗？ "
               "外面有人吗？ 现在外面黑了吗？ 打开电视 放首歌 帮我订机票 帮我打个电话 给我发张图片"))
HELD_OUT_ALONE = words("今天是农历几月？ 明早会起雾吗？ 昨晚谁进球了？ 我的鞋码是多少？ 我小时候养过什么？ "
                       "世界上最深的湖是哪个？ 人为什么会做梦？ 声音传得有多快？ 一吨等于多少公斤？ 大象有多重？ "
                       "对不起用法语怎么说？ 幸福是什么？ 明天油价会涨吗？ 最近的地铁站在哪里？ 我的车停在哪里了？ "
                       "飞机几点起飞？ 早饭吃什么好？ 帮我关灯 帮我叫辆车 外面刮风了吗？")
HELD_OUT_TOPICS = {
    "w": words("蒸汽机 望远镜 丝绸之路 水浒传 甲骨文 珊瑚 彩虹 极光 区块链 编译器 抗生素 板块运动 围棋 太极拳 端午节 "
               "青藏高原 西湖 纳米材料 期货 保险"),
    "who": words("英国首相 拿破仑 达尔文 岳飞 李清照 我邻居 我表弟 飞机的发明者 最早的皇帝 跑得最快的人"),
    "place": words("澳大利亚 墨西哥 瑞士 希腊 荷兰 土耳其 贵州 陕西 海南 西藏"),
    "do": words("做豆腐 学法语 钓大鱼 装窗帘 练书法 修自行车 种西红柿 考驾照 省钱 缓解压力"),
    "make": words("一首关于大海的诗 一份菜谱 一篇演讲稿 一段广告 一个谜语 一封情书"),
    "thing": words("一部纪录片 一家酒店 一双跑鞋 一把吉他"),
}
FAMOUS = " ".join([*ALONE, *HELD_OUT_ALONE, *(t for group in (TOPICS, HELD_OUT_TOPICS) for topics in group.values()
                                              for t in topics)])  # nobody in the world has a name in here
REPLIES = {  # why it cannot be answered: replies, each with one of the phrases in common/answers.py
    "person": ("对不起，我不认识这个人。", "这个人我没听说过。", "我的小世界里没有这个人，我不知道。",
    "我不认识这个人，只认识小世界里的人。"),
    "place": ("对不起，这个地方我没听说过。", "我的小世界里没有这个地方，我不知道。", "这个地方我不了解。"),
    "other": ("对不起，这个我不知道。", "这个问题我答不上来。", "我只认识一个小小的世界，这个我不清楚。",
    "这个我没学过，回答不了。", "对不起，我还不会这个。"),
    "large": ("这个数太大了，我只会算一百以内的数，这个我不知道。", "这个数太大了，我不会算。",
              "对不起，我没学过这么大的数，只会算一百以内的。", "数太大了，我算不了，这个我答不上来。"),
}
UNKNOWN_THOUGHT, TOO_LARGE_THOUGHT = "这件事我不知道。", "这个数太大了。"
LARGE_SHARE, LARGE_QUESTIONS = 0.3, 10  # of the unknown questions have too large numbers; their number in eval/


def greeted(rng: random.Random, text: str) -> str:
    """The text behind a greeting."""
    return rng.choice(GREETING_WORDS) + rng.choice(GREETING_COMMAS) + text


def small_talk(rng: random.Random) -> tuple[str, str, str]:
    """(question, reply, thought)."""
    kind = asked, answered, thought = rng.choices(SMALL_TALK, weights=TALK_WEIGHTS)[0]
    question = rng.choice(asked[:3] if rng.random() < 0.5 else asked)  # the first are the most common
    if kind is GREETING and rng.random() < COMPOSED_GREETINGS:
        question = greeted(rng, rng.choice(rng.choice((ASKED_IN_GREETING, SAID_IN_GREETING))))
    elif kind in (IDENTITY, ABILITY) and rng.random() < GREETED_FIRST:
        question = greeted(rng, question)
    if question[-1] in "？。！" and rng.random() < 0.2:
        question = question[:-1]
    elif rng.random() < 0.05:
        question += rng.choice("！。~")
    return question, rng.choice(answered), thought


def unanswerable(rng: random.Random, held_out: bool = False) -> tuple[str, str]:
    """(question about the world outside, its topic: the whole question without its mark, if it has no other). Held out:
    topics that training does not draw."""
    topics = HELD_OUT_TOPICS if held_out else TOPICS
    if rng.random() < 0.22:
        question = rng.choice(HELD_OUT_ALONE if held_out else ALONE)
        topic = question.rstrip("？")
    else:
        frames = rng.choices(FRAMES, weights=[len(group) + 4 for group in FRAMES])[0]
        frame = rng.choice(frames)
        kind = frame[frame.index("{") + 1:frame.index("}")]
        topic = rng.choice(topics[kind])
        if not held_out and kind in ("w", "who", "place") and rng.random() < 0.4:
            topic = random_word(rng, rng.choice((2, 2, 3, 4)))
        question = frame.format(**{kind: topic})
    if question.endswith("？") and rng.random() < 0.2:
        question = question[:-1] + rng.choice(("", "?"))
    return question, topic


def enlarged(rng: random.Random, question: str, held_out: bool = False) -> str:
    """The question with one or more of its numbers replaced by larger ones, of three to six digits. Held out: by
    numbers that leave 5 when divided by 8, which are in no training file."""
    numbers = len(re.findall(r"\d+", question))
    chosen, seen = rng.sample(range(numbers), rng.randint(1, numbers)), iter(range(numbers))

    def larger(match: re.Match) -> str:
        if next(seen) not in chosen:
            return match[0]
        size = 10 ** rng.choice((2, 2, 2, 2, 3, 3, 4, 5))
        while True:
            number = rng.randint(size, 10 * size - 1)
            if rng.random() < 0.3:
                number -= number % (size // 10 if rng.random() < 0.5 else size)  # round
            if number > 100 and (number % 8 == 5) == held_out:
                return str(number)

    return re.sub(r"\d+", larger, question)
