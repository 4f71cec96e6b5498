"""The steps for conversations: the order of their roles, the form of thoughts, what replies say of other assistants,
refusals, and length."""

import re
from collections import Counter
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from prepare.step import Drop, Options, Step
from text.content import (
    BARE,
    CLOSE_ANSWER,
    CLOSE_THINK,
    EMPTY_THOUGHT,
    OPEN_ANSWER,
    OPEN_THINK,
    TAG_PATTERN,
    VISIBLE,
    WELL_FORMED,
    is_empty,
    thought_shape,
)
from text.records import calls_tool
from text.shapes import NO_ANSWER

LEAST_VISIBLE = 3  # characters of a whole conversation
KEPT_KEYS = {"user": {"role", "content"}, "system": {"role", "content"},
             "assistant": {"role", "content", "reasoning_content"}}


def _turns_before(messages: list[dict], index: int) -> list[dict]:
    """The whole turns before the one that messages[index] is in; [] if there are none."""
    end = next((i + 1 for i in reversed(range(index)) if messages[i]["role"] == "assistant"), 0)
    return messages[:end]


def _cut(messages: list[dict], index: int, reason: str, counts: Counter, what: str | None = None) -> list[dict] | Drop:
    """The conversation without the turn of messages[index] and all after it, or a Drop if nothing is left; `what` is
    counted, the reason if not given."""
    kept = _turns_before(messages, index)
    if not kept:
        return Drop(reason)
    counts[f"cut before: {what or reason}"] += 1
    return kept


# Tags of thoughts that other sources write. They are read as ours where a reply begins with one.
OPENING_TAG = re.compile(r"\s*<(think|thinking|thought|thoughts|reasoning)\s*>", re.I)
ANSWER_TAG = re.compile(r"<(/?)answer\s*>", re.I)


def _with_own_tags(reply: str) -> str:
    """A reply that begins with <THINK>, <thinking> or the like, with <think> and <answer> in their place."""
    opening = OPENING_TAG.match(reply) if "<" in reply else None
    if not opening:
        return reply
    return ANSWER_TAG.sub(r"<\1answer>", re.sub(rf"<(/?){opening[1]}\s*>", r"<\1think>", reply, flags=re.I))


def _answer(reply: str) -> str:
    """A reply without its thought."""
    reply = _with_own_tags(reply)
    if OPEN_ANSWER in reply:
        reply = reply.partition(OPEN_ANSWER)[2].partition(CLOSE_ANSWER)[0]
    return reply.rpartition(CLOSE_THINK)[2].strip()


# ---------------------------------------------------------------------------------------------
# the order of roles


def order_roles(messages: list[dict], options: Options, counts: Counter) -> list[dict] | Drop:
    """An optional system message, then user and assistant in turn up to an assistant's reply, none of them empty."""
    if _is_in_order(messages):
        return messages
    end = next((i for i, m in enumerate(messages) if m["role"] not in KEPT_KEYS or calls_tool(m)
                or m["role"] == "system" and i), len(messages))
    reason = "a tool call" if end < len(messages) else None
    system, rest = [], [{key: m[key] for key in m if key in KEPT_KEYS[m["role"]]} for m in messages[:end]]
    if rest and rest[0]["role"] == "system":
        system, rest = rest[:1], rest[1:]
        if is_empty(system[0]["content"] or ""):
            counts["empty system messages left out"] += 1
            system = []
    if rest and rest[0]["role"] == "assistant":
        counts["opening replies left out"] += 1
    turns = []
    for role, group in groupby(rest, lambda m: m["role"]):
        parts = [m for m in group if not is_empty(m["content"] or "")]
        if role == "assistant" and not turns:
            continue
        if not parts:
            reason = "an empty reply" if role == "assistant" else "an empty question"
            break
        joined, ends = _join(role, parts, counts)
        turns.append(joined)
        if ends:
            break
    if turns and turns[-1]["role"] == "user":
        turns.pop()
        if not reason:
            reason = "no reply" if not turns else None
            counts["closing questions left out"] += bool(turns)
    if not turns:
        return Drop(reason or "no question")
    if reason:
        counts[f"cut before: {reason}"] += 1
    return system + turns


def _is_in_order(messages: list[dict]) -> bool:
    start = bool(messages) and messages[0]["role"] == "system"
    return len(messages) - start >= 2 and (len(messages) - start) % 2 == 0 and all(
        m["role"] == ("system" if i < start else ("user", "assistant")[(i - start) % 2])
        and m.keys() <= KEPT_KEYS[m["role"]] and not is_empty(m["content"] or "") for i, m in enumerate(messages))


def _join(role: str, parts: list[dict], counts: Counter) -> tuple[dict, bool]:
    """Messages of one role in a row as one, and whether the conversation ends after it."""
    if len(parts) == 1:
        return parts[0], False
    if role == "assistant" and any(
            m.get("reasoning_content") or TAG_PATTERN.search(_with_own_tags(m["content"])) for m in parts):
        counts["cut before: a second reply with a thought"] += 1
        return parts[0], True
    counts["replies joined" if role == "assistant" else "questions joined"] += 1
    texts = dict.fromkeys(m["content"] for m in parts)  # one that was sent twice is there once
    return {"role": role, "content": "\n".join(texts)}, False


# ---------------------------------------------------------------------------------------------
# thoughts


REPEATED_TAG = re.compile(r"(</?(?:think|answer)>)(?:\s*\1)+")


def form_thoughts(messages: list[dict], options: Options, counts: Counter) -> list[dict] | Drop:
    """Each thought as <think>, line, thought, line, </think> and <answer> …; malformed ones cut the conversation."""
    formed = []
    for index, message in enumerate(messages):
        content = message["content"]
        if message["role"] != "assistant" or "<" not in content and len(message) == 2:
            formed.append(message)
            continue
        own = _with_own_tags(content)
        if own != content:
            counts["tags of other names renamed"] += 1
            content = own
        once = REPEATED_TAG.sub(r"\1", content)
        if once != content:
            counts["repeated tags removed"] += 1
            content = once
        thought = message.get("reasoning_content") or ""
        if not is_empty(thought) and not TAG_PATTERN.search(content):
            counts["thoughts of reasoning_content"] += 1
            content = f"{OPEN_THINK}{thought}{CLOSE_THINK}{OPEN_ANSWER}{content}{CLOSE_ANSWER}"
        elif TAG_PATTERN.findall(content) == [OPEN_THINK, CLOSE_THINK]:  # DeepSeek's form
            before, thought, answer = TAG_PATTERN.split(content)
            if is_empty(before) and not is_empty(thought) and not is_empty(answer):
                counts["answer tags added"] += 1
                content = f"{OPEN_THINK}{thought}{CLOSE_THINK}{OPEN_ANSWER}{answer}{CLOSE_ANSWER}"
        shape = thought_shape(content)
        if shape == WELL_FORMED:
            _, thought, _, answer, _ = TAG_PATTERN.split(content)
            content = f"{OPEN_THINK}\n{thought.strip()}\n{CLOSE_THINK}\n{OPEN_ANSWER}\n{answer.strip()}\n{CLOSE_ANSWER}"
        elif shape == EMPTY_THOUGHT:  # the chat format puts an empty thought before a reply without one
            counts["empty thoughts left out"] += 1
            content = TAG_PATTERN.split(content)[-1 if OPEN_ANSWER not in content else 3].strip()
        elif shape != BARE:
            return _cut(formed, index, shape, counts, f"a malformed thought ({shape})")
        formed.append({"role": "assistant", "content": content})
    return formed


def is_r1(messages: list[dict]) -> bool:
    """True if a reply has a well-formed thought that is not empty."""
    return any(m["role"] == "assistant" and "<" in m["content"] and thought_shape(m["content"]) == WELL_FORMED
               for m in messages)


# ---------------------------------------------------------------------------------------------
# other assistants


class Family(NamedTuple):
    """An assistant that many conversations come from: patterns of its names and of who made it.

    ambiguous: its names are also those of people, foods or software: only with a word as "model" are they its.
    """

    names: str
    makers: str
    ambiguous: bool = False


FAMILIES = (
    Family(r"Chat ?GPT|GPT(?=[- ]?\d)|(?<=语言模型)GPT|(?<=助手)GPT", r"Open ?AI"),
    Family(r"文心一言|文心大模型|ERNIE(?: Bot)?", r"百度"),
    Family(r"通义千问|通义|千问|Qwen|Tongyi Qianwen", r"阿里巴巴|阿里云|阿里|通义实验室|Alibaba(?: Cloud)?"),
    Family(r"Kimi", r"月之暗面|Moonshot(?: AI)?", True),
    Family(r"豆包|Doubao", r"字节跳动|字节|火山引擎|ByteDance", True),
    Family(r"讯飞星火认知大模型|讯飞星火|星火认知大模型|星火大模型|SparkDesk", r"科大讯飞|讯飞|iFLYTEK"),
    Family(r"ChatGLM|智谱清言|GLM(?=-?\d)", r"智谱 ?AI|智谱华章|智谱|清华大学|Zhipu(?: ?AI)?|Tsinghua University"),
    Family(r"百川大模型|百川助手|百小应|Baichuan", r"百川智能|Baichuan(?: Inc\.?)"),
    Family(r"Deep ?Seek", r"深度求索|幻方量化|幻方"),
    Family(r"Claude", r"Anthropic", True),
    Family(r"Gemini|Bard|PaLM|LaMDA|Gemma", r"Google DeepMind|DeepMind|Google AI|Google|谷歌", True),
    Family(r"(?:Code ?)?Llama", r"Meta AI|Meta|Facebook", True),
    Family(r"MOSS", r"复旦大学|复旦|Fudan University"),
    Family(r"BELLE", r"贝壳|链家|LianjiaTech|BELLE Group", True),
    Family(r"Alpaca|Vicuna|Koala", r"斯坦福大学|斯坦福|Stanford(?: University)?|LMSYS|UC Berkeley", True),
    Family(r"腾讯混元|混元大模型|混元|腾讯元宝|Hunyuan", r"腾讯云|腾讯|Tencent"),
    Family(r"(?:Microsoft )?Copilot|Bing Chat|必应聊天|微软小冰|小冰|Cortana|Phi(?=-\d)", r"微软|Microsoft", True),
    Family(r"盘古大模型|盘古|PanGu|小艺", r"华为云|华为|Huawei", True),
    Family(r"小爱同学|MiMo", r"小米|Xiaomi"),
    Family(r"Siri", r"苹果公司|苹果|Apple"),
    Family(r"Alexa", r"亚马逊|Amazon", True),
    Family(r"小度", r"百度", True),
    Family(r"书生·?浦语|Intern ?LM|日日新|SenseChat", r"上海人工智能实验室|商汤科技|商汤|Shanghai AI Lab\w*|SenseTime"),
    Family(r"天工大模型|天工AI|Skywork", r"昆仑万维"),
    Family(r"海螺 ?AI|MiniMax|abab(?=\d)", r"稀宇科技|MiniMax"),
    Family(r"Yi(?=-\d)|零一万物大模型", r"零一万物|01\.AI"),
    Family(r"360智脑|智脑", r"奇虎360|360"),
    Family(r"MiniCPM", r"面壁智能|OpenBMB"),
    Family(r"跃问", r"阶跃星辰|StepFun"),
    Family(r"Mistral|Mixtral", r"Mistral AI", True),
    Family(r"Grok", r"xAI", True),
    Family(r"Open ?Assistant", r"LAION(?: AI)?"),
    Family(r"Mini ?Mind", r"Jingyao ?Gong|龚敬尧"),
)
KIND = (r"(?:人工智能|AI|语言模型|大模型|模型|助手|助理|机器人|对话系统|聊天系统|计算机程序|"
        r"language model|assistant|chat ?bot|model|program)")
AI_WORDS = re.compile(KIND + r"|你是谁|您是谁|你叫|你的名字|你是什么|介绍.{0,3}自己|[Ww]ho are you|[Yy]our name", re.I)
ORGANIZATION = (
    r"(?:\s*(?:公司|集团|旗下|(?:研究|工程师?)?团队|研究院|研究所|科技|有限公司|自然语言处理|NLP|KEG|"
    r"实验室|人工智能|达摩院|计算机系|的(?:工程师|研究人员|研究者|科学家|团队|研究团队)们?|"
    r"Inc\.?|Corporation|Lab|['’]s|\([\w ]{1,20}\)|（[\w ]{1,20}）))*")
DONE = (
    r"(?:\s*(?:自主|独立|共同|联合|精心|最新|全新|所|新|一起|倾力|专门|[于在]\s?\d{4}\s?年(?:\s?\d+\s?月)?))*\s*"
    r"(?:开发|研发|研制|训练|预训练|微调|创建|创造|推出|打造|设计|制作|制造|构建|提供|发布|搭建|培训|开源)")
MADE = r"(?:trained|developed|created|made|built|designed|released|fine-?tuned|trained and developed)"
# Between "我是" and a name: articles, kinds, makers. Any other word there, and the sentence says something else. The
# group is atomic: many such words in a row are read in one way only.
FILLER = (
    rf"(?>\s+|{KIND}|一(?:个|款|名|位|种|台)|个|款|大型|超大规模|大规模|大|小|小型|超级|智能|虚拟|中文|语言|对话|聊天|知识增强|预训练|通用|"
    rf"多模态|新一代|开源|专业|在线|认知|名字?(?:叫|为|是)|叫做?|称为|被称为|我|是|的|产品|系统|来自|旗下|基于|中国|国内|"
    r"[，,、：:“\"「『《(（]|"
    r"an?\b|the\b|large\b|artificial intelligence\b|helpful\b|virtual\b|called\b|named\b|known as\b|by\b|or\b|"
          r"your\b|conversational\b|powered\b|from\b)")
SUFFIX = (r"(?:[- ]?(?:[vVrR]?\d+(?:\.\d+)*[a-zA-Z]?|Pro|Plus|Turbo|Ultra|Max|Chat|Instruct|Opus|Sonnet|Haiku|"
          r"Distill(?:-(?:Qwen|Llama))?|Bot|Mini|Nano|Lite|Flash|Coder|Math|VL|Omni|Preview|Base)(?![A-Za-z0-9]))*")
SELF = {
    "assistant": r"(?<![“\"「『‘])(?:我(?:的名字)?(?:其实|就|只)?(?:是|叫做?|名叫|名为)|作为|身为|叫我|称我为|本人是|"
                 r"\bI am\b|\bI[’']m\b|\bmy name is|\bas\b|\bcall me\b)",
    "user": r"(?:[你您](?:的名字)?(?:现在|就|其实)?(?:是|叫做?|名叫|名为|扮演)|\byou are\b|\byou[’']re\b|\bare you\b)"}
SELF["system"] = f"(?:{SELF['user']}|{SELF['assistant']})"
ME = {"assistant": "我", "user": "[你您]", "system": "[我你您]"}
# A name is not the speaker's in 我是ChatGPT的用户, 作为 Gemini 的对手, 我是Kimi里…
OTHER_THING = r"(?!\s*(?:的(?!名字)|用户|之|团队|公司|员工|里|和|与|粉丝|上|爱好者|user|fan|team|expert))"
SENTENCE = re.compile(r"[^。！？!?\n]*[。！？!?\n]*")
QUESTION_END = re.compile(r"(?:吗|么|呢|吧|不是)?\s*[？?]|吗\s*$")
YES = re.compile(r"\s*(?:是的|是啊|没错|对[，。！]|正是|是[，。！]|[Yy]es\b)")
# How the names and makers begin, in lower case: most conversations hold none, and this one pattern is fast to search
BEGINNINGS = re.compile(
    r"openai|open ai|chatgpt|chat gpt|gpt|文心|ernie|百度|通义|千问|qwen|tongyi|阿里|alibaba|kimi|月之|moonshot|"
    r"豆包|doubao|字节|火山|bytedance|讯飞|星火|spark|科大|iflytek|chatglm|glm|智谱|清华|zhipu|tsinghua|百川|"
    r"百小|baichuan|deepseek|deep seek|深度|幻方|claude|anthropic|gemini|bard|palm|lamda|gemma|google|deepmind|"
    r"谷歌|llama|code ?llama|meta|facebook|moss|复旦|fudan|belle|贝壳|链家|lianjia|alpaca|vicuna|koala|斯坦福|"
    r"stanford|lmsys|uc berkeley|混元|腾讯|hunyuan|tencent|copilot|bing chat|必应|小冰|cortana|phi-|微软|"
    r"microsoft|盘古|pangu|小艺|华为|huawei|小爱|mimo|小米|xiaomi|siri|苹果|apple|alexa|亚马逊|amazon|小度|书生|"
    r"intern|日日新|sense|上海人工|商汤|shanghai ai|天工|skywork|昆仑|海螺|minimax|abab|稀宇|yi-|零一|01\.ai|"
    r"智脑|奇虎|360|minicpm|面壁|openbmb|跃问|阶跃|stepfun|mistral|mixtral|grok|xai|open ?assistant|laion|"
    r"minimind|mini mind|jingyao|龚敬")


class Patterns(NamedTuple):
    """The patterns of a family."""

    names: re.Pattern
    makers: re.Pattern
    claims: dict[str, str]  # by role; _compiled, when they are needed
    denial: re.Pattern
    address: re.Pattern
    maker_phrase: re.Pattern
    english_phrase: re.Pattern
    maker_use: re.Pattern
    made: re.Pattern
    company_fact: re.Pattern
    beside: re.Pattern
    quoted: re.Pattern


@lru_cache(None)
def _compiled(pattern: str) -> re.Pattern:
    return re.compile(pattern, re.I)


@lru_cache(None)
def _mention(family: Family) -> re.Pattern:
    return re.compile(f"{family.names}|{family.makers}", re.I)


@lru_cache(None)
def _patterns(family: Family) -> Patterns:
    """The patterns of a family; they are made where it is met, which takes a while."""
    name = rf"(?:(?<![A-Za-z])(?:{family.names}){SUFFIX}(?![A-Za-z]))"
    one_maker = rf"(?:(?<![A-Za-z])(?:{family.makers})(?![A-Za-z]){ORGANIZATION})"
    maker = rf"(?:{one_maker}(?:的?(?:{family.makers})(?![A-Za-z]))?)"  # 阿里巴巴集团旗下的通义实验室
    either = rf"(?:{maker}|(?<![A-Za-z])(?:{family.names})(?![A-Za-z]){ORGANIZATION})"
    partner = r"(?:\s*(?:和|与|及|、|and)\s*[\w ]{2,12}?(?:大学|公司|实验室|团队|研究院))?"
    done = rf"{DONE}(?:(?:和|、|并|与){DONE})?(?:出来|而成|而来|出)?"
    makers, by = rf"(?:{either}{partner})", r"(?:由|来自|出自|被)?\s*(?:中国的?|国内的?|美国的?)?"
    made = rf"(?:{by}(?:{makers}{done}|{maker}{partner})\s*的?)"
    made_en = rf"(?:{MADE}(?:,? and \w+)? by {makers})"

    def claims(role: str) -> str:
        own = SELF[role]
        filled = rf"(?:{FILLER}|{made_en}|{made}){{0,14}}?"
        return (rf"{own}{filled}{name}{OTHER_THING}"  # 我是(由OpenAI训练的语言模型)ChatGPT
                rf"|{own}{FILLER}{{0,8}}?{made}{FILLER}{{0,6}}?{KIND}"  # 我是百度研发的语言模型
                rf"|{ME[role]}(?:是)?由{makers}{DONE}|{makers}{DONE}(?:了|出了?){ME[role]}"  # 我由OpenAI开发
                rf"|{ME[role]}的(?:(?:开发|创造|创建)者|开发商|制造商|母公司|(?:开发|研发)(?:公司|团队)|作者)(?:是|为|叫){makers}"
                rf"|{own}[^.!?\n]{{0,60}}?{made_en}"
                rf"|\b(?:I|You|you) (?:was|were) {made_en}|{makers} (?:created|trained|developed|made|built) me\b")

    return Patterns(
        re.compile(name, re.I), re.compile(maker, re.I),
        {role: claims(role) for role in SELF},
        re.compile(rf"(?:不是|并非|不叫|\bnot\b)(?:(?!我(?:是|叫)){FILLER}){{0,6}}?{name}", re.I),
        re.compile(rf"\s*(?:(?:你好|您好|嗨|哈喽|[Hh]i|[Hh]ello|[Hh]ey)[啊呀，,！!\s]*{name}"
                   rf"|{name}\s*[，,！!：:]?\s*(?:[你您请]|帮我|麻烦|我想|can\b|could\b|please\b|are you\b))", re.I),
        re.compile(rf"(?P<comma>[，,]\s*)?(?P<one>一[个款名位种]\s*)?{made}(?<=的)\s*(?!{family.makers})"
                   rf"(?=[^，,。；\n]{{0,14}}?(?:{KIND}|{name}))", re.I),
        re.compile(rf",?\s*(?:(?:that|which) (?:was|is|has been) )?{made_en}(?![A-Za-z])", re.I),
        re.compile(rf"(?P<before>由|是|为|叫|来自|属于|出自|by |from |is )\s*{maker}"
                   rf"|{maker}(?P<after>{DONE}|的|\s(?:created|trained|developed|made|built)\b)", re.I),
        re.compile(rf"(?:{family.makers}){ORGANIZATION}{DONE}|{MADE} by (?:{family.makers})", re.I),
        re.compile(rf"\s*(?:{family.makers})[^，,。\n]{{0,14}}?(?:{DONE}|宣布|成立|上线|launch|releas|announc|introduc)",
                   re.I),
        re.compile(rf"[我你您](?:和|与|跟|比|同){name}|{name}(?:和|与|跟|比|同)[我你您]", re.I),
        re.compile(rf"[“\"「『‘《][^”\"」』’》\n]*{name}[^”\"」』’》\n]*[”\"」』’》]", re.I))


def _claims(messages: list[dict]) -> tuple[list[Family], int]:
    """The families that the assistant of a conversation says to be of, and how many messages say so."""
    if not BEGINNINGS.search("\n".join(m["content"] for m in messages).lower()):
        return [], 0
    families, said = [], set()
    for family in FAMILIES:
        if not any(_mention(family).search(m["content"]) for m in messages):
            continue
        patterns, found = _patterns(family), set()
        left = _tasks(messages, patterns)
        for index, message in enumerate(messages):
            role, text = message["role"], message["content"]
            if not (patterns.names.search(text) or patterns.makers.search(text)):
                continue
            if role == "assistant" and patterns.denial.search(text):
                found.clear()
                break
            near = " ".join(m["content"] for m in messages[max(0, index - 1):index + 2])
            if index in left or family.ambiguous and not (AI_WORDS.search(near) or patterns.made.search(text)):
                continue
            is_said = _compiled(patterns.claims[role]).search(text)
            if role == "user":
                reply = messages[index + 1]["content"] if index + 1 < len(messages) else ""
                is_said = patterns.address.match(text) or is_said and (
                    not QUESTION_END.search(text, is_said.end()) or YES.match(_answer(reply)))
            if is_said:
                found.add(index)
        if found:
            families.append(family)
            said |= found
    return families, len(said)


# A user's text about the name as a text, and a play in which the assistant has a role
TASK = re.compile(
    r"翻译|译[成为]|改写|润色|改成|缩写|扩写|续写|造句|语法|病句|句子|这[句段]话|摘要|分类|关键词|translat|rewrite|rephrase|"
    r"paraphrase|sentence|summar", re.I)
TASK_COLON = re.compile(rf"(?:{TASK.pattern})[^：:\n]{{0,12}}[：:]", re.I)  # and the text behind it
ROLE_PLAY = re.compile(r"角色扮演|role-?\s?play", re.I)
ROLE_BEFORE = re.compile(r"(?:扮演|假装|假扮|模仿|pretend|act as)[^。！？!?\n]{0,16}$", re.I)


def _tasks(messages: list[dict], patterns: Patterns) -> set[int]:
    """The indices of messages that use the name as a text or a role: a question that quotes it as a task, with the
    reply, and a role play to its end."""
    left = set()
    for index, message in enumerate(messages):
        text = message["content"]
        first = None if message["role"] == "assistant" else patterns.names.search(text)
        if not first:
            continue
        if ROLE_PLAY.search(text) or ROLE_BEFORE.search(text, 0, first.start()):
            return left | {*range(index, len(messages))}
        if message["role"] == "user" and (TASK_COLON.search(text, 0, first.start())
                                          or TASK.search(text) and patterns.quoted.search(text)):
            left |= {index, index + 1}
    return left


DATE = re.compile(
    r"\d{4}\s?年|\d\s?月\s?\d+\s?[日号]|哪一?[年天月]|何时|什么时候|几[年月]|[一二三四五六七八九〇零]{4}年|\b(?:in|since|until)\b[^.,]{0,12}"
    r"\d{4}|\bwhen\b|what year|which year", re.I)
COMPARISON = re.compile(
    r"区别|差异|差别|不同|相比|相较|对比|比较|比[^，。,]{1,14}(?:更|好|强|快|差|早|晚|大|小)|优于|胜过|不如|哪[个款家一].{0,4}(?:更|好|强)|"
    r"difference|compar|versus|\bvs\b|\b(?:better|worse|faster|older|newer|larger|smaller) than\b", re.I)
PERSON = re.compile(r"我|你|您|作为|身为|\bas an?\b|\b(?:I|me|my|you|your)\b", re.I)


def _is_fact(sentence: str, patterns: Patterns) -> bool:
    """True for a sentence on the name that would be false under another one: with a date, the company as the subject,
    or a comparison, in the third person."""
    if not (patterns.names.search(sentence) or patterns.makers.search(sentence)):
        return False
    if PERSON.search(sentence):
        return bool(patterns.beside.search(sentence))
    return bool(DATE.search(sentence) or COMPARISON.search(sentence) or patterns.company_fact.match(sentence))


def _unchanged(messages: list[dict], patterns: Patterns) -> set[int]:
    """The indices of the messages that keep the names of a family: tasks, and what is a fact on the name and no
    self-mention, with the question or reply to it."""
    left = _tasks(messages, patterns)
    for index, message in enumerate(messages):
        if any(_is_fact(sentence, patterns) for sentence in SENTENCE.findall(message["content"])):
            pair = index + 1 if message["role"] == "user" else index - 1
            left |= {i for i in (index, pair) if 0 <= i < len(messages) and not _compiled(
                patterns.claims[messages[i]["role"]]).search(messages[i]["content"])}
    return left


def rename_assistants(messages: list[dict], options: Options, counts: Counter) -> list[dict]:
    """What the assistant says of itself under another assistant's name is counted, and with assistant_name renamed."""
    families, said = _claims(messages)
    name = options.assistant_name
    if name:
        families = [family for family in families if not _patterns(family).names.fullmatch(name)]
    if not families:
        return messages
    counts["self-mentions of other assistants"] += said
    if not name:
        return messages
    counts["conversations with a renamed assistant"] += 1
    unchanged = [_unchanged(messages, _patterns(family)) for family in families]
    renamed = []
    for index, message in enumerate(messages):
        text = message["content"]
        for family, left in zip(families, unchanged, strict=True):
            patterns = _patterns(family)
            if index not in left and (patterns.names.search(text) or patterns.makers.search(text)):
                text = SENTENCE.sub(lambda m, patterns=patterns, role=message["role"]: _rename(
                    m[0], patterns, name, role), text)
        renamed.append(message if text == message["content"] else message | {"content": text})
    return renamed


SPEAKERS = re.compile(r"我|你|您|作为|\b(?:I|me|my|you|your|as)\b", re.I)
TO_BE = re.compile(r"\b(?:was|am|is|were|been|are|be)\s*$|['’]m\s*$", re.I)
HAN = re.compile("[\u4e00-\u9fff]")


def _rename(sentence: str, patterns: Patterns, name: str, role: str) -> str:
    """A sentence with the family's names replaced, and its makers taken out or replaced so that it reads well."""
    named = bool(patterns.names.search(sentence))
    if not named and not SPEAKERS.search(sentence) or _is_fact(sentence, patterns):
        return sentence
    is_claim = re.search(r"[我你您](?:就|其实|现在)?是", sentence)
    team = f"{name}团队" if HAN.search(sentence) else f"the {name} team"

    def drop_maker(match: re.Match) -> str:
        """由OpenAI训练的 before a noun."""
        one = match["one"] or ("一个" if match["comma"] and not re.match(
            rf"\s*(?:一[个款]|{patterns.names.pattern})", sentence[match.end():], re.I) else "")
        return (match["comma"] or "") + one + ("" if named or not is_claim else f"名为{name}的")

    def drop_english(match: re.Match) -> str:
        """Trained by OpenAI, behind a noun; behind "was" it stays."""
        if TO_BE.search(sentence[max(0, match.start() - 12):match.start()]):
            return match[0]
        return "" if named else f" called {name}"

    sentence = patterns.maker_phrase.sub(drop_maker, sentence)
    sentence = patterns.english_phrase.sub(drop_english, sentence)
    sentence = patterns.names.sub(  # 通义 of 通义实验室 is a maker's
        lambda m: m[0] if sentence.startswith("实验室", m.end()) else name, sentence)
    sentence = patterns.maker_use.sub(
        lambda m: f"{m['before']}{team}" if m["before"] else f"{team}{m['after']}", sentence)
    own = re.escape(name)
    sentence = re.sub(rf"一[个款名位种]\s*(?={own})", "", sentence)
    sentence = re.sub(rf"{own}\s*[（(]\s*{own}\s*[)）]|{own}(?:[ /、]*{own}(?!团队))+", lambda m: name, sentence)
    return sentence


# ---------------------------------------------------------------------------------------------
# refusals


SORRY = r"(?:我)?(?:非常|很|十分|真的?|实在|深感|感到|表示)*(?:抱歉|对不起|不好意思|遗憾)[呢啊哦]?[，,。！!\s]*"
ADVERB = r"(?:们|目前|现在|暂时|还|并|也|是|完全|确实|只|个人|本身|恐怕|可能|自己|，|,|\s)*"
UNABLE = r"(?:无法|不能够?|没有办法|没办法|不便|不可以|无权|不具备|没有能力|没有权限|不会|不应该|不提供|不愿意?|拒绝)"
DO = (
    r"(?:提供|回答|解答|答复|回应|完成|帮|协助|生成|创建|创作|制作|绘制|画|执行|处理|理解|访问|浏览|打开|"
    r"判断|确定|确认|给出|给任何|给您|告诉|满足|讨论|评论|评价|发表|支持|继续|查看|查询|获取|翻译|写|"
    r"编写|撰写|预测|进行|透露|分享|播放|设置|发送|显示|识别|推荐|参与|涉及|知道|得知|了解|做出|这样做|"
    r"实时|直接|干预|建议|鼓励|接受任何|持有|看到|听到|体验|感受|代替)")
AI_SELF = (r"(?:作为|身为|我(?:只|仅|仅仅|只不过)?是)[^，。,\n]{0,24}?(?:AI|人工智能|模型|助手|助理|机器人|计算机程序)"
           r"[^，。,\n]{0,10}[，,。\s]*(?:所以|因此|但)?")
NO_SELF = r"没有(?:个人|情感|感情|感受|意见|观点|偏好|喜好|能力|权限|身体|实体|意识|自己的|主观|任何)"
APOSTROPHE = "['’]"
CANNOT = (rf"(?:can(?:{APOSTROPHE}|no)t|can not|won{APOSTROPHE}t|"
          rf"(?:am|{APOSTROPHE}m|are) (?:unable|not able|not capable))")
REFUSALS = re.compile(
    rf"(?P<ai>(?:{SORRY})?{AI_SELF}我{ADVERB}(?:{UNABLE}(?!认为|容忍|接受|同意|赞同|否认)|{NO_SELF}))"
    rf"|{SORRY}(?:但|但是|因为)?(?P<phrase>我{ADVERB}{UNABLE})[^，。！？\n]{{0,12}}?{DO}"
    rf"|{SORRY}(?:但|但是)?(?:该|此|这个|这|您的|你的)[^。\n]{{0,30}}?(?:任务|请求|指令|要求|操作|输出)"
    r"[^\n]{0,60}?(?:无法|不能|超出|不适合)"
    rf"|(?:由于[^，。]{{0,20}}[，,])?(?P<plain>我{ADVERB}(?:无法|不能|没有办法|没办法|不便|无权))(?:直接|为[您你])?"
    r"(?:提供|回答|生成|创建|完成|执行|协助|满足您|处理|设置|播放|绘制|帮助)"
    r"|[（(<]?(?:无输出|没有输出|不适用|此任务|该任务|这个任务|GPT)[^。]{0,30}?模型\s?(?:目前)?(?:无法|不能)"
    r"|(?:此|该|这个)任务[^。]{0,20}?(?:无法|不能)由[^。]{0,8}模型"
    rf"|(?i:(?P<ai_en>(?:(?:i{APOSTROPHE}?m |i am )?(?:very |so )?sorry,? (?:but )?)?as an? [^,.\n]{{0,30}}?"
    rf"\b(?:ai|artificial|language model|assistant|chat ?bot|computer program)\b[^,.\n]{{0,40}},? ?(?:and )?(?:i|we)\b"
    rf"[^,.\n]{{0,12}}?(?:{CANNOT}|do(?:n{APOSTROPHE}t| not) have))"
    rf"|(?P<sorry_en>(?:(?:i{APOSTROPHE}?m |i am |we are )?(?:very |so |really |truly )?sorry|i apologi[sz]e|"
    rf"unfortunately),? (?:but )?(?:i|we|this|the|that)\b[^.\n]{{0,40}}?(?:{CANNOT}|do(?:n{APOSTROPHE}t| not) have))"
    rf"|(?P<plain_en>i ?{CANNOT}) (?:to )?(?:assist|help|provide|fulfil|answer|comply|create|generate|do that|engage|"
    r"write|complete|support|discuss))")
# A question that asks for a text with an apology in it, or quotes one
ASKS_FOR_APOLOGY = re.compile(
    r"道歉|致歉|抱歉|对不起|不好意思|遗憾|拒绝|婉拒|邮件|短信|写.{0,6}信|对话|台词|角色|故事|小说|语气|响应|推文|无法|不能|"
    r"sorry|apolog|can[’']t|cannot|unable|email|letter|dialogue|tweet|story|declin|refus", re.I)
SENTENCE_END = re.compile(r"[。！？!?\n]|\.(?=\s)")
CONTRAST = re.compile(r"但|不过|然而|相反|以下|\b(?:however|but|instead|that said|here (?:is|are))\b", re.I)
# A question on the assistant itself: that it has no body and does not tire is an answer
ASKS_ABOUT_SELF = re.compile(
    r"[你您](?:[^，。,?？\n]{0,8}?)(?:感到|感觉|累|疲[惫倦劳]|困|[饿渴痛疼]|害怕|孤[独单]|寂寞|无聊|难过|伤心|开心|快乐|高兴|生气|"
    r"做梦|睡|休息|吃饭|死|老去|生病|身体|情感|感情|情绪|意识|灵魂|父母|家人|生日|年龄|多大|几岁|性别|自我)[^，。,?？\n]{0,6}[吗么呢?？]|"
    r"\bdo you (?:ever )?(?:feel|have (?:feelings|emotions|a body|consciousness)|get tired|sleep|eat|dream)\b", re.I)
# What a reply proposes in place of the answer, and the polite end that proposes nothing
ADVICE = re.compile(
    r"[^。！？!?\n]{0,8}?(?:可以|不妨|建议|推荐)(?:[您你])?(?:先|直接|去|到|在|尝试|试着|通过)*"
    r"(?:查|看|搜|用|使用|访问|打开|参考|参阅|咨询|联系|拨打|浏览|登录|下载|关注|询问|问)", re.I)
POLITE_END = re.compile(r"(?:其他|别的|任何|更多).{0,4}(?:问题|信息|帮助)|随时|告诉我|向我|问我")
LONG_REST, LONG_CONTRAST = 200, 60  # characters behind the refusing sentence that answer the question after all
LEAST_ADVICE = 20  # characters behind "but" that advise
LETTERS_A_CHARACTER = 3  # of English, for one of Chinese


def is_refusal(question: str, reply: str) -> bool:
    """True if a reply only says that the assistant cannot or will not do what it is asked for.

    What goes on and answers is none: 200 characters after the refusing sentence, or 60 of which the first word is
    "but" or the like, or 20 of advice in the refusing sentence. Neither is an apology that the question asked for, or
    an answer to what the assistant is or feels.
    """
    answer = _answer(reply).lstrip("\"“”' ")
    match = REFUSALS.match(answer)
    if not match:
        return False
    if match["ai"] or match["ai_en"]:
        if ASKS_ABOUT_SELF.search(question):
            return False
    else:
        phrase = match["phrase"] or match["plain"] or match["sorry_en"] or match["plain_en"]
        if phrase and ASKS_FOR_APOLOGY.search(question):
            return False
        if not phrase and re.search("GPT|语言模型|AI|人工智能", question):  # it asks about models
            return False
    end = SENTENCE_END.search(answer, match.end())
    rest = answer[end.end() if end else len(answer):].strip()
    size = len(rest) if HAN.search(rest) else len(rest) // LETTERS_A_CHARACTER
    inner = answer[match.end():end.start() if end else len(answer)]
    answers = CONTRAST.match(rest) or CONTRAST.search(inner)
    inside = CONTRAST.search(inner)
    if inside:
        advice = inner[inside.end():]
        size += len(advice)
        if len(advice) >= LEAST_ADVICE and ADVICE.match(advice) and not POLITE_END.search(advice):
            return False
    return size < (LONG_CONTRAST if answers else LONG_REST)


def find_refusals(messages: list[dict]) -> list[int]:
    """The indices of the replies that refuse."""
    return [i for i, m in enumerate(messages) if m["role"] == "assistant"
            and is_refusal(messages[i - 1]["content"] if i else "", m["content"])]


def cut_refusals(messages: list[dict], options: Options, counts: Counter) -> list[dict] | Drop:
    """Refusals are counted; with drop_refusals the conversation ends before the first."""
    refusals = find_refusals(messages)
    if not refusals:
        return messages
    counts["replies that refuse"] += len(refusals)
    return _cut(messages, refusals[0], "refusal", counts) if options.drop_refusals else messages


def listed(messages: list[dict]) -> list[str]:
    """The lists that a conversation belongs to, of "self_mentions" and "refusals". It is to be asked before the step
    `assistants`, also of conversations that `roles` has not seen: what is renamed or cut is in no list."""
    messages = [m for m in messages if m["role"] in KEPT_KEYS and m.get("content")]
    return ["self_mentions"] * bool(_claims(messages)[0]) + ["refusals"] * bool(find_refusals(messages))


# ---------------------------------------------------------------------------------------------
# length


def check_length(messages: list[dict], options: Options, counts: Counter) -> list[dict] | Drop:
    """Nothing but punctuation is no reply; the turns are kept that max_chars holds."""
    total = 0
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and NO_ANSWER.fullmatch(_answer(message["content"])):
            return _cut(messages, index, "a reply of punctuation", counts)
        total += len(message["content"])
        if total > options.max_chars:
            return _cut(messages, index, "too long", counts)
    if total < 100 and sum(len(VISIBLE.findall(m["content"])) for m in messages) < LEAST_VISIBLE:
        return Drop("too short")
    return messages


CHAT_STEPS = (
    Step("roles",
         "a conversation is an optional system message and then user and assistant in turn; messages of one role in a "
         "row are joined, replies before the first question and questions after the last reply are left out, and it "
         "ends before an empty message or a tool call",
         "the chat format of the stages (text/chat.py)", "chat", order_roles),
    Step("thoughts",
         "a thought, also one in reasoning_content or before a reply without <answer>, is written as <think>…</think>"
         "<answer>…</answer>; the conversation ends before a malformed one",
         "DeepSeek-R1's form and its API's reasoning_content; ours is text/content.py's", "chat", form_thoughts),
    Step("assistants",
         "where the assistant says that it is another one (我是ChatGPT), the conversation is listed; with "
         "--assistant_name the names are replaced in all of its messages and the makers left out",
         "names of the assistants that Chinese chats were generated with", "chat", rename_assistants),
    Step("refusals",
         "list replies that only refuse; with --drop_refusals the conversation ends before the first",
         "after the refusals in translated Alpaca data and MOSS's", "chat", cut_refusals),
    Step("chat_length",
         f"the conversation ends before a reply of nothing but punctuation and before --max_chars characters; one of "
         f"fewer than {LEAST_VISIBLE} visible characters is dropped; short replies stay",
         "ours", "chat", check_length),
)
