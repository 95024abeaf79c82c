"""Opens a compressed Phi-4 (or any other model) and prints its sizes, the time it took and the memory it takes.

upg-jax compress PHI_4_DIRECTORY phi4 --density 0.5
python examples/phi4_load.py phi4
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

import jax

from upg_jax import UPGModel


def memory(key: str) -> str:
    """A figure of this process's memory, where the system tells it as Linux does."""
    status = Path("/proc/self/status")
    found = re.search(key + r":\s+(\d+)", status.read_text()) if status.exists() else None
    return f"{int(found[1]) / 1e6:.2f} GB" if found else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a UPG file or directory")
    parser.add_argument("--dtype", default="bfloat16", help="of the activations: bfloat16 or float32")
    arguments = parser.parse_args()
    jax.devices()  # starts the backend, which is no part of loading
    began = time.perf_counter()
    model = UPGModel.from_file(arguments.model, dtype=arguments.dtype)
    seconds = time.perf_counter() - began
    config = model.config
    print(model)
    print(f"layers                {config.num_layers} of width {config.hidden_size}, {config.architecture}")
    print(f"weights               {model.num_weights:,}")
    print(f"bytes                 {model.nbytes:,} ({model.bits_per_weight:.2f} bits per weight)")
    for index, nbytes in model.index_bytes.items():
        print(f"  with index {index:10} {nbytes:,}")
    print(f"loaded in             {seconds:.2f} s")
    print(f"memory of the process {memory('RssAnon')}, and {memory('RssFile')} of mapped files")


if __name__ == "__main__":
    main()
