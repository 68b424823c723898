"""Measures a language model on other data than its own: text in sliding windows, or rows of instructions."""

import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from lab.data.blocks import Windows
from lab.data.builtin import BUILT_IN
from lab.data.cache import BadRows, cached_rows, write_ids
from lab.data.instructions import Examples, load_instructions
from lab.data.paths import text_files
from lab.data.tables import LOOK, columns_of, hub_split, require_columns, stream_rows
from lab.data.templates import COLUMNS
from lab.data.text import Corpus, documents, pieces, text_fingerprint
from lab.data.tokenizers import AS_TEXT, begin_ids, token_bytes, tokenizer_fingerprint
from lab.errors import UserError
from lab.measure.language import evaluate, loss_lines
from lab.measure.statistics import language_metrics
from lab.measure.tuning import spelt_bytes
from lab.train.processes import on_main

LONGEST_WINDOW = 2048  # tokens, unless --context asks for more: a model may advertise 131,072 of them


@dataclass
class Measured:
    """What a set of data gave."""

    metrics: dict  # of language_metrics, or a report card
    lines: list[str]  # what to tell the user
    file: tuple[str, list[dict]]  # name and lines of the .jsonl by which --compare pairs rows
    fingerprint: str  # of the data
    constants: dict  # what it depends on, beside model and data


def kind_of(data, text_column) -> str:
    """text, or rows of instructions; UserError for a table that is neither."""
    if data == "python-instructions":
        return "rows"
    if data in BUILT_IN or text_files(data):
        return "text"
    first = list(itertools.islice(stream_rows(data, streaming=True), LOOK))
    columns = set(columns_of(first))
    if {*COLUMNS} & columns and text_column not in columns:
        return "rows"
    if {"instruction", "output"} <= columns or text_column in columns:
        return "rows" if "instruction" in columns else "text"
    where = f"{data} (or a column {text_column!r} of texts)"
    require_columns(first, ("instruction", "output"), where)
    raise UserError(f"{data} cannot be measured: use text, or rows with instruction and output")


def was_trained_on(fingerprint, facts) -> bool:
    """Whether data of this hash are among those that a run read, by its facts: of a mixture its sources, for
    there `data` is the neutral text, which nobody trains on."""
    known = facts.get("fingerprint", {})
    return fingerprint in known.get("sources", {"": known.get("data")}).values()


def split_of(data) -> dict[str, str]:
    """{"split": ...} of a Hub set: which of its splits is measured; empty for anything else."""
    split = None if data in (*BUILT_IN, "python-instructions") else hub_split(data)
    return {"split": split} if split else {}


def split_lines(data, split) -> list[str]:
    """Says which split of a Hub set is measured (`split_of`), and how to name another."""
    other = "the id with #validation behind it is another one"
    return [f"split {name} of {data}: {other}" for name in split.values()]


def documents_key(source, tokenizer) -> dict:
    """All that the cached documents depend on."""
    words = tokenizer_fingerprint(tokenizer)
    return {
        "fingerprint": {"data": text_fingerprint(source), "tokenizer": words, "begin": begin_ids(tokenizer)},
        "end": tokenizer.eos_token_id,
        "corpus": [source.data, source.text_column, source.max_documents],
    }


def write_documents(folder, source, tokenizer) -> dict:
    """Token ids of each document, begin and end token included; gives bytes and lines to keep beside them."""
    bad, sizes = BadRows(), []
    write_ids(folder, document_ids(source, tokenizer, bad, sizes), "uint32")
    if not sum(sizes):
        column = f"a table with a column {source.text_column!r}"
        raise UserError(f"{source.data} holds no text: use text files, or {column}")
    lines = bad.report(len(sizes) + len(bad.rows), source.data)
    return {"integers": "uint32", "bytes": sum(sizes), "lines": lines}


def document_ids(source, tokenizer, bad, sizes):
    """Yields the token ids of each document; appends its bytes to `sizes` and adds unusable rows to `bad`."""
    begin = begin_ids(tokenizer) or [tokenizer.eos_token_id]
    for opens in documents(source, bad):
        ids, size = list(begin), 0
        with opens() as stream:
            for text in pieces(stream):
                ids += tokenizer(text, **AS_TEXT).input_ids
                size += len(text.encode())
        sizes.append(size)
        yield [*ids, tokenizer.eos_token_id]


def measure_text(data, stored, model, tokenizer, cfg, world, poll) -> Measured:
    """Text by sliding windows; rows of losses.jsonl are windows, intervals redraw documents or stretches."""
    most = model.config.block_size
    context = cfg.context or min(most, LONGEST_WINDOW)
    stride = cfg.stride or max(1, context // 2)
    if context > most:
        raise UserError(f"--context {context} is over the {most} positions of the model")
    if stride > context:
        raise UserError(f"--stride {stride} is over the {context} tokens of a window: use half of them")
    source, split = Corpus(data, "", cfg.text_column, cfg.max_documents), on_main(world, split_of, data)
    rows = cached_rows(world, "measured", documents_key, write_documents, source, tokenizer)
    documents = [rows.tokens[start:end] for start, end in itertools.pairwise(rows.offsets)]
    windows = Windows(documents, context, stride, begin_ids(tokenizer))
    sizes = token_bytes(tokenizer)
    sums = evaluate(model, windows, stored, world, poll)
    spelt = np.array([sizes[ids].sum() for ids in windows.target_ids()])
    groups = windows.groups()
    counts = f"{len(documents)} documents, {int(sums[:, 2].sum()):,} targets"
    lines = [
        *split_lines(data, split),
        *rows.columns["lines"],
        f"{counts}, windows of {context}, stride {stride}",
    ]
    if not cfg.context and context < most:
        lines.append(f"the model holds {most:,} tokens: --context for longer windows")
    size = rows.columns["bytes"]
    if abs(spelt.sum() - size) > 1e-3 * size:
        both = f"the tokens spell {spelt.sum():,} bytes, the text has {size:,}"
        lines.append(f"{both}: bits are per byte of the text")
    if spelt.sum():
        spelt = spelt * (size / spelt.sum()) if spelt.sum() != size else spelt
    file = "losses.jsonl", loss_lines("test", np.arange(len(windows)), groups, sums, spelt)
    constants = {"text_column": cfg.text_column, "context": context, "stride": stride} | split
    metrics = language_metrics(sums, groups, byte_counts=spelt)
    return Measured(metrics, lines, file, rows.fingerprint["data"], constants)


def measure_rows(data, stored, model, tokenizer, cfg, world, poll) -> Measured:
    """Answers of instruction rows as targets, under the template and the length that the model was taught."""
    shape = {"template": cfg.template, "max_length": min(cfg.max_length, model.config.block_size)}
    shape = {name: getattr(stored, name, value) for name, value in shape.items()}
    asked = SimpleNamespace(data=data, model="", max_documents=cfg.max_documents, **shape)
    rows = load_instructions(asked, world, tokenizer)
    whole, most = rows.prompt_lengths + rows.answer_lengths + 1, shape["max_length"]
    fits = np.flatnonzero(rows.first_targets < np.minimum(whole, most))
    if not len(fits):
        raise UserError(f"the prompts of all {len(rows)} rows fill {most} tokens: use a model with more")
    split = on_main(world, split_of, data)
    examples, lines = Examples(rows, fits, most), [*split_lines(data, split), *rows.lines]
    if cut := int((whole[fits] > most).sum()):
        lines.append(f"{cut} row(s) are cut at {most} tokens: they lose the end of the answer")
    if left := len(rows) - len(fits):
        lines.append(f"{left} row(s) are left out: their prompts alone fill {most} tokens")
    sums = evaluate(model, examples, stored, world, poll)
    spelt, groups = spelt_bytes(examples), rows.groups[fits]
    file = "losses.jsonl", loss_lines("test", rows.numbers[fits], groups, sums, spelt)
    metrics = language_metrics(sums, groups, byte_counts=spelt)
    return Measured(metrics, lines, file, rows.fingerprint["data"], shape | split)
