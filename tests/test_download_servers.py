"""`ddm hypersim download` from a real server on the loopback interface that misbehaves or is not there."""

import random
from dataclasses import replace
from pathlib import Path

import hypersim_archives
import pytest
from hypersim_archives import FAST, assert_whole, expected, report, write_archive
from range_server import Fault, RangeServer, serve, wait_until

from ddm_training import remote_zip
from ddm_training.download import HypersimDownloadConfig
from ddm_training.errors import InputError
from ddm_training.http_ranges import CHUNK, RangeClient, RetryPolicy
from ddm_training.remote_zip import open_archive

server, config = hypersim_archives.server, hypersim_archives.config  # fixtures


@pytest.mark.parametrize("kind", ["drop", "short", "shift", "total", "length", "encode"])
def test_passing_faults_are_outlived(config: HypersimDownloadConfig, server: RangeServer, kind: str):
    server.faults = [Fault(kind, times=3)]  # pyright: ignore[reportArgumentType]
    config.main()
    assert server.faults[0].times == 0
    assert_whole(config, expected())


def test_a_broken_transfer_goes_on_where_it_broke(tmp_path: Path):
    data = random.Random(3).randbytes(2_000_000)
    (tmp_path / "a").write_bytes(data)
    with serve(tmp_path) as server:
        server.faults = [Fault("drop", min_bytes=200_000)]  # every transfer of that size, for ever
        assert RangeClient(FAST).read(f"{server.url}/a", 0, len(data), size=len(data)) == data
        starts = [request.start for request in server.requests]
        assert starts == sorted(set(starts))
        assert len(starts) > 3
        assert server.sent() < len(data) + len(starts) * CHUNK


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("shift", "the server answered 'bytes"),
        ("total", "the server answered 'bytes"),
        ("length", "contradicts its own Content-Range"),
        ("encode", "re-encoded"),
        ("ignore", "ignores range requests"),
    ],
)
def test_a_lying_server_is_named_and_other_scenes_go_on(
    config: HypersimDownloadConfig, server: RangeServer, kind: str, message: str
):
    server.faults = [Fault(kind, name="ai_001_002")]  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"1 of 3 scenes failed[\s\S]*ai_001_002") as error:
        config.main()
    assert message in str(error.value)
    assert_whole(config, expected(("ai_001_001", "ai_002_001")))
    assert message in report(config)["failed_scenes"]["ai_001_002"]


def test_a_server_that_ignores_ranges_does_not_get_to_send_the_archive(tmp_path: Path):
    (tmp_path / "big.zip").write_bytes(b"\0" * 50_000_000)
    with serve(tmp_path) as server:
        server.faults = [Fault("ignore", min_bytes=1)]
        with pytest.raises(remote_zip.RemoteError, match=r"answered 200 with 50000000 bytes .* expected 206"):
            open_archive(RangeClient(FAST), f"{server.url}/big.zip")
        wait_until(lambda: server.connections == 1)
        assert len(server.requests) == 1
        assert server.sent() < 20_000_000  # what fits into socket buffers


def test_404_is_final_for_that_scene_only(config: HypersimDownloadConfig, server: RangeServer):
    (server.root / "ai_001_002.zip").unlink()
    with pytest.raises(InputError, match=r"1 of 3 scenes failed[\s\S]*ai_001_002.*not found \(HTTP 404\)"):
        config.main()
    assert len([r for r in server.requests if "ai_001_002" in r.path]) == 1
    assert_whole(config, expected(("ai_001_001", "ai_002_001")))
    write_archive(server.root / "ai_001_002.zip", "ai_001_002", 4)
    config.main()
    assert_whole(config, expected())


def test_503_waits_as_long_as_the_server_asks(config: HypersimDownloadConfig, server: RangeServer):
    server.faults = [Fault("status", times=1, status=503, headers={"Retry-After": "1"})]
    replace(config, split="val", connections=1).main()
    refused = next(i for i, r in enumerate(server.requests) if r.status == 503)
    assert server.requests[refused + 1].at - server.requests[refused].at >= 1.0
    assert_whole(config, expected(("ai_002_001",)))


def test_a_server_that_stays_broken_is_given_up_with_the_work_done(config: HypersimDownloadConfig, server: RangeServer):
    server.faults = [Fault("status", name="ai_002_001", min_bytes=5000, max_bytes=120_000, status=500)]
    replace(config, scenes=("ai_001_001",)).main()
    server.faults[0].name = ""
    with pytest.raises(InputError, match=r"10 failures in a row.*HTTP 500.*Given up after 4 tries"):
        config.main()
    assert_whole(config, expected(("ai_001_001",)))


def test_nobody_listening_is_an_error_that_names_the_address(config: HypersimDownloadConfig):
    with pytest.raises(InputError, match=r"http://127.0.0.1:9/ai_001_001.zip: no connection"):
        replace(config, base_url="http://127.0.0.1:9").main()


def test_back_off_doubles_is_jittered_and_bounded():
    policy = RetryPolicy(backoff=1.0, longest=60.0, longest_retry_after=300.0)
    for attempt, top in ((1, 1.0), (2, 2.0), (4, 8.0), (20, 60.0), (10_000, 60.0)):
        delays = [policy.delay(attempt) for _ in range(50)]
        assert top / 2 <= min(delays) < max(delays) <= top
    assert policy.delay(1, retry_after=7.0) == 7.0
    assert policy.delay(1, retry_after=1e9) == 300.0
