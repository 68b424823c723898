"""Damages good inputs at random and asks: the right result, or one line that says what is wrong?

    python tests/fuzz.py --seconds 60 --seed 7
    python tests/fuzz.py --seconds 60 --seed 7 --only tables    # or another: --help

Another exception, a message of several lines, rows that the file does not hold, or ten seconds without an end
are failures: each is printed with its case number, which with the same seed makes it again (--case).
"""

import argparse
import bz2
import contextlib
import csv
import faulthandler
import gzip
import io
import json
import lzma
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from damage import DAMAGES, cut, flip, splice, zeros  # noqa: E402
from fuzz_models import check_constants, check_model, templates  # noqa: E402
from fuzz_runs import check_checkpoints, check_run, template  # noqa: E402

from lab.data import instructions, pair_layouts, paths, problems, tables, text  # noqa: E402
from lab.data.cache import BadRows, cached_folder  # noqa: E402
from lab.errors import UserError  # noqa: E402

PATIENCE = 10  # seconds of one case
WORDS = [
    "river",
    'a "quoted" word',
    "comma, here",
    "two\nlines",
    "ü €",
    "\u2028",
    "漢字",
    "\U0001f600",
    "nan",
    "",
]


class Hang(BaseException):
    """A case took longer than PATIENCE."""


def ring(*_):
    raise Hang


# --------------------------------------------------------------------------------------- rows and their files


def some_rows(rng) -> list[dict]:
    """Rows of one of the kinds that scripts read, of odd texts."""
    kind, n = rng.choice(["instructions", "pairs", "problems", "text"]), rng.randint(1, 8)
    return [ROWS[kind](rng, number) for number in range(n)]


def words(rng) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))


def instruction_row(rng, number) -> dict:
    return {"instruction": f"{number} {words(rng)}", "input": words(rng), "output": words(rng)}


def pair_row(rng, number) -> dict:
    texts = {name: json.dumps([words(rng)]) for name in ("prompt", "response_a", "response_b")}
    winners = rng.choice(["100", "010", "001"])
    names = ("winner_model_a", "winner_model_b", "winner_tie")
    return {"id": str(number)} | texts | dict(zip(names, winners, strict=True))


def problem_row(rng, number) -> dict:
    options = " , ".join(f"{letter} ) {rng.randint(1, 99)}" for letter in "abcde")
    return {"Problem": f"{number} {words(rng)}", "options": options, "correct": rng.choice("abcde")}


def text_row(rng, number) -> dict:
    return {"id": str(number), "text": words(rng)}


ROWS = {"instructions": instruction_row, "pairs": pair_row, "problems": problem_row, "text": text_row}


def as_csv(rows, rng, delimiter=",") -> bytes:
    out = io.StringIO()
    quoting = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    ends = rng.choice(["\n", "\r\n"])
    table = csv.DictWriter(out, list(rows[0]), quoting=quoting, lineterminator=ends, delimiter=delimiter)
    table.writeheader()
    table.writerows(rows)
    return rng.choice([b"", b"\xef\xbb\xbf"]) + out.getvalue().encode()


def as_tsv(rows, rng) -> bytes:
    return as_csv(rows, rng, "\t")


def as_json(rows, rng) -> bytes:
    space, ascii_only = rng.choice(["", "\n", " \r\n\t"]), rng.random() < 0.5
    content = rng.choice([rows, {"version": 1, "data": rows}]) if len(rows) > 1 else rows
    body = json.dumps(content, indent=rng.choice([None, 1]), ensure_ascii=ascii_only)
    return (space + body + rng.choice(["", "\n"])).encode()


def as_lines(rows, rng) -> bytes:
    ends, ascii_only = rng.choice(["\n", "\r\n", "\n\n"]), rng.random() < 0.5
    indent = rng.choice([None, None, 2])
    return "".join(json.dumps(r, ensure_ascii=ascii_only, indent=indent) + ends for r in rows).encode()


def as_parquet(rows, rng) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    packing = rng.choice(["snappy", "gzip", "zstd", "none"])
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, out, compression=packing, write_page_checksum=True)
    return out.getvalue()


def as_arrow(rows, rng) -> bytes:
    import pyarrow
    import pyarrow.ipc

    table, out = pyarrow.Table.from_pylist(rows), io.BytesIO()
    opened = rng.choice([pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
    with opened(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


FORMATS = {".csv": as_csv, ".tsv": as_tsv, ".json": as_json, ".jsonl": as_lines, ".ndjson": as_lines,
           ".parquet": as_parquet, ".arrow": as_arrow}  # fmt: skip


def packed(content, packing) -> bytes:
    if packing == ".zst":
        import pyarrow

        return pyarrow.compress(content, codec="zstd", asbytes=True)
    return {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[packing](content)


def zipped(name, content, rng) -> bytes:
    out = io.BytesIO()
    method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr(f"{rng.choice(['', 'inside/'])}{name}", content)
        archive.writestr("README.md", "what this is")
    return out.getvalue()


def write_file(folder, rows, rng) -> Path:
    """A good file of the rows, of any format, packing and spelling of its suffix."""
    suffix = rng.choice(list(FORMATS))
    content, packing = (
        FORMATS[suffix](rows, rng),
        rng.choice(["", "", "", ".gz", ".bz2", ".xz", ".zst", ".zip"]),
    )
    if packing == ".zip":
        name, content = "train.zip", zipped(f"train{suffix}", content, rng)
    elif packing:
        name, content = f"train{suffix}{packing}", packed(content, packing)
    else:
        name = f"train{suffix}"
    path = folder / (name.upper() if rng.random() < 0.2 else name)
    path.write_bytes(content)
    return path


# ---------------------------------------------------------------------------------------------------- damages


def damage_file(path, rng) -> tuple[Path, object]:
    """Damages the bytes, and now and then the name. Returns where the file is now, and the damage."""
    damage = rng.choice(DAMAGES)
    path.write_bytes(damage(path.read_bytes(), rng))
    if rng.random() < 0.1:
        other = rng.choice(
            [".csv", ".json", ".jsonl", ".parquet", ".arrow", ".zip", ".gz", ".txt", ".foo", ""]
        )
        path = path.rename(path.with_suffix(other))
    return path, damage


# ----------------------------------------------------------------------------------------------------- checks


def meant(rows, form) -> list[dict]:
    """Rows as a reader should give them: in CSV, where everything is text, the text nan is a missing cell."""
    if form not in (".csv", ".tsv"):
        return rows
    return [{k: None if v in tables.MISSING else v for k, v in row.items()} for row in rows]


def check_good(rng, folder):
    """A file that is as it should be gives its rows, whatever its format."""
    rows = some_rows(rng)
    path = write_file(folder, rows, rng)
    try:
        (file,) = paths.table_files(str(path), "train")
        found = tables.read_rows(str(path))
    except UserError as error:
        raise AssertionError(f"{path.name} is a good file, and was refused: {error}") from None
    if found != meant(rows, file.form):
        raise AssertionError(f"{path.name} was read as something else: {found} for {rows}")
    use(rng, str(path), rows)


def check_damaged(rng, folder):
    """A damaged file is refused, or its rows are of the header's columns and go through what scripts do."""
    rows = some_rows(rng)
    good = write_file(folder, rows, rng)
    (file,) = paths.table_files(str(good), "train")
    path, kind = damage_file(good, rng)
    found = tables.read_rows(str(path))
    form, packing = paths.form_of(path.name)
    summed = packing in (".gz", ".bz2", ".xz") or form == ".zip"  # these hold sums of what they hold
    if ((summed and kind in (flip, cut, zeros)) or (packing == ".zst" and kind is cut)) and found != meant(
        rows, file.form
    ):
        raise AssertionError(f"{path.name}: damaged, and read as something else: {found} for {rows}")
    if form in (".csv", ".tsv") and len({tuple(row) for row in found}) > 1:
        raise AssertionError(f"{path.name}: rows of several widths: {found}")
    use(rng, str(path), found)


def use(rng, name, rows):
    """What the scripts do with rows. What they make of them can be written as UTF-8."""
    for call in rng.sample([use_instructions, use_pairs, use_unlabelled, use_problems, use_text], 2):
        with contextlib.suppress(UserError):
            one_line(call, name, rows)


def one_line(call, *args):
    """call(*args); its UserError must be of one line."""
    try:
        return call(*args)
    except UserError as error:
        if "\n" in str(error) or not str(error):
            raise AssertionError(f"a message of several lines: {error!r}") from None
        raise


def use_instructions(name, rows):
    json.dumps(instructions.usable_columns(rows, name), ensure_ascii=False).encode()


def use_pairs(name, rows):
    json.dumps(pair_layouts.usable_rows(rows, name), ensure_ascii=False).encode()


def use_unlabelled(name, rows):
    tables.require_columns(rows, ("id",), name)
    json.dumps(pair_layouts.rows_to_judge(rows, name), ensure_ascii=False).encode()


def use_problems(name, rows):
    problems.official_parts(name)
    json.dumps(problems.usable_rows([(None, row) for row in rows], name), ensure_ascii=False).encode()


def use_text(name, rows):
    corpus = text.Corpus(name, "bytes", val_share=0.2, test_share=0.2)
    for _, piece, _ in text.split_pieces(corpus, BadRows()):
        piece.encode()


def check_text(rng, folder):
    """Files of text, in folders, packed or zipped, damaged or not."""
    whole = "\n".join(words(rng) for _ in range(30))
    content = whole.encode()
    name = f"a{rng.choice(['.txt', '.md', '.TXT'])}"
    packing = rng.choice(["", "", ".gz", ".zst", ".zip"])
    if packing == ".zip":
        name, content = "a.zip", zipped(name, content, rng)
    elif packing:
        name, content = name + packing, packed(content, packing)
    damaged = rng.random() < 0.8
    (folder / name).write_bytes(rng.choice(DAMAGES)(content, rng) if damaged else content)
    (folder / "README.md").write_text("what this is")
    where = str(rng.choice([folder, folder / name]))
    if where == str(folder) and packing == ".zip":  # a zip in a folder is no text
        return
    corpus = text.Corpus(where, "bytes", val_share=0.2, test_share=0.2)
    found = "".join(piece for _, piece, _ in text.split_pieces(corpus, BadRows()))
    if not damaged and found != whole:
        raise AssertionError(f"{name} was read as something else: {found!r} for {whole!r}")


def check_names(rng, folder):
    """What a name may mean that is no file: pipes, devices, folders, names that no disk takes."""
    os.mkfifo(folder / "train.csv")
    os.symlink("loop.csv", folder / "loop.csv")
    (folder / "dir.csv").mkdir()
    names = [
        "train.csv",
        "loop.csv",
        "dir.csv",
        "x" * 300,
        "a\0b",
        "\udcff",
        "gone.csv",
        "train.csv/x",
        "",
        "...",
    ]
    name = rng.choice(
        [*(str(folder / name) for name in names), str(folder), "/dev/zero", "/dev/stdin", "x" * 5000]
    )
    calls = [tables.read_rows, tables.data_fingerprint, paths.text_files, problems.official_parts]
    one_line(rng.choice(calls), name)


def check_caches(rng, folder):
    """A damaged cache folder is made anew, with the same bytes."""
    content = rng.randbytes(200)
    cached = Path(cached_folder(folder / "cache_1", write_cache, content))
    path = rng.choice(sorted(cached.rglob("*.*")))
    if rng.random() < 0.2:
        path.unlink()
    else:
        path.write_bytes(rng.choice([cut, flip, splice, zeros])(path.read_bytes(), rng))
    with contextlib.redirect_stderr(io.StringIO()):
        again = Path(cached_folder(folder / "cache_1", write_cache, content))
    if (again / "tokens.bin").read_bytes() != content or (again / "sub" / "meta.json").read_text() != "{}":
        raise AssertionError(f"{path.name}: a damaged cache was believed")


def write_cache(folder, content):
    (folder / "tokens.bin").write_bytes(content)
    (folder / "sub").mkdir()
    (folder / "sub" / "meta.json").write_text("{}")


CHECKS = {"tables": [check_good, check_damaged, check_damaged, check_damaged], "text": [check_text],
          "names": [check_names], "caches": [check_caches], "runs": [check_run],
          "checkpoints": [check_checkpoints], "constants": [check_constants],
          "models": [check_model]}  # fmt: skip


def run_case(seed, number, checks) -> str:
    """One case, a function of seed and number. Returns right, refused, or FAILED with what happened."""
    rng = random.Random(f"{seed}/{number}")
    check = rng.choice(checks)
    with tempfile.TemporaryDirectory() as folder:
        try:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE)
            one_line(check, rng, Path(folder))
            return "right"
        except UserError:
            return "refused"
        except Hang:
            return f"FAILED {check.__name__}: no end in {PATIENCE} s\n{traceback.format_exc()}"
        except Exception:
            return f"FAILED {check.__name__}\n{traceback.format_exc()}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def run(seed, seconds=None, cases=None, only=None, first=0) -> tuple[Counter, list[str]]:
    """Runs so many seconds or cases. Returns how often what came out, and the failures."""
    checks = [check for name, some in CHECKS.items() if only in (None, name) for check in some]
    if {check_run, check_checkpoints} & {*checks}:
        template()  # the runs that are copied: no case's time
    if check_model in checks:
        templates()
    before = signal.signal(signal.SIGALRM, ring)
    counts, failures, began, number = Counter(), [], time.monotonic(), first
    try:
        while number - first < cases if cases is not None else time.monotonic() - began < seconds:
            outcome = run_case(seed, number, checks)
            counts[outcome.split()[0]] += 1
            if outcome.startswith("FAILED"):
                failures.append(f"case {number} {outcome}")
            number += 1
    finally:
        signal.signal(signal.SIGALRM, before)
    return counts, failures


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(CHECKS))
    parser.add_argument("--case", type=int, help="this one alone, with the same seed and --only")
    given = parser.parse_args()
    faulthandler.enable()  # a library may crash the process
    cases = None if given.case is None else 1
    counts, failures = run(given.seed, given.seconds, cases, given.only, given.case or 0)
    for failure in failures[:20]:
        print(failure)
    print(
        f"seed {given.seed}: {sum(counts.values())} cases, "
        + ", ".join(f"{n} {w}" for w, n in counts.items())
    )
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
