"""torchft's all-reduce as the outer-round benchmark runs it: `python outer_torchft.py WORKERS ELEMENTS ROUNDS`.

One process for each replica group; the manager's quorum stands before the clock starts, which then runs until the last
replica has copied the average into a parameter. Gloo over the loopback, without TLS. Runs in an environment of its own,
so it imports nothing of ours. Prints {"spans": [[begin, end], …], "error", "fine"}.
"""

# Types are known to another environment than the one that checks them.
# ruff: noqa: ANN001, ANN201

import json
import multiprocessing
import socket
import sys
import time
from datetime import timedelta

TIMEOUT = timedelta(seconds=120)


def replica(index, workers, elements, rounds, lighthouse, messages, barrier):
    """Average in every round and say when it began and when the result was loaded."""
    socket.gethostname = lambda: "127.0.0.1"
    import torch
    from torch.distributed import TCPStore
    from torchft import Manager, ProcessGroupGloo

    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=TIMEOUT),
        load_state_dict=lambda state: None,
        state_dict=dict,
        min_replica_size=workers,
        replica_id=f"replica-{index}",
        store_addr="127.0.0.1",
        store_port=store.port,
        rank=0,
        world_size=1,
        lighthouse_addr=lighthouse,
        hostname="127.0.0.1",
        timeout=TIMEOUT,
        use_async_quorum=False,
        init_sync=False,
    )
    parameter = torch.zeros(elements)
    for number in range(rounds):
        manager.start_quorum()
        gradient = torch.full((elements,), float(index + 1 + number))
        barrier.wait()
        began = time.monotonic()
        manager.allreduce(gradient).wait()
        parameter.copy_(gradient)
        ended = time.monotonic()
        fine = manager.should_commit()
        error = float((parameter - ((workers + 1) / 2 + number)).abs().max())
        messages.put((number, began, ended, error, fine))
        barrier.wait()
    manager.shutdown(wait=False)


def main():
    """Start the replicas and collect what they say."""
    from torchft.coordination import LighthouseServer

    workers, elements, rounds = (int(one) for one in sys.argv[1:4])
    lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=workers, join_timeout_ms=5000)
    address = lighthouse.address().replace(socket.gethostname(), "127.0.0.1")
    context = multiprocessing.get_context("spawn")
    messages, barrier = context.Queue(), context.Barrier(workers)
    arguments = [(index, workers, elements, rounds, address, messages, barrier) for index in range(workers)]
    processes = [context.Process(target=replica, args=one, daemon=True) for one in arguments]
    for one in processes:
        one.start()
    found = [messages.get(timeout=600) for _ in range(workers * rounds)]
    spans = []
    for number in range(rounds):
        mine = [one for one in found if one[0] == number]
        spans.append((max(one[1] for one in mine), max(one[2] for one in mine)))
    fine = all(one[4] for one in found)
    print(json.dumps({"spans": spans, "error": max(one[3] for one in found), "fine": fine}), flush=True)
    for one in processes:
        one.terminate()
    lighthouse.shutdown()


if __name__ == "__main__":
    main()
