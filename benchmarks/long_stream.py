"""Memory of predict.py over a long stream of sentences.

    python benchmarks/long_stream.py                       # a million sentences, ended after 25 minutes
    python benchmarks/long_stream.py --minutes=0           # to the end

Makes --sentences sentences, no two of them equal, gives them to predict.py with the demo's adapter, and looks at its resident
memory and at the rows on disk. Prints a table; after --minutes it ends predict.py as Ctrl-C would. Linux.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from alpaca.common.start import start

start()

from alpaca.common.errors import UserError
from config_utils import run_script

CONFIG = {
    "sentences": 1_000_000,  # how many are made
    "minutes": 25.0,  # ended after so many; 0: never
    "rows": 50_000,  # a line of the table each time that so many more rows are on disk
    "max_new_tokens": 16,  # most tokens of an answer
    "work_dir": "benchmarks/work",  # folder for sentences and rows; git-ignored
}
PEOPLE = [surname + name for surname in "王李张刘陈杨赵黄周吴" for name in ("明", "华", "晓岚", "立群", "文舟", "建国")]
PLACES = "北京 上海 杭州 苏州 昆明 长沙 广州 成都 武汉 西安".split()
ACTS = "说 看 想 听 写".split()


def sentence(number):
    """The sentence of a number: a person, a place and the number itself."""
    person, place = PEOPLE[number % len(PEOPLE)], PLACES[number // 7 % len(PLACES)]
    if number % 4 == 0:
        return f"第{number}天，天气渐渐凉了。"
    return f"{person}去年在{place}{ACTS[number // 3 % len(ACTS)]}了{number}次。"


def memory_of(pid):
    """MiB of a process that are in memory now."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def main(args):
    work = Path(args.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    texts, output = work / "sentences.txt", work / "sentences.jsonl"
    with texts.open("w", encoding="utf-8") as file:
        file.writelines(sentence(number) + "\n" for number in range(args.sentences))
    output.unlink(missing_ok=True)
    command = [sys.executable, ROOT / "predict.py", f"--input_path={texts}", f"--output_path={output}"]
    start, rows, read, shown, first = time.time(), 0, 0, 0, None
    process = subprocess.Popen([*map(str, command), f"--max_new_tokens={args.max_new_tokens}"])
    print("| rows | seconds since the first row | MiB |\n|---|---|---|")
    while process.poll() is None:
        time.sleep(0.5)
        if output.exists():
            with output.open("rb") as file:
                file.seek(read)
                new = file.read()
            rows, read = rows + new.count(b"\n"), read + len(new)
        if rows and first is None:
            first = time.time()
        if rows >= shown and first:
            print(f"| {rows} | {time.time() - first:.0f} | {memory_of(process.pid):.0f} |", flush=True)
            shown = max(1000, (rows // args.rows + 1) * args.rows) if rows >= 1000 else 1000
        if args.minutes and time.time() - start > 60 * args.minutes:
            process.send_signal(signal.SIGINT)
            process.wait()
    if first is None:
        raise UserError("predict.py has written no row; see above")
    rate = rows / (time.time() - first)
    print(f"\n{rows} rows, {rate:.1f} a second: a million would take {1e6 / rate / 3600:.1f} hours")


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)
