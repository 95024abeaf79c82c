"""A load test of the server on loopback, with SmolLM2-135M-Instruct.

    python -m benchmarks.serve --out rows.jsonl [--model DIRECTORY] [--minutes 2] [--clients 32]

Three parts: the speed of one answer by `model.stream`, as `upg-jax generate` has it; tokens per second of eight clients
at once; and many clients of mixed lengths and settings for some minutes, whose every answer is compared with the one
that the same request got alone on the same server. Recorded are mismatches, slots that were not free at the end, and
the process's memory along the way.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from benchmarks._rows import Writer, environment
from upg_jax import UPGModel, _native
from upg_jax.cli._demo_model import demo_model
from upg_jax.inference import Engine
from upg_jax.serve import create_app

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
    import json

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


async def eight_at_once(http: httpx.AsyncClient, tokens: int, rounds: int) -> list[float]:
    """Tokens per second of eight clients, over and over."""
    rates = []
    for _ in range(rounds):
        bodies = [
            {"model": "m", "messages": [{"role": "user", "content": f"Write about {t}, {i}."}], "temperature": 0,
             "max_tokens": tokens, "ignore_eos": True}
            for i, t in enumerate((*TOPICS, *TOPICS[:3]))
        ]  # fmt: skip
        start = time.perf_counter()
        answers = await asyncio.gather(*(ask(http, body, True) for body in bodies))
        rates.append(sum(count for _, count in answers) / (time.perf_counter() - start))
    return rates


async def load(http: httpx.AsyncClient, clients: int, seconds: float) -> dict[str, Any]:
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
            found["memory"].append(resident())
            await asyncio.sleep(5)

    start = time.monotonic()
    await asyncio.gather(watch(), *(client(number) for number in range(clients)))
    found["seconds"] = time.monotonic() - start
    return found


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def single(model: UPGModel, tokens: int, rounds: int) -> list[float]:
    """Tokens per second of one answer after its first token."""
    ids = model.tokenizer.encode_chat([{"role": "user", "content": f"Write about {TOPICS[0]}."}])
    rates = []
    for _ in range(rounds + 1):
        times = [time.perf_counter() for _ in model.stream(ids, max_new_tokens=tokens, stop_at_eos=False)]
        rates.append((tokens - 1) / (times[tokens - 1] - times[0]))
    return rates[1:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="rows are appended to this file")
    parser.add_argument("--model", type=Path, help="default: the demo's model, dense")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96, help="of the answers whose speed is measured")
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    model = UPGModel.from_file(arguments.model or demo_model())
    engine = Engine(model, slots=8, context=1024, max_waiting=64)
    engine.warm_up()
    config = uvicorn.Config(create_app(engine, name="m"), port=0, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()
    library = _native.load()
    writer = Writer(arguments.out)
    writer.write(environment(kernels=library.kernels if library else "none", llama=None))

    async def measure() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=600, limits=limits) as http:
            # In turns, because the machine's speed changes.
            single(model, arguments.tokens, 1)
            await eight_at_once(http, 8, 1)
            ones, eights = [], []
            for _ in range(arguments.rounds):
                ones += single(model, arguments.tokens, 1)[-1:]
                eights += await eight_at_once(http, arguments.tokens, 1)
            ratio = statistics.median(b / a for a, b in zip(ones, eights, strict=True))
            row = {"topic": "serve", "case": "speed", "one": ones, "eight": eights, "ratio": ratio}
            print(row, file=sys.stderr)
            writer.write(row)
            found = await load(http, arguments.clients, 60 * arguments.minutes)
        deadline = time.monotonic() + 5
        while engine.running and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        row = {
            "topic": "serve",
            "case": "load",
            "clients": arguments.clients,
            "leaked slots": engine.running,
            **found,
        }
        print(row, file=sys.stderr)
        writer.write(row)

    asyncio.run(measure())
    server.should_exit = True
    thread.join()
    engine.close()


if __name__ == "__main__":
    main()
