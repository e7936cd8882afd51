"""Flower's FedAvg round as the outer-round benchmark runs it: `python outer_flower.py WORKERS ELEMENTS ROUNDS`.

One server process and one process for each client over gRPC on the loopback, without TLS (what its `start_server` does
unless told otherwise). A round is measured from the last client's answer to the last client's copy of the next model.
Runs in an environment of its own, so it imports nothing of ours. Prints {"spans": [[begin, end], …], "error", "fine"}.
"""

# Types are known to another environment than the one that checks them.
# ruff: noqa: ANN001, ANN201, ANN202

import json
import multiprocessing
import socket
import sys
import time

import numpy as np

GRPC_BYTES_MAX = 2**31 - 1


def client(index, workers, elements, address, messages, barrier):
    """Answer fits until the server ends."""
    from flwr.client import NumPyClient, start_client

    parameter = np.zeros(elements, np.float32)

    class Client(NumPyClient):
        """Adds its number to what it was given."""

        def fit(self, parameters, config):
            """Load, say when that was done, train for no time, and answer together with the others."""
            np.copyto(parameter, parameters[0])
            loaded, number = time.monotonic(), config["round"]
            answer = parameter + np.float32(index + 1)
            barrier.wait()
            messages.put((number, loaded, time.monotonic(), float(parameter[-1])))
            return [answer], 1, {}

    start_client(
        server_address=address, client=Client().to_client(), insecure=True, grpc_max_message_length=GRPC_BYTES_MAX
    )


def server(workers, elements, rounds, address):
    """Average what the clients answer."""
    from flwr.common import ndarrays_to_parameters
    from flwr.server import ServerConfig, start_server
    from flwr.server.strategy import FedAvg

    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_fit_clients=workers,
        min_available_clients=workers,
        on_fit_config_fn=lambda number: {"round": number},
        initial_parameters=ndarrays_to_parameters([np.zeros(elements, np.float32)]),
    )
    config = ServerConfig(num_rounds=rounds + 1)
    start_server(server_address=address, config=config, strategy=strategy, grpc_max_message_length=GRPC_BYTES_MAX)


def main():
    """Start server and clients and collect what the clients say."""
    workers, elements, rounds = (int(one) for one in sys.argv[1:4])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    context = multiprocessing.get_context("spawn")
    messages, barrier = context.Queue(), context.Barrier(workers)
    processes = [context.Process(target=server, args=(workers, elements, rounds, address), daemon=True)]
    processes[0].start()
    time.sleep(3)
    for index in range(workers):
        one = context.Process(target=client, args=(index, workers, elements, address, messages, barrier), daemon=True)
        one.start()
        processes.append(one)
    found = [messages.get(timeout=600) for _ in range(workers * (rounds + 1))]
    of = {number: [one for one in found if one[0] == number] for number in range(1, rounds + 2)}
    spans = [
        (max(one[2] for one in of[number]), max(one[1] for one in of[number + 1])) for number in range(1, rounds + 1)
    ]
    error = max(abs(one[3] - (number - 1) * (workers + 1) / 2) for number in of for one in of[number])
    print(json.dumps({"spans": spans, "error": error, "fine": True}), flush=True)
    for one in processes:
        one.terminate()


if __name__ == "__main__":
    main()
