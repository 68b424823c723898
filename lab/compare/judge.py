"""A language model grades answers: any endpoint that speaks OpenAI's chat completions.

Every reply is written at once to <TOKEN_CACHE>/judge_<hash of judge>.jsonl: no question is asked twice, and a
killed run continues. Protocols: SCORE (0 to 100, journal 001) and PAIR (both orders).
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
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field

from tqdm import tqdm

from lab.compare.grades import duel_figures, summary
from lab.compare.responses import by_prompt
from lab.data.cache import cache_root
from lab.data.instructions import prompt_text
from lab.errors import Stop, UserError
from lab.run.files import short_hash
from lab.train.processes import progress

SCORE = """You grade how well a response answers a request. Here is the request:

{prompt}

A correct answer, for comparison:

{reference}

The response to be graded:

{answer}

Grade the response from 0 to 100, where 100 is the best. Reply with the whole number alone."""

PAIR = """Two assistants answered the same request. Here is the request:

{prompt}

A correct answer, for comparison:

{reference}

Response A:

{first}

Response B:

{second}

Which response is better? Reply with one word alone: A, B, or tie."""


def request_of(row) -> str:
    """The prompt of a row in Alpaca's template, whatever the model's own: the judge sees one form."""
    return prompt_text(row["instruction"], row.get("input") or "", "alpaca").strip()


def score_question(row) -> str:
    answer = row["model_response"].strip()
    return SCORE.format(prompt=request_of(row), reference=row.get("output") or "", answer=answer)


def pair_question(row, first, second) -> str:
    texts = {"first": first["model_response"].strip(), "second": second["model_response"].strip()}
    return PAIR.format(prompt=request_of(row), reference=row.get("output") or "", **texts)


def parse_score(reply) -> int | None:
    """The only whole number from 0 to 100 in a reply (`85`, `Score: 85/100`), or None."""
    numbers = re.findall(r"-?\d+(?:[.,]\d+)?", re.sub(r"(/|out of) *100\b", "", without_thoughts(reply)))
    fits = len(numbers) == 1 and re.fullmatch(r"\d+(\.0+)?", numbers[0]) and float(numbers[0]) <= 100
    return int(float(numbers[0])) if fits else None


def parse_verdict(reply) -> str | None:
    """A, B or tie if that is all a reply says (`**B**`, `Response B.`), else None."""
    words = re.findall(r"[a-z]+", without_thoughts(reply).lower())
    words = [word for word in words if word not in ("response", "answer", "the", "is", "better")]
    return {"a": "A", "b": "B", "tie": "tie"}.get(words[0]) if len(words) == 1 else None


def without_thoughts(reply) -> str:
    return re.sub(r"<think>.*?(</think>|\Z)", "", reply, flags=re.S)


BACK_OFF = 1.0  # seconds before the second attempt; doubled before each further one, up to a minute
LOCAL = ("localhost", "127.0.0.1", "::1", "0.0.0.0")
TRIED_AGAIN = {408, 409, 425, 429}  # and all from 500 on: worth another attempt
NEVER = {401, 403, 404}  # not worth another question


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: one would send the API key to another host."""

    def redirect_request(self, *args):
        return None


OPENER = urllib.request.build_opener(NoRedirect)


class Refused(Exception):
    """The judge refuses a question; another attempt would not help."""


@dataclass
class Judge:
    """A model behind an endpoint. `ask` may be killed at any moment."""

    url: str  # up to and with /v1
    model: str
    key: str | None = None
    temperature: float = 0.0
    seconds: float = 60.0  # of patience with one request
    attempts: int = 6
    requests: int = 4  # at once
    replies: dict = field(default_factory=dict)

    def __post_init__(self):
        self.url, self.lock, self.asked, self.troubles = self.url.rstrip("/"), threading.Lock(), 0, set()
        name = short_hash([self.url, self.model, self.temperature])
        self.path = cache_root() / f"judge_{name}.jsonl"
        for line in self.path.read_bytes().splitlines() if self.path.exists() else ():
            try:
                entry = json.loads(line)
                self.replies[entry["key"]] = entry["reply"]
            except (ValueError, TypeError, KeyError):
                continue  # half a line of a killed process: that reply is asked for again

    def ask(self, questions) -> list[str]:
        """Replies to questions (text, repeat number). UserError for a lasting failure;
        replies so far are kept."""
        keys = [hashlib.sha256(json.dumps(question).encode()).hexdigest() for question in questions]
        new = {key: text for key, (text, _) in zip(keys, questions, strict=True) if key not in self.replies}
        if new:
            self._fetch(list(new.items()))
        return [self.replies[key] for key in keys]

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
            raise UserError(f"judge {self.model} at {self.url}: {error}; {self._kept(new)}") from None
        except Stop as stop:
            raise Stop(f"{stop}: {self._kept(new)}, the same command goes on") from None
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
        return f"{sum(key in self.replies for key, _ in new)} of {len(new)} questions are answered and kept"

    def _answer(self, key, text):
        reply = self._patiently(text)
        line = json.dumps({"key": key, "reply": reply, "question": text})
        with self.lock:
            try:
                with open(self.path, "ab", buffering=0) as file:
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
            raise UserError(f"{where}: set TOKEN_CACHE to a folder with room") from None

    def _patiently(self, text) -> str:
        """Sends a request, again with growing pauses as long as that may help."""
        for attempt in range(self.attempts):
            if self.gave_up.is_set():
                raise Refused("given up")
            try:
                return self._request(text)
            except urllib.error.HTTPError as error:
                reason, pause = self._told(error), retry_after(error)
                if error.code < 500 and error.code not in TRIED_AGAIN:
                    if self.asked and error.code not in NEVER:
                        return f"({reason})"  # of this one question: too long, say; no grade can be read
                    raise Refused(f"{reason} (see --judge_url, --judge_model, --judge_key)") from None
            except (OSError, http.client.HTTPException, ValueError) as error:  # URLError is an OSError
                reason, pause = self._one_line(fault(error)), 0
                if isinstance(getattr(error, "reason", error), ConnectionRefusedError) and not self.asked:
                    raise Refused(
                        "connection refused: start it (`ollama serve`), or set --judge_url"
                    ) from None
            self._note(reason)
            doubled = min(60, BACK_OFF * 2**attempt) * random.uniform(0.75, 1.25)  # not all at once again
            if attempt + 1 < self.attempts and self.gave_up.wait(max(pause, doubled)):
                raise Refused("given up")
        raise Refused(f"{reason}, {self.attempts} times; the same command goes on when it answers")

    def _note(self, reason):
        """Prints each kind of trouble once, so that the user knows why nothing moves."""
        with self.lock:
            if reason not in self.troubles:
                self.troubles.add(reason)
                tqdm.write(f"the judge is asked again: {reason}", file=sys.stderr)

    def _request(self, text) -> str:
        """Sends one request and returns the content of the reply. ValueError if it is no chat completion."""
        body = {"model": self.model, "temperature": self.temperature}
        body["messages"] = [{"role": "user", "content": text}]
        headers = {"Content-Type": "application/json", "User-Agent": "eval.py"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        with OPENER.open(request, timeout=self.seconds) as response:
            read = self._read(response)
        try:
            content = json.loads(read)["choices"][0]["message"]["content"] or ""
        except (ValueError, LookupError, TypeError):
            content = None
        if not isinstance(content, str):  # empty: a refusal, or all tokens spent on thoughts
            raise ValueError(f"no chat completion: {read.decode('utf-8', 'replace')}")
        return self._hidden(content)

    def _read(self, response, most=1 << 24) -> bytes:
        """Reads the body within the time of a request: a connection's own time-out limits silence only."""
        deadline, read = time.monotonic() + self.seconds, b""
        while len(read) < most and (chunk := response.read1()):
            read += chunk
            if time.monotonic() > deadline:
                raise TimeoutError
        return read

    def _told(self, error) -> str:
        """Text of an HTTP error, without the key."""
        try:
            reply = self._read(error.fp, most=2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException, AttributeError):
            reply = ""
        return self._one_line(f"HTTP {error.code} {error.reason}: {reply}")

    def _one_line(self, text) -> str:
        return self._hidden(" ".join(text.split()))[:160]

    def _hidden(self, text) -> str:
        return text.replace(self.key, "***") if self.key else text


def retry_after(error) -> float:
    """Seconds that a server asks to wait (Retry-After), at most two minutes."""
    try:
        return min(120.0, float(error.headers.get("Retry-After", 0)))
    except (TypeError, ValueError):  # a date
        return 0.0


def fault(error) -> str:
    error = getattr(error, "reason", error)
    if isinstance(error, TimeoutError):
        return "no answer in time (see --judge_seconds)"
    return str(error) or type(error).__name__


def make_judge(cfg) -> Judge:
    """The judge that the constants name. Its key comes from the environment only."""
    try:
        parts = urllib.parse.urlsplit(cfg.judge_url)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port)
    except ValueError:  # of a port that is no number, of half an IPv6 address
        usable = False
    if not usable:
        raise UserError(f"--judge_url {cfg.judge_url}: use http://localhost:11434/v1 or the like")
    key = os.environ.get(cfg.judge_key, "").strip() if cfg.judge_key else None
    if not key and cfg.judge_key and parts.hostname not in LOCAL:
        wanted = f"export {cfg.judge_key}=..., name another variable by --judge_key, or --judge_key none"
        raise UserError(f"judge {cfg.judge_url}: no key in the environment: {wanted}")
    patience = {"seconds": cfg.judge_seconds, "attempts": cfg.judge_attempts, "requests": cfg.judge_requests}
    return Judge(cfg.judge_url, cfg.judge_model, key, **patience)


def score(judge, rows, repeats=1) -> dict:
    """Grades rows of responses.json: mean with interval by prompt, unreadable replies, the judge's noise."""
    empty = [not row["model_response"].strip() for row in rows]
    asked = [(i, repeat) for i in range(len(rows)) if not empty[i] for repeat in range(repeats)]
    replies = judge.ask([(score_question(rows[i]), repeat) for i, repeat in asked])
    grades = [[0] * repeats if nothing else [] for nothing in empty]
    for (i, _), reply in zip(asked, replies, strict=True):
        grades[i].append(parse_score(reply))
    return summary(rows, grades) | {"judge": judge.model, "url": judge.url, "repeats": repeats}


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
    verdicts = [parse_verdict(reply) for reply in judge.ask(questions)]
    alone = {"without_partner": len(ours) + len(theirs) - 2 * len(pairs)}
    asked = {"judge": judge.model, "url": judge.url, "repeats": repeats}
    return duel_figures(pairs, where, verdicts) | alone | asked
