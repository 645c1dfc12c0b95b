"""The tables of every script's settings in README.md and README_EN.md, made from the scripts.

    python tests/config_tables.py           # write them, between <!-- CONFIG --> and <!-- /CONFIG -->

A row is an option, its default and the comment that stands beside it in CONFIG; CHINESE holds each comment once more,
so that a comment that is new or reworded is a KeyError until it is translated. test_readme.py compares.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alpaca.common.option_help import _source
from alpaca.common.options import _flatten, _text
from alpaca.corpora.labels import DEFAULT_LABELS
from dataset import INSTRUCT, QUERY_PREFIX

MODEL_HUB = "model_hub/convert_llama_weights_to_hf.py", "model_hub/merge_llama_with_chinese_lora.py"
SCRIPTS = ("train_trainer.py", "process.py", "test.py", "predict.py", "chat_ner.py", "web_ner.py", *MODEL_HUB)
HEADS = {"README.md": ("参数", "默认值", "说明"), "README_EN.md": ("option", "default", "meaning")}
MARKED = re.compile(r"<!-- CONFIG -->\n.*<!-- /CONFIG -->\n", re.S)

CHINESE = {
    # train_trainer.py, train_deepspeed.py
    "folder under data/ and under checkpoint/": "数据集名称，data/ 和 checkpoint/ 下的文件夹",
    "base model; for 7B ./model_hub/chinese-alpaca-7b": "基座模型，7B 是 ./model_hub/chinese-alpaca-7b",
    "None: data/<data_name>/instruct_data/train.txt": "None：data/<data_name>/instruct_data/train.txt",
    "None: data/<data_name>/instruct_data/dev.txt": "None：data/<data_name>/instruct_data/dev.txt",
    "None: checkpoint/<data_name>/train_trainer": "None：checkpoint/<data_name>/train_trainer",
    "name of the instruction's column": "指令的列名",
    "name of the input's column": "输入的列名",
    "name of the answer's column": "答案的列名",
    "tokens of prompt + answer; longer examples are dropped and counted, never cut": (
        "提示词 + 答案的 token 数；更长的样本丢弃并计数，从不截断"
    ),
    "drop | error: what to do with longer examples": "drop | error：更长的样本怎么办",
    "rank": "秩",
    "scale; the update is multiplied by alpha / r": "更新量乘以 alpha / r",
    "on the LoRA branch": "LoRA 支路上的 dropout",
    "where": "加在哪些层",
    "prefix (what examples share is computed once) | plain (end to end) | none (padded)": (
        "prefix（样本之间相同的前缀只算一次）| plain（首尾相接）| none（补齐）；结果相同"
    ),
    "examples a device and micro-batch": "每张卡、每个 micro-batch 的样本数",
    "micro-batches an optimizer step": "累积几个 micro-batch 更新一次",
    "passes over the data": "训练几遍",
    "stop after so many optimizer steps; -1: by epochs": "最多更新几步，-1：由 epoch 决定",
    "share of the steps with rising learning rate; then it falls linearly to 0": "学习率上升的步数占比，之后线性降到 0",
    "recompute activations instead of keeping them: less memory, slower": "反向时重新计算激活值，省显存，更慢",
    "auto | True | False: compile the layers and replay them as CUDA graphs, on a CUDA GPU": (
        "auto | True | False：在 CUDA 上编译各层，按 CUDA graph 重放"
    ),
    "of LoRA's start and the data order": "LoRA 初值和数据顺序",
    "auto | bf16 | fp16 | fp32; auto: what the device computes best": "auto | bf16 | fp16 | fp32；auto：看设备",
    "a log line every so many steps": "多少步打印一次",
    "dev loss every so many steps and at the end; -1: never": "多少步算一次验证集 loss，最后也算；-1：不算",
    "then also answer the first N dev examples and log their F1, as test.py --max_examples=N; 0: none": (
        "那时还回答验证集前 N 条，算 F1，与 test.py --max_examples=N 相同；0：不算"
    ),
    "last | f1 | loss: adapter_model/ is the newest state, or the one with the best F1 or dev loss": (
        "last | f1 | loss：adapter_model/ 是最新的，还是 F1 或 loss 最好的"
    ),
    "adapter and resumable checkpoint every so many steps and at the end; -1: only at the end": (
        "多少步保存一次 LoRA 和可续训的 checkpoint，最后也保存；-1：只在最后"
    ),
    "resumable checkpoints to keep; 0: all": "保留几个可续训的 checkpoint，0：全部",
    "False | True (newest complete checkpoint) | a step | a path": "False | True（最新的完整 checkpoint）| 步数 | 路径",
    "also write the figures of train_log.jsonl for TensorBoard, in <save_dir>/tensorboard": (
        "把 train_log.jsonl 的数字也写给 TensorBoard，在 <save_dir>/tensorboard"
    ),
    "False: adapter_model.bin instead of adapter_model.safetensors": "False：保存 adapter_model.bin 而不是 .safetensors",
    "None: data/<data_name>/deepspeed.json if there is one, else deepspeed.json": (
        "None：有 data/<data_name>/deepspeed.json 就用它，否则 deepspeed.json"
    ),
    "the deepspeed launcher passes it": "deepspeed 启动时传入，不用管",
    # process.py
    "folder under data/": "数据集名称，data/ 下的文件夹",
    "raw training data; None: data/<data_name>/ori_data/train.txt": "原始训练数据；None：data/<data_name>/ori_data/train.txt",
    "raw dev data; None: data/<data_name>/ori_data/dev.txt if there is one": (
        "原始验证数据；None：data/<data_name>/ori_data/dev.txt，如果有"
    ),
    "sentences to take from train where there is no dev file": "没有验证数据时，从训练数据里分出多少句",
    "auto | jsonl | bio; auto: by the first line": "auto | jsonl | bio；auto：看第一行",
    "the instruction; {labels}: the names joined by 、, a typed \\n: a newline": "指令；{labels}：用、连接的类型名，\\n：换行",
    "query = query_prefix + text": "query = query_prefix + 文本",
    "tag:name; a name may not contain _": "标签:名称；名称里不能有 _",
    "keep sentences in train that dev holds too": "训练数据里保留与验证数据相同的句子",
    "of dev_size's draw": "dev_size 抽取用的种子",
    "write nothing, only check data/<data_name>/instruct_data/ as the trainers do": (
        "什么也不写，只像训练时那样检查 data/<data_name>/instruct_data/"
    ),
    "whose tokenizer the audit counts with": "检查时用谁的分词器计 token 数",
    "tokens of prompt + answer; the audit says how many rows are longer": "提示词 + 答案的 token 数；检查时报告更长的有几条",
    # test.py, predict.py
    "None: the base that the adapter was trained on": "None：训练 LoRA 时用的基座",
    "auto: the adapter of checkpoint/<data_name>/ written last | a folder | none: the base alone": (
        "auto：checkpoint/<data_name>/ 下最后写的 LoRA | 文件夹 | none：只有基座"
    ),
    "None: that of the base": "None：基座的分词器",
    "examples generated at once, fewer where memory is short": "同时生成几条，内存不够时自动减少",
    "ner: entities | exact: the share of answers equal to the character | none: write predictions alone": (
        "ner：实体 | exact：与标准答案一字不差的比例 | none：只写预测"
    ),
    "an answer is cut after so many tokens; counted and reported": "答案最多几个 token；被截断的会计数",
    "auto (with an adapter) | True | False: only lines that the text allows": (
        "auto（有 LoRA 时）| True | False：只能说原文允许的行"
    ),
    "auto | bf16 | fp16 | fp32": "auto | bf16 | fp16 | fp32",
    "only the first N examples; -1: all": "只测前 N 条；-1：全部",
    "folder under checkpoint/": "数据集名称，checkpoint/ 下的文件夹",
    "one text": "一段文本",
    "a file of texts: plain lines or JSON lines": "一个文件：一行一段文本，或一行一个 JSON",
    "write JSON lines there instead of printing": "不打印，写成 JSON lines",
    "go on behind the rows that --output_path holds already": "接着 --output_path 里已有的行往下做",
    "texts at once, fewer where memory is short": "同时预测几条，内存不够时自动减少",
    # chat_ner.py
    "of free chat; 0: always the likeliest token, so the same answer every time": (
        "闲聊的温度；0：总取最可能的 token，每次答案相同"
    ),
    "where temperature is above 0: draw from the likeliest tokens that have this probability together": (
        "温度大于 0 时：在概率加起来有这么多的、最可能的 token 里抽"
    ),
    "of what is drawn": "抽样的随机种子",
    "None: the base that the adapter was trained on; given alone: that model without an adapter": (
        "None：训练 LoRA 时用的基座；只给它：这个模型本身，不加 LoRA"
    ),
    "auto: the demo's adapter written last | a folder | none: the base alone": (
        "auto：演示数据最后写的 LoRA | 文件夹 | none：只有基座"
    ),
    "False: the model reads the input as typed": "False：不加提示词，输入是什么就是什么",
    "ask for input; with --data_file the file is answered instead": "等待输入；给了 --data_file 就回答文件里的",
    "inputs, one a line": "问题，一行一个",
    'answers to data_file, a JSON list of {"Input", "Output"}': 'data_file 的回答，{"Input", "Output"} 的 JSON 列表',
    "the GPU to use": "用哪张卡",
    "do not use a GPU": "不用 GPU",
    "an answer is cut after so many tokens": "答案最多几个 token",
    "auto | True | False: answer the adapter's instruction only with lines that the text allows": (
        "auto | True | False：对 LoRA 的指令，只能说原文允许的行"
    ),
    # web_ner.py
    "folder under checkpoint/: the adapter chosen at first": "checkpoint/ 下的文件夹：一开始选中的 LoRA",
    "another than this machine's own needs --auth": "不是本机的地址要同时给 --auth",
    "of the page's address": "网址里的端口",
    "user:password, asked for by the page": "用户名:密码，打开网页时要输入",
    "texts at once; larger: files are faster, and others wait longer for their turn": (
        "同时预测几条；大一些，文件做得快，别人等得久"
    ),
    # model_hub
    "the folder that holds <model_size>/ and, there or beside it, tokenizer.model": (
        "放 <model_size>/ 的文件夹；tokenizer.model 在其中或与它并排"
    ),
    "the name of the folder with the weights: tiny, 7B, 13B, …; tokenizer_only needs no weights": (
        "权重文件夹的名字：tiny、7B、13B 等；tokenizer_only 不需要权重"
    ),
    "the folder to write; None: ./<model_size>-hf": "写到哪个文件夹；None：./<model_size>-hf",
    "LLaMA-1: 2048, LLaMA-2: 4096; Meta's files do not tell": "LLaMA-1 是 2048，LLaMA-2 是 4096；Meta 的文件里没有",
    "the Hugging Face folder of the base, e.g. ./7B-hf": "hugging face 格式的基座，如 ./7B-hf",
    "the adapters' folders, joined by commas, in the order of their training: LLaMA's, Alpaca's": (
        "LoRA 的文件夹，用逗号连接，按训练的先后：先 LLaMA，后 Alpaca"
    ),
    "huggingface, or pth (Meta's layout)": "huggingface，或 pth（Meta 的格式）",
    "the folder to write": "写到哪个文件夹",
    "consolidated files of pth; -1: as many as Meta's model of that size has (13B: 2, 33B: 4, 65B: 8)": (
        "pth 写成几个文件；-1：与 Meta 的同样大小的模型一样（13B 2 个，33B 4 个，65B 8 个）"
    ),
    "run base + adapters in PEFT and the merged model on a few prompts and compare; loads each in turn": (
        "用几个提示比较 PEFT 里的基座加 LoRA 与合并后的模型；两个先后加载"
    ),
    "accepted and unused: weights are read from their files as they are needed": "可以写，但不用：权重用到时才从文件里读",
}


def config_of(script):
    """CONFIG as it stands in the source: importing train_* would take seconds, `import test` another module."""
    for node in ast.parse((ROOT / script).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "CONFIG":
            names = {"INSTRUCT": INSTRUCT, "QUERY_PREFIX": QUERY_PREFIX, "DEFAULT_LABELS": DEFAULT_LABELS}
            return eval(compile(ast.Expression(node.value), script, "eval"), names)  # noqa: S307, our own source


def tables(readme):
    """What a README is to hold from mark to mark: a folded table for each script."""
    parts = []
    for script in SCRIPTS:
        config, (_, comments) = config_of(script), _source(ROOT / script)
        rows = [HEADS[readme], ("---",) * 3]
        for name, path in _flatten(config).items():
            default = config
            for key in path:
                default = default[key]
            comment = comments[path]
            if readme == "README.md":
                comment = CHINESE[comment]
            comment = comment.replace("train_trainer", "<script>")  # one table for both trainers
            comment = re.sub(r"(?a)[\w./<>-]*<\w+>[\w./<>-]*", r"`\g<0>`", comment)  # else HTML to Markdown
            cells = f"`--{name}`", f"`{_text(default)}`", comment
            rows.append(tuple(cell.replace("|", r"\|") for cell in cells))
        title = "train_trainer.py, train_deepspeed.py" if script == "train_trainer.py" else script
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        parts.append(f"<details><summary>{title}</summary>\n\n{table}\n\n</details>\n")
    return "<!-- CONFIG -->\n" + "\n".join(parts) + "<!-- /CONFIG -->\n"


def shown(readme):
    """What stands there now."""
    return MARKED.search((ROOT / readme).read_text(encoding="utf-8"))[0]


if __name__ == "__main__":
    for readme in HEADS:
        text = (ROOT / readme).read_text(encoding="utf-8")
        (ROOT / readme).write_text(text.replace(shown(readme), tables(readme)), encoding="utf-8")
