"""One of the processes that generate together: `two_processes.py ID PORT SHAPE MODEL`; prints what it saw as JSON."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np


def main(process: int, port: int, shape: list[int], path: str, more: bool) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    from sharding.models import GREEDY, PROMPTS

    from upg_jax import UPGModel

    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 4, 2)
    model = UPGModel.from_file(path, mesh=jax.make_mesh(shape, ("data", "model")))
    seen = {"generated": [answer.ids for answer in model.generate(PROMPTS, **GREEDY)]}
    if more:
        streamed = [token.id for token in model.stream(PROMPTS[0], **GREEDY)]
        logits, _ = model.forward([PROMPTS[0]])
        seen["streamed"] = [token for token in streamed if token is not None]
        seen["next"] = int(np.asarray(logits)[0, -1].argmax())
    print(json.dumps(seen))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4], json.loads(sys.argv[5]))
