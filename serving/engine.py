"""One thread that computes for all models: requests are decoded together, a row each, and come and go between tokens.

    submit      a request waits in the queue, then has a slot until it ends
    a round     cancelled requests leave; waiting ones are admitted, their prompts stored; then each model computes
                one token for all of its rows
"""

import asyncio
import concurrent.futures
import contextlib
import math
import secrets
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable

import torch

from common.generation import PROMPT_STEP, Sampling, adjust, decode_rows, prefill, sample
from common.weights import Loaded
from fastpath.native_decoder import MOST_ROWS
from serving.errors import ApiError, stopping
from serving.threads import compute_with

PROMPT_TOKENS = 512  # stored in one round at most, a longer prompt alone: running streams wait meanwhile
LONGEST_WAIT = 60  # seconds that Retry-After says at most
HAND_OUT_EVERY = 0.02  # seconds; to wake the event loop for each token takes a third of the engine's speed


class Job:
    """A request in the engine: an async iterator of (new ids, reason), the reason that of Generation at the end and
    None before. Raises ApiError when the engine fails. `cancel` gives its slot back."""

    def __init__(self, engine: "Engine", loaded: Loaded, prompt: list[int], max_new_tokens: int, sampling: Sampling,
                 seed: int | None):
        self.engine, self.loaded, self.prompt, self.sampling = engine, loaded, prompt, sampling
        self.remaining = min(max_new_tokens, loaded.model.config.max_seq_len - len(prompt))
        self.at_end = "length" if self.remaining == max_new_tokens else "context"
        self.repeatable = sampling.greedy or seed is not None
        self.seed = secrets.randbits(63) if seed is None else seed
        self.generator, self.seen = None, None  # of the engine's thread
        self.cancelled = False
        self.loop, self.changed = asyncio.get_running_loop(), asyncio.Event()
        self.ids, self.reason, self.error, self.ended = [], None, None, False

    def cancel(self) -> None:
        """Leave the queue or the slot; nothing where the job has ended."""
        self.cancelled = True
        self.engine.forget(self)

    def __aiter__(self):
        return self

    async def __anext__(self) -> tuple[list[int], str | None]:
        if self.ended:
            raise StopAsyncIteration
        await self.changed.wait()
        self.changed.clear()
        ids, self.ids = self.ids, []
        self.ended = self.reason is not None or self.error is not None
        if self.error is not None:
            raise self.error
        return ids, self.reason

    def receive(self, ids: list[int], reason: str | None, error: ApiError | None) -> None:
        """Called in the event loop, with what the engine made."""
        self.ids += ids
        self.reason, self.error = reason, error
        self.changed.set()


class Batch:
    """The rows of one model: a cache with a row a slot, and the job in each."""

    def __init__(self, loaded: Loaded, slots: int):
        self.loaded, self.decoder = loaded, loaded.decoder
        self.context, self.vocab_size = loaded.model.config.max_seq_len, loaded.encoder.vocab_size
        self.jobs: list[Job | None] = [None] * slots
        self.padding_row = slots  # of the cache, never a job's: see `step`
        self.tokens, self.lengths = [0] * (slots + 1), [0] * (slots + 1)  # the newest token, how many are in the cache
        self.cache = self.decoder.new_cache(slots + 1, self.context)  # memory is taken when it is first written

    @property
    def rows(self) -> list[int]:
        """The rows that a job has."""
        return [row for row, job in enumerate(self.jobs) if job is not None]

    def leave(self, gone: Callable[[Job], bool]) -> None:
        """Free the rows of jobs that are gone."""
        for row in self.rows:
            if gone(self.jobs[row]):
                self._free(row)

    def _free(self, row: int) -> None:
        self.jobs[row], self.tokens[row], self.lengths[row] = None, 0, 0

    @torch.inference_mode()
    def admit(self, job: Job) -> list[tuple]:
        """Store the prompt of a new job. Returns events, with its first token.

        A prompt is computed alone: in a padded batch it would be rounded in another way, and a seed would not give the
        same reply in a crowd as alone.
        """
        row, length = self.jobs.index(None), len(job.prompt)
        cache = self.decoder.new_cache(1, min(length + PROMPT_STEP, self.context))
        logits_1V = prefill(self.decoder, [job.prompt], cache)
        self.cache.keys[:, row, :, :length] = cache.keys[:, 0, :, :length]
        self.cache.values[:, row, :, :length] = cache.values[:, 0, :, :length]
        self.jobs[row], self.lengths[row] = job, length
        job.generator = self.loaded.generator(job.seed)
        if job.sampling.repetition_penalty != 1:
            job.seen = torch.zeros(self.vocab_size, dtype=torch.bool, device=self.loaded.device)
            job.seen[torch.tensor(job.prompt, device=self.loaded.device)] = True
        return self._take([row], logits_1V)

    @torch.inference_mode()
    def step(self) -> list[tuple]:
        """Compute one token for every row. Returns events.

        decode.c rounds a single row of a call in another way than several, so a reply that is to be repeatable would
        depend on who else is there: such a row is never computed alone.
        """
        rows = self.rows
        alone = len(rows) % MOST_ROWS == 1 and self.jobs[rows[-1]].repeatable
        computed = rows + [self.padding_row] * alone
        tokens = [self.tokens[row] for row in computed]
        logits_NV = decode_rows(self.decoder, tokens, computed, self.cache, self.lengths)
        for row in rows:
            self.lengths[row] += 1
        return self._take(rows, logits_NV[:len(rows)])

    def _take(self, rows: list[int], logits_NV: torch.Tensor) -> list[tuple]:
        """Choose the next token of each row, and end the rows that are done."""
        events = []
        finite = logits_NV.sum(-1).isfinite().tolist()
        chosen = self._choose([self.jobs[row] for row in rows], logits_NV[:, :self.vocab_size])
        for row, token, sound in zip(rows, chosen, finite, strict=True):
            job = self.jobs[row]
            if not sound:
                error = ApiError(500, "the model's logits are not finite: its weights are broken, or fp16 overflows",
                                 code="not_finite")
                events.append((job, [], None, error))
                self._free(row)
                continue
            ids = [] if token == self.loaded.encoder.eos_id else [token]
            job.remaining -= 1
            reason = "eos" if not ids else job.at_end if job.remaining == 0 else None
            events.append((job, ids, reason, None))
            self.tokens[row] = token
            if reason is not None:
                self._free(row)
            elif job.seen is not None:
                job.seen[token] = True
        return events

    def _choose(self, jobs: list[Job], logits_NV: torch.Tensor) -> list[int]:
        """The next token of each job; rows that are sampled alike are adjusted together."""
        chosen, by_sampling = [0] * len(jobs), {}
        for index, job in enumerate(jobs):
            by_sampling.setdefault(job.sampling, []).append(index)
        for sampling, members in by_sampling.items():
            seen_BV = torch.stack([jobs[i].seen for i in members]) if sampling.repetition_penalty != 1 else None
            logits_BV = logits_NV if len(members) == len(jobs) else logits_NV[members]
            scores_BV = adjust(logits_BV, sampling, seen_BV)
            generators = [jobs[i].generator for i in members]  # what a row draws does not depend on the others
            tokens = sample(scores_BV, sampling.greedy, generators).tolist()
            for member, token in zip(members, tokens, strict=True):
                chosen[member] = token
        return chosen


class Engine:
    """The queue, the slots and the thread. `slots` requests run at once, over all models; `queue` more may wait."""

    def __init__(self, slots: int, queue: int):
        self.slots, self.queue = slots, queue
        self.waiting: deque[Job] = deque()
        self.loading: set[asyncio.Event] = set()  # requests that wait for their model's weights
        self.running: set[Job] = set()
        self.batches: dict[int, Batch] = {}  # of the thread
        self.made, self.handed_out = [], 0.0  # of the thread: events that wait to be handed out, and when the last were
        self.round_seconds = 0.02  # measured, a running mean
        self.stopping = False
        self.threads = torch.get_num_threads()
        self.changed = threading.Condition()
        threading.Thread(target=self._work, name="engine", daemon=True).start()

    # ---- called in the event loop -----------------------------------------------------------

    def submit(self, loaded: Loaded, prompt: list[int], max_new_tokens: int, sampling: Sampling,
               seed: int | None) -> Job:
        """Queue a request. Raises ApiError when the queue is full or the server stops."""
        job = Job(self, loaded, prompt, max_new_tokens, sampling, seed)
        with self.changed:
            self.check_capacity()
            self.waiting.append(job)
            self.changed.notify()
        return job

    async def until_loaded(self, load: concurrent.futures.Future) -> None:
        """Wait in the queue for the end of a load. Raises ApiError as `submit` does, or when the server stops
        meanwhile."""
        self.check_capacity()
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def wake(_) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(ended.set)

        load.add_done_callback(wake)
        self.loading.add(ended)
        try:
            await ended.wait()
        finally:
            self.loading.remove(ended)
        if self.stopping:
            raise stopping()

    @property
    def queued(self) -> int:
        """How many requests wait, for a slot or for weights."""
        return len(self.waiting) + len(self.loading)

    def check_capacity(self) -> None:
        """Raises ApiError where `submit` would."""
        if self.stopping:
            raise stopping()
        if self.queued >= self.queue and len(self.running) + self.queued >= self.slots + self.queue:
            first_end = min((job.remaining for job in list(self.running)), default=0) * self.round_seconds
            seconds = min(max(1, math.ceil(first_end)), LONGEST_WAIT)
            message = (f"the server is busy: {len(self.running)} requests run and {self.queued} wait; try again in "
                       f"{seconds} s")
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})

    def forget(self, job: Job) -> None:
        """Take a cancelled job out of the queue; from its slot the thread takes it before the next token."""
        with self.changed:
            if job in self.waiting:
                self.waiting.remove(job)

    def stop(self) -> None:
        """Take no more requests, and refuse those that wait; those that run go on."""
        with self.changed:
            self.stopping, waiting = True, list(self.waiting)
            self.waiting.clear()
        for job in waiting:
            job.receive([], None, stopping())
        for ended in self.loading:
            ended.set()

    @property
    def idle(self) -> bool:
        """True if no request runs or waits."""
        return not self.running and not self.waiting

    # ---- the thread -------------------------------------------------------------------------

    def _work(self) -> None:
        compute_with(self.threads)
        while True:
            with self.changed:
                while self.idle:
                    self.changed.wait()
                begin = time.perf_counter()
                self.running = {job for job in self.running if not job.cancelled}
                admitted = self._next()
                self.running |= set(admitted)
            self._round(admitted)
            self.round_seconds += 0.1 * (time.perf_counter() - begin - self.round_seconds)

    def _next(self) -> list[Job]:
        """The waiting jobs that are admitted now."""
        jobs, tokens = [], 0
        while self.waiting and len(self.running) + len(jobs) < self.slots:
            tokens += len(self.waiting[0].prompt)
            if jobs and tokens > PROMPT_TOKENS:
                break
            jobs.append(self.waiting.popleft())
        return jobs

    def _round(self, admitted: list[Job]) -> None:
        """Admit jobs, then compute one token for each row that was there before."""
        for batch in self.batches.values():
            batch.leave(lambda job: job.cancelled)
        stepped = [batch for batch in self.batches.values() if batch.rows]
        for job in admitted:
            if job.cancelled:  # since it left the queue
                continue
            self._try([job], lambda job=job: self._batch(job.loaded).admit(job), first=True)
        for batch in stepped:
            self._try([job for job in batch.jobs if job], batch.step)

    def _batch(self, loaded: Loaded) -> Batch:
        if id(loaded) not in self.batches:
            self.batches[id(loaded)] = Batch(loaded, self.slots)
        return self.batches[id(loaded)]

    def _try(self, jobs: list[Job], compute: Callable[[], list[tuple]], first: bool = False) -> None:
        """Compute, and hand out the events: at once if a reply begins (`first`) or ends, else a few tokens together. An
        exception fails these jobs, and the thread goes on."""
        try:
            events = compute()
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            failure = ApiError(500, f"the engine failed: {type(error).__name__}", code="engine_failed")
            events = [(job, [], None, failure) for job in jobs]
            for batch in self.batches.values():
                batch.leave(lambda job: job in jobs)
        ended = {job for job, _, reason, error in events if reason is not None or error is not None}
        with self.changed:
            self.running -= ended
        self.made += events
        if first or ended or time.perf_counter() - self.handed_out > HAND_OUT_EVERY:
            self._hand_out_all()

    def _hand_out_all(self) -> None:
        events, self.made, self.handed_out = self.made, [], time.perf_counter()
        for loop in {job.loop for job, *_ in events}:
            with contextlib.suppress(RuntimeError):  # it was closed
                loop.call_soon_threadsafe(_hand_out, [event for event in events if event[0].loop is loop])


def _hand_out(events: list[tuple]) -> None:
    """Give each job what the engine made, in the event loop."""
    for job, ids, reason, error in events:
        job.receive(ids, reason, error)
