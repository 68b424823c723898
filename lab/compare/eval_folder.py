"""The folders below runs/eval/, of what eval.py measured or had answered: their names and small files."""

import contextlib
import shlex
import sys
from pathlib import Path

from lab.compare.tables import slug
from lab.data.paths import is_there
from lab.run.checkpoints import tested_or_newest_checkpoint
from lab.run.files import (
    ROW_FILES,
    read_sealed,
    row_hashes,
    short_hash,
    write_json,
    write_lines,
    write_sealed,
)
from lab.run.provenance import device_name, git_state


def called(name) -> str:
    """A model in a table: the last part of its name; of what lies in a run (merged, say) the run's, too."""
    path = Path(name)
    return f"{path.parent.name}/{path.name}" if is_there(path.parent / "checkpoints") else path.name


def folder_of(subject, data, cfg, root) -> Path:
    """<root>/<model>-<data>-<hash of their paths and of the flags that figures and answers depend on>."""
    words = "-".join(slug(Path(name).name) for name in (subject.name, data))
    known = [str(Path(name).resolve()) if is_there(name) else name for name in (subject.name, data)]
    known += [getattr(cfg, name) for name in ("max_documents", "text_column", "context", "stride")]
    known += [] if subject.script else [cfg.template, cfg.max_length, cfg.dtype]
    known += [cfg.tokenizer] if cfg.tokenizer else []
    typed = cfg.typed.flags & ({"template", "max_length"} if subject.script else set())  # a run may lack them
    known += [[name, getattr(cfg, name)] for name in sorted(typed)]
    known += [["max_new_tokens", cfg.max_new_tokens]] if cfg.max_new_tokens else []
    return Path(root) / f"{words}-{short_hash(known, 6)}"


def about(subject, kind, constants, world) -> dict:
    """config.json of such a folder, without facts. Rank 0's: it hashes a checkpoint."""
    config = {"script": "eval", "kind": kind, "constants": constants, "facts": {}, "preset": None}
    config |= {"command": shlex.join(sys.argv), "device": device_name(world), "git": git_state()}
    return config | ({"checkpoint": tested_or_newest_checkpoint(subject.name)} if subject.script else {})


def write_measured(folder, subject, kind, constants, found, seconds, world):
    """Rank 0: writes config.json, the rows and, last, result.json of other_data.Measured; the old one goes
    first. What the folder says of answers stays."""
    config = about(subject, kind, constants, world) | {"facts": {"fingerprint": {"data": found.fingerprint}}}
    result = {"status": "finished", "step": 0, "seconds": seconds}
    result |= {f"test/{name}": value for name, value in found.metrics.items()}
    folder.mkdir(exist_ok=True)
    kept = _sealed(folder / "config.json").get("answers")
    (folder / "result.json").unlink(missing_ok=True)
    name, lines = found.file
    write_lines(folder / name, lines)
    write_sealed(folder / "config.json", config | ({"answers": kept} if kept else {}))
    write_sealed(folder / "result.json", result | {"files": row_hashes(folder)})


def write_answers(folder, subject, constants, rows, world):
    """Rank 0: writes responses.json, and what the answers come from: a folder of answers alone is theirs, one
    that was measured, too, says it under `answers`."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "responses.json", rows)
    config, before = about(subject, "rows", constants, world), _sealed(folder / "config.json")
    config["answers"] = {name: config[name] for name in ("constants", "command", "git")}
    config["answers"] |= {name: config[name] for name in ("checkpoint",) if name in config}
    if before and any((folder / name).exists() for name in ROW_FILES):
        return write_sealed(folder / "config.json", before | {"answers": config["answers"]})
    write_sealed(folder / "config.json", config)
    write_sealed(folder / "result.json", {"status": "finished", "step": 0})


def _sealed(path) -> dict:
    """A sealed file; empty where it is absent or damaged."""
    with contextlib.suppress(OSError, ValueError):
        return read_sealed(path)
    return {}
