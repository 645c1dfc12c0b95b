"""What is wrong with a corpus, counted by kind and shown with file and line."""

import sys
from collections import Counter

from tqdm import tqdm

SHOWN = 3  # problems of one kind that are printed one by one; the rest is only counted
LOSSES = {
    "mismatch": "与文本不符的实体（已从答案去掉）",
    "newline": "含换行的实体（已从答案去掉）",
    "empty": "空句（已跳过）",
    "repaired": "不合规的标签（已按新实体的开头处理）",
}
REMARKS = {
    "left_out": "不要的类型的实体（--labels=标签:）",
    "heading": "注释和 -DOCSTART- 行（已跳过）",
    "columns": "多于两列（第一列是字，最后一列是标签，其余不用）",
    "numbered": "字后面的词内序号（已去掉）",
    "discontinuous": "不连续的实体（已从答案去掉）",
    "region": "没有标签或不是文本区间的标注（不读）",
    "relation": "关系和事件（不读）",
    "attribute": "属性和备注（不读）",
    "choice": "整句的分类、评分和文字（不读）",
    "annotators": "标注不止一份的句子（只取一份）",
    "skipped": "跳过或拒绝的任务（不读）",
    "unannotated": "还没有标注的任务（不读）",
    "preannotated": "只有预标注的任务（当作标注读）",
    "utf16": "下标按 UTF-16 数的实体（已换算）",
    "crlf": "Windows 换行的文档（已换算）",
    "blank": "英文词之间丢失的空格（已补上）",
    "lost_token": "没有字的行（当作空格）",
    "blank_entity": "只有空白的实体（已从答案去掉）",
    "invisible": "含零宽或控制字符的句子（照原样保留）",
}


class Problems(Counter):
    """Counts by kind (a key of LOSSES or REMARKS); the first few of each are printed with file and line.

    unknown_types: {entity type without a name: where it stands first}, which process.py refuses when all is read.
    """

    def __init__(self):
        super().__init__()
        self.unknown_types = {}
        self.used_types = set()

    def add(self, kind, path, number, detail):
        self[kind] += 1
        title = (LOSSES | REMARKS)[kind]
        if self[kind] <= SHOWN:
            tqdm.write(f"{path}:{number}: {title}：{detail}", file=sys.stderr)
        if self[kind] == SHOWN + 1:
            tqdm.write(f"{path}: 更多{title}，只在最后计数", file=sys.stderr)
