"""A load test of `upg-jax serve` on loopback, with SmolLM2-135M-Instruct.

    python -m benchmarks.serve --out rows.jsonl [--model DIRECTORY] [--minutes 2] [--clients 32]

Three parts: the speed of one answer by `model.stream`, as `upg-jax generate` has it; tokens per second of eight clients
at once; and many clients of mixed lengths and settings for some minutes, whose every answer is compared with the one
that the same request got alone on the same server. Recorded are mismatches, slots that were not free at the end, and
the server's memory along the way. The server is a process of its own, as it is for its users.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from benchmarks._rows import Writer, environment
from upg_jax import UPGModel, _native
from upg_jax.cli._demo_model import demo_model

TOPICS = ("lighthouses", "a recipe for bread", "the moons of Jupiter", "how tides work", "a cat and a clock")


def requests(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Requests of mixed lengths and settings."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        text = f"{i}: tell me about {rng.choice(TOPICS)}. " + "Be precise. " * rng.choice((0, 2, 10, 60))
        settings: dict[str, Any] = rng.choice(
            (
                {"temperature": 0},
                {"temperature": 1.0, "seed": i},
                {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": i},
                {"temperature": 0.7, "frequency_penalty": 0.4, "seed": i, "stop": ["\n\n"]},
            )
        )
        found.append(
            {
                "model": "m",
                "messages": [{"role": "user", "content": text}],
                "max_tokens": rng.choice((4, 16, 48, 96)),
                **settings,
            }
        )
    return found


async def ask(http: httpx.AsyncClient, body: dict[str, Any], stream: bool) -> tuple[str, int]:
    """One answer, and how many tokens it has."""
    if not stream:
        reply = (await http.post("/v1/chat/completions", json=body)).raise_for_status().json()
        return reply["choices"][0]["message"]["content"], reply["usage"]["completion_tokens"]
    text, tokens = "", 0
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async with http.stream("POST", "/v1/chat/completions", json={**body, **options}) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                data = json.loads(line[6:])
                text += "".join(c["delta"].get("content") or "" for c in data["choices"])
                tokens = (data.get("usage") or {}).get("completion_tokens", tokens)
    return text, tokens


async def eight_at_once(port: int, tokens: int) -> float:
    """Tokens per second of eight clients, their prompts included."""
    bodies = [
        {"model": "m", "messages": [{"role": "user", "content": f"Write about {t}, {i}."}], "temperature": 0,
         "max_tokens": tokens, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        for i, t in enumerate((*TOPICS, *TOPICS[:3]))
    ]  # fmt: skip
    start = time.perf_counter()
    replies = await asyncio.gather(*(streamed(port, json.dumps(body).encode()) for body in bodies))
    seconds = time.perf_counter() - start
    counts = [int(re.findall(rb'"completion_tokens": (\d+)', reply)[-1]) for reply in replies]
    assert counts == [tokens] * len(bodies), replies
    return sum(counts) / seconds


async def streamed(port: int, body: bytes) -> bytes:
    """What a stream brings, read as it comes, by a client that leaves the processor to the server.

    httpx takes for a token as long as the server does for all that it computes beside the model.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        "POST /v1/chat/completions HTTP/1.0\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    reply = await reader.read()  # up to the end, which HTTP/1.0 marks by closing the connection
    writer.close()
    return reply


async def load(http: httpx.AsyncClient, server: int, clients: int, seconds: float) -> dict[str, Any]:
    """Many clients; every answer is compared with the one that its request got alone."""
    wanted = requests(40)
    alone = [await ask(http, body, False) for body in wanted]
    end = time.monotonic() + seconds
    found = {"answers": 0, "tokens": 0, "mismatches": 0, "refused": 0, "disconnects": 0, "memory": []}

    async def client(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < end:
            i = rng.randrange(len(wanted))
            if rng.random() < 0.1:  # some go away in the middle
                task = asyncio.ensure_future(ask(http, wanted[i], True))
                await asyncio.sleep(rng.random())
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                found["disconnects"] += 1
                continue
            try:
                answer = await ask(http, wanted[i], rng.random() < 0.5)
            except httpx.HTTPStatusError as e:
                if e.response.status_code != 429:
                    raise
                found["refused"] += 1
                await asyncio.sleep(float(e.response.headers["Retry-After"]))
                continue
            found["answers"] += 1
            found["tokens"] += answer[1]
            found["mismatches"] += answer != alone[i]

    async def watch() -> None:
        while time.monotonic() < end:
            found["memory"].append(resident(server))
            await asyncio.sleep(5)

    start = time.monotonic()
    await asyncio.gather(watch(), *(client(number) for number in range(clients)))
    found["seconds"] = time.monotonic() - start
    return found


def resident(process: int) -> int:
    """Bytes of a process in memory."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096


async def slots_used(http: httpx.AsyncClient) -> int:
    """Slots that are not free, after a moment for those that just ended."""
    deadline = time.monotonic() + 5
    while True:
        page = (await http.get("/metrics")).text
        found = re.search(r"^upg_jax_slots_used (\d+)$", page, re.MULTILINE)
        assert found is not None
        if found[1] == "0" or time.monotonic() > deadline:
            return int(found[1])
        await asyncio.sleep(0.05)


def single(model: UPGModel, tokens: int) -> tuple[float, float]:
    """Tokens per second of one answer: after its first, as `upg-jax generate` prints them, and with its prompt."""
    ids = model.tokenizer.encode_chat([{"role": "user", "content": f"Write about {TOPICS[0]}."}])
    start = time.perf_counter()
    times = [time.perf_counter() for _ in model.stream(ids, max_new_tokens=tokens, stop_at_eos=False)]
    return (tokens - 1) / (times[tokens - 1] - times[0]), tokens / (times[tokens - 1] - start)


@contextlib.contextmanager
def serving(model: Path) -> Iterator[tuple[int, int]]:
    """Runs `upg-jax serve`; yields its process and its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--name", "m", "--slots", "8", "--context", "1024", "--max-waiting", "64", "--port", str(port)]
    command = [sys.executable, "-m", "upg_jax.cli", "serve", str(model), *options]
    with subprocess.Popen(command) as process:
        try:
            while process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                        break
                time.sleep(0.1)
            if process.returncode is not None:
                raise SystemExit(f"the server ended with {process.returncode}")
            yield process.pid, port
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


async def measure(
    model: UPGModel, server: int, port: int, writer: Writer, wanted: argparse.Namespace
) -> None:
    """Writes a row about speed and a row about load."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600, limits=limits) as http:
        single(model, wanted.tokens)
        await eight_at_once(port, 8)
        ones, eights = [], []
        for _ in range(wanted.rounds):  # in turns, because the machine's speed changes
            ones.append(single(model, wanted.tokens))
            eights.append(await eight_at_once(port, wanted.tokens))
        about = {"bytes": model.nbytes, "bits per weight": model.bits_per_weight, "index": model.index_bytes}
        row: dict[str, Any] = {"topic": "serve", "case": "speed", "model": about, "tokens": wanted.tokens}
        for i, name in enumerate(("one", "one with its prompt")):
            row[name] = [one[i] for one in ones]
            row[f"ratio to {name}"] = statistics.median(
                many / one[i] for one, many in zip(ones, eights, strict=True)
            )
        row["eight"] = eights
        writer.write(row)
        print(row, file=sys.stderr)
        if not wanted.minutes:
            return
        found = await load(http, server, wanted.clients, 60 * wanted.minutes)
        row = {"topic": "serve", "case": "load", "clients": wanted.clients, "slots": await slots_used(http)}
        writer.write(row | found)
        print(row | found, file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="rows are appended to this file")
    parser.add_argument("--model", type=Path, help="default: the demo's model, dense")
    parser.add_argument("--minutes", type=float, default=2.0, help="of load; 0 measures speed only")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96, help="of the answers whose speed is measured")
    parser.add_argument("--rounds", type=int, default=4)
    wanted = parser.parse_args()
    path = wanted.model or demo_model()
    library = _native.load()
    writer = Writer(wanted.out)
    writer.write(environment(kernels=library.kernels if library else "none", llama=None))
    model = UPGModel.from_file(path)
    with serving(path) as (process, port):
        asyncio.run(measure(model, process, port, writer, wanted))


if __name__ == "__main__":
    main()
