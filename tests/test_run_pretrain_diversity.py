"""run_pretrain_diversity.py: the arms of a study differ in text alone; bad input."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import torch
from ranks import everywhere
from toys.corpus import documents_of
from toys.diversity import (
    JOBS,
    TINY,
    copied,  # noqa: F401 (a fixture)
    fails,
    in_process,
    kept_in,
    parsed,
    plan_of,
    results_of,
    run_folders,
    sources,  # noqa: F401 (a fixture)
    study_here,
    study_of,
    texts_of,
    tiny,
    whole,  # noqa: F401 (a fixture)
    write,
)

import core
import run_pretrain_diversity as script
from core import UserError, World
from lab.data import mixture, tables
from lab.run import files


def test_the_journals_preset_is_the_journals_run():
    cfg = parsed("--preset", "journal")
    want = {
        **{"optimizer": "adamw", "lr": 5e-5, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "clip": 1.0},
        **{"schedule": "linear", "min_lr": 0.0, "warmup": 0.0, "dropout": 0.1, "dtype": "fp32", "seed": 42},
        **{"batch": 64, "max_steps": 20_000, "save_every": 2000, "block_size": 1024, "model": "gpt2"},
        **{"n_embd": 512, "n_layer": 8, "n_head": 8, "tokenizer": "gpt2", "passes": 1, "mode": "study"},
        **{"arms": ("pubmed", "uspto", "pubmed+uspto"), "neutral": "c4", "skip_spikes": False},
        **{"streaming": "CacheStream", "repeat": True, "max_documents": None, "max_tokens": None},
        **{"test_weights": "last", "tag": "journal", "shard": "none"},
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
    sources, pool = mixture.sources_of(parsed("--preset", "journal")), 20_000 * 64 * 1024
    assert {name: one.max_tokens for name, one in sources.items()} == dict.fromkeys(
        ("pubmed", "uspto"), pool + 1024
    )
    assert all(one.streaming == "CacheStream" for one in sources.values())
    for arms in (["0.7*pubmed+0.3*uspto"], ["pubmed", "uspto"]):
        mixed = mixture.sources_of(parsed("--arms", *arms, "--passes", 2))
        assert [one.max_tokens for one in mixed.values()] == [pool // 2 + 1024] * 2
    assert mixture.sources_of(parsed("--max_tokens", 5000))["uspto"].max_tokens == 5000
    for flags in ([], ["--max_tokens", 5000], ["--preset", "journal"]):
        neutral = mixture.neutral_corpus(parsed(*flags))  # streamed, as far as its held-out part needs
        assert (neutral.data, neutral.max_tokens, neutral.streaming) == ("allenai/c4:en", 0, "True")
    assert all(
        one.held_out_tokens == 500_000 and not one.first_trains for one in (*sources.values(), neutral)
    )


def test_the_smoke_set_is_of_its_family_offline_and_trains_on_what_ranks_divide():
    cfg = parsed("--smoke", "--preset", "journal")
    assert cfg.schedule == "linear" and cfg.beta2 == 0.999 and cfg.dropout == 0 and cfg.lr == 6 * 5e-5
    assert {one.data for one in mixture.sources_of(cfg).values()} == {"python-code", "python-docs"}
    assert mixture.neutral_corpus(cfg).data == "numpy-docs"
    assert cfg.batch % 12 == 0 and cfg.probe == "study" and cfg.sources == ()


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
    text = mixture.load_text(cfg, World())
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
    yield from mixture.sources_of(cfg).values()
    yield mixture.neutral_corpus(cfg)


def test_a_larger_neutral_share_changes_the_neutral_text_alone_and_is_told(sources, monkeypatch, capfd):
    plain, cfg = parsed(*TINY), parsed(*tiny("--neutral_share", 0.45))
    shared = mixture.neutral_corpus(cfg)
    assert shared == replace(mixture.neutral_corpus(plain), val_share=0.45, test_share=0.45)
    assert mixture.sources_of(cfg) == mixture.sources_of(plain)
    said = in_process([*tiny("--neutral_share", 0.45), "--out", "out", "--mode", "cache"], monkeypatch, capfd)
    assert "NOTE --neutral_share: a document of the neutral text may stand in a source" in said


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
    neutral = mixture.load_text(cfg, World()).tokens["c"]
    assert endless.read < 120  # a group of some 50 in hand, and one ahead
    assert len(neutral.parts["train"]) <= 1 and neutral.documents["train"] == 0
    assert all(len(neutral.parts[part]) > 1500 for part in ("val", "test"))


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
    planned = script.planned_runs(s.plan)
    where = {"a": [folders["a-s0"]], "b": [folders["b-s0"]], "a+b": [folders["a_b-s0"]]}
    lines = script.check_runs(s, planned, where)
    assert lines[0] == "ledger  every run read 576 tokens in 6 equal steps"
    assert "NOTE NOT LEARNING: 1 of 1 runs of a do not beat token frequencies" in lines  # six tiny steps
    assert lines[-1].startswith("tested on documents  a ")
    path = folders["a_b-s0"] / "config.json"
    tree = config = json.loads(path.read_text())
    for name in place[:-1]:
        tree = tree[name]
    tree[place[-1]] = value
    files.write_sealed(path, config)
    with pytest.raises(UserError) as error:
        script.check_runs(s, planned, where)
    words, folder = str(error.value), str(folders["a_b-s0"])
    if words.startswith(f"{folder} had read other text"):  # than it would read today
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
    flags = TINY[: TINY.index("--diversity_batches")]
    flags += ["--mode", "train", "--data", "a+b", "--tag", "alone", "--out", "alone"]
    assert ranks.launch("run_pretrain_diversity", *flags) == [0]
    got = ranks.result("alone")
    assert got["weights_sha256"] == want["weights_sha256"]
    names = [name for name in want if name.startswith(("val/", "test/"))]
    assert len(names) > 20 and {n: got[n] for n in names} == {n: want[n] for n in names}


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
        (["--sources", "a=odd.jsonl", "b=b.jsonl", "c=c.jsonl"], ["odd.jsonl: 10 of 160 rows are unusable"]),
        (["--max_steps", 5000], ["a has", "blocks of 16 training tokens, 30000 are asked for",
                                 "fewer --max_steps, more text, more --passes, or --repeat"]),
        (["--arms", "a", "0.7*a+0.7*b"], ["0.7*a+0.7*b add up to 1.4: make it 1"]),
        (["--arms", "a", "a+c"], ["--neutral c is trained on by an arm: use a third text"]),
        (["--arms", "x/a.jsonl", "y/a.jsonl"], ["two sources are called a", "--sources name=where"]),
        (["--sources", "a=a.jsonl", "b=b.jsonl", "d=./a.jsonl", "--neutral", "d", "--mode", "cache"],
         ["a and d are the same text"]),
        (["--resume_step", 3], ["mode study continues its runs by itself", "--resume_step"]),
        (["--resume_timestamp", "latest"], ["mode study continues its runs by itself"]),
        (["--diversity_batches", 500], ["sequences of 12 tokens, 2000 are asked for", "more text",
                                        "use fewer --diversity_batches, smaller ones"]),
        (["--diversity_batches", 500, "--repeat"], ["sequences of 12 tokens, 2000 are asked for"]),
        (["--diversity_batches", 1], ["--diversity_batches 1: a distance needs 2"]),
        (["--mode", "diversity", "--diversity_batches", 0], ["--diversity_batches 0 leaves --mode"]),
        (["--diversity_length", 17], ["--diversity_length 17 is over the probe's 16 tokens"]),
        (["--probe", "absent/folder"], ["absent/folder"]),
        (["--max_minutes", 1], ["--max_minutes", "use --max_steps"]),
        (["--no-final_eval"], ["--no-final_eval: a study needs its runs measured"]),
        (["--test_share", 0], ["--test_share 0 leaves nothing to measure"]),
        (["--val_share", 0.6, "--test_share", 0.4], ["val_share 0.6 + test_share 0.4 leave nothing"]),
        (["--seeds", 0], ["seeds", "0"]),
        (["--data", "a"], ["--data is read by --mode train or find_lr, not by study"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_is_trained(argv, words, sources, monkeypatch, capfd):
    write("odd.jsonl", [*texts_of("a"), *[7] * 5, *[["a list"]] * 5])
    for name in ("x", "y"):
        Path(name).mkdir()
        shutil.copy("a.jsonl", f"{name}/a.jsonl")
    error = fails(tiny(*argv), monkeypatch, capfd)
    assert all(word in error for word in words), error


def test_few_unusable_rows_are_left_out_and_told(sources, monkeypatch, capfd):
    write("a.jsonl", [*texts_of("a"), ""])
    said = in_process([*TINY, "--out", "out", "--mode", "cache"], monkeypatch, capfd)
    assert "a  passed over 1 empty row(s): 151" in said


def test_every_constant_of_a_study_is_in_its_record(whole):
    stored = study_of(whole / "out")["constants"]
    want = json.loads(json.dumps(core.constants_of(core.with_dtype(parsed(*tiny("--out", "out")), World()))))
    assert stored == want


def test_a_stored_run_is_opened_from_its_folder_alone(whole, tmp_path):
    shutil.copytree(run_folders(whole / "out")["a_b-s0"], "moved")
    cfg, model, tokenizer = script.load_model("moved", World())
    assert cfg.data == "a+b" and isinstance(model, core.GPT) and not model.training
    want = json.loads(Path("moved/result.json").read_text())["weights_sha256"]
    assert core.weights_sha256(model) == want and tokenizer.eos_token_id is not None
