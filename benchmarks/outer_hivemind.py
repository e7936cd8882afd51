"""hivemind's averager as the outer-round benchmark runs it: `python outer_hivemind.py WORKERS ELEMENTS ROUNDS`.

One process for each peer with a DHT and a p2pd of its own; every peer averages one fp32 tensor, uncompressed, and
copies the result into a parameter. A round is measured from the last peer's `step`, which finds the group first; with a
fourth argument `formed` the group stands before the clock starts. Runs in an environment of its own, so it imports
nothing of ours. Prints {"spans": [[begin, end], …], "error", "fine"}.
"""

# Types are known to another environment than the one that checks them.
# ruff: noqa: ANN001, ANN201

import json
import multiprocessing
import sys
import time

PREFIX = "bench"
MATCHMAKING_S, REQUEST_S = 3.0, 2.0
FORMING_S, PATIENCE_S = 5.0, 300.0


def peer(index, workers, elements, rounds, addresses, messages, barrier, formed):
    """Average in every round and say when it began and when the result was loaded."""
    multiprocessing.set_start_method("fork", force=True)  # hivemind's own processes need it
    import hivemind
    import torch
    from hivemind.averaging import DecentralizedAverager
    from hivemind.compression import NoCompression

    torch.set_num_threads(1)
    dht = hivemind.DHT(initial_peers=addresses, host_maddrs=["/ip4/127.0.0.1/tcp/0"], start=True)
    messages.put(("address", [str(one) for one in dht.get_visible_maddrs()]))
    parameter = torch.zeros(elements)
    averager = DecentralizedAverager(
        [torch.full((elements,), float(index + 1))],
        dht,
        prefix=PREFIX,
        target_group_size=workers,
        min_group_size=workers,
        min_matchmaking_time=MATCHMAKING_S,
        request_timeout=REQUEST_S,
        compression=NoCompression(),
        start=True,
    )
    messages.put(("ready", index))
    for number in range(rounds):
        with averager.get_tensors() as tensors:
            tensors[0].fill_(float(index + 1 + number))
        barrier.wait()
        if formed:  # the group stands before the clock starts: what is left is the all-reduce alone
            control = averager.step(wait=False, require_trigger=True, timeout=PATIENCE_S)
            time.sleep(FORMING_S)
            barrier.wait()
            began = time.monotonic()
            control.allow_allreduce()
            fine = control.result(PATIENCE_S) is not None
        else:
            began = time.monotonic()
            fine = averager.step(timeout=PATIENCE_S) is not None
        with averager.get_tensors() as tensors:
            parameter.copy_(tensors[0])
        ended = time.monotonic()
        error = float((parameter - ((workers + 1) / 2 + number)).abs().max())
        messages.put(("round", (number, began, ended, error, fine)))
        barrier.wait()
    barrier.wait()
    averager.shutdown()
    dht.shutdown()


def main():
    """Start the peers one after the other and collect what they say."""
    workers, elements, rounds = (int(one) for one in sys.argv[1:4])
    formed = "formed" in sys.argv[4:]
    context = multiprocessing.get_context("spawn")
    messages, barrier = context.Queue(), context.Barrier(workers)
    addresses, peers, found = [], [], []
    for index in range(workers):
        one = context.Process(
            target=peer, args=(index, workers, elements, rounds, addresses, messages, barrier, formed)
        )
        one.start()
        peers.append(one)
        while (message := messages.get(timeout=120))[0] != "address":
            pass
        addresses = addresses or message[1]
    while len(found) < workers * rounds:
        message = messages.get(timeout=600)
        if message[0] == "round":
            found.append(message[1])
    for one in peers:
        one.join(30)
    spans = []
    for number in range(rounds):
        mine = [one for one in found if one[0] == number]
        spans.append((max(one[1] for one in mine), max(one[2] for one in mine)))
    print(json.dumps({"spans": spans, "error": max(one[3] for one in found), "fine": all(one[4] for one in found)}))


if __name__ == "__main__":
    main()
