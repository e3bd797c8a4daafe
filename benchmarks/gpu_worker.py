"""Checks candidates in processes of their own: in parallel, and so that a hanging kernel costs one of them.

A worker compiles what it is sent, runs it against the reference and answers in one line of JSON. What it
compiled is in Inductor's and Triton's caches then, where the process that takes the times finds it.
"""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .gpu_cases import Candidate

TIMEOUT_SECONDS = 90.0
START_SECONDS = 120.0

Answer = dict[str, Any]


class Worker:
    """One process; started anew after a hang or a crash."""

    @classmethod
    def on(cls, device: str) -> Worker:
        return cls((sys.executable, "-m", "benchmarks.gpu_worker", device))

    def __init__(self, command: Iterable[str]) -> None:
        self._command = list(command)
        self._process: subprocess.Popen[str] | None = None

    def ask(
        self, job: dict[str, Any], timeout: float = TIMEOUT_SECONDS, deadline: float = float("inf")
    ) -> Answer:
        """The worker's answer, or `{"failed": why}`; waits for neither longer (`deadline`: monotonic)."""
        fresh = self._process is None or self._process.poll() is not None
        if fresh:
            # One compiling thread each: there are as many workers as processors.
            environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._process = subprocess.Popen(self._command, env=environment, **pipes)
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        except OSError:
            return self._lost("the process ended")
        timeout += START_SECONDS if fresh else 0
        line = self._read_line(max(0.0, min(timeout, deadline - time.monotonic())))
        if line is None and time.monotonic() >= deadline:
            return self._lost("no answer when time was up")
        if line is None:
            return self._lost(f"no answer within {timeout:.0f} s: it hangs")
        if not line:
            return self._lost("the process ended")
        answer: Answer = json.loads(line)
        if answer.pop("restart", False):
            self.close()
        return answer

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _read_line(self, timeout: float) -> str | None:
        assert self._process is not None and self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        return self._process.stdout.readline() if ready else None

    def _lost(self, why: str) -> Answer:
        self.close()
        return {"failed": why}


class Pool:
    """Workers that stay between calls."""

    def __init__(self, size: int, make: Callable[[], Worker]) -> None:
        self._workers = [make() for _ in range(size)]

    def check(
        self, candidates: Iterable[Candidate], deadline: float = float("inf")
    ) -> Iterator[tuple[Candidate, Answer]]:
        """Candidates with their answers, as they come; all that there are by `deadline` (monotonic)."""
        waiting: queue.SimpleQueue[Candidate] = queue.SimpleQueue()
        answers: queue.SimpleQueue[tuple[Candidate, Answer] | None] = queue.SimpleQueue()
        for candidate in candidates:
            waiting.put(candidate)

        def serve(worker: Worker) -> None:
            try:
                while time.monotonic() < deadline:
                    candidate = waiting.get_nowait()
                    answers.put((candidate, worker.ask(candidate.to_json(), deadline=deadline)))
            except queue.Empty:
                pass
            finally:
                answers.put(None)

        threads = [threading.Thread(target=serve, args=(w,), daemon=True) for w in self._workers]
        for thread in threads:
            thread.start()
        running = len(threads)
        while running:
            answer = answers.get()
            if answer is None:
                running -= 1
            else:
                yield answer

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


def main() -> None:
    # Compilers print: only answers may reach the pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    from .gpu_run import check, runner_for

    torch.set_num_threads(2)
    runner = None
    for line in sys.stdin:
        start = time.perf_counter()
        try:
            runner = runner or runner_for(sys.argv[1])
            with torch.no_grad():
                answer: Answer = check(runner, Candidate.from_json(json.loads(line)))
        except Exception as error:
            # After an error of the device, nothing works in this process any more.
            lost = "CUDA error" in str(error) or "AcceleratorError" in type(error).__name__
            answer = {"failed": f"{type(error).__name__}: {error}"[:500], "restart": lost}
        answer["seconds"] = round(time.perf_counter() - start, 2)
        torch._dynamo.reset()
        if not answer.get("restart"):
            torch.cuda.empty_cache()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
