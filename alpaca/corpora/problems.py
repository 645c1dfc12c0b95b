"""What is wrong with a corpus, counted by kind and shown with file and line."""

import sys
from collections import Counter

from tqdm import tqdm

SHOWN = 20  # problems of one kind that are printed one by one; the rest is only counted
PROBLEMS = {
    "mismatch": "与文本不符的实体（已从答案去掉）",
    "newline": "含换行的实体（已从答案去掉）",
    "empty": "空句（已跳过）",
    "repaired": "不合规的标签（已按新实体的开头处理）",
}


class Problems(Counter):
    """Counts by kind (a key of PROBLEMS); the first few of each are printed with file and line."""

    def add(self, kind, path, number, detail):
        self[kind] += 1
        if self[kind] <= SHOWN:
            tqdm.write(f"{path}:{number}: {PROBLEMS[kind]}：{detail}", file=sys.stderr)
        if self[kind] == SHOWN + 1:
            tqdm.write(f"{path}: 更多{PROBLEMS[kind]}，只在最后计数", file=sys.stderr)
