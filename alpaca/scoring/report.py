"""metrics and rows of predictions.jsonl -> report.html: one file to look at in a browser, without network or scripts."""

import math
from collections import Counter
from html import escape

from alpaca.scoring.errors import KINDS, confusion, errors, precision_recall, suspects
from alpaca.scoring.metrics import PROBLEMS, VIEWS

SHOWN = 200  # errors of one kind, and suspects, that are listed; the rest is only counted

PAGE = """\
<!DOCTYPE html>
<html lang="zh">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; line-height: 1.6;
       font-family: system-ui, "Noto Sans CJK SC", "Microsoft YaHei", "PingFang SC", sans-serif }}
h1 {{ font-size: 1.5rem }}
h2 {{ font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc }}
p.note, .why {{ color: #666; font-size: .9rem }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: .2rem .8rem; text-align: right; font-weight: normal }}
th {{ color: #666 }}
tr.total td {{ border-top: 1px solid #888; font-weight: bold }}
td:first-child, th:first-child {{ text-align: left }}
td.gap, th.gap {{ border-left: 2px solid #ddd }}
.side {{ display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: center }}
th[colspan] {{ text-align: center }}
details {{ margin: .4rem 0 }}
summary {{ cursor: pointer; padding: .2rem .4rem; background: #f3f3f3 }}
li {{ margin: .5rem 0; white-space: pre-wrap; overflow-wrap: anywhere }}
.gold {{ border-bottom: 3px solid #2a9d4a }}
.predicted {{ background: #ffd0c8 }}
svg text {{ font-size: 12px; fill: #666 }}
</style>
<h1>{title}</h1>
<p class="note">{subtitle}</p>
{sections}
</html>
"""


def write_report(path, rows, metrics, title, subtitle):
    """Write report.html. rows: with gold; metrics: what metrics.score says of them."""
    sections = [
        ("得分", scores_table(metrics)),
        ("置信度", curve(rows)),
        ("类型混淆", confusion_table(rows, [name for name in metrics["span"] if name != "micro"])),
        ("错误", error_lists(rows)),
        ("可能标错的句子", suspect_list(rows)),
    ]
    body = "\n".join(f"<h2>{name}</h2>\n{content}" for name, content in sections)
    page = PAGE.format(title=escape(title), subtitle=escape(subtitle), sections=body)
    path.write_text(page, encoding="utf-8")


def scores_table(metrics):
    heads = ["P", "R", "F1", "支持数"]
    lines = [
        f"<tr><th></th>{''.join(f'<th class=gap colspan=4>{title}</th>' for title in VIEWS.values())}</tr>",
        f"<tr><th>类型</th>{''.join(_cells('th', heads) for _ in VIEWS)}</tr>",
    ]
    for name in [*(name for name in metrics["string"] if name != "micro"), "micro"]:
        cells = ""
        for view in VIEWS:
            rates = metrics[view][name]
            values = [f"{100 * rates[key]:.2f}" for key in ("precision", "recall", "f1")]
            cells += _cells("td", [*values, rates["support"]])
        kind = ' class="total"' if name == "micro" else ""
        lines.append(f"<tr{kind}><td>{escape('总计' if name == 'micro' else name)}</td>{cells}</tr>")
    bounds = [
        f"{title} {100 * low:.2f}–{100 * high:.2f}"
        for title, (low, high) in ((title, metrics[view]["micro"]["f1_interval"]) for view, title in VIEWS.items())
    ]
    counts = [f"{title} {metrics[name]}" for name, title in PROBLEMS.items()]
    return (
        f"<table>{''.join(lines)}</table>\n<p class=note>按实体：每句话里（实体，类型）的集合；按位置：每一次出现，"
        f"起止和类型全对才算对。总计 F1 的 95% 区间：{'，'.join(bounds)}。<br>"
        f"句子 {metrics['examples']}，{'，'.join(counts)}。</p>"
    )


def _cells(tag, values):
    return "".join(f"<{tag}{'' if i else ' class=gap'}>{escape(str(value))}</{tag}>" for i, value in enumerate(values))


def curve(rows):
    """Precision over recall, both 0 to 1, as a picture; thresholds stand beside some of its points."""
    points = precision_recall(rows)
    if not points:
        return "<p class=note>没有预测出实体。</p>"
    size, edge = 320, 40

    def place(precision, recall):
        return f"{edge + size * recall:.1f},{10 + size * (1 - precision):.1f}"

    lines = []
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1):
        x, y = edge + size * tick, 10 + size * (1 - tick)
        lines.append(f'<path d="M{x} 10V{10 + size}M{edge} {y}H{edge + size}" stroke="#e4e4e4"/>')
        lines.append(f'<text x="{x}" y="{size + 26}" text-anchor="middle">{tick:g}</text>')
        lines.append(f'<text x="{edge - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    path = " ".join(place(precision, recall) for _, precision, recall in points)
    lines.append(f'<polyline points="{path}" fill="none" stroke="#2667c9" stroke-width="2"/>')
    table = []
    for share in (0.25, 0.5, 0.75, 0.9, 1):
        threshold, precision, recall = points[math.ceil(share * len(points)) - 1]
        x, y = place(precision, recall).split(",")
        lines.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="#2667c9"/>')
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        values = [
            f"{threshold:.4f}",
            f"{math.exp(threshold):.2%}",
            *(f"{100 * v:.2f}" for v in (precision, recall, f1)),
        ]
        table.append(f"<tr>{''.join(f'<td>{value}</td>' for value in values)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("置信度不低于", "即每个 token", "P", "R", "F1"))
    return (
        f'<div class=side><svg width="{size + 60}" height="{size + 50}">{"".join(lines)}'
        f'<text x="{edge + size / 2}" y="{size + 44}" text-anchor="middle">召回率 R</text>'
        f'<text x="12" y="{10 + size / 2}" transform="rotate(-90 12 {10 + size / 2})" text-anchor="middle">精确率 P</text>'
        f"</svg>\n<table><tr>{head}</tr>{''.join(table)}</table></div>\n"
        "<p class=note>只留下置信度不低于某个值的实体（按实体计分）。置信度是实体那一行各 token 对数概率的平均，0 最高；"
        "圆点从左到右对应表中各行。</p>"
    )


def confusion_table(rows, types):
    counts = confusion(rows)
    types = [*types, *sorted({kind for pair in counts for kind in pair if kind} - {*types})]
    lines = [f"<tr><th>标准 \\ 预测</th>{''.join(f'<th>{escape(kind)}</th>' for kind in types)}<th>（漏掉）</th></tr>"]
    for gold in [*types, None]:
        total = sum(counts[gold, kind] for kind in [*types, None]) or 1
        cells = ""
        for kind in [*types, None]:
            count = counts[gold, kind]
            strength = 0.6 * count / total if gold else 0
            color = "42,157,74" if gold == kind else "214,69,48"
            shown = "" if gold is kind is None else count
            cells += f'<td style="background:rgba({color},{strength:.2f})">{shown}</td>'
        lines.append(f"<tr><td>{escape(gold or '（多报）')}</td>{cells}</tr>")
    note = "起止相同的算在一起；边界错的，标准一边算漏掉，预测一边算多报。颜色按行的比例。"
    return f"<table>{''.join(lines)}</table>\n<p class=note>{note}</p>"


def marked(text, gold, predicted):
    """The text as HTML; gold, predicted: the spans ((begin, end, …)) to underline and to shade."""
    edges = sorted({0, len(text), *(edge for span in (*gold, *predicted) for edge in span[:2])})
    parts = []
    for begin, end in zip(edges, edges[1:], strict=False):
        inside = [
            name
            for name, spans in (("gold", gold), ("predicted", predicted))
            if any(span[0] <= begin and end <= span[1] for span in spans)
        ]
        part = escape(text[begin:end])
        parts.append(f'<span class="{" ".join(inside)}">{part}</span>' if inside else part)
    return "".join(parts)


def error_lists(rows):
    found = errors(rows)
    counts = Counter(error.kind for error in found)
    parts = [
        '<p class=note><span class="gold">绿线</span>：标准答案；<span class="predicted">红底</span>：预测。'
        "每处错误只归一类。</p>"
    ]
    for kind, title in KINDS.items():
        items = "".join(f"<li>{_error(error, rows[error.row])}</li>" for error in _first(found, kind))
        more = f"<p class=note>另有 {counts[kind] - SHOWN} 处没有列出。</p>" if counts[kind] > SHOWN else ""
        parts.append(f"<details><summary>{title} {counts[kind]}</summary><ol>{items}</ol>{more}</details>")
    return "\n".join(parts)


def _first(found, kind):
    return [error for error in found if error.kind == kind][:SHOWN]


def _error(error, row):
    if error.kind in ("malformed", "not_in_text"):
        return f'{escape(row["text"])}<br><span class="why">预测 <code>{escape(error.predicted)}</code></span>'
    gold, predicted = ([span] if span else [] for span in (error.gold, error.predicted))
    why = [f"标准 {_name(row, span)}" for span in gold]
    why += [f"预测 {_name(row, span)}，置信度 {_confidence(row, span):.4f}" for span in predicted]
    return f'{marked(row["text"], gold, predicted)}<br><span class="why">{"；".join(why)}</span>'


def _name(row, span):
    return escape(f"{row['text'][span[0] : span[1]]}（{span[2]}）")


def _confidence(row, span):
    entity = row["text"][span[0] : span[1]]
    return next(e["confidence"] for e in row["entities"] if (e["entity"], e["type"]) == (entity, span[2]))


def suspect_list(rows):
    found = suspects(rows)
    items = []
    for i in found[:SHOWN]:
        row = rows[i]
        spans = [
            [(*span, entity["type"]) for entity in row[key] for span in entity["spans"]] for key in ("gold", "entities")
        ]
        answers = "；".join(
            f"{title} {escape('、'.join(_pairs(row[key])) or '没有')}"
            for title, key in (("标准", "gold"), ("预测", "entities"))
        )
        chance = f"整条回答的概率 {math.exp(row['log_probability']):.1%}"
        items.append(f'<li>{marked(row["text"], *spans)}<br><span class="why">{answers}；{chance}</span></li>')
    more = f"，这里是前 {SHOWN} 句" if len(found) > SHOWN else ""
    note = f"预测与标准不同的 {len(found)} 句{more}，模型最有把握的在前：排在前面的，值得看看是不是标准答案错了。"
    return f"<p class=note>{note}</p><details><summary>{len(found)} 句</summary><ol>{''.join(items)}</ol></details>"


def _pairs(entities):
    return [f"{entity['entity']}_{entity['type']}" for entity in entities]
