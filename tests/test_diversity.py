"""run_pretrain_diversity.py: the arms of a study differ in text alone, and a study survives whatever ends it.
test_mixture.py has the parts, test_task2vec.py the coefficient, test_laws.py a run by itself.
"""

import itertools
import json
import math
import random
import re
import shutil
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from ranks import everywhere, launch
from test_corpus import documents_of

import core
import run_pretrain_diversity as script
from core import UserError, World
from lab.compare import diversity_report
from lab.data import mixture, tables
from lab.measure import diversity, task2vec

NAME = "run_pretrain_diversity"
WORDS = {
    "a": ["gene", "cell", "protein", "of", "the", "in", "patient", "was", "with", "study"],
    "b": ["claim", "device", "method", "wherein", "said", "a", "the", "first", "layer", "invention"],
    "c": ["gene", "cell", "protein", "claim", "device", "web", "page", "click", "here", "and", "the"],
}
SOURCES = ["--sources", "a=a.jsonl", "b=b.jsonl", "c=c.jsonl"]
ARMS = ["--arms", "a", "b", "a+b", "--data", "a+b", "--neutral", "c"]
TINY = [
    *("--smoke", *SOURCES, *ARMS, "--max_documents", "none", "--tokenizer", "bytes"),
    *("--val_share", 0.2, "--test_share", 0.2, "--held_out_tokens", 1500),
    *("--n_embd", 16, "--n_head", 2, "--n_layer", 1, "--block_size", 16, "--batch", 6, "--max_steps", 6),
    *("--eval_rows", 12, "--eval_batch", 32, "--eval_every", 4, "--save_every", 3, "--log_every", 3),
    *("--diversity_batches", 3, "--diversity_batch", 4, "--diversity_length", 12, "--head_epochs", 1),
    *("--floor_repeats", 2),
]


def tiny(*argv) -> list:
    """TINY and more flags; a list given anew (flags with several words add up) takes the place of TINY's."""
    flags = list(TINY)
    for name in {"--sources", "--arms"}.intersection(map(str, argv)):
        start = flags.index(name)
        stop = next(i for i in range(start + 1, len(flags)) if str(flags[i]).startswith("--"))
        del flags[start:stop]
    return [*flags, *argv]


def write(name, texts):
    Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def texts_of(name, n=150) -> list[str]:
    rng = random.Random(name)
    return [f"{i} " + " ".join(rng.choices(WORDS[name], k=rng.randint(20, 60))) for i in range(n)]


@pytest.fixture
def sources():
    for name in WORDS:
        write(f"{name}.jsonl", texts_of(name))


def parsed(*argv) -> script.Config:
    return core.parse_config(
        script.Config, script.PRESETS, script.SMOKE, script.__doc__, [str(word) for word in argv]
    )


def go(*argv, size=1, out="out", **options) -> str:
    """The script, expected to end well; returns what it printed."""
    codes = launch(NAME, "--out", out, *tiny(*argv), size=size, **options)
    said = Path("out.txt").read_text()
    assert codes == [0] * size, said
    return said


def study_of(out="out") -> dict:
    """study.json of the only study there."""
    (path,) = Path(out).glob("study-*/study.json")
    return json.loads(path.read_text())


def run_folders(out="out") -> dict[str, Path]:
    """arm-seed -> folder; each run is there once."""
    found = {}
    for path in sorted(Path(out).glob("*/config.json")):
        constants = json.loads(path.read_text())["constants"]
        name = f"{constants['data'].replace('+', '_')}-s{constants['seed']}"
        assert name not in found, f"{path.parent} is {found[name]} again"
        found[name] = path.parent
    return found


JOBS = 3 * 3 * 2 + 2 * 3  # of the arms each batch twice, for the floor; of the bounds once


def kept_in(out="out") -> list[Path]:
    """Files of embeddings."""
    return sorted(Path(out).glob("embeddings/*.npy"))


def crossed_in(out="out") -> list[Path]:
    return sorted(Path(out).glob("cross/*.jsonl"))


def results_of(out="out") -> dict[str, dict]:
    return {tag: json.loads((folder / "result.json").read_text()) for tag, folder in run_folders(out).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder in which a study has run to its end, on one rank and undisturbed: not to be written to."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in WORDS:
            write(f"{name}.jsonl", texts_of(name))
        Path("said.txt").write_text(go())
    return folder


def study_here(*argv) -> script.DiversityStudy:
    """Of the sources in the current folder."""
    cfg = core.with_dtype(parsed(*tiny("--out", "out", *argv)), World())
    return script.DiversityStudy(cfg, World(), script.open_text(cfg, World()), Path("x"), print, lambda: None)


def plan_of(folder) -> tuple[diversity.Draws, list]:
    """(Draws, jobs) of the coefficients of a study, whose probe is its last arm's first run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        s = study_here()
        draws = script.draws_of(s, s.text.tokenizer)
        return draws, diversity.plan(s.cfg, draws, results_of()["a_b-s0"]["weights_sha256"], torch.float32)


@pytest.fixture
def copied(whole):
    """The current folder as a copy of it."""
    shutil.copytree(whole, ".", dirs_exist_ok=True)
    return Path(".")


PARTS = ("matrix", "differences", "diversity")


def same_study(found, want, tolerance=0.0, parts=PARTS):
    """Every figure of two studies, whose constants are the same but for what the call says."""

    def flat(tree, path=""):
        if isinstance(tree, dict | list):
            items = tree.items() if isinstance(tree, dict) else enumerate(tree)
            return {name: value for key, one in items for name, value in flat(one, f"{path}/{key}").items()}
        return {path: tree}

    found, want = (flat({part: one[part] for part in parts}) for one in (found, want))
    assert found.keys() == want.keys() and len(want) > 100
    for name, value in want.items():
        if isinstance(value, float):
            assert found[name] == pytest.approx(value, rel=0, abs=tolerance, nan_ok=True), name
        else:
            assert found[name] == value, name


def similar_coefficients(found, want):
    """By a probe whose weights differ in a last digit: another name, and so other targets are drawn."""
    floor = max(one["noise_floor"] for one in want["arms"].values())
    for kind in ("arms", "bounds", "cross"):
        assert found[kind].keys() == want[kind].keys()
        for name, one in want[kind].items():
            assert found[kind][name]["coefficient"] == pytest.approx(one["coefficient"], abs=floor)


# the journal's run


def test_the_journals_preset_is_the_journals_run():
    cfg = parsed("--preset", "journal")
    want = {
        **{"optimizer": "adamw", "lr": 5e-5, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "clip": 1.0},
        **{"schedule": "linear", "min_lr": 0.0, "warmup": 0.0, "dropout": 0.1, "dtype": "fp32", "seed": 42},
        **{"batch": 64, "max_steps": 20_000, "save_every": 2000, "block_size": 1024, "model": "gpt2"},
        **{"n_embd": 512, "n_layer": 8, "n_head": 8, "tokenizer": "gpt2", "passes": 1, "mode": "study"},
        **{"arms": ("pubmed", "uspto", "pubmed+uspto"), "neutral": "c4", "skip_spikes": False},
        **{"streaming": "CacheStream", "repeat": True, "max_documents": None, "max_tokens": None},
        **{"test_weights": "last", "tag": "journal"},
        **{"diversity_batches": 200, "diversity_batch": 512, "diversity_length": 128, "head_epochs": 10},
    }
    assert {name: getattr(cfg, name) for name in want} == want
    assert mixture.named_sources(cfg.sources) == {
        "pubmed": "ArmelR/the-pile-splitted:PubMed Abstracts",
        "uspto": "ArmelR/the-pile-splitted:UPSTO Backgrounds",
        "c4": "allenai/c4:en",
    }
    assert cfg.max_steps * cfg.batch * cfg.block_size == 1_310_720_000  # 1.31 billion tokens


def test_the_journals_rate_falls_in_a_line_from_the_first_step_to_zero():
    cfg = parsed("--preset", "journal")
    rates = [core.lr_at(cfg, step, cfg.max_steps) for step in (0, 5000, 10_000, 19_999)]
    assert rates == pytest.approx([5e-5, 3.75e-5, 2.5e-5, 2.5e-9], rel=1e-9)


def test_the_journals_model_has_its_parameters_to_the_unit():
    with torch.device("meta"):
        model = script.build_model(parsed("--preset", "journal"), 50_257)
    assert core.count_parameters(model) == (51_475_968, 51_475_968)
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.1}


def test_what_the_arms_of_the_journal_need_is_asked_of_their_sources():
    """A whole pool of each, whatever its share: what a mixture reads does not depend on the other arms."""
    sources, pool = script.sources_of(parsed("--preset", "journal")), 20_000 * 64 * 1024
    assert {name: one.max_tokens for name, one in sources.items()} == dict.fromkeys(
        ("pubmed", "uspto"), pool + 1024
    )
    assert all(one.streaming == "CacheStream" for one in sources.values())
    for arms in (["0.7*pubmed+0.3*uspto"], ["pubmed", "uspto"]):
        mixed = script.sources_of(parsed("--arms", *arms, "--passes", 2))
        assert [one.max_tokens for one in mixed.values()] == [pool // 2 + 1024] * 2
    assert script.sources_of(parsed("--max_tokens", 5000))["uspto"].max_tokens == 5000
    for flags in ([], ["--max_tokens", 5000], ["--preset", "journal"]):
        neutral = script.neutral_corpus(parsed(*flags))  # streamed, as far as its held-out part needs
        assert (neutral.data, neutral.max_tokens, neutral.streaming) == ("allenai/c4:en", 0, "True")
    assert all(
        one.held_out_tokens == 500_000 and not one.first_trains for one in (*sources.values(), neutral)
    )


def test_the_smoke_set_is_of_its_family_offline_and_trains_on_what_ranks_divide():
    cfg = parsed("--smoke", "--preset", "journal")
    assert cfg.schedule == "linear" and cfg.beta2 == 0.999 and cfg.dropout == 0 and cfg.lr == 6 * 5e-5
    assert {one.data for one in script.sources_of(cfg).values()} == {"python-code", "python-docs"}
    assert script.neutral_corpus(cfg).data == "numpy-docs"
    assert cfg.batch % 12 == 0 and cfg.probe == "study" and cfg.sources == ()


# documents that are held out


def test_no_held_out_document_of_any_text_is_trained_on_by_any_arm():
    """The same document may stand in several sources, and first in one of them."""
    shared = texts_of("a", 40)
    of = {"a": texts_of("a", 40) + texts_of("b", 60), "b": texts_of("b", 100)[::-1] + shared[::-1]}
    of["c"] = shared[::2] + texts_of("b", 100)[::3] + texts_of("c", 60)
    cfg = parsed(*tiny("--max_steps", 20, "--max_tokens", 10**6, "--held_out_tokens", 10**6))
    drawn = [mixture.open_text({"x": replace(one)}, "bytes", {}, World()) for one in prepared(cfg, of)]
    held = [set(documents_of(text.tokens["x"], part)) for text in drawn for part in ("val", "test")]
    first = next(iter(held[1]))  # a test document of a becomes the first of b and of c
    of = {name: [first, *(text for text in texts if text != first)] for name, texts in of.items()}
    list(prepared(cfg, of))
    text = script.open_text(cfg, World())
    assert list(text.tokens) == ["a", "b", "c"]
    parts = {
        (name, part): set(documents_of(tokens, part))
        for name, tokens in text.tokens.items()
        for part in ("train", "val", "test")
    }
    trained = parts["a", "train"] | parts["b", "train"]
    assert all(first in parts[name, "test"] for name in "abc")
    for (name, part), documents in parts.items():
        if part != "train":
            assert documents and not documents & trained, (name, part)
    for one, other in ("ab", "bc", "ac"):
        shared = set(of[one]) & set(of[other])
        assert len(shared & parts[one, "test"]) > 1, "they do share held-out documents"


def prepared(cfg, of):
    """Writes the sources; yields the Corpus of each."""
    for name, texts in of.items():
        write(f"{name}.jsonl", texts)
    yield from script.sources_of(cfg).values()
    yield script.neutral_corpus(cfg)


def test_a_larger_neutral_share_changes_the_neutral_text_alone_and_is_told(sources, monkeypatch, capfd):
    plain, cfg = parsed(*TINY), parsed(*tiny("--neutral_share", 0.45))
    shared = script.neutral_corpus(cfg)
    assert shared == replace(script.neutral_corpus(plain), val_share=0.45, test_share=0.45)
    assert script.sources_of(cfg) == script.sources_of(plain)
    said = in_process([*tiny("--neutral_share", 0.45), "--out", "out", "--mode", "cache"], monkeypatch, capfd)
    assert "NOTE --neutral_share: a document of the neutral text that a source holds too" in said


class Endless:
    """A set of the Hub without an end; one text after the other, `most` of them before the test fails."""

    cache_files = ()

    def __init__(self, most):
        self.most, self.read = most, 0

    def __iter__(self):
        for number in range(1, self.most):
            self.read = number
            yield {"text": f"{number} " + "click here and " * 1500}
        raise AssertionError(f"{self.most} documents were read")


@pytest.mark.parametrize("share", [0.5, 0.3, None])
def test_an_endless_neutral_text_is_read_as_far_as_its_held_out_part_needs(share, sources, monkeypatch):
    """With half of it in val and half in test there is no training text at all to wait for."""
    endless = Endless(400)
    everywhere(monkeypatch.setattr, tables, "_hub_dataset", lambda name, split, streaming=False: endless)
    everywhere(monkeypatch.setattr, tables, "_hub_commit", lambda repo, revision: "a commit")
    flags = ["--sources", "a=a.jsonl", "b=b.jsonl", "c=owner/endless", "--streaming", "CacheStream"]
    cfg = parsed(*tiny(*flags, *(["--neutral_share", share] if share else [])))
    neutral = script.open_text(cfg, World()).tokens["c"]
    assert endless.read < 120  # a group of some 50 in hand, and one ahead
    assert len(neutral.parts["train"]) <= 1 and neutral.documents["train"] == 0
    assert all(len(neutral.parts[part]) > 1500 for part in ("val", "test"))


# one study, looked at from all sides


def test_a_cell_of_the_matrix_is_the_mean_loss_of_the_runs_own_weights_on_that_text(whole, monkeypatch):
    monkeypatch.chdir(whole)
    study = study_of()
    for arm, tag in (("a", "a-s0"), ("a+b", "a_b-s0")):
        cfg, model, _ = script.load_model(run_folders()[tag], World())
        text = script.open_text(parsed(*TINY), World())
        for name in "abc":
            tokens = text.tokens[name]
            end, stream = tokens.tokenizer.eos_token_id, tokens.parts["test"].astype(np.int64)
            places = np.flatnonzero(stream == end)
            nats = hits = count = size = 0
            for begin, stop in itertools.pairwise(places):
                for at in range(begin, stop, cfg.block_size):
                    last = min(at + cfg.block_size, stop)  # the last window is moved back, to be a full one
                    first = max(begin, last - cfg.block_size)
                    ids = torch.from_numpy(stream[first : last + 1])
                    with torch.no_grad():
                        hidden = model.hidden(ids[None, :-1])[0]
                        log_probs = (hidden @ model.wte.weight.t()).log_softmax(-1)[at - first :]
                    targets = ids[at - first + 1 :]
                    nats -= log_probs[range(len(targets)), targets].double().sum().item()
                    hits += (log_probs.argmax(-1) == targets).sum().item()
                    count += len(targets)
                    size += (targets != end).sum().item()  # a byte each, and none for the end
            found = {
                figure: study["matrix"][figure][arm][name]["mean"] for figure in diversity_report.FIGURES
            }
            want = {
                "loss": nats / count,
                "accuracy": hits / count,
                "bits per byte": nats / size / math.log(2),
            }
            assert found == pytest.approx(want, abs=2e-5), (arm, name)


def test_the_figures_that_a_run_ends_with_are_those_of_the_study(whole, monkeypatch):
    monkeypatch.chdir(whole)
    losses, ended = study_of()["matrix"]["loss"], results_of()
    for arm, tag in {"a": "a-s0", "b": "b-s0", "a+b": "a_b-s0"}.items():
        assert losses[arm]["c"]["mean"] == pytest.approx(ended[tag]["test/loss"], abs=1e-6)
        assert losses[arm]["c"]["interval"] == pytest.approx(ended[tag]["test/loss_interval"], abs=1e-6)
        for name in mixture.shares_of(arm):
            assert losses[arm][name]["mean"] == pytest.approx(ended[tag][f"test/{name}/loss"], abs=1e-6)
        assert ended[tag]["blocks_read"] == {n: 36 * s for n, s in mixture.shares_of(arm).items()}


def test_a_difference_of_the_study_is_that_of_its_cells(whole, monkeypatch):
    monkeypatch.chdir(whole)
    study = study_of()
    losses, found = study["matrix"]["loss"], study["differences"]
    pairs = [(one["mixture"], one["against"], one["text"]) for one in found]
    assert pairs == [("a+b", arm, name) for name in "cba" for arm in "ab"]  # the neutral text first
    for one, (mixed, arm, name) in zip(found, pairs, strict=True):
        want = losses[mixed][name]["mean"] - losses[arm][name]["mean"]
        assert one["difference"] == pytest.approx(want, abs=1e-9)


def test_the_arms_of_a_seed_read_as_much_from_the_same_first_weights(whole, monkeypatch):
    monkeypatch.chdir(whole)
    facts = [core.read_config(folder)["facts"] for folder in run_folders().values()]
    assert len(facts) == 3 and len({one["initial_weights"] for one in facts}) == 1
    bare = [{k: v for k, v in one["ledger"].items() if k != "sources"} for one in facts]
    assert bare[0] == bare[1] == bare[2] and bare[0]["tokens"] == 6 * 6 * 16
    assert len({json.dumps(one["ledger"]["sources"]) for one in facts}) == 3
    assert len({one["weights_sha256"] for one in results_of().values()}) == 3


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("constants", "lr"), 1.0, "lr"),
        (("constants", "dropout"), 0.5, "dropout"),
        (("constants", "seed"), 1, "seed"),
        (("constants", "held_out_tokens"), 1, "held_out_tokens"),
        (("facts", "ledger", "steps"), 7, "ledger"),
        (("facts", "ledger", "tokens"), 1, "ledger"),
        (("facts", "ledger", "batch"), 1, "ledger"),
        (("facts", "ledger", "sources", "a", "order_sha256"), "another", "ledger"),
        (("facts", "fingerprint", "sources", "b"), "another", "fingerprint"),
        (("facts", "fingerprint", "data"), "another", "fingerprint"),
        (("facts", "initial_weights"), "others", "initial_weights"),
    ],
)
def test_runs_that_differ_in_more_than_their_text_are_refused(copied, place, value, named):
    folders, s = run_folders(), study_here()
    where = {"a": [folders["a-s0"]], "b": [folders["b-s0"]], "a+b": [folders["a_b-s0"]]}
    lines = script.check_runs(s, where)
    assert lines[0] == "ledger  every run read 576 tokens in 6 equal steps"
    assert "NOTE NOT LEARNING: 1 of 1 runs of a do not beat token frequencies" in lines  # six tiny steps
    assert lines[-1].startswith("tested on documents  a ")
    path = folders["a_b-s0"] / "config.json"
    tree = config = json.loads(path.read_text())
    for name in place[:-1]:
        tree = tree[name]
    tree[place[-1]] = value
    path.write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        script.check_runs(s, where)
    words, folder = str(error.value), str(folders["a_b-s0"])
    if words.startswith(f"{folder} read other text"):  # than it would read today
        odd = words.partition("(")[2].partition(")")[0].split(", ")
    else:  # than the first arm of its seed
        begun = f"{folders['a-s0']} and {folder} differ in "
        assert words.startswith(begun) and words.endswith(", not in text alone: move one away")
        odd = words.removeprefix(begun).removesuffix(", not in text alone: move one away").split(", ")
    assert named in odd and len(odd) <= 2 and "\n" not in words


def test_what_a_study_writes_is_all_there(whole):
    (folder,) = (whole / "out").glob("study-*")
    assert {"study.md", "study.json", "matrix.png", "link.png"} == {p.name for p in folder.iterdir()}
    text, said = (folder / "study.md").read_text(), (whole / "said.txt").read_text()
    for words in ("too few seeds (1 of 3)", "**loss**", "**bits per byte**", "noise floor", "a x b"):
        assert words in text
    assert "every run read 576 tokens in 6 equal steps" in said and "every run read 576 tokens" in text
    assert "Traceback" not in said and f"{JOBS} of {JOBS} embeddings to make" in said
    assert len(list((whole / "out/cross").iterdir())) == 9
    assert len(kept_in(whole / "out")) == len({job[2] for job in plan_of(whole)[1]})


def test_a_run_by_itself_is_the_run_of_the_study(copied):
    """With the tokenizer and the pools of the study, which --arms says: bit for bit."""
    want = results_of()["a_b-s0"]
    go("--mode", "train", "--data", "a+b", "--tag", "alone", out="alone")
    got = ranks.result("alone")
    assert got["weights_sha256"] == want["weights_sha256"]
    names = [name for name in want if name.startswith(("val/", "test/"))]
    assert len(names) > 20 and {n: got[n] for n in names} == {n: want[n] for n in names}


def snapshot(*patterns) -> dict[str, int]:
    """Files and when they were written."""
    files = [path for pattern in patterns for path in Path("out").rglob(pattern) if path.is_file()]
    return {str(path): path.stat().st_mtime_ns for path in files}


MADE = ("result.json", "losses.jsonl", "*.npy", "cross/*", "checkpoints/**/*", "config.json")


def test_a_finished_study_typed_again_computes_nothing_and_says_the_same(copied):
    before, first = snapshot(*MADE), Path("said.txt").read_text()
    said = go()
    assert snapshot(*MADE) == before and len(before) > 30
    assert said.count("finished already: ") == 3 and "step 3/6" not in said and "to make" not in said

    def told(text):
        return text[text.index("\n**loss** on the held-out part of") :]

    assert told(said) == told(first)
    same_study(study_of(), json.loads(next(Path("out").glob("study-*/study.json")).read_text()))


@pytest.mark.slow
def test_a_seed_more_trains_the_new_runs_alone(copied):
    before = snapshot("result.json", "checkpoints/**/*", "*.npy")
    said = go("--seeds", 2)
    after = snapshot("result.json", "checkpoints/**/*", "*.npy")
    assert {path: after[path] for path in before} == before
    assert set(run_folders()) == {f"{arm}-s{seed}" for arm in ("a", "b", "a_b") for seed in (0, 1)}
    assert said.count("finished already: ") == 3
    found = [json.loads(path.read_text()) for path in Path("out").glob("study-*/study.json")]
    (two,) = [one for one in found if one["constants"]["seeds"] == 2]
    for arm in ("a", "b", "a+b"):
        first, second = two["matrix"]["loss"][arm]["c"]["runs"]
        assert first == pytest.approx(results_of()[f"{arm.replace('+', '_')}-s0"]["test/loss"], abs=1e-6)
        assert first != second
    facts = [core.read_config(folder)["facts"]["initial_weights"] for folder in run_folders().values()]
    assert len(set(facts)) == 2


@pytest.mark.slow
def test_an_arm_more_leaves_no_mixture_that_read_other_blocks_than_its_sources(sources, whole):
    """b becomes an arm of its own: the mixture that was trained without it stays, and is what it would be."""
    go("--arms", "a", "a+b", "--diversity_batches", 0)
    before = snapshot("result.json", "checkpoints/**/*")
    (old,) = (json.loads(path.read_text()) for path in Path("out").glob("*-a_b-*/ledger.json"))
    (want,) = (json.loads(path.read_text()) for path in (whole / "out").glob("*-a_b-*/ledger.json"))
    said = go("--diversity_batches", 0)
    assert old == want and said.count("finished already: ") == 2
    after = snapshot("result.json", "checkpoints/**/*")
    assert {path: after[path] for path in before} == before and len(run_folders()) == 3
    weights = [results_of(out)["a_b-s0"]["weights_sha256"] for out in ("out", whole / "out")]
    assert weights[0] == weights[1]


def test_a_source_that_changed_after_its_run_finished_is_refused(copied):
    """Otherwise the study would measure a run on text that it may have been trained on."""
    made, texts = snapshot(*MADE), texts_of("b")
    write("b.jsonl", [*texts[:-1], texts[-1] + " and more"])
    assert launch(NAME, "--out", "out", *TINY) == [2]
    lines = [line for line in Path("out.txt").read_text().splitlines() if "error:" in line]
    (line,) = lines
    assert line.startswith(f"{NAME}.py: error: {run_folders()['b-s0']} read other text (")
    assert "(fingerprint" in line and line.endswith("move it away, or use --out")
    assert snapshot(*MADE) == made and "Traceback" not in Path("out.txt").read_text()


@pytest.mark.slow
def test_a_source_that_changed_is_refused_before_anything_is_trained(copied):
    shutil.rmtree(run_folders()["b-s0"])
    write("a.jsonl", [*texts_of("a"), "one more"])
    assert launch(NAME, "--out", "out", *TINY) == [2]
    assert "move it away" in Path("out.txt").read_text() and "b-s0" not in run_folders()


@pytest.mark.slow
def test_two_ranks_find_the_same_study(whole, sources):
    go(size=2)
    want = study_of(whole / "out")
    for arm, texts in study_of()["matrix"]["loss"].items():
        for name, cell in texts.items():
            assert cell["mean"] == pytest.approx(want["matrix"]["loss"][arm][name]["mean"], abs=1e-5)
    similar_coefficients(study_of()["diversity"], want["diversity"])
    (draws, jobs), (others, same) = plan_of("."), plan_of(whole)
    assert {path.name for path in kept_in()} == {job[2] for job in jobs} and len(jobs) == JOBS
    assert [job[:2] for job in jobs] == [job[:2] for job in same]
    for name, i, *_ in jobs:
        assert draws.batch(name, i).ids.tolist() == others.batch(name, i).ids.tolist()


# killed, signalled


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_a_study_killed_in_every_phase_ends_with_the_same_figures(size, whole, sources):
    """Each launch is struck a phase further on; nothing that was finished is made twice."""

    def struck(place, nth):
        before = {path: made for path, made in snapshot("result.json").items() if finished(path)}
        kept = snapshot("cross/*", "*.npy")
        codes = launch(NAME, "--out", "out", *TINY, size=size, kill=(place, nth, 0))
        assert -9 in codes, Path("out.txt").read_text()
        after = snapshot("result.json", "cross/*", "*.npy")
        assert {path: after.get(path) for path in before | kept} == before | kept
        return sum(map(finished, snapshot("result.json")))

    def finished(path):
        return json.loads(Path(path).read_text())["status"] == "finished"

    assert struck("caching", 2) == 0 and not run_folders()
    assert struck("evaluation", 2) == 0  # of the first run, at step 4
    assert struck("step", 12) == 1  # of the second: the first took what was left of its own
    assert set(run_folders()) == {"a-s0", "b-s0"}
    assert struck("save", 2) in (1, 2)
    assert struck("embedding", 2) == 3
    cross = crossed_in()
    assert len(cross) == 9
    for path in cross:
        path.unlink()
    assert struck("measuring", 12) == 3
    assert 0 < len(crossed_in()) < 9
    go(size=size)
    assert len(run_folders()) == 3
    if size == 1:
        same_study(study_of(), study_of(whole / "out"))
    else:
        same_study(study_of(), study_of(whole / "out"), tolerance=1e-4, parts=PARTS[:2])
        similar_coefficients(study_of()["diversity"], study_of(whole / "out")["diversity"])


@pytest.mark.parametrize(
    ("place", "nth", "size"),
    [
        pytest.param("measuring", 2, 2, marks=pytest.mark.slow),
        pytest.param("embedding", 2, 2, marks=pytest.mark.slow),
        pytest.param("embedding", 3, 1, marks=pytest.mark.slow),
        ("measuring", 3, 1),
    ],
)
def test_a_signal_behind_the_training_stops_all_ranks_and_the_same_command_goes_on(
    place, nth, size, copied, whole
):
    made = len(kept_in())
    for path in [*crossed_in(), *kept_in()]:
        path.unlink()
    before = snapshot("result.json", "checkpoints/**/*")
    codes = launch(NAME, "--out", "out", *TINY, size=size, sent=(place, nth, signal.SIGTERM))
    assert codes == ranks.stopped(size, signal.SIGTERM), Path("out.txt").read_text()
    said = Path("out.txt").read_text()
    assert "Traceback" not in said and "tables:" not in said
    left = len(crossed_in()), len(kept_in())
    assert left[0] < 9 if place == "measuring" else left[0] == 9 and 0 < left[1] < made
    kept = {path.name for path in kept_in()}
    missing = {job[2] for job in plan_of(".")[1]} - kept
    assert f"{len(missing)} of {JOBS} embeddings to make" in go(size=size) and len(kept_in()) == made
    assert snapshot("result.json", "checkpoints/**/*") == before
    same_study(study_of(), study_of(whole / "out"), tolerance=0.0 if size == 1 else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_a_signal_in_training_ends_the_study_and_the_same_command_goes_on(size, sources, whole):
    flags = ["--diversity_batches", 0, "--arms", "a", "b"]
    codes = launch(NAME, "--out", "out", *tiny(*flags), size=size, sent=("step", 5, signal.SIGTERM))
    assert codes == ranks.stopped(size, signal.SIGTERM), Path("out.txt").read_text()
    (stopped,) = results_of().values()
    assert stopped["status"] == "stopped" and "Stop: SIGTERM" in stopped["why"]
    assert "Traceback" not in Path("out.txt").read_text() and not crossed_in()
    anew = ["--micro_batch", 2] if size == 2 else []  # typed anew it holds for what goes on and what comes
    said = go(*flags, *anew, size=size)
    assert set(run_folders()) == {"a-s0", "b-s0"}
    assert said.count("resumed: micro_batch is now 2 (it was None)") == bool(anew)
    stored = {core.read_config(folder)["constants"]["micro_batch"] for folder in run_folders().values()}
    assert stored <= ({2, None} if anew else {None}) and (2 in stored) == bool(anew)
    want = study_of(whole / "out")["matrix"]["loss"]
    for arm, texts in study_of()["matrix"]["loss"].items():
        for name, cell in texts.items():
            assert cell["mean"] == pytest.approx(want[arm][name]["mean"], abs=1e-5)
    if size == 1:  # what stands beside it is no part of a run
        assert results_of()["a-s0"]["weights_sha256"] == results_of(whole / "out")["a-s0"]["weights_sha256"]


def test_what_may_change_is_honoured_by_a_study_that_goes_on(copied, whole):
    """--micro_batch, for one, after memory ran out: the run that was stopped takes it, finished ones stay."""
    folder, before = run_folders()["b-s0"], snapshot("result.json")
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"status": "stopped"}))
    shutil.rmtree(folder / "checkpoints" / result["checkpoint"])
    said = go("--micro_batch", 2)
    assert "resumed: micro_batch is now 2 (it was None)" in said and said.count("finished already: ") == 2
    assert "resumes " in said and "step 6/6" in said and len(run_folders()) == 3
    batches = {tag: core.read_config(of)["constants"]["micro_batch"] for tag, of in run_folders().items()}
    again = json.loads((folder / "result.json").read_text())
    assert again["status"] == "finished" and batches["a-s0"] is batches["a_b-s0"] is None
    assert again["test/loss"] == pytest.approx(result["test/loss"], abs=1e-5)
    changed = {path for path, made in snapshot("result.json").items() if before[path] != made}
    assert changed == {str(folder / "result.json")}


# what the sentences say


def losses_of(arm, name, levels, noise=0.02, seeds=3, documents=40):
    """Files of losses.jsonl: made-up runs whose mean loss is levels[0] and, per seed, a little beside it."""
    rng = np.random.default_rng(sum(map(ord, name)))
    shape, files = rng.normal(0, 0.3, documents), []
    for seed in range(seeds):
        own = np.random.default_rng([sum(map(ord, arm)), seed]).normal(0, noise, documents)
        nats = 10 * (levels + shape + own)
        path = Path(f"{arm}-{name}-{seed}.jsonl")
        lines = [
            {"part": "test", "row": i, "group": i, "nats": n, "hits": 3, "targets": 10, "bytes": 25}
            for i, n in enumerate(nats)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        files.append(path)
    return files


@pytest.mark.parametrize(
    ("a", "b", "seeds", "words"),
    [
        (5.5, 5.4, 3, "on n, a+b: the mixture wins beyond noise against every single source"),
        (4.5, 4.4, 3, "on n, a+b: the mixture loses beyond noise against every single source"),
        (5.5, 4.5, 3, "on n, a+b: the mixture is better than a, worse than b"),
        (5.5, 5.0, 3, "on n, a+b: the mixture is better than a, not to be told apart from b"),
        (5.0, 4.5, 3, "on n, a+b: the mixture is worse than b, not to be told apart from a"),
        (5.0, 5.0, 3, "on n, a+b: the mixture is not to be told apart from a and b"),
        (5.5, 5.4, 2, "on n, a+b: too few seeds (2 of 3) to say whether the mixture wins"),
        (5.5, 5.4, 1, "on n, a+b: too few seeds (1 of 3) to say whether the mixture wins"),
    ],
)
def test_the_verdict_is_what_the_intervals_say(a, b, seeds, words):
    levels = {"a": a, "b": b, "a+b": 5.0}
    matrix = {arm: {"n": losses_of(arm, "n", level, seeds=seeds)} for arm, level in levels.items()}
    (line,), differences = diversity_report.verdicts(matrix, seeds)
    said, *numbers = line.split("\n")
    assert said == words and len(numbers) == 2
    assert [one["difference"] for one in differences] == pytest.approx([5 - a, 5 - b], abs=0.02)
    for one in differences:
        low, high = one["interval"]
        text = f"{one['difference']:+.4f} ({low:+.4f} to {high:+.4f}) against {one['against']}"
        assert f"  loss {text}" in numbers and low < one["difference"] < high


@pytest.mark.parametrize(("documents", "decided"), [(5, False), (6, True)])
def test_few_documents_decide_nothing(documents, decided):
    levels = {"a": 5.5, "b": 5.4, "a+b": 5.0}
    matrix = {arm: {"n": losses_of(arm, "n", level, documents=documents)} for arm, level in levels.items()}
    (line,), _ = diversity_report.verdicts(matrix, 3)
    assert ("fewer than 6 held-out documents" in line) != decided
    assert ("the mixture wins beyond noise against every single source" in line) == decided


def test_a_loss_that_is_no_number_decides_nothing():
    matrix = {arm: {"n": losses_of(arm, "n", 5.0)} for arm in ("a", "b", "a+b")}
    path = matrix["a+b"]["n"][0]
    path.write_text(re.sub(r'"nats": [\d.]+', '"nats": NaN', path.read_text(), count=1))
    (line,), _ = diversity_report.verdicts(matrix, 3)
    assert "or a loss that is no number: nothing to decide" in line


def test_the_neutral_text_is_spoken_of_first_and_a_study_without_mixtures_decides_nothing():
    arms = ("a", "b", "a+b")
    matrix = {arm: {name: losses_of(arm, name, 5.0) for name in "abn"} for arm in arms}
    told, _ = diversity_report.verdicts(matrix, 3)
    assert [line.split(",")[0] for line in told] == ["on n", "on b", "on a"]
    assert diversity_report.verdicts({"a": matrix["a"], "b": matrix["b"]}, 3)[0][0].startswith(
        "no mixture beside its"
    )
    assert diversity_report.verdicts({"a+b": matrix["a+b"]}, 3)[1] == []


def test_cells_are_sums_over_sums():
    files = losses_of("a", "n", 5.0)
    found = diversity_report.cells({"a": {"n": files}})
    lines = [[json.loads(line) for line in path.read_text().splitlines()] for path in files]
    nats = [sum(line["nats"] for line in of) for of in lines]
    assert found["loss"]["a"]["n"]["runs"] == pytest.approx([n / 400 for n in nats])
    assert found["accuracy"]["a"]["n"]["mean"] == pytest.approx(0.3)
    assert found["bits per byte"]["a"]["n"]["mean"] == pytest.approx(sum(nats) / 3 / (40 * 25) / math.log(2))
    table = diversity_report.tables({"loss": found["loss"]}, 3)
    assert "95 % over documents and 3 seeds" in table
    assert "95 % over documents; one seed" in diversity_report.tables({"loss": found["loss"]}, 1)
    assert f"{math.exp(found['loss']['a']['n']['mean']):.2f}" in table


# the other modes


def in_process(argv, monkeypatch, capfd):
    """The script in this process; what it printed."""
    monkeypatch.setattr(sys, "argv", [f"{NAME}.py", *map(str, argv)])
    ranks.main(NAME)
    return capfd.readouterr().out


def test_mode_cache_fills_the_token_cache_and_trains_nothing(sources, monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("TOKEN_CACHE", str(tmp_path / "tokens"))
    said = in_process([*TINY, "--out", "out", "--mode", "cache"], monkeypatch, capfd)
    assert not [path for path in Path("out").rglob("*") if path.is_file()]
    assert len(list(Path("tokens").glob("tokens_*/meta.json"))) == 3
    text = script.open_text(parsed(*TINY), World())
    for name in "abc":
        counts = [f"{len(text.tokens[name].parts[part]):,}" for part in ("train", "val", "test")]
        row = next(line for line in said.splitlines() if line.startswith(f"| {name} "))
        assert all(re.search(rf"\b{count}\b", row) for count in counts)
    assert len(list(Path("tokens").glob("tokens_*"))) == 3  # the study finds them


def test_mode_cache_says_which_arm_has_too_little(sources, monkeypatch, capfd):
    error = fails([*TINY, "--mode", "cache", "--max_steps", 5000], monkeypatch, capfd)
    assert "blocks of 16 training tokens, 30000 are asked for" in error


def test_mode_diversity_finds_the_coefficients_of_the_study(copied, monkeypatch, capfd):
    want = study_of()["diversity"]
    before = snapshot("*.npy")
    said = go("--mode", "diversity")
    (path,) = Path("out").glob("study-*/diversity.json")
    assert json.loads(path.read_text()) == want and snapshot("*.npy") == before
    assert "noise floor" in said and len(run_folders()) == 3


def test_mode_diversity_needs_a_probe(sources, monkeypatch, capfd):
    error = fails([*TINY, "--mode", "diversity"], monkeypatch, capfd)
    assert "--probe study: arm a+b has no finished run: train it, or name a probe" in error


def test_the_coefficient_is_the_mean_distance_of_the_embeddings_that_were_kept(whole):
    found = study_of(whole / "out")["diversity"]

    def distance(x, y):
        x, y = x.astype(np.float64), y.astype(np.float64)
        total = x + y + 1e-8
        x, y = x / total, y / total
        return 1 - (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())

    (draws, jobs), kept = plan_of(whole), {}
    for arm, i, file, _ in jobs:
        kept.setdefault((arm, i), []).append(np.load(whole / "out/embeddings" / file))
    for arm in ("a", "b", "a+b"):
        pairs = [distance(kept[arm, i][0], kept[arm, j][0]) for i, j in ((0, 1), (0, 2), (1, 2))]
        assert found["arms"][arm]["coefficient"] == pytest.approx(np.mean(pairs), abs=1e-9)
        floors = [distance(*kept[arm, i]) for i in range(3)]
        assert found["arms"][arm]["noise_floors"] == pytest.approx(floors, abs=1e-9)
        assert found["arms"][arm]["noise_floor"] == pytest.approx(np.mean(floors), abs=1e-9)
        assert min(floors) > 0, "the same batch, other draws"
        low, high = found["arms"][arm]["interval"]
        assert 0 <= low <= found["arms"][arm]["coefficient"] <= high
    crossed = [distance(kept["a", i][0], kept["b", j][0]) for i in range(3) for j in range(3)]
    assert found["cross"]["a x b"]["coefficient"] == pytest.approx(np.mean(crossed), abs=1e-9)
    _, model, tokenizer = script.load_model(run_folders(whole / "out")["a_b-s0"], World())
    for arm, i, file, drawn in (jobs[0], jobs[1], jobs[-1]):  # and they are what the plan's batches give
        core.reseed(drawn)
        vector = task2vec.embed(model, draws.batch(arm, i), tokenizer.eos_token_id, "clean", 1, 1)
        np.testing.assert_allclose(vector, np.load(whole / "out/embeddings" / file), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("kind", ["documents", "pieces"])
def test_batches_for_the_coefficient_share_no_sequence_and_mix_in_proportion(kind, whole, monkeypatch):
    monkeypatch.chdir(whole)
    flags = ["--diversity_length", 16, "--sequences", kind, "--max_tokens", 10**6]
    s = study_here("--arms", "a", "0.75*a+0.25*b", *flags)
    draws = script.draws_of(s, s.text.tokenizer)
    alone, mixed = ([draws.batch(arm, i) for i in range(3)] for arm in draws.arms)
    trained = {name: s.text.tokens[name].parts["train"].astype(np.uint16).tobytes() for name in "ab"}
    rows = {}
    for arm, batches in (("alone", alone), ("mixed", mixed)):
        rows[arm] = [tuple(row.tolist()) for batch in batches for row in batch.ids]
        assert len(set(rows[arm])) == len(rows[arm]) == 12
        for batch in batches:
            of = [
                [name for name in "ab" if np.array(row[:n], np.uint16).tobytes() in trained[name]]
                for row, n in zip(batch.ids.tolist(), batch.lengths.tolist(), strict=True)
            ]
            assert of == [["a"]] * 4 if arm == "alone" else of == [["a"]] * 3 + [["b"]]
    # an arm draws with a key of its own: otherwise the mixture would look like its sources
    assert len(set(rows["mixed"]) & set(rows["alone"])) < 6


def ids_and_files(s) -> dict[tuple, str]:
    """(ids of the batch, which repeat of it) -> file of its embedding"""
    draws, found = script.draws_of(s, s.text.tokenizer), {}
    for name, i, file, _ in diversity.plan(s.cfg, draws, "weights", torch.float32):
        ids = draws.batch(name, i).ids.numpy().tobytes()
        repeat = sum(key == ids and of != file for (key, _), of in found.items())
        assert found.setdefault((ids, repeat), file) == file
    assert len(set(found.values())) == len(found)
    return found


def test_equal_batches_draw_targets_of_their_own(sources):
    """With a large vocabulary all batches of the lower bound are equal: it is that of the draws, not 0."""
    s = study_here()
    draws = script.draws_of(s, s.text.tokenizer)
    draws.vocab_size = 10**6
    lower = [job for job in diversity.plan(s.cfg, draws, "weights", torch.float32) if job[0] == "lower bound"]
    assert len({draws.batch("lower bound", i).ids.numpy().tobytes() for _, i, *_ in lower}) == 1
    assert len(lower) == len({job[2] for job in lower}) == len({job[3] for job in lower}) == 3


def test_embeddings_that_are_found_again_are_those_of_the_same_batches(sources):
    one, other = (study_here("--arms", *arms) for arms in (("a", "a+b"), ("a", "b", "a+b")))
    first, second = ids_and_files(one), ids_and_files(other)
    assert first.items() <= second.items() and len(second) == len(first) + 3 * 2  # an arm more: its own
    write("b.jsonl", texts_of("b")[::-1])  # the same text in another order: other batches, for b
    third = ids_and_files(study_here())
    assert all(third[key] == second[key] for key in third.keys() & second.keys())
    assert len(third.keys() - second.keys()) >= 3 * 2


@pytest.mark.parametrize(
    "flags",
    [["--procedure", "published"], ["--head_epochs", 2], ["--fisher_samples", 2], ["--seed", 1]],
    ids=str,
)
def test_embeddings_made_in_another_way_have_other_names(flags, sources):
    one, other = ids_and_files(study_here()), ids_and_files(study_here(*flags))
    assert not set(one.values()) & set(other.values())


def test_embeddings_of_other_weights_have_other_names_and_more_repeats_keep_theirs(sources):
    s = study_here()
    draws, more = script.draws_of(s, s.text.tokenizer), replace(s.cfg, floor_repeats=4)
    plans = [
        {job[2] for job in diversity.plan(cfg, draws, weights, dtype)}
        for cfg, weights, dtype in (
            (s.cfg, "w", torch.float32),
            (s.cfg, "v", torch.float32),
            (s.cfg, "w", torch.float64),
            (more, "w", torch.float32),
        )
    ]
    assert not plans[0] & plans[1] and not plans[0] & plans[2] and plans[0] < plans[3]
    assert len(plans[3] - plans[0]) == 3 * 3 * 2


# errors


def fails(argv, monkeypatch, capfd) -> str:
    """Expects one line on stderr and exit code 2; returns the line."""
    monkeypatch.setattr(sys, "argv", [f"{NAME}.py", "--out", "out", *map(str, argv)])
    with pytest.raises(SystemExit) as left:
        ranks.main(NAME)
    lines = capfd.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and len(lines) == 1, lines
    assert lines[0].startswith(f"{NAME}.py: error: ")
    assert not list(Path("out").glob("*/config.json")) and not list(Path("out").glob("*/cross"))
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--sources", "a=absent.jsonl", "b=b.jsonl", "c=c.jsonl"], ["no such file or folder: absent.jsonl"]),
        (["--arms", "a", "nowhere"], ["--arms 'nowhere': no such text", "use a, b, c, python-docs",
                                      "a path, or --sources nowhere=where"]),
        (["--neutral", "nowhere"], ["--neutral 'nowhere': no such text", "or --sources nowhere=where"]),
        (["--neutral", ""], ["--neutral '': no such text"]),
        (["--arms", "a", "a"], ["--arms a a: two are the same text, name each once"]),
        (["--arms", "a", "a+b", "b+a"], ["two are the same text"]),
        (["--arms", "a", "0.5*b+0.5*a", "a+b"], ["two are the same text"]),
        (["--sources", "a=a.jsonl", "b=b.jsonl", "d=a.jsonl", "--neutral", "d"],
         ["a and d are the same text"]),
        (["--sources", "a=owner/absent", "b=b.jsonl", "c=c.jsonl"], ["owner/absent cannot be fetched"]),
        (["--sources", "a"], ["--sources a: write name=where"]),
        (["--sources", "a=a.jsonl", "a=b.jsonl", "c=c.jsonl"], ["a is both a.jsonl and b.jsonl"]),
        (["--text_column", "body"], ["a.jsonl lacks column(s) body; found: text; say --text_column"]),
        (["--sources", "a=empty.jsonl", "b=b.jsonl", "c=c.jsonl"],
         ["empty.jsonl: 10 of 160 rows are unusable, more than 1%", "no text"]),
        (["--sources", "a=odd.jsonl", "b=b.jsonl", "c=c.jsonl"], ["odd.jsonl: 10 of 160 rows are unusable"]),
        (["--max_steps", 5000], ["a has", "blocks of 16 training tokens, 30000 are asked for",
                                 "fewer --max_steps, more text, more --passes, or --repeat"]),
        (["--arms", "a", "0.7*a+0.7*b"], ["0.7*a+0.7*b add up to 1.4: make it 1"]),
        (["--arms", "a", "a+c"], ["--neutral c is trained on by an arm: use a third text"]),
        (["--arms", "x/a.jsonl", "y/a.jsonl"], ["two sources are called a", "--sources name=where"]),
        (["--sources", "a=a.jsonl", "b=b.jsonl", "d=./a.jsonl", "--neutral", "d", "--mode", "cache"],
         ["a and d are the same text"]),
        (["--resume_step", 3], ["mode study goes on by itself", "--resume_step"]),
        (["--resume_timestamp", "latest"], ["mode study goes on by itself"]),
        (["--diversity_batches", 500], ["sequences of 12 tokens, 2000 are asked for", "more text",
                                        "use fewer --diversity_batches, smaller ones"]),
        (["--diversity_batches", 500, "--repeat"], ["sequences of 12 tokens, 2000 are asked for"]),
        (["--diversity_batches", 1], ["--diversity_batches 1: a distance needs 2"]),
        (["--diversity_length", 17], ["--diversity_length 17 is over the probe's 16 tokens"]),
        (["--probe", "absent/folder"], ["absent/folder"]),
        (["--max_minutes", 1], ["--max_minutes", "use --max_steps"]),
        (["--no-final_eval"], ["--no-final_eval: a study needs its runs measured"]),
        (["--test_share", 0], ["--test_share 0 leaves nothing to measure"]),
        (["--val_share", 0.6, "--test_share", 0.4], ["val_share 0.6 + test_share 0.4 leave nothing"]),
        (["--seeds", 0], ["seeds", "0"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_is_trained(argv, words, sources, monkeypatch, capfd):
    for name, odd in (("empty", [""] * 10), ("odd", [7] * 5 + [["a list"]] * 5)):
        write(f"{name}.jsonl", [*texts_of("a"), *odd])
    for name in ("x", "y"):
        Path(name).mkdir()
        shutil.copy("a.jsonl", f"{name}/a.jsonl")
    error = fails(tiny(*argv), monkeypatch, capfd)
    assert all(word in error for word in words), error


def test_few_unusable_rows_are_left_out_and_told(sources, monkeypatch, capfd):
    write("a.jsonl", [*texts_of("a"), ""])
    said = in_process([*TINY, "--out", "out", "--mode", "cache"], monkeypatch, capfd)
    assert "a  left out 1 row(s), no text: 151" in said


def test_every_constant_of_a_study_is_in_its_record(whole):
    stored = study_of(whole / "out")["constants"]
    want = json.loads(json.dumps(asdict(core.with_dtype(parsed(*tiny("--out", "out")), World()))))
    assert stored == want


def test_a_stored_run_is_opened_from_its_folder_alone(whole, tmp_path):
    shutil.copytree(run_folders(whole / "out")["a_b-s0"], "moved")
    cfg, model, tokenizer = script.load_model("moved", World())
    assert cfg.data == "a+b" and isinstance(model, core.GPT) and not model.training
    want = json.loads(Path("moved/result.json").read_text())["weights_sha256"]
    assert core.weights_sha256(model) == want and tokenizer.eos_token_id is not None
