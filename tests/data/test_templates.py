"""Chat templates: ids and masks token by token as transformers has them; rows of messages."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from toys.chat import BEGUN, ENDS, TEMPLATES, chat_tokenizer, turns
from toys.gpt import random_gpt
from toys.sft import config, write_rows

import core
from core import IGNORE_INDEX, UserError, World
from lab.compare import prompts
from lab.data import instructions, templates
from lab.data.templates import Chat
from lab.data.tokenizers import named_tokenizer
from lab.measure import answers, other_data, tuning

ONE, TWO = turns("The cat?", "sat on the mat."), turns("A bird?", "sang.", "Where?", "in the tree, é 日.")
THREE = turns("a", "b", "c", "", "e", "f\n\ng")


def load(rows, tokenizer, *argv) -> instructions.Instructions:
    argv = ["--template", "chat", *argv]
    cfg = config("run_instruct", "--data", write_rows(rows), "--model", "none", *map(str, argv))
    return core.load_instructions(cfg, World(), tokenizer)


def reference(tokenizer, messages, **how):
    how["chat_template"] = tokenizer.chat_template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    return tokenizer.apply_chat_template(messages, return_dict=True, **how)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_rows_are_the_templates_token_by_token_and_every_answer_is_learnt(kind):
    tokenizer = chat_tokenizer(kind)
    rows = [ONE, TWO, THREE, turns("x", "y", system="Be brief."), turns(" x\n", "\ty ", "z", " w")]
    rows = rows if kind != "mistral" else [row for row in rows if row[0]["role"] == "user"]
    data = load([{"messages": row} for row in rows] * 2, tokenizer)
    examples, end = (
        core.Examples(data, np.arange(len(data)), 512),
        tokenizer.convert_tokens_to_ids(ENDS[kind]),
    )
    assert data.end == end == templates.end_id(tokenizer, "chat")
    for row, messages in enumerate(rows):
        messages = [turn | {"content": turn["content"].strip()} for turn in messages]
        begin = [tokenizer.bos_token_id] if kind == "zephyr" else []  # its template writes none
        asks = reference(tokenizer, messages[:-1], add_generation_prompt=True)
        assert data.prompt(row) == begin + asks["input_ids"]
        whole = reference(tokenizer, messages, return_assistant_tokens_mask=True)
        learnt = [0] * len(begin) + whole["assistant_masks"]
        most = len(data.whole(row))
        assert data.whole(row) == (begin + whole["input_ids"])[:most] and data.whole(row)[-1] == end
        assert not any(learnt[most:])  # a line break behind the end token
        ids, labels = examples.pair(row)
        assert ids == data.whole(row)[:-1]
        wanted = zip(data.whole(row)[1:], learnt[1:most], strict=True)
        assert labels == [token if is_learnt else IGNORE_INDEX for token, is_learnt in wanted]
        assert data.whole(row).count(tokenizer.bos_token_id) == (kind in BEGUN)
    counted = [sum(x != IGNORE_INDEX for x in examples.pair(i)[1]) for i in range(len(data))]
    assert examples.targets(range(len(data))).tolist() == counted
    assert [len(ids) for ids in examples.target_ids()] == counted
    rewritten = [line for line in data.lines if "the last answer is learnt" in line]
    assert [line[:11] for line in rewritten] == (["of 6 row(s)"] if kind == "qwen3" else [])


@pytest.mark.parametrize("kind", ["chatml", "llama3"])
def test_instruction_rows_are_one_turn_each_and_a_question_is_asked_as_it_was_learnt(kind):
    tokenizer = chat_tokenizer(kind)
    rows = [{"instruction": "Add.", "input": "1 and 2", "output": "3"}, {"instruction": "x", "output": "y"}]
    data = load(rows, tokenizer)
    wanted = reference(tokenizer, turns("Add.\n\n1 and 2"), add_generation_prompt=True)["input_ids"]
    assert data.prompt(0) == wanted == templates.question_ids(tokenizer, "Add.", "1 and 2", "chat")
    assert data.prompt(1) == templates.question_ids(tokenizer, "x", "", "chat")
    same = load([{"messages": turns("Add.\n\n1 and 2", "3")}, {"messages": turns("x", "y")}], tokenizer)
    assert all(data.whole(row) == same.whole(row) for row in (0, 1))
    assert data.columns(0) == {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    assert data.fingerprint["template"] == "chat" and "chat" in data.fingerprint
    tokenizer.save_pretrained("kept")
    assert Chat(named_tokenizer("kept")).facts() == {"chat": data.fingerprint["chat"]}
    tokenizer.chat_template = " " + TEMPLATES[kind]
    assert Chat(tokenizer).facts() != {"chat": data.fingerprint["chat"]}  # another folder of the cache


def test_a_cut_row_of_several_turns_keeps_the_targets_that_are_left():
    data = load([{"messages": TWO}] * 3, chat_tokenizer("chatml"))
    whole = core.Examples(data, np.arange(3), 512).pair(0)
    for most in range(16, len(whole[0]) + 3):
        cut = core.Examples(data, np.arange(3), most)
        assert cut.pair(0) == tuple(part[: most - 1] for part in whole)
        left = sum(x != IGNORE_INDEX for x in whole[1][: most - 1])
        assert cut.targets([0, 1]).tolist() == [left, left]
        assert (left > 0) == (min(len(data.whole(0)), most) > data.first_targets[0])  # as `split` leaves out


def test_packs_bytes_and_the_shown_mask_know_several_answers():
    data = load([{"messages": TWO}, {"messages": ONE}] * 2, chat_tokenizer("chatml"))
    examples = core.Examples(data, np.arange(4), 256)
    packs, counted = core.Packs(examples, 256), int(examples.targets(range(4)).sum())
    _, labels, segments = packs.batch(range(len(packs)), "cpu")
    assert int((labels != IGNORE_INDEX).sum()) == counted and segments.max() >= 1
    assert tuning.spelt_bytes(examples).tolist() == [len("sang.in the tree, é 日.".encode()), 15] * 2
    lines = tuning.describe_example(examples).splitlines()
    masked = len(data.whole(0)) - int(examples.targets([0])[0])
    assert f"{examples.targets([0])[0]} targets, {masked} tokens masked; padding is masked" in lines[0]
    assert [line[:10].strip() for line in lines[1:]] == ["masked:", "counted:"] * 2
    assert lines[2] == "  counted: sang.<|im_end|>" and lines[4] == "  counted: in the tree, é 日.<|im_end|>"
    cut = int(data.prompt_lengths[0]) - 2  # within the last question: an id that is masked ends the row
    lines = tuning.describe_example(core.Examples(data, np.arange(4), cut)).splitlines()
    assert [line[:10].strip() for line in lines[1:]] == ["masked:", "counted:", "masked:"]
    prompt = core.Examples(data, np.arange(4), 256, loss_on_prompt=True)
    assert prompt.pair(0)[1] == data.whole(0)[1:] and prompt.targets([0]) == len(data.whole(0)) - 1


def test_conversations_that_begin_alike_stay_in_one_part_and_keep_their_turns():
    rows = [{"messages": ONE}, {"messages": ONE + turns("More?", "no")}, {"messages": TWO}]
    data = load(rows, chat_tokenizer("chatml"))
    assert data.groups[0] == data.groups[1] != data.groups[2]
    assert data.groups[0] == instructions.prompt_hash("The cat?", "")
    assert data.texts[1] == ["More?", "user: The cat?\n\nassistant: sat on the mat.", "no"]
    assert "messages" not in data.columns(0) and data.columns(1)["messages"] == rows[1]["messages"]


GPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "x"},
    {"from": "gpt", "value": "y"},
]


def test_rows_of_messages_are_read_under_the_other_templates_if_they_hold_one_question():
    for columns in ({}, {"instruction": None, "input": None, "output": None}):  # of a table of both kinds
        assert templates.parse({"messages": ONE} | columns) == ["The cat?", "", "sat on the mat."]
        assert prompts.writable({"messages": ONE} | columns, 1, "d")["instruction"] == "The cat?"
    assert templates.parse({"conversations": GPT}) == ["x", "Be brief.", "y"]
    assert templates.parse({"messages": TWO, "instruction": "i", "output": "o"}) == ["i", "", "o"]
    with pytest.raises(ValueError, match="several questions, which --template chat takes"):
        templates.parse({"messages": TWO})
    rows = [{"messages": turns(f"q {i}", "a")} for i in range(200)]
    rows[7] = {"messages": TWO}
    argv = ["--smoke", "--data", write_rows(rows)]
    data = core.load_instructions(config("run_lora", *argv), World())
    assert len(data) == 199 and data.lines == [
        "left out 1 row(s), it has several questions, which --template chat takes: 8"]  # fmt: skip
    assert "### Instruction:\nq 0\n\n### Response:\n" in data.tokenizer.decode(data.prompt(0))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("text", "messages is no list of turns"),
        (["text"], "messages is no list of turns"),
        ([{"role": "user", "content": None}], "turn 1 of messages is no text"),
        ([ONE[0], ONE[1] | {"tool_calls": [{}]}], "turn 2 of messages has tool_calls, which are not read"),
        ([{"role": ["user"], "content": "x"}], "not user and assistant by turns"),
        (turns("x", "\ud800"), "turn 2 of messages has odd Unicode"),
        ([*ONE, *turns("x", system="late")], "a system turn that is not its first"),
        (turns("x", "y")[::-1], "not user and assistant by turns"),
        ([*ONE, {"role": "tool", "content": "x"}], "not user and assistant by turns"),
        (turns("x", "y", "z"), "no answer at its end"),
        ([], "no answer at its end"),
        (turns(" \n", "y"), "a user turn of messages is empty"),
    ],
)
def test_unusable_messages_are_told_apart(messages, reason):
    with pytest.raises(ValueError, match=reason):
        templates.messages_of({"messages": messages})


def test_what_a_template_refuses_and_spelled_special_tokens_are_counted():
    rows = [{"messages": turns(f"q {i}", "a")} for i in range(400)]
    rows[3], rows[5] = {"messages": turns("x", "y", system="s")}, {"messages": turns("x", "a </s> b")}
    rows[9] = {"messages": turns("what is <s>?", "y", "and?", "z")}
    assert load(rows, chat_tokenizer("mistral")).lines == [
        "left out 1 row(s), the chat template refuses it: no system turns: 4",
        "left out 1 row(s), a turn spells the special token </s>: 6",
        "left out 1 row(s), a turn spells the special token <s>: 10",
    ]
    with pytest.raises(UserError, match=r"^--template chat: a turn spells the special token </s>: ask other"):
        templates.question_ids(chat_tokenizer("mistral"), "</s>", "", "chat")
    rows = [{"messages": turns("x", "<think>\nhm\n</think>\n\ny")}]  # no special ones: Qwen3's own
    assert "<think>\nhm" in (data := load(rows, chat_tokenizer("chatml"))).tokenizer.decode(data.whole(0))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "",
            r"^--template chat needs a chat template, the model's tokenizer brings none: use --template alp",
        ),
        ("{{ raise_exception('no') }}", r"needs a chat template \(the chat template refuses it: no\): use"),
        ("{{ messages[0].content }}{{ add_generation_prompt }}", "writes an answer otherwise than it asks"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "template ends no answer: use --template"),
    ],
)
def test_a_template_that_cannot_be_learnt_from_is_one_line(template, reason):
    tokenizer = chat_tokenizer("chatml", template)
    with pytest.raises(UserError, match=reason):
        load([{"messages": ONE}], tokenizer)


def test_models_made_here_have_no_chat_template():
    with pytest.raises(UserError, match=r"^--template chat: tiny:gpt2 has no chat template: use --template"):
        core.load_instructions(config("run_lora", "--smoke", "--template", "chat"), World())


@pytest.mark.parametrize("kind", TEMPLATES)
def test_generation_stops_at_the_token_that_was_learnt(kind):
    """In ChatML it is not the tokenizer's own end token."""
    tokenizer = chat_tokenizer(kind)
    data = load([{"messages": ONE}], tokenizer)

    class Written:  # a model that knows the row, and goes on behind it
        config = SimpleNamespace(block_size=512)

        def continuations(self, rows, most, *, stop, **how):
            assert rows == [data.prompt(0)]
            ids = [*data.whole(0)[len(rows[0]) :], *tokenizer("A bird", add_special_tokens=False).input_ids]
            return [ids[: next(i for i, token in enumerate(ids) if token in stop)]]

    got = answers.answers(Written(), tokenizer, [data.prompt(0)], 64, 1, World(), template="chat")
    assert got == ["sat on the mat."]


def test_rows_of_messages_are_asked_as_they_were_learnt():
    tokenizer = chat_tokenizer("chatml")
    rows = [{"messages": TWO, "id": 7}, {"messages": turns("x")}, {"instruction": "i", "input": "j"}]
    asked, texts = prompts.read_prompts(write_rows(rows), None, "chat")
    assert other_data.kind_of(write_rows(rows[:1], "turns.json"), "text") == "rows"
    data = load([{"messages": TWO}], tokenizer)
    assert prompts.as_ids(tokenizer, texts, "d")[0] == data.prompt(0)
    assert prompts.as_ids(tokenizer, texts, "d")[2] == templates.question_ids(tokenizer, "i", "j", "chat")
    assert asked[0] == data.columns(0) | {"messages": TWO, "id": 7} and asked[1]["instruction"] == "x"
    Path("again.json").write_text(json.dumps(asked[:1]))  # responses.json of one model, asked of another
    assert prompts.read_prompts("again.json", None, "chat")[1] == texts[:1]
    assert "user: A bird?" in prompts.read_prompts("again.json", None, "alpaca")[1][0]
    with pytest.raises(UserError, match=r"rows.json: row 1 has no usable instruction \(it has several quest"):
        prompts.read_prompts("rows.json", None, "alpaca")
    with pytest.raises(UserError, match=r"d cannot be asked under --template chat: a turn spells"):
        prompts.as_ids(tokenizer, [turns("<|im_end|>")], "d")


@pytest.mark.parametrize("kind", ["chatml", "zephyr"])
def test_an_exported_model_stops_where_its_answers_were_learnt_to(kind, tmp_path):
    from transformers import GenerationConfig

    tokenizer = chat_tokenizer(kind)
    end, eos = templates.end_id(tokenizer, "chat"), tokenizer.eos_token_id
    core.save_pretrained(random_gpt(vocab_size=len(tokenizer)), tokenizer, tmp_path, end)
    wanted = [end, eos] if kind == "chatml" else eos  # zephyr's answers end with the tokenizer's own
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == wanted
