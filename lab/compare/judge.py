"""A language model grades answers: any endpoint that speaks OpenAI's chat completions.

Every reply is written at once to runs/replies/judge_<hash of judge>.jsonl (not to the cache, which people
empty): no question is asked twice, and a killed run continues. What is no answer (a refusal, an empty or a
cut reply) is not kept: it is asked again.
"""

import hashlib
import http.client
import json
import os
import queue
import random
import re
import sys
import threading
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from lab.compare.endpoint import (
    LOCAL,
    checked_host,
    exchange,
    fault,
    in_time,
    key_of,
    secrets_of,
    shown_url,
    told_pause,
)
from lab.compare.grades import duel_figures, summary
from lab.compare.protocols import (
    pair_question,
    parse_score,
    parse_verdict,
    score_question,
    without_thoughts,
)
from lab.compare.responses import by_prompt
from lab.compare.tables import slug
from lab.data.cache import cache_root
from lab.errors import Stop, UserError
from lab.run.files import short_hash
from lab.run.terminal import one_line
from lab.train.processes import progress

BACK_OFF = 1.0  # seconds before the second attempt; doubled before each further one, up to a minute
TRIED_AGAIN = {408, 409, 425, 429}  # and all from 500 on: worth another attempt
OF_ONE_QUESTION = {400, 413, 414, 422, 451}  # too long, filtered: others may be answered
NOTHING_ELSE = {413, 414, 451}  # of these whatever is said; 400 and 422 may also mean a wrong parameter
OF_THE_ACCOUNT = re.compile(r"quota|billing|credit|balance|payment|insufficient|suspended|deactivated", re.I)
FILTERED = re.compile(r"filter|flagged|moderat|content.policy|safety", re.I)
TOO_LONG = re.compile(r"context.?(length|window|size)|too (long|large)|maximum .{0,30}(length|tokens)", re.I)
LONGEST_WAIT = 600.0  # seconds: told to wait longer, the judge is asked another day


class Refused(Exception):
    """The judge refuses: neither another attempt nor another question would help."""


class Unanswered(Exception):
    """The judge has no answer to this one question: it is too long, or the reply is empty or cut."""


class Busy(Exception):
    """The judge may answer later; `pause`: seconds that it asks to wait."""

    def __init__(self, reason, pause=0.0):
        super().__init__(reason)
        self.pause = pause


@dataclass
class Judge:
    """A model behind an endpoint. `ask` may be killed at any moment."""

    url: str  # up to and with /v1; a query (?api-version=...) stays behind the path and is told nowhere
    model: str
    key: str | None = field(default=None, repr=False)
    temperature: float | None = 0.0  # none = the endpoint's own
    seconds: float = 60.0  # of patience with one request
    attempts: int = 6
    requests: int = 4  # at once
    replies: dict = field(default_factory=dict)

    def __post_init__(self):
        base, _, query = self.url.partition("?")
        self.url = base.rstrip("/").removesuffix("/chat/completions")
        self.endpoint = f"{self.url}/chat/completions{'?' * bool(query)}{query}"
        self.lock, self.asked, self.troubles, self.unanswered = threading.Lock(), 0, set(), {}
        self.secrets = secrets_of(self.key, self.endpoint)
        name = short_hash([self.url + "?" * bool(query) + query, self.model, self.temperature])
        self.path = Path("runs/replies") / f"judge_{name}.jsonl"
        for path in (cache_root() / self.path.name, self.path):  # before 2026-11-28: in the cache
            self.replies |= kept_replies(path)

    @property
    def about(self) -> dict:
        """Which judge it is: grades of another are not to be compared with its own."""
        return {"judge": self.model, "url": self.url, "temperature": self.temperature}

    def ask(self, questions) -> list[str | None]:
        """Replies to questions (text, repeat number); None where the judge has none. UserError for a lasting
        failure, or where most have none; replies so far are kept."""
        keys = [hashlib.sha256(json.dumps(question).encode()).hexdigest() for question in questions]
        new = {key: text for key, (text, _) in zip(keys, questions, strict=True) if key not in self.replies}
        if new:
            self._fetch(list(new.items()))
        if none := [self.unanswered[key] for key in new if key not in self.replies]:
            share = f"no answer to {len(none)} of {len(keys)} questions, e.g. {none[0]}"
            if 2 * len(none) > len(keys):
                raise UserError(f"{self} gives {share}; {self._kept(new)}")
            tqdm.write(f"{self} gives {share}: the same command asks again", file=sys.stderr)
        return [self.replies.get(key) for key in keys]

    def __str__(self):
        return f"judge {one_line(self.model)} at {self.url}"

    def _fetch(self, new):
        """Asks each (key, text) over HTTP: the first alone, since most faults show there."""
        self._open_cache()
        self.gave_up, waiting, done = threading.Event(), queue.SimpleQueue(), queue.SimpleQueue()
        for question in new[1:]:
            waiting.put(question)
        try:
            with progress(len(new), "judging") as bar:
                self._answer(*new[0])
                bar.update()
                for _ in range(self.requests):  # nobody waits for such threads: Ctrl-C ends at once
                    threading.Thread(target=self._work, args=(waiting, done), daemon=True).start()
                for _ in new[1:]:
                    if error := done.get():
                        raise error
                    bar.update()
        except Refused as error:
            raise UserError(f"{self}: {error}; {self._kept(dict(new))}") from None
        except Stop as stop:
            raise Stop(f"{stop}: {self._kept(dict(new))}, the same command goes on") from None
        finally:
            self.gave_up.set()  # who waits to try again gives up, too

    def _work(self, waiting, done):
        """Body of a thread: answers waiting questions and puts None or the error of each into `done`."""
        while not self.gave_up.is_set():
            try:
                done.put(self._answer(*waiting.get_nowait()))
            except queue.Empty:
                return
            except Exception as error:
                self.gave_up.set()
                done.put(error)

    def _kept(self, new) -> str:
        return f"{sum(key in self.replies for key in new)} of {len(new)} questions are answered and kept"

    def _answer(self, key, text):
        try:
            reply = self._patiently(text)
        except Unanswered as error:
            with self.lock:
                self.unanswered[key], self.asked = str(error), self.asked + 1
            return
        line = json.dumps({"key": key, "reply": reply, "question": text})
        with self.lock:
            try:
                with open(self.path, "ab", buffering=0) as file:
                    if not any(secret in reply for secret in self.secrets):  # else it counts, and is not kept
                        file.write(f"{line}\n".encode())  # at once: other processes may append, too
            except OSError as error:
                raise Refused(f"{self.path} cannot be written ({error.strerror})") from None
            self.replies[key], self.asked = reply, self.asked + 1

    def _open_cache(self):
        """Opens the cache to append; ends a half line that a killed process left."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    file.write(b"" if file.read(1) == b"\n" else b"\n")
        except OSError as error:
            where = f"judge's replies cannot be kept in {self.path.parent} ({error.strerror})"
            raise UserError(f"{where}: make room there, or start elsewhere") from None

    def _patiently(self, text) -> str:
        """Sends a request, again with growing pauses as long as that may help."""
        for attempt in range(self.attempts):
            if self.gave_up.is_set():
                raise Refused("given up")
            try:
                return self._request(text)
            except Busy as error:
                reason, told = str(error), error.pause
            if told > LONGEST_WAIT:
                longest = f"asks to wait {told:.0f} s, more than the {LONGEST_WAIT:.0f} that are waited"
                raise Refused(f"{reason}: it {longest}; the same command goes on later")
            doubled = min(60, BACK_OFF * 2**attempt) * random.uniform(0.75, 1.25)  # not all at once again
            if attempt + 1 < self.attempts:
                self._note(f"{reason} (it asks to wait {told:.3g} s)" if told else reason)
                if self.gave_up.wait(max(told, doubled)):
                    raise Refused("given up")
        raise Refused(f"{reason}, {self.attempts} times; the same command goes on when it answers")

    def _note(self, reason):
        """Prints each kind of trouble once, so that the user knows why nothing moves."""
        kind = re.sub(r"\d+", "", reason)  # the seconds to wait are others each time
        with self.lock:
            if kind not in self.troubles:
                self.troubles.add(kind)
                tqdm.write(f"the judge is asked again: {reason}", file=sys.stderr)

    def _request(self, text) -> str:
        """Sends one request; returns the text of the reply. Busy, Unanswered or Refused where it has none."""
        body = {"model": self.model, "messages": [{"role": "user", "content": text}]}
        body |= {} if self.temperature is None else {"temperature": self.temperature}
        headers = {"Content-Type": "application/json", "User-Agent": "eval.py"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        request = urllib.request.Request(self.endpoint, json.dumps(body).encode(), headers)
        try:
            status, reason, headers, read = in_time(self.seconds, exchange, request, self.seconds)
        except (OSError, http.client.HTTPException, ValueError) as error:  # URLError is an OSError
            if isinstance(getattr(error, "reason", error), ConnectionRefusedError) and not self.asked:
                raise Refused("connection refused: start it (`ollama serve`), or set --judge_url") from None
            raise Busy(self._shown(fault(error))) from None
        said = read.decode("utf-8", "replace")
        if status < 300:
            return self._content(said)
        raise self._refusal(status, f"HTTP {status} {self._shown(f'{reason}: {said}')}", headers, said)

    def _content(self, said) -> str:
        """The text of a chat completion. Unanswered where it is empty, cut or filtered; Busy if none."""
        try:
            choice = json.loads(said)["choices"][0]
            text, ended = text_of(choice["message"].get("content")), choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise Busy(f"no chat completion: {self._shown(said)}") from None
        if ended in ("length", "content_filter"):  # a grade that was cut is another grade
            raise Unanswered(f"a reply that was cut (finish_reason {ended})")
        if not without_thoughts(text):
            raise Unanswered(f"a reply without a word (finish_reason {self._shown(str(ended))})")
        return text

    def _refusal(self, status, reason, headers, said) -> Exception:
        """What an HTTP error means: another attempt, another question, or the end."""
        if status >= 500 or status in TRIED_AGAIN:
            return Busy(reason, told_pause(headers, said))
        of_its_text = FILTERED.search(said) or (status != 403 and TOO_LONG.search(said))
        one = status in NOTHING_ELSE or (of_its_text and status in {403, *OF_ONE_QUESTION})
        one = one or (status in OF_ONE_QUESTION and self.replies)
        if one and not OF_THE_ACCOUNT.search(said):
            return Unanswered(reason)
        without = ", or leave a parameter out: --judge_temperature none" if status in (400, 422) else ""
        return Refused(f"{reason} (see --judge_url, --judge_model, --judge_key{without})")

    def _shown(self, text) -> str:
        """What a server said, as a message may hold it: without a secret, in one line, cut."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return " ".join(one_line(text).split())[:160]


def kept_replies(path) -> dict[str, str]:
    """key -> reply of a judge's file; empty where there is none. UserError where it cannot be read."""
    try:
        lines, replies = path.read_bytes().splitlines(), {}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        where = f"judge's replies in {path} cannot be read ({error.strerror})"
        raise UserError(f"{where}: give them back, or start elsewhere") from None
    for line in lines:
        try:
            entry = json.loads(line)
            replies |= {entry["key"]: entry["reply"]} if isinstance(entry["reply"], str) else {}
        except (ValueError, TypeError, KeyError, RecursionError):
            continue  # half a line of a killed process: that reply is asked for again
    return replies


def text_of(content) -> str:
    """The text of a message's content: a string, a number, or parts: of these the ones of text."""
    if isinstance(content, list):
        return "".join(map(text_of, content))
    if isinstance(content, dict):
        is_text = content.get("type", "text") in ("text", "output_text")
        return text_of(content.get("text", content.get("value"))) if is_text else ""
    return "" if content is None or isinstance(content, bool) else str(content)


def make_judge(cfg) -> Judge:
    """The judge that the constants name. Its key comes from the environment only."""
    host = checked_host(cfg.judge_url)
    key = key_of(cfg.judge_key) if cfg.judge_key else None
    if not key and cfg.judge_key and host not in LOCAL:
        wanted = f"export {cfg.judge_key}=..., name another variable by --judge_key, or --judge_key none"
        raise UserError(f"judge {shown_url(cfg.judge_url)}: no key in the environment: {wanted}")
    if key and host not in LOCAL and not cfg.judge_url.lower().startswith("https:"):
        print(f"WARNING the key goes to {host} unencrypted: use https there if it is one", file=sys.stderr)
    patience = {"seconds": cfg.judge_seconds, "attempts": cfg.judge_attempts, "requests": cfg.judge_requests}
    return Judge(cfg.judge_url, cfg.judge_model, key, cfg.judge_temperature, **patience)


def score(judge, rows, repeats=1) -> dict:
    """Grades rows of responses.json: mean with interval by prompt, unreadable replies, the judge's noise."""
    empty = [not row["model_response"].strip() for row in rows]
    asked = [(i, repeat) for i in range(len(rows)) if not empty[i] for repeat in range(repeats)]
    replies = judge.ask([(score_question(rows[i]), repeat) for i, repeat in asked])
    grades = [[0] * repeats if nothing else [] for nothing in empty]
    for (i, _), reply in zip(asked, replies, strict=True):
        grades[i].append(parse_score(reply or ""))
    return summary(rows, grades) | judge.about | {"repeats": repeats, "unanswered": replies.count(None)}


def duel(judge, ours, theirs, repeats=1) -> dict:
    """Has two runs' answers to the same prompts compared, in both orders; a win and a loss are a tie.

    Rates with intervals by prompt: of the first run's wins (ties half), of first places, of longer answers.
    """
    sides = by_prompt(ours), by_prompt(theirs)
    pairs = [(row, sides[1][key]) for key, row in sides[0].items() if key in sides[1]]
    if not pairs:
        raise UserError("the two have no prompt in common: compare answers to the same rows")
    questions, where = [], []
    for i, (a, b) in enumerate(pairs):
        if a["model_response"].strip() == b["model_response"].strip():
            continue  # nothing to choose
        for repeat in range(repeats):
            questions += [(pair_question(a, a, b), repeat), (pair_question(a, b, a), repeat)]
            where += [(i, "A"), (i, "B")]  # as which of the two the first run was shown
    replies = judge.ask(questions)
    verdicts = [parse_verdict(reply or "") for reply in replies]
    alone = {"without_partner": len(ours) + len(theirs) - 2 * len(pairs)}
    asked = judge.about | {"repeats": repeats, "unanswered": replies.count(None)}
    return duel_figures(pairs, where, verdicts) | alone | asked


def duel_name(judge, paths) -> str:
    """Name of the file of a duel between two files of answers: another pair's or judge's is another."""
    words = [judge.model]
    for path in paths:
        words.append((path.name == "responses.json" and path.parent.name) or path.stem)
    known = [*judge.about.values(), *(str(path.resolve()) for path in paths)]
    return f"duel_{'_'.join(map(slug, words))}-{short_hash(known, 6)}.json"
