"""A small raw corpus in which every fault is planted, counted and known by name, for the tests of prepare_data.py.

    python tests/dirty_corpus.py OUT --seed 1      write it, and print what is in it
    python tests/dirty_corpus.py --check --seed 1  and verify its own claims by brute force

The text is composed from the tables below. Nothing here comes from the recipe: neither its code nor its patterns. Each
record holds a marker, a place and a person that nobody else has (青溪镇的顾知遥), by which it is found again.

What is true of all of it (--check verifies):

    overlap     of two texts: both in NFKC and lower case, their letters and digits alone; Jaccard of their sets of five
                characters in a row. Unrelated records overlap by less than 0.3.
    near pairs  overlap by 0.62 to 0.99; from 0.8 a search by MinHash (20 bands of 5) misses one in 3,000: `sure`
    apart       pairs that overlap by less than 0.5: both stay
    the longest of a group of copies is at least 12 characters longer than the others, or all are equally long and the
                first in input order stays
    exact       copies are never longer than the first: it stays
"""

import argparse
import gzip
import json
import lzma
import random
import re
import sys
import tempfile
import unicodedata
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

NEAR, SURE, APART, CONTAINED, UNRELATED = 0.6, 0.8, 0.5, 0.5, 0.3
NUMERALS = set("零〇一二三四五六七八九十百千万亿两半几双俩壹贰叁肆伍陆柒捌玖拾佰仟")
BLOCKED = "灰檐赌坊"  # a made-up word for --blocklist

# ---------------------------------------------------------------------------------------------
# tables

SURNAMES = "顾程叶苏林江许何吕施曹严孔魏姜谢邹喻柏章潘葛范彭郎韦昌苗凤方任袁柳鲍史唐费岑薛雷贺倪汤"
GIVEN = ("知若清文书景子思静明远亭云雨晓春秋海山川宁安和平佳美玉兰芳竹松柏青红星月光华君宜之乐天心怀素朗",
         "遥秋溪岚舟鸣川宁和平远澜帆晴薇梅兰竹松石林森岩泉峰岭晨曦昕悦怡欣然言诗词画棋琴笙笛容颜辰星河湾")
PLACES = ("青白石柳桃梅竹松枫桐荷莲菱芦苇云霞雾露霜冰雪星月虹燕鹤雁鹭鹿马牛羊鱼虾龙凤金银铜铁玉珠",
          "溪河湖泉潭井塘湾滩洲沙桥渡津岸坡岭岗峰岩洞谷坪原田园林圃亭阁楼台寺庙塔墙门关", "镇村乡寨县庄")
TABLES = {name: words.split() for name, words in {
    "who": """木匠 船工 邮差 裁缝 药师 渔夫 教师 铁匠 厨师 画匠 石匠 守林人 放牛娃 账房先生 磨坊主人 养蜂人 茶农
        瓦匠 说书人 钟表匠 护士 司机 收音机修理工 图书管理员 气象员 水文站站员 摄影师 编辑 果农 灯塔看守人 兽医
        乐师 染坊师傅""",
    "kin": """母亲 祖父 外婆 弟弟 妹妹 叔叔 姑妈 邻居 同伴 徒弟 老朋友 房东 堂兄 表姐 舅舅 嫂子 同学 掌柜 学徒
        队长 客人 孩子们 老师傅 村里的老人 同行的人 隔壁的婶婶 旧日的同事 会计 对门的大爷""",
    "spot": """茶馆 渡口 石桥边 车站 码头 祠堂 后院 阁楼 磨坊 学校操场 布店 药铺 打谷场 井台 戏台下 候船室
        旧书摊 河堤 菜市场 苗圃 砖窑 水库边 粮站 果园深处 晒场 屋檐下 灶台旁 凉亭 竹林尽头 卫生院 广播站 瓜棚
        老槐树底下 仓库""",
    "thing": """油纸伞 铜壶 旧地图 竹篮 棉布包袱 怀表 陶罐 书信 收音机 木梳 渔网 风筝 相册 药方 种子 毛毯 墨水瓶
        铁锁 煤油灯 算盘 账本 草帽 胡琴 印章 镰刀 望远镜 自行车 缝纫机 剪刀 瓷碗 笔记本 照相机 手套 蓑衣 象棋
        温度计 鱼竿""",
    "act": """沿着田埂慢慢往回走 把门板卸下来晾晒 给窗纸刷上新的米浆 蹲在地上挑拣豆子 写完了最后的家书
        收拾好行李准备动身 点起炉火烧水 在黑板上画出水渠的走向 把歪斜的篱笆扶正 量了量门框的宽度 替病人熬药
        背着孩子过河 翻找压在箱底的布料 给果树剪枝 记下当天的雨量 补好漏水的屋顶 牵着毛驴去驮盐 把鱼干挂满绳子
        修理漏气的风箱 核对送来的货单 往坛子里撒盐 教徒弟辨认木纹 站在高处张望 打听去县城的班车
        合上书页发了很久的呆 数着远处的灯火 给邻村送去消息 擦亮了生锈的门环 搬开挡路的石头 在信封背面画了草图
        替老人念报纸 用麻绳捆紧柴火 把墙上的字描了又描 听完广播才肯吃饭""",
    "when": """清明前后 天刚亮的时候 秋收以后 腊月里 梅雨季节 傍晚收工时 开春那阵子 入伏以来 霜降过后 集市散场后
        夜深时 午饭刚过 雪化的日子 端午前夕 立冬那天 放学以后 大雾散尽时 涨水的季节 鸡叫头遍 黄昏将近
        月亮升起来时 中秋夜里 停电的晚上 年关将近 谷雨时节 新茶上市那阵子 暑假里 渡船停航期间 戏班子进村那天
        赶集的日子 晌午时分""",
    "sky": """天色阴沉 细雨下个不停 西风紧了起来 太阳晒得石板发烫 薄雾笼着山腰 云层压得很低 雪粒敲着瓦片
        雷声由远而近 晚霞烧红了半边天 空气里有潮湿的泥土味 星星特别亮 北风刮得窗户直响 露水打湿了裤脚
        阳光斜斜照进来 闷热得叫人喘不过气 月光铺在水面上 雨后的天空格外干净 冰凌挂满了屋檐 热浪贴着地面翻滚
        风里带着稻花的香气""",
    "road": """青石板路 山间小道 河边的土路 通往码头的街 村口大路 铁路旁的便道 田间的机耕路 盘山公路 巷子深处
        桥面 堤坝 长街""",
    "sound": """远处的捣衣声 断断续续的蝉鸣 磨盘转动的声音 水车吱呀作响 谁家的狗叫 算盘珠子的脆响 汽笛声
        打铁的叮当声 瓦片上的雨声 孩子背书的声音 风吹竹叶的沙沙声 灶膛里柴火的噼啪声 卖豆腐的吆喝 胡琴的调子
        更夫的梆子声 鸽哨""",
    "mood": """笑着 平静 着急 小声 认真 犹豫 爽快 惊讶 不慌不忙 有些得意 低着头 缓缓 郑重 半开玩笑 懒洋洋
        略带歉意""",
    "food": """腌笋 芝麻糖 米酒 豆腐干 藕粉 柿饼 腊鱼 荞麦面 桂花糕 绿豆汤 咸鸭蛋 麦芽糖 山核桃 菱角 糯米团子
        辣酱 红薯粉 梅干菜 炒米 姜茶 酸枣膏 栗子鸡 莲子羹 酱萝卜 烤饼 杏仁茶""",
    "plant": """海棠 山茶 蔷薇 油菜花 紫藤 腊梅 石榴 芍药 栀子 牵牛花 木槿 向日葵 桂花 野菊 凌霄 合欢 芦花 杜鹃
        玉簪 鸢尾""",
    "work": """编竹器 酿酱油 扎灯笼 烧石灰 织土布 晒海盐 造纸 打银器 做豆豉 刻木版 采药材 养蚕 制茶 捕鱼 修钟表
        种香菇 熬糖 做油纸伞 烧瓦 弹棉花 绣花 磨香油""",
    "say": """明天再去也不迟 这门手艺不能丢 等水退了再说 你看山那边的云 火候还差得远 账要当面算清楚
        慢工才能出细活 路上多加小心 种子要挑饱满的 别忘了给门上锁 先把肚子填饱要紧 他说的话我记着呢 船总会来的
        字写得比去年端正 这雨怕是要下到月底 谁也没想到会这样 东西旧了也舍不得扔 心里有数就好 来年还在这里见面
        不懂就要多问""",
    "look": """脸上沾着煤灰 袖口磨得发白 眼睛熬得通红 鞋底沾满了泥 嗓子有些沙哑 头发被风吹乱 手上全是老茧
        背驼得厉害 眉头皱得很紧 嘴角带着笑意 步子迈得很大 衣服上落满雪花 额头冒着细汗 神情有些恍惚""",
    "why": """路实在难走 木料还没有干透 缺少懂行的人 山洪冲垮了便桥 布料涨了价 机器总出毛病 天气说变就变
        消息传得太慢 年轻人都进了城 土质偏酸 水渠年久失修 账目对不上 灯油快要用完 药材受了潮 班车临时改道
        秤砣丢了""",
    "end": """事情总算有了着落 大家这才松了口气 院子重新安静下来 没有人再提起从前的争执 灯光照得满屋通亮
        船顺利靠了岸 新苗齐刷刷冒出头来 手艺就这样传了下来 客人带着礼物走了 墙上多出了新的字迹
        孩子在凳子上睡着了 炉子里的火也慢慢熄了 收成比往年好些 门外又响起熟悉的脚步声 他把名字写在了扉页
        信终于寄到了""",
}.items()}
TEMPLATES = [line for line in """
{when}，{who}{name}{act}，{kin}在{spot}等着。
{sky}，{road}上行人稀少，只听见{sound}。
{name}从{place}带回{thing}，放在{spot}的窗台上。
“{say}。”{kin}{mood}地说。
{who}修好{thing}，{act}。
{place}出产{food}，{when}最为热闹。
那年{plant}开得早，{name}{act}。
因为{why}，{kin}只好留在{spot}。
{name}{look}，却仍旧{act}。
{spot}摆着{thing}和{food}，{kin}招呼大家坐下。
学{work}要耐心，{who}常对徒弟讲：{say}。
{sky}。{kin}推门进来，{look}。
到了{place}，{name}先去{spot}打听，又{act}。
{end}，{when}的{spot}格外冷清。
有人问起{thing}的来历，{who}{mood}地摇头。
{plant}的影子落在{thing}上，{sound}渐渐远了。
{kin}靠{work}养活全家，{why}，日子过得紧。
{name}记得{place}的{food}，也记得{sound}。
“{why}，”{who}{name}解释道，“{say}。”
{road}尽头是{spot}，{kin}常在那里{act}。
{who}递过{food}，{mood}问起{place}的近况。
起初{why}，后来{end}。
{thing}坏了，{kin}托{name}捎到{place}去修。
{when}{sky}，{spot}挤满了躲雨的人。
{name}会{work}，也爱种{plant}。
谁都知道{place}的{who}{look}，为人却厚道。
{kin}尝了尝{food}，{mood}点头。
{spot}后面种着{plant}，{when}香气飘得很远。
{name}{act}，忽然听见{sound}，便停下脚步。
据{place}的老人回忆，{work}曾经十分兴盛。
{who}拿出{thing}，{act}，{kin}看得入神。
{sky}，可是{name}并不着急，{act}。
“{say}？”{name}{mood}反问，{kin}没有回答。
县志里写着{place}的{plant}和{food}。
{kin}把{thing}借给{who}，说好{when}归还。
{why}，所以{work}的人越来越少。
{end}。{name}收起{thing}，离开了{spot}。
从{place}到{spot}要翻山，{road}又窄又滑。
{who}和{kin}争论起来，都说{say}。
{look}的{who}站在{road}边，手里握着{thing}。
{food}要配{food2}才好吃，{name}总这样讲。
{when}，{place}派人送来{thing}，{kin}{mood}收下。
{name}在日记里写道：{sky}，{act}。
{sound}停了，{spot}只剩下{kin}收拾{thing}。
为了{work}，{name}搬到{place}，{why}也不肯走。
{who}讲究用料，{food}里从不掺假。
{plant}谢了，{end}。
{kin}说起{name}，{mood}叹气：{why}。
{thing}是{who}亲手做的，{place}再也找不到同样的。
{spot}的门开着，{kin}{act}。
不久，{end}，{name}也学会了{work}。
听说{place}缺{thing}，{who}连夜{act}。
{name}{mood}翻看{thing}，想起{spot}的{plant}。
{when}前，{kin}总要备好{food}和{thing}。
{road}修好以后，{place}的{food}卖到了外地。
{who}的屋里挂着{thing}，窗外是{plant}。
“{say}，”{kin}望着{road}，“{say2}。”
{name}跟着{who}学{work}，{look}。
{sky}时，{place}的人喜欢聚在{spot}闲谈。
{kin}托人问价，得知{why}，便作罢了。
""".strip().splitlines() if line]

JAPANESE = """
{m}という名前を古い手紙の中で見つけました。
朝の市場では新鮮な魚と野菜がならんでいます。
祖母はいつも縁側でお茶を飲みながら庭をながめていた。
電車を降りると、海の匂いがかすかにしました。
この町には小さな図書館がひとつだけあります。
雨が上がったので、子どもたちは公園へ走っていった。
彼女は毎晩日記をつけることを習慣にしている。
駅前のパン屋は朝早くから客でいっぱいだ。
冬になると、湖はすっかり凍ってしまうそうです。
友だちに借りた本を、まだ最後まで読んでいない。
山の上からは、遠くの島まではっきり見えた。
祭りの夜、通りには色とりどりの提灯がともる。
""".strip().splitlines()
KOREAN = """
{m} 이라는 이름을 오래된 편지에서 보았습니다.
아침 시장에는 신선한 생선과 채소가 가득합니다.
할머니는 늘 마당에 앉아 차를 마시며 하늘을 보셨다.
기차에서 내리자 바다 냄새가 희미하게 났습니다.
이 마을에는 작은 도서관이 하나밖에 없습니다.
비가 그치자 아이들은 공원으로 뛰어갔다.
그녀는 매일 밤 일기를 쓰는 습관이 있습니다.
역 앞의 빵집은 이른 아침부터 손님으로 붐빈다.
겨울이 되면 호수는 완전히 얼어붙는다고 합니다.
친구에게 빌린 책을 아직 끝까지 읽지 못했다.
산 위에서는 멀리 있는 섬까지 또렷하게 보였다.
축제의 밤에는 거리마다 색색의 등불이 켜진다.
""".strip().splitlines()
ENGLISH = """
The name {m} was found in an old letter.
The market opens before sunrise and closes around noon.
My grandmother kept bees behind the barn.
We walked along the river until the path disappeared.
There is only one small library in this town.
After the rain the children ran straight to the park.
She writes a page in her diary every single night.
The bakery near the station is crowded in the morning.
In winter the lake freezes from shore to shore.
He has not finished the book that I lent him.
From the summit you could see the distant islands.
Lanterns of every color hung over the street that evening.
""".strip().splitlines()
SIMPLIFIED, TRADITIONAL = (
    "国学这们个来时说为会过还没开门间问见长车东书话语读写张马鱼鸟风点钟热爱图远运进连边笔纸红绿线织灯烧烟"
    "热药银铁铜锁钥针镜页题顺须预领颜饭馆饼饿银针样树桥楼机条极构标栏档横检归队阳阴阶际陆陈随难雾灵静带帮"
    "师归录办务动劳势医单卖双变叶号听启员响园围场坏块坚坛坝备处复头夹奋妇娘宁实宽宾对寻导将尽层屋岁岗岛岭"
    "币帐广庆库应庙废开异弃张弯弹强当彻径忆忧怀态总恋惊惯",
    "國學這們個來時說為會過還沒開門間問見長車東書話語讀寫張馬魚鳥風點鐘熱愛圖遠運進連邊筆紙紅綠線織燈燒煙"
    "熱藥銀鐵銅鎖鑰針鏡頁題順須預領顏飯館餅餓銀針樣樹橋樓機條極構標欄檔橫檢歸隊陽陰階際陸陳隨難霧靈靜帶幫"
    "師歸錄辦務動勞勢醫單賣雙變葉號聽啟員響園圍場壞塊堅壇壩備處復頭夾奮婦娘寧實寬賓對尋導將盡層屋歲崗島嶺"
    "幣帳廣慶庫應廟廢開異棄張彎彈強當徹徑憶憂懷態總戀驚慣")
TO_TRADITIONAL = str.maketrans(SIMPLIFIED, TRADITIONAL)

AD_LINES = [
    "关注公众号“{p}风物”，获取更多精彩内容", "长按识别二维码，关注我们的微信公众号", "点击阅读原文，查看更多文章",
    "责任编辑：{n}", "版权所有，未经许可不得转载", "转载请注明出处", "扫码添加客服微信，领取免费资料",
    "免责声明：本文来自网络，如有侵权请联系删除"]
CHAT_QUESTIONS = ["请讲讲{m}的事情。", "你能写写{m}吗？", "{m}后来怎么样了？", "帮我写段关于{m}的文字。",
                  "我想了解{m}。", "谁认识{m}？他做什么？",
                  "给孩子讲个{m}的故事。", "{m}平常怎么过日子？", "介绍下{m}和他的家乡。"]
PROBLEMS = [  # two copies that differ only in their numbers must both stay
    "{m}在果园里摘了{a}筐梨，每筐装{b}个，路上碰坏了{c}个，剩下的全部平均送给附近几所学校的孩子们。"
    "请问他从果园里一共摘了多少个梨，最后拿去送人的又有多少个？写出计算的过程，不要只给出结果。",
    "{m}的粮仓里原有{a}袋稻谷，上午运走{b}袋，下午又从邻村运来{c}袋，天黑之前全部堆放整齐并且盖好了油布。"
    "这时粮仓里还有多少袋稻谷？比原来多了还是少了，相差多少袋？",
    "为了修路，{m}带着工人先铺了{a}米石子路，接着每天铺{b}米，连续铺了{c}天以后因为下雨停工休息。"
    "到停工时总共铺好了多少米石子路？平均下来每天铺的长度是不是够得上原来的计划？",
    "图书馆的{m}清点书架，故事书有{a}本，科学书比故事书多{b}本，画册又比科学书少{c}本，其余的书都借出去了。"
    "故事书、科学书和画册合起来总共有多少本？请按照步骤算出来。"]
TEST_QUESTIONS = [
    "{m}养了{a}只鸭子，卖掉其中的{b}只，又孵出{c}只小鸭，现在池塘里游着的鸭子总共是多少只？",
    "裁缝铺接到{m}的订单，要做{a}件上衣，每件需要布料{b}尺，库房只剩{c}尺，还得再买多少尺布料？",
    "{m}坐船去走亲戚，去时用了{a}分钟，回来逆水多用{b}分钟，中途歇息{c}分钟，来回总共花了多长时间？",
    "{m}把攒下的{a}块糖分给{b}个小朋友，每人分到同样多，最后发现余下{c}块，每个小朋友拿到多少块糖？"]
FACT_QUESTIONS = [  # without numbers
    "{m}离开家乡以后靠什么手艺谋生，他最常去的地方又是哪里？为什么大家都愿意帮助他渡过难关？",
    "按照当地县志的记载，{m}是怎样发现古井里的石碑的，石碑上面刻着哪位诗人的句子？"]
REFUSALS = ["作为一个AI语言模型，我无法回答关于{m}的问题。", "很抱歉，我不能提供{m}的相关信息。",
            "对不起，我无法回答关于{m}的这个问题。", "As an AI language model, I cannot answer questions about {m}."]
SELF_MENTIONS = [
    ("我是由OpenAI训练的大型语言模型ChatGPT，很高兴为{m}效劳。", ("OpenAI", "ChatGPT")),
    ("我是ChatGPT，可以帮{m}整理资料。", ("ChatGPT",)),
    ("您好，我是通义千问，由阿里云开发的语言模型。{m}的问题我来回答。", ("通义千问", "阿里云")),
    ("作为百度研发的文心一言，我愿意帮助{m}。", ("文心一言", "百度")),
    ("我是智谱AI训练的ChatGLM，{m}有什么需要都可以告诉我。", ("ChatGLM", "智谱"))]

# ---------------------------------------------------------------------------------------------
# overlap, by brute force


def normalized(text: str) -> str:
    """The letters and digits of a text, in NFKC and lower case."""
    return "".join(char for char in unicodedata.normalize("NFKC", text).lower() if char.isalnum())


def shingles(text: str) -> set[str]:
    """All five characters in a row of the normalized text; of a shorter one, itself."""
    text = normalized(text)
    return {text[i:i + 5] for i in range(max(1, len(text) - 4))} if text else set()


def overlap(a: str, b: str) -> float:
    """Jaccard of the shingles of two texts."""
    a, b = shingles(a), shingles(b)
    return len(a & b) / max(1, len(a | b))


def containment(a: str, b: str) -> float:
    """Share of the shingles of the shorter text that the other has too."""
    a, b = shingles(a), shingles(b)
    return len(a & b) / max(1, min(len(a), len(b)))


def joined(messages: list[dict]) -> str:
    """A chat as one text."""
    return "\n".join(message["content"] for message in messages)


# ---------------------------------------------------------------------------------------------
# what is planted


@dataclass(frozen=True)
class Fate:
    """What must become of a record.

    about: what was planted · marker: in its text and in no other's but its copies' · kind: "text", "chat" or "r1" ·
    file, line: name, and number of the line from 1 (a JSON array, Parquet: of the record; .txt: of its first line) ·
    text: as it was written, a chat's messages joined by line feeds · family: records of one family overlap on purpose ·
    stays: in a run with default flags · step, reason: the step that drops it and a part of its reason ·
    flag: it is dropped by `step` only in a run with this flag, and stays in others ·
    expected: the exact text, or the messages, in the output of a run with default flags · keeps, loses: strings that
    are in the output, or not ·
    simplified: the exact text in a run with --simplify · renamed: strings that are gone in one with --assistant_name ·
    listed: lists that name it · out: the output it is in ("pretrain", "sft_512", "sft_1024", "r1_1024"), None where
    that depends on the step · tokens: of a chat, by the golden tokenizer ·
    duplicate_of: (file, line) of the record that stays · sure: a test can demand it; else only that most are so
    """

    about: str
    marker: str
    kind: str
    file: str
    line: int
    text: str
    family: str
    stays: bool = True
    step: str | None = None
    reason: str = ""
    flag: str = ""
    expected: str | list | None = None
    keeps: tuple[str, ...] = ()
    loses: tuple[str, ...] = ()
    simplified: str | None = None
    renamed: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()
    out: str | None = None
    tokens: int | None = None
    duplicate_of: tuple[str, int] | None = None
    sure: bool = True

    def stays_with(self, *flags: str) -> bool:
        """Whether it stays in a run with these flags."""
        return self.stays and not (self.flag and self.flag in flags)


@dataclass(frozen=True)
class Pair:
    """Two records by their (file, line), `kept` the one that stays, and what they share."""

    kept: tuple[str, int]
    other: tuple[str, int]
    overlap: float
    how: str


@dataclass(frozen=True)
class Leak:
    """A training record, the validation text it shares text with, and the containment of the shorter of the two."""

    record: tuple[str, int]
    val: str
    contained: float
    how: str


@dataclass
class Corpus:
    """The files and what was planted in them.

    broken: the files of `train` of which a part or all cannot be read · rename: values for --rename_field ·
    blocklist: words for --blocklist · fates: one for each record that can be read · fate: marker → the fate of the
    first record with it · malformed: file name → Counter of what is wrong with lines that are no records ("not JSON",
    "not UTF-8", "duplicate key", "not an object", "no known shape", "lone surrogate") · unreadable: file name → why
    ("truncated", "no text field", "empty") · counts: everything else that was planted, by name
    """

    folder: Path
    train: list[Path] = field(default_factory=list)
    val: list[Path] = field(default_factory=list)
    broken: list[Path] = field(default_factory=list)
    rename: tuple[str, ...] = ("body=text", "wenzhang=text")
    blocklist: tuple[str, ...] = (BLOCKED,)
    fates: list[Fate] = field(default_factory=list)
    fate: dict[str, Fate] = field(default_factory=dict)
    malformed: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))
    unreadable: dict[str, str] = field(default_factory=dict)
    near: list[Pair] = field(default_factory=list)
    apart: list[Pair] = field(default_factory=list)
    leaks: list[Leak] = field(default_factory=list)
    shared: list[Leak] = field(default_factory=list)  # too little to be a leak
    val_texts: dict[str, str] = field(default_factory=dict)  # marker → text
    counts: Counter = field(default_factory=Counter)

    def staying(self, *flags: str) -> Counter:
        """marker → number of records with it that stay in a run with these flags."""
        return Counter(fate.marker for fate in self.fates if fate.stays_with(*flags))


# ---------------------------------------------------------------------------------------------
# text


class Writer:
    """Composes names, sentences and documents."""

    def __init__(self, rng: random.Random):
        self.rng, self.used = rng, set()

    def name(self) -> str:
        return self.rng.choice(SURNAMES) + "".join(map(self.rng.choice, GIVEN))

    def place(self) -> str:
        return "".join(map(self.rng.choice, PLACES))

    def marker(self) -> str:
        """Seven characters that no other record has."""
        while (marker := f"{self.place()}的{self.name()}") in self.used:
            pass
        self.used.add(marker)
        return marker

    def fill(self, template: str) -> str:
        """A sentence: each {slot} gets a word of its table."""
        def word(slot: re.Match) -> str:
            table = slot[1].rstrip("2")
            return getattr(self, table)() if table in ("name", "place") else self.rng.choice(TABLES[table])
        return re.sub(r"\{(\w+)\}", word, template)

    def sentences(self, count: int, numerals: bool = True) -> list[str]:
        """Sentences of different templates; without `numerals`, of words that hold no number."""
        chosen = []
        for template in self.rng.sample(TEMPLATES, len(TEMPLATES)):
            sentence = self.fill(template)
            if numerals or not NUMERALS & set(sentence):
                chosen.append(sentence)
            if len(chosen) == count:
                break
        return chosen

    def opening(self, marker: str) -> str:
        """A sentence with the marker."""
        rng, words = self.rng, TABLES
        return rng.choice([
            f"{rng.choice(words['when'])}，{marker}{rng.choice(words['act'])}。",
            f"{marker}住在{rng.choice(words['spot'])}附近，{rng.choice(words['look'])}。",
            f"说起{marker}，{rng.choice(words['kin'])}总会想到{rng.choice(words['food'])}。",
            f"{rng.choice(words['sky'])}，{marker}还在{rng.choice(words['work'])}。",
            f"认识{marker}的人都说，{rng.choice(words['say'])}。"])

    def parts(self, marker: str, low: int = 4, high: int = 22, numerals: bool = True) -> list[str]:
        """The sentences of a document, the one with the marker at any place."""
        parts = self.sentences(self.rng.randint(low, high), numerals)
        opening = self.opening(marker)
        while not numerals and NUMERALS & set(opening):
            opening = self.opening(marker)
        parts.insert(self.rng.randint(0, len(parts)), opening)
        return parts

    def compose(self, parts: list[str]) -> str:
        """Sentences as one document, in paragraphs of about five."""
        text = ""
        for index, part in enumerate(parts):
            text += ("\n" if index and self.rng.random() < 0.2 else "") + part
        return text

    def document(self, marker: str, low: int = 4, high: int = 22) -> str:
        return self.compose(self.parts(marker, low, high))

    def line(self, marker: str, count: int = 5) -> str:
        """A document of one line."""
        return "".join(self.parts(marker, count, count))

    def replace_bursts(self, text: str, keep: str, until, burst: int = 10) -> str:
        """`text` with hanzi replaced by others in bursts until `until(text)`; the marker `keep` and all punctuation
        stay as they are, so that the length is the same."""
        chars, start = list(text), text.index(keep)
        fixed = range(start, start + len(keep))
        while not until("".join(chars)):
            others = [char for char in "".join(self.sentences(3)) if char.isalpha()]
            at = self.rng.randrange(max(1, len(chars) - burst))
            for index in range(at, min(at + burst, len(chars))):
                if index not in fixed and chars[index].isalpha():
                    chars[index] = self.rng.choice(others)
        return "".join(chars)


def spell(number: int) -> str:
    """A number below 1,000 in Chinese numerals."""
    digits, text = "零一二三四五六七八九", ""
    hundreds, tens, ones = number // 100, number // 10 % 10, number % 10
    if hundreds:
        text += digits[hundreds] + "百"
    if tens:
        text += (digits[tens] if tens > 1 or hundreds else "") + "十"
    elif hundreds and ones:
        text += "零"
    return text + (digits[ones] if ones or not text else "")


def identity_number(rng: random.Random, right: bool) -> str:
    """18 characters with a date of birth, whose last one is the check digit of GB 11643-1999 or another digit."""
    body = (f"{rng.choice(['110101', '310104', '440106', '510107'])}{rng.randint(1950, 2005)}"
            f"{rng.randint(1, 12):02}{rng.randint(1, 28):02}{rng.randint(1, 999):03}")
    total = sum(int(digit) * (2 ** (17 - index) % 11) for index, digit in enumerate(body))
    check = "10X98765432"[total % 11]
    return body + (check if right else rng.choice([digit for digit in "0123456789" if digit != check]))


# ---------------------------------------------------------------------------------------------
# building


class _Builder:
    """Collects records by file and what must become of them, then writes the files."""

    def __init__(self, folder: Path, seed: int):
        self.corpus = Corpus(folder)
        self.rng = random.Random(f"dirty corpus {seed}")
        self.writer = Writer(self.rng)
        self.files: dict[str, list] = defaultdict(list)  # records, or bytes: a raw line
        self.encoder = None

    def tokens(self, messages: list[dict]) -> int:
        """Length of a chat by the golden tokenizer."""
        if self.encoder is None:
            from text.chat import ChatEncoder
            from text.tokenizer import load_tokenizer

            self.encoder = ChatEncoder.of(load_tokenizer(str(ROOT / "tests" / "golden" / "tokenizer")))
        return len(self.encoder.encode([messages])[0].ids)

    def add(self, file: str, record, about: str, marker: str, kind: str, text: str, **fate) -> Fate:
        """Put a record in a file. Without `step` it stays; `count` names what it is counted as."""
        self.files[file].append(record)
        if "step" in fate and "flag" not in fate:
            fate["stays"] = False
        fate = Fate(about, marker, kind, file, len(self.files[file]), text, fate.pop("family", marker), **fate)
        self.corpus.fates.append(fate)
        self.corpus.counts[about] += 1
        return fate

    def text(self, file: str, text: str, about: str, marker: str, key: str = "text", **fate) -> Fate:
        """A document; without any other claim it must come out as it is."""
        if not {"step", "keeps", "loses", "expected"} & fate.keys():
            fate["expected"] = text
        if "step" not in fate or "flag" in fate:
            fate["out"] = "pretrain"
        return self.add(file, text if file.endswith(".txt") else {key: text}, about, marker, "text", text, **fate)

    def chat(self, file: str, messages: list[dict], about: str, marker: str, record: dict | None = None,
             kind: str = "chat", **fate) -> Fate:
        """A chat, in our form or as `record`; `messages` are what it must become unless there is another claim."""
        if not {"step", "keeps", "loses", "expected"} & fate.keys() or "flag" in fate:
            fate["expected"] = messages
        if "step" not in fate or "flag" in fate:
            fate["tokens"] = self.tokens(fate.get("expected") or messages)
            assert fate["tokens"] <= 1024, f"{about}: a claim that it stays, of {fate['tokens']} tokens"
            if fate.get("expected"):
                fate["out"] = "r1_1024" if kind == "r1" else "sft_512" if fate["tokens"] <= 512 else "sft_1024"
        return self.add(file, record or {"conversations": messages}, about, marker, kind, joined(messages), **fate)

    def raw(self, file: str, line: bytes, why: str) -> None:
        """A line that is no record."""
        self.files[file].append(line)
        self.corpus.malformed[file][why] += 1

    def question(self, marker: str) -> str:
        return self.rng.choice(CHAT_QUESTIONS).format(m=marker)

    def turns(self, marker: str, count: int = 1, low: int = 4, high: int = 8) -> list[dict]:
        """`count` questions and replies, the marker in the first question."""
        messages = []
        for turn in range(count):
            asked = self.question(marker) if not turn else self.rng.choice(
                ["后来呢？", "能再说详细些吗？", f"那{self.writer.place()}呢？", "还有别的吗？"])
            reply = "".join(self.writer.sentences(self.rng.randint(low, high if count == 1 else low + 1)))
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
        return messages

    # ------------------------------------------------------------------------- files, formats, bad input

    def plain_files(self) -> None:
        for file, count in (("00-plain.jsonl", 120), ("01-packed.jsonl.gz", 40), ("02-packed.jsonl.zst", 40),
                            ("03-packed.jsonl.xz", 40), ("04-array.json", 40), ("05-table.parquet", 40),
                            ("06-plain.txt", 40)):
            for _ in range(count):
                marker = self.writer.marker()
                self.text(file, self.writer.document(marker), "clean", marker)
        for file, key, count in (("07-body.jsonl", "body", 30), ("08-wenzhang.jsonl", "wenzhang", 15)):
            for _ in range(count):
                marker = self.writer.marker()
                self.text(file, self.writer.document(marker), "clean", marker, key)

    def bad_lines(self) -> None:
        """Lines that are no records, in the middle of a good file."""
        def line(text: str | None = None) -> str:
            marker = self.writer.marker()
            return json.dumps({"text": text or self.writer.document(marker)}, ensure_ascii=False)

        def good(file: str, count: int) -> None:
            for _ in range(count):
                marker = self.writer.marker()
                self.text(file, self.writer.document(marker), "clean, among malformed lines", marker)

        file = "09-malformed.jsonl"
        for why, lines in {
            "not JSON": [line()[:-2].encode(), line().replace('"text":', '"text"').encode(), b"<html>"],
            "not UTF-8": [line().encode()[:60] + b"\xff\xfe" + line().encode()[60:], line().encode("gb18030")],
            "duplicate key": [(line()[:-1] + ", " + line()[1:]).encode()],
            "not an object": [b"true", b"null", b"17"],
            "no known shape": [b'{"id": 7, "url": "here"}'],
            "lone surrogate": [(line()[:-2] + '\\ud83d"}').encode()],
        }.items():
            for bad in lines:
                good(file, 3)
                self.raw(file, bad, why)
        good(file, 3)
        for _ in range(20):
            marker = self.writer.marker()
            self.text("90-gbk.jsonl", self.writer.document(marker), "clean, in a file that is GBK", marker)
        for file in ("91-truncated.jsonl.gz", "92-truncated.jsonl.zst"):
            good(file, 40)
            self.corpus.unreadable[file] = "truncated"
        for file, why in (("93-no-text.parquet", "no text field"), ("94-empty.jsonl", "empty")):
            self.files[file] = []
            self.corpus.unreadable[file] = why

    # ------------------------------------------------------------------------- dirt in documents

    def broken_encoding(self) -> None:
        file = "10-encoding.jsonl"
        for _ in range(6):
            marker = self.writer.marker()
            text = self.writer.document(marker)
            self.text(file, text.encode().decode("latin-1"), "UTF-8 read as Latin-1", marker, expected=text)
        for encoding, about, count in (("cp1252", "UTF-8 read as cp1252", 4), ("gbk", "UTF-8 read as GBK", 6)):
            for _ in range(count):
                marker, text = self.decodable(encoding)
                self.text(file, text.encode().decode(encoding), about, marker, expected=text)
        for _ in range(3):
            marker = self.writer.marker()
            text = list(self.writer.document(marker, 8, 12))
            for index in self.rng.sample(range(len(text)), len(text) // 3):
                text[index] = "\ufffd"
            self.text(file, marker + "".join(text), "many U+FFFD", marker, step="encoding")
        for _ in range(3):
            marker = self.writer.marker()
            text = self.writer.document(marker, 8, 12)
            self.text(file, text + "\ufffd", "one U+FFFD", marker, loses=("\ufffd",), keeps=(text,))

    def decodable(self, encoding: str) -> tuple[str, str]:
        """A marker and lines of a document, each of whose UTF-8 bytes are characters of another encoding too."""
        def ended(line: str) -> str:  # the bytes of 。 cannot end a line of GBK
            return line.replace("。", "！") if encoding == "gbk" else line

        def is_decodable(line: str) -> bool:
            try:
                return line.encode().decode(encoding).encode(encoding) == line.encode()
            except UnicodeDecodeError:
                return False

        lines = []
        while not lines:
            marker = self.writer.marker()
            lines = [*filter(is_decodable, (ended(self.writer.opening(marker)) for _ in range(60)))][:1]
        while len(lines) < 5:
            lines += filter(is_decodable, map(ended, self.writer.sentences(1)))
        return marker, "\n".join(lines)

    def characters(self) -> None:
        """Control and zero-width characters, full-width letters, line ends."""
        file = "11-characters.jsonl"
        for hidden in "\u0000\u0008\u001b\u007f\u200b\u200c\ufeff\u202e\u2060\u00ad":
            marker = self.writer.marker()
            text = self.writer.line(marker)
            dirty = list(text)
            for index in sorted(self.rng.sample(range(1, len(text)), 4), reverse=True):
                dirty.insert(index, hidden)
            self.text(file, "".join(dirty), "control or zero-width characters", marker, expected=text)
            self.corpus.counts["control or zero-width characters, each"] += 4
        for _ in range(4):
            marker = self.writer.marker()
            text = self.writer.line(marker, 8)
            lines = text.replace("。", "。\n").strip()
            self.text(file, lines.replace("\n", "  \r\n"), "CRLF and spaces at the ends of lines", marker,
                      expected=lines)
        for _ in range(6):
            marker = self.writer.marker()
            word = self.rng.choice(["LINUX", "Python3", "GPS", "DNA", "AM1600"])
            wide = "".join(chr(ord(char) + 0xFEE0) for char in word)
            text = self.writer.line(marker)
            tail = "他在墙上写下{}和12m²，旁边标着①和½，问：谁来念？"
            self.text(file, text + tail.format(wide), "full-width letters", marker, expected=text + tail.format(word))

    def markup(self) -> None:
        file = "12-markup.jsonl"
        for _ in range(12):
            marker = self.writer.marker()
            parts = self.writer.parts(marker, 6, 9)
            dirty = "".join([
                f"<div class=\"main\"><p>{parts[0]}</p>\n<p><b>{parts[1]}</b>{parts[2]}&nbsp;</p>",
                "<script type=\"text/javascript\">var tracker = 'banana';</script>",
                "<style>.top { color: #c0ffee }</style><!-- hidden remark -->",
                *(f"<br/>{part}" for part in parts[3:]), f"他写道：&ldquo;{parts[0][:4]}&rdquo;&amp;再会</div>"])
            self.text(file, dirty, "HTML", marker, keeps=(*parts, f"“{parts[0][:4]}”&再会"), loses=(
                "<p>", "</div>", "<b>", "<br/>", "banana", "c0ffee", "hidden remark", "&nbsp;", "&amp;", "&ldquo;"))
        for _ in range(4):
            marker = self.writer.marker()
            code = "```html\n<p>&nbsp;<b>x</b></p>\n```"
            text = self.writer.line(marker, 8) + "\n" + code + "\n" + self.writer.sentences(1)[0]
            self.text(file, text, "HTML in a code fence", marker)
        for _ in range(4):
            marker = self.writer.marker()
            text = self.writer.line(marker, 6) + "如果a < b并且c > d，那么List<String>里存着a、b。"
            self.text(file, text, "less-than signs", marker)
        for index in range(8):
            marker = self.writer.marker()
            parts = self.writer.parts(marker, 6, 9)
            label = self.rng.choice(TABLES["spot"]) + "的来历"
            dirty = (f"{parts[0]}\n\n![插图](https://img.example.com/p{index}.png \"x\")\n\n{parts[1]}"
                     f"另见[{label}](https://example.com/a{index}?b=c)。" + "".join(parts[2:]))
            self.text(file, dirty, "markdown images and links", marker, keeps=(*parts, f"另见{label}。"), loses=(
                "img.example.com", "](", f"a{index}?b=c"))
        for ad in AD_LINES:
            for where in ("end", "middle"):
                marker = self.writer.marker()
                parts = self.writer.parts(marker, 8, 12)
                line = ad.format(p=self.writer.place(), n=self.writer.name())
                half = len(parts) // 2
                lines = ["".join(parts[:half]), "".join(parts[half:])]
                dirty = [*lines, line] if where == "end" else [lines[0], line, lines[1]]
                self.text(file, "\n".join(dirty), "advertising or template line", marker, loses=(line,),
                          keeps=(*lines,))

    def personal(self) -> None:
        file, rng = "13-personal.jsonl", self.rng

        def mobile() -> str:
            return f"1{rng.choice('3456789')}{rng.randint(0, 999999999):09}"

        def in_text(sentence: str, about: str, **fate) -> None:
            marker = self.writer.marker()
            parts = self.writer.parts(marker, 5, 8)
            parts.insert(rng.randint(1, len(parts)), sentence)
            self.text(file, self.writer.compose(parts), about, marker, **fate)

        for _ in range(8):
            name = rng.choice(["lanhua", "old.boat", "tea_house", "w-k"])
            mail = f"{name}{rng.randint(1, 99)}@post{rng.randint(1, 9)}.lanzhou-tea.cn"
            in_text(f"想报名的人可以写信到{mail}，不收费用。", "mail addresses", loses=(mail,),
                    keeps=("想报名的人可以写信到",))
        for form in ("{}", "{}", "{}", "+86 {}", "{0[0]}-{0[1]}-{0[2]}", "{0[0]} {0[1]} {0[2]}"):
            number = mobile()
            split = (number[:3], number[3:7], number[7:])
            written = form.format(split if "[" in form else number)
            in_text(f"联系电话：{written}，白天有人接。", "mobile numbers", loses=(written, number),
                    keeps=("联系电话：",))
        for _ in range(6):
            number = identity_number(rng, right=True)
            in_text(f"登记表上的身份证号是{number}，字迹已经模糊。", "identity numbers", loses=(number,),
                    keeps=("登记表上的身份证号是",))
        for _ in range(6):
            number = identity_number(rng, right=False)
            in_text(f"旧单据的编号是{number}，没有人认得。", "identity numbers with a wrong check digit")
        in_text("这笔款子总共是13800138000元，分三次付清。", "mobile numbers with a unit behind")
        in_text("去年全县产量达到13912345678斤，比前年略多。", "mobile numbers with a unit behind")
        in_text("货单上的流水号是2024138123456789055，请妥善保存。", "mobile numbers inside longer numbers")
        in_text("箱子侧面印着9913712345678，谁也不懂。", "mobile numbers inside longer numbers")
        in_text("老式电话机上写着12012345678，已经打不通了。", "numbers that begin with 12")
        for _ in range(4):
            marker, number, mail = self.writer.marker(), mobile(), f"yu{rng.randint(10, 99)}@fish.old-boat.com"
            messages = self.turns(marker)
            dirty = [messages[0] | {"content": messages[0]["content"] + f"我的手机号是{number}。"},
                     messages[1] | {"content": messages[1]["content"] + f"请写信到{mail}。"}]
            self.chat("14-personal-chats.jsonl", dirty, "chats with a mobile number and a mail address", marker,
                      loses=(number, mail), keeps=(messages[0]["content"], messages[1]["content"]))
        self.corpus.counts["mail addresses"] += 4
        self.corpus.counts["mobile numbers"] += 4

    def languages(self) -> None:
        for _ in range(12):
            marker = self.writer.marker()
            text = self.writer.document(marker, 8, 16)
            start = text.index(marker)
            end = start + len(marker)
            written = text[:start].translate(TO_TRADITIONAL) + marker + text[end:].translate(TO_TRADITIONAL)
            self.text("15-traditional.jsonl", written, "traditional characters", marker, simplified=text)
        for about, sentences, joint in (("Japanese", JAPANESE, ""), ("Korean", KOREAN, " "), ("English", ENGLISH, " ")):
            first, *rest = sentences
            self.rng.shuffle(rest)
            for index in range(2):
                marker = self.writer.marker()
                part = [first.format(m=marker), *rest[index * 5:index * 5 + 5]]
                self.text("16-languages.jsonl", joint.join(part), about, marker, step="language", reason={
                    "Japanese": "Japanese", "Korean": "Korean"}.get(about, ""), family=about)

    def low_quality(self) -> None:
        file, rng = "17-low-quality.jsonl", self.rng
        for _ in range(5):
            marker = self.writer.marker()
            soup = [rng.choice("★☆◆◇■□▲△●○◎※§¤♀♂♪→←↑↓") for _ in range(220)]
            for word in rng.sample(TABLES["thing"], 12):
                soup.insert(rng.randrange(len(soup)), word)
            self.text(file, marker + "".join(soup), "symbol soup", marker, step="symbols")
        for _ in range(5):
            marker = self.writer.marker()
            sentence = self.writer.sentences(1)[0]
            self.text(file, self.writer.opening(marker) + sentence * rng.randint(12, 20), "one sentence many times",
                      marker, step="repetition")
        for _ in range(3):
            marker = self.writer.marker()
            block = "".join(self.writer.sentences(3))
            self.text(file, "\n".join([self.writer.opening(marker), *[block] * 6]), "one paragraph many times", marker,
                      step="repetition")
        for _ in range(3):
            marker = self.writer.marker()
            menu = [f"{self.writer.place()}的{work}：从前的规矩和今天的做法，图片与说明。"
                    for work in rng.sample(TABLES["work"], 5)]
            self.text(file, "\n".join([self.writer.opening(marker), *menu * 7]), "a menu many times", marker,
                      step="repetition")
        for _ in range(3):
            marker = self.writer.marker()
            text = self.writer.opening(marker) + rng.choice("哈啊嘿") * 300
            self.text(file, text, "one character many times", marker, step="repetition")
        for _ in range(6):
            marker = self.writer.marker()
            self.text(file, f"{marker}走了。", "too short", marker, step="length")
        for _ in range(4):
            marker = self.writer.marker()
            parts = self.writer.parts(marker, 6, 9)
            parts.insert(3, f"巷口开着{BLOCKED}，没有人敢进去。")
            self.text(file, "".join(parts), "blocked word", marker, step="blocklist", flag="blocklist")
        for _ in range(2):
            marker = self.writer.marker()
            messages = self.turns(marker)
            messages[1]["content"] += f"他去过{BLOCKED}。"
            self.chat("18-blocked-chats.jsonl", messages, "blocked word in a chat", marker, step="blocklist",
                      flag="blocklist")

    # ------------------------------------------------------------------------- chats

    def chat_files(self) -> None:
        """Every shape of chats."""
        def some(count: int, turns: int = 2):
            for _ in range(count):
                marker = self.writer.marker()
                yield marker, self.turns(marker, self.rng.randint(1, turns))

        for index, (marker, messages) in enumerate(some(50)):
            if index % 5 == 0:
                messages.insert(0, {"role": "system", "content": "你是耐心的助手，说话简短。"})
            self.chat("30-conversations.jsonl", messages, "clean chat", marker)
        for marker, messages in some(40):
            self.chat("31-openai.jsonl", messages, "clean chat", marker, {"messages": messages})
        for marker, messages in some(40):
            names = {"user": "human", "assistant": "gpt"}
            turns = [{"from": names[message["role"]], "value": message["content"]} for message in messages]
            self.chat("32-sharegpt.json", messages, "clean chat", marker, {"id": marker, "conversations": turns})
        for index, (marker, messages) in enumerate(some(40, turns=1)):
            question, more = messages[0]["content"], self.writer.sentences(1)[0] if index % 2 else ""
            asked = {"role": "user", "content": f"{question}\n{more}" if more else question}
            self.chat("33-alpaca.jsonl", [asked, messages[1]], "clean chat", marker, {
                "instruction": question, "input": more, "output": messages[1]["content"]})
        for index, (marker, messages) in enumerate(some(30, turns=3)):
            texts = [message["content"] for message in messages]
            record = {"id": index, "instruction": "", "input": texts[-2], "output": texts[-1],
                      "history": [texts[i:i + 2] for i in range(0, len(texts) - 2, 2)], "language": "chinese",
                      "data_source": "made up", "input_len": len(texts[-2]), "output_len": len(texts[-1]),
                      "num_utter": len(texts) // 2, "type": "other"}
            self.chat("34-deepctrl.jsonl", messages, "clean chat", marker, record)
        for file in ("35-r1-ours.jsonl", "36-r1-reasoning.jsonl", "37-r1-deepseek.jsonl"):
            for marker, messages in some(15, turns=1):
                thought = "先想想该从哪里说起。" + "".join(self.writer.sentences(self.rng.randint(2, 6)))
                asked, reply = messages[0], messages[1]["content"]
                ours = f"<think>\n{thought}\n</think>\n<answer>\n{reply}\n</answer>"
                written = {"35": {"content": ours}, "36": {"content": reply, "reasoning_content": thought},
                           "37": {"content": f"<think>\n{thought}\n</think>\n\n{reply}"}}[file[:2]]
                key = "messages" if file.startswith("36") else "conversations"
                self.chat(file, [asked, {"role": "assistant", "content": ours}], "clean chat with a thought", marker,
                          {key: [asked, {"role": "assistant"} | written]}, "r1")

    def chat_faults(self) -> None:
        file, writer = "38-chat-faults.jsonl", self.writer

        def user(text: str) -> dict:
            return {"role": "user", "content": text}

        def assistant(text: str) -> dict:
            return {"role": "assistant", "content": text}

        for _ in range(3):
            marker = writer.marker()
            good, more = self.turns(marker), self.turns(marker)[1]["content"]
            self.chat(file, [assistant("您好，欢迎光临小店。"), *good], "an assistant who speaks first", marker,
                      expected=good)
            marker = writer.marker()
            good = self.turns(marker, 2)
            self.chat(file, [*good, user("那么还有呢？")], "a question without a reply at the end", marker,
                      expected=good)
            marker = writer.marker()
            good = self.turns(marker, 2)
            self.chat(file, [*good, user("接着讲。"), assistant("  \n"), user("怎么不说话？"), assistant(more)],
                      "an empty reply in the third turn", marker, expected=good)
            marker = writer.marker()
            good = self.turns(marker)
            self.chat(file, [{"role": "system", "content": "  "}, *good], "an empty system message", marker,
                      expected=good)
            marker = writer.marker()
            first, reply = self.turns(marker)
            self.chat(file, [first, user("请尽量详细。"), reply], "two questions in a row", marker,
                      keeps=(first["content"],))
            marker = writer.marker()
            self.chat(file, [user(self.question(marker)), assistant("")], "an empty reply", marker, step="roles")
            marker = writer.marker()
            self.chat(file, [assistant(f"{marker}来过这里。" + "".join(writer.sentences(3)))], "no question", marker,
                      step="roles")
            marker = writer.marker()
            self.chat(file, [user(self.question(marker))], "no reply", marker, step="roles")
        for blank in ("", "   ", "\u200b\n"):
            self.chat(file, [user(blank), assistant(blank)], "a blank chat", "", step="roles")
        thought, reply = "先想想再说。", "".join(writer.sentences(2))
        for reason, shape in {
            "cut": f"<think>\n{thought}{reply}", "not opened": f"{thought}\n</think>\n<answer>\n{reply}\n</answer>",
            "no <answer>": f"<think>\n{thought}{reply}\n</think>\n", "no <think>": f"<answer>\n{reply}\n</answer>",
            "tags repeated": f"<think>\n{thought}\n</think>\n" * 2 + f"<answer>\n{reply}\n</answer>",
            "<answer> before <think>": f"<answer>\n{reply}\n</answer>\n<think>\n{thought}\n</think>",
            "text outside of the tags": f"{reply}\n<think>\n{thought}\n</think>\n<answer>\n{reply}\n</answer>",
            "empty <answer>": f"<think>\n{thought}{reply}\n</think>\n<answer>\n\n</answer>",
        }.items():
            marker = writer.marker()
            own = "".join(writer.sentences(4))
            self.chat("39-thoughts.jsonl", [user(self.question(marker)), assistant(shape.replace(reply, own))],
                      "a malformed thought", marker, step="thoughts", reason=reason, kind="r1")
            marker = writer.marker()
            good, own = self.turns(marker), "".join(writer.sentences(4))
            self.chat("39-thoughts.jsonl", [*good, user("再想想看。"), assistant(shape.replace(reply, own))],
                      "a malformed thought in the second turn", marker, expected=good, family="malformed thoughts")
        file = "40-voices.jsonl"
        for refusal in REFUSALS:
            marker = writer.marker()
            self.chat(file, [user(f"{marker}是谁？"), assistant(refusal.format(m=marker))], "a refusal", marker,
                      step="refusals", flag="drop_refusals", listed=("refusals",), reason="refusal", family="refusals")
            marker = writer.marker()
            good = self.turns(marker)
            messages = [*good, user("他住哪里？"), assistant(refusal.format(m=marker))]
            self.chat(file, messages, "a refusal in the second turn", marker, listed=("refusals",), family="refusals")
        for reply, names in SELF_MENTIONS:
            marker = writer.marker()
            text = reply.format(m=marker) + "".join(writer.sentences(2))
            self.chat(file, [user("你是谁？"), assistant(text)], "an assistant who calls itself by another name",
                      marker, renamed=names, listed=("self_mentions",), family="self mentions")
        for fact in ("ChatGPT是OpenAI推出的聊天程序，", "通义千问是阿里云推出的语言模型，"):
            marker = writer.marker()
            text = f"{fact}{marker}写过文章介绍。" + "".join(writer.sentences(2))
            self.chat(file, [user("请介绍这个程序。"), assistant(text)], "a fact about another assistant", marker)

    def long_chats(self) -> None:
        """Chats of 600 to 900 tokens, and of more than 1,024: those are set aside."""
        for low, high, count in ((600, 900, 12), (1100, 1500, 6)):
            for kind in ("chat", "r1"):
                for _ in range(count if kind == "chat" else count // 3):
                    marker, goal = self.writer.marker(), self.rng.randint(low + 100, high - 100)
                    messages = self.turns(marker, 1, 3, 5)
                    while (tokens := self.tokens(messages)) < goal:
                        last = messages[-1]["content"]
                        more = next(part for part in self.writer.sentences(9) if part not in last)
                        if len(last) < 350 or kind == "r1":
                            messages[-1]["content"] += more
                        else:
                            messages += [{"role": "user", "content": f"{self.writer.place()}那边呢？"},
                                         {"role": "assistant", "content": more}]
                    if kind == "r1":
                        thought, reply = messages[1]["content"], messages[1]["content"][-30:]
                        content = f"<think>\n{thought}\n</think>\n<answer>\n{reply}\n</answer>"
                        messages[1] = {"role": "assistant", "content": content}
                    claim = {"step": "too_long"} if tokens > 1024 else {}
                    about = f"a long {'chat' if kind == 'chat' else 'thought'} of {low} to {high} tokens"
                    fate = self.chat("41-long-chats.jsonl", messages, about, marker, kind=kind, **claim)
                    if claim:
                        self.corpus.fates[-1] = replace(fate, tokens=self.tokens(messages))

    def word_problems(self) -> None:
        """Problems that differ in nothing but their numbers, and a few exact copies of others."""
        file, rng = "42-word-problems.jsonl", self.rng
        seen = set()
        for index in range(36):
            marker, template = self.writer.marker(), PROBLEMS[index % len(PROBLEMS)]
            chinese = index % 3 == 2
            for _ in range(3 if index % 6 == 0 else 2):
                while (numbers := tuple(rng.sample(range(3, 999), 3))) in seen:
                    pass
                seen.add(numbers)
                a, b, c = map(spell if chinese else str, numbers)
                question = template.format(m=marker, a=a, b=b, c=c)
                answer = f"先把{a}和{b}放在一起看，再考虑{c}，按照题目的顺序逐步计算就能得到结果。"
                kind = "r1" if index % 4 == 3 else "chat"
                if kind == "r1":
                    answer = f"<think>\n题目给出{a}、{b}和{c}。\n</think>\n<answer>\n{answer}\n</answer>"
                self.chat(file, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
                          f"word problem, {'Chinese' if chinese else 'Arabic'} numerals", marker, kind=kind,
                          family=f"problem {index % len(PROBLEMS)}")

    # ------------------------------------------------------------------------- duplicates

    def exact_copies(self) -> None:
        def copy(fate: Fate, file: str, text: str, how: str) -> None:
            self.text(file, text, f"exact copy, {how}", fate.marker, step="exact", duplicate_of=(fate.file, fate.line))

        first, second = "20-duplicates.jsonl", "21-duplicates.jsonl.gz"
        edits = {
            "the same bytes": lambda text: text,
            "without line feeds and spaces": lambda text: text.replace("\n", "").replace(" ", ""),
            "without commas": lambda text: text.replace("，", ""),
            "half-width punctuation": lambda text: text.replace("，", ",").replace("。", "."),
            "other width": lambda text: text.replace("RADIO", "ＲＡＤＩＯ"),
            "other case": lambda text: text.replace("RADIO", "Radio"),
        }
        for how, edit in edits.items():
            for index in range(4):
                marker = self.writer.marker()
                parts = self.writer.parts(marker, 6, 12)
                parts.insert(2, f"收音机上印着RADIO {self.rng.choice('ABCDEF')}，")
                text = "".join(parts[:4]) + "\n" + "".join(parts[4:])
                original = self.text(first, text, "original of an exact copy", marker)
                copy(original, first if index % 2 else second, edit(text), how)
                if index == 3:
                    copy(original, second, edit(text), how)
        marked = [fate for fate in self.corpus.fates if fate.about == "clean" and not fate.file.endswith(".txt")]
        for original in self.rng.sample(marked, 12):
            copy(original, second, original.text, "of another file")
        file = "43-chat-duplicates.jsonl"
        for _ in range(8):
            marker = self.writer.marker()
            messages = self.turns(marker, 2)
            original = self.chat(file, messages, "original of an exact copy", marker)
            self.chat(file, [m | {"content": m["content"].replace("，", "")} for m in messages],
                      "exact copy of a chat, without commas", marker, step="exact",
                      duplicate_of=(original.file, original.line))
        for asked, reply, others in (("你在吗？", "我在的！", [("你在吗", "我在的"), ("你在吗？", "我在的。")]),
                                     ("早上好呀！", "早呀！", [("早上好呀", "早呀！")])):
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
            marker = asked[:-1]
            original = self.chat(file, messages, "a short chat", marker)
            for asked, reply in others:
                self.chat(file, [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}],
                          "exact copy of a short chat", marker, step="exact",
                          duplicate_of=(original.file, original.line))

    def near_copies(self) -> None:
        """Pairs of documents by their overlap, and pairs that are too different."""
        corpus, rng, writer = self.corpus, self.rng, self.writer
        first, second = "22-near.jsonl", "23-near.jsonl.zst"

        def original(about: str, marker: str, parts: list[str], **fate) -> Fate:
            return self.text(first, "".join(parts), about, marker, **fate)

        for goal in (0.95, 0.9, 0.85, 0.81, 0.76, 0.7, 0.66, 0.63, 0.45, 0.35, 0.25):
            for index in range(4):
                how = "characters replaced"
                marker, other = writer.marker(), writer.marker()
                parts = writer.parts(marker, 18, 22)
                kept = original("original of a near copy" if goal > NEAR else "one of a pair that is too different",
                                marker, parts)
                start = kept.text.replace(marker, other)
                burst = 2 if goal > 0.9 else 4 if goal > 0.6 else 10
                while True:
                    text = writer.replace_bursts(start, other, lambda t, kept=kept, goal=goal: overlap(
                        kept.text, t) <= goal + 0.01, burst)
                    shared = overlap(kept.text, text)
                    if shared > (max(goal - 0.02, 0.62) if goal > NEAR else goal - 0.02):
                        break
                file = second if index % 2 else first
                if goal > NEAR:
                    fate = self.text(file, text, f"near copy, {how}", other, step="near", sure=shared >= SURE,
                                     family=marker, duplicate_of=(kept.file, kept.line))
                    corpus.near.append(Pair(fate.duplicate_of, (fate.file, fate.line), shared, how))
                else:
                    fate = self.text(file, text, "one of a pair that is too different", other, family=marker)
                    corpus.apart.append(Pair((kept.file, kept.line), (fate.file, fate.line), shared, how))
        for how in ("sentences deleted", "sentences inserted", "sentences shuffled", "three of a group"):
            for index in range(5):
                marker, other = writer.marker(), writer.marker()
                parts = writer.parts(marker, 18, 22)
                changed = [part.replace(marker, other) for part in parts]
                at = next(i for i, part in enumerate(changed) if other in part)
                free = [i for i in range(len(changed)) if i != at]
                file = second if index % 2 else first
                if how == "sentences inserted":  # the copy is the longer one: it stays
                    new = next(part for part in writer.sentences(40)
                               if part not in changed and len(normalized(part)) > 12)
                    changed.insert(rng.choice(free), new)
                    line = len(self.files[file]) + (2 if file == first else 1)
                    kept = original("original of a near copy", marker, parts, step="near", duplicate_of=(file, line))
                    fate = self.text(file, "".join(changed), f"near copy, {how}", other, family=marker)
                    pair = Pair((fate.file, fate.line), (kept.file, kept.line), overlap(kept.text, fate.text), how)
                    corpus.near.append(pair)
                    continue
                kept = original("original of a near copy", marker, parts)
                if how == "sentences shuffled":
                    while True:
                        i, j = sorted(rng.sample(free, 2))
                        if changed[i][-1] == changed[j][-1] and i + 1 < j:
                            break
                    changed[i], changed[j] = changed[j], changed[i]
                else:
                    longest = max(free, key=lambda i: len(normalized(changed[i])))
                    del changed[longest]
                copies = [(other, "".join(changed))]
                if how == "three of a group":
                    third = writer.marker()
                    copies.append((third, "".join(changed).replace(other, third)))
                for name, text in copies:
                    fate = self.text(file, text, f"near copy, {how}", name, step="near", family=marker,
                                     duplicate_of=(kept.file, kept.line))
                    corpus.near.append(Pair(fate.duplicate_of, (fate.file, fate.line), overlap(kept.text, text), how))
        file = "43-chat-duplicates.jsonl"
        for _ in range(10):  # a sentence without a number is deleted: their sequences of numbers are equal
            marker, other = writer.marker(), writer.marker()
            parts = writer.sentences(14, numerals=False)
            shortest = min((i for i, part in enumerate(parts) if len(normalized(part)) >= 12),
                           key=lambda i: len(parts[i]))
            question = self.question(marker)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "".join(parts)}]
            kept = self.chat(file, messages, "original of a near copy", marker)
            messages = [{"role": "user", "content": question.replace(marker, other)},
                        {"role": "assistant", "content": "".join(parts[:shortest] + parts[shortest + 1:])}]
            shared = overlap(kept.text, joined(messages))
            fate = self.chat(file, messages, "near copy of a chat, a sentence deleted", other, step="near",
                             family=marker, duplicate_of=(kept.file, kept.line), sure=shared >= SURE)
            corpus.near.append(Pair(fate.duplicate_of, (fate.file, fate.line), shared, "a sentence deleted"))

    # ------------------------------------------------------------------------- validation

    def leaks(self) -> None:
        """Validation files, and training records that hold some of them."""
        corpus, rng, writer = self.corpus, self.rng, self.writer
        texts, chats, questions = "val/text.jsonl", "val/chats.jsonl", "val/questions.jsonl"

        def held_out(file: str, record: dict, marker: str, text: str) -> str:
            self.files[file].append(record)
            corpus.val_texts[marker] = text
            return marker

        def new_text() -> tuple[str, list[str]]:
            marker = writer.marker()
            parts = writer.parts(marker, 12, 16)
            held_out(texts, {"text": "".join(parts)}, marker, "".join(parts))
            return marker, parts

        def leak(file: str, val: str, how: str, text: str = "", messages: list | None = None, marker: str = "") -> None:
            claim = dict(step="leak", family=val)
            about = f"leak, {how}"
            fate = (self.chat(file, messages, about, marker, **claim) if messages else
                    self.text(file, text, about, marker, **claim))
            corpus.leaks.append(Leak((fate.file, fate.line), val, containment(fate.text, corpus.val_texts[val]), how))

        file = "24-leaks.jsonl"
        for _ in range(5):
            val, parts = new_text()
            marker = writer.marker()
            before, after = writer.parts(marker, 10, 14), writer.sentences(12)
            leak(file, val, "all of it inside a longer document", "".join(before + ["\n", *parts, "\n"] + after),
                 marker=marker)
            val, parts = new_text()
            marker = writer.marker()
            part = [each for each in parts if val not in each][:round(len(parts) * 0.75)]
            leak(file, val, "a paragraph inside a longer document", "".join(
                [*writer.parts(marker, 12, 16), "\n", *part, "\n", *writer.sentences(4)]), marker=marker)
            val, parts = new_text()
            marker = writer.marker()
            whole = "".join(parts)
            text = writer.replace_bursts(whole.replace(val, marker), marker, lambda t, whole=whole: sum(
                a != b for a, b in zip(t, whole, strict=True)) > 0.27 * len(whole), burst=25)
            leak(file, val, "a third replaced", text, marker=marker)
            val, parts = new_text()
            marker = writer.marker()
            leak(file, val, "its first half", "".join(
                part.replace(val, marker) for part in parts[:len(parts) // 2]) + writer.opening(marker), marker=marker)
            val, parts = new_text()
            leak(file, val, "a copy", "".join(parts), marker=val)
            val, parts = new_text()
            marker = writer.marker()
            part = max((each for each in parts if val not in each), key=len)
            text = "".join([*writer.parts(marker, 14, 18), part])
            fate = self.text(file, text, "one sentence of a validation text", marker, family=val)
            corpus.shared.append(Leak((fate.file, fate.line), val, containment(text, corpus.val_texts[val]),
                                      "one sentence"))
        file = "44-chat-leaks.jsonl"
        for index in range(12):
            val = writer.marker()
            numbers = rng.sample(range(11, 99), 6)
            template = (TEST_QUESTIONS + FACT_QUESTIONS)[index % 6]
            question = template.format(m=val, **dict(zip("abc", numbers, strict=False)))
            held_out(questions, {"question": question, "answer": str(numbers[0])}, val, question)
            reply = {"role": "assistant", "content": "".join(writer.sentences(4))}
            if index % 3 == 0:
                leak(file, val, "a test question in a chat", messages=[{"role": "user", "content": question}, reply],
                     marker=val)
            elif index % 3 == 1:
                asked = f"请先读题再回答。{question}不用着急，慢慢说。"
                leak(file, val, "a test question inside a longer one",
                     messages=[{"role": "user", "content": asked}, reply], marker=val)
            else:
                marker = writer.marker()
                text = "".join(writer.parts(marker, 8, 12)) + "\n" + question + "\n" + "".join(writer.sentences(3))
                leak("24-leaks.jsonl", val, "a test question in a document", text, marker=marker)
            if index % 6 == 0:
                other = template.format(m=val, **dict(zip("abc", numbers[3:], strict=True)))
                self.chat(file, [{"role": "user", "content": other}, reply], "a test question with other numbers", val,
                          family=val, sure=False)
        for _ in range(4):
            val = writer.marker()
            messages = self.turns(val, 2)
            held_out(chats, {"conversations": messages}, val, joined(messages))
            leak(file, val, "a validation chat", messages=messages, marker=val)

    # ------------------------------------------------------------------------- files

    def write(self) -> Corpus:
        """Write all files, in the order of their names, and complete the corpus."""
        corpus = self.corpus
        for name in sorted(self.files):
            path = corpus.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            items, suffix = self.files[name], path.suffix
            lines = b"".join(item + b"\n" if isinstance(item, bytes) else to_line(item) for item in items)
            if suffix == ".json":
                path.write_text(json.dumps(items, ensure_ascii=False, indent=1), encoding="utf-8")
            elif suffix == ".parquet":
                write_parquet(path, items)
            elif suffix == ".txt":
                path.write_text("\n\n".join(items) + "\n", encoding="utf-8")
            elif suffix == ".gz":
                packed = gzip.compress(lines, mtime=0)
                path.write_bytes(packed[:len(packed) * 2 // 3] if name in corpus.unreadable else packed)
            elif suffix == ".zst":
                self._write_zst(path, items)
            elif suffix == ".xz":
                path.write_bytes(lzma.compress(lines))
            elif name == "90-gbk.jsonl":
                path.write_bytes(lines.decode().encode("gbk"))
            else:
                path.write_bytes(lines)
            if name.startswith("val/"):
                corpus.val.append(path)
                continue
            corpus.train.append(path)
            if name in corpus.unreadable:
                corpus.broken.append(path)
        self._forget_unreadable()
        self._number_lines_of_txt()
        for fate in corpus.fates:
            corpus.fate.setdefault(fate.marker, fate)
        corpus.malformed = dict(corpus.malformed)
        return corpus

    def _write_zst(self, path: Path, records: list) -> None:
        """A frame with a block for each record, so that a cut one can be read up to the cut."""
        import zstandard

        packer, blocks = zstandard.ZstdCompressor().compressobj(), []
        for record in records:
            block = packer.compress(to_line(record))
            blocks.append(block + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
        blocks.append(packer.flush())
        packed = b"".join(blocks)
        if path.name in self.corpus.unreadable:
            packed = b"".join(blocks[:27]) + blocks[27][:len(blocks[27]) // 2]
        path.write_bytes(packed)

    def _forget_unreadable(self) -> None:
        """Take the records behind the cut of a truncated file out of the corpus."""
        gz = "91-truncated.jsonl.gz"
        content = zlib.decompressobj(wbits=31).decompress((self.corpus.folder / gz).read_bytes())
        readable = {gz: content.count(b"\n"), "92-truncated.jsonl.zst": 27}
        lost = [fate for fate in self.corpus.fates if fate.line > readable.get(fate.file, fate.line)]
        self.corpus.fates = [fate for fate in self.corpus.fates if fate not in lost]
        self.corpus.counts.subtract(fate.about for fate in lost)

    def _number_lines_of_txt(self) -> None:
        line = 1
        for index, fate in enumerate(self.corpus.fates):
            if fate.file.endswith(".txt"):
                self.corpus.fates[index] = replace(fate, line=line)
                line += fate.text.count("\n") + 2


def to_line(record: dict) -> bytes:
    """A record as a line of JSON."""
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def write_parquet(path: Path, records: list[dict]) -> None:
    """A Parquet file of texts beside another column; of no records, one that has no field of text."""
    import pyarrow
    import pyarrow.parquet

    columns = {"id": list(range(len(records) or 5)), "text": [record["text"] for record in records]}
    if not records:
        columns = {"id": columns["id"], "score": [0.5] * 5}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=16)


def make(folder: Path, seed: int = 1) -> Corpus:
    """Write the raw files of a seed into `folder` and return what is planted in them."""
    builder = _Builder(Path(folder), seed)
    for plant in (builder.plain_files, builder.bad_lines, builder.broken_encoding, builder.characters, builder.markup,
                  builder.personal, builder.languages, builder.low_quality, builder.chat_files, builder.chat_faults,
                  builder.long_chats, builder.word_problems, builder.exact_copies, builder.near_copies, builder.leaks):
        plant()
    return builder.write()


# ---------------------------------------------------------------------------------------------
# its own claims


def cleaned(fate: Fate) -> str:
    """The text of a record as it will be, as far as it is known."""
    if fate.about == "HTML":
        return "".join(fate.keeps)
    return fate.expected if isinstance(fate.expected, str) else fate.text


def related(texts: list[tuple[str, str]], least: float) -> list[tuple[int, int, float]]:
    """Pairs of (family, text) of different families whose texts overlap by at least `least`: by an index of all
    shingles, exact."""
    sets, holders = [shingles(text) for _, text in texts], defaultdict(list)
    for index, found in enumerate(sets):
        for shingle in found:
            holders[shingle].append(index)
    common = Counter(pair for indexes in holders.values() for pair in combinations(indexes, 2))
    found = []
    for (i, j), count in common.items():
        shared = count / (len(sets[i]) + len(sets[j]) - count)
        if shared >= least and texts[i][0] != texts[j][0]:
            found.append((i, j, shared))
    return found


def check(corpus: Corpus) -> list[str]:
    """What is wrong with the corpus; nothing, if all that its docstrings claim is so."""
    wrong, fates = [], {(fate.file, fate.line): fate for fate in corpus.fates}
    if len(fates) != len(corpus.fates):
        wrong.append("two fates have one place")
    for fate in corpus.fates:  # markers: in all records of theirs and in no other
        unrepaired = fate.about.startswith("UTF-8 read as") or not fate.marker
        if not unrepaired and fate.marker not in unicodedata.normalize("NFKC", fate.text) and not re.search(
                r".[\0-\x1f\x7f\xad\u200b-\u202e\u2060\ufeff].", fate.text):
            wrong.append(f"{fate.file}:{fate.line}: without its marker {fate.marker}")
    everything, holders = "\n".join(fate.text for fate in corpus.fates), defaultdict(list)
    for fate in corpus.fates:
        holders[fate.marker].append(fate)
    del holders[""]  # blank chats
    for marker, holding in holders.items():
        if everything.count(marker) > sum(fate.text.count(marker) for fate in holding):
            wrong.append(f"{marker} is in a record of others")
        if not (all(fate.step == "exact" for fate in holding[1:]) or re.match(
                "word problem|a test question|leak", holding[-1].about)):
            wrong.append(f"{marker}: in {len(holding)} records that are no copies")
    last = {}
    for fate in corpus.fates:
        if fate.step == "exact":
            first = fates[fate.duplicate_of]
            if normalized(first.text) != normalized(fate.text) or len(first.text) < len(fate.text) or not (
                    first.stays and (first.file, first.line) < (fate.file, fate.line)):
                wrong.append(f"{fate.file}:{fate.line} is no copy of {first.file}:{first.line}")
        elif fate.stays:
            other = last.setdefault((fate.kind == "text", normalized(cleaned(fate))), fate)
            if other is not fate:
                wrong.append(f"{fate.file}:{fate.line} is a copy of {other.file}:{other.line}")
    for pairs, low, high in ((corpus.near, 0.62, 0.99), (corpus.apart, 0, APART)):
        for pair in pairs:
            a, b = fates[pair.kept], fates[pair.other]
            if overlap(a.text, b.text) != pair.overlap or not low <= pair.overlap < high:
                wrong.append(f"{pair.kept} and {pair.other} overlap by {overlap(a.text, b.text):.3f}, {pair.how}")
            if pairs is corpus.near and (not b.stays) and b.sure != (pair.overlap >= SURE):
                wrong.append(f"{pair.other}: sure or not?")
            longer = len(normalized(a.text)) - len(normalized(b.text))
            if pairs is corpus.near and not (longer >= 12 or longer == 0 and len(a.text) == len(b.text)
                                             and pair.kept < pair.other):
                wrong.append(f"{pair.kept} is {longer} characters longer than {pair.other}")
    for leak in corpus.leaks + corpus.shared:
        low, high = (CONTAINED, 1) if leak in corpus.leaks else (0, UNRELATED)
        contained = containment(fates[leak.record].text, corpus.val_texts[leak.val])
        if contained != leak.contained or not low <= contained <= high:
            wrong.append(f"{leak.record} has {contained:.3f} of {leak.val}, {leak.how}")
    vals = [(marker, shingles(text)) for marker, text in corpus.val_texts.items()]
    for fate in corpus.fates:
        found = shingles(cleaned(fate))
        reaches_leak = fate.stays or fate.step in ("near", "too_long")
        for marker, val in vals if reaches_leak and fate.sure else []:
            if fate.family != marker and len(found & val) >= UNRELATED * min(len(found), len(val)) > 0:
                wrong.append(f"{fate.file}:{fate.line} ({fate.about}) has much of the validation text {marker}")
    texts = [(fate.family, cleaned(fate)) for fate in corpus.fates]
    for i, j, shared in related(texts, UNRELATED):
        a, b = corpus.fates[i], corpus.fates[j]
        wrong.append(f"{a.file}:{a.line} and {b.file}:{b.line} overlap by {shared:.2f}")
    size = sum(path.stat().st_size for path in corpus.train + corpus.val)
    if len(corpus.fates) > 2000 or size > 3e6:
        wrong.append(f"{len(corpus.fates)} records, {size} bytes: too large")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, help="folder (with --check: a temporary one)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="verify the claims by brute force; exit code 1 if one "
                        "fails")
    args = parser.parse_args()
    if not args.out and not args.check:
        parser.error("OUT or --check is needed")
    with tempfile.TemporaryDirectory() as temporary:
        corpus = make(args.out or Path(temporary), args.seed)
        size = sum(path.stat().st_size for path in corpus.train + corpus.val)
        print(f"{len(corpus.fates):,} records in {len(corpus.train)} files, {len(corpus.val_texts)} validation texts, "
              f"{size:,} bytes; {sum(corpus.staying().values()):,} stay")
        for name, count in corpus.counts.items():
            print(f"  {count:4} {name}")
        for name, reasons in corpus.malformed.items():
            print(f"  {name}: {', '.join(f'{count} {why}' for why, count in reasons.items())}")
        for name, why in corpus.unreadable.items():
            print(f"  {name}: {why}")
        wrong = check(corpus) if args.check else []
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    if args.check and not wrong:
        print("all claims hold")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
