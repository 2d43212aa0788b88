"""Made-up personal data in the styles of real consultations, each with what is to be masked.

`{x}` stands where a piece of personal data goes; texts without one have none.
"""

import random

SURNAMES = "王李张刘陈杨赵吴周徐孙朱胡郭何林高罗郑梁谢宋唐许韩冯邓曹彭曾肖田董潘袁蔡蒋杜叶程"
GIVEN = "伟芳娜敏静丽强磊军洋勇艳杰娟涛超霞刚桂兰建国志明秀英玉梅晓红文博宇轩子涵雨欣浩然思远"
ENGLISH_NAMES = ("John Smith", "Mary Johnson", "Robert Brown", "Linda Garcia", "David Miller")

STYLES = {
    "name": (
        "患者姓名：{x}，性别女，年龄45岁，主诉咳嗽三天。",
        "姓名:{x} 年龄:32 主诉:头晕",
        "医生您好，我叫{x}，今年29岁，胃疼一周了。",
        "我叫{x}今年五十岁了血压有点高",
        "患者{x}，男，61岁，因胸闷2天入院。",
        "病人：{x}，36岁，既往体健。",
        "你好，{x}医生，我想问一下孩子发烧的事。",
        "谢谢{x}大夫，药已经吃完了。",
        "您好{x}主任，上次开的药要继续吃吗？",
        "{x}女士您好，您的化验单已经出来了。",
        "我是{x}医生，如果您有问题可以继续提问。",
    ),
    "phone": (
        "我的电话是{x}，麻烦您回电。",
        "联系电话：{x}",
        "请打我手机{x}，谢谢医生",
        "可以加我，{x}，随时联系",
    ),
    "id_number": (
        "身份证号：{x}，帮我查一下预约。",
        "我的身份证是{x}，看看能不能报销",
    ),
    "record": (
        "住院号：{x}，出院已经一周。",
        "门诊号{x}，上周来看过。",
        "医保卡号：{x}",
        "病历号: {x}，请查看检查结果。",
    ),
    "address": (
        "家庭住址：{x}。",
        "我家住{x}，附近没有大医院。",
        "药请寄到{x}，谢谢",
    ),
    "account": (
        "我的微信号是{x}，方便加一下吗",
        "QQ：{x}，发照片给您看",
        "邮箱{x}，请把报告发给我",
    ),
}
ENGLISH_STYLES = {
    "name": (
        "My name is {x} and I have had a cough for a week.",
        "Patient name: {x}, 45 years old, chest pain.",
        "Dr. {x} told me to take this twice a day.",
    ),
    "phone": ("You can call me at {x} after five.", "Phone: {x}"),
    "address": ("I live at {x}, close to the clinic.",),
    "account": ("Please send the report to {x}.",),
    "id_number": ("My social security number is {x}.",),
}
CLEAN = (
    "血压140/90mmHg，空腹血糖7.8mmol/L，心率86次/分。",
    "阿莫西林胶囊0.5g，每日3次，口服，连用7天。",
    "国药准字H20050011，批号20230115。",
    "血小板138*10^9/L，白细胞12.3*10^9/L，乙肝DNA 13800000000 IU/ml。",
    "患者高血压，男，病史10年。",
    "患者黄疸，女，3天。",
    "谢谢医生，我明白了。麻烦医生再看一下。",
    "2023年5月12日做的CT，报告编号不记得了。",
    "查体：体温38.5℃，呼吸20次/分，双肺呼吸音粗。",
    "主任医生说要复查，下周医生有空吗？",
    "白血病的患者，于医生处就诊后好转。",
    "我住在农村，离医院很远，平时在家休息。",
    "按照医生的建议，左右医生都看过了。",
    "HbA1c 6.5%, creatinine 1.2 mg/dL, BP 120/80, take 500 mg twice daily for 10 days.",
    "I am a nurse. The Parkinson disease of my father is worse.",
    "每次2片，一天三次，疗程14天，总量84片。",
    "我是一名患者，请问需要住院吗？",
    "走路一千米就喘，路上要休息三次。",
)


def chinese_name(draw):
    return draw.choice(SURNAMES) + "".join(draw.sample(GIVEN, draw.choice((1, 2, 2))))


def digits(draw, count):
    return "".join(draw.choice("0123456789") for _ in range(count))


def phone(draw):
    mobile = f"1{draw.choice('3456789')}{digits(draw, 9)}"
    return draw.choice(
        (
            mobile,
            f"{mobile[:3]}-{mobile[3:7]}-{mobile[7:]}",
            f"{mobile[:3]} {mobile[3:7]} {mobile[7:]}",
            f"+86 {mobile}",
            f"0{draw.choice(('10', '21', '755', '531'))}-{draw.choice('2345678')}{digits(draw, 7)}",
            "".join(chr(ord(one) + 0xFEE0) for one in mobile),
        )
    )


def id_number(draw):
    born = f"{draw.randrange(1940, 2020)}{draw.randrange(1, 13):02d}{draw.randrange(1, 29):02d}"
    return f"{draw.randrange(110101, 659001)}{born}{digits(draw, 3)}{draw.choice('0123456789X')}"


def address(draw):
    city = draw.choice(("四川省成都市", "杭州市", "河北省石家庄市", "苏州市", "湖南省长沙市"))
    county = draw.choice(("武侯区", "余杭区", "新华区", "昆山县", "岳麓区"))
    street = draw.choice(("人民路", "建设大道", "解放街", "文化路", "幸福巷"))
    door = draw.choice((f"{draw.randrange(1, 300)}号", f"{draw.randrange(1, 300)}号3栋502室"))
    return city + county + street + door


def account(draw, style):
    if "邮箱" in style or "report" in style:
        return f"user{digits(draw, 4)}@example.com"
    return digits(draw, 9) if "QQ" in style else f"wx_{digits(draw, 7)}"


def value(draw, kind, style, *, english):
    if kind == "name":
        if english:
            name = draw.choice(ENGLISH_NAMES)
            return name.split()[1] if style.startswith("Dr.") else name
        surname_only = any(title in style for title in ("医生，我想", "大夫", "主任"))
        return (
            chinese_name(draw)[:1] if surname_only and draw.random() < 0.6 else chinese_name(draw)
        )
    if kind == "phone" and english:
        return f"({draw.randrange(200, 999)}) {digits(draw, 3)}-{digits(draw, 4)}"
    if kind == "address" and english:
        return f"{draw.randrange(1, 999)} {draw.choice(('Oak', 'Maple', 'Baker'))} Street"
    if kind == "id_number" and english:
        return f"{digits(draw, 3)}-{digits(draw, 2)}-{digits(draw, 4)}"
    makers = {"phone": phone, "id_number": id_number, "address": address}
    if kind == "record":
        return draw.choice(("", "Z", "M")) + digits(draw, draw.choice((6, 8, 10)))
    return makers[kind](draw) if kind in makers else account(draw, style)


def made_up(count, *, seed=0):
    """Texts, each with the kind and the piece of personal data in it, or None and None."""
    draw = random.Random(seed)
    for _ in range(count):
        if draw.random() < 0.3:
            yield draw.choice(CLEAN), None, None
            continue
        english = draw.random() < 0.2
        styles = ENGLISH_STYLES if english else STYLES
        kind = draw.choice(sorted(styles))
        style = draw.choice(styles[kind])
        piece = value(draw, kind, style, english=english)
        yield style.format(x=piece), "id_number" if kind == "record" else kind, piece
