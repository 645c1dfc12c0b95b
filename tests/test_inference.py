"""test.py, predict.py and chat_ner.py as a user runs them.     python -m pytest tests/test_inference.py"""

import json
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

import chat_ner
from alpaca.common.errors import UserError
from alpaca.models.adapters import TRAINERS, find_adapter
from alpaca.models.base import DEFAULT_BASE
from alpaca.models.templates import message_of
from alpaca.models.tokenizer import load_tokenizer
from alpaca.scoring import metrics
from alpaca.scoring.calibration import rate_confidence
from alpaca.training.adapter_writer import training_facts
from dataset import parse_answer, read_examples
from harness import INSTRUCTION, ROOT, make_records, run_script, write_jsonl

SHORT = ["--precision=fp32", "--max_new_tokens=8"]  # a random model never says eos by itself


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def adapter(workspace):
    return workspace / "checkpoint" / "mine" / "train_trainer" / "adapter_model"


@pytest.fixture(scope="module")
def tested(workspace):
    result = run_script("test.py", "--data_name=mine", *SHORT, cwd=workspace)
    run_dir = find_last(workspace)
    return result, read_rows(run_dir / "predictions.jsonl"), json.loads((run_dir / "metrics.json").read_text())


def find_last(workspace):
    runs = [workspace / "checkpoint" / "mine" / name for name in TRAINERS]
    return max(runs, key=lambda run: (run / "adapter_model" / "adapter_config.json").stat().st_mtime)


def test_every_dev_row_has_a_prediction(tested, workspace):
    _, rows, scores = tested
    dev = read_examples(workspace / "data" / "mine" / "instruct_data" / "dev.txt")
    assert [(row["text"], row["answer"]) for row in rows] == [(e["text"], e["answer"]) for e in dev]
    assert all(isinstance(row["prediction"], str) for row in rows) and scores["examples"] == len(dev) == 31
    for row in rows:
        assert all(row["text"][b:e] == x["entity"] for x in row["entities"] + row["gold"] for b, e in x["spans"])


def test_metrics_can_be_recomputed_from_the_file(tested):
    _, rows, scores = tested
    assert metrics.score(rows, ["人名", "地名"]) | {"calibration": rate_confidence(rows).figures} == scores
    assert scores["string"]["micro"]["support"] == sum(len(row["gold"]) for row in rows) > 0


def test_printed_report(tested):
    result, rows, _ = tested
    lines = result.stdout.splitlines()
    assert lines[0] == f"预测： {[row['prediction'] for row in rows[:20]]}" and lines[1] == ""
    assert lines[2] == f"真实： {[row['answer'] for row in rows[:20]]}" and lines[3] == ""
    assert re.search(r"^总计( +\d+\.\d\d){3} +\d+( +\d+\.\d\d){3} +\d+$", result.stdout, re.M)
    assert (
        "31 条回答达到 max_new_tokens=8 或模型的长度上限，被截断" in result.stdout and "Traceback" not in result.stderr
    )


def test_rehearsal_is_no_part_of_the_task(workspace, base_dir, tmp_path):
    """Neither of what is measured nor of what an adapter is asked: rows of other tasks in the training data."""
    own = read_rows(workspace / "data" / "mine" / "instruct_data" / "dev.txt")[:2]
    other = {"instruct": "找出日期", "query": "问题：今天几号？" + "很长" * 99, "answer": "今天_日期"}
    path = write_jsonl(tmp_path / "train.txt", [other, *own, *[other] * 9])
    args = SimpleNamespace(eval_examples=0, model_dir=base_dir)
    records, tokenizer = read_examples(path), load_tokenizer(base_dir)
    assert training_facts(args, records, tokenizer) == training_facts(args, records[1:3], tokenizer)
    result = run_script("test.py", "--data_name=mine", f"--dev_path={path}", *SHORT, cwd=workspace)
    assert f"{path}: 10 条是别的任务，不测" in result.stderr
    rows = read_rows(find_last(workspace) / "predictions.jsonl")
    assert [row["text"] for row in rows] == [row["text"] for row in own]


def test_too_long_a_row_keeps_its_place_and_counts_as_missed(workspace, tmp_path):
    """One whose instruction leaves no room; a long text is answered in windows, and its score is that of the whole."""
    dev = read_rows(workspace / "data" / "mine" / "instruct_data" / "dev.txt")[:3]
    dev[1] = {"instruct": "说" * 600, "query": "文本：王明在北京。", "text": "王明在北京。"}
    dev[1]["answer"] = "王明_人名"
    dev[2] = {"instruct": INSTRUCTION, "query": "文本：" + "王明去年在北京。" * 200, "answer": "王明_人名\n北京_地名"}
    path = tmp_path / "dev.txt"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in dev), encoding="utf-8")
    result = run_script("test.py", "--data_name=mine", f"--dev_path={path}", *SHORT, cwd=workspace)
    rows = read_rows(find_last(workspace) / "predictions.jsonl")
    assert [row["prediction"] is None for row in rows] == [False, True, False]
    assert "1 条超过模型的长度上限" in result.stdout
    # without offsets of its own, gold is located by the answer: all 200 of each
    assert [len(entity["spans"]) for entity in rows[2]["gold"]] == [200, 200]
    assert "1 条比训练的文本长，像 predict.py 那样在句末切开回答（0 处没有句末" in result.stderr


def test_base_alone(workspace, base_dir):
    options = ["--data_name=mine", "--lora_model=none", f"--base_model={base_dir}", "--max_examples=5", *SHORT]
    run_script("test.py", *options, cwd=workspace)
    assert len(read_rows(workspace / "checkpoint" / "mine" / "base" / "predictions.jsonl")) == 5


def test_another_split_with_columns_of_other_names(workspace, base_dir):
    rows = read_rows(workspace / "data" / "mine" / "instruct_data" / "dev.txt")[:2]
    renamed = [{"instruction": r["instruct"], "input": r["query"], "output": r["answer"]} for r in rows]
    path = write_jsonl(workspace / "data" / "mine" / "instruct_data" / "test.txt", renamed)
    options = ["--data_name=mine", "--lora_model=none", f"--base_model={base_dir}", "--split=test", *SHORT]
    refused = run_script("test.py", *options, cwd=workspace, check=False)
    assert refused.returncode == 2 and "name it with --instruct_column=…" in refused.stderr
    columns = ["--instruct_column=instruction", "--query_column=input", "--response_column=output"]
    run_script("test.py", *options, *columns, cwd=workspace)
    tested = read_rows(workspace / "checkpoint" / "mine" / "base" / "predictions.jsonl")
    assert [row["answer"] for row in tested] == [row["answer"] for row in rows]
    path.unlink()


def test_auto_takes_the_adapter_written_last(workspace, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(workspace / "checkpoint", tmp_path / "checkpoint", copy_function=shutil.copy2)
    last = find_last(tmp_path)
    assert find_adapter("mine", "auto")[0].resolve() == (last / "adapter_model").resolve()
    (last / "adapter_model").rename(last / "adapter_model.old")  # killed between the two renames of a save
    assert find_adapter("mine", "auto")[0].resolve() == (last / "adapter_model.old").resolve()
    assert find_adapter("mine", "none") == find_adapter("mine", "None") == (None, None, {})
    shutil.copytree(last / "adapter_model.old", tmp_path / "checkpoint" / "mine" / "shipped" / "adapter_model")
    for name in TRAINERS:
        shutil.rmtree(tmp_path / "checkpoint" / "mine" / name)
    assert "shipped" in str(find_adapter("mine", "auto")[0])


TEN_LABELS = dict(
    address="地址", book="书名", company="公司", game="游戏", government="政府",
    movie="电影", name="姓名", organization="组织机构", position="职位", scene="景点",
)  # fmt: skip


def test_other_peoples_data(base_dir, tmp_path):
    """Ten labels, given to process.py alone: training, test and predict know them from the data and train_args.json."""
    lines = []
    for i in range(40):
        text, labels = "今天", {}
        for tag, word in zip(TEN_LABELS, "北京 日报 银行 大学 上海 学生 王明 机构 教授 长江".split(), strict=True):
            labels[tag] = {word: [[len(text), len(text) + 1]]}
            text += word
        lines.append(json.dumps({"text": f"{text}新闻{i}", "label": labels}, ensure_ascii=False) + "\n")
    folder = tmp_path / "data" / "cluener" / "ori_data"
    folder.mkdir(parents=True)
    (folder / "train.json").write_text("".join(lines[:30]), encoding="utf-8")
    (folder / "dev.json").write_text("".join(lines[30:]), encoding="utf-8")
    labels = ",".join(f"{tag}:{label}" for tag, label in TEN_LABELS.items())
    files = [f"--train_file={folder}/train.json", f"--dev_file={folder}/dev.json", f"--labels={labels}"]
    run_script("process.py", "--data_name=cluener", *files, cwd=tmp_path)
    options = ["--data_name=cluener", f"--model_dir={base_dir}", "--precision=fp32", "--max_steps=3", "--save_steps=-1"]
    run_script("train_deepspeed.py", *options, "--max_seq_length=1024", cwd=tmp_path)
    run = tmp_path / "checkpoint" / "cluener" / "train_deepspeed"
    facts = json.loads((run / "adapter_model" / "train_args.json").read_text(encoding="utf-8"))
    assert sorted(facts["labels"]) == sorted(TEN_LABELS.values())
    result = run_script("test.py", "--data_name=cluener", "--precision=fp32", "--max_new_tokens=60", cwd=tmp_path)
    assert all(re.search(rf"^{label} ", result.stdout, re.M) for label in facts["labels"])
    rows = read_rows(run / "predictions.jsonl")
    assert len(rows) == 10 and {e["type"] for row in rows for e in row["gold"]} == set(TEN_LABELS.values())
    assert {e["type"] for row in rows for e in row["entities"]} <= set(TEN_LABELS.values())
    assert not any({"malformed", "unknown_type", "not_in_text"} & row.get("problems", {}).keys() for row in rows)
    assert (run / "report.html").stat().st_size > 1000
    result = run_script("predict.py", "--data_name=cluener", "--text=王明在北京", *SHORT, cwd=tmp_path)
    assert "地址、书名、公司、游戏、政府、电影、姓名、组织机构、职位、景点" in result.stdout


def test_another_task(base_dir, tmp_path):
    """Questions that are all instruction: the audit is silent, nothing looks for entities, no question is cut."""
    folder = tmp_path / "data" / "qa" / "instruct_data"
    folder.mkdir(parents=True)
    questions = [{"instruct": f"北京{n}", "query": "", "answer": "很好"} for n in "一二三四五六七八"]
    write_jsonl(folder / "train.txt", questions)
    dev = [{**question, "instruct": "上海" + question["instruct"]} for question in questions[:4]]
    write_jsonl(folder / "dev.txt", dev)
    options = ["--data_name=qa", f"--model_dir={base_dir}", "--precision=fp32", "--max_steps=2", "--save_steps=-1"]
    with pytest.raises(UserError, match="measure it with test.py --metric=exact"):
        training_facts(SimpleNamespace(eval_examples=2), questions, None)
    result = run_script("train_deepspeed.py", *options, cwd=tmp_path)
    assert "不检查实体" in result.stderr and "警告" not in result.stderr
    run = tmp_path / "checkpoint" / "qa" / "train_deepspeed"
    for name in ("metrics.json", "report.html"):
        (run / name).touch()  # of an earlier test

    test = ["--data_name=qa", *SHORT]
    result = run_script("test.py", *test, cwd=tmp_path, check=False)
    assert result.returncode == 2 and "for another task give --metric=exact or none" in result.stderr
    run_script("test.py", *test, "--metric=none", cwd=tmp_path)
    rows = read_rows(run / "predictions.jsonl")
    assert not (run / "metrics.json").exists() and not (run / "report.html").exists()
    assert [row["instruct"] for row in rows] == [row["instruct"] for row in dev]
    assert not any(row["entities"] or "gold" in row for row in rows)
    answers = [row["prediction"] for row in rows[:2]] + [row["prediction"] + " " for row in rows[2:]]
    write_jsonl(folder / "dev.txt", [{**row, "answer": answer} for row, answer in zip(dev, answers, strict=True)])
    result = run_script("test.py", *test, "--metric=exact", cwd=tmp_path)
    assert "与标准答案完全相同 50.00%，95% 区间 0.00–100.00，样本数 4" in result.stdout
    scores = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert scores == {"exact": {"share": 0.5, "interval": [0.0, 1.0]}, "cut": 4, "examples": 4}

    asked = write_jsonl(tmp_path / "asked.txt", [{"instruct": "上海是。" * 40}, {"text": "上海"}])
    result = run_script("predict.py", "--data_name=qa", f"--input_path={asked}", *SHORT, cwd=tmp_path)
    assert f'文本 >>>  "{"上海是。" * 40}"' in result.stdout and result.stdout.count("预测 >>>  ") == 2
    assert "训练用过 8 种指令，没有写 instruct 的文本用第一种：北京一" in result.stderr


def test_predict_prints_blocks(workspace, adapter):
    result = run_script("predict.py", f"--lora_model={adapter}", *SHORT, cwd=workspace)
    lines = result.stdout.splitlines()
    assert lines[0] == "=" * 100
    assert (
        result.stdout.count("文本 >>>  ") == result.stdout.count("预测 >>>  ") == result.stdout.count("真实 >>>  ") == 3
    )
    first = INSTRUCTION.replace("\n", "\\n") + "文本："
    assert all(line.startswith(f'文本 >>>  "{first}') and line.endswith('"') for line in lines if "文本 >>>" in line)


def test_predict_text_and_files(workspace, adapter, tmp_path):
    lora = f"--lora_model={adapter}"
    result = run_script("predict.py", lora, "--text=王明在北京", *SHORT, cwd=workspace)
    assert "王明在北京" in result.stdout and "真实" not in result.stdout
    texts = tmp_path / "我的 文本.txt"
    texts.write_text("王明在北京\n\n" + "长" * 3000 + "\n李华说😀_没有\n", encoding="utf-8")
    result = run_script(
        "predict.py", lora, f"--input_path={texts}", f"--output_path={tmp_path}/o", *SHORT, cwd=workspace
    )
    rows = read_rows(tmp_path / "o")
    assert [row["text"][:3] for row in rows] == ["王明在", "", "长长长", "李华说"]
    assert all(row["prediction"] is not None for row in rows) and rows[2]["text"] == "长" * 3000
    assert "1 行是空的，不提问，结果里各占一行" in result.stderr
    assert "第 3 条没有句末可切，在句子里面切开，位置 " in result.stderr
    assert all(row["answer"] is None and "gold" not in row for row in rows)
    texts.write_text(
        '[{"id": "a-7", "text": "王明在北京", "entities": []}, {"id": "a-8", "text": ""}]', encoding="utf-8"
    )
    result = run_script(
        "predict.py", lora, f"--input_path={texts}", f"--output_path={tmp_path}/o", *SHORT, cwd=workspace
    )
    rows = read_rows(tmp_path / "o")
    assert [(row["id"], row["text"]) for row in rows] == [("a-7", "王明在北京"), ("a-8", "")]
    assert rows[1]["prediction"] == "" and "输入的 entities 与结果的键同名，不写进结果" in result.stderr
    records = [{"text": "王明在北京", "answer": "王明_人名"}, {"instruct": "说", "query": "文本：你好"}]
    texts.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    result = run_script("predict.py", lora, f"--input_path={texts}", *SHORT, cwd=workspace)
    assert '文本 >>>  "说文本：你好"' in result.stdout and result.stdout.count("真实 >>>  王明_人名") == 1


def test_an_interrupted_predict_goes_on(workspace, adapter, tmp_path):
    """With the row behind the last whole one; other texts' rows are not touched."""
    texts, out = tmp_path / "texts.txt", tmp_path / "out.jsonl"
    texts.write_text("".join(f"王明{'去年' * n}在北京\n" for n in range(5)), encoding="utf-8")
    options = [f"--lora_model={adapter}", f"--input_path={texts}", f"--output_path={out}", *SHORT]
    run_script("predict.py", *options, cwd=workspace)
    whole = out.read_bytes()
    assert whole.count(b"\n") == 5
    out.write_bytes(whole[: len(whole) * 2 // 3])
    result = run_script("predict.py", *options, "--resume", cwd=workspace)
    assert out.read_bytes() == whole and "2 条结果已写到" in result.stderr and "之前已有 3 条" in result.stderr
    run_script("predict.py", *options, "--resume=True", cwd=workspace)  # nothing left to do
    assert out.read_bytes() == whole
    texts.write_text("上海\n", encoding="utf-8")
    result = run_script("predict.py", *options, "--resume", cwd=workspace, check=False)
    assert result.returncode == 2 and f"{out}: its rows were made with input {texts} (" in result.stderr
    result = run_script("predict.py", *options, "--base_model=nowhere", cwd=workspace, check=False)
    assert result.returncode == 2 and out.read_bytes() == whole


def test_an_interrupted_test_goes_on(tested, workspace):
    """Its figures are those of the whole file; rows of other answers are refused."""
    path = find_last(workspace) / "predictions.jsonl"
    run_script("test.py", "--data_name=mine", "--max_examples=9", *SHORT, cwd=workspace)
    path.write_bytes(path.read_bytes()[:-9])
    run_script("test.py", "--data_name=mine", "--resume", *SHORT, cwd=workspace)
    assert read_rows(path) == tested[1] and json.loads((path.parent / "metrics.json").read_text()) == tested[2]
    options = ["--data_name=mine", "--resume", "--precision=fp32", "--max_new_tokens=9"]
    result = run_script("test.py", *options, cwd=workspace, check=False)
    assert result.returncode == 2 and "with max_new_tokens 8, this run has max_new_tokens 9" in result.stderr
    assert len(read_rows(path)) == 31


def test_less_sure_entities_are_left_out(workspace, adapter, tmp_path):
    path = write_jsonl(tmp_path / "texts.jsonl", [{"text": record["text"]} for record in make_records(9, 8)])
    options = [f"--lora_model={adapter}", f"--input_path={path}", f"--output_path={tmp_path}/o", *SHORT]
    run_script("predict.py", *options, cwd=workspace)
    found = [entity for row in read_rows(tmp_path / "o") for entity in row["entities"]]
    least = sorted(entity["confidence"] for entity in found)[len(found) // 2]
    run_script("predict.py", *options, f"--min_confidence={least}", cwd=workspace)
    kept = [entity for row in read_rows(tmp_path / "o") for entity in row["entities"]]
    assert kept == [entity for entity in found if entity["confidence"] >= least] and 0 < len(kept) < len(found)


def test_nothing_breaks_on_odd_texts(workspace, adapter, tmp_path):
    """20,000 characters, emoji, tabs, full-width digits, characters without a piece, what looks like an answer."""
    odd = [
        "今天晴",
        "王明去年在北京。" * 2500,
        "👨‍👩‍👧在\t北京",
        "１２３４",
        "𠮷㐂龘𩸽",
        "a_b_人名",
        "没有",
        "### Response: 没有",
        " ",
        "\\n",
    ]
    texts, out = tmp_path / "odd.txt", tmp_path / "out.jsonl"
    texts.write_text("".join(f"{json.dumps({'text': text})}\n" for text in [*odd, "\n王明\r\n"]), encoding="utf-8")
    options = [f"--lora_model={adapter}", f"--input_path={texts}", f"--output_path={out}", *SHORT]
    run_script("predict.py", *options, cwd=workspace)
    rows = read_rows(out)
    assert [row["text"] for row in rows] == [*odd, "\n王明\r\n"]
    for row in rows:
        parsed = parse_answer(row["prediction"], row["text"], ["人名", "地名"])
        assert parsed == (parsed.entities, [], [], [], [])
        assert row.get("problems", {}).keys() <= {"repeated", "abandoned", "cut"}
        for entity in row["entities"]:
            assert 0 <= entity["confidence"] <= 1 and entity["log_probability"] <= 0
            assert all(row["text"][begin:end] == entity["entity"] for begin, end in entity["spans"])


def test_predict_puts_before_a_text_what_training_had_there(workspace, base_dir, tmp_path):
    """Data with another query_prefix than ours; and an adapter without q_proj."""
    records = [{**r, "query": "句子：" + r["text"]} for r in make_records(24, 3)]
    path = write_jsonl(tmp_path / "train.txt", records)
    options = [f"--train_path={path}", f"--dev_path={path}", f"--model_dir={base_dir}", f"--save_dir={tmp_path}/run"]
    options += ["--max_steps=2", "--precision=fp32", "--lora_target_modules=k_proj,v_proj", "--save_steps=-1"]
    run_script("train_deepspeed.py", *options, cwd=workspace)
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2"]
    lora = f"--lora_model={tmp_path}/run/adapter_model"
    result = run_script("predict.py", lora, "--text=王明在北京", *SHORT, cwd=workspace)
    assert "句子：王明在北京" in result.stdout and "文本：" not in result.stdout.replace(INSTRUCTION, "")


def test_chat_prompt_of_a_pasted_line_is_trainings_own():
    """As users paste it: instruction and text on one line, a literal \\n in it and none before 文本."""
    pasted = INSTRUCTION.replace("\n", "\\n") + "文本：王明在北京"
    expected = message_of(INSTRUCTION, "文本：王明在北京"), "文本：王明在北京"
    assert chat_ner.chat_message(pasted, [INSTRUCTION]) == expected
    assert chat_ner.chat_message(pasted.replace("文本：", "\\n文本："), [INSTRUCTION]) == expected
    assert chat_ner.chat_message("你好\\n吗", [INSTRUCTION]) == (message_of("你好\\n吗", ""), None)
    assert chat_ner.chat_message("你好", []) == (message_of("你好", ""), None)


def test_chat_is_single_turn_and_ends_cleanly(workspace, adapter, base_dir):
    options = ["--lora_model", adapter, "--with_prompt", "--interactive", "--max_new_tokens=4"]
    for stdin, answers in (("你好\n你好\n", 2), ("你好\n\n你好\n", 1), ("", 0)):
        result = run_script("chat_ner.py", *options, cwd=workspace, stdin=stdin)
        parts = re.findall(r"Input:Response:  (.*?)\n\n\n", result.stdout, re.S)
        assert len(parts) == answers and len(set(parts)) <= 1, result.stdout
        assert result.stdout.startswith("+ 该模式下仅支持单轮问答，无多轮对话能力。\n+ 如要进行多轮对话")
    pasted = INSTRUCTION.replace("\n", "\\n") + "文本：王明在北京"
    stdin = f"/base\n{pasted}\n/base\n/base {pasted}\n/help\n\udcff\n你好\n/base\n"
    chat = run_script("chat_ner.py", *options, cwd=workspace, stdin=stdin)
    with_adapter, *base, _, free = re.findall(r"Response:  (.*?)\n\n\n", chat.stdout, re.S)
    assert base[0] == base[1] and len(base) == 2 and chat.stdout.count("/help       显示这些命令") == 2
    assert parse_answer(with_adapter, "王明在北京", ["人名", "地名"]).malformed == [] != parse_answer(base[0]).malformed
    assert chat.stderr.count("不是 UTF-8") == 1
    alone = run_script(
        "chat_ner.py", "--base_model", base_dir, *options[2:], "--only_cpu", cwd=workspace, stdin="你好\n"
    )
    assert "LoRA: 无" in alone.stderr and f"Response:  {free}\n\n\n" in alone.stdout


def test_chat_answers_a_file(workspace, adapter, tmp_path):
    (tmp_path / "q.txt").write_text(
        f"你好\n{INSTRUCTION.replace(chr(10), chr(92) + 'n')}文本：王明\n", encoding="utf-8"
    )
    options = [f"--lora_model={adapter}", "--data_file", tmp_path / "q.txt", "--predictions_file", tmp_path / "a.json"]
    run_script("chat_ner.py", *options, "--interactive=False", "--max_new_tokens=4", cwd=workspace)
    answers = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert [sorted(answer) for answer in answers] == [["Input", "Output"]] * 2 and answers[0]["Input"] == "你好"


@pytest.fixture(scope="module")
def misfits(tmp_path_factory, adapter, base_dir, tokenizer_models):
    """Adapters and bases that do not go together."""
    folder = tmp_path_factory.mktemp("misfits")
    shutil.copytree(base_dir, folder / "narrow")
    config = json.loads((folder / "narrow" / "config.json").read_text())
    (folder / "narrow" / "config.json").write_text(json.dumps({**config, "hidden_size": 16}))
    shutil.copytree(base_dir, folder / "other_words")
    shutil.copy(tokenizer_models / "merged.model", folder / "other_words" / "tokenizer.model")
    shutil.copytree(adapter, folder / "original")
    (folder / "original" / "train_args.json").write_text(json.dumps({"data_name": "msra", "lora_r": 8}))
    shutil.copytree(adapter, folder / "broken")
    (folder / "broken" / "train_args.json").write_text('{"config": ')
    shutil.copytree(adapter, folder / "occupied" / "adapter_model")
    (folder / "occupied" / "predictions.jsonl").mkdir()
    (folder / "blank.txt").write_text("\n  \n\n")
    (folder / "texts.txt").write_text("王明在北京\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "script, options, message",
    [
        ("test.py", ["--data_name=nothing"], r"checkpoint/nothing: no adapter here in .*deepspeed train_trainer.py"),
        ("test.py", ["--lora_model=nowhere"], "nowhere: no adapter here"),
        ("test.py", ["--lora_model={adapter}/.."], "no adapter here .* is in .*/adapter_model and 2 more"),
        ("test.py", ["--data_name=mine", "--dev_path=nowhere"], "nowhere: no such file"),
        ("test.py", ["--data_name=mine", "--dev_path={adapter}"], "adapter_model: is a folder; name a file"),
        ("test.py", ["--lora_model={misfits}/original"], "original scripts.*retrain"),
        ("test.py", ["--lora_model={misfits}/broken"], "train_args.json: line 1"),
        (
            "test.py",
            ["--data_name=mine", "--lora_model={misfits}/occupied/adapter_model"],
            "predictions.jsonl: cannot be written .* name a copy of the adapter in another folder",
        ),
        (
            "predict.py",
            ["--lora_model={adapter}", "--base_model={misfits}/narrow"],
            "does not fit .*narrow: it changes .*, of size (32|88)",
        ),
        ("predict.py", ["--lora_model={adapter}", "--base_model={misfits}/other_words"], "not the one that .* trained"),
        ("predict.py", ["--lora_model={adapter}", "--base_model=nowhere-7b"], "nowhere-7b: no model here"),
        ("predict.py", ["--lora_model={adapter}", "--precision=int8"], "--precision=int8: expected auto"),
        ("predict.py", ["--text=a", "--input_path=b"], "give one of the two"),
        ("predict.py", ["--text="], "--text: is empty"),
        (
            "predict.py",
            ["--lora_model={adapter}", "--output_path={misfits}/broken/train_args.json/o"],
            "cannot be written",
        ),
        ("test.py", ["--data_name=mine", "--split=all"], "--split=all: expected train, dev or test"),
        ("test.py", ["--data_name=mine", "--split=test", "--dev_path=a"], "--dev_path and --split=test: give one of"),
        ("test.py", ["--data_name=mine", "--batch_size=0"], "--batch_size=0: expected 1 or more"),
        ("test.py", ["--data_name=mine", "--max_examples=0"], "--max_examples=0: expected 1 or more, or -1 for all"),
        ("test.py", ["--data_name=mine", "--constrained=yes"], "--constrained=yes: expected auto, True, False"),
        ("predict.py", ["--lora_model={adapter}", "--min_confidence=2"], "--min_confidence=2.0: expected 0 to 1"),
        ("predict.py", ["--lora_model={adapter}", "--resume"], "--resume needs --output_path"),
        (
            "predict.py",
            ["--input_path={misfits}/texts.txt", "--output_path={misfits}/narrow/../texts.txt"],
            "texts.txt: is the input; name another file",
        ),
        ("predict.py", ["--input_path=nowhere"], "nowhere: no such file"),
        ("predict.py", ["--input_path={misfits}/blank.txt"], "blank.txt: the file holds only blank lines"),
        ("predict.py", ["--input_path=/dev/null"], "/dev/null: is a pipe or device; name a file"),
        ("chat_ner.py", ["--data_file={misfits}/blank.txt"], "blank.txt: the file holds only blank lines"),
        ("chat_ner.py", ["--interactive=False"], "--interactive=False needs --data_file"),
        ("chat_ner.py", ["--top_p=0"], "--top_p=0.0: expected more than 0, at most 1"),
        ("chat_ner.py", [f"--seed={2**64}"], "--seed=18446744073709551616: expected 0 to 4294967295"),
        ("chat_ner.py", ["--interactiv"], "did you mean --interactive?"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(workspace, adapter, misfits, script, options, message):
    options = [option.format(adapter=adapter, misfits=misfits) for option in options]
    result = run_script(script, *options, cwd=workspace, check=False)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(errors) == 1 and re.search(message, errors[0]), result.stderr
    assert "Traceback" not in result.stderr


def test_the_default_base_is_the_trainers():
    import train_deepspeed
    import train_trainer

    assert train_deepspeed.CONFIG["model_dir"] == train_trainer.CONFIG["model_dir"] == DEFAULT_BASE
    different = {"save_dir"}
    keys = [key for key in train_deepspeed.CONFIG if key not in different]
    assert list(train_trainer.CONFIG) == list(train_deepspeed.CONFIG)
    assert all(train_trainer.CONFIG[key] == train_deepspeed.CONFIG[key] for key in keys)


@pytest.mark.slow
def test_ctrl_c_while_the_libraries_load_is_no_traceback(tmp_path):
    command = [sys.executable, "-X", "importtime", str(ROOT / "test.py")]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler
        ),  # a shell's background job ignores it
    ) as process:
        while "config_utils" not in (line := process.stderr.readline()):
            assert line
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGINT and "Traceback" not in stderr, stderr[-2000:]
