"""Chinese and English sentences of which no two are alike, for scripted teachers."""

COMPLAINTS = (
    "咳嗽 头晕 胃痛 腹泻 失眠 皮疹 胸闷 腰痛 乏力 耳鸣 便秘 鼻塞 心慌 眼干 牙痛 尿频".split()
)
ORGANS = "肺部 胃部 肝脏 肾脏 甲状腺 膝关节 皮肤 眼睛 耳朵 心脏 肠道 颈椎 血管 神经".split()
WHO = "我母亲 我父亲 我本人 我家孩子 我爱人 邻居 同事 外婆 爷爷 朋友".split()
ASKS = (
    "应该先挂什么科看",
    "平时饮食上有哪些讲究",
    "需要先做哪些检查才放心",
    "会不会越来越厉害",
    "在家里怎么护理比较好",
    "有没有必要马上到急诊",
    "和天气变冷有没有关系",
    "能不能继续上班和锻炼",
)
ENGLISH = "cough dizziness stomach pain fever rash fatigue headache nausea back swelling".split()


def chinese(draw):
    """A question in Chinese, unlike any other."""
    first, second = draw.sample(COMPLAINTS, 2)
    tail = "".join(chr(draw.randrange(0x4E00, 0x9F00)) for _ in range(30))
    return (
        f"{draw.choice(WHO)}{first}{draw.randrange(2, 30)}天，{draw.choice(ORGANS)}也有{second}的"
        f"感觉，{draw.choice(ASKS)}？（{tail}）"
    )


def chinese_answer(draw):
    """An answer in Chinese."""
    tail = "".join(chr(draw.randrange(0x4E00, 0x9F00)) for _ in range(30))
    return (
        f"您好，{draw.choice(ORGANS)}的情况要结合检查来看。先不用紧张，注意休息，清淡饮食，"
        f"如果{draw.choice(COMPLAINTS)}加重要及时就诊。（{tail}）"
    )


def english(draw):
    """A text in English."""
    return " ".join(["I have had", *draw.choices(ENGLISH, k=18), "for a week, what should I do?"])
