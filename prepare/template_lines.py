"""The step that removes advertising and template lines of Chinese web pages."""

import re
from collections import Counter

from prepare.characters import tidy_lines
from prepare.markup import outside_code
from prepare.step import Drop, Options

_SITES = "微信|朋友圈|新浪微博|腾讯微博|微博|QQ空间|QQ好友|QQ|空间|豆瓣|知乎|贴吧|人人网|复制链接|更多"
_MENU = ("首页|主页|网站首页|关于我们|联系我们|网站地图|加入我们|友情链接|广告服务|法律声明|隐私政策|意见反馈|"
         "帮助中心|客服中心|"
         "设为首页|加入收藏|版权声明|免责声明|人才招聘|诚聘英才|联系方式|用户协议|登录|注册|手机版|电脑版|返回顶部|"
         "上一页|下一页|尾页|末页")
_SEPARATOR = r"[ \t|丨｜/·•›»>,，、]+"
_ASK = (r"(?:请|欢迎(?:大家)?|记得|更多\S{0,12}[，,]?\s?(?:请|欢迎)?|想\S{0,16}[，,]\s?(?:请|就)?"
        r"|如果\S{0,16}[，,]\s?(?:请|欢迎)?)")
_NO_QUESTION = r"(?!.*(?:？|是什么|什么意思|意思是|就是|是指|含义|怎么))"  # a sentence about such lines
_ITEM = r"[^\s|丨｜/·•›»>,，、]{1,8}"  # without separators, or one line could be read in very many ways
TEMPLATES = {name: re.compile(pattern, re.I) for name, pattern in {
    "calls to follow or scan": (
        rf"{_ASK}?(?:扫码|长按|搜索|点击)?(?:并)?(?:关注|订阅)(?:我们的?|本站的?|官方|下方|上方"
        rf"|我的?)*(?:微信)?(?:官方)?(?:公众号|公众平台|公号|订阅号|视频号|服务号|微信号)"
        r".{0,30}"
        rf"|{_ASK}?(?:微信)?(?:扫码|扫一扫|扫描|长按|识别)+(?:上方|下方|上图|下图|上面|下面|图中|左侧|右侧|文末|微信"
        rf"|的|或|以下)*(?:二维码|小程序码).{{0,30}}"
        rf"|{_ASK}?(?:微信)?(?:扫码|扫一扫)(?:关注|加入|进群|下载|添加|领取|报名|阅读|查看|咨询).{{0,20}}"
        r"|(?:微信)?公众(?:号|平台)[:：] ?[\w\-（）()]{2,30}"
        rf"|{_ASK}?(?:添加|加)(?:我的?|小编的?|客服的?|老师的?|作者的?)?(?:个人)?(?:微信号?|V信|QQ|QQ群"
        rf"|微信群)[:： ]*[\w\-［］]{{4,30}}.{{0,20}}"
        r"|(?:微信号|联系QQ|QQ群号?|微信/QQ|客服微信|咨询微信)[:： ]+[\w\-［］]{4,30}"
        r"|(?:如果)?(?:喜欢|觉得).{0,20}(?:点赞|点个赞|在看|一键三连|转发|素质三连).{0,20}"
        r"|(?:求|欢迎|记得|别忘了)?(?:点赞|关注|收藏|转发|评论|投币|分享|在看|三连|[、，+＋和 ])+(?:支持一下|哦|吧)?"),
    "calls to read on": (
        r"(?:请|直接)?(?:点击|戳|猛戳|单击|点)(?:这里|此处|下方|左下角|文末|页面|底部|下面|上方|[“\"「『])*的?"
        r"(?:阅读原文|阅读全文|查看全文|查看原文|原文链接|阅读更多|查看更多|展开全文|了解更多|蓝字"
        r"|进入)[”\"」』]?.{0,20}"
        r"|(?:阅读|查看|展开|显示|浏览)(?:原文|全文|更多|全部|剩余\S{1,6})|收起(?:全文)?|加载中[.…]*|加载更多"
        r"|正在加载[.…]*|点击加载更多|全文完|未完待续"),
    "rights and sources": (
        rf"{_NO_QUESTION}(?:(?:©|\(c\)|（c）|copyright|版权所有(?![者人权是这一])).{{0,80}}"
        r"|.{0,30}(?:版权所有(?![者人权是这一])|all rights reserved)[^，；]{0,30})"
        r"|.{0,40}[京津沪渝冀豫云辽黑湘皖鲁新苏浙赣鄂桂甘晋蒙陕吉闽贵粤青藏川宁琼港]ICP(?:备|证).{0,40}"
        r"|.{0,20}公网安备 ?[0-9]{6,}号?.{0,20}"
        r"|[（(【\[]?(?:责任编辑|责编|本文编辑|值班编辑|实习编辑|编辑|文章编辑|网络编辑"
        r"|见习编辑)[:：]\s?[^，。]{1,20}[）)】\]]?"
        r"|(?:原标题|原题|文章来源|稿件来源|信息来源|图片来源|素材来源|本文来源|原文出处|原文链接|原文地址|本文链接"
        r"|本文地址|转载地址|文章链接|转自)[:：].{1,100}"
        r"|(?:[（(【]\s?)?本文(?:转载自|转自|来自|来源于|首发于|首发|由.{1,20}(?:授权|投稿|供稿)|系.{1,20}(?:原创"
        r"|授权)).{0,60}"
        rf"|{_NO_QUESTION}(?:.{{0,20}}转载(?:请|须|需|时请|必须)(?:务必|保留|注明|联系|标明|获得).{{0,50}}"
        r"|.{0,12}未经.{0,10}(?:授权|许可|允许|同意|书面).{0,20}(?:转载|复制|使用|摘编).{0,40})"
        r"|(?:免责声明|版权声明|特别声明|郑重声明|风险提示|法律声明)[:：].{0,100}|(?:免责声明|版权声明)"
        r"|(?:以上|本文|文中|文章)(?:内容|观点|图片|所述)*(?:仅代表|只代表|均来自|来源于?|不代表).{0,50}"
        r"|(?:如有|若有|如).{0,10}侵权.{0,10}(?:联系|告知|删除).{0,30}|声明[:：].{0,20}(?:转载|版权|侵权|网友).{0,80}"),
    "navigation": (
        r"(?:您?(?:当前|现在|目前)?(?:所在)?的?位置(?:是)?[:： ]+|当前位置[:： ]*)?(?:首页|主页|网站首页"
        r"|官网首页)(?:\s?[>›»＞→/\\-]++\s?[^>›»＞→/\\\n-]{1,24}){1,7}"
        r"|(?:您?(?:当前|现在|目前)?(?:所在)?的?位置(?:是)?[:： ]+)[^，。]{1,50}"
        rf"|[\[【|]?(?:{_MENU})(?:{_SEPARATOR}{_ITEM}){{2,30}}|(?:{_ITEM}{_SEPARATOR}){{2,30}}(?:{_MENU})[|\]】]?"
        rf"|(?:{_MENU})(?:{_SEPARATOR}(?:{_MENU})){{1,30}}|设为首页|加入收藏|网站地图|友情链接|返回顶部|[上下]一页"
        r"|(?:上一篇|下一篇|上一章|下一章|前一篇|后一篇|上一条|下一条)[:： ]{1,2}.{1,60}|(?:上|下|前|后)一(?:篇|章"
        r"|页)(?:[ |/]*(?:上|下|后)一(?:篇|章|页)|[ |/]*目录)*"
        r"|(?:打印|关闭)(?:本页|窗口|页面|此页|文章)?(?:[ |]*(?:打印|关闭|收藏|返回)(?:本页|窗口|页面|首页|顶部)?)*"
        r"|返回(?:首页|顶部|列表|目录|上页|上一页)"),
    "share bars and counters": (
        rf"(?:一键)?分享(?:到|至|给好友|给朋友)?[:：]?(?:[ 、|/]*(?:{_SITES}))*+"
        rf"|(?:{_SITES})(?:[ 、|/]+(?:{_SITES})){{2,20}}"
        r"|(?:(?:阅读|浏览|点击|评论|点赞|收藏|转发|回复|热度|人气|查看)(?:量|数|次数"
        r"|人数)?[:： ]?[(（]?[0-9,.]{1,9}万?\+?[)）]?次?人?[ |·,，]*){1,6}"
        r"|(?:发布|发表|更新|创建)(?:时间|日期"
        r"|于)[:： ]{1,2}[0-9]{4}[-年/.][0-9]{1,2}[-月/.][0-9]{1,2}日?[ 0-9:：]{0,9}.{0,40}"
        r"|字(?:体|号)[:：]?\s?[\[【]?[大中小 |]{2,9}[\]】]?|【?(?:大 中 小|字体:大中小)】?|暂无(?:评论|内容|数据)"
        r"|(?:我要|发表|网友|最新)评论(?:\s?[(（]\d+[)）])?"
        r"|(?:登录|登陆)后(?:才)?(?:可以|可|能|即可)?(?:发表)?(?:评论|查看|回复|下载).{0,20}|广告|赞助商?广告|举报|纠错"),
    "cookie notices": (
        r"(?:本网站|本站|我们|网站|该网站)(?:会|将)?(?:使用|采用|利用).{0,10}cookies?.{0,100}|.{0,30}(?:接受|同意"
        r"|允许)(?:所有|全部)?\s?cookies?.{0,40}"
        r"|.{0,20}cookies?(?:政策|设置|声明|策略)"),
}.items()}
TEMPLATE_MARK = re.compile(
    r"公众|关注|订阅号|视频号|服务号|扫码|扫一扫|二维码|小程序码|微信|QQ|V信|点赞|在看|收藏|转发|评论|原文|全文|更多"
    r"|收起|加载|展开|显示|蓝字|未完待续|©|\(c\)|（c）"
    r"|copyright|rights reserved|版权|ICP|公网安备|编辑[:：]|责编|标题[:：]|原题|来源|出处|链接|地址[:：]|转自|首发"
    r"|转载|声明|授权|侵权|风险提示"
    r"|首页|主页|位置|关于我们|联系我们|上一|下一|前一篇|后一篇|推荐|相关|阅读|猜你|打印|关闭|返回|分享|浏览|点击|字体"
    r"|字号|发[布表][于时日]|更新[于时日]|暂无|登录|登陆|广告|举报"
    r"|纠错|cookie|仅代表|不代表|来自", re.I)
# a heading is a template only at the end: before a list it is content
LAST_HEADING = re.compile(r"(?:相关|推荐|热门|延伸|精彩|更多|猜你|往期|最新|为您)+"
                          r"(?:阅读|推荐|文章|链接|新闻|内容|标签|喜欢|回顾|资讯)+[:：]?")
DECORATION = " \t*#>＞-—=_~|·•◆■●★☆▼▲↓↑【】[]"
LONGEST_TEMPLATE = 120
MOST_TEMPLATES = 0.5


def template_kind(line: str) -> str | None:
    """The kind of template that a line is, or None."""
    if not 2 <= len(line) <= LONGEST_TEMPLATE:
        return None
    for stripped in {line.strip(), line.strip(DECORATION)}:
        for name, pattern in TEMPLATES.items():
            if stripped and pattern.fullmatch(stripped):
                return name
    return None


def remove_template_lines(text: str, options: Options, counts: Counter) -> str | Drop:
    """Advertising and template lines of Chinese web pages go, whole lines alone; a text of mostly such is dropped."""
    if not TEMPLATE_MARK.search(text):
        return text

    def clean(part: str) -> str:
        kept = []
        for line in part.split("\n"):
            kind = template_kind(line) if len(line) <= LONGEST_TEMPLATE and TEMPLATE_MARK.search(line) else None
            if kind:
                counts[kind] += 1
            else:
                kept.append(line)
        return "\n".join(kept)

    clean_text = outside_code(text, clean)
    body, _, last = clean_text.rstrip().rpartition("\n")
    if LAST_HEADING.fullmatch(last.strip(DECORATION)):
        clean_text = body
        counts["navigation"] += 1
    if clean_text == text:
        return text
    if len(text) - len(clean_text) > MOST_TEMPLATES * len(text):
        return Drop("mostly template lines")
    return tidy_lines(clean_text)
