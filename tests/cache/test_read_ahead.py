"""Chunks that threads read: their order, what fails, and when threads stop."""

import threading
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch

from saelens_sparse.activations import read_ahead
from saelens_sparse.activations.read_ahead import ReadAhead

CPU = torch.device("cpu")


def reader(fails_at: int | None = None) -> Callable[[int], list[torch.Tensor]]:
    memory = torch.zeros(3)

    def read(number: int) -> list[torch.Tensor]:
        if number == fails_at:
            raise ValueError(f"chunk {number} cannot be read")
        return [memory.fill_(number)]

    return read


@pytest.mark.parametrize("n_readers", [1, 2, 4])
def test_chunks_come_in_order(n_readers: int) -> None:
    ahead = ReadAhead([reader() for _ in range(n_readers)], 5, CPU)
    for number in range(5, 30):
        assert ahead.at == number
        [chunk] = ahead.next()
        assert chunk.tolist() == 3 * [number]
    ahead.close()


def test_a_chunk_stays_until_the_next_is_asked_for() -> None:
    read: list[int] = []
    readers = [reader(), reader()]

    def noting(index: int) -> Callable[[int], list[torch.Tensor]]:
        def note(number: int) -> list[torch.Tensor]:
            read.append(number)
            return readers[index](number)

        return note

    ahead = ReadAhead([noting(0), noting(1)], 0, CPU)
    [chunk] = ahead.next()
    held = threading.Event()
    held.wait(0.05)
    assert sorted(read) == [0, 1]
    assert chunk.tolist() == [0, 0, 0]
    ahead.next()
    held.wait(0.05)
    assert sorted(read) == [0, 1, 2]
    ahead.close()


def test_a_failure_is_raised_at_its_turn_and_again() -> None:
    ahead = ReadAhead([reader(fails_at=7) for _ in range(3)], 5, CPU)
    assert [int(ahead.next()[0][0]) for _ in range(2)] == [5, 6]
    for _ in range(2):
        with pytest.raises(ValueError, match="chunk 7 cannot be read"):
            ahead.next()
    ahead.close()


@pytest.mark.parametrize("method", ["chunk", "take_back"])
def test_a_chunk_that_a_signal_kept_from_its_caller_is_given_again(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = ReadAhead([reader() for _ in range(2)], 5, CPU)
    ahead.next()
    original = getattr(read_ahead._ReaderThread, method)
    signals = iter([True, True])

    def interrupted(*args: object) -> object:
        result = original(*args)
        if next(signals, False):
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(read_ahead._ReaderThread, method, interrupted)
    found: list[int] = []

    def take() -> None:
        while len(found) < 4:
            with suppress(KeyboardInterrupt):
                found.append(int(ahead.next()[0][0]))

    taking = threading.Thread(target=take, daemon=True)
    taking.start()
    taking.join(timeout=5)
    assert found == [6, 7, 8, 9]
    ahead.close()


@pytest.mark.gpu
def test_chunks_on_a_gpu_are_those_that_were_read() -> None:
    device = torch.device("cuda")

    def pinned() -> Callable[[int], list[torch.Tensor]]:
        memory = torch.empty(1 << 22, pin_memory=True)
        return lambda number: [memory[: (1 << 22) - number].fill_(number)]

    ahead = ReadAhead([pinned() for _ in range(3)], 0, device)
    busy = torch.randn(4096, 4096, device=device)
    for number in range(40):
        [chunk] = ahead.next()
        busy = busy @ busy / 64  # the queue of the device is behind its host
        kept = chunk.clone()
        assert len(kept) == (1 << 22) - number
        assert bool((kept == number).all()) or number % 5
    ahead.close()


@pytest.mark.gpu
def test_a_gpu_writes_and_reads_the_same(tmp_path_factory: pytest.TempPathFactory) -> None:
    from saelens_sparse.activations.sharded import ShardedActivations
    from saelens_sparse.activations.shards.manifest import Hook, Manifest
    from saelens_sparse.activations.shards.writer import ShardWriter

    folder, device = tmp_path_factory.mktemp("cache"), torch.device("cuda")
    hook, n_rows = Hook("a", None, 512), 65_536
    rows = torch.randn(n_rows, hook.d_in, device=device)
    writer = ShardWriter(folder, Manifest((hook,), "float16", n_rows, 16_384, {}, {}))
    for start in range(0, n_rows, 4096):
        part = rows[start : start + 4096] + 0.0
        writer.add([part], torch.arange(start, start + 4096))
        del part
        if writer.rows_of_shard == 16_384:
            writer.end_shard("")
    writer.complete()
    source = ShardedActivations(folder)
    source.open([hook], 4096, device, kept=lambda tokens: torch.arange(len(tokens)))
    found = torch.cat([source.model_batch().parts[0].clone() for _ in range(n_rows // 4096)])
    assert torch.equal(found.sort(0).values, rows.half().sort(0).values)
