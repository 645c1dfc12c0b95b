"""Numbers, dates and sums of money as newspapers write them: in Chinese, full-width or plain digits.

The functions that take a TextMaker draw from its random numbers. `before` and `after` are the words on both sides of
the slot.
"""

CHINESE_DIGITS = "零一二三四五六七八九"
FULL_WIDTH = str.maketrans("0123456789.", "０１２３４５６７８９．")
# {数} takes its size from what is counted: (start of the words that follow, smallest, largest).
NUMBER_RANGES = [
    (("名矿工", "人死亡", "人受伤", "人跳楼"), 2, 60),
    (("岁高龄",), 80, 99),
    (("岁的小将",), 13, 19),
    (("岁",), 20, 95),
    (("比", "球", "：", ":"), 0, 9),
    (("月", "点", "个月", "时"), 1, 12),
    (("日", "号"), 1, 30),
    (("级",), 3, 8),
    (("度", "摄氏度", "℃"), 1, 39),
    (("秒", "分钟", "分"), 2, 59),
    (("成",), 1, 9),
    (("席", "票"), 3, 300),
    (tuple("年 天 小时 届 次 章 起 家 头 层 楼 岁 周 轮 期 条 桌 部 座 局 号 节 页 倍 辈 代 里".split()), 2, 60),
    (tuple("亩 米 棵 吨 公里 公斤 平方米 人 名 件 户 册 斤".split()), 2, 3000),
]
# {日期} takes a loose form (昨天, 去年) only where it opens a clause that is not about the future.
CLAUSE_START = ("", "，", "。", "；", "“", "：", "、")
DAYTIME = (*"上午 下午 凌晨 晚 早 中午 傍晚 深夜 夜 电 消息".split(), "　")
FUTURE = ("将", "前", "起", "之前", "以前", "开始", "截止", "交", "到", "报")
# Words before a sum that no single person pays.
LARGE_SUMS = "额 利润 收入 投资 亏损 资金 赔款 贷款余额 以 捐资 索赔 费用 财政".split()


def chinese_number(n):
    """0 to 999 in Chinese: 15 -> 十五, 203 -> 二百零三."""
    if n < 10:
        return CHINESE_DIGITS[n]
    if n < 100:
        tens = "" if n < 20 else CHINESE_DIGITS[n // 10]
        return tens + "十" + (CHINESE_DIGITS[n % 10] if n % 10 else "")
    rest = n % 100
    tail = ("零" if rest < 10 else "一" if rest < 20 else "") + chinese_number(rest) if rest else ""
    return CHINESE_DIGITS[n // 100] + "百" + tail


def number(maker, smallest, largest):
    """A number in one of the three ways of writing; small numbers are the more frequent ones."""
    n = smallest + int((largest - smallest + 1) * maker.random.random() ** 3)
    style = maker.random.random()
    if style < 0.35 and n < 1000:
        return chinese_number(n)
    return str(n).translate(FULL_WIDTH) if style < 0.5 else str(n)


def counted(maker, before, after):
    """What {数} stands for: a number of a size that suits the words around it."""
    if before.endswith(("比", "：", ":")) and not after.startswith(("岁", "人", "年")):  # a score, 三比一
        return number(maker, 0, 9)
    if before.endswith("第"):
        return number(maker, 1, 30)
    ranges = ((low, high) for starts, low, high in NUMBER_RANGES if after.startswith(starts))
    written = number(maker, *next(ranges, (2, 3000)))
    if written == "二" and not before.endswith("第") and not after.startswith(("月", "比", "号", "日", "楼", "层")):
        return "两"
    return written


def share(maker):
    """What {比例} stands for: 20%, 百分之二十, 三成."""
    written = number(maker, 2, 90)
    if written.isascii():
        return written + maker.random.choice(["%", "%", "．5%", ".5%"][: 4 if len(written) < 3 else 2])
    return f"百分之{written}" if maker.chance(0.7) else f"{chinese_number(maker.random.randint(2, 9))}成"


def money(maker, before):
    """What {金额} stands for: a sum with its unit."""
    written = number(maker, 2, 900)
    written = "两" if written == "二" else written
    large = any(word in before for word in LARGE_SUMS)
    return written + maker.choice(
        ["万元", "亿元", "万美元", "亿美元"] if large else ["元", "元", "万元", "多元", "万元"]
    )


def year(maker):
    """What {年} stands for, from 1900 to 2023, without the character 年."""
    written = str(maker.random.randint(1949, 2023) if maker.chance(0.85) else maker.random.randint(1900, 1948))
    style = maker.random.random()
    if style < 0.2:
        return "".join("〇一二三四五六七八九"[int(digit)] for digit in written)
    return written.translate(FULL_WIDTH) if style < 0.4 else written


def day(maker):
    """Month and day, both in one way of writing."""
    month, day = maker.random.randint(1, 12), maker.random.randint(1, 28)
    if maker.chance(0.3):
        return f"{chinese_number(month)}月{chinese_number(day)}日"
    written = f"{month}月{day}日"
    return written.translate(FULL_WIDTH) if maker.chance(0.3) else written


def date(maker, before, after):
    """What {日期} stands for: a day, a month or a loose form (昨天)."""
    if before.endswith("年"):
        return day(maker)
    if before[-1:] in CLAUSE_START and not after.startswith(FUTURE) and maker.chance(0.5):
        return maker.random.choice(
            "昨天 今天上午 今天下午 去年 前天 上周 本月初 日前 近日 昨晚 上个月 去年冬天 今年春天 上周五 今年夏天".split()
        )
    if after.startswith(DAYTIME):
        return day(maker)
    style, month = maker.random.random(), maker.random.randint(1, 12)
    if style < 0.5:
        return day(maker)
    if style < 0.7:
        return f"今年{month}月" if maker.chance(0.5) else f"{chinese_number(month)}月"
    if style < 0.8:
        return f"星期{maker.choice('一二三四五六日')}"
    return f"{maker.random.randint(1985, 2023)}年{month}月" + (
        f"{maker.random.randint(1, 28)}日" if style < 0.9 else ""
    )
