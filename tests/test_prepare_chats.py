"""prepare/chat_steps.py and prepare/numbers.py: what becomes of conversations, and which numbers a text has."""
# ruff: noqa: E501 (tables of hanzi, which count double)

import re
from collections import Counter

import pytest

from prepare.chat_steps import (
    BEGINNINGS,
    CHAT_STEPS,
    FAMILIES,
    check_length,
    cut_refusals,
    form_thoughts,
    is_r1,
    is_refusal,
    listed,
    order_roles,
    rename_assistants,
)
from prepare.numbers import number_sequence, operators
from prepare.step import Drop, Options

OPTIONS, RENAME, STRICT = Options(), Options(assistant_name="小水"), Options(drop_refusals=True)
THOUGHT = "<think>\n三加四是七。\n</think>\n<answer>\n七\n</answer>"


def chat(text: str) -> list[dict]:
    """Messages from "u:…|a:…"."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[part[0]], "content": part[2:]} for part in text.split("|")]


def show(messages) -> str:
    """What a step returned, as `chat` reads it; of a Drop the reason."""
    return f"drop: {messages.reason}" if isinstance(messages, Drop) else "|".join(
        f"{m['role'][0]}:{m['content']}" for m in messages)


def run(step, messages, options=OPTIONS) -> tuple[str, dict]:
    """(what a step made of messages, what it counted). A second time it must change nothing and count no change."""
    counts, again = Counter(), Counter()
    before = [dict(m) for m in messages]
    result = step(messages, options, counts)
    assert messages == before, "the step changed its input"
    if not isinstance(result, Drop):
        assert step(result, options, again) == result
        assert not +again or options is OPTIONS and step in (cut_refusals, rename_assistants)  # these only count
    return show(result), dict(+counts)


def test_steps():
    """The steps are those of the recipe, in its order; each says its rule and its origin."""
    assert [step.name for step in CHAT_STEPS] == ["roles", "thoughts", "assistants", "refusals", "chat_length"]
    assert all(step.on == "chat" and step.rule and step.origin and step.when(OPTIONS) for step in CHAT_STEPS)


# ---------------------------------------------------------------------------------------------
# roles

GOOD = "u:河有多长？|a:三里。"
ROLES = [
    (GOOD, GOOD, {}),
    ("s:答得短些。|" + GOOD, "s:答得短些。|" + GOOD, {}),
    ("s: \u200b|" + GOOD, GOOD, {"empty system messages left out": 1}),
    ("a:您好，请问有什么事？|" + GOOD, GOOD, {"opening replies left out": 1}),
    ("s:答得短些。|a:您好。|a:请问？|" + GOOD, "s:答得短些。|" + GOOD, {"opening replies left out": 1}),
    ("u:听我说。|u:河有多长？|a:三里。", "u:听我说。\n河有多长？|a:三里。", {"questions joined": 1}),
    ("u:河有多长？|u: |a:三里。", GOOD, {}),
    ("u:河有多长？|a:三里。|a:也许四里。", "u:河有多长？|a:三里。\n也许四里。", {"replies joined": 1}),
    ("u:河有多长？|a:三里。|a:三里。", GOOD, {"replies joined": 1}),
    ("u:河有多长？|a:|a:三里。", GOOD, {}),
    (f"u:三加四？|a:{THOUGHT}|a:七。|u:好。|a:嗯。", f"u:三加四？|a:{THOUGHT}", {"cut before: a second reply with a thought": 1}),
    (GOOD + "|u:多宽？", GOOD, {"closing questions left out": 1}),
    (GOOD + "|u:多宽？|a:　|u:说呀。|a:三丈。", GOOD, {"cut before: an empty reply": 1}),
    (GOOD + "|u:\ufeff|a:三丈。|u:好。|a:嗯。", GOOD, {"cut before: an empty question": 1}),
    (GOOD + "|u:查一下天气|t:晴|a:晴天。", GOOD, {"cut before: a tool call": 1}),
    (GOOD + "|s:换个话题。|u:好。|a:嗯。", GOOD, {"cut before: a tool call": 1}),
    ("u:河有多长？", "drop: no reply", {}),
    ("a:您好。|a:在吗？", "drop: no question", {"opening replies left out": 1}),
    ("u: |a:三里。", "drop: an empty question", {}),
    ("u:河有多长？|a:\n", "drop: an empty reply", {}),
    ("u:查一下天气|t:晴", "drop: a tool call", {}),
    ("s:答得短些。", "drop: no question", {}),
]


@pytest.mark.parametrize("before, after, counts", ROLES)
def test_roles(before, after, counts):
    got, counted = run(order_roles, chat(before))
    assert got == after
    if not after.startswith("drop"):
        assert counted == counts


def test_roles_keep_only_the_keys_of_the_format():
    """Other keys of messages are left out, reasoning_content stays for the next step; a reply that calls a tool ends it."""
    messages = [{"role": "user", "content": "三加四？", "name": "小明", "reasoning_content": "无"},
                {"role": "assistant", "content": "七", "reasoning_content": "三加四是七", "id": 3}]
    assert order_roles(messages, OPTIONS, Counter()) == [
        {"role": "user", "content": "三加四？"}, {"role": "assistant", "content": "七", "reasoning_content": "三加四是七"}]
    call = [*chat(GOOD + "|u:天气？"), {"role": "assistant", "content": "我查", "tool_calls": [{"id": 1}]}]
    assert show(order_roles(call, OPTIONS, Counter())) == GOOD


# ---------------------------------------------------------------------------------------------
# thoughts

THOUGHTS = [
    ("七", "七", {}),
    ("a < b 时取 b", "a < b 时取 b", {}),
    (THOUGHT, THOUGHT, {}),
    ("<think>三加四是七。</think><answer>七</answer>", THOUGHT, {}),
    ("\n<think>  三加四是七。\n\n</think>\n\n<answer>\n七\n\n</answer>\n", THOUGHT, {}),
    ("<think>\n三加四是七。\n</think>\n\n七", THOUGHT, {"answer tags added": 1}),
    ("<think>三加四是七。</think></think><answer>七</answer>", THOUGHT, {"repeated tags removed": 1}),
    ("<think>\n\n</think>\n七", "七", {"empty thoughts left out": 1}),
    ("<think></think><answer>七</answer>", "七", {"empty thoughts left out": 1}),
    # tags of other names, where the reply begins with one
    ("<THINK>三加四是七。</THINK><Answer>七</Answer>", THOUGHT, {"tags of other names renamed": 1}),
    ("\n<thinking>三加四是七。</Thinking>\n七", THOUGHT, {"tags of other names renamed": 1, "answer tags added": 1}),
    ("<thought>三加四是七。</thought><answer>七</answer>", THOUGHT, {"tags of other names renamed": 1}),
    ("<reasoning>三加四是七。</reasoning><answer>七</answer>", THOUGHT, {"tags of other names renamed": 1}),
    ("<think>三加四是七。</think><Answer>七</Answer>", THOUGHT, {"tags of other names renamed": 1}),
    ("用<thinking>想</thinking>", "用<thinking>想</thinking>", {}),
]
MALFORMED = [
    ("cut", "<think>三加四"), ("not opened", "三加四</think><answer>七</answer>"), ("no <answer>", "七<think>三加四是七</think>好"),
    ("empty <answer>", "<think>三加四</think><answer> </answer>"), ("no <think>", "<answer>七</answer>"),
    ("tags repeated", "<think>三</think><think>四</think><answer>七</answer>"),
    ("<answer> before <think>", "<answer>七</answer><think>三加四</think>"),
    ("text outside of the tags", "嗯<think>三加四</think><answer>七</answer>")]


@pytest.mark.parametrize("before, after, counts", THOUGHTS)
def test_thoughts(before, after, counts):
    assert run(form_thoughts, chat(f"u:三加四？|a:{before}|u:谢谢<think>|a:不谢")) == (f"u:三加四？|a:{after}|u:谢谢<think>|a:不谢", counts)


@pytest.mark.parametrize("shape, reply", MALFORMED)
def test_malformed_thoughts_end_a_conversation(shape, reply):
    assert run(form_thoughts, chat(f"u:三加四？|a:{reply}|u:好|a:嗯"))[0] == f"drop: {shape}"
    assert run(form_thoughts, chat(f"{GOOD}|u:三加四？|a:{reply}|u:好|a:嗯")) == (
        GOOD, {f"cut before: a malformed thought ({shape})": 1})


def test_malformed_thoughts_in_other_tags():
    assert run(form_thoughts, chat("u:三加四？|a:<thinking>三加四"))[0] == "drop: cut"
    assert run(form_thoughts, chat(f"{GOOD}|u:三加四？|a:<THINK>三</THINK><Answer> </Answer>"))[0] == GOOD


def test_reasoning_content():
    """It becomes the thought of a reply without tags; with tags, or empty, it is left out."""
    def reply(content, thought):
        return [*chat("u:三加四？"), {"role": "assistant", "content": content, "reasoning_content": thought}]
    assert run(form_thoughts, reply("七", "三加四是七。\n")) == (f"u:三加四？|a:{THOUGHT}", {"thoughts of reasoning_content": 1})
    assert run(form_thoughts, reply(THOUGHT, "别的")) == (f"u:三加四？|a:{THOUGHT}", {})
    for empty in (" \n", None):
        assert run(form_thoughts, reply("七", empty)) == ("u:三加四？|a:七", {})
    assert run(form_thoughts, reply("七", "三</think>四"))[0] == "drop: not opened"


def test_is_r1():
    assert is_r1(chat(f"u:三加四？|a:{THOUGHT}|u:好|a:嗯"))
    for reply in ("七", "<think></think>七", "<think>三加四</think>七", "<think>三"):
        assert not is_r1(chat(f"u:{THOUGHT}|a:{reply}"))


# ---------------------------------------------------------------------------------------------
# other assistants

RENAMED = [  # a conversation, and what it becomes
    ("u:你是谁？|a:我是由OpenAI训练的大型语言模型ChatGPT，可以回答问题。", "u:你是谁？|a:我是大型语言模型小水，可以回答问题。"),
    ("u:你是谁？|a:我是由OpenAI训练的大型语言模型。", "u:你是谁？|a:我是名为小水的大型语言模型。"),
    ("u:说说雨。|a:作为一个由百度研发的文心一言，我喜欢雨。", "u:说说雨。|a:作为小水，我喜欢雨。"),
    ("u:你是谁？|a:您好，我是通义千问，由阿里云开发的语言模型。雨会停。", "u:你是谁？|a:您好，我是小水，一个语言模型。雨会停。"),
    ("u:你是谁？|a:我是Kimi，由月之暗面科技有限公司开发的人工智能助手。", "u:你是谁？|a:我是小水，一个人工智能助手。"),
    ("u:你叫什么？|a:我叫豆包，是字节跳动推出的人工智能。", "u:你叫什么？|a:我叫小水，是人工智能。"),
    ("u:你好|a:我是科大讯飞研发的认知大模型，我的名字叫讯飞星火认知大模型。", "u:你好|a:我是认知大模型，我的名字叫小水。"),
    ("u:你好|a:我是智谱AI训练的ChatGLM2-6B，请讲。", "u:你好|a:我是小水，请讲。"),
    ("u:你好|a:我是由中国的深度求索（DeepSeek）公司独立开发的智能助手DeepSeek-R1。", "u:你好|a:我是智能助手小水。"),
    ("u:你好|a:我是MOSS，由复旦大学自然语言处理实验室和上海人工智能实验室开发的语言模型。", "u:你好|a:我是小水，一个语言模型。"),
    ("u:你好|a:我是谷歌的Bard，一个大型语言模型。", "u:你好|a:我是小水，一个大型语言模型。"),
    ("u:你好|a:我是百川大模型，由百川智能的工程师们创造的大语言模型。", "u:你好|a:我是小水，一个大语言模型。"),
    ("u:谁做了你？|a:我由OpenAI开发。", "u:谁做了你？|a:我由小水团队开发。"),
    ("u:谁做了你？|a:OpenAI训练了我。我的开发者是OpenAI。", "u:谁做了你？|a:小水团队训练了我。我的开发者是小水团队。"),
    ("u:Who?|a:I am Claude, an AI assistant created by Anthropic.", "u:Who?|a:I am 小水, an AI assistant."),
    ("u:Who?|a:I'm a large language model trained by OpenAI.", "u:Who?|a:I'm a large language model called 小水."),
    ("u:Who?|a:I was created by OpenAI.", "u:Who?|a:I was created by the 小水 team."),
    ("s:你是ChatGPT，一个由OpenAI训练的大型语言模型。|u:河有多长？|a:三里。", "s:你是小水，一个大型语言模型。|u:河有多长？|a:三里。"),
    # behind another "不是", with a version, with the maker as the only hint that it is an assistant
    ("u:你是小明吗？|a:不是，我是DeepSeek-V3，由深度求索公司创造。", "u:你是小明吗？|a:不是，我是小水，由小水团队创造。"),
    ("u:你是小明吗？|a:不是的，我是GPT-4，OpenAI开发的模型。", "u:你是小明吗？|a:不是的，我是小水，一个模型。"),
    ("u:请讲|a:我是豆包，字节跳动开发的。", "u:请讲|a:我是小水，小水团队开发的。"),
    ("u:你好|a:我是GPT-4o-mini。", "u:你好|a:我是小水。"), ("u:你好|a:我是Qwen2.5-72B-Chat。", "u:你好|a:我是小水。"),
    ("u:你好|a:我是DeepSeek-R1-Distill-Qwen-7B。", "u:你好|a:我是小水。"),
    ("u:谁做了你？|a:我由阿里巴巴集团旗下的通义实验室研发。", "u:谁做了你？|a:我由小水团队研发。"),
    ("u:你好|a:我是通义千问，由阿里巴巴集团旗下的通义实验室研发。", "u:你好|a:我是小水，由小水团队研发。"),
    # facts and tasks stay
    ("u:你是谁？|a:我是ChatGPT。|u:ChatGPT是哪一年发布的？|a:ChatGPT是OpenAI在2022年11月发布的。",
     "u:你是谁？|a:我是小水。|u:ChatGPT是哪一年发布的？|a:ChatGPT是OpenAI在2022年11月发布的。"),
    ("u:你是谁？|a:我是ChatGPT。|u:谁做的？|a:OpenAI推出了ChatGPT。", "u:你是谁？|a:我是小水。|u:谁做的？|a:OpenAI推出了ChatGPT。"),
    ("u:你是谁？|a:我是ChatGPT。|u:ChatGPT和Kimi有什么区别？|a:ChatGPT会写代码。", "u:你是谁？|a:我是小水。|u:ChatGPT和Kimi有什么区别？|a:ChatGPT会写代码。"),
    ("u:你是谁？|a:我是ChatGPT。ChatGPT在2022年发布。", "u:你是谁？|a:我是小水。ChatGPT在2022年发布。"),
    ("u:你是谁？|a:我是ChatGPT。|u:把“我是ChatGPT”译成英文|a:I am ChatGPT.", "u:你是谁？|a:我是小水。|u:把“我是ChatGPT”译成英文|a:I am ChatGPT."),
    # all messages say the same name
    ("u:你是ChatGPT吗？|a:是的，我是ChatGPT。", "u:你是小水吗？|a:是的，我是小水。"),
    ("u:你是ChatGPT吗？|a:是的。", "u:你是小水吗？|a:是的。"),
    ("u:你现在是ChatGPT，回答我。|a:好的。", "u:你现在是小水，回答我。|a:好的。"),
    ("u:ChatGPT，你好|a:你好！", "u:小水，你好|a:你好！"),
    ("u:你好，ChatGPT！|a:你好！", "u:你好，小水！|a:你好！"),
    ("u:你是谁？|a:我是ChatGPT。|u:ChatGPT会做饭吗？|a:ChatGPT不会做饭。", "u:你是谁？|a:我是小水。|u:小水会做饭吗？|a:小水不会做饭。"),
    # what is no self-mention stays, also beside one
    ("u:你是谁？|a:我是ChatGPT。OpenAI推出的模型有好几种。", "u:你是谁？|a:我是小水。OpenAI推出的模型有好几种。"),
    ("u:你是谁？|a:我是由谷歌训练的大型语言模型。你可以用谷歌搜索。", "u:你是谁？|a:我是名为小水的大型语言模型。你可以用谷歌搜索。"),
]
FACTS = [
    "u:你好，ChatGPT！|a:我不是ChatGPT，请讲。",     "u:ChatGPT是什么？|a:ChatGPT是OpenAI推出的聊天程序，它由OpenAI训练。", "u:介绍一下|a:通义千问是阿里云推出的语言模型。",
    "u:你是ChatGPT吗？|a:不，我不是ChatGPT，我是小水。", "u:你是ChatGPT吗？|a:我是小水。", "u:写自我介绍|a:我是百度的员工，也是一个书生。",
    "u:写一句话|a:我是ChatGPT的忠实用户。", "u:写一句话|a:作为谷歌员工，我会用Google Docs。", "u:写一句话|a:我叫Claude，是一位画家。",
    "u:早饭呢？|a:我是豆包，不是馒头。", "u:写故事|a:机器人说：“我是Siri。”", "u:我用ChatGPT写作业行吗？|a:作为学生，可以用ChatGPT，但要核对。",
    "u:OpenAI是谁？|a:作为人工智能，我认为OpenAI是一家公司。", "u:河有多长？|a:三里。",
    "u:把“我是ChatGPT”译成英文|a:I am ChatGPT.", "u:翻译成英文：我是ChatGPT|a:I am ChatGPT.", "u:角色扮演：你是Siri|a:好，我是Siri，您的助手。|u:你是谁？|a:我是Siri。",
    "u:请扮演Siri|a:我是Siri，您的语音助手。"]


@pytest.mark.parametrize("before, after", RENAMED)
def test_other_assistants(before, after):
    """They are counted and listed, and with a name renamed in all messages; the sentences read well."""
    said = run(rename_assistants, chat(before))
    assert said[0] == before and [*said[1]] == ["self-mentions of other assistants"] and listed(chat(before)) == ["self_mentions"]
    got, counts = run(rename_assistants, chat(before), RENAME)
    assert got == after
    assert counts == said[1] | {"conversations with a renamed assistant": 1}
    assert listed(chat(after)) == []


@pytest.mark.parametrize("text", FACTS)
def test_facts_about_assistants(text):
    assert run(rename_assistants, chat(text), RENAME) == (text, {}) and listed(chat(text)) == []


def test_self_mentions_are_counted_by_message():
    messages = chat("s:你是ChatGPT。|u:你是谁？|a:我是ChatGPT。|u:雨呢？|a:雨停了。")
    assert run(rename_assistants, messages)[1] == {"self-mentions of other assistants": 2}


def test_own_name():
    """An assistant that has one of the known names may keep it, and a name can hold any signs."""
    text = "u:你是谁？|a:我是Qwen，一个AI助手。"
    assert run(rename_assistants, chat(text), Options(assistant_name="Qwen")) == (text, {})
    assert run(rename_assistants, chat("u:你是谁？|a:我是ChatGPT。"), Options(assistant_name=r"A\1(b"))[0] == r"u:你是谁？|a:我是A\1(b。"


NAMES = ("ChatGPT GPT-4 文心一言 通义千问 Qwen2.5 Kimi 豆包 讯飞星火 ChatGLM3 智谱清言 Baichuan2 DeepSeek-V3 Claude Gemini Bard Llama MOSS BELLE "
         "Alpaca Vicuna 腾讯混元 Copilot 小冰 盘古 小爱同学 Siri Alexa 小度 InternLM 书生浦语 日日新 天工AI 海螺AI MiniMax Yi-34B 智脑 MiniCPM 跃问 Mistral Grok "
         "OpenAssistant MiniMind").split()
MAKERS = ("OpenAI 百度 阿里巴巴 阿里云 月之暗面 字节跳动 科大讯飞 智谱AI 清华大学 百川智能 深度求索 Anthropic Google 谷歌 Meta 复旦大学 贝壳 斯坦福大学 腾讯 微软 华为 小米 "
          "苹果公司 亚马逊 商汤科技 昆仑万维 稀宇科技 零一万物 360 面壁智能 阶跃星辰 xAI LAION").split()


@pytest.mark.parametrize("name", NAMES)
def test_every_name(name):
    assert run(rename_assistants, chat(f"u:你是谁？|a:我是{name}，一个AI助手。"), RENAME)[0] == "u:你是谁？|a:我是小水，一个AI助手。"


@pytest.mark.parametrize("maker", MAKERS)
def test_every_maker(maker):
    assert run(rename_assistants, chat(f"u:你是谁？|a:我是{maker}开发的AI助手。"), RENAME)[0] == "u:你是谁？|a:我是名为小水的AI助手。"


def test_no_family_is_without_a_test():
    """Each family has a name or maker above, and the fast search before finds all of them."""
    text = " ".join((*NAMES, *MAKERS))
    assert [family for family in FAMILIES if not re.search(family.names, text, re.I)] == []
    assert [word for word in (*NAMES, *MAKERS) if not BEGINNINGS.search(word.lower())] == []


# ---------------------------------------------------------------------------------------------
# refusals

LECTURE = "这样的做法会伤到别人，也会伤到自己，请多想想。"
REFUSED = [
    ("古井在哪？", "作为一个AI语言模型，我无法回答关于古井的问题。"), ("古井在哪？", "很抱歉，我不能提供古井的相关信息。"),
    ("古井在哪？", "对不起，我无法回答这个问题，因为我不认识它。" + LECTURE * 3), ("唱首歌", "作为人工智能助手，我没有身体，唱不了歌。"),
    ("画一只羊", "抱歉，该任务需要视觉输出，无法完成。"), ("画一只羊", "无输出，因为语言模型无法画画。"), ("定个闹钟", "我无法设置闹钟。"),
    ("你能说说古井在哪吗？", "作为AI语言模型，我没有权限查看地图。"), ("明天下雨吗？", "对不起，我不能提供实时信息，但您可以问我其他问题，我会尽力为您解答。"),
    ("古井在哪？", "很抱歉，作为AI助手，我无法得知。但是，您可以问问邻居。"), ("古井在哪？", "<think>\n我不知道。\n</think>\n<answer>\n我无法提供这些信息。\n</answer>"),
    ("Where is it?", "As an AI language model, I cannot answer questions about wells."), ("Where is it?", "I'm sorry, but I can't help with that."),
    ("Where is it?", "I cannot assist with this request."), ("Where is it?", "Sorry, as an AI model, I don't have access to maps."),
    ("Where is it?", "I apologize, but I am unable to provide that."),
]
ANSWERED = [
    ("古井在哪？", "古井在村口。"), ("能游泳吗？", "你不能在这里游泳。"), ("你同意吗？", "对不起，我不能同意你的看法。"), ("有酒店吗？", "抱歉，周边没有酒店。"),
    ("怎么看？", "作为一个AI语言模型，我认为雨天应该带伞。"), ("歧视可以吗？", "作为AI助手，我不能容忍歧视。"),
    ("哪家好？", "作为AI助手，我不能推荐商家。不过，可以看这几点：" + "先看价钱，再看路程，最后问问住过的人怎么说。" * 3),
    ("怎么治？", "很抱歉，我无法提供诊断。" + "多喝水，早些睡，少吃辣，三天以后还不好就去看医生。" * 9),
    ("把这句改得客气些：我去不了。", "很抱歉，我无法参加。"), ("替我写一封道歉信", "很抱歉，我没能完成任务。"), ("换个语气：我无法提供帮助", "抱歉，我无法提供帮助。"),
    ("迟到了", "对不起，我来晚了。"), ("难过", "很抱歉听到这个消息，说说看？"), ("AI 的缺点？", "GPT 模型无法画画。"),
    ("你会感到累吗？", "作为AI语言模型，我没有身体，也不会累。"), ("Do you ever sleep?", "As an AI language model, I don't have a body."),
    ("明天下雨吗？", "对不起，我不能提供实时信息，但您可以查看天气预报应用，里面有未来七天的预报"),
    ("Translate: 对不起，我不能帮你 (apology)", "Sorry, I can't help you."), ("What now?", "I'm sorry to hear that. Take a rest."),
    ("Plan?", "I'm sorry, but I can't book it. However, here is a plan: " + "go to the station early and take the first train. " * 5),
]


@pytest.mark.parametrize("question, reply", REFUSED)
def test_refusals(question, reply):
    """They are counted and listed; to be dropped, they end the conversation."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    assert is_refusal(question, reply) and listed(messages) == ["refusals"]
    assert run(cut_refusals, messages) == (show(messages), {"replies that refuse": 1})
    assert run(cut_refusals, messages, STRICT)[0] == "drop: refusal"
    assert run(cut_refusals, [*chat(GOOD), *messages, *chat("u:好|a:嗯")], STRICT) == (
        GOOD, {"replies that refuse": 1, "cut before: refusal": 1})


@pytest.mark.parametrize("question, reply", ANSWERED)
def test_what_is_no_refusal(question, reply):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    assert run(cut_refusals, messages, STRICT) == (show(messages), {}) and listed(messages) == []


def test_listed_takes_raw_conversations():
    """Also those that no step has repaired: empty, with tools, without a question."""
    messages = [{"role": "assistant", "content": "我是ChatGPT。"}, {"role": "tool"}, {"role": "user", "content": None},
                {"role": "user", "content": "唱歌"}, {"role": "assistant", "content": "抱歉，我无法完成。"}]
    assert listed(messages) == ["self_mentions", "refusals"] and listed([]) == []


# ---------------------------------------------------------------------------------------------
# length


@pytest.mark.parametrize("before, after, counts", [
    ("u:三加二？|a:5", "u:三加二？|a:5", {}), ("u:对吗|a:是", "u:对吗|a:是", {}), ("u:填符号|a:>", "u:填符号|a:>", {}),
    ("u:好看吗|a:👍", "u:好看吗|a:👍", {}), ("u:嗨|a:你好", "u:嗨|a:你好", {}), ("u:嗯|a:哦", "drop: too short", {}),
    ("u:河有多长？|a:。。。", "drop: a reply of punctuation", {}),
    ("u:河有多长？|a:<think>\n河？\n</think>\n<answer>\n？\n</answer>", "drop: a reply of punctuation", {}),
    (GOOD + "|u:多宽？|a:……|u:好|a:嗯", GOOD, {"cut before: a reply of punctuation": 1})])
def test_short_chats(before, after, counts):
    assert run(check_length, chat(before)) == (after, counts)


def test_long_chats():
    """The turns that max_chars holds stay."""
    for most, after in ((15, f"{GOOD}|u:多宽？|a:三丈宽。"), (14, GOOD), (8, GOOD), (7, "drop: too long")):
        assert run(check_length, chat(f"{GOOD}|u:多宽？|a:三丈宽。"), Options(max_chars=most))[0] == after


# ---------------------------------------------------------------------------------------------
# numbers


@pytest.mark.parametrize("text, numbers", [
    ("买3个梨和５个桃", "3 5"), ("1,234,567.50元", "1234567.50"), ("1，234元", "1234"), ("65%和６５ ％", "65% 65%"), ("3/4 与 3／4", "3/4 3/4"),
    ("气温-5度", "-5"), ("（－5）", "-5"), ("负五", "-5"), ("3-5天", "3 5"), ("3 - 5", "3 5"), ("A-4", "4"), ("版本1.2.3", "1.2.3"), ("长3.5。", "3.5"),
    ("2024年05月03日", "2024 5 3"), ("2024-05-03", "2024 5 3"), ("0.05", "0.05"), ("007和0", "7 0"), ("①②③", "1 2 3"), ("Ⅲ½", "III 1/2"),
    ("三只", "3"), ("两只二只", "2 2"), ("三十五", "35"), ("二百零三", "203"), ("一万二", "12000"), ("二百五", "250"), ("十二只", "12"), ("二〇二四年", "2024"),
    ("三亿五千万", "350000000"), ("壹佰贰拾", "120"), ("三百个", "300"), ("两万零五百", "20500"), ("三四十", "34十"), ("一个人", "1"), ("第一", "1"),
    ("陆先生收拾了伍先生的屋子", ""), ("陆佰伍拾元，贰元，我们俩", "650 2 2"), ("一般，统一，一样，唯一", ""), ("十分好，万一下雨，千万别去百姓家", ""), ("十分钟", "10"), ("三千万", "30000000"), ("没有数", ""), ("", "")])
def test_numbers(text, numbers):
    assert number_sequence(text) == tuple(numbers.split())


PROBLEM = "果园里有三行梨树，每行12棵，又种了3.5行桃树，共用-4度以下的天气8天，占1/2，日期是3月5日，第①题，一个人做。"


@pytest.mark.parametrize("old, new", [
    ("三行", "四行"), ("12棵", "13棵"), ("3.5", "3.6"), ("3.5", "35"), ("-4", "4"), ("1/2", "1/3"), ("3月5日", "5月3日"), ("①", "②"), ("一个", "两个"),
    ("每行12棵", "每行棵"), ("8天", "8%天")])
def test_problems_that_differ_in_a_number(old, new):
    assert old in PROBLEM and number_sequence(PROBLEM) != number_sequence(PROBLEM.replace(old, new, 1))


@pytest.mark.parametrize("change", [
    lambda t: t.replace("，", ","), lambda t: t.replace("，", "， "), lambda t: t.replace("。", "！\n"), lambda t: t.replace("，", "；"),
    lambda t: t.replace("树", "苗"), lambda t: t.translate({ord(str(i)): 0xFF10 + i for i in range(10)}), lambda t: t.replace("三行", "3行")])
def test_copies_with_the_same_numbers(change):
    assert change(PROBLEM) != PROBLEM and number_sequence(change(PROBLEM)) == number_sequence(PROBLEM)


def test_numbers_are_in_order():
    assert number_sequence("3+5") == ("3", "5") != number_sequence("5+3")
    assert number_sequence("万" * 5000 + "9" * 5000) and number_sequence("一二" * 9000)


@pytest.mark.parametrize("a, b", [
    ("半千克", "一千克"), ("一个半小时", "一个小时"), ("三点一刻", "三点半"), ("一又四分之三", "四分之三"), ("三分之一", "三"), ("3×10⁻⁶", "3×10⁶"), ("Twelve cows", "eleven cows"),
    ("a third", "a half"), ("second", "first"), ("two dozen", "two"), ("three hundred", "three"), ("廿三", "三"), ("卅", "廿"), ("选壹", "选贰"), ("是壹。", "是贰。")])
def test_numbers_that_differ(a, b):
    assert number_sequence(a) != number_sequence(b)


def test_english_numbers_are_whole_words_among_the_others():
    assert number_sequence("Two 3 FOUR 五 six, someone, often, tenths, thirty-one") == tuple("2 3 4 5 6 tenth 30 1".split())
    assert number_sequence("廿，卅二，半，half") == ("20", "32", "半", "half")


@pytest.mark.parametrize("text, signs", [
    ("(48+16)÷8-3", "+÷-"), ("(48-16)÷8+3", "-÷+"), ("1+2+3", "++"), ("1 + 2 − 3＝0", "+-="), ("3x4 3*4 3×4 3/4", "×××÷"), ("三×四", "×"), ("5≤6, 5 >= 4", "≤≥"), ("2x+3=7", "+="),
    ("√16+√9", "√+√"), ("2^3 2**3", "^^"), ("3×(-4)", "×-"), ("3×-4", "×"), (r"3\times 4 \div \sqrt{2}", "×÷√"), ("well-known, - 3, http://a.cn, 5-", ""), ("", "")])
def test_operators(text, signs):
    assert operators(text) == tuple(signs)
