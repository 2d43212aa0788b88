"""The forty diseases of this world, as a table.

Symptoms have the probability that a patient with the disease has them; a symptom that is not listed
does not occur. The figures are round and chosen for teaching: they rank the symptoms of each
disease as textbooks do, and are not measured. Nothing here is medical advice.
"""

from dataclasses import dataclass

AGE_BANDS = {"child": (2, 12), "young": (18, 39), "middle": (40, 64), "old": (65, 85)}
DURATIONS = ("hours", "days", "weeks", "months")


@dataclass(frozen=True, kw_only=True)
class Disease:
    """One row of the table.

    Attributes:
        words: its names, the table's name first.
        weight: its frequency among the patients of this world.
        symptoms: probability of each.
        ages: weight of each of `AGE_BANDS`, in their order.
        male: share of men.
        lasts: weight of each of `DURATIONS`, in their order: how long a patient has had it.
        department: the department that treats it.
        tests: each of them is right; a doctor of this world orders the first that is allowed.
        advice: each of them is right.
        drugs: in order of preference; may be empty.
        emergency: needs emergency care at once.
        watch: symptoms that should bring the patient to emergency care.
        cause: in a few words.
        no_pregnancy: is not drawn together with a pregnancy.
    """

    words: tuple[str, ...]
    weight: float = 1.0
    symptoms: dict[str, float]
    ages: tuple[float, float, float, float]
    male: float = 0.5
    lasts: tuple[float, float, float, float]
    department: str
    tests: tuple[str, ...]
    advice: tuple[str, ...]
    drugs: tuple[str, ...] = ()
    emergency: bool = False
    watch: str
    cause: str
    no_pregnancy: bool = False

    @property
    def name(self) -> str:
        """Returns the first of its words."""
        return self.words[0]


def _row(
    names: str,
    symptoms: str,
    *,
    ages: str,
    lasts: str,
    care: str,
    watch: str,
    cause: str,
    drugs: str = "",
    male: float = 0.5,
    weight: float = 1.0,
    emergency: bool = False,
    no_pregnancy: bool = False,
) -> Disease:
    """Makes a row: weights in percent; `care` is department, tests and advice, split by `|`."""
    department, tests, advice = (part.split() for part in care.split("|"))
    percent = symptoms.split()
    weights = [tuple(float(weight) for weight in text.split()) for text in (ages, lasts)]
    return Disease(
        words=tuple(names.split()),
        weight=weight,
        symptoms={
            name: int(share) / 100 for name, share in zip(percent[::2], percent[1::2], strict=True)
        },
        ages=(weights[0][0], weights[0][1], weights[0][2], weights[0][3]),
        male=male,
        lasts=(weights[1][0], weights[1][1], weights[1][2], weights[1][3]),
        department=department[0],
        tests=tuple(tests),
        advice=tuple(advice),
        drugs=tuple(drugs.split()),
        emergency=emergency,
        watch=watch,
        cause=cause,
        no_pregnancy=no_pregnancy,
    )


_ROWS = (
    # Airways and chest.
    _row(
        "普通感冒 感冒",
        "流鼻涕 90 打喷嚏 75 鼻塞 75 嗓子疼 60 咳嗽 45 发烧 20 乏力 20 全身酸痛 20 头痛 25",
        ages="3 4 2 1",
        lasts="0 9 1 0",
        care="呼吸内科 | 血常规 咽部检查 | 多喝水 多休息 清淡饮食",
        drugs="对乙酰氨基酚",
        weight=1.5,
        watch="高烧不退",
        cause="病毒感染",
    ),
    _row(
        "流感 流行性感冒",
        "发烧 95 全身酸痛 85 乏力 75 头痛 55 咳嗽 50 嗓子疼 40 流鼻涕 20 接触过病人 50 怕冷 35",
        ages="3 4 2 2",
        lasts="1 9 0 0",
        care="发热门诊 | 流感检测 血常规 | 多休息 多喝水 戴口罩 隔离在家",
        drugs="奥司他韦 对乙酰氨基酚",
        weight=1.5,
        watch="呼吸困难",
        cause="流感病毒感染",
    ),
    _row(
        "过敏性鼻炎",
        "打喷嚏 90 流鼻涕 85 鼻塞 60 鼻子痒 80 眼睛痒 50 遇灰尘加重 65",
        ages="3 5 2 1",
        lasts="0 1 3 6",
        care="耳鼻喉科 | 过敏原检测 | 远离灰尘花粉 用盐水洗鼻 戴口罩",
        drugs="氯雷他定 西替利嗪 鼻用激素",
        watch="喘不过气",
        cause="对花粉或灰尘过敏",
    ),
    _row(
        "扁桃体炎 扁桃体发炎",
        "嗓子疼 95 吞咽疼 80 发烧 80 头痛 30 乏力 30 胃口差 30 咳嗽 15 全身酸痛 20",
        ages="4 5 1 0",
        lasts="0 9 1 0",
        care="耳鼻喉科 | 咽部检查 血常规 | 温水漱口 多喝水 清淡饮食",
        drugs="阿莫西林 阿奇霉素",
        watch="张不开嘴",
        cause="细菌感染",
    ),
    _row(
        "支气管炎 急性支气管炎",
        "咳嗽 97 咳白痰 75 嗓子疼 40 胸闷 35 气短 20 发烧 25 乏力 25 喘息 20",
        ages="2 3 3 2",
        lasts="0 6 4 0",
        care="呼吸内科 | 胸片 血常规 | 多喝水 不抽烟 多休息",
        drugs="氨溴索",
        watch="呼吸困难",
        cause="气管受刺激",
    ),
    _row(
        "肺炎",
        "咳嗽 92 发烧 88 咳黄痰 70 气短 50 吸气时疼 45 "
        "乏力 45 胃口差 30 嘴唇发紫 12 全身酸痛 30 胸痛 20",
        ages="2 2 3 4",
        lasts="0 8 2 0",
        care="呼吸内科 | 胸片 血常规 | 多休息 多喝水 清淡饮食",
        drugs="阿莫西林 阿奇霉素 左氧氟沙星",
        watch="嘴唇发紫",
        cause="肺部感染",
    ),
    _row(
        "哮喘 支气管哮喘",
        "喘息 90 胸闷 65 气短 65 咳嗽 65 夜里憋醒 60 遇灰尘加重 60 嘴唇发紫 8",
        ages="3 4 2 1",
        lasts="1 2 2 5",
        care="呼吸内科 | 肺功能 过敏原检测 | 远离灰尘花粉 不抽烟 别剧烈运动",
        drugs="沙丁胺醇",
        watch="喘得说不出话",
        cause="气道过敏收缩",
    ),
    # Heart and vessels.
    _row(
        "心绞痛 冠心病",
        "胸痛 90 活动后加重 80 休息后缓解 75 胸闷 60 气短 40 疼到左肩 35 血压高 40 心慌 30",
        ages="0 0 5 5",
        male=0.6,
        lasts="0 2 4 4",
        care="心内科 | 心电图 冠脉检查 | 别剧烈运动 不抽烟 低盐饮食",
        drugs="硝酸甘油 阿司匹林",
        watch="胸痛半小时不缓解",
        cause="心脏供血不足",
    ),
    _row(
        "心肌梗死 心梗",
        "胸痛 95 疼半小时不停 80 出冷汗 70 疼到左肩 55 气短 45 恶心 30 胸闷 45 上腹痛 15",
        ages="0 1 5 5",
        male=0.65,
        lasts="9 1 0 0",
        care="急诊 | 心电图 心肌酶 | 躺下别动 先不吃东西",
        emergency=True,
        watch="昏倒",
        cause="心脏血管堵塞",
    ),
    _row(
        "高血压",
        "血压高 85 头晕 65 头痛 50 脖子疼 30 心慌 25 失眠 20 乏力 20 胸闷 20",
        ages="0 1 5 5",
        lasts="0 1 3 6",
        care="心内科 | 血压测量 心电图 | 低盐饮食 天天记血压 控制体重",
        drugs="氨氯地平 缬沙坦",
        weight=1.5,
        watch="手脚无力",
        cause="吃盐多、血管变硬",
    ),
    _row(
        "脑卒中 脑梗",
        "一侧手脚无力 85 说话不清 70 嘴歪 60 头晕 50 头痛 30 恶心 20 天旋地转 30 血压高 50 呕吐 20",
        ages="0 0 4 6",
        lasts="9 1 0 0",
        care="急诊 | 头颅CT 头颅核磁 | 躺下别动 先不吃东西",
        emergency=True,
        watch="昏迷",
        cause="脑血管堵塞或出血",
    ),
    # Stomach, gut and bile.
    _row(
        "胃溃疡",
        "上腹痛 92 饭后疼 75 反酸 50 恶心 35 胃口差 35 "
        "体重下降 20 黑便 15 呕血 5 脸色苍白 15 烧心 25",
        ages="0 3 5 3",
        lasts="0 1 4 5",
        care="消化内科 | 胃镜 幽门螺杆菌 | 按时吃饭 少吃辛辣 不喝酒",
        drugs="奥美拉唑",
        watch="呕血或黑便",
        cause="胃酸和细菌伤了胃",
    ),
    _row(
        "十二指肠溃疡",
        "上腹痛 92 空腹疼 80 夜里疼醒 60 反酸 55 烧心 30 黑便 15 右上腹痛 20",
        ages="0 5 4 1",
        male=0.65,
        lasts="0 1 4 5",
        care="消化内科 | 胃镜 幽门螺杆菌 | 按时吃饭 少吃辛辣 不抽烟",
        drugs="奥美拉唑 铝碳酸镁",
        watch="呕血或黑便",
        cause="胃酸过多",
    ),
    _row(
        "胃食管反流",
        "烧心 88 反酸 85 躺下加重 65 胸痛 30 咳嗽 25 上腹痛 30 胃口差 15 嗓子疼 20",
        ages="0 3 5 3",
        lasts="0 1 4 5",
        care="消化内科 | 胃镜 | 睡前不吃东西 垫高枕头 少吃油腻",
        drugs="奥美拉唑 铝碳酸镁",
        watch="吞不下东西",
        cause="胃酸往上返",
    ),
    _row(
        "胃肠炎 急性胃肠炎",
        "拉肚子 90 肚子疼 75 呕吐 65 恶心 65 吃过不干净的东西 60 "
        "发烧 35 乏力 30 便血 10 口渴 35 头晕 20",
        ages="3 4 2 2",
        lasts="3 7 0 0",
        care="消化内科 | 大便检查 血常规 | 多喝水 清淡饮食 多休息",
        drugs="口服补液盐 蒙脱石散",
        weight=1.5,
        watch="尿少、精神差",
        cause="吃坏东西、肠道感染",
    ),
    _row(
        "肠易激 肠易激综合征",
        "肚子疼 90 拉肚子 75 便后缓解 80 紧张时加重 65 失眠 25 便秘 25 胃口差 20",
        ages="0 6 3 1",
        male=0.4,
        lasts="0 0 3 7",
        care="消化内科 | 大便检查 肠镜 | 放松心情 清淡饮食 规律睡眠",
        drugs="匹维溴铵 蒙脱石散",
        watch="大便带血",
        cause="肠道过于敏感",
    ),
    _row(
        "阑尾炎 急性阑尾炎",
        "右下腹痛 90 恶心 60 胃口差 55 发烧 50 呕吐 45 拉肚子 12",
        ages="3 5 2 1",
        lasts="6 4 0 0",
        care="急诊 | 腹部B超 血常规 | 先不吃东西 躺下别动",
        emergency=True,
        watch="整个肚子发硬",
        cause="阑尾堵塞",
    ),
    _row(
        "胆囊炎 胆结石",
        "右上腹痛 90 油腻后加重 70 恶心 55 呕吐 40 发烧 40 疼到后背 35 胃口差 30",
        ages="0 2 5 4",
        male=0.4,
        lasts="2 7 1 0",
        care="普外科 | 腹部B超 血常规 | 少吃油腻 清淡饮食 不喝酒",
        drugs="左氧氟沙星",
        watch="皮肤发黄",
        cause="胆囊里的石头",
    ),
    _row(
        "胰腺炎 急性胰腺炎",
        "上腹痛 95 疼到后背 70 呕吐 70 恶心 65 喝酒后发作 65 发烧 35 右上腹痛 20",
        ages="0 3 5 3",
        male=0.6,
        lasts="7 3 0 0",
        care="急诊 | 血淀粉酶 腹部B超 | 先不吃东西 不喝酒",
        emergency=True,
        watch="昏迷",
        cause="喝酒过多",
    ),
    _row(
        "痔疮",
        "便血 88 肛门疼 60 便秘 65 劳累后加重 30 肚子疼 15 脸色苍白 12 乏力 15",
        ages="0 5 4 2",
        lasts="0 3 4 3",
        care="肛肠科 | 肛门检查 肠镜 | 热水坐浴 多吃蔬菜 别久坐",
        drugs="痔疮膏",
        watch="大量出血",
        cause="肛门静脉曲张",
    ),
    # Head and nerves.
    _row(
        "偏头痛",
        "头痛 97 一侧跳着疼 80 怕光 65 恶心 60 呕吐 25 失眠 20 天旋地转 12",
        ages="0 6 4 1",
        male=0.3,
        lasts="3 3 1 3",
        care="神经内科 | 头颅CT 头颅核磁 | 安静避光 规律睡眠",
        drugs="布洛芬 对乙酰氨基酚",
        watch="突然剧烈头痛",
        cause="脑血管和神经敏感",
    ),
    _row(
        "紧张性头痛",
        "头痛 97 头像被箍住 75 脖子疼 50 劳累后加重 60 失眠 40 紧张担心 25",
        ages="0 5 4 2",
        male=0.4,
        lasts="0 3 4 3",
        care="神经内科 | 头颅CT 头颅核磁 | 放松心情 规律睡眠 热敷",
        drugs="布洛芬 对乙酰氨基酚",
        watch="突然剧烈头痛",
        cause="压力大、肌肉紧张",
    ),
    _row(
        "耳石症",
        "天旋地转 92 翻身时加重 88 恶心 60 头晕 50 呕吐 30",
        ages="0 2 5 4",
        male=0.35,
        lasts="3 6 1 0",
        care="耳鼻喉科 | 变位试验 | 起床慢一点 多休息",
        watch="手脚无力",
        cause="耳石掉落",
    ),
    _row(
        "颈椎病",
        "脖子疼 90 手麻 65 头晕 50 头痛 30 劳累后加重 55 天旋地转 25 恶心 20",
        ages="0 3 5 3",
        lasts="0 1 4 5",
        care="骨科 | 颈椎片 颈椎核磁 | 少低头 热敷 适量运动",
        drugs="甲钴胺 布洛芬",
        watch="走路不稳",
        cause="颈椎退变压迫神经",
    ),
    # Hormones, blood, mind.
    _row(
        "糖尿病 2型糖尿病",
        "口渴 85 尿多 80 体重下降 55 乏力 50 手麻 20 夜尿多 40 腿麻 15 尿频 30",
        ages="0 1 5 5",
        lasts="0 0 3 7",
        care="内分泌科 | 血糖 尿常规 | 少吃甜食 适量运动 控制体重",
        drugs="二甲双胍",
        weight=1.5,
        watch="呕吐、意识不清",
        cause="胰岛素不够用",
    ),
    _row(
        "甲亢 甲状腺功能亢进",
        "心慌 85 怕热多汗 75 体重下降 70 手抖 60 脖子粗 40 失眠 35 口渴 30 乏力 40",
        ages="0 6 4 1",
        male=0.25,
        lasts="0 0 4 6",
        care="内分泌科 | 甲状腺功能 | 少吃含碘食物 多休息",
        drugs="甲巯咪唑",
        watch="高烧、心跳过快",
        cause="甲状腺激素过多",
    ),
    _row(
        "缺铁性贫血 贫血",
        "乏力 85 头晕 70 脸色苍白 75 心慌 50 指甲脆 35 掉头发 30 怕冷 20",
        ages="1 5 3 2",
        male=0.25,
        lasts="0 0 3 7",
        care="血液科 | 血常规 血清铁 | 多吃瘦肉 起床慢一点",
        drugs="铁剂",
        watch="晕倒",
        cause="身体缺铁",
    ),
    _row(
        "焦虑症 焦虑",
        "紧张担心 92 失眠 70 心慌 65 手抖 30 胸闷 40 怕热多汗 20 头晕 30 胸痛 20 气短 25",
        ages="0 6 4 1",
        male=0.4,
        lasts="0 0 4 6",
        care="心理科 | 心理量表 甲状腺功能 | 放松心情 规律睡眠 适量运动",
        drugs="舍曲林",
        watch="情绪崩溃",
        cause="长期压力大",
    ),
    # Urine and women's health.
    _row(
        "膀胱炎 尿路感染",
        "尿频 90 尿急 85 尿疼 80 小腹痛 45 血尿 30 排尿费力 15",
        ages="0 6 4 2",
        male=0.15,
        lasts="1 9 0 0",
        care="泌尿外科 | 尿常规 尿培养 | 多喝水 别憋尿",
        drugs="左氧氟沙星 磷霉素",
        watch="高烧、腰痛",
        cause="细菌感染膀胱",
    ),
    _row(
        "肾盂肾炎",
        "发烧 92 腰痛 88 尿频 60 尿疼 55 恶心 40 乏力 40 全身酸痛 30 怕冷 40",
        ages="0 6 3 2",
        male=0.2,
        lasts="0 9 1 0",
        care="肾内科 | 尿常规 尿培养 血常规 | 多喝水 多休息",
        drugs="左氧氟沙星 阿莫西林",
        watch="高烧不退",
        cause="细菌感染肾脏",
    ),
    _row(
        "肾结石 尿路结石",
        "腰痛 95 血尿 70 恶心 50 呕吐 35 尿频 30 右下腹痛 30",
        ages="0 5 5 1",
        male=0.7,
        lasts="6 4 0 0",
        care="泌尿外科 | 泌尿B超 尿常规 | 多喝水 低盐饮食 适量运动",
        drugs="布洛芬 坦索罗辛",
        watch="高烧、没有尿",
        cause="尿里盐分结成石头",
    ),
    _row(
        "前列腺增生 前列腺肥大",
        "夜尿多 88 排尿费力 85 尿频 75 尿急 45",
        ages="0 0 3 7",
        male=1.0,
        lasts="0 0 2 8",
        care="泌尿外科 | 前列腺B超 尿常规 | 别憋尿 不喝酒 少吃辛辣",
        drugs="坦索罗辛",
        watch="完全尿不出",
        cause="年纪大、前列腺变大",
    ),
    _row(
        "痛经",
        "小腹痛 96 经期疼 92 腰痛 40 恶心 35 拉肚子 20 乏力 30",
        ages="0 1 0 0",
        male=0.0,
        lasts="4 4 0 2",
        care="妇产科 | 妇科B超 | 热敷 多休息 保暖",
        drugs="布洛芬",
        watch="疼得昏倒",
        cause="子宫收缩过强",
        no_pregnancy=True,
    ),
    _row(
        "宫外孕 异位妊娠",
        "小腹痛 92 停经 85 阴道出血 75 头晕 35 出冷汗 25 恶心 30 右下腹痛 30 脸色苍白 40",
        ages="0 1 0 0",
        male=0.0,
        lasts="7 3 0 0",
        care="急诊 | 血HCG 妇科B超 | 躺下别动 先不吃东西",
        emergency=True,
        watch="昏倒",
        cause="胚胎着床在子宫外",
        no_pregnancy=True,
    ),
    # Bones and joints.
    _row(
        "腰椎间盘突出 腰突",
        "腰痛 93 腿麻 85 弯腰加重 70 劳累后加重 40",
        ages="0 3 5 2",
        male=0.6,
        lasts="0 1 4 5",
        care="骨科 | 腰椎核磁 | 睡硬床 别久坐",
        drugs="布洛芬 甲钴胺",
        watch="大小便失禁",
        cause="椎间盘压迫神经",
    ),
    _row(
        "腰肌劳损",
        "腰痛 95 劳累后加重 80 休息后缓解 75 早上僵硬 25 弯腰加重 25",
        ages="0 5 5 2",
        lasts="0 1 4 5",
        care="骨科 | 腰椎核磁 | 热敷 别久坐 适量运动",
        drugs="布洛芬 对乙酰氨基酚",
        watch="腿没力气",
        cause="腰部肌肉疲劳",
    ),
    # Skin.
    _row(
        "湿疹",
        "皮肤痒 93 红疹 88 遇灰尘加重 20 紧张时加重 25 失眠 20 劳累后加重 20",
        ages="4 4 2 2",
        lasts="0 1 4 5",
        care="皮肤科 | 皮肤检查 过敏原检测 | 皮肤保湿 别抓 少吃辛辣",
        drugs="激素软膏 氯雷他定",
        watch="皮肤流脓发烧",
        cause="皮肤过敏和干燥",
    ),
    _row(
        "荨麻疹",
        "皮肤痒 93 风团 88 很快消退 75 吃海鲜后发作 45 嗓子发紧 10 红疹 30",
        ages="3 5 2 1",
        lasts="4 5 1 0",
        care="皮肤科 | 皮肤检查 过敏原检测 | 少吃海鲜 别抓",
        drugs="西替利嗪 氯雷他定",
        watch="呼吸困难",
        cause="食物或药物过敏",
    ),
    _row(
        "手足口病",
        "手脚起疹 92 嘴里长泡 85 发烧 70 胃口差 55 接触过病人 40 红疹 45",
        ages="1 0 0 0",
        lasts="0 9 0 0",
        care="儿科 | 皮肤检查 血常规 | 隔离在家 多喝水 清淡饮食",
        drugs="对乙酰氨基酚",
        watch="抽搐、精神差",
        cause="肠道病毒感染",
    ),
    _row(
        "水痘",
        "全身水泡 93 皮肤痒 75 发烧 70 胃口差 35 接触过病人 50 红疹 50 嘴里长泡 15",
        ages="8 2 0 0",
        lasts="0 9 0 0",
        care="皮肤科 | 皮肤检查 血常规 | 隔离在家 别抓 多休息",
        drugs="炉甘石洗剂 对乙酰氨基酚",
        watch="高烧抽搐",
        cause="水痘病毒感染",
    ),
)

DISEASES: dict[str, Disease] = {row.name: row for row in _ROWS}
