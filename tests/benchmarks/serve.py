"""Test the service under many clients with real explanations: status codes, response times, and memory growth.

    python tests/benchmarks/serve.py --clients 50 --explanations 2

`bridge serve` runs in a process of its own. All clients request an explanation at once; those that find the queue full are told
to retry. While the first explanations are made, every client continues to send other requests, and the server's health is
requested on a connection of its own. Jobs queued beyond `--explanations` are cancelled at the end.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil

PROMPT = "def read(self):\n    while True"
PATHS = ("/api/couplings", "/api/tasks", "/api/circuits", "/api/labels", "/api/explanations", "/")


def fetch(url: str, method: str = "GET", body: Any = None) -> tuple[int, Any]:
    """Send a request; return the status and the body of the response."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            status, content = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            status, content = error.code, error.read()
    return status, json.loads(content) if content.startswith((b"{", b"[")) else content


def quantiles(seconds: list[float]) -> str:
    """Return the median, the 99th percentile and the maximum in milliseconds, as text."""
    ordered = sorted(seconds)
    picked = (ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))], ordered[-1])
    return " / ".join(f"{1000 * each:.0f}" for each in picked) + f" ms over {len(ordered)}"


def main() -> None:
    """Run the server and the clients, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--explanations", type=int, default=2, help="that are waited for")
    parser.add_argument("--bridge", help="a coupling; default the one that ships")
    arguments = parser.parse_args()
    chosen = ["--bridge", arguments.bridge] if arguments.bridge else []
    command = [sys.executable, "-m", "bridge.cli.main", "serve", "--port", "0", *chosen]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "http://" in line)
        address = line.split()[-1].rstrip("/")
        server = psutil.Process(process.pid)
        before, statuses, enough = server.memory_info().rss, Counter[int](), threading.Event()
        health: list[tuple[float, str]] = []

        def watch() -> None:
            """Request the server's health ten times a second, and record the running job's phase."""
            phase = ""
            while not enough.is_set():
                started = time.monotonic()
                assert fetch(f"{address}/api/health")[0] == 200
                health.append((time.monotonic() - started, phase))
                phase = next((job["phase"] for job in fetch(f"{address}/api/explanations")[1] if job["status"] == "running"), "")
                time.sleep(0.1)

        def client(index: int) -> list[float]:
            """Request an explanation, then other paths until enough explanations are done; return the waiting times."""
            seconds: list[float] = []
            body = {"prompt": f"{PROMPT}\n" if index % 2 else PROMPT}
            statuses[fetch(f"{address}/api/explanations", "POST", body)[0]] += 1
            while not enough.is_set():
                started = time.monotonic()
                statuses[fetch(f"{address}{PATHS[index % len(PATHS)]}")[0]] += 1
                seconds.append(time.monotonic() - started)
                enough.wait(1)
            return seconds

        started = time.monotonic()
        watcher = threading.Thread(target=watch)
        watcher.start()
        with ThreadPoolExecutor(arguments.clients) as pool:
            answers = [pool.submit(client, index) for index in range(arguments.clients)]
            while sum(job["status"] == "done" for job in fetch(f"{address}/api/explanations")[1]) < arguments.explanations:
                time.sleep(0.5)
            took = time.monotonic() - started
            enough.set()
            seconds = [each for answer in answers for each in answer.result()]
        watcher.join()
        for job in fetch(f"{address}/api/explanations")[1]:
            fetch(f"{address}/api/explanations/{job['id']}", "DELETE")
        after, peak = server.memory_info().rss, max(server.memory_info().rss, before)
        stopping = time.monotonic()
        process.send_signal(signal.SIGINT)
        code = process.wait()
    slowest = max(health)
    print(f"{arguments.clients} clients; {arguments.explanations} explanations in {took:.0f} s")
    print(f"statuses        {dict(sorted(statuses.items()))}")
    print(f"clients waited  {quantiles(seconds)} requests (median / 99 % / longest)")
    print(f"health waited   {quantiles([each for each, _ in health])}; longest during {slowest[1]!r}")
    print(f"memory          {before / 1e6:.0f} MB loaded, {after / 1e6:.0f} MB after ({(peak - before) / 1e6:+.0f})")
    print(f"interrupted     exit code {code} after {time.monotonic() - stopping:.1f} s, an explanation under way")


if __name__ == "__main__":
    main()
