"""What tuning on instructions says and measures: announcement, validation line, final figures, forgetting."""

import hashlib
import itertools
from dataclasses import fields
from pathlib import Path

import numpy as np

from lab.data.blocks import Blocks
from lab.data.cache import BadRows
from lab.data.instructions import Examples, Instructions, examples_of, load_instructions
from lab.data.split import final_parts
from lab.data.text import Corpus, split_pieces
from lab.data.tokenizers import AS_TEXT, document_start, token_bytes
from lab.errors import OutOfMemory, UserError
from lab.measure.answers import shortened, write_responses
from lab.measure.language import evaluate, loss_lines, unigram_alarm
from lab.measure.statistics import bootstrap, language_metrics, plus_minus
from lab.models.lora import base_weights, narrow_base
from lab.run import terminal
from lab.run.checkpoints import state_sha256
from lab.run.files import write_lines
from lab.run.provenance import refuse_other_data
from lab.run.stored import is_run, read_config, script_of
from lab.train.batches import is_out_of_memory
from lab.train.loss import IGNORE_INDEX
from lab.train.optim import count_parameters
from lab.train.processes import World, main_first, on_main


def plain_blocks(corpus, tokenizer, block_size, most) -> Blocks:
    """Held-out plain text: the first `most` blocks of a corpus' test documents (of its validation documents
    where it keeps none for a test). UserError if it has none."""
    ids, part = [], "test" if corpus.test_share else "val"
    for of, text, begins in split_pieces(corpus, BadRows()):
        if of == part:
            ids += document_start(tokenizer) if begins else []  # a long one comes in pieces
            ids += tokenizer(text, **AS_TEXT).input_ids
        if len(ids) > most * block_size:
            break
    if len(ids) < 2:
        raise UserError(f"{corpus.data} has no held-out document: use several files, or python-docs")
    return Blocks(np.array(ids[: most * block_size + 1]), block_size)


def base_text(base) -> Corpus | None:
    """The text that a base was trained on, and its held-out part, where it is a run of gpt_scratch.py."""
    if not is_run(base) or script_of(base) != "gpt_scratch":
        return None
    constants = read_config(base)["constants"]
    names = {field.name for field in fields(Corpus)} & constants.keys()
    return Corpus(**{name: constants[name] for name in names} | {"tokenizer": ""})


def plain_corpus(cfg) -> Corpus:
    """cfg.plain; otherwise the text that the base was trained on, or python-docs where none is known."""
    return Corpus(cfg.plain, "") if cfg.plain else base_text(cfg.model) or Corpus("python-docs", "")


def never_seen(base, name) -> bool:
    """Whether the base, as far as is known of it, was not trained on the text `name`."""
    known = base_text(base)
    return base.startswith("tiny:") or bool(known and Path(known.data).name != Path(name).name)


def plain_text(run, cfg, tokenizer) -> Blocks | None:
    """Held-out plain text on which forgetting is measured; none without plain_blocks. A resume that finds
    another is refused."""
    if not cfg.plain_blocks:
        return None
    sizes = cfg.max_length, cfg.plain_blocks
    try:
        plain = main_first(run.world, plain_blocks, plain_corpus(cfg), tokenizer, *sizes)
    except UserError as error:
        why = "" if cfg.plain else f", the text of {cfg.model}: name another, or use --plain_blocks 0"
        raise UserError(f"--plain: {error}{why}") from None
    run.pin("plain", hashlib.sha256(plain.tokens.tobytes()).hexdigest())
    return plain


def announce(run, cfg, parts, units, lines, model, total_steps):
    """Says how large the model is (the journal's table: parameters, MB, trainable) and how the data is used.
    units: of the training part, examples or packs; lines: on rows that are cut or left out."""
    (total, trainable), examples = count_parameters(model), parts["train"]
    counts, data = "  ".join(f"{name} {len(part)}" for name, part in parts.items()), examples.data
    run.say(f"model {cfg.model}  {total / 1e6:.1f}M parameters, {trainable / 1e6:.1f}M trainable   {counts}")
    run.begin(total_steps)  # all input is good
    run.say(f"parameters {total:,}  {4 * total / 2**20:.2f} MB in fp32  trainable {trainable:,}")
    run.say(f"data {cfg.data}  {len(data)} rows, {len(set(data.groups))} prompts  split {cfg.split}")
    for line in [*data.lines, *lines]:
        run.say(line)
    tokens, targets = examples.lengths.mean(), examples.targets(range(len(examples))).mean()
    longest = int(examples.lengths.max())
    run.say(f"train rows have {tokens:.0f} tokens (longest {longest}), {targets:.0f} of them targets")
    if cfg.pack:
        most, packs = int(units.lengths.max()), len(units)
        rows, fill = len(examples) / packs, units.lengths.mean() / most
        run.say(f"{packs} packs of at most {most} tokens hold {rows:.1f} rows each and are {fill:.0%} full")
        run.say(f"a batch of {cfg.batch} packs is one of some {cfg.batch * rows:.0f} rows")
    if left := len(units) % cfg.batch:
        what = f"{left} of {len(units)} {'packs' if cfg.pack else 'rows'}"
        run.say(f"each epoch leaves out {what} (other ones each time): they fill no batch of {cfg.batch}")


def describe_example(examples, example=0) -> str:
    """Lines that show what the loss masks and counts in one example, decoded from its ids."""
    labels, row = examples.pair(example)[1], examples.rows[example]
    ids = examples.data.whole(row)[: len(labels) + 1]  # the last label is -100 where a later prompt is cut
    tokens = [(ids[0], False), *zip(ids[1:], (x != IGNORE_INDEX for x in labels), strict=True)]
    lines, counted = [], sum(is_target for _, is_target in tokens)
    for is_target, some in itertools.groupby(tokens, key=lambda token: token[1]):
        text = terminal.one_line(examples.data.tokenizer.decode([token for token, _ in some]))
        lines.append(f"  {'counted:' if is_target else 'masked: '} {shortened(text)}")
    counts = f"{counted} targets, {len(tokens) - counted} tokens masked"
    number = examples.data.numbers[row]
    return "\n".join([f"the loss sees row {number}: {counts}; padding is masked", *lines])


def batch_facts(units, chosen) -> dict:
    """Figures of a global batch: targets, share of padding if padded to its longest
    row, length of that row."""
    lengths = units.lengths[chosen]
    return {
        "targets": int(units.targets(chosen).sum()),
        "pad_share": float(1 - lengths.sum() / (len(lengths) * lengths.max())),
        "longest": int(lengths.max()),
    }


def hold_base(run, cfg, model, world) -> tuple[str, str]:
    """Moves a model with adapters to the device, frozen matrices in cfg.base_dtype. Returns the base's hash,
    by which a resume knows it, and that of what is held now."""
    sha256 = state_sha256(base_weights(model))
    run.pin("base_sha256", sha256)
    narrow_base(model, cfg.base_dtype).to(world.device)
    return sha256, state_sha256(base_weights(model)) if cfg.base_dtype == "bf16" else sha256


def require_same_base(run, model, held_sha256):
    """Behind training: the frozen base is what hold_base held."""
    if state_sha256(base_weights(model)) != held_sha256:
        raise RuntimeError("weights of the frozen base have changed: this is a bug")
    run.say("the base is unchanged (checksum)")


def spike_rows(cfg, model, examples, chosen, world) -> dict:
    """What a spiking step read, for spikes.jsonl: numbers, lengths and losses (without dropout) of `chosen`
    examples, and the texts of the first and the worst."""
    seen = Examples(examples.data, examples.rows[chosen], examples.max_length, examples.loss_on_prompt)
    rows = {"rows": examples.data.numbers[seen.rows].tolist(), "lengths": seen.lengths.tolist()}
    try:
        sums = evaluate(model, seen, cfg, World(device=world.device))
    except OutOfMemory:  # gradients and all else of a step are there, too: no reason to end the run
        return rows
    losses = sums[:, 0] / sums[:, 2]
    texts = [examples.data.tokenizer.decode(seen.pair(i)[0]) for i in (0, int(losses.argmax()))]
    rows |= {"row_losses": losses.round(4).tolist(), "first_row": texts[0], "worst_row": texts[1]}
    return rows


def measure(part, sums, examples, train) -> tuple[dict, list[dict]]:
    """Makes figures and lines of losses.jsonl from the sums of `evaluate`."""
    spelt = spelt_bytes(examples)
    groups, numbers = (facts[examples.rows] for facts in (examples.data.groups, examples.data.numbers))
    metrics = language_metrics(sums, groups, unigram_losses(examples, train), spelt)
    return metrics, loss_lines(part, numbers, groups, sums, spelt)


def spelt_bytes(examples) -> np.ndarray:
    """(rows,): bytes of each row's targets; of a whole answer those of its text,
    whatever a tokenizer adds."""
    data, sizes = examples.data, token_bytes(examples.data.tokenizer)
    spelt = np.array([sizes[ids].sum() for ids in examples.target_ids()], dtype=np.int64)
    answers = np.array([data.learnt_bytes(row) for row in examples.rows], dtype=np.int64)
    whole = data.prompt_lengths[examples.rows] + data.answer_lengths[examples.rows] == examples.lengths
    return spelt if examples.loss_on_prompt else np.where(whole, answers, spelt)


def own_data(cfg, world, tokenizer, facts) -> Instructions:
    """Loads the rows that a run was trained on. UserError if cfg.data has changed.
    `facts`: of config.json."""
    data = load_instructions(cfg, world, tokenizer)
    refuse_other_data(facts["fingerprint"], data.fingerprint, cfg.data)
    return data


def remeasure(model, tokenizer, cfg, facts, world, poll) -> tuple[dict, dict[str, list]]:
    """The figures of a run's own val and test rows, measured again; lines of losses.jsonl by its name."""
    parts, result = examples_of(own_data(cfg, world, tokenizer, facts), cfg)[0], {}
    for part in final_parts(cfg):
        sums = evaluate(model, parts[part], cfg, world, poll)
        metrics, losses = measure(part, sums, parts[part], parts["train"])
        result |= {f"{part}/{name}": value for name, value in metrics.items()}
    return result, {"losses.jsonl": losses}


def unigram_losses(examples, train) -> np.ndarray:
    """(examples,): summed loss of each example's targets under the token frequencies
    of the training targets."""
    return np.array([-train.log_frequencies[labels].sum() for labels in examples.target_ids()])


def report_validation(run, at, val, is_best, steps_per_epoch):
    """Says and logs validation figures; warns if the loss has not fallen for half an epoch."""
    step, where = at.step, at.where
    lowest = run.state.setdefault("lowest", [val["loss"], step])
    run.state.setdefault("before", val["loss"])
    if val["loss"] < lowest[0]:
        lowest[:] = val["loss"], step
    loss = plus_minus(val["loss"], val["loss_interval"], 4)
    accuracy = plus_minus(val["accuracy"], val["accuracy_interval"])
    perplexity, best = f"perplexity {val['perplexity']:.2f}", "  -> best" if is_best else ""
    run.say(f"{where}  val  loss {loss}  {perplexity}  accuracy {accuracy}{best}")
    if step - lowest[1] >= 0.5 * steps_per_epoch:
        epochs, low = (step - lowest[1]) / steps_per_epoch, f"lowest {lowest[0]:.4f} at step {lowest[1]}"
        run.say(f"{where}  val  no fall for {epochs:.2g} epochs ({low}): OVERFITTING if train falls")
    run.metrics(step, {f"val/{name}": val[name] for name in ("loss", "perplexity", "accuracy")})


def plain_losses(run, cfg, plain, model, poll) -> np.ndarray:
    """(blocks, 2): summed loss and targets of each block of plain text."""
    return evaluate(model, plain, cfg, run.world, poll)[:, [0, 2]]


def forgetting(run, cfg, plain, model) -> dict:
    """Loss on plain text after training minus before, with an interval over blocks (paired)."""
    before, after = np.array(run.state["plain"]), plain_losses(run, cfg, plain, model, run.poll)
    targets = after[:, 1]
    values = np.c_[before[:, 0], after[:, 0], after[:, 0] - before[:, 0]] / targets[:, None]
    old, new, more = np.average(values, axis=0, weights=targets).tolist()
    interval = bootstrap(values, np.arange(len(values)), weights=targets).tolist()[2]
    name, base = cfg.plain or plain_corpus(cfg).data, vars(cfg).get("init_from") or cfg.model
    word = "forgotten" if more > 0 else "gained"
    is_new = never_seen(base, name)
    if is_new:
        word = f"{'higher' if more > 0 else 'lower'} by"
    change = plus_minus(abs(more), sorted([-end for end in interval] if more < 0 else interval), 4)
    change = "nothing has changed" if not values[:, 2].any() else f"{word} {change}"
    run.say(f"plain text of {name}  loss {old:.4f} before, {new:.4f} after: {change}")
    if is_new:
        run.say("(the base never saw this text: nothing of it can be forgotten)")
    return {
        "plain/before": old,
        "plain/after": new,
        "plain/forgotten": more,
        "plain/forgotten_interval": interval,
    }


def alarm(run, step, part, figures) -> str | None:
    """A sentence if training has taught nothing in `step` steps."""
    lowest, before = run.state["lowest"], run.state["before"]
    if step and not lowest[0] < before:
        return f"NOT LEARNING: validation never fell below the {before:.4f} before training"
    names = ("loss", "unigram_loss", "above_unigram_interval")
    return unigram_alarm({n: figures[f"{part}/{n}"] for n in names}, f"{part} loss") if step else None


def fastest_form(run, model, merge):
    """merge(model), or the model as it is where memory has no room for a second one."""
    try:
        return merge(model)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    run.say("NOTE no memory for a merged copy: answers take longer")
    return model


def final_figures(run, cfg, parts, plain, model, merge=None) -> dict:
    """Final figures: loss, perplexity, accuracy on val and test; forgetting; answers to the test rows; an
    alarm if nothing was learnt. merge(model): the form that generates fastest, if not its own."""
    result, done = {}, ""
    for part in final_parts(cfg):
        sums = evaluate(model, parts[part], cfg, run.world, run.poll)
        m, losses = measure(part, sums, parts[part], parts["train"])
        result |= {f"{part}/{name}": value for name, value in m.items()}
        loss, accuracy = (plus_minus(m[k], m[f"{k}_interval"], n) for k, n in (("loss", 4), ("accuracy", 3)))
        perplexity = f"perplexity {m['perplexity']:.2f}"
        guess = f"unigram loss {m['unigram_loss']:.4f}"
        run.say(f"{part:5} loss {loss}  {perplexity}  accuracy {accuracy}  {guess}")
        done = f"done  {part} loss {m['loss']:.4f}  {perplexity}"
    on_main(run.world, write_lines, run.folder / "losses.jsonl", losses)
    if sentence := alarm(run, run.step, part, result):
        run.say(sentence)
        result["alarm"] = sentence
    if plain:
        result |= forgetting(run, cfg, plain, model)
    if cfg.final_eval and cfg.answer_rows != 0:
        result |= write_responses(run, cfg, parts, fastest_form(run, model, merge) if merge else model)
    if spikes := run.state.get("spikes", 0):
        run.say(f"spikes  {spikes} of {run.step} steps, {run.state['left_out']} left out (spikes.jsonl)")
    run.say(f"{done}  {run.seconds / 60:.1f} min")
    run.say(f"all figures: {run.folder}/result.json")
    run.say(f"questions: python {run.script.name} --mode ask --run {run.folder}")
    run.say(f"next: python eval.py --run {run.folder}")
    return result
