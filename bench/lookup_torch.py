"""The peer of ``lookup``: `torch.nn.EmbeddingBag` over the same file, in torch's own environment.

Run by path, by an interpreter that has torch and nothing of ours. Each line of standard input is a
JSON object ``{bags, length, seed, calls}``; each is answered by a line
``{seconds: [...], digest: float}``. ids are drawn anew for every call, outside the time taken.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch

__all__ = ["main"]


def main() -> None:
    """Answer lines until there are no more."""
    path, rows, dim, threads = sys.argv[1], *map(int, sys.argv[2:5])
    torch.set_num_threads(threads)
    table = torch.from_file(path, shared=True, size=rows * dim, dtype=torch.float32)
    table = table.view(rows, dim)
    table[:: 4096 // (4 * dim)].sum()  # every page is mapped, as in our own process
    bag = torch.nn.EmbeddingBag(rows, dim, mode="sum", _weight=table)
    print(json.dumps({"torch": torch.__version__}), flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            asked = json.loads(line)
            random = np.random.default_rng(asked["seed"])
            offsets = torch.arange(asked["bags"]) * asked["length"]
            seconds, digest = [], 0.0
            for _ in range(asked["calls"]):
                drawn = random.integers(0, rows, asked["bags"] * asked["length"])
                ids = torch.from_numpy(drawn)
                began = time.perf_counter()
                found = bag(ids, offsets)
                seconds.append(time.perf_counter() - began)
                digest += float(found.sum(dtype=torch.float64))
            print(json.dumps({"seconds": seconds, "digest": digest}), flush=True)


if __name__ == "__main__":
    main()
