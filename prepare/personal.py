"""The step that masks personal data: mail addresses, mobile numbers, identity numbers."""

import datetime
import re
from collections import Counter

from prepare.step import Options

MAIL = re.compile(r"(?<![\w.%+-])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@((?:[A-Za-z0-9-]{1,63}\.){1,5}[A-Za-z]{2,18})"
                  r"(?![\w-]*@)(?![A-Za-z0-9-])", re.A)
NO_MAIL = re.compile(r"(?:.*\.)?example\.(?:com|org|net|cn)|.*\.(?:png|jpe?g|gif|svg|webp|js|css|py|java|html?)", re.I)
_PROVINCES = "1[1-5]|2[1-3]|3[1-7]|4[1-6]|5[0-4]|6[1-5]|71|8[1-3]"
IDENTITY = re.compile(rf"(?<![0-9A-Za-z_])((?:{_PROVINCES})[0-9]{{4}})([ -]?)((?:18|19"
                      rf"|20)[0-9]{{6}})\2([0-9]{{3}}[0-9Xx])"
                      r"(?![0-9A-Za-z_])")
# 138 1234 5678, 138.1234.5678 · 138 12345678, 1381234 5678 · (138)12345678
MOBILE = re.compile(r"(?<![0-9_])(?:(?:\+|00)?86[- ]?|[（(]\+?86[)）][- ]?)?(?:1[3-9][0-9](?:[0-9]{8}"
                    r"|([- .])[0-9]{4}\1[0-9]{4}|([- ])[0-9]{8}|[0-9]{4}([- ])[0-9]{4})"
                    r"|[（(]1[3-9][0-9][)）][- ]?[0-9]{4}[- ]?[0-9]{4})"
                    r"(?![0-9_]|\.[0-9]|\1[0-9]|\2[0-9]|\3[0-9])")
# what is counted with such a number: then it is a quantity
UNITS = re.compile(
    r" ?(?:[美欧日英港台韩泰]?元|万|亿|千(?!里)|百(?!度)|个(?!人)"
    r"|[块角亩顷吨斤克米尺寸丈升磅度秒岁倍次名只头匹条件艘座栋册页篇字颗粒枚株棵瓶桶袋箱碗杯层]"
    r"|人(?!工|事)|分(?!机)|年|月(?!亮)|天(?!天)|日|小时|分钟|毫|厘|公[里斤顷吨升]|千[米克瓦]|平方|立方|台(?!湾)"
    r"|根(?!据)|支(?!付|持)|里(?!面)"
    r"|种|项|户|股|票|位(?!于)|本(?!人)|字节|比特|像素|[℃%‰°²³])"
    r"|(?:[kcmnμ]?[mglsWVA]|[KMGT]i?B|[kMG]?Hz|[kM]?Pa|k?J|px|bits?|bytes?)(?![A-Za-z])")
ARITHMETIC_AFTER = re.compile(r" ?[+×÷*=^<>≈≤≥]")
ARITHMETIC_BEFORE = re.compile(r"[×÷*^≈≤≥] ?\Z|[0-9)] ?[+=] ?\Z|[0-9)] - \Z|(?<![\n0-9])[0-9]\.\Z|[0-9]{2}\.\Z")
NUMBER_BEFORE = re.compile(r"[0-9][- ]\Z")
TOKEN_BEFORE = re.compile(r"[A-Za-z]+\Z")
# what has such a number and is no telephone: numbers of things, sums of money, quantities, integers
NO_TELEPHONE = re.compile(
    r"(?:(?:编|单|工单|订单|运单|流水|序列|批次|学|工|货|批|卡|期|型)号|编码|工单|订单|(?<!微信)(?<!支付宝)[账帐][号户]"
    r"|\bno|№|\bid"
    r"|(?:整|自然|质|素|奇|偶|倒|正|负|约|倍)数|数字|数值|利润|金额|[总余差]额|营收|收入|支出|产值|销售额|销量|产量|成本"
    r"|价格|[售总单]价|市值|资产|人口|面积|距离|共计|总计|合计)(?:号|编号)?[:：.=#为是达约了有共至到 ]{0,3}\Z"
    r"|[￥¥$€£] ?\Z", re.I)
ASSIGNED = re.compile(r"([A-Za-z_][A-Za-z0-9_]*) ?= ?\Z", re.A)
TELEPHONE_NAME = re.compile(r"tel|phone|mobile|cell|fax|sms|contact|shouji|dianhua", re.I)
CALLS = re.compile(r"(?:tel|telephone|phone|mobile|mob|cell|qq|vx|wx|v|whatsapp|wechat|fax|t|m)", re.I)
WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
MAIL_MASK, MOBILE_MASK, IDENTITY_MASK = "［邮箱］", "［手机号］", "［身份证号］"


def identity_is_valid(number: str) -> bool:
    """Whether 18 characters are an identity number: the birth date is a date and the check digit is right.

    The check digit is that of GB 11643-1999 (ISO 7064, MOD 11-2). The older numbers of 15 digits, which have none, are
    not looked for: they have not been valid since 2013, and many other numbers look like them.
    """
    try:
        datetime.date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    total = sum(int(digit) * weight for digit, weight in zip(number, WEIGHTS, strict=False))
    return "10X98765432"[total % 11] == number[17].upper()


def mask_personal(text: str, options: Options, counts: Counter) -> str:
    """Mail addresses, mobile and identity numbers become placeholders, in code and addresses of pages too."""
    def mail(match: re.Match) -> str:
        after = text[match.end():match.end() + 2]
        if NO_MAIL.fullmatch(match.group(1)) or match.group().startswith("git@") or after[:1] == ":" and (
                after[1:2].isalnum() and after.isascii()):  # git@host:path
            return match.group()
        counts["mail addresses masked"] += 1
        return MAIL_MASK

    def identity(match: re.Match) -> str:
        if not identity_is_valid(match.group(1) + match.group(3) + match.group(4)):
            return match.group()
        counts["identity numbers masked"] += 1
        return IDENTITY_MASK

    def mobile(match: re.Match) -> str:
        before = text[max(0, match.start() - 16):match.start()]
        word, assigned = TOKEN_BEFORE.search(before), ASSIGNED.search(before)
        if (word and not CALLS.fullmatch(word.group()) or UNITS.match(text, match.end())
                or assigned and not TELEPHONE_NAME.search(assigned.group(1))
                or ARITHMETIC_AFTER.match(text, match.end()) or ARITHMETIC_BEFORE.search(before)
                or NO_TELEPHONE.search(before)):
            return match.group()
        if (match.group(2) or match.group(3)) and NUMBER_BEFORE.search(before):
            return match.group()  # a row of numbers
        counts["mobile numbers masked"] += 1
        return MOBILE_MASK

    if "@" in text:
        text = MAIL.sub(mail, text)
    text = IDENTITY.sub(identity, text)
    return MOBILE.sub(mobile, text)
