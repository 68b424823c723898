"""Cross-evaluation: every run of a study on the test part of every text, whatever it was trained on."""

from dataclasses import replace
from pathlib import Path

from lab.measure.held_out import measure_text
from lab.run.checkpoints import read_manifest, tested_checkpoints
from lab.run.files import short_hash, write_lines
from lab.run.stored import out_folder
from lab.train.processes import on_main


def evaluate(plan, text, runs, load_model, poll) -> dict:
    """Makes the missing files: arm -> text -> files like losses.jsonl, one a seed. text: mixture.Text;
    load_model(folder, world) -> (constants, model, tokenizer)."""
    world, losses = plan.world, {}
    for arm, folder in [(arm, folder) for arm, folders in runs.items() for folder in folders]:
        files = on_main(world, files_of, plan, text, folder)
        missing = on_main(world, not_there, files)
        if missing:
            cfg, model, _ = load_model(folder, world)
            cfg = replace(cfg, eval_batch=plan.cfg.eval_batch)
        for name in missing:
            measured = measure_text(model, cfg, text, name, "test", world, poll)
            on_main(world, write_losses, Path(files[name]), measured.lines("test"))
        for name, file in files.items():
            losses.setdefault(arm, {}).setdefault(name, []).append(file)
        done = f"measured  {folder.name} on {', '.join(missing)}" if missing else f"known  {folder.name}"
        plan.say(done)
    return losses


def write_losses(path, lines):
    """Writes lines like losses.jsonl, and before them their hash."""
    write_lines(path, [{"hash": short_hash(lines)}, *lines])


def not_there(files) -> list[str]:
    """Names of the files that do not exist yet."""
    return [name for name, path in files.items() if not Path(path).exists()]


def files_of(plan, text, folder) -> dict[str, str]:
    """text -> file of a run's losses on it, named by a hash of weights, text and windows."""
    weights = read_manifest(folder / "checkpoints" / tested_checkpoints(folder)[0])["files"]
    out, files = out_folder(plan.cfg, plan.script) / "cross", {}
    for name, tokens in text.tokens.items():
        size = len(tokens.parts["test"]), plan.cfg.block_size
        key = [weights["model.safetensors"], tokens.fingerprint, *size]
        files[name] = str(out / f"{folder.name}-{name}-{short_hash(key, 12)}.jsonl")
    return files
