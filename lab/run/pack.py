"""One archive of a run to copy home: the small files, and the weights that it was tested with."""

import contextlib
import io
import json
import shutil
import tarfile
import time
from pathlib import Path

from lab.errors import UserError
from lab.run import checkpoints
from lab.run.checkpoints import broken, read_manifest, tested_or_newest_checkpoint
from lab.run.files import whole_file
from lab.run.stored import PACKED, SCRIPTS, locked, prepare_folder, read_config, tested_names


def pack(cfg, say):
    """--pack: writes <run>.tar.gz to the current folder: small files, and the weights
    a run was tested with."""
    for name in cfg.pack:
        folder = Path(name).resolve()
        config = read_config(folder)
        if config.get("script") not in SCRIPTS:
            raise UserError(f"{name} is no run: name a run folder")
        prepare_folder(cfg.out or ".")
        with contextlib.closing(locked(folder)):  # refused while the run is written
            pack_run(folder, config, Path(cfg.out or "."), say)


def pack_run(folder, config, out, say):
    """Writes the archive of a run that nobody writes to, and says what is in it."""
    kept, target = packed_checkpoints(folder), out / f"{folder.name}.tar.gz"
    if missing := set(tested_names(folder) or ["none"]) - set(kept):
        say(f"WARNING its tested weights ({', '.join(missing)}) are not whole: they are not inside")
    small = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name[0] != "."]
    if links := [path for path in small if path.resolve() != path]:  # they may show anything of this box
        say(f"WARNING {len(links)} link(s) are not inside: {links[0].relative_to(folder)} ...")
    small = [path for path in small if path not in links]
    small = [path for path in small if path.relative_to(folder).parts[0] != "checkpoints"]
    whole = [folder / "checkpoints" / name / "model.safetensors" for name in kept]
    needed = sum(path.stat().st_size for path in (*small, *whole))
    if (free := shutil.disk_usage(out).free) < 1.02 * needed + 1e6:
        room = f"{out} has {free / 1e6:.0f} MB free, the archive needs {needed / 1e6:.0f}"
        raise UserError(f"{room}: free some, or use another --out")
    inside = Path("runs/smoke" if config.get("smoke") else "runs") / folder.parent.name / folder.name
    write_archive(target, folder, inside, small, kept)
    every = sum(path.stat().st_size for path in folder.glob("checkpoints/*/*"))
    left = (every - sum(path.stat().st_size for path in whole)) / 1e6
    size, weights = target.stat().st_size / 1e6, f"weights {', '.join(kept) or 'none'}"
    say(f"{target}  {size:.1f} MB  {len(small)} files, {weights}")
    say(f"  left out {left:.1f} MB: optimizer state, other checkpoints")
    if config["script"] == "run_lora":
        say(f"  its base is not inside: {config['constants']['model']}")
    say(f"  at home, in the project's folder: tar xzf {target.name}")


def packed_checkpoints(folder) -> list[str]:
    """The checkpoints that the run was tested with, or the newest whole one; empty where there is none."""
    tested = tested_names(folder)
    whole = [name for name in tested if broken(folder / "checkpoints" / name) is None]
    if whole and len(whole) == len(tested):
        return list(dict.fromkeys(whole))
    with contextlib.suppress(UserError):
        return [tested_or_newest_checkpoint(folder)]
    return []


def write_archive(target, folder, inside, small, kept):
    """Writes the archive atomically, with manifests that list what is in it. inside: the path there."""
    # weights hardly shrink: the fastest compression
    with whole_file(target, "wb") as file, tarfile.open(None, "w:gz", file, compresslevel=1) as archive:
        for path in small:
            archive.add(path, inside / path.relative_to(folder))
        for name in kept:
            checkpoint, weights = Path("checkpoints") / name, "model.safetensors"
            position = read_manifest(folder / checkpoint)
            hashes = {weights: position.pop("files")[weights]}
            archive.add(folder / checkpoint / weights, inside / checkpoint / weights)
            manifest = json.dumps(checkpoints.manifest(position, hashes))
            add_text(archive, inside / checkpoint / "manifest.json", manifest)
        add_text(archive, inside / PACKED, f"packed {time.ctime()}: no optimizer state, no resume\n")


def add_text(archive, name, text):
    entry = tarfile.TarInfo(str(name))
    entry.size, entry.mtime = len(text.encode()), time.time()
    archive.addfile(entry, io.BytesIO(text.encode()))
