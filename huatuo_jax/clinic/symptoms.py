"""The symptoms of this world: how a patient puts them, and which of them cannot wait."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Symptom:
    """Something that a patient has or has not.

    Attributes:
        name: as the table of diseases calls it; the first of `words`.
        words: all that it is called; each can follow 有 and 没有.
        opens: a patient may come with it alone; one that only says more about another ("饭后疼")
            cannot open a consultation.
        red_flag: who has it needs emergency care, whatever the disease.
    """

    words: tuple[str, ...]
    opens: bool = True
    red_flag: bool = False

    @property
    def name(self) -> str:
        """The first of its words."""
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
