"""The symptoms of this world and their wordings; the tests, departments, advice and drugs."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Symptom:
    """A symptom.

    Attributes:
        name: its name in the table of diseases; the first of `words`.
        words: its wordings; each can follow 有 and 没有.
        opens: a consultation can begin with it; one that only specifies another ("饭后疼") cannot.
        red_flag: a patient who has it needs emergency care, whatever the disease.
    """

    words: tuple[str, ...]
    opens: bool = True
    red_flag: bool = False

    @property
    def name(self) -> str:
        """Returns the first of its words."""
        return self.words[0]


def _of(lines: str, *, opens: bool = True, red_flag: bool = False) -> tuple[Symptom, ...]:
    return tuple(
        Symptom(words=tuple(line.split()), opens=opens, red_flag=red_flag)
        for line in lines.strip().splitlines()
    )


_COMPLAINTS = """
发烧 发热
咳嗽 咳个不停
流鼻涕 鼻涕多
打喷嚏 喷嚏不断
鼻塞 鼻子不通气
嗓子疼 咽喉痛
全身酸痛 浑身酸痛
乏力 浑身没劲
气短 喘不上气
胸闷 胸口发闷
胸痛 胸口疼
喘息 喘得有响声
上腹痛 胃疼
肚子疼 腹痛
右下腹痛 右边小肚子疼
右上腹痛 右边肋下疼
小腹痛 小肚子疼
反酸 反酸水
烧心 胃里发热
恶心 想吐
呕吐 吐了几次
拉肚子 腹泻
便血 大便带鲜血
便秘 大便干
心慌 心跳快
头晕 头发昏
头痛 头疼
天旋地转 看东西在转
脖子疼 脖子僵
手麻 手指发麻
口渴 总想喝水
尿频 小便次数多
尿急 憋不住尿
尿疼 小便疼
血尿 尿里有血
夜尿多 夜里总起来小便
排尿费力 小便不畅
腰痛 腰疼
腿麻 腿发麻
皮肤痒 身上痒
红疹 红疙瘩
嘴里长泡 嘴里溃疡
失眠 睡不着
紧张担心 总是担心
怕热多汗 怕热爱出汗
怕冷 比别人怕冷
体重下降 人瘦了
胃口差 吃不下饭
手抖 双手发抖
脸色苍白 脸色发白
"""

_DETAILS = """
咳黄痰 痰是黄的
咳白痰 痰是白的
吸气时疼 深呼吸就疼
遇灰尘加重 遇花粉加重
夜里憋醒 夜里咳醒
吞咽疼 咽东西疼
鼻子痒 鼻子发痒
眼睛痒 眼睛发痒
接触过病人 家里人也这样
饭后疼 吃完饭疼
空腹疼 饿的时候疼
夜里疼醒 半夜疼醒
躺下加重 平躺更重
吃过不干净的东西 吃过剩菜
便后缓解 拉完就好些
紧张时加重 一着急就重
油腻后加重 吃肥肉后加重
喝酒后发作 大吃大喝后发作
疼到后背 后背也疼
活动后加重 走快了加重
休息后缓解 歇一会就好
疼到左肩 左胳膊也疼
翻身时加重 起床时加重
一侧跳着疼 半边头跳着疼
怕光 怕光怕吵
头像被箍住 头发紧
劳累后加重 久坐后加重
弯腰加重 咳嗽时加重
早上僵硬 早上关节发僵
吃海鲜后发作 吃海鲜后出现
很快消退 一天内消退
经期疼 来月经就疼
停经 月经推迟
血压高 血压偏高
掉头发 头发掉得多
指甲脆 指甲容易断
肛门疼 肛门疼痛
尿多 小便量多
脖子粗 脖子肿大
阴道出血 下面出血
风团 一片片鼓起的疹子
手脚起疹 手心脚心起疹
全身水泡 满身小水泡
"""

_RED_FLAGS = """
嘴唇发紫 嘴唇青紫
黑便 大便发黑
呕血 吐血
疼半小时不停 一直疼不停
出冷汗 冒冷汗
一侧手脚无力 半边身子没劲
说话不清 说话含糊
嘴歪 嘴角歪斜
嗓子发紧 喉咙发紧
"""

_FLAGGED = _of(_RED_FLAGS, opens=False, red_flag=True)
SYMPTOMS: dict[str, Symptom] = {
    symptom.name: symptom for symptom in (*_of(_COMPLAINTS), *_of(_DETAILS, opens=False), *_FLAGGED)
}


# A condition that forbids some drugs -> how a patient tells of it, the first as the table calls it.
CONDITIONS: dict[str, tuple[str, ...]] = {
    "青霉素过敏": ("青霉素过敏", "用青霉素会过敏"),
    "怀孕": ("怀孕了", "在怀孕"),
    "胃出血史": ("得过胃出血", "以前胃出血"),
    "肾功能不好": ("肾功能不好", "肾功能差"),
    "肝功能不好": ("肝功能不好", "肝功能差"),
}


@dataclass(frozen=True, kw_only=True)
class Drug:
    """A drug and its contraindications.

    Attributes:
        words: its names, the table's name first.
        not_with: keys of `CONDITIONS`.
        from_age: years of age below which it is not given.
    """

    words: tuple[str, ...]
    not_with: tuple[str, ...] = ()
    from_age: int = 0

    def forbidden(self, conditions: frozenset[str], age: int | None) -> bool:
        """Returns True if a patient of these conditions and age (or None) must not have it."""
        young = age is not None and age < self.from_age
        return young or not conditions.isdisjoint(self.not_with)


def _drug(*words: str, not_with: tuple[str, ...] = (), from_age: int = 0) -> Drug:
    return Drug(words=words, not_with=not_with, from_age=from_age)


DRUGS: dict[str, Drug] = {
    drug.words[0]: drug
    for drug in (
        _drug("对乙酰氨基酚", "扑热息痛", not_with=("肝功能不好",)),
        _drug("布洛芬", not_with=("怀孕", "胃出血史", "肾功能不好", "肝功能不好")),
        _drug("阿司匹林", not_with=("怀孕", "胃出血史"), from_age=18),
        _drug("阿莫西林", not_with=("青霉素过敏",)),
        _drug("阿奇霉素", not_with=("肝功能不好",)),
        _drug("左氧氟沙星", not_with=("怀孕",), from_age=18),
        _drug("磷霉素", from_age=12),
        _drug("奥司他韦"),
        _drug("氨溴索", not_with=("怀孕",)),
        _drug("氯雷他定", not_with=("肝功能不好",)),
        _drug("西替利嗪", not_with=("肾功能不好",)),
        _drug("鼻用激素", from_age=3),
        _drug("沙丁胺醇"),
        _drug("奥美拉唑", from_age=12),
        _drug("铝碳酸镁", not_with=("肾功能不好",), from_age=12),
        _drug("蒙脱石散"),
        _drug("口服补液盐"),
        _drug("匹维溴铵", not_with=("怀孕",), from_age=18),
        _drug("痔疮膏", not_with=("怀孕",)),
        _drug("硝酸甘油", from_age=18),
        _drug("氨氯地平", not_with=("怀孕", "肝功能不好"), from_age=18),
        _drug("缬沙坦", not_with=("怀孕", "肾功能不好"), from_age=18),
        _drug("甲巯咪唑", not_with=("怀孕", "肝功能不好")),
        _drug("铁剂"),
        _drug("二甲双胍", not_with=("怀孕", "肾功能不好", "肝功能不好"), from_age=10),
        _drug("甲钴胺"),
        _drug("坦索罗辛", not_with=("怀孕",), from_age=18),
        _drug("炉甘石洗剂"),
        _drug("激素软膏"),
        _drug("舍曲林", not_with=("怀孕",), from_age=18),
    )
}


def _named(lines: str) -> dict[str, tuple[str, ...]]:
    """Maps each line's first word to all its words."""
    return {line.split()[0]: tuple(line.split()) for line in lines.strip().splitlines()}


TESTS = _named("""
血常规 血象
流感检测 流感试纸
胸片 胸部X光
肺功能 肺功能检查
过敏原检测 过敏原检查
咽部检查 咽喉检查
胃镜 胃镜检查
幽门螺杆菌 吹气试验
大便检查 大便化验
肠镜 肠镜检查
腹部B超 腹部彩超
血淀粉酶 淀粉酶
肛门检查 肛门指检
心电图 心电图检查
冠脉检查 冠脉CT
心肌酶 肌钙蛋白
血压测量 血压监测
甲状腺功能 甲功
血糖 血糖检查
头颅CT 头部CT
头颅核磁 头部磁共振
颈椎片 颈椎X光
颈椎核磁 颈椎磁共振
腰椎核磁 腰椎磁共振
变位试验 体位试验
尿常规 尿检
尿培养 小便培养
泌尿B超 泌尿彩超
前列腺B超 前列腺彩超
妇科B超 妇科彩超
血HCG 孕检
皮肤检查 皮疹检查
心理量表 心理评估
血清铁 铁蛋白
""")

# Tests with X-rays, which a pregnant woman does not get.
X_RAYS = ("胸片", "冠脉检查", "头颅CT", "颈椎片")

DEPARTMENTS = _named("""
呼吸内科 呼吸科
耳鼻喉科 五官科
消化内科 消化科
普外科 外科
肛肠科
心内科 心血管内科
神经内科 神内
内分泌科
血液科
骨科
肾内科
泌尿外科 泌尿科
妇产科 妇科
皮肤科
儿科
心理科 精神科
发热门诊
急诊 急诊科
""")
EMERGENCY = "急诊"

ADVICE = _named("""
多喝水 多喝温水
多休息 好好休息
清淡饮食 吃清淡些
戴口罩 戴好口罩
温水漱口 淡盐水漱口
用盐水洗鼻 生理盐水洗鼻
远离灰尘花粉 避开灰尘花粉
不抽烟 戒烟
不喝酒 戒酒
少吃辛辣 别吃辣
按时吃饭 三餐按时
睡前不吃东西 睡前3小时不吃
垫高枕头 枕头垫高
少吃油腻 别吃油腻
先不吃东西 禁食禁水
热水坐浴 温水坐浴
多吃蔬菜 多吃青菜
放松心情 别太紧张
躺下别动 平躺别动
别剧烈运动 避免劳累
低盐饮食 少吃盐
少吃含碘食物 少吃海带
多吃瘦肉 多吃红肉
少吃甜食 控制主食
规律睡眠 按时睡觉
安静避光 在暗处躺着
少低头 别老低头
睡硬床 睡硬板床
别久坐 少久坐
热敷 用热水袋敷
起床慢一点 起身慢些
别憋尿 有尿就排
少吃海鲜 别吃海鲜
控制体重 减体重
别抓 不要抓挠
皮肤保湿 多擦保湿霜
隔离在家 别去学校
适量运动 每天散散步
天天记血压 每天记血压
保暖 穿暖和些
""")
# Advice that makes no sense for a child, and advice for the way to emergency care.
ADULT_ADVICE = ("不抽烟", "不喝酒", "控制体重")
ON_THE_WAY = ("先不吃东西", "躺下别动")


def forbidden_test(name: str, conditions: frozenset[str]) -> bool:
    """Returns True if a patient of these conditions must not have a test."""
    return name in X_RAYS and "怀孕" in conditions
