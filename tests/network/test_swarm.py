"""How many connections a node may have: as many as the system lets it open files for."""

import pytest

from hypha.network.swarm import CONNECTIONS_MAX, CONNECTIONS_PER_PEER_MAX, connections_max


@pytest.mark.parametrize(
    ("files", "connections"),
    [(1024, 900), (65_536, CONNECTIONS_MAX), (-1, CONNECTIONS_MAX), (2000, 1876), (64, CONNECTIONS_PER_PEER_MAX)],
)
def test_connections_leave_files_for_everything_else(files, connections):
    assert connections_max(files) == connections
