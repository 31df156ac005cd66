"""Load test of the server: errors, mixed-up answers, memory, and what batching is worth.

Starts `gazeguard serve` on the shipped poisoned model, lets many clients ask at once, and compares
every answer and verdict with what the library says to the same request alone. Then the same load
again with `--max-batch 1`.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPException
from io import BytesIO
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

from gazeguard.assets import ADAPTER, BASE
from gazeguard.bench.speed.instruments import machine
from gazeguard.files import write_json
from gazeguard.guarding.answer import answer
from gazeguard.guarding.guard import Guard
from gazeguard.lab.attacks import ATTACKS
from gazeguard.lab.poison import samples, trigger_all
from gazeguard.lab.rows import Row, make_rows
from gazeguard.models.load import load

_CALIBRATION, _REQUESTS, _TOKENS = 120, 32, 40


@dataclass(frozen=True, slots=True)
class Ask:
    """A request's body, and the answer and outcome it must get."""

    body: bytes
    answer: str
    outcome: str


@dataclass(slots=True)
class Load:
    """What clients saw: seconds of every answer, errors, and answers that were wrong."""

    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def prepare(folder: Path, seed: int) -> list[Ask]:
    """Calibrate a guard into `folder`, and make requests, every second one triggered."""
    rows = make_rows("captions", _CALIBRATION + _REQUESTS, seed, held_out=True)
    target = load(BASE, ADAPTER, dtype="float32")
    clean = samples(rows[:_CALIBRATION])
    guard = Guard.calibrate(target, clean, alpha=0.05, batch_size=40, seed=seed)
    guard.save(folder)
    asked = rows[_CALIBRATION:]
    asked[1::2] = trigger_all(asked[1::2], ATTACKS["badnet-center"], seed)
    requests = []
    for row in asked:
        (alone,) = answer(guard, samples([row]), max_new_tokens=_TOKENS)
        requests.append(Ask(_body(row), str(alone.answer), str(alone.verdict.outcome)))
    return requests


@contextmanager
def serving(guard: Path, max_batch: int, clients: int) -> Iterator[tuple[str, int]]:
    """A server in a process of its own: its `host:port` and process id."""
    code = "from gazeguard.cli.main import main; main()"
    model = [str(BASE), "--adapter", str(ADAPTER), "--dtype", "float32", "--name", "lab"]
    limits = ["--max-batch", str(max_batch), "--max-queue", str(clients)]
    command = ["serve", *model, "--guard", str(guard), "--port", "0", *limits]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None, "piped"
    try:
        line = process.stderr.readline()
        if "http://" not in line:
            raise RuntimeError(line + process.stderr.read())
        where = line.split("http://")[1].split("/")[0]
        # Nobody else reads what the server says; a full pipe would stop it.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        while _status(where, "/health") != 200:
            time.sleep(0.1)
        yield where, process.pid
    finally:
        process.terminate()
        if process.wait(60) != 0:
            raise RuntimeError(f"the server ended with exit code {process.returncode}")


def burden(where: str, asks: Sequence[Ask], clients: int, seconds: float) -> tuple[Load, float]:
    """Let clients ask one request after the other; what they saw, and how long it took."""
    seen, lock = Load(), threading.Lock()
    end = time.monotonic() + seconds

    def client(number: int) -> None:
        order = np.random.default_rng(number).permutation(len(asks))
        host, port = where.split(":")
        connection = HTTPConnection(host, int(port), timeout=120)
        asked = 0
        while time.monotonic() < end:
            ask = asks[order[asked % len(asks)]]
            asked += 1
            began = time.monotonic()
            error, wrong = _asked(connection, ask)
            with lock:
                seen.seconds.append(time.monotonic() - began)
                seen.errors += [error] if error else []
                seen.wrong += [wrong] if wrong else []
        connection.close()

    began = time.monotonic()
    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen, time.monotonic() - began


def measure(
    guard: Path, asks: Sequence[Ask], max_batch: int, clients: int, seconds: float
) -> dict[str, Any]:
    """One server under load, as JSON types."""
    with serving(guard, max_batch, clients) as (where, process):
        burden(where, asks, clients, min(seconds, 5.0))  # caches and buffers get their size
        before = _resident(process)
        seen, took = burden(where, asks, clients, seconds)
        after = _resident(process)
    p50, p95, p99 = np.percentile(seen.seconds, [50, 95, 99]).tolist()
    return {
        "max_batch": max_batch,
        "requests": len(seen.seconds),
        "requests_per_second": len(seen.seconds) / took,
        "latency_seconds": {"p50": p50, "p95": p95, "p99": p99},
        "errors": len(seen.errors),
        "wrong": len(seen.wrong),
        "examples": [*seen.errors[:3], *seen.wrong[:3]],
        "resident_bytes": {"start": before, "end": after},
    }


def _asked(connection: HTTPConnection, ask: Ask) -> tuple[str, str]:
    """Ask once; the error, and what is wrong with the answer, or empty."""
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", ask.body, headers)
        response = connection.getresponse()
        content = response.read()
    except (OSError, HTTPException) as error:
        connection.close()
        return repr(error), ""
    if response.status != 200:
        return f"{response.status} {content[:200]!r}", ""
    found = json.loads(content)
    got = (found["choices"][0]["message"]["content"].strip(), found["gazeguard"]["outcome"])
    return "", "" if got == (ask.answer, ask.outcome) else f"{got} for {ask.answer, ask.outcome}"


def _status(where: str, path: str) -> int:
    connection = HTTPConnection(where, timeout=10)
    connection.request("GET", path)
    status = connection.getresponse().status
    connection.close()
    return status


def _body(row: Row) -> bytes:
    buffer = BytesIO()
    Image.fromarray(row.pixels).save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": row.question},
    ]
    body = {"model": "lab", "messages": [{"role": "user", "content": content}]}
    return json.dumps(body | {"temperature": 0, "max_tokens": _TOKENS}).encode()


def _resident(process: int) -> int | None:
    """Resident bytes of a process; None where the system does not say."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON file to write.")
@click.option("--clients", default=32, show_default=True)
@click.option("--seconds", default=60.0, show_default=True, help="Of load, each time.")
@click.option("--max-batch", default=8, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(out: Path, clients: int, seconds: float, max_batch: int, seed: int) -> None:
    """Measure the server under load, with batching and without."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as work:
        guard = Path(work)
        asks = prepare(guard, seed)
        batched = measure(guard, asks, max_batch, clients, seconds)
        single = measure(guard, asks, 1, clients, seconds)
    gain = batched["requests_per_second"] / single["requests_per_second"]
    result = {
        "schema_version": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(threads),
        "clients": clients,
        "seconds": seconds,
        "seed": seed,
        "distinct_requests": len(asks),
        "expected_flagged": sum(ask.outcome == "flagged" for ask in asks),
        "batched": batched,
        "single": single,
        "throughput_ratio": gain,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    for name, found in (("batched", batched), ("single", single)):
        late = found["latency_seconds"]
        click.echo(
            f"{name}: {found['requests']} requests, {found['requests_per_second']:.1f}/s, "
            f"p50 {late['p50']:.3f} s, p99 {late['p99']:.3f} s, {found['errors']} errors, "
            f"{found['wrong']} wrong"
        )
    click.echo(f"batching: {gain:.2f} times the throughput; wrote {out}")


if __name__ == "__main__":
    main()
