"""test.py fits confidences that predict.py then says, and compares answers with gold.     python -m pytest tests/answering/test_confidence.py"""

import importlib.util
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import predict
from alpaca.answering.confidence import add_margins
from alpaca.answering.generate import Request, answer_requests
from alpaca.answering.texts import load_answering, prompt_encoder
from alpaca.common.errors import UserError
from alpaca.models.adapters import find_adapter
from alpaca.models.base import load_base_tokenizer
from alpaca.models.tokenizer import EOS
from alpaca.scoring.calibration import CALIBRATION, out_of_fold, read_calibration, scored
from alpaca.scoring.errors import different
from config_utils import parse_config
from dataset import INSTRUCT, format_answer, read_examples
from harness import ROOT, make_records, write_jsonl

spec = importlib.util.spec_from_file_location("test_command", ROOT / "test.py")  # `import test` is the library's own
test_command = importlib.util.module_from_spec(spec)
spec.loader.exec_module(test_command)
SHORT = ["--data_name=mine", "--precision=fp32", "--max_new_tokens=20"]
DEV, RUN = Path("data/mine/instruct_data/dev.txt"), Path("checkpoint/mine/train_trainer")
OUTPUT, BESIDE = RUN / "predictions.jsonl", RUN / "adapter_model" / CALIBRATION
NOTE = RUN / "predictions.jsonl.run.json"


def arguments(module, *options):
    return parse_config(module.CONFIG, module.__file__, [*SHORT, *map(str, options)])


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory, workspace):
    """A folder to work in: an adapter that answers at random, and dev data of which it is right the oftener, the surer."""
    folder, draw = tmp_path_factory.mktemp("confidence"), random.Random(0)
    shutil.copytree(workspace / RUN / "adapter_model", folder / RUN / "adapter_model")
    weights = load_file(folder / RUN / "adapter_model" / "adapter_model.safetensors")
    torch.manual_seed(0)
    weights = {name: torch.randn_like(t) if "lora_B" in name else t for name, t in weights.items()}
    save_file(weights, folder / RUN / "adapter_model" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        DEV.parent.mkdir(parents=True)
        records = make_records(170, 6)
        long = "王明去年在北京说新闻。" * 40
        records[1] |= {"text": long, "query": "文本：" + long, "answer": "王明_人名", "entities": None}
        write_jsonl(DEV, records)
        test_command.main(arguments(test_command))
        BESIDE.unlink(missing_ok=True)
        rows = read_rows(OUTPUT)
        scores = sorted(entity["log_probability"] for row in rows for entity in row["entities"])
        assert len(scores) > 230
        for number, (record, row) in enumerate(zip(records, rows, strict=True)):
            right = []
            for entity in row["entities"]:
                sure = scores.index(entity["log_probability"]) / len(scores)
                if entity["spans"] and (number == 1 or draw.random() < 0.1 + 0.8 * sure):
                    right += [{**entity, "begin": begin, "end": end} for begin, end in entity["spans"]]
            right = right[number == 1 :]  # of the long text one place is left out
            record.update(answer=format_answer(right))
            record["entities"] = [{key: e[key] for key in ("entity", "type", "begin", "end")} for e in right]
        wrong = next(i for i, row in enumerate(rows) if i > 1 and any(e["spans"] for e in row["entities"]))
        records[wrong] |= {"answer": "鑫鑫_人名", "entities": None}  # which no text holds
        write_jsonl(DEV, records)
        test_command.main(arguments(test_command))
        yield folder


@pytest.fixture(scope="module")
def rows(work):
    return read_rows(OUTPUT)


def confidences(rows):
    return [entity["confidence"] for row in rows for entity in row["entities"]]


def test_the_whole_dev_set_of_an_adapter_calibrates_it(rows):
    """On disk beside the adapter; each row says what it makes of a line's probability, the figures what it does out of fold."""
    facts, found = json.loads(BESIDE.read_text(encoding="utf-8")), scored(rows)
    assert facts["entities"] == len(found.rows) > 230 and facts["right"] == found.right.sum() > 50
    calibration = read_calibration(BESIDE.parent)
    assert all(row["calibrated"] is True for row in rows)
    assert confidences(rows) == [round(float(c), 4) for c in calibration.confidence(found.log_probabilities)]
    metrics = json.loads((RUN / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["calibration"]["n"] == len(found.rows) and 0 < metrics["calibration"]["error"] < 0.15
    assert metrics["calibration"]["log_loss"] == pytest.approx(
        -math.fsum(math.log(c if hit else 1 - c) for c, hit in zip(out_of_fold(found), found.right, strict=True))
        / len(found.rows)
    )
    report = (RUN / "report.html").read_text(encoding="utf-8")
    assert report.count("<polyline") == 3 and "由另外九折数据得出" in report


def test_predict_says_what_test_measured(rows, base_dir, tmp_path):
    """The same entities, places and confidences, of a long text too; raw ones where something else was asked."""
    records = read_rows(DEV)
    asked = write_jsonl(tmp_path / "asked.txt", [{"text": r["text"]} for r in records])
    predict.main(arguments(predict, f"--input_path={asked}", f"--output_path={tmp_path}/o"))
    keys = ("text", "prediction", "entities", "calibrated", "log_probability", "problems")
    said = read_rows(tmp_path / "o")
    assert [[row.get(key) for key in keys] for row in said] == [[row.get(key) for key in keys] for row in rows]
    assert len(said[1]["text"]) > 400 and said[1]["prediction"] is not None
    predictions = {}
    other = write_jsonl(tmp_path / "other.txt", [{"text": "王明在北京"}, {"instruct": "说说", "text": "王明在北京"}])
    for options, calibrated in (
        ([], [True, False]),
        (["--constrained=True"], [True, True]),
        (["--constrained=False"], [False, False]),
        (["--instruct=" + INSTRUCT], [False, False]),
        (["--labels=人名"], [False, False]),
        ([f"--base_model={shutil.copytree(base_dir, tmp_path / 'copy')}"], [False, False]),
        ([f"--base_model={base_dir}"], [True, False]),
    ):
        predict.main(arguments(predict, f"--input_path={other}", f"--output_path={tmp_path}/o", *options))
        answered = read_rows(tmp_path / "o")
        assert [row["calibrated"] for row in answered] == calibrated, options
        for row in answered:
            raw = [round(min(math.exp(entity["log_probability"]), 1.0), 4) for entity in row["entities"]]
            assert row["calibrated"] or confidences([row]) == pytest.approx(raw, abs=1e-4)
        predictions["".join(options)] = [row["prediction"] for row in answered]
    # an instruction of a record's own is answered freely, as in a chat
    held, free = predictions["--constrained=True"], predictions["--constrained=False"]
    assert predictions[""] == [held[0], free[1]] and held[1] != free[1]


def test_other_data_are_rated_and_fit_nothing(rows, capsys, tmp_path):
    """Part of the dev set, another file, free answers; the adapter's own calibration is used where it applies."""
    before, kept = BESIDE.read_bytes(), {path: path.read_bytes() for path in (OUTPUT, NOTE)}
    copy = write_jsonl(tmp_path / "other.txt", read_rows(DEV)[:-9])
    for options, calibrated, own in (
        (["--max_examples=20"], True, True),
        ([f"--dev_path={copy}"], True, False),
        (["--constrained=False", "--max_examples=5"], False, None),
    ):
        test_command.main(arguments(test_command, *options))
        tested = read_rows(OUTPUT)
        assert all(row["calibrated"] is calibrated for row in tested), options
        error = json.loads((RUN / "metrics.json").read_text(encoding="utf-8"))["calibration"]["error"]
        assert (error is not None) == (own is False), options  # of so small a part there are too few for ten folds
        assert BESIDE.read_bytes() == before
    assert "没有校准" in capsys.readouterr().out
    for path, content in kept.items():
        path.write_bytes(content)


def test_an_interrupted_test_comes_to_the_same(rows):
    """Whether rows are missing, or only what is done once all are there."""
    before, expected = BESIDE.read_bytes(), OUTPUT.read_bytes()
    for size in (len(expected) // 2, len(expected)):
        OUTPUT.write_bytes(expected[:size])
        BESIDE.unlink()
        test_command.main(arguments(test_command, "--resume"))
        assert OUTPUT.read_bytes() == expected and BESIDE.read_bytes() == before


def test_rows_of_an_earlier_version_are_refused(rows):
    """They hold another confidence and no score."""
    kept, facts = OUTPUT.read_bytes(), json.loads(NOTE.read_text(encoding="utf-8"))
    NOTE.write_text(json.dumps({key: value for key, value in facts.items() if key != "rows"}), encoding="utf-8")
    with pytest.raises(UserError, match="its rows were made with rows None, this run has rows entities with log_prob"):
        test_command.main(arguments(test_command, "--resume"))
    assert OUTPUT.read_bytes() == kept
    NOTE.write_text(json.dumps(facts), encoding="utf-8")


def test_margins(rows, workspace):
    """What the model said is so much likelier than gold as it finds them itself; of windows the sum."""
    args = arguments(test_command)
    adapter, train_args, facts = find_adapter("mine", "auto")
    tokenizer = load_base_tokenizer(adapter, train_args, facts, None, None, "auto")
    answering = load_answering(args, adapter, train_args, facts, tokenizer, facts["labels"], facts["nested"])
    examples = read_examples(DEV)
    assert {i for i, row in enumerate(rows) if "margin" in row} == {*different(rows)}
    assert [row["answer"] for row in rows if row.get("margin", 0) is None] == ["鑫鑫_人名"]
    (cut,) = answering.cut([examples[1]])
    assert len(cut.parts) > 1
    for i, parts, windows in (
        (next(i for i in different(rows) if i > 1 and rows[i]["margin"] is not None), None, None),
        (1, cut.parts, cut.windows),
    ):
        row = rows[i]
        parts = parts if windows else [examples[i]]
        golds = [row["answer"]]
        if windows:
            spans = [{**e, "begin": b, "end": end} for e in row["gold"] for b, end in e["spans"]]
            golds = [format_answer([s for s in spans if w.begin <= s["begin"] < s["end"] <= w.end]) for w in windows]
            assert any(gold != "没有" for gold in golds)
        total = 0.0
        for part, gold in zip(parts, golds, strict=True):
            (prompt,) = prompt_encoder(answering.tokenizer)([part])
            given = [*answering.tokenizer.encode_texts([gold])[0], EOS]
            request = Request(0, prompt, part["text"], given)
            rules = answering.model, answering.tokenizer, iter([request]), 20, 1, answering.grammar
            ((_, answer),) = [pair for pairs in answer_requests(*rules) for pair in pairs]
            total += answer.log_probability
        assert row["margin"] == pytest.approx(row["log_probability"] - total, abs=2e-3)
    again = [{**row, "margin": 7.0} if "margin" in row else row for row in rows]
    add_margins(answering, examples, again)  # a test that goes on does not compute them twice
    assert {row["margin"] for row in again if "margin" in row} == {7.0}
