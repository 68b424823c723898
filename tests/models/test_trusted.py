"""Model folders that are not what they say: code, weights of another model, odd sizes."""

import ast
import io
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import PROJECT
from safetensors.torch import load_file, save_file
from toys.gpt import transformers_model

import core
from core import UserError
from lab.data import tokenizers
from lab.models import encoders, gpt_formats, pretrained, trusted

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def gpt2(folder, **changes):
    """A folder of GPT-2 with a tokenizer of 20 words."""
    transformers_model("gpt2", **changes).save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return Path(folder)


def words_tokenizer(size=20):
    import tokenizers as library

    vocabulary = {
        word: i for i, word in enumerate(["<|endoftext|>", "<s>", *"abcdefghijklmnopqrstuvwxyz"[: size - 2]])
    }
    inner = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token="a"))
    inner.pre_tokenizer = library.pre_tokenizers.Whitespace()
    return tokenizers.fast(inner)


def edit_json(path, **changes):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def loaded_from_auto(node) -> bool:
    """Whether a call is AutoX.from_pretrained or AutoX.from_config."""
    method = getattr(node, "func", None)
    return (
        isinstance(method, ast.Attribute)
        and method.attr in ("from_pretrained", "from_config")
        and getattr(method.value, "id", "").startswith("Auto")
    )


def test_every_call_that_could_run_a_folders_code_says_no():
    """Left out, transformers asks, and takes a prompt's first line of `1` for a yes."""
    sources = [*PROJECT.glob("lab/**/*.py"), *PROJECT.glob("*.py"), *PROJECT.glob("benchmarks/*.py")]
    calls = [
        node for path in sources for node in ast.walk(ast.parse(path.read_text())) if loaded_from_auto(node)
    ]
    assert len(calls) >= 5
    for call in calls:
        words = {word.arg: word.value for word in call.keywords}
        assert isinstance(words.get("trust_remote_code"), ast.Constant), ast.unparse(call)
        assert words["trust_remote_code"].value is False


CODE = """
from pathlib import Path
Path({flag!r}).write_text("ran")
from transformers import BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
def generate(model, **options): return model
class Evil(GPT2Config): model_type = "evil"
EvilModel, EvilTokenizer = GPT2LMHeadModel, PreTrainedTokenizerFast
"""
MODULES = (
    *("evil.py", "__init__.py", "modeling_gpt2.py", "configuration_gpt2.py", "tokenization_gpt2.py"),
    *("custom_generate/generate.py", "generate.py", "conftest.py", "sitecustomize.py", "modeling_evil.py"),
)
AUTO = {
    **{"AutoConfig": "evil.Evil", "AutoModel": "evil.EvilModel", "AutoModelForCausalLM": "evil.EvilModel"},
    "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
}
TEMPLATE = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in ().__class__.__base__ %}{% endfor %}"


class Planted:
    """A pickle that writes a file when it is read."""

    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return Path(self.flag).write_text, ("ran",)


def plant(folder, kind, flag):
    """Code in each place of a model folder that could be loaded; `kind`: what says that it should be."""
    for name in MODULES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(CODE.format(flag=flag))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    for name in ("training_args.bin", "tokenizer.pkl", "added.pt"):
        (folder / name).write_bytes(pickle.dumps(Planted(flag)))
    if "config" in kind:
        edit_json(folder / "config.json", auto_map=AUTO)
    if "unknown" in kind:
        edit_json(folder / "config.json", model_type="evil", auto_map=AUTO)
    if "tokenizer" in kind:
        changes = {"auto_map": AUTO, "tokenizer_class": "EvilTokenizer", "chat_template": TEMPLATE}
        edit_json(folder / "tokenizer_config.json", **changes)
    if "generation" in kind:
        for name in ("generation_config.json", "processor_config.json", "adapter.json"):
            edit_json(
                folder / name, auto_map=AUTO, custom_generate="custom_generate", _from_model_config=True
            )
        edit_json(folder / "config.json", custom_generate=str(folder), _attn_implementation=f"{folder}/evil")
    if "pickled" in kind:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"transformer.wte.weight": Planted(flag)}))
    if "quantisation" in kind:
        edit_json(folder / "config.json", quantization_config={"quant_method": "evil", "auto_map": AUTO})


def open_encoder(name):
    return core.load_encoder(name, words_tokenizer())


def rebuild_encoder(name):
    """As run_preference.py does from a run's own folder."""
    return encoders.stored_encoder(name)


OPENERS = (
    *(pretrained.open_any, pretrained.load_other, core.open_model, gpt_formats.load_pretrained),
    *(tokenizers.named_tokenizer, tokenizers.encoder_tokenizer, open_encoder, rebuild_encoder),
)
KINDS = (
    "config",
    "unknown",
    "tokenizer",
    "config tokenizer",
    "generation",
    "pickled",
    "quantisation",
    "unknown tokenizer",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("consent", ["y\n1\nyes\n" * 9, ""], ids=["yes", "no input"])
def test_no_code_of_a_folder_runs_whatever_stands_on_stdin(kind, consent, monkeypatch, tmp_path):
    flag, folder = tmp_path / "flag", gpt2("model")
    plant(folder, kind, str(flag))
    stdin = io.StringIO(consent)
    monkeypatch.setattr(sys, "stdin", stdin)
    for opens in OPENERS:
        try:
            opens(str(folder))
        except UserError as error:
            assert "\n" not in str(error)
    assert not flag.exists() and stdin.read() == consent  # nobody was asked
    assert not [name for name in sys.modules if "evil" in name]


def test_the_planted_code_would_run(tmp_path):
    """So that the test above can fail."""
    folder = gpt2("model")
    plant(folder, "config", str(tmp_path / "flag"))
    transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (tmp_path / "flag").read_text() == "ran"
    sys.modules.pop("evil", None)


def drop_layer(folder):
    edit_json(folder / "config.json", n_layer=1)


def add_head(folder):
    edit_weights(folder, lambda w: w.update({"lm_head.weight": torch.randn(23, 32)}))


def add_score(folder):
    edit_weights(folder, lambda w: w.update({"score.weight": torch.ones(2)}))


def drop_bias(folder):
    edit_weights(folder, lambda w: w.pop("transformer.ln_f.bias"))


def add_adapter(folder):
    edit_json(folder / "adapter_config.json", peft_type="LORA")


def add_words(folder):
    words_tokenizer(26).save_pretrained(folder)


def add_kernel(folder):
    edit_json(folder / "config.json", _attn_implementation="evil/kernel")


OTHER = {  # what was done to a folder of GPT-2 -> what is said
    "fewer layers": (drop_layer, "a gpt2 of its config.json does not read, e.g. transformer.h.1."),
    "an own head": (add_head, "has a head of its own, which its config ties to the embedding"),
    "more": (add_score, "1 weights that a gpt2 of its config.json does not read, e.g. score.weight"),
    "less": (drop_bias, "lacks 1 weights, e.g. transformer.ln_f.bias"),
    "an adapter": (add_adapter, "run_lora.py --model BASE"),
    "a larger tokenizer": (add_words, "has 26 tokens, the model 23"),
    "attention of the Hub": (add_kernel, "wants the attention of evil/kernel"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER)
def test_weights_of_another_model_than_the_configs_are_refused(case):
    folder, (change, said) = gpt2("model"), OTHER[case]
    core.open_model(str(folder))
    change(folder)
    for opens in (core.open_model, pretrained.open_any):
        with pytest.raises(UserError) as error:
            opens(str(folder))
        assert said in str(error.value) and "\n" not in str(error.value)


def test_buffers_that_older_versions_saved_and_a_head_that_equals_the_embedding_are_no_fault():
    folder = gpt2("model")
    wanted = core.open_model(str(folder))[0].state_dict()

    def as_before(weights):
        weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
        for i in range(2):
            weights[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
            weights[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()

    edit_weights(folder, as_before)
    found = core.open_model(str(folder))[0].state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("size", [*trusted.MOST])
@pytest.mark.parametrize("value", [10**14, 0, -3])
def test_an_absurd_size_is_refused_by_name_before_anything_is_made(size, value):
    folder = gpt2("model")
    names = transformers.GPT2Config.attribute_map | {"intermediate_size": "n_inner"}
    edit_json(folder / "config.json", **{names.get(size, size): value})
    with pytest.raises(UserError) as error:
        core.open_model(str(folder))
    assert "\n" not in str(error.value)


def test_numbers_that_are_none_are_refused_in_a_config_and_in_weights():
    folder = gpt2("model")
    edit_json(folder / "config.json", resid_pdrop=float("nan"))
    with pytest.raises(UserError, match=r"model has resid_pdrop nan in its config.json: use a finite number"):
        core.open_model(str(folder))
    with pytest.raises(UserError, match=r"no finite number: its weights or its config.json are damaged"):
        trusted.same(torch.zeros(2), torch.tensor([1.0, float("nan")]))


def test_a_model_larger_than_memory_is_refused_before_memory_is_asked_for():
    folder = gpt2("model")
    edit_json(folder / "config.json", n_embd=100_000, n_layer=900)
    with pytest.raises(UserError, match=r"parameters, .* GB, this machine"):
        core.open_model(str(folder))
    with pytest.raises(UserError, match=r"a model of this shape has 1.2e\+13 parameters"):
        core.GPT(core.GPTConfig(50_257, n_embd=100_000, n_head=10, n_layer=100))
    for name, value in {
        "n_layer": 10**9,
        "n_embd": 0,
        "block_size": 10**12,
        "n_head": "2",
        "vocab_size": None,
    }.items():
        with pytest.raises(UserError, match=f"a model with {name} {value}: use a whole number"):
            core.GPTConfig(**{"vocab_size": 9, name: value})


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_a_model_whose_later_tokens_change_earlier_logits_is_not_causal(kind):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=60, initializer_range=0.5, is_decoder=False, **SMALL
    )
    transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False).save_pretrained("model")
    words_tokenizer().save_pretrained("model")
    with pytest.raises(UserError, match="is not causal: later tokens change what it says of earlier ones"):
        pretrained.open_any("model")


def test_logits_that_are_not_a_gpt2s_are_found_though_its_config_tells_nothing(monkeypatch):
    folder = gpt2("model")
    forward = transformers.GPT2LMHeadModel.forward

    def doubled(self, *args, **options):
        out = forward(self, *args, **options)
        out.logits = 2 * out.logits
        return out

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "forward", doubled)
    with pytest.raises(UserError, match="computes other logits than a gpt2 of its config"):
        core.open_model(str(folder))
