"""A corpus file -> examples of instruction data."""

from tqdm import tqdm

from alpaca.common.errors import UserError
from alpaca.common.text_files import read_lines
from alpaca.corpora.json_lines import read_json_sentences
from alpaca.corpora.tagged_columns import read_tagged_sentences, split_columns
from dataset import format_answer


def detect_format(path):
    """ "jsonl" or "bio", by the first line that is not empty."""
    line = next((line for _, line in read_lines(path) if line.strip()), "")
    if split_columns(line):
        return "bio"
    if line.lstrip().startswith("{"):
        return "jsonl"
    raise UserError(
        f"{path}: neither JSON lines nor 字<tab>标签, the first line is {line[:40]!r}; see process.py --help"
    )


def example_of_sentence(sentence, path, labels, instruct, query_prefix, problems):
    """A Sentence -> an example of instruction data; entities that cannot be answered with are left out and reported."""
    text, entities = sentence.text, []
    for begin, end, tag, entity, line in sentence.marks:
        if tag not in labels:
            known = ",".join(f"{key}:{name}" for key, name in labels.items())
            raise UserError(f"{path}:{line}: unknown entity type {tag!r}; name it: --labels={known},{tag}:名称")
        if not 0 <= begin < end <= len(text) or text[begin:end] != entity:
            problems.add(
                "mismatch", path, line, f"{entity!r}，文本 [{begin}, {end}) 处是 {text[max(begin, 0) : end]!r}"
            )
        elif "\n" in entity or "\r" in entity:
            problems.add("newline", path, line, repr(entity))
        else:
            entities.append({"entity": entity, "type": labels[tag], "begin": begin, "end": end})
    entities.sort(key=lambda e: (e["begin"], -e["end"]))
    return {
        "instruct": instruct,
        "query": query_prefix + text,
        "answer": format_answer(entities),
        "text": text,
        "entities": [e for i, e in enumerate(entities) if e not in entities[:i]],
    }


def convert(path, form, labels, instruct, query_prefix, problems):
    """A corpus file -> list of examples, in the order of the file."""
    form = detect_format(path) if form == "auto" else form
    sentences = read_json_sentences(path) if form == "jsonl" else read_tagged_sentences(path, problems)
    examples = []
    for sentence in tqdm(sentences, desc=str(path), unit=" 句", delay=1, disable=None):
        if sentence.text.strip():
            examples.append(example_of_sentence(sentence, path, labels, instruct, query_prefix, problems))
        else:
            problems.add("empty", path, sentence.line, repr(sentence.text))
    if not examples:
        raise UserError(f"{path}: no sentence in it")
    return examples
