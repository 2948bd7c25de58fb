"""The original's runtime for deployment, MegEngine Lite, for `original.py`, which starts it under a Python that has it.

    python original_lite.py FOLDER THREADS

It runs the networks that `original_megengine.py` wrote to FOLDER, in a process of its own: threads of the eager mode
would wait in loops beside it. It needs nothing but MegEngine Lite and NumPy. Each line of standard input is a task in
JSON, and each line of standard output its answer:

    {"network": NAME, "batch": B}   make a network ready, in every mode; the answer lists the modes, and the logits of
                                    mode M lie in FOLDER/NAME_B_M.npy
    {"run": MODE}                   run the network that is ready once; the answer is the milliseconds it took

Modes: the network as a static graph and kernels chosen by trial, as it comes (`static`), with weights prepared ahead
and kernel calls recorded and replayed (`recorded`), each on one thread in the caller's own and, with more, on all
(`static N`, `recorded N`). Its layout of eight channels together is left out: MegEngine 1.13 fails to compile it for
these networks.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIZE_PX = 224

Run = Callable[[], Any]


def photos(batch: int) -> Any:
    """Return the input (B, 3, H, W), the same for all sides."""
    return np.random.default_rng(0).standard_normal((batch, 3, SIZE_PX, SIZE_PX), np.float32)


def prepared(folder: Path, name: str, batch: int, threads: int) -> dict[str, Run]:
    """Return a function for each mode that runs a network once, from a NumPy array to one."""
    file, x_BCHW = folder / f"{name}_{batch}.mge", photos(batch)
    runs = {}
    for count in sorted({1, threads}):
        suffix = "" if count == 1 else f" {count}"
        runs[f"static{suffix}"] = static(file, x_BCHW, count, recorded=False)
        runs[f"recorded{suffix}"] = static(file, x_BCHW, count, recorded=True)
    return runs


def static(file: Path, x_BCHW: Any, threads: int, *, recorded: bool) -> Run:
    """Return a function that runs a dumped network once."""
    from megenginelite import (  # type: ignore[import-not-found]
        LiteAlgoSelectStrategy,
        LiteConfig,
        LiteNetwork,
        LiteOptions,
    )

    options = LiteOptions()
    options.weight_preprocess = int(recorded)
    options.comp_node_seq_record_level = int(recorded)
    config = LiteConfig()
    config.options = options
    network = LiteNetwork(config=config)
    if threads == 1:
        network.enable_cpu_inplace_mode()  # without a thread of its own to wait for
    else:
        network.threads_number = threads
    network.set_network_algo_policy(LiteAlgoSelectStrategy.LITE_ALGO_PROFILE)
    network.load(str(file))
    taken = network.get_io_tensor(network.get_input_name(0))
    given = network.get_io_tensor(network.get_output_name(0))

    def run() -> Any:
        taken.set_data_by_copy(x_BCHW)
        network.forward()
        network.wait()
        return given.to_numpy()

    return run


def answer_tasks(prepared: Callable[[Path, str, int, int], dict[str, Run]]) -> None:
    """Answer tasks until standard input ends."""
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the framework itself writes to standard output
    runs: dict[str, Run] = {}
    for line in sys.stdin:
        task = json.loads(line)
        answer: Any
        if "run" in task:
            begun_at = time.perf_counter()
            runs[task["run"]]()
            answer = 1e3 * (time.perf_counter() - begun_at)
        else:
            runs = {}  # the last network's memory goes first
            runs = prepared(folder, task["network"], task["batch"], threads)
            for mode, run in runs.items():
                run()
                np.save(folder / f"{task['network']}_{task['batch']}_{mode}.npy", run())
            answer = list(runs)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    answer_tasks(prepared)
