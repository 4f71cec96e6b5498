"""common/answers.py: golds and replies in the notations of public question files. test_evaluate.py has the basics."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.answers import (
    DECLINES,
    declines,
    given_in,
    is_well_formed,
    phrase_of,
    read_answer,
    read_reply,
    same_answer,
)

NUMBERS = [
    ("40+18=<<40+18=58>>58\n#### 58", 58), ("He has $1,080.\n#### 1,080", 1080), ("#### -3", -3), ("####58", 58),
    ("## 步骤\n#### 1. 相加\n40+18=58\n#### 58元", 58), ("答案：58个", 58), ("答：一共58个。", 58),
    ("58个", 58), ("58 个", 58), ("3.5千克", Fraction(7, 2)), ("25cm", 25), ("25 cm²", 25), ("25cm^2", 25),
    ("25㎡", 25), (r"25\,\text{cm}^2", 25), ("58元。", 58), ("58，", 58), ("$58", 58), (r"\$58", 58), ("US$58", 58),
    ("￥58", 58), ("-￥58", -58), ("约58米", 58), ("大约 58 米", 58), ("≈58", 58), ("58（个）", 58), ("(58)个", 58),
    (")58", 58), ("(58。)", 58), ("3只鸡", 3), ("5个三角形", 5), ("58 apples", 58), ("60km/h", 60), ("60千米/小时", 60),
    ("2千克/立方分米", 2), ("58 dollars per hour", 58), ("9.8m/s^2", Fraction(98, 10)),
    ("1 1/2小时", Fraction(3, 2)), ("1½小时", Fraction(3, 2)), ("1又2分之1小时", Fraction(3, 2)),
    ("x=5", 5), ("x = -5", -5), ("AB=5cm", 5), (r"\boxed{58}", 58), (r"\boxed{58}个", 58), (r"\(58\)", 58),
    (r"\[58\]", 58), (r"\(x=58\)", 58), (r"\boxed{\frac{3}{4}}", Fraction(3, 4)),
    (r"$\boxed{-\frac34}$", Fraction(-3, 4)), (r"\text{58}", 58), ("**58**", 58), ("+3", 3), ("2024年", 2024),
    ("-3℃", -3), (r"45^{\circ}", 45), (r"45^\circ", 45), ("零下3度", -3),
    ("零下 3.5 ℃", Fraction(-7, 2)), ("负3", -3), ("负4分之3", Fraction(-3, 4)),
    (r"负\frac34", Fraction(-3, 4)), ("答案为负3", -3),
    ("1e3", 1000), ("1E3", 1000), ("1.5e-2", Fraction(15, 1000)), ("1e+3米", 1000), ("-2e3", -2000), ("1e98", 10**98),
    ("1×10^3", 1000), ("1 x 10^3", 1000), ("1×10³", 1000), ("3×10⁸米", 3 * 10**8), (r"1\times10^{3}", 1000),
    (r"1.5 \times 10^{-2}", Fraction(15, 1000)), (r"$3\cdot 10^8$ m/s", 3 * 10**8), ("10^3", 1000), ("10³", 1000),
    (r"\frac34", Fraction(3, 4)), (r"\frac43", Fraction(4, 3)), (r"\frac{3}4", Fraction(3, 4)),
    (r"\frac3{4}", Fraction(3, 4)), (r"\dfrac 3 4", Fraction(3, 4)), (r"1\frac12", Fraction(3, 2)),
    ("20 %", Fraction(1, 5)), ("百分之20", Fraction(1, 5)), ("10个百分点", 10), ("3万元", 30000), ("2.5亿", 25 * 10**7),
    ("1万亿", 10**12), ("1{,}000", 1000), ("<answer>58个</answer>", 58), ("<<40+18=58>>58", 58),
]
TEXTS = [
    ("5小时30分", "5小时30分"), ("2:3", "2:3"), ("1-3", "1-3"), ("B2", "B2"), ("B（9）", "B(9)"), ("3+4=7", "3+4=7"),
    ("5小时三十分", "5小时三十分"), ("3点半", "3点半"), ("3分之一", "3分之一"), ("3的平方", "3的平方"), ("2千", "2千"),
    ("3 million", "3million"), ("2π", "2π"), ("3x", "3x"), ("y=2x", "y=2x"), (r"3\sqrt{2}", r"3\sqrt{2}"), ("√3", "√3"),
    ("x>3", "x>3"), ("±3", "±3"), ("正负3", "正负3"), ("5!", "5"), ("5G", "5G"), ("5A景区", "5A景区"),
    ("3D打印", "3D打印"), ("胜3平1负2", "胜3平1负2"), ("(3)解决问题", "(3)解决问题"), ("1. 小明", "1.小明"),
    ("第3名", "第3名"), ("小明有58个苹果", "小明有58个苹果"), ("2008年欧洲国家杯外围赛", "2008年欧洲国家杯外围赛"),
    ("58 hours of work every week", "58hoursofworkeveryweek"), ("1e101", "1e101"),
    ("1e-101", "1e-101"), ("1e999999999", "1e999999999"), ("9" * 200 + "个", "9" * 200 + "个"), ("9/0", "9/0"),
    ("<<红楼梦>>", "<<红楼梦>>"),
    ("小明", "小明"), ("B", "B"), ("选乙\n#### 乙", "乙"), ("答案：乙。", "乙"), ("他先走\n再回来", "他先走再回来"),
]
GOLDS = [gold for gold, _ in NUMBERS + TEXTS]


def is_correct(gold: str, reply: str) -> bool:
    expected = read_answer(gold)
    return same_answer(expected, read_reply(reply, is_number=not isinstance(expected, str)))


@pytest.mark.parametrize("gold, value", NUMBERS)
def test_golds_that_are_numbers(gold, value):
    assert read_answer(gold) == value and isinstance(read_answer(gold), Fraction)


@pytest.mark.parametrize("gold, text", TEXTS)
def test_golds_that_stay_text(gold, text):
    assert read_answer(gold) == text


@pytest.mark.parametrize("gold", GOLDS)
@pytest.mark.parametrize("reply", ["{}", "<answer>{}</answer>", "<think>9</think>\n<answer>\n{}\n</answer>",
                                   "<think>\n9\n</think>{}"])
def test_a_reply_that_is_the_gold_is_correct(gold, reply):
    assert is_correct(gold, reply.format(gold.replace("<answer>", "").replace("</answer>", "")))


@pytest.mark.parametrize("gold, value", NUMBERS)
def test_replies_to_numbers(gold, value):
    """Other notations of the value are correct, other values are wrong."""
    assert is_correct(gold, f"答案：{Fraction(value)}") and is_correct(gold, f"#### {Fraction(value)}")
    for wrong in (f"{value + 1}", f"答案：{-value}个", f"#### {value + 1}", f"{Fraction(value) / 10}", "不知道", ""):
        assert not is_correct(gold, wrong)


def test_the_gold_of_another_question_is_wrong():
    """Unless both are the same number or text. 3 accepts 3万, as it accepts 3%."""
    for gold in GOLDS:
        for reply in GOLDS:
            expected, read = read_answer(gold), read_answer(reply)
            if isinstance(expected, str) or isinstance(read, Fraction):  # a sentence may hold the right number
                same = expected == read or {gold, reply} == {"3只鸡", "3万元"} or {gold, reply} == {"+3", "3万元"}
                assert is_correct(gold, reply) == same, (gold, reply)


@pytest.mark.parametrize("reply, value", [
    ("40+18=<<40+18=58>>58", 58), ("40+18 9<<40+18=58>>58", 58), ("53￥1,000", 1000),
    ("先加。\n40+18=<<40+18=58>>58\n#### 58\n检查：18+40 不是 59", 58),
    ("#### 40+18=58", 58), ("#### 58个，因为有3个人", 58), ("#### $58", 58), ("####\n58", 58), ("＃＃＃＃ 58", 58),
    ("答案：57\n#### 58", 58), ("#### 57\n答案：58", 58),
    # headings of Markdown are not markers
    ("#### 1. 相加\n40+18=58", 58), ("#### 步骤1\n40+18=58", 58), ("#### (1)求总数\n40+18=58", 58),
    ("#### **2) 求总数**\n40+18=58", 58), ("答案：58\n#### 第2种方法\n18+40", 58), ("##### 2\n", 2),
    ("#### 结论：3个加4个是7个", 7),
    ("今天零下3度", -3), ("气温是负3度", -3), ("胜3场负2场", 2), ("负责3个", 3), ("正负3", 3),
    (r"因此 \boxed{\frac34}。", Fraction(3, 4)), (r"\frac{3}4", Fraction(3, 4)), ("光速是3×10^8m/s", 3 * 10**8),
    ("约1.5e-2米", Fraction(15, 1000)), ("蛋白 CYP2E1", 1), ("1e999999999", None), ("7 或 1e999999999", 7),
    ("1×10^999999999", None), ("加速度9.8 m/s²", Fraction(98, 10)), ("一共3万人", 30000),
])
def test_numbers_are_read_from_replies(reply, value):
    assert read_reply(reply, is_number=True) == value


@pytest.mark.parametrize("reply, text", [
    ("过程\n#### B", "B"), ("#### B。\n", "B"), ("答案：B\n#### 解析\n因为2>1", "B"),
    ("<answer>#### 2:3</answer>", "2:3"),
])
def test_texts_are_read_from_replies(reply, text):
    assert read_reply(reply, is_number=False) == text


@pytest.mark.parametrize("phrase", DECLINES)
def test_every_phrase_declines(phrase):
    for reply in (f"这个我{phrase}。", f"<think>7个，小红</think>我{phrase}",
                  f"<think>7</think><answer>{phrase}</answer>"):
        assert declines(reply) and declines(reply, ["小红"]) and phrase_of(reply) == phrase
    for reply in (f"<think>我{phrase}</think>小红", f"<think>我{phrase}", f"{phrase[0]}，{phrase[1:]}"):
        assert phrase_of(reply) is None and not declines(reply)


@pytest.mark.parametrize("reply, given", [
    ("我不知道。", None), ("", None), ("不知道，可能是7个", "7"), ("７％吧，不清楚", "7/100"),
    ("不知道4分之3是几", "3/4"), ("一共7个。答案：不知道", "7"),  # a number before a marker is given too
    ("不知道，也许是小红或小明", "小明"), ("不知道是小 红还是别人", None), ("不知道，小红有7个", "7"),
    ("不知道，在ＡＢ", "AB"), ("不知道，在CD", "ＣＤ"), ("<think>小红有7个</think>不知道", None),
    ("不知道" + "9" * 5000, "9" * 5000),
])
def test_a_number_or_a_name_is_no_decline(reply, given):
    names = ["小明", "小红", "AB", "ＣＤ"]
    assert given_in(reply, names) == given
    assert declines(reply, names) is (given is None and reply != "")


@pytest.mark.parametrize("gold, reply, correct", [
    ("20 %", "20", True), ("20", "20 %", True), ("20%", "0.2", True), ("20%", "1/5", True), ("0.2", "20%", True),
    ("20%", "百分之20", True), ("-5", "-5%", True), ("0.5%", "0.5", True), ("0%", "0", True), ("100", "100%", True),
    ("20%", "2%", False), ("20", "2000%", True), ("20", "0.2", False), ("0.2", "0.2%", False), ("1", "1%", False),
    ("20%", "-20", False), ("20%", "200", False), ("3/4", "3/4%", False), ("20%", "20万", False),
    ("3万元", "30000", True), ("30000", "3万", True), ("3万元", "3", True), ("3", "3万元", True),
    ("0.5", "0.5亿", True), ("3万元", "300", False), ("3万元", "3亿元", False), ("3万", "3%", False),
    ("30000", "3亿", False), ("小明", "小红", False), ("2:3", "3:2", False),
])
def test_percent_signs_and_large_units(gold, reply, correct):
    """They may be missing on one side; a value of at most 1 does not accept itself with a percent sign."""
    assert is_correct(gold, reply) is correct
    assert is_correct(gold, f"<answer>答案：{reply}</answer>") is correct


def test_exponents_are_bounded():
    assert read_answer("1e100") == 10**100 and read_answer("1e-100") == Fraction(1, 10**100)
    begin = time.process_time()
    assert read_answer("1e" + "9" * 99_999) == "1e" + "9" * 99_999
    assert read_reply("1×10^{999999999}", is_number=True) is None
    assert time.process_time() - begin < 1


def test_the_read_number_prints_as_a_plain_fraction():
    assert [str(read_reply(reply, is_number=True)) for reply in ("20 %", "3万", "58个")] == ["1/5", "30000", "58"]


@given(st.fractions(max_denominator=10**6).filter(lambda value: abs(value.numerator) < 10**30),
       st.sampled_from(["{}", "{}个", "约{} cm²", "x={}", "答案：{}", "#### {}", r"\boxed{{{}}}", "￥{}", "({})",
                        "{}元。"]))
def test_any_fraction_with_a_unit(value, form):
    gold = form.format(value)
    assert read_answer(gold) == value
    assert is_correct(gold, gold) and is_correct(gold, f"<answer>{value}</answer>")
    assert not is_correct(gold, f"{value + 1}")


@given(st.text(alphabet="12.,3/-−%()（）<>=#$￥eE^×\\{}答案是：:。 \n个元约负零下分之万半又m²½x", max_size=30))
def test_any_gold_is_a_correct_reply(gold):
    """The gold itself, bare or in <answer>, whatever its form."""
    if read_answer(gold) != "":
        assert is_correct(gold, gold) and is_correct(gold, f"<answer>\n{gold}\n</answer>"), gold


@pytest.mark.parametrize("run", [
    "1", " ", "{", "}", "{ ", "1 ", "1,", "1.", "(", "(1", "1(", "1/", "-", "\n", "\t ", "#", "#### ", "####1 ",
    "答案：", "答案 ", "<<", "<<1=", "1e", "e1", "1e1", "10^", "×10^", "分之", "1分之", "\\frac", "\\frac{", "\\frac1",
    "\\boxed{", "^", "²", "10²", "个", "=", "x=", "a", "<think>", "<answer>", "</answer>", "负", "零下", "约", "*",
])
def test_reading_takes_linear_time(run):
    """Texts of 100,000 characters: runs apart, and runs behind a number."""
    half = run * (50_000 // len(run))
    for text in (half + "x" + half, "1" + half + "1" + half):
        for read in (lambda text: read_reply(text, is_number=True), lambda text: read_reply(text, is_number=False),
                     read_answer, lambda text: declines(text, ["小明"]),
                     lambda text: is_well_formed(f"<think>{text}</think><answer>{text}</answer>x")):
            begin = time.process_time()
            read(text)
            assert time.process_time() - begin < 1
