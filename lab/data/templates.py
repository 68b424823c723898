"""Templates: how an instruction, or turns of messages, become the text before an answer; the end of one.

alpaca and journal are written here; chat is the template that a tokenizer brings.
"""

import re

from lab.data.cache import is_clean
from lab.data.columns import INSTRUCTION_COLUMNS
from lab.data.tables import MISSING_WORDS, is_missing
from lab.data.tokenizers import begin_ids, prompt_ids
from lab.errors import UserError
from lab.run.files import short_hash

PREAMBLE = "Below is an instruction that describes a task"
ASK = "Write a response that appropriately completes the request."
COLUMNS = {"messages": ("role", "content"), "conversations": ("from", "value")}  # the latter: ShareGPT's
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
# of a turn, beside its content: the model would learn to say nothing where it should call a tool
UNREAD = ("tool_calls", "function_call", "reasoning_content", "thinking")
# some templates write today's date; they are told this one, for rows must be the same tomorrow
ONE_DAY = "{% macro strftime_now(form) %}26 Jul 2024{% endmacro %}"
QUESTION, ANSWER = "What is six times seven?", "Forty-two"
PROBE = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]


def prompt_text(instruction, given, template) -> str:
    """What stands before the answer: Alpaca's text with its two preambles, or (journal) the first for both.

    It ends with a line break, as in the data set's own column of text: no token crosses the border.
    """
    context = ", paired with an input that provides further context" if given and template == "alpaca" else ""
    parts = [f"{PREAMBLE}{context}. {ASK}", f"### Instruction:\n{instruction}"]
    parts += [f"### Input:\n{given}"] if given else []
    return "\n\n".join([*parts, "### Response:\n"])


def parse(row, answered=True) -> list[str]:
    """[instruction, input, output], stripped; of `messages` where there is no instruction. ValueError names
    the fault. answered: messages end with an answer."""
    if not isinstance(row, dict):
        raise ValueError("no object with columns")
    # a table of both kinds of rows holds None in the other kind's columns
    if row.get("instruction") is None and (messages := messages_of(row, answered)):
        if sum(turn["role"] == "user" for turn in messages) > 1:
            raise ValueError("it has several questions, which --template chat takes")
        return as_texts(messages)
    texts = [row.get(column) for column in INSTRUCTION_COLUMNS]
    if texts[1] is None or (isinstance(texts[1], str) and texts[1].strip() in MISSING_WORDS):
        texts[1] = ""  # some sets leave it out, or write None
    for column, text in zip(INSTRUCTION_COLUMNS, texts, strict=True):
        if not isinstance(text, str):
            raise ValueError(f"{column} is no text")
        if is_missing(text):
            raise ValueError(f"{column} is missing ({text.strip()})")
        if not is_clean(text):
            raise ValueError(f"{column} has odd Unicode (a lone surrogate)")
    if not texts[0].strip():
        raise ValueError("instruction is empty")
    return [text.strip() for text in texts]


def messages_of(row, answered=True) -> list[dict] | None:
    """A row's [{"role", "content"}], stripped: one system turn at most, then user and assistant in turn.
    None for a row without such a column. ValueError names the fault. answered: the last turn is an answer."""
    name = next((name for name in COLUMNS if isinstance(row, dict) and row.get(name) is not None), None)
    if name is None:
        return None
    if not isinstance(row[name], list) or not all(isinstance(turn, dict) for turn in row[name]):
        raise ValueError(f"{name} is no list of turns")
    role, content = COLUMNS[name]
    turns = [(ROLES.get(str(turn.get(role)), turn.get(role)), turn.get(content)) for turn in row[name]]
    for number, (turn, (_, text)) in enumerate(zip(row[name], turns, strict=True), start=1):
        if unread := [key for key in UNREAD if turn.get(key)]:
            raise ValueError(f"turn {number} of {name} has {unread[0]}, which are not read")
        if not isinstance(text, str):
            raise ValueError(f"turn {number} of {name} is no text")
        if not is_clean(text):
            raise ValueError(f"turn {number} of {name} has odd Unicode (a lone surrogate)")
    spoken = [role for role, _ in turns if role != "system"]
    system = len(turns) - len(spoken)
    if system > 1 or (system and turns[0][0] != "system"):
        raise ValueError(f"{name} has a system turn that is not its first")
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)):
        raise ValueError(f"turns of {name} are not user and assistant by turns")
    if not spoken or (answered and spoken[-1] != "assistant"):
        raise ValueError(f"{name} has no answer at its end")
    if not all(text.strip() for role, text in turns if role == "user"):
        raise ValueError(f"a user turn of {name} is empty")
    return [{"role": role, "content": text.strip()} for role, text in turns]


def before_answer(messages) -> list[dict]:
    """The turns before the last answer, or all of them where the last is a question."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def user_turn(instruction, given) -> dict:
    return {"role": "user", "content": "\n\n".join(filter(None, [instruction, given]))}


def as_texts(messages) -> list[str]:
    """[instruction, input, output] of a conversation: the last question; what stands before it (of a single
    question the system's text alone); the last answer."""
    *before, last = before_answer(messages)
    given = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in before)
    given = before[0]["content"] if len(before) == 1 else given
    return [last["content"], given, "" if before_answer(messages) is messages else messages[-1]["content"]]


class Chat:
    """The chat template of a tokenizer: what it writes around turns, and the token that ends its answers.

    UserError where there is none, or none that can be learnt from.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.begin = tokenizer, begin_ids(tokenizer)
        try:
            self.template = ONE_DAY + tokenizer.get_chat_template()
            before, whole = self.render(PROBE[:1], asks=True), self.render(PROBE)
        except ValueError as error:
            why = f" ({error})" if tokenizer.chat_template else ", the model's tokenizer brings none"
            raise UserError(f"--template chat needs a chat template{why}: use --template alpaca") from None
        if not whole.startswith(before) or ANSWER not in whole[len(before) :]:
            differs = "the model's template writes an answer otherwise than it asks for one"
            raise UserError(f"--template chat: {differs}: use --template alpaca")
        self.lead, _, behind = whole[len(before) :].rpartition(ANSWER)  # Mistral's blank, Qwen3's no thoughts
        added = tokenizer.added_tokens_decoder
        ends = [i for i in tokenizer(behind, add_special_tokens=False).input_ids if i in added]
        if not ends:
            raise UserError("--template chat: the model's template ends no answer: use --template alpaca")
        self.end = ends[0]
        special = [token.content for i, token in added.items() if token.special or i == self.end]
        self.special = re.compile("|".join(map(re.escape, special)))

    def render(self, messages, asks=False) -> str:
        """The text of a conversation; asks: with what a template puts before an answer. ValueError where the
        template refuses it, as some do a system turn."""
        import jinja2

        how = {"chat_template": self.template, "tokenize": False, "add_generation_prompt": asks}
        try:
            return self.tokenizer.apply_chat_template(messages, **how)
        except (jinja2.TemplateError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"the chat template refuses it: {reason}") from None

    def ids(self, text) -> list[int]:
        """Ids of a rendered text: special tokens are themselves; begin tokens stand in front exactly once."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids if ids[: len(self.begin)] == self.begin else [*self.begin, *ids]

    def question(self, messages) -> list[int]:
        """The ids behind which the model answers. ValueError where a turn spells a special token: the
        template would take it for one."""
        for turn in messages:
            if spelt := self.special.search(turn["content"]):
                raise ValueError(f"a turn spells the special token {spelt[0]}")
        return self.ids(self.render(messages, asks=True))

    def conversation(self, messages) -> tuple[list[int], list[int], list[list[int]], bool]:
        """(ids before the last answer, its ids without the end token, [from, to) in the former of each
        earlier answer with its end token, whether the template writes these otherwise than last ones, so
        that they are not learnt). ValueError where the template does not write what it asks for."""
        if spelt := self.special.search(messages[-1]["content"]):
            raise ValueError(f"a turn spells the special token {spelt[0]}")
        before, text, rewritten = self.question(messages[:-1]), self.render(messages), False
        ids, earlier = self.ids(text), []
        if ids[: len(before)] != before or self.end not in ids[len(before) :]:
            raise ValueError("the chat template writes its answer otherwise than it asks for it")
        for n in (n for n, turn in enumerate(messages[:-1]) if turn["role"] == "assistant"):
            until = self.question(messages[:n])
            same = text.startswith(self.render(messages[: n + 1])) and ids[: len(until)] == until
            rewritten |= not (same and self.end in ids[len(until) : len(before)])
            earlier += [] if rewritten else [[len(until), ids.index(self.end, len(until)) + 1]]
        answer = ids[len(before) : ids.index(self.end, len(before))]
        return before, answer, [] if rewritten else earlier, rewritten

    def said(self, ids) -> str:
        """The text of an answer, without what the template writes before each."""
        return self.tokenizer.decode(ids).strip().removeprefix(self.lead.strip()).strip()

    def facts(self) -> dict:
        """What a fingerprint of rows says of the template."""
        ends = self.tokenizer.bos_token, self.tokenizer.eos_token, self.end
        return {"chat": short_hash([self.template, *ends])}


def question_ids(tokenizer, instruction, given, template) -> list[int]:
    """The ids of a question as a row's prompt has them in training. UserError where it cannot be asked so."""
    if template != "chat":
        return prompt_ids(tokenizer, prompt_text(instruction, given, template))
    try:
        return Chat(tokenizer).question([user_turn(instruction, given)])
    except ValueError as error:
        raise UserError(f"--template chat: {error}: ask otherwise") from None


def end_id(tokenizer, template) -> int:
    """The token that ends an answer, in training and in generation."""
    return Chat(tokenizer).end if template == "chat" else tokenizer.eos_token_id
