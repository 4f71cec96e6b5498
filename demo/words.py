"""The words of the small world. What ends in _HELD_OUT is used in eval/ only."""

import random


def words(text: str) -> tuple[str, ...]:
    """Split a text at whitespace."""
    return tuple(text.split())


# ---------------------------------------------------------------------------------------------
# names

SURNAMES = ("王李张刘陈杨黄赵周吴徐孙朱马胡郭林何高梁郑罗宋谢唐韩曹许邓萧冯曾程蔡彭潘袁董余苏叶吕魏蒋田杜丁沈姜范江傅"
            "钟卢汪戴崔任陆廖姚方金夏谭韦贾邹石熊孟秦薛侯雷白龙段郝孔邵史毛常万顾武康贺严尹钱施牛洪")
GIVEN = ("小文子雨思云若家明梅兰竹菊松柏荷枫舟川溪岚晴朗伟芳娜敏静丽强磊军洋勇艳杰娟涛超霞平刚桂英华玉萍红鹏辉飞波斌"
         "宇浩凯秀珍佳嘉俊怡婷雪琳晨阳欣悦梦琪轩博睿涵诗雅安宁乐天心月星辰海山森春秋冰青志建国庆新永成立德文才光远大"
         "中")
NICKNAMES = tuple("小" + c for c in "明红刚丽华强芳军兰东亮美燕龙虎雨雪宝") + tuple("阿" + c for c in "明强花牛福")
NICKNAMES += ("张三", "李四", "王五", "赵六")
DONE = words("做 买 摘 写 看 画 读 折 捡 拍")  # two people have done it: 小红比小明多做几道
KIN = words("妈妈 爸爸 奶奶 爷爷 哥哥 姐姐 弟弟 妹妹 老师 同学 邻居 叔叔 阿姨 舅舅 姑姑 外婆 外公 表哥 同桌 朋友 "
            "表弟 表妹 堂哥 堂姐 小姨 大伯 伯伯 婶婶 姨妈 姥姥 姥爷 孙子 女儿 儿子 班长 大夫 店主 师傅")
TITLES = words("老师 阿姨 叔叔 师傅")  # behind a surname
GROUPS = words("学生 同学们 小朋友 孩子们 客人 邻居们 大家 老人 工人 顾客 队友 家人")  # they give and get
# places that hold things: {place}有12个苹果
PLACES_OF_THINGS = words("盘子里 箱子里 篮子里 口袋里 抽屉里 柜子里 教室里 仓库里 书包里 屋子里 院子里 商店里 冰箱里 "
                         "桌子上 书架上 树上 车上 船上 货架上 窗台上 停车场里 公交车上 鱼缸里 花园里 动物园里 "
                         "图书馆里 操场上 池塘里 河里 草地上 盒子里 厨房里 超市里 果园里 水池里 火车上 地铁上 班里 "
                         "山上 笼子里 锅里 碗里 瓶子里 衣柜里 墙上 餐厅里 公园里")
# everyday hanzi, of which random names, things and measure words are made
EVERYDAY = ("人我他这们中来上大为国地到说时要就出会可也你对生能而那得着下自之年过发后作里用道行所然家种事成方经么去法"
            "学如都同现当没动面起看定天分进好小部其些主样理心她本前开但因只从想实日者意无力它与长机民第公此已工使情明"
            "性知全关点正业外将高间由很最重并物手应向头文体美相见利什等产或新己制身果西斯月话合回特代内信表化老世位次"
            "度门任常先海通教儿原东声提立及比员解水名真论处走义各入口认条平系气题活更别打女变神总何电安报才结反受目太"
            "感建务做接必场件计管期市直资命山金指克许统区保至队形社便空决治展马科司基眼书非则听白却界达光放强即像难且"
            "思王象完设式色路记南品住告类求据程北边张该交规万取拉格望觉术领确传师观清今切院让识候带导争运笔花草木林森"
            "火土石云雨风雪冰星河江湖海鸟鱼虫牛羊狗猫鸡鸭兔虎龙蛇鼠猴猪米面饭菜汤茶酒糖盐油酱醋瓜豆麦稻果梨桃杏李枣橘"
            "葡萄莓蕉梅竹松柏柳杨枫荷菊兰桂红黄蓝绿紫青黑灰粉银铜铁锡钢玉珠布衣帽鞋袜裤裙巾带伞包袋箱桌椅床灯窗墙楼房"
            "屋桥船车轮飞票钱币卡纸刀剑弓箭旗鼓琴笛棋球歌舞画诗词春夏秋冬早晚晨夜昼古村镇城街巷店铺园田野"
            "停站厅馆室厨锅碗桶缸瓶盒盘篮笼柜库架池塘操班课图抽屉午叔姨哥姐弟妹爷奶爸妈孩客朋友低刮雾货商蝉炉")
NUMERALS = "一二三四五六七八九十两几"
# no random word has these: with them it could read as part of a clause
RESERVED = set(NUMERALS + "百千万亿零半负分多少的了是有和加减乘除以又再还给送被把问共剩买卖用丢吃个份倍每")

# ---------------------------------------------------------------------------------------------
# things: measure word, then noun

THINGS = tuple((thing[1:], thing[0]) for thing in words("""
    个苹果 个桃子 个鸡蛋 个馒头 个橙子 个石榴 个气球 个皮球 个书包 个杯子 个盘子 个玩具 个面包 个鸭蛋 个南瓜 个西瓜
    个篮球 个铃铛 个贝壳 个瓶子 颗石子 颗糖果 颗纽扣 颗星星 颗草莓 颗葡萄 颗樱桃 颗花生 颗红枣 颗棋子 颗弹珠 颗白菜
    本书 本画册 本故事书 本练习本 本日记 本漫画 支铅笔 支蜡烛 支毛笔 支画笔 支粉笔 朵花 朵红花 朵荷花 块布 块木板
    块饼干 块蛋糕 块砖 块手表 块橡皮 块巧克力 张邮票 张卡片 张纸 张照片 张桌子 张车票 张画 张贴纸 枚铜钱 枚硬币 枚奖章
    盏灯笼 盏灯 把椅子 把伞 把剪刀 把扇子 把钥匙 把雨伞 只小鸡 只鸭子 只羊 只小鸟 只蝴蝶 只青蛙 只猫 只纸船 只碗 条鱼
    条毛巾 条围巾 条小鱼 条裙子 条丝带 件衣服 件毛衣 件礼物 件衬衫 双袜子 双鞋 双筷子 瓶牛奶 瓶水 瓶果汁 瓶汽水 杯茶
    杯豆浆 袋米 袋面粉 袋糖 箱牛奶 箱苹果 盒饼干 盒粉笔 盒巧克力 片树叶 片面包 根香蕉 根木棍 根绳子 根黄瓜 根胡萝卜
    头牛 头羊 辆车 辆自行车 辆玩具车 台电脑 台电视 棵树 棵白菜 棵小树 封信 碗饭 碗面 串葡萄 串珠子 份报纸 份礼物 元 元
    元 人 人 人 块钱 块钱 米 斤 间房 位客人 名学生 名工人"""))
THINGS_HELD_OUT = tuple((thing[1:], thing[0]) for thing in words("""
    匹骏马 匹绸缎 匹斑马 尾鲤鱼 尾草鱼 扇屏风 扇窗户 枝玫瑰 枝丁香 枝钢笔 顶草帽 顶帐篷 艘帆船 艘轮船 架飞机 架钢琴
    架梯子 筐橘子 筐土豆 筐芒果 筐柿子 罐可乐 罐奶粉 罐果酱 桶油漆 桶海水 捆木柴 捆稻草 捆电线 副手套 副眼镜 副耳环
    册图谱 册字典 册诗集 粒珍珠 粒药丸 粒瓜子 粒豆子 节电池 节竹子 卷胶带 卷毛线 幅油画 幅地图 幅对联 壶开水 壶热茶
    群大雁 群绵羊 株水仙 株人参 滴墨水 坛好酒 坛泡菜"""))
GOODS = tuple(thing for thing, unit in THINGS if thing not in ("", "钱") and unit not in "位名")  # to be bought
UNITS = tuple(dict.fromkeys(unit for _, unit in THINGS))
UNITS_HELD_OUT = tuple(dict.fromkeys(unit for _, unit in THINGS_HELD_OUT))
BOXES = words("盒 袋 箱 组 排 桌 层 包 篮 天 人 家")

# ---------------------------------------------------------------------------------------------
# clauses: time word × frame × verb

TIMES = words("""
    后来 接着 然后 第二天 第三天 早上 中午 下午 晚上 昨天 今天 前天 上午 傍晚 周末 放学后 回家后 不久 过了一会儿
    没过多久 过了几天 刚才 隔天 当天 午饭后 春天 夏天 秋天 冬天 上周 这周 星期一 星期三 星期天 月底 过年时 生日那天
    路上 最后 半夜 清晨 去年 今年 下课后 随后 之后 回来后 到站 到站后 上课前 开学后 雨停后 搬家时 睡觉前 起床后 饭后
    天黑前 吃饭时 课间 第一天 这时 过节时 傍晚时 回来时 出发前 月初 上个月 这个月 上周末""")
TIME_ENDINGS = "后时前天里"  # some time words are any hanzi and one of these
GAIN = words("""
    买 来 飞来 开来 上来 进来 跑来 游来 生 种 长出 赚 搬进 买来 买回 收到 得到 找到 捡到 领到 借来 拿来 摘来 做 做好
    赢 赢得 添 添上 补 补上 挑 换来 搬来 运来 放进 放入 装进 要来 抢到 收集 采到 带回 取回 拿到 加上 凑到 翻出 得 挣
    增加 多出 拿回 发现 做出 摆上 存入 进 上车 种下 孵出 结出 开出 搬回 领来 抱来 收进 端来 找回 加 加入 新来 回来""")
LOSE = words("""
    用 走 开走 下去 离开 出去 游走 剪 撕 喝 花 用掉 用去 吃 吃掉 吃去 卖 卖掉 卖出 卖去 丢 丢掉 丢失 扔 扔掉 送出 送走
    送掉 借出 坏 坏掉 弄坏 弄丢 打碎 打破 摔坏 烧掉 寄出 捐 捐出 花掉 花去 分出 发出 输 输掉 拿走 搬走 运走 倒掉 剪掉
    退回 拿出 取出 取走 少 减少 喝掉 飞走 跑掉 烂掉 借走 给出 让出 摘走 死 死掉 枯死 坏死 腐烂 破 破掉 掉 裂 爆 下车
    没收 被吃掉 被拿走 被借走 被买走 被偷走 被摘走 被砍掉 被吹走 被喝掉 被弄坏 被抢走""")
# what a verb of two hanzi ends in tells its direction: some verbs are any hanzi and one of these
GAIN_ENDINGS, LOSE_ENDINGS = "来到进回得入上获", "掉出走去坏丢碎失光"
GAIN_HELD_OUT = words("购入 采购 淘到 钓到 收获 挣到 拾到 攒下 囤下 讨到")
LOSE_HELD_OUT = words("消耗 典当 遗失 变卖 砸碎 赠出 毁掉 磨坏 交出 撕掉")
# {p}: the owner as a pronoun
GIVEN_TO_OWNER = words("送给{p} 给{p} 给了{p} 分给{p} 借给{p} 还给{p} 递给{p} 寄给{p} 送来 拿来 还来 寄来 送 发给{p} "
                       "交给{p} 让给{p} 送给了{p} 借给了{p} 分给了{p}")
GIVEN_BY_OWNER = words("送给 给 给了 分给 借给 还给 卖给 递给 寄给 送 发给 交给 捐给 让给 留给 送给了 分给了 借给了 "
                       "交给了 发给了 还给了")
# {g}: somebody else, who changes what the owner has
PASSIVE = words("吃掉 吃 拿走 借走 喝 喝掉 用掉 弄坏 打碎 摘走 买走")
PASSIVE_FRAMES = words("{t}被{g}{v}了 {t}又被{g}{v}了")
AGENT_GAIN = words("买 买来 摘 带来 送来 做 放进")
AGENT_LOSE = words("吃 喝 用 拿走 借走 吃掉 喝掉")
AGENT_FRAMES = words("{t}{g}{v}了 {t}{g}又{v}了 {g}{t}{v}了")
FRAMES = words("{t}{v} {t}{v}了 {t}又{v} {t}又{v}了 {t}再{v}了 {t}还{v}了 {t}先{v}了 {t}也{v}了 {t}共{v}了 {t}就{v}了")
FRAMES_OF_PEOPLE = words("{t}{p}{v}了 {t}{p}又{v}了 {p}{t}{v}了 {p}{t}又{v}了 {t}{p}{v} {p}{t}还{v}了")
# what happens next in a question that follows on: 再给他5个呢？
NEXT_GAIN = words("再买 再来 再加 再放 再拿 再得 再做 再摘 又买 又来 再给{p} 再送{p} {g}再给{p} {g}再送{p}")
NEXT_LOSE = words("再吃 再用 再卖 再丢 再花 再喝 再拿走 再吃掉 再用掉 再卖掉 又吃 又用 "
                  "再给{g} 再送给{g} 再借给{g} 再分给{g}")
FACTORS = {"*": words("数量变成{b}倍 变成原来的{b}倍 增加到{b}倍 涨到{b}倍 变成{b}倍 扩大到{b}倍"),
           "/": words("平均分成{b}份留下一份 分成{b}份只留一份 分成{b}堆留下一堆 平分成{b}份留一份 分成{b}份留下一份")}

# ---------------------------------------------------------------------------------------------
# starts and questions

STARTS = words("有 原来有 手里有 本来有 一开始有 家里有 起初有 先有 开始有 一共有 总共有 原先有 攒了 带了 存了 "
               "收藏了 摘了 买了 准备了 拿了")
LEADS = words("现在 最后 那么 请问 这时 这样 到现在 那 那现在 帮我算算 算一算 算算 你说 你知道 想想看 猜猜 如今 "
              "到最后 结果 这下 请算出 告诉我")
WHOSE = ("", "", "{p}", "{e}", "手里", "家里")
ASKED = {  # what is asked: its wordings
    "还剩": ("还剩多少{u}", "还剩几{u}", "还剩下多少{u}", "还剩下几{u}", "剩下多少{u}", "剩下几{u}", "剩多少{u}",
    "剩几{u}", "还有几{u}没用",
           "还有多少{u}没用"),
    "一共": ("一共有多少{u}", "一共有几{u}", "一共多少{u}", "一共几{u}", "总共有多少{u}", "总共有几{u}", "共有多少{u}",
    "加起来有多少{u}",
           "合起来几{u}"),
    "有": ("有多少{u}", "有几{u}", "是多少{u}", "还有多少{u}", "还有几{u}", "有了多少{u}"),
}
PRICE_ASKED = words("要多少元 一共要多少元 需要多少元 要花多少元 一共多少元 多少元 要多少钱 一共要多少钱 需要多少钱 "
                    "要花多少钱 一共多少钱 共多少钱 多少钱 要几元 一共要几元")
TAILS = ("", "", "", "{o}", "{o}", "呢", "啊")
MONEY = (("钱", "块"), ("", "元"))  # (thing, measure word) of which 多少钱 may ask
ENDS = ("？",) * 8 + ("?", "")
COMMAS = ("，",) * 8 + (",", "。")

# all hanzi that random words are made of; those of held-out words too, so that each occurs in training
HANZI = "".join(sorted(set(EVERYDAY + GIVEN + "".join(map("".join, THINGS_HELD_OUT)) + "".join(
    GAIN_HELD_OUT + LOSE_HELD_OUT)) - RESERVED))


def random_word(rng: random.Random, n: int) -> str:
    """A word of n everyday hanzi in any order."""
    return "".join(rng.choice(HANZI) for _ in range(n))
