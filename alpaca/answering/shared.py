"""One engine for everybody: what many users ask is answered in one batch, by the one thread that computes.

A batch is of one adapter. Of the jobs that ask for it, the one with the fewest rows in the batch is next, so that one
sentence does not wait for the four hundred lines of somebody else. Where jobs ask for another adapter, the rows of the
one in use come in for TURN_SECONDS more; when these are answered, it is the turn of the adapter that waited longest.
"""

import threading
import time
from collections import Counter, deque
from queue import Empty, SimpleQueue

from alpaca.answering.engine import Engine
from alpaca.answering.generate import Request, draw, rows_of
from alpaca.answering.row import NO_ANSWER
from alpaca.answering.standby import Standby

TURN_SECONDS = 2.0
AHEAD = 2  # so many batches of a job's rows wait in memory, at most
LOOK_SECONDS = 0.2  # between two looks of a job that waits whether it is to stop


class Job:
    """What one user asks of an adapter, until all is answered or stopped."""

    def __init__(self, adapter, stop, grows=False):
        self.adapter, self.stop, self.grows = adapter, stop, grows  # grows: the text is asked for while it grows
        self.waiting = deque()  # its Rows that are not in the batch; the number of each is (job, key)
        self.said = SimpleQueue()  # for its thread: (key, Answer), (key, a text so far), or an exception
        self.is_left, self.shown = False, ""

    @property
    def is_over(self):
        return self.is_left or self.stop.is_set()

    def heard(self):
        """What there is for its thread, a list, empty where LOOK_SECONDS have passed without any."""
        found = []
        try:
            found.append(self.said.get(timeout=LOOK_SECONDS))
            while True:
                found.append(self.said.get_nowait())
        except Empty:
            pass
        if error := next((item for item in found if isinstance(item, Exception)), None):
            raise error
        return found


class SharedEngine:
    """The thread, and the jobs that it answers.

    use: a function from an adapter's name to (model that computes with it, AnswerGrammar or None, Rows that begin as its
    prompts will); called by the thread alone. What it raises ends the jobs of that adapter.
    """

    def __init__(self, use, tokenizer, positions, max_new_tokens, at_once):
        self.use, self.tokenizer, self.positions = use, tokenizer, positions
        self.max_new_tokens, self.at_once, self.standby = max_new_tokens, at_once, Standby(at_once)
        self.news = threading.Condition()  # guards the jobs and what waits
        self.jobs, self.waiting, self.is_closing = [], deque(), False
        self.engine = self.grammar = self.adapter = None
        self.expected, self.since, self.used = 0, 0.0, {}  # used: when the turn of an adapter ended
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def close(self):
        with self.news:
            self.is_closing = True
            self.news.notify()
        self.thread.join()

    def answer(self, adapter, requests, stop):
        """Yield lists of (key, Answer), often empty, of the requests, as generate.answer_requests does.

        They are drawn in the caller's thread. Ends early once `stop`, a threading.Event, is set.
        """
        job, held, over = Job(adapter, stop), 0, False
        try:
            while not job.is_over:
                if not over and held < AHEAD * self.at_once:
                    came, over = draw(requests, self.at_once)
                    rows, too_long = self._ask(job, came)
                    held += len(rows)
                    yield [(key, NO_ANSWER) for _, key in too_long]
                if held:
                    found = job.heard()
                    held -= len(found)
                    yield found
                elif over:
                    return
        finally:
            self._leave(job)

    def stream(self, adapter, prompt, stop):
        """Yield the growing free answer to a prompt, as generate.stream does. Ends early once `stop` is set."""
        job = Job(adapter, stop, grows=True)
        try:
            rows, _ = self._ask(job, [Request(None, prompt)])
            while rows and not job.is_over:
                for _, text in job.heard():
                    if isinstance(text, str):
                        yield text
                    else:
                        rows = None
                        if text.text != job.shown:
                            yield text.text
        finally:
            self._leave(job)

    def _ask(self, job, requests):
        requests = [request._replace(key=(job, request.key)) for request in requests]
        rows, too_long = rows_of(requests, self.tokenizer, self.max_new_tokens, self.positions, 0, len(requests))
        with self.news:
            if job not in self.jobs:
                self.jobs.append(job)
            job.waiting.extend(rows)
            self.expected += len(rows)
            self.news.notify()
        return rows, too_long

    def _leave(self, job):
        with self.news:
            job.is_left = True
            self.news.notify()

    # -----------------------------------------------------------------------------------------------------------------
    # the thread

    def _run(self):
        while True:
            with self.news:
                self.news.wait_for(lambda: self.is_closing or self.jobs)
                if self.is_closing:
                    return
            try:
                self._step()
            except Exception as error:  # of whatever kind: the next job is answered all the same
                self._fail(error, self.adapter)

    def _step(self):
        """Let rows come in, and compute one step; or go on to another adapter."""
        with self.news:
            self._forget_stopped()
            self._put_back()
            adapter = self._whose_turn()
            if adapter == self.adapter:
                self._draw()
            busy = self.engine and (self.engine.busy or self.waiting)
            if not busy and adapter == self.adapter:
                self.news.wait(LOOK_SECONDS)  # until a job asks something
                return
        if not busy:
            self._turn_to(adapter)
            return
        if self.engine.answered and self.expected:
            self.engine.expect(self.expected)
            self.expected = 0
        for row in self.engine.advance(self.waiting):
            job, key = row.number
            job.said.put((key, row.answer(self.grammar)))
        for row in self.engine.rows:
            job, key = row.number
            if job.grows and (text := row.certain(self.grammar)) != job.shown:
                job.shown = text
                job.said.put((key, text))

    def _forget_stopped(self):
        self.jobs = [job for job in self.jobs if not job.is_over]
        if self.engine:
            self.engine.drop(lambda row: row.number[0].is_over)

    def _whose_turn(self):
        """The adapter whose rows may come in now."""
        asked = {job.adapter for job in self.jobs if job.waiting}
        others = asked - {self.adapter}
        if not others or self.adapter in asked and time.monotonic() - self.since < TURN_SECONDS:
            return self.adapter
        return min(others, key=lambda adapter: self.used.get(adapter, 0.0))

    def _put_back(self):
        """What waited at the last step waits with its job again: there may be other jobs now."""
        for row in reversed(self.waiting):
            row.number[0].waiting.appendleft(row)
        self.waiting.clear()

    def _draw(self):
        """Let the rows wait that come next, as many as there may be at once."""
        shares = Counter(row.number[0] for row in self.engine.rows) if self.engine else {}
        jobs = [job for job in self.jobs if job.adapter == self.adapter and job.waiting]
        while jobs and len(self.waiting) < self.at_once:
            job = min(jobs, key=lambda job: shares[job])
            row = job.waiting.popleft()
            self.engine.give_prefix(row)
            self.waiting.append(row)
            shares[job] += 1
            if not job.waiting:
                jobs.remove(job)

    def _turn_to(self, adapter):
        if self.engine:
            self.engine.close()
            self.used[self.adapter] = time.monotonic()
        self.engine = self.adapter = None
        try:
            model, self.grammar, openings = self.use(adapter)
            options = {"grammar": self.grammar, "standby": self.standby, "expected": 1}
            self.engine = Engine(model, self.tokenizer, openings, self.at_once, **options)
        except Exception as error:
            self._fail(error, adapter)
            return
        self.adapter, self.since = adapter, time.monotonic()

    def _fail(self, error, adapter):
        """End the jobs of an adapter (None: all), and its engine."""
        with self.news:
            for job in self.jobs:
                if adapter in (None, job.adapter):
                    job.said.put(error)
                    job.is_left = True
            if adapter == self.adapter:
                self.engine = self.adapter = None
                self.waiting.clear()
