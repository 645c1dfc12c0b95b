"""Extract the entities of given texts.

    python predict.py
    python predict.py --text=王小明昨天从北京去了上海。
    python predict.py --input_path=texts.txt --output_path=entities.jsonl

Reads plain text, one a line, or JSON lines with `text` (or `query` and `instruct`) and perhaps `answer`; without either
option, three sentences of our own. Prints the answers, or writes them to --output_path as JSON lines with offsets.
"""

import json

from config_utils import UserError, run_script
from dataset import INSTRUCT, QUERY_PREFIX, optional_columns, read_jsonl, read_lines
from generation import predict_rows
from modeling import check_generation, find_adapter, load_for_inference, open_output, say

CONFIG = {
    "data_name": "demo",  # folder under checkpoint/
    "base_model": None,  # None: the base that the adapter was trained on
    "lora_model": "auto",  # auto: the adapter of checkpoint/<data_name>/ written last | a folder | none: the base alone
    "tokenizer_path": None,  # None: that of the base
    "text": None,  # one text
    "input_path": None,  # a file of texts: plain lines or JSON lines
    "output_path": None,  # write JSON lines there instead of printing
    "batch_size": 64,  # texts at once
    "max_new_tokens": 512,  # an answer is cut after so many tokens; counted and reported
    "precision": "auto",  # auto | bf16 | fp16 | fp32
}
SAMPLES = [
    {"text": "中美两国的专家上周在杭州参观了临江大学，校长许文舟主持了座谈。",
     "answer": "中_地名\n美_地名\n杭州_地名\n临江大学_机构名\n许文舟_人名"},
    {"text": "去年冬天，县图书馆新添了三千多册少儿读物，来借书的孩子比往年多了一倍。", "answer": "没有"},
    {"text": "记者苏晓岚从云南省气象局了解到，昆明明后两天有小雨。",
     "answer": "苏晓岚_人名\n云南省气象局_机构名\n昆明_地名"},
]  # fmt: skip


def read_texts(args):
    """The texts asked for, as a list of dicts with `text` or `query`, and `instruct` and `answer` where given."""
    if args.text is not None and args.input_path:
        raise UserError("--text and --input_path: give one of the two")
    if args.text is not None:
        if not args.text.strip():
            raise UserError("--text: is empty; give a sentence")
        return [{"text": args.text}]
    if not args.input_path:
        return SAMPLES
    first = next((line for _, line in read_lines(args.input_path) if line.strip()), "")
    if not first.lstrip().startswith("{"):
        return [{"text": line} for _, line in read_lines(args.input_path) if line.strip()]
    records = []
    for number, record in read_jsonl(args.input_path):
        for key in ("query", "instruct", "answer"):
            if not isinstance(record.get(key), str | None):
                raise UserError(f"{args.input_path}:{number}: `{key}` must be a string, got {record[key]!r}")
        record |= optional_columns(args.input_path, number, record, record.get("query") or "")
        if not record["text"] and not record.get("query"):
            raise UserError(f"{args.input_path}:{number}: needs a `text` or a `query`")
        records.append(record)
    return records


def to_example(record, instruct, query_prefix):
    """A record of `read_texts` in the shape of dataset.read_examples."""
    return {
        "instruct": record.get("instruct") or instruct,
        "query": record.get("query") or query_prefix + record["text"],
        "answer": record.get("answer"),
        "text": record["text"],
        "entities": record.get("entities"),
    }


def main(args):
    check_generation(args)
    texts = read_texts(args)
    adapter, train_args, facts = find_adapter(args.data_name, args.lora_model)
    instruct = facts["instructs"][0] if facts else INSTRUCT.replace("{labels}", "人名、地名、机构名")
    examples = [to_example(record, instruct, facts.get("query_prefix", QUERY_PREFIX)) for record in texts]
    output = open_output(args.output_path) if args.output_path else None
    model, tokenizer = load_for_inference(
        adapter, train_args, facts, args.base_model, args.tokenizer_path, args.precision
    )
    rows, cut = predict_rows(model, tokenizer, examples, facts.get("labels"), args.max_new_tokens, args.batch_size)

    for number, row in enumerate(rows, 1):
        if row["prediction"] is None:
            say(f"第 {number} 条超过模型的长度上限，没有回答: {row['text'][:30]}…")
    if cut:
        say(f"{cut} 条回答达到 max_new_tokens={args.max_new_tokens} 或模型的长度上限，被截断")
    if output:
        with output:
            output.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        say(f"{len(rows)} 条结果已写到 {args.output_path}")
        return
    print("=" * 100)
    for example, row in zip(examples, rows, strict=True):
        shown = (example["instruct"] + example["query"]).replace("\n", "\\n")
        print(f'文本 >>>  "{shown}"')
        print(f"预测 >>>  {row['prediction'] or ''}", end="\n\n")
        if row["answer"] is not None:
            print(f"真实 >>>  {row['answer']}")


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)
