"""docs/zh/options.md and docs/en/options.md: every command's options, made from the commands.

    python tools/config_tables.py           # write both pages

A row is an option, its default and the comment that stands beside it in CONFIG. CHINESE holds each comment once more,
so that a comment that is new or reworded is a KeyError until it is translated. tests/test_readme.py compares.
"""

import ast
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alpaca.common.option_help import source_of
from alpaca.common.options import flatten, text_of
from alpaca.corpora.labels import DEFAULT_LABELS
from dataset import INSTRUCT, QUERY_PREFIX

TRAINERS = ("train_trainer.py", "train_deepspeed.py")  # one table: they have the same options
MODEL_HUB = ("model_hub/convert_llama_weights_to_hf.py", "model_hub/merge_llama_with_chinese_lora.py")
TABLES = (
    TRAINERS,
    ("process.py",),
    ("test.py", "predict.py"),
    ("chat_ner.py", "web_ner.py"),
    (MODEL_HUB[0],),
    (MODEL_HUB[1],),
)
LANGUAGES = ("zh", "en")
HEADS = {"zh": ("参数", "默认值", "说明", "命令"), "en": ("option", "default", "meaning", "command")}

BEFORE = {
    "zh": """\
# 参数

[首页](../../README.md) · [English](../en/options.md)

每个命令开头有一个 `CONFIG` 字典，值可以在字典里改，也可以在命令行改；嵌套的键用 `_` 连接：`"lora": {"r": 8}` 就是 `--lora_r=16`。下面的表由 `tools/config_tables.py` 从命令生成；`python process.py --help` 这样的命令打印同样的内容。

- `--k=v`、`--k v`：都可以；值以 `-` 开头时必须用 `=`
- `--flag`、`--flag=True`、`--flag=false`：布尔值；别的写法报错。`--resume` 也等于 `--resume=True`
- `--lora_r=abc`，`--lorar=16`：类型由默认值决定，不对就报 `--lora_r: expected int, got 'abc'`；不认识的参数报错，并给出最像的名字
- `--labels=PER:人名,LOC:地名`，`--dev_path=None`：列表用逗号隔开；默认值是 None 的，写 None 恢复默认
""",
    "en": """\
# Options

[Front page](../../README_EN.md) · [中文](../zh/options.md)

Each command begins with a dict `CONFIG`. Values can be changed there or on the command line; nested keys are joined by `_`: `"lora": {"r": 8}` is `--lora_r=16`. `tools/config_tables.py` makes the tables below from the commands; `--help`, as in `python process.py --help`, prints the same.

- `--k=v`, `--k v`: both work; a value that begins with `-` needs the `=`
- `--flag`, `--flag=True`, `--flag=false`: true or false; anything else is an error. `--resume` is the same as `--resume=True`
- `--lora_r=abc`, `--lorar=16`: the default decides the type; if it is wrong: `--lora_r: expected int, got 'abc'`. An unknown option is an error that gives the closest name
- `--labels=PER:人名,LOC:地名`, `--dev_path=None`: a list is joined by commas; for an option whose default is None: back to the default
""",
}
DEEPSPEED = {
    "zh": """\
## deepspeed.json

学习率、betas、权重衰减、梯度裁剪、ZeRO 只写在 deepspeed.json 里，两个训练脚本都读它。`data/<data_name>/deepspeed.json` 优先于根目录的 `deepspeed.json`，用了哪个会打印出来。根目录那份适合 7B，`data/demo/` 那份适合极小模型。里面每一项也是参数，前面加 `deepspeed_`，层级用 `_` 连接：

| 参数 | `deepspeed.json` | `data/demo/deepspeed.json` |
| --- | --- | --- |
{rows}

- batch 的两个 `auto` 取自 `CONFIG`。写成数字而与 `CONFIG` 不同就报错，两个值都会说出来。`lr` 的 `auto` 按基座：hidden_size 小于 1024 是 1.5e-3，否则 1e-4；写了数字就用数字，用了多少在训练前打印。
- `bf16`、`fp16` 都是 `auto` 时：CUDA 支持 bf16 就用 bf16，否则 fp16；CPU 有 avx512_bf16 或 AMX 用 bf16，否则 fp32。要指定就用 `--precision=fp32`。
- 不能写 `scheduler`：升温和衰减由 `--warmup_ratio` 决定；`torch_adam` 是 `true` 时，DeepSpeed 不去编译自己的 Adam。
""",
    "en": """\
## deepspeed.json

Learning rate, betas, weight decay, gradient clipping and ZeRO stand in deepspeed.json alone, for both trainers. `data/<data_name>/deepspeed.json` goes before the `deepspeed.json` of the root; which one is used is printed. The root's is right for 7B, that of `data/demo/` for the very small model. Each value is an option too, with `deepspeed_` in front and the levels joined by `_`:

| option | `deepspeed.json` | `data/demo/deepspeed.json` |
| --- | --- | --- |
{rows}

- The two batch values that are `auto` come from `CONFIG`. A number that differs from `CONFIG` is an error that names both. `lr` as `auto` follows the base: 1.5e-3 where hidden_size is below 1024, else 1e-4; a number wins, and what is used is printed before training.
- With `bf16` and `fp16` both `auto`: on CUDA bf16 if it is supported, else fp16; on a CPU bf16 if it has avx512_bf16 or AMX, else fp32. `--precision=fp32` decides it.
- A `scheduler` is refused: warm-up and decay are set by `--warmup_ratio`; `torch_adam` as `true` keeps DeepSpeed from compiling its own Adam.
""",
}

CHINESE = {
    "raw test data; None: data/<data_name>/ori_data/test.txt if there is one": (
        "原始测试数据；None：data/<data_name>/ori_data/test.txt，没有就不用"
    ),
    "what `end` counts in an entity_list: exclusive | inclusive (the entity's last character)": (
        "entity_list 里的 end：exclusive 不含最后一个字 | inclusive 就是实体的最后一个字"
    ),
    "TAG:NAME: a type's raw tag, its name in answers; no _ in NAME; TAG: without a name leaves the type out": (
        "标签:名称：原始标签和答案里的名称；名称里不能有 _；名称留空就不要这一类"
    ),
    "folder of the model whose tokenizer counts the tokens": "用哪个文件夹里的分词器计 token 数",
    "most tokens of prompt + answer: longer training texts are cut at sentence ends": "提示词 + 答案最多几个 token；更长的训练文本在句末切开",
    "for audit_only: name of the column that holds the instruction": "检查时：指令那一列的名字",
    "for audit_only: name of the column that holds the query": "检查时：输入那一列的名字",
    "for audit_only: name of the column that holds the answer": "检查时：答案那一列的名字",
    "file of texts to predict: plain lines, JSON lines, a JSON array, CSV or .xlsx with a text column": (
        "要预测的文件：一行一段文本、一行一个 JSON、JSON 列表，或有 text 列的 CSV、.xlsx"
    ),
    "dev | test | train: test on data/<data_name>/instruct_data/<split>.txt": (
        "dev | test | train：测 data/<data_name>/instruct_data/<split>.txt"
    ),
    "file of instruct data to test on; None: that of split": "要测的指令数据文件；None：由 split 决定",
    "name of the column that holds the instruction; None: as in training, for the base alone: instruct": (
        "指令那一列的名字；None：与训练时相同，只用基座时是 instruct"
    ),
    "name of the column that holds the query; None: as in training, for the base alone: query": (
        "输入那一列的名字；None：与训练时相同，只用基座时是 query"
    ),
    "name of the column that holds the answer; None: as in training, for the base alone: answer": (
        "答案那一列的名字；None：与训练时相同，只用基座时是 answer"
    ),
    # train_trainer.py, train_deepspeed.py
    "name of the data set: its folder under data/ and under checkpoint/": "数据集名称：data/ 和 checkpoint/ 下的文件夹",
    "folder of the base model; for 7B ./model_hub/chinese-alpaca-7b": "基座模型的文件夹；7B 是 ./model_hub/chinese-alpaca-7b",
    "file of instruct data to train on; None: data/<data_name>/instruct_data/train.txt": "训练用的指令数据；None：data/<data_name>/instruct_data/train.txt",
    "file of instruct data to evaluate on; None: data/<data_name>/instruct_data/dev.txt": "验证用的指令数据；None：data/<data_name>/instruct_data/dev.txt",
    "folder for the adapter, checkpoints and logs; None: checkpoint/<data_name>/<command>": "写 LoRA、checkpoint 和日志的文件夹；None：checkpoint/<data_name>/<command>",
    "key of the instruction in a line of the data": "数据的一行里，指令的键",
    "key of the input in a line of the data": "数据的一行里，输入的键",
    "key of the answer in a line of the data": "数据的一行里，答案的键",
    "most tokens of prompt + answer; longer examples are dropped and counted, never cut": "提示词 + 答案最多几个 token；更长的样本丢弃并计数，从不截断",
    "drop | error: what to do with examples longer than max_seq_length": "drop（丢弃）| error（报错）：超过 max_seq_length 的样本怎么办",
    "rank of the LoRA matrices": "LoRA 矩阵的秩",
    "scale of LoRA's update: it is multiplied by alpha / r": "LoRA 更新量的比例：乘以 alpha / r",
    "share of LoRA's inputs set to zero at random in training; 0: none": "训练时随机置零的 LoRA 输入所占的比例；0：不置零",
    "LoRA layers": "哪些层加 LoRA",
    "layout of a step's examples: prefix (shared beginnings once) | plain (end to end) | none (padded)": "一步的样本怎样排：prefix（相同的前缀只算一次）| plain（首尾相接）| none（补齐）；结果相同",
    "examples per device and micro-batch": "每张卡、每个 micro-batch 几个样本",
    "micro-batches per optimizer step": "几个 micro-batch 更新一次",
    "passes over the training data": "训练数据过几遍",
    "stop after this many optimizer steps; -1: after num_train_epochs": "更新几步就停；-1：由 num_train_epochs 决定",
    "share of the steps in which the learning rate rises, 0 to 1; then it falls linearly to 0": "学习率上升的步数占比，0 到 1；之后线性降到 0",
    "True: compute activations again instead of keeping them; less memory, slower": "True：算梯度时重新计算激活值，不保存；省显存，更慢",
    "auto | True | False: compile the layers and replay them as CUDA graphs; auto: where that is possible": "auto | True | False：编译各层，按 CUDA graph 重放；auto：能这样做时才做",
    "random seed of LoRA's first weights, the order of the data and dropout": "随机种子：LoRA 的初值、数据顺序、dropout",
    "full | nf4 (4 bits) | fp8 (8 bits): how the frozen base is held; nf4 needs requirements-nf4.txt": "full | nf4（4 位）| fp8（8 位）：冻结的基座用几位保存；nf4 需要 requirements-nf4.txt",
    "auto | full | nf4 | fp8: how the base is held; auto: as the adapter was trained, where that is possible": "auto | full | nf4 | fp8：基座用几位保存；auto：与训练 LoRA 时相同（设备支持的话）",
    "auto | bf16 | fp16 | fp32: number format to compute in; auto: the best that the device has": "auto | bf16 | fp16 | fp32：用哪种数来算；auto：设备支持的最好的一种",
    "log loss and speed every so many optimizer steps": "每更新几步打印并记录一次 loss 和速度",
    "compute the dev loss every so many optimizer steps and at the end; -1: never": "每更新几步算一次验证集 loss，最后也算；-1：不算",
    "with each dev loss, also answer the first N dev examples and log their F1; 0: do not": "每次算验证集 loss 时，还回答验证集前 N 条，记录 F1；0：不回答",
    "last | f1 | loss: adapter_model/ holds the newest state, or the one with the best dev F1 or dev loss": "last | f1 | loss：adapter_model/ 里是最新的，还是验证集 F1 或 loss 最好的",
    "save adapter and resumable checkpoint every so many optimizer steps and at the end; -1: at the end": "每更新几步保存一次 LoRA 和可续训的 checkpoint，最后也保存；-1：只在最后",
    "how many resumable checkpoints to keep, the newest; 0: all": "保留最新的几个可续训的 checkpoint；0：全部",
    "continue a run: False | True (from the newest complete checkpoint) | a step | a checkpoint's path": "续训：False | True（从最新的完整 checkpoint）| 步数 | checkpoint 的路径",
    "True: write the figures of train_log.jsonl for TensorBoard too, to <save_dir>/tensorboard": "True：把 train_log.jsonl 的数字也写给 TensorBoard，在 <save_dir>/tensorboard",
    "True: the adapter is saved as adapter_model.safetensors; False: as adapter_model.bin": "True：LoRA 存成 adapter_model.safetensors；False：adapter_model.bin",
    "DeepSpeed settings; None: data/<data_name>/deepspeed.json if there is one, else deepspeed.json": "DeepSpeed 的设置；None：有 data/<data_name>/deepspeed.json 就用它，否则 deepspeed.json",
    "number of this process on its machine; the deepspeed launcher passes it": "本机上的第几个进程；deepspeed 启动时传入，不用管",
    # process.py
    "name of the data set: its folder under data/": "数据集名称：data/ 下的文件夹",
    "raw training data; None: data/<data_name>/ori_data/train.txt": "原始训练数据；None：data/<data_name>/ori_data/train.txt",
    "raw dev data; None: data/<data_name>/ori_data/dev.txt if there is one": "原始验证数据；None：data/<data_name>/ori_data/dev.txt，如果有",
    "sentences to move from the training to the dev data, at random; only where there is no dev file": "没有验证数据时，从训练数据里随机分出多少句",
    "format of the raw data: auto | brat | conll | bio | labelstudio | labelstudio_min | characters | doccano | cmeee | spans | jsonl": "原始数据的格式：auto | brat | conll | bio | labelstudio | labelstudio_min | characters | doccano | cmeee | spans | jsonl",
    "instruction of every example; {labels}: the types' names joined by 、, a typed \\n: a newline": "每个样本的指令；{labels}：用、连接的类型名，\\n：换行",
    "what stands before the text in a query": "query 里，文本前面写什么",
    "TAG:NAME: a type's raw tag, its name in answers; no _ in NAME": "标签:名称，即一类实体在原始数据里的标签和在答案里的名称；名称里不能有 _",
    "True: training sentences that the dev data holds too are kept | False: they are left out": "训练数据里与验证数据相同的句子：True：保留 | False：去掉",
    "random seed of the choice of dev_size sentences": "随机选 dev_size 句用的种子",
    "doccano | labelstudio | brat: write predictions for that tool, and nothing else": "doccano | labelstudio | brat：把预测结果写成这个工具的预标注，别的不做",
    "for export: predictions.jsonl to write; None: the one below checkpoint/<data_name>/ written last": "export 用的 predictions.jsonl；None：checkpoint/<data_name>/ 下最后写的",
    "True: write nothing, only check data/<data_name>/instruct_data/ as the trainers do": "True：什么也不写，只像训练时那样检查 data/<data_name>/instruct_data/",
    "for audit_only: folder of the model whose tokenizer counts the tokens": "audit_only 用哪个模型的分词器数 token：它的文件夹",
    "for audit_only: examples with more tokens of prompt + answer are counted as too long": "audit_only 报告有几条样本的提示词 + 答案超过这么多 token",
    # test.py
    "folder of the base model; None: the base that the adapter was trained on": "基座模型的文件夹；None：训练 LoRA 时用的基座",
    "auto: the adapter of checkpoint/<data_name>/ written last | a folder | none: the base alone": "auto：checkpoint/<data_name>/ 下最后写的 LoRA | 文件夹 | none：只有基座",
    "the prompt around the instruction: auto | alpaca | alpaca2 | chat; auto: that of the base": "提示词模板：auto | alpaca | alpaca2 | chat；auto：基座的",
    "the prompt around the instruction: auto | alpaca | alpaca2 | chat; auto: as in training, else the base's": "提示词模板：auto | alpaca | alpaca2 | chat；auto：训练时的，没有则是基座的",
    "folder of the tokenizer; None: the base model's": "分词器的文件夹；None：基座模型的",
    "file of instruct data to test on; None: data/<data_name>/instruct_data/dev.txt": "测试用的指令数据；None：data/<data_name>/instruct_data/dev.txt",
    "what to ask of each text; None: what the adapter was trained with": "对每条文本问什么；None：与 LoRA 训练时相同",
    "entity types of the answers, joined by commas | none: no entities; None: the adapter's own": "答案里的实体类型，用逗号连接 | none：不是实体；None：与 LoRA 训练时相同",
    "most texts answered at once; auto: 128 on a GPU, 64 on a CPU. Fewer where memory is short": "最多同时回答几条；auto：GPU 上 128，CPU 上 64。内存不够时自动减少",
    "ner: score entities | exact: share of answers equal to the right one | none: only write predictions": "ner：按实体算分 | exact：与标准答案一字不差的比例 | none：只写预测",
    "most tokens of an answer; answers cut there are counted and reported": "答案最多几个 token；被截断的会计数并报告",
    "True: answers name only parts of the text and known types | False: anything | auto: True for NER": "True：答案里只能有原文的片段和已知的类型 | False：什么都可以 | auto：NER 的 LoRA 是 True",
    "test only the first N examples; -1: all": "只测前 N 条；-1：全部",
    # predict.py
    "name of the data set: its folder under checkpoint/": "数据集名称：checkpoint/ 下的文件夹",
    "one text to predict; with neither text nor input_path: three sentences of our own": "一段要预测的文本；text 和 input_path 都不给：自带的三句话",
    "file of texts to predict: one a line, or one JSON object a line with text or query": "要预测的文件：一行一段文本，或一行一个带 text（或 query）的 JSON",
    "file to write the results to, as JSON lines; None: print them": "结果写到哪个文件，JSON lines；None：打印出来",
    "True: continue after the rows that output_path already holds": "True：接着 output_path 里已有的行往下做",
    "leave out entities that are right with less probability, 0 to 1; 0: none": "略去正确的概率低于它的实体，0 到 1；0：都留下",
    "True: continue after the rows that predictions.jsonl already holds": "True：接着 predictions.jsonl 里已有的行往下做",
    # chat_ner.py
    "folder of the base model; None: the base that the adapter was trained on; given alone: no adapter": "基座模型的文件夹；None：训练 LoRA 时用的基座；只给它：不加 LoRA",
    "auto: the adapter of checkpoint/demo/ written last | a folder | none: the base alone": "auto：checkpoint/demo/ 下最后写的 LoRA | 文件夹 | none：只有基座",
    "True: the input is put into the prompt of training | False: the model reads it as typed": "True：把输入放进训练时的提示词 | False：输入是什么就是什么",
    "True: ask for inputs in the terminal, unless data_file is given | False: only answer data_file": "True：在终端里等待输入，除非给了 data_file | False：只回答 data_file",
    "file of inputs to answer, one a line; None: no file": "要回答的文件，一行一个输入；None：没有",
    'file for the answers to data_file, a JSON list of {"Input", "Output"}': 'data_file 的回答写到哪个文件，{"Input", "Output"} 的 JSON 列表',
    "number of the GPU to use | auto: a base that is too large for one is spread over all": "用第几张卡，第一张是 0 | auto：一张放不下的基座分放在所有卡上",
    "the same, as the original scripts call it": "同上，原脚本里的名字",
    "True: compute on the CPU even where there is a GPU": "True：有 GPU 也用 CPU 算",
    "most tokens of an answer; a longer one is cut": "答案最多几个 token；更长的截断",
    "randomness of free chat; 0: always the likeliest token, so the same answer every time": "闲聊的随机程度；0：总取最可能的 token，每次答案相同",
    "0 to 1; at a temperature above 0, draw from the likeliest tokens of this probability together": "0 到 1；温度大于 0 时，只在概率合计这么多的最可能的 token 里抽",
    "random seed of what is drawn at a temperature above 0": "温度大于 0 时抽样的随机种子",
    "as in test.py, for inputs that begin with the adapter's instruction: auto | True | False": "与 test.py 相同，只管以 LoRA 的指令开头的输入：auto | True | False",
    # web_ner.py
    "name of the data set: its folder under checkpoint/, whose adapter is chosen at first": "数据集名称：checkpoint/ 下的文件夹，一开始选中它的 LoRA",
    "address to listen on; one that other machines reach needs auth": "监听的地址；别的机器能打开的地址要同时给 auth",
    "port to listen on": "监听的端口",
    "file of who may log in, user:password a line; None: the environment variable WEB_NER_AUTH, else anybody": "可以登录的人的文件，一行一个 用户名:密码；None：环境变量 WEB_NER_AUTH，也没有就不用登录",
    "largest file that is taken, in MB": "最大收多少 MB 的文件",
    "most characters of a text or a question": "一段文本或一个问题最多几个字",
    "most texts answered at once, those of all users together": "最多同时回答几条，所有人的加在一起",
    # model_hub/convert_llama_weights_to_hf.py
    "folder that holds <model_size>/ and, in there or beside it, tokenizer.model": "放 <model_size>/ 的文件夹；tokenizer.model 在其中或与它并排",
    "name of the folder of Meta's weights: tiny, 7B, 13B, …; tokenizer_only: write the tokenizer alone": "Meta 权重的文件夹的名字：tiny、7B、13B 等；tokenizer_only：只写分词器",
    "folder to write; None: ./<model_size>-hf": "写到哪个文件夹；None：./<model_size>-hf",
    "most tokens that the model reads: LLaMA-1 2048, LLaMA-2 4096; Meta's files do not say": "模型最多读几个 token：LLaMA-1 是 2048，LLaMA-2 是 4096；Meta 的文件里没有",
    # model_hub/merge_llama_with_chinese_lora.py
    "folder of the base in Hugging Face format, e.g. ./7B-hf": "hugging face 格式的基座的文件夹，如 ./7B-hf",
    "folders of the adapters, joined by commas, in the order of their training: LLaMA's, Alpaca's": "LoRA 的文件夹，用逗号连接，按训练的先后：先 LLaMA，后 Alpaca",
    "format to write: huggingface | pth (Meta's layout)": "写成什么格式：huggingface | pth（Meta 的格式）",
    "folder to write": "写到哪个文件夹",
    "how many files pth is written as; -1: as Meta's model of that size (13B: 2, 33B: 4, 65B: 8)": "pth 写成几个文件；-1：与 Meta 的同样大小的模型一样（13B 2 个，33B 4 个，65B 8 个）",
    "True: compare the weights, and answers to a few prompts, with base + adapters in float32": "True：用 float32 的基座加 LoRA 核对合并后的权重，再比较几个提示的答案",
    "accepted and not used: weights are read from their files as they are needed": "可以写，但不用：权重用到时才从文件里读",
}


def config_of(script):
    """CONFIG as it stands in the source: importing train_* would take seconds, `import test` another module."""
    for node in ast.parse((ROOT / script).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "CONFIG":
            names = {"INSTRUCT": INSTRUCT, "QUERY_PREFIX": QUERY_PREFIX, "DEFAULT_LABELS": DEFAULT_LABELS}
            return eval(compile(ast.Expression(node.value), script, "eval"), names)  # noqa: S307, our own source


def leaves(nested):
    """{flat name: value} of a nested dict."""
    values = {}
    for name, path in flatten(nested).items():
        value = nested
        for key in path:
            value = value[key]
        values[name] = value
    return values


def options_of(script, language):
    """A row for each option, in the order of CONFIG: (option, default, meaning), as they stand in the page."""
    (_, comments), config = source_of(ROOT / script), config_of(script)
    rows = []
    for (name, default), path in zip(leaves(config).items(), flatten(config).values(), strict=True):
        comment = re.sub("train_(trainer|deepspeed)", "<command>", comments[path])  # one row for both trainers
        if language == "zh":
            comment = CHINESE[comment]
        comment = re.sub(r"(?a)[\w./<>-]*<\w+>[\w./<>-]*", r"`\g<0>`", comment)  # else HTML to Markdown
        rows.append((f"`--{name}`", f"`{text_of(default)}`", comment))
    return rows


def table(scripts, language):
    """One table of the options of some commands; where they differ, a column says whose an option is."""
    owners = {}
    for script in scripts:
        for row in options_of(script, language):
            owners.setdefault(row, []).append(script)
    shared = all(len(names) == len(scripts) for names in owners.values())
    rows = [row if shared else (*row, ", ".join(names)) for row, names in owners.items()]
    head = HEADS[language][: len(rows[0])]
    return [head, ("---",) * len(head), *rows]


def page(language):
    """What docs/<language>/options.md is to hold."""
    parts = [BEFORE[language]]
    for scripts in TABLES:
        lines = (" | ".join(cell.replace("|", r"\|") for cell in row) for row in table(scripts, language))
        parts.append(f"## {', '.join(scripts)}\n\n" + "".join(f"| {line} |\n" for line in lines))
    files = (ROOT / "deepspeed.json", ROOT / "data" / "demo" / "deepspeed.json")
    root, demo = (leaves(json.loads(file.read_text(encoding="utf-8"))) for file in files)
    assert root.keys() == demo.keys()
    rows = [f"| `--deepspeed_{name}` | `{text_of(root[name])}` | `{text_of(demo[name])}` |" for name in root]
    parts.append(DEEPSPEED[language].format(rows="\n".join(rows)))
    return "\n".join(parts)


def path_of(language):
    return ROOT / "docs" / language / "options.md"


if __name__ == "__main__":
    for language in LANGUAGES:
        path_of(language).write_text(page(language), encoding="utf-8")
